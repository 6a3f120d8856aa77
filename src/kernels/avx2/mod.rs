//! AVX2 with FMA and F16C: eight lanes, sixteen registers.

pub(crate) mod bytes;

use super::generic::fp8::{E4m3, E4m3Fraction, E5m2, Fp8};
use super::simd::{BLOCK, BlockVectors, Fold, MAX_LANES, Simd};
use crate::cpu::level_features;
use crate::kernels::shells::{kernel_shells, kernel_table};
use crate::kernels::simd::outline;
use half::{bf16, f16};
use std::arch::x86_64::*;

pulp::simd_type!({
    /// pulp's proof that the CPU has this level's features.
    pub(crate) struct Token {
        pub(crate) sse: f!("sse"),
        pub(crate) sse3: f!("sse3"),
        pub(crate) avx: f!("avx"),
        pub(crate) avx2: f!("avx2"),
        pub(crate) fma: f!("fma"),
        pub(crate) f16c: f!("f16c"),
    }
});

/// Proof that the CPU has this level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(Token);

/// Entries 8 - n .. 16 - n are a mask with the first n lanes on.
static PREFIX: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

impl Avx2 {
    /// # Safety
    /// The CPU has the level's features.
    #[inline(always)]
    pub unsafe fn new_unchecked() -> Self {
        // SAFETY: the caller's.
        Self(unsafe { Token::new_unchecked() })
    }

    #[inline(always)]
    fn prefix(n: usize) -> __m256i {
        debug_assert!(n < 8);
        // SAFETY: n is less than 8, so eight entries from 8 - n are inside the table.
        unsafe { _mm256_loadu_si256(PREFIX.as_ptr().add(8 - n).cast()) }
    }

    #[inline(always)]
    fn round_bf16(self, v: __m256) -> __m128i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let upper = a2._mm256_srli_epi32::<16>(self.rounded_bf16(v));
        let packed = a2._mm256_packus_epi32(upper, upper);
        a._mm256_castsi256_si128(a2._mm256_permute4x64_epi64::<0b00_00_10_00>(packed))
    }

    /// The rounded numbers in the upper halves; the lower halves are undefined.
    #[inline(always)]
    fn rounded_bf16(self, v: __m256) -> __m256i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // The increment could turn a NaN into infinity, so NaNs keep their upper half and become quiet.
        let nan = a._mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
        let quiet = a2._mm256_or_si256(a._mm256_castps_si256(v), a._mm256_set1_epi32(0x40_0000));
        a2._mm256_blendv_epi8(self.rounded_short(v), quiet, a._mm256_castps_si256(nan))
    }

    /// As [`Self::rounded_bf16`], for lanes as in [`Simd::store_pair_bf16_short`], whose upper halves no increment reaches.
    #[inline(always)]
    fn rounded_short(self, v: __m256) -> __m256i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let bits = a._mm256_castps_si256(v);
        let odd = a2._mm256_and_si256(a2._mm256_srli_epi32::<16>(bits), a._mm256_set1_epi32(1));
        a2._mm256_add_epi32(bits, a2._mm256_add_epi32(odd, a._mm256_set1_epi32(0x7fff)))
    }

    /// The upper halves of even and odd elements, in turns.
    #[inline(always)]
    fn upper_halves(self, even: __m256i, odd: __m256i) -> __m256i {
        let a2 = self.0.avx2;
        a2._mm256_blend_epi16::<0b1010_1010>(a2._mm256_srli_epi32::<16>(even), odd)
    }

    #[inline(always)]
    pub fn array(bytes: __m256i) -> [u8; BLOCK] {
        // SAFETY: both are 32 bytes.
        unsafe { std::mem::transmute(bytes) }
    }

    #[inline(always)]
    fn vector(bytes: [u8; BLOCK]) -> __m256i {
        // SAFETY: as above.
        unsafe { std::mem::transmute(bytes) }
    }

    /// How many of these integers each of some numbers is not less than, of whose halves, rounded to integers, the first are rounded down
    /// and the second up.
    #[inline(always)]
    pub fn count_halves(self, [down, up]: [__m256i; 2], integers: &[i16; 15]) -> __m256i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let mut count = a._mm256_setzero_si256();
        for &integer in integers {
            let halves = if integer % 2 == 0 { down } else { up };
            let below = ((integer + (integer & 1)) / 2 - 1) as i8;
            count = a2._mm256_sub_epi8(count, a2._mm256_cmpgt_epi8(halves, a._mm256_set1_epi8(below)));
        }
        count
    }

    /// Numbers up to 15, with the bits of `flip` inverted, two to a word: the first in the low half of the low byte, or with `swapped` in its
    /// high half.
    #[inline(always)]
    pub fn nibble_pairs(self, numbers: __m256i, flip: __m256i, swapped: bool) -> __m256i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let numbers = a2._mm256_xor_si256(a2._mm256_min_epu8(numbers, a._mm256_set1_epi8(15)), flip);
        a2._mm256_maddubs_epi16(numbers, a._mm256_set1_epi16(if swapped { 0x0110 } else { 0x1001 }))
    }

    /// The bytes that were packed from four vectors, in the order of their lanes.
    #[inline(always)]
    fn in_order(self, bytes: __m256i) -> __m256i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // A pack takes four lanes of each of its operands in turns.
        a2._mm256_permutevar8x32_epi32(bytes, a._mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
    }

    /// The numbers of a block's nibbles.
    ///
    /// # Safety
    /// Sixteen bytes are readable.
    #[inline(always)]
    unsafe fn nibbles(self, p: *const u8) -> __m256i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // SAFETY: the caller's.
        let bytes = a2._mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(p.cast()) });
        let halves = a2._mm256_srlv_epi64(bytes, a._mm256_setr_epi64x(0, 0, 4, 4));
        a2._mm256_and_si256(halves, a._mm256_set1_epi8(15))
    }

    /// Numbers with the bits as their fifth ones, that of byte i bit i.
    #[inline(always)]
    pub fn with_fifth_bits(self, numbers: __m256i, bits: u32) -> __m256i {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // The byte of the bit in each byte, then the bit.
        let bytes = a._mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bits = a2._mm256_shuffle_epi8(a._mm256_set1_epi32(bits as i32), bytes);
        let bit = a._mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = a2._mm256_cmpeq_epi8(a2._mm256_and_si256(bits, bit), bit);
        a2._mm256_or_si256(numbers, a2._mm256_and_si256(set, a._mm256_set1_epi8(16)))
    }

    /// The entries of a table with these numbers from 0 to 15.
    #[inline(always)]
    fn entries(self, numbers: __m256i, table: &[i8; 16]) -> __m256i {
        // SAFETY: the table is 16 bytes; the token proves SSE2.
        let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
        self.0.avx2._mm256_shuffle_epi8(self.0.avx2._mm256_broadcastsi128_si256(table), numbers)
    }

    /// The bytes from `at` on, 0 or 16, as floats.
    #[inline(always)]
    fn floats(self, bytes: __m256i, at: usize) -> [__m256; 2] {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let half = if at < 16 { a._mm256_castsi256_si128(bytes) } else { a2._mm256_extracti128_si256::<1>(bytes) };
        // SAFETY: the token proves SSE2.
        let upper = unsafe { _mm_unpackhi_epi64(half, half) };
        [a._mm256_cvtepi32_ps(a2._mm256_cvtepi8_epi32(half)), a._mm256_cvtepi32_ps(a2._mm256_cvtepi8_epi32(upper))]
    }

    #[inline(always)]
    fn widen_bf16(self, v: __m128i) -> __m256 {
        let a2 = self.0.avx2;
        self.0.avx._mm256_castsi256_ps(a2._mm256_slli_epi32::<16>(a2._mm256_cvtepu16_epi32(v)))
    }
}

const TO_NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const TILE_VECTORS: usize = 2;
    const ROW_SCORES: bool = true;
    const PARALLEL_DOTS: usize = 8;
    const DIRECT_DIM: usize = 512;
    const DIRECT_ROWS: usize = 16;
    const WIDENS_ONCE: bool = true;
    const NARROW_LOOPS: bool = true;
    const DEINTERLEAVED_BF16: bool = true;
    const E4M3_FRACTION: f32 = 256.0;
    const WRITES_SEVERAL: bool = true;

    level_features!(Avx2, outline! {});

    #[inline(always)]
    fn lane_order(i: usize) -> usize {
        // The three bits of the index reversed, because the tree adds lanes at distances 4, 2 and 1.
        (i & 1) << 2 | (i & 2) | (i & 4) >> 2
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        self.0.avx._mm256_set1_ps(x)
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        self.0.avx._mm256_add_ps(a, b)
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        self.0.avx._mm256_sub_ps(a, b)
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        self.0.avx._mm256_mul_ps(a, b)
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        self.0.avx._mm256_div_ps(a, b)
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        self.0.fma._mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        self.0.avx._mm256_max_ps(a, b)
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        self.0.avx._mm256_min_ps(a, b)
    }
    #[inline(always)]
    fn select_lt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        let v = self.0.avx;
        v._mm256_blendv_ps(y, x, v._mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
    }
    #[inline(always)]
    fn clear_lt(self, a: __m256, b: __m256, x: __m256) -> __m256 {
        // Compilers turn a blend with zeros into two instructions.
        let v = self.0.avx;
        v._mm256_andnot_ps(v._mm256_cmp_ps::<_CMP_LT_OQ>(a, b), x)
    }
    #[inline(always)]
    fn lt_bits(self, a: __m256, b: __m256) -> u64 {
        let v = self.0.avx;
        v._mm256_movemask_ps(v._mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) as u64
    }
    #[inline(always)]
    fn select_bits(self, bits: u64, x: __m256, y: __m256) -> __m256 {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let each = a._mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let set = a2._mm256_and_si256(a._mm256_set1_epi32(bits as u8 as i32), each);
        a._mm256_blendv_ps(y, x, a._mm256_castsi256_ps(a2._mm256_cmpeq_epi32(set, each)))
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        self.0.avx._mm256_andnot_ps(self.splat(-0.0), a)
    }
    #[inline(always)]
    fn copysign(self, a: __m256, b: __m256) -> __m256 {
        let (v, sign) = (self.0.avx, self.splat(-0.0));
        v._mm256_or_ps(v._mm256_andnot_ps(sign, a), v._mm256_and_ps(sign, b))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        self.0.avx._mm256_round_ps::<TO_NEAREST>(a)
    }
    #[inline(always)]
    fn exp2i(self, n: __m256) -> __m256 {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let shifted = a2._mm256_slli_epi32::<23>(a._mm256_castps_si256(n));
        a._mm256_castsi256_ps(a2._mm256_add_epi32(a._mm256_castps_si256(self.splat(1.0)), shifted))
    }
    #[inline(always)]
    fn swap_pairs(self, a: __m256) -> __m256 {
        self.0.avx._mm256_permute_ps::<0b10_11_00_01>(a)
    }
    #[inline(always)]
    fn add_bits(self, a: __m256, b: __m256) -> __m256 {
        let (a1, a2) = (self.0.avx, self.0.avx2);
        a1._mm256_castsi256_ps(a2._mm256_add_epi32(a1._mm256_castps_si256(a), a1._mm256_castps_si256(b)))
    }
    #[inline(always)]
    fn and_bits(self, a: __m256, b: __m256) -> __m256 {
        self.0.avx._mm256_and_ps(a, b)
    }
    #[inline(always)]
    fn shift_bits(self, a: __m256, n: u32) -> __m256 {
        let (a1, a2) = (self.0.avx, self.0.avx2);
        a1._mm256_castsi256_ps(a2._mm256_srlv_epi32(a1._mm256_castps_si256(a), a1._mm256_set1_epi32(n as i32)))
    }
    #[inline(always)]
    fn deinterleave(self, a: __m256, b: __m256) -> [__m256; 2] {
        let (v, a2) = (self.0.avx, self.0.avx2);
        // Puts [a b | a b], in pairs of lanes, in order.
        let even = v._mm256_castps_pd(v._mm256_shuffle_ps::<0b10_00_10_00>(a, b));
        let odd = v._mm256_castps_pd(v._mm256_shuffle_ps::<0b11_01_11_01>(a, b));
        [
            v._mm256_castpd_ps(a2._mm256_permute4x64_pd::<0b11_01_10_00>(even)),
            v._mm256_castpd_ps(a2._mm256_permute4x64_pd::<0b11_01_10_00>(odd)),
        ]
    }
    #[inline(always)]
    fn interleave(self, even: __m256, odd: __m256) -> [__m256; 2] {
        let v = self.0.avx;
        let (low, high) = (v._mm256_unpacklo_ps(even, odd), v._mm256_unpackhi_ps(even, odd));
        [v._mm256_permute2f128_ps::<0x20>(low, high), v._mm256_permute2f128_ps::<0x31>(low, high)]
    }
    #[inline(always)]
    fn sums_and_differences(self, a: __m256, b: __m256) -> [__m256; 2] {
        let (v, a2) = (self.0.avx, self.0.avx2);
        let both = |[a, b]: [__m256; 2]| [v._mm256_add_ps(a, b), v._mm256_sub_ps(a, b)];
        // The lowest bit of a lane becomes that of the vector, and that of the vector the higher one of a lane.
        let even_and_odd = |[a, b]: [__m256; 2]| {
            [v._mm256_shuffle_ps::<0b10_00_10_00>(a, b), v._mm256_shuffle_ps::<0b11_01_11_01>(a, b)]
        };
        let x = both(even_and_odd(both(even_and_odd([a, b]))));
        let lanes = [v._mm256_permute2f128_ps::<0x20>(x[0], x[1]), v._mm256_permute2f128_ps::<0x31>(x[0], x[1])];
        // Bits are where they were, but for that of the lane and the higher one of its elements.
        both(even_and_odd(both(lanes)))
            .map(|x| v._mm256_castpd_ps(a2._mm256_permute4x64_pd::<0b11_01_10_00>(v._mm256_castps_pd(x))))
    }
    #[inline(always)]
    fn add_squares(self, v: __m256, sums: &mut [f64; MAX_LANES], first: usize) {
        let a = self.0.avx;
        let halves = [a._mm256_castps256_ps128(v), a._mm256_extractf128_ps::<1>(v)];
        for (half, sums) in halves.into_iter().zip(sums[first..first + 8].as_chunks_mut::<4>().0) {
            let x = a._mm256_cvtps_pd(half);
            // SAFETY: four sums; the token proves FMA. A square is exact, so that one rounding is left either way.
            unsafe { _mm256_storeu_pd(sums.as_mut_ptr(), _mm256_fmadd_pd(x, x, _mm256_loadu_pd(sums.as_ptr()))) };
        }
    }
    #[inline(always)]
    fn sum_lanes(self, v: &[__m256; MAX_LANES]) -> __m256 {
        let mut halves = [v[0]; MAX_LANES / 2];
        for i in 0..4 {
            halves[i] = self.half_sums(v[i], v[i + 4]);
        }
        self.sum_halves(&halves)
    }
    // Each step of the tree halves the number of vectors: lanes with the bit clear continue with the first, the others with the second.
    #[inline(always)]
    fn half_sums(self, x: __m256, y: __m256) -> __m256 {
        let a = self.0.avx;
        a._mm256_add_ps(a._mm256_blend_ps::<0xf0>(x, y), a._mm256_permute2f128_ps::<0x21>(x, y))
    }
    #[inline(always)]
    fn sum_halves(self, v: &[__m256; MAX_LANES / 2]) -> __m256 {
        let a = self.0.avx;
        let mut w = [v[0], v[1], v[2], v[3]];
        for i in 0..2 {
            let (x, y) = (w[i], w[i + 2]);
            w[i] = a._mm256_add_ps(a._mm256_blend_ps::<0xcc>(x, y), a._mm256_shuffle_ps::<0b01_00_11_10>(x, y));
        }
        let swapped = a._mm256_permute_ps::<0b10_11_00_01>(a._mm256_blend_ps::<0xaa>(w[1], w[0]));
        a._mm256_add_ps(a._mm256_blend_ps::<0xaa>(w[0], w[1]), swapped)
    }
    #[inline(always)]
    fn sum_lanes_of_four(self, v: [__m256; 4]) -> __m256 {
        let (a, sse) = (self.0.avx, self.0.sse);
        // As `sum_lanes`, whose every step would take each vector twice.
        let (x, y) = (self.half_sums(v[0], v[2]), self.half_sums(v[1], v[3]));
        let pairs = a._mm256_add_ps(a._mm256_blend_ps::<0xcc>(x, y), a._mm256_shuffle_ps::<0b01_00_11_10>(x, y));
        let twice = a._mm256_add_ps(pairs, a._mm256_permute_ps::<0b10_11_00_01>(pairs));
        let (low, high) = (a._mm256_castps256_ps128(twice), a._mm256_extractf128_ps::<1>(twice));
        a._mm256_castps128_ps256(sse._mm_shuffle_ps::<0b10_00_10_00>(low, high))
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        let (v, sse) = (self.0.avx, self.0.sse);
        let m = sse._mm_max_ps(v._mm256_castps256_ps128(a), v._mm256_extractf128_ps::<1>(a));
        let m = sse._mm_max_ps(m, sse._mm_movehl_ps(m, m));
        let m = sse._mm_max_ss(m, self.0.sse3._mm_movehdup_ps(m));
        sse._mm_cvtss_f32(m)
    }
    #[inline(always)]
    fn max_bits(self, a: __m256, b: __m256) -> __m256 {
        let (a1, a2) = (self.0.avx, self.0.avx2);
        a1._mm256_castsi256_ps(a2._mm256_max_epi32(a1._mm256_castps_si256(a), a1._mm256_castps_si256(b)))
    }
    #[inline(always)]
    fn fold_lanes<F: Fold>(self, v: &[__m256; MAX_LANES]) -> __m256 {
        let a = self.0.avx;
        // The tree of `sum_lanes`.
        let mut w = [v[0]; 4];
        for i in 0..4 {
            let (x, y) = (v[i], v[i + 4]);
            w[i] = F::of(self, a._mm256_blend_ps::<0xf0>(x, y), a._mm256_permute2f128_ps::<0x21>(x, y));
        }
        for i in 0..2 {
            let (x, y) = (w[i], w[i + 2]);
            w[i] = F::of(self, a._mm256_blend_ps::<0xcc>(x, y), a._mm256_shuffle_ps::<0b01_00_11_10>(x, y));
        }
        let swapped = a._mm256_permute_ps::<0b10_11_00_01>(a._mm256_blend_ps::<0xaa>(w[1], w[0]));
        F::of(self, a._mm256_blend_ps::<0xaa>(w[0], w[1]), swapped)
    }
    #[inline(always)]
    fn all_finite(self, a: __m256) -> bool {
        let v = self.0.avx;
        let finite = v._mm256_cmp_ps::<_CMP_LT_OQ>(self.abs(a), self.splat(f32::INFINITY));
        v._mm256_movemask_ps(finite) == 0xff
    }
    #[inline(always)]
    fn transpose(self, v: &mut [__m256; MAX_LANES]) {
        let a = self.0.avx;
        let mut t = *v;
        for i in 0..4 {
            t[2 * i] = a._mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
            t[2 * i + 1] = a._mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..2 {
            let [p, q, r, s] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
            u[4 * i] = a._mm256_shuffle_ps::<0b01_00_01_00>(p, r);
            u[4 * i + 1] = a._mm256_shuffle_ps::<0b11_10_11_10>(p, r);
            u[4 * i + 2] = a._mm256_shuffle_ps::<0b01_00_01_00>(q, s);
            u[4 * i + 3] = a._mm256_shuffle_ps::<0b11_10_11_10>(q, s);
        }
        for c in 0..4 {
            v[c] = a._mm256_permute2f128_ps::<0x20>(u[c], u[4 + c]);
            v[4 + c] = a._mm256_permute2f128_ps::<0x31>(u[c], u[4 + c]);
        }
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m256 {
        // SAFETY: the caller's; the token proves F16C.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: the caller's.
        self.widen_bf16(unsafe { _mm_loadu_si128(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_pair_bf16(self, p: *const bf16) -> [__m256; 2] {
        let (v, a2) = (self.0.avx, self.0.avx2);
        // SAFETY: the caller's.
        let pairs = unsafe { _mm256_loadu_si256(p.cast()) };
        // A bf16 is the upper half of an f32.
        let odd = a2._mm256_and_si256(pairs, v._mm256_set1_epi32(0xffff_0000_u32 as i32));
        [v._mm256_castsi256_ps(a2._mm256_slli_epi32::<16>(pairs)), v._mm256_castsi256_ps(odd)]
    }
    #[inline(always)]
    unsafe fn load_half_bf16(self, p: *const bf16, half: usize) -> __m256 {
        /// A vector at any address.
        #[derive(Clone, Copy)]
        #[repr(C, packed)]
        struct Unaligned(__m256i);
        let (v, a2) = (self.0.avx, self.0.avx2);
        // SAFETY: the caller's. Volatile, or compilers would load once for both halves.
        let Unaligned(pairs) = unsafe { p.cast::<Unaligned>().read_volatile() };
        v._mm256_castsi256_ps(if half == 0 {
            a2._mm256_slli_epi32::<16>(pairs)
        } else {
            a2._mm256_and_si256(pairs, v._mm256_set1_epi32(0xffff_0000_u32 as i32))
        })
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
    unsafe fn load_part_f32(self, p: *const f32, n: usize) -> __m256 {
        // SAFETY: masked-off lanes are not accessed.
        unsafe { _mm256_maskload_ps(p, Self::prefix(n)) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> __m256 {
        // SAFETY: eight bytes are readable.
        let bytes = unsafe { _mm_loadl_epi64(p.cast()) };
        self.0.avx._mm256_cvtepi32_ps(self.0.avx2._mm256_cvtepi8_epi32(bytes))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> __m256 {
        // SAFETY: eight bytes are readable.
        let bytes = unsafe { _mm_loadl_epi64(p.cast()) };
        self.0.avx._mm256_cvtepi32_ps(self.0.avx2._mm256_cvtepu8_epi32(bytes))
    }
    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m256 {
        // SAFETY: the token proves F16C.
        unsafe { _mm256_cvtph_ps(_mm_set1_epi16(x.to_bits() as i16)) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8, at: usize) -> __m256 {
        // SAFETY: sixteen bytes are readable, of which eight are read; the token proves AVX2.
        unsafe {
            // Both halves of bytes are of the same lanes, so that compilers widen them once.
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(at % 16).cast()));
            _mm256_cvtepi32_ps(if at < 16 {
                _mm256_and_si256(bytes, _mm256_set1_epi32(15))
            } else {
                _mm256_srli_epi32::<4>(bytes)
            })
        }
    }
    #[inline(always)]
    unsafe fn load_nibble_pairs(self, p: *const u8, swapped: bool) -> [__m256; 2] {
        let mut x = [self.zero(); 2];
        // SAFETY: eight bytes are readable; the token proves AVX2.
        unsafe {
            // Numbers of a vector are a word of 32 bits, which every lane shifts by its own count.
            let counts = if swapped {
                _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24)
            } else {
                _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)
            };
            for (i, x) in x.iter_mut().enumerate() {
                let word = _mm256_set1_epi32(p.cast::<i32>().add(i).read_unaligned());
                *x = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(word, counts), _mm256_set1_epi32(15)));
            }
        }
        x
    }
    #[inline(always)]
    unsafe fn load_pair_fives(self, p: *const u8, fifth: u32, at: usize) -> [__m256; 2] {
        // SAFETY: the caller's.
        self.floats(self.with_fifth_bits(unsafe { self.nibbles(p) }, fifth), at)
    }
    #[inline(always)]
    unsafe fn look_up_pair(self, p: *const u8, at: usize, table: &[i8; 16]) -> [__m256; 2] {
        // SAFETY: the caller's.
        self.floats(self.entries(unsafe { self.nibbles(p) }, table), at)
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const E4m3) -> __m256 {
        // SAFETY: the caller's.
        self.mul(unsafe { self.load_e4m3_fraction(p.cast()) }, self.splat(Self::E4M3_FRACTION))
    }
    #[inline(always)]
    unsafe fn load_e4m3_fraction(self, p: *const E4m3Fraction) -> __m256 {
        // SAFETY: eight bytes are readable; the token proves AVX2 and F16C.
        unsafe {
            // The sign in bit 15 and the magnitude in the bits 7 to 13 are an f16 of a 256th; bit 14 is a copy of the sign.
            let half = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(_mm_loadl_epi64(p.cast())));
            // The largest magnitude is NaN. It alone carries into bit 14, which becomes 1 then, as all of the exponent, and otherwise 0.
            let carry = _mm_and_si128(_mm_add_epi16(half, _mm_set1_epi16(0x80)), _mm_set1_epi16(0x4000));
            _mm256_cvtph_ps(_mm_xor_si128(half, carry))
        }
    }
    #[inline(always)]
    unsafe fn load_pair_e4m3_fraction(self, p: *const E4m3Fraction) -> [__m256; 2] {
        // SAFETY: sixteen bytes are readable; the token proves AVX2 and F16C.
        unsafe {
            let half = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())));
            // As above.
            let carry = _mm256_and_si256(_mm256_add_epi16(half, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
            let half = _mm256_xor_si256(half, carry);
            [_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half))]
        }
    }
    #[inline(always)]
    unsafe fn load_e5m2(self, p: *const E5m2) -> __m256 {
        // SAFETY: eight bytes are readable; the token proves F16C. An E5M2 is the upper half of an f16.
        unsafe { _mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, p: *mut u8, v: __m256) {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let words = a2._mm256_packs_epi32(a._mm256_castps_si256(v), a._mm256_setzero_si256());
        let words = a._mm256_castsi256_si128(a2._mm256_permute4x64_epi64::<0b11_01_10_00>(words));
        // SAFETY: eight bytes are writable.
        unsafe { _mm_storel_epi64(p.cast(), _mm_packus_epi16(words, words)) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m256) {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // The rounding mode is to nearest, ties to even; Rust programs do not change it.
        let words = a2._mm256_packs_epi32(a._mm256_cvtps_epi32(v), a._mm256_setzero_si256());
        let words = a._mm256_castsi256_si128(a2._mm256_permute4x64_epi64::<0b11_01_10_00>(words));
        // SAFETY: eight bytes are writable.
        unsafe { _mm_storel_epi64(p.cast(), _mm_packs_epi16(words, words)) }
    }
    #[inline(always)]
    unsafe fn store_four_i8(self, p: *mut i8, v: [__m256; 4]) {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // The rounding mode as above.
        let [x, y, z, w] = v.map(|v| a._mm256_cvtps_epi32(v));
        let bytes = a2._mm256_packs_epi16(a2._mm256_packs_epi32(x, y), a2._mm256_packs_epi32(z, w));
        // SAFETY: 32 bytes are writable.
        unsafe { _mm256_storeu_si256(p.cast(), self.in_order(bytes)) }
    }
    #[inline(always)]
    unsafe fn store_halves_away(self, p: *mut i8, v: &BlockVectors<Self>) {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let [x, y, z, w] = [v[0], v[1], v[2], v[3]].map(|v| a._mm256_cvttps_epi32(v));
        let words = [a2._mm256_packs_epi32(x, y), a2._mm256_packs_epi32(z, w)];
        // The average with 0 is rounded up.
        let [low, high] = words.map(|words| {
            let away = a2._mm256_avg_epu16(a2._mm256_abs_epi16(words), a._mm256_setzero_si256());
            a2._mm256_sign_epi16(away, words)
        });
        // SAFETY: 32 bytes are writable.
        unsafe { _mm256_storeu_si256(p.cast(), self.in_order(a2._mm256_packs_epi16(low, high))) }
    }
    #[inline(always)]
    fn cut_block(self, v: &BlockVectors<Self>, most: u8) -> [u8; BLOCK] {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let [x, y, z, w] = [v[0], v[1], v[2], v[3]].map(|v| a._mm256_cvttps_epi32(v));
        let bytes = a2._mm256_packus_epi16(a2._mm256_packs_epi32(x, y), a2._mm256_packs_epi32(z, w));
        Self::array(a2._mm256_min_epu8(self.in_order(bytes), a._mm256_set1_epi8(most as i8)))
    }
    #[inline(always)]
    fn count_reached(self, v: &BlockVectors<Self>, integers: &[i16; 15]) -> [u8; BLOCK] {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let [x, y, z, w] = [v[0], v[1], v[2], v[3]]
            .map(|v| a._mm256_cvtps_epi32(a._mm256_round_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(v)));
        let words = [a2._mm256_packs_epi32(x, y), a2._mm256_packs_epi32(z, w)];
        // Halves rounded down reach what half of an even integer reaches, and halves rounded up what half of an odd one does, rounded up.
        let [x, y] = words.map(|words| a2._mm256_srai_epi16::<1>(words));
        let [z, w] = words.map(|words| a2._mm256_srai_epi16::<1>(a2._mm256_sub_epi16(words, a._mm256_set1_epi16(-1))));
        let halves = [a2._mm256_packs_epi16(x, y), a2._mm256_packs_epi16(z, w)];
        Self::array(self.in_order(self.count_halves(halves, integers)))
    }
    #[inline(always)]
    fn look_up_bytes(self, numbers: [u8; BLOCK], table: &[i8; 16]) -> [i8; BLOCK] {
        Self::array(self.entries(Self::vector(numbers), table)).map(|entry| entry as i8)
    }
    #[inline(always)]
    fn low_halves(self, bytes: [u8; BLOCK]) -> [u8; BLOCK / 2] {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let numbers = a2._mm256_and_si256(Self::vector(bytes), a._mm256_set1_epi8(15));
        let high =
            a._mm256_castsi256_si128(a2._mm256_slli_epi16::<4>(a2._mm256_permute4x64_epi64::<0b11_10_11_10>(numbers)));
        // SAFETY: the token proves SSE2; both are 16 bytes.
        unsafe { std::mem::transmute(_mm_or_si128(a._mm256_castsi256_si128(numbers), high)) }
    }
    #[inline(always)]
    fn fifth_bits(self, bytes: [u8; BLOCK]) -> u32 {
        let a2 = self.0.avx2;
        a2._mm256_movemask_epi8(a2._mm256_slli_epi16::<3>(Self::vector(bytes))) as u32
    }
    #[inline(always)]
    unsafe fn store_fp8<U: Fp8>(self, p: *mut u8, magnitudes: &BlockVectors<Self>, signs: &BlockVectors<Self>) {
        let (a, a2) = (self.0.avx, self.0.avx2);
        // A power of two whose last place is that of a unit is added, which rounds, and is taken off the pattern, which leaves the number of
        // last places: the unit, but for its exponent.
        let (power, least) = (self.splat((1 << U::SHIFT) as f32), self.splat(U::MIN_NORMAL));
        let unbiased = (U::SHIFT << 23) + ((U::BIAS + 1) << (23 - U::SHIFT));
        let (x, y) = (magnitudes, signs);
        let mut words = [a._mm256_setzero_si256(); 4];
        for (word, &x) in words.iter_mut().zip(x) {
            let exponent = a._mm256_and_ps(x, self.splat(f32::INFINITY));
            let exponent = self.max_bits(exponent, least);
            let sum = a._mm256_castps_si256(self.fma(exponent, power, x));
            let biased = a._mm256_castps_si256(self.shift_bits(exponent, U::SHIFT));
            let last = a2._mm256_sub_epi32(sum, a._mm256_castps_si256(exponent));
            *word = a2._mm256_sub_epi32(a2._mm256_add_epi32(last, biased), a._mm256_set1_epi32(unbiased as i32));
        }
        // NaN becomes a negative number, which is a large one without a sign.
        let words = [a2._mm256_packs_epi32(words[0], words[1]), a2._mm256_packs_epi32(words[2], words[3])]
            .map(|words| a2._mm256_min_epu16(words, a._mm256_set1_epi16(0x7f)));
        let units = a2._mm256_packus_epi16(words[0], words[1]);
        let [s, t, u, v] = [y[0], y[1], y[2], y[3]].map(|y| a._mm256_castps_si256(y));
        let signs = a2._mm256_packs_epi16(a2._mm256_packs_epi32(s, t), a2._mm256_packs_epi32(u, v));
        let signs = a2._mm256_and_si256(signs, a._mm256_set1_epi8(i8::MIN));
        let nan = a2._mm256_cmpeq_epi8(units, a._mm256_set1_epi8(0x7f));
        let units = a2._mm256_or_si256(units, a2._mm256_andnot_si256(nan, signs));
        // SAFETY: 32 bytes are writable.
        unsafe { _mm256_storeu_si256(p.cast(), self.in_order(units)) }
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
        let (a, a2) = (self.0.avx, self.0.avx2);
        let [x, y, z, w] = [v[0], v[1], v[2], v[3]].map(|v| a._mm256_cvtps_epi32(v));
        let [low, high] = [a2._mm256_packs_epi32(x, y), a2._mm256_packs_epi32(z, w)]
            .map(|words| a2._mm256_adds_epi16(words, a._mm256_set1_epi16(bias)));
        let numbers = a2._mm256_packus_epi16(low, high);
        let flip = a._mm256_set1_epi8(flip as i8);
        if BITS == 8 {
            // SAFETY: 32 bytes are writable.
            unsafe { _mm256_storeu_si256(p.cast(), self.in_order(a2._mm256_xor_si256(numbers, flip))) };
            return;
        }
        let pairs = self.nibble_pairs(numbers, flip, swapped);
        let bytes = a2._mm256_packus_epi16(pairs, pairs);
        let high = a2._mm256_extracti128_si256::<1>(bytes);
        // SAFETY: 16 bytes are writable; the token proves SSE2. A pack took four lanes of each vector.
        unsafe { _mm_storeu_si128(p.cast(), _mm_unpacklo_epi16(a._mm256_castsi256_si128(bytes), high)) };
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: __m256) {
        // SAFETY: the caller's; the token proves F16C.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: __m256) {
        // SAFETY: the caller's.
        unsafe { _mm_storeu_si128(p.cast(), self.round_bf16(v)) }
    }
    #[inline(always)]
    unsafe fn store_four_f16(self, p: *mut f16, v: [__m256; 4]) {
        for (i, v) in v.as_chunks::<2>().0.iter().enumerate() {
            // SAFETY: the caller's; the token proves F16C. A store of what is converted takes more than that of a whole vector.
            unsafe {
                let [low, high] = v.map(|v| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
                _mm256_storeu_si256(p.add(16 * i).cast(), _mm256_set_m128i(high, low));
            }
        }
    }
    #[inline(always)]
    unsafe fn store_four_bf16(self, p: *mut bf16, v: [__m256; 4]) {
        let (a, a2) = (self.0.avx, self.0.avx2);
        let nan = |x, y| a._mm256_cmp_ps::<_CMP_UNORD_Q>(x, y);
        if a._mm256_movemask_ps(a._mm256_or_ps(nan(v[0], v[1]), nan(v[2], v[3]))) != 0 {
            for (i, v) in v.into_iter().enumerate() {
                // SAFETY: the caller's.
                unsafe { self.store_bf16(p.add(8 * i), v) };
            }
            return;
        }
        for (i, v) in v.as_chunks::<2>().0.iter().enumerate() {
            let [x, y] = v.map(|v| a2._mm256_srli_epi32::<16>(self.rounded_short(v)));
            let words = a2._mm256_permute4x64_epi64::<0b11_01_10_00>(a2._mm256_packus_epi32(x, y));
            // SAFETY: the caller's.
            unsafe { _mm256_storeu_si256(p.add(16 * i).cast(), words) };
        }
    }
    #[inline(always)]
    unsafe fn store_pair_bf16(self, p: *mut bf16, [even, odd]: [__m256; 2]) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(p.cast(), self.upper_halves(self.rounded_bf16(even), self.rounded_bf16(odd))) }
    }
    #[inline(always)]
    unsafe fn store_pair_bf16_short(self, p: *mut bf16, [even, odd]: [__m256; 2]) {
        // SAFETY: the caller's.
        unsafe { _mm256_storeu_si256(p.cast(), self.upper_halves(self.rounded_short(even), self.rounded_short(odd))) }
    }
    #[inline(always)]
    unsafe fn store_part_f32(self, p: *mut f32, v: __m256, n: usize) {
        // SAFETY: masked-off lanes are not accessed.
        unsafe { _mm256_maskstore_ps(p, Self::prefix(n), v) }
    }
}

level_features!(Avx2, kernel_shells! { Avx2 });
kernel_table!(Avx2);
