//! Instructions of AVX512-BF16, and their emulation.
//!
//! Whatever MXCSR says, both take subnormal inputs as zeros, round to the nearest, ties to even, and flush subnormal results to
//! zeros.

use std::arch::x86_64::*;

/// `sum[i] + a[2 i + 1] * b[2 i + 1] + a[2 i] * b[2 i]`, in this order: two fused multiply-adds, each rounded once.
///
/// # Safety
/// The level is available.
#[inline(always)]
pub(super) unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    #[cfg(not(kvlane_emulate_avx512bf16))]
    // SAFETY: the caller's; the types have the same bits.
    unsafe {
        _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
    }
    #[cfg(kvlane_emulate_avx512bf16)]
    // SAFETY: the caller's.
    unsafe {
        emulated::dot(sum, a, b)
    }
}

/// Thirty-two numbers to the nearest bf16, ties to even.
///
/// # Safety
/// The level is available.
#[inline(always)]
pub(in crate::kernels) unsafe fn round(low: __m512, high: __m512) -> __m512i {
    #[cfg(not(any(kvlane_emulate_avx512bf16, kvlane_emulate_amx)))]
    // SAFETY: the caller's; the types have the same bits.
    unsafe {
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
    #[cfg(any(kvlane_emulate_avx512bf16, kvlane_emulate_amx))]
    // SAFETY: the caller's.
    unsafe {
        emulated::round(low, high)
    }
}

/// The same by instructions of AVX-512. Payloads of NaN can differ.
#[cfg(any(test, kvlane_emulate_avx512bf16, kvlane_emulate_amx))]
mod emulated {
    use std::arch::x86_64::*;

    /// Subnormal numbers as zeros of their sign.
    #[inline(always)]
    unsafe fn flush(x: __m512) -> __m512 {
        // SAFETY: AVX-512, as for all of this module.
        unsafe {
            let sign = _mm512_castps_si512(_mm512_set1_ps(-0.0));
            let subnormal = _mm512_fpclass_ps_mask::<0x20>(x);
            _mm512_castsi512_ps(_mm512_mask_and_epi32(_mm512_castps_si512(x), subnormal, _mm512_castps_si512(x), sign))
        }
    }

    /// `a * b + sum`.
    #[cfg(any(test, kvlane_emulate_avx512bf16))]
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { flush(_mm512_fmadd_ps(flush(a), flush(b), flush(sum))) }
    }

    /// # Safety
    /// AVX-512 is available.
    #[cfg(any(test, kvlane_emulate_avx512bf16))]
    #[inline(always)]
    pub unsafe fn dot(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let odd = |x| _mm512_castsi512_ps(_mm512_and_si512(x, upper));
            let even = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
            multiply_add(even(a), even(b), multiply_add(odd(a), odd(b), sum))
        }
    }

    /// # Safety
    /// AVX-512 is available.
    #[inline(always)]
    pub unsafe fn round(low: __m512, high: __m512) -> __m512i {
        // SAFETY: the caller's.
        unsafe {
            let words = [low, high].map(|x| {
                let bits = _mm512_castps_si512(flush(x));
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                // A NaN keeps its upper half and becomes quiet.
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                let rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000));
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
            });
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(words[0]), words[1])
        }
    }
}

#[cfg(all(test, not(kvlane_emulate_avx512bf16)))]
mod tests {
    use super::*;
    use crate::isa::Isa;

    /// Numbers of few bits and near the ends of the range are as likely as others.
    fn numbers(state: &mut u64) -> [u32; 16] {
        std::array::from_fn(|_| {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            let x = (*state >> 16) as u32;
            match *state % 8 {
                0 => x & 0x80ff_80ff | 0x3f00_3f00,
                1 => x & 0x83ff_83ff | 0x3c00_3c00,
                2 => x & 0x80ff_80ff | 0x2000_1f00,
                3 => x & 0x81ff_81ff,
                4 => x & 0x807f_807f,
                5 => x & 0x8000_ffff | 0x7f80_0000,
                6 => x & 0xffff_8000 | 0x7f80,
                _ => x,
            }
        })
    }

    fn assert_same(emulated: f32, got: f32, what: impl Fn() -> String) {
        let same = emulated.to_bits() == got.to_bits() || emulated.is_nan() && got.is_nan();
        assert!(same, "{}: emulated {:08x}, by the instruction {:08x}", what(), emulated.to_bits(), got.to_bits());
    }

    /// Both instructions with the arguments given, and their emulations.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn both(sum: __m512, a: __m512i, b: __m512i) -> [[[f32; 16]; 2]; 2] {
        // SAFETY: the caller has checked for the features; all have 64 bytes.
        unsafe {
            let floats = |x: __m512i| {
                // The sixteen rounded numbers of either half as f32.
                let x: [u16; 32] = std::mem::transmute(x);
                [0, 16].map(|first| std::array::from_fn(|i| f32::from_bits(u32::from(x[first + i]) << 16)))
            };
            let (low, high) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
            let rounded = [round(low, high), emulated::round(low, high)].map(floats);
            let dots = [dot(sum, a, b), emulated::dot(sum, a, b)].map(|x| std::mem::transmute::<__m512, [f32; 16]>(x));
            let halves = [0, 1].map(|half| rounded.map(|rounded| rounded[half]));
            for half in &halves[1] {
                assert!(half.len() == 16);
            }
            for (got, want) in halves[1][0].iter().zip(&halves[1][1]) {
                assert_same(*want, *got, || "upper half".into());
            }
            [dots, halves[0]]
        }
    }

    #[test]
    fn emulation_has_the_bits_of_the_instructions() {
        if !Isa::Avx512Bf16.is_available() {
            return;
        }
        let mut state = 88_172_645_463_325_252;
        for _ in 0..200_000 {
            let [s, a, b] = [(); 3].map(|()| numbers(&mut state));
            // SAFETY: the level is available; all types have 64 bytes.
            let [dots, rounded] = unsafe {
                both(
                    std::mem::transmute::<[u32; 16], __m512>(s),
                    std::mem::transmute::<[u32; 16], __m512i>(a),
                    std::mem::transmute::<[u32; 16], __m512i>(b),
                )
            };
            for i in 0..16 {
                assert_same(dots[1][i], dots[0][i], || format!("{:08x} + {:08x} * {:08x}", s[i], a[i], b[i]));
                assert_same(rounded[1][i], rounded[0][i], || format!("rounded {:08x}", a[i]));
            }
        }
    }
}
