//! Comparison of two reports, case by case.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::report::{CaseResult, Report, seconds, threads};
use super::{Error, Result};

/// The key by which cases of two reports are matched.
fn key(c: &CaseResult) -> (&str, &str, usize) {
    (&c.kernel, &c.case, c.threads)
}

/// A table of speed ratios per case: above 1, the second report is faster.
///
/// # Errors
/// The reports have no case in common.
pub fn compare(a: &Report, b: &Report) -> Result<String> {
    let second: BTreeMap<_, &CaseResult> = b.cases.iter().map(|c| (key(c), c)).collect();
    let pairs: Vec<(&CaseResult, &CaseResult)> =
        a.cases.iter().filter_map(|c| Some((c, *second.get(&key(c))?))).collect();
    if pairs.is_empty() {
        return Err(Error::new("the two reports have no case in common: neither kernel, shape and threads fit"));
    }
    let cpu = |r: &Report| r.machine.cpu.clone().unwrap_or_else(|| r.machine.architecture.clone());
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "A  kvlane {} on {}", a.kvlane, cpu(a));
    let _ = writeln!(text, "B  kvlane {} on {}", b.kvlane, cpu(b));
    if a.pages != b.pages {
        let pages = |r: &Report| r.pages.map_or("pages that it does not name".to_owned(), |p| format!("{p} pages"));
        let _ = writeln!(text, "A is on {}, B on {}: times and limits differ by that too", pages(a), pages(b));
    }
    let mut group = None;
    let mut means: Vec<(String, f64, usize)> = Vec::new();
    for (x, y) in &pairs {
        let this = (&x.op, &x.isa, x.threads);
        if group != Some(this) {
            group = Some(this);
            let heading = format!("{}, {}, {}", x.op, x.isa, threads(x.threads));
            let _ = writeln!(
                text,
                "\n{heading}\n  {:<36} {:<9} {:>9} {:>9} {:>9} {:>9} {:>9}",
                "case", "types", "A", "B", "A reached", "B reached", "A/B"
            );
            means.push((heading, 0.0, 0));
        }
        let ratio = x.timing.best / y.timing.best;
        let reached = |c: &CaseResult| c.reached().map_or_else(|| "-".to_owned(), |r| format!("{:.0} %", r * 100.0));
        let _ = writeln!(
            text,
            "  {:<36} {:<9} {:>9} {:>9} {:>9} {:>9} {ratio:>9.2}",
            x.case,
            x.types(),
            seconds(x.timing.best),
            seconds(y.timing.best),
            reached(x),
            reached(y)
        );
        if let Some(mean) = means.last_mut() {
            mean.1 += ratio.ln();
            mean.2 += 1;
        }
    }
    let _ = writeln!(text, "\ngeometric means of A/B");
    for (heading, sum, n) in means {
        let _ = writeln!(text, "  {heading:<46} {:>6.2}", (sum / n as f64).exp());
    }
    for (name, report) in [("A", a), ("B", b)] {
        let alone = report.cases.len() - pairs.len();
        if alone > 0 {
            let _ = writeln!(text, "\n{alone} of {} cases are in {name} only", report.cases.len());
        }
    }
    Ok(text)
}
