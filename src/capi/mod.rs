//! The C ABI: every `kvl_*` symbol, and nothing else that is exported.
//!
//! An export does four things: it enters the guard (`guard`), copies and checks what C passes (null, `struct_size`, ranges
//! of enumerations, signs of sizes: `types`), wraps the caller's threads (`runner`), and calls the raw form of an operation,
//! which validates everything else. It knows no kernel, allocates nothing in a call that computes, and has no state but the
//! last error of each thread.
//!
//! Comments on the exports are the header's: cbindgen copies them (`build.rs`, feature `regen-header`). Each ends with
//! a line on thread safety and one on what bad input does. The header is committed as `include/kvlane.h`; a C++17
//! layer over it is `include/kvlane.hpp`; the programs that hold the ABI to its word are in `ffi-tests`.
#![allow(non_camel_case_types)]

mod cache;
mod chunks;
mod guard;
mod plan;
mod runner;
mod shard;
mod types;

use crate::context::Context;
use crate::error::{Result, ensure, fail};
use crate::isa::Isa;
use crate::kernels::Op;
use crate::layout::Packing;
use crate::ops::attention::{
    MAX_HEAD_DIM, Memory, RawAttention, attention_raw, attention_shapes, attention_workspace_size, fill_alibi_slopes,
};
use crate::ops::merge::{MAX_STATES, merge_states_raw};
use crate::ops::norm::rms_norm_raw;
use crate::ops::pack::{pack_row_pairs_raw, unpack_row_pairs_raw};
use crate::ops::prefix::{attention_with_prefix_raw, prefix_workspace_size};
use crate::ops::repeat::repeat_kv_raw;
use crate::ops::rope::{
    Positions, RawAngles, RawRope, RopeFrequencies, RopeScaling, check_frequencies, check_rotary_dim, fill_table,
    rope_raw,
};
use crate::ops::write::{Destination, RawWrite, kv_write_raw};
use crate::parallel::Runner;
use crate::view::{BATCH, DIM, HEADS, RawView, SEQ};
use guard::{guard, guard_value};
use runner::CallerRunner;
use std::ffi::{CStr, c_char, c_void};
use types::*;

// ---------------------------------------------------------------------------------------------------------------------
// The library

/// The version of the ABI that the library has: `major * 65536 + minor`, to compare with `KVL_ABI_VERSION`.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_abi_version() -> u32 {
    KVL_ABI_VERSION
}

/// The version of the library, such as "0.1.0"; a constant.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// A short description of a status; a constant.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: a number that is no status is "unknown status".
#[unsafe(no_mangle)]
pub extern "C" fn kvl_status_string(status: kvl_status) -> *const c_char {
    let text: &CStr = match status {
        KVL_OK => c"ok",
        KVL_ERR_NULL_POINTER => c"null pointer",
        KVL_ERR_STRUCT_SIZE => c"unknown struct_size",
        KVL_ERR_INVALID_ENUM => c"invalid enumeration value",
        KVL_ERR_INVALID_VALUE => c"invalid value",
        KVL_ERR_SHAPE => c"shapes do not fit",
        KVL_ERR_STRIDE => c"invalid strides",
        KVL_ERR_BOUNDS => c"view outside its buffer",
        KVL_ERR_CAPACITY => c"cache capacity exceeded",
        KVL_ERR_OUT_OF_RANGE => c"out of range",
        KVL_ERR_OVERLAP => c"overlapping memory",
        KVL_ERR_DUPLICATE_SLOT => c"slot written twice",
        KVL_ERR_DTYPE => c"element types do not fit",
        KVL_ERR_WORKSPACE => c"workspace too small or misaligned",
        KVL_ERR_UNSUPPORTED => c"not available on this machine",
        KVL_ERR_PARALLEL => c"parallel runner failed",
        KVL_ERR_INTERNAL => c"internal error",
        _ => c"unknown status",
    };
    text.as_ptr()
}

/// The sentence that belongs to the last status other than `KVL_OK` on the calling thread: which argument, and the numbers
/// that disagree. Empty if there was none. A successful call leaves it alone.
///
/// Copies at most `size` bytes, the terminating zero included, cutting what does not fit, and returns how many bytes the
/// whole sentence needs (at most 1024). `buffer` may be null to ask for that alone.
///
/// Thread safety: may be called from any thread at any time; every thread has its own sentence, and the one that
/// made a call gets its sentence even if the mistake showed on a worker thread.
/// Bad input: there is none, as long as `buffer` has `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_last_error(buffer: *mut c_char, size: usize) -> usize {
    // SAFETY: the caller's promise.
    guard_value(1, || unsafe { guard::copy_last_error(buffer.cast(), size) })
}

/// The name of a level, such as "avx2"; a constant.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: a number that is no level is "unknown", and `KVL_ISA_BEST` is "best".
#[unsafe(no_mangle)]
pub extern "C" fn kvl_isa_name(isa: kvl_isa) -> *const c_char {
    let text: &CStr = match isa {
        KVL_ISA_BEST => c"best",
        KVL_ISA_SCALAR => c"scalar",
        KVL_ISA_AVX2 => c"avx2",
        KVL_ISA_AVX512 => c"avx512",
        KVL_ISA_NEON => c"neon",
        KVL_ISA_AMX => c"amx",
        KVL_ISA_NEON_BF16 => c"neon_bf16",
        _ => c"unknown",
    };
    text.as_ptr()
}

/// 1 if this CPU and operating system can run kernels of a level, 0 if not. `KVL_ISA_BEST` is always available.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: a number that is no level is not available.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_isa_available(isa: kvl_isa) -> i32 {
    guard_value(0, || {
        let available = isa == KVL_ISA_BEST || types::isa("isa", isa).is_ok_and(Isa::is_available);
        i32::from(available)
    })
}

/// How many kernels the library has, of all levels that it was built with.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: there is none.
#[unsafe(no_mangle)]
pub extern "C" fn kvl_kernel_count() -> usize {
    guard_value(0, || crate::kernels::kernels().count())
}

/// Describes kernel `index`, 0 .. `kvl_kernel_count()`; the order may change from version to version.
///
/// Thread safety: may be called from any thread at any time.
/// Bad input: null, an unknown `info->struct_size` or an index past the end is an error, and `info` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_kernel_info_at(index: usize, info: *mut kvl_kernel_info) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let size = unsafe { read_sized(info.cast_const()) }?.struct_size;
        let Some(kernel) = crate::kernels::kernels().nth(index) else {
            fail!(OutOfRange, "there is no kernel {index}, only {}", crate::kernels::kernels().count());
        };
        let filled = kvl_kernel_info {
            struct_size: size,
            name: names::find(kernel.name),
            op: kernel.op as kvl_op,
            src: kernel.src as kvl_dtype,
            dst: kernel.dst as kvl_dtype,
            isa: kernel.isa as kvl_isa,
            available: i32::from(kernel.isa.is_available()),
            max_error: kernel.max_error,
        };
        // SAFETY: `size` is one that the struct has had, and the caller has that many bytes there.
        unsafe { std::ptr::copy_nonoverlapping((&raw const filled).cast::<u8>(), info.cast(), size) };
        Ok(())
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// The context

/// Makes a context: looks at the CPU and chooses a kernel for each operation and type.
///
/// `params` may be null for the defaults: the best level there is, lowered by `KVLANE_MAX_ISA` if that is set. The context
/// is released with `kvl_context_destroy`.
///
/// Thread safety: may be called from any thread; it reads the environment, so nobody may change that meanwhile.
/// Bad input: null, an unknown `struct_size`, a level that is none (also in `KVLANE_MAX_ISA`) or one of another architecture is
/// an error, and `*context` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_create(
    params: *const kvl_context_params,
    context: *mut *mut kvl_context,
) -> kvl_status {
    guard(|| {
        let mut max_isa = KVL_ISA_BEST;
        if !params.is_null() {
            // SAFETY: the caller's promise.
            let params = unsafe { read_sized(params) }?;
            reserved("kvl_context_params", params.reserved)?;
            max_isa = params.max_isa;
        }
        ensure!(!context.is_null(), NullPointer, "the pointer context is null");
        let made = match max_isa {
            KVL_ISA_BEST => Context::new()?,
            level => Context::with_max_isa(isa("kvl_context_params.max_isa", level)?)?,
        };
        // SAFETY: not null, and the caller's to write.
        unsafe { context.write(Box::into_raw(Box::new(kvl_context { context: made }))) };
        Ok(())
    })
}

/// Releases a context; null is allowed.
///
/// Thread safety: no other call may use the context meanwhile or afterwards.
/// Bad input: a pointer that is not from `kvl_context_create`, or one that was released already, is undefined behaviour.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_destroy(context: *mut kvl_context) {
    guard_value((), || {
        if !context.is_null() {
            // SAFETY: from `kvl_context_create`, by the caller's promise, and not released before.
            drop(unsafe { Box::from_raw(context) });
        }
    });
}

/// The level that a context uses.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null is an error, and `*isa` is not touched.
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

/// The name of the kernel that serves an operation, such as "attention_bf16_avx512"; a constant of the library. Which two
/// types an operation has is said at `kvl_op`.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null, numbers that are no operation or type, or types that no kernel has is an error, and `*name` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_kernel_name(
    context: *const kvl_context,
    op: kvl_op,
    src: kvl_dtype,
    dst: kvl_dtype,
    name: *mut *const c_char,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        ensure!(!name.is_null(), NullPointer, "the pointer name is null");
        let (op, src, dst) = (types::op("op", op)?, dtype("src", src)?, dtype("dst", dst)?);
        let Some(kernel) = context.kernel(op, src, dst) else {
            fail!(DType, "there is no kernel for {} from {src} to {dst}", op.name());
        };
        // SAFETY: not null, and the caller's to write.
        unsafe { name.write(names::find(kernel.name)) };
        Ok(())
    })
}

/// The name of the kernel that serves attention over K and V of a type with a precision, such as
/// "attention_bf16_high_amx"; a constant of the library. `kvl_context_kernel_name` tells that of `KVL_PRECISION_DEFAULT`; most
/// kernels serve both. What precision a kernel has is `max_error` in `kvl_kernel_info`. Since ABI version 2.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null or numbers that are no type or precision is an error, and `*name` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_attention_kernel_name(
    context: *const kvl_context,
    kv: kvl_dtype,
    precision: kvl_precision,
    name: *mut *const c_char,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        ensure!(!name.is_null(), NullPointer, "the pointer name is null");
        let (kv, precision) = (dtype("kv", kv)?, types::precision("precision", precision)?);
        let Some(kernel) = context.kernel_for(Op::Attention, kv, kv, precision) else {
            fail!(DType, "there is no kernel for attention over {kv}");
        };
        // SAFETY: not null, and the caller's to write.
        unsafe { name.write(names::find(kernel.name)) };
        Ok(())
    })
}

/// How values of a type are best packed for the attention kernels in use: `KVL_PACK_ROW_PAIRS` where tiles of bf16 are
/// multiplied, else `KVL_PACK_ROWS`. Since ABI version 3.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null or a number that is no type is an error, and `*packing` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_v_packing(
    context: *const kvl_context,
    dtype: kvl_dtype,
    packing: *mut kvl_packing,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        ensure!(!packing.is_null(), NullPointer, "the pointer packing is null");
        let best = context.v_packing(types::dtype("dtype", dtype)?);
        // SAFETY: not null, and the caller's to write.
        unsafe { packing.write(best as kvl_packing) };
        Ok(())
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads

/// Makes a pool of threads, for callers that have none; 0 threads are as many as the machine runs at once. It is released
/// with `kvl_thread_pool_destroy`.
///
/// Thread safety: may be called from any thread.
/// Bad input: null is an error, and so is a library built without the feature `rayon` (`KVL_ERR_UNSUPPORTED`); `*pool` is not
/// touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_thread_pool_create(num_threads: usize, pool: *mut *mut kvl_thread_pool) -> kvl_status {
    guard(|| {
        ensure!(!pool.is_null(), NullPointer, "the pointer pool is null");
        ensure!(num_threads <= 4096, InvalidValue, "num_threads is {num_threads}, more than 4096");
        #[cfg(not(feature = "rayon"))]
        fail!(Unsupported, "this library was built without the feature rayon");
        #[cfg(feature = "rayon")]
        {
            let made = kvl_thread_pool { pool: runner::Pool::new(num_threads)? };
            // SAFETY: not null, and the caller's to write.
            unsafe { pool.write(Box::into_raw(Box::new(made))) };
            Ok(())
        }
    })
}

/// Ends the threads of a pool and releases it; null is allowed. Not to be called from one of its own threads.
///
/// Thread safety: no call may use the pool, or a runner from it, meanwhile or afterwards.
/// Bad input: a pointer that is not from `kvl_thread_pool_create`, or one that was released already, is undefined behaviour.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_thread_pool_destroy(pool: *mut kvl_thread_pool) {
    guard_value((), || {
        if !pool.is_null() {
            // SAFETY: from `kvl_thread_pool_create`, by the caller's promise, and not released before.
            drop(unsafe { Box::from_raw(pool) });
        }
    });
}

/// Fills a runner that uses a pool, as long as the pool lives.
///
/// Thread safety: may be called from any number of threads at once; and so may operations with the runner, which then share
/// the pool.
/// Bad input: null or an unknown `runner->struct_size` is an error, and `runner` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_thread_pool_runner(
    pool: *const kvl_thread_pool,
    runner: *mut kvl_parallel_runner,
) -> kvl_status {
    guard(|| {
        ensure!(!pool.is_null(), NullPointer, "the pointer pool is null");
        // SAFETY: the caller's promise.
        let size = unsafe { read_sized(runner.cast_const()) }?.struct_size;
        #[cfg(not(feature = "rayon"))]
        fail!(
            Unsupported,
            "this library was built without the feature rayon, so {size} bytes at runner stay as they are"
        );
        #[cfg(feature = "rayon")]
        {
            // SAFETY: not null, and a pool by the caller's promise.
            let filled = kvl_parallel_runner { struct_size: size, ..unsafe { &*pool }.pool.runner() };
            // SAFETY: `size` is one that the struct has had, and the caller has that many bytes there.
            unsafe { std::ptr::copy_nonoverlapping((&raw const filled).cast::<u8>(), runner.cast(), size) };
            Ok(())
        }
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// RoPE

/// Computes RoPE frequencies: `inv_freq` receives `pairs` = rotary_dim / 2 numbers, in radians a position, and `*magnitude`
/// the factor on cosines and sines. Meant for when a model is loaded; unlike the operations it allocates.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
/// Bad input: null, an unknown `struct_size` or scaling, a `pairs` that is not rotary_dim / 2, a parameter that is not finite or
/// not positive is an error, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_rope_frequencies(
    params: *const kvl_rope_frequencies_params,
    inv_freq: *mut f64,
    pairs: i64,
    magnitude: *mut f64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let params = unsafe { read_sized(params) }?;
        ensure!(!inv_freq.is_null(), NullPointer, "the pointer inv_freq is null");
        ensure!(!magnitude.is_null(), NullPointer, "the pointer magnitude is null");
        let (rotary_dim, pairs) = (size("rotary_dim", params.rotary_dim)?, size("pairs", pairs)?);
        check_rotary_dim(rotary_dim)?;
        ensure!(
            pairs == rotary_dim / 2,
            Shape,
            "pairs is {pairs}, but rotary_dim {rotary_dim} has {} pairs",
            rotary_dim / 2
        );
        let or = |value: f64, default: f64| if value == 0.0 { default } else { value };
        let attention_factor = (params.attention_factor != 0.0).then_some(params.attention_factor);
        let (factor, original_max_position) = (params.factor, params.original_max_position);
        let truncate = !boolean("keep_ramp", params.keep_ramp)?;
        let scaling = match params.scaling {
            KVL_ROPE_UNSCALED => RopeScaling::None,
            KVL_ROPE_LINEAR => RopeScaling::Linear { factor },
            KVL_ROPE_NTK => RopeScaling::Ntk { factor },
            KVL_ROPE_LLAMA3 => RopeScaling::Llama3 {
                factor,
                low_freq_factor: or(params.low_freq_factor, 1.0),
                high_freq_factor: or(params.high_freq_factor, 4.0),
                original_max_position,
            },
            KVL_ROPE_YARN => RopeScaling::Yarn {
                factor,
                original_max_position,
                beta_fast: or(params.beta_fast, 32.0),
                beta_slow: or(params.beta_slow, 1.0),
                attention_factor,
                truncate,
            },
            KVL_ROPE_LONGROPE => {
                // SAFETY: the caller's promise.
                let factors = unsafe { required_list("factors", params.factors, pairs) }?.to_vec();
                RopeScaling::LongRope { factors, factor, original_max_position, attention_factor }
            }
            other => fail!(InvalidEnum, "scaling is {other}, which is no kvl_rope_scaling"),
        };
        let frequencies = RopeFrequencies::new(rotary_dim, or(params.base, 10_000.0), &scaling)?;
        // SAFETY: not null, and the caller has that many entries there.
        unsafe {
            output_list("inv_freq", inv_freq, pairs)?.copy_from_slice(frequencies.inv_freq());
            magnitude.write(frequencies.magnitude());
        }
        Ok(())
    })
}

/// Computes cosines and sines, [rows, rotary_dim / 2] each, for positions `first_position` .. `first_position + rows`: a
/// table for `kvl_rope_params`, whose rows are then counted from `first_position`. `magnitude` 0 is 1.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
/// Bad input: null, an odd `rotary_dim` or one outside 2 to 4096, a number that is not finite, outputs that share memory with
/// each other or with `inv_freq` are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_rope_table(
    context: *const kvl_context,
    inv_freq: *const f64,
    rotary_dim: i64,
    magnitude: f64,
    first_position: i64,
    rows: i64,
    cos: *mut f32,
    sin: *mut f32,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let context = unsafe { borrow(context) }?;
        let (rotary_dim, rows) = (size("rotary_dim", rotary_dim)?, size("rows", rows)?);
        check_rotary_dim(rotary_dim)?;
        let half = rotary_dim / 2;
        // As many positions as f64 counts exactly, so that no sum overflows.
        ensure!(
            first_position.unsigned_abs() <= 1 << 52 && rows <= i32::MAX as usize,
            OutOfRange,
            "{rows} rows from position {first_position}: positions are limited to 2^52, rows to {}",
            i32::MAX
        );
        let magnitude = if magnitude == 0.0 { 1.0 } else { magnitude };
        ensure!(!inv_freq.is_null(), NullPointer, "the pointer inv_freq is null");
        let entries = rows * half;
        let list_view = |data: *mut c_void, dtype, n: usize| {
            let raw =
                RawView { data: data.cast(), dtype, shape: [1, 1, rows, n], strides: [0, 0, n as i64, 1], bytes: None };
            raw.validate("a RoPE table").map(|_| raw)
        };
        let (c, s) = (list_view(cos.cast(), crate::DType::F32, half)?, list_view(sin.cast(), crate::DType::F32, half)?);
        // Twice as many floats as there are doubles.
        let f = RawView { data: inv_freq.cast_mut().cast(), shape: [1, 1, 1, rotary_dim], ..c };
        ensure!(!c.overlaps(&s), Overlap, "cos and sin share memory");
        ensure!(!f.overlaps(&c) && !f.overlaps(&s), Overlap, "inv_freq and the table share memory");
        // SAFETY: the caller's promise, and nothing overlaps.
        let (inv_freq, cos, sin) = unsafe {
            (
                required_list("inv_freq", inv_freq, half)?,
                output_list("cos", cos, entries)?,
                output_list("sin", sin, entries)?,
            )
        };
        check_frequencies(inv_freq, magnitude)?;
        fill_table(context, inv_freq, magnitude, first_position, cos, sin);
        Ok(())
    })
}

/// Rotates queries or keys: `dst = RoPE(src)`, both [batch, seq, heads, dim], of any strides and types; arithmetic is f32,
/// rounded once to the type of `dst`. To rotate in place, let both views be the same.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
/// Bad input: null, an unknown `struct_size` or enumeration value, shapes that differ, a `rotary_dim` that is odd or above dim,
/// positions outside a table, views that share memory without being the same are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_rope(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    params: *const kvl_rope_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        // SAFETY: as above.
        let rope = unsafe { raw_rope(params, &src) }?;
        // SAFETY: as above.
        unsafe { rope_raw(context, runner.as_dyn(), src, dst, &rope, None) }
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// RMS norm

/// Normalises every head: `dst = RMSNorm(src)`, both [batch, seq, heads, dim], of any strides and types; the mean is f64, the
/// rest f32, rounded once to the type of `dst`. In place, let both views be the same. Since ABI version 3.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
/// Bad input: null, an unknown `struct_size`, shapes that differ, an `eps` that is negative or not finite, views that share
/// memory without being the same are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_rms_norm(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    params: *const kvl_rms_norm_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        // SAFETY: as above.
        let norm = unsafe { types::rms_norm(params, &src) }?;
        // SAFETY: as above.
        unsafe { rms_norm_raw(context, runner.as_dyn(), src, dst, &norm) }
    })
}

/// Normalises and then rotates queries or keys in one pass. The bits are those of `kvl_rms_norm` into a view of f32 and
/// `kvl_rope` from there: what is between the two is never rounded to less. Heads have at most 4096 elements. Since ABI
/// version 3.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
/// Bad input: what is an error for `kvl_rms_norm` or `kvl_rope` is one here, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_rms_norm_rope(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    norm: *const kvl_rms_norm_params,
    rope: *const kvl_rope_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        // SAFETY: as above.
        let (norm, rope) = unsafe { (types::rms_norm(norm, &src)?, raw_rope(rope, &src)?) };
        // SAFETY: as above.
        unsafe { rope_raw(context, runner.as_dyn(), src, dst, &rope, Some(norm)) }
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// The cache

/// Writes new keys and values into their caches, all rows in one call, each at its own place, converted to the cache's type
/// (to nearest, ties to even); normalises the keys on the way if `params->k_norm` is given, and rotates them if `params->rope`
/// is. Lengths are the caller's to advance.
///
/// Thread safety: may be called from any number of threads at once on disjoint caches or disjoint rows; `runner` null is the
/// calling thread.
/// Bad input: null, an unknown `struct_size` or enumeration value, shapes that do not fit, a slot past the capacity
/// (`KVL_ERR_CAPACITY`), a negative position, slot or row, a page that does not exist, two tokens for one slot
/// (`KVL_ERR_DUPLICATE_SLOT`), a cache that shares memory with anything else are errors, and nothing is written: nothing is
/// clamped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_kv_write(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    params: *const kvl_kv_write_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let params = unsafe { read_sized(params) }?;
        reserved("kvl_kv_write_params", params.reserved)?;
        let keys = (params.k.raw("k")?, params.k_cache.raw("k_cache")?);
        ensure!(
            params.v.is_absent() == params.v_cache.is_absent(),
            NullPointer,
            "only one of v and v_cache is given: give both, or leave both all zero to write keys alone"
        );
        let values = match params.v.is_absent() {
            true => None,
            false => Some((params.v.raw("v")?, params.v_cache.raw("v_cache")?)),
        };
        let batch = keys.0.shape[BATCH];
        let tokens = batch.saturating_mul(keys.0.shape[SEQ]);
        ensure!(
            params.slots.is_null() || params.positions.is_null(),
            InvalidValue,
            "both positions and slots are given: give either"
        );
        // SAFETY: as above.
        let to = unsafe {
            Destination {
                positions: match params.slots.is_null() {
                    true => required_list("positions", params.positions, batch)?,
                    false => &[],
                },
                counts: list("counts", params.counts, batch)?,
                rows: list("rows", params.rows, batch)?,
                slots: list("slots", params.slots, tokens)?,
                layout: types::layout(params.layout, keys.1.shape[SEQ])?,
            }
        };
        let k_norm = match params.k_norm.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { types::rms_norm(params.k_norm, &keys.0) }?),
        };
        let rope = match params.rope.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { raw_rope(params.rope, &keys.0) }?),
        };
        let v_packing = types::packing("v_packing", params.v_packing)?;
        let write = RawWrite { keys, values, to, k_norm, rope, v_packing };
        // SAFETY: as above.
        unsafe { kv_write_raw(context, runner.as_dyn(), &write) }
    })
}

/// Packs values in pairs of slots (`KVL_PACK_ROW_PAIRS`): [batch, n, heads, dim] becomes [batch, n / 2 rounded up, heads,
/// 2 * dim], of the same type; every bit is kept. Where n is odd, the other half of the last pair is left as it is.
/// `kvl_kv_write` writes into such a cache directly. Since ABI version 3.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
/// Bad input: null, shapes that do not fit, types that differ, views that share memory are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_pack_row_pairs(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
) -> kvl_status {
    // SAFETY: the caller's promise.
    unsafe { from_one_to_another(context, runner, src, dst, pack_row_pairs_raw) }
}

/// The inverse of `kvl_pack_row_pairs`: `src` is [batch, n / 2 rounded up, heads, 2 * dim], `dst` [batch, n, heads, dim]. Since
/// ABI version 3.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
/// Bad input: null, shapes that do not fit, types that differ, views that share memory are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_unpack_row_pairs(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
) -> kvl_status {
    // SAFETY: the caller's promise.
    unsafe { from_one_to_another(context, runner, src, dst, unpack_row_pairs_raw) }
}

/// Repeats every head n times in a row: [batch, seq, kv_heads, dim] becomes [batch, seq, kv_heads * n, dim], of the same
/// type; n is the ratio of the head counts. Attention needs no such copy.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
/// Bad input: null, head counts that are no multiple, other axes or types that differ, views that share memory are errors, and
/// nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_repeat_kv(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
) -> kvl_status {
    // SAFETY: the caller's promise.
    unsafe { from_one_to_another(context, runner, src, dst, repeat_kv_raw) }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

/// Bytes of workspace that `kvl_attention` needs at most for the shapes of `params->q`, `k` and `v`, whatever lengths and
/// masks are, and for the threads of `runner`. Only those shapes, `layout`, `query_starts` and `plan` are looked at: data may be
/// null.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null, an unknown `struct_size`, a negative axis or one above 2^31 - 1, a dim that is not 1 to 512 are errors, and
/// `*bytes` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_workspace_size(
    params: *const kvl_attention_params,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    let size = |params: &kvl_attention_params, threads| {
        let (q, k, v) = (attention_shape("q", &params.q)?, attention_shape("k", &params.k)?, value_shape(params)?);
        // SAFETY: the caller's promise.
        let (rows, layout) = unsafe { plan::workspace_spans(params, q, k[SEQ]) }?;
        let (q, k) = attention_shapes(q, RawView { shape: k, ..params.k.raw("k")? }, &layout, rows);
        Ok(attention_workspace_size(q, k, v[DIM], threads))
    };
    // SAFETY: the caller's promise.
    unsafe { workspace_size(params, runner, bytes, size) }
}

/// Writes the bytes of workspace that a call with these parameters needs on so many threads.
///
/// # Safety
/// The pointers are null, or what the header describes.
unsafe fn workspace_size<P: Growing>(
    params: *const P,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
    size: impl FnOnce(&P, usize) -> Result<usize>,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's.
        let (params, runner) = unsafe { (read_sized(params)?, CallerRunner::new(runner)?) };
        ensure!(!bytes.is_null(), NullPointer, "the pointer bytes is null");
        let needed = size(&params, runner.as_dyn().num_threads())?;
        // SAFETY: not null, and the caller's to write.
        unsafe { bytes.write(needed) };
        Ok(())
    })
}

/// Grouped-query attention over a cache: one entry for prefill (the queries' keys are in the cache already), chunked prefill
/// and decode (seq = 1). Everything keeps its type; arithmetic is f32, rounded once to the type of `out`.
///
/// `workspace` has `workspace_bytes` bytes, at least what `kvl_attention_workspace_size` says for the same shapes and runner, and
/// is aligned to 64 bytes. Its contents are worth nothing before and after. The bits of a row of the output depend on that
/// row's inputs and the level alone: not on the runner, the batch around it or the strides.
///
/// Thread safety: may be called from any number of threads at once, each with outputs and a workspace of its own: two calls at
/// the same time with the same workspace compute garbage. `runner` null is the calling thread.
/// Bad input: null, an unknown `struct_size`, flag or enumeration value, shapes that do not fit, K and V of different types,
/// lengths outside the cache, an output that shares memory with an input, a workspace that is too small or misaligned are
/// errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    workspace: *mut c_void,
    workspace_bytes: usize,
    params: *const kvl_attention_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let call = unsafe { raw_attention(&read_sized(params)?) }?;
        let memory = Memory::Fixed(workspace.cast(), workspace_bytes);
        // SAFETY: as above.
        unsafe { attention_raw(context, runner.as_dyn(), memory, &call) }
    })
}

/// Bytes of workspace that `kvl_attention_with_prefix` needs at most for the shapes of its arguments, as
/// `kvl_attention_workspace_size` says it for `kvl_attention`. Of `prefix_k`, only the shape is looked at. Since ABI version 3.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: as for `kvl_attention_workspace_size`, and `*bytes` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_with_prefix_workspace_size(
    prefix_k: *const kvl_const_view,
    params: *const kvl_attention_params,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (params, runner) = unsafe { (read_sized(params)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let prefix = unsafe { read("prefix_k", prefix_k) }?;
        ensure!(!bytes.is_null(), NullPointer, "the pointer bytes is null");
        let (q, k, v) = (attention_shape("q", &params.q)?, attention_shape("k", &params.k)?, value_shape(&params)?);
        let tokens = attention_shape("prefix_k", &prefix)?[SEQ];
        // SAFETY: as above.
        let (rows, layout) = unsafe { plan::workspace_spans(&params, q, k[SEQ]) }?;
        let (shape, k) = attention_shapes(q, RawView { shape: k, ..params.k.raw("k")? }, &layout, rows);
        let needed = prefix_workspace_size(q, shape, k, tokens, v[DIM], runner.as_dyn().num_threads());
        // SAFETY: not null, and the caller's to write.
        unsafe { bytes.write(needed) };
        Ok(())
    })
}

/// Attention over a prefix that all rows share, [1, tokens, kv_heads, dim] and [1, tokens, kv_heads, v_dim], and then over each
/// row's own keys, of which `params` speaks as it does in `kvl_attention`: position 0 of a row is its first key after the
/// prefix. Every query sees the whole prefix, which is read once for all of them; sinks count once. The result is that of
/// attention over both at once within the kernel's bound; it does not depend on the runner, the batch or strides.
///
/// `workspace` is as for `kvl_attention`, of the size that `kvl_attention_with_prefix_workspace_size` says. Since ABI version 3.
///
/// Thread safety: as for `kvl_attention`.
/// Bad input: as for `kvl_attention`, for either part; ALiBi slopes and a left window, which would have to know where in the
/// prefix a key stands, are errors. Nothing but the workspace is written then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_attention_with_prefix(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    workspace: *mut c_void,
    workspace_bytes: usize,
    prefix_k: *const kvl_const_view,
    prefix_v: *const kvl_const_view,
    params: *const kvl_attention_params,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (k, v) =
            unsafe { (read("prefix_k", prefix_k)?.raw("prefix_k")?, read("prefix_v", prefix_v)?.raw("prefix_v")?) };
        // SAFETY: as above.
        let call = unsafe { raw_attention(&read_sized(params)?) }?;
        // SAFETY: as above.
        unsafe { attention_with_prefix_raw(context, runner.as_dyn(), workspace.cast(), workspace_bytes, (k, v), &call) }
    })
}

/// Merges states over disjoint sets of keys into the state over all of them: `out = sum_i w_i out_i` with
/// `w_i = exp(lse_i - lse)` and `lse = ln sum_i exp(lse_i)`. `lse`, [batch, seq, heads] and contiguous, may be null. All
/// outputs are of one type; the order of the states is the order of the sums. A state with an LSE of -inf is empty: its
/// output is not read. Merging only empty states gives output 0 and LSE -inf.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
/// Bad input: null, no state or more than 256, shapes or types that differ, an output that shares memory with an input are
/// errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_merge_states(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    states: *const kvl_attention_state,
    num_states: usize,
    out: *const kvl_view,
    lse: *mut f32,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let out = unsafe { read("out", out) }?.raw("out")?;
        ensure!(num_states <= MAX_STATES, InvalidValue, "{num_states} states, but a call merges 1 to {MAX_STATES}");
        // SAFETY: as above.
        let states = unsafe { required_list("states", states, num_states) }?;
        // On the stack, and converted before anything runs, since a conversion can fail.
        let mut raw = [(out, lse.cast_const()); MAX_STATES];
        for (i, (state, raw)) in states.iter().zip(&mut raw).enumerate() {
            ensure!(!state.lse.is_null(), NullPointer, "states[{i}].lse is null");
            *raw = (state.out.raw("the output of a state")?, state.lse);
        }
        // SAFETY: as above.
        unsafe { merge_states_raw(context, runner.as_dyn(), num_states, &|i| raw[i], out, lse) }
    })
}

/// Fills the standard ALiBi slopes for any number of heads: for a power of two n, `2^(-8 (h + 1) / n)`; otherwise those of
/// the largest power of two below, then every other one of twice that.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
/// Bad input: null or a negative number of heads is an error, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_alibi_slopes(slopes: *mut f32, heads: i64) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        fill_alibi_slopes(unsafe { output_list("slopes", slopes, size("heads", heads)?) }?);
        Ok(())
    })
}

// ---------------------------------------------------------------------------------------------------------------------
// Conversion of what more than one export takes

/// # Safety
/// `context` is null or from `kvl_context_create`, and lives as long as the borrow.
unsafe fn borrow<'a>(context: *const kvl_context) -> Result<&'a Context> {
    ensure!(!context.is_null(), NullPointer, "the pointer context is null");
    // SAFETY: the caller's.
    Ok(unsafe { &(*context).context })
}

/// The shape of the values, of which two are a row of `v` if they are packed.
fn value_shape(params: &kvl_attention_params) -> Result<[usize; 4]> {
    let mut v = params.v;
    if types::packing("v_packing", params.v_packing)? == Packing::RowPairs {
        v.shape[DIM] /= 2;
    }
    attention_shape("v", &v)
}

/// The shape of a tensor of attention, for the size of a workspace: data and strides are not looked at.
fn attention_shape(name: &str, view: &kvl_const_view) -> Result<[usize; 4]> {
    let raw = view.raw(name)?;
    // Data and strides do not count here; an empty copy is enough to have the axes checked.
    RawView { shape: [0; 4], ..raw }.validate(name)?;
    for axis in [BATCH, SEQ, HEADS] {
        let n = raw.shape[axis];
        let most = crate::view::MAX_AXIS;
        ensure!(n <= most, Shape, "{name}: axis {axis} has {n} elements, more than {most}");
    }
    let dim = raw.shape[DIM];
    ensure!(
        (1..=MAX_HEAD_DIM).contains(&dim),
        Shape,
        "{name} has dim = {dim}, which is not between 1 and {MAX_HEAD_DIM}"
    );
    Ok(raw.shape)
}

/// # Safety
/// `params` is what the header describes.
unsafe fn raw_attention<'a>(params: &kvl_attention_params) -> Result<RawAttention<'a>> {
    reserved("kvl_attention_params", params.reserved)?;
    ensure!(
        params.reserved2 == 0,
        InvalidEnum,
        "kvl_attention_params.reserved2 is {}, but must be 0",
        params.reserved2
    );
    ensure!(
        params.reserved3 == 0,
        InvalidEnum,
        "kvl_attention_params.reserved3 is {}, but must be 0",
        params.reserved3
    );
    let (q, k) = (params.q.raw("q")?, params.k.raw("k")?);
    let heads = q.shape[HEADS];
    // SAFETY: the caller's, here and below.
    let (spans, planned) = unsafe { plan::spans(params, &q, k) }?;
    // SAFETY: as above.
    unsafe {
        Ok(RawAttention {
            q,
            k,
            v: params.v.raw("v")?,
            out: params.out.raw("out")?,
            lse: params.lse,
            scale: (params.scale != 0.0).then_some(params.scale),
            softcap: (params.softcap != 0.0).then_some(params.softcap),
            v_packing: types::packing("v_packing", params.v_packing)?,
            spans,
            planned,
            masks: types::masks(params, spans.batch)?,
            bias: match params.bias.is_absent() {
                true => None,
                false => Some(params.bias.raw("bias")?),
            },
            alibi_slopes: list("alibi_slopes", params.alibi_slopes, heads)?,
            sinks: list("sinks", params.sinks, heads)?,
            precision: types::precision("precision", params.precision)?,
        })
    }
}

/// An export that does something with a view and puts it into another.
///
/// # Safety
/// The pointers are what the header describes.
unsafe fn from_one_to_another(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    src: *const kvl_const_view,
    dst: *const kvl_view,
    run: unsafe fn(&Context, &dyn Runner, RawView, RawView) -> Result<()>,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's, here and below.
        let (context, runner) = unsafe { (borrow(context)?, CallerRunner::new(runner)?) };
        // SAFETY: as above.
        let (src, dst) = unsafe { (read("src", src)?.raw("src")?, read("dst", dst)?.raw("dst")?) };
        // SAFETY: as above.
        unsafe { run(context, runner.as_dyn(), src, dst) }
    })
}

/// # Safety
/// `params` is null or points to what the header describes, for the tensor `src`.
unsafe fn raw_rope<'a>(params: *const kvl_rope_params, src: &RawView) -> Result<RawRope<'a>> {
    // SAFETY: the caller's, here and below.
    let params = unsafe { read_sized(params) }?;
    reserved("kvl_rope_params", params.reserved)?;
    let pairing = pairing("pairing", params.pairing)?;
    let rotary_dim = size("rotary_dim", params.rotary_dim)?;
    check_rotary_dim(rotary_dim)?;
    let half = rotary_dim / 2;
    let table = !params.cos.is_null() || !params.sin.is_null();
    ensure!(!table || params.inv_freq.is_null(), InvalidValue, "both inv_freq and a table are given: give either");
    // SAFETY: as above.
    let angles = unsafe {
        if table {
            let entries = size("table_rows", params.table_rows)?.saturating_mul(half);
            RawAngles::Table {
                cos: required_list("cos", params.cos, entries)?,
                sin: required_list("sin", params.sin, entries)?,
            }
        } else {
            RawAngles::Frequencies {
                inv_freq: required_list("inv_freq (there is no table either)", params.inv_freq, half)?,
                magnitude: if params.magnitude == 0.0 { 1.0 } else { params.magnitude },
            }
        }
    };
    let [batch, seq, ..] = src.shape;
    ensure!(
        params.offsets.is_null() || params.positions.is_null(),
        InvalidValue,
        "both offsets and positions are given: give either"
    );
    // SAFETY: as above.
    let positions = unsafe {
        match params.positions.is_null() {
            true => {
                Positions::Offsets(required_list("offsets (there are no positions either)", params.offsets, batch)?)
            }
            false => Positions::Explicit(required_list("positions", params.positions, batch.saturating_mul(seq))?),
        }
    };
    Ok(RawRope { pairing, rotary_dim, angles, positions })
}

/// Names of kernels as C strings, made by the compiler, so that they are constants of the library.
mod names {
    use crate::kernels::LEVELS;
    use std::ffi::{CStr, c_char};

    const SIZE: usize = 48;
    const COUNT: usize = {
        let (mut n, mut level) = (0, 0);
        while level < LEVELS.len() {
            n += LEVELS[level].len();
            level += 1;
        }
        n
    };

    static NAMES: [[u8; SIZE]; COUNT] = {
        let mut names = [[0; SIZE]; COUNT];
        let (mut n, mut level) = (0, 0);
        while level < LEVELS.len() {
            let mut entry = 0;
            while entry < LEVELS[level].len() {
                let name = LEVELS[level][entry].info.name.as_bytes();
                assert!(name.len() < SIZE);
                names[n].split_at_mut(name.len()).0.copy_from_slice(name);
                (n, entry) = (n + 1, entry + 1);
            }
            level += 1;
        }
        names
    };

    /// The C string with the text of a kernel's name.
    pub(super) fn find(name: &str) -> *const c_char {
        let found =
            NAMES.iter().find(|n| CStr::from_bytes_until_nul(&n[..]).is_ok_and(|n| n.to_bytes() == name.as_bytes()));
        found.map_or(c"unknown".as_ptr(), |n| n.as_ptr().cast())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn descriptions_are_those_of_the_rust_api() {
        for status in Status::ALL {
            // SAFETY: a constant of the library.
            let text = unsafe { CStr::from_ptr(kvl_status_string(status as kvl_status)) };
            assert_eq!(text.to_str().unwrap(), status.description());
        }
        for isa in Isa::ALL {
            // SAFETY: as above.
            let text = unsafe { CStr::from_ptr(kvl_isa_name(isa as kvl_isa)) };
            assert_eq!(text.to_str().unwrap(), isa.name());
        }
    }

    #[test]
    fn every_kernel_has_a_c_name() {
        for kernel in crate::kernels() {
            // SAFETY: as above.
            assert_eq!(unsafe { CStr::from_ptr(names::find(kernel.name)) }.to_str().unwrap(), kernel.name);
        }
    }
}
