//! Which guesses hold: rejection sampling, exact for trees.
//!
//! At a node, the model's distribution p of the next token is that of the sampler: after temperature, top-k and top-p.
//! There are two kinds of children.
//!
//! **Chosen** children (a match of the text so far, the likeliest tokens of a draft at temperature 0): a token is sampled
//! from p. If it is a child, the guess holds, otherwise the token ends the path. The random numbers are those of
//! sampling without guesses, and so is the text.
//!
//! **Drawn** children come from a distribution q, without putting back. The first child x holds with probability
//! `min(1, p(x) / q(x))`. If it does not, p becomes the normalised positive part of p - q, and q loses x and is normalised:
//! the next child was drawn from this q. If no child holds, the token is sampled from the last p. In every step the token
//! has the distribution p that the step began with (Leviathan et al., <https://arxiv.org/abs/2211.17192>; for several
//! children, Jeon et al., <https://arxiv.org/abs/2402.14160>), so the text has the model's distribution whatever q is. A
//! child holds with probability `sum(min(p, q))`, where a chosen one holds with p(x).

use super::tree::{Distribution, GuessTree};
use crate::driver::error::Result;
use crate::driver::sampling::Sampler;

/// The nodes of the guesses that hold, from the root on, and the token after them. `logits` has a row of `vocab` for the
/// root and each guess, which the sampler decides on.
pub(super) fn accept(
    tree: &GuessTree,
    logits: &[f32],
    vocab: usize,
    sampler: &mut Sampler,
) -> Result<(Vec<usize>, u32)> {
    let (mut path, mut node) = (Vec::new(), 0);
    loop {
        let row = &logits[node * vocab..][..vocab];
        let (token, child) = match tree.source(node) {
            Some(source) => from_drawn(tree, node, source, row, sampler)?,
            None => {
                let token = sampler.sample(row)?;
                (token, tree.child(node, token))
            }
        };
        let Some(child) = child else { return Ok((path, token)) };
        path.push(child);
        node = child;
    }
}

/// The token after a node whose children were drawn, and the child if it is one.
fn from_drawn(
    tree: &GuessTree,
    node: usize,
    source: &Distribution,
    logits: &[f32],
    sampler: &mut Sampler,
) -> Result<(u32, Option<usize>)> {
    let mut p = vec![0.0; logits.len()];
    for (token, probability) in sampler.distribution(logits)? {
        p[token as usize] = probability;
    }
    let mut q = source.clone();
    for (child, token) in tree.children(node) {
        let Some(i) = q.iter().position(|&(t, _)| t == token) else { continue };
        let held = p.get(token as usize).copied().unwrap_or(0.0);
        if sampler.uniform() * q[i].1 < held {
            return Ok((token, Some(child)));
        }
        for &(token, probability) in &q {
            if let Some(p) = p.get_mut(token as usize) {
                *p = (*p - probability).max(0.0);
            }
        }
        if !normalise(p.iter_mut()) {
            // p and q are equal but for rounding, and the child should have held.
            return Ok((token, Some(child)));
        }
        q.swap_remove(i);
        normalise(q.iter_mut().map(|(_, probability)| probability));
    }
    let mut left = sampler.uniform();
    let mut last = 0;
    for (token, &probability) in p.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        last = token;
        left -= probability;
        if left < 0.0 {
            break;
        }
    }
    // Rounding can leave a remainder after the last token.
    Ok((last as u32, None))
}

/// Divides by the sum; false if it is 0.
fn normalise<'a>(values: impl Iterator<Item = &'a mut f64>) -> bool {
    let values: Vec<_> = values.collect();
    let sum: f64 = values.iter().map(|v| **v).sum();
    if sum <= 0.0 {
        return false;
    }
    values.into_iter().for_each(|v| *v /= sum);
    true
}

/// Draws up to `n` different tokens, one after the other without putting back, with the sampler's random numbers.
pub(super) fn draw(source: &Distribution, n: usize, sampler: &mut Sampler) -> Vec<u32> {
    let mut rest = source.clone();
    let mut drawn = Vec::new();
    while drawn.len() < n && rest.iter().any(|&(_, p)| p > 0.0) {
        let sum: f64 = rest.iter().map(|(_, p)| p).sum();
        let mut left = sampler.uniform() * sum;
        let hit = rest.iter().position(|&(_, p)| {
            left -= p;
            left < 0.0
        });
        let last = rest.iter().rposition(|&(_, p)| p > 0.0).unwrap_or(0);
        drawn.push(rest.swap_remove(hit.unwrap_or(last)).0);
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::sampling::SamplerOptions;

    const VOCAB: usize = 6;

    fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / temperature).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    }

    /// The sum of squares over the expectation, and the degrees of freedom. Cells with less than 5 expected are joined.
    fn chi_square(found: &[usize], expected: &[f64]) -> (f64, usize) {
        let n: usize = found.iter().sum();
        let (mut sum, mut cells, mut small) = (0.0, 0, (0.0, 0.0));
        for (&found, p) in found.iter().zip(expected) {
            let (found, expected) = (found as f64, p * n as f64);
            if expected < 5.0 {
                small = (small.0 + found, small.1 + expected);
                continue;
            }
            sum += (found - expected).powi(2) / expected;
            cells += 1;
        }
        if small.1 >= 5.0 {
            sum += (small.0 - small.1).powi(2) / small.1;
            cells += 1;
        }
        (sum, cells - 1)
    }

    /// Chi-square has mean k and variance 2k: five standard deviations are never left by chance, and the seeds are fixed.
    fn assert_likely(found: &[usize], expected: &[f64], what: &str) {
        let (sum, k) = chi_square(found, expected);
        let k = k as f64;
        assert!(sum < k + 5.0 * (2.0 * k).sqrt(), "{what}: chi-square {sum} of {k} degrees");
    }

    /// Logits of a model, a function of the tokens before.
    fn logits_after(seed: u32, path: &[u32]) -> Vec<f32> {
        let mix = |state: u32, token: u32| {
            let state = (state ^ (token + 1)).wrapping_mul(0x9e37_79b1);
            state ^ state >> 15
        };
        let state = path.iter().fold(mix(0, seed), |state, &token| mix(state, token));
        (0..VOCAB as u32).map(|token| (mix(state, 100 + token) % 1000) as f32 / 300.0).collect()
    }

    fn target(path: &[u32]) -> Vec<f32> {
        logits_after(3, path)
    }

    /// The first three tokens of texts that are made of passes over trees, against their exact distribution.
    fn check(what: &str, temperature: f32, guess: impl Fn(&[u32], &mut Sampler) -> GuessTree) {
        let options = |seed| SamplerOptions::new().temperature(temperature).seed(seed);
        let (mut found, mut held) = (vec![0; VOCAB.pow(3)], 0);
        let runs = 20_000;
        let (mut sampler, mut drafts) = (Sampler::new(options(1)).unwrap(), Sampler::new(options(2)).unwrap());
        for _ in 0..runs {
            let mut text: Vec<u32> = Vec::new();
            while text.len() < 3 {
                let tree = guess(&text, &mut drafts);
                let mut rows = target(&text);
                for node in 1..=tree.len() {
                    let mut path = Vec::new();
                    let mut at = node;
                    while at > 0 {
                        path.push(tree.token(at).unwrap());
                        at = (0..at).find(|&p| tree.children(p).any(|(c, _)| c == at)).unwrap();
                    }
                    path.reverse();
                    rows.extend(target(&[&text[..], &path].concat()));
                }
                let (path, token) = accept(&tree, &rows, VOCAB, &mut sampler).unwrap();
                held += path.len();
                text.extend(path.iter().map(|&node| tree.token(node).unwrap()));
                text.push(token);
            }
            let cell = text[..3].iter().fold(0, |cell, &t| cell * VOCAB + t as usize);
            found[cell] += 1;
        }
        let exact = |path: &[u32]| softmax(&target(path), f64::from(temperature));
        let mut expected = Vec::new();
        for a in 0..VOCAB as u32 {
            for b in 0..VOCAB as u32 {
                let before = exact(&[])[a as usize] * exact(&[a])[b as usize];
                expected.extend(exact(&[a, b]).iter().map(|c| before * c));
            }
        }
        assert!(held > runs / 4, "{what}: {held} guesses held");
        assert_likely(&found, &expected, what);
    }

    #[test]
    fn accepted_guesses_have_the_models_distribution() {
        // Chosen: one child that is often wrong, and a tree.
        check("a chain", 1.0, |text, _| {
            let mut tree = GuessTree::new();
            let first = tree.push(0, text.len() as u32 % 6);
            tree.push(first, 4);
            tree
        });
        check("a tree", 0.7, |_, _| {
            let mut tree = GuessTree::new();
            for token in [2, 5, 0] {
                let child = tree.push(0, token);
                tree.push(child, 1);
                tree.push(child, 3);
            }
            tree
        });
        // Drawn from another model, from one that knows half of the tokens, and from the model itself.
        let drawn = |seed: u32, support: usize, branches: usize| {
            move |text: &[u32], sampler: &mut Sampler| {
                let mut tree = GuessTree::new();
                let mut grow = |tree: &mut GuessTree, node: usize, path: &[u32], n: usize| {
                    let q = softmax(&logits_after(seed, path), 1.0);
                    let mut source: Distribution = q.iter().zip(0..).map(|(&p, t)| (t, p)).take(support).collect();
                    normalise(source.iter_mut().map(|(_, p)| p));
                    let tokens = draw(&source, n, sampler);
                    tree.set_source(node, source);
                    tokens.into_iter().map(|t| (tree.push(node, t), t)).collect::<Vec<_>>()
                };
                for (i, (child, token)) in grow(&mut tree, 0, text, branches).into_iter().enumerate() {
                    grow(&mut tree, child, &[text, &[token]].concat(), 1 + i % 2);
                }
                tree
            }
        };
        check("one draw", 1.0, drawn(5, 6, 1));
        check("three draws", 1.0, drawn(5, 6, 3));
        check("draws of a narrow model", 0.8, drawn(8, 3, 3));
        check("draws of the model itself", 1.0, drawn(3, 6, 2));
    }

    /// A wrong rule is noticed: to take every drawn token, or to sample from p and not from what is left of it.
    #[test]
    fn the_test_of_distributions_can_fail() {
        let (p, q) = (softmax(&target(&[]), 1.0), softmax(&logits_after(5, &[]), 1.0));
        let n = 20_000;
        let cells = |of: &[f64]| of.iter().map(|p| (p * f64::from(n)) as usize).collect::<Vec<_>>();
        let (sum, k) = chi_square(&cells(&q), &p);
        assert!(sum > 20.0 * k as f64, "{sum}");
        let wrong: Vec<f64> = p.iter().zip(&q).map(|(p, q)| p.min(*q)).collect();
        let kept: f64 = wrong.iter().sum();
        let wrong: Vec<f64> = wrong.iter().zip(&p).map(|(w, p)| w + (1.0 - kept) * p).collect();
        let (sum, k) = chi_square(&cells(&wrong), &p);
        assert!(sum > 20.0 * k as f64, "{sum}");
    }

    #[test]
    fn chosen_guesses_change_no_random_number() {
        let options = SamplerOptions::new().temperature(0.9).top_p(0.9).seed(11);
        let (mut with, mut without) = (Sampler::new(options).unwrap(), Sampler::new(options).unwrap());
        let mut tree = GuessTree::new();
        let first = tree.push(0, 1);
        tree.push(first, 2);
        for i in 0..50 {
            let rows: Vec<f32> = (0..3).flat_map(|node| logits_after(i, &[node])).collect();
            let (path, token) = accept(&tree, &rows, VOCAB, &mut with).unwrap();
            let mut node = 0;
            for &held in &path {
                assert_eq!(Some(without.sample(&rows[node * VOCAB..][..VOCAB]).unwrap()), tree.token(held));
                node = held;
            }
            assert_eq!(without.sample(&rows[node * VOCAB..][..VOCAB]).unwrap(), token);
        }
    }

    #[test]
    fn draws_do_not_repeat() {
        let mut sampler = Sampler::new(SamplerOptions::new().temperature(1.0)).unwrap();
        let source = vec![(7, 0.5), (3, 0.0), (9, 0.3), (1, 0.2)];
        let mut drawn = draw(&source, 9, &mut sampler);
        drawn.sort_unstable();
        assert_eq!(drawn, [1, 7, 9]);
    }
}
