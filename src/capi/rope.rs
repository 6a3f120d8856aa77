//! Rotary position embedding.

use super::arguments::{boolean, enumeration, output_list, read, required_list, reserved, size};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::sized::{assert_layout, read_sized, sized};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::dtype::DType;
use crate::error::{Result, ensure, fail};
use crate::ops::rope::{
    Llama3Scaling, LongRopeScaling, Positions, RawAngles, RawRope, RopeFrequencies, RopeScaling, YarnScaling,
    check_frequencies, check_rotary_dim, fill_table, rope_raw,
};
use crate::problem::rotation::Pairing;
use crate::view::RawView;
use std::ffi::c_void;

/// Which elements of a head form a pair that RoPE rotates.
pub type kvl_pairing = i32;
/// Elements 2i and 2i + 1: the original paper, Meta's Llama code, llama.cpp's Llama files.
pub const KVL_PAIRING_INTERLEAVED: i32 = 0;
/// Elements i and i + rotary_dim / 2: GPT-NeoX, Grok-1, Hugging Face.
pub const KVL_PAIRING_HALF_SPLIT: i32 = 1;

/// How RoPE frequencies are scaled for contexts longer than in training.
pub type kvl_rope_scaling = i32;
/// No scaling: `f_i = base^(-2i / rotary_dim)`.
pub const KVL_ROPE_SCALING_NONE: i32 = 0;
/// `f_i / factor`. Reads `factor`.
pub const KVL_ROPE_SCALING_LINEAR: i32 = 1;
/// The base becomes `base * factor^(rotary_dim / (rotary_dim - 2))`. Reads `factor`.
pub const KVL_ROPE_SCALING_NTK: i32 = 2;
/// Llama 3.1: long wavelengths are divided by `factor`, short ones are kept, and those between are blended. Reads
/// `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position`.
pub const KVL_ROPE_SCALING_LLAMA3: i32 = 3;
/// YaRN: a ramp between interpolation and extrapolation over the pairs. Reads `factor`, `original_max_position`,
/// `beta_fast`, `beta_slow`, `attention_factor`, `keep_ramp`.
pub const KVL_ROPE_SCALING_YARN: i32 = 4;
/// LongRoPE: `f_i / factors[i]`. Reads `factors`, `attention_factor` and, if that is 0, `factor` and
/// `original_max_position`.
pub const KVL_ROPE_SCALING_LONGROPE: i32 = 5;

/// Parameters of RoPE frequencies. Start from `KVL_ROPE_FREQUENCIES_PARAMS_INIT`, set `rotary_dim`, `base` and the
/// fields that the `scaling` reads.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_rope_frequencies_params {
    /// `sizeof(kvl_rope_frequencies_params)`.
    pub struct_size: usize,
    /// The number of leading elements of a head that are rotated; even, 2 to 4096.
    pub rotary_dim: i64,
    /// The base; 0 stands for 10000.
    pub base: f64,
    /// The kind of scaling.
    pub scaling: kvl_rope_scaling,
    /// YaRN: 0 rounds the ends of the ramp outwards to whole pairs, as most sources do; 1 keeps them.
    pub keep_ramp: i32,
    /// The ratio of the context length to that of training.
    pub factor: f64,
    /// The context length of training, in tokens.
    pub original_max_position: f64,
    /// Llama 3.1: wavelengths above `original_max_position / low_freq_factor` are divided by `factor`; 0 stands for 1.
    pub low_freq_factor: f64,
    /// Llama 3.1: wavelengths below `original_max_position / high_freq_factor` are kept; 0 stands for 4.
    pub high_freq_factor: f64,
    /// YaRN: pairs that rotate more often than this over the original length are kept; 0 stands for the paper's 32.
    pub beta_fast: f64,
    /// YaRN: pairs that rotate less often than this over the original length are divided by `factor`; 0 stands for the
    /// paper's 1.
    pub beta_slow: f64,
    /// YaRN and LongRoPE: factor on cosines and sines. 0 stands for the paper's: `0.1 ln(factor) + 1`, and `sqrt(1 +
    /// ln(factor) / ln(original_max_position))`. Sources disagree about that of YaRN, so give the model's own where it
    /// states one.
    pub attention_factor: f64,
    /// LongRoPE: `rotary_dim / 2` divisors. Which of a model's two lists applies depends on the length of the text.
    pub factors: *const f64,
}

sized!(kvl_rope_frequencies_params);
assert_layout!(
    kvl_rope_frequencies_params, 96,
    struct_size: 0, rotary_dim: 8, base: 16, scaling: 24, keep_ramp: 28, factor: 32, original_max_position: 40,
    low_freq_factor: 48, high_freq_factor: 56, beta_fast: 64, beta_slow: 72, attention_factor: 80, factors: 88,
);

/// A rotation. Start from `KVL_ROPE_PARAMS_INIT`, set `rotary_dim`, either `inv_freq` or both `cos` and `sin`, and
/// either `offsets` or `positions`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_rope_params {
    /// `sizeof(kvl_rope_params)`.
    pub struct_size: usize,
    /// Which elements form a pair.
    pub pairing: kvl_pairing,
    /// 0.
    pub reserved: i32,
    /// The number of leading elements of a head that are rotated; the others are copied. Even, 2 to 4096, at most dim.
    pub rotary_dim: i64,
    /// [rotary_dim / 2] in radians per position, from `kvl_rope_frequencies` or elsewhere. Angles are computed and
    /// reduced in f64.
    pub inv_freq: *const f64,
    /// Factor on cosines and sines, with `inv_freq`; 0 stands for 1.
    pub magnitude: f64,
    /// [table_rows, rotary_dim / 2] cosines, instead of `inv_freq`. Row p is of position p.
    pub cos: *const f32,
    /// [table_rows, rotary_dim / 2] sines.
    pub sin: *const f32,
    /// The number of rows of `cos` and of `sin`.
    pub table_rows: i64,
    /// [batch]: token t of sequence b is at position `offsets[b] + t`. With `inv_freq`, positions may be negative.
    pub offsets: *const i32,
    /// [batch, seq]: the position of every token, instead of `offsets`.
    pub positions: *const i32,
    /// In `kvl_cache_evict` and `kvl_cache_evict_running`, the block of the Hadamard rotation that followed when keys were written
    /// (`kvl_kv_write_params.k_hadamard`); 0 for none. Elsewhere 0.
    pub k_hadamard: i64,
}

sized!(kvl_rope_params[k_hadamard]);
assert_layout!(
    kvl_rope_params, 88,
    struct_size: 0, pairing: 8, reserved: 12, rotary_dim: 16, inv_freq: 24, magnitude: 32, cos: 40, sin: 48,
    table_rows: 56, offsets: 64, positions: 72, k_hadamard: 80,
);

/// Computes RoPE frequencies: `inv_freq` receives `pairs` = rotary_dim / 2 numbers in radians per position, and
/// `*magnitude` the factor on cosines and sines. It is meant for the time when a model is loaded, and it allocates.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, an unknown `struct_size` or scaling, a `pairs` other than rotary_dim / 2, and a parameter that is
/// not finite or not positive are errors, and nothing is written.
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
            KVL_ROPE_SCALING_NONE => RopeScaling::None,
            KVL_ROPE_SCALING_LINEAR => RopeScaling::Linear { factor },
            KVL_ROPE_SCALING_NTK => RopeScaling::Ntk { factor },
            KVL_ROPE_SCALING_LLAMA3 => Llama3Scaling::new(factor, original_max_position)
                .low_freq_factor(or(params.low_freq_factor, 1.0))
                .high_freq_factor(or(params.high_freq_factor, 4.0))
                .into(),
            KVL_ROPE_SCALING_YARN => {
                let mut yarn = YarnScaling::new(factor, original_max_position)
                    .beta_fast(or(params.beta_fast, 32.0))
                    .beta_slow(or(params.beta_slow, 1.0))
                    .truncate(truncate);
                yarn.attention_factor = attention_factor;
                yarn.into()
            }
            KVL_ROPE_SCALING_LONGROPE => {
                // SAFETY: the caller's promise.
                let factors = unsafe { required_list("factors", params.factors, pairs) }?.to_vec();
                let mut scaling = LongRopeScaling::new(factors, factor, original_max_position);
                scaling.attention_factor = attention_factor;
                scaling.into()
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

/// Computes cosines and sines, [rows, rotary_dim / 2] each, of the positions from `first_position` on: a table for
/// `kvl_rope_params`, whose positions then count from `first_position`. A `magnitude` of 0 stands for 1.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, a `rotary_dim` that is odd or outside 2 to 4096, a number that is not finite, and outputs that
/// share memory with each other or with `inv_freq` are errors, and nothing is written.
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
        let (c, s) = (list_view(cos.cast(), DType::F32, half)?, list_view(sin.cast(), DType::F32, half)?);
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

/// Rotates queries or keys: `dst = RoPE(src)`, both [batch, seq, heads, dim], of any strides and types. Arithmetic is
/// f32, rounded once to the type of `dst`. To rotate in place, let both views be the same.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
/// calling thread.
/// Bad input: null, an unknown `struct_size` or enumeration value, shapes that differ, a `rotary_dim` that is odd or
/// above dim, positions outside a table, and views that share memory without being the same are errors, and nothing is
/// written.
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
        let rope = unsafe { read_rope(params, &src) }?;
        // SAFETY: as above.
        unsafe { rope_raw(context, runner.as_dyn(), src, dst, &rope, None) }
    })
}

pub(super) fn parse_pairing(name: &str, value: kvl_pairing) -> Result<Pairing> {
    enumeration("kvl_pairing", name, value, Pairing::from_u32)
}

/// # Safety
/// `params` is null or points to what the header describes, for the tensor `src`.
pub(super) unsafe fn read_rope<'a>(params: *const kvl_rope_params, src: &RawView) -> Result<RawRope<'a>> {
    // SAFETY: the caller's, here and below.
    let params = unsafe { read_sized(params) }?;
    reserved("kvl_rope_params", params.reserved)?;
    ensure!(
        params.k_hadamard == 0,
        InvalidValue,
        "kvl_rope_params.k_hadamard is {}, but here it must be 0: it is for keys that are evicted, and a write takes its block by itself",
        params.k_hadamard
    );
    let pairing = parse_pairing("pairing", params.pairing)?;
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

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    assert!(
        KVL_PAIRING_INTERLEAVED == Pairing::Interleaved as i32 && KVL_PAIRING_HALF_SPLIT == Pairing::HalfSplit as i32
    );
};
