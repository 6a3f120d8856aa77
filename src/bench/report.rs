//! The result of a run, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::data::Pages;
use super::machine::Machine;
use super::timing::Timing;
use super::{Error, Result};

/// The name of the schema, which a file must carry.
const SCHEMA: &str = "kvlane-bench";
/// Incremented when an older reader would misread a newer file.
const VERSION: u32 = 1;

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The name of the schema.
    pub schema: String,
    /// The version of the schema.
    pub version: u32,
    /// The library's version.
    pub kvlane: String,
    /// Whether the run was a quick one.
    pub quick: bool,
    /// The machine.
    pub machine: Machine,
    /// The pages of the buffers; reports of older versions do not say.
    #[serde(default)]
    pub pages: Option<Pages>,
    /// The share of the limits' buffer that the operating system gave huge pages, if it says so.
    #[serde(default)]
    pub huge_share: Option<f64>,
    /// The limits, for each level and thread count.
    pub limits: Vec<LevelLimits>,
    /// The measured cases.
    pub cases: Vec<CaseResult>,
    /// Kernels that were not measured, with the reason.
    pub skipped: Vec<String>,
}

/// The limits of a level on a number of threads; the best of the whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LevelLimits {
    /// The level.
    pub isa: String,
    /// The threads.
    pub threads: usize,
    /// f32 operations per second, a multiply-add counted as two.
    pub fma: Option<f64>,
    /// Exponentials per second.
    pub exp: Option<f64>,
    /// Operations per second of the products that the CPU has beside multiply-adds, by name.
    #[serde(default)]
    pub products: BTreeMap<String, f64>,
    /// Read bandwidth by working-set size, on the report's pages.
    pub read: Vec<Bandwidth>,
    /// The same on small pages, if the report's are huge.
    #[serde(default)]
    pub read_small: Vec<Bandwidth>,
    /// Copy bandwidth by bytes read plus bytes written.
    pub copy: Vec<Bandwidth>,
}

/// A bandwidth at a working-set size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// The size.
    pub bytes: usize,
    /// Bytes per second.
    pub rate: f64,
    /// The fastest loop.
    pub by: String,
    /// What every loop reached when it was measured for the first time.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub loops: BTreeMap<String, f64>,
}

impl LevelLimits {
    /// Without figures.
    pub fn new(isa: &str, threads: usize) -> Self {
        let isa = isa.to_owned();
        let (read, read_small, copy) = (Vec::new(), Vec::new(), Vec::new());
        Self { isa, threads, fma: None, exp: None, products: BTreeMap::new(), read, read_small, copy }
    }
}

/// The result of a kernel on a shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseResult {
    /// The kernel's name in the registry.
    pub kernel: String,
    /// Its operation.
    pub op: String,
    /// The type that it reads.
    pub src: String,
    /// The type that it writes.
    pub dst: String,
    /// Its level.
    pub isa: String,
    /// The shape.
    pub case: String,
    /// The threads.
    pub threads: usize,
    /// Whether the overhead of a call matters.
    pub small: bool,
    /// Bytes that a call moves.
    pub bytes: usize,
    /// Useful floating-point operations of a call.
    pub flops: f64,
    /// Seconds per call.
    pub timing: Timing,
    /// The limit that binds: memory or arithmetic, whichever takes longer.
    pub bound: Option<Bound>,
    /// The limit of memory; reports of older versions have [`Self::bound`] only.
    #[serde(default)]
    pub memory: Option<Bound>,
    /// The limit of arithmetic.
    #[serde(default)]
    pub arithmetic: Option<Bound>,
}

/// A limit of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// `read`, `copy` or `update`; `fma`, or the products that a level has instead.
    pub kind: String,
    /// The loop that reached it.
    pub by: String,
    /// Bytes or operations per second.
    pub rate: f64,
    /// Seconds that a call takes at the limit.
    pub seconds: f64,
}

impl Bound {
    /// Whether it is a limit of memory.
    pub fn is_memory(&self) -> bool {
        matches!(&*self.kind, "read" | "copy" | "update")
    }
}

impl CaseResult {
    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        self.bytes as f64 / self.timing.best
    }

    /// Operations per second.
    pub fn operations(&self) -> f64 {
        self.flops / self.timing.best
    }

    /// The share of the limit that binds that the case reached.
    pub fn reached(&self) -> Option<f64> {
        self.share(&self.bound)
    }

    /// The share of a limit that the case reached.
    pub fn share(&self, bound: &Option<Bound>) -> Option<f64> {
        bound.as_ref().map(|bound| bound.seconds / self.timing.best)
    }

    /// `f16`, or `f32>f16`.
    pub fn types(&self) -> String {
        if self.src == self.dst { self.src.clone() } else { format!("{}>{}", self.src, self.dst) }
    }
}

impl Report {
    /// A report without figures.
    pub fn new(quick: bool, machine: Machine) -> Self {
        Self {
            schema: SCHEMA.to_owned(),
            version: VERSION,
            kvlane: env!("CARGO_PKG_VERSION").to_owned(),
            quick,
            machine,
            pages: None,
            huge_share: None,
            limits: Vec::new(),
            cases: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Reads a report.
    ///
    /// # Errors
    /// The file cannot be read, is not a report, or has another version.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        Self::parse(&text).map_err(|e| Error::file(path, e))
    }

    /// Reads a report from text.
    ///
    /// # Errors
    /// The text is not a report, or has another version.
    pub fn parse(text: &str) -> Result<Self> {
        let value: serde_json::Value =
            serde_json::from_str(text).map_err(|e| Error::new(format!("not a report of `kvlane bench`: {e}")))?;
        if value["schema"] != SCHEMA {
            return Err(Error::new("not a report of `kvlane bench`: its schema is not called kvlane-bench"));
        }
        if value["version"] != VERSION {
            let version = &value["version"];
            return Err(Error::new(format!("a report of schema version {version}, but this program reads {VERSION}")));
        }
        serde_json::from_value(value).map_err(|e| Error::new(format!("a damaged report of `kvlane bench`: {e}")))
    }

    /// The report as JSON.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("plain data with string keys serialises");
        text.push('\n');
        text
    }

    /// The machine, formatted for a terminal.
    pub fn machine_text(&self) -> String {
        let m = &self.machine;
        let mut text = String::new();
        let mut line = |what: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{what:<12}{value}");
        };
        line("kvlane", format!("{}{}", self.kvlane, if self.quick { ", quick run" } else { "" }));
        line("CPU", format!("{} ({}, {})", m.cpu.as_deref().unwrap_or("unknown"), m.architecture, m.os));
        line("CPUs", format!("{} usable", m.cpus));
        let caches: Vec<String> = m
            .caches
            .iter()
            .filter(|c| c.kind != "Instruction")
            .map(|c| format!("L{} {} (CPU {})", c.level, size(c.bytes), c.shared_by))
            .collect();
        line("caches", if caches.is_empty() { "unknown".to_owned() } else { caches.join(", ") });
        for (i, level) in m.levels.iter().enumerate() {
            let state = level.missing.as_ref().map_or_else(|| "available".to_owned(), |why| format!("not here: {why}"));
            line(if i == 0 { "levels" } else { "" }, format!("{:<8}{state}", level.name));
        }
        line("governor", m.governor.clone().unwrap_or_else(|| "not visible".to_owned()));
        line("huge pages", m.huge_pages.clone().unwrap_or_else(|| "unknown".to_owned()));
        if let Some(pages) = self.pages {
            let share = self.huge_share.filter(|_| pages == Pages::Huge);
            let share = share.map_or_else(String::new, |share| format!(", {:.0} % obtained", share * 100.0));
            line("buffers on", format!("{pages} pages{share}"));
        }
        if let Some(load) = m.load {
            line("load before", format!("{load:.2}{}", if load > 0.5 { ": others were busy here" } else { "" }));
        }
        text
    }

    /// The limits, formatted for a terminal.
    pub fn limits_text(&self) -> String {
        let mut text = String::new();
        for l in &self.limits {
            let mut heading = format!("\nlimits, {}, {}", l.isa, threads(l.threads));
            if let Some(fma) = l.fma {
                heading += &format!(": {} GFLOP/s multiply-add", giga(fma));
            }
            if let Some(exp) = l.exp {
                heading += &format!(", {} G exponentials/s", giga(exp));
            }
            let _ = writeln!(text, "{heading}");
            let products: Vec<String> =
                l.products.iter().map(|(name, rate)| format!("{} {name}", giga(*rate))).collect();
            if !products.is_empty() {
                let _ = writeln!(text, "  G operations/s: {}", products.join(", "));
            }
            let mut sizes: Vec<usize> = l.read.iter().chain(&l.read_small).chain(&l.copy).map(|b| b.bytes).collect();
            sizes.sort_unstable();
            sizes.dedup();
            let both = !l.read_small.is_empty();
            if !sizes.is_empty() {
                let small = if both { format!("{:>9}  {:<16}", "small", "by") } else { String::new() };
                let row = format!("  {:>10}  {:>9}  {:<16}{small}{:>9}  by", "bytes", "read GB/s", "by", "copy GB/s");
                let _ = writeln!(text, "{row}");
            }
            for bytes in sizes {
                let find = |list: &[Bandwidth]| {
                    let found = list.iter().find(|b| b.bytes == bytes);
                    found.map_or((String::new(), String::new()), |b| (giga(b.rate), b.by.clone()))
                };
                let (read, read_by) = find(&l.read);
                let (small, small_by) = find(&l.read_small);
                let small = if both { format!("{small:>9}  {small_by:<16}") } else { String::new() };
                let (copy, copy_by) = find(&l.copy);
                let row = format!("  {:>10}  {read:>9}  {read_by:<16}{small}{copy:>9}  {copy_by}", size(bytes));
                let _ = writeln!(text, "{}", row.trim_end());
            }
            text += &loops_text(l, self.pages);
        }
        text
    }

    /// The cases, formatted for a terminal of 100 columns.
    pub fn cases_text(&self) -> String {
        let mut text = String::new();
        let mut group = None;
        for c in &self.cases {
            let this = (&c.op, &c.isa, c.threads);
            if group != Some(this) {
                group = Some(this);
                let _ = writeln!(text, "\n{}, {}, {}", c.op, c.isa, threads(c.threads));
                let _ = writeln!(
                    text,
                    "  {:<36} {:<9} {:>9} {:>7} {:>8} {:>6} {:>6} {:>10}",
                    "case", "types", "time", "GB/s", "GFLOP/s", "memory", "arith.", "binding"
                );
            }
            let flops = if c.flops > 0.0 { giga(c.operations()) } else { "-".to_owned() };
            let share =
                |bound| c.share(bound).map_or_else(|| "-".to_owned(), |share| format!("{:.0} %", share * 100.0));
            // An older report has the limit that binds only.
            let memory =
                if c.memory.is_none() && c.bound.as_ref().is_some_and(Bound::is_memory) { &c.bound } else { &c.memory };
            let arithmetic = if c.arithmetic.is_none() && c.bound.as_ref().is_some_and(|b| !b.is_memory()) {
                &c.bound
            } else {
                &c.arithmetic
            };
            let _ = writeln!(
                text,
                "  {:<36} {:<9} {:>9} {:>7} {flops:>8} {:>6} {:>6} {:>10}",
                c.case,
                c.types(),
                seconds(c.timing.best),
                giga(c.bandwidth()),
                share(memory),
                share(arithmetic),
                c.bound.as_ref().map_or("-", |bound| &bound.kind)
            );
        }
        text + &self.small_text()
    }

    /// The overhead of small calls.
    fn small_text(&self) -> String {
        let mut text = String::new();
        for c in self.cases.iter().filter(|c| c.small) {
            let Some(bound) = &c.bound else { continue };
            if text.is_empty() {
                let _ = writeln!(
                    text,
                    "\nsmall calls\n  {:<25} {:<36} {:>7} {:>8} {:>8} {:>9}",
                    "kernel", "case", "threads", "ns/call", "at limit", "overhead"
                );
            }
            let (call, limit) = (c.timing.best * 1e9, bound.seconds * 1e9);
            let _ = writeln!(
                text,
                "  {:<25} {:<36} {:>7} {call:>8.0} {limit:>8.0} {:>9.0}",
                c.kernel,
                c.case,
                c.threads,
                call - limit
            );
        }
        text
    }
}

/// What every loop reads from the largest buffer, by streams and prefetches.
fn loops_text(limits: &LevelLimits, pages: Option<Pages>) -> String {
    let mut text = String::new();
    for (list, pages) in [(&limits.read, pages.unwrap_or_default()), (&limits.read_small, Pages::Small)] {
        // A quarter of the largest, where a machine has it: the size of a long cache.
        let Some(largest) = list.iter().filter(|b| !b.loops.is_empty()).map(|b| b.bytes).max() else { continue };
        let Some(of) = list.iter().filter(|b| b.bytes <= largest / 4).max_by_key(|b| b.bytes) else { continue };
        let _ = writeln!(
            text,
            "  reading {} on {pages} pages, GB/s{:>14} {:>9} {:>9}",
            size(of.bytes),
            "plain",
            "near",
            "far"
        );
        for streams in [1, 2, 4, 8] {
            let name = format!("{streams} stream{}", if streams == 1 { "" } else { "s" });
            let rate = |suffix: &str| of.loops.get(&format!("{name}{suffix}")).map_or_else(String::new, |r| giga(*r));
            let _ = writeln!(text, "  {name:>40} {:>9} {:>9} {:>9}", rate(""), rate(", near"), rate(", far"));
        }
    }
    text
}

/// `1 thread`, `2 threads`.
pub(super) fn threads(n: usize) -> String {
    format!("{n} thread{}", if n == 1 { "" } else { "s" })
}

/// In units of 10^9, with at least three digits.
pub(super) fn giga(x: f64) -> String {
    let x = x / 1e9;
    let digits = if x >= 99.95 {
        0
    } else if x >= 9.995 {
        1
    } else {
        2
    };
    format!("{x:.digits$}")
}

/// `16 KiB`.
pub(super) fn size(bytes: usize) -> String {
    let x = bytes as f64;
    let (x, unit) = match bytes {
        0..1024 => return format!("{bytes} B"),
        1024..0x10_0000 => (x / 1024.0, "KiB"),
        0x10_0000..0x4000_0000 => (x / 1048576.0, "MiB"),
        _ => (x / 1073741824.0, "GiB"),
    };
    if x.fract() == 0.0 { format!("{x} {unit}") } else { format!("{x:.1} {unit}") }
}

/// A time with a suitable unit.
pub(super) fn seconds(t: f64) -> String {
    let (x, unit) = match t {
        t if t < 0.999_5e-6 => (t * 1e9, "ns"),
        t if t < 0.999_5e-3 => (t * 1e6, "us"),
        t if t < 0.999_5 => (t * 1e3, "ms"),
        t => (t, "s"),
    };
    format!("{} {unit}", giga(x * 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_units() {
        assert_eq!([giga(1.234e9), giga(12.34e9), giga(123.4e9)], ["1.23", "12.3", "123"]);
        assert_eq!([size(16), size(16 << 10), size(16 << 20), size(3 << 19)], ["16 B", "16 KiB", "16 MiB", "1.5 MiB"]);
        assert_eq!([seconds(5e-7), seconds(1.2e-3), seconds(2.0)], ["500 ns", "1.20 ms", "2.00 s"]);
    }
}
