//! Several requests over one cache: each has a row (a slot) while it runs, and all of them advance together.
//!
//! A prompt enters a free slot in passes of its own, while the other slots wait; then every [`Slots::step`] feeds the last
//! token of every running request in one pass, so that the weights are read once for all of them. A request that ends
//! leaves its slot at once, and the next prompt may take it: nothing of the old one has to be cleared, for what lies beyond
//! a row's length is never read.
//!
//! A sequence ends where its row is full, unless [`Slots::streaming`] lets it go on: then tokens after the first few are
//! forgotten a span at a time, and positions stay inside of what the model was made for.

use super::cache::Cache;
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};
use super::sampling::{Sampler, SamplerOptions};
use crate::DType;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// How to choose them.
    pub sampling: SamplerOptions,
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model chose a token that ends the text.
    Eos,
    /// The request's limit is reached.
    MaxTokens,
    /// The cache has no room for another token.
    Full,
}

/// How sequences go on past their cache (StreamingLLM, <https://arxiv.org/abs/2309.17453>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streaming {
    /// The first tokens, which are kept: attention leans on them whatever they say.
    pub sinks: usize,
    /// The most recent tokens, itself included, that every token sees at least.
    pub window: usize,
}

impl Streaming {
    /// The tokens that a row should have room for, at most `context`. A quarter of the window more than what is kept lets
    /// a key move, and be rounded anew, five times at most before it is forgotten itself.
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
    /// The token. The one that ends a text is reported too.
    pub token: u32,
    /// Set if this was the request's last token.
    pub finish: Option<Finish>,
}

#[derive(Debug)]
struct Running {
    /// Prompt and what came after it; the last one is not in the cache yet.
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
    /// Every step from an empty cache: the cost that a cache avoids.
    recompute: bool,
    streaming: Option<Streaming>,
    /// Tokens forgotten so far, of all requests.
    evicted: usize,
}

impl<'a> Slots<'a> {
    /// `slots` requests at a time, of up to `capacity` tokens each, prompt included.
    pub fn new(decoder: &'a Decoder, slots: usize, capacity: usize, dtype: DType) -> Result<Self> {
        if slots == 0 {
            return Err(Error::argument("0 slots for requests; at least 1 is needed"));
        }
        Ok(Self {
            decoder,
            cache: Cache::new(decoder.config(), slots, capacity, dtype)?,
            scratch: Scratch::default(),
            slots: (0..slots).map(|_| None).collect(),
            recompute: false,
            streaming: None,
            evicted: 0,
        })
    }

    /// Whether to empty the cache before every step and feed the whole sequence again.
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// Whether sequences go on when their row is full, and what they keep then.
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

    /// Tokens forgotten so far, of all requests.
    pub fn evicted(&self) -> usize {
        self.evicted
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// A slot that no request is in.
    pub fn free_slot(&self) -> Option<usize> {
        self.slots.iter().position(Option::is_none)
    }

    /// The number of requests that have not ended.
    pub fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Puts a request into a free slot, feeds its prompt, and chooses its first token. `progress` hears how many of the
    /// prompt's tokens are done.
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

    /// One more token for every request that has not ended.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let active: Vec<usize> = (0..self.slots.len()).filter(|&i| self.slots[i].is_some()).collect();
        if self.recompute {
            return active.into_iter().map(|slot| self.step_from_nothing(slot)).collect();
        }
        let (Some(&first), Some(&last)) = (active.first(), active.last()) else { return Ok(Vec::new()) };
        active.iter().try_for_each(|&slot| self.make_room(slot))?;
        // Free slots between running ones take part with no token.
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

    /// Fills an emptied row and gives the last token's logits.
    fn feed(&mut self, slot: usize, ids: &[u32], progress: &mut dyn FnMut(usize)) -> Result<Vec<f32>> {
        self.cache.reset(slot);
        let mut logits = Vec::new();
        let mut done = 0;
        while done < ids.len() {
            self.make_room(slot)?;
            // A row without room for one token is the decoder's to refuse.
            let most = self.cache.chunk().min(self.cache.room(slot)).max(1);
            let chunk = &ids[done..ids.len().min(done + most)];
            done += chunk.len();
            let want = if done == ids.len() { Logits::Last } else { Logits::None };
            logits = self.decoder.forward(&mut self.cache, &mut self.scratch, slot, &[chunk], want)?;
            progress(done);
        }
        Ok(logits)
    }

    /// Forgets what is neither sink nor window, if a row is full and may go on.
    fn make_room(&mut self, slot: usize) -> Result<()> {
        let (Some(Streaming { sinks, window }), 0) = (self.streaming, self.cache.room(slot)) else { return Ok(()) };
        // The window's last token is the one to come.
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
