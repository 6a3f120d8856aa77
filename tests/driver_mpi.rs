//! `kvlane generate --mesh` with real processes, which `mpirun` starts. The texts are those of one process; whatever goes wrong
//! ends every process with a sentence.
//!
//! A wait without end would be one of these tests that never returns: there is no other bound, because a busy machine has none.
#![cfg(all(feature = "mpi", target_os = "linux"))]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

/// The embedded model with room for more than one segment of keys. Beyond the 512 positions of its training it speaks nonsense, but
/// the same nonsense.
fn model() -> PathBuf {
    let mut bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/src/driver/tiny/tiny.gguf")).unwrap();
    let key = b"llama.context_length";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    assert_eq!(bytes[at..at + 8], [4, 0, 0, 0, 0, 2, 0, 0], "an unsigned number, 512");
    bytes[at + 4..at + 8].copy_from_slice(&3000u32.to_le_bytes());
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("mesh-{:?}.gguf", std::thread::current().id()));
    std::fs::write(&path, bytes).unwrap();
    path
}

fn mpirun(processes: usize, args: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    // More processes than cores: those that wait give way. mpirun asks whether root is meant.
    command.args(["--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "-n", &processes.to_string()]);
    // The seconds in which a process that has to end can say so: on a busy machine it may need longer than the one of the default.
    command.args(["--mca", "odls_base_sigkill_timeout", "5"]);
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command.arg(env!("CARGO_BIN_EXE_kvlane")).args(["generate", "--threads", "1"]).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn output(processes: usize, args: &[&str]) -> Output {
    mpirun(processes, args).output().expect("mpirun, which the feature mpi needs")
}

fn alone(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvlane"));
    command.args(["generate", "--threads", "1"]).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn json(out: &Output) -> Value {
    assert!(out.status.success(), "{}", text(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&out.stdout)))
}

/// Compares what is generated for two prompts, one of which reaches into the second segment of keys.
fn assert_like_one_process(model: &Path, meshes: &[(usize, &str)], prompt: &str, max_tokens: &str) {
    let model = model.to_str().unwrap();
    let args = ["--model", model, "--json", "--prompt", "In the beginning", "--prompt", prompt, "--temperature", "0"];
    let args = [&args[..], &["--max-tokens", max_tokens]].concat();
    let want = json(&alone(&args));
    let long = &want["completions"][1];
    assert!(long["prompt_ids"].as_array().unwrap().len() > kvlane::SPLIT_GRID);
    for &(processes, mesh) in meshes {
        let got = json(&output(processes, &[&args[..], &["--mesh", mesh]].concat()));
        assert_eq!(got["completions"], want["completions"], "{mesh}");
        let received = |axis: &str| got["mesh"][axis]["bytes"].as_u64().unwrap() > 0;
        assert_eq!(received("received_over_model"), mesh.contains("model"), "{mesh}");
        assert_eq!(received("received_over_sequence"), mesh.contains("sequence"), "{mesh}");
    }
}

#[test]
fn texts_are_those_of_one_process() {
    let meshes = [
        (2, "data=2"),
        (2, "model=2"),
        (2, "sequence=2"),
        (4, "model=2,sequence=2"),
        (4, "model=4"),
        (8, "data=2,model=2,sequence=2"),
    ];
    let prompt = "And it came to pass, that the waters of the sea were divided. ".repeat(80);
    assert_like_one_process(&model(), &meshes, &prompt, "12");
}

#[test]
fn smollm2_speaks_as_in_one_process() {
    let Some(path) = std::env::var_os("KVLANE_SMOLLM2") else {
        return println!("not run: KVLANE_SMOLLM2 names no file");
    };
    // Of its 3 KV heads, one process has two.
    let meshes = [(2, "model=2"), (3, "model=3"), (2, "sequence=2")];
    let prompt = "The quick brown fox jumps over the lazy dog. ".repeat(110);
    assert_like_one_process(Path::new(&path), &meshes, &prompt, "8");
}

/// The events of a run, in the order of lines and samples.
fn events(out: &Output) -> Vec<Value> {
    let mut events: Vec<Value> = text(&out.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    events.sort_by_key(|event| (event["line"].as_u64(), event["index"].as_u64()));
    events
}

#[test]
fn requests_are_spread_over_data() {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("mesh.jsonl");
    let lines = [
        r#"{"prompt": "And God said", "max_tokens": 9, "n": 3, "temperature": 0.8, "seed": 5, "logprobs": 2}"#,
        r#"{"prompt": "The LORD", "stop": "the", "id": "b"}"#,
        r#"{"prompt": 7}"#,
        r#"{"prompt": "In the", "max_tokens": 30, "logit_bias": {"300": -5}}"#,
        r#"{"prompt": "Moses", "max_tokens": 4}"#,
    ];
    std::fs::write(&file, lines.join("\n")).unwrap();
    let args = ["--prompts", file.to_str().unwrap(), "--temperature", "0", "--slots", "2"];
    let want = alone(&args);
    assert_eq!(want.status.code(), Some(1), "{}", text(&want.stderr));
    for (processes, mesh) in [(2, "data=2"), (6, "data=3,model=2")] {
        let got = output(processes, &[&args[..], &["--mesh", mesh]].concat());
        assert_eq!(events(&got), events(&want), "{mesh}");
        assert_eq!(got.status.code(), Some(1), "{mesh}: a line is no request");
    }
}

#[test]
fn standard_input_is_for_all() {
    let args = ["--prompt", "-", "--temperature", "0", "--max-tokens", "9"];
    let mut child = mpirun(2, &[&args[..], &["--mesh", "model=2"]].concat()).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"And God said\n").unwrap();
    let got = child.wait_with_output().unwrap();
    let want = alone(&["--prompt", "And God said", "--temperature", "0", "--max-tokens", "9"]);
    assert_eq!(text(&got.stdout), text(&want.stdout), "{}", text(&got.stderr));
}

/// Checks that each process has a sentence, and the exit code.
fn assert_all_say(processes: usize, args: &[&str], code: i32, sentence: &str) {
    let out = output(processes, args);
    let notes = text(&out.stderr);
    for rank in 0..processes {
        let label = format!("process {rank} of {processes}: error: ");
        let said = notes.lines().find(|line| line.starts_with(&label));
        assert!(said.is_some_and(|line| line.contains(sentence)), "{args:?}: {rank} of {processes} in {notes}");
    }
    assert_eq!(out.status.code(), Some(code), "{args:?}: {notes}");
    assert!(out.stdout.is_empty(), "{args:?}");
}

#[test]
fn what_does_not_fit_ends_every_process_with_a_sentence() {
    assert_all_say(2, &["--mesh", "model=2,sequence=2"], 2, "has 4 processes, but 2 were started");
    assert_all_say(1, &["--mesh", "model=2"], 2, "has 2 processes, but 1 was started");
    assert_all_say(3, &["--mesh", "model=3"], 2, "more than the model's 2 KV heads");
    assert_all_say(7, &["--mesh", "model=7"], 2, "the model has 6 query heads");
    assert_all_say(2, &["--mesh", "sequence=2"], 2, "sequence=2 segments, but");
    assert_all_say(2, &["--mesh", "data=2"], 2, "data=2 parts, but there is 1 prompt");
    assert_all_say(2, &["--mesh", "data=2", "--model", "/nowhere.gguf"], 1, "/nowhere.gguf");
    assert_all_say(2, &["--mesh", "data=2", "--prompts", "/nowhere.jsonl"], 1, "/nowhere.jsonl");
    assert_all_say(2, &["--mesh", "model=2", "--chat"], 1, "no chat template");
    // Before MPI begins.
    for (mesh, sentence) in [("rows=2", "no axis is called"), ("data=0", "1 or more"), ("data=2,data=2", "given twice")]
    {
        let out = output(1, &["--mesh", mesh]);
        assert!(text(&out.stderr).contains(sentence) && !out.status.success(), "{mesh}: {}", text(&out.stderr));
    }
}

/// A process of each started program that has another text than the others, which only a different argument makes.
#[test]
fn processes_that_disagree_say_so() {
    let program = env!("CARGO_BIN_EXE_kvlane");
    let one = ["generate", "--mesh", "model=2", "--prompt", "a"];
    let other = ["generate", "--mesh", "model=2", "--prompt", "b"];
    let mut command = Command::new("mpirun");
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command.args(["--oversubscribe", "-n", "1", program]).args(one).args([":", "-n", "1", program]).args(other);
    let out = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(text(&out.stderr).matches("the command line is generate").count(), 2, "{}", text(&out.stderr));
}

/// Starts many long requests and waits until something was written. They would take minutes, so that none ends all before a signal does.
fn running(processes: usize, mesh: &str, patience: &str) -> (Child, Vec<u32>) {
    let model = model();
    let prompts = model.with_extension("jsonl");
    std::fs::write(&prompts, "{\"prompt\":\"And it came to pass\",\"max_tokens\":2900}\n".repeat(500)).unwrap();
    let (model, prompts) = (model.to_str().unwrap(), prompts.to_str().unwrap());
    let args = ["--model", model, "--prompts", prompts, "--slots", "2", "--mesh", mesh, "--mesh-patience", patience];
    let mut child = mpirun(processes, &args).spawn().unwrap();
    let mut first = [0; 8];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let parent = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let ranks: Vec<u32> = all.filter(|&pid| parent(pid) == Some(child.id())).collect();
    assert_eq!(ranks.len(), processes, "the processes that mpirun has started");
    (child, ranks)
}

fn signal(pid: u32, signal: i32) {
    // SAFETY: it sends a signal to a process of this test.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// The sentences of processes, when the last of them has ended.
fn sentences(mut child: Child) -> Vec<String> {
    let stderr = BufReader::new(child.stderr.take().unwrap());
    // mpirun would wait for its reader.
    let stdout = std::thread::spawn({
        let mut stdout = child.stdout.take().unwrap();
        move || std::io::copy(&mut stdout, &mut std::io::sink())
    });
    let lines = stderr.lines().map_while(Result::ok).filter(|line| line.contains(": error: ")).collect();
    assert!(!child.wait().unwrap().success());
    stdout.join().unwrap().unwrap();
    lines
}

#[test]
fn the_death_of_a_process_ends_the_others() {
    for victim in [0, 3] {
        let (child, ranks) = running(4, "model=2,sequence=2", "600");
        signal(ranks[victim], libc::SIGKILL);
        let said = sentences(child);
        let ended = said.iter().filter(|line| line.contains("another process of the mesh has ended")).count();
        assert_eq!(ended, 3, "{said:?}");
        for pid in ranks {
            assert!(!Path::new(&format!("/proc/{pid}/exe")).exists(), "{pid} is still there");
        }
    }
}

#[test]
fn a_process_that_stands_still_ends_all() {
    let (child, ranks) = running(4, "model=2,sequence=2", "3");
    signal(ranks[2], libc::SIGSTOP);
    let said = sentences(child);
    assert!(said.iter().any(|line| line.contains("has not answered for 3 seconds")), "{said:?}");
}

#[test]
fn an_interrupt_of_one_ends_all_at_a_token() {
    let (child, ranks) = running(4, "data=1,model=2,sequence=2", "600");
    signal(ranks[3], libc::SIGINT);
    let out = child.wait_with_output().unwrap();
    let (events, notes) = (text(&out.stdout), text(&out.stderr));
    assert!(events.contains(r#""finish":"cancelled""#) && notes.contains("tokens/s"), "{notes}");
    assert_eq!(out.status.code(), Some(130), "{notes}");
}
