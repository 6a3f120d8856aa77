//! Attention over a key/value cache for CPUs.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

#[cfg(feature = "driver")]
pub mod driver;
