//! Keys of a block, transposed into tiles.
//!
//! Bound by shuffles on one port: 64 for sixteen keys and 32 dims, 1024 per block at head size 128, once for all rows of the tile.

use super::super::tiles::{ROW_BYTES, TILE_BYTES};
use super::{Call, DEPTH, LANES};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::KeyPointers;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, KeyRange, ones};
use half::bf16;
use std::arch::x86_64::*;

/// Transposes pairs of elements of the keys of block `b` into tiles, with zeros for keys outside the key range.
///
/// # Safety
/// The key range is inside K.
#[inline(always)]
pub(super) unsafe fn pack_keys(s: Avx512, call: &Call, b: usize, key_range: KeyRange, k: KeyPointers<bf16>) {
    // Keys outside the key range, and elements beyond a head, take a test each.
    if key_range.len() == BLOCK && call.sizes.d == call.sizes.dk {
        // SAFETY: the caller's.
        unsafe { pack::<true>(s, call, b, key_range, k) }
    } else {
        // SAFETY: the caller's.
        unsafe { pack::<false>(s, call, b, key_range, k) }
    }
}

/// [`pack_keys`]; with `WHOLE`, the key range is the block, and a head fills tiles.
///
/// # Safety
/// As [`pack_keys`].
#[inline(always)]
unsafe fn pack<const WHOLE: bool>(s: Avx512, call: &Call, b: usize, key_range: KeyRange, k: KeyPointers<bf16>) {
    let sizes = &call.sizes;
    for tile in 0..BLOCK / LANES {
        for step in 0..sizes.steps() {
            let i = step * DEPTH;
            let mask = if WHOLE { u32::MAX } else { ones(sizes.d - i) as u32 };
            let mut x = [s.zero(); MAX_LANES];
            // SAFETY: the caller's; masked-off lanes are not accessed. The copy has room for 64 keys per block.
            unsafe {
                for (j, x) in (tile * LANES..).zip(&mut x) {
                    if WHOLE || j >= key_range.low && j < key_range.high {
                        *x = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, k.key(0, j).wrapping_add(i).cast()));
                        let next = k.next(j);
                        if !next.is_null() {
                            s.prefetch_far(next.wrapping_add(i).cast());
                        }
                    }
                }
                s.transpose(&mut x);
                let to = call.scratch.k.add(sizes.key_tile(b * BLOCK / LANES + tile, step) * TILE_BYTES);
                for (pair, x) in x.iter().enumerate() {
                    s.store_f32(to.add(pair * ROW_BYTES as usize).cast(), *x);
                }
            }
        }
    }
}
