//! The two products of a block: Q K^T and P V.

use super::key_pointers::{KeyPointerTable, KeyPointers};
use super::{Pieces, RowState, Scratch, direct, packed};
use crate::kernels::simd::Simd;
use crate::problem::attention::Problem;
use crate::problem::grid::KeyRange;
use crate::problem::tile::{PACK_ROWS, Tile};

/// One block of keys of a tile.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub p: &'a Problem<'a>,
    pub tile: &'a Tile,
    pub scratch: &'a Scratch,
    /// The block's first key.
    pub base: usize,
    pub key_range: KeyRange,
    /// Keys of the key range that some query row of the tile sees.
    pub visible_bits: u64,
    /// Every row sees every key of the key range.
    pub all: bool,
    pub d: usize,
    pub dv: usize,
}

/// The two products of a block, and the softmax between them. Every implementation reads rows as f32 from `scratch.q`; at the end of a
/// chunk, a row's weighted values are in `scratch.acc` and its sum of weights in `scratch.sums`.
pub(crate) trait Products<S: Simd> {
    /// Called once per tile, after its rows were written to `scratch.q`.
    ///
    /// # Safety
    /// `scratch` is laid out for the tile's rows.
    unsafe fn pack_queries(&self, s: S, tile: &Tile, scratch: &Scratch, d: usize);

    /// One block of keys for all rows of the tile. `scratch.acc` and `scratch.sums` are 0 before the first block of a chunk.
    ///
    /// # Safety
    /// `k` and `v` point to the block's key range; values packed in pairs are as they lie in the cache.
    unsafe fn block(&self, s: S, block: &Block, rows: &mut [RowState], k: KeyPointers<u8>, v: &mut KeyPointerTable<u8>);

    /// Called after the last block of a chunk.
    ///
    /// # Safety
    /// `scratch` and `rows` are those of the blocks.
    #[inline(always)]
    unsafe fn end_chunk(&self, _s: S, _rows: &[RowState], _scratch: &Scratch) {}
}

/// [`Products`] with the vector trait, by the [`direct`] or the [`packed`] path.
pub(crate) struct VectorProducts<'a>(pub &'a Pieces);

impl<S: Simd> Products<S> for VectorProducts<'_> {
    #[inline(always)]
    unsafe fn pack_queries(&self, s: S, tile: &Tile, scratch: &Scratch, d: usize) {
        if S::PACKED_QUERIES && tile.head_rows >= PACK_ROWS {
            // SAFETY: the caller's.
            unsafe { s.outline(packed::PackQueries { q: scratch.q, rows: tile.rows(), d }) };
        }
    }

    #[inline(always)]
    unsafe fn block(
        &self,
        s: S,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<u8>,
        v: &mut KeyPointerTable<u8>,
    ) {
        // SAFETY: the caller's.
        unsafe {
            if block.tile.head_rows >= PACK_ROWS {
                packed::block(s, self.0, block, rows, k, v.rows());
            } else {
                direct::block(s, self.0, block, rows, k, v.rows());
            }
        }
    }
}
