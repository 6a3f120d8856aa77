//! Keys and values in affine units that lie in the cache.
//!
//! Scales and zero points of a block and head are converted once, to floats in memory that has room for widened rows: where neighbouring
//! elements share them, one of each per group and key, which the loops broadcast; where tokens share those of a channel, one per
//! channel, which the loops load for all keys of a step. An offset of integers is added to what is subtracted from them, so that an
//! element takes a conversion, a difference and a product. Per 32 elements at AVX2, beside FMAs, these are 16 operations of a whole vector
//! for bytes (q8_0: 12, and 3 for the factor), and 20 for halves of bytes (q4_0: 18, and 3), of which minima make 4 more.

use super::prefetch::{Ahead, Distances};
use super::scores::MAX_PARALLEL_DOTS;
use super::{DirectScores, DirectValues, PASS_ROWS, rows_in_loops};
use crate::dtype::DType;
use crate::kernels::generic::affine::{Bytes, Halves, NUMBERS, Numbers, SignedBytes};
use crate::kernels::generic::attention::weighted::{Accumulators, add_weighted};
use crate::kernels::generic::attention::{Block, KeyPointers};
use crate::kernels::generic::copy;
use crate::kernels::simd::{LINE, Load, MAX_LANES, Outlined, Simd};
use crate::problem::affine::{AffineLoops, STEP};
use crate::problem::grid::{BLOCK, KeyRange};
use crate::view::{AffineGroups, AffineRow, RawAffine, RawCacheView, SEQ, ZeroType};
use crate::{Nibbles, Zeros};
use half::{bf16, f16};
use std::marker::PhantomData;

/// The keys or values of a range that are read.
#[derive(Clone, Copy)]
struct Units<'a> {
    block: &'a Block<'a>,
    pointers: KeyPointers<'a, u8>,
    keys: KeyRange,
    ahead: Ahead,
    affine: &'a RawAffine,
    groups: AffineGroups,
    dim: usize,
    /// How much numbers in registers are greater than the integers.
    offset: f32,
    /// Scales, what is subtracted from numbers, and what is added to products: one of each for a channel, or for a group of elements and
    /// a key of the block.
    factors: [*mut f32; 3],
}

/// Keys whose scales, and zero points, lie evenly.
struct Run {
    keys: KeyRange,
    row: AffineRow,
    steps: [isize; 2],
}

impl<'a> Units<'a> {
    #[inline(always)]
    fn new(
        block: &'a Block<'a>,
        cache: &'a RawCacheView,
        (pointers, keys, ahead): (KeyPointers<'a, u8>, KeyRange, Ahead),
        dim: usize,
        (loops, memory): (AffineLoops, *mut u8),
    ) -> Self {
        let Some(affine) = &cache.affine else { unreachable!("the check of a cache finds what describes it") };
        let groups = affine.groups();
        let rows = if loops.channels { dim } else { dim.div_ceil(groups.group) * BLOCK };
        let factors = [0, 1, 2].map(|i| memory.cast::<f32>().wrapping_add(i * rows));
        Self { block, pointers, keys, ahead, affine, groups, dim, offset: loops.offset, factors }
    }

    /// The next keys from `at` on, of those that are visible.
    ///
    /// # Safety
    /// Visible keys are inside the cache.
    #[inline(always)]
    unsafe fn run(&self, head: usize, at: usize) -> Option<Run> {
        let Block { p, tile, base, visible_bits, .. } = *self.block;
        let left = self.keys.bits() & visible_bits & u64::MAX.checked_shl(at as u32).unwrap_or(0);
        if left == 0 {
            return None;
        }
        let low = left.trailing_zeros() as usize;
        let ((row, slot), run) = p.visibility.place(tile.batch, base + low);
        let shared = self.affine.shared[SEQ];
        let (alike, steps) =
            if shared == 1 { (run, self.affine.steps(SEQ)) } else { (run.min(shared - slot % shared), [0; 2]) };
        let high = low + alike.min((left >> low).trailing_ones() as usize);
        // SAFETY: the caller's; the tile has this head.
        let row = unsafe { self.affine.row(row, slot, tile.kv_head + head) };
        Some(Run { keys: KeyRange { low, high }, row, steps })
    }

    /// Converts factors of groups of elements, for all keys.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn unpack_groups<S: Simd>(&self, s: S, head: usize) {
        let group = self.groups.group;
        let hidden = self.keys.bits() & !self.block.visible_bits != 0;
        let mut at = self.keys.low;
        // SAFETY: the caller's; there is an entry for each group and key.
        unsafe {
            if hidden {
                // Nobody sees them, but they are numbers.
                for factors in self.factors {
                    factors.write_bytes(0, self.dim.div_ceil(group) * BLOCK);
                }
            }
            while let Some(Run { keys, row, steps }) = self.run(head, at) {
                let mut row = row;
                for index in 0..self.dim.div_ceil(group) {
                    self.unpack(s, &row, steps, keys.len(), index * BLOCK + keys.low);
                    row.scales = row.scales.wrapping_offset(self.groups.scale_step);
                    row.zeros = row.zeros.wrapping_offset(self.groups.zero_step);
                }
                at = keys.high;
            }
        }
    }

    /// Converts `n` scales and zero points from these on to factors from number `to` on.
    ///
    /// # Safety
    /// They are readable, and the factors writable.
    #[inline(always)]
    unsafe fn unpack<S: Simd>(&self, s: S, row: &AffineRow, steps: [isize; 2], n: usize, to: usize) {
        let [scales, points, minima] = self.factors.map(|factors| factors.wrapping_add(to));
        let AffineGroups { scale_dtype, zero_type, of, .. } = self.groups;
        // SAFETY: the caller's.
        unsafe {
            unpack_numbers(s, ZeroType::Float(scale_dtype), row.scales, steps[0], n, scales);
            let Some(zero_type) = zero_type else {
                std::slice::from_raw_parts_mut(points, n).fill(self.offset);
                return;
            };
            if of.zeros == Zeros::Point {
                unpack_numbers(s, zero_type, row.zeros, steps[1], n, points);
                if self.offset != 0.0 {
                    for i in 0..n {
                        *points.add(i) += self.offset;
                    }
                }
                return;
            }
            std::slice::from_raw_parts_mut(points, n).fill(self.offset);
            unpack_numbers(s, zero_type, row.zeros, steps[1], n, minima);
            if of.zeros == Zeros::Shift {
                for i in 0..n {
                    *minima.add(i) = -*minima.add(i);
                }
            }
        }
    }

    /// Elements that share a scale, in the order of loops: all that are read with one row of channels.
    #[inline(always)]
    fn group<const CHANNELS: bool>(&self) -> usize {
        if CHANNELS { self.dim } else { self.groups.group.min(self.dim) }
    }

    #[inline(always)]
    fn swapped(&self) -> bool {
        self.groups.of.nibbles == Nibbles::HighFirst
    }

    /// The factors from number `at` on, in every lane, or of each lane.
    ///
    /// # Safety
    /// They are readable.
    #[inline(always)]
    unsafe fn factors<S: Simd, U: Numbers, const MINIMA: bool, const CHANNELS: bool>(
        &self,
        s: S,
        at: usize,
    ) -> Factors<S> {
        let [scales, points, minima] = self.factors;
        let (scales, points, minima) = (scales.wrapping_add(at), points.wrapping_add(at), minima.wrapping_add(at));
        // SAFETY: the caller's; the numbers are a vector where a table is.
        unsafe {
            let mut factors = if CHANNELS {
                let minimum = if MINIMA { s.load_f32(minima) } else { s.zero() };
                Factors { scale: s.load_f32(scales), point: s.load_f32(points), minimum, table: s.zero() }
            } else {
                let minimum = if MINIMA { s.splat_from(minima) } else { s.zero() };
                Factors { scale: s.splat_from(scales), point: s.splat_from(points), minimum, table: s.zero() }
            };
            if const { looks_up::<S, U>(CHANNELS) } {
                factors.table = factors.element::<MINIMA>(s, s.load_f32(NUMBERS.as_ptr()));
            }
            factors
        }
    }
}

/// [`Units::unpack_groups`].
struct UnpackGroups<'a, 'b> {
    units: &'a Units<'b>,
    head: usize,
}

impl Outlined for UnpackGroups<'_, '_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe { self.units.unpack_groups(s, self.head) }
    }
}

/// Converts the factors of channels, from a row on.
struct UnpackChannels<'a, 'b> {
    units: &'a Units<'b>,
    row: AffineRow,
}

impl Outlined for UnpackChannels<'_, '_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let AffineGroups { scale_step, zero_step, .. } = self.units.groups;
        // SAFETY: the caller's.
        unsafe { self.units.unpack(s, &self.row, [scale_step, zero_step], self.units.dim, 0) }
    }
}

/// Converts `n` numbers, `step` bytes apart.
///
/// # Safety
/// They are readable, and `to` is writable.
#[inline(always)]
unsafe fn unpack_numbers<S: Simd>(s: S, of: ZeroType, from: *const u8, step: isize, n: usize, to: *mut f32) {
    #[inline(always)]
    unsafe fn widen<S: Simd, T: Load>(s: S, from: *const T, step: isize, n: usize, to: *mut f32) {
        for first in (0..n).step_by(S::LANES) {
            let (mut some, len) = ([T::default(); MAX_LANES], (n - first).min(S::LANES));
            // SAFETY: the caller's; the array holds a vector.
            unsafe {
                copy::gather(from.wrapping_offset(first as isize * step), step, some.as_mut_ptr(), len);
                let x = T::load(s, some.as_ptr());
                if len == S::LANES {
                    s.store_f32(to.add(first), x);
                } else {
                    s.store_part_f32(to.add(first), x, len);
                }
            }
        }
    }
    // SAFETY: the caller's; strides are those of whole numbers.
    unsafe {
        match of {
            ZeroType::Float(DType::F32) if step == 4 => std::ptr::copy_nonoverlapping(from.cast::<f32>(), to, n),
            ZeroType::Float(DType::F32) => copy::gather(from.cast::<f32>(), step / 4, to, n),
            ZeroType::Float(DType::F16) => widen::<S, f16>(s, from.cast(), step / 2, n, to),
            ZeroType::Float(DType::Bf16) => widen::<S, bf16>(s, from.cast(), step / 2, n, to),
            ZeroType::I8 => widen::<S, i8>(s, from.cast(), step, n, to),
            ZeroType::U8 => {
                for i in 0..n {
                    *to.add(i) = f32::from(*from.wrapping_offset(i as isize * step));
                }
            }
        }
    }
}

/// What makes elements of numbers.
#[derive(Clone, Copy)]
struct Factors<S: Simd> {
    scale: S::V,
    point: S::V,
    minimum: S::V,
    /// The elements of all numbers, if [`looks_up`].
    table: S::V,
}

impl<S: Simd> Factors<S> {
    #[inline(always)]
    fn none(s: S) -> Self {
        Self { scale: s.zero(), point: s.zero(), minimum: s.zero(), table: s.zero() }
    }

    #[inline(always)]
    fn element<const MINIMA: bool>(&self, s: S, q: S::V) -> S::V {
        let x = s.mul(s.sub(q, self.point), self.scale);
        if MINIMA { s.add(x, self.minimum) } else { x }
    }

    /// `2 * LANES` elements that share factors.
    ///
    /// # Safety
    /// Their units are readable.
    #[inline(always)]
    unsafe fn pair<U: Numbers, const MINIMA: bool>(&self, s: S, units: *const u8, swapped: bool) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe {
            if const { looks_up::<S, U>(false) } {
                let low = s.look_up_nibbles(units, 0, self.table);
                let high = s.look_up_nibbles(units, 16, self.table);
                return if swapped { s.interleave(high, low) } else { s.interleave(low, high) };
            }
            let [x, y] = U::pair(s, units, swapped);
            [self.element::<MINIMA>(s, x), self.element::<MINIMA>(s, y)]
        }
    }
}

/// Whether a vector holds the elements of all numbers. They are then computed once, and looked up.
const fn looks_up<S: Simd, U: Numbers>(channels: bool) -> bool {
    !channels && U::BITS == 4 && S::LANES == 16
}

/// Runs the loops for these units: a structure with the arguments, whose type depends on the numbers, whether there are minima, and
/// whether channels have scales.
macro_rules! outline {
    ($s:expr, $loops:expr, $bits:ident, $of:ident { $($field:ident),* }) => {
        match ($loops.signed, $loops.minima, $loops.channels) {
            (true, _, false) => $s.outline($of::<SignedBytes, false, false> { $($field,)* numbers: PhantomData }),
            (true, _, true) => $s.outline($of::<SignedBytes, false, true> { $($field,)* numbers: PhantomData }),
            (_, false, false) if $bits == 8 => $s.outline($of::<Bytes, false, false> { $($field,)* numbers: PhantomData }),
            (_, false, true) if $bits == 8 => $s.outline($of::<Bytes, false, true> { $($field,)* numbers: PhantomData }),
            (_, true, false) if $bits == 8 => $s.outline($of::<Bytes, true, false> { $($field,)* numbers: PhantomData }),
            (_, true, true) if $bits == 8 => $s.outline($of::<Bytes, true, true> { $($field,)* numbers: PhantomData }),
            (_, false, false) => $s.outline($of::<Halves, false, false> { $($field,)* numbers: PhantomData }),
            (_, false, true) => $s.outline($of::<Halves, false, true> { $($field,)* numbers: PhantomData }),
            (_, true, false) => $s.outline($of::<Halves, true, false> { $($field,)* numbers: PhantomData }),
            (_, true, true) => $s.outline($of::<Halves, true, true> { $($field,)* numbers: PhantomData }),
        }
    };
}

impl DirectScores<'_> {
    /// Scores for keys in integers of `BITS` bits, of which there are [`AffineLoops`].
    ///
    /// # Safety
    /// As [`block`](super::block).
    #[inline(always)]
    pub unsafe fn run_affine<S: Simd, const BITS: u32>(&self, s: S) {
        let Self { block, k, keys, ahead, .. } = *self;
        let Some(loops) = AffineLoops::of(block.p.k, block.d) else { return };
        let units = Units::new(block, block.p.k, (k, keys, ahead), block.d, (loops, block.scratch.k_block));
        // SAFETY: the caller's.
        unsafe { outline!(s, loops, BITS, Scores { units }) }
    }
}

impl DirectValues<'_> {
    /// Adds values in integers of `BITS` bits, of which there are [`AffineLoops`].
    ///
    /// # Safety
    /// As [`block`](super::block).
    #[inline(always)]
    pub unsafe fn run_affine<S: Simd, const BITS: u32>(&self, s: S) {
        let Self { block, v, ref heads, keys, fresh, ahead, .. } = *self;
        let Some(loops) = AffineLoops::of(block.p.v, block.dv) else { return };
        let units = Units::new(block, block.p.v, (v, keys, ahead), block.dv, (loops, block.scratch.v_block));
        let heads = (heads.start, heads.end);
        // SAFETY: the caller's.
        unsafe { outline!(s, loops, BITS, Sums { units, heads, fresh }) }
    }
}

/// Scores of all rows.
struct Scores<'a, U, const MINIMA: bool, const CHANNELS: bool> {
    units: Units<'a>,
    numbers: PhantomData<U>,
}

impl<U: Numbers, const MINIMA: bool, const CHANNELS: bool> Outlined for Scores<'_, U, MINIMA, CHANNELS> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Units { block, keys, .. } = self.units;
        let Block { tile, scratch, visible_bits, .. } = *block;
        for head in 0..tile.kv_heads {
            // SAFETY: the caller's.
            unsafe {
                if !CHANNELS {
                    s.outline(UnpackGroups { units: &self.units, head });
                    self.rows(s, head, keys);
                    continue;
                }
                if keys.bits() & !visible_bits != 0 {
                    // Nobody sees them, but they are numbers.
                    for row in head * tile.head_rows..(head + 1) * tile.head_rows {
                        scratch.s.add(row * BLOCK + keys.low).write_bytes(0, keys.len());
                    }
                }
                let (mut at, mut seen) = (keys.low, std::ptr::null_mut());
                while let Some(Run { keys, row, .. }) = self.units.run(head, at) {
                    if row.scales != seen {
                        s.outline(UnpackChannels { units: &self.units, row });
                        seen = row.scales;
                    }
                    self.rows(s, head, keys);
                    at = keys.high;
                }
            }
        }
    }
}

impl<U: Numbers, const MINIMA: bool, const CHANNELS: bool> Scores<'_, U, MINIMA, CHANNELS> {
    /// All rows of a head.
    ///
    /// # Safety
    /// The factors of the keys are in place.
    #[inline(always)]
    unsafe fn rows<S: Simd>(&self, s: S, head: usize, keys: KeyRange) {
        // SAFETY: the caller's; the rows of the head are inside the tile.
        unsafe {
            rows_in_loops!(S, self.units.block.tile.head_rows, PASS_ROWS, 8, |row| self.dots::<S>(s, head, row, keys))
        };
    }

    /// `R` rows of a head, from `row` on, times keys, `C` at a time.
    ///
    /// # Safety
    /// As [`Self::rows`].
    #[inline(always)]
    unsafe fn dots<S: Simd, const R: usize, const C: usize>(&self, s: S, head: usize, row: usize, keys: KeyRange) {
        let Block { tile, scratch, .. } = *self.units.block;
        let out = scratch.s.wrapping_add((head * tile.head_rows + row) * BLOCK);
        let distances = if row == 0 { self.units.ahead } else { Ahead::NONE }.distances();
        let mut sums = [0.0f32; MAX_PARALLEL_DOTS];
        for j in (keys.low..keys.high).step_by(C) {
            let mut of = [j; C];
            for c in 0..C {
                of[c] = (j + c).min(keys.high - 1);
            }
            // SAFETY: the caller's; a row of scores has BLOCK floats.
            unsafe {
                self.sums::<S, R, C>(s, (head, row), of, distances, &mut sums);
                for r in 0..R {
                    let (from, to) = (sums.as_ptr().add(r * C), out.add(r * BLOCK + j));
                    if j + C <= keys.high {
                        std::ptr::copy_nonoverlapping(from, to, C);
                    } else {
                        for c in 0..keys.high - j {
                            *to.add(c) = *from.add(c);
                        }
                    }
                }
            }
        }
    }

    /// The products of `R` rows with `C` keys, as `[R][C]`.
    ///
    /// # Safety
    /// As [`Self::rows`].
    #[inline(always)]
    unsafe fn sums<S: Simd, const R: usize, const C: usize>(
        &self,
        s: S,
        (head, row): (usize, usize),
        of: [usize; C],
        distances: Distances,
        sums: &mut [f32; MAX_PARALLEL_DOTS],
    ) {
        let units = &self.units;
        let Block { tile, scratch, d, .. } = *units.block;
        let q_row = scratch.q_row;
        let q = scratch.q.wrapping_add((head * tile.head_rows + row) * q_row);
        let bits = U::BITS as usize;
        let mut keys = [std::ptr::null(); C];
        for c in 0..C {
            keys[c] = units.pointers.key(head, of[c]);
        }
        let mut acc = [[s.zero(); C]; R];
        let group = units.group::<CHANNELS>();
        let (mut i, mut index, mut end) = (0, 0, group);
        // SAFETY: the caller's; keys and groups are multiples of a step.
        unsafe {
            while i < d {
                let mut factors = [Factors::none(s); C];
                if !CHANNELS {
                    for c in 0..C {
                        factors[c] = units.factors::<S, U, MINIMA, false>(s, index * BLOCK + of[c]);
                    }
                }
                while i < end {
                    if (i * bits / 8).is_multiple_of(LINE) {
                        for key in keys {
                            distances.prefetch(s, key.wrapping_add(i * bits / 8));
                        }
                    }
                    self.step::<S, R, C>(s, &keys, i, &factors, (q, q_row), &mut acc);
                    i += STEP;
                }
                (index, end) = (index + 1, end + group);
            }
            for n in (0..R * C).step_by(S::LANES) {
                let mut lanes = [s.zero(); MAX_LANES];
                for (i, lane) in lanes.iter_mut().enumerate().take(S::LANES.min(R * C - n)) {
                    *lane = acc[(n + i) / C][(n + i) % C];
                }
                s.store_f32(sums.as_mut_ptr().add(n), s.sum_lanes(&lanes));
            }
        }
    }

    /// Adds the products of [`STEP`] elements from `i` on.
    ///
    /// # Safety
    /// As [`Self::sums`].
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn step<S: Simd, const R: usize, const C: usize>(
        &self,
        s: S,
        keys: &[*const u8; C],
        i: usize,
        factors: &[Factors<S>; C],
        (q, q_row): (*const f32, usize),
        acc: &mut [[S::V; C]; R],
    ) {
        let (units, swapped, bits) = (&self.units, self.units.swapped(), U::BITS as usize);
        // SAFETY: the caller's.
        unsafe {
            if CHANNELS {
                for n in (0..STEP).step_by(2 * S::LANES) {
                    let at = i + n;
                    let of = [
                        units.factors::<S, U, MINIMA, true>(s, at),
                        units.factors::<S, U, MINIMA, true>(s, at + S::LANES),
                    ];
                    for c in 0..C {
                        let x = U::pair(s, keys[c].add(at * bits / 8), swapped);
                        for half in 0..2 {
                            let x = of[half].element::<MINIMA>(s, x[half]);
                            for r in 0..R {
                                let q = s.load_f32(q.add(r * q_row + at + half * S::LANES));
                                acc[r][c] = s.fma(q, x, acc[r][c]);
                            }
                        }
                    }
                }
                return;
            }
            if const { R == 4 && S::FEW_REGISTERS } {
                // With few registers, what is loaded of Q has to be used at once, or accumulators go to memory.
                for n in (0..STEP).step_by(2 * S::LANES) {
                    let at = i + n;
                    let mut k = [[s.zero(); 2]; C];
                    for c in 0..C {
                        k[c] = factors[c].pair::<U, MINIMA>(s, keys[c].add(at * bits / 8), swapped);
                    }
                    for half in 0..2 {
                        for r in 0..R {
                            let q = s.load_f32(q.add(r * q_row + at + half * S::LANES));
                            for c in 0..C {
                                acc[r][c] = s.fma(q, k[c][half], acc[r][c]);
                            }
                        }
                    }
                }
                return;
            }
            for c in 0..C {
                for n in (0..STEP).step_by(2 * S::LANES) {
                    let at = i + n;
                    let k = factors[c].pair::<U, MINIMA>(s, keys[c].add(at * bits / 8), swapped);
                    for r in 0..R {
                        let q = q.add(r * q_row + at);
                        acc[r][c] = s.fma(s.load_f32(q), k[0], acc[r][c]);
                        acc[r][c] = s.fma(s.load_f32(q.add(S::LANES)), k[1], acc[r][c]);
                    }
                }
            }
        }
    }
}

/// Adds the weighted values of some heads to their rows.
struct Sums<'a, U, const MINIMA: bool, const CHANNELS: bool> {
    units: Units<'a>,
    heads: (usize, usize),
    fresh: bool,
    numbers: PhantomData<U>,
}

impl<U: Numbers, const MINIMA: bool, const CHANNELS: bool> Outlined for Sums<'_, U, MINIMA, CHANNELS> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let keys = self.units.keys;
        for head in self.heads.0..self.heads.1 {
            // SAFETY: the caller's.
            unsafe {
                if !CHANNELS {
                    s.outline(UnpackGroups { units: &self.units, head });
                    self.rows(s, head, keys, self.fresh);
                    continue;
                }
                let (mut at, mut seen, mut fresh) = (keys.low, std::ptr::null_mut(), self.fresh);
                while let Some(Run { keys, row, .. }) = self.units.run(head, at) {
                    if row.scales != seen {
                        s.outline(UnpackChannels { units: &self.units, row });
                        seen = row.scales;
                    }
                    self.rows(s, head, keys, fresh);
                    (at, fresh) = (keys.high, false);
                }
            }
        }
    }
}

impl<U: Numbers, const MINIMA: bool, const CHANNELS: bool> Sums<'_, U, MINIMA, CHANNELS> {
    /// All rows of a head.
    ///
    /// # Safety
    /// The factors of the keys are in place.
    #[inline(always)]
    unsafe fn rows<S: Simd>(&self, s: S, head: usize, keys: KeyRange, fresh: bool) {
        let rows = self.units.block.tile.head_rows;
        // SAFETY: the caller's; the rows of the head are inside the tile.
        unsafe { rows_in_loops!(S, rows, PASS_ROWS, 4, |row| self.row_columns::<S>(s, (head, row), keys, fresh)) };
    }

    /// All columns of `R` rows, `N` vectors at a time.
    ///
    /// # Safety
    /// As [`Self::rows`].
    #[inline(always)]
    unsafe fn row_columns<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        at: (usize, usize),
        keys: KeyRange,
        fresh: bool,
    ) {
        let (dv, group) = (self.units.dim, self.units.group::<CHANNELS>());
        let (mut column, mut index, mut end) = (0, 0, group);
        // SAFETY: the caller's; a value has whole pairs of vectors, and so have groups.
        unsafe {
            while column < dv {
                while column + N * S::LANES <= end {
                    self.columns::<S, R, N>(s, at, (column, index), keys, fresh);
                    column += N * S::LANES;
                }
                while const { N > 2 } && column < end {
                    self.columns::<S, R, 2>(s, at, (column, index), keys, fresh);
                    column += 2 * S::LANES;
                }
                (index, end) = (index + 1, end + group);
            }
        }
    }

    /// `N` vectors of columns from `column` on, in group `index`.
    ///
    /// # Safety
    /// As [`Self::rows`].
    #[inline(always)]
    unsafe fn columns<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        (head, row): (usize, usize),
        (column, index): (usize, usize),
        keys: KeyRange,
        fresh: bool,
    ) {
        let units = &self.units;
        let Block { tile, scratch, .. } = *units.block;
        let first = head * tile.head_rows + row;
        let weights = scratch.s.wrapping_add(first * BLOCK);
        let acc = Accumulators { at: scratch.acc.wrapping_add(first * scratch.acc_row + column), row: scratch.acc_row };
        let (swapped, bits) = (units.swapped(), U::BITS as usize);
        let (offset, width) = (column * bits / 8, N * S::LANES * bits / 8);
        let distances = if row == 0 { units.ahead } else { Ahead::NONE }.distances();
        let begins_line = row == 0 && offset % LINE < width;
        // SAFETY: the caller's.
        unsafe {
            let mut sums = acc.load::<S, R, N>(s, fresh);
            let mut of_columns = [Factors::none(s); N];
            if CHANNELS {
                for n in 0..N {
                    of_columns[n] = units.factors::<S, U, MINIMA, true>(s, column + n * S::LANES);
                }
            }
            for key in keys.low..keys.high {
                let value = units.pointers.key(head, key).wrapping_add(offset);
                if begins_line {
                    for line in (0..width).step_by(LINE) {
                        distances.prefetch(s, value.wrapping_add(line));
                    }
                }
                let mut x = [s.zero(); N];
                if CHANNELS {
                    for n in (0..N).step_by(2) {
                        let q = U::pair(s, value.add(n * S::LANES * bits / 8), swapped);
                        for half in 0..2 {
                            x[n + half] = of_columns[n + half].element::<MINIMA>(s, q[half]);
                        }
                    }
                } else {
                    let factors = units.factors::<S, U, MINIMA, false>(s, index * BLOCK + key);
                    for n in (0..N).step_by(2) {
                        let units = value.add(n * S::LANES * bits / 8);
                        [x[n], x[n + 1]] = factors.pair::<U, MINIMA>(s, units, swapped);
                    }
                }
                add_weighted(s, weights.add(key), &x, &mut sums);
            }
            acc.store(s, &sums);
        }
    }
}
