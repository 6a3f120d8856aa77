//! RMS norm of queries and keys, alone and before RoPE.

use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::kernels::api::{CopyArgs, NormArgs, NormFn, RopeArgs, RopeFn};
use crate::ops::rope::{Rope, rope_raw};
use crate::ops::setters::setters;
use crate::ops::{TokenCopies, check_in_place_or_apart, for_each_token};
use crate::parallel::Runner;
use crate::problem::limits::MAX_ROTARY_DIM;
use crate::view::{DIM, RawView, View, ViewMut};
use std::mem::MaybeUninit;

/// How heads are normalised: `y = x * weight / sqrt(mean(x^2) + eps)`, each head of each token by itself.
///
/// The mean is computed in f64, in one order at every ISA level. Everything else is f32, rounded once to the type of the
/// output. All heads share the weights. For models that add 1 to their weights (Gemma), give the sum.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RmsNorm<'a> {
    /// `[dim]`; all 1 if absent.
    pub weight: Option<&'a [f32]>,
    /// Added to the mean of the squares; not negative. With 0, a head of zeros becomes NaN.
    pub eps: f32,
}

impl<'a> RmsNorm<'a> {
    /// A norm without weights.
    pub fn new(eps: f32) -> Self {
        Self { weight: None, eps }
    }

    setters! {
        optional { weight: &'a [f32], }
        plain { eps: f32, }
    }
}

impl RmsNorm<'_> {
    /// Checks against the tensor that is to be normalised.
    pub(crate) fn validate(&self, name: &str, src: &RawView) -> Result<()> {
        let (eps, dim) = (self.eps, src.shape[DIM]);
        ensure!(eps.is_finite() && eps >= 0.0, InvalidValue, "eps is {eps}, which is not a number from 0 upwards");
        if let Some(weight) = self.weight {
            let n = weight.len();
            ensure!(n == dim, Shape, "weight has {n} entries, but {name} has dim = {dim}");
        }
        Ok(())
    }

    /// As [`Self::validate`], for heads that are rotated too: they wait for that on the stack.
    pub(crate) fn validate_staged(&self, name: &str, src: &RawView) -> Result<()> {
        self.validate(name, src)?;
        let dim = src.shape[DIM];
        ensure!(
            dim <= MAX_ROTARY_DIM,
            Shape,
            "{name} has dim = {dim}, but heads above {MAX_ROTARY_DIM} are not normalised and rotated in one pass"
        );
        Ok(())
    }

    pub(crate) fn args(&self, copy: CopyArgs) -> NormArgs {
        NormArgs { copy, weight: self.weight.map_or(std::ptr::null(), <[f32]>::as_ptr), eps: self.eps }
    }
}

/// Normalises every head: `dst = RMSNorm(src)`.
///
/// `src` and `dst` are `[batch, seq, heads, dim]`, of any strides and types. Arithmetic is f32, rounded once to the type of
/// `dst`.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// - [`Status::Shape`](crate::Status::Shape): shapes differ, or the weights are not `dim`.
/// - [`Status::InvalidValue`](crate::Status::InvalidValue): `eps` is negative or not finite.
/// - [`Status::Overlap`](crate::Status::Overlap): the views share memory.
///
/// On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let x = [3.0f32, 4.0, 0.0, 0.0];
/// let mut y = [0.0f32; 4];
/// let norm = RmsNorm::new(0.0).weight(&[1.0, 10.0, 1.0, 1.0]);
/// rms_norm(&Context::new()?, &Serial, View::new(&x, [1, 1, 1, 4])?, ViewMut::new(&mut y, [1, 1, 1, 4])?, &norm)?;
/// // The mean of the squares is 25 / 4.
/// assert!((y[0] - 1.2).abs() < 1e-6 && (y[1] - 16.0).abs() < 1e-5);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn rms_norm(context: &Context, runner: &dyn Runner, src: View, dst: ViewMut, norm: &RmsNorm) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { rms_norm_raw(context, runner, src.raw, dst.raw, norm) }
}

/// Normalises every head in place; see [`rms_norm`].
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_in_place(context: &Context, runner: &dyn Runner, x: ViewMut, norm: &RmsNorm) -> Result<()> {
    // SAFETY: the view borrows what it reaches, exclusively.
    unsafe { rms_norm_raw(context, runner, x.raw, x.raw, norm) }
}

/// Normalises and then rotates queries or keys in one pass: `dst = RoPE(RMSNorm(src))`.
///
/// The bits are those of [`rms_norm`] into an f32 tensor and [`rope()`](crate::rope()) from there. Heads have at most
/// [`MAX_ROTARY_DIM`] elements.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// Those of [`rms_norm`] and of [`rope()`](crate::rope()). On an error, nothing has been written.
pub fn rms_norm_rope(
    context: &Context,
    runner: &dyn Runner,
    src: View,
    dst: ViewMut,
    norm: &RmsNorm,
    rope: &Rope,
) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { rope_raw(context, runner, src.raw, dst.raw, &rope.raw(), Some(*norm)) }
}

/// Normalises and rotates queries or keys in place; see [`rms_norm_rope`].
///
/// # Errors
/// As [`rms_norm_rope`].
pub fn rms_norm_rope_in_place(
    context: &Context,
    runner: &dyn Runner,
    x: ViewMut,
    norm: &RmsNorm,
    rope: &Rope,
) -> Result<()> {
    // SAFETY: the view borrows what it reaches, exclusively.
    unsafe { rope_raw(context, runner, x.raw, x.raw, &rope.raw(), Some(*norm)) }
}

/// # Safety
/// The memory that valid views reach is readable and, for `dst`, writable, by this call alone.
pub(crate) unsafe fn rms_norm_raw(
    context: &Context,
    runner: &dyn Runner,
    src: RawView,
    dst: RawView,
    norm: &RmsNorm,
) -> Result<()> {
    check_in_place_or_apart(&src, &dst)?;
    norm.validate("src", &src)?;
    let kernel = context.norm(src.dtype, dst.dtype);
    let copies = TokenCopies::new(&src, &dst);
    for_each_token(runner, &src, |at| {
        // SAFETY: the views are valid and equal in shape; there are as many weights as elements in a head.
        unsafe { kernel(&norm.args(copies.at(at))) };
    })
}

/// Elements of the heads that are staged on the stack together, unless one head alone is longer: few enough for the first-level
/// cache.
pub(crate) const STAGE: usize = 1024;

/// Norm, then RoPE, by the two kernels through f32 on the stack.
#[derive(Clone, Copy)]
pub(crate) struct NormRope<'a> {
    norm: RmsNorm<'a>,
    to_f32: NormFn,
    from_f32: RopeFn,
    sizes: (usize, usize),
}

impl<'a> NormRope<'a> {
    pub fn new(context: &Context, norm: RmsNorm<'a>, src: DType, dst: CacheFormat) -> Self {
        Self {
            norm,
            to_f32: context.norm(src, DType::F32),
            from_f32: context.rope(DType::F32, dst),
            sizes: (src.size(), dst.unit_bytes()),
        }
    }

    /// # Safety
    /// As [`RopeFn`], for the types that `self` was made for and a head that [`RmsNorm::validate_staged`] has accepted.
    pub unsafe fn run(&self, args: &RopeArgs) {
        let all = args.copy;
        let mut stage = MaybeUninit::<[f32; MAX_ROTARY_DIM]>::uninit();
        let stage: *mut f32 = stage.as_mut_ptr().cast();
        let together = (STAGE / all.dim).max(1);
        let mut first = 0;
        while first < all.heads {
            let heads = (all.heads - first).min(together);
            let src = all.src.wrapping_offset(first as isize * all.src_head * self.sizes.0 as isize);
            let dst = all.dst.wrapping_offset(first as isize * all.dst_head * self.sizes.1 as isize);
            let staged = all.dim as isize;
            let to = CopyArgs { src, dst: stage.cast(), heads, dst_head: staged, dst_dim: 1, dst_prefetch: 0, ..all };
            let from = CopyArgs { src: stage.cast(), dst, heads, src_head: staged, src_dim: 1, src_prefetch: 0, ..all };
            // SAFETY: the caller's; the stage holds these heads, and the first kernel writes what the second reads.
            unsafe {
                (self.to_f32)(&self.norm.args(to));
                (self.from_f32)(&RopeArgs { copy: from, ..*args });
            }
            first += heads;
        }
    }
}

/// The kernel that rotates the heads of a token.
#[derive(Clone, Copy)]
pub(crate) enum Rotation<'a> {
    Rope(RopeFn),
    NormRope(NormRope<'a>),
}

impl<'a> Rotation<'a> {
    pub fn new(context: &Context, norm: Option<RmsNorm<'a>>, src: DType, dst: impl Into<CacheFormat>) -> Self {
        let dst = dst.into();
        match norm {
            None => Self::Rope(context.rope(src, dst)),
            Some(norm) => Self::NormRope(NormRope::new(context, norm, src, dst)),
        }
    }

    /// # Safety
    /// As [`RopeFn`], for the types and the norm that `self` was made for.
    pub unsafe fn run(&self, args: &RopeArgs) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Rope(kernel) => kernel(args),
                Self::NormRope(staged) => staged.run(args),
            }
        }
    }
}
