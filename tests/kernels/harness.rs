//! Runs tests for every level, counts the kernels that they reach, and fails if a kernel is not reached.
//!
//! | variable | what it does |
//! | --- | --- |
//! | `KVLANE_REQUIRE_ISA` | levels, separated by commas, that must have run |
//! | `KVLANE_MAX_ISA` | lowers all contexts; levels above it do not run, and are reported as such |
//! | `KVLANE_TEST_SCALE` | the share of cases that run |
//! | `KVLANE_TEST_GUARD` | `off`: the page after a tensor is readable, for emulators whose masked loads read whole vectors |
//!
//! Supports these arguments of libtest: filters, `--exact`, `--skip`, `--list`, `--test-threads`; others are ignored.
//! The counts of a level are checked only if all of its tests run.
//!
//! With `--cfg kvlane_emulate_amx` the instructions of the AMX level are emulated.

use crate::common::attention::{LARGEST_ERRORS, Setting, with_setting};
use crate::common::few_cases;
use kvlane::{CacheFormat, Context, DType, Isa, KernelInfo, Op, Precision};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// One test.
pub struct Test {
    pub name: &'static str,
    pub body: Body,
}

pub enum Body {
    /// Runs for every level.
    PerLevel(fn(&Level)),
    /// Runs once.
    Once(fn()),
}

/// Lists a module's tests: those that run for every level, then those that run once.
macro_rules! tests {
    (levels: $($level:ident),* ; once: $($once:ident),* $(;)?) => {
        pub const TESTS: &[$crate::harness::Test] = &[
            $($crate::harness::Test {
                name: concat!(module_path!(), "::", stringify!($level)),
                body: $crate::harness::Body::PerLevel($level),
            },)*
            $($crate::harness::Test {
                name: concat!(module_path!(), "::", stringify!($once)),
                body: $crate::harness::Body::Once($once),
            },)*
        ];
    };
}
pub(crate) use tests;

/// A level to run, and its context. A level with kernels for each precision runs once for each.
pub struct Level {
    pub isa: Isa,
    pub precision: Precision,
    /// The formats in which K and V are quantised before attention reads them, if they are.
    pub quantised: [Option<CacheFormat>; 2],
    pub context: Context,
}

/// The tests that run with quantised caches, with exceptions, which know what single elements of K and V are; the others read no
/// cache, or quantise by themselves.
const QUANTISED: [&str; 7] =
    ["attention::", "semantics::", "positions::", "invariance::", "layouts::", "properties::", "shard::"];
const NOT_QUANTISED: [&str; 5] = [
    "invariance::memory_bound_operations",
    "semantics::order_of_operations",
    "semantics::heads_read_their_group",
    "semantics::live_minus_infinity",
    "semantics::poison_reaches_who_sees_it",
];

/// Of those, the tests that formats of blocks do not run: they make heads of other sizes by themselves, or know what scores and values are.
const NOT_BLOCKS: [&str; 7] = [
    "invariance::prompt_in_chunks",
    "layouts::shared_prefix",
    "positions::chunks",
    "semantics::large_logits",
    "semantics::log_sum_exp",
    "shard::chunks_of_spans_are_the_bits_of_the_whole",
    "shard::rows_and_heads_are_the_bits_of_the_whole",
];

/// The tests that partial levels, and full ones at the precision of integer products, run, with exceptions; the others would test the
/// levels below again.
const PARTIAL: [&str; 14] = [
    "hadamard::random_calls",
    "hadamard::head_sizes",
    "hadamard::non_finite",
    "hadamard::cut_prompts",
    "hadamard::segments",
    "hadamard::prefixes",
    "attention::",
    "semantics::",
    "positions::",
    "invariance::",
    "latent::",
    "layouts::",
    "properties::",
    "shard::",
];
const NOT_PARTIAL: [&str; 3] =
    ["invariance::memory_bound_operations", "latent::int8_values_inside_keys", "latent::written_in_parts"];

static COUNTS: Mutex<BTreeMap<&'static str, usize>> = Mutex::new(BTreeMap::new());

impl Level {
    /// The kernel that serves an operation; of this level if it has one.
    pub fn kernel(&self, op: Op, src: impl Into<CacheFormat>, dst: impl Into<CacheFormat>) -> KernelInfo {
        let (src, dst) = (src.into(), dst.into());
        let kernel = self.context.kernel_for(op, src, dst, self.precision).expect("every context has every kernel");
        let has = |k: KernelInfo| k.isa == self.isa && (k.op, k.src, k.dst) == (op, src, dst);
        if !self.isa.is_partial() || kvlane::kernels().any(has) {
            assert_eq!(kernel.isa, self.isa, "{} does not serve level {}", kernel.name, self.isa);
        }
        kernel
    }

    /// Whether the level has kernels of its own for some calls only.
    fn is_partial(&self) -> bool {
        self.isa.is_partial() || self.precision == Precision::Integer
    }

    /// The calls that the level has its own kernels for.
    fn setting(&self) -> Setting {
        let has =
            |&kv: &DType| self.precision == Precision::Integer || self.kernel(Op::Attention, kv, kv).isa == self.isa;
        let mut kv_types: Vec<_> = DType::ALL.into_iter().filter(has).collect();
        if self.quantised.iter().all(Option::is_some) {
            kv_types = vec![DType::F32];
        }
        Setting { precision: self.precision, kv_types, quantised: self.quantised }
    }

    /// The name as part of test names.
    fn name(&self) -> String {
        let precision = match self.precision {
            Precision::Default => String::new(),
            precision => format!(", {}", precision.name()),
        };
        let quantised = match self.quantised {
            [None, None] => String::new(),
            [Some(keys), Some(values)] if keys == values => format!(", {keys}"),
            [Some(keys), Some(values)] => format!(", {keys} and {values}"),
            [Some(keys), None] => format!(", {keys} keys"),
            [None, Some(values)] => format!(", {values} values"),
        };
        format!("{}{precision}{quantised}", self.isa)
    }

    /// Counts a comparison of a kernel's result, and returns the kernel's bound.
    pub fn checked(&self, op: Op, src: impl Into<CacheFormat>, dst: impl Into<CacheFormat>) -> f64 {
        let (src, dst) = (src.into(), dst.into());
        let kernels = match op {
            Op::Attention => [(src, self.quantised[0]), (dst, self.quantised[1])].map(|(format, quantised)| {
                let format = quantised.unwrap_or(format);
                self.kernel(op, format, format)
            }),
            _ => [self.kernel(op, src, dst); 2],
        };
        let mut counts = COUNTS.lock().unwrap();
        let names: BTreeSet<_> = kernels.iter().map(|kernel| kernel.name).collect();
        names.into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
        kernels[0].max_error.max(kernels[1].max_error).into()
    }
}

/// The levels that run, and the reasons why the others do not.
fn levels() -> (Vec<Level>, Vec<(Isa, &'static str)>) {
    let (mut run, mut not) = (Vec::new(), Vec::new());
    for isa in Isa::ALL {
        if !isa.is_built() {
            not.push((isa, "not of this architecture"));
        } else if !isa.is_available() {
            not.push((isa, "not on this CPU"));
        } else {
            let context = Context::with_max_isa(isa).expect("a context of an available level");
            if context.isa() == isa {
                let has = |precision| kvlane::kernels().any(|k| k.isa == isa && k.precision == Some(precision));
                if has(Precision::Integer) {
                    let int8 = Some(CacheFormat::Int8);
                    let blocks = [Some(CacheFormat::Q8_0), Some(CacheFormat::Q4_0)];
                    // Few random cases of whole blocks have keys that nobody sees.
                    let kinds = match (isa, few_cases()) {
                        // Values, and one row, are as at the levels below; and so are other formats than int8 in AMX.
                        (Isa::Amx, _) | (Isa::NeonI8mm, true) => 1,
                        (_, true) => 2,
                        (_, false) => 3,
                    };
                    let with_int8 = [[int8; 2], [int8, None], blocks];
                    // AVX2 has such products for blocks of four and five bits only.
                    let of_four_bits = [[Some(CacheFormat::Q4_0); 2]];
                    let kinds_of = match (isa, few_cases()) {
                        (Isa::Avx2, few) => &of_four_bits[usize::from(few)..],
                        _ => &with_int8[..kinds],
                    };
                    for &quantised in kinds_of {
                        run.push(Level { isa, precision: Precision::Integer, quantised, context: context.clone() });
                    }
                    if isa.is_partial() && !has(Precision::High) {
                        continue;
                    }
                }
                let apart = has(Precision::High);
                for precision in [Precision::Default, Precision::High].into_iter().take(if apart { 2 } else { 1 }) {
                    run.push(Level { isa, precision, quantised: [None; 2], context: context.clone() });
                }
                // Partial levels have no kernels for quantised caches. Where few cases run, for want of time, both are quantised
                // or none is, and the portable level, which is the same everywhere, is left to where all run.
                let kinds = match (isa, few_cases()) {
                    (isa, _) if isa.is_partial() => 0,
                    (Isa::Scalar, true) => 0,
                    (_, true) => 2,
                    (_, false) => 5,
                };
                let (int8, e4m3, e5m2) = (CacheFormat::Int8, CacheFormat::Fp8E4m3, CacheFormat::Fp8E5m2);
                let blocks = [Some(CacheFormat::Q8_0), Some(CacheFormat::Q4_0)];
                let kinds_of =
                    [[Some(int8); 2], [Some(e4m3), Some(e5m2)], [Some(int8), None], [None, Some(int8)], blocks];
                for quantised in kinds_of.into_iter().take(kinds) {
                    run.push(Level { isa, precision: Precision::Default, quantised, context: context.clone() });
                }
            } else {
                not.push((isa, "lowered by KVLANE_MAX_ISA"));
            }
        }
    }
    (run, not)
}

/// The options of the command line.
#[derive(Default)]
struct Arguments {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    threads: Option<usize>,
}

impl Arguments {
    fn parse() -> Self {
        let mut arguments = Self::default();
        let mut rest = std::env::args().skip(1);
        while let Some(argument) = rest.next() {
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (argument, None),
            };
            match name.as_str() {
                "--exact" => arguments.exact = true,
                "--list" => arguments.list = true,
                "--skip" => arguments.skip.extend(value.or_else(|| rest.next())),
                "--test-threads" => arguments.threads = value.or_else(|| rest.next()).and_then(|n| n.parse().ok()),
                "--format" | "--color" | "--logfile" | "-Z" | "--report-time" => {
                    let _ = value.or_else(|| rest.next());
                }
                flag if flag.starts_with('-') => {}
                _ => arguments.filters.push(name),
            }
        }
        arguments
    }

    fn wants(&self, name: &str) -> bool {
        let fits = |filter: &String| if self.exact { name == filter } else { name.contains(filter.as_str()) };
        (self.filters.is_empty() || self.filters.iter().any(fits)) && !self.skip.iter().any(fits)
    }
}

/// Runs the tests; the exit code is 0 if all passed.
pub fn run(modules: &[&[Test]]) -> ExitCode {
    #[cfg(all(kvlane_emulate_amx, target_arch = "x86_64", target_os = "linux"))]
    crate::common::amx_emulator::install();
    let arguments = Arguments::parse();
    let (levels, absent) = levels();
    let mut cases: Vec<(String, Box<dyn Fn() + Sync + '_>)> = Vec::new();
    for test in modules.iter().copied().flatten() {
        let name = test.name.trim_start_matches("kernels::");
        match test.body {
            Body::Once(body) => cases.push((name.to_owned(), Box::new(body))),
            Body::PerLevel(body) => {
                for level in &levels {
                    let names = |list: &[&str]| list.iter().any(|start| name.starts_with(start));
                    if level.quantised != [None; 2] && (!names(&QUANTISED) || names(&NOT_QUANTISED)) {
                        continue;
                    }
                    if level.quantised.iter().flatten().any(|f| f.unit_elements() > 1) && names(&NOT_BLOCKS) {
                        continue;
                    }
                    if !level.is_partial() || names(&PARTIAL) && !names(&NOT_PARTIAL) {
                        let body = move || with_setting(level.setting(), || body(level));
                        cases.push((format!("{name}[{}]", level.name()), Box::new(body)));
                    }
                }
            }
        }
    }
    // Levels with a test that does not run.
    let mut incomplete = BTreeSet::new();
    cases.retain(|(name, _)| {
        let wanted = arguments.wants(name);
        if !wanted && let Some((_, level)) = name.split_once('[') {
            incomplete.insert(level.split([',', ']']).next().unwrap_or(level).to_owned());
        }
        wanted
    });
    if arguments.list {
        cases.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }

    println!("\nrunning {} tests", cases.len());
    let started = Instant::now();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    let available = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads.unwrap_or(available).max(1) {
            scope.spawn(|| {
                while let Some((name, body)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let started = Instant::now();
                    let passed = catch_unwind(AssertUnwindSafe(body)).is_ok();
                    let verdict = if passed { "ok" } else { "FAILED" };
                    println!("test {name} ... {verdict} ({:.2} s)", started.elapsed().as_secs_f64());
                    if !passed {
                        failed.lock().unwrap().push(name.clone());
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();

    println!();
    let counts = COUNTS.lock().unwrap();
    let mut isas: Vec<_> = levels.iter().map(|level| level.isa).collect();
    isas.dedup();
    for isa in isas {
        let kernels: Vec<_> = kvlane::kernels().filter(|k| k.isa == isa).collect();
        let reached = kernels.iter().filter(|k| counts.contains_key(k.name)).count();
        let checks: usize = kernels.iter().filter_map(|k| counts.get(k.name)).sum();
        println!("level {}: {checks} kernel checks, {reached} of {} kernels", isa, kernels.len());
        if !incomplete.contains(isa.name()) {
            for kernel in kernels.iter().filter(|k| !counts.contains_key(k.name)) {
                println!("kernel {} was not reached by any test", kernel.name);
                failed.push(format!("registry_coverage: {}", kernel.name));
            }
        }
    }
    #[cfg(all(kvlane_emulate_amx, target_arch = "x86_64", target_os = "linux"))]
    println!("{} AMX instructions emulated", crate::common::amx_emulator::performed());
    for (name, error) in LARGEST_ERRORS.lock().unwrap().iter() {
        let bound = kvlane::kernels().find(|k| k.name == *name).map_or(0.0, |k| k.max_error);
        println!("kernel {name}: largest error {error:.1e} of {bound:.0e}");
    }
    for (isa, reason) in &absent {
        println!("level {isa}: not run ({reason})");
    }
    let required = std::env::var("KVLANE_REQUIRE_ISA").unwrap_or_default();
    for name in required.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        if !levels.iter().any(|level| level.isa.name() == name) {
            println!("level {name} is required by KVLANE_REQUIRE_ISA, but did not run");
            failed.push(format!("required level {name}"));
        }
    }

    let seconds = started.elapsed().as_secs_f64();
    if failed.is_empty() {
        println!("\ntest result: ok. {} passed; 0 failed; finished in {seconds:.2}s\n", cases.len());
        ExitCode::SUCCESS
    } else {
        println!("\nfailures:");
        failed.iter().for_each(|name| println!("    {name}"));
        println!("\ntest result: FAILED. {} failed; finished in {seconds:.2}s\n", failed.len());
        ExitCode::FAILURE
    }
}
