//! The interface of kernels: operations, the registry's description of a kernel, and the arguments of its functions.

use crate::dtype::DType;
use crate::format::CacheFormat;
use crate::isa::Isa;
use crate::kernels::generic::attention::Pieces;
use crate::problem::attention::Problem;
use crate::problem::rotation::Pairing;
use crate::problem::tile::Tile;
use crate::tuning::Tuning;
use crate::view::{AffineGroups, AffineRow};

/// The operation of a kernel.
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
    /// RMS norm of heads, alone or fused with RoPE or the cache write: source type, target type.
    RmsNorm = 6,
    /// The read of a quantised cache into plain tensors: source format, target type.
    KvRead = 7,
    /// The Hadamard rotation of heads: source type, target type.
    Hadamard = 8,
}

impl Op {
    /// Every operation.
    pub const ALL: [Self; 9] = [
        Self::RopeAngles,
        Self::Rope,
        Self::KvWrite,
        Self::RepeatKv,
        Self::Attention,
        Self::MergeStates,
        Self::RmsNorm,
        Self::KvRead,
        Self::Hadamard,
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
            Self::KvRead => "kv_read",
            Self::Hadamard => "hadamard",
        }
    }

    /// The operation with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&o| o as u32 == value)
    }
}

/// The precision of attention, at levels with kernels for more than one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Precision {
    /// The fastest kernel. Over a bf16 cache, softmax weights are rounded to bf16 at the partial levels: an error
    /// of at most 2^-8 of the largest visible value. NEON and AVX-512 with bf16 also take queries in f32 to 16
    /// significant bits, an error of at most 2^-16 of the sum of the magnitudes of a logit's products. AMX keeps all
    /// bits of a query.
    #[default]
    Default = 0,
    /// The precision of f32 arithmetic: queries keep all bits, and weights have at least 16 significant bits.
    High = 1,
    /// Over keys in int8 or in blocks, queries are rounded to int8, with a scale a row, and products are added up as integers, at the levels
    /// that have kernels for it: of a logit's error, at most half of a row's scale times the sum of the magnitudes of the key's elements is due
    /// to it. With four query heads per KV head and more, AVX512-VNNI also rounds the weights of values in int8 and in blocks, to 65534ths
    /// of the largest among 64 keys (in blocks, of the largest weight times the largest factor): an error of at most 2^-10 of the largest
    /// magnitude of their elements (2^-9 in q4_1 and q5_1). Where there is no such kernel, this is [`Self::Default`].
    Integer = 2,
}

impl Precision {
    /// Every precision.
    pub const ALL: [Self; 3] = [Self::Default, Self::High, Self::Integer];

    /// `"default"`, `"high"` or `"integer"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::High => "high",
            Self::Integer => "integer",
        }
    }

    /// The precision with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&p| p as u32 == value)
    }
}

/// The registry's description of a kernel.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KernelInfo {
    /// The operation.
    pub op: Op,
    /// The format that it reads (in attention, of K or V).
    pub src: CacheFormat,
    /// The format that it writes (in attention, the same as `src`).
    pub dst: CacheFormat,
    /// The level.
    pub isa: Isa,
    /// The precision that it serves; all if absent.
    pub precision: Option<Precision>,
    /// `<op>_<formats>_<isa>`, with the precision before the level if the kernel serves only one.
    pub name: &'static str,
    /// The name as a C string.
    #[cfg_attr(not(feature = "capi"), allow(dead_code))]
    pub(crate) c_name: &'static std::ffi::CStr,
    /// The largest error compared with exact arithmetic on the same inputs with f32 queries and output, relative to
    /// the largest magnitude that enters the result (in attention, of V). Two errors are not included: rounding to a
    /// narrower target, and in attention the rounding of logits above about 32 to f32, whose absolute error becomes a
    /// relative error of the exponential.
    pub max_error: f32,
}

/// `heads` vectors of `dim` elements; strides in elements. Target head `h * repeats + r` is source head `h`.
#[derive(Clone, Copy)]
pub(crate) struct CopyArgs {
    pub src: *const u8,
    /// Null, or a second source whose elements are interleaved with those of the first, in a target of `2 * dim`
    /// elements. Then all elements are contiguous, and nothing is repeated.
    pub second: *const u8,
    pub dst: *mut u8,
    pub heads: usize,
    pub repeats: usize,
    pub src_head: isize,
    pub dst_head: isize,
    pub src_dim: isize,
    pub dst_dim: isize,
    pub dim: usize,
    /// Prefetch distances in bytes for source and target; 0 disables.
    pub src_prefetch: isize,
    pub dst_prefetch: isize,
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

/// The heads of one token, elements on one side and quantised units on the other, and the scales of the units.
#[derive(Clone, Copy)]
pub(crate) struct ScaledArgs<'a> {
    /// Without a second source, repeats and prefetches.
    pub copy: CopyArgs,
    /// The scale of the first head; null for static scales of 1.
    pub scales: *mut u8,
    /// From the scale of a head to that of the next one, in elements.
    pub scale_head: isize,
    /// F32 or f16.
    pub scale_dtype: DType,
    /// Instead of scales, what describes units of an affine format.
    pub affine: Option<&'a AffineArgs>,
    /// The number of the first head among those that `affine` describes.
    pub first: usize,
}

/// The description of affine units, and the scales and zero points of the heads of one token, or of as many tokens as share them.
#[derive(Clone, Copy)]
pub(crate) struct AffineArgs {
    pub groups: AffineGroups,
    /// Those of the first head.
    pub first: AffineRow,
    /// From the scales and the zero points of a head to those of the next one, in bytes.
    pub head_steps: [isize; 2],
    /// Tokens that are quantised together, and what lies between them, in elements of the source and in units.
    pub tokens: usize,
    pub src_token: isize,
    pub dst_token: isize,
}

impl AffineArgs {
    /// The scales and zero points of a head.
    #[inline(always)]
    pub fn row(&self, head: usize) -> AffineRow {
        let at = |first: *mut u8, step: isize| first.wrapping_offset(head as isize * step);
        AffineRow { scales: at(self.first.scales, self.head_steps[0]), zeros: at(self.first.zeros, self.head_steps[1]) }
    }
}

/// The heads of one token, with the parameters of their norm.
#[derive(Clone, Copy)]
pub(crate) struct NormArgs {
    pub copy: CopyArgs,
    /// `dim` weights; null means 1.
    pub weight: *const f32,
    pub eps: f32,
}

/// The heads of one token, and the elements of a block of their Hadamard rotation.
#[derive(Clone, Copy)]
pub(crate) struct HadamardArgs {
    /// Without a second source and repeats.
    pub copy: CopyArgs,
    /// A power of two that divides `dim`.
    pub block: usize,
}

/// `dim` contiguous elements in each of `states` sources.
#[derive(Clone, Copy)]
pub(crate) struct MergeArgs {
    pub srcs: *const *const u8,
    pub weights: *const f32,
    pub states: usize,
    pub dst: *mut u8,
    pub dim: usize,
    /// Prefetch distances in bytes for every source and the target; 0 disables.
    pub ahead: isize,
}

pub(crate) type AnglesFn = unsafe fn(f64, &[f64], f64, &mut [f32], &mut [f32]);
pub(crate) type RopeFn = unsafe fn(&RopeArgs);
pub(crate) type CopyFn = unsafe fn(&CopyArgs);
pub(crate) type ScaledFn = unsafe fn(&ScaledArgs);
pub(crate) type MergeFn = unsafe fn(&MergeArgs);
pub(crate) type NormFn = unsafe fn(&NormArgs);
pub(crate) type HadamardFn = unsafe fn(&HadamardArgs);
/// The scratch memory is aligned to 64 bytes and has [`AttentionFns::scratch_bytes`] bytes for the tile's rows.
pub(crate) type TileFn = unsafe fn(&Pieces, &Problem, &Tile, *mut u8);

/// A kernel's entry points.
#[derive(Clone, Copy)]
pub(crate) enum Function {
    Angles(AnglesFn),
    Rope(RopeFn),
    Copy(CopyFn),
    Attention(AttentionFns),
    Merge(MergeFn),
    Norm(NormFn),
    Scaled(ScaledFn),
    Hadamard(HadamardFn),
}

/// Attention runs tiles. Query rows that were split over chunks are reduced afterwards.
///
/// On a full level, the tile function is the same for all formats and calls pieces: some for the format of the keys,
/// some for the format of the values. A partial level computes a pair of formats as a whole and calls no piece; its
/// pieces are those of the full level below.
#[derive(Clone, Copy)]
pub(crate) struct AttentionFns {
    pub tile: TileFn,
    pub reduce: TileFn,
    /// The pieces for keys and values of the kernel's format.
    pub pieces: Pieces,
    /// The most query rows of a tile.
    pub max_rows: usize,
    /// The query rows of a KV head should be a multiple of this if they need more than one tile.
    pub row_step: usize,
    /// The most KV heads of a tile.
    pub max_heads: usize,
    /// The most query rows of a KV head in a tile of several.
    pub direct_rows: usize,
    /// Scratch bytes for `(rows, dim, v_dim)`, a multiple of 64.
    pub scratch_bytes: fn(usize, usize, usize) -> usize,
}

/// Attention over keys of one format and values of another.
#[derive(Clone, Copy)]
pub(crate) struct AttentionKernel {
    fns: AttentionFns,
}

impl AttentionKernel {
    /// The kernel for keys in the format of `keys` and values in the format of `values`. Both are of one level; if it
    /// is partial, they are the same.
    pub fn new(keys: AttentionFns, values: AttentionFns, tuning: Tuning) -> Self {
        let pieces = Pieces { keys: keys.pieces.keys, tuning, ..values.pieces };
        Self { fns: AttentionFns { pieces, direct_rows: keys.direct_rows.min(values.direct_rows), ..keys } }
    }

    /// # Safety
    /// That of [`TileFn`].
    pub unsafe fn tile(&self, problem: &Problem, tile: &Tile, scratch: *mut u8) {
        // SAFETY: the caller's.
        unsafe { (self.fns.tile)(&self.fns.pieces, problem, tile, scratch) }
    }

    /// # Safety
    /// That of [`TileFn`]; the states of all chunks of the tile have been written.
    pub unsafe fn reduce(&self, problem: &Problem, tile: &Tile, scratch: *mut u8) {
        // SAFETY: the caller's.
        unsafe { (self.fns.reduce)(&self.fns.pieces, problem, tile, scratch) }
    }
}

impl std::ops::Deref for AttentionKernel {
    type Target = AttentionFns;
    fn deref(&self) -> &AttentionFns {
        &self.fns
    }
}
