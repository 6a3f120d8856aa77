//! The error type: a fixed status code and a sentence.

use std::fmt;

/// The kind of an error. The values never change and are those of `kvl_status` in the C header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
#[non_exhaustive]
pub enum Status {
    /// A pointer that must not be null is null.
    NullPointer = 1,
    /// A `struct_size` is not supported by this version of the library.
    StructSize = 2,
    /// An integer is not a value of its enumeration.
    InvalidEnum = 3,
    /// A number is invalid for the argument (NaN scale, odd `rotary_dim`, ...).
    InvalidValue = 4,
    /// Shapes do not match.
    Shape = 5,
    /// Strides make elements of an output share memory, or overflow when multiplied with the shape.
    Stride = 6,
    /// A view reaches outside the buffer it was given.
    Bounds = 7,
    /// A write would exceed the capacity of the cache.
    Capacity = 8,
    /// A position, length, row or slot is outside its range.
    OutOfRange = 9,
    /// An output shares memory with an input or with another output.
    Overlap = 10,
    /// Two tokens of one call would be written to the same slot.
    DuplicateSlot = 11,
    /// Element types that cannot be combined.
    DType = 12,
    /// The workspace is too small or not aligned to 64 bytes.
    Workspace = 13,
    /// The requested instruction set is not available on this machine.
    Unsupported = 14,
    /// The parallel runner did not run its tasks.
    Parallel = 15,
    /// A bug in this library: a panic was caught.
    Internal = 16,
}

impl Status {
    /// Every status, in order of value.
    pub const ALL: [Self; 16] = [
        Self::NullPointer,
        Self::StructSize,
        Self::InvalidEnum,
        Self::InvalidValue,
        Self::Shape,
        Self::Stride,
        Self::Bounds,
        Self::Capacity,
        Self::OutOfRange,
        Self::Overlap,
        Self::DuplicateSlot,
        Self::DType,
        Self::Workspace,
        Self::Unsupported,
        Self::Parallel,
        Self::Internal,
    ];

    /// A short fixed description.
    pub fn description(self) -> &'static str {
        match self {
            Self::NullPointer => "null pointer",
            Self::StructSize => "unknown struct_size",
            Self::InvalidEnum => "invalid enumeration value",
            Self::InvalidValue => "invalid value",
            Self::Shape => "shapes do not fit",
            Self::Stride => "invalid strides",
            Self::Bounds => "view outside its buffer",
            Self::Capacity => "cache capacity exceeded",
            Self::OutOfRange => "out of range",
            Self::Overlap => "overlapping memory",
            Self::DuplicateSlot => "slot written twice",
            Self::DType => "element types do not fit",
            Self::Workspace => "workspace too small or misaligned",
            Self::Unsupported => "not available on this machine",
            Self::Parallel => "parallel runner failed",
            Self::Internal => "internal error",
        }
    }
}

/// An error: its [`Status`] and a sentence that names the argument and the numbers that disagree.
///
/// If an operation returns an error, it has written nothing to any output. [`Status::Parallel`] and
/// [`Status::Internal`] are exceptions; they do not come from the caller's arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    status: Status,
    message: String,
}

impl Error {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// The same error, with the name of the argument before its sentence.
    pub(crate) fn about(self, argument: &str) -> Self {
        Self { message: format!("{argument}: {}", self.message), ..self }
    }

    /// The kind.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.description(), self.message)
    }
}

impl std::error::Error for Error {}

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! fail {
    ($status:ident, $($arg:tt)*) => {
        return Err($crate::error::Error::new($crate::error::Status::$status, format!($($arg)*)))
    };
}
pub(crate) use fail;

macro_rules! ensure {
    ($condition:expr, $status:ident, $($arg:tt)*) => {
        if $condition {
        } else {
            $crate::error::fail!($status, $($arg)*);
        }
    };
}
pub(crate) use ensure;
