//! Sequences that go on beyond their row.

use crate::driver::error::{Error, Result};
use crate::driver::model::ModelConfig;

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

    /// The capacity that a row should have, at most `context`: the tokens that are kept and a quarter of the window, so that
    /// a token moves at most five times before it is forgotten itself.
    pub fn capacity(&self, context: usize) -> usize {
        let kept = self.sinks.saturating_add(self.window);
        kept.saturating_add(self.window.div_ceil(4)).min(context)
    }

    /// Checks that the model can forget tokens, and that rows of `capacity` tokens hold what is kept.
    pub fn check(&self, config: &ModelConfig, capacity: usize) -> Result<()> {
        let Self { sinks, window } = *self;
        if let Some(n) = config.layers.iter().find_map(|l| l.window) {
            return Err(Error::unsupported(format!(
                "forgetting tokens of a model with layers that see {n} positions only"
            )));
        }
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
