//! The caller's threads, seen from here; and threads of ours, seen from there.

use super::types::{kvl_parallel_runner, read_sized};
use crate::error::{Result, ensure};
use crate::parallel::{Runner, Serial};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

/// A `kvl_parallel_runner` of the caller's, or the calling thread.
pub(super) enum CallerRunner {
    Serial,
    Threads(Threads),
}

/// A copy of the caller's struct, with `run` known to be there.
pub(super) struct Threads {
    ctx: *mut c_void,
    num_threads: usize,
    run: unsafe extern "C" fn(*mut c_void, usize, Option<Task>, *mut c_void) -> i32,
}

type Task = unsafe extern "C" fn(task_ctx: *mut c_void, i: usize);

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
        Ok(Self::Threads(Threads { ctx: runner.ctx, num_threads: runner.num_threads, run }))
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

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        let job = Job { task, panicked: AtomicBool::new(false) };
        let task_ctx = (&raw const job).cast_mut().cast();
        // SAFETY: the header asks of `run` that all calls of the task have returned when it does.
        let status = unsafe { (self.run)(self.ctx, n, Some(trampoline), task_ctx) };
        status == 0 && !job.panicked.load(Ordering::Relaxed)
    }
}

#[cfg(feature = "rayon")]
pub(super) use pool::Pool;

#[cfg(feature = "rayon")]
mod pool {
    use super::*;
    use crate::error::{Error, Status};
    use crate::parallel::Rayon;
    use std::thread::JoinHandle;

    /// A rayon pool whose threads have ended when it has been dropped, as a library that can be unloaded needs.
    pub(in crate::capi) struct Pool {
        // An option, because it has to go before the threads can be joined.
        pool: Option<rayon::ThreadPool>,
        threads: Vec<JoinHandle<()>>,
    }

    impl Pool {
        pub(in crate::capi) fn new(threads: usize) -> Result<Self> {
            let mut handles = Vec::new();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).spawn_handler(|thread| {
                let mut builder = std::thread::Builder::new().name(format!("kvlane-{}", thread.index()));
                if let Some(size) = thread.stack_size() {
                    builder = builder.stack_size(size);
                }
                handles.push(builder.spawn(|| thread.run())?);
                Ok(())
            });
            let pool = pool.build().map_err(|e| Error::new(Status::Parallel, format!("no thread pool: {e}")))?;
            Ok(Self { pool: Some(pool), threads: handles })
        }

        /// The runner that `self` serves as; valid as long as `self` is.
        pub(in crate::capi) fn runner(&self) -> kvl_parallel_runner {
            kvl_parallel_runner {
                struct_size: size_of::<kvl_parallel_runner>(),
                ctx: (&raw const *self).cast_mut().cast(),
                num_threads: self.pool().current_num_threads(),
                run: Some(run),
            }
        }

        fn pool(&self) -> &rayon::ThreadPool {
            self.pool.as_ref().expect("the pool is there until the drop")
        }
    }

    impl Drop for Pool {
        fn drop(&mut self) {
            self.pool = None;
            for thread in self.threads.drain(..) {
                // A thread that ended in a panic is a thread that ended.
                let _ = thread.join();
            }
        }
    }

    struct Call {
        task: Task,
        task_ctx: *mut c_void,
    }
    // SAFETY: a task may be called from any thread; that is what a runner is for.
    unsafe impl Sync for Call {}

    unsafe extern "C" fn run(ctx: *mut c_void, n: usize, task: Option<Task>, task_ctx: *mut c_void) -> i32 {
        let Some(task) = task else { return 1 };
        // SAFETY: `Pool::runner` has put the pool there, which the header asks to outlive the runner.
        let pool = unsafe { &*ctx.cast::<Pool>() };
        let call = Call { task, task_ctx };
        let each = |i: usize| {
            let call = &call;
            // SAFETY: each index once, as a runner has to.
            unsafe { (call.task)(call.task_ctx, i) }
        };
        let ran = catch_unwind(AssertUnwindSafe(|| Rayon::pool(pool.pool()).run(n, &each)));
        if ran.unwrap_or(false) { 0 } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::for_each_tile;
    use std::sync::atomic::AtomicUsize;

    fn sized(run: Option<unsafe extern "C" fn(*mut c_void, usize, Option<Task>, *mut c_void) -> i32>) -> CallerRunner {
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
