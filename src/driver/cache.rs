//! The key/value cache of a whole model: one pair of tensors a layer, one length a batch row.

use half::{bf16, f16};

use super::error::{Error, Result};
use super::model::ModelConfig;
use crate::{DType, View, ViewMut};

/// Elements of the type that the user chose for the cache.
#[derive(Debug, Clone)]
enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Buffer {
    fn zeros(dtype: DType, len: usize) -> Result<Self> {
        Ok(match dtype {
            DType::F32 => Self::F32(vec![0.0; len]),
            DType::F16 => Self::F16(vec![f16::ZERO; len]),
            DType::Bf16 => Self::Bf16(vec![bf16::ZERO; len]),
        })
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

/// Keys and values of every layer, `[rows, capacity, kv_heads, head_dim]` each, zero at first.
///
/// A row is a sequence of its own: its length says how many of its slots hold tokens, and the next token goes to the slot
/// of that number. What lies beyond the length is never read, whatever it is.
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<(Buffer, Buffer)>,
    lengths: Vec<i32>,
    shape: [usize; 4],
    dtype: DType,
}

impl Cache {
    /// Room for `rows` sequences of up to `capacity` tokens.
    pub fn new(config: &ModelConfig, rows: usize, capacity: usize, dtype: DType) -> Result<Self> {
        let shape = [rows, capacity, config.kv_heads, config.head_dim];
        let len = shape.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
        let bytes = len.and_then(|n| n.checked_mul(2 * config.layers * dtype.size()));
        let (Some(len), Some(_), Ok(_)) = (len, bytes.filter(|&b| isize::try_from(b).is_ok()), i32::try_from(capacity))
        else {
            return Err(Error::argument(format!(
                "a cache of {rows} rows with {capacity} tokens in {} layers does not fit any memory",
                config.layers
            )));
        };
        let layer = || Ok((Buffer::zeros(dtype, len)?, Buffer::zeros(dtype, len)?));
        let layers = (0..config.layers).map(|_| layer()).collect::<Result<_>>()?;
        Ok(Self { layers, lengths: vec![0; rows], shape, dtype })
    }

    /// The number of sequences it has room for.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// The number of tokens a row has room for.
    pub fn capacity(&self) -> usize {
        self.shape[1]
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
        2 * self.layers.len() * self.shape.iter().product::<usize>() * self.dtype.size()
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

    pub(super) fn views(&self, layer: usize) -> Result<(View<'_>, View<'_>)> {
        let (k, v) = &self.layers[layer];
        Ok((k.view(self.shape)?, v.view(self.shape)?))
    }

    pub(super) fn views_mut(&mut self, layer: usize) -> Result<(ViewMut<'_>, ViewMut<'_>)> {
        let (k, v) = &mut self.layers[layer];
        Ok((k.view_mut(self.shape)?, v.view_mut(self.shape)?))
    }
}
