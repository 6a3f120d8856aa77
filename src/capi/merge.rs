//! The merge of attention states.

use super::arguments::{read, required_list};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::sized::assert_layout;
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::ensure;
use crate::ops::merge::{MAX_STATES, merge_states_raw};

/// The state of attention over some keys: an output, and the natural logarithm of the sum of its exponentials.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_attention_state {
    /// [batch, seq, heads, dim].
    pub out: kvl_const_view,
    /// [batch, seq, heads], contiguous.
    pub lse: *const f32,
}

assert_layout!(kvl_attention_state, 96, out: 0, lse: 88);

/// Merges states over disjoint sets of keys into the state over all of them: `out = sum_i w_i out_i` with `w_i =
/// exp(lse_i - lse)` and `lse = ln sum_i exp(lse_i)`. `lse`, [batch, seq, heads] and contiguous, may be null. All
/// outputs have one type. The sums are taken in the order of the states. A state with an LSE of -inf is empty, and its
/// output is not read. Empty states alone merge to output 0 and LSE -inf.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: null, no state or more than 256, shapes or types that differ, and an output that shares memory with an
/// input are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_merge_states(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    states: *const kvl_attention_state,
    num_states: usize,
    out: *const kvl_view,
    lse: *mut f32,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let out = unsafe { read("out", out) }?.raw("out")?;
        ensure!(num_states <= MAX_STATES, InvalidValue, "{num_states} states, but a call merges 1 to {MAX_STATES}");
        // SAFETY: as above.
        let states = unsafe { required_list("states", states, num_states) }?;
        // Converted one by one where they are checked: two copies of all views would need too much of the caller's stack.
        let state = |i: usize| {
            let kvl_attention_state { out, lse } = &states[i];
            ensure!(!lse.is_null(), NullPointer, "states[{i}].lse is null");
            Ok((out.raw("the output of a state")?, *lse))
        };
        // SAFETY: as above.
        unsafe { merge_states_raw(context, runner.as_dyn(), num_states, &state, out, lse) }
    })
}
