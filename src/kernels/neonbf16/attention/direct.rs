//! Scores and weighted values of few rows (decode): operands are made from keys and values in the cache, without a
//! copy.
//!
//! Bound by memory and, for each pair of rows, by the vector pipes; see [the table](super#what-bounds-it). The lines of
//! a block's V are prefetched with its K, and those of the next K with V.

use super::groups::Group;
use super::operands::{
    add_keys, has_no_nan, load_part, load_sums, prefetch_row, store_scores, store_sums, value_operands, zeros,
};
use super::pack::ZEROS;
use super::{DEPTH, MatrixProducts, OPERAND, SLAB_COLUMNS};
use crate::cpu::level_features;
use crate::kernels::generic::attention::{Block, KeyPointers};
use crate::kernels::neon::Neon;
use crate::kernels::neonbf16::instructions::bfmmla;
use crate::kernels::partial::with_features;
use crate::problem::grid::{BLOCK, KeyRange};
use half::bf16;
use std::arch::aarch64::*;

impl MatrixProducts {
    /// As [`Self::scores`], for few rows of one term: keys are read from the cache.
    ///
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block); the group is all rows, whose
    /// queries are packed.
    #[inline(always)]
    pub unsafe fn direct_scores(
        &self,
        s: Neon,
        block: &Block,
        group: Group,
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        // SAFETY: the caller's.
        unsafe {
            match group.pairs {
                1 => self.direct_scores_of::<1, 2>(s, block, group.keys, k, v),
                2 => self.direct_scores_of::<2, 2>(s, block, group.keys, k, v),
                3 => self.direct_scores_of::<3, 1>(s, block, group.keys, k, v),
                _ => self.direct_scores_of::<4, 1>(s, block, group.keys, k, v),
            }
        }
    }

    /// # Safety
    /// As [`Self::direct_scores`]; there are `P` pairs of rows.
    #[inline(always)]
    unsafe fn direct_scores_of_pairs<const P: usize, const G: usize>(
        &self,
        s: Neon,
        block: &Block,
        visible: KeyRange,
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        let Block { scratch, key_range, d, dv, .. } = *block;
        let whole = d / OPERAND * OPERAND;
        let width = G * SLAB_COLUMNS;
        for first in (visible.low / width * width..visible.high).step_by(width) {
            let mut keys = [[std::ptr::null(); SLAB_COLUMNS]; G];
            for (i, key) in keys.as_flattened_mut().iter_mut().enumerate() {
                let j = (first + i).clamp(key_range.low, key_range.high - 1);
                *key = k.key(0, j);
                prefetch_row(s, v.key(0, j), dv);
            }
            let mut sums = [[zeros(); G]; P];
            // SAFETY: the caller's; eight elements are two steps, and there is room for the scores of whole pairs of
            // rows.
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
                store_scores(scratch.s.add(first), &sums);
            }
        }
    }

    /// As [`Self::values`], for few rows of one term: values are read from the cache, and packed only if an element is
    /// not finite. Returns the keys that have such elements.
    ///
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block); the group is all rows, whose
    /// weights are packed.
    #[inline(always)]
    pub unsafe fn direct_values(
        &self,
        s: Neon,
        block: &Block,
        group: Group,
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) -> u64 {
        // SAFETY: the caller's.
        unsafe {
            let done = match group.pairs {
                1 => self.direct_values_of::<1, 2>(s, block, group.keys, k, v),
                2 => self.direct_values_of::<2, 2>(s, block, group.keys, k, v),
                3 => self.direct_values_of::<3, 1>(s, block, group.keys, k, v),
                _ => self.direct_values_of::<4, 1>(s, block, group.keys, k, v),
            };
            if done == block.dv {
                return 0;
            }
            let non_finite = self.pack_values(s, block, k, v);
            self.values(block, group, done);
            non_finite
        }
    }

    /// Returns the number of columns that are done: all, or those before the first slabs with an element that is not
    /// finite.
    ///
    /// # Safety
    /// As [`Self::direct_values`]; there are `P` pairs of rows.
    #[inline(always)]
    unsafe fn direct_values_of_pairs<const P: usize, const G: usize>(
        &self,
        s: Neon,
        block: &Block,
        visible: KeyRange,
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) -> usize {
        let Block { key_range, d, dv, .. } = *block;
        let mut values = [ZEROS.as_ptr(); BLOCK];
        for j in key_range.low..key_range.high {
            values[j] = v.key(0, j);
            prefetch_row(s, k.next(j), d);
        }
        let mut column = 0;
        // SAFETY: the caller's; outputs are padded to sixteen columns.
        unsafe {
            while column < dv {
                let done = if dv - column >= G * SLAB_COLUMNS {
                    self.direct_values_tile::<P, G, false>(block, visible, &values, column)
                } else {
                    self.direct_values_tile::<P, 1, true>(block, visible, &values, column)
                };
                if done == 0 {
                    break;
                }
                column = dv.min(column + done);
            }
        }
        column
    }

    /// Adds `G` slabs of columns from `column` on, or with `PART` one that may be incomplete. Returns the number of
    /// columns, or 0 if an element is not finite; then nothing was added.
    ///
    /// # Safety
    /// As [`Self::direct_values_of_pairs`]; `values` are the block's, and zeros for keys outside the key range.
    #[inline(always)]
    unsafe fn direct_values_tile<const P: usize, const G: usize, const PART: bool>(
        &self,
        block: &Block,
        visible: KeyRange,
        values: &[*const bf16; BLOCK],
        column: usize,
    ) -> usize {
        let (from, to) = (visible.low / DEPTH, visible.high.div_ceil(DEPTH));
        let acc = block.scratch.acc.wrapping_add(2 * column);
        let left = block.dv - column;
        let mut finite = zeros();
        // SAFETY: the caller's.
        unsafe {
            let zero = vdupq_n_u16(0);
            let mut sums = load_sums::<P, G>(acc, 2 * self.dvp);
            let mut weights = self.weights.add(from * P * OPERAND);
            for values in &values.as_chunks::<DEPTH>().0[from..to] {
                for g in 0..G {
                    let x = if PART && left < SLAB_COLUMNS {
                        values.map(|value| load_part(value.add(column), left))
                    } else {
                        values.map(|value| vld1q_u16(value.add(column + g * SLAB_COLUMNS).cast()))
                    };
                    for (n, operand) in value_operands(x).into_iter().enumerate() {
                        finite[n] = bfmmla(finite[n], operand, zero);
                        for p in 0..P {
                            sums[p][g][n] = bfmmla(sums[p][g][n], vld1q_u16(weights.add(p * OPERAND)), operand);
                        }
                    }
                }
                weights = weights.wrapping_add(P * OPERAND);
            }
            if !has_no_nan(finite) {
                return 0;
            }
            store_sums(acc, 2 * self.dvp, &sums);
        }
        G * SLAB_COLUMNS
    }
}

impl MatrixProducts {
    level_features!(
        NeonBf16,
        with_features! {
            /// [`Self::direct_scores_of_pairs`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            unsafe fn direct_scores_of<const P: usize, const G: usize>(
                &self,
                s: Neon,
                block: &Block,
                visible: KeyRange,
                k: KeyPointers<bf16>,
                v: KeyPointers<bf16>,
            ) {
                // SAFETY: the caller's.
                unsafe { self.direct_scores_of_pairs::<P, G>(s, block, visible, k, v) }
            }

            /// [`Self::direct_values_of_pairs`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            unsafe fn direct_values_of<const P: usize, const G: usize>(
                &self,
                s: Neon,
                block: &Block,
                visible: KeyRange,
                k: KeyPointers<bf16>,
                v: KeyPointers<bf16>,
            ) -> usize {
                // SAFETY: the caller's.
                unsafe { self.direct_values_of_pairs::<P, G>(s, block, visible, k, v) }
            }
        }
    );
}
