//! The limits of the machine: the rates of loops that only read, copy, multiply or exponentiate.
//!
//! A limit is the best rate of several loops. Which loop reads fastest depends on the CPU and on the level of memory:
//! the hardware prefetcher follows one stream to the end of a page, software prefetches cross pages, and several
//! streams keep more cache lines in flight. Huge pages raise the rate of memory, on some CPUs to twice that of small ones, so
//! that a limit is one of a kind of pages.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::data::{Aligned, Pages};
use super::machine;
use super::timing::{Effort, time};
use super::{Error, Result};
use crate::loops::{self, LINE, Products};
use crate::{Isa, Rayon, Runner, Serial};

/// The threads of kernels and limits: the calling thread, or a pool.
pub struct Threads {
    pool: Option<rayon::ThreadPool>,
}

impl Threads {
    /// `count` threads.
    ///
    /// # Errors
    /// `count` is 0 or too large, or the system cannot start them.
    pub fn new(count: usize) -> Result<Self> {
        const MOST: usize = 1024;
        if !(1..=MOST).contains(&count) {
            return Err(Error::new(format!("{count} threads; it takes 1 to {MOST}")));
        }
        if count == 1 {
            return Ok(Self { pool: None });
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|i| format!("bench-{i}")).build();
        Ok(Self { pool: Some(pool.map_err(|e| Error::new(format!("starting {count} threads: {e}")))?) })
    }

    /// The number of threads.
    pub fn count(&self) -> usize {
        self.pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads)
    }

    /// Runs `f` with its index on every thread. Returns the seconds from when all threads are ready until the last is
    /// done.
    fn seconds(&self, f: &(dyn Fn(usize) + Sync)) -> f64 {
        let Some(pool) = &self.pool else {
            let start = Instant::now();
            f(0);
            return start.elapsed().as_secs_f64();
        };
        let ready = AtomicUsize::new(0);
        let all = self.count();
        let each = pool.broadcast(|context| {
            ready.fetch_add(1, Ordering::AcqRel);
            while ready.load(Ordering::Acquire) < all {
                // Yield, because there may be fewer CPUs than threads.
                std::thread::yield_now();
            }
            let start = Instant::now();
            f(context.index());
            (start, Instant::now())
        });
        // From the first start, because threads take turns if there are fewer CPUs.
        let (first, last) = (each.iter().map(|t| t.0).min(), each.iter().map(|t| t.1).max());
        first.zip(last).map_or(0.0, |(first, last)| last.duration_since(first).as_secs_f64())
    }
}

impl Runner for Threads {
    fn num_threads(&self) -> usize {
        self.count()
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        match &self.pool {
            Some(pool) => Rayon::pool(pool).run(n, task),
            None => Serial.run(n, task),
        }
    }
}

/// A limit, and the loop that reached it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// Bytes, operations or exponentials per second.
    pub rate: f64,
    /// The fastest loop.
    pub by: String,
}

/// A kind of limit. The bytes of [`Self::Copy`] and [`Self::Update`] are bytes read plus bytes written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Reading this many bytes repeatedly.
    Read(usize, Pages),
    /// Copying one half of this many bytes to the other half.
    Copy(usize, Pages),
    /// Changing half of this many bytes in place; each is read and written.
    Update(usize, Pages),
    /// f32 multiply-adds, two operations each.
    Fma,
    /// Products of bf16 added up in f32, two operations each.
    Bf16Dot,
    /// Products of 8-bit integers added up in 32 bits, two operations each.
    Int8Dot,
    /// Products of tiles of bf16.
    Bf16Tiles,
    /// Products of tiles of 8-bit integers.
    Int8Tiles,
    /// Exponentials with the accuracy that softmax needs.
    Exp,
}

impl Kind {
    /// The products that some CPUs have beside multiply-adds.
    pub const PRODUCTS: [Self; 4] = [Self::Bf16Dot, Self::Int8Dot, Self::Bf16Tiles, Self::Int8Tiles];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read(..) => "read",
            Self::Copy(..) => "copy",
            Self::Update(..) => "update",
            Self::Fma => "fma",
            Self::Bf16Dot => "bf16 dot",
            Self::Int8Dot => "int8 dot",
            Self::Bf16Tiles => "bf16 tiles",
            Self::Int8Tiles => "int8 tiles",
            Self::Exp => "exp",
        }
    }

    /// Whether this CPU has what is measured, in the registers of a level.
    pub fn is_available(self, isa: Isa) -> bool {
        isa.is_available() && self.products().is_none_or(|products| loops::loop_of(isa, products).is_some())
    }

    fn products(self) -> Option<Products> {
        match self {
            Self::Bf16Dot => Some(Products::Bf16),
            Self::Int8Dot => Some(Products::Int8),
            Self::Bf16Tiles => Some(Products::Bf16Tiles),
            Self::Int8Tiles => Some(Products::Int8Tiles),
            Self::Read(..) | Self::Copy(..) | Self::Update(..) | Self::Fma | Self::Exp => None,
        }
    }
}

/// A loop over a slice, repeated.
type ReadLoop = fn(Isa, &[f32], u64);

/// Prefetch distances, in bytes: what is read until a line in the second-level cache is due is more than the first level holds.
const NEAR: usize = 512;
const FAR: usize = 4096;

const READS: [(&str, ReadLoop); 12] = [
    ("1 stream", loops::read::<1, 0, 0>),
    ("1 stream, near", loops::read::<1, NEAR, 0>),
    ("1 stream, far", loops::read::<1, 0, FAR>),
    ("2 streams", loops::read::<2, 0, 0>),
    ("2 streams, near", loops::read::<2, NEAR, 0>),
    ("2 streams, far", loops::read::<2, 0, FAR>),
    ("4 streams", loops::read::<4, 0, 0>),
    ("4 streams, near", loops::read::<4, NEAR, 0>),
    ("4 streams, far", loops::read::<4, 0, FAR>),
    ("8 streams", loops::read::<8, 0, 0>),
    ("8 streams, near", loops::read::<8, NEAR, 0>),
    ("8 streams, far", loops::read::<8, 0, FAR>),
];

const EXPS: [(&str, ReadLoop); 3] =
    [("1 vector", loops::exp::<1>), ("2 vectors", loops::exp::<2>), ("4 vectors", loops::exp::<4>)];

type CopyLoop = fn(Isa, &[f32], &mut [f32], u64);

fn copy_by_memcpy(_: Isa, src: &[f32], dst: &mut [f32], passes: u64) {
    for _ in 0..passes {
        black_box(&mut *dst).copy_from_slice(black_box(src));
    }
}

const COPIES: [(&str, CopyLoop); 2] = [("vectors", loops::copy), ("memcpy", copy_by_memcpy)];

/// Measures limits and keeps the results.
pub struct Limits {
    quick: bool,
    /// By [`Pages`].
    memory: [Option<Aligned<f32>>; Pages::ALL.len()],
    found: BTreeMap<(u32, usize, Kind), Found>,
}

/// A limit, and what every loop reached when it was measured for the first time.
struct Found {
    limit: Limit,
    loops: BTreeMap<String, f64>,
}

impl Limits {
    /// Without measurements. `quick` shortens each measurement.
    pub fn new(quick: bool) -> Self {
        Self { quick, memory: [const { None }; Pages::ALL.len()], found: BTreeMap::new() }
    }

    /// Measures a limit of a level on `threads` threads. The first call runs every loop, later calls the loop that was
    /// fastest, because rates change over time. [`Self::best`] returns the best of all calls.
    ///
    /// # Errors
    /// The CPU lacks the level.
    pub fn measure(&mut self, threads: &Threads, isa: Isa, kind: Kind) -> Result<Limit> {
        let quick = self.quick;
        if !kind.is_available(isa) {
            return Err(Error::new(format!(
                "this CPU has no {} in the registers of {isa}, so there is no limit to measure",
                kind.name()
            )));
        }
        let key = (isa as u32, threads.count(), kind);
        let winner = self.found.get(&key).map(|found| found.limit.by.clone());
        let wanted = |by: &str| winner.as_deref().is_none_or(|w| w == by);
        let memory = match kind {
            Kind::Read(bytes, pages) | Kind::Copy(bytes, pages) | Kind::Update(bytes, pages) => {
                let floats = bytes.div_ceil(size_of::<f32>()).next_multiple_of(2 * LINE);
                self.memory(floats, pages)?
            }
            _ => &mut [],
        };
        let mut now = Limit { rate: 0.0, by: String::new() };
        let mut every = BTreeMap::new();
        let effort = Effort::limit(quick);
        let mut seen = |by: &str, amount: f64, run: &mut dyn FnMut(u64) -> f64| {
            let rate = amount / time(effort, run).best;
            every.insert(by.to_owned(), rate);
            if rate > now.rate {
                now = Limit { rate, by: by.to_owned() };
            }
        };
        let all = threads.count();
        match kind {
            Kind::Read(bytes, _) => {
                let data = &memory[..(bytes / size_of::<f32>()).max(1)];
                let parts: Vec<&[f32]> = split(data.len(), all).map(|(at, n)| &data[at..at + n]).collect();
                for (by, read) in READS.into_iter().filter(|(by, _)| wanted(by)) {
                    seen(by, bytes as f64, &mut |calls| threads.seconds(&|thread| read(isa, parts[thread], calls)));
                }
            }
            Kind::Copy(bytes, _) => {
                let n = (bytes / 2 / size_of::<f32>()).max(1);
                let (src, dst) = memory.split_at_mut(n.next_multiple_of(LINE));
                let (src, mut dst) = (&src[..n], &mut dst[..n]);
                let mut parts = Vec::new();
                for (at, n) in split(n, all) {
                    let (mine, rest) = dst.split_at_mut(n);
                    dst = rest;
                    parts.push(Mutex::new((&src[at..at + n], mine)));
                }
                for (by, copy) in COPIES.into_iter().filter(|(by, _)| wanted(by)) {
                    seen(by, bytes as f64, &mut |calls| {
                        threads.seconds(&|thread| {
                            // One uncontended lock per sample.
                            if let Ok(mut part) = parts[thread].lock() {
                                let (src, dst) = &mut *part;
                                copy(isa, src, dst, calls);
                            }
                        })
                    });
                }
            }
            Kind::Update(bytes, _) => {
                let n = (bytes / 2 / size_of::<f32>()).max(1);
                let mut data = &mut memory[..n];
                let mut parts = Vec::new();
                for (_, n) in split(n, all) {
                    let (mine, rest) = data.split_at_mut(n);
                    data = rest;
                    parts.push(Mutex::new(mine));
                }
                seen("vectors", bytes as f64, &mut |passes| {
                    threads.seconds(&|thread| {
                        if let Ok(mut part) = parts[thread].lock() {
                            loops::update(isa, &mut part[..], passes);
                        }
                    })
                });
            }
            Kind::Fma => {
                const STEPS: u64 = 1000;
                let amount = 2 * STEPS as usize * loops::products(isa) * all;
                let steps = |calls: u64| threads.seconds(&|_| loops::multiply_add(isa, STEPS * calls));
                seen("registers", amount as f64, &mut { steps });
            }
            Kind::Bf16Dot | Kind::Int8Dot | Kind::Bf16Tiles | Kind::Int8Tiles => {
                const STEPS: u64 = 1000;
                if let Some(product) = kind.products().and_then(|products| loops::loop_of(isa, products)) {
                    let amount = STEPS as usize * product.operations * all;
                    let steps = |calls: u64| threads.seconds(&|_| product.run(STEPS * calls));
                    seen(product.by, amount as f64, &mut { steps });
                }
            }
            Kind::Exp => {
                // In the first-level cache, and between -8 and 0, like logits after the subtraction of their maximum.
                let data: Vec<f32> = (0..2048).map(|i| i as f32 / -256.0).collect();
                let amount = data.len() * all;
                for (by, exp) in EXPS.into_iter().filter(|(by, _)| wanted(by)) {
                    seen(by, amount as f64, &mut |passes| threads.seconds(&|_| exp(isa, &data, passes)));
                }
            }
        }
        let best = self.found.entry(key).or_insert_with(|| Found { limit: now.clone(), loops: every });
        if now.rate > best.limit.rate {
            best.limit = now.clone();
        }
        Ok(now)
    }

    /// At least `floats` numbers on pages of a kind.
    fn memory(&mut self, floats: usize, pages: Pages) -> Result<&mut [f32]> {
        let memory = &mut self.memory[pages as usize];
        if memory.as_ref().is_some_and(|memory| memory.len() < floats) {
            *memory = None; // Never allocate both at once.
        }
        let memory = match memory {
            Some(memory) => memory,
            None => memory.insert(Aligned::new(floats, pages)?),
        };
        Ok(memory.as_mut_slice())
    }

    /// The share of the memory on pages of a kind that the operating system has given huge pages, if it says so.
    pub fn huge_share(&self, pages: Pages) -> Option<f64> {
        let memory = self.memory[pages as usize].as_ref()?.as_slice();
        machine::huge_share(memory.as_ptr().addr(), size_of_val(memory))
    }

    /// The best rates of a level on `threads` threads.
    pub fn best(&self, threads: usize, isa: Isa) -> impl Iterator<Item = (Kind, &Limit)> {
        self.of(threads, isa).map(|(kind, found)| (kind, &found.limit))
    }

    /// The rates of all loops for the kinds that [`Self::best`] has.
    pub fn loops(&self, threads: usize, isa: Isa) -> impl Iterator<Item = (Kind, &BTreeMap<String, f64>)> {
        self.of(threads, isa).map(|(kind, found)| (kind, &found.loops))
    }

    fn of(&self, threads: usize, isa: Isa) -> impl Iterator<Item = (Kind, &Found)> {
        self.found.iter().filter(move |(key, _)| (key.0, key.1) == (isa as u32, threads)).map(|(key, f)| (key.2, f))
    }
}

/// Splits `n` floats into `parts` at cache lines: the first index and the length of each part.
fn split(n: usize, parts: usize) -> impl Iterator<Item = (usize, usize)> {
    let at = move |part: usize| if part == parts { n } else { n * part / parts / LINE * LINE };
    (0..parts).map(move |part| (at(part), at(part + 1) - at(part)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_plausible_at_every_level() {
        let threads = [Threads::new(1).unwrap(), Threads::new(3).unwrap()];
        let mut limits = Limits::new(true);
        for isa in Isa::ALL.into_iter().filter(|l| l.is_available()) {
            for threads in &threads {
                // A size that is divisible neither by vectors nor by threads.
                let [small, huge] = Pages::ALL;
                let kinds = [Kind::Read(10_004, small), Kind::Read(5 << 20, huge), Kind::Copy(10_008, small)];
                let kinds = kinds.into_iter().chain([Kind::Update(10_008, huge), Kind::Fma, Kind::Exp]);
                let kinds: Vec<Kind> =
                    kinds.chain(Kind::PRODUCTS.into_iter().filter(|kind| kind.is_available(isa))).collect();
                for &kind in &kinds {
                    for _ in 0..2 {
                        let limit = limits.measure(threads, isa, kind).unwrap();
                        assert!(limit.rate > 0.0 && limit.rate.is_finite() && !limit.by.is_empty(), "{isa} {kind:?}");
                    }
                }
                assert_eq!(limits.best(threads.count(), isa).count(), kinds.len());
                for kind in Kind::PRODUCTS.into_iter().filter(|kind| !kind.is_available(isa)) {
                    let message = limits.measure(threads, isa, kind).unwrap_err().to_string();
                    assert!(message.contains(kind.name()), "{message}");
                }
                let loops = |wanted| limits.loops(threads.count(), isa).find(|(kind, _)| *kind == wanted).unwrap().1;
                assert_eq!((loops(kinds[0]).len(), loops(Kind::Fma).len()), (READS.len(), 1));
            }
        }
        assert!(Threads::new(0).is_err() && Threads::new(1 << 20).is_err());
    }

    #[test]
    fn parts_cover_everything_once() {
        for (n, parts) in [(0, 1), (1, 3), (100, 3), (4096, 7)] {
            let mut next = 0;
            for (at, len) in split(n, parts) {
                assert_eq!(at, next);
                next += len;
            }
            assert_eq!(next, n);
        }
    }
}
