//! Scores of a block to logits, and the masking of keys.
//!
//! A plain call runs only the masking, and only for blocks with masked keys. Otherwise bound by the arithmetic of the
//! logits.

use super::scratch::Group;
use super::{Call, LANES};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::row_logits;
use crate::kernels::simd::Simd;
use crate::problem::grid::{BLOCK, KeyRange};

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
    let Call { p, tile, .. } = call;
    let (low, high) = group.inner;
    if low <= base as i64 && (base + BLOCK) as i64 <= high && p.mask.is_none() && p.bit_mask.is_none() {
        group.visible_bits[b] = [u64::MAX; LANES];
        return u64::MAX;
    }
    let mut any = 0;
    for (row, to) in group.states[..group.rows].iter().zip(&mut group.visible_bits[b]) {
        // SAFETY: the caller's.
        *to = unsafe { p.visible_bits(tile.batch, (row.token, row.head), base, (row.low, row.high), always_visible) };
        any |= *to;
    }
    any
}

/// Replaces the scores of row `r` of a group in a block by logits times log2(e), unless the call is plain, and those of masked keys by
/// -inf. Removes the keys that the bias masks from the visible ones.
///
/// # Safety
/// `x` has the row's scores in the block, which begins at key `base`; the visible keys are inside the bias.
#[inline(always)]
pub(super) unsafe fn mask_scores(
    s: Avx512,
    call: &Call,
    group: &mut Group,
    r: usize,
    (b, base): (usize, usize),
    x: *mut f32,
) {
    let (row, bits) = (&mut group.states[r], &mut group.visible_bits[b][r]);
    // SAFETY: the caller's.
    unsafe {
        if call.factor.is_none() && *bits != 0 {
            row.visible_bits = *bits;
            let keys = KeyRange::around(*bits);
            row_logits(s, (call.p, call.tile.batch), (base, keys), keys, row, x);
            *bits = row.visible_bits;
        }
        if *bits != u64::MAX {
            let masked = s.splat(f32::NEG_INFINITY);
            for i in (0..BLOCK).step_by(LANES) {
                let x = x.add(i);
                s.store_f32(x, s.select_bits(*bits >> i & 0xffff, s.load_f32(x), masked));
            }
        }
    }
}
