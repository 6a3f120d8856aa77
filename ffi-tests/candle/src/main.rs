//! Attention of kvlane in candle: a quantised Llama over candle's tensors and `QMatMul`, whose attention is candle's operations or a
//! `CustomOp3` of kvlane.
//!
//!     kvlane-candle MODEL.gguf REFERENCE.json          greedy tokens, against candle's own quantised Llama
//!     kvlane-candle MODEL.gguf REFERENCE.json time     tokens per second, in turns, after a prompt and at a context of 4000 tokens
//!
//! REFERENCE.json has prompts as tokens (`tests/data/smollm2_reference.json`).

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::quantized::{QMatMul, gguf_file};
use candle_core::{CpuStorage, CustomOp3, D, Device, Error, Layout, Module, Result, Shape, Tensor};
use candle_nn::ops::{silu, softmax_last_dim};
use candle_transformers::models::quantized_llama::ModelWeights;
use candle_transformers::quantized_nn::RmsNorm;
use kvlane::{
    AttentionOptions, AttentionTensors, Context, Destination, KvWrite, Pairing, Positions, Rayon, Rope,
    RopeFrequencies, RopeScaling, View, ViewMut, Workspace,
};

/// Tokens that a cache has room for: as many as candle's model has angles for.
const CAPACITY: usize = 4096;

/// Attention of a layer with its cache, from a position on: q `[1, seq, heads, head_dim]`, k and v `[1, seq, kv_heads, head_dim]`, not
/// rotated, to `[1, seq, heads * head_dim]`.
trait Attention {
    fn attend(&self, layer: usize, position: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;

    /// As if a layer had been given tokens with these keys and values, `[1, tokens, kv_heads, head_dim]`.
    fn fill(&self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<()>;
}

// ---------------------------------------------------------------- kvlane

/// What all layers share.
struct Kernels {
    context: Context,
    workspace: Mutex<Workspace>,
    frequencies: RopeFrequencies,
}

/// Keys and values `[1, CAPACITY, kv_heads, head_dim]`.
struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

struct KvlaneAttention {
    kernels: Arc<Kernels>,
    layers: Vec<Arc<Mutex<LayerCache>>>,
}

/// One call: rotation, cache write and attention, on the threads of rayon that candle uses too.
struct AttentionOp {
    kernels: Arc<Kernels>,
    cache: Arc<Mutex<LayerCache>>,
    position: usize,
}

fn view<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<View<'a>> {
    let (b, s, h, d) = layout.shape().dims4()?;
    let strides = layout.stride().iter().map(|&n| n as i64).collect::<Vec<_>>();
    let strides = <[i64; 4]>::try_from(strides).map_err(|_| Error::Msg("four axes".into()))?;
    View::strided(storage.as_slice::<f32>()?, layout.start_offset(), [b, s, h, d], strides).map_err(Error::wrap)
}

impl CustomOp3 for AttentionOp {
    fn name(&self) -> &'static str {
        "kvlane-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (view(q, q_layout)?, view(k, k_layout)?, view(v, v_layout)?);
        let poisoned = |_| Error::Msg("an earlier call has panicked".into());
        let mut cache = self.cache.lock().map_err(poisoned)?;
        let mut workspace =
            self.kernels.workspace.lock().map_err(|_| Error::Msg("an earlier call has panicked".into()))?;
        let LayerCache { keys, values } = &mut *cache;
        let ([_, seq, heads, dim], [_, _, kv_heads, _]) = (q.shape(), k.shape());
        let shape = [1, CAPACITY, kv_heads, dim];
        let (mut rotated, mut out) = (vec![0.0f32; seq * heads * dim], vec![0.0f32; seq * heads * dim]);
        let (position, length) = ([self.position as i32], [(self.position + seq) as i32]);
        let (context, threads) = (&self.kernels.context, Rayon::default());
        let rope = Rope::new(Pairing::Interleaved, dim, &self.kernels.frequencies, Positions::Offsets(&position));
        (|| {
            let (k_cache, v_cache) = (ViewMut::new(keys, shape)?, ViewMut::new(values, shape)?);
            let write = KvWrite::new(k, v, k_cache, v_cache, Destination::positions(&position));
            kvlane::kv_write(context, &threads, write.rope(rope))?;
            kvlane::rope(context, &threads, q, ViewMut::new(&mut rotated, q.shape())?, &rope)?;
            let (k, v) = (View::new(keys, shape)?, View::new(values, shape)?);
            let tensors =
                AttentionTensors::new(View::new(&rotated, q.shape())?, k, v, ViewMut::new(&mut out, q.shape())?);
            kvlane::attention(
                context,
                &threads,
                &mut workspace,
                tensors,
                &AttentionOptions::new().causal(true).lengths(&length),
            )
        })()
        .map_err(Error::wrap)?;
        Ok((CpuStorage::F32(out), Shape::from((1, seq, heads * dim))))
    }
}

impl Attention for KvlaneAttention {
    fn attend(&self, layer: usize, position: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let op = AttentionOp { kernels: self.kernels.clone(), cache: self.layers[layer].clone(), position };
        q.apply_op3_no_bwd(k, v, &op)
    }

    fn fill(&self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let mut cache = self.layers[layer].lock().map_err(|_| Error::Msg("an earlier call has panicked".into()))?;
        cache.keys[..keys.elem_count()].copy_from_slice(&keys.flatten_all()?.to_vec1()?);
        cache.values[..values.elem_count()].copy_from_slice(&values.flatten_all()?.to_vec1()?);
        Ok(())
    }
}

// ---------------------------------------------------------------- candle

/// The same by candle's operations, over caches that grow by concatenation, `[1, kv_heads, tokens, head_dim]`.
struct CandleAttention {
    layers: Vec<Mutex<Option<(Tensor, Tensor)>>>,
    cos: Tensor,
    sin: Tensor,
}

impl Attention for CandleAttention {
    fn attend(&self, layer: usize, position: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (_, seq, heads, dim) = q.dims4()?;
        let kv_heads = k.dim(2)?;
        let by_heads = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let rotate = |x: &Tensor| {
            candle_nn::rotary_emb::rope_i(
                &by_heads(x)?,
                &self.cos.narrow(0, position, seq)?,
                &self.sin.narrow(0, position, seq)?,
            )
        };
        let (q, mut k, mut v) = (rotate(q)?, rotate(k)?, by_heads(v)?);
        let mut cache = self.layers[layer].lock().map_err(|_| Error::Msg("an earlier call has panicked".into()))?;
        if let Some((keys, values)) = cache.as_ref().filter(|_| position > 0) {
            (k, v) = (Tensor::cat(&[keys, &k], 2)?, Tensor::cat(&[values, &v], 2)?);
        }
        *cache = Some((k.clone(), v.clone()));
        let tokens = position + seq;
        // Every KV head serves a group of query heads.
        let group = q.reshape((1, kv_heads, heads / kv_heads * seq, dim))?;
        let logits = (group.matmul(&k.transpose(2, 3)?)? / (dim as f64).sqrt())?.reshape((1, heads, seq, tokens))?;
        let bias =
            (0..seq).flat_map(|i| (0..tokens).map(move |j| if j <= position + i { 0.0 } else { f32::NEG_INFINITY }));
        let bias = Tensor::from_iter(bias, q.device())?.reshape((seq, tokens))?;
        let weights =
            softmax_last_dim(&logits.broadcast_add(&bias)?)?.reshape((1, kv_heads, heads / kv_heads * seq, tokens))?;
        weights.matmul(&v)?.reshape((1, heads, seq, dim))?.transpose(1, 2)?.reshape((1, seq, heads * dim))
    }

    fn fill(&self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let by_heads = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let mut cache = self.layers[layer].lock().map_err(|_| Error::Msg("an earlier call has panicked".into()))?;
        *cache = Some((by_heads(keys)?, by_heads(values)?));
        Ok(())
    }
}

// ---------------------------------------------------------------- the model

struct Block {
    attention_norm: RmsNorm,
    q: QMatMul,
    k: QMatMul,
    v: QMatMul,
    out: QMatMul,
    ffn_norm: RmsNorm,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

struct Llama {
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: RmsNorm,
    output: QMatMul,
    heads: usize,
    kv_heads: usize,
    rope_base: f64,
}

impl Llama {
    fn open(path: &str) -> Result<Self> {
        let (mut file, device) = (File::open(path)?, Device::Cpu);
        let content = gguf_file::Content::read(&mut file)?;
        let given =
            |name: &str| content.metadata.get(&format!("llama.{name}")).ok_or_else(|| Error::Msg(format!("no {name}")));
        let eps = f64::from(given("attention.layer_norm_rms_epsilon")?.to_f32()?);
        let mut tensor = |name: &str| content.tensor(&mut file, &format!("{name}.weight"), &device);
        let embedding = tensor("token_embd")?;
        let mut blocks = Vec::new();
        for i in 0..given("block_count")?.to_u32()? {
            let mut part = |name: &str| tensor(&format!("blk.{i}.{name}"));
            blocks.push(Block {
                attention_norm: RmsNorm::from_qtensor(part("attn_norm")?, eps)?,
                q: QMatMul::from_qtensor(part("attn_q")?)?,
                k: QMatMul::from_qtensor(part("attn_k")?)?,
                v: QMatMul::from_qtensor(part("attn_v")?)?,
                out: QMatMul::from_qtensor(part("attn_output")?)?,
                ffn_norm: RmsNorm::from_qtensor(part("ffn_norm")?, eps)?,
                gate: QMatMul::from_qtensor(part("ffn_gate")?)?,
                up: QMatMul::from_qtensor(part("ffn_up")?)?,
                down: QMatMul::from_qtensor(part("ffn_down")?)?,
            });
        }
        let norm = RmsNorm::from_qtensor(tensor("output_norm")?, eps)?;
        let dense = embedding.dequantize(&device)?;
        // Tied weights, unless the file has an output of its own.
        let output = QMatMul::from_qtensor(tensor("output").unwrap_or(embedding))?;
        Ok(Self {
            embedding: dense,
            blocks,
            norm,
            output,
            heads: given("attention.head_count")?.to_u32()? as usize,
            kv_heads: given("attention.head_count_kv")?.to_u32()? as usize,
            rope_base: f64::from(given("rope.freq_base")?.to_f32()?),
        })
    }

    fn head_dim(&self) -> Result<usize> {
        Ok(self.embedding.dim(1)? / self.heads)
    }

    fn with_kvlane(&self) -> Result<KvlaneAttention> {
        let dim = self.head_dim()?;
        let empty = || vec![0.0; CAPACITY * self.kv_heads * dim];
        let kernels = Kernels {
            context: Context::new().map_err(Error::wrap)?,
            workspace: Mutex::default(),
            frequencies: RopeFrequencies::new(dim, self.rope_base, &RopeScaling::None).map_err(Error::wrap)?,
        };
        let layers =
            self.blocks.iter().map(|_| Arc::new(Mutex::new(LayerCache { keys: empty(), values: empty() }))).collect();
        Ok(KvlaneAttention { kernels: Arc::new(kernels), layers })
    }

    fn with_candle(&self) -> Result<CandleAttention> {
        let dim = self.head_dim()?;
        let angles = (0..CAPACITY)
            .flat_map(|p| (0..dim / 2).map(move |i| p as f64 * self.rope_base.powf(-2.0 * i as f64 / dim as f64)));
        let angles: Vec<f64> = angles.collect();
        let table = |f: fn(f64) -> f64| {
            Tensor::from_iter(angles.iter().map(|&x| f(x) as f32), &Device::Cpu)?.reshape((CAPACITY, dim / 2))
        };
        let layers = self.blocks.iter().map(|_| Mutex::default()).collect();
        Ok(CandleAttention { layers, cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// The logits of the last of `tokens`, which stand from `position` on.
    fn forward(&self, attention: &dyn Attention, tokens: &[u32], position: usize) -> Result<Tensor> {
        let (seq, dim) = (tokens.len(), self.head_dim()?);
        let mut x = self.embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?.unsqueeze(0)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let normed = block.attention_norm.forward(&x)?;
            let heads = |m: &QMatMul, n: usize| m.forward(&normed)?.reshape((1, seq, n, dim));
            let (q, k, v) =
                (heads(&block.q, self.heads)?, heads(&block.k, self.kv_heads)?, heads(&block.v, self.kv_heads)?);
            x = (x + block.out.forward(&attention.attend(i, position, &q, &k, &v)?)?)?;
            let normed = block.ffn_norm.forward(&x)?;
            let gated = (silu(&block.gate.forward(&normed)?)? * block.up.forward(&normed)?)?;
            x = (x + block.down.forward(&gated)?)?;
        }
        self.output.forward(&self.norm.forward(&x.narrow(1, seq - 1, 1)?)?)?.squeeze(1)
    }
}

// ---------------------------------------------------------------- the contestants

/// A model and its caches.
enum Contestant<'a> {
    Own(Box<ModelWeights>),
    With(&'a Llama, Box<dyn Attention>),
}

impl Contestant<'_> {
    fn all<'a>(llama: &'a Llama, path: &str) -> Result<[(&'static str, Contestant<'a>); 3]> {
        let mut file = File::open(path)?;
        let content = gguf_file::Content::read(&mut file)?;
        let own = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
        Ok([
            ("candle's quantised Llama", Contestant::Own(Box::new(own))),
            ("this model with candle's operations", Contestant::With(llama, Box::new(llama.with_candle()?))),
            ("this model with kvlane", Contestant::With(llama, Box::new(llama.with_kvlane()?))),
        ])
    }

    /// The logits after the tokens, and the most probable token.
    fn step(&mut self, tokens: &[u32], position: usize) -> Result<(Vec<f32>, u32)> {
        let logits = match self {
            Self::Own(model) => model.forward(&Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?, position)?,
            Self::With(llama, attention) => llama.forward(&**attention, tokens, position)?,
        };
        let logits = logits.squeeze(0)?;
        Ok((logits.to_vec1()?, logits.argmax(D::Minus1)?.to_scalar()?))
    }
}

/// How far the most probable token is ahead.
fn margin(logits: &[f32]) -> f32 {
    let [mut first, mut second] = [f32::NEG_INFINITY; 2];
    for &x in logits {
        (first, second) = if x > first { (x, first) } else { (first, second.max(x)) };
    }
    first - second
}

/// The bytes of tokens, whose pieces are GPT-2's characters for bytes.
fn text(pieces: &[String], tokens: &[u32]) -> String {
    let printable = |b: &u32| (33..=126).contains(b) || (161..=172).contains(b) || (174..=255).contains(b);
    let others: Vec<u32> = (0..256).filter(|b| !printable(b)).collect();
    let byte =
        |c: char| if printable(&u32::from(c)) { u32::from(c) } else { others[u32::from(c) as usize - 256] } as u8;
    let bytes = tokens.iter().flat_map(|&t| pieces[t as usize].chars()).map(byte).collect::<Vec<_>>();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().into_iter().flatten().filter_map(|x| x.as_u64()).map(|x| x as u32).collect()
}

/// Every prompt continued by all of them: the same tokens, up to one where candle's own model has two that are as probable as the
/// difference of the logits. (Its matrix products round their inputs to eight bits, which makes a rounding of f32 a larger one.) With
/// `CANDLE_DEQUANTIZE_ALL=1`, which makes them products of f32, all texts are the same.
fn compare(llama: &Llama, path: &str, prompts: &[Vec<u32>], pieces: &[String]) -> Result<()> {
    const STEPS: usize = 16;
    // With products of f32.
    const LOGITS: f32 = 1e-3;
    let (mut worst, mut whole, mut texts) = (0.0f32, 0, 0);
    for prompt in prompts {
        let mut wanted: Vec<(Vec<f32>, u32)> = Vec::new();
        for (name, mut model) in Contestant::all(llama, path)? {
            let (mut tokens, mut position, mut generated) = (prompt.clone(), 0, Vec::new());
            while generated.len() < STEPS {
                let (logits, next) = model.step(&tokens, position)?;
                position += tokens.len();
                tokens = vec![next];
                generated.push((logits, next));
            }
            let text_of =
                |steps: &[(Vec<f32>, u32)]| text(pieces, &steps.iter().map(|(_, token)| *token).collect::<Vec<_>>());
            println!("{name}: {:?} -> {:?}", text(pieces, prompt), text_of(&generated));
            if wanted.is_empty() {
                wanted = generated;
                continue;
            }
            texts += 1;
            whole += 1;
            for ((own, token), (logits, other)) in wanted.iter().zip(&generated) {
                let difference = own.iter().zip(logits).fold(0.0f32, |d, (a, b)| d.max((a - b).abs()));
                worst = worst.max(difference);
                if token != other {
                    if margin(own) > 2.0 * difference || difference > 1.0 {
                        return Err(Error::Msg(format!("{name} differs: margin {}, logits {difference}", margin(own))));
                    }
                    whole -= 1;
                    break;
                }
            }
        }
    }
    println!(
        "{whole} of {texts} texts are those of candle's own model, the others up to a tie; logits within {worst:.1e}"
    );
    let products_of_f32 = std::env::var("CANDLE_DEQUANTIZE_ALL").is_ok_and(|value| value == "1");
    if products_of_f32 && worst > LOGITS {
        return Err(Error::Msg(format!("logits differ by {worst}, more than {LOGITS}")));
    }
    let least = if products_of_f32 { texts } else { texts / 2 };
    if whole < least { Err(Error::Msg("too few texts are the same".into())) } else { Ok(()) }
}

/// The median times of steps of contestants that take turns, from a position on, all with the tokens of the first.
fn turns(all: &mut [(&'static str, Contestant)], mut token: u32, position: usize) -> Result<()> {
    let (mut times, mut worst) = (vec![Vec::new(); all.len()], 0.0f32);
    for position in position..position + 24 {
        let mut logits: Vec<Vec<f32>> = Vec::new();
        let given = token;
        for (i, (_, model)) in all.iter_mut().enumerate() {
            let start = Instant::now();
            let (result, next) = model.step(&[given], position)?;
            times[i].push(start.elapsed());
            token = if i == 0 { next } else { token };
            logits.push(result);
        }
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
        let difference = |other: &Vec<f32>| {
            norm(&mut logits[0].iter().zip(other).map(|(a, b)| a - b)) / norm(&mut other.iter().copied())
        };
        worst = logits.iter().map(difference).fold(worst, |w, d| if d <= w { w } else { d });
    }
    // Eight-bit inputs of matrix products amplify the roundings of f32, so that this is no small number.
    println!("at {position} tokens, logits differ by {worst:.1e} of their norm");
    if worst.is_nan() {
        return Err(Error::Msg("logits are NaN".into()));
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2].as_secs_f64()
    };
    let seconds: Vec<f64> = times.iter_mut().map(median).collect();
    for ((name, _), s) in all.iter().zip(&seconds) {
        println!("at {position} tokens, {name}: {:.1} tokens/s, ratio {:.2}", 1.0 / s, seconds[0] / s);
    }
    Ok(())
}

/// Steps after a prompt, of all; and after 4000 tokens of random keys and values, which candle's own model cannot be given.
fn measure(llama: &Llama, path: &str, prompt: &[u32]) -> Result<()> {
    let mut all = Contestant::all(llama, path)?;
    let mut first = 0;
    for (_, model) in &mut all {
        first = model.step(prompt, 0)?.1;
    }
    turns(&mut all, first, prompt.len())?;

    const CONTEXT: usize = 4000;
    let attentions: [(_, Box<dyn Attention>); 2] =
        [("candle's operations", Box::new(llama.with_candle()?)), ("kvlane", Box::new(llama.with_kvlane()?))];
    let shape = (1, CONTEXT, llama.kv_heads, llama.head_dim()?);
    for layer in 0..llama.blocks.len() {
        let [keys, values] = [0.0f32, 0.0].map(|mean| Tensor::randn(mean, 1.0, shape, &Device::Cpu));
        let (keys, values) = (keys?, values?);
        let new = |heads| Tensor::randn(0.0f32, 1.0, (1, 1, heads, llama.head_dim()?), &Device::Cpu);
        let (q, k, v) = (new(llama.heads)?, new(llama.kv_heads)?, new(llama.kv_heads)?);
        let mut outputs = Vec::new();
        for (_, attention) in &attentions {
            attention.fill(layer, &keys, &values)?;
            outputs.push(attention.attend(layer, CONTEXT, &q, &k, &v)?);
            attention.fill(layer, &keys, &values)?;
        }
        let difference = (&outputs[0] - &outputs[1])?.abs()?.max_all()?.to_scalar::<f32>()?;
        if difference.is_nan() || difference > 1e-4 {
            return Err(Error::Msg(format!("attention of layer {layer} differs by {difference}")));
        }
    }
    let mut both = attentions.map(|(name, attention)| (name, Contestant::With(llama, attention)));
    turns(&mut both, first, CONTEXT)
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let (path, reference) = (arguments.get(1).ok_or("a model file")?, arguments.get(2).ok_or("a reference file")?);
    let reference: serde_json::Value = serde_json::from_reader(File::open(reference)?)?;
    let prompts: Vec<Vec<u32>> = reference["prompts"]
        .as_array()
        .ok_or("no prompts")?
        .iter()
        .map(|p| ids(&p["ids"]))
        .filter(|p| p.len() <= 40)
        .take(6)
        .collect();
    let llama = Llama::open(path)?;
    if arguments.get(3).is_some_and(|word| word == "time") {
        let longest = prompts.iter().max_by_key(|p| p.len()).ok_or("no prompts")?;
        measure(&llama, path, longest)?;
    } else {
        let content = gguf_file::Content::read(&mut File::open(path)?)?;
        let pieces = content.metadata.get("tokenizer.ggml.tokens").ok_or("no tokens")?.to_vec()?;
        let pieces = pieces.iter().map(|piece| piece.to_string().cloned()).collect::<Result<Vec<_>>>()?;
        compare(&llama, path, &prompts, &pieces)?;
    }
    Ok(())
}
