//! Tensors in the caller's memory.

use super::arguments::{reserved, shape};
use super::dtype::{KVL_DTYPE_I8, KVL_DTYPE_U8, element_type, kvl_dtype};
use super::format::unit_format;
use super::sized::assert_layout;
use crate::error::Result;
use crate::format::CacheFormat;
use crate::view::{RawView, ZeroType};
use std::ffi::c_void;

/// A tensor in the caller's memory that is written. The axes are always batch, seq, heads, dim; strides give their
/// order in memory. Element [b, s, h, d] is at `data + element_size * (b * strides[0] + s * strides[1] + h * strides[2]
/// + d * strides[3])`.
///
/// In a cache of blocks (`KVL_FORMAT_Q8_0` and those after it), b, s, h and d lead to unit d of the head in the same way, by the bytes of
/// a unit; each holds 32 of the elements that `shape` counts.
///
/// `data` is aligned to the size of an element, or to 2 bytes in a cache of blocks. Strides may be negative. No two elements of a written
/// view share memory, and nothing outside the elements is ever read or written. A view whose bytes are all 0 is absent.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_view {
    /// Element [0, 0, 0, 0].
    pub data: *mut c_void,
    /// The type of the elements; of the keys and the values of a cache, its `kvl_format`.
    pub dtype: kvl_dtype,
    /// 0.
    pub reserved: i32,
    /// Elements along each axis; at most 2^31 - 1.
    pub shape: [i64; 4],
    /// Distance between neighbours along each axis, in elements (of a cache, in units of its format).
    pub strides: [i64; 4],
    /// Bytes from `data` to the end of the buffer, against which shape and strides are checked; 0 if unknown. If it is
    /// given, strides must not reach before `data`.
    pub bytes: usize,
}

assert_layout!(kvl_view, 88, data: 0, dtype: 8, reserved: 12, shape: 16, strides: 48, bytes: 80);

/// A tensor in the caller's memory that is read. As `kvl_view`, but strides may be 0, and elements may share memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_const_view {
    /// Element [0, 0, 0, 0].
    pub data: *const c_void,
    /// The type of the elements; of the keys and the values of a cache, its `kvl_format`.
    pub dtype: kvl_dtype,
    /// 0.
    pub reserved: i32,
    /// Elements along each axis; at most 2^31 - 1.
    pub shape: [i64; 4],
    /// Distance between neighbours along each axis, in elements (of a cache, in units of its format).
    pub strides: [i64; 4],
    /// Bytes from `data` to the end of the buffer; 0 if unknown.
    pub bytes: usize,
}

assert_layout!(kvl_const_view, 88, data: 0, dtype: 8, reserved: 12, shape: 16, strides: 48, bytes: 80);

// Inlined: a result as large as a view would be copied once more.
impl kvl_view {
    pub(super) const ABSENT: Self =
        Self { data: std::ptr::null_mut(), dtype: 0, reserved: 0, shape: [0; 4], strides: [0; 4], bytes: 0 };

    /// A tensor of elements.
    #[inline(always)]
    pub(super) fn raw(&self, name: &str) -> Result<RawView> {
        self.read(name, element_type)
    }

    /// The units of a cache, whose `dtype` is a `kvl_format`.
    #[inline(always)]
    pub(super) fn units(&self, name: &str) -> Result<RawView<CacheFormat>> {
        self.read(name, unit_format)
    }

    /// Zero points, whose `dtype` may be one of integers.
    pub(super) fn zeros(&self, name: &str) -> Result<RawView<ZeroType>> {
        self.read(name, |name, value| match value {
            KVL_DTYPE_U8 => Ok(ZeroType::U8),
            KVL_DTYPE_I8 => Ok(ZeroType::I8),
            _ => Ok(ZeroType::Float(element_type(name, value)?)),
        })
    }

    #[inline(always)]
    fn read<U>(&self, name: &str, kind: fn(&str, i32) -> Result<U>) -> Result<RawView<U>> {
        reserved(name, self.reserved)?;
        Ok(RawView {
            data: self.data.cast(),
            dtype: kind(name, self.dtype)?,
            shape: shape(name, self.shape, ["batch", "seq", "heads", "dim"])?,
            strides: self.strides,
            bytes: (self.bytes > 0).then_some(self.bytes),
        })
    }

    pub(super) fn is_absent(&self) -> bool {
        self.as_const().is_absent()
    }

    pub(super) fn as_const(&self) -> kvl_const_view {
        let Self { data, dtype, reserved, shape, strides, bytes } = *self;
        kvl_const_view { data, dtype, reserved, shape, strides, bytes }
    }
}

impl kvl_const_view {
    /// The operations do not write through views that they only read.
    #[inline(always)]
    pub(super) fn raw(&self, name: &str) -> Result<RawView> {
        self.as_view().raw(name)
    }

    /// As [`kvl_view::units`].
    #[inline(always)]
    pub(super) fn units(&self, name: &str) -> Result<RawView<CacheFormat>> {
        self.as_view().units(name)
    }

    #[inline(always)]
    fn as_view(&self) -> kvl_view {
        let Self { data, dtype, reserved, shape, strides, bytes } = *self;
        kvl_view { data: data.cast_mut(), dtype, reserved, shape, strides, bytes }
    }

    pub(super) fn is_absent(&self) -> bool {
        let Self { data, dtype, reserved, shape, strides, bytes } = *self;
        data.is_null() && dtype == 0 && reserved == 0 && shape == [0; 4] && strides == [0; 4] && bytes == 0
    }
}
