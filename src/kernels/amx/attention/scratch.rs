//! The scratch memory of a tile, and the state of its rows.

use super::super::tiles::TILE_BYTES;
use super::{DEPTH, LANES, MAX_TERMS, SUPERBLOCK, SUPERBLOCK_KEYS};
use crate::kernels::generic::attention::GatherBuffers;
use crate::problem::grid::BLOCK;
use half::bf16;

/// Sixteen query rows while their tile runs. A lane without a row sees all keys, and its results are ignored.
#[repr(C, align(64))]
pub(super) struct Group {
    /// The largest logit of the chunk so far, times log2(e).
    pub max: [f32; LANES],
    /// Sums of the weights before rounding.
    pub sum: [f32; LANES],
    /// Sums of the weights after rounding.
    pub rounded: [f32; LANES],
    /// The visible keys of every row, for every block of the superblock.
    pub visible_bits: [[u64; LANES]; SUPERBLOCK],
    pub low: [i64; LANES],
    pub high: [i64; LANES],
    pub position: [i64; LANES],
    pub token: [u32; LANES],
    pub head: [u32; LANES],
    pub slope: [f32; LANES],
    /// Largest logit and sum of weights of the chunks before, per row.
    pub total: [(f32, f32); LANES],
    pub rows: usize,
}

/// Head sizes, and their multiples that fill tiles.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// The head size of keys, and that size rounded up to whole tile products.
    pub d: usize,
    pub dk: usize,
    /// The head size of values, and that size rounded up to whole tiles.
    pub dv: usize,
    pub dvp: usize,
}

impl Sizes {
    pub fn new(d: usize, dv: usize) -> Self {
        Self { d, dk: d.next_multiple_of(DEPTH), dv, dvp: dv.next_multiple_of(LANES) }
    }
}

/// Pairs of weights of a group and superblock in [`Scratch::p`]: two terms.
pub(super) const WEIGHTS: usize = 2 * SECOND_TERM;
/// The distance from a pair's first term to its second.
pub(super) const SECOND_TERM: usize = SUPERBLOCK_KEYS / 2 * LANES;

/// Scratch memory of one worker.
pub(super) struct Scratch {
    /// Packed queries: `[groups][terms][dk / 32]` tiles.
    pub q: *mut u8,
    /// Scores, transposed: `[2 jobs][2 groups][256][16]`.
    pub s: *mut f32,
    /// Pairs of weights: `[2 jobs][2 groups][2 terms][8]` tiles.
    pub p: *mut u32,
    /// Outputs of the chunk, transposed: `[groups][dvp][16]`.
    pub acc: *mut f32,
    /// Outputs of the chunks before: `[rows][dvp]`.
    pub total: *mut f32,
    /// Rows of a group on their way to or from the transposed form: `[16][dvp]`, or `[16][dk]`.
    pub stage: *mut f32,
    /// Copies of keys: `[256][dk]`.
    pub k: *mut u16,
    /// Packed values: `[4][2][dvp / 16]` tiles.
    pub v: *mut u8,
    /// Gathered keys and values of a block whose elements do not lie together: `[64][dk]`, `[64][dvp]`.
    pub gather_buffers: GatherBuffers,
    pub groups: *mut Group,
}

impl Scratch {
    /// Cuts the memory at `base`, aligned to 64 bytes, into its parts; returns the bytes used.
    pub fn layout(base: *mut u8, rows: usize, sizes: Sizes) -> (Self, usize) {
        let Sizes { dk, dvp, .. } = sizes;
        let groups = rows.div_ceil(LANES);
        // One job at a time, or two in turns.
        let slots = if groups <= 2 { groups } else { 4 };
        let mut used = 0;
        let mut bytes = |n: usize| {
            let at = base.wrapping_add(used);
            used += n.next_multiple_of(64);
            at
        };
        let scratch = Self {
            q: bytes(groups * MAX_TERMS * (dk / DEPTH) * TILE_BYTES),
            s: bytes(slots * SUPERBLOCK_KEYS * LANES * size_of::<f32>()).cast(),
            p: bytes(slots * WEIGHTS * size_of::<u32>()).cast(),
            acc: bytes(groups * dvp * LANES * size_of::<f32>()).cast(),
            total: bytes(groups * LANES * dvp * size_of::<f32>()).cast(),
            stage: bytes(LANES * dk.max(dvp) * size_of::<f32>()).cast(),
            k: bytes(SUPERBLOCK_KEYS * dk * size_of::<bf16>()).cast(),
            v: bytes(SUPERBLOCK_KEYS * dvp * size_of::<bf16>()),
            gather_buffers: GatherBuffers {
                k: bytes(BLOCK * dk * size_of::<bf16>()),
                v: bytes(BLOCK * dvp * size_of::<bf16>()),
            },
            groups: bytes(groups * size_of::<Group>()).cast(),
        };
        (scratch, used)
    }
}

/// Scratch bytes for `(rows, dim, v_dim)`.
pub(super) fn scratch_bytes(rows: usize, d: usize, dv: usize) -> usize {
    Scratch::layout(std::ptr::null_mut(), rows, Sizes::new(d, dv)).1
}
