//! RMS norm of heads.

use super::arguments::{list, read, reserved};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::rope::{kvl_rope_params, read_rope};
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::sized::{assert_layout, read_sized, sized};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::Result;
use crate::ops::norm::{RmsNorm, rms_norm_raw};
use crate::ops::rope::rope_raw;
use crate::view::{DIM, RawView};

/// RMS norm: `y = x * weight / sqrt(mean(x^2) + eps)`, for each head of each token. Start from
/// `KVL_RMS_NORM_PARAMS_INIT`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_rms_norm_params {
    /// `sizeof(kvl_rms_norm_params)`.
    pub struct_size: usize,
    /// [dim], the same for all heads; null for all 1. For models that add 1 to their weights (Gemma), the caller adds
    /// it.
    pub weight: *const f32,
    /// The number that is added to the mean of the squares; 0 stands for 1e-6.
    pub eps: f32,
    /// 0.
    pub reserved: i32,
}

sized!(kvl_rms_norm_params);
assert_layout!(kvl_rms_norm_params, 24, struct_size: 0, weight: 8, eps: 16, reserved: 20);

/// Normalises heads: `dst = RMSNorm(src)`, both [batch, seq, heads, dim], of any strides and types. The mean is
/// computed in f64, the rest in f32, rounded once to the type of `dst`. To normalise in place, let both views be the
/// same.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: null, an unknown `struct_size`, shapes that differ, an `eps` that is negative or not finite, and views
/// that share memory without being the same are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_rms_norm(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    params: *const kvl_rms_norm_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        // SAFETY: as above.
        let norm = unsafe { read_rms_norm(params, &src) }?;
        // SAFETY: as above.
        unsafe { rms_norm_raw(context, runner.as_dyn(), src, dst, &norm) }
    })
}

/// Normalises and then rotates queries or keys in one pass. The bits are those of `kvl_rms_norm` into a view of f32 and
/// `kvl_rope` from there, without a rounding between the two. Heads have at most 4096 elements.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: the errors of `kvl_rms_norm` and `kvl_rope`; nothing is written then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_rms_norm_rope(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    norm: *const kvl_rms_norm_params,
    rope: *const kvl_rope_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        // SAFETY: as above.
        let (norm, rope) = unsafe { (read_rms_norm(norm, &src)?, read_rope(rope, &src)?) };
        // SAFETY: as above.
        unsafe { rope_raw(context, runner.as_dyn(), src, dst, &rope, Some(norm)) }
    })
}

/// The norm at `from`, of the heads of `src`.
///
/// # Safety
/// `from` is null or points to what the header describes, whose weights nobody writes while the norm is in use.
pub(super) unsafe fn read_rms_norm<'a>(from: *const kvl_rms_norm_params, src: &RawView) -> Result<RmsNorm<'a>> {
    // SAFETY: the caller's, here and below.
    let params = unsafe { read_sized(from) }?;
    reserved("kvl_rms_norm_params", params.reserved)?;
    Ok(RmsNorm {
        // SAFETY: as above.
        weight: unsafe { list("weight", params.weight, src.shape[DIM]) }?,
        eps: if params.eps == 0.0 { 1e-6 } else { params.eps },
    })
}
