//! An encoder and a decoder through the public API: `cargo run --release --example encoder_decoder`.
//!
//! - The encoder reads a padded batch of sources: attention in both directions, over as many keys as a source has tokens.
//! - Cross-attention: each decoder layer writes the keys and values of the encoded sources once, before the first step.
//! - The decoder generates token by token, and each of its layers has a cache that grows by one token per step.
//!
//! Each attention is the same two calls, `kv_write` and `attention`, with other options. Layers are attention alone, without norms or
//! rotation (the README's example rotates), and weights are random, so the tokens have no meaning. The generated tokens, decoded
//! again in one pass, give the same bits.

use half::f16;
use kvlane::*;

const LAYERS: usize = 2;
const DIM: usize = 48;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const VOCABULARY: usize = 64;
const STEPS: usize = 12;
/// The lengths of the sources, which are padded to the longest.
const SOURCES: [i32; 3] = [7, 3, 5];
const BATCH: usize = SOURCES.len();

/// What all layers share: the kernels for this CPU, and scratch memory.
struct Runtime {
    context: Context,
    workspace: Workspace,
}

/// An attention layer and its cache, `[BATCH, capacity, KV_HEADS, HEAD_DIM]` in f16.
struct Layer {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
    cache: [usize; 4],
    keys: Vec<f16>,
    values: Vec<f16>,
    lengths: [i32; BATCH],
}

impl Layer {
    fn new(capacity: usize, seed: &mut u32) -> Self {
        let (queries, units) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let [q, k, v, out] =
            [(queries, DIM), (units, DIM), (units, DIM), (DIM, queries)].map(|(m, n)| matrix(seed, m, n));
        let cache = [BATCH, capacity, KV_HEADS, HEAD_DIM];
        let empty = vec![f16::ZERO; BATCH * capacity * units];
        Self { q, k, v, out, cache, keys: empty.clone(), values: empty, lengths: [0; BATCH] }
    }

    /// Appends the keys and values of the first `counts[b]` tokens of each sequence of `x`, `[BATCH, seq, DIM]`.
    fn write(&mut self, runtime: &Runtime, x: &[f32], counts: &[i32]) -> Result<()> {
        let new = [BATCH, x.len() / (BATCH * DIM), KV_HEADS, HEAD_DIM];
        let (k, v) = (linear(x, &self.k, DIM), linear(x, &self.v, DIM));
        let (k_cache, v_cache) =
            (ViewMut::new(&mut self.keys, self.cache)?, ViewMut::new(&mut self.values, self.cache)?);
        let places = Destination::positions(&self.lengths).counts(counts);
        let write = KvWrite::new(View::new(&k, new)?, View::new(&v, new)?, k_cache, v_cache, places);
        kv_write(&runtime.context, &Serial, write)?;
        self.lengths.iter_mut().zip(counts).for_each(|(length, count)| *length += count);
        Ok(())
    }

    /// Adds to `x` what its tokens attend to. If `causal`, they are the last tokens of the cache.
    fn attend(&self, runtime: &mut Runtime, x: &mut [f32], causal: bool) -> Result<()> {
        let shape = [BATCH, x.len() / (BATCH * DIM), HEADS, HEAD_DIM];
        let (q, mut out) = (linear(x, &self.q, DIM), vec![0.0f32; x.len() / DIM * HEADS * HEAD_DIM]);
        let (k, v) = (View::new(&self.keys, self.cache)?, View::new(&self.values, self.cache)?);
        let tensors = AttentionTensors::new(View::new(&q, shape)?, k, v, ViewMut::new(&mut out, shape)?);
        let options = AttentionOptions::new().causal(causal).lengths(&self.lengths);
        attention(&runtime.context, &Serial, &mut runtime.workspace, tensors, &options)?;
        x.iter_mut().zip(linear(&out, &self.out, HEADS * HEAD_DIM)).for_each(|(x, y)| *x += y);
        Ok(())
    }
}

/// The decoder's outputs for the next tokens of all sequences.
fn decode(runtime: &mut Runtime, layers: &mut [(Layer, Layer)], mut x: Vec<f32>) -> Result<Vec<f32>> {
    let counts = [(x.len() / (BATCH * DIM)) as i32; BATCH];
    for (own, cross) in layers {
        own.write(runtime, &x, &counts)?;
        own.attend(runtime, &mut x, true)?;
        cross.attend(runtime, &mut x, false)?;
    }
    Ok(x)
}

/// Random numbers, which keep the variance of what they are multiplied with.
fn matrix(seed: &mut u32, rows: usize, columns: usize) -> Vec<f32> {
    let mut number = || {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..rows * columns).map(|_| number() * (3.0 / columns as f32).sqrt()).collect()
}

/// `x`, rows of `inputs` numbers, times a matrix whose rows are the outputs.
fn linear(x: &[f32], matrix: &[f32], inputs: usize) -> Vec<f32> {
    let dot = |row: &[f32], weights: &[f32]| row.iter().zip(weights).map(|(a, b)| a * b).sum();
    x.chunks(inputs).flat_map(|row| matrix.chunks(inputs).map(move |weights| dot(row, weights))).collect()
}

fn main() -> Result<()> {
    let mut runtime = Runtime { context: Context::new()?, workspace: Workspace::new() };
    let longest = SOURCES.into_iter().max().unwrap_or(0) as usize;
    let mut seed = 3;
    let (embedding, head) = (matrix(&mut seed, VOCABULARY, DIM), matrix(&mut seed, VOCABULARY, DIM));
    let embed = |tokens: &[usize]| -> Vec<f32> {
        tokens.iter().flat_map(|t| &embedding[t * DIM..][..DIM]).map(|x| x * (DIM as f32).sqrt()).collect()
    };

    // The encoder. Padding is token 0: its keys are not written, and the outputs of its queries are not read.
    let source =
        |b: usize| (0..longest).map(move |t| if t < SOURCES[b] as usize { 1 + (17 * b + 5 * t) % 63 } else { 0 });
    let mut x = embed(&(0..BATCH).flat_map(source).collect::<Vec<_>>());
    for _ in 0..LAYERS {
        let mut layer = Layer::new(longest, &mut seed);
        layer.write(&runtime, &x, &SOURCES)?;
        layer.attend(&mut runtime, &mut x, false)?;
    }

    // The decoder. Its context is written once.
    let mut layer = |_| (Layer::new(STEPS, &mut seed), Layer::new(longest, &mut seed));
    let mut layers: Vec<_> = (0..LAYERS).map(&mut layer).collect();
    for (_, cross) in &mut layers {
        cross.write(&runtime, &x, &SOURCES)?;
    }

    // Step by step: the likeliest token of each sequence is its next one.
    let (mut tokens, mut steps) = (vec![vec![0]; BATCH], vec![Vec::new(); BATCH]);
    for step in 0..STEPS {
        let newest: Vec<usize> = tokens.iter().map(|t| t[step]).collect();
        let hidden = decode(&mut runtime, &mut layers, embed(&newest))?;
        for (b, hidden) in hidden.chunks(DIM).enumerate() {
            let logits = linear(hidden, &head, DIM);
            tokens[b].push((0..VOCABULARY).max_by(|&i, &j| logits[i].total_cmp(&logits[j])).unwrap_or(0));
            steps[b].extend_from_slice(hidden);
        }
    }
    for (b, tokens) in tokens.iter().enumerate() {
        println!("{:?} -> {:?}", source(b).take(SOURCES[b] as usize).collect::<Vec<_>>(), &tokens[1..]);
    }

    // The same tokens in one pass. A cache whose lengths are 0 is empty.
    layers.iter_mut().for_each(|(own, _)| own.lengths = [0; BATCH]);
    let inputs: Vec<usize> = tokens.iter().flat_map(|t| &t[..STEPS]).copied().collect();
    let full = decode(&mut runtime, &mut layers, embed(&inputs))?;
    assert_eq!(steps.concat(), full, "steps and one pass differ");
    println!("{STEPS} steps and one pass over {STEPS} tokens agree in every bit of {} numbers", full.len());
    Ok(())
}

#[test]
fn steps_and_one_pass_agree() {
    main().unwrap();
}
