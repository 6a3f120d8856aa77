//! A decoder's weights. Every tensor is found and its shape checked before any is read.

use std::collections::HashSet;
use std::ops::Range;

use super::experts::FeedForward;
use super::file::ModelFile;
use super::names::Names;
use crate::driver::error::{Error, Result};
use crate::driver::linear::Matrix;
use crate::driver::mesh::{MeshPart, RowRanges};
use crate::driver::quant::{Tensor, dequantize};

/// One decoder layer's weights.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// RMSNorm before attention.
    pub attn_norm: Vec<f32>,
    /// RMSNorm of query heads and of key heads, `[head_dim]` each, if the model has them.
    pub qk_norm: Option<[Vec<f32>; 2]>,
    /// Queries, keys and values in one matrix, in this order: `[q_dim + 2 * kv_dim, dim]`.
    pub qkv: Matrix,
    /// Attention's output, `[dim, q_dim]`.
    pub attn_out: Matrix,
    /// RMSNorm of its output, if the model has one.
    pub attn_post_norm: Option<Vec<f32>>,
    /// RMSNorm before the feed-forward part.
    pub ffn_norm: Vec<f32>,
    /// The feed-forward part.
    pub ffn: FeedForward,
    /// RMSNorm of its output, if the model has one.
    pub ffn_post_norm: Option<Vec<f32>>,
}

/// A model's weights: matrices in the type of the file, the weights of norms in f32.
#[derive(Debug, Clone)]
pub struct Weights {
    /// One row per token, `[vocab, dim]`.
    pub embedding: Matrix,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// The last RMSNorm.
    pub output_norm: Vec<f32>,
    /// The output layer, `[vocab, dim]`; `None` if it is the embedding.
    pub output: Option<Matrix>,
}

impl Weights {
    /// The output layer, tied or not.
    pub fn head(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }
}

impl ModelFile {
    /// Reads all weights, on the current rayon pool. `progress` receives the bytes done and the total bytes.
    pub fn weights(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Weights> {
        self.rows_of_weights(RowRanges::whole(self.config()), progress)
    }

    /// Reads the rows of all matrices that one process of a mesh computes with.
    pub fn weights_of_part(&self, part: &MeshPart, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Weights> {
        part.check(self.config())?;
        self.rows_of_weights(RowRanges::new(self.config(), part)?, progress)
    }

    fn rows_of_weights(&self, rows: RowRanges, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Weights> {
        let mut plan = Reader { file: self, names: self.names(), rows, used: HashSet::new(), total: 0, found: None };
        plan.weights()?;
        plan.reject_strangers()?;
        let found = Some(Found { done: 0, progress });
        let mut weights = Reader { found, used: HashSet::new(), ..plan }.weights()?;
        let offset = self.names().norm_offset;
        if offset != 0.0 {
            weights.norms().for_each(|norm| norm.iter_mut().for_each(|w| *w += offset));
        }
        Ok(weights)
    }
}

/// Walks through the tensors of a model twice. The first time it checks that each is there and has its shape, and adds
/// up their sizes; the second time it reads them.
pub(super) struct Reader<'a> {
    pub file: &'a ModelFile,
    pub names: &'static Names,
    /// The rows of matrices that are read.
    pub rows: RowRanges,
    used: HashSet<String>,
    /// The bytes of all tensors.
    total: usize,
    /// The second walk.
    found: Option<Found<'a>>,
}

struct Found<'a> {
    done: usize,
    progress: &'a (dyn Fn(usize, usize) + Sync),
}

impl<'a> Reader<'a> {
    fn weights(&mut self) -> Result<Weights> {
        let c = self.file.config();
        let n = self.names;
        let RowRanges { q: q_rows, kv: kv_rows, dim, vocab, .. } = self.rows.clone();
        let embedding = self.matrix(&[(n.embedding.to_owned(), c.vocab, vocab.clone())], c.dim)?;
        let mut layers = Vec::new();
        for i in 0..c.layers.len() {
            let name = |part: &str| format!("{}{i}.{part}", n.layer);
            let [q, k, v] = n.qkv.map(name);
            let [q_norm, k_norm] = n.qk_norm.map(name);
            layers.push(LayerWeights {
                attn_norm: self.vector(name(n.attn_norm), c.dim)?,
                qk_norm: match c.qk_norm {
                    true => Some([self.vector(q_norm, c.head_dim)?, self.vector(k_norm, c.head_dim)?]),
                    false => None,
                },
                qkv: self.matrix(
                    &[
                        (q, c.q_dim(), q_rows.clone()),
                        (k, c.kv_dim(), kv_rows.clone()),
                        (v, c.kv_dim(), kv_rows.clone()),
                    ],
                    c.dim,
                )?,
                attn_out: self.matrix(&[(name(n.attn_out), c.dim, dim.clone())], c.q_dim())?,
                attn_post_norm: self.post_norm(name(n.attn_post_norm))?,
                ffn_norm: self.vector(name(n.ffn_norm), c.dim)?,
                ffn: self.feed_forward(name)?,
                ffn_post_norm: self.post_norm(name(n.ffn_post_norm))?,
            });
        }
        let output_norm = self.vector(n.output_norm.to_owned(), c.dim)?;
        let output = if c.tied { None } else { Some(self.matrix(&[(n.output.to_owned(), c.vocab, vocab)], c.dim)?) };
        Ok(Weights { embedding, layers, output_norm, output })
    }

    /// A tensor of a given shape. `None` in the first walk.
    pub fn tensor(&mut self, name: String, want: &[usize]) -> Result<Option<Tensor<'a>>> {
        let tensor = self.file.tensor(&name)?.ok_or_else(|| Error::malformed(format!("tensor {name:?} is missing")))?;
        if tensor.shape != want {
            return Err(Error::malformed(format!(
                "tensor {name:?} has shape {:?}, but the configuration asks for {want:?}",
                tensor.shape
            )));
        }
        self.used.insert(name);
        match &mut self.found {
            None => {
                self.total += tensor.data.len();
                Ok(None)
            }
            Some(found) => {
                found.done += tensor.data.len();
                (found.progress)(found.done, self.total);
                Ok(Some(tensor))
            }
        }
    }

    fn vector(&mut self, name: String, len: usize) -> Result<Vec<f32>> {
        let Some(tensor) = self.tensor(name, &[len])? else { return Ok(Vec::new()) };
        let mut values = vec![0.0; len];
        dequantize(tensor.ty, tensor.data, &mut values).map_err(|e| e.context(tensor.name))?;
        Ok(values)
    }

    fn post_norm(&mut self, name: String) -> Result<Option<Vec<f32>>> {
        let c = self.file.config();
        if c.post_norms { self.vector(name, c.dim).map(Some) } else { Ok(None) }
    }

    /// Several tensors of equal width, one below the other: the number of rows of each, and those that are wanted.
    pub fn matrix(&mut self, parts: &[(String, usize, Range<usize>)], cols: usize) -> Result<Matrix> {
        let part =
            |(name, rows, wanted): &(String, usize, Range<usize>)| match self.tensor(name.clone(), &[*rows, cols])? {
                None => Ok(Matrix::from_f32(0, cols, Vec::new())),
                Some(t) => rows_of(&t, t.data, *rows, wanted.clone()),
            };
        Matrix::stack(parts.iter().map(part).collect::<Result<_>>()?)
    }

    /// An unused tensor (a bias, a shared expert, a second norm) is an error, because the model would not be computed as its
    /// author meant.
    fn reject_strangers(&self) -> Result<()> {
        for name in self.file.tensor_names() {
            if !self.used.contains(name) && !self.names.known.iter().any(|k| name.ends_with(k)) {
                return Err(Error::unsupported(format!(
                    "tensor {name:?} has no place in a decoder of this architecture with {} layers",
                    self.file.config().layers.len()
                )));
            }
        }
        Ok(())
    }
}

/// Rows of a matrix of `rows` rows whose bytes are `data`, a part of a tensor's.
pub(super) fn rows_of(tensor: &Tensor<'_>, data: &[u8], rows: usize, wanted: Range<usize>) -> Result<Matrix> {
    // A row is whole blocks.
    let bytes = data.len() / rows;
    let cols = tensor.shape.last().copied().unwrap_or(0);
    Matrix::from_bytes(tensor.ty, wanted.len(), cols, &data[wanted.start * bytes..wanted.end * bytes])
        .map_err(|e| e.context(tensor.name))
}

impl Weights {
    /// The memory that all weights take, in bytes.
    pub fn memory(&self) -> usize {
        let of_layer = |l: &LayerWeights| {
            [&l.qkv, &l.attn_out].into_iter().chain(l.ffn.matrices()).map(Matrix::memory).sum::<usize>()
                + l.norms().map(|norm| size_of_val(norm.as_slice())).sum::<usize>()
        };
        self.embedding.memory()
            + self.output.as_ref().map_or(0, Matrix::memory)
            + size_of_val(self.output_norm.as_slice())
            + self.layers.iter().map(of_layer).sum::<usize>()
    }

    fn norms(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        fn of_layer(l: &mut LayerWeights) -> impl Iterator<Item = &mut Vec<f32>> {
            let always = [&mut l.attn_norm, &mut l.ffn_norm].into_iter();
            always.chain(l.qk_norm.iter_mut().flatten()).chain(&mut l.attn_post_norm).chain(&mut l.ffn_post_norm)
        }
        self.layers.iter_mut().flat_map(of_layer).chain([&mut self.output_norm])
    }
}

impl LayerWeights {
    fn norms(&self) -> impl Iterator<Item = &Vec<f32>> {
        let always = [&self.attn_norm, &self.ffn_norm].into_iter();
        always.chain(self.qk_norm.iter().flatten()).chain(&self.attn_post_norm).chain(&self.ffn_post_norm)
    }
}
