//! Masked softmax attention of one tile of query rows over a range of keys.
//!
//! | file | what |
//! | --- | --- |
//! | `tile` | the walk of a tile over chunks and blocks |
//! | `scratch` | the scratch memory of a tile, and the state of its rows |
//! | `products` | the two products of a block: the trait, and what they are told of a block |
//! | `pieces` | what a level does with keys of one format, and with values of one |
//! | `key_pointers` | where the keys of a block lie, whatever the cache's layout |
//! | `row_pairs` | values packed in pairs of slots, made into rows |
//! | `direct` | scores and values of few rows (decode): straight from the cache |
//! | `packed` | scores and values of many rows (prefill): from packed copies of a block |
//! | `weighted` | sums of weighted values, wherever the values lie |
//! | `scales` | scales per token and head beside the units of a quantised cache |
//! | `softmax` | scores to weights |
//! | `state` | folding, finishing, and moving rows between their own type and f32 |
//!
//! # The road
//! A tile is query rows of one batch row and of one or several KV heads: tokens times the query heads of the group, so that K
//! and V are read once for all of them. Several KV heads go together where the heads of a token are neighbours in memory and
//! the rows are few, so that memory is read in its own order. Keys are walked in blocks of [`BLOCK`] and chunks of [`CHUNK`],
//! both on a grid that starts at key 0 of the cache, whatever is visible:
//!
//! ```text
//! Q rows -> f32 (once)                      scratch.q     [rows][dp]
//! per block: visible bits of every row      RowState      one u64: BLOCK is 64
//!            S = Q K^T                      scratch.s     [rows][BLOCK]
//!            P = 2^(S - max), 0 where hidden, in place
//!            O = O * 2^(old max - max) + P V    scratch.acc   [rows][dvp]
//! per chunk: (max, sum, O) folded into the row's total, in ascending order   scratch.total [rows][dvp]
//! at the end: O / sum -> out, max + ln sum -> LSE
//! ```
//! A tile may also leave the states of its chunks in the workspace (`partials`); [`reduce`] folds them later in the same
//! order, which is how one row runs on many threads.
//!
//! # Why the bits do not depend on anything but the row
//! Every number of a row is computed by a fixed sequence of operations. A score is always the sum over lanes, by
//! [`Simd::sum_lanes`]'s tree, of partial sums over every LANES-th element (of the order in which [`Load::load_pair`] gives
//! them); `direct` takes it directly, `packed` walks the same tree depth-first over a transposed block. Values are added one key
//! after the other. Block and chunk grids are absolute. What a mask hides contributes a weight of exactly 0, and a block or
//! chunk that is wholly hidden leaves a state as it is, so it does not matter whether it is skipped.
//!
//! # Why nothing hidden gets out
//! Keys beyond what some row of the tile may see are not loaded (a prefetch may touch them: it cannot fault and moves no
//! value). A hidden weight is replaced by 0, not multiplied. A weight of 0 still makes NaN out of a hidden NaN or infinity
//! in V: when a block is hidden in part, its V is looked at first, and in the rare case that it is not finite, each row takes
//! only the keys it sees, by the same operations.

mod direct;
mod key_pointers;
mod packed;
mod pieces;
mod products;
mod row_pairs;
mod scales;
mod scratch;
mod softmax;
pub(crate) mod state;
mod tile;
mod weighted;

pub(crate) use direct::{DirectScores, DirectValues, OneValue, all_finite};
pub(crate) use key_pointers::{BlockRequest, GatherBuffers, KeyPointerTable, KeyPointers, locate};
pub(crate) use packed::{PackKeys, PackValues};
pub(crate) use row_pairs::Widen;
#[cfg(target_arch = "x86_64")]
pub(crate) use row_pairs::are_pairs;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use row_pairs::unpack_pairs;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use softmax::Softmax;
pub(crate) use state::reduce;

pub(crate) use pieces::{KeyPieces, Pieces, ValuePieces};
pub(crate) use products::{Block, Products, VectorProducts};
pub(crate) use scratch::{RowState, Scratch};
pub(crate) use tile::{Deinterleaved, tile};

/// Keys of which `direct` does the scores, or adds the values, before it goes on to the next KV head.
const SUBBLOCK: usize = 16;
