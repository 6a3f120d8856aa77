//! The threads that the driver computes on.

use super::error::{Error, Result};
use crate::{Rayon, Runner};

/// A pool of its own, so that `--threads` means what it says whatever else the process does with rayon.
#[derive(Debug)]
pub struct Threads {
    pool: rayon::ThreadPool,
}

impl Threads {
    /// `count` threads; 0 is one for every CPU that this process may use.
    pub fn new(count: usize) -> Result<Self> {
        const MOST: usize = 1024;
        if count > MOST {
            return Err(Error::argument(format!("{count} threads; {MOST} is the most")));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|i| format!("kvlane-{i}"))
            .build()
            .map_err(|e| Error::argument(format!("starting {count} threads: {e}")))?;
        Ok(Self { pool })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `f` on the pool: what it does with rayon stays there.
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
