//! The shells and the registry lines of a level that has some kernels.

use crate::kernels::simd::Simd;

/// Writes functions with the features of a level: the shells of its kernels, around bodies that are inlined.
///
/// Called through [`level_features`](crate::cpu::level_features).
macro_rules! with_features {
    {@function [$($feature:literal)*] $function:item} => { $(#[target_feature(enable = $feature)])* $function };
    {$features:tt $($function:item)*} => {
        $($crate::kernels::partial::with_features! { @function $features $function })*
    };
}
pub(crate) use with_features;

/// The most query rows of a KV head in a tile of several, for products of integers over int8 beside a full level `S` that takes `full`: with
/// many registers, units are operands as they lie in the cache, for any number of rows.
pub(crate) const fn direct_rows<S: Simd>(full: usize) -> usize {
    if S::FEW_REGISTERS { full } else { S::DIRECT_ROWS }
}

/// Writes a partial level's part of the registry, `ENTRIES`. Every line is a kernel, with its name on every partial level:
/// operation, source and target format, precision, largest error, function, names. `$more` is an entry of this level alone.
macro_rules! partial_kernel_table {
    ($level:ident $($more:expr)?) => { $crate::kernels::partial::partial_kernel_lines! { $level [$($more)?]
    Attention Bf16 Bf16 Default 4e-3 Attention(functions::<false>()) "attention_bf16_amx"      "attention_bf16_neonbf16"      "attention_bf16_avx512bf16";
    Attention Bf16 Bf16 High    1e-5 Attention(functions::<true>())  "attention_bf16_high_amx" "attention_bf16_high_neonbf16" "attention_bf16_high_avx512bf16";
    } };
}
pub(crate) use partial_kernel_table;

/// Writes the part of the registry of a level that has products of integers over int8 and blocks, and nothing else: `ENTRIES`, and its
/// functions. The proof of the level is made of that of the full level, whose features `level` includes. With `words`, values are
/// weighted by products of integers too, by the shells of [`integer_value_shells`]; with `floats`, as at the full level.
macro_rules! integer_kernels {
    ($isa:ident, $level:ident, $full:ident, $proof:path, $values:ident $error:literal, Int8 $int8:literal $($blocks:ident $name:literal)*) => {
        pub(crate) static ENTRIES: &[$crate::kernels::registry::Entry] = &[
            $crate::kernels::partial::integer_entry!($isa Int8 $int8 $error functions()),
            $($crate::kernels::partial::integer_entry!(
                $isa $blocks $name $error block_functions::<$crate::kernels::generic::blocks::$blocks>()
            )),*
        ];

        /// Everything but the scores, and with `words` the weighted values, is the full level's.
        pub(crate) const fn functions() -> $crate::kernels::api::AttentionFns {
            let full = shells::attention::<i8>();
            let keys = const {
                &$crate::kernels::generic::attention::KeyPieces {
                    scores,
                    quantize_rows: Some(quantize_rows),
                    ..*shells::pieces::<i8>().keys
                }
            };
            let values = $crate::kernels::partial::integer_value_pieces!($values i8, shells::attention::<i8>());
            $crate::kernels::api::AttentionFns {
                pieces: $crate::kernels::generic::attention::Pieces { keys, values, ..full.pieces },
                direct_rows: $crate::kernels::partial::direct_rows::<$full>(full.direct_rows),
                ..full
            }
        }

        $crate::kernels::partial::integer_block_kernels!($level, $full, $proof, $values);

        $crate::cpu::level_features!($level, with_features! {
            /// # Safety
            /// The level is available; `scratch` has `rows` rows of `padded(d)` floats.
            unsafe fn quantize_rows(scratch: &$crate::kernels::generic::attention::Scratch, rows: usize, d: usize) {
                let q = scratch.q;
                // SAFETY: the caller's; the level includes the full one.
                unsafe { $crate::kernels::generic::attention::integer::IntegerQueries { q, rows, d }.run($full::new_unchecked()) }
            }

            /// # Safety
            /// The level is available; the arguments are those of a tile whose rows [`quantize_rows`] has written.
            pub(crate) unsafe fn scores(args: &$crate::kernels::generic::attention::DirectScores) {
                // SAFETY: the caller's.
                unsafe { $crate::kernels::generic::attention::integer::scores($proof($full::new_unchecked()), args) }
            }
        });
    };
}
pub(crate) use integer_kernels;

/// Writes the functions of a level that has products of integers over blocks: `block_functions`, of which [`integer_kernels`] states the
/// parameters. Everything but the scores, and with `words` the weighted values, is the full level's.
macro_rules! integer_block_kernels {
    ($level:ident, $full:ident, $proof:path, $values:ident) => {
        /// Keys are never widened.
        const fn block_functions<U: $crate::kernels::generic::attention::integer_blocks::IntegerUnit>()
        -> $crate::kernels::api::AttentionFns {
            let full = shells::block_attention::<U>();
            let keys = const {
                &$crate::kernels::generic::attention::KeyPieces {
                    widen: None,
                    scores: block_scores::<U>,
                    quantize_rows: Some(quantize_rows_for_blocks),
                    ..*shells::block_attention::<U>().pieces.keys
                }
            };
            let values = $crate::kernels::partial::integer_value_pieces!($values U, shells::block_attention::<U>());
            $crate::kernels::api::AttentionFns {
                pieces: $crate::kernels::generic::attention::Pieces { keys, values, ..full.pieces },
                ..full
            }
        }

        $crate::cpu::level_features!($level, with_features! {
            /// # Safety
            /// The level is available; `scratch` has `rows` rows of `padded(d)` floats.
            unsafe fn quantize_rows_for_blocks(
                scratch: &$crate::kernels::generic::attention::Scratch,
                rows: usize,
                d: usize,
            ) {
                // SAFETY: the caller's.
                unsafe {
                    let p = $proof($full::new_unchecked());
                    $crate::kernels::generic::attention::integer_blocks::quantize_rows(p, scratch, rows, d);
                }
            }

            /// # Safety
            /// The level is available; the arguments are those of a tile whose rows [`quantize_rows_for_blocks`] has written.
            unsafe fn block_scores<U: $crate::kernels::generic::attention::integer_blocks::IntegerUnit>(
                args: &$crate::kernels::generic::attention::DirectScores,
            ) {
                // SAFETY: the caller's.
                unsafe {
                    let p = $proof($full::new_unchecked());
                    $crate::kernels::generic::attention::integer_blocks::scores::<_, U>(p, args, block_products);
                }
            }

            /// # Safety
            /// The level is available; the keys have been taken apart.
            #[inline(never)]
            unsafe fn block_products(args: &$crate::kernels::generic::attention::integer_blocks::Products) {
                // SAFETY: the caller's.
                unsafe {
                    let p = $proof($full::new_unchecked());
                    $crate::kernels::generic::attention::integer_blocks::multiply(p, args);
                }
            }
        });
    };
}
pub(crate) use integer_block_kernels;

/// The pieces for values of [`integer_kernels`].
macro_rules! integer_value_pieces {
    (floats $unit:ident, $functions:expr) => {
        $functions.pieces.values
    };
    (words $unit:ident, $functions:expr) => {
        const {
            &$crate::kernels::generic::attention::ValuePieces {
                integer: Some(integer_values::<$unit>),
                ..*$functions.pieces.values
            }
        }
    };
}
pub(crate) use integer_value_pieces;

/// Writes the shells for values of a level with products of words.
#[cfg(target_arch = "x86_64")]
macro_rules! integer_value_shells {
    ($level:ident, $full:ident, $proof:ident) => {
        $crate::cpu::level_features!(
            $level,
            with_features! {
                /// # Safety
                /// The level is available; the arguments are those of a block.
                unsafe fn integer_values<U: $crate::kernels::generic::attention::integer_values::ValueUnit>(
                    args: &mut $crate::kernels::generic::attention::IntegerValues,
                ) {
                    // SAFETY: the caller's.
                    unsafe {
                        let p = $proof($full::new_unchecked());
                        $crate::kernels::generic::attention::integer_values::values::<_, U>(p, args, value_weights);
                    }
                }

                /// # Safety
                /// The level is available; the arguments are those of a block.
                #[inline(never)]
                unsafe fn value_weights(args: &mut $crate::kernels::generic::attention::integer_values::ValueWeights) {
                    // SAFETY: the caller's.
                    unsafe {
                        let p = $proof($full::new_unchecked());
                        $crate::kernels::generic::attention::integer_values::make_integers(p, args);
                    }
                }
            }
        );
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use integer_value_shells;

/// A line of [`integer_kernels`].
macro_rules! integer_entry {
    ($isa:ident $format:ident $name:literal $error:literal $functions:expr) => {
        $crate::kernels::registry::entry!(
            $isa,
            Attention,
            $format,
            $format,
            Some($crate::kernels::api::Precision::Integer),
            $name,
            $error,
            Attention($functions)
        )
    };
}
pub(crate) use integer_entry;

/// The lines of [`partial_kernel_table`] as entries of the registry.
macro_rules! partial_kernel_lines {
    ($level:ident [$($more:expr)?] $($op:ident $src:ident $dst:ident $precision:ident $error:literal $kind:ident($function:expr)
        $amx:literal $neonbf16:literal $avx512bf16:literal;)*) => {
        pub(crate) static ENTRIES: &[$crate::kernels::registry::Entry] = &[$($crate::kernels::registry::entry!(
            $level, $op, $src, $dst, Some($crate::kernels::api::Precision::$precision),
            $crate::kernels::partial::partial_column!($level $amx $neonbf16 $avx512bf16),
            $error, $kind($function)
        ),)* $($more)?];
    };
}
pub(crate) use partial_kernel_lines;

/// A kernel's name on a partial level.
macro_rules! partial_column {
    (Amx $amx:literal $neonbf16:literal $avx512bf16:literal) => {
        $amx
    };
    (NeonBf16 $amx:literal $neonbf16:literal $avx512bf16:literal) => {
        $neonbf16
    };
    (Avx512Bf16 $amx:literal $neonbf16:literal $avx512bf16:literal) => {
        $avx512bf16
    };
}
pub(crate) use partial_column;
