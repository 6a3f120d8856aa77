//! The kernels: one registry, one vector trait, one generic body an algorithm, one thin shell a level.
//!
//! | where | what |
//! | --- | --- |
//! | this file | the registry: every kernel's operation, types, level, name, error bound and function |
//! | `simd` | the vector trait |
//! | `generic` | the algorithms, over the trait |
//! | `scalar`, `avx2`, `avx512`, `neon` | the trait for one level, and its shells |
//! | `amx` | a partial level: attention over bf16, by tile products |
//! | `neon_bf16` | a partial level: attention over bf16, by products of small matrices |
//!
//! A kernel takes only what an operation has validated; it allocates nothing, starts no thread and keeps no state.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod generic;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neon;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neon_bf16;
pub(crate) mod scalar;
pub(crate) mod simd;

use crate::dtype::DType;
use crate::isa::Isa;
use crate::ops::rope::Pairing;
use generic::attention::{Problem, Tile};

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Op {
    /// Cosines and sines of RoPE angles; from f64 to f32.
    RopeAngles = 0,
    /// RoPE, and RoPE fused with a cache write: source type, target type.
    Rope = 1,
    /// The cache write: source type, target type.
    KvWrite = 2,
    /// The explicit repeat of KV heads: one type twice.
    RepeatKv = 3,
    /// Attention over a cache: the type of K and V twice; queries and output may be of any type.
    Attention = 4,
    /// The merge of attention states: one type twice.
    MergeStates = 5,
    /// RMS norm of heads, alone or on the way to RoPE or the cache: source type, target type.
    RmsNorm = 6,
}

impl Op {
    /// Every operation.
    pub const ALL: [Self; 7] = [
        Self::RopeAngles,
        Self::Rope,
        Self::KvWrite,
        Self::RepeatKv,
        Self::Attention,
        Self::MergeStates,
        Self::RmsNorm,
    ];

    /// The operation's name, as in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RopeAngles => "rope_angles",
            Self::Rope => "rope",
            Self::KvWrite => "kv_write",
            Self::RepeatKv => "repeat_kv",
            Self::Attention => "attention",
            Self::MergeStates => "merge_states",
            Self::RmsNorm => "rms_norm",
        }
    }

    /// The operation with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&o| o as u32 == value)
    }
}

/// How exactly attention computes, where levels have kernels for more than one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Precision {
    /// The fastest kernel. Over a bf16 cache at the levels AMX and NEON with bf16, softmax weights are rounded to
    /// bf16.
    #[default]
    Default = 0,
    /// What f32 arithmetic gives: weights are not rounded to less than 16 bits.
    High = 1,
}

impl Precision {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Default, Self::High];

    /// `"default"` or `"high"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::High => "high",
        }
    }

    /// The precision with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&p| p as u32 == value)
    }
}

/// What the registry says of a kernel.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KernelInfo {
    /// What it does.
    pub op: Op,
    /// The type it reads (of K and V, in attention).
    pub src: DType,
    /// The type it writes (for attention: the same as `src`).
    pub dst: DType,
    /// The level it is compiled for.
    pub isa: Isa,
    /// The precision that it serves; every one if absent.
    pub precision: Option<Precision>,
    /// `<op>_<types>_<isa>`.
    pub name: &'static str,
    /// The largest error against exact arithmetic on the same inputs with f32 queries and output, as a fraction of the
    /// largest magnitude that goes into the result (of V in attention); rounding to a narrower target comes on top. So does,
    /// in attention, the rounding of logits above 32 or so to f32: a relative error of 2^-24 of a large logit is an absolute
    /// one that its exponential turns into a relative one again.
    pub max_error: f32,
}

/// `heads` vectors of `dim` elements; strides in elements. Target head `h * repeats + r` is source head `h`.
#[derive(Clone, Copy)]
pub(crate) struct CopyArgs {
    pub src: *const u8,
    /// Null, or a second source whose elements take turns with those of the first, both in one target of `2 * dim` elements. Then
    /// all elements lie together, and nothing is repeated.
    pub second: *const u8,
    pub dst: *mut u8,
    pub heads: usize,
    pub repeats: usize,
    pub src_head: isize,
    pub dst_head: isize,
    pub src_dim: isize,
    pub dst_dim: isize,
    pub dim: usize,
    /// Bytes to what is copied after it, and to where that goes, which is asked for meanwhile; 0: nothing.
    pub src_ahead: isize,
    pub dst_ahead: isize,
}

/// The heads of one token, and `rotary_dim / 2` cosines and sines.
#[derive(Clone, Copy)]
pub(crate) struct RopeArgs {
    pub copy: CopyArgs,
    pub rotary_dim: usize,
    pub pairing: Pairing,
    pub cos: *const f32,
    pub sin: *const f32,
}

impl std::ops::Deref for RopeArgs {
    type Target = CopyArgs;
    fn deref(&self) -> &CopyArgs {
        &self.copy
    }
}

/// The heads of one token, and what they are normalised with.
#[derive(Clone, Copy)]
pub(crate) struct NormArgs {
    pub copy: CopyArgs,
    /// `dim` weights; null for all 1.
    pub weight: *const f32,
    pub eps: f32,
}

/// `dim` elements that lie together, in each of `states` sources.
#[derive(Clone, Copy)]
pub(crate) struct MergeArgs {
    pub srcs: *const *const u8,
    pub weights: *const f32,
    pub states: usize,
    pub dst: *mut u8,
    pub dim: usize,
    /// Bytes to what is merged later, in every source and in the target, which is asked for meanwhile; 0: nothing.
    pub ahead: isize,
}

pub(crate) type AnglesFn = unsafe fn(f64, &[f64], f64, &mut [f32], &mut [f32]);
pub(crate) type RopeFn = unsafe fn(&RopeArgs);
pub(crate) type CopyFn = unsafe fn(&CopyArgs);
pub(crate) type MergeFn = unsafe fn(&MergeArgs);
pub(crate) type NormFn = unsafe fn(&NormArgs);
/// The memory is aligned to 64 bytes and has what [`AttentionFns::scratch_bytes`] says for the tile's rows.
pub(crate) type TileFn = unsafe fn(&Problem, &Tile, *mut u8);

/// A kernel's entry points.
#[derive(Clone, Copy)]
pub(crate) enum Function {
    Angles(AnglesFn),
    Rope(RopeFn),
    Copy(CopyFn),
    Attention(AttentionFns),
    Merge(MergeFn),
    Norm(NormFn),
}

/// Attention runs tiles; a row that was split over chunks is reduced afterwards.
#[derive(Clone, Copy)]
pub(crate) struct AttentionFns {
    pub tile: TileFn,
    pub reduce: TileFn,
    /// The most rows of a tile.
    pub max_rows: usize,
    /// What the rows of a KV head should be a multiple of, where they are more than a tile takes.
    pub row_step: usize,
    /// Whether a tile may have several KV heads.
    pub several_heads: bool,
    /// Bytes of scratch memory for tiles of so many rows, keys of so many elements and values of so many; a multiple of 64.
    pub scratch_bytes: fn(usize, usize, usize) -> usize,
}

/// One line of the registry.
pub(crate) struct Entry {
    pub info: KernelInfo,
    pub function: Function,
}

/// One line of a level's part of the registry.
macro_rules! entry {
    ($level:ident, $op:ident, $src:ident, $dst:ident, $name:expr, $error:expr, $kind:ident($function:expr)) => {
        $crate::kernels::entry!($level, $op, $src, $dst, None, $name, $error, $kind($function))
    };
    ($level:ident, $op:ident, $src:ident, $dst:ident, $precision:expr, $name:expr, $error:expr, $kind:ident($function:expr)) => {
        $crate::kernels::Entry {
            info: $crate::kernels::KernelInfo {
                op: $crate::kernels::Op::$op,
                src: $crate::dtype::DType::$src,
                dst: $crate::dtype::DType::$dst,
                isa: $crate::isa::Isa::$level,
                precision: $precision,
                name: $name,
                max_error: $error,
            },
            function: $crate::kernels::Function::$kind($function),
        }
    };
}
pub(crate) use entry;

/// Writes a level's shells, which are the generic bodies compiled with the level's features, and its part of the registry.
macro_rules! kernel_shells {
    ($level:ident, $name:literal, $(#[$feature:meta])*) => {
        mod shells {
            use super::$level;
            use $crate::kernels::generic::{self, attention::{MAX_TILE_ROWS, Problem, Scratch, TILE_ROWS, Tile, Vectors}};
            use $crate::kernels::simd::Memory;
            use $crate::kernels::{AttentionFns, CopyArgs, MergeArgs, NormArgs, RopeArgs};

            // Every shell is unsafe for the same two reasons: its caller vouches for the level's features (the registry
            // hands it out only where they are available) and for the arguments (the operations have validated them).

            $(#[$feature])*
            pub(super) unsafe fn angles(position: f64, inv_freq: &[f64], magnitude: f64, cos: &mut [f32], sin: &mut [f32]) {
                generic::rope::angles(position, inv_freq, magnitude, cos, sin);
            }
            $(#[$feature])*
            pub(super) unsafe fn rope<A: Memory, B: Memory>(args: &RopeArgs) {
                // SAFETY: the caller's.
                unsafe { generic::rope::rope::<_, A, B>($level::new_unchecked(), args) }
            }
            $(#[$feature])*
            pub(super) unsafe fn copy<A: Memory, B: Memory>(args: &CopyArgs) {
                // SAFETY: the caller's.
                unsafe { generic::copy::copy::<_, A, B>($level::new_unchecked(), args) }
            }
            $(#[$feature])*
            pub(super) unsafe fn merge<T: Memory>(args: &MergeArgs) {
                // SAFETY: the caller's.
                unsafe { generic::merge::merge::<_, T>($level::new_unchecked(), args) }
            }
            $(#[$feature])*
            pub(super) unsafe fn rms_norm<A: Memory, B: Memory>(args: &NormArgs) {
                // SAFETY: the caller's.
                unsafe { generic::norm::rms_norm::<_, A, B>($level::new_unchecked(), args) }
            }
            $(#[$feature])*
            unsafe fn tile<T: Memory>(problem: &Problem, tile: &Tile, scratch: *mut u8) {
                let scratch = Scratch::layout(scratch, tile.rows(), problem.q.shape[3], problem.v_dim).0;
                // SAFETY: the caller's.
                unsafe { generic::attention::tile::<_, T>($level::new_unchecked(), problem, tile, &scratch, &Vectors) }
            }
            $(#[$feature])*
            unsafe fn reduce<T: Memory>(problem: &Problem, tile: &Tile, scratch: *mut u8) {
                let scratch = Scratch::layout(scratch, tile.rows(), problem.q.shape[3], problem.v_dim).0;
                let splits = T::splits::<$level>();
                // SAFETY: the caller's.
                unsafe { generic::attention::reduce($level::new_unchecked(), problem, tile, scratch.total, splits) }
            }
            pub(super) const fn attention<T: Memory>() -> AttentionFns {
                AttentionFns {
                    tile: tile::<T>,
                    reduce: reduce::<T>,
                    max_rows: MAX_TILE_ROWS,
                    row_step: 2 * TILE_ROWS,
                    several_heads: true,
                    scratch_bytes: Scratch::bytes,
                }
            }
        }

        pub(crate) static ENTRIES: [$crate::kernels::Entry; $crate::kernels::ENTRIES_PER_LEVEL] = [
            $crate::kernels::entry!($level, RopeAngles, F32, F32, concat!("rope_angles_", $name), 1e-7, Angles(shells::angles)),
            $crate::kernels::entry!($level, Rope, F32, F32, concat!("rope_f32_f32_", $name), 4e-7, Rope(shells::rope::<f32, f32>)),
            $crate::kernels::entry!($level, Rope, F32, F16, concat!("rope_f32_f16_", $name), 4e-7, Rope(shells::rope::<f32, f16>)),
            $crate::kernels::entry!($level, Rope, F32, Bf16, concat!("rope_f32_bf16_", $name), 4e-7, Rope(shells::rope::<f32, bf16>)),
            $crate::kernels::entry!($level, Rope, F16, F32, concat!("rope_f16_f32_", $name), 4e-7, Rope(shells::rope::<f16, f32>)),
            $crate::kernels::entry!($level, Rope, F16, F16, concat!("rope_f16_f16_", $name), 4e-7, Rope(shells::rope::<f16, f16>)),
            $crate::kernels::entry!($level, Rope, F16, Bf16, concat!("rope_f16_bf16_", $name), 4e-7, Rope(shells::rope::<f16, bf16>)),
            $crate::kernels::entry!($level, Rope, Bf16, F32, concat!("rope_bf16_f32_", $name), 4e-7, Rope(shells::rope::<bf16, f32>)),
            $crate::kernels::entry!($level, Rope, Bf16, F16, concat!("rope_bf16_f16_", $name), 4e-7, Rope(shells::rope::<bf16, f16>)),
            $crate::kernels::entry!($level, Rope, Bf16, Bf16, concat!("rope_bf16_bf16_", $name), 4e-7, Rope(shells::rope::<bf16, bf16>)),
            $crate::kernels::entry!($level, KvWrite, F32, F32, concat!("kv_write_f32_f32_", $name), 0.0, Copy(shells::copy::<f32, f32>)),
            $crate::kernels::entry!($level, KvWrite, F32, F16, concat!("kv_write_f32_f16_", $name), 0.0, Copy(shells::copy::<f32, f16>)),
            $crate::kernels::entry!($level, KvWrite, F32, Bf16, concat!("kv_write_f32_bf16_", $name), 0.0, Copy(shells::copy::<f32, bf16>)),
            $crate::kernels::entry!($level, KvWrite, F16, F32, concat!("kv_write_f16_f32_", $name), 0.0, Copy(shells::copy::<f16, f32>)),
            $crate::kernels::entry!($level, KvWrite, F16, F16, concat!("kv_write_f16_f16_", $name), 0.0, Copy(shells::copy::<f16, f16>)),
            $crate::kernels::entry!($level, KvWrite, F16, Bf16, concat!("kv_write_f16_bf16_", $name), 0.0, Copy(shells::copy::<f16, bf16>)),
            $crate::kernels::entry!($level, KvWrite, Bf16, F32, concat!("kv_write_bf16_f32_", $name), 0.0, Copy(shells::copy::<bf16, f32>)),
            $crate::kernels::entry!($level, KvWrite, Bf16, F16, concat!("kv_write_bf16_f16_", $name), 0.0, Copy(shells::copy::<bf16, f16>)),
            $crate::kernels::entry!($level, KvWrite, Bf16, Bf16, concat!("kv_write_bf16_bf16_", $name), 0.0, Copy(shells::copy::<bf16, bf16>)),
            $crate::kernels::entry!($level, RepeatKv, F32, F32, concat!("repeat_kv_f32_", $name), 0.0, Copy(shells::copy::<f32, f32>)),
            $crate::kernels::entry!($level, RepeatKv, F16, F16, concat!("repeat_kv_f16_", $name), 0.0, Copy(shells::copy::<f16, f16>)),
            $crate::kernels::entry!($level, RepeatKv, Bf16, Bf16, concat!("repeat_kv_bf16_", $name), 0.0, Copy(shells::copy::<bf16, bf16>)),
            $crate::kernels::entry!($level, Attention, F32, F32, concat!("attention_f32_", $name), 1e-5, Attention(shells::attention::<f32>())),
            $crate::kernels::entry!($level, Attention, F16, F16, concat!("attention_f16_", $name), 1e-5, Attention(shells::attention::<f16>())),
            $crate::kernels::entry!($level, Attention, Bf16, Bf16, concat!("attention_bf16_", $name), 1e-5, Attention(shells::attention::<bf16>())),
            $crate::kernels::entry!($level, MergeStates, F32, F32, concat!("merge_states_f32_", $name), 1e-6, Merge(shells::merge::<f32>)),
            $crate::kernels::entry!($level, MergeStates, F16, F16, concat!("merge_states_f16_", $name), 1e-6, Merge(shells::merge::<f16>)),
            $crate::kernels::entry!($level, MergeStates, Bf16, Bf16, concat!("merge_states_bf16_", $name), 1e-6, Merge(shells::merge::<bf16>)),
            $crate::kernels::entry!($level, RmsNorm, F32, F32, concat!("rms_norm_f32_f32_", $name), 2e-7, Norm(shells::rms_norm::<f32, f32>)),
            $crate::kernels::entry!($level, RmsNorm, F32, F16, concat!("rms_norm_f32_f16_", $name), 2e-7, Norm(shells::rms_norm::<f32, f16>)),
            $crate::kernels::entry!($level, RmsNorm, F32, Bf16, concat!("rms_norm_f32_bf16_", $name), 2e-7, Norm(shells::rms_norm::<f32, bf16>)),
            $crate::kernels::entry!($level, RmsNorm, F16, F32, concat!("rms_norm_f16_f32_", $name), 2e-7, Norm(shells::rms_norm::<f16, f32>)),
            $crate::kernels::entry!($level, RmsNorm, F16, F16, concat!("rms_norm_f16_f16_", $name), 2e-7, Norm(shells::rms_norm::<f16, f16>)),
            $crate::kernels::entry!($level, RmsNorm, F16, Bf16, concat!("rms_norm_f16_bf16_", $name), 2e-7, Norm(shells::rms_norm::<f16, bf16>)),
            $crate::kernels::entry!($level, RmsNorm, Bf16, F32, concat!("rms_norm_bf16_f32_", $name), 2e-7, Norm(shells::rms_norm::<bf16, f32>)),
            $crate::kernels::entry!($level, RmsNorm, Bf16, F16, concat!("rms_norm_bf16_f16_", $name), 2e-7, Norm(shells::rms_norm::<bf16, f16>)),
            $crate::kernels::entry!($level, RmsNorm, Bf16, Bf16, concat!("rms_norm_bf16_bf16_", $name), 2e-7, Norm(shells::rms_norm::<bf16, bf16>)),
        ];
    };
}
pub(crate) use kernel_shells;

/// A level that is not partial has every kernel.
pub(crate) const ENTRIES_PER_LEVEL: usize = 37;

pub(crate) static LEVELS: &[&[Entry]] = &[
    &scalar::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    &avx2::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    &avx512::ENTRIES,
    #[cfg(target_arch = "x86_64")]
    &amx::ENTRIES,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &neon::ENTRIES,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &neon_bf16::ENTRIES,
];

/// The registry: all kernels of this build, level by level in the order of preference, the portable one first.
pub(crate) fn registry() -> impl Iterator<Item = &'static Entry> {
    LEVELS.iter().flat_map(|entries| entries.iter())
}

/// Every kernel of this build, whether this CPU can run it or not.
pub fn kernels() -> impl Iterator<Item = KernelInfo> {
    registry().map(|entry| entry.info)
}

/// Whether this CPU can run kernels of a level.
pub(crate) fn level_available(level: Isa) -> bool {
    match level {
        Isa::Scalar => true,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::Avx2::is_available(),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::Avx512::is_available(),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => amx::is_available(),
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Isa::Neon => neon::Neon::is_available(),
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        Isa::NeonBf16 => neon_bf16::is_available(),
        #[allow(unreachable_patterns)]
        _ => false,
    }
}
