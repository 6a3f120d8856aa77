//! Masked softmax attention of one tile of query rows over a range of keys.
//!
//! | file | what |
//! | --- | --- |
//! | `tile` | the walk of a tile over chunks and blocks |
//! | `scratch` | the scratch memory of a tile, and the state of its rows |
//! | `products` | the two products of a block: the trait, and its arguments |
//! | `pieces` | the functions of a level for keys of a format, and for values of a format |
//! | `key_pointers` | pointers to the keys of a block, for every layout; widened copies of units of several elements |
//! | `units` | how loops over a cache read units of one element, and of several |
//! | `row_pairs` | values in pairs of slots, converted to rows |
//! | `integer` | scores of int8 keys by products of integers |
//! | `integer_blocks` | the same for keys in blocks, in two ways: `integer_words` and `integer_quarters` |
//! | `integer_values` | sums of weighted values by products of integers |
//! | `direct` | the direct path: scores and values of few query rows (decode), from the cache |
//! | `packed` | the packed path: scores and values of many query rows (prefill), from packed copies of a block |
//! | `weighted` | sums of weighted values, in the cache or in copies |
//! | `scales` | scales per token and head of a quantised cache |
//! | `logits` | scores to logits: scale, softcap, ALiBi, bias |
//! | `softmax` | logits to weights |
//! | `non_finite` | repairs of NaN and infinity for kernels of matrix products |
//! | `state` | folding of states, outputs, and conversion of rows to and from f32 |
//!
//! # The algorithm
//! A tile is the query rows of one sequence and of one or several KV heads: tokens times the query heads of the group,
//! so that K and V are read once for all of them. Several KV heads share a tile if the heads of a token are adjacent
//! in memory and there are few query rows, so that memory is read in its order. Keys are processed in blocks of
//! [`BLOCK`] and chunks of [`CHUNK`], both on a grid that begins at key 0 of the sequence, whatever is visible:
//!
//! ```text
//! Q rows -> f32 (once)                      scratch.q     [rows][dp], or where the rows of one token lie
//! per block: visible bits of every row      RowState      one u64: BLOCK is 64
//!            S = Q K^T                      scratch.s     [rows][BLOCK]
//!            P = 2^(S - max), 0 where hidden, in place
//!            O = O * 2^(old max - max) + P V    scratch.acc   [rows][dvp], or rows of the output
//! per chunk: (max, sum, O) folded into the row's total, in ascending order   scratch.total [rows][dvp]
//! at the end: O / sum -> out, max + ln sum -> LSE
//! ```
//! A tile can also write the states of its chunks to the workspace (`partials`). [`reduce`] folds them later in the
//! same order, so that one sequence can run on many threads.
//!
//! # Why bits depend on the query row only
//! Every number of a query row is computed by a fixed sequence of operations. A score is the sum over lanes, by the
//! tree of [`Simd::sum_lanes`], of partial sums over every LANES-th element (in the order of [`Load::load_pair`]).
//! `direct` computes it as such; `packed` walks the same tree depth-first over a transposed block. Values are added
//! key after key. Block and chunk grids are absolute. A masked key has a weight of exactly 0, and a block or chunk
//! that is completely masked does not change a state, so that it makes no difference whether it is skipped.
//!
//! # Why masked data cannot reach the output
//! Keys that no query row of the tile may see are not loaded (a prefetch may touch them, which cannot fault and moves
//! no value). A masked weight is replaced by 0, not multiplied by it. A weight of 0 times a NaN or infinity in V would
//! still be NaN. So if a block is partly masked, its V is checked first. In the rare case that it is not finite, each
//! query row adds only the keys that it sees, by the same operations.

mod direct;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub(crate) mod integer;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub(crate) mod integer_blocks;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod integer_quarters;
#[cfg(target_arch = "x86_64")]
pub(crate) mod integer_values;
#[cfg(target_arch = "x86_64")]
mod integer_words;
mod key_pointers;
mod logits;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub(crate) mod non_finite;
mod packed;
mod pieces;
mod products;
mod row_pairs;
mod scales;
mod scratch;
mod softmax;
pub(crate) mod state;
mod tile;
mod units;
mod weighted;

pub(crate) use direct::{DirectScores, DirectValues, IntegerValues, OneValue, all_finite, unit_rows};
#[cfg(target_arch = "x86_64")]
pub(crate) use direct::{NEAR_DISTANCE, PrefetchDistances};
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub(crate) use key_pointers::KeyPointerTable;
#[cfg(target_arch = "x86_64")]
pub(crate) use key_pointers::{BlockRequest, GatherBuffers, locate};
pub(crate) use key_pointers::{KeyPointers, WidenUnits};
#[cfg(target_arch = "x86_64")]
pub(crate) use logits::row_logits;
pub(crate) use packed::{PackKeys, PackValues};
pub(crate) use row_pairs::Widen;
#[cfg(target_arch = "x86_64")]
pub(crate) use row_pairs::are_pairs;
#[cfg(target_arch = "x86_64")]
pub(crate) use row_pairs::unpack_head;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(crate) use row_pairs::unpack_pairs;
#[cfg(target_arch = "x86_64")]
pub(crate) use softmax::ROUNDED_LOGITS;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub(crate) use softmax::Softmax;
pub(crate) use state::reduce;

pub(crate) use pieces::{KeyFractions, KeyPieces, PairPieces, Pieces, ValuePieces};
pub(crate) use products::{Block, Products, VectorProducts, direct_rows};
pub(crate) use scratch::{RowState, Scratch};
#[cfg(target_arch = "x86_64")]
pub(crate) use tile::row_lines;
pub(crate) use tile::{Deinterleaved, tile};
pub(crate) use units::{Blocks, Units};

/// Keys that `direct` processes before it continues with the next KV head, and for which prefetches know a place.
pub(crate) const SUBBLOCK: usize = 16;
