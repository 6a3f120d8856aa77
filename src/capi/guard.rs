//! The border: no panic crosses it, and what went wrong is kept for the thread that asked.

use super::status::{KVL_STATUS_INTERNAL, KVL_STATUS_OK, kvl_status};
use crate::error::Result;
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The longest sentence that is kept, with its terminating zero.
const CAPACITY: usize = 1024;

/// The last sentence of a thread, without a terminating zero.
struct Sentence {
    bytes: [u8; CAPACITY],
    len: usize,
}

// A fixed buffer and not a string: there is nothing to free when a thread ends, so nothing can leak, and the library can
// be unloaded while threads that have called it live on.
thread_local! {
    static LAST_ERROR: RefCell<Sentence> = const { RefCell::new(Sentence { bytes: [0; CAPACITY], len: 0 }) };
}
const _: () = assert!(!std::mem::needs_drop::<RefCell<Sentence>>());

fn remember(sentence: &str) {
    LAST_ERROR.with_borrow_mut(|last| {
        let mut len = sentence.len().min(CAPACITY - 1);
        while !sentence.is_char_boundary(len) {
            len -= 1;
        }
        // A zero inside (from an environment variable, say) would end the string early; the rest is lost, nothing else.
        last.bytes[..len].copy_from_slice(&sentence.as_bytes()[..len]);
        last.len = len;
    });
}

/// Copies the last sentence of this thread, and a zero, to `size` bytes at `buffer`, cut if it must be; returns how many
/// bytes the whole of it needs.
///
/// # Safety
/// `buffer` is null or has `size` bytes to write.
pub(super) unsafe fn copy_last_error(buffer: *mut u8, size: usize) -> usize {
    LAST_ERROR.with_borrow(|last| {
        if !buffer.is_null() && size > 0 {
            let n = last.len.min(size - 1);
            // SAFETY: `n + 1 <= size`.
            unsafe {
                std::ptr::copy_nonoverlapping(last.bytes.as_ptr(), buffer, n);
                buffer.add(n).write(0);
            }
        }
        last.len + 1
    })
}

/// Runs the body of an export: an error becomes its status and this thread's sentence, a panic `KVL_STATUS_INTERNAL`.
///
/// In a build with `panic = "abort"` there are no panics to catch; the default profiles unwind.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> kvl_status {
    // Unwind safety: what a panic leaves half-done are outputs, which the status says, and the last error, which is whole
    // at all times.
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => KVL_STATUS_OK,
        Ok(Err(error)) => {
            remember(error.message());
            error.status() as kvl_status
        }
        Err(panic) => {
            remember(panic_message(&*panic));
            KVL_STATUS_INTERNAL
        }
    }
}

/// Runs the body of an export that cannot fail, and returns `default` if it panics all the same.
pub(super) fn guard_value<T>(default: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        remember(panic_message(&*panic));
        default
    })
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let known = panic.downcast_ref::<&str>().copied();
    known.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::fail;

    fn last() -> (usize, String) {
        let mut buffer = [1u8; CAPACITY];
        // SAFETY: the buffer has that many bytes.
        let needed = unsafe { copy_last_error(buffer.as_mut_ptr(), buffer.len()) };
        let text = std::ffi::CStr::from_bytes_until_nul(&buffer).unwrap().to_str().unwrap().to_owned();
        (needed, text)
    }

    #[test]
    fn errors_and_panics_become_a_status_and_a_sentence() {
        assert_eq!(guard(|| Ok(())), KVL_STATUS_OK);
        assert_eq!(guard(|| fail!(Capacity, "{} is full", "row 3")), 8);
        assert_eq!(last(), (14, "row 3 is full".to_owned()));
        assert_eq!(guard(|| panic!("index {}", 7)), KVL_STATUS_INTERNAL);
        assert_eq!(last().1, "index 7");
        assert_eq!(guard_value(5, || panic!("fixed")), 5);
        assert_eq!(last().1, "fixed");
        // A success leaves it alone; another thread has its own.
        assert_eq!(guard(|| Ok(())), KVL_STATUS_OK);
        assert_eq!(last().1, "fixed");
        assert_eq!(std::thread::spawn(last).join().unwrap(), (1, String::new()));
    }

    #[test]
    fn long_sentences_are_cut_between_characters() {
        let long = "x".to_owned() + &"é".repeat(CAPACITY);
        assert_eq!(guard(|| fail!(Shape, "{long}")), 5);
        let (needed, text) = last();
        assert_eq!(needed, text.len() + 1);
        assert!(long.starts_with(&text) && text.len() >= CAPACITY - 2);
        let mut small = [1u8; 4];
        // SAFETY: the first three bytes are the buffer's.
        assert_eq!(unsafe { copy_last_error(small.as_mut_ptr(), 3) }, needed);
        assert_eq!(small, [b'x', 0xc3, 0, 1]);
        // SAFETY: null is allowed.
        assert_eq!(unsafe { copy_last_error(std::ptr::null_mut(), 99) }, needed);
    }
}
