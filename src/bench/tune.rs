//! The search for the tuning of this CPU.
//!
//! Groups of cases depend on parts of a [`Tuning`]: decode over one KV head at a time, decode over heads that lie together, with several
//! query rows per KV head, with one, and with long heads, and prompts. Each part is searched on its own group, every candidate once per
//! round, so that a change in the machine's load meets all of them; the best few are compared again. A candidate replaces the table's
//! entry only if it is faster by more than chance. The gain that is shown is measured afterwards, by the two in turns, and what does not
//! gain then is not taken.

use std::fmt::Write;
use std::time::{Duration, Instant};

use super::cases::{Case, Prepared, cases_of};
use super::data::Pages;
use super::limits::Threads;
use super::machine::Machine;
use super::report::{seconds, threads};
use super::run::{Progress, choose_pages};
use super::{Error, Result};
use crate::{Context, Isa, KeyOrder, Op, Prefetch, ScoreTiles, Tuning, kernels};

/// What to tune.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Fewer cases and rounds.
    pub quick: bool,
    /// The level whose kernels are tuned. Without one: the best that is not partial.
    pub level: Option<Isa>,
    /// The number of threads; 0 is one.
    pub threads: usize,
    /// The pages of all buffers. Without one: huge, if the machine has them.
    pub pages: Option<Pages>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// The machine.
    pub machine: Machine,
    /// The level.
    pub level: Isa,
    /// The number of threads.
    pub threads: usize,
    /// The pages of the buffers.
    pub pages: Pages,
    /// The table's entry for this CPU.
    pub entry: Tuning,
    /// The fastest tuning.
    pub found: Tuning,
    /// The gain by group of cases.
    pub groups: Vec<Gains>,
}

/// The gains of a group of cases.
#[derive(Clone, Debug)]
pub struct Gains {
    /// What the cases do.
    pub name: &'static str,
    /// The cases.
    pub cases: Vec<Gain>,
}

/// The times of a case.
#[derive(Clone, Debug)]
pub struct Gain {
    /// Kernel and shape.
    pub case: String,
    /// Seconds per call with the table's entry.
    pub entry: f64,
    /// Seconds per call with the tuning that was found.
    pub found: f64,
}

impl Gains {
    /// How many times as fast the cases are, by the geometric mean.
    pub fn mean(&self) -> f64 {
        let sum: f64 = self.cases.iter().map(|case| (case.entry / case.found).ln()).sum();
        (sum / self.cases.len().max(1) as f64).exp()
    }
}

/// A gain below this may be chance, and the table's entry stays.
const LEAST_GAIN: f64 = 1.01;
/// Candidates that are compared a second time.
const FINALISTS: usize = 4;

/// The formats of K and V whose cases are timed: those whose decode memory can bind, each of its own number of bytes per element.
/// The search takes minutes with these, and as long again with every two more.
const FORMATS: &[&str] = &["f32", "f16", "bf16", "int8", "q8_0", "q4_0"];
/// Those of them whose heads of 128, and of 256, have less than 512 bytes, and the others.
const SHORT_128: &[&str] = &["f16", "bf16", "int8", "q8_0", "q4_0"];
const SHORT_256: &[&str] = &["int8", "q8_0", "q4_0"];
const LONG_128: &[&str] = &["f32"];
const LONG_256: &[&str] = &["f32", "f16", "bf16"];
/// The blocks, and the others.
const BLOCKS: &[&str] = &["q8_0", "q4_0"];
const OTHERS: &[&str] = &["f32", "f16", "bf16", "int8"];

/// A name, and shapes with formats.
type Group = (&'static str, &'static [(&'static str, &'static [&'static str])]);

/// The groups of cases: of decode, caches that are larger than those of the CPU, in both orders of memory.
const GROUPS: [Group; 5] = [
    (
        "decode, one KV head at a time",
        &[
            ("decode 16384, 32/8x128, bhsd", FORMATS),
            ("decode 4096, 32/32x128, bhsd", FORMATS),
            ("decode 4096, 32/8x256, bhsd", FORMATS),
        ],
    ),
    (
        "decode, the heads of a token together",
        &[
            ("decode 16384, 32/8x128, bshd", SHORT_128),
            ("decode 4096, 32/8x256, bshd", SHORT_256),
            ("decode 4096, 32/32x128, bshd", BLOCKS),
        ],
    ),
    ("decode, the heads of a token together, one query row each", &[("decode 4096, 32/32x128, bshd", OTHERS)]),
    (
        "decode, the heads of a token together, 512 bytes or more each",
        &[("decode 16384, 32/8x128, bshd", LONG_128), ("decode 4096, 32/8x256, bshd", LONG_256)],
    ),
    ("prompts", &[("prefill 512, 32/8x128", OTHERS)]),
];

/// Run distances that are tried, in bytes. A subblock of 16 keys of all heads of a token is the least that has an effect.
const DISTANCES: [usize; 6] = [4 << 10, 12 << 10, 32 << 10, 64 << 10, 128 << 10, 512 << 10];

/// Searches the tuning of this CPU.
///
/// # Errors
/// A level that the CPU or `KVLANE_MAX_ISA` excludes or that has no tuning, pages that the machine does not have, threads that cannot
/// be started, or too little memory.
pub fn tune(options: &Options, observe: &mut dyn FnMut(Progress)) -> Result<Tuned> {
    let machine = Machine::detect();
    let pages = choose_pages(&machine, options.pages)?;
    let level = level(options.level)?;
    let threads = Threads::new(options.threads.max(1))?;
    let context = Context::with_max_isa(level)?;
    if context.isa() != level {
        return Err(Error::new(format!(
            "{} allows no more than {}, so {level} cannot be tuned",
            Isa::ENV,
            context.isa()
        )));
    }
    let entry = context.tuning();
    let mut groups = GROUPS.map(|(_, shapes)| cases(level, shapes, options.quick));
    if level != Isa::Avx512 {
        // Other levels have one kind of register tiles.
        groups[4].clear();
    }
    let [block, run, one_row, long_heads, prompts] = &groups;
    let mut search = Search {
        threads: &threads,
        pages,
        budget: Duration::from_millis(if options.quick { 500 } else { 4000 }),
        observe,
        done: 0,
        // All candidates, the best, and the comparison at the end.
        total: 3 * groups.iter().map(Vec::len).sum::<usize>(),
    };
    let mut found = entry;

    let mut candidates = vec![entry];
    for order in KeyOrder::ALL {
        candidates.extend(Prefetch::ALL.map(|kind| entry.block(kind).block_order(order)));
    }
    let best = search.best(block, &candidates)?;
    (found.block, found.block_order) = (best.block, best.block_order);

    let mut candidates = vec![entry];
    for kind in Prefetch::ALL {
        // Some kinds do not look so far.
        let distances = if kind == Prefetch::Off { &[entry.run_distance][..] } else { &DISTANCES };
        candidates.extend(distances.iter().map(|&distance| entry.run(kind).run_distance(distance)));
    }
    let best = search.best(run, &candidates)?;
    (found.run, found.run_distance) = (best.run, best.run_distance);

    let entry_there = entry.run_distance(found.run_distance);
    let mut candidates = vec![entry_there];
    candidates.extend(Prefetch::ALL.map(|kind| entry_there.run_one_row(kind)));
    found.run_one_row = search.best(one_row, &candidates)?.run_one_row;

    let mut candidates = vec![entry_there];
    candidates.extend(Prefetch::ALL.map(|kind| entry_there.run_long_heads(kind)));
    found.run_long_heads = search.best(long_heads, &candidates)?.run_long_heads;

    let mut candidates = vec![entry];
    candidates.extend(ScoreTiles::ALL.map(|tiles| entry.score_tiles(tiles)));
    found.score_tiles = search.best(prompts, &candidates)?.score_tiles;

    let mut gains = Vec::new();
    for ((name, _), cases) in GROUPS.into_iter().zip(&groups) {
        let mut group = Gains { name, cases: Vec::new() };
        for case in cases {
            let times = search.times(case, &[entry, found])?;
            group.cases.push(Gain { case: case.id(), entry: times[0], found: times[1] });
        }
        gains.push(group);
    }
    if gains[0].mean() < 1.0 {
        (found.block, found.block_order) = (entry.block, entry.block_order);
    }
    if gains[1].mean() < 1.0 {
        (found.run, found.run_distance) = (entry.run, entry.run_distance);
    }
    if gains[2].mean() < 1.0 {
        found.run_one_row = entry.run_one_row;
    }
    if gains[3].mean() < 1.0 {
        found.run_long_heads = entry.run_long_heads;
    }
    if gains[4].mean() < 1.0 {
        found.score_tiles = entry.score_tiles;
    }
    Ok(Tuned { machine, level, threads: threads.count(), pages, entry, found, groups: gains })
}

/// The level to tune.
fn level(given: Option<Isa>) -> Result<Isa> {
    match given {
        Some(level) if level.is_partial() => {
            Err(Error::new(format!("{level} prefetches in ways of its own; tune the level below it")))
        }
        Some(level) => Ok(level),
        None => {
            let best = Context::new()?.isa();
            let full = |level: &Isa| !level.is_partial() && level.is_available() && level.is_within(best);
            let levels = Isa::ALL.into_iter().filter(full);
            levels.max_by_key(|level| level.priority()).ok_or_else(|| Error::new("no level can be tuned"))
        }
    }
}

/// The formats that are timed if the search is quick, of two shapes of each group.
const QUICK_FORMATS: [&str; 2] = ["f32", "bf16"];

/// The cases of a level with these shapes and formats.
fn cases(level: Isa, shapes: &[(&str, &[&str])], quick: bool) -> Vec<Case> {
    let shapes = if quick { &shapes[..shapes.len().min(2)] } else { shapes };
    let is_wanted = |case: &Case| {
        let format = case.kernel.src.name();
        let listed = shapes.iter().any(|(shape, formats)| **shape == *case.name && formats.contains(&format));
        listed && (!quick || QUICK_FORMATS.contains(&format))
    };
    kernels()
        .filter(|kernel| kernel.op == Op::Attention && kernel.isa == level && kernel.precision.is_none())
        .flat_map(|kernel| cases_of(&kernel))
        .filter(is_wanted)
        .collect()
}

struct Search<'a> {
    threads: &'a Threads,
    pages: Pages,
    /// Of one case, for all candidates together.
    budget: Duration,
    observe: &'a mut dyn FnMut(Progress),
    done: usize,
    total: usize,
}

impl Search<'_> {
    /// The candidate with the best mean over the cases; the first, unless another is clearly faster. All are compared once, and the
    /// best few again, because the best of many is often so by chance.
    fn best(&mut self, cases: &[Case], candidates: &[Tuning]) -> Result<Tuning> {
        let ranked = self.ranked(cases, candidates)?;
        let few: Vec<Tuning> = ranked.into_iter().map(|(_, candidate)| candidate).take(FINALISTS).collect();
        let again: Vec<Tuning> = candidates.iter().copied().take(1).chain(few).collect();
        let best = self.ranked(cases, &again)?.into_iter().next();
        Ok(best.filter(|(gain, _)| *gain > LEAST_GAIN).map_or(candidates[0], |(_, candidate)| candidate))
    }

    /// How many times as fast as the first candidate each of the others is, by the geometric mean, the fastest first.
    fn ranked(&mut self, cases: &[Case], candidates: &[Tuning]) -> Result<Vec<(f64, Tuning)>> {
        let mut scores = vec![0.0; candidates.len()];
        for case in cases {
            let times = self.times(case, candidates)?;
            for (score, time) in scores.iter_mut().zip(&times) {
                *score += (times[0] / time).ln() / cases.len() as f64;
            }
        }
        let mut ranked: Vec<(f64, Tuning)> =
            scores.iter().map(|score| score.exp()).zip(candidates.iter().copied()).skip(1).collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        Ok(ranked)
    }

    /// The least seconds per call of a case with each candidate.
    fn times(&mut self, case: &Case, candidates: &[Tuning]) -> Result<Vec<f64>> {
        (self.observe)(Progress { done: self.done, total: self.total, now: &case.id() });
        self.done += 1;
        let Some(mut prepared) = case.prepare(self.pages)? else {
            return Err(Error::new(format!("{} leads from {} to another kernel", Isa::ENV, case.kernel.name)));
        };
        let call = |prepared: &mut Prepared, tuning: Tuning| -> Result<f64> {
            prepared.tune(tuning);
            // What the call before has left in the caches depends on its tuning, so that it must be of the same.
            prepared.run(self.threads)?;
            let start = Instant::now();
            prepared.run(self.threads)?;
            Ok(start.elapsed().as_secs_f64())
        };
        let mut times = vec![f64::INFINITY; candidates.len()];
        let start = Instant::now();
        let mut rounds = 0;
        while rounds < 3 || start.elapsed() < self.budget {
            for (time, &candidate) in times.iter_mut().zip(candidates) {
                *time = call(&mut prepared, candidate)?.min(*time);
            }
            rounds += 1;
        }
        Ok(times)
    }
}

impl Tuned {
    /// What was found, formatted for a terminal.
    pub fn text(&self) -> String {
        let cpu = self.machine.cpu.as_deref().unwrap_or(&self.machine.architecture);
        let mut text = format!("{cpu}, {}, {}, {} pages\n", self.level, threads(self.threads), self.pages);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n  {:<16} {:<22} found", "", "table");
        for ((field, entry), (_, found)) in fields(&self.entry).into_iter().zip(fields(&self.found)) {
            let changed = if entry == found { "" } else { "  <- changed" };
            let _ = writeln!(text, "  {field:<16} {:<22} {}{changed}", short(&entry), short(&found));
        }
        for group in self.groups.iter().filter(|group| !group.cases.is_empty()) {
            let _ = writeln!(text, "\n{}: {:.2} times as fast", group.name, group.mean());
            let _ = writeln!(text, "  {:<58} {:>9} {:>9} {:>6}", "case", "table", "found", "gain");
            for case in &group.cases {
                let (entry, found) = (seconds(case.entry), seconds(case.found));
                let _ = writeln!(text, "  {:<58} {entry:>9} {found:>9} {:>6.2}", case.case, case.entry / case.found);
            }
        }
        let _ = writeln!(text, "\nAn entry of the table in src/tuning.rs:\n\n{}", self.entry_text());
        let _ = writeln!(text, "In a program:\n\n{}", self.program_text());
        text
    }

    /// An entry of the library's table for CPUs like this one.
    pub fn entry_text(&self) -> String {
        let (vendor, features) = crate::cpu_class();
        let cpu = self.machine.cpu.as_deref().unwrap_or(&self.machine.architecture);
        let mut text = format!(
            "    // {cpu}.\n    Entry {{\n        vendor: {:?},\n        features: &{features:?},\n        level: Isa::{:?},\n        \
             tuning: Tuning {{\n",
            vendor, self.level
        );
        for (field, value) in fields(&self.found) {
            let _ = writeln!(text, "            {field}: {value},");
        }
        text + "        },\n    },\n"
    }

    /// The call that sets the tuning in a program.
    fn program_text(&self) -> String {
        let mut text = "    let tuning = Tuning::default()".to_owned();
        for (field, value) in fields(&self.found) {
            let _ = write!(text, "\n        .{field}({value})");
        }
        text + ";\n    let context = Context::new()?.tuned(tuning);\n"
    }
}

/// The names of a tuning's fields, and their values as Rust has them.
fn fields(tuning: &Tuning) -> [(&'static str, String); 7] {
    let kind = |kind: Prefetch| format!("Prefetch::{kind:?}");
    [
        ("block", kind(tuning.block)),
        ("block_order", format!("KeyOrder::{:?}", tuning.block_order)),
        ("run", kind(tuning.run)),
        ("run_one_row", kind(tuning.run_one_row)),
        ("run_long_heads", kind(tuning.run_long_heads)),
        ("run_distance", tuning.run_distance.to_string()),
        ("score_tiles", format!("ScoreTiles::{:?}", tuning.score_tiles)),
    ]
}

/// A value without the name of its type.
fn short(value: &str) -> &str {
    value.rsplit("::").next().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_names_a_case() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available() && !level.is_partial()) {
            for (name, shapes) in GROUPS {
                let all: usize = shapes.iter().map(|(_, formats)| formats.len()).sum();
                assert_eq!(cases(level, shapes, false).len(), all, "{name} {level}");
                let of = |formats: &[&str]| formats.iter().filter(|format| QUICK_FORMATS.contains(format)).count();
                let quick: usize = shapes.iter().take(2).map(|(_, formats)| of(formats)).sum();
                assert_eq!(cases(level, shapes, true).len(), quick, "{name} {level}");
            }
        }
    }

    #[test]
    fn an_entry_can_be_pasted() {
        let found = Tuning::default().run(Prefetch::Off).run_long_heads(Prefetch::NextKeys).run_distance(4096);
        let tuned = Tuned {
            machine: Machine { cpu: Some("A CPU".to_owned()), ..Machine::default() },
            level: Isa::Scalar,
            threads: 1,
            pages: Pages::Huge,
            entry: Tuning::default(),
            found,
            groups: vec![Gains {
                name: "decode",
                cases: vec![
                    Gain { case: "a".to_owned(), entry: 4e-3, found: 1e-3 },
                    Gain { case: "b".to_owned(), entry: 1e-3, found: 1e-3 },
                ],
            }],
        };
        let text = tuned.text();
        for part in [
            "A CPU, scalar, 1 thread, huge pages",
            "Off  <- changed",
            "decode: 2.00 times as fast",
            "level: Isa::Scalar,",
            "run_long_heads: Prefetch::NextKeys,\n            run_distance: 4096,\n            score_tiles: ScoreTiles::Wide,",
            ".run_long_heads(Prefetch::NextKeys)\n        .run_distance(4096)\n        .score_tiles(ScoreTiles::Wide)",
        ] {
            assert!(text.contains(part), "{text}\nlacks {part:?}");
        }
    }

    #[test]
    fn the_first_candidate_stays_unless_another_is_clearly_faster() {
        let threads = Threads::new(1).unwrap();
        let mut steps = 0;
        let mut observe = |_: Progress| steps += 1;
        let budget = Duration::ZERO;
        let mut search =
            Search { threads: &threads, pages: Pages::Small, budget, observe: &mut observe, done: 0, total: 1 };
        let cases: Vec<Case> = kernels()
            .filter(|kernel| kernel.op == Op::Attention && kernel.isa == Isa::Scalar)
            .flat_map(|kernel| cases_of(&kernel))
            .filter(|case| case.name.starts_with("decode 16,"))
            .collect();
        let only = Tuning::default().run_distance(77);
        assert_eq!(search.best(&cases, &[only]).unwrap(), only);
        let others = DISTANCES.map(|bytes| only.run_distance(bytes));
        let mut ranked = search.ranked(&cases, &[&[only], &others[..]].concat()).unwrap();
        assert!(ranked.is_sorted_by(|a, b| a.0 >= b.0) && ranked.iter().all(|(gain, _)| *gain > 0.0));
        ranked.sort_by_key(|(_, tuning)| tuning.run_distance);
        assert_eq!(ranked.into_iter().map(|(_, tuning)| tuning).collect::<Vec<_>>(), others);
        assert_eq!(steps, 3 * cases.len());
    }
}
