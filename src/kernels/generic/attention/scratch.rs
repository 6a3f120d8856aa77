//! The scratch memory of a tile, and the state of its rows.

use super::state::EMPTY;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, padded};

/// The state of a query row while its tile runs.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct RowState {
    /// The largest logit of the chunk so far, times log2(e).
    pub max: f32,
    /// Largest logit and sum of weights of the chunks before.
    pub total: (f32, f32),
    pub token: u32,
    pub low: i64,
    pub high: i64,
    pub visible_bits: u64,
    pub position: i64,
    pub head: u32,
    /// Its accumulator is not written yet in the chunk: it stands for zeros.
    pub fresh: bool,
    /// Its output is written.
    pub finished: bool,
}

impl RowState {
    /// Before the first chunk, of a token at position 0 and a head.
    #[inline(always)]
    pub fn new((low, high): (i64, i64), (token, head): (u32, u32)) -> Self {
        let (max, total) = (f32::NEG_INFINITY, EMPTY);
        Self { max, total, low, high, visible_bits: 0, position: 0, token, head, fresh: true, finished: false }
    }
}

/// Scratch memory of one worker; see [`Scratch::layout`].
#[derive(Clone, Copy)]
pub(crate) struct Scratch {
    pub q: *mut f32,
    /// Floats between neighbouring rows of `q`.
    pub q_row: usize,
    pub s: *mut f32,
    pub acc: *mut f32,
    /// Floats between neighbouring rows of `acc`.
    pub acc_row: usize,
    pub total: *mut f32,
    /// The sum of weights of each query row, per lane: `[rows][MAX_LANES]`.
    pub sums: *mut f32,
    /// Packed copies: the K block transposed, and the V block in f32, in slabs as wide as a register tile.
    pub kt: *mut f32,
    pub vp: *mut f32,
    /// Gathered copies of K and V blocks whose elements do not lie together: `[BLOCK][dp]`, `[BLOCK][dvp]` units.
    pub k_block: *mut u8,
    pub v_block: *mut u8,
    pub rows: *mut RowState,
}

impl Scratch {
    /// The sums of weights of query rows from `first` on, as many as a vector has lanes, or up to `end`; other lanes are 0.
    ///
    /// # Safety
    /// The sums of these rows are in place.
    #[inline(always)]
    pub unsafe fn row_sums<S: Simd>(&self, s: S, first: usize, end: usize) -> S::V {
        let mut lanes = [s.zero(); MAX_LANES];
        for (row, lanes) in (first..end).zip(&mut lanes[..S::LANES]) {
            // SAFETY: the caller's; sums has MAX_LANES floats a row.
            *lanes = unsafe { s.load_f32(self.sums.add(row * MAX_LANES)) };
        }
        s.sum_lanes(&lanes)
    }

    /// Bytes for tiles of `rows` rows; a multiple of 64.
    pub fn bytes(rows: usize, d: usize, dv: usize) -> usize {
        Self::layout(std::ptr::null_mut(), rows, d, dv).1
    }

    /// Cuts the memory at `base`, aligned to 64 bytes, into its parts; returns the bytes used.
    pub fn layout(base: *mut u8, rows: usize, d: usize, dv: usize) -> (Self, usize) {
        let (dp, dvp) = (padded(d), padded(dv));
        let mut used = 0;
        let mut floats = |n: usize| {
            let at = base.wrapping_add(used).cast::<f32>();
            used += (n * size_of::<f32>()).next_multiple_of(64);
            at
        };
        let scratch = Self {
            q: floats(rows * dp),
            q_row: dp,
            s: floats(rows * BLOCK),
            acc: floats(rows * dvp),
            acc_row: dvp,
            total: floats(rows * dvp),
            sums: floats(rows * MAX_LANES),
            kt: floats(dp * BLOCK),
            vp: floats(BLOCK * dvp),
            k_block: floats(BLOCK * dp).cast(),
            v_block: floats(BLOCK * dvp).cast(),
            rows: floats(rows * size_of::<RowState>().div_ceil(size_of::<f32>())).cast(),
        };
        (scratch, used)
    }
}
