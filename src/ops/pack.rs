//! Packing values in pairs of slots, and back.

use crate::context::Context;
use crate::error::{Result, ensure};
use crate::kernels::api::{CopyArgs, CopyFn, Op};
use crate::layout::{Layout, Packing, Place};
use crate::ops::{aheads, for_each_token, token_copy};
use crate::parallel::Runner;
use crate::view::{BATCH, DIM, HEADS, RawCacheView, RawView, SEQ, Units, View, ViewMut};

/// Packs values in [row pairs](crate::Packing::RowPairs): `[batch, n, heads, dim]` becomes `[batch, n / 2 rounded up, heads, 2
/// * dim]`, in which element `2d + i` of token s is element d of token `2s + i` of the source.
///
/// Both views have one type, and every bit is kept. If n is odd, the second half of the last pair is not written.
/// [`kv_write`](crate::kv_write) packs values as it writes them; this function is for caches that exist already.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// [`Status::Shape`](crate::Status::Shape), [`Status::DType`](crate::Status::DType): shapes do not fit, or types differ.
/// [`Status::Overlap`](crate::Status::Overlap): the views share memory. On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let v = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
/// let mut packed = [0.0f32; 8];
/// let (src, dst) = (View::new(&v, [1, 3, 1, 2])?, ViewMut::new(&mut packed, [1, 2, 1, 4])?);
/// pack_row_pairs(&Context::new()?, &Serial, src, dst)?;
/// assert_eq!(packed, [1.0, 3.0, 2.0, 4.0, 5.0, 0.0, 6.0, 0.0]);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn pack_row_pairs(context: &Context, runner: &dyn Runner, src: View, dst: ViewMut) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { pack_row_pairs_raw(context, runner, src.raw, dst.raw) }
}

/// The inverse of [`pack_row_pairs`]: `src` is `[batch, n / 2 rounded up, heads, 2 * dim]`, `dst` is `[batch, n, heads, dim]`.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// As [`pack_row_pairs`].
pub fn unpack_row_pairs(context: &Context, runner: &dyn Runner, src: View, dst: ViewMut) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { unpack_row_pairs_raw(context, runner, src.raw, dst.raw) }
}

/// # Safety
/// The memory that valid views reach is readable and, for `dst`, writable, by this call alone.
pub(crate) unsafe fn pack_row_pairs_raw(
    context: &Context,
    runner: &dyn Runner,
    src: RawView,
    dst: RawView,
) -> Result<()> {
    let kernel = check(context, ("src", &src), ("dst", &dst), (&src, &dst))?;
    let ahead = aheads(&src, &dst);
    for_each_token(runner, &src, |at| {
        // SAFETY: the views are valid and fit each other.
        unsafe { pack_token(kernel, &src, at, &dst, ahead, |token| Some((at.0, token))) };
    })
}

/// # Safety
/// The memory that valid views reach is readable and, for `dst`, writable, by this call alone.
pub(crate) unsafe fn unpack_row_pairs_raw(
    context: &Context,
    runner: &dyn Runner,
    src: RawView,
    dst: RawView,
) -> Result<()> {
    let kernel = check(context, ("dst", &dst), ("src", &src), (&src, &dst))?;
    for_each_token(runner, &dst, |at| {
        // SAFETY: the views are valid and fit each other.
        unsafe {
            let copy = token_copy(&src, (at.0, at.1 / 2), &dst, at);
            let step = src.strides[DIM] as isize;
            let start = copy.src.offset((at.1 % 2) as isize * step * src.dtype.size() as isize);
            kernel(&CopyArgs { src: start, src_dim: 2 * step, dim: dst.shape[DIM], ..copy });
        }
    })
}

/// Copies token `(row, token)` into its half of a pair of slots. `place` says where tokens of the row go: where a neighbour goes to
/// the other half, the one in the first half takes it along. `ahead` is what [`aheads`] says.
///
/// # Safety
/// The views are valid and fit each other, places lie in pairs of `packed`, and no two tokens go to the same.
pub(crate) unsafe fn pack_token<U: Units>(
    kernel: CopyFn,
    src: &RawView,
    (row, token): Place,
    packed: &RawView<U>,
    (src_prefetch, dst_prefetch): (isize, isize),
    place: impl Fn(usize) -> Option<Place>,
) {
    let Some((target, slot)) = place(token) else { return };
    let together = src.strides[DIM] == 1 && packed.strides[DIM] == 1;
    let goes_to = |token: usize, slot| together && token < src.shape[SEQ] && place(token) == Some((target, slot));
    if slot % 2 == 1 && token > 0 && goes_to(token - 1, slot - 1) {
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        let copy = CopyArgs { src_prefetch, dst_prefetch, ..token_copy(src, (row, token), packed, (target, slot / 2)) };
        if slot % 2 == 0 && goes_to(token + 1, slot + 1) {
            kernel(&CopyArgs { second: src.row(row, token + 1, 0), ..copy });
        } else {
            kernel(&into_pair(copy, packed, slot));
        }
    }
}

/// The copy of a token into its half of a pair of slots: `copy` goes to the pair's beginning in `packed`.
///
/// # Safety
/// The pair lies in the view, which is validated.
pub(crate) unsafe fn into_pair<U: Units>(copy: CopyArgs, packed: &RawView<U>, slot: usize) -> CopyArgs {
    let step = packed.strides[DIM] as isize;
    // SAFETY: the caller's; the second element of the pair is in the view as the first is.
    let dst = unsafe { copy.dst.offset((slot % 2) as isize * step * packed.dtype.size() as isize) };
    CopyArgs { dst, dst_dim: 2 * step, ..copy }
}

/// Fails unless `packed` is what packing makes of `plain`; gives the kernel that copies.
fn check(
    context: &Context,
    (name, plain): (&str, &RawView),
    (packed_name, packed): (&str, &RawView),
    (src, dst): (&RawView, &RawView),
) -> Result<CopyFn> {
    src.validate("src")?;
    dst.validate_output("dst")?;
    ensure!(src.dtype == dst.dtype, DType, "src is {}, but dst is {}", src.dtype, dst.dtype);
    for axis in [BATCH, HEADS] {
        src.same_axis("src", dst, "dst", axis)?;
    }
    let (tokens, pairs) = (plain.shape[SEQ], packed.shape[SEQ]);
    ensure!(
        pairs == tokens.div_ceil(2),
        Shape,
        "{packed_name} has seq = {pairs}, but the {tokens} tokens of {name} make {} pairs",
        tokens.div_ceil(2)
    );
    check_pair_dim((name, plain), (packed_name, packed))?;
    ensure!(!src.overlaps(dst), Overlap, "src and dst share memory");
    Ok(context.copy(Op::KvWrite, src.dtype, dst.dtype))
}

/// Fails unless a pair of slots has room for two heads.
fn check_pair_dim<U: Units>((name, plain): (&str, &RawView), (packed_name, packed): (&str, &RawView<U>)) -> Result<()> {
    let (dim, both) = (plain.shape[DIM], packed.shape[DIM]);
    ensure!(both == 2 * dim, Shape, "{packed_name} has dim = {both}, but pairs of {name} have {}", 2 * dim);
    Ok(())
}

/// Fails unless new or read values `v` and their cache have the axes that the keys `k`, their cache and the packing require.
pub(crate) fn check_values(
    layout: Layout,
    packing: Packing,
    (k, k_cache): (&RawView, &RawCacheView),
    (v, v_cache): (&RawView, &RawCacheView),
) -> Result<()> {
    for axis in [BATCH, SEQ, HEADS] {
        k.same_axis("k", v, "v", axis)?;
    }
    k_cache.same_axis("k_cache", v_cache, "v_cache", BATCH)?;
    match packing {
        Packing::Rows => {
            v.same_axis("v", v_cache, "v_cache", DIM)?;
            k_cache.same_axis("k_cache", v_cache, "v_cache", SEQ)?;
        }
        Packing::RowPairs => {
            let format = v_cache.dtype;
            ensure!(
                format.dtype().is_some(),
                Unsupported,
                "v_cache is {format}, whose values are never packed in pairs"
            );
            check_pair_dim(("v", v), ("v_cache", &v_cache.units))?;
            layout.validate_packing("k_cache", &k_cache.units, packing)?;
            let (slots, pairs) = (k_cache.shape[SEQ], v_cache.shape[SEQ]);
            ensure!(
                pairs == slots / 2,
                Shape,
                "v_cache has seq = {pairs}, but the {slots} slots of k_cache make {} pairs",
                slots / 2
            );
        }
    }
    Ok(())
}
