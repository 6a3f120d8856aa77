//! Scores to softmax weights, in place.
//!
//! Bound by the arithmetic ports. In a plain call the scale is part of an FMA in the exponential: two passes of 2 and
//! 13 instructions per vector of scores.

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
            // SAFETY: the scratch parts have a row for every row of the tile; vectors stay inside a row of BLOCK.
            unsafe {
                let scores = scratch.s.add(first * BLOCK);
                let sums = scratch.sums.add(first * MAX_LANES);
                let mut largest = [s.splat(f32::NEG_INFINITY); MAX_LANES];
                for (r, row) in rows.iter_mut().enumerate() {
                    let x = scores.add(r * BLOCK);
                    if plain.is_none() {
                        row_logits(s, block, row, x, row.scored());
                    }
                    largest[r] = if row.visible_bits == u64::MAX {
                        largest_score::<S, true>(s, row, x)
                    } else {
                        largest_score::<S, false>(s, row, x)
                    };
                }
                grow(s, rows, &largest, factor, sums, (scratch.acc.add(first * dvp), dvp));
                for (r, row) in rows.iter().enumerate() {
                    let (x, sums) = (scores.add(r * BLOCK), sums.add(r * MAX_LANES));
                    if row.visible_bits == u64::MAX {
                        weigh::<S, true>(s, row, x, factor, sums);
                    } else {
                        weigh::<S, false>(s, row, x, factor, sums);
                    }
                }
            }
        }
    }
}

/// The first keys of a row's vectors of scores.
#[inline(always)]
fn vectors<S: Simd, const ALL: bool>(row: &RowState) -> StepBy<Range<usize>> {
    let keys = row.scored();
    let keys = if ALL { 0..BLOCK } else { keys.low / S::LANES * S::LANES..keys.high };
    keys.step_by(S::LANES)
}

/// The largest visible score, lane by lane. With `ALL`, every key of the block is visible; without, those of `row.visible_bits` are.
///
/// # Safety
/// `x` has the row's [`BLOCK`] scores.
#[inline(always)]
unsafe fn largest_score<S: Simd, const ALL: bool>(s: S, row: &RowState, x: *const f32) -> S::V {
    let masked = s.splat(f32::NEG_INFINITY);
    let mut max = masked;
    for i in vectors::<S, ALL>(row) {
        // SAFETY: the caller's.
        let v = unsafe { s.load_f32(x.add(i)) };
        max = s.max(if ALL { v } else { s.select_bits(row.visible_bits >> i, v, masked) }, max);
    }
    max
}

/// Makes the largest logits of at most `LANES` rows those of what they have seen and of this block, whose largest scores are given lane
/// by lane. Rescales sums, and accumulators of so many floats, of the rows whose largest logit grows.
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
    let mut before = [f32::NEG_INFINITY; MAX_LANES];
    before.iter_mut().zip(&*rows).for_each(|(before, row)| *before = row.max);
    // Rounding is monotonic: the largest product is the product of the largest.
    let mut now = [f32::NEG_INFINITY; MAX_LANES];
    // SAFETY: the caller's.
    unsafe {
        if 2 * rows.len() > S::LANES {
            s.store_f32(now.as_mut_ptr(), s.mul(s.max_lanes(largest), factor));
        } else {
            for (r, largest) in largest.iter().enumerate().take(rows.len()) {
                let largest = s.mul(*largest, factor);
                if s.lt_bits(s.splat(before[r]), largest) != 0 {
                    now[r] = s.max_lane(largest);
                }
            }
        }
        let (old, new) = (s.load_f32(before.as_ptr()), s.load_f32(now.as_ptr()));
        let mut grown = s.lt_bits(old, new);
        if grown == 0 {
            return;
        }
        let mut shrink = [0.0; MAX_LANES];
        s.store_f32(shrink.as_mut_ptr(), math::exp2(s, s.sub(old, new)));
        while grown != 0 {
            let r = grown.trailing_zeros() as usize;
            grown &= grown - 1;
            // An empty state has sums and an accumulator of 0, which need no scaling.
            if before[r] > f32::NEG_INFINITY {
                let (shrink, sums, acc) = (s.splat(shrink[r]), sums.add(r * MAX_LANES), acc.add(r * floats));
                s.store_f32(sums, s.mul(s.load_f32(sums), shrink));
                for i in (0..floats).step_by(S::LANES) {
                    s.store_f32(acc.add(i), s.mul(s.load_f32(acc.add(i)), shrink));
                }
            }
            rows[r].max = now[r];
        }
    }
}

/// Replaces a row's scores by weights, and adds them to its sums; `factor` is that from a score to its logit times log2(e).
///
/// # Safety
/// As [`largest_score`]; `sums` are the row's.
#[inline(always)]
unsafe fn weigh<S: Simd, const ALL: bool>(s: S, row: &RowState, x: *mut f32, factor: S::V, sums: *mut f32) {
    // If all logits so far are -inf, -inf - -inf must not become NaN; a visible NaN stays one.
    let minus_max = s.splat(if row.max == f32::NEG_INFINITY { 0.0 } else { -row.max });
    if row.max.abs() < ROUNDED_LOGITS {
        // SAFETY: the caller's.
        unsafe { add_weights::<S, ALL>(s, row, x, sums, |score| s.fma(score, factor, minus_max)) };
    } else {
        // SAFETY: the caller's.
        unsafe { add_weights::<S, ALL>(s, row, x, sums, |score| s.add(s.mul(score, factor), minus_max)) };
    }
}

/// The loop of [`weigh`]; `exponent` is that of a score's weight, a power of two.
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
