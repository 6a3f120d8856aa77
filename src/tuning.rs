//! How loops over a cache prefetch, by CPU.

use crate::cpu;
use crate::isa::Isa;

/// How decode prefetches keys and values. A tuning changes the time of a call, and no bit of its result.
///
/// A [`Context`](crate::Context) has the tuning of this CPU; [`Context::tuned`](crate::Context::tuned) sets another. It serves attention
/// of few query rows at the levels scalar, avx2, avx512 and neon. Prompts at these levels always prefetch into the second-level cache,
/// two lines at a time if [`Self::block`] says so. The levels of matrix products prefetch in ways of their own.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// let tuning = context.tuning().run(Prefetch::SecondLevel).run_distance(32 << 10);
/// assert_eq!(context.tuned(tuning).tuning(), tuning);
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tuning {
    /// Prefetches where the keys of one KV head are read, a block of 64 at a time: the next block is prefetched.
    pub block: Prefetch,
    /// Prefetches where the heads of a token are read together, in the order of memory.
    pub run: Prefetch,
    /// Bytes from what is read to what [`Self::run`] prefetches, at most a block of 64 keys.
    pub run_distance: usize,
}

/// Into which cache of the CPU lines are prefetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefetch {
    /// Into the first-level cache.
    FirstLevel,
    /// Into the second-level cache.
    SecondLevel,
    /// Into the second-level cache, and those 512 bytes ahead into the first-level cache.
    BothLevels,
    /// As [`Self::BothLevels`], for CPUs that bring lines into the second-level cache in pairs: one prefetch for two lines, where a
    /// loop reads two at a time.
    BothLevelsInPairs,
}

impl Prefetch {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::FirstLevel, Self::SecondLevel, Self::BothLevels, Self::BothLevelsInPairs];
}

impl Tuning {
    /// Measured on Intel Cascade Lake. Intel's CPUs bring lines into the second-level cache in pairs (the spatial prefetcher of its
    /// Optimization Reference Manual).
    pub(crate) const DEFAULT: Self = Self {
        block: if cfg!(any(target_arch = "x86", target_arch = "x86_64")) {
            Prefetch::BothLevelsInPairs
        } else {
            Prefetch::BothLevels
        },
        run: Prefetch::FirstLevel,
        run_distance: 12 << 10,
    };

    /// The tuning of this CPU for kernels of a level.
    pub(crate) fn of_this_cpu(isa: Isa) -> Self {
        if !cpu::is_amd() {
            return Self::DEFAULT;
        }
        // Measured on Zen 4, where a prefetch brings one line, and where prefetches into the first-level cache from far away
        // halve the rate of decode over heads that are read together.
        let block = if Isa::Avx512.is_within(isa) { Prefetch::SecondLevel } else { Prefetch::BothLevels };
        Self { block, run: Prefetch::BothLevels, run_distance: 64 << 10 }
    }

    /// Bytes that a prefetch into the second-level cache brings.
    pub(crate) fn fetch_bytes(&self) -> usize {
        if self.block == Prefetch::BothLevelsInPairs { 128 } else { 64 }
    }

    /// Sets [`Self::block`].
    #[must_use]
    pub fn block(mut self, block: Prefetch) -> Self {
        self.block = block;
        self
    }

    /// Sets [`Self::run`].
    #[must_use]
    pub fn run(mut self, run: Prefetch) -> Self {
        self.run = run;
        self
    }

    /// Sets [`Self::run_distance`].
    #[must_use]
    pub fn run_distance(mut self, bytes: usize) -> Self {
        self.run_distance = bytes;
        self
    }
}

/// The tuning of CPUs that the library does not know: that of Intel's, and outside of x86 the same without pairs of lines.
impl Default for Tuning {
    fn default() -> Self {
        Self::DEFAULT
    }
}
