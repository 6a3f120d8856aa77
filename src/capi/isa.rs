//! Levels of instruction sets.

use super::arguments::enumeration;
use super::guard::guard_value;
use crate::error::Result;
use crate::isa::Isa;
use std::ffi::{CStr, c_char};

/// A level of instruction sets.
pub type kvl_isa = i32;
/// The best level that the machine offers.
pub const KVL_ISA_BEST: i32 = 0;
/// Portable code, available everywhere.
pub const KVL_ISA_SCALAR: i32 = 1;
/// x86-64 with AVX2, FMA and F16C.
pub const KVL_ISA_AVX2: i32 = 2;
/// x86-64 with AVX-512 F, BW, CD, DQ and VL.
pub const KVL_ISA_AVX512: i32 = 3;
/// AArch64 with Advanced SIMD.
pub const KVL_ISA_NEON: i32 = 4;
/// x86-64 with all features of `KVL_ISA_AVX512_BF16`, and AMX tiles with products of bf16 and int8. This level has kernels for attention
/// over bf16, and over int8 keys at `KVL_PRECISION_INTEGER`, alone and uses those of the levels below for everything else. It is
/// preferred to these.
pub const KVL_ISA_AMX: i32 = 5;
/// AArch64 with all features of `KVL_ISA_NEON_I8MM`, and bf16 matrix products (FEAT_BF16). This level has kernels for
/// attention over bf16 alone and uses those of the levels below for everything else. It is preferred to these,
/// except on CPUs of Apple.
pub const KVL_ISA_NEON_BF16: i32 = 6;
/// x86-64 with all features of `KVL_ISA_AVX512`, and BF16 products (AVX512-BF16). This level has kernels for attention over bf16
/// alone and uses those of `KVL_ISA_AVX512` for everything else. It is preferred to that level on CPUs of AMD; on others it serves
/// where it is asked for.
pub const KVL_ISA_AVX512_BF16: i32 = 7;
/// x86-64 with the features of `KVL_ISA_AVX512`, and AVX512-VNNI. Attention over keys in int8 and in blocks at `KVL_PRECISION_INTEGER` only;
/// the other kernels are those of `KVL_ISA_AVX512`.
pub const KVL_ISA_AVX512_VNNI: i32 = 8;
/// x86-64 with the features of `KVL_ISA_AVX2`, and AVX-VNNI. As `KVL_ISA_AVX512_VNNI`, above AVX2.
pub const KVL_ISA_AVX_VNNI: i32 = 9;
/// AArch64 with the features of `KVL_ISA_NEON`, and FEAT_DotProd. As `KVL_ISA_AVX512_VNNI`, above NEON.
pub const KVL_ISA_NEON_DOTPROD: i32 = 10;
/// AArch64 with the features of `KVL_ISA_NEON_DOTPROD`, and matrix products of bytes (FEAT_I8MM), which serve two query rows and more. As
/// `KVL_ISA_AVX512_VNNI`, above NEON.
pub const KVL_ISA_NEON_I8MM: i32 = 11;

/// The name of a level, such as "avx2"; a constant. The name of `KVL_ISA_BEST` is "best".
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: a number that is no level gives "unknown".
#[unsafe(no_mangle)]
pub extern "C" fn kvl_isa_name(isa: kvl_isa) -> *const c_char {
    let text: &CStr = match isa {
        KVL_ISA_BEST => c"best",
        KVL_ISA_SCALAR => c"scalar",
        KVL_ISA_AVX2 => c"avx2",
        KVL_ISA_AVX512 => c"avx512",
        KVL_ISA_NEON => c"neon",
        KVL_ISA_AMX => c"amx",
        KVL_ISA_NEON_BF16 => c"neonbf16",
        KVL_ISA_AVX512_BF16 => c"avx512bf16",
        KVL_ISA_AVX512_VNNI => c"avx512vnni",
        KVL_ISA_AVX_VNNI => c"avxvnni",
        KVL_ISA_NEON_DOTPROD => c"neondotprod",
        KVL_ISA_NEON_I8MM => c"neoni8mm",
        _ => c"unknown",
    };
    text.as_ptr()
}

/// 1 if this CPU and operating system can run kernels of a level, 0 if not. `KVL_ISA_BEST` is always available.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: a number that is no level is not available.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_isa_available(isa: kvl_isa) -> i32 {
    guard_value(0, || {
        let available = isa == KVL_ISA_BEST || parse_isa("isa", isa).is_ok_and(Isa::is_available);
        i32::from(available)
    })
}

pub(super) fn parse_isa(name: &str, value: kvl_isa) -> Result<Isa> {
    enumeration("kvl_isa", name, value, Isa::from_u32)
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    assert!(KVL_ISA_SCALAR == Isa::Scalar as i32 && KVL_ISA_AVX2 == Isa::Avx2 as i32);
    assert!(KVL_ISA_AVX512 == Isa::Avx512 as i32 && KVL_ISA_NEON == Isa::Neon as i32);
    assert!(KVL_ISA_AMX == Isa::Amx as i32 && KVL_ISA_NEON_BF16 == Isa::NeonBf16 as i32);
    assert!(KVL_ISA_AVX512_BF16 == Isa::Avx512Bf16 as i32 && KVL_ISA_AVX512_VNNI == Isa::Avx512Vnni as i32);
    assert!(KVL_ISA_AVX_VNNI == Isa::AvxVnni as i32 && KVL_ISA_NEON_DOTPROD == Isa::NeonDotprod as i32);
    assert!(KVL_ISA_NEON_I8MM == Isa::NeonI8mm as i32 && Isa::ALL.len() == 11);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_rust_api() {
        for isa in Isa::ALL {
            // SAFETY: a constant of the library.
            let text = unsafe { CStr::from_ptr(kvl_isa_name(isa as kvl_isa)) };
            assert_eq!(text.to_str().unwrap(), isa.name());
        }
    }
}
