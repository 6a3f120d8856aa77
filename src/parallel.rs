//! How work is spread over threads: always by a runner of the caller's, never by threads of our own.

use crate::error::{Result, Status};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Runs `n` independent tasks, on as many threads as it likes.
///
/// An implementation calls `task(i)` exactly once for every `i` in `0..n` and returns when all calls have returned; it
/// returns `false` if it could not. The result of an operation does not depend on the runner, not in a single bit.
pub trait Runner: Sync {
    /// How many tasks can run at the same time; operations never start more than this.
    fn num_threads(&self) -> usize;

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
        // `join` underneath: jobs live on the stack, where a spawn would allocate each.
        let work = || (0..n).into_par_iter().with_max_len(1).for_each(task);
        match self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
        true
    }
}

/// Runs `tile(worker, t)` for every `t` in `0..tiles`, over at most `workers` workers that take the next tile whenever they
/// are free; `worker` tells which scratch memory is theirs. Returns the runner's failure or a tile's panic as an error.
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
    let next = AtomicUsize::new(0);
    let done = AtomicUsize::new(0);
    let panicked = AtomicBool::new(false);
    let started: [AtomicBool; MAX_WORKERS] = [const { AtomicBool::new(false) }; MAX_WORKERS];
    let workers = workers.min(MAX_WORKERS);
    let ran = runner.run(workers, &|worker| {
        // A caller's runner is outside our control: an index twice or past the end must not share scratch memory.
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

/// More workers than this gain nothing on any machine this is for.
pub(crate) const MAX_WORKERS: usize = 512;

/// How many workers an operation of `work` elementary steps uses: forking costs some microseconds.
pub(crate) fn workers_for(runner: &dyn Runner, work: usize, grain: usize) -> usize {
    runner.num_threads().clamp(1, MAX_WORKERS).min(work / grain.max(1)).max(1)
}
