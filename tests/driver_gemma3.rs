//! Gemma-3-270M compared with Hugging Face transformers on the same file (`tests/data/make_gemma3_reference.py` makes
//! the reference).
//!
//! The model is read from the path in `KVLANE_GEMMA3`, or from `kvlane/` in the user's cache directory. Without it
//! these tests print a message and pass, unless `KVLANE_REQUIRE_MODELS` is set, which makes it a failure.
#![cfg(feature = "driver")]

mod model_reference;

use std::sync::LazyLock;

use kvlane::driver::argmax;
use kvlane::driver::{Activation, Cache, Decoder, Logits, Request, Scheduler, Scratch, Tokenizer};
use kvlane::{DType, Pairing};
use model_reference::{Prompt, Reference, open_model};

const FILE: &str = "gemma-3-270m-q4_k_m.gguf";
const WINDOW: usize = 512;

static REFERENCE: LazyLock<Reference> = LazyLock::new(|| Reference::read(include_str!("data/gemma3_reference.json")));

/// The tests share one model. Its linear layers compute in f32, as the reference's do.
static MODEL: LazyLock<Option<(Decoder, Tokenizer)>> = LazyLock::new(|| open_model("KVLANE_GEMMA3", FILE, true));

#[test]
fn the_file_describes_the_layers() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let c = decoder.config();
    assert_eq!((c.dim, c.heads, c.kv_heads, c.head_dim, c.ffn_dim, c.vocab), (640, 4, 1, 256, 2048, 262_144));
    assert_eq!((c.activation, c.qk_norm, c.post_norms, c.tied), (Activation::GeluTanh, true, true, true));
    assert_eq!((c.embedding_scale, c.attn_scale, c.attn_softcap, c.logit_softcap), (640f32.sqrt(), None, None, None));
    let bases: Vec<_> = c.ropes.iter().map(|r| (r.base, r.pairing)).collect();
    assert_eq!(bases, [(1e6, Pairing::HalfSplit), (1e4, Pairing::HalfSplit)]);
    let global: Vec<usize> = (0..18).filter(|&i| c.layers[i].window.is_none()).collect();
    assert_eq!(global, [5, 11, 17]);
    assert!(c.layers.iter().all(|l| l.window.is_none_or(|n| n == WINDOW) && (l.rope == 1) == l.window.is_some()));
    assert_eq!(c.parameters(), 268_098_176);
}

#[test]
fn tokens_are_the_references() {
    let Some((_, tokenizer)) = MODEL.as_ref() else { return };
    let texts = REFERENCE.tokenizer.iter().map(|t| (&t.text, &t.ids));
    for (text, ids) in texts.chain(REFERENCE.prompts.iter().map(|p| (&p.text, &p.ids))) {
        assert_eq!(tokenizer.encode(text, true).unwrap(), *ids, "{text:?}");
        let mut stream = tokenizer.stream();
        let mut streamed = String::new();
        for &id in ids {
            streamed += &stream.push(id).unwrap();
        }
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, tokenizer.decode(ids).unwrap());
        let special = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"];
        assert_eq!(streamed, special.iter().fold(text.clone(), |text, token| text.replace(token, "")));
    }
}

/// Both sides round every product of 18 layers to f32, in different orders, and transformers rounds RoPE's angles to
/// f32 as well. The largest observed difference is 2.6e-4, and the data has four decimals. A wrong angle, scale or
/// window causes errors of tenths.
const TOLERANCE: f64 = 1e-3;

#[test]
fn logits_are_the_references() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let vocab = decoder.config().vocab;
    let mut worst = 0.0f64;
    for case in &REFERENCE.prompts {
        let ids = [case.ids.as_slice(), &case.greedy[..case.greedy.len() - 1]].concat();
        // In pieces, because all logits of a long text take half a gigabyte. The rings of local layers hold the window
        // and one piece, so that the longest text wraps around.
        let mut cache = Cache::with_chunk(decoder.config(), 1, ids.len(), 64, DType::F32).unwrap();
        let mut scratch = Scratch::default();
        let mut wanted = case.positions.iter().enumerate().peekable();
        for (piece, tokens) in ids.chunks(64).enumerate() {
            let logits = decoder.forward(&mut cache, &mut scratch, 0, &[tokens], Logits::All).unwrap();
            while let Some((i, position)) = wanted.next_if(|&(_, &p)| p < 64 * piece + tokens.len()) {
                let row = &logits[(position - 64 * piece) * vocab..][..vocab];
                worst = worst.max(REFERENCE.check_logits(case, i, row, TOLERANCE));
            }
        }
        assert!(wanted.next().is_none());
    }
    eprintln!("largest difference of a logit: {worst:.2e}");
}

/// By default the inputs of linear layers are rounded to sixteen bits. That moves logits by a hundredth, and the likeliest
/// token only where two are as close as that.
#[test]
fn rounded_inputs_stay_close() {
    let Some((exact, _)) = MODEL.as_ref() else { return };
    let Some((rounding, _)) = open_model("KVLANE_GEMMA3", FILE, false) else { return };
    let (mut worst, mut same, mut all) = (0.0f32, 0, 0);
    for case in REFERENCE.prompts.iter().filter(|p| p.ids.len() < 64) {
        let mut caches = [exact, &rounding]
            .map(|d| Cache::new(d.config(), 1, case.ids.len() + case.greedy.len(), DType::F32).unwrap());
        let mut scratch = Scratch::default();
        let mut next = case.ids.clone();
        for &token in &case.greedy {
            let [a, b] = &mut caches;
            let want = exact.forward(a, &mut scratch, 0, &[&next], Logits::Last).unwrap();
            let got = rounding.forward(b, &mut scratch, 0, &[&next], Logits::Last).unwrap();
            let error = want.iter().zip(&got).fold(0.0f32, |w, (a, b)| w.max((a - b).abs()));
            let others = want.iter().enumerate().filter(|&(i, _)| i != token as usize);
            let lead = want[token as usize] - others.fold(f32::MIN, |m, (_, &x)| m.max(x));
            let chosen = argmax(&got).unwrap();
            assert!(chosen == token || lead <= 2.0 * error, "{:?}: {chosen} for {token}, {lead}, {error}", case.text);
            worst = worst.max(error);
            same += usize::from(chosen == token);
            all += 1;
            next = vec![token];
        }
    }
    eprintln!("largest difference of a logit: {worst:.2e}; {same} of {all} tokens are the same");
    assert!(worst > 1e-5 && worst < 0.1, "{worst}");
    assert!(100 * same >= 99 * all, "{same} of {all} tokens");
}

/// The short prompts as sequences of one cache: one padded pass, then one token per sequence and step.
#[test]
fn greedy_tokens_are_the_references() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let cases: Vec<&Prompt> = REFERENCE.prompts.iter().filter(|p| p.ids.len() < 64).collect();
    let mut cache = Cache::new(decoder.config(), cases.len(), 96, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    let mut next: Vec<Vec<u32>> = cases.iter().map(|c| c.ids.clone()).collect();
    for step in 0..cases[0].greedy.len() {
        let tokens: Vec<&[u32]> = next.iter().map(Vec::as_slice).collect();
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &tokens, Logits::Last).unwrap();
        next = logits.chunks(decoder.config().vocab).map(|row| vec![argmax(row).unwrap()]).collect();
        for (case, token) in cases.iter().zip(&next) {
            assert_eq!(token[0], case.greedy[step], "{:?} step {step}", case.text);
        }
    }
}

/// A prompt longer than the rings of local layers, which hold the window and 96 tokens.
#[test]
fn greedy_tokens_past_a_ring_are_the_references() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let case = REFERENCE.prompts.iter().max_by_key(|p| p.ids.len()).unwrap();
    let (chunk, capacity) = (96, case.ids.len() + case.greedy.len());
    let mut cache = Cache::with_chunk(decoder.config(), 1, capacity, chunk, DType::F32).unwrap();
    assert!(case.ids.len() > WINDOW + chunk);
    assert_eq!(cache.bytes(), (15 * (WINDOW + chunk) + 3 * capacity) * 2 * 256 * 4);
    let mut scratch = Scratch::default();
    let mut next = case.ids.clone();
    for want in &case.greedy {
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &[&next], Logits::Last).unwrap();
        next = vec![argmax(&logits).unwrap()];
        assert_eq!(next[0], *want);
    }
}

/// A prompt longer than the window, fed in chunks, with every type of cache.
#[test]
fn greedy_tokens_past_the_window_are_the_references() {
    let Some((decoder, _)) = MODEL.as_ref() else { return };
    let case = REFERENCE.prompts.iter().max_by_key(|p| p.ids.len()).unwrap();
    assert!(case.ids.len() > WINDOW + 128);
    for dtype in [DType::F32, DType::F16] {
        let n = case.greedy.len();
        let mut scheduler = Scheduler::new(decoder, 1, case.ids.len() + n, dtype).unwrap();
        scheduler.submit(Request::new(case.ids.clone()).max_tokens(n)).unwrap();
        let tokens: Vec<u32> = scheduler.run().iter().filter_map(|event| event.token).collect();
        assert_eq!(tokens, case.greedy, "{dtype}");
    }
}
