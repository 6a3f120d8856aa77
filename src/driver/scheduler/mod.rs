//! Several requests over one cache. Each occupies a row (a slot) while it runs, and all advance together.
//!
//! Requests wait in a queue until a slot is free. A prompt enters its slot in chunks, between the steps of the requests
//! that run already. Every [`Scheduler::step`] feeds the last token of every running request in one pass, so that the
//! weights are read once for all of them, and then a chunk of the prompts. A request that ends frees its slot at once.
//! The next prompt can take it without clearing it, because slots beyond a row's length are never read.
//!
//! A request does not depend on its neighbours. Attention and linear layers of quantised weights compute a row to the bit
//! as they compute it alone, and every prompt has passes of its own. Linear layers of plain floats do so for up to 8 rows,
//! and up to rounding above. An error ends the request that it belongs to.
//!
//! A sequence ends when its row is full, unless [`Scheduler::streaming`] allows it to continue. Then tokens after the
//! first few are forgotten, many at a time, and no token sees another at a distance beyond the model's context.

mod prefilled;
mod request;
mod sequence;
mod steps;
mod stops;
mod streaming;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

pub use prefilled::Prefilled;
pub use request::{Event, Finish, Logprobs, Overlong, Request, RequestId};
pub use streaming::Streaming;

use self::sequence::{Sequence, Shared, Waiting};
use super::cache::{Cache, Formats};
use super::decoder::{Decoder, Scratch};
use super::error::{Error, Result};
use super::sampling::Sampler;
use super::tokenizer::Tokenizer;

/// The most samples of a request, each of which has an end to report.
const MOST_SAMPLES: usize = 1 << 16;

/// What a scheduler has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Tokens of prompts that were computed. A prompt of several samples counts once.
    pub prompt_tokens: usize,
    /// The time they took.
    pub prefill: Duration,
    /// Tokens that were computed after those of prompts.
    pub decode_tokens: usize,
    /// The time they took.
    pub decode: Duration,
    /// The number of decode steps: passes with one token of each running request.
    pub steps: usize,
    /// The number of tokens forgotten, over all requests.
    pub evicted: usize,
}

/// Requests in the slots of one cache, with a queue in front.
///
/// ```
/// use kvlane::driver::{Decoder, Request, Scheduler, Threads, embedded};
/// let file = embedded::open()?;
/// let (tokenizer, threads) = (file.tokenizer()?, Threads::new(1)?);
/// let weights = threads.run(|| file.weights(&|_, _| ()))?;
/// let decoder = Decoder::new(file.config().clone(), weights, 0, None, threads)?;
/// let mut scheduler = Scheduler::new(&decoder, 2, 64, kvlane::DType::F32)?.tokenizer(&tokenizer);
/// for text in ["And God said", "In the beginning", "The LORD"] {
///     scheduler.submit(Request::new(tokenizer.encode(text, true)?).max_tokens(4))?;
/// }
/// let mut ended = 0;
/// while !scheduler.is_idle() {
///     for event in scheduler.step() {
///         ended += usize::from(event.finish.is_some());
///     }
/// }
/// assert_eq!(ended, 3);
/// # Ok::<(), kvlane::driver::Error>(())
/// ```
pub struct Scheduler<'a> {
    decoder: &'a Decoder,
    tokenizer: Option<&'a Tokenizer>,
    cache: Cache,
    scratch: Scratch,
    slots: Vec<Option<Sequence<'a>>>,
    queue: VecDeque<Waiting>,
    next_id: u64,
    events: Vec<Event>,
    /// Whether every step starts from an empty cache, to measure what a cache saves.
    recompute: bool,
    reuse: bool,
    /// The tokens that the row of a free slot still holds, if they may be reused.
    retained: Vec<Vec<u32>>,
    streaming: Option<Streaming>,
    prefill_chunk: usize,
    statistics: Statistics,
}

impl std::fmt::Debug for Scheduler<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scheduler")
            .field("slots", &self.slots.len())
            .field("running", &self.running())
            .field("waiting", &self.queue.len())
            .field("statistics", &self.statistics)
            .finish_non_exhaustive()
    }
}

impl<'a> Scheduler<'a> {
    /// `slots` requests at a time, of up to `capacity` tokens each, prompt included.
    pub fn new(decoder: &'a Decoder, slots: usize, capacity: usize, formats: impl Into<Formats>) -> Result<Self> {
        if slots == 0 {
            return Err(Error::argument("0 slots for requests; at least 1 is needed"));
        }
        let cache = decoder.cache(slots, capacity, formats)?;
        Ok(Self {
            decoder,
            tokenizer: None,
            prefill_chunk: cache.chunk(),
            cache,
            scratch: Scratch::default(),
            slots: (0..slots).map(|_| None).collect(),
            queue: VecDeque::new(),
            next_id: 0,
            events: Vec::new(),
            recompute: false,
            reuse: false,
            retained: vec![Vec::new(); slots],
            streaming: None,
            statistics: Statistics::default(),
        })
    }

    /// Sets the tokenizer, which makes the text of events and finds stop strings.
    #[must_use]
    pub fn tokenizer(mut self, tokenizer: &'a Tokenizer) -> Self {
        self.tokenizer = Some(tokenizer);
        self
    }

    /// Sets whether every step empties the cache and feeds the whole sequence again.
    #[must_use]
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// Sets whether a prompt takes over the tokens that it shares with the row of a free slot, instead of computing them
    /// again: the next turn of a conversation. The tokens of the row may have been computed in other passes, which can
    /// change the last bits of logits.
    #[must_use]
    pub fn reuse(mut self, reuse: bool) -> Self {
        self.reuse = reuse;
        self
    }

    /// Sets the number of prompt tokens between two decode steps: at least 1, at most [`Cache::chunk`], which is the
    /// default. Smaller chunks let running requests wait less, and take more passes.
    pub fn prefill_chunk(mut self, tokens: usize) -> Result<Self> {
        if !(1..=self.cache.chunk()).contains(&tokens) {
            return Err(Error::argument(format!(
                "{tokens} tokens of a prompt in one pass; 1 to {} are possible",
                self.cache.chunk()
            )));
        }
        self.prefill_chunk = tokens;
        Ok(self)
    }

    /// Sets whether sequences continue when their row is full, and which tokens they keep.
    pub fn streaming(mut self, streaming: Option<Streaming>) -> Result<Self> {
        if let Some(streaming) = streaming {
            streaming.check(self.decoder.config(), self.cache.capacity())?;
            self.cache.keep_sinks(streaming.sinks)?;
        }
        self.streaming = streaming;
        Ok(self)
    }

    /// What was done so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The number of slots that are taken.
    pub fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// The number of requests that wait for a slot.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing is running, waiting or left to report.
    pub fn is_idle(&self) -> bool {
        self.running() == 0 && self.queue.is_empty() && self.events.is_empty()
    }

    /// The number of prompt tokens of a request that are computed, and the number of all; `None` once its first token was
    /// generated, and for a request that does not exist.
    pub fn prompt_progress(&self, id: RequestId) -> Option<(usize, usize)> {
        if let Some(waiting) = self.queue.iter().find(|w| w.id == id && w.sample == 0) {
            return Some((0, waiting.shared.request.prompt.len()));
        }
        let prefilling = self.slots.iter().flatten().find(|s| s.id == id && s.is_prefilling());
        prefilling.map(|s| (s.fed, s.prompt_len()))
    }

    /// Puts a request into the queue. A request that cannot be served is an error, and the queue is as it was.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let shared = self.check(request)?;
        Ok(self.enqueue(shared, None))
    }

    /// As [`Self::submit`], for a prompt that is computed already. [`Request::prompt`] is replaced by it.
    pub fn submit_prefilled(&mut self, prefilled: Prefilled, mut request: Request) -> Result<RequestId> {
        let (n, vocab) = (prefilled.logits.len(), self.decoder.config().vocab);
        if n != vocab {
            return Err(Error::argument(format!("a prompt with {n} logits, but the model has {vocab}")));
        }
        let n = prefilled.tokens.len();
        if n > self.cache.capacity() {
            return Err(Error::argument(format!("a prompt of {n} tokens; 1 to {} fit", self.cache.capacity())));
        }
        prefilled.cache.check_rotation(&self.cache)?;
        request.prompt.clone_from(&prefilled.tokens);
        let shared = self.check(request)?;
        Ok(self.enqueue(shared, Some(prefilled)))
    }

    /// Checks a request against the model and the cache; cuts an overlong prompt.
    fn check(&self, mut request: Request) -> Result<Shared> {
        let (n, capacity, vocab) = (request.prompt.len(), self.cache.capacity(), self.decoder.config().vocab);
        if n == 0 || capacity == 0 {
            return Err(Error::argument(format!("a prompt of {n} tokens; 1 to {capacity} fit")));
        }
        if request.max_tokens == 0 {
            return Err(Error::argument("0 tokens to generate; at least 1 is needed"));
        }
        if !(1..=MOST_SAMPLES).contains(&request.samples) {
            return Err(Error::argument(format!("{} samples; 1 to {MOST_SAMPLES} are possible", request.samples)));
        }
        if n > capacity && self.streaming.is_none() {
            match request.overlong {
                Overlong::Refuse => {
                    return Err(Error::argument(format!("a prompt of {n} tokens; 1 to {capacity} fit")));
                }
                Overlong::KeepLast => {
                    // The last generated token needs no room.
                    let room = (capacity + 1).saturating_sub(request.max_tokens);
                    let kept = room.max(capacity.div_ceil(2)).min(capacity);
                    request.prompt.drain(..n - kept);
                }
            }
        }
        Sampler::new(request.sampling)?;
        if request.stop.iter().any(String::is_empty) {
            return Err(Error::argument("a stop string is empty; it needs at least 1 character"));
        }
        if !request.stop.is_empty() && self.tokenizer.is_none() {
            return Err(Error::argument("stop strings need a tokenizer, and this scheduler has none"));
        }
        if let Some(k) = request.logprobs.filter(|&k| k > vocab) {
            return Err(Error::argument(format!("probabilities of {k} tokens; the model has {vocab}")));
        }
        let allowed = request.allowed.iter().flatten();
        let biased = request.logit_bias.iter().map(|(id, _)| id);
        for (what, id) in (request.prompt.iter().map(|id| ("the prompt's", id)))
            .chain(request.stop_tokens.iter().map(|id| ("stop", id)))
            .chain(allowed.clone().map(|id| ("allowed", id)))
            .chain(request.forbidden.iter().map(|id| ("forbidden", id)))
            .chain(biased.map(|id| ("biased", id)))
        {
            if *id as usize >= vocab {
                return Err(Error::argument(format!("{what} token {id} is outside of the {vocab} of this model")));
            }
        }
        if let Some((id, bias)) = request.logit_bias.iter().find(|(_, b)| b.is_nan() || *b == f32::INFINITY) {
            return Err(Error::argument(format!(
                "the bias of token {id} is {bias}; it must be a number or minus infinity"
            )));
        }
        let masked = request.allowed.is_some() || !request.forbidden.is_empty() || !request.logit_bias.is_empty();
        let bias = masked.then(|| {
            let mut bias = vec![if request.allowed.is_some() { f32::NEG_INFINITY } else { 0.0 }; vocab];
            allowed.for_each(|&id| bias[id as usize] = 0.0);
            request.forbidden.iter().for_each(|&id| bias[id as usize] = f32::NEG_INFINITY);
            request.logit_bias.iter().for_each(|&(id, b)| bias[id as usize] += b);
            bias
        });
        if bias.as_ref().is_some_and(|bias| bias.iter().all(|&b| b == f32::NEG_INFINITY)) {
            return Err(Error::argument(format!("none of the {vocab} tokens may be chosen")));
        }
        Ok(Shared { request, bias })
    }

    fn enqueue(&mut self, shared: Shared, prefilled: Option<Prefilled>) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.queue.push_back(Waiting { id, shared: Arc::new(shared), sample: 0, prefilled });
        id
    }

    /// Ends all samples of a request. The next [`step`](Self::step) reports their ends. Returns whether there were any.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        self.cancel_where(|other| other == id)
    }

    /// Ends all requests, as [`cancel`](Self::cancel) does.
    pub fn cancel_all(&mut self) -> bool {
        self.cancel_where(|_| true)
    }

    fn cancel_where(&mut self, which: impl Fn(RequestId) -> bool) -> bool {
        let before = self.events.len();
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|s| which(s.id))
                && let Some(sequence) = self.vacate(slot)
            {
                self.end_without_token(sequence, Finish::Cancelled);
            }
        }
        let (cancelled, kept) = std::mem::take(&mut self.queue).into_iter().partition(|w| which(w.id));
        self.queue = kept;
        let cancelled: VecDeque<Waiting> = cancelled;
        for waiting in cancelled {
            self.end_waiting(&waiting, Finish::Cancelled);
        }
        self.events.len() > before
    }

    /// Generates one token for every running request and computes a chunk of the prompts. Returns what happened since
    /// the last step, in order.
    ///
    /// An error ends the request that it belongs to ([`Finish::Error`]) and no other.
    pub fn step(&mut self) -> Vec<Event> {
        self.admit();
        self.decode();
        self.prefill();
        std::mem::take(&mut self.events)
    }

    /// Steps until nothing is left to do, and returns all events.
    pub fn run(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while !self.is_idle() {
            events.append(&mut self.step());
        }
        events
    }
}
