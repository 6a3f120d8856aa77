//! Scores to weights, in place.

use super::state::load_row;
use super::{Block, RowState};
use crate::kernels::generic::math;
use crate::kernels::simd::{MAX_LANES, Outlined, Simd};
use crate::problem::grid::{BLOCK, KeyRange, padded};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Weights of some rows, from their scores with the keys of a key range. Updates each row's largest logit, and rescales its sums
/// and its accumulator when that grows. Beyond the key range, whole vectors of scores may be overwritten.
///
/// Where scale is the only thing between score and logit, the two are one FMA inside the exponential: two passes of 2 and 13
/// instructions a vector of scores.
pub(crate) struct Softmax<'a> {
    pub block: &'a Block<'a>,
    pub rows: &'a mut [RowState],
    /// Number of the first of the rows in the tile.
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
        let factor = p.scale * LOG2_E;
        let plain = p.softcap == 0.0 && p.alibi.is_none() && p.bias.is_none() && factor > 0.0 && factor.is_finite();
        let factor = if plain { factor } else { 1.0 };
        for (r, row) in rows.iter_mut().enumerate() {
            // SAFETY: the scratch parts have a row for every row of the tile; vectors stay inside a row of BLOCK.
            unsafe {
                let x = scratch.s.add((first + r) * BLOCK);
                if !plain {
                    logits(s, block, row, x, keys);
                }
                let scores = Scores { x, sums: scratch.sums.add((first + r) * MAX_LANES), factor };
                let acc = scratch.acc.add((first + r) * dvp);
                if row.visible_bits == u64::MAX {
                    scores.weigh::<S, true>(s, row, 0..BLOCK, acc, dvp);
                } else {
                    scores.weigh::<S, false>(s, row, vectors.clone(), acc, dvp);
                }
            }
        }
    }
}

/// The scores of one row.
struct Scores {
    x: *mut f32,
    sums: *mut f32,
    /// From score to logit times log2(e).
    factor: f32,
}

impl Scores {
    /// `ALL`: every score of a block counts, else those whose bit in `row.visible_bits` is set.
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
        let (factor, hidden) = (s.splat(factor), s.splat(f32::NEG_INFINITY));
        // SAFETY: the caller's.
        unsafe {
            let mut max = hidden;
            for i in keys.clone().step_by(S::LANES) {
                let v = s.load_f32(x.add(i));
                max = s.max(if ALL { v } else { s.select_bits(row.visible_bits >> i, v, hidden) }, max);
            }
            // Rounding is monotonic: the largest product is the product of the largest.
            let max = s.mul(max, factor);
            if s.lt_bits(s.splat(row.max), max) != 0 {
                let block_max = s.max_lane(max);
                // A state that has seen nothing has sums and an accumulator of 0: nothing to scale.
                if row.max > f32::NEG_INFINITY {
                    let shrink = s.splat(math::exp2_1(s, row.max - block_max));
                    s.store_f32(sums, s.mul(s.load_f32(sums), shrink));
                    for i in (0..dvp).step_by(S::LANES) {
                        s.store_f32(acc.add(i), s.mul(s.load_f32(acc.add(i)), shrink));
                    }
                }
                row.max = block_max;
            }
            // With nothing but -inf so far, -inf - -inf must not become NaN; a live NaN stays one.
            let minus_max = s.splat(if row.max == f32::NEG_INFINITY { 0.0 } else { -row.max });
            let mut sum = s.load_f32(sums);
            for i in keys.step_by(S::LANES) {
                let w = math::exp2(s, s.fma(s.load_f32(x.add(i)), factor, minus_max));
                let w = if ALL { w } else { s.select_bits(row.visible_bits >> i, w, s.zero()) };
                s.store_f32(x.add(i), w);
                sum = s.add(sum, w);
            }
            s.store_f32(sums, sum);
        }
    }
}

/// Scores to logits times log2(e), in place; takes the keys that the bias hides out of `row.visible_bits`.
///
/// # Safety
/// As [`Softmax`]; `x` is the row's.
#[inline(always)]
unsafe fn logits<S: Simd>(s: S, block: &Block, row: &mut RowState, x: *mut f32, keys: KeyRange) {
    let Block { p, tile, base, key_range, .. } = *block;
    let mut bias_row = [0.0f32; BLOCK];
    if let Some(bias) = &p.bias {
        // SAFETY: the bias is as wide as K, and the key range is inside K.
        unsafe {
            let at = bias.row(tile.batch, row.token as usize, row.head as usize);
            let first = (base + key_range.low) as isize * bias.strides[3] as isize * bias.dtype.size() as isize;
            let to = bias_row.as_mut_ptr().add(key_range.low);
            load_row(s, bias.dtype, at.offset(first), bias.strides[3], to, key_range.len());
        }
    }
    let own_keys = p.alibi.and_then(|_| p.visibility.own_keys(tile.batch));
    for i in (keys.low / S::LANES * S::LANES..keys.high).step_by(S::LANES) {
        // SAFETY: i + LANES <= BLOCK.
        unsafe {
            let mut v = s.mul(s.load_f32(x.add(i)), s.splat(p.scale));
            if p.softcap != 0.0 {
                v = s.mul(math::tanh(s, s.mul(v, s.splat(1.0 / p.softcap))), s.splat(p.softcap));
            }
            if let Some(slopes) = p.alibi {
                let distance = match own_keys {
                    None => {
                        let distance = (base + i) as i64 - row.position;
                        s.add(s.load_f32(IOTA.as_ptr()), s.splat(distance as f32))
                    }
                    Some(own_keys) => {
                        let key = |lane: usize| own_keys.position((base + i + lane) as i64);
                        let distances: [f32; MAX_LANES] = std::array::from_fn(|lane| (key(lane) - row.position) as f32);
                        s.load_f32(distances.as_ptr())
                    }
                };
                v = s.fma(s.splat(slopes[row.head as usize]), distance, v);
            }
            if p.bias.is_some() {
                let b = s.load_f32(bias_row.as_ptr().add(i));
                v = s.add(v, b);
                row.visible_bits &= !(s.lt_bits(b, s.splat(f32::MIN)) << i);
            }
            s.store_f32(x.add(i), s.mul(v, s.splat(LOG2_E)));
        }
    }
}

/// 0, 1, 2, ...: distances of the lanes.
static IOTA: [f32; MAX_LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
