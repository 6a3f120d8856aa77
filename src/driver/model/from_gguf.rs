//! The configuration in a GGUF file's metadata.

use super::config::{Activation, ExpertConfig, ModelConfig, RopeConfig, Stretch};
use super::family::{GEMMA_PATTERN, Grok, LOCAL_ROPE_BASE, alternate, layer_count, local_layers, yarn_magnitude};
use super::names::GGUF_NAMES;
use crate::driver::error::{Error, Result};
use crate::driver::gguf::{Array, Gguf, Value};
use crate::driver::quant::dequantize;
use crate::{Pairing, RopeScaling, YarnScaling};

/// The metadata of one architecture. Its keys are given without the architecture's prefix.
struct Section<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Section<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn usize(&self, key: &str) -> Result<usize> {
        self.gguf.usize(&self.key(key))
    }

    fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.gguf.opt_usize(&self.key(key))
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.opt_f64(&self.key(key))
    }

    fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.opt_f64(key)?.map(|x| x as f32))
    }

    fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.gguf.opt_str(&self.key(key))
    }
}

pub(super) fn config(g: &Gguf) -> Result<ModelConfig> {
    let arch = g.str("general.architecture")?;
    let (gemma, grok) = match arch {
        "llama" => (false, false),
        "gemma3" => (true, false),
        "grok" => (false, true),
        other => {
            return Err(Error::unsupported(format!(
                "architecture {other:?}; this driver runs \"llama\", \"gemma3\" and \"grok\""
            )));
        }
    };
    let s = Section { gguf: g, arch };
    let experts = match s.opt_usize("expert_count")?.filter(|&n| n > 0) {
        // The file's cap on the router's logits is not applied, because neither the original nor llama.cpp has one.
        Some(count) if grok => Some(ExpertConfig { count, used: s.usize("expert_used_count")?, normalized: false }),
        Some(n) => return Err(Error::unsupported(format!("a mixture of {n} experts in architecture {arch:?}"))),
        None => None,
    };
    if let Some(n) = s.opt_usize("attention.temperature_length")?.filter(|&n| n > 0) {
        return Err(Error::unsupported(format!("queries that grow beyond {n} positions")));
    }
    let dim = s.usize("embedding_length")?;
    let heads = s.usize("attention.head_count")?;
    if heads == 0 {
        return Err(Error::malformed(format!("{arch}.attention.head_count is 0")));
    }
    let head_dim = match s.opt_usize("attention.key_length")? {
        Some(n) => n,
        None if dim.is_multiple_of(heads) => dim / heads,
        None => {
            return Err(Error::malformed(format!("an embedding length of {dim} does not divide into {heads} heads")));
        }
    };
    if let Some(n) = s.opt_usize("attention.value_length")?.filter(|&n| n != head_dim) {
        return Err(Error::unsupported(format!("value heads of {n} elements beside key heads of {head_dim}")));
    }
    let embedding = g
        .tensor(GGUF_NAMES.embedding)
        .ok_or_else(|| Error::malformed(format!("tensor {:?} is missing", GGUF_NAMES.embedding)))?;
    let mut eos = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(token_id(g, key)?);
    }
    eos.dedup();
    let layers = layer_count(s.usize("block_count")?, g.tensors().len())?;
    let rope = RopeConfig {
        base: s.opt_f64("rope.freq_base")?.unwrap_or(10_000.0),
        pairing: if gemma || grok { Pairing::HalfSplit } else { Pairing::Interleaved },
        rotary_dim: s.opt_usize("rope.dimension_count")?.unwrap_or(head_dim),
        stretch: stretch(&s)?,
    };
    let window = if gemma { s.opt_usize("attention.sliding_window")?.filter(|&n| n > 0) } else { None };
    let local = match window {
        Some(_) => which_are_local(&s, layers)?,
        None => vec![false; layers],
    };
    let local_base = if gemma { s.opt_f64("rope.freq_base_swa")?.unwrap_or(LOCAL_ROPE_BASE) } else { rope.base };
    let (layers, ropes) = alternate(&local, window, rope, local_base);
    // A cap of 0 is none.
    let cap = |key: &str| Ok::<_, Error>(s.opt_f32(key)?.filter(|&cap| cap != 0.0));
    let ffn_dim = match s.opt_usize("expert_feed_forward_length")? {
        Some(n) if grok && n > 0 => n,
        _ => s.usize("feed_forward_length")?,
    };
    let config = ModelConfig {
        name: g.opt_str("general.name")?.map(str::to_owned),
        vocab: embedding.shape[0],
        dim,
        heads,
        kv_heads: s.opt_usize("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn_dim,
        experts,
        activation: if gemma || grok { Activation::GeluTanh } else { Activation::Silu },
        rms_eps: s.opt_f32("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
        qk_norm: gemma,
        post_norms: gemma || grok,
        embedding_scale: match s.opt_f32("embedding_scale")? {
            Some(scale) if grok => scale,
            None if grok => Grok::EMBEDDING_SCALE,
            _ if gemma => (dim as f64).sqrt() as f32,
            _ => 1.0,
        },
        attn_scale: match s.opt_f32("attention.scale")? {
            // The format has no key for Gemma's query scale. Only that of the 27B model differs from the default.
            None if gemma && layers.len() == 62 => Some((dim as f64 / heads as f64).sqrt().recip() as f32),
            None if grok => Some(s.opt_f32("attention.output_scale")?.unwrap_or(Grok::ATTENTION_SCALE)),
            given => given,
        },
        attn_softcap: cap("attn_logit_softcapping")?.or(grok.then_some(Grok::ATTENTION_CAP)),
        logit_scale: if grok { s.opt_f32("logit_scale")?.unwrap_or(Grok::LOGIT_SCALE) } else { 1.0 },
        logit_softcap: cap("final_logit_softcapping")?,
        layers,
        ropes,
        context: s.usize("context_length")?,
        tied: g.tensor(GGUF_NAMES.output).is_none(),
        bos: token_id(g, "tokenizer.ggml.bos_token_id")?,
        eos,
        chat_template: g.opt_str("tokenizer.chat_template")?.map(str::to_owned),
    };
    config.check()?;
    if let Some(Array::String(tokens)) = g.opt_array("tokenizer.ggml.tokens")?
        && tokens.len() > config.vocab
    {
        return Err(Error::malformed(format!(
            "the tokenizer has {} tokens, the embedding only {} rows",
            tokens.len(),
            config.vocab
        )));
    }
    Ok(config)
}

/// Which layers are local. The file has a flag for each layer, or the length of the pattern.
fn which_are_local(s: &Section, layers: usize) -> Result<Vec<bool>> {
    let key = s.key("attention.sliding_window_pattern");
    match s.gguf.metadata().get(&key) {
        Some(Value::Array(Array::Bool(flags))) if flags.len() == layers => Ok(flags.clone()),
        Some(Value::Array(flags)) => {
            Err(Error::malformed(format!("metadata {key:?} has {} entries; {layers} truth values belong", flags.len())))
        }
        _ => Ok(local_layers(layers, s.opt_usize("attention.sliding_window_pattern")?.unwrap_or(GEMMA_PATTERN))),
    }
}

pub(in crate::driver) fn token_id(g: &Gguf, key: &str) -> Result<Option<u32>> {
    let Some(id) = g.opt_usize(key)? else {
        return Ok(None);
    };
    match u32::try_from(id) {
        Ok(id) => Ok(Some(id)),
        Err(_) => Err(Error::malformed(format!("metadata {key:?} is {id}, which is no token id"))),
    }
}

fn stretch(s: &Section) -> Result<Stretch> {
    if let Some(t) = s.gguf.tensor("rope_freqs.weight") {
        let mut divisors = vec![0.0; t.elements()];
        dequantize(t.ty, t.data, &mut divisors)?;
        return Ok(Stretch::Divisors(divisors.into_iter().map(f64::from).collect()));
    }
    let factor = s.opt_f64("rope.scaling.factor")?;
    let factor =
        || factor.ok_or_else(|| Error::malformed(format!("metadata {:?} is missing", s.key("rope.scaling.factor"))));
    Ok(Stretch::Fixed(match s.opt_str("rope.scaling.type")? {
        None | Some("none") => match s.opt_f64("rope.scale_linear")? {
            Some(factor) if factor != 1.0 => RopeScaling::Linear { factor },
            _ => RopeScaling::None,
        },
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("yarn") => {
            let factor = factor()?;
            let mut yarn = YarnScaling::new(factor, s.usize("rope.scaling.original_context_length")? as f64)
                .beta_fast(s.opt_f64("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0))
                .beta_slow(s.opt_f64("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0));
            // The file's factor multiplies that of the paper.
            yarn.attention_factor =
                s.opt_f64("rope.scaling.attn_factor")?.map(|more| more * yarn_magnitude(factor, 1.0));
            yarn.into()
        }
        Some(other) => return Err(Error::unsupported(format!("RoPE scaling of type {other:?}"))),
    }))
}
