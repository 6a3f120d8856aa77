//! Products of bytes on vectors of 256 bits: the kernels of [`Precision::Integer`](crate::Precision::Integer) at AVX2, and what those of
//! [`avxvnni`](crate::kernels::avxvnni) are made of.
//!
//! AVX-VNNI multiplies unsigned by signed bytes and adds four products in 32 bits (`vpdpbusd`). AVX2 adds two in 16 bits (`vpmaddubsw`), at
//! most 32767, and pairs of those in 32 (`vpmaddwd`). Magnitudes of keys times queries with the signs of keys stay below that, also for a key
//! of -128. Numbers of four and five bits need no signs, and those of four words are added before they become 32 bits wide.
//!
//! # What bounds it
//! Arithmetic. Per 32 elements of a key, and for each row, formats of four and five bits take 2.25 operations, iq4_nl four, where f32 takes
//! four FMAs, and they save the 18 that make floats of them. Bytes would take four as well, and save 8: with int8 and q8_0, decode was 1.0
//! to 1.25 times as fast as at the default precision, prompts 0.66 to 0.87 times, and they have no kernels here.

use super::{Avx2, shells};
use crate::kernels::generic::attention::integer::{ByteProducts, MAX_SCORES};
use crate::kernels::generic::attention::integer_blocks::{BlockProducts, BlockUnits, IntegerUnit, WORDS};
use crate::kernels::generic::blocks::{Iq4Nl, Q4_0, Q4_1, Q5_0, Q5_1, VALUES};
use crate::kernels::partial::{integer_block_kernels, integer_entry, with_features};
use crate::kernels::registry::Entry;
use std::arch::x86_64::*;

integer_block_kernels!(Avx2, Avx2, Bytes::<false>, floats);

pub(crate) static ENTRIES: &[Entry] = &[
    integer_entry!(Avx2 Q4_0 "attention_q4_0_integer_avx2" 1e-5 block_functions::<Q4_0>()),
    integer_entry!(Avx2 Q4_1 "attention_q4_1_integer_avx2" 1e-5 block_functions::<Q4_1>()),
    integer_entry!(Avx2 Q5_0 "attention_q5_0_integer_avx2" 1e-5 block_functions::<Q5_0>()),
    integer_entry!(Avx2 Q5_1 "attention_q5_1_integer_avx2" 1e-5 block_functions::<Q5_1>()),
    integer_entry!(Avx2 Iq4Nl "attention_iq4_nl_integer_avx2" 1e-5 block_functions::<Iq4Nl>()),
];

/// Proof that the CPU has AVX2, and with `VNNI` AVX-VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<const VNNI: bool>(pub Avx2);

/// Bytes of a vector.
const UNITS: usize = 32;

impl<const VNNI: bool> ByteProducts for Bytes<VNNI> {
    type Level = Avx2;
    type Units = __m256i;
    type Sums = __m256i;
    const UNITS: usize = UNITS;
    const SCORES: usize = 8;
    // Without VNNI, the signs of keys go to queries.
    const KEY_OFFSET: i32 = if VNNI { 128 } else { 0 };

    #[inline(always)]
    fn level(self) -> Avx2 {
        self.0
    }
    #[inline(always)]
    fn zero(self) -> __m256i {
        // SAFETY: the level is available, here and below.
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn keys(self, p: *const i8) -> __m256i {
        // SAFETY: the caller's, here and below.
        self.signed(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn keys_part(self, p: *const i8, n: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { self.keys(copy(p, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn queries(self, p: *const i8) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn queries_part(self, p: *const i8, n: usize) -> __m256i {
        // SAFETY: as above.
        unsafe { self.queries(copy(p, n).as_ptr()) }
    }
    #[inline(always)]
    fn add(self, sums: __m256i, keys: __m256i, queries: __m256i) -> __m256i {
        // SAFETY: as above. The largest pair of products is 128 * 127 * 2, which 16 bits hold.
        unsafe {
            if VNNI {
                return dpbusd(sums, keys, queries);
            }
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(keys), _mm256_sign_epi8(queries, keys));
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    fn totals(self, v: &[__m256i; MAX_SCORES]) -> [i32; MAX_SCORES] {
        let mut totals = [0; MAX_SCORES];
        // SAFETY: as above; eight numbers are stored.
        unsafe {
            let (low, high) = (four(v[0], v[1], v[2], v[3]), four(v[4], v[5], v[6], v[7]));
            let halves = [_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high)];
            _mm256_storeu_si256(totals.as_mut_ptr().cast(), _mm256_add_epi32(halves[0], halves[1]));
        }
        totals
    }
}

impl<const VNNI: bool> BlockUnits for Bytes<VNNI> {
    #[inline(always)]
    fn low_nibbles(self, x: __m256i) -> __m256i {
        // SAFETY: the level is available, here and below.
        unsafe { _mm256_and_si256(x, _mm256_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high_nibbles(self, x: __m256i) -> __m256i {
        // SAFETY: as above.
        self.low_nibbles(unsafe { _mm256_srli_epi16::<4>(x) })
    }
    #[inline(always)]
    fn signed(self, x: __m256i) -> __m256i {
        // SAFETY: as above.
        if VNNI { unsafe { _mm256_xor_si256(x, _mm256_set1_epi8(i8::MIN)) } } else { x }
    }
    #[inline(always)]
    fn listed(self, x: __m256i) -> __m256i {
        // SAFETY: as above; the table has 16 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(VALUES.as_ptr().cast()));
            _mm256_shuffle_epi8(self.signed(table), x)
        }
    }
    #[inline(always)]
    fn with_fifth_bits(self, x: __m256i, bits: u64) -> __m256i {
        self.0.with_fifth_bits(x, bits as u32)
    }
    #[inline(always)]
    fn ones(self) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi8(1) }
    }
    #[inline(always)]
    fn times(self, x: __m256i, factor: i32) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_mullo_epi32(x, _mm256_set1_epi32(factor)) }
    }
}

impl<const VNNI: bool> BlockProducts for Bytes<VNNI> {
    const GROUPS: usize = 1;
    const ADDS_NUMBERS: bool = !VNNI;

    #[inline(always)]
    unsafe fn add_numbers(self, sums: __m256i, keys: &[__m256i; WORDS], queries: [*const i8; WORDS]) -> __m256i {
        // SAFETY: the caller's; the largest sum is of eight products of 31 and 127, which 16 bits hold.
        unsafe {
            let mut pairs = _mm256_maddubs_epi16(keys[0], self.queries(queries[0]));
            for i in 1..WORDS {
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(keys[i], self.queries(queries[i])));
            }
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    unsafe fn bytes_of<U: IntegerUnit>(self, p: *const u8, n: usize) -> [__m256i; 2] {
        let p = p.wrapping_add(U::STARTS[0]);
        // SAFETY: the caller's.
        unsafe {
            let first = _mm256_loadu_si256(p.cast());
            let second = if n < 2 { first } else { _mm256_loadu_si256(p.add(size_of::<U>()).cast()) };
            [_mm256_permute2x128_si256::<0x20>(first, second), _mm256_permute2x128_si256::<0x31>(first, second)]
        }
    }
    #[inline(always)]
    unsafe fn nibbles_of<U: IntegerUnit>(self, p: *const u8, n: usize) -> __m256i {
        let p = p.wrapping_add(U::STARTS[0]);
        // SAFETY: the caller's.
        unsafe {
            let first = _mm_loadu_si128(p.cast());
            if n < 2 {
                return _mm256_zextsi128_si256(first);
            }
            _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(first), _mm_loadu_si128(p.add(size_of::<U>()).cast()))
        }
    }
    #[inline(always)]
    fn transposed(self, [a, b, c, d]: [__m256i; 4]) -> [__m256i; 4] {
        // SAFETY: the level is available, here and below.
        unsafe {
            let low = [_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d)];
            let high = [_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d)];
            [
                _mm256_unpacklo_epi64(low[0], low[1]),
                _mm256_unpackhi_epi64(low[0], low[1]),
                _mm256_unpacklo_epi64(high[0], high[1]),
                _mm256_unpackhi_epi64(high[0], high[1]),
            ]
        }
    }
    #[inline(always)]
    fn float(self, x: __m256i) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn over_blocks(self, [x, _]: [[__m256; 4]; 2], factors: [f32; 4]) -> [[[f32; 4]; 2]; 4] {
        let mut sums = [[[0.0; 4]; 2]; 4];
        for r in 0..4 {
            // SAFETY: as above; four numbers are stored.
            unsafe {
                let sum = _mm_add_ps(_mm256_castps256_ps128(x[r]), _mm256_extractf128_ps::<1>(x[r]));
                _mm_storeu_ps(sums[r][0].as_mut_ptr(), _mm_mul_ps(sum, _mm_set1_ps(factors[r])));
            }
        }
        sums
    }
}

/// `n < UNITS` bytes, and zeros.
///
/// # Safety
/// `n` bytes are readable.
#[inline(always)]
unsafe fn copy(p: *const i8, n: usize) -> [i8; UNITS] {
    let mut bytes = [0; UNITS];
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n) };
    bytes
}

/// In each half, the sum of this half of each of four vectors.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn four(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d)) }
}

/// Adds the products of four unsigned with four signed bytes to each sum.
///
/// # Safety
/// The CPU has AVX-VNNI.
#[inline(always)]
unsafe fn dpbusd(sums: __m256i, keys: __m256i, queries: __m256i) -> __m256i {
    // SAFETY: the caller's. When emulated: even and odd bytes as words, whose products are added in pairs.
    unsafe {
        #[cfg(not(kvlane_emulate_avxvnni))]
        return _mm256_dpbusd_avx_epi32(sums, keys, queries);
        #[cfg(kvlane_emulate_avxvnni)]
        {
            let even = _mm256_madd_epi16(
                _mm256_and_si256(keys, _mm256_set1_epi16(0xff)),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(queries)),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(keys), _mm256_srai_epi16::<8>(queries));
            _mm256_add_epi32(sums, _mm256_add_epi32(even, odd))
        }
    }
}
