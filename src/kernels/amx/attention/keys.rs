//! Keys of a block as rows of whole tiles.
//!
//! Bound by the copy: one load and one store per 64 bytes, once for all rows of the tile. Tiles of at most
//! [`DIRECT_ROWS`] rows read whole blocks from the cache, without a copy.

use super::super::tiles::Operand;
use super::scratch::Sizes;
use super::{Call, DEPTH, LANES};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::KeyPointers;
use crate::problem::grid::{BLOCK, KeyRange, ones};
use half::bf16;
use std::arch::x86_64::*;

/// Tiles of at most this many rows read K from the cache: a copy that is read once or twice does not pay.
const DIRECT_ROWS: usize = 2 * LANES;

/// The keys of a block: the first one, and the distance in bytes from one to the next.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    pub first: Operand,
    pub stride: isize,
}

/// The keys of block `b` as rows of whole tiles: in the cache, or in a copy with zeros around the key range.
///
/// # Safety
/// The key range is inside K.
#[inline(always)]
pub(super) unsafe fn pack_keys(_: Avx512, call: &Call, b: usize, key_range: KeyRange, k: KeyPointers<bf16>) -> Keys {
    let Call { tile, sizes: Sizes { d, dk, .. }, .. } = *call;
    // Gathered rows do not qualify, because the next block overwrites them.
    if d == dk
        && call.p.k.strides[3] == 1
        && key_range.low == 0
        && key_range.high == BLOCK
        && tile.rows() <= DIRECT_ROWS
        && let Some(stride) = k.stride(key_range)
    {
        return Keys { first: k.key(0, 0).cast(), stride };
    }
    // SAFETY: the caller's; the copy has room for 64 keys per block.
    unsafe {
        let copy = call.scratch.k.add(b * BLOCK * dk);
        for j in 0..BLOCK {
            let row = copy.add(j * dk);
            if j < key_range.low || j >= key_range.high {
                std::ptr::write_bytes(row, 0, dk);
                continue;
            }
            let key = k.key(0, j);
            for i in (0..dk).step_by(DEPTH) {
                let x = _mm512_maskz_loadu_epi16(ones(d - i.min(d)) as u32, key.wrapping_add(i).cast());
                _mm512_storeu_si512(row.add(i).cast(), x);
            }
        }
        Keys { first: copy.cast(), stride: (dk * size_of::<bf16>()) as isize }
    }
}
