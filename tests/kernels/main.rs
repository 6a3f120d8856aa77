//! Every kernel of the registry compared with the oracle, at every level of this CPU.
//!
//! This binary has its own harness, because a level that did not run must not look like one that passed. Each test
//! runs once per level. Every call of an operation is counted for the registry entries that served it. At the end the
//! counts are printed and checked. See [`harness`].

#[path = "../common/mod.rs"]
mod common;

mod affine;
mod attention;
mod blocks;
mod cache;
mod errors;
mod fp8;
mod hadamard;
mod harness;
mod int8;
mod invariance;
mod latent;
mod layouts;
mod merge;
mod norm;
mod pack;
mod positions;
mod properties;
mod quantised;
mod rope;
mod semantics;
mod shard;
mod shared_scales;
mod views;
mod write;
mod write_layouts;

fn main() -> std::process::ExitCode {
    harness::run(&[
        attention::TESTS,
        semantics::TESTS,
        rope::TESTS,
        norm::TESTS,
        write::TESTS,
        write_layouts::TESTS,
        pack::TESTS,
        positions::TESTS,
        merge::TESTS,
        int8::TESTS,
        fp8::TESTS,
        blocks::TESTS,
        affine::TESTS,
        hadamard::TESTS,
        invariance::TESTS,
        layouts::TESTS,
        latent::TESTS,
        errors::TESTS,
        properties::TESTS,
        cache::TESTS,
        shard::TESTS,
        shared_scales::TESTS,
        views::TESTS,
    ])
}
