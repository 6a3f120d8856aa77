//! Several requests over one cache. Each occupies a row (a slot) while it runs, and all advance together.
//!
//! A prompt enters a free slot in passes of its own, while the other slots wait. Then every [`Slots::step`] feeds the
//! last token of every running request in one pass, so that the weights are read once for all requests. A request that
//! ends frees its slot at once. The next prompt can take it without clearing it, because slots beyond a row's length
//! are never read.
//!
//! A sequence ends when its row is full, unless [`Slots::streaming`] allows it to continue. Then tokens after the
//! first few are forgotten, many at a time, and positions stay within the model's context.

use super::cache::{Cache, Formats};
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};
use super::sampling::{Sampler, SamplerOptions};

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplerOptions,
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model chose a token that ends a text.
    Eos,
    /// The request's limit is reached.
    MaxTokens,
    /// The cache has no room for another token.
    Full,
}

/// How sequences continue beyond their cache (StreamingLLM, <https://arxiv.org/abs/2309.17453>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streaming {
    /// The first tokens, which are kept because attention puts weight on them whatever they contain.
    pub sinks: usize,
    /// The number of most recent tokens, its own included, that every token sees at least.
    pub window: usize,
}

impl Streaming {
    /// The capacity that a row should have, at most `context`: the tokens that are kept and a quarter of the window.
    /// With it a key moves, and is rounded again, at most five times before it is forgotten itself.
    pub fn capacity(&self, context: usize) -> usize {
        let kept = self.sinks.saturating_add(self.window);
        kept.saturating_add(self.window.div_ceil(4)).min(context)
    }
}

/// A token of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The slot of the request; free again if `finish` is set.
    pub slot: usize,
    /// The token. A token that ends a text is reported too.
    pub token: u32,
    /// Set if this was the request's last token.
    pub finish: Option<Finish>,
}

#[derive(Debug)]
struct Running {
    /// The prompt and the generated tokens; the last one is not in the cache yet.
    ids: Vec<u32>,
    left: usize,
    sampler: Sampler,
}

/// Requests in slots.
#[derive(Debug)]
pub struct Slots<'a> {
    decoder: &'a Decoder,
    cache: Cache,
    scratch: Scratch,
    slots: Vec<Option<Running>>,
    /// Whether every step starts from an empty cache, to measure what a cache saves.
    recompute: bool,
    streaming: Option<Streaming>,
    /// The number of tokens forgotten so far, over all requests.
    evicted: usize,
}

impl<'a> Slots<'a> {
    /// `slots` requests at a time, of up to `capacity` tokens each, prompt included.
    pub fn new(decoder: &'a Decoder, slots: usize, capacity: usize, formats: impl Into<Formats>) -> Result<Self> {
        if slots == 0 {
            return Err(Error::argument("0 slots for requests; at least 1 is needed"));
        }
        Ok(Self {
            decoder,
            cache: Cache::new(decoder.config(), slots, capacity, formats)?,
            scratch: Scratch::default(),
            slots: (0..slots).map(|_| None).collect(),
            recompute: false,
            streaming: None,
            evicted: 0,
        })
    }

    /// Sets whether every step empties the cache and feeds the whole sequence again.
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// Sets whether sequences continue when their row is full, and which tokens they keep.
    pub fn streaming(mut self, streaming: Option<Streaming>) -> Result<Self> {
        if let Some(Streaming { sinks, window }) = streaming {
            let capacity = self.cache.capacity();
            if window == 0 || sinks.checked_add(window).is_none_or(|kept| kept > capacity) {
                return Err(Error::argument(format!(
                    "a window of {window} tokens after the first {sinks}; the window is at least 1, and both must fit \
                     the {capacity} positions there are"
                )));
            }
        }
        self.streaming = streaming;
        Ok(self)
    }

    /// The number of tokens forgotten so far, over all requests.
    pub fn evicted(&self) -> usize {
        self.evicted
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// A free slot.
    pub fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// The number of requests that have not ended.
    pub fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Puts a request into a free slot, feeds its prompt, and chooses its first token. `progress` receives the number
    /// of prompt tokens done.
    pub fn insert(&mut self, request: Request, progress: &mut dyn FnMut(usize)) -> Result<Event> {
        let Some(slot) = self.free_slot() else {
            return Err(Error::argument(format!("all {} slots are taken", self.slots.len())));
        };
        let n = request.prompt.len();
        if n == 0 || (n > self.cache.capacity() && self.streaming.is_none()) {
            return Err(Error::argument(format!("a prompt of {n} tokens; 1 to {} fit", self.cache.capacity())));
        }
        if request.max_tokens == 0 {
            return Err(Error::argument("0 tokens to generate; at least 1 is needed"));
        }
        let sampler = Sampler::new(request.sampling)?;
        let logits = self.feed(slot, &request.prompt, progress)?;
        self.slots[slot] = Some(Running { ids: request.prompt, left: request.max_tokens, sampler });
        self.choose(slot, &logits)
    }

    /// Generates one token for every running request.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let active: Vec<usize> = (0..self.slots.len()).filter(|&i| self.slots[i].is_some()).collect();
        if self.recompute {
            return active.into_iter().map(|slot| self.step_from_nothing(slot)).collect();
        }
        let (Some(&first), Some(&last)) = (active.first(), active.last()) else { return Ok(Vec::new()) };
        active.iter().try_for_each(|&slot| self.make_room(slot))?;
        // Free slots between running ones take part with 0 tokens.
        let tokens: Vec<&[u32]> = self.slots[first..=last]
            .iter()
            .map(|slot| slot.as_ref().map_or(&[][..], |r| &r.ids[r.ids.len() - 1..]))
            .collect();
        let logits = self.decoder.forward(&mut self.cache, &mut self.scratch, first, &tokens, Logits::Last)?;
        let vocab = self.decoder.config().vocab;
        active.into_iter().zip(logits.chunks_exact(vocab)).map(|(slot, logits)| self.choose(slot, logits)).collect()
    }

    fn step_from_nothing(&mut self, slot: usize) -> Result<Event> {
        let ids = self.slots[slot].as_ref().map(|r| r.ids.clone()).unwrap_or_default();
        let logits = self.feed(slot, &ids, &mut |_| ())?;
        self.choose(slot, &logits)
    }

    /// Fills an empty row and returns the last token's logits.
    fn feed(&mut self, slot: usize, ids: &[u32], progress: &mut dyn FnMut(usize)) -> Result<Vec<f32>> {
        self.cache.reset(slot);
        let mut logits = Vec::new();
        let mut done = 0;
        while done < ids.len() {
            self.make_room(slot)?;
            // The decoder reports a row without room for one token.
            let most = self.cache.chunk().min(self.cache.room(slot)).max(1);
            let chunk = &ids[done..ids.len().min(done + most)];
            done += chunk.len();
            let want = if done == ids.len() { Logits::Last } else { Logits::None };
            logits = self.decoder.forward(&mut self.cache, &mut self.scratch, slot, &[chunk], want)?;
            progress(done);
        }
        Ok(logits)
    }

    /// Forgets the tokens between the sink tokens and the window, if a row is full and may continue.
    fn make_room(&mut self, slot: usize) -> Result<()> {
        let (Some(Streaming { sinks, window }), 0) = (self.streaming, self.cache.room(slot)) else { return Ok(()) };
        // The window includes the token to come.
        let span = sinks..self.cache.len(slot) - (window - 1);
        self.decoder.evict(&mut self.cache, slot, span.clone())?;
        self.evicted += span.len();
        Ok(())
    }

    fn choose(&mut self, slot: usize, logits: &[f32]) -> Result<Event> {
        let Some(running) = &mut self.slots[slot] else {
            return Err(Error::argument(format!("slot {slot} is free")));
        };
        let token = running.sampler.sample(logits)?;
        running.ids.push(token);
        running.left -= 1;
        let finish = if self.decoder.config().eos.contains(&token) {
            Some(Finish::Eos)
        } else if running.left == 0 {
            Some(Finish::MaxTokens)
        } else if running.ids.len() > self.cache.capacity() && self.streaming.is_none() {
            Some(Finish::Full)
        } else {
            None
        };
        if finish.is_some() {
            self.slots[slot] = None;
        }
        Ok(Event { slot, token, finish })
    }
}
