//! A directory in the Hugging Face layout: `config.json`, `tokenizer.json`, and the weights in `model.safetensors` or
//! in shards that `model.safetensors.index.json` lists.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::error::{Error, Result};
use super::files;
use super::quant::{Tensor, TensorType};

/// The fields of `config.json` that the supported families need. Names are those of the file.
#[derive(Debug, Clone, Deserialize)]
pub struct HfConfig {
    #[serde(default)]
    pub architectures: Vec<String>,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    /// The experts of a layer; some files call them `num_experts`.
    pub num_local_experts: Option<usize>,
    pub num_experts: Option<usize>,
    pub num_experts_per_tok: Option<usize>,
    pub norm_topk_prob: Option<bool>,
    pub use_moe: Option<bool>,
    pub moe_intermediate_size: Option<usize>,
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub original_max_position_embeddings: Option<usize>,
    pub rms_norm_eps: f64,
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<HfRope>,
    /// Newer files have this field instead of `rope_theta` and `rope_scaling`.
    pub rope_parameters: Option<HfRope>,
    pub partial_rotary_factor: Option<f64>,
    pub tie_word_embeddings: Option<bool>,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    pub hidden_act: Option<String>,
    pub hidden_activation: Option<String>,
    pub sliding_window: Option<usize>,
    /// One layer in this many is global, the last of each run.
    #[serde(alias = "_sliding_window_pattern")]
    pub sliding_window_pattern: Option<usize>,
    /// `sliding_attention` or `full_attention` for each layer.
    pub layer_types: Option<Vec<String>>,
    pub rope_local_base_freq: Option<f64>,
    pub query_pre_attn_scalar: Option<f64>,
    pub embedding_multiplier_scale: Option<f64>,
    pub attn_output_multiplier: Option<f64>,
    pub output_multiplier_scale: Option<f64>,
    /// Grok-1's softcap.
    pub max_attn_value: Option<f64>,
    pub attn_logit_softcapping: Option<f64>,
    pub final_logit_softcapping: Option<f64>,
    pub use_bidirectional_attention: Option<bool>,
    pub bos_token_id: Option<OneOrMany>,
    pub eos_token_id: Option<OneOrMany>,
}

/// The RoPE part of `config.json`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct HfRope {
    #[serde(alias = "type")]
    pub rope_type: Option<String>,
    pub rope_theta: Option<f64>,
    pub partial_rotary_factor: Option<f64>,
    pub factor: Option<f64>,
    pub original_max_position_embeddings: Option<usize>,
    pub attention_factor: Option<f64>,
    pub low_freq_factor: Option<f64>,
    pub high_freq_factor: Option<f64>,
    pub beta_fast: Option<f64>,
    pub beta_slow: Option<f64>,
    pub mscale: Option<f64>,
    pub mscale_all_dim: Option<f64>,
    pub short_factor: Option<Vec<f64>>,
    pub long_factor: Option<Vec<f64>>,
    pub truncate: Option<bool>,
    /// Newer files nest the parameters of each kind of layer.
    pub full_attention: Option<Box<HfRope>>,
    pub sliding_attention: Option<Box<HfRope>>,
}

/// One token id or several; `eos_token_id` occurs in both forms.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    /// The ids.
    pub fn ids(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<ChatTemplates>,
}

/// The templates in `tokenizer_config.json`: one, or several with names.
#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplates {
    One(String),
    Named(Vec<NamedTemplate>),
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl ChatTemplates {
    fn default_one(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(all) => all.into_iter().find(|t| t.name == "default").map(|t| t.template),
            Self::Other(_) => None,
        }
    }
}

#[derive(Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<OneOrMany>,
}

struct Shard {
    map: Mmap,
    metadata: Metadata,
    data_start: usize,
}

/// An open model directory. Tensors are slices of the mapped shards.
pub struct HfDir {
    path: PathBuf,
    config: HfConfig,
    eos: Vec<u32>,
    chat_template: Option<String>,
    shards: Vec<Shard>,
    /// Tensor name to index in `shards`.
    tensors: HashMap<String, usize>,
}

impl std::fmt::Debug for HfDir {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HfDir").field("path", &self.path).field("tensors", &self.tensors.len()).finish()
    }
}

impl HfDir {
    /// Reads the configuration and maps the weights. The files must not be changed or shortened while they are open.
    pub fn open(path: &Path) -> Result<Self> {
        let config: HfConfig = read_json(&path.join("config.json"))?;
        let generation: GenerationConfig =
            read_optional_json(&path.join("generation_config.json"))?.unwrap_or_default();
        let tokenizer: Option<TokenizerConfig> = read_optional_json(&path.join("tokenizer_config.json"))?;
        let eos = generation.eos_token_id.as_ref().or(config.eos_token_id.as_ref());
        let eos = eos.map(|e| e.ids().to_vec()).unwrap_or_default();
        let chat_template = match read_optional_text(&path.join("chat_template.jinja"))? {
            Some(template) => Some(template),
            None => tokenizer.and_then(|t| t.chat_template).and_then(ChatTemplates::default_one),
        };

        let (shards, tensors) = open_weights(path)?;
        Ok(Self { path: path.to_owned(), config, eos, chat_template, shards, tensors })
    }

    /// The configuration.
    pub fn config(&self) -> &HfConfig {
        &self.config
    }

    /// The token ids that end a text, from `generation_config.json` if it has them, else from `config.json`.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The chat template (Jinja source).
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The bytes of `tokenizer.json`.
    pub fn tokenizer_json(&self) -> Result<Vec<u8>> {
        files::bytes(&self.path.join("tokenizer.json"))
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// The tensor of that name; an error if its type is not supported.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor<'_>>> {
        let Some((key, &shard)) = self.tensors.get_key_value(name) else {
            return Ok(None);
        };
        let shard = &self.shards[shard];
        let Some(info) = shard.metadata.info(name) else {
            return Ok(None);
        };
        let ty = match info.dtype {
            Dtype::F32 => TensorType::F32,
            Dtype::F16 => TensorType::F16,
            Dtype::BF16 => TensorType::BF16,
            other => {
                return Err(Error::unsupported(format!(
                    "tensor {name:?} has type {other:?}; F32, F16 and BF16 can be read"
                )));
            }
        };
        let (start, end) = info.data_offsets;
        let data = shard
            .data_start
            .checked_add(start)
            .zip(shard.data_start.checked_add(end))
            .and_then(|(start, end)| shard.map.get(start..end))
            .ok_or_else(|| Error::malformed(format!("tensor {name:?} lies at {start}..{end}, outside of its file")))?;
        Ok(Some(Tensor { name: key, ty, shape: info.shape.clone(), data }))
    }
}

fn open_weights(dir: &Path) -> Result<(Vec<Shard>, HashMap<String, usize>)> {
    let index_path = dir.join("model.safetensors.index.json");
    let mut tensors = HashMap::new();
    let Some(index) = read_optional_json::<Index>(&index_path)? else {
        let shard = open_shard(&dir.join("model.safetensors"))?;
        for name in shard.metadata.tensors().into_keys() {
            tensors.insert(name, 0);
        }
        return Ok((vec![shard], tensors));
    };
    let mut files: Vec<&String> = index.weight_map.values().collect();
    files.sort_unstable();
    files.dedup();
    let mut shards = Vec::with_capacity(files.len());
    for file in &files {
        // The index may only name files in its own directory.
        let mut parts = Path::new(file).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(Error::malformed(format!("{}: shard {file:?} is not a plain file name", index_path.display())));
        }
        shards.push(open_shard(&dir.join(file))?);
    }
    for (name, file) in &index.weight_map {
        let shard = files.binary_search(&file).unwrap_or_default();
        if shards[shard].metadata.info(name).is_none() {
            return Err(Error::malformed(format!(
                "{}: tensor {name:?} is not in shard {file:?}",
                index_path.display()
            )));
        }
        tensors.insert(name.clone(), shard);
    }
    Ok((shards, tensors))
}

fn open_shard(path: &Path) -> Result<Shard> {
    let map = files::map(path)?;
    let (header, metadata) =
        SafeTensors::read_metadata(&map).map_err(|e| Error::malformed(format!("{}: {e}", path.display())))?;
    Ok(Shard { map, metadata, data_start: header + 8 })
}

fn read_optional_text(path: &Path) -> Result<Option<String>> {
    if !path.exists() {
        return Ok(None);
    }
    files::text(path).map(Some)
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let bytes = files::bytes(path)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::malformed(format!("{}: {e}", path.display())))
}

fn read_optional_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    read_json(path).map(Some)
}
