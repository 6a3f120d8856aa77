//! Beam search: the continuations of a prompt that are the most likely as a whole.
//!
//! ```text
//! running beams --one pass--> logits --log-softmax, + log-probability of the beam--> candidates, best first
//!       ^                                                                               |
//!       |     the first N that do not end a text: parents, tokens                       |  ends among the first N
//!       +--- reorder (a table moves, no token does) <-----------------------------------+-----> finished hypotheses
//! ```
//! The beams are rows of a cache [with beams](Cache::with_beams). The prompt is computed once, in the first row, and
//! every row begins as a copy of it by table. A step feeds the last token of every beam in one pass, chooses the
//! candidates, and makes every row what its parent was. The search also takes a cache without a table, whose rows move
//! by copying, with the same result to the bit.
//!
//! The rules are those of Hugging Face transformers (`_beam_search` of `GenerationMixin`, version 5): which candidates
//! become finished hypotheses, how their scores are normalised by their lengths, and when the search ends
//! ([`EarlyStopping`]). Sums are f64 here and f32 there, and equal candidates are ordered by beam, then by token.

use super::cache::{Cache, PREFILL_CHUNK};
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};

/// When a beam search ends before its limit of tokens: in every case only once there are as many finished hypotheses as
/// beams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EarlyStopping {
    /// When the best running beam, scored as if it ended now, is no better than the worst finished hypothesis.
    #[default]
    Heuristic,
    /// At once.
    First,
    /// When no running beam can become better than the worst finished hypothesis, at whatever length the length penalty
    /// favours.
    Never,
}

/// What a beam search looks for.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct BeamOptions {
    /// The number of sequences that run side by side, and of hypotheses that are kept; at least 1.
    pub beams: usize,
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// The score of a hypothesis of n tokens is its log-probability divided by n to this power. 0 takes the
    /// log-probability itself; more favours longer texts.
    pub length_penalty: f64,
    /// When to end.
    pub early_stopping: EarlyStopping,
}

impl BeamOptions {
    /// A search with this number of beams for at most this number of tokens, with length penalty 1.
    pub fn new(beams: usize, max_tokens: usize) -> Self {
        Self { beams, max_tokens, length_penalty: 1.0, early_stopping: EarlyStopping::default() }
    }

    /// Sets [`length_penalty`](field@Self::length_penalty).
    #[must_use]
    pub fn length_penalty(mut self, length_penalty: f64) -> Self {
        self.length_penalty = length_penalty;
        self
    }

    /// Sets [`early_stopping`](field@Self::early_stopping).
    #[must_use]
    pub fn early_stopping(mut self, early_stopping: EarlyStopping) -> Self {
        self.early_stopping = early_stopping;
        self
    }

    /// Whether a search can have these options.
    pub fn check(&self) -> Result<()> {
        let &Self { beams, max_tokens, length_penalty, .. } = self;
        if beams == 0 || max_tokens == 0 {
            return Err(Error::argument(format!(
                "{beams} beams for {max_tokens} tokens; at least 1 of each is needed"
            )));
        }
        if !length_penalty.is_finite() {
            return Err(Error::argument(format!("the length penalty is {length_penalty}; it must be finite")));
        }
        Ok(())
    }
}

/// A continuation of the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// The generated tokens, with the one that ends the text, if there is one.
    pub tokens: Vec<u32>,
    /// The logarithm of the probability of these tokens after the prompt.
    pub log_probability: f64,
    /// [`Self::log_probability`], normalised by the length.
    pub score: f64,
}

/// A sequence that runs.
#[derive(Debug, Clone)]
struct Beam {
    tokens: Vec<u32>,
    log_probability: f64,
}

/// A beam search over one prompt.
///
/// Thread safety: a search is used by one thread at a time. Several searches may share a decoder.
///
/// ```
/// use kvlane::driver::{BeamOptions, BeamSearch, Cache, Decoder, Threads, embedded};
/// let file = embedded::open()?;
/// let prompt = file.tokenizer()?.encode("And it came to pass", true)?;
/// let decoder = Decoder::new(file.config().clone(), file.weights(&|_, _| ())?, 64, None, Threads::new(1)?)?;
/// let cache = Cache::with_beams(decoder.config(), 4, 64, kvlane::DType::F32)?;
/// let mut search = BeamSearch::new(&decoder, cache, &prompt, BeamOptions::new(4, 8))?;
/// while search.step()? {}
/// let found = search.hypotheses();
/// assert!(found.len() == 4 && found[0].score >= found[3].score);
/// # Ok::<(), kvlane::driver::Error>(())
/// ```
#[derive(Debug)]
pub struct BeamSearch<'a> {
    decoder: &'a Decoder,
    cache: Cache,
    scratch: Scratch,
    options: BeamOptions,
    prompt: Vec<u32>,
    /// The log-probabilities of the token after every running beam come from these, `[running, vocab]`.
    logits: Vec<f32>,
    /// Best first; at most as many as beams.
    running: Vec<Beam>,
    /// Best first; at most as many as beams.
    finished: Vec<Hypothesis>,
    ended: bool,
}

/// A token after a running beam.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    log_probability: f64,
    beam: usize,
    token: u32,
}

impl<'a> BeamSearch<'a> {
    /// Checks the arguments. The cache has a row per beam, which the search empties; [`Cache::with_beams`] makes one whose
    /// tokens never move. It needs room for the prompt and for `max_tokens - 1` tokens.
    pub fn new(decoder: &'a Decoder, mut cache: Cache, prompt: &[u32], options: BeamOptions) -> Result<Self> {
        options.check()?;
        let BeamOptions { beams, max_tokens, .. } = options;
        if beams != cache.rows() {
            return Err(Error::argument(format!(
                "{beams} beams for a cache of {} rows; each beam has a row",
                cache.rows()
            )));
        }
        let needed = prompt.len().saturating_add(max_tokens - 1);
        if prompt.is_empty() || needed > cache.capacity() {
            return Err(Error::argument(format!(
                "a prompt of {} tokens and {max_tokens} more, the last of which takes no room; the prompt has at least 1 \
                 token, and the cache has room for {}",
                prompt.len(),
                cache.capacity()
            )));
        }
        (0..beams).for_each(|row| cache.reset(row));
        Ok(Self {
            decoder,
            cache,
            scratch: Scratch::default(),
            options,
            prompt: prompt.to_vec(),
            logits: Vec::new(),
            running: Vec::new(),
            finished: Vec::new(),
            ended: false,
        })
    }

    /// Computes the prompt; `progress` receives the number of its tokens done. [`Self::step`] does so if the caller has not.
    pub fn prefill(&mut self, progress: &mut dyn FnMut(usize)) -> Result<()> {
        if !self.running.is_empty() {
            return Ok(());
        }
        self.cache.reset(0);
        let chunk = self.cache.chunk().min(PREFILL_CHUNK);
        let mut logits = Vec::new();
        for (i, ids) in self.prompt.chunks(chunk).enumerate() {
            let last = i == (self.prompt.len() - 1) / chunk;
            let wanted = if last { Logits::Last } else { Logits::None };
            logits = self.decoder.forward(&mut self.cache, &mut self.scratch, 0, &[ids], wanted)?;
            progress(self.cache.len(0));
        }
        self.decoder.reorder(&mut self.cache, &vec![0; self.options.beams])?;
        self.logits = logits;
        self.running = vec![Beam { tokens: Vec::new(), log_probability: 0.0 }];
        Ok(())
    }

    /// Extends every running beam by one token. Returns whether the search goes on. After its end, steps do nothing.
    ///
    /// An error ends the search; the hypotheses that had finished before remain.
    pub fn step(&mut self) -> Result<bool> {
        if self.ended {
            return Ok(false);
        }
        self.ended = true;
        self.prefill(&mut |_| ())?;
        if self.generated() > 0 {
            let last: Vec<&[u32]> = self.running.iter().map(|b| &b.tokens[b.tokens.len() - 1..]).collect();
            self.logits = self.decoder.forward(&mut self.cache, &mut self.scratch, 0, &last, Logits::Last)?;
        }
        let candidates = self.candidates()?;
        self.ended = !self.advance(&candidates)?;
        Ok(!self.ended)
    }

    /// The number of tokens that every running beam has.
    pub fn generated(&self) -> usize {
        self.running.first().map_or(0, |beam| beam.tokens.len())
    }

    /// The finished hypotheses, best first. If the search was left before its end and fewer have finished than there are
    /// beams, running ones follow, scored as if they ended now.
    pub fn hypotheses(&self) -> Vec<Hypothesis> {
        let BeamOptions { beams, .. } = self.options;
        let running = self.running.iter().filter(|beam| !self.ended && !beam.tokens.is_empty());
        let running = running.map(|beam| self.hypothesis(beam.tokens.clone(), beam.log_probability));
        let missing = beams - self.finished.len();
        self.finished.iter().cloned().chain(running.take(missing)).collect()
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The cache, for another search.
    pub fn into_cache(self) -> Cache {
        self.cache
    }

    fn normaliser(&self, tokens: usize) -> f64 {
        (tokens as f64).powf(self.options.length_penalty)
    }

    fn hypothesis(&self, tokens: Vec<u32>, log_probability: f64) -> Hypothesis {
        let score = log_probability / self.normaliser(tokens.len());
        Hypothesis { tokens, log_probability, score }
    }

    /// The best tokens after all running beams, best first: so many that even if every token that ends a text is among
    /// them for every beam, as many others as there are beams remain.
    fn candidates(&self) -> Result<Vec<Candidate>> {
        let config = self.decoder.config();
        let most = (1 + config.eos.len()).max(2) * self.options.beams;
        let mut best: Vec<Candidate> = Vec::with_capacity(most + 1);
        for (beam, (logits, before)) in self.logits.chunks_exact(config.vocab).zip(&self.running).enumerate() {
            let normaliser = log_sum_exp(logits)?;
            for (token, &logit) in (0..).zip(logits) {
                let log_probability = before.log_probability + (f64::from(logit) - normaliser);
                let full = best.len() == most;
                // An equal candidate comes after those of earlier beams and tokens.
                if log_probability == f64::NEG_INFINITY || full && log_probability <= best[most - 1].log_probability {
                    continue;
                }
                let at = best.partition_point(|c| c.log_probability >= log_probability);
                best.truncate(most - usize::from(full));
                best.insert(at, Candidate { log_probability, beam, token });
            }
        }
        Ok(best)
    }

    /// Takes finished hypotheses and the next running beams from the candidates. Returns whether the search goes on.
    fn advance(&mut self, candidates: &[Candidate]) -> Result<bool> {
        let BeamOptions { beams, max_tokens, early_stopping, .. } = self.options;
        let length = self.generated() + 1;
        let eos = &self.decoder.config().eos;
        let ends = |c: &Candidate| length == max_tokens || eos.contains(&c.token);
        let tokens = |c: &Candidate| [&self.running[c.beam].tokens[..], &[c.token]].concat();

        // An end counts only among the first: the candidates behind them are there to continue.
        let new: Vec<_> = candidates.iter().take(beams).filter(|c| ends(c)).collect();
        let new: Vec<_> = new.into_iter().map(|c| self.hypothesis(tokens(c), c.log_probability)).collect();
        let next: Vec<_> = candidates.iter().filter(|c| !ends(c)).take(beams).collect();
        let parents: Vec<usize> = next.iter().map(|c| c.beam).collect();
        let next: Vec<_> =
            next.into_iter().map(|c| Beam { tokens: tokens(c), log_probability: c.log_probability }).collect();

        self.finished.extend(new);
        // Stable: among equals, the one that finished first stays.
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(beams);
        if next.is_empty() {
            self.running.clear();
            return Ok(false);
        }
        let goes_on = match self.finished.last() {
            Some(worst) if self.finished.len() == beams => {
                let hypothetical = match early_stopping {
                    EarlyStopping::First => return Ok(false),
                    EarlyStopping::Never if self.options.length_penalty > 0.0 => max_tokens,
                    EarlyStopping::Never | EarlyStopping::Heuristic => length,
                };
                next[0].log_probability / self.normaliser(hypothetical) > worst.score
            }
            _ => true,
        };
        // Rows without a beam keep step with the others, so that all rows are equally long.
        let parents: Vec<usize> = (0..beams).map(|row| parents.get(row).copied().unwrap_or(0)).collect();
        if goes_on {
            self.decoder.reorder(&mut self.cache, &parents)?;
        }
        self.running = next;
        Ok(goes_on)
    }
}

/// The logarithm of the sum of the exponentials of logits.
fn log_sum_exp(logits: &[f32]) -> Result<f64> {
    let mut top = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(Error::argument(format!("the logit of token {token} is {logit}")));
        }
        top = top.max(logit);
    }
    if top == f32::NEG_INFINITY {
        return Err(Error::argument(format!("the largest of {} logits is {top}", logits.len())));
    }
    let top = f64::from(top);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - top).exp()).sum();
    Ok(top + sum.ln())
}
