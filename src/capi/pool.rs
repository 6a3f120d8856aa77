//! Threads of the library's, for callers that have none.

use super::guard::{guard, guard_value};
use super::runner::kvl_parallel_runner;
use super::sized::{read_sized, write_sized};
use super::status::kvl_status;
use crate::error::ensure;
pub(super) use threads::behind;
use threads::{Threads, runner_of, start};

/// A pool of threads. Made by `kvl_thread_pool_create`.
pub struct kvl_thread_pool {
    threads: Threads,
}

/// Starts a pool of threads, for programs that have none of their own. It is released with `kvl_thread_pool_destroy`.
///
/// `num_threads` is 1 to 4096, or 0 for as many as the machine runs at once. Each thread has a stack of 2 MiB, whatever the
/// environment says, and blocks all signals. The threads do not survive `fork`: see the head of this file.
///
/// Thread safety: may be called from any thread.
/// Bad input: null, more than 4096 threads or threads that the system does not start (`KVL_STATUS_PARALLEL`) are errors, and so
/// is a library that was built without the feature `rayon` (`KVL_STATUS_UNSUPPORTED`); `*pool` is not touched.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_thread_pool_create(num_threads: usize, pool: *mut *mut kvl_thread_pool) -> kvl_status {
    guard(|| {
        ensure!(!pool.is_null(), NullPointer, "the pointer pool is null");
        let made = kvl_thread_pool { threads: start(num_threads)? };
        // SAFETY: not null, and the caller's to write.
        unsafe { pool.write(Box::into_raw(Box::new(made))) };
        Ok(())
    })
}

/// Ends the threads of a pool, waits until they have ended, and releases it; null is allowed. In the child of a `fork`, the
/// pool of the parent has no threads, and only its handle is released. Must not be called from one of the pool's own threads.
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

/// Fills in a runner that uses a pool. The runner is valid as long as the pool.
///
/// In the child of a `fork`, every function that is given such a runner fails with `KVL_STATUS_PARALLEL`.
///
/// Thread safety: may be called from any number of threads at once, and so may operations with the runner, which then share
/// the threads of the pool.
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
        // SAFETY: not null, and a pool by the caller's promise.
        let filled = kvl_parallel_runner { struct_size: size, ..runner_of(unsafe { &(*pool).threads })? };
        // SAFETY: the caller's promise.
        unsafe { write_sized(runner, filled) };
        Ok(())
    })
}

#[cfg(feature = "rayon")]
mod threads {
    use super::super::runner::{Run, Task, kvl_parallel_runner};
    use crate::error::Result;
    use crate::parallel::{Runner, ThreadPool};
    use std::ffi::c_void;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    pub(super) type Threads = ThreadPool;

    pub(super) fn start(num_threads: usize) -> Result<Threads> {
        ThreadPool::new(num_threads)
    }

    /// The runner that a pool serves as; valid as long as the pool is.
    pub(super) fn runner_of(pool: &Threads) -> Result<kvl_parallel_runner> {
        Ok(kvl_parallel_runner {
            struct_size: size_of::<kvl_parallel_runner>(),
            ctx: (&raw const *pool).cast_mut().cast(),
            num_threads: pool.num_threads(),
            run: Some(run),
        })
    }

    /// The pool behind a runner, if it is one of [`runner_of`].
    ///
    /// # Safety
    /// `runner` is what the header describes, and a pool lives as long as the result.
    pub(in crate::capi) unsafe fn behind<'a>(runner: &kvl_parallel_runner) -> Option<&'a dyn Runner> {
        let own = runner.run.is_some_and(|f| std::ptr::fn_addr_eq(f, run as Run));
        // SAFETY: only `runner_of` puts this function there, with the pool beside it.
        own.then(|| unsafe { &*runner.ctx.cast::<Threads>() } as &dyn Runner)
    }

    struct Call {
        task: Task,
        task_ctx: *mut c_void,
    }
    // SAFETY: a task may be called from any thread; that is what a runner is for.
    unsafe impl Sync for Call {}

    /// `kvl_parallel_runner.run` of a pool.
    unsafe extern "C" fn run(ctx: *mut c_void, n: usize, task: Option<Task>, task_ctx: *mut c_void) -> i32 {
        let Some(task) = task else { return 1 };
        // SAFETY: `runner_of` has put the pool there, which the header asks to outlive the runner.
        let pool = unsafe { &*ctx.cast::<Threads>() };
        let call = Call { task, task_ctx };
        let each = |i: usize| {
            let call = &call;
            // SAFETY: each index once, as a runner has to.
            unsafe { (call.task)(call.task_ctx, i) }
        };
        let ran = catch_unwind(AssertUnwindSafe(|| pool.run(n, &each)));
        if ran.unwrap_or(false) { 0 } else { 1 }
    }
}

/// Without the feature `rayon` there are no pools.
#[cfg(not(feature = "rayon"))]
mod threads {
    use super::super::runner::kvl_parallel_runner;
    use crate::error::{Result, fail};
    use crate::parallel::Runner;

    pub(super) struct Threads;

    pub(super) fn start(num_threads: usize) -> Result<Threads> {
        fail!(Unsupported, "no pool of {num_threads} threads: this library was built without the feature rayon");
    }

    pub(super) fn runner_of(_: &Threads) -> Result<kvl_parallel_runner> {
        fail!(Unsupported, "no pool has a runner: this library was built without the feature rayon");
    }

    pub(in crate::capi) unsafe fn behind<'a>(_: &kvl_parallel_runner) -> Option<&'a dyn Runner> {
        None
    }
}
