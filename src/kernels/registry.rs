//! The registry: every kernel of this build with its operation, types, level, name, error bound and function. It is
//! the only source for dispatch, tests and benches.

use super::api::{Function, KernelInfo, Op};
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512, avx512bf16, avx512vnni, avxvnni};
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
use super::{neon, neonbf16, neondotprod, neoni8mm};
use crate::format::CacheFormat;
use crate::isa::Isa;

/// One line of the registry.
pub(crate) struct Entry {
    pub info: KernelInfo,
    pub function: Function,
}

/// One line of a level's part of the registry.
macro_rules! entry {
    ($level:ident, $op:ident, $src:ident, $dst:ident, $precision:expr, $name:expr, $error:expr, $kind:ident($function:expr)) => {
        $crate::kernels::registry::Entry {
            info: $crate::kernels::api::KernelInfo {
                op: $crate::kernels::api::Op::$op,
                src: $crate::format::CacheFormat::$src,
                dst: $crate::format::CacheFormat::$dst,
                isa: $crate::isa::Isa::$level,
                precision: $precision,
                name: $name,
                c_name: match std::ffi::CStr::from_bytes_with_nul(concat!($name, "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a kernel's name holds a zero"),
                },
                max_error: $error,
            },
            function: $crate::kernels::api::Function::$kind($function),
        }
    };
}
pub(crate) use entry;

/// The entries of every level, the portable one first.
static LEVELS: &[&[Entry]] = &[
    scalar::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    avx2::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    avx2::bytes::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    avxvnni::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    avx512::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    avx512vnni::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    avx512bf16::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    amx::ENTRIES,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    neon::ENTRIES,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    neondotprod::ENTRIES,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    neoni8mm::ENTRIES,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    neonbf16::ENTRIES,
];

/// A kernel that writes f16 saturated, in place of the one for the same operation and source type.
pub(crate) type Saturating = (Op, CacheFormat, Function);

/// The kernels of a level that write f16 saturated. They are listed in the registry as those that they stand for.
pub(crate) fn saturating(level: Isa) -> &'static [Saturating] {
    match level {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::shells::SATURATING,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::shells::SATURATING,
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Isa::Neon => neon::shells::SATURATING,
        _ => scalar::shells::SATURATING,
    }
}

/// The registry: all kernels of this build, level by level in the order of preference, the portable one first.
pub(crate) fn entries() -> impl Iterator<Item = &'static Entry> {
    LEVELS.iter().flat_map(|entries| entries.iter())
}

/// Every kernel of this build, whether this CPU can run it or not.
pub fn kernels() -> impl Iterator<Item = KernelInfo> {
    entries().map(|entry| entry.info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::api::Precision;

    /// `<op>[_<source>[_<target>]][_<precision>]_<isa>`: one type for an operation with one type, none for an
    /// operation without a choice.
    fn grammatical(info: &KernelInfo) -> String {
        let types = match info.op {
            Op::RopeAngles => vec![],
            Op::Rope | Op::KvWrite | Op::KvRead | Op::RmsNorm | Op::Hadamard => vec![info.src.name(), info.dst.name()],
            Op::RepeatKv | Op::Attention | Op::MergeStates => vec![info.src.name()],
        };
        // The default precision is not part of the name.
        let precision = info.precision.filter(|&p| p != Precision::Default).map(Precision::name);
        let words = [info.op.name()].into_iter().chain(types).chain(precision).chain([info.isa.name()]);
        words.collect::<Vec<_>>().join("_")
    }

    #[test]
    fn names_follow_their_grammar() {
        for info in kernels() {
            assert_eq!(info.name, grammatical(&info));
            assert_eq!(info.c_name.to_str(), Ok(info.name));
        }
        // The level is the last word of a name, so that it must be one word.
        assert!(Isa::ALL.into_iter().all(|isa| !isa.name().contains('_')));
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = kernels().map(|info| info.name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
