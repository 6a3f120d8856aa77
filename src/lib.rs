//! Attention over a key/value cache for CPUs.
//!
//! A decoder that generates text keeps the keys and values of past tokens and computes only the new token's query. kvlane is
//! what happens around that cache, vectorised for AVX2, AVX-512, AMX and NEON, behind a safe Rust API and a C ABI
//! (`include/kvlane.h`):
//!
//! | operation | what it does |
//! | --- | --- |
//! | [`rope()`], [`rope_in_place`] | rotary position embedding, both pairings, all the usual scalings |
//! | [`rms_norm`], [`rms_norm_rope`] | RMS norm of heads (QK-norm), alone and with the rotation in one pass |
//! | [`kv_write`] | new keys and values of every row into the cache, each row at its own place; norm and RoPE of the keys on the way |
//! | [`attention`] | masked softmax attention of grouped queries over the cache: prefill, chunks, decode |
//! | [`AttentionPlan`] | what the attention of all layers of a step has in common, checked and worked out once |
//! | [`attention_with_prefix`] | attention over a prefix that all rows share, read once, and over each row's own keys |
//! | [`merge_states`] | outputs over disjoint keys become the output over all of them |
//! | [`attention_chunks`], [`merge_chunks`] | the same for spans of a sequence, with the bits of one call |
//! | [`KvCache`] | the caches of all layers: reset, truncate, insert, copy a prefix, reorder rows, evict, defragment pages |
//! | [`Mesh`] | which rows, heads and keys are whose, where a cache is spread over machines |
//! | [`pack_row_pairs`], [`unpack_row_pairs`] | values in pairs of slots, for kernels that multiply tiles, and back |
//! | [`repeat_kv`] | the explicit repeat of KV heads, for whoever needs it in memory |
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
//! # What is promised
//! - **Bitwise invariance.** The bits of an output row depend on that row's inputs and the kernel alone, which the ISA level
//!   and the precision decide: not on threads, the batch around it, strides, or how the prompt was cut. Cached decode equals
//!   full prefill, to the bit.
//! - **Poison.** NaN or infinity in a slot that is not seen (beyond a length, before a start, masked) never reaches an
//!   output; NaN in live input does.
//! - **All or nothing.** Bad input is an [`Error`] with a pinned [`Status`] and a sentence with both numbers, and not a byte
//!   has been written.
//! - **No surprises.** Memory is the caller's, threads are the caller's ([`Runner`]); a call allocates nothing, keeps no
//!   state and reads no environment.
//!
//! # The road data takes
//! ```text
//! C caller -> capi (guard, null, struct_size, enum range)  \
//!                                                           -> ops (validate, cut tiles) -> kernel from the registry
//! Rust caller ------------------------ safe views ---------/        |                       (one ISA level)
//!                                                                   -> runner (caller's, rayon, or none)
//! driver -> the Rust API, and nothing private
//! ```
//! One direction, no way back: `capi` knows no kernel, a kernel knows no descriptor, the driver uses only what a user has.
//! A tensor is a [`View`]: always `[batch, seq, heads, dim]`, the order in memory given by strides. An operation
//! validates everything once, cuts the work into tiles by the problem's shape, and hands them to a kernel through
//! the runner; scratch memory is a [`Workspace`] that the caller keeps. A kernel is a generic algorithm compiled for one
//! [`Isa`] level and listed in the registry ([`kernels()`]), which dispatch, tests and benches all walk: what is not in it
//! does not exist. [`Context::kernel`] tells which one serves a call; `KVLANE_MAX_ISA` and [`Context::with_max_isa`] lower.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
// A register tile is arrays indexed by row and vector; iterators over them hide the pattern.
#![allow(clippy::needless_range_loop)]

#[cfg(feature = "capi")]
mod capi;
mod context;
mod cpu;
pub mod docs;
mod dtype;
mod error;
mod isa;
mod kernels;
mod layout;
pub mod masks;
mod ops;
mod parallel;
mod problem;
mod view;

#[cfg(feature = "bench")]
pub mod bench;
#[cfg(feature = "driver")]
pub mod driver;

pub use context::Context;
pub use dtype::{DType, Element};
pub use error::{Error, Result, Status};
pub use isa::Isa;
pub use kernels::api::{KernelInfo, Op, Precision};
pub use kernels::registry::kernels;
pub use layout::{Layout, Packing};
pub use ops::attention::{AttentionOptions, AttentionTensors, alibi_slopes, attention, attention_workspace_size};
pub use ops::cache::{
    KeyRotation, KvCache, KvLayer, UnrotatedKeys, copy_pages, defragment_pages, reorder_table,
    reorder_table_workspace_size, reorder_workspace_size, set_table_tokens,
};
pub use ops::chunks::{
    ChunkMerge, MAX_SEGMENTS, attention_chunks, attention_chunks_workspace_size, chunk_states_len, merge_chunks,
    merge_chunks_workspace_size,
};
pub use ops::mask::{BitMask, Mask};
pub use ops::merge::{AttentionState, MAX_STATES, merge_states};
pub use ops::norm::{RmsNorm, rms_norm, rms_norm_in_place, rms_norm_rope, rms_norm_rope_in_place};
pub use ops::pack::{pack_row_pairs, unpack_row_pairs};
pub use ops::plan::AttentionPlan;
pub use ops::prefix::{SharedPrefix, attention_with_prefix, attention_with_prefix_workspace_size};
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
pub use problem::limits::{MAX_HEAD_DIM, MAX_ROTARY_DIM};
pub use problem::rotation::Pairing;
pub use view::{Axis, View, ViewMut};

/// The README's Rust examples are documentation tests.
#[cfg(all(doctest, feature = "rayon"))]
#[doc = include_str!("../README.md")]
struct Readme;
