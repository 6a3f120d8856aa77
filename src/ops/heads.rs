//! The heads of a token on their way into a cache or out of it: converted, normalised, turned by RoPE, rotated by a Hadamard matrix,
//! quantised.

use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::kernels::api::{
    AffineArgs, CopyArgs, CopyFn, HadamardArgs, HadamardFn, NormFn, Op, RopeArgs, RopeFn, ScaledArgs, ScaledFn,
};
use crate::layout::Place;
use crate::ops::norm::{RmsNorm, Rotation, STAGE};
use crate::problem::limits::MAX_ROTARY_DIM;
use crate::problem::rotation::Pairing;
use crate::view::{HEADS, RawCacheView, RawView, SEQ};
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
    /// By half as many angles as elements; they outlive the turn.
    pub fn new(pairing: Pairing, cos: &[f32], sin: &[f32]) -> Self {
        Self { rotary_dim: 2 * cos.len(), pairing, cos: cos.as_ptr(), sin: sin.as_ptr() }
    }

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
    affine: Option<AffineArgs>,
}

impl Scales {
    /// The scales of vectors along an axis, from a token and a head on.
    ///
    /// # Safety
    /// The view is valid and the token and the head are inside.
    unsafe fn along(view: &RawView, axis: usize, (row, slot): Place, head: usize) -> Self {
        // SAFETY: the caller's.
        let data = unsafe { view.row(row, slot, head) };
        Self { data, step: view.strides[axis] as isize, dtype: view.dtype, affine: None }
    }

    /// Static scales of 1.
    const ONE: Self = Self { data: std::ptr::null_mut(), step: 0, dtype: DType::F32, affine: None };

    /// The scales of vectors of a cache along an axis, from a token and a head on, if the cache has scales. Tokens that share scales are
    /// none of several vectors along seq.
    ///
    /// # Safety
    /// As [`Self::along`].
    pub unsafe fn of_vectors(cache: &RawCacheView, axis: usize, place: Place, head: usize) -> Option<Self> {
        // SAFETY: the caller's, here and below.
        let Some(affine) = &cache.affine else {
            return cache.scales.as_ref().map(|scales| unsafe { Self::along(scales, axis, place, head) });
        };
        // SAFETY: as above.
        let first = unsafe { affine.row(place.0, place.1, head) };
        let args = AffineArgs {
            groups: affine.groups(),
            first,
            head_steps: affine.steps(axis),
            tokens: 1,
            src_token: 0,
            dst_token: 0,
        };
        Some(Self { affine: Some(args), ..Self::ONE })
    }

    /// The same scales of several tokens, `src` elements apart in their source and `dst` units in the cache.
    fn of_tokens(mut self, tokens: usize, src: isize, dst: isize) -> Self {
        if let Some(affine) = &mut self.affine {
            (affine.tokens, affine.src_token, affine.dst_token) = (tokens, src, dst);
        }
        self
    }

    /// The scales of the heads of a token, if the cache has scales.
    ///
    /// # Safety
    /// As [`Self::along`].
    pub unsafe fn of_token(cache: &RawCacheView, place: Place) -> Option<Self> {
        // SAFETY: the caller's.
        unsafe { Self::of_vectors(cache, HEADS, place, 0) }
    }

    /// The scales of the heads of `tokens` tokens that share them, of which the first goes to a place.
    ///
    /// # Safety
    /// As [`Self::along`].
    pub unsafe fn of_block(tokens: usize, src: &RawView, cache: &RawCacheView, place: Place) -> Option<Self> {
        // SAFETY: the caller's.
        let scales = unsafe { Self::of_token(cache, place) };
        scales.map(|scales| scales.of_tokens(tokens, src.strides[SEQ] as isize, cache.strides[SEQ] as isize))
    }

    fn args(&self, copy: CopyArgs, first: usize) -> ScaledArgs<'_> {
        let Self { data, step, dtype, affine } = self;
        // The null of scales that are 1 has the step 0.
        let scales = data.wrapping_offset(first as isize * step * dtype.size() as isize);
        ScaledArgs { copy, scales, scale_head: *step, scale_dtype: *dtype, affine: affine.as_ref(), first }
    }
}

/// The kernels that convert heads from one format to another.
#[derive(Clone, Copy)]
pub(crate) enum HeadKernels<'a> {
    Copy(CopyFn),
    Norm(NormFn, RmsNorm<'a>),
    Rotate(Rotation<'a>),
    Hadamard(Blocks),
    Quantize(ScaledFn),
    Dequantize(ScaledFn),
    Staged(Staged<'a>),
}

/// A kernel of a Hadamard rotation, and its block.
#[derive(Clone, Copy)]
pub(crate) struct Blocks {
    kernel: HadamardFn,
    block: usize,
}

impl Blocks {
    fn new(
        context: &Context,
        block: Option<usize>,
        src: impl Into<CacheFormat>,
        dst: impl Into<CacheFormat>,
    ) -> Option<Self> {
        block.map(|block| Self { kernel: context.hadamard(src, dst), block })
    }

    /// # Safety
    /// As [`HadamardFn`].
    unsafe fn run(&self, copy: &CopyArgs) {
        // SAFETY: the caller's.
        unsafe { (self.kernel)(&HadamardArgs { copy: *copy, block: self.block }) }
    }
}

impl<'a> HeadKernels<'a> {
    /// From elements into a cache: normalised if there is a norm, turned if `turned`, then rotated by blocks of `hadamard`.
    pub fn write(
        context: &Context,
        norm: Option<RmsNorm<'a>>,
        turned: bool,
        hadamard: Option<usize>,
        src: DType,
        dst: CacheFormat,
    ) -> Self {
        let plain = dst.dtype().is_some();
        let to_f32 = match (norm, turned, hadamard) {
            (None, false, None) if plain => return Self::Copy(context.copy(Op::KvWrite, src, dst)),
            (Some(norm), false, None) if plain => return Self::Norm(context.norm(src, dst), norm),
            (norm, true, None) if plain => return Self::Rotate(Rotation::new(context, norm, src, dst)),
            (None, false, None) => return Self::Quantize(context.quantize(src, dst)),
            (None, false, Some(block)) if plain => {
                return Self::Hadamard(Blocks { kernel: context.hadamard(src, dst), block });
            }
            (Some(norm), ..) => ToF32::Norm(context.norm(src, DType::F32), norm),
            (None, true, _) => ToF32::Rope(context.rope(src, DType::F32)),
            (None, false, Some(block)) => ToF32::Hadamard(Blocks { kernel: context.hadamard(src, DType::F32), block }),
        };
        let rotates = !matches!(to_f32, ToF32::Hadamard(_));
        Self::Staged(Staged {
            rope: (turned && norm.is_some()).then(|| context.rope(DType::F32, DType::F32)),
            ..Staged::new(context, to_f32, hadamard.filter(|_| rotates), (src.size(), dst))
        })
    }

    /// Out of a cache into elements; the rotation by blocks of `hadamard` is undone.
    pub fn read(context: &Context, hadamard: Option<usize>, src: CacheFormat, dst: DType) -> Self {
        match (src.dtype(), Blocks::new(context, hadamard, DType::F32, dst)) {
            (Some(_), None) => Self::Copy(context.copy(Op::KvWrite, src, dst)),
            (Some(_), Some(blocks)) => Self::Hadamard(Blocks { kernel: context.hadamard(src, dst), ..blocks }),
            (None, None) => Self::Dequantize(context.dequantize(src, dst)),
            (None, Some(_)) => {
                let to_f32 = ToF32::Dequantize(context.dequantize(src, DType::F32));
                Self::Staged(Staged::new(context, to_f32, hadamard, (src.unit_bytes(), dst.into())))
            }
        }
    }

    /// Between places of quantised caches, through f32.
    pub fn requantize(context: &Context, src: CacheFormat, dst: CacheFormat) -> Self {
        let to_f32 = ToF32::Dequantize(context.dequantize(src, DType::F32));
        Self::Staged(Staged::new(context, to_f32, None, (src.unit_bytes(), dst)))
    }

    /// Keys that are turned on between places of a cache: out of the rotation by blocks of `hadamard`, turned, and back into it.
    pub fn turn(context: &Context, hadamard: Option<usize>, format: CacheFormat) -> Self {
        let to_f32 = match (format.dtype(), hadamard) {
            (Some(dtype), None) => return Self::write(context, None, true, None, dtype, format),
            (Some(_), Some(block)) => ToF32::Hadamard(Blocks { kernel: context.hadamard(format, DType::F32), block }),
            (None, _) => ToF32::Dequantize(context.dequantize(format, DType::F32)),
        };
        let quantised = matches!(to_f32, ToF32::Dequantize(_));
        Self::Staged(Staged {
            before: Blocks::new(context, hadamard.filter(|_| quantised), DType::F32, DType::F32),
            rope: Some(context.rope(DType::F32, DType::F32)),
            ..Staged::new(context, to_f32, hadamard, (format.unit_bytes(), format))
        })
    }

    /// # Safety
    /// `copy` is valid for the formats of `self`; `scales` gives scales on the sides whose format has scales, and on those with
    /// static scales that are not 1; `turn` gives angles if heads are turned; [`check_staged`] has accepted heads that pass through
    /// the stack.
    #[inline(always)]
    pub unsafe fn run(&self, copy: &CopyArgs, scales: impl FnOnce() -> [Option<Scales>; 2], turn: Option<Turn>) {
        // SAFETY: the caller's.
        unsafe {
            match (self, turn) {
                (Self::Copy(kernel), _) => kernel(copy),
                (Self::Norm(kernel, norm), _) => kernel(&norm.args(*copy)),
                (Self::Rotate(kernels), Some(turn)) => kernels.run(&turn.args(*copy)),
                (Self::Hadamard(blocks), _) => blocks.run(copy),
                (Self::Quantize(_) | Self::Dequantize(_) | Self::Staged(_), _) => self.run_scaled(copy, scales(), turn),
                _ => unreachable!("turned heads have angles"),
            }
        }
    }

    /// [`Self::run`] into or out of quantised units, or through the stack.
    ///
    /// # Safety
    /// As [`Self::run`].
    unsafe fn run_scaled(&self, copy: &CopyArgs, scales: [Option<Scales>; 2], turn: Option<Turn>) {
        let [from, to] = [0, 1].map(|side| scales[side].as_ref().unwrap_or(&Scales::ONE));
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Quantize(kernel) => kernel(&to.args(*copy, 0)),
                Self::Dequantize(kernel) => kernel(&from.args(*copy, 0)),
                Self::Staged(kernels) => kernels.run(copy, from, to, turn),
                _ => unreachable!("plain units have no scales"),
            }
        }
    }
}

/// The kernel that converts heads to f32.
#[derive(Clone, Copy)]
enum ToF32<'a> {
    Norm(NormFn, RmsNorm<'a>),
    Rope(RopeFn),
    Dequantize(ScaledFn),
    Hadamard(Blocks),
}

/// The kernel that converts heads from f32.
#[derive(Clone, Copy)]
enum FromF32 {
    Copy(CopyFn),
    Hadamard(Blocks),
    Quantize(ScaledFn),
}

/// Kernels that heads pass one after another, as f32 on the stack.
#[derive(Clone, Copy)]
pub(crate) struct Staged<'a> {
    to_f32: ToF32<'a>,
    /// In place, in this order: out of a Hadamard rotation, RoPE, into a Hadamard rotation.
    before: Option<Blocks>,
    rope: Option<RopeFn>,
    after: Option<Blocks>,
    from_f32: FromF32,
    sizes: (usize, usize),
}

impl<'a> Staged<'a> {
    /// To f32, into a Hadamard rotation if there is a block, and to the format `dst`, from elements or units of `src` bytes.
    fn new(context: &Context, to_f32: ToF32<'a>, hadamard: Option<usize>, (src, dst): (usize, CacheFormat)) -> Self {
        let sizes = (src, dst.unit_bytes());
        let (after, from_f32) = match (dst.dtype(), hadamard) {
            (Some(_), None) => (None, FromF32::Copy(context.copy(Op::KvWrite, DType::F32, dst))),
            (Some(_), Some(block)) => {
                (None, FromF32::Hadamard(Blocks { kernel: context.hadamard(DType::F32, dst), block }))
            }
            (None, block) => {
                let quantize = FromF32::Quantize(context.quantize(DType::F32, dst));
                (Blocks::new(context, block, DType::F32, DType::F32), quantize)
            }
        };
        Self { to_f32, before: None, rope: None, after, from_f32, sizes }
    }

    /// Not inlined, so that kernels which need no stage have none on their stack.
    ///
    /// # Safety
    /// As [`HeadKernels::run`].
    #[inline(never)]
    unsafe fn run(&self, all: &CopyArgs, from: &Scales, to: &Scales, turn: Option<Turn>) {
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
            let in_place = CopyArgs { dst: stage, dst_head: staged, dst_dim: 1, ..store };
            // SAFETY: the caller's; the stage holds these heads, and each kernel reads what the one before it has written.
            unsafe {
                match (&self.to_f32, turn) {
                    (ToF32::Norm(kernel, norm), _) => kernel(&norm.args(load)),
                    (ToF32::Rope(kernel), Some(turn)) => kernel(&turn.args(load)),
                    (ToF32::Dequantize(kernel), _) => kernel(&from.args(load, first)),
                    (ToF32::Hadamard(blocks), _) => blocks.run(&load),
                    _ => unreachable!("turned heads have angles"),
                }
                if let Some(blocks) = &self.before {
                    blocks.run(&in_place);
                }
                if let (Some(rope), Some(turn)) = (self.rope, turn) {
                    rope(&turn.args(in_place));
                }
                if let Some(blocks) = &self.after {
                    blocks.run(&in_place);
                }
                match &self.from_f32 {
                    FromF32::Copy(kernel) => kernel(&store),
                    FromF32::Quantize(kernel) => kernel(&to.args(store, first)),
                    FromF32::Hadamard(blocks) => blocks.run(&store),
                }
            }
            first += heads;
        }
    }
}

/// Fails if heads are too long for the stack buffer that they pass through.
pub(crate) fn check_staged(name: &str, dim: usize) -> Result<()> {
    ensure!(
        dim <= MAX_ROTARY_DIM,
        Shape,
        "{name} has dim = {dim}, but heads above {MAX_ROTARY_DIM} are not normalised, rotated or read on the way to quantised units or to a \
         Hadamard rotation"
    );
    Ok(())
}
