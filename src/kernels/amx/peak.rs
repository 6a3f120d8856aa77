//! Loops of tile products in registers, for the bench: the peak of the tiles.
//!
//! They do not run where an emulator stands in for the instructions, whose speed says nothing.

use super::tiles::Tiles;

/// Operations of a step of [`bf16`]: four products of 16 rows, 16 columns and 32 elements.
pub(crate) const BF16_OPERATIONS: usize = 4 * 2 * 16 * 16 * 32;
/// Operations of a step of [`int8`]: four products of 16 rows, 16 columns and 64 elements.
pub(crate) const INT8_OPERATIONS: usize = 4 * 2 * 16 * 16 * 64;

pub(crate) fn is_available() -> bool {
    !cfg!(kvlane_emulate_amx) && crate::cpu::amx::is_available()
}

/// # Safety
/// [`is_available`].
pub(crate) unsafe fn bf16(steps: u64) {
    // SAFETY: the caller's; nothing else on this thread uses the tiles during a bench.
    let tiles = unsafe { Tiles::configure() };
    for _ in 0..steps {
        // SAFETY: the caller's.
        unsafe { tiles.bf16_in_registers() };
    }
}

/// # Safety
/// [`is_available`].
pub(crate) unsafe fn int8(steps: u64) {
    // SAFETY: the caller's; nothing else on this thread uses the tiles during a bench.
    let tiles = unsafe { Tiles::configure() };
    for _ in 0..steps {
        // SAFETY: the caller's.
        unsafe { tiles.int8_in_registers() };
    }
}
