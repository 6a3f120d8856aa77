//! Blocks of 32 elements: ggml's types, converted to f32 and back.
//!
//! | format | bytes | element i |
//! | --- | --- | --- |
//! | q8_0 | f16 d, i8 q[32] | d q |
//! | q4_0 | f16 d, nibbles q | d (q - 8) |
//! | q4_1 | f16 d, f16 m, nibbles q | d q + m |
//! | q5_0 | f16 d, u32 fifth bits, nibbles q | d (q - 16) |
//! | q5_1 | f16 d, f16 m, u32 fifth bits, nibbles q | d q + m |
//! | iq4_nl | f16 d, nibbles q | d [`TABLE`]\[q\] |
//!
//! Of 16 bytes of nibbles, the low halves are elements 0 to 15 and the high ones 16 to 31; bit i of the fifth bits is that of
//! element i. Every product is rounded to f32, and every sum after it.
//!
//! What a write makes of a block are the bytes of ggml's reference quantiser (`quantize_row_*_ref`, compiled without contraction
//! to FMA), not of its code for x86 and Arm, which rounds ties otherwise: the factor d in f32, its reciprocal, elements times that,
//! rounded away from zero at ties (q8_0), or cut off after half of a unit was added; last d, and m, are rounded to f16. Three
//! blocks of which the reference makes nothing definite:
//! - NaN or an infinity among the elements: converting NaN to an integer is undefined there. Here d is NaN and all other bits are
//!   0, so that all of the block reads as NaN.
//! - A factor so small that its reciprocal is infinite: its quotients are undefined too. Here they are 0. d is 0 in f16, so that all
//!   of the block reads as zeros, or as m.
//! - No magnitude of 10^-15 in iq4_nl: the reference leaves numbers of another block. Here the element of each is d, which is 0.
//!
//! A factor above 65504 becomes infinite in f16, as in the reference: elements above 8.3 million in q8_0.
//!
//! All of it is arithmetic of IEEE 754 in one order, so that every level computes the same bits.
//!
//! A write takes block after block, or with [`Simd::WRITES_SEVERAL`] as many as a vector has lanes: their largest magnitudes or their
//! ranges are reduced by one tree, their factors are one division, and both are in flight with the numbers of the blocks before. Blocks
//! that need more are written one by one: with NaN or an infinity, with a largest magnitude of both signs in the formats where its sign
//! counts, or with a least element of 0 where that is stored. What bounds it, in AVX2: an element of a vector costs two operations for
//! the magnitude, or three for a range; a product (and a sum) and a conversion; and packing, which halves the number of vectors with
//! each step: ties of q8_0 are rounded in words, from cut-off doubles, and numbers are limited as bytes. That is 30 operations for a
//! block of q8_0, 45 for q4_0, beside 20 for its addresses and a share of the tree: 18 and 21 cycles. AVX-512 takes half as many, and
//! memory binds it, except in iq4_nl, whose factor is of sums in the order of elements.

use super::copy::{prefetch_next, scatter};
use super::quantize::{self, MAX_VECTORS, Vectors, min_lane, widest};
use crate::dtype::DType;
use crate::kernels::api::{CopyArgs, ScaledArgs};
use crate::kernels::simd::{LoadStore, MAX_LANES, Max, MaxBits, Min, Outlined, Simd};
use half::f16;
use std::mem::MaybeUninit;

/// Elements of a block.
pub(crate) use crate::kernels::simd::BLOCK as N;

/// A block as it lies in a cache.
pub(crate) trait BlockUnit: Copy + 'static {
    /// What [`Self::pair`] needs beside numbers: the factor, and what is added or taken off; or where a vector holds 16 entries, the
    /// elements of 16 numbers, and those of the next 16.
    fn parts<S: Simd>(&self, s: S) -> [S::V; 2];

    /// Two vectors of elements from `at` on, which is a multiple of as many below [`N`].
    fn pair<S: Simd>(&self, s: S, parts: [S::V; 2], at: usize) -> [S::V; 2];

    /// Writes the elements.
    ///
    /// # Safety
    /// [`N`] floats are writable at `to`.
    #[inline(always)]
    unsafe fn widen<S: Simd>(&self, s: S, to: *mut f32) {
        let parts = self.parts(s);
        for i in (0..N).step_by(2 * S::LANES) {
            let [x, y] = self.pair(s, parts, i);
            // SAFETY: the caller's; a block has whole pairs of vectors.
            unsafe {
                s.store_f32(to.add(i), x);
                s.store_f32(to.add(i + S::LANES), y);
            }
        }
    }

    /// The block next to these elements, all of which are finite. `peak` is their largest magnitude.
    fn nearest<S: Simd>(s: S, x: &Vectors<S>, peak: f32) -> Self;

    /// A block whose elements are all NaN.
    fn nan() -> Self;

    /// The factors of several blocks.
    ///
    /// # Safety
    /// Their elements are readable.
    unsafe fn factors<S: Simd, A: LoadStore>(s: S, several: &Several<A, Self>, factors: &mut Factors);

    /// Writes the block next to the elements of number i.
    ///
    /// # Safety
    /// The elements are readable, and the block is writable.
    unsafe fn put<S: Simd, A: LoadStore>(s: S, several: &Several<A, Self>, i: usize, factors: &Factors);
}

/// As many blocks as a vector has lanes: the first elements of each, and where the block goes. Where there are fewer, the last one
/// again.
pub(crate) struct Several<A, U> {
    from: [*const A; MAX_LANES],
    to: [*mut U; MAX_LANES],
    n: usize,
}

impl<A: LoadStore, U> Several<A, U> {
    /// The elements of block i.
    ///
    /// # Safety
    /// They are readable.
    #[inline(always)]
    unsafe fn elements<S: Simd>(&self, s: S, i: usize) -> Vectors<S> {
        let mut x = [s.zero(); MAX_VECTORS];
        for (j, x) in x[..N / S::LANES].iter_mut().enumerate() {
            // SAFETY: the caller's; a block has whole vectors.
            *x = unsafe { A::load(s, self.from[i].add(j * S::LANES)) };
        }
        x
    }

    /// The largest magnitude of each block; not finite if an element is not.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn peaks<S: Simd>(&self, s: S) -> S::V {
        let mut rows = [s.zero(); MAX_LANES];
        for (i, row) in rows[..S::LANES].iter_mut().enumerate() {
            // SAFETY: the caller's.
            let x = unsafe { self.elements(s, i) };
            *row = s.abs(x[0]);
            for &x in &x[1..N / S::LANES] {
                *row = s.max_bits(*row, s.abs(x));
            }
        }
        s.fold_lanes::<MaxBits>(&rows)
    }

    /// The element with the largest magnitude of each block; and the bits of blocks where it has both signs, or is 0, or an element is not
    /// finite.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn signed_peaks<S: Simd>(&self, s: S) -> (S::V, u64) {
        // SAFETY: the caller's.
        let (least, most, finite) = unsafe { self.ranges(s) };
        let below = s.sub(s.zero(), least);
        let apart = s.lt_bits(most, below) | s.lt_bits(below, most);
        (s.select_lt(most, below, least, most), if finite { !apart } else { u64::MAX })
    }

    /// The least and the most element of each block, and whether all elements are finite: else these may be any numbers.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn ranges<S: Simd>(&self, s: S) -> (S::V, S::V, bool) {
        let (mut least, mut most, mut sum) = ([s.zero(); MAX_LANES], [s.zero(); MAX_LANES], s.zero());
        for i in 0..S::LANES {
            // SAFETY: the caller's.
            let x = unsafe { self.elements(s, i) };
            (least[i], most[i]) = (x[0], x[0]);
            let mut own = x[0];
            for &x in &x[1..N / S::LANES] {
                least[i] = s.min(least[i], x);
                most[i] = s.max(most[i], x);
                own = s.add(own, x);
            }
            sum = s.add(sum, own);
        }
        (s.fold_lanes::<Min>(&least), s.fold_lanes::<Max>(&most), s.all_finite(sum))
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Q8_0 {
    d: u16,
    q: [i8; N],
}

/// Numbers of four bits, or of five with four bytes of `FIFTHS`, of elements that are centred, or with one of `MINIMA` raised.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct NibbleBlock<const MINIMA: usize, const FIFTHS: usize> {
    d: u16,
    m: [u16; MINIMA],
    fifths: [u8; FIFTHS],
    q: Nibbles,
}

pub(crate) type Q4_0 = NibbleBlock<0, 0>;
pub(crate) type Q4_1 = NibbleBlock<1, 0>;
pub(crate) type Q5_0 = NibbleBlock<0, 4>;
pub(crate) type Q5_1 = NibbleBlock<1, 4>;

impl<const MINIMA: usize, const FIFTHS: usize> NibbleBlock<MINIMA, FIFTHS> {
    const RAISED: bool = MINIMA == 1;
    const LARGEST: u8 = if FIFTHS == 4 { 31 } else { 15 };
    /// The number of a centred block's elements that are 0.
    pub const CENTRE: u8 = Self::LARGEST / 2 + 1;
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Iq4Nl {
    d: u16,
    q: Nibbles,
}

type Nibbles = [u8; N / 2];

/// The values that elements of iq4_nl number, times d.
pub(crate) const TABLE: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// The same as bytes.
pub(crate) const VALUES: [i8; 16] = {
    let (mut values, mut i) = ([0; 16], 0);
    while i < 16 {
        values[i] = TABLE[i] as i8;
        i += 1;
    }
    values
};

/// Twice the middles between neighbours.
const MIDDLES: [i16; 15] = {
    let (mut middles, mut i) = ([0; 15], 0);
    while i < 15 {
        middles[i] = (TABLE[i] + TABLE[i + 1]) as i16;
        i += 1;
    }
    middles
};

/// The f16 next to a number.
#[inline(always)]
fn narrowed<S: Simd>(s: S, x: f32) -> u16 {
    let mut halves = [f16::ZERO; MAX_LANES];
    // SAFETY: the array holds a whole vector.
    unsafe { s.store_f16(halves.as_mut_ptr(), s.splat(x)) };
    halves[0].to_bits().to_le()
}

const NAN: u16 = f16::NAN.to_bits().to_le();

/// The reciprocal of a factor, 0 for 0; `None` if it is infinite.
#[inline(always)]
fn reciprocal(d: f32) -> Option<f32> {
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    inverse.is_finite().then_some(inverse)
}

/// Bits of a block's elements from those of each vector, which [`Simd::lt_bits`] makes of vector i.
macro_rules! bits {
    ($s:ty, |$i:ident| $bits:expr) => {{
        let mut all = 0;
        for $i in 0..N / <$s>::LANES {
            all |= $bits << ($i * <$s>::LANES);
        }
        all as u32
    }};
}

/// The first element with this magnitude; positive if that is 0.
#[inline(always)]
fn signed_peak<S: Simd>(s: S, x: &Vectors<S>, peak: f32) -> f32 {
    let all = s.splat(peak);
    let below = bits!(S, |i| s.lt_bits(s.abs(x[i]), all));
    let negative = bits!(S, |i| s.lt_bits(x[i], s.zero()));
    if negative >> ((!below).trailing_zeros() % u32::BITS) & 1 == 1 { -peak } else { peak }
}

/// The smallest and the largest element. A smallest one that is zero has the sign of the first zero.
#[inline(always)]
fn range<S: Simd>(s: S, x: &Vectors<S>) -> (f32, f32) {
    let (mut least, mut most) = (x[0], x[0]);
    for &x in &x[1..N / S::LANES] {
        least = s.select_lt(x, least, x, least);
        most = s.max(most, x);
    }
    let (least, most) = (min_lane(s, least), s.max_lane(most));
    if least != 0.0 {
        return (least, most);
    }
    let positive = bits!(S, |i| s.lt_bits(s.zero(), x[i]));
    let signs = bits!(S, |i| s.lt_bits(s.copysign(s.splat(1.0), x[i]), s.zero()));
    (if signs >> ((!positive).trailing_zeros() % u32::BITS) & 1 == 1 { -0.0 } else { 0.0 }, most)
}

/// `x * inverse + half` without its fraction, from 0 to `most`; 0 for NaN.
#[inline(always)]
fn cut<S: Simd>(s: S, x: S::V, inverse: f32, half: f32, most: f32) -> S::V {
    let x = s.max(s.add(s.mul(x, s.splat(inverse)), s.splat(half)), s.zero());
    let nearest = s.round(x);
    let whole = s.select_lt(x, nearest, s.sub(nearest, s.splat(1.0)), nearest);
    s.select_lt(whole, s.splat(most), whole, s.splat(most))
}

/// Low halves of bytes for the first 16 numbers, high halves for the others.
#[inline(always)]
fn nibbles<S: Simd>(s: S, q: &Vectors<S>) -> Nibbles {
    let mut halves = [0; N / 2];
    for i in 0..N / 2 / S::LANES {
        let both = quantize::nibbles(s, q[i], q[i + N / 2 / S::LANES]);
        // SAFETY: the array holds 16 bytes.
        unsafe { s.store_low_bytes(halves.as_mut_ptr().add(i * S::LANES), both) };
    }
    halves
}

/// Takes the fifth bits off numbers.
#[inline(always)]
fn fifth_bits<S: Simd>(s: S, q: &mut Vectors<S>) -> [u8; 4] {
    let most = s.splat(15.0);
    let bits = bits!(S, |i| s.lt_bits(most, q[i]));
    for q in &mut q[..N / S::LANES] {
        *q = s.select_lt(most, *q, s.sub(*q, s.splat(16.0)), *q);
    }
    bits.to_le_bytes()
}

/// An f16 as it lies in a block.
#[inline(always)]
fn half<S: Simd>(s: S, bits: u16) -> S::V {
    s.splat_f16(f16::from_bits(u16::from_le(bits)))
}

/// The sums of as many blocks as a vector has lanes, each in the order of elements.
///
/// # Safety
/// The blocks are readable.
#[inline(always)]
unsafe fn sums_of<S: Simd>(s: S, blocks: *const f32) -> S::V {
    let mut sum = s.zero();
    for at in (0..N).step_by(S::LANES) {
        let mut rows = [s.zero(); MAX_LANES];
        for (i, row) in rows[..S::LANES].iter_mut().enumerate() {
            // SAFETY: a block has whole vectors.
            *row = unsafe { s.load_f32(blocks.add(i * N + at)) };
        }
        s.transpose(&mut rows);
        for &row in &rows[..S::LANES] {
            sum = s.add(sum, row);
        }
    }
    sum
}

/// What is made of the numbers of a block in registers. No closure: that would be a function of its own, without the level's features.
trait Elements {
    fn of<S: Simd>(s: S, x: S::V, parts: [S::V; 2]) -> S::V;

    /// Two vectors of what [`Self::of`] takes, from number `at` on, with fifth bits if there are any.
    ///
    /// # Safety
    /// The bytes are those of a block, and `at` is a multiple of two vectors below [`N`].
    #[inline(always)]
    unsafe fn numbers<S: Simd>(s: S, q: *const u8, fifth: Option<u32>, at: usize) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe {
            match fifth {
                Some(bits) => s.load_pair_fives(q, bits, at),
                None => s.load_pair_nibbles(q, at),
            }
        }
    }

    /// The elements of the numbers from 0 to 15 and from 16 to 31, on levels with as many lanes.
    #[inline(always)]
    fn all<S: Simd>(s: S, parts: [S::V; 2]) -> [S::V; 2] {
        // SAFETY: the array holds two vectors.
        [0, 16].map(|i| Self::of(s, unsafe { s.load_f32(NUMBERS.as_ptr().add(i)) }, parts))
    }
}

/// Numbers of five bits.
const NUMBERS: [f32; N] = {
    let (mut numbers, mut i) = ([0.0; N], 0);
    while i < N {
        numbers[i] = i as f32;
        i += 1;
    }
    numbers
};

/// `d * (q - zero)`, of parts `[d, zero]`.
struct Centred;

/// `d * q + m`, of parts `[d, m]`.
struct Raised;

/// `d` times an entry of the table.
struct Listed;

impl Elements for Centred {
    #[inline(always)]
    fn of<S: Simd>(s: S, q: S::V, [d, zero]: [S::V; 2]) -> S::V {
        s.mul(d, s.sub(q, zero))
    }
}

impl Elements for Raised {
    #[inline(always)]
    fn of<S: Simd>(s: S, q: S::V, [d, m]: [S::V; 2]) -> S::V {
        s.add(s.mul(d, q), m)
    }
}

impl Elements for Listed {
    #[inline(always)]
    fn of<S: Simd>(s: S, x: S::V, [d, _]: [S::V; 2]) -> S::V {
        s.mul(d, x)
    }
    #[inline(always)]
    unsafe fn numbers<S: Simd>(s: S, q: *const u8, _: Option<u32>, at: usize) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe { s.look_up_pair(q, at, &VALUES) }
    }
    #[inline(always)]
    fn all<S: Simd>(s: S, [d, _]: [S::V; 2]) -> [S::V; 2] {
        // SAFETY: the table is a vector.
        [s.mul(d, unsafe { s.load_f32(TABLE.as_ptr()) }); 2]
    }
}

/// Whether a vector holds the elements of all numbers of four bits. They are then computed once per block, and looked up.
const fn holds_all<S: Simd>() -> bool {
    S::LANES == 16
}

/// [`BlockUnit::parts`] of nibbles.
#[inline(always)]
fn nibble_parts<S: Simd, E: Elements>(s: S, parts: [S::V; 2]) -> [S::V; 2] {
    if holds_all::<S>() { E::all(s, parts) } else { parts }
}

/// [`BlockUnit::pair`] of nibbles, with fifth bits if there are any.
#[inline(always)]
fn nibble_pair<S: Simd, E: Elements>(
    s: S,
    q: &Nibbles,
    fifth: Option<[u8; 4]>,
    parts: [S::V; 2],
    at: usize,
) -> [S::V; 2] {
    let (q, fifth) = (q.as_ptr(), fifth.map(u32::from_le_bytes));
    // SAFETY: there are 16 bytes.
    unsafe {
        if holds_all::<S>() {
            return match fifth {
                Some(bits) => s.look_up_fives(q, bits, parts),
                None => [s.look_up_nibbles(q, 0, parts[0]), s.look_up_nibbles(q, 16, parts[0])],
            };
        }
        let [x, y] = E::numbers(s, q, fifth, at);
        [E::of(s, x, parts), E::of(s, y, parts)]
    }
}

/// The factor of a format whose numbers are centred at `zero`, and the numbers, of which the largest is `2 * zero - 1`.
#[inline(always)]
fn centred<S: Simd>(s: S, x: &Vectors<S>, peak: f32, zero: u8) -> (u16, Vectors<S>) {
    let zero = f32::from(zero);
    let d = signed_peak(s, x, peak) / -zero;
    let (inverse, half) = match reciprocal(d) {
        Some(inverse) => (inverse, zero + 0.5),
        None => (0.0, 0.0),
    };
    let mut q = *x;
    for q in &mut q[..N / S::LANES] {
        *q = cut(s, *q, inverse, half, 2.0 * zero - 1.0);
    }
    (narrowed(s, d), q)
}

/// What [`Several`] are quantised by.
pub(crate) struct Factors {
    d: [f16; MAX_LANES],
    m: [f16; MAX_LANES],
    inverse: [f32; MAX_LANES],
    /// What is subtracted from elements.
    less: [f32; MAX_LANES],
    /// The bits of blocks that need what is not computed side by side.
    left: u64,
}

impl Factors {
    #[inline(always)]
    fn new() -> Self {
        let (halves, floats) = ([f16::ZERO; MAX_LANES], [0.0; MAX_LANES]);
        Self { d: halves, m: halves, inverse: floats, less: floats, left: 0 }
    }

    #[inline(always)]
    fn set<S: Simd>(&mut self, s: S, d: S::V, inverse: S::V, left: u64) {
        // SAFETY: the arrays hold whole vectors.
        unsafe {
            s.store_f16(self.d.as_mut_ptr(), d);
            s.store_f32(self.inverse.as_mut_ptr(), inverse);
        }
        self.left = left;
    }

    /// The factors of a format whose numbers are centred at `zero`. Left are blocks whose factor has an infinite reciprocal as well.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn centred<S: Simd, A: LoadStore, U>(&mut self, s: S, several: &Several<A, U>, zero: f32) {
        // SAFETY: the caller's.
        let (peak, left) = unsafe { several.signed_peaks(s) };
        let d = s.div(peak, s.splat(-zero));
        let inverse = s.div(s.splat(1.0), d);
        let left = left | !s.lt_bits(s.abs(inverse), s.splat(f32::INFINITY));
        self.set(s, d, inverse, left);
    }

    /// The factors of a format whose largest number is `largest`. Left are blocks whose least element is 0, which has a sign.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn raised<S: Simd, A: LoadStore, U>(&mut self, s: S, several: &Several<A, U>, largest: f32) {
        // SAFETY: the caller's.
        let (least, most, finite) = unsafe { several.ranges(s) };
        let d = s.div(s.add(s.sub(most, least), s.zero()), s.splat(largest));
        let inverse = s.div(s.splat(1.0), d);
        let inverse = s.select_lt(inverse, s.splat(f32::INFINITY), inverse, s.zero());
        let apart = s.lt_bits(least, s.zero()) | s.lt_bits(s.zero(), least);
        self.set(s, d, inverse, if finite { !apart } else { u64::MAX });
        // SAFETY: the arrays hold whole vectors.
        unsafe {
            s.store_f16(self.m.as_mut_ptr(), least);
            s.store_f32(self.less.as_mut_ptr(), least);
        }
    }

    /// The numbers of block i, up to `most`: of quotients and `half`, without their fractions.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn numbers<S: Simd, A: LoadStore, U>(
        &self,
        s: S,
        several: &Several<A, U>,
        i: usize,
        raised: bool,
        (half, most): (f32, u8),
    ) -> [u8; N] {
        // SAFETY: the caller's.
        let mut x = unsafe { several.elements(s, i) };
        let (inverse, less, half) = (s.splat(self.inverse[i]), s.splat(self.less[i]), s.splat(half));
        for x in &mut x[..N / S::LANES] {
            let above = if raised { s.sub(*x, less) } else { *x };
            *x = s.add(s.mul(above, inverse), half);
        }
        s.cut_block(&x, most)
    }
}

/// The factor and the minimum of a format whose largest number is `most`, and the numbers.
#[inline(always)]
fn raised<S: Simd>(s: S, x: &Vectors<S>, most: u8) -> ((u16, u16), Vectors<S>) {
    let (low, high) = range(s, x);
    // No negative zero, whichever zeros are the smallest and the largest.
    let d = (high - low + 0.0) / f32::from(most);
    let inverse = reciprocal(d).unwrap_or(0.0);
    let (mut q, least) = (*x, s.splat(low));
    for q in &mut q[..N / S::LANES] {
        *q = cut(s, s.sub(*q, least), inverse, 0.5, f32::from(most));
    }
    ((narrowed(s, d), narrowed(s, low)), q)
}

impl BlockUnit for Q8_0 {
    #[inline(always)]
    fn parts<S: Simd>(&self, s: S) -> [S::V; 2] {
        [half(s, self.d); 2]
    }

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, [d, _]: [S::V; 2], at: usize) -> [S::V; 2] {
        // SAFETY: two vectors from `at` on are inside the block.
        let [x, y] = unsafe { s.load_pair_i8(self.q.as_ptr().add(at)) };
        [s.mul(d, x), s.mul(d, y)]
    }

    #[inline(always)]
    fn nearest<S: Simd>(s: S, x: &Vectors<S>, peak: f32) -> Self {
        let d = peak / 127.0;
        let inverse = s.splat(reciprocal(d).unwrap_or(0.0));
        let mut q = [0; N];
        for i in 0..N / S::LANES {
            let x = s.mul(x[i], inverse);
            // To nearest, ties away from zero: those to even have a rest of a half where they went down.
            let nearest = s.round(s.abs(x));
            let rest = s.sub(s.abs(x), nearest);
            let away = s.select_lt(rest, s.splat(0.5), nearest, s.add(nearest, s.splat(1.0)));
            // SAFETY: the array holds a block. Numbers are quotients by the largest one, times 127.
            unsafe { s.store_i8(q.as_mut_ptr().add(i * S::LANES), s.copysign(away, x)) };
        }
        Self { d: narrowed(s, d), q }
    }

    #[inline(always)]
    fn nan() -> Self {
        Self { d: NAN, q: [0; N] }
    }

    #[inline(always)]
    unsafe fn factors<S: Simd, A: LoadStore>(s: S, several: &Several<A, Self>, factors: &mut Factors) {
        // SAFETY: the caller's.
        let peaks = unsafe { several.peaks(s) };
        let d = s.div(peaks, s.splat(127.0));
        let inverse = s.div(s.splat(1.0), d);
        // Twice a larger one may be infinite. One that is infinite becomes 0.
        let (most, infinite) = (s.splat(f32::from_bits((127 + 126) << 23)), s.splat(f32::INFINITY));
        let doubled = s.select_lt(inverse, most, s.add(inverse, inverse), s.zero());
        let left = !s.lt_bits(peaks, infinite) | !s.lt_bits(inverse, most) & s.lt_bits(inverse, infinite);
        factors.set(s, d, doubled, left);
    }

    #[inline(always)]
    unsafe fn put<S: Simd, A: LoadStore>(s: S, several: &Several<A, Self>, i: usize, factors: &Factors) {
        // SAFETY: the caller's.
        unsafe {
            let (mut x, to, by) = (several.elements(s, i), several.to[i], s.splat(factors.inverse[i]));
            for x in &mut x[..N / S::LANES] {
                *x = s.mul(*x, by);
            }
            (*to).d = factors.d[i].to_bits().to_le();
            s.store_halves_away((&raw mut (*to).q).cast(), &x);
        }
    }
}

impl<const MINIMA: usize, const FIFTHS: usize> BlockUnit for NibbleBlock<MINIMA, FIFTHS> {
    #[inline(always)]
    fn parts<S: Simd>(&self, s: S) -> [S::V; 2] {
        match self.m.first() {
            Some(&m) => nibble_parts::<S, Raised>(s, [half(s, self.d), half(s, m)]),
            None => nibble_parts::<S, Centred>(s, [half(s, self.d), s.splat(f32::from(Self::CENTRE))]),
        }
    }

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, parts: [S::V; 2], at: usize) -> [S::V; 2] {
        let fifths = self.fifths.first_chunk().copied();
        if Self::RAISED {
            nibble_pair::<S, Raised>(s, &self.q, fifths, parts, at)
        } else {
            nibble_pair::<S, Centred>(s, &self.q, fifths, parts, at)
        }
    }

    #[inline(always)]
    fn nearest<S: Simd>(s: S, x: &Vectors<S>, peak: f32) -> Self {
        let (d, m, mut q) = if Self::RAISED {
            let ((d, m), q) = raised(s, x, Self::LARGEST);
            (d, m, q)
        } else {
            let (d, q) = centred(s, x, peak, Self::CENTRE);
            (d, 0, q)
        };
        let mut fifths = [0; FIFTHS];
        if let Some(fifths) = fifths.first_chunk_mut() {
            *fifths = fifth_bits(s, &mut q);
        }
        Self { d, m: [m; MINIMA], fifths, q: nibbles(s, &q) }
    }

    #[inline(always)]
    fn nan() -> Self {
        Self { d: NAN, m: [0; MINIMA], fifths: [0; FIFTHS], q: [0; N / 2] }
    }

    #[inline(always)]
    unsafe fn factors<S: Simd, A: LoadStore>(s: S, several: &Several<A, Self>, factors: &mut Factors) {
        // SAFETY: the caller's.
        unsafe {
            if Self::RAISED {
                factors.raised(s, several, f32::from(Self::LARGEST));
            } else {
                factors.centred(s, several, f32::from(Self::CENTRE));
            }
        }
    }

    #[inline(always)]
    unsafe fn put<S: Simd, A: LoadStore>(s: S, several: &Several<A, Self>, i: usize, factors: &Factors) {
        let half = if Self::RAISED { 0.5 } else { f32::from(Self::CENTRE) + 0.5 };
        // SAFETY: the caller's.
        unsafe {
            let (to, q) = (several.to[i], factors.numbers(s, several, i, Self::RAISED, (half, Self::LARGEST)));
            (*to).d = factors.d[i].to_bits().to_le();
            (*to).m = [factors.m[i].to_bits().to_le(); MINIMA];
            if FIFTHS == 4 {
                (&raw mut (*to).fifths).cast::<[u8; 4]>().write(s.fifth_bits(q).to_le_bytes());
            }
            (*to).q = s.low_halves(q);
        }
    }
}

impl BlockUnit for Iq4Nl {
    #[inline(always)]
    fn parts<S: Simd>(&self, s: S) -> [S::V; 2] {
        nibble_parts::<S, Listed>(s, [half(s, self.d); 2])
    }

    #[inline(always)]
    fn pair<S: Simd>(&self, s: S, parts: [S::V; 2], at: usize) -> [S::V; 2] {
        nibble_pair::<S, Listed>(s, &self.q, None, parts, at)
    }

    #[inline(always)]
    fn nearest<S: Simd>(s: S, x: &Vectors<S>, peak: f32) -> Self {
        if peak < 1e-15 {
            // The number of 1, times 0.
            return Self { d: 0, q: [0x88; N / 2] };
        }
        let inverse = s.splat(1.0 / (signed_peak(s, x, peak) / TABLE[0]));
        let (mut q, mut products, mut squares) = (*x, [0.0; N], [0.0; N]);
        for (i, q) in q[..N / S::LANES].iter_mut().enumerate() {
            let quotient = s.mul(*q, inverse);
            // The nearest value of the table, of two at the same distance the larger.
            let (mut number, mut value) = (s.zero(), s.splat(TABLE[0]));
            for j in 1..TABLE.len() {
                let middle = s.splat((TABLE[j - 1] + TABLE[j]) / 2.0);
                number = s.select_lt(quotient, middle, number, s.splat(j as f32));
                value = s.select_lt(quotient, middle, value, s.splat(TABLE[j]));
            }
            let weighted = s.mul(s.mul(*q, *q), value);
            // SAFETY: the arrays hold a block.
            unsafe {
                s.store_f32(products.as_mut_ptr().add(i * S::LANES), s.mul(weighted, *q));
                s.store_f32(squares.as_mut_ptr().add(i * S::LANES), s.mul(weighted, value));
            }
            *q = number;
        }
        // The factor with the least error, weighted by squares of elements. Sums are in the order of elements.
        let (products, squares) = (products.iter().fold(0.0, |a, b| a + b), squares.iter().fold(0.0, |a, b| a + b));
        let d = if squares > 0.0 { products / squares } else { 0.0 };
        Self { d: if d.is_nan() { NAN } else { narrowed(s, d) }, q: nibbles(s, &q) }
    }

    #[inline(always)]
    fn nan() -> Self {
        Self { d: NAN, q: [0; N / 2] }
    }

    /// Writes the blocks as well: their factors are computed from their numbers.
    #[inline(always)]
    unsafe fn factors<S: Simd, A: LoadStore>(s: S, several: &Several<A, Self>, factors: &mut Factors) {
        // SAFETY: the caller's, here and below.
        let (peak, mut left) = unsafe { several.signed_peaks(s) };
        let inverse = s.div(s.splat(1.0), s.div(peak, s.splat(TABLE[0])));
        left |= s.lt_bits(s.abs(peak), s.splat(1e-15));
        factors.set(s, inverse, s.add(inverse, inverse), left);
        let mut sums = [const { MaybeUninit::<[[f32; N]; MAX_LANES]>::uninit() }; 2];
        let [products, squares] = sums.each_mut().map(|sums| sums.as_mut_ptr().cast::<f32>());
        for i in 0..S::LANES {
            // SAFETY: as above; the arrays hold blocks.
            unsafe {
                let (x, doubled) = (several.elements(s, i), s.splat(factors.inverse[i]));
                let mut q = x;
                for q in &mut q[..N / S::LANES] {
                    *q = s.mul(*q, doubled);
                }
                let numbers = s.count_reached(&q, &MIDDLES);
                let values = s.look_up_bytes(numbers, &VALUES);
                for (j, &x) in x[..N / S::LANES].iter().enumerate() {
                    let value = s.load_i8(values.as_ptr().add(j * S::LANES));
                    let weighted = s.mul(s.mul(x, x), value);
                    s.store_f32(products.add(i * N + j * S::LANES), s.mul(weighted, x));
                    s.store_f32(squares.add(i * N + j * S::LANES), s.mul(weighted, value));
                }
                (*several.to[i]).q = s.low_halves(numbers);
            }
        }
        // SAFETY: as many blocks are written as are read.
        let (products, squares) = unsafe { (sums_of(s, products), sums_of(s, squares)) };
        let d = s.select_lt(s.zero(), squares, s.div(products, squares), s.zero());
        factors.set(s, d, inverse, left | !s.lt_bits(s.abs(d), s.splat(f32::INFINITY)));
    }

    #[inline(always)]
    unsafe fn put<S: Simd, A: LoadStore>(_: S, several: &Several<A, Self>, i: usize, factors: &Factors) {
        // SAFETY: the caller's.
        unsafe { (*several.to[i]).d = factors.d[i].to_bits().to_le() };
    }
}

/// The block next to elements, or one of NaN.
#[inline(always)]
fn quantized<S: Simd, U: BlockUnit>(s: S, x: &Vectors<S>) -> U {
    let (mut largest, mut nonfinite) = (s.zero(), s.zero());
    for &x in &x[..N / S::LANES] {
        (largest, nonfinite) = widest(s, x, (largest, nonfinite));
    }
    if s.all_finite(nonfinite) { U::nearest(s, x, s.max_lane(largest)) } else { U::nan() }
}

/// The blocks of heads whose elements lie together, in order.
struct BlocksOf<'a> {
    copy: &'a CopyArgs,
    head: usize,
    block: usize,
}

impl BlocksOf<'_> {
    /// The next ones.
    #[inline(always)]
    fn take<S: Simd, A, U>(&mut self, _: S, several: &mut Several<A, U>) {
        let c = self.copy;
        let (of_head, mut n) = (c.dim / N, 0);
        let at = |head: usize, block: usize| {
            let src = c.src.cast::<A>().wrapping_offset(head as isize * c.src_head).wrapping_add(block * N);
            (src, c.dst.cast::<U>().wrapping_offset(head as isize * c.dst_head).wrapping_add(block))
        };
        let (mut src, mut dst) = at(self.head, self.block);
        while n < S::LANES && self.head < c.heads {
            (several.from[n], several.to[n]) = (src, dst);
            (src, dst) = (src.wrapping_add(N), dst.wrapping_add(1));
            n += 1;
            self.block += 1;
            if self.block == of_head {
                (self.head, self.block) = (self.head + 1, 0);
                (src, dst) = at(self.head, 0);
            }
        }
        several.n = n;
        if n > 0 {
            for i in n..S::LANES {
                (several.from[i], several.to[i]) = (several.from[n - 1], several.to[n - 1]);
            }
        }
    }
}

/// Quantises `heads` vectors of whole blocks, whose elements lie together, several blocks at a time. The factors of the next ones are
/// computed before the last ones are written, which hides how long they take.
///
/// # Safety
/// As [`quantize`].
#[inline(always)]
unsafe fn quantize_several<S: Simd, A: LoadStore, U: BlockUnit>(s: S, args: &ScaledArgs) {
    let mut blocks = BlocksOf { copy: &args.copy, head: 0, block: 0 };
    let mut several =
        [const { Several::<A, U> { from: [std::ptr::null(); _], to: [std::ptr::null_mut(); _], n: 0 } }; 2];
    let mut factors = [Factors::new(), Factors::new()];
    let mut now = 0;
    // The first turn writes nothing.
    loop {
        let next = 1 - now;
        blocks.take(s, &mut several[next]);
        // SAFETY: the caller's.
        unsafe {
            if several[next].n > 0 {
                U::factors(s, &several[next], &mut factors[next]);
            }
            let (several, factors) = (&several[now], &factors[now]);
            for i in 0..several.n {
                let (from, to) = (several.from[i].cast(), several.to[i].cast_const().cast());
                prefetch_next(s, &args.copy, (from, N * size_of::<A>()), (to, size_of::<U>()));
                U::put(s, several, i, factors);
            }
            let mut left = factors.left & ((1 << several.n) - 1);
            while left != 0 {
                let i = left.trailing_zeros() as usize;
                let (dtype, from) = (A::DTYPE, several.from[i].cast());
                s.outline(Blocks { dtype, from, step: 1, to: several.to[i], n: 1 });
                left &= left - 1;
            }
        }
        if several[next].n == 0 {
            break;
        }
        now = next;
    }
}

/// Quantises `heads` vectors of whole blocks.
///
/// # Safety
/// Every address that `args` describes is valid; source and units do not overlap.
#[inline(always)]
pub(crate) unsafe fn quantize<S: Simd, A: LoadStore, U: BlockUnit>(s: S, args: &ScaledArgs) {
    let c = &args.copy;
    if const { S::WRITES_SEVERAL } && c.src_dim == 1 && c.dim >= N {
        // SAFETY: the caller's.
        unsafe { quantize_several::<_, A, U>(s, args) };
        return;
    }
    for head in 0..c.heads as isize {
        let src = c.src.cast::<A>().wrapping_offset(head * c.src_head);
        let to = c.dst.cast::<U>().wrapping_offset(head * c.dst_head);
        // SAFETY: the caller's.
        unsafe { s.outline(Blocks { dtype: A::DTYPE, from: src.cast(), step: c.src_dim, to, n: c.dim / N }) };
    }
}

/// Blocks of elements that are `step` elements apart, which are quantised one after another. One function for all types of elements.
struct Blocks<U> {
    dtype: DType,
    from: *const u8,
    step: isize,
    to: *mut U,
    n: usize,
}

impl<U: BlockUnit> Outlined for Blocks<U> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let block = (N * self.dtype.size()) as isize * self.step;
        for i in 0..self.n {
            let from = self.from.wrapping_offset(i as isize * block);
            // SAFETY: the caller's.
            unsafe {
                let x = quantize::load(s, self.dtype, from, self.step, N);
                *self.to.add(i) = quantized(s, &x);
            }
        }
    }
}

/// [`BlockUnit::widen`], for elements that are stored as any type.
struct Widened<U> {
    block: *const U,
    to: *mut f32,
}

impl<U: BlockUnit> Outlined for Widened<U> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        // SAFETY: the caller's.
        unsafe { (*self.block).widen(s, self.to) }
    }
}

/// Reads `heads` vectors of whole blocks.
///
/// # Safety
/// Every address that `args` describes is valid; the target does not overlap the units.
#[inline(always)]
pub(crate) unsafe fn dequantize<S: Simd, U: BlockUnit, B: LoadStore>(s: S, args: &ScaledArgs) {
    let c = &args.copy;
    for head in 0..c.heads as isize {
        let src = c.src.cast::<U>().wrapping_offset(head * c.src_head);
        let dst = c.dst.cast::<B>().wrapping_offset(head * c.dst_head);
        for block in 0..c.dim / N {
            let (mut x, mut stage) = ([0.0; N], [B::default(); N]);
            let to = dst.wrapping_offset((block * N) as isize * c.dst_dim);
            // SAFETY: the caller's; a block has whole vectors.
            unsafe {
                s.outline(Widened { block: src.wrapping_add(block), to: x.as_mut_ptr() });
                let target = if c.dst_dim == 1 { to } else { stage.as_mut_ptr() };
                for i in (0..N).step_by(S::LANES) {
                    B::store(s, target.add(i), s.load_f32(x.as_ptr().add(i)));
                }
                if c.dst_dim != 1 {
                    scatter(stage.as_ptr(), to, c.dst_dim, N);
                }
            }
        }
    }
}
