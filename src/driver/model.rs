//! A model file's configuration and its weights, brought to one form whatever the container.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::error::{Error, Result};
use super::gguf::{Array, Gguf, Value};
use super::hf::{HfConfig, HfDir, HfRope};
use super::linear::Matrix;
use super::quant::{Tensor, dequantize};
use super::tokenizer::Tokenizer;
use crate::{MAX_HEAD_DIM, Pairing, RopeFrequencies, RopeScaling};

/// How a model stretches RoPE over a context longer than it was first trained on.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Stretch {
    /// One of the library's scalings, the same at every length.
    Fixed(RopeScaling),
    /// LongRoPE: a divisor for each frequency, one list for short sequences and one for long.
    LongRope {
        /// The divisors up to the original context.
        short: Vec<f64>,
        /// The divisors beyond it.
        long: Vec<f64>,
        /// How much longer than the original context the model's context is.
        factor: f64,
        /// The context of the first training.
        original_context: usize,
        /// What cosine and sine are multiplied with, if the file says so itself.
        attention_factor: Option<f64>,
    },
    /// A divisor for each frequency, already worked out: how GGUF files carry Llama 3.1's scaling.
    Divisors(Vec<f64>),
}

/// Everything about a model's rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric series of wavelengths.
    pub base: f64,
    /// Which elements form a pair: neighbours in GGUF files of the Llama family, whose weights are permuted for it, and
    /// the two halves of a head in Hugging Face checkpoints.
    pub pairing: Pairing,
    /// The leading part of a head that is turned.
    pub rotary_dim: usize,
    /// The stretching.
    pub stretch: Stretch,
}

impl RopeConfig {
    /// The frequencies for sequences of up to `longest` tokens.
    pub fn frequencies(&self, longest: usize) -> Result<RopeFrequencies> {
        let new = |scaling: &RopeScaling| RopeFrequencies::new(self.rotary_dim, self.base, scaling);
        Ok(match &self.stretch {
            Stretch::Fixed(scaling) => new(scaling)?,
            Stretch::LongRope { short, long, factor, original_context, attention_factor } => {
                new(&RopeScaling::LongRope {
                    factors: if longest > *original_context { long } else { short }.clone(),
                    factor: *factor,
                    original_max_position: *original_context as f64,
                    attention_factor: *attention_factor,
                })?
            }
            // LongRoPE without its factor on cosines and sines is a plain division.
            Stretch::Divisors(divisors) => new(&RopeScaling::LongRope {
                factors: divisors.clone(),
                factor: 1.0,
                original_max_position: 1.0,
                attention_factor: Some(1.0),
            })?,
        })
    }
}

/// What one layer's attention sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// The most recent positions that a query sees, its own among them; all of them if absent.
    pub window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] turns its queries and keys.
    pub rope: usize,
}

/// What the gate of the feed-forward part goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// The shape of a decoder. Families differ in these numbers and in which norms there are, not in code.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// What the file calls itself.
    pub name: Option<String>,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// The decoder layers, first to last.
    pub layers: Vec<LayerConfig>,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Elements in a head.
    pub head_dim: usize,
    /// Width inside the feed-forward part.
    pub ffn_dim: usize,
    /// The feed-forward part's activation.
    pub activation: Activation,
    /// Added to the mean square before RMSNorm's root.
    pub rms_eps: f32,
    /// Whether every head of queries and keys goes through an RMSNorm before RoPE.
    pub qk_norm: bool,
    /// Whether what attention and the feed-forward part give goes through an RMSNorm before it is added.
    pub post_norms: bool,
    /// The rotary embeddings, at least one; layers name theirs by its index.
    pub ropes: Vec<RopeConfig>,
    /// Factor on a token's embedding.
    pub embedding_scale: f32,
    /// Factor on `q.k`; `1 / sqrt(head_dim)` if absent.
    pub attn_scale: Option<f32>,
    /// Softcap on attention's logits.
    pub attn_softcap: Option<f32>,
    /// Softcap on the model's logits.
    pub logit_softcap: Option<f32>,
    /// Positions the model was made for.
    pub context: usize,
    /// Whether the output layer is the embedding itself.
    pub tied: bool,
    /// The token that starts a text, if any.
    pub bos: Option<u32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
    /// The chat template as the file carries it (Jinja source).
    pub chat_template: Option<String>,
}

impl ModelConfig {
    /// Elements of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of all key (or value) heads together.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The number of weights, from the shapes.
    pub fn parameters(&self) -> usize {
        let attention = self.dim * (2 * self.q_dim() + 2 * self.kv_dim());
        let norms = self.dim * if self.post_norms { 4 } else { 2 } + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let layer = attention + 3 * self.dim * self.ffn_dim + norms;
        let ends = self.vocab * self.dim * if self.tied { 1 } else { 2 };
        self.layers.len() * layer + ends + self.dim
    }

    /// Refuses what no decoder can have, so that later arithmetic on these numbers is safe.
    fn check(&self) -> Result<()> {
        // Far beyond any model; small enough that a product of three fits 64 bits.
        const MOST: usize = 1 << 21;
        for (what, n) in [
            ("vocabulary size", self.vocab),
            ("embedding length", self.dim),
            ("layer count", self.layers.len()),
            ("head count", self.heads),
            ("key/value head count", self.kv_heads),
            ("head size", self.head_dim),
            ("feed-forward length", self.ffn_dim),
        ] {
            if n == 0 || n > MOST {
                return Err(Error::malformed(format!("the {what} is {n}; 1 to {MOST} are possible")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::malformed(format!(
                "{} query heads cannot share {} key/value heads evenly",
                self.heads, self.kv_heads
            )));
        }
        if self.head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("heads of {} elements; {MAX_HEAD_DIM} is the most", self.head_dim)));
        }
        for rope in &self.ropes {
            let rotary = rope.rotary_dim;
            if rotary > self.head_dim {
                return Err(Error::malformed(format!("RoPE turns {rotary} elements of heads of {}", self.head_dim)));
            }
            // Both lists of LongRoPE.
            for longest in [0, usize::MAX] {
                rope.frequencies(longest).map_err(|e| Error::malformed(format!("RoPE: {e}")))?;
            }
        }
        for layer in &self.layers {
            if layer.rope >= self.ropes.len() {
                return Err(Error::malformed(format!("RoPE {} of {}", layer.rope, self.ropes.len())));
            }
            if let Some(n) = layer.window.filter(|n| !(1..=i32::MAX as usize).contains(n)) {
                return Err(Error::malformed(format!(
                    "a sliding window of {n} positions; 1 to {} are possible",
                    i32::MAX
                )));
            }
        }
        for (what, x) in [
            ("embedding's scale", Some(self.embedding_scale)),
            ("scale of attention", self.attn_scale),
            ("softcap of attention", self.attn_softcap),
            ("softcap of the logits", self.logit_softcap),
        ] {
            if let Some(x) = x.filter(|x| !(x.is_finite() && *x > 0.0)) {
                return Err(Error::malformed(format!("the {what} is {x}, which is not a positive number")));
            }
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(Error::malformed(format!("RMSNorm's epsilon is {}", self.rms_eps)));
        }
        for id in self.bos.iter().chain(&self.eos) {
            if *id as usize >= self.vocab {
                return Err(Error::malformed(format!(
                    "token id {id} is outside of the {} in the vocabulary",
                    self.vocab
                )));
            }
        }
        Ok(())
    }
}

/// One decoder layer's weights.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// RMSNorm before attention.
    pub attn_norm: Vec<f32>,
    /// RMSNorm of a query's head and of a key's head, `[head_dim]`, where the model has them.
    pub qk_norm: Option<[Vec<f32>; 2]>,
    /// Queries, keys and values in one matrix, in this order: `[q_dim + 2 * kv_dim, dim]`.
    pub qkv: Matrix,
    /// Attention's output, `[dim, q_dim]`.
    pub attn_out: Matrix,
    /// RMSNorm of that, where the model has one.
    pub attn_post_norm: Option<Vec<f32>>,
    /// RMSNorm before the feed-forward part.
    pub ffn_norm: Vec<f32>,
    /// The gate and up projections in one matrix, in this order: `[2 * ffn_dim, dim]`.
    pub gate_up: Matrix,
    /// Back to the residual stream, `[dim, ffn_dim]`.
    pub down: Matrix,
    /// RMSNorm of that, where the model has one.
    pub ffn_post_norm: Option<Vec<f32>>,
}

/// A model's weights in f32.
#[derive(Debug, Clone)]
pub struct Weights {
    /// One row a token, `[vocab, dim]`.
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

/// A listing entry of [`ModelFile::tensors`].
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// The element type's name.
    pub ty: &'static str,
    /// The extents, slowest first.
    pub shape: Vec<usize>,
    /// The size in the file.
    pub bytes: usize,
}

#[derive(Debug)]
enum Source {
    Gguf(Gguf),
    Hf(Box<HfDir>),
}

/// An open model: configuration read and checked, weights still in the file.
#[derive(Debug)]
pub struct ModelFile {
    source: Source,
    config: ModelConfig,
}

impl ModelFile {
    /// Opens a GGUF file, or a directory in the Hugging Face layout.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let dir = HfDir::open(path)?;
            let config = hf_config(&dir).map_err(|e| e.context(path.display()))?;
            return Ok(Self { source: Source::Hf(Box::new(dir)), config });
        }
        Self::from_gguf(Gguf::open(path)?).map_err(|e| e.context(path.display()))
    }

    /// Takes a GGUF file that is already read.
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        let config = gguf_config(&gguf)?;
        Ok(Self { source: Source::Gguf(gguf), config })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The container: `GGUF v3`, or `safetensors`.
    pub fn format(&self) -> String {
        match &self.source {
            Source::Gguf(g) => format!("GGUF v{}", g.version()),
            Source::Hf(_) => "safetensors".to_owned(),
        }
    }

    /// The GGUF file below, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(g) => Some(g),
            Source::Hf(_) => None,
        }
    }

    /// All tensors in the file.
    pub fn tensors(&self) -> Result<Vec<TensorInfo>> {
        let info = |t: Tensor<'_>| TensorInfo {
            name: t.name.to_owned(),
            ty: t.ty.name(),
            bytes: t.data.len(),
            shape: t.shape,
        };
        match &self.source {
            Source::Gguf(g) => Ok(g.tensors().map(info).collect()),
            Source::Hf(d) => {
                d.names().into_iter().filter_map(|n| d.tensor(n).map(|t| t.map(info)).transpose()).collect()
            }
        }
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.source {
            Source::Gguf(g) => Tokenizer::from_gguf(g),
            Source::Hf(d) => Tokenizer::from_json(&d.tokenizer_json()?),
        }
    }

    /// Unpacks all weights to f32, on the current rayon pool. `progress` hears, from any thread, how many of how many
    /// bytes of the file are done.
    pub fn weights(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Weights> {
        let mut plan = Plan { file: self, names: self.names(), jobs: Vec::new(), used: HashSet::new() };
        let mut weights = plan.allocate()?;
        plan.reject_strangers()?;
        let jobs = plan.jobs;

        let total = jobs.iter().map(|t| t.data.len()).sum();
        let done = AtomicUsize::new(0);
        // The same order in which the plan met the tensors; `check_shape` made the lengths equal.
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
            // A multiple of every block, small enough that one large embedding keeps all threads busy.
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

    fn names(&self) -> &'static Names {
        match &self.source {
            Source::Gguf(_) => &GGUF_NAMES,
            Source::Hf(d) if is_gemma(d) => &HF_GEMMA_NAMES,
            Source::Hf(_) => &HF_LLAMA_NAMES,
        }
    }

    fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>> {
        match &self.source {
            Source::Gguf(g) => Ok(g.tensor(name)),
            Source::Hf(d) => d.tensor(name),
        }
    }
}

/// What the containers call the parts, and how they store them.
struct Names {
    embedding: &'static str,
    output_norm: &'static str,
    output: &'static str,
    layer: &'static str,
    attn_norm: &'static str,
    qk_norm: [&'static str; 2],
    qkv: [&'static str; 3],
    attn_out: &'static str,
    attn_post_norm: &'static str,
    ffn_norm: &'static str,
    gate_up: [&'static str; 2],
    down: &'static str,
    ffn_post_norm: &'static str,
    /// Added to every norm's weights: some checkpoints store them less one.
    norm_offset: f32,
    /// Tensors that the configuration already accounts for, by the end of their name.
    known: &'static [&'static str],
}

static GGUF_NAMES: Names = Names {
    embedding: "token_embd.weight",
    output_norm: "output_norm.weight",
    output: "output.weight",
    layer: "blk.",
    attn_norm: "attn_norm.weight",
    qk_norm: ["attn_q_norm.weight", "attn_k_norm.weight"],
    qkv: ["attn_q.weight", "attn_k.weight", "attn_v.weight"],
    attn_out: "attn_output.weight",
    attn_post_norm: "post_attention_norm.weight",
    ffn_norm: "ffn_norm.weight",
    gate_up: ["ffn_gate.weight", "ffn_up.weight"],
    down: "ffn_down.weight",
    ffn_post_norm: "post_ffw_norm.weight",
    norm_offset: 0.0,
    known: &["rope_freqs.weight"],
};

static HF_LLAMA_NAMES: Names = Names {
    embedding: "model.embed_tokens.weight",
    output_norm: "model.norm.weight",
    output: "lm_head.weight",
    layer: "model.layers.",
    attn_norm: "input_layernorm.weight",
    qk_norm: ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
    qkv: ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    attn_out: "self_attn.o_proj.weight",
    attn_post_norm: "",
    ffn_norm: "post_attention_layernorm.weight",
    gate_up: ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    down: "mlp.down_proj.weight",
    ffn_post_norm: "",
    norm_offset: 0.0,
    // The head is in some files although it is tied; the frequencies, in old ones, follow from the base.
    known: &["rotary_emb.inv_freq", "lm_head.weight"],
};

// Gemma's checkpoints hold what its norms add to 1; the converter to GGUF adds it.
static HF_GEMMA_NAMES: Names = Names {
    attn_post_norm: "post_attention_layernorm.weight",
    ffn_norm: "pre_feedforward_layernorm.weight",
    ffn_post_norm: "post_feedforward_layernorm.weight",
    norm_offset: 1.0,
    ..HF_LLAMA_NAMES
};

/// Finds every tensor, checks its shape and makes room for it, before any is unpacked.
struct Plan<'a> {
    file: &'a ModelFile,
    names: &'static Names,
    jobs: Vec<Tensor<'a>>,
    used: HashSet<String>,
}

impl<'a> Plan<'a> {
    fn allocate(&mut self) -> Result<Weights> {
        let c = &self.file.config;
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
        let c = &self.file.config;
        if c.post_norms { self.vector(name, c.dim).map(Some) } else { Ok(None) }
    }

    /// Several tensors of equal width, one below the other. Room is made only for what is in the file.
    fn matrix(&mut self, parts: &[(String, usize)], cols: usize) -> Result<Matrix> {
        for (name, rows) in parts {
            self.take(name.clone(), &[*rows, cols])?;
        }
        Ok(Matrix::zeros(parts.iter().map(|(_, rows)| rows).sum(), cols))
    }

    /// A tensor that nothing uses (a bias, an expert, a second norm) means a model that is not computed as its author
    /// meant, and better refused than run.
    fn reject_strangers(&self) -> Result<()> {
        let names: Vec<&str> = match &self.file.source {
            Source::Gguf(g) => g.tensors().map(|t| t.name).collect(),
            Source::Hf(d) => d.names(),
        };
        for name in names {
            if !self.used.contains(name) && !self.names.known.iter().any(|k| name.ends_with(k)) {
                return Err(Error::unsupported(format!(
                    "tensor {name:?} has no place in a decoder of this architecture with {} layers",
                    self.file.config.layers.len()
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

/// The metadata of one architecture: keys without its name in front.
struct Section<'a> {
    gguf: &'a Gguf,
    arch: &'a str,
}

impl Section<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    fn usize(&self, key: &str) -> Result<usize> {
        self.gguf.usize(&self.key(key))
    }

    fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        self.gguf.opt_usize(&self.key(key))
    }

    fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        self.gguf.opt_f64(&self.key(key))
    }

    fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        Ok(self.opt_f64(key)?.map(|x| x as f32))
    }

    fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.gguf.opt_str(&self.key(key))
    }
}

fn gguf_config(g: &Gguf) -> Result<ModelConfig> {
    let arch = g.str("general.architecture")?;
    let gemma = match arch {
        "llama" => false,
        "gemma3" => true,
        other => {
            return Err(Error::unsupported(format!(
                "architecture {other:?}; this driver runs \"llama\" and \"gemma3\""
            )));
        }
    };
    let s = Section { gguf: g, arch };
    if let Some(n) = s.opt_usize("expert_count")?.filter(|&n| n > 0) {
        return Err(Error::unsupported(format!("a mixture of {n} experts")));
    }
    let dim = s.usize("embedding_length")?;
    let heads = s.usize("attention.head_count")?;
    if heads == 0 {
        return Err(Error::malformed(format!("{arch}.attention.head_count is 0")));
    }
    let head_dim = match s.opt_usize("attention.key_length")? {
        Some(n) => n,
        None if dim.is_multiple_of(heads) => dim / heads,
        None => {
            return Err(Error::malformed(format!("an embedding length of {dim} does not divide into {heads} heads")));
        }
    };
    if let Some(n) = s.opt_usize("attention.value_length")?.filter(|&n| n != head_dim) {
        return Err(Error::unsupported(format!("value heads of {n} elements beside key heads of {head_dim}")));
    }
    let embedding = g
        .tensor(GGUF_NAMES.embedding)
        .ok_or_else(|| Error::malformed(format!("tensor {:?} is missing", GGUF_NAMES.embedding)))?;
    let mut eos = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(token_id(g, key)?);
    }
    eos.dedup();
    let layers = layer_count(s.usize("block_count")?, g.tensors().len())?;
    let rope = RopeConfig {
        base: s.opt_f64("rope.freq_base")?.unwrap_or(10_000.0),
        pairing: if gemma { Pairing::HalfSplit } else { Pairing::Interleaved },
        rotary_dim: s.opt_usize("rope.dimension_count")?.unwrap_or(head_dim),
        stretch: gguf_stretch(&s)?,
    };
    let window = if gemma { s.opt_usize("attention.sliding_window")?.filter(|&n| n > 0) } else { None };
    let local = match window {
        Some(_) => gguf_local_layers(&s, layers)?,
        None => vec![false; layers],
    };
    let local_base = if gemma { s.opt_f64("rope.freq_base_swa")?.unwrap_or(LOCAL_ROPE_BASE) } else { rope.base };
    let (layers, ropes) = alternate(&local, window, rope, local_base);
    let config = ModelConfig {
        name: g.opt_str("general.name")?.map(str::to_owned),
        vocab: embedding.shape[0],
        dim,
        heads,
        kv_heads: s.opt_usize("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn_dim: s.usize("feed_forward_length")?,
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        rms_eps: s.opt_f32("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
        qk_norm: gemma,
        post_norms: gemma,
        embedding_scale: if gemma { (dim as f64).sqrt() as f32 } else { 1.0 },
        attn_scale: match s.opt_f32("attention.scale")? {
            // The format has no key for Gemma's query scale; only the 27B model's is not that of its head size.
            None if gemma && layers.len() == 62 => Some((dim as f64 / heads as f64).sqrt().recip() as f32),
            given => given,
        },
        attn_softcap: s.opt_f32("attn_logit_softcapping")?,
        logit_softcap: s.opt_f32("final_logit_softcapping")?,
        layers,
        ropes,
        context: s.usize("context_length")?,
        tied: g.tensor(GGUF_NAMES.output).is_none(),
        bos: token_id(g, "tokenizer.ggml.bos_token_id")?,
        eos,
        chat_template: g.opt_str("tokenizer.chat_template")?.map(str::to_owned),
    };
    config.check()?;
    if let Some(Array::String(tokens)) = g.opt_array("tokenizer.ggml.tokens")?
        && tokens.len() > config.vocab
    {
        return Err(Error::malformed(format!(
            "the tokenizer has {} tokens, the embedding only {} rows",
            tokens.len(),
            config.vocab
        )));
    }
    Ok(config)
}

/// The base of Gemma's local layers where the file does not say.
const LOCAL_ROPE_BASE: f64 = 10_000.0;
/// Of so many layers in a row of Gemma's, the last is global, where the file does not say.
const GEMMA_PATTERN: usize = 6;

/// A description is made for every layer, so that their number must be one that the file can have.
fn layer_count(layers: usize, tensors: usize) -> Result<usize> {
    if layers > tensors {
        return Err(Error::malformed(format!("the layer count is {layers}, but the file has only {tensors} tensors")));
    }
    Ok(layers)
}

/// Layers of two kinds: local ones see `window` positions under a RoPE of a base of their own, without stretching.
fn alternate(
    local: &[bool],
    window: Option<usize>,
    rope: RopeConfig,
    local_base: f64,
) -> (Vec<LayerConfig>, Vec<RopeConfig>) {
    let layer = |&local: &bool| match local {
        true => LayerConfig { window, rope: 1 },
        false => LayerConfig { window: None, rope: 0 },
    };
    let mut ropes = vec![rope];
    if local.contains(&true) {
        let plain = RopeConfig { base: local_base, stretch: Stretch::Fixed(RopeScaling::None), ..ropes[0].clone() };
        ropes.push(plain);
    }
    (local.iter().map(layer).collect(), ropes)
}

/// All but the last of every `pattern` layers; none if 1, all if 0.
fn local_layers(layers: usize, pattern: usize) -> Vec<bool> {
    (1..=layers).map(|i| pattern == 0 || !i.is_multiple_of(pattern)).collect()
}

/// Which layers are local: a flag for each, or the length of the pattern.
fn gguf_local_layers(s: &Section, layers: usize) -> Result<Vec<bool>> {
    let key = s.key("attention.sliding_window_pattern");
    match s.gguf.metadata().get(&key) {
        Some(Value::Array(Array::Bool(flags))) if flags.len() == layers => Ok(flags.clone()),
        Some(Value::Array(flags)) => {
            Err(Error::malformed(format!("metadata {key:?} has {} entries; {layers} truth values belong", flags.len())))
        }
        _ => Ok(local_layers(layers, s.opt_usize("attention.sliding_window_pattern")?.unwrap_or(GEMMA_PATTERN))),
    }
}

pub(crate) fn token_id(g: &Gguf, key: &str) -> Result<Option<u32>> {
    let Some(id) = g.opt_usize(key)? else {
        return Ok(None);
    };
    match u32::try_from(id) {
        Ok(id) => Ok(Some(id)),
        Err(_) => Err(Error::malformed(format!("metadata {key:?} is {id}, which is no token id"))),
    }
}

fn gguf_stretch(s: &Section) -> Result<Stretch> {
    if let Some(t) = s.gguf.tensor("rope_freqs.weight") {
        let mut divisors = vec![0.0; t.elements()];
        dequantize(t.ty, t.data, &mut divisors)?;
        return Ok(Stretch::Divisors(divisors.into_iter().map(f64::from).collect()));
    }
    let factor = s.opt_f64("rope.scaling.factor")?;
    let factor =
        || factor.ok_or_else(|| Error::malformed(format!("metadata {:?} is missing", s.key("rope.scaling.factor"))));
    Ok(Stretch::Fixed(match s.opt_str("rope.scaling.type")? {
        None | Some("none") => match s.opt_f64("rope.scale_linear")? {
            Some(factor) if factor != 1.0 => RopeScaling::Linear { factor },
            _ => RopeScaling::None,
        },
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("yarn") => RopeScaling::Yarn {
            factor: factor()?,
            original_max_position: s.usize("rope.scaling.original_context_length")? as f64,
            beta_fast: s.opt_f64("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: s.opt_f64("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            // The file's factor comes on top of the paper's.
            attention_factor: match s.opt_f64("rope.scaling.attn_factor")? {
                Some(more) => Some(more * yarn_magnitude(factor()?, 1.0)),
                None => None,
            },
            truncate: true,
        },
        Some(other) => return Err(Error::unsupported(format!("RoPE scaling of type {other:?}"))),
    }))
}

/// YaRN's factor on cosines and sines, with DeepSeek's weight on its logarithm.
fn yarn_magnitude(factor: f64, weight: f64) -> f64 {
    if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 }
}

fn is_gemma(dir: &HfDir) -> bool {
    dir.config().architectures.iter().any(|a| a == "Gemma3ForCausalLM")
}

fn hf_config(dir: &HfDir) -> Result<ModelConfig> {
    let c = dir.config();
    let gemma = is_gemma(dir);
    if !gemma && !c.architectures.iter().any(|a| a == "LlamaForCausalLM") {
        return Err(Error::unsupported(format!(
            "architectures {:?}; this driver runs LlamaForCausalLM and Gemma3ForCausalLM",
            c.architectures
        )));
    }
    let (family, activation, theirs, ours) = match gemma {
        true => ("Gemma", Activation::GeluTanh, "gelu_pytorch_tanh", "GELU by tanh"),
        false => ("Llama", Activation::Silu, "silu", "SiLU"),
    };
    let named = c.hidden_activation.as_deref().filter(|_| gemma).or(c.hidden_act.as_deref());
    for (what, present) in [
        ("biases in attention", c.attention_bias),
        ("biases in the feed-forward part", c.mlp_bias),
        ("a sliding window", !gemma && c.sliding_window.is_some()),
        ("attention to later tokens", c.use_bidirectional_attention.unwrap_or(false)),
        (&format!("an activation other than {ours}"), named.is_some_and(|a| a != theirs)),
    ] {
        if present {
            return Err(Error::unsupported(format!("{what} in a {family} model")));
        }
    }
    let heads = c.num_attention_heads;
    if heads == 0 {
        return Err(Error::malformed("num_attention_heads is 0"));
    }
    // Gemma's configurations leave out what is the default of their class.
    let head_dim = c.head_dim.unwrap_or(if gemma { 256 } else { c.hidden_size / heads });
    let rope = c.rope_parameters.as_ref().or(c.rope_scaling.as_ref());
    let global = rope.and_then(|r| r.full_attention.as_deref()).or(rope);
    let local = rope.and_then(|r| r.sliding_attention.as_deref());
    let partial = c.partial_rotary_factor.or(global.and_then(|r| r.partial_rotary_factor)).unwrap_or(1.0);
    let base = c.rope_theta.or(global.and_then(|r| r.rope_theta));
    let local_base = c.rope_local_base_freq.or(local.and_then(|r| r.rope_theta)).unwrap_or(LOCAL_ROPE_BASE);
    let rope = RopeConfig {
        base: base.unwrap_or(if gemma { 1e6 } else { 1e4 }),
        pairing: Pairing::HalfSplit,
        rotary_dim: (head_dim as f64 * partial) as usize,
        stretch: global.map_or(Ok(Stretch::Fixed(RopeScaling::None)), |r| hf_stretch(c, r))?,
    };
    let layers = layer_count(c.num_hidden_layers, dir.names().len())?;
    let window = if gemma { c.sliding_window } else { None };
    let local = match window {
        Some(_) => hf_local_layers(c, layers)?,
        None => vec![false; layers],
    };
    let (layers, ropes) = alternate(&local, window, rope, local_base);
    let query_scale = |scalar: f64| scalar.sqrt().recip() as f32;
    let config = ModelConfig {
        name: None,
        vocab: c.vocab_size,
        dim: c.hidden_size,
        layers,
        heads,
        kv_heads: c.num_key_value_heads.unwrap_or(heads),
        head_dim,
        ffn_dim: c.intermediate_size,
        activation,
        rms_eps: c.rms_norm_eps as f32,
        qk_norm: gemma,
        post_norms: gemma,
        ropes,
        embedding_scale: if gemma { (c.hidden_size as f64).sqrt() as f32 } else { 1.0 },
        attn_scale: if gemma { Some(query_scale(c.query_pre_attn_scalar.unwrap_or(256.0))) } else { None },
        attn_softcap: c.attn_logit_softcapping.map(|x| x as f32),
        logit_softcap: c.final_logit_softcapping.map(|x| x as f32),
        context: c.max_position_embeddings,
        tied: c.tie_word_embeddings.unwrap_or(gemma),
        bos: c.bos_token_id.as_ref().and_then(|b| b.ids().first().copied()),
        eos: dir.eos().to_vec(),
        chat_template: dir.chat_template().map(str::to_owned),
    };
    config.check()?;
    Ok(config)
}

/// Which layers are local: a word for each, or the length of the pattern.
fn hf_local_layers(c: &HfConfig, layers: usize) -> Result<Vec<bool>> {
    let Some(types) = &c.layer_types else {
        return Ok(local_layers(layers, c.sliding_window_pattern.unwrap_or(GEMMA_PATTERN)));
    };
    if types.len() != layers {
        return Err(Error::malformed(format!("layer_types has {} entries for {layers} layers", types.len())));
    }
    let is_local = |kind: &String| match kind.as_str() {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(Error::unsupported(format!("layers of type {other:?}"))),
    };
    types.iter().map(is_local).collect()
}

fn hf_stretch(c: &HfConfig, r: &HfRope) -> Result<Stretch> {
    let need = |what: &str, v: Option<f64>| {
        v.ok_or_else(|| Error::malformed(format!("config.json: RoPE scaling without {what:?}")))
    };
    let original = r.original_max_position_embeddings.or(c.original_max_position_embeddings);
    Ok(Stretch::Fixed(match r.rope_type.as_deref() {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: need("factor", r.factor)? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: need("factor", r.factor)?,
            low_freq_factor: need("low_freq_factor", r.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", r.high_freq_factor)?,
            original_max_position: need("original_max_position_embeddings", original.map(|n| n as f64))?,
        },
        Some("yarn") => {
            let factor = need("factor", r.factor)?;
            RopeScaling::Yarn {
                factor,
                original_max_position: original.unwrap_or(c.max_position_embeddings) as f64,
                beta_fast: r.beta_fast.unwrap_or(32.0),
                beta_slow: r.beta_slow.unwrap_or(1.0),
                attention_factor: r.attention_factor.or_else(|| {
                    let (m, all) = r.mscale.zip(r.mscale_all_dim)?;
                    Some(yarn_magnitude(factor, m) / yarn_magnitude(factor, all))
                }),
                truncate: r.truncate.unwrap_or(true),
            }
        }
        Some("longrope" | "su") => {
            let original_context = original.unwrap_or(c.max_position_embeddings);
            return Ok(Stretch::LongRope {
                short: r.short_factor.clone().unwrap_or_default(),
                long: r.long_factor.clone().unwrap_or_default(),
                factor: r.factor.unwrap_or(c.max_position_embeddings as f64 / original_context.max(1) as f64),
                original_context,
                attention_factor: r.attention_factor,
            });
        }
        Some(other) => return Err(Error::unsupported(format!("RoPE scaling of type {other:?}"))),
    }))
}
