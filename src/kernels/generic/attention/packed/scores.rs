//! Dot products of packed query rows with packed keys.

use super::RowTile;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::BLOCK;
use std::mem::MaybeUninit;

/// Rows of Q times a slab of keys, or times the half of it that begins at `kt`; rows of scores lie [`BLOCK`] apart.
///
/// A slab of more than [`PANEL_BYTES`](super::PANEL_BYTES) is processed in two halves of the lanes: the first stores the sum over its
/// lanes, the second adds its own, which is the last level of the tree.
pub struct Scores {
    /// Packed rows from the first lane on, or the first of rows that lie `q_row` floats apart.
    pub q: *const f32,
    pub q_row: usize,
    /// The first lane in the order of the tree, lanes, a power of two, and steps per lane.
    pub first_lane: usize,
    pub lanes: usize,
    pub steps: usize,
    pub kt: *const f32,
    pub out: *mut f32,
    /// Vectors of keys of the slab, and those that are multiplied: all or half of them.
    pub slab_vectors: usize,
    pub vectors: usize,
    /// Adds to what is at `out`.
    pub add: bool,
}

impl RowTile for Scores {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            match self.vectors {
                1 if const { S::NARROW_SCORES } => self.tile::<S, R, 1, 4>(s),
                4 if const { S::TILE_VECTORS == 4 } => self.tile::<S, R, 4, 1>(s),
                1 if const { S::TILE_VECTORS == 2 } => self.tile::<S, R, 1, 1>(s),
                _ => self.tile::<S, R, 2, 1>(s),
            }
        }
    }
}

impl Scores {
    /// `R` rows, `N` vectors of keys, `L` lanes side by side.
    ///
    /// # Safety
    /// The pointers are valid for `R` rows and `N` vectors.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const N: usize, const L: usize>(&self, s: S) {
        let Self { q_row, first_lane, lanes, steps, mut kt, out, add, .. } = *self;
        // Narrow tiles read rows where they lie.
        let packed = L == 1;
        // Floats between the elements of rows and of steps, and to those of the lanes side by side.
        let (q_row, q_step) = if packed { (1, R) } else { (q_row, S::LANES) };
        let q_lane = |i: usize| if packed { 0 } else { S::lane_order(i) };
        let mut q = self.q;
        let slab = self.slab_vectors * S::LANES;
        // stash[k]: the finished sum of 2^k * L lanes, until its neighbour is ready.
        let mut stash = [const { MaybeUninit::<[[S::V; N]; R]>::uninit() }; MAX_LANES.ilog2() as usize];
        for turn in 0..lanes / L {
            let mut acc = [[[s.zero(); N]; R]; L];
            if !packed {
                q = self.q.wrapping_add(S::lane_order(first_lane + turn * L));
            }
            // Two steps per iteration, and moving pointers: fewer instructions other than FMAs.
            // SAFETY: kt and Q have LANES * steps steps.
            unsafe {
                for i in 0..L {
                    add_step::<S, R, N, true>(s, kt.add(i * slab), q.add(q_lane(i)), q_row, &mut acc[i]);
                }
                (kt, q) = (kt.wrapping_add(L * slab), q.wrapping_add(q_step));
                for _ in 0..(steps - 1) / 2 {
                    // Loops so short that they are unrolled, and sums stay in registers.
                    for _ in 0..2 {
                        for i in 0..L {
                            add_step::<S, R, N, false>(s, kt.add(i * slab), q.add(q_lane(i)), q_row, &mut acc[i]);
                        }
                        (kt, q) = (kt.wrapping_add(L * slab), q.wrapping_add(q_step));
                    }
                }
                if steps % 2 == 0 {
                    for i in 0..L {
                        add_step::<S, R, N, false>(s, kt.add(i * slab), q.add(q_lane(i)), q_row, &mut acc[i]);
                    }
                    (kt, q) = (kt.wrapping_add(L * slab), q.wrapping_add(q_step));
                }
            }
            let mut sum = acc[0];
            if L == 4 {
                sum = sum_of(s, &sum_of(s, &sum, &acc[1]), &sum_of(s, &acc[2], &acc[3]));
            }
            let mut level = 0;
            while (turn >> level) & 1 == 1 {
                // SAFETY: the bit says that a sum of 2^level * L lanes has been left there.
                sum = sum_of(s, unsafe { stash[level].assume_init_ref() }, &sum);
                level += 1;
            }
            if turn + 1 < lanes / L {
                stash[level].write(sum);
                continue;
            }
            for r in 0..R {
                for n in 0..N {
                    // SAFETY: out has R rows of BLOCK.
                    unsafe {
                        let to = out.add(r * BLOCK + n * S::LANES);
                        let sum = if add { s.add(s.load_f32(to), sum[r][n]) } else { sum[r][n] };
                        s.store_f32(to, sum);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn sum_of<S: Simd, const R: usize, const N: usize>(
    s: S,
    left: &[[S::V; N]; R],
    right: &[[S::V; N]; R],
) -> [[S::V; N]; R] {
    let mut sum = *right;
    for r in 0..R {
        for n in 0..N {
            sum[r][n] = s.add(left[r][n], right[r][n]);
        }
    }
    sum
}

/// One step: an element of `R` rows of Q times `N` vectors of keys. The first one sets the sums: that differs from an addition to 0 in the
/// sign of a zero at most, on which no weight and no log-sum-exp depends, and no register is cleared for it.
///
/// # Safety
/// `N` vectors are readable at `k`, `R` floats, `q_row` apart, at `q`.
#[inline(always)]
unsafe fn add_step<S: Simd, const R: usize, const N: usize, const FIRST: bool>(
    s: S,
    k: *const f32,
    q: *const f32,
    q_row: usize,
    acc: &mut [[S::V; N]; R],
) {
    let mut keys = [s.zero(); N];
    for n in 0..N {
        // SAFETY: the caller's.
        keys[n] = unsafe { s.load_f32(k.add(n * S::LANES)) };
    }
    for r in 0..R {
        // SAFETY: the caller's.
        let x = s.splat(unsafe { *q.add(r * q_row) });
        for n in 0..N {
            acc[r][n] = if FIRST { s.mul(x, keys[n]) } else { s.fma(x, keys[n], acc[r][n]) };
        }
    }
}
