//! Values that the readers of both containers share: defaults of the families, and layers of two kinds.

use super::config::{LayerConfig, RopeConfig, Stretch};
use crate::RopeScaling;
use crate::driver::error::{Error, Result};

/// Families whose models differ in more than numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    Gemma,
    Grok,
    /// Llama with an RMSNorm of every head of queries and keys.
    Qwen3,
    /// As Qwen3, with defaults of its own, and possibly experts.
    MiniMind,
}

/// The RoPE base of Gemma's local layers if the file has none.
pub(super) const LOCAL_ROPE_BASE: f64 = 10_000.0;
/// One layer in this many is global in Gemma, the last of each run, if the file does not say.
pub(super) const GEMMA_PATTERN: usize = 6;

/// Grok-1's constants, for files that omit them.
pub(super) struct Grok;

impl Grok {
    /// The root of its width.
    pub const EMBEDDING_SCALE: f32 = 78.383_67;
    /// `1 / sqrt(128)`, of its heads.
    pub const ATTENTION_SCALE: f32 = 0.088_388_35;
    pub const ATTENTION_CAP: f32 = 30.0;
    /// `1 / sqrt(3)`.
    pub const LOGIT_SCALE: f32 = 0.577_350_3;
}

/// Checks the layer count against the file, because memory is reserved for every layer.
pub(super) fn layer_count(layers: usize, tensors: usize) -> Result<usize> {
    if layers > tensors {
        return Err(Error::malformed(format!("the layer count is {layers}, but the file has only {tensors} tensors")));
    }
    Ok(layers)
}

/// Layers of two kinds. Local layers see `window` positions, and their RoPE has the base `local_base` and no scaling.
pub(super) fn alternate(
    local: &[bool],
    window: Option<usize>,
    rope: RopeConfig,
    local_base: f64,
) -> (Vec<LayerConfig>, Vec<RopeConfig>) {
    let layer = |&local: &bool| match local {
        true => LayerConfig { window, rope: 1 },
        false => LayerConfig { window: None, rope: 0 },
    };
    let mut ropes = vec![rope];
    if local.contains(&true) {
        let plain = RopeConfig { base: local_base, stretch: Stretch::Fixed(RopeScaling::None), ..ropes[0].clone() };
        ropes.push(plain);
    }
    (local.iter().map(layer).collect(), ropes)
}

/// Marks all but the last of every `pattern` layers as local; none if 1, all if 0.
pub(super) fn local_layers(layers: usize, pattern: usize) -> Vec<bool> {
    (1..=layers).map(|i| pattern == 0 || !i.is_multiple_of(pattern)).collect()
}

/// YaRN's factor on cosines and sines, with DeepSeek's weight on its logarithm.
pub(super) fn yarn_magnitude(factor: f64, weight: f64) -> f64 {
    if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 }
}
