//! The shells and the registry lines of a level that has every kernel.

/// Writes a level's shells: the generic bodies, compiled with the level's features.
///
/// Called through [`level_features`](crate::cpu::level_features).
macro_rules! kernel_shells {
    {[$($feature:literal)*] $level:ident} => {
        pub(in $crate::kernels) mod shells {
            use super::$level;
            use $crate::kernels::api::{AttentionFns, CopyArgs, HadamardArgs, MergeArgs, NormArgs, RopeArgs, ScaledArgs};
            use $crate::kernels::generic::{self, attention::{
                Blocks, Deinterleaved, DirectScores, DirectValues, KeyFractions, KeyPieces, KeyPointers, OneValue, PackKeys, PackValues, PairPieces,
                Pieces, Scratch, Units, ValuePieces, VectorProducts, Widen, WidenUnits,
            }};
            use $crate::kernels::generic::blocks::BlockUnit;
            use $crate::kernels::generic::fp8::Fp8;
            use $crate::kernels::simd::{Load, LoadStore, Simd};
            use $crate::problem::attention::Problem;
            use $crate::problem::grid::KeyRange;
            use $crate::problem::tile::{MAX_TILE_ROWS, TILE_ROWS, Tile};

            // Every shell is unsafe for the same two reasons: its caller vouches for the level's features (the registry
            // hands it out only where they are available) and for the arguments (the operations have validated them).

            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn angles(position: f64, inv_freq: &[f64], magnitude: f64, cos: &mut [f32], sin: &mut [f32]) {
                generic::rope::angles(position, inv_freq, magnitude, cos, sin);
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn rope<A: LoadStore, B: LoadStore>(args: &RopeArgs) {
                // SAFETY: the caller's.
                unsafe { generic::rope::rope::<_, A, B>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn copy<A: LoadStore, B: LoadStore>(args: &CopyArgs) {
                // SAFETY: the caller's.
                unsafe { generic::copy::copy::<_, A, B>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn quantize<A: LoadStore>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::quantize::quantize::<_, A>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn dequantize<B: LoadStore>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::quantize::dequantize::<_, B>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn encode<A: LoadStore, U: Fp8>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::fp8::encode::<_, A, U>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn decode<U: Fp8, B: LoadStore>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::fp8::decode::<_, U, B>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn quantize_blocks<A: LoadStore, U: BlockUnit>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::blocks::quantize::<_, A, U>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn dequantize_blocks<U: BlockUnit, B: LoadStore>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::blocks::dequantize::<_, U, B>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn quantize_affine<A: LoadStore, const BITS: u32>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::affine::quantize::<_, A, BITS>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn dequantize_affine<B: LoadStore, const BITS: u32>(args: &ScaledArgs) {
                // SAFETY: the caller's.
                unsafe { generic::affine::dequantize::<_, B, BITS>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn merge<T: LoadStore>(args: &MergeArgs) {
                // SAFETY: the caller's.
                unsafe { generic::merge::merge::<_, T>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn rms_norm<A: LoadStore, B: LoadStore>(args: &NormArgs) {
                // SAFETY: the caller's.
                unsafe { generic::norm::rms_norm::<_, A, B>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            pub(super) unsafe fn hadamard<A: LoadStore, B: LoadStore>(args: &HadamardArgs) {
                // SAFETY: the caller's.
                unsafe { generic::hadamard::hadamard::<_, A, B>($level::new_unchecked(), args) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn tile(pieces: &Pieces, problem: &Problem, tile: &Tile, scratch: *mut u8) {
                let scratch = Scratch::layout(scratch, tile.rows(), problem.q.shape[3], problem.v_dim).0;
                let order = Deinterleaved { keys: pieces.keys.deinterleaved, values: pieces.values.deinterleaved };
                let products = VectorProducts::new(pieces);
                // SAFETY: the caller's.
                unsafe { generic::attention::tile($level::new_unchecked(), order, problem, tile, &scratch, &products) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn reduce(pieces: &Pieces, problem: &Problem, tile: &Tile, scratch: *mut u8) {
                let scratch = Scratch::layout(scratch, tile.rows(), problem.q.shape[3], problem.v_dim).0;
                let deinterleaved = pieces.values.deinterleaved;
                // SAFETY: the caller's.
                unsafe { generic::attention::reduce($level::new_unchecked(), problem, tile, scratch.total, deinterleaved) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn scores<T: Units>(args: &DirectScores) {
                // SAFETY: the caller's.
                unsafe { args.run::<_, T>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn scores_short<T: Units>(args: &DirectScores) {
                // SAFETY: the caller's.
                unsafe { args.run_short::<_, T>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn pack_keys<T: Load>(args: &PackKeys) {
                // SAFETY: the caller's.
                unsafe { args.run::<_, T>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn accumulate<T: Load, const PAIRS: bool>(args: &DirectValues) {
                // SAFETY: the caller's.
                unsafe { args.clone().run::<_, T, PAIRS>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn accumulate_blocks<U: BlockUnit>(args: &DirectValues) {
                // SAFETY: the caller's.
                unsafe { args.run_blocks::<_, U>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn scores_affine<const BITS: u32>(args: &DirectScores) {
                // SAFETY: the caller's.
                unsafe { args.run_affine::<_, BITS>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn accumulate_affine<const BITS: u32>(args: &DirectValues) {
                // SAFETY: the caller's.
                unsafe { args.run_affine::<_, BITS>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn accumulate_one<T: Load>(args: &OneValue) {
                // SAFETY: the caller's.
                unsafe { args.run::<_, T>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn all_finite<T: Load>(v: KeyPointers<u8>, head: usize, keys: KeyRange, dv: usize) -> bool {
                // SAFETY: the caller's.
                unsafe { generic::attention::all_finite::<_, T>($level::new_unchecked(), v, head, keys, dv) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn pack_values<T: Load>(args: &PackValues) -> bool {
                // SAFETY: the caller's.
                unsafe { args.run::<_, T>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn widen_pairs<T: Load>(args: &Widen) {
                // SAFETY: the caller's.
                unsafe { args.run::<_, T>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn widen_units<U: BlockUnit>(args: &WidenUnits) {
                // SAFETY: the caller's.
                unsafe { args.run::<_, U>($level::new_unchecked()) }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn widen_elements<T: Load>(args: &WidenUnits) {
                // SAFETY: the caller's.
                unsafe { args.run_elements::<_, T>($level::new_unchecked()) }
            }
            const fn elements<T: Load>() -> Option<unsafe fn(&WidenUnits)> {
                if <$level as Simd>::WIDENS_ONCE && size_of::<T>() == 1 {
                    Some(widen_elements::<T>)
                } else {
                    None
                }
            }
            $(#[target_feature(enable = $feature)])*
            unsafe fn widen_affine<const BITS: u32>(args: &WidenUnits) {
                // SAFETY: the caller's.
                unsafe { args.run_affine::<_, BITS>($level::new_unchecked()) }
            }
            const fn in_fractions<T: Load>() -> bool {
                T::IN_FRACTIONS && <$level as Simd>::E4M3_FRACTION != 1.0
            }
            const fn key_pieces<T: Load>() -> KeyPieces {
                KeyPieces {
                    unit_bytes: size_of::<T>(),
                    widen: None,
                    widen_elements: elements::<T>(),
                    unit_rows: usize::MAX,
                    deinterleaved: T::DEINTERLEAVES && <$level as Simd>::DEINTERLEAVED_BF16,
                    scores: scores::<T::InLoops>,
                    fractions: if in_fractions::<T>() {
                        Some(KeyFractions { factor: <$level as Simd>::E4M3_FRACTION, scores: scores_short::<T> })
                    } else {
                        None
                    },
                    widened_scores: scores::<f32>,
                    pack: pack_keys::<T>,
                    quantize_rows: None,
                }
            }
            const fn value_pieces<T: Load>() -> ValuePieces {
                ValuePieces {
                    unit_bytes: size_of::<T>(),
                    widen: None,
                    widen_elements: elements::<T>(),
                    unit_rows: usize::MAX,
                    deinterleaved: T::DEINTERLEAVES && <$level as Simd>::DEINTERLEAVED_BF16,
                    accumulate: accumulate::<T::InLoops, false>,
                    fractions: if in_fractions::<T>() { <$level as Simd>::E4M3_FRACTION } else { 1.0 },
                    accumulate_one: accumulate_one::<T>,
                    all_finite: all_finite::<T>,
                    pack: pack_values::<T>,
                    integer: None,
                    pairs: if T::PACKS_PAIRS {
                        Some(PairPieces { accumulate: accumulate::<T, true>, widen: widen_pairs::<T> })
                    } else {
                        None
                    },
                }
            }
            pub(in $crate::kernels) const fn pieces<T: Load>() -> Pieces {
                Pieces {
                    keys: const { &key_pieces::<T>() },
                    values: const { &value_pieces::<T>() },
                    widened: const { &value_pieces::<f32>() },
                    tuning: $crate::tuning::Tuning::DEFAULT,
                }
            }
            /// The loops over blocks in the cache, and the other pieces of f32, for blocks that are widened before.
            const fn block_pieces<U: BlockUnit>() -> Pieces {
                Pieces {
                    keys: const {
                        &KeyPieces {
                            widen: Some(widen_units::<U>),
                            unit_rows: generic::attention::unit_rows::<$level>(8 * size_of::<U>() / generic::blocks::N),
                            scores: scores::<Blocks<U>>,
                            ..key_pieces::<f32>()
                        }
                    },
                    values: const {
                        &ValuePieces {
                            widen: Some(widen_units::<U>),
                            unit_rows: generic::attention::unit_rows::<$level>(8 * size_of::<U>() / generic::blocks::N),
                            accumulate: accumulate_blocks::<U>,
                            ..value_pieces::<f32>()
                        }
                    },
                    ..pieces::<f32>()
                }
            }
            /// The same for integers of an affine format.
            const fn affine_pieces<const BITS: u32>() -> Pieces {
                Pieces {
                    keys: const {
                        &KeyPieces {
                            widen: Some(widen_affine::<BITS>),
                            unit_rows: generic::attention::unit_rows::<$level>(BITS as usize),
                            scores: scores_affine::<BITS>,
                            ..key_pieces::<f32>()
                        }
                    },
                    values: const {
                        &ValuePieces {
                            widen: Some(widen_affine::<BITS>),
                            unit_rows: generic::attention::unit_rows::<$level>(BITS as usize),
                            accumulate: accumulate_affine::<BITS>,
                            ..value_pieces::<f32>()
                        }
                    },
                    ..pieces::<f32>()
                }
            }
            /// The kernels that write f16 saturated, with the operation and the source type. A copy of f16 keeps every bit.
            pub(in $crate::kernels) static SATURATING: &[$crate::kernels::registry::Saturating] = {
                use $crate::dtype::SaturatingF16;
                use $crate::format::CacheFormat::{Bf16, F16, F32};
                use $crate::kernels::api::{Function::{Copy, Hadamard, Norm, Rope}, Op};
                &[
                    (Op::Rope, F32, Rope(rope::<f32, SaturatingF16>)),
                    (Op::Rope, F16, Rope(rope::<half::f16, SaturatingF16>)),
                    (Op::Rope, Bf16, Rope(rope::<half::bf16, SaturatingF16>)),
                    (Op::KvWrite, F32, Copy(copy::<f32, SaturatingF16>)),
                    (Op::KvWrite, Bf16, Copy(copy::<half::bf16, SaturatingF16>)),
                    (Op::RmsNorm, F32, Norm(rms_norm::<f32, SaturatingF16>)),
                    (Op::RmsNorm, F16, Norm(rms_norm::<half::f16, SaturatingF16>)),
                    (Op::RmsNorm, Bf16, Norm(rms_norm::<half::bf16, SaturatingF16>)),
                    (Op::Hadamard, F32, Hadamard(hadamard::<f32, SaturatingF16>)),
                    (Op::Hadamard, F16, Hadamard(hadamard::<half::f16, SaturatingF16>)),
                    (Op::Hadamard, Bf16, Hadamard(hadamard::<half::bf16, SaturatingF16>)),
                ]
            };
            pub(in $crate::kernels) const fn attention<T: Load>() -> AttentionFns {
                attention_of(pieces::<T>(), generic::attention::direct_rows::<$level>(size_of::<T>()))
            }
            pub(in $crate::kernels) const fn block_attention<U: BlockUnit>() -> AttentionFns {
                let pieces = block_pieces::<U>();
                attention_of(pieces, pieces.keys.unit_rows)
            }
            pub(super) const fn affine_attention<const BITS: u32>() -> AttentionFns {
                let pieces = affine_pieces::<BITS>();
                attention_of(pieces, pieces.keys.unit_rows)
            }
            const fn attention_of(pieces: Pieces, direct_rows: usize) -> AttentionFns {
                AttentionFns {
                    tile,
                    reduce,
                    pieces,
                    max_rows: MAX_TILE_ROWS,
                    row_step: 2 * TILE_ROWS,
                    max_heads: usize::MAX,
                    direct_rows,
                    scratch_bytes: Scratch::bytes,
                }
            }
        }
    };
}
pub(crate) use kernel_shells;

/// Writes a level's part of the registry, `ENTRIES`. Every line is a kernel, with its name on every level:
/// operation, source and target format, largest error, function, names.
macro_rules! kernel_table {
    ($level:ident) => { $crate::kernels::shells::kernel_lines! { $level
    RopeAngles  F32  F32  1e-7 Angles(angles)                   "rope_angles_scalar" "rope_angles_avx2" "rope_angles_avx512" "rope_angles_neon";
    Rope        F32  F32  4e-7 Rope(rope::<f32, f32>)           "rope_f32_f32_scalar" "rope_f32_f32_avx2" "rope_f32_f32_avx512" "rope_f32_f32_neon";
    Rope        F32  F16  4e-7 Rope(rope::<f32, f16>)           "rope_f32_f16_scalar" "rope_f32_f16_avx2" "rope_f32_f16_avx512" "rope_f32_f16_neon";
    Rope        F32  Bf16 4e-7 Rope(rope::<f32, bf16>)          "rope_f32_bf16_scalar" "rope_f32_bf16_avx2" "rope_f32_bf16_avx512" "rope_f32_bf16_neon";
    Rope        F16  F32  4e-7 Rope(rope::<f16, f32>)           "rope_f16_f32_scalar" "rope_f16_f32_avx2" "rope_f16_f32_avx512" "rope_f16_f32_neon";
    Rope        F16  F16  4e-7 Rope(rope::<f16, f16>)           "rope_f16_f16_scalar" "rope_f16_f16_avx2" "rope_f16_f16_avx512" "rope_f16_f16_neon";
    Rope        F16  Bf16 4e-7 Rope(rope::<f16, bf16>)          "rope_f16_bf16_scalar" "rope_f16_bf16_avx2" "rope_f16_bf16_avx512" "rope_f16_bf16_neon";
    Rope        Bf16 F32  4e-7 Rope(rope::<bf16, f32>)          "rope_bf16_f32_scalar" "rope_bf16_f32_avx2" "rope_bf16_f32_avx512" "rope_bf16_f32_neon";
    Rope        Bf16 F16  4e-7 Rope(rope::<bf16, f16>)          "rope_bf16_f16_scalar" "rope_bf16_f16_avx2" "rope_bf16_f16_avx512" "rope_bf16_f16_neon";
    Rope        Bf16 Bf16 4e-7 Rope(rope::<bf16, bf16>)         "rope_bf16_bf16_scalar" "rope_bf16_bf16_avx2" "rope_bf16_bf16_avx512" "rope_bf16_bf16_neon";
    KvWrite     F32  F32  0.0  Copy(copy::<f32, f32>)           "kv_write_f32_f32_scalar" "kv_write_f32_f32_avx2" "kv_write_f32_f32_avx512" "kv_write_f32_f32_neon";
    KvWrite     F32  F16  0.0  Copy(copy::<f32, f16>)           "kv_write_f32_f16_scalar" "kv_write_f32_f16_avx2" "kv_write_f32_f16_avx512" "kv_write_f32_f16_neon";
    KvWrite     F32  Bf16 0.0  Copy(copy::<f32, bf16>)          "kv_write_f32_bf16_scalar" "kv_write_f32_bf16_avx2" "kv_write_f32_bf16_avx512" "kv_write_f32_bf16_neon";
    KvWrite     F16  F32  0.0  Copy(copy::<f16, f32>)           "kv_write_f16_f32_scalar" "kv_write_f16_f32_avx2" "kv_write_f16_f32_avx512" "kv_write_f16_f32_neon";
    KvWrite     F16  F16  0.0  Copy(copy::<f16, f16>)           "kv_write_f16_f16_scalar" "kv_write_f16_f16_avx2" "kv_write_f16_f16_avx512" "kv_write_f16_f16_neon";
    KvWrite     F16  Bf16 0.0  Copy(copy::<f16, bf16>)          "kv_write_f16_bf16_scalar" "kv_write_f16_bf16_avx2" "kv_write_f16_bf16_avx512" "kv_write_f16_bf16_neon";
    KvWrite     Bf16 F32  0.0  Copy(copy::<bf16, f32>)          "kv_write_bf16_f32_scalar" "kv_write_bf16_f32_avx2" "kv_write_bf16_f32_avx512" "kv_write_bf16_f32_neon";
    KvWrite     Bf16 F16  0.0  Copy(copy::<bf16, f16>)          "kv_write_bf16_f16_scalar" "kv_write_bf16_f16_avx2" "kv_write_bf16_f16_avx512" "kv_write_bf16_f16_neon";
    KvWrite     Bf16 Bf16 0.0  Copy(copy::<bf16, bf16>)         "kv_write_bf16_bf16_scalar" "kv_write_bf16_bf16_avx2" "kv_write_bf16_bf16_avx512" "kv_write_bf16_bf16_neon";
    KvWrite     F32  Int8 0.0  Scaled(quantize::<f32>)          "kv_write_f32_int8_scalar" "kv_write_f32_int8_avx2" "kv_write_f32_int8_avx512" "kv_write_f32_int8_neon";
    KvWrite     F16  Int8 0.0  Scaled(quantize::<f16>)          "kv_write_f16_int8_scalar" "kv_write_f16_int8_avx2" "kv_write_f16_int8_avx512" "kv_write_f16_int8_neon";
    KvWrite     Bf16 Int8 0.0  Scaled(quantize::<bf16>)         "kv_write_bf16_int8_scalar" "kv_write_bf16_int8_avx2" "kv_write_bf16_int8_avx512" "kv_write_bf16_int8_neon";
    KvWrite     F32  Fp8E4m3 0.0 Scaled(encode::<f32, E4m3>)    "kv_write_f32_fp8_e4m3_scalar" "kv_write_f32_fp8_e4m3_avx2" "kv_write_f32_fp8_e4m3_avx512" "kv_write_f32_fp8_e4m3_neon";
    KvWrite     F16  Fp8E4m3 0.0 Scaled(encode::<f16, E4m3>)    "kv_write_f16_fp8_e4m3_scalar" "kv_write_f16_fp8_e4m3_avx2" "kv_write_f16_fp8_e4m3_avx512" "kv_write_f16_fp8_e4m3_neon";
    KvWrite     Bf16 Fp8E4m3 0.0 Scaled(encode::<bf16, E4m3>)   "kv_write_bf16_fp8_e4m3_scalar" "kv_write_bf16_fp8_e4m3_avx2" "kv_write_bf16_fp8_e4m3_avx512" "kv_write_bf16_fp8_e4m3_neon";
    KvWrite     F32  Fp8E5m2 0.0 Scaled(encode::<f32, E5m2>)    "kv_write_f32_fp8_e5m2_scalar" "kv_write_f32_fp8_e5m2_avx2" "kv_write_f32_fp8_e5m2_avx512" "kv_write_f32_fp8_e5m2_neon";
    KvWrite     F16  Fp8E5m2 0.0 Scaled(encode::<f16, E5m2>)    "kv_write_f16_fp8_e5m2_scalar" "kv_write_f16_fp8_e5m2_avx2" "kv_write_f16_fp8_e5m2_avx512" "kv_write_f16_fp8_e5m2_neon";
    KvWrite     Bf16 Fp8E5m2 0.0 Scaled(encode::<bf16, E5m2>)   "kv_write_bf16_fp8_e5m2_scalar" "kv_write_bf16_fp8_e5m2_avx2" "kv_write_bf16_fp8_e5m2_avx512" "kv_write_bf16_fp8_e5m2_neon";
    KvWrite     F32  Q8_0 0.0 Scaled(quantize_blocks::<f32, Q8_0>) "kv_write_f32_q8_0_scalar" "kv_write_f32_q8_0_avx2" "kv_write_f32_q8_0_avx512" "kv_write_f32_q8_0_neon";
    KvWrite     F16  Q8_0 0.0 Scaled(quantize_blocks::<f16, Q8_0>) "kv_write_f16_q8_0_scalar" "kv_write_f16_q8_0_avx2" "kv_write_f16_q8_0_avx512" "kv_write_f16_q8_0_neon";
    KvWrite     Bf16 Q8_0 0.0 Scaled(quantize_blocks::<bf16, Q8_0>) "kv_write_bf16_q8_0_scalar" "kv_write_bf16_q8_0_avx2" "kv_write_bf16_q8_0_avx512" "kv_write_bf16_q8_0_neon";
    KvWrite     F32  Q4_0 0.0 Scaled(quantize_blocks::<f32, Q4_0>) "kv_write_f32_q4_0_scalar" "kv_write_f32_q4_0_avx2" "kv_write_f32_q4_0_avx512" "kv_write_f32_q4_0_neon";
    KvWrite     F16  Q4_0 0.0 Scaled(quantize_blocks::<f16, Q4_0>) "kv_write_f16_q4_0_scalar" "kv_write_f16_q4_0_avx2" "kv_write_f16_q4_0_avx512" "kv_write_f16_q4_0_neon";
    KvWrite     Bf16 Q4_0 0.0 Scaled(quantize_blocks::<bf16, Q4_0>) "kv_write_bf16_q4_0_scalar" "kv_write_bf16_q4_0_avx2" "kv_write_bf16_q4_0_avx512" "kv_write_bf16_q4_0_neon";
    KvWrite     F32  Q4_1 0.0 Scaled(quantize_blocks::<f32, Q4_1>) "kv_write_f32_q4_1_scalar" "kv_write_f32_q4_1_avx2" "kv_write_f32_q4_1_avx512" "kv_write_f32_q4_1_neon";
    KvWrite     F16  Q4_1 0.0 Scaled(quantize_blocks::<f16, Q4_1>) "kv_write_f16_q4_1_scalar" "kv_write_f16_q4_1_avx2" "kv_write_f16_q4_1_avx512" "kv_write_f16_q4_1_neon";
    KvWrite     Bf16 Q4_1 0.0 Scaled(quantize_blocks::<bf16, Q4_1>) "kv_write_bf16_q4_1_scalar" "kv_write_bf16_q4_1_avx2" "kv_write_bf16_q4_1_avx512" "kv_write_bf16_q4_1_neon";
    KvWrite     F32  Q5_0 0.0 Scaled(quantize_blocks::<f32, Q5_0>) "kv_write_f32_q5_0_scalar" "kv_write_f32_q5_0_avx2" "kv_write_f32_q5_0_avx512" "kv_write_f32_q5_0_neon";
    KvWrite     F16  Q5_0 0.0 Scaled(quantize_blocks::<f16, Q5_0>) "kv_write_f16_q5_0_scalar" "kv_write_f16_q5_0_avx2" "kv_write_f16_q5_0_avx512" "kv_write_f16_q5_0_neon";
    KvWrite     Bf16 Q5_0 0.0 Scaled(quantize_blocks::<bf16, Q5_0>) "kv_write_bf16_q5_0_scalar" "kv_write_bf16_q5_0_avx2" "kv_write_bf16_q5_0_avx512" "kv_write_bf16_q5_0_neon";
    KvWrite     F32  Q5_1 0.0 Scaled(quantize_blocks::<f32, Q5_1>) "kv_write_f32_q5_1_scalar" "kv_write_f32_q5_1_avx2" "kv_write_f32_q5_1_avx512" "kv_write_f32_q5_1_neon";
    KvWrite     F16  Q5_1 0.0 Scaled(quantize_blocks::<f16, Q5_1>) "kv_write_f16_q5_1_scalar" "kv_write_f16_q5_1_avx2" "kv_write_f16_q5_1_avx512" "kv_write_f16_q5_1_neon";
    KvWrite     Bf16 Q5_1 0.0 Scaled(quantize_blocks::<bf16, Q5_1>) "kv_write_bf16_q5_1_scalar" "kv_write_bf16_q5_1_avx2" "kv_write_bf16_q5_1_avx512" "kv_write_bf16_q5_1_neon";
    KvWrite     F32  Iq4Nl 0.0 Scaled(quantize_blocks::<f32, Iq4Nl>) "kv_write_f32_iq4_nl_scalar" "kv_write_f32_iq4_nl_avx2" "kv_write_f32_iq4_nl_avx512" "kv_write_f32_iq4_nl_neon";
    KvWrite     F16  Iq4Nl 0.0 Scaled(quantize_blocks::<f16, Iq4Nl>) "kv_write_f16_iq4_nl_scalar" "kv_write_f16_iq4_nl_avx2" "kv_write_f16_iq4_nl_avx512" "kv_write_f16_iq4_nl_neon";
    KvWrite     Bf16 Iq4Nl 0.0 Scaled(quantize_blocks::<bf16, Iq4Nl>) "kv_write_bf16_iq4_nl_scalar" "kv_write_bf16_iq4_nl_avx2" "kv_write_bf16_iq4_nl_avx512" "kv_write_bf16_iq4_nl_neon";
    KvWrite     F32  Affine8 0.0 Scaled(quantize_affine::<f32, 8>) "kv_write_f32_affine8_scalar" "kv_write_f32_affine8_avx2" "kv_write_f32_affine8_avx512" "kv_write_f32_affine8_neon";
    KvWrite     F16  Affine8 0.0 Scaled(quantize_affine::<f16, 8>) "kv_write_f16_affine8_scalar" "kv_write_f16_affine8_avx2" "kv_write_f16_affine8_avx512" "kv_write_f16_affine8_neon";
    KvWrite     Bf16 Affine8 0.0 Scaled(quantize_affine::<bf16, 8>) "kv_write_bf16_affine8_scalar" "kv_write_bf16_affine8_avx2" "kv_write_bf16_affine8_avx512" "kv_write_bf16_affine8_neon";
    KvWrite     F32  Affine4 0.0 Scaled(quantize_affine::<f32, 4>) "kv_write_f32_affine4_scalar" "kv_write_f32_affine4_avx2" "kv_write_f32_affine4_avx512" "kv_write_f32_affine4_neon";
    KvWrite     F16  Affine4 0.0 Scaled(quantize_affine::<f16, 4>) "kv_write_f16_affine4_scalar" "kv_write_f16_affine4_avx2" "kv_write_f16_affine4_avx512" "kv_write_f16_affine4_neon";
    KvWrite     Bf16 Affine4 0.0 Scaled(quantize_affine::<bf16, 4>) "kv_write_bf16_affine4_scalar" "kv_write_bf16_affine4_avx2" "kv_write_bf16_affine4_avx512" "kv_write_bf16_affine4_neon";
    KvRead      Int8 F32  1e-7 Scaled(dequantize::<f32>)        "kv_read_int8_f32_scalar" "kv_read_int8_f32_avx2" "kv_read_int8_f32_avx512" "kv_read_int8_f32_neon";
    KvRead      Int8 F16  1e-7 Scaled(dequantize::<f16>)        "kv_read_int8_f16_scalar" "kv_read_int8_f16_avx2" "kv_read_int8_f16_avx512" "kv_read_int8_f16_neon";
    KvRead      Int8 Bf16 1e-7 Scaled(dequantize::<bf16>)       "kv_read_int8_bf16_scalar" "kv_read_int8_bf16_avx2" "kv_read_int8_bf16_avx512" "kv_read_int8_bf16_neon";
    KvRead      Fp8E4m3 F32  1e-7 Scaled(decode::<E4m3, f32>)    "kv_read_fp8_e4m3_f32_scalar" "kv_read_fp8_e4m3_f32_avx2" "kv_read_fp8_e4m3_f32_avx512" "kv_read_fp8_e4m3_f32_neon";
    KvRead      Fp8E4m3 F16  1e-7 Scaled(decode::<E4m3, f16>)    "kv_read_fp8_e4m3_f16_scalar" "kv_read_fp8_e4m3_f16_avx2" "kv_read_fp8_e4m3_f16_avx512" "kv_read_fp8_e4m3_f16_neon";
    KvRead      Fp8E4m3 Bf16 1e-7 Scaled(decode::<E4m3, bf16>)   "kv_read_fp8_e4m3_bf16_scalar" "kv_read_fp8_e4m3_bf16_avx2" "kv_read_fp8_e4m3_bf16_avx512" "kv_read_fp8_e4m3_bf16_neon";
    KvRead      Fp8E5m2 F32  1e-7 Scaled(decode::<E5m2, f32>)    "kv_read_fp8_e5m2_f32_scalar" "kv_read_fp8_e5m2_f32_avx2" "kv_read_fp8_e5m2_f32_avx512" "kv_read_fp8_e5m2_f32_neon";
    KvRead      Fp8E5m2 F16  1e-7 Scaled(decode::<E5m2, f16>)    "kv_read_fp8_e5m2_f16_scalar" "kv_read_fp8_e5m2_f16_avx2" "kv_read_fp8_e5m2_f16_avx512" "kv_read_fp8_e5m2_f16_neon";
    KvRead      Fp8E5m2 Bf16 1e-7 Scaled(decode::<E5m2, bf16>)   "kv_read_fp8_e5m2_bf16_scalar" "kv_read_fp8_e5m2_bf16_avx2" "kv_read_fp8_e5m2_bf16_avx512" "kv_read_fp8_e5m2_bf16_neon";
    KvRead      Q8_0 F32 1e-7 Scaled(dequantize_blocks::<Q8_0, f32>) "kv_read_q8_0_f32_scalar" "kv_read_q8_0_f32_avx2" "kv_read_q8_0_f32_avx512" "kv_read_q8_0_f32_neon";
    KvRead      Q8_0 F16 1e-7 Scaled(dequantize_blocks::<Q8_0, f16>) "kv_read_q8_0_f16_scalar" "kv_read_q8_0_f16_avx2" "kv_read_q8_0_f16_avx512" "kv_read_q8_0_f16_neon";
    KvRead      Q8_0 Bf16 1e-7 Scaled(dequantize_blocks::<Q8_0, bf16>) "kv_read_q8_0_bf16_scalar" "kv_read_q8_0_bf16_avx2" "kv_read_q8_0_bf16_avx512" "kv_read_q8_0_bf16_neon";
    KvRead      Q4_0 F32 1e-7 Scaled(dequantize_blocks::<Q4_0, f32>) "kv_read_q4_0_f32_scalar" "kv_read_q4_0_f32_avx2" "kv_read_q4_0_f32_avx512" "kv_read_q4_0_f32_neon";
    KvRead      Q4_0 F16 1e-7 Scaled(dequantize_blocks::<Q4_0, f16>) "kv_read_q4_0_f16_scalar" "kv_read_q4_0_f16_avx2" "kv_read_q4_0_f16_avx512" "kv_read_q4_0_f16_neon";
    KvRead      Q4_0 Bf16 1e-7 Scaled(dequantize_blocks::<Q4_0, bf16>) "kv_read_q4_0_bf16_scalar" "kv_read_q4_0_bf16_avx2" "kv_read_q4_0_bf16_avx512" "kv_read_q4_0_bf16_neon";
    KvRead      Q4_1 F32 1e-7 Scaled(dequantize_blocks::<Q4_1, f32>) "kv_read_q4_1_f32_scalar" "kv_read_q4_1_f32_avx2" "kv_read_q4_1_f32_avx512" "kv_read_q4_1_f32_neon";
    KvRead      Q4_1 F16 1e-7 Scaled(dequantize_blocks::<Q4_1, f16>) "kv_read_q4_1_f16_scalar" "kv_read_q4_1_f16_avx2" "kv_read_q4_1_f16_avx512" "kv_read_q4_1_f16_neon";
    KvRead      Q4_1 Bf16 1e-7 Scaled(dequantize_blocks::<Q4_1, bf16>) "kv_read_q4_1_bf16_scalar" "kv_read_q4_1_bf16_avx2" "kv_read_q4_1_bf16_avx512" "kv_read_q4_1_bf16_neon";
    KvRead      Q5_0 F32 1e-7 Scaled(dequantize_blocks::<Q5_0, f32>) "kv_read_q5_0_f32_scalar" "kv_read_q5_0_f32_avx2" "kv_read_q5_0_f32_avx512" "kv_read_q5_0_f32_neon";
    KvRead      Q5_0 F16 1e-7 Scaled(dequantize_blocks::<Q5_0, f16>) "kv_read_q5_0_f16_scalar" "kv_read_q5_0_f16_avx2" "kv_read_q5_0_f16_avx512" "kv_read_q5_0_f16_neon";
    KvRead      Q5_0 Bf16 1e-7 Scaled(dequantize_blocks::<Q5_0, bf16>) "kv_read_q5_0_bf16_scalar" "kv_read_q5_0_bf16_avx2" "kv_read_q5_0_bf16_avx512" "kv_read_q5_0_bf16_neon";
    KvRead      Q5_1 F32 1e-7 Scaled(dequantize_blocks::<Q5_1, f32>) "kv_read_q5_1_f32_scalar" "kv_read_q5_1_f32_avx2" "kv_read_q5_1_f32_avx512" "kv_read_q5_1_f32_neon";
    KvRead      Q5_1 F16 1e-7 Scaled(dequantize_blocks::<Q5_1, f16>) "kv_read_q5_1_f16_scalar" "kv_read_q5_1_f16_avx2" "kv_read_q5_1_f16_avx512" "kv_read_q5_1_f16_neon";
    KvRead      Q5_1 Bf16 1e-7 Scaled(dequantize_blocks::<Q5_1, bf16>) "kv_read_q5_1_bf16_scalar" "kv_read_q5_1_bf16_avx2" "kv_read_q5_1_bf16_avx512" "kv_read_q5_1_bf16_neon";
    KvRead      Iq4Nl F32 1e-7 Scaled(dequantize_blocks::<Iq4Nl, f32>) "kv_read_iq4_nl_f32_scalar" "kv_read_iq4_nl_f32_avx2" "kv_read_iq4_nl_f32_avx512" "kv_read_iq4_nl_f32_neon";
    KvRead      Iq4Nl F16 1e-7 Scaled(dequantize_blocks::<Iq4Nl, f16>) "kv_read_iq4_nl_f16_scalar" "kv_read_iq4_nl_f16_avx2" "kv_read_iq4_nl_f16_avx512" "kv_read_iq4_nl_f16_neon";
    KvRead      Iq4Nl Bf16 1e-7 Scaled(dequantize_blocks::<Iq4Nl, bf16>) "kv_read_iq4_nl_bf16_scalar" "kv_read_iq4_nl_bf16_avx2" "kv_read_iq4_nl_bf16_avx512" "kv_read_iq4_nl_bf16_neon";
    KvRead      Affine8 F32  1e-7 Scaled(dequantize_affine::<f32, 8>) "kv_read_affine8_f32_scalar" "kv_read_affine8_f32_avx2" "kv_read_affine8_f32_avx512" "kv_read_affine8_f32_neon";
    KvRead      Affine8 F16  1e-7 Scaled(dequantize_affine::<f16, 8>) "kv_read_affine8_f16_scalar" "kv_read_affine8_f16_avx2" "kv_read_affine8_f16_avx512" "kv_read_affine8_f16_neon";
    KvRead      Affine8 Bf16 1e-7 Scaled(dequantize_affine::<bf16, 8>) "kv_read_affine8_bf16_scalar" "kv_read_affine8_bf16_avx2" "kv_read_affine8_bf16_avx512" "kv_read_affine8_bf16_neon";
    KvRead      Affine4 F32  1e-7 Scaled(dequantize_affine::<f32, 4>) "kv_read_affine4_f32_scalar" "kv_read_affine4_f32_avx2" "kv_read_affine4_f32_avx512" "kv_read_affine4_f32_neon";
    KvRead      Affine4 F16  1e-7 Scaled(dequantize_affine::<f16, 4>) "kv_read_affine4_f16_scalar" "kv_read_affine4_f16_avx2" "kv_read_affine4_f16_avx512" "kv_read_affine4_f16_neon";
    KvRead      Affine4 Bf16 1e-7 Scaled(dequantize_affine::<bf16, 4>) "kv_read_affine4_bf16_scalar" "kv_read_affine4_bf16_avx2" "kv_read_affine4_bf16_avx512" "kv_read_affine4_bf16_neon";
    RepeatKv    F32  F32  0.0  Copy(copy::<f32, f32>)           "repeat_kv_f32_scalar" "repeat_kv_f32_avx2" "repeat_kv_f32_avx512" "repeat_kv_f32_neon";
    RepeatKv    F16  F16  0.0  Copy(copy::<f16, f16>)           "repeat_kv_f16_scalar" "repeat_kv_f16_avx2" "repeat_kv_f16_avx512" "repeat_kv_f16_neon";
    RepeatKv    Bf16 Bf16 0.0  Copy(copy::<bf16, bf16>)         "repeat_kv_bf16_scalar" "repeat_kv_bf16_avx2" "repeat_kv_bf16_avx512" "repeat_kv_bf16_neon";
    Attention   F32  F32  1e-5 Attention(attention::<f32>())    "attention_f32_scalar" "attention_f32_avx2" "attention_f32_avx512" "attention_f32_neon";
    Attention   F16  F16  1e-5 Attention(attention::<f16>())    "attention_f16_scalar" "attention_f16_avx2" "attention_f16_avx512" "attention_f16_neon";
    Attention   Bf16 Bf16 1e-5 Attention(attention::<bf16>())   "attention_bf16_scalar" "attention_bf16_avx2" "attention_bf16_avx512" "attention_bf16_neon";
    Attention   Int8 Int8 1e-5 Attention(attention::<i8>())     "attention_int8_scalar" "attention_int8_avx2" "attention_int8_avx512" "attention_int8_neon";
    Attention   Fp8E4m3 Fp8E4m3 1e-5 Attention(attention::<E4m3>()) "attention_fp8_e4m3_scalar" "attention_fp8_e4m3_avx2" "attention_fp8_e4m3_avx512" "attention_fp8_e4m3_neon";
    Attention   Fp8E5m2 Fp8E5m2 1e-5 Attention(attention::<E5m2>()) "attention_fp8_e5m2_scalar" "attention_fp8_e5m2_avx2" "attention_fp8_e5m2_avx512" "attention_fp8_e5m2_neon";
    Attention   Q8_0 Q8_0 1e-5 Attention(block_attention::<Q8_0>()) "attention_q8_0_scalar" "attention_q8_0_avx2" "attention_q8_0_avx512" "attention_q8_0_neon";
    Attention   Q4_0 Q4_0 1e-5 Attention(block_attention::<Q4_0>()) "attention_q4_0_scalar" "attention_q4_0_avx2" "attention_q4_0_avx512" "attention_q4_0_neon";
    Attention   Q4_1 Q4_1 1e-5 Attention(block_attention::<Q4_1>()) "attention_q4_1_scalar" "attention_q4_1_avx2" "attention_q4_1_avx512" "attention_q4_1_neon";
    Attention   Q5_0 Q5_0 1e-5 Attention(block_attention::<Q5_0>()) "attention_q5_0_scalar" "attention_q5_0_avx2" "attention_q5_0_avx512" "attention_q5_0_neon";
    Attention   Q5_1 Q5_1 1e-5 Attention(block_attention::<Q5_1>()) "attention_q5_1_scalar" "attention_q5_1_avx2" "attention_q5_1_avx512" "attention_q5_1_neon";
    Attention   Iq4Nl Iq4Nl 1e-5 Attention(block_attention::<Iq4Nl>()) "attention_iq4_nl_scalar" "attention_iq4_nl_avx2" "attention_iq4_nl_avx512" "attention_iq4_nl_neon";
    Attention   Affine8 Affine8 1e-5 Attention(affine_attention::<8>()) "attention_affine8_scalar" "attention_affine8_avx2" "attention_affine8_avx512" "attention_affine8_neon";
    Attention   Affine4 Affine4 1e-5 Attention(affine_attention::<4>()) "attention_affine4_scalar" "attention_affine4_avx2" "attention_affine4_avx512" "attention_affine4_neon";
    MergeStates F32  F32  1e-6 Merge(merge::<f32>)              "merge_states_f32_scalar" "merge_states_f32_avx2" "merge_states_f32_avx512" "merge_states_f32_neon";
    MergeStates F16  F16  1e-6 Merge(merge::<f16>)              "merge_states_f16_scalar" "merge_states_f16_avx2" "merge_states_f16_avx512" "merge_states_f16_neon";
    MergeStates Bf16 Bf16 1e-6 Merge(merge::<bf16>)             "merge_states_bf16_scalar" "merge_states_bf16_avx2" "merge_states_bf16_avx512" "merge_states_bf16_neon";
    RmsNorm     F32  F32  2e-7 Norm(rms_norm::<f32, f32>)       "rms_norm_f32_f32_scalar" "rms_norm_f32_f32_avx2" "rms_norm_f32_f32_avx512" "rms_norm_f32_f32_neon";
    RmsNorm     F32  F16  2e-7 Norm(rms_norm::<f32, f16>)       "rms_norm_f32_f16_scalar" "rms_norm_f32_f16_avx2" "rms_norm_f32_f16_avx512" "rms_norm_f32_f16_neon";
    RmsNorm     F32  Bf16 2e-7 Norm(rms_norm::<f32, bf16>)      "rms_norm_f32_bf16_scalar" "rms_norm_f32_bf16_avx2" "rms_norm_f32_bf16_avx512" "rms_norm_f32_bf16_neon";
    RmsNorm     F16  F32  2e-7 Norm(rms_norm::<f16, f32>)       "rms_norm_f16_f32_scalar" "rms_norm_f16_f32_avx2" "rms_norm_f16_f32_avx512" "rms_norm_f16_f32_neon";
    RmsNorm     F16  F16  2e-7 Norm(rms_norm::<f16, f16>)       "rms_norm_f16_f16_scalar" "rms_norm_f16_f16_avx2" "rms_norm_f16_f16_avx512" "rms_norm_f16_f16_neon";
    RmsNorm     F16  Bf16 2e-7 Norm(rms_norm::<f16, bf16>)      "rms_norm_f16_bf16_scalar" "rms_norm_f16_bf16_avx2" "rms_norm_f16_bf16_avx512" "rms_norm_f16_bf16_neon";
    RmsNorm     Bf16 F32  2e-7 Norm(rms_norm::<bf16, f32>)      "rms_norm_bf16_f32_scalar" "rms_norm_bf16_f32_avx2" "rms_norm_bf16_f32_avx512" "rms_norm_bf16_f32_neon";
    RmsNorm     Bf16 F16  2e-7 Norm(rms_norm::<bf16, f16>)      "rms_norm_bf16_f16_scalar" "rms_norm_bf16_f16_avx2" "rms_norm_bf16_f16_avx512" "rms_norm_bf16_f16_neon";
    RmsNorm     Bf16 Bf16 2e-7 Norm(rms_norm::<bf16, bf16>)     "rms_norm_bf16_bf16_scalar" "rms_norm_bf16_bf16_avx2" "rms_norm_bf16_bf16_avx512" "rms_norm_bf16_bf16_neon";
    Hadamard    F32  F32  2e-5 Hadamard(hadamard::<f32, f32>)      "hadamard_f32_f32_scalar" "hadamard_f32_f32_avx2" "hadamard_f32_f32_avx512" "hadamard_f32_f32_neon";
    Hadamard    F32  F16  2e-5 Hadamard(hadamard::<f32, f16>)      "hadamard_f32_f16_scalar" "hadamard_f32_f16_avx2" "hadamard_f32_f16_avx512" "hadamard_f32_f16_neon";
    Hadamard    F32  Bf16 2e-5 Hadamard(hadamard::<f32, bf16>)     "hadamard_f32_bf16_scalar" "hadamard_f32_bf16_avx2" "hadamard_f32_bf16_avx512" "hadamard_f32_bf16_neon";
    Hadamard    F16  F32  2e-5 Hadamard(hadamard::<f16, f32>)      "hadamard_f16_f32_scalar" "hadamard_f16_f32_avx2" "hadamard_f16_f32_avx512" "hadamard_f16_f32_neon";
    Hadamard    F16  F16  2e-5 Hadamard(hadamard::<f16, f16>)      "hadamard_f16_f16_scalar" "hadamard_f16_f16_avx2" "hadamard_f16_f16_avx512" "hadamard_f16_f16_neon";
    Hadamard    F16  Bf16 2e-5 Hadamard(hadamard::<f16, bf16>)     "hadamard_f16_bf16_scalar" "hadamard_f16_bf16_avx2" "hadamard_f16_bf16_avx512" "hadamard_f16_bf16_neon";
    Hadamard    Bf16 F32  2e-5 Hadamard(hadamard::<bf16, f32>)     "hadamard_bf16_f32_scalar" "hadamard_bf16_f32_avx2" "hadamard_bf16_f32_avx512" "hadamard_bf16_f32_neon";
    Hadamard    Bf16 F16  2e-5 Hadamard(hadamard::<bf16, f16>)     "hadamard_bf16_f16_scalar" "hadamard_bf16_f16_avx2" "hadamard_bf16_f16_avx512" "hadamard_bf16_f16_neon";
    Hadamard    Bf16 Bf16 2e-5 Hadamard(hadamard::<bf16, bf16>)    "hadamard_bf16_bf16_scalar" "hadamard_bf16_bf16_avx2" "hadamard_bf16_bf16_avx512" "hadamard_bf16_bf16_neon";
    } };
}
pub(crate) use kernel_table;

/// The lines of [`kernel_table`] as entries of the registry.
macro_rules! kernel_lines {
    ($level:ident $($op:ident $src:ident $dst:ident $error:literal $kind:ident($function:expr)
        $scalar:literal $avx2:literal $avx512:literal $neon:literal;)*) => {
        pub(crate) static ENTRIES: &[$crate::kernels::registry::Entry] = {
            use shells::*;
            use $crate::kernels::generic::blocks::{Iq4Nl, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
            &[$($crate::kernels::registry::entry!(
                $level, $op, $src, $dst, None,
                $crate::kernels::shells::column!($level $scalar $avx2 $avx512 $neon),
                $error, $kind($function)
            )),*]
        };
    };
}
pub(crate) use kernel_lines;

/// A kernel's name on a level.
macro_rules! column {
    (Scalar $scalar:literal $avx2:literal $avx512:literal $neon:literal) => {
        $scalar
    };
    (Avx2 $scalar:literal $avx2:literal $avx512:literal $neon:literal) => {
        $avx2
    };
    (Avx512 $scalar:literal $avx2:literal $avx512:literal $neon:literal) => {
        $avx512
    };
    (Neon $scalar:literal $avx2:literal $avx512:literal $neon:literal) => {
        $neon
    };
}
pub(crate) use column;
