//! The caller's threads.

use super::sized::{assert_layout, read_sized, sized};
use crate::error::{Result, ensure};
use crate::parallel::{Runner, Serial};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// Runs the tasks of an operation on threads of the caller's. Start from `KVL_PARALLEL_RUNNER_INIT`.
///
/// `run` calls `task(task_ctx, i)` exactly once for every i in 0 .. n, on any threads and in any order, and returns 0 after all of
/// these calls have returned. It returns another number if it could not run them. It must not unwind (no C++ exception, no
/// longjmp). `n` is at most `num_threads`. No bit of a result depends on the runner.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_parallel_runner {
    /// `sizeof(kvl_parallel_runner)`.
    pub struct_size: usize,
    /// The first argument of `run`.
    pub ctx: *mut c_void,
    /// How many tasks can run at the same time, at least 1.
    pub num_threads: usize,
    /// Runs `n` tasks.
    pub run: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            n: usize,
            task: Option<unsafe extern "C" fn(task_ctx: *mut c_void, i: usize)>,
            task_ctx: *mut c_void,
        ) -> i32,
    >,
}

sized!(kvl_parallel_runner);
assert_layout!(kvl_parallel_runner, 32, struct_size: 0, ctx: 8, num_threads: 16, run: 24);

/// A `kvl_parallel_runner` of the caller's, or the calling thread.
pub(super) enum CallerRunner {
    Serial,
    Threads(Threads),
}

/// A copy of the caller's struct, with `run` known to be there.
pub(super) struct Threads {
    ctx: *mut c_void,
    num_threads: usize,
    run: Run,
    /// See [`Runner::sleeps`].
    sleeps: bool,
}

/// `kvl_parallel_runner.run`.
pub(super) type Run = unsafe extern "C" fn(*mut c_void, usize, Option<Task>, *mut c_void) -> i32;

pub(super) type Task = unsafe extern "C" fn(task_ctx: *mut c_void, i: usize);

// SAFETY: `ctx` is only handed back to `run`, on the thread that made the call.
unsafe impl Sync for Threads {}

impl CallerRunner {
    /// # Safety
    /// `from` is null or points to a runner that does what the header asks of it.
    pub(super) unsafe fn new(from: *const kvl_parallel_runner) -> Result<Self> {
        if from.is_null() {
            return Ok(Self::Serial);
        }
        // SAFETY: the caller's.
        let runner = unsafe { read_sized(from) }?;
        let Some(run) = runner.run else {
            crate::error::fail!(
                NullPointer,
                "kvl_parallel_runner.run is null: pass no runner to use the calling thread"
            );
        };
        ensure!(runner.num_threads > 0, InvalidValue, "kvl_parallel_runner.num_threads is 0");
        // SAFETY: the caller's.
        let pool = unsafe { super::pool::behind(&runner) };
        if let Some(pool) = pool {
            // Before anything else is looked at, so that small and large calls agree.
            pool.check()?;
        }
        let sleeps = pool.is_some_and(Runner::sleeps);
        Ok(Self::Threads(Threads { ctx: runner.ctx, num_threads: runner.num_threads, run, sleeps }))
    }

    pub(super) fn as_dyn(&self) -> &dyn Runner {
        match self {
            Self::Serial => &Serial,
            Self::Threads(threads) => threads,
        }
    }
}

/// What `task_ctx` points to while `run` runs.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    panicked: AtomicBool,
}

/// The task that the caller's threads call: here too, no panic leaves.
unsafe extern "C" fn trampoline(task_ctx: *mut c_void, i: usize) {
    // SAFETY: `Threads::run` has put a job there, which outlives `run`, and so every call of a task.
    let job = unsafe { &*task_ctx.cast::<Job>() };
    if catch_unwind(AssertUnwindSafe(|| (job.task)(i))).is_err() {
        job.panicked.store(true, Ordering::Relaxed);
    }
}

impl Runner for Threads {
    fn num_threads(&self) -> usize {
        self.num_threads
    }

    fn sleeps(&self) -> bool {
        self.sleeps
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        let job = Job { task, panicked: AtomicBool::new(false) };
        let task_ctx = (&raw const job).cast_mut().cast();
        // SAFETY: the header asks of `run` that all calls of the task have returned when it does.
        let status = unsafe { (self.run)(self.ctx, n, Some(trampoline), task_ctx) };
        status == 0 && !job.panicked.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::for_each_tile;
    use std::sync::atomic::AtomicUsize;

    fn sized(run: Option<Run>) -> CallerRunner {
        let runner = kvl_parallel_runner {
            struct_size: size_of::<kvl_parallel_runner>(),
            ctx: std::ptr::null_mut(),
            num_threads: 3,
            run,
        };
        // SAFETY: a runner of this test's.
        unsafe { CallerRunner::new(&runner) }.unwrap()
    }

    /// Every task on a thread of its own.
    unsafe extern "C" fn spawn(_: *mut c_void, n: usize, task: Option<Task>, task_ctx: *mut c_void) -> i32 {
        let (task, address) = (task.unwrap(), task_ctx.expose_provenance());
        std::thread::scope(|scope| {
            for i in 0..n {
                // SAFETY: each index once, and the scope waits.
                scope.spawn(move || unsafe { task(std::ptr::with_exposed_provenance_mut(address), i) });
            }
        });
        0
    }

    unsafe extern "C" fn refuse(_: *mut c_void, _: usize, _: Option<Task>, _: *mut c_void) -> i32 {
        -1
    }

    #[test]
    fn tiles_run_on_the_callers_threads() {
        let sum = AtomicUsize::new(0);
        let add = |_: usize, t: usize| {
            sum.fetch_add(t, Ordering::Relaxed);
        };
        for_each_tile(sized(Some(spawn)).as_dyn(), 3, 100, &add).unwrap();
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
        let error = for_each_tile(sized(Some(refuse)).as_dyn(), 3, 100, &add).unwrap_err();
        assert_eq!(error.status(), crate::Status::Parallel);
    }

    #[test]
    fn a_panic_on_a_worker_thread_stays_there() {
        let quiet = |_: usize, t: usize| {
            // Not `panic!`: its hook would print.
            if t == 50 {
                std::panic::resume_unwind(Box::new("tile 50"));
            }
        };
        let error = for_each_tile(sized(Some(spawn)).as_dyn(), 3, 100, &quiet).unwrap_err();
        assert_eq!(error.status(), crate::Status::Internal);
        // Also when the task itself panics, outside the loop over tiles.
        let ran = sized(Some(spawn)).as_dyn().run(2, &|_| std::panic::resume_unwind(Box::new("task")));
        assert!(!ran);
    }
}
