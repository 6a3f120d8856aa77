//! A decoder's weights in f32. Every tensor is found and its shape checked before any is unpacked.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::file::ModelFile;
use super::names::Names;
use crate::driver::error::{Error, Result};
use crate::driver::linear::Matrix;
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
    /// The gate and up projections in one matrix, in this order: `[2 * ffn_dim, dim]`.
    pub gate_up: Matrix,
    /// Back to the residual stream, `[dim, ffn_dim]`.
    pub down: Matrix,
    /// RMSNorm of its output, if the model has one.
    pub ffn_post_norm: Option<Vec<f32>>,
}

/// A model's weights in f32.
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
    /// Unpacks all weights to f32, on the current rayon pool. `progress` receives the bytes done and the total bytes,
    /// from any thread.
    pub fn weights(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Weights> {
        let mut plan = Plan { file: self, names: self.names(), jobs: Vec::new(), used: HashSet::new() };
        let mut weights = plan.allocate()?;
        plan.reject_strangers()?;
        let jobs = plan.jobs;

        let total = jobs.iter().map(|t| t.data.len()).sum();
        let done = AtomicUsize::new(0);
        // Weights and tensors are in the same order; `Plan::take` has checked that their lengths agree.
        let mut jobs = jobs.into_iter();
        let mut pairs: Vec<(Tensor<'_>, &mut [f32])> = Vec::new();
        for mut dst in weights.slices() {
            while !dst.is_empty() {
                let tensor = jobs.next().ok_or_else(|| Error::malformed("fewer tensors than weights"))?;
                let (head, tail) = dst.split_at_mut(tensor.elements().min(dst.len()));
                pairs.push((tensor, head));
                dst = tail;
            }
        }
        pairs.into_par_iter().try_for_each(|(tensor, dst)| {
            // A multiple of every block size, small enough that one large embedding keeps all threads busy.
            const ELEMENTS: usize = 1 << 16;
            let bytes = tensor.ty.bytes(ELEMENTS).unwrap_or(usize::MAX);
            dst.par_chunks_mut(ELEMENTS).zip(tensor.data.par_chunks(bytes)).try_for_each(|(dst, src)| {
                dequantize(tensor.ty, src, dst).map_err(|e| e.context(tensor.name))?;
                progress(done.fetch_add(src.len(), Ordering::Relaxed) + src.len(), total);
                Ok::<(), Error>(())
            })
        })?;
        let offset = self.names().norm_offset;
        if offset != 0.0 {
            weights.norms().for_each(|norm| norm.iter_mut().for_each(|w| *w += offset));
        }
        Ok(weights)
    }
}

/// Finds every tensor, checks its shape and allocates memory for it, before any is unpacked.
struct Plan<'a> {
    file: &'a ModelFile,
    names: &'static Names,
    jobs: Vec<Tensor<'a>>,
    used: HashSet<String>,
}

impl<'a> Plan<'a> {
    fn allocate(&mut self) -> Result<Weights> {
        let c = self.file.config();
        let n = self.names;
        let embedding = self.matrix(&[(n.embedding.to_owned(), c.vocab)], c.dim)?;
        let mut layers = Vec::new();
        for i in 0..c.layers.len() {
            let name = |part: &str| format!("{}{i}.{part}", n.layer);
            let [q, k, v] = n.qkv.map(name);
            let [gate, up] = n.gate_up.map(name);
            let [q_norm, k_norm] = n.qk_norm.map(name);
            layers.push(LayerWeights {
                attn_norm: self.vector(name(n.attn_norm), c.dim)?,
                qk_norm: match c.qk_norm {
                    true => Some([self.vector(q_norm, c.head_dim)?, self.vector(k_norm, c.head_dim)?]),
                    false => None,
                },
                qkv: self.matrix(&[(q, c.q_dim()), (k, c.kv_dim()), (v, c.kv_dim())], c.dim)?,
                attn_out: self.matrix(&[(name(n.attn_out), c.dim)], c.q_dim())?,
                attn_post_norm: self.post_norm(name(n.attn_post_norm))?,
                ffn_norm: self.vector(name(n.ffn_norm), c.dim)?,
                gate_up: self.matrix(&[(gate, c.ffn_dim), (up, c.ffn_dim)], c.dim)?,
                down: self.matrix(&[(name(n.down), c.dim)], c.ffn_dim)?,
                ffn_post_norm: self.post_norm(name(n.ffn_post_norm))?,
            });
        }
        let output_norm = self.vector(n.output_norm.to_owned(), c.dim)?;
        let output = if c.tied { None } else { Some(self.matrix(&[(n.output.to_owned(), c.vocab)], c.dim)?) };
        Ok(Weights { embedding, layers, output_norm, output })
    }

    fn take(&mut self, name: String, want: &[usize]) -> Result<()> {
        let tensor = self.file.tensor(&name)?.ok_or_else(|| Error::malformed(format!("tensor {name:?} is missing")))?;
        if tensor.shape != want {
            return Err(Error::malformed(format!(
                "tensor {name:?} has shape {:?}, but the configuration asks for {want:?}",
                tensor.shape
            )));
        }
        self.jobs.push(tensor);
        self.used.insert(name);
        Ok(())
    }

    fn vector(&mut self, name: String, len: usize) -> Result<Vec<f32>> {
        self.take(name, &[len])?;
        Ok(vec![0.0; len])
    }

    fn post_norm(&mut self, name: String) -> Result<Option<Vec<f32>>> {
        let c = self.file.config();
        if c.post_norms { self.vector(name, c.dim).map(Some) } else { Ok(None) }
    }

    /// Several tensors of equal width, one below the other. Memory is allocated only for tensors that the file has.
    fn matrix(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Matrix> {
        for (name, rows) in parts {
            self.take(name.clone(), &[*rows, cols])?;
        }
        Ok(Matrix::zeros(parts.iter().map(|(_, rows)| rows).sum(), cols))
    }

    /// An unused tensor (a bias, an expert, a second norm) is an error, because the model would not be computed as its
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

impl Weights {
    /// All storage, in the order of [`Plan::allocate`].
    fn slices(&mut self) -> Vec<&mut [f32]> {
        let mut all = vec![self.embedding.data_mut()];
        for l in &mut self.layers {
            all.push(&mut l.attn_norm);
            all.extend(l.qk_norm.iter_mut().flatten().map(Vec::as_mut_slice));
            all.push(l.qkv.data_mut());
            all.push(l.attn_out.data_mut());
            all.extend(l.attn_post_norm.as_deref_mut());
            all.push(&mut l.ffn_norm);
            all.push(l.gate_up.data_mut());
            all.push(l.down.data_mut());
            all.extend(l.ffn_post_norm.as_deref_mut());
        }
        all.push(&mut self.output_norm);
        all.extend(self.output.as_mut().map(Matrix::data_mut));
        all
    }

    fn norms(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        fn of_layer(l: &mut LayerWeights) -> impl Iterator<Item = &mut Vec<f32>> {
            let always = [&mut l.attn_norm, &mut l.ffn_norm].into_iter();
            always.chain(l.qk_norm.iter_mut().flatten()).chain(&mut l.attn_post_norm).chain(&mut l.ffn_post_norm)
        }
        self.layers.iter_mut().flat_map(of_layer).chain([&mut self.output_norm])
    }
}
