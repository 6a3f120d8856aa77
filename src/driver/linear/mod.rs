//! Linear layers: `y[m, out] = x[m, in] * W^T`, with `W` row-major `[out, in]` as model files store it.
//!
//! Weights keep the type that they have in the file; none is expanded to f32. One row (a decode step) is bound by reading
//! `W` once; many rows (a prompt) are bound by arithmetic.
//!
//! - **Plain floats** are left to the `gemm` crate ([`floats`]).
//! - **Quantised blocks** are packed once, in the order that vector units want ([`tiles`]), and multiplied as integers
//!   ([`kernel`]) with rows that have been rounded to sums of two eight-bit numbers ([`activations`]). No published crate has such products
//!   for all of these types: candle-core 0.11 computes Q4_1 and Q5_0 without vector instructions, at 1.7e9 products a
//!   second on a Zen 4 core on which these kernels compute 75e9, and packs Q4_K, Q6_K and Q8_0 beside a copy as they
//!   are in the file.
//!
//! # What rounding costs
//! A group of 32 elements of a row is rounded to multiples of its largest magnitude over 127, and what is left of it once
//! more. So the error of an output is at most
//! ```text
//! sum over groups of  max |x| / 64516 * sum |w|
//! ```
//! which leaves the text of a model as it is in f32. llama.cpp takes the first term alone, and for K-quants one scale for 256
//! elements: its error is 254 times as large, and changes texts. A decode step is hardly slower with two terms, since
//! it waits for weights; a prompt takes 1.7 times as long. [`Linear::exact`] multiplies the values of the weights with the row as it is,
//! in f32; it takes several times as long.
//!
//! # Invariance
//! For quantised weights, the bits of a row depend neither on the number of rows, nor on the number of threads, nor on the
//! CPU's vector unit, exact or not. For plain floats they do not depend on the number of threads, nor on the number of
//! rows up to eight.

mod activations;
mod floats;
mod kernel;
mod simd;
mod tiles;
mod unit;

use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use self::activations::{Group, TERMS};
use self::floats::Floats;
use self::kernel::{Input, Job};
use self::tiles::{ROWS, Tiles};
use self::unit::Unit;
use super::error::{Error, Result};
use super::quant::{GROUP, TensorType};
use crate::{Isa, Runner};

/// A matrix of weights, row-major, in the type of its file.
///
/// It may consist of several matrices of equal width, one below the other ([`Self::stack`]), whose types may differ.
#[derive(Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    parts: Vec<Part>,
}

#[derive(Debug, Clone)]
struct Part {
    rows: usize,
    store: Store,
}

#[derive(Debug, Clone)]
enum Store {
    Floats(Floats),
    Tiles(Tiles),
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix[{}, {}]", self.rows, self.cols)
    }
}

impl Matrix {
    /// A matrix of type `ty` from the bytes of a file: row after row, each of whole blocks. The bytes are copied, on the
    /// current rayon pool.
    ///
    /// It is an error if rows are not whole blocks, or `data` does not have the size of `rows` rows.
    pub fn from_bytes(ty: TensorType, rows: usize, cols: usize, data: &[u8]) -> Result<Self> {
        let wanted = ty.bytes(cols).and_then(|row| row.checked_mul(rows));
        if wanted != Some(data.len()) {
            return Err(Error::malformed(format!(
                "{} bytes of {} cannot hold {rows} rows of {cols} elements: a block is {} elements in {} bytes",
                data.len(),
                ty.name(),
                ty.block_elements(),
                ty.block_bytes()
            )));
        }
        let store = match ty {
            TensorType::F32 => Store::Floats(Floats::F32(elements(data, f32::from_le_bytes))),
            TensorType::F16 => Store::Floats(Floats::F16(elements(data, f16::from_le_bytes))),
            TensorType::BF16 => Store::Floats(Floats::Bf16(elements(data, bf16::from_le_bytes))),
            _ => Store::Tiles(Tiles::pack(ty, rows, cols / ty.block_elements(), data)),
        };
        Ok(Self { rows, cols, parts: vec![Part { rows, store }] })
    }

    /// A matrix of f32.
    ///
    /// # Panics
    /// If `data` is not `rows * cols` elements long.
    pub fn from_f32(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(Some(data.len()), rows.checked_mul(cols), "elements of a matrix of {rows} rows and {cols} columns");
        Self { rows, cols, parts: vec![Part { rows, store: Store::Floats(Floats::F32(data)) }] }
    }

    /// Matrices of equal width, one below the other. Nothing is copied.
    ///
    /// It is an error if the widths differ, or there is no matrix.
    pub fn stack(matrices: Vec<Self>) -> Result<Self> {
        let Some(first) = matrices.first() else {
            return Err(Error::argument("0 matrices to stack; at least 1 is needed"));
        };
        let cols = first.cols;
        if let Some(other) = matrices.iter().find(|m| m.cols != cols) {
            return Err(Error::argument(format!("matrices of {cols} and {} columns cannot be stacked", other.cols)));
        }
        let rows = matrices.iter().map(|m| m.rows).sum();
        Ok(Self { rows, cols, parts: matrices.into_iter().flat_map(|m| m.parts).collect() })
    }

    /// The number of rows, the outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns, the inputs of a linear layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The memory that the weights take, in bytes.
    pub fn memory(&self) -> usize {
        let of = |part: &Part| match &part.store {
            Store::Floats(floats) => floats.memory(),
            Store::Tiles(tiles) => tiles.memory(),
        };
        self.parts.iter().map(of).sum()
    }

    /// Writes the values of row `i` to `out`.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not [`cols`](Self::cols) long.
    pub fn read_row(&self, mut i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "room for a row");
        for part in &self.parts {
            if i < part.rows {
                return match &part.store {
                    Store::Floats(floats) => floats.read(i * self.cols, out),
                    Store::Tiles(tiles) => tiles.row(i, out),
                };
            }
            i -= part.rows;
        }
        panic!("row {} of {}", i + self.rows, self.rows);
    }

    /// The values of row `i`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, i: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.cols];
        self.read_row(i, &mut out);
        out
    }

    /// `y = x * self^T` for the `m` rows of `x`. `rounded` is scratch memory.
    ///
    /// # Panics
    /// If `x` is not `m * cols` or `y` not `m * rows` elements long.
    pub fn apply(&self, linear: &Linear<'_>, x: &[f32], m: usize, y: &mut [f32], rounded: &mut Rounded) {
        assert_eq!(x.len(), m * self.cols, "input of {} elements for {m} rows of {}", x.len(), self.cols);
        assert_eq!(y.len(), m * self.rows, "output of {} elements for {m} rows of {}", y.len(), self.rows);
        if m == 0 {
            return;
        }
        if self.cols == 0 {
            return y.fill(0.0);
        }
        let y = Output { pointer: y.as_mut_ptr(), stride: self.rows };
        let mut first = 0;
        let mut quantised = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            match &part.store {
                Store::Floats(floats) => floats.apply(x, m, self.cols, part.rows, y.after(first), linear.runner),
                Store::Tiles(tiles) => quantised.push((tiles, y.after(first))),
            }
            first += part.rows;
        }
        if !quantised.is_empty() {
            linear.multiply(&quantised, x, m, self.cols, rounded);
        }
    }
}

fn elements<const B: usize, T>(data: &[u8], f: impl Fn([u8; B]) -> T) -> Vec<T> {
    data.as_chunks::<B>().0.iter().map(|&b| f(b)).collect()
}

/// Scratch memory of [`Matrix::apply`], kept between calls.
#[derive(Debug, Default)]
pub struct Rounded(Vec<Group>);

/// How linear layers are computed, and on which threads.
#[derive(Clone, Copy)]
pub struct Linear<'a> {
    unit: Unit,
    exact: bool,
    runner: &'a dyn Runner,
}

impl std::fmt::Debug for Linear<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Linear").field("unit", &self.unit).field("exact", &self.exact).finish_non_exhaustive()
    }
}

impl<'a> Linear<'a> {
    /// Uses the fastest vector unit of the ISA level `highest` or a lower one. Plain floats use what `gemm` finds.
    pub fn new(highest: Isa, runner: &'a dyn Runner) -> Self {
        Self { unit: Unit::best(highest), exact: false, runner }
    }

    /// Whether rows are multiplied as they are, in f32. By default they are rounded to two
    /// terms of eight bits for quantised weights.
    pub fn exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        self
    }

    /// Multiplies the `m` rows of `x` with all of `parts`.
    fn multiply(&self, parts: &[(&Tiles, Output)], x: &[f32], m: usize, k: usize, Rounded(rounded): &mut Rounded) {
        let groups = k / GROUP;
        let input = if self.exact {
            Input::Floats(x)
        } else {
            self.round(x, m, groups, rounded);
            Input::Rounded(&rounded[..m * TERMS * groups])
        };
        let input_rows = if self.exact { m } else { m * TERMS };
        // A share is a few tiles of the stack, with all rows.
        let tiles: usize = parts.iter().map(|(tiles, _)| tiles.count()).sum();
        let per_share = tiles.div_ceil(SHARES * self.runner.num_threads()).max(1);
        spread(self.runner, tiles.div_ceil(per_share), tiles * ROWS * k * m, &|share| {
            let (mut from, to) = (share * per_share, tiles.min((share + 1) * per_share));
            let mut first = 0;
            for (part, y) in parts {
                let end = first + part.count();
                if from < to.min(end) {
                    let (t, count) = (from - first, to.min(end) - from);
                    let bytes = part.tile_bytes();
                    let job = Job {
                        tiles: &part.bytes()[t * bytes..][..count * bytes],
                        count,
                        outputs: part.rows().min((t + count) * ROWS) - t * ROWS,
                        groups: part.groups(),
                        input,
                        y: y.after(t * ROWS).pointer,
                        stride: y.stride,
                    };
                    // SAFETY: the unit is this CPU's; the part has these tiles, and rows of `groups` groups; the outputs
                    // are inside of `y` and belong to this share.
                    unsafe { self.unit.kernel(part.ty(), self.exact)(&job, 0..input_rows) };
                    from = to.min(end);
                }
                first = end;
            }
        });
    }

    fn round(&self, x: &[f32], m: usize, groups: usize, rounded: &mut Vec<Group>) {
        if rounded.len() < m * TERMS * groups {
            rounded.resize(m * TERMS * groups, Group::default());
        }
        let out = Shared(rounded.as_mut_ptr());
        let per_share = m.div_ceil(SHARES * self.runner.num_threads()).max(1) * groups;
        // An element costs about as much as four products.
        spread(self.runner, (m * groups).div_ceil(per_share), 4 * x.len(), &|share| {
            let x = x.chunks(per_share * GROUP).nth(share).unwrap_or_default();
            // SAFETY: the groups of this share are inside of `rounded`, and no other share's.
            let out = unsafe {
                std::slice::from_raw_parts_mut(out.get().add(share * per_share * TERMS), x.len() / GROUP * TERMS)
            };
            self.unit.round(x, groups, out);
        });
    }
}

/// Shares of the work for a thread. More spread it evenly when threads are held up; fewer hand it over less often.
const SHARES: usize = 4;
/// Products that take a few microseconds, as does giving work to another thread.
const GRAIN: usize = 1 << 18;

/// Runs `task(0)` to `task(n - 1)`, which have `work` products altogether. A free thread takes the next.
fn spread(runner: &dyn Runner, n: usize, work: usize, task: &(dyn Fn(usize) + Sync)) {
    let workers = runner.num_threads().min(n).min(work / GRAIN);
    if workers <= 1 {
        return (0..n).for_each(task);
    }
    let next = AtomicUsize::new(0);
    let ran = runner.run(workers, &|_| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                break;
            }
            task(i);
        }
    });
    assert!(ran, "the runner could not run {workers} tasks");
}

/// A pointer to memory of which every thread writes its own part.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: who dereferences it answers for who writes what.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

/// Rows of outputs, or some columns of them, that several threads write.
#[derive(Clone, Copy)]
struct Output {
    pointer: *mut f32,
    /// The distance of rows.
    stride: usize,
}

// SAFETY: who writes through it answers for who writes what.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    fn pointer(self) -> *mut f32 {
        self.pointer
    }

    fn stride(self) -> usize {
        self.stride
    }

    /// The columns from `first` on.
    fn after(self, first: usize) -> Self {
        Self { pointer: self.pointer.wrapping_add(first), ..self }
    }

    /// The rows from `row` on.
    fn row(self, row: usize) -> Self {
        Self { pointer: self.pointer.wrapping_add(row * self.stride), ..self }
    }
}

#[cfg(test)]
mod tests;
