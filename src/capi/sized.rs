//! Structs that begin with their size, and the layout of all structs.

use crate::error::{Result, ensure};
use std::mem::MaybeUninit;

/// A struct that begins with its size: plain integers, floats and pointers, for which all zeros is a value.
///
/// # Safety
/// `repr(C)`, first field `struct_size: usize`, valid for every bit pattern.
pub(super) unsafe trait Growing: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// Every size it has had, in order of ABI versions; the last is today's.
    const SIZES: &'static [usize];
}

/// A name, and in brackets the first field of each time that the struct grew.
macro_rules! sized {
    ($($name:ident $([$($field:ident),*])?),*) => {
        $(
            // SAFETY: integers, floats, nullable pointers and arrays of them, after a `struct_size`.
            unsafe impl $crate::capi::sized::Growing for $name {
                const NAME: &'static str = stringify!($name);
                const SIZES: &'static [usize] = &[$($(std::mem::offset_of!($name, $field),)*)? size_of::<$name>()];
            }
            const _: () = assert!(std::mem::offset_of!($name, struct_size) == 0);
        )*
    };
}

pub(super) use sized;

/// The size of a struct and the offsets of its fields on 64-bit machines; `ffi-tests/layout.c` holds the same numbers.
macro_rules! assert_layout {
    ($name:ident, $size:literal, $($field:ident: $offset:literal),* $(,)?) => {
        #[cfg(target_pointer_width = "64")]
        const _: () = {
            use std::mem::offset_of;
            assert!(size_of::<$name>() == $size && align_of::<$name>() == 8);
            $(assert!(offset_of!($name, $field) == $offset);)*
            // Every field is listed: this pattern has no `..`.
            #[allow(dead_code)]
            fn complete(value: $name) {
                let $name { $($field: _),* } = value;
            }
        };
    };
}
pub(super) use assert_layout;

/// The largest `struct_size` that is believed: beyond it, the number is no size.
const MAX_SIZE: usize = 1 << 16;

/// Copies a sized struct of the caller's. Fields beyond its size are 0; bytes beyond the fields that this library knows must be.
///
/// # Safety
/// `from` is null or points to a struct that is as long as its first field says.
pub(super) unsafe fn read_sized<T: Growing>(from: *const T) -> Result<T> {
    let mut value = MaybeUninit::uninit();
    // SAFETY: the caller's.
    unsafe { read_sized_to(from, &mut value).copied() }
}

/// As [`read_sized`], to a place of its own: small calls would notice another copy of a large struct.
///
/// # Safety
/// As [`read_sized`].
pub(super) unsafe fn read_sized_to<T: Growing>(from: *const T, to: &mut MaybeUninit<T>) -> Result<&T> {
    ensure!(!from.is_null(), NullPointer, "the pointer to {} is null", T::NAME);
    // SAFETY: not null; the caller's promise covers the first field. Unaligned, because nothing else needs alignment.
    let size = unsafe { from.cast::<usize>().read_unaligned() };
    let known = size_of::<T>();
    ensure!(
        T::SIZES.contains(&size) || (size > known && size <= MAX_SIZE),
        StructSize,
        "{}.struct_size is {size}, but this library knows {:?} and takes up to {MAX_SIZE}: start from its _INIT macro",
        T::NAME,
        T::SIZES
    );
    for at in known..size {
        // SAFETY: `size` bytes are readable by the caller's promise.
        let byte = unsafe { from.cast::<u8>().add(at).read() };
        ensure!(
            byte == 0,
            StructSize,
            "{}.struct_size is {size}, and byte {at} is {byte}, but this library knows {known} bytes and no field there: it is \
             older than the header of the caller, and fields that it does not know must be 0",
            T::NAME
        );
    }
    // SAFETY: the bytes are readable by the caller's promise and are no more than a `T` has; zeros are a valid `T`.
    unsafe {
        if size >= known {
            std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.as_mut_ptr().cast(), known);
        } else {
            to.as_mut_ptr().write_bytes(0, 1);
            std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.as_mut_ptr().cast(), size);
        }
        Ok(to.assume_init_ref())
    }
}

/// Writes a result into a sized struct of the caller's that [`read_sized`] has read, as far as that reaches. Its size stays.
///
/// # Safety
/// `to` points to a struct that is as long as its first field says.
pub(super) unsafe fn write_sized<T: Growing>(to: *mut T, value: T) {
    // SAFETY: the caller's: a size that `read_sized` has taken, and as many bytes.
    unsafe {
        let size = to.cast::<usize>().read_unaligned();
        let skip = size_of::<usize>();
        let (from, to) = ((&raw const value).cast::<u8>(), to.cast::<u8>());
        std::ptr::copy_nonoverlapping(from.add(skip), to.add(skip), size.min(size_of::<T>()) - skip);
    }
}
