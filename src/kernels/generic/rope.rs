//! Rotary position embedding (Su et al., <https://arxiv.org/abs/2104.09864>), and the angles for it.
//!
//! A pair `(x0, x1)` at angle a becomes `(x0 cos a - x1 sin a, x1 cos a + x0 sin a)`. The elements of a half-split
//! pair are `rotary_dim / 2` apart; those of an interleaved pair are adjacent. Both are computed as `fma(x0, cos, -(x1
//! * sin))`, `fma(x1, cos, x0 * sin)`. Bound by memory: two multiplications and two FMAs per pair.

use super::copy;
use crate::kernels::api::RopeArgs;
use crate::kernels::simd::{LoadStore, Simd};
use crate::problem::rotation::Pairing;

/// Pairs per step; the interleaved form duplicates their cosines and sines on the stack.
const CHUNK: usize = copy::STAGE / 2;

/// Rotates `heads` vectors by the same angles and copies the elements beyond `rotary_dim`.
///
/// # Safety
/// Every address that `args` describes is valid; source and target are the same elements or do not overlap.
#[inline(always)]
pub(crate) unsafe fn rope<S: Simd, A: LoadStore, B: LoadStore>(s: S, args: &RopeArgs) {
    let half = args.rotary_dim / 2;
    let mut first = 0;
    while first < half {
        let pairs = (half - first).min(CHUNK);
        // SAFETY: first + pairs <= half angles are readable.
        let (cos, sin) = unsafe { (args.cos.add(first), args.sin.add(first)) };
        // SAFETY: the caller's.
        unsafe {
            match args.pairing {
                Pairing::HalfSplit => half_split::<S, A, B>(s, args, first, pairs, cos, sin),
                Pairing::Interleaved => interleaved::<S, A, B>(s, args, first, pairs, cos, sin),
            }
        }
        first += pairs;
    }
    let in_place = args.src.addr() == args.dst.addr() && A::DTYPE == B::DTYPE;
    if args.rotary_dim < args.dim && !in_place {
        let rest = crate::kernels::api::CopyArgs {
            src: args.src.cast::<A>().wrapping_offset(args.rotary_dim as isize * args.copy.src_dim).cast(),
            dst: args.dst.cast::<B>().wrapping_offset(args.rotary_dim as isize * args.copy.dst_dim).cast(),
            dim: args.dim - args.rotary_dim,
            src_prefetch: 0,
            dst_prefetch: 0,
            ..args.copy
        };
        // SAFETY: the caller's.
        unsafe { copy::copy::<S, A, B>(s, &rest) };
    }
}

/// # Safety
/// As [`rope`]; `pairs` cosines and sines are readable.
#[inline(always)]
unsafe fn half_split<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    args: &RopeArgs,
    first: usize,
    pairs: usize,
    cos: *const f32,
    sin: *const f32,
) {
    let half = (args.rotary_dim / 2) as isize;
    let c = &args.copy;
    for head in 0..c.heads as isize {
        let x0 = c.src.cast::<A>().wrapping_offset(head * c.src_head + first as isize * c.src_dim);
        let y0 = c.dst.cast::<B>().wrapping_offset(head * c.dst_head + first as isize * c.dst_dim);
        if first == 0 {
            copy::ask_for_next::<S, A, B>(s, c, x0, y0, c.dim);
        }
        let x1 = x0.wrapping_offset(half * c.src_dim);
        let y1 = y0.wrapping_offset(half * c.dst_dim);
        if c.src_dim == 1 && c.dst_dim == 1 {
            // SAFETY: the caller's.
            unsafe { rotate_halves::<S, A, B>(s, x0, x1, y0, y1, cos, sin, pairs) };
        } else {
            let mut x = [A::default(); 2 * CHUNK];
            let mut y = [B::default(); 2 * CHUNK];
            let (px, py) = (x.as_mut_ptr(), y.as_mut_ptr());
            // SAFETY: the caller's; the buffers hold two chunks.
            unsafe {
                copy::gather(x0, c.src_dim, px, pairs);
                copy::gather(x1, c.src_dim, px.add(CHUNK), pairs);
                rotate_halves::<S, A, B>(s, px, px.add(CHUNK), py, py.add(CHUNK), cos, sin, pairs);
                copy::scatter(py, y0, c.dst_dim, pairs);
                copy::scatter(py.add(CHUNK), y1, c.dst_dim, pairs);
            }
        }
    }
}

/// The pairs `(a, b)` rotated by angles with cosines `c` and sines `d`.
#[inline(always)]
fn rotate<S: Simd>(s: S, a: S::V, b: S::V, c: S::V, d: S::V) -> (S::V, S::V) {
    // The sign is applied to the sine, as in the interleaved form; negation is exact.
    let minus = s.mul(b, s.sub(s.splat(-0.0), d));
    (s.fma(a, c, minus), s.fma(b, c, s.mul(a, d)))
}

/// # Safety
/// `n` elements are valid at every pointer.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn rotate_halves<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    x0: *const A,
    x1: *const A,
    y0: *mut B,
    y1: *mut B,
    cos: *const f32,
    sin: *const f32,
    n: usize,
) {
    let mut i = 0;
    while i + S::LANES <= n {
        // SAFETY: i + LANES <= n; both loads precede both stores, so that in-place calls are valid.
        unsafe {
            let (a, b) = (A::load(s, x0.add(i)), A::load(s, x1.add(i)));
            let (a, b) = rotate(s, a, b, s.load_f32(cos.add(i)), s.load_f32(sin.add(i)));
            B::store(s, y0.add(i), a);
            B::store(s, y1.add(i), b);
        }
        i += S::LANES;
    }
    if i < n {
        let rest = n - i;
        // SAFETY: rest elements are left.
        unsafe {
            let (a, b) = (A::load_part(s, x0.add(i), rest), A::load_part(s, x1.add(i), rest));
            let (c, d) = (s.load_part_f32(cos.add(i), rest), s.load_part_f32(sin.add(i), rest));
            let (a, b) = rotate(s, a, b, c, d);
            B::store_part(s, y0.add(i), a, rest);
            B::store_part(s, y1.add(i), b, rest);
        }
    }
}

/// # Safety
/// As [`rope`]; `pairs` cosines and sines are readable.
#[inline(always)]
unsafe fn interleaved<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    args: &RopeArgs,
    first: usize,
    pairs: usize,
    cos: *const f32,
    sin: *const f32,
) {
    // x cos + swap(x) sin', with sin' = -sin in even lanes: no shuffle of results.
    let mut cosines = [0.0f32; 2 * CHUNK];
    let mut sines = [0.0f32; 2 * CHUNK];
    for i in 0..pairs {
        // SAFETY: pairs angles are readable.
        let (c, d) = unsafe { (*cos.add(i), *sin.add(i)) };
        (cosines[2 * i], cosines[2 * i + 1]) = (c, c);
        (sines[2 * i], sines[2 * i + 1]) = (-d, d);
    }
    let c = &args.copy;
    let n = 2 * pairs;
    for head in 0..c.heads as isize {
        let x = c.src.cast::<A>().wrapping_offset(head * c.src_head + 2 * first as isize * c.src_dim);
        let y = c.dst.cast::<B>().wrapping_offset(head * c.dst_head + 2 * first as isize * c.dst_dim);
        if first == 0 {
            copy::ask_for_next::<S, A, B>(s, c, x, y, c.dim);
        }
        if c.src_dim == 1 && c.dst_dim == 1 {
            // SAFETY: the caller's.
            unsafe { rotate_pairs::<S, A, B>(s, x, y, cosines.as_ptr(), sines.as_ptr(), n) };
        } else {
            let mut from = [A::default(); 2 * CHUNK];
            let mut to = [B::default(); 2 * CHUNK];
            // SAFETY: the caller's; the buffers hold two chunks.
            unsafe {
                copy::gather(x, c.src_dim, from.as_mut_ptr(), n);
                rotate_pairs::<S, A, B>(s, from.as_ptr(), to.as_mut_ptr(), cosines.as_ptr(), sines.as_ptr(), n);
                copy::scatter(to.as_ptr(), y, c.dst_dim, n);
            }
        }
    }
}

/// # Safety
/// `n` elements are valid at every pointer; `n` is even.
#[inline(always)]
unsafe fn rotate_pairs<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    x: *const A,
    y: *mut B,
    cos: *const f32,
    sin: *const f32,
    n: usize,
) {
    let mut i = 0;
    while i + S::LANES <= n {
        // SAFETY: i + LANES <= n.
        unsafe {
            let v = A::load(s, x.add(i));
            let r = s.fma(v, s.load_f32(cos.add(i)), s.mul(s.swap_pairs(v), s.load_f32(sin.add(i))));
            B::store(s, y.add(i), r);
        }
        i += S::LANES;
    }
    if i < n {
        let rest = n - i;
        // SAFETY: rest elements are left; LANES and n are even, so that no pair is split.
        unsafe {
            let v = A::load_part(s, x.add(i), rest);
            let (c, d) = (s.load_part_f32(cos.add(i), rest), s.load_part_f32(sin.add(i), rest));
            B::store_part(s, y.add(i), s.fma(v, c, s.mul(s.swap_pairs(v), d)), rest);
        }
    }
}

/// Cosines and sines of `position * inv_freq[i]`, times `magnitude`.
///
/// The angle is computed and reduced in f64, so that it is exact to the last bit of an f32 at position 10^6. The loop
/// has no branch and no call, and each operation rounds once, so that every level computes the same bits.
#[inline(always)]
pub(crate) fn angles(position: f64, inv_freq: &[f64], magnitude: f64, cos: &mut [f32], sin: &mut [f32]) {
    // pi/2 in two parts of 22 bits and a remainder. The first two products, and their differences from x, are exact
    // for |n| < 2^31, hence for every 32-bit position (Cody and Waite, as in fdlibm's e_rem_pio2.c, with shorter
    // parts).
    const PIO2_1: f64 = 1.570_796_012_878_418;
    const PIO2_2: f64 = 3.139_164_164_167_596e-7;
    const PIO2_3: f64 = 6.223_372_171_896_613e-14;
    // 1.5 * 2^52: adding it rounds to an integer, whose low bits are the low bits of the sum.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let n = inv_freq.len().min(cos.len()).min(sin.len());
    let (inv_freq, cos, sin) = (&inv_freq[..n], &mut cos[..n], &mut sin[..n]);
    for i in 0..n {
        let x = position * inv_freq[i];
        let shifted = x * std::f64::consts::FRAC_2_PI + ROUND;
        let turns = shifted - ROUND;
        let quadrant = shifted.to_bits();
        let r = ((x - turns * PIO2_1) - turns * PIO2_2) - turns * PIO2_3;
        let z = r * r;
        // Taylor series; the first omitted term is below 1e-13 for |r| <= pi/4.
        let s = r + r
            * z
            * (-1.0 / 6.0
                + z * (1.0 / 120.0 + z * (-1.0 / 5040.0 + z * (1.0 / 362_880.0 + z * (-1.0 / 39_916_800.0)))));
        let c = 1.0
            + z * (-0.5
                + z * (1.0 / 24.0
                    + z * (-1.0 / 720.0 + z * (1.0 / 40_320.0 + z * (-1.0 / 3_628_800.0 + z / 479_001_600.0)))));
        let swap = quadrant & 1 != 0;
        let (a, b) = if swap { (c, s) } else { (s, c) };
        let sin_sign = (quadrant & 2) << 62;
        let cos_sign = ((quadrant + 1) & 2) << 62;
        sin[i] = (f64::from_bits(a.to_bits() ^ sin_sign) * magnitude) as f32;
        cos[i] = (f64::from_bits(b.to_bits() ^ cos_sign) * magnitude) as f32;
    }
}
