//! Blocks and chunks of keys. Both lie on a grid that begins at key 0 of the cache, whatever is visible, so that the order in
//! which a row's numbers are added depends on nothing but the row.

use super::limits::MAX_LANES;
use std::ops::Range;

/// Keys per block: one visible bit each in a `u64`.
pub(crate) const BLOCK: usize = 64;
/// Keys per chunk: the unit by which one row is split over threads.
pub(crate) const CHUNK: usize = 1024;
/// Floats before the accumulator in a partial state: max and sum, and room to keep the accumulator aligned.
pub(crate) const PARTIAL_HEADER: usize = 16;

/// Floats a row's partial state takes.
pub(crate) const fn partial_stride(dv: usize) -> usize {
    PARTIAL_HEADER + padded(dv)
}

/// `n` rounded up to whole vectors of the widest level.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(MAX_LANES)
}

/// Upper bound on the chunks in which `keys` keys lie: a ring's keys need not begin where a chunk does, nor its sink tokens lie
/// beside them.
pub(crate) fn most_chunks(keys: usize) -> usize {
    keys.div_ceil(CHUNK) + 2
}

/// The chunks in which any query of a call may see a key: some from the start of the cache (a prefix, sinks), then, after a gap,
/// all that follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunks {
    /// How many lie before the gap, and how many in it.
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

    /// From the first to the last of some visible bits.
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

/// The bits of a block's keys that lie in `low..high`.
#[inline(always)]
pub(crate) fn between((low, high): (i64, i64), base: usize) -> u64 {
    let inside = |key: i64| (key - base as i64).clamp(0, BLOCK as i64) as usize;
    ones(inside(high)) & !ones(inside(low))
}
