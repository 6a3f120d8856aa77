//! Packed copies of values, and their weighted sums.

use super::RowTile;
use crate::kernels::generic::attention::direct::Ahead;
use crate::kernels::generic::attention::weighted::{ValueRows, WeightedValues, load_up_to};
use crate::kernels::generic::attention::{Block, KeyPointers};
use crate::kernels::simd::{Load, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use std::ops::Range;

/// First column and width of the slabs in which columns of a block of V are packed: as wide as a register tile, then two vectors, then
/// one.
#[inline(always)]
pub fn value_slabs<S: Simd>(columns: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let Range { start: mut column, end } = columns;
    std::iter::from_fn(move || {
        let left = end - column;
        let vectors = if left >= S::TILE_VECTORS * S::LANES {
            S::TILE_VECTORS
        } else if left >= 2 * S::LANES {
            2
        } else {
            1
        };
        let slab = (column, vectors * S::LANES);
        column = (column + vectors * S::LANES).min(end);
        (left > 0).then_some(slab)
    })
}

/// Widens columns of the values of a key range into the slabs of [`value_slabs`]: `[slab][key][columns]`. With `check`, says whether
/// all are finite.
#[derive(Clone, Copy)]
pub(crate) struct PackValues<'a> {
    pub block: &'a Block<'a>,
    pub v: KeyPointers<'a, u8>,
    /// The first column, at which a slab begins, and the end.
    pub columns: (usize, usize),
    pub check: bool,
}

impl PackValues<'_> {
    /// Packs values of type `T`; true unless one was to be checked and is not finite.
    ///
    /// # Safety
    /// As [`block`].
    #[inline(always)]
    pub unsafe fn run<S: Simd, T: Load>(self, s: S) -> bool {
        let Self { block: &Block { scratch, key_range, .. }, v, columns: (first, end), check } = self;
        let check = check && !T::ALWAYS_FINITE;
        let mut finite = true;
        let v = v.cast::<T>();
        for (column, width) in value_slabs::<S>(first..end) {
            for j in key_range.low..key_range.high {
                let row = v.key(0, j).wrapping_add(column);
                let to = scratch.vp.wrapping_add((column - first) * BLOCK + j * width);
                let mut i = 0;
                // SAFETY: the value has dv elements; vp has a slab of BLOCK keys for every column of padded(dv).
                unsafe {
                    while i + 2 * S::LANES <= width {
                        let x = T::load_pair(s, row.add(i));
                        s.store_f32(to.add(i), x[0]);
                        s.store_f32(to.add(i + S::LANES), x[1]);
                        if check {
                            finite &= s.all_finite(x[0]) && s.all_finite(x[1]);
                        }
                        i += 2 * S::LANES;
                    }
                    if i < width {
                        let part = (end - column).min(S::LANES);
                        let x = load_up_to(s, row, part);
                        s.store_f32(to, x);
                        if check {
                            finite &= s.all_finite(x);
                        }
                    }
                }
            }
        }
        finite
    }
}

/// Values in a packed copy, `width` floats apart.
pub struct PackedValues {
    pub first: *const f32,
    pub width: usize,
}

impl ValueRows for PackedValues {
    type Element = f32;
    const IN_CACHE: bool = false;
    #[inline(always)]
    fn at(&self, key: usize, offset: isize) -> *const f32 {
        self.first.wrapping_add(key * self.width).wrapping_byte_offset(offset)
    }
    #[inline(always)]
    fn offset(&self, column: usize) -> isize {
        (column * size_of::<f32>()) as isize
    }
}

/// Adds the weighted values of a slab to rows.
pub struct Values {
    pub weighted: WeightedValues<PackedValues>,
    pub vectors: usize,
}

impl RowTile for Values {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(self, s: S) {
        // SAFETY: the caller's.
        unsafe {
            match self.vectors {
                4 if const { S::TILE_VECTORS == 4 } => self.weighted.add::<S, R, 4>(s, 0, S::LANES, None),
                2 => self.weighted.add::<S, R, 2>(s, 0, S::LANES, None),
                _ => self.weighted.add::<S, R, 1>(s, 0, S::LANES, None),
            }
        }
    }
}

/// Adds the weighted values of all slabs of a panel to rows: one call for all, where a call costs as much as some keys.
pub struct PanelValues {
    pub weights: *const f32,
    pub acc: *mut f32,
    /// Floats between neighbouring accumulators.
    pub acc_row: usize,
    /// The slabs, which begin with a block's first key.
    pub v: *const f32,
    pub columns: usize,
    pub keys: KeyRange,
    /// As in [`WeightedValues`].
    pub fresh: bool,
}

impl RowTile for PanelValues {
    #[inline(always)]
    unsafe fn run<S: Simd, const R: usize>(self, s: S) {
        let Self { weights, acc, acc_row, v, columns, keys, fresh } = self;
        for (column, width) in value_slabs::<S>(0..columns) {
            let weighted = WeightedValues {
                weights,
                acc: acc.wrapping_add(column),
                acc_row,
                v: PackedValues { first: v.wrapping_add(column * BLOCK + keys.low * width), width },
                keys: keys.len(),
                fresh,
                scales: std::ptr::null(),
                ahead: Ahead::NONE,
                in_order: false,
            };
            // SAFETY: the caller's.
            unsafe {
                match width / S::LANES {
                    2 => weighted.add::<S, R, 2>(s, 0, S::LANES, None),
                    _ => weighted.add::<S, R, 1>(s, 0, S::LANES, None),
                }
            }
        }
    }
}
