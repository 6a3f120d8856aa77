//! Several requests over one cache: each has a row (a slot) while it runs, and all of them advance together.
//!
//! A prompt enters a free slot in passes of its own, while the other slots wait; then every [`Slots::step`] feeds the last
//! token of every running request in one pass, so that the weights are read once for all of them. A request that ends
//! leaves its slot at once, and the next prompt may take it: nothing of the old one has to be cleared, for what lies beyond
//! a row's length is never read.

use super::cache::Cache;
use super::decoder::{Decoder, Logits, Scratch};
use super::error::{Error, Result};
use super::sampling::{Sampler, SamplerOptions};
use crate::DType;

/// Prompt tokens in one pass. More would not make a pass more efficient, and its activations larger.
pub const PREFILL_CHUNK: usize = 512;

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
        })
    }

    /// Whether to empty the cache before every step and feed the whole sequence again.
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
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
        if n == 0 || n > self.cache.capacity() {
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
        for chunk in ids.chunks(PREFILL_CHUNK) {
            done += chunk.len();
            let want = if done == ids.len() { Logits::Last } else { Logits::None };
            logits = self.decoder.forward(&mut self.cache, &mut self.scratch, slot, &[chunk], want)?;
            progress(done);
        }
        Ok(logits)
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
        } else if running.ids.len() > self.cache.capacity() {
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
