//! Weighted sums of values in blocks that lie in the cache.

use super::prefetch::{Ahead, begins_half_line};
use super::{DirectValues, PASS_ROWS, rows_in_loops};
use crate::kernels::generic::attention::Block;
use crate::kernels::generic::attention::weighted::{Accumulators, add_weighted};
use crate::kernels::generic::blocks::{BlockUnit, N as ELEMENTS};
use crate::kernels::simd::Simd;
use crate::problem::grid::BLOCK;

impl DirectValues<'_> {
    /// Adds values in blocks of type `U`.
    ///
    /// # Safety
    /// As [`block`](super::block).
    #[inline(always)]
    pub unsafe fn run_blocks<S: Simd, U: BlockUnit>(&self, s: S) {
        for head in self.heads.clone() {
            // SAFETY: the caller's; the rows are inside the tile.
            unsafe {
                rows_in_loops!(S, self.block.tile.head_rows, PASS_ROWS, 4, |row| self.rows::<S, U>(s, head, row))
            };
        }
    }

    /// All columns of `R` rows of a head, from `row` on, `N` vectors at a time.
    ///
    /// # Safety
    /// As [`Self::run_blocks`]; the rows are inside the tile.
    #[inline(always)]
    unsafe fn rows<S: Simd, U: BlockUnit, const R: usize, const N: usize>(&self, s: S, head: usize, row: usize) {
        let (mut column, dv) = (0, self.block.dv);
        // SAFETY: the caller's; `column` never passes dv, which is a multiple of two vectors.
        unsafe {
            while column + N * S::LANES <= dv {
                self.columns::<S, U, R, N>(s, head, row, column);
                column += N * S::LANES;
            }
            while const { N > 2 } && column < dv {
                self.columns::<S, U, R, 2>(s, head, row, column);
                column += 2 * S::LANES;
            }
        }
    }

    /// `N` vectors of columns from `column` on: whole blocks, or a part of one.
    ///
    /// # Safety
    /// As [`Self::rows`].
    #[inline(always)]
    unsafe fn columns<S: Simd, U: BlockUnit, const R: usize, const N: usize>(
        &self,
        s: S,
        head: usize,
        row: usize,
        column: usize,
    ) {
        let Block { tile, scratch, .. } = *self.block;
        let (first, keys) = (head * tile.head_rows + row, self.keys.len());
        let weights = scratch.s.wrapping_add(first * BLOCK + self.keys.low);
        let acc = Accumulators { at: scratch.acc.wrapping_add(first * scratch.acc_row + column), row: scratch.acc_row };
        // With pairs of vectors as large as a block, a pass begins with one.
        let within = if 2 * S::LANES < ELEMENTS { column % ELEMENTS } else { 0 };
        let v = self.v.cast::<U>();
        let at = |key: usize| v.key(head, self.keys.low + key).wrapping_add(column / ELEMENTS);
        let distances = if row == 0 { self.ahead } else { Ahead::NONE }.distances();
        // SAFETY: the caller's.
        unsafe {
            let mut sums = acc.load::<S, R, N>(s, self.fresh);
            for key in 0..keys {
                let mut x = [s.zero(); N];
                for n in (0..N).step_by(2) {
                    let i = within + n * S::LANES;
                    let unit = at(key).add(i / ELEMENTS);
                    if n * S::LANES % ELEMENTS == 0 && begins_half_line::<U>(n * S::LANES / ELEMENTS) {
                        distances.prefetch(s, unit);
                    }
                    [x[n], x[n + 1]] = (*unit).pair(s, (*unit).parts(s), i % ELEMENTS);
                }
                add_weighted(s, weights.add(key), &x, &mut sums);
            }
            acc.store(s, &sums);
        }
    }
}
