//! Repairs of NaN and infinity, which matrix products cannot take; see [`non_finite`].

use crate::kernels::generic::attention::{Block, KeyPointers, RowState, non_finite};
use crate::problem::grid::{BLOCK, padded};
use half::bf16;
use std::arch::aarch64::*;

/// Recomputes the scores of some query rows that are NaN, for visible keys.
///
/// # Safety
/// The scores of the rows, the first of which is row `first` of the tile, have been computed.
#[inline(always)]
pub(super) unsafe fn repair_scores(block: &Block, rows: &[RowState], first: usize, k: KeyPointers<bf16>) {
    let Block { scratch, key_range, d, .. } = *block;
    for (r, row) in rows.iter().enumerate() {
        let scores = scratch.s.wrapping_add((first + r) * BLOCK);
        // SAFETY: a row has BLOCK scores; those of masked keys are arbitrary. Visible keys are in the key range, and
        // the row's query is as long as a key.
        unsafe {
            let mut numbers = vdupq_n_u32(u32::MAX);
            for i in (0..BLOCK).step_by(4) {
                let x = vld1q_f32(scores.add(i));
                numbers = vandq_u32(numbers, vceqq_f32(x, x));
            }
            if vminvq_u32(numbers) == u32::MAX {
                continue;
            }
            let q = std::slice::from_raw_parts(scratch.q.add((first + r) * padded(d)), d);
            let visible_bits = row.visible_bits & key_range.bits();
            non_finite::recompute_nan_scores(visible_bits, q, 1, |j| k.key(0, j), |j| scores.add(j));
        }
    }
}

/// Adds the elements of values that are not finite, of the keys `non_finite_keys`, to the rows to which these keys are
/// visible.
///
/// # Safety
/// The outputs of the rows, the first of which is row `first` of the tile, have just been computed, and their weights
/// are still in place.
#[cold]
pub(super) unsafe fn add_non_finite(
    block: &Block,
    rows: &[RowState],
    first: usize,
    non_finite_keys: u64,
    v: KeyPointers<bf16>,
) {
    let Block { scratch, key_range, dv, .. } = *block;
    for (r, row) in rows.iter().enumerate() {
        // The outputs of a pair of rows are 2 x 2 matrices.
        let acc = scratch.acc.wrapping_add((first + r) / 2 * 2 * padded(dv) + r % 2 * 2);
        // SAFETY: the caller's; visible keys are in the key range.
        unsafe {
            non_finite::add_non_finite(
                row.visible_bits & non_finite_keys & key_range.bits(),
                (dv, 1),
                |j| *scratch.s.add((first + r) * BLOCK + j),
                |j| v.key(0, j),
                |i| acc.add(i / 2 * 4 + i % 2),
            );
        }
    }
}
