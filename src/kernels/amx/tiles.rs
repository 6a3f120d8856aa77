//! Tile instructions.
//!
//! There are no stable intrinsics, so the instructions are inline assembly with fixed registers: tmm0 to tmm3
//! accumulate, tmm4 to tmm7 hold operands. The compiler never uses tile registers, so they keep their contents from one
//! `asm!` block to the next. [`Tiles`] proves that they are configured. Dropping it releases them, so that a context
//! switch between calls has no tiles to save.

use std::arch::asm;
use std::marker::PhantomData;

/// Bytes of a tile: 16 rows of 64 bytes.
pub(super) const TILE_BYTES: usize = 1024;
/// Bytes of a tile's row.
pub(super) const ROW_BYTES: isize = 64;

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Proof that this thread's tiles are configured, each with 16 rows of 64 bytes.
pub(super) struct Tiles(PhantomData<*const ()>);

/// The first row of a tile operand in memory. Rows are [`ROW_BYTES`] apart unless a stride is given.
pub(super) type Operand = *const u8;

impl Tiles {
    /// # Safety
    /// The level is available; the thread has no other `Tiles`.
    #[inline(always)]
    pub unsafe fn configure() -> Self {
        // SAFETY: the caller's; the configuration is a valid one.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack, preserves_flags));
        }
        Self(PhantomData)
    }

    /// Clears the accumulators.
    #[inline(always)]
    pub fn zero(&self) {
        // SAFETY: the tiles are configured.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nomem, nostack, preserves_flags));
        }
    }

    /// Loads accumulator `i`.
    ///
    /// # Safety
    /// A tile is readable at `from`.
    #[inline(always)]
    pub unsafe fn load(&self, i: usize, from: *const f32) {
        macro_rules! load {
            ($tile:tt) => {
                asm!(concat!("tileloadd ", $tile, ", [{p} + {s}]"), p = in(reg) from, s = in(reg) ROW_BYTES,
                    out($tile) _, options(readonly, nostack, preserves_flags))
            };
        }
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            match i {
                0 => load!("tmm0"),
                1 => load!("tmm1"),
                2 => load!("tmm2"),
                _ => load!("tmm3"),
            }
        }
    }

    /// Stores accumulator `i` as rows `stride` bytes apart.
    ///
    /// # Safety
    /// Such rows are writable at `to`.
    #[inline(always)]
    pub unsafe fn store(&self, i: usize, to: *mut f32, stride: isize) {
        macro_rules! store {
            ($tile:tt) => {
                asm!(concat!("tilestored [{p} + {s}], ", $tile), p = in(reg) to, s = in(reg) stride,
                    options(nostack, preserves_flags))
            };
        }
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            match i {
                0 => store!("tmm0"),
                1 => store!("tmm1"),
                2 => store!("tmm2"),
                _ => store!("tmm3"),
            }
        }
    }

    /// `accumulator[2 * m + n] += a[m] * b[n]`, of bf16, of operands that are whole tiles in memory: A row-major, B with pairs of rows
    /// interleaved.
    ///
    /// # Safety
    /// The operands are readable.
    #[inline(always)]
    pub unsafe fn multiply(&self, a: [Operand; 2], b: [Operand; 2]) {
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            asm!("tileloadd tmm6, [{b0} + {t}]", "tileloadd tmm4, [{a0} + {t}]", "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {t}]", "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {t}]", "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                a0 = in(reg) a[0], a1 = in(reg) a[1], b0 = in(reg) b[0], b1 = in(reg) b[1], t = in(reg) ROW_BYTES,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(readonly, nostack, preserves_flags));
        }
    }

    /// Loads an operand, a whole tile in memory, for [`Self::add`].
    ///
    /// # Safety
    /// The operand is readable.
    #[inline(always)]
    pub unsafe fn hold(&self, operand: Operand) {
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            asm!("tileloadd tmm7, [{p} + {t}]", p = in(reg) operand, t = in(reg) ROW_BYTES, out("tmm7") _,
                options(readonly, nostack, preserves_flags));
        }
    }

    /// Adds the product of the operand that is held, which is A with `HELD_IS_A` and else B, and another, of bf16, to accumulator `i`. Rows of
    /// the other are `stride` bytes apart.
    ///
    /// # Safety
    /// The operand is readable.
    #[inline(always)]
    pub unsafe fn add<const HELD_IS_A: bool>(&self, i: usize, other: Operand, stride: isize) {
        macro_rules! add {
            ($sum:tt $tile:tt $operands:expr) => {
                asm!(concat!("tileloadd ", $tile, ", [{p} + {s}]"), concat!("tdpbf16ps ", $sum, ", ", $operands),
                    p = in(reg) other, s = in(reg) stride, out($sum) _, out($tile) _,
                    options(readonly, nostack, preserves_flags))
            };
            ($sum:tt $tile:tt) => {
                if HELD_IS_A {
                    add!($sum $tile concat!("tmm7, ", $tile))
                } else {
                    add!($sum $tile concat!($tile, ", tmm7"))
                }
            };
        }
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            match i {
                0 => add!("tmm0" "tmm4"),
                1 => add!("tmm1" "tmm5"),
                2 => add!("tmm2" "tmm6"),
                _ => add!("tmm3" "tmm4"),
            }
        }
    }

    /// `accumulator[n] += a * b[n]`, of signed bytes. The operand A is row-major with rows `stride` bytes apart; the operands B have four
    /// rows interleaved.
    ///
    /// # Safety
    /// The operands are readable.
    #[inline(always)]
    pub unsafe fn multiply_bytes(&self, a: Operand, stride: isize, b: [Operand; 4]) {
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            asm!("tileloadd tmm4, [{a} + {s}]", "tileloadd tmm5, [{b0} + {t}]", "tdpbssd tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{b1} + {t}]", "tdpbssd tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{b2} + {t}]", "tdpbssd tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{b3} + {t}]", "tdpbssd tmm3, tmm4, tmm5",
                a = in(reg) a, s = in(reg) stride, t = in(reg) ROW_BYTES,
                b0 = in(reg) b[0], b1 = in(reg) b[1], b2 = in(reg) b[2], b3 = in(reg) b[3],
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(readonly, nostack, preserves_flags));
        }
    }
}

#[cfg(feature = "bench")]
impl Tiles {
    /// Four products of bf16, without loads.
    ///
    /// # Safety
    /// The level is available.
    #[inline(always)]
    pub unsafe fn bf16_in_registers(&self) {
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            asm!("tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nomem, nostack, preserves_flags));
        }
    }

    /// Four products of 8-bit integers, without loads.
    ///
    /// # Safety
    /// The CPU has tiles with products of 8-bit integers.
    #[inline(always)]
    pub unsafe fn int8_in_registers(&self) {
        // SAFETY: the caller's; the tiles are configured.
        unsafe {
            asm!("tdpbssd tmm0, tmm4, tmm6", "tdpbssd tmm1, tmm4, tmm7",
                "tdpbssd tmm2, tmm5, tmm6", "tdpbssd tmm3, tmm5, tmm7",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nomem, nostack, preserves_flags));
        }
    }
}

impl Drop for Tiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the tiles are configured, and nothing uses them afterwards.
        unsafe {
            asm!("tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nomem, nostack, preserves_flags));
        }
    }
}
