//! Few query rows: products with keys and values that are read once.
//!
//! A tile of sixteen keys, as they lie in the cache, takes the place of the queries, and the queries, transposed, that of the keys: the
//! same products in the same order, whose sums are transposed afterwards. Values that are packed in pairs of slots are operands as they
//! lie in the cache, where all rows see all keys; others are packed, a block at a time.
//!
//! # What bounds it
//! Memory, if tile products do not stop the reading: hardware prefetchers are idle while products are computed, and a loop that reads 28
//! GB/s from the third-level cache falls to 14 with 350 cycles of products per 16 KiB. So what is read next is prefetched between the
//! products, sixteen lines for each, in the order of memory (for several KV heads, whole tokens): K and packed pairs of V then come at
//! 27 GB/s, V in rows, whose packing takes another 700 cycles per block, at 23. More lines at a time wait for each other.

use super::super::tiles::{Operand, ROW_BYTES, TILE_BYTES, Tiles};
use super::scratch::{Group, SCORES_ROW, SECOND_TERM, Sizes, WEIGHTS};
use super::values::{first_elements, pack_values};
use super::{Call, DEPTH, LANES, PARTS};
use crate::kernels::avx512::Avx512;
use crate::kernels::generic::attention::{KeyPointers, SUBBLOCK, are_pairs};
use crate::kernels::simd::{LINE, MAX_LANES, Simd};
use crate::problem::grid::{BLOCK, KeyRange};
use half::bf16;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows that are transposed by fewer instructions.
const FEW_ROWS: usize = 4;
/// Lines that are prefetched for each product of a tile of a block.
const LINES: usize = 16;

/// Writes a statement for the accumulators 0 to 3, whose number is part of instructions.
macro_rules! four_times {
    ($i:ident => $body:expr) => {
        four_times!(@ $i $body, 0 1 2 3)
    };
    (@ $i:ident $body:expr, $($number:literal)*) => {
        $({
            let $i: usize = $number;
            $body
        })*
    };
}

/// Transposes the packed queries of all groups.
///
/// # Safety
/// The queries are packed.
#[inline(always)]
pub(super) unsafe fn transpose_queries(s: Avx512, call: &Call) {
    for tile in 0..call.tile.kv_heads * call.terms * call.sizes.steps() {
        let tile = call.scratch.q.wrapping_add(tile * TILE_BYTES).cast::<f32>();
        // SAFETY: the caller's; a tile has sixteen vectors.
        unsafe {
            if call.cut.group_rows <= FEW_ROWS {
                transpose_first(s, tile);
                continue;
            }
            for (i, x) in transpose(s, tile).iter().enumerate() {
                s.store_f32(tile.add(i * LANES), *x);
            }
        }
    }
}

/// Scores of the rows of KV head `head` of the tile, which are a group, with the keys of block `b`.
///
/// # Safety
/// The transposed queries are in place; the key range is inside K.
#[inline(always)]
pub(super) unsafe fn scores(
    s: Avx512,
    tiles: &Tiles,
    call: &Call,
    (b, head, rows): (usize, usize, usize),
    key_range: KeyRange,
    k: KeyPointers<bf16>,
) {
    let Call { scratch, sizes, terms, .. } = call;
    let steps = sizes.steps();
    let mut ahead = Ahead::new(call, head, k, sizes.d * size_of::<bf16>(), 1);
    // Scores with keys outside the key range will be replaced.
    let used = key_range.low / LANES..key_range.high.div_ceil(LANES);
    // SAFETY: the caller's.
    unsafe {
        let whole = key_range.len() == BLOCK && sizes.d == sizes.dk;
        let stride = if whole { k.stride(key_range, 1) } else { None };
        let first = k.key(head, key_range.low).cast::<u8>();
        let mut keys = [const { MaybeUninit::uninit() }; BLOCK / LANES];
        if stride.is_none() {
            super::place_block(s, call, head, key_range, k, &mut keys);
        }
        tiles.zero();
        for step in 0..steps {
            for term in 0..*terms {
                tiles.hold(scratch.q.add(((head * terms + term) * steps + step) * TILE_BYTES));
                four_times!(i => if used.contains(&i) {
                    let (key, stride) = match stride {
                        Some(stride) => {
                            let key = first.wrapping_offset((i * LANES) as isize * stride);
                            (key.wrapping_add(step * ROW_BYTES as usize), stride)
                        }
                        None => keys[i].assume_init_ref().step(step),
                    };
                    tiles.add::<false>(i, key, stride);
                    ahead.prefetch(s);
                });
            }
        }
        let sums = scratch.transposed;
        for i in used.clone() {
            tiles.store(i, sums.add(i * LANES * LANES), ROW_BYTES);
        }
        for i in used {
            let to = scratch.s.add(head * call.cut.group_rows * SCORES_ROW + b * BLOCK + i * LANES);
            let sums = sums.add(i * LANES * LANES);
            if rows <= FEW_ROWS {
                let scores = transpose_few(s, sums);
                for (r, scores) in scores[..rows].iter().enumerate() {
                    s.store_f32(to.add(r * SCORES_ROW), *scores);
                }
            } else {
                for (r, x) in transpose(s, sums)[..rows].iter().enumerate() {
                    s.store_f32(to.add(r * SCORES_ROW), *x);
                }
            }
        }
    }
}

/// Adds the weighted values of block `b` to the rows of a KV head. Returns the keys whose values have elements that are not finite, which
/// are left out.
///
/// # Safety
/// The weights are in place; the key range is inside V.
#[inline(always)]
pub(super) unsafe fn outputs<const HIGH: bool>(
    s: Avx512,
    tiles: &Tiles,
    call: &Call,
    (b, head, group): (usize, usize, &Group),
    key_range: KeyRange,
    v: KeyPointers<bf16>,
) -> u64 {
    let Call { p, sizes, natural, .. } = call;
    let (count, width) = (sizes.tiles(), sizes.dv * size_of::<bf16>());
    let mut non_finite = 0;
    // Where every row sees every key, NaN and infinity come through the products.
    let as_they_are = *natural
        && sizes.dv == sizes.dvp
        && key_range.len() == BLOCK
        && group.visible_bits[b][..group.rows].iter().all(|&bits| bits == u64::MAX)
        && are_pairs(p, &v, key_range);
    let stride = if as_they_are { v.stride(key_range, 2) } else { None };
    let place = stride.map(|stride| (v.key(head, 0).cast::<u8>(), stride));
    // SAFETY: the caller's.
    unsafe {
        if place.is_none() {
            non_finite = pack_values(s, call, (b, head), key_range, v);
        }
        let mut ahead =
            if *natural { Ahead::new(call, head, v, 2 * width, 2) } else { Ahead::new(call, head, v, width, 1) };
        let parts = || (place, parts_of(key_range));
        for first in (0..count).step_by(4) {
            if first + 2 == count {
                output_tiles::<HIGH, 2>(s, tiles, call, (b, head, group, first), parts(), &mut ahead);
            } else {
                output_tiles::<HIGH, 4>(s, tiles, call, (b, head, group, first), parts(), &mut ahead);
            }
        }
    }
    non_finite
}

/// The parts of 32 keys of a block that a key range touches. The weights of the others are 0.
pub(super) fn parts_of(key_range: KeyRange) -> Range<usize> {
    key_range.low / DEPTH..key_range.high.div_ceil(DEPTH)
}

/// [`outputs`] of `N` tiles, from tile `first` on, by some parts of the values at `place`, with the bytes between pairs, or packed ones.
///
/// # Safety
/// The weights and the values are in place; `N` is 2 or 4.
#[inline(always)]
unsafe fn output_tiles<const HIGH: bool, const N: usize>(
    s: Avx512,
    tiles: &Tiles,
    call: &Call,
    (b, head, group, first): (usize, usize, &Group, usize),
    (place, parts): (Option<(Operand, isize)>, Range<usize>),
    ahead: &mut Ahead,
) {
    let Call { scratch, sizes, .. } = call;
    let acc = scratch.acc.wrapping_add((head * sizes.tiles() + first) * LANES * LANES);
    // SAFETY: the caller's.
    unsafe {
        if group.fresh {
            tiles.zero();
        } else {
            four_times!(i => if i < N { tiles.load(i, acc.wrapping_add(i * LANES * LANES)) });
        }
        for part in parts.clone() {
            for term in 0..if HIGH { 2 } else { 1 } {
                let weights = term * SECOND_TERM + (b * PARTS + part) * TILE_BYTES;
                tiles.hold(scratch.p.add(head * WEIGHTS + weights));
                four_times!(i => if i < N {
                    let (values, stride) = match place {
                        Some((values, stride)) => {
                            let pair = values.wrapping_offset((part * DEPTH / 2) as isize * stride);
                            (pair.wrapping_add((first + i) * ROW_BYTES as usize), stride)
                        }
                        None => {
                            (scratch.v.add(call.value_tile(first + i, part) * TILE_BYTES).cast_const(), ROW_BYTES)
                        }
                    };
                    tiles.add::<true>(i, values, stride);
                    ahead.prefetch(s);
                });
            }
        }
        four_times!(i => if i < N { tiles.store(i, acc.wrapping_add(i * LANES * LANES), ROW_BYTES) });
    }
}

/// What is read of the next block: of the tokens of all KV heads, a part for each head.
struct Ahead<'a> {
    rows: KeyPointers<'a, bf16>,
    /// Keys in a row of memory, the first key that is not begun, and the end.
    step: usize,
    key: usize,
    end: usize,
    /// Bytes of a row, and whether rows follow each other.
    bytes: usize,
    together: bool,
    /// The next line, and those that are left of a run; 0 at the end.
    line: *const u8,
    left: usize,
}

impl<'a> Ahead<'a> {
    /// `width` bytes of a KV head lie together, of `step` keys.
    #[inline(always)]
    fn new(call: &Call, head: usize, rows: KeyPointers<'a, bf16>, width: usize, step: usize) -> Self {
        let heads = call.tile.kv_heads;
        let part = |head: usize| head * (BLOCK / step) / heads * step;
        let (key, end, bytes) = (part(head), part(head + 1), heads * width);
        let together = rows.seq_offset(1) == bytes as isize;
        let mut ahead = Self { rows, step, key, end, bytes, together, line: std::ptr::null(), left: 0 };
        ahead.begin_run();
        ahead
    }

    /// Goes to the rows from the key on that are known to follow each other, or ends: at the end of the part, or where nothing is read.
    #[inline(always)]
    fn begin_run(&mut self) {
        self.left = 0;
        if self.key < self.end {
            let row = if self.step == 1 { self.rows.next(self.key) } else { self.rows.next_pair(self.key) };
            if !row.is_null() {
                let run = if self.together { (self.key / SUBBLOCK + 1) * SUBBLOCK } else { self.key + self.step };
                let run = run.min(self.end) - self.key;
                (self.line, self.left) = (row.cast(), (run / self.step * self.bytes).div_ceil(LINE));
                self.key += run;
            }
        }
    }

    /// Prefetches the next lines.
    #[inline(always)]
    fn prefetch(&mut self, s: Avx512) {
        if self.left >= LINES {
            for i in 0..LINES {
                s.prefetch_far(self.line.wrapping_add(i * LINE));
            }
            (self.line, self.left) = (self.line.wrapping_add(LINES * LINE), self.left - LINES);
            if self.left == 0 {
                self.begin_run();
            }
        } else if self.left != 0 {
            self.prefetch_parts(s);
        }
    }

    /// [`Self::prefetch`] of several runs.
    #[inline(never)]
    fn prefetch_parts(&mut self, s: Avx512) {
        for _ in 0..LINES {
            if self.left == 0 {
                return;
            }
            s.prefetch_far(self.line);
            (self.line, self.left) = (self.line.wrapping_add(LINE), self.left - 1);
            if self.left == 0 {
                self.begin_run();
            }
        }
    }
}

/// A tile, transposed.
///
/// # Safety
/// The tile is readable at `from`.
#[inline(always)]
unsafe fn transpose(s: Avx512, from: *const f32) -> [__m512; MAX_LANES] {
    let mut x = [s.zero(); MAX_LANES];
    for (i, x) in x.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *x = unsafe { s.load_f32(from.add(i * LANES)) };
    }
    s.transpose(&mut x);
    x
}

/// Transposes the first four rows of a tile, to the first four elements of all rows. The others keep what they have.
///
/// # Safety
/// The tile is readable and writable, and aligned.
#[inline(always)]
unsafe fn transpose_first(s: Avx512, tile: *mut f32) {
    // SAFETY: the caller's; the argument proves the features.
    unsafe {
        let [a, b] = [s.load_f32(tile), s.load_f32(tile.add(LANES))];
        let [c, d] = [s.load_f32(tile.add(2 * LANES)), s.load_f32(tile.add(3 * LANES))];
        let low = [_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d))];
        let high = [_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d))];
        // Elements of rows i, i + 4, i + 8 and i + 12 of the result, one row in each quarter.
        let quarters = [
            _mm512_unpacklo_pd(low[0], low[1]),
            _mm512_unpackhi_pd(low[0], low[1]),
            _mm512_unpacklo_pd(high[0], high[1]),
            _mm512_unpackhi_pd(high[0], high[1]),
        ];
        for (i, x) in quarters.into_iter().enumerate() {
            let (x, to) = (_mm512_castpd_ps(x), tile.add(i * LANES));
            _mm_store_ps(to, _mm512_castps512_ps128(x));
            _mm_store_ps(to.add(4 * LANES), _mm512_extractf32x4_ps::<1>(x));
            _mm_store_ps(to.add(8 * LANES), _mm512_extractf32x4_ps::<2>(x));
            _mm_store_ps(to.add(12 * LANES), _mm512_extractf32x4_ps::<3>(x));
        }
    }
}

/// The first four elements of sixteen vectors, transposed.
///
/// # Safety
/// The vectors are readable at `from`, and aligned.
#[inline(always)]
unsafe fn transpose_few(_: Avx512, from: *const f32) -> [__m512; FEW_ROWS] {
    // SAFETY: the caller's; the argument proves the features.
    unsafe {
        // Loops, not closures, which would not have the level's features.
        let mut quarters = [_mm512_setzero_ps(); 4];
        for (i, x) in quarters.iter_mut().enumerate() {
            let from = from.add(4 * i * LANES);
            *x = _mm512_castps128_ps512(_mm_load_ps(from));
            *x = _mm512_insertf32x4::<1>(*x, _mm_load_ps(from.add(LANES)));
            *x = _mm512_insertf32x4::<2>(*x, _mm_load_ps(from.add(2 * LANES)));
            *x = _mm512_insertf32x4::<3>(*x, _mm_load_ps(from.add(3 * LANES)));
        }
        let mut rows = [_mm512_setzero_ps(); FEW_ROWS];
        let mut order = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        for rows in rows.as_chunks_mut::<2>().0 {
            let low = _mm512_permutex2var_ps(quarters[0], order, quarters[1]);
            let high = _mm512_permutex2var_ps(quarters[2], order, quarters[3]);
            rows[0] = _mm512_shuffle_f32x4::<0b01_00_01_00>(low, high);
            rows[1] = _mm512_shuffle_f32x4::<0b11_10_11_10>(low, high);
            order = _mm512_add_epi32(order, _mm512_set1_epi32(2));
        }
        rows
    }
}

/// Sixteen keys as rows of tiles: in the cache those of the first steps, and in a copy those of the others.
#[derive(Clone, Copy)]
pub(super) struct PlacedKeys {
    /// The first key, and the bytes from one to the next.
    cache: (Operand, isize),
    in_cache: usize,
    copy: (Operand, isize),
}

impl PlacedKeys {
    /// The elements of a step.
    #[inline(always)]
    fn step(&self, step: usize) -> (Operand, isize) {
        let ((keys, stride), step) =
            if step < self.in_cache { (self.cache, step) } else { (self.copy, step - self.in_cache) };
        (keys.wrapping_add(step * ROW_BYTES as usize), stride)
    }
}

/// [`place_keys`] for all of a key range.
///
/// # Safety
/// As [`place_keys`].
#[inline(always)]
pub(super) unsafe fn place_block(
    s: Avx512,
    call: &Call,
    head: usize,
    key_range: KeyRange,
    k: KeyPointers<bf16>,
    keys: &mut [MaybeUninit<PlacedKeys>; BLOCK / LANES],
) {
    for i in key_range.low / LANES..key_range.high.div_ceil(LANES) {
        // SAFETY: the caller's.
        unsafe { keys[i].write(place_keys(s, call, (head, i), key_range, k)) };
    }
}

/// The `i`-th sixteen keys of a block. Copies what a tile cannot read from the cache, with zeros around the key range and after each head:
/// of keys that are a constant apart, the last step if a head ends in it, otherwise everything.
///
/// # Safety
/// The key range is inside K, and some of these keys in it.
#[inline(always)]
unsafe fn place_keys(
    s: Avx512,
    call: &Call,
    (head, i): (usize, usize),
    key_range: KeyRange,
    k: KeyPointers<bf16>,
) -> PlacedKeys {
    let Sizes { d, dk, .. } = call.sizes;
    let keys = KeyRange { low: key_range.low.max(i * LANES), high: key_range.high.min((i + 1) * LANES) };
    let stride = if keys.len() == LANES { k.stride(keys, 1) } else { None };
    let in_cache = if stride.is_some() { d / DEPTH } else { 0 };
    let (copy, first) = (call.scratch.k.cast::<u16>().wrapping_add(i * LANES * dk), in_cache * DEPTH);
    let width = dk - first;
    for j in i * LANES..if width == 0 { 0 } else { (i + 1) * LANES } {
        // SAFETY: the caller's. The copy has room for 64 keys.
        unsafe {
            let row = copy.add(j % LANES * width);
            if j < keys.low || j >= keys.high {
                std::ptr::write_bytes(row, 0, width);
                continue;
            }
            for i in (first..dk).step_by(DEPTH) {
                let x = first_elements(s, k.key(head, j).wrapping_add(i), d - i);
                _mm512_storeu_si512(row.add(i - first).cast(), x);
            }
        }
    }
    PlacedKeys {
        cache: (k.key(head, keys.low).cast(), stride.unwrap_or(0)),
        in_cache,
        copy: (copy.cast(), (width * size_of::<bf16>()) as isize),
    }
}
