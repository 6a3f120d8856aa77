//! Random calls of every function of the C ABI, valid and hostile.
//!
//! The memory of a call consists of blocks of exactly the sizes that its arguments state, filled with NaN outside of
//! valid elements. Whatever the arguments are (shapes, strides, null, sizes of structs, wrong values, lists, lengths
//! of buffers), one of two outcomes must follow. Either an error with a sentence, and no byte has changed. Or success:
//! only the elements of the outputs have changed, every view lies inside its block, and if all visible inputs are
//! finite, so are all outputs. A call without spoiled arguments must succeed. With AddressSanitizer (the step
//! `sanitize` of `.ci/run`), a read outside of a block ends the process too.
//!
//! `KVLANE_FUZZ_CALLS` is the number of calls, and `KVLANE_FUZZ_SEED` selects other calls. A call depends only on the
//! seed and its number. The number of a failing call is printed, and `KVLANE_FUZZ_CALL` repeats it.
//!
//! Not tested is what no library can check: lists with fewer entries than documented, and invalid views without a
//! size.
#![cfg(feature = "capi")]

#[path = "../common/mod.rs"]
#[allow(unused_imports)] // Nothing but numbers are drawn from it.
mod common;

mod abi;
mod attention;
mod caches;
mod call;
mod chunks;
mod memory;
mod places;
mod shards;
mod targets;

use abi::*;
use call::{Call, World};
use common::Rng;
// Links the library, whose symbols `abi` declares.
use kvlane as _;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use targets::{TARGETS, Target};

/// The least share of calls that succeed with an effect, for functions with enough calls.
const VALID: f64 = 0.3;

/// The longest time that this process computes during a call.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest time of a call that waits, for a thread or for its turn on a busy machine.
const LONGEST_WAIT: Duration = Duration::from_secs(1200);

static SEED: AtomicU64 = AtomicU64::new(0);
static CALL: AtomicU64 = AtomicU64::new(u64::MAX);

fn announce() {
    let (seed, call) = (SEED.load(Ordering::Relaxed), CALL.load(Ordering::Relaxed));
    if call != u64::MAX {
        eprintln!("again: KVLANE_FUZZ_SEED={seed} KVLANE_FUZZ_CALL={call} cargo test --features capi --test fuzz");
    }
}

/// AddressSanitizer calls this when it has found an error, before it ends the process.
#[unsafe(no_mangle)]
extern "C" fn __asan_on_error() {
    announce();
}

/// What this process has computed so far.
fn computed() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: space for the result.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Ends the process if a call takes too long, for example in an endless loop.
fn watch() {
    std::thread::spawn(|| {
        let mut since = (u64::MAX, computed(), Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let call = CALL.load(Ordering::Relaxed);
            if call != since.0 {
                since = (call, computed(), Instant::now());
                continue;
            }
            let (busy, waited) = (computed() - since.1, since.2.elapsed());
            if call != u64::MAX && (busy > PATIENCE || waited > LONGEST_WAIT) {
                eprintln!("a call has not come back for {waited:?}, of which it computed for {busy:?}");
                announce();
                std::process::abort();
            }
        }
    });
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}, not a number")))
}

/// The export of call `i`, and its random numbers.
fn plan(seed: u64, i: u64) -> (&'static Target, Rng) {
    let mut rng = Rng::new(Rng::new(seed).u64() ^ i.wrapping_mul(0x9e6c_63d0_9759_27a5));
    let mut at = rng.below(TARGETS.iter().map(|t| t.weight).sum());
    let target = TARGETS.iter().find(|t| {
        let here = at < t.weight;
        at = at.saturating_sub(t.weight);
        here
    });
    (target.expect("a target for every weight"), rng)
}

#[test]
fn random_calls() {
    let seed = number("KVLANE_FUZZ_SEED").unwrap_or(1);
    let calls = number("KVLANE_FUZZ_CALLS").unwrap_or(common::scaled(20_000) as u64);
    let one = number("KVLANE_FUZZ_CALL");
    SEED.store(seed, Ordering::Relaxed);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        announce();
    }));

    watch();
    let world = World::new();
    let mut counts: BTreeMap<&str, BTreeMap<i32, u64>> = BTreeMap::new();
    let mut slowest = (Duration::ZERO, 0);
    for i in one.map_or(0..calls, |i| i..i + 1) {
        let (target, rng) = plan(seed, i);
        CALL.store(i, Ordering::Relaxed);
        let start = Instant::now();
        let status = (target.run)(Call::new(rng, &world));
        slowest = slowest.max((start.elapsed(), i));
        *counts.entry(target.name).or_default().entry(status).or_default() += 1;
    }
    CALL.store(u64::MAX, Ordering::Relaxed);

    println!(
        "seed {seed}: {calls} calls on {} levels; the slowest, {}, took {:?}",
        world.contexts.len(),
        slowest.1,
        slowest.0
    );
    println!("{:34} {:>9} {:>7}  calls by status", "function", "calls", "valid");
    let mut idle = Vec::new();
    for (name, by_status) in &counts {
        let all: u64 = by_status.values().sum();
        let share = by_status.get(&0).copied().unwrap_or(0) as f64 / all as f64;
        let list: Vec<String> = by_status.iter().map(|(status, n)| format!("{status}: {n}")).collect();
        println!("{name:34} {all:9} {:6.1}%  {}", 100.0 * share, list.join(", "));
        if all >= 100 && share < VALID {
            idle.push(*name);
        }
    }
    assert!(idle.is_empty(), "fewer than {VALID} of the calls of {idle:?} did anything");
    if calls >= 10_000 && one.is_none() {
        assert_eq!(counts.len(), TARGETS.len(), "not every function has been called");
    }
}

#[test]
fn every_export_is_called() {
    // The list with which the symbols of the shared library are compared.
    let source = include_str!("../ffi.rs");
    let list = source.split_once("const EXPORTS: &[&str] = &[").and_then(|(_, rest)| rest.split_once("];"));
    let exports: BTreeSet<&str> = list.expect("a list of exports").0.split('"').skip(1).step_by(2).collect();
    let called: BTreeSet<&str> = TARGETS.iter().map(|t| t.name).collect();
    assert_eq!(called, exports, "tests/fuzz/targets.rs has a function for each export");
}

#[test]
fn every_field_is_known() {
    let header = include_str!("../../include/kvlane.h");
    let known: BTreeMap<&str, &[&str]> = STRUCTS.iter().copied().collect();
    let structs = header_structs(header);
    assert!(structs.len() >= 17, "the header has changed its form");
    for (name, fields) in &structs {
        assert_eq!(
            known.get(name.as_str()).copied().unwrap_or(&[]),
            fields,
            "the fields of {name} in tests/fuzz/abi.rs"
        );
    }
    assert_eq!(structs.len(), STRUCTS.len());
}
