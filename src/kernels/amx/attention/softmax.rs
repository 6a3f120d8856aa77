//! Logits of a row to weights, and the end of a chunk.
//!
//! Bound by two arithmetic ports: 12 instructions per vector of sixteen logits (one for the maximum; for the weight an FMA, a range
//! reduction, four FMAs and a scaling of two, a sum; half of a rounding and of the sums of rounded weights).

use super::super::tiles::{ROW_BYTES, TILE_BYTES};
use super::scratch::{Group, SCORES_ROW, SECOND_TERM, WEIGHTS};
use super::work::Job;
use super::{Call, DEPTH, LANES, output_order, round};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::state::{Output, is_empty};
use crate::kernels::generic::attention::{ROUNDED_LOGITS, row_lines};
use crate::kernels::generic::math::{EXP2_OF_FRACTION, EXP2_OF_FRACTION_HIGH, polynomial};
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::BLOCK;
use std::arch::x86_64::*;

/// Replaces the logits of group `g` of a job by packed weights. Updates the rows' states and rescales their accumulators.
///
/// # Safety
/// The job's logits are in place; `group` is group `g`.
#[inline(always)]
pub(super) unsafe fn softmax<const HIGH: bool>(s: Avx512, call: &Call, group: &mut Group, (job, g): (&Job, usize)) {
    let x = call.scratch.s.wrapping_add(call.slot(g) * call.cut.group_rows * SCORES_ROW);
    let w = call.scratch.p.wrapping_add(call.slot(g) * WEIGHTS);
    let factor = call.factor.unwrap_or(1.0);
    // SAFETY: the caller's; states are sixteen floats.
    unsafe {
        let new = s.max(s.mul(largest(s, group.rows, job, x), s.splat(factor)), s.load_f32(group.max.as_ptr()));
        rescale(s, call, group, g, new);
        // If all logits so far are -inf, -inf - -inf must not become NaN; a visible NaN stays one.
        let shift = s.select_lt(new, s.splat(f32::MIN), s.zero(), new);
        let rounded_logits = s.lt_bits(s.splat(ROUNDED_LOGITS.next_down()), s.abs(shift));
        let mut shifts = [0.0; LANES];
        s.store_f32(shifts.as_mut_ptr(), shift);
        for r in 0..group.rows {
            let (x, w) = (x.add(r * SCORES_ROW), w.add(r * ROW_BYTES as usize));
            let mut factor = s.splat(factor);
            if rounded_logits >> r & 1 == 1 {
                for &b in job.blocks() {
                    for i in (0..BLOCK).step_by(LANES) {
                        let x = x.add(b * BLOCK + i);
                        s.store_f32(x, s.mul(s.load_f32(x), factor));
                    }
                }
                factor = s.splat(1.0);
            }
            let sums = (&mut group.sums[r], &mut group.rounded[r]);
            weights::<HIGH>(s, job, (x, w), (factor, s.splat(shifts[r])), sums);
        }
    }
}

/// The largest logit of each row in a job's blocks, in its lane, without the factor; -inf in lanes without a row.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
unsafe fn largest(s: Avx512, rows: usize, job: &Job, x: *const f32) -> __m512 {
    let mut rows_max = [s.splat(f32::NEG_INFINITY); MAX_LANES];
    for (r, row) in rows_max[..rows].iter_mut().enumerate() {
        // Independent maxima, to hide latency.
        let mut max = [*row; 2];
        for &b in job.blocks() {
            for i in 0..BLOCK / LANES {
                // SAFETY: the caller's. A NaN in the first operand leaves the second.
                let logits = unsafe { s.load_f32(x.add(r * SCORES_ROW + b * BLOCK + i * LANES)) };
                max[i % 2] = s.max(logits, max[i % 2]);
            }
        }
        *row = s.max(max[0], max[1]);
    }
    s.transpose(&mut rows_max);
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            rows_max[i] = s.max(rows_max[i], rows_max[i + n]);
        }
        n /= 2;
    }
    rows_max[0]
}

/// Makes `new` the largest logits of group `g`: rescales sums and accumulators of the rows whose largest logit grows.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
unsafe fn rescale(s: Avx512, call: &Call, group: &mut Group, g: usize, new: __m512) {
    // SAFETY: the caller's.
    unsafe {
        let old = s.load_f32(group.max.as_ptr());
        let grown = s.lt_bits(old, new);
        if grown == 0 {
            return;
        }
        let mut scales = [0.0; LANES];
        s.store_f32(scales.as_mut_ptr(), exp2::<true>(s, s.sub(old, new)));
        s.store_f32(group.max.as_mut_ptr(), new);
        // An empty state has sums and an accumulator of 0, which need no scaling.
        let grown = grown & s.lt_bits(s.splat(f32::NEG_INFINITY), old);
        for r in 0..group.rows {
            if grown >> r & 1 == 0 {
                continue;
            }
            let scale = s.splat(scales[r]);
            let acc = call.scratch.acc.add((g * call.sizes.tiles() * LANES + r) * LANES);
            let sums = [group.sums[r].as_mut_ptr(), group.rounded[r].as_mut_ptr()];
            for tile in 0..call.sizes.tiles() {
                let acc = acc.add(tile * LANES * LANES);
                s.store_f32(acc, s.mul(s.load_f32(acc), scale));
            }
            for sums in sums {
                s.store_f32(sums, s.mul(s.load_f32(sums), scale));
            }
        }
    }
}

/// Replaces a row's logits at `x` by weights at `w`, and adds them to the sums, exact and rounded.
///
/// # Safety
/// As [`softmax`].
#[inline(always)]
unsafe fn weights<const HIGH: bool>(
    s: Avx512,
    job: &Job,
    (x, w): (*const f32, *mut u8),
    (factor, shift): (__m512, __m512),
    (sum, rounded): (&mut [f32; LANES], &mut [f32; LANES]),
) {
    let (mut sums, mut rounds) = ([s.zero(); 2], [s.zero(); 2]);
    // SAFETY: the caller's.
    unsafe {
        for &b in job.blocks() {
            for half in 0..BLOCK / DEPTH {
                let mut weights = [s.zero(); 2];
                for (i, weight) in weights.iter_mut().enumerate() {
                    let v = s.load_f32(x.add(b * BLOCK + half * DEPTH + i * LANES));
                    *weight = exp2::<HIGH>(s, _mm512_fmsub_ps(v, factor, shift));
                    sums[i] = s.add(sums[i], *weight);
                }
                let to = w.add((b * BLOCK / DEPTH + half) * TILE_BYTES);
                let first = round(s, weights[0], weights[1]);
                _mm512_storeu_si512(to.cast(), first);
                if HIGH {
                    let halves = [_mm512_castsi512_si256(first), _mm512_extracti64x4_epi64::<1>(first)];
                    for (weight, half) in weights.iter_mut().zip(halves) {
                        let upper = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half));
                        *weight = s.sub(*weight, _mm512_castsi512_ps(upper));
                    }
                    _mm512_storeu_si512(to.add(SECOND_TERM).cast(), round(s, weights[0], weights[1]));
                } else {
                    let even = _mm512_slli_epi32::<16>(first);
                    let odd = _mm512_and_si512(first, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                    for (sum, part) in rounds.iter_mut().zip([even, odd]) {
                        *sum = s.add(*sum, _mm512_castsi512_ps(part));
                    }
                }
            }
        }
        let exact = s.add(s.load_f32(sum.as_ptr()), s.add(sums[0], sums[1]));
        s.store_f32(sum.as_mut_ptr(), exact);
        let rounds = s.add(s.load_f32(rounded.as_ptr()), s.add(rounds[0], rounds[1]));
        s.store_f32(rounded.as_mut_ptr(), if HIGH { exact } else { rounds });
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

/// Ends a chunk for the rows of group `g`: puts the elements of their outputs in order, and passes them on with their states. The
/// outputs are multiplied by the ratio of the sums before and after rounding, so that the exact sum is the one to
/// divide by.
///
/// # Safety
/// As [`walk`](super::walk); `group` is group `g`.
#[inline(always)]
pub(super) unsafe fn end_chunk(
    s: Avx512,
    call: &Call,
    (g, group): (usize, &mut Group),
    chunk: usize,
    ahead: &mut impl Iterator<Item = (usize, usize)>,
) {
    let Call { p, tile, sizes, natural, .. } = *call;
    let (tiles, stage, last) = (sizes.tiles(), call.scratch.stage, chunk + 1 == tile.end_chunk);
    for r in 0..group.rows {
        if last && let Some((token, head)) = ahead.next() {
            let (batch, token) = p.visibility.query(tile.batch, token);
            // SAFETY: the tile's rows are inside out.
            row_lines(p.out, unsafe { p.out.row(batch, token, head) }).for_each(|line| s.prefetch_write(line));
        }
        // SAFETY: the caller's; acc, stage and total have the sizes of their layout.
        unsafe {
            let sum = _mm512_reduce_add_ps(s.load_f32(group.sums[r].as_ptr()));
            let (state, row) = ((group.max[r], sum), &mut group.states[r]);
            if !is_empty(state) {
                let ratio = s.splat(sum / _mm512_reduce_add_ps(s.load_f32(group.rounded[r].as_ptr())));
                let acc = call.scratch.acc.add((g * tiles * LANES + r) * LANES);
                for i in (0..tiles).step_by(2) {
                    let at = acc.add(i * LANES * LANES);
                    let mut x = [s.mul(s.load_f32(at), ratio), s.mul(s.load_f32(at.add(LANES * LANES)), ratio)];
                    if !natural {
                        x = output_order(s, x);
                    }
                    s.store_f32(stage.add(i * LANES), x[0]);
                    s.store_f32(stage.add((i + 1) * LANES), x[1]);
                }
            }
            let index = g * call.cut.group_rows + r;
            let total = call.scratch.total.add(index * sizes.dvp);
            let (token, head) = (row.token as usize, row.head as usize);
            let output = Output { p, batch: tile.batch, token, head, deinterleaved: false };
            output.end_chunk(s, tile, (chunk, index, last), (state, stage), (&mut row.total, total));
        }
    }
}
