//! Attention over bf16 keys and values by products of pairs of bf16.
//!
//! | file | what |
//! | --- | --- |
//! | this one | the entry points, the scratch memory, and one block of keys |
//! | `queries`, `copies` | packed copies of queries, keys and values |
//! | `packed` | scores and weighted values of many rows, from packed copies |
//! | `direct` | scores and weighted values of few rows, from the cache |
//! | `weights` | softmax weights as bf16, and the end of a chunk |
//!
//! # Order of computation
//! As in [`generic`](crate::kernels::generic::attention), whose walk over chunks and blocks, masks, softmax, folding
//! and finishing it uses; only the two products ([`Products`]) are its own. [`dot`](super::instructions::dot) adds the products of a
//! pair, the odd element's first.
//!
//! A score has four sums. Sum c adds the pairs c, c + 4, c + 8 ... of head dims in ascending order, for each pair first the
//! query's first term, then the others; the score is (sum 0 + sum 2) + (sum 1 + sum 3). Four sums suit both paths:
//!
//! ```text
//! packed:  K transposed   [16 keys][pair][key]     a register tile of six rows and sixteen keys holds all four sums
//! direct:  K as it lies                            a quarter of a vector holds four pairs of one key, once for each of four rows
//! ```
//! A weighted value adds pairs of keys (2 j, 2 j + 1) in ascending order, for each pair first the weights' first terms.
//!
//! # Accuracy
//! Products of bf16 are exact in f32. A query in bf16 is one term, in f16 the exact sum of two, in f32 the exact sum of
//! three, of which `HIGH` takes all and the default two: 16 bits, so that a logit errs by at most 2^-16 of its
//! magnitude. A softmax weight is rounded to one bf16, with a relative error of 2^-9. A row is multiplied by the ratio of the sums of
//! its exact and its rounded weights, so that the error of an output is a mean of |v - output| times 2^-9: at most 2^-8 of the
//! largest |v|, and 0 where all values agree. The log-sum-exp is that of the weights before rounding. With `HIGH`, a weight is two
//! terms, with a relative error of 2^-18.
//!
//! The instruction takes subnormal numbers as zeros and flushes subnormal results: keys, values, terms of queries and weights below
//! 2^-126 count as 0.
//!
//! # Why the bits depend on the row alone
//! Every score, and every element of the output, goes through the same products in the same order, whatever is in the other rows. A
//! masked key, or one beyond an end, has the weight +0 and a finite value, and its product changes nothing: after an output was
//! rescaled, there is a product with a visible key, which flushes its subnormal numbers.
//!
//! # Why masked keys cannot leak
//! Keys that no row of the tile sees are not loaded. The softmax replaces masked scores. If some row does not see all of a block, its
//! values are checked; if one is not finite, each row multiplies a copy of V of its own, with zeros in place of the keys that it
//! does not see. If Q has more than one term, a score that is NaN is recomputed by single products, because infinity times a
//! term of 0 is NaN where infinity times the query is not.
//!
//! # What bounds it
//! Many rows are bound by the products, one 512-bit product per cycle on Zen 4. A step of scores is 24 products for 4 loads of keys and
//! 24 broadcasts of queries, and runs at the peak; the tree over four sums is 18 additions for 16 steps at head size 128. A pair of
//! keys is 24 products for 4 loads of values and 6 broadcasts. The two loops take three quarters of a prefill of 2048; softmax and
//! rounding take an eighth.
//!
//! Few rows are bound by the broadcasts of sixteen bytes, one per cycle: from the second-level cache, keys are read at 40 GB/s and
//! values at 50, with one row as with four. From memory, both arrive at about 19 GB/s, with every prefetch that was tried.

mod copies;
mod direct;
mod packed;
mod queries;
mod weights;

use super::level_functions;
use crate::dtype::DType;
use crate::kernels::api::AttentionFns;
use crate::kernels::avx512::{Avx512, shells};
use crate::kernels::generic::attention::{
    self as generic, Block, Deinterleaved, KeyPointerTable, KeyPointers, Pieces, Products, RowState, Scratch, Softmax,
    all_finite, non_finite, unpack_head, unpack_pairs,
};
use crate::kernels::partial::with_features;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::layout::Packing;
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use crate::problem::tile::{MAX_TILE_ROWS, PACK_ROWS, TILE_ROWS, Tile};
use crate::tuning::Tuning;
use half::bf16;

/// Elements of a vector.
const LINE: usize = 32;
/// Pairs of a vector: lanes.
const LANES: usize = 16;
/// Bytes of a vector.
const VECTOR: usize = 64;
/// Sums of a score.
const SUMS: usize = 4;
/// Elements of a step: a pair for each sum.
const STEP: usize = 2 * SUMS;
/// Rows whose steps share a vector on the direct path.
const QUARTERS: usize = 4;
/// The most terms of a query, and of a weight.
const MAX_QUERY_TERMS: usize = 3;
const MAX_WEIGHT_TERMS: usize = 2;

/// The entry points; with `HIGH`, weights have two terms, and queries in f32 three.
pub(super) const fn functions<const HIGH: bool>() -> AttentionFns {
    AttentionFns {
        tile: tile::<HIGH>,
        reduce,
        pieces: shells::pieces::<bf16>(),
        max_rows: MAX_TILE_ROWS,
        row_step: 2 * TILE_ROWS,
        max_heads: usize::MAX,
        direct_rows: PACK_ROWS - 1,
        scratch_bytes,
    }
}

level_functions! {
    /// # Safety
    /// The level is available, `p` is validated, `tile` is inside it, and `memory` has [`scratch_bytes`] for its
    /// rows.
    unsafe fn tile<const HIGH: bool>(pieces: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
        let (scratch, mut products, _) = layout(memory, tile.rows(), p.q.shape[3], p.v_dim);
        products.tuning = pieces.tuning;
        products.query_terms = match p.query_dtype() {
            DType::Bf16 => 1,
            DType::F16 => 2,
            DType::F32 => 2 + usize::from(HIGH),
        };
        products.weight_terms = 1 + usize::from(HIGH);
        // SAFETY: the caller's; the level includes AVX-512.
        unsafe { generic::tile(Avx512::new_unchecked(), IN_ORDER, p, tile, &scratch, &products) }
    }

    /// Folds the partial states that the chunks of a tile left in `tile.partials`, and writes the output.
    ///
    /// # Safety
    /// As [`tile`]; the partial states of all chunks have been written.
    unsafe fn reduce(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
        let scratch = layout(memory, tile.rows(), p.q.shape[3], p.v_dim).0;
        // SAFETY: the caller's; the level includes AVX-512.
        unsafe { generic::reduce(Avx512::new_unchecked(), p, tile, scratch.total, false) }
    }
}

/// Queries and accumulators keep the order of their elements.
const IN_ORDER: Deinterleaved = Deinterleaved { keys: false, values: false };

/// Scratch bytes for `(rows, dim, v_dim)`.
fn scratch_bytes(rows: usize, d: usize, dv: usize) -> usize {
    layout(std::ptr::null_mut(), rows, d, dv).2
}

/// Cuts the memory at `base` into the scratch memory of `generic` and that of the products; returns the bytes used.
fn layout(base: *mut u8, rows: usize, d: usize, dv: usize) -> (Scratch, DotProducts, usize) {
    let (scratch, mut used) = Scratch::layout(base, rows, d, dv);
    let mut bytes = |n: usize| {
        let at = base.wrapping_add(used);
        used += n.next_multiple_of(VECTOR);
        at
    };
    let products = DotProducts {
        // On the direct path, every row may be alone in its vectors.
        q: bytes(rows * QUARTERS * MAX_QUERY_TERMS * d.div_ceil(LINE) * LINE * size_of::<bf16>()),
        weights: bytes(rows * MAX_WEIGHT_TERMS * BLOCK * size_of::<bf16>()).cast(),
        rounded: bytes(rows * MAX_LANES * size_of::<f32>()).cast(),
        // Memory for copies in f32, half of which suffices.
        k: scratch.kt.cast(),
        v: scratch.vp.cast(),
        tuning: Tuning::DEFAULT,
        query_terms: 0,
        weight_terms: 0,
        dvp: padded(dv),
    };
    (scratch, products, used)
}

/// The products by [`dot`](super::instructions::dot), and their memory.
struct DotProducts {
    /// Packed path: `[register tile][pair][term][row]` pairs. Direct path: `[head][four rows][step][term][row]` steps.
    q: *mut u8,
    /// `[row][term][key]`.
    weights: *mut bf16,
    /// Sums of the rounded weights of a row, per lane: `[row][MAX_LANES]`.
    rounded: *mut f32,
    /// `[sixteen keys][pair][key]` pairs.
    k: *mut u8,
    /// `[slab of up to four vectors][pair of keys][column]` pairs.
    v: *mut u8,
    tuning: Tuning,
    query_terms: usize,
    weight_terms: usize,
    /// Floats of a row's outputs.
    dvp: usize,
}

impl Products<Avx512> for DotProducts {
    #[inline(always)]
    unsafe fn pack_queries(&self, s: Avx512, p: &Problem, tile: &Tile, scratch: &Scratch) {
        let d = p.q.shape[3];
        // SAFETY: the caller's; the level is available.
        unsafe {
            if tile.head_rows >= PACK_ROWS {
                self.pack_rows(s, tile.rows(), scratch, d);
            } else {
                self.pack_quarters(s, tile, scratch, d);
            }
            self.clear_sums(tile.rows());
        }
    }

    #[inline(always)]
    unsafe fn block(
        &self,
        s: Avx512,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<u8>,
        v: &mut KeyPointerTable<u8>,
    ) {
        // SAFETY: the caller's; the level is available.
        unsafe {
            if block.tile.head_rows >= PACK_ROWS {
                packed_block(self, s, block, rows, k.cast(), v);
            } else {
                direct_block(self, s, block, rows, k.cast(), v.rows().cast());
            }
        }
    }

    #[inline(always)]
    unsafe fn end_chunk(&self, s: Avx512, rows: &[RowState], scratch: &Scratch) {
        // SAFETY: the caller's; the level is available.
        unsafe { self.correct_rows(s, rows, scratch) }
    }
}

level_functions! {
    /// One block of keys for many rows of one KV head.
    ///
    /// # Safety
    /// As [`Products::block`].
    #[inline(never)]
    unsafe fn packed_block(
        products: &DotProducts,
        s: Avx512,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<bf16>,
        v: &mut KeyPointerTable<u8>,
    ) {
        // SAFETY: the caller's; the scratch memory for values holds a block of them.
        unsafe {
            if block.p.v_packing == Packing::RowPairs {
                unpack_pairs::<bf16, _>(block.p, block.key_range, block.scratch.v_block, v);
            }
            products.packed_block(s, block, rows, k, v.rows().cast());
        }
    }

    /// One block of keys for few rows of some KV heads.
    ///
    /// # Safety
    /// As [`Products::block`].
    #[inline(never)]
    unsafe fn direct_block(
        products: &DotProducts,
        s: Avx512,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        // SAFETY: the caller's.
        unsafe { products.direct_block(s, block, rows, k, v) }
    }
}

impl DotProducts {
    /// The softmax of some rows, the first of which is row `first` of the tile, and their weights as bf16.
    ///
    /// # Safety
    /// The rows' scores with the keys of a key range are in place.
    #[inline(always)]
    unsafe fn weigh(&self, s: Avx512, block: &Block, rows: &mut [RowState], first: usize, keys: KeyRange) {
        /// Rows that are processed together.
        const AT_ONCE: usize = 16;
        // SAFETY: the caller's.
        unsafe {
            for (index, rows) in rows.chunks_mut(AT_ONCE).enumerate() {
                let first = first + index * AT_ONCE;
                let mut before = [0.0; AT_ONCE];
                for (before, row) in before.iter_mut().zip(&*rows) {
                    *before = row.max;
                }
                s.outline(Softmax { block, rows: &mut *rows, first, keys });
                for (r, row) in rows.iter().enumerate() {
                    self.pack_weights(s, block, row, first + r, before[r]);
                }
            }
        }
    }
}
