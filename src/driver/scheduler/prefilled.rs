//! Prompts that were computed elsewhere.

use crate::driver::cache::{Cache, Formats};
use crate::driver::decoder::{Decoder, Logits, Scratch};
use crate::driver::error::{Error, Result};

/// A prompt in a cache of its own, and the logits after it: it can be computed anywhere and then join a [`Scheduler`](super::Scheduler).
#[derive(Debug)]
pub struct Prefilled {
    /// One row with all tokens.
    pub(super) cache: Cache,
    pub(super) logits: Vec<f32>,
    pub(super) tokens: Vec<u32>,
}

impl Prefilled {
    /// Computes a prompt of at least one token.
    pub fn new(decoder: &Decoder, tokens: impl Into<Vec<u32>>, formats: impl Into<Formats>) -> Result<Self> {
        let tokens = tokens.into();
        if tokens.is_empty() {
            return Err(Error::argument("a prompt of 0 tokens; at least 1 is needed"));
        }
        let mut cache = decoder.cache(1, tokens.len(), formats)?;
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
