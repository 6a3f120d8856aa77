//! The Hadamard rotation of heads.

use super::arguments::{output_list, read, size};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::Result;
use crate::ops::hadamard::{hadamard_block, hadamard_raw};

/// Rotates heads by a normalised Walsh-Hadamard matrix, block by block: `dst = H src`, both [batch, seq, heads, dim], of any
/// strides and types. Element i of a block becomes the sum over j of `x[j] * (-1)^popcount(i & j) / sqrt(block)`. The matrix
/// is its own inverse. Arithmetic is f32, rounded once to the type of `dst`, by the same bits at every level. `block` is a power of two
/// from 2 to 512 that divides dim; `kvl_hadamard_block` gives the largest. To rotate in place, let both views be the same.
///
/// `kvl_kv_write`, `kvl_kv_read`, `kvl_attention` and `kvl_cache_evict` take blocks, and do this on the way.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: null, shapes that differ, a `block` that is no power of two from 2 to 512 or does not divide dim, and views that share
/// memory without being the same are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_hadamard(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    block: i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        let block = size("block", block)?;
        // SAFETY: as above.
        unsafe { hadamard_raw(context, runner.as_dyn(), src, dst, block) }
    })
}

/// The block of the Hadamard rotation of a head of `dim` elements: the largest power of two that divides `dim`, at most 512. If
/// `dim` is odd there is none, and `*block` is 0.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null and a negative `dim` are errors, and `*block` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_hadamard_block(dim: i64, block: *mut i64) -> kvl_status {
    guard(|| {
        let largest = hadamard_block(size("dim", dim)?).unwrap_or(0);
        // SAFETY: the caller's promise.
        unsafe { output_list("block", block, 1) }?[0] = largest as i64;
        Ok(())
    })
}

/// A block among parameters: 0 is none.
pub(super) fn parse_block(name: &str, block: i64) -> Result<Option<usize>> {
    Ok(Some(size(name, block)?).filter(|&block| block != 0))
}
