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
    // The text ends with a line break, whatever reads it.
    assert_eq!(object["text"], text.strip_suffix('\n').unwrap());
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
    assert_eq!(
        (int8["cache_bytes_per_token"].as_u64(), exact["cache_bytes_per_token"].as_u64()),
        (Some(576), Some(2048))
    );
    let fp8 = with(&["--k-type", "fp8_e4m3", "--v-type", "fp8_e5m2"]);
    assert_eq!((fp8["cache_bytes_per_token"].as_u64(), fp8["ids"].as_array().unwrap().len()), (Some(512), 12));
    assert_eq!(fp8["cache_bytes"].as_u64().unwrap() * 4, exact["cache_bytes"].as_u64().unwrap());
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
    assert!(json(&[&window[..], &["--rotate", "both"]].concat())["evicted"].as_u64().unwrap() > 0);
    let rotated = with(&["--rotate", "both"]);
    assert_eq!(
        (&rotated["ids"], rotated["rotate"].as_str(), exact["rotate"].as_str()),
        (&exact["ids"], Some("both"), Some("none"))
    );
    let rotated = with(&["--kv-type", "int8", "--rotate", "k", "--isa", "scalar"]);
    let ran: Vec<&str> = rotated["kernels"].as_array().unwrap().iter().map(|k| k.as_str().unwrap()).collect();
    assert!(ran.contains(&"hadamard_f32_f32_scalar"), "{ran:?}");
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
    // As `echo` writes it; the line break is not part of the prompt.
    child.stdin.take().unwrap().write_all(b"The LORD\n").unwrap();
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
    let path = kvlane_tiny::PATH;
    let text = stdout(&["inspect", path]);
    assert!(text.contains("6 over 2 key/value heads of 32") && text.contains("Q8_0"), "{text}");
    let object = json(&["inspect", path]);
    assert_eq!((object["heads"].as_u64(), object["kv_heads"].as_u64()), (Some(6), Some(2)));
    assert_eq!(object["tensors"][0]["name"], "token_embd.weight");
    // What a context takes, by the format of the cache: four layers of two heads of 32, keys and values.
    let object = json(&["inspect", path, "--context", "1000"]);
    for (format, head) in [("f32", 128), ("bf16", 64), ("int8", 36), ("fp8_e4m3", 32), ("q8_0", 34), ("q4_0", 18)] {
        assert_eq!(object["cache_bytes_per_token"][format].as_u64(), Some(4 * 2 * 2 * head));
        assert_eq!(object["cache_bytes"][format].as_u64(), Some(1000 * 4 * 2 * 2 * head));
    }
    let text = stdout(&["inspect", path, "--context", "1024"]);
    assert!(
        text.contains("bytes per token: 2048 in f32, 1024 in f16 or bf16, 576 in int8, 512 in fp8_e4m3 or"),
        "{text}"
    );
    assert!(text.contains("1024 tokens: 2.0 MiB in f32, 1.0 MiB in f16 or bf16"), "{text}");
}

#[test]
fn perplexity_measures_what_a_format_does() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/page.txt");
    let with = |more: &[&str]| json(&[&["perplexity", page, "--context", "200"], more].concat());
    let number = |object: &serde_json::Value, key: &str| object[key].as_f64().unwrap();
    let exact = with(&["--baseline"]);
    let (perplexity, base) = (number(&exact, "perplexity"), &exact["baseline"]);
    assert!(exact["tokens"].as_u64().unwrap() > 1000 && perplexity > 20.0 && perplexity < 3000.0, "{exact}");
    // A format compared with itself is itself.
    assert_eq!((number(base, "perplexity"), base["type"].as_str()), (perplexity, Some("f32")));
    assert_eq!((number(base, "largest_kl_divergence"), number(base, "same_choice")), (0.0, 1.0));
    assert!(number(base, "least_cosine") > 1.0 - 1e-12);
    let far = |format: &str| {
        let found = with(&["--kv-type", format, "--baseline"]);
        assert_eq!(number(&found["baseline"], "perplexity"), perplexity);
        assert!((number(&found, "perplexity") / perplexity - 1.0).abs() < 0.2, "{found}");
        number(&found["baseline"], "mean_kl_divergence")
    };
    // Fewer bits, a larger distance.
    let distances = ["bf16", "int8", "fp8_e4m3", "fp8_e5m2"].map(far);
    assert!(distances[0] > 0.0 && distances.is_sorted(), "{distances:?}");
    let distances = ["bf16", "q8_0", "q5_1", "q4_0"].map(far);
    assert!(distances.is_sorted(), "{distances:?}");
    // Values alone; another baseline; the text that a person reads.
    let mixed = with(&["--kv-type", "bf16", "--v-type", "fp8_e4m3", "--baseline=bf16"]);
    assert_eq!((mixed["k_type"].as_str(), mixed["v_type"].as_str()), (Some("bf16"), Some("fp8_e4m3")));
    assert!(number(&mixed["baseline"], "mean_kl_divergence") > 0.0);
    assert!(with(&["--threads", "1"]).get("baseline").is_none());
    let text = stdout(&["perplexity", page, "--context", "200", "--kv-type", "int8", "--baseline"]);
    assert!(text.starts_with("perplexity ") && text.contains("KL divergence") && text.contains(" in f32"), "{text}");
    // Rotated caches are as far from themselves as roundings are.
    let rotated = with(&["--rotate", "both", "--baseline"]);
    let divergence = number(&rotated["baseline"], "mean_kl_divergence");
    assert!(rotated["rotate"].as_str() == Some("both") && divergence < 1e-6, "{rotated}");
    // What cannot be measured.
    for (more, sentence) in [
        (vec!["--context", "1"], "windows of 1 tokens"),
        (vec!["--context", "100000"], "made for 512"),
        (vec!["--baseline=int4"], "int4"),
    ] {
        let out = kvlane(&[&["perplexity", page], &more[..]].concat());
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(!out.status.success() && said.contains(sentence), "{more:?}: {said}");
    }
    assert_eq!(kvlane(&["perplexity", "no/such/file"]).status.code(), Some(1));
}

#[test]
fn cache_error_measures_every_format() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/page.txt");
    let with = |more: &[&str]| json(&[&["cache-error", page, "--context", "200"], more].concat());
    let all = with(&["--layers"]);
    let formats = all["formats"].as_array().unwrap();
    let find = |name: &str| formats.iter().find(|f| f["k_type"] == name && f["v_type"] == name).unwrap();
    assert_eq!(formats.len(), kvlane::CacheFormat::ALL.len());
    let number = |object: &serde_json::Value, part: &str, key: &str| object[part][key].as_f64().unwrap();
    for part in ["k", "v", "attention"] {
        let of = |key: &str| ["f32", "f16", "q8_0", "q5_0", "q4_0"].map(|name| number(find(name), part, key));
        let (cosines, errors) = (of("mean_cosine"), of("largest_error"));
        assert!(errors[0] == 0.0 && errors.is_sorted() && errors[4] < 10.0, "{part}: {errors:?}");
        assert!(
            cosines[0] > 1.0 - 1e-12 && cosines.iter().rev().is_sorted() && cosines[4] > 0.9,
            "{part}: {cosines:?}"
        );
        let layers = find("q4_0")["layers"].as_array().unwrap();
        let largest = layers.iter().map(|layer| number(layer, part, "largest_error")).fold(0.0, f64::max);
        assert_eq!((layers.len(), largest), (4, errors[4]), "{part}");
    }
    assert_eq!(find("int8")["cache_bytes_per_token"].as_u64(), Some(4 * 2 * 2 * 36));
    // A pair, rotated.
    let pair = with(&["--k-type", "q8_0", "--v-type", "fp8_e4m3", "--rotate", "both"]);
    let pair = &pair["formats"][0];
    let named = ["k_type", "v_type", "rotate"].map(|key| pair[key].as_str().unwrap());
    assert_eq!(named, ["q8_0", "fp8_e4m3", "both"]);
    assert!(number(pair, "k", "largest_error") < number(pair, "v", "largest_error") && pair.get("layers").is_none());
    let text = stdout(&["cache-error", page, "--kv-type", "int8", "--layers"]);
    assert!(text.starts_with("| keys and values |") && text.contains("| int8 | 576 | all |"), "{text}");
    assert_eq!(text.lines().count(), 2 + 5);
    assert!(
        stdout(&["cache-error", page, "--kv-type", "f16"])
            .lines()
            .last()
            .unwrap()
            .starts_with("| f16 | 1024 | 1.000000 |")
    );
    assert_eq!(kvlane(&["cache-error", "no/such/file"]).status.code(), Some(1));
    assert_eq!(kvlane(&["cache-error", page, "--context", "1"]).status.code(), Some(2));
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
    let neon = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    let tiny = kvlane_tiny::PATH;
    let empty = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("empty.gguf");
    std::fs::write(&empty, "").unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        // What is wrong with a file ends with 1.
        (&["generate", "--model", "/nowhere.gguf"], 1, "/nowhere.gguf"),
        (&["generate", "--model", env!("CARGO_MANIFEST_DIR")], 1, "config.json"),
        (&["inspect", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")], 1, "not a GGUF file"),
        (&["generate", "--model", empty.to_str().unwrap()], 1, "empty.gguf is empty"),
        (&["generate", "--prompts", "/nowhere.jsonl"], 1, "/nowhere.jsonl"),
        (&["generate", "--mesh", "rows=2"], 2, "no axis is called"),
        (&["generate", "--mesh", "model=2", "--beams", "2"], 2, "--beams"),
        (&["generate", "--mesh-patience", "5"], 2, "--mesh"),
        #[cfg(not(feature = "mpi"))]
        (&["generate", "--mesh", "model=2"], 2, "built without the feature mpi"),
        (&["chat"], 1, "no chat template"),
        (&["generate", "--chat"], 1, "no chat template"),
        // What is wrong with an argument ends with 2, whoever finds it.
        (&["generate", "--model", "/dev/null"], 2, "/dev/null is a device"),
        (&["generate", "--prompt", ""], 2, "no tokens"),
        (&["generate", "--max-tokens", "0"], 2, "'--max-tokens <N>': it must be a whole number, 1 or more"),
        (&["generate", "--temperature=-1"], 2, "'--temperature <T>': it must be a finite number, 0 or more"),
        (&["generate", "--temperature", "-1"], 2, "'--temperature <T>': it must be a finite number, 0 or more"),
        (&["generate", "--temperature", "inf"], 2, "it must be a finite number, 0 or more"),
        (&["generate", "--temperature", "NaN"], 2, "it must be a finite number, 0 or more"),
        (&["generate", "--seed", "-1"], 2, "'--seed <S>': it must be a whole number from 0 to 18446744073709551615"),
        (&["generate", "--top-k", "-1"], 2, "'--top-k <K>'"),
        (&["chat", "--top-p", "-1"], 2, "'--top-p <P>': it must be above 0 and at most 1"),
        (&["generate", "--top-p", "2"], 2, "'--top-p <P>': it must be above 0 and at most 1"),
        (&["generate", "--stop", ""], 2, "'--stop <TEXT>': it needs at least one character"),
        (&["generate", "--window", "0"], 2, "'--window <N>': it must be a whole number, 1 or more"),
        (&["generate", "--window", "500", "--sinks", "13"], 2, "500 tokens after the first 13, but only 512 fit"),
        (&["generate", "--sinks", "13"], 2, "--window"),
        (&["generate", "--isa", "mmx"], 2, "mmx"),
        (&["generate", "--isa", neon], 2, "this CPU cannot run it; it has scalar"),
        (&["info", "--isa", neon], 2, "this CPU cannot run it; it has scalar"),
        (&["bench", "--isa", neon], 2, "this CPU cannot run it; it has scalar"),
        (&["generate", "--threads", "1025"], 2, "'--threads <N>': it must be a whole number from 0 to 1024"),
        (&["bench", "--threads", "1025"], 2, "it must be a whole number from 0 to 1024"),
        (&["generate", "--prompt", "-", "--prompt", "-"], 2, "--prompt - is given twice"),
        (&["generate", "--system", "x"], 2, "--system is given, but it needs --chat or --prompts"),
        (&["generate", "--prompts", "-", "--prompt", "x"], 2, "--prompt"),
        (&["generate", "--slots", "0"], 2, "'--slots <N>': it must be a whole number, 1 or more"),
        (&["cache-cost", "--max-context", "3"], 2, "16 is the least"),
        (&["cache-cost", "--max-context", "18446744073709551615"], 2, "does not fit into memory"),
        (&["cache-cost", "--max-context", "1000000000000"], 2, "does not fit into memory"),
        (&["generate", "--prompts", "-", "--slots", "1000000000"], 2, "a cache of 1000000000 rows"),
        (&["generate", "--prompts", "/"], 2, "/ is a directory"),
        (&["generate", "--chat", "--chat-template", "/dev/zero"], 2, "/dev/zero is a device"),
    ];
    // A bad value is found before the weights are read, so that a wrong model is not even noticed.
    for bad in [["--temperature", "-1"], ["--top-p", "0"], ["--isa", neon], ["--threads", "9999"]] {
        let out = kvlane(&[&["generate", "--model", "/nowhere.gguf"], &bad[..]].concat());
        assert!(out.status.code() == Some(2) && String::from_utf8(out.stderr).unwrap().contains(bad[0]));
    }
    assert!(kvlane(&["inspect", tiny]).status.success());
    for &(args, code, part) in cases {
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
    assert_eq!(out.status.code(), Some(2));
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
        "--prompts",
        "--slots",
        "--stop",
        "--chat",
        "--system",
        "--keep-last",
        "--beams",
        "--length-penalty",
        "--early-stopping",
        "--samples",
        "--draft",
        "--lookup",
        "--guesses",
        "--branches",
    ] {
        assert!(help.contains(option), "{option}");
    }
}

/// The variable is checked before anything else, in the words of the command line.
#[test]
fn the_level_of_the_environment_is_an_argument() {
    let run = |value: &str, args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_kvlane")).args(args).env("KVLANE_MAX_ISA", value).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    for args in [&["info"][..], &["generate", "--model", "/nowhere"], &["cache-cost"], &["bench", "--filter", "none"]] {
        let (code, _, message) = run("bogus", args);
        assert!(message.starts_with("error: KVLANE_MAX_ISA is \"bogus\", which is none of scalar"), "{message}");
        assert_eq!(code, Some(2));
    }
    // Levels and formats are found in capitals, too.
    assert!(run("SCALAR", &["info", "--json"]).1.contains("\"isa\": \"scalar\""));
    assert!(run("", &["info", "--isa", "Scalar", "--json"]).1.contains("\"isa\": \"scalar\""));
    assert_eq!(run("", &["generate", "--max-tokens", "1", "--kv-type", "BF16"]).0, Some(0));
}

/// A standard error that is closed or full changes neither the result nor the exit code.
#[cfg(target_os = "linux")]
#[test]
fn standard_error_may_be_closed_or_full() {
    let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    let closed = || {
        // A pipe whose reader has gone.
        let mut child = Command::new("true").stdin(Stdio::piped()).spawn().unwrap();
        let pipe = child.stdin.take().unwrap();
        child.wait().unwrap();
        Stdio::from(pipe)
    };
    let tiny = kvlane_tiny::PATH;
    let cases: [(&[&str], i32); 5] = [
        (&["generate", "--max-tokens", "2"], 0),
        (&["cache-cost", "--max-context", "16"], 0),
        (&["inspect", tiny], 0),
        (&["generate", "--model", "/nowhere.gguf"], 1),
        (&["generate", "--prompt", ""], 2),
    ];
    for (args, code) in cases {
        for stderr in [full(), closed()] {
            let out = Command::new(env!("CARGO_BIN_EXE_kvlane")).args(args).stderr(stderr).output().unwrap();
            assert_eq!(out.status.code(), Some(code), "{args:?}");
            assert_eq!(out.stdout.is_empty(), code != 0, "{args:?}");
        }
    }
    let out = Command::new(env!("CARGO_BIN_EXE_kvlane")).arg("info").stdout(full()).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8(out.stderr).unwrap().starts_with("error: standard output: "));
}

#[test]
fn numbers_and_nouns_agree() {
    let notes = |args: &[&str]| String::from_utf8(kvlane(args).stderr).unwrap();
    let args = ["generate", "--max-tokens", "2", "--prompt", "And God said", "--threads"];
    let one = notes(&[&args[..], &["1"]].concat());
    assert!(one.contains("; decode 1 token, ") && one.contains("; 1 thread; cache in f32, "), "{one}");
    assert!(notes(&[&args[..], &["2"]].concat()).contains("; 2 threads; "));
    assert!(notes(&["cache-cost", "--max-context", "16", "--threads", "1"]).contains(", 1 thread, "));
    // More threads than CPUs are possible, and not without a word.
    let cpus = std::thread::available_parallelism().unwrap().get();
    let many = (cpus + 1).to_string();
    assert!(notes(&[&args[..], &[&many]].concat()).starts_with(&format!("note: {many} threads share {cpus} CPU")));
}

#[test]
fn several_prompts_come_in_their_order() {
    let args = ["generate", "--temperature", "0", "--max-tokens"];
    let alone = |prompt: &str, n: &str| stdout(&[&args[..], &[n, "--prompt", prompt]].concat());
    let prompts = ["And God said", "The LORD", "In the beginning"];
    for slots in ["1", "2", "3"] {
        let mut all = [&args[..], &["9", "--slots", slots]].concat();
        prompts.iter().for_each(|prompt| all.extend(["--prompt", prompt]));
        let want: Vec<String> = prompts.iter().map(|p| format!("==> {p} <==\n{}", alone(p, "9"))).collect();
        assert_eq!(stdout(&all), want.join("\n"), "{slots} slots");
        let object = json(&all);
        for (completion, prompt) in object["completions"].as_array().unwrap().iter().zip(prompts) {
            assert_eq!(format!("{}\n", completion["text"].as_str().unwrap()), alone(prompt, "9"));
        }
    }
    let text = alone("And God said", "20");
    let stop = &text[text.len() / 2..][..5];
    let stopped = stdout(&[&args[..], &["20", "--prompt", "And God said", "--stop", stop]].concat());
    assert_eq!(stopped.strip_suffix('\n').unwrap(), &text[..text.find(stop).unwrap()]);
}

/// Runs `generate --prompts -` with these lines.
fn serve(args: &[&str], lines: &str) -> (Vec<serde_json::Value>, String) {
    let (code, text, notes) = ended(&[&["generate", "--prompts", "-", "--temperature", "0"], args].concat(), lines);
    let events: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // A bad line is the end of nothing but itself, and is not forgotten.
    let bad = events.iter().any(|e| e["event"] == "error" || e["finish"] == "error");
    assert_eq!(code, Some(i32::from(bad)), "{notes}");
    (events, notes)
}

/// Standard output and standard error of a command that succeeds with this standard input.
fn fed(args: &[&str], lines: &str) -> (String, String) {
    let (code, text, notes) = ended(args, lines);
    assert_eq!(code, Some(0), "{notes}");
    (text, notes)
}

/// Exit code, standard output and standard error of a command with this standard input.
fn ended(args: &[&str], lines: &str) -> (Option<i32>, String, String) {
    use std::io::Write;
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvlane"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

#[test]
fn requests_are_lines_of_json() {
    let lines = r#"{"prompt": "And God said", "max_tokens": 5}
{"prompt": "The LORD", "max_tokens": 7, "id": "second", "logprobs": 2}

not json
{"prompt": "x", "max_token": 5}
{"prompt": "x", "messages": []}
{"prompt": "x", "temperature": -1, "id": 7}
{"prompt": "In the beginning", "temperature": 0.9, "seed": 3, "top_k": 50, "top_p": 0.9, "n": 3, "max_tokens": 6}
{"prompt": "And God said", "max_tokens": 20, "stop": "the", "logit_bias": {"17": -100}}
{"prompt": "And God said", "max_tokens": 0}
{"prompt": "And God said", "max_tokens": 3, "allowed_token_ids": [5, 6]}"#;
    let (events, notes) = serve(&["--slots", "2"], lines);
    let of = |line: u64, event: &str| -> Vec<&serde_json::Value> {
        events.iter().filter(|e| e["line"] == line && e["event"] == event).collect()
    };
    let alone =
        |prompt: &str, n: &str| json(&["generate", "--temperature", "0", "--prompt", prompt, "--max-tokens", n]);
    for (line, prompt, n) in [(1, "And God said", "5"), (2, "The LORD", "7")] {
        let (want, end) = (alone(prompt, n), of(line, "end")[0]);
        assert_eq!((&end["text"], &end["finish"]), (&want["text"], &want["finish"]));
        assert_eq!(end["prompt_tokens"], want["prompt_ids"].as_array().unwrap().len());
        let tokens: Vec<_> = of(line, "token").iter().map(|e| e["token"].clone()).collect();
        assert_eq!(want["ids"], serde_json::Value::from(tokens));
        let text: String = of(line, "token").iter().map(|e| e["text"].as_str().unwrap()).collect();
        assert_eq!(end["text"], text);
    }
    assert!(of(2, "token").iter().all(|e| e["id"] == "second" && e["top_logprobs"].as_array().unwrap().len() == 2));
    assert!(of(2, "token").iter().all(|e| e["logprob"] == e["top_logprobs"][0]["logprob"] && e["logprob"].is_f64()));
    assert!(of(2, "token")[1..].iter().all(|e| e["text"] == e["top_logprobs"][0]["text"]));
    assert!(of(1, "token").iter().all(|e| e["logprob"].is_null()));
    for (line, part) in [
        (4, "not a request: expected"),
        (5, "unknown field `max_token`"),
        (6, "either \"prompt\" or \"messages\""),
        (7, "the temperature is -1"),
        (10, "0 tokens to generate"),
    ] {
        let [error] = of(line, "error")[..] else { panic!("line {line}") };
        assert!(error["error"].as_str().unwrap().contains(part), "{error}");
        assert!(of(line, "token").is_empty() && of(line, "end").is_empty());
    }
    assert_eq!(of(7, "error")[0]["id"], 7);
    let samples: Vec<_> = of(8, "end").iter().map(|e| (e["index"].as_u64().unwrap(), e["text"].clone())).collect();
    assert!(samples.len() == 3 && samples.iter().any(|s| s.1 != samples[0].1), "{samples:?}");
    let stopped = of(9, "end")[0];
    let text = stopped["text"].as_str().unwrap();
    assert!(!text.contains("the") && (stopped["finish"] == "stop" || stopped["tokens"] == 20), "{stopped}");
    assert!(of(11, "token").iter().all(|e| e["token"] == 5 || e["token"] == 6));
    assert!(notes.contains("10 requests in 2 slots") && notes.contains("tokens/s"), "{notes}");

    // Long prompts: refused, or cut.
    let long = "word ".repeat(600);
    let (events, _) = serve(
        &["--context", "64"],
        &format!("{{\"prompt\": \"{long}\"}}\n{{\"prompt\": \"{long}\", \"keep_last\": true, \"max_tokens\": 9}}"),
    );
    assert!(events[0]["error"].as_str().unwrap().contains("1 to 64 fit"), "{}", events[0]);
    let end = events.last().unwrap();
    assert_eq!((&end["prompt_tokens"], &end["tokens"]), (&56.into(), &9.into()));
}

#[cfg(unix)]
fn interrupt(child: &std::process::Child) {
    // SAFETY: the process is a child that was not waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
}

/// Starts a command and reads the first bytes of its output.
#[cfg(unix)]
fn started(args: &[&str], bytes: usize) -> std::process::Child {
    use std::io::Read;
    let mut child = Command::new(env!("CARGO_BIN_EXE_kvlane"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut vec![0; bytes]).unwrap();
    child
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_text_and_keeps_the_figures() {
    let child = started(&["generate", "--window", "64", "--max-tokens", "1000000"], 40);
    interrupt(&child);
    let out = child.wait_with_output().unwrap();
    let notes = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(130));
    assert!(out.stdout.ends_with(b"\n") && notes.contains("; interrupted") && notes.contains("tokens/s"), "{notes}");

    // A second one does not wait, here for a reader.
    use std::io::Write;
    let mut child = started(&["generate", "--prompts", "-"], 0);
    let line = b"{\"prompt\": \"And God said\", \"max_tokens\": 400, \"logprobs\": 2000}\n";
    child.stdin.as_mut().unwrap().write_all(line).unwrap();
    use std::io::Read;
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 1000]).unwrap();
    while child.try_wait().unwrap().is_none() {
        interrupt(&child);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let out = child.wait_with_output().unwrap();
    let notes = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(130) && !notes.contains("tokens/s"), "{notes}");
}

/// A template for a model that has none.
fn template() -> std::path::PathBuf {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("chat.jinja");
    let text = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}assistant:";
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn a_conversation_grows_its_cache() {
    let path = template();
    let template = path.to_str().unwrap();
    let talk = |lines: &str| {
        let args =
            ["chat", "--chat-template", template, "--temperature", "0", "--max-tokens", "6", "--system", "Speak"];
        let (text, notes) = fed(&args, lines);
        let prefill = notes.split("prefill ").nth(1).unwrap().split(' ').next().unwrap().parse::<usize>().unwrap();
        (text, prefill, notes)
    };
    let (one, first, _) = talk("Who is the LORD?\n");
    let generate =
        ["generate", "--chat-template", template, "--temperature", "0", "--max-tokens", "6", "--system", "Speak"];
    assert_eq!(one, stdout(&[&generate[..], &["--chat", "--prompt", "Who is the LORD?"]].concat()));
    let (two, both, notes) = talk("Who is the LORD?\n\nWhere is he?\n");
    assert!(two.starts_with(&one) && notes.contains("2 turns"), "{notes}");
    // The second turn computes the last token of the answer, and the new text; much less than the first turn again.
    let turns =
        |text: &str| json(&["generate", "--max-tokens", "1", "--prompt", text])["prompt_ids"].as_array().unwrap().len();
    let new = turns("\nuser: Where is he?\nassistant:");
    assert!(both - first <= new + 2 && both - first >= new - 2, "{both} {first} {new}");
}

#[test]
fn messages_become_a_conversation() {
    let path = template();
    let args = ["--chat-template", path.to_str().unwrap(), "--max-tokens", "5"];
    let lines = r#"{"messages": [{"role": "system", "content": "Speak"}, {"role": "user", "content": "Who?"}]}
{"messages": [{"role": "user", "content": "Who?", "mood": 1}]}
{"messages": "Who?"}"#;
    let (events, _) = serve(&args, lines);
    let want = json(
        &[&["generate", "--temperature", "0", "--prompt", "system: Speak\nuser: Who?\nassistant:"], &args[2..]]
            .concat(),
    );
    let end = events.iter().find(|e| e["event"] == "end").unwrap();
    assert_eq!((&end["line"], &end["text"]), (&1.into(), &want["text"]));
    let errors: Vec<_> = events.iter().filter(|e| e["event"] == "error").collect();
    assert!(errors.len() == 2 && errors[0]["error"].as_str().unwrap().contains("unknown field `mood`"), "{errors:?}");
    let (events, _) = serve(&[], r#"{"messages": [{"role": "user", "content": "Who?"}]}"#);
    assert!(events[0]["error"].as_str().unwrap().contains("no chat template"), "{}", events[0]);
}

#[test]
fn beams_write_the_best_texts() {
    let args = ["generate", "--prompt", "And God said", "--beams", "4", "--max-tokens", "12"];
    let best = stdout(&args);
    let object = json(&[&args[..], &["--samples", "3"]].concat());
    let samples = object["samples"].as_array().unwrap();
    let scores: Vec<f64> = samples.iter().map(|s| s["score"].as_f64().unwrap()).collect();
    assert!(scores.len() == 3 && scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    assert_eq!(format!("{}\n", samples[0]["text"].as_str().unwrap()), best);
    assert_eq!((samples[0]["ids"].as_array().unwrap().len(), samples[0]["finish"].as_str()), (12, Some("max_tokens")));
    let several = stdout(&[&args[..], &["--samples", "2"]].concat());
    assert!(several.contains(&best) && several.matches("==> score -").count() == 2, "{several}");
    // One beam is greedy; a penalty scales scores.
    let one = ["generate", "--prompt", "And God said", "--max-tokens", "12"];
    assert_eq!(stdout(&[&one[..], &["--beams", "1"]].concat()), stdout(&[&one[..], &["--temperature", "0"]].concat()));
    let sums = json(&[&args[..], &["--length-penalty", "0", "--early-stopping", "never"]].concat());
    assert_eq!(sums["samples"][0]["score"], sums["samples"][0]["log_probability"]);
    for (wrong, part) in [
        (&["--beams", "0"][..], "it must be a whole number, 1 or more"),
        (&["--beams", "2", "--samples", "3"], "--samples 3 of a search with 2 beams"),
        (&["--samples", "2"], "--beams <N>"),
        (&["--beams", "2", "--length-penalty", "nan"], "it must be a finite number"),
        (&["--beams", "2", "--temperature", "1"], "cannot be used with"),
        (&["--beams", "2", "--prompt", "b"], "--beams takes one --prompt, but 2 are given"),
    ] {
        let out = kvlane(&[&["generate", "--prompt", "a"], wrong].concat());
        let sentence = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.code() == Some(2) && sentence.contains(part), "{wrong:?}: {sentence}");
    }
}

#[test]
fn guesses_leave_the_text_as_it_is() {
    let tiny = kvlane_tiny::PATH;
    let args = ["generate", "--prompt", "And it came to pass", "--max-tokens", "60", "--temperature", "0"];
    let plain = stdout(&args);
    for more in [
        &["--lookup", "3"][..],
        &["--lookup", "2", "--branches", "3", "--guesses", "5"],
        &["--draft", tiny],
        &["--draft", tiny, "--branches", "2", "--lookup", "2"],
    ] {
        let out = kvlane(&[&args[..], more].concat());
        let notes = String::from_utf8(out.stderr).unwrap();
        assert!(
            out.status.success() && notes.contains(" guesses held; ") && notes.contains("tokens per pass"),
            "{notes}"
        );
        assert_eq!(String::from_utf8(out.stdout).unwrap(), plain, "{more:?}");
    }
    // The model itself, as its draft, is always right.
    let object = json(&[&args[..], &["--draft", tiny]].concat());
    let number = |key: &str| object[key].as_u64().unwrap();
    assert_eq!((number("passes"), number("held"), number("guesses")), (12, 47, 47));
    assert_eq!(format!("{}\n", object["text"].as_str().unwrap()), plain);
    assert_eq!(object["finish"], "max_tokens");
    // The seed decides with a temperature too.
    let sampled = ["generate", "--prompt", "And it came to pass", "--max-tokens", "60", "--seed", "3"];
    assert_eq!(stdout(&[&sampled[..], &["--lookup", "3"]].concat()), stdout(&sampled));
    let drawn = [&sampled[..], &["--draft", tiny, "--branches", "2"]].concat();
    assert_eq!(stdout(&drawn), stdout(&drawn));
    for (wrong, part) in [
        (&["--lookup", "0"][..], "it must be a whole number, 1 or more"),
        (&["--guesses", "3"], "--guesses and --branches need --draft or --lookup"),
        (&["--lookup", "2", "--beams", "2"], "cannot be used with"),
        (&["--lookup", "2", "--prompt", "b"], "take one --prompt, but 2 are given"),
    ] {
        let out = kvlane(&[&["generate", "--prompt", "a"], wrong].concat());
        let sentence = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.code() == Some(2) && sentence.contains(part), "{wrong:?}: {sentence}");
    }
}
