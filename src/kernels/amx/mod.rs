//! AMX: eight tiles of sixteen rows by sixty-four bytes, and products of tiles: of bf16, summed in f32, and of int8, summed in 32 bits.
//!
//! A partial level: attention over bf16 keys and values, with one kernel per [`Precision`](super::api::Precision), and over int8 keys at
//! `Precision::Integer`. All other operations, and all instructions of these kernels that are neither tile products nor roundings to bf16
//! (AVX512-BF16), are AVX-512's.

mod attention;
mod int8;
#[cfg(feature = "bench")]
pub(crate) mod peak;
mod tiles;

use super::partial::{integer_entry, partial_kernel_table};
use attention::functions;

partial_kernel_table!(Amx integer_entry!(Amx Int8 "attention_int8_integer_amx" 2e-3 int8::functions()));

/// Writes functions with the level's features: [`with_features`](super::partial::with_features). Every CPU with AMX has AVX512-BF16, of which
/// emulations of the tiles have no need.
#[cfg(not(kvlane_emulate_amx))]
macro_rules! level_functions {
    ($($functions:tt)*) => {
        $crate::cpu::level_features!(Avx512Bf16, with_features! { $($functions)* });
    };
}
#[cfg(kvlane_emulate_amx)]
macro_rules! level_functions {
    ($($functions:tt)*) => {
        $crate::cpu::level_features!(Avx512Vnni, with_features! { $($functions)* });
    };
}
use level_functions;
