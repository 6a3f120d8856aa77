//! Values packed in pairs of slots ([`Packing::RowPairs`](crate::layout::Packing::RowPairs)). The direct path separates them in
//! registers; the packed path, and blocks in which neighbouring keys are not pairs, unpack them once per block.

use super::key_pointers::{KeyPointerTable, KeyPointers, Pointers};
use super::{Block, PairPieces};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::dtype::Element;
use crate::kernels::generic::copy;
use crate::kernels::simd::{Load, MAX_LANES, Simd, deinterleaved, lines};
use crate::problem::attention::Problem;
use crate::problem::grid::{KeyRange, padded};
use crate::problem::limits::MAX_HEAD_DIM;

/// Whether one pair of slots holds the value of `key` in its first half and that of `key + 1`, which is in the key range, in its
/// second.
#[inline(always)]
pub(crate) fn is_pair<T>(p: &Problem, v: &KeyPointers<T>, key_range: KeyRange, key: usize) -> bool {
    p.value_step() == 2
        && key + 1 < key_range.high
        && v.key(0, key + 1) == v.key(0, key).wrapping_byte_add(p.v.dtype.unit_bytes())
}

/// Copies the values of a key range to rows `[BLOCK][padded(dim)]` at `block`, for kernels that read no pairs.
///
/// # Safety
/// As [`locate`](super::locate), which has set the pointers.
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) unsafe fn unpack_pairs<T: Element, P>(
    p: &Problem,
    key_range: KeyRange,
    block: *mut u8,
    v: &mut KeyPointerTable<P>,
) {
    // SAFETY: the caller's.
    unsafe { unpack_head::<T, P>(p, key_range, block, v.rows(), 0) };
    v.place(key_range, block.cast::<P>().cast_const(), padded(p.v_dim) * size_of::<T>());
}

/// [`unpack_pairs`] for a KV head of the tile; no pointer is set.
///
/// # Safety
/// As [`unpack_pairs`].
#[inline(always)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) unsafe fn unpack_head<T: Element, P>(
    p: &Problem,
    key_range: KeyRange,
    block: *mut u8,
    v: KeyPointers<P>,
    head: usize,
) {
    let (dim, step) = (p.v_dim, p.value_step());
    let row = |j: usize| block.cast::<T>().wrapping_add(j * padded(dim));
    let rows = v.cast::<T>();
    let mut j = key_range.low;
    while j < key_range.high {
        let from = rows.key(head, j);
        // SAFETY: the caller's.
        unsafe {
            if is_pair(p, &rows, key_range, j) {
                let (from, even, odd) = (from.cast::<[T; 2]>(), row(j), row(j + 1));
                for i in 0..dim {
                    let [a, b] = *from.add(i);
                    (*even.add(i), *odd.add(i)) = (a, b);
                }
                j += 2;
            } else {
                copy::gather(from, step, row(j), dim);
                j += 1;
            }
        }
    }
}

/// Whether the key range consists of whole pairs ([`is_pair`] for every other key).
#[inline(always)]
pub(crate) fn are_pairs<T>(p: &Problem, v: &KeyPointers<T>, key_range: KeyRange) -> bool {
    let whole = key_range.low.is_multiple_of(2) && key_range.high.is_multiple_of(2);
    whole && (key_range.low..key_range.high).step_by(2).all(|j| is_pair(p, v, key_range, j))
}

/// The values of a key range and KV head as rows of f32, in the order of [`Load::load_pair`]. Widening is exact, so sums over these
/// rows have the bits of sums over values that are not packed.
///
/// # Safety
/// As [`Widen`].
#[inline(always)]
pub(super) unsafe fn widen<'a>(
    pieces: &PairPieces,
    values: &Widen,
    memory: &'a mut Pointers<u8>,
) -> KeyPointerTable<'a, u8> {
    let Block { scratch, key_range, dv, .. } = *values.block;
    let mut widened = KeyPointerTable::new(memory);
    widened.place(key_range, scratch.v_block, padded(dv) * size_of::<f32>());
    // SAFETY: the caller's.
    unsafe { (pieces.widen)(values) };
    widened
}

/// Writes `[BLOCK][padded(dv)]` floats to the scratch memory for values.
///
/// # Safety
/// `v` points to the values of the block's key range, in pairs.
pub(crate) struct Widen<'a> {
    pub block: &'a Block<'a>,
    pub v: KeyPointers<'a, u8>,
    /// The KV head of the tile.
    pub head: usize,
}

impl Widen<'_> {
    /// Widens values of type `T`.
    ///
    /// # Safety
    /// As [`Widen`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(&self, s: S) {
        let Block { p, scratch, key_range, dv, .. } = *self.block;
        let v = self.v.cast::<T>();
        let row = |j: usize| scratch.v_block.cast::<f32>().wrapping_add(j * padded(dv));
        let mut j = key_range.low;
        while j < key_range.high {
            let from = v.key(self.head, j);
            let next = v.next_pair(j).cast::<u8>();
            if !next.is_null() {
                lines(next, 2 * dv * size_of::<T>()).for_each(|line| s.prefetch_far(line));
            }
            // SAFETY: the caller's; rows have padded(dv) floats, and the buffer holds the largest head size.
            unsafe {
                if is_pair(p, &v, key_range, j) {
                    widen_pair(s, from, [row(j), row(j + 1)], dv);
                    j += 2;
                } else {
                    let mut values = [T::default(); MAX_HEAD_DIM];
                    copy::gather(from, p.value_step(), values.as_mut_ptr(), dv);
                    widen_one(s, values.as_ptr(), row(j), dv);
                    j += 1;
                }
            }
        }
    }
}

/// # Safety
/// `2 * dim` elements are readable at `from`, `dim` rounded up to whole vectors writable at both rows of `to`.
#[inline(always)]
unsafe fn widen_pair<S: Simd, T: Load>(s: S, from: *const T, to: [*mut f32; 2], dim: usize) {
    let mut i = 0;
    // SAFETY: the caller's.
    unsafe {
        while i + 2 * S::LANES <= dim {
            for (x, to) in load_two::<S, T, 2>(s, from.add(2 * i), S::LANES).into_iter().zip(to) {
                s.store_f32(to.add(i), x[0]);
                s.store_f32(to.add(i + S::LANES), x[1]);
            }
            i += 2 * S::LANES;
        }
        while i < dim {
            let part = (dim - i).min(S::LANES);
            for ([x], to) in load_two::<S, T, 1>(s, from.add(2 * i), part).into_iter().zip(to) {
                s.store_f32(to.add(i), x);
            }
            i += part;
        }
    }
}

/// `N` vectors of both values of a pair, in the order of [`Load::load_pair`]. `N` is even, or 1 for a vector of `part` elements.
///
/// # Safety
/// `2 * N * LANES` elements, or `2 * part`, are readable.
#[inline(always)]
pub(super) unsafe fn load_two<S: Simd, T: Load, const N: usize>(s: S, from: *const T, part: usize) -> [[S::V; N]; 2] {
    let mut x = [[s.zero(); N]; 2];
    // SAFETY: the caller's; less than a vector is read through a copy.
    unsafe {
        if N == 1 {
            let mut last = [T::default(); 2 * MAX_LANES];
            let whole = part == S::LANES;
            if !whole {
                std::ptr::copy_nonoverlapping(from, last.as_mut_ptr(), 2 * part);
            }
            let both = halves::<S, T>(s, if whole { from } else { last.as_ptr() });
            (x[0][0], x[1][0]) = (both[0], both[1]);
            return x;
        }
        for n in (0..N).step_by(2) {
            let from = from.add(2 * n * S::LANES);
            let (low, high) = (halves::<S, T>(s, from), halves::<S, T>(s, from.add(2 * S::LANES)));
            for i in 0..2 {
                [x[i][n], x[i][n + 1]] =
                    if const { deinterleaved::<S, T>() } { s.deinterleave(low[i], high[i]) } else { [low[i], high[i]] };
            }
        }
    }
    x
}

/// One vector of both values of a pair: the even and the odd of `2 * LANES` elements.
///
/// # Safety
/// These elements are readable.
#[inline(always)]
unsafe fn halves<S: Simd, T: Load>(s: S, from: *const T) -> [S::V; 2] {
    // SAFETY: the caller's.
    let [a, b] = unsafe { T::load_pair(s, from) };
    if const { deinterleaved::<S, T>() } { [a, b] } else { s.deinterleave(a, b) }
}

/// # Safety
/// `dim` rounded up to whole vectors are readable at `from` and writable at `to`.
#[inline(always)]
unsafe fn widen_one<S: Simd, T: Load>(s: S, from: *const T, to: *mut f32, dim: usize) {
    let mut i = 0;
    // SAFETY: the caller's.
    unsafe {
        while i + 2 * S::LANES <= dim {
            let [x, y] = T::load_pair(s, from.add(i));
            s.store_f32(to.add(i), x);
            s.store_f32(to.add(i + S::LANES), y);
            i += 2 * S::LANES;
        }
        while i < dim {
            s.store_f32(to.add(i), T::load(s, from.add(i)));
            i += S::LANES;
        }
    }
}
