//! The embedded model. `src/driver/tiny/README.md` describes it and its training.

use super::error::Result;
use super::gguf::Gguf;
use super::model::ModelFile;

static TINY: &[u8] = include_bytes!("tiny/tiny.gguf");

/// The prompt if the user gives neither a model nor a prompt.
pub const PROMPT: &str = "In the beginning";

/// Opens the embedded model.
pub fn open() -> Result<ModelFile> {
    ModelFile::from_gguf(Gguf::from_static(TINY)?)
}
