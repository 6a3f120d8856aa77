//! A decoder on a mesh of processes: each computes a part of the sequences, of the heads and of the keys.
//!
//! # The road of data
//! A mesh of `data x model x sequence` processes ([`Mesh`]) divides into `data` groups, which have requests of their own and
//! exchange nothing. The `model x sequence` processes of a group run the same [`Scheduler`](super::Scheduler) on the same
//! requests. They choose the same tokens, because all of them get the same bits of every logit; so there is nobody who leads,
//! and nothing to send but activations.
//! ```text
//!            in every process              gathered over model         gathered over sequence
//! x          own rows of the embedding     rows of new tokens, dim
//! each layer:
//!   q k v    own heads, of whole x
//!   cache    own KV heads, own keys
//!   attention  own heads over own keys                                 states of own heads, by chunk
//!            merged, own heads             heads * head_dim
//!   Wo       own outputs, of all heads     dim
//!   g u      own outputs, of whole x
//!   act(g)*u                               ffn_dim
//!   Wd       own outputs, of whole act     dim
//! logits     own tokens of the vocabulary  vocab
//! ```
//! - **model**: a process holds some rows of every matrix: those of its heads, and an even part of all other outputs. So no row of
//!   a matrix is divided. Every dot product is computed by one process as one process alone would compute it, and blocks of
//!   quantised weights stay whole; the price is that inputs are gathered as well as outputs, four times per layer, where
//!   partial sums need two reductions, which have other bits ([mesh](crate::docs::mesh) has the bytes). More processes than KV heads share a KV head
//!   and divide its query heads.
//! - **sequence**: a process holds the keys of a segment, which begins and ends on the [grid](crate::SPLIT_GRID) of attention,
//!   and computes the states of its chunks ([`attention_chunks`](crate::attention_chunks)). The states of all segments
//!   are gathered and merged ([`merge_chunks`](crate::merge_chunks)) in every process of the axis, which gives the bits of one
//!   process. Weights are the same along this axis, and linear layers are computed by each.
//! - **data**: nothing is exchanged. Weights are the same.
//!
//! # Bits
//! For quantised weights, logits have the bits of one process, whatever the mesh. For plain floats that holds for the
//! attention; `gemm` chooses the order of a sum by the size of the product, so that linear layers differ in rounding.
//!
//! # Transport
//! [`Exchange`] is the one operation that is needed, an all-gather along an axis. The feature `mpi` has it over MPI
//! (`World`). What moves is counted ([`Traffic`]).

mod segments;
#[cfg(feature = "mpi")]
mod world;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(super) use self::segments::Segments;
#[cfg(feature = "mpi")]
pub use self::world::{Group, World};

use super::error::{Error, Result};
use super::model::ModelConfig;
use crate::{HeadShard, Mesh, SPLIT_GRID, Shard};

/// An axis along which activations are exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MeshAxis {
    /// Heads, and outputs of linear layers.
    Model,
    /// Segments of the keys.
    Sequence,
}

/// How the processes of a mesh exchange activations.
///
/// A process is called by one thread at a time. All processes that differ along `axis` alone call the same functions with the
/// same counts, in the same order.
pub trait Exchange: Debug + Send + Sync {
    /// Gathers the parts of all processes along an axis, in the order of their coordinates: part i has `counts[i]` elements, and
    /// `all` has room for all. `mine` is the part of this process.
    ///
    /// An error if a process has ended. Implementations may end this one instead.
    fn all_gather(&self, axis: MeshAxis, mine: &[f32], counts: &[usize], all: &mut [f32]) -> Result<()>;

    /// Ends all processes, because this one cannot continue. The error says why.
    fn abort(&self, error: &Error);
}

/// What a process has received along an axis.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes from other processes.
    pub bytes: u64,
    /// The number of exchanges.
    pub exchanges: u64,
}

#[derive(Debug, Default)]
struct Counter {
    bytes: AtomicU64,
    exchanges: AtomicU64,
}

/// The part that this process has of a decoder.
#[derive(Debug, Clone)]
pub struct MeshPart {
    mesh: Mesh,
    shard: Shard,
    exchange: Arc<dyn Exchange>,
    /// Along the axes model and sequence.
    counters: Arc<[Counter; 2]>,
}

/// Part `i` of `n` rows in `parts` parts, which differ by one row at most.
fn part(n: usize, i: usize, parts: usize) -> Range<usize> {
    Mesh::new(parts, 1, 1).shard(i).map_or(0..0, |shard| shard.sequences(n))
}

impl MeshPart {
    /// Part `rank` of a decoder on a mesh, as [`Mesh::shard`] numbers them.
    pub fn new(mesh: Mesh, rank: usize, exchange: Arc<dyn Exchange>) -> Result<Self> {
        let shard = mesh.shard(rank).map_err(|e| Error::argument(e.message()))?;
        Ok(Self { mesh, shard, exchange, counters: Arc::default() })
    }

    /// The mesh.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// This process's coordinates.
    pub fn shard(&self) -> Shard {
        self.shard
    }

    /// What this process has received along an axis.
    pub fn traffic(&self, axis: MeshAxis) -> Traffic {
        let counter = &self.counters[axis as usize];
        Traffic { bytes: counter.bytes.load(Ordering::Relaxed), exchanges: counter.exchanges.load(Ordering::Relaxed) }
    }

    /// Checks whether a model can be divided.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let model = self.mesh.model;
        let ModelConfig { heads, kv_heads, .. } = *config;
        if model > heads {
            return Err(Error::argument(format!("model={model} parts, but the model has {heads} query heads")));
        }
        if model > kv_heads && !model.is_multiple_of(kv_heads) {
            return Err(Error::argument(format!(
                "model={model} parts are more than the model's {kv_heads} KV heads, and no multiple of them"
            )));
        }
        if model > kv_heads && model / kv_heads > heads / kv_heads {
            return Err(Error::argument(format!(
                "model={model} parts are {} for each KV head, but {} query heads share one",
                model / kv_heads,
                heads / kv_heads
            )));
        }
        let least = config.dim.min(config.ffn_dim).min(config.vocab);
        if model > least {
            return Err(Error::argument(format!("model={model} parts, but a linear layer has {least} outputs")));
        }
        Ok(())
    }

    /// Checks whether sequences of up to `capacity` tokens have a segment for every process.
    pub fn check_capacity(&self, capacity: usize) -> Result<()> {
        let sequence = self.mesh.sequence;
        let segments = capacity.div_ceil(SPLIT_GRID);
        if sequence > 1 && sequence > segments {
            return Err(Error::argument(format!(
                "sequence={sequence} segments, but {capacity} tokens are {segments} times the {SPLIT_GRID} keys at whose multiples \
                 segments begin"
            )));
        }
        Ok(())
    }

    /// The heads of process `model` along the axis.
    fn heads_of(&self, config: &ModelConfig, model: usize) -> Result<HeadShard> {
        Ok(self.mesh.at(0, model, 0)?.heads(config.heads, config.kv_heads)?)
    }

    /// Its share of `n` outputs of a linear layer.
    pub(super) fn rows(&self, n: usize) -> Range<usize> {
        part(n, self.shard.model(), self.mesh.model)
    }

    /// The keys that it holds of sequences of up to `capacity` tokens; `None` if all.
    pub(super) fn segment(&self, capacity: usize) -> Option<Range<usize>> {
        (self.mesh.sequence > 1).then(|| self.shard.keys(capacity))
    }

    /// The keys of every process along the axis.
    pub(super) fn segments(&self, capacity: usize) -> Result<Vec<Range<usize>>> {
        (0..self.mesh.sequence).map(|i| Ok(self.mesh.at(0, 0, i)?.keys(capacity))).collect()
    }

    /// [`Exchange::all_gather`], counted.
    pub(super) fn all_gather(&self, axis: MeshAxis, mine: &[f32], counts: &[usize], all: &mut [f32]) -> Result<()> {
        self.exchange.all_gather(axis, mine, counts, all)?;
        let counter = &self.counters[axis as usize];
        counter.bytes.fetch_add((size_of_val(all) - size_of_val(mine)) as u64, Ordering::Relaxed);
        counter.exchanges.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Ends all processes.
    pub(super) fn abort(&self, error: &Error) {
        self.exchange.abort(error);
    }
}

/// How the outputs of a decoder's matrices are divided over the axis `model`.
#[derive(Debug)]
pub(super) struct Division {
    part: Option<MeshPart>,
    /// Widths of all processes' parts.
    pub heads: Vec<usize>,
    pub dim: Vec<usize>,
    pub ffn: Vec<usize>,
    pub vocab: Vec<usize>,
}

impl Division {
    /// One process.
    pub fn whole(config: &ModelConfig) -> Self {
        Self {
            part: None,
            heads: vec![config.q_dim()],
            dim: vec![config.dim],
            ffn: vec![config.ffn_dim],
            vocab: vec![config.vocab],
        }
    }

    pub fn new(config: &ModelConfig, part_of: &MeshPart) -> Result<Self> {
        let parts = part_of.mesh.model;
        let widths = |n: usize| (0..parts).map(|i| part(n, i, parts).len()).collect();
        let heads = (0..parts)
            .map(|i| Ok(part_of.heads_of(config, i)?.heads.len() * config.head_dim))
            .collect::<Result<_>>()?;
        Ok(Self {
            heads,
            dim: widths(config.dim),
            ffn: widths(config.ffn_dim),
            vocab: widths(config.vocab),
            part: Some(part_of.clone()),
        })
    }

    /// The width of this process's part inside the feed-forward part.
    pub fn own_ffn(&self) -> usize {
        self.ffn[self.part.as_ref().map_or(0, |part| part.shard.model())]
    }

    /// The part, if there are others.
    pub fn part(&self) -> Option<&MeshPart> {
        self.part.as_ref()
    }

    /// The part, if outputs are divided.
    pub fn divided(&self) -> Option<&MeshPart> {
        self.part.as_ref().filter(|part| part.mesh.model > 1)
    }

    /// Makes whole rows of the parts that all processes have of `m` rows: `widths` elements each. `room` is scratch.
    pub fn gather_columns(
        &self,
        mine: &[f32],
        m: usize,
        widths: &[usize],
        all: &mut [f32],
        room: &mut Vec<f32>,
    ) -> Result<()> {
        let Some(part) = self.divided() else {
            all.copy_from_slice(mine);
            return Ok(());
        };
        let counts: Vec<usize> = widths.iter().map(|w| w * m).collect();
        if m == 1 {
            return part.all_gather(MeshAxis::Model, mine, &counts, all);
        }
        room.resize(all.len(), 0.0);
        part.all_gather(MeshAxis::Model, mine, &counts, room)?;
        let (width, mut from) = (widths.iter().sum::<usize>(), 0);
        let mut column = 0;
        for (&w, &count) in widths.iter().zip(&counts) {
            for (row, part) in all.chunks_exact_mut(width).zip(room[from..from + count].chunks_exact(w)) {
                row[column..column + w].copy_from_slice(part);
            }
            (from, column) = (from + count, column + w);
        }
        Ok(())
    }
}

/// The rows of a model's matrices that a process reads from the file.
#[derive(Debug, Clone)]
pub(super) struct RowRanges {
    pub q: Range<usize>,
    pub kv: Range<usize>,
    pub dim: Range<usize>,
    pub ffn: Range<usize>,
    pub vocab: Range<usize>,
}

impl RowRanges {
    pub fn whole(c: &ModelConfig) -> Self {
        Self { q: 0..c.q_dim(), kv: 0..c.kv_dim(), dim: 0..c.dim, ffn: 0..c.ffn_dim, vocab: 0..c.vocab }
    }

    pub fn new(c: &ModelConfig, part: &MeshPart) -> Result<Self> {
        let HeadShard { kv_heads, heads, .. } = part.heads_of(c, part.shard.model())?;
        let elements = |heads: Range<usize>| heads.start * c.head_dim..heads.end * c.head_dim;
        Ok(Self {
            q: elements(heads),
            kv: elements(kv_heads),
            dim: part.rows(c.dim),
            ffn: part.rows(c.ffn_dim),
            vocab: part.rows(c.vocab),
        })
    }

    /// The shape of attention in this process: a model with its heads alone.
    pub fn local(&self, c: &ModelConfig) -> ModelConfig {
        ModelConfig { heads: self.q.len() / c.head_dim, kv_heads: self.kv.len() / c.head_dim, ..c.clone() }
    }
}
