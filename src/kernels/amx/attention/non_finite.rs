//! Repairs of NaN and infinity, which tile products cannot take; see [`non_finite`].

use super::scratch::{Group, Sizes, WEIGHTS};
use super::work::Job;
use super::{Call, LANES, SUPERBLOCK, SUPERBLOCK_KEYS};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::non_finite;
use crate::kernels::generic::attention::state::load_row;
use crate::kernels::generic::hadamard::rotate_row;
use crate::kernels::simd::Simd;
use crate::problem::grid::BLOCK;
use half::bf16;
use std::arch::x86_64::*;

/// Recomputes the scores of a block that are NaN, for visible keys.
///
/// # Safety
/// `x` has the block's scores.
#[inline(always)]
pub(super) unsafe fn repair_scores(s: Avx512, call: &Call, group: &Group, x: *mut f32, b: usize, base: usize) {
    let Call { p, tile, sizes: Sizes { d, .. }, .. } = *call;
    let mut nan = 0;
    for j in 0..BLOCK {
        // SAFETY: the caller's.
        unsafe {
            let v = s.load_f32(x.add(j * LANES));
            nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        }
    }
    if nan == 0 {
        return;
    }
    for r in (0..group.rows).filter(|r| nan >> r & 1 == 1) {
        // SAFETY: the stage has room for d floats; visible keys are inside K.
        unsafe {
            let q = call.scratch.stage;
            let (row, token) = p.visibility.query(tile.batch, group.token[r] as usize);
            let row = p.q.row(row, token, group.head[r] as usize);
            load_row(s, p.q.dtype, row, p.q.strides[3], q, d);
            rotate_row(s, q, d, p.k_hadamard);
            non_finite::recompute_nan_scores(
                group.visible_bits[b][r],
                std::slice::from_raw_parts(q, d),
                p.k.strides[3] as isize,
                call.negative,
                |j| p.key(tile.batch, base + j, tile.kv_head).cast(),
                |j| x.add(j * LANES + r),
            );
        }
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
        for i in 0..job.groups {
            let group = &groups[job.first + i];
            let w = call.scratch.p.wrapping_add(job.slot(i) * WEIGHTS + b * BLOCK / 2 * LANES);
            let acc = call.scratch.acc.wrapping_add((job.first + i) * call.sizes.dvp * LANES);
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
unsafe fn add_block(call: &Call, group: &Group, keys: u64, w: *const u32, b: usize, base: usize, acc: *mut f32) {
    let Call { p, tile, sizes: Sizes { dv, .. }, .. } = *call;
    for r in 0..group.rows {
        // SAFETY: the caller's; visible keys are inside V.
        unsafe {
            non_finite::add_non_finite(
                group.visible_bits[b][r] & keys,
                (dv, p.value_step()),
                |j| {
                    let pair = *w.add(j / 2 * LANES + r);
                    f32::from_bits(if j % 2 == 0 { pair << 16 } else { pair & 0xffff_0000 })
                },
                |j| p.value(tile.batch, base + j, tile.kv_head).cast::<bf16>(),
                |i| acc.add(i * LANES + r),
            );
        }
    }
}
