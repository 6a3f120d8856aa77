//! NEON with FEAT_DotProd: products of signed bytes, added up in 32 bits (`sdot`).
//!
//! A partial level: attention over int8 keys at [`Precision::Integer`](super::api::Precision), with values of any format. Only the
//! scores are of this level; the rest of the kernel is NEON's.
//!
//! Never timed. The intrinsic is not stable, so that the product is one instruction of inline assembly.

use super::generic::attention::integer::{ByteProducts, MAX_SCORES};
use super::neon::{Neon, shells};
use super::partial::{integer_kernels, with_features};
use std::arch::aarch64::*;
use std::arch::asm;

integer_kernels!(NeonDotprod, NeonDotprod, Neon, Dotprod, "attention_int8_integer_neondotprod");

/// Proof that the CPU has the level.
#[derive(Clone, Copy)]
struct Dotprod(Neon);

/// Bytes of a vector.
const UNITS: usize = 16;

impl ByteProducts for Dotprod {
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
}
