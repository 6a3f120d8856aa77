//! What a step does: requests move to slots, running ones get a token, prompts get a chunk.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::prefilled::Prefilled;
use super::request::{Event, Finish, RequestId};
use super::sequence::{Sequence, Shared, Text, Waiting, logprobs};
use super::stops::StopStrings;
use super::{Scheduler, Streaming};
use crate::driver::decoder::Logits;
use crate::driver::error::{Error, Result};
use crate::driver::sampling::Sampler;
use crate::driver::tokenizer::Tokenizer;

impl<'a> Scheduler<'a> {
    /// Frees a slot.
    pub(super) fn vacate(&mut self, slot: usize) -> Option<Sequence<'a>> {
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
    pub(super) fn admit(&mut self) {
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
    pub(super) fn decode(&mut self) {
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
    pub(super) fn prefill(&mut self) {
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
        // The segment of the keys depends on the capacity.
        let capacity = if self.cache.segment().is_some() { self.cache.capacity() } else { len };
        let mut cache = self.decoder.cache_with_chunk(1, capacity, self.cache.chunk(), self.cache.formats())?;
        if let Some(Streaming { sinks, .. }) = self.streaming {
            cache.keep_sinks(sinks.min(len))?;
        }
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

    pub(super) fn end_without_token(&mut self, mut sequence: Sequence, finish: Finish) {
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

    pub(super) fn end_waiting(&mut self, waiting: &Waiting, finish: Finish) {
        for sample in waiting.sample..waiting.shared.request.samples {
            self.report(waiting.id, sample, finish.clone());
        }
    }

    fn report(&mut self, id: RequestId, sample: usize, finish: Finish) {
        self.events.push(Event::end(id, sample, finish));
    }
}
