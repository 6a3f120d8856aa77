//! Ctrl-C: the first one ends the work at a token's border, the second one ends the program at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGINT;
use signal_hook::flag;

use crate::driver::error::{Error, Result};

/// What a shell reports for a program that Ctrl-C has ended.
pub(super) const EXIT_CODE: u8 = 130;

/// Whether Ctrl-C was pressed.
#[derive(Debug)]
pub(super) struct Interrupts {
    pressed: Arc<AtomicBool>,
    /// The next Ctrl-C ends the program.
    armed: Arc<AtomicBool>,
}

impl Interrupts {
    /// From now on, the first Ctrl-C is only noted.
    pub(super) fn watch() -> Result<Self> {
        let this = Self { pressed: Arc::default(), armed: Arc::default() };
        // In the order of registration: the first press finds the flag down and raises it.
        flag::register_conditional_shutdown(SIGINT, i32::from(EXIT_CODE), this.armed.clone())
            .and_then(|_| flag::register(SIGINT, this.armed.clone()))
            .and_then(|_| flag::register(SIGINT, this.pressed.clone()))
            .map_err(Error::signal)?;
        Ok(this)
    }

    pub(super) fn pressed(&self) -> bool {
        self.pressed.load(Ordering::SeqCst)
    }

    /// Runs `f`, which waits for the user; Ctrl-C ends the program meanwhile.
    pub(super) fn while_waiting<T>(&self, f: impl FnOnce() -> T) -> T {
        self.armed.store(true, Ordering::SeqCst);
        let result = f();
        self.armed.store(false, Ordering::SeqCst);
        self.pressed.store(false, Ordering::SeqCst);
        result
    }
}
