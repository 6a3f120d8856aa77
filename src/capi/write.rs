//! The cache write.

use super::arguments::{list, required_list, reserved};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::hadamard::parse_block;
use super::layout::{kvl_layout, kvl_packing, parse_packing, read_layout};
use super::norm::{kvl_rms_norm_params, read_rms_norm};
use super::rope::{kvl_rope_params, read_rope};
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::scales::{kvl_cache_scales, read_scales, with_scales};
use super::sized::{assert_layout, read_sized, sized};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::ensure;
use crate::ops::write::{Destination, RawWrite, kv_write_raw};
use crate::view::{BATCH, SEQ};

/// New keys and values, their caches and their places. Start from `KVL_KV_WRITE_PARAMS_INIT`, set `k`, `k_cache`,
/// usually `v` and `v_cache`, and either `positions` or `slots`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_kv_write_params {
    /// `sizeof(kvl_kv_write_params)`.
    pub struct_size: usize,
    /// New keys [batch, seq, kv_heads, dim].
    pub k: kvl_const_view,
    /// New values [batch, seq, kv_heads, v_dim]. Absent together with `v_cache` to write keys alone.
    pub v: kvl_const_view,
    /// The cache of keys: [sequences, capacity, kv_heads, dim], or what `layout` makes of the first two axes; of any
    /// type.
    pub k_cache: kvl_view,
    /// The cache of values: [sequences, capacity, kv_heads, v_dim], or what `layout` and `v_packing` make of it; of any
    /// type.
    pub v_cache: kvl_view,
    /// [batch]: token t of sequence b is written to position `positions[b] + t` of its row of the cache.
    pub positions: *const i32,
    /// [batch]: only the first `counts[b]` tokens of sequence b are written (padded prompts); null for all.
    pub counts: *const i32,
    /// [batch]: sequence b of the call is sequence `sequences[b]` of the cache; null for the same.
    pub sequences: *const i32,
    /// [batch, seq]: the slot of each token in the row of its sequence, instead of `positions`; -1 skips a token. With
    /// `KVL_LAYOUT_KIND_PAGED` and `KVL_LAYOUT_KIND_RAGGED`, slots count over the whole pool, page by page; the layout's
    /// table is not read, and `sequences` must be null.
    pub slots: *const i32,
    /// Rotates the keys before they are written; null for no rotation. The bits are those of `kvl_rope` into a view of
    /// the cache's type.
    pub rope: *const kvl_rope_params,
    /// The slots of positions; null for `KVL_LAYOUT_KIND_CONTIGUOUS`. One call gives a sequence of a ring at most as
    /// many tokens as the ring has slots besides its sink tokens. `KVL_LAYOUT_KIND_INDIRECT` cannot be written: write
    /// to the token's own row, and set the entry of the table.
    pub layout: *const kvl_layout,
    /// Normalises the heads of the keys before they are rotated; null for no norm. The bits are those of `kvl_rms_norm`
    /// into f32 first.
    pub k_norm: *const kvl_rms_norm_params,
    /// How values lie in `v_cache`. `kvl_context_v_packing` states the best packing for attention.
    pub v_packing: kvl_packing,
    /// 0.
    pub reserved: i32,
    /// The scales of `k_cache` and `v_cache`, for formats that have scales, which are written too; null for none.
    pub scales: *const kvl_cache_scales,
    /// The block of the Hadamard rotation of the keys, after `rope`; 0 for none. `kvl_hadamard_block` gives the largest block.
    /// `kvl_attention_params.k_hadamard` has to agree.
    pub k_hadamard: i64,
    /// The same for the values.
    pub v_hadamard: i64,
}

sized!(kvl_kv_write_params[layout, scales, k_hadamard]);
assert_layout!(
    kvl_kv_write_params, 448,
    struct_size: 0, k: 8, v: 96, k_cache: 184, v_cache: 272, positions: 360, counts: 368, sequences: 376, slots: 384,
    rope: 392, layout: 400, k_norm: 408, v_packing: 416, reserved: 420, scales: 424,
    k_hadamard: 432, v_hadamard: 440,
);

/// Writes new keys and values into their caches, of all sequences in one call, converted to the type of the cache (to
/// nearest, ties to even; what f16 cannot hold becomes an infinity, unless the context was made with
/// `KVL_CONTEXT_FLAG_SATURATE_F16`). Keys are normalised first if `params->k_norm` is given, and rotated if `params->rope` is. With
/// `params->k_hadamard` and `params->v_hadamard`, what is written is rotated by Hadamard matrices, in f32, before it is converted.
/// Lengths are the caller's to advance.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches or disjoint sequences of a
/// cache. A null `runner` runs on the calling thread.
/// Bad input: null, an unknown `struct_size` or enumeration value, shapes that do not fit, a slot past the capacity
/// (`KVL_STATUS_CAPACITY`), a negative position or slot, a sequence or page that does not exist, two tokens with one
/// slot (`KVL_STATUS_DUPLICATE_SLOT`), and a cache that shares memory with anything else are errors, and nothing is
/// written. Nothing is clamped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_kv_write(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    params: *const kvl_kv_write_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let params = unsafe { read_sized(params) }?;
        reserved("kvl_kv_write_params", params.reserved)?;
        // SAFETY: as above.
        let [k_scales, v_scales] = unsafe { read_scales(params.scales) }?;
        let k_cache = with_scales(params.k_cache.units("k_cache")?, "the scales of k_cache", &k_scales)?;
        let keys = (params.k.raw("k")?, k_cache);
        ensure!(
            params.v.is_absent() == params.v_cache.is_absent(),
            NullPointer,
            "only one of v and v_cache is given: give both, or leave both all zero to write keys alone"
        );
        let values = match params.v.is_absent() {
            true => {
                ensure!(v_scales.is_absent(), InvalidValue, "the scales of v_cache are given, but v_cache is absent");
                None
            }
            false => Some((
                params.v.raw("v")?,
                with_scales(params.v_cache.units("v_cache")?, "the scales of v_cache", &v_scales)?,
            )),
        };
        let batch = keys.0.shape[BATCH];
        let tokens = batch.saturating_mul(keys.0.shape[SEQ]);
        ensure!(
            params.slots.is_null() || params.positions.is_null(),
            InvalidValue,
            "both positions and slots are given: give either"
        );
        // SAFETY: as above.
        let to = unsafe {
            Destination {
                positions: match params.slots.is_null() {
                    true => required_list("positions", params.positions, batch)?,
                    false => &[],
                },
                counts: list("counts", params.counts, batch)?,
                sequences: list("sequences", params.sequences, batch)?,
                slots: list("slots", params.slots, tokens)?,
                layout: read_layout(params.layout, keys.1.shape[SEQ])?,
            }
        };
        let k_norm = match params.k_norm.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { read_rms_norm(params.k_norm, &keys.0) }?),
        };
        let rope = match params.rope.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { read_rope(params.rope, &keys.0) }?),
        };
        let v_packing = parse_packing("v_packing", params.v_packing)?;
        let k_hadamard = parse_block("k_hadamard", params.k_hadamard)?;
        let v_hadamard = parse_block("v_hadamard", params.v_hadamard)?;
        let write = RawWrite { keys, values, to, k_norm, rope, k_hadamard, v_hadamard, v_packing };
        // SAFETY: as above.
        unsafe { kv_write_raw(context, runner.as_dyn(), &write) }
    })
}
