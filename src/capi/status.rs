//! Statuses, and the sentence that belongs to the last one.

use super::guard::{self, guard_value};
use crate::error::Status;
use std::ffi::{CStr, c_char};

/// The result of a call: 0, or one of `KVL_STATUS_*`. Values are never changed or reused. When it is not 0,
/// `kvl_last_error` has the sentence, and no output has been written, except with `KVL_STATUS_PARALLEL` and
/// `KVL_STATUS_INTERNAL`.
pub type kvl_status = i32;
/// Success.
pub const KVL_STATUS_OK: i32 = 0;
/// A pointer that must not be null is null.
pub const KVL_STATUS_NULL_POINTER: i32 = 1;
/// A `struct_size` is unknown to the library, or a field that it does not know is not 0.
pub const KVL_STATUS_STRUCT_SIZE: i32 = 2;
/// An integer is no value of its enumeration, or a reserved field is not 0.
pub const KVL_STATUS_INVALID_ENUM: i32 = 3;
/// A number has no meaning for its argument (a scale of NaN, an odd `rotary_dim`), or arguments exclude each other.
pub const KVL_STATUS_INVALID_VALUE: i32 = 4;
/// Shapes or list lengths do not fit each other, or an axis is negative.
pub const KVL_STATUS_SHAPE: i32 = 5;
/// Strides let elements of an output share memory, or they overflow when multiplied by the shape.
pub const KVL_STATUS_STRIDE: i32 = 6;
/// A view reaches outside its buffer, or a pointer is not aligned to its elements.
pub const KVL_STATUS_BOUNDS: i32 = 7;
/// A cache has no room for the tokens.
pub const KVL_STATUS_CAPACITY: i32 = 8;
/// A position, length, row, slot or page is outside its range.
pub const KVL_STATUS_OUT_OF_RANGE: i32 = 9;
/// An output shares memory with an input or with another output.
pub const KVL_STATUS_OVERLAP: i32 = 10;
/// Two tokens of one call have the same slot.
pub const KVL_STATUS_DUPLICATE_SLOT: i32 = 11;
/// No kernel combines these element types.
pub const KVL_STATUS_DTYPE: i32 = 12;
/// The workspace is too small or not aligned to 64 bytes.
pub const KVL_STATUS_WORKSPACE: i32 = 13;
/// The machine or the build does not have it.
pub const KVL_STATUS_UNSUPPORTED: i32 = 14;
/// The parallel runner did not run its tasks, or a thread pool was used after `fork`.
pub const KVL_STATUS_PARALLEL: i32 = 15;
/// A bug in the library: it caught a panic.
pub const KVL_STATUS_INTERNAL: i32 = 16;

/// A short description of a status; a constant.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: a number that is no status gives "unknown status".
#[unsafe(no_mangle)]
pub extern "C" fn kvl_status_string(status: kvl_status) -> *const c_char {
    let text: &CStr = match status {
        KVL_STATUS_OK => c"ok",
        KVL_STATUS_NULL_POINTER => c"null pointer",
        KVL_STATUS_STRUCT_SIZE => c"unknown struct_size",
        KVL_STATUS_INVALID_ENUM => c"invalid enumeration value",
        KVL_STATUS_INVALID_VALUE => c"invalid value",
        KVL_STATUS_SHAPE => c"shapes do not fit",
        KVL_STATUS_STRIDE => c"invalid strides",
        KVL_STATUS_BOUNDS => c"view outside its buffer",
        KVL_STATUS_CAPACITY => c"cache capacity exceeded",
        KVL_STATUS_OUT_OF_RANGE => c"out of range",
        KVL_STATUS_OVERLAP => c"overlapping memory",
        KVL_STATUS_DUPLICATE_SLOT => c"slot written twice",
        KVL_STATUS_DTYPE => c"element types do not fit",
        KVL_STATUS_WORKSPACE => c"workspace too small or misaligned",
        KVL_STATUS_UNSUPPORTED => c"not available on this machine",
        KVL_STATUS_PARALLEL => c"parallel runner failed",
        KVL_STATUS_INTERNAL => c"internal error",
        _ => c"unknown status",
    };
    text.as_ptr()
}

/// The sentence of the last status other than `KVL_STATUS_OK` on the calling thread: it names the argument and the
/// numbers that disagree. It is empty if there was none. A successful call does not change it.
///
/// At most `size` bytes are copied, the terminating zero included; a longer sentence is cut. The result is the number
/// of bytes that the whole sentence needs, at most 1024. `buffer` may be null to ask for that alone.
///
/// Thread safety: may be called from any thread at any time. Every thread has its own sentence, and the thread that
/// made a call gets its sentence, also of errors on worker threads.
/// Bad input: there is none, as long as `buffer` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_last_error(buffer: *mut c_char, size: usize) -> usize {
    // SAFETY: the caller's promise.
    guard_value(1, || unsafe { guard::copy_last_error(buffer.cast(), size) })
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    assert!(KVL_STATUS_NULL_POINTER == Status::NullPointer as i32);
    assert!(KVL_STATUS_STRUCT_SIZE == Status::StructSize as i32);
    assert!(KVL_STATUS_INVALID_ENUM == Status::InvalidEnum as i32);
    assert!(KVL_STATUS_INVALID_VALUE == Status::InvalidValue as i32);
    assert!(KVL_STATUS_SHAPE == Status::Shape as i32);
    assert!(KVL_STATUS_STRIDE == Status::Stride as i32);
    assert!(KVL_STATUS_BOUNDS == Status::Bounds as i32);
    assert!(KVL_STATUS_CAPACITY == Status::Capacity as i32);
    assert!(KVL_STATUS_OUT_OF_RANGE == Status::OutOfRange as i32);
    assert!(KVL_STATUS_OVERLAP == Status::Overlap as i32);
    assert!(KVL_STATUS_DUPLICATE_SLOT == Status::DuplicateSlot as i32);
    assert!(KVL_STATUS_DTYPE == Status::DType as i32);
    assert!(KVL_STATUS_WORKSPACE == Status::Workspace as i32);
    assert!(KVL_STATUS_UNSUPPORTED == Status::Unsupported as i32);
    assert!(KVL_STATUS_PARALLEL == Status::Parallel as i32);
    assert!(KVL_STATUS_INTERNAL == Status::Internal as i32);
    assert!(Status::ALL.len() == KVL_STATUS_INTERNAL as usize);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_are_those_of_the_rust_api() {
        for status in Status::ALL {
            // SAFETY: a constant of the library.
            let text = unsafe { CStr::from_ptr(kvl_status_string(status as kvl_status)) };
            assert_eq!(text.to_str().unwrap(), status.description());
        }
    }
}
