//! The operations. Each checks everything, cuts the work into tiles, and hands the tiles to kernels through a runner.
//!
//! Every operation exists twice: as a safe function over [`View`](crate::View)s, and beneath it as an unsafe function over raw
//! views, which the C ABI calls too. All checks are in the latter.

use crate::error::{Result, ensure};
use crate::kernels::api::CopyArgs;
use crate::parallel::{Runner, for_each_tile, workers_for};
use crate::view::{BATCH, DIM, HEADS, RawView, SEQ, Units, contiguous};

pub mod attention;
pub mod cache;
pub mod chunks;
pub mod hadamard;
mod heads;
mod jobs;
pub mod mask;
pub mod merge;
pub mod norm;
pub mod pack;
pub mod plan;
pub mod prefix;
pub mod read;
pub mod repeat;
pub mod rope;
mod setters;
pub mod shard;
mod tiling;
mod visibility;
pub mod workspace;
pub mod write;

/// Tokens per tile of the memory-bound operations: enough to make taking a tile cheap.
const TOKENS_PER_TILE: usize = 16;

/// Elements below which another thread does not pay in the memory-bound operations.
const COPY_GRAIN: usize = 64 * 1024;

/// Runs `token` for each token of a view that has elements, by its indices on the first two axes.
fn for_each_token(runner: &dyn Runner, view: &RawView, token: impl Fn((usize, usize)) + Sync) -> Result<()> {
    if view.is_empty() {
        return Ok(());
    }
    for_each_token_with(runner, view.shape, || (), |(), at| token(at))
}

/// As [`for_each_token`], for a shape, even without elements. Neighbouring tokens form a tile, and each tile has a state from
/// `start`.
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

/// The copy of one token's heads from one view to another.
///
/// # Safety
/// Both views are validated and the indices inside them.
unsafe fn token_copy<U: Units, V: Units>(
    src: &RawView<U>,
    from: (usize, usize),
    dst: &RawView<V>,
    to: (usize, usize),
) -> CopyArgs {
    // SAFETY: the caller's.
    unsafe { vectors_copy(src, from, dst, to, 0, src.shape[HEADS], HEADS) }
}

/// The copy of vectors along an axis, from a token and a head on.
///
/// # Safety
/// The views are valid, and the token and the head are inside them.
#[inline]
unsafe fn vectors_copy<U: Units, V: Units>(
    src: &RawView<U>,
    from: (usize, usize),
    dst: &RawView<V>,
    to: (usize, usize),
    head: usize,
    vectors: usize,
    axis: usize,
) -> CopyArgs {
    CopyArgs {
        // SAFETY: the caller's.
        src: unsafe { src.row(from.0, from.1, head) },
        second: std::ptr::null(),
        // SAFETY: as above.
        dst: unsafe { dst.row(to.0, to.1, head) },
        heads: vectors,
        repeats: 1,
        src_head: src.strides[axis] as isize,
        dst_head: dst.strides[axis] as isize,
        src_dim: src.strides[DIM] as isize,
        dst_dim: dst.strides[DIM] as isize,
        dim: src.shape[DIM],
        src_prefetch: 0,
        dst_prefetch: 0,
    }
}

/// The copies of all tokens of one view to the same places of another.
#[derive(Clone, Copy)]
struct TokenCopies<'a> {
    src: &'a RawView,
    dst: &'a RawView,
    src_prefetch: isize,
    dst_prefetch: isize,
}

impl<'a> TokenCopies<'a> {
    fn new(src: &'a RawView, dst: &'a RawView) -> Self {
        let (src_prefetch, dst_prefetch) = aheads(src, dst);
        Self { src, dst, src_prefetch, dst_prefetch }
    }

    /// # Safety
    /// Both views are validated and the indices inside them.
    unsafe fn at(&self, at: (usize, usize)) -> CopyArgs {
        let Self { src, dst, src_prefetch, dst_prefetch } = *self;
        // SAFETY: the caller's.
        unsafe { CopyArgs { src_prefetch, dst_prefetch, ..token_copy(src, at, dst, at) } }
    }
}

/// The prefetch distances of a source and its target; 0 unless they are large.
fn aheads(src: &RawView, dst: &RawView) -> (isize, isize) {
    if !is_large(&[src, dst]) {
        return (0, 0);
    }
    // A prefetch for writing serves reading too.
    (if src.data == dst.data { 0 } else { ahead(src) }, ahead(dst))
}

/// Whether the views together exceed the second-level cache.
fn is_large(views: &[&RawView]) -> bool {
    views.iter().map(|view| view.elements().saturating_mul(view.dtype.size())).fold(0, usize::saturating_add)
        > crate::cpu::cache::second_level()
}

/// The prefetch distance, in bytes, of a walk over a large view.
const AHEAD: usize = 4 << 10;

/// Whether a walk prefetches a view. Not f32 in the order of memory on AMD: so few instructions pass per line that the hardware keeps
/// ahead by itself, and on Zen 4 prefetches cost a tenth of RoPE and Hadamard rotations, and a fifth of copies and merges.
fn asks_for<U: Units>(view: &RawView<U>) -> bool {
    let [_, tokens, heads, dim] = view.shape;
    // Asked for every token: the vendor last.
    !(view.dtype.size() == 4
        && view.strides[SEQ..] == contiguous([1, tokens, heads, dim])[SEQ..]
        && crate::cpu::vendor() == "AuthenticAMD")
}

/// The prefetch distance in bytes from a head of a view, for a walk token by token: the head that the walk reaches about
/// [`AHEAD`] bytes later. The hardware's prefetcher looks less far, and a few dozen cycles of arithmetic per head keep it from
/// the tokens behind.
fn ahead<U: Units>(view: &RawView<U>) -> isize {
    let (size, head) = (view.dtype.size(), view.head_bytes());
    if !asks_for(view) {
        return 0;
    }
    let token = view.shape[HEADS].saturating_mul(head);
    let (step, bytes) = match view.strides {
        [.., dim] if dim != 1 => return 0,
        // Most prefetches stay within the token.
        [_, seq, heads, _] if token >= 2 * AHEAD && heads.unsigned_abs() <= seq.unsigned_abs() => (heads, head),
        [_, seq, ..] => (seq, token),
    };
    let steps = AHEAD.div_ceil(bytes.max(1));
    (step as isize).wrapping_mul(steps as isize).wrapping_mul(size as isize)
}

/// Fails unless both views are valid, of one shape, and either identical or disjoint.
fn check_in_place_or_apart(src: &RawView, dst: &RawView) -> Result<()> {
    let (from, to) = (src.validate("src")?, dst.validate_output("dst")?);
    for axis in [BATCH, SEQ, HEADS, DIM] {
        src.same_axis("src", dst, "dst", axis)?;
    }
    let in_place = src.data == dst.data && src.strides == dst.strides && src.dtype == dst.dtype;
    ensure!(
        in_place || !src.overlaps_within(from, dst, to),
        Overlap,
        "src and dst share memory without being the same view: in place, pass the same view twice"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::view::bhsd;

    #[test]
    fn a_walk_asks_for_what_it_comes_to() {
        let view =
            |shape, strides| RawView { data: std::ptr::null_mut(), dtype: DType::F16, shape, strides, bytes: None };
        // 40 heads of 256 bytes: the sixteenth from here on, wherever heads lie.
        let shape = [1, 2048, 40, 128];
        assert_eq!(ahead(&view(shape, contiguous(shape))), 16 * 256);
        assert_eq!(ahead(&view(shape, [0, -3 * 40 * 128, -128, 1])), -16 * 256);
        // Four tokens of 1 KiB, or as many of each head.
        let shape = [1, 2048, 4, 128];
        assert_eq!(ahead(&view(shape, contiguous(shape))), 4 * 1024);
        assert_eq!(ahead(&view(shape, bhsd(shape))), 4 * 256);
        // Elements that lie apart, absurd sizes.
        assert_eq!(ahead(&view(shape, [0, 1, 2048, 8192])), 0);
        let most = i32::MAX as usize;
        ahead(&view([most; 4], [i64::MAX, i64::MIN, i64::MAX, 1]));
        ahead(&view([0; 4], [0, 0, 0, 1]));
    }
}
