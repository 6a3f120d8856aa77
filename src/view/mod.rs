//! Views: where the elements of a tensor lie in the caller's memory.
//!
//! Every tensor of the library has rank 4, with its axes in the order `[batch, seq, heads, dim]`. Their order in memory is given by
//! strides in elements: BSHD, BHSD, a slice of a fused QKV buffer and a shard of the heads differ in their strides only.

mod affine;
mod raw;

pub use affine::{Affine, Integers, Nibbles, Zeros};
pub(crate) use affine::{AffineGroups, AffineRow, RawAffine, ZeroType, apart_is_unknown};
pub(crate) use raw::*;

use crate::dtype::{DType, Element};
use crate::error::{Result, ensure};
use std::marker::PhantomData;

/// An axis of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Axis {
    /// Sequences of a batch; pages, in a pool of pages.
    Batch = 0,
    /// Tokens of a sequence; slots of a cache or of a page.
    Seq = 1,
    /// Heads of a token.
    Heads = 2,
    /// Elements of a head.
    Dim = 3,
}

/// A read-only view of a `[batch, seq, heads, dim]` tensor: an address, an element type, a shape and strides in elements.
///
/// The order of the axes is always this one; their order in memory is a matter of the strides. A view made from a slice reaches
/// elements of that slice only, which is checked when the view is made.
///
/// With the feature `ndarray`, `View::try_from` takes an `ArrayView4` and `ViewMut::try_from` an `ArrayViewMut4`.
///
/// Thread safety: a view is a shared borrow of plain numbers; it may be copied, sent and shared between threads.
///
/// ```
/// use kvlane::View;
/// // One sequence of two tokens, three heads of four elements.
/// let data = vec![0.0f32; 24];
/// let x = View::new(&data, [1, 2, 3, 4])?;
/// assert_eq!(x.shape(), [1, 2, 3, 4]);
/// // The same tensor, had it been stored head by head.
/// let y = View::bhsd(&data, [1, 2, 3, 4])?;
/// assert_eq!(y.strides(), [24, 4, 8, 1]);
/// // The last head alone: a shard.
/// assert_eq!(x.heads(2, 1)?.shape(), [1, 2, 1, 4]);
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(crate) raw: RawView,
    lifetime: PhantomData<&'a [u8]>,
}

/// A view through which an operation writes. No two of its elements share memory.
///
/// Thread safety: a mutable view is an exclusive borrow of plain numbers; it may be sent to another thread. Parts of it that
/// [`split_at`](Self::split_at) makes may be used on several threads at the same time.
///
/// ```
/// use kvlane::{Axis, ViewMut};
/// // A pool of three pages; each page holds the keys and then the values of 16 tokens, 2 heads of 8 elements.
/// let mut pool = vec![0.0f32; 3 * 2 * 16 * 2 * 8];
/// let (k_cache, v_cache) = ViewMut::new(&mut pool, [3, 2 * 16, 2, 8])?.split_at(Axis::Seq, 16)?;
/// assert_eq!((k_cache.shape(), v_cache.shape()), ([3, 16, 2, 8], [3, 16, 2, 8]));
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Debug)]
pub struct ViewMut<'a> {
    pub(crate) raw: RawView,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view is a shared (or an exclusive) borrow of a slice of plain numbers, and slices of those cross threads.
unsafe impl Send for View<'_> {}
// SAFETY: as above; nothing is written through a `View`.
unsafe impl Sync for View<'_> {}
// SAFETY: as above, and the borrow is exclusive.
unsafe impl Send for ViewMut<'_> {}

/// The memory that a view is made in.
pub(crate) struct Buffer {
    data: *mut u8,
    /// How many units there are, and what sentences call one.
    len: usize,
    unit: &'static str,
    unit_bytes: usize,
}

impl Buffer {
    pub fn of_elements<T>(data: *mut T, len: usize) -> Self {
        Self { data: data.cast(), len, unit: "element", unit_bytes: size_of::<T>() }
    }

    fn of_bytes(data: *mut u8, len: usize) -> Self {
        Self { data, len, unit: "byte", unit_bytes: 1 }
    }

    /// Whole units of several elements in `len` bytes.
    pub fn of_blocks(data: *mut u8, len: usize, unit_bytes: usize) -> Self {
        Self { data, len: len / unit_bytes, unit: "block", unit_bytes }
    }

    /// The view whose first element lies `offset` units after the start.
    pub fn view<U: Units>(&self, dtype: U, offset: usize, shape: [usize; 4], strides: [i64; 4]) -> Result<RawView<U>> {
        let Self { data, len, unit, unit_bytes } = *self;
        ensure!(offset <= len, Bounds, "offset {offset} is past the end of a slice of {len} {unit}s");
        // `wrapping_add`, because validation is still to come; it stays inside or one past the slice.
        let data = data.wrapping_add(offset * unit_bytes);
        let view = RawView { data, dtype, shape, strides, bytes: None };
        let extent = view.validate("view")?;
        // In bytes: a division takes long on some CPUs.
        let (begin, end, size) = (offset * unit_bytes, len * unit_bytes, unit_bytes as isize);
        ensure!(
            extent.low + begin as isize >= 0,
            Bounds,
            "strides {strides:?} from offset {offset} reach {} {unit}s before the start of the slice",
            -(extent.low / size + offset as isize)
        );
        ensure!(
            extent.high + begin as isize <= end as isize,
            Bounds,
            "shape {shape:?} with strides {strides:?} from offset {offset} reaches {unit} {} of a slice of {len}",
            extent.high / size + offset as isize
        );
        Ok(view)
    }
}

/// Fails if an axis has no index `at` and does not end there; returns its length.
pub(crate) fn check_split(shape: [usize; 4], axis: Axis, at: usize) -> Result<usize> {
    let n = shape[axis as usize];
    ensure!(at <= n, Shape, "{at} is past the end of the {} axis, which has {n}", RawView::axis_name(axis as usize));
    Ok(n)
}

/// Fails unless a type's elements are the 16-bit patterns of a slice.
fn check_bits(dtype: DType) -> Result<()> {
    let size = dtype.size();
    ensure!(size == 2, DType, "the slice holds bit patterns of 2 bytes, but an element of {dtype} has {size}");
    Ok(())
}

macro_rules! slicing {
    () => {
        /// `[batch, seq, heads, dim]`.
        pub fn shape(&self) -> [usize; 4] {
            self.raw.shape
        }

        /// Strides in elements, axis by axis.
        pub fn strides(&self) -> [i64; 4] {
            self.raw.strides
        }

        /// The type of the elements.
        pub fn dtype(&self) -> DType {
            self.raw.dtype
        }

        /// The sequences (or pages) `start .. start + len`.
        ///
        /// # Errors
        /// [`Status::Shape`](crate::Status::Shape): they are not all inside the axis.
        pub fn batch(self, start: usize, len: usize) -> Result<Self> {
            self.narrow(BATCH, start, len)
        }

        /// The tokens (or slots) `start .. start + len` of every sequence.
        ///
        /// # Errors
        /// As [`batch`](Self::batch).
        pub fn seq(self, start: usize, len: usize) -> Result<Self> {
            self.narrow(SEQ, start, len)
        }

        /// The heads `start .. start + len`.
        ///
        /// # Errors
        /// As [`batch`](Self::batch).
        pub fn heads(self, start: usize, len: usize) -> Result<Self> {
            self.narrow(HEADS, start, len)
        }

        /// The elements `start .. start + len` of every head.
        ///
        /// # Errors
        /// As [`batch`](Self::batch).
        pub fn dim(self, start: usize, len: usize) -> Result<Self> {
            self.narrow(DIM, start, len)
        }

        /// The indices of an axis before `at`, and those from `at` on.
        ///
        /// So keys and values that are interleaved in one buffer become two views: page by page along [`Axis::Seq`], head by head
        /// along [`Axis::Heads`] or [`Axis::Dim`]. Parts of a batch become views for several threads.
        ///
        /// # Errors
        /// [`Status::Shape`](crate::Status::Shape): `at` is past the end of the axis.
        pub fn split_at(self, axis: Axis, at: usize) -> Result<(Self, Self)> {
            let n = check_split(self.raw.shape, axis, at)?;
            let [low, high] = [(0, at), (at, n - at)].map(|(start, len)| self.raw.narrow(axis as usize, start, len));
            Ok((Self { raw: low?, lifetime: PhantomData }, Self { raw: high?, lifetime: PhantomData }))
        }

        fn narrow(self, axis: usize, start: usize, len: usize) -> Result<Self> {
            Ok(Self { raw: self.raw.narrow(axis, start, len)?, lifetime: PhantomData })
        }
    };
}

impl<'a> View<'a> {
    /// A tensor that lies at the start of `data` in the order of its axes (BSHD).
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    pub fn new<T: Element>(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, 0, shape, contiguous(shape))
    }

    /// A tensor that lies at the start of `data` in the order batch, heads, seq, dim (BHSD). `shape` stays
    /// `[batch, seq, heads, dim]`.
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    pub fn bhsd<T: Element>(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, 0, shape, bhsd(shape))
    }

    /// A tensor whose element `[0, 0, 0, 0]` is `data[offset]`; strides are in elements and may be negative or 0.
    ///
    /// # Errors
    /// [`Status::Bounds`](crate::Status::Bounds): an element lies outside of `data`. [`Status::Shape`](crate::Status::Shape): an
    /// axis has more than `i32::MAX` indices. [`Status::Stride`](crate::Status::Stride): the tensor leaves the address space.
    pub fn strided<T: Element>(data: &'a [T], offset: usize, shape: [usize; 4], strides: [i64; 4]) -> Result<Self> {
        let buffer = Buffer::of_elements(data.as_ptr().cast_mut(), data.len());
        Ok(Self { raw: buffer.view(T::DTYPE, offset, shape, strides)?, lifetime: PhantomData })
    }

    /// As [`new`](Self::new), from the bit patterns of f16 or bf16.
    ///
    /// # Errors
    /// As [`strided`](Self::strided); [`Status::DType`](crate::Status::DType): an element of `dtype` has not 2 bytes.
    pub fn from_bits(data: &'a [u16], dtype: DType, shape: [usize; 4]) -> Result<Self> {
        Self::strided_bits(data, dtype, 0, shape, contiguous(shape))
    }

    /// As [`strided`](Self::strided), from the bit patterns of f16 or bf16.
    ///
    /// # Errors
    /// As [`from_bits`](Self::from_bits).
    pub fn strided_bits(
        data: &'a [u16],
        dtype: DType,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        check_bits(dtype)?;
        let buffer = Buffer::of_elements(data.as_ptr().cast_mut(), data.len());
        Ok(Self { raw: buffer.view(dtype, offset, shape, strides)?, lifetime: PhantomData })
    }

    /// As [`new`](Self::new), from bytes in the order of this machine, which begin at a multiple of an element's size.
    ///
    /// # Errors
    /// As [`strided`](Self::strided); [`Status::Bounds`](crate::Status::Bounds): the address is not aligned.
    pub fn from_bytes(data: &'a [u8], dtype: DType, shape: [usize; 4]) -> Result<Self> {
        Self::strided_bytes(data, dtype, 0, shape, contiguous(shape))
    }

    /// As [`strided`](Self::strided), from bytes: `offset` is in bytes, strides are in elements.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    pub fn strided_bytes(
        data: &'a [u8],
        dtype: DType,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        let buffer = Buffer::of_bytes(data.as_ptr().cast_mut(), data.len());
        Ok(Self { raw: buffer.view(dtype, offset, shape, strides)?, lifetime: PhantomData })
    }

    /// A tensor whose element `[0, 0, 0, 0]` lies at `data`; strides are in elements and may be negative or 0.
    ///
    /// # Errors
    /// [`Status::NullPointer`](crate::Status::NullPointer): `data` is null although the tensor has elements.
    /// [`Status::Bounds`](crate::Status::Bounds): the address is not aligned. Also those of [`strided`](Self::strided) that do not
    /// speak of a slice.
    ///
    /// # Safety
    /// For the lifetime `'a`, the memory of all elements is readable, initialised, and written by nobody.
    pub unsafe fn from_raw(data: *const u8, dtype: DType, shape: [usize; 4], strides: [i64; 4]) -> Result<Self> {
        let raw = RawView { data: data.cast_mut(), dtype, shape, strides, bytes: None };
        raw.validate("view")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    slicing!();
}

impl<'a> ViewMut<'a> {
    /// A tensor that lies at the start of `data` in the order of its axes (BSHD).
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    pub fn new<T: Element>(data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, 0, shape, contiguous(shape))
    }

    /// A tensor that lies at the start of `data` in the order batch, heads, seq, dim (BHSD). `shape` stays
    /// `[batch, seq, heads, dim]`.
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    pub fn bhsd<T: Element>(data: &'a mut [T], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, 0, shape, bhsd(shape))
    }

    /// A tensor whose element `[0, 0, 0, 0]` is `data[offset]`; strides are in elements and may be negative.
    ///
    /// # Errors
    /// Those of [`View::strided`]; [`Status::Stride`](crate::Status::Stride): two elements share memory.
    pub fn strided<T: Element>(data: &'a mut [T], offset: usize, shape: [usize; 4], strides: [i64; 4]) -> Result<Self> {
        let buffer = Buffer::of_elements(data.as_mut_ptr(), data.len());
        Self::exclusive(buffer.view(T::DTYPE, offset, shape, strides)?)
    }

    /// As [`new`](Self::new), from the bit patterns of f16 or bf16.
    ///
    /// # Errors
    /// As [`strided`](Self::strided); [`Status::DType`](crate::Status::DType): an element of `dtype` has not 2 bytes.
    pub fn from_bits(data: &'a mut [u16], dtype: DType, shape: [usize; 4]) -> Result<Self> {
        Self::strided_bits(data, dtype, 0, shape, contiguous(shape))
    }

    /// As [`strided`](Self::strided), from the bit patterns of f16 or bf16.
    ///
    /// # Errors
    /// As [`from_bits`](Self::from_bits).
    pub fn strided_bits(
        data: &'a mut [u16],
        dtype: DType,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        check_bits(dtype)?;
        let buffer = Buffer::of_elements(data.as_mut_ptr(), data.len());
        Self::exclusive(buffer.view(dtype, offset, shape, strides)?)
    }

    /// As [`new`](Self::new), from bytes in the order of this machine, which begin at a multiple of an element's size.
    ///
    /// # Errors
    /// As [`strided`](Self::strided); [`Status::Bounds`](crate::Status::Bounds): the address is not aligned.
    pub fn from_bytes(data: &'a mut [u8], dtype: DType, shape: [usize; 4]) -> Result<Self> {
        Self::strided_bytes(data, dtype, 0, shape, contiguous(shape))
    }

    /// As [`strided`](Self::strided), from bytes: `offset` is in bytes, strides are in elements.
    ///
    /// # Errors
    /// As [`from_bytes`](Self::from_bytes).
    pub fn strided_bytes(
        data: &'a mut [u8],
        dtype: DType,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        let buffer = Buffer::of_bytes(data.as_mut_ptr(), data.len());
        Self::exclusive(buffer.view(dtype, offset, shape, strides)?)
    }

    /// A tensor whose element `[0, 0, 0, 0]` lies at `data`; strides are in elements and may be negative.
    ///
    /// # Errors
    /// Those of [`View::from_raw`]; [`Status::Stride`](crate::Status::Stride): two elements share memory.
    ///
    /// # Safety
    /// For the lifetime `'a`, the memory of all elements is readable, writable, initialised, and used through this view alone.
    pub unsafe fn from_raw(data: *mut u8, dtype: DType, shape: [usize; 4], strides: [i64; 4]) -> Result<Self> {
        Self::exclusive(RawView { data, dtype, shape, strides, bytes: None })
    }

    /// A view through which elements are written: none of them share memory.
    fn exclusive(raw: RawView) -> Result<Self> {
        raw.validate_output("view")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A read-only view of the same elements.
    pub fn as_view(&self) -> View<'_> {
        View { raw: self.raw, lifetime: PhantomData }
    }

    /// The same view, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { raw: self.raw, lifetime: PhantomData }
    }

    slicing!();
}

#[cfg(feature = "ndarray")]
impl<'a, T: Element> TryFrom<ndarray::ArrayView4<'a, T>> for View<'a> {
    type Error = crate::Error;

    /// The tensor whose axes are `[batch, seq, heads, dim]` in the array.
    fn try_from(array: ndarray::ArrayView4<'a, T>) -> Result<Self> {
        let (shape, strides) = axes_of(array.shape(), array.strides());
        // SAFETY: the array borrows its elements for 'a.
        unsafe { Self::from_raw(array.as_ptr().cast(), T::DTYPE, shape, strides) }
    }
}

#[cfg(feature = "ndarray")]
impl<'a, T: Element> TryFrom<ndarray::ArrayViewMut4<'a, T>> for ViewMut<'a> {
    type Error = crate::Error;

    /// The tensor whose axes are `[batch, seq, heads, dim]` in the array.
    fn try_from(mut array: ndarray::ArrayViewMut4<'a, T>) -> Result<Self> {
        let (shape, strides) = axes_of(array.shape(), array.strides());
        // SAFETY: the array borrows its elements for 'a, exclusively.
        unsafe { Self::from_raw(array.as_mut_ptr().cast(), T::DTYPE, shape, strides) }
    }
}

/// The shape and strides of an array of rank 4.
#[cfg(feature = "ndarray")]
fn axes_of(shape: &[usize], strides: &[isize]) -> ([usize; 4], [i64; 4]) {
    (std::array::from_fn(|axis| shape[axis]), std::array::from_fn(|axis| strides[axis] as i64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn a_view_reaches_its_slice_only() {
        let data = [0f32; 24];
        assert!(View::new(&data, [1, 2, 3, 4]).is_ok());
        assert_eq!(View::new(&data, [1, 2, 3, 5]).unwrap_err().status(), Status::Bounds);
        assert_eq!(View::strided(&data, 0, [1, 2, 3, 4], [0, -12, 4, 1]).unwrap_err().status(), Status::Bounds);
        assert!(View::strided(&data, 12, [1, 2, 3, 4], [0, -12, 4, 1]).is_ok());
        assert!(View::strided(&data, 25, [0, 2, 3, 4], [0, 0, 0, 0]).is_err());
        let huge = View::strided(&data, 0, [2, 2, 2, 2], [i64::MIN, i64::MIN, i64::MAX, i64::MAX]);
        assert_eq!(huge.unwrap_err().status(), Status::Stride);
    }

    #[test]
    fn an_output_shares_no_element() {
        let mut data = [0f32; 24];
        assert!(ViewMut::strided(&mut data, 0, [1, 2, 3, 4], [0, 12, 4, 1]).is_ok());
        assert_eq!(ViewMut::strided(&mut data, 0, [1, 2, 3, 4], [0, 0, 4, 1]).unwrap_err().status(), Status::Stride);
        assert!(ViewMut::strided(&mut data, 0, [1, 2, 3, 4], [0, 4, 3, 1]).is_err());
    }

    #[test]
    fn bits_and_bytes_are_elements_of_a_type_that_is_given() {
        let mut bits: Vec<u16> = (0..24).collect();
        let x = View::from_bits(&bits, DType::Bf16, [1, 2, 3, 4]).unwrap();
        assert_eq!((x.dtype(), x.strides()), (DType::Bf16, [24, 12, 4, 1]));
        // SAFETY: the first element of the second token.
        assert_eq!(unsafe { *x.seq(1, 1).unwrap().raw.data.cast::<u16>() }, 12);
        let reversed = View::strided_bits(&bits, DType::F16, 23, [1, 2, 3, 4], [0, -12, -4, -1]).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { *reversed.raw.data.cast::<u16>() }, 23);
        let wide = View::from_bits(&bits, DType::F32, [1, 1, 1, 1]).unwrap_err();
        assert_eq!(wide.status(), Status::DType);
        assert_eq!(wide.message(), "the slice holds bit patterns of 2 bytes, but an element of f32 has 4");
        let long = View::from_bits(&bits, DType::F16, [1, 2, 3, 5]).unwrap_err();
        assert!(long.message().ends_with("reaches element 30 of a slice of 24"), "{long}");
        assert!(ViewMut::from_bits(&mut bits, DType::F16, [1, 2, 3, 4]).is_ok());
        let shared = ViewMut::strided_bits(&mut bits, DType::F16, 0, [1, 2, 3, 4], [0, 0, 4, 1]);
        assert_eq!(shared.unwrap_err().status(), Status::Stride);
        assert_eq!(ViewMut::from_bits(&mut bits, DType::F32, [1; 4]).unwrap_err().status(), Status::DType);

        // Memory that is aligned for f32.
        let mut words = [0f32; 6];
        let data: *mut u8 = words.as_mut_ptr().cast();
        // SAFETY: the bytes of the floats.
        let bytes = unsafe { std::slice::from_raw_parts_mut(data, 24) };
        assert_eq!(View::from_bytes(bytes, DType::F32, [1, 1, 2, 3]).unwrap().dtype(), DType::F32);
        let long = View::from_bytes(bytes, DType::F32, [1, 1, 2, 4]).unwrap_err();
        assert!(long.message().ends_with("reaches byte 32 of a slice of 24"), "{long}");
        let odd = View::strided_bytes(bytes, DType::F32, 2, [1, 1, 1, 1], [0; 4]).unwrap_err();
        assert!(
            odd.status() == Status::Bounds && odd.message().contains("not aligned to its 4-byte elements"),
            "{odd}"
        );
        let late = View::strided_bytes(bytes, DType::F32, 25, [1, 1, 1, 1], [0; 4]).unwrap_err();
        assert_eq!(late.message(), "offset 25 is past the end of a slice of 24 bytes");
        let early = View::strided_bytes(bytes, DType::F16, 4, [1, 1, 4, 1], [0, 0, -1, 1]).unwrap_err();
        assert!(early.message().ends_with("reach 2 bytes before the start of the slice"), "{early}");
        assert!(ViewMut::strided_bytes(bytes, DType::F16, 4, [1, 1, 3, 1], [0, 0, -1, 1]).is_ok());
        assert_eq!(ViewMut::from_bytes(bytes, DType::F16, [1, 1, 4, 4]).unwrap_err().status(), Status::Bounds);
    }

    #[test]
    fn raw_pointers_are_checked_as_far_as_can_be() {
        let mut data = [0f32; 24];
        let at: *mut u8 = data.as_mut_ptr().cast();
        let (shape, strides) = ([1, 2, 3, 4], [24, 12, 4, 1]);
        // SAFETY: views of the array, or errors.
        unsafe {
            assert_eq!(View::from_raw(at, DType::F32, shape, strides).unwrap().shape(), shape);
            assert!(View::from_raw(at, DType::F32, shape, [0; 4]).is_ok());
            assert!(View::from_raw(std::ptr::null(), DType::F32, [0, 2, 3, 4], strides).is_ok());
            let null = View::from_raw(std::ptr::null(), DType::F32, shape, strides).unwrap_err();
            assert_eq!(null.status(), Status::NullPointer);
            let odd = View::from_raw(at.wrapping_add(1), DType::F16, shape, strides).unwrap_err();
            assert_eq!(odd.status(), Status::Bounds);
            let far = View::from_raw(at, DType::F32, shape, [0, i64::MAX, 4, 1]).unwrap_err();
            assert_eq!(far.status(), Status::Stride);
            assert!(ViewMut::from_raw(at, DType::F32, shape, strides).is_ok());
            let shared = ViewMut::from_raw(at, DType::F32, shape, [0, 0, 4, 1]).unwrap_err();
            assert_eq!(shared.status(), Status::Stride);
        }
    }

    /// Every element lies in one half, and the halves of an output touch nowhere.
    #[test]
    fn halves_are_apart() {
        let mut data: Vec<f32> = (0..4 * 6 * 4 * 8).map(|i| i as f32).collect();
        let shape = [4, 6, 4, 8];
        for (strides, offset) in [(contiguous(shape), 0), (bhsd(shape), 0), ([192, -32, 8, 1], 160)] {
            for axis in [Axis::Batch, Axis::Seq, Axis::Heads, Axis::Dim] {
                let n = shape[axis as usize];
                for at in 0..=n {
                    let whole = ViewMut::strided(&mut data, offset, shape, strides).unwrap();
                    let first: *mut f32 = whole.raw.data.cast();
                    let (low, high) = whole.split_at(axis, at).unwrap();
                    assert_eq!((low.shape()[axis as usize], high.shape()[axis as usize]), (at, n - at));
                    assert!(!low.raw.overlaps(&high.raw), "{strides:?} {axis:?} at {at}");
                    assert!(low.raw.validate_output("low").is_ok() && high.raw.validate_output("high").is_ok());
                    if at < n {
                        assert_eq!(
                            high.raw.data.cast(),
                            first.wrapping_offset(at as isize * strides[axis as usize] as isize)
                        );
                    }
                    let read = View::strided(&data, offset, shape, strides).unwrap().split_at(axis, at).unwrap();
                    assert_eq!((read.0.shape()[axis as usize], read.1.shape()[axis as usize]), (at, n - at));
                }
            }
        }
        let error = View::new(&data, shape).unwrap().split_at(Axis::Heads, 5).unwrap_err();
        assert_eq!(error.message(), "5 is past the end of the heads axis, which has 4");
        assert_eq!(ViewMut::new(&mut data, shape).unwrap().split_at(Axis::Dim, 9).unwrap_err().status(), Status::Shape);
        assert_eq!(View::new(&data, shape).unwrap().dim(2, 3).unwrap().shape(), [4, 6, 4, 3]);
    }

    #[cfg(feature = "ndarray")]
    #[test]
    fn arrays_become_views() {
        let mut array = ndarray::Array4::<f32>::zeros((2, 3, 4, 8));
        let head = View::try_from(array.slice(ndarray::s![.., ..;-1, 1..3, ..])).unwrap();
        assert_eq!((head.shape(), head.strides()), ([2, 3, 2, 8], [96, -32, 8, 1]));
        let spread = ndarray::Array1::from_elem(8, half::f16::ONE);
        let spread = View::try_from(spread.broadcast((2, 3, 4, 8)).unwrap()).unwrap();
        assert_eq!((spread.dtype(), spread.strides()), (DType::F16, [0, 0, 0, 1]));
        let whole = ViewMut::try_from(array.view_mut()).unwrap();
        assert_eq!(whole.split_at(Axis::Batch, 1).unwrap().1.shape(), [1, 3, 4, 8]);
    }
}
