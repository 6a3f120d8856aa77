//! Attention over a cache: one entry for prefill, chunked prefill and decode.

use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::kernels::generic::attention::{ByteView, CHUNK, PACK_ROWS, Problem, Tile, partial_stride};
use crate::kernels::{self, AttentionFns, Function, Precision};
use crate::ops::workspace::Workspace;
use crate::parallel::{MAX_WORKERS, Runner, for_each_tile};
use crate::view::{self, BATCH, DIM, HEADS, MAX_AXIS, RawView, SEQ, View, ViewMut, reach};
use std::marker::PhantomData;

/// The largest head size.
pub const MAX_HEAD_DIM: usize = 512;

/// What attention reads and writes.
///
/// Query head `h` reads KV head `h / (heads / kv_heads)`; nothing is repeated in memory.
#[derive(Debug)]
pub struct AttentionTensors<'a> {
    /// Queries `[batch, seq, heads, dim]`, of any type.
    pub q: View<'a>,
    /// Keys `[batch, keys, kv_heads, dim]`: the cache, whole.
    pub k: View<'a>,
    /// Values `[batch, keys, kv_heads, v_dim]`, of the type of the keys.
    pub v: View<'a>,
    /// Output `[batch, seq, heads, v_dim]`, of any type.
    pub out: ViewMut<'a>,
    /// `[batch, seq, heads]`, contiguous: natural logarithm of the sum of the exponentials of a row's logits.
    pub lse: Option<&'a mut [f32]>,
}

/// How attention is masked and scaled. The default sees every key.
///
/// A logit is `softcap(q.k * scale) + alibi + bias`; then what is masked is taken out, then softmax in f32. Query i of a row
/// stands at position `p = i + offset` among the keys, and sees key j when all of these hold:
///
/// | option | condition |
/// | --- | --- |
/// | `lengths` | `j < lengths[row]` |
/// | `starts` | `j >= starts[row]` |
/// | `causal` | `j <= p` |
/// | `window_left` | `j >= p - window_left` |
/// | `window_right` | `j <= p + window_right` |
/// | `mask` | the entry is true |
/// | `bias` | the entry is not -inf |
///
/// A query that sees no key has output 0 and LSE -inf (with a sink: the sink's logit). What is not seen cannot reach the
/// output, whatever it is; what is seen does, NaN too. A live logit of -inf has weight 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionOptions<'a> {
    /// Factor on `q.k`; `1 / sqrt(dim)` if absent.
    pub scale: Option<f32>,
    /// `c tanh(x / c)` on scaled logits.
    pub softcap: Option<f32>,
    /// No key after the query's own position.
    pub causal: bool,
    /// Keys visible before the query's own position, not counting it.
    pub window_left: Option<u32>,
    /// Keys visible after the query's own position, not counting it.
    pub window_right: Option<u32>,
    /// `[batch]`: valid keys; all of `k` if absent.
    pub lengths: Option<&'a [i32]>,
    /// `[batch]`: the first visible key (left-padded batches); 0 if absent.
    pub starts: Option<&'a [i32]>,
    /// `[batch]`: the position of query 0 among the keys; `length - seq` if absent, so that the last query sees the last
    /// key. A negative one leaves leading queries without keys.
    pub offsets: Option<&'a [i32]>,
    /// Which keys each query sees.
    pub mask: Option<Mask<'a>>,
    /// `[batch, seq, heads, keys]`, of any type, added to logits; strides of 0 broadcast.
    pub bias: Option<View<'a>>,
    /// `[heads]`: `slope * (j - p)` is added to logits; see [`alibi_slopes`].
    pub alibi_slopes: Option<&'a [f32]>,
    /// `[heads]`: one more logit, which takes weight and has no value.
    pub sinks: Option<&'a [f32]>,
    /// How exactly to compute; see [`Context::kernel_for`](crate::Context::kernel_for) for what that makes of a call.
    pub precision: Precision,
}

/// A boolean mask `[batch, seq, heads, keys]`; true lets a query see a key. Strides of 0 broadcast.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    raw: RawMask,
    lifetime: PhantomData<&'a [bool]>,
}

impl<'a> Mask<'a> {
    /// A mask whose entry `[0, 0, 0, 0]` is `data[offset]`.
    ///
    /// # Errors
    /// Shape and strides reach outside `data`.
    pub fn strided(data: &'a [bool], offset: usize, shape: [usize; 4], strides: [i64; 4]) -> Result<Self> {
        let raw = RawMask { data: data.as_ptr().cast::<u8>().wrapping_add(offset), shape, strides, bytes: None };
        let (low, high) = raw.extent("mask")?;
        ensure!(
            offset as i128 + low >= 0 && offset as i128 + high <= data.len() as i128,
            Bounds,
            "mask: shape {shape:?} with strides {strides:?} from offset {offset} leaves a slice of {} entries",
            data.len()
        );
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A mask `[batch, seq, heads, keys]` that lies at the start of `data` in the order of its axes.
    pub fn new(data: &'a [bool], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, 0, shape, crate::view::contiguous(shape))
    }

    /// A mask `[seq, keys]`, the same for all rows and heads.
    pub fn for_all(data: &'a [bool], batch: usize, seq: usize, heads: usize, keys: usize) -> Result<Self> {
        Self::strided(data, 0, [batch, seq, heads, keys], [0, keys as i64, 0, 1])
    }
}

/// A mask as the C ABI passes it: bytes, 0 hides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMask {
    pub data: *const u8,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    pub bytes: Option<usize>,
}

impl RawMask {
    /// The bytes it can touch, relative to its data.
    fn extent(&self, name: &str) -> Result<(i128, i128)> {
        if self.shape.contains(&0) {
            return Ok((0, 0));
        }
        ensure!(!self.data.is_null(), NullPointer, "{name}: data is null, but the shape is {:?}", self.shape);
        for axis in 0..4 {
            ensure!(
                self.shape[axis] <= MAX_AXIS,
                Shape,
                "{name}: axis {axis} has {} elements, more than {MAX_AXIS}",
                self.shape[axis]
            );
        }
        let (low, high) = reach(name, self.data.addr(), 1, self.shape, self.strides)?;
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0 && high <= bytes as i128,
                Bounds,
                "{name}: shape {:?} with strides {:?} reaches bytes {low}..{high} of a buffer of {bytes}",
                self.shape,
                self.strides
            );
        }
        Ok((low, high))
    }

    /// The same bytes as a view, to test for overlap; two mask bytes cannot be told from one f16 there.
    fn overlaps(&self, out: &RawView) -> Result<bool> {
        let (low, high) = self.extent("mask")?;
        let reach = out.validate("out")?;
        let (a, b) = (self.data.addr() as i128, out.data.addr() as i128);
        Ok(high > low && a + low < b + reach.high as i128 && b + (reach.low as i128) < a + high)
    }
}

/// [`AttentionTensors`] and [`AttentionOptions`] without lifetimes on the views, as the C ABI has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawAttention<'a> {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    pub out: RawView,
    /// Null if not wanted.
    pub lse: *mut f32,
    pub scale: Option<f32>,
    pub softcap: Option<f32>,
    pub causal: bool,
    pub window_left: Option<i64>,
    pub window_right: Option<i64>,
    pub lengths: Option<&'a [i32]>,
    pub starts: Option<&'a [i32]>,
    pub offsets: Option<&'a [i32]>,
    pub mask: Option<RawMask>,
    pub bias: Option<RawView>,
    pub alibi_slopes: Option<&'a [f32]>,
    pub sinks: Option<&'a [f32]>,
    pub precision: Precision,
}

/// The standard ALiBi slopes for any number of heads (<https://arxiv.org/abs/2108.12409>): for a power of two n,
/// `2^(-8 (h + 1) / n)`; otherwise those of the largest power of two below, then every other one of twice that.
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
/// One entry for prefill (`seq` queries that have just been written to the cache), chunked prefill and decode (`seq` = 1).
/// Queries, keys and values keep their types; arithmetic is f32, rounded once to the type of `out`.
///
/// The bits of a row of the output depend on that row's inputs, the ISA level and the precision alone: not on the runner, the
/// batch around it or the strides; and so not on how a prompt was cut, since every step sees the same keys.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs and workspaces.
///
/// # Errors
/// Shapes that do not fit, K and V of different types, lengths outside the cache, an output that shares memory with an
/// input. Nothing has been written then.
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
///     AttentionTensors {
///         q: View::new(&q, [1, 1, 4, 8])?,
///         k: View::new(&keys, [1, 16, 2, 8])?,
///         v: View::new(&values, [1, 16, 2, 8])?,
///         out: ViewMut::new(&mut out, [1, 1, 4, 8])?,
///         lse: None,
///     },
///     &AttentionOptions { causal: true, lengths: Some(&[3]), ..Default::default() },
/// )?;
/// assert_eq!(out[0], 0.5);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn attention(
    context: &Context,
    runner: &dyn Runner,
    workspace: &mut Workspace,
    tensors: AttentionTensors,
    options: &AttentionOptions,
) -> Result<()> {
    let AttentionTensors { q, k, v, out, lse } = tensors;
    if let Some(lse) = &lse {
        let rows = view::rows(q.shape());
        ensure!(lse.len() == rows, Shape, "lse has {} entries, but q has {rows} rows", lse.len());
    }
    let call = RawAttention {
        q: q.raw,
        k: k.raw,
        v: v.raw,
        out: out.raw,
        lse: lse.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr),
        scale: options.scale,
        softcap: options.softcap,
        causal: options.causal,
        window_left: options.window_left.map(i64::from),
        window_right: options.window_right.map(i64::from),
        lengths: options.lengths,
        starts: options.starts,
        offsets: options.offsets,
        mask: options.mask.map(|m| m.raw),
        bias: options.bias.map(|b| b.raw),
        alibi_slopes: options.alibi_slopes,
        sinks: options.sinks,
        precision: options.precision,
    };
    let kernel = context.attention(call.k.dtype, call.precision);
    workspace.reserve(workspace_size(&kernel, call.q.shape, call.k.shape, call.v.shape[DIM], runner.num_threads()));
    // SAFETY: the views borrow what they reach, and the LSE has an entry a row.
    unsafe { attention_raw(context, runner, workspace.as_mut_ptr(), workspace.len(), &call) }
}

/// Bytes of workspace that [`attention`] needs at most for queries `[batch, seq, heads, dim]`, keys
/// `[batch, keys, kv_heads, dim]`, values of `v_dim` elements and `threads` threads, whatever lengths, strides and masks are.
pub fn attention_workspace_size(q_shape: [usize; 4], k_shape: [usize; 4], v_dim: usize, threads: usize) -> usize {
    // The call may meet any kernel.
    kernels::registry()
        .filter_map(|entry| match &entry.function {
            Function::Attention(kernel) => Some(workspace_size(kernel, q_shape, k_shape, v_dim, threads)),
            _ => None,
        })
        .max()
        .unwrap_or(0)
}

/// As [`attention_workspace_size`], for one kernel.
fn workspace_size(kernel: &AttentionFns, q: [usize; 4], k: [usize; 4], v_dim: usize, threads: usize) -> usize {
    let bytes = |together| Plan::new(kernel, q, k, v_dim, threads, k[SEQ], together).bytes();
    bytes(false).max(bytes(true))
}

/// How rows are cut into tiles: depends on shapes, lengths and threads only, and nothing in the result depends on it.
#[derive(Clone, Copy, Debug)]
struct Plan {
    workers: usize,
    /// KV heads a tile.
    tile_heads: usize,
    /// Rows of each of them.
    tile_rows: usize,
    tiles_per_head: usize,
    /// Tiles of all batch rows and KV heads.
    tiles: usize,
    /// Chunks of keys in the longest row.
    chunks: usize,
    /// Whether every chunk of a tile is a job of its own, which leaves a partial state.
    split: bool,
    /// Bytes of one worker's scratch memory.
    scratch: usize,
    /// Bytes of the partial states of one tile.
    partials: usize,
}

/// Tiles are made smaller, down to this many rows, while there are too few of them for all workers.
const MIN_TILE_ROWS: usize = 24;

/// The most memory that partial states may take; beyond it rows are not split.
const MAX_PARTIALS: usize = 256 << 20;

/// Multiplications and additions below which another thread does not pay.
const GRAIN: usize = 512 * 1024;

impl Plan {
    /// `longest`: the most keys a row has; `together`: the heads of a token are neighbours in memory. The bytes grow with
    /// `longest`.
    fn new(
        kernel: &AttentionFns,
        q: [usize; 4],
        k: [usize; 4],
        dv: usize,
        threads: usize,
        longest: usize,
        together: bool,
    ) -> Self {
        let workers = threads.clamp(1, MAX_WORKERS);
        let [batch, seq, heads, d] = q;
        let (keys, kv_heads) = (k[SEQ], k[HEADS].max(1));
        let rows = seq.saturating_mul(heads / kv_heads).max(1);
        let chunks = longest.div_ceil(CHUNK);
        let jobs = 2 * workers;
        let (tile_heads, tile_rows) = if together && kernel.several_heads && rows < PACK_ROWS {
            let groups = jobs.div_ceil(batch.saturating_mul(chunks).max(1));
            (kv_heads.div_ceil(if workers > 1 { groups } else { 1 }).min(kernel.max_rows / rows), rows)
        } else {
            let wanted = jobs.div_ceil(batch.saturating_mul(kv_heads).max(1));
            let most = kernel.max_rows.min(rows.div_ceil(wanted).max(MIN_TILE_ROWS));
            let pieces = rows.div_ceil(most);
            (1, if pieces == 1 { rows } else { rows.div_ceil(pieces).next_multiple_of(kernel.row_step) })
        };
        let tiles_per_head = rows.div_ceil(tile_rows);
        let tiles = batch.saturating_mul(kv_heads.div_ceil(tile_heads)).saturating_mul(tiles_per_head);
        let state = partial_stride(dv) * size_of::<f32>();
        let all_partials = |chunks: usize| {
            batch.saturating_mul(kv_heads).saturating_mul(tile_rows * tiles_per_head).saturating_mul(chunks * state)
        };
        let split = workers > 1 && tiles < jobs && chunks > 1 && all_partials(keys.div_ceil(CHUNK)) <= MAX_PARTIALS;
        Self {
            workers,
            tile_heads,
            tile_rows,
            tiles_per_head,
            tiles,
            chunks,
            split,
            scratch: (kernel.scratch_bytes)(tile_heads * tile_rows, d, dv),
            partials: if split { chunks * tile_heads * tile_rows * state } else { 0 },
        }
    }

    fn bytes(&self) -> usize {
        self.workers.saturating_mul(self.scratch).saturating_add(self.tiles.saturating_mul(self.partials))
    }

    /// Tile `index`, with the last rows first: causal ones see the most keys, and the longest job should not come last.
    fn tile(&self, index: usize, rows: usize, kv_heads: usize) -> Tile {
        let (pair, piece) = (index / self.tiles_per_head, self.tiles_per_head - 1 - index % self.tiles_per_head);
        let groups = kv_heads.div_ceil(self.tile_heads);
        let (batch, kv_head) = (pair / groups, pair % groups * self.tile_heads);
        let first_row = (piece * self.tile_rows).min(rows);
        Tile {
            batch,
            kv_head,
            kv_heads: self.tile_heads.min(kv_heads - kv_head),
            first_row,
            head_rows: self.tile_rows.min(rows - first_row),
            first_chunk: 0,
            end_chunk: self.chunks,
            partials: std::ptr::null_mut(),
        }
    }
}

/// Whether the heads of a token lie closer together than its neighbours in the sequence, so that several are read together.
fn heads_together(view: &RawView) -> bool {
    view.strides[DIM] == 1 && view.strides[HEADS].unsigned_abs() < view.strides[SEQ].unsigned_abs()
}

/// # Safety
/// The memory that valid views reach is readable and, for `out`, writable, by this call alone; `lse`, if not null, holds a
/// float a row; `workspace` holds `workspace_bytes` bytes that this call alone uses.
pub(crate) unsafe fn attention_raw(
    context: &Context,
    runner: &dyn Runner,
    workspace: *mut u8,
    workspace_bytes: usize,
    call: &RawAttention,
) -> Result<()> {
    let problem = validate(call)?;
    if call.out.is_empty() && call.lse.is_null() {
        return Ok(());
    }
    let [batch, seq, heads, d] = call.q.shape;
    if batch * seq * heads == 0 {
        return Ok(());
    }
    let dv = call.v.shape[DIM];
    let kernel = context.attention(call.k.dtype, call.precision);
    let longest = (0..batch).map(|b| problem.length(b)).max().unwrap_or(0) as usize;
    let together = heads_together(&call.k) && heads_together(&call.v);
    let plan = Plan::new(&kernel, call.q.shape, call.k.shape, dv, runner.num_threads(), longest, together);
    let needed = plan.bytes();
    ensure!(
        workspace_bytes >= needed,
        Workspace,
        "the workspace has {workspace_bytes} bytes, but this call needs {needed}"
    );
    ensure!(
        !workspace.is_null() && workspace.addr().is_multiple_of(64),
        Workspace,
        "the workspace at {:#x} is not aligned to 64 bytes",
        workspace.addr()
    );
    // An upper bound is enough: it only decides whether threads are worth their start.
    let steps = [batch, heads, seq, longest, d + dv].into_iter().fold(1, usize::saturating_mul);
    let workers = plan.workers.min(steps / GRAIN).max(1);

    let kv_heads = call.k.shape[HEADS];
    let rows = seq * problem.group;
    let memory = SharedMemory(workspace);
    let scratch = |worker: usize| memory.at(worker * plan.scratch);
    if !plan.split || workers == 1 {
        return for_each_tile(runner, workers, plan.tiles, &|worker, index| {
            let tile = plan.tile(index, rows, kv_heads);
            // SAFETY: the problem is valid and the tile inside it; the scratch is this worker's.
            unsafe { (kernel.tile)(&problem, &tile, scratch(worker)) };
        });
    }
    let partials = |index: usize| memory.at(plan.workers * plan.scratch + index * plan.partials).cast::<f32>();
    for_each_tile(runner, workers, plan.tiles * plan.chunks, &|worker, unit| {
        let (index, chunk) = (unit / plan.chunks, unit % plan.chunks);
        let tile = plan.tile(index, rows, kv_heads);
        let state = partials(index).wrapping_add(chunk * tile.rows() * partial_stride(dv));
        let tile = Tile { first_chunk: chunk, end_chunk: chunk + 1, partials: state, ..tile };
        // SAFETY: as above; every unit writes states of its own.
        unsafe { (kernel.tile)(&problem, &tile, scratch(worker)) };
    })?;
    for_each_tile(runner, workers, plan.tiles, &|worker, index| {
        let tile = Tile { partials: partials(index), ..plan.tile(index, rows, kv_heads) };
        // SAFETY: as above; all states have been written.
        unsafe { (kernel.reduce)(&problem, &tile, scratch(worker)) };
    })
}

/// The workspace, cut by worker and tile.
#[derive(Clone, Copy)]
struct SharedMemory(*mut u8);

impl SharedMemory {
    fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: workers and tiles take disjoint parts.
unsafe impl Sync for SharedMemory {}

fn validate<'a>(call: &RawAttention<'a>) -> Result<Problem<'a>> {
    let RawAttention { q, k, v, out, .. } = call;
    let (q_extent, k_extent, v_extent) = (q.validate("q")?, k.validate("k")?, v.validate("v")?);
    let out_extent = out.validate_output("out")?;
    ensure!(k.dtype == v.dtype, DType, "k is {}, but v is {}", k.dtype, v.dtype);
    let [batch, seq, heads, dim] = q.shape;
    let (keys, kv_heads, v_dim) = (k.shape[SEQ], k.shape[HEADS], v.shape[DIM]);
    k.same_axis("k", q, "q", BATCH)?;
    k.same_axis("k", q, "q", DIM)?;
    for axis in [BATCH, SEQ, HEADS] {
        v.same_axis("v", k, "k", axis)?;
        out.same_axis("out", q, "q", axis)?;
    }
    out.same_axis("out", v, "v", DIM)?;
    for (name, n) in [("k", dim), ("v", v_dim)] {
        ensure!(
            (1..=MAX_HEAD_DIM).contains(&n),
            Shape,
            "{name} has dim = {n}, which is not between 1 and {MAX_HEAD_DIM}"
        );
    }
    ensure!(
        heads == 0 || kv_heads > 0 && heads.is_multiple_of(kv_heads),
        Shape,
        "q has {heads} heads, which is no multiple of the {kv_heads} of k"
    );

    for (name, list) in [("lengths", call.lengths), ("starts", call.starts), ("offsets", call.offsets)] {
        let Some(list) = list else { continue };
        ensure!(list.len() == batch, Shape, "{name} has {} entries, but q has batch = {batch}", list.len());
        for (row, &x) in list.iter().enumerate() {
            ensure!(
                name == "offsets" || x >= 0 && x as usize <= keys,
                OutOfRange,
                "{name}[{row}] is {x}, but k has seq = {keys}"
            );
        }
    }
    for (name, window) in [("window_left", call.window_left), ("window_right", call.window_right)] {
        let window = window.unwrap_or(0);
        ensure!((0..=u32::MAX as i64).contains(&window), InvalidValue, "{name} is {window}");
    }
    for (name, list) in [("alibi_slopes", call.alibi_slopes), ("sinks", call.sinks)] {
        let n = list.map_or(heads, <[f32]>::len);
        ensure!(n == heads, Shape, "{name} has {n} entries, but q has {heads} heads");
    }
    let scale = call.scale.unwrap_or(1.0 / (dim as f32).sqrt());
    ensure!(scale.is_finite(), InvalidValue, "scale is {scale}");
    let softcap = call.softcap.unwrap_or(0.0);
    ensure!(softcap.is_finite() && softcap >= 0.0, InvalidValue, "softcap is {softcap}");

    let mask_shape = [batch, seq, heads, keys];
    if let Some(mask) = &call.mask {
        ensure!(mask.shape == mask_shape, Shape, "mask has shape {:?}, but must have {mask_shape:?}", mask.shape);
        mask.extent("mask")?;
        ensure!(!mask.overlaps(out)?, Overlap, "mask and out share memory");
    }
    if let Some(bias) = &call.bias {
        ensure!(bias.shape == mask_shape, Shape, "bias has shape {:?}, but must have {mask_shape:?}", bias.shape);
        let extent = bias.validate("bias")?;
        ensure!(!bias.overlaps_within(extent, out, out_extent), Overlap, "bias and out share memory");
    }
    for (name, view, extent) in [("q", q, q_extent), ("k", k, k_extent), ("v", v, v_extent)] {
        ensure!(!view.overlaps_within(extent, out, out_extent), Overlap, "{name} and out share memory");
    }
    if !call.lse.is_null() {
        let rows = batch * seq * heads;
        let lse = RawView {
            data: call.lse.cast(),
            dtype: DType::F32,
            shape: [1, 1, 1, rows],
            strides: [0, 0, 0, 1],
            bytes: None,
        };
        lse.validate("lse")?;
        if let Some(mask) = &call.mask {
            ensure!(!mask.overlaps(&lse)?, Overlap, "mask and lse share memory");
        }
        for (name, view) in
            [("q", Some(q)), ("k", Some(k)), ("v", Some(v)), ("out", Some(out)), ("bias", call.bias.as_ref())]
        {
            ensure!(!view.is_some_and(|view| view.overlaps(&lse)), Overlap, "{name} and lse share memory");
        }
    }
    Ok(Problem {
        q: *q,
        k: *k,
        v: *v,
        out: *out,
        lse: call.lse,
        group: heads / kv_heads.max(1),
        scale,
        softcap,
        causal: call.causal,
        window_left: call.window_left,
        window_right: call.window_right,
        lengths: call.lengths,
        starts: call.starts,
        offsets: call.offsets,
        mask: call.mask.map(|m| ByteView { data: m.data, strides: m.strides }),
        bias: call.bias,
        alibi: call.alibi_slopes,
        sinks: call.sinks,
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

    #[test]
    fn tiles_cover_every_row_once() {
        let kernel = crate::Context::new().unwrap().attention(DType::F32, Precision::Default);
        for (seq, group, batch, kv_heads, threads) in
            [(1, 4, 1, 8, 2), (200, 3, 2, 3, 5), (7, 71, 1, 1, 3), (1, 1, 1, 1, 64), (1, 1, 2, 300, 1), (3, 3, 1, 7, 2)]
        {
            for (together, longest) in [(false, 5000), (true, 5000), (true, 100), (true, 0)] {
                let (q, k) = ([batch, seq, group * kv_heads, 64], [batch, 5000, kv_heads, 64]);
                let plan = Plan::new(&kernel, q, k, 64, threads, longest, together);
                assert!(plan.bytes() <= attention_workspace_size(q, k, 64, threads));
                let rows = seq * group;
                let mut seen = vec![0; batch * kv_heads * rows];
                for index in 0..plan.tiles {
                    let tile = plan.tile(index, rows, kv_heads);
                    for head in tile.kv_head..tile.kv_head + tile.kv_heads {
                        for row in tile.first_row..tile.first_row + tile.head_rows {
                            seen[(tile.batch * kv_heads + head) * rows + row] += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "{plan:?}");
            }
        }
    }
}
