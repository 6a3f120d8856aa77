//! The feed-forward part of a layer: one network, or a mixture of experts.
//!
//! ```text
//! p = softmax(h Wrouter) over all experts, in f32
//! y = the sum over the `used` most probable experts e of  p[e] * ((act(h Ge) * (h Ue)) De)
//! ```
//! Each expert is given the rows that chose it, all at once, so that its weights are read once per pass, and no expert
//! computes a row that did not choose it. A row's experts are added in the order of their numbers, whatever other rows
//! there are.

use rayon::prelude::*;

use super::error::Result;
use super::linear::{Linear, Matrix, Rounded};
use super::mesh::Division;
use super::model::{Activation, ExpertConfig, Experts, FeedForward, GatedMlp, ModelConfig};
use super::work::Work;

/// Memory for the activations inside the feed-forward part, kept between passes.
#[derive(Debug, Default)]
pub(super) struct FeedForwardScratch {
    /// `[m, 2 * ffn_dim]`, the part of this process.
    gate_up: Vec<f32>,
    /// `[m, ffn_dim]`, the part of this process, and the whole.
    own_act: Vec<f32>,
    act: Vec<f32>,
    /// Outputs of this process.
    own: Vec<f32>,
    room: Vec<f32>,
    /// The router's logits, then its probabilities, `[m, experts]`.
    probabilities: Vec<f32>,
    /// For each expert its rows, and the weight of its output in each.
    chosen: Vec<Vec<(usize, f32)>>,
    /// The rows of one expert, and their outputs, `[m, dim]` each.
    input: Vec<f32>,
    output: Vec<f32>,
}

/// What the layers of a pass share.
pub(super) struct Pass<'a> {
    pub config: &'a ModelConfig,
    pub division: &'a Division,
    pub linear: Linear<'a>,
    pub rounded: &'a mut Rounded,
    pub work: &'a mut Work,
}

impl Pass<'_> {
    fn apply(&mut self, w: &Matrix, x: &[f32], m: usize, y: &mut [f32]) {
        w.apply(&self.linear, x, m, y, self.rounded);
        self.work.add_linear(&[w], m);
    }
}

/// `y = feed_forward(h)` for `m` rows of `dim` elements.
pub(super) fn feed_forward(
    pass: &mut Pass<'_>,
    weights: &FeedForward,
    h: &[f32],
    m: usize,
    y: &mut [f32],
    scratch: &mut FeedForwardScratch,
) -> Result<()> {
    let ModelConfig { dim, ffn_dim, activation, .. } = *pass.config;
    let division = pass.division;
    let FeedForwardScratch { gate_up, own_act, act, own, room, probabilities, chosen, input, output } = scratch;
    let mut network = |pass: &mut Pass<'_>, network: &GatedMlp, h: &[f32], m: usize, y: &mut [f32]| {
        let own_ffn = division.own_ffn();
        // Every buffer is written before it is read, so that the values of `resize` do not matter.
        gate_up.resize(m * 2 * own_ffn, 0.0);
        own_act.resize(m * own_ffn, 0.0);
        pass.apply(&network.gate_up, h, m, gate_up);
        match activation {
            Activation::Silu => gated(gate_up, own_ffn, own_act, silu),
            Activation::GeluTanh => gated(gate_up, own_ffn, own_act, gelu_tanh),
        }
        if division.divided().is_none() {
            pass.apply(&network.down, own_act, m, y);
            return Ok(());
        }
        act.resize(m * ffn_dim, 0.0);
        division.gather_columns(own_act, m, &division.ffn, act, room)?;
        own.resize(m * network.down.rows(), 0.0);
        pass.apply(&network.down, act, m, own);
        division.gather_columns(own, m, &division.dim, y, room)
    };
    let Experts { config, router, experts } = match weights {
        FeedForward::Dense(dense) => return network(pass, dense, h, m, y),
        FeedForward::Experts(experts) => experts,
    };
    probabilities.resize(m * config.count, 0.0);
    // Row by row, so that no other row can change which experts a row has.
    for (h, logits) in h.chunks_exact(dim).zip(probabilities.chunks_exact_mut(config.count)) {
        pass.apply(router, h, 1, logits);
    }
    chosen.iter_mut().for_each(Vec::clear);
    chosen.resize_with(config.count, Vec::new);
    for (row, logits) in probabilities.chunks_exact_mut(config.count).enumerate() {
        softmax(logits);
        choose(logits, *config, |expert, weight| chosen[expert].push((row, weight)));
    }
    y.fill(0.0);
    for (expert, rows) in experts.iter().zip(chosen.iter()) {
        if rows.is_empty() {
            continue;
        }
        input.clear();
        rows.iter().for_each(|&(row, _)| input.extend_from_slice(&h[row * dim..][..dim]));
        output.resize(rows.len() * dim, 0.0);
        network(pass, expert, input, rows.len(), output)?;
        for (&(row, weight), output) in rows.iter().zip(output.chunks_exact(dim)) {
            for (y, &x) in y[row * dim..][..dim].iter_mut().zip(output) {
                *y += weight * x;
            }
        }
    }
    Ok(())
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

/// Takes the most probable experts, the first of equals first, with the weights of their outputs.
fn choose(probabilities: &[f32], config: ExpertConfig, mut take: impl FnMut(usize, f32)) {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    // A stable sort. NaN comes first or last; either way it reaches the output.
    order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
    order.truncate(config.used);
    let sum: f32 = order.iter().map(|&e| probabilities[e]).sum();
    for expert in order {
        take(expert, if config.normalized { probabilities[expert] / sum } else { probabilities[expert] });
    }
}

/// `y = act(g) * u` for rows `[g | u]` of twice `n` elements.
fn gated(gate_up: &[f32], n: usize, y: &mut [f32], act: impl Fn(f32) -> f32 + Sync) {
    let row = |(gu, y): (&[f32], &mut [f32])| {
        let (g, u) = gu.split_at(n);
        for ((y, &g), &u) in y.iter_mut().zip(g).zip(u) {
            *y = act(g) * u;
        }
    };
    if y.len() == n {
        return row((gate_up, y));
    }
    gate_up.par_chunks_exact(2 * n).zip(y.par_chunks_exact_mut(n)).with_min_len(8).for_each(row);
}

/// `x` times the logistic function of `z`.
fn times_logistic(x: f32, z: f32) -> f32 {
    x / (1.0 + exp(-z))
}

fn silu(x: f32) -> f32 {
    times_logistic(x, x)
}

/// `x / 2 * (1 + tanh(u))`, where half of the sum is the logistic function of `2 u`.
fn gelu_tanh(x: f32) -> f32 {
    const SQRT_8_OVER_PI: f32 = 2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
    times_logistic(x, SQRT_8_OVER_PI * (x + 0.044715 * x * x * x))
}

/// `e^x` within three units in the last place, between the smallest and the largest normal number. Without branches and
/// calls, so that the compiler vectorises loops over it.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // The sum with 1.5 * 2^23 is rounded to an integer, which is in its lowest bits.
    const INTEGERS: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + INTEGERS;
    let n = shifted - INTEGERS;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let series = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let power = series.iter().fold(0.0f32, |sum, term| sum * r + term);
    power * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_the_definitions() {
        for i in -400_000i32..400_000 {
            let x = i as f32 / 4000.0;
            let exact = f64::from(x).exp();
            if (-87.0..=88.0).contains(&x) {
                assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3.0 * f64::from(f32::EPSILON), "e^{x}");
            }
            let z = f64::from(x);
            let silu_z = z / (1.0 + (-z).exp());
            assert!((f64::from(silu(x)) - silu_z).abs() <= 4e-7 * silu_z.abs() + 1e-30, "silu({x})");
            let u = (2.0 / std::f64::consts::PI).sqrt() * (z + 0.044715 * z * z * z);
            let gelu_z = 0.5 * z * (1.0 + u.tanh());
            assert!((f64::from(gelu_tanh(x)) - gelu_z).abs() <= 1e-6 * z.abs(), "gelu({x})");
        }
        assert!(silu(f32::NAN).is_nan() && gelu_tanh(f32::NAN).is_nan());
        assert_eq!((silu(0.0), gelu_tanh(0.0), silu(1e30), gelu_tanh(1e12)), (0.0, 0.0, 1e30, 1e12));
    }
}
