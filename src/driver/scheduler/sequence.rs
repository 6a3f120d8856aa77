//! Samples that wait and samples that run.

use std::sync::Arc;

use super::prefilled::Prefilled;
use super::request::{Logprobs, Request, RequestId};
use super::stops::StopStrings;
use crate::driver::error::Result;
use crate::driver::sampling::Sampler;
use crate::driver::tokenizer::TextStream;

/// What all samples of a request share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) request: Request,
    /// The number to add to each logit; absent if no token has one.
    pub(super) bias: Option<Vec<f32>>,
}

/// A request, or the rest of its samples, that waits for a slot.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) id: RequestId,
    pub(super) shared: Arc<Shared>,
    /// The first sample that has no slot yet.
    pub(super) sample: usize,
    /// The prompt, if it is computed already.
    pub(super) prefilled: Option<Prefilled>,
}

/// The text of a sample.
pub(super) struct Text<'a> {
    /// Taken at the end.
    pub(super) stream: Option<TextStream<'a>>,
    pub(super) stops: StopStrings,
}

/// A sample in a slot.
pub(super) struct Sequence<'a> {
    pub(super) id: RequestId,
    pub(super) sample: usize,
    pub(super) shared: Arc<Shared>,
    /// The prompt and the generated tokens.
    pub(super) ids: Vec<u32>,
    /// The number of tokens of the prompt that were fed.
    pub(super) fed: usize,
    pub(super) generated: usize,
    pub(super) sampler: Sampler,
    pub(super) text: Option<Text<'a>>,
}

impl Sequence<'_> {
    pub(super) fn prompt_len(&self) -> usize {
        self.shared.request.prompt.len()
    }

    /// Whether the first token is still to come.
    pub(super) fn is_prefilling(&self) -> bool {
        self.generated == 0
    }

    /// Ends the text: incomplete characters become replacement characters, and nothing is held back.
    pub(super) fn rest_of_text(&mut self) -> Result<String> {
        let Some(Text { stream, stops }) = &mut self.text else { return Ok(String::new()) };
        let Some(stream) = stream.take() else { return Ok(String::new()) };
        let (text, stopped) = stops.push(&stream.finish()?);
        Ok(if stopped { text } else { text + &stops.finish() })
    }
}

/// The log-softmax of logits without NaN: at `token`, and at the `k` largest.
pub(super) fn logprobs(logits: &[f32], token: u32, k: usize) -> Logprobs {
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
