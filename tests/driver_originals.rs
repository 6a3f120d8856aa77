//! Small models of random weights compared with the code that their families come from (`tests/data/make_llama3_reference.py`
//! and `tests/data/make_minimind_reference.py` record what it computes).
#![cfg(feature = "driver")]

// Other tests use the rest of them.
#[allow(dead_code)]
mod gguf_writer;
#[allow(dead_code)]
mod original;

use gguf_writer::{T, V, Writer};
use kvlane::driver::gguf::Gguf;
use kvlane::driver::{Cache, Decoder, ErrorKind, Logits, ModelFile, Scratch};
use kvlane::{DType, Pairing};
use original::{Tensor, decoder, distance, floats, ids, integers, memory, numbers, one_by_one, scratch_dir, write_hf};
use serde_json::{Value, json};

/// Sums in another order; logits are of the order of 5.
const BOUND: f32 = 1e-4;

/// A tensor as the scripts make it; matrices have the scale 1/32.
fn random(name: &str, shape: &[usize], scale: f32) -> Vec<f32> {
    let values = integers(name, shape.iter().product());
    if shape.len() == 1 { values.map(|q| 1.0 + q / 16.0).collect() } else { values.map(|q| q * scale).collect() }
}

/// Feeds pieces to rows 0.. of a cache with a row more, and compares logits and memory with what was recorded; then
/// compares with all tokens at once, and with one after another.
fn check(decoder: &Decoder, pieces: &[usize], rows: &[Vec<u32>], logits: &[Vec<f32>], memories: &[Vec<f32>]) {
    let vocab = decoder.config().vocab;
    let total: usize = pieces.iter().sum();
    let mut cache = Cache::new(decoder.config(), rows.len() + 1, 32, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    let mut got = vec![Vec::new(); rows.len()];
    let mut start = 0;
    for &piece in pieces {
        let new: Vec<&[u32]> = rows.iter().map(|ids| &ids[start..start + piece]).collect();
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &new, Logits::All).unwrap();
        logits.chunks_exact(piece * vocab).zip(&mut got).for_each(|(logits, got)| got.extend_from_slice(logits));
        start += piece;
    }
    for (row, ids) in rows.iter().enumerate() {
        let (logit, element) =
            (distance(&got[row], &logits[row]), distance(&memory(&cache, decoder, row, 0..total), &memories[row]));
        let mut other = Cache::new(decoder.config(), 2, 32, DType::F32).unwrap();
        let whole = decoder.forward(&mut other, &mut Scratch::default(), 0, &[ids], Logits::All).unwrap();
        let single = one_by_one(decoder, &mut other, 1, ids);
        let (whole, single) = (distance(&got[row], &whole), distance(&got[row], &single));
        eprintln!("logits {logit:.2e}, memory {element:.2e}; all at once {whole:.2e}, one by one {single:.2e}");
        assert!(logit < BOUND && element < BOUND && whole < BOUND && single < BOUND);
        assert!(memory(&cache, decoder, row, total..32).iter().all(|&x| x == 0.0), "slots without a token");
    }
    assert!(memory(&cache, decoder, rows.len(), 0..32).iter().all(|&x| x == 0.0), "a row without tokens");
}

/// A step's multiplications: none for padding, none again for tokens of the past. `linear` is what a token passes.
fn check_work(decoder: &Decoder, linear: usize) {
    let c = decoder.config();
    for prompt in [1usize, 2, 7, 8, 9, 16, 31] {
        let mut cache = Cache::new(c, 2, 32, DType::F32).unwrap();
        let ids = vec![5; prompt];
        decoder.forward(&mut cache, &mut Scratch::default(), 1, &[&ids], Logits::None).unwrap();
        let mut scratch = Scratch::default();
        decoder.forward(&mut cache, &mut scratch, 1, &[&[6]], Logits::Last).unwrap();
        assert_eq!(scratch.work().linear, linear as u64, "after {prompt} tokens");
        // A query per head, and every key once for it.
        let pairs = c.layers.len() * c.heads * (prompt + 1);
        assert_eq!(scratch.work().attention, (pairs * 2 * c.head_dim) as u64, "after {prompt} tokens");
    }
}

fn llama3() -> Decoder {
    let mut w = Writer::new();
    w.set("general.architecture", V::Str("llama".into()))
        .set("llama.block_count", V::U32(2))
        .set("llama.context_length", V::U32(32))
        .set("llama.embedding_length", V::U32(64))
        .set("llama.feed_forward_length", V::U32(192))
        .set("llama.attention.head_count", V::U32(8))
        .set("llama.attention.head_count_kv", V::U32(2))
        .set("llama.attention.layer_norm_rms_epsilon", V::F32(1e-5))
        .set("llama.rope.freq_base", V::F32(500_000.0));
    let mut add = |ours: String, theirs: String, shape: &[usize]| {
        w.tensors.push(T {
            name: ours,
            extents: shape.iter().rev().map(|&n| n as u64).collect(),
            ty: 0,
            offset: None,
            data: random(&theirs, shape, 1.0 / 32.0).iter().flat_map(|v| v.to_le_bytes()).collect(),
        });
    };
    add("token_embd.weight".into(), "tok_embeddings.weight".into(), &[64, 64]);
    add("output_norm.weight".into(), "norm.weight".into(), &[64]);
    add("output.weight".into(), "output.weight".into(), &[64, 64]);
    for i in 0..2 {
        for (ours, theirs, shape) in [
            ("attn_norm", "attention_norm", &[64][..]),
            ("attn_q", "attention.wq", &[64, 64]),
            ("attn_k", "attention.wk", &[16, 64]),
            ("attn_v", "attention.wv", &[16, 64]),
            ("attn_output", "attention.wo", &[64, 64]),
            ("ffn_norm", "ffn_norm", &[64]),
            ("ffn_gate", "feed_forward.w1", &[192, 64]),
            ("ffn_down", "feed_forward.w2", &[64, 192]),
            ("ffn_up", "feed_forward.w3", &[192, 64]),
        ] {
            add(format!("blk.{i}.{ours}.weight"), format!("layers.{i}.{theirs}.weight"), shape);
        }
    }
    // Meta's checkpoints have the order of elements that GGUF files have: RoPE turns neighbours.
    let file = ModelFile::from_gguf(Gguf::from_bytes(w.bytes()).unwrap()).unwrap();
    assert_eq!(file.config().ropes[0].pairing, Pairing::Interleaved);
    decoder(&file, 1)
}

#[test]
fn llama3_is_metas() {
    let reference: Value = serde_json::from_str(include_str!("data/llama3_reference.json")).unwrap();
    let list = |key: &str| reference[key].as_array().unwrap().clone();
    let (logits, memories) = (list("logits"), list("memory"));
    let rows: Vec<Vec<u32>> = list("tokens").iter().map(ids).collect();
    assert_eq!(rows.len(), 2);
    let [logits, memories] = [logits, memories].map(|rows| rows.iter().map(floats).collect::<Vec<_>>());
    check(&llama3(), &numbers(&reference["pieces"]), &rows, &logits, &memories);
}

#[test]
fn a_step_of_llama3_repeats_no_keys_and_computes_no_padding() {
    check_work(&llama3(), 2 * (2 * 64 * 64 + 2 * 16 * 64 + 3 * 192 * 64) + 64 * 64);
}

#[test]
fn a_static_cache_refuses_what_it_has_no_room_for() {
    let decoder = llama3();
    let mut cache = Cache::new(decoder.config(), 2, 32, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    decoder.forward(&mut cache, &mut scratch, 0, &[&[1; 30], &[2; 3]], Logits::None).unwrap();
    let e = decoder.forward(&mut cache, &mut scratch, 0, &[&[1; 3], &[2]], Logits::Last).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument);
    assert_eq!(e.to_string(), "row 0 holds 30 tokens and gets 3, but the cache has room for 32");
    assert_eq!(cache.lengths(), [30, 3]);
}

fn minimind(part: &Value, name: &str) -> (std::path::PathBuf, Decoder) {
    let dir = scratch_dir(name);
    let parameters = part["parameters"].as_object().unwrap();
    // The head is the embedding, which files may have twice.
    let tensors: Vec<Tensor> = parameters
        .iter()
        .map(|(name, shape)| {
            let shape = numbers(shape);
            let source = if name == "lm_head.weight" { "model.embed_tokens.weight" } else { name };
            let scale = if name.ends_with("mlp.gate.weight") { 1.0 / 8.0 } else { 1.0 / 32.0 };
            Tensor { name: name.clone(), values: random(source, &shape, scale), shape }
        })
        .collect();
    write_hf(&dir, &part["config"], &tensors);
    let decoder = decoder(&ModelFile::open(&dir).unwrap(), 1);
    (dir, decoder)
}

#[test]
fn minimind_is_the_originals() {
    let reference: Value = serde_json::from_str(include_str!("data/minimind_reference.json")).unwrap();
    for part in ["dense", "experts"] {
        let (_, decoder) = minimind(&reference[part], &format!("minimind_{part}"));
        let c = decoder.config();
        assert_eq!((c.qk_norm, c.tied, c.ropes[0].base, c.ropes[0].pairing), (true, true, 1e6, Pairing::HalfSplit));
        let part = &reference[part];
        check(
            &decoder,
            &numbers(&reference["pieces"]),
            &[ids(&part["tokens"])],
            &[floats(&part["logits"])],
            &[floats(&part["memory"])],
        );
    }
}

#[test]
fn a_step_of_minimind_has_one_query() {
    let reference: Value = serde_json::from_str(include_str!("data/minimind_reference.json")).unwrap();
    let attention = 2 * 64 * 64 + 2 * 32 * 64;
    let (_, dense) = minimind(&reference["dense"], "minimind_work_dense");
    check_work(&dense, 2 * (attention + 3 * 96 * 64) + 64 * 64);
    let (_, experts) = minimind(&reference["experts"], "minimind_work_experts");
    let c = experts.config().experts.unwrap();
    assert_eq!((c.count, c.used, c.normalized), (4, 2, true));
    check_work(&experts, 2 * (attention + 4 * 64 + 2 * 3 * 32 * 64) + 64 * 64);
}

/// The dense model is a Qwen3, under whose name the project publishes it too.
#[test]
fn qwen3_is_the_same_model() {
    let reference: Value = serde_json::from_str(include_str!("data/minimind_reference.json")).unwrap();
    let part = &reference["dense"];
    let (dir, ours) = minimind(part, "minimind_qwen3");
    let mut config = part["config"].clone();
    for key in ["use_moe", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"] {
        config.as_object_mut().unwrap().remove(key);
    }
    config["architectures"] = json!(["Qwen3ForCausalLM"]);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let qwen = decoder(&ModelFile::open(&dir).unwrap(), 1);
    let tokens = ids(&part["tokens"]);
    let logits = |decoder: &Decoder| {
        let mut cache = Cache::new(decoder.config(), 1, 32, DType::F32).unwrap();
        decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&tokens], Logits::All).unwrap()
    };
    assert!(logits(&qwen) == logits(&ours));

    config["num_experts"] = json!(4);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let e = ModelFile::open(&dir).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("a mixture of 4 experts in a Qwen3 model"), "{e}");
}
