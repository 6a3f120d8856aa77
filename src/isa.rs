//! Instruction-set levels: which exist, what each needs, and whether this CPU has it.

use crate::error::{Result, ensure, fail};

/// An instruction-set level for which kernels are built.
///
/// A level is a *set* of CPU features ([`Isa::features`]); it is available when the CPU and the operating system report
/// all of them, and nothing else (model names, versions) is looked at. The bits of an output row depend on the level.
/// The values are those of `kvl_isa` in the C header, where 0 stands for "the best there is".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Isa {
    /// Portable code that the compiler vectorises as it can; available everywhere.
    Scalar = 1,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2 = 2,
    /// x86-64 with AVX-512 F, BW, CD, DQ and VL.
    Avx512 = 3,
    /// AArch64 with Advanced SIMD.
    Neon = 4,
    /// x86-64 with what [`Avx512`](Self::Avx512) needs, AMX tiles and their bf16 products. A partial level: it has kernels
    /// for attention over bf16 alone, and whatever else there is comes from AVX-512.
    Amx = 5,
    /// AArch64 with what [`Neon`](Self::Neon) needs and bf16 matrix products (FEAT_BF16). A partial level: it has kernels for
    /// attention over bf16 alone, and whatever else there is comes from NEON.
    NeonBf16 = 6,
}

impl Isa {
    /// Every level, of every architecture; on one architecture, a later one is preferred. The values say nothing of that.
    pub const ALL: [Self; 6] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Amx, Self::Neon, Self::NeonBf16];

    /// The place in [`Self::ALL`]: of two levels of one architecture, the higher is preferred.
    pub(crate) const fn rank(self) -> usize {
        let mut rank = 0;
        while Self::ALL[rank] as u32 != self as u32 {
            rank += 1;
        }
        rank
    }

    /// `"scalar"`, `"avx2"`, `"avx512"`, `"amx"`, `"neon"` or `"neon_bf16"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonBf16 => "neon_bf16",
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
            Self::Scalar => &[],
            Self::Avx2 => &["avx2", "fma", "f16c"],
            Self::Avx512 => &["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
            Self::Amx => &[
                "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "amx-tile",
                "amx-bf16",
            ],
            Self::Neon => &["neon"],
            Self::NeonBf16 => &["neon", "bf16"],
        }
    }

    /// Whether the level has kernels for some operations and types only; the others are served by the levels below.
    pub const fn is_partial(self) -> bool {
        matches!(self, Self::Amx | Self::NeonBf16)
    }

    /// Whether kernels of this level are part of this build (they are whenever the architecture fits).
    pub const fn is_built(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Avx2 | Self::Avx512 | Self::Amx => cfg!(target_arch = "x86_64"),
            Self::Neon | Self::NeonBf16 => cfg!(all(target_arch = "aarch64", target_endian = "little")),
        }
    }

    /// Whether this CPU and operating system can run kernels of this level. The first question about [`Self::Amx`] on Linux
    /// asks the kernel for the permission to use its registers, which then holds for the whole process.
    pub fn is_available(self) -> bool {
        crate::kernels::level_available(self)
    }

    /// The best level that is available here.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|l| l.is_available()).unwrap_or(Self::Scalar)
    }

    /// The name of the environment variable that lowers every context's level.
    pub const ENV: &'static str = "KVLANE_MAX_ISA";

    /// The best level that is available and not above `ceiling`.
    pub(crate) fn best_up_to(ceiling: Self) -> Result<Self> {
        Self::check_built(ceiling)?;
        Ok(Self::ALL
            .into_iter()
            .rev()
            .find(|&l| l.rank() <= ceiling.rank() && l.is_available())
            .unwrap_or(Self::Scalar))
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

    /// The ceiling that the environment sets, if it does.
    pub(crate) fn ceiling_from_env() -> Result<Option<Self>> {
        let Some(value) = std::env::var_os(Self::ENV) else {
            return Ok(None);
        };
        if value.is_empty() {
            return Ok(None);
        }
        match value.to_str().and_then(Self::from_name) {
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
