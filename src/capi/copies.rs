//! Copies from one view into another: row pairs, repeated heads.

use super::arguments::read;
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::context::Context;
use crate::error::Result;
use crate::ops::pack::{pack_row_pairs_raw, unpack_row_pairs_raw};
use crate::ops::repeat::repeat_kv_raw;
use crate::parallel::Runner;
use crate::view::RawView;

/// Packs values in pairs of slots (`KVL_PACKING_ROW_PAIRS`): [batch, n, heads, dim] becomes [batch, n / 2 rounded up,
/// heads, 2 * dim], of the same type, with every bit. Where n is odd, the other half of the last pair is not written.
/// `kvl_kv_write` writes packed caches directly.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: null, shapes that do not fit, types that differ, and views that share memory are errors, and nothing is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_pack_row_pairs(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
) -> kvl_status {
    // SAFETY: the caller's promise.
    unsafe { from_one_to_another(context, runner, src, dst, pack_row_pairs_raw) }
}

/// The inverse of `kvl_pack_row_pairs`: `src` is [batch, n / 2 rounded up, heads, 2 * dim], `dst` is [batch, n, heads,
/// dim].
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: null, shapes that do not fit, types that differ, and views that share memory are errors, and nothing is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_unpack_row_pairs(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
) -> kvl_status {
    // SAFETY: the caller's promise.
    unsafe { from_one_to_another(context, runner, src, dst, unpack_row_pairs_raw) }
}

/// Repeats every head n times in a row: [batch, seq, kv_heads, dim] becomes [batch, seq, kv_heads * n, dim], of the
/// same type; n is the ratio of the head counts. Attention needs no such copy.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: null, head counts that are no multiple of each other, other axes or types that differ, and views that
/// share memory are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_repeat_kv(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
) -> kvl_status {
    // SAFETY: the caller's promise.
    unsafe { from_one_to_another(context, runner, src, dst, repeat_kv_raw) }
}

/// An export that does something with a view and puts it into another.
///
/// # Safety
/// The pointers are what the header describes.
pub(super) unsafe fn from_one_to_another(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    run: unsafe fn(&Context, &dyn Runner, RawView, RawView) -> Result<()>,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        // SAFETY: as above.
        unsafe { run(context, runner.as_dyn(), src, dst) }
    })
}
