//! Plans of attention, and what an attention call and a plan read alike.

use super::arguments::{list, required_list, size};
use super::attention::{
    KVL_ATTENTION_FLAG_CAUSAL, KVL_ATTENTION_FLAG_WINDOW_LEFT, KVL_ATTENTION_FLAG_WINDOW_RIGHT, check_flags,
    kvl_attention_params,
};
use super::guard::{guard, guard_value};
use super::layout::read_layout;
use super::masks::read_masks;
use super::sized::read_sized;
use super::status::kvl_status;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::ops::attention::{Planned, check_only_plan, rows_of};
use crate::ops::mask::RawMasks;
use crate::ops::plan::AttentionPlan;
use crate::problem::visibility::Visibility;
use crate::view::{BATCH, RawView, SEQ};

/// The part of an attention call that is the same for all layers of a step: lengths, positions, windows, masks and
/// tables, checked and worked out once. Made by `kvl_plan_create`.
pub struct kvl_plan {
    pub(super) plan: crate::AttentionPlan,
}

/// Makes a plan: copies and checks the `flags`, windows, `layout`, `cu_seqlens_q`, `num_sequences`, `lengths`,
/// `kv_starts`, `offsets`, `query_positions`, `prefix_lengths`, `mask` and `bit_mask` of `params`, the first two axes of `q` and `k` and,
/// with masks, the heads of `q`. Nothing else is read, and data of tensors may be null. `kvl_attention_params.plan`
/// then stands for all of these. The plan is released with `kvl_plan_destroy`.
///
/// Masks are read here and once. The plan has bits of its own, for the queries of every sequence and the keys up to its
/// length. It has bits per head only if the masks differ by head; if they broadcast, the plan serves any number of
/// heads. It has none if the masks hide nothing that is visible otherwise. Calls with a plan that was made without
/// masks may have their own.
///
/// A plan serves every layer whose caches have the same shape in their first two axes, any number of threads, and every
/// context. It holds no pointer of the caller's.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null, an unknown `struct_size`, and the errors of `kvl_attention` in these fields are errors, and `*plan`
/// is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_plan_create(params: *const kvl_attention_params, plan: *mut *mut kvl_plan) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let params = unsafe { read_sized(params) }?;
        ensure!(!plan.is_null(), NullPointer, "the pointer plan is null");
        // SAFETY: as above.
        let made = unsafe { with_visibility(&params, AttentionPlan::from_visibility) }?;
        // SAFETY: not null, and the caller's to write.
        unsafe { plan.write(Box::into_raw(Box::new(kvl_plan { plan: made }))) };
        Ok(())
    })
}

/// Makes a plan anew for `params`, as `kvl_plan_create` does, in the memory that it has. That memory grows only if
/// lists, tables or masks do.
///
/// Thread safety: no other call may use the plan at the same time.
/// Bad input: the errors of `kvl_plan_create`; the plan is not changed then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_plan_update(plan: *mut kvl_plan, params: *const kvl_attention_params) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (plan, params) = unsafe { (borrow_mut(plan)?, read_sized(params)?) };
        // SAFETY: as above.
        unsafe { with_visibility(&params, |q_shape, visibility, masks| plan.take(q_shape, visibility, masks)) }
    })
}

/// Takes a plan to the next step: sequence b has been given `counts[b]` more tokens, and as many queries follow as
/// before. Lengths grow, and offsets if they were given. The table must have the entries of the new tokens. Nothing is
/// allocated, and only what is new is checked.
///
/// Thread safety: no other call may use the plan at the same time.
/// Bad input: null, a list that has not one entry per sequence, a negative count, a sequence without room, table
/// entries outside the cache, queries that see what a ring has overwritten, and a plan that was made of masks
/// (`kvl_plan_update` takes the masks of new tokens) are errors, and the plan is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_plan_advance(plan: *mut kvl_plan, counts: *const i32, num_sequences: i64) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let plan = unsafe { borrow_mut(plan) }?;
        // SAFETY: as above.
        plan.advance(unsafe { required_list("counts", counts, size("num_sequences", num_sequences)?) }?)
    })
}

/// Sets `count` entries, from `first` on, of a sequence in the table of a plan with a paged or indirect layout: before
/// `kvl_plan_advance` needs them, or when a page has moved.
///
/// Thread safety: no other call may use the plan at the same time.
/// Bad input: null, a layout without a table, entries outside the sequence, and entries of existing tokens that lead
/// outside the cache are errors, and the plan is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_plan_set_table(
    plan: *mut kvl_plan,
    sequence: i64,
    first: i64,
    entries: *const i32,
    count: i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let plan = unsafe { borrow_mut(plan) }?;
        // SAFETY: as above.
        let entries = unsafe { required_list("entries", entries, size("count", count)?) }?;
        plan.set_table(size("sequence", sequence)?, size("first", first)?, entries)
    })
}

/// Releases a plan; null is allowed.
///
/// Thread safety: no other call may use the plan at the same time or afterwards.
/// Bad input: a pointer that is not from `kvl_plan_create`, or that was released before, is undefined behaviour.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_plan_destroy(plan: *mut kvl_plan) {
    guard_value((), || {
        if !plan.is_null() {
            // SAFETY: from `kvl_plan_create`, by the caller's promise, and not released before.
            drop(unsafe { Box::from_raw(plan) });
        }
    });
}

/// # Safety
/// `plan` is null or from `kvl_plan_create`, and nobody else uses it as long as the borrow lives.
unsafe fn borrow_mut<'a>(plan: *mut kvl_plan) -> Result<&'a mut AttentionPlan> {
    ensure!(!plan.is_null(), NullPointer, "the pointer plan is null");
    // SAFETY: the caller's.
    Ok(unsafe { &mut (*plan).plan })
}

/// Calls `f` with the shape of the queries, what the parameters say of sequences, and their masks.
///
/// # Safety
/// `params` is what the header describes.
unsafe fn with_visibility<T>(
    params: &kvl_attention_params,
    f: impl FnOnce([usize; 4], &Visibility, &RawMasks) -> Result<T>,
) -> Result<T> {
    ensure!(params.plan.is_null(), InvalidValue, "a plan is to be made of parameters that have a plan");
    let (q, k) = (params.q.raw("q")?, params.k.units("k")?);
    // SAFETY: the caller's, here and below.
    let visibility = unsafe { own_visibility(params, &q, k) }?;
    // SAFETY: as above.
    f(q.shape, &visibility, &unsafe { read_masks(params, visibility.batch) }?)
}

/// What the parameters of an attention call say of its sequences, by themselves or through a plan.
///
/// # Safety
/// `params` is what the header describes, and its lists and its plan live as long as the result is used.
#[inline(always)]
pub(super) unsafe fn visibility<'a>(
    params: &kvl_attention_params,
    q: &RawView,
    k: RawView<CacheFormat>,
) -> Result<(Visibility<'a>, Option<Planned<'a>>)> {
    if params.plan.is_null() {
        // SAFETY: the caller's.
        return Ok((unsafe { own_visibility(params, q, k) }?, None));
    }
    let given = [
        ("flags", params.flags != 0),
        ("window_left", params.window_left != 0),
        ("window_right", params.window_right != 0),
        ("layout", !params.layout.is_null()),
        ("cu_seqlens_q", !params.cu_seqlens_q.is_null()),
        ("num_sequences", params.num_sequences != 0),
        ("lengths", !params.lengths.is_null()),
        ("kv_starts", !params.kv_starts.is_null()),
        ("offsets", !params.offsets.is_null()),
        ("query_positions", !params.query_positions.is_null()),
        ("prefix_lengths", !params.prefix_lengths.is_null()),
    ];
    check_only_plan(given)?;
    // SAFETY: the caller's: from `kvl_plan_create`, and nobody changes it meanwhile.
    let plan: &'a AttentionPlan = unsafe { &(*params.plan).plan };
    plan.check(q, k.shape)?;
    Ok((plan.visibility(), Some(plan.planned())))
}

/// # Safety
/// `params` is what the header describes.
#[inline(always)]
unsafe fn own_visibility<'a>(
    params: &kvl_attention_params,
    q: &RawView,
    k: RawView<CacheFormat>,
) -> Result<Visibility<'a>> {
    check_flags(params.flags)?;
    // SAFETY: the caller's, here and below.
    let cu_seqlens_q = unsafe { read_cu_seqlens_q(params) }?;
    let batch = cu_seqlens_q.map_or(q.shape[BATCH], |starts| starts.len() - 1);
    let (_, seq) = rows_of(q.shape, cu_seqlens_q);
    // SAFETY: as above.
    unsafe {
        Ok(Visibility {
            batch,
            seq,
            cache: k,
            layout: read_layout(params.layout, k.shape[SEQ])?,
            cu_seqlens_q,
            causal: params.flags & KVL_ATTENTION_FLAG_CAUSAL != 0,
            window_left: window("window_left", params.window_left, params.flags & KVL_ATTENTION_FLAG_WINDOW_LEFT != 0)?,
            window_right: window(
                "window_right",
                params.window_right,
                params.flags & KVL_ATTENTION_FLAG_WINDOW_RIGHT != 0,
            )?,
            lengths: list("lengths", params.lengths, batch)?,
            kv_starts: list("kv_starts", params.kv_starts, batch)?,
            offsets: list("offsets", params.offsets, batch)?,
            query_positions: list(
                "query_positions",
                params.query_positions,
                q.shape[BATCH].saturating_mul(q.shape[SEQ]),
            )?,
            prefix_lengths: list("prefix_lengths", params.prefix_lengths, batch)?,
        })
    }
}

/// Slots and sequences for which `kvl_attention_workspace_size` is to answer: batch and seq of the queries, and the layout.
///
/// # Safety
/// As [`visibility`]; K has `slots` slots.
pub(super) unsafe fn workspace_visibility<'a>(
    params: &kvl_attention_params,
    q_shape: [usize; 4],
    slots: usize,
) -> Result<((usize, usize), crate::layout::Layout<'a>)> {
    if params.plan.is_null() {
        // SAFETY: the caller's.
        return unsafe { Ok((rows_of(q_shape, read_cu_seqlens_q(params)?), read_layout(params.layout, slots)?)) };
    }
    // SAFETY: as in `visibility`.
    let visibility = unsafe { &(*params.plan).plan }.visibility();
    Ok(((visibility.batch, visibility.seq), visibility.layout))
}

/// Whether queries are ragged, by the parameters themselves or through a plan.
///
/// # Safety
/// As [`visibility`].
pub(super) unsafe fn is_ragged(params: &kvl_attention_params) -> bool {
    if params.plan.is_null() {
        return !params.cu_seqlens_q.is_null();
    }
    // SAFETY: as in `visibility`.
    unsafe { &(*params.plan).plan }.visibility().cu_seqlens_q.is_some()
}

/// # Safety
/// `params` is what the header describes.
unsafe fn read_cu_seqlens_q<'a>(params: &kvl_attention_params) -> Result<Option<&'a [i32]>> {
    let sequences = size("num_sequences", params.num_sequences)?;
    ensure!(
        !params.cu_seqlens_q.is_null() || sequences == 0,
        InvalidValue,
        "num_sequences is {sequences}, but there are no cu_seqlens_q"
    );
    // SAFETY: the caller's.
    unsafe { list("cu_seqlens_q", params.cu_seqlens_q, sequences.saturating_add(1)) }
}

/// A window is given by its flag: without it, the number of keys must be 0.
#[inline(always)]
pub(super) fn window(name: &str, keys: i64, given: bool) -> Result<Option<i64>> {
    ensure!(given || keys == 0, InvalidValue, "{name} is {keys}, but its flag is not set");
    ensure!(
        (0..=i64::from(u32::MAX)).contains(&keys),
        InvalidValue,
        "{name} is {keys}, which is not between 0 and {}",
        u32::MAX
    );
    Ok(given.then_some(keys))
}
