//! Many query rows (prefill): scores and weighted values from packed copies of a block.

use super::queries::{pairs_of, rows_at_once};
use super::{
    Avx512, BLOCK, Block, DotProducts, KeyPointers, KeyRange, LANES, LINE, RowState, SUMS, Simd, VECTOR, bf16,
    level_functions, non_finite, padded, with_features,
};
use crate::kernels::avx512bf16::instructions::dot;
use crate::problem::tile::{MAX_TILE_ROWS, TILE_ROWS};
use std::arch::x86_64::*;

/// Upper bound on the register tiles of a tile: the last rows can take three.
const MAX_GROUPS: usize = MAX_TILE_ROWS / TILE_ROWS + 2;

/// Rows of a register tile, and the keys of a block from the first to the last that one of them sees.
#[derive(Clone, Copy)]
struct Group {
    first: usize,
    rows: usize,
    keys: KeyRange,
}

impl DotProducts {
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block), for one KV head.
    #[inline(always)]
    pub(super) unsafe fn packed_block(
        &self,
        s: Avx512,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        let Block { key_range, all, .. } = *block;
        let mut groups = [Group { first: 0, rows: 0, keys: KeyRange { low: 0, high: 0 } }; MAX_GROUPS];
        let (mut first, mut count) = (0, 0);
        while first < rows.len() {
            let n = rows_at_once(rows.len() - first);
            let keys = KeyRange::around(rows[first..first + n].iter().fold(0, |bits, row| bits | row.visible_bits));
            if keys.low < keys.high {
                groups[count] = Group { first, rows: n, keys };
                count += 1;
            }
            first += n;
        }
        // SAFETY: the caller's.
        unsafe {
            self.pack_keys(s, block, k);
            for group in &groups[..count] {
                let rows = &mut rows[group.first..group.first + group.rows];
                self.scores(block, group);
                if self.query_terms > 1 {
                    repair_scores(s, block, rows, group.first, k);
                }
                self.weigh(s, block, rows, group.first, group.keys);
            }
            let finite = self.pack_values(s, block, v, 0, key_range.bits() & block.visible_bits);
            if !all && !finite {
                for (r, row) in rows.iter().enumerate() {
                    self.own_values(s, block, row, r, v, 0);
                }
                return;
            }
            let mut vector = 0;
            while vector * LANES < block.dv {
                for group in &groups[..count] {
                    self.values(block, group, vector);
                }
                vector += 4;
            }
        }
    }

    /// Adds the values of the keys that a row sees, from a copy of its own.
    ///
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block); the row's weights are in place.
    #[cold]
    #[inline(never)]
    pub(super) unsafe fn own_values(
        &self,
        s: Avx512,
        block: &Block,
        row: &RowState,
        r: usize,
        v: KeyPointers<bf16>,
        head: usize,
    ) {
        let keys = KeyRange::around(row.visible_bits & block.key_range.bits());
        if keys.low == keys.high {
            return;
        }
        // SAFETY: the caller's.
        unsafe {
            pack_visible_values(self, s, block, v, head, row.visible_bits & block.key_range.bits());
            let mut vector = 0;
            while vector * LANES < block.dv {
                self.values(block, &Group { first: r, rows: 1, keys }, vector);
                vector += 4;
            }
        }
    }

    /// # Safety
    /// Queries and keys are packed.
    #[inline(always)]
    unsafe fn scores(&self, block: &Block, group: &Group) {
        // SAFETY: the caller's.
        unsafe {
            match (group.rows, self.query_terms) {
                (6, 1) => scores::<6, 1>(self, block, group),
                (6, 2) => scores::<6, 2>(self, block, group),
                (6, _) => scores::<6, 3>(self, block, group),
                (4, 1) => scores::<4, 1>(self, block, group),
                (4, 2) => scores::<4, 2>(self, block, group),
                (4, _) => scores::<4, 3>(self, block, group),
                (2, 1) => scores::<2, 1>(self, block, group),
                (2, 2) => scores::<2, 2>(self, block, group),
                (2, _) => scores::<2, 3>(self, block, group),
                (_, 1) => scores::<1, 1>(self, block, group),
                (_, 2) => scores::<1, 2>(self, block, group),
                (_, _) => scores::<1, 3>(self, block, group),
            }
        }
    }

    /// Adds up to four vectors of columns from `vector` on.
    ///
    /// # Safety
    /// Weights and values are in place.
    #[inline(always)]
    unsafe fn values(&self, block: &Block, group: &Group, vector: usize) {
        let width = self.slab_of(vector).1;
        // SAFETY: the caller's.
        unsafe {
            match (group.rows, width) {
                (6, 4) => values::<6, 4>(self, block, group, vector),
                (6, 3) => values::<6, 3>(self, block, group, vector),
                (6, 2) => values::<6, 2>(self, block, group, vector),
                (6, _) => values::<6, 1>(self, block, group, vector),
                (4, 4) => values::<4, 4>(self, block, group, vector),
                (4, 3) => values::<4, 3>(self, block, group, vector),
                (4, 2) => values::<4, 2>(self, block, group, vector),
                (4, _) => values::<4, 1>(self, block, group, vector),
                (2, 4) => values::<2, 4>(self, block, group, vector),
                (2, 3) => values::<2, 3>(self, block, group, vector),
                (2, 2) => values::<2, 2>(self, block, group, vector),
                (2, _) => values::<2, 1>(self, block, group, vector),
                (_, 4) => values::<1, 4>(self, block, group, vector),
                (_, 3) => values::<1, 3>(self, block, group, vector),
                (_, 2) => values::<1, 2>(self, block, group, vector),
                (_, _) => values::<1, 1>(self, block, group, vector),
            }
        }
    }
}

/// Recomputes the scores of some query rows that are NaN, for visible keys.
///
/// # Safety
/// The scores of the rows, the first of which is row `first` of the tile, have been computed.
#[inline(always)]
pub(super) unsafe fn repair_scores(s: Avx512, block: &Block, rows: &[RowState], first: usize, k: KeyPointers<bf16>) {
    let Block { scratch, key_range, d, tile, .. } = *block;
    for (r, row) in rows.iter().enumerate() {
        let r = first + r;
        let scores = scratch.s.wrapping_add(r * BLOCK);
        // SAFETY: a row has BLOCK scores; those of masked keys are arbitrary. Visible keys are in the key range, and
        // the row's query is as long as a key.
        unsafe {
            let mut not_a_number = 0;
            for i in (0..BLOCK).step_by(LANES) {
                let x = s.load_f32(scores.add(i));
                not_a_number |= u64::from(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x)) << i;
            }
            let repair = row.visible_bits & key_range.bits() & not_a_number;
            if repair != 0 {
                let q = std::slice::from_raw_parts(scratch.q.add(r * padded(d)), d);
                let head = r / tile.head_rows;
                non_finite::recompute_nan_scores(repair, q, 1, |j| k.key(head, j), |j| scores.add(j));
            }
        }
    }
}

level_functions! {
    /// The scores of `R` rows with their visible keys, and with those keys' neighbours up to sixteen.
    ///
    /// # Safety
    /// Queries and keys are packed.
    #[inline(never)]
    unsafe fn scores<const R: usize, const T: usize>(products: &DotProducts, block: &Block, group: &Group) {
        let pairs = pairs_of(block.d);
        let vectors = block.d.div_ceil(LINE) * LANES;
        let out = block.scratch.s.wrapping_add(group.first * BLOCK);
        for column in group.keys.low / LANES..group.keys.high.div_ceil(LANES) {
            // SAFETY: the caller's.
            unsafe {
                let mut k = products.k.add(column * vectors * VECTOR);
                let mut q = products.q.cast::<i32>().add(group.first * pairs * T);
                let mut sums = [[_mm512_setzero_ps(); SUMS]; R];
                for _ in 0..pairs / SUMS {
                    for c in 0..SUMS {
                        let keys = _mm512_loadu_si512(k.add(c * VECTOR).cast());
                        for t in 0..T {
                            for r in 0..R {
                                let pair = _mm512_set1_epi32(*q.add((c * T + t) * R + r));
                                sums[r][c] = dot(sums[r][c], pair, keys);
                            }
                        }
                    }
                    (k, q) = (k.wrapping_add(SUMS * VECTOR), q.wrapping_add(SUMS * T * R));
                }
                for r in 0..R {
                    let [a, b, c, d] = sums[r];
                    let sum = _mm512_add_ps(_mm512_add_ps(a, c), _mm512_add_ps(b, d));
                    _mm512_storeu_ps(out.add(r * BLOCK + column * LANES), sum);
                }
            }
        }
    }

    /// Adds the weighted values of `R` rows' visible keys to `N` vectors of columns, from vector `vector` on.
    ///
    /// # Safety
    /// Weights and values are in place.
    #[inline(never)]
    unsafe fn values<const R: usize, const N: usize>(
        products: &DotProducts,
        block: &Block,
        group: &Group,
        vector: usize,
    ) {
        let terms = products.weight_terms;
        let acc = block.scratch.acc.wrapping_add(group.first * products.dvp + vector * LANES);
        let (low, high) = (group.keys.low / 2, group.keys.high.div_ceil(2));
        // SAFETY: the caller's.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); N]; R];
            for r in 0..R {
                for n in 0..N {
                    sums[r][n] = _mm512_loadu_ps(acc.add(r * products.dvp + n * LANES));
                }
            }
            let v = products.v.add(vector * (BLOCK / 2) * VECTOR);
            let weights = products.weights.cast::<i32>().add(group.first * terms * (BLOCK / 2));
            if terms == 1 {
                for pair in low..high {
                    add_pair::<R, N, 1>(weights.add(pair), v.add(pair * N * VECTOR), &mut sums);
                }
            } else {
                for pair in low..high {
                    add_pair::<R, N, 2>(weights.add(pair), v.add(pair * N * VECTOR), &mut sums);
                }
            }
            for r in 0..R {
                for n in 0..N {
                    _mm512_storeu_ps(acc.add(r * products.dvp + n * LANES), sums[r][n]);
                }
            }
        }
    }

    /// [`DotProducts::pack_values`], as a function of its own.
    ///
    /// # Safety
    /// The same.
    #[inline(never)]
    unsafe fn pack_visible_values(
        products: &DotProducts,
        s: Avx512,
        block: &Block,
        v: KeyPointers<bf16>,
        head: usize,
        visible_bits: u64,
    ) {
        // SAFETY: the caller's.
        unsafe { products.pack_values(s, block, v, head, visible_bits) };
    }
}

/// Adds the weighted values of a pair of keys.
///
/// # Safety
/// The weights of `R` rows and `N` vectors of values are readable.
#[inline(always)]
unsafe fn add_pair<const R: usize, const N: usize, const T: usize>(
    weights: *const i32,
    v: *const u8,
    sums: &mut [[__m512; N]; R],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut x = [_mm512_setzero_si512(); N];
        for n in 0..N {
            x[n] = _mm512_loadu_si512(v.add(n * VECTOR).cast());
        }
        for t in 0..T {
            for r in 0..R {
                let pair = _mm512_set1_epi32(*weights.add((r * T + t) * (BLOCK / 2)));
                for n in 0..N {
                    sums[r][n] = dot(sums[r][n], pair, x[n]);
                }
            }
        }
    }
}
