//! Memory for caches: huge pages, and a buffer that asks for them.

use crate::error::{Result, fail};
use half::{bf16, f16};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Asks the operating system to hold memory in huge pages, and returns whether it took the request.
///
/// On Linux and Android, this is `madvise` with `MADV_HUGEPAGE` for the whole pages inside of `memory`. The kernel then uses a huge
/// page (2 MiB on x86-64) for every aligned stretch of that size, if it has one free when the memory is first written. Call it
/// before the first write; what is written already moves into huge pages later, in the background, or never. Elsewhere the function
/// does nothing and returns `false`, as it does if `memory` holds no whole page or if the kernel has no huge pages. `true` says that
/// the request was taken, and not that there were pages: with the setting `never` in
/// `/sys/kernel/mm/transparent_hugepage/enabled` the kernel takes the request and ignores it.
///
/// The contents of the memory stay as they are. [`docs::performance`](crate::docs::performance#huge-pages) has what huge pages give.
/// [`CacheBuffer`] asks for them by itself.
///
/// Thread safety: it may be called from any thread, also while others use the memory.
///
/// ```
/// let mut keys: Vec<f32> = Vec::with_capacity(1 << 20);
/// let advised = kvlane::advise_huge_pages(keys.spare_capacity_mut());
/// keys.resize(1 << 20, 0.0); // the first write
/// assert!(!advised || cfg!(any(target_os = "linux", target_os = "android")));
/// ```
pub fn advise_huge_pages<T>(memory: &[T]) -> bool {
    advise(memory.as_ptr().addr(), size_of_val(memory), Advice::Huge)
}

/// The pages that a range of memory should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advice {
    Huge,
    /// Pages of the usual size, whatever the setting of the system.
    #[cfg_attr(not(feature = "bench"), allow(dead_code))]
    Small,
}

/// Gives the advice for the whole pages between an address and the address so many bytes after it, which need not be mapped. Returns
/// whether the system took it.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn advise(start: usize, bytes: usize, advice: Advice) -> bool {
    use std::ffi::{c_int, c_void};
    // Both are in the C library, which the standard library links.
    unsafe extern "C" {
        safe fn getpagesize() -> c_int;
        fn madvise(start: *mut c_void, bytes: usize, advice: c_int) -> c_int;
    }
    let page = usize::try_from(getpagesize()).unwrap_or(0);
    let Some(end) = start.checked_add(bytes).filter(|_| page.is_power_of_two()) else { return false };
    let Some(first) = start.checked_next_multiple_of(page) else { return false };
    let bytes = (end / page * page).saturating_sub(first);
    let advice = match advice {
        Advice::Huge => 14,
        Advice::Small => 15,
    };
    // SAFETY: the advice changes the pages behind the memory, and neither contents nor access; a range that is not mapped is an error.
    bytes > 0 && unsafe { madvise(std::ptr::with_exposed_provenance_mut(first), bytes, advice) } == 0
}

/// Gives the advice for the whole pages between an address and the address so many bytes after it, which need not be mapped. Returns
/// whether the system took it.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn advise(_: usize, _: usize, _: Advice) -> bool {
    false
}

mod sealed {
    pub trait Sealed {}
}

/// What a [`CacheBuffer`] can hold: elements, units of quantised caches, and their scales. All zeros is a value of each.
pub trait CacheUnit: sealed::Sealed + Copy + Send + Sync + 'static {}

macro_rules! units {
    ($($unit:ty),*) => { $(impl sealed::Sealed for $unit {} impl CacheUnit for $unit {})* };
}
units!(f32, f16, bf16, i8, u8);

/// Memory for keys or values, initially zero. Its address is a multiple of 64, and if it is large enough for huge pages, it begins at
/// the border of one and [asks](advise_huge_pages) for them.
///
/// Memory that is never written takes no space on systems that hand out pages at the first write. A buffer is a slice by `Deref`.
///
/// ```
/// use kvlane::{CacheBuffer, View};
/// // 4096 tokens of 8 heads of 128.
/// let keys = CacheBuffer::<half::bf16>::zeroed(4096 * 8 * 128)?;
/// let view = View::new(&keys, [1, 4096, 8, 128])?;
/// # Ok::<(), kvlane::Error>(())
/// ```
pub struct CacheBuffer<T: CacheUnit> {
    /// Aligned, or dangling if there is no memory.
    start: NonNull<T>,
    len: usize,
    /// Holds what `start` points to.
    _memory: Option<Memory>,
    advised: bool,
}

/// Zeroed memory that is released when it is dropped.
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
    /// By the operating system, and not by the allocator.
    mapped: bool,
}

impl Memory {
    /// A layout is of more than 0 bytes. `fresh`: pages that nobody has written yet, where the system has a way to get them. Those
    /// of the allocator may have been written before they were released, and are then as small as they were.
    fn new(layout: Layout, fresh: bool) -> Option<Self> {
        if fresh && let Some(start) = map(layout.size()) {
            return Some(Self { start, layout, mapped: true });
        }
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, layout, mapped: false })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.mapped {
            // SAFETY: mapped with this size, and released once.
            unsafe { unmap(self.start, self.layout.size()) };
        } else {
            // SAFETY: allocated with this layout, and released once.
            unsafe { dealloc(self.start.as_ptr(), self.layout) };
        }
    }
}

/// Fresh pages, which are zero; `None` if there are none. Only where a file's offset, which is not used, has one size in every C library.
#[cfg(all(any(target_os = "linux", target_os = "android"), any(target_arch = "x86_64", target_arch = "aarch64")))]
fn map(bytes: usize) -> Option<NonNull<u8>> {
    use std::ffi::{c_int, c_void};
    const READ_WRITE: c_int = 3;
    const PRIVATE_ANONYMOUS: c_int = 0x22;
    unsafe extern "C" {
        fn mmap(at: *mut c_void, bytes: usize, access: c_int, flags: c_int, file: c_int, offset: i64) -> *mut c_void;
    }
    // SAFETY: a new mapping touches no memory that is there.
    let start = unsafe { mmap(std::ptr::null_mut(), bytes, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0) };
    // A failure is the address -1.
    NonNull::new(start.cast::<u8>()).filter(|start| start.addr().get() != usize::MAX)
}

#[cfg(not(all(
    any(target_os = "linux", target_os = "android"),
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
fn map(_: usize) -> Option<NonNull<u8>> {
    None
}

/// # Safety
/// From [`map`] with as many bytes, and not used afterwards.
#[cfg(all(any(target_os = "linux", target_os = "android"), any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn unmap(start: NonNull<u8>, bytes: usize) {
    use std::ffi::{c_int, c_void};
    unsafe extern "C" {
        fn munmap(at: *mut c_void, bytes: usize) -> c_int;
    }
    // SAFETY: the caller's.
    unsafe { munmap(start.as_ptr().cast(), bytes) };
}

/// # Safety
/// From [`map`], which has no memory here.
#[cfg(not(all(
    any(target_os = "linux", target_os = "android"),
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
unsafe fn unmap(_: NonNull<u8>, _: usize) {}

// SAFETY: the buffer owns its memory, and units can be sent and shared.
unsafe impl<T: CacheUnit> Send for CacheBuffer<T> {}
// SAFETY: as above; a shared buffer is only read.
unsafe impl<T: CacheUnit> Sync for CacheBuffer<T> {}

/// The size and the alignment of a huge page on x86-64, and on AArch64 with base pages of 4 KiB.
const HUGE_PAGE: usize = 2 << 20;
/// The size of a cache line.
const LINE: usize = 64;

impl<T: CacheUnit> CacheBuffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// [`Status::InvalidValue`](crate::Status::InvalidValue): there is not enough memory.
    pub fn zeroed(len: usize) -> Result<Self> {
        if len == 0 {
            return Ok(Self { start: NonNull::dangling(), len, _memory: None, advised: false });
        }
        // The allocator is asked for more bytes and not for the alignment: it has fresh pages, which are zero, only without one, and
        // would otherwise write the zeros before the advice.
        let bytes = len.checked_mul(size_of::<T>());
        let align = if bytes.is_some_and(|bytes| bytes < HUGE_PAGE) { LINE } else { HUGE_PAGE };
        let layout =
            bytes.and_then(|bytes| Layout::from_size_align(bytes.checked_add(align)?, align_of::<T>().max(8)).ok());
        let memory = layout.and_then(|layout| Memory::new(layout, align == HUGE_PAGE));
        let (Some(memory), Some(bytes)) = (memory, bytes) else {
            fail!(InvalidValue, "a buffer of {len} units of {} bytes, but there is not so much memory", size_of::<T>());
        };
        let address = memory.start.as_ptr().addr();
        // SAFETY: the skipped bytes are fewer than `align`, and the memory has `align` bytes more than the buffer.
        let start = unsafe { memory.start.add(address.next_multiple_of(align) - address) };
        let advised = align == HUGE_PAGE && advise(start.as_ptr().addr(), bytes, Advice::Huge);
        Ok(Self { start: start.cast(), len, _memory: Some(memory), advised })
    }

    /// Whether the operating system took the [request](advise_huge_pages) for huge pages.
    pub fn is_advised(&self) -> bool {
        self.advised
    }
}

impl<T: CacheUnit> Deref for CacheBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` units from `start` on are the buffer's, and zeros or what was written.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: CacheUnit> DerefMut for CacheBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// # Panics
/// There is not enough memory.
impl<T: CacheUnit> Clone for CacheBuffer<T> {
    fn clone(&self) -> Self {
        match Self::zeroed(self.len) {
            Ok(mut copy) => {
                copy.copy_from_slice(self);
                copy
            }
            Err(e) => panic!("{e}"),
        }
    }
}

impl<T: CacheUnit> Default for CacheBuffer<T> {
    /// A buffer of no units.
    fn default() -> Self {
        Self { start: NonNull::dangling(), len: 0, _memory: None, advised: false }
    }
}

impl<T: CacheUnit> std::fmt::Debug for CacheBuffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CacheBuffer").field("len", &self.len).field("advised", &self.advised).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for len in [0, 1, 63, 5000, HUGE_PAGE / 4 - 1, HUGE_PAGE / 4, HUGE_PAGE + 3] {
            let mut buffer = CacheBuffer::<f32>::zeroed(len).unwrap();
            let huge = size_of::<f32>() * len >= HUGE_PAGE;
            assert_eq!(buffer.len(), len);
            assert!(len == 0 || buffer.as_ptr().addr().is_multiple_of(if huge { HUGE_PAGE } else { LINE }), "{len}");
            assert!(buffer.iter().all(|&x| x == 0.0), "{len}");
            assert!(huge || !buffer.is_advised(), "{len}");
            buffer.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let copy = buffer.clone();
            buffer.fill(-1.0);
            assert!(copy.iter().enumerate().all(|(i, &x)| x == i as f32), "{len}");
        }
        assert!(CacheBuffer::<u8>::default().is_empty());
    }

    #[test]
    fn too_much_memory_is_a_sentence() {
        for len in [usize::MAX, usize::MAX / 2, isize::MAX as usize / 2] {
            let message = CacheBuffer::<bf16>::zeroed(len).unwrap_err().to_string();
            assert!(message.contains(&format!("{len} units of 2 bytes")), "{message}");
        }
    }

    #[test]
    fn advice_is_for_whole_pages_and_leaves_contents_alone() {
        assert!(!advise_huge_pages::<u8>(&[]) && !advise_huge_pages(&[1u8; 100]));
        // Nothing is mapped at the ends of the address space.
        assert!(!advise(usize::MAX - 10, 100, Advice::Huge) && !advise(usize::MAX - 4096, 4096, Advice::Huge));
        let mut memory = vec![7u8; 3 * HUGE_PAGE + 5];
        let (huge, small) =
            (advise_huge_pages(&memory), advise(memory.as_ptr().addr() + 1, memory.len() - 1, Advice::Small));
        assert_eq!(huge, small);
        let supported = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        assert!(!cfg!(target_os = "linux") || huge == supported);
        assert!(memory.iter().all(|&x| x == 7));
        memory.fill(8);
    }
}
