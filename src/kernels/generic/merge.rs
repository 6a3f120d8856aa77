//! The weighted sum of attention outputs.
//!
//! Bound by memory: one FMA per element that is read. Eight vectors are processed together, so that a weight is loaded
//! once for all of them. bf16 is loaded in pairs of vectors, with even and odd elements separated where that saves
//! shuffles: on AVX-512, one load, two instructions to widen and two FMAs per 32 elements and state.

use crate::kernels::api::MergeArgs;
use crate::kernels::simd::{LoadStore, Simd, lines};

/// Pairs of vectors that are processed together.
const PAIRS: usize = 4;

/// `dst[i] = sum over states of weight * src[i]`, in f32, in the order of the states; a state of weight 0 is not read.
///
/// # Safety
/// Every address that `args` describes is valid; no source overlaps the target.
#[inline(always)]
pub(crate) unsafe fn merge<S: Simd, T: LoadStore>(s: S, args: &MergeArgs) {
    if args.ahead != 0 {
        let ahead =
            |from: *const u8| lines(from, args.dim * size_of::<T>()).map(|line| line.wrapping_offset(args.ahead));
        for state in 0..args.states {
            // SAFETY: there are as many sources.
            ahead(unsafe { *args.srcs.add(state) }).for_each(|line| s.prefetch(line));
        }
        ahead(args.dst).for_each(|line| s.prefetch_write(line));
    }
    let mut i = 0;
    // SAFETY: the caller's; no piece reaches beyond the last element.
    unsafe {
        while i + 2 * PAIRS * S::LANES <= args.dim {
            pairs::<S, T, PAIRS>(s, args, i);
            i += 2 * PAIRS * S::LANES;
        }
        while i + 2 * S::LANES <= args.dim {
            pairs::<S, T, 1>(s, args, i);
            i += 2 * S::LANES;
        }
        while i < args.dim {
            let lanes = (args.dim - i).min(S::LANES);
            let mut sum = s.zero();
            for_each_state::<T>(args, i, |src, weight| {
                let v = if lanes == S::LANES { T::load(s, src) } else { T::load_part(s, src, lanes) };
                sum = s.fma(v, s.splat(weight), sum);
            });
            let dst = args.dst.cast::<T>().add(i);
            if lanes == S::LANES {
                T::store(s, dst, sum)
            } else {
                T::store_part(s, dst, sum, lanes)
            }
            i += lanes;
        }
    }
}

/// Sums `N` pairs of vectors from element `i` on.
///
/// # Safety
/// As [`merge`]; the elements exist.
#[inline(always)]
unsafe fn pairs<S: Simd, T: LoadStore, const N: usize>(s: S, args: &MergeArgs, i: usize) {
    let mut sums = [[s.zero(); 2]; N];
    // SAFETY: the caller's.
    unsafe {
        for_each_state::<T>(args, i, |src, weight| {
            let weight = s.splat(weight);
            for n in 0..N {
                let v = T::load_pair(s, src.add(n * 2 * S::LANES));
                sums[n] = [s.fma(v[0], weight, sums[n][0]), s.fma(v[1], weight, sums[n][1])];
            }
        });
        for n in 0..N {
            T::store_pair(s, args.dst.cast::<T>().add(i + n * 2 * S::LANES), sums[n]);
        }
    }
}

/// Calls `add` with element `i` of every state with a weight other than 0, in order.
///
/// # Safety
/// As [`merge`].
#[inline(always)]
unsafe fn for_each_state<T>(args: &MergeArgs, i: usize, mut add: impl FnMut(*const T, f32)) {
    for state in 0..args.states {
        // SAFETY: there are `states` weights and pointers.
        unsafe {
            let weight = *args.weights.add(state);
            if weight != 0.0 {
                add((*args.srcs.add(state)).cast::<T>().add(i), weight);
            }
        }
    }
}
