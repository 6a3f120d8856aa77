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
use super::generic::attention::integer_blocks::{BlockProducts, BlockUnits, IntegerUnit, Kind};
use super::generic::attention::integer_values::WordProducts;
use super::generic::blocks::VALUES;
use super::partial::{integer_kernels, integer_value_shells, with_features};
use half::f16;
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

/// The first and the last vector of four blocks.
const fn windows(size: usize) -> [usize; 2] {
    [0, 4 * size - 64]
}

/// Numbers of the words of two vectors at [`windows`] that are, for each of four blocks of `size` bytes, 16 bytes from byte `at` on.
const fn words(size: usize, at: usize) -> [u16; 32] {
    let (mut words, mut i) = ([0; 32], 0);
    while i < 32 {
        let byte = at + i / 8 * size + i % 8 * 2;
        words[i] = (if byte + 2 <= 64 { byte } else { 64 + byte - windows(size)[1] }) as u16 / 2;
        i += 1;
    }
    words
}

impl BlockUnits for Vnni {
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
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(VALUES.as_ptr().cast()));
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
    fn times(self, x: __m512i, factor: i32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_mullo_epi32(x, _mm512_set1_epi32(factor)) }
    }
}

impl BlockProducts for Vnni {
    const GROUPS: usize = 2;

    #[inline(always)]
    unsafe fn bytes_of<U: IntegerUnit>(self, p: *const u8, n: usize) -> [__m512i; 2] {
        let size = size_of::<U>();
        let p = p.wrapping_add(U::STARTS[0]);
        // SAFETY: the caller's. Half vectors: whole ones would take longer, since nearly all of them cross lines.
        unsafe {
            let mut low = _mm512_castsi256_si512(_mm256_loadu_si256(p.cast()));
            if n > 1 {
                low = _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(p.add(size).cast()));
            }
            let mut high = low;
            if n > 2 {
                high = _mm512_castsi256_si512(_mm256_loadu_si256(p.add(2 * size).cast()));
            }
            if n > 3 {
                high = _mm512_inserti64x4::<1>(high, _mm256_loadu_si256(p.add(3 * size).cast()));
            }
            // The even and the odd halves.
            [_mm512_shuffle_i32x4::<0x88>(low, high), _mm512_shuffle_i32x4::<0xdd>(low, high)]
        }
    }
    #[inline(always)]
    unsafe fn nibbles_of<U: IntegerUnit>(self, p: *const u8, n: usize) -> __m512i {
        let (windows, words) = const { (windows(size_of::<U>()), &words(size_of::<U>(), U::AT)) };
        let end = n * size_of::<U>();
        // SAFETY: the caller's; masked bytes are not read.
        unsafe {
            let low = _mm512_maskz_loadu_epi8(first(end.min(64)), p.cast());
            let high = first(end.saturating_sub(windows[1]).min(64));
            let high = _mm512_maskz_loadu_epi8(high, p.wrapping_add(windows[1]).cast());
            _mm512_permutex2var_epi16(low, _mm512_loadu_si512(words.as_ptr().cast()), high)
        }
    }
    #[inline(always)]
    fn transposed(self, [a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
        // SAFETY: the level is available, here and below.
        unsafe {
            let low = [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)];
            let high = [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)];
            [
                _mm512_unpacklo_epi64(low[0], low[1]),
                _mm512_unpackhi_epi64(low[0], low[1]),
                _mm512_unpacklo_epi64(high[0], high[1]),
                _mm512_unpackhi_epi64(high[0], high[1]),
            ]
        }
    }
    #[inline(always)]
    fn float(self, x: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn over_blocks(self, [x, y]: [[__m512; 4]; 2], factors: [f32; 4]) -> [[[f32; 4]; 2]; 4] {
        // SAFETY: as above; vectors of the same size.
        unsafe {
            let (mut pairs, mut sums) = ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 2]);
            // The sums of the even and of the odd blocks of the first group, and those of the second.
            for r in 0..4 {
                pairs[r] =
                    _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(x[r], y[r]), _mm512_shuffle_f32x4::<0xee>(x[r], y[r]));
            }
            for i in 0..2 {
                let [a, b] = [pairs[2 * i], pairs[2 * i + 1]];
                let sum = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let [a, b] = [factors[2 * i], factors[2 * i + 1]];
                let factors = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b));
                sums[i] = _mm512_mul_ps(sum, factors);
            }
            std::mem::transmute(sums)
        }
    }
}

/// Numbers of every fourth and of every second of 64 words.
const FOURTHS: [u16; 32] = every(4);
const EVENS: [u16; 32] = every(2);

const fn every(step: usize) -> [u16; 32] {
    let (mut words, mut i) = ([0; 32], 0);
    while i * step < 64 {
        words[i] = (i * step) as u16;
        i += 1;
    }
    words
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
                return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(VALUES.as_ptr().cast())), q);
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
    unsafe fn gathered(self, p: *const f16, b: usize) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let (low, high) = (_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(32).cast()));
            let fourths = _mm512_add_epi16(_mm512_loadu_si512(FOURTHS.as_ptr().cast()), _mm512_set1_epi16(b as i16));
            _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutex2var_epi16(low, fourths, high)))
        }
    }
    #[inline(always)]
    fn pairs(self, a: __m256i, b: __m256i) -> [__m512i; 2] {
        // SAFETY: the level is available, here and below.
        unsafe { [_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(a, b)), _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(a, b))] }
    }
    #[inline(always)]
    unsafe fn nibble_pairs<U: IntegerUnit>(self, a: *const u8, b: *const u8) -> [__m512i; 2] {
        // SAFETY: the caller's.
        unsafe {
            let (a, b) = (_mm_loadu_si128(a.add(U::AT).cast()), _mm_loadu_si128(b.add(U::AT).cast()));
            let b = _mm512_slli_epi32::<16>(_mm512_cvtepu8_epi32(b));
            let both = _mm512_or_si512(_mm512_cvtepu8_epi32(a), b);
            let q = [_mm512_and_si512(both, _mm512_set1_epi16(15)), _mm512_srli_epi16::<4>(both)];
            if U::ZERO == 0 {
                return q;
            }
            let zero = _mm512_set1_epi16(U::ZERO as i16);
            [_mm512_sub_epi16(q[0], zero), _mm512_sub_epi16(q[1], zero)]
        }
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
    unsafe fn store_words(self, [a, b]: [__m512; 2], to: *mut i16) {
        // SAFETY: as above.
        unsafe {
            let evens = _mm512_loadu_si512(EVENS.as_ptr().cast());
            let words = _mm512_permutex2var_epi16(_mm512_cvtps_epi32(a), evens, _mm512_cvtps_epi32(b));
            _mm512_storeu_si512(to.cast(), words);
        }
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
