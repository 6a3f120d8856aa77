//! How work is spread over threads: by a runner of the caller's. The library starts no threads unless it is asked for a pool.

#[cfg(feature = "rayon")]
mod thread_pool;

#[cfg(feature = "rayon")]
pub use thread_pool::ThreadPool;

use crate::error::{Result, Status};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Runs `n` independent tasks, on any number of threads.
///
/// An implementation calls `task(i)` exactly once for every `i` in `0..n` and returns when all calls have returned; it
/// returns `false` if it could not. No bit of a result depends on the runner.
pub trait Runner: Sync {
    /// How many tasks can run at the same time. Operations start at most this many.
    fn num_threads(&self) -> usize;

    /// Whether the runner can run tasks at all; asked before an operation writes anything with more than one thread.
    ///
    /// # Errors
    /// [`Status::Parallel`], with a sentence that says why not.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Whether threads sleep between calls, so that to wake them costs tens of microseconds: smaller calls than that then take one thread.
    fn sleeps(&self) -> bool {
        false
    }

    /// Runs `task(0)`, ..., `task(n - 1)`.
    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool;
}

/// Runs everything on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Runner for Serial {
    fn num_threads(&self) -> usize {
        1
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        (0..n).for_each(task);
        true
    }
}

/// Runs tasks on a rayon pool: the global one, or one of the caller's.
///
/// The threads of such a pool do not survive `fork`, and rayon does not notice: an operation with it waits for ever in the child
/// process. A [`ThreadPool`] notices.
#[cfg(feature = "rayon")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rayon<'a> {
    pool: Option<&'a rayon::ThreadPool>,
}

#[cfg(feature = "rayon")]
impl<'a> Rayon<'a> {
    /// Tasks run on `pool`.
    pub fn pool(pool: &'a rayon::ThreadPool) -> Self {
        Self { pool: Some(pool) }
    }
}

#[cfg(feature = "rayon")]
impl Runner for Rayon<'_> {
    fn sleeps(&self) -> bool {
        true
    }

    fn num_threads(&self) -> usize {
        self.pool.map_or_else(rayon::current_num_threads, rayon::ThreadPool::current_num_threads)
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        use rayon::prelude::*;
        // A parallel iterator uses `join`, whose jobs live on the stack; `spawn` would allocate each.
        let work = || (0..n).into_par_iter().with_max_len(1).for_each(task);
        match self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
        true
    }
}

/// Runs `tile(worker, t)` for every `t` in `0..tiles` on at most `workers` workers. A free worker takes the next tile;
/// `worker` is the index of its scratch memory. A failure of the runner or a panic of a tile is an error.
pub(crate) fn for_each_tile(
    runner: &dyn Runner,
    workers: usize,
    tiles: usize,
    tile: &(dyn Fn(usize, usize) + Sync),
) -> Result<()> {
    let workers = workers.min(tiles);
    if workers <= 1 {
        (0..tiles).for_each(|t| tile(0, t));
        return Ok(());
    }
    runner.check()?;
    let next = AtomicUsize::new(0);
    let done = AtomicUsize::new(0);
    let panicked = AtomicBool::new(false);
    let started: [AtomicBool; MAX_WORKERS] = [const { AtomicBool::new(false) }; MAX_WORKERS];
    let workers = workers.min(MAX_WORKERS);
    let ran = runner.run(workers, &|worker| {
        // The caller's runner may be wrong: an index that it runs twice or past the end must not share scratch memory.
        if worker >= workers || started[worker].swap(true, Ordering::Relaxed) {
            return;
        }
        let body = AssertUnwindSafe(|| {
            loop {
                let t = next.fetch_add(1, Ordering::Relaxed);
                if t >= tiles {
                    break;
                }
                tile(worker, t);
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        if catch_unwind(body).is_err() {
            panicked.store(true, Ordering::Relaxed);
        }
    });
    if panicked.load(Ordering::Relaxed) {
        return Err(crate::error::Error::new(Status::Internal, "a worker thread panicked"));
    }
    let done = done.load(Ordering::Relaxed);
    crate::error::ensure!(
        ran && done == tiles,
        Parallel,
        "the parallel runner finished {done} of {tiles} tiles with {workers} workers"
    );
    Ok(())
}

/// Upper bound on workers; more would gain nothing.
pub(crate) const MAX_WORKERS: usize = 512;

/// What it costs to wake sleeping threads, in grains: the caller sleeps too until they are done. On a virtual machine with Zen 3, the
/// median is more than that of 256 keys of attention in f32 over 32 query heads of 128, on which one core takes 105 microseconds.
const WAKING: usize = 4;

/// The number of workers for `work` elementary steps, at least `grain` each, because forking costs some microseconds. Threads that sleep
/// are woken if they save more than that costs.
pub(crate) fn workers_for(runner: &dyn Runner, work: usize, grain: usize) -> usize {
    let (threads, grains) = (runner.num_threads().clamp(1, MAX_WORKERS), work / grain.max(1));
    // With n threads, a call takes one nth, and the waking.
    if threads > 1 && runner.sleeps() && grains.saturating_mul(threads - 1) < WAKING * threads {
        return 1;
    }
    threads.min(grains).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_calls_wake_no_threads() {
        struct Threads(usize, bool);
        impl Runner for Threads {
            fn num_threads(&self) -> usize {
                self.0
            }
            fn sleeps(&self) -> bool {
                self.1
            }
            fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
                Serial.run(n, task)
            }
        }
        let workers = |threads, sleeps, grains: usize| workers_for(&Threads(threads, sleeps), grains * 100 + 99, 100);
        assert_eq!([0, 1, 2, 7, 8, 100].map(|n| workers(2, true, n)), [1, 1, 1, 1, 2, 2]);
        assert_eq!([0, 1, 2, 7, 8, 100].map(|n| workers(2, false, n)), [1, 1, 2, 2, 2, 2]);
        assert_eq!([4, 5, 40].map(|n| workers(16, true, n)), [1, 5, 16]);
        assert_eq!(workers(1, true, 100), 1);
    }
}
