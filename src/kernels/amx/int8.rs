//! Scores of int8 keys by products of tiles of bytes (`tdpbssd`), at [`Precision::Integer`](crate::Precision::Integer).
//!
//! Only the scores of tiles with many rows are of this level; everything else is that of AVX512-VNNI. A score is an exact sum in 32 bits
//! and one product by the row's scale at both, so that it makes no difference which of them computes it: a prompt and a single token
//! have the same bits, and the bounds are those of AVX512-VNNI.
//!
//! Rows lie in memory as units, sixteen of them in a tile. The 64 keys of a block are transposed once for all rows, in fours of bytes, as
//! the other operand of a product takes them; what a head has less than whole tiles is 0 there, so that what follows a row's units is
//! of no matter.
//!
//! # What bounds it
//! Prompts of 32/8 heads of 128 are 1.36 to 1.42 times as fast as with AVX512-VNNI. By counts, at head size 128: a block takes eight
//! transpositions of 64 shuffles, once for all rows. Sixteen rows then take eight products of 16 cycles, ten tiles of operands of 8 cycles
//! each, and 64 conversions and multiplications, where AVX512-VNNI takes 2048 products and 64 trees of 43 instructions. The values, which are
//! weighted by products of words or in f32, take most of the rest.

use super::tiles::{ROW_BYTES, TILE_BYTES, Tiles};
use crate::cpu::level_features;
use crate::kernels::api::AttentionFns;
use crate::kernels::avx512::Avx512;
use crate::kernels::avx512vnni;
use crate::kernels::generic::attention::integer::Row;
use crate::kernels::generic::attention::{Block, DirectScores, KeyPieces, Pieces};
use crate::kernels::partial::with_features;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, padded};
use crate::problem::tile::PACK_ROWS;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Rows, and keys, of a tile.
const LANES: usize = 16;
/// Tiles of the keys of a block.
const GROUPS: usize = BLOCK / LANES;
/// Dims of a tile product.
const DEPTH: usize = ROW_BYTES as usize;

/// Sums of sixteen rows with a block of keys.
#[repr(C, align(64))]
struct Sums([[[i32; LANES]; LANES]; GROUPS]);

/// The entry points: those of AVX512-VNNI, with other scores.
pub(super) const fn functions() -> AttentionFns {
    let below = avx512vnni::functions();
    let keys = const { &KeyPieces { scores, ..*avx512vnni::functions().pieces.keys } };
    AttentionFns { pieces: Pieces { keys, ..below.pieces }, direct_rows: PACK_ROWS - 1, ..below }
}

level_features!(
    Avx512Vnni,
    with_features! {
        /// # Safety
        /// As that of AVX512-VNNI; the level is available.
        unsafe fn scores(args: &DirectScores) {
            // SAFETY: the caller's; the level includes AVX-512.
            unsafe {
                if args.block.tile.head_rows < PACK_ROWS {
                    avx512vnni::scores(args);
                } else if args.keys.low == args.block.key_range.low {
                    // Those of the other subblocks, too.
                    block_scores(Avx512::new_unchecked(), args);
                }
            }
        }
    }
);

/// Scores of all rows, at least [`PACK_ROWS`] and so of one KV head, with the keys of a block.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
unsafe fn block_scores(s: Avx512, args: &DirectScores) {
    let Block { tile, scratch, key_range, d, .. } = *args.block;
    // As much memory as 64 keys in f32 take, at least sixteen elements of each, of which this is a fourth.
    let keys = scratch.kt.cast::<u8>();
    let at = |step: usize, group: usize| keys.wrapping_add((step * GROUPS + group) * TILE_BYTES);
    let steps = d.div_ceil(DEPTH);
    let mut sums = MaybeUninit::<Sums>::uninit();
    let sums = sums.as_mut_ptr().cast::<[[i32; LANES]; LANES]>();
    // SAFETY: the caller's; masked bytes are not read. Sixteen rows are readable from each row on, since memory for keys follows them.
    unsafe {
        for step in 0..steps {
            let first = u64::MAX >> (DEPTH - (d - step * DEPTH).min(DEPTH));
            for group in 0..GROUPS {
                let mut x = [s.zero(); MAX_LANES];
                for (i, x) in x.iter_mut().enumerate() {
                    let j = group * LANES + i;
                    if j >= key_range.low && j < key_range.high {
                        let key = args.k.key(0, j).add(step * DEPTH);
                        *x = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(first, key.cast()));
                    }
                }
                s.transpose(&mut x);
                for (i, x) in x.iter().enumerate() {
                    s.store_f32(at(step, group).cast::<f32>().add(i * LANES), *x);
                }
            }
        }
        let tiles = Tiles::configure();
        for row in (0..tile.head_rows).step_by(LANES) {
            let units = Row::of(scratch.q, row, d).units.cast_const().cast::<u8>();
            tiles.zero();
            for step in 0..steps {
                let keys = std::array::from_fn(|group| at(step, group).cast_const());
                tiles.multiply_bytes(units.add(step * DEPTH), (padded(d) * size_of::<f32>()) as isize, keys);
            }
            for group in 0..GROUPS {
                tiles.store(group, sums.add(group).cast(), ROW_BYTES);
            }
            for r in 0..LANES.min(tile.head_rows - row) {
                let scale = s.splat(*Row::of(scratch.q, row + r, d).scale);
                for group in 0..GROUPS {
                    // At most 1024 * 127^2, which an f32 holds exactly.
                    let x = _mm512_cvtepi32_ps(_mm512_loadu_si512((&raw const (*sums.add(group))[r]).cast()));
                    s.store_f32(scratch.s.add((row + r) * BLOCK + group * LANES), s.mul(x, scale));
                }
            }
        }
    }
}
