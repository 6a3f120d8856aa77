//! Values of a block, transposed into tiles.
//!
//! Bound by shuffles on one port: 1300 per block at head size 128 (1000 from packed pairs), once for all rows of the
//! tile. That is some 15 % of a block's time at 256 rows. The lines of the next block are prefetched in the same loop.

use super::super::tiles::{ROW_BYTES, TILE_BYTES};
use super::scratch::Sizes;
use super::{Call, DEPTH, LANES};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::{KeyPointerTable, KeyPointers, are_pairs, unpack_pairs};
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::layout::Packing;
use crate::problem::grid::{BLOCK, KeyRange, ones};
use half::bf16;
use std::arch::x86_64::*;

/// The exponent bits of a bf16: all set in infinities and NaN.
const EXPONENT: i16 = 0x7f80;

/// Transposes the values of a block's key range into tiles, with zeros for other keys and for elements that are not
/// finite. Returns the keys that have such elements.
///
/// The transpose starts by making pairs of rows; row pairs of the cache that match the key range skip this step.
///
/// # Safety
/// The key range is inside V.
#[inline(always)]
pub(super) unsafe fn pack_values(
    s: Avx512,
    call: &Call,
    b: usize,
    key_range: KeyRange,
    k: KeyPointers<bf16>,
    v: &mut KeyPointerTable<bf16>,
) -> u64 {
    let Call { p, sizes: Sizes { dv, dvp, .. }, .. } = *call;
    let packed = p.v_packing == Packing::RowPairs;
    let pairs = packed && are_pairs(p, &v.rows(), key_range);
    // SAFETY: the caller's; the copies have room for 64 keys.
    unsafe {
        if packed && !pairs {
            unpack_pairs::<bf16, _>(p, key_range, call.scratch.gather_buffers.v, v);
        }
        let v = v.rows();
        let to = call.scratch.v.add(b * BLOCK * dvp * size_of::<bf16>());
        let values = Values { v, pairs, key_range, dv, dvp, to, k };
        if values.transpose::<false>(s) {
            return 0;
        }
        values.transpose::<true>(s);
        let step = if pairs { 2 } else { 1 };
        let is_non_finite = |j: &usize| (0..dv).any(|i| !(*v.key(0, *j).add(step * i)).is_finite());
        (key_range.low..key_range.high).filter(is_non_finite).fold(0, |bits, j| bits | 1 << j)
    }
}

/// The values of a block, and the tiles to which they are transposed.
struct Values<'a> {
    v: KeyPointers<'a, bf16>,
    /// Every even key of the key range forms a pair of slots with the next one.
    pairs: bool,
    key_range: KeyRange,
    dv: usize,
    dvp: usize,
    to: *mut u8,
    /// The keys, whose next block is prefetched together with that of the values.
    k: KeyPointers<'a, bf16>,
}

impl Values<'_> {
    /// Returns whether all elements are finite. With `CLEAN`, replaces those that are not by zeros.
    ///
    /// # Safety
    /// The keys are readable, the tiles writable.
    #[inline(always)]
    unsafe fn transpose<const CLEAN: bool>(&self, s: Avx512) -> bool {
        // SAFETY: the caller's; `s` proves the features.
        unsafe {
            let mut largest = _mm512_setzero_si512();
            for half in 0..2 {
                let tiles = self.to.wrapping_add(half * (self.dvp / LANES) * TILE_BYTES);
                for column in (0..self.dvp).step_by(DEPTH) {
                    let mut x = [[s.zero(); MAX_LANES]; 2];
                    for pair in 0..LANES {
                        let j = half * DEPTH + 2 * pair;
                        self.prefetch_next(s, j, column);
                        let [first, second] = self.pair::<CLEAN>(s, j, column, &mut largest);
                        (x[0][pair], x[1][pair]) = (_mm512_castsi512_ps(first), _mm512_castsi512_ps(second));
                    }
                    for (part, x) in x.iter_mut().enumerate() {
                        s.transpose(x);
                        for (i, x) in x.iter().enumerate() {
                            // Rows are unpacked within each quarter: elements 0 to 3 of both keys, and 4 to 7.
                            let element =
                                column + if self.pairs { part * LANES + i } else { i / 4 * 8 + part * 4 + i % 4 };
                            if element < self.dvp {
                                let at = element / LANES * TILE_BYTES + element % LANES * ROW_BYTES as usize;
                                s.store_f32(tiles.add(at).cast(), *x);
                            }
                        }
                    }
                }
            }
            _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(EXPONENT)) == 0
        }
    }

    /// Elements `column..column + 32` of keys `j` and `j + 1` as pairs; as [`Self::load`].
    ///
    /// # Safety
    /// As [`Self::transpose`].
    #[inline(always)]
    unsafe fn pair<const CLEAN: bool>(
        &self,
        s: Avx512,
        j: usize,
        column: usize,
        largest: &mut __m512i,
    ) -> [__m512i; 2] {
        let left = self.dv - column;
        // SAFETY: the caller's.
        unsafe {
            if self.pairs {
                let second = (2 * left).saturating_sub(DEPTH);
                return [
                    self.load::<CLEAN>(s, j, 2 * column, 2 * left, largest),
                    self.load::<CLEAN>(s, j, 2 * column + DEPTH, second, largest),
                ];
            }
            let even = self.load::<CLEAN>(s, j, column, left, largest);
            let odd = self.load::<CLEAN>(s, j + 1, column, left, largest);
            [_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)]
        }
    }

    /// Up to `n` elements of a key, zeros otherwise and for keys outside the key range. Without `CLEAN`, raises
    /// `largest` to their exponents.
    ///
    /// # Safety
    /// As [`Self::transpose`].
    #[inline(always)]
    unsafe fn load<const CLEAN: bool>(
        &self,
        _: Avx512,
        key: usize,
        first: usize,
        n: usize,
        largest: &mut __m512i,
    ) -> __m512i {
        // SAFETY: the caller's; masked-off lanes are not accessed.
        unsafe {
            if key < self.key_range.low || key >= self.key_range.high {
                return _mm512_setzero_si512();
            }
            let exponent = _mm512_set1_epi16(EXPONENT);
            let from = self.v.key(0, key).wrapping_add(first);
            let x = _mm512_maskz_loadu_epi16(ones(n.min(DEPTH)) as u32, from.cast());
            if CLEAN {
                let finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
                return _mm512_maskz_mov_epi16(finite, x);
            }
            *largest = _mm512_max_epu16(*largest, _mm512_and_si512(x, exponent));
            x
        }
    }

    /// Prefetches the lines that [`Self::pair`] loads of the next block, and those of its keys.
    #[inline(always)]
    fn prefetch_next(&self, s: Avx512, j: usize, column: usize) {
        let prefetch = |row: *const bf16, element: usize| {
            if !row.is_null() {
                s.prefetch_far(row.wrapping_add(element).cast());
            }
        };
        for j in [j, j + 1] {
            prefetch(self.k.next(j), column);
        }
        if self.pairs {
            prefetch(self.v.next_pair(j), 2 * column);
            prefetch(self.v.next_pair(j), 2 * column + DEPTH);
        } else {
            for j in [j, j + 1] {
                prefetch(self.v.next(j), column);
            }
        }
    }
}
