//! The configuration in a Hugging Face directory's `config.json`.

use super::config::{Activation, ExpertConfig, ModelConfig, RopeConfig, Stretch};
use super::family::{
    Family, GEMMA_PATTERN, Grok, LOCAL_ROPE_BASE, alternate, layer_count, local_layers, yarn_magnitude,
};
use crate::driver::error::{Error, Result};
use crate::driver::hf::{HfConfig, HfDir, HfRope};
use crate::{Llama3Scaling, Pairing, RopeScaling, YarnScaling};

/// The architectures that this driver runs. The first two of Grok are different conversions of Grok-1.
const ARCHITECTURES: [(&str, Family); 6] = [
    ("LlamaForCausalLM", Family::Llama),
    ("Gemma3ForCausalLM", Family::Gemma),
    ("GrokForCausalLM", Family::Grok),
    ("Grok1ModelForCausalLM", Family::Grok),
    ("Qwen3ForCausalLM", Family::Qwen3),
    ("MiniMindForCausalLM", Family::MiniMind),
];

pub(super) fn family(dir: &HfDir) -> Result<Family> {
    let theirs = &dir.config().architectures;
    let known = ARCHITECTURES.iter().find(|(name, _)| theirs.iter().any(|a| a == name));
    known.map(|(_, family)| *family).ok_or_else(|| {
        let names = ARCHITECTURES.map(|(name, _)| name).join(", ");
        Error::unsupported(format!("architectures {theirs:?}; this driver runs {names}"))
    })
}

pub(super) fn config(dir: &HfDir) -> Result<ModelConfig> {
    let c = dir.config();
    let kind = family(dir)?;
    let (gemma, grok, minimind) = (kind == Family::Gemma, kind == Family::Grok, kind == Family::MiniMind);
    let (family, activation, theirs, ours) = match kind {
        Family::Gemma => ("Gemma", Activation::GeluTanh, &["gelu_pytorch_tanh"][..], "GELU by tanh"),
        // Conversions say "gelu", but the original computes it by tanh.
        Family::Grok => ("Grok", Activation::GeluTanh, &["gelu", "gelu_new", "gelu_pytorch_tanh"][..], "GELU"),
        Family::Llama => ("Llama", Activation::Silu, &["silu"][..], "SiLU"),
        Family::Qwen3 => ("Qwen3", Activation::Silu, &["silu"][..], "SiLU"),
        Family::MiniMind => ("MiniMind", Activation::Silu, &["silu"][..], "SiLU"),
    };
    let experts = experts(c, kind)?;
    let named = c.hidden_activation.as_deref().filter(|_| gemma).or(c.hidden_act.as_deref());
    for (what, present) in [
        ("biases in attention", c.attention_bias),
        ("biases in the feed-forward part", c.mlp_bias),
        ("a sliding window", !gemma && c.sliding_window.is_some()),
        ("attention to later tokens", c.use_bidirectional_attention.unwrap_or(false)),
        (&format!("an activation other than {ours}"), named.is_some_and(|a| !theirs.contains(&a))),
    ] {
        if present {
            return Err(Error::unsupported(format!("{what} in a {family} model")));
        }
    }
    let heads = c.num_attention_heads;
    if heads == 0 {
        return Err(Error::malformed("num_attention_heads is 0"));
    }
    // Gemma's configurations omit values that equal the default of their class.
    let head_dim = c.head_dim.unwrap_or(if gemma { 256 } else { c.hidden_size / heads });
    let rope = c.rope_parameters.as_ref().or(c.rope_scaling.as_ref());
    let global = rope.and_then(|r| r.full_attention.as_deref()).or(rope);
    let local = rope.and_then(|r| r.sliding_attention.as_deref());
    let partial = c.partial_rotary_factor.or(global.and_then(|r| r.partial_rotary_factor)).unwrap_or(1.0);
    let base = c.rope_theta.or(global.and_then(|r| r.rope_theta));
    let local_base = c.rope_local_base_freq.or(local.and_then(|r| r.rope_theta)).unwrap_or(LOCAL_ROPE_BASE);
    let rope = RopeConfig {
        base: base.unwrap_or(if gemma || minimind { 1e6 } else { 1e4 }),
        pairing: Pairing::HalfSplit,
        rotary_dim: (head_dim as f64 * partial) as usize,
        stretch: global.map_or(Ok(Stretch::Fixed(RopeScaling::None)), |r| stretch(c, r))?,
    };
    let layers = layer_count(c.num_hidden_layers, dir.names().len())?;
    let window = if gemma { c.sliding_window } else { None };
    let local = match window {
        Some(_) => which_are_local(c, layers)?,
        None => vec![false; layers],
    };
    let (layers, ropes) = alternate(&local, window, rope, local_base);
    let query_scale = |scalar: f64| scalar.sqrt().recip() as f32;
    let config = ModelConfig {
        name: None,
        vocab: c.vocab_size,
        dim: c.hidden_size,
        layers,
        heads,
        kv_heads: c.num_key_value_heads.unwrap_or(heads),
        head_dim,
        ffn_dim: c.moe_intermediate_size.filter(|_| experts.is_some()).unwrap_or(c.intermediate_size),
        experts,
        activation,
        rms_eps: c.rms_norm_eps as f32,
        qk_norm: matches!(kind, Family::Gemma | Family::Qwen3 | Family::MiniMind),
        post_norms: gemma || grok,
        ropes,
        embedding_scale: match kind {
            Family::Gemma => (c.hidden_size as f64).sqrt() as f32,
            Family::Grok => c.embedding_multiplier_scale.map_or(Grok::EMBEDDING_SCALE, |x| x as f32),
            _ => 1.0,
        },
        attn_scale: match kind {
            Family::Gemma => Some(query_scale(c.query_pre_attn_scalar.unwrap_or(256.0))),
            Family::Grok => Some(c.attn_output_multiplier.map_or(Grok::ATTENTION_SCALE, |x| x as f32)),
            _ => None,
        },
        attn_softcap: match kind {
            Family::Grok => {
                Some(c.max_attn_value.or(c.attn_logit_softcapping).map_or(Grok::ATTENTION_CAP, |x| x as f32))
            }
            _ => c.attn_logit_softcapping.map(|x| x as f32),
        },
        logit_scale: match kind {
            Family::Grok => c.output_multiplier_scale.map_or(Grok::LOGIT_SCALE, |x| x as f32),
            _ => 1.0,
        },
        logit_softcap: c.final_logit_softcapping.map(|x| x as f32),
        context: c.max_position_embeddings,
        tied: c.tie_word_embeddings.unwrap_or(gemma || grok || minimind),
        bos: c.bos_token_id.as_ref().and_then(|b| b.ids().first().copied()),
        eos: dir.eos().to_vec(),
        chat_template: dir.chat_template().map(str::to_owned),
    };
    config.check()?;
    Ok(config)
}

/// The experts of a family that may have them.
fn experts(c: &HfConfig, kind: Family) -> Result<Option<ExpertConfig>> {
    let need = |what: &str, n: Option<usize>| {
        n.ok_or_else(|| Error::malformed(format!("config.json: a mixture of experts without {what:?}")))
    };
    let count = c.num_local_experts.or(c.num_experts);
    match kind {
        Family::Grok => {}
        // MiniMind's files give the number of experts of dense models too.
        Family::MiniMind if c.use_moe == Some(true) => {}
        Family::MiniMind => return Ok(None),
        _ if count.is_some_and(|n| n > 0) => {
            return Err(Error::unsupported(format!("a mixture of {} experts in a {kind:?} model", count.unwrap_or(0))));
        }
        _ => return Ok(None),
    }
    Ok(Some(ExpertConfig {
        count: need("num_experts", count)?,
        used: need("num_experts_per_tok", c.num_experts_per_tok)?,
        normalized: kind == Family::MiniMind && c.norm_topk_prob.unwrap_or(true),
    }))
}

/// Which layers are local. The file has a word for each layer, or the length of the pattern.
fn which_are_local(c: &HfConfig, layers: usize) -> Result<Vec<bool>> {
    let Some(types) = &c.layer_types else {
        return Ok(local_layers(layers, c.sliding_window_pattern.unwrap_or(GEMMA_PATTERN)));
    };
    if types.len() != layers {
        return Err(Error::malformed(format!("layer_types has {} entries for {layers} layers", types.len())));
    }
    let is_local = |kind: &String| match kind.as_str() {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(Error::unsupported(format!("layers of type {other:?}"))),
    };
    types.iter().map(is_local).collect()
}

fn stretch(c: &HfConfig, r: &HfRope) -> Result<Stretch> {
    let need = |what: &str, v: Option<f64>| {
        v.ok_or_else(|| Error::malformed(format!("config.json: RoPE scaling without {what:?}")))
    };
    let original = r.original_max_position_embeddings.or(c.original_max_position_embeddings);
    Ok(Stretch::Fixed(match r.rope_type.as_deref() {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: need("factor", r.factor)? },
        Some("llama3") => {
            let factor = need("factor", r.factor)?;
            let low_freq_factor = need("low_freq_factor", r.low_freq_factor)?;
            let high_freq_factor = need("high_freq_factor", r.high_freq_factor)?;
            let original = need("original_max_position_embeddings", original.map(|n| n as f64))?;
            Llama3Scaling::new(factor, original)
                .low_freq_factor(low_freq_factor)
                .high_freq_factor(high_freq_factor)
                .into()
        }
        Some("yarn") => {
            let factor = need("factor", r.factor)?;
            let original = original.unwrap_or(c.max_position_embeddings) as f64;
            let mut yarn = YarnScaling::new(factor, original)
                .beta_fast(r.beta_fast.unwrap_or(32.0))
                .beta_slow(r.beta_slow.unwrap_or(1.0))
                .truncate(r.truncate.unwrap_or(true));
            yarn.attention_factor = r.attention_factor.or_else(|| {
                let (m, all) = r.mscale.zip(r.mscale_all_dim)?;
                Some(yarn_magnitude(factor, m) / yarn_magnitude(factor, all))
            });
            yarn.into()
        }
        Some("longrope" | "su") => {
            let original_context = original.unwrap_or(c.max_position_embeddings);
            return Ok(Stretch::LongRope {
                short: r.short_factor.clone().unwrap_or_default(),
                long: r.long_factor.clone().unwrap_or_default(),
                factor: r.factor.unwrap_or(c.max_position_embeddings as f64 / original_context.max(1) as f64),
                original_context,
                attention_factor: r.attention_factor,
            });
        }
        Some(other) => return Err(Error::unsupported(format!("RoPE scaling of type {other:?}"))),
    }))
}
