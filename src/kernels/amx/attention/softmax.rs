//! Logits of a group to weights, and the end of a chunk.
//!
//! Bound by two arithmetic ports: 15 instructions per vector of sixteen logits (one for the maximum; for the weight an
//! FMA, a range reduction, four FMAs, a scaling of two, two sums, and 3.5 for rounding and packing). Tile products of
//! other jobs run in between.

use super::scratch::{Group, SECOND_TERM, Sizes, WEIGHTS};
use super::work::{Job, Work};
use super::{Call, LANES, SUPERBLOCK_KEYS, join_pair, output};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::ROUNDED_LOGITS;
use crate::kernels::generic::attention::state::is_empty;
use crate::kernels::generic::math::{EXP2_OF_FRACTION, EXP2_OF_FRACTION_HIGH, polynomial};
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::BLOCK;
use std::arch::x86_64::*;

/// Replaces the logits of group `i` of a job by packed weights, with one step of `work` per `every` pairs of vectors.
/// Updates the rows' states and rescales their accumulator.
///
/// # Safety
/// The job's logits are in place; `group` is group `i` of the job; `work` is of other jobs and fulfils [`Work::step`].
#[inline(always)]
pub(super) unsafe fn softmax<const HIGH: bool>(
    s: Avx512,
    call: &Call,
    group: &mut Group,
    job: Job,
    i: usize,
    work: &mut Work,
    every: usize,
) {
    let blocks = job.blocks();
    let x = call.scratch.s.wrapping_add(job.slot(i) * SUPERBLOCK_KEYS * LANES);
    let w = call.scratch.p.wrapping_add(job.slot(i) * WEIGHTS);
    let acc = call.scratch.acc.wrapping_add((job.first + i) * call.sizes.dvp * LANES);
    let mut countdown = every;
    let lowest = s.splat(f32::NEG_INFINITY);
    let factor = s.splat(call.factor.unwrap_or(1.0));
    // SAFETY: the caller's; states are sixteen floats.
    unsafe {
        // Four independent maxima, to hide latency.
        let mut max = [lowest; 4];
        for &b in blocks {
            for j in (0..BLOCK).step_by(4) {
                for (i, max) in max.iter_mut().enumerate() {
                    *max = s.max(s.load_f32(x.add((b * BLOCK + j + i) * LANES)), *max);
                }
            }
        }
        let max = s.max(s.max(max[0], max[1]), s.max(max[2], max[3]));
        let old = s.load_f32(group.max.as_ptr());
        let new = s.max(s.mul(max, factor), old);
        let grown = s.lt_bits(old, new);
        let (mut sum, mut rounded) = (s.load_f32(group.sum.as_ptr()), s.load_f32(group.rounded.as_ptr()));
        if grown != 0 {
            let scale = s.select_bits(grown, exp2::<true>(s, s.sub(old, new)), s.splat(1.0));
            (sum, rounded) = (s.mul(sum, scale), s.mul(rounded, scale));
            // An empty state has an accumulator of 0, which needs no scaling.
            if grown & s.lt_bits(lowest, old) != 0 {
                for i in 0..call.sizes.dvp {
                    let acc = acc.add(i * LANES);
                    s.store_f32(acc, s.mul(s.load_f32(acc), scale));
                }
            }
            s.store_f32(group.max.as_mut_ptr(), new);
        }
        // If all logits so far are -inf, -inf - -inf must not become NaN; a visible NaN stays one.
        let shift = s.select_lt(new, s.splat(f32::MIN), s.zero(), new);
        let rounded_logits = s.lt_bits(s.splat(ROUNDED_LOGITS.next_down()), s.abs(shift));
        let (mut sums, mut rounds) = ([s.zero(); 2], [s.zero(); 2]);
        for &b in blocks {
            for pair in 0..BLOCK / 2 {
                let (mut first, mut second) = ([_mm512_setzero_si512(); 2], [_mm512_setzero_si512(); 2]);
                for i in 0..2 {
                    let v = s.load_f32(x.add((b * BLOCK + 2 * pair + i) * LANES));
                    let mut below = _mm512_fmsub_ps(v, factor, shift);
                    if rounded_logits != 0 {
                        below = s.select_bits(rounded_logits, s.sub(s.mul(v, factor), shift), below);
                    }
                    let weight = exp2::<HIGH>(s, below);
                    sums[i] = s.add(sums[i], weight);
                    first[i] = round(s, weight);
                    let upper = _mm512_castsi512_ps(first[i]);
                    if HIGH {
                        second[i] = round(s, s.sub(weight, upper));
                    } else {
                        rounds[i] = s.add(rounds[i], upper);
                    }
                }
                let to = w.add((b * BLOCK / 2 + pair) * LANES);
                _mm512_storeu_si512(to.cast(), join_pair(s, first[0], first[1]));
                if HIGH {
                    _mm512_storeu_si512(to.add(SECOND_TERM).cast(), join_pair(s, second[0], second[1]));
                }
                countdown -= 1;
                if countdown == 0 {
                    work.step::<HIGH>();
                    countdown = every;
                }
            }
        }
        sum = s.add(sum, s.add(sums[0], sums[1]));
        rounded = if HIGH { sum } else { s.add(rounded, s.add(rounds[0], rounds[1])) };
        s.store_f32(group.sum.as_mut_ptr(), sum);
        s.store_f32(group.rounded.as_mut_ptr(), rounded);
    }
}

/// The nearest bf16, in the upper half; ties go away from zero, which meets the error bound as well. Only for finite
/// numbers and NaN whose row is NaN already.
#[inline(always)]
fn round(_: Avx512, x: __m512) -> __m512i {
    // SAFETY: the argument proves the features.
    unsafe {
        let up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
        _mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000_u32 as i32))
    }
}

/// 2^x with an error of 3e-6, or 9e-8 with `HIGH`; 1 for 0, 0 for -inf, NaN for NaN. `vreduceps` and `vscalefps` split
/// off the floor and put it back, where [`exp2`](crate::kernels::generic::math::exp2) has to use arithmetic and clamps.
#[inline(always)]
fn exp2<const HIGH: bool>(s: Avx512, x: __m512) -> __m512 {
    const TO_FLOOR: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    // SAFETY: the argument proves the features.
    unsafe {
        let fraction = _mm512_reduce_ps::<TO_FLOOR>(x);
        let power = if HIGH {
            polynomial(s, fraction, EXP2_OF_FRACTION_HIGH)
        } else {
            polynomial(s, fraction, EXP2_OF_FRACTION)
        };
        _mm512_scalef_ps(power, x)
    }
}

/// Ends a chunk for the rows of group `g`: transposes their outputs back, and passes them on with their states. The
/// outputs are multiplied by the ratio of the sums before and after rounding, so that the exact sum is the one to
/// divide by.
///
/// # Safety
/// As [`walk`](super::walk); `group` is group `g`.
#[inline(always)]
pub(super) unsafe fn end_chunk(s: Avx512, call: &Call, g: usize, group: &mut Group, chunk: usize) {
    let Call { tile, sizes: Sizes { dvp, .. }, .. } = *call;
    let states: [_; LANES] = std::array::from_fn(|r| (group.max[r], group.sum[r]));
    let last = chunk + 1 == tile.end_chunk;
    // SAFETY: the caller's; acc, stage and total have the sizes of their layout.
    unsafe {
        if !states[..group.rows].iter().all(|&state| is_empty(state)) {
            let ratio = s.div(s.load_f32(group.sum.as_ptr()), s.load_f32(group.rounded.as_ptr()));
            for i in (0..dvp).step_by(LANES) {
                let mut x = [s.zero(); MAX_LANES];
                for (k, x) in x.iter_mut().enumerate() {
                    *x = s.mul(s.load_f32(call.scratch.acc.add((g * dvp + i + k) * LANES)), ratio);
                }
                s.transpose(&mut x);
                for (r, x) in x.iter().enumerate() {
                    s.store_f32(call.scratch.stage.add(r * dvp + i), *x);
                }
            }
        }
        for r in 0..group.rows {
            let row = g * LANES + r;
            let (acc, total) = (call.scratch.stage.add(r * dvp), call.scratch.total.add(row * dvp));
            let output = output(call, group, r);
            output.end_chunk(s, tile, (chunk, row, last), (states[r], acc), (&mut group.total[r], total));
        }
    }
}
