//! The heads of a token on their way into a cache or out of it: converted, normalised, rotated, quantised.

use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::kernels::api::{CopyArgs, CopyFn, NormFn, Op, RopeArgs, RopeFn, ScaledArgs, ScaledFn};
use crate::layout::Place;
use crate::ops::norm::{RmsNorm, Rotation, STAGE};
use crate::problem::limits::MAX_ROTARY_DIM;
use crate::problem::rotation::Pairing;
use crate::view::{HEADS, RawCacheView, RawView};
use std::mem::MaybeUninit;

/// The angles of a token.
#[derive(Clone, Copy)]
pub(crate) struct Turn {
    pub rotary_dim: usize,
    pub pairing: Pairing,
    pub cos: *const f32,
    pub sin: *const f32,
}

impl Turn {
    pub fn args(self, copy: CopyArgs) -> RopeArgs {
        let Self { rotary_dim, pairing, cos, sin } = self;
        RopeArgs { copy, rotary_dim, pairing, cos, sin }
    }
}

/// The scales of vectors at equal distances.
#[derive(Clone, Copy)]
pub(crate) struct Scales {
    data: *mut u8,
    step: isize,
    dtype: DType,
}

impl Scales {
    /// The scales of vectors along an axis, from a token and a head on.
    ///
    /// # Safety
    /// The view is valid and the token and the head are inside.
    pub unsafe fn along(view: &RawView, axis: usize, (row, slot): Place, head: usize) -> Self {
        // SAFETY: the caller's.
        Self { data: unsafe { view.row(row, slot, head) }, step: view.strides[axis] as isize, dtype: view.dtype }
    }

    /// Static scales of 1.
    const ONE: Self = Self { data: std::ptr::null_mut(), step: 0, dtype: DType::F32 };

    /// The scales of the heads of a token, if the cache has scales.
    ///
    /// # Safety
    /// As [`Self::along`].
    pub unsafe fn of_token(cache: &RawCacheView, place: Place) -> Option<Self> {
        // SAFETY: the caller's.
        cache.scales.as_ref().map(|scales| unsafe { Self::along(scales, HEADS, place, 0) })
    }

    fn args(&self, copy: CopyArgs, first: usize) -> ScaledArgs {
        let Self { data, step, dtype } = *self;
        // The null of scales that are 1 has the step 0.
        let scales = data.wrapping_offset(first as isize * step * dtype.size() as isize);
        ScaledArgs { copy, scales, scale_head: step, scale_dtype: dtype }
    }
}

/// The kernels that convert heads from one format to another.
#[derive(Clone, Copy)]
pub(crate) enum HeadKernels<'a> {
    Copy(CopyFn),
    Norm(NormFn, RmsNorm<'a>),
    Rotate(Rotation<'a>),
    Quantize(Quantize<'a>),
    Dequantize(ScaledFn),
}

impl<'a> HeadKernels<'a> {
    /// From elements into a cache, normalised if there is a norm and rotated if `rotated`.
    pub fn write(context: &Context, norm: Option<RmsNorm<'a>>, rotated: bool, src: DType, dst: CacheFormat) -> Self {
        if dst.dtype().is_some() {
            return match norm {
                _ if rotated => Self::Rotate(Rotation::new(context, norm, src, dst)),
                Some(norm) => Self::Norm(context.norm(src, dst), norm),
                None => Self::Copy(context.copy(Op::KvWrite, src, dst)),
            };
        }
        let to_f32 = match norm {
            Some(norm) => Some(ToF32::Norm(context.norm(src, DType::F32), norm)),
            None if rotated => Some(ToF32::Rope(context.rope(src, DType::F32))),
            None => None,
        };
        let rope = (rotated && norm.is_some()).then(|| context.rope(DType::F32, DType::F32));
        let quantize = context.quantize(if to_f32.is_some() { DType::F32 } else { src }, dst);
        Self::Quantize(Quantize { to_f32, rope, quantize, sizes: (src.size(), dst.unit_bytes()) })
    }

    /// Out of a cache into elements.
    pub fn read(context: &Context, src: CacheFormat, dst: DType) -> Self {
        match src.dtype() {
            Some(_) => Self::Copy(context.copy(Op::KvWrite, src, dst)),
            None => Self::Dequantize(context.dequantize(src, dst)),
        }
    }

    /// Between places of quantised caches, through f32.
    pub fn requantize(context: &Context, rotated: bool, src: CacheFormat, dst: CacheFormat) -> Self {
        Self::Quantize(Quantize {
            to_f32: Some(ToF32::Dequantize(context.dequantize(src, DType::F32))),
            rope: rotated.then(|| context.rope(DType::F32, DType::F32)),
            quantize: context.quantize(DType::F32, dst),
            sizes: (src.unit_bytes(), dst.unit_bytes()),
        })
    }

    /// # Safety
    /// `copy` is valid for the formats of `self`; `scales` gives scales on the sides whose format has scales, and on those with
    /// static scales that are not 1; `turn` gives angles if heads are rotated; [`check_staged`] has accepted heads that are normalised and rotated, or quantised after
    /// either.
    #[inline(always)]
    pub unsafe fn run(&self, copy: &CopyArgs, scales: impl FnOnce() -> [Option<Scales>; 2], turn: Option<Turn>) {
        // SAFETY: the caller's.
        unsafe {
            match (self, turn) {
                (Self::Copy(kernel), _) => kernel(copy),
                (Self::Norm(kernel, norm), _) => kernel(&norm.args(*copy)),
                (Self::Rotate(kernels), Some(turn)) => kernels.run(&turn.args(*copy)),
                (Self::Quantize(_) | Self::Dequantize(_), _) => self.run_scaled(copy, scales(), turn),
                _ => unreachable!("rotated heads have angles"),
            }
        }
    }

    /// [`Self::run`] into or out of quantised units.
    ///
    /// # Safety
    /// As [`Self::run`].
    unsafe fn run_scaled(&self, copy: &CopyArgs, scales: [Option<Scales>; 2], turn: Option<Turn>) {
        let [from, to] = scales.map(|scales| scales.unwrap_or(Scales::ONE));
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Quantize(kernels) => kernels.run(copy, &from, &to, turn),
                Self::Dequantize(kernel) => kernel(&from.args(*copy, 0)),
                _ => unreachable!("plain units have no scales"),
            }
        }
    }
}

/// The kernels that convert heads to f32 before they are quantised.
#[derive(Clone, Copy)]
enum ToF32<'a> {
    Norm(NormFn, RmsNorm<'a>),
    Rope(RopeFn),
    Dequantize(ScaledFn),
}

/// Quantises heads, directly or after a norm and a rotation to f32 on the stack.
#[derive(Clone, Copy)]
pub(crate) struct Quantize<'a> {
    to_f32: Option<ToF32<'a>>,
    /// After [`Self::to_f32`].
    rope: Option<RopeFn>,
    quantize: ScaledFn,
    sizes: (usize, usize),
}

impl Quantize<'_> {
    /// # Safety
    /// As [`HeadKernels::run`].
    unsafe fn run(&self, all: &CopyArgs, from: &Scales, to: &Scales, turn: Option<Turn>) {
        let Some(to_f32) = &self.to_f32 else {
            // SAFETY: the caller's.
            return unsafe { (self.quantize)(&to.args(*all, 0)) };
        };
        let mut stage = MaybeUninit::<[f32; MAX_ROTARY_DIM]>::uninit();
        let stage: *mut u8 = stage.as_mut_ptr().cast();
        let (together, staged) = ((STAGE / all.dim).max(1), all.dim as isize);
        let mut first = 0;
        while first < all.heads {
            let heads = (all.heads - first).min(together);
            let src = all.src.wrapping_offset(first as isize * all.src_head * self.sizes.0 as isize);
            let dst = all.dst.wrapping_offset(first as isize * all.dst_head * self.sizes.1 as isize);
            let plain = CopyArgs { heads, src_prefetch: 0, dst_prefetch: 0, ..*all };
            let load = CopyArgs { src, dst: stage, dst_head: staged, dst_dim: 1, ..plain };
            let store = CopyArgs { src: stage, dst, src_head: staged, src_dim: 1, ..plain };
            // SAFETY: the caller's; the stage holds these heads, and each kernel reads what the one before it has written.
            unsafe {
                match (to_f32, turn) {
                    (ToF32::Norm(kernel, norm), _) => kernel(&norm.args(load)),
                    (ToF32::Rope(kernel), Some(turn)) => kernel(&turn.args(load)),
                    (ToF32::Dequantize(kernel), _) => kernel(&from.args(load, first)),
                    _ => unreachable!("rotated heads have angles"),
                }
                if let (Some(rope), Some(turn)) = (self.rope, turn) {
                    rope(&turn.args(CopyArgs { dst: stage, dst_head: staged, dst_dim: 1, ..store }));
                }
                (self.quantize)(&to.args(store, first));
            }
            first += heads;
        }
    }
}

/// Fails if heads are too long for the stack buffer before they are quantised.
pub(crate) fn check_staged(name: &str, dim: usize) -> Result<()> {
    ensure!(
        dim <= MAX_ROTARY_DIM,
        Shape,
        "{name} has dim = {dim}, but heads above {MAX_ROTARY_DIM} are not normalised, rotated or read on the way to quantised units"
    );
    Ok(())
}
