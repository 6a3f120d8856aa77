//! Sums of weighted values, read from the cache or from a packed copy.

use super::direct::{Ahead, NEAR_DISTANCE, VALUES_AHEAD};
use crate::kernels::simd::{LINE, Load, Outlined, Simd};
use crate::problem::grid::BLOCK;
use crate::tuning::Prefetch;
use std::hint::black_box;

/// The place of the values that [`WeightedValues`] adds.
pub trait ValueRows {
    type Element: Load;
    /// The values lie in the cache, and others come after them.
    const IN_CACHE: bool;
    /// Those of two keys lie together, and [`Self::add_two`] prefetches.
    const IN_PAIRS: bool = false;
    /// The address of a key's element; `offset` is [`Self::offset`] of its column, in bytes.
    fn at(&self, key: usize, offset: isize) -> *const Self::Element;
    fn offset(&self, column: usize) -> isize;

    /// Adds keys `j` and `j + 1`.
    ///
    /// # Safety
    /// As [`WeightedValues::columns`].
    #[inline(always)]
    unsafe fn add_two<S: Simd, const R: usize, const N: usize>(
        s: S,
        weighted: &WeightedValues<Self>,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) where
        Self: Sized,
    {
        // SAFETY: the caller's.
        unsafe { weighted.add_each(s, j, offset, part, sums) };
    }
}

/// Keys between prefetches at levels with [`Simd::NARROW_LOOPS`].
const TURN: usize = 8;

/// What a loop prefetches at every key.
#[derive(Clone, Copy)]
pub enum ByKey {
    /// The next keys, into the first-level cache.
    Next,
    /// These, and what is ahead into the second-level cache.
    Far,
    /// What is ahead in the order of memory, and what comes next there.
    InOrder,
}

/// `acc[r] += sum over keys of weights[r][key] * v[key]`, key after key. Rows of weights are [`BLOCK`] floats apart.
pub struct WeightedValues<V> {
    pub weights: *const f32,
    pub acc: *mut f32,
    /// Floats between neighbouring accumulators.
    pub acc_row: usize,
    pub v: V,
    pub keys: usize,
    /// The accumulators are not read: they stand for zeros.
    pub fresh: bool,
    /// If not null, a factor for each row's sums.
    pub scales: *const f32,
    pub ahead: Ahead,
    /// What is ahead lies as the values do, one after another, and is prefetched in the order of memory: passes over columns would
    /// otherwise ask for some lines of every row, which memory answers later.
    pub in_order: bool,
}

impl<V: ValueRows> WeightedValues<V> {
    /// All `dv` columns of `R` rows, up to `N` vectors at a time.
    ///
    /// # Safety
    /// The pointers are valid for `R` rows, `keys` keys and `dv` columns; accumulators are padded to whole vectors.
    #[inline(always)]
    pub unsafe fn columns<S: Simd, const R: usize, const N: usize>(&self, s: S, dv: usize) {
        // SAFETY: the caller's; i never passes dv.
        unsafe {
            let mut i = dv / (N * S::LANES) * (N * S::LANES);
            if const { Self::has_loops_by_key::<S>(R, N) }
                && let Some(by_key) = self.by_key()
            {
                s.outline(ColumnsByKey::<V, R, N> { weighted: self, dv, by_key });
            } else {
                self.whole_columns::<S, R, N>(s, dv, None);
            }
            while const { N > 4 } && i + 4 * S::LANES <= dv {
                self.add::<S, R, 4>(s, i, S::LANES, None);
                i += 4 * S::LANES;
            }
            while const { N > 2 } && i + 2 * S::LANES <= dv {
                self.add::<S, R, 2>(s, i, S::LANES, None);
                i += 2 * S::LANES;
            }
            while i < dv {
                let part = (dv - i).min(S::LANES);
                self.add::<S, R, 1>(s, i, part, None);
                i += part;
            }
        }
    }

    /// As many columns as there are in groups of `N` vectors.
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    unsafe fn whole_columns<S: Simd, const R: usize, const N: usize>(&self, s: S, dv: usize, by_key: Option<ByKey>) {
        let mut i = 0;
        while i + N * S::LANES <= dv {
            // SAFETY: the caller's.
            unsafe { self.add::<S, R, N>(s, i, S::LANES, by_key) };
            i += N * S::LANES;
        }
    }

    /// [`Self::columns`] of one key and fresh accumulators: loops that read weights and pointers once.
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    pub unsafe fn one_key<S: Simd, const R: usize>(&self, s: S, dv: usize) {
        // SAFETY: the caller's.
        unsafe {
            if self.scales.is_null() {
                self.one_key_scaled::<S, R, false>(s, dv);
            } else {
                self.one_key_scaled::<S, R, true>(s, dv);
            }
        }
    }

    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    unsafe fn one_key_scaled<S: Simd, const R: usize, const SCALED: bool>(&self, s: S, dv: usize) {
        let v = self.v.at(0, self.v.offset(0));
        let (mut weights, mut scales) = ([s.zero(); R], [s.zero(); R]);
        // SAFETY: the caller's; i never passes dv.
        unsafe {
            for r in 0..R {
                weights[r] = s.splat_from(self.weights.add(r * BLOCK));
                if SCALED {
                    scales[r] = s.splat_from(self.scales.add(r));
                }
            }
            let mut i = 0;
            while i < dv {
                let pair = i + 2 * S::LANES <= dv;
                let x = if pair {
                    V::Element::load_pair(s, v.add(i))
                } else {
                    [load_up_to(s, v.add(i), (dv - i).min(S::LANES)), s.zero()]
                };
                for r in 0..R {
                    for n in 0..2 {
                        if n == 1 && !pair {
                            break;
                        }
                        let mut y = s.fma(weights[r], x[n], s.zero());
                        if SCALED {
                            y = scaled(s, y, scales[r]);
                        }
                        s.store_f32(self.acc.add(r * self.acc_row + i + n * S::LANES), y);
                    }
                }
                i += if pair { 2 * S::LANES } else { S::LANES };
            }
        }
    }

    /// `N` vectors of columns from `column` on, or one of `part` elements.
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    pub unsafe fn add<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        column: usize,
        part: usize,
        by_key: Option<ByKey>,
    ) {
        let acc = Accumulators { at: self.acc.wrapping_add(column), row: self.acc_row };
        // SAFETY: the caller's.
        unsafe {
            let mut sums = acc.load::<S, R, N>(s, self.fresh);
            // Two keys per iteration: instructions other than FMAs are costly here, for the front end as for the ports.
            let offset = self.v.offset(column);
            let mut j = 0;
            if const { Self::has_loops_by_key::<S>(R, N) }
                && let Some(by_key) = by_key
            {
                while j < self.keys {
                    match by_key {
                        ByKey::Next => self.prefetch_next::<S, N>(s, j, offset),
                        ByKey::Far => {
                            s.prefetch_far(self.v.at(j, offset).cast::<u8>().wrapping_offset(self.ahead.distance));
                            self.prefetch_next::<S, N>(s, j, offset);
                        }
                        ByKey::InOrder => self.prefetch_in_order::<S, N>(s, j, offset),
                    }
                    self.add_values(s, j, &self.load_key::<S, N>(s, j, offset), &mut sums);
                    j += 1;
                }
            } else if const { Self::is_narrow::<S>(R, N) } {
                while j + TURN <= self.keys {
                    self.prefetch_turn::<S, N>(s, j, offset);
                    for i in (0..TURN).step_by(2) {
                        V::add_two(s, self, j + i, offset, part, &mut sums);
                    }
                    j += TURN;
                }
            }
            for turn in j / 2..self.keys / 2 {
                V::add_two(s, self, 2 * turn, offset, part, &mut sums);
            }
            if self.keys % 2 == 1 && j < self.keys {
                self.add_key(s, self.keys - 1, offset, part, &mut sums);
            }
            if !self.scales.is_null() {
                for r in 0..R {
                    let scale = s.splat(*self.scales.add(r));
                    for n in 0..N {
                        sums[r][n] = scaled(s, sums[r][n], scale);
                    }
                }
            }
            acc.store(s, &sums);
        }
    }
}

/// [`WeightedValues::whole_columns`] with prefetches at every key: a function of its own, since loops of several ways in one take registers
/// from each other.
struct ColumnsByKey<'a, V, const R: usize, const N: usize> {
    weighted: &'a WeightedValues<V>,
    dv: usize,
    by_key: ByKey,
}

impl<V: ValueRows, const R: usize, const N: usize> Outlined for ColumnsByKey<'_, V, R, N> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { weighted, dv, by_key } = self;
        // SAFETY: the caller's.
        unsafe {
            match by_key {
                ByKey::Next => weighted.whole_columns::<S, R, N>(s, dv, Some(ByKey::Next)),
                ByKey::Far => weighted.whole_columns::<S, R, N>(s, dv, Some(ByKey::Far)),
                ByKey::InOrder => weighted.whole_columns::<S, R, N>(s, dv, Some(ByKey::InOrder)),
            }
        }
    }
}

impl<V: ValueRows> WeightedValues<V> {
    /// Two keys of [`Self::add`], one after the other.
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    pub unsafe fn add_each<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) {
        // SAFETY: the caller's.
        unsafe {
            self.add_key(s, j, offset, part, sums);
            self.add_key(s, j + 1, offset, part, sums);
        }
    }

    /// Whether there are loops that prefetch at every key without a branch.
    const fn has_loops_by_key<S: Simd>(rows: usize, vectors: usize) -> bool {
        let bytes = size_of::<V::Element>();
        S::NARROW_LOOPS && V::IN_CACHE && !V::IN_PAIRS && rows == 4 && vectors == 2 && bytes > 1
    }

    /// How such a loop prefetches, if one does: into both levels for f32 only.
    #[inline(always)]
    fn by_key(&self) -> Option<ByKey> {
        if self.ahead.distance == 0 {
            return None;
        }
        match self.ahead.kind {
            Prefetch::NextKeys => Some(ByKey::Next),
            Prefetch::BothLevels if size_of::<V::Element>() == size_of::<f32>() => {
                Some(if self.in_order { ByKey::InOrder } else { ByKey::Far })
            }
            _ => None,
        }
    }

    /// Prefetches the vectors of the key some keys after `j`; of the first keys, those of the next columns, after the last ones.
    #[inline(always)]
    fn prefetch_next<S: Simd, const N: usize>(&self, s: S, j: usize, offset: isize) {
        let next = j + VALUES_AHEAD;
        let columns = (N * S::LANES * size_of::<V::Element>()) as isize;
        let (key, offset) =
            if next < self.keys { (next, offset) } else { (next.saturating_sub(self.keys).min(j), offset + columns) };
        s.prefetch(self.v.at(key, offset).cast());
    }

    /// Prefetches into both levels where what is ahead lies in order: two halves by turns, since memory serves two streams faster.
    #[inline(always)]
    fn prefetch_in_order<S: Simd, const N: usize>(&self, s: S, j: usize, offset: isize) {
        let bytes = N * S::LANES * size_of::<V::Element>();
        let line = (offset as usize * self.keys + j * bytes) / LINE;
        let half = self.v.at(self.keys / 2, 0).addr().wrapping_sub(self.v.at(0, 0).addr());
        // Pages may lie in any order.
        let next = (line % 2 * half).wrapping_add(line / 2 * LINE);
        s.prefetch_far(self.v.at(0, 0).cast::<u8>().wrapping_offset(self.ahead.distance).wrapping_add(next));
        s.prefetch(self.v.at(j, offset).cast::<u8>().wrapping_add(NEAR_DISTANCE));
    }

    /// The vectors of a key.
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    unsafe fn load_key<S: Simd, const N: usize>(&self, s: S, j: usize, offset: isize) -> [S::V; N] {
        let v = self.v.at(j, offset);
        let mut x = [s.zero(); N];
        for n in (0..N).step_by(2) {
            // SAFETY: the caller's.
            [x[n], x[n + 1]] = unsafe { V::Element::load_pair(s, v.add(n * S::LANES)) };
        }
        x
    }

    /// Whether prefetches stand between turns of keys: with four rows of elements of 16 bits. Memory binds loops over f32, which want
    /// prefetches evenly, and those over bytes keep up with near ones only.
    const fn is_narrow<S: Simd>(rows: usize, vectors: usize) -> bool {
        S::NARROW_LOOPS && V::IN_CACHE && !V::IN_PAIRS && rows == 4 && vectors > 1 && size_of::<V::Element>() == 2
    }

    /// Prefetches for a turn of keys, from `j` on.
    #[inline(always)]
    fn prefetch_turn<S: Simd, const N: usize>(&self, s: S, j: usize, offset: isize) {
        let Self { ahead, v, .. } = self;
        let bytes = N * S::LANES * size_of::<V::Element>();
        if ahead.distance == 0 {
            return;
        }
        if self.in_order {
            let next = v
                .at(0, 0)
                .wrapping_byte_offset(ahead.distance)
                .wrapping_byte_add(offset as usize * self.keys + j * bytes);
            ahead.lines(s, next.cast(), TURN * bytes);
        // Passes before may have had the line.
        } else if offset as usize % LINE < bytes {
            // One number: compilers would add both to every line.
            let offset = black_box(offset.wrapping_add(ahead.distance));
            for i in 0..TURN {
                ahead.lines(s, v.at(j + i, offset).cast(), bytes);
            }
        }
    }

    /// One key of [`Self::add`].
    ///
    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    pub unsafe fn add_key<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        j: usize,
        offset: isize,
        part: usize,
        sums: &mut [[S::V; N]; R],
    ) {
        let v = self.v.at(j, offset);
        let mut x = [s.zero(); N];
        // SAFETY: the caller's.
        unsafe {
            if const { N == 1 } {
                x[0] = load_up_to(s, v, part);
            } else {
                for n in (0..N).step_by(2) {
                    let at = v.add(n * S::LANES);
                    if const { Self::is_narrow::<S>(R, N) } {
                        // Done, for a turn of keys.
                    } else if const { V::IN_CACHE && R >= 4 && size_of::<V::Element>() == 1 } {
                        // Bound by arithmetic.
                        self.ahead.distances().prefetch(s, at);
                    } else if V::IN_CACHE && self.ahead.distance != 0 {
                        if const { S::FEW_REGISTERS } && self.in_order {
                            let bytes = S::LANES * size_of::<V::Element>();
                            let (begun, here) = (offset as usize * self.keys, j * N * bytes + n * bytes);
                            let next = self.v.at(0, 0).wrapping_byte_offset(self.ahead.distance);
                            let next = next.wrapping_byte_add(begun + here);
                            // Pairs of short vectors share a line.
                            self.ahead.in_order(s, at, (here % LINE < 2 * bytes).then_some(next));
                        } else {
                            self.ahead.pair(s, at);
                        }
                    }
                    [x[n], x[n + 1]] = V::Element::load_pair(s, at);
                }
            }
            self.add_values(s, j, &x, sums);
        }
    }

    /// # Safety
    /// As [`Self::columns`].
    #[inline(always)]
    pub unsafe fn add_values<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        j: usize,
        x: &[S::V; N],
        sums: &mut [[S::V; N]; R],
    ) {
        // SAFETY: the caller's.
        unsafe { add_weighted(s, self.weights.add(j), x, sums) };
    }
}

/// Accumulators of some rows, from a column on.
#[derive(Clone, Copy)]
pub struct Accumulators {
    pub at: *mut f32,
    /// Floats from one row to the next.
    pub row: usize,
}

impl Accumulators {
    /// `N` vectors of `R` rows; zeros stand for those of `fresh` rows.
    ///
    /// # Safety
    /// They are readable, unless they are fresh.
    #[inline(always)]
    pub unsafe fn load<S: Simd, const R: usize, const N: usize>(self, s: S, fresh: bool) -> [[S::V; N]; R] {
        let mut sums = [[s.zero(); N]; R];
        if !fresh {
            for r in 0..R {
                for n in 0..N {
                    // SAFETY: the caller's.
                    sums[r][n] = unsafe { s.load_f32(self.at.add(r * self.row + n * S::LANES)) };
                }
            }
        }
        sums
    }

    /// # Safety
    /// The vectors are writable.
    #[inline(always)]
    pub unsafe fn store<S: Simd, const R: usize, const N: usize>(self, s: S, sums: &[[S::V; N]; R]) {
        for r in 0..R {
            for n in 0..N {
                // SAFETY: the caller's.
                unsafe { s.store_f32(self.at.add(r * self.row + n * S::LANES), sums[r][n]) };
            }
        }
    }
}

/// Adds a value to the sums of each row, times the row's weight. Rows of weights are [`BLOCK`] floats apart.
///
/// # Safety
/// The weights are readable.
#[inline(always)]
pub unsafe fn add_weighted<S: Simd, const R: usize, const N: usize>(
    s: S,
    weights: *const f32,
    x: &[S::V; N],
    sums: &mut [[S::V; N]; R],
) {
    for r in 0..R {
        // SAFETY: the caller's.
        let w = unsafe { s.splat_from(weights.add(r * BLOCK)) };
        for n in 0..N {
            sums[r][n] = s.fma(w, x[n], sums[r][n]);
        }
    }
}

/// Weighted values times what their sum of weights is divided by.
#[inline(always)]
pub fn scaled<S: Simd>(s: S, x: S::V, scale: S::V) -> S::V {
    // Skipping a masked key and adding 0 times its value can differ in the sign of a zero; adding +0 removes the difference.
    s.add(s.mul(x, scale), s.zero())
}

/// Loads a vector of which `part` elements are read and the others are 0.
///
/// # Safety
/// These elements are readable.
#[inline(always)]
pub unsafe fn load_up_to<S: Simd, T: Load>(s: S, from: *const T, part: usize) -> S::V {
    // SAFETY: the caller's.
    unsafe { if part == S::LANES { T::load(s, from) } else { T::load_part(s, from, part) } }
}

/// Widens `n` elements to f32, in the order of [`Load::load_pair`], and zeros up to a whole vector.
///
/// # Safety
/// The elements are readable, and there is room for whole vectors at `to`.
#[inline(always)]
pub unsafe fn widen_row<S: Simd, T: Load>(s: S, from: *const T, to: *mut f32, n: usize) {
    let factor = s.splat(S::E4M3_FRACTION);
    let mut i = 0;
    // SAFETY: the caller's.
    unsafe {
        while i + 2 * S::LANES <= n {
            let mut x = <T::InLoops as Load>::load_pair(s, from.add(i).cast());
            if T::IN_FRACTIONS {
                x = [s.mul(x[0], factor), s.mul(x[1], factor)];
            }
            s.store_f32(to.add(i), x[0]);
            s.store_f32(to.add(i + S::LANES), x[1]);
            i += 2 * S::LANES;
        }
        while i < n {
            let part = (n - i).min(S::LANES);
            s.store_f32(to.add(i), load_up_to(s, from.add(i), part));
            i += part;
        }
    }
}
