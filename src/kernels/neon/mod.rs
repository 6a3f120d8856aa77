//! AArch64 Advanced SIMD: four lanes, thirty-two registers.
//!
//! Never timed. In the disassembly, the loops of attention have 3.4 to 4 multiply-adds per load instruction (prefill,
//! scores: 48 for 12, with one store to the stack; values: 24 for 7; decode: 32 for 8). With four vector pipes and
//! three loads per cycle, as in Neoverse V2, they are bound by the pipes. `benches/neon_loops.py` checks these counts.
//!
//! Bytes and nibbles become floats eight at a time. Loops over them for four rows have, for 32 multiply-adds, 75 to 83 instructions in
//! int8, 67 to 75 in E5M2, 77 to 98 in E4M3, and 88 to 121 in affine units with factors of a group; over f32 they have 83 (scores), over bf16 59
//! to 64.
//!
//! The f16 conversions are part of the base architecture, but their intrinsics require `fp16`. So each is one
//! instruction of inline assembly.

use super::generic::fp8::{E4m3, E4m3Fraction, E5m2};
use super::simd::{MAX_LANES, Simd, copy_part};
use crate::cpu::level_features;
use crate::kernels::shells::{kernel_shells, kernel_table};
use crate::kernels::simd::outline;
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::arch::asm;

pulp::simd_type!({
    /// pulp's proof that the CPU has this level's features.
    pub(crate) struct Token {
        pub(crate) neon: f!("neon"),
    }
});

/// Proof that the CPU has this level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(Token);

impl Neon {
    /// # Safety
    /// The CPU has the level's features.
    #[inline(always)]
    pub unsafe fn new_unchecked() -> Self {
        // SAFETY: the caller's.
        Self(unsafe { Token::new_unchecked() })
    }
}

/// # Safety
/// The CPU has NEON; FCVTL of half precision is in every ARMv8-A with Advanced SIMD.
#[inline(always)]
unsafe fn widen_f16(narrow: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: the caller's; registers alone are touched.
    unsafe {
        asm!("fcvtl {wide:v}.4s, {narrow:v}.4h", wide = lateout(vreg) wide, narrow = in(vreg) narrow,
            options(pure, nomem, nostack, preserves_flags));
    }
    wide
}

/// # Safety
/// As [`widen_f16`].
#[inline(always)]
unsafe fn widen_pair_f16(narrow: uint16x8_t) -> [float32x4_t; 2] {
    let high: float32x4_t;
    // SAFETY: the caller's; registers alone are touched.
    unsafe {
        asm!("fcvtl2 {high:v}.4s, {narrow:v}.8h", high = lateout(vreg) high, narrow = in(vreg) narrow,
            options(pure, nomem, nostack, preserves_flags));
        [widen_f16(vget_low_u16(narrow)), high]
    }
}

/// 256ths of E4M3 as f16.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn halves_of_e4m3(bytes: int8x8_t) -> uint16x8_t {
    // SAFETY: the caller's.
    unsafe {
        // The sign in bit 15 and the magnitude in the bits 7 to 13 are an f16 of a 256th; bit 14 is a copy of the sign.
        let half = vreinterpretq_u16_s16(vshll_n_s8::<7>(bytes));
        // The largest magnitude is NaN. It alone carries into bit 14, which becomes 1 then, as all of the exponent, and otherwise 0.
        let carry = vandq_u16(vaddq_u16(half, vdupq_n_u16(0x80)), vdupq_n_u16(0x4000));
        veorq_u16(half, carry)
    }
}

/// Four bytes, twice.
///
/// # Safety
/// The CPU has NEON, and the bytes are readable.
#[inline(always)]
unsafe fn four_bytes(p: *const u8) -> uint8x8_t {
    // SAFETY: the caller's.
    unsafe { vreinterpret_u8_u32(vdup_n_u32(p.cast::<u32>().read_unaligned())) }
}

/// Signed bytes as floats.
///
/// # Safety
/// The CPU has NEON.
#[inline(always)]
unsafe fn floats(bytes: int8x8_t) -> [float32x4_t; 2] {
    // SAFETY: the caller's.
    unsafe {
        let words = vmovl_s8(bytes);
        [vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))]
    }
}

/// Eight numbers of four bits, from number `at` on, of which the first 16 are low halves of bytes.
///
/// # Safety
/// The CPU has NEON, and sixteen bytes are readable.
#[inline(always)]
unsafe fn nibbles(p: *const u8, at: usize) -> uint8x8_t {
    // SAFETY: the caller's; eight of the bytes are read.
    unsafe {
        let bytes = vld1_u8(p.add(at % 16));
        if at < 16 { vand_u8(bytes, vdup_n_u8(15)) } else { vshr_n_u8::<4>(bytes) }
    }
}

impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;
    const TILE_VECTORS: usize = 4;
    const PARALLEL_DOTS: usize = 16;
    const DEINTERLEAVED_BF16: bool = false;
    const E4M3_FRACTION: f32 = 256.0;

    level_features!(Neon, outline! {});

    #[inline(always)]
    fn lane_order(i: usize) -> usize {
        // Pairwise additions add neighbours.
        i
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        self.0.neon.vdupq_n_f32(x)
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.0.neon.vaddq_f32(a, b)
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.0.neon.vsubq_f32(a, b)
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.0.neon.vmulq_f32(a, b)
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.0.neon.vdivq_f32(a, b)
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        self.0.neon.vfmaq_f32(c, a, b)
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // The other operand if one of the two is NaN.
        self.0.neon.vmaxnmq_f32(a, b)
    }
    #[inline(always)]
    fn select_lt(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        let n = self.0.neon;
        n.vbslq_f32(n.vcltq_f32(a, b), x, y)
    }
    #[inline(always)]
    fn lt_bits(self, a: float32x4_t, b: float32x4_t) -> u64 {
        let n = self.0.neon;
        const EACH: [u32; 4] = [1, 2, 4, 8];
        // SAFETY: EACH holds four u32.
        let each = unsafe { vld1q_u32(EACH.as_ptr()) };
        u64::from(n.vaddvq_u32(n.vandq_u32(n.vcltq_f32(a, b), each)))
    }
    #[inline(always)]
    fn select_bits(self, bits: u64, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        let n = self.0.neon;
        const EACH: [u32; 4] = [1, 2, 4, 8];
        // SAFETY: EACH holds four u32.
        let each = unsafe { vld1q_u32(EACH.as_ptr()) };
        n.vbslq_f32(n.vtstq_u32(n.vdupq_n_u32(bits as u32), each), x, y)
    }
    #[inline(always)]
    fn abs(self, a: float32x4_t) -> float32x4_t {
        self.0.neon.vabsq_f32(a)
    }
    #[inline(always)]
    fn copysign(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        let n = self.0.neon;
        n.vbslq_f32(n.vdupq_n_u32(0x8000_0000), b, a)
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        self.0.neon.vrndnq_f32(a)
    }
    #[inline(always)]
    fn exp2i(self, n: float32x4_t) -> float32x4_t {
        let s = self.0.neon;
        let shifted = s.vshlq_n_u32::<23>(s.vreinterpretq_u32_f32(n));
        s.vreinterpretq_f32_u32(s.vaddq_u32(s.vreinterpretq_u32_f32(s.vdupq_n_f32(1.0)), shifted))
    }
    #[inline(always)]
    fn swap_pairs(self, a: float32x4_t) -> float32x4_t {
        self.0.neon.vrev64q_f32(a)
    }
    #[inline(always)]
    fn add_bits(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        let s = self.0.neon;
        s.vreinterpretq_f32_u32(s.vaddq_u32(s.vreinterpretq_u32_f32(a), s.vreinterpretq_u32_f32(b)))
    }
    #[inline(always)]
    fn and_bits(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        let s = self.0.neon;
        s.vreinterpretq_f32_u32(s.vandq_u32(s.vreinterpretq_u32_f32(a), s.vreinterpretq_u32_f32(b)))
    }
    #[inline(always)]
    fn shift_bits(self, a: float32x4_t, n: u32) -> float32x4_t {
        let s = self.0.neon;
        // A negative count shifts to the right.
        let count = s.vdupq_n_s32(-(n as i32));
        s.vreinterpretq_f32_u32(s.vshlq_u32(s.vreinterpretq_u32_f32(a), count))
    }
    #[inline(always)]
    fn deinterleave(self, a: float32x4_t, b: float32x4_t) -> [float32x4_t; 2] {
        let n = self.0.neon;
        [n.vuzp1q_f32(a, b), n.vuzp2q_f32(a, b)]
    }
    #[inline(always)]
    fn interleave(self, even: float32x4_t, odd: float32x4_t) -> [float32x4_t; 2] {
        let n = self.0.neon;
        [n.vzip1q_f32(even, odd), n.vzip2q_f32(even, odd)]
    }
    #[inline(always)]
    fn sum_lanes(self, v: &[float32x4_t; MAX_LANES]) -> float32x4_t {
        let n = self.0.neon;
        n.vpaddq_f32(n.vpaddq_f32(v[0], v[1]), n.vpaddq_f32(v[2], v[3]))
    }
    #[inline(always)]
    fn max_lane(self, a: float32x4_t) -> f32 {
        self.0.neon.vmaxnmvq_f32(a)
    }
    #[inline(always)]
    fn all_finite(self, a: float32x4_t) -> bool {
        let n = self.0.neon;
        let finite = n.vcltq_f32(n.vabsq_f32(a), n.vdupq_n_f32(f32::INFINITY));
        n.vminvq_u32(finite) == u32::MAX
    }
    #[inline(always)]
    fn transpose(self, v: &mut [float32x4_t; MAX_LANES]) {
        let n = self.0.neon;
        let f64s = |a| n.vreinterpretq_f64_f32(a);
        let f32s = |a| n.vreinterpretq_f32_f64(a);
        let (even01, odd01) = (n.vtrn1q_f32(v[0], v[1]), n.vtrn2q_f32(v[0], v[1]));
        let (even23, odd23) = (n.vtrn1q_f32(v[2], v[3]), n.vtrn2q_f32(v[2], v[3]));
        v[0] = f32s(n.vtrn1q_f64(f64s(even01), f64s(even23)));
        v[1] = f32s(n.vtrn1q_f64(f64s(odd01), f64s(odd23)));
        v[2] = f32s(n.vtrn2q_f64(f64s(even01), f64s(even23)));
        v[3] = f32s(n.vtrn2q_f64(f64s(odd01), f64s(odd23)));
    }

    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> float32x4_t {
        // SAFETY: the caller's.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> float32x4_t {
        // SAFETY: the caller's; the level has NEON.
        unsafe { widen_f16(vld1_u16(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> float32x4_t {
        let n = self.0.neon;
        // SAFETY: the caller's.
        let narrow = unsafe { vld1_u16(p.cast()) };
        n.vreinterpretq_f32_u32(n.vshll_n_u16::<16>(narrow))
    }
    #[inline(always)]
    unsafe fn load_pair_bf16(self, p: *const bf16) -> [float32x4_t; 2] {
        // SAFETY: the caller's. One load for both would take a register from loops that have none left.
        unsafe { [self.load_bf16(p), self.load_bf16(p.add(4))] }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { asm!("prfm pldl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags)) }
    }
    #[inline(always)]
    fn prefetch_far(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { asm!("prfm pldl2keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags)) }
    }
    #[inline(always)]
    fn prefetch_write(self, p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { asm!("prfm pstl1keep, [{p}]", p = in(reg) p, options(readonly, nostack, preserves_flags)) }
    }
    #[inline(always)]
    unsafe fn load_part_f32(self, p: *const f32, n: usize) -> float32x4_t {
        // SAFETY: the caller's; the buffer holds a whole vector.
        unsafe { vld1q_f32(copy_part(p, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> float32x4_t {
        // SAFETY: four bytes are readable; the level has NEON.
        unsafe { floats(vreinterpret_s8_u8(four_bytes(p.cast())))[0] }
    }
    #[inline(always)]
    unsafe fn load_pair_i8(self, p: *const i8) -> [float32x4_t; 2] {
        // SAFETY: eight bytes are readable; the level has NEON.
        unsafe { floats(vld1_s8(p)) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> float32x4_t {
        // SAFETY: four bytes are readable; the level has NEON.
        unsafe {
            let bytes = four_bytes(p);
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
        }
    }
    #[inline(always)]
    unsafe fn load_pair_u8(self, p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: eight bytes are readable; the level has NEON.
        unsafe {
            let words = vmovl_u8(vld1_u8(p));
            [vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), vcvtq_f32_u32(vmovl_high_u16(words))]
        }
    }
    #[inline(always)]
    unsafe fn load_nibble_pairs(self, p: *const u8, swapped: bool) -> [float32x4_t; 2] {
        // SAFETY: four bytes are readable; the level has NEON.
        unsafe {
            let bytes = four_bytes(p);
            let (low, high) = (vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8::<4>(bytes));
            floats(vreinterpret_s8_u8(if swapped { vzip1_u8(high, low) } else { vzip1_u8(low, high) }))
        }
    }
    #[inline(always)]
    unsafe fn load_pair_nibbles(self, p: *const u8, at: usize) -> [float32x4_t; 2] {
        // SAFETY: the caller's; the level has NEON.
        unsafe { floats(vreinterpret_s8_u8(nibbles(p, at))) }
    }
    #[inline(always)]
    unsafe fn load_pair_fives(self, p: *const u8, fifth: u32, at: usize) -> [float32x4_t; 2] {
        // SAFETY: the caller's; the level has NEON.
        unsafe {
            // The bit of each byte.
            let each = vcreate_u8(0x8040_2010_0804_0201);
            let set = vtst_u8(vdup_n_u8((fifth >> at) as u8), each);
            let numbers = vorr_u8(nibbles(p, at), vand_u8(set, vdup_n_u8(16)));
            floats(vreinterpret_s8_u8(numbers))
        }
    }
    #[inline(always)]
    unsafe fn look_up_pair(self, p: *const u8, at: usize, table: &[i8; 16]) -> [float32x4_t; 2] {
        // SAFETY: the caller's; the table is 16 bytes; the level has NEON.
        unsafe { floats(vqtbl1_s8(vld1q_s8(table.as_ptr()), nibbles(p, at))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, p: *const E4m3) -> float32x4_t {
        // SAFETY: the caller's.
        self.mul(unsafe { self.load_e4m3_fraction(p.cast()) }, self.splat(Self::E4M3_FRACTION))
    }
    #[inline(always)]
    unsafe fn load_e4m3_fraction(self, p: *const E4m3Fraction) -> float32x4_t {
        // SAFETY: four bytes are readable; the level has NEON.
        unsafe {
            let bytes = vreinterpret_s8_u8(four_bytes(p.cast()));
            widen_f16(vget_low_u16(halves_of_e4m3(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_pair_e4m3_fraction(self, p: *const E4m3Fraction) -> [float32x4_t; 2] {
        // SAFETY: eight bytes are readable; the level has NEON.
        unsafe { widen_pair_f16(halves_of_e4m3(vld1_s8(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e5m2(self, p: *const E5m2) -> float32x4_t {
        // SAFETY: four bytes are readable; the level has NEON. An E5M2 is the upper half of an f16.
        unsafe {
            let bytes = four_bytes(p.cast());
            widen_f16(vshl_n_u16::<8>(vget_low_u16(vmovl_u8(bytes))))
        }
    }
    #[inline(always)]
    unsafe fn load_pair_e5m2(self, p: *const E5m2) -> [float32x4_t; 2] {
        // SAFETY: eight bytes are readable; the level has NEON.
        unsafe { widen_pair_f16(vshll_n_u8::<8>(vld1_u8(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, p: *mut u8, v: float32x4_t) {
        // SAFETY: four bytes are writable; the level has NEON.
        unsafe {
            let words = vmovn_u32(vreinterpretq_u32_f32(v));
            let bytes = vmovn_u16(vcombine_u16(words, words));
            p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_u8(bytes)));
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: float32x4_t) {
        // SAFETY: four bytes are writable; the level has NEON.
        unsafe {
            let words = vqmovn_s32(vcvtnq_s32_f32(v));
            let bytes = vqmovn_s16(vcombine_s16(words, words));
            p.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_s8(bytes)));
        }
    }
    #[inline(always)]
    unsafe fn store_f32(self, p: *mut f32, v: float32x4_t) {
        // SAFETY: the caller's.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: float32x4_t) {
        // SAFETY: the caller's; FCVTN of half precision is in every ARMv8-A with Advanced SIMD.
        unsafe {
            let narrow: uint16x4_t;
            asm!("fcvtn {narrow:v}.4h, {wide:v}.4s", narrow = lateout(vreg) narrow, wide = in(vreg) v,
                options(pure, nomem, nostack, preserves_flags));
            vst1_u16(p.cast(), narrow);
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: float32x4_t) {
        let n = self.0.neon;
        let bits = n.vreinterpretq_u32_f32(v);
        let odd = n.vandq_u32(n.vshrq_n_u32::<16>(bits), n.vdupq_n_u32(1));
        let rounded = n.vaddq_u32(bits, n.vaddq_u32(odd, n.vdupq_n_u32(0x7fff)));
        // The increment could turn a NaN into infinity, so NaNs keep their upper half and become quiet.
        let quiet = n.vorrq_u32(bits, n.vdupq_n_u32(0x40_0000));
        let chosen = n.vbslq_u32(n.vceqq_f32(v, v), rounded, quiet);
        // SAFETY: the caller's.
        unsafe { vst1_u16(p.cast(), n.vshrn_n_u32::<16>(chosen)) }
    }
    #[inline(always)]
    unsafe fn store_part_f32(self, p: *mut f32, v: float32x4_t, n: usize) {
        let mut buffer = [0.0f32; 4];
        // SAFETY: the buffer holds a whole vector; the caller vouches for n elements at p.
        unsafe {
            vst1q_f32(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }
}

level_features!(Neon, kernel_shells! { Neon });
kernel_table!(Neon);
