//! Exports for attention whose keys are spread over several calls.

use super::arguments::{list, required_list, reserved, size};
use super::attention::{attention_shape, attention_tensors, kvl_attention_params, with_attention, workspace_size};
use super::context::{borrow, kvl_context};
use super::format::{kvl_format, parse_format};
use super::guard::guard;
use super::hadamard::parse_block;
use super::kernels::{kvl_precision, parse_precision};
use super::plan;
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::sized::{assert_layout, read_sized, sized};
use super::status::kvl_status;
use super::views::kvl_view;
use crate::error::{Result, ensure, fail};
use crate::ops::attention::attention_shapes;
use crate::ops::chunks::{
    ChunkMerge, MAX_SEGMENTS, RawChunks, RawMerge, RawStates, attention_chunks_raw, attention_chunks_workspace_size,
    check_format, chunk_states_len, merge_chunks_raw,
};
use crate::view::{DIM, HEADS, RawView, SEQ};
use std::ffi::c_void;

/// The states of the chunks of a segment, as `kvl_attention_chunks` wrote them.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_chunk_states {
    /// [len].
    pub states: *const f32,
    /// The number of floats that `kvl_attention_chunks_states_len` gave for the segment.
    pub len: i64,
}

assert_layout!(kvl_chunk_states, 16, states: 0, len: 8);

/// What a merge of segments reads and writes. Start from `KVL_MERGE_CHUNKS_PARAMS_INIT`, set `segments`,
/// `num_segments`, `kv_heads`, `k_format`, `v_format`, `out`, and `precision` if that of the segments was not the default.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_merge_chunks_params {
    /// `sizeof(kvl_merge_chunks_params)`.
    pub struct_size: usize,
    /// [num_segments], in the order of the sequence.
    pub segments: *const kvl_chunk_states,
    /// 1 to 256.
    pub num_segments: usize,
    /// The number of KV heads of the cache.
    pub kv_heads: i64,
    /// The format of its keys.
    pub k_format: kvl_format,
    /// The format of its values.
    pub v_format: kvl_format,
    /// The precision of the segments' calls.
    pub precision: kvl_precision,
    /// 0.
    pub reserved: i32,
    /// [heads]: one more logit per head, which takes weight and has no value, once for all segments; null for none.
    pub sink_logits: *const f32,
    /// Output [batch, seq, heads, v_dim], of any type.
    pub out: kvl_view,
    /// Output [batch, seq, heads], contiguous: the natural logarithm of the sum of the exponentials of the logits of
    /// each query and head; null if not wanted.
    pub lse: *mut f32,
    /// `kvl_attention_params.v_hadamard` of the segments' calls; 0 for none. States are those of rotated values, and the output is
    /// rotated back.
    pub v_hadamard: i64,
}

sized!(kvl_merge_chunks_params[v_hadamard]);
assert_layout!(
    kvl_merge_chunks_params, 160,
    struct_size: 0, segments: 8, num_segments: 16, kv_heads: 24, k_format: 32, v_format: 36, precision: 40, reserved: 44,
    sink_logits: 48, out: 56, lse: 144, v_hadamard: 152,
);

/// The number of floats that `kvl_attention_chunks` writes for the shapes of `params->q`, `k` and `v`: for each query
/// and head, and for each `KVL_SPLIT_GRID` keys (or part of as many) that a sequence of the cache has room for, v_dim
/// rounded up to 16, and 16 more. Only these shapes, `layout`, `cu_seqlens_q` and `plan` are read; data may be null.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: the errors of `kvl_attention_workspace_size`; ragged queries, a ring, and more floats than an address
/// space holds are errors too, and `*len` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_chunks_states_len(
    params: *const kvl_attention_params,
    len: *mut i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let params = unsafe { read_sized(params) }?;
        ensure!(!len.is_null(), NullPointer, "the pointer len is null");
        // SAFETY: as above.
        let (q, k, v_dim) = unsafe { span_shapes(&params) }?;
        let n = chunk_states_len(q, k[SEQ], v_dim);
        let bytes = n.checked_mul(size_of::<f32>()).filter(|&bytes| isize::try_from(bytes).is_ok());
        ensure!(bytes.is_some(), Shape, "states would have {n} floats, more than an address space holds");
        // SAFETY: not null, and the caller's to write. Less than the address space, so it fits.
        unsafe { len.write(n as i64) };
        Ok(())
    })
}

/// The bytes of workspace that `kvl_attention_chunks` needs at most, as `kvl_attention_workspace_size` gives them for
/// `kvl_attention`.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: the errors of `kvl_attention_workspace_size`; ragged queries and a ring are errors too, and `*bytes` is
/// not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_chunks_workspace_size(
    params: *const kvl_attention_params,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    let size = |params: &kvl_attention_params, threads| {
        // SAFETY: the caller's promise.
        let (q, k, v_dim) = unsafe { span_shapes(params) }?;
        Ok(attention_chunks_workspace_size(q, k, v_dim, threads))
    };
    // SAFETY: the caller's promise.
    unsafe { workspace_size(params, runner, bytes, size) }
}

/// Attention over a segment of a sequence, which writes the states of the segment's chunks for `kvl_merge_chunks`
/// instead of an output. Where keys are spread over machines, or come one segment after another, the merged bits are
/// those of one `kvl_attention` over all keys.
///
/// `params` is as for `kvl_attention`, in the segment's own positions: `lengths`, `kv_starts`, `offsets` and so on
/// count from the first key of the segment, which is a multiple of `KVL_SPLIT_GRID` (`kvl_shard_keys` cuts segments so,
/// and `kvl_shard_lengths` computes the lists). `out`, `lse` and `sink_logits` must be absent: `kvl_merge_chunks` takes
/// them. `states` has `states_len` floats, exactly as many as `kvl_attention_chunks_states_len` gives. They have a
/// meaning to contexts of the same level, for keys and values of the same types and the same precision, and may be sent
/// there as they are. Floats that are not needed are not written.
///
/// `workspace` is as for `kvl_attention`, with the size that `kvl_attention_chunks_workspace_size` gives.
///
/// Thread safety: as for `kvl_attention`.
/// Bad input: the errors of `kvl_attention`; an `out`, an `lse`, `sink_logits`, ragged queries, a ring, and `states`
/// that are null, of another length, not aligned to 4 bytes or that share memory with a tensor or a list are errors
/// too, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_chunks(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    workspace: *mut c_void,
    workspace_bytes: usize,
    params: *const kvl_attention_params,
    states: *mut f32,
    states_len: i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let params = unsafe { read_sized(params) }?;
        for (name, given) in [("out", !params.out.is_absent()), ("lse", !params.lse.is_null())] {
            ensure!(!given, InvalidValue, "{name} is given where segments are merged, not where they are computed");
        }
        // SAFETY: as above.
        unsafe {
            with_attention(&params, &|attention| {
                let call = RawChunks { attention: *attention, states, len: size("states_len", states_len)? };
                attention_chunks_raw(context, runner.as_dyn(), workspace.cast(), workspace_bytes, &call)
            })
        }
    })
}

/// The bytes of workspace that `kvl_merge_chunks` needs at most for the shape of `params->out`, `kv_heads`, the lengths
/// of the segments' states, and the threads of `runner`. Only these are read; data and states may be null.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, an unknown `struct_size`, no segment or more than 256, an axis that is negative or above 2^31 - 1,
/// a dim that is not 1 to 1024, heads that are no multiple of `kv_heads`, and lengths that are no number of chunks are
/// errors, and `*bytes` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_merge_chunks_workspace_size(
    params: *const kvl_merge_chunks_params,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    let size = |params: &kvl_merge_chunks_params, threads| {
        let out = params.out.raw("out")?;
        attention_shape("out", out)?;
        // SAFETY: the caller's promise.
        let segments = unsafe { segments(params) }?;
        let merge = chunk_merge(params, None)?;
        let call = RawMerge { segments: &segments[..params.num_segments], merge, out, lse: std::ptr::null_mut() };
        call.workspace_size(threads)
    };
    // SAFETY: the caller's promise.
    unsafe { workspace_size(params, runner, bytes, size) }
}

/// The output and LSE of attention whose keys lay in several segments, from the states that `kvl_attention_chunks`
/// wrote for each. The bits are those of one `kvl_attention` over all keys, if every segment but the last ended at a
/// multiple of `KVL_SPLIT_GRID`. `kvl_merge_states` needs less memory, and has the kernel's bound instead of its bits.
///
/// `workspace` is as for `kvl_attention`, with the size that `kvl_merge_chunks_workspace_size` gives.
///
/// Thread safety: as for `kvl_attention`.
/// Bad input: null, an unknown `struct_size` or enumeration value, the errors of `kvl_merge_chunks_workspace_size`, an
/// output that shares memory with states, sink logits or the other output, and a workspace that is too small or
/// misaligned are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_merge_chunks(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    workspace: *mut c_void,
    workspace_bytes: usize,
    params: *const kvl_merge_chunks_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let params = unsafe { read_sized(params) }?;
        let out = params.out.raw("out")?;
        // SAFETY: as above.
        let (segments, sink_logits) =
            unsafe { (segments(&params)?, list("sink_logits", params.sink_logits, out.shape[HEADS])?) };
        let merge = chunk_merge(&params, sink_logits)?;
        let call = RawMerge { segments: &segments[..params.num_segments], merge, out, lse: params.lse };
        // SAFETY: as above.
        unsafe { merge_chunks_raw(context, runner.as_dyn(), workspace.cast(), workspace_bytes, &call) }
    })
}

/// Queries, the keys that a sequence of the segment has room for, and the elements of a value.
///
/// # Safety
/// `params` is what the header describes.
unsafe fn span_shapes(params: &kvl_attention_params) -> Result<([usize; 4], [usize; 4], usize)> {
    let (q, k, v) = attention_tensors(params)?;
    // SAFETY: the caller's, here and below.
    let (rows, layout) = unsafe { plan::workspace_visibility(params, q, k[SEQ]) }?;
    // SAFETY: as above.
    check_format(unsafe { plan::is_ragged(params) }, &layout)?;
    let (q, k) = attention_shapes(q, RawView { shape: k, ..params.k.units("k")? }, &layout, rows);
    Ok((q, k, v[DIM]))
}

/// The segments of a merge: on the stack, and converted before anything runs, since a conversion can fail.
///
/// # Safety
/// `params` is what the header describes.
unsafe fn segments(params: &kvl_merge_chunks_params) -> Result<[RawStates; MAX_SEGMENTS]> {
    let n = params.num_segments;
    ensure!(n <= MAX_SEGMENTS, InvalidValue, "{n} segments, but a call merges 1 to {MAX_SEGMENTS}");
    let mut raw = [RawStates::default(); MAX_SEGMENTS];
    // SAFETY: the caller's.
    let segments = unsafe { required_list("segments", params.segments, n) }?;
    for (i, (segment, raw)) in segments.iter().zip(&mut raw).enumerate() {
        let Ok(len) = usize::try_from(segment.len) else {
            let wrong = if segment.len < 0 { "negative" } else { "too large" };
            fail!(Shape, "segments[{i}].len is {}, which is {wrong}", segment.len);
        };
        *raw = RawStates { data: segment.states, len };
    }
    Ok(raw)
}

fn chunk_merge<'a>(params: &kvl_merge_chunks_params, sink_logits: Option<&'a [f32]>) -> Result<ChunkMerge<'a>> {
    reserved("kvl_merge_chunks_params", params.reserved)?;
    Ok(ChunkMerge {
        kv_heads: size("kv_heads", params.kv_heads)?,
        k_format: parse_format("k_format", params.k_format)?,
        v_format: parse_format("v_format", params.v_format)?,
        precision: parse_precision("precision", params.precision)?,
        sink_logits,
        v_hadamard: parse_block("v_hadamard", params.v_hadamard)?,
    })
}
