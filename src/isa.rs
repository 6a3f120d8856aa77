//! Instruction-set levels: their features, their order of preference, and their availability.

#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
use crate::cpu::detected;
use crate::cpu::{self, feature_names, level_features};
use crate::error::{Result, ensure, fail};

/// An instruction-set level for which kernels are built.
///
/// A level is a *set* of CPU features ([`Isa::features`]); it is available if the CPU and the operating system report
/// all of them. Model names and versions do not matter. The bits of an output row depend on the level. The values are
/// those of `kvl_isa` in the C header, where 0 means "the best level".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Isa {
    /// Portable code, available everywhere.
    Scalar = 1,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2 = 2,
    /// x86-64 with AVX-512 F, BW, CD, DQ and VL.
    Avx512 = 3,
    /// AArch64 with Advanced SIMD.
    Neon = 4,
    /// x86-64 with the features of [`Avx512Bf16`](Self::Avx512Bf16), AMX tiles and their products of bf16 and int8. A partial level with
    /// kernels for attention over bf16, and over int8 keys at [`Precision::Integer`](crate::Precision::Integer), only; the other kernels
    /// are those of AVX-512 and AVX512-VNNI.
    Amx = 5,
    /// AArch64 with the features of [`NeonI8mm`](Self::NeonI8mm) and bf16 matrix products (FEAT_BF16). A partial level with
    /// kernels for attention over bf16 only; the other kernels are those of the levels below. It is preferred to these, except on CPUs of
    /// Apple, where its products are slower than the arithmetic that they would replace; there it serves only if it is named.
    NeonBf16 = 6,
    /// x86-64 with the features of [`Avx512`](Self::Avx512) and AVX512-BF16. A partial level with kernels for attention over
    /// bf16 only; the other kernels are those of AVX-512. It is preferred to AVX-512 on CPUs of AMD, from Zen 4 on. Intel's
    /// have the instructions too, at half the rate of the arithmetic that they would replace, so that the level serves there only
    /// if it is named.
    Avx512Bf16 = 7,
    /// x86-64 with the features of [`Avx512`](Self::Avx512) and AVX512-VNNI. A partial level with kernels for attention over keys
    /// in int8 and in blocks at [`Precision::Integer`](crate::Precision::Integer) only; the other kernels are those of AVX-512.
    Avx512Vnni = 8,
    /// x86-64 with the features of [`Avx2`](Self::Avx2) and AVX-VNNI, without AVX-512. As [`Avx512Vnni`](Self::Avx512Vnni), above AVX2.
    AvxVnni = 9,
    /// AArch64 with the features of [`Neon`](Self::Neon) and FEAT_DotProd. As [`Avx512Vnni`](Self::Avx512Vnni), above NEON.
    NeonDotprod = 10,
    /// AArch64 with the features of [`NeonDotprod`](Self::NeonDotprod) and matrix products of bytes (FEAT_I8MM), which serve two query
    /// rows and more. As [`Avx512Vnni`](Self::Avx512Vnni), above NEON.
    NeonI8mm = 11,
}

impl Isa {
    /// Every level, of every architecture.
    pub const ALL: [Self; 11] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
        Self::Amx,
        Self::Neon,
        Self::NeonDotprod,
        Self::NeonI8mm,
        Self::NeonBf16,
    ];

    /// The order of preference: of the available levels, the one with the highest priority serves. It is not the
    /// number of features, because a level with more features can be slower: on some CPUs, products of bf16 have less than the rate
    /// of the arithmetic that they replace.
    pub(crate) fn priority(self) -> u32 {
        match self {
            Self::Scalar => 0,
            Self::NeonBf16 if cpu::is_apple() => 5,
            Self::Avx2 | Self::Neon => 10,
            Self::AvxVnni | Self::NeonDotprod => 12,
            Self::NeonI8mm => 14,
            Self::Avx512Bf16 if cpu::vendor() != "AuthenticAMD" => 15,
            Self::Avx512 | Self::NeonBf16 => 20,
            Self::Avx512Vnni => 22,
            Self::Avx512Bf16 => 25,
            Self::Amx => 30,
        }
    }

    /// The order of preference between kernels of a context of level `chosen`, which comes before all others.
    pub(crate) fn priority_within(self, chosen: Self) -> u32 {
        if self == chosen { u32::MAX } else { self.priority() }
    }

    /// Whether a CPU that has exactly the features of `ceiling` can run kernels of this level.
    pub(crate) fn is_within(self, ceiling: Self) -> bool {
        self.features().iter().all(|feature| ceiling.features().contains(feature))
    }

    /// `"scalar"`, `"avx2"`, `"avxvnni"`, `"avx512"`, `"avx512vnni"`, `"avx512bf16"`, `"amx"`, `"neon"`, `"neondotprod"`,
    /// `"neoni8mm"` or `"neonbf16"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
            Self::AvxVnni => "avxvnni",
            Self::Neon => "neon",
            Self::NeonDotprod => "neondotprod",
            Self::NeonI8mm => "neoni8mm",
            Self::NeonBf16 => "neonbf16",
        }
    }

    /// The level called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|l| l.name() == name)
    }

    /// The level with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&l| l as u32 == value)
    }

    /// The CPU features that the level consists of.
    pub const fn features(self) -> &'static [&'static str] {
        match self {
            Self::Scalar => level_features!(Scalar, feature_names! {}),
            Self::Avx2 => level_features!(Avx2, feature_names! {}),
            Self::Avx512 => level_features!(Avx512, feature_names! {}),
            Self::Avx512Vnni => level_features!(Avx512Vnni, feature_names! {}),
            Self::Avx512Bf16 => level_features!(Avx512Bf16, feature_names! {}),
            Self::Amx => level_features!(Avx512Bf16, feature_names! { "amx-tile" "amx-bf16" "amx-int8" }),
            Self::AvxVnni => level_features!(AvxVnni, feature_names! {}),
            Self::Neon => level_features!(Neon, feature_names! {}),
            Self::NeonDotprod => level_features!(NeonDotprod, feature_names! {}),
            Self::NeonI8mm => level_features!(NeonI8mm, feature_names! {}),
            Self::NeonBf16 => level_features!(NeonBf16, feature_names! {}),
        }
    }

    /// Whether the level has kernels for some operations and types only. Other levels serve the rest.
    pub const fn is_partial(self) -> bool {
        matches!(
            self,
            Self::AvxVnni
                | Self::Avx512Vnni
                | Self::Avx512Bf16
                | Self::Amx
                | Self::NeonDotprod
                | Self::NeonI8mm
                | Self::NeonBf16
        )
    }

    /// Whether kernels of this level are part of this build, which depends on the architecture only.
    pub const fn is_built(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Avx2 | Self::AvxVnni | Self::Avx512 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Amx => {
                cfg!(target_arch = "x86_64")
            }
            Self::Neon | Self::NeonDotprod | Self::NeonI8mm | Self::NeonBf16 => {
                cfg!(all(target_arch = "aarch64", target_endian = "little"))
            }
        }
    }

    /// Whether this CPU and operating system can run kernels of this level. On Linux, the first call for [`Self::Amx`]
    /// requests the permission to use its registers, for the whole process.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => level_features!(Avx2, detected! {}),
            #[cfg(all(target_arch = "x86_64", not(kvlane_emulate_avxvnni)))]
            Self::AvxVnni => level_features!(AvxVnni, detected! {}),
            #[cfg(all(target_arch = "x86_64", kvlane_emulate_avxvnni))]
            Self::AvxVnni => level_features!(Avx2, detected! {}),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => level_features!(Avx512, detected! {}),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => level_features!(Avx512Vnni, detected! {}),
            #[cfg(all(target_arch = "x86_64", not(kvlane_emulate_avx512bf16)))]
            Self::Avx512Bf16 => level_features!(Avx512Bf16, detected! {}),
            #[cfg(all(target_arch = "x86_64", kvlane_emulate_avx512bf16))]
            Self::Avx512Bf16 => level_features!(Avx512, detected! {}),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => crate::cpu::amx::is_available(),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => level_features!(Neon, detected! {}),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonDotprod => level_features!(NeonDotprod, detected! {}),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonI8mm => level_features!(NeonI8mm, detected! {}),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonBf16 => level_features!(NeonBf16, detected! {}),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The preferred level of this CPU.
    pub fn best() -> Self {
        Self::best_within(&[]).unwrap_or(Self::Scalar)
    }

    /// The name of the environment variable that lowers every context's level.
    pub const ENV: &'static str = "KVLANE_MAX_ISA";

    /// The preferred level among those that are available and have no feature beyond those of any ceiling. A level that is itself a
    /// ceiling was asked for, and comes before those that this CPU prefers.
    pub(crate) fn best_within(ceilings: &[Self]) -> Result<Self> {
        ceilings.iter().try_for_each(|ceiling| ceiling.check_built())?;
        // Availability is checked last, because for AMX the check requests a permission for the whole process.
        let level = Self::ALL
            .into_iter()
            .filter(|level| ceilings.iter().all(|&ceiling| level.is_within(ceiling)) && level.is_available())
            .max_by_key(|level| (ceilings.contains(level), level.priority()));
        Ok(level.unwrap_or(Self::Scalar))
    }

    /// An error if the level is one of another architecture.
    pub(crate) fn check_built(self) -> Result<()> {
        ensure!(
            self.is_built(),
            Unsupported,
            "ISA level {} does not exist on this architecture ({})",
            self.name(),
            std::env::consts::ARCH
        );
        Ok(())
    }

    /// The ceiling in the environment variable, if it is set.
    pub(crate) fn ceiling_from_env() -> Result<Option<Self>> {
        let Some(value) = std::env::var_os(Self::ENV) else {
            return Ok(None);
        };
        if value.is_empty() {
            return Ok(None);
        }
        // People write levels in capitals, too.
        match value.to_str().and_then(|value| Self::from_name(&value.to_ascii_lowercase())) {
            Some(level) => Ok(Some(level)),
            None => {
                let known: Vec<_> = Self::ALL.iter().map(|l| l.name()).collect();
                fail!(InvalidEnum, "{} is {:?}, which is none of {}", Self::ENV, value, known.join(", "))
            }
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
