//! Units of a cache, as loops over it read them: elements, or blocks of elements.

use super::weighted::load_up_to;
use crate::kernels::generic::blocks::{BlockUnit, N};
use crate::kernels::simd::{Load, MAX_LANES, Simd};
use std::marker::PhantomData;

/// How the units of a format are read.
pub(crate) trait Units: 'static {
    type Unit: Copy;
    /// Elements per unit, 1 or at least two vectors.
    const ELEMENTS: usize;

    /// `2 * LANES` elements, in the order that attention uses, from element `at` of `unit` on.
    ///
    /// # Safety
    /// These elements are readable; those of a block lie in one.
    unsafe fn pair<S: Simd>(s: S, unit: *const Self::Unit, at: usize) -> [S::V; 2];

    /// The first or the second of the vectors of [`Self::pair`].
    ///
    /// # Safety
    /// As [`Self::pair`].
    #[inline(always)]
    unsafe fn half<S: Simd>(s: S, unit: *const Self::Unit, at: usize, half: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { Self::pair(s, unit, at)[half] }
    }

    /// The last `part` elements, at most a vector, and zeros. A head of blocks has whole pairs of vectors.
    ///
    /// # Safety
    /// These elements are readable.
    unsafe fn rest<S: Simd>(s: S, unit: *const Self::Unit, part: usize) -> S::V;
}

impl<T: Load> Units for T {
    type Unit = T;
    const ELEMENTS: usize = 1;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, unit: *const T, at: usize) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe { T::load_pair(s, unit.add(at)) }
    }

    #[inline(always)]
    unsafe fn half<S: Simd>(s: S, unit: *const T, at: usize, half: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe {
            if const { T::DEINTERLEAVES && S::DEINTERLEAVED_BF16 } {
                s.load_half_bf16(unit.add(at).cast(), half)
            } else {
                T::load(s, unit.add(at + half * S::LANES))
            }
        }
    }

    #[inline(always)]
    unsafe fn rest<S: Simd>(s: S, unit: *const T, part: usize) -> S::V {
        // SAFETY: the caller's.
        unsafe { load_up_to(s, unit, part) }
    }
}

/// Blocks of type `U`.
pub(crate) struct Blocks<U>(PhantomData<U>);

const _: () = assert!(N >= 2 * MAX_LANES);

impl<U: BlockUnit> Units for Blocks<U> {
    type Unit = U;
    const ELEMENTS: usize = N;

    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, unit: *const U, at: usize) -> [S::V; 2] {
        // SAFETY: the caller's.
        let unit = unsafe { &*unit };
        unit.pair(s, unit.parts(s), at)
    }

    #[inline(always)]
    unsafe fn rest<S: Simd>(s: S, _: *const U, _: usize) -> S::V {
        s.zero()
    }
}
