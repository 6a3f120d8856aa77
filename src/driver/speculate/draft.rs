//! Guesses of a smaller model, which grow level by level: one pass of the draft per level.

use super::accept::draw;
use super::tree::GuessTree;
use crate::driver::cache::Cache;
use crate::driver::decoder::{Decoder, Logits, Scratch};
use crate::driver::error::{Error, Result};
use crate::driver::sampling::{Sampler, SamplerOptions};
use crate::driver::tokenizer::Tokenizer;

/// The model that guesses, and what it has read.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    decoder: &'a Decoder,
    cache: Cache,
    scratch: Scratch,
    /// The text that the cache holds.
    held: Vec<u32>,
    /// The nodes of the last tree behind it in the cache, in their order.
    fed: Vec<usize>,
    sampler: Sampler,
    /// Whether children are drawn; if not, they are the likeliest.
    draws: bool,
    /// The number of tokens that the model has. A draft may have more, which are never guessed.
    vocab: usize,
}

impl<'a> Draft<'a> {
    /// `sampling` are the options of the text to come, `vocab` the number of tokens of its model.
    pub fn new(decoder: &'a Decoder, cache: Cache, sampling: SamplerOptions, vocab: usize) -> Result<Self> {
        let draws = sampling.temperature > 0.0;
        // Without a temperature the likeliest tokens are guessed, whose probabilities order the branches. The seed
        // differs, because draws that follow the choices of the model would not be independent of them.
        let options = if draws { sampling } else { SamplerOptions::new().temperature(1.0) };
        let sampler = Sampler::new(options.seed(sampling.seed ^ 0x6775_6573_7365_7321))?;
        let scratch = Scratch::default();
        Ok(Self { decoder, cache, scratch, held: Vec::new(), fed: Vec::new(), sampler, draws, vocab })
    }

    /// A tree of at most `most` guesses after a text: up to `branches` per level, up to `ahead` levels. It is empty if the
    /// draft cannot read the text, because it is too long or has tokens that the draft does not have.
    pub fn guess(&mut self, text: &[u32], ahead: usize, branches: usize, most: usize) -> Result<GuessTree> {
        let mut tree = GuessTree::new();
        let vocab = self.decoder.config().vocab;
        // Levels but the last are in the cache, each with the branches of one level.
        let room = self.cache.capacity().saturating_sub(text.len());
        let ahead = ahead.min(room / branches.max(1) + 1).min(most);
        let readable = text.len() <= self.cache.capacity() && text.iter().all(|&id| (id as usize) < vocab);
        if ahead == 0 || branches == 0 || !readable {
            return Ok(tree);
        }
        let mut logits = self.read(text)?;
        // A level's nodes, each with the probability that the draft gives its path.
        let mut level = vec![(0, 1.0)];
        for depth in 1..=ahead {
            let mut next = Vec::new();
            let counts = shares(&level, branches);
            for ((&(node, reached), n), row) in level.iter().zip(counts).zip(logits.chunks_exact(vocab)) {
                let n = n.min(most - tree.len());
                if n == 0 {
                    continue;
                }
                let mut source = self.sampler.distribution(row)?;
                source.retain(|&(token, _)| (token as usize) < self.vocab);
                let sum: f64 = source.iter().map(|(_, p)| p).sum();
                source.iter_mut().for_each(|(_, p)| *p /= sum);
                let tokens = match self.draws {
                    true => draw(&source, n, &mut self.sampler),
                    false => source.iter().take(n).map(|&(token, _)| token).collect(),
                };
                for token in tokens {
                    let probability = source.iter().find(|&&(t, _)| t == token).map_or(0.0, |&(_, p)| p);
                    next.push((tree.push(node, token), reached * probability));
                }
                if self.draws {
                    tree.set_source(node, source);
                }
            }
            if next.is_empty() || depth == ahead || tree.len() == most {
                break;
            }
            let first = self.fed.len();
            self.fed.extend(next.iter().map(|&(node, _)| node));
            let tokens: Vec<u32> = next.iter().filter_map(|&(node, _)| tree.token(node)).collect();
            let bits = tree.bits(&self.fed, self.fed.len() - first, text.len() - 1);
            let pass = bits.pass(text.len());
            logits = self.decoder.forward_tree(&mut self.cache, &mut self.scratch, 0, &tokens, &pass)?;
            level = next;
        }
        Ok(tree)
    }

    /// Keeps what the draft has read of the guesses that hold.
    pub fn accepted(&mut self, tree: &GuessTree, path: &[usize]) -> Result<()> {
        let start = self.held.len();
        let read: Vec<(usize, usize)> =
            path.iter().map_while(|node| Some((*node, self.fed.iter().position(|n| n == node)?))).collect();
        let slots: Vec<usize> = read.iter().map(|(_, i)| start + i).collect();
        self.fed.clear();
        self.decoder.keep(&mut self.cache, 0, start, &slots)?;
        self.held.extend(read.iter().filter_map(|&(node, _)| tree.token(node)));
        Ok(())
    }

    /// Makes the cache hold a text, and returns the logits after it.
    fn read(&mut self, text: &[u32]) -> Result<Vec<f32>> {
        // Of a failed step, nodes may be left.
        self.fed.clear();
        let common = self.held.iter().zip(text).take_while(|(a, b)| a == b).count().min(text.len() - 1);
        self.cache.truncate(0, common)?;
        self.held.truncate(common);
        let logits = self.decoder.forward(&mut self.cache, &mut self.scratch, 0, &[&text[common..]], Logits::Last)?;
        self.held.extend_from_slice(&text[common..]);
        Ok(logits)
    }
}

/// How many of `n` children the nodes of a level get: one after the other, each to the node whose children would be the
/// likeliest. This looks at the nodes only, never at the children.
fn shares(level: &[(usize, f64)], n: usize) -> Vec<usize> {
    let mut counts = vec![0; level.len()];
    for _ in 0..n {
        let value = |i: &usize| level[*i].1 / (counts[*i] + 1) as f64;
        // The first of equals.
        let best = (0..level.len()).rev().max_by(|a, b| value(a).total_cmp(&value(b)));
        if let Some(best) = best {
            counts[best] += 1;
        }
    }
    counts
}

/// Checks that two tokenizers number the same tokens in the same way, so that one model can guess for the other.
pub fn check_vocabularies(model: &Tokenizer, draft: &Tokenizer) -> Result<()> {
    if model.len() != draft.len() {
        return Err(Error::argument(format!(
            "the draft has {} tokens, but the model has {}; they must have the same vocabulary",
            draft.len(),
            model.len()
        )));
    }
    for id in 0..u32::try_from(model.len()).unwrap_or(u32::MAX) {
        let (ours, theirs) = (model.token(id), draft.token(id));
        if ours != theirs {
            let name = |token: Option<String>| token.map_or("not a token".to_owned(), |t| format!("{t:?}"));
            return Err(Error::argument(format!(
                "token {id} is {} in the draft, but {} in the model; they must have the same vocabulary",
                name(theirs),
                name(ours)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_go_where_they_are_likely() {
        assert_eq!(shares(&[(0, 1.0)], 3), [3]);
        assert_eq!(shares(&[(1, 0.7), (2, 0.3)], 3), [2, 1]);
        assert_eq!(shares(&[(1, 0.9), (2, 0.05)], 3), [3, 0]);
        assert_eq!(shares(&[(1, 0.5), (2, 0.5)], 1), [1, 0]);
        assert!(shares(&[], 2).is_empty());
    }
}
