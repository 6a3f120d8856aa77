//! Attention over a cache.

use super::arguments::{list, output_list, reserved, size};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::hadamard::parse_block;
use super::kernels::{kvl_precision, parse_precision};
use super::layout::{kvl_layout, kvl_packing, parse_packing};
use super::masks::{kvl_bit_mask, kvl_mask, read_masks};
use super::plan::{self, kvl_plan};
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::scales::{kvl_cache_scales, read_scales, with_scales};
use super::sized::{Growing, assert_layout, read_sized, read_sized_to, sized};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::{Result, ensure};
use crate::layout::Packing;
use crate::ops::attention::{
    Memory, RawAttention, attention_raw, attention_shapes, attention_workspace_size, fill_alibi_slopes,
};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::view::{BATCH, DIM, HEADS, MAX_AXIS, RawCacheView, RawView, SEQ, Units};
use std::ffi::c_void;
use std::mem::MaybeUninit;

/// What `kvl_attention_params.flags` is a sum of.
pub type kvl_attention_flag = u32;
/// No key after the query's own position is visible.
pub const KVL_ATTENTION_FLAG_CAUSAL: u32 = 1;
/// Keys more than `window_left` before the query's own position are masked.
pub const KVL_ATTENTION_FLAG_WINDOW_LEFT: u32 = 2;
/// Keys more than `window_right` after the query's own position are masked.
pub const KVL_ATTENTION_FLAG_WINDOW_RIGHT: u32 = 4;

/// What an attention call reads and writes, and which keys its queries see. Start from `KVL_ATTENTION_PARAMS_INIT`,
/// with which every query sees every key; set `q`, `k`, `v` and `out`. Query head h reads KV head `h / (heads /
/// kv_heads)`; nothing is repeated in memory.
///
/// A logit is `softcap(q.k * scale) + alibi + bias`. Then masked keys are removed, and softmax follows in f32. Query i
/// of sequence b stands at position p = i + offset among the keys. It sees key j if `j < lengths[b]`, `j >=
/// kv_starts[b]`, the entries of the mask and of the bit mask are not 0, the bias is not -inf, a ring has not
/// overwritten the key, and either `j < prefix_lengths[b]` or all of these hold: `j <= p` (causal), `j >= p -
/// window_left` (left window), `j <= p + window_right` (right window).
///
/// A query that sees no key has output 0 and LSE -inf (with a sink logit: that logit). NaN and infinities in keys and
/// values that no query sees never reach the output; those in visible ones do.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_attention_params {
    /// `sizeof(kvl_attention_params)`.
    pub struct_size: usize,
    /// Queries [batch, seq, heads, dim], of any type.
    pub q: kvl_const_view,
    /// Keys [batch, keys, kv_heads, dim]: the whole cache, in any format.
    pub k: kvl_const_view,
    /// Values [batch, keys, kv_heads, v_dim], in any format, which need not be that of the keys.
    pub v: kvl_const_view,
    /// Output [batch, seq, heads, v_dim], of any type.
    pub out: kvl_view,
    /// Output [batch, seq, heads], contiguous: the natural logarithm of the sum of the exponentials of the logits of
    /// each query and head; null if not wanted.
    pub lse: *mut f32,
    /// Factor on q.k; 0 stands for 1 / sqrt(dim).
    pub scale: f32,
    /// `softcap * tanh(x / softcap)` is applied to scaled logits x; 0 for none.
    pub softcap: f32,
    /// A sum of `KVL_ATTENTION_FLAG_*`. A flag says whether there is a window, since a window of 0 keys has a meaning
    /// too.
    pub flags: kvl_attention_flag,
    /// 0.
    pub reserved: i32,
    /// With `KVL_ATTENTION_FLAG_WINDOW_LEFT`: how many keys before the query's own position are visible. Else 0.
    pub window_left: i64,
    /// With `KVL_ATTENTION_FLAG_WINDOW_RIGHT`: how many keys after the query's own position are visible. Else 0.
    pub window_right: i64,
    /// [batch]: the number of valid keys; null for all.
    pub lengths: *const i32,
    /// [batch]: the first visible key (left-padded batches); null for 0.
    pub kv_starts: *const i32,
    /// [batch]: the position of query 0 among the keys; null for `length - seq`, with which the last query sees the
    /// last key. With a negative offset, leading queries see no keys.
    pub offsets: *const i32,
    /// A boolean mask [batch, seq, heads, keys], with at least as many keys as the longest sequence; absent for none.
    pub mask: kvl_mask,
    /// Numbers [batch, seq, heads, keys] of any type that are added to logits; absent for none. Axes of one element
    /// broadcast, and so do strides of 0.
    pub bias: kvl_const_view,
    /// [heads]: `slope * (j - p)` is added to logits; null for none. See `kvl_alibi_slopes`.
    pub alibi_slopes: *const f32,
    /// [heads]: one more logit per head, which takes weight and has no value; null for none.
    pub sink_logits: *const f32,
    /// The precision; `kvl_context_attention_kernel_names` names the kernels of each.
    pub precision: kvl_precision,
    /// 0.
    pub reserved2: i32,
    /// In which slots of `k` and `v` the tokens of a sequence lie, which gives their first two axes a meaning; null for
    /// contiguous sequences. A ring and pages need `lengths`. Positions count what a ring has overwritten: a window
    /// must lie in what the ring retains, and without a window there can be only one query once the ring has
    /// overwritten keys.
    pub layout: *const kvl_layout,
    /// [num_sequences + 1]: ragged queries. `q` and `out` are [1, tokens, heads, dim], and the queries of sequence b
    /// are tokens `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1] - 1`. Null for sequences of equal length, which are the
    /// first axis of `q`.
    pub cu_seqlens_q: *const i32,
    /// With `cu_seqlens_q`: the number of sequences, which is the length of every [batch] list. Else 0.
    pub num_sequences: i64,
    /// [batch]: every query sees the keys before this one, whatever causality and windows say (prefix-LM, first tokens
    /// that a window must keep); null for 0.
    pub prefix_lengths: *const i32,
    /// A mask with one bit per query and key; null for none.
    pub bit_mask: *const kvl_bit_mask,
    /// A plan that replaces `flags`, windows, `layout`, `cu_seqlens_q`, `num_sequences`, `lengths`, `kv_starts`,
    /// `offsets`, `query_positions` and `prefix_lengths`, which must then be 0 or null. It replaces `mask` and `bit_mask` too if it was
    /// made of either. Null for none.
    pub plan: *const kvl_plan,
    /// How values lie in `v`. With `KVL_PACKING_ROW_PAIRS`, `v` is [batch, slots / 2, kv_heads, 2 * v_dim]. The bits of
    /// the result do not depend on it.
    pub v_packing: kvl_packing,
    /// 0.
    pub reserved3: i32,
    /// [batch, seq], of ragged queries [tokens]: the position of every query, instead of i + offset, for causality, windows and
    /// ALiBi. Key i + offset, which is the query's own token, then stands at the same position; other keys stand at their
    /// numbers. In a tree of guesses, positions are depths. Null for none.
    pub query_positions: *const i32,
    /// The scales of `k` and `v`, for formats that have scales; null for none.
    pub scales: *const kvl_cache_scales,
    /// The block of the Hadamard rotation that the keys were written with; 0 for none. Queries are given unrotated: each is rotated
    /// once, in f32, as it is loaded, and then counts as one in f32.
    pub k_hadamard: i64,
    /// The same for the values. The rotation of an output row is undone once, in f32, before the row is rounded.
    pub v_hadamard: i64,
}

sized!(kvl_attention_params[precision, layout, query_positions, k_hadamard]);
assert_layout!(
    kvl_attention_params, 704,
    struct_size: 0, q: 8, k: 96, v: 184, out: 272, lse: 360, scale: 368, softcap: 372, flags: 376, reserved: 380,
    window_left: 384, window_right: 392, lengths: 400, kv_starts: 408, offsets: 416, mask: 424, bias: 504,
    alibi_slopes: 592, sink_logits: 600, precision: 608, reserved2: 612, layout: 616, cu_seqlens_q: 624,
    num_sequences: 632, prefix_lengths: 640, bit_mask: 648, plan: 656, v_packing: 664, reserved3: 668,
    query_positions: 672, scales: 680, k_hadamard: 688, v_hadamard: 696,
);

/// The bytes of workspace that `kvl_attention` needs at most for the shapes of `params->q`, `k` and `v`, whatever
/// lengths and masks are, and for the threads of `runner`. Only these shapes, `layout`, `cu_seqlens_q` and `plan` are
/// read; data may be null. Few queries can need more bytes than many, so that every shape has to be asked for.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null, an unknown `struct_size`, an axis that is negative or above 2^31 - 1, and a dim that is not 1 to
/// 1024 are errors, and `*bytes` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_workspace_size(
    params: *const kvl_attention_params,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    let size = |params: &kvl_attention_params, threads| {
        let (q, k, v) = attention_tensors(params)?;
        // SAFETY: the caller's promise.
        let (rows, layout) = unsafe { plan::workspace_visibility(params, q, k[SEQ]) }?;
        let (q, k) = attention_shapes(q, RawView { shape: k, ..params.k.units("k")? }, &layout, rows);
        Ok(attention_workspace_size(q, k, v[DIM], threads))
    };
    // SAFETY: the caller's promise.
    unsafe { workspace_size(params, runner, bytes, size) }
}

/// Grouped-query attention over a cache, for prefill (with the keys of the queries already in the cache), chunked
/// prefill and decode (seq = 1). Every tensor keeps its type; arithmetic is f32, rounded once to the type of `out`.
///
/// `workspace` has `workspace_bytes` bytes, at least as many as `kvl_attention_workspace_size` gives for the same
/// shapes and runner, and is aligned to 64 bytes. Its contents have no meaning before and after the call. The bits of
/// an output row depend on the inputs of that row and the level alone: not on the runner, the rest of the batch or the
/// strides.
///
/// Thread safety: may be called from any number of threads at once, each with its own outputs and its own workspace;
/// two calls that share a workspace at the same time have undefined results. A null `runner` runs on the calling
/// thread.
/// Bad input: null, an unknown `struct_size`, flag or enumeration value, shapes that do not fit, lengths outside the
/// cache, an output that shares memory with an input, and a workspace that is too small or misaligned are errors, and
/// nothing is written.
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
        let mut copy = MaybeUninit::uninit();
        // SAFETY: as above.
        unsafe {
            with_attention(read_sized_to(params, &mut copy)?, &|call| {
                let memory = Memory::Fixed(workspace.cast(), workspace_bytes);
                attention_raw(context, runner.as_dyn(), memory, call)
            })
        }
    })
}

/// Fills in the standard ALiBi slopes for any number of heads: for a power of two n, `2^(-8 (h + 1) / n)`; otherwise
/// those of the largest power of two below, followed by every other slope of twice that number.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null and a negative number of heads are errors, and nothing is written.
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

/// The shapes of queries, keys and values, for the size of a workspace.
pub(super) fn attention_tensors(params: &kvl_attention_params) -> Result<([usize; 4], [usize; 4], [usize; 4])> {
    let mut v = params.v;
    if parse_packing("v_packing", params.v_packing)? == Packing::RowPairs {
        // Two values are a row.
        v.shape[DIM] /= 2;
    }
    Ok((
        attention_shape("q", params.q.raw("q")?)?,
        attention_shape("k", params.k.units("k")?)?,
        attention_shape("v", v.units("v")?)?,
    ))
}

/// The shape of a tensor of attention, for the size of a workspace: data and strides are not looked at.
pub(super) fn attention_shape<U: Units>(name: &str, raw: RawView<U>) -> Result<[usize; 4]> {
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

/// Calls `f` with the call that the parameters describe, which is too large to be returned at no cost.
///
/// # Safety
/// `params` is what the header describes.
pub(super) unsafe fn with_attention(
    params: &kvl_attention_params,
    f: &dyn Fn(&RawAttention) -> Result<()>,
) -> Result<()> {
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
    let (q, k, v) = (params.q.raw("q")?, params.k.units("k")?, params.v.units("v")?);
    let heads = q.shape[HEADS];
    // SAFETY: the caller's, here and below.
    let (visibility, planned) = unsafe { plan::visibility(params, &q, k) }?;
    let (k, v) = if params.scales.is_null() {
        let cache = |units| RawCacheView { units, scales: None, affine: None };
        (cache(k), cache(v))
    } else {
        // SAFETY: as above.
        let [k_scales, v_scales] = unsafe { read_scales(params.scales) }?;
        (with_scales(k, "the scales of k", &k_scales)?, with_scales(v, "the scales of v", &v_scales)?)
    };
    // SAFETY: as above.
    let call = unsafe {
        RawAttention {
            q,
            k: &k,
            v: &v,
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
            k_hadamard: parse_block("k_hadamard", params.k_hadamard)?,
            v_hadamard: parse_block("v_hadamard", params.v_hadamard)?,
            precision: parse_precision("precision", params.precision)?,
        }
    };
    f(&call)
}

pub(super) fn check_flags(flags: kvl_attention_flag) -> Result<()> {
    let known = KVL_ATTENTION_FLAG_CAUSAL | KVL_ATTENTION_FLAG_WINDOW_LEFT | KVL_ATTENTION_FLAG_WINDOW_RIGHT;
    let unknown = flags & !known;
    ensure!(unknown == 0, InvalidEnum, "flags has unknown bits {unknown:#x}");
    Ok(())
}
