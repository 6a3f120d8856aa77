//! Detection of the CPU and the operating system: the features of each level, the permission to use AMX, the sizes of
//! caches. It uses feature bits of CPUID (on AArch64, of the operating system), never the name of a model; the vendor is for
//! the tuning, which changes no result.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod cache;

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
macro_rules! feature_names {
    ([$($feature:tt)*] $($more:literal)*) => { &[$($feature,)* $($more),*] };
}
pub(crate) use feature_names;

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
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub(crate) use detected;

/// Whether AMD made this CPU.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_amd() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    let vendor = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
    vendor.as_flattened() == b"AuthenticAMD"
}

/// Whether AMD made this CPU.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn is_amd() -> bool {
    false
}
