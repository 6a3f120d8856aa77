//! Repairs for kernels whose matrix products cannot take NaN and infinity: single products of the elements in question.
//!
//! Such a kernel splits a query into bf16 terms, where an infinity times a term of 0 is NaN instead of an infinity, and
//! multiplies masked keys by weights of 0, which turns NaN and infinity in their values into NaN.

use half::bf16;

/// The set bits of a block's visible bits.
fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(bit)
    })
}

/// Recomputes a query row's scores with the keys `visible_bits`, where they are NaN, as sums of products in ascending
/// order.
///
/// # Safety
/// `score` gives the address of the score with a key, `key` the address of the key; a key has as many elements as `q`,
/// `step` apart.
#[cold]
pub(crate) unsafe fn recompute_nan_scores(
    visible_bits: u64,
    q: &[f32],
    step: isize,
    key: impl Fn(usize) -> *const bf16,
    score: impl Fn(usize) -> *mut f32,
) {
    for j in ones(visible_bits) {
        // SAFETY: the caller's.
        unsafe {
            let score = &mut *score(j);
            if score.is_nan() {
                let key = key(j);
                let element = |i: usize| (*key.wrapping_offset(i as isize * step)).to_f32();
                let sum: f32 = q.iter().enumerate().map(|(i, q)| q * element(i)).sum();
                *score = sum;
            }
        }
    }
}

/// Adds the weighted elements that are not finite, of the values of the keys `visible_bits`, to a query row's
/// accumulator.
///
/// # Safety
/// `value` gives the address of a key's value, which has `dv` elements, `step` apart; `acc` gives the address of an
/// element of the accumulator.
#[cold]
pub(crate) unsafe fn add_non_finite(
    visible_bits: u64,
    (dv, step): (usize, isize),
    weight: impl Fn(usize) -> f32,
    value: impl Fn(usize) -> *const bf16,
    acc: impl Fn(usize) -> *mut f32,
) {
    for j in ones(visible_bits) {
        let (weight, value) = (weight(j), value(j));
        for i in 0..dv {
            // SAFETY: the caller's.
            unsafe {
                let element = *value.wrapping_offset(i as isize * step);
                if !element.is_finite() {
                    *acc(i) += weight * element.to_f32();
                }
            }
        }
    }
}
