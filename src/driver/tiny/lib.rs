//! The language model that the `kvlane` command runs when it is given none: a Llama-family decoder of two million parameters. The
//! README of this package describes it and its training.
#![no_std]
#![deny(missing_docs)]

/// The model file, in GGUF.
pub static MODEL: &[u8] = include_bytes!("tiny.gguf");

/// Where the model file lay when this package was compiled.
pub const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tiny.gguf");
