//! The product of tiles with rows: one loop, for every type of weights and every vector unit.
//!
//! For a group of 32 columns, `w = scale * q + min` in the weights and `x = s * p` in the rounded row, so that
//! ```text
//! sum(w x) = scale * s * sum(q p) + min * s * sum(p)
//! ```
//! where the sums are of integers, and exact. A zero point joins the first sum: `sum((q - zero) p) = sum(q p) - zero *
//! sum(p)`. With rows in f32 ([`Input::Floats`]) the weights of the group are converted to f32, and the products of a
//! group are summed before they join the total.
//!
//! Every output is one lane, and its operations on floats are the same in the same order whatever the vector unit, the
//! number of rows, and the division of work. So are its bits.

use std::ops::Range;

use super::activations::{Group, TERMS};
use super::simd::Simd;
use super::tiles::{Places, ROWS, VECTOR, VECTORS};
use crate::driver::quant::{Format, GROUP, TensorType, with_quantised};

/// Rows to multiply, one after another.
#[derive(Debug, Clone, Copy)]
pub(super) enum Input<'a> {
    /// Rounded; [`TERMS`] rows of them have one output.
    Rounded(&'a [Group]),
    /// In f32.
    Floats(&'a [f32]),
}

/// A share of a product `y[m, n] = x[m, k] * W^T`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    /// The tiles of the share, and their number.
    pub tiles: &'a [u8],
    pub count: usize,
    /// The number of outputs; at most 16 per tile.
    pub outputs: usize,
    /// Groups in a row.
    pub groups: usize,
    pub input: Input<'a>,
    /// The output of the first row and first tile, and the distance of rows.
    pub y: *mut f32,
    pub stride: usize,
}

/// Rows of a pass over a share's tiles: they stay in the second-level cache.
const PASS: usize = 64;

/// A quantised type, known to the compiler.
pub(super) trait Quantised {
    const FORMAT: Format;
    const PLACES: Places = Places::of(&Self::FORMAT);
}

macro_rules! quantised {
    ($($ty:ident)*) => {
        $(
            #[allow(non_camel_case_types)]
            pub(super) struct $ty;
            impl Quantised for $ty {
                const FORMAT: Format = TensorType::$ty.format();
            }
        )*
    };
}

with_quantised!(quantised);

/// The rows of one step of the loop, in one of the two forms.
trait Rows<const R: usize>: Copy {
    /// Adds the products of group `g` to the sums. `run(i)` has the scale and the minimum of the group's run `i`.
    ///
    /// # Safety
    /// The CPU has what `S` needs, and every row has more than `g` groups.
    unsafe fn add<S: Simd, Q: Quantised>(
        self,
        s: S,
        g: usize,
        vectors: &[S::Bytes; VECTORS],
        runs: &[(S::Floats, S::Floats); 2],
        sums: &mut [S::Floats; R],
    );
}

impl<const R: usize> Rows<R> for [*const Group; R] {
    #[inline(always)]
    unsafe fn add<S: Simd, Q: Quantised>(
        self,
        s: S,
        g: usize,
        vectors: &[S::Bytes; VECTORS],
        runs: &[(S::Floats, S::Floats); 2],
        sums: &mut [S::Floats; R],
    ) {
        let n = Q::FORMAT.runs;
        for (row, sum) in self.iter().zip(sums) {
            // SAFETY: the row has this group.
            let group = unsafe { &*row.add(g) };
            for run in 0..n {
                let (scale, min) = runs[run];
                // With one run, the sums of all 32 elements are in front.
                let place = if n == 1 { 0 } else { 1 + run };
                // SAFETY: the CPU has what `S` needs.
                unsafe {
                    let mut dot = s.ints(Q::FORMAT.zero.map_or(0, |zero| -zero * group.sums[place]));
                    for j in run * VECTORS / n..(run + 1) * VECTORS / n {
                        let x = group.q.as_ptr().add(4 * j).cast::<i32>().read_unaligned();
                        dot = if Q::FORMAT.low_bits == 8 {
                            s.dot_wide(dot, vectors[j], x)
                        } else {
                            s.dot(dot, vectors[j], x)
                        };
                    }
                    let scale = s.mul(scale, s.floats(group.scale));
                    *sum = s.add(*sum, s.mul(s.to_floats(dot), scale));
                    if Q::FORMAT.zero.is_none() {
                        *sum = s.add(*sum, s.mul(min, s.floats(group.scaled_sums[place])));
                    }
                }
            }
        }
    }
}

impl<const R: usize> Rows<R> for [*const f32; R] {
    #[inline(always)]
    unsafe fn add<S: Simd, Q: Quantised>(
        self,
        s: S,
        g: usize,
        vectors: &[S::Bytes; VECTORS],
        runs: &[(S::Floats, S::Floats); 2],
        sums: &mut [S::Floats; R],
    ) {
        // SAFETY: the CPU has what `S` needs, and the rows have this group.
        unsafe {
            let mut parts = [s.floats(0.0); R];
            for (j, &vector) in vectors.iter().enumerate() {
                let (scale, min) = runs[j * Q::FORMAT.runs / VECTORS];
                for c in 0..4 {
                    let q = s.byte(vector, c);
                    let w = match Q::FORMAT.zero {
                        Some(zero) => s.mul(s.to_floats(s.add_ints(q, -zero)), scale),
                        None => s.add(s.mul(s.to_floats(q), scale), min),
                    };
                    for (row, part) in self.iter().zip(&mut parts) {
                        *part = s.add(*part, s.mul(w, s.floats(*row.add(g * GROUP + 4 * j + c))));
                    }
                }
            }
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum = s.add(*sum, part);
            }
        }
    }
}

/// The vectors of a group, from its planes of bits.
///
/// # Safety
/// The CPU has what `S` needs, and the group is a whole one of type `Q`.
#[inline(always)]
unsafe fn unpack<S: Simd, Q: Quantised>(s: S, group: *const u8) -> [S::Bytes; VECTORS] {
    let (low_bits, high_bits) = (Q::FORMAT.low_bits, Q::FORMAT.high_bits);
    // SAFETY: a plane of `b` bits has `b` vectors.
    unsafe {
        let mut out = [s.load(group); VECTORS];
        for (j, out) in out.iter_mut().enumerate() {
            let low = s.load(group.add(j % low_bits * VECTOR));
            *out = match low_bits {
                8 => low,
                _ => s.bits(low, j / low_bits * low_bits, 0, low_bits),
            };
            if high_bits > 0 {
                let high = s.load(group.add(Q::PLACES.high + j % high_bits * VECTOR));
                *out = s.or(*out, s.bits(high, j / high_bits * high_bits, low_bits, high_bits));
            }
        }
        out
    }
}

/// The products of one tile with `R` rows.
///
/// # Safety
/// The CPU has what `S` needs; the tile and the rows have `groups` groups.
#[inline(always)]
unsafe fn tile<S: Simd, Q: Quantised, const R: usize>(
    s: S,
    tile: *const u8,
    groups: usize,
    rows: impl Rows<R>,
) -> [S::Floats; R] {
    let (format, places) = (Q::FORMAT, Q::PLACES);
    // SAFETY: `Places` has the offsets in the blocks of which the tile consists.
    unsafe {
        let zero = s.floats(0.0);
        let mut sums = [zero; R];
        for b in 0..groups / format.groups {
            let block = tile.add(b * places.block);
            let d = s.load_halves(block);
            let m = if format.zero.is_none() { s.load_halves(block.add(places.m)) } else { zero };
            for g in 0..format.groups {
                let mut runs = [(d, m); 2];
                if format.groups > 1 {
                    for (run, out) in runs.iter_mut().enumerate().take(format.runs) {
                        let at = (g * format.runs + run) * ROWS;
                        out.0 = s.mul(d, s.to_floats(s.load_signed(block.add(places.scales + at))));
                        if format.zero.is_none() {
                            let min = s.mul(m, s.to_floats(s.load_signed(block.add(places.mins + at))));
                            out.1 = s.sub(zero, min);
                        }
                    }
                }
                let vectors = unpack::<S, Q>(s, block.add(places.groups + g * places.group));
                rows.add::<S, Q>(s, b * format.groups + g, &vectors, &runs, &mut sums);
            }
        }
        sums
    }
}

/// The products of all tiles of a job with the rows `from..from + R`.
///
/// # Safety
/// As for [`run`], and the job has these rows.
#[inline(always)]
unsafe fn rows<S: Simd, Q: Quantised, const R: usize, const FLOATS: bool>(s: S, job: &Job<'_>, t: usize, from: usize) {
    let bytes = job.tiles.len() / job.count;
    let at = job.tiles[t * bytes..].as_ptr();
    // SAFETY: the tile is a whole one, and the rows from `from` on are the input's.
    let sums = unsafe {
        match job.input {
            Input::Rounded(x) if !FLOATS => {
                let x = x.as_ptr().add(from * job.groups);
                tile::<S, Q, R>(s, at, job.groups, std::array::from_fn::<_, R, _>(|r| x.add(r * job.groups)))
            }
            Input::Floats(x) if FLOATS => {
                let k = job.groups * GROUP;
                let x = x.as_ptr().add(from * k);
                tile::<S, Q, R>(s, at, job.groups, std::array::from_fn::<_, R, _>(|r| x.add(r * k)))
            }
            _ => return,
        }
    };
    let outputs = (job.outputs - t * ROWS).min(ROWS);
    let terms = if FLOATS { 1 } else { TERMS };
    for r in (0..R).step_by(terms) {
        // SAFETY: the CPU has what `S` needs; the row has `job.outputs` outputs from `job.y` on, and this tile has `outputs`
        // of them.
        unsafe {
            let sum = sums[r + 1..r + terms].iter().fold(sums[r], |sum, &term| s.add(sum, term));
            let y = job.y.add((from + r) / terms * job.stride + t * ROWS);
            if outputs == ROWS {
                s.store(y, sum);
            } else {
                let mut all = [0.0f32; ROWS];
                s.store(all.as_mut_ptr(), sum);
                y.copy_from_nonoverlapping(all.as_ptr(), outputs);
            }
        }
    }
}

/// Computes a job.
///
/// # Safety
/// The CPU has what `S` needs; the tiles are whole ones of type `Q` with `groups` groups; `y` can be written for every
/// row of the input and every output, and is nobody else's meanwhile.
#[inline(always)]
pub(super) unsafe fn run<S: Simd, Q: Quantised, const FLOATS: bool>(s: S, job: &Job<'_>, m: Range<usize>) {
    let mut start = m.start;
    while start < m.end {
        let end = m.end.min(start + PASS);
        for t in 0..job.count {
            let mut from = start;
            // SAFETY: the caller's promises, and the rows are below `m.end`.
            unsafe {
                while from + S::MOST <= end && S::MOST > 4 {
                    rows::<S, Q, 8, FLOATS>(s, job, t, from);
                    from += 8;
                }
                while from + 4 <= end && S::MOST >= 4 {
                    rows::<S, Q, 4, FLOATS>(s, job, t, from);
                    from += 4;
                }
                while from + 2 <= end {
                    rows::<S, Q, 2, FLOATS>(s, job, t, from);
                    from += 2;
                }
                while from < end {
                    rows::<S, Q, 1, FLOATS>(s, job, t, from);
                    from += 1;
                }
            }
        }
        start = end;
    }
}
