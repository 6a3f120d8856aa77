//! Loops of products of narrow types, which a CPU may have beside its multiply-adds of f32: what the bench measures as limits of the
//! machine. They ask the CPU for its features and belong to no level's kernels.

use crate::isa::Isa;

/// Products of a narrow type, added up in a wider one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Products {
    /// Of bf16, in f32: `vdpbf16ps`, or `bfmmla` on AArch64.
    Bf16,
    /// Of 8-bit integers, in 32 bits: `vpdpbusd`, or `smmla` or `sdot` on AArch64.
    Int8,
    /// Of tiles of bf16: `tdpbf16ps`.
    Bf16Tiles,
    /// Of tiles of 8-bit integers: `tdpbssd`.
    Int8Tiles,
}

/// A loop, and what it does.
#[derive(Clone, Copy)]
pub(crate) struct ProductLoop {
    /// The instruction and its registers.
    pub by: &'static str,
    /// Operations of a step, a multiply-add counted as two.
    pub operations: usize,
    /// # Safety
    /// The CPU has the instruction.
    run: unsafe fn(u64),
}

impl ProductLoop {
    /// Makes as many steps.
    pub fn run(&self, steps: u64) {
        // SAFETY: `loop_of` has asked the CPU.
        unsafe { (self.run)(steps) }
    }
}

/// The fastest loop for registers of a level, and `None` if the level's registers or the CPU have no such products. The features of
/// the products themselves are not the level's: kernels that use them are of a partial level above it.
pub(crate) fn loop_of(isa: Isa, products: Products) -> Option<ProductLoop> {
    native::loop_of(isa, products)
}

#[cfg(target_arch = "x86_64")]
mod native {
    use super::{ProductLoop, Products};
    use crate::isa::Isa;
    use crate::kernels::amx::peak;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Sums per step: latency times units is at most 12 on the CPUs that have the instructions.
    const CHAINS: usize = 12;

    pub fn loop_of(isa: Isa, products: Products) -> Option<ProductLoop> {
        let wide = Isa::Avx512.is_within(isa);
        let narrow = Isa::Avx2.is_within(isa);
        match products {
            Products::Bf16 if wide && is_x86_feature_detected!("avx512bf16") => {
                Some(ProductLoop { by: "vdpbf16ps zmm", operations: CHAINS * 64, run: bf16_wide })
            }
            Products::Int8 if wide && is_x86_feature_detected!("avx512vnni") => {
                Some(ProductLoop { by: "vpdpbusd zmm", operations: CHAINS * 128, run: int8_wide })
            }
            Products::Int8 if narrow && !wide && is_x86_feature_detected!("avxvnni") => {
                Some(ProductLoop { by: "vpdpbusd ymm", operations: CHAINS * 64, run: int8_narrow })
            }
            Products::Bf16Tiles if isa == Isa::Amx && peak::is_available() => {
                Some(ProductLoop { by: "tdpbf16ps", operations: peak::BF16_OPERATIONS, run: peak::bf16 })
            }
            Products::Int8Tiles if isa == Isa::Amx && peak::is_available() => {
                Some(ProductLoop { by: "tdpbssd", operations: peak::INT8_OPERATIONS, run: peak::int8 })
            }
            _ => None,
        }
    }

    /// # Safety
    /// The CPU has the instruction.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_wide(steps: u64) {
        // 2^-8 twice in each lane, so that sums stay finite.
        let factor = _mm512_set1_epi16(black_box(0x3b80));
        // SAFETY: vectors of the same size, for which every pattern is a value.
        let factor: __m512bh = unsafe { std::mem::transmute(factor) };
        let mut sums = [_mm512_set1_ps(black_box(0.0)); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        for sum in sums {
            black_box(_mm512_reduce_add_ps(sum));
        }
    }

    /// # Safety
    /// The CPU has the instruction.
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn int8_wide(steps: u64) {
        let factor = _mm512_set1_epi8(black_box(3));
        let mut sums = [_mm512_set1_epi32(black_box(0)); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        for sum in sums {
            black_box(_mm512_reduce_add_epi32(sum));
        }
    }

    /// # Safety
    /// The CPU has the instruction.
    #[target_feature(enable = "avx2,avxvnni")]
    unsafe fn int8_narrow(steps: u64) {
        let factor = _mm256_set1_epi8(black_box(3));
        let mut sums = [_mm256_set1_epi32(black_box(0)); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, factor, factor);
            }
        }
        for sum in sums {
            black_box(_mm256_extract_epi32::<0>(sum));
        }
    }
}

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod native {
    use super::{ProductLoop, Products};
    use crate::isa::Isa;
    use std::arch::{asm, is_aarch64_feature_detected};

    /// Sums per step: latency times units is at most 16.
    const CHAINS: usize = 16;

    pub fn loop_of(isa: Isa, products: Products) -> Option<ProductLoop> {
        if !Isa::Neon.is_within(isa) {
            return None;
        }
        match products {
            Products::Bf16 if is_aarch64_feature_detected!("bf16") => {
                Some(ProductLoop { by: "bfmmla", operations: CHAINS * 32, run: bf16 })
            }
            Products::Int8 if is_aarch64_feature_detected!("i8mm") => {
                Some(ProductLoop { by: "smmla", operations: CHAINS * 64, run: int8_matrix })
            }
            Products::Int8 if is_aarch64_feature_detected!("dotprod") => {
                Some(ProductLoop { by: "sdot", operations: CHAINS * 32, run: int8 })
            }
            _ => None,
        }
    }

    /// Sixteen products into sixteen sums, of factors that are 0.
    macro_rules! steps {
        ($name:ident, $features:literal, $instruction:literal, $of:literal) => {
            /// # Safety
            /// The CPU has the instruction.
            #[target_feature(enable = $features)]
            unsafe fn $name(steps: u64) {
                macro_rules! line {
                    ($sum:literal) => {
                        concat!($instruction, " v", $sum, ".4s, v16.", $of, ", v17.", $of)
                    };
                }
                for _ in 0..steps {
                    // SAFETY: arithmetic on registers whose old contents do not matter, of features that are there.
                    unsafe {
                        asm!("movi v16.4s, #0", "movi v17.4s, #0",
                            line!("0"), line!("1"), line!("2"), line!("3"), line!("4"), line!("5"), line!("6"), line!("7"),
                            line!("18"), line!("19"), line!("20"), line!("21"), line!("22"), line!("23"), line!("24"),
                            line!("25"),
                            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _,
                            out("v7") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _,
                            out("v21") _, out("v22") _, out("v23") _, out("v24") _, out("v25") _,
                            options(nomem, nostack, preserves_flags));
                    }
                }
            }
        };
    }
    steps!(bf16, "neon,bf16", "bfmmla", "8h");
    steps!(int8_matrix, "neon,i8mm", "smmla", "16b");
    steps!(int8, "neon,dotprod", "sdot", "16b");
}

#[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little"))))]
mod native {
    pub fn loop_of(_: crate::isa::Isa, _: super::Products) -> Option<super::ProductLoop> {
        None
    }
}
