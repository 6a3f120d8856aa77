//! Rotary position embedding (Su et al., <https://arxiv.org/abs/2104.09864>), and the angles for it.
//!
//! A pair `(x0, x1)` at angle a becomes `(x0 cos a - x1 sin a, x1 cos a + x0 sin a)`. The elements of a half-split
//! pair are `rotary_dim / 2` apart; those of an interleaved pair are adjacent. Both are computed as `fma(x0, cos, -(x1
//! * sin))`, `fma(x1, cos, x0 * sin)`. Bound by memory: two multiplications and two FMAs per pair.

use super::copy;
use crate::kernels::api::RopeArgs;
use crate::kernels::simd::{LoadStore, Simd, deinterleaved};
use crate::problem::rotation::Pairing;
use std::mem::MaybeUninit;

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
    let contiguous = c.src_dim == 1 && c.dst_dim == 1;
    let mut stage = Stage::<A, B>::new();
    let mut separated = [MaybeUninit::<f32>::uninit(); 2 * CHUNK];
    // Pairs at the beginning that are loaded and stored as even and odd elements.
    let together = if const { deinterleaved::<S, A>() && deinterleaved::<S, B>() } && contiguous {
        // SAFETY: the caller's; the buffer holds two chunks.
        unsafe { separate(s, [cos, sin], pairs, separated.as_mut_ptr().cast()) }
    } else {
        0
    };
    let mut x0 = c.src.cast::<A>().wrapping_offset(first as isize * c.src_dim);
    let mut y0 = c.dst.cast::<B>().wrapping_offset(first as isize * c.dst_dim);
    for _ in 0..c.heads {
        if first == 0 {
            copy::ask_for_next::<S, A, B>(s, c, x0, y0, c.dim);
        }
        let x = [x0, x0.wrapping_offset(half * c.src_dim)];
        let y = [y0, y0.wrapping_offset(half * c.dst_dim)];
        let (mut from, mut to) = (x, y);
        // SAFETY: the caller's; the buffers hold two chunks.
        unsafe {
            if !contiguous {
                let (gathered, rotated) = stage.halves();
                for (x, gathered) in x.into_iter().zip(gathered) {
                    copy::gather(x, c.src_dim, gathered, pairs);
                }
                (from, to) = ([gathered[0].cast_const(), gathered[1].cast_const()], rotated);
            }
            if const { deinterleaved::<S, A>() && deinterleaved::<S, B>() } {
                rotate_separated::<S, A, B>(s, from, to, separated.as_ptr().cast(), together);
            }
            rotate_halves::<S, A, B>(s, from, to, [cos, sin], together, pairs);
            if !contiguous {
                for (to, y) in to.into_iter().zip(y) {
                    copy::scatter(to, y, c.dst_dim, pairs);
                }
            }
        }
        x0 = x0.wrapping_offset(c.src_head);
        y0 = y0.wrapping_offset(c.dst_head);
    }
}

/// Where elements with strides lie together: those of two chunks before and after.
struct Stage<A, B> {
    from: [MaybeUninit<A>; 2 * CHUNK],
    to: [MaybeUninit<B>; 2 * CHUNK],
}

impl<A, B> Stage<A, B> {
    #[inline(always)]
    fn new() -> Self {
        Self { from: [const { MaybeUninit::uninit() }; 2 * CHUNK], to: [const { MaybeUninit::uninit() }; 2 * CHUNK] }
    }

    /// Either half of both.
    #[inline(always)]
    fn halves(&mut self) -> ([*mut A; 2], [*mut B; 2]) {
        let (from, to) = (self.from.as_mut_ptr().cast::<A>(), self.to.as_mut_ptr().cast::<B>());
        ([from, from.wrapping_add(CHUNK)], [to, to.wrapping_add(CHUNK)])
    }
}

/// Separates even and odd cosines and sines of whole pairs of vectors: `[even cosines, odd cosines, even sines, odd sines]` for each
/// pair. Returns how many cosines it took: none if one of them or of the sines is not finite, see [`Simd::store_pair_bf16_short`].
///
/// # Safety
/// `n` elements are readable at both, and `2 * n` floats writable at `to`.
#[inline(always)]
unsafe fn separate<S: Simd>(s: S, from: [*const f32; 2], n: usize, to: *mut f32) -> usize {
    let step = 2 * S::LANES;
    let whole = n / step * step;
    for i in (0..whole).step_by(step) {
        for (which, from) in from.into_iter().enumerate() {
            // SAFETY: i + step <= n.
            unsafe {
                let (a, b) = (s.load_f32(from.add(i)), s.load_f32(from.add(i + S::LANES)));
                if !(s.all_finite(a) && s.all_finite(b)) {
                    return 0;
                }
                let parts = s.deinterleave(a, b);
                for (part, v) in parts.into_iter().enumerate() {
                    s.store_f32(to.add(2 * i + which * step + part * S::LANES), v);
                }
            }
        }
    }
    whole
}

/// The first `n` pairs, even and odd elements apart.
///
/// # Safety
/// `n` elements are valid at every pointer, and [`separate`] has written their angles.
#[inline(always)]
unsafe fn rotate_separated<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    x: [*const A; 2],
    y: [*mut B; 2],
    angles: *const f32,
    n: usize,
) {
    for i in (0..n).step_by(2 * S::LANES) {
        // SAFETY: n is a multiple of two vectors; all loads precede the stores, so that in-place calls are valid.
        unsafe {
            let (a, b) = (A::load_pair(s, x[0].add(i)), A::load_pair(s, x[1].add(i)));
            let angle = |k: usize| s.load_f32(angles.add(2 * i + k * S::LANES));
            let (even0, even1) = rotate(s, a[0], b[0], angle(0), angle(2));
            let (odd0, odd1) = rotate(s, a[1], b[1], angle(1), angle(3));
            s.store_pair_bf16_short(y[0].add(i).cast(), [even0, odd0]);
            s.store_pair_bf16_short(y[1].add(i).cast(), [even1, odd1]);
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

/// Vectors of either half that are loaded before any is stored: neighbouring lines in their order.
const AT_ONCE: usize = 4;

/// The pairs from number `i` to `n`.
///
/// # Safety
/// `n` elements are valid at every pointer.
#[inline(always)]
unsafe fn rotate_halves<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    x: [*const A; 2],
    y: [*mut B; 2],
    [cos, sin]: [*const f32; 2],
    mut i: usize,
    n: usize,
) {
    while i + AT_ONCE * S::LANES <= n {
        let mut v = [[s.zero(); AT_ONCE]; 2];
        // SAFETY: as many vectors are left; all loads precede the stores, so that in-place calls are valid.
        unsafe {
            for half in 0..2 {
                for j in 0..AT_ONCE {
                    v[half][j] = A::load(s, x[half].add(i + j * S::LANES));
                }
            }
            for j in 0..AT_ONCE {
                let at = i + j * S::LANES;
                (v[0][j], v[1][j]) = rotate(s, v[0][j], v[1][j], s.load_f32(cos.add(at)), s.load_f32(sin.add(at)));
            }
            for half in 0..2 {
                for j in 0..AT_ONCE {
                    B::store(s, y[half].add(i + j * S::LANES), v[half][j]);
                }
            }
        }
        i += AT_ONCE * S::LANES;
    }
    while i + S::LANES <= n {
        // SAFETY: i + LANES <= n; both loads precede both stores, so that in-place calls are valid.
        unsafe {
            let (a, b) = (A::load(s, x[0].add(i)), A::load(s, x[1].add(i)));
            let (a, b) = rotate(s, a, b, s.load_f32(cos.add(i)), s.load_f32(sin.add(i)));
            B::store(s, y[0].add(i), a);
            B::store(s, y[1].add(i), b);
        }
        i += S::LANES;
    }
    if i < n {
        let rest = n - i;
        // SAFETY: rest elements are left.
        unsafe {
            let (a, b) = (A::load_part(s, x[0].add(i), rest), A::load_part(s, x[1].add(i), rest));
            let (c, d) = (s.load_part_f32(cos.add(i), rest), s.load_part_f32(sin.add(i), rest));
            let (a, b) = rotate(s, a, b, c, d);
            B::store_part(s, y[0].add(i), a, rest);
            B::store_part(s, y[1].add(i), b, rest);
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
    let contiguous = c.src_dim == 1 && c.dst_dim == 1;
    let mut stage = Stage::<A, B>::new();
    for head in 0..c.heads as isize {
        let x = c.src.cast::<A>().wrapping_offset(head * c.src_head + 2 * first as isize * c.src_dim);
        let y = c.dst.cast::<B>().wrapping_offset(head * c.dst_head + 2 * first as isize * c.dst_dim);
        if first == 0 {
            copy::ask_for_next::<S, A, B>(s, c, x, y, c.dim);
        }
        let (mut from, mut to) = (x, y);
        // SAFETY: the caller's; the buffers hold two chunks.
        unsafe {
            if !contiguous {
                let ([gathered, _], [rotated, _]) = stage.halves();
                copy::gather(x, c.src_dim, gathered, n);
                (from, to) = (gathered, rotated);
            }
            rotate_pairs::<S, A, B>(s, from, to, cosines.as_ptr(), sines.as_ptr(), n);
            if !contiguous {
                copy::scatter(to, y, c.dst_dim, n);
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
