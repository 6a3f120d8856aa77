//! AMX: detection of tiles with products of bf16 and int8, and the permission to use them.
//!
//! Detection uses CPUID (7, 0).EDX bits 24 (tiles), 22 (bf16) and 25 (int8), and XCR0 bits 17 and 18, by which the operating
//! system declares support; AVX512-BF16, which every such CPU has, must not be hidden. On Linux a process must also request the permission to use the tile data once
//! (`arch_prctl`, 5.16 and later), for all of its threads. Linux refuses it if a thread has an alternate signal stack
//! that is too small for the larger frame. Then the level is not available, and AVX-512 serves.
//!
//! With `--cfg kvlane_emulate_amx` the level is available wherever AVX-512 with VNNI is. Its instructions then fault, and a
//! handler emulates them: `tests/common/amx_emulator.rs`.

use super::{detected, level_features};
use std::arch::asm;
use std::sync::OnceLock;

/// Whether this process can use the tiles. The first call requests the permission.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if cfg!(kvlane_emulate_amx) {
            return level_features!(Avx512Vnni, detected! {});
        }
        level_features!(Avx512Bf16, detected! {}) && cpu_has_tiles() && permission_granted()
    })
}

/// Whether the CPU has tiles with both products and the operating system saves them.
fn cpu_has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const TILE: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    const INT8: u32 = 1 << 25;
    const ALL: u32 = TILE | BF16 | INT8;
    const OSXSAVE: u32 = 1 << 27;
    // Tile configuration and tile data.
    const STATE: u32 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 || __cpuid_count(7, 0).edx & ALL != ALL {
        return false;
    }
    let low: u32;
    // SAFETY: OSXSAVE is set, so that the instruction exists; it only reads.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags)) };
    low & STATE == STATE
}

#[cfg(target_os = "linux")]
fn permission_granted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let status: i64;
    // SAFETY: the call takes two numbers and accesses no memory; the kernel clobbers rcx and r11.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => status, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn permission_granted() -> bool {
    // Other systems have other ways to request it, which are not implemented.
    false
}
