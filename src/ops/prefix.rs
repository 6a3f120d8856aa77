//! Attention over a prefix that all sequences of a batch share, and over the keys of each sequence: a cascade.
//!
//! ```text
//! queries of all sequences, as one sequence  x  the prefix               -> state 0 (f32, with its LSE)
//! queries of every sequence                  x  the sequence's own keys  -> state 1
//! state 0, state 1                                                       -> merged by LSE -> out, rounded once
//! ```
//! The prefix is read once for all the query rows of a tile. A cache that repeats it, or pages that sequences share, are read
//! once per sequence.

use crate::cache_view::CacheView;
use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::kernels::api::Op;
use crate::layout::Packing;
use crate::ops::attention::{
    AttentionOptions, AttentionTensors, Memory, RawAttention, attention_raw, attention_shapes,
    attention_workspace_size, validate,
};
use crate::ops::mask::RawMasks;
use crate::ops::merge::merge_states_raw;
use crate::ops::workspace::{Workspace, check_alignment};
use crate::ops::{TokenCopies, for_each_token};
use crate::parallel::Runner;
use crate::problem::visibility::Visibility;
use crate::view::{self, BATCH, DIM, HEADS, RawCacheView, RawView, SEQ, contiguous};

/// Keys and values that every sequence of a batch sees before its own: stored once, and read once for many query rows.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SharedPrefix<'a> {
    /// `[1, tokens, kv_heads, dim]`, of any strides.
    pub k: CacheView<'a>,
    /// `[1, tokens, kv_heads, v_dim]`, of any format, which need not be that of the sequences' own. Both have the Hadamard rotations
    /// that the options give.
    pub v: CacheView<'a>,
}

impl<'a> SharedPrefix<'a> {
    /// A prefix of these keys and values.
    pub fn new(k: impl Into<CacheView<'a>>, v: impl Into<CacheView<'a>>) -> Self {
        Self { k: k.into(), v: v.into() }
    }
}

/// [`attention`](crate::attention()) over a prefix that all sequences share, and then over the keys of each sequence.
///
/// Every query sees the whole prefix. `tensors` and `options` describe the sequences' own keys only: position 0 of a sequence
/// is its first key after the prefix. A sequence without keys of its own sees the prefix. Sink logits count once.
///
/// The result is that of attention over both at once within the kernel's bound, not to the bit, since the two parts are merged
/// by their LSE. It does not depend on threads, the batch or strides.
///
/// The call is faster than one with a repeated prefix from a few sequences on, if the prefix is longer than the sequences' own
/// keys.
///
/// Thread safety: as for [`attention`](crate::attention()).
///
/// # Errors
/// Those of [`attention`](crate::attention()) for either part. [`Status::InvalidValue`](crate::Status::InvalidValue): ALiBi
/// slopes or a left window are given, which depend on the positions of the prefix. On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// // Eight sequences of one new token each, 3 own tokens, and a common prefix of 40.
/// let (q, mut out) = (vec![1.0f32; 8 * 2 * 16], vec![0.0f32; 8 * 2 * 16]);
/// let (own_k, own_v) = (vec![0.5f32; 8 * 3 * 16], vec![4.0f32; 8 * 3 * 16]);
/// let (k, v) = (vec![0.5f32; 40 * 16], vec![0.0f32; 40 * 16]);
/// attention_with_prefix(
///     &context,
///     &Serial,
///     &mut Workspace::new(),
///     SharedPrefix::new(View::new(&k, [1, 40, 1, 16])?, View::new(&v, [1, 40, 1, 16])?),
///     AttentionTensors::new(
///         View::new(&q, [8, 1, 2, 16])?,
///         View::new(&own_k, [8, 3, 1, 16])?,
///         View::new(&own_v, [8, 3, 1, 16])?,
///         ViewMut::new(&mut out, [8, 1, 2, 16])?,
///     ),
///     &AttentionOptions::default(),
/// )?;
/// assert!((out[0] - 3.0 * 4.0 / 43.0).abs() < 1e-6);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn attention_with_prefix(
    context: &Context,
    runner: &dyn Runner,
    workspace: &mut Workspace,
    prefix: SharedPrefix,
    mut tensors: AttentionTensors,
    options: &AttentionOptions,
) -> Result<()> {
    let call = RawAttention::new(&mut tensors, options)?;
    let (q, k) = attention_shapes(
        call.q.shape,
        call.k.units,
        &call.visibility.layout,
        (call.visibility.batch, call.visibility.seq),
    );
    let threads = runner.num_threads();
    let bytes = prefix_workspace_size(call.q.shape, q, k, prefix.k.shape()[SEQ], call.v_dim(), threads);
    workspace.reserve(bytes);
    // SAFETY: the views borrow what they reach, and the LSE has an entry per query row.
    unsafe {
        attention_with_prefix_raw(
            context,
            runner,
            workspace.as_mut_ptr(),
            workspace.len(),
            (prefix.k.raw, prefix.v.raw),
            &call,
        )
    }
}

/// Bytes of workspace that [`attention_with_prefix`] needs at most for queries `[batch, seq, heads, dim]`, the sequences' own
/// keys `[batch, keys, kv_heads, dim]`, a prefix of `tokens` tokens, values of `v_dim` elements and `threads` threads.
pub fn attention_with_prefix_workspace_size(
    q_shape: [usize; 4],
    k_shape: [usize; 4],
    tokens: usize,
    v_dim: usize,
    threads: usize,
) -> usize {
    prefix_workspace_size(q_shape, q_shape, k_shape, tokens, v_dim, threads)
}

/// As [`attention_with_prefix_workspace_size`], for queries that lie in a tensor of the shape `tensor`.
pub(crate) fn prefix_workspace_size(
    tensor: [usize; 4],
    q: [usize; 4],
    k: [usize; 4],
    tokens: usize,
    v_dim: usize,
    threads: usize,
) -> usize {
    let all = [1, tensor[BATCH].saturating_mul(tensor[SEQ]), tensor[HEADS], tensor[DIM]];
    let prefix = attention_workspace_size(all, [1, tokens, k[HEADS], k[DIM]], v_dim, threads);
    let own = attention_workspace_size(q, k, v_dim, threads);
    Parts::new(tensor, v_dim).bytes.saturating_add(prefix.max(own))
}

/// The parts of the workspace in front of that of the two calls: two outputs in f32 with their LSEs, the merged output if it is
/// converted, and a copy of the queries if their sequences are not adjacent.
struct Parts {
    out: usize,
    lse: usize,
    bytes: usize,
}

impl Parts {
    fn new(q: [usize; 4], v_dim: usize) -> Self {
        let rows = view::rows(q);
        let line = |elements: usize| elements.saturating_mul(size_of::<f32>()).checked_next_multiple_of(64);
        let line = |elements: usize| line(elements).unwrap_or(usize::MAX);
        let (out, lse, q) = (line(rows.saturating_mul(v_dim)), line(rows), line(rows.saturating_mul(q[DIM])));
        let bytes = out.saturating_mul(3).saturating_add(lse.saturating_mul(2)).saturating_add(q);
        Self { out, lse, bytes }
    }
}

/// # Safety
/// As [`attention_raw`], and the memory that the prefix reaches is readable.
pub(crate) unsafe fn attention_with_prefix_raw(
    context: &Context,
    runner: &dyn Runner,
    workspace: *mut u8,
    workspace_bytes: usize,
    prefix: (RawCacheView, RawCacheView),
    call: &RawAttention,
) -> Result<()> {
    let (k, v) = prefix;
    validate(call)?;
    let lse = RawView::floats(call.lse, view::rows(call.q.shape));
    for (name, view) in [("the prefix's k", &k), ("the prefix's v", &v)] {
        let n = view.shape[BATCH];
        ensure!(n == 1, Shape, "{name} has batch = {n}, but all sequences share one prefix");
        view.validate(name)?;
        ensure!(!view.overlaps(&call.out), Overlap, "{name} and out share memory");
        ensure!(call.lse.is_null() || !view.overlaps(&lse), Overlap, "{name} and lse share memory");
    }
    k.same_axis("the prefix's k", call.k, "k", HEADS)?;
    let (n, v_dim) = (v.shape[DIM], call.v_dim());
    ensure!(n == v_dim, Shape, "the prefix's v has dim = {n}, but v has {v_dim}");
    ensure!(call.alibi_slopes.is_none(), InvalidValue, "alibi_slopes and a shared prefix disagree about positions");
    ensure!(
        call.visibility.window_left.is_none(),
        InvalidValue,
        "window_left and a shared prefix disagree about positions"
    );

    let [batch, seq, heads, dim] = call.q.shape;
    let parts = Parts::new(call.q.shape, v_dim);
    ensure!(
        workspace_bytes >= parts.bytes,
        Workspace,
        "the workspace has {workspace_bytes} bytes, but this call needs more than {}",
        parts.bytes
    );
    check_alignment(workspace)?;
    let (rest, rest_bytes) = (workspace.wrapping_add(parts.bytes), workspace_bytes - parts.bytes);
    let f32_view = |data: *mut u8, shape: [usize; 4]| RawView {
        data,
        dtype: DType::F32,
        shape,
        strides: contiguous(shape),
        bytes: None,
    };
    let out_shape = [batch, seq, heads, v_dim];
    let outs: [RawView; 3] = std::array::from_fn(|i| f32_view(workspace.wrapping_add(i * parts.out), out_shape));
    let lses: [*mut f32; 2] =
        std::array::from_fn(|i| workspace.wrapping_add(3 * parts.out + i * parts.lse).cast::<f32>());

    // SAFETY: the caller's; the workspace has room for all parts.
    unsafe {
        let own = RawAttention { out: outs[1], lse: lses[1], ..*call };
        let q = one_row(context, runner, &call.q, workspace.wrapping_add(3 * parts.out + 2 * parts.lse))?;
        let all = RawAttention {
            q,
            k: &k,
            v: &v,
            out: f32_view(outs[0].data, [1, batch * seq, heads, v_dim]),
            lse: lses[0],
            visibility: Visibility::unmasked(1, batch * seq, k.units),
            planned: None,
            v_packing: Packing::Rows,
            masks: RawMasks::default(),
            bias: None,
            sink_logits: None,
            scale: Some(call.scale.unwrap_or(1.0 / (dim as f32).sqrt())),
            ..*call
        };
        attention_raw(context, runner, Memory::Fixed(rest, rest_bytes), &own)?;
        attention_raw(context, runner, Memory::Fixed(rest, rest_bytes), &all)?;
        // Ragged queries may leave tokens that belong to no sequence: those have no state, and their outputs are not written.
        let (first, n) = match call.visibility.cu_seqlens_q {
            Some(starts) => (starts[0] as usize, (starts[starts.len() - 1] - starts[0]) as usize),
            None => (0, seq),
        };
        let [out, merged] = [&call.out, &outs[2]].map(|view| tokens_of(view, first, n));
        let lse_of = |lse: *mut f32| if lse.is_null() { lse } else { lse.wrapping_add(first * heads) };
        let state = |i: usize| Ok((tokens_of(&outs[i], first, n), lse_of(lses[i]).cast_const()));
        if out.dtype == DType::F32 {
            return merge_states_raw(context, runner, 2, &state, out, lse_of(call.lse));
        }
        merge_states_raw(context, runner, 2, &state, merged, lse_of(call.lse))?;
        copy_tokens(context, runner, &merged, &out)
    }
}

/// `n` tokens of every sequence, from `first` on.
fn tokens_of(view: &RawView, first: usize, n: usize) -> RawView {
    let mut part = *view;
    part.shape[SEQ] = n;
    if first > 0 && !part.is_empty() {
        let bytes = first as isize * view.strides[SEQ] as isize * view.dtype.size() as isize;
        part.data = part.data.wrapping_offset(bytes);
        part.bytes = part.bytes.map(|all| all.wrapping_sub_signed(bytes));
    }
    part
}

/// The queries of all sequences as one sequence: as they lie, or as a copy at `to`.
///
/// # Safety
/// The view is valid and readable; `to` has room for it.
unsafe fn one_row(context: &Context, runner: &dyn Runner, q: &RawView, to: *mut u8) -> Result<RawView> {
    let [batch, seq, heads, dim] = q.shape;
    let shape = [1, batch * seq, heads, dim];
    let [per_row, per_token, ..] = q.strides;
    if batch <= 1 || seq == 1 || per_row == seq as i64 * per_token {
        let step = if seq == 1 { per_row } else { per_token };
        return Ok(RawView { shape, strides: [0, step, q.strides[HEADS], q.strides[DIM]], ..*q });
    }
    let copy = RawView { data: to, strides: contiguous(q.shape), bytes: None, ..*q };
    // SAFETY: the caller's.
    unsafe { copy_tokens(context, runner, q, &copy) }?;
    Ok(RawView { shape, strides: contiguous(shape), ..copy })
}

/// # Safety
/// The views are valid, of one shape, and disjoint; one is readable, the other writable.
unsafe fn copy_tokens(context: &Context, runner: &dyn Runner, from: &RawView, to: &RawView) -> Result<()> {
    let copy = context.copy(Op::KvWrite, from.dtype, to.dtype);
    let copies = TokenCopies::new(from, to);
    for_each_token(runner, from, |at| {
        // SAFETY: the caller's; tokens are disjoint.
        unsafe { copy(&copies.at(at)) };
    })
}
