//! Blocks and chunks of keys. Both grids begin at key 0 of the sequence, whatever is visible, so that the order of
//! additions of a query row depends on the row only.

use super::limits::MAX_LANES;
use std::ops::Range;

/// Keys per block: one visible bit each in a `u64`.
pub(crate) const BLOCK: usize = 64;
/// Keys per chunk: the unit by which one sequence is split over threads.
pub(crate) const CHUNK: usize = 1024;
/// Floats before the accumulator in a partial state: maximum, sum, and padding to align the accumulator.
pub(crate) const PARTIAL_HEADER: usize = 16;

/// Floats of the partial state of a query row.
pub(crate) const fn partial_stride(dv: usize) -> usize {
    PARTIAL_HEADER + padded(dv)
}

/// `n` rounded up to whole vectors of the widest level.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(MAX_LANES)
}

/// Upper bound on the chunks that `keys` keys touch. The keys of a ring may begin inside a chunk, and its sink tokens
/// may be in another.
pub(crate) fn most_chunks(keys: usize) -> usize {
    keys.div_ceil(CHUNK) + 2
}

/// The chunks that a query of the call may see: some from the start of the sequence (a prefix, sink tokens), then,
/// after a gap, all that follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunks {
    /// The numbers of chunks before the gap and in the gap.
    pub before: usize,
    pub gap: usize,
}

impl Chunks {
    /// The keys of the call's chunk number `index`.
    pub fn keys(self, index: usize) -> Range<usize> {
        let chunk = if index < self.before { index } else { index + self.gap };
        chunk * CHUNK..(chunk + 1) * CHUNK
    }
}

/// Keys of a block, relative to its first key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeyRange {
    pub low: usize,
    pub high: usize,
}

impl KeyRange {
    pub fn bits(self) -> u64 {
        ones(self.high) & !ones(self.low)
    }

    pub fn len(self) -> usize {
        self.high - self.low
    }

    /// The range from the first to the last visible bit.
    pub fn around(bits: u64) -> Self {
        if bits == 0 {
            return Self { low: 0, high: 0 };
        }
        Self { low: bits.trailing_zeros() as usize, high: BLOCK - bits.leading_zeros() as usize }
    }
}

/// The lowest `n <= 64` bits.
#[inline(always)]
pub(crate) fn ones(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// The bits of a block's keys in `low..high`.
#[inline(always)]
pub(crate) fn between((low, high): (i64, i64), base: usize) -> u64 {
    let inside = |key: i64| (key - base as i64).clamp(0, BLOCK as i64) as usize;
    ones(inside(high)) & !ones(inside(low))
}
