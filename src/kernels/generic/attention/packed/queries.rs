//! Packed copies of queries.

use super::rows_at_once;
use crate::kernels::simd::{MAX_LANES, Outlined, Simd};
use crate::problem::grid::padded;
use crate::problem::tile::TILE_ROWS;

/// Reorders the rows of Q of every register tile, in place, to `[step][row]`, the order of [`Scores`](super::scores::Scores). Steps go
/// through the lanes in the order of [`Simd::lane_order`], which is its own inverse, and for each through its elements of every vector.
///
/// Bound by the shuffles of transpositions: two register tiles share one, where a vector has lanes for the rows of both.
pub struct PackQueries {
    pub q: *mut f32,
    pub rows: usize,
    pub d: usize,
    /// Memory for the rows of two register tiles.
    pub copy: *mut f32,
}

impl Outlined for PackQueries {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { q, rows, d, copy } = self;
        let dp = padded(d);
        let steps = d.div_ceil(S::LANES);
        let mut r = 0;
        while r < rows {
            let (n, left) = (rows_at_once(rows - r), rows - r);
            let second = if const { S::LANES >= 2 * TILE_ROWS } && left > n { rows_at_once(left - n) } else { 0 };
            let (group, together) = (q.wrapping_add(r * dp), n + second);
            // SAFETY: the tiles have n and `second` rows of dp floats, at most TILE_ROWS each, and so has the copy; LANES * steps <= dp.
            unsafe {
                std::ptr::copy_nonoverlapping(group, copy, together * dp);
                for first in (0..together).step_by(S::LANES) {
                    let part = (together - first).min(S::LANES);
                    for step in 0..steps {
                        let mut v = [s.zero(); MAX_LANES];
                        for (i, v) in v.iter_mut().enumerate().take(part) {
                            *v = s.load_f32(copy.add((first + i) * dp + step * S::LANES));
                        }
                        s.transpose(&mut v);
                        for (lane, v) in v.iter().enumerate().take(S::LANES) {
                            let at = S::lane_order(lane) * steps + step;
                            let (to, own) = (group.add(at * n + first), part.min(n - first));
                            if own == S::LANES {
                                s.store_f32(to, *v);
                            } else {
                                s.store_part_f32(to, *v, own);
                            }
                            if second > 0 {
                                s.store_lanes_f32(group.add(n * dp + at * second), *v, n, second);
                            }
                        }
                    }
                }
            }
            r += together;
        }
    }
}
