//! The operations: each validates everything, cuts the work into tiles and hands them to kernels through a runner.
//!
//! Every operation exists twice: a safe function over [`View`](crate::View)s, and beneath it an unsafe one over raw views,
//! which the C ABI calls too. All validation is in the latter.

pub mod attention;
pub mod cache;
pub mod chunks;
pub mod mask;
pub mod merge;
pub mod norm;
pub mod pack;
pub mod plan;
pub mod prefix;
pub mod repeat;
pub mod rope;
pub mod shard;
mod tiling;
pub mod workspace;
pub mod write;

/// Tokens a tile of the memory-bound operations has: enough to make taking a tile cheap.
pub(crate) const TOKENS_PER_TILE: usize = 16;

/// Elements below which another thread does not pay in the memory-bound operations.
pub(crate) const COPY_GRAIN: usize = 64 * 1024;
