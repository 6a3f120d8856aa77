//! Scores of keys in blocks by products of integers, of transposed words ([`Precision::Integer`](crate::Precision::Integer)).
//!
//! Rows are quantised as for int8 keys. Elements of a block are `d (q - zero) + m`, with integers q and zero. So the products of a row's
//! units with a block add up to `d (sum of q x - zero * sum of x) + m * sum of x`: the sums are integers and exact, of at most
//! 32 * 255 * 127. Products by d and m, and sums over blocks, are f32, then comes the scale of the row.
//!
//! A vector of units has 16 units of each of as many blocks as it has quarters of 16 bytes, and a second vector the other 16: four words
//! of four units for each block. Words of four keys are transposed, so that a lane has one word of each of eight vectors: those of one
//! block and key. Products with the same words of a row, which are repeated for four keys, then add up to a whole number in each lane, and
//! no sums over lanes are left. It is multiplied by the factor in that lane; the sums over blocks are those of quarters. The order of
//! f32 operations is the same for one row and for four.
//!
//! Up to four rows read blocks in their loop. For more, the keys of a subblock are taken apart into memory first, and one loop for all
//! formats passes over them once per four rows. Factors are copied to memory one by one and loaded as a vector, which waits until single
//! stores have left the store buffer: so it is loaded after the products.
//!
//! # What bounds it
//! On AVX-512 with four rows, four blocks of a key (128 elements) take 8 products, 10 shuffles in q8_0 and 5 in q4_0, of which 4 and 2
//! transpose, and about 6 conversions, additions and logical operations, beside loads of four half vectors and of four vectors of queries.
//! Zen 4 runs two operations of a whole vector per cycle, of shuffles across quarters and of products one, and loads one vector, of
//! those that cross a line half as many: 12 cycles per key of q8_0 and 10 of q4_0 by these counts. Alone, on keys in the second-level cache,
//! the loops take 17 and 15, with all of a call around them 21 and 18, and those of f32 59. Shuffles of the next keys and products
//! wait for each other in the queue of 64 operations, so that neither port is always busy.

use super::integer_blocks::{BlockUnits, HALF, IntegerUnit, Kind, Products, ROWS, V, fifth_bits, parts};
use super::{Block, DirectScores, KeyPointers, SUBBLOCK, Scratch};
use crate::kernels::generic::attention::integer::ByteProducts;
use crate::kernels::generic::blocks::N;
use crate::kernels::generic::quantize;
use crate::kernels::simd::{LINE, MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, KeyRange, padded};
use crate::problem::limits::MAX_HEAD_DIM;
use half::f16;
use std::marker::PhantomData;

/// Keys of a group, whose scores lie side by side in a vector.
const GROUP: usize = 4;
/// Four units, whose products are added up.
type Word = [i8; 4];
/// Such words of a half of a block.
pub(crate) const WORDS: usize = HALF / size_of::<Word>();

/// Products of bytes with blocks. A vector of units has [`HALF`] bytes of each of [`Self::BLOCKS`] blocks, and vectors of sums and of f32
/// have four lanes for each.
pub(crate) trait BlockProducts: BlockUnits {
    /// Groups of keys that are multiplied side by side, one or two: as many as registers allow.
    const GROUPS: usize;
    /// Whether [`Self::add_numbers`] adds products of numbers in fewer operations than [`ByteProducts::add`].
    const ADDS_NUMBERS: bool = false;

    /// Adds the products of the words of a half of blocks, whose numbers are from 0 to 31, with units of a row.
    ///
    /// # Safety
    /// [`ByteProducts::UNITS`] bytes are readable at each of `queries`.
    #[inline(always)]
    unsafe fn add_numbers(
        self,
        sums: Self::Sums,
        _keys: &[Self::Units; WORDS],
        _queries: [*const i8; WORDS],
    ) -> Self::Sums {
        sums
    }

    /// Both [`HALF`]s of `n` blocks of bytes at `p`; the others may be any.
    ///
    /// # Safety
    /// The blocks are readable.
    unsafe fn bytes_of<U: IntegerUnit>(self, p: *const u8, n: usize) -> [Self::Units; 2];
    /// The nibbles of `n` blocks at `p`; the others may be any.
    ///
    /// # Safety
    /// The blocks are readable.
    unsafe fn nibbles_of<U: IntegerUnit>(self, p: *const u8, n: usize) -> Self::Units;

    /// The four words that each vector has of a block become one word of each of four vectors.
    fn transposed(self, x: [Self::Units; 4]) -> [Self::Units; 4];
    fn float(self, x: Self::Sums) -> V<Self>;
    /// The sums over blocks of each of the four lanes, of one or two groups and four rows, times a factor per row.
    fn over_blocks(self, x: [[V<Self>; 4]; 2], factors: [f32; 4]) -> [[[f32; GROUP]; 2]; 4];
}

/// The units of [`BlockProducts::BLOCKS`] blocks of a group of keys, whose words are transposed: each vector has one of every block and key.
type Units<P> = [[<P as ByteProducts>::Units; WORDS]; 2];

/// Blocks of a group of keys that were taken apart.
#[repr(C)]
struct Part<P: ByteProducts> {
    units: Units<P>,
    halves: Halves,
}

/// The factors of blocks and keys in the order of a vector, then the minima.
type Halves = [f16; 2 * MAX_LANES];

/// For `R` rows and some blocks, the sums of their units; times what is taken from each unit of a key and negative, and as floats.
#[repr(C)]
struct RowSums<P: ByteProducts, const R: usize> {
    offsets: [P::Sums; R],
    sums: [V<P>; R],
}

/// The memory of scratch that a call uses, beside the rows.
struct Memory<P: ByteProducts> {
    /// A scale per row of the tile.
    scales: *mut f32,
    /// Of the groups that are multiplied side by side.
    halves: *mut Halves,
    /// [`RowSums`], one per part of a head.
    sums: *mut f32,
    /// One per part of a head, for the groups of a [`SUBBLOCK`].
    keys: *mut Part<P>,
}

impl<P: ByteProducts> Memory<P> {
    #[inline(always)]
    fn of(scratch: &Scratch) -> Self {
        // Both are of the size of a block of 64 keys in f32, at least 8 KiB.
        let halves = scratch.kt.wrapping_add(ROWS);
        Self {
            scales: scratch.kt,
            halves: halves.cast(),
            sums: halves.wrapping_add(LINE),
            keys: scratch.k_block.cast(),
        }
    }
}

/// Makes units of the rows of a tile. For each part, the words of a block have the order of [`Units`], each four times, for the four
/// keys of a group. So they fill the row. A vector of a part of fewer blocks reaches into what follows, where factors are 0.
///
/// # Safety
/// `scratch` has `rows` rows of `padded(d)` floats.
#[inline(always)]
pub(crate) unsafe fn quantize_rows<P: BlockProducts>(p: P, scratch: &Scratch, rows: usize, d: usize) {
    debug_assert!(rows <= ROWS);
    let mut units: [Word; MAX_HEAD_DIM / size_of::<Word>()] = [[0; 4]; _];
    for r in 0..rows {
        let row = scratch.q.wrapping_add(r * padded(d));
        // SAFETY: the caller's; a row has four times as many bytes as elements, of which there are at most MAX_HEAD_DIM.
        unsafe {
            *Memory::<P>::of(scratch).scales.add(r) = quantize::row(p.level(), row, units.as_mut_ptr().cast(), d);
            let mut to = row.cast::<[Word; GROUP]>();
            for first in (0..d / N).step_by(P::BLOCKS) {
                for word in 0..2 * WORDS {
                    for block in first..(first + P::BLOCKS).min(d / N) {
                        to.write([units[block * 2 * WORDS + word]; GROUP]);
                        to = to.add(1);
                    }
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
                match (rows, args.block.d == N * P::BLOCKS) {
                    (1, _) => some_rows::<P, 1, false>(p, &few, 0, 1, &keys),
                    (2, _) if const { P::GROUPS == 1 } => some_rows::<P, 2, false>(p, &few, 0, 2, &keys),
                    (_, true) => some_rows::<P, 4, true>(p, &few, 0, rows, &keys),
                    (_, false) => some_rows::<P, 4, false>(p, &few, 0, rows, &keys),
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

/// The keys of a subblock, and their neighbours up to what is multiplied side by side, for which others stand.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
unsafe fn take_apart<P: BlockProducts, U: IntegerUnit>(p: P, args: &DirectScores, head: usize, keys: KeyRange) {
    let Block { scratch, d, .. } = *args.block;
    let source = InCache::<P, U>::new(args, head);
    for j in (keys.low / SIDE * SIDE..keys.high).step_by(GROUP) {
        let to = Memory::<P>::of(scratch).keys.wrapping_add(j % SUBBLOCK / GROUP * parts::<P>(d));
        // SAFETY: the caller's; the memory has a part for every group of a subblock.
        unsafe {
            let group = source.group(p, keys, j);
            for i in 0..parts::<P>(d) {
                let n = d / N - i * P::BLOCKS;
                let (to, from) = (to.add(i), source.at(p, &group, i));
                let units = if n < P::BLOCKS {
                    units::<P, U>(p, from, n, &raw mut (*to).halves)
                } else {
                    units::<P, U>(p, from, P::BLOCKS, &raw mut (*to).halves)
                };
                (&raw mut (*to).units).write(units);
            }
        }
    }
}

/// Upper bound of the keys that are multiplied side by side.
const SIDE: usize = 2 * GROUP;

/// Where parts of keys come from.
trait Source<P: BlockProducts> {
    type Group: Copy;
    /// Whether all units are numbers of four or five bits.
    const NUMBERS: bool;
    /// Keys `j..j + GROUP`; others stand for those outside of `keys`.
    ///
    /// # Safety
    /// As [`scores`].
    unsafe fn group(&self, p: P, keys: KeyRange, j: usize) -> Self::Group;
    /// Part `i` of group `g`, of `n` blocks.
    ///
    /// # Safety
    /// As [`scores`].
    unsafe fn part(&self, p: P, group: &Self::Group, g: usize, i: usize, n: usize) -> (Units<P>, *const Halves);
}

/// Keys in the cache.
struct InCache<'a, P, U> {
    k: KeyPointers<'a, u8>,
    head: usize,
    /// Bytes from what is read to what is prefetched.
    ahead: isize,
    halves: *mut Halves,
    types: PhantomData<(P, U)>,
}

impl<'a, P: BlockProducts, U: IntegerUnit> InCache<'a, P, U> {
    #[inline(always)]
    fn new(args: &DirectScores<'a>, head: usize) -> Self {
        let halves = Memory::<P>::of(args.block.scratch).halves;
        Self { k: args.k, head, ahead: args.ahead.distance, halves, types: PhantomData }
    }

    /// Where part `i` of some keys is. It is prefetched for what is read later: every line, since one that is left out is waited for.
    #[inline(always)]
    fn at(&self, p: P, keys: &[*const u8; GROUP], i: usize) -> [*const u8; GROUP] {
        let mut from = [std::ptr::null(); GROUP];
        for c in 0..GROUP {
            from[c] = keys[c].wrapping_add(i * P::BLOCKS * size_of::<U>());
            for line in (0..P::BLOCKS * size_of::<U>()).step_by(LINE) {
                p.level().prefetch_far(from[c].wrapping_offset(self.ahead).wrapping_add(line));
            }
        }
        from
    }
}

impl<P: BlockProducts, U: IntegerUnit> Source<P> for InCache<'_, P, U> {
    type Group = [*const u8; GROUP];
    const NUMBERS: bool = matches!(U::KIND, Kind::Nibbles);

    #[inline(always)]
    unsafe fn group(&self, _: P, KeyRange { low, high }: KeyRange, j: usize) -> [*const u8; GROUP] {
        let inside = j >= low && j + GROUP <= high;
        let mut keys = [std::ptr::null(); GROUP];
        for c in 0..GROUP {
            keys[c] = self.k.key(self.head, if inside { j + c } else { (j + c).clamp(low, high - 1) });
        }
        keys
    }

    #[inline(always)]
    unsafe fn part(&self, p: P, keys: &[*const u8; GROUP], g: usize, i: usize, n: usize) -> (Units<P>, *const Halves) {
        let halves = self.halves.wrapping_add(g);
        // SAFETY: the caller's.
        unsafe { (units::<P, U>(p, self.at(p, keys, i), n, halves), halves) }
    }
}

/// Keys that were taken apart.
struct Apart<P: ByteProducts, const NUMBERS: bool> {
    keys: *const Part<P>,
    /// Parts of a head.
    count: usize,
}

impl<P: BlockProducts, const NUMBERS: bool> Source<P> for Apart<P, NUMBERS> {
    type Group = *const Part<P>;
    const NUMBERS: bool = NUMBERS;

    #[inline(always)]
    unsafe fn group(&self, _: P, _: KeyRange, j: usize) -> *const Part<P> {
        self.keys.wrapping_add(j % SUBBLOCK / GROUP * self.count)
    }

    #[inline(always)]
    unsafe fn part(&self, _: P, group: &*const Part<P>, _: usize, i: usize, _: usize) -> (Units<P>, *const Halves) {
        let part = group.wrapping_add(i);
        // SAFETY: the caller's.
        unsafe { ((*part).units, &raw const (*part).halves) }
    }
}

/// The units of some blocks, whose factors and minima are written to `memory`, and zeros for blocks beyond them.
///
/// # Safety
/// There are `n` blocks at each of `from`, at least one and at most [`BlockProducts::BLOCKS`].
#[inline(always)]
unsafe fn units<P: BlockProducts, U: IntegerUnit>(
    p: P,
    from: [*const u8; GROUP],
    n: usize,
    memory: *mut Halves,
) -> Units<P> {
    let mut halves = [[p.ones(); GROUP]; 2];
    // SAFETY: the caller's.
    unsafe {
        for c in 0..GROUP {
            let whole = match U::KIND {
                Kind::Bytes => p.bytes_of::<U>(from[c], n),
                // Taken apart below.
                Kind::Nibbles | Kind::Listed => [p.nibbles_of::<U>(from[c], n); 2],
            };
            [halves[0][c], halves[1][c]] = match const { U::FIFTH } {
                None => whole,
                Some(at) => {
                    let bits = fifth_bits::<U>(from[c], n, at);
                    let nibbles = [p.low_nibbles(whole[0]), p.high_nibbles(whole[0])];
                    [p.with_fifth_bits(nibbles[0], bits[0]), p.with_fifth_bits(nibbles[1], bits[1])]
                }
            };
        }
        let mut units = [p.transposed(halves[0]); 2];
        if U::FIFTH.is_some() || matches!(U::KIND, Kind::Bytes) {
            units[1] = p.transposed(halves[1]);
        }
        for i in 0..WORDS {
            let [low, high] = [units[0][i], units[1][i]];
            [units[0][i], units[1][i]] = match U::KIND {
                Kind::Bytes => [p.signed(low), p.signed(high)],
                Kind::Listed => [p.listed(p.low_nibbles(low)), p.listed(p.high_nibbles(low))],
                Kind::Nibbles if U::FIFTH.is_none() => [p.low_nibbles(low), p.high_nibbles(low)],
                Kind::Nibbles => [low, high],
            };
        }
        // Through memory, since vectors would be made of single elements.
        let (factors, minima) = (memory.cast::<f16>(), memory.cast::<f16>().add(MAX_LANES));
        for b in 0..P::BLOCKS {
            for c in 0..GROUP {
                let block = from[c].wrapping_add(b * size_of::<U>()).cast::<f16>();
                factors.add(b * GROUP + c).write(if b < n { block.read_unaligned() } else { f16::ZERO });
                if U::MINIMA {
                    minima.add(b * GROUP + c).write(if b < n { block.add(1).read_unaligned() } else { f16::ZERO });
                }
            }
        }
        units
    }
}

/// # Safety
/// As [`scores`]; the keys have been taken apart.
#[inline(always)]
pub(crate) unsafe fn multiply<P: BlockProducts>(p: P, args: &Products) {
    // SAFETY: the caller's.
    unsafe {
        if const { P::ADDS_NUMBERS } && args.numbers {
            multiply_apart::<P, true>(p, args);
        } else {
            multiply_apart::<P, false>(p, args);
        }
    }
}

/// # Safety
/// As [`multiply`]; with `NUMBERS`, units are numbers.
#[inline(always)]
unsafe fn multiply_apart<P: BlockProducts, const NUMBERS: bool>(p: P, args: &Products) {
    let rows = args.block.tile.head_rows;
    let keys = Memory::<P>::of(args.block.scratch).keys;
    let source = Apart::<P, NUMBERS> { keys, count: parts::<P>(args.block.d) };
    let mut row = 0;
    while row < rows {
        // SAFETY: the caller's.
        unsafe { some_rows::<P, 4, false>(p, args, row, (rows - row).min(4), &source) };
        row += 4;
    }
}

/// Where the units of a row are that belong to a word of a part of `n` blocks.
#[inline(always)]
fn words_of<P: BlockProducts>(row: *const f32, part: usize, word: usize, n: usize) -> *const i8 {
    row.cast::<[Word; GROUP]>().wrapping_add(part * 2 * WORDS * P::BLOCKS + word * n).cast()
}

/// The units of a row that belong to a word of a part of `n` blocks.
///
/// # Safety
/// The row has these units.
#[inline(always)]
unsafe fn row_units<P: BlockProducts>(p: P, row: *const f32, part: usize, word: usize, n: usize) -> P::Units {
    // SAFETY: the caller's.
    unsafe { p.queries(words_of::<P>(row, part, word, n)) }
}

impl<P: BlockProducts, const R: usize> RowSums<P, R> {
    /// # Safety
    /// The rows have the units of the part.
    #[inline(always)]
    unsafe fn new(p: P, rows: [*const f32; R], part: usize, n: usize, zero: i32) -> Self {
        let mut of = Self { offsets: [p.zero(); R], sums: [p.level().zero(); R] };
        // No closures, which would be functions without the level's features, here and below.
        for r in 0..R {
            let mut sum = p.zero();
            for word in 0..2 * WORDS {
                // SAFETY: the caller's.
                sum = p.add(sum, p.ones(), unsafe { row_units(p, rows[r], part, word, n) });
            }
            (of.offsets[r], of.sums[r]) = (p.times(sum, -zero), p.float(sum));
        }
        of
    }
}

/// `R` rows of the head, of which `n` are rows `row..row + n`; the last one stands for those that are missing. With `ONE`, a head is one
/// whole part, so that scores stay in registers.
///
/// # Safety
/// As [`scores`]; `source` has the keys.
#[inline(always)]
unsafe fn some_rows<P: BlockProducts, const R: usize, const ONE: bool>(
    p: P,
    args: &Products,
    row: usize,
    n: usize,
    source: &impl Source<P>,
) {
    let Products { block: &Block { tile, scratch, d, .. }, head, keys, zero, minima, .. } = *args;
    let (s, memory, blocks) = (p.level(), Memory::<P>::of(scratch), d / N);
    let first = head * tile.head_rows + row;
    let mut rows = [std::ptr::null(); R];
    let mut scales = [0.0; 4];
    let sums = memory.sums.cast::<RowSums<P, R>>();
    let mut out = [std::ptr::null_mut(); R];
    // SAFETY: the caller's; rows of scores have BLOCK floats, which are whole groups.
    unsafe {
        for r in 0..R {
            let number = first + r.min(n - 1);
            rows[r] = scratch.q.wrapping_add(number * padded(d)).cast_const();
            scales[r] = *memory.scales.add(number);
            out[r] = scratch.s.wrapping_add(number * BLOCK);
        }
        for i in 0..parts::<P>(d) {
            sums.add(i).write(RowSums::new(p, rows, i, (blocks - i * P::BLOCKS).min(P::BLOCKS), zero));
        }
        let side = GROUP * P::GROUPS;
        for j in (keys.low / side * side..keys.high).step_by(side) {
            let mut groups = [source.group(p, keys, j); 2];
            if P::GROUPS == 2 {
                groups[1] = source.group(p, keys, j + GROUP);
            }
            let mut scores = [[s.zero(); 4]; 2];
            let whole = blocks / P::BLOCKS;
            if ONE {
                add_part::<P, R, _>(p, source, &groups, rows, &*sums, 0, P::BLOCKS, minima, &mut scores);
            }
            for i in 0..if ONE { 0 } else { whole } {
                add_part::<P, R, _>(p, source, &groups, rows, &*sums.add(i), i, P::BLOCKS, minima, &mut scores);
            }
            if !ONE && blocks % P::BLOCKS > 0 {
                let n = blocks % P::BLOCKS;
                add_part::<P, R, _>(p, source, &groups, rows, &*sums.add(whole), whole, n, minima, &mut scores);
            }
            let scores = p.over_blocks(scores, scales);
            for r in 0..R {
                if P::GROUPS == 2 {
                    out[r].add(j).cast::<[[f32; GROUP]; 2]>().write(scores[r]);
                } else {
                    out[r].add(j).cast::<[f32; GROUP]>().write(scores[r][0]);
                }
            }
        }
    }
}

/// Adds products with part `i`, of `n` blocks, to the scores of groups.
///
/// # Safety
/// As [`some_rows`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn add_part<P: BlockProducts, const R: usize, S: Source<P>>(
    p: P,
    source: &S,
    groups: &[S::Group; 2],
    rows: [*const f32; R],
    of_rows: &RowSums<P, R>,
    i: usize,
    n: usize,
    minima: bool,
    scores: &mut [[V<P>; 4]; 2],
) {
    let s = p.level();
    let mut sums = [of_rows.offsets; 2];
    // SAFETY: the caller's.
    unsafe {
        let first = source.part(p, &groups[0], 0, i, n);
        let second = if P::GROUPS == 2 { source.part(p, &groups[1], 1, i, n) } else { first };
        let (units, halves) = ([first.0, second.0], [first.1, second.1]);
        for half in 0..2 {
            if const { P::ADDS_NUMBERS && S::NUMBERS } {
                for r in 0..R {
                    let mut queries = [std::ptr::null(); WORDS];
                    for word in 0..WORDS {
                        queries[word] = words_of::<P>(rows[r], i, half * WORDS + word, n);
                    }
                    for g in 0..P::GROUPS {
                        sums[g][r] = p.add_numbers(sums[g][r], &units[g][half], queries);
                    }
                }
                continue;
            }
            for word in 0..WORDS {
                for r in 0..R {
                    let queries = row_units(p, rows[r], i, half * WORDS + word, n);
                    for g in 0..P::GROUPS {
                        sums[g][r] = p.add(sums[g][r], units[g][half][word], queries);
                    }
                }
            }
        }
        for g in 0..P::GROUPS {
            // After the products, so that single stores are no longer under way.
            let factors = s.load_f16(halves[g].cast());
            let lows = if minima { s.load_f16(halves[g].cast::<f16>().add(MAX_LANES)) } else { s.zero() };
            for r in 0..R {
                scores[g][r] = s.fma(p.float(sums[g][r]), factors, scores[g][r]);
                if minima {
                    scores[g][r] = s.fma(of_rows.sums[r], lows, scores[g][r]);
                }
            }
        }
    }
}
