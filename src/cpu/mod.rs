//! Detection of the CPU and the operating system: the features of each level, the permission to use AMX, the sizes of
//! caches. It uses feature bits of CPUID (on AArch64, of the operating system), never the name of a model.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod cache;

use crate::isa::Isa;

/// Calls a macro with the features of a level as literals in brackets. This is the only place where they are listed.
/// The features of AMX itself are missing, because the compiler has no stable names for them.
///
/// `level_features!(Avx2, then! { rest })` becomes `then! { ["avx2" "fma" "f16c"] rest }`.
macro_rules! level_features {
    (Scalar, $then:ident! { $($rest:tt)* }) => { $then! { [] $($rest)* } };
    (Avx2, $then:ident! { $($rest:tt)* }) => { $then! { ["avx2" "fma" "f16c"] $($rest)* } };
    (Avx512, $then:ident! { $($rest:tt)* }) => {
        $then! { ["avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl"] $($rest)* }
    };
    (Neon, $then:ident! { $($rest:tt)* }) => { $then! { ["neon"] $($rest)* } };
    (NeonBf16, $then:ident! { $($rest:tt)* }) => { $then! { ["neon" "bf16"] $($rest)* } };
}
pub(crate) use level_features;

/// The names of features, and additional names.
macro_rules! names {
    ([$($feature:tt)*] $($more:literal)*) => { &[$($feature,)* $($more),*] };
}

/// The names of a level's features.
pub(crate) const fn features(level: Isa) -> &'static [&'static str] {
    match level {
        Isa::Scalar => level_features!(Scalar, names! {}),
        Isa::Avx2 => level_features!(Avx2, names! {}),
        Isa::Avx512 => level_features!(Avx512, names! {}),
        Isa::Amx => level_features!(Avx512, names! { "amx-tile" "amx-bf16" }),
        Isa::Neon => level_features!(Neon, names! {}),
        Isa::NeonBf16 => level_features!(NeonBf16, names! {}),
    }
}

/// Whether this CPU and operating system have all of some features.
#[cfg(target_arch = "x86_64")]
macro_rules! detected {
    ([$($feature:tt)*]) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
}

/// Whether this CPU and operating system have all of some features.
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
macro_rules! detected {
    ([$($feature:tt)*]) => { $(std::arch::is_aarch64_feature_detected!($feature))&&* };
}

/// Whether this CPU and operating system can run kernels of a level.
pub(crate) fn has(level: Isa) -> bool {
    match level {
        Isa::Scalar => true,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => level_features!(Avx2, detected! {}),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => level_features!(Avx512, detected! {}),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::is_available(),
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Isa::Neon => level_features!(Neon, detected! {}),
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Isa::NeonBf16 => level_features!(NeonBf16, detected! {}),
        #[allow(unreachable_patterns)]
        _ => false,
    }
}
