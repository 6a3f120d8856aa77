//! Formats of caches.

use super::arguments::enumeration;
use crate::error::{Result, fail};
use crate::format::CacheFormat;

/// What the keys or the values of a cache are stored as. The first three values are those of `kvl_dtype`.
pub type kvl_format = i32;
/// Elements of `KVL_DTYPE_F32`.
pub const KVL_FORMAT_F32: i32 = 0;
/// Elements of `KVL_DTYPE_F16`.
pub const KVL_FORMAT_F16: i32 = 1;
/// Elements of `KVL_DTYPE_BF16`.
pub const KVL_FORMAT_BF16: i32 = 2;
/// Signed bytes from -127 to 127 with one scale per token and head: an element is its byte times that scale. The scales lie in a
/// tensor of their own; see `kvl_cache_scales`. Scales that a write computes are rounded to their type: to nearest, or up if they are
/// subnormal there, so that no element is clipped (f16 scales end at 65504). A head with NaN or infinity has the scale NaN.
pub const KVL_FORMAT_INT8: i32 = 3;
/// A byte per element in the eight-bit float E4M3 without infinities (`e4m3fn`), times a static scale, f32 or f16, of its head or of
/// the tensor: see `kvl_cache_scales`. Writes divide by the scale and round to nearest, ties to even. Numbers above 448 in magnitude,
/// infinities included, become 448 with their sign, and NaN becomes 0x7f.
pub const KVL_FORMAT_FP8_E4M3: i32 = 4;
/// The same in E5M2, the upper half of an f16, with numbers up to 57344. It has infinities, but writes make none: these become 57344
/// too.
pub const KVL_FORMAT_FP8_E5M2: i32 = 5;
/// Units of 32 elements, the blocks of ggml's type of the same name, in 34 bytes: an f16 factor d, then 32 signed bytes q. Element i is
/// d q. Of this and the next five formats: a head has a multiple of 32 elements, whose units lie one after the other; `shape` counts
/// elements, `strides` count units, and that of dim is 1; data is aligned to 2 bytes. Products and sums are rounded to f32. Writes
/// give the bytes of ggml's reference quantiser; a unit with NaN or infinity reads as NaN.
pub const KVL_FORMAT_Q8_0: i32 = 6;
/// 18 bytes: an f16 d, then 16 bytes whose low halves are q of elements 0 to 15, the high ones of 16 to 31. Element i is d (q - 8).
pub const KVL_FORMAT_Q4_0: i32 = 7;
/// 20 bytes: f16 d, f16 m, 16 bytes as in `KVL_FORMAT_Q4_0`. Element i is d q + m.
pub const KVL_FORMAT_Q4_1: i32 = 8;
/// 22 bytes: f16 d, 4 bytes of which bit i (from the lowest bit of the first byte on) is the fifth bit of q of element i, 16 bytes as in
/// `KVL_FORMAT_Q4_0`. Element i is d (q - 16).
pub const KVL_FORMAT_Q5_0: i32 = 9;
/// 24 bytes: f16 d, f16 m, fifth bits and 16 bytes as in `KVL_FORMAT_Q5_0`. Element i is d q + m.
pub const KVL_FORMAT_Q5_1: i32 = 10;
/// 18 bytes as in `KVL_FORMAT_Q4_0`. Element i is d times value q of the list -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38,
/// 53, 69, 89, 113.
pub const KVL_FORMAT_IQ4_NL: i32 = 11;

/// A byte per element, an integer, of whose group `kvl_cache_scales` gives a scale and perhaps a zero point, and says how it lies. Of this
/// and the next format, units lie one after the other in a head: the stride of dim is 1.
pub const KVL_FORMAT_AFFINE8: i32 = 12;
/// The same in four bits: a unit is a byte of two elements, of which a head has an even number. `shape` counts elements, `strides` count
/// bytes.
pub const KVL_FORMAT_AFFINE4: i32 = 13;

pub(super) fn parse_format(name: &str, value: kvl_format) -> Result<CacheFormat> {
    enumeration("kvl_format", name, value, CacheFormat::from_u32)
}

/// Like [`parse_format`], for the field of a view: `name` is the view's, since a call that computes makes no string in vain.
#[inline(always)]
pub(super) fn unit_format(name: &str, value: i32) -> Result<CacheFormat> {
    match u32::try_from(value).ok().and_then(CacheFormat::from_u32) {
        Some(format) => Ok(format),
        None => fail!(InvalidEnum, "{name}.dtype is {value}, which is no kvl_format"),
    }
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    use super::dtype::{KVL_DTYPE_BF16, KVL_DTYPE_F16, KVL_DTYPE_F32};
    assert!(KVL_FORMAT_F32 == CacheFormat::F32 as i32 && KVL_FORMAT_F32 == KVL_DTYPE_F32);
    assert!(KVL_FORMAT_F16 == CacheFormat::F16 as i32 && KVL_FORMAT_F16 == KVL_DTYPE_F16);
    assert!(KVL_FORMAT_BF16 == CacheFormat::Bf16 as i32 && KVL_FORMAT_BF16 == KVL_DTYPE_BF16);
    assert!(KVL_FORMAT_INT8 == CacheFormat::Int8 as i32);
    assert!(KVL_FORMAT_FP8_E4M3 == CacheFormat::Fp8E4m3 as i32 && KVL_FORMAT_FP8_E5M2 == CacheFormat::Fp8E5m2 as i32);
    assert!(KVL_FORMAT_Q8_0 == CacheFormat::Q8_0 as i32 && KVL_FORMAT_Q4_0 == CacheFormat::Q4_0 as i32);
    assert!(KVL_FORMAT_Q4_1 == CacheFormat::Q4_1 as i32 && KVL_FORMAT_Q5_0 == CacheFormat::Q5_0 as i32);
    assert!(KVL_FORMAT_Q5_1 == CacheFormat::Q5_1 as i32 && KVL_FORMAT_IQ4_NL == CacheFormat::Iq4Nl as i32);
    assert!(KVL_FORMAT_AFFINE8 == CacheFormat::Affine8 as i32 && KVL_FORMAT_AFFINE4 == CacheFormat::Affine4 as i32);
    assert!(CacheFormat::ALL.len() == 14);
};
