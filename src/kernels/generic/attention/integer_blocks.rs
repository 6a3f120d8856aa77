//! Blocks for products of integers ([`Precision::Integer`](crate::Precision::Integer)): how their numbers become bytes.
//!
//! Scores with keys in blocks are computed in two ways. On x86-64, words of four keys are transposed before they are multiplied, so that no
//! sums over lanes are left (`integer_words`). On AArch64, where levels have products of matrices, sums of quarters are transposed after it
//! (`integer_quarters`). Both round alike.

use super::integer::ByteProducts;
use super::{Block, DirectScores};
use crate::kernels::generic::blocks::{BlockUnit, Iq4Nl, N, NibbleBlock, Q8_0};
use crate::kernels::simd::{LINE, Simd};
use crate::problem::grid::KeyRange;
use crate::problem::tile::MAX_TILE_ROWS;

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use super::integer_quarters::{BlockProducts, multiply, quantize_rows, scores, transposed};
#[cfg(target_arch = "x86_64")]
pub(crate) use super::integer_words::{BlockProducts, WORDS, multiply, quantize_rows, scores};

/// Units of a block in a vector.
pub(crate) const HALF: usize = N / 2;

/// How the numbers of a block become bytes.
pub(crate) enum Kind {
    /// They are signed bytes.
    Bytes,
    /// Low and high halves of bytes.
    Nibbles,
    /// The same, which number the entries of a table.
    Listed,
}

/// A block for products of integers.
pub(crate) trait IntegerUnit: BlockUnit {
    const KIND: Kind;
    /// What is taken from a number. Signed bytes and the table have an offset of the level's instead.
    const ZERO: i32 = 0;
    /// Bytes before the numbers.
    const AT: usize;
    /// Bytes before the fifth bits, if there are any.
    const FIFTH: Option<usize> = None;
    /// Whether the second f16 is a minimum.
    const MINIMA: bool = false;

    /// Bytes before the first or the second [`HALF`] bytes of the numbers. Nibbles have no second ones.
    const STARTS: [usize; 2] = [Self::AT, Self::AT + if matches!(Self::KIND, Kind::Bytes) { HALF } else { 0 }];
}

impl IntegerUnit for Q8_0 {
    const KIND: Kind = Kind::Bytes;
    const AT: usize = 2;
}

impl<const MINIMA: usize, const FIFTHS: usize> IntegerUnit for NibbleBlock<MINIMA, FIFTHS> {
    const KIND: Kind = Kind::Nibbles;
    const ZERO: i32 = if MINIMA == 0 { Self::CENTRE as i32 } else { 0 };
    const AT: usize = size_of::<Self>() - HALF;
    const FIFTH: Option<usize> = if FIFTHS == 4 { Some(Self::AT - FIFTHS) } else { None };
    const MINIMA: bool = MINIMA == 1;
}

impl IntegerUnit for Iq4Nl {
    const KIND: Kind = Kind::Listed;
    const AT: usize = 2;
}

pub(super) type V<P> = <<P as ByteProducts>::Level as Simd>::V;

/// The bytes of blocks as units of a key. A vector of units has [`HALF`] bytes of each of [`Self::BLOCKS`] blocks.
pub(crate) trait BlockUnits: ByteProducts {
    /// Blocks per vector.
    const BLOCKS: usize = Self::UNITS / HALF;

    fn low_nibbles(self, x: Self::Units) -> Self::Units;
    fn high_nibbles(self, x: Self::Units) -> Self::Units;
    /// Signed bytes as units of a key, with the offset.
    fn signed(self, x: Self::Units) -> Self::Units;
    /// Entries of [`VALUES`](crate::kernels::generic::blocks::VALUES), with the offset.
    fn listed(self, x: Self::Units) -> Self::Units;
    /// Adds 16 to the bytes whose bits are set.
    fn with_fifth_bits(self, x: Self::Units, bits: u64) -> Self::Units;
    /// Units of a key that are all 1, without an offset.
    fn ones(self) -> Self::Units;
    fn times(self, x: Self::Sums, factor: i32) -> Self::Sums;
}

/// What is taken from each unit of a key in blocks of type `U`.
pub(super) const fn zero<P: ByteProducts, U: IntegerUnit>() -> i32 {
    match U::KIND {
        Kind::Nibbles => U::ZERO,
        Kind::Bytes | Kind::Listed => P::KEY_OFFSET,
    }
}

/// The fifth bits of the numbers in the first and in the second [`HALF`] of `n` blocks, which begin `at` bytes behind the first of each.
///
/// # Safety
/// The blocks are readable.
#[inline(always)]
pub(super) unsafe fn fifth_bits<U: IntegerUnit>(from: *const u8, n: usize, at: usize) -> [u64; 2] {
    let mut bits = [0; 2];
    for i in 0..n {
        // SAFETY: the caller's.
        let of_block = u32::from_le(unsafe { from.add(i * size_of::<U>() + at).cast::<u32>().read_unaligned() });
        bits[0] |= u64::from(of_block & 0xffff) << (HALF * i);
        bits[1] |= u64::from(of_block >> HALF) << (HALF * i);
    }
    bits
}

/// Parts of a head of `d` elements: [`BlockUnits::BLOCKS`] blocks each.
pub(super) const fn parts<P: BlockUnits>(d: usize) -> usize {
    d.div_ceil(N * P::BLOCKS)
}

/// Rows whose scales lie before the sums of rows, in whole lines.
pub(super) const ROWS: usize = MAX_TILE_ROWS.next_multiple_of(LINE / size_of::<f32>());

/// The keys of a subblock that was taken apart, times all rows of a head.
pub(crate) struct Products<'a> {
    pub(super) block: &'a Block<'a>,
    pub(super) head: usize,
    pub(super) keys: KeyRange,
    /// What is taken from each unit of a key.
    pub(super) zero: i32,
    /// Whether blocks have minima.
    pub(super) minima: bool,
    /// Whether units of keys are numbers of four or five bits.
    #[cfg_attr(target_arch = "aarch64", expect(dead_code, reason = "products of matrices take all units alike"))]
    pub(super) numbers: bool,
}

impl<'a> Products<'a> {
    /// Of keys in blocks of type `U`.
    #[inline(always)]
    pub(super) fn of<P: ByteProducts, U: IntegerUnit>(args: &DirectScores<'a>, head: usize, keys: KeyRange) -> Self {
        let (zero, numbers) = (zero::<P, U>(), matches!(U::KIND, Kind::Nibbles));
        Self { block: args.block, head, keys, zero, minima: U::MINIMA, numbers }
    }
}
