//! How loops over a cache prefetch, in which order they read, and in which registers they multiply, by CPU.

use crate::cpu;
use crate::isa::Isa;

/// How decode prefetches keys and values, in which order it reads keys, and in which registers prompts compute scores. A tuning changes
/// the time of a call, and no bit of its result.
///
/// A [`Context`](crate::Context) has the tuning of this CPU; [`Context::tuned`](crate::Context::tuned) sets another, and `kvlane tune`
/// measures which is best. It serves attention at the levels scalar, avx2, avx512 and neon. Prompts at these levels
/// always prefetch into the second-level cache, two lines at a time if [`Self::block`] says so. The levels of matrix products prefetch
/// in ways of their own.
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
    /// The order in which the keys of such a block are read.
    pub block_order: KeyOrder,
    /// Prefetches where the heads of a token are read together, in the order of memory.
    pub run: Prefetch,
    /// The same where every KV head has one query row: so little is computed per line there that some CPUs keep ahead by themselves. Keys
    /// and values of at most 64 bytes, and blocks (q8_0 and its kin), go by [`Self::run`] as with several rows.
    pub run_one_row: Prefetch,
    /// The same where a KV head has several query rows and a key or value 512 bytes or more: some CPUs keep ahead of such runs by
    /// themselves.
    pub run_long_heads: Prefetch,
    /// Bytes from what is read to what [`Self::run`], [`Self::run_one_row`] and [`Self::run_long_heads`] prefetch, at most a block of 64 keys.
    pub run_distance: usize,
    /// The tiles of registers in which prompts compute scores at avx512. Other levels have one kind.
    pub score_tiles: ScoreTiles,
}

/// Into which cache of the CPU lines are prefetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefetch {
    /// Nothing is prefetched.
    Off,
    /// Into the first-level cache.
    FirstLevel,
    /// Into the second-level cache.
    SecondLevel,
    /// Into the second-level cache, and those 512 bytes ahead into the first-level cache.
    BothLevels,
    /// As [`Self::BothLevels`], for CPUs that bring lines into the second-level cache in pairs: one prefetch for two lines, where a
    /// loop reads two at a time.
    BothLevelsInPairs,
    /// Into the first-level cache, what the same KV head has a few keys later. The hardware's prefetcher is left to bring what is
    /// farther ahead.
    NextKeys,
}

impl Prefetch {
    /// Every kind.
    pub const ALL: [Self; 6] =
        [Self::Off, Self::FirstLevel, Self::SecondLevel, Self::BothLevels, Self::BothLevelsInPairs, Self::NextKeys];
}

/// The order in which a loop reads the keys of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyOrder {
    /// Keys that are multiplied side by side are neighbours.
    Sequential,
    /// Keys that are multiplied side by side are as far apart as the block allows: several streams, a page or more apart.
    Spread,
}

impl KeyOrder {
    /// Both orders.
    pub const ALL: [Self; 2] = [Self::Sequential, Self::Spread];
}

/// The tiles of registers in which six query rows are multiplied by keys: both have the same sums in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScoreTiles {
    /// One vector of keys, and four lanes of the scores side by side: an element of a query per multiply-add, and few sums to store. For
    /// CPUs that load as many operands as they multiply.
    Narrow,
    /// Four vectors of keys, and copies of the queries: an element of a query for four multiply-adds, and more sums to store.
    Wide,
}

impl ScoreTiles {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::Narrow, Self::Wide];
}

/// A class of CPUs, and its tuning for the kernels of a level.
struct Entry {
    /// As CPUID has it; empty: any.
    vendor: &'static str,
    /// Features that the CPU has, among those that [`cpu::has`] knows.
    features: &'static [&'static str],
    level: Isa,
    tuning: Tuning,
}

/// The first entry that fits serves. `kvlane tune` writes one for the CPU that it runs on.
const TABLE: &[Entry] = &[
    // Zen 4. A prefetch brings one line, and prefetches into the first-level cache from far away halve the rate of decode over heads
    // that are read together.
    Entry {
        vendor: "AuthenticAMD",
        features: &[],
        level: Isa::Avx512,
        tuning: Tuning {
            block: Prefetch::SecondLevel,
            block_order: KeyOrder::Spread,
            run: Prefetch::BothLevels,
            run_one_row: Prefetch::BothLevels,
            run_long_heads: Prefetch::BothLevels,
            run_distance: 64 << 10,
            score_tiles: ScoreTiles::Narrow,
        },
    },
    Entry {
        vendor: "AuthenticAMD",
        features: &["avx512bf16"],
        level: Isa::Avx2,
        tuning: Tuning {
            block: Prefetch::BothLevels,
            block_order: KeyOrder::Spread,
            run: Prefetch::BothLevels,
            run_one_row: Prefetch::BothLevels,
            run_long_heads: Prefetch::BothLevels,
            run_distance: 64 << 10,
            score_tiles: ScoreTiles::Narrow,
        },
    },
    // Zen 3.
    Entry {
        vendor: "AuthenticAMD",
        features: &[],
        level: Isa::Avx2,
        tuning: Tuning {
            block: Prefetch::BothLevels,
            block_order: KeyOrder::Spread,
            run: Prefetch::BothLevels,
            run_one_row: Prefetch::Off,
            run_long_heads: Prefetch::NextKeys,
            run_distance: 64 << 10,
            score_tiles: ScoreTiles::Narrow,
        },
    },
    // Sapphire Rapids and later.
    Entry {
        vendor: "GenuineIntel",
        features: &["avx512fp16"],
        level: Isa::Avx512,
        tuning: Tuning {
            block: Prefetch::BothLevels,
            block_order: KeyOrder::Spread,
            run: Prefetch::BothLevels,
            run_one_row: Prefetch::SecondLevel,
            run_long_heads: Prefetch::SecondLevel,
            run_distance: 12 << 10,
            score_tiles: ScoreTiles::Wide,
        },
    },
    Entry {
        vendor: "GenuineIntel",
        features: &["avx512fp16"],
        level: Isa::Avx2,
        tuning: Tuning {
            block: Prefetch::BothLevels,
            block_order: KeyOrder::Spread,
            run: Prefetch::SecondLevel,
            run_one_row: Prefetch::BothLevels,
            run_long_heads: Prefetch::BothLevels,
            run_distance: 12 << 10,
            score_tiles: ScoreTiles::Wide,
        },
    },
];

impl Tuning {
    /// Measured on Intel Cascade Lake. Intel's CPUs bring lines into the second-level cache in pairs (the spatial prefetcher of its
    /// Optimization Reference Manual).
    pub(crate) const DEFAULT: Self = {
        let x86 = cfg!(any(target_arch = "x86", target_arch = "x86_64"));
        Self {
            block: if x86 { Prefetch::BothLevelsInPairs } else { Prefetch::BothLevels },
            block_order: KeyOrder::Spread,
            run: Prefetch::FirstLevel,
            run_one_row: Prefetch::FirstLevel,
            run_long_heads: Prefetch::FirstLevel,
            run_distance: 12 << 10,
            score_tiles: ScoreTiles::Wide,
        }
    };

    /// The tuning of this CPU for kernels of a level.
    pub(crate) fn of_this_cpu(isa: Isa) -> Self {
        Self::of(cpu::vendor(), cpu::has, isa)
    }

    fn of(vendor: &str, has: impl Fn(&str) -> bool, isa: Isa) -> Self {
        let fits = |entry: &&Entry| {
            (entry.vendor.is_empty() || entry.vendor == vendor)
                && entry.features.iter().all(|feature| has(feature))
                && entry.level.is_within(isa)
        };
        TABLE.iter().find(fits).map_or(Self::DEFAULT, |entry| entry.tuning)
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

    /// Sets [`Self::block_order`].
    #[must_use]
    pub fn block_order(mut self, order: KeyOrder) -> Self {
        self.block_order = order;
        self
    }

    /// Sets [`Self::run`].
    #[must_use]
    pub fn run(mut self, run: Prefetch) -> Self {
        self.run = run;
        self
    }

    /// Sets [`Self::run_one_row`].
    #[must_use]
    pub fn run_one_row(mut self, run: Prefetch) -> Self {
        self.run_one_row = run;
        self
    }

    /// Sets [`Self::run_long_heads`].
    #[must_use]
    pub fn run_long_heads(mut self, run: Prefetch) -> Self {
        self.run_long_heads = run;
        self
    }

    /// Sets [`Self::run_distance`].
    #[must_use]
    pub fn run_distance(mut self, bytes: usize) -> Self {
        self.run_distance = bytes;
        self
    }

    /// Sets [`Self::score_tiles`].
    #[must_use]
    pub fn score_tiles(mut self, tiles: ScoreTiles) -> Self {
        self.score_tiles = tiles;
        self
    }
}

/// The tuning of CPUs that the library does not know: that of Intel's, and outside of x86 the same without pairs of lines.
impl Default for Tuning {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_entry_that_fits_serves() {
        for isa in [Isa::Avx512, Isa::Avx2, Isa::Scalar, Isa::Neon] {
            assert_eq!(Tuning::of("", |_| true, isa), Tuning::DEFAULT);
            assert_eq!(Tuning::of("GenuineIntel", |_| false, isa), Tuning::DEFAULT);
        }
        let amd = |isa| Tuning::of("AuthenticAMD", |_| true, isa);
        assert_eq!(amd(Isa::Scalar), Tuning::DEFAULT);
        assert!(amd(Isa::Avx512).fetch_bytes() == 64 && amd(Isa::Avx2) != Tuning::DEFAULT);
        let intel = |isa| Tuning::of("GenuineIntel", |feature| feature == "avx512fp16", isa);
        assert!(intel(Isa::Avx512) != Tuning::DEFAULT && intel(Isa::Avx512) != intel(Isa::Avx2));
    }

    #[test]
    fn entries_can_be_met() {
        for (i, entry) in TABLE.iter().enumerate() {
            // Entries with features are of x86-64, and other architectures do not know its keys.
            let is_known = entry.features.iter().all(|feature| cpu::KEYS.contains(feature));
            assert!(is_known || !cfg!(target_arch = "x86_64"), "{:?}", entry.features);
            let hidden = TABLE[..i].iter().any(|earlier| {
                (earlier.vendor.is_empty() || earlier.vendor == entry.vendor)
                    && earlier.features.iter().all(|feature| entry.features.contains(feature))
                    && earlier.level.is_within(entry.level)
            });
            assert!(!hidden, "entry {i} never serves");
        }
    }
}
