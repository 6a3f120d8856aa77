//! Prefetch distances of the direct path.

use crate::format::CacheFormat;
use crate::kernels::generic::attention::key_pointers::SUBBLOCKS;
use crate::kernels::generic::attention::{Block, KeyPointers, SUBBLOCK};
use crate::kernels::simd::{LINE, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use crate::tuning::{KeyOrder, Prefetch, Tuning};

/// Prefetch distances: from a subblock to the one that is read some subblocks later, in the order K of the block, V of the block, K of
/// the next block.
pub struct PrefetchDistances<'a> {
    pub k: KeyPointers<'a, u8>,
    pub v: KeyPointers<'a, u8>,
    pub key_range: KeyRange,
    pub by: usize,
    /// The block is whole and of one KV head. It is then prefetched a whole block ahead.
    pub whole: bool,
    /// Its keys are read in several streams that are a page or more apart, because on some CPUs one stream does not reach the
    /// bandwidth of memory.
    pub spread: bool,
    kind_of_k: Prefetch,
    kind_of_v: Prefetch,
}

impl<'a> PrefetchDistances<'a> {
    #[inline(always)]
    pub fn new(tuning: &Tuning, block: &Block, k: KeyPointers<'a, u8>, v: KeyPointers<'a, u8>) -> Self {
        let piece = SUBBLOCK * block.tile.kv_heads * block.p.k.dtype.head_bytes(block.d);
        let whole = block.tile.kv_heads == 1 && block.key_range.len() == BLOCK;
        let by = if whole { SUBBLOCKS } else { tuning.run_distance.div_ceil(piece).clamp(1, SUBBLOCKS) };
        let one_row = block.tile.head_rows == 1;
        let kind = |format: CacheFormat, dim| match format.head_bytes(dim) {
            _ if whole => tuning.block,
            // By measurement on Zen 3, where prefetches of longer heads lose what these gain.
            bytes if one_row && (bytes <= LINE || format.is_blocks()) => tuning.run,
            _ if one_row => tuning.run_one_row,
            LONG_HEAD.. => tuning.run_long_heads,
            _ => tuning.run,
        };
        let (kind_of_k, kind_of_v) = (kind(block.p.k.dtype, block.d), kind(block.p.v.dtype, block.dv));
        let spread = tuning.block_order == KeyOrder::Spread;
        Self { k, v, key_range: block.key_range, by, whole, spread, kind_of_k, kind_of_v }
    }

    #[inline(always)]
    pub fn of_k(&self, index: usize) -> Ahead {
        if self.kind_of_k == Prefetch::NextKeys {
            return Ahead { distance: self.k.seq_offset(KEYS_AHEAD), kind: self.kind_of_k };
        }
        let target = index + self.by;
        let to = if target < SUBBLOCKS {
            self.k.subblock(self.key_range, target)
        } else {
            self.v.subblock(self.key_range, target - SUBBLOCKS)
        };
        Self::ahead(self.kind_of_k, self.k.subblock(self.key_range, index), to)
    }

    #[inline(always)]
    pub fn of_v(&self, index: usize) -> Ahead {
        if self.kind_of_v == Prefetch::NextKeys {
            return Ahead { distance: self.v.seq_offset(VALUES_AHEAD), kind: self.kind_of_v };
        }
        let target = index + self.by;
        let to = if target < SUBBLOCKS {
            self.v.subblock(self.key_range, target)
        } else {
            self.k.subblock(self.key_range, target)
        };
        Self::ahead(self.kind_of_v, self.v.subblock(self.key_range, index), to)
    }

    #[inline(always)]
    fn ahead(kind: Prefetch, from: *const u8, to: *const u8) -> Ahead {
        match kind {
            Prefetch::Off => Ahead::NONE,
            kind => Ahead { distance: distance(from, to), kind },
        }
    }
}

/// Bytes from one address to another; 0 if the other is null.
#[inline(always)]
pub fn distance<T>(from: *const T, to: *const T) -> isize {
    if to.is_null() { 0 } else { to.addr().wrapping_sub(from.addr()) as isize }
}

/// Distance in bytes of the prefetch into the first-level cache where both levels are prefetched: what is read until a line in the
/// second level is due is more than the first holds.
pub const NEAR_DISTANCE: usize = 512;

/// Bytes of a head from which on [`Tuning::run_long_heads`] serves.
const LONG_HEAD: usize = 512;

/// Keys from the one that is read to that which [`Prefetch::NextKeys`] brings: those of the next step.
const KEYS_AHEAD: usize = 2;
/// The same for values, which take fewer instructions each.
pub const VALUES_AHEAD: usize = 4;

/// What a loop over keys or values prefetches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ahead {
    /// Bytes from what is read to what is prefetched; 0: nothing is.
    pub distance: isize,
    pub kind: Prefetch,
}

impl Ahead {
    /// Prefetches nothing.
    pub const NONE: Self = Self { distance: 0, kind: Prefetch::Off };

    /// The same in two distances, for loops that prefetch without a branch: into the second-level cache and into the first. These loops
    /// are bound by arithmetic, so that prefetches into both levels cost nothing.
    #[inline(always)]
    pub fn distances(&self) -> Distances {
        // What is at hand is fetched once more where nothing is to be prefetched.
        let (far, near) = match self.kind {
            Prefetch::Off => (0, 0),
            Prefetch::FirstLevel | Prefetch::NextKeys => (0, self.distance),
            Prefetch::SecondLevel | Prefetch::BothLevels | Prefetch::BothLevelsInPairs => {
                (self.distance, NEAR_DISTANCE as isize)
            }
        };
        Distances { far, near }
    }

    /// Prefetches `bytes` from `next` on, which are ahead of what is read, if anything is.
    #[inline(always)]
    pub fn lines<S: Simd>(&self, s: S, next: *const u8, bytes: usize) {
        // Two cases that a loop can be compiled for; one for each kind would be a jump for every line.
        let near = matches!(self.kind, Prefetch::FirstLevel | Prefetch::NextKeys);
        for line in (0..bytes).step_by(LINE) {
            let next = next.wrapping_add(line);
            if near { s.prefetch(next) } else { s.prefetch_far(next) }
        }
    }

    /// Prefetches for a pair of vectors at `p`.
    #[inline(always)]
    pub fn pair<S: Simd, T>(&self, s: S, p: *const T) {
        let p = p.cast::<u8>();
        for line in (0..2 * S::LANES * size_of::<T>()).step_by(LINE) {
            let next = p.wrapping_offset(self.distance).wrapping_add(line);
            match self.kind {
                Prefetch::Off => {}
                Prefetch::FirstLevel | Prefetch::NextKeys => s.prefetch(next),
                Prefetch::SecondLevel => s.prefetch_far(next),
                Prefetch::BothLevels | Prefetch::BothLevelsInPairs => {
                    if line % (2 * LINE) == 0 || self.kind == Prefetch::BothLevels {
                        s.prefetch_far(next);
                    }
                    s.prefetch(p.wrapping_add(NEAR_DISTANCE + line));
                }
            }
        }
    }

    /// Prefetches for a pair of vectors at `p`, which are no longer than a line, where the lines that are far ahead have an order of their
    /// own: `next` is the next of them, if it is time for one.
    #[inline(always)]
    pub fn in_order<S: Simd, T>(&self, s: S, p: *const T, next: Option<*const T>) {
        if let Some(next) = next {
            match self.kind {
                Prefetch::Off => {}
                Prefetch::FirstLevel | Prefetch::NextKeys => s.prefetch(next.cast()),
                Prefetch::SecondLevel | Prefetch::BothLevels | Prefetch::BothLevelsInPairs => {
                    s.prefetch_far(next.cast())
                }
            }
        }
        if matches!(self.kind, Prefetch::BothLevels | Prefetch::BothLevelsInPairs) {
            s.prefetch(p.cast::<u8>().wrapping_add(NEAR_DISTANCE));
        }
    }
}

/// Whether the unit before number `index` of a row began in an earlier half of a line, so that this one is prefetched.
#[inline(always)]
pub const fn begins_half_line<U>(index: usize) -> bool {
    index * size_of::<U>() % (LINE / 2) < size_of::<U>()
}

/// See [`Ahead::distances`].
#[derive(Clone, Copy)]
pub struct Distances {
    far: isize,
    near: isize,
}

impl Distances {
    /// The same, with another distance for the first-level cache if something is prefetched into the second.
    #[inline(always)]
    pub fn near(self, near: isize) -> Self {
        if self.far == 0 { self } else { Self { near, ..self } }
    }

    /// Prefetches into the first-level cache only.
    #[inline(always)]
    pub fn prefetch_near<S: Simd, U>(&self, s: S, p: *const U) {
        s.prefetch(p.cast::<u8>().wrapping_offset(self.near));
    }

    /// Prefetches for what is at `p`.
    #[inline(always)]
    pub fn prefetch<S: Simd, U>(&self, s: S, p: *const U) {
        s.prefetch_far(p.cast::<u8>().wrapping_offset(self.far));
        s.prefetch(p.cast::<u8>().wrapping_offset(self.near));
    }
}
