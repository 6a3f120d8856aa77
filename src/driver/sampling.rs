//! The choice of the next token from its logits.
//!
//! The filters apply in the order that other runtimes use: temperature, then top-k, then top-p on the remaining
//! tokens. Equal logits are ordered by token id, so that a tie does not depend on the sort. Random numbers come from a
//! ChaCha stream, which is the same on every machine. Logits, options and seed together determine the text.

use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};

use super::error::{Error, Result};

/// How to choose.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct SamplerOptions {
    /// Divisor of the logits; 0 always selects the most likely token.
    pub temperature: f32,
    /// Selects among the `k` most likely tokens; 0 is no limit.
    pub top_k: usize,
    /// Selects among the most likely tokens whose probabilities together reach this sum; 1 is no limit.
    pub top_p: f32,
    /// Seed of the random stream.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl SamplerOptions {
    /// The most likely token, always.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`temperature`](field@Self::temperature).
    #[must_use]
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets [`top_k`](field@Self::top_k).
    #[must_use]
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.top_k = top_k;
        self
    }

    /// Sets [`top_p`](field@Self::top_p).
    #[must_use]
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.top_p = top_p;
        self
    }

    /// Sets [`seed`](field@Self::seed).
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }
}

/// One request's random stream with its options.
#[derive(Debug)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha12Rng,
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// Checks the options and starts the stream.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        let SamplerOptions { temperature, top_p, seed, .. } = options;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(Error::argument(format!("the temperature is {temperature}; it must be a number, 0 or more")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::argument(format!("top-p is {top_p}; it must be above 0 and at most 1")));
        }
        Ok(Self { options, rng: ChaCha12Rng::seed_from_u64(seed), candidates: Vec::new() })
    }

    /// Selects a token. A logit of minus infinity is never selected. A NaN is an error, because it means that the
    /// model or its weights are broken.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let best = argmax(logits)?;
        if self.is_greedy() {
            return Ok(best);
        }
        let total = self.select(logits);
        let mut left = self.uniform() * total;
        for candidate in &self.candidates {
            left -= self.weight(candidate);
            if left < 0.0 {
                return Ok(candidate.1);
            }
        }
        // Rounding can leave a remainder after the last candidate.
        Ok(self.candidates[self.candidates.len() - 1].1)
    }

    /// The tokens that [`Self::sample`] can select, each with its probability, most likely first. Takes no random number.
    pub fn distribution(&mut self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        let best = argmax(logits)?;
        if self.is_greedy() {
            return Ok(vec![(best, 1.0)]);
        }
        let total = self.select(logits);
        Ok(self.candidates.iter().map(|candidate| (candidate.1, self.weight(candidate) / total)).collect())
    }

    /// A random number from 0 to 1, which it does not reach.
    pub(super) fn uniform(&mut self) -> f64 {
        self.rng.random()
    }

    /// The options.
    pub fn options(&self) -> SamplerOptions {
        self.options
    }

    fn is_greedy(&self) -> bool {
        self.options.temperature == 0.0 || self.options.top_k == 1
    }

    /// A candidate's probability, relative to the first one's.
    fn weight(&self, &(logit, _): &(f32, u32)) -> f64 {
        let top = f64::from(self.candidates[0].0);
        ((f64::from(logit) - top) / f64::from(self.options.temperature)).exp()
    }

    /// Lists the candidates that the filters leave, most likely first, and returns the sum of their weights. There is one
    /// at least.
    fn select(&mut self, logits: &[f32]) -> f64 {
        let SamplerOptions { top_k, top_p, .. } = self.options;
        let c = &mut self.candidates;
        c.clear();
        c.extend(logits.iter().zip(0..).filter(|(l, _)| **l > f32::NEG_INFINITY).map(|(&l, id)| (l, id)));
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if top_k > 0 && top_k < c.len() {
            c.select_nth_unstable_by(top_k - 1, order);
            c.truncate(top_k);
        }
        // Sorted even where no filter needs it, because a walk over the tokens must see them in a fixed order.
        c.sort_unstable_by(order);

        let total: f64 = self.candidates.iter().map(|candidate| self.weight(candidate)).sum();
        if top_p == 1.0 {
            return total;
        }
        let limit = total * f64::from(top_p);
        let (mut sum, mut keep) = (0.0, 0);
        while keep < self.candidates.len() && sum < limit {
            sum += self.weight(&self.candidates[keep]);
            keep += 1;
        }
        self.candidates.truncate(keep.max(1));
        sum
    }
}

/// The token with the largest logit, the smallest id among equals.
pub fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = None;
    for (id, &l) in (0u32..).zip(logits) {
        if l.is_nan() {
            return Err(Error::argument(format!("the logit of token {id} is NaN")));
        }
        if best.is_none_or(|(_, b)| l > b) {
            best = Some((id, l));
        }
    }
    match best {
        Some((id, l)) if l > f32::NEG_INFINITY && l < f32::INFINITY => Ok(id),
        Some((id, l)) => Err(Error::argument(format!("the largest of {} logits is {l}, at token {id}", logits.len()))),
        None => Err(Error::argument("there are no logits to choose from")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: usize, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(SamplerOptions { temperature, top_k, top_p, seed }).unwrap()
    }

    fn frequencies(s: &mut Sampler, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut n = vec![0.0; logits.len()];
        for _ in 0..draws {
            n[s.sample(logits).unwrap() as usize] += 1.0 / draws as f64;
        }
        n
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(sampler(0.0, 0, 1.0, 0).sample(&[1.0, 3.0, 3.0, -1.0]).unwrap(), 1);
        assert_eq!(argmax(&[f32::NEG_INFINITY, -5.0]).unwrap(), 1);
    }

    #[test]
    fn broken_logits_are_errors() {
        for bad in [&[][..], &[f32::NAN, 1.0], &[1.0, f32::NAN], &[f32::NEG_INFINITY], &[f32::INFINITY, 0.0]] {
            assert!(sampler(1.0, 0, 1.0, 0).sample(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn options_out_of_range_are_errors() {
        for (t, p) in [(-1.0, 1.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, f32::NAN)] {
            let options = SamplerOptions { temperature: t, top_p: p, ..Default::default() };
            assert!(Sampler::new(options).is_err(), "{options:?}");
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        // Probabilities 0.1, 0.2, 0.3, 0.4; the standard error of 40000 draws is 0.0025 at most.
        let logits: Vec<f32> = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        let n = frequencies(&mut sampler(1.0, 0, 1.0, 7), &logits, 40_000);
        for (n, p) in n.iter().zip([0.1, 0.2, 0.3, 0.4]) {
            assert!((n - p).abs() < 0.0125, "{n} for {p}");
        }
        // Temperature 0.5 squares the ratios.
        let n = frequencies(&mut sampler(0.5, 0, 1.0, 7), &logits, 40_000);
        for (n, p) in n.iter().zip([1.0 / 30.0, 4.0 / 30.0, 9.0 / 30.0, 16.0 / 30.0]) {
            assert!((n - p).abs() < 0.0125, "{n} for {p}");
        }
    }

    #[test]
    fn filters_cut_the_tail() {
        let logits: Vec<f32> = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        let n = frequencies(&mut sampler(1.0, 2, 1.0, 1), &logits, 10_000);
        assert_eq!((n[0], n[1]), (0.0, 0.0));
        assert!((n[3] - 4.0 / 7.0).abs() < 0.025, "{n:?}");
        // 0.4 + 0.3 does not reach 0.75, so the third stays and the fourth goes.
        let n = frequencies(&mut sampler(1.0, 0, 0.75, 1), &logits, 10_000);
        assert_eq!(n[0], 0.0);
        assert!((n[1] - 2.0 / 9.0).abs() < 0.025, "{n:?}");
        // A tiny top-p still leaves one token.
        assert_eq!(frequencies(&mut sampler(1.0, 0, 1e-6, 1), &logits, 16)[3], 1.0);
        // A tie at the edge of top-k goes to the smaller ids.
        let n = frequencies(&mut sampler(1.0, 2, 1.0, 1), &[0.0; 5], 1000);
        assert_eq!((n[2], n[3], n[4]), (0.0, 0.0, 0.0));
    }

    #[test]
    fn one_seed_one_stream() {
        let logits = [0.3, 0.1, 0.9, 0.5, 0.2, 0.0, 0.7, 0.4];
        let draw = |seed| {
            let mut s = sampler(1.0, 0, 0.95, seed);
            (0..16).map(|_| s.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(42), draw(42));
        assert_ne!(draw(42), draw(43));
        // Pinned, so that a new version of a dependency cannot change a user's text unnoticed.
        assert_eq!(draw(42), [7, 7, 0, 3, 2, 3, 4, 1, 2, 2, 5, 7, 3, 2, 7, 6]);
    }
}
