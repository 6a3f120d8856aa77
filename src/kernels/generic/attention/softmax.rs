//! Scores to softmax weights, in place.
//!
//! Bound by the arithmetic ports. In a plain call the scale is part of an FMA in the exponential: two passes of 2 and
//! 14 instructions per vector of scores.

use super::logits::row_logits;
use super::{Block, RowState};
use crate::kernels::generic::math;
use crate::kernels::simd::{MAX_LANES, Outlined, Simd};
use crate::problem::grid::{BLOCK, KeyRange, ones, padded};
use std::ops::Range;

/// From this magnitude on, the largest logit times log2(e) is rounded by half a unit or more, and the exact difference of an FMA
/// from it could be far from 0 for the largest logit itself: a weight of infinity, or of 0. There, products are rounded
/// before they are subtracted.
pub(crate) const ROUNDED_LOGITS: f32 = 8_388_608.0;

/// Replaces the scores of some query rows by their weights, for the keys of a key range. Updates each row's largest
/// logit, and rescales its sums and its accumulator when the largest logit grows. Outside the key range, whole vectors
/// may be overwritten.
pub(crate) struct Softmax<'a> {
    pub block: &'a Block<'a>,
    pub rows: &'a mut [RowState],
    /// The index of the first of the rows in the tile.
    pub first: usize,
    pub keys: KeyRange,
}

impl Outlined for Softmax<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { block, rows, first, keys } = self;
        let Block { p, scratch, dv, .. } = *block;
        let dvp = padded(dv);
        let vectors = keys.low / S::LANES * S::LANES..keys.high;
        let plain = p.plain_factor(p.scale);
        let factor = plain.unwrap_or(1.0);
        if const { S::FEW_REGISTERS } && keys.len() == 1 && plain.is_some() && block.all && rows[0].fresh {
            // SAFETY: as below.
            unsafe { one_key(s, block, rows, first, keys.low, factor) };
            return;
        }
        for (r, row) in rows.iter_mut().enumerate() {
            // SAFETY: the scratch parts have a row for every row of the tile; vectors stay inside a row of BLOCK.
            unsafe {
                let x = scratch.s.add((first + r) * BLOCK);
                if plain.is_none() {
                    row_logits(s, (p, block.tile.batch), (block.base, block.key_range), keys, row, x);
                }
                let scores = Scores { x, sums: scratch.sums.add((first + r) * MAX_LANES), factor };
                let acc = scratch.acc.add((first + r) * scratch.acc_row);
                if row.visible_bits == u64::MAX {
                    scores.weigh::<S, true>(s, row, 0..BLOCK, acc, dvp);
                } else {
                    scores.weigh::<S, false>(s, row, vectors.clone(), acc, dvp);
                }
            }
        }
    }
}

/// The weights of one key in fresh rows that see it, by a vector of rows at a time: what is done once per row would otherwise cost more than
/// the products of a call on one key.
///
/// # Safety
/// As of [`Softmax`], in a plain call.
#[inline(always)]
unsafe fn one_key<S: Simd>(s: S, block: &Block, rows: &mut [RowState], first: usize, key: usize, factor: f32) {
    let Block { scratch, dv, .. } = *block;
    let (factors, minus, limit) = (s.splat(factor), s.splat(-1.0), s.splat(ROUNDED_LOGITS));
    let lane = key % S::LANES;
    for (i, rows) in rows.chunks_mut(S::LANES).enumerate() {
        let first = first + i * S::LANES;
        // SAFETY: the caller's.
        unsafe {
            let (x, sums) = (scratch.s.add(first * BLOCK), scratch.sums.add(first * MAX_LANES));
            let mut floats = [0.0; MAX_LANES];
            for r in 0..rows.len() {
                floats[r] = *x.add(r * BLOCK + key);
            }
            let scores = s.load_f32(floats.as_ptr());
            let max = s.mul(scores, factors);
            if s.lt_bits(s.abs(max), limit) & ones(rows.len()) != ones(rows.len()) {
                // Some are large, infinite or NaN.
                let vector = key - lane..key + 1;
                for (r, row) in rows.iter_mut().enumerate() {
                    let scores = Scores { x: x.add(r * BLOCK), sums: sums.add(r * MAX_LANES), factor };
                    let acc = scratch.acc.add((first + r) * scratch.acc_row);
                    scores.weigh::<S, false>(s, row, vector.clone(), acc, padded(dv));
                }
                continue;
            }
            s.store_f32(floats.as_mut_ptr(), max);
            for (row, &max) in rows.iter_mut().zip(&floats) {
                row.max = max;
            }
            s.store_f32(floats.as_mut_ptr(), math::exp2(s, s.fma(scores, factors, s.mul(max, minus))));
            for r in 0..rows.len() {
                *x.add(r * BLOCK + key) = floats[r];
                *sums.add(r * MAX_LANES + lane) = floats[r];
            }
        }
    }
}

/// The scores of one row.
#[derive(Clone, Copy)]
struct Scores {
    x: *mut f32,
    sums: *mut f32,
    /// The factor from a score to its logit times log2(e).
    factor: f32,
}

impl Scores {
    /// With `ALL`, every key of the block is visible; without, those of `row.visible_bits` are.
    ///
    /// # Safety
    /// The pointers are the row's; `keys` are whole vectors.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const ALL: bool>(
        self,
        s: S,
        row: &mut RowState,
        keys: Range<usize>,
        acc: *mut f32,
        dvp: usize,
    ) {
        let Self { x, sums, factor } = self;
        let (factor, masked) = (s.splat(factor), s.splat(f32::NEG_INFINITY));
        // SAFETY: the caller's.
        unsafe {
            let mut max = masked;
            for i in keys.clone().step_by(S::LANES) {
                let v = s.load_f32(x.add(i));
                max = s.max(if ALL { v } else { s.select_bits(row.visible_bits >> i, v, masked) }, max);
            }
            // Rounding is monotonic: the largest product is the product of the largest.
            let max = s.mul(max, factor);
            if s.lt_bits(s.splat(row.max), max) != 0 {
                let block_max = s.max_lane(max);
                // An empty state has sums and an accumulator of 0, which need no scaling.
                if row.max > f32::NEG_INFINITY {
                    let shrink = s.splat(math::exp2_1(s, row.max - block_max));
                    s.store_f32(sums, s.mul(s.load_f32(sums), shrink));
                    for i in (0..dvp).step_by(S::LANES) {
                        s.store_f32(acc.add(i), s.mul(s.load_f32(acc.add(i)), shrink));
                    }
                }
                row.max = block_max;
            }
            // If all logits so far are -inf, -inf - -inf must not become NaN; a visible NaN stays one.
            let minus_max = s.splat(if row.max == f32::NEG_INFINITY { 0.0 } else { -row.max });
            let rounded = row.max.abs() >= ROUNDED_LOGITS;
            let visible_bits = row.visible_bits;
            // A loop of its own without the branch, where vectors are short.
            if const { S::FEW_REGISTERS } && !rounded {
                self.weights::<S, ALL>(s, visible_bits, keys, minus_max, false);
            } else {
                self.weights::<S, ALL>(s, visible_bits, keys, minus_max, rounded);
            }
        }
    }

    /// Scores to weights, which are added to the sums.
    ///
    /// # Safety
    /// As [`Self::weigh`].
    #[inline(always)]
    unsafe fn weights<S: Simd, const ALL: bool>(
        self,
        s: S,
        visible_bits: u64,
        keys: Range<usize>,
        minus_max: S::V,
        rounded: bool,
    ) {
        let Self { x, sums, factor } = self;
        let factor = s.splat(factor);
        // SAFETY: the caller's.
        unsafe {
            let mut sum = s.load_f32(sums);
            for i in keys.step_by(S::LANES) {
                let score = s.load_f32(x.add(i));
                let below =
                    if rounded { s.add(s.mul(score, factor), minus_max) } else { s.fma(score, factor, minus_max) };
                let w = math::exp2(s, below);
                let w = if ALL { w } else { s.select_bits(visible_bits >> i, w, s.zero()) };
                s.store_f32(x.add(i), w);
                sum = s.add(sum, w);
            }
            s.store_f32(sums, sum);
        }
    }
}
