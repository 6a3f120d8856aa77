//! The two products of a block: Q K^T and P V.

use super::key_pointers::{KeyPointerTable, KeyPointers};
use super::scales::{Rows, multiply};
use super::{Pieces, RowState, Scratch, direct, packed};
use crate::kernels::simd::{Outlined, Simd};
use crate::problem::attention::Problem;
use crate::problem::grid::{KeyRange, padded};
use crate::problem::tile::{PACK_ROWS, Tile};
use crate::view::RawCacheView;
use std::cell::Cell;

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
    /// Accumulators are rows of the output, and nothing is to be done after this block but to divide them by their sums. Who does so
    /// marks the rows as finished.
    pub finish: bool,
    pub d: usize,
    pub dv: usize,
}

/// The two products of a block, and the softmax between them. Every implementation reads rows as f32 from `scratch.q`; at the end of a
/// chunk, a row's weighted values are in `scratch.acc` and its sum of weights in `scratch.sums`.
pub(crate) trait Products<S: Simd> {
    /// Whether rows of f32 may stay where they lie, from `scratch.q` on and `scratch.q_row` floats apart, for tiles of one token.
    fn reads_queries(&self, _p: &Problem, _tile: &Tile) -> bool {
        false
    }

    /// Whether accumulators may be rows of the output, from `scratch.acc` on and `scratch.acc_row` floats apart, for such tiles.
    fn writes_outputs(&self) -> bool {
        false
    }

    /// Called once per tile, after its rows were written to `scratch.q`.
    ///
    /// # Safety
    /// `scratch` is laid out for the tile's rows.
    unsafe fn pack_queries(&self, s: S, p: &Problem, tile: &Tile, scratch: &Scratch);

    /// Called before the first block of a chunk, for tiles of `rows` rows. `scratch.sums` are 0, and rows are fresh.
    ///
    /// # Safety
    /// `scratch` is laid out for these rows.
    #[inline(always)]
    unsafe fn begin_chunk(&self, p: &Problem, scratch: &Scratch, rows: usize) {
        // SAFETY: acc has padded(dv) floats a row.
        unsafe { std::ptr::write_bytes(scratch.acc, 0, rows * padded(p.v_dim)) };
    }

    /// One block of keys for all rows of the tile.
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

/// Tokens of a tile up to which [`Simd::DIRECT_DIM`] counts: the direct path computes the keys of a block that any row sees for
/// every row.
const DIRECT_TOKENS: usize = 32;

/// The most query rows of a KV head in a tile of several, for elements of so many bytes. Those of one byte are widened at every pass.
pub(crate) const fn direct_rows<S: Simd>(bytes: usize) -> usize {
    if bytes > 1 { S::DIRECT_ROWS } else { PACK_ROWS - 1 }
}

/// Whether the rows of a tile take the [`packed`] path.
#[inline(always)]
fn is_packed<S: Simd>(pieces: &Pieces, p: &Problem, tile: &Tile) -> bool {
    let direct = pieces.keys.quantize_rows.is_some()
        || p.q.shape[3] >= S::DIRECT_DIM && tile.head_rows <= DIRECT_TOKENS * p.group
        || tile.head_rows <= S::DIRECT_ROWS && reads_again(pieces, p)
        || tile.kv_heads > 1;
    tile.head_rows >= PACK_ROWS && !direct
}

/// Whether a tile of many rows that takes the [`direct`] path reads a widened copy of elements that are widened for it. Elements that do
/// not lie together are gathered in the memory of that copy.
#[inline(always)]
pub(super) fn widens_once<S: Simd>(p: &Problem, cache: &RawCacheView, tile: &Tile) -> bool {
    S::WIDENS_ONCE && tile.head_rows >= PACK_ROWS && p.q.shape[3] >= S::DIRECT_DIM && cache.units.strides[3] == 1
}

/// Whether loops of few rows may read a block several times: its keys are neighbours, so that they do not compete for a few sets of the
/// first-level cache, as those between which other heads lie do, and are cheap to widen, or widened before.
#[inline(always)]
fn reads_again(pieces: &Pieces, p: &Problem) -> bool {
    let row = p.k.units.strides[1] as isize * p.k.units.dtype.unit_bytes() as isize;
    let neighbours = row == p.k.dtype.head_bytes(p.q.shape[3]) as isize;
    (pieces.keys.widen.is_some() || p.k.dtype.dtype().is_some() && neighbours)
        && (pieces.values.widen.is_some() || p.v.dtype.dtype().is_some())
}

/// [`Products`] with the vector trait, by the [`direct`] or the [`packed`] path.
pub(crate) struct VectorProducts<'a> {
    pieces: &'a Pieces,
    /// The queries of the tile were multiplied by [`KeyFractions::factor`](super::KeyFractions::factor).
    fractions: Cell<bool>,
}

impl<'a> VectorProducts<'a> {
    pub fn new(pieces: &'a Pieces) -> Self {
        Self { pieces, fractions: Cell::new(false) }
    }
}

impl<S: Simd> Products<S> for VectorProducts<'_> {
    #[inline(always)]
    fn reads_queries(&self, p: &Problem, tile: &Tile) -> bool {
        let keys = self.pieces.keys;
        let changed = keys.quantize_rows.is_some() || keys.fractions.is_some() || keys.deinterleaved;
        !(changed || packed::packs_queries::<S>(&self.pieces.tuning) && is_packed::<S>(self.pieces, p, tile))
    }

    #[inline(always)]
    fn writes_outputs(&self) -> bool {
        !self.pieces.values.deinterleaved
    }

    #[inline(always)]
    unsafe fn begin_chunk(&self, _p: &Problem, _scratch: &Scratch, _rows: usize) {
        // Fresh rows are written before they are read.
    }

    #[inline(always)]
    unsafe fn pack_queries(&self, s: S, p: &Problem, tile: &Tile, scratch: &Scratch) {
        let packed = is_packed::<S>(self.pieces, p, tile);
        if let Some(quantize_rows) = self.pieces.keys.quantize_rows {
            // SAFETY: the caller's.
            unsafe { quantize_rows(scratch, tile.rows(), p.q.shape[3]) };
        } else if packed && packed::packs_queries::<S>(&self.pieces.tuning) {
            let (q, copy) = (scratch.q, scratch.kt);
            // SAFETY: the caller's; no block is packed yet, and the memory of a block of keys is more than that of two register tiles.
            unsafe { s.outline(packed::PackQueries { q, rows: tile.rows(), d: p.q.shape[3], copy }) };
        }
        if let Some(fractions) = &self.pieces.keys.fractions {
            let dp = padded(p.q.shape[3]);
            let rows = Rows { x: scratch.q, rows: tile.rows(), width: dp, low: 0, high: dp };
            let once = self.pieces.keys.widen_elements.is_some() && widens_once::<S>(p, p.k, tile);
            // SAFETY: the caller's; rows are padded.
            self.fractions.set(!packed && !once && unsafe { multiply(s, rows, fractions.factor) });
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
            if is_packed::<S>(self.pieces, block.p, block.tile) {
                if const { S::FEW_REGISTERS } {
                    s.outline(PackedBlock { pieces: self.pieces, block, rows, k, v: v.rows() });
                } else {
                    packed::block(s, self.pieces, block, rows, k, v.rows());
                }
            } else {
                let scores = match &self.pieces.keys.fractions {
                    Some(fractions) if !self.fractions.get() => fractions.scores,
                    _ => self.pieces.keys.scores,
                };
                direct::block(s, self.pieces, scores, block, rows, k, v.rows());
            }
        }
    }
}

/// A function of its own, so that a small call does not pass by what a large one prepares.
struct PackedBlock<'a> {
    pieces: &'a Pieces,
    block: &'a Block<'a>,
    rows: &'a mut [RowState],
    k: KeyPointers<'a, u8>,
    v: KeyPointers<'a, u8>,
}

impl Outlined for PackedBlock<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { pieces, block, rows, k, v } = self;
        // SAFETY: the caller's.
        unsafe { packed::block(s, pieces, block, rows, k, v) };
    }
}
