//! Timing of calls.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The length of a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Calls are repeated until a sample takes at least this long, so that the clock's resolution and interrupts do
    /// not matter.
    pub sample: Duration,
    /// Samples are taken for this long,
    pub total: Duration,
    /// and at least this many of them, unless calls are so long that two must do.
    pub least: usize,
}

impl Effort {
    /// For cases.
    pub const fn case(quick: bool) -> Self {
        let (total, least) = if quick { (60, 3) } else { (250, 7) };
        Self { sample: Duration::from_millis(1), total: Duration::from_millis(total), least }
    }

    /// For one loop of a limit. Shorter, because a limit has several loops, of which the best counts.
    pub const fn limit(quick: bool) -> Self {
        let (total, least) = if quick { (12, 3) } else { (40, 5) };
        Self { sample: Duration::from_millis(1), total: Duration::from_millis(total), least }
    }
}

/// Seconds per call.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Of the fastest sample.
    pub best: f64,
    /// Of the median sample.
    pub median: f64,
    /// The number of samples.
    pub samples: usize,
    /// The number of calls per sample.
    pub calls: u64,
}

/// Times `run`, which makes the given number of calls and returns the seconds that they took.
pub fn time(effort: Effort, mut run: impl FnMut(u64) -> f64) -> Timing {
    let start = Instant::now();
    // The first call has cold caches, untouched pages and a low clock rate. It only determines the number of calls per
    // sample.
    let mut calls = 1;
    let mut seconds = run(calls);
    while seconds < effort.sample.as_secs_f64() {
        let wanted = effort.sample.as_secs_f64() * 1.2 / (seconds / calls as f64).max(1e-9);
        calls = (wanted as u64).clamp(calls + 1, calls * 16);
        seconds = run(calls);
    }
    let patience = (effort.total * 8).max(start.elapsed());
    let start = Instant::now();
    let mut samples = Vec::new();
    loop {
        samples.push(run(calls) / calls as f64);
        let (n, spent) = (samples.len(), start.elapsed());
        if n >= effort.least && spent >= effort.total || n >= 2 && spent >= patience {
            break;
        }
    }
    samples.sort_unstable_by(f64::total_cmp);
    Timing { best: samples[0], median: samples[samples.len() / 2], samples: samples.len(), calls }
}

/// The seconds that `calls` calls of `f` take.
pub fn repeat(calls: u64, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    for _ in 0..calls {
        f();
    }
    start.elapsed().as_secs_f64()
}
