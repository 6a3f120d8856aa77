//! Attention over keys that several processes hold in parts.

use std::ops::Range;

use super::{MeshAxis, MeshPart};
use crate::driver::cache::{Cache, Formats};
use crate::driver::error::Result;
use crate::driver::model::ModelConfig;
use crate::{
    AttentionOptions, ChunkMerge, Context, Runner, SegmentLists, View, ViewMut, Workspace, attention_chunks,
    chunk_states_len, merge_chunks,
};

/// Attention over the keys that the processes of a mesh hold in parts, for the rows of a pass.
pub(in crate::driver) struct Segments<'a> {
    part: &'a MeshPart,
    /// The keys of each process along the axis, and of this one.
    all: Vec<Range<usize>>,
    own: Range<usize>,
    /// Rows with new tokens: the row, the first of its queries, and their number.
    rows: Vec<(usize, usize, usize)>,
    /// The length of every row after the pass.
    lengths: &'a [i32],
    /// The slot of each new token; -1 if another process holds it.
    pub slots: Vec<i32>,
    /// Floats of states, by process.
    counts: Vec<usize>,
    config: &'a ModelConfig,
}

impl<'a> Segments<'a> {
    pub fn new(
        part: &'a MeshPart,
        cache: &Cache,
        rows: &[(usize, &[u32])],
        lengths: &'a [i32],
        config: &'a ModelConfig,
    ) -> Result<Self> {
        let all = part.segments(cache.capacity())?;
        let own = all[part.shard().sequence()].clone();
        let (mut list, mut slots, mut first) = (Vec::new(), Vec::new(), 0);
        for &(row, ids) in rows.iter().filter(|(_, ids)| !ids.is_empty()) {
            list.push((row, first, ids.len()));
            first += ids.len();
            let length = lengths[row] as usize;
            slots.extend((length - ids.len()..length).map(|position| match own.contains(&position) {
                true => (row * own.len() + position - own.start) as i32,
                false => -1,
            }));
        }
        let mut this = Self { part, all, own, rows: list, lengths, slots, counts: Vec::new(), config };
        this.counts =
            this.all.iter().map(|s| this.rows.iter().map(|&(row, _, n)| this.states_len(s, row, n)).sum()).collect();
        Ok(this)
    }

    /// The number of keys that a process holds of a row.
    fn keys(&self, segment: &Range<usize>, row: usize) -> usize {
        (self.lengths[row] as usize).clamp(segment.start, segment.end) - segment.start
    }

    /// The floats of the states of `n` queries of a row; none if the process holds no key of it.
    fn states_len(&self, segment: &Range<usize>, row: usize, n: usize) -> usize {
        match self.keys(segment, row) {
            0 => 0,
            keys => chunk_states_len([1, n, self.config.heads, self.config.head_dim], keys, self.config.head_dim),
        }
    }

    /// The attention of a layer; `options` have what does not depend on a row.
    pub fn attention(
        &self,
        (context, runner, workspace): (&Context, &dyn Runner, &mut Workspace),
        (cache, layer): (&Cache, usize),
        qkv: &[f32],
        options: AttentionOptions,
        out: &mut [f32],
        (states, all_states): (&mut Vec<f32>, &mut Vec<f32>),
    ) -> Result<()> {
        let c = self.config;
        let width = c.q_dim() + 2 * c.kv_dim();
        let (k, v) = cache.views(layer)?;
        states.resize(self.counts[self.part.shard().sequence()], 0.0);
        let mut rest = &mut states[..];
        for &(row, first, n) in &self.rows {
            let keys = self.keys(&self.own, row);
            let (states, others) = rest.split_at_mut(self.states_len(&self.own, row, n));
            rest = others;
            if states.is_empty() {
                continue;
            }
            let (mut length, mut start, mut offset) = ([0], [0], [0]);
            SegmentLists::new(&[self.lengths[row]], n).local(self.own.clone(), &mut length, &mut start, &mut offset)?;
            let q_shape = [1, n, c.heads, c.head_dim];
            let strides = [(n * width) as i64, width as i64, c.head_dim as i64, 1];
            let q = View::strided(qkv, first * width, q_shape, strides)?;
            let options = options.causal(true).lengths(&length).offsets(&offset);
            let tensors = (q, k.batch(row, 1)?.seq(0, keys)?, v.batch(row, 1)?.seq(0, keys)?);
            attention_chunks(context, runner, workspace, tensors, &options, states)?;
        }
        all_states.resize(self.counts.iter().sum(), 0.0);
        self.part.all_gather(MeshAxis::Sequence, states, &self.counts, all_states)?;
        // The next states of every process.
        let mut next: Vec<usize> = Vec::with_capacity(self.counts.len());
        self.counts.iter().fold(0, |sum, n| {
            next.push(sum);
            sum + n
        });
        let Formats { k, v, .. } = cache.formats();
        let mut merge = ChunkMerge::new(c.kv_heads, k, v);
        [_, merge.v_hadamard] = cache.hadamard();
        for &(row, first, n) in &self.rows {
            let mut parts = Vec::with_capacity(next.len());
            for (segment, next) in self.all.iter().zip(&mut next) {
                let len = self.states_len(segment, row, n);
                if len > 0 {
                    parts.push(&all_states[*next..*next + len]);
                    *next += len;
                }
            }
            let out = &mut out[first * c.q_dim()..][..n * c.q_dim()];
            let out = ViewMut::new(out, [1, n, c.heads, c.head_dim])?;
            merge_chunks(context, runner, workspace, &parts, &merge, out, None)?;
        }
        Ok(())
    }
}
