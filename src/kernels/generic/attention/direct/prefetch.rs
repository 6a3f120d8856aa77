//! Prefetch distances of the direct path.

use crate::kernels::generic::attention::key_pointers::SUBBLOCKS;
use crate::kernels::generic::attention::{Block, KeyPointers, SUBBLOCK};
use crate::kernels::simd::{LINE, Simd};
use crate::problem::grid::{BLOCK, KeyRange};

/// How far ahead of its use memory is asked for, if a block reaches that far.
pub const PREFETCH_DISTANCE: usize = 12 << 10;

/// The distances in bytes from a piece to the one that is read some pieces later: K of the block, then its V, then K of the next
/// block.
pub struct PrefetchDistances<'a> {
    pub k: KeyPointers<'a, u8>,
    pub v: KeyPointers<'a, u8>,
    pub key_range: KeyRange,
    pub by: usize,
    /// The block is whole and of one KV head. Then memory is asked for a whole block ahead and, for keys, in several places in
    /// turn, a page or more apart: one stream alone does not get all that memory can give.
    pub whole: bool,
}

impl<'a> PrefetchDistances<'a> {
    #[inline(always)]
    pub fn new(block: &Block, k: KeyPointers<'a, u8>, v: KeyPointers<'a, u8>) -> Self {
        let piece = SUBBLOCK * block.tile.kv_heads * block.d * block.p.k.dtype.unit_bytes();
        let whole = block.tile.kv_heads == 1 && block.key_range.len() == BLOCK;
        let by = if whole { SUBBLOCKS } else { PREFETCH_DISTANCE.div_ceil(piece).clamp(1, SUBBLOCKS) };
        Self { k, v, key_range: block.key_range, by, whole }
    }

    #[inline(always)]
    pub fn of_k(&self, index: usize) -> isize {
        let target = index + self.by;
        let to = if target < SUBBLOCKS {
            self.k.piece(self.key_range, target)
        } else {
            self.v.piece(self.key_range, target - SUBBLOCKS)
        };
        distance(self.k.piece(self.key_range, index), to)
    }

    #[inline(always)]
    pub fn of_v(&self, index: usize) -> isize {
        let target = index + self.by;
        let to = if target < SUBBLOCKS {
            self.v.piece(self.key_range, target)
        } else {
            self.k.piece(self.key_range, target)
        };
        distance(self.v.piece(self.key_range, index), to)
    }
}

/// In bytes; 0 if there is nothing to go to.
#[inline(always)]
pub fn distance<T>(from: *const T, to: *const T) -> isize {
    if to.is_null() { 0 } else { to.addr().wrapping_sub(from.addr()) as isize }
}

/// How far ahead of its use memory of whole blocks is asked for once more, now into the first-level cache: a block ahead is more
/// than that holds.
pub const NEAR_DISTANCE: usize = 512;

/// Asks for the memory of a pair of vectors, `ahead` bytes on, or of whole blocks for that and for what comes soon.
#[inline(always)]
pub fn prefetch_pair<S: Simd, T>(s: S, p: *const T, ahead: isize, whole: bool) {
    let p = p.cast::<u8>();
    for line in (0..2 * S::LANES * size_of::<T>()).step_by(LINE) {
        let next = p.wrapping_offset(ahead).wrapping_add(line);
        if whole {
            if line % S::PREFETCH_BYTES == 0 {
                s.prefetch_far(next);
            }
            s.prefetch(p.wrapping_add(NEAR_DISTANCE + line));
        } else {
            s.prefetch(next);
        }
    }
}
