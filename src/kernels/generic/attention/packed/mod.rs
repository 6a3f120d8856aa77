//! Many query rows (prefill): a block of K is transposed and a block of V widened, once for all rows of the tile. Both products then
//! run on these copies, in register tiles of [`TILE_ROWS`] rows: P V by [`Simd::TILE_VECTORS`] vectors, Q K^T by
//! as many or, with narrow [`ScoreTiles`], by one vector and four lanes. With [`Simd::ROW_SCORES`], a block of K is widened too, and Q K^T runs
//! by three rows of Q and [`KEYS`] keys.
//!
//! | file | what |
//! | --- | --- |
//! | this one | one block, and the register tiles of its rows |
//! | `queries`, `keys`, `values` | packed copies, and the weighted sums of values |
//! | `scores` | dot products with transposed keys |
//! | `row_scores` | dot products with rows of keys |
//! | `prefetch` | prefetches of the next block |
//!
//! # What bounds it
//! The FMA ports, closely followed by the front end of a CPU that decodes four instructions per cycle. 48 FMAs are 24 cycles of two
//! ports; with them go 30 other instructions in Q K^T on AVX-512 and 24 in P V, and 24 FMAs on AVX2 have 20 and 20. K and V are packed and
//! multiplied in panels of half of the first-level cache, each of which stays there for all rows. A panel is packed where the one before
//! it was, so that its stores find their lines. Rows of Q, scores and accumulators come from the second-level cache, and to prefetch them
//! into the first costs more than it brings.
//!
//! Beyond its FMAs, a score costs the tree over lanes: (LANES - 1) additions per LANES scores, 12 % of Q K^T at head size 128 on
//! AVX-512, and sums stored until their neighbours are ready. A narrow register tile, of one vector of keys, has room for four lanes side
//! by side, whose sums need no store, and an element of Q is then the memory operand of the one FMA that takes it. On Zen 4, where
//! additions have units of their own, such tiles run at the FMA peak in a loop of their own, tiles of two vectors and two lanes at 83 to
//! 91 %, of four vectors and one lane (wide) at 80 %. On CPUs of Intel, two loads per cycle leave narrow tiles at most 86 %. A Cascade
//! Lake core reached 97 % with wide tiles without the tree, 87 % with its additions alone, 85 % with its stores alone, and 79 % with
//! both. A Xeon of the Sapphire Rapids class, on which no loop that reads operands exceeds 86 %, the sums of values neither, reached 66
//! to 68 % with narrow tiles, 66 to 70 % with wide ones and copies of the queries, 83 % with these without the tree; prompts are 1.03
//! (512 tokens) to 1.10 times as fast with wide ones.
//!
//! AVX2 has sixteen registers, of which twelve are sums. In loops of their own on Zen 3, at head size 128, tiles of three rows, two
//! vectors and two lanes of transposed keys run at 99 % without the tree, at 99 % with the additions of two lanes, and at 82 to 87 % with
//! the sums that are stored: a store costs two cycles of FMAs, and 768 FMAs have 24. Three rows and four keys by vectors along the head
//! have 7 loads per 12 FMAs and run at 99 % without sums over lanes. With them they run at 84 to 88 %: 192 FMAs have 11 additions, 20
//! moves between lanes and three stores. Both take the same time in a block; rows of keys need no transposition, and are copied in half
//! of the time. Two more lanes side by side would be 16 loads per 12 FMAs.
//!
//! P V reaches 95 to 98 % on Zen 4, and 93 to 94 % on Zen 3, where what is missing are the stores of accumulators. Softmax takes 5 % of
//! the time, packing 2 to 3 %. Causal blocks compute the keys that any row of a register tile sees: half slabs in Q K^T, single keys in
//! P V.

mod keys;
mod prefetch;
mod queries;
mod row_scores;
mod scores;
mod values;

use super::direct::{Ahead, accumulate_visible, clear};
use super::row_pairs::{Widen, widen};
use super::scales::{scale_scores, scale_weights};
use super::softmax::Softmax;
use super::weighted::WeightedValues;
use super::{Block, KeyPointers, Pieces, RowState, WidenUnits};
use crate::kernels::simd::{Outlined, Simd};
use crate::layout::Packing;
use crate::problem::grid::{BLOCK, KeyRange};
use crate::problem::tile::{MAX_TILE_ROWS, TILE_ROWS};
use crate::tuning::{ScoreTiles, Tuning};
use prefetch::NextBlock;
use row_scores::{KEYS, RowScores, panel_keys, row_floats};
use scores::Scores;
use std::mem::MaybeUninit;
use values::{PackedValues, PanelValues, Values, value_slabs};

pub(crate) use keys::PackKeys;
pub(super) use queries::PackQueries;
pub(crate) use values::PackValues;

/// Bytes of the first-level cache for slabs of K or V that all rows read before they go on to the next.
const PANEL_BYTES: usize = 16 << 10;

/// Columns of V in as many bytes.
const PANEL_COLUMNS: usize = PANEL_BYTES / (BLOCK * size_of::<f32>());

/// One block of keys for all rows of the tile, which are of one KV head.
///
/// # Safety
/// `k` and `v` point to the block's key range; values packed in pairs are as they lie in the cache.
#[inline(always)]
pub(super) unsafe fn block<S: Simd>(
    s: S,
    pieces: &Pieces,
    block: &Block,
    rows: &mut [RowState],
    k: KeyPointers<u8>,
    v: KeyPointers<u8>,
) {
    let Block { scratch, key_range, visible_bits, d, dv, .. } = *block;
    let mut memory = [[const { MaybeUninit::uninit() }; BLOCK]; 2];
    let [k_memory, v_memory] = &mut memory;
    let (k_table, v_table);
    let (mut k, mut v) = (k, v);
    // SAFETY: the caller's; the buffers hold a block in f32, and such tiles have one KV head.
    unsafe {
        if let Some(widen) = pieces.keys.widen {
            let to = scratch.k_block.cast();
            let units =
                WidenUnits { rows: k, keys: key_range, visible_bits, to, dim: d, block, values: false, head: 0 };
            k_table = units.by(widen, k_memory);
            k = k_table.rows();
        }
        if let Some(widen) = pieces.values.widen {
            let to = scratch.v_block.cast();
            let units =
                WidenUnits { rows: v, keys: key_range, visible_bits, to, dim: dv, block, values: true, head: 0 };
            v_table = units.by(widen, v_memory);
            v = v_table.rows();
        }
    }
    match (block.p.v_packing, &pieces.values.pairs) {
        (Packing::RowPairs, Some(pairs)) => {
            let mut pointers = [const { MaybeUninit::uninit() }; BLOCK];
            // SAFETY: the caller's.
            unsafe {
                let v = widen(pairs, &Widen { block, v, head: 0 }, &mut pointers);
                products(s, &Pieces { values: pieces.widened, ..*pieces }, block, rows, k, v.rows());
            }
        }
        // SAFETY: the caller's.
        _ => unsafe { products(s, pieces, block, rows, k, v) },
    }
}

/// # Safety
/// `k` and `v` point to the block's key range.
#[inline(always)]
unsafe fn products<S: Simd>(
    s: S,
    pieces: &Pieces,
    block: &Block,
    rows: &mut [RowState],
    k: KeyPointers<u8>,
    v: KeyPointers<u8>,
) {
    let Block { scratch, all, dv, .. } = *block;
    let acc_row = scratch.acc_row;
    let mut groups = [Group::default(); MAX_GROUPS];
    let count = groups_of(rows, &mut groups);
    let groups = &groups[..count];
    // SAFETY: the caller's; the scratch parts have the sizes their layout gives, and r stays inside the tile.
    unsafe {
        if const { S::ROW_SCORES } {
            row_scores(s, pieces, block, groups, k);
        } else {
            slab_scores(s, pieces, block, groups, k);
        }
        let calls = dv.div_ceil(PANEL_COLUMNS) * groups.len();
        let mut next_v = NextBlock::new(&pieces.tuning, v, dv * pieces.values.unit_bytes, calls);
        scale_scores(s, block, 0..1);
        for_each_group(groups, |r, n, keys, _| s.outline(Softmax { block, rows: &mut rows[r..r + n], first: r, keys }));
        let mut finite = scale_weights(s, block, 0..1);
        // Masked values are checked before any is added. Otherwise the panels of V use the same memory, one after another.
        if !all {
            finite &= (pieces.values.pack)(&PackValues { block, v, columns: (0, dv), check: true });
        }
        if !all && !finite {
            for (r, row) in rows.iter_mut().enumerate() {
                if std::mem::take(&mut row.fresh) {
                    clear(block, r..r + 1);
                }
                accumulate_visible(pieces.values, block, row, r, v);
            }
            return;
        }
        let mut first_column = 0;
        while first_column < dv {
            let columns = first_column..(first_column + PANEL_COLUMNS).min(dv);
            let mut packed_from = 0;
            if all {
                packed_from = first_column;
                (pieces.values.pack)(&PackValues { block, v, columns: (columns.start, columns.end), check: false });
            }
            for_each_group(groups, |r, n, keys, fresh| {
                next_v.prefetch(s);
                if const { S::NARROW_LOOPS } {
                    let panel = PanelValues {
                        weights: scratch.s.add(r * BLOCK + keys.low),
                        acc: scratch.acc.add(r * acc_row + columns.start),
                        acc_row,
                        v: scratch.vp.add((columns.start - packed_from) * BLOCK),
                        columns: columns.len(),
                        keys,
                        fresh,
                    };
                    run_tile(s, panel, n);
                    return;
                }
                for (column, width) in value_slabs::<S>(columns.clone()) {
                    let weighted = WeightedValues {
                        weights: scratch.s.add(r * BLOCK + keys.low),
                        acc: scratch.acc.add(r * acc_row + column),
                        acc_row,
                        v: PackedValues {
                            first: scratch.vp.add((column - packed_from) * BLOCK + keys.low * width),
                            width,
                        },
                        keys: keys.len(),
                        fresh,
                        scales: std::ptr::null(),
                        ahead: Ahead::NONE,
                        in_order: false,
                    };
                    run_tile(s, Values { weighted, vectors: width / S::LANES }, n);
                }
            });
            first_column += PANEL_COLUMNS;
        }
        for_each_group(groups, |r, n, _, _| rows[r..r + n].iter_mut().for_each(|row| row.fresh = false));
    }
}

/// Scores of the register tiles, from keys that are transposed.
///
/// # Safety
/// As [`products`].
#[inline(always)]
unsafe fn slab_scores<S: Simd>(s: S, pieces: &Pieces, block: &Block, groups: &[Group], k: KeyPointers<u8>) {
    let Block { scratch, key_range, d, .. } = *block;
    let q_row = scratch.q_row;
    let shape = ScoreShape::of::<S>(&pieces.tuning);
    let slab_vectors = shape.vectors;
    let (slab, half) = (slab_vectors * S::LANES, slab_vectors / 2 * S::LANES);
    let packed = packs_queries::<S>(&pieces.tuning);
    let steps = d.div_ceil(S::LANES);
    let slab_bytes = slab * steps * S::LANES * size_of::<f32>();
    let parts = if slab_bytes > PANEL_BYTES { 2 } else { 1 };
    let panel = slab * (PANEL_BYTES / slab_bytes).max(1);
    let lanes = S::LANES / parts;
    // SAFETY: the caller's; the scratch parts have the sizes their layout gives, and r stays inside the tile.
    unsafe {
        let calls = parts * BLOCK.div_ceil(panel) * groups.len();
        let mut next_k = NextBlock::new(&pieces.tuning, k, d * pieces.keys.unit_bytes, calls);
        for (first_key, end_key) in panels(key_range, panel) {
            (pieces.keys.pack)(&PackKeys { block, k, first_key, end_key, shape });
            for part in 0..parts {
                for_each_group(groups, |r, n, keys, _| {
                    next_k.prefetch(s);
                    let first_lane = part * lanes;
                    let q = scratch.q.add(r * q_row + if packed { first_lane * steps * n } else { 0 });
                    for column in (first_key..end_key).step_by(slab) {
                        if keys.high <= column || keys.low >= column + slab {
                            continue;
                        }
                        // If the rows see keys of one half of the slab only, the other half is skipped.
                        let (skip, vectors) = match (keys.low >= column + half, keys.high <= column + half) {
                            _ if half == 0 => (0, slab_vectors),
                            (true, _) => (half, slab_vectors / 2),
                            (_, true) => (0, slab_vectors / 2),
                            _ => (0, slab_vectors),
                        };
                        let kt =
                            scratch.kt.add((column - first_key) * steps * S::LANES + first_lane * steps * slab + skip);
                        let out = scratch.s.add(r * BLOCK + column + skip);
                        let add = part > 0;
                        let scores = Scores { q, q_row, first_lane, lanes, steps, kt, out, slab_vectors, vectors, add };
                        run_tile(s, scores, n);
                    }
                });
            }
        }
    }
}

/// Scores of the register tiles, from rows of keys.
///
/// # Safety
/// As [`products`].
#[inline(always)]
unsafe fn row_scores<S: Simd>(s: S, pieces: &Pieces, block: &Block, groups: &[Group], k: KeyPointers<u8>) {
    let Block { scratch, key_range, d, .. } = *block;
    let (q_row, width, panel) = (scratch.q_row, row_floats::<S>(d), panel_keys::<S>(d));
    let shape = ScoreShape::of::<S>(&pieces.tuning);
    let calls = BLOCK.div_ceil(panel) * groups.len();
    let mut next_k = NextBlock::new(&pieces.tuning, k, d * pieces.keys.unit_bytes, calls);
    // SAFETY: as of [`slab_scores`].
    unsafe {
        for (first_key, end_key) in panels(key_range, panel) {
            (pieces.keys.pack)(&PackKeys { block, k, first_key, end_key, shape });
            for_each_group(groups, |r, n, keys, _| {
                next_k.prefetch(s);
                let (low, high) = (keys.low.max(first_key) / KEYS * KEYS, keys.high.min(end_key));
                if low >= high {
                    return;
                }
                let scores = RowScores {
                    q: scratch.q.add(r * q_row),
                    q_row,
                    k: scratch.kt.add((low - first_key) * width),
                    d,
                    keys: high - low,
                    out: scratch.s.add(r * BLOCK + low),
                };
                run_tile(s, scores, n);
            });
        }
    }
}

/// The register tiles of Q K^T for transposed keys.
#[derive(Clone, Copy)]
pub(crate) struct ScoreShape {
    /// Vectors of keys.
    pub vectors: usize,
    /// Lanes of a score that are summed side by side, 1 or 4: as many tiles of registers.
    pub lanes: usize,
}

impl ScoreShape {
    #[inline(always)]
    fn of<S: Simd>(tuning: &Tuning) -> Self {
        if S::NARROW_SCORES && tuning.score_tiles == ScoreTiles::Narrow {
            Self { vectors: 1, lanes: 4 }
        } else {
            Self { vectors: S::TILE_VECTORS, lanes: 1 }
        }
    }

    /// The place of a step of the `i`-th lane of the tree: lanes that are summed side by side take turns.
    #[inline(always)]
    fn place(self, i: usize, step: usize, steps: usize) -> usize {
        let lanes = self.lanes;
        (i / lanes * steps + step) * lanes + i % lanes
    }
}

/// Whether query rows are reordered, so that the elements that several rows have in a step lie together. Otherwise they are read from as
/// many rows: by narrow tiles, whose addresses are sums of two registers and a constant, and along the head.
#[inline(always)]
pub(super) fn packs_queries<S: Simd>(tuning: &Tuning) -> bool {
    !S::ROW_SCORES && ScoreShape::of::<S>(tuning).lanes == 1
}

/// The first and the end of the keys of every panel of a key range, on a grid of `panel` keys.
#[inline(always)]
fn panels(keys: KeyRange, panel: usize) -> impl Iterator<Item = (usize, usize)> {
    (keys.low / panel * panel..keys.high).step_by(panel).map(move |first| (first, (first + panel).min(keys.high)))
}

/// A product of the rows of a register tile, compiled for each number of them that [`rows_at_once`] gives.
trait RowTile {
    /// # Safety
    /// What the product points to is valid for `ROWS` rows.
    unsafe fn run<S: Simd, const ROWS: usize>(self, s: S);
}

/// A [`RowTile`] of `ROWS` rows.
struct OfRows<T, const ROWS: usize>(T);

impl<T: RowTile, const ROWS: usize> Outlined for OfRows<T, ROWS> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe { self.0.run::<S, ROWS>(s) }
    }
}

/// Runs a product for `rows` rows.
///
/// # Safety
/// As of [`RowTile::run`].
#[inline(always)]
unsafe fn run_tile<S: Simd>(s: S, tile: impl RowTile, rows: usize) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            6 => s.outline(OfRows::<_, 6>(tile)),
            4 => s.outline(OfRows::<_, 4>(tile)),
            2 => s.outline(OfRows::<_, 2>(tile)),
            _ => s.outline(OfRows::<_, 1>(tile)),
        };
    }
}

/// Calls `f` with the first row, the number of rows and the keys of every register tile, and whether its rows are fresh.
#[inline(always)]
fn for_each_group(groups: &[Group], mut f: impl FnMut(usize, usize, KeyRange, bool)) {
    for &Group { first, rows, low, high, fresh } in groups {
        f(first as usize, rows as usize, KeyRange { low: low as usize, high: high as usize }, fresh);
    }
}

/// Rows of a register tile, and the keys of a block from the first to the last that one of them sees.
#[derive(Clone, Copy, Default)]
struct Group {
    first: u16,
    rows: u8,
    low: u8,
    high: u8,
    /// See [`RowState`]; rows of a register tile are written together.
    fresh: bool,
}

/// Upper bound on the register tiles of a tile: the last rows can take three.
const MAX_GROUPS: usize = MAX_TILE_ROWS / TILE_ROWS + 2;

/// The register tiles of a tile whose rows see a key of the block.
#[inline(always)]
fn groups_of(rows: &[RowState], groups: &mut [Group; MAX_GROUPS]) -> usize {
    let (mut r, mut count) = (0, 0);
    while r < rows.len() {
        let n = rows_at_once(rows.len() - r);
        let keys = KeyRange::around(rows[r..r + n].iter().fold(0, |bits, row| bits | row.visible_bits));
        if keys.low < keys.high {
            groups[count] = Group {
                first: r as u16,
                rows: n as u8,
                low: keys.low as u8,
                high: keys.high as u8,
                fresh: rows[r].fresh,
            };
            count += 1;
        }
        r += n;
    }
    count
}

/// Rows of the next register tile when `left` remain: few tiles, of nearly equal size.
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
