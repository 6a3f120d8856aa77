//! Masked softmax attention of one tile of query rows over a range of keys.
//!
//! | file | what |
//! | --- | --- |
//! | this one | the problem, the tile, the walk over chunks and blocks |
//! | `key_pointers` | where the keys of a block lie, whatever the cache's layout |
//! | `row_pairs` | values packed in pairs of slots, made into rows |
//! | `visibility` | which rows there are, and which keys their queries may see by position |
//! | `direct` | scores and values of few rows (decode): straight from the cache |
//! | `packed` | scores and values of many rows (prefill): from packed copies of a block |
//! | `softmax` | scores to weights |
//! | `state` | folding, finishing, and moving rows between their own type and f32 |
//!
//! # The road
//! A tile is query rows of one batch row and of one or several KV heads: tokens times the query heads of the group, so that K
//! and V are read once for all of them. Several KV heads go together where the heads of a token are neighbours in memory and
//! the rows are few, so that memory is read in its own order. Keys are walked in blocks of [`BLOCK`] and chunks of [`CHUNK`],
//! both on a grid that starts at key 0 of the cache, whatever is visible:
//!
//! ```text
//! Q rows -> f32 (once)                      scratch.q     [rows][dp]
//! per block: visible bits of every row      RowState      one u64: BLOCK is 64
//!            S = Q K^T                      scratch.s     [rows][BLOCK]
//!            P = 2^(S - max), 0 where hidden, in place
//!            O = O * 2^(old max - max) + P V    scratch.acc   [rows][dvp]
//! per chunk: (max, sum, O) folded into the row's total, in ascending order   scratch.total [rows][dvp]
//! at the end: O / sum -> out, max + ln sum -> LSE
//! ```
//! A tile may also leave the states of its chunks in the workspace (`partials`); [`reduce`] folds them later in the same
//! order, which is how one row runs on many threads.
//!
//! # Why the bits do not depend on anything but the row
//! Every number of a row is computed by a fixed sequence of operations. A score is always the sum over lanes, by
//! [`Simd::sum_lanes`]'s tree, of partial sums over every LANES-th element (of the order in which [`LoadStore::load_pair`] gives
//! them); `direct` takes it directly, `packed` walks the same tree depth-first over a transposed block. Values are added one key
//! after the other. Block and chunk grids are absolute. What a mask hides contributes a weight of exactly 0, and a block or
//! chunk that is wholly hidden leaves a state as it is, so it does not matter whether it is skipped.
//!
//! # Why nothing hidden gets out
//! Keys beyond what some row of the tile may see are not loaded (a prefetch may touch them: it cannot fault and moves no
//! value). A hidden weight is replaced by 0, not multiplied. A weight of 0 still makes NaN out of a hidden NaN or infinity
//! in V: when a block is hidden in part, its V is looked at first, and in the rare case that it is not finite, each row takes
//! only the keys it sees, by the same operations.

mod direct;
mod key_pointers;
mod packed;
mod row_pairs;
mod scales;
mod softmax;
pub(crate) mod state;

use crate::kernels::simd::{MAX_LANES, Simd, lines};
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, KeyRange, between, padded};
use crate::problem::tile::{PACK_ROWS, Tile};
use crate::problem::visibility::TileVisibility;
use crate::view::RawView;
use std::mem::MaybeUninit;

pub(crate) use direct::{DirectScores, DirectValues, OneValue, all_finite};
pub(crate) use key_pointers::{BlockRequest, GatherBuffers, KeyPointerTable, KeyPointers, locate};
pub(crate) use packed::{PackKeys, PackValues};
pub(crate) use row_pairs::Widen;
#[cfg(target_arch = "x86_64")]
pub(crate) use row_pairs::are_pairs;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use row_pairs::unpack_pairs;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use softmax::Softmax;
pub(crate) use state::reduce;
use state::{EMPTY, Output, load_query};

/// Keys of which `direct` does the scores, or adds the values, before it goes on to the next KV head.
const SUBBLOCK: usize = 16;

/// What a row knows of itself while its tile runs.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RowState {
    /// The largest logit of the chunk so far, times log2(e).
    pub max: f32,
    /// Largest logit and sum of the chunks before.
    total: (f32, f32),
    pub token: u32,
    low: i64,
    high: i64,
    pub visible_bits: u64,
    position: i64,
    head: u32,
}

/// Scratch memory of one worker; see [`Scratch::layout`].
pub(crate) struct Scratch {
    pub q: *mut f32,
    pub s: *mut f32,
    pub acc: *mut f32,
    pub total: *mut f32,
    /// A row's sum of weights, lane by lane: `[rows][MAX_LANES]`.
    pub sums: *mut f32,
    /// The K block transposed, and the V block in f32, in slabs as wide as a register tile.
    pub kt: *mut f32,
    pub vp: *mut f32,
    /// K and V blocks whose elements do not lie together: `[BLOCK][dp]`, `[BLOCK][dvp]` of their type.
    k_block: *mut u8,
    pub v_block: *mut u8,
    rows: *mut RowState,
}

impl Scratch {
    /// Bytes for tiles of `rows` rows; a multiple of 64.
    pub fn bytes(rows: usize, d: usize, dv: usize) -> usize {
        Self::layout(std::ptr::null_mut(), rows, d, dv).1
    }

    /// Cuts the memory at `base` (64-byte aligned) into its parts and says how much that is.
    pub fn layout(base: *mut u8, rows: usize, d: usize, dv: usize) -> (Self, usize) {
        let (dp, dvp) = (padded(d), padded(dv));
        let mut used = 0;
        let mut floats = |n: usize| {
            let at = base.wrapping_add(used).cast::<f32>();
            used += (n * size_of::<f32>()).next_multiple_of(64);
            at
        };
        let scratch = Self {
            q: floats(rows * dp),
            s: floats(rows * BLOCK),
            acc: floats(rows * dvp),
            total: floats(rows * dvp),
            sums: floats(rows * MAX_LANES),
            kt: floats(dp * BLOCK),
            vp: floats(BLOCK * dvp),
            k_block: floats(BLOCK * dp).cast(),
            v_block: floats(BLOCK * dvp).cast(),
            rows: floats(rows * size_of::<RowState>().div_ceil(size_of::<f32>())).cast(),
        };
        (scratch, used)
    }
}

/// Runs one tile; `deinterleaved` says in which order K and V keep their elements (see [`Load::load_pair`]).
///
/// # Safety
/// `p` is validated, `tile` is inside it, and `scratch` is laid out for at least `tile.rows()` rows.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd>(
    s: S,
    deinterleaved: Deinterleaved,
    p: &Problem,
    tile: &Tile,
    scratch: &Scratch,
    products: &impl Products<S>,
) {
    let (d, dv) = (p.q.shape[3], p.v_dim);
    let (dp, dvp) = (padded(d), padded(dv));
    let n = tile.rows();
    // SAFETY: the scratch has `n` states; they are plain numbers, written below before they are read.
    let rows = unsafe { std::slice::from_raw_parts_mut(scratch.rows, n) };
    let always_visible = p.visibility.always_visible(tile.batch);
    let mut reach = TileVisibility { low: i64::MAX, high: 0, inner_low: 0, inner_high: i64::MAX, always_visible };
    let far = tile.head_rows >= PACK_ROWS;
    let mut ahead = tile.tokens_and_heads(p).skip(PREFETCH_ROWS);
    let mut seen = None;
    for (r, (row, (token, head))) in rows.iter_mut().zip(tile.tokens_and_heads(p)).enumerate() {
        let ((low, high), position) = match seen {
            Some((same, keys)) if same == token => keys,
            _ => (p.visibility.visible_keys(tile.batch, token), p.visibility.position(tile.batch, token)),
        };
        seen = Some((token, ((low, high), position)));
        *row = RowState {
            max: f32::NEG_INFINITY,
            total: EMPTY,
            low,
            high,
            visible_bits: 0,
            position,
            token: token as u32,
            head: head as u32,
        };
        if low < high {
            (reach.low, reach.high) = (reach.low.min(low), reach.high.max(high));
        }
        (reach.inner_low, reach.inner_high) = (reach.inner_low.max(low), reach.inner_high.min(high));
        // SAFETY: token and head are inside q; the scratch row has dp floats.
        unsafe {
            if far && let Some((token, head)) = ahead.next() {
                let (batch, token) = p.visibility.query(tile.batch, token);
                row_lines(&p.q, p.q.row(batch, token, head)).for_each(|line| s.prefetch(line));
            }
            let (batch, token) = p.visibility.query(tile.batch, token);
            load_query(s, deinterleaved.keys, p.q, p.q.row(batch, token, head), scratch.q.add(r * dp), d);
        }
    }
    // SAFETY: the rows of Q have just been written.
    unsafe { products.pack_queries(s, tile, scratch, d) };

    let output = |row: &RowState| {
        let (token, head) = (row.token as usize, row.head as usize);
        Output { p, batch: tile.batch, token, head, deinterleaved: deinterleaved.values }
    };
    for chunk in tile.first_chunk..tile.end_chunk {
        let (from, to) = reach.within(tile.chunks.keys(chunk));
        let last = chunk + 1 == tile.end_chunk;
        if from < to {
            rows.iter_mut().for_each(|row| row.max = f32::NEG_INFINITY);
            // SAFETY: acc has dvp and sums has MAX_LANES floats a row.
            unsafe {
                std::ptr::write_bytes(scratch.acc, 0, n * dvp);
                std::ptr::write_bytes(scratch.sums, 0, n * MAX_LANES);
            }
            for block in from / BLOCK..to.div_ceil(BLOCK) {
                let key_range = KeyRange {
                    low: from.saturating_sub(block * BLOCK).min(BLOCK),
                    high: (to - block * BLOCK).min(BLOCK),
                };
                // SAFETY: keys from..to are visible to some row, so inside the views.
                unsafe { one_block(s, p, tile, scratch, products, rows, block, key_range, &reach) };
            }
            // SAFETY: the chunk's blocks are done.
            unsafe { products.end_chunk(s, rows, scratch) };
        }
        let mut sums = [0.0; MAX_LANES];
        for r in 0..n {
            if far
                && last
                && let Some(row) = rows.get(r + PREFETCH_ROWS)
            {
                let (batch, token) = p.visibility.query(tile.batch, row.token as usize);
                // SAFETY: token and head are inside out.
                let row = unsafe { p.out.row(batch, token, row.head as usize) };
                row_lines(&p.out, row).for_each(|line| s.prefetch_write(line));
            }
            let row = &mut rows[r];
            // SAFETY: the scratch parts have their rows.
            unsafe {
                let state = if from < to {
                    // Of as many rows at a time as there are lanes.
                    if r.is_multiple_of(S::LANES) {
                        let mut lanes = [s.zero(); MAX_LANES];
                        for (row, lanes) in (r..n).zip(lanes.iter_mut().take(S::LANES)) {
                            *lanes = s.load_f32(scratch.sums.add(row * MAX_LANES));
                        }
                        s.store_f32(sums.as_mut_ptr(), s.sum_lanes(&lanes));
                    }
                    (row.max, sums[r % S::LANES])
                } else {
                    EMPTY
                };
                let (acc, total) = (scratch.acc.add(r * dvp), scratch.total.add(r * dvp));
                output(row).end_chunk(s, tile, (chunk, r), (state, acc), (&mut row.total, total));
            }
        }
    }
    if tile.partials.is_null() && tile.first_chunk == tile.end_chunk {
        for (r, row) in rows.iter().enumerate() {
            // SAFETY: as above.
            unsafe { output(row).finish(s, EMPTY, scratch.acc.add(r * dvp)) };
        }
    }
}

/// How many rows ahead of their use rows of Q and of the output are asked for, where there are many: those of a prompt lie in
/// pieces of a few rows, too short for a hardware prefetcher.
const PREFETCH_ROWS: usize = 8;

/// The lines of a row, if its elements lie together.
#[inline(always)]
fn row_lines(view: &RawView, row: *const u8) -> impl Iterator<Item = *const u8> + use<> {
    lines(row, if view.strides[3] == 1 { view.shape[3] * view.dtype.size() } else { 0 })
}

/// One block of keys for all rows of the tile.
///
/// # Safety
/// As [`tile`]; the keys `key_range` of block `block` are inside the views.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn one_block<S: Simd>(
    s: S,
    p: &Problem,
    tile: &Tile,
    scratch: &Scratch,
    products: &impl Products<S>,
    rows: &mut [RowState],
    block: usize,
    key_range: KeyRange,
    reach: &TileVisibility,
) {
    let base = block * BLOCK;
    let full = key_range.bits();
    let inner = reach.inner_low <= (base + key_range.low) as i64 && (base + key_range.high) as i64 <= reach.inner_high;
    let mut all = p.bias.is_none();
    let mut any = full;
    if inner && p.mask.is_none() && p.bit_mask.is_none() {
        rows.iter_mut().for_each(|row| row.visible_bits = full);
    } else {
        any = 0;
        let always_visible = between(reach.always_visible, base);
        for row in rows.iter_mut() {
            row.visible_bits = between((row.low, row.high), base) | always_visible;
            if row.visible_bits != 0 {
                // SAFETY: the row's keys are inside the masks.
                row.visible_bits &=
                    unsafe { p.visible_by_masks(tile.batch, (row.token, row.head), base, row.visible_bits) };
            }
            any |= row.visible_bits;
            all &= row.visible_bits == full;
        }
        if any == 0 {
            return;
        }
    }

    let (d, dv) = (p.q.shape[3], p.v_dim);
    let mut pointers = [[const { MaybeUninit::uninit() }; BLOCK]; 2];
    let [keys, values] = &mut pointers;
    let (mut k, mut v) = (KeyPointerTable::<u8>::new(keys), KeyPointerTable::<u8>::new(values));
    let gather_buffers = GatherBuffers { k: scratch.k_block, v: scratch.v_block };
    // SAFETY: the block's visible keys are inside k and v, the scratch parts have the sizes their layout gives.
    unsafe {
        locate(&BlockRequest { p, tile, base, key_range, visible_bits: any, reach }, &gather_buffers, (&mut k, &mut v));
        products.block(
            s,
            &Block { p, tile, scratch, base, key_range, visible_bits: any, all, d, dv },
            rows,
            k.rows(),
            &mut v,
        );
    }
}

/// What [`Products`] need to know of a block.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub p: &'a Problem<'a>,
    pub tile: &'a Tile,
    pub scratch: &'a Scratch,
    /// The block's first key.
    pub base: usize,
    pub key_range: KeyRange,
    /// Keys of the key range that some row of the tile sees.
    pub visible_bits: u64,
    /// No row has a hidden key in the key range.
    pub all: bool,
    pub d: usize,
    pub dv: usize,
}

/// The two products of a block, and the softmax between them. Whatever computes them, rows come as f32 in `scratch.q`, and
/// at the end of a chunk a row's weighted values are in `scratch.acc`, and its sum of weights in `scratch.sums`.
pub(crate) trait Products<S: Simd> {
    /// Once a tile: `scratch.q` has its rows.
    ///
    /// # Safety
    /// `scratch` is laid out for the tile's rows.
    unsafe fn pack_queries(&self, s: S, tile: &Tile, scratch: &Scratch, d: usize);

    /// One block of keys for all rows of the tile. The first of a chunk finds `scratch.acc` and `scratch.sums` 0.
    ///
    /// # Safety
    /// `k` and `v` are the rows of the block's key range, values as they lie if they are packed.
    unsafe fn block(&self, s: S, block: &Block, rows: &mut [RowState], k: KeyPointers<u8>, v: &mut KeyPointerTable<u8>);

    /// All blocks of a chunk are done.
    ///
    /// # Safety
    /// `scratch` and `rows` are those of the blocks.
    #[inline(always)]
    unsafe fn end_chunk(&self, _s: S, _rows: &[RowState], _scratch: &Scratch) {}
}

/// [`Products`] by the vector trait: [`direct`] or [`packed`].
pub(crate) struct VectorProducts<'a>(pub &'a Pieces);

impl<S: Simd> Products<S> for VectorProducts<'_> {
    #[inline(always)]
    unsafe fn pack_queries(&self, s: S, tile: &Tile, scratch: &Scratch, d: usize) {
        if tile.head_rows >= PACK_ROWS {
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

/// What a level does with keys of one format. Each function is compiled with the level's features, so that attention over keys of
/// M formats and values of N is made of M + N pieces.
#[derive(Clone, Copy)]
pub(crate) struct KeyPieces {
    pub unit_bytes: usize,
    /// Queries are kept in the order that this format's keys have in registers.
    pub deinterleaved: bool,
    pub scores: unsafe fn(&DirectScores),
    pub pack: unsafe fn(&PackKeys),
}

/// What a level does with values of one format.
#[derive(Clone, Copy)]
pub(crate) struct ValuePieces {
    pub unit_bytes: usize,
    /// Accumulators are kept in the order that this format's values have in registers.
    pub deinterleaved: bool,
    pub accumulate: unsafe fn(&DirectValues),
    pub accumulate_pairs: unsafe fn(&DirectValues),
    pub accumulate_one: unsafe fn(&OneValue),
    pub all_finite: unsafe fn(KeyPointers<u8>, usize, KeyRange, usize) -> bool,
    pub pack: unsafe fn(&mut PackValues),
    pub widen_pairs: unsafe fn(&Widen),
}

/// What a level does with a call's keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Pieces {
    pub keys: KeyPieces,
    pub values: ValuePieces,
    /// Those of f32, for values that were unpacked from pairs.
    pub widened: ValuePieces,
}

/// Whether even and odd elements of every two vectors lie apart, in queries and in accumulators.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deinterleaved {
    pub keys: bool,
    pub values: bool,
}
