//! Few query rows (decode): K and V are read once, straight from the cache, in the order in which they lie there.
//!
//! | file | what |
//! | --- | --- |
//! | this one | one block: scores, softmax, values, and which of them prefetch what |
//! | `scores` | dot products of rows with keys |
//! | `values` | weighted sums of values |
//! | `block_values` | weighted sums of values in blocks |
//! | `affine` | both of keys and values in affine units |
//! | `prefetch` | prefetch distances |
//!
//! # What bounds it
//! Reading K and V, as long as a KV head serves up to about four rows. Every vector of K is loaded (and widened) once for up to
//! four rows, with 32 registers for up to eight, four or two keys at a time: on AVX-512, 16 FMAs for 4 loads of K and 4 of Q, and 50
//! instructions per 16 scores for the sum over lanes. Every vector of V is loaded once for as many rows: 16 FMAs for 4 loads and 4
//! broadcasts. To widen a vector, bf16 takes one instruction (even and odd elements apart), f16 one, int8 two, E5M2 three, E4M3 five,
//! as a 256th. So five to eight rows take 0.65 to 0.95 of the time that two passes of up to four took on a Xeon of the Sapphire Rapids
//! class, the less, the more instructions widen a vector.
//! With four rows, formats of eight bits are bound by arithmetic: int8 takes 97 cycles per key and head of 128 on Zen 4, of which the
//! FMAs are 64, and the sum over lanes about 8, since its 50 instructions hardly overlap with the FMAs of the next keys. (To leave sums
//! in memory and to add them up later took longer.) While one subblock is computed, the subblocks
//! after it are prefetched, across the seams between K and V and between blocks, where the hardware's prefetcher would have to
//! start anew.
//!
//! Blocks are read from the cache as well, by loops of their own formats. Arithmetic binds them, also with one row. Per 32 elements
//! on AVX-512, all of these operations of a whole vector, of which Zen 4 runs two per cycle (one of each kind):
//!
//! | | factor | elements | and per row |
//! | --- | --- | --- | --- |
//! | q8_0 | 1 broadcast, 1 conversion | 2 extensions, 2 conversions, 2 products | 2 FMAs |
//! | q4_0, iq4_nl | 1 broadcast, 1 conversion | 1 product for the 16 elements there are, 1 extension, 1 shift, 2 look-ups | 2 FMAs |
//! | q4_1 | 2 broadcasts, 2 conversions | as q4_0, and 1 addition | 2 FMAs |
//! | q5_0, q5_1 | as q4_0, q4_1 | twice the products and additions, 4 look-ups | 2 FMAs |
//!
//! An element is rounded as the dequantised one is, so that the factor is not moved to the score or the weight. In loops these come to 5.8
//! cycles for q8_0, 6.1 for q4_0 with one row, and to 11 with four, where products and FMAs share their ports; scores take one cycle
//! more for the sum over lanes. Loops read keys in their order and prefetch without branches. Where rows would widen a block too often
//! ([`unit_rows`]), and where masks make single keys matter, blocks are widened to f32 first: a subblock at a time, whose rows
//! then stay in the first-level cache, at a store and a load per vector.
//!
//! Affine units are read so too, by loops for the ways of [`AffineLoops`]: where neighbouring elements of a head share a scale, or tokens
//! share those of a channel; see `affine`. Others are widened.
//!
//! Many rows of long keys ([`Simd::DIRECT_DIM`]), as in latent attention, take this path too and are bound by the FMA ports: keys of a
//! block stay in the second-level cache while rows pass over them. On Zen 4, 16 to 128 rows over keys of 576 and values of 512 run at 89
//! to 93 % of the FMA peak, four at a time (eight were not timed there); the packed path reaches 64 to 86 %. At AVX2, eight sums are as
//! many as two ports with a latency of four cycles take. There keys of f32 have twelve, of three rows and four keys, and their values six
//! rows and two vectors. From [`PACK_ROWS`](crate::problem::tile::PACK_ROWS) rows on, elements of two bytes have twelve too: six rows and
//! two keys, six rows and two vectors of values. That leaves registers for a vector of both keys and of one row, and for the mask of bf16,
//! whose even and odd elements are therefore loaded apart. On Zen 3, loops of scores alone over keys of 576 in the second-level cache so
//! run at 93 % of the FMA peak in f16 and 87 in bf16, with four rows and two keys at 87 and 81; loops of values at 94 and 92 %, with four
//! rows at 88 and 84. One token of 128 heads on 4096 keys runs at 84 % (before at 78 and 79), f32 at 80. Elements of one byte are widened
//! once for all rows of a tile ([`Simd::WIDENS_ONCE`]), and where values are the first elements of their keys, both products read one
//! copy. On Zen 3, 128 rows of E4M3 so take 60 % of the time, of E5M2 72 %, of int8 and q8_0 90 %; 16 rows of int8 gain nothing. At
//! AVX-512, E4M3 takes 0.63 to 0.95 of the time with 16 to 128 rows. For f16 and bf16, which are widened by one or two instructions, a
//! copy costs as much as it saves with 128 rows, and more with 16.
//!
//! At AVX2, up to sixteen rows ([`Simd::DIRECT_ROWS`]) take this path where keys of f32, f16 or bf16 are neighbours, at AVX-512 up to
//! 24: what a packed copy costs is more than what it saves (sixteen rows take 0.7 to 0.9 of the time at AVX-512). Where other heads lie
//! between keys, a block of one head competes for a few sets of the first-level cache each time that rows pass over it, and is read in
//! pieces. A tile then has several heads, whose subblocks are read in the order of memory: sixteen rows of each of eight heads of 128 on
//! 16,384 keys take 0.6 of the time at AVX-512, and 0.65 to 0.75 at AVX2, on a Xeon of the Sapphire Rapids class. As many rows take this
//! path over blocks and affine units, which are widened first (0.75 to 0.9 of the time with sixteen rows at AVX-512); over bytes they do
//! not, where a packed copy costs no more.
//!
//! Four rows take loops of their own at AVX2 ([`Simd::NARROW_LOOPS`]), 64 FMAs a key of 128 for scores, and
//! as many for values. A vector of Q is loaded once for both keys of a step: loaded for each, 72 loads a key are more than 32 cycles
//! take. The first step of the sum over lanes (2 shuffles, 1 addition for two keys of a row) is taken with the products, the others for
//! eight keys at once: a whole tree after every two keys takes 10 cycles a key in which FMAs wait. Values of 16 bits are prefetched
//! between turns of eight keys; with branches for prefetches at each key, the front end binds (48 cycles a key, 37 without). In loops
//! alone, scores of bf16 then take 38 cycles and values 34. Values of f32 have one loop for each way to prefetch, without a branch.
//!
//! A prefetch into the second-level cache costs one to two cycles there, for 16 of them a key in f32. Where the heads of a token lie together
//! and each has 512 bytes or more, the hardware's prefetcher keeps ahead of the loops, and only the next keys of the same head are
//! prefetched ([`NextKeys`](crate::Prefetch::NextKeys)): on Zen 3, heads of 128 and 256 in f32 are so read 1.2 to 1.3 times as fast from the third-level
//! cache, and 1.05 to 1.1 times from memory. Heads of 256 bytes lose a tenth to a quarter by it from memory.
//!
//! Beside its loops, a call on few keys costs what it moves. Queries of one token that need no conversion are read in place, accumulators
//! of one token are rows of the output where that is f32, the first values of a chunk are not added to zeros in memory, and the last ones
//! are scaled before they are stored. A call on one key is bound by the front end, since most of its instructions run once; what they are
//! is in `instructions.txt` of the benches. With short vectors, its weights are computed for a vector of rows at a time, its values by
//! loops that read weights and addresses once, and states and outputs of a single token by loops over its heads. On Zen 3, 32 query heads
//! over 8 KV heads of 128 so take 2.0 microseconds on one key in f32, where they took 2.5, and 2.7 instead of 4.1 in bf16.

mod affine;
mod block_values;
mod prefetch;
mod scores;
mod values;

use super::products::widens_once;
use super::row_pairs::{Widen, are_pairs, widen};
use super::scales::{Rows, multiply, scale_scores, scale_weights};
use super::softmax::Softmax;
use super::{Block, KeyPointers, PairPieces, Pieces, RowState, Scratch, ValuePieces, WidenUnits};
use crate::kernels::generic::attention::key_pointers::SUBBLOCKS;
use crate::kernels::simd::Simd;
use crate::layout::Packing;
use crate::problem::affine::AffineLoops;
use crate::problem::grid::{BLOCK, KeyRange, ones, padded};
use crate::problem::tile::Tile;
use crate::view::RawCacheView;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::null;

pub(crate) use prefetch::NEAR_DISTANCE;
pub(crate) use prefetch::PrefetchDistances;
pub(super) use prefetch::{Ahead, VALUES_AHEAD};
pub(crate) use scores::DirectScores;
pub(crate) use values::{DirectValues, OneValue, all_finite};

/// Query heads per KV head from which on values are weighted by products of integers, where a level has them: with fewer, to take values
/// apart costs what products save.
const INTEGER_GROUP: usize = 4;

/// The values of a block and KV head, to be added to the accumulators of all of its rows.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "no level there has these products"))]
pub(crate) struct IntegerValues<'a> {
    pub block: &'a Block<'a>,
    /// All of the tile.
    pub rows: &'a [RowState],
    pub head: usize,
    pub v: KeyPointers<'a, u8>,
    pub ahead: &'a PrefetchDistances<'a>,
    /// Called with the rows of the tile that are to add up their values in f32.
    pub in_f32: &'a mut dyn FnMut(usize),
}

/// One block of keys for all rows of the tile. `scores` is that of the pieces for keys in the cache.
///
/// # Safety
/// `k` and `v` point to the block's key range; values packed in pairs are as they lie in the cache.
#[inline(always)]
pub(super) unsafe fn block<S: Simd>(
    s: S,
    pieces: &Pieces,
    scores: unsafe fn(&DirectScores),
    block: &Block,
    rows: &mut [RowState],
    k: KeyPointers<u8>,
    v: KeyPointers<u8>,
) {
    let mut ahead = PrefetchDistances::new(&pieces.tuning, block, k, v);
    // A property of the call, not of the tile, so that bits do not depend on how a prompt is cut.
    let integer = if block.p.group >= INTEGER_GROUP { pieces.values.integer } else { None };
    if integer.is_some() {
        // They are read one head after the other.
        ahead.by = SUBBLOCKS;
    }
    // And so are keys then, for which a loop over a whole block has fewer beginnings.
    let by_head = integer.is_some() && pieces.keys.quantize_rows.is_some() && block.key_range.len() == BLOCK;
    let heads = 0..block.tile.kv_heads;
    // All rows are written together.
    let fresh = rows[0].fresh;
    let widened_keys;
    // SAFETY: the caller's; the scratch parts have a row for every row of the tile.
    unsafe {
        let widen_keys = match pieces.keys.widen {
            Some(widen) => {
                let in_loops = reads_units(block.p.k, block.d) && !widens(block.tile, pieces.keys.unit_rows);
                (!in_loops).then_some(widen)
            }
            None if pieces.keys.quantize_rows.is_none() && widens_once::<S>(block.p, block.p.k, block.tile) => {
                pieces.keys.widen_elements
            }
            None => None,
        };
        widened_keys = widen_keys.is_some() && values_are_keys::<S>(block, k, v);
        if let Some(widen) = widen_keys {
            widened_scores(pieces, widen, block, k, widened_keys);
        } else if ahead.whole || by_head {
            let (spread, ahead) = (ahead.spread, ahead.of_k(0));
            scores(&DirectScores { block, k, keys: block.key_range, spread, ahead });
        } else {
            for (index, keys) in block.subblocks() {
                scores(&DirectScores { block, k, keys, spread: false, ahead: ahead.of_k(index) });
            }
        }
        scale_scores(s, block, heads.clone());
        s.outline(Softmax { block, rows: &mut *rows, first: 0, keys: block.key_range });
        let finite = scale_weights(s, block, heads.clone());
        if fresh {
            rows.iter_mut().for_each(|row| row.fresh = false);
        }
        if let Some(integer) = integer {
            if fresh {
                clear(block, 0..rows.len());
            }
            for head in heads {
                integer_values(pieces, integer, block, rows, head, v, &ahead);
            }
            return;
        }
        if widened_keys {
            let Block { scratch, key_range: keys, visible_bits, d: dim, .. } = *block;
            let to = scratch.k_block.cast();
            let units = WidenUnits { rows: k, keys, visible_bits, to, dim, block, values: false, head: 0 };
            let mut memory = [const { MaybeUninit::uninit() }; BLOCK];
            let table = units.table(&mut memory);
            values(s, pieces.widened, None, block, rows, heads, table.rows(), finite, fresh, null(), None);
            return;
        }
        let widen_values = match pieces.values.widen {
            Some(widen) => {
                let widens = widens(block.tile, pieces.values.unit_rows);
                let in_loops = block.all && reads_units(block.p.v, block.dv) && !widens;
                (!in_loops).then_some(widen)
            }
            None if block.p.v_packing == Packing::Rows && widens_once::<S>(block.p, block.p.v, block.tile) => {
                pieces.values.widen_elements
            }
            None => None,
        };
        if let Some(widen) = widen_values {
            for head in heads {
                widened_values(s, pieces.widened, widen, block, rows, head, v, finite, fresh);
            }
            return;
        }
        let mut scales = null();
        if block.finish && pieces.values.widen.is_none() && row_scales(s, block.scratch, rows.len()) {
            scales = block.scratch.total.cast_const();
        }
        let pairs = match (block.p.v_packing, &pieces.values.pairs) {
            (Packing::RowPairs, Some(pairs)) => pairs,
            _ => {
                let finished =
                    values(s, pieces.values, None, block, rows, heads, v, finite, fresh, scales, Some(&ahead));
                rows.iter_mut().for_each(|row| row.finished = finished);
                return;
            }
        };
        if block.all && are_pairs(block.p, &v, block.key_range) {
            let finished =
                values(s, pieces.values, Some(pairs), block, rows, heads, v, finite, fresh, scales, Some(&ahead));
            rows.iter_mut().for_each(|row| row.finished = finished);
            return;
        }
        let mut pointers = [const { MaybeUninit::uninit() }; BLOCK];
        for head in heads {
            let v = widen(pairs, &Widen { block, v, head }, &mut pointers);
            values(s, pieces.widened, None, block, rows, head..head + 1, v.rows(), finite, fresh, null(), None);
        }
    }
}

/// Whether units that loops read for up to `unit_rows` rows are widened to rows of f32 before. A tile of several KV heads has few rows of
/// each (of some sequences as many as are widened elsewhere).
#[inline(always)]
fn widens(tile: &Tile, unit_rows: usize) -> bool {
    tile.kv_heads == 1 && tile.head_rows > unit_rows
}

/// Whether values are the first elements of their keys (latent attention), so that a widened copy of the keys serves both.
#[inline(always)]
fn values_are_keys<S: Simd>(block: &Block, k: KeyPointers<u8>, v: KeyPointers<u8>) -> bool {
    let Block { p, tile, key_range, d, dv, .. } = *block;
    let same = p.k.dtype == p.v.dtype && p.k.affine.is_none() && p.v.affine.is_none() && p.v_packing == Packing::Rows;
    // Pairs of vectors of a key are in the order of those of a value.
    same && widens_once::<S>(p, p.k, tile)
        && p.v.strides[3] == 1
        && dv <= d
        && dv.is_multiple_of(2 * S::LANES)
        && (key_range.low..key_range.high).all(|j| k.key(0, j) == v.key(0, j))
}

/// Whether loops read the units of a cache, which may have a description.
#[inline(always)]
fn reads_units(cache: &RawCacheView, dim: usize) -> bool {
    cache.affine.is_none() || AffineLoops::of(cache, dim).is_some()
}

/// The most rows that one pass over units takes at levels with many registers, and at others.
const PASS_ROWS: usize = 8;
const FEW_PASS_ROWS: usize = 4;

/// The most query rows of a KV head that read units of so many bits per element from the cache: those of one pass, or of two where that
/// takes less than to widen units to rows of f32, as it does for bytes.
pub(crate) const fn unit_rows<S: Simd>(bits: usize) -> usize {
    match bits {
        _ if S::FEW_LOOPS => 1,
        _ if !S::FEW_REGISTERS => PASS_ROWS,
        8 => 2 * FEW_PASS_ROWS,
        _ => FEW_PASS_ROWS,
    }
}

/// Rows of the next pass of `left` rows there, up to `most`: few passes, of nearly equal size.
#[inline(always)]
const fn rows_of_pass(left: usize, most: usize) -> usize {
    left.div_ceil(left.div_ceil(most))
}

/// Calls a loop over units that are widened, for `$rows` query rows, from `$row` on, with two more parameters: how many rows it takes, and
/// how many keys or vectors, which are as many as registers allow (`$alone` for one row, where they are few). All rows take what is
/// widened once, if registers suffice for `$most`. Few loops where they do not, since there are many formats.
macro_rules! rows_in_loops {
    ($level:ty, $rows:expr, $most:expr, $alone:literal, |$row:ident| $this:ident.$function:ident::<$($type:ty),*>($($argument:expr),*)) => {{
        let (mut $row, rows) = (0, $rows);
        while $row < rows {
            let left = rows - $row;
            $row += if const { <$level as Simd>::FEW_LOOPS } {
                if left < 4 {
                    $this.$function::<$($type,)* 1, 2>($($argument),*);
                    1
                } else {
                    $this.$function::<$($type,)* 4, 2>($($argument),*);
                    4
                }
            } else if const { <$level as Simd>::FEW_REGISTERS } {
                match left {
                    1 => $this.$function::<$($type,)* 1, $alone>($($argument),*),
                    2 => $this.$function::<$($type,)* 2, 4>($($argument),*),
                    3 => $this.$function::<$($type,)* 3, 2>($($argument),*),
                    _ => $this.$function::<$($type,)* 4, 2>($($argument),*),
                }
                left.min(super::FEW_PASS_ROWS)
            } else {
                let pass = super::rows_of_pass(left, $most);
                match pass {
                    1 => $this.$function::<$($type,)* 1, 8>($($argument),*),
                    2 => $this.$function::<$($type,)* 2, 8>($($argument),*),
                    3 => $this.$function::<$($type,)* 3, 4>($($argument),*),
                    4 => $this.$function::<$($type,)* 4, 4>($($argument),*),
                    5 => $this.$function::<$($type,)* 5, 4>($($argument),*),
                    6 => $this.$function::<$($type,)* 6, 2>($($argument),*),
                    7 => $this.$function::<$($type,)* 7, 2>($($argument),*),
                    _ => $this.$function::<$($type,)* 8, 2>($($argument),*),
                }
                pass
            };
        }
    }};
}
use rows_in_loops;

/// Scores of keys that are widened, a subblock at a time, so that its rows stay in the first-level cache. The copies are one after
/// another if they are to be kept, otherwise in one place.
///
/// # Safety
/// As [`block`], for a tile of one KV head.
#[inline(always)]
unsafe fn widened_scores(
    pieces: &Pieces,
    widen: unsafe fn(&WidenUnits),
    block: &Block,
    k: KeyPointers<u8>,
    keep: bool,
) {
    let Block { tile, scratch, key_range, visible_bits, d, .. } = *block;
    for (_, keys) in block.subblocks() {
        // SAFETY: the caller's; the buffer holds more than a subblock.
        unsafe {
            if visible_bits & keys.bits() == 0 {
                // Nobody sees them, but they are numbers.
                for row in 0..tile.head_rows {
                    scratch.s.add(row * BLOCK + keys.low).write_bytes(0, keys.len());
                }
                continue;
            }
            let mut memory = [const { MaybeUninit::uninit() }; BLOCK];
            let first = if keep { (keys.low - key_range.low) * padded(d) } else { 0 };
            let to = scratch.k_block.cast::<f32>().wrapping_add(first);
            let units = WidenUnits { rows: k, keys, visible_bits, to, dim: d, block, values: false, head: 0 };
            let table = units.by(widen, &mut memory);
            (pieces.keys.widened_scores)(&DirectScores {
                block,
                k: table.rows(),
                keys,
                spread: false,
                ahead: Ahead::NONE,
            });
        }
    }
}

/// Adds the weighted values of a block and KV head whose units hold several elements: widened as in [`widened_scores`] where every row
/// sees every key, otherwise all at once, since masked values are looked at before any is added.
///
/// # Safety
/// As [`values`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn widened_values<S: Simd>(
    s: S,
    pieces: &ValuePieces,
    widen: unsafe fn(&WidenUnits),
    block: &Block,
    rows: &[RowState],
    head: usize,
    v: KeyPointers<u8>,
    finite: bool,
    mut fresh: bool,
) {
    let Block { scratch, key_range, visible_bits, all, dv, .. } = *block;
    let to = scratch.v_block.cast();
    let units = WidenUnits { rows: v, keys: key_range, visible_bits, to, dim: dv, block, values: true, head };
    let heads = head..head + 1;
    let mut memory = [const { MaybeUninit::uninit() }; BLOCK];
    // SAFETY: the caller's; the buffer holds a block.
    unsafe {
        if !all {
            let table = units.by(widen, &mut memory);
            values(s, pieces, None, block, rows, heads, table.rows(), finite, fresh, null(), None);
            return;
        }
        for (_, keys) in block.subblocks() {
            let table = WidenUnits { keys, ..units }.by(widen, &mut memory);
            let heads = heads.clone();
            (pieces.accumulate)(&DirectValues {
                block,
                v: table.rows(),
                heads,
                keys,
                fresh,
                scales: null(),
                ahead: Ahead::NONE,
            });
            fresh = false;
        }
    }
}

/// Adds the weighted values of a block and KV head by products of integers.
///
/// # Safety
/// As [`block`]; weights are in place.
unsafe fn integer_values(
    pieces: &Pieces,
    integer: unsafe fn(&mut IntegerValues),
    block: &Block,
    rows: &[RowState],
    head: usize,
    v: KeyPointers<u8>,
    ahead: &PrefetchDistances,
) {
    let Block { scratch, key_range, visible_bits, dv, .. } = *block;
    let mut in_f32 = |r: usize| {
        // SAFETY: the caller's; the buffer holds a block.
        unsafe {
            let Some(widen) = pieces.values.widen else {
                accumulate_visible(pieces.values, block, &rows[r], r, v);
                return;
            };
            let mut memory = [const { MaybeUninit::uninit() }; BLOCK];
            let to = scratch.v_block.cast();
            let units = WidenUnits { rows: v, keys: key_range, visible_bits, to, dim: dv, block, values: true, head };
            accumulate_visible(pieces.widened, block, &rows[r], r, units.by(widen, &mut memory).rows());
        }
    };
    // SAFETY: the caller's.
    unsafe { integer(&mut IntegerValues { block, rows, head, v, ahead, in_f32: &mut in_f32 }) };
}

/// Adds the weighted values of a block for some KV heads, and prefetches. With `pairs`, the key range consists of whole pairs and every
/// row sees every key. `finite`: the scales of the values are finite; `fresh`: the rows are. Whether the sums have been multiplied by the
/// `scales` that there may be.
///
/// # Safety
/// As [`block`]; weights are in place.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn values<S: Simd>(
    s: S,
    pieces: &ValuePieces,
    pairs: Option<&PairPieces>,
    block: &Block,
    rows: &[RowState],
    heads: Range<usize>,
    v: KeyPointers<u8>,
    finite: bool,
    mut fresh: bool,
    scales: *const f32,
    ahead: Option<&PrefetchDistances>,
) -> bool {
    let Block { tile, scratch, key_range, all, dv, .. } = *block;
    let rows_of_heads = heads.start * tile.head_rows..heads.end * tile.head_rows;
    // SAFETY: the caller's.
    unsafe {
        let is_finite = |head| (pieces.all_finite)(v, head, key_range, dv);
        let mut all_at_once = pairs.is_some() || all || finite && heads.clone().all(is_finite);
        if all_at_once && pieces.fractions != 1.0 {
            let KeyRange { low, high } = key_range;
            let (x, rows) = (scratch.s.add(rows_of_heads.start * BLOCK), rows_of_heads.len());
            all_at_once = multiply(s, Rows { x, rows, width: BLOCK, low, high }, pieces.fractions);
        }
        if !all_at_once {
            if fresh {
                clear(block, rows_of_heads.clone());
            }
            for r in rows_of_heads {
                accumulate_visible(pieces, block, &rows[r], r, v);
            }
            return false;
        }
        let ahead = |index| ahead.map_or(Ahead::NONE, |ahead| ahead.of_v(index));
        let accumulate = pairs.map_or(pieces.accumulate, |pairs| pairs.accumulate);
        runs(block, &heads, ahead, |keys, ahead| {
            let scales = if keys.high == key_range.high { scales } else { null() };
            accumulate(&DirectValues { block, v, heads: heads.clone(), keys, fresh, scales, ahead });
            fresh = false;
        });
    }
    !scales.is_null()
}

/// Calls `f` with the subblocks of a block and their prefetch distances. For one head, neighbouring subblocks of the same distance are
/// one call.
#[inline(always)]
fn runs(block: &Block, heads: &Range<usize>, ahead: impl Fn(usize) -> Ahead, mut f: impl FnMut(KeyRange, Ahead)) {
    let mut run = None;
    for (index, keys) in block.subblocks() {
        let ahead = ahead(index);
        run = match run {
            Some((KeyRange { low, .. }, same)) if heads.len() == 1 && same == ahead => {
                Some((KeyRange { low, high: keys.high }, same))
            }
            other => {
                if let Some((keys, ahead)) = other {
                    f(keys, ahead);
                }
                Some((keys, ahead))
            }
        };
    }
    if let Some((keys, ahead)) = run {
        f(keys, ahead);
    }
}

/// Writes what the weighted values of each of the `rows` rows of a tile are to be multiplied by to `scratch.total`; false if a row has no
/// weights. No chunk comes before this one.
///
/// # Safety
/// The sums of these rows are in place, and totals are free.
#[inline(always)]
pub(super) unsafe fn row_scales<S: Simd>(s: S, scratch: &Scratch, rows: usize) -> bool {
    for first in (0..rows).step_by(S::LANES) {
        let n = (rows - first).min(S::LANES);
        // SAFETY: the caller's.
        let sums = unsafe { scratch.row_sums(s, first, rows) };
        if s.lt_bits(s.zero(), sums) & ones(n) != ones(n) {
            return false;
        }
        // SAFETY: a row of totals has a whole vector.
        unsafe { s.store_f32(scratch.total.add(first), s.div(s.splat(1.0), sums)) };
    }
    true
}

/// Makes the accumulators of some rows of the tile zeros.
///
/// # Safety
/// The rows are inside the tile.
#[inline(always)]
pub(super) unsafe fn clear(block: &Block, rows: Range<usize>) {
    let Block { scratch, dv, .. } = *block;
    for row in rows {
        // SAFETY: acc has these floats in a row.
        unsafe { scratch.acc.add(row * scratch.acc_row).write_bytes(0, padded(dv)) };
    }
}

/// Adds the weighted values of the keys that one row sees, key by key: for blocks in which a masked value is not finite.
///
/// # Safety
/// As [`block`]; `row` is number `r` of the tile.
#[inline(always)]
pub(super) unsafe fn accumulate_visible(
    pieces: &ValuePieces,
    block: &Block,
    row: &RowState,
    r: usize,
    v: KeyPointers<u8>,
) {
    for key in block.key_range.low..block.key_range.high {
        if row.visible_bits >> key & 1 == 1 {
            // SAFETY: the caller's.
            unsafe { (pieces.accumulate_one)(&OneValue { block, row: r, key, v }) };
        }
    }
}
