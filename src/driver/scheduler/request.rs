//! What a request asks for, and what it gets: events.

use std::fmt;

use crate::driver::sampling::SamplerOptions;

/// What to generate. [`Request::new`] has the defaults; every field has a setter.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The most tokens to generate, at least 1; 128 by default.
    pub max_tokens: usize,
    /// How to choose tokens. Sample i of several takes the seed plus i.
    pub sampling: SamplerOptions,
    /// The number of independent continuations; 1 by default. The prompt is computed once for all of them.
    pub samples: usize,
    /// Texts that end the continuation. They are not part of it. They need a scheduler with a tokenizer.
    pub stop: Vec<String>,
    /// Tokens that end the continuation, in addition to those of the model.
    pub stop_tokens: Vec<u32>,
    /// Numbers that are added to the logits of tokens, before the temperature; minus infinity forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be chosen; all if absent.
    pub allowed: Option<Vec<u32>>,
    /// Tokens that are never chosen.
    pub forbidden: Vec<u32>,
    /// Reports log-probabilities with each token: of the token and of this number of the most likely ones (0 is allowed).
    pub logprobs: Option<usize>,
    /// What becomes of a prompt that is longer than a row of the cache.
    pub overlong: Overlong,
}

impl Request {
    /// One greedy continuation of up to 128 tokens.
    pub fn new(prompt: impl Into<Vec<u32>>) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens: 128,
            sampling: SamplerOptions::default(),
            samples: 1,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            logit_bias: Vec::new(),
            allowed: None,
            forbidden: Vec::new(),
            logprobs: None,
            overlong: Overlong::Refuse,
        }
    }

    /// Sets [`max_tokens`](field@Self::max_tokens).
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// Sets [`sampling`](field@Self::sampling).
    #[must_use]
    pub fn sampling(mut self, sampling: SamplerOptions) -> Self {
        self.sampling = sampling;
        self
    }

    /// Sets [`samples`](field@Self::samples).
    #[must_use]
    pub fn samples(mut self, samples: usize) -> Self {
        self.samples = samples;
        self
    }

    /// Sets [`stop`](field@Self::stop).
    #[must_use]
    pub fn stop(mut self, stop: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.stop = stop.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`stop_tokens`](field@Self::stop_tokens).
    #[must_use]
    pub fn stop_tokens(mut self, stop_tokens: impl Into<Vec<u32>>) -> Self {
        self.stop_tokens = stop_tokens.into();
        self
    }

    /// Sets [`logit_bias`](field@Self::logit_bias).
    #[must_use]
    pub fn logit_bias(mut self, logit_bias: impl Into<Vec<(u32, f32)>>) -> Self {
        self.logit_bias = logit_bias.into();
        self
    }

    /// Sets [`allowed`](field@Self::allowed).
    #[must_use]
    pub fn allowed(mut self, allowed: impl Into<Vec<u32>>) -> Self {
        self.allowed = Some(allowed.into());
        self
    }

    /// Sets [`forbidden`](field@Self::forbidden).
    #[must_use]
    pub fn forbidden(mut self, forbidden: impl Into<Vec<u32>>) -> Self {
        self.forbidden = forbidden.into();
        self
    }

    /// Sets [`logprobs`](field@Self::logprobs).
    #[must_use]
    pub fn logprobs(mut self, logprobs: usize) -> Self {
        self.logprobs = Some(logprobs);
        self
    }

    /// Sets [`overlong`](field@Self::overlong).
    #[must_use]
    pub fn overlong(mut self, overlong: Overlong) -> Self {
        self.overlong = overlong;
        self
    }
}

/// What becomes of a prompt that is longer than a row of the cache. It does not concern rows that
/// [stream](super::Streaming), which take prompts of any length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Overlong {
    /// The request is refused.
    #[default]
    Refuse,
    /// The last tokens are kept: as many as leave room for the tokens to generate, and at least half a row. All counts
    /// of the request begin after the cut.
    KeepLast,
}

/// Names a request of a scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(super) u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a sample ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// The model chose a token that ends a text.
    Eos,
    /// A stop string or a stop token of the request.
    Stop,
    /// The request's limit is reached.
    MaxTokens,
    /// The cache has no room for another token.
    Full,
    /// [`Scheduler::cancel`](super::Scheduler::cancel).
    Cancelled,
    /// An error of this request, in a sentence. Other requests go on.
    Error(String),
}

impl Finish {
    /// A word for machines: `eos`, `stop`, `max_tokens`, `context`, `cancelled` or `error`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Stop => "stop",
            Self::MaxTokens => "max_tokens",
            Self::Full => "context",
            Self::Cancelled => "cancelled",
            Self::Error(_) => "error",
        }
    }
}

/// Natural logarithms of probabilities: of the softmax of the logits with bias and masks, before temperature, top-k and
/// top-p.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Logprobs {
    /// That of the token that was chosen.
    pub chosen: f32,
    /// The most likely tokens, the most likely first.
    pub top: Vec<(u32, f32)>,
}

/// What happened to one sample of a request: a token, its end, or both.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// The request.
    pub request: RequestId,
    /// The number of the sample, from 0.
    pub sample: usize,
    /// The token, if one was chosen. Tokens that end a text are reported too.
    pub token: Option<u32>,
    /// The text that is final since the last event: empty without a tokenizer, while a character is incomplete, or while the
    /// text may be the beginning of a stop string.
    pub text: String,
    /// Of the token, if the request asks for them.
    pub logprobs: Option<Logprobs>,
    /// Set if this is the sample's last event.
    pub finish: Option<Finish>,
}

impl Event {
    /// The end of a sample without a token.
    pub(super) fn end(request: RequestId, sample: usize, finish: Finish) -> Self {
        Self { request, sample, token: None, text: String::new(), logprobs: None, finish: Some(finish) }
    }
}
