//! Attention over bf16 keys and values by tile products.
//!
//! | file | what |
//! | --- | --- |
//! | this one | the entry points, and the walk of a tile over chunks and superblocks |
//! | `scratch` | the scratch memory of a tile, and the state of its rows |
//! | `queries`, `keys`, `values` | operands in the form that tile products take |
//! | `work` | many rows: scores and weighted values from packed operands |
//! | `direct` | few rows: the same from the cache |
//! | `logits` | scores to logits, and the masking of keys |
//! | `softmax` | logits to weights, and the end of a chunk |
//! | `non_finite` | repairs of NaN and infinity |
//!
//! # Order of computation
//! As in [`generic`](crate::kernels::generic::attention), a tile is query rows, and keys are visited in
//! blocks of 64 and chunks of 1024 on an absolute grid; a block's visible keys are decided as a whole. Between blocks
//! and chunks are superblocks of [`SUPERBLOCK`] blocks, the unit of the online softmax. Sixteen rows of a KV head are a *group*
//! ([`LANES`]), one operand of a product.
//!
//! ```text
//! once per tile:          Q -> bf16 terms                            A  [group][term][16 rows][32 dims]
//! per superblock:         K transposed, in pairs of elements         B  [16 pairs][16 keys]
//!                         V in pairs of keys                         B  [16 pairs][16 dims]
//! per two groups,         S = Q K^T                                  C  [16 rows][128 keys]
//! over visible blocks:    P = 2^(c S - max), as bf16                 A  [16 rows][128 keys]
//!                         O = O 2^(old max - max) + P V              C  [16 rows][dims]
//! per chunk:              O folded into the row's total, in ascending order
//! ```
//! Few rows (up to sixteen of each KV head, one group, and several KV heads at a time) go another way ([`direct`]): keys are read from the
//! cache, as operand A, with the queries transposed as B, and the scores are transposed. A product adds the same numbers in the same order
//! whichever operand is which, so that decode and prefill agree to the bit.
//!
//! The elements of a value lie in tiles as [`place`] states, since pairs of rows are made by interleaving within quarters of vectors. In
//! packed caches they are pairs already, in their order.
//!
//! # Accuracy
//! Products of bf16 are exact in f32. A query of another type is the exact sum of two (f16) or three (f32) bf16 terms,
//! and a score is the sum of their products. A softmax weight is rounded to one bf16, with a relative error of 2^-9. A
//! row is divided, chunk by chunk, by the sum of the rounded weights, so that the error of an output is a mean of |v -
//! output| times 2^-9: at most 2^-8 of the largest |v|, and no more than f32 rounding where all values agree. (Division
//! by the sum of the exact weights has the same bound, but errs where values agree.) The log-sum-exp is that of the
//! weights before rounding. With `HIGH`, a weight is two terms, with a relative error of 2^-18.
//!
//! Tile products treat subnormal inputs as 0 and flush subnormal results to 0.
//!
//! # Why the bits depend on the row alone
//! An element of a product depends on its row of A and its column of B alone. All additions to a row's score or output are made by
//! tile products over the same 32 dims or keys in the same order. A masked key, or one beyond an end, has the weight
//! +0, and adding its product changes nothing: the sums come from a tile product, which leaves no subnormal that
//! another could flush. So it makes no difference whether a masked block is skipped.
//!
//! # Why masked keys cannot leak
//! Keys that no row of the tile sees are not loaded. Masked scores are replaced. Packing V checks every element: one
//! that is not finite becomes 0 in the packed copy, and is added afterwards to the rows that see its key. If Q has more
//! than one term, a score that is NaN is recomputed by single products, because infinity times a term of 0 is NaN where
//! infinity times the query is not. Pairs of a packed cache are operands as they lie there only if all rows see all of a block: then what is
//! not finite reaches the rows that it may reach, and the same way.
//!
//! # What bounds it
//! Measured on a Xeon with AMX (`src/docs/performance.md`), per superblock of two groups at head size 128: 64 steps of four
//! `tdpbf16ps`, which take 73 cycles each, and operands that come as fast from the second-level cache if they lie in
//! the order in which they are read ([`Sizes::key_tile`], [`Call::value_tile`]): 2350 cycles. Accumulators of scores live for four
//! steps only, so that their latency and stores add a quarter. Softmax is 12 instructions per vector, `vreduceps` and `vscalefps`
//! of two operations among them: 1700 cycles. Packing K and V is some 3000 cycles per block, once for all rows, mostly waiting for
//! memory. Together 4 to 5 thousand cycles, of which it reaches half.
//!
//! Tile products are slower after a time without any, by 110 ns after half a microsecond and by 500 after 0.8, and with operands other than
//! zero. A loop in C that does the same work takes as long. Products and softmax overlap little: steps of products between the rows
//! of another job's softmax gain where there are more products (queries of several terms), and nothing with bf16.

mod direct;
mod keys;
mod logits;
mod non_finite;
mod queries;
mod scratch;
mod softmax;
mod values;
mod work;

use super::level_functions;
use super::tiles::Tiles;
use crate::dtype::DType;
use crate::kernels::api::AttentionFns;
use crate::kernels::avx512::{Avx512, shells};
use crate::kernels::avx512bf16::instructions;
use crate::kernels::generic::attention::state::{EMPTY, Output};
use crate::kernels::generic::attention::{self as generic, BlockRequest, KeyPointerTable, KeyPointers, Pieces, locate};
use crate::kernels::partial::with_features;
use crate::kernels::simd;
use crate::layout::Packing;
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, CHUNK, KeyRange, between};
use crate::problem::tile::{Tile, TokensAndHeads};
use crate::problem::visibility::TileVisibility;
use half::bf16;
use scratch::{Cut, Group, SCORES_ROW, Scratch, Sizes};
use std::arch::x86_64::*;
use std::iter::Skip;
use std::mem::MaybeUninit;
use work::Job;

/// Rows of a group, and of a tile; lanes of a vector.
const LANES: usize = 16;
/// Blocks of a superblock.
const SUPERBLOCK: usize = 2;
/// Keys of a superblock.
const SUPERBLOCK_KEYS: usize = SUPERBLOCK * BLOCK;
/// Dims, or keys, of one tile product.
const DEPTH: usize = 32;
/// Tile products over the keys of a block.
const PARTS: usize = BLOCK / DEPTH;
/// Rows of Q and of the output are prefetched so many rows ahead: in a prompt they lie in runs too short for the hardware's prefetchers.
const AHEAD_ROWS: usize = 8;
/// The most rows of a tile: Q, O and a superblock of K and V fit into half of an L2 cache.
const MAX_ROWS: usize = 512;
/// The most KV heads of a tile: two blocks of keys and values of all of them fit into half of an L2 cache.
const MAX_HEADS: usize = 16;
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
        max_heads: MAX_HEADS,
        direct_rows: LANES,
        scratch_bytes: scratch::scratch_bytes,
    }
}

// The entry points, and pieces of them that both precisions share.
level_functions! {
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
        let total = Scratch::layout(memory, cut(tile), Sizes::new(p.q.shape[3], p.v_dim)).0.total;
        // SAFETY: the caller's; the level includes AVX-512, and the scratch holds at least one row.
        unsafe { generic::reduce(Avx512::new_unchecked(), p, tile, total, false) }
    }

    /// # Safety
    /// As [`queries::pack_queries`].
    unsafe fn pack_queries(s: Avx512, call: &Call, g: usize, rows: (&mut TokensAndHeads, &mut Skip<TokensAndHeads>)) {
        // SAFETY: the caller's.
        unsafe { queries::pack_queries(s, call, g, rows) }
    }

    /// # Safety
    /// As [`values::pack_values`].
    unsafe fn pack_values(
        s: Avx512,
        call: &Call,
        block: (usize, usize),
        key_range: KeyRange,
        v: KeyPointers<bf16>,
    ) -> u64 {
        // SAFETY: the caller's.
        unsafe { values::pack_values(s, call, block, key_range, v) }
    }

    /// # Safety
    /// As [`keys::pack_keys`].
    unsafe fn pack_keys(s: Avx512, call: &Call, b: usize, key_range: KeyRange, k: KeyPointers<bf16>) {
        // SAFETY: the caller's.
        unsafe { keys::pack_keys(s, call, b, key_range, k) }
    }

    /// # Safety
    /// As [`logits::mask_scores`].
    unsafe fn mask_scores(s: Avx512, call: &Call, group: &mut Group, r: usize, at: (usize, usize), x: *mut f32) {
        // SAFETY: the caller's.
        unsafe { logits::mask_scores(s, call, group, r, at, x) }
    }

    /// # Safety
    /// As [`direct::scores`].
    unsafe fn direct_scores(
        s: Avx512,
        tiles: &Tiles,
        call: &Call,
        block: (usize, usize, usize),
        key_range: KeyRange,
        k: KeyPointers<bf16>,
    ) {
        // SAFETY: the caller's.
        unsafe { direct::scores(s, tiles, call, block, key_range, k) }
    }

    /// # Safety
    /// As [`direct::place_block`].
    unsafe fn place_block(
        s: Avx512,
        call: &Call,
        head: usize,
        key_range: KeyRange,
        k: KeyPointers<bf16>,
        keys: &mut [MaybeUninit<direct::PlacedKeys>; BLOCK / LANES],
    ) {
        // SAFETY: the caller's.
        unsafe { direct::place_block(s, call, head, key_range, k, keys) }
    }

    /// # Safety
    /// As [`direct::outputs`].
    unsafe fn direct_outputs<const HIGH: bool>(
        s: Avx512,
        tiles: &Tiles,
        call: &Call,
        block: (usize, usize, &Group),
        key_range: KeyRange,
        v: KeyPointers<bf16>,
    ) -> u64 {
        // SAFETY: the caller's.
        unsafe { direct::outputs::<HIGH>(s, tiles, call, block, key_range, v) }
    }

    /// # Safety
    /// As [`work::scores`].
    unsafe fn scores(tiles: &Tiles, call: &Call, job: &Job) {
        // SAFETY: the caller's.
        unsafe { work::scores(tiles, call, job) }
    }

    /// # Safety
    /// As [`work::outputs`].
    unsafe fn outputs<const HIGH: bool>(tiles: &Tiles, call: &Call, job: &Job, fresh: bool) {
        // SAFETY: the caller's.
        unsafe { work::outputs::<HIGH>(tiles, call, job, fresh) }
    }

    /// # Safety
    /// As [`weigh_rows`].
    unsafe fn weigh<const HIGH: bool>(
        s: Avx512,
        call: &Call,
        group: &mut Group,
        job: (&Job, usize),
        index: usize,
    ) {
        // SAFETY: the caller's.
        unsafe { weigh_rows::<HIGH>(s, call, group, job, index) }
    }

    /// # Safety
    /// As [`softmax::end_chunk`].
    unsafe fn end_chunk(
        s: Avx512,
        call: &Call,
        group: (usize, &mut Group),
        chunk: usize,
        ahead: &mut Skip<TokensAndHeads>,
    ) {
        // SAFETY: the caller's.
        unsafe { softmax::end_chunk(s, call, group, chunk, ahead) }
    }
}

/// One call of [`tile`].
struct Call<'a> {
    p: &'a Problem<'a>,
    tile: &'a Tile,
    scratch: Scratch,
    sizes: Sizes,
    /// Terms of a query.
    terms: usize,
    /// The factor from a score to its logit times log2(e), in a plain call.
    factor: Option<f32>,
    /// The elements of values and outputs lie in tiles in their order, as they do in packed caches. Else they lie as in [`place`].
    natural: bool,
    /// One group for each KV head: keys are read from the cache, and values packed a block at a time.
    direct: bool,
    cut: Cut,
}

/// Whether a tile has so few rows of a KV head that keys are read from the cache.
fn is_direct(tile: &Tile) -> bool {
    (1..=LANES).contains(&tile.head_rows)
}

/// The groups of a tile.
fn cut(tile: &Tile) -> Cut {
    if is_direct(tile) { Cut::direct(tile.kv_heads, tile.head_rows) } else { Cut::packed(tile.rows()) }
}

impl Call<'_> {
    /// The place of group `g` in the memory for scores and weights.
    #[inline(always)]
    fn slot(&self, g: usize) -> usize {
        if self.direct { g } else { g % 2 }
    }

    /// The place of a tile of values: pairs of neighbouring tiles of a value, for each part of 32 keys of the superblock, or of a block if
    /// values are packed a block at a time.
    #[inline(always)]
    fn value_tile(&self, tile: usize, part: usize) -> usize {
        let (part, parts) = if self.direct { (part % PARTS, PARTS) } else { (part, SUPERBLOCK * PARTS) };
        (tile / 2 * parts + part) * 2 + tile % 2
    }
}

/// Runs one tile.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn walk<const HIGH: bool>(s: Avx512, p: &Problem, tile: &Tile, memory: *mut u8) {
    let sizes = Sizes::new(p.q.shape[3], p.v_dim);
    let cut = cut(tile);
    let n = cut.groups;
    let call = Call {
        p,
        tile,
        scratch: Scratch::layout(memory, cut, sizes).0,
        sizes,
        terms: match p.query_dtype() {
            DType::Bf16 => 1,
            DType::F16 => 2,
            DType::F32 => MAX_TERMS,
        },
        // Masked scores are -inf before the factor is applied: a thread that takes subnormals for 0 would make NaN of
        // them.
        factor: p.plain_factor(p.scale).filter(|factor| factor.is_normal()),
        natural: p.v_packing == Packing::RowPairs,
        direct: is_direct(tile),
        cut,
    };
    // SAFETY: the caller's; the scratch has `n` groups, which `pack_queries` writes before they are read.
    unsafe {
        let always_visible = p.visibility.always_visible(tile.batch);
        let mut reach = TileVisibility { low: i64::MAX, high: 0, inner_low: 0, inner_high: 0, always_visible };
        let (mut rows, mut ahead) = (tile.tokens_and_heads(p), tile.tokens_and_heads(p).skip(AHEAD_ROWS));
        for g in 0..n {
            pack_queries(s, &call, g, (&mut rows, &mut ahead));
            let group = &*call.scratch.groups.add(g);
            for row in group.states[..group.rows].iter().filter(|row| row.low < row.high) {
                reach.low = reach.low.min(row.low);
                reach.high = reach.high.max(row.high);
            }
        }
        if call.direct {
            direct::transpose_queries(s, &call);
        }
        let groups = std::slice::from_raw_parts_mut(call.scratch.groups, n);
        let tiles = Tiles::configure();
        for chunk in tile.first_chunk..tile.end_chunk {
            let (from, to) = reach.within(tile.chunks.keys(chunk));
            for group in groups.iter_mut() {
                (group.max, group.fresh) = ([f32::NEG_INFINITY; LANES], true);
                group.sums[..group.rows].fill([0.0; LANES]);
                group.rounded[..group.rows].fill([0.0; LANES]);
            }
            if from < to {
                for index in from / SUPERBLOCK_KEYS..to.div_ceil(SUPERBLOCK_KEYS) {
                    superblock::<HIGH>(s, &tiles, &call, groups, index, (from, to), &reach);
                }
            }
            let mut ahead = tile.tokens_and_heads(p).skip(AHEAD_ROWS);
            for (g, group) in groups.iter_mut().enumerate() {
                end_chunk(s, &call, (g, group), chunk, &mut ahead);
            }
        }
        drop(tiles);
        if tile.partials.is_null() && tile.first_chunk == tile.end_chunk {
            for row in groups.iter().flat_map(|group| &group.states[..group.rows]) {
                let (token, head) = (row.token as usize, row.head as usize);
                let output = Output { p, batch: tile.batch, token, head, deinterleaved: false };
                output.finish(s, EMPTY, call.scratch.stage);
            }
        }
    }
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
    // Keys whose values have elements that are not finite.
    let mut non_finite_keys = [0u64; SUPERBLOCK];
    let mut pointers = [[const { [const { MaybeUninit::uninit() }; BLOCK] }; 2]; SUPERBLOCK];
    let mut located = [const { None }; SUPERBLOCK];
    for (b, [first, second]) in pointers.iter_mut().enumerate() {
        let base = index * SUPERBLOCK_KEYS + b * BLOCK;
        let (low, high) = (from.saturating_sub(base).min(BLOCK), to.saturating_sub(base).min(BLOCK));
        let mut any = 0;
        for group in groups.iter_mut() {
            // SAFETY: the keys that are visible to a row are inside the masks.
            any |= unsafe { logits::set_visible_bits(call, group, b, base, between(reach.always_visible, base)) };
        }
        if any != 0 {
            let key_range = KeyRange { low, high };
            let (mut k, mut v) = (KeyPointerTable::<bf16>::new(first), KeyPointerTable::<bf16>::new(second));
            // SAFETY: the keys that are visible to any row are inside the views.
            unsafe {
                let request = BlockRequest { p: call.p, tile: call.tile, base, key_range, visible_bits: any, reach };
                locate(&request, &call.scratch.gather_buffers(b), (&mut k, &mut v));
                if !call.direct {
                    pack_keys(s, call, b, key_range, k.rows());
                    non_finite_keys[b] = pack_values(s, call, (b, 0), key_range, v.rows());
                }
            }
            located[b] = Some(Located { key_range, k, v });
        }
    }
    if call.direct {
        // SAFETY: the blocks of visible keys are located.
        unsafe { direct_superblock::<HIGH>(s, tiles, call, groups, index, &located) };
        return;
    }
    for first in (0..groups.len()).step_by(2) {
        let Some(job) = Job::new(groups, first, 2) else { continue };
        // SAFETY: blocks with visible keys are packed; a job's scores, weights and outputs are computed in this order.
        unsafe {
            scores(tiles, call, &job);
            for g in first..first + job.groups {
                weigh::<HIGH>(s, call, &mut groups[g], (&job, g), index);
            }
            outputs::<HIGH>(tiles, call, &job, groups[first].fresh);
            groups[first..first + job.groups].iter_mut().for_each(|group| group.fresh = false);
            non_finite::add_non_finite(call, groups, job, &non_finite_keys, index);
        }
    }
}

/// A block that is visible to some row.
struct Located<'a> {
    key_range: KeyRange,
    k: KeyPointerTable<'a, bf16>,
    v: KeyPointerTable<'a, bf16>,
}

/// Adds the keys of one superblock to few rows, one group for each KV head: in the order of memory, which has the heads of a token together.
///
/// # Safety
/// As [`superblock`].
#[inline(always)]
unsafe fn direct_superblock<const HIGH: bool>(
    s: Avx512,
    tiles: &Tiles,
    call: &Call,
    groups: &mut [Group],
    index: usize,
    located: &[Option<Located>; SUPERBLOCK],
) {
    let mut non_finite_keys = [[0u64; SUPERBLOCK]; MAX_HEADS];
    // SAFETY: the caller's.
    unsafe {
        for (b, block) in located.iter().enumerate() {
            let Some(Located { key_range, k, .. }) = block else { continue };
            for (head, group) in groups.iter().enumerate() {
                direct_scores(s, tiles, call, (b, head, group.rows), *key_range, k.rows());
            }
        }
        let mut jobs = [None; MAX_HEADS];
        for head in 0..groups.len() {
            jobs[head] = Job::new(groups, head, 1);
            if let Some(job) = &jobs[head] {
                weigh::<HIGH>(s, call, &mut groups[head], (job, head), index);
            }
        }
        for (b, block) in located.iter().enumerate() {
            let Some(Located { key_range, v, .. }) = block else { continue };
            for (head, group) in groups.iter_mut().enumerate() {
                // Without a visible key, the weights are those of another superblock.
                if jobs[head].is_some_and(|job| job.blocks().contains(&b)) {
                    non_finite_keys[head][b] =
                        direct_outputs::<HIGH>(s, tiles, call, (b, head, group), *key_range, v.rows());
                    group.fresh = false;
                }
            }
        }
        for (job, keys) in jobs.into_iter().zip(&non_finite_keys) {
            if let Some(job) = job {
                non_finite::add_non_finite(call, groups, job, keys, index);
            }
        }
    }
}

/// Replaces the scores of group `g` of a job by weights.
///
/// # Safety
/// The scores are in place.
#[inline(always)]
unsafe fn weigh_rows<const HIGH: bool>(
    s: Avx512,
    call: &Call,
    group: &mut Group,
    (job, g): (&Job, usize),
    index: usize,
) {
    for r in 0..group.rows {
        let x = call.scratch.s.wrapping_add((call.slot(g) * call.cut.group_rows + r) * SCORES_ROW);
        // SAFETY: the caller's.
        unsafe {
            for &b in job.blocks() {
                let (x, at) = (x.wrapping_add(b * BLOCK), (b, index * SUPERBLOCK_KEYS + b * BLOCK));
                if call.terms > 1 {
                    non_finite::repair_scores(s, call, group, r, at, x);
                }
                if call.factor.is_none() || group.visible_bits[b][r] != u64::MAX {
                    mask_scores(s, call, group, r, at, x);
                }
            }
        }
    }
    // SAFETY: the caller's.
    unsafe { softmax::softmax::<HIGH>(s, call, group, (job, g)) };
}

/// Two vectors as bf16, to the nearest, ties to even; subnormal numbers become zeros.
#[inline(always)]
fn round(_: Avx512, low: __m512, high: __m512) -> __m512i {
    // SAFETY: the level, whose functions alone call this, is available.
    unsafe { instructions::round(low, high) }
}

/// Where element `i` of a value lies in its tiles: rows are interleaved within each quarter of a vector, four elements to the first of
/// two tiles and four to the second.
fn place(i: usize) -> usize {
    let (quarter, rest) = (i % DEPTH / 8, i % 8);
    i / DEPTH * DEPTH + rest / 4 * LANES + quarter * 4 + rest % 4
}

/// Thirty-two elements that lie as in [`place`], in their order.
#[inline(always)]
fn output_order(_: Avx512, [x, y]: [__m512; 2]) -> [__m512; 2] {
    // SAFETY: the argument proves the features.
    unsafe {
        let first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        [_mm512_permutex2var_ps(x, first, y), _mm512_permutex2var_ps(x, second, y)]
    }
}

const _: () = assert!(simd::MAX_LANES == LANES && CHUNK.is_multiple_of(SUPERBLOCK_KEYS));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::kernels::simd::Simd;

    #[test]
    fn order_and_place_agree() {
        if !Isa::Avx512.is_available() {
            return;
        }
        let mut x = [0.0f32; DEPTH];
        (0..DEPTH).for_each(|i| x[place(i)] = i as f32);
        #[target_feature(enable = "avx512f")]
        unsafe fn in_order(x: &mut [f32; DEPTH]) {
            // SAFETY: the caller has asked for the level; the array has two vectors.
            unsafe {
                let s = Avx512::new_unchecked();
                let ordered = output_order(s, [s.load_f32(x.as_ptr()), s.load_f32(x[LANES..].as_ptr())]);
                for (i, part) in ordered.into_iter().enumerate() {
                    s.store_f32(x[i * LANES..].as_mut_ptr(), part);
                }
            }
        }
        // SAFETY: the level is available.
        unsafe { in_order(&mut x) };
        assert!(x.iter().enumerate().all(|(i, x)| *x == i as f32), "{x:?}");
    }
}
