//! The portable level: four f32 at a time in plain Rust, which the compiler vectorises for the baseline of the target
//! (SSE2 on x86-64). Products and sums are rounded separately, because a fused multiply-add would be a library call on
//! most baselines.

use super::generic::fp8::{E4m3, E5m2};
use super::simd::{MAX_LANES, Simd, copy_part};
use crate::cpu::level_features;
use crate::dtype::Element;
use crate::kernels::shells::{kernel_shells, kernel_table};
use crate::kernels::simd::outline;
use half::{bf16, f16};

/// Proof of the level's features, of which there are none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

impl Scalar {
    /// # Safety
    /// None. The level needs no feature; the signature is that of the other levels.
    #[inline(always)]
    pub unsafe fn new_unchecked() -> Self {
        Self
    }
}

type V = [f32; 4];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

#[inline(always)]
fn map(a: V, f: impl Fn(f32) -> f32) -> V {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

// Conversions take dozens of instructions without those of a CPU: they are calls, or this level would be half of the library.

/// # Safety
/// Four elements are readable.
#[inline(never)]
unsafe fn load<T: Element>(p: *const T) -> V {
    // SAFETY: the caller's.
    unsafe { [(*p).to_f32(), (*p.add(1)).to_f32(), (*p.add(2)).to_f32(), (*p.add(3)).to_f32()] }
}

/// # Safety
/// `n` elements are writable.
#[inline(never)]
unsafe fn store<T: Element>(p: *mut T, v: V, n: usize) {
    for (i, &x) in v.iter().enumerate().take(n) {
        // SAFETY: the caller's.
        unsafe { *p.add(i) = T::from_f32(x) };
    }
}

/// # Safety
/// Four bytes are readable.
#[inline(never)]
unsafe fn load_bytes<T: Copy>(p: *const T, to_f32: impl Fn(T) -> f32) -> V {
    // SAFETY: the caller's.
    std::array::from_fn(|i| to_f32(unsafe { *p.add(i) }))
}

impl Simd for Scalar {
    type V = V;
    const LANES: usize = 4;
    const TILE_VECTORS: usize = 2;
    const PARALLEL_DOTS: usize = 8;
    const DEINTERLEAVED_BF16: bool = false;
    const FEW_LOOPS: bool = true;

    level_features!(Scalar, outline! {});

    #[inline(always)]
    fn lane_order(i: usize) -> usize {
        i
    }
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; 4]
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        [
            if a[0] < b[0] { x[0] } else { y[0] },
            if a[1] < b[1] { x[1] } else { y[1] },
            if a[2] < b[2] { x[2] } else { y[2] },
            if a[3] < b[3] { x[3] } else { y[3] },
        ]
    }
    #[inline(always)]
    fn lt_bits(self, a: V, b: V) -> u64 {
        (0..4).map(|i| u64::from(a[i] < b[i]) << i).sum()
    }
    #[inline(always)]
    fn select_bits(self, bits: u64, x: V, y: V) -> V {
        [
            if bits & 1 != 0 { x[0] } else { y[0] },
            if bits & 2 != 0 { x[1] } else { y[1] },
            if bits & 4 != 0 { x[2] } else { y[2] },
            if bits & 8 != 0 { x[3] } else { y[3] },
        ]
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        map(a, f32::abs)
    }
    #[inline(always)]
    fn copysign(self, a: V, b: V) -> V {
        map2(a, b, f32::copysign)
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        // 1.5 * 2^23: the sum has no fraction bits, and the addition rounds to even.
        map(a, |x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn exp2i(self, n: V) -> V {
        map(n, |n| f32::from_bits(1f32.to_bits().wrapping_add(n.to_bits() << 23)))
    }
    #[inline(always)]
    fn swap_pairs(self, a: V) -> V {
        [a[1], a[0], a[3], a[2]]
    }
    #[inline(always)]
    fn add_bits(self, a: V, b: V) -> V {
        map2(a, b, |a, b| f32::from_bits(a.to_bits().wrapping_add(b.to_bits())))
    }
    #[inline(always)]
    fn and_bits(self, a: V, b: V) -> V {
        map2(a, b, |a, b| f32::from_bits(a.to_bits() & b.to_bits()))
    }
    #[inline(always)]
    fn shift_bits(self, a: V, n: u32) -> V {
        map(a, |a| f32::from_bits(a.to_bits() >> n))
    }
    #[inline(always)]
    fn deinterleave(self, a: V, b: V) -> [V; 2] {
        [[a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]]]
    }
    #[inline(always)]
    fn interleave(self, even: V, odd: V) -> [V; 2] {
        [[even[0], odd[0], even[1], odd[1]], [even[2], odd[2], even[3], odd[3]]]
    }
    #[inline(always)]
    fn sum_lanes(self, v: &[V; MAX_LANES]) -> V {
        [0, 1, 2, 3].map(|i| (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]))
    }
    #[inline(always)]
    fn max_lane(self, a: V) -> f32 {
        a[0].max(a[1]).max(a[2].max(a[3]))
    }
    #[inline(always)]
    fn all_finite(self, a: V) -> bool {
        a[0].is_finite() & a[1].is_finite() & a[2].is_finite() & a[3].is_finite()
    }
    #[inline(always)]
    fn transpose(self, v: &mut [V; MAX_LANES]) {
        let t = [v[0], v[1], v[2], v[3]];
        v[0] = [t[0][0], t[1][0], t[2][0], t[3][0]];
        v[1] = [t[0][1], t[1][1], t[2][1], t[3][1]];
        v[2] = [t[0][2], t[1][2], t[2][2], t[3][2]];
        v[3] = [t[0][3], t[1][3], t[2][3], t[3][3]];
    }
    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> V {
        // SAFETY: the caller's; an array has the alignment of its elements.
        unsafe { *p.cast() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> V {
        // SAFETY: the caller's.
        unsafe { load(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> V {
        // SAFETY: the caller's.
        unsafe { load(p) }
    }
    #[inline(always)]
    unsafe fn load_pair_bf16(self, p: *const bf16) -> [V; 2] {
        // SAFETY: the caller's.
        unsafe { [load(p), load(p.add(4))] }
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_far(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_write(self, _: *const u8) {}
    #[inline(always)]
    unsafe fn load_part_f32(self, p: *const f32, n: usize) -> V {
        // SAFETY: the caller's.
        unsafe { self.load_f32(copy_part(p, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> V {
        // SAFETY: four bytes are readable.
        std::array::from_fn(|i| f32::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const E4m3) -> V {
        // SAFETY: the caller's.
        unsafe { load_bytes(p, E4m3::to_f32) }
    }
    #[inline(always)]
    unsafe fn load_e5m2(self, p: *const E5m2) -> V {
        // SAFETY: the caller's.
        unsafe { load_bytes(p, E5m2::to_f32) }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, p: *mut u8, v: V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: four bytes are writable.
            unsafe { *p.add(i) = x.to_bits() as u8 };
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: V) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: four bytes are writable.
            unsafe { *p.add(i) = x.round_ties_even() as i8 };
        }
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: V) {
        // SAFETY: the caller's; an array has the alignment of its elements.
        unsafe { *p.cast() = v }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: V) {
        // SAFETY: the caller's.
        unsafe { store(p, v, 4) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: V) {
        // SAFETY: the caller's.
        unsafe { store(p, v, 4) }
    }
    #[inline(always)]
    unsafe fn store_part_f32(self, p: *mut f32, v: V, n: usize) {
        // SAFETY: the caller's.
        unsafe { store(p, v, n) }
    }
}

level_features!(Scalar, kernel_shells! { Scalar });
kernel_table!(Scalar);
