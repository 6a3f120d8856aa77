//! Encoding of text to token ids and back, with the `tokenizers` crate.
//!
//! A Hugging Face directory has a `tokenizer.json`, which the crate reads. A GGUF file has only a vocabulary, merges
//! or scores, and the *name* of a convention. This module builds the tokenizer that the name stands for:
//!
//! - `gpt2`: byte-level BPE. `tokenizer.ggml.pre` names the rule that cuts text into words before BPE. The rule
//!   decides which merges can apply, so that an unknown name is an error.
//! - `llama`: SentencePiece BPE. The file has a score for every token instead of merges. The merges are all pairs of
//!   tokens that join to a token, best score first.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecodeStream, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, SplitDelimiterBehavior, decoders, normalizers,
};

use super::error::{Error, Result};
use super::gguf::{Array, Gguf};
use super::model::token_id;

/// Values of `tokenizer.ggml.token_type` for tokens other than ordinary text.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// SentencePiece's replacement for a space.
const META: &str = "\u{2581}";

/// A model's tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Added before and after every encoded text. A `tokenizer.json` has rules of its own for this, which the crate
    /// applies.
    prefix: Option<u32>,
    suffix: Option<u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        check_json_merges(json)?;
        let inner = shielded("tokenizer.json", || {
            let mut inner = tokenizers::Tokenizer::from_bytes(json)?;
            // A decoder is given all of a text and nothing else; and the length to pad to may be any number.
            inner.with_truncation(None)?.with_padding(None);
            Ok(inner)
        })?;
        Ok(Self { inner, prefix: None, suffix: None })
    }

    /// Builds the tokenizer that a GGUF file describes.
    pub fn from_gguf(g: &Gguf) -> Result<Self> {
        let tokens = strings(g, "tokenizer.ggml.tokens")?
            .ok_or_else(|| Error::malformed("metadata \"tokenizer.ggml.tokens\" is missing"))?;
        let mut vocab = HashMap::with_capacity(tokens.len());
        for (id, token) in (0u32..).zip(tokens) {
            if let Some(first) = vocab.insert(token.as_str(), id) {
                return Err(Error::malformed(format!("token {token:?} has two ids, {first} and {id}")));
            }
        }
        let types = match g.opt_array("tokenizer.ggml.token_type")? {
            None => &[],
            Some(Array::I32(t)) if t.len() == tokens.len() => t.as_slice(),
            Some(t) => {
                return Err(Error::malformed(format!(
                    "\"tokenizer.ggml.token_type\" should be {} signed 32-bit integers, one a token; it has {}",
                    tokens.len(),
                    t.len()
                )));
            }
        };

        let parts = match g.str("tokenizer.ggml.model")? {
            "gpt2" => byte_level(g, &vocab)?,
            "llama" => sentence_piece(g, tokens, types, &vocab)?,
            other => {
                return Err(Error::unsupported(format!(
                    "a tokenizer of the kind {other:?}; \"gpt2\" and \"llama\" are known"
                )));
            }
        };
        let inner = shielded("building the tokenizer", || {
            let vocab: Vocab = vocab.iter().map(|(t, &id)| ((*t).to_owned(), id)).collect();
            let bpe = BPE::builder()
                .vocab_and_merges(vocab, parts.merges)
                .byte_fallback(parts.byte_fallback)
                .fuse_unk(parts.byte_fallback)
                .ignore_merges(parts.ignore_merges);
            let bpe = match parts.unk {
                Some(unk) => bpe.unk_token(unk),
                None => bpe,
            };
            let mut t = tokenizers::Tokenizer::new(bpe.build()?);
            t.with_normalizer(parts.normalizer)?;
            t.with_pre_tokenizer(parts.pre_tokenizer);
            t.with_decoder(Some(parts.decoder));
            t.add_tokens(tokens.iter().zip(types).filter_map(|(token, ty)| match *ty {
                UNKNOWN | CONTROL => Some(AddedToken::from(token.clone(), true).normalized(false)),
                USER_DEFINED => Some(AddedToken::from(token.clone(), false).normalized(false)),
                _ => None,
            }))?;
            Ok(t)
        })?;

        let around = |flag: &str, id: &str, default: bool| -> Result<Option<u32>> {
            if !g.opt_bool(flag)?.unwrap_or(default) {
                return Ok(None);
            }
            match token_id(g, id)? {
                Some(id) if (id as usize) < tokens.len() => Ok(Some(id)),
                // A missing id is an error only if the flag is set.
                None if g.opt_bool(flag)?.is_none() => Ok(None),
                id => Err(Error::malformed(format!("{flag:?} is set, but the token id is {id:?} of {}", tokens.len()))),
            }
        };
        Ok(Self {
            prefix: around("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", parts.bos_by_default)?,
            suffix: around("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", false)?,
            inner,
        })
    }

    /// The token ids of a text. `special` adds the tokens that the model expects around a text, such as a start token.
    /// Special tokens written out in the text are recognised in either case.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = running("encoding a text", || self.inner.encode(text, special))?;
        let mut ids = encoding.get_ids().to_vec();
        if special {
            if let Some(bos) = self.prefix {
                ids.insert(0, bos);
            }
            ids.extend(self.suffix);
        }
        Ok(ids)
    }

    /// The text of token ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        running("decoding tokens", || self.inner.decode(ids, true))
    }

    /// The token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether the vocabulary is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A stream that converts token ids to text as they arrive.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, inner: self.inner.decode_stream(true), pending: Vec::new() }
    }
}

/// Converts token ids to text as they arrive, in whole characters.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    inner: DecodeStream<'a, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>,
    /// Ids that are not converted yet.
    pending: Vec<u32>,
}

impl TextStream<'_> {
    /// Takes one id and returns the text that it completes, which may be empty.
    pub fn push(&mut self, id: u32) -> Result<String> {
        match running("decoding tokens", || self.inner.step(id))? {
            Some(text) => {
                self.pending.clear();
                Ok(text)
            }
            None => {
                self.pending.push(id);
                Ok(String::new())
            }
        }
    }

    /// Ends the stream and returns the rest: incomplete characters become replacement characters.
    pub fn finish(self) -> Result<String> {
        self.tokenizer.decode(&self.pending)
    }
}

/// The parts in which kinds of GGUF tokenizers differ.
struct Parts {
    merges: Merges,
    byte_fallback: bool,
    ignore_merges: bool,
    unk: Option<String>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    decoder: DecoderWrapper,
    bos_by_default: bool,
}

fn byte_level(g: &Gguf, vocab: &HashMap<&str, u32>) -> Result<Parts> {
    let lines = strings(g, "tokenizer.ggml.merges")?
        .ok_or_else(|| Error::malformed("metadata \"tokenizer.ggml.merges\" is missing"))?;
    let mut merges = Merges::with_capacity(lines.len());
    for line in lines {
        // No token of a byte-level vocabulary begins with a space, so that the first space separates the pair.
        let Some((a, b)) = line.split_once(' ') else {
            return Err(Error::malformed(format!("merge {line:?} has no space between its halves")));
        };
        merges.push((a.to_owned(), b.to_owned()));
    }
    check_merges(&merges, |t| vocab.contains_key(t))?;

    let pre = g.opt_str("tokenizer.ggml.pre")?.unwrap_or("default");
    let rules = pre_tokenizer(pre)?;
    Ok(Parts {
        merges,
        byte_fallback: false,
        ignore_merges: rules.ignore_merges,
        unk: None,
        normalizer: rules.nfc.then(|| normalizers::unicode::NFC.into()),
        pre_tokenizer: Some(PreSequence::new(rules.steps).into()),
        decoder: ByteLevel::default().into(),
        bos_by_default: rules.bos_by_default,
    })
}

struct PreTokenizerRules {
    steps: Vec<PreTokenizerWrapper>,
    ignore_merges: bool,
    nfc: bool,
    bos_by_default: bool,
}

/// The splitting rules of a `tokenizer.ggml.pre` name, as the models' own tokenizers (and llama.cpp) define them.
fn pre_tokenizer(name: &str) -> Result<PreTokenizerRules> {
    // GPT-2's rule, part of `ByteLevel`: contractions, words with the space before them, digits, and runs of other
    // characters.
    let gpt2 = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
    let bytes_only = || PreTokenizerWrapper::from(ByteLevel::new(false, true, false));
    let plain = |steps| PreTokenizerRules { steps, ignore_merges: false, nfc: false, bos_by_default: false };
    // A word may begin with one character that is not a letter; digits are split in threes or singly; line breaks
    // belong to the punctuation before them.
    let later = |digits: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    Ok(match name {
        "gpt-2" => plain(vec![gpt2()]),
        "smollm" => plain(vec![Digits::new(true).into(), gpt2()]),
        "default" => plain(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+")?,
            split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)")?,
            split(r"\p{N}+")?,
            split("[0-9][0-9][0-9]")?,
            bytes_only(),
        ]),
        "llama-bpe" => PreTokenizerRules {
            steps: vec![split(&later("{1,3}"))?, bytes_only()],
            ignore_merges: true,
            nfc: false,
            bos_by_default: true,
        },
        "qwen2" => PreTokenizerRules {
            steps: vec![split(&later(""))?, bytes_only()],
            ignore_merges: false,
            nfc: true,
            bos_by_default: false,
        },
        other => {
            return Err(Error::unsupported(format!(
                "pre-tokenizer {other:?}; known are default, gpt-2, llama-bpe, qwen2 and smollm"
            )));
        }
    })
}

fn split(regex: &str) -> Result<PreTokenizerWrapper> {
    Split::new(SplitPattern::Regex(regex.to_owned()), SplitDelimiterBehavior::Isolated, false)
        .map(Into::into)
        .map_err(Error::tokenizer)
}

fn sentence_piece(g: &Gguf, tokens: &[String], types: &[i32], vocab: &HashMap<&str, u32>) -> Result<Parts> {
    let scores = match g.opt_array("tokenizer.ggml.scores")? {
        Some(Array::F32(s)) if s.len() == tokens.len() => s,
        _ => {
            return Err(Error::malformed(format!("\"tokenizer.ggml.scores\" should be {} floats", tokens.len())));
        }
    };
    let unk = token_id(g, "tokenizer.ggml.unknown_token_id")?;
    let unk = unk.and_then(|id| tokens.get(id as usize)).or_else(|| tokens.iter().find(|t| *t == "<unk>"));
    let space_before = g.opt_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);

    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if space_before {
        steps.push(normalizers::Prepend::new(META.to_owned()).into());
    }
    steps.push(normalizers::Replace::new(" ", META).map_err(Error::tokenizer)?.into());

    let mut decode: Vec<DecoderWrapper> = vec![
        normalizers::Replace::new(META, " ").map_err(Error::tokenizer)?.into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if space_before {
        decode.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    Ok(Parts {
        merges: merges_from_scores(tokens, types, scores, vocab)?,
        byte_fallback: true,
        ignore_merges: false,
        unk: unk.cloned(),
        normalizer: Some(normalizers::Sequence::new(steps).into()),
        pre_tokenizer: None,
        decoder: decoders::sequence::Sequence::new(decode).into(),
        bos_by_default: true,
    })
}

/// Every pair of tokens that join to a token, best score of the joined token first, which is the order in which
/// SentencePiece joins pairs. Equal scores are ordered as in Hugging Face's converter: the longer left half first,
/// then the longer right half, then the order of the vocabulary. Byte tokens, control tokens and unknown tokens are
/// not joined.
fn merges_from_scores(tokens: &[String], types: &[i32], scores: &[f32], vocab: &HashMap<&str, u32>) -> Result<Merges> {
    // Every split takes two lookups of up to the token's length, so that the cost is quadratic in the length of a
    // token.
    const MAX_TOKEN: usize = 4096;
    let mut found = Vec::new();
    for ((token, &score), id) in tokens.iter().zip(scores).zip(0u32..) {
        if score.is_nan() {
            return Err(Error::malformed(format!("the score of token {token:?} is NaN")));
        }
        if token.len() > MAX_TOKEN {
            return Err(Error::malformed(format!("token {id} has {} bytes; {MAX_TOKEN} are possible", token.len())));
        }
        if matches!(types.get(id as usize), Some(&(UNKNOWN | CONTROL | BYTE))) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(&ia), Some(&ib)) = (vocab.get(a), vocab.get(b)) {
                found.push((score, a, b, (id, ia, ib)));
            }
        }
    }
    let chars = |s: &str| s.chars().count();
    found.sort_by(|x, y| {
        let best_first = y.0.total_cmp(&x.0);
        best_first.then(chars(y.1).cmp(&chars(x.1))).then(chars(y.2).cmp(&chars(x.2))).then(x.3.cmp(&y.3))
    });
    Ok(found.into_iter().map(|(_, a, b, _)| (a.to_owned(), b.to_owned())).collect())
}

/// Rejects merges whose halves or result are not in the vocabulary, on which the crate can panic.
fn check_merges(merges: &Merges, known: impl Fn(&str) -> bool) -> Result<()> {
    for (a, b) in merges {
        for part in [a.as_str(), b.as_str(), &format!("{a}{b}")] {
            if !known(part) {
                return Err(Error::malformed(format!(
                    "merge {a:?} + {b:?} needs the token {part:?}, which is missing"
                )));
            }
        }
    }
    Ok(())
}

fn check_json_merges(json: &[u8]) -> Result<()> {
    let root: serde_json::Value =
        serde_json::from_slice(json).map_err(|e| Error::malformed(format!("tokenizer.json: {e}")))?;
    let model = &root["model"];
    if model["type"] != "BPE" || !model["continuing_subword_prefix"].as_str().unwrap_or("").is_empty() {
        return Ok(());
    }
    let mut merges = Merges::new();
    for m in model["merges"].as_array().into_iter().flatten() {
        let pair = match m {
            serde_json::Value::String(s) => s.split_once(' '),
            _ => m[0].as_str().zip(m[1].as_str()),
        };
        let Some((a, b)) = pair else {
            return Err(Error::malformed(format!("tokenizer.json: {m} is no merge")));
        };
        merges.push((a.to_owned(), b.to_owned()));
    }
    let vocab = model["vocab"].as_object();
    check_merges(&merges, |t| vocab.is_some_and(|v| v.contains_key(t))).map_err(|e| e.context("tokenizer.json"))
}

/// Runs the crate on data from a file, and returns a panic as an error. The checks above cover the known panics.
fn shielded<T>(what: &str, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(t)) => Ok(t),
        Ok(Err(e)) => Err(Error::malformed(format!("{what}: {e}"))),
        Err(_) => Err(Error::malformed(format!("{what}: the data makes the tokenizers library panic"))),
    }
}

/// As [`shielded`], for what a tokenizer that was read is asked for.
fn running<T>(what: &str, f: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result.map_err(Error::tokenizer),
        Err(_) => Err(Error::tokenizer(format!("{what}: the tokenizer's data makes the tokenizers library panic"))),
    }
}

fn strings<'a>(g: &'a Gguf, key: &str) -> Result<Option<&'a [String]>> {
    match g.opt_array(key)? {
        None => Ok(None),
        Some(Array::String(s)) => Ok(Some(s)),
        Some(_) => Err(Error::malformed(format!("metadata {key:?} is not an array of strings"))),
    }
}
