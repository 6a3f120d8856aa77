//! Instructions of FEAT_BF16.
//!
//! The intrinsics are not stable, so each instruction is a line of inline assembly; the compiler still places the loads
//! and allocates the registers. The assembler accepts them only in functions with the level's features.

use std::arch::aarch64::*;
use std::arch::asm;

/// `sum[2 i + j] + a[i] * b[j]` for i and j in 0..2, where row i of `a` and of `b` are four bf16 each.
///
/// Products are exact. Two of them are added and the result to the sum, twice; each addition is rounded to odd, and
/// treats subnormal numbers as 0. Every one of the four sums depends on its own two rows only.
///
/// # Safety
/// The level is available.
#[inline(always)]
pub(super) unsafe fn bfmmla(mut sum: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    // SAFETY: arithmetic on registers, of a level that is available.
    unsafe {
        asm!("bfmmla {sum:v}.4s, {a:v}.8h, {b:v}.8h", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Eight numbers to the nearest bf16, ties to even.
///
/// # Safety
/// The level is available.
#[inline(always)]
pub(super) unsafe fn round(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    let rounded;
    // SAFETY: arithmetic on registers, of a level that is available.
    unsafe {
        asm!("bfcvtn {to:v}.4h, {low:v}.4s", "bfcvtn2 {to:v}.8h, {high:v}.4s",
            to = out(vreg) rounded, low = in(vreg) low, high = in(vreg) high,
            options(pure, nomem, nostack, preserves_flags));
    }
    rounded
}
