//! The operations: each validates everything, cuts the work into tiles and hands them to kernels through a runner.
//!
//! Every operation exists twice: a safe function over [`View`](crate::View)s, and beneath it an unsafe one over raw views,
//! which the C ABI calls too. All validation is in the latter.

use crate::error::{Result, ensure};
use crate::parallel::{Runner, for_each_tile, workers_for};
use crate::view::{BATCH, DIM, HEADS, RawView, SEQ};

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
const TOKENS_PER_TILE: usize = 16;

/// Elements below which another thread does not pay in the memory-bound operations.
const COPY_GRAIN: usize = 64 * 1024;

/// Runs `token` for the row of every token of a view that has elements, and its number in the row.
fn for_each_token(runner: &dyn Runner, view: &RawView, token: impl Fn((usize, usize)) + Sync) -> Result<()> {
    if view.is_empty() {
        return Ok(());
    }
    for_each_token_with(runner, view.shape, || (), |(), at| token(at))
}

/// As [`for_each_token`], for tensors of a shape, whether they have elements or not; neighbours make a tile, which has a state of
/// its own from `start`.
fn for_each_token_with<S>(
    runner: &dyn Runner,
    [batch, seq, heads, dim]: [usize; 4],
    start: impl Fn() -> S + Sync,
    token: impl Fn(&mut S, (usize, usize)) + Sync,
) -> Result<()> {
    let tokens = batch * seq;
    let workers = workers_for(runner, tokens * heads * dim, COPY_GRAIN);
    for_each_tile(runner, workers, tokens.div_ceil(TOKENS_PER_TILE), &|_, tile| {
        let mut state = start();
        for i in tile * TOKENS_PER_TILE..((tile + 1) * TOKENS_PER_TILE).min(tokens) {
            token(&mut state, (i / seq, i % seq));
        }
    })
}

/// Fails unless both are valid, of one shape, and either the same view or apart.
fn check_in_place_or_apart(src: &RawView, dst: &RawView) -> Result<()> {
    src.validate("src")?;
    dst.validate_output("dst")?;
    for axis in [BATCH, SEQ, HEADS, DIM] {
        src.same_axis("src", dst, "dst", axis)?;
    }
    let in_place = src.data == dst.data && src.strides == dst.strides && src.dtype == dst.dtype;
    ensure!(
        in_place || !src.overlaps(dst),
        Overlap,
        "src and dst share memory without being the same view: in place, pass the same view twice"
    );
    Ok(())
}
