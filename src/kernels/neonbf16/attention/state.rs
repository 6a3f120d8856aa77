//! The state of pairs of rows: rescaling, and the end of a chunk.

use super::MatrixProducts;
use super::operands::split_rows;
use crate::cpu::level_features;
use crate::kernels::generic::attention::state::is_empty;
use crate::kernels::generic::attention::{Block, RowState, Scratch};
use crate::kernels::generic::math;
use crate::kernels::neon::Neon;
use crate::kernels::partial::with_features;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::limits::MAX_HEAD_DIM;
use std::arch::aarch64::*;

impl MatrixProducts {
    /// Clears the sums of rounded weights.
    ///
    /// # Safety
    /// As [`Self::pack_rows`].
    pub unsafe fn clear_sums(&self, rows: usize) {
        // SAFETY: four floats per pair.
        unsafe { std::ptr::write_bytes(self.rounded, 0, rows.div_ceil(2) * 4) };
    }

    /// Scales the outputs of a pair of rows, and their sums of rounded weights.
    ///
    /// # Safety
    /// The pair is one of the tile's.
    #[inline(always)]
    pub unsafe fn rescale(&self, block: &Block, pair: usize, [first, second]: [f32; 2]) {
        if (first, second) == (1.0, 1.0) {
            return;
        }
        let dvp = self.dvp;
        // SAFETY: the caller's.
        unsafe {
            let factor = vcombine_f32(vdup_n_f32(first), vdup_n_f32(second));
            let acc = block.scratch.acc.add(2 * pair * dvp);
            for i in (0..2 * dvp).step_by(4) {
                vst1q_f32(acc.add(i), vmulq_f32(vld1q_f32(acc.add(i)), factor));
            }
            let rounded = self.rounded.add(pair * 4);
            vst1q_f32(rounded, vmulq_f32(vld1q_f32(rounded), factor));
        }
    }

    /// Splits the outputs of pairs into rows, and multiplies them by the ratio of the sums of exact and rounded
    /// weights.
    ///
    /// # Safety
    /// As [`Products::end_chunk`](crate::kernels::generic::attention::Products::end_chunk).
    #[inline(always)]
    unsafe fn split_pairs_of_rows(&self, s: Neon, rows: &[RowState], scratch: &Scratch) {
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
                // A missing row, or one without a visible key, has zeros.
                let ratios = [0, 1].map(|r| vdupq_n_f32(ratio(r).unwrap_or(1.0)));
                let acc = scratch.acc.add(2 * pair * dvp);
                for i in (0..dvp).step_by(4) {
                    let both = split_rows(vld1q_f32(acc.add(2 * i)), vld1q_f32(acc.add(2 * i + 4)));
                    // Overwrites only what has been read.
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

impl MatrixProducts {
    level_features!(
        NeonBf16,
        with_features! {
            /// [`Self::split_pairs_of_rows`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            pub unsafe fn split_pairs(&self, s: Neon, rows: &[RowState], scratch: &Scratch) {
                // SAFETY: the caller's.
                unsafe { self.split_pairs_of_rows(s, rows, scratch) }
            }
        }
    );
}

/// The factor of a row's outputs when its largest logit grows from `before` to `after`; as in the softmax, 1 for an
/// empty state.
#[inline(always)]
pub(super) fn shrink(s: Neon, before: f32, after: f32) -> f32 {
    if before < after && before > f32::NEG_INFINITY { math::exp2_1(s, before - after) } else { 1.0 }
}
