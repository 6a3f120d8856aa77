//! Exponential and hyperbolic tangent over the vector trait.

use crate::kernels::simd::Simd;

/// 1.5 * 2^23: a sum with it has no fraction bits, so that it is rounded to the nearest integer, which its lowest bits are.
const SHIFT: f32 = 12_582_912.0;

/// Below this, e^x is less than the smallest normal f32 and is replaced by 0, because subnormal weights cost hundreds
/// of cycles each and change no sum.
const EXP_MIN: f32 = -87.336_54;

/// e^x for x <= 88, with a relative error of at most 1.2e-7, which is less than 1 ulp; 0 below [`EXP_MIN`] (so for
/// -inf too), NaN for NaN.
///
/// Cody-Waite reduction by ln 2 in two parts, then the polynomial of degree 6 of Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let floor = s.splat(EXP_MIN);
    // NaN compares false and is kept; -inf is replaced before it can become inf - inf.
    let y = s.select_lt(x, floor, floor, x);
    let shifted = s.add(s.mul(y, s.splat(std::f32::consts::LOG2_E)), s.splat(SHIFT));
    let n = s.sub(shifted, s.splat(SHIFT));
    let r = s.fma(n, s.splat(-0.693_359_4), y);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let p = s.splat(1.987_569_1e-4);
    let p = s.fma(p, r, s.splat(1.398_199_9e-3));
    let p = s.fma(p, r, s.splat(8.333_452e-3));
    let p = s.fma(p, r, s.splat(4.166_579_6e-2));
    let p = s.fma(p, r, s.splat(1.666_666_5e-1));
    let p = s.fma(p, r, s.splat(0.5));
    let p = s.fma(p, s.mul(r, r), s.add(r, s.splat(1.0)));
    s.select_lt(x, floor, s.zero(), s.mul(p, s.exp2i(shifted)))
}

/// Coefficients of polynomials for 2^x, the highest power first: the least relative error among those with 2^0 = 1 (Lawson's
/// algorithm). Some are near ln 2, but fitted.
///
/// For x in [-1/2, 1/2]; error 9.2e-8 before rounding.
#[allow(clippy::approx_constant)]
const EXP2_OF_REMAINDER: [f32; 6] = [1.326_472_8e-3, 9.671_513e-3, 5.550_733_6e-2, 2.402_224_2e-1, 6.931_47e-1, 1.0];
/// For x in [0, 1); error 3e-6.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::approx_constant)]
pub(crate) const EXP2_OF_FRACTION: [f32; 5] = [1.342_666_9e-2, 5.224_250_4e-2, 0.241_280_19, 0.693_044_85, 1.0];
/// For x in [0, 1); error 9e-8.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::approx_constant)]
pub(crate) const EXP2_OF_FRACTION_HIGH: [f32; 6] =
    [1.867_138_4e-3, 9.017_009e-3, 5.579_993e-2, 0.240_164_44, 0.693_151_3, 1.0];

/// A polynomial by Horner's scheme; coefficients of the highest power first.
#[inline(always)]
pub(crate) fn polynomial<S: Simd, const N: usize>(s: S, x: S::V, coefficients: [f32; N]) -> S::V {
    let mut p = s.splat(coefficients[0]);
    for &c in &coefficients[1..] {
        p = s.fma(p, x, s.splat(c));
    }
    p
}

/// 2^x for x <= 127, with a relative error of at most 1.8e-7, or 2e-7 where a level rounds products and sums apart; 0
/// below -126 (so for -inf too), NaN for NaN, 1 for 0.
///
/// The remainder to the nearest integer goes through the polynomial, and the integer becomes the exponent of a factor. Added to the
/// exponent of the polynomial itself, it would save a multiplication, and would make numbers of NaNs by the last bits of their payloads.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    let shifted = s.add(x, s.splat(SHIFT));
    let remainder = s.sub(x, s.sub(shifted, s.splat(SHIFT)));
    let p = polynomial(s, remainder, EXP2_OF_REMAINDER);
    s.clear_lt(x, s.splat(-126.0), s.mul(p, s.exp2i(shifted)))
}

/// 2^x of one number, with the bits of [`exp2`] on a vector.
#[inline(always)]
pub(crate) fn exp2_1<S: Simd>(s: S, x: f32) -> f32 {
    lane0(s, exp2(s, s.splat(x)))
}

/// The first lane.
#[inline(always)]
pub(crate) fn lane0<S: Simd>(s: S, v: S::V) -> f32 {
    let mut lane = 0.0;
    // SAFETY: one f32 is stored to one f32.
    unsafe { s.store_part_f32(&mut lane, v, 1) };
    lane
}

/// tanh x, with a relative error of at most 1.5e-7, which is less than 2 ulp; NaN for NaN.
///
/// Near 0, where 1 - 2 / (e^2x + 1) would cancel, an odd polynomial (Cephes' `tanhf`). Beyond 9.1 the result is 1 to
/// the last bit.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let a = s.abs(x);
    let z = s.mul(x, x);
    let p = s.splat(-5.704_988_7e-3);
    let p = s.fma(p, z, s.splat(2.063_909e-2));
    let p = s.fma(p, z, s.splat(-5.373_971_6e-2));
    let p = s.fma(p, z, s.splat(1.333_144_2e-1));
    let p = s.fma(p, z, s.splat(-3.333_328e-1));
    let small = s.fma(s.mul(p, z), x, x);
    let limit = s.splat(9.1);
    let clamped = s.select_lt(limit, a, limit, a);
    let e = exp(s, s.add(clamped, clamped));
    let one = s.splat(1.0);
    let large = s.sub(one, s.div(s.splat(2.0), s.add(e, one)));
    s.select_lt(a, s.splat(0.625), small, s.copysign(large, x))
}
