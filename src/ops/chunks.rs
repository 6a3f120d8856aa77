//! Attention whose keys are spread over several calls, with the bits of one: states by chunks, and their merge.
//!
//! A row's softmax is computed chunk by chunk, on a grid of [`SPLIT_GRID`] keys, and chunks are folded in ascending order. A
//! call over a span of keys that begins on the grid can leave the states of its chunks instead of an output; folding those of all
//! spans is then what one call over all keys does. [`merge_states`](crate::merge_states) needs less memory and carries outputs, which
//! are divided and rounded already: it has the kernel's bound, not its bits.
//!
//! ```text
//! states: [batch][kv_heads][rows in pieces of PIECE][chunks][rows of the piece][16 + v_dim rounded up to 16]
//! ```
//! The floats in it are the kernel's own business: they mean something to [`merge_chunks`] on a context of the same level and
//! precision, for keys of the same type.

use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::kernels::generic::attention::{CHUNK, Chunks, Problem, Spans, Tile, partial_stride};
use crate::kernels::{AttentionFns, Precision};
use crate::layout::{Layout, Packing};
use crate::ops::attention::{AttentionOptions, AttentionTensors, MAX_HEAD_DIM, RawAttention, SharedMemory, validate};
use crate::ops::shard::SPLIT_GRID;
use crate::ops::workspace::Workspace;
use crate::parallel::{MAX_WORKERS, Runner, for_each_tile};
use crate::view::{BATCH, DIM, HEADS, RawView, SEQ, View, ViewMut, contiguous};

/// Query rows of a KV head that are computed together; a part of the format, so no matter of the kernel's.
const PIECE: usize = 192;

/// The most spans that one call merges.
pub const MAX_SPANS: usize = 256;

/// Floats that the states of queries `[batch, seq, heads, dim]` over a span of up to `keys` keys take: for every row and chunk, the
/// values' elements and 16 more.
pub fn chunk_states_len(q_shape: [usize; 4], keys: usize, v_dim: usize) -> usize {
    let rows = [q_shape[BATCH], q_shape[SEQ], q_shape[HEADS]].into_iter().fold(1, usize::saturating_mul);
    rows.saturating_mul(keys.div_ceil(CHUNK).max(1)).saturating_mul(partial_stride(v_dim))
}

/// Attention over a span of a sequence: writes the states of its chunks to `states`, of [`chunk_states_len`] floats for the slots that
/// `k` has. `options` are as for [`attention`](crate::attention()), in the span's own positions: lengths and offsets less the span's
/// first key, which is a multiple of [`SPLIT_GRID`] ([`SpanLists`](crate::SpanLists) computes them). Sinks are given to
/// [`merge_chunks`] instead.
///
/// Thread safety: as for [`attention`](crate::attention()).
///
/// # Errors
/// What [`attention`](crate::attention()) says; sinks, ragged queries, rings; `states` of another length.
pub fn attention_chunks(
    context: &Context,
    runner: &dyn Runner,
    workspace: &mut Workspace,
    (q, k, v): (View, View, View),
    options: &AttentionOptions,
    states: &mut [f32],
) -> Result<()> {
    let v_dim = v.shape()[DIM] / if options.v_packing == Packing::RowPairs { 2 } else { 1 };
    ensure!(
        (1..=MAX_HEAD_DIM).contains(&v_dim),
        Shape,
        "v has dim = {v_dim}, which is not between 1 and {MAX_HEAD_DIM}"
    );
    let [batch, seq, heads, dim] = q.shape();
    let n = states.len();
    let shape = [batch, seq, heads, v_dim];
    let needed = shape.into_iter().fold(1, usize::saturating_mul);
    ensure!(n >= needed, Shape, "states has {n} floats, which are not even an output's {needed}");
    let states = states.as_mut_ptr();
    // SAFETY: the first floats of a list that is this call's alone. An output that is never written: it stands for the shape of
    // what a merge will write.
    let out = ViewMut::new(unsafe { std::slice::from_raw_parts_mut(states, needed) }, shape)?;
    let call = RawAttention::new(AttentionTensors { q, k, v, out, lse: None }, options)?;
    ensure!(
        options.sinks.is_none(),
        InvalidValue,
        "sinks are given where spans are merged, not where they are computed"
    );
    ensure!(
        call.spans.query_starts.is_none(),
        InvalidValue,
        "query_starts: the states of ragged queries have no format"
    );
    ensure!(!matches!(call.spans.layout, Layout::Ring { .. }), InvalidValue, "a ring is no span of a sequence");
    let keys = call.spans.layout.most_keys(&call.k);
    let want = chunk_states_len(call.q.shape, keys, v_dim);
    ensure!(n == want, Shape, "states has {n} floats, but must have {want} for {keys} keys");
    let (problem, _) = validate(&call)?;

    let kernel = context.attention(call.k.dtype, call.precision);
    let grid = Grid::new(batch, seq, heads, call.k.shape[HEADS]);
    let chunks = keys.div_ceil(CHUNK).max(1);
    let workers = runner.num_threads().clamp(1, MAX_WORKERS);
    let scratch = grid.scratch(&kernel, dim, v_dim);
    workspace.reserve(workers * scratch);
    let (memory, states) = (SharedMemory(workspace.as_mut_ptr()), SharedMemory(states.cast()));
    for_each_tile(runner, workers, grid.tiles() * chunks, &|worker, unit| {
        let (index, chunk) = (unit / chunks, unit % chunks);
        let tile = grid.tile(index);
        let at = (grid.first(&tile) * chunks + chunk * tile.head_rows) * partial_stride(v_dim);
        let tile = Tile {
            first_chunk: chunk,
            end_chunk: chunk + 1,
            partials: states.at(at * size_of::<f32>()).cast(),
            ..tile
        };
        // SAFETY: the problem is valid and the tile inside it; the scratch is this worker's, the states this unit's.
        unsafe { (kernel.tile)(&problem, &tile, memory.at(worker * scratch)) };
    })
}

/// What the spans of a merge have in common.
#[derive(Clone, Copy, Debug)]
pub struct ChunkMerge<'a> {
    /// KV heads of the cache.
    pub kv_heads: usize,
    /// The type of its keys and values.
    pub dtype: DType,
    /// That of the spans' calls.
    pub precision: Precision,
    /// `[heads]`: as in [`AttentionOptions::sinks`]; they count once, here.
    pub sinks: Option<&'a [f32]>,
}

/// Output and LSE of attention whose keys lay in several spans: `spans` are the states that [`attention_chunks`] left, in the order of
/// the sequence. The bits are those of one call of [`attention`](crate::attention()) over all keys, if every span but the last ended
/// on the grid. `out` is `[batch, seq, heads, v_dim]`, `lse` `[batch, seq, heads]` and contiguous.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs and workspaces.
///
/// # Errors
/// No span or more than [`MAX_SPANS`], states whose length is no number of chunks of these rows, lists of another length. Nothing has
/// been written then.
pub fn merge_chunks(
    context: &Context,
    runner: &dyn Runner,
    workspace: &mut Workspace,
    spans: &[&[f32]],
    merge: &ChunkMerge,
    out: ViewMut,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let [batch, seq, heads, v_dim] = out.shape();
    let (kv_heads, count) = (merge.kv_heads, spans.len());
    out.raw.validate_output("out")?;
    ensure!((1..=MAX_SPANS).contains(&count), InvalidValue, "{count} spans, but a call merges 1 to {MAX_SPANS}");
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
    let rows = batch * seq * heads;
    for (name, n, want) in [
        ("lse", lse.as_ref().map_or(rows, |l| l.len()), rows),
        ("sinks", merge.sinks.map_or(heads, <[f32]>::len), heads),
    ] {
        ensure!(n == want, Shape, "{name} has {n} entries, but out needs {want}");
    }
    let per_chunk = rows * partial_stride(v_dim);
    let mut total = 0;
    for (i, states) in spans.iter().enumerate() {
        let n = states.len();
        ensure!(
            per_chunk == 0 && n == 0 || per_chunk > 0 && n > 0 && n.is_multiple_of(per_chunk),
            Shape,
            "span {i} has {n} floats, which are no chunks of {per_chunk}"
        );
        total += n.checked_div(per_chunk).unwrap_or(0);
    }
    if rows == 0 {
        return Ok(());
    }
    let kernel = context.attention(merge.dtype, merge.precision);
    let grid = Grid::new(batch, seq, heads, kv_heads);
    let stride = partial_stride(v_dim);
    let scratch = grid.scratch(&kernel, 1, v_dim);
    let copy = (total * grid.piece * stride * size_of::<f32>()).next_multiple_of(64);
    let workers = runner.num_threads().clamp(1, MAX_WORKERS);
    workspace.reserve(workers * (scratch + copy));
    let memory = SharedMemory(workspace.as_mut_ptr());
    let problem = grid.problem(merge, out.raw, lse.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr));
    for_each_tile(runner, workers, grid.tiles(), &|worker, index| {
        let tile = grid.tile(index);
        let own = memory.at(worker * (scratch + copy));
        let partials = own.wrapping_add(scratch).cast::<f32>();
        let mut done = 0;
        for states in spans {
            let chunks = states.len() / per_chunk;
            let (from, n) = (grid.first(&tile) * chunks * stride, chunks * tile.head_rows * stride);
            // SAFETY: the copy has room for all chunks of a piece.
            unsafe { std::ptr::copy_nonoverlapping(states[from..from + n].as_ptr(), partials.add(done), n) };
            done += n;
        }
        let tile = Tile { end_chunk: total, partials, ..tile };
        // SAFETY: the states of all chunks are there; reducing reads nothing else, and writes the tile's rows of the output.
        unsafe { (kernel.reduce)(&problem, &tile, own) };
    })
}

/// The rows of a call, in pieces of up to [`PIECE`] of a KV head.
#[derive(Clone, Copy)]
struct Grid {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    /// Rows of a KV head, and of a whole piece.
    rows: usize,
    piece: usize,
}

impl Grid {
    fn new(batch: usize, seq: usize, heads: usize, kv_heads: usize) -> Self {
        let rows = seq * (heads / kv_heads.max(1));
        Self { batch, seq, heads, kv_heads, rows, piece: rows.clamp(1, PIECE) }
    }

    fn tiles(&self) -> usize {
        self.batch * self.kv_heads * self.rows.div_ceil(self.piece)
    }

    fn scratch(&self, kernel: &AttentionFns, dim: usize, v_dim: usize) -> usize {
        (kernel.scratch_bytes)(self.piece, dim, v_dim)
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

    /// How many rows lie before those of a tile.
    fn first(&self, tile: &Tile) -> usize {
        (tile.batch * self.kv_heads + tile.kv_head) * self.rows + tile.first_row
    }

    /// What reducing needs to know: where rows go. There are no keys and no queries any more.
    fn problem<'a>(&self, merge: &ChunkMerge<'a>, out: RawView, lse: *mut f32) -> Problem<'a> {
        let view = |shape: [usize; 4]| RawView {
            data: std::ptr::null_mut(),
            dtype: merge.dtype,
            shape,
            strides: contiguous(shape),
            bytes: None,
        };
        let v_dim = out.shape[DIM];
        let k = view([self.batch, 0, self.kv_heads, 1]);
        Problem {
            q: view([self.batch, self.seq, self.heads, 1]),
            k,
            v: view([self.batch, 0, self.kv_heads, v_dim]),
            v_dim,
            v_packing: Packing::Rows,
            out,
            lse,
            spans: Spans::unmasked(self.batch, self.seq, k),
            group: self.heads / self.kv_heads,
            scale: 1.0,
            softcap: 0.0,
            mask: None,
            bit_mask: None,
            bias: None,
            alibi: None,
            sinks: merge.sinks,
        }
    }
}

const _: () = assert!(SPLIT_GRID == CHUNK);
