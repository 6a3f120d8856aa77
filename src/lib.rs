//! Attention over a key/value cache for CPUs.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![allow(clippy::needless_range_loop)]

mod context;
mod dtype;
mod error;
mod isa;
mod kernels;
pub mod ops;
mod parallel;
mod view;

#[cfg(feature = "driver")]
pub mod driver;

pub use context::Context;
pub use dtype::{DType, Element};
pub use error::{Error, Result, Status};
pub use isa::Isa;
pub use kernels::{KernelInfo, Op, kernels};
pub use ops::attention::{
    AttentionOptions, AttentionTensors, MAX_HEAD_DIM, Mask, alibi_slopes, attention, attention_workspace_size,
};
pub use ops::merge::{AttentionState, MAX_STATES, merge_states};
pub use ops::repeat::repeat_kv;
pub use ops::rope::{
    MAX_ROTARY_DIM, Pairing, Positions, Rope, RopeAngles, RopeFrequencies, RopeScaling, rope, rope_in_place,
};
pub use ops::workspace::Workspace;
pub use ops::write::{Destination, KvWrite, kv_write};
#[cfg(feature = "rayon")]
pub use parallel::Rayon;
pub use parallel::{Runner, Serial};
pub use view::{View, ViewMut};
