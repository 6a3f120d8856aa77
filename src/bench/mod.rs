//! The bench: every kernel of the registry, measured against the limits of this machine.
//!
//! A time alone says nothing about a kernel on an unknown CPU. Every figure is a share of a limit, which the same
//! process measures just before and just after, on a buffer of the same size and the same kind of pages.
//!
//! | where | what |
//! | --- | --- |
//! | [`timing`] | the time of a call: best and median of batches of at least a millisecond |
//! | [`limits`] | limits of the machine: bandwidths by working-set size, arithmetic, exponentials; for each level and thread count |
//! | [`cases`] | the cases: every kernel of the registry, on the shapes of real models, through the public API only |
//! | [`run`] | measures cases and limits in turns, and makes a report |
//! | [`report`] | the result, as a table and as JSON |
//! | [`machine`] | a description of the machine |
//! | [`compare`] | comparison of two reports |
//! | [`roofline`] | a plot of a report |
//! | [`tune`] | the search for the tuning of this CPU |
//!
//! # The limit of a case
//! A call must move its bytes and do its arithmetic. Both times are limits, and the longer one binds:
//!
//! - **Attention** reads K and V once for all query heads that share them, and does `4 * dim` useful operations for
//!   each query row and visible key. Masked keys do not count. Its memory limit is the best rate of any reading loop
//!   (one stream or several, with and without prefetch) over as many bytes. Its arithmetic limit is that of FMA, or of the products
//!   of bf16 or of tiles that a level is made for.
//! - **RoPE, cache write, repeat, merge**: the best plain copy of as many bytes, reads plus writes; for RoPE in place,
//!   changing as many bytes in place.
//! - **Angles** are f64 trigonometry and have no limit; the report shows their time only.
//!
//! All limits are those of the kernel's own ISA level.

pub mod cases;
pub mod compare;
mod data;
pub mod limits;
pub mod machine;
pub mod report;
pub mod roofline;
pub mod run;
pub mod timing;
pub mod tune;

pub use data::Pages;

use std::fmt;

/// An error, with a sentence.
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
