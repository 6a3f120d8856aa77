//! Packed copies of keys.

use super::ScoreShape;
use super::row_scores::{KEYS, row_floats};
use crate::kernels::generic::attention::weighted::widen_row;
use crate::kernels::generic::attention::{Block, KeyPointers};
use crate::kernels::simd::{Load, MAX_LANES, Simd, deinterleaved};

/// Transposes keys of a block into slabs as wide as a register tile: `[slab][step][keys]`, steps in the order of [`ScoreShape::place`]. In the
/// vectors at the ends of the block's key range, columns outside of it are undefined. With [`Simd::ROW_SCORES`], widens them to rows of
/// whole vectors instead, up to a whole group of [`KEYS`] at both ends.
#[derive(Clone, Copy)]
pub(crate) struct PackKeys<'a> {
    pub block: &'a Block<'a>,
    pub k: KeyPointers<'a, u8>,
    /// The keys that are packed, of which those of the key range are read. The first begins a slab.
    pub first_key: usize,
    pub end_key: usize,
    pub shape: ScoreShape,
}

impl PackKeys<'_> {
    /// Packs keys of type `T`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(self, s: S) {
        let Block { key_range, d, .. } = *self.block;
        if const { S::ROW_SCORES } {
            // SAFETY: the caller's.
            unsafe { self.rows::<S, T>(s) };
            return;
        }
        let pairs = d / (2 * S::LANES);
        let first = key_range.low.max(self.first_key) / S::LANES * S::LANES;
        for group in (first..key_range.high.min(self.end_key)).step_by(S::LANES) {
            // SAFETY: the caller's; a step loads elements inside the key.
            unsafe {
                for pair in 0..pairs {
                    if const { deinterleaved::<S, T>() } {
                        self.transpose::<S, T, EVEN>(s, group, 2 * pair);
                        self.transpose::<S, T, ODD>(s, group, 2 * pair + 1);
                    } else {
                        self.transpose::<S, T, WHOLE>(s, group, 2 * pair);
                        self.transpose::<S, T, WHOLE>(s, group, 2 * pair + 1);
                    }
                }
                for step in 2 * pairs..d.div_ceil(S::LANES) {
                    if d - step * S::LANES >= S::LANES {
                        self.transpose::<S, T, WHOLE>(s, group, step);
                    } else {
                        self.transpose::<S, T, PART>(s, group, step);
                    }
                }
            }
        }
    }
}

/// The elements of a key in a step: `LANES` consecutive ones, the even or the odd ones of a pair of vectors, or the tail.
pub const WHOLE: u8 = 0;
pub const EVEN: u8 = 1;
pub const ODD: u8 = 2;
pub const PART: u8 = 3;

impl PackKeys<'_> {
    /// Keys as rows.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    unsafe fn rows<S: Simd, T: Load>(&self, s: S) {
        let Self { block: &Block { scratch, key_range, d, .. }, k, first_key, end_key, .. } = *self;
        let first = key_range.low.max(first_key) / KEYS * KEYS;
        let end = key_range.high.min(end_key).next_multiple_of(KEYS);
        for j in first..end {
            let from = k.key(0, j.clamp(key_range.low, key_range.high - 1)).cast::<T>();
            let to = scratch.kt.wrapping_add((j - first_key) * row_floats::<S>(d));
            // SAFETY: the caller's; kt has BLOCK rows of padded(d) floats.
            unsafe { widen_row(s, from, to, d) };
        }
    }

    /// One step of `LANES` keys from `group` on.
    ///
    /// # Safety
    /// As [`block`]; the step has elements of this kind.
    #[inline(always)]
    pub unsafe fn transpose<S: Simd, T: Load, const KIND: u8>(&self, s: S, group: usize, step: usize) {
        let Block { scratch, key_range, d, .. } = *self.block;
        let (steps, slab) = (d.div_ceil(S::LANES), self.shape.vectors * S::LANES);
        let (first, inside) = ((group - self.first_key) / slab * slab, (group - self.first_key) % slab);
        let kt = scratch.kt.wrapping_add(first * steps * S::LANES + inside);
        let mut v = [s.zero(); MAX_LANES];
        // Vectors inside the key range need no clamping. Unrolled, so that everything stays in registers.
        let whole = group >= key_range.low && group + S::LANES <= key_range.high;
        macro_rules! unrolled {
            ($($lane:literal)*) => {$(
                if $lane < S::LANES {
                    let key = group + $lane;
                    let key = if whole { key } else { key.clamp(key_range.low, key_range.high - 1) };
                    let key = self.k.key(0, key).cast::<T>();
                    // SAFETY: the caller's.
                    v[$lane] = unsafe {
                        match KIND {
                            EVEN => T::load_pair(s, key.add(step * S::LANES))[0],
                            ODD => T::load_pair(s, key.add((step - 1) * S::LANES))[1],
                            PART => T::load_part(s, key.add(step * S::LANES), d - step * S::LANES),
                            _ => T::load(s, key.add(step * S::LANES)),
                        }
                    };
                }
            )*
            s.transpose(&mut v);
            $(
                if $lane < S::LANES {
                    // SAFETY: kt has steps * LANES rows a slab.
                    unsafe { s.store_f32(kt.add(self.shape.place($lane, step, steps) * slab), v[S::lane_order($lane)]) };
                }
            )*};
        }
        unrolled!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    }
}
