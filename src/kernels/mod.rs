//! The kernels: one registry, one vector trait, one generic body per algorithm, one thin shell per level.
//!
//! | where | what |
//! | --- | --- |
//! | [`api`] | operations, argument structs, what the registry says of a kernel |
//! | [`registry`] | every kernel's operation, types, level, name, error bound and function |
//! | [`shells`] | the table of the kernels that every full level has, with their names, and their shells |
//! | `partial` | the table of the kernels of partial levels, and their shells |
//! | [`simd`] | the vector trait |
//! | [`generic`] | the algorithms, over the trait |
//! | [`scalar`], `avx2`, `avx512`, `neon` | the trait for one level |
//! | `loops`, `products` | what the bench measures as the limits of the machine |
//! | `amx` | a partial level: attention over bf16, and over int8 keys, by tile products |
//! | `avxvnni`, `avx512vnni`, `neondotprod`, `neoni8mm` | partial levels: attention over keys in int8 and blocks, by products of integers |
//! | `avx2::bytes` | the same over blocks of four and five bits at AVX2, and what `avxvnni` is made of |
//! | `avx512bf16` | a partial level: attention over bf16, by products of pairs |
//! | `neonbf16` | a partial level: attention over bf16, by products of small matrices |
//!
//! A kernel takes only what an operation has validated; it allocates nothing, starts no thread and keeps no state.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod api;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512bf16;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512vnni;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avxvnni;
pub(crate) mod generic;
#[cfg(feature = "bench")]
pub(crate) mod loops;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neon;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neonbf16;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neondotprod;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) mod neoni8mm;
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
pub(crate) mod partial;
#[cfg(feature = "bench")]
pub(crate) mod products;
pub(crate) mod registry;
pub(crate) mod scalar;
pub(crate) mod shells;
pub(crate) mod simd;
#[cfg(test)]
mod tests;
