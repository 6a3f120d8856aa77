//! NEON with FEAT_DotProd: products of signed bytes, added up in 32 bits (`sdot`).
//!
//! A partial level: attention over keys in int8 and in blocks at [`Precision::Integer`](super::api::Precision), with values of any
//! format. Only the scores are of this level; the rest of the kernel is NEON's.
//!
//! Never timed. The intrinsic is not stable, so that the product is one instruction of inline assembly.

use super::generic::attention::DirectScores;
use super::generic::attention::integer::{ByteProducts, MAX_SCORES};
use super::generic::attention::integer_blocks::{BlockProducts, BlockUnits, IntegerUnit, transposed};
use super::generic::blocks::VALUES;
use super::neon::{Neon, shells};
use super::neoni8mm;
use super::partial::{integer_kernels, with_features};
use super::simd::Simd;
use std::arch::aarch64::*;
use std::arch::asm;

integer_kernels!(NeonDotprod, NeonDotprod, Neon, vectors, floats 1e-5,
    Int8 "attention_int8_integer_neondotprod"
    Q8_0 "attention_q8_0_integer_neondotprod"
    Q4_0 "attention_q4_0_integer_neondotprod"
    Q4_1 "attention_q4_1_integer_neondotprod"
    Q5_0 "attention_q5_0_integer_neondotprod"
    Q5_1 "attention_q5_1_integer_neondotprod"
    Iq4Nl "attention_iq4_nl_integer_neondotprod"
);

/// Proof that the CPU has the level; with `MATRICES`, that it has the products of [`neoni8mm`], too.
#[derive(Clone, Copy)]
pub(super) struct Dotprod<const MATRICES: bool>(pub(super) Neon);

/// Proof that the CPU has the level.
#[inline(always)]
fn vectors(neon: Neon) -> Dotprod<false> {
    Dotprod(neon)
}

/// Bytes of a vector.
pub(super) const UNITS: usize = 16;

impl<const MATRICES: bool> ByteProducts for Dotprod<MATRICES> {
    type Level = Neon;
    type Units = int8x16_t;
    type Sums = int32x4_t;
    const UNITS: usize = UNITS;
    const SCORES: usize = 16;
    const KEY_OFFSET: i32 = 0;

    #[inline(always)]
    fn level(self) -> Neon {
        self.0
    }
    #[inline(always)]
    fn zero(self) -> int32x4_t {
        // SAFETY: the level is available, here and below.
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn keys(self, p: *const i8) -> int8x16_t {
        // SAFETY: the caller's, here and below.
        unsafe { vld1q_s8(p) }
    }
    #[inline(always)]
    unsafe fn keys_part(self, p: *const i8, n: usize) -> int8x16_t {
        let mut bytes = [0; UNITS];
        // SAFETY: as above; n is less than UNITS.
        unsafe {
            std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n);
            vld1q_s8(bytes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn queries(self, p: *const i8) -> int8x16_t {
        // SAFETY: as above.
        unsafe { self.keys(p) }
    }
    #[inline(always)]
    unsafe fn queries_part(self, p: *const i8, n: usize) -> int8x16_t {
        // SAFETY: as above.
        unsafe { self.keys_part(p, n) }
    }
    #[inline(always)]
    fn add(self, mut sums: int32x4_t, keys: int8x16_t, queries: int8x16_t) -> int32x4_t {
        // SAFETY: arithmetic on registers, of a level that is available.
        unsafe {
            asm!("sdot {sums:v}.4s, {keys:v}.16b, {queries:v}.16b", sums = inout(vreg) sums, keys = in(vreg) keys,
                queries = in(vreg) queries, options(pure, nomem, nostack, preserves_flags));
        }
        sums
    }
    #[inline(always)]
    fn totals(self, v: &[int32x4_t; MAX_SCORES]) -> [i32; MAX_SCORES] {
        let mut totals = [0; MAX_SCORES];
        for (v, to) in v.as_chunks::<4>().0.iter().zip(totals.as_chunks_mut::<4>().0) {
            // SAFETY: as above; four numbers are stored.
            unsafe { vst1q_s32(to.as_mut_ptr(), vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]))) };
        }
        totals
    }
    #[inline(always)]
    unsafe fn matrix_scores(self, args: &DirectScores, head: usize, row: usize) -> usize {
        // SAFETY: the caller's.
        if MATRICES { unsafe { neoni8mm::matrix_scores(Dotprod(self.0), args, head, row) } } else { 0 }
    }
}

impl<const MATRICES: bool> BlockUnits for Dotprod<MATRICES> {
    #[inline(always)]
    fn low_nibbles(self, x: int8x16_t) -> int8x16_t {
        // SAFETY: the level is available, here and below.
        unsafe { vandq_s8(x, vdupq_n_s8(15)) }
    }
    #[inline(always)]
    fn high_nibbles(self, x: int8x16_t) -> int8x16_t {
        // SAFETY: as above.
        unsafe { vreinterpretq_s8_u8(vshrq_n_u8::<4>(vreinterpretq_u8_s8(x))) }
    }
    #[inline(always)]
    fn signed(self, x: int8x16_t) -> int8x16_t {
        x
    }
    #[inline(always)]
    fn listed(self, x: int8x16_t) -> int8x16_t {
        // SAFETY: as above; the table has 16 bytes.
        unsafe { vqtbl1q_s8(vld1q_s8(VALUES.as_ptr()), vreinterpretq_u8_s8(x)) }
    }
    #[inline(always)]
    fn with_fifth_bits(self, x: int8x16_t, bits: u64) -> int8x16_t {
        // SAFETY: as above; the array has 16 bytes.
        unsafe {
            let bits = vcombine_u8(vdup_n_u8(bits as u8), vdup_n_u8((bits >> 8) as u8));
            let bit = vld1q_u8([1u8, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128].as_ptr());
            vaddq_s8(x, vandq_s8(vreinterpretq_s8_u8(vtstq_u8(bits, bit)), vdupq_n_s8(16)))
        }
    }
    #[inline(always)]
    fn ones(self) -> int8x16_t {
        // SAFETY: as above.
        unsafe { vdupq_n_s8(1) }
    }
    #[inline(always)]
    fn times(self, x: int32x4_t, factor: i32) -> int32x4_t {
        // SAFETY: as above.
        unsafe { vmulq_n_s32(x, factor) }
    }
}

impl<const MATRICES: bool> BlockProducts for Dotprod<MATRICES> {
    #[inline(always)]
    unsafe fn halves<U: IntegerUnit, const SECOND: bool>(self, p: *const u8, _: usize) -> int8x16_t {
        // SAFETY: the caller's.
        unsafe { vld1q_s8(p.add(U::STARTS[usize::from(SECOND)]).cast()) }
    }
    #[inline(always)]
    unsafe fn factors<U: IntegerUnit, const MINIMA: bool>(self, p: *const u8, _: usize) -> float32x4_t {
        // SAFETY: the caller's.
        let bits = unsafe { p.cast::<u16>().add(usize::from(MINIMA)).read_unaligned() };
        self.0.splat_f16(half::f16::from_bits(bits))
    }
    #[inline(always)]
    fn four(self, [a, b, c, d]: [int32x4_t; 4]) -> int32x4_t {
        // SAFETY: the level is available, here and below.
        unsafe { vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)) }
    }
    #[inline(always)]
    unsafe fn matrix_totals(
        self,
        keys: [[int8x16_t; 2]; 4],
        rows: [*const f32; 4],
        part: usize,
        d: usize,
    ) -> Option<[int32x4_t; 4]> {
        // SAFETY: the caller's.
        if MATRICES { Some(unsafe { neoni8mm::totals(keys, [rows[0], rows[2]], part, d) }) } else { None }
    }
    #[inline(always)]
    unsafe fn prepare_matrices(self, rows: [*const f32; 4], d: usize) {
        if MATRICES {
            // SAFETY: the caller's; the third row is not the first.
            unsafe {
                neoni8mm::write_pairs(Dotprod(self.0), [rows[0], rows[1]], d);
                neoni8mm::write_pairs(Dotprod(self.0), [rows[2], rows[3]], d);
            }
        }
    }
    #[inline(always)]
    fn difference(self, a: int32x4_t, b: int32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vcvtq_f32_s32(vsubq_s32(a, b)) }
    }
    #[inline(always)]
    fn one_of_each(self, [a, b, c, d]: [float32x4_t; 4]) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            vcombine_f32(vzip1_f32(vget_low_f32(a), vget_low_f32(b)), vzip1_f32(vget_low_f32(c), vget_low_f32(d)))
        }
    }
    #[inline(always)]
    fn over_blocks(self, x: float32x4_t) -> [f32; 4] {
        // SAFETY: a vector of the same size.
        unsafe { std::mem::transmute(x) }
    }
    #[inline(always)]
    fn over_blocks_of_four(self, x: [float32x4_t; 4], factors: [f32; 4]) -> [[f32; 4]; 4] {
        let sums = [self.over_blocks(x[0]), self.over_blocks(x[1]), self.over_blocks(x[2]), self.over_blocks(x[3])];
        transposed(sums, factors)
    }
}
