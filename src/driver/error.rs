//! The one error type of the driver.

use std::fmt;
use std::path::Path;

/// The kind of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An error of the operating system: a missing file, no permission, a full disk.
    Io,
    /// The reader of standard output has closed it.
    ClosedPipe,
    /// A file that contradicts itself or its format: truncated, corrupt or hostile.
    Malformed,
    /// A valid file with a feature that the driver does not support.
    Unsupported,
    /// An argument outside its range.
    Argument,
    /// Encoding or decoding of text failed.
    Tokenizer,
    /// The library rejected the arguments of a call.
    Kernel,
    /// A request ended by an error.
    Request,
    /// The bench could not measure, or a file is not a report of the bench.
    Bench,
}

/// An error: its kind, and a sentence that names the cause and the numbers.
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

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Prepends the file, layer or request to the sentence.
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

    pub(crate) fn request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Request, message)
    }

    pub(crate) fn signal(source: std::io::Error) -> Self {
        Self { source: Some(Box::new(source)), ..Self::new(ErrorKind::Io, "Ctrl-C cannot be watched") }
    }

    pub(crate) fn tokenizer(message: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Tokenizer, message.to_string())
    }
}

impl From<crate::Error> for Error {
    fn from(e: crate::Error) -> Self {
        Self { kind: ErrorKind::Kernel, message: e.message().to_owned(), source: Some(Box::new(e)) }
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
