//! Values of a block as tiles whose rows are pairs of keys.
//!
//! Bound by shuffles on one port, 256 per block at head size 128 (none from packed pairs), and as much by the check for elements that
//! are not finite. The lines of the next block are prefetched in the same loop.

use super::super::tiles::{ROW_BYTES, TILE_BYTES};
use super::direct::parts_of;
use super::scratch::Sizes;
use super::{Call, DEPTH, LANES, PARTS, output_order};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::{KeyPointerTable, KeyPointers, are_pairs, unpack_head};
use crate::kernels::simd::Simd;
use crate::problem::grid::{BLOCK, KeyRange, ones, padded};
use half::bf16;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// The exponent bits of a bf16: all set in infinities and NaN.
const EXPONENT: i16 = 0x7f80;

/// Packs the values of a block's key range into tiles, with zeros for other keys and for elements that are not
/// finite. Returns the keys that have such elements.
///
/// # Safety
/// The key range is inside V.
#[inline(always)]
pub(super) unsafe fn pack_values(
    s: Avx512,
    call: &Call,
    (b, head): (usize, usize),
    key_range: KeyRange,
    v: KeyPointers<bf16>,
) -> u64 {
    let Call { p, natural, sizes: Sizes { dv, .. }, .. } = *call;
    let pairs = natural && are_pairs(p, &v, key_range);
    let mut memory = [const { MaybeUninit::uninit() }; BLOCK];
    let mut unpacked = KeyPointerTable::new(&mut memory);
    let (mut v, mut head) = (v, head);
    // SAFETY: the caller's; the copies have room for 64 keys.
    unsafe {
        if natural && !pairs {
            let block = call.scratch.gather_buffers(b).v;
            unpack_head::<bf16, _>(p, key_range, block, v, head);
            unpacked.place(key_range, block.cast(), padded(dv) * size_of::<bf16>());
            (v, head) = (unpacked.rows(), 0);
        }
        let values = Values { call, v, head, b, pairs, key_range };
        if values.pack::<false>(s) {
            return 0;
        }
        values.pack::<true>(s);
        let step = if pairs { 2 } else { 1 };
        let is_non_finite = |j: &usize| (0..dv).any(|i| !(*v.key(head, *j).add(step * i)).is_finite());
        (key_range.low..key_range.high).filter(is_non_finite).fold(0, |bits, j| bits | 1 << j)
    }
}

/// Up to `n` elements at `from`, zeros otherwise.
///
/// # Safety
/// They are readable.
#[inline(always)]
pub(super) unsafe fn first_elements(_: Avx512, from: *const bf16, n: usize) -> __m512i {
    // SAFETY: the caller's; masked-off lanes are not accessed. The first argument proves the features.
    unsafe { _mm512_maskz_loadu_epi16(ones(n.min(DEPTH)) as u32, from.cast()) }
}

/// The values of a block and KV head, which go to tiles.
struct Values<'a> {
    call: &'a Call<'a>,
    v: KeyPointers<'a, bf16>,
    /// The KV head, among those of the pointers.
    head: usize,
    /// The block of the superblock.
    b: usize,
    /// Every even key of the key range forms a pair of slots with the next one.
    pairs: bool,
    key_range: KeyRange,
}

impl Values<'_> {
    /// Returns whether all elements are finite. With `CLEAN`, replaces those that are not by zeros.
    ///
    /// # Safety
    /// The keys are readable, the tiles writable.
    #[inline(always)]
    unsafe fn pack<const CLEAN: bool>(&self, s: Avx512) -> bool {
        // What is not whole takes a test for each vector.
        let whole = self.key_range.len() == BLOCK && (self.pairs || !self.call.natural);
        // SAFETY: the caller's.
        unsafe {
            match (whole && !CLEAN, self.pairs) {
                (true, false) => self.pack_whole::<false>(s),
                (true, true) => self.pack_whole::<true>(s),
                (false, _) => self.pack_parts::<CLEAN>(s),
            }
        }
    }

    /// The tile and row to which the pairs of keys `j` and `j + 1` go, from element `column` on.
    #[inline(always)]
    fn to(&self, j: usize, column: usize) -> *mut u8 {
        let tile = self.call.value_tile(column / LANES, self.b * PARTS + j / DEPTH);
        self.call.scratch.v.wrapping_add(tile * TILE_BYTES + j % DEPTH / 2 * ROW_BYTES as usize)
    }

    /// [`Self::pack`] of a whole block that lies in rows or, with `PAIRS`, in pairs of rows.
    ///
    /// # Safety
    /// As [`Self::pack`].
    #[inline(always)]
    unsafe fn pack_whole<const PAIRS: bool>(&self, s: Avx512) -> bool {
        let dv = self.call.sizes.dv;
        // SAFETY: the caller's; `s` proves the features.
        unsafe {
            let exponent = _mm512_set1_epi16(EXPONENT);
            let mut largest = [_mm512_setzero_si512(); 2];
            for j in (0..BLOCK).step_by(2) {
                let rows = [self.v.key(self.head, j), self.v.key(self.head, j + 1)];
                for column in (0..dv).step_by(DEPTH) {
                    if !self.call.direct {
                        self.prefetch_next(s, j, column);
                    }
                    let at = if PAIRS {
                        [rows[0].add(2 * column), rows[0].wrapping_add(2 * column + DEPTH)]
                    } else {
                        [rows[0].add(column), rows[1].add(column)]
                    };
                    let left = dv - column;
                    let x = if left >= DEPTH {
                        [_mm512_loadu_si512(at[0].cast()), _mm512_loadu_si512(at[1].cast())]
                    } else if PAIRS {
                        [first_elements(s, at[0], 2 * left), first_elements(s, at[1], (2 * left).saturating_sub(DEPTH))]
                    } else {
                        [first_elements(s, at[0], left), first_elements(s, at[1], left)]
                    };
                    for (x, largest) in x.iter().zip(&mut largest) {
                        *largest = _mm512_max_epu16(*largest, _mm512_and_si512(*x, exponent));
                    }
                    let pairs =
                        if PAIRS { x } else { [_mm512_unpacklo_epi16(x[0], x[1]), _mm512_unpackhi_epi16(x[0], x[1])] };
                    let to = self.to(j, column);
                    _mm512_storeu_si512(to.cast(), pairs[0]);
                    _mm512_storeu_si512(to.add(TILE_BYTES).cast(), pairs[1]);
                }
            }
            _mm512_cmpge_epu16_mask(_mm512_max_epu16(largest[0], largest[1]), exponent) == 0
        }
    }

    /// [`Self::pack`] in all other cases.
    ///
    /// # Safety
    /// As [`Self::pack`].
    #[inline(always)]
    unsafe fn pack_parts<const CLEAN: bool>(&self, s: Avx512) -> bool {
        // SAFETY: the caller's; `s` proves the features.
        unsafe {
            let mut largest = _mm512_setzero_si512();
            let parts = if self.call.direct { parts_of(self.key_range) } else { 0..PARTS };
            for j in (parts.start * DEPTH..parts.end * DEPTH).step_by(2) {
                if j + 2 <= self.key_range.low || j >= self.key_range.high {
                    for column in (0..self.call.sizes.dvp).step_by(LANES) {
                        _mm512_storeu_si512(self.to(j, column).cast(), _mm512_setzero_si512());
                    }
                    continue;
                }
                for column in (0..self.call.sizes.dvp).step_by(DEPTH) {
                    let pair = self.pair::<CLEAN>(s, j, column, &mut largest);
                    for (i, x) in pair.into_iter().enumerate() {
                        _mm512_storeu_si512(self.to(j, column).add(i * TILE_BYTES).cast(), x);
                    }
                }
            }
            _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(EXPONENT)) == 0
        }
    }

    /// Elements `column..column + 32` of keys `j` and `j + 1` as pairs; as [`Self::load`].
    ///
    /// # Safety
    /// As [`Self::pack`].
    #[inline(always)]
    unsafe fn pair<const CLEAN: bool>(
        &self,
        s: Avx512,
        j: usize,
        column: usize,
        largest: &mut __m512i,
    ) -> [__m512i; 2] {
        let left = self.call.sizes.dv - column;
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
            let (first, second) = (_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd));
            if !self.call.natural {
                return [first, second];
            }
            let [first, second] = output_order(s, [_mm512_castsi512_ps(first), _mm512_castsi512_ps(second)]);
            [_mm512_castps_si512(first), _mm512_castps_si512(second)]
        }
    }

    /// Up to `n` elements of a key, zeros otherwise and for keys outside the key range. Without `CLEAN`, raises
    /// `largest` to their exponents.
    ///
    /// # Safety
    /// As [`Self::pack`].
    #[inline(always)]
    unsafe fn load<const CLEAN: bool>(
        &self,
        s: Avx512,
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
            let x = first_elements(s, self.v.key(self.head, key).wrapping_add(first), n);
            if CLEAN {
                let finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
                return _mm512_maskz_mov_epi16(finite, x);
            }
            *largest = _mm512_max_epu16(*largest, _mm512_and_si512(x, exponent));
            x
        }
    }

    /// Prefetches the lines that [`Self::pair`] loads of the next block.
    #[inline(always)]
    fn prefetch_next(&self, s: Avx512, j: usize, column: usize) {
        let prefetch = |row: *const bf16, element: usize| {
            if !row.is_null() {
                s.prefetch_far(row.wrapping_add(element).cast());
            }
        };
        if self.pairs {
            prefetch(self.v.next_pair(j), 2 * column);
            prefetch(self.v.next_pair(j), 2 * column + DEPTH);
        } else {
            prefetch(self.v.next(j), column);
            prefetch(self.v.next(j + 1), column);
        }
    }
}
