//! Scores to logits: scale, softcap, ALiBi and bias, in the order that [`masks`](crate::masks) defines.
//!
//! Where a positive scale is all that lies between the two ([`Problem::plain_factor`]), it is one factor in the
//! exponential, and nothing here runs.

use super::RowState;
use super::state::load_row;
use crate::kernels::generic::math;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, KeyRange};
use std::f32::consts::LOG2_E;

/// The logits, times log2(e), of a vector of scores; `alibi` is the slopes and the distances from the queries to the keys.
#[inline(always)]
fn logits<S: Simd>(s: S, p: &Problem, scores: S::V, alibi: Option<(S::V, S::V)>, bias: Option<S::V>) -> S::V {
    let mut x = s.mul(scores, s.splat(p.scale));
    if p.softcap != 0.0 {
        x = s.mul(math::tanh(s, s.mul(x, s.splat(1.0 / p.softcap))), s.splat(p.softcap));
    }
    if let Some((slope, distance)) = alibi {
        x = s.fma(slope, distance, x);
    }
    if let Some(bias) = bias {
        x = s.add(x, bias);
    }
    s.mul(x, s.splat(LOG2_E))
}

/// Bit i is set where the bias in lane i is -inf, which masks a key.
#[inline(always)]
fn masked_by_bias<S: Simd>(s: S, bias: S::V) -> u64 {
    s.lt_bits(bias, s.splat(f32::MIN))
}

/// Replaces one row's scores in the block at `base` by its logits times log2(e), and removes the keys that the bias masks from
/// `row.visible_bits`. Vectors outside of `keys` stay as they are.
///
/// # Safety
/// `x` has the row's [`BLOCK`] scores; the keys of the key range are inside the bias.
#[inline(always)]
pub(crate) unsafe fn row_logits<S: Simd>(
    s: S,
    (p, batch): (&Problem, usize),
    (base, key_range): (usize, KeyRange),
    keys: KeyRange,
    row: &mut RowState,
    x: *mut f32,
) {
    let mut bias_row = [0.0f32; BLOCK];
    if let Some(bias) = &p.bias {
        // SAFETY: the caller's.
        unsafe {
            let at = bias.row(batch, row.token as usize, row.head as usize);
            let first = (base + key_range.low) as isize * bias.strides[3] as isize * bias.dtype.size() as isize;
            let to = bias_row.as_mut_ptr().add(key_range.low);
            load_row(s, bias.dtype, at.offset(first), bias.strides[3], to, key_range.len());
        }
    }
    let own_keys = p.alibi.and_then(|_| p.visibility.own_keys(batch));
    for i in (keys.low / S::LANES * S::LANES..keys.high).step_by(S::LANES) {
        // SAFETY: i + LANES <= BLOCK.
        unsafe {
            let mut alibi = None;
            if let Some(slopes) = p.alibi {
                let distance = match own_keys {
                    None => {
                        let distance = (base + i) as i64 - row.position;
                        s.add(s.load_f32(IOTA.as_ptr()), s.splat(distance as f32))
                    }
                    Some(own_keys) => {
                        let key = |lane: usize| own_keys.position((base + i + lane) as i64);
                        let distances: [f32; MAX_LANES] = std::array::from_fn(|lane| (key(lane) - row.position) as f32);
                        s.load_f32(distances.as_ptr())
                    }
                };
                alibi = Some((s.splat(slopes[row.head as usize]), distance));
            }
            let mut bias = None;
            if p.bias.is_some() {
                let x = s.load_f32(bias_row.as_ptr().add(i));
                row.visible_bits &= !(masked_by_bias(s, x) << i);
                bias = Some(x);
            }
            s.store_f32(x.add(i), logits(s, p, s.load_f32(x.add(i)), alibi, bias));
        }
    }
}

/// 0, 1, 2, ...: the distances of the lanes.
static IOTA: [f32; MAX_LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
