//! AVX-512 (F, BW, CD, DQ, VL): sixteen lanes, thirty-two registers, masked loads that never fault on masked-off lanes.

use super::avx2::Avx2;
use super::generic::fp8::{E4m3, E4m3Fraction, E5m2, Fp8};
use super::simd::{BLOCK, BlockVectors, Fold, MAX_LANES, Simd, Sum};
use crate::cpu::level_features;
use crate::kernels::shells::{kernel_shells, kernel_table};
use crate::kernels::simd::outline;
use half::{bf16, f16};
use std::arch::asm;
use std::arch::x86_64::*;

pulp::simd_type!({
    /// pulp's proof that the CPU has this level's features.
    pub(crate) struct Token {
        pub(crate) avx: f!("avx"),
        pub(crate) avx2: f!("avx2"),
        pub(crate) fma: f!("fma"),
        pub(crate) f16c: f!("f16c"),
        pub(crate) avx512f: f!("avx512f"),
        pub(crate) avx512bw: f!("avx512bw"),
        pub(crate) avx512cd: f!("avx512cd"),
        pub(crate) avx512dq: f!("avx512dq"),
        pub(crate) avx512vl: f!("avx512vl"),
    }
});

/// Proof that the CPU has this level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(Token);

/// The float at `p` in every lane. Zen 4 has no port of vectors take part in this instruction, as in the one for floats, which
/// compilers prefer.
///
/// # Safety
/// The float is readable, and the CPU has AVX-512F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(p: *const f32) -> __m512 {
    let v;
    // SAFETY: the caller's.
    unsafe {
        asm!("vpbroadcastd {v}, dword ptr [{p}]", v = lateout(zmm_reg) v, p = in(reg) p,
            options(pure, readonly, nostack, preserves_flags));
    }
    v
}

/// A mask that compilers do not know. Of a known one they make shuffles, for which there are fewer ports.
#[inline(always)]
fn unknown<const MASK: u16>() -> __mmask16 {
    let mask: u32;
    // SAFETY: sets a register.
    unsafe {
        asm!("mov {mask:e}, {MASK}", mask = lateout(reg) mask, MASK = const MASK,
            options(pure, nomem, nostack, preserves_flags));
    }
    mask as __mmask16
}

impl Avx512 {
    /// # Safety
    /// The CPU has the level's features.
    #[inline(always)]
    pub unsafe fn new_unchecked() -> Self {
        // SAFETY: the caller's.
        Self(unsafe { Token::new_unchecked() })
    }

    #[inline(always)]
    fn prefix(n: usize) -> u16 {
        debug_assert!(n < 16);
        (1u16 << n) - 1
    }

    #[inline(always)]
    fn round_bf16(self, v: __m512) -> __m256i {
        let f = self.0.avx512f;
        f._mm512_cvtepi32_epi16(f._mm512_srli_epi32::<16>(self.rounded_bf16(v)))
    }

    /// The rounded numbers in the upper halves; the lower halves are undefined.
    #[inline(always)]
    fn rounded_bf16(self, v: __m512) -> __m512i {
        let f = self.0.avx512f;
        // The increment could turn a NaN into infinity, so NaNs keep their upper half and become quiet.
        let nan = f._mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        f._mm512_mask_or_epi32(self.rounded_short(v), nan, f._mm512_castps_si512(v), f._mm512_set1_epi32(0x40_0000))
    }

    /// As [`Self::rounded_bf16`], for lanes as in [`Simd::store_pair_bf16_short`], whose upper halves no increment reaches.
    #[inline(always)]
    fn rounded_short(self, v: __m512) -> __m512i {
        let f = self.0.avx512f;
        let bits = f._mm512_castps_si512(v);
        // To nearest, ties to even: adds half of the cut-off range, minus one where the last kept bit is 0.
        let odd = f._mm512_test_epi32_mask(bits, f._mm512_set1_epi32(0x1_0000));
        let rounded = f._mm512_add_epi32(bits, f._mm512_set1_epi32(0x7fff));
        f._mm512_mask_add_epi32(rounded, odd, rounded, f._mm512_set1_epi32(1))
    }

    /// The upper halves of even and odd elements, in turns.
    #[inline(always)]
    fn upper_halves(self, even: __m512i, odd: __m512i) -> __m512i {
        let f = self.0.avx512f;
        let odd = f._mm512_and_si512(odd, f._mm512_set1_epi32(0xffff_0000_u32 as i32));
        f._mm512_or_si512(f._mm512_srli_epi32::<16>(even), odd)
    }

    #[inline(always)]
    fn widen_e4m3(self, bytes: __m128i) -> __m512 {
        let f = self.0.avx512f;
        f._mm512_mul_ps(self.widen_e4m3_fraction(bytes), f._mm512_set1_ps(Self::E4M3_FRACTION))
    }

    #[inline(always)]
    fn widen_e4m3_fraction(self, bytes: __m128i) -> __m512 {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // The sign in bit 15 and the magnitude in the bits 7 to 13 are an f16 of a 256th; bit 14 is a copy of the sign.
        let half = a2._mm256_slli_epi16::<7>(a2._mm256_cvtepi8_epi16(bytes));
        // The largest magnitude is NaN. It alone carries into bit 14, which becomes 1 then, as all of the exponent, and otherwise 0.
        let carried = a2._mm256_add_epi16(half, a._mm256_set1_epi16(0x80));
        let carry = a2._mm256_and_si256(carried, a._mm256_set1_epi16(0x4000));
        self.0.avx512f._mm512_cvtph_ps(a2._mm256_xor_si256(half, carry))
    }

    #[inline(always)]
    fn widen_e5m2(self, bytes: __m128i) -> __m512 {
        let a2 = self.0.avx2;
        // An E5M2 is the upper half of an f16.
        self.0.avx512f._mm512_cvtph_ps(a2._mm256_slli_epi16::<8>(a2._mm256_cvtepu8_epi16(bytes)))
    }

    #[inline(always)]
    fn widen_pair_f16(self, halves: __m512i) -> [__m512; 2] {
        let f = self.0.avx512f;
        let (low, high) = (f._mm512_castsi512_si256(halves), f._mm512_extracti64x4_epi64::<1>(halves));
        [f._mm512_cvtph_ps(low), f._mm512_cvtph_ps(high)]
    }

    /// The level below, which this one includes.
    #[inline(always)]
    fn avx2(self) -> Avx2 {
        // SAFETY: the token proves its features.
        unsafe { Avx2::new_unchecked() }
    }

    /// A block of bytes in the order of lanes, packed from words that were packed from two vectors.
    #[inline(always)]
    fn in_order(self, bytes: __m512i) -> __m256i {
        let f = self.0.avx512f;
        // A pack takes four lanes of each of its operands in turns.
        let order = f._mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
        f._mm512_castsi512_si256(f._mm512_permutexvar_epi32(order, bytes))
    }

    #[inline(always)]
    fn widen_bf16(self, v: __m256i) -> __m512 {
        let f = self.0.avx512f;
        f._mm512_castsi512_ps(f._mm512_slli_epi32::<16>(f._mm512_cvtepu16_epi32(v)))
    }
}

const TO_NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const TILE_VECTORS: usize = 4;
    const NARROW_SCORES: bool = true;
    const PARALLEL_DOTS: usize = 16;
    const DIRECT_DIM: usize = 512;
    const DIRECT_ROWS: usize = 24;
    const WIDENS_ONCE: bool = true;
    const DEINTERLEAVED_BF16: bool = true;
    const E4M3_FRACTION: f32 = 256.0;
    const WRITES_SEVERAL: bool = true;

    level_features!(Avx512, outline! {});

    #[inline(always)]
    fn lane_order(i: usize) -> usize {
        // The four bits of the index reversed, because the tree adds lanes at distances 8, 4, 2 and 1.
        (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        self.0.avx512f._mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn splat_from(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's; the token proves AVX-512F.
        unsafe { broadcast(p) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        self.0.avx512f._mm512_add_ps(a, b)
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        self.0.avx512f._mm512_sub_ps(a, b)
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        self.0.avx512f._mm512_mul_ps(a, b)
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        self.0.avx512f._mm512_div_ps(a, b)
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        self.0.avx512f._mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        self.0.avx512f._mm512_max_ps(a, b)
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        self.0.avx512f._mm512_min_ps(a, b)
    }
    #[inline(always)]
    fn select_lt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        let f = self.0.avx512f;
        // The mask of `y`, because zeros are mostly `x`, and masked-off lanes become zeros in one instruction.
        f._mm512_mask_blend_ps(f._mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b), x, y)
    }
    #[inline(always)]
    fn lt_bits(self, a: __m512, b: __m512) -> u64 {
        u64::from(self.0.avx512f._mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn select_bits(self, bits: u64, x: __m512, y: __m512) -> __m512 {
        self.0.avx512f._mm512_mask_blend_ps(bits as u16, y, x)
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        self.0.avx512f._mm512_abs_ps(a)
    }
    #[inline(always)]
    fn copysign(self, a: __m512, b: __m512) -> __m512 {
        let sign = self.splat(-0.0);
        let dq = self.0.avx512dq;
        dq._mm512_or_ps(dq._mm512_andnot_ps(sign, a), dq._mm512_and_ps(sign, b))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        self.0.avx512f._mm512_roundscale_ps::<TO_NEAREST>(a)
    }
    #[inline(always)]
    fn exp2i(self, n: __m512) -> __m512 {
        let f = self.0.avx512f;
        let shifted = f._mm512_slli_epi32::<23>(f._mm512_castps_si512(n));
        f._mm512_castsi512_ps(f._mm512_add_epi32(f._mm512_castps_si512(f._mm512_set1_ps(1.0)), shifted))
    }
    #[inline(always)]
    fn swap_pairs(self, a: __m512) -> __m512 {
        self.0.avx512f._mm512_permute_ps::<0b10_11_00_01>(a)
    }
    #[inline(always)]
    fn add_bits(self, a: __m512, b: __m512) -> __m512 {
        let f = self.0.avx512f;
        f._mm512_castsi512_ps(f._mm512_add_epi32(f._mm512_castps_si512(a), f._mm512_castps_si512(b)))
    }
    #[inline(always)]
    fn and_bits(self, a: __m512, b: __m512) -> __m512 {
        self.0.avx512dq._mm512_and_ps(a, b)
    }
    #[inline(always)]
    fn shift_bits(self, a: __m512, n: u32) -> __m512 {
        let f = self.0.avx512f;
        f._mm512_castsi512_ps(f._mm512_srlv_epi32(f._mm512_castps_si512(a), f._mm512_set1_epi32(n as i32)))
    }
    #[inline(always)]
    fn deinterleave(self, a: __m512, b: __m512) -> [__m512; 2] {
        let f = self.0.avx512f;
        let even = f._mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = f._mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        [f._mm512_permutex2var_ps(a, even, b), f._mm512_permutex2var_ps(a, odd, b)]
    }
    #[inline(always)]
    fn interleave(self, even: __m512, odd: __m512) -> [__m512; 2] {
        let f = self.0.avx512f;
        let low = f._mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let high = f._mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        [f._mm512_permutex2var_ps(even, low, odd), f._mm512_permutex2var_ps(even, high, odd)]
    }
    #[inline(always)]
    fn add_squares(self, v: __m512, sums: &mut [f64; MAX_LANES], first: usize) {
        debug_assert_eq!(first, 0);
        let (f, dq) = (self.0.avx512f, self.0.avx512dq);
        for (half, sums) in [f._mm512_castps512_ps256(v), dq._mm512_extractf32x8_ps::<1>(v)]
            .into_iter()
            .zip(sums.as_chunks_mut::<8>().0)
        {
            let x = f._mm512_cvtps_pd(half);
            // SAFETY: eight sums. A square is exact, so that one rounding is left either way.
            unsafe { _mm512_storeu_pd(sums.as_mut_ptr(), _mm512_fmadd_pd(x, x, _mm512_loadu_pd(sums.as_ptr()))) };
        }
    }
    #[inline(always)]
    fn sum_lanes(self, v: &[__m512; MAX_LANES]) -> __m512 {
        self.fold_lanes::<Sum>(v)
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        self.0.avx512f._mm512_reduce_max_ps(a)
    }
    #[inline(always)]
    fn max_bits(self, a: __m512, b: __m512) -> __m512 {
        let f = self.0.avx512f;
        f._mm512_castsi512_ps(f._mm512_max_epi32(f._mm512_castps_si512(a), f._mm512_castps_si512(b)))
    }
    #[inline(always)]
    fn fold_lanes<F: Fold>(self, v: &[__m512; MAX_LANES]) -> __m512 {
        let f = self.0.avx512f;
        // Each step of the tree halves the number of vectors: lanes with the bit clear continue with the first, the others with the
        // second. Blends run on every vector port, exchanges on two.
        let (mut w, second) = ([v[0]; 8], unknown::<0xff00>());
        for i in 0..8 {
            let (a, b) = (v[i], v[i + 8]);
            let others = f._mm512_shuffle_f32x4::<0b01_00_11_10>(a, b);
            w[i] = F::of(self, f._mm512_mask_blend_ps(second, a, b), others);
        }
        let second = unknown::<0xf0f0>();
        for i in 0..4 {
            let (a, b) = (w[i], w[i + 4]);
            let others = f._mm512_mask_blend_ps(second, b, a);
            let others = f._mm512_shuffle_f32x4::<0b10_11_00_01>(others, others);
            w[i] = F::of(self, f._mm512_mask_blend_ps(second, a, b), others);
        }
        let second = unknown::<0xcccc>();
        for i in 0..2 {
            let (a, b) = (w[i], w[i + 2]);
            let others = f._mm512_shuffle_ps::<0b01_00_11_10>(a, b);
            w[i] = F::of(self, f._mm512_mask_blend_ps(second, a, b), others);
        }
        let second = unknown::<0xaaaa>();
        let others = f._mm512_permute_ps::<0b10_11_00_01>(f._mm512_mask_blend_ps(second, w[1], w[0]));
        F::of(self, f._mm512_mask_blend_ps(second, w[0], w[1]), others)
    }
    #[inline(always)]
    fn all_finite(self, a: __m512) -> bool {
        // Classes: quiet NaN, +inf, -inf, signalling NaN.
        self.0.avx512dq._mm512_fpclass_ps_mask::<0b1001_1001>(a) == 0
    }
    #[inline(always)]
    fn transpose(self, v: &mut [__m512; MAX_LANES]) {
        let f = self.0.avx512f;
        let mut t = *v;
        for i in 0..8 {
            t[2 * i] = f._mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
            t[2 * i + 1] = f._mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..4 {
            let a = f._mm512_castps_pd(t[4 * i]);
            let b = f._mm512_castps_pd(t[4 * i + 1]);
            let c = f._mm512_castps_pd(t[4 * i + 2]);
            let d = f._mm512_castps_pd(t[4 * i + 3]);
            u[4 * i] = f._mm512_castpd_ps(f._mm512_unpacklo_pd(a, c));
            u[4 * i + 1] = f._mm512_castpd_ps(f._mm512_unpackhi_pd(a, c));
            u[4 * i + 2] = f._mm512_castpd_ps(f._mm512_unpacklo_pd(b, d));
            u[4 * i + 3] = f._mm512_castpd_ps(f._mm512_unpackhi_pd(b, d));
        }
        // u[4g + c] holds columns c, c + 4, c + 8 and c + 12 of rows 4g .. 4g + 4, one per quarter.
        for c in 0..4 {
            let low01 = f._mm512_shuffle_f32x4::<0b01_00_01_00>(u[c], u[4 + c]);
            let high01 = f._mm512_shuffle_f32x4::<0b11_10_11_10>(u[c], u[4 + c]);
            let low23 = f._mm512_shuffle_f32x4::<0b01_00_01_00>(u[8 + c], u[12 + c]);
            let high23 = f._mm512_shuffle_f32x4::<0b11_10_11_10>(u[8 + c], u[12 + c]);
            v[c] = f._mm512_shuffle_f32x4::<0b10_00_10_00>(low01, low23);
            v[4 + c] = f._mm512_shuffle_f32x4::<0b11_01_11_01>(low01, low23);
            v[8 + c] = f._mm512_shuffle_f32x4::<0b10_00_10_00>(high01, high23);
            v[12 + c] = f._mm512_shuffle_f32x4::<0b11_01_11_01>(high01, high23);
        }
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        // SAFETY: the caller's.
        self.0.avx512f._mm512_cvtph_ps(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: the caller's.
        self.widen_bf16(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_pair_bf16(self, p: *const bf16) -> [__m512; 2] {
        let f = self.0.avx512f;
        // SAFETY: the caller's.
        let pairs = unsafe { _mm512_loadu_si512(p.cast()) };
        // A bf16 is the upper half of an f32.
        let odd = f._mm512_and_si512(pairs, f._mm512_set1_epi32(0xffff_0000_u32 as i32));
        [f._mm512_castsi512_ps(f._mm512_slli_epi32::<16>(pairs)), f._mm512_castsi512_ps(odd)]
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_write(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_part_f32(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: masked-off lanes are not accessed.
        unsafe { _mm512_maskz_loadu_ps(Self::prefix(n), p) }
    }
    #[inline(always)]
    unsafe fn load_part_f16(self, p: *const f16, n: usize) -> __m512 {
        // SAFETY: masked-off lanes are not accessed; the token proves BW and VL.
        self.0.avx512f._mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(Self::prefix(n), p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_part_bf16(self, p: *const bf16, n: usize) -> __m512 {
        // SAFETY: masked-off lanes are not accessed; the token proves BW and VL.
        self.widen_bf16(unsafe { _mm256_maskz_loadu_epi16(Self::prefix(n), p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m512 {
        // SAFETY: sixteen bytes are readable.
        let bytes = unsafe { _mm_loadu_si128(p.cast()) };
        let f = self.0.avx512f;
        f._mm512_cvtepi32_ps(f._mm512_cvtepi8_epi32(bytes))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> __m512 {
        // SAFETY: sixteen bytes are readable.
        let bytes = unsafe { _mm_loadu_si128(p.cast()) };
        let f = self.0.avx512f;
        f._mm512_cvtepi32_ps(f._mm512_cvtepu8_epi32(bytes))
    }
    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m512 {
        self.0.avx512f._mm512_cvtph_ps(self.0.avx._mm256_set1_epi16(x.to_bits() as i16))
    }
    #[inline(always)]
    unsafe fn look_up_fives(self, p: *const u8, fifth: u32, table: [__m512; 2]) -> [__m512; 2] {
        let f = self.0.avx512f;
        // SAFETY: sixteen bytes are readable.
        let low = f._mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(p.cast()) });
        // Bit i of each lane i, and bit 16 + i, become bit 4. The permutation takes the lowest five bits.
        let first = f._mm512_setr_epi32(28, 29, 30, 31, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11);
        let (fifth, bit) = (f._mm512_set1_epi32(fifth as i32), f._mm512_set1_epi32(16));
        let second = f._mm512_add_epi32(first, bit);
        let numbers = [(low, first), (f._mm512_srli_epi32::<4>(low), second)]
            .map(|(x, counts)| f._mm512_ternarylogic_epi32::<0xca>(bit, f._mm512_rorv_epi32(fifth, counts), x));
        numbers.map(|numbers| f._mm512_permutex2var_ps(table[0], numbers, table[1]))
    }
    #[inline(always)]
    unsafe fn look_up_nibbles(self, p: *const u8, at: usize, table: __m512) -> __m512 {
        let f = self.0.avx512f;
        // SAFETY: sixteen bytes are readable.
        let bytes = f._mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(p.cast()) });
        // The permutation takes the lowest four bits of each lane.
        f._mm512_permutexvar_ps(if at < 16 { bytes } else { f._mm512_srli_epi32::<4>(bytes) }, table)
    }
    #[inline(always)]
    unsafe fn load_part_i8(self, p: *const i8, n: usize) -> __m512 {
        // SAFETY: masked-off bytes are not read.
        let bytes = unsafe { _mm_maskz_loadu_epi8(Self::prefix(n), p) };
        let f = self.0.avx512f;
        f._mm512_cvtepi32_ps(f._mm512_cvtepi8_epi32(bytes))
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const E4m3) -> __m512 {
        // SAFETY: sixteen bytes are readable.
        self.widen_e4m3(unsafe { _mm_loadu_si128(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_part_e4m3(self, p: *const E4m3, n: usize) -> __m512 {
        // SAFETY: masked-off bytes are not read.
        self.widen_e4m3(unsafe { _mm_maskz_loadu_epi8(Self::prefix(n), p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_e4m3_fraction(self, p: *const E4m3Fraction) -> __m512 {
        // SAFETY: sixteen bytes are readable.
        self.widen_e4m3_fraction(unsafe { _mm_loadu_si128(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_pair_e4m3_fraction(self, p: *const E4m3Fraction) -> [__m512; 2] {
        let (f, bw) = (self.0.avx512f, self.0.avx512bw);
        // SAFETY: 32 bytes are readable.
        let bytes = unsafe { _mm256_loadu_si256(p.cast()) };
        // As of sixteen, with an operation for `half ^ (carried & 0x4000)`.
        let half = bw._mm512_slli_epi16::<7>(bw._mm512_cvtepi8_epi16(bytes));
        let carried = bw._mm512_add_epi16(half, f._mm512_set1_epi16(0x80));
        self.widen_pair_f16(f._mm512_ternarylogic_epi32::<0x78>(half, carried, f._mm512_set1_epi16(0x4000)))
    }
    #[inline(always)]
    unsafe fn load_part_e4m3_fraction(self, p: *const E4m3Fraction, n: usize) -> __m512 {
        // SAFETY: masked-off bytes are not read.
        self.widen_e4m3_fraction(unsafe { _mm_maskz_loadu_epi8(Self::prefix(n), p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_e5m2(self, p: *const E5m2) -> __m512 {
        // SAFETY: sixteen bytes are readable.
        self.widen_e5m2(unsafe { _mm_loadu_si128(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_pair_e5m2(self, p: *const E5m2) -> [__m512; 2] {
        let bw = self.0.avx512bw;
        // SAFETY: 32 bytes are readable.
        let bytes = unsafe { _mm256_loadu_si256(p.cast()) };
        self.widen_pair_f16(bw._mm512_slli_epi16::<8>(bw._mm512_cvtepu8_epi16(bytes)))
    }
    #[inline(always)]
    unsafe fn load_part_e5m2(self, p: *const E5m2, n: usize) -> __m512 {
        // SAFETY: masked-off bytes are not read.
        self.widen_e5m2(unsafe { _mm_maskz_loadu_epi8(Self::prefix(n), p.cast()) })
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, p: *mut u8, v: __m512) {
        let f = self.0.avx512f;
        // SAFETY: sixteen bytes are writable.
        unsafe { _mm_storeu_si128(p.cast(), f._mm512_cvtepi32_epi8(f._mm512_castps_si512(v))) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m512) {
        let f = self.0.avx512f;
        // The rounding mode is to nearest, ties to even; Rust programs do not change it.
        let bytes = f._mm512_cvtepi32_epi8(f._mm512_cvtps_epi32(v));
        // SAFETY: sixteen bytes are writable.
        unsafe { _mm_storeu_si128(p.cast(), bytes) }
    }
    #[inline(always)]
    unsafe fn store_four_i8(self, p: *mut i8, v: [__m512; 4]) {
        let (f, bw) = (self.0.avx512f, self.0.avx512bw);
        // The rounding mode as above.
        let [x, y, z, w] = v.map(|v| f._mm512_cvtps_epi32(v));
        let bytes = bw._mm512_packs_epi16(bw._mm512_packs_epi32(x, y), bw._mm512_packs_epi32(z, w));
        let order = f._mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        // SAFETY: 64 bytes are writable.
        unsafe { _mm512_storeu_si512(p.cast(), f._mm512_permutexvar_epi32(order, bytes)) }
    }
    #[inline(always)]
    unsafe fn store_halves_away(self, p: *mut i8, v: &BlockVectors<Self>) {
        let (f, bw) = (self.0.avx512f, self.0.avx512bw);
        let words = bw._mm512_packs_epi32(f._mm512_cvttps_epi32(v[0]), f._mm512_cvttps_epi32(v[1]));
        // The average with 0 is rounded up.
        let zero = f._mm512_setzero_si512();
        let away = bw._mm512_avg_epu16(bw._mm512_abs_epi16(words), zero);
        let away = bw._mm512_mask_sub_epi16(away, bw._mm512_movepi16_mask(words), zero, away);
        // SAFETY: 32 bytes are writable.
        unsafe { _mm256_storeu_si256(p.cast(), self.in_order(bw._mm512_packs_epi16(away, away))) }
    }
    #[inline(always)]
    fn cut_block(self, v: &BlockVectors<Self>, most: u8) -> [u8; BLOCK] {
        let (f, bw) = (self.0.avx512f, self.0.avx512bw);
        let words = bw._mm512_packs_epi32(f._mm512_cvttps_epi32(v[0]), f._mm512_cvttps_epi32(v[1]));
        let bytes = self.in_order(bw._mm512_packus_epi16(words, words));
        Avx2::array(self.0.avx2._mm256_min_epu8(bytes, self.0.avx._mm256_set1_epi8(most as i8)))
    }
    #[inline(always)]
    fn count_reached(self, v: &BlockVectors<Self>, integers: &[i16; 15]) -> [u8; BLOCK] {
        const DOWN: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
        let (f, bw) = (self.0.avx512f, self.0.avx512bw);
        let [x, y] = [v[0], v[1]].map(|v| f._mm512_cvt_roundps_epi32::<DOWN>(v));
        let words = bw._mm512_packs_epi32(x, y);
        // Halves rounded down reach what half of an even integer reaches, and halves rounded up what half of an odd one does, rounded up.
        let above = bw._mm512_sub_epi16(words, f._mm512_set1_epi32(-1));
        let halves = [bw._mm512_srai_epi16::<1>(words), bw._mm512_srai_epi16::<1>(above)];
        let halves = halves.map(|words| self.in_order(bw._mm512_packs_epi16(words, words)));
        Avx2::array(self.avx2().count_halves(halves, integers))
    }
    #[inline(always)]
    fn look_up_bytes(self, numbers: [u8; BLOCK], table: &[i8; 16]) -> [i8; BLOCK] {
        self.avx2().look_up_bytes(numbers, table)
    }
    #[inline(always)]
    fn low_halves(self, bytes: [u8; BLOCK]) -> [u8; BLOCK / 2] {
        self.avx2().low_halves(bytes)
    }
    #[inline(always)]
    fn fifth_bits(self, bytes: [u8; BLOCK]) -> u32 {
        self.avx2().fifth_bits(bytes)
    }
    #[inline(always)]
    unsafe fn store_fp8<U: Fp8>(self, p: *mut u8, magnitudes: &BlockVectors<Self>, signs: &BlockVectors<Self>) {
        let (f, bw, dq) = (self.0.avx512f, self.0.avx512bw, self.0.avx512dq);
        // A power of two whose last place is that of a unit is added, which rounds, and is taken off the pattern, which leaves the number of
        // last places: the unit, but for its exponent.
        let (power, least) = (self.splat((1 << U::SHIFT) as f32), self.splat(U::MIN_NORMAL));
        let unbiased = (U::SHIFT << 23) + ((U::BIAS + 1) << (23 - U::SHIFT));
        let mut words = [f._mm512_setzero_si512(); 2];
        for (word, &x) in words.iter_mut().zip(magnitudes) {
            let exponent = self.max_bits(self.and_bits(x, self.splat(f32::INFINITY)), least);
            let sum = f._mm512_castps_si512(self.fma(exponent, power, x));
            let biased = f._mm512_castps_si512(self.shift_bits(exponent, U::SHIFT));
            let last = f._mm512_sub_epi32(sum, f._mm512_castps_si512(exponent));
            *word = f._mm512_sub_epi32(f._mm512_add_epi32(last, biased), f._mm512_set1_epi32(unbiased as i32));
        }
        // NaN becomes a negative number, which is a large one without a sign.
        let words = bw._mm512_packs_epi32(words[0], words[1]);
        let words = bw._mm512_min_epu16(words, f._mm512_set1_epi16(0x7f));
        let units = self.in_order(bw._mm512_packus_epi16(words, words));
        let [low, high] = [signs[0], signs[1]].map(|y| u32::from(dq._mm512_movepi32_mask(f._mm512_castps_si512(y))));
        // SAFETY: 32 bytes are writable; the token proves BW and VL.
        unsafe {
            let negative = (low | high << 16) & _mm256_cmpneq_epi8_mask(units, _mm256_set1_epi8(0x7f));
            let units = _mm256_mask_add_epi8(units, negative, units, _mm256_set1_epi8(i8::MIN));
            _mm256_storeu_si256(p.cast(), units);
        }
    }
    #[inline(always)]
    unsafe fn store_integers<const BITS: u32>(
        self,
        p: *mut u8,
        v: &BlockVectors<Self>,
        bias: i16,
        flip: u8,
        swapped: bool,
    ) {
        let (a, a2, f, bw) = (self.0.avx, self.0.avx2, self.0.avx512f, self.0.avx512bw);
        let words = bw._mm512_packs_epi32(f._mm512_cvtps_epi32(v[0]), f._mm512_cvtps_epi32(v[1]));
        let words = bw._mm512_adds_epi16(words, f._mm512_set1_epi16(bias));
        let numbers = self.in_order(bw._mm512_packus_epi16(words, words));
        let flip = a._mm256_set1_epi8(flip as i8);
        if BITS == 8 {
            // SAFETY: 32 bytes are writable.
            unsafe { _mm256_storeu_si256(p.cast(), a2._mm256_xor_si256(numbers, flip)) };
            return;
        }
        let pairs = self.avx2().nibble_pairs(numbers, flip, swapped);
        // SAFETY: 16 bytes are writable; the token proves BW and VL.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtepi16_epi8(pairs)) };
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(p.cast(), self.0.avx512f._mm512_cvtps_ph::<TO_NEAREST>(v)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(p.cast(), self.round_bf16(v)) }
    }
    #[inline(always)]
    unsafe fn store_four_bf16(self, p: *mut bf16, v: [__m512; 4]) {
        let (f, bw) = (self.0.avx512f, self.0.avx512bw);
        let nan = f._mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v[0], v[1]);
        if nan | f._mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v[2], v[3]) != 0 {
            for (i, v) in v.into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { self.store_bf16(p.add(16 * i), v) };
            }
            return;
        }
        // A pack takes four lanes of each of its operands in turns.
        let order = f._mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        for (i, &[x, y]) in v.as_chunks::<2>().0.iter().enumerate() {
            let x = f._mm512_srli_epi32::<16>(self.rounded_short(x));
            let y = f._mm512_srli_epi32::<16>(self.rounded_short(y));
            let words = f._mm512_permutexvar_epi64(order, bw._mm512_packus_epi32(x, y));
            // SAFETY: the caller's.
            unsafe { _mm512_storeu_si512(p.add(32 * i).cast(), words) };
        }
    }
    #[inline(always)]
    unsafe fn store_pair_bf16(self, p: *mut bf16, [even, odd]: [__m512; 2]) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(p.cast(), self.upper_halves(self.rounded_bf16(even), self.rounded_bf16(odd))) }
    }
    #[inline(always)]
    unsafe fn store_pair_bf16_short(self, p: *mut bf16, [even, odd]: [__m512; 2]) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_si512(p.cast(), self.upper_halves(self.rounded_short(even), self.rounded_short(odd))) }
    }
    #[inline(always)]
    unsafe fn store_part_f32(self, p: *mut f32, v: __m512, n: usize) {
        // SAFETY: masked-off lanes are not accessed.
        unsafe { _mm512_mask_storeu_ps(p, Self::prefix(n), v) }
    }
    #[inline(always)]
    unsafe fn store_lanes_f32(self, p: *mut f32, v: __m512, first: usize, n: usize) {
        // SAFETY: masked-off lanes are not accessed.
        unsafe { _mm512_mask_storeu_ps(p.wrapping_sub(first), Self::prefix(n) << first, v) }
    }
    #[inline(always)]
    unsafe fn store_part_f16(self, p: *mut f16, v: __m512, n: usize) {
        let narrow = self.0.avx512f._mm512_cvtps_ph::<TO_NEAREST>(v);
        // SAFETY: masked-off lanes are not accessed; the token proves BW and VL.
        unsafe { _mm256_mask_storeu_epi16(p.cast(), Self::prefix(n), narrow) }
    }
    #[inline(always)]
    unsafe fn store_part_bf16(self, p: *mut bf16, v: __m512, n: usize) {
        // SAFETY: masked-off lanes are not accessed; the token proves BW and VL.
        unsafe { _mm256_mask_storeu_epi16(p.cast(), Self::prefix(n), self.round_bf16(v)) }
    }
}

level_features!(Avx512, kernel_shells! { Avx512 });
kernel_table!(Avx512);
