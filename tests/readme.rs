//! The README and the pages of the documentation agree with the code.

use kvlane::{CacheFormat, Isa, Op, Precision, kernels};

const README: &str = include_str!("../README.md");

/// The cells of the table row whose first cell is `` `name` ``.
fn row(name: &str) -> Vec<String> {
    let start = format!("| `{name}` |");
    let line = README.lines().find(|l| l.starts_with(&start)).unwrap_or_else(|| panic!("the README has no row {name}"));
    line.trim_matches('|').split('|').map(|cell| cell.trim().to_string()).collect()
}

#[test]
fn the_table_of_operations_is_the_registry() {
    for op in Op::ALL {
        let cells = row(op.name());
        // A partial level is listed for its own kernels only, with the types in brackets.
        let levels: Vec<&str> = cells[2].split(", ").collect();
        let named = |text: &str| -> Vec<CacheFormat> {
            let words: Vec<&str> = text.split([' ', ',', ';']).collect();
            CacheFormat::ALL.into_iter().filter(|t| words.contains(&t.name())).collect()
        };
        // "<types>[, each to each][, and to <formats>]" or "<formats> to <types>".
        let each_to_each = cells[1].contains("each to each");
        let (types, also) = match cells[1].split_once(", and to ") {
            Some((types, also)) => (named(types), named(also)),
            None => (named(&cells[1]), Vec::new()),
        };
        let to = cells[1].split_once(" to ").filter(|_| !each_to_each);
        let expected: Vec<String> = Isa::ALL
            .into_iter()
            .filter(|&level| !level.is_partial() || op == Op::Attention)
            .map(|level| match level {
                Isa::AvxVnni | Isa::Avx512Vnni | Isa::NeonDotprod | Isa::NeonI8mm => {
                    format!("{level} (int8 and blocks)")
                }
                Isa::Amx => format!("{level} (bf16 and int8)"),
                level if level.is_partial() => format!("{level} (bf16)"),
                level => level.to_string(),
            })
            .collect();
        assert_eq!(levels, expected, "levels of {}", op.name());
        for kernel in kernels().filter(|k| (k.isa.is_partial() || k.precision.is_some()) && k.op == op) {
            let integer = kernel.precision == Some(Precision::Integer);
            let promised = if integer {
                kernel.src == CacheFormat::Int8 || kernel.src.is_blocks()
            } else {
                kernel.src == CacheFormat::Bf16
            };
            assert!(promised && kernel.dst == kernel.src, "{}", kernel.name);
        }
        for level in Isa::ALL.into_iter().filter(|l| l.is_built() && !l.is_partial()) {
            let mut promised = Vec::new();
            if let Some((from, to)) = to {
                for src in named(from) {
                    promised.extend(named(to).into_iter().map(|dst| (src.name(), dst.name())));
                }
            } else {
                for src in &types {
                    let targets = types.iter().filter(|&dst| src == dst || each_to_each);
                    promised.extend(targets.chain(&also).map(|dst| (src.name(), dst.name())));
                }
            }
            let mut found: Vec<_> = kernels()
                .filter(|k| k.op == op && k.isa == level && k.precision.is_none())
                .map(|k| (k.src.name(), k.dst.name()))
                .collect();
            promised.sort();
            found.sort();
            assert_eq!(promised, found, "types of {} at {level}", op.name());
        }
    }
}

/// The first program of a text in a language.
fn example<'a>(text: &'a str, language: &str) -> &'a str {
    let (_, after) = text.split_once(&format!("```{language}\n")).expect("the text has such an example");
    let (example, _) = after.split_once("```").expect("the C example ends");
    example
}

#[test]
fn the_c_examples_are_those_that_are_compiled() {
    let page = include_str!("../src/docs/c_api.md");
    assert_eq!(example(README, "c"), include_str!("../ffi-tests/step.c"));
    assert_eq!(example(page, "c"), include_str!("../ffi-tests/example.c"));
    assert_eq!(example(page, "cpp"), include_str!("../ffi-tests/step.cpp"));
}

#[test]
fn c_names_exist() {
    let header = include_str!("../include/kvlane.h");
    let chapters = if has_book() { files("include/book", "md") } else { Vec::new() };
    let pages = [
        README,
        include_str!("../CHANGELOG.md"),
        include_str!("../CONTRIBUTING.md"),
        include_str!("../src/masks.rs"),
        include_str!("../src/docs/c_api.md"),
        include_str!("../src/docs/caches.md"),
        include_str!("../src/docs/glossary.md"),
    ];
    for text in pages.into_iter().chain(chapters.iter().map(|(_, text)| text.as_str())) {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|word| word.starts_with("kvl_") || word.starts_with("KVL_")) {
            assert!(header.contains(name), "the header has no {name}");
        }
    }
}

/// Whether this is the repository; the published crate has no CI and no book of the C API.
fn has_book() -> bool {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".ci").exists()
}

/// The files of a directory with an extension: their names and texts.
fn files(directory: &str, extension: &str) -> Vec<(String, String)> {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&directory).unwrap_or_else(|e| panic!("{directory:?}: {e}")) {
        let path = entry.expect("files can be listed").path();
        if path.extension().is_some_and(|e| e == extension) {
            let name = path.file_name().and_then(|name| name.to_str()).expect("names are ASCII").to_owned();
            found.push((name, std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"))));
        }
    }
    found
}

/// The book of the C API has no code but that of its programs, which `tests/ffi.rs` runs, and uses all of them.
#[test]
fn the_book_shows_programs_that_run() {
    if !has_book() {
        return;
    }
    let chapters = files("include/book", "md");
    let programs: Vec<_> = ["c", "cpp", "h", "sh"].iter().flat_map(|e| files("ffi-tests/book", e)).collect();
    assert!(chapters.len() >= 20 && programs.len() >= 18);
    let mut shown = std::collections::BTreeSet::new();
    for (chapter, text) in &chapters {
        assert!(!text.contains("```"), "{chapter} has code that no test runs");
        for line in text.lines().filter_map(|line| line.strip_prefix("\\snippet ")) {
            let (file, block) = line.split_once(' ').unwrap_or_else(|| panic!("{chapter}: {line}"));
            let (_, program) = programs.iter().find(|(name, _)| name == file).unwrap_or_else(|| panic!("no {file}"));
            assert_eq!(program.matches(&format!("[{block}]")).count(), 2, "{file} has no block {block}");
            assert!(shown.insert((file, block)), "{chapter} shows block {block} of {file} again");
        }
    }
    for (name, program) in &programs {
        let blocks = program.lines().filter_map(|line| line.trim().strip_prefix("/* [")?.strip_suffix("] */"));
        for block in blocks {
            assert!(shown.contains(&(name.as_str(), block)), "no chapter shows block {block} of {name}");
        }
    }
}

#[test]
fn links_to_files_lead_somewhere() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for text in [README, include_str!("../CONTRIBUTING.md")] {
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
        for target in targets.filter(|target| !target.starts_with(['#', 'h'])) {
            if target.starts_with("include/book") && !has_book() {
                continue;
            }
            assert!(root.join(target).exists(), "{target} does not exist");
        }
    }
}
