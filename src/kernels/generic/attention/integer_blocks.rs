//! Blocks for products of integers ([`Precision::Integer`](crate::Precision::Integer)): how their numbers become bytes.
//!
//! Scores with keys in blocks are computed in two ways. On x86-64, words of four keys are transposed before they are multiplied, so that no
//! sums over lanes are left (`integer_words`). On AArch64, where levels have products of matrices, sums of quarters are transposed after it
//! (`integer_quarters`). Both round alike.

use crate::kernels::generic::blocks::{BlockUnit, Iq4Nl, N, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TABLE};

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use super::integer_quarters::{BlockProducts, Products, multiply, quantize_rows, scores, transposed};
#[cfg(target_arch = "x86_64")]
pub(crate) use super::integer_words::{BlockProducts, Products, multiply, quantize_rows, scores};

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

impl IntegerUnit for Q4_0 {
    const KIND: Kind = Kind::Nibbles;
    const ZERO: i32 = 8;
    const AT: usize = 2;
}

impl IntegerUnit for Q4_1 {
    const KIND: Kind = Kind::Nibbles;
    const AT: usize = 4;
    const MINIMA: bool = true;
}

impl IntegerUnit for Q5_0 {
    const KIND: Kind = Kind::Nibbles;
    const ZERO: i32 = 16;
    const AT: usize = 6;
    const FIFTH: Option<usize> = Some(2);
}

impl IntegerUnit for Q5_1 {
    const KIND: Kind = Kind::Nibbles;
    const AT: usize = 8;
    const FIFTH: Option<usize> = Some(4);
    const MINIMA: bool = true;
}

impl IntegerUnit for Iq4Nl {
    const KIND: Kind = Kind::Listed;
    const AT: usize = 2;
}

/// [`TABLE`] as bytes.
pub(crate) const BYTES: [i8; 16] = {
    let (mut bytes, mut i) = ([0; 16], 0);
    while i < 16 {
        bytes[i] = TABLE[i] as i8;
        i += 1;
    }
    bytes
};
