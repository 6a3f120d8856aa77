//! The scales of caches in quantised formats.

use super::sized::{assert_layout, read_sized, sized};
use super::views::kvl_view;
use crate::error::{Error, Result, ensure};
use crate::format::CacheFormat;
use crate::view::{RawAffine, RawCacheView, RawView};
use crate::{Affine, Integers, Nibbles, Zeros};

/// Where the scales of a cache lie, for formats that have scales. Start from `KVL_CACHE_SCALES_INIT`.
///
/// `KVL_FORMAT_INT8` has one scale per token and head, f32 or f16: a view [batch, seq, kv_heads, 1] whose first two axes are those
/// of the units (so that a layout applies to both), with strides of its own. Attention only reads scales; `kvl_kv_write` and the
/// functions that copy tokens write them too.
///
/// `KVL_FORMAT_FP8_E4M3` and `KVL_FORMAT_FP8_E5M2` have static scales, which every function reads and none writes: a view of the same
/// shape whose strides are 0 along the first two axes, and along kv_heads too where one scale serves the tensor. Absent, they are 1.
/// Every call on the same units must be given the same scales. Views of a call may share them.
/// `KVL_FORMAT_AFFINE8` and `KVL_FORMAT_AFFINE4` have scales of f32, f16 or bf16, and perhaps zero points, whose shape says which elements
/// share them: each axis has 1 entry, or as many as the units, or along seq and dim a number that divides that of the units, so that
/// as many neighbours share each. A scale for each token and head is [batch, seq, kv_heads, 1], one for each channel
/// [1, 1, kv_heads, dim], one for each channel and 32 tokens [batch, seq / 32, kv_heads, dim]. Scales may lie between the units. Writes
/// compute scales and zero points, which then belong to one sequence or page and one head, and tokens that share them are written in
/// one call; with `KVL_AFFINE_FIXED` they read them. Moved one by one, tokens that come to share scales are quantised again, and those
/// that go to other fixed scales too.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_cache_scales {
    /// `sizeof(kvl_cache_scales)`.
    pub struct_size: usize,
    /// The scales of the keys; absent if their format has none, or static ones of 1.
    pub k: kvl_view,
    /// The scales of the values; absent if their format has none, or static ones of 1.
    pub v: kvl_view,
    /// The zero points of the keys, in the shape of their scales, for affine formats; absent for none. Its `dtype` is a `kvl_dtype`,
    /// `KVL_DTYPE_U8` or `KVL_DTYPE_I8`.
    pub k_zeros: kvl_view,
    /// The zero points of the values.
    pub v_zeros: kvl_view,
    /// How the integers of the keys lie and what zero points are, for affine formats: a sum of `KVL_AFFINE_*`. Else 0.
    pub k_affine: kvl_affine,
    /// The same for the values.
    pub v_affine: kvl_affine,
}

sized!(kvl_cache_scales[k_zeros]);
assert_layout!(kvl_cache_scales, 368, struct_size: 0, k: 8, v: 96, k_zeros: 184, v_zeros: 272, k_affine: 360, v_affine: 364);

/// What `kvl_cache_scales.k_affine` and `v_affine` are sums of. 0 stands for unsigned integers, the even one of two elements in the low
/// half of a byte, and zero points that are subtracted from integers: an element is (q - zero) * scale, each operation rounded to f32.
pub type kvl_affine = u32;
/// Integers from -128 to 127, or from -8 to 7, in two's complement.
pub const KVL_AFFINE_SIGNED: u32 = 1;
/// The same integers, each of which lies as the unsigned one that is 128, or 8, greater.
pub const KVL_AFFINE_OFFSET: u32 = 2;
/// The even one of two elements lies in the high half of a byte.
pub const KVL_AFFINE_HIGH_FIRST: u32 = 4;
/// Zero points are floats that are added to products: q * scale + zero.
pub const KVL_AFFINE_MINIMUM: u32 = 8;
/// Zero points are floats that are subtracted from products: q * scale - zero.
pub const KVL_AFFINE_SHIFT: u32 = 16;
/// Writes read scales and zero points instead of computing them.
pub const KVL_AFFINE_FIXED: u32 = 32;

/// The scales of keys or of values, as a call gives them.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    scales: kvl_view,
    zeros: kvl_view,
    affine: kvl_affine,
}

impl Scales {
    const ABSENT: Self = Self { scales: kvl_view::ABSENT, zeros: kvl_view::ABSENT, affine: 0 };

    pub(super) fn is_absent(&self) -> bool {
        self.scales.is_absent() && self.zeros.is_absent() && self.affine == 0
    }
}

/// The scales of keys and of values at `from`; both are absent if it is null.
///
/// # Safety
/// `from` is null or points to what the header describes.
pub(super) unsafe fn read_scales(from: *const kvl_cache_scales) -> Result<[Scales; 2]> {
    if from.is_null() {
        return Ok([Scales::ABSENT; 2]);
    }
    // SAFETY: the caller's.
    let kvl_cache_scales { k, v, k_zeros, v_zeros, k_affine, v_affine, .. } = unsafe { read_sized(from) }?;
    Ok([(k, k_zeros, k_affine), (v, v_zeros, v_affine)].map(|(scales, zeros, affine)| Scales { scales, zeros, affine }))
}

/// The units of a cache with its scales; `name` is that of the scales. Whether the format has any is checked by the operation.
#[inline(always)]
pub(super) fn with_scales(units: RawView<CacheFormat>, name: &str, from: &Scales) -> Result<RawCacheView> {
    if from.is_absent() { Ok(RawCacheView { units, scales: None, affine: None }) } else { scaled(units, name, from) }
}

/// [`with_scales`] of some.
fn scaled(units: RawView<CacheFormat>, name: &str, from: &Scales) -> Result<RawCacheView> {
    let Scales { scales, zeros, affine } = from;
    let view = if scales.is_absent() { None } else { Some(scales.raw(name)?) };
    if let (true, Some(view)) = (units.dtype.is_affine(), view) {
        return described(units, name, view, from);
    }
    ensure!(
        zeros.is_absent() && *affine == 0,
        InvalidValue,
        "{name} have zero points or k_affine, v_affine = {affine:#x}, but are those of {}",
        units.dtype
    );
    Ok(RawCacheView { units, scales: view, affine: None })
}

/// The units of an affine format with what describes them.
#[cold]
fn described(units: RawView<CacheFormat>, name: &str, scales: RawView, from: &Scales) -> Result<RawCacheView> {
    let (zeros, flags, cache) = (&from.zeros, from.affine, name.trim_start_matches("the scales of "));
    let has = |flag: u32| flags & flag != 0;
    let known = 2 * KVL_AFFINE_FIXED - 1;
    ensure!(flags & !known == 0, InvalidEnum, "{name} have unknown bits {:#x} of KVL_AFFINE", flags & !known);
    for (one, other) in [(KVL_AFFINE_SIGNED, KVL_AFFINE_OFFSET), (KVL_AFFINE_MINIMUM, KVL_AFFINE_SHIFT)] {
        ensure!(
            !has(one) || !has(other),
            InvalidEnum,
            "{name} have the bits {one} and {other} of KVL_AFFINE, which exclude each other"
        );
    }
    let integers = match (has(KVL_AFFINE_SIGNED), has(KVL_AFFINE_OFFSET)) {
        (true, _) => Integers::Signed,
        (_, true) => Integers::Offset,
        _ => Integers::Unsigned,
    };
    let kind = match (has(KVL_AFFINE_MINIMUM), has(KVL_AFFINE_SHIFT)) {
        (true, _) => Zeros::Minimum,
        (_, true) => Zeros::Shift,
        _ => Zeros::Point,
    };
    let nibbles = if has(KVL_AFFINE_HIGH_FIRST) { Nibbles::HighFirst } else { Nibbles::LowFirst };
    let of_cache = |e: Error| {
        let what = e.message().trim_start_matches("zeros").to_owned();
        Error::new(e.status(), format!("the zero points of {cache}{what}"))
    };
    let zeros = if zeros.is_absent() { None } else { Some(zeros.zeros("zeros").map_err(of_cache)?) };
    let of = Affine::new(integers).nibbles(nibbles).zeros(kind);
    let units = RawCacheView { units, scales: None, affine: None };
    units.with_affine(cache, RawAffine::new(of, scales, zeros, has(KVL_AFFINE_FIXED)))
}
