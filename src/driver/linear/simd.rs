//! The operations of a vector unit on sixteen lanes.

use half::f16;

use super::tiles::{ROWS, VECTOR};

/// What the kernels need of a vector unit. A value of a type that implements it means nothing by itself; every method
/// needs the CPU's features.
///
/// # Safety
/// Pointers are to 64 bytes (`load`), 16 halves, 16 bytes or 16 floats; alignment does not matter.
pub(super) trait Simd: Copy {
    /// 64 bytes: four of each of 16 rows.
    type Bytes: Copy;
    /// 16 32-bit integers.
    type Ints: Copy;
    /// 16 floats.
    type Floats: Copy;
    /// The most rows that are multiplied at once: 1, 4 or 8.
    const MOST: usize;

    unsafe fn load(self, p: *const u8) -> Self::Bytes;
    /// Bits `from..from + n` of every byte, moved to bit `to`; `n` is below 8.
    unsafe fn bits(self, v: Self::Bytes, from: usize, to: usize, n: usize) -> Self::Bytes;
    unsafe fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Byte `c` of every row.
    unsafe fn byte(self, v: Self::Bytes, c: usize) -> Self::Ints;
    /// `sum + w[0] x[0] + ... + w[3] x[3]` for the four bytes of every row, below 64 and unsigned, and the four signed
    /// bytes of `x`.
    unsafe fn dot(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints;
    /// The same for all bytes.
    unsafe fn dot_wide(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints;
    unsafe fn ints(self, x: i32) -> Self::Ints;
    unsafe fn add_ints(self, v: Self::Ints, x: i32) -> Self::Ints;
    unsafe fn load_signed(self, p: *const u8) -> Self::Ints;
    unsafe fn load_halves(self, p: *const u8) -> Self::Floats;
    unsafe fn to_floats(self, v: Self::Ints) -> Self::Floats;
    unsafe fn floats(self, x: f32) -> Self::Floats;
    unsafe fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn store(self, p: *mut f32, v: Self::Floats);
}

/// Plain Rust, which the compiler vectorises with what the target always has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    type Bytes = [u8; VECTOR];
    type Ints = [i32; ROWS];
    type Floats = [f32; ROWS];
    const MOST: usize = 1;

    #[inline(always)]
    unsafe fn load(self, p: *const u8) -> Self::Bytes {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::Bytes>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn bits(self, v: Self::Bytes, from: usize, to: usize, n: usize) -> Self::Bytes {
        let mask = ((1u32 << n) - 1) as u8;
        v.map(|b| (b >> from & mask) << to)
    }

    #[inline(always)]
    unsafe fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    unsafe fn byte(self, v: Self::Bytes, c: usize) -> Self::Ints {
        std::array::from_fn(|r| i32::from(v[4 * r + c]))
    }

    #[inline(always)]
    unsafe fn dot(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints {
        let x = x.to_ne_bytes().map(|x| i16::from(x as i8));
        std::array::from_fn(|r| {
            let product = |c: usize| i32::from(i16::from(w[4 * r + c]) * x[c]);
            sum[r] + (product(0) + product(1)) + (product(2) + product(3))
        })
    }

    #[inline(always)]
    unsafe fn dot_wide(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints {
        // SAFETY: no pointers. A product of 255 and -128 fits 16 bits.
        unsafe { self.dot(sum, w, x) }
    }

    #[inline(always)]
    unsafe fn ints(self, x: i32) -> Self::Ints {
        [x; ROWS]
    }

    #[inline(always)]
    unsafe fn add_ints(self, v: Self::Ints, x: i32) -> Self::Ints {
        v.map(|v| v + x)
    }

    #[inline(always)]
    unsafe fn load_signed(self, p: *const u8) -> Self::Ints {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[i8; ROWS]>().read() }.map(i32::from)
    }

    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8) -> Self::Floats {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[[u8; 2]; ROWS]>().read() }.map(|b| f16::from_le_bytes(b).to_f32())
    }

    #[inline(always)]
    unsafe fn to_floats(self, v: Self::Ints) -> Self::Floats {
        v.map(|v| v as f32)
    }

    #[inline(always)]
    unsafe fn floats(self, x: f32) -> Self::Floats {
        [x; ROWS]
    }

    #[inline(always)]
    unsafe fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|r| a[r] + b[r])
    }

    #[inline(always)]
    unsafe fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|r| a[r] - b[r])
    }

    #[inline(always)]
    unsafe fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|r| a[r] * b[r])
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::Floats) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::Floats>().write_unaligned(v) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    // SAFETY of the blocks below: every method needs the features of its unit, which the caller promises.
    #![allow(clippy::undocumented_unsafe_blocks)]

    use std::arch::x86_64::*;

    use super::Simd;

    /// AVX2 with F16C: two registers for sixteen lanes. Written out, because a closure may stay a function of its own, without
    /// the unit's features, which then calls each instruction as a function.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Avx2;

    impl Simd for Avx2 {
        type Bytes = [__m256i; 2];
        type Ints = [__m256i; 2];
        type Floats = [__m256; 2];
        const MOST: usize = 4;

        #[inline(always)]
        unsafe fn load(self, p: *const u8) -> Self::Bytes {
            unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
        }

        #[inline(always)]
        unsafe fn bits(self, v: Self::Bytes, from: usize, to: usize, n: usize) -> Self::Bytes {
            unsafe {
                // Lanes of 16 bits are shifted; the mask drops what comes from the neighbour.
                let mask = _mm256_set1_epi8((((1u32 << n) - 1) << to) as i8);
                let count = _mm_cvtsi32_si128(from.abs_diff(to) as i32);
                let shifted = match from >= to {
                    true => [_mm256_srl_epi16(v[0], count), _mm256_srl_epi16(v[1], count)],
                    false => [_mm256_sll_epi16(v[0], count), _mm256_sll_epi16(v[1], count)],
                };
                [_mm256_and_si256(shifted[0], mask), _mm256_and_si256(shifted[1], mask)]
            }
        }

        #[inline(always)]
        unsafe fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
            unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn byte(self, v: Self::Bytes, c: usize) -> Self::Ints {
            unsafe {
                let (count, mask) = (_mm_cvtsi32_si128(8 * c as i32), _mm256_set1_epi32(255));
                let shifted = [_mm256_srl_epi32(v[0], count), _mm256_srl_epi32(v[1], count)];
                [_mm256_and_si256(shifted[0], mask), _mm256_and_si256(shifted[1], mask)]
            }
        }

        #[inline(always)]
        unsafe fn dot(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints {
            unsafe {
                let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
                // Two products below 64 * 128 fit 16 bits.
                let pairs = [_mm256_maddubs_epi16(w[0], x), _mm256_maddubs_epi16(w[1], x)];
                let dots = [_mm256_madd_epi16(pairs[0], ones), _mm256_madd_epi16(pairs[1], ones)];
                [_mm256_add_epi32(sum[0], dots[0]), _mm256_add_epi32(sum[1], dots[1])]
            }
        }

        #[inline(always)]
        unsafe fn dot_wide(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints {
            unsafe {
                // By nibbles, because two products of whole bytes do not fit 16 bits. The upper ones weigh 16.
                let (low, high) = (self.bits(w, 0, 0, 4), self.bits(w, 4, 0, 4));
                let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
                let sixteen = _mm256_set1_epi16(16);
                let low = [_mm256_maddubs_epi16(low[0], x), _mm256_maddubs_epi16(low[1], x)];
                let high = [_mm256_maddubs_epi16(high[0], x), _mm256_maddubs_epi16(high[1], x)];
                let low = [_mm256_madd_epi16(low[0], ones), _mm256_madd_epi16(low[1], ones)];
                let high = [_mm256_madd_epi16(high[0], sixteen), _mm256_madd_epi16(high[1], sixteen)];
                let dots = [_mm256_add_epi32(low[0], high[0]), _mm256_add_epi32(low[1], high[1])];
                [_mm256_add_epi32(sum[0], dots[0]), _mm256_add_epi32(sum[1], dots[1])]
            }
        }

        #[inline(always)]
        unsafe fn ints(self, x: i32) -> Self::Ints {
            unsafe { [_mm256_set1_epi32(x); 2] }
        }

        #[inline(always)]
        unsafe fn add_ints(self, v: Self::Ints, x: i32) -> Self::Ints {
            unsafe {
                let x = _mm256_set1_epi32(x);
                [_mm256_add_epi32(v[0], x), _mm256_add_epi32(v[1], x)]
            }
        }

        #[inline(always)]
        unsafe fn load_signed(self, p: *const u8) -> Self::Ints {
            unsafe {
                let v = _mm_loadu_si128(p.cast());
                [_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(v))]
            }
        }

        #[inline(always)]
        unsafe fn load_halves(self, p: *const u8) -> Self::Floats {
            unsafe {
                let halves = [_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(16).cast())];
                [_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])]
            }
        }

        #[inline(always)]
        unsafe fn to_floats(self, v: Self::Ints) -> Self::Floats {
            unsafe { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
        }

        #[inline(always)]
        unsafe fn floats(self, x: f32) -> Self::Floats {
            unsafe { [_mm256_set1_ps(x); 2] }
        }

        #[inline(always)]
        unsafe fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
            unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
            unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
            unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: Self::Floats) {
            unsafe {
                _mm256_storeu_ps(p, v[0]);
                _mm256_storeu_ps(p.add(8), v[1]);
            }
        }
    }

    /// AVX-512 F, BW, with the dot products of VNNI if `VNNI`.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Avx512<const VNNI: bool>;

    impl<const VNNI: bool> Simd for Avx512<VNNI> {
        type Bytes = __m512i;
        type Ints = __m512i;
        type Floats = __m512;
        const MOST: usize = 8;

        #[inline(always)]
        unsafe fn load(self, p: *const u8) -> Self::Bytes {
            unsafe { _mm512_loadu_si512(p.cast()) }
        }

        #[inline(always)]
        unsafe fn bits(self, v: Self::Bytes, from: usize, to: usize, n: usize) -> Self::Bytes {
            unsafe {
                // As in AVX2.
                let mask = _mm512_set1_epi8((((1u32 << n) - 1) << to) as i8);
                let count = _mm_cvtsi32_si128(from.abs_diff(to) as i32);
                match from >= to {
                    true => _mm512_and_si512(_mm512_srl_epi16(v, count), mask),
                    false => _mm512_and_si512(_mm512_sll_epi16(v, count), mask),
                }
            }
        }

        #[inline(always)]
        unsafe fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
            unsafe { _mm512_or_si512(a, b) }
        }

        #[inline(always)]
        unsafe fn byte(self, v: Self::Bytes, c: usize) -> Self::Ints {
            unsafe {
                let count = _mm_cvtsi32_si128(8 * c as i32);
                _mm512_and_si512(_mm512_srl_epi32(v, count), _mm512_set1_epi32(255))
            }
        }

        #[inline(always)]
        unsafe fn dot(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints {
            unsafe {
                let x = _mm512_set1_epi32(x);
                match VNNI {
                    true => _mm512_dpbusd_epi32(sum, w, x),
                    // Two products below 64 * 128 fit 16 bits.
                    false => {
                        let pairs = _mm512_maddubs_epi16(w, x);
                        _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
                    }
                }
            }
        }

        #[inline(always)]
        unsafe fn dot_wide(self, sum: Self::Ints, w: Self::Bytes, x: i32) -> Self::Ints {
            unsafe {
                if VNNI {
                    return self.dot(sum, w, x);
                }
                // As in AVX2.
                let (low, high) = (self.bits(w, 0, 0, 4), self.bits(w, 4, 0, 4));
                let x = _mm512_set1_epi32(x);
                let low = _mm512_madd_epi16(_mm512_maddubs_epi16(low, x), _mm512_set1_epi16(1));
                let high = _mm512_madd_epi16(_mm512_maddubs_epi16(high, x), _mm512_set1_epi16(16));
                _mm512_add_epi32(sum, _mm512_add_epi32(low, high))
            }
        }

        #[inline(always)]
        unsafe fn ints(self, x: i32) -> Self::Ints {
            unsafe { _mm512_set1_epi32(x) }
        }

        #[inline(always)]
        unsafe fn add_ints(self, v: Self::Ints, x: i32) -> Self::Ints {
            unsafe { _mm512_add_epi32(v, _mm512_set1_epi32(x)) }
        }

        #[inline(always)]
        unsafe fn load_signed(self, p: *const u8) -> Self::Ints {
            unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
        }

        #[inline(always)]
        unsafe fn load_halves(self, p: *const u8) -> Self::Floats {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }

        #[inline(always)]
        unsafe fn to_floats(self, v: Self::Ints) -> Self::Floats {
            unsafe { _mm512_cvtepi32_ps(v) }
        }

        #[inline(always)]
        unsafe fn floats(self, x: f32) -> Self::Floats {
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
            unsafe { _mm512_add_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn sub(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
            unsafe { _mm512_sub_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: Self::Floats) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
    }
}
