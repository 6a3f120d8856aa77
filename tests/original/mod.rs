//! Small models of random weights, which the scripts `tests/data/make_*.py` gave to the original implementations.

use std::path::{Path, PathBuf};

use kvlane::driver::{Cache, Decoder, Logits, ModelFile, Scratch, Threads};
use kvlane::{Context, KvRead, Serial, Source, ViewMut, kv_read};
use serde_json::Value;

/// As `random_weights.py` defines them: integers from -7 to 7 that depend on a tensor's name.
pub fn integers(name: &str, count: usize) -> impl Iterator<Item = f32> {
    let fnv = |seed: u64, byte: u8| (seed ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325, fnv);
    (1..=count as u64).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z % 15) as f32 - 7.0
    })
}

/// A tensor in f32.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Writes a Hugging Face directory of f32 tensors.
pub fn write_hf(dir: &Path, config: &Value, tensors: &[Tensor]) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|(t, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, t.shape.clone(), bytes).unwrap();
        (t.name.clone(), view)
    });
    let file = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

/// A directory of this test's own, emptied.
pub fn scratch_dir(name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

pub fn decoder(file: &ModelFile, threads: usize) -> Decoder {
    let threads = Threads::new(threads).unwrap();
    let weights = threads.run(|| file.weights(&|_, _| ())).unwrap();
    Decoder::new(file.config().clone(), weights, 0, None, threads).unwrap()
}

pub fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

pub fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

/// The largest difference of two lists of one length.
pub fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).fold(0.0, |most, (a, b)| if a == b { most } else { f32::max(most, (a - b).abs()) })
}

/// The keys and values in `slots` of a row: layer by layer, first the keys of all slots, then the values.
pub fn memory(cache: &Cache, decoder: &Decoder, row: usize, slots: std::ops::Range<usize>) -> Vec<f32> {
    let c = decoder.config();
    let shape = [cache.rows(), cache.capacity(), c.kv_heads, c.head_dim];
    let width = c.kv_dim();
    let mut all = Vec::new();
    for layer in 0..c.layers.len() {
        let (k_cache, v_cache) = cache.views(layer).unwrap();
        let mut out = [(); 2].map(|()| vec![0.0f32; shape.iter().product()]);
        let [k, v] = &mut out;
        let (k, v) = (ViewMut::new(k, shape).unwrap(), ViewMut::new(v, shape).unwrap());
        let positions = vec![0; cache.rows()];
        let from = Source::positions(&positions);
        kv_read(&Context::new().unwrap(), &Serial, KvRead::new(k_cache, v_cache, k, v, from)).unwrap();
        for part in &out {
            let row = &part[row * cache.capacity() * width..][..cache.capacity() * width];
            all.extend_from_slice(&row[slots.start * width..slots.end * width]);
        }
    }
    all
}

/// The logits of all tokens, each fed alone.
pub fn one_by_one(decoder: &Decoder, cache: &mut Cache, row: usize, ids: &[u32]) -> Vec<f32> {
    let mut scratch = Scratch::default();
    ids.iter().flat_map(|id| decoder.forward(cache, &mut scratch, row, &[&[*id]], Logits::Last).unwrap()).collect()
}
