//! RMS norm of heads (Zhang and Sennrich, <https://arxiv.org/abs/1910.07467>): `y = x * w / sqrt(mean(x^2) + eps)`.
//!
//! The sum of squares is f64, in which the square of an f32 is exact and cannot overflow. Element i is added to sum i
//! % 16, and the sixteen sums are added by one tree. So every level adds the same numbers in the same order and has
//! the same root. The root is rounded to f32 once; `x * root` and the product with the weight are rounded once each.
//!
//! Bound by memory for f32 beyond the second-level cache. f16 and bf16 have half the bytes and are bound by arithmetic
//! as much: on AVX-512, sixteen squares in f64 take seven vector operations beside the widening of the elements, and to scale them and
//! round the products to bf16 takes ten. A head is read twice, the second time from the first-level cache. Several heads are processed
//! together, first their sums, then their roots, to overlap the latency of the roots.

use super::copy::{self, Converted, STAGE};
use crate::kernels::api::NormArgs;
use crate::kernels::simd::{LoadStore, MAX_LANES, Simd};
use std::mem::MaybeUninit;

/// Independent sums; [`STAGE`] is a multiple of it.
const SUMS: usize = MAX_LANES;
/// Heads whose roots are computed together; few enough to stay in the first-level cache.
const HEADS: usize = 8;

/// Normalises `heads` vectors separately.
///
/// # Safety
/// Every address that `args` describes is valid; `weight` is null or `dim` weights are readable; source and target are the
/// same elements or do not overlap.
#[inline(always)]
pub(crate) unsafe fn rms_norm<S: Simd, A: LoadStore, B: LoadStore>(s: S, args: &NormArgs) {
    let c = &args.copy;
    let source = |head: usize| c.src.cast::<A>().wrapping_offset(head as isize * c.src_head);
    for first in (0..c.heads).step_by(HEADS) {
        let heads = first..(first + HEADS).min(c.heads);
        let mut roots = [1.0; HEADS];
        for (squares, head) in roots.iter_mut().zip(heads.clone()) {
            let dst = c.dst.cast::<B>().wrapping_offset(head as isize * c.dst_head);
            copy::ask_for_next::<S, A, B>(s, c, source(head), dst, c.dim);
            // SAFETY: the caller's.
            *squares = unsafe { sum_of_squares::<S, A>(s, source(head), c.src_dim, c.dim) };
        }
        let roots = roots.map(|squares| (1.0 / (squares / c.dim as f64 + f64::from(args.eps)).sqrt()) as f32);
        for (root, head) in roots.into_iter().zip(heads) {
            let dst = c.dst.cast::<B>().wrapping_offset(head as isize * c.dst_head);
            // SAFETY: the caller's.
            unsafe {
                let scaled = Scaled { weight: args.weight, root };
                copy::convert(s, (source(head), c.src_dim), (dst, c.dst_dim), c.dim, &scaled);
            }
        }
    }
}

/// Multiplies by root and weights, which may be null.
struct Scaled {
    weight: *const f32,
    root: f32,
}

impl<A: LoadStore, B: LoadStore> Converted<A, B> for Scaled {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, s: S, first: usize, src: *const A, dst: *mut B, n: usize) {
        let weight = if self.weight.is_null() { self.weight } else { self.weight.wrapping_add(first) };
        // SAFETY: the caller's.
        unsafe { scale::<S, A, B>(s, src, dst, weight, self.root, n) };
    }
}

/// # Safety
/// `n` elements are readable at `src` with that stride.
#[inline(always)]
unsafe fn sum_of_squares<S: Simd, A: LoadStore>(s: S, src: *const A, stride: isize, n: usize) -> f64 {
    let mut sums = [0.0f64; SUMS];
    let mut stage = MaybeUninit::<[A; STAGE]>::uninit();
    let stage: *mut A = stage.as_mut_ptr().cast();
    let mut done = 0;
    while done < n {
        let len = if stride == 1 { n } else { (n - done).min(STAGE) };
        let mut from = src.wrapping_offset(done as isize * stride);
        // SAFETY: the caller's; len fits the stage where it is used.
        unsafe {
            if stride != 1 {
                copy::gather(from, stride, stage, len);
                from = stage;
            }
            add_squares::<S, A>(s, from, len, &mut sums);
        }
        done += len;
    }
    let mut width = SUMS;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] += sums[i + width];
        }
    }
    sums[0]
}

/// # Safety
/// `n` elements are readable at `src`.
#[inline(always)]
unsafe fn add_squares<S: Simd, A: LoadStore>(s: S, src: *const A, n: usize, sums: &mut [f64; SUMS]) {
    let mut i = 0;
    // SAFETY: the caller's; a part is what is left.
    unsafe {
        while i + SUMS <= n {
            for first in (0..SUMS).step_by(S::LANES) {
                s.add_squares(A::load(s, src.add(i + first)), sums, first);
            }
            i += SUMS;
        }
        for first in (0..n - i).step_by(S::LANES) {
            let (from, left) = (src.add(i + first), n - i - first);
            // Missing elements at the end are 0, which changes no sum.
            let x = if left < S::LANES { A::load_part(s, from, left) } else { A::load(s, from) };
            s.add_squares(x, sums, first);
        }
    }
}

/// `dst = src * root * weight`, from left to right.
///
/// # Safety
/// `n` elements are readable at `src` and writable at `dst`; `weight` is null or `n` weights are readable.
#[inline(always)]
unsafe fn scale<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    src: *const A,
    dst: *mut B,
    weight: *const f32,
    root: f32,
    n: usize,
) {
    let factor = s.splat(root);
    let mut i = 0;
    // SAFETY: so many elements are left; loads precede stores, so that in-place calls are valid.
    unsafe {
        while const { S::WRITES_SEVERAL } && i + 4 * S::LANES <= n {
            let mut v = [s.zero(); 4];
            for (j, v) in v.iter_mut().enumerate() {
                *v = scaled(s, src, weight, factor, i + j * S::LANES);
            }
            B::store_four(s, dst.add(i), v);
            i += 4 * S::LANES;
        }
        while i + S::LANES <= n {
            B::store(s, dst.add(i), scaled(s, src, weight, factor, i));
            i += S::LANES;
        }
    }
    if i < n {
        let rest = n - i;
        // SAFETY: rest elements are left.
        unsafe {
            let mut v = s.mul(A::load_part(s, src.add(i), rest), factor);
            if !weight.is_null() {
                v = s.mul(v, s.load_part_f32(weight.add(i), rest));
            }
            B::store_part(s, dst.add(i), v, rest);
        }
    }
}

/// A vector of elements from `i` on, scaled.
///
/// # Safety
/// As [`scale`], of a vector from `i` on.
#[inline(always)]
unsafe fn scaled<S: Simd, A: LoadStore>(s: S, src: *const A, weight: *const f32, factor: S::V, i: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let v = s.mul(A::load(s, src.add(i)), factor);
        if weight.is_null() { v } else { s.mul(v, s.load_f32(weight.add(i))) }
    }
}
