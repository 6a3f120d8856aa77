//! The walk of a tile over chunks and blocks.

use super::direct::row_scales;
use super::key_pointers::{BlockRequest, GatherBuffers, KeyPointerTable, locate};
use super::state::{EMPTY, Output, TokenRows, load_query, load_token, loads_separated};
use super::{Block, Products, RowState, Scratch};
use crate::dtype::DType;
use crate::kernels::simd::{MAX_LANES, Outlined, Simd, lines};
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, KeyRange, between, padded};
use crate::problem::tile::{PACK_ROWS, Tile};
use crate::problem::visibility::TileVisibility;
use crate::view::RawView;
use half::{bf16, f16};
use std::mem::MaybeUninit;

/// Whether even and odd elements of every two vectors are kept apart, in queries (`keys`) and in accumulators (`values`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deinterleaved {
    pub keys: bool,
    pub values: bool,
}

/// Runs one tile. `deinterleaved` is the element order of K and V (see [`Load::load_pair`](crate::kernels::simd::Load::load_pair)).
///
/// # Safety
/// `p` is validated, `tile` is inside it, and `scratch` is laid out for at least `tile.rows()` rows.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd>(
    s: S,
    deinterleaved: Deinterleaved,
    p: &Problem,
    tile: &Tile,
    scratch: &Scratch,
    products: &impl Products<S>,
) {
    let n = tile.rows();
    // SAFETY: the scratch has `n` states of plain numbers, which are written below before they are read.
    let rows = unsafe { std::slice::from_raw_parts_mut(scratch.rows, n) };
    let always_visible = p.visibility.always_visible(tile.batch);
    let mut reach = TileVisibility { low: i64::MAX, high: 0, inner_low: 0, inner_high: i64::MAX, always_visible };
    let mut scratch = *scratch;
    let (mut q, mut in_output) = (Some(scratch.q), false);
    if products.reads_queries(p, tile)
        && p.k_hadamard == 0
        && let Some((rows, step)) = rows_in_place::<S>(p, tile, p.q)
    {
        // Nothing writes to them.
        (scratch.q, scratch.q_row, q) = (rows, step, None);
    }
    if products.writes_outputs()
        && tile.partials.is_null()
        && p.v_hadamard == 0
        && let Some((rows, step)) = rows_in_place::<S>(p, tile, p.out)
    {
        (scratch.acc, scratch.acc_row) = (rows, step);
        in_output = true;
    }
    let scratch = &scratch;
    let begin = BeginRows { p, tile, deinterleaved: deinterleaved.keys, rows, q, reach: &mut reach };
    // SAFETY: the rows are inside the problem, and the scratch has room for them; then the rows of Q have been written.
    unsafe {
        s.outline(begin);
        products.pack_queries(s, p, tile, scratch);
    }
    // Without a chunk, outputs of no key are still to be written.
    let end_chunk = if tile.partials.is_null() { tile.end_chunk.max(tile.first_chunk + 1) } else { tile.end_chunk };
    // With the last weights of a chunk, its outputs are known.
    let finishes = in_output && tile.first_chunk + 1 == end_chunk && p.sinks.is_none() && p.lse.is_null();
    for chunk in tile.first_chunk..end_chunk {
        let (from, to) = if chunk < tile.end_chunk { reach.within(tile.chunks.keys(chunk)) } else { (0, 0) };
        let seen = from < to;
        if seen {
            if chunk > tile.first_chunk {
                rows.iter_mut().for_each(|row| (row.max, row.fresh) = (f32::NEG_INFINITY, true));
            }
            // SAFETY: sums has MAX_LANES floats a row.
            unsafe {
                std::ptr::write_bytes(scratch.sums, 0, n * MAX_LANES);
                products.begin_chunk(p, scratch, n);
            }
            for block in from / BLOCK..to.div_ceil(BLOCK) {
                let key_range = KeyRange {
                    low: from.saturating_sub(block * BLOCK).min(BLOCK),
                    high: (to - block * BLOCK).min(BLOCK),
                };
                let finish = finishes && (block + 1) * BLOCK >= to;
                // SAFETY: keys from..to are visible to some query row, hence inside the views.
                unsafe { one_block(s, p, tile, scratch, products, rows, block, key_range, &reach, finish) };
            }
            // SAFETY: the chunk's blocks are done.
            unsafe { products.end_chunk(s, rows, scratch) };
            if finishes && rows[0].finished {
                continue;
            }
        }
        let (last, deinterleaved) = (chunk + 1 == end_chunk, deinterleaved.values);
        // SAFETY: the states and accumulators of the chunk are in place where a key was seen.
        unsafe { s.outline(EndRows { p, tile, deinterleaved, rows, scratch, chunk, seen, last }) };
    }
}

/// The rows of a tile in the queries or the output, and the floats between them, if kernels can take them as they are: floats of one
/// token that lie evenly, in whole vectors.
#[inline(always)]
fn rows_in_place<S: Simd>(p: &Problem, tile: &Tile, view: &RawView) -> Option<(*mut f32, usize)> {
    /// With so few keys, to copy rows costs more than vectors that lie on two lines.
    const FEW_KEYS: i64 = 8;
    let short = const { S::FEW_REGISTERS };
    // Bytes of a vector.
    let align = if short { S::LANES } else { MAX_LANES } * size_of::<f32>();
    let Tile { batch, kv_head, kv_heads, first_row, head_rows, .. } = *tile;
    let group = p.group;
    let (token, in_group) = if first_row == 0 { (0, 0) } else { (first_row / group, first_row % group) };
    let row = view.strides[2];
    // Rows of several KV heads lie evenly if they are whole groups.
    if view.dtype != DType::F32
        || view.strides[3] != 1
        || !view.shape[3].is_multiple_of(MAX_LANES)
        // Far apart, they could meet in few sets of a cache.
        || !(0..=2 * view.shape[3] as i64).contains(&row)
        || !(row as usize).is_multiple_of(MAX_LANES)
        || in_group + head_rows > group
        || kv_heads > 1 && head_rows != group
    {
        return None;
    }
    let few = short && p.visibility.length(batch) <= FEW_KEYS;
    let (batch, token) = p.visibility.query(batch, token);
    // SAFETY: the tile has this token and this head.
    let first = unsafe { view.row(batch, token, kv_head * group + in_group) };
    // Elsewhere, vectors may lie on two lines.
    (few || first.addr().is_multiple_of(align)).then_some((first.cast(), row as usize))
}

/// Converts the query rows of a tile to f32, writes their states, and joins the keys that they see.
struct BeginRows<'a> {
    p: &'a Problem<'a>,
    tile: &'a Tile,
    deinterleaved: bool,
    rows: &'a mut [RowState],
    /// Where rows go, if they are not read in place.
    q: Option<*mut f32>,
    reach: &'a mut TileVisibility,
}

impl Outlined for BeginRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { p, tile, deinterleaved, rows, q, reach } = self;
        let dp = padded(p.q.shape[3]);
        // A call on one key takes fewer instructions if what depends on its token is not looked for at every row, as in the loop below.
        if const { S::FEW_REGISTERS } && is_one_token(p, tile) {
            let (low, high) = p.visibility.visible_keys(tile.batch, 0);
            if low < high {
                (reach.low, reach.high) = (low, high);
            }
            (reach.inner_low, reach.inner_high) = (low, if p.visibility.query_positions.is_some() { 0 } else { high });
            let (batch, token) = p.visibility.query(tile.batch, 0);
            let (mut head, position) = (tile.kv_head * p.group, p.visibility.position(tile.batch, 0));
            let separated = q.is_some() && deinterleaved && loads_separated::<S>(p);
            if separated && let Some(q) = q {
                // SAFETY: token and heads are inside q; the scratch rows have dp floats.
                unsafe { load_token(s, p, p.q.row(batch, token, head), q, rows.len()) };
            }
            for (r, row) in rows.iter_mut().enumerate() {
                *row = RowState { position, ..RowState::new((low, high), (0, head as u32)) };
                if !separated && let Some(q) = q {
                    // SAFETY: token and head are inside q; the scratch row has dp floats.
                    unsafe { load_query(s, deinterleaved, p, p.q.row(batch, token, head), q.add(r * dp)) };
                }
                head += 1;
            }
            return;
        }
        let far = tile.head_rows >= PACK_ROWS;
        let (mut ahead, mut near) = (tile.tokens_and_heads(p).skip(FAR_ROWS), tile.tokens_and_heads(p).skip(NEAR_ROWS));
        let mut seen = usize::MAX;
        let (mut keys, mut position, mut at) = ((0, 0), 0, (0, 0));
        for (r, (row, (token, head))) in rows.iter_mut().zip(tile.tokens_and_heads(p)).enumerate() {
            if token != seen {
                seen = token;
                (keys, position) =
                    (p.visibility.visible_keys(tile.batch, token), p.visibility.position(tile.batch, token));
                at = p.visibility.query(tile.batch, token);
                let (low, high) = keys;
                if low < high {
                    (reach.low, reach.high) = (reach.low.min(low), reach.high.max(high));
                }
                (reach.inner_low, reach.inner_high) = (reach.inner_low.max(low), reach.inner_high.min(high));
            }
            let (low, high) = keys;
            *row = RowState { position, ..RowState::new((low, high), (token as u32, head as u32)) };
            let Some(q) = q else { continue };
            // SAFETY: token and head are inside q; the scratch row has dp floats.
            unsafe {
                if far && let Some((token, head)) = near.next() {
                    let (batch, token) = p.visibility.query(tile.batch, token);
                    row_lines(p.q, p.q.row(batch, token, head)).for_each(|line| s.prefetch(line));
                }
                if far && let Some((token, head)) = ahead.next() {
                    let (batch, token) = p.visibility.query(tile.batch, token);
                    row_lines(p.q, p.q.row(batch, token, head)).for_each(|line| s.prefetch_far(line));
                }
                load_query(s, deinterleaved, p, p.q.row(at.0, at.1, head), q.add(r * dp));
            }
        }
        if p.visibility.query_positions.is_some() {
            // No block is visible as a whole to all rows: each key is to be looked at.
            reach.inner_high = 0;
        }
    }
}

/// Ends a chunk for the rows of a tile, of which one has seen a key of it if `seen`.
struct EndRows<'a> {
    p: &'a Problem<'a>,
    tile: &'a Tile,
    deinterleaved: bool,
    rows: &'a mut [RowState],
    scratch: &'a Scratch,
    chunk: usize,
    seen: bool,
    /// It is the tile's last chunk.
    last: bool,
}

impl Outlined for EndRows<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { p, tile, deinterleaved, rows, scratch, chunk, seen, last } = self;
        let dvp = padded(p.v_dim);
        let acc_row = scratch.acc_row;
        // Rows of one token are finished together, with a division per vector of rows and one look at the type of the output: the loop
        // below takes several times as many instructions, a tenth of a call on one key and more.
        // SAFETY: the caller's; the first chunk leaves the totals free, and one token's rows are inside out.
        unsafe {
            if const { S::FEW_REGISTERS }
                && seen
                && last
                && chunk == tile.first_chunk
                && is_plain(p, tile)
                && row_scales(s, scratch, rows.len())
            {
                let (batch, token) = p.visibility.query(tile.batch, 0);
                let dst = p.out.row(batch, token, tile.kv_head * p.group);
                let token = TokenRows { scratch, rows: rows.len(), dv: p.v_dim, deinterleaved, step: p.out.strides[2] };
                match p.out.dtype {
                    DType::F32 => token.finish::<S, f32>(s, dst.cast()),
                    DType::F16 => token.finish::<S, f16>(s, dst.cast()),
                    DType::Bf16 => token.finish::<S, bf16>(s, dst.cast()),
                }
                return;
            }
        }
        let asks = last && tile.head_rows >= PACK_ROWS;
        let mut sums = [0.0; MAX_LANES];
        for r in 0..rows.len() {
            if asks && let Some(row) = rows.get(r + FAR_ROWS) {
                let (batch, token) = p.visibility.query(tile.batch, row.token as usize);
                // SAFETY: token and head are inside out.
                let row = unsafe { p.out.row(batch, token, row.head as usize) };
                row_lines(p.out, row).for_each(|line| s.prefetch_write(line));
            }
            // SAFETY: the scratch buffers have these rows.
            unsafe {
                let state = if seen {
                    // One sum over lanes for as many rows as there are lanes.
                    if r.is_multiple_of(S::LANES) {
                        s.store_f32(sums.as_mut_ptr(), scratch.row_sums(s, r, rows.len()));
                    }
                    (rows[r].max, sums[r % S::LANES])
                } else {
                    EMPTY
                };
                let row = &mut rows[r];
                let (acc, total) = (scratch.acc.add(r * acc_row), scratch.total.add(r * dvp));
                let output =
                    Output { p, batch: tile.batch, token: row.token as usize, head: row.head as usize, deinterleaved };
                output.end_chunk(s, tile, (chunk, r, last), (state, acc), (&mut row.total, total));
            }
        }
    }
}

/// Whether a tile's outputs are accumulators divided by their sums, of whole groups of heads of a sequence's only token.
#[inline(always)]
fn is_plain(p: &Problem, tile: &Tile) -> bool {
    is_one_token(p, tile)
        && tile.partials.is_null()
        && p.sinks.is_none()
        && p.lse.is_null()
        && p.v_hadamard == 0
        && p.out.strides[3] == 1
}

/// Whether the rows of a tile are whole groups of heads of a sequence's only token: heads differ, and nothing else.
#[inline(always)]
fn is_one_token(p: &Problem, tile: &Tile) -> bool {
    tile.first_row == 0 && tile.head_rows == p.group && p.visibility.queries(tile.batch) == 1
}

/// Rows of Q and of the output are prefetched this many rows ahead on the packed path, those of Q into the second-level cache: in a
/// prompt they lie in runs of a few rows, too short for the hardware prefetcher.
const FAR_ROWS: usize = 16;
/// The same for rows of Q that are then prefetched into the first level.
const NEAR_ROWS: usize = 4;

/// The cache lines of a row, if its elements lie together.
#[inline(always)]
pub(crate) fn row_lines(view: &RawView, row: *const u8) -> impl Iterator<Item = *const u8> + use<> {
    lines(row, if view.strides[3] == 1 { view.shape[3] * view.dtype.size() } else { 0 })
}

/// One block of keys for all rows of the tile.
///
/// # Safety
/// As [`tile`]; the keys `key_range` of block `block` are inside the views.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn one_block<S: Simd>(
    s: S,
    p: &Problem,
    tile: &Tile,
    scratch: &Scratch,
    products: &impl Products<S>,
    rows: &mut [RowState],
    block: usize,
    key_range: KeyRange,
    reach: &TileVisibility,
    finish: bool,
) {
    let base = block * BLOCK;
    let full = key_range.bits();
    let inner = reach.inner_low <= (base + key_range.low) as i64 && (base + key_range.high) as i64 <= reach.inner_high;
    let mut all = p.bias.is_none();
    let mut any = full;
    if inner && p.mask.is_none() && p.bit_mask.is_none() {
        for row in rows.iter_mut() {
            // SAFETY: a field of the row. Plain stores would become scatters, which take three times as long on CPUs of AMD.
            unsafe { (&raw mut row.visible_bits).write_volatile(full) };
        }
    } else {
        any = 0;
        let always_visible = between(reach.always_visible, base);
        for row in rows.iter_mut() {
            // SAFETY: the keys of the query row are inside the masks.
            row.visible_bits =
                unsafe { p.visible_bits(tile.batch, (row.token, row.head), base, (row.low, row.high), always_visible) };
            any |= row.visible_bits;
            all &= row.visible_bits == full;
        }
        if any == 0 {
            return;
        }
    }

    let (d, dv) = (p.q.shape[3], p.v_dim);
    let mut pointers = [[const { MaybeUninit::uninit() }; BLOCK]; 2];
    let [keys, values] = &mut pointers;
    let (mut k, mut v) = (KeyPointerTable::<u8>::new(keys), KeyPointerTable::<u8>::new(values));
    let gather_buffers = GatherBuffers { k: scratch.k_block, v: scratch.v_block };
    // SAFETY: the block's visible keys are inside k and v, and the scratch buffers have the sizes of their layout.
    unsafe {
        locate(&BlockRequest { p, tile, base, key_range, visible_bits: any, reach }, &gather_buffers, (&mut k, &mut v));
        let block = Block { p, tile, scratch, base, key_range, visible_bits: any, all, finish, d, dv };
        products.block(s, &block, rows, k.rows(), &mut v);
    }
}
