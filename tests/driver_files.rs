//! Hostile and broken model files: the result is a value or an error with a sentence, and memory stays bounded.
#![cfg(feature = "driver")]

mod gguf_writer;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use gguf_writer::{T, V, Writer, string, tiny_model};
use kvlane::driver::gguf::{Array, Gguf, Value};
use kvlane::driver::{ErrorKind, FeedForward, ModelFile, Result, Stretch, Tokenizer, Weights};
use kvlane::{Llama3Scaling, Pairing, RopeScaling};
use proptest::prelude::*;

/// Records the largest single allocation. The files here have a few kilobytes, which bounds what they may cause.
struct Watching;
static LARGEST: AtomicUsize = AtomicUsize::new(0);
const LIMIT: usize = 32 << 20;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's obligations are the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's obligations are the same.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: the caller's obligations are the same.
        unsafe { System.realloc(ptr, layout, size) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligations are the same.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

fn bounded() {
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < LIMIT, "a single allocation of {largest} bytes for a file of a few kilobytes");
}

/// Everything that the driver does with a file.
fn read_all(bytes: Vec<u8>) -> Result<(ModelFile, Tokenizer, Weights)> {
    let file = ModelFile::from_gguf(Gguf::from_bytes(bytes)?)?;
    file.tensors()?;
    let tokenizer = file.tokenizer()?;
    let ids = tokenizer.encode("abc ab </s>", true)?;
    tokenizer.decode(&ids)?;
    let weights = file.weights(&|_, _| ())?;
    Ok((file, tokenizer, weights))
}

/// The error of a file.
fn refusal(bytes: Vec<u8>) -> String {
    match read_all(bytes) {
        Ok(_) => panic!("the file was accepted"),
        Err(e) => {
            assert!(matches!(e.kind(), ErrorKind::Malformed | ErrorKind::Unsupported), "{:?}: {e}", e.kind());
            e.to_string()
        }
    }
}

fn spoilt(f: impl FnOnce(&mut Writer)) -> String {
    let mut w = tiny_model();
    f(&mut w);
    let message = refusal(w.bytes());
    bounded();
    message
}

fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not name {part:?}");
    }
}

#[test]
fn the_sound_file_is_read() {
    let (file, tokenizer, weights) = read_all(tiny_model().bytes()).unwrap();
    let c = file.config();
    assert_eq!((c.vocab, c.dim, c.layers.len(), c.heads, c.kv_heads, c.head_dim, c.ffn_dim), (8, 8, 1, 2, 1, 4, 12));
    assert_eq!((c.ropes[0].pairing, c.ropes[0].rotary_dim, c.ropes[0].base), (Pairing::Interleaved, 4, 10_000.0));
    assert_eq!((c.tied, c.bos, c.eos.as_slice(), c.context), (true, Some(0), &[1][..], 64));
    assert_eq!(tokenizer.encode("abc ab</s>b", true).unwrap(), [0, 6, 7, 5, 1, 3]);
    assert_eq!(tokenizer.decode(&[0, 6, 7, 5, 1, 3]).unwrap(), "abc abb");
    // Three matrices, one below another, each counting up from its own start.
    let qkv = &weights.layers[0].qkv;
    assert_eq!((qkv.rows(), qkv.cols()), (16, 8));
    assert_eq!((qkv.row(0)[0], qkv.row(7)[7], qkv.row(8)[0], qkv.row(12)[1]), (200.0, 263.0, 300.0, 401.0));
    let FeedForward::Dense(ffn) = &weights.layers[0].ffn else { panic!("one network") };
    assert_eq!((ffn.gate_up.row(12)[0], ffn.down.row(7)[11]), (800.0, 995.0));
    assert_eq!((weights.output_norm[7], weights.head().row(3)[2]), (1007.0, 26.0));
}

#[test]
fn progress_reaches_the_end() {
    let file = ModelFile::from_gguf(Gguf::from_bytes(tiny_model().bytes()).unwrap()).unwrap();
    let (most, total) = (AtomicUsize::new(0), AtomicUsize::new(0));
    file.weights(&|done, all| {
        most.fetch_max(done, Ordering::Relaxed);
        total.store(all, Ordering::Relaxed);
    })
    .unwrap();
    let bytes: usize = file.tensors().unwrap().iter().map(|t| t.bytes).sum();
    assert_eq!((most.into_inner(), total.into_inner()), (bytes, bytes));
}

#[test]
fn cut_at_every_byte() {
    let whole = tiny_model().bytes();
    for n in 0..whole.len() {
        assert!(read_all(whole[..n].to_vec()).is_err(), "accepted {n} of {} bytes", whole.len());
    }
    bounded();
}

#[test]
fn headers_out_of_range() {
    let version = |v| spoilt(|w| w.version = v);
    assert_names(&version(1), &["version 1"]);
    assert_names(&version(4), &["version 4"]);
    assert_names(&version(3u32.swap_bytes()), &["big-endian"]);
    assert_names(&refusal(b"GGML rather old".to_vec()), &["not a GGUF file"]);
    for n in [12, 1 << 20, 1 << 40, u64::MAX / 64, u64::MAX] {
        spoilt(|w| w.tensor_count = Some(n));
        spoilt(|w| w.pair_count = Some(n));
    }
    assert_names(&spoilt(|w| w.tensor_count = Some(1 << 40)), &["1099511627776 tensors", "bytes left hold at most"]);
    assert_names(&spoilt(|w| w.pair_count = Some(u64::MAX)), &["18446744073709551615 metadata pairs"]);
}

#[test]
fn metadata_out_of_range() {
    let raw = |ty: u32, parts: &[&[u8]]| {
        let body = parts.concat();
        spoilt(move |w| {
            w.set("x", V::Raw(ty, body));
        })
    };
    let (u32b, u64b) = (|v: u32| v.to_le_bytes(), |v: u64| v.to_le_bytes());
    assert_names(&raw(13, &[&[0; 8]]), &["\"x\"", "type 13"]);
    assert_names(&raw(7, &[&[2]]), &["bool", "2"]);
    for n in [1 << 32, u64::MAX / 8, u64::MAX - 7, u64::MAX] {
        assert_names(&raw(8, &[&u64b(n)]), &[&n.to_string(), "at most"]);
        for ty in 0..=12u32 {
            assert_names(&raw(9, &[&u32b(ty), &u64b(n)]), &[&n.to_string(), "at most"]);
        }
    }
    assert_names(&raw(9, &[&u32b(13), &u64b(1)]), &["array of type 13"]);
    assert_names(&raw(8, &[&u64b(2), &[0xc3, 0x28]]), &["UTF-8"]);
    // Arrays of arrays of arrays of ...
    let level = [u32b(9).as_slice(), &u64b(1)].concat();
    assert_names(&raw(9, &[&level.repeat(1000)]), &["nests"]);

    assert_names(&spoilt(|w| w.pairs.push(("general.name".into(), V::U32(0)))), &["general.name", "twice"]);
    assert_names(&spoilt(|w| w.pairs.push((String::new(), V::U32(0)))), &["0 bytes"]);
    for v in [V::U32(0), V::U32(24), V::U64(u64::MAX), V::Str("32".into())] {
        assert_names(
            &spoilt(|w| {
                w.set("general.alignment", v);
            }),
            &["alignment"],
        );
    }
    spoilt(|w| {
        w.set("general.alignment", V::U64(1 << 63));
    });
}

#[test]
fn metadata_of_every_type() {
    let mut w = Writer::new();
    let nested = [&[9u8, 0, 0, 0][..], &1u64.to_le_bytes(), &[0, 0, 0, 0], &2u64.to_le_bytes(), &[7, 8]].concat();
    w.set("i8", V::Raw(1, vec![0xff]))
        .set("u16", V::Raw(2, vec![1, 2]))
        .set("f64", V::Raw(12, 0.5f64.to_le_bytes().to_vec()))
        .set("i64", V::Raw(11, (-3i64).to_le_bytes().to_vec()))
        .set("nested", V::Raw(9, nested))
        .set("general.alignment", V::U32(64));
    let g = Gguf::from_bytes(w.bytes()).unwrap();
    assert_eq!(g.metadata()["i8"], Value::Signed(-1));
    assert_eq!(g.metadata()["u16"], Value::Unsigned(513));
    assert_eq!(g.metadata()["f64"], Value::Float(0.5));
    assert_eq!(g.metadata()["i64"], Value::Signed(-3));
    assert_eq!(g.metadata()["nested"], Value::Array(Array::Array(vec![Array::U8(vec![7, 8])])));
    assert!(g.opt_usize("i8").is_err() && g.str("u16").is_err() && g.usize("none").is_err());
}

#[test]
fn tensors_out_of_range() {
    let tensor = |f: &dyn Fn(&mut T)| spoilt(|w| f(w.find("blk.0.attn_q.weight")));
    assert_names(&tensor(&|t| t.extents = vec![]), &["attn_q", "rank 0"]);
    assert_names(&tensor(&|t| t.extents = vec![1; 5]), &["rank 5"]);
    assert_names(&tensor(&|t| t.extents = vec![8, 0]), &["extent of 0"]);
    assert_names(&tensor(&|t| t.extents = vec![1 << 40, 1 << 40]), &["extent"]);
    tensor(&|t| t.extents = vec![1 << 62]);
    tensor(&|t| t.extents = vec![u64::MAX, 1]);
    assert_names(&tensor(&|t| t.extents = vec![8, 4096]), &["file has"]);
    assert_names(&tensor(&|t| t.ty = 16), &["ggml type 16"]);
    assert_names(&tensor(&|t| t.ty = 8), &["rows of 8", "32", "Q8_0"]);
    assert_names(&tensor(&|t| t.offset = Some(4)), &["offset 4", "32"]);
    assert_names(&tensor(&|t| t.offset = Some(u64::MAX - 31)), &["overflows"]);
    assert_names(&tensor(&|t| t.offset = Some(1 << 50)), &["file has"]);
    assert_names(&tensor(&|t| t.offset = Some(0)), &["overlap", "token_embd"]);
    assert_names(&tensor(&|t| t.name = "token_embd.weight".into()), &["token_embd.weight", "twice"]);
    // A thousand tensors over the same bytes would unpack to a thousand times the file.
    let message = spoilt(|w| {
        for i in 0..1000 {
            w.tensors.push(T { name: format!("t{i}"), extents: vec![64], ty: 0, offset: Some(0), data: vec![] });
        }
    });
    assert_names(&message, &["overlap"]);
}

#[test]
fn models_that_cannot_be() {
    let set = |key: &str, v: V| {
        spoilt(|w| {
            w.set(key, v);
        })
    };
    assert_names(&set("general.architecture", V::Str("gpt2".into())), &["\"gpt2\""]);
    assert_names(&set("llama.attention.head_count_kv", V::U32(0)), &["key/value head count is 0"]);
    assert_names(&set("llama.attention.head_count", V::U32(0)), &["head_count is 0"]);
    assert_names(&set("llama.attention.head_count", V::U32(3)), &["8", "3 heads"]);
    assert_names(&set("llama.attention.head_count_kv", V::U32(3)), &["2 query heads", "3"]);
    assert_names(&set("llama.attention.value_length", V::U32(2)), &["2", "4"]);
    assert_names(&set("llama.attention.key_length", V::U32(6)), &["attn_q", "[8, 8]", "[12, 8]"]);
    assert_names(&set("llama.block_count", V::U32(2)), &["blk.1.attn_norm.weight", "missing"]);
    assert_names(&set("llama.block_count", V::U64(u64::MAX)), &["layer count"]);
    set("llama.block_count", V::U64(1 << 20));
    assert_names(&set("llama.embedding_length", V::U64(1 << 60)), &["embedding length"]);
    assert_names(&set("llama.feed_forward_length", V::U32(13)), &["ffn_gate", "[12, 8]", "[13, 8]"]);
    assert_names(&set("llama.rope.dimension_count", V::U32(3)), &["rotary_dim is 3"]);
    assert_names(&set("llama.rope.dimension_count", V::U32(6)), &["RoPE turns 6", "4"]);
    assert_names(&set("llama.rope.freq_base", V::F32(f32::NAN)), &["base"]);
    assert_names(&set("llama.expert_count", V::U32(8)), &["8 experts"]);
    assert_names(&set("llama.rope.scaling.type", V::Str("yarn".into())), &["scaling.factor"]);
    assert_names(&set("llama.rope.scaling.type", V::Str("warp".into())), &["\"warp\""]);
    assert_names(&set("llama.embedding_length", V::Str("8".into())), &["embedding_length", "a string"]);
    assert_names(&set("tokenizer.ggml.eos_token_id", V::U32(8)), &["token id 8", "8"]);
    assert_names(
        &spoilt(|w| {
            w.unset("llama.embedding_length");
        }),
        &["embedding_length", "missing"],
    );
    assert_names(
        &spoilt(|w| {
            w.tensor("blk.0.attn_q.bias", &[8], 0.0);
        }),
        &["attn_q.bias", "no place"],
    );
    assert_names(
        &spoilt(|w| {
            w.tensor("rope_freqs.weight", &[3], 1.0);
        }),
        &["3 entries", "2 pairs"],
    );
    assert_names(&spoilt(|w| w.tensors.retain(|t| t.name != "output_norm.weight")), &["output_norm", "missing"]);
}

#[test]
fn rope_scaling_is_read() {
    let scaling = |f: &dyn Fn(&mut Writer)| {
        let mut w = tiny_model();
        f(&mut w);
        let (file, ..) = read_all(w.bytes()).unwrap();
        file.config().ropes[0].stretch.clone()
    };
    assert_eq!(scaling(&|_| ()), Stretch::Fixed(RopeScaling::None));
    let linear = |w: &mut Writer| {
        w.set("llama.rope.scaling.type", V::Str("linear".into())).set("llama.rope.scaling.factor", V::F32(2.0));
    };
    assert_eq!(scaling(&linear), Stretch::Fixed(RopeScaling::Linear { factor: 2.0 }));
    let divisors = |w: &mut Writer| {
        w.tensor("rope_freqs.weight", &[2], 1.0);
    };
    assert_eq!(scaling(&divisors), Stretch::Divisors(vec![1.0, 2.0]));
}

#[test]
fn tokenizers_that_cannot_be() {
    let strings = |s: &[&str]| V::Strs(s.iter().map(|s| (*s).to_owned()).collect());
    let set = |key: &str, v: V| {
        spoilt(|w| {
            w.set(key, v);
        })
    };
    let tokens = "tokenizer.ggml.tokens";
    assert_names(&set("tokenizer.ggml.model", V::Str("bert".into())), &["\"bert\""]);
    assert_names(&set("tokenizer.ggml.pre", V::Str("falcon".into())), &["\"falcon\"", "smollm"]);
    assert_names(&set(tokens, strings(&["<s>", "</s>", "a", "b", "c", "ab", "abc", "a"])), &["\"a\"", "2 and 7"]);
    assert_names(&set(tokens, strings(&["x"; 9])), &["9 tokens", "8 rows"]);
    assert_names(&set("tokenizer.ggml.token_type", V::I32s(vec![1; 7])), &["8 signed", "7"]);
    assert_names(&set("tokenizer.ggml.merges", strings(&["ab"])), &["\"ab\"", "no space"]);
    // The joined token would be longer than every token of the vocabulary.
    assert_names(&set("tokenizer.ggml.merges", strings(&["abc abc"])), &["\"abcabc\"", "missing"]);
    assert_names(&set("tokenizer.ggml.merges", strings(&["a z"])), &["\"z\"", "missing"]);
    assert_names(&set("tokenizer.ggml.merges", V::U32(1)), &["merges", "an unsigned integer"]);
    assert_names(
        &spoilt(|w| {
            w.unset("tokenizer.ggml.bos_token_id");
        }),
        &["add_bos_token", "None"],
    );

    let spm = |f: &dyn Fn(&mut Writer)| {
        spoilt(|w| {
            w.set("tokenizer.ggml.model", V::Str("llama".into()));
            f(w);
        })
    };
    assert_names(&spm(&|_| ()), &["scores", "8 floats"]);
    assert_names(
        &spm(&|w| {
            w.set("tokenizer.ggml.scores", V::F32s(vec![0.0; 9]));
        }),
        &["8 floats"],
    );
    assert_names(
        &spm(&|w| {
            w.set("tokenizer.ggml.scores", V::F32s(vec![f32::NAN; 8]));
        }),
        &["NaN"],
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Flips bytes anywhere, more often in the header, which has the structure.
    #[test]
    fn flipped_bytes(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..8)) {
        let mut bytes = tiny_model().bytes();
        let header = bytes.len() - 8 * 11 * 16;
        for (at, value, place) in flips {
            let i = if place == 0 { at.index(bytes.len()) } else { at.index(header) };
            bytes[i] = value;
        }
        let _ = read_all(bytes);
        bounded();
    }

    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..512), keep in 0usize..32) {
        let mut file = tiny_model().bytes();
        let keep = keep.min(file.len());
        file.truncate(keep);
        file.extend(bytes);
        prop_assert!(read_all(file).is_err());
        bounded();
    }
}

/// A temporary directory of one test.
fn directory(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

const HF_CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": true,
    "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": [1, 2]
}"#;

const HF_TOKENIZER: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
    "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                      "normalized": false, "special": true}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
              "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
              "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "abc": 6, "Ġ": 7},
              "merges": ["a b", "ab c"]}
}"#;

fn hf_tensors() -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let layer = |part: &str| format!("model.layers.0.{part}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![8, 8]),
        (layer("input_layernorm"), vec![8]),
        (layer("self_attn.q_proj"), vec![8, 8]),
        (layer("self_attn.k_proj"), vec![4, 8]),
        (layer("self_attn.v_proj"), vec![4, 8]),
        (layer("self_attn.o_proj"), vec![8, 8]),
        (layer("post_attention_layernorm"), vec![8]),
        (layer("mlp.gate_proj"), vec![12, 8]),
        (layer("mlp.up_proj"), vec![12, 8]),
        (layer("mlp.down_proj"), vec![8, 12]),
        ("model.norm.weight".to_owned(), vec![8]),
    ];
    let number = |i: usize, j: usize| half::bf16::from_f32((i * 128 + j % 128) as f32);
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let n: usize = shape.iter().product();
        (name, shape, (0..n).flat_map(|j| number(i, j).to_le_bytes()).collect())
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

fn safetensors(tensors: &[(String, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let view = |shape: &Vec<usize>, data| {
        safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), data).unwrap()
    };
    safetensors::serialize(tensors.iter().map(|(n, s, d)| (n, view(s, d))), None).unwrap()
}

fn hf_directory(name: &str) -> PathBuf {
    let dir = directory(name);
    std::fs::write(dir.join("config.json"), HF_CONFIG).unwrap();
    std::fs::write(dir.join("tokenizer.json"), HF_TOKENIZER).unwrap();
    std::fs::write(dir.join("model.safetensors"), safetensors(&hf_tensors())).unwrap();
    dir
}

fn read_directory(dir: &Path) -> Result<(ModelFile, Tokenizer, Weights)> {
    let file = ModelFile::open(dir)?;
    file.tensors()?;
    let tokenizer = file.tokenizer()?;
    let weights = file.weights(&|_, _| ())?;
    Ok((file, tokenizer, weights))
}

fn spoilt_directory(name: &str, f: impl FnOnce(&Path)) -> String {
    let dir = hf_directory(name);
    f(&dir);
    read_directory(&dir).expect_err("the directory was accepted").to_string()
}

#[test]
fn hf_directory_is_read() {
    let dir = hf_directory("hf-whole");
    let (file, tokenizer, weights) = read_directory(&dir).unwrap();
    let c = file.config();
    assert_eq!((c.ropes[0].pairing, c.head_dim, c.eos.as_slice(), c.tied), (Pairing::HalfSplit, 4, &[1, 2][..], true));
    assert_eq!(tokenizer.encode("abc ab<s>", true).unwrap(), [6, 7, 5, 0]);
    let check = |w: &Weights| {
        assert_eq!((w.layers[0].qkv.row(0)[0], w.layers[0].qkv.row(8)[0], w.output_norm[0]), (256.0, 384.0, 1280.0));
    };
    check(&weights);

    // The same weights in two shards.
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let tensors = hf_tensors();
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.safetensors", &tensors[..5]), ("b.safetensors", &tensors[5..])] {
        std::fs::write(dir.join(file), safetensors(part)).unwrap();
        part.iter().for_each(|(n, ..)| drop(map.insert(n.clone(), file.into())));
    }
    let index = dir.join("model.safetensors.index.json");
    std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    check(&read_directory(&dir).unwrap().2);

    // An index that names a file outside its directory, and one that names the wrong shard.
    map.insert("model.norm.weight".into(), "../b.safetensors".into());
    std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    assert_names(&read_directory(&dir).unwrap_err().to_string(), &["../b.safetensors", "plain file name"]);
    map.insert("model.norm.weight".into(), "a.safetensors".into());
    std::fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    assert_names(&read_directory(&dir).unwrap_err().to_string(), &["model.norm.weight", "a.safetensors"]);
}

#[test]
fn hf_directories_that_cannot_be() {
    let edit = |name: &str, file: &str, from: &str, to: &str| {
        spoilt_directory(name, |dir| {
            let path = dir.join(file);
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{from:?}");
            std::fs::write(path, text.replacen(from, to, 1)).unwrap();
        })
    };
    let config = |name: &str, from: &str, to: &str| edit(name, "config.json", from, to);
    assert_names(&config("hf-arch", "LlamaFor", "GemmaFor"), &["GemmaForCausalLM"]);
    assert_names(&config("hf-act", "silu", "gelu"), &["SiLU"]);
    assert_names(&config("hf-vocab", "\"vocab_size\": 8", "\"vocab_size\": 9"), &["[8, 8]", "[9, 8]"]);
    assert_names(&config("hf-json", "\"vocab_size\"", "\"vocab_siz\""), &["config.json", "vocab_size"]);
    assert_names(&config("hf-heads", "_heads\": 2", "_heads\": 0"), &["num_attention_heads is 0"]);
    let scaled = config("hf-rope", "null", r#"{"rope_type": "llama3", "factor": 8.0}"#);
    assert_names(&scaled, &["low_freq_factor"]);
    assert_names(&config("hf-eos", "[1, 2]", "[1, 8]"), &["token id 8"]);
    assert_names(&edit("hf-merge", "tokenizer.json", "\"ab c\"", "\"abc abc\""), &["abcabc", "missing"]);
    assert_names(&edit("hf-merges", "tokenizer.json", "\"ab c\"", "7"), &["7 is no merge"]);
    let gone = |name: &str, file: &str| spoilt_directory(name, |dir| std::fs::remove_file(dir.join(file)).unwrap());
    for (name, file) in [("hf-1", "config.json"), ("hf-2", "tokenizer.json"), ("hf-3", "model.safetensors")] {
        assert_names(&gone(name, file), &[file]);
    }
}

#[test]
fn hf_rope_scaling_is_read() {
    let scaling = |name: &str, json: &str| {
        let dir = hf_directory(name);
        std::fs::write(dir.join("config.json"), HF_CONFIG.replacen("null", json, 1)).unwrap();
        ModelFile::open(&dir).unwrap().config().ropes[0].stretch.clone()
    };
    assert_eq!(
        scaling(
            "rope-llama3",
            r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}"#
        ),
        Stretch::Fixed(Llama3Scaling::new(8.0, 8192.0).low_freq_factor(1.0).high_freq_factor(4.0).into())
    );
    assert_eq!(
        scaling("rope-linear", r#"{"type": "linear", "factor": 4.0}"#),
        Stretch::Fixed(RopeScaling::Linear { factor: 4.0 })
    );
    let Stretch::Fixed(RopeScaling::Yarn(yarn)) =
        scaling("rope-yarn", r#"{"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}"#)
    else {
        panic!("not YaRN")
    };
    assert_eq!((yarn.factor, yarn.original_max_position, yarn.beta_fast), (2.0, 64.0, 16.0));
    let long = r#"{"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}"#;
    assert!(matches!(scaling("rope-long", long), Stretch::LongRope { long, .. } if long == [2.0, 3.0]));
}

#[test]
fn hf_files_cut_short() {
    let dir = hf_directory("hf-cut");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let path = dir.join(file);
        let whole = std::fs::read(&path).unwrap();
        for n in (0..whole.len()).step_by(7) {
            std::fs::write(&path, &whole[..n]).unwrap();
            assert!(read_directory(&dir).is_err(), "accepted {n} of {} bytes of {file}", whole.len());
        }
        std::fs::write(&path, whole).unwrap();
    }
    bounded();
}

#[test]
fn missing_files_are_named() {
    let error = ModelFile::open(Path::new("/nowhere/model.gguf")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_names(&error.to_string(), &["/nowhere/model.gguf"]);
    let empty = directory("empty").join("empty.gguf");
    std::fs::write(&empty, "").unwrap();
    assert_names(&ModelFile::open(&empty).unwrap_err().to_string(), &["empty.gguf", "is empty"]);
}

#[test]
fn sentence_piece_from_scores() {
    let mut w = tiny_model();
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
    let words = ["▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "▁ab", "é"];
    let scores_of_words = [-10.0, -11.0, -12.0, -13.0, -2.0, -1.0, -3.0, -4.0, -5.0, -14.0f32];
    tokens.extend(words.map(str::to_owned));
    let n = tokens.len();
    let mut scores = vec![0.0; n - words.len()];
    scores.extend(scores_of_words);
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 10]);
    w.set("tokenizer.ggml.model", V::Str("llama".into()))
        .set("tokenizer.ggml.tokens", V::Strs(tokens.clone()))
        .set("tokenizer.ggml.scores", V::F32s(scores))
        .set("tokenizer.ggml.token_type", V::I32s(types))
        .set("tokenizer.ggml.bos_token_id", V::U32(1))
        .set("tokenizer.ggml.eos_token_id", V::U32(2))
        .unset("tokenizer.ggml.add_bos_token")
        .unset("tokenizer.ggml.merges");
    let embedding = w.find("token_embd.weight");
    embedding.extents = vec![8, n as u64];
    embedding.data = vec![0; 8 * n * 4];
    let (_, tokenizer, _) = read_all(w.bytes()).unwrap();

    let spell = |text: &str| -> Vec<String> {
        tokenizer.encode(text, true).unwrap().iter().map(|&id| tokens[id as usize].clone()).collect()
    };
    // "bc" has the best score, so that "ab" cannot form; a start token and a space precede the text.
    assert_eq!(spell("abc"), ["<s>", "▁a", "bc"]);
    assert_eq!(spell("ab"), ["<s>", "▁ab"]);
    assert_eq!(spell("é</s>a"), ["<s>", "▁", "é", "</s>", "▁a"]);
    // Without a token for the euro sign, its bytes.
    assert_eq!(spell("€"), ["<s>", "▁", "<0xE2>", "<0x82>", "<0xAC>"]);
    for text in ["abc", "a b  c", "€ é", "ab\ncab"] {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        let mut stream = tokenizer.stream();
        let mut out = String::new();
        for id in ids {
            out += &stream.push(id).unwrap();
        }
        assert_eq!(out + &stream.finish().unwrap(), text);
    }
    // Half of a character is held back until the end, and becomes a replacement character.
    let mut stream = tokenizer.stream();
    let bytes = tokenizer.encode("€", false).unwrap();
    assert_eq!(stream.push(tokenizer.id("a").unwrap()).unwrap(), "a");
    assert_eq!(stream.push(bytes[1]).unwrap(), "");
    assert_eq!(stream.push(bytes[2]).unwrap(), "");
    assert!(stream.finish().unwrap().contains('\u{fffd}'));
}

#[test]
fn strings_in_files_are_what_the_writer_thinks() {
    assert_eq!(string("ab"), [2, 0, 0, 0, 0, 0, 0, 0, b'a', b'b']);
}

#[test]
fn a_text_is_neither_cut_nor_padded() {
    let with = |from: &str, to: &str| {
        let json = HF_TOKENIZER.replacen(from, to, 1);
        assert_ne!(json, HF_TOKENIZER);
        Tokenizer::from_json(json.as_bytes()).unwrap().encode("abc ab<s>", true).unwrap()
    };
    let cut = r#""truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}"#;
    assert_eq!(with(r#""truncation": null"#, cut), [6, 7, 5, 0]);
    let padded = r#""padding": {"strategy": {"Fixed": 1000000000000}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}"#;
    assert_eq!(with(r#""padding": null"#, padded), [6, 7, 5, 0]);
    bounded();
}

/// Tensors of several block types, all zero.
fn quantised_model() -> Writer {
    let mut w = tiny_model();
    w.set("llama.embedding_length", V::U32(32)).set("llama.feed_forward_length", V::U32(32));
    w.tensors.clear();
    // 8 tokens; 2 query heads and 1 key/value head of 16.
    for (name, rows, ty, block_bytes) in [
        ("token_embd", 8, 8, 34),
        ("blk.0.attn_q", 32, 2, 18),
        ("blk.0.attn_k", 16, 3, 20),
        ("blk.0.attn_v", 16, 6, 22),
        ("blk.0.attn_output", 32, 7, 24),
        ("blk.0.ffn_gate", 32, 1, 2 * 32),
        ("blk.0.ffn_up", 32, 30, 2 * 32),
        ("blk.0.ffn_down", 32, 8, 34),
    ] {
        let (name, extents) = (format!("{name}.weight"), vec![32, rows as u64]);
        w.tensors.push(T { name, extents, ty, offset: None, data: vec![0; rows * block_bytes] });
    }
    for name in ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"] {
        w.tensor(name, &[32], 0.0);
    }
    w
}

/// A vocabulary with scores instead of merges.
fn scored_model() -> Writer {
    let mut w = tiny_model();
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a"];
    w.set("tokenizer.ggml.model", V::Str("llama".into()))
        .set("tokenizer.ggml.tokens", V::Strs(tokens.map(str::to_owned).to_vec()))
        .set("tokenizer.ggml.scores", V::F32s(vec![0.0, 0.0, 0.0, -10.0, -11.0, -12.0, -2.0, -1.0]))
        .set("tokenizer.ggml.token_type", V::I32s(vec![2, 3, 3, 1, 1, 1, 1, 1]))
        .set("tokenizer.ggml.bos_token_id", V::U32(1))
        .set("tokenizer.ggml.eos_token_id", V::U32(2))
        .unset("tokenizer.ggml.merges");
    w
}

const UNIGRAM_TOKENIZER: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"</s>": {"id": "</s>", "ids": [1],
        "tokens": ["</s>"]}}},
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
    "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
              "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["▁", -2.0], ["a", -3.0], ["b", -4.0], ["ab", -2.5]]}
}"#;

const WORD_PIECE_TOKENIZER: &str = r###"{
    "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
    "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                   "lowercase": true},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "\\s+"},
        "behavior": "Removed", "invert": false}, {"type": "Punctuation", "behavior": "Isolated"}]},
    "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
              "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##b": 2, "##c": 3, "ab": 4}}
}"###;

/// The seeds of the coverage-guided fuzz targets are valid, and equal to the files of these tests.
/// `KVLANE_WRITE_SEEDS` writes them.
#[test]
fn fuzzing_starts_from_sound_files() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/seeds");
    // The first byte selects the file of the directory.
    let chosen = |file: u8, contents: &[u8]| [&[file], contents].concat();
    let map: serde_json::Map<_, _> =
        hf_tensors().iter().map(|(name, ..)| (name.clone(), "model.safetensors".into())).collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    let files = [
        ("gguf/byte_level", tiny_model().bytes()),
        ("gguf/quantised", quantised_model().bytes()),
        ("gguf/scored", scored_model().bytes()),
        ("safetensors/tensors", chosen(0, &safetensors(&hf_tensors()))),
        ("safetensors/config", chosen(1, HF_CONFIG.as_bytes())),
        ("safetensors/index", chosen(2, index.as_bytes())),
        ("safetensors/generation", chosen(3, br#"{"eos_token_id": [1, 2]}"#)),
        ("safetensors/chat", chosen(4, br#"{"chat_template": "{{ text }}"}"#)),
        ("tokenizer/byte_level", HF_TOKENIZER.as_bytes().to_vec()),
        ("tokenizer/unigram", UNIGRAM_TOKENIZER.as_bytes().to_vec()),
        ("tokenizer/word_piece", WORD_PIECE_TOKENIZER.as_bytes().to_vec()),
    ];
    let names = ["model.safetensors", "config.json", "model.safetensors.index.json", "generation_config.json"];
    for (name, bytes) in &files {
        let path = seeds.join(name);
        if std::env::var_os("KVLANE_WRITE_SEEDS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, bytes).unwrap();
        }
        assert!(
            std::fs::read(&path).unwrap() == *bytes,
            "{name} is not what the test makes; KVLANE_WRITE_SEEDS=1 writes it"
        );
        match name.split_once('/').unwrap().0 {
            "gguf" => drop(read_all(bytes.clone()).unwrap_or_else(|e| panic!("{name}: {e}"))),
            "safetensors" => {
                let dir = hf_directory("fuzz-seed");
                let file = names.get(usize::from(bytes[0])).unwrap_or(&"tokenizer_config.json");
                std::fs::write(dir.join(file), &bytes[1..]).unwrap();
                read_directory(&dir).unwrap_or_else(|e| panic!("{name}: {e}"));
            }
            _ => {
                let tokenizer = Tokenizer::from_json(bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(!tokenizer.encode("ab", true).unwrap().is_empty(), "{name}");
            }
        }
    }
}
