//! Threads of the library's, for callers that have none.

use super::guard::{guard, guard_value};
use super::runner::kvl_parallel_runner;
use super::sized::read_sized;
use super::status::kvl_status;
use crate::error::ensure;
#[cfg(not(feature = "rayon"))]
use crate::error::fail;

/// A pool of threads. Made by `kvl_thread_pool_create`.
pub struct kvl_thread_pool {
    #[cfg(feature = "rayon")]
    pool: Pool,
}

/// Makes a pool of threads, for callers that have none; 0 threads are as many as the machine runs at once. It is released
/// with `kvl_thread_pool_destroy`.
///
/// Thread safety: may be called from any thread.
/// Bad input: null is an error, and so is a library built without the feature `rayon` (`KVL_STATUS_UNSUPPORTED`); `*pool` is not
/// touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_thread_pool_create(num_threads: usize, pool: *mut *mut kvl_thread_pool) -> kvl_status {
    guard(|| {
        ensure!(!pool.is_null(), NullPointer, "the pointer pool is null");
        ensure!(num_threads <= 4096, InvalidValue, "num_threads is {num_threads}, more than 4096");
        #[cfg(not(feature = "rayon"))]
        fail!(Unsupported, "this library was built without the feature rayon");
        #[cfg(feature = "rayon")]
        {
            let made = kvl_thread_pool { pool: Pool::new(num_threads)? };
            // SAFETY: not null, and the caller's to write.
            unsafe { pool.write(Box::into_raw(Box::new(made))) };
            Ok(())
        }
    })
}

/// Ends the threads of a pool and releases it; null is allowed. Not to be called from one of its own threads.
///
/// Thread safety: no call may use the pool, or a runner from it, meanwhile or afterwards.
/// Bad input: a pointer that is not from `kvl_thread_pool_create`, or one that was released already, is undefined behaviour.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_thread_pool_destroy(pool: *mut kvl_thread_pool) {
    guard_value((), || {
        if !pool.is_null() {
            // SAFETY: from `kvl_thread_pool_create`, by the caller's promise, and not released before.
            drop(unsafe { Box::from_raw(pool) });
        }
    });
}

/// Fills a runner that uses a pool, as long as the pool lives.
///
/// Thread safety: may be called from any number of threads at once; and so may operations with the runner, which then share
/// the pool.
/// Bad input: null or an unknown `runner->struct_size` is an error, and `runner` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_thread_pool_runner(
    pool: *const kvl_thread_pool,
    runner: *mut kvl_parallel_runner,
) -> kvl_status {
    guard(|| {
        ensure!(!pool.is_null(), NullPointer, "the pointer pool is null");
        // SAFETY: the caller's promise.
        let size = unsafe { read_sized(runner.cast_const()) }?.struct_size;
        #[cfg(not(feature = "rayon"))]
        fail!(
            Unsupported,
            "this library was built without the feature rayon, so {size} bytes at runner stay as they are"
        );
        #[cfg(feature = "rayon")]
        {
            // SAFETY: not null, and a pool by the caller's promise.
            let filled = kvl_parallel_runner { struct_size: size, ..unsafe { &*pool }.pool.runner() };
            // SAFETY: `size` is one that the struct has had, and the caller has that many bytes there.
            unsafe { std::ptr::copy_nonoverlapping((&raw const filled).cast::<u8>(), runner.cast(), size) };
            Ok(())
        }
    })
}

#[cfg(feature = "rayon")]
use rayon_pool::Pool;

#[cfg(feature = "rayon")]
mod rayon_pool {
    use super::super::runner::{Task, kvl_parallel_runner};
    use crate::error::{Error, Result, Status};
    use crate::parallel::{Rayon, Runner};
    use std::ffi::c_void;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::thread::JoinHandle;

    /// A rayon pool whose threads have ended when it has been dropped, as a library that can be unloaded needs.
    pub(in crate::capi) struct Pool {
        // An option, because it has to go before the threads can be joined.
        pool: Option<rayon::ThreadPool>,
        threads: Vec<JoinHandle<()>>,
    }

    impl Pool {
        pub(super) fn new(threads: usize) -> Result<Self> {
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
        pub(super) fn runner(&self) -> kvl_parallel_runner {
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
