//! The state of a query row (largest logit, sum of weights, weighted values): folding two states, finishing one, and conversion of
//! rows between their type and f32.
//!
//! Logits are multiplied by log2(e), so that every exponential is a power of two; the LSE is converted back at the end.
//!
//! A row of Q has the element order of [`Load::load_pair`] for the format of K, an accumulator that for the format of V: for bf16, on
//! some levels, the even elements of every two vectors come first, then the odd ones.

use super::Scratch;
use super::weighted::{load_up_to, scaled};
use crate::dtype::DType;
use crate::kernels::generic::hadamard::rotate_row;
use crate::kernels::generic::{copy, math};
use crate::kernels::simd::{LoadStore, MAX_LANES, Outlined, Simd, deinterleaved};
use crate::problem::attention::Problem;
use crate::problem::grid::{PARTIAL_HEADER, padded, partial_stride};
use crate::problem::tile::Tile;
use half::{bf16, f16};

/// Folds the states that the chunks of a tile left in `tile.partials`, and writes the output. `deinterleaved` as in [`Output`].
///
/// # Safety
/// As [`tile`](super::tile); the partial states of all chunks have been written, and there is room for `padded(dv)` floats at
/// `total`.
#[inline(always)]
pub(crate) unsafe fn reduce<S: Simd>(s: S, p: &Problem, tile: &Tile, total: *mut f32, deinterleaved: bool) {
    for (r, (token, head)) in tile.tokens_and_heads(p).enumerate() {
        let mut state = EMPTY;
        // SAFETY: the caller's.
        unsafe {
            for chunk in tile.first_chunk..tile.end_chunk {
                let partial = tile.partial(p, chunk, r);
                fold(s, &mut state, total, (*partial, *partial.add(1)), partial.add(PARTIAL_HEADER), padded(p.v_dim));
            }
            Output { p, batch: tile.batch, token, head, deinterleaved }.finish(s, state, total);
        }
    }
}

/// Largest logit and sum of weights over no key.
pub(crate) const EMPTY: (f32, f32) = (f32::NEG_INFINITY, 0.0);

impl Tile {
    /// The address for the state of row `r` after a chunk; its accumulator follows [`PARTIAL_HEADER`] floats later.
    #[inline(always)]
    fn partial(&self, p: &Problem, chunk: usize, r: usize) -> *mut f32 {
        self.partials.wrapping_add(((chunk - self.first_chunk) * self.rows() + r) * partial_stride(p.v_dim))
    }
}

/// Whether a state covers no key; its accumulator is then not read.
#[inline(always)]
pub(crate) fn is_empty((max, sum): (f32, f32)) -> bool {
    (max, sum) == EMPTY
}

/// `total` becomes the union of `total` and a later chunk; the empty state is the neutral element, to the bit.
///
/// # Safety
/// Both accumulators hold `dvp` floats, unless their state is empty; `total_acc` is writable.
#[inline(always)]
unsafe fn fold<S: Simd>(
    s: S,
    total: &mut (f32, f32),
    total_acc: *mut f32,
    chunk: (f32, f32),
    chunk_acc: *const f32,
    dvp: usize,
) {
    if is_empty(chunk) {
        return;
    }
    if is_empty(*total) {
        *total = chunk;
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(chunk_acc, total_acc, dvp) };
        return;
    }
    let max = if chunk.0 > total.0 { chunk.0 } else { total.0 };
    let (old, new) = (math::exp2_1(s, total.0 - max), math::exp2_1(s, chunk.0 - max));
    *total = (max, total.1 * old + chunk.1 * new);
    let (old, new) = (s.splat(old), s.splat(new));
    for i in (0..dvp).step_by(S::LANES) {
        // SAFETY: dvp is a multiple of LANES.
        unsafe {
            let scaled = s.mul(s.load_f32(total_acc.add(i)), old);
            s.store_f32(total_acc.add(i), s.fma(s.load_f32(chunk_acc.add(i)), new, scaled));
        }
    }
}

/// The destination of a query row.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    pub p: &'a Problem<'a>,
    pub batch: usize,
    pub token: usize,
    pub head: usize,
    /// The accumulator holds even and odd elements of every two vectors apart.
    pub deinterleaved: bool,
}

impl Output<'_> {
    /// Ends a chunk for row `r` of a tile: stores the state among the tile's partial states, or folds it into the row's `total` and
    /// writes the output if the chunk is the `last`.
    ///
    /// # Safety
    /// The indices are inside the problem and the tile; both accumulators hold `padded(dv)` floats, which are only read unless
    /// their state is empty.
    #[inline(always)]
    pub unsafe fn end_chunk<S: Simd>(
        self,
        s: S,
        tile: &Tile,
        (chunk, r, last): (usize, usize, bool),
        (state, acc): ((f32, f32), *mut f32),
        (total, total_acc): (&mut (f32, f32), *mut f32),
    ) {
        let dvp = padded(self.p.v_dim);
        // SAFETY: the caller's; the partials hold a state for every chunk and row of the tile.
        unsafe {
            if !tile.partials.is_null() {
                let partial = tile.partial(self.p, chunk, r);
                (*partial, *partial.add(1)) = state;
                if !is_empty(state) {
                    std::ptr::copy_nonoverlapping(acc, partial.add(PARTIAL_HEADER), dvp);
                }
                return;
            }
            // A first state needs no copy if it is the last.
            let (mut joint, mut joint_acc) = (state, acc);
            if !(last && is_empty(*total)) {
                fold(s, total, total_acc, state, acc, dvp);
                (joint, joint_acc) = (*total, total_acc);
            }
            if last {
                self.finish(s, joint, joint_acc);
            }
        }
    }

    /// Divides by the sum, sink logit included, undoes the rotation of V, and writes output and LSE.
    ///
    /// # Safety
    /// The indices are inside the problem; `acc` holds `padded(dv)` floats, which are only read unless the state is empty.
    #[inline(always)]
    pub unsafe fn finish<S: Simd>(self, s: S, state: (f32, f32), acc: *mut f32) {
        let Self { p, batch, token, head, mut deinterleaved } = self;
        let dv = p.v_dim;
        let (mut max, mut sum) = state;
        let mut factor = 1.0;
        if let Some(sinks) = p.sinks {
            let sink = sinks[head] * std::f32::consts::LOG2_E;
            let joint = if sink > max { sink } else { max };
            if joint > f32::NEG_INFINITY {
                factor = math::exp2_1(s, max - joint);
                sum = sum * factor + math::exp2_1(s, sink - joint);
                max = joint;
            }
        }
        // SAFETY: the caller's.
        unsafe {
            if !p.lse.is_null() {
                let lse = max as f64 * std::f64::consts::LN_2 + (sum as f64).ln();
                *p.lse(batch, token, head) = match p.sinks {
                    // Alone, a sink's logit is the sum, and would not come back whole from its way through log2(e).
                    Some(sinks) if is_empty(state) => sinks[head],
                    None if is_empty(state) => f32::NEG_INFINITY,
                    _ => lse as f32,
                };
            }
            let scale = if is_empty(state) {
                std::ptr::write_bytes(acc, 0, padded(dv));
                0.0
            } else {
                factor / sum
            };
            if p.v_hadamard != 0 && !is_empty(state) {
                if deinterleaved {
                    in_order(s, acc, dv);
                    deinterleaved = false;
                }
                rotate_row(s, acc, dv, p.v_hadamard);
            }
            let (row, token) = p.visibility.query(batch, token);
            let scaled = Scaled { acc, scale, deinterleaved };
            let (dst, stride) = (p.out.row(row, token, head), p.out.strides[3] as isize);
            match p.out.dtype {
                DType::F32 => scaled.store::<S, f32>(s, dst.cast(), stride, dv),
                DType::F16 => scaled.store::<S, f16>(s, dst.cast(), stride, dv),
                DType::Bf16 => scaled.store::<S, bf16>(s, dst.cast(), stride, dv),
            }
        }
    }
}

/// The rows of one token, whose accumulators and the factors for them (in `scratch.total`) are in place.
pub(super) struct TokenRows<'a> {
    pub scratch: &'a Scratch,
    pub rows: usize,
    pub dv: usize,
    /// See [`Output`].
    pub deinterleaved: bool,
    /// Elements between the heads of the output, whose own elements lie together.
    pub step: i64,
}

impl TokenRows<'_> {
    /// Writes the output, as [`Output::finish`] does.
    ///
    /// # Safety
    /// `dst` is the first row of the output.
    #[inline(always)]
    pub unsafe fn finish<S: Simd, T: LoadStore>(&self, s: S, dst: *mut T) {
        let Self { scratch, rows, dv, deinterleaved, step } = *self;
        for r in 0..rows {
            // SAFETY: the caller's; the scratch has these rows.
            unsafe {
                let (acc, scale) = (scratch.acc.add(r * scratch.acc_row), *scratch.total.add(r));
                let dst = dst.wrapping_offset(r as isize * step as isize);
                Scaled { acc, scale, deinterleaved }.store::<S, T>(s, dst, 1, dv);
            }
        }
    }
}

/// A row that needs a factor and its elements in order.
struct Scaled {
    acc: *const f32,
    scale: f32,
    /// See [`Output`].
    deinterleaved: bool,
}

impl Scaled {
    /// # Safety
    /// `acc` holds `n` floats, and there is room for as many elements with that stride at `dst`.
    #[inline(always)]
    unsafe fn store<S: Simd, T: LoadStore>(&self, s: S, dst: *mut T, stride: isize, n: usize) {
        // SAFETY: the caller's.
        unsafe {
            if self.deinterleaved {
                self.store_in::<S, T, true>(s, dst, stride, n);
            } else {
                self.store_in::<S, T, false>(s, dst, stride, n);
            }
        }
    }

    /// [`Self::store`] for an accumulator of this order.
    ///
    /// # Safety
    /// As [`Self::store`].
    #[inline(always)]
    unsafe fn store_in<S: Simd, T: LoadStore, const DEINTERLEAVED: bool>(
        &self,
        s: S,
        dst: *mut T,
        stride: isize,
        n: usize,
    ) {
        if stride == 1 {
            // SAFETY: the caller's.
            unsafe { self.run::<S, T, DEINTERLEAVED>(s, 0, dst, n) };
            return;
        }
        let mut buffer = [T::default(); copy::STAGE];
        for first in (0..n).step_by(copy::STAGE) {
            let len = (n - first).min(copy::STAGE);
            // SAFETY: the caller's; each part, of whole vectors except for the last, fits the buffer.
            unsafe {
                self.run::<S, T, DEINTERLEAVED>(s, first, buffer.as_mut_ptr(), len);
                copy::scatter(buffer.as_ptr(), dst.wrapping_offset(first as isize * stride), stride, len);
            }
        }
    }

    #[inline(always)]
    fn times<S: Simd>(&self, s: S, x: S::V) -> S::V {
        scaled(s, x, s.splat(self.scale))
    }

    /// Writes `n` elements, from number `first` on, to consecutive addresses.
    ///
    /// # Safety
    /// As [`Self::store`]; `first` is a multiple of two vectors.
    #[inline(always)]
    unsafe fn run<S: Simd, T: LoadStore, const DEINTERLEAVED: bool>(&self, s: S, first: usize, dst: *mut T, n: usize) {
        let acc = self.acc.wrapping_add(first);
        let pair = 2 * S::LANES;
        let mut i = n / pair * pair;
        // SAFETY: the caller's.
        unsafe {
            for i in (0..i).step_by(pair) {
                let first = self.times(s, s.load_f32(acc.add(i)));
                let second = self.times(s, s.load_f32(acc.add(i + S::LANES)));
                if const { S::FEW_REGISTERS && DEINTERLEAVED && deinterleaved::<S, T>() } {
                    T::store_pair(s, dst.add(i), [first, second]);
                    continue;
                }
                let [first, second] = if DEINTERLEAVED { s.interleave(first, second) } else { [first, second] };
                T::store(s, dst.add(i), first);
                T::store(s, dst.add(i + S::LANES), second);
            }
            while i < n {
                let part = (n - i).min(S::LANES);
                let x = self.times(s, load_up_to(s, acc.add(i), part));
                if part == S::LANES {
                    T::store(s, dst.add(i), x)
                } else {
                    T::store_part(s, dst.add(i), x, part)
                }
                i += part;
            }
        }
    }
}

/// Joins the even and the odd elements of every two vectors of an accumulator of `n` elements.
///
/// # Safety
/// `n` floats are readable and writable at `acc`.
#[inline(always)]
unsafe fn in_order<S: Simd>(s: S, acc: *mut f32, n: usize) {
    let pair = 2 * S::LANES;
    for i in (0..n / pair * pair).step_by(pair) {
        // SAFETY: the caller's.
        unsafe {
            let [first, second] = s.interleave(s.load_f32(acc.add(i)), s.load_f32(acc.add(i + S::LANES)));
            s.store_f32(acc.add(i), first);
            s.store_f32(acc.add(i + S::LANES), second);
        }
    }
}

/// Converts a query row to f32, rotated as K is, in the element order of K.
///
/// # Safety
/// `src` is a row of the problem's queries, `dst` has `padded(d)` floats for their d elements.
#[inline(always)]
pub(super) unsafe fn load_query<S: Simd>(s: S, deinterleaved: bool, p: &Problem, src: *const u8, dst: *mut f32) {
    let (q, d) = (&p.q, p.q.shape[3]);
    // SAFETY: the caller's.
    unsafe {
        if const { S::FEW_REGISTERS } && deinterleaved && loads_separated::<S>(p) {
            load_token(s, p, src, dst, 1);
            return;
        }
        LoadRow { dtype: q.dtype, src, stride: q.strides[3] as isize, dst, n: d }.run(s);
        rotate_row(s, dst, d, p.k_hadamard);
        (d..padded(d)).for_each(|i| *dst.add(i) = 0.0);
        if deinterleaved {
            let pair = 2 * S::LANES;
            for i in (0..d / pair * pair).step_by(pair) {
                let [even, odd] = s.deinterleave(s.load_f32(dst.add(i)), s.load_f32(dst.add(i + S::LANES)));
                s.store_f32(dst.add(i), even);
                s.store_f32(dst.add(i + S::LANES), odd);
            }
        }
    }
}

/// Whether queries take one pass to rows whose even and odd elements of every two vectors are apart.
#[inline(always)]
pub(super) fn loads_separated<S: Simd>(p: &Problem) -> bool {
    p.q.strides[3] == 1 && p.k_hadamard == 0 && p.q.shape[3].is_multiple_of(MAX_LANES.max(2 * S::LANES))
}

/// Such rows of `rows` heads of a token, from `src` on.
///
/// # Safety
/// As [`load_query`].
#[inline(always)]
pub(super) unsafe fn load_token<S: Simd>(s: S, p: &Problem, src: *const u8, dst: *mut f32, rows: usize) {
    let of = (p.q.strides[2] as isize, p.q.shape[3]);
    // SAFETY: the caller's.
    unsafe {
        match p.q.dtype {
            DType::F32 => load_separated::<S, f32>(s, src.cast(), of, dst, rows),
            DType::F16 => load_separated::<S, f16>(s, src.cast(), of, dst, rows),
            DType::Bf16 => load_separated::<S, bf16>(s, src.cast(), of, dst, rows),
        }
    }
}

/// # Safety
/// As [`load_token`]: `rows` rows of `n` elements, `step` apart.
#[inline(always)]
unsafe fn load_separated<S: Simd, T: LoadStore>(
    s: S,
    src: *const T,
    (step, n): (isize, usize),
    dst: *mut f32,
    rows: usize,
) {
    for r in 0..rows {
        let (src, dst) = (src.wrapping_offset(r as isize * step), dst.wrapping_add(r * n));
        for i in (0..n).step_by(2 * S::LANES) {
            // SAFETY: the caller's.
            unsafe {
                let mut x = T::load_pair(s, src.add(i));
                if const { !deinterleaved::<S, T>() } {
                    x = s.deinterleave(x[0], x[1]);
                }
                s.store_f32(dst.add(i), x[0]);
                s.store_f32(dst.add(i + S::LANES), x[1]);
            }
        }
    }
}

/// Converts `n` elements of a runtime type to f32.
///
/// # Safety
/// `n` elements with that stride are readable at `src`, `n` floats writable at `dst`.
#[inline(always)]
pub(crate) unsafe fn load_row<S: Simd>(s: S, dtype: DType, src: *const u8, stride: i64, dst: *mut f32, n: usize) {
    // SAFETY: the caller's.
    unsafe { s.outline(LoadRow { dtype, src, stride: stride as isize, dst, n }) };
}

/// The arguments of [`load_row`].
struct LoadRow {
    dtype: DType,
    src: *const u8,
    stride: isize,
    dst: *mut f32,
    n: usize,
}

impl Outlined for LoadRow {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { dtype, src, stride, dst, n } = self;
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                DType::F32 => load_typed::<S, f32>(s, src.cast(), stride, dst, n),
                DType::F16 => load_typed::<S, f16>(s, src.cast(), stride, dst, n),
                DType::Bf16 => load_typed::<S, bf16>(s, src.cast(), stride, dst, n),
            }
        }
    }
}

/// # Safety
/// As [`load_row`].
#[inline(always)]
unsafe fn load_typed<S: Simd, T: LoadStore>(s: S, src: *const T, stride: isize, dst: *mut f32, n: usize) {
    // SAFETY: the caller's.
    unsafe {
        if stride == 1 {
            copy::run::<S, T, f32>(s, src, dst, n);
        } else {
            for i in 0..n {
                *dst.add(i) = (*src.wrapping_offset(i as isize * stride)).to_f32();
            }
        }
    }
}
