//! Masks as data: a byte, or a bit, a query and key.

use crate::error::{Result, ensure};
use crate::view::{MAX_AXIS, RawView, reach};
use std::marker::PhantomData;

/// A boolean mask `[batch, seq, heads, keys]`; true lets a query see a key. Strides of 0 broadcast.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    pub(crate) raw: RawMask,
    lifetime: PhantomData<&'a [bool]>,
}

impl<'a> Mask<'a> {
    /// A mask whose entry `[0, 0, 0, 0]` is `data[offset]`.
    ///
    /// # Errors
    /// Shape and strides reach outside `data`.
    pub fn strided(data: &'a [bool], offset: usize, shape: [usize; 4], strides: [i64; 4]) -> Result<Self> {
        let raw = RawMask { data: data.as_ptr().cast::<u8>().wrapping_add(offset), shape, strides, bytes: None };
        let (low, high) = raw.extent("mask")?;
        ensure!(
            offset as i128 + low >= 0 && offset as i128 + high <= data.len() as i128,
            Bounds,
            "mask: shape {shape:?} with strides {strides:?} from offset {offset} leaves a slice of {} entries",
            data.len()
        );
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A mask `[batch, seq, heads, keys]` that lies at the start of `data` in the order of its axes.
    pub fn new(data: &'a [bool], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, 0, shape, crate::view::contiguous(shape))
    }

    /// A mask `[seq, keys]`, the same for all rows and heads.
    pub fn for_all(data: &'a [bool], batch: usize, seq: usize, heads: usize, keys: usize) -> Result<Self> {
        Self::strided(data, 0, [batch, seq, heads, keys], [0, keys as i64, 0, 1])
    }
}

/// A mask as the C ABI passes it: bytes, 0 hides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMask {
    pub data: *const u8,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    pub bytes: Option<usize>,
}

impl RawMask {
    /// The bytes it can touch, relative to its data.
    pub fn extent(&self, name: &str) -> Result<(i128, i128)> {
        if self.shape.contains(&0) {
            return Ok((0, 0));
        }
        ensure!(!self.data.is_null(), NullPointer, "{name}: data is null, but the shape is {:?}", self.shape);
        for axis in 0..4 {
            ensure!(
                self.shape[axis] <= MAX_AXIS,
                Shape,
                "{name}: axis {axis} has {} elements, more than {MAX_AXIS}",
                self.shape[axis]
            );
        }
        let (low, high) = reach(name, self.data.addr(), 1, self.shape, self.strides)?;
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0 && high <= bytes as i128,
                Bounds,
                "{name}: shape {:?} with strides {:?} reaches bytes {low}..{high} of a buffer of {bytes}",
                self.shape,
                self.strides
            );
        }
        Ok((low, high))
    }

    /// The same bytes as a view, to test for overlap; two mask bytes cannot be told from one f16 there.
    pub fn overlaps(&self, out: &RawView) -> Result<bool> {
        let (low, high) = self.extent("mask")?;
        let reach = out.validate("out")?;
        let (a, b) = (self.data.addr() as i128, out.data.addr() as i128);
        Ok(high > low && a + low < b + reach.high as i128 && b + (reach.low as i128) < a + high)
    }
}

/// A mask `[batch, seq, heads, keys]` of one bit a query and key; 1 lets a query see a key. The lowest bit of a byte is the
/// first, and keys are neighbours; other strides are given in bits, and 0 broadcasts.
///
/// It may speak of the last keys alone: with [first keys](Self::with_first_keys), bit j of row b is of key
/// `first_keys[b] + j`, and keys before are seen. So the tree of a speculation is `[batch, n, 1, n]` bits (heads broadcast)
/// over the n tokens that were written last.
#[derive(Clone, Copy, Debug)]
pub struct BitMask<'a> {
    pub(crate) raw: RawBitMask<'a>,
}

impl<'a> BitMask<'a> {
    /// A mask whose entry `[0, 0, 0, 0]` is bit `offset` of `data`; strides of batch, queries and heads in bits.
    ///
    /// # Errors
    /// Shape and strides reach outside `data`.
    pub fn strided(data: &'a [u8], offset: usize, shape: [usize; 4], strides: [i64; 3]) -> Result<Self> {
        let raw = RawBitMask {
            data: data.as_ptr(),
            offset: offset as i64,
            shape,
            strides,
            bytes: Some(data.len()),
            first_keys: None,
        };
        raw.validate()?;
        Ok(Self { raw })
    }

    /// A mask `[batch, seq, keys]`, the same for all heads, without a gap between its bits.
    ///
    /// # Errors
    /// `data` is too short.
    pub fn new(data: &'a [u8], batch: usize, seq: usize, heads: usize, keys: usize) -> Result<Self> {
        let row = keys as i64;
        Self::strided(data, 0, [batch, seq, heads, keys], [row.saturating_mul(seq as i64), row, 0])
    }

    /// `[batch]`: the key of a row's first bit. Keys before it are seen.
    pub fn with_first_keys(self, first_keys: &'a [i32]) -> Self {
        Self { raw: RawBitMask { first_keys: Some(first_keys), ..self.raw } }
    }
}

/// A bit mask as the C ABI passes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawBitMask<'a> {
    pub data: *const u8,
    /// The bit of entry `[0, 0, 0, 0]`.
    pub offset: i64,
    pub shape: [usize; 4],
    /// In bits; keys are neighbours.
    pub strides: [i64; 3],
    pub bytes: Option<usize>,
    pub first_keys: Option<&'a [i32]>,
}

impl RawBitMask<'_> {
    /// The bytes it can touch, relative to its data.
    pub fn validate(&self) -> Result<(i128, i128)> {
        let Self { shape, strides, offset, .. } = *self;
        for (axis, n) in shape.into_iter().enumerate() {
            ensure!(n <= MAX_AXIS, Shape, "bit_mask: axis {axis} has {n} elements, more than {MAX_AXIS}");
        }
        if shape.contains(&0) {
            return Ok((0, 0));
        }
        ensure!(!self.data.is_null(), NullPointer, "bit_mask: data is null, but the shape is {shape:?}");
        let (mut low, mut high) = (i128::from(offset), i128::from(offset) + shape[3] as i128);
        for axis in 0..3 {
            let reach = (shape[axis] as i128 - 1) * i128::from(strides[axis]);
            (low, high) = (low + reach.min(0), high + reach.max(0));
        }
        let (low, high) = (low.div_euclid(8), (high + 7).div_euclid(8));
        let (most, at) = (isize::MAX as i128, self.data.addr() as i128);
        ensure!(
            low >= -most && high <= most && at + low >= 0 && at + high <= usize::MAX as i128,
            Stride,
            "bit_mask: shape {shape:?} with strides {strides:?} from bit {offset} leaves the address space"
        );
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0 && high <= bytes as i128,
                Bounds,
                "bit_mask: shape {shape:?} with strides {strides:?} from bit {offset} reaches bytes {low}..{high} of a buffer \
                 of {bytes}"
            );
        }
        Ok((low, high))
    }

    pub fn overlaps(&self, out: &RawView) -> Result<bool> {
        let (low, high) = self.validate()?;
        let reach = out.validate("out")?;
        let (a, b) = (self.data.addr() as i128, out.data.addr() as i128);
        Ok(high > low && a + low < b + reach.high as i128 && b + (reach.low as i128) < a + high)
    }
}
