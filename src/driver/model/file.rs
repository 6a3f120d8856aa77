//! An open model file of either container.

use std::path::Path;

use super::config::ModelConfig;
use super::family::Family;
use super::names::{
    GGUF_GROK_NAMES, GGUF_NAMES, GGUF_OLD_GROK_NAMES, HF_GEMMA_NAMES, HF_GROK_BLOCK_NAMES, HF_GROK_NAMES,
    HF_LLAMA_NAMES, Names,
};
use super::{from_gguf, from_hf};
use crate::driver::error::Result;
use crate::driver::gguf::Gguf;
use crate::driver::hf::HfDir;
use crate::driver::quant::Tensor;
use crate::driver::tokenizer::Tokenizer;

/// An entry of [`ModelFile::tensors`].
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// The element type's name.
    pub ty: &'static str,
    /// The extents, slowest first.
    pub shape: Vec<usize>,
    /// The size in the file.
    pub bytes: usize,
}

#[derive(Debug)]
enum Source {
    Gguf(Gguf),
    Hf(Box<HfDir>),
}

/// An open model. Its configuration is read and checked; its weights are still in the file.
#[derive(Debug)]
pub struct ModelFile {
    source: Source,
    config: ModelConfig,
}

impl ModelFile {
    /// Opens a GGUF file, or a directory in the Hugging Face layout.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let dir = HfDir::open(path)?;
            let config = from_hf::config(&dir).map_err(|e| e.context(path.display()))?;
            return Ok(Self { source: Source::Hf(Box::new(dir)), config });
        }
        Self::from_gguf(Gguf::open(path)?).map_err(|e| e.context(path.display()))
    }

    /// Takes an open GGUF file.
    pub fn from_gguf(gguf: Gguf) -> Result<Self> {
        let config = from_gguf::config(&gguf)?;
        Ok(Self { source: Source::Gguf(gguf), config })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The container's name: `GGUF v3`, or `safetensors`.
    pub fn format(&self) -> String {
        match &self.source {
            Source::Gguf(g) => format!("GGUF v{}", g.version()),
            Source::Hf(_) => "safetensors".to_owned(),
        }
    }

    /// The GGUF file, if the container is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(g) => Some(g),
            Source::Hf(_) => None,
        }
    }

    /// All tensors in the file.
    pub fn tensors(&self) -> Result<Vec<TensorInfo>> {
        let info = |t: Tensor<'_>| TensorInfo {
            name: t.name.to_owned(),
            ty: t.ty.name(),
            bytes: t.data.len(),
            shape: t.shape,
        };
        match &self.source {
            Source::Gguf(g) => Ok(g.tensors().map(info).collect()),
            Source::Hf(d) => {
                d.names().into_iter().filter_map(|n| d.tensor(n).map(|t| t.map(info)).transpose()).collect()
            }
        }
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.source {
            Source::Gguf(g) => Tokenizer::from_gguf(g),
            Source::Hf(d) => Tokenizer::from_json(&d.tokenizer_json()?),
        }
    }

    pub(super) fn names(&self) -> &'static Names {
        match &self.source {
            Source::Gguf(g) if g.str("general.architecture").is_ok_and(|arch| arch == "grok") => {
                match g.tensor("blk.0.layer_output_norm.weight") {
                    Some(_) => &GGUF_OLD_GROK_NAMES,
                    None => &GGUF_GROK_NAMES,
                }
            }
            Source::Gguf(_) => &GGUF_NAMES,
            Source::Hf(d) => match from_hf::family(d) {
                Ok(Family::Gemma) => &HF_GEMMA_NAMES,
                Ok(Family::Grok) if d.names().contains(&HF_GROK_NAMES.embedding) => &HF_GROK_NAMES,
                Ok(Family::Grok) => &HF_GROK_BLOCK_NAMES,
                _ => &HF_LLAMA_NAMES,
            },
        }
    }

    pub(super) fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>> {
        match &self.source {
            Source::Gguf(g) => Ok(g.tensor(name)),
            Source::Hf(d) => d.tensor(name),
        }
    }

    pub(super) fn tensor_names(&self) -> Vec<&str> {
        match &self.source {
            Source::Gguf(g) => g.tensors().map(|t| t.name).collect(),
            Source::Hf(d) => d.names(),
        }
    }
}
