//! A model file's configuration and weights, in one form for all containers.
//!
//! | file | holds |
//! | --- | --- |
//! | `config` | the shape of a decoder, [`ModelConfig`], and its checks |
//! | `from_gguf`, `from_hf` | the readers that fill it from a container's metadata |
//! | `family` | defaults and patterns that both readers share |
//! | `names` | the containers' names for the tensors |
//! | `file` | [`ModelFile`]: either container, opened |
//! | `weights` | [`Weights`]: tensors found, checked and unpacked to f32 |
//! | `experts` | the weights of the feed-forward part, [`FeedForward`] |

mod config;
mod experts;
mod family;
mod file;
mod from_gguf;
mod from_hf;
mod names;
mod weights;

pub use config::{Activation, ExpertConfig, LayerConfig, ModelConfig, RopeConfig, Stretch};
pub use experts::{Experts, FeedForward, GatedMlp};
pub use file::{ModelFile, TensorInfo};
pub(super) use from_gguf::token_id;
pub use weights::{LayerWeights, Weights};
