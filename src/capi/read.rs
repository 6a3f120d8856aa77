//! The cache read.

use super::arguments::{list, required_list, reserved};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::hadamard::parse_block;
use super::layout::{kvl_layout, kvl_packing, parse_packing, read_layout};
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::scales::{kvl_cache_scales, read_scales, with_scales};
use super::sized::{assert_layout, read_sized, sized};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::ensure;
use crate::ops::read::{RawRead, Source, kv_read_raw};
use crate::view::{BATCH, SEQ};

/// Caches, the tokens of them that are read, and the tensors that they go to. Start from `KVL_KV_READ_PARAMS_INIT`, set
/// `k_cache`, `k`, usually `v_cache` and `v`, and `positions`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_kv_read_params {
    /// `sizeof(kvl_kv_read_params)`.
    pub struct_size: usize,
    /// The cache of keys: [sequences, capacity, kv_heads, dim], or what `layout` makes of the first two axes; in any format.
    pub k_cache: kvl_const_view,
    /// The cache of values: [sequences, capacity, kv_heads, v_dim], or what `layout` and `v_packing` make of it; in any format. Absent
    /// together with `v` to read keys alone.
    pub v_cache: kvl_const_view,
    /// Keys [batch, seq, kv_heads, dim], of any type.
    pub k: kvl_view,
    /// Values [batch, seq, kv_heads, v_dim], of any type.
    pub v: kvl_view,
    /// [batch]: token t of sequence b is the one at position `positions[b] + t` of its sequence of the cache.
    pub positions: *const i32,
    /// [batch]: only the first `counts[b]` tokens of sequence b are read, and later ones of the target are not written; null for all.
    pub counts: *const i32,
    /// [batch]: sequence b of the call is sequence `sequences[b]` of the cache; null for the same. A sequence may be read several
    /// times.
    pub sequences: *const i32,
    /// The slots of positions; null for `KVL_LAYOUT_KIND_CONTIGUOUS`. One call reads at most as many tokens of a sequence of a ring as
    /// the ring has slots; the caller knows which of them it still holds.
    pub layout: *const kvl_layout,
    /// The scales of `k_cache` and `v_cache`, for formats that have scales; null for none.
    pub scales: *const kvl_cache_scales,
    /// How values lie in `v_cache`.
    pub v_packing: kvl_packing,
    /// 0.
    pub reserved: i32,
    /// The block of the Hadamard rotation that the keys were written with, which is undone; 0 for none.
    pub k_hadamard: i64,
    /// The same for the values.
    pub v_hadamard: i64,
}

sized!(kvl_kv_read_params[k_hadamard]);
assert_layout!(
    kvl_kv_read_params, 424,
    struct_size: 0, k_cache: 8, v_cache: 96, k: 184, v: 272, positions: 360, counts: 368, sequences: 376, layout: 384,
    scales: 392, v_packing: 400, reserved: 404, k_hadamard: 408, v_hadamard: 416,
);

/// Reads tokens of a cache, of any format and layout, into plain tensors: the numbers that attention computes with, which are
/// units times their scale in a quantised format, rounded once to the type of the target (to nearest, ties to even). A slot
/// that no token was written to is read as it is.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs, while no call writes the tokens that
/// are read. A null `runner` runs on the calling thread.
/// Bad input: null, an unknown `struct_size` or enumeration value, shapes that do not fit, a position past the capacity
/// (`KVL_STATUS_CAPACITY`), a negative position, a sequence or page that does not exist, and a target that shares memory with
/// anything else are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_kv_read(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    params: *const kvl_kv_read_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let params = unsafe { read_sized(params) }?;
        reserved("kvl_kv_read_params", params.reserved)?;
        // SAFETY: as above.
        let [k_scales, v_scales] = unsafe { read_scales(params.scales) }?;
        let k_cache = with_scales(params.k_cache.units("k_cache")?, "the scales of k_cache", &k_scales)?;
        let keys = (k_cache, params.k.raw("k")?);
        ensure!(
            params.v.is_absent() == params.v_cache.is_absent(),
            NullPointer,
            "only one of v and v_cache is given: give both, or leave both all zero to read keys alone"
        );
        let values = match params.v.is_absent() {
            true => {
                ensure!(v_scales.is_absent(), InvalidValue, "the scales of v_cache are given, but v_cache is absent");
                None
            }
            false => Some((
                with_scales(params.v_cache.units("v_cache")?, "the scales of v_cache", &v_scales)?,
                params.v.raw("v")?,
            )),
        };
        let batch = keys.1.shape[BATCH];
        // SAFETY: as above.
        let from = unsafe {
            Source {
                positions: required_list("positions", params.positions, batch)?,
                counts: list("counts", params.counts, batch)?,
                sequences: list("sequences", params.sequences, batch)?,
                layout: read_layout(params.layout, keys.0.shape[SEQ])?,
            }
        };
        let v_packing = parse_packing("v_packing", params.v_packing)?;
        let k_hadamard = parse_block("k_hadamard", params.k_hadamard)?;
        let v_hadamard = parse_block("v_hadamard", params.v_hadamard)?;
        let read = RawRead { keys, values, from, v_packing, k_hadamard, v_hadamard };
        // SAFETY: as above.
        unsafe { kv_read_raw(context, runner.as_dyn(), &read) }
    })
}
