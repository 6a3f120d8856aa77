//! The Hadamard rotation of heads, alone; [`kv_write`](crate::kv_write) and [`attention`](crate::attention()) apply it on the way.

use crate::context::Context;
use crate::error::{Result, ensure};
use crate::kernels::api::HadamardArgs;
use crate::ops::{TokenCopies, check_in_place_or_apart, for_each_token};
use crate::parallel::Runner;
use crate::problem::limits::MAX_HADAMARD_BLOCK;
use crate::view::{DIM, RawView, View, ViewMut};

/// The block of the Hadamard rotation of a head of `dim` elements: the largest power of two that divides `dim`, at most
/// [`MAX_HADAMARD_BLOCK`]. An odd `dim` has none.
///
/// ```
/// use kvlane::hadamard_block;
/// assert_eq!([64, 80, 96, 192, 256, 1024].map(hadamard_block), [64, 16, 32, 64, 256, 512].map(Some));
/// assert_eq!(hadamard_block(75), None);
/// ```
pub fn hadamard_block(dim: usize) -> Option<usize> {
    let block = dim & dim.wrapping_neg();
    (block > 1).then_some(block.min(MAX_HADAMARD_BLOCK))
}

/// Rotates every head by a normalised Walsh-Hadamard matrix, block by block: `dst = H src`.
///
/// `src` and `dst` are `[batch, seq, heads, dim]`, of any strides and types. `block` is a power of two from 2 to
/// [`MAX_HADAMARD_BLOCK`] that divides `dim`; [`hadamard_block`] gives the largest. Element i of a block becomes the sum over j of
/// `x[j] * (-1)^popcount(i & j) / sqrt(block)`. The matrix is symmetric and orthogonal, so that a second call is the inverse of
/// the first, and scores of rotated queries and keys are those of the queries and keys.
///
/// Arithmetic is f32, rounded once to the type of `dst`, by the same bits at every ISA level. A NaN or an infinity reaches all of its
/// block.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// - [`Status::Shape`](crate::Status::Shape): shapes differ, or `block` does not divide `dim`.
/// - [`Status::InvalidValue`](crate::Status::InvalidValue): `block` is no power of two in the range.
/// - [`Status::Overlap`](crate::Status::Overlap): the views share memory.
///
/// On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let x = [1.0f32, 0.0, 0.0, 0.0];
/// let mut y = [0.0f32; 4];
/// hadamard(&Context::new()?, &Serial, View::new(&x, [1, 1, 1, 4])?, ViewMut::new(&mut y, [1, 1, 1, 4])?, 4)?;
/// assert_eq!(y, [0.5; 4]);
/// hadamard_in_place(&Context::new()?, &Serial, ViewMut::new(&mut y, [1, 1, 1, 4])?, 4)?;
/// assert_eq!(y, x);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn hadamard(context: &Context, runner: &dyn Runner, src: View, dst: ViewMut, block: usize) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { hadamard_raw(context, runner, src.raw, dst.raw, block) }
}

/// Rotates every head in place; see [`hadamard`].
///
/// # Errors
/// As [`hadamard`].
pub fn hadamard_in_place(context: &Context, runner: &dyn Runner, x: ViewMut, block: usize) -> Result<()> {
    // SAFETY: the view borrows what it reaches, exclusively.
    unsafe { hadamard_raw(context, runner, x.raw, x.raw, block) }
}

/// # Safety
/// The memory that valid views reach is readable and, for `dst`, writable, by this call alone.
pub(crate) unsafe fn hadamard_raw(
    context: &Context,
    runner: &dyn Runner,
    src: RawView,
    dst: RawView,
    block: usize,
) -> Result<()> {
    check_in_place_or_apart(&src, &dst)?;
    check_block("block", Some(block), ("src", src.shape[DIM]))?;
    let kernel = context.hadamard(src.dtype, dst.dtype);
    let copies = TokenCopies::new(&src, &dst);
    for_each_token(runner, &src, |at| {
        // SAFETY: the views are valid and equal in shape, and blocks divide their heads.
        unsafe { kernel(&HadamardArgs { copy: copies.at(at), block }) };
    })
}

/// Fails unless a block is a power of two in the range and divides the heads of a tensor of that name.
pub(crate) fn check_block(name: &str, block: Option<usize>, (tensor, dim): (&str, usize)) -> Result<()> {
    let Some(block) = block else { return Ok(()) };
    ensure!(
        (2..=MAX_HADAMARD_BLOCK).contains(&block) && block.is_power_of_two(),
        InvalidValue,
        "{name} is {block}, which is no power of two from 2 to {MAX_HADAMARD_BLOCK}"
    );
    ensure!(dim.is_multiple_of(block), Shape, "{name} is {block}, which does not divide the dim = {dim} of {tensor}");
    Ok(())
}
