//! AArch64 with FEAT_BF16: products of 2 x 4 by 4 x 2 bf16 matrices, summed in f32 (`bfmmla`).
//!
//! A partial level: attention over bf16 keys and values, twice, once for each [`Precision`]. Everything else, and all that
//! is not a product inside these kernels, is NEON's.
//!
//! The intrinsics are not stable, so each instruction is a line of inline assembly; the compiler still places the loads and
//! chooses the registers. Detection is the standard library's, which asks the operating system.

mod attention;

use super::api::Precision;
use std::arch::aarch64::*;
use std::arch::asm;

/// `sum[2 i + j] + a[i] * b[j]`, where row i of `a` and of `b` are four bf16 each, for i and j in 0..2.
///
/// Products are exact. Two of them are added and the result to the sum, twice; each addition is rounded to odd and takes and
/// leaves no subnormal number. Every one of the four sums depends on its own two rows only.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn bfmmla(mut sum: float32x4_t, a: uint16x8_t, b: uint16x8_t) -> float32x4_t {
    // SAFETY: arithmetic on registers, of a feature that the function has.
    unsafe {
        asm!("bfmmla {sum:v}.4s, {a:v}.8h, {b:v}.8h", sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Eight numbers to the nearest bf16, ties to even.
#[inline]
#[target_feature(enable = "neon,bf16")]
fn round(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    let rounded;
    // SAFETY: arithmetic on registers, of a feature that the function has.
    unsafe {
        asm!("bfcvtn {to:v}.4h, {low:v}.4s", "bfcvtn2 {to:v}.8h, {high:v}.4s",
            to = out(vreg) rounded, low = in(vreg) low, high = in(vreg) high,
            options(pure, nomem, nostack, preserves_flags));
    }
    rounded
}

/// The level's part of the registry.
pub(crate) static ENTRIES: &[super::registry::Entry] = &[
    super::registry::entry!(
        NeonBf16,
        Attention,
        Bf16,
        Bf16,
        Some(Precision::Default),
        "attention_bf16_neonbf16",
        4e-3,
        Attention(attention::functions::<false>())
    ),
    super::registry::entry!(
        NeonBf16,
        Attention,
        Bf16,
        Bf16,
        Some(Precision::High),
        "attention_bf16_high_neonbf16",
        1e-5,
        Attention(attention::functions::<true>())
    ),
];
