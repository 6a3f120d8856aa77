//! Query rows, keys, values and weights of a block as matrix operands.
//!
//! | copy | does | cycles per iteration on Neoverse V2 | vector pipes alone |
//! | --- | --- | --- | --- |
//! | K, 8 keys by 8 dims | 8 shuffles, 8 loads, 4 stores of pairs | 5.6 (4.6) | 2 |
//! | V, 4 keys by 8 columns | 8 shuffles, 4 products, 4 loads, 2 stores of pairs | 4.6 (4.1) | 3 |
//!
//! See [the table](super#what-bounds-it) of the products for the model. Copies run once per block for all rows of the
//! tile.

use super::groups::{Group, groups};
use super::operands::{has_no_nan, load_part, prefetch_row, store_keys, store_values, upper_half, zeros};
use super::{DEPTH, KEY_STEPS, MatrixProducts, OPERAND, SLAB, SLAB_COLUMNS, steps_of};
use crate::cpu::level_features;
use crate::kernels::generic::attention::{Block, KeyPointers, Scratch};
use crate::kernels::neon::Neon;
use crate::kernels::neonbf16::instructions::{bfmmla, round};
use crate::kernels::partial::with_features;
use crate::kernels::simd::Simd;
use crate::problem::grid::{BLOCK, padded};
use crate::problem::limits::MAX_HEAD_DIM;
use half::bf16;
use std::arch::aarch64::*;

/// The value of a key outside the key range.
pub(super) static ZEROS: [bf16; MAX_HEAD_DIM] = [bf16::ZERO; MAX_HEAD_DIM];

impl MatrixProducts {
    /// Packs the bf16 terms of the query rows as operands.
    ///
    /// # Safety
    /// As [`Products::pack_queries`](crate::kernels::generic::attention::Products::pack_queries).
    #[inline(always)]
    pub unsafe fn pack_rows(&self, s: Neon, rows: usize, scratch: &Scratch, d: usize) {
        let (dp, steps) = (padded(d), steps_of(d));
        for (first, pairs) in groups(rows) {
            for pair in 0..pairs {
                let row = 2 * (first + pair);
                for step in 0..steps {
                    // SAFETY: a row has dp floats, which are whole steps; Q has its operands for every pair.
                    unsafe {
                        let at = |row| s.load_f32(scratch.q.add(row * dp + step * DEPTH));
                        let mut x = [at(row), if row + 1 < rows { at(row + 1) } else { s.zero() }];
                        for term in 0..self.query_terms {
                            let upper = x.map(|x| upper_half(x));
                            let to = (first * self.query_terms + term * pairs) * steps + step * pairs + pair;
                            let [low, high] = upper.map(|x| vreinterpretq_u16_f32(x));
                            vst1q_u16(self.q.add(to * OPERAND), vuzp2q_u16(low, high));
                            for (x, upper) in x.iter_mut().zip(upper) {
                                // The remainder of an infinity is 0, and so is that of a NaN, whose first term is NaN
                                // already.
                                let left = vsubq_f32(*x, upper);
                                *x = vbslq_f32(vceqq_f32(left, left), left, s.zero());
                            }
                        }
                    }
                }
            }
        }
        // SAFETY: there is room for whole pairs.
        unsafe {
            // The tile clears the outputs of its own rows. A row that only completes a pair must add nothing.
            std::ptr::write_bytes(scratch.acc.add(rows * self.dvp), 0, rows % 2 * self.dvp);
            self.clear_sums(rows);
        }
    }

    /// Packs keys as operands, in slabs of eight. The first and the last key of the key range stand in for keys
    /// outside, whose scores are ignored.
    ///
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block).
    #[inline(always)]
    unsafe fn pack_keys_of_block(&self, block: &Block, k: KeyPointers<bf16>) {
        let Block { key_range, d, .. } = *block;
        let whole = d / OPERAND * OPERAND;
        for first in (key_range.low / SLAB_COLUMNS * SLAB_COLUMNS..key_range.high).step_by(SLAB_COLUMNS) {
            let mut keys = [std::ptr::null(); SLAB_COLUMNS];
            for (i, key) in keys.iter_mut().enumerate() {
                *key = k.key(0, (first + i).clamp(key_range.low, key_range.high - 1));
            }
            let slab = self.k.wrapping_add(first / SLAB_COLUMNS * steps_of(d) * SLAB * OPERAND);
            // SAFETY: the caller's; a slab has room for all steps, and eight elements are two of them.
            unsafe {
                for i in (0..whole).step_by(OPERAND) {
                    let x = keys.map(|key| vld1q_u16(key.add(i).cast()));
                    store_keys(slab.add(i / DEPTH * SLAB * OPERAND), x);
                }
                if whole < d {
                    let x = keys.map(|key| load_part(key.add(whole), d - whole));
                    store_keys(slab.add(whole / DEPTH * SLAB * OPERAND), x);
                }
            }
        }
    }

    /// Packs values as operands, in slabs of eight columns, with zeros for keys outside the key range and for elements
    /// that are not finite. Returns the keys that have such elements.
    ///
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block).
    #[inline(always)]
    unsafe fn pack_values_of_block(&self, s: Neon, block: &Block, k: KeyPointers<bf16>, v: KeyPointers<bf16>) -> u64 {
        let Block { key_range, d, dv, .. } = *block;
        let whole = dv / SLAB_COLUMNS * SLAB_COLUMNS;
        let mut products = zeros();
        for step in key_range.low / DEPTH..key_range.high.div_ceil(DEPTH) {
            let mut keys = [ZEROS.as_ptr(); DEPTH];
            for (i, key) in keys.iter_mut().enumerate() {
                let j = step * DEPTH + i;
                if j >= key_range.low && j < key_range.high {
                    *key = v.key(0, j);
                    prefetch_row(s, k.next(j), d);
                    prefetch_row(s, v.next(j), dv);
                }
            }
            // SAFETY: the caller's; a slab of columns has room for all steps of a block.
            unsafe {
                let slabs = self.v.add(step * SLAB * OPERAND);
                for i in (0..whole).step_by(SLAB_COLUMNS) {
                    let x = keys.map(|key| vld1q_u16(key.add(i).cast()));
                    store_values(slabs.add(i / SLAB_COLUMNS * KEY_STEPS * SLAB * OPERAND), x, &mut products);
                }
                if whole < dv {
                    let x = keys.map(|key| load_part(key.add(whole), dv - whole));
                    store_values(slabs.add(whole / SLAB_COLUMNS * KEY_STEPS * SLAB * OPERAND), x, &mut products);
                }
            }
        }
        if has_no_nan(products) {
            return 0;
        }
        // SAFETY: the operands of the key range's steps have just been written.
        unsafe { self.clear_non_finite(block, v) }
    }

    /// Replaces the elements that are not finite by zeros in the packed values, and returns their keys.
    ///
    /// # Safety
    /// As [`Self::pack_values`], which has written the copy.
    #[cold]
    unsafe fn clear_non_finite(&self, block: &Block, v: KeyPointers<bf16>) -> u64 {
        let Block { key_range, dv, .. } = *block;
        let mut non_finite = 0;
        for j in key_range.low..key_range.high {
            for i in 0..dv {
                // SAFETY: the caller's.
                unsafe {
                    if !(*v.key(0, j).add(i)).is_finite() {
                        non_finite |= 1 << j;
                        let operand = (i / SLAB_COLUMNS * KEY_STEPS + j / DEPTH) * SLAB + i % SLAB_COLUMNS / 2;
                        *self.v.add(operand * OPERAND + i % 2 * DEPTH + j % DEPTH) = 0;
                    }
                }
            }
        }
        non_finite
    }

    /// Rounds the weights of a group of `rows` rows to operands, and adds up the rounded weights.
    ///
    /// # Safety
    /// The level is available, and the rows' weights with the keys of the group are in `scratch.s`.
    #[inline(always)]
    unsafe fn pack_weights_of_group(&self, block: &Block, group: Group, rows: usize) {
        let Group { first, pairs, keys } = group;
        // SAFETY: NEON is a part of AArch64.
        let ones = unsafe { vdupq_n_u16(bf16::ONE.to_bits()) };
        for pair in 0..pairs {
            let from = block.scratch.s.wrapping_add(2 * (first + pair) * BLOCK);
            let both = 2 * pair + 1 < rows;
            // SAFETY: the caller's; a row that only completes a pair has room for scores, too.
            unsafe {
                let mut sum = vld1q_f32(self.rounded.add((first + pair) * 4));
                for step in keys.low / DEPTH..keys.high.div_ceil(DEPTH) {
                    let low = vld1q_f32(from.add(step * DEPTH));
                    let high = if both { vld1q_f32(from.add(BLOCK + step * DEPTH)) } else { vdupq_n_f32(0.0) };
                    let to = self.weights.add((step * pairs + pair) * OPERAND);
                    let weights = round(low, high);
                    vst1q_u16(to, weights);
                    sum = bfmmla(sum, weights, ones);
                    if self.weight_terms > 1 {
                        let low = vsubq_f32(low, vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(weights))));
                        let high = vsubq_f32(high, vreinterpretq_f32_u32(vshll_high_n_u16::<16>(weights)));
                        let weights = round(low, high);
                        vst1q_u16(to.add(KEY_STEPS * pairs * OPERAND), weights);
                        sum = bfmmla(sum, weights, ones);
                    }
                }
                vst1q_f32(self.rounded.add((first + pair) * 4), sum);
            }
        }
    }
}

impl MatrixProducts {
    level_features!(
        NeonBf16,
        with_features! {
            /// [`Self::pack_keys_of_block`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            pub unsafe fn pack_keys(&self, block: &Block, k: KeyPointers<bf16>) {
                // SAFETY: the caller's.
                unsafe { self.pack_keys_of_block(block, k) }
            }

            /// [`Self::pack_values_of_block`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            pub unsafe fn pack_values(&self, s: Neon, block: &Block, k: KeyPointers<bf16>, v: KeyPointers<bf16>) -> u64 {
                // SAFETY: the caller's.
                unsafe { self.pack_values_of_block(s, block, k, v) }
            }

            /// [`Self::pack_weights_of_group`], as a function of its own.
            ///
            /// # Safety
            /// The same.
            #[inline(never)]
            pub unsafe fn pack_weights(&self, block: &Block, group: Group, rows: usize) {
                // SAFETY: the caller's.
                unsafe { self.pack_weights_of_group(block, group, rows) }
            }
        }
    );
}
