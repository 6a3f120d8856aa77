//! The context: which kernel serves each operation.

use super::format::{kvl_format, parse_format};
use super::guard::{guard, guard_value};
use super::isa::{KVL_ISA_BEST, kvl_isa, parse_isa};
use super::kernels::{kvl_op, kvl_precision, parse_op, parse_precision};
use super::layout::kvl_packing;
use super::sized::{assert_layout, read_sized, sized};
use super::status::kvl_status;
use crate::context::Context;
use crate::error::{Result, ensure, fail};
use std::ffi::c_char;

/// The kernels that were chosen for the machine. Made by `kvl_context_create`, and immutable.
pub struct kvl_context {
    pub(super) context: crate::Context,
}

/// Options of a context. Start from `KVL_CONTEXT_PARAMS_INIT`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_context_params {
    /// `sizeof(kvl_context_params)`.
    pub struct_size: usize,
    /// The highest level to use, or 0 (`KVL_ISA_BEST`) for no limit. The environment variable `KVLANE_MAX_ISA`
    /// (`scalar`, `avx2`, ...) can lower it further. Neither can raise the level.
    pub max_isa: kvl_isa,
    /// A sum of `KVL_CONTEXT_FLAG_*`.
    pub flags: kvl_context_flag,
}

sized!(kvl_context_params);
assert_layout!(kvl_context_params, 16, struct_size: 0, max_isa: 8, flags: 12);

/// Options of a context that are on or off.
pub type kvl_context_flag = u32;
/// Operations that convert to f16 saturate: a number beyond 65504, the largest finite f16, becomes 65504 with its sign.
/// Infinities do too, and NaN stays NaN. Without this flag such a number becomes an infinity, as IEEE 754 rounds it, and
/// the softmax of a row that meets it in the cache becomes NaN. The flag holds for `kvl_rope`, `kvl_rms_norm`,
/// `kvl_rms_norm_rope`, `kvl_kv_write` and the `kvl_cache_...` functions that convert or rotate keys and values. What is
/// f16 already is copied with all its bits. Outputs of attention and of `kvl_merge_states` are means of values, and are
/// rounded.
pub const KVL_CONTEXT_FLAG_SATURATE_F16: u32 = 1;

/// Makes a context: detects the CPU and chooses a kernel for each operation and type. It is released with
/// `kvl_context_destroy`.
///
/// `params` may be null for the defaults: the best level of the machine, lowered by `KVLANE_MAX_ISA` if that is set.
///
/// Thread safety: may be called from any thread. It reads the environment, which no other thread may change at the same
/// time.
/// Bad input: null, an unknown `struct_size`, an unknown flag, and a number or name (in `KVLANE_MAX_ISA`) that is no level
/// or one of another architecture are errors, and `*context` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_create(
    params: *const kvl_context_params,
    context: *mut *mut kvl_context,
) -> kvl_status {
    guard(|| {
        let (mut max_isa, mut flags) = (KVL_ISA_BEST, 0);
        if !params.is_null() {
            // SAFETY: the caller's promise.
            let params = unsafe { read_sized(params) }?;
            (max_isa, flags) = (params.max_isa, params.flags);
            let unknown = flags & !KVL_CONTEXT_FLAG_SATURATE_F16;
            ensure!(unknown == 0, InvalidEnum, "kvl_context_params.flags has unknown bits {unknown:#x}");
        }
        ensure!(!context.is_null(), NullPointer, "the pointer context is null");
        let made = match max_isa {
            KVL_ISA_BEST => Context::new()?,
            level => Context::with_max_isa(parse_isa("kvl_context_params.max_isa", level)?)?,
        };
        let made = made.saturate_f16(flags & KVL_CONTEXT_FLAG_SATURATE_F16 != 0);
        // SAFETY: not null, and the caller's to write.
        unsafe { context.write(Box::into_raw(Box::new(kvl_context { context: made }))) };
        Ok(())
    })
}

/// Releases a context; null is allowed.
///
/// Thread safety: no other call may use the context at the same time or afterwards.
/// Bad input: a pointer that is not from `kvl_context_create`, or that was released before, is undefined behaviour.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_destroy(context: *mut kvl_context) {
    guard_value((), || {
        if !context.is_null() {
            // SAFETY: from `kvl_context_create`, by the caller's promise, and not released before.
            drop(unsafe { Box::from_raw(context) });
        }
    });
}

/// The level of a context.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null is an error, and `*isa` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_isa(context: *const kvl_context, isa: *mut kvl_isa) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        ensure!(!isa.is_null(), NullPointer, "the pointer isa is null");
        // SAFETY: not null, and the caller's to write.
        unsafe { isa.write(context.isa() as kvl_isa) };
        Ok(())
    })
}

/// The name of the kernel that serves an operation from one type to another, such as "rope_f32_bf16_avx512"; a constant.
/// `kvl_op` states which two types an operation has. The name is that for `KVL_PRECISION_DEFAULT`.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null, a number that is no operation or format, and types without a kernel are errors, and `*name` is not
/// changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_kernel_name(
    context: *const kvl_context,
    op: kvl_op,
    src: kvl_format,
    dst: kvl_format,
    name: *mut *const c_char,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        ensure!(!name.is_null(), NullPointer, "the pointer name is null");
        let (op, src, dst) = (parse_op("op", op)?, parse_format("src", src)?, parse_format("dst", dst)?);
        let Some(kernel) = context.kernel(op, src, dst) else {
            fail!(DType, "there is no kernel for {} from {src} to {dst}", op.name());
        };
        // SAFETY: not null, and the caller's to write.
        unsafe { name.write(kernel.c_name.as_ptr()) };
        Ok(())
    })
}

/// The names of the kernels that serve attention over K of one format and V of another with a precision, such as
/// "attention_bf16_high_amx"; constants. `*k_name` is the kernel whose way with keys is used, `*v_name` the one whose way with
/// values is; they are the same where the formats are. Most kernels serve both precisions. `kvl_kernel_info` states the error
/// bound of a kernel.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null and a number that is no format or precision are errors, and neither name is changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_attention_kernel_names(
    context: *const kvl_context,
    k_format: kvl_format,
    v_format: kvl_format,
    precision: kvl_precision,
    k_name: *mut *const c_char,
    v_name: *mut *const c_char,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        ensure!(!k_name.is_null(), NullPointer, "the pointer k_name is null");
        ensure!(!v_name.is_null(), NullPointer, "the pointer v_name is null");
        let (k, v) = (parse_format("k_format", k_format)?, parse_format("v_format", v_format)?);
        let [keys, values] = context.attention_kernels(k, v, parse_precision("precision", precision)?);
        // SAFETY: not null, and the caller's to write.
        unsafe {
            k_name.write(keys.c_name.as_ptr());
            v_name.write(values.c_name.as_ptr());
        }
        Ok(())
    })
}

/// The packing of V that suits the attention kernels of a context best: `KVL_PACKING_ROW_PAIRS` where they multiply
/// tiles of bf16, else `KVL_PACKING_ROWS`. Both work with every kernel, but values of a format with scales are never packed.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null and a number that is no format are errors, and `*packing` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_v_packing(
    context: *const kvl_context,
    v_format: kvl_format,
    packing: *mut kvl_packing,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        ensure!(!packing.is_null(), NullPointer, "the pointer packing is null");
        let best = context.v_packing(parse_format("v_format", v_format)?);
        // SAFETY: not null, and the caller's to write.
        unsafe { packing.write(best as kvl_packing) };
        Ok(())
    })
}

/// # Safety
/// `context` is null or from `kvl_context_create`, and lives as long as the borrow.
pub(super) unsafe fn borrow<'a>(context: *const kvl_context) -> Result<&'a Context> {
    ensure!(!context.is_null(), NullPointer, "the pointer context is null");
    // SAFETY: the caller's.
    Ok(unsafe { &(*context).context })
}
