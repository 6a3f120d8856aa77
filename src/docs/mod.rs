//! The manual: subjects that are larger than one item of the API.
//!
//! | page | subject |
//! | --- | --- |
//! | [`glossary`] | the words that this documentation uses, and what each means |
//! | [`caches`] | choosing a layout for a cache, and recipes: pages, rings, beam search, trees, shards |
//! | [`Layout`](crate::Layout) | the definition of every layout |
//! | [`masks`](crate::masks) | which query sees which key, the order of operations on a logit, conventions of other libraries |
//! | [`c_api`] | building and linking the C library, and the rules that all of its functions follow |
//! | [`runtimes`] | kvlane inside JAX, ONNX Runtime, ggml and candle: operators, in-place caches, threads |
//! | [`performance`] | how to measure, the figures, and what bounds them |
//! | [`conformance`] | the tests against other implementations, and the fuzzers |
//! | [`mesh`] | a decoder on several machines: what moves between them, and what that means for a large model |
//! | [`driver`] | the command line: model files, generation, streaming |

#[doc = include_str!("c_api.md")]
pub mod c_api {}
#[doc = include_str!("caches.md")]
pub mod caches {}
#[doc = include_str!("conformance.md")]
pub mod conformance {}
#[doc = include_str!("driver.md")]
pub mod driver {}
#[doc = include_str!("glossary.md")]
pub mod glossary {}
#[doc = include_str!("mesh.md")]
pub mod mesh {}
#[doc = include_str!("performance.md")]
pub mod performance {}
#[doc = include_str!("runtimes.md")]
pub mod runtimes {}
