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
//! eight FMAs and the widening. Zen 4 runs one of these products per cycle: 16 cycles per key of 128 elements. The loop takes 17 in q8_0
//! and 18.5 in q4_0. To copy factors takes 5, weights 7, of which 3 make them integers, so that a key takes 30, and 46 in the
//! loops of f32.

use super::integer::ByteProducts;
use super::integer_blocks::{BlockProducts, IntegerUnit, Kind};
use super::{Block, IntegerValues, RowState, SUBBLOCK, Scratch};
use crate::kernels::generic::blocks::N;
use crate::kernels::simd::{LINE, MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use half::f16;

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
    /// Number `b` of each four f16, of as many as a vector has lanes.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn gathered(self, p: *const f16, b: usize) -> V<Self>;
    /// The bytes of both as words, in pairs, in the order of [`Self::in_order`].
    fn pairs(self, a: Self::Bytes, b: Self::Bytes) -> [Self::Units; 2];
    /// The same of two blocks of nibbles without fifth bits, as words, in pairs, in their order.
    ///
    /// # Safety
    /// The blocks are readable.
    unsafe fn nibble_pairs<U: IntegerUnit>(self, a: *const u8, b: *const u8) -> [Self::Units; 2];
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
    unsafe fn store_words(self, x: [V<Self>; 2], to: *mut i16);
}

/// The units of values.
pub(crate) trait ValueUnit: 'static {
    /// Bytes per [`N`] elements.
    const BYTES: usize;
    /// Whether they have factors of their own, and minima.
    const FACTORS: bool;
    const MINIMA: bool;

    /// Whether the elements of pairs are to be put in order.
    const SHUFFLED: bool;

    /// Pairs of the numbers of `n` elements, up to [`N`], of two values.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn pairs<P: WordProducts>(p: P, a: *const u8, b: *const u8, n: usize) -> [P::Units; 2];
}

impl ValueUnit for i8 {
    const BYTES: usize = N;
    const FACTORS: bool = false;
    const MINIMA: bool = false;

    const SHUFFLED: bool = true;

    #[inline(always)]
    unsafe fn pairs<P: WordProducts>(p: P, a: *const u8, b: *const u8, n: usize) -> [P::Units; 2] {
        // SAFETY: the caller's.
        unsafe { p.pairs(p.bytes(a, n), p.bytes(b, n)) }
    }
}

impl<U: IntegerUnit> ValueUnit for U {
    const BYTES: usize = size_of::<U>();
    const FACTORS: bool = true;
    const MINIMA: bool = U::MINIMA;

    const SHUFFLED: bool = !matches!(U::KIND, Kind::Nibbles) || U::FIFTH.is_some();

    #[inline(always)]
    unsafe fn pairs<P: WordProducts>(p: P, a: *const u8, b: *const u8, _: usize) -> [P::Units; 2] {
        // SAFETY: the caller's.
        unsafe {
            if Self::SHUFFLED { p.pairs(p.numbers::<U>(a), p.numbers::<U>(b)) } else { p.nibble_pairs::<U>(a, b) }
        }
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
    /// `[blocks / GATHERED][BLOCK][GATHERED]`, rounded up, as they are.
    factors: *mut f16,
    minima: *mut f16,
    /// `[blocks][BLOCK]`, divided by the largest one.
    quotients: *mut f32,
    /// `[blocks]`.
    largest: *mut f32,
    /// `[blocks][ROWS][BLOCK]`, so that rows are a constant apart.
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
        let (factors, minima, quotients) = (at(0).cast(), at(BLOCK * GATHERED / 2).cast(), at(BLOCK * GATHERED));
        let weights = at(BLOCK * (GATHERED + 1)).cast();
        let rest = BLOCK * (GATHERED + 1 + ROWS / 2);
        let (steps, sums, largest) = (at(rest), at(rest + ROWS), at(rest + 2 * ROWS));
        Self { blocks, factors, minima, quotients, largest, weights, steps, sums }
    }

    /// The weights of row `r` of those with weights for block `b`.
    #[inline(always)]
    fn weights(&self, b: usize, r: usize) -> *mut i16 {
        self.weights.wrapping_add((b * ROWS + r) * BLOCK)
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
    let Block { tile, scratch, .. } = *args.block;
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
            all_factors::<U>(args);
        }
        for row in (0..tile.head_rows).step_by(ROWS) {
            (weights.first, weights.n) = (head + row, (tile.head_rows - row).min(ROWS));
            integers(&mut weights);
            let acc = scratch.acc.wrapping_add((head + row) * scratch.acc_row);
            match weights.n {
                4 => rows::<P, U, 4>(p, args, acc, 0, row == 0),
                3 => rows::<P, U, 3>(p, args, acc, 0, row == 0),
                2 => rows::<P, U, 2>(p, args, acc, 0, row == 0),
                _ => rows::<P, U, 1>(p, args, acc, 0, row == 0),
            }
            for r in (0..weights.n).filter(|&r| weights.in_f32[r]) {
                (args.in_f32)(head + row + r);
            }
        }
    }
}

/// The factors and minima of all keys, and with them all lines of the values.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn all_factors<U: ValueUnit>(args: &IntegerValues) {
    let Block { scratch, key_range: KeyRange { low, high }, dv, .. } = *args.block;
    let memory = Memory::of(scratch, dv);
    // SAFETY: the caller's; a block begins with its factor, and with its minimum.
    unsafe {
        for first in (0..memory.blocks).step_by(GATHERED) {
            for j in low..high {
                let value = args.v.key(args.head, j).add(first * U::BYTES);
                let at = first * BLOCK + j * GATHERED;
                gather::<U>(value, memory.blocks - first, memory.factors.add(at));
                if U::MINIMA {
                    gather::<U>(value.add(size_of::<f16>()), memory.blocks - first, memory.minima.add(at));
                }
            }
        }
    }
}

/// The f16 at the start of up to [`GATHERED`] of `n` blocks. Four are one store.
///
/// # Safety
/// The blocks are readable, and there is room for [`GATHERED`].
#[inline(always)]
unsafe fn gather<U: ValueUnit>(from: *const u8, n: usize, to: *mut f16) {
    let half = |b: usize| from.wrapping_add(b * U::BYTES).cast::<u16>();
    // SAFETY: the caller's.
    unsafe {
        if n >= GATHERED {
            let mut four = 0;
            for b in 0..GATHERED {
                four |= u64::from(half(b).read_unaligned()) << (16 * b);
            }
            to.cast::<u64>().write(four);
        } else {
            for b in 0..n {
                to.add(b).cast::<u16>().write(half(b).read_unaligned());
            }
        }
    }
}

/// Blocks of a value whose factors lie together.
const GATHERED: usize = 4;

/// Makes integers of the weights of some rows.
///
/// # Safety
/// As [`values`]; factors and minima are in place.
#[inline(always)]
pub(crate) unsafe fn make_integers<P: WordProducts>(p: P, args: &mut ValueWeights) {
    let memory = Memory::of(args.block.scratch, args.block.dv);
    let mut peaks = [(0.0, true); ROWS];
    // All of them first, since each takes a chain of shuffles and ends in a division.
    for r in 0..args.n {
        // SAFETY: the caller's.
        peaks[r] = unsafe { peak(p, args, r, args.rows[args.first + r].visible_bits) };
    }
    for r in 0..args.n {
        let visible = args.rows[args.first + r].visible_bits;
        // SAFETY: the caller's.
        unsafe {
            if args.factors && visible != args.bits {
                args.bits = visible;
                args.finite = quotients(p, &memory, visible);
            }
            args.in_f32[r] = !weights(p, args, &memory, r, visible, peaks[r]);
        }
    }
}

/// The largest magnitude of the weights of row `r` for the keys `bits`, and whether all are finite.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn peak<P: WordProducts>(p: P, args: &ValueWeights, r: usize, bits: u64) -> (f32, bool) {
    let (s, lanes) = (p.level(), <P::Level as Simd>::LANES);
    let (mut largest, mut finite) = (s.zero(), true);
    let from = args.block.scratch.s.wrapping_add((args.first + r) * BLOCK);
    for i in 0..BLOCK / lanes {
        // SAFETY: the caller's.
        let x = s.select_bits(bits >> (i * lanes), unsafe { s.load_f32(from.add(i * lanes)) }, s.zero());
        finite &= s.all_finite(x);
        largest = s.max(s.abs(x), largest);
    }
    (s.max_lane(largest), finite)
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
        let mut largest = s.zero();
        // SAFETY: the caller's; factors of other keys are any.
        unsafe {
            for i in 0..BLOCK / lanes {
                let at = b / GATHERED * GATHERED * BLOCK + i * lanes * GATHERED;
                let factors = p.gathered(memory.factors.add(at), b % GATHERED);
                let x = s.select_bits(bits >> (i * lanes), factors, s.zero());
                finite &= s.all_finite(x);
                largest = s.max(s.abs(x), largest);
                s.store_f32(memory.quotients.add(b * BLOCK + i * lanes), x);
            }
            *memory.largest.add(b) = s.max_lane(largest);
        }
    }
    for b in 0..memory.blocks {
        // SAFETY: as above.
        unsafe {
            let largest = *memory.largest.add(b);
            let inverse = s.splat(if largest > 0.0 { 1.0 / largest } else { 0.0 });
            for i in 0..BLOCK / lanes {
                let at = memory.quotients.add(b * BLOCK + i * lanes);
                s.store_f32(at, s.mul(s.load_f32(at), inverse));
            }
        }
    }
    finite
}

/// Makes integers of the weights of row `r` for the keys `bits`, of which [`peak`] was computed. Returns false, and makes zeros, if the row is to be computed in f32.
///
/// # Safety
/// As [`values`].
#[inline(always)]
unsafe fn weights<P: WordProducts>(
    p: P,
    args: &ValueWeights,
    memory: &Memory,
    r: usize,
    bits: u64,
    (largest, finite): (f32, bool),
) -> bool {
    let ValueWeights { factors, minima, .. } = *args;
    let (s, lanes) = (p.level(), <P::Level as Simd>::LANES);
    let blocks = if factors { memory.blocks } else { 1 };
    let finite = finite && args.finite;
    let mut x = [s.zero(); BLOCK / MAX_LANES];
    // SAFETY: the caller's.
    unsafe {
        let from = args.block.scratch.s.add((args.first + r) * BLOCK);
        for i in 0..BLOCK / lanes {
            x[i] = s.select_bits(bits >> (i * lanes), s.load_f32(from.add(i * lanes)), s.zero());
        }
        if !finite || !factors && largest < LEAST_WEIGHT && largest > 0.0 {
            for b in 0..blocks {
                std::ptr::write_bytes(memory.weights(b, r), 0, BLOCK);
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
            let to = memory.weights(b, r);
            for i in (0..BLOCK / lanes).step_by(2) {
                let mut two = [scaled[i], scaled[i + 1]];
                if factors {
                    let quotients = memory.quotients.add(b * BLOCK + i * lanes);
                    two = [s.mul(two[0], s.load_f32(quotients)), s.mul(two[1], s.load_f32(quotients.add(lanes)))];
                }
                p.store_words(two, to.add(i * lanes));
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
                    let minima = p.gathered(
                        memory.minima.add(b / GATHERED * GATHERED * BLOCK + i * lanes * GATHERED),
                        b % GATHERED,
                    );
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
        let mut weights = [std::ptr::null::<i32>(); 2];
        for n in 0..2 {
            weights[n] = memory.weights(if U::FACTORS { blocks[n] } else { 0 }, row).cast();
        }
        let mut sums = [[[p.zero(); 2]; 2]; R];
        let mut ahead = args.ahead.of_v(low / SUBBLOCK).distance;
        // Every line of a value, two for two blocks as long as there are any: one that is left out is waited for.
        let line = first / 2 * 2 * LINE;
        let [near, far] = [line, line + LINE].map(|line| prefetch && line < memory.blocks * U::BYTES);
        // SAFETY: the caller's; others stand for keys outside of the range, whose weights are 0.
        unsafe {
            for pair in low / 2..high.div_ceil(2) {
                if prefetch && pair % (SUBBLOCK / 2) == 0 {
                    ahead = args.ahead.of_v(2 * pair / SUBBLOCK).distance;
                }
                let a = args.v.key(args.head, (2 * pair).max(low));
                let b = args.v.key(args.head, (2 * pair + 1).min(high - 1));
                if near {
                    s.prefetch_far(a.wrapping_add(line).wrapping_offset(ahead));
                    s.prefetch_far(b.wrapping_add(line).wrapping_offset(ahead));
                }
                if far {
                    s.prefetch_far(a.wrapping_add(line + LINE).wrapping_offset(ahead));
                    s.prefetch_far(b.wrapping_add(line + LINE).wrapping_offset(ahead));
                }
                let mut x = [[p.ones(); 2]; 2];
                for n in 0..2 {
                    let (at, len) = (blocks[n] * U::BYTES, (dv - blocks[n] * N).min(N));
                    x[n] = U::pairs(p, a.add(at), b.add(at), len);
                }
                for r in 0..R {
                    for n in 0..2 {
                        let weight = p.pair(*weights[n].add(r * BLOCK / 2 + pair));
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
                    let mut x = [p.float(low), p.float(high)];
                    if U::SHUFFLED {
                        x = p.in_order(x);
                    }
                    for i in 0..2 {
                        let column = blocks[n] * N + i * <P::Level as Simd>::LANES;
                        // The last block may be half of one.
                        if column < dv {
                            let acc = acc.add(r * args.block.scratch.acc_row + column);
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
