//! Memory for tensors: on the heap, or adjacent to a page without access.

use kvlane::Element;

/// Where a tensor's memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the heap, with space before and after it.
    Heap,
    /// Its last byte is the last before a page without access.
    GuardAfter,
    /// Its first byte is the first after a page without access.
    GuardBefore,
}

/// Writable bytes at a fixed address.
pub struct Memory {
    base: *mut u8,
    bytes: usize,
    /// The mapping with its guard pages, if the memory is mapped.
    map: Option<(*mut u8, usize)>,
    _heap: Vec<u64>,
}

// SAFETY: plain bytes, owned.
unsafe impl Send for Memory {}
// SAFETY: written through `&mut` only.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(bytes: usize, place: Place) -> Self {
        if cfg!(unix) && place != Place::Heap {
            return Self::guarded(bytes, place);
        }
        let mut heap = vec![0u64; bytes.div_ceil(8) + 1];
        Self { base: heap.as_mut_ptr().cast(), bytes, map: None, _heap: heap }
    }

    #[cfg(not(unix))]
    fn guarded(_: usize, _: Place) -> Self {
        unreachable!("only Unix has guard pages here")
    }

    #[cfg(unix)]
    fn guarded(bytes: usize, place: Place) -> Self {
        // SAFETY: a query, an anonymous mapping of our own, and its first and last page.
        unsafe {
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let inner = bytes.next_multiple_of(page).max(page);
            let total = inner + 2 * page;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), total, protection, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED, "mmap of {total} bytes");
            let map = map.cast::<u8>();
            assert_eq!(libc::mprotect(map.cast(), page, libc::PROT_NONE), 0);
            // QEMU 7.2 reads whole vectors in AVX2's masked loads.
            if std::env::var_os("KVLANE_TEST_GUARD").is_none_or(|value| value != "off") {
                assert_eq!(libc::mprotect(map.add(page + inner).cast(), page, libc::PROT_NONE), 0);
            }
            let base = map.add(if place == Place::GuardAfter { page + inner - bytes } else { page });
            Self { base, bytes, map: Some((map, total)), _heap: Vec::new() }
        }
    }

    pub fn slice<T: Element>(&self) -> &[T] {
        // SAFETY: owned, initialised and aligned: `bytes` is a multiple of the element and pages are aligned.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.bytes / size_of::<T>()) }
    }

    pub fn slice_mut<T: Element>(&mut self) -> &mut [T] {
        // SAFETY: as above, and exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.cast(), self.bytes / size_of::<T>()) }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.base, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.bytes) }
    }

    /// The bytes as booleans; all of them must be 0 or 1.
    pub fn bools(&self) -> &[bool] {
        assert!(self.bytes().iter().all(|&b| b < 2));
        // SAFETY: as above, and every byte is a valid boolean.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.bytes) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Some((map, bytes)) = self.map {
            // SAFETY: mapped by `guarded` with this size, and unmapped once.
            unsafe { libc::munmap(map.cast(), bytes) };
        }
    }
}
