//! The embedded model, from the package `kvlane-tiny` (`src/driver/tiny`, whose README describes it and its training).

use super::error::Result;
use super::gguf::Gguf;
use super::model::ModelFile;

/// The prompt if the user gives neither a model nor a prompt.
pub const PROMPT: &str = "In the beginning";

/// Opens the embedded model.
pub fn open() -> Result<ModelFile> {
    ModelFile::from_gguf(Gguf::from_static(kvlane_tiny::MODEL)?)
}
