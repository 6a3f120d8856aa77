//! The command line from the outside: output streams and exit codes.
#![cfg(feature = "driver")]

use std::process::{Command, Output, Stdio};

fn kvlane(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvlane")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn stdout(args: &[&str]) -> String {
    let out = kvlane(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&stdout(&[args, &["--json"]].concat())).unwrap()
}

#[test]
fn generate_writes_text_and_nothing_else() {
    let args = ["generate", "--max-tokens", "24", "--temperature", "0", "--prompt", "And it came to pass"];
    let out = kvlane(&args);
    let (text, notes) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert!(out.status.success());
    assert!(text.len() > 24 && !text.contains("tokens/s") && !text.contains('\u{1b}'), "{text:?}");
    for part in ["prefill", "decode", "tokens/s", "kernels: rope_angles_", "attention_f32_"] {
        assert!(notes.contains(part), "{notes:?} lacks {part:?}");
    }
    // Without a terminal there is no progress bar.
    assert!(!notes.contains('\u{1b}') && !notes.contains('\r'), "{notes:?}");

    let object = json(&args);
    assert_eq!(object["text"], text);
    assert_eq!(object["ids"].as_array().unwrap().len(), 24);
    assert_eq!((object["finish"].as_str(), object["cached"].as_bool()), (Some("max_tokens"), Some(true)));
    // The text is the same without the cache.
    assert_eq!(stdout(&[&args[..], &["--no-cache"]].concat()), text);
}

#[test]
fn a_window_streams_past_the_context() {
    let args = ["generate", "--temperature", "0", "--prompt", "And God said", "--window", "48", "--sinks", "2"];
    let short = json(&[&args[..], &["--max-tokens", "30"]].concat());
    let long = json(&[&args[..], &["--max-tokens", "180"]].concat());
    assert_eq!((short["evicted"].as_u64(), long["finish"].as_str()), (Some(0), Some("max_tokens")));
    assert_eq!(long["ids"].as_array().unwrap().len(), 180);
    assert!(long["evicted"].as_u64().unwrap() > 100 && short["cache_bytes"] == long["cache_bytes"]);
    let text = |object: &serde_json::Value| object["text"].as_str().unwrap().to_owned();
    assert!(text(&long).starts_with(&text(&short)));
    // Until the first token is forgotten, the text is that without a window.
    assert_eq!(text(&short), text(&json(&[&args[..5], &["--max-tokens", "30"]].concat())));
    // A prompt may be longer than the context.
    let prompt = "word ".repeat(600);
    let past = json(&["generate", "--prompt", &prompt, "--window", "256", "--max-tokens", "3"]);
    assert!(past["prompt_ids"].as_array().unwrap().len() > 512 && past["evicted"].as_u64().unwrap() > 0);
}

#[test]
fn one_seed_one_text() {
    let with = |more: &[&str]| stdout(&[&["generate", "--max-tokens", "20"], more].concat());
    assert_eq!(with(&["--seed", "5"]), with(&["--seed", "5", "--threads", "1"]));
    assert_ne!(with(&["--seed", "5"]), with(&["--seed", "6"]));
    assert_eq!(with(&["--seed", "5", "--top-k", "1"]), with(&["--temperature", "0"]));
    assert!(!with(&["--kv-type", "bf16", "--isa", "scalar", "--top-p", "0.5"]).is_empty());
}

#[test]
fn keys_and_values_have_formats_of_their_own() {
    let args = ["generate", "--temperature", "0", "--prompt", "And God said", "--max-tokens", "12"];
    let with = |more: &[&str]| json(&[&args[..], more].concat());
    let (exact, int8) = (with(&[]), with(&["--kv-type", "int8"]));
    assert_eq!((int8["k_type"].as_str(), int8["v_type"].as_str()), (Some("int8"), Some("int8")));
    assert_eq!(int8["ids"], exact["ids"]);
    // A head of 32 elements: 128 bytes in f32, 32 and a scale of 4 in int8.
    assert_eq!(int8["cache_bytes"].as_u64().unwrap() * 128, exact["cache_bytes"].as_u64().unwrap() * 36);
    let mixed = with(&["--kv-type", "bf16", "--k-type", "int8", "--isa", "scalar"]);
    assert_eq!((mixed["k_type"].as_str(), mixed["v_type"].as_str()), (Some("int8"), Some("bf16")));
    let ran: Vec<&str> = mixed["kernels"].as_array().unwrap().iter().map(|k| k.as_str().unwrap()).collect();
    for name in
        ["attention_int8_scalar", "attention_bf16_scalar", "kv_write_f32_int8_scalar", "kv_write_f32_bf16_scalar"]
    {
        assert!(ran.contains(&name), "{name} is not one of {ran:?}");
    }
    let window = ["generate", "--kv-type", "int8", "--window", "48", "--max-tokens", "150"];
    assert!(json(&window)["evicted"].as_u64().unwrap() > 0);
    let refused = Command::new(env!("CARGO_BIN_EXE_kvlane")).args(["generate", "--v-type", "int4"]).output().unwrap();
    let sentence = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && sentence.contains("'int4'") && sentence.contains("bf16, int8"), "{sentence}");
}

#[test]
fn a_prompt_comes_from_standard_input() {
    use std::io::Write;
    let args = ["generate", "--max-tokens", "8", "--temperature", "0"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvlane"))
        .args(args)
        .args(["--prompt", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"The LORD").unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(out.stdout).unwrap(), stdout(&[&args[..], &["--prompt", "The LORD"]].concat()));
}

#[test]
fn a_level_can_be_forced() {
    let chosen = |args: &[&str]| json(args)["isa"].as_str().unwrap().to_owned();
    assert_eq!(chosen(&["info", "--isa", "scalar"]), "scalar");
    let lowered = Command::new(env!("CARGO_BIN_EXE_kvlane"))
        .args(["info", "--json"])
        .env("KVLANE_MAX_ISA", "scalar")
        .output()
        .unwrap();
    assert!(String::from_utf8(lowered.stdout).unwrap().contains("\"isa\": \"scalar\""));
    let generated = json(&["generate", "--max-tokens", "2", "--isa", "scalar"]);
    assert!(generated["kernels"].as_array().unwrap().iter().all(|k| k.as_str().unwrap().ends_with("_scalar")));
}

#[test]
fn info_shows_every_operation() {
    let (text, object) = (stdout(&["info"]), json(&["info"]));
    for op in kvlane::Op::ALL {
        assert!(text.contains(op.name()));
        assert!(object["chosen"].as_array().unwrap().iter().any(|k| k["op"] == op.name()), "{}", op.name());
    }
}

#[test]
fn inspect_shows_the_shape() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/driver/tiny/tiny.gguf");
    let text = stdout(&["inspect", path]);
    assert!(text.contains("6 over 2 key/value heads of 32") && text.contains("Q8_0"), "{text}");
    let object = json(&["inspect", path]);
    assert_eq!((object["heads"].as_u64(), object["kv_heads"].as_u64()), (Some(6), Some(2)));
    assert_eq!(object["tensors"][0]["name"], "token_embd.weight");
}

#[test]
fn cache_cost_measures_both() {
    let object = json(&["cache-cost", "--max-context", "40", "--threads", "1"]);
    let points = object["points"].as_array().unwrap();
    let contexts: Vec<u64> = points.iter().map(|p| p["context"].as_u64().unwrap()).collect();
    assert_eq!(contexts, [16, 32, 40]);
    // One token more than the longest context, in four layers of two heads of 32.
    assert_eq!(object["cache_bytes"].as_u64(), Some(41 * 4 * 2 * (2 * 32) * 4));
    assert!(
        points.iter().all(|p| p["cached_ms"].as_f64().unwrap() > 0.0 && p["recomputed_ms"].as_f64().unwrap() > 0.0)
    );
    assert!(stdout(&["cache-cost", "--max-context", "16"]).starts_with("| context (tokens) |"));
}

#[test]
fn complaints_are_sentences_on_standard_error() {
    let cases: [(&[&str], i32, &str); 12] = [
        (&["generate", "--model", "/nowhere.gguf"], 1, "/nowhere.gguf"),
        (&["generate", "--model", env!("CARGO_MANIFEST_DIR")], 1, "config.json"),
        (&["inspect", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")], 1, "not a GGUF file"),
        (&["generate", "--max-tokens", "0"], 1, "0 tokens"),
        (&["generate", "--prompt", ""], 1, "no tokens"),
        (&["generate", "--temperature=-1"], 1, "temperature is -1"),
        (&["generate", "--top-p", "2"], 1, "top-p is 2"),
        (&["generate", "--window", "0"], 1, "window of 0 tokens after the first 4"),
        (&["generate", "--window", "500", "--sinks", "13"], 1, "512 positions"),
        (&["generate", "--sinks", "13"], 2, "--window"),
        (&["generate", "--isa", "mmx"], 2, "mmx"),
        (&["cache-cost", "--max-context", "3"], 1, "16 is the least"),
    ];
    for (args, code, part) in cases {
        let out = kvlane(args);
        let message = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
        assert!(
            out.stdout.is_empty() && message.starts_with("error: ") && message.contains(part),
            "{args:?}: {message}"
        );
    }
    let long = "word ".repeat(600);
    let out = kvlane(&["generate", "--prompt", &long]);
    assert!(String::from_utf8(out.stderr).unwrap().contains("but the model was made for 512"));
}

#[test]
fn a_reader_may_leave() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvlane"))
        .args(["generate", "--max-tokens", "200"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn help_names_every_option() {
    let help = stdout(&["generate", "--help"]);
    for option in [
        "--model",
        "--prompt",
        "--max-tokens",
        "--temperature",
        "--top-p",
        "--top-k",
        "--seed",
        "--threads",
        "--kv-type",
        "--k-type",
        "--v-type",
        "--isa",
        "--no-cache",
        "--window",
        "--sinks",
        "--json",
    ] {
        assert!(help.contains(option), "{option}");
    }
}
