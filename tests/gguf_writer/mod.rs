//! Writes small GGUF files, valid and broken ones.

/// A metadata value.
#[derive(Clone)]
pub enum V {
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type number and the bytes of the value.
    Raw(u32, Vec<u8>),
}

/// A tensor: name, extents as in the file (fastest first), ggml type, offset or the next free one, data.
#[derive(Clone)]
pub struct T {
    pub name: String,
    pub extents: Vec<u64>,
    pub ty: u32,
    pub offset: Option<u64>,
    pub data: Vec<u8>,
}

/// A file under construction.
#[derive(Clone)]
pub struct Writer {
    pub version: u32,
    pub pairs: Vec<(String, V)>,
    pub tensors: Vec<T>,
    pub tensor_count: Option<u64>,
    pub pair_count: Option<u64>,
}

pub fn string(s: &str) -> Vec<u8> {
    let mut out = (s.len() as u64).to_le_bytes().to_vec();
    out.extend(s.as_bytes());
    out
}

impl V {
    fn bytes(&self) -> Vec<u8> {
        let array = |ty: u32, n: usize, items: Vec<u8>| {
            let mut out = ty.to_le_bytes().to_vec();
            out.extend((n as u64).to_le_bytes());
            out.extend(items);
            out
        };
        let (ty, body) = match self {
            V::U32(v) => (4u32, v.to_le_bytes().to_vec()),
            V::U64(v) => (10, v.to_le_bytes().to_vec()),
            V::F32(v) => (6, v.to_le_bytes().to_vec()),
            V::Bool(v) => (7, vec![u8::from(*v)]),
            V::Str(v) => (8, string(v)),
            V::Strs(v) => (9, array(8, v.len(), v.iter().flat_map(|s| string(s)).collect())),
            V::I32s(v) => (9, array(5, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect())),
            V::F32s(v) => (9, array(6, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect())),
            V::Raw(ty, body) => (*ty, body.clone()),
        };
        let mut out = ty.to_le_bytes().to_vec();
        out.extend(body);
        out
    }
}

impl Writer {
    pub fn new() -> Self {
        Self { version: 3, pairs: Vec::new(), tensors: Vec::new(), tensor_count: None, pair_count: None }
    }

    pub fn set(&mut self, key: &str, value: V) -> &mut Self {
        self.pairs.retain(|(k, _)| k != key);
        self.pairs.push((key.to_owned(), value));
        self
    }

    pub fn unset(&mut self, key: &str) -> &mut Self {
        self.pairs.retain(|(k, _)| k != key);
        self
    }

    /// Adds an f32 tensor whose extents are given slowest first and whose elements count up from `first`.
    pub fn tensor(&mut self, name: &str, shape: &[u64], first: f32) -> &mut Self {
        let n: u64 = shape.iter().product();
        self.tensors.push(T {
            name: name.to_owned(),
            extents: shape.iter().rev().copied().collect(),
            ty: 0,
            offset: None,
            data: (0..n).flat_map(|i| (first + i as f32).to_le_bytes()).collect(),
        });
        self
    }

    pub fn find(&mut self, name: &str) -> &mut T {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            out.extend(string(key));
            out.extend(value.bytes());
        }
        let mut data = Vec::new();
        for t in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0u8);
            out.extend(string(&t.name));
            out.extend((t.extents.len() as u32).to_le_bytes());
            t.extents.iter().for_each(|e| out.extend(e.to_le_bytes()));
            out.extend(t.ty.to_le_bytes());
            out.extend(t.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&t.data);
        }
        if !data.is_empty() {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
        }
        out
    }
}

/// A one-layer model with a byte-level tokenizer, small enough to be cut at every byte.
pub fn tiny_model() -> Writer {
    let (vocab, dim, heads, kv_heads, head_dim, ffn) = (8, 8, 2, 1, 4, 12);
    let strings = |s: &[&str]| V::Strs(s.iter().map(|s| (*s).to_owned()).collect());
    let mut w = Writer::new();
    w.set("general.architecture", V::Str("llama".into()))
        .set("general.name", V::Str("tiny".into()))
        .set("llama.block_count", V::U32(1))
        .set("llama.context_length", V::U32(64))
        .set("llama.embedding_length", V::U32(dim))
        .set("llama.feed_forward_length", V::U32(ffn))
        .set("llama.attention.head_count", V::U32(heads))
        .set("llama.attention.head_count_kv", V::U32(kv_heads))
        .set("llama.attention.layer_norm_rms_epsilon", V::F32(1e-5))
        .set("llama.rope.freq_base", V::F32(10_000.0))
        .set("tokenizer.ggml.model", V::Str("gpt2".into()))
        .set("tokenizer.ggml.pre", V::Str("gpt-2".into()))
        .set("tokenizer.ggml.tokens", strings(&["<s>", "</s>", "a", "b", "c", "ab", "abc", "Ġ"]))
        .set("tokenizer.ggml.token_type", V::I32s(vec![3, 3, 1, 1, 1, 1, 1, 1]))
        .set("tokenizer.ggml.merges", strings(&["a b", "ab c"]))
        .set("tokenizer.ggml.bos_token_id", V::U32(0))
        .set("tokenizer.ggml.eos_token_id", V::U32(1))
        .set("tokenizer.ggml.add_bos_token", V::Bool(true));
    let [vocab, dim, q, kv, ffn] = [vocab, dim, heads * head_dim, kv_heads * head_dim, ffn].map(u64::from);
    w.tensor("token_embd.weight", &[vocab, dim], 0.0)
        .tensor("blk.0.attn_norm.weight", &[dim], 100.0)
        .tensor("blk.0.attn_q.weight", &[q, dim], 200.0)
        .tensor("blk.0.attn_k.weight", &[kv, dim], 300.0)
        .tensor("blk.0.attn_v.weight", &[kv, dim], 400.0)
        .tensor("blk.0.attn_output.weight", &[dim, q], 500.0)
        .tensor("blk.0.ffn_norm.weight", &[dim], 600.0)
        .tensor("blk.0.ffn_gate.weight", &[ffn, dim], 700.0)
        .tensor("blk.0.ffn_up.weight", &[ffn, dim], 800.0)
        .tensor("blk.0.ffn_down.weight", &[dim, ffn], 900.0)
        .tensor("output_norm.weight", &[dim], 1000.0);
    w
}
