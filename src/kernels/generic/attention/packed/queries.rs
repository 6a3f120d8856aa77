//! Packed copies of queries.

use super::rows_at_once;
use crate::kernels::simd::{MAX_LANES, Outlined, Simd};
use crate::problem::grid::padded;

/// Reorders the rows of Q of every register tile, in place, to `[step][row]`, the order of [`Scores`](super::scores::Scores). Steps go
/// through the lanes in the order of [`Simd::lane_order`], which is its own inverse, and for each through its elements of every vector.
pub struct PackQueries {
    pub q: *mut f32,
    pub rows: usize,
    pub d: usize,
    /// Memory for the rows of one register tile.
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
            let n = rows_at_once(rows - r);
            let group = q.wrapping_add(r * dp);
            // SAFETY: the group has n <= TILE_ROWS rows of dp floats, and so has the copy; LANES * steps <= dp.
            unsafe {
                std::ptr::copy_nonoverlapping(group, copy, n * dp);
                for first in (0..n).step_by(S::LANES) {
                    let part = (n - first).min(S::LANES);
                    for step in 0..steps {
                        let mut v = [s.zero(); MAX_LANES];
                        for (i, v) in v.iter_mut().enumerate().take(part) {
                            *v = s.load_f32(copy.add((first + i) * dp + step * S::LANES));
                        }
                        s.transpose(&mut v);
                        for (lane, v) in v.iter().enumerate().take(S::LANES) {
                            let to = group.add((S::lane_order(lane) * steps + step) * n + first);
                            if part == S::LANES {
                                s.store_f32(to, *v);
                            } else {
                                s.store_part_f32(to, *v, part);
                            }
                        }
                    }
                }
            }
            r += n;
        }
    }
}
