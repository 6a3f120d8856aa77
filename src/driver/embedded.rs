//! The model that is part of the program; `src/driver/tiny/README.md` says what it is and how it was made.

use super::error::Result;
use super::gguf::Gguf;
use super::model::ModelFile;

static TINY: &[u8] = include_bytes!("tiny/tiny.gguf");

/// What starts a text when the user names neither a model nor a prompt.
pub const PROMPT: &str = "In the beginning";

/// Opens the embedded model.
pub fn open() -> Result<ModelFile> {
    ModelFile::from_gguf(Gguf::from_static(TINY)?)
}
