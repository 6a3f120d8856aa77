//! Values that the readers of both containers share: defaults of the families, and layers of two kinds.

use super::config::{LayerConfig, RopeConfig, Stretch};
use crate::RopeScaling;
use crate::driver::error::{Error, Result};

/// The base of Gemma's local layers where the file does not say.
pub(super) const LOCAL_ROPE_BASE: f64 = 10_000.0;
/// Of so many layers in a row of Gemma's, the last is global, where the file does not say.
pub(super) const GEMMA_PATTERN: usize = 6;

/// A description is made for every layer, so that their number must be one that the file can have.
pub(super) fn layer_count(layers: usize, tensors: usize) -> Result<usize> {
    if layers > tensors {
        return Err(Error::malformed(format!("the layer count is {layers}, but the file has only {tensors} tensors")));
    }
    Ok(layers)
}

/// Layers of two kinds: local ones see `window` positions under a RoPE of a base of their own, without stretching.
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

/// All but the last of every `pattern` layers; none if 1, all if 0.
pub(super) fn local_layers(layers: usize, pattern: usize) -> Vec<bool> {
    (1..=layers).map(|i| pattern == 0 || !i.is_multiple_of(pattern)).collect()
}

/// YaRN's factor on cosines and sines, with DeepSeek's weight on its logarithm.
pub(super) fn yarn_magnitude(factor: f64, weight: f64) -> f64 {
    if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 }
}
