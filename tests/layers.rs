//! The layers that the crate's documentation promises are what the imports say: no module imports from a layer above its own, and the
//! graph of top-level modules has no cycle.
//!
//! The test reads the sources: every path that begins with `crate::` or `super::`, in a `use` or elsewhere, code that only tests
//! compile left out. A path to a re-export at the crate root counts as one to the module that the item comes from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Top-level modules, the lowest layer first. Modules of one layer may import each other, as long as there is no cycle.
const LAYERS: &[(&str, &[&str])] = &[
    (
        "foundation",
        &["error", "dtype", "format", "isa", "cpu", "view", "cache_view", "layout", "parallel", "tuning", "memory"],
    ),
    ("problem", &["problem"]),
    ("kernels", &["kernels"]),
    ("context", &["context"]),
    ("operations", &["ops"]),
    ("callers", &["capi", "driver", "bench"]),
];

/// Modules that hold documentation and no code.
const PAGES: &[&str] = &["docs", "masks"];

/// Paths that are forbidden although they lead downwards. What the crate root re-exports is for everyone.
const NOT_DIRECTLY: &[(&str, &str)] = &[("capi", "kernels"), ("driver", "kernels"), ("bench", "kernels")];

/// One path in the sources.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    from: String,
    to: String,
    /// The path goes by a re-export of the crate root.
    by_root: bool,
    /// Where it stands, for the message.
    at: String,
}

/// The tokens that matter: identifiers, `::`, and single characters; comments, strings and characters are left out.
fn tokens(source: &str) -> Vec<(String, usize)> {
    let chars: Vec<char> = source.chars().collect();
    let (mut out, mut i, mut line) = (Vec::new(), 0, 1);
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    while i < chars.len() {
        let start = i;
        let c = chars[i];
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            while i < chars.len() {
                match (chars[i], at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 {
                    break;
                }
            }
        } else if c == 'r' && (at(i + 1) == '"' || at(i + 1) == '#' && matches!(at(i + 2), '"' | '#')) {
            let hashes = chars[i + 1..].iter().take_while(|&&c| c == '#').count();
            i += hashes + 2;
            let closes = |i: usize| chars[i] == '"' && (1..=hashes).all(|k| at(i + k) == '#');
            while i < chars.len() && !closes(i) {
                i += 1;
            }
            i += hashes + 1;
        } else if c == '"' {
            i += 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < chars.len() && chars[i] != '\'' {
                i += 1;
            }
            i += 1;
        } else if c.is_alphanumeric() || c == '_' {
            while at(i).is_alphanumeric() || at(i) == '_' {
                i += 1;
            }
            out.push((chars[start..i].iter().collect(), line));
        } else if c == ':' && at(i + 1) == ':' {
            i += 2;
            out.push(("::".to_owned(), line));
        } else {
            i += 1;
            if !c.is_whitespace() {
                out.push((c.to_string(), line));
            }
        }
        line += chars[start..i.min(chars.len())].iter().filter(|&&c| c == '\n').count();
    }
    out
}

/// The position after the item that begins at `i`: behind its `;`, or behind its outermost braces.
fn item_end(tokens: &[(String, usize)], mut i: usize) -> usize {
    let mut depth = 0;
    while i < tokens.len() {
        match tokens[i].0.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth -= 1;
                if depth == 0 && tokens[i].0 == "}" {
                    return i + 1;
                }
            }
            ";" if depth == 0 => return i + 1,
            _ => (),
        }
        i += 1;
    }
    i
}

/// Without the items that `#[cfg(test)]` or `#![cfg(test)]` stands before.
fn without_tests(tokens: Vec<(String, usize)>) -> Vec<(String, usize)> {
    let is = |i: usize, words: &[&str]| {
        words.iter().enumerate().all(|(k, word)| tokens.get(i + k).is_some_and(|token| token.0 == *word))
    };
    let (mut out, mut i) = (Vec::new(), 0);
    while i < tokens.len() {
        if is(i, &["#", "!", "[", "cfg", "(", "test", ")", "]"]) {
            return out;
        }
        if is(i, &["#", "[", "cfg", "(", "test", ")", "]"]) {
            i = item_end(&tokens, i + 7);
        } else {
            out.push(tokens[i].clone());
            i += 1;
        }
    }
    out
}

/// All paths of the tree at `i`, which a path or a brace of a `use` begins; each begins with `base`.
fn paths(tokens: &[(String, usize)], i: &mut usize, base: &[String], out: &mut Vec<Vec<String>>) {
    let word = |i: usize| tokens.get(i).map_or("", |token| token.0.as_str());
    if word(*i) == "{" {
        *i += 1;
        while !matches!(word(*i), "}" | "") {
            let before = *i;
            paths(tokens, i, base, out);
            // What follows a path: `as name` and the comma.
            while !matches!(word(*i), "," | "}" | "") {
                *i += 1;
            }
            *i += usize::from(word(*i) == ",");
            assert!(*i > before, "no progress");
        }
        *i += 1;
        return;
    }
    let mut path = base.to_vec();
    loop {
        match word(*i) {
            "{" => return paths(tokens, i, &path, out),
            segment => path.push(segment.to_owned()),
        }
        *i += 1;
        if word(*i) != "::" || matches!(word(*i + 1), "<" | "") {
            break;
        }
        *i += 1;
    }
    out.push(path);
}

/// The paths of a file that name something of this crate, from the crate root on. `module` is the file's own path.
fn crate_paths(source: &str, module: &[String]) -> Vec<(Vec<String>, usize)> {
    let tokens = without_tests(tokens(source));
    let word = |i: usize| tokens.get(i).map_or("", |token| token.0.as_str());
    let mut found = Vec::new();
    // The modules that the position is in, with the depth of braces at which each of them ends.
    let (mut inside, mut depth) = (Vec::<(String, usize)>::new(), 0);
    let mut i = 0;
    while i < tokens.len() {
        match word(i) {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                if inside.last().is_some_and(|m| m.1 == depth) {
                    inside.pop();
                }
            }
            "mod" if word(i + 2) == "{" => inside.push((word(i + 1).to_owned(), depth)),
            start @ ("crate" | "super") if word(i + 1) == "::" && (i == 0 || word(i - 1) != "::") => {
                let line = tokens[i].1;
                let mut base: Vec<String> = module.to_vec();
                base.extend(inside.iter().map(|m| m.0.clone()));
                if start == "crate" {
                    base.clear();
                } else {
                    base.pop();
                }
                i += 2;
                while word(i) == "super" && word(i + 1) == "::" {
                    base.pop();
                    i += 2;
                }
                let mut here = Vec::new();
                paths(&tokens, &mut i, &base, &mut here);
                found.extend(here.into_iter().map(|path| (path, line)));
                continue;
            }
            _ => (),
        }
        i += 1;
    }
    found
}

/// The modules that the crate root declares, and what it re-exports: name, and the module that it comes from.
fn root(source: &str) -> (BTreeSet<String>, BTreeMap<String, String>) {
    let tokens = without_tests(tokens(source));
    let word = |i: usize| tokens.get(i).map_or("", |token| token.0.as_str());
    let (mut modules, mut names) = (BTreeSet::new(), BTreeMap::new());
    let mut i = 0;
    while i < tokens.len() {
        if word(i) == "mod" && word(i + 2) == ";" {
            modules.insert(word(i + 1).to_owned());
        } else if word(i) == "use" && i > 0 && matches!(word(i - 1), "pub" | ")") {
            // For everyone, or for the crate: `pub use`, `pub(crate) use`.
            let end = item_end(&tokens, i);
            let mut at = i + 1;
            let mut exports = Vec::new();
            // A path by `crate::` or `self::` is the same.
            while matches!(word(at), "crate" | "self") && word(at + 1) == "::" {
                at += 2;
            }
            paths(&tokens, &mut at, &[], &mut exports);
            for path in exports {
                names.insert(path.last().expect("a path has a segment").clone(), path[0].clone());
            }
            i = end;
            continue;
        }
        i += 1;
    }
    (modules, names)
}

fn files(directory: &Path, out: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    for entry in entries {
        let path = entry.expect("an entry of the directory").path();
        if path.is_dir() {
            files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// `src/a/b.rs` and `src/a/b/mod.rs` are both `[a, b]`.
fn module_of(file: &Path) -> Vec<String> {
    let mut parts: Vec<String> =
        file.with_extension("").components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

fn imports() -> (BTreeSet<String>, Vec<Import>) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (modules, names) = root(&read(&source.join("lib.rs")));
    let mut all = Vec::new();
    files(&source, &mut all);
    all.sort();
    let mut found = Vec::new();
    for file in &all {
        let relative = file.strip_prefix(&source).expect("a file of the directory");
        let module = module_of(relative);
        if module == ["lib"] || module[0] == "bin" {
            continue;
        }
        for (path, line) in crate_paths(&read(file), &module) {
            let at = format!("src/{}:{line}", relative.display());
            let (to, by_root) = match names.get(&path[0]) {
                // A module and a function may have one name.
                Some(from) if path.len() == 1 => (from.clone(), true),
                _ if modules.contains(&path[0]) => (path[0].clone(), false),
                Some(from) => (from.clone(), true),
                None => panic!("{at}: {path:?} is neither a module nor a re-export of the crate root"),
            };
            found.push(Import { from: module[0].clone(), to, by_root, at });
        }
    }
    (modules, found)
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|(_, modules)| modules.contains(&module))
}

#[test]
fn every_module_has_a_layer() {
    let (modules, _) = imports();
    let known: BTreeSet<String> =
        LAYERS.iter().flat_map(|layer| layer.1).chain(PAGES).map(|&name| name.to_owned()).collect();
    assert_eq!(modules, known, "the modules of src/lib.rs, and those of LAYERS and PAGES");
}

#[test]
fn no_layer_imports_from_above() {
    let (_, imports) = imports();
    let mut wrong = Vec::new();
    for import in imports.iter().filter(|import| import.from != import.to) {
        let Import { from, to, by_root, at } = import;
        let (Some(here), Some(there)) = (layer(from), layer(to)) else {
            wrong.push(format!("{at}: {from} imports {to}, and one of them has no layer"));
            continue;
        };
        if there > here {
            wrong.push(format!("{at}: {from} ({}) imports {to} ({}), which is above", LAYERS[here].0, LAYERS[there].0));
        }
        if !by_root && NOT_DIRECTLY.contains(&(from, to)) {
            wrong.push(format!("{at}: {from} imports {to} directly"));
        }
    }
    assert!(wrong.is_empty(), "{} imports that the layers forbid:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_graph_of_modules_has_no_cycle() {
    let (modules, imports) = imports();
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = modules.iter().map(|m| (m.as_str(), BTreeSet::new())).collect();
    for import in imports.iter().filter(|import| import.from != import.to) {
        graph.get_mut(import.from.as_str()).expect("a module of the crate root").insert(&import.to);
    }
    // Takes away modules that import nothing of what is left, and those that nothing of it imports; a cycle stays.
    let end = |graph: &BTreeMap<&str, BTreeSet<&str>>| {
        let imported: BTreeSet<&str> = graph.values().flatten().copied().collect();
        graph.iter().find(|(from, to)| to.is_empty() || !imported.contains(*from)).map(|(&from, _)| from.to_owned())
    };
    while let Some(end) = end(&graph) {
        graph.remove(end.as_str());
        graph.values_mut().for_each(|to| {
            to.remove(end.as_str());
        });
    }
    let edges: BTreeSet<String> = imports
        .iter()
        .filter(|i| i.from != i.to && graph.contains_key(i.from.as_str()) && graph.contains_key(i.to.as_str()))
        .map(|i| format!("{}: {} imports {}", i.at, i.from, i.to))
        .collect();
    let edges: Vec<String> = edges.into_iter().collect();
    assert!(graph.is_empty(), "{:?} import each other:\n{}", graph.keys(), edges.join("\n"));
}

#[test]
fn paths_are_found_wherever_they_stand() {
    let module = ["a".to_owned(), "b".to_owned()];
    let found = |source: &str| -> Vec<String> {
        crate_paths(source, &module).into_iter().map(|(path, line)| format!("{line} {}", path.join("::"))).collect()
    };
    assert_eq!(found("use crate::x::{self, y::{P, Q as R}, z};"), ["1 x::self", "1 x::y::P", "1 x::y::Q", "1 x::z"]);
    assert_eq!(found("use crate::{\n    x::P,\n    y,\n};"), ["1 x::P", "1 y"]);
    assert_eq!(found("use super::c::*;\nuse super::super::d;"), ["1 a::c::*", "2 d"]);
    assert_eq!(found("mod m {\n use super::n;\n}\nuse super::n;"), ["2 a::b::n", "4 a::n"]);
    assert_eq!(found("fn f() -> crate::x::P<crate::y::Q> { $crate::z!() }"), ["1 x::P", "1 y::Q", "1 z"]);
    assert_eq!(found("let x = crate::x::f::<u8>();"), ["1 x::f"]);
    assert_eq!(
        found("// crate::x\n/* crate::y /* */ crate::z */ let s = \"crate::s\"; let r = r#\"crate::\"r\"#;"),
        [""; 0]
    );
    assert_eq!(found("fn f<'a>(x: &'a str) -> char { '\"' }\nuse crate::x; // \""), ["2 x"]);
    assert_eq!(found("#[cfg(test)]\nmod tests {\n use crate::x;\n}\nuse crate::y;"), ["5 y"]);
    assert_eq!(found("#[cfg(test)]\nuse crate::x;\nuse crate::y;"), ["3 y"]);
}

#[test]
fn the_crate_root_is_understood() {
    let (modules, names) = root(
        "mod a;\npub mod b;\npub use a::{P, c::Q};\npub use crate::b::d::R;\npub(crate) use b::e;\nuse b::f;\n#[cfg(test)]\nmod t;",
    );
    assert_eq!(modules, BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    let names: Vec<(String, String)> = names.into_iter().collect();
    let name = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(names, [name("P", "a"), name("Q", "a"), name("R", "b"), name("e", "b")]);
}
