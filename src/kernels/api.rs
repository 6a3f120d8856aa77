//! What a kernel is to its callers: operations, what the registry says of a kernel, and the arguments of its functions.

use crate::format::CacheFormat;
use crate::isa::Isa;
use crate::kernels::generic::attention::Pieces;
use crate::problem::attention::Problem;
use crate::problem::rotation::Pairing;
use crate::problem::tile::Tile;

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
    /// The fastest kernel. Over a bf16 cache, softmax weights are rounded to bf16 at the levels AMX and NEON with bf16: an error of
    /// at most 2^-8 of the largest visible value. NEON with bf16 also takes queries in f32 to 16 significant bits, so that a logit errs
    /// by at most 2^-16 of the sum of the magnitudes of its products. AMX takes all bits of a query.
    #[default]
    Default = 0,
    /// What f32 arithmetic gives: queries are taken whole, and weights have at least 16 significant bits.
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
    /// The format it reads (of K or V, in attention).
    pub src: CacheFormat,
    /// The format it writes (for attention: the same as `src`).
    pub dst: CacheFormat,
    /// The level it is compiled for.
    pub isa: Isa,
    /// The precision that it serves; every one if absent.
    pub precision: Option<Precision>,
    /// `<op>_<formats>_<isa>`, with the precision before the level where the kernel serves one alone.
    pub name: &'static str,
    /// The name, for C.
    pub(crate) c_name: &'static std::ffi::CStr,
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
}

/// Attention runs tiles; a row that was split over chunks is reduced afterwards.
///
/// On a full level, tiles are the same for every format, and made of pieces: those for keys of one format and those for values of
/// another. A partial level computes a pair of formats as a whole and looks at no piece; it names those of the level it stands on.
#[derive(Clone, Copy)]
pub(crate) struct AttentionFns {
    pub tile: TileFn,
    pub reduce: TileFn,
    /// What the level does with keys and values of the kernel's format.
    pub pieces: fn() -> Pieces,
    /// The most rows of a tile.
    pub max_rows: usize,
    /// What the rows of a KV head should be a multiple of, where they are more than a tile takes.
    pub row_step: usize,
    /// Whether a tile may have several KV heads.
    pub several_heads: bool,
    /// Bytes of scratch memory for tiles of so many rows, keys of so many elements and values of so many; a multiple of 64.
    pub scratch_bytes: fn(usize, usize, usize) -> usize,
}

/// Attention over keys of one format and values of another.
#[derive(Clone, Copy)]
pub(crate) struct AttentionKernel {
    fns: AttentionFns,
    pieces: Pieces,
}

impl AttentionKernel {
    /// The kernel for keys of the format of `keys` and values of the format of `values`, which are of one level; the same twice if
    /// that level is partial.
    pub fn new(keys: AttentionFns, values: AttentionFns) -> Self {
        Self { fns: keys, pieces: Pieces { keys: (keys.pieces)().keys, ..(values.pieces)() } }
    }

    /// # Safety
    /// That of [`TileFn`].
    pub unsafe fn tile(&self, problem: &Problem, tile: &Tile, scratch: *mut u8) {
        // SAFETY: the caller's.
        unsafe { (self.fns.tile)(&self.pieces, problem, tile, scratch) }
    }

    /// # Safety
    /// That of [`TileFn`]; all chunks of the tile have left their states.
    pub unsafe fn reduce(&self, problem: &Problem, tile: &Tile, scratch: *mut u8) {
        // SAFETY: the caller's.
        unsafe { (self.fns.reduce)(&self.pieces, problem, tile, scratch) }
    }
}

impl std::ops::Deref for AttentionKernel {
    type Target = AttentionFns;
    fn deref(&self) -> &AttentionFns {
        &self.fns
    }
}
