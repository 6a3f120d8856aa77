//! AArch64 with FEAT_BF16: products of 2 x 4 by 4 x 2 bf16 matrices, summed in f32 (`bfmmla`).
//!
//! A partial level: attention over bf16 keys and values, with one kernel for each [`Precision`]. NEON serves all other
//! operations, and all arithmetic of these kernels except the products.
//!
//! The intrinsics are not stable, so each instruction is inline assembly; the compiler still places loads and chooses
//! registers. The standard library detects the feature through the operating system.

mod attention;

use super::api::Precision;
use std::arch::aarch64::*;
use std::arch::asm;

/// `sum[2 i + j] + a[i] * b[j]`, where row i of `a` and of `b` are four bf16 each, for i and j in 0..2.
///
/// Products are exact. Twice, two of them are added, and the result is added to the sum. Each addition rounds to odd
/// and flushes subnormal numbers. Each of the four sums depends on its own two rows only.
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

/// Rounds eight numbers to bf16, to nearest, ties to even.
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
