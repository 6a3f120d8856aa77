//! The algorithms, each once, over the vector trait. Everything is `inline(always)`: the code that runs is the copy inside a
//! level's shell, compiled with that level's features.

pub(crate) mod affine;
pub(crate) mod attention;
pub(crate) mod blocks;
pub(crate) mod copy;
pub(crate) mod fp8;
pub(crate) mod hadamard;
pub(crate) mod math;
pub(crate) mod merge;
pub(crate) mod norm;
pub(crate) mod quantize;
pub(crate) mod rope;
