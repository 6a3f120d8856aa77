//! The threads that the driver computes on.

use super::error::{Error, Result};
use crate::{Rayon, Runner};

/// The most threads that [`Threads::new`] starts.
pub const MOST_THREADS: usize = 1024;

/// A pool of its own, so that `--threads` holds whatever else the process does with rayon.
#[derive(Debug)]
pub struct Threads {
    pool: rayon::ThreadPool,
}

impl Threads {
    /// Starts `count` threads; 0 starts one per CPU that the process may use.
    pub fn new(count: usize) -> Result<Self> {
        if count > MOST_THREADS {
            return Err(Error::argument(format!("{count} threads; {MOST_THREADS} is the most")));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|i| format!("kvlane-{i}"))
            .build()
            .map_err(|e| Error::argument(format!("starting {count} threads: {e}")))?;
        Ok(Self { pool })
    }

    /// The number of threads.
    pub fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `f` on the pool. Rayon calls in `f` use the same pool.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }
}

impl Runner for Threads {
    fn num_threads(&self) -> usize {
        self.count()
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        Rayon::pool(&self.pool).run(n, task)
    }
}
