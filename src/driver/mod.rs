//! A small decoder on top of the kernels: model files, tokenizer, decoder, sampling, and the command line over them.
//!
//! # The road data takes
//! ```text
//! file --gguf, hf--> Tensor (mapped bytes) --quant--> f32 --model--> Weights, ModelConfig
//!                                                                        |
//! text --tokenizer--> ids --runner--> decoder (linear, and the library's operations over a cache)
//!                      ^                 | logits
//!                      +---- sampling <--+              ids --tokenizer--> text, as it comes
//! ```
//! [`gguf`] and `hf` read a container and doubt every number in it; what they hand on are slices of the mapped file.
//! [`quant`] turns blocks of any supported type into f32. [`model`] knows what a decoder of a known family (Llama, Gemma 3)
//! must consist of, finds every part under either container's names, checks its shape, and unpacks it. From there on nothing knows which
//! container a model came from; only RoPE's pairing remembers it, because the containers order a head's elements
//! differently. [`decoder`] appends tokens to rows of a [`cache`] and gives logits; [`runner`] keeps several requests in
//! the rows of one cache; [`cli`] parses arguments and prints;
//! `kvlane bench` is no more than the command line of [`crate::bench`].
//!
//! The decoder uses the library as any other program would: views, [`rope_in_place`](crate::rope_in_place),
//! [`kv_write`](crate::kv_write) with its fused rotation of the keys, [`attention`](crate::attention()). Nothing private.
//!
//! # Who owns what
//! A [`ModelFile`] owns the mapping and may be dropped once [`Weights`] and [`Tokenizer`] are built, for both are copies.
//! A [`Decoder`] owns the weights, the kernels' [`Context`](crate::Context) and the threads, and does not change while it
//! runs; what changes is the caller's: the [`Cache`] and the [`Scratch`] of one pass. Weights are plain f32: this driver is
//! here to show the cache and its kernels, and leaves the linear layers to the `gemm` crate ([`linear`]).
//!
//! # Trust
//! A model file is input from strangers. Whatever it contains, the answer is a value or an [`Error`] with a sentence;
//! what is allocated is bounded by a small multiple of the file's size.

mod bench;
pub mod cache;
pub mod cli;
pub mod decoder;
pub mod embedded;
pub mod error;
pub mod gguf;
mod hf;
pub mod linear;
pub mod model;
pub mod quant;
pub mod runner;
pub mod sampling;
pub mod threads;
pub mod tokenizer;

pub use cache::Cache;
pub use decoder::{Decoder, Logits, Scratch};
pub use error::{Error, ErrorKind, Result};
pub use linear::Matrix;
pub use model::{Activation, LayerConfig, LayerWeights, ModelConfig, ModelFile, RopeConfig, Stretch, Weights};
pub use runner::{Event, Finish, Request, Slots, Streaming};
pub use sampling::{Sampler, SamplerOptions};
pub use threads::Threads;
pub use tokenizer::{TextStream, Tokenizer};
