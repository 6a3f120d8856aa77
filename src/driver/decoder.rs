//! The decoder: from token ids to logits, over a cache.
//!
//! ```text
//! ids -> embedding rows x [scaled]
//! each layer:  h = RMSNorm(x);  q|k|v = h Wqkv;  [q, k = RMSNorm of every head];  rope(q);  cache <- rope(k), v
//!              x += [RMSNorm] attention(q, cache) Wo
//!              h = RMSNorm(x);  g|u = h Wgu;     x += [RMSNorm] (act(g) * u) Wd, [by experts]
//! logits = RMSNorm(x) Whead [scaled] [capped]
//! ```
//! [`ModelConfig`] decides about the operations in brackets, the activation, and each layer's window and rotary
//! embedding. A Llama model has no bracketed operation, SiLU, no windows and one rotary embedding.
//!
//! [`Decoder::forward`] serves prefill, chunked prefill and decode: it appends any number of tokens to any sequence of
//! the cache. The activations of a pass have the shape `[sequences, longest]`. Shorter sequences are padded, and
//! `counts` keeps padding out of the cache. More new tokens than the cache's rings allow ([`Cache::chunk`]) take
//! several passes. Layers with the same window share an [`AttentionPlan`]. Queries, keys and values are strided views
//! of the buffer that the fused projection fills; they are never copied.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use rayon::prelude::*;

use super::cache::Cache;
use super::error::{Error, Result};
use super::feed_forward::{FeedForwardScratch, Pass, feed_forward};
use super::linear::{Linear, Rounded};
use super::model::{LayerConfig, ModelConfig, Weights};
use super::threads::Threads;
use super::work::Work;
use crate::{
    AttentionOptions, AttentionPlan, AttentionTensors, Context, Destination, Isa, KeyRotation, KvWrite, Positions,
    Rope, RopeFrequencies, View, ViewMut, Workspace, attention, kv_write, rope_in_place,
};

/// The positions of a pass for which logits are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None, for the chunks of a prompt before the last.
    None,
    /// The last token of every sequence that has new tokens.
    Last,
    /// Every token.
    All,
}

/// A model ready to run.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    weights: Weights,
    context: Context,
    /// One per entry of [`ModelConfig::ropes`].
    frequencies: Vec<RopeFrequencies>,
    threads: Threads,
    exact: bool,
}

/// Memory for the activations of a pass, kept between passes.
#[derive(Debug, Default)]
pub struct Scratch {
    /// The residual stream, `[m, dim]`.
    x: Vec<f32>,
    /// Normalised input of a half-layer, `[m, dim]`.
    h: Vec<f32>,
    /// The output of a half-layer, which is added to `x`, `[m, dim]`.
    delta: Vec<f32>,
    /// `[m, q_dim + 2 * kv_dim]`.
    qkv: Vec<f32>,
    /// `[m, q_dim]`.
    attn: Vec<f32>,
    ffn: FeedForwardScratch,
    rounded: Rounded,
    workspace: Workspace,
    work: Work,
}

impl Scratch {
    /// What all passes with this memory have computed.
    pub fn work(&self) -> Work {
        self.work
    }
}

impl Decoder {
    /// Takes a model's weights. `longest` is the length of the longest sequence to come and matters for LongRoPE only;
    /// `isa` is the highest level to use.
    pub fn new(
        config: ModelConfig,
        weights: Weights,
        longest: usize,
        isa: Option<Isa>,
        threads: Threads,
    ) -> Result<Self> {
        let context = match isa {
            Some(isa) => Context::with_max_isa(isa)?,
            None => Context::new()?,
        };
        let frequencies = config.ropes.iter().map(|rope| rope.frequencies(longest)).collect::<Result<_>>()?;
        Ok(Self { config, weights, context, frequencies, threads, exact: false })
    }

    /// Whether linear layers multiply in f32 ([`Linear::exact`]). By default their inputs are rounded to eight bits where
    /// weights are quantised, which is several times as fast.
    pub fn exact(mut self, exact: bool) -> Self {
        self.exact = exact;
        self
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The kernels in use.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The threads it runs on.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }

    /// Appends `tokens[i]` to row `first_row + i` of the cache, for each i. Returns logits `[n, vocab]` in the order
    /// of the rows; n is the number of tokens ([`Logits::All`]) or of rows with new tokens ([`Logits::Last`]).
    ///
    /// Rows may differ in length and in the number of new tokens, which may be 0. Bad arguments are an error before
    /// any length has changed. If a kernel fails, the rows hold the tokens of the passes before it.
    pub fn forward(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        first_row: usize,
        tokens: &[&[u32]],
        logits: Logits,
    ) -> Result<Vec<f32>> {
        self.check(cache, first_row, tokens)?;
        let (dim, chunk) = (self.config.dim, cache.chunk());
        let longest = tokens.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let mut wanted = vec![Vec::new(); tokens.len()];
        for start in (0..longest).step_by(chunk) {
            let part = |ids: &[u32]| start.min(ids.len())..ids.len().min(start.saturating_add(chunk));
            let pieces: Vec<&[u32]> = tokens.iter().map(|ids| &ids[part(ids)]).collect();
            let seq = chunk.min(longest - start);
            self.threads.run(|| self.pass(cache, scratch, first_row, &pieces, seq))?;
            for (b, (ids, wanted)) in tokens.iter().zip(&mut wanted).enumerate() {
                cache.advance(first_row + b, part(ids).len());
                let from = match logits {
                    Logits::None => ids.len(),
                    Logits::Last => ids.len().saturating_sub(1),
                    Logits::All => 0,
                };
                let row = &scratch.x[b * seq * dim..];
                for t in from.max(start)..part(ids).end {
                    wanted.extend_from_slice(&row[(t - start) * dim..][..dim]);
                }
            }
        }
        let wanted = wanted.concat();
        scratch.work.add_linear(&[self.weights.head()], wanted.len() / dim);
        Ok(self.threads.run(|| self.logits(&wanted, &mut scratch.rounded)))
    }

    /// Forgets the tokens `span` of a row and closes the gap: later tokens move to the positions from `span.start` on,
    /// and their keys are rotated to them. Values, and keys beyond the first layer, still depend on the tokens that
    /// were forgotten.
    ///
    /// Every key that moves is rounded once to the cache's type. On an error nothing has changed.
    pub fn evict(&self, cache: &mut Cache, row: usize, span: Range<usize>) -> Result<()> {
        if let Some(n) = self.config.layers.iter().find_map(|l| l.window) {
            return Err(Error::unsupported(format!(
                "forgetting tokens of a model with layers that see {n} positions only"
            )));
        }
        let rotation = |layer: &LayerConfig| {
            Some(KeyRotation::new(self.config.ropes[layer.rope].pairing, &self.frequencies[layer.rope]))
        };
        let rotations: Vec<_> = self.config.layers.iter().map(rotation).collect();
        cache.evict(&self.context, &self.threads, row, span, &rotations)
    }

    fn linear(&self) -> Linear<'_> {
        Linear::new(self.context.isa(), &self.threads).exact(self.exact)
    }

    fn check(&self, cache: &Cache, first_row: usize, tokens: &[&[u32]]) -> Result<()> {
        let last = first_row.checked_add(tokens.len()).filter(|&n| n <= cache.rows());
        if last.is_none() {
            return Err(Error::argument(format!(
                "rows {first_row}.. for {} sequences, but the cache has {} rows",
                tokens.len(),
                cache.rows()
            )));
        }
        for (row, ids) in (first_row..).zip(tokens) {
            if ids.len() > cache.room(row) {
                return Err(Error::argument(format!(
                    "row {row} holds {} tokens and gets {}, but the cache has room for {}",
                    cache.len(row),
                    ids.len(),
                    cache.capacity()
                )));
            }
            if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab) {
                return Err(Error::argument(format!(
                    "token {id} is outside of the {} of this model",
                    self.config.vocab
                )));
            }
        }
        Ok(())
    }

    /// Runs the layers on up to `seq` new tokens per row, and leaves the result, `[rows, seq, dim]`, in `scratch.x`.
    fn pass(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        first_row: usize,
        tokens: &[&[u32]],
        seq: usize,
    ) -> Result<()> {
        let c = &self.config;
        let batch = tokens.len();
        let m = batch * seq;
        let linear = self.linear();
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let width = q_dim + 2 * kv_dim;
        let Scratch { x, h, delta, qkv, attn, ffn, rounded, workspace, work } = scratch;
        // Every buffer is written before it is read, so that the values of `resize` do not matter.
        x.resize(m * c.dim, 0.0);
        h.resize(m * c.dim, 0.0);
        delta.resize(m * c.dim, 0.0);
        qkv.resize(m * width, 0.0);
        attn.resize(m * q_dim, 0.0);

        for (row, ids) in x.chunks_exact_mut(seq * c.dim).zip(tokens) {
            for (t, x) in row.chunks_exact_mut(c.dim).enumerate() {
                // Padding takes the embedding of token 0; any finite numbers would do.
                let id = ids.get(t).copied().unwrap_or(0);
                self.weights.embedding.read_row(id as usize, x);
                if c.embedding_scale != 1.0 {
                    x.iter_mut().for_each(|x| *x *= c.embedding_scale);
                }
            }
        }

        let positions = cache.lengths()[first_row..first_row + batch].to_vec();
        let counts: Vec<i32> = tokens.iter().map(|t| t.len() as i32).collect();
        let lengths: Vec<i32> = positions.iter().zip(&counts).map(|(p, n)| p + n).collect();
        let ropes: Vec<Rope> = c
            .ropes
            .iter()
            .zip(&self.frequencies)
            .map(|(rope, frequencies)| {
                Rope::new(rope.pairing, rope.rotary_dim, frequencies, Positions::Offsets(&positions))
            })
            .collect();
        // Offsets are given because the default counts back from the last query, which is padding in a short row.
        let visible = AttentionOptions::new().causal(true).lengths(&lengths).offsets(&positions);
        let strides = [(seq * width) as i64, width as i64, c.head_dim as i64, 1];
        let q_shape = [batch, seq, c.heads, c.head_dim];
        let kv_shape = [batch, seq, c.kv_heads, c.head_dim];
        let mut plans = BTreeMap::new();
        for (i, kind) in c.layers.iter().enumerate() {
            if let Entry::Vacant(entry) = plans.entry(kind.window) {
                let (layout, slots) = cache.layout(i);
                // A window counts the query's own position, `window_left` does not.
                let mut options = visible.layout(layout);
                options.window_left = kind.window.map(|n| n as u32 - 1);
                entry.insert(AttentionPlan::new(q_shape, [batch, slots, c.kv_heads, c.head_dim], &options)?);
            }
        }

        work.add_attention(c, positions.iter().zip(&counts).flat_map(|(&p, &n)| p..p + n));
        for (i, (layer, kind)) in self.weights.layers.iter().zip(&c.layers).enumerate() {
            let rope = ropes[kind.rope];
            rms_norm(x, &layer.attn_norm, c.rms_eps, h);
            layer.qkv.apply(&linear, h, m, qkv, rounded);
            if let Some([q_norm, k_norm]) = &layer.qk_norm {
                head_norms(qkv, width, (q_dim, q_norm), (kv_dim, k_norm), c.rms_eps);
            }
            rope_in_place(&self.context, &self.threads, ViewMut::strided(qkv, 0, q_shape, strides)?, &rope)?;
            let (layout, _) = cache.layout(i);
            let (k_cache, v_cache) = cache.views_mut(i)?;
            kv_write(
                &self.context,
                &self.threads,
                KvWrite::new(
                    View::strided(qkv, q_dim, kv_shape, strides)?,
                    View::strided(qkv, q_dim + kv_dim, kv_shape, strides)?,
                    k_cache.batch(first_row, batch)?,
                    v_cache.batch(first_row, batch)?,
                    Destination::positions(&positions).counts(&counts).layout(layout),
                )
                .rope(rope),
            )?;
            let (k, v) = cache.views(i)?;
            let mut options = AttentionOptions::new().plan(&plans[&kind.window]);
            (options.scale, options.softcap) = (c.attn_scale, c.attn_softcap);
            attention(
                &self.context,
                &self.threads,
                workspace,
                AttentionTensors::new(
                    View::strided(qkv, 0, q_shape, strides)?,
                    k.batch(first_row, batch)?,
                    v.batch(first_row, batch)?,
                    ViewMut::new(attn, q_shape)?,
                ),
                &options,
            )?;
            layer.attn_out.apply(&linear, attn, m, delta, rounded);
            add_normed(x, delta, layer.attn_post_norm.as_deref(), c.rms_eps, h);

            rms_norm(x, &layer.ffn_norm, c.rms_eps, h);
            work.add_linear(&[&layer.qkv, &layer.attn_out], m);
            let mut pass = Pass { config: c, linear, rounded, work };
            feed_forward(&mut pass, &layer.ffn, h, m, delta, ffn);
            add_normed(x, delta, layer.ffn_post_norm.as_deref(), c.rms_eps, h);
        }
        Ok(())
    }

    /// Converts the output of the layers, `[n, dim]`, to logits, `[n, vocab]`.
    fn logits(&self, x: &[f32], rounded: &mut Rounded) -> Vec<f32> {
        let c = &self.config;
        let n = x.len() / c.dim;
        let mut normed = vec![0.0; x.len()];
        rms_norm(x, &self.weights.output_norm, c.rms_eps, &mut normed);
        let mut out = vec![0.0; n * c.vocab];
        self.weights.head().apply(&self.linear(), &normed, n, &mut out, rounded);
        if c.logit_scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= c.logit_scale);
        }
        if let Some(cap) = c.logit_softcap {
            out.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        out
    }
}

/// The factor of RMSNorm, `1 / sqrt(mean(x^2) + eps)`.
fn rms_scale(x: &[f32], eps: f32) -> f64 {
    // In f64, so that the order of summation does not affect the result at f32 precision; in lanes, because a sum in order
    // is not vectorised.
    let (chunks, rest) = x.as_chunks::<8>();
    let mut lanes = [0.0f64; 8];
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(v) * f64::from(v);
        }
    }
    let squares: f64 = lanes.into_iter().chain(rest.iter().map(|&v| f64::from(v) * f64::from(v))).sum();
    1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt()
}

/// `y = x / sqrt(mean(x^2) + eps) * weight`, row by row.
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let row = |(x, y): (&[f32], &mut [f32])| {
        let scale = rms_scale(x, eps);
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = (f64::from(x) * scale) as f32 * w;
        }
    };
    let n = weight.len();
    if x.len() == n {
        return row((x, y));
    }
    x.par_chunks_exact(n).zip(y.par_chunks_exact_mut(n)).with_min_len(8).for_each(row);
}

/// RMSNorm of every query head and key head, in place. Each row of `width` elements begins with the queries, followed
/// by the keys; each has the weights of one head.
fn head_norms(qkv: &mut [f32], width: usize, (q_dim, q): (usize, &[f32]), (k_dim, k): (usize, &[f32]), eps: f32) {
    qkv.par_chunks_exact_mut(width).with_min_len(8).for_each(|row| {
        let (queries, rest) = row.split_at_mut(q_dim);
        for (heads, weight) in [(queries, q), (&mut rest[..k_dim], k)] {
            for head in heads.chunks_exact_mut(weight.len()) {
                let scale = rms_scale(head, eps);
                for (x, &w) in head.iter_mut().zip(weight) {
                    *x = (f64::from(*x) * scale) as f32 * w;
                }
            }
        }
    });
}

/// `x += delta`, after an RMSNorm of `delta` if there are weights for one. `room` is scratch as long as `x`.
fn add_normed(x: &mut [f32], delta: &[f32], weight: Option<&[f32]>, eps: f32, room: &mut [f32]) {
    let delta = match weight {
        Some(weight) => {
            rms_norm(delta, weight, eps, room);
            room
        }
        None => delta,
    };
    for (x, &y) in x.iter_mut().zip(delta) {
        *x += y;
    }
}
