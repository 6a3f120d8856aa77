//! Scores and weighted values of many rows, from packed operands.
//!
//! Bound by the vector pipes; see [the table](super#what-bounds-it).

use super::groups::Group;
use super::operands::{Sums, load_sums, store_scores, store_sums, zeros};
use super::{DEPTH, KEY_STEPS, MatrixProducts, OPERAND, SLAB, SLAB_COLUMNS, steps_of};
use crate::cpu::level_features;
use crate::kernels::generic::attention::Block;
use crate::kernels::neonbf16::instructions::bfmmla;
use crate::kernels::partial::with_features;
use crate::problem::grid::BLOCK;
use std::arch::aarch64::*;

impl MatrixProducts {
    /// Scores of a group with its visible keys, and with their neighbours up to whole slabs.
    ///
    /// # Safety
    /// The level is available; queries and keys are packed.
    #[inline(always)]
    pub unsafe fn scores(&self, block: &Block, group: Group) {
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
    #[inline(always)]
    unsafe fn scores_of_pairs<const P: usize>(&self, block: &Block, group: Group) {
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
    #[inline(always)]
    unsafe fn scores_tile<const P: usize, const G: usize>(&self, block: &Block, group: Group, column: usize) {
        let steps = steps_of(block.d);
        let out = block.scratch.s.wrapping_add(2 * group.first * BLOCK + column);
        let mut sums = [[zeros(); G]; P];
        // SAFETY: the caller's; there is room for the scores of whole pairs of rows.
        unsafe {
            let k = self.k.add(column / SLAB_COLUMNS * steps * SLAB * OPERAND);
            for term in 0..self.query_terms {
                let q = self.q.add((group.first * self.query_terms + term * P) * steps * OPERAND);
                multiply(q, k, steps * SLAB * OPERAND, steps, &mut sums);
            }
            store_scores(out, &sums);
        }
    }

    /// Adds the weighted values of a group's visible keys to its outputs, from column `from` on.
    ///
    /// # Safety
    /// The level is available; weights and values are packed.
    #[inline(always)]
    pub unsafe fn values(&self, block: &Block, group: Group, from: usize) {
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
    #[inline(always)]
    unsafe fn values_of_pairs<const P: usize>(&self, block: &Block, group: Group, from: usize) {
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
    #[inline(always)]
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
}

impl MatrixProducts {
    level_features!(
        NeonBf16,
        with_features! {
            /// [`Self::scores_of_pairs`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            unsafe fn scores_of<const P: usize>(&self, block: &Block, group: Group) {
                // SAFETY: the caller's.
                unsafe { self.scores_of_pairs::<P>(block, group) }
            }

            /// [`Self::values_of_pairs`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            unsafe fn values_of<const P: usize>(&self, block: &Block, group: Group, from: usize) {
                // SAFETY: the caller's.
                unsafe { self.values_of_pairs::<P>(block, group, from) }
            }
        }
    );
}

/// `sums[p][g][n] += a[step][p] * b[g][step][n]` for all steps, in order: one operand of `a` per pair of rows, and four
/// of each slab of `b`. Slabs are `slab` elements apart.
///
/// # Safety
/// The level is available, and the operands are readable.
#[inline(always)]
unsafe fn multiply<const P: usize, const G: usize>(
    mut a: *const u16,
    mut b: *const u16,
    slab: usize,
    steps: usize,
    sums: &mut Sums<P, G>,
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
                        let right = vld1q_u16(b.add(g * slab + n * OPERAND));
                        for p in 0..P {
                            sums[p][g][n] = bfmmla(sums[p][g][n], left[p], right);
                        }
                    }
                }
            } else {
                let mut right = [[vdupq_n_u16(0); SLAB]; G];
                for g in 0..G {
                    for n in 0..SLAB {
                        right[g][n] = vld1q_u16(b.add(g * slab + n * OPERAND));
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
