//! A small decoder on top of the kernels: model files, tokenizer, decoder, sampling.
//!
//! # The road data takes
//! ```text
//! file --gguf, hf--> Tensor (mapped bytes) --quant--> f32 weights --model--> Weights, ModelConfig
//! text --tokenizer--> ids --decoder--> logits --sampling--> id --tokenizer--> text
//! ```
//! [`gguf`] and [`hf`] read a container and doubt every number in it; what they hand on are slices of the mapped file.
//! [`quant`] turns blocks of any supported type into f32. [`model`] knows what a Llama-family decoder must consist of,
//! finds every part under either container's names, checks its shape, and unpacks it. From there on nothing knows which
//! container a model came from; only RoPE's pairing remembers it, because the containers order a head's elements
//! differently.
//!
//! # Who owns what
//! A [`ModelFile`] owns the mapping and may be dropped once [`Weights`] and [`Tokenizer`] are built, for both are copies.
//! Weights are plain f32: this driver is here to show the cache and its kernels, and spends its arithmetic on linear
//! layers through the `gemm` crate ([`linear`]).
//!
//! # Trust
//! A model file is input from strangers. Whatever it contains, the answer is a value or an [`Error`] with a sentence;
//! what is allocated is bounded by a small multiple of the file's size.

pub mod cache;
pub mod decoder;
pub mod error;
pub mod gguf;
pub mod hf;
pub mod linear;
pub mod model;
pub mod quant;
pub mod sampling;
pub mod threads;
pub mod tokenizer;

pub use cache::Cache;
pub use decoder::{Decoder, Logits, Scratch};
pub use error::{Error, ErrorKind, Result};
pub use linear::Matrix;
pub use model::{LayerWeights, ModelConfig, ModelFile, RopeConfig, Stretch, Weights};
pub use sampling::{Sampler, SamplerOptions};
pub use threads::Threads;
pub use tokenizer::{TextStream, Tokenizer};
