//! The vector units, and the kernels compiled for each.

use std::ops::Range;

use super::activations::{Group, TERMS};
use super::kernel::{self, Job, Quantised};
use super::simd::Portable;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use crate::Isa;
use crate::driver::quant::{GROUP, TensorType, with_quantised};

/// A vector unit that this CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

/// Computes a job for some rows of its input; see [`kernel::run`].
type Kernel = unsafe fn(&Job<'_>, Range<usize>);

unsafe fn portable<Q: Quantised, const FLOATS: bool>(job: &Job<'_>, m: Range<usize>) {
    // SAFETY: the caller's promises.
    unsafe { kernel::run::<_, Q, FLOATS>(Portable, job, m) }
}

fn round_portable(x: &[f32], groups: usize, out: &mut [Group]) {
    round(x, groups, out);
}

#[inline(always)]
fn round(x: &[f32], groups: usize, out: &mut [Group]) {
    for (x, out) in x.chunks(groups * GROUP).zip(out.chunks_mut(TERMS * groups)) {
        for (g, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            let mut rest = *x;
            for term in 0..TERMS {
                let group = Group::round(&rest);
                rest.iter_mut().zip(&group.q).for_each(|(rest, &q)| *rest -= group.scale * f32::from(q));
                out[term * groups + g] = group;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! shells {
    ($features:literal, $simd:expr, $kernel:ident, $round:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $kernel<Q: Quantised, const FLOATS: bool>(job: &Job<'_>, m: Range<usize>) {
            // SAFETY: the caller's promises.
            unsafe { kernel::run::<_, Q, FLOATS>($simd, job, m) }
        }

        #[target_feature(enable = $features)]
        fn $round(x: &[f32], groups: usize, out: &mut [Group]) {
            round(x, groups, out);
        }
    };
}

#[cfg(target_arch = "x86_64")]
shells!("avx2,f16c", Avx2, avx2, round_avx2);
#[cfg(target_arch = "x86_64")]
shells!("avx512f,avx512bw", Avx512::<false>, avx512, round_avx512);
#[cfg(target_arch = "x86_64")]
shells!("avx512f,avx512bw,avx512vnni", Avx512::<true>, avx512_vnni, round_avx512_vnni);

/// `$kernel` for the type `$ty` of weights.
macro_rules! of_type {
    ($ty:ident, $kernel:ident, $floats:ident, $($name:ident)*) => {
        match ($ty, $floats) {
            $(
                (TensorType::$name, false) => $kernel::<kernel::$name, false>,
                (TensorType::$name, true) => $kernel::<kernel::$name, true>,
            )*
            (TensorType::F32 | TensorType::F16 | TensorType::BF16, _) => unreachable!("plain floats are not in tiles"),
        }
    };
}

impl Unit {
    /// All that this CPU has, the fastest last.
    pub(super) fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                all.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                all.push(Self::Avx512);
                if is_x86_feature_detected!("avx512vnni") {
                    all.push(Self::Avx512Vnni);
                }
            }
        }
        all
    }

    /// The fastest that belongs to an ISA level or a lower one.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
    pub(super) fn best(highest: Isa) -> Self {
        let belongs = |unit: &Self| match unit {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => highest != Isa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Vnni => !matches!(highest, Isa::Scalar | Isa::Avx2),
        };
        Self::available().into_iter().rfind(belongs).unwrap_or(Self::Portable)
    }

    pub(super) fn kernel(self, ty: TensorType, floats: bool) -> Kernel {
        match self {
            Self::Portable => with_quantised!(of_type, ty, portable, floats),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => with_quantised!(of_type, ty, avx2, floats),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => with_quantised!(of_type, ty, avx512, floats),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => with_quantised!(of_type, ty, avx512_vnni, floats),
        }
    }

    /// Rounds rows of `groups` groups to [`TERMS`] terms, which follow each other.
    pub(super) fn round(self, x: &[f32], groups: usize, out: &mut [Group]) {
        match self {
            Self::Portable => round_portable(x, groups, out),
            // SAFETY: `available` has found the features.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { round_avx2(x, groups, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { round_avx512(x, groups, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => unsafe { round_avx512_vnni(x, groups, out) },
        }
    }
}
