//! Scores of int8 keys by products of integers ([`Precision::Integer`](crate::Precision::Integer)).
//!
//! A query row is quantised as a token and head of an int8 cache with f32 scales is: its largest magnitude divided by 127 is the scale,
//! units are rounded to nearest, ties to even. A score is the sum of products of units, which is exact in 32 bits and so does not depend
//! on an order, times the scale of the query, and after it, as at the other precisions, times that of the key. Everything after the
//! scores is f32, as in the full level below.
//!
//! A query with NaN or infinity has a scale of NaN, and gives NaN.
//!
//! # What bounds it
//! On AVX-512, a vector of 64 elements of a key takes a load, an exclusive or, and for each row a product that reads its units from
//! memory: at head size 128 four rows over four keys take 32 products, where f32 takes 128 FMAs and 64 instructions that widen. The sum
//! over lanes is a tree of 15 additions and 28 shuffles for 16 scores. With four rows and more, the FMAs of P V bind, with one row memory.

use super::{Block, DirectScores};
use crate::kernels::generic::quantize;
use crate::kernels::simd::Simd;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use half::f16;

/// Products of signed bytes, added up in 32 bits. A value proves that the CPU has the level's features.
pub(crate) trait ByteProducts: Copy {
    /// The level for everything else.
    type Level: Simd;
    /// A vector of units.
    type Units: Copy;
    /// A vector of sums.
    type Sums: Copy;
    /// Units per vector, at most 64.
    const UNITS: usize;
    /// Scores that are computed together, 8 or 16: as many sums as registers allow.
    const SCORES: usize;
    /// What is added to each unit of a key, for instructions that multiply a signed byte by an unsigned one.
    const KEY_OFFSET: i32;

    fn level(self) -> Self::Level;
    fn zero(self) -> Self::Sums;
    /// Units of a key, with the offset.
    ///
    /// # Safety
    /// [`Self::UNITS`] bytes are readable.
    unsafe fn keys(self, p: *const i8) -> Self::Units;
    /// The first `n < UNITS` units of a key, with the offset; the others may be any.
    ///
    /// # Safety
    /// `n` bytes are readable.
    unsafe fn keys_part(self, p: *const i8, n: usize) -> Self::Units;
    /// # Safety
    /// [`Self::UNITS`] bytes are readable.
    unsafe fn queries(self, p: *const i8) -> Self::Units;
    /// The first `n < UNITS` units of a query, and zeros.
    ///
    /// # Safety
    /// `n` bytes are readable.
    unsafe fn queries_part(self, p: *const i8, n: usize) -> Self::Units;
    /// Adds the products of units, each to one of the sums.
    fn add(self, sums: Self::Sums, keys: Self::Units, queries: Self::Units) -> Self::Sums;
    /// The sums over lanes of the first [`Self::SCORES`] vectors.
    fn totals(self, sums: &[Self::Sums; MAX_SCORES]) -> [i32; MAX_SCORES];

    /// Scores of some rows of a head, from `row` on, by products of matrices, where a level has them. Returns how many rows; 0 if there are
    /// too few.
    ///
    /// # Safety
    /// As [`scores`].
    #[inline(always)]
    unsafe fn matrix_scores(self, _: &DirectScores, _head: usize, _row: usize) -> usize {
        0
    }
}

/// Upper bound of [`ByteProducts::SCORES`].
pub(crate) const MAX_SCORES: usize = 16;

/// The rows of a tile, which become units.
#[derive(Clone, Copy)]
pub(crate) struct IntegerQueries {
    /// Rows of `padded(d)` floats. Afterwards a row begins with `d` units; its scale in f32 and the sum of its units in 32 bits are
    /// at [`Row`].
    pub q: *mut f32,
    pub rows: usize,
    pub d: usize,
}

/// A row of units.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub units: *mut i8,
    pub scale: *mut f32,
    sum: *mut i32,
}

impl Row {
    /// Row `r` of `q`. A row has at least 64 bytes, of which units take a fourth.
    #[inline(always)]
    pub fn of(q: *mut f32, r: usize, d: usize) -> Self {
        let units = q.wrapping_add(r * padded(d)).cast::<i8>();
        let scale = units.wrapping_add(padded(d)).cast::<f32>();
        Self { units, scale, sum: scale.wrapping_add(1).cast() }
    }
}

impl IntegerQueries {
    /// # Safety
    /// The rows are readable and writable.
    #[inline(always)]
    pub unsafe fn run<S: Simd>(self, s: S) {
        let Self { q, rows, d } = self;
        for r in 0..rows {
            let row = Row::of(q, r, d);
            // SAFETY: the caller's. Units are written in order, each behind what has been read; scale and sum lie behind the units.
            unsafe {
                let scale = quantize::row(s, q.wrapping_add(r * padded(d)), row.units, d);
                *row.sum = (0..d).map(|i| i32::from(*row.units.add(i))).sum();
                *row.scale = scale;
            }
        }
    }
}

/// Scores of all rows with the keys of a subblock.
///
/// # Safety
/// As [`DirectScores::run`]; keys are int8, and the rows are those that [`IntegerQueries`] has written.
#[inline(always)]
pub(crate) unsafe fn scores<P: ByteProducts>(p: P, args: &DirectScores) {
    let rows = args.block.tile.head_rows;
    for head in 0..args.block.tile.kv_heads {
        let mut row = 0;
        while row < rows {
            // SAFETY: the caller's; the rows of the head are inside the tile.
            row += unsafe {
                let n = p.matrix_scores(args, head, row);
                match (rows - row, P::SCORES) {
                    _ if n > 0 => n,
                    (1, 16) => dots::<P, 1, 16>(p, args, head, row),
                    (1, _) => dots::<P, 1, 8>(p, args, head, row),
                    (2, 16) => dots::<P, 2, 8>(p, args, head, row),
                    (2, _) => dots::<P, 2, 4>(p, args, head, row),
                    (3, 16) => dots::<P, 3, 4>(p, args, head, row),
                    (3, _) => dots::<P, 3, 2>(p, args, head, row),
                    (_, 16) => dots::<P, 4, 4>(p, args, head, row),
                    _ => dots::<P, 4, 2>(p, args, head, row),
                }
            };
        }
    }
}

/// `R` rows of a head, from `row` on, times the keys of the subblock, `C` keys at a time. Scores of whole groups of `C` keys are
/// written; those outside the subblock are undefined. Returns `R`.
///
/// # Safety
/// As [`scores`]; the rows are inside the tile.
#[inline(always)]
unsafe fn dots<P: ByteProducts, const R: usize, const C: usize>(
    p: P,
    args: &DirectScores,
    head: usize,
    row: usize,
) -> usize {
    let Block { tile, scratch, d, .. } = *args.block;
    let first = head * tile.head_rows + row;
    let rows: [Row; R] = std::array::from_fn(|r| Row::of(scratch.q, first + r, d));
    let out = scratch.s.wrapping_add(first * BLOCK);
    let KeyRange { low, high } = args.keys;
    // SAFETY: the caller's; partial loads read what is left of a key and of a row, and the rows of scores have BLOCK floats.
    unsafe {
        let scales: [f32; MAX_SCORES] = std::array::from_fn(|i| *rows[(i / C).min(R - 1)].scale);
        let offsets: [i32; MAX_SCORES] = std::array::from_fn(|i| P::KEY_OFFSET * *rows[(i / C).min(R - 1)].sum);
        for j in (low / C * C..high).step_by(C) {
            let inside = j >= low && j + C <= high;
            let mut keys = [std::ptr::null(); C];
            for (c, key) in keys.iter_mut().enumerate() {
                let j = if inside { j + c } else { (j + c).clamp(low, high - 1) };
                *key = args.k.key(head, j).cast::<i8>();
            }
            // Keys in the inner loop, which is unrolled, so that sums stay in registers.
            let mut sums = [[p.zero(); C]; R];
            let mut i = 0;
            while i + P::UNITS <= d {
                for c in 0..C {
                    let key = keys[c].add(i);
                    if row == 0 {
                        // As many bytes as a pair of vectors of f16 has.
                        args.ahead.pair(p.level(), key.cast::<f16>());
                    }
                    let units = p.keys(key);
                    for r in 0..R {
                        sums[r][c] = p.add(sums[r][c], units, p.queries(rows[r].units.add(i)));
                    }
                }
                i += P::UNITS;
            }
            if i < d {
                for c in 0..C {
                    let units = p.keys_part(keys[c].add(i), d - i);
                    for r in 0..R {
                        sums[r][c] = p.add(sums[r][c], units, p.queries_part(rows[r].units.add(i), d - i));
                    }
                }
            }
            let sums: [P::Sums; MAX_SCORES] =
                std::array::from_fn(|i| if i < R * C { sums[i / C][i % C] } else { p.zero() });
            let totals = p.totals(&sums);
            let mut scores = [0.0f32; MAX_SCORES];
            for i in 0..R * C {
                // At most 1024 * 127^2, which an f32 holds exactly.
                scores[i] = (totals[i] - offsets[i]) as f32 * scales[i];
            }
            for r in 0..R {
                std::ptr::copy_nonoverlapping(scores.as_ptr().add(r * C), out.add(r * BLOCK + j), C);
            }
        }
    }
    R
}
