//! Several requests over one cache. Each occupies a row (a slot) while it runs, and all advance together.
//!
//! Requests wait in a queue until a slot is free. A prompt enters its slot in chunks, between the steps of the requests
//! that run already. Every [`Scheduler::step`] feeds the last token of every running request in one pass, so that the
//! weights are read once for all of them, and then a chunk of the prompts. A request that ends frees its slot at once.
//! The next prompt can take it without clearing it, because slots beyond a row's length are never read.
//!
//! A request does not depend on its neighbours. Attention computes a row to the bit as it computes it alone, and every
//! prompt has passes of its own; the linear layers do so up to the number of rows that [`Matrix`](super::Matrix) names,
//! and up to rounding above it. An error ends the request that it belongs to.
//!
//! A sequence ends when its row is full, unless [`Scheduler::streaming`] allows it to continue. Then tokens after the
//! first few are forgotten, many at a time, and positions stay within the model's context.

mod request;
mod stops;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use request::{Event, Finish, Logprobs, Overlong, Request, RequestId};

use self::stops::StopStrings;
use super::cache::{Cache, Formats};
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};
use super::sampling::Sampler;
use super::tokenizer::{TextStream, Tokenizer};

/// How sequences continue beyond their cache (StreamingLLM, <https://arxiv.org/abs/2309.17453>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Streaming {
    /// The first tokens, which are kept because attention puts weight on them whatever they contain.
    pub sinks: usize,
    /// The number of most recent tokens, its own included, that every token sees at least.
    pub window: usize,
}

impl Streaming {
    /// Keeps the first four tokens and the last `window`.
    pub fn new(window: usize) -> Self {
        Self { sinks: 4, window }
    }

    /// Sets [`sinks`](field@Self::sinks).
    #[must_use]
    pub fn sinks(mut self, sinks: usize) -> Self {
        self.sinks = sinks;
        self
    }

    /// The capacity that a row should have, at most `context`: the tokens that are kept and a quarter of the window.
    /// With it a key moves, and is rounded again, at most five times before it is forgotten itself.
    pub fn capacity(&self, context: usize) -> usize {
        let kept = self.sinks.saturating_add(self.window);
        kept.saturating_add(self.window.div_ceil(4)).min(context)
    }

    /// Checks that rows of `capacity` tokens hold what is kept.
    pub fn check(&self, capacity: usize) -> Result<()> {
        let Self { sinks, window } = *self;
        if window == 0 {
            return Err(Error::argument("a window of 0 tokens; at least 1 is needed"));
        }
        if sinks.checked_add(window).is_none_or(|kept| kept > capacity) {
            return Err(Error::argument(format!(
                "a window of {window} tokens after the first {sinks}, but only {capacity} fit into the cache"
            )));
        }
        Ok(())
    }
}

/// A prompt in a cache of its own, and the logits after it: it can be computed anywhere and then join a [`Scheduler`].
#[derive(Debug)]
pub struct Prefilled {
    /// One row with all tokens.
    cache: Cache,
    logits: Vec<f32>,
    tokens: Vec<u32>,
}

impl Prefilled {
    /// Computes a prompt of at least one token.
    pub fn new(decoder: &Decoder, tokens: impl Into<Vec<u32>>, formats: impl Into<Formats>) -> Result<Self> {
        let tokens = tokens.into();
        if tokens.is_empty() {
            return Err(Error::argument("a prompt of 0 tokens; at least 1 is needed"));
        }
        let mut cache = Cache::new(decoder.config(), 1, tokens.len(), formats)?;
        let logits = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&tokens], Logits::Last)?;
        Ok(Self { cache, logits, tokens })
    }

    /// The prompt's tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The logits after the last token.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }
}

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

/// What all samples of a request share.
#[derive(Debug)]
struct Shared {
    request: Request,
    /// The number to add to each logit; absent if no token has one.
    bias: Option<Vec<f32>>,
}

/// A request, or the rest of its samples, that waits for a slot.
#[derive(Debug)]
struct Waiting {
    id: RequestId,
    shared: Arc<Shared>,
    /// The first sample that has no slot yet.
    sample: usize,
    /// The prompt, if it is computed already.
    prefilled: Option<Prefilled>,
}

/// The text of a sample.
struct Text<'a> {
    /// Taken at the end.
    stream: Option<TextStream<'a>>,
    stops: StopStrings,
}

/// A sample in a slot.
struct Sequence<'a> {
    id: RequestId,
    sample: usize,
    shared: Arc<Shared>,
    /// The prompt and the generated tokens.
    ids: Vec<u32>,
    /// The number of tokens of the prompt that were fed.
    fed: usize,
    generated: usize,
    sampler: Sampler,
    text: Option<Text<'a>>,
}

impl Sequence<'_> {
    fn prompt_len(&self) -> usize {
        self.shared.request.prompt.len()
    }

    /// Whether the first token is still to come.
    fn is_prefilling(&self) -> bool {
        self.generated == 0
    }

    /// Ends the text: incomplete characters become replacement characters, and nothing is held back.
    fn rest_of_text(&mut self) -> Result<String> {
        let Some(Text { stream, stops }) = &mut self.text else { return Ok(String::new()) };
        let Some(stream) = stream.take() else { return Ok(String::new()) };
        let (text, stopped) = stops.push(&stream.finish()?);
        Ok(if stopped { text } else { text + &stops.finish() })
    }
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
        let cache = Cache::new(decoder.config(), slots, capacity, formats)?;
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
            streaming.check(self.cache.capacity())?;
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
        if request.samples == 0 {
            return Err(Error::argument("0 samples; at least 1 is needed"));
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

    /// Frees a slot.
    fn vacate(&mut self, slot: usize) -> Option<Sequence<'a>> {
        let sequence = self.slots[slot].take()?;
        // A row that has forgotten tokens is no prefix of any prompt.
        if self.reuse && self.streaming.is_none() {
            self.retained[slot] = sequence.ids[..self.cache.len(slot).min(sequence.ids.len())].to_vec();
        }
        Some(sequence)
    }

    /// The free slot for a prompt: that whose row shares most tokens with it, otherwise the first. Returns the number of
    /// tokens that the row shares too; it holds no others.
    fn slot_for(&mut self, prompt: &[u32]) -> Option<(usize, usize)> {
        let shared = |row: &[u32]| row.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let free = (0..self.slots.len()).filter(|&i| self.slots[i].is_none());
        let (slot, shared) = free.map(|i| (i, shared(&self.retained[i]))).rev().max_by_key(|&(_, n)| n)?;
        self.retained[slot] = Vec::new();
        // The last token is always computed, for its logits. A ring may not go back far enough.
        let kept = shared.min(prompt.len() - 1);
        if kept == 0 || self.cache.truncate(slot, kept).is_err() {
            self.cache.reset(slot);
            return Some((slot, 0));
        }
        Some((slot, kept))
    }

    /// A sample at its beginning.
    fn sequence(&self, id: RequestId, shared: &Arc<Shared>, sample: usize) -> Result<Sequence<'a>> {
        let request = &shared.request;
        let mut options = request.sampling;
        options.seed = options.seed.wrapping_add(sample as u64);
        let text = |tokenizer: &'a Tokenizer| Text {
            stream: Some(tokenizer.stream()),
            stops: StopStrings::new(&request.stop),
        };
        Ok(Sequence {
            id,
            sample,
            shared: shared.clone(),
            ids: request.prompt.clone(),
            fed: 0,
            generated: 0,
            sampler: Sampler::new(options)?,
            text: self.tokenizer.map(text),
        })
    }

    /// Moves requests from the queue to free slots.
    fn admit(&mut self) {
        while let Some(mut waiting) = self.queue.pop_front() {
            let prompt = if waiting.prefilled.is_some() { &[0][..] } else { &waiting.shared.request.prompt[..] };
            let Some((slot, kept)) = self.slot_for(prompt) else { return self.queue.push_front(waiting) };
            let seated = self.sequence(waiting.id, &waiting.shared, waiting.sample).and_then(|sequence| {
                if let Some(prefilled) = &mut waiting.prefilled {
                    self.decoder.insert(&mut self.cache, slot, &mut prefilled.cache, 0)?;
                }
                Ok(sequence)
            });
            let mut sequence = match seated {
                Ok(sequence) => sequence,
                Err(e) => {
                    self.end_waiting(&waiting, Finish::Error(e.to_string()));
                    continue;
                }
            };
            let Some(prefilled) = waiting.prefilled.take() else {
                // The other samples follow when the prompt is computed.
                sequence.fed = kept;
                self.slots[slot] = Some(sequence);
                continue;
            };
            sequence.fed = sequence.ids.len();
            self.slots[slot] = Some(sequence);
            let mut logits = prefilled.logits.clone();
            self.choose(slot, &mut logits);
            waiting.sample += 1;
            if waiting.sample < waiting.shared.request.samples {
                waiting.prefilled = Some(prefilled);
                self.queue.push_front(waiting);
            }
        }
    }

    /// Feeds the last token of every running sequence.
    fn decode(&mut self) {
        let is_active = |slot: &Option<Sequence>| slot.as_ref().is_some_and(|s| !s.is_prefilling());
        let active: Vec<usize> = (0..self.slots.len()).filter(|&i| is_active(&self.slots[i])).collect();
        if active.is_empty() {
            return;
        }
        let start = Instant::now();
        self.statistics.steps += 1;
        if self.recompute {
            for slot in active {
                let ids = self.slots[slot].as_ref().map(|s| s.ids.clone()).unwrap_or_default();
                let logits = self.feed_again(slot, &ids);
                self.chosen_or_failed(slot, logits);
            }
        } else {
            let mut rows = Vec::with_capacity(active.len());
            for slot in active {
                if let Err(e) = self.make_room(slot) {
                    self.fail(slot, &e);
                } else if let Some(last) = self.slots[slot].as_ref().and_then(|s| s.ids.last()) {
                    rows.push((slot, [*last]));
                }
            }
            let list: Vec<(usize, &[u32])> = rows.iter().map(|(slot, id)| (*slot, &id[..])).collect();
            match self.decoder.forward_rows(&mut self.cache, &mut self.scratch, &list, Logits::Last) {
                Ok(mut logits) => {
                    for ((slot, _), logits) in list.iter().zip(logits.chunks_exact_mut(self.decoder.config().vocab)) {
                        self.statistics.decode_tokens += 1;
                        self.choose(*slot, logits);
                    }
                }
                // No row has advanced: find out which one it is.
                Err(_) => {
                    for &(slot, id) in &list {
                        let (cache, scratch) = (&mut self.cache, &mut self.scratch);
                        let logits = self.decoder.forward_rows(cache, scratch, &[(slot, id)], Logits::Last);
                        self.chosen_or_failed(slot, logits);
                    }
                }
            }
        }
        self.statistics.decode += start.elapsed();
    }

    fn chosen_or_failed(&mut self, slot: usize, logits: Result<Vec<f32>>) {
        match logits {
            Ok(mut logits) => {
                self.statistics.decode_tokens += 1;
                self.choose(slot, &mut logits);
            }
            Err(e) => self.fail(slot, &e),
        }
    }

    /// Feeds up to a chunk of the prompts in slots, each prompt in passes of its own, the oldest request first.
    fn prefill(&mut self) {
        let start = Instant::now();
        let mut budget = self.prefill_chunk;
        loop {
            let prefilling = |&i: &usize| self.slots[i].as_ref().is_some_and(Sequence::is_prefilling);
            let oldest = (0..self.slots.len()).filter(prefilling).min_by_key(|&i| self.slots[i].as_ref().map(|s| s.id));
            let Some(slot) = oldest else { break };
            if let Err(e) = self.make_room(slot) {
                self.fail(slot, &e);
                continue;
            }
            let Some(sequence) = &self.slots[slot] else { break };
            let (fed, len) = (sequence.fed, sequence.prompt_len());
            // The decoder reports a row without room for one token.
            let n = (len - fed).min(self.prefill_chunk).min(self.cache.room(slot)).max(1);
            // A prompt is cut at the same places whatever else there is.
            if n > budget {
                break;
            }
            budget -= n;
            match self.feed_chunk(slot, fed..fed + n, fed + n == len) {
                Ok(logits) if fed + n == len => self.begin(slot, &logits),
                Ok(_) => (),
                Err(e) => self.fail(slot, &e),
            }
        }
        if budget < self.prefill_chunk {
            self.statistics.prefill += start.elapsed();
        }
    }

    /// Feeds tokens of a prompt. Returns the logits after the last one, if they are wanted.
    fn feed_chunk(&mut self, slot: usize, chunk: Range<usize>, wanted: bool) -> Result<Vec<f32>> {
        let Some(sequence) = &mut self.slots[slot] else { return Ok(Vec::new()) };
        let want = if wanted { Logits::Last } else { Logits::None };
        let rows = [(slot, &sequence.ids[chunk.clone()])];
        let logits = self.decoder.forward_rows(&mut self.cache, &mut self.scratch, &rows, want)?;
        sequence.fed = chunk.end;
        self.statistics.prompt_tokens += chunk.len();
        Ok(logits)
    }

    /// Empties a row, fills it with tokens and returns the last one's logits.
    fn feed_again(&mut self, slot: usize, ids: &[u32]) -> Result<Vec<f32>> {
        self.cache.reset(slot);
        let mut logits = Vec::new();
        let mut done = 0;
        while done < ids.len() {
            self.make_room(slot)?;
            let n = (ids.len() - done).min(self.prefill_chunk).min(self.cache.room(slot)).max(1);
            let want = if done + n == ids.len() { Logits::Last } else { Logits::None };
            let rows = [(slot, &ids[done..done + n])];
            logits = self.decoder.forward_rows(&mut self.cache, &mut self.scratch, &rows, want)?;
            done += n;
        }
        Ok(logits)
    }

    /// Forgets the tokens between the sink tokens and the window, if a row is full and may continue.
    fn make_room(&mut self, slot: usize) -> Result<()> {
        let (Some(Streaming { sinks, window }), 0) = (self.streaming, self.cache.room(slot)) else { return Ok(()) };
        // The window includes the token to come.
        let span = sinks..self.cache.len(slot) - (window - 1);
        self.decoder.evict(&mut self.cache, slot, span.clone())?;
        self.statistics.evicted += span.len();
        Ok(())
    }

    /// A prompt is computed: its samples begin, those that find a free slot now, the others when one becomes free.
    fn begin(&mut self, slot: usize, logits: &[f32]) {
        let Some(first) = &self.slots[slot] else { return };
        let (id, shared) = (first.id, first.shared.clone());
        let samples = shared.request.samples;
        let free = (0..self.slots.len()).filter(|&i| self.slots[i].is_none()).take(samples - 1);
        let copies: Vec<usize> = free.collect();
        let seated = 1 + copies.len();
        if samples > 1
            && let Err(e) = self.copy_prompt(slot, &copies, samples - seated, logits)
        {
            for sample in 1..samples {
                self.report(id, sample, Finish::Error(e.to_string()));
            }
            return self.choose(slot, &mut logits.to_vec());
        }
        self.choose(slot, &mut logits.to_vec());
        for (sample, slot) in (1..).zip(copies) {
            match self.sequence(id, &shared, sample) {
                Ok(mut sequence) => {
                    sequence.fed = sequence.ids.len();
                    self.slots[slot] = Some(sequence);
                    self.choose(slot, &mut logits.to_vec());
                }
                Err(e) => self.report(id, sample, Finish::Error(e.to_string())),
            }
        }
    }

    /// Copies a computed prompt to other slots, and aside for the `left` samples that find none.
    fn copy_prompt(&mut self, slot: usize, copies: &[usize], left: usize, logits: &[f32]) -> Result<()> {
        let len = self.cache.len(slot);
        copies.iter().for_each(|&slot| self.retained[slot].clear());
        self.decoder.copy_prefix(&mut self.cache, slot, copies, len)?;
        let Some(first) = self.slots[slot].as_ref().filter(|_| left > 0) else { return Ok(()) };
        let mut cache = Cache::with_chunk(self.decoder.config(), 1, len, self.cache.chunk(), self.cache.formats())?;
        self.decoder.insert(&mut cache, 0, &mut self.cache, slot)?;
        let prefilled = Some(Prefilled { cache, logits: logits.to_vec(), tokens: first.shared.request.prompt.clone() });
        let (id, shared, sample) = (first.id, first.shared.clone(), first.shared.request.samples - left);
        self.queue.push_front(Waiting { id, shared, sample, prefilled });
        Ok(())
    }

    /// Chooses the next token of a sequence, whose logits are biased in place, and reports it.
    fn choose(&mut self, slot: usize, logits: &mut [f32]) {
        match self.choice(slot, logits) {
            Ok(event) => {
                if event.finish.is_some() {
                    self.vacate(slot);
                }
                self.events.push(event);
            }
            Err(e) => self.fail(slot, &e),
        }
    }

    fn choice(&mut self, slot: usize, logits: &mut [f32]) -> Result<Event> {
        let Some(sequence) = &mut self.slots[slot] else {
            return Err(Error::argument(format!("slot {slot} is free")));
        };
        let request = &sequence.shared.request;
        if let Some(bias) = &sequence.shared.bias {
            logits.iter_mut().zip(bias).for_each(|(l, b)| *l += b);
        }
        let token = sequence.sampler.sample(logits)?;
        let logprobs = request.logprobs.map(|k| logprobs(logits, token, k));
        sequence.ids.push(token);
        sequence.generated += 1;
        let ends_text = if self.decoder.config().eos.contains(&token) {
            Some(Finish::Eos)
        } else if request.stop_tokens.contains(&token) {
            Some(Finish::Stop)
        } else {
            None
        };
        let is_full = sequence.ids.len() > self.cache.capacity() && self.streaming.is_none();
        let (mut text, mut stopped) = (String::new(), false);
        if ends_text.is_none()
            && let Some(Text { stream: Some(stream), stops }) = &mut sequence.text
        {
            (text, stopped) = stops.push(&stream.push(token)?);
        }
        let finish = ends_text
            .or(stopped.then_some(Finish::Stop))
            .or((sequence.generated >= request.max_tokens).then_some(Finish::MaxTokens))
            .or(is_full.then_some(Finish::Full));
        if finish.is_some() && !stopped {
            text += &sequence.rest_of_text()?;
        }
        let (request, sample) = (sequence.id, sequence.sample);
        Ok(Event { request, sample, token: Some(token), text, logprobs, finish })
    }

    /// Ends a sequence by an error.
    fn fail(&mut self, slot: usize, error: &Error) {
        if let Some(sequence) = self.vacate(slot) {
            self.end_without_token(sequence, Finish::Error(error.to_string()));
        }
    }

    fn end_without_token(&mut self, mut sequence: Sequence, finish: Finish) {
        let text = sequence.rest_of_text().unwrap_or_default();
        let (id, sample) = (sequence.id, sequence.sample);
        self.events.push(Event { text, ..Event::end(id, sample, finish.clone()) });
        // The samples that wait for the rest of this prompt end with it.
        if sequence.fed < sequence.prompt_len() {
            for sample in sample + 1..sequence.shared.request.samples {
                self.report(id, sample, finish.clone());
            }
        }
    }

    fn end_waiting(&mut self, waiting: &Waiting, finish: Finish) {
        for sample in waiting.sample..waiting.shared.request.samples {
            self.report(waiting.id, sample, finish.clone());
        }
    }

    fn report(&mut self, id: RequestId, sample: usize, finish: Finish) {
        self.events.push(Event::end(id, sample, finish));
    }
}

/// The log-softmax of logits without NaN: at `token`, and at the `k` largest.
fn logprobs(logits: &[f32], token: u32, k: usize) -> Logprobs {
    let most = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
    let sum: f64 = logits.iter().map(|&l| f64::from(l - most).exp()).sum();
    let at = |id: u32| (f64::from(logits[id as usize] - most) - sum.ln()) as f32;
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if k > 0 && k < ids.len() {
        ids.select_nth_unstable_by(k - 1, order);
    }
    ids.truncate(k);
    ids.sort_unstable_by(order);
    Logprobs { chosen: at(token), top: ids.into_iter().map(|id| (id, at(id))).collect() }
}
