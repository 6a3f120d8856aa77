//! AVX-512 with VNNI: products of bytes, added up in 32 bits (`vpdpbusd`).
//!
//! A partial level: attention over int8 keys at [`Precision::Integer`](super::api::Precision), with values of any format. Only the
//! scores are of this level; the rest of the kernel is AVX-512's.
//!
//! The instruction multiplies unsigned bytes by signed ones. Keys become unsigned when their highest bit is turned, which adds 128 to
//! each; the sum of a query's units, times 128, is taken from its scores. (Intel 64 and IA-32 Architectures Software Developer's Manual,
//! volume 2, VPDPBUSD.)

use super::avx512::{Avx512, shells};
use super::generic::attention::integer::{ByteProducts, MAX_SCORES};
use super::partial::{integer_kernels, with_features};
use std::arch::x86_64::*;

integer_kernels!(Avx512Vnni, Avx512Vnni, Avx512, Vnni, "attention_int8_integer_avx512vnni");

/// Proof that the CPU has the level.
#[derive(Clone, Copy)]
struct Vnni(Avx512);

impl ByteProducts for Vnni {
    type Level = Avx512;
    type Units = __m512i;
    type Sums = __m512i;
    const UNITS: usize = 64;
    const SCORES: usize = 16;
    const KEY_OFFSET: i32 = 128;

    #[inline(always)]
    fn level(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    fn zero(self) -> __m512i {
        // SAFETY: the level is available, here and below.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn keys(self, p: *const i8) -> __m512i {
        // SAFETY: the caller's, here and below.
        unsafe { _mm512_xor_si512(_mm512_loadu_si512(p.cast()), _mm512_set1_epi8(i8::MIN)) }
    }
    #[inline(always)]
    unsafe fn keys_part(self, p: *const i8, n: usize) -> __m512i {
        // SAFETY: as above; masked bytes are not read.
        unsafe { _mm512_xor_si512(_mm512_maskz_loadu_epi8(first(n), p), _mm512_set1_epi8(i8::MIN)) }
    }
    #[inline(always)]
    unsafe fn queries(self, p: *const i8) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn queries_part(self, p: *const i8, n: usize) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_maskz_loadu_epi8(first(n), p) }
    }
    #[inline(always)]
    fn add(self, sums: __m512i, keys: __m512i, queries: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sums, keys, queries) }
    }
    #[inline(always)]
    fn totals(self, v: &[__m512i; MAX_SCORES]) -> [i32; MAX_SCORES] {
        // SAFETY: as above; vectors of the same size, for which every pattern is a value.
        unsafe {
            let quarters = [four(v[0], v[1], v[2], v[3]), four(v[4], v[5], v[6], v[7])];
            let low = blocks(quarters[0], quarters[1]);
            let quarters = [four(v[8], v[9], v[10], v[11]), four(v[12], v[13], v[14], v[15])];
            let high = blocks(quarters[0], quarters[1]);
            // The even and the odd blocks of both.
            let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(low, high), _mm512_shuffle_i32x4::<0xdd>(low, high));
            std::mem::transmute(_mm512_add_epi32(even, odd))
        }
    }
}

/// The first `n < 64` bytes.
#[inline(always)]
fn first(n: usize) -> u64 {
    (1 << n) - 1
}

/// In each block of four lanes, the sum of this block of each of four vectors.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn four(a: __m512i, b: __m512i, c: __m512i, d: __m512i) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
    }
}

/// Two blocks for each of two vectors, whose sums are those of all four blocks.
///
/// # Safety
/// The level is available.
#[inline(always)]
unsafe fn blocks(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_add_epi32(_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xee>(a, b)) }
}
