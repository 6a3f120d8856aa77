//! Attention over a cache.

use super::arguments::{list, output_list, reserved, size};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::kernels::{kvl_precision, parse_precision};
use super::layout::{kvl_layout, kvl_packing, parse_packing};
use super::masks::{kvl_bit_mask, kvl_mask, read_masks};
use super::plan::{self, kvl_plan};
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::sized::{Growing, assert_layout, read_sized, sized};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::{Result, ensure};
use crate::layout::Packing;
use crate::ops::attention::{
    Memory, RawAttention, attention_raw, attention_shapes, attention_workspace_size, fill_alibi_slopes,
};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::view::{BATCH, DIM, HEADS, MAX_AXIS, RawView, SEQ};
use std::ffi::c_void;

/// What `kvl_attention_params.flags` is a sum of.
pub type kvl_attention_flag = u32;
/// No key after the query's own position is visible.
pub const KVL_ATTENTION_FLAG_CAUSAL: u32 = 1;
/// Keys more than `window_left` before the query's own position are masked.
pub const KVL_ATTENTION_FLAG_WINDOW_LEFT: u32 = 2;
/// Keys more than `window_right` after the query's own position are masked.
pub const KVL_ATTENTION_FLAG_WINDOW_RIGHT: u32 = 4;

/// What attention reads, writes and sees. Start from `KVL_ATTENTION_PARAMS_INIT`, which sees every key; set `q`, `k`, `v`
/// and `out`. Query head h reads KV head `h / (heads / kv_heads)`; nothing is repeated in memory.
///
/// A logit is `softcap(q.k * scale) + alibi + bias`; then what is masked is taken out, then softmax in f32. Query i of a
/// sequence stands at position p = i + offset among the keys, and sees key j when all of these hold: `j < lengths[sequence]`,
/// `j >= kv_starts[sequence]`, causal: `j <= p`, left window: `j >= p - window_left`, right window: `j <= p + window_right` (of
/// these three, a key `j < prefix_lengths[sequence]` needs none), the mask's entry is not 0, the bit mask's is not 0, the bias
/// is not -inf, a ring has not overwritten it. A query that sees no key has output 0 and LSE -inf (with a sink: the sink's
/// logit). What is not seen cannot reach the output, NaN or not; what is seen does.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_attention_params {
    /// `sizeof(kvl_attention_params)`.
    pub struct_size: usize,
    /// Queries [batch, seq, heads, dim], of any type.
    pub q: kvl_const_view,
    /// Keys [batch, keys, kv_heads, dim]: the cache, whole.
    pub k: kvl_const_view,
    /// Values [batch, keys, kv_heads, v_dim], of the type of the keys.
    pub v: kvl_const_view,
    /// Output [batch, seq, heads, v_dim], of any type.
    pub out: kvl_view,
    /// Output [batch, seq, heads], contiguous: natural logarithm of the sum of the exponentials of a query row's logits; null
    /// if not wanted.
    pub lse: *mut f32,
    /// Factor on q.k; 0 is 1 / sqrt(dim).
    pub scale: f32,
    /// `softcap * tanh(x / softcap)` on scaled logits; 0 is none.
    pub softcap: f32,
    /// `KVL_ATTENTION_FLAG_CAUSAL | KVL_ATTENTION_FLAG_WINDOW_LEFT | KVL_ATTENTION_FLAG_WINDOW_RIGHT`. A window of 0 keys means
    /// something, so whether there is a window is said here, not by its size.
    pub flags: kvl_attention_flag,
    /// 0.
    pub reserved: i32,
    /// With `KVL_ATTENTION_FLAG_WINDOW_LEFT`: how many keys are visible before the query's own position. Else 0.
    pub window_left: i64,
    /// With `KVL_ATTENTION_FLAG_WINDOW_RIGHT`: how many keys are visible after the query's own position. Else 0.
    pub window_right: i64,
    /// [batch]: valid keys; null for all.
    pub lengths: *const i32,
    /// [batch]: the first visible key (left-padded batches); null for 0.
    pub kv_starts: *const i32,
    /// [batch]: the position of query 0 among the keys; null for `length - seq`, so that the last query sees the last key.
    /// A negative one leaves leading queries without keys.
    pub offsets: *const i32,
    /// Which keys each query sees, [batch, seq, heads, keys]; absent for all.
    pub mask: kvl_mask,
    /// Added to logits, [batch, seq, heads, keys], of any type; absent for none.
    pub bias: kvl_const_view,
    /// [heads]: `slope * (j - p)` is added to logits; null for none. See `kvl_alibi_slopes`.
    pub alibi_slopes: *const f32,
    /// [heads]: one more logit, which takes weight and has no value; null for none.
    pub sink_logits: *const f32,
    /// How exactly to compute; see `kvl_context_attention_kernel_names`. Since ABI version 2.
    pub precision: kvl_precision,
    /// 0.
    pub reserved2: i32,
    /// In which slots of `k` and `v` the tokens of a sequence lie, and so what their first two axes mean; null for contiguous
    /// sequences. A ring, and pages, need `lengths`. Positions go on counting what a ring has overwritten: a window must lie in
    /// what it retains, and with no window there can be only one query once it has overwritten any. Since ABI version 3.
    pub layout: *const kvl_layout,
    /// [batch + 1]: ragged queries. `q` and `out` are [1, tokens, heads, dim], and sequence b of the batch is tokens
    /// `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1] - 1` (`cu_seqlens`); null for sequences of equal length, the first axis of `q`.
    pub cu_seqlens_q: *const i32,
    /// With `cu_seqlens_q`: sequences of the batch, as many as every [batch] list here has entries. Else 0.
    pub num_sequences: i64,
    /// [batch]: every query sees the keys before this one, whatever causality and windows say (prefix-LM, attention sinks that
    /// a window must not hide); null for 0.
    pub prefix_lengths: *const i32,
    /// Which keys each query sees, a bit each; null for all.
    pub bit_mask: *const kvl_bit_mask,
    /// What `kvl_plan_create` has checked already: instead of `flags`, windows, `layout`, `cu_seqlens_q`, `num_sequences`,
    /// `lengths`, `kv_starts`, `offsets` and `prefix_lengths`, which must then be 0 or null, and of `mask` and `bit_mask`,
    /// which must be absent if the plan was made of either; null for none.
    pub plan: *const kvl_plan,
    /// How values lie in `v`: with `KVL_PACKING_ROW_PAIRS`, it is [batch, slots / 2, kv_heads, 2 * v_dim]. The same bits as for
    /// values that are not packed.
    pub v_packing: kvl_packing,
    /// 0.
    pub reserved3: i32,
}

sized!(kvl_attention_params[precision, layout]);
assert_layout!(kvl_attention_params, 672, struct_size: 0, q: 8, k: 96, v: 184, out: 272, lse: 360, scale: 368, softcap: 372, flags: 376, reserved: 380, window_left: 384, window_right: 392, lengths: 400, kv_starts: 408, offsets: 416, mask: 424, bias: 504, alibi_slopes: 592, sink_logits: 600, precision: 608, reserved2: 612, layout: 616, cu_seqlens_q: 624, num_sequences: 632, prefix_lengths: 640, bit_mask: 648, plan: 656, v_packing: 664, reserved3: 668);

/// Bytes of workspace that `kvl_attention` needs at most for the shapes of `params->q`, `k` and `v`, whatever lengths and
/// masks are, and for the threads of `runner`. Only those shapes, `layout`, `cu_seqlens_q` and `plan` are looked at: data may be
/// null.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null, an unknown `struct_size`, a negative axis or one above 2^31 - 1, a dim that is not 1 to 512 are errors, and
/// `*bytes` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_workspace_size(
    params: *const kvl_attention_params,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    let size = |params: &kvl_attention_params, threads| {
        let (q, k, v) = (attention_shape("q", &params.q)?, attention_shape("k", &params.k)?, value_shape(params)?);
        // SAFETY: the caller's promise.
        let (rows, layout) = unsafe { plan::workspace_visibility(params, q, k[SEQ]) }?;
        let (q, k) = attention_shapes(q, RawView { shape: k, ..params.k.raw("k")? }.units(), &layout, rows);
        Ok(attention_workspace_size(q, k, v[DIM], threads))
    };
    // SAFETY: the caller's promise.
    unsafe { workspace_size(params, runner, bytes, size) }
}

/// Grouped-query attention over a cache: one entry for prefill (the queries' keys are in the cache already), chunked prefill
/// and decode (seq = 1). Everything keeps its type; arithmetic is f32, rounded once to the type of `out`.
///
/// `workspace` has `workspace_bytes` bytes, at least what `kvl_attention_workspace_size` says for the same shapes and runner, and
/// is aligned to 64 bytes. Its contents are worth nothing before and after. The bits of a row of the output depend on that
/// row's inputs and the level alone: not on the runner, the batch around it or the strides.
///
/// Thread safety: may be called from any number of threads at once, each with outputs and a workspace of its own: two calls at
/// the same time with the same workspace compute garbage. `runner` null is the calling thread.
/// Bad input: null, an unknown `struct_size`, flag or enumeration value, shapes that do not fit, K and V of different types,
/// lengths outside the cache, an output that shares memory with an input, a workspace that is too small or misaligned are
/// errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    workspace: *mut c_void,
    workspace_bytes: usize,
    params: *const kvl_attention_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let call = unsafe { raw_attention(&read_sized(params)?) }?;
        let memory = Memory::Fixed(workspace.cast(), workspace_bytes);
        // SAFETY: as above.
        unsafe { attention_raw(context, runner.as_dyn(), memory, &call) }
    })
}

/// Fills the standard ALiBi slopes for any number of heads: for a power of two n, `2^(-8 (h + 1) / n)`; otherwise those of
/// the largest power of two below, then every other one of twice that.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
/// Bad input: null or a negative number of heads is an error, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_alibi_slopes(slopes: *mut f32, heads: i64) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        fill_alibi_slopes(unsafe { output_list("slopes", slopes, size("heads", heads)?) }?);
        Ok(())
    })
}

/// Writes the bytes of workspace that a call with these parameters needs on so many threads.
///
/// # Safety
/// The pointers are null, or what the header describes.
pub(super) unsafe fn workspace_size<P: Growing>(
    params: *const P,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
    size: impl FnOnce(&P, usize) -> Result<usize>,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's.
        let (params, runner) = unsafe { (read_sized(params)?, CallerRunner::new(runner)?) };
        ensure!(!bytes.is_null(), NullPointer, "the pointer bytes is null");
        let needed = size(&params, runner.as_dyn().num_threads())?;
        // SAFETY: not null, and the caller's to write.
        unsafe { bytes.write(needed) };
        Ok(())
    })
}

/// The shape of the values, of which two are a row of `v` if they are packed.
pub(super) fn value_shape(params: &kvl_attention_params) -> Result<[usize; 4]> {
    let mut v = params.v;
    if parse_packing("v_packing", params.v_packing)? == Packing::RowPairs {
        v.shape[DIM] /= 2;
    }
    attention_shape("v", &v)
}

/// The shape of a tensor of attention, for the size of a workspace: data and strides are not looked at.
pub(super) fn attention_shape(name: &str, view: &kvl_const_view) -> Result<[usize; 4]> {
    let raw = view.raw(name)?;
    // Data and strides do not count here; an empty copy is enough to have the axes checked.
    RawView { shape: [0; 4], ..raw }.validate(name)?;
    for axis in [BATCH, SEQ, HEADS] {
        let n = raw.shape[axis];
        let most = MAX_AXIS;
        ensure!(n <= most, Shape, "{name}: axis {axis} has {n} elements, more than {most}");
    }
    let dim = raw.shape[DIM];
    ensure!(
        (1..=MAX_HEAD_DIM).contains(&dim),
        Shape,
        "{name} has dim = {dim}, which is not between 1 and {MAX_HEAD_DIM}"
    );
    Ok(raw.shape)
}

/// # Safety
/// `params` is what the header describes.
pub(super) unsafe fn raw_attention<'a>(params: &kvl_attention_params) -> Result<RawAttention<'a>> {
    reserved("kvl_attention_params", params.reserved)?;
    ensure!(
        params.reserved2 == 0,
        InvalidEnum,
        "kvl_attention_params.reserved2 is {}, but must be 0",
        params.reserved2
    );
    ensure!(
        params.reserved3 == 0,
        InvalidEnum,
        "kvl_attention_params.reserved3 is {}, but must be 0",
        params.reserved3
    );
    let (q, k) = (params.q.raw("q")?, params.k.raw("k")?);
    let heads = q.shape[HEADS];
    // SAFETY: the caller's, here and below.
    let (visibility, planned) = unsafe { plan::visibility(params, &q, k) }?;
    // SAFETY: as above.
    unsafe {
        Ok(RawAttention {
            q,
            k: k.into(),
            v: params.v.raw("v")?.into(),
            out: params.out.raw("out")?,
            lse: params.lse,
            scale: (params.scale != 0.0).then_some(params.scale),
            softcap: (params.softcap != 0.0).then_some(params.softcap),
            v_packing: parse_packing("v_packing", params.v_packing)?,
            visibility,
            planned,
            masks: read_masks(params, visibility.batch)?,
            bias: match params.bias.is_absent() {
                true => None,
                false => Some(params.bias.raw("bias")?),
            },
            alibi_slopes: list("alibi_slopes", params.alibi_slopes, heads)?,
            sink_logits: list("sink_logits", params.sink_logits, heads)?,
            precision: parse_precision("precision", params.precision)?,
        })
    }
}

pub(super) fn check_flags(flags: kvl_attention_flag) -> Result<()> {
    let known = KVL_ATTENTION_FLAG_CAUSAL | KVL_ATTENTION_FLAG_WINDOW_LEFT | KVL_ATTENTION_FLAG_WINDOW_RIGHT;
    let unknown = flags & !known;
    ensure!(unknown == 0, InvalidEnum, "flags has unknown bits {unknown:#x}");
    Ok(())
}
