//! The key/value cache of a whole model: one pair of tensors a layer, one length a batch row.

use std::ops::Range;

use half::{bf16, f16};

use super::error::{Error, Result};
use super::model::{LayerConfig, ModelConfig};
use crate::{DType, View, ViewMut};

/// Elements of the type that the user chose for the cache.
#[derive(Debug, Clone)]
enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Buffer {
    fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::F16 => Self::F16(vec![f16::ZERO; len]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
        }
    }

    /// Moves elements to `to`, which may be among them.
    fn copy_within(&mut self, elements: Range<usize>, to: usize) {
        match self {
            Self::F32(v) => v.copy_within(elements, to),
            Self::F16(v) => v.copy_within(elements, to),
            Self::Bf16(v) => v.copy_within(elements, to),
        }
    }

    fn view(&self, shape: [usize; 4]) -> Result<View<'_>> {
        Ok(match self {
            Self::F32(v) => View::new(v, shape)?,
            Self::F16(v) => View::new(v, shape)?,
            Self::Bf16(v) => View::new(v, shape)?,
        })
    }

    fn view_mut(&mut self, shape: [usize; 4]) -> Result<ViewMut<'_>> {
        Ok(match self {
            Self::F32(v) => ViewMut::new(v, shape)?,
            Self::F16(v) => ViewMut::new(v, shape)?,
            Self::Bf16(v) => ViewMut::new(v, shape)?,
        })
    }
}

/// One layer's keys and values, `[rows, slots, kv_heads, head_dim]` each.
#[derive(Debug, Clone)]
struct LayerCache {
    k: Buffer,
    v: Buffer,
    shape: [usize; 4],
}

/// Keys and values of every layer, zero at first.
///
/// A row is a sequence of its own: its length says how many tokens it holds, and the next token's position is that number.
/// What lies beyond the length is never read, whatever it is.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    lengths: Vec<i32>,
    capacity: usize,
    dtype: DType,
}

/// The slots that a layer needs for sequences of up to `capacity` tokens; a position's slot is its own number.
fn slots(_layer: &LayerConfig, capacity: usize) -> usize {
    capacity
}

impl Cache {
    /// Room for `rows` sequences of up to `capacity` tokens.
    pub fn new(config: &ModelConfig, rows: usize, capacity: usize, dtype: DType) -> Result<Self> {
        let shape = |layer: &LayerConfig| [rows, slots(layer, capacity), config.kv_heads, config.head_dim];
        let elements = |shape: [usize; 4]| shape.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
        let all = config.layers.iter().try_fold(0usize, |sum, layer| sum.checked_add(elements(shape(layer))?));
        let bytes = all.and_then(|n| n.checked_mul(2 * dtype.size()));
        if bytes.is_none_or(|b| isize::try_from(b).is_err()) || i32::try_from(capacity).is_err() {
            return Err(Error::argument(format!(
                "a cache of {rows} rows with {capacity} tokens in {} layers does not fit any memory",
                config.layers.len()
            )));
        }
        let layer = |layer| {
            let (shape, len) = (shape(layer), shape(layer).iter().product());
            LayerCache { k: Buffer::zeros(dtype, len), v: Buffer::zeros(dtype, len), shape }
        };
        Ok(Self { layers: config.layers.iter().map(layer).collect(), lengths: vec![0; rows], capacity, dtype })
    }

    /// The number of sequences it has room for.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// The number of tokens a row has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The number of tokens each row holds.
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }

    /// The tokens that row `row` holds.
    pub fn len(&self, row: usize) -> usize {
        self.lengths[row] as usize
    }

    /// Whether no row holds a token.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&n| n == 0)
    }

    /// The bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        let elements: usize = self.layers.iter().map(|l| l.shape.iter().product::<usize>()).sum();
        2 * elements * self.dtype.size()
    }

    /// Forgets all but the first `len` tokens of a row; no data moves.
    pub fn truncate(&mut self, row: usize, len: usize) {
        self.lengths[row] = self.lengths[row].min(i32::try_from(len).unwrap_or(i32::MAX));
    }

    /// Forgets a row's tokens.
    pub fn reset(&mut self, row: usize) {
        self.truncate(row, 0);
    }

    /// Room left in a row.
    pub fn room(&self, row: usize) -> usize {
        self.capacity() - self.len(row)
    }

    pub(super) fn advance(&mut self, row: usize, tokens: usize) {
        self.lengths[row] += tokens as i32;
    }

    /// Forgets a span of a row's tokens and moves those after it up; turning their keys is the caller's.
    pub(super) fn remove(&mut self, row: usize, span: Range<usize>) {
        let len = self.len(row);
        for LayerCache { k, v, shape: [_, slots, heads, dim] } in &mut self.layers {
            let at = |slot: usize| (row * *slots + slot) * *heads * *dim;
            k.copy_within(at(span.end)..at(len), at(span.start));
            v.copy_within(at(span.end)..at(len), at(span.start));
        }
        self.lengths[row] -= span.len() as i32;
    }

    pub(super) fn views(&self, layer: usize) -> Result<(View<'_>, View<'_>)> {
        let LayerCache { k, v, shape } = &self.layers[layer];
        Ok((k.view(*shape)?, v.view(*shape)?))
    }

    pub(super) fn views_mut(&mut self, layer: usize) -> Result<(ViewMut<'_>, ViewMut<'_>)> {
        let LayerCache { k, v, shape } = &mut self.layers[layer];
        Ok((k.view_mut(*shape)?, v.view_mut(*shape)?))
    }
}
