//! Packed copies of queries.

use super::{DotProducts, LANES, LINE, MAX_QUERY_TERMS, QUARTERS, STEP, SUMS, VECTOR, level_functions, with_features};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::Scratch;
use crate::kernels::simd::Simd;
use crate::problem::grid::padded;
use crate::problem::tile::{TILE_ROWS, Tile};
use std::arch::x86_64::*;

/// Pairs of a query, in whole steps.
#[inline(always)]
pub(super) fn pairs_of(d: usize) -> usize {
    d.div_ceil(STEP) * SUMS
}

/// Rows of the next register tile when `left` remain: few tiles, of nearly equal size.
#[inline(always)]
pub(super) fn rows_at_once(left: usize) -> usize {
    match left {
        8 => 4,
        TILE_ROWS.. => TILE_ROWS,
        4..TILE_ROWS => 4,
        2..4 => 2,
        _ => 1,
    }
}

/// The indices of odd words.
static UPPER_WORDS: [i16; LINE] = {
    let mut words = [0; LINE];
    let mut i = 0;
    while i < LINE {
        words[i] = (2 * i + 1) as i16;
        i += 1;
    }
    words
};

/// The bf16 terms of thirty-two elements. Each is the upper half of what the terms before it leave, so that the remainder is exact.
#[inline(always)]
unsafe fn terms(s: Avx512, mut x: [__m512; 2], count: usize) -> [__m512i; MAX_QUERY_TERMS] {
    // SAFETY: `s` proves the features.
    unsafe {
        let upper_words = _mm512_loadu_si512(UPPER_WORDS.as_ptr().cast());
        let mut terms = [_mm512_setzero_si512(); MAX_QUERY_TERMS];
        for term in terms.iter_mut().take(count) {
            let mut upper = [_mm512_setzero_si512(); 2];
            for (upper, x) in upper.iter_mut().zip(x) {
                let bits = _mm512_castps_si512(x);
                // A NaN whose payload is all in the lower half must not become an infinity.
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                let bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x40_0000));
                *upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            }
            *term = _mm512_permutex2var_epi16(upper[0], upper_words, upper[1]);
            for (x, upper) in x.iter_mut().zip(upper) {
                // The remainder of an infinity is 0, and so is that of a NaN, whose first term is NaN already.
                let left = s.sub(*x, _mm512_castsi512_ps(upper));
                let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(left, left);
                *x = _mm512_maskz_mov_ps(number, left);
            }
        }
        terms
    }
}

impl DotProducts {
    /// The terms of thirty-two elements of a row, from `first` on; zeros follow the last.
    ///
    /// # Safety
    /// The row is in `scratch.q`.
    #[inline(always)]
    unsafe fn terms_of(
        &self,
        s: Avx512,
        scratch: &Scratch,
        row: usize,
        first: usize,
        d: usize,
    ) -> [__m512i; MAX_QUERY_TERMS] {
        let dp = padded(d);
        // SAFETY: the caller's; a row has dp floats, whole vectors.
        unsafe {
            let from = scratch.q.add(row * dp + first);
            let high = if first + LANES < dp { s.load_f32(from.add(LANES)) } else { s.zero() };
            terms(s, [s.load_f32(from), high], self.query_terms)
        }
    }

    /// Packs queries for register tiles: `[register tile][pair][term][row]`.
    ///
    /// # Safety
    /// The rows are in `scratch.q`.
    #[inline(always)]
    unsafe fn pack_register_tiles(&self, s: Avx512, rows: usize, scratch: &Scratch, d: usize) {
        let (pairs, terms) = (pairs_of(d), self.query_terms);
        let mut first = 0;
        while first < rows {
            let n = rows_at_once(rows - first);
            let to = self.q.cast::<u32>().wrapping_add(first * pairs * terms);
            for r in 0..n {
                for i in (0..d).step_by(LINE) {
                    // SAFETY: the caller's; there is room for all pairs.
                    unsafe {
                        for (t, term) in self.terms_of(s, scratch, first + r, i, d).iter().enumerate().take(terms) {
                            let mut lanes = [0u32; LANES];
                            _mm512_storeu_si512(lanes.as_mut_ptr().cast(), *term);
                            for (pair, lane) in (i / 2..pairs).zip(lanes) {
                                *to.add((pair * terms + t) * n + r) = lane;
                            }
                        }
                    }
                }
            }
            first += n;
        }
    }

    /// Vectors of the queries of four rows of a head.
    #[inline(always)]
    pub(super) fn quarter_vectors(&self, d: usize) -> usize {
        d.div_ceil(LINE) * (LINE / STEP) * self.query_terms
    }

    /// Packs queries in quarters of vectors: `[head][four rows][step][term][row]`.
    ///
    /// # Safety
    /// The rows are in `scratch.q`.
    #[inline(always)]
    unsafe fn pack_quarters_of_rows(&self, s: Avx512, tile: &Tile, scratch: &Scratch, d: usize) {
        let vectors = self.quarter_vectors(d);
        let groups = tile.head_rows.div_ceil(QUARTERS);
        // SAFETY: the caller's; there are four quarters for every row.
        unsafe {
            std::ptr::write_bytes(self.q, 0, tile.kv_heads * groups * vectors * VECTOR);
            for row in 0..tile.rows() {
                let (head, r) = (row / tile.head_rows, row % tile.head_rows);
                let to =
                    self.q.add((head * groups + r / QUARTERS) * vectors * VECTOR + r % QUARTERS * VECTOR / QUARTERS);
                for i in (0..d).step_by(LINE) {
                    for (t, term) in self.terms_of(s, scratch, row, i, d).iter().enumerate().take(self.query_terms) {
                        let mut steps = [[0u8; VECTOR / QUARTERS]; LINE / STEP];
                        _mm512_storeu_si512(steps.as_mut_ptr().cast(), *term);
                        for (n, step) in steps.iter().enumerate() {
                            let vector = (i / STEP + n) * self.query_terms + t;
                            to.add(vector * VECTOR).cast::<[u8; VECTOR / QUARTERS]>().write(*step);
                        }
                    }
                }
            }
        }
    }
}

impl DotProducts {
    level_functions! {
        /// [`Self::pack_register_tiles`], as a function of its own.
        ///
        /// # Safety
        /// The same.
        #[inline(never)]
        pub(super) unsafe fn pack_rows(&self, s: Avx512, rows: usize, scratch: &Scratch, d: usize) {
            // SAFETY: the caller's.
            unsafe { self.pack_register_tiles(s, rows, scratch, d) }
        }

        /// [`Self::pack_quarters_of_rows`], as a function of its own.
        ///
        /// # Safety
        /// The same.
        #[inline(never)]
        pub(super) unsafe fn pack_quarters(&self, s: Avx512, tile: &Tile, scratch: &Scratch, d: usize) {
            // SAFETY: the caller's.
            unsafe { self.pack_quarters_of_rows(s, tile, scratch, d) }
        }
    }
}
