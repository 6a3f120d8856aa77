//! `kvlane tune`: the command line of [`crate::bench::tune`].

use std::path::PathBuf;

use clap::Args;

use super::model::{context, note_threads};
use super::output::{print, progress_bar};
use super::values::{self, isa_parser, pages_parser};
use crate::Isa;
use crate::bench::Pages;
use crate::bench::run::Progress;
use crate::bench::tune::{Options, tune};
use crate::driver::error::{Error, Result};

/// Search how this CPU prefetches best, and in which registers it multiplies.
///
/// Times attention with every way to prefetch and to order reads, on caches that are larger than the CPU's, and prompts with every
/// kind of register tiles, and prints the fastest beside the library's entry for this CPU, with the gain. The entry that it writes
/// can be pasted into the library's table, or a program can set it (`Context::tuned`, `kvl_context_set_tuning`). No bit of a result
/// depends on it. Run it on a quiet machine.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kvlane tune --quick
  kvlane tune --isa avx2 --entry zen4-avx2.txt")]
pub(super) struct Tune {
    /// Fewer types, shapes and repetitions: about half a minute instead of some minutes
    #[arg(long)]
    quick: bool,
    /// The level whose kernels are tuned. Default: the best of this CPU without matrix products
    #[arg(long, value_name = "LEVEL", value_parser = isa_parser(), ignore_case = true)]
    isa: Option<Isa>,
    /// The number of threads
    #[arg(long, value_name = "N", value_parser = values::threads, default_value = "1")]
    threads: usize,
    /// The pages of all buffers. Default: huge where the system has them
    #[arg(long, value_name = "KIND", value_parser = pages_parser())]
    pages: Option<Pages>,
    /// Write the table's entry to this file, too
    #[arg(long, value_name = "FILE")]
    entry: Option<PathBuf>,
}

pub(super) fn tune_cpu(args: &Tune) -> Result<()> {
    context(None)?;
    note_threads(args.threads);
    // Open the file first, so that a wrong path fails before the measurement.
    if let Some(path) = &args.entry {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.map_err(|e| Error::io(path, e))?;
    }
    let options = Options { quick: args.quick, level: args.isa, threads: args.threads, pages: args.pages };
    let bar = progress_bar("", 0, "{bar:24} {pos}/{len}, {eta} left  {wide_msg}");
    let tuned = tune(&options, &mut |Progress { done, total, now }| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        bar.set_message(now.to_owned());
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.entry {
        std::fs::write(path, tuned.entry_text()).map_err(|e| Error::io(path, e))?;
    }
    print(&tuned.text())
}
