//! Linear layers: `y[m, out] = x[m, in] * W^T`, with `W` row-major `[out, in]` as model files store it.
//!
//! One row (a decode step) is a matrix-vector product, bound by reading `W` once; many rows (a prompt) are bound by
//! arithmetic. The `gemm` crate computes both. For more than one row it packs `W` first, which costs several times the
//! reading of `W`. This does not pay for the few rows of a batched decode step, which are computed as matrix-vector
//! products, one row after another, over a part of `W` that fits into the CPU's cache. Up to that number of rows, the
//! bits of a row depend neither on the number of rows nor on the number of threads.

use gemm_common::Parallelism;
use rayon::prelude::*;

/// A dense f32 matrix, row-major.
#[derive(Clone, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix[{}, {}]", self.rows, self.cols)
    }
}

impl Matrix {
    /// A matrix of zeros.
    ///
    /// # Panics
    /// If `rows * cols` overflows.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        let len = rows.checked_mul(cols).expect("matrix size fits usize");
        Self { rows, cols, data: vec![0.0; len] }
    }

    /// The number of rows, the outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns, the inputs of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..][..self.cols]
    }

    /// All elements.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// All elements, writable.
    pub fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// `y = x * self^T` for the `m` rows of `x`, on at most `threads` threads of the current rayon pool.
    ///
    /// # Panics
    /// If `x` is not `m * cols` or `y` not `m * rows` elements long.
    pub fn apply(&self, x: &[f32], m: usize, y: &mut [f32], threads: usize) {
        assert_eq!(x.len(), m * self.cols, "input of {} elements for {m} rows of {}", x.len(), self.cols);
        assert_eq!(y.len(), m * self.rows, "output of {} elements for {m} rows of {}", y.len(), self.rows);
        if m == 0 || self.data.is_empty() {
            return;
        }
        if m > FEW_ROWS {
            return gemm_xwt(x, m, &self.data, self.cols, y, threads);
        }
        // The grid depends on the matrix alone, not on the number of threads, because `gemm` chooses its inner loop,
        // and with it the order of summation, by the size of a product.
        let rows = (PIECE / self.cols).next_multiple_of(16).max(16);
        let mut pieces: Vec<Vec<&mut [f32]>> = Vec::new();
        pieces.resize_with(self.rows.div_ceil(rows), || Vec::with_capacity(m));
        for row in y.chunks_mut(self.rows) {
            for (piece, part) in pieces.iter_mut().zip(row.chunks_mut(rows)) {
                piece.push(part);
            }
        }
        let run = |(ys, w): (Vec<&mut [f32]>, &[f32])| {
            for (x, y) in x.chunks(self.cols).zip(ys) {
                gemm_xwt(x, 1, w, self.cols, y, 1);
            }
        };
        if threads <= 1 {
            pieces.into_iter().zip(self.data.chunks(rows * self.cols)).for_each(run);
        } else {
            let share = pieces.len().div_ceil(threads);
            let weights = self.data.par_chunks(rows * self.cols);
            pieces.into_par_iter().zip(weights).with_min_len(share).for_each(run);
        }
    }
}

/// Up to this number of rows, matrix-vector products are faster than packing `W`; measured on the shapes of
/// SmolLM2-135M.
const FEW_ROWS: usize = 8;
/// Elements of the part of `W` that is multiplied with all rows before the next part is read: an eighth of a common
/// L2.
const PIECE: usize = 32 * 1024;

/// `y[m, n] = x[m, k] * w[n, k]^T`; `n` follows from the length of `y`.
fn gemm_xwt(x: &[f32], m: usize, w: &[f32], k: usize, y: &mut [f32], threads: usize) {
    let n = y.len() / m;
    assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let (k_stride, n_stride) = (k as isize, n as isize);
    // (pointer, distance of columns, distance of rows); the kernels want a destination whose columns lie together.
    let (x, w, y) = ((x.as_ptr(), 1, k_stride), (w.as_ptr(), 1, k_stride), (y.as_mut_ptr(), 1, n_stride));
    let transpose = |(pointer, columns, rows)| (pointer, rows, columns);
    let (m, n, y, lhs, rhs) = match n {
        1 => (m, n, y, x, transpose(w)),
        _ => (n, m, (y.0, y.2, y.1), w, transpose(x)),
    };
    // SAFETY: the assertion above makes every address that m, n, k and these strides can form lie inside its slice, and
    // the borrows keep `y` apart from `x` and `w`.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            y.0,
            y.1,
            y.2,
            false,
            lhs.0,
            lhs.1,
            lhs.2,
            rhs.0,
            rhs.1,
            rhs.2,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_few_is_the_row_alone() {
        let (n, k) = (777, 190);
        let mut w = Matrix::zeros(n, k);
        w.data_mut().iter_mut().enumerate().for_each(|(i, w)| *w = (i as f32).sin());
        let x: Vec<f32> = (0..FEW_ROWS * k).map(|i| (i as f32).cos()).collect();
        let mut all = vec![0.0; FEW_ROWS * n];
        w.apply(&x, FEW_ROWS, &mut all, 2);
        for (x, want) in x.chunks(k).zip(all.chunks(n)) {
            for threads in [1, 3] {
                let mut y = vec![0.0; n];
                w.apply(x, 1, &mut y, threads);
                assert!(y == want, "{threads} threads");
            }
        }
    }

    #[test]
    fn agrees_with_a_plain_sum() {
        let value = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
        for (m, n, k) in [(1, 1, 1), (1, 37, 53), (1, 64, 3), (2, 37, 53), (5, 130, 64), (33, 17, 1), (0, 4, 4)] {
            let mut w = Matrix::zeros(n, k);
            w.data_mut().iter_mut().enumerate().for_each(|(i, w)| *w = value(i));
            let x: Vec<f32> = (0..m * k).map(|i| value(i + 5)).collect();
            for threads in [1, 2, 3] {
                let mut y = vec![f32::NAN; m * n];
                w.apply(&x, m, &mut y, threads);
                for i in 0..m {
                    for j in 0..n {
                        let row = x[i * k..][..k].iter().zip(w.row(j));
                        let want: f64 = row.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let got = f64::from(y[i * n + j]);
                        assert!((got - want).abs() < 1e-5 * k as f64, "{m}x{n}x{k} at {i},{j}: {got} for {want}");
                    }
                }
            }
        }
    }
}
