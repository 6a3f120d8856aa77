//! Weights that are plain floats, in the type that the file has. The `gemm` crate multiplies in f32: weights of 16 bits
//! are converted by pieces that fit into the CPU's cache.
//!
//! For more than one row `gemm` packs the weights first, which costs several times the reading of them. This does not pay
//! for the few rows of a batched decode step, which are computed as matrix-vector products, one row after another, over
//! one piece after another. Up to that number of rows, the bits of a row depend neither on the number of rows nor on the
//! number of threads.

use gemm_common::Parallelism;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{Output, spread};
use crate::Runner;

/// Rows of floats.
#[derive(Debug, Clone)]
pub(super) enum Floats {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// Up to this number of rows, matrix-vector products are faster than packing the weights; measured on the shapes of
/// SmolLM2-135M.
pub(super) const FEW_ROWS: usize = 8;
/// Elements of a piece of the weights: an eighth of a common L2.
const PIECE: usize = 32 * 1024;

impl Floats {
    pub(super) fn memory(&self) -> usize {
        match self {
            Self::F32(w) => size_of_val(w.as_slice()),
            Self::F16(w) => size_of_val(w.as_slice()),
            Self::Bf16(w) => size_of_val(w.as_slice()),
        }
    }

    /// `out.len()` elements from `from` on.
    pub(super) fn read(&self, from: usize, out: &mut [f32]) {
        let range = from..from + out.len();
        match self {
            Self::F32(w) => out.copy_from_slice(&w[range]),
            Self::F16(w) => w[range].convert_to_f32_slice(out),
            Self::Bf16(w) => w[range].convert_to_f32_slice(out),
        }
    }

    /// `n` outputs for `m` rows of `k` elements.
    pub(super) fn apply(&self, x: &[f32], m: usize, k: usize, n: usize, y: Output, runner: &dyn Runner) {
        if let (Self::F32(w), true) = (self, m > FEW_ROWS) {
            // SAFETY: `y` has `n` outputs for each of `m` rows, which nobody else uses.
            return unsafe { gemm_xwt(x, m, w, k, n, y, runner.num_threads()) };
        }
        // The grid depends on the matrix alone, not on the number of threads, because `gemm` chooses its inner loop,
        // and with it the order of summation, by the size of a product.
        let rows = (PIECE / k).next_multiple_of(16).max(16);
        spread(runner, n.div_ceil(rows), m * n * k, &|piece| {
            let first = piece * rows;
            let outputs = rows.min(n - first);
            let mut converted = Vec::new();
            let w = match self {
                Self::F32(w) => &w[first * k..][..outputs * k],
                _ => {
                    converted.resize(outputs * k, 0.0);
                    self.read(first * k, &mut converted);
                    converted.as_slice()
                }
            };
            let y = y.after(first);
            // SAFETY: these outputs of `y` belong to this piece alone.
            unsafe {
                if m > FEW_ROWS {
                    gemm_xwt(x, m, w, k, outputs, y, 1);
                } else {
                    for (row, x) in x.chunks(k).enumerate() {
                        gemm_xwt(x, 1, w, k, outputs, y.row(row), 1);
                    }
                }
            }
        });
    }
}

/// `y[m, n] = x[m, k] * w[n, k]^T`.
///
/// # Safety
/// `y` has `n` outputs for each of `m` rows, which nobody else uses.
unsafe fn gemm_xwt(x: &[f32], m: usize, w: &[f32], k: usize, n: usize, y: Output, threads: usize) {
    assert!(x.len() == m * k && w.len() == n * k);
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let k_stride = k as isize;
    // (pointer, distance of columns, distance of rows); the kernels want a destination whose columns lie together.
    let (x, w, y) = ((x.as_ptr(), 1, k_stride), (w.as_ptr(), 1, k_stride), (y.pointer(), 1, y.stride() as isize));
    let transpose = |(pointer, columns, rows)| (pointer, rows, columns);
    let (m, n, y, lhs, rhs) = match n {
        1 => (m, n, y, x, transpose(w)),
        _ => (n, m, (y.0, y.2, y.1), w, transpose(x)),
    };
    // SAFETY: the assertion above and the caller's promise make every address that m, n, k and these strides can form
    // lie inside its slice or inside `y`.
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
