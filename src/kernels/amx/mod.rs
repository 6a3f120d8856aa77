//! AMX: eight tiles of sixteen rows by sixty-four bytes, and products of bf16 tiles that are summed in f32.
//!
//! A partial level: attention over bf16 keys and values, with one kernel per [`Precision`](super::api::Precision). All
//! other operations, and all instructions of these kernels that are not tile products, are AVX-512's.

mod attention;
#[cfg(feature = "bench")]
pub(crate) mod peak;
mod tiles;

use super::partial::partial_kernel_table;
use attention::functions;

partial_kernel_table!(Amx);
