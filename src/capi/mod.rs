//! The C ABI: every `kvl_*` symbol, and nothing else that is exported.
//!
//! An export does four things: it enters the guard ([`guard`]), copies and checks the caller's structs and numbers
//! ([`sized`], [`arguments`]), wraps the caller's threads ([`runner`]), and calls the raw form of an operation, which
//! validates everything else. It knows no kernel, allocates nothing in a call that computes, and has no state but the
//! last error of each thread.
//!
//! A file holds a subject: its constants, its structs with their layout, its exports and the conversion of its arguments.
//! Three rules keep the types stable. A struct that may grow begins with its own size, grows only at its end, and a new
//! field of zero means what a caller without that field means. A struct that is used in arrays or inside others
//! ([`kvl_view`](views::kvl_view), [`kvl_kv_layer`](cache::kvl_kv_layer), [`kvl_attention_state`](merge::kvl_attention_state),
//! ...) never changes, and has a reserved field where one may be needed. Enumerations are integers with named values,
//! because an integer from C may hold any value; constants are plain `i32`, because cbindgen omits constants of an alias.
//! Sizes and offsets are asserted beside each struct and once more, from the other side, in `ffi-tests/layout.c`.
//!
//! Comments on exports and public types are the header's: cbindgen copies them (`build.rs`, feature `regen-header`). Each
//! function's ends with a line on thread safety and one on bad input. The header is committed as `include/kvlane.h`; a C++17
//! layer over it is `include/kvlane.hpp`; the programs that test the ABI are in `ffi-tests`.
#![allow(non_camel_case_types)]

// What the exports are made of.
mod arguments;
mod guard;
mod sized;

// The exports by subject, in the order in which the header has them (`build.rs` lists the files).
mod attention;
mod cache;
mod chunks;
mod context;
mod copies;
mod dtype;
mod format;
mod hadamard;
mod isa;
mod kernels;
mod layout;
mod library;
mod masks;
mod memory;
mod merge;
mod norm;
mod plan;
mod pool;
mod prefix;
mod read;
mod rope;
mod runner;
mod scales;
mod shard;
mod status;
mod tuning;
mod views;
mod write;
