//! The scratch memory of a tile, and the state of its rows.

use super::super::tiles::TILE_BYTES;
use super::{DEPTH, LANES, MAX_HEADS, MAX_TERMS, SUPERBLOCK, SUPERBLOCK_KEYS};
use crate::kernels::generic::attention::{GatherBuffers, RowState};
use crate::problem::grid::BLOCK;
use half::bf16;

/// Sixteen query rows while their tile runs, or fewer. Of the other rows of its tiles, no number means anything.
#[repr(C, align(64))]
pub(super) struct Group {
    /// The largest logits of the chunk so far, times log2(e).
    pub max: [f32; LANES],
    /// Sums of the weights before rounding, by lane, and after rounding.
    pub sums: [[f32; LANES]; LANES],
    pub rounded: [[f32; LANES]; LANES],
    /// The visible keys of every row, for every block of the superblock.
    pub visible_bits: [[u64; LANES]; SUPERBLOCK],
    /// The keys that all rows see, by length, first key, causality and window.
    pub inner: (i64, i64),
    pub rows: usize,
    /// No values have been added in this chunk, and the outputs stand for zeros.
    pub fresh: bool,
    pub states: [RowState; LANES],
}

/// Head sizes, and their multiples that fill tile products.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub d: usize,
    pub dk: usize,
    pub dv: usize,
    pub dvp: usize,
}

impl Sizes {
    pub fn new(d: usize, dv: usize) -> Self {
        Self { d, dk: d.next_multiple_of(DEPTH), dv, dvp: dv.next_multiple_of(DEPTH) }
    }

    /// Tile products over the elements of a key.
    #[inline(always)]
    pub fn steps(&self) -> usize {
        self.dk / DEPTH
    }

    /// The place of a tile of keys: the tiles of sixteen keys of the superblock, in pairs for each step over the head dims.
    #[inline(always)]
    pub fn key_tile(&self, keys: usize, step: usize) -> usize {
        (keys / 2 * self.steps() + step) * 2 + keys % 2
    }

    /// Tiles of a value.
    #[inline(always)]
    pub fn tiles(&self) -> usize {
        self.dvp / LANES
    }
}

/// Floats from one row of scores to the next: those of a superblock, and a line more, so that rows do not meet in few sets of a cache.
pub(super) const SCORES_ROW: usize = SUPERBLOCK_KEYS + LANES;
/// Bytes of the weights of a group, in tiles of 32 keys: of their first terms, and of both.
pub(super) const SECOND_TERM: usize = SUPERBLOCK_KEYS / DEPTH * TILE_BYTES;
pub(super) const WEIGHTS: usize = 2 * SECOND_TERM;

/// Scratch memory of one worker.
pub(super) struct Scratch {
    /// Packed queries: `[groups][terms][steps]` tiles.
    pub q: *mut u8,
    /// Scores of the groups of a job, or of one group for each KV head: `[rows of a group][SCORES_ROW]`.
    pub s: *mut f32,
    /// Their weights: `[2 terms][4]` tiles.
    pub p: *mut u8,
    /// Outputs of the chunk: `[groups][tiles]` tiles.
    pub acc: *mut f32,
    /// Outputs of the chunks before: `[rows][dvp]`.
    pub total: *mut f32,
    /// A row of a query or of an output.
    pub stage: *mut f32,
    /// Scores of one group with a block, transposed: four tiles.
    pub transposed: *mut f32,
    /// Packed keys, in the order in which products take them: [`Sizes::key_tile`].
    pub k: *mut u8,
    /// Packed values, in the order in which products take them: [`Call::value_tile`](super::Call::value_tile).
    pub v: *mut u8,
    /// Gathered keys and values of a superblock whose elements do not lie together: `[128][dk]`, `[128][dvp]`.
    gathered: GatherBuffers,
    sizes: Sizes,
    pub groups: *mut Group,
}

impl Scratch {
    /// Cuts the memory at `base`, aligned to 64 bytes, into its parts; returns the bytes used.
    pub fn layout(base: *mut u8, cut: Cut, sizes: Sizes) -> (Self, usize) {
        let (Sizes { dk, dvp, .. }, Cut { groups, group_rows, slots }) = (sizes, cut);
        let mut used = 0;
        let mut bytes = |n: usize| {
            let at = base.wrapping_add(used);
            used += n.next_multiple_of(64);
            at
        };
        let scratch = Self {
            q: bytes(groups * MAX_TERMS * sizes.steps() * TILE_BYTES),
            s: bytes(slots * group_rows * SCORES_ROW * size_of::<f32>()).cast(),
            p: bytes(slots * WEIGHTS),
            acc: bytes(groups * sizes.tiles() * TILE_BYTES).cast(),
            total: bytes(groups * group_rows * dvp * size_of::<f32>()).cast(),
            stage: bytes(dk.max(dvp) * size_of::<f32>()).cast(),
            transposed: bytes(BLOCK / LANES * TILE_BYTES).cast(),
            k: bytes(SUPERBLOCK_KEYS * dk * size_of::<bf16>()),
            v: bytes(SUPERBLOCK_KEYS * dvp * size_of::<bf16>()),
            gathered: GatherBuffers {
                k: bytes(SUPERBLOCK_KEYS * dk * size_of::<bf16>()),
                v: bytes(SUPERBLOCK_KEYS * dvp * size_of::<bf16>()),
            },
            sizes,
            groups: bytes(groups * size_of::<Group>()).cast(),
        };
        (scratch, used)
    }

    /// Memory for gathered keys and values of block `b`.
    pub fn gather_buffers(&self, b: usize) -> GatherBuffers {
        let Sizes { dk, dvp, .. } = self.sizes;
        let at = |buffer: *mut u8, width: usize| buffer.wrapping_add(b * BLOCK * width * size_of::<bf16>());
        GatherBuffers { k: at(self.gathered.k, dk), v: at(self.gathered.v, dvp) }
    }
}

/// How the rows of a tile are cut into groups.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    pub groups: usize,
    /// The rows of a group, but for the last.
    pub group_rows: usize,
    /// Groups that have scores and weights at the same time.
    pub slots: usize,
}

impl Cut {
    /// Many rows of a KV head.
    pub fn packed(rows: usize) -> Self {
        let groups = rows.div_ceil(LANES);
        Self { groups, group_rows: LANES, slots: groups.min(2) }
    }

    /// At most sixteen rows of each of some KV heads.
    pub fn direct(heads: usize, rows: usize) -> Self {
        Self { groups: heads, group_rows: rows, slots: heads }
    }
}

/// Scratch bytes for `(rows, dim, v_dim)`, of however many KV heads these are: the more, the more bytes.
pub(super) fn scratch_bytes(rows: usize, d: usize, dv: usize) -> usize {
    let bytes = |cut| Scratch::layout(std::ptr::null_mut(), cut, Sizes::new(d, dv)).1;
    let heads = rows.clamp(1, MAX_HEADS);
    let direct = if rows <= heads * LANES { bytes(Cut::direct(heads, rows.div_ceil(heads))) } else { 0 };
    direct.max(bytes(Cut::packed(rows)))
}
