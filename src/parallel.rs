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

/// The number of workers for `work` elementary steps, at least `grain` each, because forking costs some microseconds.
pub(crate) fn workers_for(runner: &dyn Runner, work: usize, grain: usize) -> usize {
    runner.num_threads().clamp(1, MAX_WORKERS).min(work / grain.max(1)).max(1)
}
