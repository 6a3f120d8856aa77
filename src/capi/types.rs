//! The types that cross the border, with the names they have in the header, and their conversion.
//!
//! Three rules keep them stable. A struct that may grow begins with its own size, grows only at its end, and means by a
//! field of zero what it meant before the field existed; a struct that is used in arrays or inside others
//! ([`kvl_view`], [`kvl_const_view`], [`kvl_kv_layer`], [`kvl_attention_state`], [`kvl_chunk_states`]) never changes, and has a reserved field where one may be
//! needed. Enumerations are integers with named values, because an integer that C passes may be anything. Sizes and
//! offsets are asserted at the end of this file and once more, from the other side, in `ffi-tests/layout.c`.
//!
//! Comments on items here are the header's. Constants are plain `i32`, because cbindgen leaves out those of an alias.

use crate::dtype::DType;
use crate::error::{Error, Result, Status, ensure, fail};
use crate::isa::Isa;
use crate::kernels::generic::attention::BitRows;
use crate::kernels::{Op, Precision};
use crate::layout::{Layout, Packing};
use crate::ops::mask::{RawBitMask, RawMask, RawMasks};
use crate::ops::norm::RmsNorm;
use crate::ops::rope::Pairing;
use crate::view::{DIM, RawView};
use std::ffi::{c_char, c_void};

/// What a call came to: 0, or one of `KVL_ERR_*`. Values are never changed or reused. When it is not 0,
/// `kvl_last_error` has the sentence, and no output has been touched unless it is `KVL_ERR_PARALLEL` or
/// `KVL_ERR_INTERNAL`.
pub type kvl_status = i32;

/// It worked.
pub const KVL_OK: i32 = 0;
/// A pointer that must not be null is null.
pub const KVL_ERR_NULL_POINTER: i32 = 1;
/// A `struct_size` is none that this version of the library knows.
pub const KVL_ERR_STRUCT_SIZE: i32 = 2;
/// An integer stands for no value of its enumeration, or a reserved bit is set.
pub const KVL_ERR_INVALID_ENUM: i32 = 3;
/// A number is outside what the argument can mean (NaN scale, odd `rotary_dim`, ...).
pub const KVL_ERR_INVALID_VALUE: i32 = 4;
/// Shapes do not fit each other, or have a negative axis.
pub const KVL_ERR_SHAPE: i32 = 5;
/// Strides let elements of an output share memory, or overflow when multiplied by the shape.
pub const KVL_ERR_STRIDE: i32 = 6;
/// A view reaches outside its buffer, or a pointer is not aligned to its elements.
pub const KVL_ERR_BOUNDS: i32 = 7;
/// A write would go past the capacity of the cache.
pub const KVL_ERR_CAPACITY: i32 = 8;
/// A position, length, row or slot is outside its range.
pub const KVL_ERR_OUT_OF_RANGE: i32 = 9;
/// An output shares memory with an input or with another output.
pub const KVL_ERR_OVERLAP: i32 = 10;
/// Two tokens of one call would be written to the same slot.
pub const KVL_ERR_DUPLICATE_SLOT: i32 = 11;
/// Element types that cannot be combined.
pub const KVL_ERR_DTYPE: i32 = 12;
/// The workspace is too small or not aligned to 64 bytes.
pub const KVL_ERR_WORKSPACE: i32 = 13;
/// What is asked for does not exist on this machine or in this build.
pub const KVL_ERR_UNSUPPORTED: i32 = 14;
/// The parallel runner did not run its tasks.
pub const KVL_ERR_PARALLEL: i32 = 15;
/// A bug in the library: a panic was caught.
pub const KVL_ERR_INTERNAL: i32 = 16;

/// The type of elements.
pub type kvl_dtype = i32;
/// IEEE 754 binary32.
pub const KVL_F32: i32 = 0;
/// IEEE 754 binary16.
pub const KVL_F16: i32 = 1;
/// bfloat16: the upper half of a binary32.
pub const KVL_BF16: i32 = 2;

/// A level of instruction sets.
pub type kvl_isa = i32;
/// No level, but the best there is.
pub const KVL_ISA_BEST: i32 = 0;
/// Portable code, available everywhere.
pub const KVL_ISA_SCALAR: i32 = 1;
/// x86-64 with AVX2, FMA and F16C.
pub const KVL_ISA_AVX2: i32 = 2;
/// x86-64 with AVX-512 F, BW, CD, DQ and VL.
pub const KVL_ISA_AVX512: i32 = 3;
/// AArch64 with Advanced SIMD.
pub const KVL_ISA_NEON: i32 = 4;
/// x86-64 with what `KVL_ISA_AVX512` needs, AMX tiles and their bf16 products. Preferred to that level, though it has
/// kernels for attention over bf16 alone; the others are those of `KVL_ISA_AVX512`.
pub const KVL_ISA_AMX: i32 = 5;
/// AArch64 with what `KVL_ISA_NEON` needs and bf16 matrix products (FEAT_BF16). Preferred to that level, though it has
/// kernels for attention over bf16 alone; the others are those of `KVL_ISA_NEON`.
pub const KVL_ISA_NEON_BF16: i32 = 6;

/// What a kernel does; kernels are chosen by operation and element types.
pub type kvl_op = i32;
/// Cosines and sines of RoPE angles; `KVL_F32` twice.
pub const KVL_OP_ROPE_ANGLES: i32 = 0;
/// RoPE, and RoPE fused with a cache write: source type, target type.
pub const KVL_OP_ROPE: i32 = 1;
/// The cache write: source type, target type.
pub const KVL_OP_KV_WRITE: i32 = 2;
/// The explicit repeat of KV heads: one type twice.
pub const KVL_OP_REPEAT_KV: i32 = 3;
/// Attention over a cache: the type of K and V twice; queries and output may be of any type.
pub const KVL_OP_ATTENTION: i32 = 4;
/// The merge of attention states: one type twice.
pub const KVL_OP_MERGE_STATES: i32 = 5;
/// RMS norm of heads, alone or on the way to RoPE or the cache: source type, target type. Since ABI version 3.
pub const KVL_OP_RMS_NORM: i32 = 6;

/// How exactly attention computes, where a level has kernels for more than one answer.
pub type kvl_precision = i32;
/// The fastest kernel. Over a bf16 cache at `KVL_ISA_AMX` and `KVL_ISA_NEON_BF16`, softmax weights are rounded to bf16.
pub const KVL_PRECISION_DEFAULT: i32 = 0;
/// What f32 arithmetic gives.
pub const KVL_PRECISION_HIGH: i32 = 1;

/// Which elements of a head form a pair that RoPE turns.
pub type kvl_pairing = i32;
/// Elements 2i and 2i + 1: the original paper, Meta's Llama code, llama.cpp's Llama files.
pub const KVL_INTERLEAVED: i32 = 0;
/// Elements i and i + rotary_dim / 2: GPT-NeoX, Grok-1, Hugging Face.
pub const KVL_HALF_SPLIT: i32 = 1;

/// How RoPE frequencies are stretched beyond the length that a model was trained for.
pub type kvl_rope_scaling = i32;
/// Not at all: `f_i = base^(-2i / rotary_dim)`.
pub const KVL_ROPE_UNSCALED: i32 = 0;
/// `f_i / factor`. Reads `factor`.
pub const KVL_ROPE_LINEAR: i32 = 1;
/// The base becomes `base * factor^(rotary_dim / (rotary_dim - 2))`. Reads `factor`.
pub const KVL_ROPE_NTK: i32 = 2;
/// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended. Reads `factor`,
/// `low_freq_factor`, `high_freq_factor`, `original_max_position`.
pub const KVL_ROPE_LLAMA3: i32 = 3;
/// YaRN: a ramp between interpolation and extrapolation over the pairs. Reads `factor`, `original_max_position`,
/// `beta_fast`, `beta_slow`, `attention_factor`, `keep_ramp`.
pub const KVL_ROPE_YARN: i32 = 4;
/// LongRoPE: `f_i / factors[i]`. Reads `factors`, `attention_factor` and, if that is 0, `factor` and
/// `original_max_position`.
pub const KVL_ROPE_LONGROPE: i32 = 5;

/// In `kvl_attention_params.flags`: no key after the query's own position is visible.
pub const KVL_CAUSAL: u32 = 1;
/// In `kvl_attention_params.flags`: `window_left` counts.
pub const KVL_WINDOW_LEFT: u32 = 2;
/// In `kvl_attention_params.flags`: `window_right` counts.
pub const KVL_WINDOW_RIGHT: u32 = 4;

/// The version of the ABI that this header describes: `major * 65536 + minor`. A library of the same major and of this or
/// a higher minor version serves it. The SONAME carries the major version.
pub const KVL_ABI_VERSION: u32 = 3;

/// The kernels chosen for a machine. Made by `kvl_context_create`, immutable from then on.
pub struct kvl_context {
    pub(super) context: crate::Context,
}

/// What depends on the lengths, positions, windows and tables of a step alone, checked and worked out once for all layers. Made by
/// `kvl_plan_create`.
pub struct kvl_plan {
    pub(super) plan: crate::AttentionPlan,
}

/// A pool of threads. Made by `kvl_thread_pool_create`.
pub struct kvl_thread_pool {
    #[cfg(feature = "rayon")]
    pub(super) pool: super::runner::Pool,
}

/// A tensor in the caller's memory that is written. Axes are always in the order batch, seq, heads, dim, whatever their
/// order in memory: that is what strides are for. Element [b, s, h, d] is at
/// `data + element_size * (b * strides[0] + s * strides[1] + h * strides[2] + d * strides[3])`.
///
/// `data` is aligned to its elements. Strides may be negative; no two elements of a written view share memory. Nothing
/// outside the elements is ever read or written. A view whose bytes are all 0 is an absent one.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_view {
    /// Element [0, 0, 0, 0].
    pub data: *mut c_void,
    /// The type of the elements.
    pub dtype: kvl_dtype,
    /// 0.
    pub reserved: i32,
    /// Elements along each axis; at most 2^31 - 1.
    pub shape: [i64; 4],
    /// Distance of neighbours along each axis, in elements.
    pub strides: [i64; 4],
    /// Bytes from `data` to the end of the buffer, to check shape and strides against; 0 if not known. When it is given,
    /// strides must not reach before `data`.
    pub bytes: usize,
}

/// A tensor in the caller's memory that is read; otherwise as `kvl_view`. Strides may be 0, to broadcast.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_const_view {
    /// Element [0, 0, 0, 0].
    pub data: *const c_void,
    /// The type of the elements.
    pub dtype: kvl_dtype,
    /// 0.
    pub reserved: i32,
    /// Elements along each axis; at most 2^31 - 1.
    pub shape: [i64; 4],
    /// Distance of neighbours along each axis, in elements.
    pub strides: [i64; 4],
    /// Bytes from `data` to the end of the buffer; 0 if not known.
    pub bytes: usize,
}

/// A boolean mask [batch, seq, heads, keys] of bytes: 0 hides a key from a query, anything else shows it. Strides may be
/// 0, to broadcast. A mask whose bytes are all 0 is an absent one.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_mask {
    /// Entry [0, 0, 0, 0].
    pub data: *const u8,
    /// Entries along each axis.
    pub shape: [i64; 4],
    /// Distance of neighbours along each axis, in bytes.
    pub strides: [i64; 4],
    /// Bytes from `data` to the end of the buffer; 0 if not known.
    pub bytes: usize,
}

/// Runs `n` independent tasks of an operation on the caller's threads. Start from `KVL_PARALLEL_RUNNER_INIT`.
///
/// `run` calls `task(task_ctx, i)` exactly once for every i in 0 .. n, on any threads in any order, also all on one, and
/// returns 0 after the last of these calls has returned; anything but 0 says that it could not. It must not unwind (no
/// C++ exception, no longjmp). `n` is at most `num_threads`. No bit of a result depends on the runner.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_parallel_runner {
    /// `sizeof(kvl_parallel_runner)`.
    pub struct_size: usize,
    /// Handed to `run`.
    pub ctx: *mut c_void,
    /// How many tasks can run at the same time; at least 1.
    pub num_threads: usize,
    /// Runs the tasks.
    pub run: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            n: usize,
            task: Option<unsafe extern "C" fn(task_ctx: *mut c_void, i: usize)>,
            task_ctx: *mut c_void,
        ) -> i32,
    >,
}

/// What a context is made from. Start from `KVL_CONTEXT_PARAMS_INIT`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_context_params {
    /// `sizeof(kvl_context_params)`.
    pub struct_size: usize,
    /// The highest level to use; 0 (`KVL_ISA_BEST`) for no limit. The environment variable `KVLANE_MAX_ISA` (`scalar`,
    /// `avx2`, ...) can lower it further, and neither can raise.
    pub max_isa: kvl_isa,
    /// 0.
    pub reserved: i32,
}

/// What the registry says of a kernel. Start from `KVL_KERNEL_INFO_INIT`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_kernel_info {
    /// `sizeof(kvl_kernel_info)`.
    pub struct_size: usize,
    /// `<op>_<types>_<isa>`; a constant of the library.
    pub name: *const c_char,
    /// What it does.
    pub op: kvl_op,
    /// The type it reads.
    pub src: kvl_dtype,
    /// The type it writes.
    pub dst: kvl_dtype,
    /// The level it is compiled for.
    pub isa: kvl_isa,
    /// 1 if this machine can run it, 0 if not.
    pub available: i32,
    /// The largest error against exact arithmetic on the same inputs with f32 output, as a fraction of the largest magnitude
    /// that goes into the result (of V in attention); rounding to a narrower target comes on top. In attention it grows with logits
    /// beyond 32 (before the largest is taken off, ALiBi and bias included), in proportion: f32 rounds them to 2^-24 of themselves.
    pub max_error: f32,
}

/// What RoPE frequencies are made from. Start from `KVL_ROPE_FREQUENCIES_PARAMS_INIT`, set `rotary_dim`, `base` and what the
/// `scaling` reads.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_rope_frequencies_params {
    /// `sizeof(kvl_rope_frequencies_params)`.
    pub struct_size: usize,
    /// How many leading elements of a head are turned; even, 2 to 4096.
    pub rotary_dim: i64,
    /// The base; 0 is 10000.
    pub base: f64,
    /// How frequencies are stretched.
    pub scaling: kvl_rope_scaling,
    /// YaRN: 0 rounds the ends of the ramp outwards to whole pairs, as most sources do; 1 leaves them.
    pub keep_ramp: i32,
    /// How much longer than in training.
    pub factor: f64,
    /// The length, in tokens, that the model was trained for.
    pub original_max_position: f64,
    /// Llama 3.1: wavelengths above `original_max_position / low_freq_factor` are divided; 0 is 1.
    pub low_freq_factor: f64,
    /// Llama 3.1: wavelengths below `original_max_position / high_freq_factor` are kept; 0 is 4.
    pub high_freq_factor: f64,
    /// YaRN: pairs that turn more often over the original length are kept; 0 is the paper's 32.
    pub beta_fast: f64,
    /// YaRN: pairs that turn less often over the original length are divided by `factor`; 0 is the paper's 1.
    pub beta_slow: f64,
    /// YaRN and LongRoPE: factor on cosines and sines; 0 is the paper's (`0.1 ln(factor) + 1`, and
    /// `sqrt(1 + ln(factor) / ln(original_max_position))`). Sources disagree about YaRN's: give it where the model says it.
    pub attention_factor: f64,
    /// LongRoPE: `rotary_dim / 2` divisors. Which of a model's two lists applies depends on the length of the text.
    pub factors: *const f64,
}

/// How to rotate. Start from `KVL_ROPE_PARAMS_INIT`, set `rotary_dim`, either `inv_freq` or both `cos` and `sin`, and either
/// `offsets` or `positions`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_rope_params {
    /// `sizeof(kvl_rope_params)`.
    pub struct_size: usize,
    /// Which elements form a pair.
    pub pairing: kvl_pairing,
    /// 0.
    pub reserved: i32,
    /// How many leading elements of a head are rotated, the others are copied; even, 2 to 4096, at most dim.
    pub rotary_dim: i64,
    /// [rotary_dim / 2] radians a position, from `kvl_rope_frequencies` or elsewhere. Angles are computed and reduced in f64.
    pub inv_freq: *const f64,
    /// Factor on cosines and sines, with `inv_freq`; 0 is 1.
    pub magnitude: f64,
    /// [table_rows, rotary_dim / 2] cosines, instead of `inv_freq`; a position is a row.
    pub cos: *const f32,
    /// [table_rows, rotary_dim / 2] sines.
    pub sin: *const f32,
    /// Rows of `cos` and of `sin`.
    pub table_rows: i64,
    /// [batch]: token t of row b is at position `offsets[b] + t`. Positions may be negative with `inv_freq`.
    pub offsets: *const i32,
    /// [batch, seq]: the position of every token, instead of `offsets`.
    pub positions: *const i32,
}

/// In which slots of a cache the tokens of a row lie.
pub type kvl_layout_kind = i32;
/// Caches are [rows, capacity, kv_heads, dim]; position p of row b lies in row b, slot p.
pub const KVL_CONTIGUOUS: i32 = 0;
/// The same, but a row keeps its newest tokens only: position p lies in slot p as long as p < sinks, and from there on in slot
/// `sinks + (p - sinks) % (capacity - sinks)`. Lengths go on counting every token that a row was given.
pub const KVL_RING: i32 = 1;
/// Caches are pools [pages, page_size, kv_heads, dim]; position p of row b lies in page
/// `table[b * pages_per_row + p / page_size]`, slot p % page_size. Rows may share pages that none of them writes. NHD and HND
/// are two sets of strides.
pub const KVL_PAGED: i32 = 2;
/// Beam search without copies: caches are [rows, capacity, kv_heads, dim]; position p of row b lies in row
/// `table[b * capacity + p]`, slot p.
pub const KVL_INDIRECT: i32 = 3;
/// Rows one after the other, each as long as it is: caches are [1, tokens, kv_heads, dim]; position p of row b lies in slot
/// `table[b] + p`, and row b ends at `table[b + 1]` (`cu_seqlens`).
pub const KVL_RAGGED: i32 = 4;

/// Where in a cache the tokens of its rows lie. Start from `KVL_LAYOUT_INIT`, which is contiguous. Since ABI version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_layout {
    /// `sizeof(kvl_layout)`.
    pub struct_size: usize,
    /// One of the above.
    pub kind: kvl_layout_kind,
    /// `KVL_RING`: how many of a row's first tokens are never overwritten; less than the capacity. Else 0.
    pub sinks: i32,
    /// Rows that the table describes; not looked at without a table.
    pub rows: i64,
    /// `KVL_PAGED`: entries of a row. Else 0.
    pub pages_per_row: i64,
    /// `KVL_PAGED`: [rows, pages_per_row]; entries beyond a row's length are not looked at. `KVL_INDIRECT`: [rows, capacity].
    /// `KVL_RAGGED`: [rows + 1], ascending. Else null.
    pub table: *const i32,
}

/// How the values of neighbouring slots lie in a cache. Since ABI version 3.
pub type kvl_packing = i32;
/// Every slot by itself: [rows, slots, kv_heads, v_dim].
pub const KVL_PACK_ROWS: i32 = 0;
/// Two slots interleaved, which is how tiles of 16-bit numbers take their second factor: [rows, slots / 2, kv_heads,
/// 2 * v_dim], in which element 2d + i of pair s is element d of slot 2s + i. Slots a row (or a page) has, sinks of a ring and
/// starts of ragged rows are even.
pub const KVL_PACK_ROW_PAIRS: i32 = 1;

/// How heads are normalised: `y = x * weight / sqrt(mean(x^2) + eps)`, each head of each token by itself. Start from
/// `KVL_RMS_NORM_PARAMS_INIT`. Since ABI version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_rms_norm_params {
    /// `sizeof(kvl_rms_norm_params)`.
    pub struct_size: usize,
    /// [dim]: the same for all heads; null for all 1. Models that add 1 to their weights (Gemma) want it added here.
    pub weight: *const f32,
    /// Added to the mean of the squares; 0 is 1e-6.
    pub eps: f32,
    /// 0.
    pub reserved: i32,
}

/// New keys and values, their caches, and where they go. Start from `KVL_KV_WRITE_PARAMS_INIT`, set `k`, `k_cache`, usually
/// `v` and `v_cache`, and either `positions` or `slots`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_kv_write_params {
    /// `sizeof(kvl_kv_write_params)`.
    pub struct_size: usize,
    /// New keys [batch, seq, kv_heads, dim].
    pub k: kvl_const_view,
    /// New values [batch, seq, kv_heads, v_dim]; absent together with `v_cache` to write keys alone.
    pub v: kvl_const_view,
    /// Where keys go: [rows, capacity, kv_heads, dim], or what `layout` makes of the first two axes; of any type.
    pub k_cache: kvl_view,
    /// Where values go: [rows, capacity, kv_heads, v_dim], or what `layout` and `v_packing` make of it; of any type.
    pub v_cache: kvl_view,
    /// [batch]: token t of row b is at position `positions[b] + t` of its row of the cache.
    pub positions: *const i32,
    /// [batch]: only the first `counts[b]` tokens of row b are written (padded prompts); null for all.
    pub counts: *const i32,
    /// [batch]: source row b goes to row `rows[b]` of the cache; null for row b.
    pub rows: *const i32,
    /// [batch, seq]: the slot of each token, instead of `positions`; -1 skips it. With `KVL_PAGED` and `KVL_RAGGED` slots are
    /// counted over the whole pool, page by page; the layout's table is not looked at, and there are no `rows`.
    pub slots: *const i32,
    /// Rotates keys on their way into the cache; null to write them as they are. The same bits as `kvl_rope` into a view
    /// of the cache's type.
    pub rope: *const kvl_rope_params,
    /// In which slot a position lies; null for `KVL_CONTIGUOUS`. A `KVL_RING` takes no more tokens of a row in one call than it
    /// has slots beside its sinks. `KVL_INDIRECT` only reads: write to the token's own row, and set the table's entry. Since
    /// ABI version 3.
    pub layout: *const kvl_layout,
    /// Normalises the heads of the keys on their way into the cache, before they are rotated; null not to. The same bits as
    /// `kvl_rms_norm` into f32 first. Since ABI version 3.
    pub k_norm: *const kvl_rms_norm_params,
    /// How values lie in `v_cache`. What attention likes best is said by `kvl_context_v_packing`. Since ABI version 3.
    pub v_packing: kvl_packing,
    /// 0.
    pub reserved: i32,
}

/// The cache of one layer. Since ABI version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_kv_layer {
    /// Keys [rows, slots, kv_heads, dim]; what the first two axes are is the layout's to say.
    pub k: kvl_view,
    /// Values [rows, slots, kv_heads, v_dim]; absent where keys and values share memory.
    pub v: kvl_view,
}

/// The caches of all layers of a model, or of those that are laid out alike: one list of lengths for all of them. Start from
/// `KVL_CACHE_INIT`. Layers agree in the first two axes of their views; heads, dims and types may differ, and no two views
/// share memory. Since ABI version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_cache {
    /// `sizeof(kvl_cache)`.
    pub struct_size: usize,
    /// [num_layers].
    pub layers: *const kvl_kv_layer,
    /// At least 1.
    pub num_layers: usize,
    /// Where the tokens of a row lie, in every layer; null for contiguous.
    pub layout: *const kvl_layout,
    /// [rows of the layout]: how many tokens each row was given. Calls that change lengths change these, last.
    pub lengths: *mut i32,
}

/// Keys that attention computes as one: spans of a sequence begin and end at multiples of this many.
pub const KVL_SPLIT_GRID: i32 = 1024;

/// One of several shards of a model's caches, by batch (data), heads (model) and keys (sequence). Start from `KVL_SHARD_INIT`,
/// which is the whole. Since ABI version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_shard {
    /// `sizeof(kvl_shard)`.
    pub struct_size: usize,
    /// Which part of the batch; less than `num_data`.
    pub data: i64,
    /// Parts of the batch; 0 is 1.
    pub num_data: i64,
    /// Which part of the heads; less than `num_model`.
    pub model: i64,
    /// Parts of the heads; 0 is 1.
    pub num_model: i64,
    /// Which part of the sequence; less than `num_sequence`.
    pub sequence: i64,
    /// Parts of the sequence; 0 is 1.
    pub num_sequence: i64,
}

/// One attention state: an output, and the natural logarithm of the sum of its exponentials.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_attention_state {
    /// [batch, seq, heads, dim].
    pub out: kvl_const_view,
    /// [batch, seq, heads], contiguous.
    pub lse: *const f32,
}

/// A mask [batch, seq, heads, keys] of one bit a query and key; 1 lets a query see a key. The lowest bit of a byte is the
/// first, and keys are neighbours. Start from `KVL_BIT_MASK_INIT`. Since ABI version 3.
///
/// It may speak of the last keys alone: bit j of row b is of key `first_keys[b] + j`, keys before that are seen, and the last bit
/// is of the row's last key or later. So the tree of a speculation is [batch, n, heads, n] bits, heads with a stride of 0, over
/// the n tokens that were written last.
///
/// Its rows may be as wide as each is, and lie anywhere: with `row_starts` and `query_strides`, a row has bits for its own queries
/// and for its own keys, from its first key to its length, and none behind those is read. So flattened masks of requests one after
/// the other, each [queries, keys] of its own, are one mask.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_bit_mask {
    /// `sizeof(kvl_bit_mask)`.
    pub struct_size: usize,
    /// From whose first byte bits are counted.
    pub data: *const u8,
    /// Bytes from `data` to the end of the buffer, to be checked against; 0 if unknown.
    pub bytes: usize,
    /// The bit of entry [0, 0, 0, 0].
    pub offset: i64,
    /// batch, seq (the most queries of a row), heads, keys (at least the most of a row, less its first key).
    pub shape: [i64; 4],
    /// Of batch, seq and heads, in bits; 0 broadcasts.
    pub strides: [i64; 3],
    /// [batch]: the key of a row's first bit; null for 0.
    pub first_keys: *const i32,
    /// [batch]: the bit of a row's query 0, head 0 and first key, not negative, instead of `offset` and the stride of batch, which
    /// must be 0; null if rows lie at those. Given with `query_strides` or not at all.
    pub row_starts: *const i64,
    /// [batch]: bits from a query of a row to the next, not negative, 0 to broadcast, instead of the stride of seq, which must be
    /// 0; null if all rows have that.
    pub query_strides: *const i64,
}

/// What attention reads, writes and sees. Start from `KVL_ATTENTION_PARAMS_INIT`, which sees every key; set `q`, `k`, `v`
/// and `out`. Query head h reads KV head `h / (heads / kv_heads)`; nothing is repeated in memory.
///
/// A logit is `softcap(q.k * scale) + alibi + bias`; then what is masked is taken out, then softmax in f32. Query i of a
/// row stands at position p = i + offset among the keys, and sees key j when all of these hold: `j < lengths[row]`,
/// `j >= starts[row]`, causal: `j <= p`, left window: `j >= p - window_left`, right window: `j <= p + window_right` (of these
/// three, a key `j < prefixes[row]` needs none), the mask's entry is not 0, the bit mask's is not 0, the bias is not -inf, a
/// ring has not overwritten it. A query that sees no key has output 0 and LSE -inf (with a sink: the
/// sink's logit). What is not seen cannot reach the output, NaN or not; what is seen does.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_attention_params {
    /// `sizeof(kvl_attention_params)`.
    pub struct_size: usize,
    /// Queries [batch, seq, heads, dim], of any type.
    pub q: kvl_const_view,
    /// Keys [batch, keys, kv_heads, dim]: the cache, whole.
    pub k: kvl_const_view,
    /// Values [batch, keys, kv_heads, v_dim], of the type of the keys.
    pub v: kvl_const_view,
    /// Output [batch, seq, heads, v_dim], of any type.
    pub out: kvl_view,
    /// Output [batch, seq, heads], contiguous: natural logarithm of the sum of the exponentials of a row's logits; null
    /// if not wanted.
    pub lse: *mut f32,
    /// Factor on q.k; 0 is 1 / sqrt(dim).
    pub scale: f32,
    /// `softcap * tanh(x / softcap)` on scaled logits; 0 is none.
    pub softcap: f32,
    /// `KVL_CAUSAL | KVL_WINDOW_LEFT | KVL_WINDOW_RIGHT`. A window of 0 keys means something, so whether there is a window
    /// is said here, not by its size.
    pub flags: u32,
    /// 0.
    pub reserved: i32,
    /// With `KVL_WINDOW_LEFT`: keys visible before the query's own position, not counting it; -1 for all. Else 0.
    pub window_left: i64,
    /// With `KVL_WINDOW_RIGHT`: keys visible after the query's own position, not counting it; -1 for all. Else 0.
    pub window_right: i64,
    /// [batch]: valid keys; null for all.
    pub lengths: *const i32,
    /// [batch]: the first visible key (left-padded batches); null for 0.
    pub starts: *const i32,
    /// [batch]: the position of query 0 among the keys; null for `length - seq`, so that the last query sees the last key.
    /// A negative one leaves leading queries without keys.
    pub offsets: *const i32,
    /// Which keys each query sees, [batch, seq, heads, keys]; absent for all.
    pub mask: kvl_mask,
    /// Added to logits, [batch, seq, heads, keys], of any type; absent for none.
    pub bias: kvl_const_view,
    /// [heads]: `slope * (j - p)` is added to logits; null for none. See `kvl_alibi_slopes`.
    pub alibi_slopes: *const f32,
    /// [heads]: one more logit, which takes weight and has no value; null for none.
    pub sinks: *const f32,
    /// How exactly to compute; see `kvl_context_attention_kernel_name`. Since ABI version 2.
    pub precision: kvl_precision,
    /// 0.
    pub reserved2: i32,
    /// In which slots of `k` and `v` the tokens of a row lie, and so what their first two axes mean; null for contiguous rows. A
    /// ring, and pages, need `lengths`. Positions go on counting what a ring has overwritten: a window must lie in what it
    /// retains, and with no window there can be only one query once it has overwritten any. Since ABI version 3.
    pub layout: *const kvl_layout,
    /// [rows + 1]: ragged queries. `q` and `out` are [1, tokens, heads, dim], and row b of the batch is tokens
    /// `query_starts[b]` to `query_starts[b + 1] - 1` (`cu_seqlens`); null for rows of equal length, the first axis of `q`.
    pub query_starts: *const i32,
    /// With `query_starts`: rows of the batch, as many as every [batch] list here has entries. Else 0.
    pub rows: i64,
    /// [batch]: every query sees the keys before this one, whatever causality and windows say (prefix-LM, attention sinks that
    /// a window must not hide); null for 0.
    pub prefixes: *const i32,
    /// Which keys each query sees, a bit each; null for all.
    pub bit_mask: *const kvl_bit_mask,
    /// What `kvl_plan_create` has checked already: instead of `flags`, windows, `layout`, `query_starts`, `rows`, `lengths`,
    /// `starts`, `offsets` and `prefixes`, which must then be 0 or null, and of `mask` and `bit_mask`, which must be absent if the
    /// plan was made of either; null for none.
    pub plan: *const kvl_plan,
    /// How values lie in `v`: with `KVL_PACK_ROW_PAIRS`, it is [rows, slots / 2, kv_heads, 2 * v_dim]. The same bits as for values
    /// that are not packed.
    pub v_packing: kvl_packing,
    /// 0.
    pub reserved3: i32,
}

/// The states of a span's chunks, as `kvl_attention_chunks` left them. Since ABI version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_chunk_states {
    /// [len].
    pub states: *const f32,
    /// How many floats, as `kvl_attention_chunks_states_len` said it for the span.
    pub len: i64,
}

/// What a merge of spans reads and writes. Start from `KVL_MERGE_CHUNKS_PARAMS_INIT`, set `spans`, `num_spans`, `kv_heads`, `dtype`,
/// `out`, and `precision` if that of the spans was another. Since ABI version 3.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_merge_chunks_params {
    /// `sizeof(kvl_merge_chunks_params)`.
    pub struct_size: usize,
    /// [num_spans], in the order of the sequence.
    pub spans: *const kvl_chunk_states,
    /// 1 to 256.
    pub num_spans: usize,
    /// KV heads of the cache.
    pub kv_heads: i64,
    /// The type of its keys and values.
    pub dtype: kvl_dtype,
    /// That of the spans' calls.
    pub precision: kvl_precision,
    /// [heads]: one more logit, which takes weight and has no value, once for all spans; null for none.
    pub sinks: *const f32,
    /// Output [batch, seq, heads, v_dim], of any type.
    pub out: kvl_view,
    /// Output [batch, seq, heads], contiguous: natural logarithm of the sum of the exponentials of a row's logits; null if not
    /// wanted.
    pub lse: *mut f32,
}

/// A struct that begins with its size: plain integers, floats and pointers, for which all zeros is a value.
///
/// # Safety
/// `repr(C)`, first field `struct_size: usize`, valid for every bit pattern.
pub(super) unsafe trait Growing: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// Every size it has had, in order of ABI versions; the last is today's.
    const SIZES: &'static [usize];
}

/// A name, and in brackets the first field of each time that the struct grew.
macro_rules! sized {
    ($($name:ident $([$($field:ident),*])?),*) => {
        $(
            // SAFETY: integers, floats, nullable pointers and arrays of them, after a `struct_size`.
            unsafe impl Growing for $name {
                const NAME: &'static str = stringify!($name);
                const SIZES: &'static [usize] = &[$($(std::mem::offset_of!($name, $field),)*)? size_of::<$name>()];
            }
            const _: () = assert!(std::mem::offset_of!($name, struct_size) == 0);
        )*
    };
}
sized!(
    kvl_parallel_runner,
    kvl_context_params,
    kvl_kernel_info,
    kvl_rope_frequencies_params,
    kvl_rope_params,
    kvl_layout,
    kvl_bit_mask,
    kvl_cache,
    kvl_shard,
    kvl_rms_norm_params,
    kvl_kv_write_params[layout],
    kvl_attention_params[precision, layout],
    kvl_merge_chunks_params
);

/// Copies a sized struct of the caller's, whose fields beyond its size are 0.
///
/// # Safety
/// `from` is null or points to a struct that is as long as its first field says.
pub(super) unsafe fn read_sized<T: Growing>(from: *const T) -> Result<T> {
    ensure!(!from.is_null(), NullPointer, "the pointer to {} is null", T::NAME);
    // SAFETY: not null; the caller's promise covers the first field. Unaligned, because nothing else needs alignment.
    let size = unsafe { from.cast::<usize>().read_unaligned() };
    ensure!(
        T::SIZES.contains(&size),
        StructSize,
        "{}.struct_size is {size}, but this library knows {:?}: start from its _INIT macro, and do not use a header that is \
         newer than the library",
        T::NAME,
        T::SIZES
    );
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: `size` bytes are readable by the caller's promise and are no more than a `T` has; zeros are a valid `T`.
    unsafe {
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), value.as_mut_ptr().cast(), size);
        Ok(value.assume_init())
    }
}

/// Reads a struct of fixed size.
///
/// # Safety
/// `from` is null or points to a `T`.
pub(super) unsafe fn read<T: Copy>(name: &str, from: *const T) -> Result<T> {
    ensure!(!from.is_null(), NullPointer, "the pointer {name} is null");
    // SAFETY: the caller's.
    Ok(unsafe { from.read_unaligned() })
}

/// The `n` elements that the caller has put at `data`; none if it is null.
///
/// # Safety
/// `data` is null or points to `n` elements that nobody writes while the slice is in use.
pub(super) unsafe fn list<'a, T>(name: &str, data: *const T, n: usize) -> Result<Option<&'a [T]>> {
    if data.is_null() {
        return Ok(None);
    }
    check_list(name, data, n)?;
    // SAFETY: the caller's promise, and what has just been checked.
    Ok(Some(unsafe { std::slice::from_raw_parts(data, n) }))
}

/// Like [`list`], for one that must be there unless it is empty.
///
/// # Safety
/// As for [`list`].
pub(super) unsafe fn required_list<'a, T>(name: &str, data: *const T, n: usize) -> Result<&'a [T]> {
    ensure!(!data.is_null() || n == 0, NullPointer, "{name} is null, but {n} entries are needed");
    // SAFETY: the caller's.
    Ok(unsafe { list(name, data, n) }?.unwrap_or(&[]))
}

/// Like [`required_list`], for one that is written.
///
/// # Safety
/// `data` is null or points to `n` elements that nobody else reads or writes while the slice is in use.
pub(super) unsafe fn output_list<'a, T>(name: &str, data: *mut T, n: usize) -> Result<&'a mut [T]> {
    if n == 0 {
        return Ok(&mut []);
    }
    ensure!(!data.is_null(), NullPointer, "{name} is null, but {n} entries are to be written");
    check_list(name, data, n)?;
    // SAFETY: the caller's promise, and what has just been checked.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, n) })
}

fn check_list<T>(name: &str, data: *const T, n: usize) -> Result<()> {
    ensure!(data.is_aligned(), Bounds, "{name} at {:#x} is not aligned to {} bytes", data.addr(), align_of::<T>());
    let fits = n.checked_mul(size_of::<T>()).filter(|&b| b <= isize::MAX as usize);
    ensure!(
        fits.is_some_and(|bytes| data.addr().checked_add(bytes).is_some()),
        Shape,
        "{name} would have {n} entries, more than an address space holds"
    );
    Ok(())
}

/// A size from C, where sizes are signed so that a wrong sign is an error and not a huge number.
pub(super) fn size(name: &str, value: i64) -> Result<usize> {
    match usize::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => fail!(Shape, "{name} is {value}, which is {}", if value < 0 { "negative" } else { "too large" }),
    }
}

fn shape(name: &str, shape: [i64; 4], axes: [&str; 4]) -> Result<[usize; 4]> {
    let mut sizes = [0; 4];
    for axis in 0..4 {
        ensure!(
            shape[axis] >= 0,
            Shape,
            "{name} has {} = {}, which is negative (shape {shape:?})",
            axes[axis],
            shape[axis]
        );
        sizes[axis] = size(axes[axis], shape[axis])?;
    }
    Ok(sizes)
}

pub(super) fn reserved(name: &str, value: i32) -> Result<()> {
    ensure!(value == 0, InvalidEnum, "{name}.reserved is {value}, but must be 0");
    Ok(())
}

/// 0 or 1.
pub(super) fn boolean(name: &str, value: i32) -> Result<bool> {
    ensure!(value == 0 || value == 1, InvalidEnum, "{name} is {value}, which is neither 0 nor 1");
    Ok(value == 1)
}

fn enumeration<T>(kind: &str, name: &str, value: i32, from: impl Fn(u32) -> Option<T>) -> Result<T> {
    u32::try_from(value)
        .ok()
        .and_then(from)
        .ok_or_else(|| Error::new(Status::InvalidEnum, format!("{name} is {value}, which is no {kind}")))
}

pub(super) fn dtype(name: &str, value: kvl_dtype) -> Result<DType> {
    enumeration("kvl_dtype", name, value, DType::from_u32)
}

/// Like [`dtype`], for the field of a view: `name` is the view's, since a call that computes makes no string in vain.
fn element_type(name: &str, value: kvl_dtype) -> Result<DType> {
    match u32::try_from(value).ok().and_then(DType::from_u32) {
        Some(dtype) => Ok(dtype),
        None => fail!(InvalidEnum, "{name}.dtype is {value}, which is no kvl_dtype"),
    }
}

pub(super) fn op(name: &str, value: kvl_op) -> Result<Op> {
    enumeration("kvl_op", name, value, Op::from_u32)
}

pub(super) fn isa(name: &str, value: kvl_isa) -> Result<Isa> {
    enumeration("kvl_isa", name, value, Isa::from_u32)
}

pub(super) fn precision(name: &str, value: kvl_precision) -> Result<Precision> {
    enumeration("kvl_precision", name, value, Precision::from_u32)
}

pub(super) fn packing(name: &str, value: kvl_packing) -> Result<Packing> {
    enumeration("kvl_packing", name, value, Packing::from_u32)
}

pub(super) fn pairing(name: &str, value: kvl_pairing) -> Result<Pairing> {
    enumeration("kvl_pairing", name, value, Pairing::from_u32)
}

impl kvl_view {
    pub(super) fn raw(&self, name: &str) -> Result<RawView> {
        reserved(name, self.reserved)?;
        Ok(RawView {
            data: self.data.cast(),
            dtype: element_type(name, self.dtype)?,
            shape: shape(name, self.shape, ["batch", "seq", "heads", "dim"])?,
            strides: self.strides,
            bytes: (self.bytes > 0).then_some(self.bytes),
        })
    }

    pub(super) fn is_absent(&self) -> bool {
        self.as_const().is_absent()
    }

    pub(super) fn as_const(&self) -> kvl_const_view {
        let Self { data, dtype, reserved, shape, strides, bytes } = *self;
        kvl_const_view { data, dtype, reserved, shape, strides, bytes }
    }
}

impl kvl_const_view {
    /// The operations do not write through views that they only read.
    pub(super) fn raw(&self, name: &str) -> Result<RawView> {
        let Self { data, dtype, reserved, shape, strides, bytes } = *self;
        kvl_view { data: data.cast_mut(), dtype, reserved, shape, strides, bytes }.raw(name)
    }

    pub(super) fn is_absent(&self) -> bool {
        let Self { data, dtype, reserved, shape, strides, bytes } = *self;
        data.is_null() && dtype == 0 && reserved == 0 && shape == [0; 4] && strides == [0; 4] && bytes == 0
    }
}

/// The layout at `from`, of caches with so many slots; contiguous if it is null.
///
/// # Safety
/// `from` is null or points to what the header describes, whose table nobody writes while the layout is in use.
pub(super) unsafe fn layout<'a>(from: *const kvl_layout, slots: usize) -> Result<Layout<'a>> {
    if from.is_null() {
        return Ok(Layout::Contiguous);
    }
    // SAFETY: the caller's, here and below.
    let layout = unsafe { read_sized(from) }?;
    let table = |entries: Option<usize>| {
        let entries = entries.unwrap_or(usize::MAX);
        // SAFETY: as above.
        unsafe { required_list("the layout's table", layout.table, entries) }
    };
    let rows = || size("the layout's rows", layout.rows);
    let kind = layout.kind;
    ensure!(
        kind == KVL_RING || layout.sinks == 0,
        InvalidValue,
        "sinks is {}, but the layout is no ring",
        layout.sinks
    );
    ensure!(
        kind == KVL_PAGED || layout.pages_per_row == 0,
        InvalidValue,
        "pages_per_row is {}, but the layout is not paged",
        layout.pages_per_row
    );
    ensure!(
        !(kind == KVL_CONTIGUOUS || kind == KVL_RING) || layout.table.is_null(),
        InvalidValue,
        "the layout has a table, but kind {kind} takes none"
    );
    Ok(match kind {
        KVL_CONTIGUOUS => Layout::Contiguous,
        KVL_RING => Layout::Ring { sinks: size("sinks", layout.sinks.into())? },
        KVL_PAGED => {
            let pages_per_row = size("pages_per_row", layout.pages_per_row)?;
            Layout::Paged { pages: table(rows()?.checked_mul(pages_per_row))?, pages_per_row }
        }
        KVL_INDIRECT => Layout::Indirect { rows: table(rows()?.checked_mul(slots))? },
        KVL_RAGGED => Layout::Ragged { starts: table(rows()?.checked_add(1))? },
        _ => fail!(InvalidEnum, "the layout's kind is {kind}, which is no kvl_layout_kind"),
    })
}

/// The masks of a call of so many rows.
///
/// # Safety
/// `params` is what the header describes.
pub(super) unsafe fn masks<'a>(params: &kvl_attention_params, batch: usize) -> Result<RawMasks<'a>> {
    // SAFETY: the caller's.
    Ok(RawMasks { mask: params.mask.raw("mask")?, bit_mask: unsafe { bit_mask(params.bit_mask, batch) }? })
}

/// # Safety
/// `from` is null or points to what the header describes.
unsafe fn bit_mask<'a>(from: *const kvl_bit_mask, batch: usize) -> Result<Option<RawBitMask<'a>>> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's, here and below.
    let mask = unsafe { read_sized(from) }?;
    // SAFETY: as above.
    let lists = unsafe {
        (
            list("row_starts of bit_mask", mask.row_starts, batch)?,
            list("query_strides of bit_mask", mask.query_strides, batch)?,
        )
    };
    let rows = match lists {
        (Some(starts), Some(query_strides)) => Some(BitRows { starts, query_strides }),
        (None, None) => None,
        (starts, _) => {
            let [given, absent] = match starts {
                Some(_) => ["row_starts", "query_strides"],
                None => ["query_strides", "row_starts"],
            };
            fail!(InvalidValue, "bit_mask has {given}, but {absent} is null")
        }
    };
    Ok(Some(RawBitMask {
        data: mask.data,
        offset: mask.offset,
        shape: shape("bit_mask", mask.shape, ["batch", "seq", "heads", "keys"])?,
        strides: mask.strides,
        bytes: (mask.bytes > 0).then_some(mask.bytes),
        // SAFETY: as above.
        first_keys: unsafe { list("first_keys of bit_mask", mask.first_keys, batch) }?,
        rows,
    }))
}

/// The norm at `from`, of the heads of `src`.
///
/// # Safety
/// `from` is null or points to what the header describes, whose weights nobody writes while the norm is in use.
pub(super) unsafe fn rms_norm<'a>(from: *const kvl_rms_norm_params, src: &RawView) -> Result<RmsNorm<'a>> {
    // SAFETY: the caller's, here and below.
    let params = unsafe { read_sized(from) }?;
    reserved("kvl_rms_norm_params", params.reserved)?;
    Ok(RmsNorm {
        // SAFETY: as above.
        weight: unsafe { list("weight", params.weight, src.shape[DIM]) }?,
        eps: if params.eps == 0.0 { 1e-6 } else { params.eps },
    })
}

impl kvl_mask {
    pub(super) fn raw(&self, name: &str) -> Result<Option<RawMask>> {
        let Self { data, shape: axes, strides, bytes } = *self;
        if data.is_null() && axes == [0; 4] && strides == [0; 4] && bytes == 0 {
            return Ok(None);
        }
        let shape = shape(name, axes, ["batch", "seq", "heads", "keys"])?;
        Ok(Some(RawMask { data, shape, strides, bytes: (bytes > 0).then_some(bytes) }))
    }
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    assert!(KVL_ERR_NULL_POINTER == Status::NullPointer as i32);
    assert!(KVL_ERR_STRUCT_SIZE == Status::StructSize as i32);
    assert!(KVL_ERR_INVALID_ENUM == Status::InvalidEnum as i32);
    assert!(KVL_ERR_INVALID_VALUE == Status::InvalidValue as i32);
    assert!(KVL_ERR_SHAPE == Status::Shape as i32);
    assert!(KVL_ERR_STRIDE == Status::Stride as i32);
    assert!(KVL_ERR_BOUNDS == Status::Bounds as i32);
    assert!(KVL_ERR_CAPACITY == Status::Capacity as i32);
    assert!(KVL_ERR_OUT_OF_RANGE == Status::OutOfRange as i32);
    assert!(KVL_ERR_OVERLAP == Status::Overlap as i32);
    assert!(KVL_ERR_DUPLICATE_SLOT == Status::DuplicateSlot as i32);
    assert!(KVL_ERR_DTYPE == Status::DType as i32);
    assert!(KVL_ERR_WORKSPACE == Status::Workspace as i32);
    assert!(KVL_ERR_UNSUPPORTED == Status::Unsupported as i32);
    assert!(KVL_ERR_PARALLEL == Status::Parallel as i32);
    assert!(KVL_ERR_INTERNAL == Status::Internal as i32);
    assert!(Status::ALL.len() == KVL_ERR_INTERNAL as usize);
    assert!(KVL_F32 == DType::F32 as i32 && KVL_F16 == DType::F16 as i32 && KVL_BF16 == DType::Bf16 as i32);
    assert!(DType::ALL.len() == 3);
    assert!(KVL_ISA_SCALAR == Isa::Scalar as i32 && KVL_ISA_AVX2 == Isa::Avx2 as i32);
    assert!(KVL_ISA_AVX512 == Isa::Avx512 as i32 && KVL_ISA_NEON == Isa::Neon as i32);
    assert!(KVL_ISA_AMX == Isa::Amx as i32 && KVL_ISA_NEON_BF16 == Isa::NeonBf16 as i32);
    assert!(Isa::ALL.len() == 6);
    assert!(KVL_OP_ROPE_ANGLES == Op::RopeAngles as i32 && KVL_OP_ROPE == Op::Rope as i32);
    assert!(KVL_OP_KV_WRITE == Op::KvWrite as i32 && KVL_OP_REPEAT_KV == Op::RepeatKv as i32);
    assert!(KVL_OP_ATTENTION == Op::Attention as i32 && KVL_OP_MERGE_STATES == Op::MergeStates as i32);
    assert!(KVL_OP_RMS_NORM == Op::RmsNorm as i32 && Op::ALL.len() == 7);
    assert!(KVL_PRECISION_DEFAULT == Precision::Default as i32 && KVL_PRECISION_HIGH == Precision::High as i32);
    assert!(Precision::ALL.len() == 2);
    assert!(KVL_SPLIT_GRID as usize == crate::ops::shard::SPLIT_GRID);
    assert!(KVL_PACK_ROWS == Packing::Rows as i32 && KVL_PACK_ROW_PAIRS == Packing::RowPairs as i32);
    assert!(Packing::ALL.len() == 2);
    assert!(KVL_INTERLEAVED == Pairing::Interleaved as i32 && KVL_HALF_SPLIT == Pairing::HalfSplit as i32);
};

/// The layout on 64-bit machines; `ffi-tests/layout.c` holds the same numbers.
#[cfg(target_pointer_width = "64")]
mod layout {
    use super::*;
    use std::mem::offset_of;

    macro_rules! layout {
        ($name:ident, $size:literal, $($field:ident: $offset:literal),* $(,)?) => {
            const _: () = {
                assert!(size_of::<$name>() == $size && align_of::<$name>() == 8);
                $(assert!(offset_of!($name, $field) == $offset);)*
                // Every field is listed: this pattern has no `..`.
                #[allow(dead_code)]
                fn complete(value: $name) {
                    let $name { $($field: _),* } = value;
                }
            };
        };
    }

    layout!(kvl_view, 88, data: 0, dtype: 8, reserved: 12, shape: 16, strides: 48, bytes: 80);
    layout!(kvl_const_view, 88, data: 0, dtype: 8, reserved: 12, shape: 16, strides: 48, bytes: 80);
    layout!(kvl_mask, 80, data: 0, shape: 8, strides: 40, bytes: 72);
    layout!(kvl_parallel_runner, 32, struct_size: 0, ctx: 8, num_threads: 16, run: 24);
    layout!(kvl_context_params, 16, struct_size: 0, max_isa: 8, reserved: 12);
    layout!(
        kvl_kernel_info, 40,
        struct_size: 0, name: 8, op: 16, src: 20, dst: 24, isa: 28, available: 32, max_error: 36,
    );
    layout!(
        kvl_rope_frequencies_params, 96,
        struct_size: 0, rotary_dim: 8, base: 16, scaling: 24, keep_ramp: 28, factor: 32, original_max_position: 40,
        low_freq_factor: 48, high_freq_factor: 56, beta_fast: 64, beta_slow: 72, attention_factor: 80, factors: 88,
    );
    layout!(
        kvl_rope_params, 80,
        struct_size: 0, pairing: 8, reserved: 12, rotary_dim: 16, inv_freq: 24, magnitude: 32, cos: 40, sin: 48,
        table_rows: 56, offsets: 64, positions: 72,
    );
    layout!(kvl_layout, 40, struct_size: 0, kind: 8, sinks: 12, rows: 16, pages_per_row: 24, table: 32);
    layout!(
        kvl_kv_write_params, 424,
        struct_size: 0, k: 8, v: 96, k_cache: 184, v_cache: 272, positions: 360, counts: 368, rows: 376, slots: 384,
        rope: 392, layout: 400, k_norm: 408, v_packing: 416, reserved: 420,
    );
    layout!(kvl_kv_layer, 176, k: 0, v: 88);
    layout!(kvl_cache, 40, struct_size: 0, layers: 8, num_layers: 16, layout: 24, lengths: 32);
    layout!(
        kvl_shard, 56,
        struct_size: 0, data: 8, num_data: 16, model: 24, num_model: 32, sequence: 40, num_sequence: 48,
    );
    layout!(kvl_rms_norm_params, 24, struct_size: 0, weight: 8, eps: 16, reserved: 20);
    layout!(kvl_attention_state, 96, out: 0, lse: 88);
    layout!(
        kvl_attention_params, 672,
        struct_size: 0, q: 8, k: 96, v: 184, out: 272, lse: 360, scale: 368, softcap: 372, flags: 376, reserved: 380,
        window_left: 384, window_right: 392, lengths: 400, starts: 408, offsets: 416, mask: 424, bias: 504,
        alibi_slopes: 592, sinks: 600, precision: 608, reserved2: 612, layout: 616, query_starts: 624, rows: 632,
        prefixes: 640, bit_mask: 648, plan: 656, v_packing: 664, reserved3: 668,
    );
    layout!(
        kvl_bit_mask, 112,
        struct_size: 0, data: 8, bytes: 16, offset: 24, shape: 32, strides: 64, first_keys: 88, row_starts: 96,
        query_strides: 104,
    );
    layout!(kvl_chunk_states, 16, states: 0, len: 8);
    layout!(
        kvl_merge_chunks_params, 144,
        struct_size: 0, spans: 8, num_spans: 16, kv_heads: 24, dtype: 32, precision: 36, sinks: 40, out: 48, lse: 136,
    );
}
