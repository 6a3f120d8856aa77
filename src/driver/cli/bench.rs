//! `kvlane bench`: the command line of [`crate::bench`].

use std::path::PathBuf;

use clap::Args;

use super::model::{context, note_threads};
use super::output::{note, print, progress_bar};
use super::values::{self, isa_parser, pages_parser};
use crate::Isa;
use crate::bench::Pages;
use crate::bench::compare::compare;
use crate::bench::report::Report;
use crate::bench::roofline;
use crate::bench::run::{Options, Progress, run};
use crate::driver::error::{Error, Result};

/// Measure every kernel against what this machine can do.
///
/// Measures the limits first: bandwidth of reading and copying by working-set size, with one to eight streams, with and
/// without prefetches, on small and on huge pages; multiply-adds, products of bf16 and of integers, exponentials. Then
/// measures every kernel of every level on the shapes of real models, each between two measurements of its own limits.
/// The table shows the shares of the limits of memory and of arithmetic that each kernel reached, and which of the two
/// binds. A share above 100 % means that the machine was busier while the limit was measured.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kvlane bench --quick
  kvlane bench --threads 1,2 --json here.json --svg here.svg
  kvlane bench --isa avx2 --filter 'attention_bf16'
  kvlane bench --compare before.json after.json")]
pub(super) struct Bench {
    /// The best level, one thread, the usual types and shapes, a short measurement of each: about a minute
    #[arg(long)]
    quick: bool,
    /// Thread counts to measure with. Default: 1 and, unless --quick, one for every CPU
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = values::threads)]
    threads: Vec<usize>,
    /// Levels to measure. Default: all that this CPU has; with --quick, the best for each kernel
    #[arg(long, value_name = "LEVEL,..", value_delimiter = ',', value_parser = isa_parser(), ignore_case = true)]
    isa: Vec<Isa>,
    /// Only cases whose `<kernel>/<shape>` contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// The pages of all buffers. Default: huge where the system has them. Limits of reading are measured on both
    #[arg(long, value_name = "KIND", value_parser = pages_parser())]
    pages: Option<Pages>,
    /// Write the report as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the roofline to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Compare two reports, and measure nothing
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"],
        conflicts_with_all = ["quick", "threads", "isa", "filter", "pages", "json", "svg"])]
    compare: Vec<PathBuf>,
}

pub(super) fn bench(args: &Bench) -> Result<()> {
    if let [a, b] = &args.compare[..] {
        return print(&compare(&Report::load(a)?, &Report::load(b)?)?);
    }
    context(None)?;
    note_threads(args.threads.iter().copied().max().unwrap_or(0));
    // Open the files first, so that a wrong path fails before the measurement.
    for path in [&args.json, &args.svg].into_iter().flatten() {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.map_err(|e| Error::io(path, e))?;
    }
    let options = Options {
        quick: args.quick,
        threads: args.threads.clone(),
        levels: args.isa.clone(),
        filter: args.filter.clone(),
        pages: args.pages,
    };
    let bar = progress_bar("", 0, "{bar:24} {pos}/{len}, {eta} left  {wide_msg}");
    let report = run(&options, &mut |Progress { done, total, now }| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message(now.to_owned());
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.json {
        std::fs::write(path, report.to_json()).map_err(|e| Error::io(path, e))?;
    }
    if let Some(path) = &args.svg {
        std::fs::write(path, roofline::svg(&report)?).map_err(|e| Error::io(path, e))?;
    }
    print(&(report.machine_text() + &report.limits_text() + &report.cases_text()))?;
    for line in &report.skipped {
        note(&format!("not measured: {line}"));
    }
    Ok(())
}
