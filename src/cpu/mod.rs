//! Detection of the CPU and the operating system: the features of each level, the permission to use AMX, the sizes of
//! caches. It uses feature bits of CPUID (on AArch64, of the operating system), never the name of a model. The vendor is for the
//! tuning, which changes no result, and for the choice between levels that the CPU has.

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
    (AvxVnni, $then:ident! { $($rest:tt)* }) => { $then! { ["avx2" "fma" "f16c" "avxvnni"] $($rest)* } };
    (Avx512, $then:ident! { $($rest:tt)* }) => {
        $then! { ["avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl"] $($rest)* }
    };
    (Avx512Vnni, $then:ident! { $($rest:tt)* }) => {
        $then! { ["avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl" "avx512vnni"] $($rest)* }
    };
    // Every CPU with AVX512-BF16 has VNNI.
    (Avx512Bf16, $then:ident! { $($rest:tt)* }) => {
        $then! { ["avx2" "fma" "f16c" "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl" "avx512vnni" "avx512bf16"] $($rest)* }
    };
    (Neon, $then:ident! { $($rest:tt)* }) => { $then! { ["neon"] $($rest)* } };
    (NeonDotprod, $then:ident! { $($rest:tt)* }) => { $then! { ["neon" "dotprod"] $($rest)* } };
    // Every CPU with FEAT_I8MM has FEAT_DotProd, and every one with FEAT_BF16 has FEAT_I8MM: both came with Armv8.6.
    (NeonI8mm, $then:ident! { $($rest:tt)* }) => { $then! { ["neon" "dotprod" "i8mm"] $($rest)* } };
    (NeonBf16, $then:ident! { $($rest:tt)* }) => { $then! { ["neon" "dotprod" "i8mm" "bf16"] $($rest)* } };
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

/// Who made this CPU, in the words of CPUID; empty where there is none.
#[cfg(target_arch = "x86_64")]
pub(crate) fn vendor() -> &'static str {
    // CPUID takes thousands of cycles on virtual machines.
    static VENDOR: std::sync::OnceLock<[u8; 12]> = std::sync::OnceLock::new();
    let name = VENDOR.get_or_init(|| {
        let id = std::arch::x86_64::__cpuid(0);
        let mut name = [0; 12];
        name.copy_from_slice([id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened());
        name
    });
    std::str::from_utf8(name).unwrap_or_default()
}

/// Who made this CPU; empty where CPUID does not say.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn vendor() -> &'static str {
    ""
}

/// Features by which CPUs of one vendor are told apart, from the newest to the oldest.
#[cfg(all(target_arch = "x86_64", any(test, feature = "bench")))]
pub(crate) const KEYS: &[&str] = &["avx512fp16", "avx512bf16", "avxvnni", "avx512vnni"];
/// Features by which CPUs of one vendor are told apart, from the newest to the oldest.
#[cfg(all(not(target_arch = "x86_64"), any(test, feature = "bench")))]
pub(crate) const KEYS: &[&str] = &[];

/// Whether this CPU has one of the features by which CPUs are told apart.
pub(crate) fn has(feature: &str) -> bool {
    match feature {
        #[cfg(target_arch = "x86_64")]
        "avx512fp16" => detected!(["avx512fp16"]),
        #[cfg(target_arch = "x86_64")]
        "avx512bf16" => detected!(["avx512bf16"]),
        #[cfg(target_arch = "x86_64")]
        "avxvnni" => detected!(["avxvnni"]),
        #[cfg(target_arch = "x86_64")]
        "avx512vnni" => detected!(["avx512vnni"]),
        _ => false,
    }
}

/// The vendor of this CPU, and those of [`KEYS`] that it has: what an entry of the tuning's table needs.
#[cfg(feature = "bench")]
pub(crate) fn cpu_class() -> (&'static str, Vec<&'static str>) {
    (vendor(), KEYS.iter().copied().filter(|key| has(key)).collect())
}

/// Whether Apple made this CPU.
pub(crate) fn is_apple() -> bool {
    #[cfg(all(target_arch = "aarch64", target_os = "linux"))]
    {
        // The kernel shows the main ID register of each CPU; its upper byte names the implementer.
        const APPLE: u64 = 0x61;
        static APPLES: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        *APPLES.get_or_init(|| {
            let text = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1");
            text.is_ok_and(|text| implementer(&text) == Some(APPLE))
        })
    }
    #[cfg(not(all(target_arch = "aarch64", target_os = "linux")))]
    {
        cfg!(all(target_arch = "aarch64", target_vendor = "apple"))
    }
}

/// The implementer in Linux's text of a main ID register, such as `0x00000000410fd4f0`.
#[cfg(any(test, all(target_arch = "aarch64", target_os = "linux")))]
fn implementer(register: &str) -> Option<u64> {
    let digits = register.trim().strip_prefix("0x")?;
    Some(u64::from_str_radix(digits, 16).ok()? >> 24 & 0xff)
}

#[cfg(test)]
mod tests {
    use super::implementer;

    #[test]
    fn implementers_are_read_from_the_main_id_register() {
        assert_eq!(implementer("0x00000000410fd4f0\n"), Some(0x41)); // Neoverse V2
        assert_eq!(implementer("0x00000000611f0320\n"), Some(0x61)); // Apple M2
        for text in ["", "410fd4f0", "0x", "0xnone"] {
            assert_eq!(implementer(text), None);
        }
    }
}
