//! Many rows (prefill): a block of K is transposed and a block of V widened, once for all rows of the tile; then both products
//! run from these copies in register tiles of [`TILE_ROWS`] rows by [`Simd::TILE_VECTORS`] vectors.
//!
//! # What bounds it
//! The FMA ports, and the front end not far behind: two steps are 48 FMAs in 72 instructions on AVX-512 (24 cycles of two ports,
//! 18 of a front end of four) and 24 in 44 on AVX2 (12 and 11), so that an instruction less is felt. A slab of K that would take
//! more than half of the first-level cache is done in two halves, so that either stays there while all rows pass by, as does a slab
//! of V; rows of Q, scores and accumulators come from the second-level cache.
//!
//! The tree over lanes is what a score costs beyond its FMAs: (LANES - 1) additions a LANES-th of them, 12 % of Q K^T at head size
//! 128 on AVX-512, and as many sums stored until their neighbours come. Out of 97 % of the FMA peak that this loop reaches without
//! a tree on a Cascade Lake core, the additions alone leave 87 %, the stores alone 85 %, both 79 %. Causal blocks compute what
//! any of a register tile's rows may see: half slabs of keys in Q K^T, single keys in P V.

use super::direct::{PackedValues, WeightedValues, accumulate_visible, load_up_to};
use super::row_pairs::{Widen, widen};
use super::scales::{scale_scores, scale_weights};
use super::softmax::Softmax;
use super::{Block, KeyPieces, KeyPointers, Pieces, RowState, ValuePieces};
use crate::kernels::simd::{Load, MAX_LANES, Outlined, Simd};
use crate::layout::Packing;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::problem::tile::{MAX_TILE_ROWS, TILE_ROWS};
use std::mem::MaybeUninit;

/// One block of keys for all rows of the tile, which are of one KV head.
///
/// # Safety
/// `k` and `v` are the rows of the block's key range, values as they lie if they are packed.
#[inline(always)]
pub(super) unsafe fn block<S: Simd>(
    s: S,
    pieces: &Pieces,
    block: &Block,
    rows: &mut [RowState],
    k: KeyPointers<u8>,
    v: KeyPointers<u8>,
) {
    match block.p.v_packing {
        // SAFETY: the caller's.
        Packing::Rows => unsafe { products(s, &pieces.keys, &pieces.values, block, rows, k, v) },
        Packing::RowPairs => {
            let mut pointers = [const { MaybeUninit::uninit() }; BLOCK];
            // SAFETY: the caller's.
            unsafe {
                let v = widen(&pieces.values, &Widen { block, v, head: 0 }, &mut pointers);
                products(s, &pieces.keys, &pieces.widened, block, rows, k, v.rows());
            }
        }
    }
}

/// # Safety
/// `k` and `v` are the rows of the block's key range.
#[inline(always)]
unsafe fn products<S: Simd>(
    s: S,
    key_pieces: &KeyPieces,
    value_pieces: &ValuePieces,
    block: &Block,
    rows: &mut [RowState],
    k: KeyPointers<u8>,
    v: KeyPointers<u8>,
) {
    let Block { scratch, key_range, all, d, dv, .. } = *block;
    let (dp, dvp) = (padded(d), padded(dv));
    let (slab, half) = (S::TILE_VECTORS * S::LANES, S::TILE_VECTORS / 2 * S::LANES);
    let steps = d.div_ceil(S::LANES);
    let parts = if slab * steps * S::LANES * size_of::<f32>() > SLAB_BYTES { 2 } else { 1 };
    let lanes = S::LANES / parts;
    let mut finite = true;
    let mut groups = [Group::default(); MAX_GROUPS];
    let count = groups_of(rows, &mut groups);
    let groups = &groups[..count];
    // SAFETY: the caller's; the scratch parts have the sizes their layout gives, and r stays inside the tile.
    unsafe {
        (key_pieces.pack)(&PackKeys { block, k });
        let mut next_k = NextBlock::new::<S>(k, d * key_pieces.unit_bytes, parts * BLOCK / slab * groups.len());
        let mut next_v =
            NextBlock::new::<S>(v, dv * value_pieces.unit_bytes, value_slabs::<S>(dv).count() * groups.len());
        (value_pieces.pack)(&mut PackValues { block, v, finite: if all { None } else { Some(&mut finite) } });
        for column in (key_range.low / slab * slab..key_range.high).step_by(slab) {
            for part in 0..parts {
                for_each_group(groups, |r, n, keys| {
                    next_k.prefetch(s);
                    if keys.high <= column || keys.low >= column + slab {
                        return;
                    }
                    // Where only one half of the slab's keys is seen, the other is left out.
                    let (skip, wide) = match (keys.low >= column + half, keys.high <= column + half) {
                        (true, _) => (half, false),
                        (_, true) => (0, false),
                        _ => (0, true),
                    };
                    let first = part * lanes * steps;
                    let kt = scratch.kt.add(column * steps * S::LANES + first * slab + skip);
                    let q = scratch.q.add(r * dp + first * n);
                    let out = scratch.s.add(r * BLOCK + column + skip);
                    let add = part > 0;
                    match n {
                        6 => s.outline(Scores::<6> { q, lanes, steps, kt, out, wide, add }),
                        4 => s.outline(Scores::<4> { q, lanes, steps, kt, out, wide, add }),
                        2 => s.outline(Scores::<2> { q, lanes, steps, kt, out, wide, add }),
                        _ => s.outline(Scores::<1> { q, lanes, steps, kt, out, wide, add }),
                    };
                });
            }
        }
        scale_scores(s, block, 0..1);
        for_each_group(groups, |r, n, keys| s.outline(Softmax { block, rows: &mut rows[r..r + n], first: r, keys }));
        finite &= scale_weights(s, block, 0..1);
        if !all && !finite {
            for (r, row) in rows.iter().enumerate() {
                accumulate_visible(value_pieces, block, row, r, v);
            }
            return;
        }
        for (column, width) in value_slabs::<S>(dv) {
            for_each_group(groups, |r, n, keys| {
                next_v.prefetch(s);
                let weighted = WeightedValues {
                    weights: scratch.s.add(r * BLOCK + keys.low),
                    acc: scratch.acc.add(r * dvp + column),
                    acc_row: dvp,
                    v: PackedValues { first: scratch.vp.add(column * BLOCK + keys.low * width), width },
                    keys: keys.len(),
                    ahead: 0,
                    whole: false,
                };
                let vectors = width / S::LANES;
                match n {
                    6 => s.outline(Values::<6> { weighted, vectors }),
                    4 => s.outline(Values::<4> { weighted, vectors }),
                    2 => s.outline(Values::<2> { weighted, vectors }),
                    _ => s.outline(Values::<1> { weighted, vectors }),
                };
            });
        }
    }
}

/// K or V of the next block: asked for while this one is computed, since its packing would wait for it. A few lines at a time:
/// more than a core has fill buffers for would make it wait now.
struct NextBlock<'a> {
    rows: KeyPointers<'a, u8>,
    /// The row that is being asked for, from where on, and how many of its bytes are left.
    key: usize,
    at: *const u8,
    left: usize,
    row: usize,
    /// Prefetches of a call.
    each: usize,
}

impl<'a> NextBlock<'a> {
    /// To be prefetched in `calls` calls; a row has `row` bytes.
    #[inline(always)]
    fn new<S: Simd>(rows: KeyPointers<'a, u8>, row: usize, calls: usize) -> Self {
        let each = (row.div_ceil(S::PREFETCH_BYTES) * BLOCK).div_ceil(calls.max(1));
        let at = rows.next(0);
        Self { rows, key: 0, at, left: if at.is_null() { 0 } else { row }, row, each }
    }

    #[inline(always)]
    fn prefetch<S: Simd>(&mut self, s: S) {
        for _ in 0..self.each {
            if self.left == 0 {
                return;
            }
            s.prefetch_far(self.at);
            self.at = self.at.wrapping_add(S::PREFETCH_BYTES);
            self.left = self.left.saturating_sub(S::PREFETCH_BYTES);
            if self.left == 0 && self.key + 1 < BLOCK {
                self.key += 1;
                self.at = self.rows.next(self.key);
                self.left = if self.at.is_null() { 0 } else { self.row };
            }
        }
    }
}

/// First column and width of the slabs in which a block of V is packed: of a register tile's width, then of two vectors, then of
/// one.
#[inline(always)]
fn value_slabs<S: Simd>(dv: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut column = 0;
    std::iter::from_fn(move || {
        let left = dv - column;
        let vectors = if left >= S::TILE_VECTORS * S::LANES {
            S::TILE_VECTORS
        } else if left >= 2 * S::LANES {
            2
        } else {
            1
        };
        let slab = (column, vectors * S::LANES);
        column = (column + vectors * S::LANES).min(dv);
        (left > 0).then_some(slab)
    })
}

/// Calls `f` with first row, number of rows and keys of every group.
#[inline(always)]
fn for_each_group(groups: &[Group], mut f: impl FnMut(usize, usize, KeyRange)) {
    for group in groups {
        f(group.first as usize, group.rows as usize, KeyRange { low: group.low as usize, high: group.high as usize });
    }
}

/// Rows of a register tile, and the keys of a block that some of them see, and those between.
#[derive(Clone, Copy, Default)]
struct Group {
    first: u16,
    rows: u8,
    low: u8,
    high: u8,
}

/// A tile has at most this many register tiles: the last rows may take three.
const MAX_GROUPS: usize = MAX_TILE_ROWS / TILE_ROWS + 2;

/// The register tiles of a tile that have anything to do in a block.
#[inline(always)]
fn groups_of(rows: &[RowState], groups: &mut [Group; MAX_GROUPS]) -> usize {
    let (mut r, mut count) = (0, 0);
    while r < rows.len() {
        let n = rows_at_once(rows.len() - r);
        let keys = KeyRange::around(rows[r..r + n].iter().fold(0, |bits, row| bits | row.visible_bits));
        if keys.low < keys.high {
            groups[count] = Group { first: r as u16, rows: n as u8, low: keys.low as u8, high: keys.high as u8 };
            count += 1;
        }
        r += n;
    }
    count
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

/// Brings the rows of Q of every register tile into the order in which [`Scores`] reads them: `[step of the walk][row]`, in place.
/// The walk goes through the lanes in the order of [`Simd::lane_order`], and for each through its element of every vector.
pub(super) struct PackQueries {
    pub q: *mut f32,
    pub rows: usize,
    pub d: usize,
}

impl Outlined for PackQueries {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { q, rows, d } = self;
        let dp = padded(d);
        let steps = d.div_ceil(S::LANES);
        let mut copy = [MaybeUninit::<f32>::uninit(); TILE_ROWS * MAX_HEAD_DIM];
        let copy = copy.as_mut_ptr().cast::<f32>();
        let mut r = 0;
        while r < rows {
            let n = rows_at_once(rows - r);
            let group = q.wrapping_add(r * dp);
            // SAFETY: the group has n <= TILE_ROWS rows of dp floats, and so has the copy; LANES * steps <= dp.
            unsafe {
                std::ptr::copy_nonoverlapping(group, copy, n * dp);
                for first in (0..n).step_by(S::LANES) {
                    let part = (n - first).min(S::LANES);
                    for step in 0..steps {
                        let mut v = [s.zero(); MAX_LANES];
                        for (i, v) in v.iter_mut().enumerate().take(part) {
                            *v = s.load_f32(copy.add((first + i) * dp + step * S::LANES));
                        }
                        s.transpose(&mut v);
                        for (lane, v) in v.iter().enumerate().take(S::LANES) {
                            let to = group.add((walk::<S>(lane, steps) + step) * n + first);
                            if part == S::LANES {
                                s.store_f32(to, *v);
                            } else {
                                s.store_part_f32(to, *v, part);
                            }
                        }
                    }
                }
            }
            r += n;
        }
    }
}

/// Where in the walk a lane begins; [`Simd::lane_order`] is its own inverse.
#[inline(always)]
fn walk<S: Simd>(lane: usize, steps: usize) -> usize {
    S::lane_order(lane) * steps
}

/// Transposes the keys of a key range into slabs as wide as a register tile: `[slab][step of the walk][keys]`. In the vectors of keys
/// at the key range's ends, columns outside of it are numbers of no meaning.
pub(crate) struct PackKeys<'a> {
    block: &'a Block<'a>,
    k: KeyPointers<'a, u8>,
}

impl PackKeys<'_> {
    /// For keys of type `T`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(&self, s: S) {
        let Block { key_range, d, .. } = *self.block;
        let pairs = d / (2 * S::LANES);
        for group in (key_range.low / S::LANES * S::LANES..key_range.high).step_by(S::LANES) {
            // SAFETY: the caller's; what a step loads is left of a key.
            unsafe {
                for pair in 0..pairs {
                    if T::deinterleaved::<S>() {
                        self.transpose::<S, T, EVEN>(s, group, 2 * pair);
                        self.transpose::<S, T, ODD>(s, group, 2 * pair + 1);
                    } else {
                        self.transpose::<S, T, WHOLE>(s, group, 2 * pair);
                        self.transpose::<S, T, WHOLE>(s, group, 2 * pair + 1);
                    }
                }
                for step in 2 * pairs..d.div_ceil(S::LANES) {
                    if d - step * S::LANES >= S::LANES {
                        self.transpose::<S, T, WHOLE>(s, group, step);
                    } else {
                        self.transpose::<S, T, PART>(s, group, step);
                    }
                }
            }
        }
    }
}

/// What of a key a step holds: `LANES` elements that lie together, the even or the odd ones of a pair of vectors, or what is left.
const WHOLE: u8 = 0;
const EVEN: u8 = 1;
const ODD: u8 = 2;
const PART: u8 = 3;

impl PackKeys<'_> {
    /// One step of `LANES` keys from `group` on.
    ///
    /// # Safety
    /// As [`block`]; the step has elements of this kind.
    #[inline(always)]
    unsafe fn transpose<S: Simd, T: Load, const KIND: u8>(&self, s: S, group: usize, step: usize) {
        let Block { scratch, key_range, d, .. } = *self.block;
        let (steps, slab) = (d.div_ceil(S::LANES), S::TILE_VECTORS * S::LANES);
        let first = group / slab * slab;
        let kt = scratch.kt.wrapping_add(first * steps * S::LANES + (group - first));
        let mut v = [s.zero(); MAX_LANES];
        // Whole vectors of keys need no look at the ends of the key range; unrolled, so that all stays in registers.
        let whole = group >= key_range.low && group + S::LANES <= key_range.high;
        macro_rules! unrolled {
            ($($lane:literal)*) => {$(
                if $lane < S::LANES {
                    let key = group + $lane;
                    let key = if whole { key } else { key.clamp(key_range.low, key_range.high - 1) };
                    let key = self.k.key(0, key).cast::<T>();
                    // SAFETY: the caller's.
                    v[$lane] = unsafe {
                        match KIND {
                            EVEN => T::load_pair(s, key.add(step * S::LANES))[0],
                            ODD => T::load_pair(s, key.add((step - 1) * S::LANES))[1],
                            PART => T::load_part(s, key.add(step * S::LANES), d - step * S::LANES),
                            _ => T::load(s, key.add(step * S::LANES)),
                        }
                    };
                }
            )*
            s.transpose(&mut v);
            $(
                if $lane < S::LANES {
                    // SAFETY: kt has steps * LANES rows a slab.
                    unsafe { s.store_f32(kt.add(($lane * steps + step) * slab), v[S::lane_order($lane)]) };
                }
            )*};
        }
        unrolled!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    }
}

/// Widens the values of a key range into the slabs of [`value_slabs`]: `[slab][key][columns]`. Says whether all are finite, if asked.
pub(crate) struct PackValues<'a> {
    block: &'a Block<'a>,
    v: KeyPointers<'a, u8>,
    finite: Option<&'a mut bool>,
}

impl PackValues<'_> {
    /// For values of type `T`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(&mut self, s: S) {
        let Self { block: &Block { scratch, key_range, dv, .. }, v, ref mut finite } = *self;
        let v = v.cast::<T>();
        for (column, width) in value_slabs::<S>(dv) {
            for j in key_range.low..key_range.high {
                let row = v.key(0, j).wrapping_add(column);
                let to = scratch.vp.wrapping_add(column * BLOCK + j * width);
                let mut i = 0;
                // SAFETY: the value has dv elements; vp has a slab of BLOCK keys for every column of padded(dv).
                unsafe {
                    while i + 2 * S::LANES <= width {
                        let x = T::load_pair(s, row.add(i));
                        s.store_f32(to.add(i), x[0]);
                        s.store_f32(to.add(i + S::LANES), x[1]);
                        if let Some(finite) = finite {
                            **finite &= s.all_finite(x[0]) && s.all_finite(x[1]);
                        }
                        i += 2 * S::LANES;
                    }
                    if i < width {
                        let part = (dv - column).min(S::LANES);
                        let x = load_up_to(s, row, part);
                        s.store_f32(to, x);
                        if let Some(finite) = finite {
                            **finite &= s.all_finite(x);
                        }
                    }
                }
            }
        }
    }
}

/// What a slab of K may take of the first-level cache while all rows pass by.
const SLAB_BYTES: usize = 16 << 10;

/// `R` rows of Q, packed, times a slab of keys, or the half of it from `kt` on; rows of scores lie [`BLOCK`] apart.
///
/// Of a slab of more than [`SLAB_BYTES`] one half of the lanes is done for all rows, and then the other: the first leaves the sum
/// over its lanes, the second adds its own to it, as the tree's last level does.
struct Scores<const R: usize> {
    q: *const f32,
    /// A power of two, and steps of each.
    lanes: usize,
    steps: usize,
    kt: *const f32,
    out: *mut f32,
    wide: bool,
    add: bool,
}

impl<const R: usize> Outlined for Scores<R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            match (S::TILE_VECTORS, self.wide) {
                (4, true) => self.tile::<S, 4>(s),
                (4, false) | (2, true) => self.tile::<S, 2>(s),
                _ => self.tile::<S, 1>(s),
            }
        }
    }
}

impl<const R: usize> Scores<R> {
    /// # Safety
    /// The pointers are valid for `R` rows and `N` vectors.
    #[inline(always)]
    unsafe fn tile<S: Simd, const N: usize>(self, s: S) {
        let Self { mut q, lanes, steps, mut kt, out, add, .. } = self;
        let slab = S::TILE_VECTORS * S::LANES;
        // stash[k]: a finished sum of 2^k lanes that waits for its neighbour.
        let mut stash = [const { MaybeUninit::<[[S::V; N]; R]>::uninit() }; MAX_LANES.ilog2() as usize];
        for lane in 0..lanes {
            let mut acc = [[s.zero(); N]; R];
            // Two steps a turn, and pointers that move: fewer instructions that are no FMA.
            // SAFETY: kt and Q have LANES * steps steps.
            unsafe {
                for _ in 0..steps / 2 {
                    add_step(s, kt, q, &mut acc);
                    add_step(s, kt.add(slab), q.add(R), &mut acc);
                    (kt, q) = (kt.wrapping_add(2 * slab), q.wrapping_add(2 * R));
                }
                if steps % 2 == 1 {
                    add_step(s, kt, q, &mut acc);
                    (kt, q) = (kt.wrapping_add(slab), q.wrapping_add(R));
                }
            }
            let mut level = 0;
            while (lane >> level) & 1 == 1 {
                // SAFETY: the bit says that a sum of 2^level lanes has been left there.
                let left = unsafe { stash[level].assume_init_ref() };
                for r in 0..R {
                    for n in 0..N {
                        acc[r][n] = s.add(left[r][n], acc[r][n]);
                    }
                }
                level += 1;
            }
            if lane + 1 < lanes {
                stash[level].write(acc);
                continue;
            }
            for r in 0..R {
                for n in 0..N {
                    // SAFETY: out has R rows of BLOCK.
                    unsafe {
                        let to = out.add(r * BLOCK + n * S::LANES);
                        let sum = if add { s.add(s.load_f32(to), acc[r][n]) } else { acc[r][n] };
                        s.store_f32(to, sum);
                    }
                }
            }
        }
    }
}

/// One step of the walk: an element of `R` rows of Q times `N` vectors of keys.
///
/// # Safety
/// `N` vectors are readable at `k`, `R` floats at `q`.
#[inline(always)]
unsafe fn add_step<S: Simd, const R: usize, const N: usize>(
    s: S,
    k: *const f32,
    q: *const f32,
    acc: &mut [[S::V; N]; R],
) {
    let mut keys = [s.zero(); N];
    for n in 0..N {
        // SAFETY: the caller's.
        keys[n] = unsafe { s.load_f32(k.add(n * S::LANES)) };
    }
    for r in 0..R {
        // SAFETY: the caller's.
        let x = s.splat(unsafe { *q.add(r) });
        for n in 0..N {
            acc[r][n] = s.fma(x, keys[n], acc[r][n]);
        }
    }
}

/// Adds the weighted values of a slab to `R` rows.
struct Values<const R: usize> {
    weighted: WeightedValues<PackedValues>,
    vectors: usize,
}

impl<const R: usize> Outlined for Values<R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            match self.vectors {
                4 if S::TILE_VECTORS == 4 => self.weighted.add::<S, R, 4>(s, 0, S::LANES),
                2 => self.weighted.add::<S, R, 2>(s, 0, S::LANES),
                _ => self.weighted.add::<S, R, 1>(s, 0, S::LANES),
            }
        }
    }
}
