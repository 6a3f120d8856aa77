//! Masked softmax attention of one tile of query rows over a range of keys.
//!
//! | file | what |
//! | --- | --- |
//! | this one | the problem, the tile, the walk over chunks and blocks |
//! | `keys` | where the keys of a block lie, whatever the cache's layout |
//! | `pairs` | values packed in pairs of slots, made into rows |
//! | `spans` | which rows there are, and which keys their queries may see by position |
//! | `few` | scores and values of few rows (decode): straight from the cache |
//! | `many` | scores and values of many rows (prefill): from packed copies of a block |
//! | `softmax` | scores to weights |
//! | `state` | folding, finishing, and moving rows between their own type and f32 |
//!
//! # The road
//! A tile is query rows of one batch row and of one or several KV heads: tokens times the query heads of the group, so that K
//! and V are read once for all of them. Several KV heads go together where the heads of a token are neighbours in memory and
//! the rows are few, so that memory is read in its own order. Keys are walked in blocks of [`BLOCK`] and chunks of [`CHUNK`],
//! both on a grid that starts at key 0 of the cache, whatever is visible:
//!
//! ```text
//! Q rows -> f32 (once)                      scratch.q     [rows][dp]
//! per block: live bits of every row         RowState      one u64: BLOCK is 64
//!            S = Q K^T                      scratch.s     [rows][BLOCK]
//!            P = 2^(S - max), 0 where hidden, in place
//!            O = O * 2^(old max - max) + P V    scratch.acc   [rows][dvp]
//! per chunk: (max, sum, O) folded into the row's total, in ascending order   scratch.total [rows][dvp]
//! at the end: O / sum -> out, max + ln sum -> LSE
//! ```
//! A tile may also leave the states of its chunks in the workspace (`partials`); [`reduce`] folds them later in the same
//! order, which is how one row runs on many threads.
//!
//! # Why the bits do not depend on anything but the row
//! Every number of a row is computed by a fixed sequence of operations. A score is always the sum over lanes, by
//! [`Simd::sum_lanes`]'s tree, of partial sums over every LANES-th element (of the order in which [`Memory::load_pair`] gives
//! them); `few` takes it directly, `many` walks the same tree depth-first over a transposed block. Values are added one key
//! after the other. Block and chunk grids are absolute. What a mask hides contributes a weight of exactly 0, and a block or
//! chunk that is wholly hidden leaves a state as it is, so it does not matter whether it is skipped.
//!
//! # Why nothing hidden gets out
//! Keys beyond what some row of the tile may see are not loaded (a prefetch may touch them: it cannot fault and moves no
//! value). A hidden weight is replaced by 0, not multiplied. A weight of 0 still makes NaN out of a hidden NaN or infinity
//! in V: when a block is hidden in part, its V is looked at first, and in the rare case that it is not finite, each row takes
//! only the keys it sees, by the same operations.

mod few;
mod keys;
mod many;
mod pairs;
mod softmax;
mod spans;
pub(crate) mod state;

use crate::kernels::simd::{MAX_LANES, Memory, Simd, lines};
use crate::layout::{Packing, Place};
use crate::view::RawView;
use std::mem::MaybeUninit;
use std::ops::Range;

pub(crate) use keys::{Gathered, Located, Rows, Wanted, locate};
#[cfg(target_arch = "x86_64")]
pub(crate) use pairs::are_pairs;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use pairs::part;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use softmax::Softmax;
pub(crate) use spans::{Chunks, Spans, Summary};
pub(crate) use state::reduce;
use state::{EMPTY, Output, load_query};

/// Keys a block: one live bit each in a `u64`.
pub(crate) const BLOCK: usize = 64;
/// Keys a chunk: the unit by which one row is split over threads.
pub(crate) const CHUNK: usize = 1024;
/// Query rows a tile has at most: a multiple of every register tile's rows.
pub(crate) const MAX_TILE_ROWS: usize = 480;
/// From how many rows of a KV head on packed copies of K and V pay.
pub(crate) const PACK_ROWS: usize = 12;
/// Query rows of a register tile.
pub(crate) const TILE_ROWS: usize = 6;
/// Floats before the accumulator in a partial state: max and sum, and room to keep the accumulator aligned.
pub(crate) const PARTIAL_HEADER: usize = 16;
/// Keys of which `few` does the scores, or adds the values, before it goes on to the next KV head.
const PIECE: usize = 16;

/// One attention call: validated, shared by all tiles.
pub(crate) struct Problem<'a> {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    /// Elements of a value, and how those of two slots lie in `v`.
    pub v_dim: usize,
    pub v_packing: Packing,
    pub out: RawView,
    /// `[batch, seq, heads]`, contiguous; null if not wanted.
    pub lse: *mut f32,
    /// Which rows there are, and which keys their queries may see.
    pub spans: Spans<'a>,
    /// Query heads a KV head.
    pub group: usize,
    pub scale: f32,
    /// 0: none.
    pub softcap: f32,
    /// `[batch, seq, heads, keys]` bytes; 0 hides.
    pub mask: Option<ByteView>,
    pub bit_mask: Option<BitView<'a>>,
    /// `[batch, seq, heads, keys]`.
    pub bias: Option<RawView>,
    /// A slope a query head.
    pub alibi: Option<&'a [f32]>,
    /// A logit a query head.
    pub sinks: Option<&'a [f32]>,
}

// SAFETY: the pointers are of validated views; tiles write disjoint rows of the outputs and only read the inputs.
unsafe impl Sync for Problem<'_> {}

/// A boolean mask: strides in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByteView {
    pub data: *const u8,
    pub strides: [i64; 4],
}

/// One bit a query and key: strides in bits, of batch, queries and heads; keys are neighbours, and the lowest bit of a byte is
/// the first. It says nothing of keys before its first one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitView<'a> {
    pub data: *const u8,
    /// The bit of entry `[0, 0, 0, 0]`.
    pub offset: i64,
    pub strides: [i64; 3],
    /// The key of a row's first bit, a batch row; 0 if absent.
    pub first_keys: Option<&'a [i32]>,
    /// Instead of the offset and the first two strides.
    pub rows: Option<BitRows<'a>>,
}

/// Where the bits of every batch row lie, if they do not lie at fixed strides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitRows<'a> {
    /// The bit of a row's query 0, head 0 and first key.
    pub starts: &'a [i64],
    /// Bits from a query of a row to the next.
    pub query_strides: &'a [i64],
}

impl Problem<'_> {
    /// A key of a batch row.
    ///
    /// # Safety
    /// It is inside the cache.
    #[cfg(target_arch = "x86_64")]
    pub unsafe fn key(&self, batch: usize, position: usize, kv_head: usize) -> *const u8 {
        let (row, slot) = self.spans.place(batch, position).0;
        // SAFETY: the caller's.
        unsafe { self.k.row(row, slot, kv_head) }
    }

    /// The value at a place.
    ///
    /// # Safety
    /// It is inside the cache.
    #[inline(always)]
    unsafe fn value_at(&self, (row, slot): Place, kv_head: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe {
            match self.v_packing {
                Packing::Rows => self.v.row(row, slot, kv_head),
                Packing::RowPairs => {
                    let half = (slot % 2) as isize * self.v.strides[3] as isize * self.v.dtype.size() as isize;
                    self.v.row(row, slot / 2, kv_head).offset(half)
                }
            }
        }
    }

    /// From one element of a value to the next.
    #[inline(always)]
    pub fn value_step(&self) -> isize {
        self.v.strides[3] as isize * if self.v_packing == Packing::RowPairs { 2 } else { 1 }
    }

    /// A value of a batch row.
    ///
    /// # Safety
    /// It is inside the cache.
    #[cfg(target_arch = "x86_64")]
    pub unsafe fn value(&self, batch: usize, position: usize, kv_head: usize) -> *const u8 {
        let place = self.spans.place(batch, position).0;
        // SAFETY: the caller's.
        unsafe { self.value_at(place, kv_head) }
    }

    /// Where the LSE of a query and head goes.
    pub fn lse(&self, batch: usize, token: usize, head: usize) -> *mut f32 {
        let (row, token) = self.spans.query(batch, token);
        self.lse.wrapping_add((row * self.q.shape[1] + token) * self.q.shape[2] + head)
    }
}

/// Which rows and which chunks, and where the result goes.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub batch: usize,
    /// KV heads `kv_head..kv_head + kv_heads`; several only if there are fewer than [`PACK_ROWS`] rows of each.
    pub kv_head: usize,
    pub kv_heads: usize,
    /// Rows `first_row..first_row + head_rows` of every KV head; row r stands for token `r / group` and, of the heads that
    /// share the KV head, number `r % group`.
    pub first_row: usize,
    pub head_rows: usize,
    /// Numbers `first_chunk..end_chunk` of the call's chunks; see [`Chunks`].
    pub first_chunk: usize,
    pub end_chunk: usize,
    pub chunks: Chunks,
    /// If not null: `[chunks][rows]` states of [`partial_stride`] floats are written here instead of to the output.
    pub partials: *mut f32,
}

impl Tile {
    pub fn rows(&self) -> usize {
        self.kv_heads * self.head_rows
    }

    /// Token and query head of every row of the tile, in order.
    pub fn tokens_and_heads(&self, p: &Problem) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Self { kv_head, kv_heads, first_row, head_rows, .. } = *self;
        let group = p.group;
        let first = (first_row / group, first_row % group);
        (kv_head..kv_head + kv_heads).flat_map(move |kv_head| {
            let (mut token, mut number) = first;
            (0..head_rows).map(move |_| {
                let row = (token, kv_head * group + number);
                number += 1;
                if number == group {
                    (token, number) = (token + 1, 0);
                }
                row
            })
        })
    }
}

/// Floats a row's partial state takes.
pub(crate) const fn partial_stride(dv: usize) -> usize {
    PARTIAL_HEADER + padded(dv)
}

/// `n` rounded up to whole vectors of the widest level.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(MAX_LANES)
}

/// What a row knows of itself while its tile runs.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RowState {
    /// The largest logit of the chunk so far, times log2(e).
    pub max: f32,
    /// Largest logit and sum of the chunks before.
    total: (f32, f32),
    pub token: u32,
    low: i64,
    high: i64,
    pub live: u64,
    position: i64,
    head: u32,
}

/// Scratch memory of one worker; see [`Scratch::layout`].
pub(crate) struct Scratch {
    pub q: *mut f32,
    pub s: *mut f32,
    pub acc: *mut f32,
    pub total: *mut f32,
    /// A row's sum of weights, lane by lane: `[rows][MAX_LANES]`.
    pub sums: *mut f32,
    /// The K block transposed, and the V block in f32, in slabs as wide as a register tile.
    pub kt: *mut f32,
    pub vp: *mut f32,
    /// K and V blocks whose elements do not lie together: `[BLOCK][dp]`, `[BLOCK][dvp]` of their type.
    k_block: *mut u8,
    pub v_block: *mut u8,
    rows: *mut RowState,
}

impl Scratch {
    /// Bytes for tiles of `rows` rows; a multiple of 64.
    pub fn bytes(rows: usize, d: usize, dv: usize) -> usize {
        Self::layout(std::ptr::null_mut(), rows, d, dv).1
    }

    /// Cuts the memory at `base` (64-byte aligned) into its parts and says how much that is.
    pub fn layout(base: *mut u8, rows: usize, d: usize, dv: usize) -> (Self, usize) {
        let (dp, dvp) = (padded(d), padded(dv));
        let mut used = 0;
        let mut floats = |n: usize| {
            let at = base.wrapping_add(used).cast::<f32>();
            used += (n * size_of::<f32>()).next_multiple_of(64);
            at
        };
        let scratch = Self {
            q: floats(rows * dp),
            s: floats(rows * BLOCK),
            acc: floats(rows * dvp),
            total: floats(rows * dvp),
            sums: floats(rows * MAX_LANES),
            kt: floats(dp * BLOCK),
            vp: floats(BLOCK * dvp),
            k_block: floats(BLOCK * dp).cast(),
            v_block: floats(BLOCK * dvp).cast(),
            rows: floats(rows * size_of::<RowState>().div_ceil(size_of::<f32>())).cast(),
        };
        (scratch, used)
    }
}

/// Keys of a block, relative to its first key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub low: usize,
    pub high: usize,
}

impl Span {
    fn bits(self) -> u64 {
        ones(self.high) & !ones(self.low)
    }

    fn len(self) -> usize {
        self.high - self.low
    }

    /// From the first to the last of some live bits.
    pub fn around(bits: u64) -> Self {
        if bits == 0 {
            return Self { low: 0, high: 0 };
        }
        Self { low: bits.trailing_zeros() as usize, high: BLOCK - bits.leading_zeros() as usize }
    }
}

/// The lowest `n <= 64` bits.
#[inline(always)]
pub(crate) fn ones(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// Runs one tile; K and V are of type `T`.
///
/// # Safety
/// `p` is validated, `tile` is inside it, and `scratch` is laid out for at least `tile.rows()` rows.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, T: Memory>(
    s: S,
    p: &Problem,
    tile: &Tile,
    scratch: &Scratch,
    products: &impl Products<S, T>,
) {
    let (d, dv) = (p.q.shape[3], p.v_dim);
    let (dp, dvp) = (padded(d), padded(dv));
    let n = tile.rows();
    // SAFETY: the scratch has `n` states; they are plain numbers, written below before they are read.
    let rows = unsafe { std::slice::from_raw_parts_mut(scratch.rows, n) };
    let kept = p.spans.kept(tile.batch);
    let mut reach = Reach { low: i64::MAX, high: 0, inner_low: 0, inner_high: i64::MAX, kept };
    let far = tile.head_rows >= PACK_ROWS;
    let mut ahead = tile.tokens_and_heads(p).skip(ROWS_AHEAD);
    let mut seen = None;
    for (r, (row, (token, head))) in rows.iter_mut().zip(tile.tokens_and_heads(p)).enumerate() {
        let ((low, high), position) = match seen {
            Some((same, keys)) if same == token => keys,
            _ => (p.spans.span(tile.batch, token), p.spans.position(tile.batch, token)),
        };
        seen = Some((token, ((low, high), position)));
        *row = RowState {
            max: f32::NEG_INFINITY,
            total: EMPTY,
            low,
            high,
            live: 0,
            position,
            token: token as u32,
            head: head as u32,
        };
        if low < high {
            (reach.low, reach.high) = (reach.low.min(low), reach.high.max(high));
        }
        (reach.inner_low, reach.inner_high) = (reach.inner_low.max(low), reach.inner_high.min(high));
        // SAFETY: token and head are inside q; the scratch row has dp floats.
        unsafe {
            if far && let Some((token, head)) = ahead.next() {
                let (batch, token) = p.spans.query(tile.batch, token);
                row_lines(&p.q, p.q.row(batch, token, head)).for_each(|line| s.prefetch(line));
            }
            let (batch, token) = p.spans.query(tile.batch, token);
            load_query::<S, T>(s, p.q, p.q.row(batch, token, head), scratch.q.add(r * dp), d);
        }
    }
    // SAFETY: the rows of Q have just been written.
    unsafe { products.pack_queries(s, tile, scratch, d) };

    let output = |row: &RowState| {
        let (token, head) = (row.token as usize, row.head as usize);
        Output { p, batch: tile.batch, token, head, splits: T::splits::<S>() }
    };
    for chunk in tile.first_chunk..tile.end_chunk {
        let (from, to) = reach.within(tile.chunks.keys(chunk));
        let last = chunk + 1 == tile.end_chunk;
        if from < to {
            rows.iter_mut().for_each(|row| row.max = f32::NEG_INFINITY);
            // SAFETY: acc has dvp and sums has MAX_LANES floats a row.
            unsafe {
                std::ptr::write_bytes(scratch.acc, 0, n * dvp);
                std::ptr::write_bytes(scratch.sums, 0, n * MAX_LANES);
            }
            for block in from / BLOCK..to.div_ceil(BLOCK) {
                let span =
                    Span { low: from.saturating_sub(block * BLOCK).min(BLOCK), high: (to - block * BLOCK).min(BLOCK) };
                // SAFETY: keys from..to are visible to some row, so inside the views.
                unsafe { one_block::<S, T>(s, p, tile, scratch, products, rows, block, span, &reach) };
            }
            // SAFETY: the chunk's blocks are done.
            unsafe { products.end_chunk(s, rows, scratch) };
        }
        let mut sums = [0.0; MAX_LANES];
        for r in 0..n {
            if far
                && last
                && let Some(row) = rows.get(r + ROWS_AHEAD)
            {
                let (batch, token) = p.spans.query(tile.batch, row.token as usize);
                // SAFETY: token and head are inside out.
                let row = unsafe { p.out.row(batch, token, row.head as usize) };
                row_lines(&p.out, row).for_each(|line| s.prefetch_write(line));
            }
            let row = &mut rows[r];
            // SAFETY: the scratch parts have their rows.
            unsafe {
                let state = if from < to {
                    // Of as many rows at a time as there are lanes.
                    if r.is_multiple_of(S::LANES) {
                        let mut lanes = [s.zero(); MAX_LANES];
                        for (row, lanes) in (r..n).zip(lanes.iter_mut().take(S::LANES)) {
                            *lanes = s.load_f32(scratch.sums.add(row * MAX_LANES));
                        }
                        s.store_f32(sums.as_mut_ptr(), s.sum_lanes(&lanes));
                    }
                    (row.max, sums[r % S::LANES])
                } else {
                    EMPTY
                };
                let (acc, total) = (scratch.acc.add(r * dvp), scratch.total.add(r * dvp));
                output(row).end_chunk(s, tile, (chunk, r), (state, acc), (&mut row.total, total));
            }
        }
    }
    if tile.partials.is_null() && tile.first_chunk == tile.end_chunk {
        for (r, row) in rows.iter().enumerate() {
            // SAFETY: as above.
            unsafe { output(row).finish(s, EMPTY, scratch.acc.add(r * dvp)) };
        }
    }
}

/// How many rows ahead of their use rows of Q and of the output are asked for, where there are many: those of a prompt lie in
/// pieces of a few rows, too short for a hardware prefetcher.
const ROWS_AHEAD: usize = 8;

/// The lines of a row, if its elements lie together.
#[inline(always)]
fn row_lines(view: &RawView, row: *const u8) -> impl Iterator<Item = *const u8> + use<> {
    lines(row, if view.strides[3] == 1 { view.shape[3] * view.dtype.size() } else { 0 })
}

/// Which keys any row of a tile sees, and which all of them do (by length, start, causality and window).
pub(crate) struct Reach {
    pub low: i64,
    pub high: i64,
    pub inner_low: i64,
    pub inner_high: i64,
    /// What all rows see besides.
    pub kept: (i64, i64),
}

impl Reach {
    /// From the first to the last key of a chunk that any row sees; nothing if the first is not below the last.
    pub fn within(&self, chunk: Range<usize>) -> (usize, usize) {
        let (mut from, mut to) = (chunk.end, chunk.start);
        for (low, high) in [(self.low, self.high), self.kept] {
            if low < high {
                let (low, high) = ((low as usize).max(chunk.start), (high as usize).min(chunk.end));
                if low < high {
                    (from, to) = (from.min(low), to.max(high));
                }
            }
        }
        (from, to)
    }

    /// Whether any row may see a key.
    #[inline(always)]
    pub fn covers(&self, key: usize) -> bool {
        let key = key as i64;
        self.low <= key && key < self.high || self.kept.0 <= key && key < self.kept.1
    }
}

/// One block of keys for all rows of the tile.
///
/// # Safety
/// As [`tile`]; the keys `span` of block `block` are inside the views.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn one_block<S: Simd, T: Memory>(
    s: S,
    p: &Problem,
    tile: &Tile,
    scratch: &Scratch,
    products: &impl Products<S, T>,
    rows: &mut [RowState],
    block: usize,
    span: Span,
    reach: &Reach,
) {
    let base = block * BLOCK;
    let full = span.bits();
    let inner = reach.inner_low <= (base + span.low) as i64 && (base + span.high) as i64 <= reach.inner_high;
    let mut all = p.bias.is_none();
    let mut any = full;
    if inner && p.mask.is_none() && p.bit_mask.is_none() {
        rows.iter_mut().for_each(|row| row.live = full);
    } else {
        any = 0;
        let kept = between(reach.kept, base);
        for row in rows.iter_mut() {
            row.live = between((row.low, row.high), base) | kept;
            if row.live != 0 {
                // SAFETY: the row's keys are inside the masks.
                row.live &= unsafe { p.shown(tile.batch, (row.token, row.head), base, row.live) };
            }
            any |= row.live;
            all &= row.live == full;
        }
        if any == 0 {
            return;
        }
    }

    let (d, dv) = (p.q.shape[3], p.v_dim);
    let mut pointers = [[const { MaybeUninit::uninit() }; BLOCK]; 2];
    let [keys, values] = &mut pointers;
    let (mut k, mut v) = (Located::<T>::new(keys), Located::<T>::new(values));
    let gathered = Gathered { k: scratch.k_block, v: scratch.v_block };
    // SAFETY: the block's live keys are inside k and v, the scratch parts have the sizes their layout gives.
    unsafe {
        locate(&Wanted { p, tile, base, span, live: any, reach }, &gathered, (&mut k, &mut v));
        products.block(s, &Block { p, tile, scratch, base, span, all, d, dv }, rows, k.rows(), &mut v);
    }
}

/// The bits of a block's keys that lie in `low..high`.
#[inline(always)]
pub(crate) fn between((low, high): (i64, i64), base: usize) -> u64 {
    let inside = |key: i64| (key - base as i64).clamp(0, BLOCK as i64) as usize;
    ones(inside(high)) & !ones(inside(low))
}

/// What [`Products`] need to know of a block.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub p: &'a Problem<'a>,
    pub tile: &'a Tile,
    pub scratch: &'a Scratch,
    /// The block's first key.
    pub base: usize,
    pub span: Span,
    /// No row has a hidden key in the span.
    pub all: bool,
    pub d: usize,
    pub dv: usize,
}

/// The two products of a block, and the softmax between them. Whatever computes them, rows come as f32 in `scratch.q`, and
/// at the end of a chunk a row's weighted values are in `scratch.acc`, and its sum of weights in `scratch.sums`.
pub(crate) trait Products<S: Simd, T: Memory> {
    /// Once a tile: `scratch.q` has its rows.
    ///
    /// # Safety
    /// `scratch` is laid out for the tile's rows.
    unsafe fn pack_queries(&self, s: S, tile: &Tile, scratch: &Scratch, d: usize);

    /// One block of keys for all rows of the tile. The first of a chunk finds `scratch.acc` and `scratch.sums` 0.
    ///
    /// # Safety
    /// `k` and `v` are the rows of the block's span, values as they lie if they are packed.
    unsafe fn block(&self, s: S, block: &Block, rows: &mut [RowState], k: Rows<T>, v: &mut Located<T>);

    /// All blocks of a chunk are done.
    ///
    /// # Safety
    /// `scratch` and `rows` are those of the blocks.
    #[inline(always)]
    unsafe fn end_chunk(&self, _s: S, _rows: &[RowState], _scratch: &Scratch) {}
}

/// [`Products`] by the vector trait: [`few`] or [`many`].
pub(crate) struct Vectors;

impl<S: Simd, T: Memory> Products<S, T> for Vectors {
    #[inline(always)]
    unsafe fn pack_queries(&self, s: S, tile: &Tile, scratch: &Scratch, d: usize) {
        if tile.head_rows >= PACK_ROWS {
            // SAFETY: the caller's.
            unsafe { s.outline(many::PackQueries { q: scratch.q, rows: tile.rows(), d }) };
        }
    }

    #[inline(always)]
    unsafe fn block(&self, s: S, block: &Block, rows: &mut [RowState], k: Rows<T>, v: &mut Located<T>) {
        // SAFETY: the caller's.
        unsafe {
            if block.tile.head_rows >= PACK_ROWS {
                many::block::<S, T>(s, block, rows, k, v.rows());
            } else {
                few::block::<S, T>(s, block, rows, k, v.rows());
            }
        }
    }
}

impl Problem<'_> {
    /// Which of the `live` keys of a block the masks show to a query and head.
    ///
    /// # Safety
    /// The live keys are inside the masks.
    #[inline(always)]
    pub unsafe fn shown(&self, batch: usize, row: (u32, u32), base: usize, live: u64) -> u64 {
        // SAFETY: the caller's.
        unsafe { shown((self.mask.as_ref(), self.bit_mask.as_ref()), batch, row, base, live) }
    }
}

/// Which of the `live` keys of a block masks show to a query and head.
///
/// # Safety
/// The live keys are inside the masks.
#[inline(always)]
pub(crate) unsafe fn shown(
    (mask, bit_mask): (Option<&ByteView>, Option<&BitView>),
    batch: usize,
    row: (u32, u32),
    base: usize,
    live: u64,
) -> u64 {
    let Span { low, high } = Span::around(live);
    let mut bits = live;
    // SAFETY: the caller's.
    unsafe {
        if let Some(mask) = mask {
            bits &= mask_bits(mask, batch, row, base, low, high);
        }
        if let Some(mask) = bit_mask {
            bits &= packed_bits(mask, batch, row, base, low, high);
        }
    }
    bits
}

/// Bit j of the result: whether the mask shows key `base + j`, for j in `from..to`.
///
/// # Safety
/// Those entries of the mask that it has are readable.
#[inline(always)]
unsafe fn packed_bits(
    mask: &BitView,
    batch: usize,
    (token, head): (u32, u32),
    base: usize,
    from: usize,
    to: usize,
) -> u64 {
    let first = mask.first_keys.map_or(0, |k| k[batch] as i64) - base as i64;
    let unmasked = ones(first.clamp(0, BLOCK as i64) as usize);
    let from = first.max(from as i64);
    if from >= to as i64 {
        return u64::MAX;
    }
    let [sb, st, sh] = mask.strides;
    let (start, st) = match mask.rows {
        None => (mask.offset + batch as i64 * sb, st),
        Some(rows) => (rows.starts[batch], rows.query_strides[batch]),
    };
    let bit = start + i64::from(token) * st + i64::from(head) * sh + from - first;
    let (mut byte, shift, n) = (bit.div_euclid(8) as isize, bit.rem_euclid(8) as usize, to - from as usize);
    let mut bits = 0u128;
    for i in 0..(shift + n).div_ceil(8) {
        // SAFETY: the caller's.
        bits |= u128::from(unsafe { *mask.data.offset(byte) }) << (8 * i);
        byte += 1;
    }
    unmasked | ((bits >> shift) as u64) << from
}

/// Bit j of the result: whether the mask shows key `base + j`, for j in `from..to`.
///
/// # Safety
/// Those entries of the mask are readable.
#[inline(always)]
unsafe fn mask_bits(
    mask: &ByteView,
    batch: usize,
    (token, head): (u32, u32),
    base: usize,
    from: usize,
    to: usize,
) -> u64 {
    let [sb, st, sh, sk] = mask.strides.map(|x| x as isize);
    let at = batch as isize * sb + token as isize * st + head as isize * sh + (base + from) as isize * sk;
    // SAFETY: the caller's.
    unsafe {
        let mut p = mask.data.offset(at);
        let mut bits = 0;
        let mut j = from;
        if sk == 1 {
            // Eight bytes at a time: the top bit of each byte that is not 0, gathered by one multiplication.
            while j + 8 <= to {
                let x = p.cast::<u64>().read_unaligned().to_le();
                let set = (((x & 0x7f7f_7f7f_7f7f_7f7f) + 0x7f7f_7f7f_7f7f_7f7f) | x) & 0x8080_8080_8080_8080;
                bits |= ((set >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << j;
                p = p.add(8);
                j += 8;
            }
        }
        while j < to {
            bits |= u64::from(*p != 0) << j;
            p = p.wrapping_offset(sk);
            j += 1;
        }
        bits
    }
}
