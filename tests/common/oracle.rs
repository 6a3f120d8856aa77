//! The definition of every operation, in plain f64 arithmetic.

use super::tensor::Array;
use kvlane::Pairing;

/// Masked softmax attention, as `AttentionOptions` describes it.
#[derive(Default)]
pub struct Attention<'a> {
    pub scale: Option<f64>,
    pub softcap: Option<f64>,
    pub causal: bool,
    pub window_left: Option<u32>,
    pub window_right: Option<u32>,
    pub lengths: Option<&'a [i32]>,
    pub kv_starts: Option<&'a [i32]>,
    pub offsets: Option<&'a [i32]>,
    /// `[batch, token]`: positions of the queries and of the keys that they are.
    pub query_positions: Option<&'a [i32]>,
    pub prefix_lengths: Option<&'a [i32]>,
    /// Whether query `[batch, token, head]` sees a key.
    pub mask: Option<&'a dyn Fn([usize; 4]) -> bool>,
    pub bias: Option<&'a dyn Fn([usize; 4]) -> f64>,
    pub alibi: Option<&'a [f32]>,
    pub sink_logits: Option<&'a [f32]>,
}

/// The result of [`Attention::run`].
pub struct State {
    pub out: Array,
    /// `[batch, token, head]`.
    pub lse: Vec<f64>,
    /// The largest sum of magnitudes of a visible logit of a row. Rounding errors of logits are relative to it.
    pub magnitude: Vec<f64>,
    /// The largest magnitude of a visible value of a row.
    pub value: Vec<f64>,
}

impl Attention<'_> {
    pub fn run(&self, q: &Array, k: &Array, v: &Array) -> State {
        let [batch, tokens, heads, dim] = q.shape;
        let [_, keys, kv_heads, v_dim] = v.shape;
        let rows = batch * tokens * heads;
        let mut state = State {
            out: Array::zeros([batch, tokens, heads, v_dim]),
            lse: Vec::with_capacity(rows),
            magnitude: Vec::with_capacity(rows),
            value: Vec::with_capacity(rows),
        };
        let scale = self.scale.unwrap_or(1.0 / (dim as f64).sqrt());
        for b in 0..batch {
            let length = self.lengths.map_or(keys as i64, |l| l[b].into());
            let start = self.kv_starts.map_or(0, |s| s[b].into());
            let prefix = self.prefix_lengths.map_or(0, |p| p[b].into());
            let offset = self.offsets.map_or(length - tokens as i64, |o| o[b].into());
            let own = |t: usize| self.query_positions.map_or(offset + t as i64, |p| p[b * tokens + t].into());
            // Where a key stands: at its number, or where the query stands that it is.
            let stands = |j: usize| match usize::try_from(j as i64 - offset) {
                Ok(t) if t < tokens => own(t),
                _ => j as i64,
            };
            for t in 0..tokens {
                let position = own(t);
                for h in 0..heads {
                    let kv_head = h / (heads / kv_heads);
                    let visible = |j: usize| {
                        let (key, place) = (j as i64, stands(j));
                        key < length
                            && key >= start
                            && (key < prefix
                                || (!self.causal || place <= position)
                                    && self.window_left.is_none_or(|w| place >= position - i64::from(w))
                                    && self.window_right.is_none_or(|w| place <= position + i64::from(w)))
                            && self.mask.is_none_or(|mask| mask([b, t, h, j]))
                            && self.bias.is_none_or(|bias| bias([b, t, h, j]) != f64::NEG_INFINITY)
                    };
                    let seen: Vec<usize> = (0..keys).filter(|&j| visible(j)).collect();
                    let mut magnitude = 0f64;
                    let mut value = 0f64;
                    let logits: Vec<f64> = seen
                        .iter()
                        .map(|&j| {
                            let (mut x, mut size) = (0.0, 0.0);
                            for (q, k) in q.row(b, t, h).iter().zip(k.row(b, j, kv_head)) {
                                x += q * k;
                                size += (q * k).abs();
                            }
                            (x, size) = (x * scale, size * scale.abs());
                            if let Some(cap) = self.softcap {
                                x = cap * (x / cap).tanh();
                                size = size.min(cap);
                            }
                            if let Some(slopes) = self.alibi {
                                let term = f64::from(slopes[h]) * (stands(j) - position) as f64;
                                x += term;
                                size += term.abs();
                            }
                            if let Some(bias) = self.bias {
                                x += bias([b, t, h, j]);
                                size += bias([b, t, h, j]).abs();
                            }
                            magnitude = magnitude.max(size);
                            x
                        })
                        .collect();
                    let sink = self.sink_logits.map_or(f64::NEG_INFINITY, |s| s[h].into());
                    let max = logits.iter().copied().fold(sink, f64::max);
                    // If all logits are -inf, every weight is 0.
                    let shift = if max == f64::NEG_INFINITY { 0.0 } else { max };
                    let weights: Vec<f64> = logits.iter().map(|x| (x - shift).exp()).collect();
                    let sum = weights.iter().sum::<f64>() + (sink - shift).exp();
                    for (&j, weight) in seen.iter().zip(&weights) {
                        let share = weight / sum;
                        for (o, v) in state.out.row_mut(b, t, h).iter_mut().zip(v.row(b, j, kv_head)) {
                            value = value.max(v.abs());
                            if sum != 0.0 {
                                *o += share * v;
                            }
                        }
                    }
                    state.lse.push(shift + sum.ln());
                    state.magnitude.push(magnitude);
                    state.value.push(value);
                }
            }
        }
        state
    }
}

/// Rotates the leading `2 * inv_freq.len()` elements of every head.
pub fn rope(
    x: &Array,
    pairing: Pairing,
    inv_freq: &[f64],
    magnitude: f64,
    position: impl Fn(usize, usize) -> i64,
) -> Array {
    let mut y = x.clone();
    let half = inv_freq.len();
    for b in 0..x.shape[0] {
        for t in 0..x.shape[1] {
            for h in 0..x.shape[2] {
                for (i, frequency) in inv_freq.iter().enumerate() {
                    let angle = position(b, t) as f64 * frequency;
                    let (sin, cos) = (angle.sin() * magnitude, angle.cos() * magnitude);
                    let (i0, i1) = match pairing {
                        Pairing::Interleaved => (2 * i, 2 * i + 1),
                        Pairing::HalfSplit => (i, i + half),
                    };
                    let (x0, x1) = (x.row(b, t, h)[i0], x.row(b, t, h)[i1]);
                    let y = y.row_mut(b, t, h);
                    y[i0] = x0 * cos - x1 * sin;
                    y[i1] = x1 * cos + x0 * sin;
                }
            }
        }
    }
    y
}

/// Every head divided by the root of its mean square.
pub fn rms_norm(x: &Array, weight: Option<&[f32]>, eps: f64) -> Array {
    let mut y = x.clone();
    for head in y.data.chunks_mut(x.shape[3].max(1)) {
        let mean = head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64;
        let root = (mean + eps).sqrt();
        for (d, x) in head.iter_mut().enumerate() {
            *x = *x / root * weight.map_or(1.0, |w| w[d].into());
        }
    }
    y
}

/// The union of attention states: `(outputs, LSEs)`.
pub fn merge(states: &[(Array, Vec<f64>)]) -> (Array, Vec<f64>) {
    let mut out = Array::zeros(states[0].0.shape);
    let width = out.shape[3];
    let lse: Vec<f64> = (0..states[0].1.len())
        .map(|row| {
            let max = states.iter().map(|s| s.1[row]).fold(f64::NEG_INFINITY, f64::max);
            if max == f64::NEG_INFINITY {
                return max;
            }
            let sum: f64 = states.iter().map(|s| (s.1[row] - max).exp()).sum();
            for (x, lse) in states.iter().filter(|(_, lse)| lse[row] != f64::NEG_INFINITY) {
                for i in row * width..(row + 1) * width {
                    out.data[i] += (lse[row] - max).exp() / sum * x.data[i];
                }
            }
            max + sum.ln()
        })
        .collect();
    (out, lse)
}

/// Every head `n` times in a row.
pub fn repeat(x: &Array, n: usize) -> Array {
    let [batch, tokens, heads, dim] = x.shape;
    let mut y = Array::zeros([batch, tokens, heads * n, dim]);
    for b in 0..batch {
        for t in 0..tokens {
            for h in 0..heads * n {
                y.row_mut(b, t, h).copy_from_slice(x.row(b, t, h / n));
            }
        }
    }
    y
}
