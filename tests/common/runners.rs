//! Runners of the caller's, as a runtime with its own pool would pass them.

use kvlane::Runner;

/// Starts one thread per task, and joins them.
pub struct Threads(pub usize);

impl Runner for Threads {
    fn num_threads(&self) -> usize {
        self.0
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        std::thread::scope(|scope| {
            for i in 0..n {
                scope.spawn(move || task(i));
            }
        });
        true
    }
}

/// Claims to have several threads, and runs the last task first.
pub struct Backwards(pub usize);

impl Runner for Backwards {
    fn num_threads(&self) -> usize {
        self.0
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        (0..n).rev().for_each(task);
        true
    }
}

/// Fails without running a task.
pub struct Broken;

impl Runner for Broken {
    fn num_threads(&self) -> usize {
        4
    }

    fn run(&self, _: usize, _: &(dyn Fn(usize) + Sync)) -> bool {
        false
    }
}
