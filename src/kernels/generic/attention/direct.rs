//! Few rows (decode): K and V are read once, straight from the cache, in the order in which they lie there.
//!
//! # What bounds it
//! Reading K and V, as long as a KV head serves up to about four rows. Every vector of K is loaded (and widened) once for up
//! to four rows, four keys at a time: on AVX-512 16 FMAs for 4 loads of K and 4 of Q, and 46 instructions a 16 scores for the
//! sum over lanes; every vector of V once for up to four rows: 16 FMAs for 4 loads and 4 broadcasts. bf16 costs one
//! instruction a vector to widen (even and odd elements apart), f16 one. While one piece of [`SUBBLOCK`] keys is computed, the
//! pieces after it are prefetched, across the seams between K and V and between blocks, where the hardware's prefetcher
//! would have to start anew.

use super::key_pointers::SUBBLOCKS;
use super::row_pairs::{Widen, are_pairs, load_two, widen};
use super::scales::{scale_scores, scale_weights};
use super::softmax::Softmax;
use super::{Block, KeyPointers, Pieces, RowState, SUBBLOCK, ValuePieces};
use crate::kernels::simd::{LINE, Load, MAX_LANES, Simd};
use crate::layout::Packing;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use std::mem::MaybeUninit;
use std::ops::Range;

/// How far ahead of its use memory is asked for, if a block reaches that far.
const PREFETCH_DISTANCE: usize = 12 << 10;

/// One block of keys for all rows of the tile.
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
    let ahead = PrefetchDistances::new(block, k, v);
    let heads = 0..block.tile.kv_heads;
    // SAFETY: the caller's; the scratch parts have a row for every row of the tile.
    unsafe {
        if ahead.whole {
            (pieces.keys.scores)(&DirectScores { block, k, keys: block.key_range, spread: true, ahead: ahead.of_k(0) });
        } else {
            for (index, keys) in block.pieces() {
                (pieces.keys.scores)(&DirectScores { block, k, keys, spread: false, ahead: ahead.of_k(index) });
            }
        }
        scale_scores(s, block, heads.clone());
        s.outline(Softmax { block, rows: &mut *rows, first: 0, keys: block.key_range });
        let finite = scale_weights(s, block, heads.clone());
        if block.p.v_packing == Packing::Rows {
            values(&pieces.values, false, block, rows, heads, v, finite, Some(&ahead));
            return;
        }
        if block.all && are_pairs(block.p, &v, block.key_range) {
            values(&pieces.values, true, block, rows, heads, v, finite, Some(&ahead));
            return;
        }
        let mut pointers = [const { MaybeUninit::uninit() }; BLOCK];
        for head in heads {
            let v = widen(&pieces.values, &Widen { block, v, head }, &mut pointers);
            values(&pieces.widened, false, block, rows, head..head + 1, v.rows(), finite, None);
        }
    }
}

/// Adds the weighted values of a block and some KV heads, and prefetches. With `pairs`, the values are pairs and nothing else, and
/// no key is hidden. `finite` says that the scales of the values are.
///
/// # Safety
/// As [`block`]; weights are in place.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn values(
    pieces: &ValuePieces,
    pairs: bool,
    block: &Block,
    rows: &[RowState],
    heads: Range<usize>,
    v: KeyPointers<u8>,
    finite: bool,
    ahead: Option<&PrefetchDistances>,
) {
    let Block { tile, key_range, all, dv, .. } = *block;
    let whole = ahead.is_some_and(|ahead| ahead.whole);
    // SAFETY: the caller's.
    unsafe {
        let is_finite = |head| (pieces.all_finite)(v, head, key_range, dv);
        if !pairs && !all && !(finite && heads.clone().all(is_finite)) {
            for r in heads.start * tile.head_rows..heads.end * tile.head_rows {
                accumulate_visible(pieces, block, &rows[r], r, v);
            }
            return;
        }
        let distance = |index| ahead.map_or(0, |ahead| ahead.of_v(index));
        let accumulate = if pairs { pieces.accumulate_pairs } else { pieces.accumulate };
        runs(block, &heads, distance, |keys, ahead| {
            accumulate(&DirectValues { block, v, heads: heads.clone(), keys, ahead, whole });
        });
    }
}

/// Calls `f` with the pieces of a block and their distances, of one head several at once if their distances agree.
#[inline(always)]
fn runs(block: &Block, heads: &Range<usize>, ahead: impl Fn(usize) -> isize, mut f: impl FnMut(KeyRange, isize)) {
    let mut run = None;
    for (index, keys) in block.pieces() {
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

/// The distances in bytes from a piece to the one that is read some pieces later: K of the block, then its V, then K of the next
/// block.
struct PrefetchDistances<'a> {
    k: KeyPointers<'a, u8>,
    v: KeyPointers<'a, u8>,
    key_range: KeyRange,
    by: usize,
    /// The block is whole and of one KV head. Then memory is asked for a whole block ahead and, for keys, in several places in
    /// turn, a page or more apart: one stream alone does not get all that memory can give.
    whole: bool,
}

impl<'a> PrefetchDistances<'a> {
    #[inline(always)]
    fn new(block: &Block, k: KeyPointers<'a, u8>, v: KeyPointers<'a, u8>) -> Self {
        let piece = SUBBLOCK * block.tile.kv_heads * block.d * block.p.k.dtype.unit_bytes();
        let whole = block.tile.kv_heads == 1 && block.key_range.len() == BLOCK;
        let by = if whole { SUBBLOCKS } else { PREFETCH_DISTANCE.div_ceil(piece).clamp(1, SUBBLOCKS) };
        Self { k, v, key_range: block.key_range, by, whole }
    }

    #[inline(always)]
    fn of_k(&self, index: usize) -> isize {
        let target = index + self.by;
        let to = if target < SUBBLOCKS {
            self.k.piece(self.key_range, target)
        } else {
            self.v.piece(self.key_range, target - SUBBLOCKS)
        };
        distance(self.k.piece(self.key_range, index), to)
    }

    #[inline(always)]
    fn of_v(&self, index: usize) -> isize {
        let target = index + self.by;
        let to = if target < SUBBLOCKS {
            self.v.piece(self.key_range, target)
        } else {
            self.k.piece(self.key_range, target)
        };
        distance(self.v.piece(self.key_range, index), to)
    }
}

/// In bytes; 0 if there is nothing to go to.
#[inline(always)]
fn distance<T>(from: *const T, to: *const T) -> isize {
    if to.is_null() { 0 } else { to.addr().wrapping_sub(from.addr()) as isize }
}

/// How far ahead of its use memory of whole blocks is asked for once more, now into the first-level cache: a block ahead is more
/// than that holds.
const NEAR_DISTANCE: usize = 512;

/// Asks for the memory of a pair of vectors, `ahead` bytes on, or of whole blocks for that and for what comes soon.
#[inline(always)]
fn prefetch_pair<S: Simd, T>(s: S, p: *const T, ahead: isize, whole: bool) {
    let p = p.cast::<u8>();
    for line in (0..2 * S::LANES * size_of::<T>()).step_by(LINE) {
        let next = p.wrapping_offset(ahead).wrapping_add(line);
        if whole {
            if line % S::PREFETCH_BYTES == 0 {
                s.prefetch_far(next);
            }
            s.prefetch(p.wrapping_add(NEAR_DISTANCE + line));
        } else {
            s.prefetch(next);
        }
    }
}

/// The most products of a row and a key that run side by side ([`Simd::PARALLEL_DOTS`]).
const MAX_PARALLEL_DOTS: usize = 16;

/// Scores of all rows with the keys of a subblock.
pub(crate) struct DirectScores<'a> {
    block: &'a Block<'a>,
    k: KeyPointers<'a, u8>,
    keys: KeyRange,
    /// Keys that are done side by side are far apart.
    spread: bool,
    ahead: isize,
}

impl DirectScores<'_> {
    /// For keys of type `T`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(&self, s: S) {
        let rows = self.block.tile.head_rows;
        for head in 0..self.block.tile.kv_heads {
            // SAFETY: the caller's; the rows of the head are inside the tile.
            unsafe {
                match (rows, S::PARALLEL_DOTS) {
                    // Sixteen keys would fill the tree over lanes, but one row waits for memory, which likes fewer streams.
                    (1, _) => self.dots::<S, T, 1, 8>(s, head, 0),
                    (2, 16) => self.dots::<S, T, 2, 8>(s, head, 0),
                    (2, _) => self.dots::<S, T, 2, 4>(s, head, 0),
                    _ => {
                        for row in (0..rows).step_by(4) {
                            match (rows - row, S::PARALLEL_DOTS) {
                                (1, 16) => self.dots::<S, T, 1, 4>(s, head, row),
                                (1, _) => self.dots::<S, T, 1, 2>(s, head, row),
                                (2, 16) => self.dots::<S, T, 2, 4>(s, head, row),
                                (2, _) => self.dots::<S, T, 2, 2>(s, head, row),
                                (3, 16) => self.dots::<S, T, 3, 4>(s, head, row),
                                (3, _) => self.dots::<S, T, 3, 2>(s, head, row),
                                (_, 16) => self.dots::<S, T, 4, 4>(s, head, row),
                                _ => self.dots::<S, T, 4, 2>(s, head, row),
                            }
                        }
                    }
                }
            }
        }
    }
}

impl DirectScores<'_> {
    /// `R` rows of a head from `row` on times the keys of the piece, `C` keys at a time: vectors run along the head dimension.
    /// Scores of whole groups of `C` keys are written, those outside the piece with numbers of no meaning.
    ///
    /// # Safety
    /// As [`block`]; the rows are inside the tile.
    #[inline(always)]
    unsafe fn dots<S: Simd, T: Load, const R: usize, const C: usize>(&self, s: S, head: usize, row: usize) {
        let Block { tile, scratch, .. } = *self.block;
        let out = scratch.s.wrapping_add((head * tile.head_rows + row) * BLOCK);
        // SAFETY: the caller's; the rows of scores have BLOCK floats.
        unsafe {
            if !self.spread {
                let mut sums = [0.0f32; MAX_PARALLEL_DOTS];
                let KeyRange { low, high } = self.keys;
                for j in (low / C * C..high).step_by(C) {
                    let inside = j >= low && j + C <= high;
                    let key = |c: usize| if inside { j + c } else { (j + c).clamp(low, high - 1) };
                    self.sums::<S, T, R, C>(s, head, row, key, &mut sums);
                    for r in 0..R {
                        std::ptr::copy_nonoverlapping(sums.as_ptr().add(r * C), out.add(r * BLOCK + j), C);
                    }
                }
                return;
            }
            // Sums of keys that are far apart are stored by themselves; turned round, a vector of them has neighbours.
            let mut sums = [[0.0f32; MAX_PARALLEL_DOTS]; MAX_LANES];
            let apart = BLOCK / C;
            let at_once = S::LANES.min(apart);
            for first in (0..apart).step_by(at_once) {
                for (i, sums) in sums.iter_mut().enumerate().take(at_once) {
                    self.sums::<S, T, R, C>(s, head, row, |c| first + i + c * apart, sums);
                }
                for n in (0..R * C).step_by(S::LANES) {
                    let mut x = [s.zero(); MAX_LANES];
                    for (x, sums) in x.iter_mut().zip(&sums).take(S::LANES) {
                        *x = s.load_f32(sums.as_ptr().add(n));
                    }
                    s.transpose(&mut x);
                    for (i, x) in x.iter().enumerate().take(S::LANES.min(R * C - n)) {
                        let (r, c) = ((n + i) / C, (n + i) % C);
                        let to = out.add(r * BLOCK + c * apart + first);
                        if at_once == S::LANES { s.store_f32(to, *x) } else { s.store_part_f32(to, *x, at_once) }
                    }
                }
            }
        }
    }

    /// The products of `R` rows with `C` keys, those of a row side by side.
    ///
    /// # Safety
    /// As [`Self::dots`]; `key` gives keys of the key range.
    #[inline(always)]
    unsafe fn sums<S: Simd, T: Load, const R: usize, const C: usize>(
        &self,
        s: S,
        head: usize,
        row: usize,
        key: impl Fn(usize) -> usize,
        sums: &mut [f32; MAX_PARALLEL_DOTS],
    ) {
        let Block { tile, scratch, d, .. } = *self.block;
        let dp = padded(d);
        let q = scratch.q.wrapping_add((head * tile.head_rows + row) * dp);
        let mut keys = [std::ptr::null(); C];
        for c in 0..C {
            keys[c] = self.k.key(head, key(c)).cast::<T>();
        }
        let mut acc = [[s.zero(); C]; R];
        let mut i = 0;
        // SAFETY: the caller's; a partial load reads what is left of a key, and Q is padded with zeros.
        unsafe {
            while i + 2 * S::LANES <= d {
                for c in 0..C {
                    let at = keys[c].add(i);
                    if row == 0 {
                        prefetch_pair(s, at, self.ahead, self.spread);
                    }
                    let k = T::load_pair(s, at);
                    for r in 0..R {
                        let q = q.add(r * dp + i);
                        acc[r][c] = s.fma(s.load_f32(q), k[0], acc[r][c]);
                        acc[r][c] = s.fma(s.load_f32(q.add(S::LANES)), k[1], acc[r][c]);
                    }
                }
                i += 2 * S::LANES;
            }
            while i < d {
                let part = (d - i).min(S::LANES);
                for c in 0..C {
                    let k = load_up_to(s, keys[c].add(i), part);
                    for r in 0..R {
                        acc[r][c] = s.fma(s.load_f32(q.add(r * dp + i)), k, acc[r][c]);
                    }
                }
                i += part;
            }
            for n in (0..R * C).step_by(S::LANES) {
                let mut lanes = [s.zero(); MAX_LANES];
                for (i, lane) in lanes.iter_mut().enumerate().take(S::LANES.min(R * C - n)) {
                    *lane = acc[(n + i) / C][(n + i) % C];
                }
                s.store_f32(sums.as_mut_ptr().add(n), s.sum_lanes(&lanes));
            }
        }
    }
}

/// Adds the weighted values of a subblock to the accumulators of some heads' rows.
pub(crate) struct DirectValues<'a> {
    block: &'a Block<'a>,
    v: KeyPointers<'a, u8>,
    heads: Range<usize>,
    keys: KeyRange,
    ahead: isize,
    whole: bool,
}

impl DirectValues<'_> {
    /// For values of type `T`; see [`CacheValues`] for `PAIRS`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load, const PAIRS: bool>(&self, s: S) {
        let Block { tile, scratch, dv, .. } = *self.block;
        let wide = S::PARALLEL_DOTS == 16;
        for head in self.heads.clone() {
            for row in (0..tile.head_rows).step_by(4) {
                let first = head * tile.head_rows + row;
                let piece = WeightedValues {
                    weights: scratch.s.wrapping_add(first * BLOCK + self.keys.low),
                    acc: scratch.acc.wrapping_add(first * padded(dv)),
                    acc_row: padded(dv),
                    v: CacheValues::<T, PAIRS> { rows: self.v.cast(), head, first: self.keys.low },
                    keys: self.keys.len(),
                    ahead: if row == 0 { self.ahead } else { 0 },
                    whole: self.whole,
                };
                // SAFETY: the caller's; the rows are inside the tile.
                unsafe {
                    match (tile.head_rows - row, wide) {
                        (1, _) => piece.columns::<S, 1, 8>(s, dv),
                        (2, true) => piece.columns::<S, 2, 8>(s, dv),
                        (2, false) => piece.columns::<S, 2, 4>(s, dv),
                        (3, true) => piece.columns::<S, 3, 8>(s, dv),
                        (3, false) => piece.columns::<S, 3, 2>(s, dv),
                        (_, true) => piece.columns::<S, 4, 4>(s, dv),
                        (_, false) => piece.columns::<S, 4, 2>(s, dv),
                    }
                }
            }
        }
    }
}

/// Where the values lie that [`WeightedValues`] adds.
pub(super) trait ValueRows {
    type Element: Load;
    /// Whether they are the cache's own, and others come after them.
    const IN_CACHE: bool;
    /// An element of a key. `offset` is [`Self::offset`] of its column, in bytes.
    fn at(&self, key: usize, offset: isize) -> *const Self::Element;
    fn offset(&self, column: usize) -> isize;

    /// Adds keys `j` and `j + 1`.
    ///
    /// # Safety
    /// As [`WeightedValues::columns`].
    #[inline(always)]
    unsafe fn add_two<S: Simd, const R: usize, const N: usize>(
        s: S,
        weighted: &WeightedValues<Self>,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) where
        Self: Sized,
    {
        // SAFETY: the caller's.
        unsafe { weighted.add_each(s, j, offset, part, sums) };
    }
}

/// In the cache: keys of a block and KV head, counted from `first`. `PAIRS`: every even one begins a pair of slots, with the next.
struct CacheValues<'a, T, const PAIRS: bool> {
    rows: KeyPointers<'a, T>,
    head: usize,
    first: usize,
}

impl<T: Load, const PAIRS: bool> ValueRows for CacheValues<'_, T, PAIRS> {
    type Element = T;
    const IN_CACHE: bool = true;
    #[inline(always)]
    fn at(&self, key: usize, offset: isize) -> *const T {
        self.rows.key(0, self.first + key).wrapping_byte_offset(offset)
    }
    #[inline(always)]
    fn offset(&self, column: usize) -> isize {
        self.rows.head_offset(self.head) + (if PAIRS { 2 } else { 1 } * column * size_of::<T>()) as isize
    }

    #[inline(always)]
    unsafe fn add_two<S: Simd, const R: usize, const N: usize>(
        s: S,
        weighted: &WeightedValues<Self>,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) {
        if !PAIRS {
            // SAFETY: the caller's.
            unsafe { weighted.add_each(s, j, offset, part, sums) };
            return;
        }
        let pair = weighted.v.at(j, offset);
        if weighted.ahead != 0 {
            for n in 0..N {
                prefetch_pair(s, pair.wrapping_add(2 * n * S::LANES), weighted.ahead, weighted.whole);
            }
        }
        // SAFETY: the caller's.
        unsafe {
            let x = load_two::<S, T, N>(s, pair, part);
            for (i, x) in x.iter().enumerate() {
                weighted.add_values(s, j + i, x, sums);
            }
        }
    }
}

/// In a packed copy, so many floats apart.
pub(super) struct PackedValues {
    pub first: *const f32,
    pub width: usize,
}

impl ValueRows for PackedValues {
    type Element = f32;
    const IN_CACHE: bool = false;
    #[inline(always)]
    fn at(&self, key: usize, offset: isize) -> *const f32 {
        self.first.wrapping_add(key * self.width).wrapping_byte_offset(offset)
    }
    #[inline(always)]
    fn offset(&self, column: usize) -> isize {
        (column * size_of::<f32>()) as isize
    }
}

/// `acc[r] += sum over keys of weights[r][key] * v[key]`, one key after the other. Rows of weights lie [`BLOCK`] apart.
pub(super) struct WeightedValues<V> {
    pub weights: *const f32,
    pub acc: *mut f32,
    /// Floats from one accumulator to the next.
    pub acc_row: usize,
    pub v: V,
    pub keys: usize,
    /// Bytes from a value to the memory that is prefetched with it; 0: none.
    pub ahead: isize,
    /// See [`prefetch_pair`].
    pub whole: bool,
}

impl<V: ValueRows> WeightedValues<V> {
    /// All `dv` columns of `R` rows, up to `N` vectors at a time.
    ///
    /// # Safety
    /// The pointers are valid for `R` rows, `keys` keys and `dv` columns; accumulators are padded to whole vectors.
    #[inline(always)]
    unsafe fn columns<S: Simd, const R: usize, const N: usize>(&self, s: S, dv: usize) {
        let mut i = 0;
        // SAFETY: the caller's; i never passes dv.
        unsafe {
            while i + N * S::LANES <= dv {
                self.add::<S, R, N>(s, i, S::LANES);
                i += N * S::LANES;
            }
            while N > 4 && i + 4 * S::LANES <= dv {
                self.add::<S, R, 4>(s, i, S::LANES);
                i += 4 * S::LANES;
            }
            while N > 2 && i + 2 * S::LANES <= dv {
                self.add::<S, R, 2>(s, i, S::LANES);
                i += 2 * S::LANES;
            }
            while i < dv {
                let part = (dv - i).min(S::LANES);
                self.add::<S, R, 1>(s, i, part);
                i += part;
            }
        }
    }

    /// `N` vectors of columns from `column` on, or one of `part` elements.
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    pub unsafe fn add<S: Simd, const R: usize, const N: usize>(&self, s: S, column: usize, part: usize) {
        let acc = self.acc.wrapping_add(column);
        let mut sums = [[s.zero(); N]; R];
        // SAFETY: the caller's.
        unsafe {
            for r in 0..R {
                for n in 0..N {
                    sums[r][n] = s.load_f32(acc.add(r * self.acc_row + n * S::LANES));
                }
            }
            // Two keys a turn: every instruction that is no FMA counts here, for the front end as much as for the ports.
            let offset = self.v.offset(column);
            for turn in 0..self.keys / 2 {
                V::add_two(s, self, 2 * turn, offset, part, &mut sums);
            }
            if self.keys % 2 == 1 {
                self.add_key(s, self.keys - 1, offset, part, &mut sums);
            }
            for r in 0..R {
                for n in 0..N {
                    s.store_f32(acc.add(r * self.acc_row + n * S::LANES), sums[r][n]);
                }
            }
        }
    }
}

impl<V: ValueRows> WeightedValues<V> {
    /// Two keys of [`Self::add`], each by itself.
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    unsafe fn add_each<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) {
        // SAFETY: the caller's.
        unsafe {
            self.add_key(s, j, offset, part, sums);
            self.add_key(s, j + 1, offset, part, sums);
        }
    }

    /// One key of [`Self::add`].
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    unsafe fn add_key<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) {
        let v = self.v.at(j, offset);
        let mut x = [s.zero(); N];
        // SAFETY: the caller's.
        unsafe {
            if N == 1 {
                x[0] = load_up_to(s, v, part);
            } else {
                for n in (0..N).step_by(2) {
                    let at = v.add(n * S::LANES);
                    if V::IN_CACHE && self.ahead != 0 {
                        prefetch_pair(s, at, self.ahead, self.whole);
                    }
                    [x[n], x[n + 1]] = V::Element::load_pair(s, at);
                }
            }
            self.add_values(s, j, &x, sums);
        }
    }

    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    unsafe fn add_values<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        j: usize,
        x: &[S::V; N],
        sums: &mut [[S::V; N]; R],
    ) {
        for r in 0..R {
            // SAFETY: the caller's.
            let w = s.splat(unsafe { *self.weights.add(r * BLOCK + j) });
            for n in 0..N {
                sums[r][n] = s.fma(w, x[n], sums[r][n]);
            }
        }
    }
}

/// A vector of which `part` elements are read.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(super) unsafe fn load_up_to<S: Simd, T: Load>(s: S, from: *const T, part: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe { if part == S::LANES { T::load(s, from) } else { T::load_part(s, from, part) } }
}

/// Whether the values of a key range and KV head hold no NaN and no infinity.
///
/// # Safety
/// As [`block`].
#[inline(always)]
pub(crate) unsafe fn all_finite<S: Simd, T: Load>(
    s: S,
    v: KeyPointers<u8>,
    head: usize,
    key_range: KeyRange,
    dv: usize,
) -> bool {
    if T::ALWAYS_FINITE {
        return true;
    }
    for j in key_range.low..key_range.high {
        let row = v.key(head, j).cast::<T>();
        let mut i = 0;
        while i < dv {
            let part = (dv - i).min(S::LANES);
            // SAFETY: `part` elements are left.
            if !s.all_finite(unsafe { load_up_to(s, row.add(i), part) }) {
                return false;
            }
            i += part;
        }
    }
    true
}

/// Adds the weighted values of the keys that one row sees, key by key: for blocks in which hidden values are not finite.
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

/// One row of a tile, one key of a block.
pub(crate) struct OneValue<'a> {
    block: &'a Block<'a>,
    row: usize,
    key: usize,
    v: KeyPointers<'a, u8>,
}

impl OneValue<'_> {
    /// Adds the weighted value, of type `T`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(&self, s: S) {
        let Self { block: &Block { tile, scratch, dv, .. }, row, key, v } = *self;
        let one = WeightedValues {
            weights: scratch.s.wrapping_add(row * BLOCK + key),
            acc: scratch.acc.wrapping_add(row * padded(dv)),
            acc_row: padded(dv),
            v: CacheValues::<T, false> { rows: v.cast(), head: row / tile.head_rows, first: key },
            keys: 1,
            ahead: 0,
            whole: false,
        };
        // SAFETY: the caller's.
        unsafe { one.columns::<S, 1, 2>(s, dv) }
    }
}
