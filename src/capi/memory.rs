//! Huge pages for memory of the caller's.

use super::guard::guard;
use super::status::kvl_status;
use crate::error::ensure;
use crate::memory::{Advice, advise};
use std::ffi::c_void;

/// Asks the operating system to hold memory of the caller's in huge pages: `bytes` bytes at `data`. `*advised` becomes 1 if it
/// took the request, else 0.
///
/// On Linux and Android, this is `madvise` with `MADV_HUGEPAGE` for the whole pages inside of the range. The kernel then uses a
/// huge page (2 MiB on x86-64) for every aligned stretch of that size, if it has one free when the memory is first written.
/// Call it before the first write, on memory that begins at a multiple of 2 MiB. Elsewhere the function does nothing, and
/// `*advised` becomes 0, as it does if the range holds no whole page or is not mapped, or if the kernel has no huge pages. 1 says
/// that the request was taken, and not that there were pages. The contents of the memory stay as they are.
///
/// Thread safety: may be called from any number of threads at once, also while others use the memory.
/// Bad input: null (`data` may be null if `bytes` is 0) and a range beyond the end of the address space are errors, and
/// `*advised` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_advise_huge_pages(data: *mut c_void, bytes: usize, advised: *mut i32) -> kvl_status {
    guard(|| {
        ensure!(!data.is_null() || bytes == 0, NullPointer, "the pointer data is null, but bytes is {bytes}");
        ensure!(!advised.is_null(), NullPointer, "the pointer advised is null");
        ensure!(
            data.addr().checked_add(bytes).is_some(),
            OutOfRange,
            "bytes is {bytes}, but only {} follow the address {:#x}",
            usize::MAX - data.addr(),
            data.addr()
        );
        let taken = advise(data.expose_provenance(), bytes, Advice::Huge);
        // SAFETY: not null, and the caller's to write.
        unsafe { advised.write(i32::from(taken)) };
        Ok(())
    })
}
