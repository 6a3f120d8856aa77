//! AMX on a CPU that lacks it: a handler for illegal instructions emulates those that the kernels use, as described in
//! Intel's manual (Software Developer's Manual, volume 2, and volume 1 chapter 18). It tests real encodings, real
//! addresses, and arithmetic to the bit.
//!
//! For builds with `--cfg kvlane_emulate_amx`, with which the library assumes that the instructions exist. Other
//! illegal instructions, and illegal uses (tiles that are not configured, sizes that do not match), end the process.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The emulated instructions.
static PERFORMED: AtomicU64 = AtomicU64::new(0);

/// The number of emulated instructions, over all threads.
pub fn performed() -> u64 {
    PERFORMED.load(Ordering::Relaxed)
}

/// Installs the handler for all threads.
pub fn install() {
    // SAFETY: the handler takes three arguments, and accesses only its thread's tiles and the operands.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_illegal_instruction as *const () as usize;
        // No alternate stack: operands can lie on guard pages, whose fault needs its own handler.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([[u8; 64]; 16]);

/// A thread's tiles.
struct State {
    configured: bool,
    rows: [usize; 8],
    row_bytes: [usize; 8],
    tiles: [Tile; 8],
}

const CLEAR: Tile = Tile([[0; 64]; 16]);

thread_local! {
    // A constant without a destructor, so that a signal handler can use it.
    static STATE: UnsafeCell<State> =
        const { UnsafeCell::new(State { configured: false, rows: [0; 8], row_bytes: [0; 8], tiles: [CLEAR; 8] }) };
}

unsafe extern "C" fn on_illegal_instruction(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the operating system passes the context of the interrupted thread, and nothing else uses this thread's
    // tiles.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut context.uc_mcontext.gregs;
        let length = STATE.with(|state| perform(&mut *state.get(), registers));
        match length {
            Some(length) => {
                registers[libc::REG_RIP as usize] += length as i64;
                PERFORMED.fetch_add(1, Ordering::Relaxed);
            }
            // The instruction runs again, with its default effect.
            None => {
                libc::signal(libc::SIGILL, libc::SIG_DFL);
            }
        }
    }
}

/// The registers in the order of their encoding.
const REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// A memory operand: a ModRM byte and the bytes after it.
struct Address {
    /// Base and displacement.
    base: i64,
    /// Scaled index; for tiles, the stride of rows.
    index: i64,
    has_sib: bool,
    /// Length in bytes, from the ModRM byte on.
    length: usize,
}

/// Emulates the instruction at the instruction pointer and returns its length; `None` if it is not an AMX instruction.
///
/// # Safety
/// The registers are those of a thread at an instruction, and the memory operands of the instruction are valid.
unsafe fn perform(state: &mut State, registers: &[i64]) -> Option<usize> {
    let ip = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: the CPU has just read the instruction; VEX instructions of this kind have at least five bytes.
    let byte = |i: usize| unsafe { *ip.add(i) };
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
        return None;
    }
    let extend = |bit: u8| if byte(1) >> bit & 1 == 0 { 8 } else { 0 };
    let (r, x, b) = (extend(7), extend(6), extend(5));
    let v = usize::from(!byte(2) >> 3 & 15);
    let (prefix, opcode, modrm) = (byte(2) & 3, byte(3), byte(4));
    let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7) + r, usize::from(modrm & 7));
    const NONE: u8 = 0;
    const REP: u8 = 2;
    const REPNE: u8 = 3;
    match (opcode, prefix, mode) {
        // tilerelease
        (0x49, NONE, 3) if modrm == 0xc0 && v == 0 => {
            *state = State { configured: false, rows: [0; 8], row_bytes: [0; 8], tiles: [CLEAR; 8] };
            Some(5)
        }
        // ldtilecfg m512
        (0x49, NONE, 0..3) if reg == 0 && v == 0 => {
            let address = address(registers, byte, mode, rm, x, b);
            let mut config = [0u8; 64];
            // SAFETY: the caller's.
            unsafe {
                std::ptr::copy_nonoverlapping((address.base + address.index) as *const u8, config.as_mut_ptr(), 64)
            };
            configure(state, &config)?;
            Some(4 + address.length)
        }
        // tilezero tmm
        (0x49, REPNE, 3) if rm == 0 && v == 0 => {
            *tile(state, reg)? = CLEAR;
            Some(5)
        }
        // tileloadd tmm, sibmem; tilestored sibmem, tmm
        (0x4b, REPNE | REP, 0..3) if v == 0 => {
            let address = address(registers, byte, mode, rm, x, b);
            if !address.has_sib {
                return None;
            }
            let (rows, bytes) = (*state.rows.get(reg)?, *state.row_bytes.get(reg)?);
            let tile = tile(state, reg)?;
            if prefix == REPNE {
                *tile = CLEAR;
            }
            for (row, data) in tile.0.iter_mut().enumerate().take(rows) {
                let memory = address.base.wrapping_add(address.index.wrapping_mul(row as i64)) as *mut u8;
                // SAFETY: the caller's.
                unsafe {
                    match prefix {
                        REPNE => std::ptr::copy_nonoverlapping(memory, data.as_mut_ptr(), bytes),
                        _ => std::ptr::copy_nonoverlapping(data.as_ptr(), memory, bytes),
                    }
                }
            }
            Some(4 + address.length)
        }
        // tdpbf16ps, tdpbssd tmm, tmm, tmm
        (0x5c, REP, 3) | (0x5e, REPNE, 3) => {
            let (to, a, b) = (reg, rm + b, v);
            if to == a || to == b || a == b {
                return None;
            }
            let (source_a, source_b) = (*tile(state, a)?, *tile(state, b)?);
            let (rows, columns, depth) = (state.rows[to], state.row_bytes[to] / 4, state.row_bytes[a] / 4);
            if rows != state.rows[a] || state.row_bytes[to] != state.row_bytes[b] || depth != state.rows[b] {
                return None;
            }
            if opcode == 0x5e {
                multiply_bytes(tile(state, to)?, &source_a, &source_b, rows, columns, depth);
                return Some(5);
            }
            // SAFETY: the library assumes AMX only with AVX-512, which implies FMA.
            unsafe { multiply(tile(state, to)?, &source_a, &source_b, rows, columns, depth) };
            Some(5)
        }
        _ => None,
    }
}

/// A configured tile.
fn tile(state: &mut State, i: usize) -> Option<&mut Tile> {
    if !state.configured || *state.rows.get(i)? == 0 {
        return None;
    }
    Some(&mut state.tiles[i])
}

fn address(registers: &[i64], byte: impl Fn(usize) -> u8, mode: u8, rm: usize, x: usize, b: usize) -> Address {
    let register = |i: usize| registers[REGISTERS[i] as usize];
    let displacement = |at: usize, bytes: usize| -> i64 {
        match bytes {
            0 => 0,
            1 => i64::from(byte(at) as i8),
            _ => i64::from(i32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)])),
        }
    };
    let mut bytes = [0, 1, 4][usize::from(mode)];
    if rm != 4 {
        // Relative to the next instruction, after the displacement.
        if rm == 5 && mode == 0 {
            let next = registers[libc::REG_RIP as usize] + 9;
            return Address { base: next + displacement(5, 4), index: 0, has_sib: false, length: 5 };
        }
        let base = register(rm + b) + displacement(5, bytes);
        return Address { base, index: 0, has_sib: false, length: 1 + bytes };
    }
    let sib = byte(5);
    let (index, base) = (usize::from(sib >> 3 & 7) + x, usize::from(sib & 7));
    let index = if index == 4 { 0 } else { register(index) << (sib >> 6) };
    let origin = if base == 5 && mode == 0 {
        bytes = 4;
        0
    } else {
        register(base + b)
    };
    Address { base: origin.wrapping_add(displacement(6, bytes)), index, has_sib: true, length: 2 + bytes }
}

fn configure(state: &mut State, config: &[u8; 64]) -> Option<()> {
    let [palette, start_row, ..] = *config;
    if palette != 1
        || start_row != 0
        || config[2..16].iter().chain(&config[32..48]).chain(&config[56..]).any(|&x| x != 0)
    {
        return None;
    }
    for i in 0..8 {
        let (bytes, rows) =
            (usize::from(u16::from_le_bytes([config[16 + 2 * i], config[17 + 2 * i]])), config[48 + i].into());
        if bytes > 64 || rows > 16 || (bytes == 0) != (rows == 0) {
            return None;
        }
        (state.row_bytes[i], state.rows[i]) = (bytes, rows);
    }
    state.tiles = [CLEAR; 8];
    state.configured = true;
    Some(())
}

/// Products of four signed bytes each are added to the target, modulo 2^32.
fn multiply_bytes(to: &mut Tile, a: &Tile, b: &Tile, rows: usize, columns: usize, depth: usize) {
    for (to, a) in to.0.iter_mut().zip(&a.0).take(rows) {
        for (n, to) in to.as_chunks_mut::<4>().0.iter_mut().enumerate().take(columns) {
            let mut sum = i32::from_le_bytes(*to);
            for (k, b) in b.0.iter().enumerate().take(depth) {
                for i in 0..4 {
                    sum = sum.wrapping_add(i32::from(a[4 * k + i] as i8) * i32::from(b[4 * n + i] as i8));
                }
            }
            *to = sum.to_le_bytes();
        }
        to[4 * columns..].fill(0);
    }
    to.0[rows..].fill([0; 64]);
}

/// Even and odd products are summed separately, by fused multiply-adds in order, from 0. Then both sums and the target
/// are added. Subnormal inputs and outputs are zero.
#[target_feature(enable = "avx2,fma")]
fn multiply(to: &mut Tile, a: &Tile, b: &Tile, rows: usize, columns: usize, depth: usize) {
    let flush = |x: f32| if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x };
    let number = |lower: u8, upper: u8| flush(f32::from_bits(u32::from_le_bytes([0, 0, lower, upper])));
    let mut pairs = [[[0f32; 16]; 2]; 16];
    for (pairs, row) in pairs.iter_mut().zip(&b.0).take(depth) {
        for n in 0..16 {
            pairs[0][n] = number(row[4 * n], row[4 * n + 1]);
            pairs[1][n] = number(row[4 * n + 2], row[4 * n + 3]);
        }
    }
    for (to, a) in to.0.iter_mut().zip(&a.0).take(rows) {
        let mut sums = [[0f32; 16]; 2];
        for k in 0..depth {
            for i in 0..2 {
                let x = number(a[4 * k + 2 * i], a[4 * k + 2 * i + 1]);
                for n in 0..16 {
                    sums[i][n] = flush(x.mul_add(pairs[k][i][n], sums[i][n]));
                }
            }
        }
        for n in 0..columns {
            let old = f32::from_le_bytes([to[4 * n], to[4 * n + 1], to[4 * n + 2], to[4 * n + 3]]);
            let new = flush(flush(old) + flush(sums[0][n] + sums[1][n]));
            to[4 * n..4 * n + 4].copy_from_slice(&new.to_le_bytes());
        }
        to[4 * columns..].fill(0);
    }
    to.0[rows..].fill([0; 64]);
}
