//! Repairs of NaN and infinity, which tile products cannot take; see [`non_finite`].

use super::super::tiles::{ROW_BYTES, TILE_BYTES};
use super::scratch::{Group, Sizes, WEIGHTS};
use super::work::Job;
use super::{Call, DEPTH, LANES, SUPERBLOCK, SUPERBLOCK_KEYS, place};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::non_finite;
use crate::kernels::generic::attention::state::load_row;
use crate::kernels::generic::hadamard::rotate_row;
use crate::kernels::simd::Simd;
use crate::problem::grid::BLOCK;
use half::bf16;
use std::arch::x86_64::*;

/// Recomputes the scores of row `r` of a group in a block that are NaN, for visible keys.
///
/// # Safety
/// `x` has the row's scores in the block, which begins at key `base`.
#[inline(always)]
pub(super) unsafe fn repair_scores(
    s: Avx512,
    call: &Call,
    group: &Group,
    r: usize,
    (b, base): (usize, usize),
    x: *mut f32,
) {
    let Call { p, tile, sizes: Sizes { d, .. }, .. } = *call;
    // SAFETY: the caller's; the stage has room for d floats; visible keys are inside K.
    unsafe {
        let mut nan = 0;
        for i in (0..BLOCK).step_by(LANES) {
            let x = s.load_f32(x.add(i));
            nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        }
        if nan == 0 {
            return;
        }
        let (q, row) = (call.scratch.stage, &group.states[r]);
        let (batch, token) = p.visibility.query(tile.batch, row.token as usize);
        load_row(s, p.q.dtype, p.q.row(batch, token, row.head as usize), p.q.strides[3], q, d);
        rotate_row(s, q, d, p.k_hadamard);
        non_finite::recompute_nan_scores(
            group.visible_bits[b][r],
            std::slice::from_raw_parts(q, d),
            p.k.strides[3] as isize,
            |j| p.key(tile.batch, base + j, row.head as usize / p.group).cast(),
            |j| x.add(j),
        );
    }
}

/// Adds the elements of values that are not finite, of the keys `non_finite` of each block, to the rows of a job to
/// which these keys are visible.
///
/// # Safety
/// The job's outputs have just been computed, and its weights are still in place.
#[inline]
pub(super) unsafe fn add_non_finite(
    call: &Call,
    groups: &[Group],
    job: Job,
    non_finite: &[u64; SUPERBLOCK],
    index: usize,
) {
    for &b in job.blocks().iter().filter(|&&b| non_finite[b] != 0) {
        for g in job.first..job.first + job.groups {
            let group = &groups[g];
            let w = call.scratch.p.wrapping_add(call.slot(g) * WEIGHTS + b * BLOCK / DEPTH * TILE_BYTES);
            let acc = call.scratch.acc.wrapping_add(g * call.sizes.tiles() * LANES * LANES);
            // SAFETY: the caller's.
            unsafe { add_block(call, group, non_finite[b], w, b, index * SUPERBLOCK_KEYS + b * BLOCK, acc) };
        }
    }
}

/// [`add_non_finite`] for one group and block.
///
/// # Safety
/// `w` has the block's weights, whose first term is precise enough; `acc` is the group's accumulator.
#[cold]
unsafe fn add_block(call: &Call, group: &Group, keys: u64, w: *const u8, b: usize, base: usize, acc: *mut f32) {
    let Call { p, tile, natural, sizes: Sizes { dv, .. }, .. } = *call;
    for r in 0..group.rows {
        // SAFETY: the caller's; visible keys are inside V.
        unsafe {
            non_finite::add_non_finite(
                group.visible_bits[b][r] & keys,
                (dv, p.value_step()),
                |j| (*w.add(j / DEPTH * TILE_BYTES + r * ROW_BYTES as usize).cast::<bf16>().add(j % DEPTH)).to_f32(),
                |j| p.value(tile.batch, base + j, group.states[r].head as usize / p.group).cast::<bf16>(),
                |i| {
                    let lane = if natural { i } else { place(i) };
                    acc.add(lane / LANES * LANES * LANES + r * LANES + lane % LANES)
                },
            );
        }
    }
}
