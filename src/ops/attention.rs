//! Attention over a cache: one entry for prefill, chunked prefill and decode.

use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::kernels::generic::attention::{BitView, ByteView, CHUNK, Chunks, PACK_ROWS, Problem, Tile, partial_stride};
use crate::kernels::{self, AttentionFns, Function, Precision};
use crate::layout::Layout;
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
    /// Keys `[batch, keys, kv_heads, dim]`: the cache, whole. Of layouts that are not contiguous, the first two axes are what
    /// [`Layout`] says.
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
/// | `causal` | `j <= p`, or `j < prefixes[row]` |
/// | `window_left` | `j >= p - window_left`, or `j < prefixes[row]` |
/// | `window_right` | `j <= p + window_right`, or `j < prefixes[row]` |
/// | `mask` | the entry is true |
/// | `bit_mask` | the bit is 1, or `j` is before the mask's first key |
/// | `bias` | the entry is not -inf |
/// | `layout` | a ring has not overwritten it |
///
/// Where windows count from, and how other libraries count, is a [page of its own](crate::masks). A query that sees no key has output 0 and LSE -inf (with a sink: the sink's logit). What is not seen cannot reach the
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
    /// In which slots of `k` and `v` the tokens of a row lie. A ring, and pages, need `lengths`, and positions go on counting
    /// what a ring has overwritten: a window must lie in what it retains, and with no window there can be only one query once
    /// it has overwritten any.
    pub layout: Layout<'a>,
    /// `[batch + 1]`: ragged queries. `q` and `out` are `[1, tokens, heads, dim]`, and row b of the batch is tokens
    /// `query_starts[b]..query_starts[b + 1]` (`cu_seqlens`).
    pub query_starts: Option<&'a [i32]>,
    /// `[batch]`: valid keys; as many as the cache has room for if absent.
    pub lengths: Option<&'a [i32]>,
    /// `[batch]`: the first visible key (left-padded batches); 0 if absent.
    pub starts: Option<&'a [i32]>,
    /// `[batch]`: the position of query 0 among the keys; `length - seq` if absent, so that the last query sees the last
    /// key. A negative one leaves leading queries without keys.
    pub offsets: Option<&'a [i32]>,
    /// `[batch]`: every query sees the keys before this one, whatever causality and windows say (prefix-LM, attention sinks
    /// that a window must not hide); 0 if absent.
    pub prefixes: Option<&'a [i32]>,
    /// Which keys each query sees, a byte each.
    pub mask: Option<Mask<'a>>,
    /// Which keys each query sees, a bit each.
    pub bit_mask: Option<BitMask<'a>>,
    /// `[batch, seq, heads, keys]`, of any type, added to logits; strides of 0 broadcast.
    ///
    /// Of this and the masks, `seq` is the most queries that a row has, and `keys` is at least the greatest length.
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

/// A mask `[batch, seq, heads, keys]` of one bit a query and key; 1 lets a query see a key. The lowest bit of a byte is the
/// first, and keys are neighbours; other strides are given in bits, and 0 broadcasts.
///
/// It may speak of the last keys alone: with [first keys](Self::with_first_keys), bit j of row b is of key
/// `first_keys[b] + j`, and keys before are seen. So the tree of a speculation is `[batch, n, 1, n]` bits (heads broadcast)
/// over the n tokens that were written last.
#[derive(Clone, Copy, Debug)]
pub struct BitMask<'a> {
    pub(crate) raw: RawBitMask<'a>,
}

impl<'a> BitMask<'a> {
    /// A mask whose entry `[0, 0, 0, 0]` is bit `offset` of `data`; strides of batch, queries and heads in bits.
    ///
    /// # Errors
    /// Shape and strides reach outside `data`.
    pub fn strided(data: &'a [u8], offset: usize, shape: [usize; 4], strides: [i64; 3]) -> Result<Self> {
        let raw = RawBitMask {
            data: data.as_ptr(),
            offset: offset as i64,
            shape,
            strides,
            bytes: Some(data.len()),
            first_keys: None,
        };
        raw.validate()?;
        Ok(Self { raw })
    }

    /// A mask `[batch, seq, keys]`, the same for all heads, without a gap between its bits.
    ///
    /// # Errors
    /// `data` is too short.
    pub fn new(data: &'a [u8], batch: usize, seq: usize, heads: usize, keys: usize) -> Result<Self> {
        let row = keys as i64;
        Self::strided(data, 0, [batch, seq, heads, keys], [row.saturating_mul(seq as i64), row, 0])
    }

    /// `[batch]`: the key of a row's first bit. Keys before it are seen.
    pub fn with_first_keys(self, first_keys: &'a [i32]) -> Self {
        Self { raw: RawBitMask { first_keys: Some(first_keys), ..self.raw } }
    }
}

/// A bit mask as the C ABI passes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawBitMask<'a> {
    pub data: *const u8,
    /// The bit of entry `[0, 0, 0, 0]`.
    pub offset: i64,
    pub shape: [usize; 4],
    /// In bits; keys are neighbours.
    pub strides: [i64; 3],
    pub bytes: Option<usize>,
    pub first_keys: Option<&'a [i32]>,
}

impl RawBitMask<'_> {
    /// The bytes it can touch, relative to its data.
    fn validate(&self) -> Result<(i128, i128)> {
        let Self { shape, strides, offset, .. } = *self;
        for (axis, n) in shape.into_iter().enumerate() {
            ensure!(n <= MAX_AXIS, Shape, "bit_mask: axis {axis} has {n} elements, more than {MAX_AXIS}");
        }
        if shape.contains(&0) {
            return Ok((0, 0));
        }
        ensure!(!self.data.is_null(), NullPointer, "bit_mask: data is null, but the shape is {shape:?}");
        let (mut low, mut high) = (i128::from(offset), i128::from(offset) + shape[3] as i128);
        for axis in 0..3 {
            let reach = (shape[axis] as i128 - 1) * i128::from(strides[axis]);
            (low, high) = (low + reach.min(0), high + reach.max(0));
        }
        let (low, high) = (low.div_euclid(8), (high + 7).div_euclid(8));
        let (most, at) = (isize::MAX as i128, self.data.addr() as i128);
        ensure!(
            low >= -most && high <= most && at + low >= 0 && at + high <= usize::MAX as i128,
            Stride,
            "bit_mask: shape {shape:?} with strides {strides:?} from bit {offset} leaves the address space"
        );
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0 && high <= bytes as i128,
                Bounds,
                "bit_mask: shape {shape:?} with strides {strides:?} from bit {offset} reaches bytes {low}..{high} of a buffer \
                 of {bytes}"
            );
        }
        Ok((low, high))
    }

    fn overlaps(&self, out: &RawView) -> Result<bool> {
        let (low, high) = self.validate()?;
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
    pub layout: Layout<'a>,
    pub query_starts: Option<&'a [i32]>,
    pub lengths: Option<&'a [i32]>,
    pub starts: Option<&'a [i32]>,
    pub offsets: Option<&'a [i32]>,
    pub prefixes: Option<&'a [i32]>,
    pub mask: Option<RawMask>,
    pub bit_mask: Option<RawBitMask<'a>>,
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
        layout: options.layout,
        query_starts: options.query_starts,
        lengths: options.lengths,
        starts: options.starts,
        offsets: options.offsets,
        prefixes: options.prefixes,
        mask: options.mask.map(|m| m.raw),
        bit_mask: options.bit_mask.map(|m| m.raw),
        bias: options.bias.map(|b| b.raw),
        alibi_slopes: options.alibi_slopes,
        sinks: options.sinks,
        precision: options.precision,
    };
    let kernel = context.attention(call.k.dtype, call.precision);
    let (q_shape, k_shape) = call.shapes();
    workspace.reserve(workspace_size(&kernel, q_shape, k_shape, call.v.shape[DIM], runner.num_threads()));
    // SAFETY: the views borrow what they reach, and the LSE has an entry a row.
    unsafe { attention_raw(context, runner, workspace.as_mut_ptr(), workspace.len(), &call) }
}

/// Bytes of workspace that [`attention`] needs at most for queries `[batch, seq, heads, dim]`, keys
/// `[batch, keys, kv_heads, dim]`, values of `v_dim` elements and `threads` threads, whatever lengths, strides and masks are.
/// For layouts that are not contiguous, `keys` is the most that a row has room for (of a ring, its slots), and for ragged queries
/// `batch` is their rows and `seq` the most that one of them has.
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
    let bytes = |together| Plan::new(kernel, q, k, v_dim, threads, most_chunks(k[SEQ]), together).bytes();
    bytes(false).max(bytes(true))
}

/// So many keys may lie in so many chunks: a ring's need not begin where a chunk does, nor its sinks lie beside them.
fn most_chunks(keys: usize) -> usize {
    keys.div_ceil(CHUNK) + 2
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
    /// `chunks`: those in which any row sees a key; `together`: the heads of a token are neighbours in memory. The bytes grow
    /// with `chunks`.
    fn new(
        kernel: &AttentionFns,
        q: [usize; 4],
        k: [usize; 4],
        dv: usize,
        threads: usize,
        chunks: usize,
        together: bool,
    ) -> Self {
        let workers = threads.clamp(1, MAX_WORKERS);
        let [batch, seq, heads, d] = q;
        let (keys, kv_heads) = (k[SEQ], k[HEADS].max(1));
        let rows = seq.saturating_mul(heads / kv_heads).max(1);
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
        let split = workers > 1 && tiles < jobs && chunks > 1 && all_partials(most_chunks(keys)) <= MAX_PARTIALS;
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
    ///
    /// `rows` says how many rows a KV head has in a row of the batch; of ragged ones, some tiles have none.
    fn tile(&self, index: usize, rows: impl Fn(usize) -> usize, kv_heads: usize, chunks: Chunks) -> Tile {
        let (pair, piece) = (index / self.tiles_per_head, self.tiles_per_head - 1 - index % self.tiles_per_head);
        let groups = kv_heads.div_ceil(self.tile_heads);
        let (batch, kv_head) = (pair / groups, pair % groups * self.tile_heads);
        let rows = rows(batch);
        let first_row = (piece * self.tile_rows).min(rows);
        Tile {
            batch,
            kv_head,
            kv_heads: self.tile_heads.min(kv_heads - kv_head),
            first_row,
            head_rows: self.tile_rows.min(rows - first_row),
            first_chunk: 0,
            end_chunk: self.chunks,
            chunks,
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
    let (q_shape, k_shape) = call.shapes();
    let [batch, seq, heads, d] = q_shape;
    if batch * seq * heads == 0 {
        return Ok(());
    }
    let dv = call.v.shape[DIM];
    let kernel = context.attention(call.k.dtype, call.precision);
    let (chunks, count) = chunks_of(&problem);
    let together = heads_together(&call.k) && heads_together(&call.v);
    let plan = Plan::new(&kernel, q_shape, k_shape, dv, runner.num_threads(), count, together);
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
    let longest = (0..batch).map(|b| problem.length(b)).max().unwrap_or(0) as usize;
    let steps = [batch, heads, seq, longest.min(count * CHUNK), d + dv].into_iter().fold(1, usize::saturating_mul);
    let workers = plan.workers.min(steps / GRAIN).max(1);

    let kv_heads = call.k.shape[HEADS];
    let rows = |b: usize| problem.queries(b) * problem.group;
    let memory = SharedMemory(workspace);
    let scratch = |worker: usize| memory.at(worker * plan.scratch);
    if !plan.split || workers == 1 {
        return for_each_tile(runner, workers, plan.tiles, &|worker, index| {
            let tile = plan.tile(index, rows, kv_heads, chunks);
            if tile.rows() > 0 {
                // SAFETY: the problem is valid and the tile inside it; the scratch is this worker's.
                unsafe { (kernel.tile)(&problem, &tile, scratch(worker)) };
            }
        });
    }
    let partials = |index: usize| memory.at(plan.workers * plan.scratch + index * plan.partials).cast::<f32>();
    for_each_tile(runner, workers, plan.tiles * plan.chunks, &|worker, unit| {
        let (index, chunk) = (unit / plan.chunks, unit % plan.chunks);
        let tile = plan.tile(index, rows, kv_heads, chunks);
        if tile.rows() > 0 {
            let state = partials(index).wrapping_add(chunk * tile.rows() * partial_stride(dv));
            let tile = Tile { first_chunk: chunk, end_chunk: chunk + 1, partials: state, ..tile };
            // SAFETY: as above; every unit writes states of its own.
            unsafe { (kernel.tile)(&problem, &tile, scratch(worker)) };
        }
    })?;
    for_each_tile(runner, workers, plan.tiles, &|worker, index| {
        let tile = Tile { partials: partials(index), ..plan.tile(index, rows, kv_heads, chunks) };
        if tile.rows() > 0 {
            // SAFETY: as above; all states have been written.
            unsafe { (kernel.reduce)(&problem, &tile, scratch(worker)) };
        }
    })
}

/// The chunks in which any query may see a key, and how many they are.
fn chunks_of(problem: &Problem) -> (Chunks, usize) {
    let (mut before, mut first, mut end) = (0, usize::MAX, 0);
    for row in 0..problem.batch {
        let (length, low) = (problem.length(row), problem.left_end(row, 0));
        before = before.max((problem.kept(row).1 as usize).div_ceil(CHUNK));
        if low < length && problem.queries(row) > 0 {
            first = first.min(low as usize / CHUNK);
            end = end.max((length as usize).div_ceil(CHUNK));
        }
    }
    let gap = first.min(end).saturating_sub(before);
    (Chunks { before, gap }, end.max(before) - gap)
}

impl RawAttention<'_> {
    fn shapes(&self) -> ([usize; 4], [usize; 4]) {
        attention_shapes(self.q.shape, self.k, &self.layout, self.query_starts)
    }
}

/// `[batch, seq, heads, dim]` and `[batch, keys, kv_heads, dim]`, whatever the layout: `seq` is the most queries that a row has,
/// `keys` the most keys that it has room for.
pub(crate) fn attention_shapes(
    mut q: [usize; 4],
    k: RawView,
    layout: &Layout,
    query_starts: Option<&[i32]>,
) -> ([usize; 4], [usize; 4]) {
    if let Some(starts) = query_starts {
        q[BATCH] = starts.len().saturating_sub(1);
        q[SEQ] = starts.windows(2).map(|s| s[1].saturating_sub(s[0]).max(0) as usize).max().unwrap_or(0);
    }
    let [.., kv_heads, dim] = k.shape;
    (q, [q[BATCH], layout.most_keys(&k), kv_heads, dim])
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
    let (kv_heads, v_dim) = (k.shape[HEADS], v.shape[DIM]);
    let rows_are_axis_0 =
        matches!(call.layout, Layout::Contiguous | Layout::Ring { .. }) && call.query_starts.is_none();
    if rows_are_axis_0 {
        k.same_axis("k", q, "q", BATCH)?;
    }
    k.same_axis("k", q, "q", DIM)?;
    for axis in [BATCH, SEQ, HEADS] {
        v.same_axis("v", k, "k", axis)?;
        out.same_axis("out", q, "q", axis)?;
    }
    out.same_axis("out", v, "v", DIM)?;
    let layout = call.layout;
    layout.validate("k", k)?;
    if let Some(starts) = call.query_starts {
        // The queries of ragged rows lie as the keys of a ragged cache do.
        Layout::Ragged { starts }.validate("q", q).map_err(|e| e.about("query_starts"))?;
    }
    let [batch, seq, heads, dim] = call.shapes().0;
    if !rows_are_axis_0 {
        let rows = layout.rows(k);
        ensure!(rows == batch, Shape, "k has {rows} rows, but q has batch = {batch}");
    }
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

    ensure!(
        call.lengths.is_some() || !matches!(layout, Layout::Ring { .. } | Layout::Paged { .. }),
        InvalidValue,
        "lengths is absent, but a ring and pages do not say how many keys a row has"
    );
    let lists =
        [("lengths", call.lengths), ("starts", call.starts), ("prefixes", call.prefixes), ("offsets", call.offsets)];
    for (name, list) in lists {
        let Some(list) = list else { continue };
        ensure!(list.len() == batch, Shape, "{name} has {} entries, but q has batch = {batch}", list.len());
        if name == "offsets" {
            continue;
        }
        for (row, &x) in list.iter().enumerate() {
            let room = layout.capacity(k, row);
            ensure!(
                x >= 0 && x as usize <= room,
                OutOfRange,
                "{name}[{row}] is {x}, but k has {} = {room}",
                if room == k.shape[SEQ] { "seq" } else { "room for a row" }
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

    let longest = |list: Option<&[i32]>| list.map(|l| l.iter().copied().max().unwrap_or(0) as usize);
    let keys =
        longest(call.lengths).unwrap_or_else(|| (0..batch).map(|row| layout.capacity(k, row)).max().unwrap_or(0));
    let fits = |name: &str, shape: [usize; 4]| -> Result<()> {
        ensure!(
            shape[..SEQ + 2] == [batch, seq, heads] && shape[DIM] >= keys,
            Shape,
            "{name} has shape {shape:?}, but must have [{batch}, {seq}, {heads}, {keys}] or more keys"
        );
        Ok(())
    };
    if let Some(mask) = &call.mask {
        fits("mask", mask.shape)?;
        mask.extent("mask")?;
        ensure!(!mask.overlaps(out)?, Overlap, "mask and out share memory");
    }
    if let Some(mask) = &call.bit_mask {
        mask.validate()?;
        let first = |row: usize| mask.first_keys.map_or(0, |f| f[row] as i64);
        let n = mask.first_keys.map_or(batch, <[i32]>::len);
        ensure!(n == batch, Shape, "first_keys of bit_mask has {n} entries, but q has batch = {batch}");
        fits("bit_mask", [mask.shape[0], mask.shape[1], mask.shape[2], keys])?;
        for row in 0..batch {
            let (first, length) = (first(row), call.lengths.map_or(layout.capacity(k, row) as i64, |l| l[row] as i64));
            ensure!(first >= 0, OutOfRange, "first_keys[{row}] of bit_mask is {first}, which is negative");
            ensure!(
                first + mask.shape[DIM] as i64 >= length,
                Shape,
                "bit_mask ends at key {} of row {row}, which has {length} keys",
                first + mask.shape[DIM] as i64
            );
        }
        ensure!(!mask.overlaps(out)?, Overlap, "bit_mask and out share memory");
    }
    if let Some(bias) = &call.bias {
        fits("bias", bias.shape)?;
        let extent = bias.validate("bias")?;
        ensure!(!bias.overlaps_within(extent, out, out_extent), Overlap, "bias and out share memory");
    }
    for (name, view, extent) in [("q", q, q_extent), ("k", k, k_extent), ("v", v, v_extent)] {
        ensure!(!view.overlaps_within(extent, out, out_extent), Overlap, "{name} and out share memory");
    }
    if !call.lse.is_null() {
        let rows = view::rows(q.shape);
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
        if let Some(mask) = &call.bit_mask {
            ensure!(!mask.overlaps(&lse)?, Overlap, "bit_mask and lse share memory");
        }
        for (name, view) in
            [("q", Some(q)), ("k", Some(k)), ("v", Some(v)), ("out", Some(out)), ("bias", call.bias.as_ref())]
        {
            ensure!(!view.is_some_and(|view| view.overlaps(&lse)), Overlap, "{name} and lse share memory");
        }
    }
    let problem = Problem {
        q: *q,
        k: *k,
        v: *v,
        out: *out,
        lse: call.lse,
        batch,
        seq,
        q_starts: call.query_starts,
        layout,
        group: heads / kv_heads.max(1),
        scale,
        softcap,
        causal: call.causal,
        window_left: call.window_left,
        window_right: call.window_right,
        lengths: call.lengths,
        prefixes: call.prefixes,
        starts: call.starts,
        offsets: call.offsets,
        mask: call.mask.map(|m| ByteView { data: m.data, strides: m.strides }),
        bit_mask: call.bit_mask.map(|m| BitView {
            data: m.data,
            offset: m.offset,
            strides: m.strides,
            first_keys: m.first_keys,
        }),
        bias: call.bias,
        alibi: call.alibi_slopes,
        sinks: call.sinks,
    };
    for row in 0..batch {
        validate_seen(&problem, row)?;
    }
    Ok(problem)
}

/// Checks that what a row may see is in the cache: not overwritten in a ring, and in pages or rows that exist.
fn validate_seen(problem: &Problem, row: usize) -> Result<()> {
    let (length, retained, kept) = (problem.length(row), problem.retained_from(row), problem.kept(row));
    if let Layout::Ring { sinks } = problem.layout
        && retained > 0
        && problem.queries(row) > 0
    {
        let wanted = match (problem.window_left, problem.queries(row)) {
            (None, 1) => retained,
            (None, _) => problem.starts.map_or(0, |s| s[row] as i64),
            (Some(left), _) => (problem.position(row, 0) - left).max(problem.starts.map_or(0, |s| s[row] as i64)),
        };
        ensure!(
            wanted >= retained,
            Capacity,
            "the first query of row {row} sees keys from {wanted} on, but of its {length} tokens the ring retains those from \
             {retained} on: give a window, or a ring of more slots"
        );
        let prefix = problem.prefixes.map_or(0, |p| p[row] as i64);
        ensure!(
            prefix <= sinks as i64,
            Capacity,
            "prefixes[{row}] is {prefix}, but the ring keeps {sinks} sinks of row {row}"
        );
    }
    if problem.queries(row) > 0 {
        let name = "k";
        problem.layout.validate_row(name, &problem.k, row, kept.0 as usize, kept.1 as usize)?;
        let from = problem.left_end(row, 0).max(0) as usize;
        problem.layout.validate_row(name, &problem.k, row, from, length as usize)?;
    }
    Ok(())
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
            for (together, chunks) in [(false, 5), (true, 5), (true, 1), (true, 0)] {
                let (q, k) = ([batch, seq, group * kv_heads, 64], [batch, 5000, kv_heads, 64]);
                let plan = Plan::new(&kernel, q, k, 64, threads, chunks, together);
                assert!(plan.bytes() <= attention_workspace_size(q, k, 64, threads));
                let rows = seq * group;
                let mut seen = vec![0; batch * kv_heads * rows];
                for index in 0..plan.tiles {
                    let tile = plan.tile(index, |_| rows, kv_heads, Chunks::default());
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
