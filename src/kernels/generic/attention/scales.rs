//! Scales of a quantised cache: per token and head, or static, whose strides along tokens are 0.
//!
//! The scale of a key multiplies its score, before the scale of attention and the softcap. The scale of a value
//! multiplies its weight, after the sum of weights was taken. So neither is in an inner loop: a block takes one pass
//! over its scores and one over its weights. The direct and the packed path share both passes, so that their bits
//! agree.

use super::Block;
use crate::dtype::DType;
use crate::kernels::simd::{Load, Outlined, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use crate::view::RawView;
use half::f16;
use std::ops::Range;

/// Multiplies the scores of a block and some of the tile's KV heads by the scales of its keys, if it has any.
///
/// # Safety
/// The block's visible keys are inside the cache; their scores are in `scratch.s`.
#[inline(always)]
pub(super) unsafe fn scale_scores<S: Simd>(s: S, block: &Block, heads: Range<usize>) {
    if let Some(scales) = &block.p.k.scales {
        // SAFETY: the caller's.
        unsafe { scale(s, block, heads, scales) };
    }
}

/// Multiplies the weights of a block and some of the tile's KV heads by the scales of its values, if it has any.
/// Returns whether the scales are finite; if not, the weight of a masked key may have become NaN.
///
/// # Safety
/// As [`scale_scores`], with weights instead of scores.
#[inline(always)]
pub(super) unsafe fn scale_weights<S: Simd>(s: S, block: &Block, heads: Range<usize>) -> bool {
    match &block.p.v.scales {
        None => true,
        // SAFETY: the caller's.
        Some(scales) => unsafe { scale(s, block, heads, scales) },
    }
}

/// # Safety
/// As [`scale_scores`].
#[inline(never)]
unsafe fn scale<S: Simd>(s: S, block: &Block, heads: Range<usize>, scales: &RawView) -> bool {
    let Block { tile, scratch, key_range, .. } = *block;
    let mut finite = true;
    if const { S::FEW_REGISTERS } && key_range.len() == 1 {
        let (row, slot) = block.p.visibility.place(tile.batch, block.base + key_range.low).0;
        for head in heads {
            // SAFETY: the caller's: some row sees the only key of the range; the tile has the head and its rows.
            unsafe {
                let at = scales.row(row, slot, tile.kv_head + head);
                let factor = match scales.dtype {
                    DType::F32 => *at.cast::<f32>(),
                    DType::F16 => (*at.cast::<f16>()).to_f32(),
                    DType::Bf16 => f32::NAN,
                };
                finite &= factor.is_finite();
                for r in head * tile.head_rows..(head + 1) * tile.head_rows {
                    *scratch.s.add(r * BLOCK + key_range.low) *= factor;
                }
            }
        }
        return finite;
    }
    for head in heads {
        // SAFETY: the caller's; the tile has the head and its rows.
        unsafe {
            let (x, rows) = (scratch.s.add(head * tile.head_rows * BLOCK), tile.head_rows);
            match scales.dtype {
                DType::F32 => {
                    let factors = &gathered::<f32>(block, scales, head);
                    s.outline(Scale { x, rows, key_range, factors, finite: &mut finite });
                }
                DType::F16 => {
                    let factors = &gathered::<f16>(block, scales, head);
                    s.outline(Scale { x, rows, key_range, factors, finite: &mut finite });
                }
                // The check of a call rejects bf16 scales.
                DType::Bf16 => {
                    let factors = &[f32::NAN; BLOCK];
                    s.outline(Scale { x, rows, key_range, factors, finite: &mut finite });
                }
            }
        }
    }
    finite
}

/// Rows of floats, [`Self::width`] apart, of which columns from `low` up to `high` count.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub x: *mut f32,
    pub rows: usize,
    pub width: usize,
    pub low: usize,
    pub high: usize,
}

/// Multiplies rows by a power of two above 1 and at most 2^8, unless a number is so large that the product could overflow, or not finite.
/// Returns whether it did; otherwise nothing is changed. Columns of whole vectors may be multiplied.
///
/// # Safety
/// The rows are readable and writable.
#[inline(always)]
pub(super) unsafe fn multiply<S: Simd>(s: S, rows: Rows, factor: f32) -> bool {
    let mut small = true;
    // SAFETY: the caller's.
    unsafe { s.outline(Multiply { rows, factor, small: &mut small }) };
    small
}

/// See [`multiply`].
struct Multiply<'a> {
    rows: Rows,
    factor: f32,
    small: &'a mut bool,
}

impl Outlined for Multiply<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { rows: Rows { x, rows, width, low, high }, factor, small } = self;
        let vectors = (low / S::LANES * S::LANES..high).step_by(S::LANES);
        let (limit, factor) = (s.splat(f32::MAX / 256.0), s.splat(factor));
        let lanes = u64::MAX >> (64 - S::LANES);
        // SAFETY: the caller's.
        unsafe {
            for row in 0..rows {
                for i in vectors.clone() {
                    let inside = lanes << low.saturating_sub(i) & lanes >> (i + S::LANES).saturating_sub(high);
                    let large = !s.lt_bits(s.abs(s.load_f32(x.add(row * width + i))), limit);
                    if large & inside != 0 {
                        *small = false;
                        return;
                    }
                }
            }
            for row in 0..rows {
                for i in vectors.clone() {
                    let at = x.add(row * width + i);
                    s.store_f32(at, s.mul(s.load_f32(at), factor));
                }
            }
        }
    }
}

/// The scales of a block's visible keys for one KV head of the tile, 0 for other keys.
///
/// # Safety
/// As [`scale_scores`]; the scales are of type `T`.
#[inline(always)]
unsafe fn gathered<T: Copy + Default>(block: &Block, scales: &RawView, head: usize) -> [T; BLOCK] {
    let Block { p, tile, base, key_range, visible_bits, .. } = *block;
    let mut factors = [T::default(); BLOCK];
    let mut j = key_range.low;
    while j < key_range.high {
        let visible = (visible_bits >> j).trailing_ones() as usize;
        if visible == 0 {
            j += 1;
            continue;
        }
        let ((row, slot), run) = p.visibility.place(tile.batch, base + j);
        let end = (j + run.min(visible)).min(key_range.high);
        let to = &mut factors[j..end];
        // SAFETY: the caller's: there is a scale wherever there is a key; keys that are not visible are not touched.
        unsafe {
            let first = scales.row(row, slot, tile.kv_head + head).cast::<T>();
            match scales.strides[1] as isize {
                0 => to.fill(*first),
                1 => std::ptr::copy_nonoverlapping(first, to.as_mut_ptr(), to.len()),
                step => (0..).zip(to).for_each(|(i, to)| *to = *first.offset(i * step)),
            }
        }
        j = end;
    }
    factors
}

/// Multiplies rows of a block, one float per key, by a factor per key. Vectors that extend beyond the key range may be
/// overwritten.
struct Scale<'a, T> {
    x: *mut f32,
    rows: usize,
    key_range: KeyRange,
    factors: &'a [T; BLOCK],
    /// Becomes false if a factor is not finite.
    finite: &'a mut bool,
}

impl<T: Load> Outlined for Scale<'_, T> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { x, rows, key_range, factors, finite } = self;
        for i in (key_range.low / S::LANES * S::LANES..key_range.high).step_by(S::LANES) {
            // SAFETY: a vector stays inside a block, and every row has one.
            unsafe {
                let factor = T::load(s, factors.as_ptr().add(i));
                *finite &= s.all_finite(factor);
                for row in 0..rows {
                    let at = x.add(row * BLOCK + i);
                    s.store_f32(at, s.mul(s.load_f32(at), factor));
                }
            }
        }
    }
}
