//! The shape of a decoder, which the reader of each container fills in, and the checks that all shapes must pass.

use crate::driver::error::{Error, Result};
use crate::{LongRopeScaling, MAX_HEAD_DIM, Pairing, RopeFrequencies, RopeScaling};

/// How a model extends RoPE to a context longer than that of its first training.
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
        /// The ratio of the model's context to the original context.
        factor: f64,
        /// The context of the first training.
        original_context: usize,
        /// The factor on cosines and sines, if the file has one.
        attention_factor: Option<f64>,
    },
    /// A divisor for each frequency. GGUF files store Llama 3.1's scaling in this form.
    Divisors(Vec<f64>),
}

/// The parameters of a rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric series of wavelengths.
    pub base: f64,
    /// Which elements form a pair: neighbours in GGUF files of the Llama family, whose weights are permuted for it, and
    /// the two halves of a head in Hugging Face checkpoints.
    pub pairing: Pairing,
    /// The number of leading elements of a head that are rotated.
    pub rotary_dim: usize,
    /// The extension to longer contexts.
    pub stretch: Stretch,
}

impl RopeConfig {
    /// The frequencies for sequences of up to `longest` tokens.
    pub fn frequencies(&self, longest: usize) -> Result<RopeFrequencies> {
        let new = |scaling: &RopeScaling| RopeFrequencies::new(self.rotary_dim, self.base, scaling);
        Ok(match &self.stretch {
            Stretch::Fixed(scaling) => new(scaling)?,
            Stretch::LongRope { short, long, factor, original_context, attention_factor } => {
                let factors = if longest > *original_context { long } else { short }.clone();
                let mut scaling = LongRopeScaling::new(factors, *factor, *original_context as f64);
                scaling.attention_factor = *attention_factor;
                new(&scaling.into())?
            }
            // LongRoPE without its factor on cosines and sines is a plain division.
            Stretch::Divisors(divisors) => {
                new(&LongRopeScaling::new(divisors.clone(), 1.0, 1.0).attention_factor(1.0).into())?
            }
        })
    }
}

/// The attention of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// The number of most recent positions that a query sees, its own included; all if absent.
    pub window: Option<usize>,
    /// The index in [`ModelConfig::ropes`] of the rotary embedding of its queries and keys.
    pub rope: usize,
}

/// The activation of the feed-forward part's gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// A feed-forward part of several experts, a few of which serve each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertConfig {
    /// The experts of a layer.
    pub count: usize,
    /// The experts of a token: those that the router gives the greatest probabilities.
    pub used: usize,
    /// Whether these probabilities are divided by their sum.
    pub normalized: bool,
}

/// The shape of a decoder. Families differ in these values only, not in code.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The model's name in the file.
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
    /// Width inside the feed-forward part, or inside each of its experts.
    pub ffn_dim: usize,
    /// The experts of the feed-forward part, if it has several.
    pub experts: Option<ExpertConfig>,
    /// The feed-forward part's activation.
    pub activation: Activation,
    /// Added to the mean square before RMSNorm's root.
    pub rms_eps: f32,
    /// Whether every head of queries and keys goes through an RMSNorm before RoPE.
    pub qk_norm: bool,
    /// Whether the outputs of attention and of the feed-forward part go through an RMSNorm before they are added.
    pub post_norms: bool,
    /// The rotary embeddings, at least one. Layers refer to them by index.
    pub ropes: Vec<RopeConfig>,
    /// Factor on a token's embedding.
    pub embedding_scale: f32,
    /// Factor on `q.k`; `1 / sqrt(head_dim)` if absent.
    pub attn_scale: Option<f32>,
    /// Softcap on attention's logits.
    pub attn_softcap: Option<f32>,
    /// Factor on the model's logits, before their softcap.
    pub logit_scale: f32,
    /// Softcap on the model's logits.
    pub logit_softcap: Option<f32>,
    /// The number of positions that the model was trained for.
    pub context: usize,
    /// Whether the output layer is the embedding itself.
    pub tied: bool,
    /// The token that starts a text, if any.
    pub bos: Option<u32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
    /// The chat template (Jinja source).
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

    /// The number of weights, from the shapes, in all experts.
    pub fn parameters(&self) -> usize {
        self.parameters_with(self.experts.map_or(1, |e| e.count))
    }

    /// The number of weights that one token passes.
    pub fn active_parameters(&self) -> usize {
        self.parameters_with(self.experts.map_or(1, |e| e.used))
    }

    fn parameters_with(&self, experts: usize) -> usize {
        let attention = self.dim * (2 * self.q_dim() + 2 * self.kv_dim());
        let norms = self.dim * if self.post_norms { 4 } else { 2 } + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let router = self.experts.map_or(0, |e| e.count * self.dim);
        let layer = attention + router + experts * 3 * self.dim * self.ffn_dim + norms;
        let ends = self.vocab * self.dim * if self.tied { 1 } else { 2 };
        self.layers.len() * layer + ends + self.dim
    }

    /// Rejects impossible values, so that later arithmetic on these numbers cannot overflow.
    pub(super) fn check(&self) -> Result<()> {
        // Far beyond any model, and small enough that a product of three fits into 64 bits.
        const MOST: usize = 1 << 21;
        for (what, n) in [
            ("vocabulary size", self.vocab),
            ("embedding length", self.dim),
            ("layer count", self.layers.len()),
            ("head count", self.heads),
            ("key/value head count", self.kv_heads),
            ("head size", self.head_dim),
            ("feed-forward length", self.ffn_dim),
            ("expert count", self.experts.map_or(1, |e| e.count)),
            ("number of experts per token", self.experts.map_or(1, |e| e.used)),
        ] {
            if n == 0 || n > MOST {
                return Err(Error::malformed(format!("the {what} is {n}; 1 to {MOST} are possible")));
            }
        }
        if let Some(ExpertConfig { count, used, .. }) = self.experts.filter(|e| e.used > e.count) {
            return Err(Error::malformed(format!("{used} experts per token, but a layer has {count}")));
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
            // Check both lists of LongRoPE.
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
            ("scale of the logits", Some(self.logit_scale)),
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
