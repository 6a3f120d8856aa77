//! Few query rows (decode): scores and weighted values, from the cache.

use super::copies::{ZEROS, interleave, load_up_to, prefetch_row, prefetch_run};
use super::packed::repair_scores;
use super::{
    Avx512, BLOCK, Block, DotProducts, KeyPointerTable, KeyPointers, KeyRange, LANES, LINE, Packing, QUARTERS,
    RowState, STEP, VECTOR, all_finite, bf16, level_functions, padded, unpack_head, with_features,
};
use crate::kernels::avx512bf16::instructions::dot;
use crate::kernels::generic::attention::PrefetchDistances;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Keys whose scores are computed together, so that a vector holds the sums of each.
const KEYS: usize = 4;
/// Vectors of the longest key whose queries stay in registers.
const SHORT: usize = 4;

impl DotProducts {
    /// # Safety
    /// As [`Products::block`](crate::kernels::generic::attention::Products::block).
    #[inline(always)]
    pub(super) unsafe fn direct_block(
        &self,
        s: Avx512,
        block: &Block,
        rows: &mut [RowState],
        k: KeyPointers<bf16>,
        v: KeyPointers<bf16>,
    ) {
        let Block { p, tile, key_range, all, d, dv, .. } = *block;
        let (heads, head_rows) = (tile.kv_heads, tile.head_rows);
        let distances = PrefetchDistances::new(&self.tuning, block, k.cast(), v.cast());
        // SAFETY: the caller's.
        unsafe {
            for (head, index, keys) in spans(block) {
                let run = (heads > 1).then(|| distances.of_k(index).distance);
                let span = Span { head, keys, k, v, run };
                match (self.query_terms, d.div_ceil(LINE)) {
                    (1, 1) => short_scores::<1>(self, s, block, &span),
                    (1, 2) => short_scores::<2>(self, s, block, &span),
                    (1, 3) => short_scores::<3>(self, s, block, &span),
                    (1, SHORT) => short_scores::<SHORT>(self, s, block, &span),
                    (1, _) => long_scores::<1>(self, s, block, &span),
                    (2, _) => long_scores::<2>(self, s, block, &span),
                    _ => long_scores::<3>(self, s, block, &span),
                }
            }
            if self.query_terms > 1 {
                repair_scores(s, block, rows, 0, k);
            }
            self.weigh(s, block, rows, 0, key_range);
            if p.v_packing == Packing::Rows {
                if all || (0..heads).all(|head| all_finite::<Avx512, bf16>(s, v.cast(), head, key_range, dv)) {
                    for (head, index, keys) in spans(block) {
                        let run = (heads > 1).then(|| distances.of_v(index).distance);
                        self.head_values(s, block, head, &Span { head, keys, k, v, run });
                    }
                    return;
                }
                for (r, row) in rows.iter().enumerate() {
                    self.own_values(s, block, row, r, v, r / head_rows);
                }
                return;
            }
            for head in 0..heads {
                let mut pointers = [const { MaybeUninit::uninit() }; BLOCK];
                let mut unpacked = KeyPointerTable::<bf16>::new(&mut pointers);
                unpack_head::<bf16, _>(p, key_range, block.scratch.v_block, v, head);
                unpacked.place(key_range, block.scratch.v_block.cast(), padded(dv) * size_of::<bf16>());
                let v = unpacked.rows();
                if all || all_finite::<Avx512, bf16>(s, v.cast(), 0, key_range, dv) {
                    self.head_values(s, block, head, &Span { head: 0, keys: key_range, k, v, run: None });
                    continue;
                }
                for r in head * head_rows..(head + 1) * head_rows {
                    self.own_values(s, block, &rows[r], r, v, 0);
                }
            }
        }
    }

    /// Adds the weighted values of a span to the rows of head `head` of the tile.
    ///
    /// # Safety
    /// As [`Self::direct_block`]; weights are in place.
    #[inline(always)]
    unsafe fn head_values(&self, s: Avx512, block: &Block, head: usize, span: &Span) {
        let head_rows = block.tile.head_rows;
        for first in (0..head_rows).step_by(QUARTERS) {
            let values = Values { block, row: head * head_rows + first, span, prefetch: first == 0 };
            // SAFETY: the caller's.
            unsafe {
                match head_rows - first {
                    1 => direct_values::<1, 8>(self, s, &values),
                    2 => direct_values::<2, 8>(self, s, &values),
                    3 => direct_values::<3, 4>(self, s, &values),
                    _ => direct_values::<4, 4>(self, s, &values),
                }
            }
        }
    }

    /// The sums of four keys with four rows, a quarter each, as scores.
    ///
    /// # Safety
    /// The rows have scores for the keys.
    #[inline(always)]
    unsafe fn store_scores(&self, block: &Block, (row, rows): (usize, usize), first: usize, sums: [__m512; KEYS]) {
        // SAFETY: the caller's; `KEYS` scores are a quarter.
        unsafe {
            // Sums 0 and 2 are added first, and 1 and 3.
            let [a, b, c, d] = sums;
            let low = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
            let high = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
            let even = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            let odd = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
            let scores = _mm512_add_ps(even, odd);
            let out = block.scratch.s.add(row * BLOCK + first);
            _mm_storeu_ps(out, _mm512_castps512_ps128(scores));
            if rows > 1 {
                _mm_storeu_ps(out.add(BLOCK), _mm512_extractf32x4_ps::<1>(scores));
            }
            if rows > 2 {
                _mm_storeu_ps(out.add(2 * BLOCK), _mm512_extractf32x4_ps::<2>(scores));
            }
            if rows > 3 {
                _mm_storeu_ps(out.add(3 * BLOCK), _mm512_extractf32x4_ps::<3>(scores));
            }
        }
    }

    /// The rows of each vector of a head's queries: the number of the first in the tile, how many, and the vectors.
    #[inline(always)]
    fn quarters<'a>(
        &'a self,
        block: &'a Block,
        head: usize,
    ) -> impl Iterator<Item = ((usize, usize), *const u8)> + use<'a> {
        let head_rows = block.tile.head_rows;
        let groups = head_rows.div_ceil(QUARTERS);
        let bytes = self.quarter_vectors(block.d) * VECTOR;
        (0..groups).map(move |group| {
            let first = group * QUARTERS;
            let rows = (head * head_rows + first, (head_rows - first).min(QUARTERS));
            (rows, self.q.wrapping_add((head * groups + group) * bytes).cast_const())
        })
    }
}

/// Keys and values of a head that are read one after another.
struct Span<'a> {
    /// The head, as keys and values count them.
    head: usize,
    keys: KeyRange,
    k: KeyPointers<'a, bf16>,
    v: KeyPointers<'a, bf16>,
    /// If heads are read together: bytes from what is read to what is prefetched, 0 for nothing. Otherwise, keys prefetch the values of
    /// their block, and values the keys of the next block. That would be more than the second-level cache holds with many heads.
    run: Option<isize>,
}

impl Span<'_> {
    /// Prefetches while key number `j` of the block is read at `at`.
    #[inline(always)]
    fn prefetch_by_key(&self, s: Avx512, block: &Block, j: usize, at: *const bf16) {
        match self.run {
            None => prefetch_row(s, self.v.key(self.head, j), block.dv),
            Some(distance) => prefetch_run(s, at, distance, block.d),
        }
    }

    /// Prefetches while value number `j` of the block is read at `at`.
    #[inline(always)]
    fn prefetch_by_value(&self, s: Avx512, block: &Block, j: usize, at: *const bf16) {
        match self.run {
            None if self.k.next(j).is_null() => {}
            None => prefetch_row(s, self.k.next(j).wrapping_byte_offset(self.k.head_offset(self.head)), block.d),
            Some(distance) => prefetch_run(s, at, distance, block.dv),
        }
    }
}

/// Heads, subblocks and keys in the order in which they are read: several heads of a token lie together.
#[inline(always)]
fn spans(block: &Block) -> impl Iterator<Item = (usize, usize, KeyRange)> + use<> {
    let (heads, one) = (block.tile.kv_heads, block.tile.kv_heads == 1);
    let several = block.subblocks().take(if one { 0 } else { BLOCK });
    let whole = (0, 0, block.key_range);
    let several = several.flat_map(move |(index, keys)| (0..heads).map(move |head| (head, index, keys)));
    one.then_some(whole).into_iter().chain(several)
}

/// The weighted values of up to four rows, from row `row` of the tile on.
struct Values<'a> {
    block: &'a Block<'a>,
    row: usize,
    span: &'a Span<'a>,
    prefetch: bool,
}

/// Eight elements, in each quarter.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn in_quarters(from: *const bf16) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(from.cast())) }
}

level_functions! {
    /// The scores of a head's rows with some keys of up to `N` vectors, where queries have one term.
    ///
    /// # Safety
    /// As [`DotProducts::direct_block`]; queries are packed.
    #[inline(never)]
    unsafe fn short_scores<const N: usize>(products: &DotProducts, s: Avx512, block: &Block, span: &Span) {
        let Block { d, .. } = *block;
        let Span { head, keys, k, .. } = *span;
        let KeyRange { low, high } = keys;
        let part = d % LINE;
        let mut tails = [[bf16::ZERO; LINE]; KEYS];
        for (group, (rows, q)) in products.quarters(block, head).enumerate() {
            // SAFETY: the caller's.
            unsafe {
                let mut queries = [[_mm512_setzero_si512(); LINE / STEP]; N];
                for (i, x) in queries.as_flattened_mut().iter_mut().enumerate() {
                    *x = _mm512_loadu_si512(q.add(i * VECTOR).cast());
                }
                for first in (low / KEYS * KEYS..high).step_by(KEYS) {
                    let mut sums = [_mm512_setzero_ps(); KEYS];
                    // Two keys at a time, so that memory is read in its order, in two chains of products.
                    for half in (0..KEYS).step_by(2) {
                        let mut pair = [std::ptr::null(); 2];
                        for (i, key) in pair.iter_mut().enumerate() {
                            let j = (first + half + i).clamp(low, high - 1);
                            *key = k.key(head, j);
                            if group == 0 {
                                span.prefetch_by_key(s, block, j, *key);
                            }
                        }
                        for n in 0..N {
                            let mut at = [pair[0].wrapping_add(n * LINE), pair[1].wrapping_add(n * LINE)];
                            if n + 1 == N && part > 0 {
                                for (at, tail) in at.iter_mut().zip(&mut tails) {
                                    _mm512_storeu_si512(tail.as_mut_ptr().cast(), load_up_to(s, *at, part));
                                    *at = tail.as_ptr();
                                }
                            }
                            for step in 0..LINE / STEP {
                                for i in 0..2 {
                                    let x = in_quarters(at[i].add(step * STEP));
                                    sums[half + i] = dot(sums[half + i], queries[n][step], x);
                                }
                            }
                        }
                    }
                    products.store_scores(block, rows, first, sums);
                }
            }
        }
    }

    /// The scores of a head's rows with some keys, where queries have `T` terms.
    ///
    /// # Safety
    /// As [`DotProducts::direct_block`]; queries are packed.
    #[inline(never)]
    unsafe fn long_scores<const T: usize>(products: &DotProducts, s: Avx512, block: &Block, span: &Span) {
        let Block { d, .. } = *block;
        let Span { head, keys, k, .. } = *span;
        let KeyRange { low, high } = keys;
        let mut tails = [[bf16::ZERO; LINE]; KEYS];
        for (group, (rows, q)) in products.quarters(block, head).enumerate() {
            for first in (low / KEYS * KEYS..high).step_by(KEYS) {
                // SAFETY: the caller's.
                unsafe {
                    let mut keys = [std::ptr::null(); KEYS];
                    for (i, key) in keys.iter_mut().enumerate() {
                        let j = (first + i).clamp(low, high - 1);
                        *key = k.key(head, j);
                        if group == 0 {
                            span.prefetch_by_key(s, block, j, *key);
                        }
                    }
                    let mut sums = [_mm512_setzero_ps(); KEYS];
                    let mut q = q;
                    for i in (0..d).step_by(LINE) {
                        let mut at = keys;
                        for at in &mut at {
                            *at = at.add(i);
                        }
                        if d - i < LINE {
                            for (at, tail) in at.iter_mut().zip(&mut tails) {
                                _mm512_storeu_si512(tail.as_mut_ptr().cast(), load_up_to(s, *at, d - i));
                                *at = tail.as_ptr();
                            }
                        }
                        for step in 0..LINE / STEP {
                            let mut x = [_mm512_setzero_si512(); KEYS];
                            for (x, at) in x.iter_mut().zip(at) {
                                *x = in_quarters(at.add(step * STEP));
                            }
                            for t in 0..T {
                                let query = _mm512_loadu_si512(q.add(t * VECTOR).cast());
                                for i in 0..KEYS {
                                    sums[i] = dot(sums[i], query, x[i]);
                                }
                            }
                            q = q.wrapping_add(T * VECTOR);
                        }
                    }
                    products.store_scores(block, rows, first, sums);
                }
            }
        }
    }

    /// Adds the weighted values of `R` rows, up to `N` vectors of columns at a time.
    ///
    /// # Safety
    /// As [`DotProducts::direct_block`]; weights are in place.
    #[inline(never)]
    unsafe fn direct_values<const R: usize, const N: usize>(products: &DotProducts, s: Avx512, values: &Values) {
        let dv = values.block.dv;
        let mut column = 0;
        // SAFETY: the caller's.
        unsafe {
            while column < dv {
                let left = dv - column;
                column += if left >= N * LANES {
                    columns::<R, N, false>(products, s, values, column)
                } else if N > 4 && left >= 4 * LANES {
                    columns::<R, 4, false>(products, s, values, column)
                } else if left >= LINE {
                    columns::<R, 2, false>(products, s, values, column)
                } else if left > LANES {
                    columns::<R, 2, true>(products, s, values, column)
                } else {
                    columns::<R, 1, true>(products, s, values, column)
                };
            }
        }
    }
}

/// Adds `N` vectors of columns, with `PART` those that are left. Returns their number.
///
/// # Safety
/// As [`direct_values`].
#[inline(always)]
unsafe fn columns<const R: usize, const N: usize, const PART: bool>(
    products: &DotProducts,
    s: Avx512,
    values: &Values,
    column: usize,
) -> usize {
    let Values { block, row, span, prefetch } = *values;
    let Span { head, keys, v, .. } = *span;
    let Block { dv, key_range, .. } = *block;
    let (dvp, terms) = (products.dvp, products.weight_terms);
    let acc = block.scratch.acc.wrapping_add(row * dvp + column);
    // SAFETY: the caller's; outputs are padded to whole vectors.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); N]; R];
        for r in 0..R {
            for n in 0..N {
                sums[r][n] = _mm512_loadu_ps(acc.add(r * dvp + n * LANES));
            }
        }
        let weights = products.weights.cast::<i32>().add(row * terms * (BLOCK / 2));
        for pair in keys.low / 2..keys.high.div_ceil(2) {
            let mut from = [ZEROS.as_ptr(); 2];
            for (i, from) in from.iter_mut().enumerate() {
                let j = 2 * pair + i;
                if j >= key_range.low && j < key_range.high {
                    *from = v.key(head, j).wrapping_add(column);
                    if prefetch && column == 0 {
                        span.prefetch_by_value(s, block, j, *from);
                    }
                }
            }
            let mut x = [_mm512_setzero_si512(); N];
            for n in (0..N).step_by(2) {
                let (even, odd) = (from[0].wrapping_add(n * LANES), from[1].wrapping_add(n * LANES));
                let (even, odd) = if PART {
                    (load_up_to(s, even, dv - column), load_up_to(s, odd, dv - column))
                } else {
                    (_mm512_loadu_si512(even.cast()), _mm512_loadu_si512(odd.cast()))
                };
                let both = interleave(s, even, odd);
                x[n] = both[0];
                if n + 1 < N {
                    x[n + 1] = both[1];
                }
            }
            for t in 0..terms {
                for r in 0..R {
                    let pair = _mm512_set1_epi32(*weights.add((r * terms + t) * (BLOCK / 2) + pair));
                    for n in 0..N {
                        sums[r][n] = dot(sums[r][n], pair, x[n]);
                    }
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                _mm512_storeu_ps(acc.add(r * dvp + n * LANES), sums[r][n]);
            }
        }
    }
    N * LANES
}
