//! Weighted sums of values that lie in the cache.

use super::prefetch::Ahead;
use super::{PASS_ROWS, rows_of_pass};
use crate::kernels::generic::attention::row_pairs::load_two;
use crate::kernels::generic::attention::weighted::{ValueRows, WeightedValues, load_up_to};
use crate::kernels::generic::attention::{Block, KeyPointers};
use crate::kernels::simd::{Load, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use crate::problem::tile::PACK_ROWS;
use std::ops::Range;

/// Adds the weighted values of a subblock to the accumulators of some heads' rows.
#[derive(Clone)]
pub(crate) struct DirectValues<'a> {
    pub block: &'a Block<'a>,
    pub v: KeyPointers<'a, u8>,
    pub heads: Range<usize>,
    pub keys: KeyRange,
    /// As in [`WeightedValues`].
    pub fresh: bool,
    /// As in [`WeightedValues`], of all rows of the tile. Blocks have none.
    pub scales: *const f32,
    pub ahead: Ahead,
}

impl DirectValues<'_> {
    /// Adds values of type `T`; see [`CacheValues`] for `PAIRS`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load, const PAIRS: bool>(self, s: S) {
        let Block { tile, scratch, dv, .. } = *self.block;
        let row_bytes = dv * size_of::<T>();
        let in_order = !PAIRS
            && tile.kv_heads == 1
            && self.keys.len() == BLOCK
            // The keys of the next block, which are ahead, lie as the values do where all distances are the same.
            && self.v.key(0, 1).addr().wrapping_sub(self.v.key(0, 0).addr()) == row_bytes
            && row_bytes == self.block.p.k.dtype.head_bytes(self.block.d);
        for head in self.heads.clone() {
            let mut row = 0;
            while row < tile.head_rows {
                let first = head * tile.head_rows + row;
                let piece = WeightedValues {
                    weights: scratch.s.wrapping_add(first * BLOCK + self.keys.low),
                    acc: scratch.acc.wrapping_add(first * scratch.acc_row),
                    acc_row: scratch.acc_row,
                    v: CacheValues::<T, PAIRS> { rows: self.v.cast(), head, first: self.keys.low },
                    keys: self.keys.len(),
                    fresh: self.fresh,
                    scales: if self.scales.is_null() { self.scales } else { self.scales.wrapping_add(first) },
                    ahead: if row == 0 { self.ahead } else { Ahead::NONE },
                    in_order,
                };
                let left = tile.head_rows - row;
                // SAFETY: the caller's; the rows are inside the tile.
                unsafe {
                    if const { S::FEW_REGISTERS && !S::FEW_LOOPS && !PAIRS }
                        && left >= 4
                        && self.fresh
                        && self.keys.len() == 1
                    {
                        piece.one_key::<S, 4>(s, dv);
                        row += 4;
                        continue;
                    }
                    if const { S::FEW_LOOPS } {
                        if left < 4 {
                            piece.columns::<S, 1, 2>(s, dv);
                            row += 1;
                        } else {
                            piece.columns::<S, 4, 2>(s, dv);
                            row += 4;
                        }
                        continue;
                    }
                    if const {
                        S::FEW_REGISTERS
                            && (size_of::<T>() == size_of::<f32>() || S::NARROW_LOOPS && size_of::<T>() > 1 && !PAIRS)
                    } && left >= 6
                        && tile.head_rows >= PACK_ROWS
                    {
                        piece.columns::<S, 6, 2>(s, dv);
                        row += 6;
                        continue;
                    }
                    if const { !S::FEW_REGISTERS } {
                        let pass = rows_of_pass(left, PASS_ROWS);
                        match pass {
                            1 => piece.columns::<S, 1, 8>(s, dv),
                            2 => piece.columns::<S, 2, 8>(s, dv),
                            3 => piece.columns::<S, 3, 8>(s, dv),
                            4 => piece.columns::<S, 4, 4>(s, dv),
                            5 => piece.columns::<S, 5, 4>(s, dv),
                            6 if const { size_of::<T>() > 1 } => piece.columns::<S, 6, 4>(s, dv),
                            6 => piece.columns::<S, 6, 2>(s, dv),
                            7 => piece.columns::<S, 7, 2>(s, dv),
                            _ => piece.columns::<S, 8, 2>(s, dv),
                        }
                        row += pass;
                        continue;
                    }
                    match left {
                        1 => piece.columns::<S, 1, 8>(s, dv),
                        2 => piece.columns::<S, 2, 4>(s, dv),
                        3 => piece.columns::<S, 3, 2>(s, dv),
                        _ => piece.columns::<S, 4, 2>(s, dv),
                    }
                }
                row += 4;
            }
        }
    }
}

/// Values in the cache: keys of a block and KV head, counted from `first`. With `PAIRS`, every even key begins a pair of slots.
pub struct CacheValues<'a, T, const PAIRS: bool> {
    pub rows: KeyPointers<'a, T>,
    pub head: usize,
    pub first: usize,
}

impl<T: Load, const PAIRS: bool> ValueRows for CacheValues<'_, T, PAIRS> {
    type Element = T;
    const IN_CACHE: bool = true;
    const IN_PAIRS: bool = PAIRS;
    #[inline(always)]
    fn at(&self, key: usize, offset: isize) -> *const T {
        self.rows.key(0, self.first + key).wrapping_byte_offset(offset)
    }
    #[inline(always)]
    fn offset(&self, column: usize) -> isize {
        self.rows.head_offset(self.head) + (if PAIRS { 2 } else { 1 } * column * size_of::<T>()) as isize
    }

    #[inline(always)]
    unsafe fn add_two<S: Simd, const R: usize, const N: usize>(
        s: S,
        weighted: &WeightedValues<Self>,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) {
        if const { !PAIRS } {
            // SAFETY: the caller's.
            unsafe { weighted.add_each(s, j, offset, part, sums) };
            return;
        }
        let pair = weighted.v.at(j, offset);
        if weighted.ahead.distance != 0 {
            for n in 0..N {
                weighted.ahead.pair(s, pair.wrapping_add(2 * n * S::LANES));
            }
        }
        // SAFETY: the caller's.
        unsafe {
            let x = load_two::<S, T, N>(s, pair, part);
            for (i, x) in x.iter().enumerate() {
                weighted.add_values(s, j + i, x, sums);
            }
        }
    }
}

/// Whether the values of a key range and KV head are finite.
///
/// # Safety
/// As [`block`].
#[inline(always)]
pub(crate) unsafe fn all_finite<S: Simd, T: Load>(
    s: S,
    v: KeyPointers<u8>,
    head: usize,
    key_range: KeyRange,
    dv: usize,
) -> bool {
    if T::ALWAYS_FINITE {
        return true;
    }
    for j in key_range.low..key_range.high {
        let row = v.key(head, j).cast::<T>();
        let mut i = 0;
        while i < dv {
            let part = (dv - i).min(S::LANES);
            // SAFETY: `part` elements are left.
            if !s.all_finite(unsafe { load_up_to(s, row.add(i), part) }) {
                return false;
            }
            i += part;
        }
    }
    true
}

/// One row of a tile, one key of a block.
pub(crate) struct OneValue<'a> {
    pub block: &'a Block<'a>,
    pub row: usize,
    pub key: usize,
    pub v: KeyPointers<'a, u8>,
}

impl OneValue<'_> {
    /// Adds the weighted value, of type `T`.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(&self, s: S) {
        let Self { block: &Block { tile, scratch, dv, .. }, row, key, v } = *self;
        let one = WeightedValues {
            weights: scratch.s.wrapping_add(row * BLOCK + key),
            acc: scratch.acc.wrapping_add(row * scratch.acc_row),
            acc_row: scratch.acc_row,
            v: CacheValues::<T, false> { rows: v.cast(), head: row / tile.head_rows, first: key },
            keys: 1,
            fresh: false,
            scales: std::ptr::null(),
            ahead: Ahead::NONE,
            in_order: false,
        };
        // SAFETY: the caller's.
        unsafe { one.columns::<S, 1, 2>(s, dv) }
    }
}
