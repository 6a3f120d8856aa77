//! Attention over bf16 keys and values by products of small bf16 matrices.
//!
//! | file | what |
//! | --- | --- |
//! | this one | the entry points, the scratch memory, and one block of keys |
//! | `groups` | register tiles: how the query rows of a tile are grouped |
//! | `operands` | operands and sums in registers |
//! | `pack` | query rows, keys, values and weights as operands in memory |
//! | `packed`, `direct` | scores and weighted values: of many rows from packed operands, of few rows from the cache |
//! | `state` | the state of pairs of rows: rescaling, and the end of a chunk |
//! | `non_finite` | repairs of NaN and infinity |
//!
//! # Order of computation
//! As in [`generic`](crate::kernels::generic::attention), whose walk over chunks and blocks, masks, softmax, folding
//! and finishing it uses; only the two products ([`Products`]) are its own. Both have the same form, in the same loop
//! (`multiply`): pairs of query rows on the left, pairs of keys or of columns of values on the right, four head dims or
//! four keys deep.
//!
//! ```text
//! once per tile:    Q -> bf16 terms                    A  [group][term][4 dims]   pairs of rows x 4 dims
//! per block:        K                                  B  [8 keys][4 dims]        pairs of keys x 4 dims
//!                   V transposed                       B  [8 columns][4 keys]     pairs of columns x 4 keys
//! per group of up   S = Q K^T, stored row by row       scratch.s      softmax of `generic`
//! to twelve rows:   P as bf16                          A  [term][4 keys]          pairs of rows x 4 keys
//!                   O = O 2^(old max - max) + P V      scratch.acc    pairs of rows, 2 x 2 numbers per vector
//! per chunk:        O to rows, times (sum of weights) / (sum of rounded weights)
//! ```
//! Few rows, completed to a pair, go through the same products, which is why decode and prefill agree to the bit. Up to
//! [`DIRECT_ROWS`] of them make the operands of K and V from the cache, without a copy, unless there are several terms.
//!
//! # Accuracy
//! Products of bf16 are exact in f32. A query in bf16 is one term, in f16 the exact sum of two, in f32 the exact sum of
//! three, of which `HIGH` takes all and the default two: 16 bits, so that a logit errs by at most 2^-16 of its
//! magnitude. A softmax weight is rounded to one bf16, with a relative error of 2^-9. A row is divided by the sum of
//! the rounded weights, so that the error of an output is a mean of |v - output| times 2^-9: at most 2^-8 of the
//! largest |v|, and 0 where all values agree. The sum of rounded weights is one more product, with ones. The
//! log-sum-exp is that of the weights before rounding. With `HIGH`, a weight is two terms, with a relative error of
//! 2^-18.
//!
//! # Why the bits depend on the row alone
//! Every score, and every element of the output, goes through the same products in the same order, whatever is in the
//! other row and column of its 2 x 2 matrix. A masked key, or one beyond an end, has the weight +0 and finite values,
//! and its product changes nothing: after an output was rescaled, there is a product with a visible or an earlier key,
//! which flushes its subnormal numbers to 0.
//!
//! # Why masked keys cannot leak
//! Keys that no row of the tile sees are not loaded; another key stands in for them in the copy of K, and zeros in the
//! copy of V. The softmax replaces masked scores. Packing V checks every element by products with 0, which are NaN for
//! NaN and infinity: such an element becomes 0 in the packed copy, and is added afterwards to the rows that see its
//! key. Without a copy, columns with such an element are discarded before they are stored, and computed again from a
//! copy. If Q has more than one term, a score that is NaN is recomputed by single products, because infinity times a
//! term of 0 is NaN where infinity times the query is not.
//!
//! # What bounds it
//! Never timed. Instructions are counted in the disassembly, cycles by LLVM's model of Neoverse V2 (`llvm-mca`), which
//! has four vector instructions, three loads and six micro-operations per cycle, three of them for a load of two
//! registers; in brackets, cycles for eight micro-operations, as in the manual:
//!
//! | loop | does | cycles per iteration | vector pipes alone |
//! | --- | --- | --- | --- |
//! | scores, values; 6 pairs by 4 | 24 products for 5 loads of pairs | 8.1 (6.1) | 6 |
//! | direct scores, 1 pair by 8 | 16 products, 16 shuffles, 17 loads | 9.6 (8.1) | 8 |
//! | direct values, 1 pair by 8 | 8 products and 8 with 0, 16 shuffles, 7 loads, most of pairs | 10.1 (8.1) | 8 |
//! | direct scores, 4 pairs by 4 | 32 products, 8 shuffles, 12 loads | 11.1 (10.1) | 10 |
//!
//! A product is 16 multiply-adds, so many rows are bound by the vector pipes, at up to 64 multiply-adds per cycle: four
//! times those of f32. Six by four is the largest tile that leaves registers for operands: 24 sums, the 4 operands of
//! one side, and those of the other one at a time; each loaded operand is used 4 or 6 times. Fewer pairs of rows take
//! eight columns instead of four, since a sum has a latency of four cycles. With Neoverse N2's two pipes the tile takes
//! 12 cycles of 12. At 240 rows and 128 dims, a block takes at least 61000 cycles for products, 1900 for copies and
//! 14000 for its softmax (16 vectors of 15 instructions per row).
//!
//! Few rows are bound by memory until the pipes are full: two of them consume 256 bytes of K in 9.6 cycles and 128
//! bytes of V in 10.1, 17 bytes per cycle. Half of that time is for the shuffles that transpose V and the check for
//! elements that are not finite. A further pair of rows costs one more product per eight elements; widened to f32, a
//! further row would cost two multiply-adds.

mod direct;
mod groups;
mod non_finite;
mod operands;
mod pack;
mod packed;
mod state;

use crate::cpu::level_features;
use crate::dtype::DType;
use crate::kernels::api::AttentionFns;
use crate::kernels::generic::attention::{
    self as generic, Block, Deinterleaved, KeyPointerTable, KeyPointers, Pieces, Products, RowState, Scratch, Softmax,
    unpack_pairs,
};
use crate::kernels::neon::{Neon, shells};
use crate::kernels::partial::with_features;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::layout::Packing;
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::problem::tile::{MAX_TILE_ROWS, PACK_ROWS, Tile};
use groups::{Group, groups};
use half::bf16;
use state::shrink;

/// Pairs of rows of a register tile: with four pairs of keys it has 24 sums and ten operands per step, of which those
/// of the rows are loaded one at a time.
const TILE_PAIRS: usize = 6;
/// Elements of an operand: two rows of four.
const OPERAND: usize = 8;
/// Dims of K, or keys, of one product.
const DEPTH: usize = 4;
/// Operands of K or V that are contiguous, step by step: eight keys or columns.
const SLAB: usize = 4;
/// Keys, or columns, of a slab.
const SLAB_COLUMNS: usize = 2 * SLAB;
/// Steps over all keys of a block.
const KEY_STEPS: usize = BLOCK / DEPTH;
/// The most terms of a query, and of a weight.
const MAX_QUERY_TERMS: usize = 3;
const MAX_WEIGHT_TERMS: usize = 2;
/// Tiles of at most this many rows read K and V from the cache: making the operands for every use costs less than a
/// copy.
const DIRECT_ROWS: usize = 8;

/// The entry points; with `HIGH`, weights have two terms, and queries in f32 three.
pub(super) const fn functions<const HIGH: bool>() -> AttentionFns {
    AttentionFns {
        tile: tile::<HIGH>,
        reduce,
        pieces: shells::pieces::<bf16>(),
        max_rows: MAX_TILE_ROWS,
        row_step: 2 * TILE_PAIRS,
        max_heads: 1,
        direct_rows: PACK_ROWS - 1,
        scratch_bytes,
    }
}

level_features!(
    NeonBf16,
    with_features! {
        /// # Safety
        /// The level is available, `p` is validated, `tile` is inside it, and `memory` has [`scratch_bytes`] for its
        /// rows.
        unsafe fn tile<const HIGH: bool>(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
            let (scratch, mut products, _) = layout(memory, tile.rows(), p.q.shape[3], p.v_dim);
            products.query_terms = match p.query_dtype() {
                DType::Bf16 => 1,
                DType::F16 => 2,
                DType::F32 => 2 + usize::from(HIGH),
            };
            products.weight_terms = 1 + usize::from(HIGH);
            // SAFETY: the caller's; the level includes NEON.
            unsafe { generic::tile(Neon::new_unchecked(), IN_ORDER, p, tile, &scratch, &products) }
        }

        /// Folds the partial states that the chunks of a tile left in `tile.partials`, and writes the output.
        ///
        /// # Safety
        /// As [`tile`]; the partial states of all chunks have been written.
        unsafe fn reduce(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
            let scratch = layout(memory, tile.rows(), p.q.shape[3], p.v_dim).0;
            // SAFETY: the caller's; the level includes NEON.
            unsafe { generic::reduce(Neon::new_unchecked(), p, tile, scratch.total, false) }
        }
    }
);

/// Queries and accumulators keep the order of their elements.
const IN_ORDER: Deinterleaved = Deinterleaved { keys: false, values: false };

/// Scratch bytes for `(rows, dim, v_dim)`.
fn scratch_bytes(rows: usize, d: usize, dv: usize) -> usize {
    layout(std::ptr::null_mut(), rows, d, dv).2
}

/// Cuts the memory at `base` into the scratch memory of `generic`, for whole pairs of rows, and that of the products;
/// returns the bytes used.
fn layout(base: *mut u8, rows: usize, d: usize, dv: usize) -> (Scratch, MatrixProducts, usize) {
    let pairs = rows.div_ceil(2);
    let (scratch, mut used) = Scratch::layout(base, 2 * pairs, d, dv);
    let mut operands = |n: usize| {
        let at = base.wrapping_add(used);
        used += (n * OPERAND * size_of::<u16>()).next_multiple_of(64);
        at
    };
    let products = MatrixProducts {
        q: operands(pairs * MAX_QUERY_TERMS * steps_of(d)).cast(),
        weights: operands(TILE_PAIRS * MAX_WEIGHT_TERMS * KEY_STEPS).cast(),
        rounded: operands(pairs).cast(),
        // Memory for copies in f32, half of which suffices.
        k: scratch.kt.cast(),
        v: scratch.vp.cast(),
        query_terms: 0,
        weight_terms: 0,
        dvp: padded(dv),
    };
    (scratch, products, used)
}

/// Steps over the dims of a key, in whole loads of eight.
const fn steps_of(d: usize) -> usize {
    d.next_multiple_of(OPERAND) / DEPTH
}

/// The products by `bfmmla`, and their memory.
struct MatrixProducts {
    /// `[group][term][step][pair]` operands.
    q: *mut u16,
    /// `[term][step][pair]` operands of one group.
    weights: *mut u16,
    /// Sums of the rounded weights of a pair: twice the first row's, then twice the second's.
    rounded: *mut f32,
    /// `[8 keys][step][4]` operands.
    k: *mut u16,
    /// `[8 columns][step][4]` operands.
    v: *mut u16,
    query_terms: usize,
    weight_terms: usize,
    /// Floats of a row's outputs.
    dvp: usize,
}

impl Products<Neon> for MatrixProducts {
    #[inline(always)]
    unsafe fn pack_queries(&self, s: Neon, p: &Problem, tile: &Tile, scratch: &Scratch) {
        // SAFETY: the caller's; the level is available.
        unsafe { self.pack_rows(s, tile.rows(), scratch, p.q.shape[3]) }
    }

    #[inline(always)]
    unsafe fn block(
        &self,
        s: Neon,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<u8>,
        v: &mut KeyPointerTable<u8>,
    ) {
        // SAFETY: the caller's; the level is available, and the scratch memory for values holds a block of them.
        unsafe {
            if block.p.v_packing == Packing::RowPairs {
                unpack_pairs::<bf16, _>(block.p, block.key_range, block.scratch.v_block, v);
            }
            self.add_block(s, block, rows, k.cast(), v.rows().cast());
        }
    }

    #[inline(always)]
    unsafe fn end_chunk(&self, s: Neon, rows: &[RowState], scratch: &Scratch) {
        // SAFETY: the caller's; the level is available.
        unsafe { self.split_pairs(s, rows, scratch) }
    }
}

impl MatrixProducts {
    /// Adds one block of keys to all rows of the tile.
    ///
    /// # Safety
    /// As [`Products::block`].
    #[inline(always)]
    unsafe fn add_block(
        &self,
        s: Neon,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        // The softmax must not scale the accumulators, which are in pairs of rows: for it, a value has no elements.
        let softmax = Block { dv: 0, ..*block };
        let direct = rows.len() <= DIRECT_ROWS;
        let (direct_scores, direct_values) = (direct && self.query_terms == 1, direct && self.weight_terms == 1);
        // SAFETY: the caller's; all parts of the memory have the sizes of their layout.
        unsafe {
            if !direct_scores {
                self.pack_keys(block, k);
            }
            let mut non_finite_keys = if direct_values { 0 } else { self.pack_values(s, block, k, v) };
            for (first, pairs) in groups(rows.len()) {
                let start = 2 * first;
                let rows = &mut rows[start..(start + 2 * pairs).min(block.tile.rows())];
                let keys = KeyRange::around(rows.iter().fold(0, |bits, row| bits | row.visible_bits));
                if keys.low == keys.high {
                    continue;
                }
                let group = Group { first, pairs, keys };
                if direct_scores {
                    self.direct_scores(s, block, group, k, v);
                } else {
                    self.scores(block, group);
                }
                if self.query_terms > 1 {
                    non_finite::repair_scores(block, rows, start, k);
                }
                let mut before = [0.0; 2 * TILE_PAIRS];
                before.iter_mut().zip(&*rows).for_each(|(before, row)| *before = row.max);
                s.outline(Softmax { block: &softmax, rows: &mut *rows, first: start, keys });
                for pair in 0..pairs {
                    let grown = |r: usize| rows.get(r).map_or(1.0, |row| shrink(s, before[r], row.max));
                    self.rescale(block, first + pair, [grown(2 * pair), grown(2 * pair + 1)]);
                }
                self.pack_weights(block, group, rows.len());
                if direct_values {
                    non_finite_keys = self.direct_values(s, block, group, k, v);
                } else {
                    self.values(block, group, 0);
                }
                if non_finite_keys != 0 {
                    non_finite::add_non_finite(block, rows, start, non_finite_keys, v);
                }
            }
        }
    }
}

const _: () = assert!(MAX_TILE_ROWS.is_multiple_of(2 * TILE_PAIRS) && MAX_HEAD_DIM.is_multiple_of(MAX_LANES));
