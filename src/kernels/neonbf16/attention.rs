//! Attention over bf16 keys and values by products of small bf16 matrices.
//!
//! # The road
//! That of [`generic`](crate::kernels::generic::attention), whose walk over chunks and blocks, masks, softmax, folding and
//! finishing this is; its own are the two products ([`Products`]). Both have the same form, in the same loop ([`multiply`]): what
//! belongs to two query rows on the left, two keys or two columns of values on the right, four head dims or four keys deep.
//!
//! ```text
//! once:      Q -> bf16 terms                    A  [group][term][4 dims]   pairs of rows x 4 dims
//! a block:   K                                  B  [8 keys][4 dims]        pairs of keys x 4 dims
//!            V transposed                       B  [8 columns][4 keys]     pairs of columns x 4 keys
//! a group of up to twelve rows:
//!            S = Q K^T, written row by row      scratch.s      softmax of `generic`
//!            P as bf16                          A  [term][4 keys]          pairs of rows x 4 keys
//!            O = O 2^(old max - max) + P V      scratch.acc    pairs of rows, 2 x 2 numbers a vector
//! a chunk:   O to rows, times (sum of weights) / (sum of rounded weights)
//! ```
//! Few rows take the same road, padded to a pair, through the same products: it is what makes decode and prefill agree. Up to
//! [`FEW_ROWS`] of them make the operands of K and V from where they lie, without a copy, unless there are several terms.
//!
//! # Exactness
//! Products of bf16 are exact in f32. A query of bf16 is one term, of f16 the exact sum of two, of f32 the exact sum of three, of
//! which `HIGH` takes all and the default two: 16 bits, so that a logit errs by 2^-16 of its magnitude at most. A softmax weight
//! is rounded to one bf16, an error of 2^-9 of itself, and a row is divided by the sum of what it was multiplied by: the error
//! of an output is then a mean of |v - output| times 2^-9, at most 2^-8 of the largest |v|, and 0 where all values agree. The
//! sum of rounded weights is one product more, with ones. The log-sum-exp is that of the weights before rounding. With
//! `HIGH`, a weight is two terms, an error of 2^-18.
//!
//! # Why the bits do not depend on anything but the row
//! Every score, and every element of the output, goes through the same products in the same order, whatever stands beside
//! it in the 2 x 2 matrix and however many of those there are. A key that is hidden, or beyond an end, has weight +0 and
//! values that are finite, and its product changes nothing: where an output has been rescaled, a product follows that takes its
//! subnormal numbers for 0, with a key that the row sees or with one before it.
//!
//! # Why nothing hidden gets out
//! Keys that no row of the tile may see are not loaded; in K's copy another stands for them, in V's there are zeros. Hidden
//! scores are replaced by the softmax. V is looked at while it is packed, by products with 0 that only NaN and infinity
//! survive: such an element becomes 0 in the packed copy, and is added afterwards to the rows that see it. Where there is no
//! copy, columns in which one turns up are given up before they are stored, and done again from one. A score that is NaN is
//! computed again, one product after the other, where Q has more than one term: infinity times a term of 0 is not what infinity
//! times the query is.
//!
//! # What bounds it
//! Never timed. What the disassembly has, and what LLVM's model of Neoverse V2 (`llvm-mca`) makes of it, in which a cycle takes
//! four vector instructions, three loads and six micro-operations, three of them for a load of two registers; in brackets if
//! it were eight, as the manual has it:
//!
//! | loop | does | cycles a turn | of which the vector pipes need |
//! | --- | --- | --- | --- |
//! | scores, values; 6 pairs by 4 | 24 products for 5 loads of pairs | 8.1 (6.1) | 6 |
//! | few scores, 1 pair by 8 | 16 products, 16 shuffles, 17 loads | 9.6 (8.1) | 8 |
//! | few values, 1 pair by 8 | 8 products and 8 with 0, 16 shuffles, 7 loads, most of pairs | 10.1 (8.1) | 8 |
//! | few scores, 4 pairs by 4 | 32 products, 8 shuffles, 12 loads | 11.1 (10.1) | 10 |
//! | copy of K, 8 keys by 8 dims | 8 shuffles, 8 loads, 4 stores of pairs | 5.6 (4.6) | 2 |
//! | copy of V, 4 keys by 8 columns | 8 shuffles, 4 products, 4 loads, 2 stores of pairs | 4.6 (4.1) | 3 |
//!
//! A product is 16 multiply-adds, so many rows are bound by the vector pipes, at up to 64 multiply-adds a cycle: four times what
//! f32 has. Six by four is the largest tile that leaves registers for operands: 24 sums, the 4 operands of one side, and those
//! of the other one after the other; each that is loaded is used 4 or 6 times. Fewer pairs of rows take eight columns
//! instead of four, since a sum waits four cycles for the one before. With Neoverse N2's two pipes the tile takes 12 cycles of 12.
//! At 240 rows and 128 dims a block's products take 61000 cycles at least, its copies 1900, and its softmax, 16 vectors of 15
//! instructions a row, 14000.
//!
//! Few rows are bound by memory as far as it goes: two of them take in 256 bytes of K in 9.6 cycles and 128 bytes of V in 10.1,
//! 17 bytes a cycle. Half of that are the shuffles that transpose V and the look for what is not finite. For every further pair
//! of rows eight elements take one product more; widened to f32 they would take two multiply-adds for every further row. The lines of a block's V are asked for while its K is computed, and those of the next K with V.

use super::{bfmmla, round};
use crate::dtype::DType;
use crate::kernels::api::AttentionFns;
use crate::kernels::generic::attention::state::is_empty;
use crate::kernels::generic::attention::{
    self as generic, Block, Deinterleaved, KeyPointerTable, KeyPointers, Pieces, Products, RowState, Scratch, Softmax,
    unpack_pairs,
};
use crate::kernels::generic::math;
use crate::kernels::neon::{Neon, shells};
use crate::kernels::simd::{MAX_LANES, Simd, copy_part};
use crate::layout::Packing;
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::problem::tile::{MAX_TILE_ROWS, Tile};
use half::bf16;
use std::arch::aarch64::*;

/// Pairs of rows of a register tile: with four pairs of keys 24 sums and the ten operands of a step, of which the rows come one
/// after the other.
const TILE_PAIRS: usize = 6;
/// Elements of an operand: two rows of four.
const OPERAND: usize = 8;
/// Dims of K, or keys, that a product is deep.
const DEPTH: usize = 4;
/// Operands of K or V that lie together, step by step: eight keys or columns.
const SLAB: usize = 4;
/// Keys, or columns, of a slab.
const SLAB_COLUMNS: usize = 2 * SLAB;
/// Steps over all keys of a block.
const KEY_STEPS: usize = BLOCK / DEPTH;
/// The most terms of a query, and of a weight.
const MAX_QUERY_TERMS: usize = 3;
const MAX_WEIGHT_TERMS: usize = 2;
/// Up to so many rows, K and V are read where they lie: making the operands anew costs less than a copy.
const FEW_ROWS: usize = 8;

/// A value that no row has a weight for.
static ZEROS: [bf16; MAX_HEAD_DIM] = [bf16::ZERO; MAX_HEAD_DIM];

/// The entry points; `HIGH` gives weights two terms, and queries in f32 three.
pub(super) const fn functions<const HIGH: bool>() -> AttentionFns {
    AttentionFns {
        tile: tile::<HIGH>,
        reduce,
        pieces: shells::pieces::<bf16>(),
        max_rows: MAX_TILE_ROWS,
        row_step: 2 * TILE_PAIRS,
        several_heads: false,
        scratch_bytes,
    }
}

/// # Safety
/// The level is available, `p` is validated, `tile` is inside it, and `memory` has [`scratch_bytes`] for its rows.
#[target_feature(enable = "neon,bf16")]
unsafe fn tile<const HIGH: bool>(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
    let (scratch, mut matrices, _) = layout(memory, tile.rows(), p.q.shape[3], p.v_dim);
    matrices.query_terms = match p.q.dtype {
        DType::Bf16 => 1,
        DType::F16 => 2,
        DType::F32 => 2 + usize::from(HIGH),
    };
    matrices.weight_terms = 1 + usize::from(HIGH);
    // SAFETY: the caller's; the level includes NEON.
    unsafe { generic::tile(Neon::new_unchecked(), IN_ORDER, p, tile, &scratch, &matrices) }
}

/// Queries and accumulators keep the order of their elements.
const IN_ORDER: Deinterleaved = Deinterleaved { keys: false, values: false };

/// Folds the chunks of a tile that left them in `tile.partials`, and writes the output.
///
/// # Safety
/// As [`tile`]; the partial states of all chunks have been written.
#[target_feature(enable = "neon,bf16")]
unsafe fn reduce(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
    let scratch = layout(memory, tile.rows(), p.q.shape[3], p.v_dim).0;
    // SAFETY: the caller's; the level includes NEON.
    unsafe { generic::reduce(Neon::new_unchecked(), p, tile, scratch.total, false) }
}

fn scratch_bytes(rows: usize, d: usize, dv: usize) -> usize {
    layout(std::ptr::null_mut(), rows, d, dv).2
}

/// Cuts the memory into that of the generic walk, with whole pairs of rows, and what the products need besides.
fn layout(base: *mut u8, rows: usize, d: usize, dv: usize) -> (Scratch, Matrices, usize) {
    let pairs = rows.div_ceil(2);
    let (scratch, mut used) = Scratch::layout(base, 2 * pairs, d, dv);
    let mut operands = |n: usize| {
        let at = base.wrapping_add(used);
        used += (n * OPERAND * size_of::<u16>()).next_multiple_of(64);
        at
    };
    let matrices = Matrices {
        q: operands(pairs * MAX_QUERY_TERMS * steps_of(d)).cast(),
        weights: operands(TILE_PAIRS * MAX_WEIGHT_TERMS * KEY_STEPS).cast(),
        rounded: operands(pairs).cast(),
        // Half as large as what they have room for.
        k: scratch.kt.cast(),
        v: scratch.vp.cast(),
        query_terms: 0,
        weight_terms: 0,
        dvp: padded(dv),
    };
    (scratch, matrices, used)
}

/// Steps over the dims of a key: whole loads of eight.
const fn steps_of(d: usize) -> usize {
    d.next_multiple_of(OPERAND) / DEPTH
}

/// The products by `bfmmla`, and their memory.
struct Matrices {
    /// `[group][term][step][pair]` operands.
    q: *mut u16,
    /// `[term][step][pair]` operands of one group.
    weights: *mut u16,
    /// Sums of the rounded weights of a pair: the first row's twice, then the second's.
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

impl Products<Neon> for Matrices {
    #[inline(always)]
    unsafe fn pack_queries(&self, s: Neon, tile: &Tile, scratch: &Scratch, d: usize) {
        // SAFETY: the caller's; the level is available.
        unsafe { self.pack_rows(s, tile.rows(), scratch, d) }
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
        unsafe { self.rows_of_chunk(s, rows, scratch) }
    }
}

/// Rows of a register tile, and the keys of a block that some of them see, and those between.
#[derive(Clone, Copy)]
struct Group {
    /// The first pair of rows, and how many there are.
    first: usize,
    pairs: usize,
    keys: KeyRange,
}

/// Pairs of rows of the next register tile when `left` are to do: few, nearly equal tiles.
fn pairs_at_once(left: usize) -> usize {
    match left {
        7 | 8 => 4,
        _ => left.min(TILE_PAIRS),
    }
}

/// First pair, and number of pairs, of every register tile of `rows` rows.
fn groups(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let pairs = rows.div_ceil(2);
    let mut first = 0;
    std::iter::from_fn(move || {
        let group = (first, pairs_at_once(pairs - first));
        first += group.1;
        (group.1 > 0).then_some(group)
    })
}

impl Matrices {
    /// # Safety
    /// As [`Products::pack_queries`].
    #[target_feature(enable = "neon,bf16")]
    unsafe fn pack_rows(&self, s: Neon, rows: usize, scratch: &Scratch, d: usize) {
        let (dp, steps) = (padded(d), steps_of(d));
        for (first, pairs) in groups(rows) {
            for pair in 0..pairs {
                let row = 2 * (first + pair);
                for step in 0..steps {
                    // SAFETY: a row has dp floats, which are whole steps; Q has its operands for every pair.
                    unsafe {
                        let at = |row| s.load_f32(scratch.q.add(row * dp + step * DEPTH));
                        let mut x = [at(row), if row + 1 < rows { at(row + 1) } else { s.zero() }];
                        for term in 0..self.query_terms {
                            let upper = x.map(|x| upper_half(x));
                            let to = (first * self.query_terms + term * pairs) * steps + step * pairs + pair;
                            let [low, high] = upper.map(|x| vreinterpretq_u16_f32(x));
                            vst1q_u16(self.q.add(to * OPERAND), vuzp2q_u16(low, high));
                            for (x, upper) in x.iter_mut().zip(upper) {
                                // An infinity leaves nothing, and a NaN is one already.
                                let left = vsubq_f32(*x, upper);
                                *x = vbslq_f32(vceqq_f32(left, left), left, s.zero());
                            }
                        }
                    }
                }
            }
        }
        // SAFETY: there is room for whole pairs.
        unsafe {
            // The walk clears the outputs of the rows that there are. A row that only fills a pair adds nothing to its own.
            std::ptr::write_bytes(scratch.acc.add(rows * self.dvp), 0, rows % 2 * self.dvp);
            self.clear_sums(rows);
        }
    }

    /// # Safety
    /// As [`Self::pack_rows`].
    unsafe fn clear_sums(&self, rows: usize) {
        // SAFETY: four floats a pair.
        unsafe { std::ptr::write_bytes(self.rounded, 0, rows.div_ceil(2) * 4) };
    }

    /// # Safety
    /// As [`Products::block`].
    #[target_feature(enable = "neon,bf16")]
    unsafe fn add_block(
        &self,
        s: Neon,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        // The accumulators are in pairs of rows: scaling them is not the softmax's, to which a row has no elements.
        let softmax = Block { dv: 0, ..*block };
        let few = rows.len() <= FEW_ROWS;
        let (few_scores, few_values) = (few && self.query_terms == 1, few && self.weight_terms == 1);
        // SAFETY: the caller's; all parts of the memory have what their layout says.
        unsafe {
            if !few_scores {
                self.pack_keys(block, k);
            }
            let mut special = if few_values { 0 } else { self.pack_values(block, k, v) };
            for (first, pairs) in groups(rows.len()) {
                let start = 2 * first;
                let rows = &mut rows[start..(start + 2 * pairs).min(block.tile.rows())];
                let keys = KeyRange::around(rows.iter().fold(0, |bits, row| bits | row.visible_bits));
                if keys.low == keys.high {
                    continue;
                }
                let group = Group { first, pairs, keys };
                if few_scores {
                    self.few_scores(block, group, k, v);
                } else {
                    self.scores(block, group);
                }
                if self.query_terms > 1 {
                    repair(block, rows, start, k);
                }
                let mut before = [0.0; 2 * TILE_PAIRS];
                before.iter_mut().zip(&*rows).for_each(|(before, row)| *before = row.max);
                s.outline(Softmax { block: &softmax, rows: &mut *rows, first: start, keys });
                for pair in 0..pairs {
                    let grown = |r: usize| rows.get(r).map_or(1.0, |row| shrink(s, before[r], row.max));
                    self.rescale(block, first + pair, [grown(2 * pair), grown(2 * pair + 1)]);
                }
                self.pack_weights(block, group, rows.len());
                if few_values {
                    special = self.few_values(block, group, k, v);
                } else {
                    self.values(block, group, 0);
                }
                if special != 0 {
                    add_special(block, rows, start, special, v);
                }
            }
        }
    }

    /// Keys as operands, in slabs of eight; beyond the key range's ends its last key stands for others, whose scores nobody looks at.
    ///
    /// # Safety
    /// As [`Products::block`].
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn pack_keys(&self, block: &Block, k: KeyPointers<bf16>) {
        let Block { key_range, d, .. } = *block;
        let whole = d / OPERAND * OPERAND;
        for first in (key_range.low / SLAB_COLUMNS * SLAB_COLUMNS..key_range.high).step_by(SLAB_COLUMNS) {
            let mut keys = [std::ptr::null(); SLAB_COLUMNS];
            for (i, key) in keys.iter_mut().enumerate() {
                *key = k.key(0, (first + i).clamp(key_range.low, key_range.high - 1));
            }
            let slab = self.k.wrapping_add(first / SLAB_COLUMNS * steps_of(d) * SLAB * OPERAND);
            // SAFETY: the caller's; a slab has room for all steps, and eight elements are two of them.
            unsafe {
                for i in (0..whole).step_by(OPERAND) {
                    let x = keys.map(|key| vld1q_u16(key.add(i).cast()));
                    put_keys(slab.add(i / DEPTH * SLAB * OPERAND), x);
                }
                if whole < d {
                    let x = keys.map(|key| load_part(key.add(whole), d - whole));
                    put_keys(slab.add(whole / DEPTH * SLAB * OPERAND), x);
                }
            }
        }
    }

    /// Values as operands, in slabs of eight columns, with zeros for keys outside of the key range and for elements that are not finite;
    /// returns the keys that have such.
    ///
    /// # Safety
    /// As [`Products::block`].
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn pack_values(&self, block: &Block, k: KeyPointers<bf16>, v: KeyPointers<bf16>) -> u64 {
        let Block { key_range, d, dv, .. } = *block;
        let whole = dv / SLAB_COLUMNS * SLAB_COLUMNS;
        let mut products = [vdupq_n_f32(0.0); SLAB];
        for step in key_range.low / DEPTH..key_range.high.div_ceil(DEPTH) {
            let mut keys = [ZEROS.as_ptr(); DEPTH];
            for (i, key) in keys.iter_mut().enumerate() {
                let j = step * DEPTH + i;
                if j >= key_range.low && j < key_range.high {
                    *key = v.key(0, j);
                    ask_for(k.next(j), d);
                    ask_for(v.next(j), dv);
                }
            }
            // SAFETY: the caller's; a slab of columns has room for all steps of a block.
            unsafe {
                let slabs = self.v.add(step * SLAB * OPERAND);
                for i in (0..whole).step_by(SLAB_COLUMNS) {
                    let x = keys.map(|key| vld1q_u16(key.add(i).cast()));
                    put_values(slabs.add(i / SLAB_COLUMNS * KEY_STEPS * SLAB * OPERAND), x, &mut products);
                }
                if whole < dv {
                    let x = keys.map(|key| load_part(key.add(whole), dv - whole));
                    put_values(slabs.add(whole / SLAB_COLUMNS * KEY_STEPS * SLAB * OPERAND), x, &mut products);
                }
            }
        }
        if all_numbers(products) {
            return 0;
        }
        // SAFETY: the operands of the key range's steps have just been written.
        unsafe { self.clear_special(block, v) }
    }

    /// # Safety
    /// As [`Self::pack_values`], which has written the copy.
    #[cold]
    unsafe fn clear_special(&self, block: &Block, v: KeyPointers<bf16>) -> u64 {
        let Block { key_range, dv, .. } = *block;
        let mut special = 0;
        for j in key_range.low..key_range.high {
            for i in 0..dv {
                // SAFETY: the caller's.
                unsafe {
                    if !(*v.key(0, j).add(i)).is_finite() {
                        special |= 1 << j;
                        let operand = (i / SLAB_COLUMNS * KEY_STEPS + j / DEPTH) * SLAB + i % SLAB_COLUMNS / 2;
                        *self.v.add(operand * OPERAND + i % 2 * DEPTH + j % DEPTH) = 0;
                    }
                }
            }
        }
        special
    }

    /// Scores of a group with the keys that it sees, and their neighbours up to whole slabs.
    ///
    /// # Safety
    /// Queries and keys are packed.
    #[target_feature(enable = "neon,bf16")]
    unsafe fn scores(&self, block: &Block, group: Group) {
        // SAFETY: the caller's.
        unsafe {
            match group.pairs {
                1 => self.scores_of::<1>(block, group),
                2 => self.scores_of::<2>(block, group),
                3 => self.scores_of::<3>(block, group),
                4 => self.scores_of::<4>(block, group),
                5 => self.scores_of::<5>(block, group),
                _ => self.scores_of::<6>(block, group),
            }
        }
    }

    /// # Safety
    /// As [`Self::scores`]; the group has `P` pairs.
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn scores_of<const P: usize>(&self, block: &Block, group: Group) {
        let mut column = group.keys.low / SLAB_COLUMNS * SLAB_COLUMNS;
        // SAFETY: the caller's; a block has whole slabs.
        unsafe {
            while column < group.keys.high {
                if P <= 3 && column + SLAB_COLUMNS < group.keys.high {
                    self.scores_tile::<P, 2>(block, group, column);
                    column += 2 * SLAB_COLUMNS;
                } else {
                    self.scores_tile::<P, 1>(block, group, column);
                    column += SLAB_COLUMNS;
                }
            }
        }
    }

    /// `G` slabs of keys from key `column` on.
    ///
    /// # Safety
    /// As [`Self::scores_of`].
    #[inline]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn scores_tile<const P: usize, const G: usize>(&self, block: &Block, group: Group, column: usize) {
        let steps = steps_of(block.d);
        let out = block.scratch.s.wrapping_add(2 * group.first * BLOCK + column);
        let mut sums = [[[vdupq_n_f32(0.0); SLAB]; G]; P];
        // SAFETY: the caller's; there is room for the scores of whole pairs of rows.
        unsafe {
            let k = self.k.add(column / SLAB_COLUMNS * steps * SLAB * OPERAND);
            for term in 0..self.query_terms {
                let q = self.q.add((group.first * self.query_terms + term * P) * steps * OPERAND);
                multiply(q, k, steps * SLAB * OPERAND, steps, &mut sums);
            }
            put_scores(out, &sums);
        }
    }

    /// Scales the outputs of a pair of rows, and their sums of rounded weights.
    ///
    /// # Safety
    /// It is one of the tile's.
    #[target_feature(enable = "neon,bf16")]
    unsafe fn rescale(&self, block: &Block, pair: usize, [first, second]: [f32; 2]) {
        if (first, second) == (1.0, 1.0) {
            return;
        }
        let factor = vcombine_f32(vdup_n_f32(first), vdup_n_f32(second));
        let dvp = self.dvp;
        // SAFETY: the caller's.
        unsafe {
            let acc = block.scratch.acc.add(2 * pair * dvp);
            for i in (0..2 * dvp).step_by(4) {
                vst1q_f32(acc.add(i), vmulq_f32(vld1q_f32(acc.add(i)), factor));
            }
            let rounded = self.rounded.add(pair * 4);
            vst1q_f32(rounded, vmulq_f32(vld1q_f32(rounded), factor));
        }
    }

    /// Rounds the weights of a group, `rows` of which there are, to operands, and adds up what they have become.
    ///
    /// # Safety
    /// The rows' weights with the keys of the group are in `scratch.s`.
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn pack_weights(&self, block: &Block, group: Group, rows: usize) {
        let Group { first, pairs, keys } = group;
        let ones = vdupq_n_u16(bf16::ONE.to_bits());
        for pair in 0..pairs {
            let from = block.scratch.s.wrapping_add(2 * (first + pair) * BLOCK);
            let both = 2 * pair + 1 < rows;
            // SAFETY: the caller's; a row without a second one has room for its scores, too.
            unsafe {
                let mut sum = vld1q_f32(self.rounded.add((first + pair) * 4));
                for step in keys.low / DEPTH..keys.high.div_ceil(DEPTH) {
                    let low = vld1q_f32(from.add(step * DEPTH));
                    let high = if both { vld1q_f32(from.add(BLOCK + step * DEPTH)) } else { vdupq_n_f32(0.0) };
                    let to = self.weights.add((step * pairs + pair) * OPERAND);
                    let weights = round(low, high);
                    vst1q_u16(to, weights);
                    sum = bfmmla(sum, weights, ones);
                    if self.weight_terms > 1 {
                        let low = vsubq_f32(low, vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(weights))));
                        let high = vsubq_f32(high, vreinterpretq_f32_u32(vshll_high_n_u16::<16>(weights)));
                        let weights = round(low, high);
                        vst1q_u16(to.add(KEY_STEPS * pairs * OPERAND), weights);
                        sum = bfmmla(sum, weights, ones);
                    }
                }
                vst1q_f32(self.rounded.add((first + pair) * 4), sum);
            }
        }
    }

    /// Adds the weighted values of the keys that a group sees to its outputs, from column `from` on.
    ///
    /// # Safety
    /// Weights and values are packed.
    #[target_feature(enable = "neon,bf16")]
    unsafe fn values(&self, block: &Block, group: Group, from: usize) {
        // SAFETY: the caller's.
        unsafe {
            match group.pairs {
                1 => self.values_of::<1>(block, group, from),
                2 => self.values_of::<2>(block, group, from),
                3 => self.values_of::<3>(block, group, from),
                4 => self.values_of::<4>(block, group, from),
                5 => self.values_of::<5>(block, group, from),
                _ => self.values_of::<6>(block, group, from),
            }
        }
    }

    /// # Safety
    /// As [`Self::values`]; the group has `P` pairs.
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn values_of<const P: usize>(&self, block: &Block, group: Group, from: usize) {
        let mut column = from;
        // SAFETY: the caller's; columns are padded to whole slabs.
        unsafe {
            while column < block.dv {
                if P <= 3 && column + SLAB_COLUMNS < block.dv {
                    self.values_tile::<P, 2>(block, group, column);
                    column += 2 * SLAB_COLUMNS;
                } else {
                    self.values_tile::<P, 1>(block, group, column);
                    column += SLAB_COLUMNS;
                }
            }
        }
    }

    /// `G` slabs of columns from `column` on.
    ///
    /// # Safety
    /// As [`Self::values_of`].
    #[inline]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn values_tile<const P: usize, const G: usize>(&self, block: &Block, group: Group, column: usize) {
        let (from, to) = (group.keys.low / DEPTH, group.keys.high.div_ceil(DEPTH));
        let acc = block.scratch.acc.wrapping_add(2 * (group.first * self.dvp + column));
        // SAFETY: the caller's.
        unsafe {
            let mut sums = load_sums::<P, G>(acc, 2 * self.dvp);
            let v = self.v.add((column / SLAB_COLUMNS * KEY_STEPS + from) * SLAB * OPERAND);
            for term in 0..self.weight_terms {
                let weights = self.weights.add((term * KEY_STEPS + from) * P * OPERAND);
                multiply(weights, v, KEY_STEPS * SLAB * OPERAND, to - from, &mut sums);
            }
            store_sums(acc, 2 * self.dvp, &sums);
        }
    }

    /// As [`Self::scores`], for few rows of one term: keys come from where they lie.
    ///
    /// # Safety
    /// As [`Products::block`]; the group is all rows, whose queries are packed.
    #[target_feature(enable = "neon,bf16")]
    unsafe fn few_scores(&self, block: &Block, group: Group, k: KeyPointers<bf16>, v: KeyPointers<bf16>) {
        // SAFETY: the caller's.
        unsafe {
            match group.pairs {
                1 => self.few_scores_of::<1, 2>(block, group.keys, k, v),
                2 => self.few_scores_of::<2, 2>(block, group.keys, k, v),
                3 => self.few_scores_of::<3, 1>(block, group.keys, k, v),
                _ => self.few_scores_of::<4, 1>(block, group.keys, k, v),
            }
        }
    }

    /// # Safety
    /// As [`Self::few_scores`]; there are `P` pairs of rows.
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn few_scores_of<const P: usize, const G: usize>(
        &self,
        block: &Block,
        seen: KeyRange,
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        let Block { scratch, key_range, d, dv, .. } = *block;
        let whole = d / OPERAND * OPERAND;
        let width = G * SLAB_COLUMNS;
        for first in (seen.low / width * width..seen.high).step_by(width) {
            let mut keys = [[std::ptr::null(); SLAB_COLUMNS]; G];
            for (i, key) in keys.as_flattened_mut().iter_mut().enumerate() {
                let j = (first + i).clamp(key_range.low, key_range.high - 1);
                *key = k.key(0, j);
                ask_for(v.key(0, j), dv);
            }
            let mut sums = [[[vdupq_n_f32(0.0); SLAB]; G]; P];
            // SAFETY: the caller's; eight elements are two steps. Room for scores is that of whole pairs of rows.
            unsafe {
                for i in (0..whole).step_by(OPERAND) {
                    let q = self.q.add(i / DEPTH * P * OPERAND);
                    for g in 0..G {
                        add_keys(q, keys[g].map(|key| vld1q_u16(key.add(i).cast())), g, &mut sums);
                    }
                }
                if whole < d {
                    let q = self.q.add(whole / DEPTH * P * OPERAND);
                    for g in 0..G {
                        add_keys(q, keys[g].map(|key| load_part(key.add(whole), d - whole)), g, &mut sums);
                    }
                }
                put_scores(scratch.s.add(first), &sums);
            }
        }
    }

    /// As [`Self::values`], for few rows of one term: values come from where they lie, and are packed only if one of them is not
    /// finite. Returns the keys that have such.
    ///
    /// # Safety
    /// As [`Products::block`]; the group is all rows, whose weights are packed.
    #[target_feature(enable = "neon,bf16")]
    unsafe fn few_values(&self, block: &Block, group: Group, k: KeyPointers<bf16>, v: KeyPointers<bf16>) -> u64 {
        // SAFETY: the caller's.
        unsafe {
            let done = match group.pairs {
                1 => self.few_values_of::<1, 2>(block, group.keys, k, v),
                2 => self.few_values_of::<2, 2>(block, group.keys, k, v),
                3 => self.few_values_of::<3, 1>(block, group.keys, k, v),
                _ => self.few_values_of::<4, 1>(block, group.keys, k, v),
            };
            if done == block.dv {
                return 0;
            }
            let special = self.pack_values(block, k, v);
            self.values(block, group, done);
            special
        }
    }

    /// Returns how many columns are done: up to the first slabs that have an element that is not finite, or all.
    ///
    /// # Safety
    /// As [`Self::few_values`]; there are `P` pairs of rows.
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn few_values_of<const P: usize, const G: usize>(
        &self,
        block: &Block,
        seen: KeyRange,
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) -> usize {
        let Block { key_range, d, dv, .. } = *block;
        let mut values = [ZEROS.as_ptr(); BLOCK];
        for j in key_range.low..key_range.high {
            values[j] = v.key(0, j);
            ask_for(k.next(j), d);
        }
        let mut column = 0;
        // SAFETY: the caller's; outputs are padded to sixteen columns.
        unsafe {
            while column < dv {
                let done = if dv - column >= G * SLAB_COLUMNS {
                    self.few_values_tile::<P, G, false>(block, seen, &values, column)
                } else {
                    self.few_values_tile::<P, 1, true>(block, seen, &values, column)
                };
                if done == 0 {
                    break;
                }
                column = dv.min(column + done);
            }
        }
        column
    }

    /// `G` slabs of columns from `column` on, or (`PART`) one that may be the rest of a value. Returns the number of columns, or
    /// 0 if one of them has an element that is not finite, and nothing has been added.
    ///
    /// # Safety
    /// As [`Self::few_values_of`]; `values` are the block's, and zeros for keys outside of the key range.
    #[inline]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn few_values_tile<const P: usize, const G: usize, const PART: bool>(
        &self,
        block: &Block,
        seen: KeyRange,
        values: &[*const bf16; BLOCK],
        column: usize,
    ) -> usize {
        let (from, to) = (seen.low / DEPTH, seen.high.div_ceil(DEPTH));
        let acc = block.scratch.acc.wrapping_add(2 * column);
        let left = block.dv - column;
        let zero = vdupq_n_u16(0);
        let mut finite = [vdupq_n_f32(0.0); SLAB];
        // SAFETY: the caller's.
        unsafe {
            let mut sums = load_sums::<P, G>(acc, 2 * self.dvp);
            let mut weights = self.weights.add(from * P * OPERAND);
            for values in &values.as_chunks::<DEPTH>().0[from..to] {
                for g in 0..G {
                    let x = if PART && left < SLAB_COLUMNS {
                        values.map(|value| load_part(value.add(column), left))
                    } else {
                        values.map(|value| vld1q_u16(value.add(column + g * SLAB_COLUMNS).cast()))
                    };
                    for (n, operand) in columns_of(x).into_iter().enumerate() {
                        finite[n] = bfmmla(finite[n], operand, zero);
                        for p in 0..P {
                            sums[p][g][n] = bfmmla(sums[p][g][n], vld1q_u16(weights.add(p * OPERAND)), operand);
                        }
                    }
                }
                weights = weights.wrapping_add(P * OPERAND);
            }
            if !all_numbers(finite) {
                return 0;
            }
            store_sums(acc, 2 * self.dvp, &sums);
        }
        G * SLAB_COLUMNS
    }

    /// Brings the outputs of pairs into rows, and to the sum of the exact weights instead of the rounded ones.
    ///
    /// # Safety
    /// As [`Products::end_chunk`].
    #[inline(never)]
    #[target_feature(enable = "neon,bf16")]
    unsafe fn rows_of_chunk(&self, s: Neon, rows: &[RowState], scratch: &Scratch) {
        let dvp = self.dvp;
        let mut second = [0.0f32; MAX_HEAD_DIM];
        for pair in 0..rows.len().div_ceil(2) {
            // SAFETY: there is room for whole pairs.
            unsafe {
                let ratio = |r: usize| {
                    let row = rows.get(2 * pair + r)?;
                    let mut lanes = [s.zero(); MAX_LANES];
                    lanes[0] = s.load_f32(scratch.sums.add((2 * pair + r) * MAX_LANES));
                    let sum = math::lane0(s, s.sum_lanes(&lanes));
                    (!is_empty((row.max, sum))).then(|| sum / *self.rounded.add(pair * 4 + 2 * r))
                };
                // A row that is not there, or that has seen nothing, has zeros.
                let ratios = [0, 1].map(|r| vdupq_n_f32(ratio(r).unwrap_or(1.0)));
                let acc = scratch.acc.add(2 * pair * dvp);
                for i in (0..dvp).step_by(4) {
                    let both = rows_of_pairs(vld1q_f32(acc.add(2 * i)), vld1q_f32(acc.add(2 * i + 4)));
                    // What is overwritten has been read.
                    vst1q_f32(acc.add(i), vmulq_f32(both[0], ratios[0]));
                    vst1q_f32(second.as_mut_ptr().add(i), vmulq_f32(both[1], ratios[1]));
                }
                std::ptr::copy_nonoverlapping(second.as_ptr(), acc.add(dvp), dvp);
            }
        }
        // SAFETY: the caller's.
        unsafe { self.clear_sums(rows.len()) };
    }
}

/// What a row's outputs are to be multiplied by when its largest logit grows: as in the softmax, where an empty state has
/// nothing to scale.
#[inline]
#[target_feature(enable = "neon")]
fn shrink(s: Neon, before: f32, after: f32) -> f32 {
    if before < after && before > f32::NEG_INFINITY { math::exp2_1(s, before - after) } else { 1.0 }
}

/// `sums[p][g][n] += a[step][p] * b[g][step][n]` for all steps, in their order: an operand of `a` a pair and four of each `b`, which
/// lie `apart` elements from one another.
///
/// # Safety
/// The operands are readable.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn multiply<const P: usize, const G: usize>(
    mut a: *const u16,
    mut b: *const u16,
    apart: usize,
    steps: usize,
    sums: &mut [[[float32x4_t; SLAB]; G]; P],
) {
    for _ in 0..steps {
        // SAFETY: the caller's.
        unsafe {
            if P <= SLAB * G {
                let mut left = [vdupq_n_u16(0); P];
                for (p, left) in left.iter_mut().enumerate() {
                    *left = vld1q_u16(a.add(p * OPERAND));
                }
                for g in 0..G {
                    for n in 0..SLAB {
                        let right = vld1q_u16(b.add(g * apart + n * OPERAND));
                        for p in 0..P {
                            sums[p][g][n] = bfmmla(sums[p][g][n], left[p], right);
                        }
                    }
                }
            } else {
                let mut right = [[vdupq_n_u16(0); SLAB]; G];
                for g in 0..G {
                    for n in 0..SLAB {
                        right[g][n] = vld1q_u16(b.add(g * apart + n * OPERAND));
                    }
                }
                for p in 0..P {
                    let left = vld1q_u16(a.add(p * OPERAND));
                    for g in 0..G {
                        for n in 0..SLAB {
                            sums[p][g][n] = bfmmla(sums[p][g][n], left, right[g][n]);
                        }
                    }
                }
            }
        }
        (a, b) = (a.wrapping_add(P * OPERAND), b.wrapping_add(SLAB * OPERAND));
    }
}

/// Two neighbouring 2 x 2 products as four elements of either row.
#[inline]
#[target_feature(enable = "neon")]
fn rows_of_pairs(a: float32x4_t, b: float32x4_t) -> [float32x4_t; 2] {
    let [a, b] = [vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)];
    [vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b))]
}

/// The upper half of every number; a NaN whose payload is all in the lower half must not become an infinity.
#[inline]
#[target_feature(enable = "neon")]
fn upper_half(x: float32x4_t) -> float32x4_t {
    let bits = vreinterpretq_u32_f32(x);
    let bits = vbslq_u32(vceqq_f32(x, x), bits, vorrq_u32(bits, vdupq_n_u32(0x40_0000)));
    vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff_0000)))
}

/// The sums of `P` pairs of rows, which lie `pair` floats apart.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_sums<const P: usize, const G: usize>(acc: *const f32, pair: usize) -> [[[float32x4_t; SLAB]; G]; P] {
    let mut sums = [[[vdupq_n_f32(0.0); SLAB]; G]; P];
    for p in 0..P {
        for (i, sum) in sums[p].as_flattened_mut().iter_mut().enumerate() {
            // SAFETY: the caller's.
            *sum = unsafe { vld1q_f32(acc.add(p * pair + i * 4)) };
        }
    }
    sums
}

/// The inverse of [`load_sums`].
///
/// # Safety
/// They are writable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store_sums<const P: usize, const G: usize>(acc: *mut f32, pair: usize, sums: &[[[float32x4_t; SLAB]; G]; P]) {
    for p in 0..P {
        for (i, sum) in sums[p].as_flattened().iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { vst1q_f32(acc.add(p * pair + i * 4), *sum) };
        }
    }
}

/// Scores of pairs of rows with pairs of keys, row by row.
///
/// # Safety
/// `2 * P` rows of [`BLOCK`] scores are writable at `out`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn put_scores<const P: usize, const G: usize>(out: *mut f32, sums: &[[[float32x4_t; SLAB]; G]; P]) {
    for p in 0..P {
        for (i, both) in sums[p].as_flattened().as_chunks::<2>().0.iter().enumerate() {
            for (r, row) in rows_of_pairs(both[0], both[1]).into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { vst1q_f32(out.add((2 * p + r) * BLOCK + i * 4), row) };
            }
        }
    }
}

/// Eight elements of eight keys as operands: four of one step, four of the next.
#[inline]
#[target_feature(enable = "neon")]
fn steps_of_keys(x: [uint16x8_t; SLAB_COLUMNS]) -> [[uint16x8_t; SLAB]; 2] {
    let mut operands = [[x[0]; SLAB]; 2];
    for pair in 0..SLAB {
        let [a, b] = [vreinterpretq_u64_u16(x[2 * pair]), vreinterpretq_u64_u16(x[2 * pair + 1])];
        operands[0][pair] = vreinterpretq_u16_u64(vzip1q_u64(a, b));
        operands[1][pair] = vreinterpretq_u16_u64(vzip2q_u64(a, b));
    }
    operands
}

/// Eight columns of four values as operands: transposed.
#[inline]
#[target_feature(enable = "neon")]
fn columns_of(x: [uint16x8_t; DEPTH]) -> [uint16x8_t; SLAB] {
    let (even, odd) = (vzip1q_u16(x[0], x[2]), vzip1q_u16(x[1], x[3]));
    let (later_even, later_odd) = (vzip2q_u16(x[0], x[2]), vzip2q_u16(x[1], x[3]));
    [vzip1q_u16(even, odd), vzip2q_u16(even, odd), vzip1q_u16(later_even, later_odd), vzip2q_u16(later_even, later_odd)]
}

/// Writes what [`steps_of_keys`] makes.
///
/// # Safety
/// Eight operands are writable at `to`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn put_keys(to: *mut u16, x: [uint16x8_t; SLAB_COLUMNS]) {
    for (i, operand) in steps_of_keys(x).as_flattened().iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { vst1q_u16(to.add(i * OPERAND), *operand) };
    }
}

/// Writes what [`columns_of`] makes; `products` become NaN where one is not finite.
///
/// # Safety
/// Four operands are writable at `to`.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn put_values(to: *mut u16, x: [uint16x8_t; DEPTH], products: &mut [float32x4_t; SLAB]) {
    for (n, operand) in columns_of(x).into_iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { vst1q_u16(to.add(n * OPERAND), operand) };
        products[n] = bfmmla(products[n], operand, vdupq_n_u16(0));
    }
}

/// Adds the products of two steps: eight elements of the keys of slab `g`.
///
/// # Safety
/// The operands of two steps of `P` pairs of rows are readable at `q`.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn add_keys<const P: usize, const G: usize>(
    q: *const u16,
    x: [uint16x8_t; SLAB_COLUMNS],
    g: usize,
    sums: &mut [[[float32x4_t; SLAB]; G]; P],
) {
    for (step, operands) in steps_of_keys(x).into_iter().enumerate() {
        for p in 0..P {
            // SAFETY: the caller's.
            let left = unsafe { vld1q_u16(q.add((step * P + p) * OPERAND)) };
            for n in 0..SLAB {
                sums[p][g][n] = bfmmla(sums[p][g][n], left, operands[n]);
            }
        }
    }
}

/// Whether no lane is NaN.
#[inline]
#[target_feature(enable = "neon")]
fn all_numbers(x: [float32x4_t; SLAB]) -> bool {
    let sum = vaddq_f32(vaddq_f32(x[0], x[1]), vaddq_f32(x[2], x[3]));
    vminvq_u32(vceqq_f32(sum, sum)) == u32::MAX
}

/// The `n < 8` elements that there are, and zeros.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_part(p: *const bf16, n: usize) -> uint16x8_t {
    // SAFETY: the caller's; the buffer holds more than a whole vector.
    unsafe { vld1q_u16(copy_part(p, n).as_ptr().cast()) }
}

/// Asks for the cache lines of a key or value, if it is one that will be read.
#[inline]
fn ask_for(row: *const bf16, dim: usize) {
    if row.is_null() {
        return;
    }
    for i in (0..dim).step_by(32) {
        // SAFETY: a prefetch never faults.
        unsafe {
            std::arch::asm!("prfm pldl2keep, [{p}]", p = in(reg) row.wrapping_add(i),
                options(readonly, nostack, preserves_flags));
        }
    }
}

/// Scores that are NaN, of keys that are seen, again: by one product after the other. See the module's text.
///
/// # Safety
/// The scores of the rows, of which `first` is the first, have been computed.
#[target_feature(enable = "neon,bf16")]
unsafe fn repair(block: &Block, rows: &[RowState], first: usize, k: KeyPointers<bf16>) {
    let Block { scratch, key_range, d, .. } = *block;
    for (r, row) in rows.iter().enumerate() {
        let scores = scratch.s.wrapping_add((first + r) * BLOCK);
        let mut numbers = vdupq_n_u32(u32::MAX);
        for i in (0..BLOCK).step_by(4) {
            // SAFETY: a row has BLOCK scores, of which those of keys that nobody sees are of no meaning.
            let x = unsafe { vld1q_f32(scores.add(i)) };
            numbers = vandq_u32(numbers, vceqq_f32(x, x));
        }
        if vminvq_u32(numbers) == u32::MAX {
            continue;
        }
        for j in (key_range.low..key_range.high).filter(|j| row.visible_bits >> j & 1 == 1) {
            // SAFETY: keys that are seen are in the key range; the row's query is as long as a key.
            unsafe {
                let score = &mut *scores.add(j);
                if score.is_nan() {
                    let (q, key) = (scratch.q.add((first + r) * padded(d)), k.key(0, j));
                    *score = (0..d).map(|i| *q.add(i) * (*key.add(i)).to_f32()).sum();
                }
            }
        }
    }
}

/// Adds the elements of values that are not finite, of the keys `special`, to the rows that see them.
///
/// # Safety
/// The outputs of the rows, of which `first` is the first, have just been computed, and their weights are still there.
#[cold]
unsafe fn add_special(block: &Block, rows: &[RowState], first: usize, special: u64, v: KeyPointers<bf16>) {
    let Block { scratch, key_range, dv, .. } = *block;
    for (r, row) in rows.iter().enumerate() {
        for j in (key_range.low..key_range.high).filter(|j| (row.visible_bits & special) >> j & 1 == 1) {
            let pair = scratch.acc.wrapping_add((first + r) / 2 * 2 * padded(dv) + r % 2 * 2);
            // SAFETY: the caller's; keys that are seen are in the key range.
            unsafe {
                let weight = *scratch.s.add((first + r) * BLOCK + j);
                let value = v.key(0, j);
                for i in 0..dv {
                    let element = *value.add(i);
                    if !element.is_finite() {
                        *pair.add(i / 2 * 4 + i % 2) += weight * element.to_f32();
                    }
                }
            }
        }
    }
}

const _: () = assert!(MAX_TILE_ROWS.is_multiple_of(2 * TILE_PAIRS) && MAX_HEAD_DIM.is_multiple_of(MAX_LANES));
