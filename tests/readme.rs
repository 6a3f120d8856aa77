//! The README and the pages of the documentation agree with the code.

use kvlane::{CacheFormat, Isa, Op, kernels};

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
                Isa::Avx512Vnni => format!("{level} (int8)"),
                level if level.is_partial() => format!("{level} (bf16)"),
                level => level.to_string(),
            })
            .collect();
        assert_eq!(levels, expected, "levels of {}", op.name());
        for kernel in kernels().filter(|k| k.isa.is_partial() && k.op == op) {
            let format = if kernel.isa == Isa::Avx512Vnni { CacheFormat::Int8 } else { CacheFormat::Bf16 };
            assert_eq!((kernel.op, kernel.src, kernel.dst), (Op::Attention, format, format));
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
            let mut found: Vec<_> =
                kernels().filter(|k| k.op == op && k.isa == level).map(|k| (k.src.name(), k.dst.name())).collect();
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
    let texts = [
        README,
        include_str!("../CHANGELOG.md"),
        include_str!("../CONTRIBUTING.md"),
        include_str!("../src/masks.rs"),
        include_str!("../src/docs/c_api.md"),
        include_str!("../src/docs/caches.md"),
        include_str!("../src/docs/glossary.md"),
    ];
    for text in texts {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|word| word.starts_with("kvl_") || word.starts_with("KVL_")) {
            assert!(header.contains(name), "the header has no {name}");
        }
    }
}

#[test]
fn links_to_files_lead_somewhere() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for text in [README, include_str!("../CONTRIBUTING.md")] {
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
        for target in targets.filter(|target| !target.starts_with(['#', 'h'])) {
            assert!(root.join(target).exists(), "{target} does not exist");
        }
    }
}
