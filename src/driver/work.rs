//! A count of what the decoder has computed.

use std::ops::Range;

use super::linear::Matrix;
use super::model::ModelConfig;

/// What passes have computed, in multiplications with an addition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Of the linear layers, the router and the output layer included.
    pub linear: u64,
    /// Of attention: two per element of a head for each query head and each key up to the position of its query, within
    /// the window of the layer.
    pub attention: u64,
}

impl Work {
    /// Adds matrices that each were multiplied with `rows` rows.
    pub(super) fn add_linear(&mut self, matrices: &[&Matrix], rows: usize) {
        let elements: usize = matrices.iter().map(|w| w.rows() * w.cols()).sum();
        self.linear += (rows * elements) as u64;
    }

    /// Adds all layers' attention of one new token for each position, over the keys at the positions `held`.
    pub(super) fn add_attention(
        &mut self,
        c: &ModelConfig,
        held: &Range<usize>,
        positions: impl Iterator<Item = i32> + Clone,
    ) {
        let per_key = 2 * c.head_dim * c.heads;
        for layer in &c.layers {
            let keys = positions.clone().map(|p| {
                let end = p as usize + 1;
                let start = end.saturating_sub(layer.window.unwrap_or(usize::MAX));
                end.min(held.end).saturating_sub(start.max(held.start))
            });
            self.attention += (keys.sum::<usize>() * per_key) as u64;
        }
    }
}
