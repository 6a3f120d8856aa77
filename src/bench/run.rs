//! A run: measures limits and cases in turns.

use super::cases::{Case, cases_of};
use super::data::Pages;
use super::limits::{Kind, Limit, Limits, Threads};
use super::machine::Machine;
use super::report::{Bandwidth, Bound, CaseResult, LevelLimits, Report};
use super::timing::{Effort, repeat, time};
use super::{Error, Result};
use crate::{Context, Isa, KernelInfo, kernels};

/// The selection of cases.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Fewer shapes, pairs of types and sizes, and a shorter measurement of each.
    pub quick: bool,
    /// Thread counts. Empty: 1 and, unless the run is quick, the number of CPUs.
    pub threads: Vec<usize>,
    /// Levels. Empty: all, or in a quick run the kernels that a context chooses.
    pub levels: Vec<Isa>,
    /// Only cases whose `<kernel>/<shape>` contains this.
    pub filter: Option<String>,
    /// The pages of all buffers. Without one: huge, if the machine has them.
    pub pages: Option<Pages>,
}

/// The progress of a run.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Steps that are done.
    pub done: usize,
    /// Total number of steps.
    pub total: usize,
    /// The name of the current measurement.
    pub now: &'a str,
}

/// Runs the bench.
///
/// # Errors
/// A level that the CPU or `KVLANE_MAX_ISA` excludes, threads that cannot be started, a filter that matches no case,
/// or a kernel that fails.
pub fn run(options: &Options, observe: &mut dyn FnMut(Progress)) -> Result<Report> {
    let machine = Machine::detect();
    let best = Context::new()?;
    let pages = choose_pages(&machine, options.pages)?;
    let levels = levels(&options.levels)?;
    // Without levels, a quick run takes the kernels that a program would get, whatever their level.
    let default = |k: &KernelInfo| best.kernel(k.op, k.src, k.dst).is_some_and(|chosen| chosen.name == k.name);
    let every = !options.quick || !options.levels.is_empty();
    let threads = match &options.threads[..] {
        [] if options.quick || machine.cpus == 1 => vec![1],
        [] => vec![1, machine.cpus],
        given => given.to_vec(),
    };
    let chosen = |isa: Isa| -> Vec<Case> {
        kernels()
            .filter(|kernel| kernel.isa == isa && (every || default(kernel)))
            .flat_map(|kernel| cases_of(&kernel))
            .filter(|case| case.quick || !options.quick)
            .filter(|case| options.filter.as_ref().is_none_or(|text| case.id().contains(text.as_str())))
            .collect()
    };
    // A filtered run measures only the limits that its cases need.
    let sizes = if options.filter.is_some() { Vec::new() } else { sizes(options.quick) };
    let mut plan: Vec<(Isa, Vec<Case>)> = levels.into_iter().map(|isa| (isa, in_turns(chosen(isa)))).collect();
    plan.retain(|(_, cases)| !cases.is_empty());
    if plan.is_empty() {
        let text = options.filter.as_deref().unwrap_or_default();
        return Err(Error::new(format!("no case of this run contains {text:?} in its <kernel>/<shape>")));
    }
    let total = threads.len() * plan.iter().map(|(_, cases)| cases.len() + sizes.len()).sum::<usize>();
    let mut done = 0;
    let mut step = |now: &str| {
        observe(Progress { done, total, now });
        done += 1;
    };

    // The curve of reading is measured on both kinds.
    let both = &Pages::ALL[..if pages == Pages::Huge { 2 } else { 1 }];
    let mut report = Report::new(options.quick, machine);
    report.pages = Some(pages);
    let mut limits = Limits::new(options.quick);
    for count in threads {
        let threads = Threads::new(count)?;
        for (isa, cases) in &plan {
            limits.measure(&threads, *isa, Kind::Fma)?;
            limits.measure(&threads, *isa, Kind::Exp)?;
            for kind in Kind::PRODUCTS.into_iter().filter(|kind| kind.is_available(*isa)) {
                limits.measure(&threads, *isa, kind)?;
            }
            for &bytes in &sizes {
                step("limits");
                for &pages in both {
                    limits.measure(&threads, *isa, Kind::Read(bytes, pages))?;
                }
                limits.measure(&threads, *isa, Kind::Copy(bytes, pages))?;
            }
            let mut before = None;
            for case in cases {
                step(&case.id());
                match measure(case, &threads, pages, &mut limits, &mut before, options.quick)? {
                    Some(result) => report.cases.push(result),
                    None => report.skipped.push(skipped(&case.kernel)),
                }
            }
            report.limits.push(summary(&limits, pages, *isa, count));
        }
    }
    report.huge_share = limits.huge_share(pages);
    report.skipped.dedup();
    // Cases are measured in an order that saves measurements of limits, and shown in the order of the registry.
    let order: Vec<String> = kernels().flat_map(|k| cases_of(&k)).map(|case| case.id()).collect();
    let place = |c: &CaseResult| order.iter().position(|id| *id == format!("{}/{}", c.kernel, c.case));
    report.cases.sort_by_cached_key(|c| (c.threads, place(c)));
    Ok(report)
}

/// The pages that are asked for, if the machine has them; without one, huge where it has them.
pub(super) fn choose_pages(machine: &Machine, given: Option<Pages>) -> Result<Pages> {
    match given {
        Some(Pages::Huge) if !machine.has_huge_pages() => {
            let setting = machine.huge_pages.as_deref().unwrap_or("unknown");
            Err(Error::new(format!("huge pages are to be measured, but the setting of this machine is {setting}")))
        }
        Some(pages) => Ok(pages),
        None if machine.has_huge_pages() => Ok(Pages::Huge),
        None => Ok(Pages::Small),
    }
}

/// Orders cases so that those with the same limits are adjacent.
fn in_turns(mut cases: Vec<Case>) -> Vec<Case> {
    cases.sort_by_key(|case| (case.kernel.op as u32, case.memory_limit(Pages::Small)));
    cases
}

/// The reason why a kernel of the registry was not measured.
pub fn skipped(kernel: &KernelInfo) -> String {
    let why = match kernel.isa.is_available() {
        true => format!("{} leads to another kernel", Isa::ENV),
        false => format!("this CPU lacks one of {}", kernel.isa.features().join(", ")),
    };
    format!("{}: {why}", kernel.name)
}

/// The levels to measure, of those that `KVLANE_MAX_ISA` allows. The best need not include all others: AVX-VNNI is no feature of those with
/// AVX-512.
fn levels(given: &[Isa]) -> Result<Vec<Isa>> {
    let ceiling = Isa::ceiling_from_env()?;
    let exceeded = |level: Isa| ceiling.filter(|&ceiling| !level.is_within(ceiling));
    if given.is_empty() {
        return Ok(Isa::ALL.into_iter().filter(|&l| exceeded(l).is_none() && l.is_available()).collect());
    }
    for level in given {
        if !level.is_available() {
            return Err(Error::new(format!("this machine cannot run {level}: `kvlane info` tells what it lacks")));
        }
        if let Some(ceiling) = exceeded(*level) {
            return Err(Error::new(format!(
                "{} allows no more than {ceiling}, so {level} cannot be measured",
                Isa::ENV
            )));
        }
    }
    Ok(given.to_vec())
}

/// Working-set sizes of the bandwidth curves.
fn sizes(quick: bool) -> Vec<usize> {
    let step = if quick { 4 } else { 2 };
    std::iter::successors(Some(16usize << 10), |n| Some(n * step)).take_while(|&n| n <= 256 << 20).collect()
}

/// Measures a case between two measurements of its limits; `None` if a call would use another kernel.
fn measure(
    case: &Case,
    threads: &Threads,
    pages: Pages,
    limits: &mut Limits,
    before: &mut Option<(Kind, Limit)>,
    quick: bool,
) -> Result<Option<CaseResult>> {
    let isa = case.kernel.isa;
    let Some(mut prepared) = case.prepare(pages)? else {
        return Ok(None);
    };
    // If the next case has the same limit, the measurement after this case serves as the one before it.
    let memory = match (case.memory_limit(pages), before.take()) {
        (Some(kind), Some((same, limit))) if kind == same => Some((kind, limit)),
        (Some(kind), _) => Some((kind, limits.measure(threads, isa, kind)?)),
        (None, _) => None,
    };
    let arithmetic = match case.arithmetic_limit() {
        // A level of products may be emulated.
        Some(kind) => {
            let kind = if kind.is_available(isa) { kind } else { Kind::Fma };
            Some((kind, limits.measure(threads, isa, kind)?))
        }
        None => None,
    };

    let mut failure = None;
    let timing = time(Effort::case(quick), |calls| {
        repeat(calls, || {
            if let Err(e) = prepared.run(threads) {
                failure = Some(e);
            }
        })
    });
    if let Some(e) = failure {
        return Err(Error::new(format!("{}: {e}", case.id())));
    }

    let (mut memory_bound, mut arithmetic_bound) = (None, None);
    if let Some((kind, first)) = memory {
        let second = limits.measure(threads, isa, kind)?;
        memory_bound = Some(bound(kind, case.bytes() as f64, better(first, second.clone())));
        *before = Some((kind, second));
    }
    if let Some((kind, first)) = arithmetic {
        arithmetic_bound = Some(bound(kind, case.flops(), better(first, limits.measure(threads, isa, kind)?)));
    }
    let bounds = [&memory_bound, &arithmetic_bound].into_iter().flatten();
    let bound = bounds.max_by(|a, b| a.seconds.total_cmp(&b.seconds)).cloned();
    let kernel = &case.kernel;
    Ok(Some(CaseResult {
        kernel: kernel.name.to_owned(),
        op: kernel.op.name().to_owned(),
        src: kernel.src.name().to_owned(),
        dst: kernel.dst.name().to_owned(),
        isa: isa.name().to_owned(),
        case: case.name.clone(),
        threads: threads.count(),
        small: case.small,
        bytes: case.bytes(),
        flops: case.flops(),
        timing,
        bound,
        memory: memory_bound,
        arithmetic: arithmetic_bound,
    }))
}

fn better(a: Limit, b: Limit) -> Limit {
    if b.rate > a.rate { b } else { a }
}

fn bound(kind: Kind, amount: f64, limit: Limit) -> Bound {
    Bound { kind: kind.name().to_owned(), by: limit.by, rate: limit.rate, seconds: amount / limit.rate }
}

/// The limits of a level; memory's on pages of a kind, and reading on the other kind beside it.
fn summary(limits: &Limits, pages: Pages, isa: Isa, threads: usize) -> LevelLimits {
    let mut summary = LevelLimits::new(isa.name(), threads);
    for ((kind, limit), (_, loops)) in limits.best(threads, isa).zip(limits.loops(threads, isa)) {
        let bandwidth = |bytes, loops| Bandwidth { bytes, rate: limit.rate, by: limit.by.clone(), loops };
        match kind {
            Kind::Read(bytes, on) if on == pages => summary.read.push(bandwidth(bytes, loops.clone())),
            Kind::Read(bytes, _) => summary.read_small.push(bandwidth(bytes, loops.clone())),
            Kind::Copy(bytes, _) => summary.copy.push(bandwidth(bytes, Default::default())),
            // Without a curve, because it differs from a copy only in the caches that it fits into.
            Kind::Update(..) => {}
            Kind::Fma => summary.fma = Some(limit.rate),
            Kind::Exp => summary.exp = Some(limit.rate),
            Kind::Bf16Dot | Kind::Int8Dot | Kind::Bf16Tiles | Kind::Int8Tiles => {
                summary.products.insert(kind.name().to_owned(), limit.rate);
            }
        }
    }
    summary
}
