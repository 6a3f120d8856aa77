//! The bench: every kernel of the registry, measured against what this machine can do.
//!
//! A bare time says nothing about a kernel on an unknown CPU. So every figure here is a fraction of a limit, and the limit
//! was measured by the same process, moments before and after, on a buffer of the same size and the same kind of pages.
//!
//! | where | what |
//! | --- | --- |
//! | [`timing`] | how long a call takes: best and median of batches of at least a millisecond |
//! | [`limits`] | what the machine can do: bandwidths by working-set size, arithmetic, exponentials; a level and thread count each |
//! | [`cases`] | what is measured: every kernel of the registry, on the shapes of real models, through the public API only |
//! | [`run`] | cases and limits in turns, into a report |
//! | [`report`] | the result: a table for people, JSON for machines |
//! | [`machine`] | what it ran on |
//! | [`compare`] | two reports, case by case |
//! | [`roofline`] | a report as a picture |
//!
//! # What a case is held to
//! A call must move its bytes and do its arithmetic; whichever takes longer, at the limits, is the time to reach:
//!
//! - **Attention** reads K and V once, for all query heads that share them, and does `4 * dim` useful operations for each
//!   pair of a query head and a key that it sees; what a causal mask hides does not count. Its memory limit is the
//!   best read of any kind of loop (one stream or several, with and without prefetch) over as many bytes.
//! - **RoPE, cache write, repeat, merge** are held to the best plain copy of as many bytes, reads and writes together; RoPE
//!   in place to changing as many where they are.
//! - **Angles** are f64 trigonometry, for which there is no limit worth the name: only their time is told.
//!
//! All limits are those of the kernel's own ISA level: AVX2 kernels are not blamed for having half the lanes.

pub mod cases;
pub mod compare;
mod data;
pub mod limits;
pub mod machine;
pub mod report;
pub mod roofline;
pub mod run;
pub mod timing;

use std::fmt;

/// What went wrong, as a sentence.
#[derive(Debug)]
pub struct Error(String);

/// The bench's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    pub(crate) fn file(path: &std::path::Path, what: impl fmt::Display) -> Self {
        Self(format!("{}: {what}", path.display()))
    }
}

impl From<crate::Error> for Error {
    fn from(e: crate::Error) -> Self {
        Self(e.to_string())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}
