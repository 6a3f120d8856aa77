//! Reports, their comparison and plot, and `kvlane bench` from end to end. No test depends on speed.
#![cfg(feature = "bench")]

use std::collections::BTreeMap;

use kvlane::bench::Pages;
use kvlane::bench::compare::compare;
use kvlane::bench::machine::Machine;
use kvlane::bench::report::{Bandwidth, Bound, CaseResult, LevelLimits, Report};
use kvlane::bench::roofline::svg;
use kvlane::bench::timing::Timing;

fn case(kernel: &str, case: &str, threads: usize, best: f64, flops: f64) -> CaseResult {
    let (op, rest) = kernel.split_once('_').unwrap();
    let (dtype, isa) = rest.split_once('_').unwrap();
    let bytes = 1 << 20;
    CaseResult {
        kernel: kernel.to_owned(),
        op: op.to_owned(),
        src: dtype.to_owned(),
        dst: dtype.to_owned(),
        isa: isa.to_owned(),
        case: case.to_owned(),
        threads,
        small: case.starts_with("decode 1,"),
        bytes,
        flops,
        timing: Timing { best, median: best * 2.0, samples: 3, calls: 10 },
        bound: Some(bound("read", bytes as f64)),
        memory: Some(bound("read", bytes as f64)),
        arithmetic: (flops > 0.0).then(|| bound("fma", flops / 1e3)),
    }
}

fn bound(kind: &str, amount: f64) -> Bound {
    Bound { kind: kind.to_owned(), by: "1 stream".to_owned(), rate: 1e10, seconds: amount / 1e10 }
}

/// Two levels, two thread counts, characters that XML must escape.
fn report(factor: f64) -> Report {
    let machine = Machine { cpu: Some("A <fast> & \"quiet\" CPU".to_owned()), cpus: 2, ..Machine::detect() };
    let mut report = Report::new(true, machine);
    (report.pages, report.huge_share) = (Some(Pages::Huge), Some(0.75));
    for (isa, threads, scale) in [("scalar", 1, 1.0), ("avx2", 1, 4.0), ("avx2", 2, 8.0)] {
        let bandwidth = |bytes: usize| Bandwidth {
            bytes,
            // Integers survive exactly; other numbers may differ in the last bit.
            rate: (scale * 1e10 / (bytes as f64).powf(0.1)).round(),
            by: "4 streams, near".to_owned(),
            loops: BTreeMap::from([("1 stream, far".to_owned(), scale * 3e9), ("8 streams".to_owned(), scale * 4e9)]),
        };
        let mut limits = LevelLimits::new(isa, threads);
        (limits.fma, limits.exp) = (Some(scale * 1e10), Some(scale * 1e8));
        for name in ["bf16 dot", "int8 dot", "bf16 tiles", "int8 tiles"] {
            limits.products.insert(name.to_owned(), scale * 2e10);
        }
        limits.read = [1 << 14, 1 << 18, 1 << 22, 1 << 26].map(bandwidth).into();
        limits.read_small = limits.read.clone();
        limits.copy = [1 << 14, 1 << 26].map(bandwidth).into();
        report.limits.push(limits);
        for dtype in ["f32", "bf16"] {
            let kernel = format!("attention_{dtype}_{isa}");
            for (name, flops) in [("decode 4096, 32/8x128, bhsd", 2e6), ("decode 1, 32/8x128", 2e6), ("prefill", 1e9)] {
                report.cases.push(case(&kernel, name, threads, factor * 1e-3 / scale, flops));
            }
            report.cases.push(case(&format!("copy_{dtype}_{isa}"), "2048", threads, factor * 2e-4 / scale, 0.0));
        }
    }
    report
}

#[test]
fn a_report_survives_json() {
    let report = report(1.0);
    assert!(Report::parse(&report.to_json()).unwrap() == report);
}

#[test]
fn what_is_no_report_is_refused_with_a_sentence() {
    let good = report(1.0).to_json();
    for (text, part) in [
        ("", "not a report of `kvlane bench`"),
        ("[1, 2]", "its schema is not called kvlane-bench"),
        ("{\"schema\": \"criterion\"}", "its schema is not called kvlane-bench"),
        (&good.replace("\"version\": 1", "\"version\": 7"), "schema version 7, but this program reads 1"),
        (&good.replace("\"threads\"", "\"tasks\""), "damaged report"),
    ] {
        let message = Report::parse(text).unwrap_err().to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn tables_fit_a_terminal() {
    let report = report(1.0);
    let text = report.machine_text() + &report.limits_text() + &report.cases_text();
    for line in text.lines() {
        assert!(line.chars().count() <= 100 || line.starts_with("CPU") || line.contains("not here"), "{line:?}");
    }
    for part in [
        "attention, avx2, 2 threads",
        "small calls",
        "1.00 ms",
        "10 %",
        "4 streams, near",
        "binding",
        "reading 4 MiB on huge pages",
        "80.0 bf16 dot",
        "huge pages, 75 % obtained",
    ] {
        assert!(text.contains(part), "{text}\nlacks {part:?}");
    }
}

#[test]
fn comparison_shows_what_both_have() {
    let (a, mut b) = (report(1.0), report(0.5));
    b.cases.retain(|c| c.threads == 1);
    let text = compare(&a, &b).unwrap();
    // The second report is twice as fast, in every line and in the mean.
    let ratios: Vec<&str> = text.lines().filter(|l| l.contains('%')).filter_map(|l| l.split(' ').next_back()).collect();
    assert_eq!(ratios, vec!["2.00"; 16], "{text}");
    assert!(text.contains("attention, avx2, 1 thread ") && text.contains("8 of 24 cases are in A only"), "{text}");
    b.cases.clear();
    assert!(compare(&a, &b).unwrap_err().to_string().contains("no case in common"));
}

/// Whether tags are nested correctly, and `&` and `<` are escaped in text.
fn well_formed(svg: &str) -> bool {
    let mut open = Vec::new();
    let mut rest = svg;
    while let Some((text, after)) = rest.split_once('<') {
        if text.split('&').skip(1).any(|entity| !entity.contains(';')) || text.contains('>') {
            return false;
        }
        let Some((tag, after)) = after.split_once('>') else { return false };
        rest = after;
        let name = |tag: &str| tag.split([' ', '\n', '/']).next().unwrap_or_default().to_owned();
        match tag {
            _ if tag.starts_with(['?', '!']) || tag.ends_with('/') => {}
            _ if tag.starts_with('/') => {
                if open.pop() != Some(name(&tag[1..])) {
                    return false;
                }
            }
            _ => open.push(name(tag)),
        }
    }
    open.is_empty() && rest.trim().is_empty()
}

#[test]
fn the_picture_is_well_formed() {
    assert!(well_formed("<a><b x='1'/>1 &lt; 2</a>") && !well_formed("<a><b></a></b>") && !well_formed("<a>1 & 2</a>"));
    let picture = svg(&report(1.0)).unwrap();
    assert!(picture.starts_with("<svg") && well_formed(&picture), "{picture}");
    // The best level only, once for each thread count.
    for part in ["avx2, 1 thread", "avx2, 2 threads", "decode 4096, 32/8x128, bhsd", "40.0 GFLOP/s, avx2", "bf16"] {
        assert!(picture.contains(part), "{part}");
    }
    assert!(!picture.contains("scalar, 1 thread") && !picture.contains("NaN") && !picture.contains("inf"));

    // A single case gives axes of zero extent.
    let mut single = report(1.0);
    single.cases.truncate(1);
    single.limits.truncate(1);
    single.limits[0].read.truncate(1);
    single.limits[0].copy.clear();
    assert!(well_formed(&svg(&single).unwrap()));
    single.cases.clear();
    assert!(svg(&single).unwrap_err().to_string().contains("no cases"));
}

#[cfg(feature = "driver")]
mod command {
    use super::*;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output};

    fn kvlane(args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_kvlane")).arg("bench").args(args).output().unwrap()
    }

    fn temporary(name: &str) -> PathBuf {
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()))
    }

    #[test]
    fn one_case_runs_from_end_to_end() {
        let (json, picture) = (temporary("one.json"), temporary("one.svg"));
        let paths = [json.to_str().unwrap(), picture.to_str().unwrap()];
        // The level of the context may have no kernel of its own for f32.
        let context = kvlane::Context::new().unwrap();
        let kernel = context.kernel(kvlane::Op::Attention, kvlane::DType::F32, kvlane::DType::F32).unwrap();
        let best = kernel.isa;
        let filter = format!("attention_f32_{best}/decode 16,");
        let out = kvlane(&["--quick", "--filter", &filter, "--json", paths[0], "--svg", paths[1]]);
        let (text, notes) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
        // Without a terminal there is no progress bar.
        assert!(out.status.success() && notes.is_empty(), "{notes}");
        for part in ["CPU ", "levels ", "limits, ", "decode 16, 32/8x128", "small calls"] {
            assert!(text.contains(part), "{text}\nlacks {part:?}");
        }
        let report = Report::load(&json).unwrap();
        assert_eq!((report.cases.len(), report.limits.len(), report.quick), (1, 1, true));
        let case = &report.cases[0];
        assert_eq!((case.kernel.as_str(), case.threads), (format!("attention_f32_{best}").as_str(), 1));
        assert!(case.reached().unwrap() > 0.0 && case.timing.best <= case.timing.median);
        let shares = [&case.memory, &case.arithmetic].map(|bound| case.share(bound).unwrap());
        assert!(case.reached().unwrap() == shares[0].max(shares[1]) && report.pages.is_some());
        assert!(well_formed(&std::fs::read_to_string(&picture).unwrap()));

        let out = kvlane(&["--compare", paths[0], paths[0]]);
        assert!(String::from_utf8(out.stdout).unwrap().contains(" 1.00\n"));
        std::fs::remove_file(json).unwrap();
        std::fs::remove_file(picture).unwrap();
    }

    #[test]
    fn complaints_are_sentences() {
        let toml = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx512" };
        let cases: [(&[&str], i32, &str); 8] = [
            (&["--pages", "large"], 2, "[possible values: small, huge]"),
            (&["--compare", toml, toml], 1, "not a report of `kvlane bench`"),
            (&["--compare", "/nowhere.json", toml], 1, "/nowhere.json"),
            (&["--compare", toml], 2, "2 values required"),
            (&["--threads", "0", "--filter", "decode 1,"], 1, "0 threads"),
            (&["--filter", "no such thing"], 1, "no case of this run contains \"no such thing\""),
            (&["--isa", foreign], 2, "this CPU cannot run it"),
            (&["--json", "/nowhere/report.json"], 1, "/nowhere/report.json"),
        ];
        for (args, code, part) in cases {
            let out = kvlane(args);
            let message = String::from_utf8(out.stderr).unwrap();
            assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
            assert!(out.stdout.is_empty() && message.starts_with("error: "), "{args:?}: {message}");
            assert!(message.contains(part), "{args:?}: {message}");
        }
    }

    #[test]
    fn complaints_of_the_search_are_sentences() {
        let foreign = if cfg!(target_arch = "x86_64") { "neon" } else { "avx512" };
        let cases: [(&[&str], i32, &str); 4] = [
            (&["--isa", foreign], 2, "this CPU cannot run it"),
            (&["--threads", "x"], 2, "invalid value 'x'"),
            (&["--pages", "large"], 2, "[possible values: small, huge]"),
            (&["--entry", "/nowhere/entry.txt"], 1, "/nowhere/entry.txt"),
        ];
        for (args, code, part) in cases {
            let out = Command::new(env!("CARGO_BIN_EXE_kvlane")).arg("tune").args(args).output().unwrap();
            let message = String::from_utf8(out.stderr).unwrap();
            assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
            assert!(out.stdout.is_empty() && message.starts_with("error: "), "{args:?}: {message}");
            assert!(message.contains(part), "{args:?}: {message}");
        }
    }
}
