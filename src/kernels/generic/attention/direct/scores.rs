//! Dot products of query rows with keys that lie in the cache.

use super::prefetch::{Ahead, Distances, begins_half_line};
use super::{PASS_ROWS, rows_in_loops};
use crate::kernels::generic::attention::{Block, KeyPointers, SUBBLOCK, Units};
use crate::kernels::simd::{MAX_LANES, Outlined, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use crate::problem::tile::PACK_ROWS;
use crate::tuning::Prefetch;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Room for the sums of a register tile, in whole vectors.
pub const MAX_PARALLEL_DOTS: usize = 32;

/// Bytes of the smallest first-level cache.
const FIRST_LEVEL: usize = 32 << 10;

/// Scores of all rows with the keys of a subblock.
#[derive(Clone, Copy)]
pub(crate) struct DirectScores<'a> {
    pub block: &'a Block<'a>,
    pub k: KeyPointers<'a, u8>,
    pub keys: KeyRange,
    /// Keys that are computed side by side are far apart in memory.
    pub spread: bool,
    pub ahead: Ahead,
}

impl DirectScores<'_> {
    /// Scores for keys in units of `T`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Units>(self, s: S) {
        let rows = self.block.tile.head_rows;
        // Keys of a subblock stay in the first-level cache from pass to pass, if the queries of one leave them room.
        let long =
            self.keys.len() <= SUBBLOCK && (SUBBLOCK + PASS_ROWS) * self.block.d * size_of::<f32>() > FIRST_LEVEL;
        let most = if long { PASS_ROWS / 2 } else { PASS_ROWS };
        for head in 0..self.block.tile.kv_heads {
            // SAFETY: the caller's; the rows of the head are inside the tile.
            unsafe {
                if const { S::FEW_LOOPS || !S::FEW_REGISTERS || T::ELEMENTS > 1 } {
                    rows_in_loops!(S, rows, most, 8, |row| self.dots::<S, T>(s, head, row));
                    continue;
                }
                // What sixes or threes leave goes by four.
                let mut done = 0;
                if const { is_tall::<S, T>(6, 2) } && rows >= PACK_ROWS {
                    done = rows - if rows % 6 == 2 { 8 } else { rows % 6 };
                    for row in (0..done).step_by(6) {
                        self.dots::<S, T, 6, 2>(s, head, row);
                    }
                } else if const { twelve::<S, T>() } && rows >= PACK_ROWS {
                    done = rows - rows % 3 * 4;
                    for row in (0..done).step_by(3) {
                        self.dots::<S, T, 3, 4>(s, head, row);
                    }
                }
                for row in (done..rows).step_by(4) {
                    let left = rows - row;
                    // Loops of one and two rows have no test of their own for the first rows.
                    let few = if row == 0 { self } else { Self { ahead: Ahead::NONE, ..self } };
                    // Sixteen keys would fill the tree over lanes, but one row is bound by memory, where fewer streams are faster.
                    match left {
                        1 => few.dots::<S, T, 1, 8>(s, head, row),
                        2 => few.dots::<S, T, 2, 4>(s, head, row),
                        3 if const { twelve::<S, T>() } => self.dots::<S, T, 3, 4>(s, head, row),
                        3 => self.dots::<S, T, 3, 2>(s, head, row),
                        _ => self.dots::<S, T, 4, 2>(s, head, row),
                    }
                }
            }
        }
    }
}

/// How a loop takes its sums over lanes and prefetches.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Sums in one step; prefetches by the kind of the tuning.
    Wide,
    /// Sums in two steps; prefetches into both levels.
    Narrow,
    /// Sums in two steps; prefetches into the first-level cache only.
    NarrowNear,
}

/// Whether a loop can take sums over lanes in two steps, for several rows.
const fn is_narrow<S: Simd, T: Units>(rows: usize, keys: usize) -> bool {
    S::NARROW_LOOPS && T::ELEMENTS == 1 && rows > 1 && rows * keys == S::LANES
}

/// Whether loops have twelve sums, which keep two ports busy. With keys that are widened, they are more than sixteen registers hold.
const fn twelve<S: Simd, T: Units>() -> bool {
    S::FEW_REGISTERS && T::ELEMENTS == 1 && size_of::<T::Unit>() == size_of::<f32>()
}

/// Whether six rows and two keys have a loop of their own at levels with few registers, for elements of two bytes: twelve sums keep two
/// ports busy, and leave registers for a vector of both keys and of one row.
const fn is_tall<S: Simd, T: Units>(rows: usize, keys: usize) -> bool {
    S::NARROW_LOOPS && T::ELEMENTS == 1 && size_of::<T::Unit>() == 2 && rows == 6 && keys == 2
}

/// [`DirectScores::in_two_steps`] for every `step` of some keys by [`Way::NarrowNear`]: a function of its own, since loops of several
/// ways in one take registers from each other.
struct NearScores<'a, T, const R: usize, const C: usize> {
    of: &'a DirectScores<'a>,
    head: usize,
    row: usize,
    keys: Range<usize>,
    step: usize,
    apart: Option<usize>,
    units: PhantomData<T>,
}

impl<T: Units, const R: usize, const C: usize> Outlined for NearScores<'_, T, R, C> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { of, head, row, keys, step, apart, .. } = self;
        let distances = of.distances(row, Way::NarrowNear, C);
        // SAFETY: the caller's.
        unsafe {
            match apart {
                Some(apart) => {
                    for first in keys.step_by(step) {
                        of.in_two_steps::<S, T, R, C>(s, (head, row), first, Some(apart), Way::NarrowNear, distances);
                    }
                }
                None => {
                    for first in keys.step_by(step) {
                        of.in_two_steps::<S, T, R, C>(s, (head, row), first, None, Way::NarrowNear, distances);
                    }
                }
            }
        }
    }
}

impl DirectScores<'_> {
    /// The loop for `R` rows and `C` keys. Narrow loops over f32 have no way of their own for every kind of prefetch.
    #[inline(always)]
    fn way<S: Simd, T: Units, const R: usize, const C: usize>(&self) -> Way {
        let bytes = const { size_of::<T::Unit>() };
        match self.ahead.kind {
            _ if const { !is_narrow::<S, T>(R, C) } => Way::Wide,
            Prefetch::Off | Prefetch::NextKeys if bytes > 1 => Way::NarrowNear,
            Prefetch::BothLevels => Way::Narrow,
            _ if bytes < size_of::<f32>() => Way::Narrow,
            _ => Way::Wide,
        }
    }

    /// Prefetch distances of rows from `row` on, `keys` keys at a time. What the first rows of a head have read, the others find.
    #[inline(always)]
    fn distances(&self, row: usize, way: Way, keys: usize) -> Distances {
        let distances = if row == 0 { self.ahead } else { Ahead::NONE }.distances();
        if way == Way::Narrow && self.block.tile.kv_heads > 1 {
            // The next keys of this head: with what another head reads next, rows of some sizes would compete for a few sets of the
            // first-level cache.
            return distances.near(self.k.seq_offset(keys));
        }
        distances
    }

    /// The same in the fewest loops, for cases that hardly occur.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run_short<S: Simd, T: Units>(self, s: S) {
        for head in 0..self.block.tile.kv_heads {
            for row in 0..self.block.tile.head_rows {
                // SAFETY: the caller's; the rows of the head are inside the tile.
                unsafe { Self { spread: false, ..self }.dots::<S, T, 1, 2>(s, head, row) };
            }
        }
    }

    /// `R` rows of a head, from `row` on, times the keys of the subblock, `C` keys at a time; vectors run along the head dimension.
    /// Scores of whole groups of `C` keys are written; those outside the subblock are undefined.
    ///
    /// # Safety
    /// As [`block`]; the rows are inside the tile.
    #[inline(always)]
    pub unsafe fn dots<S: Simd, T: Units, const R: usize, const C: usize>(&self, s: S, head: usize, row: usize) {
        let Block { tile, scratch, .. } = *self.block;
        let out = scratch.s.wrapping_add((head * tile.head_rows + row) * BLOCK);
        let way = self.way::<S, T, R, C>();
        let distances = self.distances(row, way, C);
        // SAFETY: the caller's; the rows of scores have BLOCK floats.
        unsafe {
            if const { T::ELEMENTS > 1 } || !self.spread {
                let mut sums = [0.0f32; MAX_PARALLEL_DOTS];
                let KeyRange { low, high } = self.keys;
                let mut next = low / C * C;
                while next < high {
                    let j = next;
                    if const { is_narrow::<S, T>(R, C) } && way != Way::Wide && j >= low && j + S::LANES <= high {
                        next += (high - j) / S::LANES * S::LANES;
                        let (keys, step) = (j..next, S::LANES);
                        if way == Way::NarrowNear {
                            s.outline(NearScores::<T, R, C> {
                                of: self,
                                head,
                                row,
                                keys,
                                step,
                                apart: None,
                                units: PhantomData,
                            });
                        } else {
                            for j in keys.step_by(step) {
                                self.in_two_steps::<S, T, R, C>(s, (head, row), j, None, Way::Narrow, distances);
                            }
                        }
                        continue;
                    }
                    next += C;
                    // The first tokens of a sequence have few keys: a last one alone is not worth the products of several.
                    if const { T::ELEMENTS == 1 && R >= 4 && C > 1 } && high - j == 1 {
                        self.sums::<S, T, R, 1>(s, head, row, |_| j, distances, &mut sums);
                        for r in 0..R {
                            *out.add(r * BLOCK + j) = sums[r];
                        }
                        return;
                    }
                    let inside = j >= low && j + C <= high;
                    let key = |c: usize| if inside { j + c } else { (j + c).clamp(low, high - 1) };
                    self.sums::<S, T, R, C>(s, head, row, key, distances, &mut sums);
                    for r in 0..R {
                        std::ptr::copy_nonoverlapping(sums.as_ptr().add(r * C), out.add(r * BLOCK + j), C);
                    }
                }
                return;
            }
            // Sums of keys that are far apart are collected and transposed, so that stores write neighbouring keys.
            let apart = BLOCK / C;
            if const { is_narrow::<S, T>(R, C) } && way != Way::Wide {
                let (keys, step) = (0..apart, S::LANES / C);
                if way == Way::NarrowNear {
                    let apart = Some(apart);
                    s.outline(NearScores::<T, R, C> { of: self, head, row, keys, step, apart, units: PhantomData });
                } else {
                    for first in keys.step_by(step) {
                        self.in_two_steps::<S, T, R, C>(s, (head, row), first, Some(apart), Way::Narrow, distances);
                    }
                }
                return;
            }
            let mut sums = [[0.0f32; MAX_PARALLEL_DOTS]; MAX_LANES];
            let at_once = S::LANES.min(apart);
            for first in (0..apart).step_by(at_once) {
                for (i, sums) in sums.iter_mut().enumerate().take(at_once) {
                    self.sums::<S, T, R, C>(s, head, row, |c| first + i + c * apart, distances, sums);
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

    /// The scores of `R` rows for a vector of keys from `first` on: neighbours, or `C` runs of neighbours that are `apart`. The first step
    /// of the sum over lanes is taken with the products of `C` keys, the others together.
    ///
    /// # Safety
    /// As [`Self::dots`]; the keys are in the key range.
    #[inline(always)]
    unsafe fn in_two_steps<S: Simd, T: Units, const R: usize, const C: usize>(
        &self,
        s: S,
        (head, row): (usize, usize),
        first: usize,
        apart: Option<usize>,
        way: Way,
        distances: Distances,
    ) {
        let Block { tile, scratch, .. } = *self.block;
        let out = scratch.s.wrapping_add((head * tile.head_rows + row) * BLOCK + first);
        let turns = S::LANES / C;
        let mut halves = MaybeUninit::<[[f32; MAX_LANES / 2 * MAX_LANES]; R]>::uninit();
        let half = halves.as_mut_ptr().cast::<f32>();
        let half = |r: usize, i: usize| half.wrapping_add((r * MAX_LANES / 2 + i) * MAX_LANES);
        // SAFETY: the caller's; the rows of scores have BLOCK floats, and halves that are read have been written.
        unsafe {
            for turn in 0..turns {
                let acc = match apart {
                    Some(apart) => {
                        self.products::<S, T, R, C>(s, head, row, |c| first + turn + c * apart, way, distances)
                    }
                    None => self.products::<S, T, R, C>(s, head, row, |c| first + turn * C + c, way, distances),
                };
                for r in 0..R {
                    for c in 0..C / 2 {
                        s.store_f32(half(r, c * turns + turn), s.half_sums(acc[r][c], acc[r][c + C / 2]));
                    }
                }
            }
            for r in 0..R {
                let mut halves = [s.zero(); MAX_LANES / 2];
                for (i, to) in halves.iter_mut().enumerate().take(S::LANES / 2) {
                    *to = s.load_f32(half(r, i));
                }
                let (sums, out) = (s.sum_halves(&halves), out.add(r * BLOCK));
                let mut lanes = [0.0f32; MAX_LANES];
                s.store_f32(lanes.as_mut_ptr(), sums);
                match apart {
                    Some(apart) => {
                        for c in 0..C {
                            std::ptr::copy_nonoverlapping(lanes.as_ptr().add(c * turns), out.add(c * apart), turns);
                        }
                    }
                    None => {
                        for turn in 0..turns {
                            for c in 0..C {
                                *out.add(turn * C + c) = lanes[c * turns + turn];
                            }
                        }
                    }
                }
            }
        }
    }

    /// The products of `R` rows with `C` keys, as `[R][C]`.
    ///
    /// # Safety
    /// As [`Self::dots`]; `key` gives keys of the key range.
    #[inline(always)]
    pub unsafe fn sums<S: Simd, T: Units, const R: usize, const C: usize>(
        &self,
        s: S,
        head: usize,
        row: usize,
        key: impl Fn(usize) -> usize,
        distances: Distances,
        sums: &mut [f32; MAX_PARALLEL_DOTS],
    ) {
        // SAFETY: the caller's.
        unsafe {
            let narrow = const { is_narrow::<S, T>(R, C) && size_of::<T::Unit>() < size_of::<f32>() };
            let way = if narrow { Way::Narrow } else { Way::Wide };
            let acc = self.products::<S, T, R, C>(s, head, row, key, way, distances);
            for n in (0..R * C).step_by(S::LANES) {
                let mut lanes = [s.zero(); MAX_LANES];
                for (i, lane) in lanes.iter_mut().enumerate().take(S::LANES.min(R * C - n)) {
                    *lane = acc[(n + i) / C][(n + i) % C];
                }
                s.store_f32(sums.as_mut_ptr().add(n), s.sum_lanes(&lanes));
            }
        }
    }

    /// The lanes of these products, which are to be added up.
    ///
    /// # Safety
    /// As [`Self::sums`].
    #[inline(always)]
    unsafe fn products<S: Simd, T: Units, const R: usize, const C: usize>(
        &self,
        s: S,
        head: usize,
        row: usize,
        key: impl Fn(usize) -> usize,
        way: Way,
        distances: Distances,
    ) -> [[S::V; C]; R] {
        let Block { tile, scratch, d, .. } = *self.block;
        let q_row = scratch.q_row;
        let q = scratch.q.wrapping_add((head * tile.head_rows + row) * q_row);
        let mut keys = [std::ptr::null(); C];
        for c in 0..C {
            keys[c] = self.k.key(head, key(c)).cast::<T::Unit>();
        }
        let mut acc = [[s.zero(); C]; R];
        let mut i = 0;
        // SAFETY: the caller's; a partial load reads what is left of a key, and Q is padded with zeros.
        unsafe {
            let step = (2 * S::LANES).max(T::ELEMENTS);
            while i + step <= d {
                if const { T::ELEMENTS > 1 } && begins_half_line::<T::Unit>(i / T::ELEMENTS) {
                    for key in keys {
                        distances.prefetch(s, key.add(i / T::ELEMENTS));
                    }
                }
                if const { is_tall::<S, T>(R, C) } {
                    for key in keys {
                        distances.prefetch(s, key.add(i));
                    }
                    for half in 0..2 {
                        let mut k = [s.zero(); C];
                        for c in 0..C {
                            k[c] = T::half(s, keys[c].add(i), 0, half);
                        }
                        for r in 0..R {
                            let q = s.load_f32(q.add(r * q_row + i + half * S::LANES));
                            for c in 0..C {
                                acc[r][c] = s.fma(q, k[c], acc[r][c]);
                            }
                        }
                    }
                    i += step;
                    continue;
                }
                let at_once = const { R == 4 && S::FEW_REGISTERS && size_of::<T::Unit>() == 1 };
                if const { is_narrow::<S, T>(R, C) } && way != Way::Wide || at_once {
                    // With few registers, what is loaded of Q has to be used at once, or accumulators go to memory.
                    let mut k = [[s.zero(); 2]; C];
                    for c in 0..C {
                        let unit = keys[c].add(i);
                        if way == Way::NarrowNear {
                            distances.prefetch_near(s, unit);
                        } else {
                            distances.prefetch(s, unit);
                        }
                        k[c] = T::pair(s, unit, 0);
                    }
                    for half in 0..2 {
                        for r in 0..R {
                            let q = s.load_f32(q.add(r * q_row + i + half * S::LANES));
                            for c in 0..C {
                                acc[r][c] = s.fma(q, k[c][half], acc[r][c]);
                            }
                        }
                    }
                    i += step;
                    continue;
                }
                for c in 0..C {
                    let unit = keys[c].add(i / T::ELEMENTS);
                    if R == 4 && size_of::<T::Unit>() == 1 {
                        distances.prefetch(s, unit);
                    } else if const { T::ELEMENTS == 1 } && (const { R < 3 } || row == 0) {
                        self.ahead.pair(s, unit);
                    }
                    for n in (0..step).step_by(2 * S::LANES) {
                        let k = T::pair(s, unit, n);
                        for r in 0..R {
                            let q = q.add(r * q_row + i + n);
                            acc[r][c] = s.fma(s.load_f32(q), k[0], acc[r][c]);
                            acc[r][c] = s.fma(s.load_f32(q.add(S::LANES)), k[1], acc[r][c]);
                        }
                    }
                }
                i += step;
            }
            while const { T::ELEMENTS == 1 } && i < d {
                let part = (d - i).min(S::LANES);
                for c in 0..C {
                    let k = T::rest(s, keys[c].add(i), part);
                    for r in 0..R {
                        acc[r][c] = s.fma(s.load_f32(q.add(r * q_row + i)), k, acc[r][c]);
                    }
                }
                i += part;
            }
        }
        acc
    }
}
