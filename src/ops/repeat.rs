//! The explicit repeat of KV heads. Attention does not need it: it reads each KV head once for its whole group.

use crate::context::Context;
use crate::error::{Result, ensure};
use crate::kernels::api::{CopyArgs, Op};
use crate::ops::{TokenCopies, for_each_token};
use crate::parallel::Runner;
use crate::view::{BATCH, DIM, HEADS, RawView, SEQ, View, ViewMut};

/// Repeats every KV head `n` times: `[batch, seq, kv_heads, dim]` becomes `[batch, seq, kv_heads * n, dim]`.
///
/// `n` is the ratio of the head counts. Both views have one type; NaNs keep their bits.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// [`Status::Shape`](crate::Status::Shape), [`Status::DType`](crate::Status::DType): a head count is no multiple of the other,
/// or other axes or types differ. [`Status::Overlap`](crate::Status::Overlap): the views share memory. On an error, nothing has
/// been written.
///
/// ```
/// use kvlane::*;
/// let x = [1.0f32, 2.0];
/// let mut y = [0.0f32; 6];
/// repeat_kv(&Context::new()?, &Serial, View::new(&x, [1, 1, 2, 1])?, ViewMut::new(&mut y, [1, 1, 6, 1])?)?;
/// assert_eq!(y, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn repeat_kv(context: &Context, runner: &dyn Runner, src: View, dst: ViewMut) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { repeat_kv_raw(context, runner, src.raw, dst.raw) }
}

/// # Safety
/// The memory that valid views reach is readable and, for `dst`, writable, by this call alone.
pub(crate) unsafe fn repeat_kv_raw(context: &Context, runner: &dyn Runner, src: RawView, dst: RawView) -> Result<()> {
    src.validate("src")?;
    dst.validate_output("dst")?;
    for axis in [BATCH, SEQ, DIM] {
        src.same_axis("src", &dst, "dst", axis)?;
    }
    ensure!(src.dtype == dst.dtype, DType, "src is {}, but dst is {}", src.dtype, dst.dtype);
    let (kv_heads, heads) = (src.shape[HEADS], dst.shape[HEADS]);
    ensure!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads) || heads == 0 && kv_heads == 0,
        Shape,
        "dst has {heads} heads, which is no multiple of the {kv_heads} of src"
    );
    ensure!(!src.overlaps(&dst), Overlap, "src and dst share memory");
    let kernel = context.copy(Op::RepeatKv, src.dtype, dst.dtype);
    let copies = TokenCopies::new(&src, &dst);
    for_each_token(runner, &dst, |at| {
        // SAFETY: the views are valid and fit each other.
        unsafe { kernel(&CopyArgs { repeats: heads / kv_heads, ..copies.at(at) }) };
    })
}
