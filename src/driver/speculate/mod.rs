//! Guesses (speculative decoding): several tokens per pass of the model, with the model's own distribution.
//!
//! ```text
//! text --draft, or earlier occurrences of its last tokens--> tree of guesses
//!   ^                                                          | one pass: the bits of a mask, a position per depth
//!   |                                                        logits of the text's last token and of every guess
//!   +--- tokens of the path that holds, and one more <--accept-+
//!                  the cache keeps the path, and drops the rest by its length
//! ```
//! A pass of a few tokens takes little longer than a pass of one, because both read all weights. If guesses hold, a pass
//! yields more than one token. If none holds, it yields one, as without guesses.
//!
//! The tree's root is the last token of the text, which is not in the cache yet. The pass appends it and the guesses to
//! the cache ([`Decoder::forward_tree`]). A guess sees the text and its ancestors, and has the position that it would have
//! as the only continuation. [`Decoder::keep`] closes the gaps between the tokens of the path that holds, if it is not the
//! first one, without touching a bit of them.
//!
//! The rules for what holds are in `accept.rs`. They leave the distribution of the text as it is. With temperature 0, or
//! with guesses from the text alone, they leave every token as it is, because the tokens are chosen as without guesses,
//! from the same logits. The logits of the first branch are the same to the bit as long as the linear layers compute the
//! rows of a pass independently of their number. Those of other branches, whose keys lie in other slots, add up in
//! another order, and are the same but for rounding, which is that of f32, or where linear layers round their inputs to
//! two terms of eight bits ([`Decoder::exact`]), of these.

mod accept;
mod draft;
mod lookup;
mod tree;

pub use draft::check_vocabularies;
pub use tree::{Distribution, GuessTree};

use self::draft::Draft;
use super::cache::Cache;
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};
use super::sampling::{Sampler, SamplerOptions};
use super::scheduler::Finish;

/// How to guess, and what to generate.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct SpeculationOptions {
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplerOptions,
    /// The most guesses that follow each other.
    pub ahead: usize,
    /// The most guesses for one position.
    pub branches: usize,
    /// Guess what followed the last tokens of the text when they occurred before: at most this many last tokens, or if
    /// they did not occur, fewer. 0 does not guess so. These guesses come before those of a draft.
    pub lookup: usize,
}

impl SpeculationOptions {
    /// Greedy text of at most `max_tokens` tokens, with up to 4 guesses in one branch.
    pub fn new(max_tokens: usize) -> Self {
        Self { max_tokens, sampling: SamplerOptions::default(), ahead: 4, branches: 1, lookup: 0 }
    }

    /// Sets [`sampling`](field@Self::sampling).
    #[must_use]
    pub fn sampling(mut self, sampling: SamplerOptions) -> Self {
        self.sampling = sampling;
        self
    }

    /// Sets [`ahead`](field@Self::ahead).
    #[must_use]
    pub fn ahead(mut self, ahead: usize) -> Self {
        self.ahead = ahead;
        self
    }

    /// Sets [`branches`](field@Self::branches).
    #[must_use]
    pub fn branches(mut self, branches: usize) -> Self {
        self.branches = branches;
        self
    }

    /// Sets [`lookup`](field@Self::lookup).
    #[must_use]
    pub fn lookup(mut self, lookup: usize) -> Self {
        self.lookup = lookup;
        self
    }
}

/// What guesses were good for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SpeculationStatistics {
    /// Passes of the model after the prompt.
    pub passes: usize,
    /// Guesses in these passes.
    pub guesses: usize,
    /// Guesses that held.
    pub held: usize,
    /// Generated tokens, the first one, which follows from the prompt, included.
    pub tokens: usize,
}

/// One text, generated with guesses.
///
/// Thread safety: used by one thread at a time. Several may share decoders.
///
/// ```
/// use kvlane::driver::{Cache, Decoder, Speculation, SpeculationOptions, Threads, embedded};
/// let file = embedded::open()?;
/// let prompt = file.tokenizer()?.encode("And the LORD said unto Moses", true)?;
/// let decoder = Decoder::new(file.config().clone(), file.weights(&|_, _| ())?, 128, None, Threads::new(1)?)?;
/// let cache = Cache::without_rings(decoder.config(), 1, 128, kvlane::DType::F32)?;
/// let options = SpeculationOptions::new(40).lookup(3);
/// let mut text = Speculation::new(&decoder, cache, &prompt, options)?;
/// while text.finish().is_none() {
///     let tokens = text.step()?; // one, and those guessed before it
///     assert!(!tokens.is_empty());
/// }
/// let statistics = text.statistics();
/// assert!(statistics.held <= statistics.guesses && statistics.passes < 40);
/// # Ok::<(), kvlane::driver::Error>(())
/// ```
#[derive(Debug)]
pub struct Speculation<'a> {
    decoder: &'a Decoder,
    cache: Cache,
    scratch: Scratch,
    options: SpeculationOptions,
    sampler: Sampler,
    draft: Option<Draft<'a>>,
    /// The prompt and the generated tokens; the last one is not in the cache yet.
    text: Vec<u32>,
    prompt: usize,
    finish: Option<Finish>,
    statistics: SpeculationStatistics,
}

impl<'a> Speculation<'a> {
    /// Checks the arguments. The text takes the first row of the cache, which it empties. With more than one branch, the
    /// cache must be one [without rings](Cache::without_rings).
    pub fn new(decoder: &'a Decoder, mut cache: Cache, prompt: &[u32], options: SpeculationOptions) -> Result<Self> {
        let SpeculationOptions { max_tokens, sampling, branches, .. } = options;
        if max_tokens == 0 {
            return Err(Error::argument("0 tokens to generate; at least 1 is needed"));
        }
        if prompt.is_empty() || prompt.len() > cache.capacity() || cache.rows() == 0 {
            return Err(Error::argument(format!(
                "a prompt of {} tokens for a cache of {} rows of {}; the prompt has at least 1 token, and fits a row",
                prompt.len(),
                cache.rows(),
                cache.capacity()
            )));
        }
        if branches > 1 {
            cache.check_gaps_close().map_err(|e| e.context(format!("{branches} branches of guesses")))?;
        }
        cache.reset(0);
        Ok(Self {
            decoder,
            cache,
            scratch: Scratch::default(),
            options,
            sampler: Sampler::new(sampling)?,
            draft: None,
            text: prompt.to_vec(),
            prompt: prompt.len(),
            finish: None,
            statistics: SpeculationStatistics::default(),
        })
    }

    /// Lets a smaller model guess, which numbers the same tokens in the same way ([`check_vocabularies`]). It reads the
    /// text in the first row of a cache of its own, which is as the model's; one that is too short for the text ends the
    /// guesses, not the text.
    pub fn draft(mut self, decoder: &'a Decoder, mut cache: Cache) -> Result<Self> {
        if cache.rows() == 0 {
            return Err(Error::argument("a cache of 0 rows for the draft; it needs 1"));
        }
        if self.options.branches > 1 {
            cache.check_gaps_close().map_err(|e| e.context("branches of the draft"))?;
        }
        cache.reset(0);
        self.draft = Some(Draft::new(decoder, cache, self.options.sampling, self.decoder.config().vocab)?);
        Ok(self)
    }

    /// Computes the prompt, or verifies guesses in one pass; returns the new tokens, at least one unless the text has
    /// ended. A token that ends the text is one of them.
    ///
    /// After an error, the text has ended.
    pub fn step(&mut self) -> Result<Vec<u32>> {
        if self.finish.is_some() {
            return Ok(Vec::new());
        }
        let new = match self.statistics.tokens {
            0 => self.prefill(&mut |_| ()),
            _ => self.verify(),
        };
        if let Err(e) = &new {
            self.finish = Some(Finish::Error(e.to_string()));
        }
        new
    }

    /// Computes the prompt and returns the first token, if [`Self::step`] has not done so; `progress` receives the number of
    /// the prompt's tokens done.
    pub fn prefill(&mut self, progress: &mut dyn FnMut(usize)) -> Result<Vec<u32>> {
        if self.statistics.tokens > 0 {
            return Ok(Vec::new());
        }
        self.cache.reset(0);
        let (mut logits, chunk) = (Vec::new(), self.cache.chunk());
        let prompt = self.text.clone();
        for (i, ids) in prompt.chunks(chunk).enumerate() {
            let last = i == (prompt.len() - 1) / chunk;
            let wanted = if last { Logits::Last } else { Logits::None };
            logits = self.decoder.forward(&mut self.cache, &mut self.scratch, 0, &[ids], wanted)?;
            progress(self.cache.len(0));
        }
        let token = self.sampler.sample(&logits)?;
        Ok(self.extend(vec![token]))
    }

    /// Why the text has ended.
    pub fn finish(&self) -> Option<&Finish> {
        self.finish.as_ref()
    }

    /// The generated tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.text[self.prompt..]
    }

    /// What guesses were good for so far.
    pub fn statistics(&self) -> SpeculationStatistics {
        self.statistics
    }

    /// The cache of the model.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    fn verify(&mut self) -> Result<Vec<u32>> {
        let base = self.text.len() - 1;
        // The last token of the text needs room, and a pass yields one token more than guesses.
        let room = self.cache.room(0).min(self.cache.chunk()).saturating_sub(1);
        let left = self.options.max_tokens - self.statistics.tokens;
        let tree = self.guess(left.saturating_sub(1), room)?;

        let mut order = vec![0];
        order.extend(1..=tree.len());
        let mut tokens = vec![self.text[base]];
        tokens.extend((1..=tree.len()).filter_map(|node| tree.token(node)));
        let bits = tree.bits(&order, order.len(), base);
        let logits = self.decoder.forward_tree(&mut self.cache, &mut self.scratch, 0, &tokens, &bits.pass(base))?;
        let vocab = self.decoder.config().vocab;
        let (path, next) = accept::accept(&tree, &logits, vocab, &mut self.sampler)?;

        let kept: Vec<usize> = std::iter::once(0).chain(path.iter().copied()).map(|node| base + node).collect();
        self.decoder.keep(&mut self.cache, 0, base, &kept)?;
        if let Some(draft) = &mut self.draft {
            draft.accepted(&tree, &path)?;
        }
        self.statistics.passes += 1;
        self.statistics.guesses += tree.len();
        let mut new: Vec<u32> = path.iter().filter_map(|&node| tree.token(node)).collect();
        new.push(next);
        let new = self.extend(new);
        self.statistics.held += path.len().min(new.len());
        Ok(new)
    }

    fn guess(&mut self, most_ahead: usize, most: usize) -> Result<GuessTree> {
        let SpeculationOptions { ahead, branches, lookup, .. } = self.options;
        let ahead = ahead.min(most_ahead);
        let mut tree = lookup::guess(&self.text, lookup, ahead, branches);
        tree.truncate(most);
        match &mut self.draft {
            Some(draft) if tree.is_empty() => draft.guess(&self.text, ahead, branches, most),
            _ => Ok(tree),
        }
    }

    /// Appends tokens up to the end of the text, and returns those that count.
    fn extend(&mut self, mut new: Vec<u32>) -> Vec<u32> {
        let eos = &self.decoder.config().eos;
        if let Some(end) = new.iter().position(|token| eos.contains(token)) {
            new.truncate(end + 1);
            self.finish = Some(Finish::Eos);
        }
        self.text.extend_from_slice(&new);
        self.statistics.tokens += new.len();
        if self.finish.is_none() {
            if self.statistics.tokens >= self.options.max_tokens {
                self.finish = Some(Finish::MaxTokens);
            } else if self.text.len() > self.cache.capacity() {
                self.finish = Some(Finish::Full);
            }
        }
        new
    }
}
