//! A Grok-1 of random weights compared with the original's code and with llama.cpp (`tests/data/make_grok.py` records
//! what they compute).
#![cfg(feature = "driver")]

// Other tests use the rest of them.
#[allow(dead_code)]
mod gguf_writer;
#[allow(dead_code)]
mod original;

use std::path::Path;
use std::process::Command;

use gguf_writer::{T, V, Writer};
use kvlane::driver::gguf::{Array, Gguf, Value as Meta};
use kvlane::driver::quant::dequantize;
use kvlane::driver::{Cache, Decoder, ErrorKind, Formats, Logits, ModelFile, Scratch};
use kvlane::{CacheFormat, DType, Pairing};
use original::{Tensor, decoder, distance, floats, ids, memory, numbers, one_by_one, scratch_dir, write_hf};
use serde_json::{Value, json};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/grok.gguf");

fn reference() -> Value {
    serde_json::from_str(include_str!("data/grok_reference.json")).unwrap()
}

/// The file with all tensors in f32, which everything below computes with.
fn writer() -> Writer {
    let file = Gguf::open(Path::new(FILE)).unwrap();
    let mut w = Writer::new();
    for (key, value) in file.metadata() {
        let value = match value {
            Meta::String(s) => V::Str(s.clone()),
            Meta::Bool(b) => V::Bool(*b),
            Meta::Unsigned(n) => V::U64(*n),
            Meta::Float(x) => V::F32(*x as f32),
            Meta::Array(Array::String(s)) => V::Strs(s.clone()),
            Meta::Array(Array::F32(x)) => V::F32s(x.clone()),
            Meta::Array(Array::I32(n)) => V::I32s(n.clone()),
            other => panic!("{key}: {other:?}"),
        };
        w.set(key, value);
    }
    for t in file.tensors() {
        let mut values = vec![0.0; t.elements()];
        dequantize(t.ty, t.data, &mut values).unwrap();
        w.tensors.push(T {
            name: t.name.to_owned(),
            extents: t.shape.iter().rev().map(|&n| n as u64).collect(),
            ty: 0,
            offset: None,
            data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        });
    }
    w
}

fn open(w: &Writer) -> kvlane::driver::Result<ModelFile> {
    ModelFile::from_gguf(Gguf::from_bytes(w.bytes())?)
}

fn plain() -> Decoder {
    decoder(&open(&writer()).unwrap(), 1)
}

/// What the original's run at one precision differs from ours by at most, in a logit and in an element of the memory.
fn against_the_original(part: &str, formats: impl Into<Formats>) -> (f32, f32) {
    let (reference, decoder) = (reference(), plain());
    let (rows, slots) = (reference["rows"].as_u64().unwrap() as usize, reference["slots"].as_u64().unwrap() as usize);
    let mut cache = Cache::new(decoder.config(), rows, slots, formats).unwrap();
    let mut scratch = Scratch::default();
    // What every row must hold, token by token, as the original added it.
    let mut held: Vec<Vec<Vec<f32>>> = vec![Vec::new(); rows];
    let (mut worst_logit, mut worst_memory) = (0.0f32, 0.0f32);
    let width = decoder.config().kv_dim();
    let steps = reference[part]["steps"].as_array().unwrap();
    let plan = reference["plan"].as_array().unwrap();
    assert_eq!(plan.len(), steps.len());
    for (action, want) in plan.iter().zip(steps) {
        let tokens = ids(&action["tokens"]);
        let active = match action.get("insert") {
            Some(row) => {
                let row = row.as_u64().unwrap() as usize;
                // The original pads the prompt to a bucket and writes the padding too; here the row gets its tokens only.
                cache.reset(row);
                held[row].clear();
                vec![(row, tokens)]
            }
            None => numbers(&action["step"]).into_iter().zip(tokens.into_iter().map(|t| vec![t])).collect(),
        };
        // Rows that are not active have no new tokens. The original writes into their first slot, and their text is lost.
        let inactive: Vec<usize> = (0..rows).filter(|row| active.iter().all(|(r, _)| r != row)).collect();
        let before: Vec<Vec<f32>> = inactive.iter().map(|&row| memory(&cache, &decoder, row, 0..slots)).collect();
        let mut given = vec![&[][..]; rows];
        active.iter().for_each(|(row, tokens)| given[*row] = tokens);
        let logits = decoder.forward(&mut cache, &mut scratch, 0, &given, Logits::Last).unwrap();
        for (&row, before) in inactive.iter().zip(&before) {
            assert!(memory(&cache, &decoder, row, 0..slots) == *before, "row {row} is not active");
        }

        let vocab = decoder.config().vocab;
        for (i, (row, tokens)) in active.iter().enumerate() {
            worst_logit = worst_logit.max(distance(&logits[i * vocab..][..vocab], &floats(&want["logits"][i])));
            let added = floats(&want["memory"][i]);
            let parts = 2 * decoder.config().layers.len();
            for t in 0..tokens.len() {
                let token = (0..parts).flat_map(|part| &added[(part * tokens.len() + t) * width..][..width]);
                held[*row].push(token.copied().collect());
            }
            assert_eq!(cache.len(*row), held[*row].len());
            let got = memory(&cache, &decoder, *row, 0..cache.len(*row));
            let want: Vec<f32> = (0..parts)
                .flat_map(|part| held[*row].iter().flat_map(move |token| &token[part * width..][..width]))
                .copied()
                .collect();
            worst_memory = worst_memory.max(distance(&got, &want));
        }
    }
    (worst_logit, worst_memory)
}

#[test]
fn logits_and_memory_are_the_originals() {
    // The original's own code, in which bf16 was made f32. Two layers, with sums in another order; logits are of the
    // order of 5, keys up to 12.
    let (logit, memory) = against_the_original("f32", DType::F32);
    eprintln!("f32: logits {logit:.2e}, memory {memory:.2e}");
    assert!(logit < 2e-4 && memory < 2e-4, "{logit} {memory}");
}

#[test]
fn rounding_to_bf16_is_all_that_the_published_code_adds() {
    // It rounds activations, scores, probabilities and the memory to bf16, 2^-9 of a value each time. Its own two
    // precisions differ by 0.037 in a logit and by 0.036 in the memory.
    for formats in [DType::F32, DType::Bf16] {
        let (logit, memory) = against_the_original("bf16", formats);
        eprintln!("bf16, cache {formats:?}: logits {logit:.2e}, memory {memory:.2e}");
        // In a cache of bf16 an element may be its neighbour: 2^-4 where keys are greater than 8.
        assert!(logit < 0.06 && memory <= 0.0625, "{logit} {memory}");
    }
}

#[test]
fn the_memory_may_have_any_type() {
    for (format, bound) in [(CacheFormat::F16, 0.01), (CacheFormat::Bf16, 0.06), (CacheFormat::Int8, 0.15)] {
        let decoder = plain();
        let cache = Cache::new(decoder.config(), 2, 8, format).unwrap();
        assert!(memory(&cache, &decoder, 1, 0..8).iter().all(|&x| x == 0.0), "{format:?} begins as zeros");
        let (logit, memory) = against_the_original("f32", format);
        eprintln!("cache {format:?}: logits {logit:.2e}, memory {memory:.2e}");
        assert!(logit < bound && memory < bound, "{format:?}: {logit} {memory}");
    }
}

#[test]
fn all_positions_are_the_originals_and_llama_cpps() {
    let (reference, decoder) = (reference(), plain());
    let tokens = ids(&reference["longest"]);
    let mut cache = Cache::new(decoder.config(), 2, tokens.len(), DType::F32).unwrap();
    let all = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&tokens], Logits::All).unwrap();
    let vocab = decoder.config().vocab;
    let compare = |all: &[f32], want: &Value| {
        let want = want.as_array().unwrap();
        assert_eq!(want.len(), tokens.len().div_ceil(3));
        let rows = all.chunks_exact(vocab).step_by(3).zip(want);
        rows.map(|(got, want)| distance(got, &floats(want))).fold(0.0f32, f32::max)
    };
    let (original, llama) = (compare(&all, &reference["f32"]["whole"]), compare(&all, &reference["llama"]["f32"]));
    let rounded = compare(&all, &reference["bf16"]["whole"]);
    eprintln!("the original {original:.2e}, as published {rounded:.2e}, llama.cpp {llama:.2e}");
    assert!(original < 2e-4 && rounded < 0.06, "{original} {rounded}");
    // llama.cpp looks its GELU up in a table of f16, and it divides the two experts' probabilities by their sum, which
    // the norm that follows makes good.
    assert!(llama < 0.01, "{llama}");

    // Token by token, the same.
    let cached = one_by_one(&decoder, &mut cache, 1, &tokens);
    let step = distance(&cached, &all);
    eprintln!("cached {step:.2e}");
    assert!(step < 1e-4, "{step}");
}

#[test]
fn the_file_as_it_is_gives_llama_cpps_logits() {
    let reference = reference();
    let decoder = decoder(&ModelFile::open(Path::new(FILE)).unwrap(), 2);
    let tokens = ids(&reference["longest"]);
    let mut cache = Cache::new(decoder.config(), 1, tokens.len(), DType::F32).unwrap();
    let all = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&tokens], Logits::All).unwrap();
    let want = reference["llama"]["q4_0"].as_array().unwrap();
    let rows = all.chunks_exact(decoder.config().vocab).step_by(3).zip(want);
    let worst = rows.map(|(got, want)| distance(got, &floats(want))).fold(0.0f32, f32::max);
    eprintln!("llama.cpp over Q4_0: {worst:.2e}");
    // llama.cpp rounds the inputs of linear layers to eight bits.
    assert!(worst < 0.3, "{worst}");

    // The bits of a token do not depend on how the text was cut, nor on other rows.
    let mut cache = Cache::new(decoder.config(), 3, tokens.len(), DType::F32).unwrap();
    assert!(one_by_one(&decoder, &mut cache, 2, &tokens) == all, "token by token");
    cache.reset(2);
    let together = [&tokens[1..], &[7; 3], &tokens[..]];
    let logits = decoder.forward(&mut cache, &mut Scratch::default(), 0, &together, Logits::All).unwrap();
    assert!(logits[logits.len() - all.len()..] == all, "beside others");

    // The same weights in f32.
    let decoder = decoder.exact(true);
    cache.reset(0);
    let exact = decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&tokens], Logits::All).unwrap();
    cache.reset(1);
    let want = plain().forward(&mut cache, &mut Scratch::default(), 1, &[&tokens], Logits::All).unwrap();
    assert!(distance(&exact, &want) < 1e-4);
}

#[test]
fn overflow_is_refused_where_the_original_overwrites() {
    let (reference, decoder) = (reference(), plain());
    let slots = reference["slots"].as_u64().unwrap() as usize;
    let tokens = ids(&reference["longest"]);
    for case in reference["overflow"].as_array().unwrap() {
        let [held, new] = ["held", "new"].map(|key| case[key].as_u64().unwrap() as usize);
        assert!(!case["overwritten"].as_array().unwrap().is_empty(), "the original overwrites valid slots");
        let mut cache = Cache::new(decoder.config(), 2, slots, DType::F32).unwrap();
        let mut scratch = Scratch::default();
        decoder.forward(&mut cache, &mut scratch, 1, &[&tokens[..held]], Logits::None).unwrap();
        let before = memory(&cache, &decoder, 1, 0..slots);
        let e = decoder.forward(&mut cache, &mut scratch, 1, &[&vec![9; new]], Logits::Last).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Argument);
        assert_eq!(
            e.to_string(),
            format!("row 1 holds {held} tokens and gets {new}, but the cache has room for {slots}")
        );
        assert_eq!(cache.len(1), held);
        assert!(memory(&cache, &decoder, 1, 0..slots) == before);
    }
}

#[test]
fn a_prompt_beside_others_and_in_pieces_is_the_prompt_alone() {
    let (reference, decoder) = (reference(), plain());
    let tokens = ids(&reference["longest"]);
    let capacity = tokens.len();
    let alone = {
        let mut cache = Cache::new(decoder.config(), 1, capacity, DType::F32).unwrap();
        decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&tokens], Logits::Last).unwrap()
    };
    let mut cache = Cache::with_chunk(decoder.config(), 3, capacity, 5, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    let together = [&tokens[..7], &tokens[..], &[][..]];
    let logits = decoder.forward(&mut cache, &mut scratch, 0, &together, Logits::Last).unwrap();
    let vocab = decoder.config().vocab;
    assert!(distance(&logits[vocab..], &alone) < 1e-4);
    assert!(memory(&cache, &decoder, 2, 0..capacity).iter().all(|&x| x == 0.0), "the empty row is untouched");
}

/// As the original does it: each prompt is computed in a memory of its own, which then enters a row of the common one.
#[test]
fn inserted_rows_are_rows() {
    let (reference, decoder) = (reference(), plain());
    let slots = reference["slots"].as_u64().unwrap() as usize;
    let mut cache = Cache::new(decoder.config(), 3, slots, DType::F32).unwrap();
    let mut scratch = Scratch::default();
    for (action, want) in
        reference["plan"].as_array().unwrap().iter().zip(reference["f32"]["steps"].as_array().unwrap())
    {
        let tokens = ids(&action["tokens"]);
        let logits = match action.get("insert") {
            Some(row) => {
                let mut own = Cache::new(decoder.config(), 1, tokens.len(), DType::F32).unwrap();
                let logits = decoder.forward(&mut own, &mut scratch, 0, &[&tokens], Logits::Last).unwrap();
                let row = row.as_u64().unwrap() as usize;
                let others: Vec<usize> = (0..3).filter(|&other| other != row).collect();
                let held =
                    |cache: &Cache| others.iter().map(|&o| memory(cache, &decoder, o, 0..slots)).collect::<Vec<_>>();
                let before = held(&cache);
                decoder.insert(&mut cache, row, &mut own, 0).unwrap();
                assert!(held(&cache) == before, "the other rows are as they were");
                assert_eq!(cache.len(row), tokens.len());
                let all = 0..tokens.len();
                assert!(memory(&cache, &decoder, row, all.clone()) == memory(&own, &decoder, 0, all));
                logits
            }
            None => {
                let rows = numbers(&action["step"]);
                let given: Vec<(usize, &[u32])> = rows.iter().copied().zip(tokens.chunks(1)).collect();
                decoder.forward_rows(&mut cache, &mut scratch, &given, Logits::Last).unwrap()
            }
        };
        for (got, want) in logits.chunks_exact(decoder.config().vocab).zip(want["logits"].as_array().unwrap()) {
            assert!(distance(got, &floats(want)) < 2e-4);
        }
    }
    let mut longer = Cache::new(decoder.config(), 1, slots + 1, DType::F32).unwrap();
    decoder.forward(&mut longer, &mut scratch, 0, &[&vec![9; slots + 1]], Logits::None).unwrap();
    assert!(decoder.insert(&mut cache, 1, &mut longer, 0).is_err(), "one token more than the row has slots");
    assert_eq!(cache.lengths(), [15, 4, 24]);
}

#[test]
fn a_row_beside_a_long_prompt_is_not_padded() {
    let decoder = plain();
    let work = |rows: &[(usize, &[u32])]| {
        let mut cache = Cache::new(decoder.config(), 3, 64, DType::F32).unwrap();
        let mut scratch = Scratch::default();
        decoder.forward_rows(&mut cache, &mut scratch, rows, Logits::Last).unwrap();
        scratch.work()
    };
    let (long, short) = ([7; 40], [9; 1]);
    let (one, other) = (work(&[(0, &long)]), work(&[(2, &short)]));
    let both = work(&[(0, &long), (1, &[]), (2, &short)]);
    assert_eq!((both.linear, both.attention), (one.linear + other.linear, one.attention + other.attention));
}

#[test]
fn a_step_computes_two_experts_and_no_padding() {
    let decoder = plain();
    let c = decoder.config();
    let per_token = c.layers.len() * (c.dim * (2 * c.q_dim() + 2 * c.kv_dim()) + c.dim * 8 + 2 * 3 * c.dim * c.ffn_dim)
        + c.vocab * c.dim;
    for prompt in [1, 5, 8, 11, 16, 40] {
        let mut cache = Cache::new(c, 3, 64, DType::F32).unwrap();
        let ids: Vec<u32> = (0..prompt).map(|i| 4 + i * 7 % 100).collect();
        decoder.forward(&mut cache, &mut Scratch::default(), 1, &[&ids], Logits::None).unwrap();
        let mut scratch = Scratch::default();
        decoder.forward(&mut cache, &mut scratch, 1, &[&[9]], Logits::Last).unwrap();
        // The linear layers do not depend on the prompt's length, attention on nothing else.
        let keys = prompt as usize + 1;
        assert_eq!(scratch.work().linear, per_token as u64);
        assert_eq!(scratch.work().attention, (c.layers.len() * keys * 2 * c.head_dim * c.heads) as u64);
    }
}

/// Every weight follows from its tensor's name, so that the file can be checked without the script.
#[test]
fn the_file_is_the_scripts() {
    for t in writer().tensors {
        let part = t.name.split('.').rev().nth(1).unwrap();
        let scale = match part {
            "attn_v" | "attn_output" | "ffn_gate_exps" | "ffn_up_exps" => 1.0 / 32.0,
            _ => 1.0 / 16.0,
        };
        let offset = if t.extents.len() == 1 { 1.0 } else { 0.0 };
        let values = t.data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let want = original::integers(&t.name, t.data.len() / 4).map(|q| offset + q * scale);
        assert!(values.eq(want), "{}", t.name);
    }
}

#[test]
fn the_configuration_is_the_files() {
    let file = ModelFile::open(Path::new(FILE)).unwrap();
    let c = file.config();
    assert_eq!((c.dim, c.heads, c.kv_heads, c.head_dim, c.ffn_dim, c.layers.len()), (96, 12, 2, 8, 32, 2));
    let experts = c.experts.unwrap();
    assert_eq!((experts.count, experts.used, experts.normalized), (8, 2, false));
    assert_eq!((c.embedding_scale, c.attn_scale, c.logit_scale), (9.75, Some(0.3125), 0.59375));
    assert_eq!((c.attn_softcap, c.logit_softcap, c.ropes[0].pairing), (Some(30.0), None, Pairing::HalfSplit));
    let elements: usize = file.tensors().unwrap().iter().map(|t| t.shape.iter().product::<usize>()).sum();
    assert_eq!(c.parameters(), elements);
    assert_eq!(c.parameters() - c.active_parameters(), 2 * 6 * 3 * 96 * 32);

    // The constants of Grok-1 itself, which old files omit; and a cap on the output, which the architecture can have.
    let mut w = writer();
    for key in ["embedding_scale", "attention.output_scale", "logit_scale", "attn_logit_softcapping"] {
        w.unset(&format!("grok.{key}"));
    }
    w.set("grok.final_logit_softcapping", V::F32(50.0));
    let file = open(&w).unwrap();
    let c = file.config();
    assert_eq!((c.embedding_scale, c.attn_scale), (78.383_67, Some(0.088_388_35)));
    assert_eq!((c.logit_scale, c.attn_softcap, c.logit_softcap), (0.577_350_3, Some(30.0), Some(50.0)));
}

/// Each expert in a tensor of its own, and the last norm under its old name, as the first converters wrote it.
#[test]
fn old_files_are_read() {
    let mut w = writer();
    let mut tensors = Vec::new();
    for t in std::mem::take(&mut w.tensors) {
        if let Some(name) = t.name.strip_suffix("_exps.weight") {
            let bytes = t.data.len() / 8;
            for (i, data) in t.data.chunks(bytes).enumerate() {
                let (name, extents) = (format!("{name}.{i}.weight"), t.extents[..2].to_vec());
                tensors.push(T { name, extents, ty: 0, offset: None, data: data.to_vec() });
            }
        } else {
            tensors.push(T { name: t.name.replace("post_ffw_norm", "layer_output_norm"), ..t });
        }
    }
    w.tensors = tensors;
    same_logits(&open(&w).unwrap());
}

/// Bit for bit those of the file.
fn same_logits(file: &ModelFile) {
    let tokens = ids(&reference()["longest"]);
    let logits = |decoder: &Decoder| {
        let mut cache = Cache::new(decoder.config(), 1, tokens.len(), DType::F32).unwrap();
        decoder.forward(&mut cache, &mut Scratch::default(), 0, &[&tokens], Logits::All).unwrap()
    };
    assert!(logits(&decoder(file, 1)) == logits(&plain()));
}

/// The names of two conversions to safetensors.
#[test]
fn hugging_face_directories_are_read() {
    let config = |more: Value| {
        let mut config = json!({
            "vocab_size": 128, "hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "tie_word_embeddings": true, "bos_token_id": 1,
            "eos_token_id": 2, "embedding_multiplier_scale": 9.75, "attn_output_multiplier": 0.3125,
            "output_multiplier_scale": 0.59375,
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let original = [
        ("token_embd", "transformer.in_out_embed.weight"),
        ("output_norm", "transformer.rms_norm.weight"),
        ("attn_norm", "rms_norm.weight"),
        ("attn_q", "multi_head_attention.query.weight"),
        ("attn_k", "multi_head_attention.key.weight"),
        ("attn_v", "multi_head_attention.value.weight"),
        ("attn_output", "multi_head_attention.linear.weight"),
        ("attn_output_norm", "rms_norm_1.weight"),
        ("ffn_norm", "rms_norm_2.weight"),
        ("ffn_gate_inp", "router.weight"),
        ("ffn_gate_exps", "moe.{}.linear.weight"),
        ("ffn_up_exps", "moe.{}.linear_v.weight"),
        ("ffn_down_exps", "moe.{}.linear_1.weight"),
        ("post_ffw_norm", "rms_norm_3.weight"),
    ];
    let blocks = [
        ("token_embd", "model.embed_tokens.weight"),
        ("output_norm", "model.norm.scale"),
        ("attn_norm", "pre_attn_norm.scale"),
        ("attn_q", "attn.q_proj.weight"),
        ("attn_k", "attn.k_proj.weight"),
        ("attn_v", "attn.v_proj.weight"),
        ("attn_output", "attn.o_proj.weight"),
        ("attn_output_norm", "post_attn_norm.scale"),
        ("ffn_norm", "pre_moe_norm.scale"),
        ("ffn_gate_inp", "moe_block.gate.weight"),
        ("ffn_gate_exps", "moe_block.experts.{}.linear.weight"),
        ("ffn_up_exps", "moe_block.experts.{}.linear_v.weight"),
        ("ffn_down_exps", "moe_block.experts.{}.linear_1.weight"),
        ("post_ffw_norm", "post_moe_norm.scale"),
    ];
    for (names, layer, config) in [
        (
            original,
            "transformer.decoder_layer",
            config(json!({ "architectures": ["GrokForCausalLM"], "num_local_experts": 8, "hidden_act": "gelu" })),
        ),
        (
            blocks,
            "model.layers",
            config(json!({ "architectures": ["Grok1ModelForCausalLM"], "num_experts": 8, "max_attn_value": 30.0 })),
        ),
    ] {
        let dir = scratch_dir(&format!("grok_{layer}"));
        let mut tensors = Vec::new();
        for t in writer().tensors {
            let (prefix, part) = match t.name.strip_prefix("blk.") {
                Some(rest) => {
                    let (i, part) = rest.split_once('.').unwrap();
                    (format!("{layer}.{i}."), part.to_owned())
                }
                None => (String::new(), t.name.clone()),
            };
            let part = part.strip_suffix(".weight").unwrap();
            let (_, theirs) = names.iter().find(|(ours, _)| *ours == part).unwrap();
            let values: Vec<f32> = t.data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let shape: Vec<usize> = t.extents.iter().rev().map(|&n| n as usize).collect();
            if let Ok([experts, rows, cols]) = <[usize; 3]>::try_from(shape.as_slice()) {
                for (i, values) in values.chunks(rows * cols).enumerate() {
                    assert!(i < experts);
                    let name = format!("{prefix}{}", theirs.replace("{}", &i.to_string()));
                    tensors.push(Tensor { name, shape: vec![rows, cols], values: values.to_vec() });
                }
            } else {
                tensors.push(Tensor { name: format!("{prefix}{theirs}"), shape, values });
            }
        }
        write_hf(&dir, &config, &tensors);
        same_logits(&ModelFile::open(&dir).unwrap());

        let mut other = config.clone();
        other["num_experts_per_tok"] = json!(9);
        write_hf(&dir, &other, &tensors);
        let e = ModelFile::open(&dir).unwrap_err().to_string();
        assert!(e.contains("9 experts per token, but a layer has 8"), "{e}");
        other["num_experts_per_tok"] = json!(2);
        other["hidden_act"] = json!("relu");
        write_hf(&dir, &other, &tensors);
        let e = ModelFile::open(&dir).unwrap_err().to_string();
        assert!(e.contains("an activation other than GELU"), "{e}");
    }
}

#[test]
fn broken_files_get_a_sentence() {
    let spoilt = |spoil: &dyn Fn(&mut Writer)| {
        let mut w = writer();
        spoil(&mut w);
        open(&w).and_then(|file| file.weights(&|_, _| ()).map(|_| ())).unwrap_err().to_string()
    };
    let e = spoilt(&|w| _ = w.unset("grok.expert_used_count"));
    assert!(e.contains("grok.expert_used_count"), "{e}");
    let e = spoilt(&|w| _ = w.set("grok.expert_used_count", V::U32(0)));
    assert!(e.contains("number of experts per token is 0"), "{e}");
    let e = spoilt(&|w| _ = w.set("grok.expert_count", V::U32(u32::MAX)));
    assert!(e.contains("expert count is 4294967295"), "{e}");
    let e = spoilt(&|w| _ = w.set("grok.expert_count", V::U32(7)));
    assert!(e.contains("blk.0.ffn_gate_inp.weight") && e.contains("[8, 96]") && e.contains("[7, 96]"), "{e}");
    let e = spoilt(&|w| w.find("blk.1.ffn_up_exps.weight").extents = vec![96, 256]);
    assert!(e.contains("blk.1.ffn_up_exps.weight") && e.contains("[256, 96]"), "{e}");
    let e = spoilt(&|w| w.tensors.retain(|t| t.name != "blk.1.ffn_down_exps.weight"));
    assert!(e.contains("blk.1.ffn_down_exps.weight"), "{e}");
    // Without the stack, experts of their own are looked for.
    let e = spoilt(&|w| w.tensors.retain(|t| t.name != "blk.1.ffn_gate_exps.weight"));
    assert!(e.contains("blk.1.ffn_gate.0.weight"), "{e}");
    // No experts at all: the router has no place.
    let e = spoilt(&|w| _ = w.unset("grok.expert_count"));
    assert!(e.contains("ffn_gate.weight"), "{e}");
    let e = spoilt(&|w| _ = w.set("grok.logit_scale", V::F32(0.0)));
    assert!(e.contains("scale of the logits is 0"), "{e}");
    let e = spoilt(&|w| _ = w.set("grok.attention.temperature_length", V::U32(1024)));
    assert!(e.contains("1024 positions"), "{e}");
}

#[test]
fn the_command_line_runs_it() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_kvlane")).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let generate = ["generate", "--model", FILE, "--prompt", "the answer to life", "--max-tokens", "12"];
    let text = run(&generate);
    assert!(text.trim().len() > 6, "{text:?}");
    assert_eq!(text, run(&[&generate[..], &["--no-cache"]].concat()));
    let shown = run(&["inspect", FILE]);
    for part in ["each of 8 experts, 2 of them per token", "12 over 2 key/value heads of 8", "per token,"] {
        assert!(shown.contains(part), "{shown}");
    }
    let shown: Value = serde_json::from_str(&run(&["inspect", "--json", FILE])).unwrap();
    assert_eq!(shown["experts"], json!({ "count": 8, "used": 2, "normalized": false }));
}
