//! Counts instructions per call at the AVX2 level with valgrind's callgrind, and compares them with
//! `instructions.txt`: a guard against regressions that needs no quiet machine.
//!
//! ```sh
//! cargo bench --bench instructions                # compares; fails above 3 %
//! cargo bench --bench instructions -- decode      # some of them
//! cargo bench --bench instructions -- --update    # records new counts, after an intended change
//! ```
//!
//! Without valgrind nothing runs, which is a failure only if `KVLANE_REQUIRE_VALGRIND` is set. Valgrind does not
//! support AVX-512. The counts include the whole call: views, checks, kernel. They vary a little with the compiler,
//! hence the tolerance.

use half::{bf16, f16};
use kvlane::{
    AttentionOptions, AttentionState, AttentionTensors, CacheView, CacheViewMut, Context, Destination, Element, Isa,
    KvWrite, Pairing, Positions, Rope, RopeAngles, RopeFrequencies, RopeScaling, Serial, Tuning, View, ViewMut,
    Workspace, attention, kv_write, merge_states, repeat_kv, rope,
};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 128;
const TOKENS: usize = 16;
const TOLERANCE: f64 = 0.03;

type Case = (&'static str, fn(Context) -> Box<dyn FnMut()>);

const CASES: &[Case] = &[
    ("decode_1_f32", |c| attend::<f32>(c, 1, 1)),
    ("decode_16_f32", |c| attend::<f32>(c, 1, 16)),
    ("decode_512_f32", |c| attend::<f32>(c, 1, 512)),
    ("decode_512_f16", |c| attend::<f16>(c, 1, 512)),
    ("decode_512_bf16", |c| attend::<bf16>(c, 1, 512)),
    ("decode_512_int8", |c| attend_int8(c, 512)),
    ("prefill_64_f32", |c| attend::<f32>(c, 64, 64)),
    ("prefill_64_f16", |c| attend::<f16>(c, 64, 64)),
    ("prefill_64_bf16", |c| attend::<bf16>(c, 64, 64)),
    ("rope_16_half_split_f32", |c| rotate(c, Pairing::HalfSplit)),
    ("rope_16_interleaved_f32", |c| rotate(c, Pairing::Interleaved)),
    ("write_16_f32_bf16", write::<f32, bf16>),
    ("write_16_f16_f16", write::<f16, f16>),
    ("write_16_f32_int8", write_int8),
    ("repeat_16_f32", repeat),
    ("merge_16_f32", merge),
];

/// The same numbers between -1 and 1 in every run.
fn data<T: Element>(n: usize) -> Vec<T> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        T::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

/// Causal attention of the last of `keys` tokens, queries and output of the cache's type.
fn attend<T: Element>(context: Context, queries: usize, keys: usize) -> Box<dyn FnMut()> {
    let (q_shape, kv_shape) = ([1, queries, HEADS, DIM], [1, keys, KV_HEADS, DIM]);
    let (q_len, kv_len) = (q_shape.iter().product(), kv_shape.iter().product());
    let (q, k, v, mut out) = (data::<T>(q_len), data::<T>(kv_len), data::<T>(kv_len), data::<T>(q_len));
    let mut workspace = Workspace::new();
    Box::new(move || {
        let tensors = AttentionTensors::new(
            View::new(&q, q_shape).unwrap(),
            View::new(&k, kv_shape).unwrap(),
            View::new(&v, kv_shape).unwrap(),
            ViewMut::new(&mut out, q_shape).unwrap(),
        );
        let options = AttentionOptions::new().causal(true);
        attention(&context, &Serial, &mut workspace, tensors, &options).unwrap();
    })
}

/// Units and scales of keys, or of values.
fn int8([_, seq, heads, dim]: [usize; 4]) -> (Vec<i8>, Vec<f32>) {
    (data::<f32>(seq * heads * dim).iter().map(|x| (127.0 * x) as i8).collect(), vec![1.0 / 127.0; seq * heads])
}

const fn scales([batch, seq, heads, _]: [usize; 4]) -> [usize; 4] {
    [batch, seq, heads, 1]
}

/// The last of `keys` tokens, over keys and values in int8.
fn attend_int8(context: Context, keys: usize) -> Box<dyn FnMut()> {
    let (q_shape, kv_shape) = ([1, 1, HEADS, DIM], [1, keys, KV_HEADS, DIM]);
    let (q, mut out) = (data::<f32>(HEADS * DIM), data::<f32>(HEADS * DIM));
    let (keys, values) = (int8(kv_shape), int8(kv_shape));
    let mut workspace = Workspace::new();
    Box::new(move || {
        let [keys, values] = [&keys, &values].map(|(units, factors)| {
            CacheView::int8(units, kv_shape, View::new(factors, scales(kv_shape)).unwrap()).unwrap()
        });
        let q = View::new(&q, q_shape).unwrap();
        let tensors = AttentionTensors::new(q, keys, values, ViewMut::new(&mut out, q_shape).unwrap());
        let options = AttentionOptions::new().causal(true);
        attention(&context, &Serial, &mut workspace, tensors, &options).unwrap();
    })
}

/// A write of f32 into int8.
fn write_int8(context: Context) -> Box<dyn FnMut()> {
    let shape = [1, TOKENS, KV_HEADS, DIM];
    let (k, v) = (data::<f32>(shape.iter().product()), data::<f32>(shape.iter().product()));
    let (mut keys, mut values) = (int8(shape), int8(shape));
    Box::new(move || {
        let [k_cache, v_cache] = [&mut keys, &mut values].map(|(units, factors)| {
            CacheViewMut::int8(units, shape, ViewMut::new(factors, scales(shape)).unwrap()).unwrap()
        });
        let to = Destination::positions(&[0]);
        let write = KvWrite::new(View::new(&k, shape).unwrap(), View::new(&v, shape).unwrap(), k_cache, v_cache, to);
        kv_write(&context, &Serial, write).unwrap();
    })
}

/// Rotation of queries by angles from a table.
fn rotate(context: Context, pairing: Pairing) -> Box<dyn FnMut()> {
    let shape = [1, TOKENS, HEADS, DIM];
    let (src, mut dst) = (data::<f32>(shape.iter().product()), data::<f32>(shape.iter().product()));
    let frequencies = RopeFrequencies::new(DIM, 500_000.0, &RopeScaling::None).unwrap();
    let (cos, sin) = frequencies.table(&context, TOKENS);
    Box::new(move || {
        let angles = RopeAngles::table(&cos, &sin);
        let options = Rope::new(pairing, DIM, angles, Positions::Offsets(&[0]));
        let (src, dst) = (View::new(&src, shape).unwrap(), ViewMut::new(&mut dst, shape).unwrap());
        rope(&context, &Serial, src, dst, &options).unwrap();
    })
}

/// A write of keys and values of one type into caches of another.
fn write<S: Element, D: Element>(context: Context) -> Box<dyn FnMut()> {
    let shape = [1, TOKENS, KV_HEADS, DIM];
    let n = shape.iter().product();
    let (k, v, mut k_cache, mut v_cache) = (data::<S>(n), data::<S>(n), data::<D>(n), data::<D>(n));
    Box::new(move || {
        let write = KvWrite::new(
            View::new(&k, shape).unwrap(),
            View::new(&v, shape).unwrap(),
            ViewMut::new(&mut k_cache, shape).unwrap(),
            ViewMut::new(&mut v_cache, shape).unwrap(),
            Destination::positions(&[0]),
        );
        kv_write(&context, &Serial, write).unwrap();
    })
}

fn repeat(context: Context) -> Box<dyn FnMut()> {
    let (narrow, wide) = ([1, TOKENS, KV_HEADS, DIM], [1, TOKENS, HEADS, DIM]);
    let (src, mut dst) = (data::<f32>(narrow.iter().product()), data::<f32>(wide.iter().product()));
    Box::new(move || {
        repeat_kv(&context, &Serial, View::new(&src, narrow).unwrap(), ViewMut::new(&mut dst, wide).unwrap()).unwrap();
    })
}

fn merge(context: Context) -> Box<dyn FnMut()> {
    let shape = [1, TOKENS, HEADS, DIM];
    let n: usize = shape.iter().product();
    let (a, b, mut out) = (data::<f32>(n), data::<f32>(n), data::<f32>(n));
    let lse = data::<f32>(n / DIM);
    Box::new(move || {
        let states = [&a, &b].map(|out| AttentionState::new(View::new(out, shape).unwrap(), &lse));
        merge_states(&context, &Serial, &states, ViewMut::new(&mut out, shape).unwrap(), None).unwrap();
    })
}

/// Valgrind counts inside of this function. It finds it by name, so it is neither mangled nor inlined.
#[unsafe(no_mangle)]
#[inline(never)]
fn kvlane_counted(call: &mut dyn FnMut()) {
    black_box(call)();
}

/// Runs under valgrind: one call to allocate the workspace and bind symbols, then one that is counted.
fn run(name: &str) {
    // Not of this CPU: counts are the same everywhere.
    let context = Context::with_max_isa(Isa::Avx2).expect("AVX2 belongs to this architecture").tuned(Tuning::default());
    assert_eq!(context.isa(), Isa::Avx2, "this CPU, or KVLANE_MAX_ISA, does not allow AVX2");
    let (_, case) = CASES.iter().find(|(n, _)| *n == name).expect("a case of this bench");
    let mut call = case(context);
    call();
    kvlane_counted(&mut call);
}

/// The number of instructions per call.
fn count(name: &str) -> Result<u64, String> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=kvlane_counted"])
        .arg("--callgrind-out-file=/dev/null")
        .arg(std::env::current_exe().map_err(|e| e.to_string())?)
        .args(["--run", name])
        .output()
        .map_err(|e| format!("valgrind: {e}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    text.lines()
        .find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
        .filter(|&n| n > 0 && output.status.success())
        .ok_or_else(|| format!("valgrind counted nothing:\n{text}"))
}

fn references_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.txt")
}

/// Parses lines of a name and a count.
fn references() -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(references_path()).unwrap_or_default();
    let parse = |line: &str| {
        let (name, count) = line.split_once(' ')?;
        Some((name.to_owned(), count.trim().parse().ok()?))
    };
    text.lines().filter_map(parse).collect()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [flag, name] = &arguments[..]
        && flag == "--run"
    {
        run(name);
        return ExitCode::SUCCESS;
    }
    let valgrind = Command::new("valgrind").arg("--version").output().is_ok_and(|o| o.status.success());
    if !(valgrind && Isa::Avx2.is_available()) {
        let required = std::env::var_os("KVLANE_REQUIRE_VALGRIND").is_some();
        println!("instructions: not run, this needs valgrind and AVX2");
        return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let update = arguments.iter().any(|a| a == "--update");
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    let mut references = references();
    let (mut passed, mut failed) = (0, 0);
    println!("{:26} {:>12} {:>12} {:>7}", "instructions per call", "now", "reference", "ratio");
    for (name, _) in CASES {
        if !filters.is_empty() && !filters.iter().any(|f| name.contains(f.as_str())) {
            continue;
        }
        let now = match count(name) {
            Ok(now) => now,
            Err(message) => {
                println!("{name}: {message}");
                failed += 1;
                continue;
            }
        };
        let reference = references.get(*name).copied();
        let ratio = reference.map(|r| now as f64 / r as f64);
        let shown = ratio.map_or_else(String::new, |r| format!("{r:.3}"));
        let verdict = match ratio {
            None => "  no reference",
            Some(r) if r > 1.0 + TOLERANCE => "  TOO MANY",
            Some(r) if r < 1.0 - TOLERANCE => "  fewer: time to update",
            _ => "",
        };
        println!(
            "{name:26} {now:12} {:>12} {shown:>7}{verdict}",
            reference.map_or_else(String::new, |r| r.to_string())
        );
        if update || ratio.is_some_and(|r| r <= 1.0 + TOLERANCE) {
            passed += 1;
        } else {
            failed += 1;
        }
        references.insert((*name).to_owned(), now);
    }
    if update {
        references.retain(|name, _| CASES.iter().any(|(n, _)| n == name));
        let text = references.iter().fold(String::new(), |mut text, (name, n)| {
            writeln!(text, "{name} {n}").expect("a string takes what is written");
            text
        });
        if let Err(error) = std::fs::write(references_path(), text) {
            println!("{}: {error}", references_path().display());
            failed += 1;
        }
    } else if failed > 0 {
        println!("If it is meant: cargo bench --bench instructions -- --update");
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
