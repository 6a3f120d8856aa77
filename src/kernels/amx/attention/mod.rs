//! Attention over bf16 keys and values by tile products.
//!
//! | file | what |
//! | --- | --- |
//! | this one | the entry points, and the walk of a tile over chunks and superblocks |
//! | `scratch` | the scratch memory of a tile, and the state of its rows |
//! | `queries`, `keys`, `values` | operands in the form that tile products take |
//! | `work` | the tile products: scores and weighted values |
//! | `logits` | scores to logits, and the masking of keys |
//! | `softmax` | logits to weights, and the end of a chunk |
//! | `non_finite` | repairs of NaN and infinity |
//!
//! # Order of computation
//! As in [`generic`](crate::kernels::generic::attention), a tile is query rows of one KV head, and keys are visited in
//! blocks of 64 and chunks of 1024 on an absolute grid; a block's visible keys are decided as a whole. Between blocks
//! and chunks are superblocks of [`SUPERBLOCK`] blocks, the unit of the online softmax. All matrices are transposed, so
//! that the sixteen lanes of a vector are sixteen query rows ([`LANES`], a *group*) and the softmax needs no sum across
//! lanes:
//!
//! ```text
//! once per tile:          Q -> bf16 terms, transposed, in pairs      B  [group][term][32 dims]   16 pairs x 16 rows
//! per superblock:         K in the cache, or a padded copy           A  [16 keys][32 dims]
//!                         V transposed                               A  [64 keys][half][16 dims] 16 dims x 32 keys
//! per two groups,         S^T = K Q^T                                C  [256 keys][16 rows]
//! over visible blocks:    P^T = 2^(c S^T - max), as bf16 in pairs    B  [128 pairs][16 rows]
//!                         O^T = O^T 2^(old max - max) + V^T P^T      C  [dims][16 rows]
//! per chunk:              O^T transposed and folded into the row's total, in ascending order
//! ```
//! Two neighbouring keys of P^T are the two halves of a 32-bit lane, so that packing weights takes a shift and an OR. V
//! is transposed once for all rows. A decode of few rows runs the same code, which is why decode and prefill agree to
//! the bit.
//!
//! # Accuracy
//! Products of bf16 are exact in f32. A query of another type is the exact sum of two (f16) or three (f32) bf16 terms,
//! and a score is the sum of their products. A softmax weight is rounded to one bf16, with a relative error of 2^-8. A
//! row is divided, chunk by chunk, by the sum of the rounded weights, so that the error of an output is a mean of |v -
//! output| times 2^-8: at most 2^-8 of the largest |v|, and no more than f32 rounding where all values agree. (Division
//! by the sum of the exact weights has the same bound, but errs where values agree.) The log-sum-exp is that of the
//! weights before rounding. With `HIGH`, a weight is two terms, with a relative error of 2^-17.
//!
//! Tile products treat subnormal inputs as 0 and flush subnormal results to 0.
//!
//! # Why the bits depend on the row alone
//! A column of a tile product depends on that column of B alone. All additions to a row's score or output are made by
//! tile products over the same 32 dims or keys in the same order. A masked key, or one beyond an end, has the weight
//! +0, and adding its product changes nothing: the sums come from a tile product, which leaves no subnormal that
//! another could flush. So it makes no difference whether a masked block is skipped.
//!
//! # Why masked keys cannot leak
//! Keys that no row of the tile sees are not loaded. Masked scores are replaced. Packing V checks every element: one
//! that is not finite becomes 0 in the packed copy, and is added afterwards to the rows that see its key. If Q has more
//! than one term, a score that is NaN is recomputed by single products, because infinity times a term of 0 is NaN where
//! infinity times the query is not.
//!
//! # What bounds it
//! Not timed: an estimate from instruction counts, for bf16 queries, two groups, 64 keys, head size 128. Both products
//! take 64 `tdpbf16ps` of 16 cycles: 1024 cycles. They load 64 tiles of operands, 1024 lines at two per cycle: 512
//! cycles; O is loaded and stored once per superblock. Softmax takes 128 vectors of 15 instructions on two ports: 960
//! cycles. Run one after the other, they would leave the tile unit idle for half of the time. So two groups form a
//! [`Job`], and the products of its neighbours, the outputs of the job before and the scores of the job after, are
//! issued one [step](Work::step) at a time between the vectors of its softmax: 64 cycles of products per four pairs of
//! vectors, close enough for the reorder buffer to hold both. Queries in f32 triple the products for scores.
//!
//! In decode, the 32 KiB of K and V of a block take some 3300 cycles to arrive from memory, more than all of the above;
//! the lines of the next block are prefetched while V is packed.

mod keys;
mod logits;
mod non_finite;
mod queries;
mod scratch;
mod softmax;
mod values;
mod work;

use super::tiles::Tiles;
use crate::cpu::level_features;
use crate::dtype::DType;
use crate::kernels::api::AttentionFns;
use crate::kernels::avx512::{Avx512, shells};
use crate::kernels::generic::attention::state::{EMPTY, Output};
use crate::kernels::generic::attention::{self as generic, BlockRequest, KeyPointerTable, KeyPointers, Pieces, locate};
use crate::kernels::partial::with_features;
use crate::kernels::simd;
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, CHUNK, KeyRange, between};
use crate::problem::tile::Tile;
use crate::problem::visibility::TileVisibility;
use half::bf16;
use keys::Keys;
use scratch::{Group, Scratch, Sizes};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use work::{Job, Work};

/// Rows of a group: lanes of a vector, columns of a tile.
const LANES: usize = 16;
/// Blocks of a superblock.
const SUPERBLOCK: usize = 4;
/// Keys of a superblock.
const SUPERBLOCK_KEYS: usize = SUPERBLOCK * BLOCK;
/// Dims, or keys, of one tile product.
const DEPTH: usize = 32;
/// The most rows of a tile: Q, O and a superblock of K and V fit into half of an L2 cache.
const MAX_ROWS: usize = 256;
/// The most terms of a query.
const MAX_TERMS: usize = 3;

/// The entry points; with `HIGH`, weights have two terms.
pub(super) const fn functions<const HIGH: bool>() -> AttentionFns {
    AttentionFns {
        tile: tile::<HIGH>,
        reduce,
        pieces: shells::pieces::<bf16>(),
        max_rows: MAX_ROWS,
        row_step: 2 * LANES,
        several_heads: false,
        scratch_bytes: scratch::scratch_bytes,
    }
}

// The entry points, and pieces of them that both precisions share.
level_features!(
    Avx512,
    with_features! {
        /// # Safety
        /// The level is available, `p` is validated, `tile` is inside it, and `memory` has [`scratch::scratch_bytes`]
        /// for its rows.
        unsafe fn tile<const HIGH: bool>(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
            // SAFETY: the caller's; the level includes AVX-512.
            unsafe { walk::<HIGH>(Avx512::new_unchecked(), p, tile, memory) }
        }

        /// Folds the partial states that the chunks of a tile left in `tile.partials`, and writes the output.
        ///
        /// # Safety
        /// As [`tile`]; the partial states of all chunks have been written.
        unsafe fn reduce(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
            let total = Scratch::layout(memory, tile.rows(), Sizes::new(p.q.shape[3], p.v_dim)).0.total;
            // SAFETY: the caller's; the level includes AVX-512, and the scratch holds at least one row.
            unsafe { generic::reduce(Avx512::new_unchecked(), p, tile, total, false) }
        }

        /// # Safety
        /// As [`queries::pack_queries`].
        unsafe fn pack_queries(s: Avx512, call: &Call, g: usize, rows: &mut impl Iterator<Item = (usize, usize)>) {
            // SAFETY: the caller's.
            unsafe { queries::pack_queries(s, call, g, rows) }
        }

        /// # Safety
        /// As [`values::pack_values`].
        unsafe fn pack_values(
            s: Avx512,
            call: &Call,
            b: usize,
            key_range: KeyRange,
            k: KeyPointers<bf16>,
            v: &mut KeyPointerTable<bf16>,
        ) -> u64 {
            // SAFETY: the caller's.
            unsafe { values::pack_values(s, call, b, key_range, k, v) }
        }

        /// # Safety
        /// As [`logits::mask_scores`].
        unsafe fn mask_scores(s: Avx512, call: &Call, group: &mut Group, x: *mut f32, b: usize, base: usize) {
            // SAFETY: the caller's.
            unsafe { logits::mask_scores(s, call, group, x, b, base) }
        }

        /// # Safety
        /// As [`softmax::end_chunk`].
        unsafe fn end_chunk(s: Avx512, call: &Call, g: usize, group: &mut Group, chunk: usize) {
            // SAFETY: the caller's.
            unsafe { softmax::end_chunk(s, call, g, group, chunk) }
        }
    }
);

/// One call of [`tile`].
struct Call<'a> {
    p: &'a Problem<'a>,
    tile: &'a Tile,
    scratch: Scratch,
    sizes: Sizes,
    /// Terms of a query.
    terms: usize,
    /// The magnitude of the scale. Its sign is in Q.
    scale: f32,
    negative: bool,
    /// The factor from a score to its logit times log2(e), in a plain call.
    factor: Option<f32>,
}

/// Runs one tile.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn walk<const HIGH: bool>(s: Avx512, p: &Problem, tile: &Tile, memory: *mut u8) {
    let sizes = Sizes::new(p.q.shape[3], p.v_dim);
    let scale = p.scale.abs();
    let call = Call {
        p,
        tile,
        scratch: Scratch::layout(memory, tile.rows(), sizes).0,
        sizes,
        terms: match p.query_dtype() {
            DType::Bf16 => 1,
            DType::F16 => 2,
            DType::F32 => MAX_TERMS,
        },
        scale,
        negative: p.scale < 0.0,
        // Masked scores are -inf before the factor is applied: a thread that takes subnormals for 0 would make NaN of
        // them.
        factor: p.plain_factor(scale).filter(|factor| factor.is_normal()),
    };
    let n = tile.rows().div_ceil(LANES);
    // SAFETY: the caller's; the scratch has `n` groups, all of whose fields `pack_queries` writes before they are read.
    unsafe {
        let always_visible = p.visibility.always_visible(tile.batch);
        let mut reach = TileVisibility { low: i64::MAX, high: 0, inner_low: 0, inner_high: i64::MAX, always_visible };
        let mut rows = tile.tokens_and_heads(p);
        for g in 0..n {
            pack_queries(s, &call, g, &mut rows);
            let group = &*call.scratch.groups.add(g);
            for r in (0..group.rows).filter(|&r| group.low[r] < group.high[r]) {
                reach.low = reach.low.min(group.low[r]);
                reach.high = reach.high.max(group.high[r]);
            }
        }
        let groups = std::slice::from_raw_parts_mut(call.scratch.groups, n);
        let tiles = Tiles::configure();
        for chunk in tile.first_chunk..tile.end_chunk {
            let (from, to) = reach.within(tile.chunks.keys(chunk));
            for group in groups.iter_mut() {
                (group.max, group.sum, group.rounded) = ([f32::NEG_INFINITY; LANES], [0.0; LANES], [0.0; LANES]);
            }
            if from < to {
                std::ptr::write_bytes(call.scratch.acc, 0, n * sizes.dvp * LANES);
                for index in from / SUPERBLOCK_KEYS..to.div_ceil(SUPERBLOCK_KEYS) {
                    superblock::<HIGH>(s, &tiles, &call, groups, index, (from, to), &reach);
                }
            }
            for (g, group) in groups.iter_mut().enumerate() {
                end_chunk(s, &call, g, group, chunk);
            }
        }
        drop(tiles);
        if tile.partials.is_null() && tile.first_chunk == tile.end_chunk {
            for group in groups.iter() {
                for r in 0..group.rows {
                    output(&call, group, r).finish(s, EMPTY, call.scratch.stage);
                }
            }
        }
    }
}

/// The output of row `r` of a group.
fn output<'a>(call: &Call<'a>, group: &Group, r: usize) -> Output<'a> {
    let (token, head) = (group.token[r] as usize, group.head[r] as usize);
    Output { p: call.p, batch: call.tile.batch, token, head, deinterleaved: false }
}

/// Adds the keys of one superblock to all rows of the tile.
///
/// # Safety
/// As [`walk`]; keys `from..to` of the superblock are inside K and V.
#[inline(always)]
unsafe fn superblock<const HIGH: bool>(
    s: Avx512,
    tiles: &Tiles,
    call: &Call,
    groups: &mut [Group],
    index: usize,
    (from, to): (usize, usize),
    reach: &TileVisibility,
) {
    let mut keys = [Keys { first: std::ptr::null(), stride: 0 }; SUPERBLOCK];
    // Keys whose values have elements that are not finite.
    let mut non_finite_keys = [0u64; SUPERBLOCK];
    for b in 0..SUPERBLOCK {
        let base = index * SUPERBLOCK_KEYS + b * BLOCK;
        let (low, high) = (from.saturating_sub(base).min(BLOCK), to.saturating_sub(base).min(BLOCK));
        let mut any = 0;
        for group in groups.iter_mut() {
            // SAFETY: the keys that are visible to a row are inside the masks.
            any |= unsafe { logits::set_visible_bits(call, group, b, base, between(reach.always_visible, base)) };
        }
        if any != 0 {
            let key_range = KeyRange { low, high };
            let mut pointers = [[const { MaybeUninit::uninit() }; BLOCK]; 2];
            let [first, second] = &mut pointers;
            let (mut k, mut v) = (KeyPointerTable::<bf16>::new(first), KeyPointerTable::<bf16>::new(second));
            // SAFETY: the keys that are visible to any row are inside the views.
            unsafe {
                let request = BlockRequest { p: call.p, tile: call.tile, base, key_range, visible_bits: any, reach };
                locate(&request, &call.scratch.gather_buffers, (&mut k, &mut v));
                keys[b] = keys::pack_keys(s, call, b, key_range, k.rows());
                non_finite_keys[b] = pack_values(s, call, b, key_range, k.rows(), &mut v);
            }
        }
    }
    // SAFETY: blocks with visible keys are packed; a job's scores, weights and outputs are computed in this order.
    unsafe {
        let mut jobs = (0..groups.len()).step_by(2);
        let mut parity = 1;
        let mut next = |groups: &[Group]| {
            parity ^= 1;
            jobs.by_ref().find_map(|first| Job::new(groups, first, parity))
        };
        let mut before = None;
        let mut job = next(groups);
        Work::new(tiles, call, &keys, None, job).finish::<HIGH>();
        while let Some(current) = job {
            job = next(groups);
            let mut work = Work::new(tiles, call, &keys, before, job);
            // Spreads the steps evenly over the softmax.
            let every = (current.groups * current.blocks().len() * BLOCK / 2 / work.steps::<HIGH>().max(1)).max(1);
            for i in 0..current.groups {
                let group = &mut groups[current.first + i];
                let x = call.scratch.s.add(current.slot(i) * SUPERBLOCK_KEYS * LANES);
                for &b in current.blocks() {
                    let (x, base) = (x.add(b * BLOCK * LANES), index * SUPERBLOCK_KEYS + b * BLOCK);
                    if call.terms > 1 {
                        non_finite::repair_scores(s, call, group, x, b, base);
                    }
                    mask_scores(s, call, group, x, b, base);
                }
                softmax::softmax::<HIGH>(s, call, group, current, i, &mut work, every);
            }
            work.finish::<HIGH>();
            if let Some(before) = before {
                non_finite::add_non_finite(call, groups, before, &non_finite_keys, index);
            }
            before = Some(current);
        }
        Work::new(tiles, call, &keys, before, None).finish::<HIGH>();
        if let Some(before) = before {
            non_finite::add_non_finite(call, groups, before, &non_finite_keys, index);
        }
    }
}

/// A pair of bf16, each in the upper half of its lane: `even` goes to the lower half of the result.
#[inline(always)]
fn join_pair(_: Avx512, even: __m512i, odd: __m512i) -> __m512i {
    // SAFETY: the argument proves the features.
    unsafe { _mm512_or_si512(_mm512_srli_epi32::<16>(even), odd) }
}

const _: () = assert!(simd::MAX_LANES == LANES && CHUNK.is_multiple_of(SUPERBLOCK_KEYS));
