//! AArch64 with FEAT_BF16: products of 2 x 4 by 4 x 2 bf16 matrices, summed in f32 (`bfmmla`).
//!
//! A partial level: attention over bf16 keys and values, with one kernel per [`Precision`](super::api::Precision). All
//! other operations, and all instructions of these kernels that are not matrix products, are NEON's.
//!
//! Detection is the standard library's, which asks the operating system.

mod attention;
mod instructions;

use super::partial::partial_kernel_table;
use attention::functions;

partial_kernel_table!(NeonBf16);
