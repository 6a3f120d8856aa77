//! What the registry says of kernels.

use super::arguments::enumeration;
use super::format::kvl_format;
use super::guard::{guard, guard_value};
use super::isa::kvl_isa;
use super::sized::{assert_layout, read_sized, sized, write_sized};
use super::status::kvl_status;
use crate::error::{Result, fail};
use crate::{Op, Precision};
use std::ffi::c_char;

/// An operation. Kernels are chosen by operation and element types.
pub type kvl_op = i32;
/// Cosines and sines of RoPE angles. Types: `KVL_FORMAT_F32` twice.
pub const KVL_OP_ROPE_ANGLES: i32 = 0;
/// RoPE, alone or on the way into a cache. Types: source, target.
pub const KVL_OP_ROPE: i32 = 1;
/// The cache write. Types: source, target.
pub const KVL_OP_KV_WRITE: i32 = 2;
/// The explicit repeat of KV heads. Types: one type twice.
pub const KVL_OP_REPEAT_KV: i32 = 3;
/// Attention over a cache. Types: the format of K or of V, twice. Queries and outputs may have any type.
pub const KVL_OP_ATTENTION: i32 = 4;
/// The merge of attention states. Types: one type twice.
pub const KVL_OP_MERGE_STATES: i32 = 5;
/// RMS norm of heads, alone or on the way to RoPE or into a cache. Types: source, target.
pub const KVL_OP_RMS_NORM: i32 = 6;
/// The read of a quantised cache into plain tensors. Types: source format, target.
pub const KVL_OP_KV_READ: i32 = 7;
/// The Hadamard rotation of heads, alone or on the way into a cache or out of it. Types: source, target.
pub const KVL_OP_HADAMARD: i32 = 8;

/// The precision of attention, for levels that have kernels of more than one.
pub type kvl_precision = i32;
/// The fastest kernel. Over a bf16 cache, softmax weights are rounded to bf16 at `KVL_ISA_AVX512_BF16`, `KVL_ISA_AMX` and
/// `KVL_ISA_NEON_BF16`: an error of at most 2^-8 of the largest visible value. `KVL_ISA_AVX512_BF16` and `KVL_ISA_NEON_BF16` also take
/// queries in f32 to 16 significant bits, so that a logit errs by at most 2^-16 of the sum of the magnitudes of its products.
pub const KVL_PRECISION_DEFAULT: i32 = 0;
/// What f32 arithmetic gives: queries are taken whole, and weights have at least 16 significant bits.
pub const KVL_PRECISION_HIGH: i32 = 1;
/// Over keys in int8 or in blocks, queries are rounded to int8, with a scale a row, and products are added up as integers, at the
/// levels that have kernels for it (`KVL_ISA_AVX_VNNI`, `KVL_ISA_AVX512_VNNI`, `KVL_ISA_NEON_DOTPROD`, those that include the last two,
/// and over blocks of four and five bits `KVL_ISA_AVX2`): of a logit's error, at most half of a row's scale times the sum of the
/// magnitudes of the key's elements is due to it. With four query heads per KV head and more, `KVL_ISA_AVX512_VNNI` also rounds the
/// weights of values in int8 and in blocks, to 65534ths of the largest among 64 keys (in blocks, of the largest weight times the
/// largest factor): an error of at most 2^-10 of the largest magnitude of their elements (2^-9 in q4_1 and q5_1). Where there is no
/// such kernel, this is `KVL_PRECISION_DEFAULT`.
pub const KVL_PRECISION_INTEGER: i32 = 2;

/// A kernel of the library. Start from `KVL_KERNEL_INFO_INIT`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_kernel_info {
    /// `sizeof(kvl_kernel_info)`.
    pub struct_size: usize,
    /// `<op>_<types>_<isa>`; a constant.
    pub name: *const c_char,
    /// Its operation.
    pub op: kvl_op,
    /// The first of its types; see `kvl_op`.
    pub src: kvl_format,
    /// The second of its types.
    pub dst: kvl_format,
    /// Its level.
    pub isa: kvl_isa,
    /// 1 if this machine can run it, 0 if not.
    pub available: i32,
    /// The largest error against exact arithmetic on the same inputs with f32 output, as a fraction of the largest
    /// magnitude that enters the result (of V in attention). Rounding to a narrower output type adds to it. In
    /// attention it grows in proportion with logits beyond 32 (ALiBi and bias included), since f32 rounds them to 2^-24
    /// of their magnitude.
    pub max_error: f32,
}

sized!(kvl_kernel_info);
assert_layout!(
    kvl_kernel_info, 40,
    struct_size: 0, name: 8, op: 16, src: 20, dst: 24, isa: 28, available: 32, max_error: 36,
);

/// The number of kernels in the library, of all levels that it was built with.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_kernel_count() -> usize {
    guard_value(0, || crate::kernels().count())
}

/// Describes kernel `index`, which is less than `kvl_kernel_count()`. The order may change between versions.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: null, an unknown `info->struct_size` and an index past the end are errors, and `info` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_kernel_info_at(index: usize, info: *mut kvl_kernel_info) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let size = unsafe { read_sized(info.cast_const()) }?.struct_size;
        let Some(kernel) = crate::kernels().nth(index) else {
            fail!(OutOfRange, "there is no kernel {index}, only {}", crate::kernels().count());
        };
        let filled = kvl_kernel_info {
            struct_size: size,
            name: kernel.c_name.as_ptr(),
            op: kernel.op as kvl_op,
            src: kernel.src as kvl_format,
            dst: kernel.dst as kvl_format,
            isa: kernel.isa as kvl_isa,
            available: i32::from(kernel.isa.is_available()),
            max_error: kernel.max_error,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(info, filled) };
        Ok(())
    })
}

pub(super) fn parse_op(name: &str, value: kvl_op) -> Result<Op> {
    enumeration("kvl_op", name, value, Op::from_u32)
}

pub(super) fn parse_precision(name: &str, value: kvl_precision) -> Result<Precision> {
    enumeration("kvl_precision", name, value, Precision::from_u32)
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    assert!(KVL_OP_ROPE_ANGLES == Op::RopeAngles as i32 && KVL_OP_ROPE == Op::Rope as i32);
    assert!(KVL_OP_KV_WRITE == Op::KvWrite as i32 && KVL_OP_REPEAT_KV == Op::RepeatKv as i32);
    assert!(KVL_OP_ATTENTION == Op::Attention as i32 && KVL_OP_MERGE_STATES == Op::MergeStates as i32);
    assert!(KVL_OP_RMS_NORM == Op::RmsNorm as i32 && KVL_OP_KV_READ == Op::KvRead as i32);
    assert!(KVL_OP_HADAMARD == Op::Hadamard as i32 && Op::ALL.len() == 9);
    assert!(KVL_PRECISION_DEFAULT == Precision::Default as i32 && KVL_PRECISION_HIGH == Precision::High as i32);
    assert!(KVL_PRECISION_INTEGER == Precision::Integer as i32 && Precision::ALL.len() == 3);
};

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    #[test]
    fn every_kernel_has_a_c_name() {
        for kernel in crate::kernels() {
            // SAFETY: a constant of the library.
            assert_eq!(unsafe { CStr::from_ptr(kernel.c_name.as_ptr()) }.to_str().unwrap(), kernel.name);
        }
    }
}
