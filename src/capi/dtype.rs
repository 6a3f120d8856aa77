//! Element types.

use crate::dtype::DType;
use crate::error::{Result, fail};

/// The type of the elements of a tensor.
pub type kvl_dtype = i32;
/// IEEE 754 binary32.
pub const KVL_DTYPE_F32: i32 = 0;
/// IEEE 754 binary16.
pub const KVL_DTYPE_F16: i32 = 1;
/// bfloat16: the upper half of a binary32.
pub const KVL_DTYPE_BF16: i32 = 2;
/// Unsigned bytes: zero points of affine caches alone.
pub const KVL_DTYPE_U8: i32 = 16;
/// Signed bytes: the same.
pub const KVL_DTYPE_I8: i32 = 17;

/// The type in the field of a view: `name` is the view's, since a call that computes makes no string in vain.
#[inline(always)]
pub(super) fn element_type(name: &str, value: kvl_dtype) -> Result<DType> {
    match u32::try_from(value).ok().and_then(DType::from_u32) {
        Some(dtype) => Ok(dtype),
        None => fail!(InvalidEnum, "{name}.dtype is {value}, which is no kvl_dtype"),
    }
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    assert!(
        KVL_DTYPE_F32 == DType::F32 as i32
            && KVL_DTYPE_F16 == DType::F16 as i32
            && KVL_DTYPE_BF16 == DType::Bf16 as i32
    );
    assert!(DType::ALL.len() == 3);
};
