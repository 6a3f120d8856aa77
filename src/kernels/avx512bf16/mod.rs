//! AVX-512 with BF16: products of pairs of bf16, summed in f32 (`vdpbf16ps`).
//!
//! A partial level: attention over bf16 keys and values, with one kernel per [`Precision`](super::api::Precision). All
//! other operations, and all instructions of these kernels that are not products or roundings of bf16, are AVX-512's.
//!
//! On AMD's Zen 4 and 5 the instruction has about twice the rate of an FMA. On Intel's Sapphire Rapids it has half of it, so that
//! the level is chosen there only if it is asked for ([`Isa::priority`](crate::isa::Isa)).
//!
//! With `--cfg kvlane_emulate_avx512bf16` the two instructions are emulated, and the level is available wherever AVX-512 is.

mod attention;
pub(super) mod instructions;

use super::partial::partial_kernel_table;
use attention::functions;

partial_kernel_table!(Avx512Bf16);

/// Writes functions with the level's features: [`with_features`](super::partial::with_features).
#[cfg(not(kvlane_emulate_avx512bf16))]
macro_rules! level_functions {
    ($($functions:tt)*) => {
        $crate::cpu::level_features!(Avx512Bf16, with_features! { $($functions)* });
    };
}
#[cfg(kvlane_emulate_avx512bf16)]
macro_rules! level_functions {
    ($($functions:tt)*) => {
        $crate::cpu::level_features!(Avx512, with_features! { $($functions)* });
    };
}
use level_functions;
