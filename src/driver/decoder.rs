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
//! [`Decoder::forward_rows`] serves prefill, chunked prefill and decode: it appends any number of tokens to any rows of
//! the cache. The activations of a pass hold the new tokens of all rows one after another, without padding (ragged
//! queries). More new tokens than the cache's rings allow ([`Cache::chunk`]) take
//! several passes. Layers with the same window share an [`AttentionPlan`]. Queries, keys and values are strided views
//! of the buffer that the fused projection fills; they are never copied.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use rayon::prelude::*;

use super::cache::{Cache, Formats, PREFILL_CHUNK};
use super::error::{Error, Result};
use super::feed_forward::{FeedForwardScratch, Pass, feed_forward};
use super::linear::{Linear, Matrix, Rounded};
use super::mesh::{Division, MeshAxis, MeshPart, RowRanges, Segments};
use super::model::{LayerConfig, ModelConfig, Weights};
use super::threads::Threads;
use super::work::Work;
use crate::{
    AttentionOptions, AttentionPlan, AttentionTensors, BitMask, Context, Destination, Isa, KeyRotation, KvWrite,
    Layout, Positions, Rope, RopeFrequencies, Runner, View, ViewMut, Workspace, attention, kv_write, rope_in_place,
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

/// Where the new tokens of a row stand and what they see, if they do not simply follow each other: guesses that form a
/// tree.
#[derive(Debug, Clone, Copy)]
pub struct TreePass<'a> {
    /// The position of each new token, which decides its rotation and its window.
    pub positions: &'a [i32],
    /// The first token of the row that is not visible to all new tokens.
    pub first_key: usize,
    /// A line of bits per new token, which begins with a byte of its own, lowest bits first. Bit j is 1 if the new token
    /// sees the token `first_key + j`; itself it must see. There is a bit for every token of the row from the first key
    /// on, the new ones included.
    pub visible: &'a [u8],
}

/// A model ready to run.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    /// The same with the heads of this process alone.
    local: ModelConfig,
    division: Division,
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
    /// `[m, q_dim]`, the heads of this process, and all.
    own_attn: Vec<f32>,
    attn: Vec<f32>,
    /// Outputs of a linear layer that this process computes, and parts of all processes before they are put in order.
    own: Vec<f32>,
    room: Vec<f32>,
    /// The states of the keys that this process holds, and of all keys.
    states: Vec<f32>,
    all_states: Vec<f32>,
    ffn: FeedForwardScratch,
    rounded: Rounded,
    workspace: Workspace,
    work: Work,
    /// The queries of every layer after RoPE, `[tokens, q_dim]`, of all passes; empty where they are not kept.
    queries: Vec<Vec<f32>>,
}

impl Scratch {
    /// Memory that also keeps the queries of all passes, until they are taken.
    pub(super) fn keeping_queries(layers: usize) -> Self {
        Self { queries: vec![Vec::new(); layers], ..Self::default() }
    }

    /// The queries of every layer, `[tokens, heads, head_dim]`, of all passes since they were last taken.
    pub(super) fn take_queries(&mut self) -> Vec<Vec<f32>> {
        self.queries.iter_mut().map(std::mem::take).collect()
    }

    /// The outputs of attention in the last layer, `[tokens, heads, head_dim]`, of the last pass.
    #[cfg(test)]
    pub(super) fn last_attention(&self) -> &[f32] {
        &self.own_attn
    }

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
        let (local, division) = (config.clone(), Division::whole(&config));
        Ok(Self { config, local, division, weights, context, frequencies, threads, exact: false })
    }

    /// Makes it one process of a [mesh](super::mesh). The weights must be those of the part
    /// ([`ModelFile::weights_of_part`](super::ModelFile::weights_of_part)), and its caches are made by [`Self::cache`]. All
    /// processes with the same part of the data then call the same methods with the same arguments.
    pub fn on_mesh(mut self, part: &MeshPart) -> Result<Self> {
        part.check(&self.config)?;
        let rows = RowRanges::new(&self.config, part)?;
        let (heads, vocab) = (rows.q.len() + 2 * rows.kv.len(), rows.vocab.len());
        let found = (self.weights.layers.first().map_or(heads, |l| l.qkv.rows()), self.weights.head().rows());
        if found != (heads, vocab) {
            return Err(Error::argument(format!(
                "weights with {} rows of queries, keys and values and {} of the output, but this part of the mesh has {heads} \
                 and {vocab}",
                found.0, found.1
            )));
        }
        self.local = rows.local(&self.config);
        self.division = Division::new(&self.config, part)?;
        Ok(self)
    }

    /// The part of a mesh that it is, if it is one.
    pub fn mesh_part(&self) -> Option<&MeshPart> {
        self.division.part()
    }

    /// A cache for its heads and keys: [`Cache::new`], or a part of it on a mesh.
    pub fn cache(&self, rows: usize, capacity: usize, formats: impl Into<Formats>) -> Result<Cache> {
        self.cache_with_chunk(rows, capacity, PREFILL_CHUNK, formats.into())
    }

    pub(super) fn cache_with_chunk(
        &self,
        rows: usize,
        capacity: usize,
        chunk: usize,
        formats: Formats,
    ) -> Result<Cache> {
        match self.mesh_part().and_then(|part| part.segment(capacity)) {
            Some(segment) => Cache::with_segment(&self.local, rows, capacity, chunk, segment, formats),
            None => Cache::with_chunk(&self.local, rows, capacity, chunk, formats),
        }
    }

    /// Whether linear layers multiply in f32 ([`Linear::exact`]). By default their inputs are rounded to sixteen bits where
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

    /// Appends `tokens[i]` to row `first_row + i` of the cache, for each i: [`Self::forward_rows`] for neighbouring rows.
    pub fn forward(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        first_row: usize,
        tokens: &[&[u32]],
        logits: Logits,
    ) -> Result<Vec<f32>> {
        let rows: Vec<_> = tokens.iter().enumerate().map(|(i, &ids)| (first_row.saturating_add(i), ids)).collect();
        self.forward_rows(cache, scratch, &rows, logits)
    }

    /// Appends tokens to rows of the cache, each named once, in any order. Returns logits `[n, vocab]` in the order of
    /// the list; n is the number of tokens ([`Logits::All`]) or of rows with new tokens ([`Logits::Last`]).
    ///
    /// Rows may differ in length and in the number of new tokens, which may be 0. Rows that are not named cost nothing,
    /// wherever they lie. Bad arguments are an error before any length has changed. If a kernel fails, the rows hold the
    /// tokens of the passes before it.
    pub fn forward_rows(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        rows: &[(usize, &[u32])],
        logits: Logits,
    ) -> Result<Vec<f32>> {
        self.check(cache, rows)?;
        let (dim, chunk) = (self.config.dim, cache.chunk());
        let longest = rows.iter().map(|(_, ids)| ids.len()).max().unwrap_or(0);
        // A pass takes the rows in the order of the cache.
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_unstable_by_key(|&i| rows[i].0);
        let mut wanted = vec![Vec::new(); rows.len()];
        for start in (0..longest).step_by(chunk) {
            let part = |ids: &[u32]| start.min(ids.len())..ids.len().min(start.saturating_add(chunk));
            let pieces: Vec<_> = order.iter().map(|&i| (rows[i].0, &rows[i].1[part(rows[i].1)])).collect();
            self.run_pass(cache, scratch, &pieces, None)?;
            let mut outputs = scratch.x.chunks_exact(dim);
            for &i in &order {
                let (row, ids) = rows[i];
                cache.advance(row, part(ids).len());
                let from = match logits {
                    Logits::None => ids.len(),
                    Logits::Last => ids.len().saturating_sub(1),
                    Logits::All => 0,
                };
                for (t, x) in part(ids).zip(&mut outputs) {
                    if t >= from {
                        wanted[i].extend_from_slice(x);
                    }
                }
            }
        }
        let wanted = wanted.concat();
        self.threads.run(|| self.logits(&wanted, scratch))
    }

    /// Appends tokens that form a tree to a row of the cache, in one pass. Returns the logits of all, `[tokens, vocab]`.
    ///
    /// They take the next slots of the row in their order, and count towards its length; [`Self::keep`] then keeps a path.
    /// Bad arguments are an error before any length has changed; there are at most [`Cache::chunk`] tokens.
    pub fn forward_tree(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        row: usize,
        tokens: &[u32],
        tree: &TreePass,
    ) -> Result<Vec<f32>> {
        self.check(cache, &[(row, tokens)])?;
        let (n, held) = (tokens.len(), cache.len(row));
        if n > cache.chunk() {
            return Err(Error::argument(format!("a tree of {n} tokens, but a pass takes {}", cache.chunk())));
        }
        let lines = (held + n).checked_sub(tree.first_key).map(|keys| n * keys.div_ceil(8));
        if tree.positions.len() != n || lines != Some(tree.visible.len()) {
            return Err(Error::argument(format!(
                "a tree of {n} tokens after {held}, with {} positions, and {} bytes of bits from token {} on",
                tree.positions.len(),
                tree.visible.len(),
                tree.first_key
            )));
        }
        if n == 0 {
            return Ok(Vec::new());
        }
        if let Some(segment) = cache.segment() {
            return Err(Error::unsupported(format!(
                "a tree in a cache that holds the positions {} to {} alone",
                segment.start, segment.end
            )));
        }
        self.run_pass(cache, scratch, &[(row, tokens)], Some(tree))?;
        cache.advance(row, n);
        let x = std::mem::take(&mut scratch.x);
        let logits = self.threads.run(|| self.logits(&x, scratch));
        scratch.x = x;
        logits
    }

    /// Forgets the tokens `span` of a row and closes the gap: later tokens move to the positions from `span.start` on,
    /// and their keys are rotated to them. Values, and keys beyond the first layer, still depend on the tokens that
    /// were forgotten.
    ///
    /// Every key that moves is rounded once to the cache's type. If the cache [keeps](Cache::keep_sinks) the keys before the
    /// span, positions run on instead: no key moves to another position but those before the span, which are rounded
    /// from their copies. On an error nothing has changed.
    pub fn evict(&self, cache: &mut Cache, row: usize, span: Range<usize>) -> Result<()> {
        if let Some(n) = self.config.layers.iter().find_map(|l| l.window) {
            return Err(Error::unsupported(format!(
                "forgetting tokens of a model with layers that see {n} positions only"
            )));
        }
        let [hadamard, _] = cache.hadamard();
        let rotation = |layer: &LayerConfig| {
            let mut rotation = KeyRotation::new(self.config.ropes[layer.rope].pairing, &self.frequencies[layer.rope]);
            rotation.hadamard = hadamard;
            rotation
        };
        let rotations: Vec<_> = self.config.layers.iter().map(rotation).collect();
        if cache.can_run_on(row, span.start) {
            return cache.evict_running(&self.context, &self.threads, row, span, &rotations);
        }
        let rotations: Vec<_> = rotations.into_iter().map(Some).collect();
        cache.evict(&self.context, &self.threads, row, span, &rotations)
    }

    fn linear(&self) -> Linear<'_> {
        Linear::new(self.context.isa(), &self.threads).exact(self.exact)
    }

    /// Copies the first `tokens` tokens of row `from` to the rows `to`, which then hold these tokens alone: one prompt,
    /// many continuations. On an error no length has changed.
    pub fn copy_prefix(&self, cache: &mut Cache, from: usize, to: &[usize], tokens: usize) -> Result<()> {
        cache.copy_prefix(&self.context, &self.threads, from, to, tokens)
    }

    /// Copies all tokens of row `from_row` of another cache of this model, in any format, to row `row`: a prompt that
    /// was prefilled elsewhere joins a batch. On an error no length has changed.
    pub fn insert(&self, cache: &mut Cache, row: usize, from: &mut Cache, from_row: usize) -> Result<()> {
        cache.insert(&self.context, &self.threads, row, from, from_row)
    }

    /// Replaces every row b of the cache by what row `parents[b]` was. In a cache [with beams](Cache::with_beams), entries
    /// of its table move, otherwise tokens.
    ///
    /// `parents` has an entry per row. On an error nothing has changed.
    pub fn reorder(&self, cache: &mut Cache, parents: &[usize]) -> Result<()> {
        let parents: Vec<i32> = parents.iter().map(|&p| i32::try_from(p).unwrap_or(i32::MAX)).collect();
        cache.reorder(&self.context, &self.threads, &parents)
    }

    /// Forgets the tokens of a row from position `start` on, except those at `kept`, which move together behind `start`
    /// with all their bits. Their rotation must be that of the positions where they come to lie: the kept tokens are a
    /// path of a tree ([`Self::forward_tree`]).
    ///
    /// `kept` is ascending and within the row. If it is no run from `start` on, the cache must be one [without
    /// rings](Cache::without_rings). On an error nothing has changed.
    pub fn keep(&self, cache: &mut Cache, row: usize, start: usize, kept: &[usize]) -> Result<()> {
        let n = cache.len(row);
        if start > n || !kept.is_sorted_by(|a, b| a < b) || kept.iter().any(|p| !(start..n).contains(p)) {
            return Err(Error::argument(format!(
                "the positions {kept:?} to keep of row {row} must be ascending and between {start} and its {n} tokens"
            )));
        }
        let gaps = std::iter::once(start).chain(kept.iter().map(|p| p + 1)).zip(kept).map(|(end, &next)| end..next);
        let gaps: Vec<_> = gaps.filter(|gap| !gap.is_empty()).collect();
        if !gaps.is_empty() {
            cache.check_gaps_close()?;
        }
        cache.truncate(row, kept.last().map_or(start, |last| last + 1))?;
        // From the last gap to the first, so that the positions before a gap are still valid.
        gaps.into_iter().rev().try_for_each(|gap| cache.evict(&self.context, &self.threads, row, gap, &[]))
    }

    fn check(&self, cache: &Cache, rows: &[(usize, &[u32])]) -> Result<()> {
        let mut named = vec![false; cache.rows()];
        for &(row, ids) in rows {
            match named.get_mut(row) {
                Some(named) if !*named => *named = true,
                Some(_) => return Err(Error::argument(format!("row {row} is named twice"))),
                None => {
                    return Err(Error::argument(format!(
                        "row {row} is named, but the cache has {} rows",
                        cache.rows()
                    )));
                }
            }
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

    /// [`Self::pass`] on its threads. On a mesh, other processes would wait for one that fails.
    fn run_pass(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        rows: &[(usize, &[u32])],
        tree: Option<&TreePass>,
    ) -> Result<()> {
        let result = self.threads.run(|| self.pass(cache, scratch, rows, tree));
        if let (Err(error), Some(part)) = (&result, self.mesh_part()) {
            part.abort(error);
        }
        result
    }

    /// `y = x * w^T` for the rows of `w` of all processes, `widths` each.
    fn apply_divided(
        &self,
        w: &Matrix,
        (x, m): (&[f32], usize),
        widths: &[usize],
        y: &mut [f32],
        (own, room, rounded): (&mut Vec<f32>, &mut Vec<f32>, &mut Rounded),
    ) -> Result<()> {
        if self.division.divided().is_none() {
            w.apply(&self.linear(), x, m, y, rounded);
            return Ok(());
        }
        own.resize(m * w.rows(), 0.0);
        w.apply(&self.linear(), x, m, own, rounded);
        self.division.gather_columns(own, m, widths, y, room)
    }

    /// Writes the embeddings of `ids` to the rows of `x`.
    fn embed<'a>(
        &self,
        ids: impl Iterator<Item = &'a u32> + Clone,
        x: &mut [f32],
        own: &mut Vec<f32>,
        room: &mut Vec<f32>,
    ) -> Result<()> {
        let (dim, embedding) = (self.config.dim, &self.weights.embedding);
        let Some(part) = self.division.divided() else {
            for (x, &id) in x.chunks_exact_mut(dim).zip(ids) {
                embedding.read_row(id as usize, x);
            }
            return Ok(());
        };
        // A process has the rows of its part of the vocabulary.
        let mine = part.rows(self.config.vocab);
        own.clear();
        for &id in ids.clone().filter(|&&id| mine.contains(&(id as usize))) {
            own.extend(embedding.row(id as usize - mine.start));
        }
        let mut ends = self.division.vocab.clone();
        (1..ends.len()).for_each(|i| ends[i] += ends[i - 1]);
        let owner = |id: u32| ends.partition_point(|&end| end <= id as usize);
        let mut counts = vec![0; ends.len()];
        ids.clone().for_each(|&id| counts[owner(id)] += dim);
        room.resize(x.len(), 0.0);
        part.all_gather(MeshAxis::Model, own, &counts, room)?;
        let mut next: Vec<usize> = counts.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect();
        for (x, &id) in x.chunks_exact_mut(dim).zip(ids) {
            let from = &mut next[owner(id)];
            x.copy_from_slice(&room[*from..*from + dim]);
            *from += dim;
        }
        Ok(())
    }

    /// Runs the layers on the new tokens of rows in ascending order, and leaves the result, `[tokens, dim]`, in
    /// `scratch.x`.
    fn pass(
        &self,
        cache: &mut Cache,
        scratch: &mut Scratch,
        rows: &[(usize, &[u32])],
        tree: Option<&TreePass>,
    ) -> Result<()> {
        let c = &self.local;
        let m: usize = rows.iter().map(|(_, ids)| ids.len()).sum();
        let linear = self.linear();
        let (q_dim, kv_dim) = (c.q_dim(), c.kv_dim());
        let width = q_dim + 2 * kv_dim;
        let Scratch {
            x,
            h,
            delta,
            qkv,
            own_attn,
            attn,
            own,
            room,
            states,
            all_states,
            ffn,
            rounded,
            workspace,
            work,
            queries,
        } = scratch;
        // Every buffer is written before it is read, so that the values of `resize` do not matter.
        x.resize(m * c.dim, 0.0);
        h.resize(m * c.dim, 0.0);
        delta.resize(m * c.dim, 0.0);
        qkv.resize(m * width, 0.0);
        own_attn.resize(m * q_dim, 0.0);

        self.embed(rows.iter().flat_map(|(_, ids)| *ids), x, own, room)?;
        if c.embedding_scale != 1.0 {
            x.iter_mut().for_each(|x| *x *= c.embedding_scale);
        }

        // Attention over ragged queries sees every row of the cache; rows that are not named have no query.
        let offsets = cache.lengths().to_vec();
        let mut lengths = offsets.clone();
        let mut starts = vec![0; cache.rows() + 1];
        let mut places = Vec::with_capacity(m);
        for &(row, ids) in rows {
            starts[row + 1] = ids.len() as i32;
            lengths[row] += ids.len() as i32;
            cache.claim(row, ids.len())?;
            places.extend((offsets[row]..lengths[row]).map(|position| (row, position)));
        }
        for row in 0..cache.rows() {
            starts[row + 1] += starts[row];
        }
        let dropped = cache.rope_offsets();
        let query_positions: Vec<i32> = match tree {
            Some(tree) => tree.positions.to_vec(),
            None => places.iter().map(|&(_, position)| position).collect(),
        };
        let positions: Vec<i32> =
            query_positions.iter().zip(&places).map(|(p, &(row, _))| p.saturating_add(dropped[row])).collect();
        let ropes: Vec<Rope> = c
            .ropes
            .iter()
            .zip(&self.frequencies)
            .map(|(rope, frequencies)| {
                Rope::new(rope.pairing, rope.rotary_dim, frequencies, Positions::Explicit(&positions))
            })
            .collect();
        let mut visible =
            AttentionOptions::new().causal(true).lengths(&lengths).offsets(&offsets).cu_seqlens_q(&starts);
        let bits = tree.map(|tree| TreeBits::new(tree, rows[0], &lengths));
        if let Some(bits) = &bits {
            // The bits say what causality would.
            visible = visible.causal(false).query_positions(&query_positions).bit_mask(bits.mask(c.heads)?);
        }
        let strides = [(m * width) as i64, width as i64, c.head_dim as i64, 1];
        let q_shape = [1, m, c.heads, c.head_dim];
        let kv_shape = [1, m, c.kv_heads, c.head_dim];
        // Layers with one window have caches of one shape.
        let mut kinds = BTreeMap::new();
        // A part of the keys is computed row by row, without a plan.
        let segments = match (self.mesh_part(), cache.segment()) {
            (Some(part), Some(_)) => Some(Segments::new(part, cache, rows, &lengths, c)?),
            _ => None,
        };
        for (i, kind) in c.layers.iter().enumerate().filter(|_| segments.is_none()) {
            if let Entry::Vacant(entry) = kinds.entry(kind.window) {
                let (layout, slots) = cache.layout(i);
                // A window counts the query's own position, `window_left` does not.
                let mut options = visible.layout(layout);
                options.window_left = kind.window.map(|n| n as u32 - 1);
                let plan = AttentionPlan::new(q_shape, [cache.rows(), slots, c.kv_heads, c.head_dim], &options)?;
                let slot = |&(row, position): &(usize, i32)| (row * slots) as i32 + position % slots as i32;
                entry.insert((plan, places.iter().map(slot).collect::<Vec<i32>>()));
            }
        }

        let (all, hadamard) = (0..cache.capacity(), cache.hadamard());
        work.add_attention(c, cache.segment().unwrap_or(&all), places.iter().map(|&(_, position)| position));
        for (i, (layer, kind)) in self.weights.layers.iter().zip(&c.layers).enumerate() {
            let rope = ropes[kind.rope];
            rms_norm(x, &layer.attn_norm, c.rms_eps, h);
            layer.qkv.apply(&linear, h, m, qkv, rounded);
            if let Some([q_norm, k_norm]) = &layer.qk_norm {
                head_norms(qkv, width, (q_dim, q_norm), (kv_dim, k_norm), c.rms_eps);
            }
            rope_in_place(&self.context, &self.threads, ViewMut::strided(qkv, 0, q_shape, strides)?, &rope)?;
            if let Some(queries) = queries.get_mut(i) {
                qkv.chunks_exact(width).for_each(|token| queries.extend_from_slice(&token[..q_dim]));
            }
            let slots = match &segments {
                Some(segments) => &segments.slots,
                None => &kinds[&kind.window].1,
            };
            let (k_cache, v_cache) = cache.views_mut(i)?;
            let mut write = KvWrite::new(
                View::strided(qkv, q_dim, kv_shape, strides)?,
                View::strided(qkv, q_dim + kv_dim, kv_shape, strides)?,
                k_cache,
                v_cache,
                // Slots are numbered through all rows, as those of a pool of pages are.
                Destination::slots(slots).layout(Layout::paged(&[], 0)),
            )
            .rope(rope);
            [write.k_hadamard, write.v_hadamard] = hadamard;
            kv_write(&self.context, &self.threads, write)?;
            for (&(row, position), x) in places.iter().zip(qkv.chunks_exact(width)) {
                cache.keep_unrotated(i, row, position as usize, &x[q_dim..q_dim + kv_dim]);
            }
            let mut options = AttentionOptions::new();
            (options.scale, options.softcap) = (c.attn_scale, c.attn_softcap);
            [options.k_hadamard, options.v_hadamard] = hadamard;
            if let Some(segments) = &segments {
                options.window_left = kind.window.map(|n| n as u32 - 1);
                let run = (&self.context, &self.threads as &dyn Runner, &mut *workspace);
                segments.attention(run, (cache, i), qkv, options, own_attn, (states, all_states))?;
            } else {
                let (k, v) = cache.views(i)?;
                let (q, out) = (View::strided(qkv, 0, q_shape, strides)?, ViewMut::new(own_attn, q_shape)?);
                let tensors = AttentionTensors::new(q, k, v, out);
                attention(&self.context, &self.threads, workspace, tensors, &options.plan(&kinds[&kind.window].0))?;
            }
            let attn = match self.division.divided() {
                None => &*own_attn,
                Some(_) => {
                    attn.resize(m * self.config.q_dim(), 0.0);
                    self.division.gather_columns(own_attn, m, &self.division.heads, attn, room)?;
                    &*attn
                }
            };
            self.apply_divided(&layer.attn_out, (attn, m), &self.division.dim, delta, (own, room, rounded))?;
            add_normed(x, delta, layer.attn_post_norm.as_deref(), c.rms_eps, h);

            rms_norm(x, &layer.ffn_norm, c.rms_eps, h);
            work.add_linear(&[&layer.qkv, &layer.attn_out], m);
            let mut pass = Pass { config: c, division: &self.division, linear, rounded, work };
            feed_forward(&mut pass, &layer.ffn, h, m, delta, ffn)?;
            add_normed(x, delta, layer.ffn_post_norm.as_deref(), c.rms_eps, h);
        }
        Ok(())
    }

    /// Converts the output of the layers, `[n, dim]`, to logits, `[n, vocab]`.
    fn logits(&self, x: &[f32], scratch: &mut Scratch) -> Result<Vec<f32>> {
        let (c, head) = (&self.config, self.weights.head());
        let n = x.len() / c.dim;
        if n == 0 {
            return Ok(Vec::new());
        }
        let Scratch { h, own, room, rounded, work, .. } = scratch;
        h.resize(x.len(), 0.0);
        rms_norm(x, &self.weights.output_norm, c.rms_eps, h);
        let mut out = vec![0.0; n * c.vocab];
        work.add_linear(&[head], n);
        self.apply_divided(head, (h, n), &self.division.vocab, &mut out, (own, room, rounded))?;
        if c.logit_scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= c.logit_scale);
        }
        if let Some(cap) = c.logit_softcap {
            out.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
        }
        Ok(out)
    }
}

/// The bits of a tree as a mask over all rows of a cache, of which one has queries.
struct TreeBits<'a> {
    visible: &'a [u8],
    queries: usize,
    keys: usize,
    /// A list of these per row.
    first_keys: Vec<i32>,
    offsets: Vec<i64>,
    lines: Vec<i64>,
}

impl<'a> TreeBits<'a> {
    /// `lengths` are those after the pass.
    fn new(tree: &TreePass<'a>, (row, ids): (usize, &[u32]), lengths: &[i32]) -> Self {
        let mut first_keys = lengths.to_vec();
        first_keys[row] = tree.first_key as i32;
        let keys = lengths[row] as usize - tree.first_key;
        Self {
            visible: tree.visible,
            queries: ids.len(),
            keys,
            offsets: vec![0; lengths.len()],
            lines: vec![8 * keys.div_ceil(8) as i64; lengths.len()],
            first_keys,
        }
    }

    fn mask(&self, heads: usize) -> Result<BitMask<'_>> {
        let shape = [self.first_keys.len(), self.queries, heads, self.keys];
        let mask = BitMask::per_sequence(self.visible, &self.offsets, &self.lines, 0, shape)?;
        Ok(mask.with_first_keys(&self.first_keys))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::driver::embedded;

    /// Two rows of 64, with all others between them, take the work of two.
    #[test]
    fn rows_that_are_not_named_cost_nothing() {
        let file = embedded::open().unwrap();
        let (mut config, mut weights) = (file.config().clone(), file.weights(&|_, _| ()).unwrap());
        config.layers.truncate(1);
        weights.layers.truncate(1);
        let decoder = Decoder::new(config, weights, 0, None, Threads::new(1).unwrap()).unwrap();
        let mut cache = Cache::new(decoder.config(), 64, 8, DType::F32).unwrap();
        let mut scratch = Scratch::default();
        let logits = decoder.forward_rows(&mut cache, &mut scratch, &[(63, &[5]), (0, &[6])], Logits::Last).unwrap();
        assert_eq!(logits.len(), 2 * decoder.config().vocab);
        let c = decoder.config();
        assert_eq!((scratch.x.len(), scratch.qkv.len()), (2 * c.dim, 2 * (c.q_dim() + 2 * c.kv_dim())));
        // Rows with fewer tokens than others take no more than their own.
        let rows: [(usize, &[u32]); 3] = [(3, &[1; 7]), (9, &[]), (0, &[6])];
        decoder.forward_rows(&mut cache, &mut scratch, &rows, Logits::None).unwrap();
        assert_eq!(scratch.x.len(), 8 * c.dim);
        assert_eq!((cache.len(63), cache.len(0), cache.len(3), cache.len(9)), (1, 2, 7, 0));
    }
}
