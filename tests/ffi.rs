//! The C ABI from the caller's side: compiles the programs of `ffi-tests` against the shared and the static library,
//! and runs them.
//!
//! `CC` and `CXX` select the compilers. When the tests run under an emulator (for another architecture than the
//! machine's), the compilers are `<arch>-linux-gnu-gcc` and `-g++`, and programs run under `qemu-<arch>`.
//! `KVLANE_FFI_LIBRARIES` is a directory with libraries to test instead of those of this build, and
//! `KVLANE_FFI_SANITIZE` is the argument of `-fsanitize=`. Together they test libraries that were built with a
//! sanitizer.
#![cfg(all(feature = "capi", target_os = "linux"))]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Every symbol that the shared library exports. An addition extends the ABI for good.
const EXPORTS: &[&str] = &[
    "kvl_abi_version",
    "kvl_advise_huge_pages",
    "kvl_alibi_slopes",
    "kvl_attention",
    "kvl_attention_chunks",
    "kvl_attention_chunks_states_len",
    "kvl_attention_chunks_workspace_size",
    "kvl_attention_with_prefix",
    "kvl_attention_with_prefix_workspace_size",
    "kvl_attention_workspace_size",
    "kvl_cache_advance",
    "kvl_cache_copy_pages",
    "kvl_cache_copy_prefix",
    "kvl_cache_defragment",
    "kvl_cache_evict",
    "kvl_cache_evict_running",
    "kvl_cache_insert_sequence",
    "kvl_cache_reorder",
    "kvl_cache_reorder_table",
    "kvl_cache_reorder_table_workspace_size",
    "kvl_cache_reorder_workspace_size",
    "kvl_cache_reset",
    "kvl_cache_set_lengths",
    "kvl_cache_set_table_tokens",
    "kvl_cache_truncate",
    "kvl_context_attention_kernel_names",
    "kvl_context_create",
    "kvl_context_destroy",
    "kvl_context_isa",
    "kvl_context_kernel_name",
    "kvl_context_set_tuning",
    "kvl_context_tuning",
    "kvl_context_v_packing",
    "kvl_hadamard",
    "kvl_hadamard_block",
    "kvl_isa_available",
    "kvl_isa_name",
    "kvl_kernel_count",
    "kvl_kernel_info_at",
    "kvl_kv_read",
    "kvl_kv_write",
    "kvl_last_error",
    "kvl_merge_chunks",
    "kvl_merge_chunks_workspace_size",
    "kvl_merge_states",
    "kvl_plan_advance",
    "kvl_plan_create",
    "kvl_plan_destroy",
    "kvl_plan_set_table",
    "kvl_plan_update",
    "kvl_pack_row_pairs",
    "kvl_repeat_kv",
    "kvl_rms_norm",
    "kvl_rms_norm_rope",
    "kvl_rope",
    "kvl_rope_frequencies",
    "kvl_rope_table",
    "kvl_shard_from_rank",
    "kvl_shard_heads",
    "kvl_shard_keys",
    "kvl_shard_lengths",
    "kvl_shard_sequences",
    "kvl_shard_slots",
    "kvl_shard_view",
    "kvl_status_string",
    "kvl_thread_pool_create",
    "kvl_thread_pool_destroy",
    "kvl_thread_pool_runner",
    "kvl_unpack_row_pairs",
    "kvl_version_string",
];

const C_API: &str = include_str!("../src/docs/c_api.md");

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];

/// The system libraries that the static library needs.
const SYSTEM: [&str; 3] = ["-lpthread", "-ldl", "-lm"];

#[derive(Clone, Copy, PartialEq, Debug)]
enum Language {
    C99,
    C11,
    Cpp17,
    Cpp17NoExceptions,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Linkage {
    Shared,
    Static,
    /// The program loads the library itself.
    None,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether the tests run under an emulator. `uname` is a program of the machine, so that it reports the real
/// architecture.
fn emulated() -> bool {
    static EMULATED: OnceLock<bool> = OnceLock::new();
    *EMULATED.get_or_init(|| {
        let machine = run(Command::new("uname").arg("-m"));
        machine.trim() != std::env::consts::ARCH
    })
}

/// Runs a command that must succeed; returns its output.
fn run(command: &mut Command) -> String {
    let mut output = command.output();
    // A process that another test has just begun may still hold the program's file, open for writing.
    for _ in 0..50 {
        if !matches!(&output, Err(e) if e.kind() == ErrorKind::ExecutableFileBusy) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        output = command.output();
    }
    let output = output.unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn compiler(language: Language) -> Command {
    let (variable, native, cross) = match language {
        Language::Cpp17 | Language::Cpp17NoExceptions => ("CXX", "c++", "g++"),
        _ => ("CC", "cc", "gcc"),
    };
    let name = match std::env::var(variable) {
        Ok(name) if !name.trim().is_empty() && !emulated() => name,
        _ if emulated() => format!("{}-linux-gnu-{cross}", std::env::consts::ARCH),
        _ => native.to_owned(),
    };
    let mut words = name.split_whitespace();
    let mut command = Command::new(words.next().expect("a name that is not blank"));
    command.args(words).args(WARNINGS).arg("-I").arg(root().join("include"));
    command.args(match language {
        Language::C99 => ["-std=c99", "-x", "c"],
        Language::C11 => ["-std=c11", "-x", "c"],
        Language::Cpp17 | Language::Cpp17NoExceptions => ["-std=c++17", "-x", "c++"],
    });
    if language == Language::Cpp17NoExceptions {
        command.arg("-fno-exceptions");
    }
    if let Ok(sanitizers) = std::env::var("KVLANE_FFI_SANITIZE") {
        command.arg(format!("-fsanitize={sanitizers}")).args(["-fno-sanitize-recover=all", "-g"]);
    }
    command
}

/// A directory with the libraries of this build, under the names that linker and loader expect.
fn libraries() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        // Cargo builds all crate types of the package before its integration tests, into the same directory.
        let test = std::env::current_exe().expect("the test has a path");
        let other = std::env::var_os("KVLANE_FFI_LIBRARIES").map(|d| std::path::absolute(d).expect("a directory"));
        let built = other.as_deref().unwrap_or(test.parent().expect("and a directory"));
        let directory = work_directory().join("lib");
        std::fs::create_dir_all(&directory).expect("the directory for test files can be written");
        for (file, names) in
            [("libkvlane.so", &["libkvlane.so", "libkvlane.so.0"][..]), ("libkvlane.a", &["libkvlane.a"])]
        {
            for name in names {
                let (from, to) = (built.join(file), directory.join(name));
                let _ = std::fs::remove_file(&to);
                std::os::unix::fs::symlink(&from, &to).unwrap_or_else(|e| panic!("{to:?}: {e}"));
                assert!(to.exists(), "{from:?} was not built");
            }
        }
        directory
    })
}

fn work_directory() -> PathBuf {
    // One per architecture, because a target directory can serve several.
    // Tests of a library with sanitizers may run at the same time.
    let sanitized = if std::env::var_os("KVLANE_FFI_SANITIZE").is_some() { "-sanitized" } else { "" };
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ffi-{}{sanitized}", std::env::consts::ARCH))
}

/// `name` is unique to the test, because tests run at the same time and a running program cannot be overwritten.
fn build(name: &str, source: &str, language: Language, linkage: Linkage) -> PathBuf {
    build_with(name, source, language, linkage, &[])
}

/// A program's object file, which is compiled once: with sanitizers the larger ones take a minute.
fn object(source: &str, language: Language, flags: &[&str]) -> PathBuf {
    static COMPILED: Mutex<BTreeMap<PathBuf, Arc<OnceLock<()>>>> = Mutex::new(BTreeMap::new());
    let object = work_directory().join("objects").join(format!("{source}-{language:?}.o"));
    let once = COMPILED.lock().expect("nobody panics with the lock").entry(object.clone()).or_default().clone();
    once.get_or_init(|| {
        std::fs::create_dir_all(object.parent().expect("a directory")).expect("it can be written");
        let mut command = compiler(language);
        command.args(["-D_POSIX_C_SOURCE=200809L", "-O1", "-c", "-o"]).arg(&object);
        command.arg(root().join("ffi-tests").join(source));
        if cfg!(debug_assertions) || std::env::var_os("KVLANE_FFI_SANITIZE").is_some() {
            // What the header says of the stack is said of optimised code.
            command.arg("-DSMALL_STACK=8388608");
        }
        run(command.args(flags.iter().filter(|flag| !flag.starts_with("-l"))));
    });
    object
}

/// `flags` go to the compiler and to the linker; they are the same wherever a source is built.
fn build_with(name: &str, source: &str, language: Language, linkage: Linkage, flags: &[&str]) -> PathBuf {
    let libraries = libraries();
    let program = work_directory().join(format!("{name}-{linkage:?}"));
    let mut command = compiler(language);
    command.arg("-o").arg(&program).args(["-x", "none"]).arg(object(source, language, flags)).args(flags);
    match linkage {
        Linkage::Shared => {
            let mut rpath = OsString::from("-Wl,-rpath,");
            rpath.push(libraries);
            command.arg("-L").arg(libraries).arg("-lkvlane").arg(rpath).args(["-lpthread", "-lm"]);
        }
        Linkage::Static => {
            command.arg(libraries.join("libkvlane.a")).args(SYSTEM);
        }
        Linkage::None => {
            command.args(SYSTEM);
        }
    }
    run(&mut command);
    program
}

fn execute(program: &Path) -> Command {
    let mut command = match emulated() {
        false => Command::new(program),
        true => {
            let mut command = Command::new(format!("qemu-{}", std::env::consts::ARCH));
            command.args(["-cpu", "max"]).arg(program).env("KVLANE_EMULATED", "1");
            command
        }
    };
    // Cargo's search path goes before that of the program, and may have an older library with the same name.
    command.env_remove("LD_LIBRARY_PATH");
    command
}

/// Builds a program with the shared and with the static library, runs both, and returns their output, which must be
/// equal.
fn both(source: &str, language: Language) -> String {
    let shared = run(&mut execute(&build(source, source, language, Linkage::Shared)));
    let linked_in = run(&mut execute(&build(source, source, language, Linkage::Static)));
    assert_eq!(shared, linked_in, "{source} prints another thing with the static library");
    shared
}

#[test]
fn the_header_compiles_alone() {
    for language in [Language::C99, Language::C11, Language::Cpp17] {
        run(compiler(language).arg("-fsyntax-only").arg(root().join("ffi-tests/header.c")));
    }
}

/// What a generator of bindings sees is functions of the library, and nothing with a body.
#[test]
fn inline_helpers_can_be_left_out() {
    let header = root().join("include/kvlane.h");
    let preprocessed = |flags: &[&str]| run(compiler(Language::C11).args(flags).args(["-E", "-P"]).arg(&header));
    assert_eq!(preprocessed(&[]).matches("static inline").count(), 5);
    let bare = preprocessed(&["-DKVL_NO_INLINE_HELPERS"]);
    assert!(!bare.contains("inline") && bare.contains("kvl_attention("));
}

#[test]
fn the_layout_is_the_same_on_both_sides() {
    // The constant assertions in src/capi check the Rust side; without them this test would not compile.
    for language in [Language::C11, Language::Cpp17] {
        run(compiler(language).arg("-fsyntax-only").arg(root().join("ffi-tests/layout.c")));
    }
}

#[test]
fn operations_give_known_answers() {
    let printed = both("ops.c", Language::C11);
    assert!(printed.starts_with("operations checked at "), "{printed}");
}

#[test]
fn caches_are_operated_on_as_a_whole() {
    both("cache.c", Language::C11);
}

#[test]
fn every_layout_gives_the_same_bits() {
    both("layouts.c", Language::C11);
}

#[test]
fn bad_input_is_an_error_and_writes_nothing() {
    both("errors.c", Language::C11);
}

#[test]
fn the_callers_threads_run_operations() {
    both("threads.c", Language::C11);
}

#[test]
fn forks_signals_and_small_stacks_are_as_the_header_says() {
    both("process.c", Language::C11);
}

#[test]
fn the_library_can_be_unloaded() {
    let program = build("unload", "unload.c", Language::C11, Linkage::None);
    run(execute(&program).arg(libraries().join("libkvlane.so")));
}

#[test]
fn calls_that_compute_do_not_allocate() {
    both("alloc.c", Language::C11);
}

#[test]
fn the_cpp_layer_works() {
    both("cpp.cpp", Language::Cpp17);
    both("cpp_status.cpp", Language::Cpp17NoExceptions);
}

/// With every compiler that is there, in later standards too, and without exceptions.
#[test]
fn the_cpp_layer_compiles_everywhere() {
    let others = ["g++", "clang++"].map(str::to_owned).into_iter().filter(|_| !emulated());
    let found = others.filter(|name| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success()));
    for (source, exceptions) in [("cpp.cpp", "-fexceptions"), ("cpp_status.cpp", "-fno-exceptions")] {
        let check = |command: &mut Command, standard: &str| {
            let standard = format!("-std={standard}");
            run(command.args([&standard, exceptions, "-fsyntax-only"]).arg(root().join("ffi-tests").join(source)));
        };
        // The last `-std` counts.
        for standard in ["c++17", "c++20"] {
            check(&mut compiler(Language::Cpp17), standard);
        }
        for name in found.clone() {
            for standard in ["c++17", "c++20"] {
                let mut command = Command::new(&name);
                command.args(WARNINGS).arg("-I").arg(root().join("include")).args(["-x", "c++"]);
                check(&mut command, standard);
            }
        }
    }
}

/// Each example of `ffi-tests/threads` compares what it computes with the calling thread alone.
#[test]
fn the_threads_of_other_libraries_give_the_same_bits() {
    if emulated() {
        // Threads that wait for each other by spinning would take the emulator's time.
        return;
    }
    let tbb = Path::new("/usr/include/oneapi/tbb/task_arena.h").exists();
    assert!(tbb || std::env::var_os("KVLANE_REQUIRE_TBB").is_none(), "oneTBB is not installed");
    for (name, linkage, flags) in [
        ("openmp", Linkage::Shared, &["-fopenmp"][..]),
        ("std_pool", Linkage::Static, &["-pthread"]),
        ("team", Linkage::Shared, &["-pthread"]),
        ("tbb", Linkage::Static, &["-ltbb"]),
    ] {
        if name == "tbb" && !tbb {
            eprintln!("oneTBB is not installed, and was not tested");
            continue;
        }
        let source = format!("threads/{name}.cpp");
        let printed = run(&mut execute(&build_with(name, &source, Language::Cpp17, linkage, flags)));
        assert!(printed.trim_end().ends_with("the bits of one thread"), "{printed}");
    }
}

#[test]
fn the_example_runs() {
    let printed = both("example.c", Language::C11);
    assert_eq!(printed.lines().count(), 4, "{printed}");
    assert!(printed.lines().last().is_some_and(|l| l.starts_with(" 7 tokens in the cache")), "{printed}");
}

/// Each program ends with an error if a result is not what the text beside it says.
#[test]
fn the_programs_of_the_book_run() {
    if !root().join(".ci").exists() {
        // The published crate has neither the book nor the repository's CI.
        return;
    }
    std::fs::create_dir_all(work_directory().join("book")).expect("the directory for test files can be written");
    let files = std::fs::read_dir(root().join("ffi-tests/book")).expect("the programs are there");
    let names: Vec<String> = files
        .map(|entry| entry.expect("and can be listed").file_name().into_string().expect("names are ASCII"))
        .filter(|name| name.ends_with(".c") || name.ends_with(".cpp"))
        .collect();
    assert!(names.len() >= 17, "{names:?}");
    let shared = format!("-I{}", root().join("ffi-tests/threads").display());
    for name in names {
        let language = if name.ends_with(".cpp") { Language::Cpp17 } else { Language::C11 };
        let source = format!("book/{name}");
        run(&mut execute(&build_with(&source, &source, language, Linkage::Shared, &["-pthread", &shared])));
    }
}

#[test]
fn the_example_of_the_readme_runs() {
    // With one key, the output is its value.
    assert_eq!(both("step.c", Language::C99).trim(), "1 2 3");
    assert_eq!(both("step.cpp", Language::Cpp17).trim(), "3");
}

/// The documented commands for C, word for word, warnings being errors. Cargo has built the libraries already, and so builds
/// nothing here.
#[test]
fn the_documented_commands_build_the_example() {
    if emulated() {
        // The commands are for the machine itself.
        return;
    }
    let (_, after) = C_API.split_once("<!-- c -->\n```sh\n").expect("the page has commands for C");
    let (commands, _) = after.split_once("```").expect("the commands end");
    let directory = work_directory().join("commands");
    let _ = std::fs::remove_dir_all(&directory);
    let built = directory.join("target/release");
    std::fs::create_dir_all(&built).expect("the directory for test files can be written");
    for name in ["include", "ffi-tests"] {
        std::os::unix::fs::symlink(root().join(name), directory.join(name)).expect("a link");
    }
    for name in ["libkvlane.so", "libkvlane.a"] {
        std::os::unix::fs::symlink(libraries().join(name), built.join(name)).expect("a link");
    }
    let words: Vec<String> = std::iter::once(compiler(Language::C99).get_program().to_string_lossy().into_owned())
        .chain(WARNINGS.map(str::to_owned))
        .chain(std::env::var("KVLANE_FFI_SANITIZE").ok().map(|s| format!("-fsanitize={s}")))
        .collect();
    let script = format!("cargo() {{ :; }}\ncc() {{ command {} \"$@\"; }}\n{commands}", words.join(" "));
    let printed = run(Command::new("sh").args(["-euc", &script]).current_dir(&directory));
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 8, "{printed}");
    assert_eq!(lines[..4], lines[4..], "the two libraries give different results");
    assert!(lines[3].starts_with(" 7 tokens in the cache"), "{printed}");
}

/// The library reads the documented environment variable.
#[test]
fn the_environment_lowers_the_level() {
    let program = build("environment", "ops.c", Language::C11, Linkage::Shared);
    // `ops` checks that levels and names agree, so it passes at any ceiling.
    run(execute(&program).env("KVLANE_MAX_ISA", "scalar"));
    let output = execute(&program).env("KVLANE_MAX_ISA", "fastest").output().expect("it can be started");
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains(
            "KVLANE_MAX_ISA is \"fastest\", which is none of scalar, avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx, neon, neondotprod, neoni8mm, neonbf16"
        ),
        "{text}"
    );
}

mod symbols {
    use super::*;

    fn readelf(args: &[&str], file: &Path) -> String {
        // `readelf` reads files of every architecture.
        run(Command::new("readelf").args(args).arg("-W").arg(file).env("LC_ALL", "C"))
    }

    /// (name, defined here) of the dynamic symbols.
    fn dynamic(file: &Path) -> Vec<(String, bool)> {
        let text = readelf(&["--dyn-syms"], file);
        let fields = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        fields
            .filter(|f| f.len() >= 8 && f[0].ends_with(':') && matches!(f[4], "GLOBAL" | "WEAK"))
            .map(|f| (f[7].split('@').next().unwrap_or_default().to_owned(), f[6] != "UND"))
            .collect()
    }

    fn allowed() -> BTreeSet<String> {
        EXPORTS.iter().map(|&s| s.to_owned()).collect()
    }

    #[test]
    fn only_the_abi_is_exported() {
        let exported: BTreeSet<String> =
            dynamic(&libraries().join("libkvlane.so")).into_iter().filter(|s| s.1).map(|s| s.0).collect();
        // Sanitizers and profilers add symbols; an installed library has one with the name of its symbols' version.
        let sanitized = std::env::var_os("KVLANE_FFI_SANITIZE").is_some();
        let foreign = |name: &String| sanitized && name.starts_with("__") || name == "KVLANE_0";
        let exported: BTreeSet<String> = exported.into_iter().filter(|name| !foreign(name)).collect();
        assert_eq!(exported, allowed());
    }

    /// What installs the library has lists and versions of its own.
    #[test]
    fn what_is_installed_agrees_with_the_exports() {
        let read = |file: &str| std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let (map, manifest, header) = (read("include/kvlane.map"), read("Cargo.toml"), read("include/kvlane.h"));
        let listed = map.lines().filter_map(|line| line.trim().strip_suffix(';')).filter(|n| n.starts_with("kvl_"));
        assert_eq!(listed.map(str::to_owned).collect::<BTreeSet<_>>(), allowed());
        let version = header.lines().find_map(|l| l.strip_prefix("#define KVL_ABI_VERSION ")).expect("a version");
        let version = version.trim().parse::<u32>().expect("a number");
        let (major, minor) = (version >> 16, version & 0xffff);
        assert!(map.contains(&format!("\nKVLANE_{major} {{")), "kvlane.map has no KVLANE_{major}");
        let (_, library) = manifest.split_once("[package.metadata.capi.library]\n").expect("a table for cargo-c");
        assert!(library.starts_with(&format!("version = \"{major}.{minor}.0\"\n")), "cargo-c has another version");
        let package = format!("set(PACKAGE_VERSION \"{}\")", env!("CARGO_PKG_VERSION"));
        assert!(read("include/kvlaneConfigVersion.cmake").contains(&package), "CMake has another version");
    }

    #[test]
    fn the_header_declares_every_export() {
        let header = std::fs::read_to_string(root().join("include/kvlane.h")).expect("the header is committed");
        let declared: BTreeSet<String> = header
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '('))
            .filter_map(|word| word.split_once('(').map(|w| w.0))
            .filter(|name| name.starts_with("kvl_"))
            .map(str::to_owned)
            .collect();
        let inline =
            ["kvl_as_const", "kvl_make_causal_attention", "kvl_make_const_view", "kvl_make_kv_write", "kvl_make_view"]
                .map(str::to_owned);
        assert_eq!(declared, allowed().into_iter().chain(inline).collect());
    }

    #[test]
    fn every_function_states_thread_safety_and_bad_input() {
        let header = std::fs::read_to_string(root().join("include/kvlane.h")).expect("the header is committed");
        for name in EXPORTS {
            let at = header.find(&format!("{name}(")).expect("every export is declared");
            let comment = &header[header[..at].rfind("/**").expect("every function has a comment")..at];
            assert_eq!(comment.matches("*/").count(), 1, "{name} has no comment of its own");
            for line in [" * Thread safety: ", " * Bad input: "] {
                assert!(comment.contains(line), "the comment of {name} has no line{line}");
            }
        }
    }

    /// The enumerations are integers with named values.
    #[test]
    fn every_enumerator_carries_the_prefix_of_its_enumeration() {
        let header = std::fs::read_to_string(root().join("include/kvlane.h")).expect("the header is committed");
        let enumerations: Vec<String> = header
            .lines()
            .filter_map(|line| line.strip_prefix("typedef ")?.strip_suffix(';')?.split_once("int32_t "))
            .map(|(_, name)| format!("{}_", name.to_uppercase()))
            .collect();
        assert!(enumerations.len() >= 10, "{enumerations:?}");
        let mut counts = vec![0; enumerations.len()];
        for line in header.lines() {
            let Some((name, value)) = line.strip_prefix("#define ").and_then(|rest| rest.split_once(' ')) else {
                continue;
            };
            if value.parse::<u32>().is_err() || ["KVL_ABI_VERSION", "KVL_SPLIT_GRID"].contains(&name) {
                continue;
            }
            let of = enumerations.iter().position(|prefix| name.starts_with(prefix.as_str()));
            counts[of.unwrap_or_else(|| panic!("{name} carries none of {enumerations:?}"))] += 1;
        }
        let empty: Vec<_> = enumerations.iter().zip(&counts).filter(|&(_, &n)| n == 0).collect();
        assert!(empty.is_empty(), "{empty:?}");
    }

    #[test]
    fn every_export_is_used_by_a_program() {
        let mut used = BTreeSet::new();
        for (source, language) in [
            ("ops.c", Language::C11),
            ("cache.c", Language::C11),
            ("layouts.c", Language::C11),
            ("errors.c", Language::C11),
            ("threads.c", Language::C11),
            ("cpp.cpp", Language::Cpp17),
        ] {
            let text = readelf(&["--syms"], &object(source, language, &[]));
            for line in text.lines().filter(|l| l.contains(" UND ")) {
                used.extend(line.split_whitespace().last().filter(|n| n.starts_with("kvl_")).map(str::to_owned));
            }
        }
        assert_eq!(used, allowed());
    }

    #[test]
    fn the_soname_is_the_major_version_of_the_abi() {
        let header = std::fs::read_to_string(root().join("include/kvlane.h")).expect("the header is committed");
        let version = header.lines().find_map(|l| l.strip_prefix("#define KVL_ABI_VERSION ")).expect("a version");
        let major = version.trim().parse::<u32>().expect("a number") >> 16;
        let text = readelf(&["-d"], &libraries().join("libkvlane.so"));
        let soname = format!("Library soname: [libkvlane.so.{major}]");
        assert!(text.contains(&soname), "no {soname} in\n{text}");
    }
}

/// A decoder in C generates the tokens that the driver generates.
#[cfg(feature = "driver")]
mod decode {
    use super::*;
    use kvlane::driver::argmax;
    use kvlane::driver::gguf::Gguf;
    use kvlane::driver::{Cache, Decoder, FeedForward, Logits, Matrix, ModelFile, Scratch, Stretch, Threads};
    use kvlane::{DType, RopeScaling};
    use std::io::Write;

    const STEPS: usize = 48;

    fn tiny() -> ModelFile {
        ModelFile::from_gguf(Gguf::from_static(kvlane_tiny::MODEL).expect("a GGUF file")).expect("a model")
    }

    /// Writes a model in the format of `ffi-tests/decode.c`.
    fn export(file: &ModelFile, path: &Path) -> std::io::Result<()> {
        let (c, weights) = (file.config(), file.weights(&|_, _| ()).expect("weights"));
        assert_eq!(c.ropes[0].stretch, Stretch::Fixed(RopeScaling::None), "the C program knows no scaling");
        let mut out = std::io::BufWriter::new(std::fs::File::create(path)?);
        out.write_all(b"KVLDECO1")?;
        let sizes = [c.vocab, c.dim, c.layers.len(), c.heads, c.kv_heads, c.head_dim, c.ffn_dim, c.ropes[0].rotary_dim];
        let flags = [c.ropes[0].pairing as usize, usize::from(weights.output.is_none())];
        for n in sizes.into_iter().chain(flags) {
            out.write_all(&i32::try_from(n).expect("a small number").to_le_bytes())?;
        }
        for x in [c.ropes[0].base, f64::from(c.rms_eps)] {
            out.write_all(&x.to_le_bytes())?;
        }
        let mut floats = |data: &[f32]| data.iter().try_for_each(|x| out.write_all(&x.to_le_bytes()));
        let every = |m: &Matrix| (0..m.rows()).flat_map(|i| m.row(i)).collect::<Vec<f32>>();
        floats(&every(&weights.embedding))?;
        for layer in &weights.layers {
            floats(&layer.attn_norm)?;
            floats(&every(&layer.qkv))?;
            floats(&every(&layer.attn_out))?;
            floats(&layer.ffn_norm)?;
            let FeedForward::Dense(ffn) = &layer.ffn else { panic!("the C program knows no experts") };
            floats(&every(&ffn.gate_up))?;
            floats(&every(&ffn.down))?;
        }
        floats(&weights.output_norm)?;
        if let Some(output) = &weights.output {
            floats(&every(output))?;
        }
        out.flush()
    }

    /// The driver's likeliest tokens, and the smallest distance of a best logit from the second best.
    fn greedy(decoder: &Decoder, prompt: &[u32], dtype: DType) -> (Vec<u32>, f32) {
        let mut cache = Cache::new(decoder.config(), 1, prompt.len() + STEPS, dtype).expect("a cache");
        let mut scratch = Scratch::default();
        let (mut tokens, mut next, mut lead) = (Vec::new(), prompt.to_vec(), f32::INFINITY);
        while tokens.len() < STEPS {
            let logits = decoder.forward(&mut cache, &mut scratch, 0, &[&next], Logits::Last).expect("logits");
            let best = argmax(&logits).expect("a token");
            let others = logits.iter().enumerate().filter(|&(i, _)| i != best as usize).map(|(_, &x)| x);
            lead = lead.min(logits[best as usize] - others.fold(f32::NEG_INFINITY, f32::max));
            tokens.push(best);
            next = vec![best];
        }
        (tokens, lead)
    }

    #[test]
    fn a_c_program_decodes_the_same_tokens() {
        let file = tiny();
        let tokenizer = file.tokenizer().expect("a tokenizer");
        std::fs::create_dir_all(work_directory()).expect("the directory for test files can be written");
        let path = work_directory().join("tiny.kvldeco");
        export(&file, &path).expect("the model can be written");
        let weights = file.weights(&|_, _| ()).expect("weights");
        let decoder = Decoder::new(file.config().clone(), weights, 0, None, Threads::new(1).expect("a thread"))
            .expect("a decoder")
            .exact(true);
        let programs = [Linkage::Shared, Linkage::Static].map(|l| build("decode", "decode.c", Language::C11, l));
        for (prompt, dtype, program) in [
            ("In the beginning", DType::F32, &programs[0]),
            ("And the LORD said unto Moses", DType::Bf16, &programs[1]),
            ("Blessed are the", DType::F16, &programs[0]),
        ] {
            let ids = tokenizer.encode(prompt, true).expect("tokens");
            let (wanted, lead) = greedy(&decoder, &ids, dtype);
            // The linear layers of the two sum in different orders, which would decide a tie.
            assert!(lead > 1e-3, "{prompt:?} has a lead of only {lead}: choose another prompt");
            let printed = run(execute(program)
                .arg(&path)
                .args([dtype.name(), &STEPS.to_string()])
                .args(ids.iter().map(u32::to_string)));
            let got: Vec<u32> = printed.lines().map(|line| line.parse().expect("a number")).collect();
            assert_eq!(got, wanted, "{prompt:?} with {dtype}");
        }
    }
}
