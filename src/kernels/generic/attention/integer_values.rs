//! Sums of weighted values by products of integers ([`Precision::Integer`](crate::Precision::Integer)), of values in int8 and in blocks.
//!
//! The weights of a row on a block of 64 keys become integers of 16 bits. Of int8 values, whose scales are part of the weights, these are
//! multiples of the largest divided by 32767. Of blocks, they are weights times factors, for each 32 elements apart: multiples of the
//! largest weight times the largest factor of a key that the row sees, divided by 32767. So each is rounded by at most a 65534th of that
//! product. Sums of products with units are exact (at most 64 * 128 * 32767, below 2^31), are converted to f32 once per block of keys,
//! and multiplied by what the weights are multiples of. A row depends on the keys that it sees only. Minima are added up in f32.
//!
//! Rows with weights or factors that are not finite, or with scaled weights that are too small for a quotient, add up their keys one by
//! one in f32, as at other precisions.
//!
//! # What bounds it
//! On AVX-512 with four rows, a pair of keys takes four products per 16 elements, one conversion and half a shuffle; as f32 it would take
//! eight FMAs and the widening. For blocks of 128 elements, factors and weights take about 13 operations per key more. A
//! profile on Zen 4 shows 35 cycles per key of q8_0, weights included, and 46 for the loops of f32.

use super::integer::ByteProducts;
use super::integer_blocks::{BlockProducts, IntegerUnit};
use super::{Block, IntegerValues, RowState, SUBBLOCK, Scratch};
use crate::kernels::generic::blocks::N;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, KeyRange, padded};

type V<P> = <<P as ByteProducts>::Level as Simd>::V;

/// Products of words, added up in pairs, on vectors of 16 sums.
pub(crate) trait WordProducts: BlockProducts {
    /// [`N`] signed bytes.
    type Bytes: Copy;

    /// The numbers of a block, less the zero.
    ///
    /// # Safety
    /// The block is readable.
    unsafe fn numbers<U: IntegerUnit>(self, p: *const u8) -> Self::Bytes;
    /// The first `n` bytes; the others are 0.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn bytes(self, p: *const u8, n: usize) -> Self::Bytes;
    /// The bytes of both as words, in pairs, in the order of [`Self::in_order`].
    fn pairs(self, a: Self::Bytes, b: Self::Bytes) -> [Self::Units; 2];
    /// Two words, over and over.
    fn pair(self, words: i32) -> Self::Units;
    /// Adds the products of words, each pair to one of the sums.
    fn add_words(self, sums: Self::Sums, a: Self::Units, b: Self::Units) -> Self::Sums;
    /// The order of the elements of what [`Self::pairs`] gave.
    fn in_order(self, x: [V<Self>; 2]) -> [V<Self>; 2];
    /// Writes numbers as words, rounded to nearest.
    ///
    /// # Safety
    /// There is room; the magnitudes are at most 32767.
    unsafe fn store_words(self, x: V<Self>, to: *mut i16);
}

/// The units of values.
pub(crate) trait ValueUnit: 'static {
    /// Bytes per [`N`] elements.
    const BYTES: usize;
    /// Whether they have factors of their own, and minima.
    const FACTORS: bool;
    const MINIMA: bool;

    /// The numbers of `n` elements, up to [`N`].
    ///
    /// # Safety
    /// They are readable.
    unsafe fn numbers<P: WordProducts>(p: P, from: *const u8, n: usize) -> P::Bytes;
    /// As [`BlockProducts::factors`].
    ///
    /// # Safety
    /// The same.
    unsafe fn factors<P: WordProducts, const MINIMA: bool>(p: P, from: *const u8, n: usize) -> V<P>;
}

impl ValueUnit for i8 {
    const BYTES: usize = N;
    const FACTORS: bool = false;
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn numbers<P: WordProducts>(p: P, from: *const u8, n: usize) -> P::Bytes {
        // SAFETY: the caller's.
        unsafe { p.bytes(from, n) }
    }
    #[inline(always)]
    unsafe fn factors<P: WordProducts, const MINIMA: bool>(p: P, _: *const u8, _: usize) -> V<P> {
        p.level().zero()
    }
}

impl<U: IntegerUnit> ValueUnit for U {
    const BYTES: usize = size_of::<U>();
    const FACTORS: bool = true;
    const MINIMA: bool = U::MINIMA;

    #[inline(always)]
    unsafe fn numbers<P: WordProducts>(p: P, from: *const u8, _: usize) -> P::Bytes {
        // SAFETY: the caller's.
        unsafe { p.numbers::<U>(from) }
    }
    #[inline(always)]
    unsafe fn factors<P: WordProducts, const MINIMA: bool>(p: P, from: *const u8, n: usize) -> V<P> {
        // SAFETY: the caller's.
        unsafe { p.factors::<U, MINIMA>(from, n) }
    }
}

/// Rows whose weights are integers at the same time.
const ROWS: usize = 4;
/// The largest weight.
const MAX_WORD: f32 = 32767.0;
/// Where a row's largest weight is so small that this is less than its quotient, weights are multiples of the reciprocal.
const MAX_INVERSE: f32 = f32::from_bits((125 + 127) << 23);
/// Below this, weights that contain a scale are not made integers.
const LEAST_WEIGHT: f32 = f32::from_bits((127 - 110) << 23);

/// The memory of scratch that a head uses: a part of that for packed values, which is of the size of a block of 64 values in f32.
#[derive(Clone, Copy)]
struct Memory {
    /// Blocks of a value.
    blocks: usize,
    /// `[blocks][BLOCK]`, as they are, and divided by the largest one.
    factors: *mut f32,
    minima: *mut f32,
    quotients: *mut f32,
    /// `[blocks]`.
    largest: *mut f32,
    /// `[ROWS][blocks][BLOCK]`.
    weights: *mut i16,
    /// `[ROWS][blocks]`: what weights are multiples of, and the weighted sums of the minima.
    steps: *mut f32,
    sums: *mut f32,
}

impl Memory {
    #[inline(always)]
    fn of(scratch: &Scratch, dv: usize) -> Self {
        let blocks = dv.div_ceil(N);
        // There are at least 1024 floats per block.
        let at = |n: usize| scratch.vp.wrapping_add(n * blocks);
        let (factors, minima, quotients) = (at(0), at(BLOCK), at(2 * BLOCK));
        let (weights, steps, sums, largest) =
            (at(3 * BLOCK).cast(), at(5 * BLOCK), at(5 * BLOCK + 4), at(5 * BLOCK + 8));
        Self { blocks, factors, minima, quotients, largest, weights, steps, sums }
    }
}

/// The weights of some rows of a head, to be made integers.
pub(crate) struct ValueWeights<'a> {
    block: &'a Block<'a>,
    /// All of the tile.
    rows: &'a [RowState],
    /// The first of the rows in the tile, and how many there are.
    first: usize,
    n: usize,
    /// Whether values have factors and minima.
    factors: bool,
    minima: bool,
    /// The keys for which quotients of factors are in place, and whether these are finite.
    bits: u64,
    finite: bool,
    /// The rows that are to be computed in f32.
    in_f32: [bool; ROWS],
}

/// Adds values in units of `U`.
///
/// # Safety
/// Weights are in place, and `v` points to the block's key range; `integers` is [`make_integers`] with the same `P`.
#[inline(always)]
pub(crate) unsafe fn values<P: WordProducts, U: ValueUnit>(
    p: P,
    args: &mut IntegerValues,
    integers: unsafe fn(&mut ValueWeights),
) {
    let Block { tile, scratch, dv, .. } = *args.block;
    let head = args.head * tile.head_rows;
    let mut weights = ValueWeights {
        block: args.block,
        rows: args.rows,
        first: head,
        n: 0,
        factors: U::FACTORS,
        minima: U::MINIMA,
        bits: 0,
        finite: true,
        in_f32: [false; ROWS],
    };
    // SAFETY: the caller's; the rows are inside the tile.
    unsafe {
        if U::FACTORS {
            all_factors::<P, U>(p, args);
        }
        for row in (0..tile.head_rows).step_by(ROWS) {
            (weights.first, weights.n) = (head + row, (tile.head_rows - row).min(ROWS));
            integers(&mut weights);
            let at = |r: usize| scratch.acc.wrapping_add((head + row + r) * padded(dv));
            match weights.n {
                4 => rows::<P, U, 4>(p, args, at(0), 0, row == 0),
                3 => {
                    rows::<P, U, 2>(p, args, at(0), 0, row == 0);
                    rows::<P, U, 1>(p, args, at(2), 2, false);
                }
                2 => rows::<P, U, 2>(p, args, at(0), 0, row == 0),
                _ => rows::<P, U, 1>(p, args, at(0), 0, row == 0),
            }
            for r in (0..weights.n).filter(|&r| weights.in_f32[r]) {
                (args.in_f32)(head + row + r);
            }
        }
    }
}

/// The factors and minima of all keys. Others stand for keys outside of the key range, up to whole groups of four.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn all_factors<P: WordProducts, U: ValueUnit>(p: P, args: &IntegerValues) {
    let Block { scratch, key_range: KeyRange { low, high }, dv, .. } = *args.block;
    let memory = Memory::of(scratch, dv);
    for j in (low / 4 * 4..high).step_by(4) {
        let keys: [*const u8; 4] = std::array::from_fn(|c| args.v.key(args.head, (j + c).clamp(low, high - 1)));
        // SAFETY: the caller's.
        unsafe {
            for i in 0..memory.blocks / P::BLOCKS {
                factors::<P, U>(p, keys, i * P::BLOCKS, P::BLOCKS, &memory, j);
            }
            let rest = memory.blocks % P::BLOCKS;
            if rest > 0 {
                factors::<P, U>(p, keys, memory.blocks - rest, rest, &memory, j);
            }
        }
    }
}

/// The factors and minima of `n` blocks of four keys, of which the first is key `j`, from block `first` on.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn factors<P: WordProducts, U: ValueUnit>(
    p: P,
    keys: [*const u8; 4],
    first: usize,
    n: usize,
    memory: &Memory,
    j: usize,
) {
    let s = p.level();
    let (mut factors, mut minima) = ([s.zero(); 4], [s.zero(); 4]);
    // SAFETY: the caller's; the arrays hold a vector.
    unsafe {
        for c in 0..4 {
            let at = keys[c].add(first * U::BYTES);
            factors[c] = U::factors::<P, false>(p, at, n);
            if U::MINIMA {
                minima[c] = U::factors::<P, true>(p, at, n);
            }
        }
        let mut lanes = [[0.0f32; 4]; MAX_LANES / 4];
        s.store_f32(lanes.as_mut_ptr().cast(), p.one_of_each(factors));
        for b in 0..n {
            memory.factors.add((first + b) * BLOCK + j).cast::<[f32; 4]>().write(lanes[b]);
        }
        if U::MINIMA {
            s.store_f32(lanes.as_mut_ptr().cast(), p.one_of_each(minima));
            for b in 0..n {
                memory.minima.add((first + b) * BLOCK + j).cast::<[f32; 4]>().write(lanes[b]);
            }
        }
    }
}

/// Makes integers of the weights of some rows.
///
/// # Safety
/// As [`values`]; factors and minima are in place.
#[inline(always)]
pub(crate) unsafe fn make_integers<P: WordProducts>(p: P, args: &mut ValueWeights) {
    let memory = Memory::of(args.block.scratch, args.block.dv);
    for r in 0..args.n {
        let visible = args.rows[args.first + r].visible_bits;
        // SAFETY: the caller's.
        unsafe {
            if args.factors && visible != args.bits {
                args.bits = visible;
                args.finite = quotients(p, &memory, visible);
            }
            args.in_f32[r] = !weights(p, args, &memory, r, visible);
        }
    }
}

/// Divides the factors of some keys by the largest magnitude among them, block by block. Returns whether all are finite.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn quotients<P: WordProducts>(p: P, memory: &Memory, bits: u64) -> bool {
    let (s, lanes) = (p.level(), <P::Level as Simd>::LANES);
    let mut finite = true;
    for b in 0..memory.blocks {
        let (mut x, mut largest) = ([s.zero(); BLOCK / MAX_LANES], s.zero());
        // SAFETY: the caller's; factors of other keys are any.
        unsafe {
            for i in 0..BLOCK / lanes {
                let factors = s.load_f32(memory.factors.add(b * BLOCK + i * lanes));
                x[i] = s.select_bits(bits >> (i * lanes), factors, s.zero());
                finite &= s.all_finite(x[i]);
                largest = s.max(s.abs(x[i]), largest);
            }
            let largest = s.max_lane(largest);
            *memory.largest.add(b) = largest;
            let inverse = s.splat(if largest > 0.0 { 1.0 / largest } else { 0.0 });
            for i in 0..BLOCK / lanes {
                s.store_f32(memory.quotients.add(b * BLOCK + i * lanes), s.mul(x[i], inverse));
            }
        }
    }
    finite
}

/// Makes integers of the weights of row `r` for the keys `bits`. Returns false, and makes zeros, if the row is to be computed in f32.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn weights<P: WordProducts>(p: P, args: &ValueWeights, memory: &Memory, r: usize, bits: u64) -> bool {
    let ValueWeights { factors, minima, .. } = *args;
    let (s, lanes) = (p.level(), <P::Level as Simd>::LANES);
    let blocks = if factors { memory.blocks } else { 1 };
    let (mut x, mut largest) = ([s.zero(); BLOCK / MAX_LANES], s.zero());
    let mut finite = args.finite;
    // SAFETY: the caller's.
    unsafe {
        let from = args.block.scratch.s.add((args.first + r) * BLOCK);
        for i in 0..BLOCK / lanes {
            x[i] = s.select_bits(bits >> (i * lanes), s.load_f32(from.add(i * lanes)), s.zero());
            finite &= s.all_finite(x[i]);
            largest = s.max(s.abs(x[i]), largest);
        }
        let largest = s.max_lane(largest);
        if !finite || !factors && largest < LEAST_WEIGHT && largest > 0.0 {
            for b in 0..blocks {
                std::ptr::write_bytes(memory.weights.add((r * blocks + b) * BLOCK), 0, BLOCK);
                *memory.steps.add(r * blocks + b) = 0.0;
                *memory.sums.add(r * blocks + b) = 0.0;
            }
            return false;
        }
        let inverse = (MAX_WORD / largest).min(MAX_INVERSE);
        let step = 1.0 / inverse;
        let mut scaled = [s.zero(); BLOCK / MAX_LANES];
        for i in 0..BLOCK / lanes {
            scaled[i] = s.mul(x[i], s.splat(inverse));
        }
        for b in 0..blocks {
            let to = memory.weights.add((r * blocks + b) * BLOCK);
            for i in 0..BLOCK / lanes {
                let mut weight = scaled[i];
                if factors {
                    weight = s.mul(weight, s.load_f32(memory.quotients.add(b * BLOCK + i * lanes)));
                }
                p.store_words(weight, to.add(i * lanes));
            }
            *memory.steps.add(r * blocks + b) = if factors { *memory.largest.add(b) * step } else { step };
        }
        if !minima {
            return true;
        }
        for first in (0..blocks).step_by(lanes) {
            let mut sums = [s.zero(); MAX_LANES];
            for b in first..blocks.min(first + lanes) {
                for i in 0..BLOCK / lanes {
                    let minima = s.load_f32(memory.minima.add(b * BLOCK + i * lanes));
                    let minima = s.select_bits(bits >> (i * lanes), minima, s.zero());
                    sums[b - first] = s.fma(x[i], minima, sums[b - first]);
                }
            }
            let mut of_lanes = [0.0f32; MAX_LANES];
            s.store_f32(of_lanes.as_mut_ptr(), s.sum_lanes(&sums));
            for b in first..blocks.min(first + lanes) {
                *memory.sums.add(r * blocks + b) = of_lanes[b - first];
            }
        }
    }
    true
}

/// All columns of `R` rows, of which the first is number `row` of those with weights.
///
/// # Safety
/// As [`values`]; weights are integers, and `acc` is the accumulator of the first row.
#[inline(always)]
unsafe fn rows<P: WordProducts, U: ValueUnit, const R: usize>(
    p: P,
    args: &IntegerValues,
    acc: *mut f32,
    row: usize,
    prefetch: bool,
) {
    let Block { scratch, key_range: KeyRange { low, high }, dv, .. } = *args.block;
    let (s, memory) = (p.level(), Memory::of(scratch, dv));
    let of_row = if U::FACTORS { memory.blocks } else { 1 };
    for first in (0..memory.blocks).step_by(2) {
        // A last one alone is computed twice.
        let blocks = [first, (first + 1).min(memory.blocks - 1)];
        let mut weights = [[std::ptr::null::<i32>(); 2]; R];
        for r in 0..R {
            for n in 0..2 {
                let b = if U::FACTORS { blocks[n] } else { 0 };
                weights[r][n] = memory.weights.wrapping_add(((row + r) * of_row + b) * BLOCK).cast();
            }
        }
        let mut sums = [[[p.zero(); 2]; 2]; R];
        let mut distances = args.ahead.of_v(low / SUBBLOCK).distances();
        // SAFETY: the caller's; others stand for keys outside of the range, whose weights are 0.
        unsafe {
            for pair in low / 2..high.div_ceil(2) {
                if prefetch && pair % (SUBBLOCK / 2) == 0 {
                    distances = args.ahead.of_v(2 * pair / SUBBLOCK).distances();
                }
                let a = args.v.key(args.head, (2 * pair).max(low));
                let b = args.v.key(args.head, (2 * pair + 1).min(high - 1));
                if prefetch {
                    distances.prefetch(s, a.wrapping_add(first * U::BYTES));
                    distances.prefetch(s, b.wrapping_add(first * U::BYTES));
                }
                let mut x = [[p.ones(); 2]; 2];
                for n in 0..2 {
                    let (at, len) = (blocks[n] * U::BYTES, (dv - blocks[n] * N).min(N));
                    x[n] = p.pairs(U::numbers(p, a.add(at), len), U::numbers(p, b.add(at), len));
                }
                for r in 0..R {
                    for n in 0..2 {
                        let weight = p.pair(*weights[r][n].add(pair));
                        sums[r][n][0] = p.add_words(sums[r][n][0], x[n][0], weight);
                        sums[r][n][1] = p.add_words(sums[r][n][1], x[n][1], weight);
                    }
                }
            }
            for r in 0..R {
                for n in 0..2 {
                    if n == 1 && blocks[1] == first {
                        continue;
                    }
                    let number = (row + r) * of_row + if U::FACTORS { blocks[n] } else { 0 };
                    let step = s.splat(*memory.steps.add(number));
                    let [low, high] = sums[r][n];
                    let x = p.in_order([p.difference(low, p.zero()), p.difference(high, p.zero())]);
                    for i in 0..2 {
                        let column = blocks[n] * N + i * <P::Level as Simd>::LANES;
                        // The last block may be half of one.
                        if column < dv {
                            let acc = acc.add(r * padded(dv) + column);
                            let mut total = s.fma(x[i], step, s.load_f32(acc));
                            if U::MINIMA {
                                total = s.add(total, s.splat(*memory.sums.add(number)));
                            }
                            s.store_f32(acc, total);
                        }
                    }
                }
            }
        }
    }
}
