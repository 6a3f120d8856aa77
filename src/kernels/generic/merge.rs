//! The weighted sum of attention outputs.
//!
//! Bound by memory: one FMA an element that is read.

use crate::kernels::MergeArgs;
use crate::kernels::simd::{Memory, Simd};

/// `dst[i] = sum over states of weight * src[i]`, in f32, in the order of the states; a state of weight 0 is not read.
///
/// # Safety
/// Every address that `args` describes is valid; no source overlaps the target.
#[inline(always)]
pub(crate) unsafe fn merge<S: Simd, T: Memory>(s: S, args: &MergeArgs) {
    let mut i = 0;
    while i < args.dim {
        let lanes = (args.dim - i).min(S::LANES);
        let mut sum = s.zero();
        for state in 0..args.states {
            // SAFETY: `states` weights are readable.
            let weight = unsafe { *args.weights.add(state) };
            if weight == 0.0 {
                continue;
            }
            // SAFETY: `states` pointers are readable, and i + lanes elements behind each.
            let v = unsafe {
                let src = (*args.srcs.add(state)).cast::<T>().add(i);
                if lanes == S::LANES { T::load(s, src) } else { T::load_part(s, src, lanes) }
            };
            sum = s.fma(v, s.splat(weight), sum);
        }
        // SAFETY: i + lanes elements are writable.
        unsafe {
            let dst = args.dst.cast::<T>().add(i);
            if lanes == S::LANES { T::store(s, dst, sum) } else { T::store_part(s, dst, sum, lanes) }
        }
        i += lanes;
    }
}
