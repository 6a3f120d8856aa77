//! A small decoder on top of the library: model files, tokenizer, decoder, sampling, and the command line.
//!
//! # The road data takes
//! ```text
//! file --gguf, hf--> Tensor (mapped bytes) --model--> Weights (linear), ModelConfig
//!                                                                        |
//! text --tokenizer--> ids --scheduler--> decoder (linear, and the library's operations over a cache)
//!                      ^                 | logits
//!                      +---- sampling <--+              ids --tokenizer--> text, as it comes
//! ```
//! [`gguf`] and `hf` read a container, check every number in it, and return slices of the mapped file. [`quant`] knows
//! the blocks of every supported type. [`ModelFile`] knows the tensors of each supported family (Llama, Gemma 3,
//! Grok-1, MiniMind). It finds every tensor under the names of either container and checks its shape. The other modules
//! do not depend on the container, except for RoPE's pairing, because the containers order the elements of a head
//! differently. [`Decoder`] appends tokens to the sequences of a [`Cache`] and returns logits. [`Scheduler`] runs several
//! requests over one cache, [`BeamSearch`] finds the continuations that are the most likely as a whole, and [`Speculation`]
//! guesses several tokens and verifies them in one pass. [`ChatTemplate`] makes text of conversations. [`cli`] parses
//! arguments and prints; [`perplexity()`] measures what a format of the cache does to predictions, [`cache_error()`] what it does to keys, values and attention; `kvlane bench` is the command line of [`crate::bench`].
//!
//! The decoder uses the public API only, as any other program would: views, [`rope_in_place`](crate::rope_in_place),
//! [`kv_write`](crate::kv_write) with its fused rotation of the keys, [`attention`](crate::attention()).
//!
//! # Who owns what
//! A [`ModelFile`] owns the mapping. It can be dropped once [`Weights`] and [`Tokenizer`] are built, because both are
//! copies. A [`Decoder`] owns the weights, the [`Context`](crate::Context) and the threads, and is immutable. The
//! caller owns the [`Cache`] and the [`Scratch`] of a pass. A [`Matrix`] of weights keeps the type that it has in the file.
//!
//! # Trust
//! A model file is not trusted. Whatever it contains, the result is a value or an [`Error`] with a sentence, and the
//! memory allocated is at most a small multiple of the file's size. A chat template has a bound on its steps and bytes.

mod beam;
mod cache;
mod cache_error;
mod chat;
pub mod cli;
mod decoder;
pub mod embedded;
mod error;
mod feed_forward;
mod files;
pub mod gguf;
mod hf;
mod linear;
pub mod mesh;
mod model;
mod perplexity;
pub mod quant;
mod sampling;
mod scheduler;
mod speculate;
mod threads;
mod tokenizer;
mod work;

pub use beam::{BeamOptions, BeamSearch, EarlyStopping, Hypothesis};
pub use cache::{Cache, Formats, PREFILL_CHUNK, Rotate};
pub use cache_error::{CacheError, Deviation, cache_error};
pub use chat::{ChatTemplate, Message};
pub use decoder::{Decoder, Logits, Scratch, TreePass};
pub use error::{Error, ErrorKind, Result};
pub use linear::{Linear, Matrix, Rounded};
pub use model::{
    Activation, ExpertConfig, Experts, FeedForward, GatedMlp, LayerConfig, LayerWeights, ModelConfig, ModelFile,
    RopeConfig, Stretch, TensorInfo, Weights,
};
pub use perplexity::{Distance, Perplexity, perplexity};
pub use sampling::{Sampler, SamplerOptions, argmax};
pub use scheduler::{
    Event, Finish, Logprobs, Overlong, Prefilled, Request, RequestId, Scheduler, Statistics, Streaming,
};
pub use speculate::{
    Distribution, GuessTree, Speculation, SpeculationOptions, SpeculationStatistics, check_vocabularies,
};
pub use threads::{MOST_THREADS, Threads};
pub use tokenizer::{TextStream, Tokenizer};
pub use work::Work;
