//! Dot products of query rows with rows of keys.

use super::RowTile;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::grid::BLOCK;

/// Keys of a register tile.
pub const KEYS: usize = 4;

/// Floats of a packed row.
#[inline(always)]
pub fn row_floats<S: Simd>(d: usize) -> usize {
    d.next_multiple_of(S::LANES)
}

/// Keys of a panel: as many whole tiles as come nearest to [`PANEL_BYTES`](super::PANEL_BYTES).
#[inline(always)]
pub fn panel_keys<S: Simd>(d: usize) -> usize {
    let tile = KEYS * row_floats::<S>(d) * size_of::<f32>();
    KEYS * ((super::PANEL_BYTES + tile / 2) / tile).max(1)
}

/// Rows of Q times `keys` keys, in groups of [`KEYS`], whose last may reach beyond; rows of scores lie [`BLOCK`] apart.
pub struct RowScores {
    pub q: *const f32,
    /// Floats between rows of Q.
    pub q_row: usize,
    /// Rows of whole vectors, one after another.
    pub k: *const f32,
    pub d: usize,
    pub keys: usize,
    pub out: *mut f32,
}

impl RowTile for RowScores {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            match R {
                6 => {
                    self.tiles::<S, 3>(s, 0);
                    self.tiles::<S, 3>(s, 3);
                }
                4 => {
                    self.tiles::<S, 2>(s, 0);
                    self.tiles::<S, 2>(s, 2);
                }
                _ => self.tiles::<S, R>(s, 0),
            }
        }
    }
}

impl RowScores {
    /// `N` rows from `first` on.
    ///
    /// # Safety
    /// The pointers are valid for these rows of Q and whole groups of keys.
    #[inline(always)]
    unsafe fn tiles<S: Simd, const N: usize>(&self, s: S, first: usize) {
        let Self { q_row, d, keys, .. } = *self;
        let (steps, width) = (d.div_ceil(S::LANES), row_floats::<S>(d));
        let rows = self.q.wrapping_add(first * q_row);
        for j in (0..keys).step_by(KEYS) {
            let (mut q, mut k) = (rows, self.k.wrapping_add(j * width));
            let mut acc = [[s.zero(); KEYS]; N];
            // Two steps per iteration, and moving pointers: fewer instructions other than FMAs.
            // SAFETY: the caller's; a row has this many steps.
            unsafe {
                for _ in 0..steps / 2 {
                    for _ in 0..2 {
                        add_step(s, q, q_row, k, width, &mut acc);
                        (q, k) = (q.wrapping_add(S::LANES), k.wrapping_add(S::LANES));
                    }
                }
                if steps % 2 == 1 {
                    add_step(s, q, q_row, k, width, &mut acc);
                }
                let mut sums = [0.0f32; 2 * MAX_LANES];
                for n in (0..N * KEYS).step_by(S::LANES) {
                    let lanes = if n + S::LANES <= N * KEYS {
                        let mut lanes = [s.zero(); MAX_LANES];
                        for (i, lanes) in lanes.iter_mut().enumerate().take(S::LANES) {
                            *lanes = acc[(n + i) / KEYS][i % KEYS];
                        }
                        s.sum_lanes(&lanes)
                    } else {
                        s.sum_lanes_of_four(acc[n / KEYS])
                    };
                    s.store_f32(sums.as_mut_ptr().add(n), lanes);
                }
                for r in 0..N {
                    let out = self.out.add((first + r) * BLOCK + j);
                    std::ptr::copy_nonoverlapping(sums.as_ptr().add(r * KEYS), out, KEYS);
                }
            }
        }
    }
}

/// One step: a vector of `N` rows of Q times those of [`KEYS`] keys.
///
/// # Safety
/// The vectors are readable.
#[inline(always)]
unsafe fn add_step<S: Simd, const N: usize>(
    s: S,
    q: *const f32,
    q_row: usize,
    k: *const f32,
    width: usize,
    acc: &mut [[S::V; KEYS]; N],
) {
    let mut x = [s.zero(); N];
    for r in 0..N {
        // SAFETY: the caller's.
        x[r] = unsafe { s.load_f32(q.add(r * q_row)) };
    }
    for c in 0..KEYS {
        // SAFETY: the caller's.
        let y = unsafe { s.load_f32(k.add(c * width)) };
        for r in 0..N {
            acc[r][c] = s.fma(x[r], y, acc[r][c]);
        }
    }
}
