//! AVX-512 with VNNI: products of bytes (`vpdpbusd`) and of words (`vpdpwssd`), added up in 32 bits.
//!
//! A partial level: attention over keys in int8 and in blocks at [`Precision::Integer`](super::api::Precision), with values of any format.
//! Only the scores, and the weighted values in these formats, are of this level; the rest of the kernel is AVX-512's.
//!
//! The instruction multiplies unsigned bytes by signed ones. Keys become unsigned when their highest bit is turned, which adds 128 to
//! each; the sum of a query's units, times 128, is taken from its scores. (Intel 64 and IA-32 Architectures Software Developer's Manual,
//! volume 2, VPDPBUSD.)

use super::avx512::{Avx512, shells};
use super::generic::attention::integer::{ByteProducts, MAX_SCORES};
use super::generic::attention::integer_blocks::{BYTES, BlockProducts, HALF, IntegerUnit, Kind};
use super::generic::attention::integer_values::WordProducts;
use super::partial::{integer_kernels, integer_value_shells, with_features};
use std::arch::x86_64::*;

integer_kernels!(Avx512Vnni, Avx512Vnni, Avx512, Vnni, words 2e-3,
    Int8 "attention_int8_integer_avx512vnni"
    Q8_0 "attention_q8_0_integer_avx512vnni"
    Q4_0 "attention_q4_0_integer_avx512vnni"
    Q4_1 "attention_q4_1_integer_avx512vnni"
    Q5_0 "attention_q5_0_integer_avx512vnni"
    Q5_1 "attention_q5_1_integer_avx512vnni"
    Iq4Nl "attention_iq4_nl_integer_avx512vnni"
);

integer_value_shells!(Avx512Vnni, Avx512, Vnni);

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

/// The first `n <= 64` bytes.
#[inline(always)]
fn first(n: usize) -> u64 {
    if n == 0 { 0 } else { u64::MAX >> (64 - n) }
}

/// Where two vectors begin that have all of four blocks that is to be taken from them.
const fn windows(size: usize, at: usize) -> [usize; 2] {
    let end = at + 3 * size + HALF;
    // The first 16 numbers lie in the vectors that have the factors.
    let windows = [if end <= 2 * 64 { 0 } else { at }, end - 64];
    assert!(windows[1] <= windows[0] + 64 && windows[1] + 64 <= 4 * size);
    windows
}

/// Numbers of the words of two vectors at `windows` that are, for each of four blocks of `size` bytes, `n` words from byte `at` on, each of
/// them `times` times.
const fn words(windows: [usize; 2], size: usize, at: usize, n: usize, times: usize) -> [u16; 32] {
    let (mut words, mut i) = ([0; 32], 0);
    while i < 4 * n * times {
        let byte = at + i / (n * times) * size + i / times % n * 2;
        words[i] = (if byte + 2 <= windows[0] + 64 { byte - windows[0] } else { 64 + byte - windows[1] }) as u16 / 2;
        i += 1;
    }
    words
}

/// Some of the words of the vectors at `windows` behind `p`, where bytes from `end` on count as zeros.
///
/// # Safety
/// The level is available, and these bytes are readable.
#[inline(always)]
unsafe fn pick(p: *const u8, end: usize, windows: [usize; 2], words: &[u16; 32]) -> __m512i {
    // SAFETY: the caller's; masked bytes are not read.
    unsafe {
        let bytes = [0, 1].map(|i| first(end.saturating_sub(windows[i]).min(64)));
        let low = _mm512_maskz_loadu_epi8(bytes[0], p.wrapping_add(windows[0]).cast());
        let high = _mm512_maskz_loadu_epi8(bytes[1], p.wrapping_add(windows[1]).cast());
        _mm512_permutex2var_epi16(low, _mm512_loadu_si512(words.as_ptr().cast()), high)
    }
}

impl BlockProducts for Vnni {
    #[inline(always)]
    unsafe fn halves<U: IntegerUnit, const SECOND: bool>(self, p: *const u8, n: usize) -> __m512i {
        const { assert!(Self::BLOCKS == 4) };
        let at = const { windows(size_of::<U>(), U::STARTS[SECOND as usize]) };
        let words = const {
            let first = U::STARTS[SECOND as usize];
            &words(windows(size_of::<U>(), first), size_of::<U>(), first, HALF / 2, 1)
        };
        // SAFETY: the caller's.
        unsafe { pick(p, n * size_of::<U>(), at, words) }
    }
    #[inline(always)]
    unsafe fn factors<U: IntegerUnit, const MINIMA: bool>(self, p: *const u8, n: usize) -> __m512 {
        let at = const { windows(size_of::<U>(), U::AT) };
        let words = const { &words(windows(size_of::<U>(), U::AT), size_of::<U>(), if MINIMA { 2 } else { 0 }, 1, 4) };
        // SAFETY: the caller's.
        unsafe { _mm512_cvtph_ps(_mm512_castsi512_si256(pick(p, n * size_of::<U>(), at, words))) }
    }
    #[inline(always)]
    fn low_nibbles(self, x: __m512i) -> __m512i {
        // SAFETY: the level is available, here and below.
        unsafe { _mm512_and_si512(x, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    fn high_nibbles(self, x: __m512i) -> __m512i {
        // SAFETY: as above.
        self.low_nibbles(unsafe { _mm512_srli_epi16::<4>(x) })
    }
    #[inline(always)]
    fn signed(self, x: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_xor_si512(x, _mm512_set1_epi8(i8::MIN)) }
    }
    #[inline(always)]
    fn listed(self, x: __m512i) -> __m512i {
        // SAFETY: as above; the table has 16 bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(BYTES.as_ptr().cast()));
            _mm512_shuffle_epi8(self.signed(table), x)
        }
    }
    #[inline(always)]
    fn with_fifth_bits(self, x: __m512i, bits: u64) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_mask_add_epi8(x, bits, x, _mm512_set1_epi8(16)) }
    }
    #[inline(always)]
    fn ones(self) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi8(1) }
    }
    #[inline(always)]
    fn four(self, [a, b, c, d]: [__m512i; 4]) -> __m512i {
        // SAFETY: as above.
        unsafe { four(a, b, c, d) }
    }
    #[inline(always)]
    fn times(self, x: __m512i, factor: i32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_mullo_epi32(x, _mm512_set1_epi32(factor)) }
    }
    #[inline(always)]
    fn difference(self, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(_mm512_sub_epi32(a, b)) }
    }
    #[inline(always)]
    fn one_of_each(self, [a, b, c, d]: [__m512; 4]) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let (ab, cd) = (_mm512_mask_blend_ps(0x2222, a, b), _mm512_mask_blend_ps(0x8888, c, d));
            _mm512_mask_blend_ps(0xcccc, ab, cd)
        }
    }
    #[inline(always)]
    fn over_blocks(self, x: __m512) -> [f32; 4] {
        // SAFETY: as above.
        unsafe {
            let x = _mm512_add_ps(x, _mm512_shuffle_f32x4::<0x4e>(x, x));
            let x = _mm512_castps512_ps256(x);
            std::mem::transmute(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
        }
    }
    #[inline(always)]
    fn over_blocks_of_four(self, [a, b, c, d]: [__m512; 4], factors: [f32; 4]) -> [[f32; 4]; 4] {
        // SAFETY: as above; vectors of the same size.
        unsafe {
            let low = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let high = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
            let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(low, high), _mm512_shuffle_f32x4::<0xdd>(low, high));
            let transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let factors = _mm512_broadcast_f32x4(_mm_loadu_ps(factors.as_ptr()));
            std::mem::transmute(_mm512_permutexvar_ps(transposed, _mm512_mul_ps(_mm512_add_ps(even, odd), factors)))
        }
    }
}

impl WordProducts for Vnni {
    type Bytes = __m256i;

    #[inline(always)]
    unsafe fn numbers<U: IntegerUnit>(self, p: *const u8) -> __m256i {
        // SAFETY: the caller's; the table has 16 bytes.
        unsafe {
            let at = p.add(U::AT);
            if let Kind::Bytes = U::KIND {
                return _mm256_loadu_si256(at.cast());
            }
            let low = _mm_loadu_si128(at.cast());
            let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), _mm_srli_epi16::<4>(low));
            let mut q = _mm256_and_si256(both, _mm256_set1_epi8(15));
            if let Kind::Listed = U::KIND {
                return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(BYTES.as_ptr().cast())), q);
            }
            if let Some(fifth) = const { U::FIFTH } {
                let bits = p.add(fifth).cast::<u32>().read_unaligned();
                q = _mm256_mask_add_epi8(q, bits, q, _mm256_set1_epi8(16));
            }
            if U::ZERO == 0 { q } else { _mm256_sub_epi8(q, _mm256_set1_epi8(U::ZERO as i8)) }
        }
    }
    #[inline(always)]
    unsafe fn bytes(self, p: *const u8, n: usize) -> __m256i {
        // SAFETY: the caller's; masked bytes are not read.
        unsafe { _mm256_maskz_loadu_epi8(first(n) as u32, p.cast()) }
    }
    #[inline(always)]
    fn pairs(self, a: __m256i, b: __m256i) -> [__m512i; 2] {
        // SAFETY: the level is available, here and below.
        unsafe { [_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b)), _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b))] }
    }
    #[inline(always)]
    fn pair(self, words: i32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(words) }
    }
    #[inline(always)]
    fn add_words(self, sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpwssd_epi32(sums, a, b) }
    }
    #[inline(always)]
    fn in_order(self, [a, b]: [__m512; 2]) -> [__m512; 2] {
        // SAFETY: as above. A vector has eight elements of the first half of a block, and eight of the second.
        unsafe { [_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b)] }
    }
    #[inline(always)]
    unsafe fn store_words(self, x: __m512, to: *mut i16) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x))) }
    }
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
