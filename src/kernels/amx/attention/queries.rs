//! Query rows of a group: their visible keys, and their bf16 terms packed into tiles.
//!
//! A query in f16 is the exact sum of two bf16 terms, and one in f32 of three. Packing runs once per tile and bounds
//! nothing.

use super::super::tiles::{ROW_BYTES, TILE_BYTES};
use super::scratch::{Group, Sizes};
use super::{Call, DEPTH, LANES, SUPERBLOCK, join_pair};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::state::{EMPTY, load_row};
use crate::kernels::generic::hadamard::rotate_row;
use crate::kernels::simd::{MAX_LANES, Simd};
use std::arch::x86_64::*;

/// Initialises group `g` with the next query rows of `rows`, and packs their queries.
///
/// # Safety
/// As [`walk`](super::walk); group `g` is one of the tile's.
#[inline(always)]
pub(super) unsafe fn pack_queries(s: Avx512, call: &Call, g: usize, rows: &mut impl Iterator<Item = (usize, usize)>) {
    let Call { p, tile, sizes: Sizes { d, dk, .. }, .. } = *call;
    let stage = call.scratch.stage;
    let mut group = Group {
        max: [f32::NEG_INFINITY; LANES],
        sum: [0.0; LANES],
        rounded: [0.0; LANES],
        visible_bits: [[0; LANES]; SUPERBLOCK],
        low: [0; LANES],
        high: [0; LANES],
        position: [0; LANES],
        token: [0; LANES],
        head: [0; LANES],
        slope: [0.0; LANES],
        total: [EMPTY; LANES],
        rows: (tile.rows() - g * LANES).min(LANES),
    };
    // SAFETY: the stage has 16 rows of dk floats; tokens and heads are inside q.
    unsafe {
        std::ptr::write_bytes(stage, 0, LANES * dk);
        for (r, (token, head)) in rows.take(group.rows).enumerate() {
            (group.low[r], group.high[r]) = p.visibility.visible_keys(tile.batch, token);
            group.position[r] = p.visibility.position(tile.batch, token);
            (group.token[r], group.head[r]) = (token as u32, head as u32);
            group.slope[r] = p.alibi.map_or(0.0, |slopes| slopes[head]);
            let (row, token) = p.visibility.query(tile.batch, token);
            load_row(s, p.q.dtype, p.q.row(row, token, head), p.q.strides[3], stage.add(r * dk), d);
            rotate_row(s, stage.add(r * dk), d, p.k_hadamard);
        }
        call.scratch.groups.add(g).write(group);

        let sign = if call.negative { i32::MIN } else { 0 };
        for step in 0..dk / DEPTH {
            for half in 0..2 {
                let mut x = [s.zero(); MAX_LANES];
                for (r, x) in x.iter_mut().enumerate() {
                    *x = s.load_f32(stage.add(r * dk + step * DEPTH + half * LANES));
                }
                s.transpose(&mut x);
                for pair in 0..LANES / 2 {
                    let mut x = [x[2 * pair], x[2 * pair + 1]];
                    for x in &mut x {
                        *x = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(*x), _mm512_set1_epi32(sign)));
                    }
                    for term in 0..call.terms {
                        let mut bits = [_mm512_setzero_si512(); 2];
                        for i in 0..2 {
                            (bits[i], x[i]) = split_term(s, x[i]);
                        }
                        let index = ((g * call.terms + term) * (dk / DEPTH) + step) * TILE_BYTES;
                        let to = call.scratch.q.add(index + (half * LANES / 2 + pair) * ROW_BYTES as usize);
                        _mm512_storeu_si512(to.cast(), join_pair(s, bits[0], bits[1]));
                    }
                }
            }
        }
    }
}

/// The upper half of every number, which is a bf16, and the remainder: 0 for infinities and NaN.
#[inline(always)]
fn split_term(_: Avx512, x: __m512) -> (__m512i, __m512) {
    // SAFETY: the argument proves the features.
    unsafe {
        let bits = _mm512_castps_si512(x);
        // A NaN whose payload is all in the lower half must not become an infinity.
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x40_0000));
        let upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        // Classes: quiet NaN, +inf, -inf, signalling NaN.
        let non_finite = _mm512_fpclass_ps_mask::<0b1001_1001>(x);
        (upper, _mm512_maskz_sub_ps(!non_finite, x, _mm512_castsi512_ps(upper)))
    }
}
