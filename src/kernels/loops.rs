//! Loops that only read, copy, multiply or exponentiate, compiled for every level: what the bench measures as the limits of the
//! machine. They reach it by the crate root, since the bench knows no kernels.

use super::generic::math;
use super::scalar::Scalar;
use super::simd::{Outlined, Simd};
use crate::isa::Isa;
use std::hint::black_box;

pub(crate) use super::products::{Products, loop_of};

/// Reads all data `passes` times, in `STREAMS` parallel streams. Each prefetches `NEAR` bytes ahead into the first-level cache and
/// `FAR` bytes ahead into the second-level cache; 0: it does not.
pub(crate) fn read<const STREAMS: usize, const NEAR: usize, const FAR: usize>(isa: Isa, data: &[f32], passes: u64) {
    on_level(isa, Read::<STREAMS, NEAR, FAR> { data, passes });
}

/// Copies `src` to `dst`, `passes` times.
pub(crate) fn copy(isa: Isa, src: &[f32], dst: &mut [f32], passes: u64) {
    on_level(isa, Copy { src, dst, passes });
}

/// Reads, changes and writes every vector, `passes` times.
pub(crate) fn update(isa: Isa, data: &mut [f32], passes: u64) {
    on_level(isa, Update { data, passes });
}

/// Multiply-adds, [`products`] of f32 per step.
pub(crate) fn multiply_add(isa: Isa, steps: u64) {
    on_level(isa, MultiplyAdd { steps });
}

/// Multiply-adds of one step of [`multiply_add`].
pub(crate) fn products(isa: Isa) -> usize {
    struct Lanes<'a>(&'a mut usize);
    impl Outlined for Lanes<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self, _: S) {
            *self.0 = S::LANES;
        }
    }
    let mut lanes = 0;
    on_level(isa, Lanes(&mut lanes));
    CHAINS * lanes
}

/// Exponentials of a small array as in softmax, `WAYS` vectors at a time, `passes` times.
pub(crate) fn exp<const WAYS: usize>(isa: Isa, data: &[f32], passes: u64) {
    on_level(isa, Exp::<WAYS> { data, passes });
}

/// Runs `body` compiled for a level. Callers have checked that the level is available; otherwise this does nothing.
fn on_level(isa: Isa, body: impl Outlined) {
    if !isa.is_available() {
        return;
    }
    // SAFETY: the level is available, and every loop stays inside the slices that it borrows.
    unsafe {
        match isa {
            Isa::Scalar => Scalar::new_unchecked().outline(body),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => super::avx2::Avx2::new_unchecked().outline(body),
            // Partial levels run the loops of the level below, and have those of `products` beside them.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => {
                super::avx512::Avx512::new_unchecked().outline(body)
            }
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm | Isa::NeonBf16 => {
                super::neon::Neon::new_unchecked().outline(body)
            }
            // Levels of other architectures, listed so that a new level does not compile without its loops.
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => {}
            #[cfg(not(all(target_arch = "aarch64", target_endian = "little")))]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm | Isa::NeonBf16 => {}
        }
    }
}

/// Vectors per step of a reading loop, each with a sum of its own.
const STEP: usize = 8;
/// Floats in a cache line of 64 bytes.
pub(crate) const LINE: usize = 16;

/// See [`read`].
struct Read<'a, const STREAMS: usize, const NEAR: usize, const FAR: usize> {
    data: &'a [f32],
    passes: u64,
}

impl<const STREAMS: usize, const NEAR: usize, const FAR: usize> Outlined for Read<'_, STREAMS, NEAR, FAR> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let each = STEP / STREAMS;
        let step = each * S::LANES;
        let steps = self.data.len() / STREAMS / step;
        let stream = steps * step;
        let mut sums = [s.zero(); STEP];
        for _ in 0..self.passes {
            let data = black_box(self.data.as_ptr());
            for i in 0..steps {
                for k in 0..STREAMS {
                    // SAFETY: `k * stream + i * step + each * LANES` is at most STREAMS * stream, which is at most the length.
                    unsafe {
                        let p = data.add(k * stream + i * step);
                        for line in (0..step * size_of::<f32>()).step_by(LINE * size_of::<f32>()) {
                            let line = p.cast::<u8>().wrapping_add(line);
                            if NEAR > 0 {
                                s.prefetch(line.wrapping_add(NEAR));
                            }
                            if FAR > 0 {
                                s.prefetch_far(line.wrapping_add(FAR));
                            }
                        }
                        for j in 0..each {
                            sums[k * each + j] = s.add(sums[k * each + j], s.load_f32(p.add(j * S::LANES)));
                        }
                    }
                }
            }
            let mut at = STREAMS * stream;
            while at + S::LANES <= self.data.len() {
                // SAFETY: the condition.
                sums[0] = s.add(sums[0], unsafe { s.load_f32(data.add(at)) });
                at += S::LANES;
            }
        }
        for half in sums.chunks_exact(4) {
            black_box(s.max_lane(s.add(s.add(half[0], half[1]), s.add(half[2], half[3]))));
        }
    }
}

/// Copies `src` to `dst` with a vector loop, `passes` times.
struct Copy<'a> {
    src: &'a [f32],
    dst: &'a mut [f32],
    passes: u64,
}

impl Outlined for Copy<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let n = self.src.len().min(self.dst.len());
        let step = 4 * S::LANES;
        for _ in 0..self.passes {
            let (src, dst) = (black_box(self.src.as_ptr()), black_box(self.dst.as_mut_ptr()));
            let mut at = 0;
            while at + step <= n {
                // SAFETY: the condition; the slices do not overlap.
                unsafe {
                    let v: [S::V; 4] = std::array::from_fn(|j| s.load_f32(src.add(at + j * S::LANES)));
                    for (j, v) in v.into_iter().enumerate() {
                        s.store_f32(dst.add(at + j * S::LANES), v);
                    }
                }
                at += step;
            }
            // SAFETY: at <= n.
            unsafe { std::ptr::copy_nonoverlapping(src.add(at), dst.add(at), n - at) };
        }
    }
}

/// Reads, changes and writes every vector, `passes` times.
struct Update<'a> {
    data: &'a mut [f32],
    passes: u64,
}

impl Outlined for Update<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let step = 4 * S::LANES;
        let factor = s.splat(black_box(1.0));
        for _ in 0..self.passes {
            let data = black_box(self.data.as_mut_ptr());
            let mut at = 0;
            while at + step <= self.data.len() {
                for j in 0..4 {
                    // SAFETY: the condition.
                    unsafe {
                        let p = data.add(at + j * S::LANES);
                        s.store_f32(p, s.mul(s.load_f32(p), factor));
                    }
                }
                at += step;
            }
        }
    }
}

/// Multiply-adds without loads, in enough chains to fill all units: latency times ports is 8 on most CPUs, 16 on the
/// widest with NEON. Chains, factor and addend fit into the registers.
struct MultiplyAdd {
    steps: u64,
}

/// See [`MultiplyAdd`].
const CHAINS: usize = if cfg!(target_arch = "aarch64") { 20 } else { 12 };

impl Outlined for MultiplyAdd {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // Converges to 1, so that no value overflows or becomes subnormal.
        let (factor, addend) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        let mut chains: [S::V; CHAINS] = std::array::from_fn(|i| s.splat(black_box(i as f32)));
        for _ in 0..self.steps {
            for chain in &mut chains {
                *chain = s.fma(*chain, factor, addend);
            }
        }
        for four in chains.chunks_exact(4) {
            black_box(s.max_lane(s.add(s.add(four[0], four[1]), s.add(four[2], four[3]))));
        }
    }
}

/// Exponentials of a small array as in softmax, `WAYS` vectors at a time.
struct Exp<'a, const WAYS: usize> {
    data: &'a [f32],
    passes: u64,
}

impl<const WAYS: usize> Outlined for Exp<'_, WAYS> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let step = WAYS * S::LANES;
        let mut sums = [s.zero(); WAYS];
        for _ in 0..self.passes {
            let data = black_box(self.data.as_ptr());
            let mut at = 0;
            while at + step <= self.data.len() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the condition.
                    let x = unsafe { s.load_f32(data.add(at + j * S::LANES)) };
                    *sum = s.add(*sum, math::exp(s, x));
                }
                at += step;
            }
        }
        for sum in sums {
            black_box(s.max_lane(sum));
        }
    }
}
