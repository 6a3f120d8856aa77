//! Scores of keys in blocks by products of integers, of quarters of a vector ([`Precision::Integer`](crate::Precision::Integer)).
//!
//! Rows are quantised as for int8 keys. Elements of a block are `d (q - zero) + m`, with integers q and zero. So the products of a row's
//! units with a block add up to `d (sum of q x - zero * sum of x) + m * sum of x`: the sums are integers and exact, of at most
//! 32 * 255 * 127. Products by d and m, and sums over blocks, are f32, then comes the scale of the row.
//!
//! A vector of units has 16 units of each of as many blocks as it has quarters of 16 bytes, and a second vector the other 16, so that two
//! products with the same sums leave four numbers per block. Those of four rows with a key, or of one row with four keys, are
//! transposed and added up. What results has one number per block and row (or key), and is multiplied by the factors of the blocks.
//! The order of f32 operations is the same in both cases.
//!
//! Up to four rows read blocks in their loop: bytes, and factors and minima as f32, four times each, stay in registers. For more, the keys
//! of a subblock are taken apart into memory first, and one loop for all formats passes over them once per four rows. (Vectors that are
//! stored and loaded again at once wait for each other: with one to four rows, that cost as much as the products.)

use super::integer_blocks::{BlockUnits, HALF, IntegerUnit, Kind, Products, ROWS, V, fifth_bits, parts};
use super::{Block, DirectScores, SUBBLOCK, Scratch};
use crate::kernels::generic::attention::integer::ByteProducts;
use crate::kernels::generic::blocks::N;
use crate::kernels::generic::quantize;
use crate::kernels::simd::{LINE, Simd};
use crate::problem::grid::{BLOCK, KeyRange, padded};
use crate::problem::limits::MAX_HEAD_DIM;
use std::marker::PhantomData;

/// Products of bytes with blocks. A vector of units has [`HALF`] bytes of each of [`Self::BLOCKS`] blocks, and vectors of sums and of f32
/// have four lanes for each.
pub(crate) trait BlockProducts: BlockUnits {
    /// The first, or with `SECOND` the second [`HALF`] bytes of the numbers of `n` blocks at `p`, and zeros for blocks beyond them.
    ///
    /// # Safety
    /// The blocks are readable.
    unsafe fn halves<U: IntegerUnit, const SECOND: bool>(self, p: *const u8, n: usize) -> Self::Units;
    /// The factors, or with `MINIMA` the minima, of `n` blocks at `p`, and zeros.
    ///
    /// # Safety
    /// The blocks are readable.
    unsafe fn factors<U: IntegerUnit, const MINIMA: bool>(self, p: *const u8, n: usize) -> V<Self>;

    /// In the four lanes of each block, the sum of these lanes of each of four vectors.
    fn four(self, x: [Self::Sums; 4]) -> Self::Sums;
    /// For products of matrices, where a level has them: makes copies of four rows of `d` elements, of which the first two are not the last
    /// two, behind their units.
    ///
    /// # Safety
    /// The rows are those that [`quantize_rows`] has written.
    #[inline(always)]
    unsafe fn prepare_matrices(self, _rows: [*const f32; 4], _d: usize) {}
    /// Where a level has products of matrices: the sums of products of the units of a part of four keys with those of four rows. For each
    /// key, in the four lanes of each block, one of each row.
    ///
    /// # Safety
    /// The rows are those of [`Self::prepare_matrices`].
    #[inline(always)]
    unsafe fn matrix_totals(
        self,
        _keys: [[Self::Units; 2]; 4],
        _rows: [*const f32; 4],
        _part: usize,
        _d: usize,
    ) -> Option<[Self::Sums; 4]> {
        None
    }
    /// `a - b`.
    fn difference(self, a: Self::Sums, b: Self::Sums) -> V<Self>;
    /// In the four lanes of each block, these lanes of one of the vectors each, whose four lanes are equal.
    fn one_of_each(self, x: [V<Self>; 4]) -> V<Self>;
    /// The sums over blocks of each of the four lanes.
    fn over_blocks(self, x: V<Self>) -> [f32; 4];
    /// For each of the four lanes, its factor times its sums over blocks of four vectors, added as in [`Self::over_blocks`].
    fn over_blocks_of_four(self, x: [V<Self>; 4], factors: [f32; 4]) -> [[f32; 4]; 4];
}

/// The transpose, times a factor per row.
#[inline(always)]
pub(crate) fn transposed(x: [[f32; 4]; 4], factors: [f32; 4]) -> [[f32; 4]; 4] {
    std::array::from_fn(|i| [x[0][i] * factors[i], x[1][i] * factors[i], x[2][i] * factors[i], x[3][i] * factors[i]])
}

/// What is made of [`BlockProducts::BLOCKS`] blocks of a key.
#[derive(Clone, Copy)]
#[repr(C)]
struct Part<P: ByteProducts> {
    units: [P::Units; 2],
    factors: V<P>,
    minima: V<P>,
}

/// For four rows, or one, and some blocks, the sums of their units; times the zero, and as floats.
#[repr(C)]
struct RowSums<P: ByteProducts> {
    offsets: P::Sums,
    sums: V<P>,
}

/// The memory of scratch that a call uses, beside the rows.
struct Memory<P: ByteProducts> {
    /// A scale per row of the tile.
    scales: *mut f32,
    /// One per part of a head.
    sums: *mut RowSums<P>,
    /// [`SUBBLOCK`] times the parts of a head.
    keys: *mut Part<P>,
}

impl<P: ByteProducts> Memory<P> {
    #[inline(always)]
    fn of(scratch: &Scratch) -> Self {
        // Both are of the size of a block of 64 keys in f32, at least 8 KiB.
        Self { scales: scratch.kt, sums: scratch.kt.wrapping_add(ROWS).cast(), keys: scratch.k_block.cast() }
    }
}

/// Makes units of the rows of a tile, in the order of [`BlockProducts::halves`], with zeros up to whole parts.
///
/// # Safety
/// `scratch` has `rows` rows of `padded(d)` floats.
#[inline(always)]
pub(crate) unsafe fn quantize_rows<P: BlockProducts>(p: P, scratch: &Scratch, rows: usize, d: usize) {
    debug_assert!(rows <= ROWS);
    let mut units = [[0i8; HALF]; MAX_HEAD_DIM / HALF];
    for r in 0..rows {
        let row = scratch.q.wrapping_add(r * padded(d));
        // SAFETY: the caller's; a row has four times as many bytes as elements, of which there are at most MAX_HEAD_DIM.
        unsafe {
            *Memory::<P>::of(scratch).scales.add(r) = quantize::row(p.level(), row, units.as_mut_ptr().cast(), d);
            let to = row.cast::<[i8; HALF]>();
            for part in 0..parts::<P>(d) {
                for i in 0..2 * P::BLOCKS {
                    let half = 2 * (part * P::BLOCKS + i % P::BLOCKS) + i / P::BLOCKS;
                    let units = if half < d / HALF { units[half] } else { [0; HALF] };
                    to.add(part * 2 * P::BLOCKS + i).write(units);
                }
            }
        }
    }
}

/// Scores of all rows with the keys of some subblocks.
///
/// # Safety
/// As [`DirectScores::run`]; keys are blocks of type `U`, and [`quantize_rows`] has written the rows. `products` is
/// [`multiply`] with the same `P`.
#[inline(always)]
pub(crate) unsafe fn scores<P: BlockProducts, U: IntegerUnit>(
    p: P,
    args: &DirectScores,
    products: unsafe fn(&Products),
) {
    let KeyRange { low, high } = args.keys;
    let rows = args.block.tile.head_rows;
    for head in 0..args.block.tile.kv_heads {
        // SAFETY: the caller's, here and below.
        unsafe {
            if rows <= 4 {
                let few = Products::of::<P, U>(args, head, args.keys);
                let keys = InCache::<P, U>::new(args, head);
                if rows == 1 {
                    one_row(p, &few, 0, &keys)
                } else {
                    four_rows(p, &few, 0, rows, &keys)
                }
                continue;
            }
            for first in (low / SUBBLOCK * SUBBLOCK..high).step_by(SUBBLOCK) {
                let keys = KeyRange { low: low.max(first), high: high.min(first + SUBBLOCK) };
                take_apart::<P, U>(p, args, head, keys);
                products(&Products::of::<P, U>(args, head, keys));
            }
        }
    }
}

/// The keys of a subblock, and their neighbours up to whole groups of four, for which others stand.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
unsafe fn take_apart<P: BlockProducts, U: IntegerUnit>(p: P, args: &DirectScores, head: usize, keys: KeyRange) {
    let Block { scratch, d, .. } = *args.block;
    let (source, count) = (InCache::<P, U>::new(args, head), parts::<P>(d));
    for j in (keys.low / 4 * 4..keys.high).step_by(4) {
        let first = Memory::<P>::of(scratch).keys.wrapping_add(j % SUBBLOCK * count);
        // SAFETY: the caller's; the memory has a part for every one of a subblock of keys.
        unsafe {
            let group = source.group(p, keys, j);
            for i in 0..count {
                for (c, part) in source.parts(p, &group, i).into_iter().enumerate() {
                    first.add(c * count + i).write(part);
                }
            }
        }
    }
}

/// Where parts of keys come from, four keys at a time.
trait Source<P: BlockProducts> {
    type Group;
    /// Keys `j..j + 4`; others stand for those outside of `keys`.
    ///
    /// # Safety
    /// As [`scores`].
    unsafe fn group(&self, p: P, keys: KeyRange, j: usize) -> Self::Group;
    /// Part `i` of each.
    ///
    /// # Safety
    /// As [`scores`].
    unsafe fn parts(&self, p: P, group: &Self::Group, i: usize) -> [Part<P>; 4];
}

/// Keys in the cache.
struct InCache<'a, P, U> {
    args: &'a DirectScores<'a>,
    head: usize,
    /// Blocks of a head.
    blocks: usize,
    types: PhantomData<(P, U)>,
}

impl<'a, P: BlockProducts, U: IntegerUnit> InCache<'a, P, U> {
    #[inline(always)]
    fn new(args: &'a DirectScores<'a>, head: usize) -> Self {
        Self { args, head, blocks: args.block.d / N, types: PhantomData }
    }
}

impl<P: BlockProducts, U: IntegerUnit> Source<P> for InCache<'_, P, U> {
    type Group = [*const u8; 4];

    #[inline(always)]
    unsafe fn group(&self, p: P, KeyRange { low, high }: KeyRange, j: usize) -> [*const u8; 4] {
        let distances = self.args.ahead.distances();
        let keys = std::array::from_fn(|c| self.args.k.key(self.head, (j + c).clamp(low, high - 1)));
        for c in 0..4 {
            for line in (0..self.blocks * size_of::<U>()).step_by(LINE) {
                distances.prefetch(p.level(), keys[c].wrapping_add(line));
            }
        }
        keys
    }

    #[inline(always)]
    unsafe fn parts(&self, p: P, keys: &[*const u8; 4], i: usize) -> [Part<P>; 4] {
        let (at, left) = (i * P::BLOCKS * size_of::<U>(), self.blocks - i * P::BLOCKS);
        let [a, b, c, d] = *keys;
        // SAFETY: the caller's.
        unsafe {
            if left >= P::BLOCKS {
                let n = P::BLOCKS;
                [
                    part::<P, U>(p, a.add(at), n),
                    part::<P, U>(p, b.add(at), n),
                    part::<P, U>(p, c.add(at), n),
                    part::<P, U>(p, d.add(at), n),
                ]
            } else {
                [
                    part::<P, U>(p, a.add(at), left),
                    part::<P, U>(p, b.add(at), left),
                    part::<P, U>(p, c.add(at), left),
                    part::<P, U>(p, d.add(at), left),
                ]
            }
        }
    }
}

/// Keys that were taken apart.
struct Apart<P: ByteProducts> {
    keys: *const Part<P>,
    /// Parts of a head.
    count: usize,
}

impl<P: BlockProducts> Source<P> for Apart<P> {
    type Group = [*const Part<P>; 4];

    #[inline(always)]
    unsafe fn group(&self, _: P, _: KeyRange, j: usize) -> [*const Part<P>; 4] {
        std::array::from_fn(|c| self.keys.wrapping_add((j + c) % SUBBLOCK * self.count))
    }

    #[inline(always)]
    unsafe fn parts(&self, _: P, [a, b, c, d]: &[*const Part<P>; 4], i: usize) -> [Part<P>; 4] {
        // SAFETY: the caller's.
        unsafe { [*a.add(i), *b.add(i), *c.add(i), *d.add(i)] }
    }
}

/// # Safety
/// There are `n` blocks at `from`, at least one and at most [`BlockProducts::BLOCKS`].
#[inline(always)]
unsafe fn part<P: BlockProducts, U: IntegerUnit>(p: P, from: *const u8, n: usize) -> Part<P> {
    // SAFETY: the caller's.
    unsafe {
        let first = p.halves::<U, false>(from, n);
        let mut units = match U::KIND {
            Kind::Bytes => [p.signed(first), p.signed(p.halves::<U, true>(from, n))],
            Kind::Nibbles => [p.low_nibbles(first), p.high_nibbles(first)],
            Kind::Listed => [p.listed(p.low_nibbles(first)), p.listed(p.high_nibbles(first))],
        };
        if let Some(at) = const { U::FIFTH } {
            let bits = fifth_bits::<U>(from, n, at);
            units = [p.with_fifth_bits(units[0], bits[0]), p.with_fifth_bits(units[1], bits[1])];
        }
        let factors = p.factors::<U, false>(from, n);
        let minima = if U::MINIMA { p.factors::<U, true>(from, n) } else { p.level().zero() };
        Part { units, factors, minima }
    }
}

/// # Safety
/// As [`scores`]; the keys have been taken apart.
#[inline(always)]
pub(crate) unsafe fn multiply<P: BlockProducts>(p: P, args: &Products) {
    let rows = args.block.tile.head_rows;
    let keys = Memory::<P>::of(args.block.scratch).keys;
    let source = Apart { keys, count: parts::<P>(args.block.d) };
    let mut row = 0;
    while row < rows {
        // SAFETY: the caller's.
        unsafe {
            match rows - row {
                1 => one_row(p, args, row, &source),
                left => four_rows(p, args, row, left.min(4), &source),
            }
        }
        row += 4;
    }
}

/// The vectors of units of a row that belong to a part.
///
/// # Safety
/// The row has these units.
#[inline(always)]
unsafe fn row_units<P: BlockProducts>(p: P, row: *const f32, part: usize) -> [P::Units; 2] {
    let units = row.cast::<i8>().wrapping_add(part * 2 * P::UNITS);
    // SAFETY: the caller's.
    unsafe { [p.queries(units), p.queries(units.add(P::UNITS))] }
}

/// Sums of products with the units of a part.
#[inline(always)]
fn products<P: BlockProducts>(p: P, keys: [P::Units; 2], queries: [P::Units; 2]) -> P::Sums {
    p.add(p.add(p.zero(), keys[0], queries[0]), keys[1], queries[1])
}

impl<P: BlockProducts> RowSums<P> {
    /// # Safety
    /// The rows have the units of the part.
    #[inline(always)]
    unsafe fn new(p: P, rows: [*const f32; 4], part: usize, zero: i32) -> Self {
        // No closures, which would be functions without the level's features, here and below.
        let mut sums = [p.zero(); 4];
        for r in 0..4 {
            // SAFETY: the caller's.
            sums[r] = products(p, [p.ones(); 2], unsafe { row_units(p, rows[r], part) });
        }
        let sums = p.four(sums);
        Self { offsets: p.times(sums, zero), sums: p.difference(sums, p.zero()) }
    }
}

/// Rows `row..row + n` of the head; the last one stands for those that are missing to four.
///
/// # Safety
/// As [`scores`]; `source` has the keys.
#[inline(always)]
unsafe fn four_rows<P: BlockProducts>(p: P, args: &Products, row: usize, n: usize, source: &impl Source<P>) {
    let Products { block: &Block { tile, scratch, d, .. }, head, keys, zero, minima, .. } = *args;
    let (s, memory, count) = (p.level(), Memory::<P>::of(scratch), parts::<P>(d));
    let first = head * tile.head_rows + row;
    let numbers: [usize; 4] = std::array::from_fn(|r| first + r.min(n - 1));
    let rows = numbers.map(|r| scratch.q.wrapping_add(r * padded(d)).cast_const());
    let out = scratch.s.wrapping_add(first * BLOCK);
    // SAFETY: the caller's; rows of scores have BLOCK floats, which are whole groups of four.
    unsafe {
        let scales = numbers.map(|r| *memory.scales.add(r));
        for i in 0..count {
            memory.sums.add(i).write(RowSums::new(p, rows, i, zero));
        }
        p.prepare_matrices(rows, d);
        for j in (keys.low / 4 * 4..keys.high).step_by(4) {
            let group = source.group(p, keys, j);
            let mut scores = [s.zero(); 4];
            for i in 0..count {
                let (of_rows, parts) = (&*memory.sums.add(i), source.parts(p, &group, i));
                let units = [parts[0].units, parts[1].units, parts[2].units, parts[3].units];
                let totals = p.matrix_totals(units, rows, i, d);
                let mut sums = [[p.zero(); 4]; 4];
                if totals.is_none() {
                    for r in 0..4 {
                        let queries = row_units(p, rows[r], i);
                        for c in 0..4 {
                            sums[c][r] = products(p, parts[c].units, queries);
                        }
                    }
                }
                for c in 0..4 {
                    let sums = match totals {
                        Some(totals) => totals[c],
                        None => p.four(sums[c]),
                    };
                    let total = p.difference(sums, of_rows.offsets);
                    scores[c] = s.fma(total, parts[c].factors, scores[c]);
                    if minima {
                        scores[c] = s.fma(of_rows.sums, parts[c].minima, scores[c]);
                    }
                }
            }
            let scores = p.over_blocks_of_four(scores, scales);
            for (r, scores) in scores.into_iter().enumerate().take(n) {
                out.add(r * BLOCK + j).cast::<[f32; 4]>().write(scores);
            }
        }
    }
}

/// One row of the head.
///
/// # Safety
/// As [`four_rows`].
#[inline(always)]
unsafe fn one_row<P: BlockProducts>(p: P, args: &Products, row: usize, source: &impl Source<P>) {
    let Products { block: &Block { tile, scratch, d, .. }, head, keys, zero, minima, .. } = *args;
    let (s, memory, count) = (p.level(), Memory::<P>::of(scratch), parts::<P>(d));
    let number = head * tile.head_rows + row;
    let (row, out) = (scratch.q.wrapping_add(number * padded(d)).cast_const(), scratch.s.wrapping_add(number * BLOCK));
    // SAFETY: as in `four_rows`.
    unsafe {
        let scale = *memory.scales.add(number);
        for i in 0..count {
            memory.sums.add(i).write(RowSums::new(p, [row; 4], i, zero));
        }
        for j in (keys.low / 4 * 4..keys.high).step_by(4) {
            let group = source.group(p, keys, j);
            let mut scores = s.zero();
            for i in 0..count {
                let (of_row, parts) = (&*memory.sums.add(i), source.parts(p, &group, i));
                let queries = row_units(p, row, i);
                let (mut sums, mut factors, mut lows) = ([p.zero(); 4], [s.zero(); 4], [s.zero(); 4]);
                for c in 0..4 {
                    sums[c] = products(p, parts[c].units, queries);
                    factors[c] = parts[c].factors;
                    lows[c] = parts[c].minima;
                }
                let total = p.difference(p.four(sums), of_row.offsets);
                scores = s.fma(total, p.one_of_each(factors), scores);
                if minima {
                    scores = s.fma(of_row.sums, p.one_of_each(lows), scores);
                }
            }
            let scores = p.over_blocks(scores);
            for c in 0..4 {
                *out.add(j + c) = scores[c] * scale;
            }
        }
    }
}
