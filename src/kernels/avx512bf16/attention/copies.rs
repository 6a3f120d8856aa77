//! Packed copies of keys and values.

use super::{BLOCK, DotProducts, LANES, LINE, VECTOR};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::{Block, KeyPointers, NEAR_DISTANCE};
use crate::kernels::simd::{MAX_LANES, Simd, lines};
use crate::problem::grid::{KeyRange, ones};
use crate::problem::limits::MAX_HEAD_DIM;
use half::bf16;
use std::arch::x86_64::*;

/// Exponent bits of a bf16; all are set in NaN and infinity.
const EXPONENT: i16 = 0x7f80;

/// The value of a key that is not to be read.
pub(super) static ZEROS: [bf16; MAX_HEAD_DIM] = [bf16::ZERO; MAX_HEAD_DIM];

/// Prefetches a key or a value; does nothing for null.
#[inline(always)]
pub(super) fn prefetch_row(s: Avx512, row: *const bf16, dim: usize) {
    if !row.is_null() {
        for line in lines(row.cast(), dim * size_of::<bf16>()) {
            s.prefetch_far(line);
        }
    }
}

/// Prefetches, for a key or value that is read in the order of memory, so many bytes ahead of it into the second-level cache, and
/// nearer into the first. Does nothing for 0.
#[inline(always)]
pub(super) fn prefetch_run(s: Avx512, row: *const bf16, distance: isize, dim: usize) {
    if distance != 0 {
        for line in lines(row.cast(), dim * size_of::<bf16>()) {
            s.prefetch_far(line.wrapping_offset(distance));
            s.prefetch(line.wrapping_add(NEAR_DISTANCE));
        }
    }
}

/// Up to thirty-two elements, followed by zeros.
///
/// # Safety
/// `n` elements, of at most a vector, are readable.
#[inline(always)]
pub(super) unsafe fn load_up_to(_: Avx512, from: *const bf16, n: usize) -> __m512i {
    // SAFETY: the caller's; masked-off elements are not accessed.
    unsafe { _mm512_maskz_loadu_epi16(ones(n.min(LINE)) as u32, from.cast()) }
}

/// Thirty-two elements of two values as pairs, in order.
#[inline(always)]
pub(super) fn interleave(_: Avx512, even: __m512i, odd: __m512i) -> [__m512i; 2] {
    const fn words(first: usize) -> [i16; LINE] {
        let mut words = [0; LINE];
        let mut i = 0;
        while i < LINE {
            words[i] = (first + i / 2 + i % 2 * LINE) as i16;
            i += 1;
        }
        words
    }
    static LOW: [i16; LINE] = words(0);
    static HIGH: [i16; LINE] = words(LINE / 2);
    // SAFETY: the level includes AVX-512 BW.
    unsafe {
        let (low, high) = (_mm512_loadu_si512(LOW.as_ptr().cast()), _mm512_loadu_si512(HIGH.as_ptr().cast()));
        [_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)]
    }
}

impl DotProducts {
    /// Transposes keys: `[sixteen keys][pair][key]`. A neighbour stands in for keys outside the key range.
    ///
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block).
    #[inline(always)]
    pub(super) unsafe fn pack_keys(&self, s: Avx512, block: &Block, k: KeyPointers<bf16>) {
        let KeyRange { low, high } = block.key_range;
        let d = block.d;
        let vectors = d.div_ceil(LINE) * LANES;
        for first in (low / LANES * LANES..high).step_by(LANES) {
            let to = self.k.wrapping_add(first / LANES * vectors * VECTOR);
            let mut keys = [std::ptr::null::<bf16>(); LANES];
            for (i, key) in keys.iter_mut().enumerate() {
                let j = (first + i).clamp(low, high - 1);
                *key = k.key(0, j);
                prefetch_row(s, k.next(j), d);
            }
            for i in (0..d).step_by(LINE) {
                // SAFETY: the caller's; a copy has room for whole vectors of pairs.
                unsafe {
                    let mut x = [s.zero(); MAX_LANES];
                    if d - i >= LINE {
                        for (x, key) in x.iter_mut().zip(keys) {
                            *x = _mm512_castsi512_ps(_mm512_loadu_si512(key.add(i).cast()));
                        }
                    } else {
                        for (x, key) in x.iter_mut().zip(keys) {
                            *x = _mm512_castsi512_ps(load_up_to(s, key.add(i), d - i));
                        }
                    }
                    s.transpose(&mut x);
                    for (n, x) in x.into_iter().enumerate() {
                        s.store_f32(to.add((i / 2 + n) * VECTOR).cast(), x);
                    }
                }
            }
        }
    }

    /// The vectors of values before the slab of vector `vector`, and the vectors of that slab.
    #[inline(always)]
    pub(super) fn slab_of(&self, vector: usize) -> (usize, usize) {
        let first = vector / 4 * 4;
        (first, (self.dvp / LANES - first).min(4))
    }

    /// Interleaves the values of pairs of keys: `[slab of up to four vectors][pair of keys][column]`, with zeros for keys that are
    /// not in `visible_bits`. Returns whether the elements of the others are finite.
    ///
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block); `visible_bits` are in the key range.
    #[inline(always)]
    pub(super) unsafe fn pack_values(
        &self,
        s: Avx512,
        block: &Block,
        v: KeyPointers<bf16>,
        head: usize,
        visible_bits: u64,
    ) -> bool {
        let KeyRange { low, high } = block.key_range;
        let dv = block.dv;
        // SAFETY: the caller's.
        unsafe {
            let exponent = _mm512_set1_epi16(EXPONENT);
            let mut largest = _mm512_setzero_si512();
            for pair in low / 2..high.div_ceil(2) {
                let mut values = [ZEROS.as_ptr(); 2];
                for (i, value) in values.iter_mut().enumerate() {
                    let j = 2 * pair + i;
                    if visible_bits >> j & 1 == 1 {
                        *value = v.key(head, j);
                        if head == 0 {
                            prefetch_row(s, v.next(j), dv);
                        }
                    }
                }
                for i in (0..dv).step_by(LINE) {
                    let (even, odd) = (values[0].add(i), values[1].add(i));
                    let (even, odd) = if dv - i >= LINE {
                        (_mm512_loadu_si512(even.cast()), _mm512_loadu_si512(odd.cast()))
                    } else {
                        (load_up_to(s, even, dv - i), load_up_to(s, odd, dv - i))
                    };
                    largest = _mm512_max_epu16(largest, _mm512_and_si512(even, exponent));
                    largest = _mm512_max_epu16(largest, _mm512_and_si512(odd, exponent));
                    for (n, x) in interleave(s, even, odd).into_iter().enumerate() {
                        let vector = i / LANES + n;
                        if vector * LANES < dv {
                            let (first, width) = self.slab_of(vector);
                            let at = first * (BLOCK / 2) + pair * width + vector - first;
                            _mm512_storeu_si512(self.v.add(at * VECTOR).cast(), x);
                        }
                    }
                }
            }
            _mm512_cmpge_epu16_mask(largest, exponent) == 0
        }
    }
}
