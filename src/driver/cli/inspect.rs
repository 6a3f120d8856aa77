//! `kvlane inspect`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::{count_of, mebibytes, note, print, print_json};
use super::values;
use crate::driver::cache::{Cache, Formats, PREFILL_CHUNK};
use crate::driver::error::Result;
use crate::driver::model::{Activation, ModelConfig, ModelFile, RopeConfig, Stretch};
use crate::driver::tokenizer::Tokenizer;
use crate::{CacheFormat, Pairing, RopeScaling};

/// Show a model's shape.
#[derive(Debug, Args)]
pub(super) struct Inspect {
    /// A GGUF file, or a directory with config.json and safetensors
    file: PathBuf,
    /// Say what a cache of N tokens takes. Default: the model's context
    #[arg(long, value_name = "N", value_parser = values::at_least_one)]
    context: Option<usize>,
    /// Write JSON, with every tensor
    #[arg(long)]
    json: bool,
}

pub(super) fn inspect(args: &Inspect) -> Result<()> {
    let file = ModelFile::open(&args.file)?;
    let c = file.config();
    let tensors = file.tensors()?;
    let mut types: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for t in &tensors {
        let entry = types.entry(t.ty).or_default();
        *entry = (entry.0 + 1, entry.1 + t.bytes);
    }
    let token_bytes = |format: CacheFormat| c.layers.len() * Formats::from(format).token_bytes(c.kv_heads, c.head_dim);

    // Blocks divide the heads of some models only.
    let formats = || CacheFormat::ALL.into_iter().filter(|format| c.head_dim.is_multiple_of(format.unit_elements()));
    let cached = args.context.unwrap_or(c.context);
    // Absent where it fits into no memory.
    let cache_bytes = |format: CacheFormat| Cache::bytes_for(c, 1, cached, format).ok();

    if args.json {
        return print_json(&json!({
            "format": file.format(),
            "name": c.name,
            "parameters": c.parameters(),
            "vocab": c.vocab,
            "dim": c.dim,
            "layers": c.layers.len(),
            "attention": c.layers.iter().map(|l| json!({ "window": l.window, "rope": l.rope })).collect::<Vec<_>>(),
            "heads": c.heads,
            "kv_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "ffn_dim": c.ffn_dim,
            "active_parameters": c.active_parameters(),
            "experts": c.experts.map(|e| json!({ "count": e.count, "used": e.used, "normalized": e.normalized })),
            "rms_eps": c.rms_eps,
            "ropes": c.ropes.iter().map(|rope| json!({
                "base": rope.base,
                "rotary_dim": rope.rotary_dim,
                "pairing": pairing(rope),
                "scaling": stretch(rope),
            })).collect::<Vec<_>>(),
            "context": c.context,
            "tied": c.tied,
            "bos": c.bos,
            "eos": c.eos,
            "chat_template": c.chat_template,
            "cache_bytes_per_token": formats().map(|f| (f.name().to_owned(), token_bytes(f).into()))
                .collect::<serde_json::Map<_, _>>(),
            "cache_tokens": cached,
            "cache_bytes": formats().map(|f| (f.name().to_owned(), cache_bytes(f).into()))
                .collect::<serde_json::Map<_, _>>(),
            "tensors": tensors.iter().map(|t| json!({
                "name": t.name, "type": t.ty, "shape": t.shape, "bytes": t.bytes,
            })).collect::<Vec<_>>(),
        }));
    }
    let tokens = |ids: &[u32], tokenizer: Option<&Tokenizer>| {
        let name = |id: u32| tokenizer.and_then(|t| t.token(id)).map_or(id.to_string(), |t| format!("{id} {t:?}"));
        if ids.is_empty() { "-".to_owned() } else { ids.iter().map(|&id| name(id)).collect::<Vec<_>>().join(", ") }
    };
    // Show the shape even if the tokenizer cannot be built.
    let tokenizer = file.tokenizer();
    let named = tokenizer.as_ref().ok();
    let bytes: usize = tensors.iter().map(|t| t.bytes).sum();
    let types: Vec<String> =
        types.iter().map(|(ty, (n, bytes))| format!("{ty} x{n} ({})", mebibytes(*bytes))).collect();
    let rope = |rope: &RopeConfig| {
        let (pairing, stretch) = (pairing(rope), stretch(rope));
        format!("base {}, {} of {} elements, {pairing}, {stretch}", rope.base, rope.rotary_dim, c.head_dim)
    };
    let lines = [
        ("format", file.format()),
        ("name", c.name.clone().unwrap_or_else(|| "-".to_owned())),
        (
            "parameters",
            format!(
                "{}{} in {} tensors, {}",
                c.parameters(),
                if c.experts.is_some() { format!(", {} per token,", c.active_parameters()) } else { String::new() },
                tensors.len(),
                mebibytes(bytes)
            ),
        ),
        ("types", types.join(", ")),
        ("vocabulary", format!("{}{}", c.vocab, if c.tied { ", embedding tied to the head" } else { "" })),
        ("layers", layers(c)),
        (
            "width",
            format!(
                "{}, {} in {} ({})",
                c.dim,
                c.ffn_dim,
                match c.experts {
                    Some(e) => format!("each of {} experts, {} of them per token", e.count, e.used),
                    None => "the feed-forward part".to_owned(),
                },
                match c.activation {
                    Activation::Silu => "SwiGLU",
                    Activation::GeluTanh => "GeGLU",
                }
            ),
        ),
        ("heads", format!("{} over {} key/value heads of {}", c.heads, c.kv_heads, c.head_dim)),
        ("rope", c.ropes.iter().map(rope).collect::<Vec<_>>().join("; local layers: ")),
        ("context", format!("{} tokens", c.context)),
        (
            "cache",
            format!(
                "bytes per token: {}{}",
                by_format(formats(), &|format| token_bytes(format).to_string()),
                if c.layers.iter().any(|l| l.window.is_some()) {
                    format!("; local layers keep the tokens of their window and {PREFILL_CHUNK} more")
                } else {
                    String::new()
                }
            ),
        ),
        (
            "",
            format!(
                "{}: {}",
                count_of(cached, "token"),
                by_format(formats(), &|format| cache_bytes(format).map_or("more than there is".to_owned(), mebibytes))
            ),
        ),
        ("starts with", tokens(c.bos.as_slice(), named)),
        ("ends with", tokens(&c.eos, named)),
        ("chat template", if c.chat_template.is_some() { "yes" } else { "no" }.to_owned()),
    ];
    print(&lines.iter().map(|(what, value)| format!("{what:<14}{value}\n")).collect::<String>())?;
    if let Err(e) = &tokenizer {
        note(&format!("note: the tokenizer cannot be built: {e}"));
    }
    Ok(())
}

/// What formats take, those that take the same together: `64 in f32, 32 in f16 or bf16`.
fn by_format(formats: impl Iterator<Item = CacheFormat>, of: &dyn Fn(CacheFormat) -> String) -> String {
    let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
    for format in formats {
        let text = of(format);
        match groups.iter_mut().find(|group| group.0 == text) {
            Some(group) => group.1.push(format.name()),
            None => groups.push((text, vec![format.name()])),
        }
    }
    groups.iter().map(|(text, names)| format!("{text} in {}", names.join(" or "))).collect::<Vec<_>>().join(", ")
}

fn layers(c: &ModelConfig) -> String {
    let mut windows: BTreeMap<usize, usize> = BTreeMap::new();
    c.layers.iter().filter_map(|l| l.window).for_each(|n| *windows.entry(n).or_default() += 1);
    let windows = windows.iter().map(|(n, layers)| format!(", {layers} of them see the last {n} tokens"));
    format!("{}{}", c.layers.len(), windows.collect::<String>())
}

fn pairing(rope: &RopeConfig) -> &'static str {
    match rope.pairing {
        Pairing::Interleaved => "neighbouring pairs",
        Pairing::HalfSplit => "pairs of halves",
    }
}

fn stretch(rope: &RopeConfig) -> String {
    match &rope.stretch {
        Stretch::Fixed(RopeScaling::None) => "not scaled".to_owned(),
        Stretch::Fixed(scaling) => format!("scaled by {scaling:?}"),
        Stretch::LongRope { factor, .. } => format!("LongRoPE by {factor}"),
        Stretch::Divisors(_) => "scaled by a divisor a frequency".to_owned(),
    }
}
