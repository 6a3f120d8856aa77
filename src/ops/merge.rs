//! Merging attention states: outputs over disjoint keys become the output over all of them.

use crate::context::Context;
use crate::error::{Result, ensure};
use crate::kernels::api::MergeArgs;
use crate::ops::{COPY_GRAIN, TOKENS_PER_TILE, ahead, is_large};
use crate::parallel::{Runner, for_each_tile, workers_for};
use crate::view::{self, BATCH, DIM, HEADS, RawView, SEQ, View, ViewMut};
use std::mem::MaybeUninit;

/// The most states that one call merges.
pub const MAX_STATES: usize = 256;

/// An attention state: an output, and the natural logarithm of the sum of its exponentials (LSE).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AttentionState<'a> {
    /// The output, `[batch, seq, heads, dim]`, of any strides.
    pub out: View<'a>,
    /// The LSE, `[batch, seq, heads]`, contiguous.
    pub lse: &'a [f32],
}

impl<'a> AttentionState<'a> {
    /// An output and its LSE.
    pub fn new(out: View<'a>, lse: &'a [f32]) -> Self {
        Self { out, lse }
    }
}

/// Merges attention states over disjoint keys: `out = sum_i w_i out_i` with `w_i = exp(lse_i - lse)` and `lse = ln sum_i
/// exp(lse_i)`.
///
/// `out` has the shape and type of the states' outputs, `lse` is `[batch, seq, heads]` and contiguous. Weights and sums are
/// f32, in the order of the states. A state whose LSE is -inf is empty, and its output is not read. If all states are empty,
/// the output is 0 and the LSE is -inf.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// - [`Status::InvalidValue`](crate::Status::InvalidValue): there is no state, or more than [`MAX_STATES`].
/// - [`Status::Shape`](crate::Status::Shape), [`Status::DType`](crate::Status::DType): shapes or types differ.
/// - [`Status::Overlap`](crate::Status::Overlap): an output shares memory with an input.
///
/// On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let (a, b, lse_b) = ([1.0f32], [4.0f32], [2f32.ln()]);
/// let mut out = [0.0f32];
/// let mut lse = [0.0f32];
/// let states = [
///     AttentionState::new(View::new(&a, [1, 1, 1, 1])?, &[0.0]),
///     AttentionState::new(View::new(&b, [1, 1, 1, 1])?, &lse_b),
/// ];
/// merge_states(&Context::new()?, &Serial, &states, ViewMut::new(&mut out, [1, 1, 1, 1])?, Some(&mut lse))?;
/// assert!((out[0] - 3.0).abs() < 1e-6 && (lse[0] - 3f32.ln()).abs() < 1e-6);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn merge_states(
    context: &Context,
    runner: &dyn Runner,
    states: &[AttentionState],
    out: ViewMut,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    ensure!(states.len() <= MAX_STATES, InvalidValue, "{} states, but a call merges {MAX_STATES}", states.len());
    let rows = view::rows(out.shape());
    for (i, state) in states.iter().enumerate() {
        let n = state.lse.len();
        ensure!(n == rows, Shape, "the LSE of state {i} has {n} entries, but out has {rows} rows");
    }
    if let Some(lse) = &lse {
        ensure!(lse.len() == rows, Shape, "lse has {} entries, but out has {rows} rows", lse.len());
    }
    let lse = lse.map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr);
    let state = |i: usize| Ok((states[i].out.raw, states[i].lse.as_ptr()));
    // SAFETY: the views borrow what they reach, and every LSE has an entry per row.
    unsafe { merge_states_raw(context, runner, states.len(), &state, out.raw, lse) }
}

/// # Safety
/// The memory that valid views reach is readable and, for `out`, writable, by this call alone; each LSE, and `lse` if not
/// null, holds a float per row.
pub(crate) unsafe fn merge_states_raw(
    context: &Context,
    runner: &dyn Runner,
    states: usize,
    state: &dyn Fn(usize) -> Result<(RawView, *const f32)>,
    out: RawView,
    lse: *mut f32,
) -> Result<()> {
    ensure!((1..=MAX_STATES).contains(&states), InvalidValue, "{states} states, but a call merges 1 to {MAX_STATES}");
    out.validate_output("out")?;
    let rows = view::rows(out.shape);
    ensure!(rows < usize::MAX, Shape, "out has shape {:?}, which is more rows than memory", out.shape);
    let lse_view = |data: *const f32| RawView::floats(data.cast_mut(), rows);
    // Filled as far as there are states: to fill all of it takes as long as the merge of a few rows.
    let mut inputs = [const { MaybeUninit::<(RawView, Pointer)>::uninit() }; MAX_STATES];
    for (i, input) in inputs.iter_mut().enumerate().take(states) {
        let (view, state_lse) = state(i)?;
        let name = "the output of a state";
        view.validate(name)?;
        for axis in [BATCH, SEQ, HEADS, DIM] {
            view.same_axis(name, &out, "out", axis)?;
        }
        ensure!(view.dtype == out.dtype, DType, "{name} is {}, but out is {}", view.dtype, out.dtype);
        let lse_in = lse_view(state_lse);
        lse_in.validate("the LSE of a state")?;
        ensure!(!view.overlaps(&out) && !lse_in.overlaps(&out), Overlap, "state {i} and out share memory");
        if !lse.is_null() {
            let shared = lse_view(lse).overlaps(&view) || lse_view(lse).overlaps(&lse_in);
            ensure!(!shared, Overlap, "state {i} and lse share memory");
        }
        input.write((view, Pointer(state_lse)));
    }
    if !lse.is_null() {
        lse_view(lse).validate("lse")?;
        ensure!(!lse_view(lse).overlaps(&out), Overlap, "out and lse share memory");
    }
    if rows == 0 {
        return Ok(());
    }
    // SAFETY: the loop has written the first `states` of them.
    let inputs = unsafe { inputs[..states].assume_init_ref() };
    let [_, seq, heads, dim] = out.shape;
    let kernel = context.merge(out.dtype);
    let lse = MutPointer(lse);
    // Equal strides have equal prefetch distances.
    let alike = inputs.iter().all(|(view, _)| view.strides == out.strides);
    let ahead = if alike && is_large(&[&out]) { ahead(&out) } else { 0 };
    let tiles = rows.div_ceil(TOKENS_PER_TILE);
    let workers = workers_for(runner, rows * dim * states, COPY_GRAIN);
    for_each_tile(runner, workers, tiles, &|_, tile| {
        let mut weights = [0.0f32; MAX_STATES];
        let mut srcs = [std::ptr::null::<u8>(); MAX_STATES];
        for row in tile * TOKENS_PER_TILE..((tile + 1) * TOKENS_PER_TILE).min(rows) {
            let (b, t, h) = (row / (seq * heads), row / heads % seq, row % heads);
            // SAFETY: every LSE has an entry per row, and the views are valid and equal in shape.
            unsafe {
                let (max, sum) = weigh(inputs, row, &mut weights);
                if !lse.get().is_null() {
                    *lse.get().add(row) = if max == f32::NEG_INFINITY { max } else { (max as f64 + sum.ln()) as f32 };
                }
                // Elements that are not neighbours are merged one by one: the same additions in the same order.
                let together = out.strides[DIM] == 1 && inputs.iter().all(|(view, _)| view.strides[DIM] == 1);
                let (pieces, width) = if together || dim <= 1 { (dim.min(1), dim) } else { (dim, 1) };
                for piece in 0..pieces {
                    let element = |view: &RawView| {
                        let step = piece as isize * view.strides[DIM] as isize * view.dtype.size() as isize;
                        view.row(b, t, h).offset(step)
                    };
                    for (src, (view, _)) in srcs.iter_mut().zip(inputs) {
                        *src = element(view);
                    }
                    kernel(&MergeArgs {
                        srcs: srcs.as_ptr(),
                        weights: weights.as_ptr(),
                        states,
                        dst: element(&out),
                        dim: width,
                        ahead,
                    });
                }
            }
        }
    })
}

/// The weights of the states in one row, and the joint LSE in two parts: the maximum, and a number whose logarithm is added to
/// it unless the maximum is -inf.
///
/// # Safety
/// Every LSE holds an entry for `row`.
unsafe fn weigh(inputs: &[(RawView, Pointer)], row: usize, weights: &mut [f32; MAX_STATES]) -> (f32, f64) {
    let mut max = f32::NEG_INFINITY;
    for (weight, (_, lse)) in weights.iter_mut().zip(inputs) {
        // SAFETY: the caller's.
        *weight = unsafe { *lse.0.add(row) };
        // A NaN must reach the output, so it may be the maximum.
        if *weight > max || weight.is_nan() {
            max = *weight;
        }
    }
    if max == f32::NEG_INFINITY {
        weights[..inputs.len()].fill(0.0);
        return (max, 0.0);
    }
    let mut sum = 0.0f64;
    for weight in &mut weights[..inputs.len()] {
        // One of two states is the largest, which saves every second exponential. Two infinities have no difference.
        let share = match *weight as f64 - max as f64 {
            0.0 => 1.0,
            f64::NEG_INFINITY => 0.0,
            difference => difference.exp(),
        };
        sum += share;
        *weight = share as f32;
    }
    for weight in &mut weights[..inputs.len()] {
        *weight = (*weight as f64 / sum) as f32;
    }
    (max, sum)
}

/// A pointer that tiles share and only read through.
#[derive(Clone, Copy)]
struct Pointer(*const f32);

/// A pointer that tiles share: each tile writes its own rows.
#[derive(Clone, Copy)]
struct MutPointer(*mut f32);

impl MutPointer {
    /// A method, so that closures capture the whole wrapper.
    fn get(self) -> *mut f32 {
        self.0
    }
}

// SAFETY: only read through.
unsafe impl Sync for Pointer {}
// SAFETY: rows are disjoint.
unsafe impl Sync for MutPointer {}
