//! Query rows of a group: their visible keys, and their bf16 terms as rows of tiles.
//!
//! A query in f16 is the exact sum of two bf16 terms, and one in f32 of three. Packing runs once per tile and bounds
//! nothing.

use super::super::tiles::{ROW_BYTES, TILE_BYTES};
use super::{Call, DEPTH, LANES, SUPERBLOCK, round};
use crate::dtype::DType;
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::state::load_row;
use crate::kernels::generic::attention::{RowState, row_lines};
use crate::kernels::generic::hadamard::rotate_row;
use crate::kernels::simd::Simd;
use crate::problem::grid::ones;
use std::arch::x86_64::*;

/// Initialises group `g` with the next query rows of `rows`, and packs their queries.
///
/// # Safety
/// As [`walk`](super::walk); group `g` is one of the tile's.
#[inline(always)]
pub(super) unsafe fn pack_queries(
    s: Avx512,
    call: &Call,
    g: usize,
    (rows, ahead): (&mut impl Iterator<Item = (usize, usize)>, &mut impl Iterator<Item = (usize, usize)>),
) {
    let Call { p, tile, sizes, terms, .. } = *call;
    let (steps, stage) = (sizes.steps(), call.scratch.stage);
    let as_they_are = p.q.dtype == DType::Bf16 && p.q.strides[3] == 1 && p.k_hadamard == 0;
    // SAFETY: the caller's; every field of the group is written; tokens and heads are inside q.
    unsafe {
        let group = call.scratch.groups.add(g);
        let group_rows = call.cut.group_rows;
        (*group).rows = (tile.rows() - g * group_rows).min(group_rows);
        (*group).inner = if p.visibility.query_positions.is_some() { (0, 0) } else { (0, i64::MAX) };
        ((*group).visible_bits, (*group).fresh) = ([[0; LANES]; SUPERBLOCK], true);
        let tiles = call.scratch.q.add(g * terms * steps * TILE_BYTES);
        for (r, (token, head)) in rows.take((*group).rows).enumerate() {
            if let Some((token, head)) = ahead.next() {
                let (batch, token) = p.visibility.query(tile.batch, token);
                row_lines(p.q, p.q.row(batch, token, head)).for_each(|line| s.prefetch(line));
            }
            let keys = p.visibility.visible_keys(tile.batch, token);
            let inner = &mut (*group).inner;
            *inner = (inner.0.max(keys.0), inner.1.min(keys.1));
            let position = p.visibility.position(tile.batch, token);
            (*group).states[r] = RowState { position, ..RowState::new(keys, (token as u32, head as u32)) };
            let (row, token) = p.visibility.query(tile.batch, token);
            let (from, to) = (p.q.row(row, token, head), tiles.add(r * ROW_BYTES as usize));
            if as_they_are {
                for step in 0..steps {
                    let i = step * DEPTH;
                    let x = _mm512_maskz_loadu_epi16(ones(sizes.d - i) as u32, from.cast::<i16>().wrapping_add(i));
                    _mm512_storeu_si512(to.add(step * TILE_BYTES).cast(), x);
                }
                continue;
            }
            load_row(s, p.q.dtype, from, p.q.strides[3], stage, sizes.d);
            rotate_row(s, stage, sizes.d, p.k_hadamard);
            std::ptr::write_bytes(stage.add(sizes.d), 0, sizes.dk - sizes.d);
            for step in 0..steps {
                let mut first = s.load_f32(stage.add(step * DEPTH));
                let mut second = s.load_f32(stage.add(step * DEPTH + LANES));
                for term in 0..terms {
                    let (low, high);
                    (low, first) = split_term(s, first);
                    (high, second) = split_term(s, second);
                    // Exact.
                    let term = to.add((term * steps + step) * TILE_BYTES);
                    _mm512_storeu_si512(term.cast(), round(s, low, high));
                }
            }
        }
    }
}

/// The upper half of every number, which is a bf16, and the remainder: 0 for infinities and NaN.
#[inline(always)]
fn split_term(_: Avx512, x: __m512) -> (__m512, __m512) {
    // SAFETY: the argument proves the features.
    unsafe {
        let bits = _mm512_castps_si512(x);
        // A NaN whose payload is all in the lower half must not become an infinity.
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x40_0000));
        let upper = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
        // Classes: quiet NaN, +inf, -inf, signalling NaN.
        let non_finite = _mm512_fpclass_ps_mask::<0b1001_1001>(x);
        (upper, _mm512_maskz_sub_ps(!non_finite, x, upper))
    }
}
