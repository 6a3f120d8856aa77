//! A bench for every kernel of the registry that this CPU can run: `cargo bench --features criterion --bench kernels`,
//! or with `-- attention_f16` for some.
//!
//! Cases, bytes, operations and limits are those of [`kvlane::bench`], as in `kvlane bench`; criterion adds its
//! statistics and the change since the last run. After each case a line shows the rate and the share of the limit,
//! which is measured just before and just after.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use kvlane::bench::Pages;
use kvlane::bench::cases::{Case, cases_of};
use kvlane::bench::limits::{Kind, Limits, Threads};
use kvlane::bench::machine::Machine;
use kvlane::bench::run::skipped;
use kvlane::kernels;

/// Huge pages where the machine has them, as `kvlane bench`.
fn pages() -> Pages {
    static PAGES: OnceLock<Pages> = OnceLock::new();
    *PAGES.get_or_init(|| if Machine::detect().has_huge_pages() { Pages::Huge } else { Pages::Small })
}

/// Runs a case; returns whether it could run.
fn bench_case(group: &mut BenchmarkGroup<WallTime>, case: &Case, limits: &mut Limits, threads: &Threads) -> bool {
    let Some(mut prepared) = case.prepare(pages()).expect("every level of the registry belongs to this architecture")
    else {
        return false;
    };
    let (bytes, flops) = (case.bytes() as f64, case.flops());
    group.throughput(Throughput::Bytes(case.bytes() as u64));
    let mut best = f64::INFINITY;
    group.bench_function(&case.name, |b| {
        b.iter_custom(|calls| {
            let start = Instant::now();
            for _ in 0..calls {
                prepared.run(threads).expect("the case fits its kernel");
            }
            let time = start.elapsed();
            best = best.min(time.as_secs_f64() / calls as f64);
            time
        });
    });
    if best.is_infinite() {
        return true; // Not selected on the command line.
    }
    let mut limit = |kind| limits.measure(threads, case.kernel.isa, kind).expect("the level is available");
    let memory = case.memory_limit(pages()).map(|kind| (kind, limit(kind)));
    let arithmetic = case.arithmetic_limit().map(|kind| (kind, limit(kind)));
    let slower = [memory.map(|m| (m.0, bytes / m.1.rate, m.1)), arithmetic.map(|a| (a.0, flops / a.1.rate, a.1))]
        .into_iter()
        .flatten()
        .max_by(|a, b| a.1.total_cmp(&b.1));
    print!("{}: {:.1} GB/s", case.id(), bytes / best / 1e9);
    if flops > 0.0 {
        print!(", {:.1} GFLOP/s", flops / best / 1e9);
    }
    match slower {
        Some((kind, seconds, limit)) => {
            let what = match kind {
                Kind::Read(..) => "GB/s of reading",
                Kind::Copy(..) => "GB/s of copying",
                Kind::Update(..) => "GB/s of updating",
                Kind::Fma => "GFLOP/s of multiply-adds",
                _ => "GFLOP/s of products",
            };
            let share = seconds / best * 100.0;
            println!(", {share:.0} % of the {:.1} {what} that are possible ({})", limit.rate / 1e9, limit.by);
        }
        None => println!(),
    }
    true
}

fn registry(c: &mut Criterion) {
    let mut limits = Limits::new(true);
    let threads = Threads::new(1).expect("one thread is no wish");
    for kernel in kernels() {
        let cases = cases_of(&kernel);
        assert!(!cases.is_empty(), "{} is in the registry, but has no bench", kernel.name);
        let mut group = c.benchmark_group(kernel.name);
        group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300));
        // All levels and kernels, with the shapes of a quick run; a kernel without such a shape takes its first.
        let quick = cases.iter().any(|case| case.quick);
        let chosen = cases.iter().enumerate().filter(|(i, case)| if quick { case.quick } else { *i == 0 });
        let mut ran = true;
        for (_, case) in chosen {
            ran &= bench_case(&mut group, case, &mut limits, &threads);
        }
        if !ran {
            println!("not run: {}", skipped(&kernel));
        }
        group.finish();
    }
}

criterion_group!(benches, registry);
criterion_main!(benches);
