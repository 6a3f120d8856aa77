//! NEON with FEAT_I8MM: products of 2 x 8 by 8 x 2 matrices of signed bytes, added up in 32 bits (`smmla`).
//!
//! A partial level, as [`neondotprod`](super::neondotprod), whose products serve a row that is alone: sums are exact, so that both give the
//! same bits. Rows are brought into pairs in memory, once for all keys of a call, and keys in registers, by a shuffle per 16 bytes.
//!
//! Never timed. By counts, per 16 elements of four int8 keys, eight rows take 20 vector instructions and four rows 12, where `sdot` takes 32
//! and 16; of blocks, four rows take 28 per 32 elements of four keys in place of 44.

use super::generic::attention::integer::{ByteProducts, Row};
use super::generic::attention::integer_blocks::BlockUnits;
use super::generic::attention::{Block, DirectScores};
use super::neon::{Neon, shells};
use super::neondotprod::{Dotprod, UNITS};
use super::partial::{integer_kernels, with_features};
use super::simd::LINE;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use std::arch::aarch64::*;
use std::arch::asm;

integer_kernels!(NeonI8mm, NeonI8mm, Neon, matrices, floats 1e-5,
    Int8 "attention_int8_integer_neoni8mm"
    Q8_0 "attention_q8_0_integer_neoni8mm"
    Q4_0 "attention_q4_0_integer_neoni8mm"
    Q4_1 "attention_q4_1_integer_neoni8mm"
    Q5_0 "attention_q5_0_integer_neoni8mm"
    Q5_1 "attention_q5_1_integer_neoni8mm"
    Iq4Nl "attention_iq4_nl_integer_neoni8mm"
);

/// Proof that the CPU has the level.
#[inline(always)]
fn matrices(neon: Neon) -> Dotprod<true> {
    Dotprod(neon)
}

/// `sums[2 i + j] + a[i] * b[j]` for i and j in 0..2, where row i of `a` and of `b` are eight bytes each.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn smmla(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: arithmetic on registers, of a level that is available.
    unsafe {
        asm!("smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b", sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sums
}

/// The first eight bytes of both, and the last.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn pair(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    // SAFETY: the caller's.
    unsafe {
        let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
        [vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))]
    }
}

/// Of two pairs of `[a.x, a.y, b.x, b.y]`, what is of a and what is of b.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn apart(first: int32x4_t, second: int32x4_t) -> [int32x4_t; 2] {
    // SAFETY: the caller's.
    unsafe {
        let (first, second) = (vreinterpretq_s64_s32(first), vreinterpretq_s64_s32(second));
        [vreinterpretq_s32_s64(vzip1q_s64(first, second)), vreinterpretq_s32_s64(vzip2q_s64(first, second))]
    }
}

/// Sixteen units each of two keys or rows.
type Pair = [int8x16_t; 2];

/// Where the pairs of a row of `d` units and another lie: in the second half of its memory, of which units, scale and sum take less than
/// the first.
#[inline(always)]
fn pairs_of(row: *const f32, d: usize) -> *mut Pair {
    row.cast_mut().cast::<u8>().wrapping_add(2 * padded(d)).cast()
}

/// Writes the pairs of two rows, with zeros up to whole ones.
///
/// # Safety
/// The first row's memory is writable; the level is available.
#[inline(always)]
pub(super) unsafe fn write_pairs(p: Dotprod<true>, [a, b]: [*const f32; 2], d: usize) {
    let to = pairs_of(a, d);
    let (a, b) = (a.cast::<i8>(), b.cast::<i8>());
    // SAFETY: the caller's; partial loads read what is left of a row.
    unsafe {
        for i in (0..d).step_by(UNITS) {
            let n = d - i;
            to.add(i / UNITS).write(if n >= UNITS {
                pair(p.queries(a.add(i)), p.queries(b.add(i)))
            } else {
                pair(p.queries_part(a.add(i), n), p.queries_part(b.add(i), n))
            });
        }
    }
}

/// The sums of products of part `part` of four keys with two pairs of rows: for each key, one of each row.
///
/// # Safety
/// [`write_pairs`] has written the pairs of both; the level is available.
#[inline(always)]
pub(super) unsafe fn totals(keys: [Pair; 4], rows: [*const f32; 2], part: usize, d: usize) -> [int32x4_t; 4] {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[vdupq_n_s32(0); 2]; 2];
        for half in 0..2 {
            let keys = [pair(keys[0][half], keys[1][half]), pair(keys[2][half], keys[3][half])];
            for r in 0..2 {
                let rows = *pairs_of(rows[r], d).add(2 * part + half);
                for c in 0..2 {
                    sums[c][r] = smmla(smmla(sums[c][r], keys[c][0], rows[0]), keys[c][1], rows[1]);
                }
            }
        }
        let ([a, b], [c, d]) = (apart(sums[0][0], sums[0][1]), apart(sums[1][0], sums[1][1]));
        [a, b, c, d]
    }
}

/// Scores of int8 keys with eight, four or two rows of a head, from `row` on. Returns how many; 0 if there is only one.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
pub(super) unsafe fn matrix_scores(p: Dotprod<true>, args: &DirectScores, head: usize, row: usize) -> usize {
    // SAFETY: the caller's; the rows are inside the tile.
    unsafe {
        match args.block.tile.head_rows - row {
            0 | 1 => 0,
            2 | 3 => pairs::<1>(p, args, head, row),
            4..8 => pairs::<2>(p, args, head, row),
            _ => pairs::<4>(p, args, head, row),
        }
    }
}

/// `R` pairs of rows of a head, from `row` on, times the keys of the subblock, four at a time. Scores of whole groups of four keys are
/// written; those outside the subblock are undefined. Returns the number of rows.
///
/// # Safety
/// As [`scores`]; the rows are inside the tile.
#[inline(always)]
unsafe fn pairs<const R: usize>(p: Dotprod<true>, args: &DirectScores, head: usize, row: usize) -> usize {
    let Block { tile, scratch, d, .. } = *args.block;
    let first = head * tile.head_rows + row;
    let rows: [[Row; 2]; R] =
        std::array::from_fn(|r| [Row::of(scratch.q, first + 2 * r, d), Row::of(scratch.q, first + 2 * r + 1, d)]);
    let out = scratch.s.wrapping_add(first * BLOCK);
    let row_pairs: [*const Pair; R] = std::array::from_fn(|r| pairs_of(rows[r][0].units.cast::<f32>(), d).cast_const());
    let distances = args.ahead.distances();
    let KeyRange { low, high } = args.keys;
    // SAFETY: the caller's; partial loads read what is left of a key, and the rows of scores have BLOCK floats.
    unsafe {
        for [a, b] in rows {
            write_pairs(p, [a.units.cast::<f32>(), b.units.cast::<f32>()], d);
        }
        for j in (low / 4 * 4..high).step_by(4) {
            let mut keys = [std::ptr::null(); 4];
            for (c, key) in keys.iter_mut().enumerate() {
                *key = args.k.key(head, (j + c).clamp(low, high - 1)).cast::<i8>();
                if row == 0 {
                    for line in (0..d).step_by(LINE) {
                        distances.prefetch(p.level(), key.wrapping_add(line));
                    }
                }
            }
            let mut sums = [[p.zero(); 2]; R];
            let mut i = 0;
            while i + UNITS <= d {
                let mut of_keys = [p.ones(); 4];
                for c in 0..4 {
                    of_keys[c] = p.keys(keys[c].add(i));
                }
                let of_keys = [pair(of_keys[0], of_keys[1]), pair(of_keys[2], of_keys[3])];
                for r in 0..R {
                    sums[r] = products(sums[r], of_keys, *row_pairs[r].add(i / UNITS));
                }
                i += UNITS;
            }
            if i < d {
                let n = d - i;
                let mut of_keys = [p.ones(); 4];
                for c in 0..4 {
                    of_keys[c] = p.keys_part(keys[c].add(i), n);
                }
                let of_keys = [pair(of_keys[0], of_keys[1]), pair(of_keys[2], of_keys[3])];
                for r in 0..R {
                    sums[r] = products(sums[r], of_keys, *row_pairs[r].add(i / UNITS));
                }
            }
            for r in 0..R {
                let totals = apart(sums[r][0], sums[r][1]);
                for i in 0..2 {
                    // At most 1024 * 127^2, which an f32 holds exactly.
                    let scores = vmulq_n_f32(vcvtq_f32_s32(totals[i]), *rows[r][i].scale);
                    vst1q_f32(out.add((2 * r + i) * BLOCK + j), scores);
                }
            }
        }
    }
    2 * R
}

/// Adds the products of a pair of rows with two pairs of keys.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn products(sums: [int32x4_t; 2], keys: [Pair; 2], rows: Pair) -> [int32x4_t; 2] {
    // SAFETY: the caller's.
    unsafe {
        [
            smmla(smmla(sums[0], rows[0], keys[0][0]), rows[1], keys[0][1]),
            smmla(smmla(sums[1], rows[0], keys[1][0]), rows[1], keys[1][1]),
        ]
    }
}
