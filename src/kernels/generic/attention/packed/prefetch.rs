//! Prefetches of the packed path.

use crate::kernels::generic::attention::KeyPointers;
use crate::kernels::simd::Simd;
use crate::problem::grid::BLOCK;
use crate::tuning::Tuning;

/// Prefetches K or V of the next block while this one is computed, a few lines at a time: more lines than a core has fill buffers
/// would stall it.
#[derive(Clone, Copy)]
pub struct NextBlock<'a> {
    pub rows: KeyPointers<'a, u8>,
    /// The row that is prefetched, the next address in it, and the bytes left.
    pub key: usize,
    pub at: *const u8,
    pub left: usize,
    pub row: usize,
    /// Prefetches per call.
    pub each: usize,
    /// Bytes that a prefetch brings.
    fetch_bytes: usize,
}

impl<'a> NextBlock<'a> {
    /// Spreads the prefetches over `calls` calls; a row has `row` bytes.
    #[inline(always)]
    pub fn new(tuning: &Tuning, rows: KeyPointers<'a, u8>, row: usize, calls: usize) -> Self {
        let fetch_bytes = tuning.fetch_bytes();
        let each = (row.div_ceil(fetch_bytes) * BLOCK).div_ceil(calls.max(1));
        let at = rows.next(0);
        Self { rows, key: 0, at, left: if at.is_null() { 0 } else { row }, row, each, fetch_bytes }
    }

    #[inline(always)]
    pub fn prefetch<S: Simd>(&mut self, s: S) {
        // In registers: in memory, each prefetch would wait for the address that the one before it stored.
        let mut next = *self;
        for _ in 0..next.each {
            if next.left == 0 {
                break;
            }
            s.prefetch_far(next.at);
            next.at = next.at.wrapping_add(next.fetch_bytes);
            next.left = next.left.saturating_sub(next.fetch_bytes);
            if next.left == 0 && next.key + 1 < BLOCK {
                next.key += 1;
                next.at = next.rows.next(next.key);
                next.left = if next.at.is_null() { 0 } else { next.row };
            }
        }
        *self = next;
    }
}
