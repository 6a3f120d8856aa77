//! Masked softmax attention of one tile of query rows over a range of keys.
//!
//! # The road
//! A tile is up to [`MAX_TILE_ROWS`] query rows of one batch row and one KV head: tokens times the query heads of the
//! group, so that K and V are read once for all of them. Its keys are walked in blocks of [`BLOCK`] and chunks of
//! [`CHUNK`], both on a grid that starts at key 0 of the cache, whatever is visible:
//!
//! ```text
//! Q rows -> f32 (once)                      scratch.q     [rows][dp]
//! per block: live bits of every row         RowState      one u64: BLOCK is 64
//!            S = Q K^T                      scratch.s     [rows][BLOCK]
//!            scale, softcap, ALiBi, bias, mask -> P = exp(S - max), in place
//!            O = O * exp(old max - max) + P V   scratch.acc   [rows][dvp]
//! per chunk: (max, sum, O) folded into the row's total, in ascending order   scratch.total [rows][dvp]
//! at the end: O / sum -> out, max + ln sum -> LSE
//! ```
//! A tile may also leave the states of its chunks in the workspace (`partials`); [`reduce`] folds them later in the same
//! order, which is how one row runs on many threads.
//!
//! # Why the bits do not depend on anything but the row
//! Every number of a row is computed by a fixed sequence of operations. A score is always the sum over lanes, by
//! [`Simd::sum4`]'s tree, of partial sums over every LANES-th element; [`dot`] (few rows) takes it directly, [`packed`]
//! (many rows) walks the same tree depth-first over a transposed block. Block and chunk grids are absolute. What a mask
//! hides contributes a weight of exactly 0, and a block or chunk that is wholly hidden leaves a state as it is, so it does
//! not matter whether it is skipped.
//!
//! # Why nothing hidden gets out
//! Keys beyond what some row of the tile may see are not loaded. A hidden score is replaced, not added to. A weight of 0
//! still makes NaN out of a hidden NaN or infinity in V: when a block is hidden in part, its V is looked at first, and in
//! the rare case that it is not finite, each row takes only the keys it sees, by the same operations.
//!
//! # What bounds it
//! Few rows (decode): reading K and V; each vector of K is loaded once for up to four rows. Many rows (prefill): FMA ports;
//! the register tile is [`TILE_ROWS`] rows by [`Simd::TILE_VECTORS`] vectors, which on AVX-512 is 24 FMAs for 4 loads and 6
//! broadcasts. The tree over lanes costs (LANES - 1) additions a LANES-th of the FMAs of a score.

use super::{copy, math};
use crate::dtype::DType;
use crate::kernels::simd::{MAX_LANES, Memory, Outlined, Simd};
use crate::view::RawView;
use half::{bf16, f16};

/// Keys a block: one live bit each in a `u64`.
pub(crate) const BLOCK: usize = 64;
/// Keys a chunk: the unit by which one row is split over threads.
pub(crate) const CHUNK: usize = 1024;
/// Query rows a tile has at most.
pub(crate) const MAX_TILE_ROWS: usize = 128;
/// Query rows of a register tile.
pub(crate) const TILE_ROWS: usize = 6;
/// From how many rows on a transposed copy of the K block pays.
const PACK_ROWS: usize = 12;
/// Floats before the accumulator in a partial state: max and sum, and room to keep the accumulator aligned.
pub(crate) const PARTIAL_HEADER: usize = 16;

/// One attention call: validated, shared by all tiles.
pub(crate) struct Problem<'a> {
    pub q: RawView,
    pub k: RawView,
    pub v: RawView,
    pub out: RawView,
    /// `[batch, seq, heads]`, contiguous; null if not wanted.
    pub lse: *mut f32,
    /// Query heads a KV head.
    pub group: usize,
    pub scale: f32,
    /// 0: none.
    pub softcap: f32,
    pub causal: bool,
    pub window_left: Option<i64>,
    pub window_right: Option<i64>,
    /// Valid keys a batch row; all if absent.
    pub lengths: Option<&'a [i32]>,
    /// First visible key a batch row; 0 if absent.
    pub starts: Option<&'a [i32]>,
    /// Position of query 0 among the keys, a batch row; `length - queries` if absent.
    pub offsets: Option<&'a [i32]>,
    /// `[batch, seq, heads, keys]` bytes; 0 hides.
    pub mask: Option<ByteView>,
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

impl Problem<'_> {
    pub fn length(&self, batch: usize) -> i64 {
        self.lengths.map_or(self.k.shape[1] as i64, |l| l[batch] as i64)
    }

    /// The keys that query `token` of `batch` may see by length, start, causality and window: `low..high`.
    pub fn span(&self, batch: usize, token: usize) -> (i64, i64) {
        let length = self.length(batch);
        let position = self.position(batch, token);
        let mut low = self.starts.map_or(0, |s| s[batch] as i64);
        let mut high = length;
        if self.causal {
            high = high.min(position + 1);
        }
        if let Some(left) = self.window_left {
            low = low.max(position - left);
        }
        if let Some(right) = self.window_right {
            high = high.min(position + right + 1);
        }
        if low < high { (low, high) } else { (0, 0) }
    }

    /// Where query `token` of `batch` stands among the keys.
    pub fn position(&self, batch: usize, token: usize) -> i64 {
        let offset = match self.offsets {
            Some(o) => o[batch] as i64,
            None => self.length(batch) - self.q.shape[1] as i64,
        };
        offset + token as i64
    }
}

/// Which rows and which chunks, and where the result goes.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub batch: usize,
    pub kv_head: usize,
    /// Row r stands for token `r / group` and query head `kv_head * group + r % group`.
    pub first_row: usize,
    pub rows: usize,
    /// Chunks `first_chunk..end_chunk`.
    pub first_chunk: usize,
    pub end_chunk: usize,
    /// If not null: `[chunks][rows]` states of [`partial_stride`] floats are written here instead of to the output.
    pub partials: *mut f32,
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
    max: f32,
    sum: f32,
    total_max: f32,
    total_sum: f32,
    low: i64,
    high: i64,
    live: u64,
    position: i64,
    token: u32,
    head: u32,
}

/// Scratch memory of one worker; see [`Scratch::layout`].
pub(crate) struct Scratch {
    q: *mut f32,
    s: *mut f32,
    acc: *mut f32,
    total: *mut f32,
    /// The K block transposed: `[dp][BLOCK]`.
    kt: *mut f32,
    /// K and V blocks whose elements do not lie together: `[BLOCK][dp]`, `[BLOCK][dvp]`.
    k_block: *mut f32,
    v_block: *mut f32,
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
            kt: floats(dp * BLOCK),
            k_block: floats(BLOCK * dp),
            v_block: floats(BLOCK * dvp),
            rows: floats(rows * (size_of::<RowState>() / size_of::<f32>())).cast(),
        };
        (scratch, used)
    }
}

/// Keys of a block that are loaded, relative to its first key.
#[derive(Clone, Copy)]
struct Span {
    low: usize,
    high: usize,
}

impl Span {
    fn bits(self) -> u64 {
        ones(self.high) & !ones(self.low)
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
/// `p` is validated, `tile` is inside it, and `scratch` is laid out for at least `tile.rows` rows.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, T: Memory>(s: S, p: &Problem, tile: &Tile, scratch: &Scratch) {
    let (d, dv) = (p.q.shape[3], p.v.shape[3]);
    let (dp, dvp) = (padded(d), padded(dv));
    // SAFETY: the scratch has `rows` states; they are plain numbers, written below before they are read.
    let rows = unsafe { std::slice::from_raw_parts_mut(scratch.rows, tile.rows) };
    let chunk_keys = ((tile.first_chunk * CHUNK) as i64, (tile.end_chunk as i64).saturating_mul(CHUNK as i64));
    let (mut low, mut high) = (i64::MAX, 0);
    for (r, row) in rows.iter_mut().enumerate() {
        let flat = tile.first_row + r;
        let (token, head) = (flat / p.group, tile.kv_head * p.group + flat % p.group);
        let span = p.span(tile.batch, token);
        *row = RowState {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            total_max: f32::NEG_INFINITY,
            total_sum: 0.0,
            low: span.0.max(chunk_keys.0),
            high: span.1.min(chunk_keys.1),
            live: 0,
            position: p.position(tile.batch, token),
            token: token as u32,
            head: head as u32,
        };
        if row.low < row.high {
            low = low.min(row.low);
            high = high.max(row.high);
        } else {
            (row.low, row.high) = (0, 0);
        }
        // SAFETY: token and head are inside q; the scratch row has dp floats.
        unsafe {
            let q = scratch.q.add(r * dp);
            load_row(s, p.q.dtype, p.q.row(tile.batch, token, head), p.q.strides[3], q, d);
            (d..dp).for_each(|i| *q.add(i) = 0.0);
        }
    }
    let (low, high) = if low < high { (low as usize, high as usize) } else { (0, 0) };
    // Scores outside a block's span are never used, but they are read: let them be numbers.
    // SAFETY: s has BLOCK floats a row.
    unsafe { std::ptr::write_bytes(scratch.s, 0, tile.rows * BLOCK) };

    for chunk in tile.first_chunk..tile.end_chunk {
        let (from, to) = ((chunk * CHUNK).max(low), ((chunk + 1) * CHUNK).min(high));
        for row in rows.iter_mut() {
            (row.max, row.sum) = (f32::NEG_INFINITY, 0.0);
        }
        if from < to {
            // SAFETY: acc has rows * dvp floats.
            unsafe { std::ptr::write_bytes(scratch.acc, 0, tile.rows * dvp) };
            for block in from / BLOCK..to.div_ceil(BLOCK) {
                let span =
                    Span { low: from.saturating_sub(block * BLOCK).min(BLOCK), high: (to - block * BLOCK).min(BLOCK) };
                // SAFETY: keys from..to are visible to some row, so inside the views.
                unsafe { one_block::<S, T>(s, p, tile, scratch, rows, block, span) };
            }
        }
        // SAFETY: the partials hold a state for every chunk and row of the tile; total and acc hold dvp floats a row.
        unsafe {
            if tile.partials.is_null() {
                if from < to {
                    for (r, row) in rows.iter_mut().enumerate() {
                        let mut total = (row.total_max, row.total_sum);
                        let (acc, sum) = (scratch.acc.add(r * dvp), scratch.total.add(r * dvp));
                        fold(s, &mut total, sum, (row.max, row.sum), acc, dvp);
                        (row.total_max, row.total_sum) = total;
                    }
                }
            } else {
                for (r, row) in rows.iter().enumerate() {
                    let state = tile.partials.add(((chunk - tile.first_chunk) * tile.rows + r) * partial_stride(dv));
                    *state = row.max;
                    *state.add(1) = row.sum;
                    if !is_empty((row.max, row.sum)) {
                        std::ptr::copy_nonoverlapping(scratch.acc.add(r * dvp), state.add(PARTIAL_HEADER), dvp);
                    }
                }
            }
        }
    }
    if tile.partials.is_null() {
        for (r, row) in rows.iter().enumerate() {
            // SAFETY: total has dvp floats a row.
            unsafe {
                let total = scratch.total.add(r * dvp);
                finish(s, p, tile.batch, row.token as usize, row.head as usize, (row.total_max, row.total_sum), total);
            }
        }
    }
}

/// Folds the chunks of a tile that left them in `tile.partials`, and writes the output.
///
/// # Safety
/// As [`tile`]; the partial states of all chunks have been written.
#[inline(always)]
pub(crate) unsafe fn reduce<S: Simd>(s: S, p: &Problem, tile: &Tile, scratch: &Scratch) {
    let dv = p.v.shape[3];
    let dvp = padded(dv);
    for r in 0..tile.rows {
        let flat = tile.first_row + r;
        let (token, head) = (flat / p.group, tile.kv_head * p.group + flat % p.group);
        let mut total = (f32::NEG_INFINITY, 0.0);
        // SAFETY: the caller's; the scratch holds at least one row.
        unsafe {
            for chunk in 0..tile.end_chunk - tile.first_chunk {
                let state = tile.partials.add((chunk * tile.rows + r) * partial_stride(dv));
                fold(s, &mut total, scratch.total, (*state, *state.add(1)), state.add(PARTIAL_HEADER), dvp);
            }
            finish(s, p, tile.batch, token, head, total, scratch.total);
        }
    }
}

/// Whether a state has seen no key: its accumulator is then not looked at.
#[inline(always)]
pub(crate) fn is_empty((max, sum): (f32, f32)) -> bool {
    max == f32::NEG_INFINITY && sum == 0.0
}

/// `total` becomes the union of `total` and a later chunk; the empty state is the neutral element, to the bit.
///
/// # Safety
/// Both accumulators hold `dvp` floats, unless their state is empty; `total_acc` is writable.
#[inline(always)]
unsafe fn fold<S: Simd>(
    s: S,
    total: &mut (f32, f32),
    total_acc: *mut f32,
    chunk: (f32, f32),
    chunk_acc: *const f32,
    dvp: usize,
) {
    if is_empty(chunk) {
        return;
    }
    if is_empty(*total) {
        *total = chunk;
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(chunk_acc, total_acc, dvp) };
        return;
    }
    let max = if chunk.0 > total.0 { chunk.0 } else { total.0 };
    let (old, new) = (math::exp1(s, total.0 - max), math::exp1(s, chunk.0 - max));
    *total = (max, total.1 * old + chunk.1 * new);
    let (old, new) = (s.splat(old), s.splat(new));
    for i in (0..dvp).step_by(S::LANES) {
        // SAFETY: dvp is a multiple of LANES.
        unsafe {
            let scaled = s.mul(s.load_f32(total_acc.add(i)), old);
            s.store_f32(total_acc.add(i), s.fma(s.load_f32(chunk_acc.add(i)), new, scaled));
        }
    }
}

/// Divides by the sum, with the sink in it, and writes output and LSE of one row.
///
/// # Safety
/// The indices are inside the problem; `acc` holds `padded(dv)` floats unless the state is empty.
#[inline(always)]
unsafe fn finish<S: Simd>(
    s: S,
    p: &Problem,
    batch: usize,
    token: usize,
    head: usize,
    state: (f32, f32),
    acc: *mut f32,
) {
    let dv = p.v.shape[3];
    let (mut max, mut sum) = state;
    let mut factor = 1.0;
    if let Some(sinks) = p.sinks {
        let sink = sinks[head];
        let joint = if sink > max { sink } else { max };
        if joint > f32::NEG_INFINITY {
            factor = math::exp1(s, max - joint);
            sum = sum * factor + math::exp1(s, sink - joint);
            max = joint;
        }
    }
    // SAFETY: the caller's.
    unsafe {
        if !p.lse.is_null() {
            let index = (batch * p.q.shape[1] + token) * p.q.shape[2] + head;
            *p.lse.add(index) = if is_empty((max, sum)) { max } else { (max as f64 + (sum as f64).ln()) as f32 };
        }
        if is_empty(state) {
            std::ptr::write_bytes(acc, 0, padded(dv));
        } else {
            let (factor, sum) = (s.splat(factor), s.splat(sum));
            for i in (0..padded(dv)).step_by(S::LANES) {
                let x = s.div(s.mul(s.load_f32(acc.add(i)), factor), sum);
                // Skipping a hidden key and adding 0 times a value may differ in the sign of a zero; adding +0 ends that.
                s.store_f32(acc.add(i), s.add(x, s.zero()));
            }
        }
        store_row(s, acc, p.out.dtype, p.out.row(batch, token, head), p.out.strides[3], dv);
    }
}

/// One block of keys for all rows of the tile.
///
/// # Safety
/// As [`tile`]; the keys `span` of block `block` are inside the views.
#[inline(always)]
unsafe fn one_block<S: Simd, T: Memory>(
    s: S,
    p: &Problem,
    tile: &Tile,
    scratch: &Scratch,
    rows: &mut [RowState],
    block: usize,
    span: Span,
) {
    let base = block * BLOCK;
    let full = span.bits();
    let (mut any, mut all) = (false, p.bias.is_none());
    for row in rows.iter_mut() {
        let from = (row.low - base as i64).clamp(0, BLOCK as i64) as usize;
        let to = (row.high - base as i64).clamp(0, BLOCK as i64) as usize;
        row.live = ones(to) & !ones(from);
        if row.live != 0
            && let Some(mask) = &p.mask
        {
            // SAFETY: the row's keys from..to are inside the mask.
            row.live &= unsafe { mask_bits(mask, tile.batch, (row.token, row.head), base, from, to) };
        }
        any |= row.live != 0;
        all &= row.live == full;
    }
    if !any {
        return;
    }

    let (d, dv) = (p.q.shape[3], p.v.shape[3]);
    let (dp, dvp) = (padded(d), padded(dv));
    // SAFETY: the block's keys are inside k and v, the scratch parts have the sizes their layout gives.
    unsafe {
        let k = p.k.row(tile.batch, base + span.low, tile.kv_head);
        if p.k.strides[3] == 1 || d == 1 {
            scores::<S, T>(s, scratch, rows.len(), d, k.cast(), p.k.strides[1] as isize, span);
        } else {
            for j in 0..span.high - span.low {
                let src = p.k.row(tile.batch, base + span.low + j, tile.kv_head);
                load_row(s, T::DTYPE, src, p.k.strides[3], scratch.k_block.add(j * dp), d);
            }
            scores::<S, f32>(s, scratch, rows.len(), d, scratch.k_block, dp as isize, span);
        }
        for (r, row) in rows.iter_mut().enumerate() {
            let (x, acc) = (scratch.s.add(r * BLOCK), scratch.acc.add(r * dvp));
            s.outline(Softmax { p, tile, row, x, base, span, acc, dvp });
        }
        let v = p.v.row(tile.batch, base + span.low, tile.kv_head);
        if p.v.strides[3] == 1 || dv == 1 {
            values::<S, T>(s, scratch, rows, dv, v.cast(), p.v.strides[1] as isize, span, all);
        } else {
            for j in 0..span.high - span.low {
                let src = p.v.row(tile.batch, base + span.low + j, tile.kv_head);
                load_row(s, T::DTYPE, src, p.v.strides[3], scratch.v_block.add(j * dvp), dv);
            }
            values::<S, f32>(s, scratch, rows, dv, scratch.v_block, dvp as isize, span, all);
        }
    }
}

/// Bit j of the result: whether the mask shows key `base + j`, for j in `from..to`.
///
/// # Safety
/// Those entries of the mask are readable.
#[inline(always)]
pub(crate) unsafe fn mask_bits(
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

/// Scores of all rows with the keys of a span: from Q to `scratch.s`.
///
/// # Safety
/// `k` points at the span's first key; keys lie `k_stride` elements apart, their `d` elements together.
#[inline(always)]
unsafe fn scores<S: Simd, T: Memory>(
    s: S,
    scratch: &Scratch,
    rows: usize,
    d: usize,
    k: *const T,
    k_stride: isize,
    span: Span,
) {
    let dp = padded(d);
    if rows >= PACK_ROWS {
        // SAFETY: the caller's.
        unsafe { s.outline(Pack { kt: scratch.kt, d, k, k_stride, span }) };
    }
    let mut r = 0;
    while r < rows {
        let (q, out) = (scratch.q.wrapping_add(r * dp), scratch.s.wrapping_add(r * BLOCK));
        // SAFETY: the caller's; r + rows of the piece <= rows.
        r += unsafe {
            match rows - r {
                left if rows >= PACK_ROWS => {
                    let kt = scratch.kt;
                    match rows_at_once(left) {
                        6 => outlined(s, 6, Packed::<6> { q, d, kt, out }),
                        4 => outlined(s, 4, Packed::<4> { q, d, kt, out }),
                        2 => outlined(s, 2, Packed::<2> { q, d, kt, out }),
                        _ => outlined(s, 1, Packed::<1> { q, d, kt, out }),
                    }
                }
                // Sixteen accumulators fit where there are 32 registers.
                4.. if S::LANES != 8 => outlined(s, 4, Dot::<T, 4> { q, d, k, k_stride, span, out }),
                2.. => outlined(s, 2, Dot::<T, 2> { q, d, k, k_stride, span, out }),
                _ => outlined(s, 1, Dot::<T, 1> { q, d, k, k_stride, span, out }),
            }
        };
    }
}

/// Runs a piece that does `rows` rows, and says so.
///
/// # Safety
/// As [`Simd::outline`].
#[inline(always)]
unsafe fn outlined<S: Simd>(s: S, rows: usize, body: impl Outlined) -> usize {
    // SAFETY: the caller's.
    unsafe { s.outline(body) };
    rows
}

/// Rows of the next register tile when `left` are to do: few, nearly equal tiles.
#[inline(always)]
fn rows_at_once(left: usize) -> usize {
    match left {
        8 => 4,
        TILE_ROWS.. => TILE_ROWS,
        4..TILE_ROWS => 4,
        2..4 => 2,
        _ => 1,
    }
}

/// `R` rows of Q times the keys of a span, four keys at a time: vectors run along the head dimension. As [`scores`]; `q`
/// has `R` rows of `padded(d)`, `out` has `R` rows of [`BLOCK`].
struct Dot<T, const R: usize> {
    q: *const f32,
    d: usize,
    k: *const T,
    k_stride: isize,
    span: Span,
    out: *mut f32,
}

impl<T: Memory, const R: usize> Outlined for Dot<T, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { q, d, k, k_stride, span, out } = self;
        let dp = padded(d);
        let whole = d - d % S::LANES;
        let mut j = span.low;
        while j < span.high {
            let keys = (span.high - j).min(4);
            // Past the end the last key is computed again; its score is not stored.
            let key: [*const T; 4] = [0, 1, 2, 3].map(|i: usize| {
                let index = (j - span.low + i.min(keys - 1)) as isize;
                k.wrapping_offset(index * k_stride)
            });
            let mut acc = [[s.zero(); 4]; R];
            let mut i = 0;
            // SAFETY: the caller's; partial loads read what is left of a key and the zero padding of Q.
            unsafe {
                while i < whole {
                    let kv = [
                        T::load(s, key[0].add(i)),
                        T::load(s, key[1].add(i)),
                        T::load(s, key[2].add(i)),
                        T::load(s, key[3].add(i)),
                    ];
                    for r in 0..R {
                        let qv = s.load_f32(q.add(r * dp + i));
                        for c in 0..4 {
                            acc[r][c] = s.fma(qv, kv[c], acc[r][c]);
                        }
                    }
                    i += S::LANES;
                }
                if i < d {
                    for c in 0..4 {
                        let kv = T::load_part(s, key[c].add(i), d - i);
                        for r in 0..R {
                            acc[r][c] = s.fma(s.load_f32(q.add(r * dp + i)), kv, acc[r][c]);
                        }
                    }
                }
                for r in 0..R {
                    let sums = s.sum4(acc[r]);
                    if keys == 4 {
                        out.add(r * BLOCK + j).cast::<[f32; 4]>().write_unaligned(sums);
                    } else {
                        std::ptr::copy_nonoverlapping(sums.as_ptr(), out.add(r * BLOCK + j), keys);
                    }
                }
            }
            j += keys;
        }
    }
}

/// Transposes the keys of a span into `kt`; columns outside of it become 0. As [`scores`]; `kt` has `padded(d)` rows of
/// [`BLOCK`].
struct Pack<T> {
    kt: *mut f32,
    d: usize,
    k: *const T,
    k_stride: isize,
    span: Span,
}

impl<T: Memory> Outlined for Pack<T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { kt, d, k, k_stride, span } = self;
        for group in (0..BLOCK).step_by(S::LANES) {
            for i in (0..d).step_by(S::LANES) {
                let part = (d - i).min(S::LANES);
                let mut v = [s.zero(); MAX_LANES];
                for (lane, row) in v.iter_mut().enumerate().take(S::LANES) {
                    let j = group + lane;
                    if j >= span.low && j < span.high {
                        let key = k.wrapping_offset((j - span.low) as isize * k_stride).wrapping_add(i);
                        // SAFETY: the key is in the span and has `part` elements from i on.
                        *row = unsafe { if part == S::LANES { T::load(s, key) } else { T::load_part(s, key, part) } };
                    }
                }
                s.transpose(&mut v);
                for (lane, column) in v.iter().enumerate().take(part) {
                    // SAFETY: kt has d rows of BLOCK.
                    unsafe { s.store_f32(kt.add((i + lane) * BLOCK + group), *column) };
                }
            }
        }
    }
}

/// `R` rows of Q times a transposed block: vectors run along the keys. `q` has `R` rows of `padded(d)`, `kt` has `d` rows of
/// [`BLOCK`], `out` has `R` rows of [`BLOCK`].
struct Packed<const R: usize> {
    q: *const f32,
    d: usize,
    kt: *const f32,
    out: *mut f32,
}

impl<const R: usize> Outlined for Packed<R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { q, d, kt, out } = self;
        for column in (0..BLOCK).step_by(S::LANES * S::TILE_VECTORS) {
            // SAFETY: the caller's.
            unsafe {
                if S::TILE_VECTORS == 4 {
                    packed_tile::<S, R, 4>(s, q, d, kt.add(column), out.add(column));
                } else {
                    packed_tile::<S, R, 2>(s, q, d, kt.add(column), out.add(column));
                }
            }
        }
    }
}

/// # Safety
/// As [`Packed`].
#[inline(always)]
unsafe fn packed_tile<S: Simd, const R: usize, const N: usize>(
    s: S,
    q: *const f32,
    d: usize,
    kt: *const f32,
    out: *mut f32,
) {
    let dp = padded(d);
    // stash[k]: a finished sum of 2^k lanes that waits for its neighbour.
    let mut stash = [[[s.zero(); N]; R]; 5];
    let mut done = 0;
    for i in 0..S::LANES {
        let mut acc = [[s.zero(); N]; R];
        let mut e = S::lane_order(i);
        while e < d {
            let mut k = [s.zero(); N];
            for n in 0..N {
                // SAFETY: e < d.
                k[n] = unsafe { s.load_f32(kt.add(e * BLOCK + n * S::LANES)) };
            }
            for r in 0..R {
                // SAFETY: e < d <= dp.
                let x = s.splat(unsafe { *q.add(r * dp + e) });
                for n in 0..N {
                    acc[r][n] = s.fma(x, k[n], acc[r][n]);
                }
            }
            e += S::LANES;
        }
        let mut level = 0;
        while (i >> level) & 1 == 1 {
            for r in 0..R {
                for n in 0..N {
                    acc[r][n] = s.add(stash[level][r][n], acc[r][n]);
                }
            }
            level += 1;
        }
        stash[level] = acc;
        done = level;
    }
    for r in 0..R {
        for n in 0..N {
            // SAFETY: out has R rows of BLOCK.
            unsafe { s.store_f32(out.add(r * BLOCK + n * S::LANES), stash[done][r][n]) };
        }
    }
}

/// Scores of one row to weights, in place; updates the row's max and sum and rescales its accumulator. `x` has [`BLOCK`]
/// scores, valid in `span`; `acc` has `dvp` floats.
struct Softmax<'a> {
    p: &'a Problem<'a>,
    tile: &'a Tile,
    row: &'a mut RowState,
    x: *mut f32,
    base: usize,
    span: Span,
    acc: *mut f32,
    dvp: usize,
}

impl Outlined for Softmax<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { p, tile, row, x, base, span, acc, dvp } = self;
        let vectors = span.low / S::LANES * S::LANES..span.high;
        let hidden = s.splat(f32::NEG_INFINITY);
        let mut bias_row = [0.0f32; BLOCK];
        if let Some(bias) = &p.bias {
            // SAFETY: the bias is as wide as K, and the span is inside K.
            unsafe {
                let at = bias.row(tile.batch, row.token as usize, row.head as usize);
                let first = (base + span.low) as isize * bias.strides[3] as isize * bias.dtype.size() as isize;
                let to = bias_row.as_mut_ptr().add(span.low);
                load_row(s, bias.dtype, at.offset(first), bias.strides[3], to, span.high - span.low);
            }
        }
        let mut max = hidden;
        for i in vectors.clone().step_by(S::LANES) {
            // SAFETY: i + LANES <= BLOCK.
            let mut v = s.mul(unsafe { s.load_f32(x.add(i)) }, s.splat(p.scale));
            if p.softcap != 0.0 {
                v = s.mul(math::tanh(s, s.mul(v, s.splat(1.0 / p.softcap))), s.splat(p.softcap));
            }
            if let Some(slopes) = p.alibi {
                let distance = (base + i) as i64 - row.position;
                // SAFETY: the table has MAX_LANES entries.
                let distance = s.add(unsafe { s.load_f32(IOTA.as_ptr()) }, s.splat(distance as f32));
                v = s.fma(s.splat(slopes[row.head as usize]), distance, v);
            }
            if p.bias.is_some() {
                // SAFETY: i + LANES <= BLOCK.
                let b = unsafe { s.load_f32(bias_row.as_ptr().add(i)) };
                v = s.add(v, b);
                row.live &= !(s.lt_bits(b, s.splat(f32::MIN)) << i);
            }
            v = s.select_bits(row.live >> i, v, hidden);
            max = s.max(v, max);
            // SAFETY: i + LANES <= BLOCK.
            unsafe { s.store_f32(x.add(i), v) };
        }
        let block_max = s.max_lane(max);
        if block_max > row.max {
            let factor = math::exp1(s, row.max - block_max);
            row.sum *= factor;
            // A state that has seen nothing has a zero accumulator: nothing to scale.
            if row.max > f32::NEG_INFINITY {
                let factor = s.splat(factor);
                for i in (0..dvp).step_by(S::LANES) {
                    // SAFETY: dvp is a multiple of LANES.
                    unsafe { s.store_f32(acc.add(i), s.mul(s.load_f32(acc.add(i)), factor)) };
                }
            }
            row.max = block_max;
        }
        // With nothing but -inf so far, -inf - -inf must not become NaN; a live NaN stays one.
        let max = s.splat(if row.max == f32::NEG_INFINITY { 0.0 } else { row.max });
        let mut sum = s.zero();
        for i in vectors.step_by(S::LANES) {
            // SAFETY: i + LANES <= BLOCK.
            unsafe {
                let w = math::exp(s, s.sub(s.load_f32(x.add(i)), max));
                s.store_f32(x.add(i), w);
                sum = s.add(sum, w);
            }
        }
        row.sum += s.sum4([sum, s.zero(), s.zero(), s.zero()])[0];
    }
}

/// 0, 1, 2, ...: distances of the lanes.
static IOTA: [f32; MAX_LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// Adds the weighted values of a span to every row's accumulator. `all`: no row has a hidden key in the span.
///
/// # Safety
/// `v` points at the span's first value row; rows lie `v_stride` elements apart, their `dv` elements together.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn values<S: Simd, T: Memory>(
    s: S,
    scratch: &Scratch,
    rows: &[RowState],
    dv: usize,
    v: *const T,
    v_stride: isize,
    span: Span,
    all: bool,
) {
    let dvp = padded(dv);
    let keys = span.high - span.low;
    // SAFETY: the caller's.
    unsafe {
        if !all && !finite::<S, T>(s, v, v_stride, keys, dv) {
            for (r, row) in rows.iter().enumerate() {
                for j in span.low..span.high {
                    if row.live >> j & 1 == 1 {
                        let value = v.wrapping_offset((j - span.low) as isize * v_stride);
                        let weight = scratch.s.add(r * BLOCK + j);
                        let acc = scratch.acc.add(r * dvp);
                        s.outline(Accumulate::<T, 1> { weights: weight, acc, v: value, v_stride, keys: 1, dv });
                    }
                }
            }
            return;
        }
        let mut r = 0;
        while r < rows.len() {
            let (weights, acc) = (scratch.s.add(r * BLOCK + span.low), scratch.acc.add(r * dvp));
            r += match rows_at_once(rows.len() - r) {
                6 => outlined(s, 6, Accumulate::<T, 6> { weights, acc, v, v_stride, keys, dv }),
                4 => outlined(s, 4, Accumulate::<T, 4> { weights, acc, v, v_stride, keys, dv }),
                2 => outlined(s, 2, Accumulate::<T, 2> { weights, acc, v, v_stride, keys, dv }),
                _ => outlined(s, 1, Accumulate::<T, 1> { weights, acc, v, v_stride, keys, dv }),
            };
        }
    }
}

/// Whether `keys` value rows hold no NaN and no infinity.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn finite<S: Simd, T: Memory>(s: S, v: *const T, v_stride: isize, keys: usize, dv: usize) -> bool {
    for j in 0..keys as isize {
        let row = v.wrapping_offset(j * v_stride);
        let mut i = 0;
        while i < dv {
            let part = (dv - i).min(S::LANES);
            // SAFETY: `part` elements are left.
            let x =
                unsafe { if part == S::LANES { T::load(s, row.add(i)) } else { T::load_part(s, row.add(i), part) } };
            if !s.all_finite(x) {
                return false;
            }
            i += part;
        }
    }
    true
}

/// `acc[r] += sum over keys of weights[r][j] * v[j]`, one key after the other. As [`values`]; `weights` has `R` rows of
/// [`BLOCK`], `acc` has `R` rows of `padded(dv)`.
struct Accumulate<T, const R: usize> {
    weights: *const f32,
    acc: *mut f32,
    v: *const T,
    v_stride: isize,
    keys: usize,
    dv: usize,
}

impl<T: Memory, const R: usize> Outlined for Accumulate<T, R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { weights, acc, v, v_stride, keys, dv } = self;
        let dvp = padded(dv);
        let mut i = 0;
        // SAFETY: the caller's; i never passes dv.
        unsafe {
            while S::TILE_VECTORS == 4 && i + 4 * S::LANES <= dv {
                accumulate_tile::<S, T, R, 4>(s, weights, acc.add(i), dvp, v.add(i), v_stride, keys, S::LANES);
                i += 4 * S::LANES;
            }
            while i + 2 * S::LANES <= dv {
                accumulate_tile::<S, T, R, 2>(s, weights, acc.add(i), dvp, v.add(i), v_stride, keys, S::LANES);
                i += 2 * S::LANES;
            }
            while i < dv {
                let part = (dv - i).min(S::LANES);
                accumulate_tile::<S, T, R, 1>(s, weights, acc.add(i), dvp, v.add(i), v_stride, keys, part);
                i += part;
            }
        }
    }
}

/// # Safety
/// As [`Accumulate`]; `N` vectors, or one of `part` elements, are left.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn accumulate_tile<S: Simd, T: Memory, const R: usize, const N: usize>(
    s: S,
    weights: *const f32,
    acc: *mut f32,
    dvp: usize,
    v: *const T,
    v_stride: isize,
    keys: usize,
    part: usize,
) {
    let mut sums = [[s.zero(); N]; R];
    // SAFETY: the caller's; accumulator rows are padded to whole vectors.
    unsafe {
        for r in 0..R {
            for n in 0..N {
                sums[r][n] = s.load_f32(acc.add(r * dvp + n * S::LANES));
            }
        }
        for j in 0..keys {
            let row = v.wrapping_offset(j as isize * v_stride);
            let mut x = [s.zero(); N];
            for n in 0..N {
                x[n] = if N > 1 || part == S::LANES {
                    T::load(s, row.add(n * S::LANES))
                } else {
                    T::load_part(s, row, part)
                };
            }
            for r in 0..R {
                let w = s.splat(*weights.add(r * BLOCK + j));
                for n in 0..N {
                    sums[r][n] = s.fma(w, x[n], sums[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                s.store_f32(acc.add(r * dvp + n * S::LANES), sums[r][n]);
            }
        }
    }
}

/// `n` elements of a type known at run time to f32.
///
/// # Safety
/// `n` elements with that stride are readable at `src`, `n` floats writable at `dst`.
#[inline(always)]
pub(crate) unsafe fn load_row<S: Simd>(s: S, dtype: DType, src: *const u8, stride: i64, dst: *mut f32, n: usize) {
    // SAFETY: the caller's.
    unsafe { s.outline(LoadRow { dtype, src, stride: stride as isize, dst, n }) };
}

/// The arguments of [`load_row`].
struct LoadRow {
    dtype: DType,
    src: *const u8,
    stride: isize,
    dst: *mut f32,
    n: usize,
}

impl Outlined for LoadRow {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { dtype, src, stride, dst, n } = self;
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                DType::F32 => load_typed::<S, f32>(s, src.cast(), stride, dst, n),
                DType::F16 => load_typed::<S, f16>(s, src.cast(), stride, dst, n),
                DType::Bf16 => load_typed::<S, bf16>(s, src.cast(), stride, dst, n),
            }
        }
    }
}

/// # Safety
/// As [`load_row`].
#[inline(always)]
unsafe fn load_typed<S: Simd, T: Memory>(s: S, src: *const T, stride: isize, dst: *mut f32, n: usize) {
    // SAFETY: the caller's.
    unsafe {
        if stride == 1 {
            copy::run::<S, T, f32>(s, src, dst, n);
        } else {
            for i in 0..n {
                *dst.add(i) = (*src.wrapping_offset(i as isize * stride)).to_f32();
            }
        }
    }
}

/// `n` floats to a type known at run time.
///
/// # Safety
/// `n` floats are readable at `src`, `n` elements with that stride writable at `dst`.
#[inline(always)]
pub(crate) unsafe fn store_row<S: Simd>(s: S, src: *const f32, dtype: DType, dst: *mut u8, stride: i64, n: usize) {
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            DType::F32 => store_typed::<S, f32>(s, src, dst.cast(), stride as isize, n),
            DType::F16 => store_typed::<S, f16>(s, src, dst.cast(), stride as isize, n),
            DType::Bf16 => store_typed::<S, bf16>(s, src, dst.cast(), stride as isize, n),
        }
    }
}

/// # Safety
/// As [`store_row`].
#[inline(always)]
unsafe fn store_typed<S: Simd, T: Memory>(s: S, src: *const f32, dst: *mut T, stride: isize, n: usize) {
    let mut done = 0;
    // SAFETY: the caller's.
    unsafe {
        if stride == 1 {
            copy::run::<S, f32, T>(s, src, dst, n);
            return;
        }
        let mut buffer = [T::default(); copy::STAGE];
        while done < n {
            let len = (n - done).min(copy::STAGE);
            copy::run::<S, f32, T>(s, src.add(done), buffer.as_mut_ptr(), len);
            copy::scatter(buffer.as_ptr(), dst.wrapping_offset(done as isize * stride), stride, len);
            done += len;
        }
    }
}
