//! Attention over segments of a sequence, with the bits of one call: states of chunks, and their merge.
//!
//! A row's softmax is computed chunk by chunk, on a grid of [`SPLIT_GRID`] keys, and the chunks are folded in ascending order.
//! A call over a segment that begins on the grid can store the states of its chunks instead of an output. Folding the states of
//! all segments is then what one call over all keys does. [`merge_states`](crate::merge_states) needs less memory, but merges
//! outputs that are already divided and rounded: it has the kernel's bound, not its bits.
//!
//! ```text
//! states: [batch][kv_heads][rows in pieces of PIECE][chunks][rows of the piece][16 + v_dim rounded up to 16]
//! ```
//! The meaning of the floats belongs to the kernel: [`merge_chunks`] reads them on a context of the same level and precision,
//! for the same cache formats. Of rotated values they are the sums of rotated values: the inverse is linear, and is applied once,
//! to what has been folded.

use crate::cache_view::CacheView;
use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::kernels::api::{AttentionFns, AttentionKernel, Precision};
use crate::layout::{Layout, Packing};
use crate::ops::attention::{AttentionOptions, AttentionTensors, RawAttention, largest, validate_inputs};
use crate::ops::hadamard::check_block;
use crate::ops::jobs::{Jobs, SharedMemory};
use crate::ops::setters::setters;
use crate::ops::shard::SPLIT_GRID;
use crate::ops::workspace::Workspace;
#[cfg(feature = "capi")]
use crate::ops::workspace::check_workspace;
use crate::parallel::{MAX_WORKERS, Runner};
use crate::problem::attention::Problem;
use crate::problem::grid::{CHUNK, Chunks, partial_stride};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::problem::tile::Tile;
use crate::problem::visibility::Visibility;
use crate::view::{self, DIM, Extent, HEADS, RawCacheView, RawView, SEQ, View, ViewMut, contiguous};

/// Query rows of a KV head that are computed together; part of the format of the states, and so not the choice of a kernel.
const PIECE: usize = 192;

/// The most segments that one call merges.
pub const MAX_SEGMENTS: usize = 256;

/// Floats in the states of queries `[batch, seq, heads, dim]` over a segment of up to `keys` keys: for each query row and
/// chunk, `v_dim` rounded up to 16, and 16 more.
pub fn chunk_states_len(q_shape: [usize; 4], keys: usize, v_dim: usize) -> usize {
    view::rows(q_shape).saturating_mul(chunks_of(keys)).saturating_mul(partial_stride(v_dim))
}

/// Chunks of a segment; at least one, so that there is always a state.
fn chunks_of(keys: usize) -> usize {
    keys.div_ceil(CHUNK).max(1)
}

/// The states of query rows `[batch, seq, heads]`, of `floats` floats each, as a view for overlap checks.
fn states_view(data: *mut f32, [batch, seq, heads, _]: [usize; 4], floats: usize) -> RawView {
    let shape = [batch, seq, heads, floats];
    RawView { data: data.cast(), dtype: DType::F32, shape, strides: contiguous(shape), bytes: None }
}

/// Fails for queries and layouts whose states have no format.
pub(crate) fn check_format(ragged: bool, layout: &Layout) -> Result<()> {
    ensure!(!ragged, InvalidValue, "cu_seqlens_q: the states of ragged queries have no format");
    ensure!(!matches!(layout, Layout::Ring { .. }), InvalidValue, "a ring is no segment of a sequence");
    Ok(())
}

/// Attention over a segment of a sequence, whose keys and values have any formats: writes the states of its chunks to `states`.
///
/// `states` has [`chunk_states_len`] floats for the slots of `k`. `options` are those of [`attention`](crate::attention()), in
/// positions of the segment: lengths and offsets less the first key of the segment, which is a multiple of [`SPLIT_GRID`].
/// [`SegmentLists`](crate::SegmentLists) computes them. Sink logits are given to [`merge_chunks`] instead.
///
/// Thread safety: as for [`attention`](crate::attention()).
///
/// # Errors
/// Those of [`attention`](crate::attention()). [`Status::InvalidValue`](crate::Status::InvalidValue): there are sink logits,
/// ragged queries or a ring. [`Status::Shape`](crate::Status::Shape): `states` has another length. On an error, nothing has
/// been written.
pub fn attention_chunks<'a>(
    context: &Context,
    runner: &dyn Runner,
    workspace: &mut Workspace,
    (q, k, v): (View<'a>, impl Into<CacheView<'a>>, impl Into<CacheView<'a>>),
    options: &AttentionOptions,
    states: &mut [f32],
) -> Result<()> {
    let out = ViewMut::new::<f32>(&mut [], [0; 4])?;
    let mut tensors = AttentionTensors::new(q, k, v, out);
    let attention = RawAttention::new(&mut tensors, options)?;
    let call = RawChunks { attention, states: states.as_mut_ptr(), len: states.len() };
    let job = SegmentJob::new(context, runner, &call)?;
    workspace.reserve(job.workspace);
    // SAFETY: the views borrow what they reach, and the states are this call's alone.
    unsafe { job.run(runner, workspace.as_mut_ptr()) }
}

/// Bytes of workspace that [`attention_chunks`] needs at most for queries `[batch, seq, heads, dim]`, keys `[batch, keys,
/// kv_heads, dim]`, values of `v_dim` elements and `threads` threads. In a paged layout, `keys` is the capacity of a sequence.
pub fn attention_chunks_workspace_size(
    q_shape: [usize; 4],
    k_shape: [usize; 4],
    v_dim: usize,
    threads: usize,
) -> usize {
    let grid = Grid::new(q_shape, k_shape[HEADS]);
    let units = grid.tiles().saturating_mul(chunks_of(k_shape[SEQ]));
    largest(|kernel| workers(threads, units) * grid.scratch(kernel, q_shape[DIM], v_dim))
}

/// [`attention_chunks`] as the C ABI has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawChunks<'a> {
    /// Has no output: `out` and `lse` are ignored.
    pub attention: RawAttention<'a>,
    pub states: *mut f32,
    pub len: usize,
}

impl<'a> RawChunks<'a> {
    /// Checks everything; returns the number of chunks too.
    fn validate(&'a self) -> Result<(Problem<'a>, usize)> {
        let call = &self.attention;
        ensure!(
            call.sink_logits.is_none(),
            InvalidValue,
            "sink_logits are given where segments are merged, not where they are computed"
        );
        check_format(call.visibility.cu_seqlens_q.is_some(), &call.visibility.layout)?;
        let inputs = validate_inputs(call)?;
        let (keys, v_dim) = (call.visibility.layout.most_keys(call.k), inputs.problem.v_dim);
        let (n, want) = (self.len, chunk_states_len(call.q.shape, keys, v_dim));
        ensure!(n == want, Shape, "states has {n} floats, but must have {want} for {keys} keys");
        let chunks = chunks_of(keys);
        let states = states_view(self.states, call.q.shape, chunks * partial_stride(v_dim));
        let extent = states.validate("states")?;
        inputs.check_apart("states", &states, extent)?;
        let Visibility { layout, lengths, kv_starts, offsets, query_positions, prefix_lengths, .. } = call.visibility;
        let table = match layout {
            Layout::Paged { page_table: table, .. }
            | Layout::Indirect { beam_table: table }
            | Layout::Ragged { cu_seqlens: table } => Some(table),
            Layout::Contiguous | Layout::Ring { .. } => None,
        };
        let bit_mask = call.masks.bit_mask;
        let bit_rows = bit_mask.and_then(|mask| mask.rows);
        for (name, list) in [
            ("lengths", lengths),
            ("kv_starts", kv_starts),
            ("offsets", offsets),
            ("query_positions", query_positions),
            ("prefix_lengths", prefix_lengths),
            ("the layout's table", table),
            ("first_keys of bit_mask", bit_mask.and_then(|mask| mask.first_keys)),
        ] {
            check_list_apart(name, list, ("states", &states, extent))?;
        }
        for (name, list) in [
            ("bit_offsets of bit_mask", bit_rows.map(|rows| rows.starts)),
            ("query_strides of bit_mask", bit_rows.map(|rows| rows.query_strides)),
        ] {
            check_list_apart(name, list, ("states", &states, extent))?;
        }
        check_list_apart("alibi_slopes", call.alibi_slopes, ("states", &states, extent))?;
        Ok((inputs.problem, chunks))
    }
}

/// Fails if an output, which is valid, shares memory with a list.
fn check_list_apart<T>(name: &str, list: Option<&[T]>, output: (&str, &RawView, Extent)) -> Result<()> {
    let (output_name, view, Extent { low, high }) = output;
    let list = list.unwrap_or(&[]).as_ptr_range();
    let (start, end) = (view.data.addr().wrapping_add_signed(low), view.data.addr().wrapping_add_signed(high));
    let apart = list.is_empty() || start == end || list.end.addr() <= start || end <= list.start.addr();
    ensure!(apart, Overlap, "{name} and {output_name} share memory");
    Ok(())
}

/// # Safety
/// The memory that valid views reach is readable and, for `states`, writable, by this call alone; `workspace` holds
/// `workspace_bytes` bytes that this call alone uses.
#[cfg(feature = "capi")]
pub(crate) unsafe fn attention_chunks_raw(
    context: &Context,
    runner: &dyn Runner,
    workspace: *mut u8,
    workspace_bytes: usize,
    call: &RawChunks,
) -> Result<()> {
    let job = SegmentJob::new(context, runner, call)?;
    check_workspace((workspace, workspace_bytes), job.workspace)?;
    // SAFETY: the caller's.
    unsafe { job.run(runner, workspace) }
}

/// A checked call over a segment.
struct SegmentJob<'a> {
    problem: Problem<'a>,
    kernel: AttentionKernel,
    grid: Grid,
    chunks: usize,
    states: SharedMemory,
    workers: usize,
    /// Bytes of a worker's scratch, and of all of them.
    scratch: usize,
    workspace: usize,
}

impl<'a> SegmentJob<'a> {
    fn new(context: &Context, runner: &dyn Runner, call: &'a RawChunks<'a>) -> Result<Self> {
        let (problem, chunks) = call.validate()?;
        let kernel = context.attention(problem.k.dtype, problem.v.dtype, call.attention.precision);
        let grid = Grid::new(problem.q.shape, problem.k.shape[HEADS]);
        let workers = workers(runner.num_threads(), grid.tiles() * chunks);
        let scratch = grid.scratch(&kernel, problem.q.shape[DIM], problem.v_dim);
        let (states, workspace) = (SharedMemory(call.states.cast()), workers * scratch);
        Ok(Self { problem, kernel, grid, chunks, states, workers, scratch, workspace })
    }

    /// # Safety
    /// As [`attention_chunks_raw`], with `self.workspace` bytes at `workspace`, aligned to 64.
    unsafe fn run(&self, runner: &dyn Runner, workspace: *mut u8) -> Result<()> {
        let (chunks, stride) = (self.chunks, partial_stride(self.problem.v_dim));
        let jobs = Jobs {
            runner,
            kernel: &self.kernel,
            problem: &self.problem,
            workers: self.workers,
            tiles: self.grid.tiles(),
            memory: SharedMemory(workspace),
            worker_bytes: self.scratch,
        };
        let state = |_, tile: &Tile, chunk: usize| {
            let at = (self.grid.first(tile) * chunks + chunk * tile.head_rows) * stride;
            self.states.at(at * size_of::<f32>()).cast()
        };
        // SAFETY: the problem is valid, the tiles cover its rows once, and there is room for the state of every row and chunk.
        unsafe { jobs.run_chunks(chunks, |index| self.grid.tile(index), state) }
    }
}

/// What the segments of a merge have in common.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ChunkMerge<'a> {
    /// KV heads of the cache.
    pub kv_heads: usize,
    /// The format of its keys.
    pub k_format: CacheFormat,
    /// The format of its values.
    pub v_format: CacheFormat,
    /// The precision of the calls over the segments.
    pub precision: Precision,
    /// `[heads]`: as in [`AttentionOptions::sink_logits`]. They count once, in the merge.
    pub sink_logits: Option<&'a [f32]>,
    /// As in [`AttentionOptions::v_hadamard`], of the calls over the segments: states are those of rotated values, and the merged
    /// output is rotated back.
    pub v_hadamard: Option<usize>,
}

impl<'a> ChunkMerge<'a> {
    /// A merge for a cache of `kv_heads` KV heads and these formats, at the default precision, without sink logits.
    pub fn new(kv_heads: usize, k_format: impl Into<CacheFormat>, v_format: impl Into<CacheFormat>) -> Self {
        let (k_format, v_format) = (k_format.into(), v_format.into());
        Self { kv_heads, k_format, v_format, precision: Precision::Default, sink_logits: None, v_hadamard: None }
    }

    setters! {
        optional { sink_logits: &'a [f32], v_hadamard: usize, }
        plain { kv_heads: usize, k_format: CacheFormat, v_format: CacheFormat, precision: Precision, }
    }
}

/// Merges the states of the segments of a sequence into output and LSE.
///
/// `segments` are the states that [`attention_chunks`] wrote, in the order of the sequence. `out` is `[batch, seq, heads,
/// v_dim]`, of any type; `lse` is `[batch, seq, heads]` and contiguous. The bits are those of one call of
/// [`attention`](crate::attention()) over all keys, if every segment but the last ends on the grid.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs and workspaces.
///
/// # Errors
/// [`Status::InvalidValue`](crate::Status::InvalidValue): there is no segment, or more than [`MAX_SEGMENTS`].
/// [`Status::Shape`](crate::Status::Shape): the length of states is no multiple of a chunk's, or a list has another length. On
/// an error, nothing has been written.
pub fn merge_chunks(
    context: &Context,
    runner: &dyn Runner,
    workspace: &mut Workspace,
    segments: &[&[f32]],
    merge: &ChunkMerge,
    out: ViewMut,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let count = segments.len();
    ensure!(count <= MAX_SEGMENTS, InvalidValue, "{count} segments, but a call merges 1 to {MAX_SEGMENTS}");
    if let Some(lse) = &lse {
        let (n, rows) = (lse.len(), view::rows(out.shape()));
        ensure!(n == rows, Shape, "lse has {n} entries, but out needs {rows}");
    }
    let mut raw = [RawStates::default(); MAX_SEGMENTS];
    for (raw, states) in raw.iter_mut().zip(segments) {
        *raw = RawStates { data: states.as_ptr(), len: states.len() };
    }
    let lse = lse.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr);
    let call = RawMerge { segments: &raw[..count], merge: *merge, out: out.raw, lse };
    let job = MergeJob::new(context, runner, &call)?;
    workspace.reserve(job.workspace);
    // SAFETY: the views borrow what they reach, the states are as long as they say, and the LSE has an entry per query row.
    unsafe { job.run(runner, workspace.as_mut_ptr()) }
}

/// Bytes of workspace that [`merge_chunks`] needs at most for an output `[batch, seq, heads, v_dim]`, segments with `states`
/// floats in all, and `threads` threads.
pub fn merge_chunks_workspace_size(out_shape: [usize; 4], kv_heads: usize, states: usize, threads: usize) -> usize {
    let (grid, v_dim) = (Grid::new(out_shape, kv_heads), out_shape[DIM]);
    let chunks = states.checked_div(floats_a_chunk(out_shape)).unwrap_or(0);
    let workers = workers(threads, grid.tiles());
    largest(|kernel| {
        let each = grid.scratch(kernel, 1, v_dim).saturating_add(grid.copy_bytes(chunks, v_dim));
        workers.saturating_mul(each)
    })
}

/// Floats in the states of all query rows in one chunk.
fn floats_a_chunk(out_shape: [usize; 4]) -> usize {
    view::rows(out_shape).saturating_mul(partial_stride(out_shape[DIM]))
}

/// The states of a segment, as the C ABI has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawStates {
    pub data: *const f32,
    /// The number of floats.
    pub len: usize,
}

impl Default for RawStates {
    fn default() -> Self {
        Self { data: std::ptr::null(), len: 0 }
    }
}

// SAFETY: an address and a number, through which nothing is written; who reads there answers for it.
unsafe impl Sync for RawStates {}

/// [`merge_chunks`] as the C ABI has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMerge<'a> {
    pub segments: &'a [RawStates],
    pub merge: ChunkMerge<'a>,
    pub out: RawView,
    /// Null if no LSE is wanted.
    pub lse: *mut f32,
}

impl RawMerge<'_> {
    /// Checks everything that does not depend on addresses; returns the number of chunks of all segments.
    fn count_chunks(&self) -> Result<usize> {
        let ([_, _, heads, v_dim], kv_heads) = (self.out.shape, self.merge.kv_heads);
        let count = self.segments.len();
        ensure!(
            (1..=MAX_SEGMENTS).contains(&count),
            InvalidValue,
            "{count} segments, but a call merges 1 to {MAX_SEGMENTS}"
        );
        ensure!(
            (1..=MAX_HEAD_DIM).contains(&v_dim),
            Shape,
            "out has dim = {v_dim}, which is not between 1 and {MAX_HEAD_DIM}"
        );
        ensure!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            Shape,
            "out has {heads} heads, which is no multiple of kv_heads = {kv_heads}"
        );
        check_block("v_hadamard", self.merge.v_hadamard, ("out", v_dim))?;
        let per_chunk = floats_a_chunk(self.out.shape);
        let mut total = 0usize;
        for (i, RawStates { len: n, .. }) in self.segments.iter().enumerate() {
            ensure!(
                per_chunk == 0 && *n == 0 || per_chunk > 0 && *n > 0 && n.is_multiple_of(per_chunk),
                Shape,
                "segment {i} has {n} floats, which are no chunks of {per_chunk}"
            );
            total = total.saturating_add(n.checked_div(per_chunk).unwrap_or(0));
        }
        Ok(total)
    }

    /// Checks everything; returns the number of chunks of all segments.
    fn validate(&self) -> Result<usize> {
        let Self { out, merge, .. } = self;
        let total = self.count_chunks()?;
        let out_extent = out.validate_output("out")?;
        let heads = out.shape[HEADS];
        let n = merge.sink_logits.map_or(heads, <[f32]>::len);
        ensure!(n == heads, Shape, "sink_logits has {n} entries, but out needs {heads}");
        let lse = (!self.lse.is_null()).then(|| RawView::floats(self.lse, view::rows(out.shape)));
        let lse_extent = lse.map(|lse| lse.validate("lse")).transpose()?;
        let outputs = || {
            let lse = lse.as_ref().zip(lse_extent).map(|(lse, extent)| ("lse", lse, extent));
            [Some(("out", out, out_extent)), lse].into_iter().flatten()
        };
        let per_row = |n: usize| n.checked_div(view::rows(out.shape)).unwrap_or(0);
        for (i, &RawStates { data, len }) in self.segments.iter().enumerate() {
            ensure!(!data.is_null() || len == 0, NullPointer, "segment {i} is null, but has {len} floats");
            let states = states_view(data.cast_mut(), out.shape, per_row(len));
            let extent = states.validate("the states of a segment")?;
            for (name, output, reach) in outputs() {
                let shared = states.overlaps_within(extent, output, reach);
                ensure!(!shared, Overlap, "segment {i} and {name} share memory");
            }
        }
        for output in outputs() {
            check_list_apart("sink_logits", merge.sink_logits, output)?;
        }
        if let Some((lse, extent)) = lse.zip(lse_extent) {
            ensure!(!out.overlaps_within(out_extent, &lse, extent), Overlap, "out and lse share memory");
        }
        Ok(total)
    }

    /// Bytes of workspace that the call needs at most, whatever its addresses.
    ///
    /// # Errors
    /// Shapes and lengths that do not fit each other.
    #[cfg(feature = "capi")]
    pub fn workspace_size(&self, threads: usize) -> Result<usize> {
        self.count_chunks()?;
        let states = self.segments.iter().fold(0, |sum: usize, segment| sum.saturating_add(segment.len));
        Ok(merge_chunks_workspace_size(self.out.shape, self.merge.kv_heads, states, threads))
    }
}

/// # Safety
/// The memory that a valid view reaches, and `lse` if not null, a float per query row, is writable by this call alone; all
/// floats of the states are readable; `workspace` holds `workspace_bytes` bytes that this call alone uses.
#[cfg(feature = "capi")]
pub(crate) unsafe fn merge_chunks_raw(
    context: &Context,
    runner: &dyn Runner,
    workspace: *mut u8,
    workspace_bytes: usize,
    call: &RawMerge,
) -> Result<()> {
    let job = MergeJob::new(context, runner, call)?;
    check_workspace((workspace, workspace_bytes), job.workspace)?;
    // SAFETY: the caller's.
    unsafe { job.run(runner, workspace) }
}

/// A checked merge.
struct MergeJob<'a> {
    call: &'a RawMerge<'a>,
    kernel: AttentionKernel,
    grid: Grid,
    /// Chunks of all segments.
    chunks: usize,
    workers: usize,
    /// Bytes of a worker's scratch, those with the states of a piece after it, and those of all workers.
    scratch: usize,
    each: usize,
    workspace: usize,
}

impl<'a> MergeJob<'a> {
    fn new(context: &Context, runner: &dyn Runner, call: &'a RawMerge<'a>) -> Result<Self> {
        let chunks = call.validate()?;
        let RawMerge { merge, out, .. } = call;
        let (kernel, v_dim) = (context.attention(merge.k_format, merge.v_format, merge.precision), out.shape[DIM]);
        let grid = Grid::new(out.shape, merge.kv_heads);
        let workers = workers(runner.num_threads(), grid.tiles());
        let scratch = grid.scratch(&kernel, 1, v_dim);
        let each = scratch.saturating_add(grid.copy_bytes(chunks, v_dim));
        let workspace = workers.saturating_mul(each);
        Ok(Self { call, kernel, grid, chunks, workers, scratch, each, workspace })
    }

    /// # Safety
    /// As [`merge_chunks_raw`], with `self.workspace` bytes at `workspace`, aligned to 64.
    unsafe fn run(&self, runner: &dyn Runner, workspace: *mut u8) -> Result<()> {
        let (grid, inputs) = (&self.grid, self.grid.no_inputs(self.call.out.shape[DIM]));
        let problem = inputs.problem(grid, self.call);
        let stride = partial_stride(problem.v_dim);
        let jobs = Jobs {
            runner,
            kernel: &self.kernel,
            problem: &problem,
            workers: self.workers,
            tiles: grid.tiles(),
            memory: SharedMemory(workspace),
            worker_bytes: self.each,
        };
        let (segments, scratch, end_chunk) = (self.call.segments, self.scratch, self.chunks);
        let tile = |index: usize, own: *mut u8| {
            let tile = grid.tile(index);
            let partials = own.wrapping_add(scratch).cast::<f32>();
            let mut done = 0;
            for RawStates { data, len } in segments {
                let chunks = len / floats_a_chunk(problem.out.shape);
                let (from, n) = (grid.first(&tile) * chunks * stride, chunks * tile.head_rows * stride);
                // SAFETY: the states have these, the tile's rows in every chunk, and the copy has room for all chunks of a piece.
                unsafe { std::ptr::copy_nonoverlapping(data.add(from), partials.add(done), n) };
                done += n;
            }
            Tile { end_chunk, partials, ..tile }
        };
        // SAFETY: the states of all chunks are there; reducing reads nothing else, and writes the tile's rows of the output.
        unsafe { jobs.reduce(tile) }
    }
}

/// The number of workers for `units` units of work; none if there is nothing to do.
fn workers(threads: usize, units: usize) -> usize {
    threads.clamp(1, MAX_WORKERS).min(units)
}

/// The query rows of a call, in pieces of up to [`PIECE`] rows of a KV head.
#[derive(Clone, Copy)]
struct Grid {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    /// Rows of a KV head, and of a full piece.
    rows: usize,
    piece: usize,
}

impl Grid {
    fn new([batch, seq, heads, _]: [usize; 4], kv_heads: usize) -> Self {
        let rows = seq.saturating_mul(heads / kv_heads.max(1));
        Self { batch, seq, heads, kv_heads, rows, piece: rows.clamp(1, PIECE) }
    }

    fn tiles(&self) -> usize {
        self.batch.saturating_mul(self.kv_heads).saturating_mul(self.rows.div_ceil(self.piece))
    }

    /// Bytes of a worker's scratch.
    fn scratch(&self, kernel: &AttentionFns, dim: usize, v_dim: usize) -> usize {
        (kernel.scratch_bytes)(self.piece, dim, v_dim)
    }

    /// Bytes of the states of a piece in `chunks` chunks; a multiple of 64.
    fn copy_bytes(&self, chunks: usize, v_dim: usize) -> usize {
        chunks.saturating_mul(self.piece * partial_stride(v_dim) * size_of::<f32>())
    }

    fn tile(&self, index: usize) -> Tile {
        let pieces = self.rows.div_ceil(self.piece);
        let (pair, first_row) = (index / pieces, index % pieces * self.piece);
        Tile {
            batch: pair / self.kv_heads,
            kv_head: pair % self.kv_heads,
            kv_heads: 1,
            first_row,
            head_rows: self.piece.min(self.rows - first_row),
            first_chunk: 0,
            end_chunk: 0,
            chunks: Chunks::default(),
            partials: std::ptr::null_mut(),
        }
    }

    /// The number of rows before those of a tile.
    fn first(&self, tile: &Tile) -> usize {
        (tile.batch * self.kv_heads + tile.kv_head) * self.rows + tile.first_row
    }

    /// Inputs without keys, for values of so many elements.
    fn no_inputs(&self, v_dim: usize) -> NoInputs {
        let view = |shape: [usize; 4]| RawView {
            data: std::ptr::null_mut(),
            dtype: DType::F32,
            shape,
            strides: contiguous(shape),
            bytes: None,
        };
        let k = view([self.batch, 0, self.kv_heads, 1]);
        NoInputs {
            q: view([self.batch, self.seq, self.heads, 1]),
            k: k.into(),
            v: view([self.batch, 0, self.kv_heads, v_dim]).into(),
            visibility: Visibility::unmasked(self.batch, self.seq, k.units()),
        }
    }
}

/// See [`Grid::no_inputs`].
struct NoInputs {
    q: RawView,
    k: RawCacheView,
    v: RawCacheView,
    visibility: Visibility<'static>,
}

impl NoInputs {
    /// The problem as reducing reads it: the places of the rows.
    fn problem<'a>(&'a self, grid: &Grid, call: &'a RawMerge<'a>) -> Problem<'a> {
        let Self { q, k, v, visibility } = self;
        let RawMerge { merge, out, lse, .. } = call;
        Problem {
            q,
            k,
            v,
            v_dim: out.shape[DIM],
            v_packing: Packing::Rows,
            k_hadamard: 0,
            v_hadamard: merge.v_hadamard.unwrap_or(0),
            out,
            lse: *lse,
            visibility,
            group: grid.heads / grid.kv_heads,
            scale: 1.0,
            softcap: 0.0,
            mask: None,
            bit_mask: None,
            bias: None,
            alibi: None,
            sinks: merge.sink_logits,
        }
    }
}

const _: () = {
    assert!(SPLIT_GRID == CHUNK);
    assert!((partial_stride(1) * size_of::<f32>()).is_multiple_of(64));
};
