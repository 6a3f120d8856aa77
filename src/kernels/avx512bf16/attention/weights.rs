//! Softmax weights as bf16, and the end of a chunk.

use super::{BLOCK, DotProducts, LANES, LINE, level_functions, with_features};
use crate::kernels::avx512::Avx512;
use crate::kernels::avx512bf16::instructions::{dot, round};
use crate::kernels::generic::attention::state::is_empty;
use crate::kernels::generic::attention::{Block, RowState, Scratch};
use crate::kernels::generic::math;
use crate::kernels::simd::{MAX_LANES, Simd};
use half::bf16;
use std::arch::x86_64::*;

impl DotProducts {
    /// Clears the sums of rounded weights.
    ///
    /// # Safety
    /// The tile has as many rows.
    pub(super) unsafe fn clear_sums(&self, rows: usize) {
        // SAFETY: the caller's.
        unsafe { std::ptr::write_bytes(self.rounded, 0, rows * MAX_LANES) };
    }

    /// Rounds the weights of a row, zeros for hidden keys, and adds up the rounded weights. `before` is the row's largest logit before
    /// the block.
    ///
    /// # Safety
    /// The weights of visible keys are in `scratch.s`.
    #[inline(always)]
    pub(super) unsafe fn pack_weights(&self, s: Avx512, block: &Block, row: &RowState, r: usize, before: f32) {
        // SAFETY: the caller's; a row has BLOCK scores, and as many weights a term.
        unsafe {
            let from = block.scratch.s.add(r * BLOCK);
            let to = self.weights.add(r * self.weight_terms * BLOCK);
            let ones = _mm512_set1_epi16(bf16::ONE.to_bits() as i16);
            let sums = self.rounded.add(r * MAX_LANES);
            let mut sum = s.load_f32(sums);
            // As in the softmax, an empty state needs no factor.
            if before < row.max && before > f32::NEG_INFINITY {
                sum = s.mul(sum, s.splat(math::exp2_1(s, before - row.max)));
            }
            for i in (0..BLOCK).step_by(LINE) {
                let visible = row.visible_bits >> i;
                let exact = [
                    _mm512_maskz_loadu_ps(visible as u16, from.add(i)),
                    _mm512_maskz_loadu_ps((visible >> LANES) as u16, from.add(i + LANES)),
                ];
                let weights = round(exact[0], exact[1]);
                _mm512_storeu_si512(to.add(i).cast(), weights);
                sum = dot(sum, weights, ones);
                if self.weight_terms > 1 {
                    let low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(weights));
                    let high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(weights));
                    let low = s.sub(exact[0], _mm512_castsi512_ps(_mm512_slli_epi32::<16>(low)));
                    let high = s.sub(exact[1], _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)));
                    let weights = round(low, high);
                    _mm512_storeu_si512(to.add(BLOCK + i).cast(), weights);
                    sum = dot(sum, weights, ones);
                }
            }
            s.store_f32(sums, sum);
        }
    }

    /// Multiplies the outputs of rows by the ratio of the sums of exact and rounded weights.
    ///
    /// # Safety
    /// As [`Products::end_chunk`](crate::kernels::generic::attention::Products::end_chunk).
    #[inline(always)]
    unsafe fn correct_all(&self, s: Avx512, rows: &[RowState], scratch: &Scratch) {
        for (index, rows) in rows.chunks(MAX_LANES).enumerate() {
            let first = index * MAX_LANES;
            // SAFETY: the caller's.
            unsafe {
                let exact = totals(s, scratch.sums.add(first * MAX_LANES), rows.len());
                let rounded = totals(s, self.rounded.add(first * MAX_LANES), rows.len());
                for (r, row) in rows.iter().enumerate() {
                    if is_empty((row.max, exact[r])) {
                        continue;
                    }
                    let (acc, ratio) = (scratch.acc.add((first + r) * self.dvp), s.splat(exact[r] / rounded[r]));
                    for i in (0..self.dvp).step_by(MAX_LANES) {
                        s.store_f32(acc.add(i), s.mul(s.load_f32(acc.add(i)), ratio));
                    }
                }
                std::ptr::write_bytes(self.rounded.add(first * MAX_LANES), 0, rows.len() * MAX_LANES);
            }
        }
    }
}

/// The sums over lanes of up to sixteen rows of lanes.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn totals(s: Avx512, sums: *const f32, rows: usize) -> [f32; MAX_LANES] {
    let mut lanes = [s.zero(); MAX_LANES];
    let mut totals = [0.0; MAX_LANES];
    for (r, lanes) in lanes.iter_mut().enumerate().take(rows) {
        // SAFETY: the caller's.
        *lanes = unsafe { s.load_f32(sums.add(r * MAX_LANES)) };
    }
    // SAFETY: the array is a whole vector.
    unsafe { s.store_f32(totals.as_mut_ptr(), s.sum_lanes(&lanes)) };
    totals
}

impl DotProducts {
    level_functions! {
        /// [`Self::correct_all`], as a function of its own.
        ///
        /// # Safety
        /// The same.
        #[inline(never)]
        pub(super) unsafe fn correct_rows(&self, s: Avx512, rows: &[RowState], scratch: &Scratch) {
            // SAFETY: the caller's.
            unsafe { self.correct_all(s, rows, scratch) }
        }
    }
}
