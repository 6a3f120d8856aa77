//! Shared by all test binaries: the oracle, tensors of any layout between guard pages, random numbers.
#![allow(dead_code)] // Each binary uses a part of it.

pub mod affine;
#[cfg(all(kvlane_emulate_amx, target_arch = "x86_64", target_os = "linux"))]
pub mod amx_emulator;
pub mod attention;
pub mod blocks;
pub mod fp8;
pub mod int8;
pub mod memory;
pub mod oracle;
pub mod rng;
pub mod runners;
pub mod tensor;

pub use rng::Rng;
pub use tensor::{Layout, Place, Tensor};

use kvlane::DType;

/// The share of test cases that run: `KVLANE_TEST_SCALE`, by default 1, or less if the kernels are not optimised.
/// About 0.05 is suitable for emulators.
pub fn scale() -> f64 {
    static SCALE: std::sync::OnceLock<f64> = std::sync::OnceLock::new();
    *SCALE.get_or_init(|| match std::env::var("KVLANE_TEST_SCALE") {
        Ok(value) => value.parse().expect("KVLANE_TEST_SCALE is a number"),
        Err(_) if cfg!(debug_assertions) => 0.25,
        Err(_) => 1.0,
    })
}

/// Whether few cases run, for want of time: under emulators and sanitizers.
pub fn few_cases() -> bool {
    scale() < 0.05
}

/// What other programs have recorded in a file of `tests/data`. The crate as it is published comes without.
pub fn recording(name: &str) -> Option<String> {
    // Another package of the repository, below its root, has the same tests.
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|d| d.join(".ci").exists())?;
    Some(std::fs::read_to_string(root.join("tests/data").join(name)).expect("the recording can be read"))
}

/// `n` cases, scaled; at least one. A third of them where caches are quantised: such a setting changes how elements are read, not
/// where they are, and there are many.
pub fn scaled(n: usize) -> usize {
    let share = if attention::quantised() == [None; 2] { 1.0 } else { 1.0 / 3.0 };
    ((n as f64 * scale() * share) as usize).max(1)
}

/// The cases that run: all, or an even selection that includes the first and the last.
pub fn thin<T>(cases: Vec<T>) -> Vec<T> {
    let (n, kept) = (cases.len(), scaled(cases.len()).max(2));
    if kept >= n {
        return cases;
    }
    // Case i is kept where a straight line from 0 to `kept - 1` passes an integer.
    let step = |i: usize| i * (kept - 1) / (n - 1);
    cases.into_iter().enumerate().filter(|&(i, _)| i == 0 || step(i) > step(i - 1)).map(|(_, case)| case).collect()
}

/// Half a unit in the last place of `x` in a type: the error of rounding to nearest.
pub fn half_ulp(dtype: DType, x: f64) -> f64 {
    let x = x.abs();
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => (x * 2f64.powi(-11)).max(2f64.powi(-25)),
        DType::Bf16 => (x * 2f64.powi(-8)).max(2f64.powi(-134)),
    }
}

/// Panics with the sentence if a result is further from the expected value than allowed, or NaN where it must not be.
#[track_caller]
pub fn close(got: f64, want: f64, tolerance: f64, what: impl Fn() -> String) {
    let ok = if want.is_nan() {
        got.is_nan()
    } else if want.is_infinite() {
        got == want
    } else {
        (got - want).abs() <= tolerance
    };
    assert!(ok, "{}: got {got:e}, want {want:e}, off by {:e}, allowed {tolerance:e}", what(), (got - want).abs());
}
