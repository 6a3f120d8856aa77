//! Dot products of packed query rows with packed keys.

use crate::kernels::simd::{MAX_LANES, Outlined, Simd};
use crate::problem::grid::BLOCK;
use std::mem::MaybeUninit;

/// `R` packed rows of Q times a slab of keys, or times the half of it that begins at `kt`; rows of scores lie [`BLOCK`] apart.
///
/// A slab of more than [`SLAB_BYTES`](super::SLAB_BYTES) is processed in two halves of the lanes: the first stores the sum over its
/// lanes, the second adds its own, which is the last level of the tree.
pub struct Scores<const R: usize> {
    pub q: *const f32,
    /// Lanes, a power of two, and steps per lane.
    pub lanes: usize,
    pub steps: usize,
    pub kt: *const f32,
    pub out: *mut f32,
    pub wide: bool,
    pub add: bool,
}

impl<const R: usize> Outlined for Scores<R> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            match (S::TILE_VECTORS, self.wide) {
                (4, true) => self.tile::<S, 4>(s),
                (4, false) | (2, true) => self.tile::<S, 2>(s),
                _ => self.tile::<S, 1>(s),
            }
        }
    }
}

impl<const R: usize> Scores<R> {
    /// # Safety
    /// The pointers are valid for `R` rows and `N` vectors.
    #[inline(always)]
    pub unsafe fn tile<S: Simd, const N: usize>(self, s: S) {
        let Self { mut q, lanes, steps, mut kt, out, add, .. } = self;
        let slab = S::TILE_VECTORS * S::LANES;
        // stash[k]: the finished sum of 2^k lanes, until its neighbour is ready.
        let mut stash = [const { MaybeUninit::<[[S::V; N]; R]>::uninit() }; MAX_LANES.ilog2() as usize];
        for lane in 0..lanes {
            let mut acc = [[s.zero(); N]; R];
            // Two steps per iteration, and moving pointers: fewer instructions other than FMAs.
            // SAFETY: kt and Q have LANES * steps steps.
            unsafe {
                for _ in 0..steps / 2 {
                    add_step(s, kt, q, &mut acc);
                    add_step(s, kt.add(slab), q.add(R), &mut acc);
                    (kt, q) = (kt.wrapping_add(2 * slab), q.wrapping_add(2 * R));
                }
                if steps % 2 == 1 {
                    add_step(s, kt, q, &mut acc);
                    (kt, q) = (kt.wrapping_add(slab), q.wrapping_add(R));
                }
            }
            let mut level = 0;
            while (lane >> level) & 1 == 1 {
                // SAFETY: the bit says that a sum of 2^level lanes has been left there.
                let left = unsafe { stash[level].assume_init_ref() };
                for r in 0..R {
                    for n in 0..N {
                        acc[r][n] = s.add(left[r][n], acc[r][n]);
                    }
                }
                level += 1;
            }
            if lane + 1 < lanes {
                stash[level].write(acc);
                continue;
            }
            for r in 0..R {
                for n in 0..N {
                    // SAFETY: out has R rows of BLOCK.
                    unsafe {
                        let to = out.add(r * BLOCK + n * S::LANES);
                        let sum = if add { s.add(s.load_f32(to), acc[r][n]) } else { acc[r][n] };
                        s.store_f32(to, sum);
                    }
                }
            }
        }
    }
}

/// One step: an element of `R` rows of Q times `N` vectors of keys.
///
/// # Safety
/// `N` vectors are readable at `k`, `R` floats at `q`.
#[inline(always)]
pub unsafe fn add_step<S: Simd, const R: usize, const N: usize>(
    s: S,
    k: *const f32,
    q: *const f32,
    acc: &mut [[S::V; N]; R],
) {
    let mut keys = [s.zero(); N];
    for n in 0..N {
        // SAFETY: the caller's.
        keys[n] = unsafe { s.load_f32(k.add(n * S::LANES)) };
    }
    for r in 0..R {
        // SAFETY: the caller's.
        let x = s.splat(unsafe { *q.add(r) });
        for n in 0..N {
            acc[r][n] = s.fma(x, keys[n], acc[r][n]);
        }
    }
}
