//! Attention over a key/value cache for CPUs.
//!
//! A decoder that generates text keeps the keys and values of past tokens and computes only the new token's query. kvlane is the
//! work around that cache, vectorised for AVX2, AVX-512, AMX and NEON, behind a safe Rust API and a C ABI (`include/kvlane.h`):
//!
//! | operation | does |
//! | --- | --- |
//! | [`rope()`], [`rope_in_place`] | rotary position embedding, both pairings, all common scalings |
//! | [`rms_norm`], [`rms_norm_rope`] | RMS norm of heads (QK-norm), alone and fused with the rotation |
//! | [`hadamard`], [`hadamard_in_place`] | the Hadamard rotation of heads, before they are quantised; also fused with the write, the read and attention |
//! | [`kv_write`] | writes new keys and values of every sequence into the cache, with norm and RoPE of the keys on the way |
//! | [`kv_read`] | reads tokens of a cache of any format and layout into plain tensors |
//! | [`attention`] | masked softmax attention of grouped queries over the cache: prefill, chunks, decode |
//! | [`AttentionPlan`] | validates once what the attention of all layers of a step has in common |
//! | [`attention_with_prefix`] | attention over a prefix that all sequences share, read once, and over the keys of each sequence |
//! | [`merge_states`] | merges outputs over disjoint keys into the output over all of them |
//! | [`attention_chunks`], [`merge_chunks`] | the same for segments of a sequence, with the bits of one call |
//! | [`KvCache`] | operations on the caches of all layers: reset, truncate, insert, copy a prefix, reorder, evict, defragment pages |
//! | [`Mesh`] | the sequences, heads and keys of each machine, for a cache that is spread over several |
//! | [`pack_row_pairs`], [`unpack_row_pairs`] | converts values to pairs of slots, for kernels that multiply tiles, and back |
//! | [`repeat_kv`] | the explicit repeat of KV heads |
//!
//! [`Layout`] defines in which slots of a cache tokens lie (rings, pages, beam tables, ragged sequences), and [`masks`] which query
//! sees which key. [`docs`] has the manual: recipes for caches, the C API, performance, conformance, the command line, and a
//! [glossary](docs::glossary) of the words used here.
//!
//! # One decode step
//! ```
//! use kvlane::*;
//!
//! fn main() -> Result<()> {
//!     let context = Context::new()?; // once: picks the kernels for this CPU
//!     let mut workspace = Workspace::new(); // scratch memory, kept between calls
//!     // A cache of two sequences with room for 64 tokens, 2 KV heads of 32, in f16. They hold 7 and 30 tokens.
//!     let (q_shape, kv_shape, cache_shape) = ([2, 1, 6, 32], [2, 1, 2, 32], [2, 64, 2, 32]);
//!     let (mut keys, mut values) = (vec![half::f16::ZERO; 8192], vec![half::f16::ZERO; 8192]);
//!     let mut lengths = [7, 30];
//!     // One new token per sequence: 6 query heads share the 2 KV heads.
//!     let (mut q, k, v, mut out) = ([0.1f32; 384], [0.2f32; 128], [0.3f32; 128], [0.0f32; 384]);
//!     let frequencies = RopeFrequencies::new(32, 10_000.0, &RopeScaling::None)?;
//!     let rope = Rope::new(Pairing::HalfSplit, 32, &frequencies, Positions::Offsets(&lengths));
//!     rope_in_place(&context, &Serial, ViewMut::new(&mut q, q_shape)?, &rope)?;
//!     let (k, v) = (View::new(&k, kv_shape)?, View::new(&v, kv_shape)?);
//!     let (k_cache, v_cache) = (ViewMut::new(&mut keys, cache_shape)?, ViewMut::new(&mut values, cache_shape)?);
//!     let write = KvWrite::new(k, v, k_cache, v_cache, Destination::positions(&lengths));
//!     kv_write(&context, &Serial, write.rope(rope))?; // keys are rotated on their way into the cache
//!     lengths.iter_mut().for_each(|n| *n += 1);
//!     let (k, v) = (View::new(&keys, cache_shape)?, View::new(&values, cache_shape)?);
//!     let tensors = AttentionTensors::new(View::new(&q, q_shape)?, k, v, ViewMut::new(&mut out, q_shape)?);
//!     let options = AttentionOptions::new().causal(true).lengths(&lengths);
//!     attention(&context, &Serial, &mut workspace, tensors, &options)
//! }
//! ```
//!
//! # Guarantees
//! - **Bitwise invariance.** The bits of an output row depend on that row's inputs and on the kernel, which the ISA level and the
//!   precision determine. They do not depend on threads, on the batch around the sequence, on strides, on the layout, or on how the
//!   prompt was cut. Cached decode equals full prefill, to the bit.
//! - **Poison.** NaN or infinity in a slot that is not visible (beyond a length, before the first key, masked) never reaches an
//!   output. NaN in visible input does.
//! - **All or nothing.** Bad input is an [`Error`] with a fixed [`Status`] and a sentence with both numbers, and no byte has been
//!   written.
//! - **No side effects.** Memory and threads ([`Runner`]) are the caller's. A call allocates nothing, keeps no state and does not
//!   read the environment.
//! - **Room to grow.** A struct that a caller fills has a constructor with its required parts and a setter for each optional one.
//!   Its fields are public, and later versions may add fields.
//!
//! # Structure
//! ```text
//! C caller -> capi (guard, null, struct_size, enum range)  \
//!                                                           -> ops (validate, tile) -> problem -> kernel from the registry
//! Rust caller ------------------------ safe views ---------/        |                              (one ISA level)
//!                                                                   -> runner (caller's, rayon, or none)
//! driver, bench -> the Rust API, and nothing private (but `bench` has `loops`, its limits, `advise` and what names a CPU)
//! ```
//! Each layer imports from the layers below it only:
//!
//! | layer | holds |
//! | --- | --- |
//! | `capi`, `driver`, `bench` | the exports of the C ABI; a decoder; measurements |
//! | `ops` | the public operations: every check with its sentence, the cut into tiles, dispatch |
//! | `context` | the choice of a kernel for each operation |
//! | `kernels` | each algorithm once (`generic`), the vector trait, one module per level, and the registry |
//! | `problem` | what a validated call is: tensors, visibility, masks, the block and chunk grid, tiles, rotations, limits |
//! | foundation | views, element types, cache formats, layouts, errors, CPU detection, memory, runners |
//!
//! A tensor is a [`View`]: always `[batch, seq, heads, dim]`, with strides for the order in memory. An operation validates
//! everything once, cuts the work into tiles on a grid that depends on the problem only, and passes the tiles to a kernel through
//! the runner. Scratch memory is a [`Workspace`] that the caller keeps. A kernel is a generic algorithm compiled for one [`Isa`]
//! level and listed in the registry ([`kernels()`]). Dispatch, tests and benches iterate over the registry, so that a kernel
//! that is not tested or not measured cannot exist. [`Context::kernel`] returns the kernel that serves a call;
//! `KVLANE_MAX_ISA` and [`Context::with_max_isa`] lower the level.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
// A register tile is arrays indexed by row and vector; iterators over them hide the pattern.
#![allow(clippy::needless_range_loop)]

mod cache_view;
#[cfg(feature = "capi")]
mod capi;
mod context;
mod cpu;
pub mod docs;
mod dtype;
mod error;
mod format;
mod isa;
mod kernels;
mod layout;
pub mod masks;
mod memory;
mod ops;
mod parallel;
mod problem;
mod tuning;
mod view;

#[cfg(feature = "bench")]
pub mod bench;
#[cfg(feature = "driver")]
pub mod driver;

pub use cache_view::{AffineScales, CacheView, CacheViewMut, ZeroPoints};
pub use context::Context;
#[cfg(feature = "bench")]
pub(crate) use cpu::cpu_class;
pub use dtype::{DType, Element};
pub use error::{Error, Result, Status};
pub use format::CacheFormat;
pub use isa::Isa;
pub use kernels::api::{KernelInfo, Op, Precision};
#[cfg(feature = "bench")]
pub(crate) use kernels::loops;
pub use kernels::registry::kernels;
pub use layout::{Layout, Packing};
#[cfg(feature = "bench")]
pub(crate) use memory::{Advice, advise};
pub use memory::{CacheBuffer, CacheUnit, advise_huge_pages};
pub use ops::attention::{AttentionOptions, AttentionTensors, alibi_slopes, attention, attention_workspace_size};
pub use ops::cache::{
    KeyRotation, KvCache, KvLayer, UnrotatedKeys, copy_pages, defragment_pages, reorder_table,
    reorder_table_workspace_size, reorder_workspace_size, set_table_tokens,
};
pub use ops::chunks::{
    ChunkMerge, MAX_SEGMENTS, attention_chunks, attention_chunks_workspace_size, chunk_states_len, merge_chunks,
    merge_chunks_workspace_size,
};
pub use ops::hadamard::{hadamard, hadamard_block, hadamard_in_place};
pub use ops::mask::{BitMask, Mask};
pub use ops::merge::{AttentionState, MAX_STATES, merge_states};
pub use ops::norm::{RmsNorm, rms_norm, rms_norm_in_place, rms_norm_rope, rms_norm_rope_in_place};
pub use ops::pack::{pack_row_pairs, unpack_row_pairs};
pub use ops::plan::AttentionPlan;
pub use ops::prefix::{SharedPrefix, attention_with_prefix, attention_with_prefix_workspace_size};
pub use ops::read::{KvRead, Source, kv_read};
pub use ops::repeat::repeat_kv;
pub use ops::rope::{
    Llama3Scaling, LongRopeScaling, Positions, Rope, RopeAngles, RopeFrequencies, RopeScaling, YarnScaling, rope,
    rope_in_place,
};
pub use ops::shard::{HeadShard, Mesh, SPLIT_GRID, SegmentLists, Shard, shard_slots};
pub use ops::workspace::Workspace;
pub use ops::write::{Destination, KvWrite, kv_write};
#[cfg(feature = "rayon")]
pub use parallel::{Rayon, ThreadPool};
pub use parallel::{Runner, Serial};
pub use problem::limits::{MAX_HADAMARD_BLOCK, MAX_HEAD_DIM, MAX_ROTARY_DIM};
pub use problem::rotation::Pairing;
pub use tuning::{KeyOrder, Prefetch, ScoreTiles, Tuning};
pub use view::{Affine, Axis, Integers, Nibbles, View, ViewMut, Zeros};

/// The README's Rust examples are documentation tests.
#[cfg(all(doctest, feature = "rayon"))]
#[doc = include_str!("../README.md")]
struct Readme;
