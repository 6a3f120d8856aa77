//! Tile products: scores and weighted values, interleaved with the softmax of another job.
//!
//! Bound by `tdpbf16ps`, 16 cycles each. A step is the products of two or four pairs of tiles, 64 cycles for two
//! groups, with 64 lines of operands.

use super::super::tiles::{Operand, ROW_BYTES, TILE_BYTES, Tiles};
use super::keys::Keys;
use super::scratch::{Group, SECOND_TERM, WEIGHTS};
use super::{Call, DEPTH, LANES, SUPERBLOCK, SUPERBLOCK_KEYS};
use crate::problem::grid::BLOCK;

/// One or two groups, and the blocks of a superblock that are visible to them.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub first: usize,
    pub groups: usize,
    list: [usize; SUPERBLOCK],
    count: usize,
    /// The half of the memory for scores and weights that the job uses: two jobs are in progress at a time.
    pub parity: usize,
}

impl Job {
    /// A job for the groups from `first` on, if any block is visible to them.
    pub fn new(groups: &[Group], first: usize, parity: usize) -> Option<Self> {
        let mut job = Self { first, groups: (groups.len() - first).min(2), list: [0; SUPERBLOCK], count: 0, parity };
        for b in 0..SUPERBLOCK {
            let is_visible = |group: &Group| group.visible_bits[b][..group.rows].iter().any(|&bits| bits != 0);
            if groups[first..first + job.groups].iter().any(is_visible) {
                job.list[job.count] = b;
                job.count += 1;
            }
        }
        (job.count > 0).then_some(job)
    }

    pub fn blocks(&self) -> &[usize] {
        &self.list[..self.count]
    }

    /// The place of group `i` of the job in the memory for scores and weights.
    pub fn slot(&self, i: usize) -> usize {
        self.parity * 2 + i
    }
}

/// Pending tile products, which run between the vectors of another job's softmax: the outputs of one job, then the
/// scores of another. One step is the products of two or four pairs of tiles.
pub(super) struct Work<'a> {
    tiles: &'a Tiles,
    call: &'a Call<'a>,
    keys: &'a [Keys; SUPERBLOCK],
    outputs: Option<Job>,
    scores: Option<Job>,
    /// The tiles of values or keys to which the accumulators belong.
    tile: usize,
    /// Index into the list of blocks; half of the block, or step over the head dimension; term.
    block: usize,
    part: usize,
    term: usize,
}

impl<'a> Work<'a> {
    pub fn new(
        tiles: &'a Tiles,
        call: &'a Call<'a>,
        keys: &'a [Keys; SUPERBLOCK],
        outputs: Option<Job>,
        scores: Option<Job>,
    ) -> Self {
        Self { tiles, call, keys, outputs, scores, tile: 0, block: 0, part: 0, term: 0 }
    }

    /// The number of steps of all products, or slightly less.
    pub fn steps<const HIGH: bool>(&self) -> usize {
        let depth = self.call.sizes.dk / DEPTH * self.call.terms;
        let scores = self.scores.map_or(0, |job| job.count * job.groups * depth);
        let tiles = self.call.sizes.dvp / LANES;
        let outputs =
            self.outputs.map_or(0, |job| tiles.div_ceil(4 / job.groups) * 2 * job.count * if HIGH { 2 } else { 1 });
        scores + outputs
    }

    /// Runs the remaining steps.
    ///
    /// # Safety
    /// As [`Self::step`].
    #[inline(never)]
    pub unsafe fn finish<const HIGH: bool>(&mut self) {
        // SAFETY: the caller's.
        while unsafe { self.step::<HIGH>() } {}
    }

    /// Runs one step; returns false if none was left.
    ///
    /// # Safety
    /// Values and weights of the blocks of the outputs, queries and keys of those of the scores are in place.
    #[inline(always)]
    pub unsafe fn step<const HIGH: bool>(&mut self) -> bool {
        // SAFETY: the caller's.
        unsafe {
            if let Some(job) = self.outputs {
                match (job.groups, self.call.sizes.dvp / LANES - self.tile) {
                    (1, 4..) => self.outputs::<HIGH, 4, 1>(&job),
                    (1, 3) => self.outputs::<HIGH, 3, 1>(&job),
                    (1, 2) => self.outputs::<HIGH, 2, 1>(&job),
                    (1, _) => self.outputs::<HIGH, 1, 1>(&job),
                    (_, 2..) => self.outputs::<HIGH, 2, 2>(&job),
                    (_, _) => self.outputs::<HIGH, 1, 2>(&job),
                }
            } else if let Some(job) = self.scores {
                match job.groups {
                    1 => self.scores::<4, 1>(&job),
                    _ => self.scores::<2, 2>(&job),
                }
            } else {
                return false;
            }
            true
        }
    }

    /// # Safety
    /// As [`Self::step`].
    #[inline(always)]
    unsafe fn outputs<const HIGH: bool, const M: usize, const N: usize>(&mut self, job: &Job) {
        let scratch = &self.call.scratch;
        let count = self.call.sizes.dvp / LANES;
        let (b, part) = (job.list[self.block], self.part);
        // SAFETY: the caller's; M more tiles of values there are.
        unsafe {
            let acc = |m: usize, n: usize| scratch.acc.add(((job.first + n) * count + self.tile + m) * LANES * LANES);
            if (self.block, self.part, self.term) == (0, 0, 0) {
                for m in 0..M {
                    for n in 0..N {
                        self.tiles.load(m * N + n, acc(m, n));
                    }
                }
            }
            let values = scratch.v.add(((2 * b + part) * count + self.tile) * TILE_BYTES);
            let v: [Operand; M] = std::array::from_fn(|m| values.add(m * TILE_BYTES).cast_const());
            let weights =
                scratch.p.add(job.slot(0) * WEIGHTS + self.term * SECOND_TERM + (2 * b + part) * LANES * LANES);
            let w: [Operand; N] = std::array::from_fn(|n| weights.add(n * WEIGHTS).cast_const().cast());
            self.tiles.multiply(v, ROW_BYTES, w);
            self.term += 1;
            if self.term == if HIGH { 2 } else { 1 } {
                (self.term, self.part) = (0, part + 1);
            }
            if self.part == 2 {
                (self.part, self.block) = (0, self.block + 1);
            }
            if self.block == job.count {
                for m in 0..M {
                    for n in 0..N {
                        self.tiles.store(m * N + n, acc(m, n));
                    }
                }
                (self.block, self.tile) = (0, self.tile + M);
                if self.tile == count {
                    (self.tile, self.outputs) = (0, None);
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::step`].
    #[inline(always)]
    unsafe fn scores<const M: usize, const N: usize>(&mut self, job: &Job) {
        let Call { scratch, terms, .. } = self.call;
        let steps = self.call.sizes.dk / DEPTH;
        let b = job.list[self.block];
        // SAFETY: the caller's; Q has steps * terms tiles a group, a block four tiles of keys and of scores.
        unsafe {
            if (self.part, self.term) == (0, 0) {
                self.tiles.zero();
            }
            let Keys { first, stride } = self.keys[b];
            let k: [Operand; M] = std::array::from_fn(|m| {
                let key = (self.tile + m) * LANES;
                first.wrapping_offset(key as isize * stride).wrapping_add(self.part * ROW_BYTES as usize)
            });
            let q: [Operand; N] = std::array::from_fn(|n| {
                scratch.q.add((((job.first + n) * terms + self.term) * steps + self.part) * TILE_BYTES).cast_const()
            });
            self.tiles.multiply(k, stride, q);
            self.term += 1;
            if self.term == *terms {
                (self.term, self.part) = (0, self.part + 1);
            }
            if self.part == steps {
                for m in 0..M {
                    for n in 0..N {
                        let at = job.slot(n) * SUPERBLOCK_KEYS + b * BLOCK + (self.tile + m) * LANES;
                        self.tiles.store(m * N + n, scratch.s.add(at * LANES));
                    }
                }
                (self.part, self.tile) = (0, self.tile + M);
                if self.tile == BLOCK / LANES {
                    (self.tile, self.block) = (0, self.block + 1);
                }
                if self.block == job.count {
                    (self.block, self.scores) = (0, None);
                }
            }
        }
    }
}
