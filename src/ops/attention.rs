//! Attention over a cache: one call for prefill, chunked prefill and decode.

use crate::cache_view::{CacheExtent, CacheView};
use crate::context::Context;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::kernels::api::{AttentionFns, Function, Precision};
use crate::kernels::registry;
use crate::layout::{Layout, Packing};
use crate::ops::hadamard::check_block;
use crate::ops::jobs::{Jobs, SharedMemory};
use crate::ops::mask::{BitMask, Mask, RawMasks, Touched, broadcast, check_scores};
use crate::ops::plan::AttentionPlan;
use crate::ops::setters::setters;
use crate::ops::tiling::{GRAIN, Tiling};
use crate::ops::visibility;
use crate::ops::workspace::{Workspace, check_workspace};
use crate::parallel::{Runner, workers_for};
use crate::problem::affine::AffineLoops;
use crate::problem::attention::Problem;
use crate::problem::grid::{CHUNK, most_chunks, partial_stride};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::problem::masks::BitView;
use crate::problem::tile::Tile;
use crate::problem::visibility::{Summary, Visibility};
use crate::view::{self, BATCH, DIM, Extent, HEADS, RawCacheView, RawView, SEQ, View, ViewMut};

/// What attention reads and writes.
///
/// Query head h reads KV head `h / (heads / kv_heads)`; KV heads are not repeated in memory.
#[derive(Debug)]
#[non_exhaustive]
pub struct AttentionTensors<'a> {
    /// Queries `[batch, seq, heads, dim]`, of any type.
    pub q: View<'a>,
    /// Keys: the whole cache, `[batch, keys, kv_heads, dim]`, of any format. [`AttentionOptions::layout`] defines its first two axes.
    pub k: CacheView<'a>,
    /// Values `[batch, keys, kv_heads, v_dim]`, of any format, independent of that of the keys. They may be a part of the keys, in the
    /// same memory ([latent attention](crate::docs::caches#latent-attention)).
    pub v: CacheView<'a>,
    /// Output `[batch, seq, heads, v_dim]`, of any type.
    pub out: ViewMut<'a>,
    /// `[batch, seq, heads]`, contiguous: the natural logarithm of the sum of the exponentials of each query row's logits.
    pub lse: Option<&'a mut [f32]>,
}

impl<'a> AttentionTensors<'a> {
    /// Reads queries, keys and values, and writes the output but no LSE.
    pub fn new(q: View<'a>, k: impl Into<CacheView<'a>>, v: impl Into<CacheView<'a>>, out: ViewMut<'a>) -> Self {
        Self { q, k: k.into(), v: v.into(), out, lse: None }
    }

    setters! {
        optional { lse: &'a mut [f32], }
    }
}

/// How attention is masked and scaled. By default, every query sees every key.
///
/// A logit is `softcap(q.k * scale) + alibi + bias`. Masked keys are then removed, and softmax is computed in f32. Query i of a
/// sequence stands at position `p = i + offset` among the keys, and sees key j if all of these hold:
///
/// | option | condition |
/// | --- | --- |
/// | `lengths` | `j < lengths[b]` |
/// | `kv_starts` | `j >= kv_starts[b]` |
/// | `causal` | `j <= p`, or `j < prefix_lengths[b]` |
/// | `window_left` | `j >= p - window_left`, or `j < prefix_lengths[b]` |
/// | `window_right` | `j <= p + window_right`, or `j < prefix_lengths[b]` |
/// | `mask` | the entry is true |
/// | `bit_mask` | the bit is 1, or j is before the mask's first key |
/// | `bias` | the entry is not -inf |
/// | `layout` | a ring has not overwritten the key |
///
/// With `query_positions`, p is the position of the query in that list, and for `causal` and the windows, j is the position of
/// the key.
///
/// [Masks](crate::masks) defines these conditions exactly, and compares them with other libraries. A query that sees no key has
/// output 0 and LSE -inf, or with a sink logit, that logit. A key that is not visible cannot reach the output, whatever its
/// bits; a visible NaN does. A visible logit of -inf has weight 0.
///
/// Lists borrow `i32` slices of the caller. Fields may be set directly, or by the setter of the same name.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct AttentionOptions<'a> {
    /// Factor on `q.k`; `1 / sqrt(dim)` if absent.
    pub scale: Option<f32>,
    /// c: scaled logits x become `c tanh(x / c)`. 0 is none.
    pub softcap: Option<f32>,
    /// No key after the query's own position.
    pub causal: bool,
    /// Keys visible before the query's own position, not counting it.
    pub window_left: Option<u32>,
    /// Keys visible after the query's own position, not counting it.
    pub window_right: Option<u32>,
    /// The slots in which the tokens of a sequence lie. A ring and pages need `lengths`. Positions count the tokens that a ring has
    /// overwritten too: a window must lie in the tokens that the ring retains, and without a window, a ring that has overwritten
    /// tokens takes one query per sequence.
    pub layout: Layout<'a>,
    /// How the values of two slots lie in `v`. Packed in pairs, `v` is `[batch, slots / 2, kv_heads, 2 * v_dim]`. The packing changes
    /// no bit of the output.
    pub v_packing: Packing,
    /// `[batch + 1]`, ascending: ragged queries. `q` and `out` are `[1, tokens, heads, dim]`, and the queries of sequence b are the
    /// tokens `cu_seqlens_q[b]..cu_seqlens_q[b + 1]`.
    pub cu_seqlens_q: Option<&'a [i32]>,
    /// `[batch]`: valid keys; the capacity of the cache if absent.
    pub lengths: Option<&'a [i32]>,
    /// `[batch]`: the first visible key (left-padded batches); 0 if absent.
    pub kv_starts: Option<&'a [i32]>,
    /// `[batch]`: the position of query 0 among the keys; `length - seq` if absent, so that the last query stands at the last key.
    /// With a negative offset, leading causal queries see no key.
    pub offsets: Option<&'a [i32]>,
    /// `[batch, seq]`, of ragged queries `[tokens]`: the position of every query, instead of `i + offset`, for causality, windows and
    /// ALiBi. Key `i + offset`, which is the query's own token, then stands at the same position; other keys stand at their
    /// numbers. In a [tree of guesses](crate::masks#a-tree-of-guesses), positions are depths.
    pub query_positions: Option<&'a [i32]>,
    /// `[batch]`: keys before this one are visible in spite of causality and windows (prefix-LM, sink tokens beside a window); 0 if
    /// absent.
    pub prefix_lengths: Option<&'a [i32]>,
    /// The keys that each query sees, a byte per entry.
    pub mask: Option<Mask<'a>>,
    /// The keys that each query sees, a bit per entry.
    pub bit_mask: Option<BitMask<'a>>,
    /// `[batch, seq, heads, keys]`, of any type, added to logits; axes of one element and strides of 0 broadcast.
    ///
    /// In this and in the masks, `seq` is the greatest number of queries of a sequence, and `keys` at least the greatest length.
    pub bias: Option<View<'a>>,
    /// `[heads]`: `slope * (j - p)` is added to logits; see [`alibi_slopes`].
    pub alibi_slopes: Option<&'a [f32]>,
    /// `[heads]`: one more logit per query row, which takes weight but has no value.
    pub sink_logits: Option<&'a [f32]>,
    /// The block of the [Hadamard rotation](crate::hadamard) that the keys of the cache were written with
    /// ([`KvWrite::k_hadamard`](crate::KvWrite::k_hadamard)); none if absent. Queries are given unrotated: each is rotated once, in f32,
    /// as it is loaded, and then counts as one in f32.
    pub k_hadamard: Option<usize>,
    /// The same for the values. The rotation of an output row is undone once, in f32, before the row is rounded; `out` and every state
    /// that a call returns are unrotated, except those of [`attention_chunks`](crate::attention_chunks), which
    /// [`merge_chunks`](crate::merge_chunks) finishes.
    pub v_hadamard: Option<usize>,
    /// A plan. It replaces causality, windows, layout, `cu_seqlens_q`, lengths, first keys, offsets, query positions and prefix
    /// lengths, which must be absent; so must the masks, if the plan was made with any.
    pub plan: Option<&'a AttentionPlan>,
    /// How exactly to compute; [`Context::kernel_for`](crate::Context::kernel_for) returns the kernel that it selects.
    pub precision: Precision,
}

/// [`AttentionTensors`] and [`AttentionOptions`] without lifetimes on the views, as the C ABI has them. Views of caches are large, and
/// borrowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawAttention<'a> {
    pub q: RawView,
    pub k: &'a RawCacheView,
    pub v: &'a RawCacheView,
    pub out: RawView,
    /// Null if no LSE is wanted.
    pub lse: *mut f32,
    pub scale: Option<f32>,
    pub softcap: Option<f32>,
    pub v_packing: Packing,
    pub visibility: Visibility<'a>,
    /// From a plan, which has checked the visibility.
    pub planned: Option<Planned<'a>>,
    pub masks: RawMasks<'a>,
    pub bias: Option<RawView>,
    pub alibi_slopes: Option<&'a [f32]>,
    pub sink_logits: Option<&'a [f32]>,
    pub k_hadamard: Option<usize>,
    pub v_hadamard: Option<usize>,
    pub precision: Precision,
}

/// What a call takes from a plan, besides its visibility.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned<'a> {
    pub summary: Summary,
    /// Whether the plan fixes the masks.
    pub has_masks: bool,
    /// Their bits, if they mask anything.
    pub bits: Option<BitView<'a>>,
}

impl<'a> AttentionOptions<'a> {
    /// The default: every query sees every key.
    pub fn new() -> Self {
        Self::default()
    }

    setters! {
        optional {
            scale: f32,
            softcap: f32,
            window_left: u32,
            window_right: u32,
            cu_seqlens_q: &'a [i32],
            lengths: &'a [i32],
            kv_starts: &'a [i32],
            offsets: &'a [i32],
            query_positions: &'a [i32],
            prefix_lengths: &'a [i32],
            mask: Mask<'a>,
            bit_mask: BitMask<'a>,
            bias: View<'a>,
            alibi_slopes: &'a [f32],
            sink_logits: &'a [f32],
            k_hadamard: usize,
            v_hadamard: usize,
            plan: &'a AttentionPlan,
        }
        plain {
            causal: bool,
            layout: Layout<'a>,
            v_packing: Packing,
            precision: Precision,
        }
    }

    /// The options that a plan fixes, for queries of this shape and this cache.
    pub(crate) fn visibility(&self, q_shape: [usize; 4], k: RawView<CacheFormat>) -> Result<Visibility<'a>> {
        let (batch, seq) = rows_of(q_shape, self.cu_seqlens_q);
        Ok(Visibility {
            batch,
            seq,
            cache: k,
            layout: self.layout,
            cu_seqlens_q: self.cu_seqlens_q,
            causal: self.causal,
            window_left: self.window_left.map(i64::from),
            window_right: self.window_right.map(i64::from),
            lengths: self.lengths,
            kv_starts: self.kv_starts,
            offsets: self.offsets,
            query_positions: self.query_positions,
            prefix_lengths: self.prefix_lengths,
        })
    }

    pub(crate) fn masks(&self) -> RawMasks<'a> {
        RawMasks { mask: self.mask.map(|m| m.raw), bit_mask: self.bit_mask.map(|m| m.raw) }
    }
}

/// Fails if a call with a plan gives anything that the plan fixes.
pub(crate) fn check_only_plan(given: impl IntoIterator<Item = (&'static str, bool)>) -> Result<()> {
    for (name, given) in given {
        ensure!(!given, InvalidValue, "both plan and {name} are given, but {name} is the plan's to say");
    }
    Ok(())
}

/// The number of sequences, and the greatest number of queries of a sequence.
pub(crate) fn rows_of(q_shape: [usize; 4], cu_seqlens_q: Option<&[i32]>) -> (usize, usize) {
    match cu_seqlens_q {
        None => (q_shape[BATCH], q_shape[SEQ]),
        Some(starts) => (
            starts.len().saturating_sub(1),
            starts.windows(2).map(|s| s[1].saturating_sub(s[0]).max(0) as usize).max().unwrap_or(0),
        ),
    }
}

/// Checks that the layout fits the cache, and that the cache has as many sequences as the queries.
pub(crate) fn call_rows(q_shape: [usize; 4], visibility: &Visibility) -> Result<()> {
    let (layout, k) = (visibility.layout, &visibility.cache);
    layout.validate("k", k)?;
    if let Some(starts) = visibility.cu_seqlens_q {
        // Ragged queries lie as the keys of a ragged cache do.
        let q = RawView { shape: q_shape, ..*k };
        Layout::Ragged { cu_seqlens: starts }.validate("q", &q).map_err(|e| e.about("cu_seqlens_q"))?;
    }
    if let Some(positions) = visibility.query_positions {
        let ([batch, seq, ..], n) = (q_shape, positions.len());
        ensure!(
            batch.checked_mul(seq) == Some(n),
            Shape,
            "query_positions has {n} entries, but q has batch = {batch} and seq = {seq}"
        );
    }
    let rows = layout.rows(k).unwrap_or(visibility.batch);
    ensure!(
        rows == visibility.batch,
        Shape,
        "k has {} = {rows}, but q has {}",
        if matches!(layout, Layout::Contiguous | Layout::Ring { .. }) { "batch" } else { "sequences" },
        visibility.batch
    );
    Ok(())
}

/// The standard ALiBi slopes for any number of heads (<https://arxiv.org/abs/2108.12409>).
///
/// For a power of two n, they are `2^(-8 (h + 1) / n)`. Otherwise they are those of the largest power of two below, then every
/// other slope of twice that number.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let mut slopes = vec![0.0; heads];
    fill_alibi_slopes(&mut slopes);
    slopes
}

pub(crate) fn fill_alibi_slopes(slopes: &mut [f32]) {
    if slopes.is_empty() {
        return;
    }
    let n = 1usize << slopes.len().ilog2();
    for (h, slope) in slopes.iter_mut().enumerate() {
        let exponent =
            if h < n { -8.0 * (h + 1) as f64 / n as f64 } else { -4.0 * (2 * (h - n) + 1) as f64 / n as f64 };
        *slope = exponent.exp2() as f32;
    }
}

/// Grouped-query attention over a cache.
///
/// One function serves prefill (`seq` queries that have just been written to the cache), chunked prefill and decode (`seq` =
/// 1). Queries, keys and values keep their types and formats. Arithmetic is f32, rounded once to the type of `out`.
///
/// The bits of an output row depend on the inputs of that row, the ISA level and the precision. They do not depend on the
/// runner, the batch around the row, strides or the layout; nor on the cut of a prompt, since every step sees the same keys.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs and workspaces.
///
/// # Errors
/// - [`Status::Shape`](crate::Status::Shape): shapes or lists do not fit each other.
/// - [`Status::OutOfRange`](crate::Status::OutOfRange): a length, a first key or a table entry lies outside of the cache.
/// - [`Status::Capacity`](crate::Status::Capacity): a query sees keys that a ring has overwritten.
/// - [`Status::InvalidValue`](crate::Status::InvalidValue): an option has no meaning, or contradicts the plan.
/// - [`Status::Overlap`](crate::Status::Overlap): an output shares memory with an input.
///
/// On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// // Four query heads share two KV heads of eight elements; the cache has room for 16 tokens and holds 3.
/// let q = vec![1.0f32; 4 * 8];
/// let keys = vec![half::bf16::ONE; 16 * 2 * 8];
/// let values = vec![half::bf16::from_f32(0.5); 16 * 2 * 8];
/// let mut out = vec![0.0f32; 4 * 8];
/// attention(
///     &context,
///     &Serial,
///     &mut Workspace::new(),
///     AttentionTensors::new(
///         View::new(&q, [1, 1, 4, 8])?,
///         View::new(&keys, [1, 16, 2, 8])?,
///         View::new(&values, [1, 16, 2, 8])?,
///         ViewMut::new(&mut out, [1, 1, 4, 8])?,
///     ),
///     &AttentionOptions::new().causal(true).lengths(&[3]),
/// )?;
/// assert_eq!(out[0], 0.5);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn attention(
    context: &Context,
    runner: &dyn Runner,
    workspace: &mut Workspace,
    mut tensors: AttentionTensors,
    options: &AttentionOptions,
) -> Result<()> {
    let call = RawAttention::new(&mut tensors, options)?;
    // SAFETY: the views borrow what they reach, and the LSE has an entry per query row.
    unsafe { attention_raw(context, runner, Memory::Growing(workspace), &call) }
}

/// Bytes of workspace that [`attention`] needs at most for queries `[batch, seq, heads, dim]`, keys `[batch, keys, kv_heads,
/// dim]`, values of `v_dim` elements and `threads` threads, for any lengths, strides and masks.
///
/// In layouts that are not contiguous, `keys` is the capacity of a sequence (in a ring, its slots). For ragged queries, `batch`
/// is the number of sequences and `seq` the greatest number of queries of one.
pub fn attention_workspace_size(q_shape: [usize; 4], k_shape: [usize; 4], v_dim: usize, threads: usize) -> usize {
    largest(|kernel| workspace_size(kernel, q_shape, k_shape, v_dim, threads))
}

/// The most that any kernel needs, since a call may meet any.
pub(super) fn largest(bytes: impl Fn(&AttentionFns) -> usize) -> usize {
    registry::entries()
        .filter_map(|entry| match &entry.function {
            Function::Attention(kernel) => Some(bytes(kernel)),
            _ => None,
        })
        .max()
        .unwrap_or(0)
}

/// As [`attention_workspace_size`], for one kernel.
fn workspace_size(kernel: &AttentionFns, q: [usize; 4], k: [usize; 4], v_dim: usize, threads: usize) -> usize {
    let most = |threads| {
        let bytes = |together| Tiling::new(kernel, q, k, v_dim, threads, most_chunks(k[SEQ]), together).bytes();
        bytes(false).max(bytes(true))
    };
    // A call that is too small for several threads takes one.
    most(threads).max(most(1))
}

/// Whether the heads of a token lie closer together than its neighbours in the sequence, so that several are read together. Units that
/// are widened before, here those of keys or values of `dim` elements that no loop reads, are read a head at a time.
fn heads_together(view: &RawCacheView, dim: usize) -> bool {
    let reads_units = match view.dtype {
        format if format.is_affine() => AffineLoops::of(view, dim).is_some(),
        _ => true,
    };
    reads_units && view.strides[DIM] == 1 && view.strides[HEADS].unsigned_abs() < view.strides[SEQ].unsigned_abs()
}

/// Where a call has its workspace.
pub(crate) enum Memory<'a> {
    /// So many bytes, which must do.
    Fixed(*mut u8, usize),
    /// Where they do not, it grows to what the largest call on this cache needs.
    Growing(&'a mut Workspace),
}

/// # Safety
/// The memory that valid views reach is readable and, for `out`, writable, by this call alone; `lse`, if not null, holds a
/// float per query row; a fixed `memory` has its bytes, which this call alone uses.
pub(crate) unsafe fn attention_raw(
    context: &Context,
    runner: &dyn Runner,
    memory: Memory,
    call: &RawAttention,
) -> Result<()> {
    let inputs = validate(call)?;
    let Inputs { problem, summary, .. } = &inputs;
    if call.out.is_empty() && call.lse.is_null() {
        return Ok(());
    }
    let (q_shape, k_shape) = call.shapes();
    let [batch, seq, heads, d] = q_shape;
    if batch * seq * heads == 0 {
        return Ok(());
    }
    let dv = call.v_dim();
    let kernel = context.attention(call.k.dtype, call.v.dtype, call.precision);
    let Summary { longest, chunks, count } = *summary;
    let rows = seq.saturating_mul(heads / k_shape[HEADS].max(1));
    let together = rows <= kernel.direct_rows && heads_together(problem.k, d) && heads_together(problem.v, dv);
    // An upper bound is enough: it only decides whether threads are worth their start.
    let steps = [batch, heads, seq, longest.min(count * CHUNK), d + dv].into_iter().fold(1, usize::saturating_mul);
    let workers = workers_for(runner, steps, GRAIN);
    // Tiles for several threads would be smaller ones.
    let threads = if workers == 1 { 1 } else { runner.num_threads() };
    let plan = Tiling::new(&kernel, q_shape, k_shape, dv, threads, count, together);
    let needed = plan.bytes();
    let memory = match memory {
        Memory::Fixed(data, bytes) => (data, bytes),
        Memory::Growing(workspace) => {
            if workspace.len() < needed {
                workspace.reserve(workspace_size(&kernel, q_shape, k_shape, dv, runner.num_threads()));
            }
            (workspace.as_mut_ptr(), workspace.len())
        }
    };
    check_workspace(memory, needed)?;

    let (kv_heads, memory) = (call.k.shape[HEADS], SharedMemory(memory.0));
    let rows = |b: usize| problem.visibility.queries(b) * problem.group;
    let tile = |index: usize| plan.tile(index, rows, kv_heads, chunks);
    let jobs =
        Jobs { runner, kernel: &kernel, problem, workers, tiles: plan.tiles, memory, worker_bytes: plan.scratch };
    if !plan.split || workers == 1 {
        // SAFETY: the problem is valid, the tiles cover its rows once, and the workspace holds the scratch of all workers.
        return unsafe { jobs.run_tiles(tile) };
    }
    let partials = |index: usize| memory.at(plan.workers * plan.scratch + index * plan.partials).cast::<f32>();
    let state = |index: usize, tile: &Tile, chunk: usize| {
        partials(index).wrapping_add(chunk * tile.rows() * partial_stride(dv))
    };
    // SAFETY: as above; behind the scratch, the workspace holds the states of all tiles.
    unsafe {
        jobs.run_chunks(plan.chunks, tile, state)?;
        jobs.reduce(|index, _| Tile { partials: partials(index), ..tile(index) })
    }
}

impl<'a> RawAttention<'a> {
    #[inline(always)]
    pub(crate) fn new(tensors: &'a mut AttentionTensors, options: &AttentionOptions<'a>) -> Result<Self> {
        let AttentionTensors { q, k, v, out, lse } = tensors;
        if let Some(lse) = lse {
            let rows = view::rows(q.shape());
            ensure!(lse.len() == rows, Shape, "lse has {} entries, but q has {rows} rows", lse.len());
        }
        let own = options.visibility(q.raw.shape, k.raw.units)?;
        let (visibility, planned) = match options.plan {
            None => (own, None),
            Some(plan) => {
                check_only_plan(own.given())?;
                plan.check(&q.raw, k.raw.shape)?;
                (plan.visibility(), Some(plan.planned()))
            }
        };
        Ok(Self {
            q: q.raw,
            k: &k.raw,
            v: &v.raw,
            out: out.raw,
            lse: lse.as_deref_mut().map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr),
            scale: options.scale,
            softcap: options.softcap,
            v_packing: options.v_packing,
            visibility,
            planned,
            masks: options.masks(),
            bias: options.bias.map(|b| b.raw),
            alibi_slopes: options.alibi_slopes,
            sink_logits: options.sink_logits,
            k_hadamard: options.k_hadamard,
            v_hadamard: options.v_hadamard,
            precision: options.precision,
        })
    }

    /// Elements of a value.
    pub(crate) fn v_dim(&self) -> usize {
        self.v.shape[DIM] / if self.v_packing == Packing::RowPairs { 2 } else { 1 }
    }

    fn shapes(&self) -> ([usize; 4], [usize; 4]) {
        attention_shapes(
            self.q.shape,
            self.k.units,
            &self.visibility.layout,
            (self.visibility.batch, self.visibility.seq),
        )
    }
}

/// `[batch, seq, heads, dim]` and `[batch, keys, kv_heads, dim]` in any layout: `seq` is the greatest number of queries of a
/// sequence, `keys` the capacity of a sequence.
pub(crate) fn attention_shapes(
    q: [usize; 4],
    k: RawView<CacheFormat>,
    layout: &Layout,
    (batch, seq): (usize, usize),
) -> ([usize; 4], [usize; 4]) {
    let [.., kv_heads, dim] = k.shape;
    ([batch, seq, q[HEADS], q[DIM]], [batch, layout.most_keys(&k), kv_heads, dim])
}

/// A call whose inputs are checked, and what they can touch: q, k and v, and the masks.
pub(super) struct Inputs<'a> {
    pub problem: Problem<'a>,
    pub summary: Summary,
    extents: (Extent, [CacheExtent; 2]),
    masks: Touched,
}

impl Inputs<'_> {
    /// Fails if an output, which is valid, shares memory with a tensor that is read.
    pub fn check_apart(&self, name: &str, output: &RawView, extent: Extent) -> Result<()> {
        if output.is_empty() {
            return Ok(());
        }
        self.masks.check_apart(name, output)?;
        let Problem { q, k, v, bias, .. } = &self.problem;
        if let Some(bias) = bias {
            ensure!(!bias.overlaps(output), Overlap, "bias and {name} share memory");
        }
        let (of_q, of_caches) = self.extents;
        ensure!(!q.overlaps_within(of_q, output, extent), Overlap, "q and {name} share memory");
        for ((input, view), own) in [("k", k), ("v", v)].into_iter().zip(of_caches) {
            ensure!(!view.overlaps_within(own, output, extent), Overlap, "{input} and {name} share memory");
        }
        Ok(())
    }
}

/// Checks all of a call. Inlined, as what it returns is large.
#[inline(always)]
pub(super) fn validate<'a>(call: &'a RawAttention<'a>) -> Result<Inputs<'a>> {
    let RawAttention { q, out, .. } = call;
    let inputs = validate_inputs(call)?;
    let out_extent = out.validate_output("out")?;
    for axis in [BATCH, SEQ, HEADS] {
        out.same_axis("out", q, "q", axis)?;
    }
    let (n, v_dim) = (out.shape[DIM], inputs.problem.v_dim);
    ensure!(n == v_dim, Shape, "out has dim = {n}, but v has {v_dim}");
    inputs.check_apart("out", out, out_extent)?;
    if !call.lse.is_null() {
        let lse = RawView::floats(call.lse, view::rows(q.shape));
        let lse_extent = lse.validate("lse")?;
        inputs.check_apart("lse", &lse, lse_extent)?;
        ensure!(!out.overlaps_within(out_extent, &lse, lse_extent), Overlap, "out and lse share memory");
    }
    Ok(inputs)
}

/// Checks everything but `out` and `lse`. Inlined, as [`validate`].
#[inline(always)]
pub(super) fn validate_inputs<'a>(call: &'a RawAttention<'a>) -> Result<Inputs<'a>> {
    let RawAttention { q, visibility, .. } = call;
    let (k, v) = (call.k, call.v);
    let extents = (q.validate("q")?, [k.validate("k")?, v.validate("v")?]);
    let (kv_heads, v_dim) = (k.shape[HEADS], call.v_dim());
    if call.planned.is_none() {
        call_rows(q.shape, visibility)?;
    }
    k.same_axis("k", q, "q", DIM)?;
    let slots = match call.v_packing {
        Packing::Rows => v.units,
        Packing::RowPairs => {
            ensure!(v.dtype.dtype().is_some(), Unsupported, "v is {}, whose values are never packed in pairs", v.dtype);
            visibility.layout.validate_packing("k", k, call.v_packing)?;
            let ([rows, pairs, heads, dims], slots) = (v.shape, k.shape[SEQ]);
            ensure!(
                pairs.checked_mul(2) == Some(slots) && dims.is_multiple_of(2),
                Shape,
                "v is packed in pairs and has seq = {pairs} and dim = {dims}, but k has seq = {slots}"
            );
            RawView { shape: [rows, slots, heads, v_dim], ..v.units }
        }
    };
    for axis in [BATCH, SEQ, HEADS] {
        slots.same_axis("v", k, "k", axis)?;
    }
    let [batch, seq, heads, dim] = call.shapes().0;
    for (name, n) in [("k", dim), ("v", v_dim)] {
        ensure!(
            (1..=MAX_HEAD_DIM).contains(&n),
            Shape,
            "{name} has dim = {n}, which is not between 1 and {MAX_HEAD_DIM}"
        );
    }
    check_block("k_hadamard", call.k_hadamard, ("k", dim))?;
    check_block("v_hadamard", call.v_hadamard, ("v", v_dim))?;
    ensure!(
        heads == 0 || kv_heads > 0 && heads.is_multiple_of(kv_heads),
        Shape,
        "q has {heads} heads, which is no multiple of the {kv_heads} of k"
    );

    let summary = match call.planned {
        Some(planned) => planned.summary,
        None => visibility::validate(visibility)?,
    };
    for (name, list) in [("alibi_slopes", call.alibi_slopes), ("sink_logits", call.sink_logits)] {
        let n = list.map_or(heads, <[f32]>::len);
        ensure!(n == heads, Shape, "{name} has {n} entries, but q has {heads} heads");
    }
    let scale = call.scale.unwrap_or(1.0 / (dim as f32).sqrt());
    ensure!(scale.is_finite(), InvalidValue, "scale is {scale}");
    let softcap = call.softcap.unwrap_or(0.0);
    ensure!(softcap.is_finite() && softcap >= 0.0, InvalidValue, "softcap is {softcap}");

    let planned_bits = match call.planned {
        Some(planned) if planned.has_masks => {
            check_only_plan([("mask", call.masks.mask.is_some()), ("bit_mask", call.masks.bit_mask.is_some())])?;
            planned.bits
        }
        _ => None,
    };
    let masks = call.masks.validate(visibility, heads, summary.longest)?;
    if let Some(bias) = &call.bias {
        check_scores("bias", bias.shape, [batch, seq, heads], summary.longest)?;
        bias.validate("bias")?;
    }
    let (mask, bit_mask) = call.masks.views();
    Ok(Inputs {
        problem: Problem {
            q,
            k,
            v,
            v_dim,
            v_packing: call.v_packing,
            k_hadamard: call.k_hadamard.unwrap_or(0),
            v_hadamard: call.v_hadamard.unwrap_or(0),
            out: &call.out,
            lse: call.lse,
            visibility,
            group: heads / kv_heads.max(1),
            scale,
            softcap,
            mask,
            bit_mask: bit_mask.or(planned_bits),
            bias: call.bias.map(|bias| RawView { strides: broadcast(bias.shape, bias.strides), ..bias }),
            alibi: call.alibi_slopes,
            sinks: call.sink_logits,
        },
        summary,
        extents,
        masks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alibi_slopes_of_any_head_count() {
        assert_eq!(alibi_slopes(8), [1, 2, 3, 4, 5, 6, 7, 8].map(|i| 0.5f32.powi(i)));
        let twelve = alibi_slopes(12);
        assert_eq!(twelve[..8], alibi_slopes(8));
        assert_eq!(twelve[8..], [1, 3, 5, 7].map(|i: i32| (-0.5 * i as f64).exp2() as f32));
        assert!(alibi_slopes(0).is_empty());
    }
}
