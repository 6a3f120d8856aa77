//! The one error type of the driver.

use std::fmt;
use std::path::Path;

/// What kind of thing went wrong, for a caller that wants to react to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused: a missing file, no permission, a full pipe.
    Io,
    /// Whoever reads our standard output has gone.
    ClosedPipe,
    /// A file that contradicts itself or its format: truncated, corrupt, or made to harm.
    Malformed,
    /// A sound file that asks for something this driver does not do.
    Unsupported,
    /// An argument out of its range.
    Argument,
    /// Tokenising or detokenising failed.
    Tokenizer,
    /// The library refused a call's arguments.
    Kernel,
    /// The bench could not measure, or was given what is no report of it.
    Bench,
}

/// An error with a sentence that names what went wrong and the numbers involved.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The driver's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Says first which file, layer or request the error belongs to.
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self { kind: ErrorKind::Io, message: format!("{}: {source}", path.display()), source: Some(Box::new(source)) }
    }

    pub(crate) fn stdin(source: std::io::Error) -> Self {
        Self::io(Path::new("standard input"), source)
    }

    pub(crate) fn stdout(source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::BrokenPipe => ErrorKind::ClosedPipe,
            _ => ErrorKind::Io,
        };
        Self { kind, ..Self::io(Path::new("standard output"), source) }
    }

    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Malformed, message)
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    pub(crate) fn argument(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Argument, message)
    }

    pub(crate) fn tokenizer(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Tokenizer, message.to_string())
    }
}

impl From<crate::Error> for Error {
    fn from(e: crate::Error) -> Self {
        Self { kind: ErrorKind::Kernel, message: e.to_string(), source: Some(Box::new(e)) }
    }
}

impl From<crate::bench::Error> for Error {
    fn from(e: crate::bench::Error) -> Self {
        Self { kind: ErrorKind::Bench, message: e.to_string(), source: Some(Box::new(e)) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}
