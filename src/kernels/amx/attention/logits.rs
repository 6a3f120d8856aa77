//! Scores of a block to logits, and the masking of keys: one vector of sixteen query rows per key.
//!
//! A plain call runs only the masking, and only for blocks with masked keys. Otherwise bound by the arithmetic of the
//! logits.

use super::scratch::Group;
use super::{Call, LANES};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::state::load_row;
use crate::kernels::generic::attention::{logits, masked_by_bias};
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use crate::view::RawView;
use std::arch::x86_64::*;

/// Sets the visible keys of block `b`, which begins at key `base`, for the rows of a group. Returns the keys that are
/// visible to any row.
///
/// # Safety
/// The keys that are visible to a row are inside the masks.
#[inline]
pub(super) unsafe fn set_visible_bits(
    call: &Call,
    group: &mut Group,
    b: usize,
    base: usize,
    always_visible: u64,
) -> u64 {
    let mut any = 0;
    for r in 0..LANES {
        if r >= group.rows {
            group.visible_bits[b][r] = u64::MAX;
            continue;
        }
        let (row, keys) = ((group.token[r], group.head[r]), (group.low[r], group.high[r]));
        // SAFETY: the caller's.
        let bits = unsafe { call.p.visible_bits(call.tile.batch, row, base, keys, always_visible) };
        group.visible_bits[b][r] = bits;
        any |= bits;
    }
    any
}

/// Replaces the scores of a block by logits times log2(e), unless the call is plain, and those of masked keys by -inf.
/// Removes the keys that the bias masks from the visible ones.
///
/// # Safety
/// `x` has the block's scores; the visible keys are inside the bias.
#[inline(always)]
pub(super) unsafe fn mask_scores(s: Avx512, call: &Call, group: &mut Group, x: *mut f32, b: usize, base: usize) {
    let Call { p, tile, .. } = *call;
    // SAFETY: the caller's; arrays of a group have sixteen elements.
    unsafe {
        if call.factor.is_none() {
            let mut bias = [s.zero(); BLOCK];
            if let Some(view) = &p.bias {
                load_bias(s, view, tile.batch, group, b, base, &mut bias);
                for (j, bias) in bias.iter().enumerate() {
                    let masked = masked_by_bias(s, *bias);
                    if masked != 0 {
                        (0..group.rows).for_each(|r| group.visible_bits[b][r] &= !((masked >> r & 1) << j));
                    }
                }
            }
            let mut distance = [0.0; LANES];
            (0..LANES).for_each(|r| distance[r] = (base as i64 - group.position[r]) as f32);
            let (distance, slope) = (s.load_f32(distance.as_ptr()), s.load_f32(group.slope.as_ptr()));
            let own_keys = p.alibi.and_then(|_| p.visibility.own_keys(tile.batch));
            for j in 0..BLOCK {
                let mut alibi = None;
                if p.alibi.is_some() {
                    let distance = match own_keys {
                        None => s.add(s.splat(j as f32), distance),
                        Some(own_keys) => {
                            let key = own_keys.position((base + j) as i64);
                            let distances: [f32; LANES] = std::array::from_fn(|r| (key - group.position[r]) as f32);
                            s.load_f32(distances.as_ptr())
                        }
                    };
                    alibi = Some((slope, distance));
                }
                let bias = if p.bias.is_some() { Some(bias[j]) } else { None };
                let x = x.add(j * LANES);
                s.store_f32(x, logits(s, p, call.scale, s.load_f32(x), alibi, bias));
            }
        }
        let visible_bits = &group.visible_bits[b];
        if visible_bits.iter().all(|&bits| bits == u64::MAX) {
            return;
        }
        let masked = s.splat(f32::NEG_INFINITY);
        let (first, last) =
            (_mm512_loadu_si512(visible_bits.as_ptr().cast()), _mm512_loadu_si512(visible_bits[8..].as_ptr().cast()));
        for j in 0..BLOCK {
            let bit = _mm512_set1_epi64(1 << j);
            let visible = _mm512_test_epi64_mask(first, bit) as u64 | (_mm512_test_epi64_mask(last, bit) as u64) << 8;
            let x = x.add(j * LANES);
            s.store_f32(x, s.select_bits(visible, s.load_f32(x), masked));
        }
    }
}

/// The bias of a block, one vector of rows per key; 0 outside a row's visible keys.
///
/// # Safety
/// The visible keys of the group's rows are inside the bias.
#[inline(always)]
unsafe fn load_bias(
    s: Avx512,
    view: &RawView,
    batch: usize,
    group: &Group,
    b: usize,
    base: usize,
    to: &mut [__m512; BLOCK],
) {
    let mut rows = [[0.0f32; BLOCK]; LANES];
    for r in (0..group.rows).filter(|&r| group.visible_bits[b][r] != 0) {
        let KeyRange { low, high } = KeyRange::around(group.visible_bits[b][r]);
        // SAFETY: the caller's.
        unsafe {
            let at = view.row(batch, group.token[r] as usize, group.head[r] as usize);
            let first = (base + low) as isize * view.strides[3] as isize * view.dtype.size() as isize;
            let to = rows[r].as_mut_ptr().add(low);
            load_row(s, view.dtype, at.wrapping_offset(first), view.strides[3], to, high - low);
        }
    }
    for (i, to) in to.as_chunks_mut::<MAX_LANES>().0.iter_mut().enumerate() {
        for r in 0..LANES {
            // SAFETY: sixteen floats of a row.
            to[r] = unsafe { s.load_f32(rows[r].as_ptr().add(i * LANES)) };
        }
        s.transpose(to);
    }
}
