//! Eight-bit floats with static scales: conversion to units, and back.
//!
//! | | sign, exponent, fraction | bias | largest | smallest normal, subnormal | infinities | NaN |
//! | --- | --- | --- | --- | --- | --- | --- |
//! | E4M3 (`e4m3fn`) | 1, 4, 3 | 7 | 448 | 2^-6, 2^-9 | none | 0x7f, 0xff |
//! | E5M2 | 1, 5, 2 | 15 | 57344 | 2^-14, 2^-16 | 0x7c, 0xfc | 0x7d to 0x7f, 0xfd to 0xff |
//!
//! A unit is its element divided by the scale, rounded to f32, then to the nearest unit, ties to even. What is larger than
//! the largest number, infinities included, becomes that number; every NaN becomes 0x7f. An element is its unit, exactly, times
//! the scale, rounded to f32. All of it is arithmetic of IEEE 754, so that every level computes the same bits.
//!
//! Both formats are parts of an f16, which every level widens in one instruction: E5M2 is its upper half, and E4M3 is one
//! of a 256th of the number, with three bits of the fraction and four of the exponent. Decode reads that 256th
//! ([`E4m3Fraction`]) where a product with 256 would take a port of FMAs, and multiplies queries and weights by 256 instead.
//! Products are the same, as powers of two are exact. Queries and weights that are not below 2^120 are not multiplied, and take
//! loops that read whole numbers.
//!
//! A write of several vectors ([`Simd::WRITES_SEVERAL`]) divides by a reciprocal in two parts ([`Reciprocals`]), limits magnitudes before
//! that, and rounds by the addition of a power of two, whose last place is that of the unit. What bounds it, in AVX2: 9 operations a
//! vector, 11 with a scale, and 4 for signs, NaN and packing; at the 2.5 operations per cycle that such a mix reaches, 100 cycles of a
//! head of 128.

use super::copy::{Converted, STAGE, convert, prefetch_next};
use super::quantize::{self, Reciprocal, Reciprocals, ToElements};
use crate::kernels::api::ScaledArgs;
use crate::kernels::simd::{BLOCK, Load, LoadStore, MAX_VECTORS, Simd};
use half::f16;

/// A unit of [`CacheFormat::Fp8E4m3`](crate::CacheFormat::Fp8E4m3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct E4m3(pub u8);

/// The same unit, read as its number divided by [`Simd::E4M3_FRACTION`]: what queries and weights are multiplied by instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct E4m3Fraction(pub u8);

/// A unit of [`CacheFormat::Fp8E5m2`](crate::CacheFormat::Fp8E5m2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct E5m2(pub u8);

impl E4m3 {
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        let (sign, magnitude) = (u16::from(self.0 & 0x80) << 8, u16::from(self.0 & 0x7f));
        let half = if magnitude == 0x7f { 0x7e00 } else { magnitude << 7 };
        256.0 * f16::from_bits(sign | half).to_f32()
    }
}

impl E5m2 {
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f16::from_bits(u16::from(self.0) << 8).to_f32()
    }
}

/// A format of eight bits, by its place in an f32.
pub(crate) trait Fp8: Load {
    /// The bits of an f32's fraction that are cut off.
    const SHIFT: u32;
    /// The difference of the exponents' biases.
    const BIAS: u32;
    /// The largest number.
    const MAX: f32;
    /// The smallest normal number.
    const MIN_NORMAL: f32;
    /// A unit of the last place of an f32 of this size is the smallest subnormal number.
    const SUBNORMALS: f32;
}

impl Fp8 for E4m3 {
    const SHIFT: u32 = 20;
    const BIAS: u32 = 127 - 7;
    const MAX: f32 = 448.0;
    const MIN_NORMAL: f32 = 1.0 / 64.0;
    const SUBNORMALS: f32 = 16384.0;
}

impl Fp8 for E5m2 {
    const SHIFT: u32 = 21;
    const BIAS: u32 = 127 - 15;
    const MAX: f32 = 57344.0;
    const MIN_NORMAL: f32 = 1.0 / 16384.0;
    const SUBNORMALS: f32 = 128.0;
}

/// A number for each lane, rounded: the unit is the pattern's low byte, and the other bits are 0.
#[inline(always)]
pub(crate) fn rounded<S: Simd, U: Fp8>(s: S, v: S::V) -> S::V {
    let pattern = |bits: u32| s.splat(f32::from_bits(bits));
    let (magnitude, largest) = (s.abs(v), s.splat(U::MAX));
    let magnitude = s.select_lt(largest, magnitude, largest, magnitude);
    // To nearest, ties to even: adds half of the cut-off range, minus one where the last kept bit is 0.
    let odd = s.and_bits(s.shift_bits(magnitude, U::SHIFT), pattern(1));
    let up = s.add_bits(odd, pattern((1 << (U::SHIFT - 1)) - 1));
    let normal = s.shift_bits(s.add_bits(magnitude, up), U::SHIFT);
    let normal = s.add_bits(normal, pattern((U::BIAS << (23 - U::SHIFT)).wrapping_neg()));
    // The addition rounds to a multiple of the smallest number, which is then counted by the last bits.
    let subnormal = s.add(magnitude, s.splat(U::SUBNORMALS));
    let subnormal = s.add_bits(subnormal, pattern(U::SUBNORMALS.to_bits().wrapping_neg()));
    let unit = s.select_lt(magnitude, s.splat(U::MIN_NORMAL), subnormal, normal);
    let unit = s.add_bits(unit, s.and_bits(s.shift_bits(v, 24), pattern(0x80)));
    s.select_lt(magnitude, s.splat(f32::INFINITY), unit, pattern(0x7f))
}

/// The static scale of a head: 1 without scales.
///
/// # Safety
/// The scale's address is valid, or null.
#[inline(always)]
unsafe fn scale_of(args: &ScaledArgs, head: isize) -> f32 {
    // SAFETY: the caller's.
    if args.scales.is_null() { 1.0 } else { unsafe { quantize::scale_of(args, head) } }
}

/// Writes `heads` vectors as units of their scales.
///
/// # Safety
/// Every address that `args` describes is valid, but scales may be null; source, units and scales do not overlap.
#[inline(always)]
pub(crate) unsafe fn encode<S: Simd, A: LoadStore, U: Fp8>(s: S, args: &ScaledArgs) {
    let c = &args.copy;
    if const { S::WRITES_SEVERAL } && (c.src_dim, c.dst_dim) == (1, 1) {
        // SAFETY: the caller's.
        unsafe { encode_together::<_, A, U>(s, args) };
        return;
    }
    for head in 0..c.heads as isize {
        let src = c.src.cast::<A>().wrapping_offset(head * c.src_head);
        let dst = c.dst.cast::<U>().wrapping_offset(head * c.dst_head);
        // SAFETY: the caller's.
        unsafe {
            let units = ToUnits(scale_of(args, head));
            convert(s, (src, c.src_dim), (dst, c.dst_dim), c.dim, &units);
        }
    }
}

/// [`encode`] of vectors whose elements and units lie together.
///
/// # Safety
/// As [`encode`].
#[inline(always)]
unsafe fn encode_together<S: Simd, A: LoadStore, U: Fp8>(s: S, args: &ScaledArgs) {
    let c = &args.copy;
    let dim = c.dim as isize;
    let together = (args.scales.is_null() || args.scale_head == 0) && (c.src_head, c.dst_head) == (dim, dim);
    let (heads, dim) = if together && c.heads > 0 { (1, c.heads * c.dim) } else { (c.heads, c.dim) };
    // Heads often share a scale.
    let mut last = 1.0;
    let mut reciprocals = Reciprocals::new();
    let mut holds = true;
    for head in 0..heads as isize {
        let src = c.src.cast::<A>().wrapping_offset(head * c.src_head);
        let dst = c.dst.cast::<U>().wrapping_offset(head * c.dst_head);
        // SAFETY: the caller's.
        unsafe {
            let scale = scale_of(args, head);
            if scale != last {
                last = scale;
                holds = Reciprocals::holds(s, s.splat(scale), Reciprocals::LEAST) & 1 == 1;
                reciprocals.set(s, s.splat(scale));
            }
            let mut done = 0;
            while holds && done + BLOCK <= dim {
                // A part at a time, so that prefetches are spread.
                let n = (dim - done).min(STAGE);
                let (src, dst) = (src.add(done), dst.add(done));
                prefetch_next(s, c, (src.cast(), n * size_of::<A>()), (dst.cast_const().cast(), n));
                done += if scale == 1.0 {
                    units::<_, _, U, false>(s, src, dst, n, scale, &reciprocals.of(s, 0))
                } else {
                    units::<_, _, U, true>(s, src, dst, n, scale, &reciprocals.of(s, 0))
                };
            }
            if done < dim {
                ToUnits(scale).run(s, done, src.add(done), dst.add(done), dim - done);
            }
        }
    }
}

/// Writes units of whole blocks, and returns the number of elements in them. With `DIVIDES`, quotients are those by a scale.
///
/// # Safety
/// `n` elements are readable at `src` and `n` units writable at `dst`.
#[inline(always)]
unsafe fn units<S: Simd, A: LoadStore, U: Fp8, const DIVIDES: bool>(
    s: S,
    src: *const A,
    dst: *mut U,
    n: usize,
    scale: f32,
    by: &Reciprocal<S>,
) -> usize {
    // What is larger becomes the largest number, and NaN stays.
    let largest = s.splat(U::MAX * scale);
    let mut i = 0;
    while i + BLOCK <= n {
        let (mut x, mut magnitudes) = ([s.zero(); MAX_VECTORS], [s.zero(); MAX_VECTORS]);
        // SAFETY: the caller's. A unit is a byte.
        unsafe {
            for j in 0..BLOCK / S::LANES {
                x[j] = A::load(s, src.add(i + j * S::LANES));
                let magnitude = s.min(largest, s.abs(x[j]));
                magnitudes[j] = if DIVIDES { by.quotient(s, magnitude) } else { magnitude };
            }
            s.store_fp8::<U>(dst.add(i).cast(), &magnitudes, &x);
        }
        i += BLOCK;
    }
    i
}

/// Elements as units of a scale.
struct ToUnits(f32);

impl<A: LoadStore, U: Fp8> Converted<A, U> for ToUnits {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, s: S, _: usize, src: *const A, dst: *mut U, n: usize) {
        let (dst, scale, divides) = (dst.cast::<u8>(), s.splat(self.0), self.0 != 1.0);
        let mut i = 0;
        while i < n {
            // SAFETY: the caller's; a part is what is left. A unit is a byte.
            unsafe {
                let whole = i + S::LANES <= n;
                let v = if whole { A::load(s, src.add(i)) } else { A::load_part(s, src.add(i), n - i) };
                let units = rounded::<S, U>(s, if divides { s.div(v, scale) } else { v });
                if whole {
                    s.store_low_bytes(dst.add(i), units);
                } else {
                    s.store_part_low_bytes(dst.add(i), units, n - i);
                }
            }
            i += S::LANES;
        }
    }
}

/// Reads `heads` vectors of units, multiplied by their scales.
///
/// # Safety
/// As [`encode`]; the target does not overlap units and scales.
#[inline(always)]
pub(crate) unsafe fn decode<S: Simd, U: Fp8, B: LoadStore>(s: S, args: &ScaledArgs) {
    let c = &args.copy;
    for head in 0..c.heads as isize {
        let src = c.src.cast::<U>().wrapping_offset(head * c.src_head);
        let dst = c.dst.cast::<B>().wrapping_offset(head * c.dst_head);
        // SAFETY: the caller's.
        unsafe {
            let elements = ToElements(scale_of(args, head));
            convert(s, (src, c.src_dim), (dst, c.dst_dim), c.dim, &elements);
        }
    }
}
