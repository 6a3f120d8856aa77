//! AVX2 with AVX-VNNI: products of bytes, added up in 32 bits (`vpdpbusd` on 256 bits), which Intel's CPUs without AVX-512 have from the
//! twelfth generation on.
//!
//! A partial level: attention over int8 keys at [`Precision::Integer`](super::api::Precision), with values of any format. Only the
//! scores are of this level; the rest of the kernel is AVX2's. Keys become unsigned as in [`avx512vnni`](super::avx512vnni).
//!
//! Never timed. With `--cfg kvlane_emulate_avxvnni` the instruction is emulated, and the level is available wherever AVX2 is.

use super::avx2::{Avx2, shells};
use super::generic::attention::integer::{ByteProducts, MAX_SCORES};
use super::partial::{integer_kernels, with_features};
use std::arch::x86_64::*;

#[cfg(not(kvlane_emulate_avxvnni))]
integer_kernels!(AvxVnni, AvxVnni, Avx2, Vnni, "attention_int8_integer_avxvnni");
#[cfg(kvlane_emulate_avxvnni)]
integer_kernels!(AvxVnni, Avx2, Avx2, Vnni, "attention_int8_integer_avxvnni");

/// Proof that the CPU has the level.
#[derive(Clone, Copy)]
struct Vnni(Avx2);

/// Bytes of a vector.
const UNITS: usize = 32;

impl ByteProducts for Vnni {
    type Level = Avx2;
    type Units = __m256i;
    type Sums = __m256i;
    const UNITS: usize = UNITS;
    const SCORES: usize = 8;
    const KEY_OFFSET: i32 = 128;

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
        unsafe { _mm256_xor_si256(_mm256_loadu_si256(p.cast()), _mm256_set1_epi8(i8::MIN)) }
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
    #[cfg(not(kvlane_emulate_avxvnni))]
    #[inline(always)]
    fn add(self, sums: __m256i, keys: __m256i, queries: __m256i) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_dpbusd_avx_epi32(sums, keys, queries) }
    }
    #[cfg(kvlane_emulate_avxvnni)]
    #[inline(always)]
    fn add(self, sums: __m256i, keys: __m256i, queries: __m256i) -> __m256i {
        // SAFETY: as above. Even and odd bytes as words, whose products are added in pairs.
        unsafe {
            let even = _mm256_madd_epi16(
                _mm256_and_si256(keys, _mm256_set1_epi16(0xff)),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(queries)),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(keys), _mm256_srai_epi16::<8>(queries));
            _mm256_add_epi32(sums, _mm256_add_epi32(even, odd))
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
