//! A pool of threads that the library starts on request.

use super::{Rayon, Runner};
use crate::error::{Error, Result, Status, ensure};
use std::mem::ManuallyDrop;
use std::thread::JoinHandle;

/// A pool of threads that runs the tasks of operations.
///
/// - **Threads** are started by [`new`](Self::new) and joined by the drop; none is left after it. They are named `kvlane-0`,
///   `kvlane-1` and so on.
/// - **Stack**: every thread has [`STACK_BYTES`](Self::STACK_BYTES), whatever `RUST_MIN_STACK` says.
/// - **Signals**: the threads block every signal that the operating system lets them block, so signals to the process arrive
///   on the program's own threads.
/// - **Fork**: threads do not survive `fork`. In the child of a `fork`, [`check`](Runner::check) and every operation with the pool
///   fail with [`Status::Parallel`], and the drop releases nothing. The child may make a pool of its own.
///
/// A pool may be shared between threads; calls at the same time share its threads.
///
/// ```
/// use kvlane::{Runner, ThreadPool};
/// let pool = ThreadPool::new(2)?;
/// assert_eq!(pool.num_threads(), 2);
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Debug)]
pub struct ThreadPool {
    pool: ManuallyDrop<rayon::ThreadPool>,
    threads: Vec<JoinHandle<()>>,
    /// The process that has the threads.
    process: u32,
}

impl ThreadPool {
    /// The stack of each thread, in bytes.
    pub const STACK_BYTES: usize = 2 << 20;

    /// The most threads of a pool.
    pub const MAX_THREADS: usize = 4096;

    /// Starts `threads` threads; 0 for as many as the machine runs at once.
    ///
    /// # Errors
    /// More than [`MAX_THREADS`](Self::MAX_THREADS), or the operating system starts no more threads.
    pub fn new(threads: usize) -> Result<Self> {
        let most = Self::MAX_THREADS;
        ensure!(threads <= most, InvalidValue, "num_threads is {threads}, more than {most}");
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(most)),
            n => n,
        };
        let mut handles = Vec::with_capacity(threads);
        let pool = {
            // A new thread inherits the mask of the thread that starts it: there is no moment at which a signal reaches it.
            #[cfg(unix)]
            let _blocked = signals::Blocked::all();
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .spawn_handler(|thread| {
                    let builder = std::thread::Builder::new().name(format!("kvlane-{}", thread.index()));
                    handles.push(builder.stack_size(Self::STACK_BYTES).spawn(|| thread.run())?);
                    Ok(())
                })
                .build()
        };
        let pool = pool.map_err(|e| Error::new(Status::Parallel, format!("no pool of {threads} threads: {e}")))?;
        Ok(Self { pool: ManuallyDrop::new(pool), threads: handles, process: std::process::id() })
    }
}

impl Runner for ThreadPool {
    fn num_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn check(&self) -> Result<()> {
        let (made, here) = (self.process, std::process::id());
        ensure!(
            made == here,
            Parallel,
            "the thread pool belongs to process {made}, but this is process {here}: threads do not survive fork, make a pool \
             in the child"
        );
        Ok(())
    }

    fn sleeps(&self) -> bool {
        true
    }

    fn run(&self, n: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        self.check().is_ok() && Rayon::pool(&self.pool).run(n, task)
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        if self.check().is_err() {
            // There are no threads to end or to join, and what they had locked stays locked: the memory is abandoned.
            std::mem::forget(std::mem::take(&mut self.threads));
            return;
        }
        // SAFETY: dropped once, here, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.pool) };
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended too.
            let _ = thread.join();
        }
    }
}

#[cfg(unix)]
mod signals {
    use std::ffi::c_int;
    use std::mem::MaybeUninit;

    /// Room for the `sigset_t` of every system: the largest has 128 bytes.
    type SignalSet = [u64; 16];

    #[cfg(all(
        any(target_os = "linux", target_os = "android"),
        not(any(target_arch = "mips", target_arch = "mips64"))
    ))]
    const SIG_SETMASK: c_int = 2;
    #[cfg(not(all(
        any(target_os = "linux", target_os = "android"),
        not(any(target_arch = "mips", target_arch = "mips64"))
    )))]
    const SIG_SETMASK: c_int = 3;

    // Declared here, because they are all that the library needs of `libc`.
    unsafe extern "C" {
        fn sigfillset(set: *mut SignalSet) -> c_int;
        fn pthread_sigmask(how: c_int, set: *const SignalSet, old: *mut SignalSet) -> c_int;
    }

    /// Blocks all signals of this thread until it is dropped, which restores the mask from before.
    pub struct Blocked(Option<SignalSet>);

    impl Blocked {
        pub fn all() -> Self {
            let (mut all, mut old) = (MaybeUninit::<SignalSet>::zeroed(), MaybeUninit::<SignalSet>::zeroed());
            // SAFETY: both sets are large enough, and the first is filled before it is read.
            let done = unsafe {
                sigfillset(all.as_mut_ptr()) == 0 && pthread_sigmask(SIG_SETMASK, all.as_ptr(), old.as_mut_ptr()) == 0
            };
            // SAFETY: zeroed, and written by the call if that succeeded.
            Self(done.then(|| unsafe { old.assume_init() }))
        }
    }

    impl Drop for Blocked {
        fn drop(&mut self) {
            if let Some(old) = &self.0 {
                // SAFETY: the mask that this thread had.
                unsafe { pthread_sigmask(SIG_SETMASK, old, std::ptr::null_mut()) };
            }
        }
    }
}
