//! The scales of caches in quantised formats.

use super::sized::{assert_layout, read_sized, sized};
use super::views::kvl_view;
use crate::error::Result;
use crate::format::CacheFormat;
use crate::view::{RawCacheView, RawView};

/// Where the scales of a cache lie, for formats that have scales. Start from `KVL_CACHE_SCALES_INIT`.
///
/// `KVL_FORMAT_INT8` has one scale per token and head, f32 or f16: a view [batch, seq, kv_heads, 1] whose first two axes are those
/// of the units (so that a layout applies to both), with strides of its own. Attention only reads scales; `kvl_kv_write` and the
/// functions that copy tokens write them too.
///
/// `KVL_FORMAT_FP8_E4M3` and `KVL_FORMAT_FP8_E5M2` have static scales, which every function reads and none writes: a view of the same
/// shape whose strides are 0 along the first two axes, and along kv_heads too where one scale serves the tensor. Absent, they are 1.
/// Every call on the same units must be given the same scales. Views of a call may share them.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_cache_scales {
    /// `sizeof(kvl_cache_scales)`.
    pub struct_size: usize,
    /// The scales of the keys; absent if their format has none, or static ones of 1.
    pub k: kvl_view,
    /// The scales of the values; absent if their format has none, or static ones of 1.
    pub v: kvl_view,
}

sized!(kvl_cache_scales);
assert_layout!(kvl_cache_scales, 184, struct_size: 0, k: 8, v: 96);

/// The scales of keys and of values at `from`; both are absent if it is null.
///
/// # Safety
/// `from` is null or points to what the header describes.
pub(super) unsafe fn read_scales(from: *const kvl_cache_scales) -> Result<[kvl_view; 2]> {
    if from.is_null() {
        return Ok([kvl_view::ABSENT; 2]);
    }
    // SAFETY: the caller's.
    let kvl_cache_scales { k, v, .. } = unsafe { read_sized(from) }?;
    Ok([k, v])
}

/// The units of a cache with its scales; `name` is that of the scales. Whether the format has any is checked by the operation.
pub(super) fn with_scales(units: RawView<CacheFormat>, name: &str, scales: &kvl_view) -> Result<RawCacheView> {
    let scales = if scales.is_absent() { None } else { Some(scales.raw(name)?) };
    Ok(RawCacheView { units, scales })
}
