//! Matrix operands and sums in registers.
//!
//! An operand is two rows of four bf16; a sum is a 2 x 2 matrix, row by row. Everything here is inlined into the loops
//! of `pack`, `packed` and `direct`.

use super::{DEPTH, OPERAND, SLAB, SLAB_COLUMNS};
use crate::kernels::neon::Neon;
use crate::kernels::neonbf16::instructions::bfmmla;
use crate::kernels::simd::{Simd, copy_part, lines};
use crate::problem::grid::BLOCK;
use half::bf16;
use std::arch::aarch64::*;

/// Sums of `P` pairs of rows with `G` slabs of keys or columns.
pub(super) type Sums<const P: usize, const G: usize> = [[[float32x4_t; SLAB]; G]; P];

/// A slab of sums of 0.
#[inline(always)]
pub(super) fn zeros() -> [float32x4_t; SLAB] {
    // SAFETY: NEON is a part of AArch64.
    unsafe { [vdupq_n_f32(0.0); SLAB] }
}

/// Loads the sums of `P` pairs of rows, which are `pair` floats apart.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(super) unsafe fn load_sums<const P: usize, const G: usize>(acc: *const f32, pair: usize) -> Sums<P, G> {
    let mut sums = [[zeros(); G]; P];
    for p in 0..P {
        for (i, sum) in sums[p].as_flattened_mut().iter_mut().enumerate() {
            // SAFETY: the caller's.
            *sum = unsafe { vld1q_f32(acc.add(p * pair + i * 4)) };
        }
    }
    sums
}

/// The inverse of [`load_sums`].
///
/// # Safety
/// They are writable.
#[inline(always)]
pub(super) unsafe fn store_sums<const P: usize, const G: usize>(acc: *mut f32, pair: usize, sums: &Sums<P, G>) {
    for p in 0..P {
        for (i, sum) in sums[p].as_flattened().iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { vst1q_f32(acc.add(p * pair + i * 4), *sum) };
        }
    }
}

/// Stores the scores of pairs of rows with pairs of keys, row by row.
///
/// # Safety
/// `2 * P` rows of [`BLOCK`] scores are writable at `out`.
#[inline(always)]
pub(super) unsafe fn store_scores<const P: usize, const G: usize>(out: *mut f32, sums: &Sums<P, G>) {
    for p in 0..P {
        for (i, both) in sums[p].as_flattened().as_chunks::<2>().0.iter().enumerate() {
            for (r, row) in split_rows(both[0], both[1]).into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { vst1q_f32(out.add((2 * p + r) * BLOCK + i * 4), row) };
            }
        }
    }
}

/// Two neighbouring 2 x 2 matrices as four elements of either row.
#[inline(always)]
pub(super) fn split_rows(a: float32x4_t, b: float32x4_t) -> [float32x4_t; 2] {
    // SAFETY: NEON is a part of AArch64.
    unsafe {
        let [a, b] = [vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)];
        [vreinterpretq_f32_f64(vzip1q_f64(a, b)), vreinterpretq_f32_f64(vzip2q_f64(a, b))]
    }
}

/// The upper half of every number. A NaN whose payload is all in the lower half does not become an infinity.
#[inline(always)]
pub(super) fn upper_half(x: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is a part of AArch64.
    unsafe {
        let bits = vreinterpretq_u32_f32(x);
        let bits = vbslq_u32(vceqq_f32(x, x), bits, vorrq_u32(bits, vdupq_n_u32(0x40_0000)));
        vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff_0000)))
    }
}

/// Eight elements of eight keys as operands: four of one step, four of the next.
#[inline(always)]
fn key_operands(x: [uint16x8_t; SLAB_COLUMNS]) -> [[uint16x8_t; SLAB]; 2] {
    let mut operands = [[x[0]; SLAB]; 2];
    for pair in 0..SLAB {
        // SAFETY: NEON is a part of AArch64.
        unsafe {
            let [a, b] = [vreinterpretq_u64_u16(x[2 * pair]), vreinterpretq_u64_u16(x[2 * pair + 1])];
            operands[0][pair] = vreinterpretq_u16_u64(vzip1q_u64(a, b));
            operands[1][pair] = vreinterpretq_u16_u64(vzip2q_u64(a, b));
        }
    }
    operands
}

/// Eight columns of four values as operands: transposed.
#[inline(always)]
pub(super) fn value_operands(x: [uint16x8_t; DEPTH]) -> [uint16x8_t; SLAB] {
    // SAFETY: NEON is a part of AArch64.
    unsafe {
        let (even, odd) = (vzip1q_u16(x[0], x[2]), vzip1q_u16(x[1], x[3]));
        let (later_even, later_odd) = (vzip2q_u16(x[0], x[2]), vzip2q_u16(x[1], x[3]));
        [
            vzip1q_u16(even, odd),
            vzip2q_u16(even, odd),
            vzip1q_u16(later_even, later_odd),
            vzip2q_u16(later_even, later_odd),
        ]
    }
}

/// Stores [`key_operands`].
///
/// # Safety
/// Eight operands are writable at `to`.
#[inline(always)]
pub(super) unsafe fn store_keys(to: *mut u16, x: [uint16x8_t; SLAB_COLUMNS]) {
    for (i, operand) in key_operands(x).as_flattened().iter().enumerate() {
        // SAFETY: the caller's.
        unsafe { vst1q_u16(to.add(i * OPERAND), *operand) };
    }
}

/// Stores [`value_operands`]. `products` become NaN if an element is not finite.
///
/// # Safety
/// The level is available, and four operands are writable at `to`.
#[inline(always)]
pub(super) unsafe fn store_values(to: *mut u16, x: [uint16x8_t; DEPTH], products: &mut [float32x4_t; SLAB]) {
    for (n, operand) in value_operands(x).into_iter().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            vst1q_u16(to.add(n * OPERAND), operand);
            products[n] = bfmmla(products[n], operand, vdupq_n_u16(0));
        }
    }
}

/// Adds the products of two steps: eight elements of the keys of slab `g`.
///
/// # Safety
/// The level is available, and the operands of two steps of `P` pairs of rows are readable at `q`.
#[inline(always)]
pub(super) unsafe fn add_keys<const P: usize, const G: usize>(
    q: *const u16,
    x: [uint16x8_t; SLAB_COLUMNS],
    g: usize,
    sums: &mut Sums<P, G>,
) {
    for (step, operands) in key_operands(x).into_iter().enumerate() {
        for p in 0..P {
            // SAFETY: the caller's.
            unsafe {
                let left = vld1q_u16(q.add((step * P + p) * OPERAND));
                for n in 0..SLAB {
                    sums[p][g][n] = bfmmla(sums[p][g][n], left, operands[n]);
                }
            }
        }
    }
}

/// Whether no lane is NaN.
#[inline(always)]
pub(super) fn has_no_nan(x: [float32x4_t; SLAB]) -> bool {
    // SAFETY: NEON is a part of AArch64.
    unsafe {
        let sum = vaddq_f32(vaddq_f32(x[0], x[1]), vaddq_f32(x[2], x[3]));
        vminvq_u32(vceqq_f32(sum, sum)) == u32::MAX
    }
}

/// `n < 8` elements, followed by zeros.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(super) unsafe fn load_part(p: *const bf16, n: usize) -> uint16x8_t {
    // SAFETY: the caller's; the buffer holds more than a whole vector.
    unsafe { vld1q_u16(copy_part(p, n).as_ptr().cast()) }
}

/// Prefetches the lines of a key or value; does nothing for null.
#[inline(always)]
pub(super) fn prefetch_row(s: Neon, row: *const bf16, dim: usize) {
    if !row.is_null() {
        lines(row.cast(), dim * size_of::<bf16>()).for_each(|line| s.prefetch_far(line));
    }
}
