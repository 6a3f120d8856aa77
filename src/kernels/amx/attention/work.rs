//! Tile products: scores and weighted values.
//!
//! Bound by `tdpbf16ps`, 16 cycles each, as long as the operands come in time: for two groups, a step is four products and four tiles of
//! operands, 64 lines.

use super::super::tiles::{Operand, ROW_BYTES, TILE_BYTES, Tiles};
use super::scratch::{Group, SCORES_ROW, SECOND_TERM, WEIGHTS};
use super::{Call, DEPTH, LANES, SUPERBLOCK};
use crate::problem::grid::BLOCK;

/// One or two groups, and the blocks of a superblock that are visible to them.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub first: usize,
    pub groups: usize,
    list: [usize; SUPERBLOCK],
    count: usize,
}

impl Job {
    /// A job for the groups from `first` on, at most so many, if any block is visible to them.
    pub fn new(groups: &[Group], first: usize, most: usize) -> Option<Self> {
        let mut job = Self { first, groups: (groups.len() - first).min(most), list: [0; SUPERBLOCK], count: 0 };
        for b in 0..SUPERBLOCK {
            let is_visible = |group: &Group| group.visible_bits[b][..group.rows].iter().any(|&bits| bits != 0);
            if groups[first..first + job.groups].iter().any(is_visible) {
                job.list[job.count] = b;
                job.count += 1;
            }
        }
        (job.count > 0).then_some(job)
    }

    #[inline(always)]
    pub fn blocks(&self) -> &[usize] {
        &self.list[..self.count]
    }
}

/// Scores of a job's rows with the keys of its blocks.
///
/// # Safety
/// Queries and keys are in place.
#[inline(always)]
pub(super) unsafe fn scores(tiles: &Tiles, call: &Call, job: &Job) {
    // SAFETY: the caller's.
    unsafe {
        for &b in job.blocks() {
            match job.groups {
                1 => score_tiles::<1, 4>(tiles, call, job, b, 0),
                _ => (0..BLOCK / LANES).step_by(2).for_each(|i| score_tiles::<2, 2>(tiles, call, job, b, i)),
            }
        }
    }
}

/// Scores of `M` groups with the keys of `N` tiles of a block, from tile `first` on.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
unsafe fn score_tiles<const M: usize, const N: usize>(tiles: &Tiles, call: &Call, job: &Job, b: usize, first: usize) {
    let Call { scratch, sizes, terms, .. } = call;
    let steps = sizes.steps();
    tiles.zero();
    for step in 0..steps {
        let key = |n: usize| sizes.key_tile(b * BLOCK / LANES + first + n, step) * TILE_BYTES;
        let k: [Operand; N] = std::array::from_fn(|n| scratch.k.wrapping_add(key(n)).cast_const());
        for term in 0..*terms {
            let query = |m: usize| (((job.first + m) * terms + term) * steps + step) * TILE_BYTES;
            let q: [Operand; M] = std::array::from_fn(|m| scratch.q.wrapping_add(query(m)).cast_const());
            // SAFETY: the caller's.
            unsafe { multiply(tiles, q, k) };
        }
    }
    for m in 0..M {
        for n in 0..N {
            let to = scratch.s.wrapping_add(m * LANES * SCORES_ROW + b * BLOCK + (first + n) * LANES);
            // SAFETY: the caller's; two groups have their scores there.
            unsafe { tiles.store(m * N + n, to, (SCORES_ROW * size_of::<f32>()) as isize) };
        }
    }
}

/// Adds the products of the operands of one group or two to the accumulators.
///
/// # Safety
/// The operands are readable; `M` by `N` is 2 by 2 or 1 by at most 4.
#[inline(always)]
unsafe fn multiply<const M: usize, const N: usize>(tiles: &Tiles, a: [Operand; M], b: [Operand; N]) {
    // SAFETY: the caller's.
    unsafe {
        if M == 2 {
            tiles.multiply([a[0], a[1 % M]], [b[0], b[1 % N]]);
        } else {
            tiles.hold(a[0]);
            (0..N).for_each(|n| tiles.add::<true>(n, b[n], ROW_BYTES));
        }
    }
}

/// Adds the weighted values of a job's blocks to its rows, or with `fresh` to zeros.
///
/// # Safety
/// Values and weights are in place.
#[inline(always)]
pub(super) unsafe fn outputs<const HIGH: bool>(tiles: &Tiles, call: &Call, job: &Job, fresh: bool) {
    let count = call.sizes.tiles();
    let mut i = 0;
    // SAFETY: the caller's; the count is even.
    unsafe {
        while i < count {
            match (job.groups, count - i) {
                (1, 4..) => {
                    output_tiles::<HIGH, 1, 4>(tiles, call, (job, fresh), i);
                    i += 4;
                }
                (1, _) => {
                    output_tiles::<HIGH, 1, 2>(tiles, call, (job, fresh), i);
                    i += 2;
                }
                _ => {
                    output_tiles::<HIGH, 2, 2>(tiles, call, (job, fresh), i);
                    i += 2;
                }
            }
        }
    }
}

/// [`outputs`] of `M` groups and `N` tiles of the values, from tile `first` on.
///
/// # Safety
/// As [`outputs`].
#[inline(always)]
unsafe fn output_tiles<const HIGH: bool, const M: usize, const N: usize>(
    tiles: &Tiles,
    call: &Call,
    (job, fresh): (&Job, bool),
    first: usize,
) {
    let Call { scratch, sizes, .. } = call;
    let count = sizes.tiles();
    let acc = |m: usize, n: usize| scratch.acc.wrapping_add(((job.first + m) * count + first + n) * LANES * LANES);
    // SAFETY: the caller's.
    unsafe {
        if fresh {
            tiles.zero();
        } else {
            for m in 0..M {
                for n in 0..N {
                    tiles.load(m * N + n, acc(m, n));
                }
            }
        }
        for &b in job.blocks() {
            for part in b * BLOCK / DEPTH..(b + 1) * BLOCK / DEPTH {
                let value = |n: usize| call.value_tile(first + n, part) * TILE_BYTES;
                let v: [Operand; N] = std::array::from_fn(|n| scratch.v.add(value(n)).cast_const());
                for term in 0..if HIGH { 2 } else { 1 } {
                    let weights = scratch.p.add(term * SECOND_TERM + part * TILE_BYTES);
                    let w: [Operand; M] = std::array::from_fn(|m| weights.add(m * WEIGHTS).cast_const());
                    multiply(tiles, w, v);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                tiles.store(m * N + n, acc(m, n), ROW_BYTES);
            }
        }
    }
}
