//! Attention over a shared prefix.

use super::arguments::read;
use super::attention::{attention_shape, attention_tensors, kvl_attention_params, with_attention};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::plan;
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::scales::{kvl_cache_scales, read_scales, with_scales};
use super::sized::read_sized;
use super::status::kvl_status;
use super::views::kvl_const_view;
use crate::error::ensure;
use crate::ops::attention::attention_shapes;
use crate::ops::prefix::{attention_with_prefix_raw, prefix_workspace_size};
use crate::view::{DIM, RawView, SEQ};
use std::ffi::c_void;

/// The bytes of workspace that `kvl_attention_with_prefix` needs at most, as `kvl_attention_workspace_size` gives them
/// for `kvl_attention`. Of `prefix_k`, only the shape is read.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: the errors of `kvl_attention_workspace_size`; `*bytes` is not changed then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_with_prefix_workspace_size(
    prefix_k: *const kvl_const_view,
    params: *const kvl_attention_params,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (params, runner) = unsafe { (read_sized(params)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let prefix = unsafe { read("prefix_k", prefix_k) }?;
        ensure!(!bytes.is_null(), NullPointer, "the pointer bytes is null");
        let (q, k, v) = attention_tensors(&params)?;
        let tokens = attention_shape("prefix_k", prefix.units("prefix_k")?)?[SEQ];
        // SAFETY: as above.
        let (rows, layout) = unsafe { plan::workspace_visibility(&params, q, k[SEQ]) }?;
        let (shape, k) = attention_shapes(q, RawView { shape: k, ..params.k.units("k")? }, &layout, rows);
        let needed = prefix_workspace_size(q, shape, k, tokens, v[DIM], runner.as_dyn().num_threads());
        // SAFETY: not null, and the caller's to write.
        unsafe { bytes.write(needed) };
        Ok(())
    })
}

/// Attention over a prefix that all sequences share, [1, tokens, kv_heads, dim] and [1, tokens, kv_heads, v_dim],
/// followed by each sequence's own keys. `params` describes the latter, as in `kvl_attention`: position 0 of a sequence
/// is its first key after the prefix. Every query sees the whole prefix, which is read once for all of them. Sink
/// logits count once. The result is that of attention over both at once within the kernel's bound. It does not depend
/// on the runner, the batch or strides. `prefix_scales` has the scales of the prefix, for formats that have scales, and may be
/// null.
///
/// `workspace` is as for `kvl_attention`, with the size that `kvl_attention_with_prefix_workspace_size` gives.
///
/// Thread safety: as for `kvl_attention`.
/// Bad input: the errors of `kvl_attention`, for either part. ALiBi slopes and a left window are errors too, since they
/// would need the positions of the prefix. Nothing but the workspace is written then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_with_prefix(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    workspace: *mut c_void,
    workspace_bytes: usize,
    prefix_k: *const kvl_const_view,
    prefix_v: *const kvl_const_view,
    prefix_scales: *const kvl_cache_scales,
    params: *const kvl_attention_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (k, v, [k_scales, v_scales]) =
            unsafe { (read("prefix_k", prefix_k)?, read("prefix_v", prefix_v)?, read_scales(prefix_scales)?) };
        let prefix = (
            with_scales(k.units("prefix_k")?, "the scales of prefix_k", &k_scales)?,
            with_scales(v.units("prefix_v")?, "the scales of prefix_v", &v_scales)?,
        );
        // SAFETY: as above.
        unsafe {
            with_attention(&read_sized(params)?, &|call| {
                attention_with_prefix_raw(context, runner.as_dyn(), workspace.cast(), workspace_bytes, prefix, call)
            })
        }
    })
}
