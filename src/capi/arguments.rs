//! Conversion of what most exports take: lists, sizes, numbers of enumerations.

use crate::error::{Error, Result, Status, ensure, fail};

/// Reads a struct of fixed size.
///
/// # Safety
/// `from` is null or points to a `T`.
pub(super) unsafe fn read<T: Copy>(name: &str, from: *const T) -> Result<T> {
    ensure!(!from.is_null(), NullPointer, "the pointer {name} is null");
    // SAFETY: the caller's.
    Ok(unsafe { from.read_unaligned() })
}

/// The `n` elements that the caller has put at `data`; none if it is null.
///
/// # Safety
/// `data` is null or points to `n` elements that nobody writes while the slice is in use.
#[inline(always)]
pub(super) unsafe fn list<'a, T>(name: &str, data: *const T, n: usize) -> Result<Option<&'a [T]>> {
    if data.is_null() {
        return Ok(None);
    }
    check_list(name, data, n)?;
    // SAFETY: the caller's promise, and what has just been checked.
    Ok(Some(unsafe { std::slice::from_raw_parts(data, n) }))
}

/// Like [`list`], for one that must be there unless it is empty.
///
/// # Safety
/// As for [`list`].
pub(super) unsafe fn required_list<'a, T>(name: &str, data: *const T, n: usize) -> Result<&'a [T]> {
    ensure!(!data.is_null() || n == 0, NullPointer, "{name} is null, but {n} entries are needed");
    // SAFETY: the caller's.
    Ok(unsafe { list(name, data, n) }?.unwrap_or(&[]))
}

/// Like [`required_list`], for one that is written.
///
/// # Safety
/// `data` is null or points to `n` elements that nobody else reads or writes while the slice is in use.
pub(super) unsafe fn output_list<'a, T>(name: &str, data: *mut T, n: usize) -> Result<&'a mut [T]> {
    if n == 0 {
        return Ok(&mut []);
    }
    ensure!(!data.is_null(), NullPointer, "{name} is null, but {n} entries are to be written");
    check_list(name, data, n)?;
    // SAFETY: the caller's promise, and what has just been checked.
    Ok(unsafe { std::slice::from_raw_parts_mut(data, n) })
}

pub(super) fn check_list<T>(name: &str, data: *const T, n: usize) -> Result<()> {
    ensure!(data.is_aligned(), Bounds, "{name} at {:#x} is not aligned to {} bytes", data.addr(), align_of::<T>());
    let fits = n.checked_mul(size_of::<T>()).filter(|&b| b <= isize::MAX as usize);
    ensure!(
        fits.is_some_and(|bytes| data.addr().checked_add(bytes).is_some()),
        Shape,
        "{name} would have {n} entries, more than an address space holds"
    );
    Ok(())
}

/// A size from C, where sizes are signed so that a wrong sign is an error and not a huge number.
#[inline(always)]
pub(super) fn size(name: &str, value: i64) -> Result<usize> {
    match usize::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => fail!(Shape, "{name} is {value}, which is {}", if value < 0 { "negative" } else { "too large" }),
    }
}

#[inline(always)]
pub(super) fn shape(name: &str, shape: [i64; 4], axes: [&str; 4]) -> Result<[usize; 4]> {
    let mut sizes = [0; 4];
    for axis in 0..4 {
        ensure!(
            shape[axis] >= 0,
            Shape,
            "{name} has {} = {}, which is negative (shape {shape:?})",
            axes[axis],
            shape[axis]
        );
        sizes[axis] = size(axes[axis], shape[axis])?;
    }
    Ok(sizes)
}

#[inline(always)]
pub(super) fn reserved(name: &str, value: i32) -> Result<()> {
    ensure!(value == 0, InvalidEnum, "{name}.reserved is {value}, but must be 0");
    Ok(())
}

/// 0 or 1.
pub(super) fn boolean(name: &str, value: i32) -> Result<bool> {
    ensure!(value == 0 || value == 1, InvalidEnum, "{name} is {value}, which is neither 0 nor 1");
    Ok(value == 1)
}

pub(super) fn enumeration<T>(kind: &str, name: &str, value: i32, from: impl Fn(u32) -> Option<T>) -> Result<T> {
    u32::try_from(value)
        .ok()
        .and_then(from)
        .ok_or_else(|| Error::new(Status::InvalidEnum, format!("{name} is {value}, which is no {kind}")))
}

/// Checks that lists, of which one at least is written, share no memory; null ones have none.
pub(super) fn apart<const N: usize>(lists: [(&str, *mut i32, usize); N]) -> Result<()> {
    let span = |(_, data, n): (&str, *mut i32, usize)| {
        let bytes = if data.is_null() { 0 } else { n.saturating_mul(size_of::<i32>()) };
        (data.addr(), data.addr().saturating_add(bytes))
    };
    for (i, &a) in lists.iter().enumerate() {
        for &b in &lists[..i] {
            let ((a0, a1), (b0, b1)) = (span(a), span(b));
            ensure!(a0 >= b1 || b0 >= a1 || a0 == a1 || b0 == b1, Overlap, "{} and {} share memory", b.0, a.0);
        }
    }
    Ok(())
}
