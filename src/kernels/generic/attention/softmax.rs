//! Scores to softmax weights, in place.
//!
//! Bound by the arithmetic ports. In a plain call the scale is part of an FMA in the exponential: two passes of 2 and
//! 13 instructions per vector of scores. The largest logits of up to a vector of rows are found, compared and turned into factors
//! together.

use super::logits::row_logits;
use super::{Block, RowState};
use crate::kernels::generic::math;
use crate::kernels::simd::{MAX_LANES, Outlined, Simd};
use crate::problem::grid::{BLOCK, padded};
use std::iter::StepBy;
use std::ops::Range;

/// From this magnitude on, the largest logit times log2(e) is rounded by half a unit or more, and the exact difference of an FMA
/// from it could be far from 0 for the largest logit itself: a weight of infinity, or of 0. There, products are rounded
/// before they are subtracted.
pub(crate) const ROUNDED_LOGITS: f32 = 8_388_608.0;

/// Replaces the scores of some query rows by their weights, for the keys of each row that have scores ([`RowState::scored`]).
/// Updates each row's largest logit, and rescales its sums and its accumulator when the largest logit grows. Outside these keys, whole
/// vectors may be overwritten.
pub(crate) struct Softmax<'a> {
    pub block: &'a Block<'a>,
    pub rows: &'a mut [RowState],
    /// The index of the first of the rows in the tile.
    pub first: usize,
}

impl Outlined for Softmax<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { block, rows, first } = self;
        let Block { p, scratch, dv, .. } = *block;
        let dvp = padded(dv);
        let plain = p.plain_factor(p.scale);
        let factor = s.splat(plain.unwrap_or(1.0));
        for (i, rows) in rows.chunks_mut(S::LANES).enumerate() {
            let first = first + i * S::LANES;
            let together = 2 * rows.len() > S::LANES;
            // SAFETY: the scratch parts have a row for every row of the tile; vectors stay inside a row of BLOCK.
            unsafe {
                let scores = scratch.s.add(first * BLOCK);
                let sums = scratch.sums.add(first * MAX_LANES);
                let acc = scratch.acc.add(first * dvp);
                let mut largest = [s.splat(f32::NEG_INFINITY); MAX_LANES];
                for (r, row) in rows.iter_mut().enumerate() {
                    let (x, sums) = (scores.add(r * BLOCK), sums.add(r * MAX_LANES));
                    if plain.is_none() {
                        row_logits(s, block, row, x, row.scored());
                    }
                    let max = largest_score(s, row, x);
                    if together {
                        largest[r] = max;
                        continue;
                    }
                    let max = s.mul(max, factor);
                    if s.lt_bits(s.splat(row.max), max) != 0 {
                        let max = s.max_lane(max);
                        set_max(s, row, max, math::exp2_1(s, row.max - max), sums, (acc.add(r * dvp), dvp));
                    }
                    weigh(s, row, x, factor, sums);
                }
                if together {
                    grow(s, rows, &largest, factor, sums, (acc, dvp));
                    for (r, row) in rows.iter().enumerate() {
                        weigh(s, row, scores.add(r * BLOCK), factor, sums.add(r * MAX_LANES));
                    }
                }
            }
        }
    }
}

/// The first keys of a row's vectors of scores. With `ALL`, every key of the block is visible.
#[inline(always)]
fn vectors<S: Simd, const ALL: bool>(row: &RowState) -> StepBy<Range<usize>> {
    let keys = row.scored();
    let keys = if ALL { 0..BLOCK } else { keys.low / S::LANES * S::LANES..keys.high };
    keys.step_by(S::LANES)
}

/// The largest visible score, lane by lane.
///
/// # Safety
/// `x` has the row's [`BLOCK`] scores.
#[inline(always)]
unsafe fn largest_score<S: Simd>(s: S, row: &RowState, x: *const f32) -> S::V {
    let masked = s.splat(f32::NEG_INFINITY);
    let mut max = masked;
    // SAFETY: the caller's.
    unsafe {
        if row.visible_bits == u64::MAX {
            for i in vectors::<S, true>(row) {
                max = s.max(s.load_f32(x.add(i)), max);
            }
        } else {
            for i in vectors::<S, false>(row) {
                max = s.max(s.select_bits(row.visible_bits >> i, s.load_f32(x.add(i)), masked), max);
            }
        }
    }
    max
}

/// Makes the largest logits of at most `LANES` rows those of what they have seen and of this block, whose largest scores are given lane
/// by lane. Rescales the sums and the accumulators, of so many floats, of the rows whose largest logit grows.
///
/// # Safety
/// The pointers are valid for all rows.
#[inline(always)]
unsafe fn grow<S: Simd>(
    s: S,
    rows: &mut [RowState],
    largest: &[S::V; MAX_LANES],
    factor: S::V,
    sums: *mut f32,
    (acc, floats): (*mut f32, usize),
) {
    let (mut before, mut now, mut shrink) = ([f32::NEG_INFINITY; MAX_LANES], [0.0; MAX_LANES], [0.0; MAX_LANES]);
    before.iter_mut().zip(&*rows).for_each(|(before, row)| *before = row.max);
    // SAFETY: the caller's.
    unsafe {
        let old = s.load_f32(before.as_ptr());
        // Rounding is monotonic: the largest product is the product of the largest.
        let new = s.mul(s.max_lanes(largest), factor);
        let mut grown = s.lt_bits(old, new);
        if grown == 0 {
            return;
        }
        s.store_f32(now.as_mut_ptr(), new);
        s.store_f32(shrink.as_mut_ptr(), math::exp2(s, s.sub(old, new)));
        while grown != 0 {
            let r = grown.trailing_zeros() as usize;
            grown &= grown - 1;
            set_max(s, &mut rows[r], now[r], shrink[r], sums.add(r * MAX_LANES), (acc.add(r * floats), floats));
        }
    }
}

/// Sets a row's largest logit, and multiplies its sums and its accumulator, of so many floats, by `shrink`.
///
/// # Safety
/// The pointers are the row's.
#[inline(always)]
unsafe fn set_max<S: Simd>(
    s: S,
    row: &mut RowState,
    max: f32,
    shrink: f32,
    sums: *mut f32,
    (acc, floats): (*mut f32, usize),
) {
    // An empty state has sums and an accumulator of 0, which need no scaling.
    if row.max > f32::NEG_INFINITY {
        let shrink = s.splat(shrink);
        // SAFETY: the caller's.
        unsafe {
            s.store_f32(sums, s.mul(s.load_f32(sums), shrink));
            for i in (0..floats).step_by(S::LANES) {
                s.store_f32(acc.add(i), s.mul(s.load_f32(acc.add(i)), shrink));
            }
        }
    }
    row.max = max;
}

/// Replaces a row's scores by weights, and adds them to its sums; `factor` is that from a score to its logit times log2(e).
///
/// # Safety
/// As [`largest_score`]; `sums` are the row's.
#[inline(always)]
unsafe fn weigh<S: Simd>(s: S, row: &RowState, x: *mut f32, factor: S::V, sums: *mut f32) {
    // If all logits so far are -inf, -inf - -inf must not become NaN; a visible NaN stays one.
    let minus_max = s.splat(if row.max == f32::NEG_INFINITY { 0.0 } else { -row.max });
    let all = row.visible_bits == u64::MAX;
    // SAFETY: the caller's.
    unsafe {
        if row.max.abs() < ROUNDED_LOGITS {
            let exponent = |score| s.fma(score, factor, minus_max);
            if all {
                add_weights::<S, true>(s, row, x, sums, exponent);
            } else {
                add_weights::<S, false>(s, row, x, sums, exponent);
            }
        } else {
            let exponent = |score| s.add(s.mul(score, factor), minus_max);
            add_weights::<S, false>(s, row, x, sums, exponent);
        }
    }
}

/// The loop of [`weigh`]; `exponent` is that of a score's weight, a power of two. With `ALL`, every key of the block is visible.
///
/// # Safety
/// As [`weigh`].
#[inline(always)]
unsafe fn add_weights<S: Simd, const ALL: bool>(
    s: S,
    row: &RowState,
    x: *mut f32,
    sums: *mut f32,
    exponent: impl Fn(S::V) -> S::V,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sum = s.load_f32(sums);
        for i in vectors::<S, ALL>(row) {
            let w = math::exp2(s, exponent(s.load_f32(x.add(i))));
            let w = if ALL { w } else { s.select_bits(row.visible_bits >> i, w, s.zero()) };
            s.store_f32(x.add(i), w);
            sum = s.add(sum, w);
        }
        s.store_f32(sums, sum);
    }
}
