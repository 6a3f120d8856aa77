//! What every command writes: results to standard output, progress to standard error.

use std::io::{self, Write};
use std::sync::OnceLock;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::driver::cache::PREFILL_CHUNK;
use crate::driver::error::{Error, Result};

pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::stdout)
}

/// What every line on standard error begins with, where several processes write to one.
static LABEL: OnceLock<String> = OnceLock::new();

/// Sets what every [`note`] begins with from now on.
#[cfg(feature = "mpi")]
pub(super) fn label(label: String) {
    let _ = LABEL.set(label);
}

/// Writes a line to standard error. A standard error that is closed or full is no reason to fail.
pub(super) fn note(line: &str) {
    note_part(&format!("{}{line}\n", LABEL.get().map_or("", String::as_str)));
}

/// As [`note`], without a line break.
pub(super) fn note_part(text: &str) {
    let mut out = io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// `1 thread`, `2 threads`.
pub(super) fn count_of(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

pub(super) fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&format!("{value:#}\n"))
}

/// A bar for bytes or tokens.
pub(super) fn bar(what: &str, len: usize, bytes: bool) -> ProgressBar {
    let template = match bytes {
        true => "{prefix} {wide_bar} {binary_bytes}/{binary_total_bytes}",
        false => "{prefix} {wide_bar} {pos}/{len} tokens",
    };
    progress_bar(what, len, template)
}

/// What `prefill` returns, which tells how many tokens of a prompt are done. There is a bar if they are many.
pub(super) fn with_prompt_bar<T>(tokens: usize, prefill: impl FnOnce(&mut dyn FnMut(usize)) -> T) -> T {
    let progress = (tokens > PREFILL_CHUNK).then(|| bar("prompt", tokens, false));
    let result = prefill(&mut |done| {
        if let Some(bar) = &progress {
            bar.set_position(done as u64);
        }
    });
    if let Some(bar) = progress {
        bar.finish_and_clear();
    }
    result
}

/// A bar on standard error if that is a terminal, otherwise a hidden one; `template` is in indicatif's syntax.
pub(super) fn progress_bar(what: &str, len: usize, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(Some(len as u64), ProgressDrawTarget::stderr());
    bar.with_style(style).with_prefix(what.to_owned())
}

pub(super) fn mebibytes(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
