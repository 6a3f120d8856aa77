//! Sequences of calls of the C ABI, valid and hostile, made and checked as by `tests/fuzz`. The input replaces the
//! random numbers, so that the coverage of a call guides the next.
#![no_main]

#[path = "../../fuzz/abi.rs"]
#[allow(dead_code)] // The lists of fields are for the tests of the header.
mod abi;
#[path = "../../fuzz/attention.rs"]
mod attention;
#[path = "../../fuzz/caches.rs"]
mod caches;
#[path = "../../fuzz/call.rs"]
mod call;
#[path = "../../fuzz/chunks.rs"]
mod chunks;
mod common;
#[path = "../../fuzz/memory.rs"]
mod memory;
#[path = "../../fuzz/places.rs"]
mod places;
#[path = "../../fuzz/shards.rs"]
mod shards;
#[path = "../../fuzz/targets.rs"]
#[allow(dead_code)] // Names and weights are for the random calls.
mod targets;

use call::{Call, World};
use common::Rng;
// Links the library, whose symbols `abi` declares.
use kvlane as _;
use libfuzzer_sys::fuzz_target;
use targets::TARGETS;

/// The maximum number of calls per input.
const MOST: usize = 12;

thread_local! {
    static WORLD: World = World::new();
}

fuzz_target!(|bytes: &[u8]| {
    let mut rng = Rng::from_bytes(bytes);
    WORLD.with(|world| {
        for _ in 0..MOST {
            let target = &TARGETS[rng.below(TARGETS.len())];
            (target.run)(Call::new(rng.clone(), world));
            if rng.is_empty() {
                break;
            }
        }
    });
});
