//! How well a model predicts a text with its cache in some formats: perplexity, and the distance from the predictions with another
//! cache.

use super::cache::{Cache, Formats};
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};

/// Tokens of a pass. Fewer than of a prompt, because the logits of all are held at once.
const CHUNK: usize = 64;

/// How well a text was predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Perplexity {
    /// The tokens that were predicted.
    pub tokens: usize,
    /// e to the mean of the negative log-probabilities of the tokens.
    pub perplexity: f64,
    /// The standard error of [`Self::perplexity`].
    pub error: f64,
    /// The comparison with a baseline, if there is one.
    pub distance: Option<Distance>,
}

/// The distances of the next token's distributions from those of a baseline.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Distance {
    /// The perplexity of the baseline.
    pub perplexity: f64,
    /// The Kullback-Leibler divergence of the distributions from the baseline's, in nats: the mean over all tokens.
    pub mean_divergence: f64,
    /// The largest divergence.
    pub largest_divergence: f64,
    /// The cosine of the angle between the two distributions: the mean.
    pub mean_cosine: f64,
    /// The least cosine.
    pub least_cosine: f64,
    /// The share of tokens at which the same token is the most likely one.
    pub same_choice: f64,
}

/// Measures how well `decoder` predicts the tokens `ids` with a cache in `formats`, and, with a baseline, how far its predictions are
/// from those with a cache in that.
///
/// The text is cut into windows of `context` tokens, each of which starts with an empty cache. All tokens of a window but its first
/// count. `first` is the token that starts every window after the first one, if the model expects one. `progress` is told the tokens
/// that are done.
///
/// # Errors
/// The text has fewer than two tokens; `context` is below 2 or does not fit into memory; a logit is NaN.
pub fn perplexity(
    decoder: &Decoder,
    ids: &[u32],
    (context, first): (usize, Option<u32>),
    formats: Formats,
    baseline: Option<Formats>,
    progress: &mut dyn FnMut(usize),
) -> Result<Perplexity> {
    if ids.len() < 2 {
        return Err(Error::argument(format!("the text has {} tokens, but the first one is not predicted", ids.len())));
    }
    let windows = windows(ids, (context, first))?;
    let window = context.min(ids.len());
    let make = |formats: Formats| Cache::with_chunk(decoder.config(), 1, window, CHUNK, formats);
    let (mut cache, mut other, mut scratch) = (make(formats)?, baseline.map(make).transpose()?, Scratch::default());
    let (mut sums, mut done) = (Sums::default(), 0);
    for (tokens, len) in windows {
        cache.reset(0);
        other.iter_mut().for_each(|cache| cache.reset(0));
        for at in (0..tokens.len()).step_by(CHUNK) {
            let piece = &tokens[at..tokens.len().min(at + CHUNK)];
            let logits = decoder.forward(&mut cache, &mut scratch, 0, &[piece], Logits::All)?;
            let others = other.as_mut().map(|other| decoder.forward(other, &mut scratch, 0, &[piece], Logits::All));
            let others = others.transpose()?;
            let vocab = decoder.config().vocab;
            for (i, &next) in tokens.iter().skip(at + 1).take(piece.len()).enumerate() {
                let of = |logits: &Vec<f32>| Prediction::of(&logits[i * vocab..(i + 1) * vocab]);
                sums.add(&of(&logits)?, others.as_ref().map(of).transpose()?.as_ref(), next);
            }
            progress(done + at.min(len));
        }
        done += len;
    }
    Ok(sums.finish(other.is_some()))
}

/// Cuts a text into windows of at most `context` tokens, each but the first one with `first` before it. Returns the tokens of each, and how
/// many of them are of the text.
pub(super) fn windows(ids: &[u32], (context, first): (usize, Option<u32>)) -> Result<Vec<(Vec<u32>, usize)>> {
    let least = 2 + usize::from(first.is_some());
    if context < least {
        return Err(Error::argument(format!("windows of {context} tokens; {least} is the least")));
    }
    let (mut windows, mut done) = (Vec::new(), 0);
    while done < ids.len() {
        let start = first.filter(|_| done > 0);
        let len = (context - usize::from(start.is_some())).min(ids.len() - done);
        windows.push((start.into_iter().chain(ids[done..done + len].iter().copied()).collect(), len));
        done += len;
    }
    Ok(windows)
}

/// The distribution of the next token.
struct Prediction {
    /// Log-probabilities.
    log: Vec<f64>,
}

impl Prediction {
    fn of(logits: &[f32]) -> Result<Self> {
        let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &x| if x > a || x.is_nan() { x } else { a });
        if !largest.is_finite() {
            return Err(Error::request(format!("the largest logit is {largest}, which is no number")));
        }
        let shifted = logits.iter().map(|&x| f64::from(x) - f64::from(largest));
        let log_sum = shifted.clone().map(f64::exp).sum::<f64>().ln();
        Ok(Self { log: shifted.map(|x| x - log_sum).collect() })
    }

    fn choice(&self) -> usize {
        (0..self.log.len()).fold(0, |best, i| if self.log[i] > self.log[best] { i } else { best })
    }
}

#[derive(Default)]
struct Sums {
    tokens: usize,
    loss: f64,
    loss_squared: f64,
    other_loss: f64,
    divergence: f64,
    largest_divergence: f64,
    cosine: f64,
    /// 1 minus the least cosine.
    largest_angle: f64,
    same: usize,
}

impl Sums {
    fn add(&mut self, prediction: &Prediction, other: Option<&Prediction>, next: u32) {
        let loss = -prediction.log[next as usize];
        self.tokens += 1;
        self.loss += loss;
        self.loss_squared += loss * loss;
        let Some(other) = other else { return };
        self.other_loss -= other.log[next as usize];
        let (mut divergence, mut dot, mut own, mut its) = (0.0, 0.0, 0.0, 0.0);
        for (&log, &base) in prediction.log.iter().zip(&other.log) {
            let (p, q) = (base.exp(), log.exp());
            // A token without probability adds nothing, whatever the logarithms are.
            divergence += if p > 0.0 { p * (base - log) } else { 0.0 };
            dot += p * q;
            own += q * q;
            its += p * p;
        }
        // Rounding can make it a little less than 0.
        let (divergence, cosine) = (divergence.max(0.0), (dot / (own * its).sqrt()).min(1.0));
        self.divergence += divergence;
        self.largest_divergence = self.largest_divergence.max(divergence);
        self.cosine += cosine;
        self.largest_angle = self.largest_angle.max(1.0 - cosine);
        self.same += usize::from(prediction.choice() == other.choice());
    }

    fn finish(&self, compared: bool) -> Perplexity {
        let n = self.tokens as f64;
        let mean = self.loss / n;
        let variance = if self.tokens > 1 { ((self.loss_squared - n * mean * mean) / (n - 1.0)).max(0.0) } else { 0.0 };
        Perplexity {
            tokens: self.tokens,
            perplexity: mean.exp(),
            error: mean.exp() * (variance / n).sqrt(),
            distance: compared.then(|| Distance {
                perplexity: (self.other_loss / n).exp(),
                mean_divergence: self.divergence / n,
                largest_divergence: self.largest_divergence,
                mean_cosine: self.cosine / n,
                least_cosine: 1.0 - self.largest_angle,
                same_choice: self.same as f64 / n,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_their_definitions() {
        // Probabilities 1/2, 1/4, 1/4 against 1/4, 1/2, 1/4.
        let of = |shares: [f32; 3]| Prediction::of(&shares.map(|x| x.ln() + 7.0)).unwrap();
        let (base, own) = (of([0.5, 0.25, 0.25]), of([0.25, 0.5, 0.25]));
        let mut sums = Sums::default();
        sums.add(&own, Some(&base), 1);
        sums.add(&base, Some(&base), 0);
        let result = sums.finish(true);
        let distance = result.distance.unwrap();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a}, not {b}");
        assert_eq!((result.tokens, distance.same_choice), (2, 0.5));
        close(result.perplexity, 2.0);
        close(result.error, 0.0);
        close(distance.perplexity, 8f64.sqrt());
        close(distance.largest_divergence, 0.25 * 2f64.ln());
        close(distance.mean_divergence, 0.125 * 2f64.ln());
        close(distance.least_cosine, 5.0 / 6.0);
        close(distance.mean_cosine, 11.0 / 12.0);
        assert!(Prediction::of(&[1.0, f32::NAN]).is_err() && Prediction::of(&[f32::NEG_INFINITY; 2]).is_err());
    }
}
