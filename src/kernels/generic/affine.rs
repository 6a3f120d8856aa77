//! Units of affine formats, as an [`Affine`](crate::Affine) describes them: integers of eight or four bits, converted to f32 and back.
//!
//! One function of a level reads all descriptions of a width, and one writes them: what differs are numbers in registers and
//! addresses. An integer q becomes `(q - a) * s + m`, each operation rounded to f32, where s is the scale, and a the zero point of
//! `Point`, else 0, and m that of `Minimum`, or the negative one of `Shift`, else a negative 0, which changes no bit.
//!
//! # What a write computes
//! Of the elements of a group, least and most, and with `levels` of 255 or 15, and `low` the least integer (0, or -128, or -8):
//!
//! | zero points | scale | zero point | integer before it is rounded |
//! | --- | --- | --- | --- |
//! | none | largest magnitude / largest integer | | x (1 / s) |
//! | `Point`, floats | (most - least) / levels, 1e-4 for 0 | low - least / s | x (1 / s) + z |
//! | `Point`, integers | the same, of a range with 0 in it | nearest to low - least / s | x (1 / s), and z after rounding |
//! | `Minimum` | (most - least) / levels | least - low s | (x - z) / s |
//! | `Shift` | the same | the negative one | (x + z) / s |
//!
//! The largest integer is 127 or 7 where numbers have a sign, else 255 or 15. Every operation is rounded to f32; scales and zero points
//! are rounded to their types, zero points to a finite number, and as stored they quantise. Integers are rounded to the nearest, ties to even, between the least and
//! the largest. Where tokens share a scale, that of float points is the range times the reciprocal of the levels: OpenVINO does both so.
//! A group with NaN or an infinity, or whose scale is not finite, has the scale NaN, so that all of it reads as NaN. A scale
//! of 0, or one whose reciprocal is infinite, makes quotients 0. Scales that a write reads quantise by the last column; there, NaN
//! becomes the largest integer.
//!
//! One group after another, numbers come from lists of what each of 32 elements is quantised by. Groups of whole blocks of one token are
//! quantised several at a time where the level has it ([`Simd::WRITES_SEVERAL`]): their extremes are reduced by trees, and their scales
//! and zero points computed as vectors, before the numbers of the groups before them are written. Groups that need more are left to the
//! other way: with NaN or an infinity, with scales out of the range of [`Reciprocals`], or with quotients that no integer holds. What
//! bounds it, in AVX2: of 8 elements, three operations for the extremes, a product and a sum, a conversion, and two to pack them: 27
//! cycles of a head of 128 at four per cycle; 93 with what is computed once per group.

/// Elements that are converted at a time, as many as blocks have.
pub(crate) use super::blocks::N;
use super::copy::{prefetch_next, scatter};
use super::quantize::{self, MAX_VECTORS, Reciprocal, Reciprocals, Vectors, min_lane, together, widest};
use crate::dtype::DType;
use crate::kernels::api::{AffineArgs, ScaledArgs};
use crate::kernels::simd::{LoadStore, MAX_LANES, Max, Min, Outlined, Simd};
use crate::view::{AffineGroups, AffineRow, ZeroType};
use crate::{Affine, Integers, Nibbles, Zeros};
use half::{bf16, f16};

/// The scale of a group of equal elements whose zero points are floats.
const CONSTANT: f32 = 1e-4;

/// Numbers that make elements of integers, one for each of [`N`] elements.
struct Factors {
    s: [f32; N],
    a: [f32; N],
    m: [f32; N],
}

/// The scale and the zero point of a group.
///
/// # Safety
/// The row has the group.
#[inline(always)]
unsafe fn parameters(groups: &AffineGroups, row: &AffineRow, group: usize) -> (f32, f32) {
    #[inline(always)]
    unsafe fn float(at: *const u8, dtype: DType) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                DType::F32 => *at.cast::<f32>(),
                DType::F16 => (*at.cast::<f16>()).to_f32(),
                DType::Bf16 => (*at.cast::<bf16>()).to_f32(),
            }
        }
    }
    let group = group as isize;
    // SAFETY: the caller's.
    unsafe {
        let scale = float(row.scales.wrapping_offset(group * groups.scale_step), groups.scale_dtype);
        let at = row.zeros.wrapping_offset(group * groups.zero_step);
        let zero = match groups.zero_type {
            None => 0.0,
            Some(ZeroType::Float(dtype)) => float(at, dtype),
            Some(ZeroType::U8) => f32::from(*at),
            Some(ZeroType::I8) => f32::from(*at.cast::<i8>()),
        };
        (scale, zero)
    }
}

/// Stores the scale and the zero point of a group, and returns them as stored.
///
/// # Safety
/// The row has the group, and it is writable.
#[inline(always)]
unsafe fn put_parameters(
    groups: &AffineGroups,
    row: &AffineRow,
    group: usize,
    scale: f32,
    zero: impl FnOnce(f32) -> f32,
) -> (f32, f32) {
    #[inline(always)]
    unsafe fn put(at: *mut u8, dtype: DType, x: f32) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                DType::F32 => {
                    *at.cast::<f32>() = x;
                    x
                }
                DType::F16 => {
                    let x = if x.is_nan() { f16::NAN } else { f16::from_f32(x) };
                    *at.cast::<f16>() = x;
                    x.to_f32()
                }
                DType::Bf16 => {
                    let x = if x.is_nan() { bf16::NAN } else { bf16::from_f32(x) };
                    *at.cast::<bf16>() = x;
                    x.to_f32()
                }
            }
        }
    }
    let at = row.scales.wrapping_offset(group as isize * groups.scale_step);
    // SAFETY: the caller's.
    unsafe {
        let mut stored = put(at, groups.scale_dtype, scale);
        if !stored.is_finite() {
            stored = put(at, groups.scale_dtype, f32::NAN);
        } else if stored == 0.0
            && groups.of.zeros == Zeros::Point
            && matches!(groups.zero_type, Some(ZeroType::Float(_)))
        {
            stored = put(at, groups.scale_dtype, CONSTANT);
        }
        let at = row.zeros.wrapping_offset(group as isize * groups.zero_step);
        let Some(zero_type) = groups.zero_type else { return (stored, 0.0) };
        let zero = zero(stored);
        let zero = match zero_type {
            ZeroType::Float(dtype) => {
                let most = match dtype {
                    DType::F32 => f32::MAX,
                    DType::F16 => f16::MAX.to_f32(),
                    DType::Bf16 => bf16::MAX.to_f32(),
                };
                put(at, dtype, zero.clamp(-most, most))
            }
            ZeroType::U8 => {
                // Saturates; 0 for NaN.
                *at = zero as u8;
                f32::from(*at)
            }
            ZeroType::I8 => {
                *at.cast::<i8>() = zero as i8;
                f32::from(*at.cast::<i8>())
            }
        };
        (stored, zero)
    }
}

/// Integers from `low` to `low + levels`.
#[derive(Clone, Copy)]
struct Range {
    low: f32,
    levels: f32,
    /// Numbers in memory below this are the integers; from this on, they are greater by `wrap`.
    below: f32,
    wrap: f32,
}

impl Range {
    #[inline(always)]
    fn new<const BITS: u32>(integers: Integers) -> Self {
        let (half, levels) = ((1 << (BITS - 1)) as f32, ((1 << BITS) - 1) as f32);
        let (low, below, wrap) = match integers {
            Integers::Unsigned => (0.0, f32::INFINITY, 0.0),
            Integers::Signed => (-half, half, 2.0 * half),
            Integers::Offset => (-half, 0.0, half),
        };
        Self { low, levels, below, wrap }
    }
}

/// What makes elements of integers, in every lane: of those that share a scale and a zero point, the same.
struct Shared<S: Simd> {
    scale: S::V,
    a: S::V,
    m: S::V,
    /// The elements of all numbers, if [`holds_nibbles`].
    table: S::V,
}

impl<S: Simd> Shared<S> {
    /// Elements of integers.
    #[inline(always)]
    fn elements(&self, s: S, q: S::V) -> S::V {
        s.add(s.mul(s.sub(q, self.a), self.scale), self.m)
    }
}

/// Whether a vector holds the elements of all numbers. They are then computed once, and looked up.
const fn holds_nibbles<S: Simd>(bits: u32) -> bool {
    bits == 4 && S::LANES == 16
}

/// Numbers of four bits.
pub(crate) const NUMBERS: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// Numbers as loops over a cache load them.
pub(crate) trait Numbers: 'static {
    const BITS: u32;

    /// `2 * LANES` numbers, of bytes whose high halves come first with `swapped`.
    ///
    /// # Safety
    /// They are readable.
    unsafe fn pair<S: Simd>(s: S, from: *const u8, swapped: bool) -> [S::V; 2];
}

/// Bytes with a sign.
pub(crate) struct SignedBytes;

/// Bytes without a sign.
pub(crate) struct Bytes;

/// Halves of bytes, without a sign.
pub(crate) struct Halves;

impl Numbers for SignedBytes {
    const BITS: u32 = 8;
    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const u8, _: bool) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe { s.load_pair_i8(from.cast()) }
    }
}

impl Numbers for Bytes {
    const BITS: u32 = 8;
    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const u8, _: bool) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe { s.load_pair_u8(from) }
    }
}

impl Numbers for Halves {
    const BITS: u32 = 4;
    #[inline(always)]
    unsafe fn pair<S: Simd>(s: S, from: *const u8, swapped: bool) -> [S::V; 2] {
        // SAFETY: the caller's.
        unsafe { s.load_nibble_pairs(from, swapped) }
    }
}

/// Makes elements of the units of one cache.
pub(crate) struct Widener<S: Simd, const BITS: u32> {
    groups: AffineGroups,
    below: S::V,
    wrap: S::V,
    factors: Factors,
    /// What the factors are of: scales, zero points and the first element.
    of: (*const u8, *const u8, usize),
}

impl<S: Simd, const BITS: u32> Widener<S, BITS> {
    #[inline(always)]
    pub fn new(s: S, groups: AffineGroups) -> Self {
        let Range { below, wrap, .. } = Range::new::<BITS>(groups.of.integers);
        let factors = Factors { s: [0.0; N], a: [0.0; N], m: [0.0; N] };
        let of = (std::ptr::null(), std::ptr::null(), usize::MAX);
        Self { groups, below: s.splat(below), wrap: s.splat(wrap), factors, of }
    }

    /// Whether all elements of every [`N`] in a head of `dim` share a scale.
    #[inline(always)]
    pub fn is_uniform(&self, dim: usize) -> bool {
        self.groups.group.is_multiple_of(N) || self.groups.group >= dim
    }

    /// Writes elements `first .. first + n` of a head of `dim`, whose first unit lies at `units`; `first` is a multiple of [`N`].
    ///
    /// # Safety
    /// The head has these units, scales and zero points, and `n` floats are writable at `to`.
    #[inline(always)]
    pub unsafe fn widen(
        &mut self,
        s: S,
        row: &AffineRow,
        units: *const u8,
        (first, n, dim): (usize, usize, usize),
        to: *mut f32,
    ) {
        let (group, end) = (self.groups.group, first + n);
        let mut at = first;
        while at < end {
            // SAFETY: the caller's.
            unsafe {
                let (from, to) = (units.add(at * BITS as usize / 8), to.add(at - first));
                let len = if self.is_uniform(dim) {
                    let index = if group >= dim { 0 } else { at / group };
                    let len = ((index + 1) * group).min(end) - at;
                    let shared = self.shared(s, parameters(&self.groups, row, index));
                    let whole = len / N * N;
                    self.run_shared(s, from, whole, &shared, to);
                    if whole < len {
                        self.run(s, from.add(whole * BITS as usize / 8), len - whole, Some(&shared), to.add(whole));
                    }
                    len
                } else {
                    let len = (end - at).min(N);
                    self.expand(row, at, len);
                    self.run(s, from, len, None, to);
                    len
                };
                at += len;
            }
        }
    }

    /// What makes elements of integers that share a scale and a zero point.
    #[inline(always)]
    fn shared(&self, s: S, (scale, zero): (f32, f32)) -> Shared<S> {
        let (a, m) = self.offsets(zero);
        let mut shared = Shared { scale: s.splat(scale), a: s.splat(a), m: s.splat(m), table: s.zero() };
        if const { holds_nibbles::<S>(BITS) } {
            // SAFETY: the numbers are a vector.
            shared.table = self.elements(s, unsafe { s.load_f32(NUMBERS.as_ptr()) }, &shared);
        }
        shared
    }

    /// Elements of numbers as they lie in memory.
    #[inline(always)]
    fn elements(&self, s: S, q: S::V, shared: &Shared<S>) -> S::V {
        shared.elements(s, s.select_lt(q, self.below, q, s.sub(q, self.wrap)))
    }

    /// As [`Self::run`], of `n` elements, a multiple of [`N`], that share factors.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn run_shared(&self, s: S, from: *const u8, n: usize, shared: &Shared<S>, to: *mut f32) {
        let integers = self.groups.of.integers;
        // SAFETY: the caller's, here and below.
        unsafe {
            if BITS == 4 {
                for at in (0..n).step_by(N) {
                    if const { holds_nibbles::<S>(BITS) } {
                        self.look_up(s, from.add(at / 2), shared, to.add(at));
                    } else {
                        self.nibbles(s, from.add(at / 2), shared, to.add(at));
                    }
                }
            } else if integers == Integers::Signed {
                for at in (0..n).step_by(S::LANES) {
                    s.store_f32(to.add(at), shared.elements(s, s.load_i8(from.add(at).cast())));
                }
            } else {
                // Numbers are the integers, or all of them are greater by the same.
                let offset = if integers == Integers::Offset { self.wrap } else { s.zero() };
                for at in (0..n).step_by(S::LANES) {
                    s.store_f32(to.add(at), shared.elements(s, s.sub(s.load_u8(from.add(at)), offset)));
                }
            }
        }
    }

    /// Elements of [`N`] numbers of four bits that share factors.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn nibbles(&self, s: S, source: *const u8, shared: &Shared<S>, to: *mut f32) {
        let Affine { integers, nibbles, .. } = self.groups.of;
        for i in (0..N).step_by(2 * S::LANES) {
            // SAFETY: the caller's.
            unsafe {
                let q = s.load_nibble_pairs(source.add(i / 2), nibbles == Nibbles::HighFirst);
                for (n, &q) in q.iter().enumerate() {
                    let x = match integers {
                        Integers::Unsigned => shared.elements(s, q),
                        Integers::Offset => shared.elements(s, s.sub(q, self.wrap)),
                        Integers::Signed => self.elements(s, q, shared),
                    };
                    s.store_f32(to.add(i + n * S::LANES), x);
                }
            }
        }
    }

    /// The same by their table.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    unsafe fn look_up(&self, s: S, source: *const u8, shared: &Shared<S>, to: *mut f32) {
        let swapped = self.groups.of.nibbles == Nibbles::HighFirst;
        // SAFETY: the caller's.
        unsafe {
            for i in (0..N / 2).step_by(S::LANES) {
                let low = s.look_up_nibbles(source, i, shared.table);
                let high = s.look_up_nibbles(source, i + N / 2, shared.table);
                let [x, y] = if swapped { s.interleave(high, low) } else { s.interleave(low, high) };
                s.store_f32(to.add(2 * i), x);
                s.store_f32(to.add(2 * i + S::LANES), y);
            }
        }
    }

    /// What is subtracted from integers, and added to products.
    #[inline(always)]
    fn offsets(&self, zero: f32) -> (f32, f32) {
        match self.groups.of.zeros {
            _ if self.groups.zero_type.is_none() => (0.0, -0.0),
            Zeros::Point => (zero, -0.0),
            Zeros::Minimum => (0.0, zero),
            Zeros::Shift => (0.0, -zero),
        }
    }

    /// # Safety
    /// As [`Self::widen`].
    #[inline(always)]
    unsafe fn expand(&mut self, row: &AffineRow, first: usize, n: usize) {
        let of = (row.scales.cast_const(), row.zeros.cast_const(), first);
        if of == self.of {
            return;
        }
        self.of = of;
        let (mut seen, mut numbers) = (usize::MAX, (0.0, 0.0, 0.0));
        for i in 0..n {
            let group = (first + i) / self.groups.group;
            if group != seen {
                // SAFETY: the caller's.
                let (scale, zero) = unsafe { parameters(&self.groups, row, group) };
                let (a, m) = self.offsets(zero);
                (seen, numbers) = (group, (scale, a, m));
            }
            (self.factors.s[i], self.factors.a[i], self.factors.m[i]) = numbers;
        }
    }

    /// Makes elements by shared factors, or by those of each.
    ///
    /// # Safety
    /// `n <= N` elements are readable at `from` and writable at `to`.
    #[inline(always)]
    unsafe fn run(&self, s: S, from: *const u8, n: usize, shared: Option<&Shared<S>>, to: *mut f32) {
        let (mut bytes, mut elements) = ([0u8; N], [0.0; N]);
        let (mut source, mut target) = (from, to);
        // SAFETY: the caller's; arrays hold N.
        unsafe {
            if n < N {
                std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), n * BITS as usize / 8);
                (source, target) = (bytes.as_ptr(), elements.as_mut_ptr());
            }
            if let Some(shared) = shared {
                self.run_shared(s, source, N, shared, target);
            } else if BITS == 8 {
                for i in (0..N).step_by(S::LANES) {
                    self.put(s, i, s.load_u8(source.add(i)), target);
                }
            } else {
                let swapped = self.groups.of.nibbles == Nibbles::HighFirst;
                for i in (0..N).step_by(2 * S::LANES) {
                    let [x, y] = s.load_nibble_pairs(source.add(i / 2), swapped);
                    self.put(s, i, x, target);
                    self.put(s, i + S::LANES, y, target);
                }
            }
            if n < N {
                std::ptr::copy_nonoverlapping(elements.as_ptr(), to, n);
            }
        }
    }

    /// The elements of a vector from number `i` on, by the factors of each.
    ///
    /// # Safety
    /// A vector from element `i` on is writable at `to`.
    #[inline(always)]
    unsafe fn put(&self, s: S, i: usize, q: S::V, to: *mut f32) {
        let Factors { s: scale, a, m } = &self.factors;
        // SAFETY: the caller's; the factors have N elements.
        unsafe {
            let (scale, a) = (s.load_f32(scale.as_ptr().add(i)), s.load_f32(a.as_ptr().add(i)));
            let each = Shared { scale, a, m: s.load_f32(m.as_ptr().add(i)), table: s.zero() };
            s.store_f32(to.add(i), self.elements(s, q, &each));
        }
    }
}

/// The description of the units of a call.
#[inline(always)]
fn described<'a>(args: &ScaledArgs<'a>) -> &'a AffineArgs {
    match args.affine {
        Some(affine) => affine,
        None => unreachable!("the check of a cache finds what describes it"),
    }
}

/// Reads `heads` vectors of integers.
///
/// # Safety
/// Every address that `args` describes is valid; the target does not overlap units, scales and zero points.
#[inline(always)]
pub(crate) unsafe fn dequantize<S: Simd, B: LoadStore, const BITS: u32>(s: S, args: &ScaledArgs) {
    let (c, affine) = (&args.copy, described(args));
    let mut widener = Widener::<S, BITS>::new(s, affine.groups);
    for head in 0..c.heads {
        let row = affine.row(args.first + head);
        let src = c.src.wrapping_offset(head as isize * c.src_head);
        let dst = c.dst.cast::<B>().wrapping_offset(head as isize * c.dst_head);
        for first in (0..c.dim).step_by(N) {
            let n = (c.dim - first).min(N);
            let (mut x, mut stage) = ([0.0; N], [B::default(); N]);
            let to = dst.wrapping_offset(first as isize * c.dst_dim);
            // SAFETY: the caller's; arrays hold N.
            unsafe {
                widener.widen(s, &row, src, (first, n, c.dim), x.as_mut_ptr());
                let together = c.dst_dim == 1 && n == N;
                let target = if together { to } else { stage.as_mut_ptr() };
                for i in (0..N).step_by(S::LANES) {
                    B::store(s, target.add(i), s.load_f32(x.as_ptr().add(i)));
                }
                if !together {
                    scatter(stage.as_ptr(), to, c.dst_dim, n);
                }
            }
        }
    }
}

/// The nearest integer, ties to even, of a number below 2^22.
#[inline(always)]
fn rounded(x: f32) -> f32 {
    const SHIFT: f32 = (3 << 22) as f32;
    (x + SHIFT) - SHIFT
}

/// What makes integers of elements, one for each of [`N`] elements.
struct Quotients {
    /// Subtracted before, and added after division, and added after rounding.
    less: [f32; N],
    zero: [f32; N],
    moved: [f32; N],
    /// The scale, or infinity for 0; or its reciprocal, or 0.
    factor: [f32; N],
    /// 1 where the scale is NaN, else 0.
    void: [f32; N],
}

impl Quotients {
    #[inline(always)]
    fn set(&mut self, groups: &AffineGroups, (scale, zero): (f32, f32), lanes: std::ops::Range<usize>) {
        let finite = |x: f32| if x.is_finite() { x } else { 0.0 };
        let inverse = finite(1.0 / scale);
        let divisor = if inverse == 0.0 { f32::INFINITY } else { scale };
        let (less, zero, moved, factor) = match (groups.zero_type, groups.of.zeros) {
            (None, _) => (0.0, 0.0, 0.0, inverse),
            (Some(ZeroType::Float(_)), Zeros::Point) => (0.0, finite(zero), 0.0, inverse),
            (Some(_), Zeros::Point) => (0.0, 0.0, zero, inverse),
            (Some(_), Zeros::Minimum) => (finite(zero), 0.0, 0.0, divisor),
            (Some(_), Zeros::Shift) => (-finite(zero), 0.0, 0.0, divisor),
        };
        self.less[lanes.clone()].fill(less);
        self.zero[lanes.clone()].fill(zero);
        self.moved[lanes.clone()].fill(moved);
        self.factor[lanes.clone()].fill(factor);
        self.void[lanes].fill(f32::from(scale.is_nan()));
    }

    /// The numbers that lie in memory for the elements of a vector, from number `i` on.
    #[inline(always)]
    fn numbers<S: Simd>(&self, s: S, range: Range, divides: bool, x: S::V, i: usize) -> S::V {
        // SAFETY: the arrays hold N, and a vector from i on.
        let [less, zero, moved, factor, void] = unsafe {
            [
                s.load_f32(self.less.as_ptr().add(i)),
                s.load_f32(self.zero.as_ptr().add(i)),
                s.load_f32(self.moved.as_ptr().add(i)),
                s.load_f32(self.factor.as_ptr().add(i)),
                s.load_f32(self.void.as_ptr().add(i)),
            ]
        };
        let x = s.sub(x, less);
        let quotient = s.add(if divides { s.div(x, factor) } else { s.mul(x, factor) }, zero);
        let low = s.sub(s.splat(range.low), moved);
        let high = s.sub(s.splat(range.low + range.levels), moved);
        // NaN becomes the largest.
        let quotient = s.max(low, s.select_lt(quotient, high, quotient, high));
        let q = s.add(s.round(quotient), moved);
        // Numbers in memory are those of integers, or these and `wrap`.
        let wraps = s.splat(if range.below == 0.0 { f32::INFINITY } else { 0.0 });
        let q = s.select_lt(q, wraps, s.add(q, s.splat(range.wrap)), q);
        s.select_lt(s.zero(), void, s.zero(), q)
    }

    /// Writes the units of these elements.
    ///
    /// # Safety
    /// Units of [`N`] elements are writable at `to`.
    #[inline(always)]
    unsafe fn put<S: Simd, const BITS: u32>(
        &self,
        s: S,
        range: Range,
        (divides, nibbles): (bool, Nibbles),
        x: &Vectors<S>,
        to: *mut u8,
    ) {
        for i in (0..N / S::LANES).step_by(2) {
            let first = self.numbers(s, range, divides, x[i], i * S::LANES);
            let second = self.numbers(s, range, divides, x[i + 1], (i + 1) * S::LANES);
            // SAFETY: the caller's.
            unsafe {
                if BITS == 8 {
                    s.store_low_bytes(to.add(i * S::LANES), quantize::bytes(s, first));
                    s.store_low_bytes(to.add((i + 1) * S::LANES), quantize::bytes(s, second));
                } else {
                    let [even, odd] = s.deinterleave(first, second);
                    let (low, high) = if nibbles == Nibbles::HighFirst { (odd, even) } else { (even, odd) };
                    s.store_low_bytes(to.add(i / 2 * S::LANES), quantize::nibbles(s, low, high));
                }
            }
        }
    }
}

/// The least and the largest element, and the largest magnitude, in each lane of [`N`]; a magnitude is NaN if an element is not finite.
struct Extremes<S: Simd> {
    least: Vectors<S>,
    most: Vectors<S>,
    peak: Vectors<S>,
    /// 0, or NaN where an element is not finite.
    nonfinite: Vectors<S>,
}

impl<S: Simd> Extremes<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        Self {
            least: [s.splat(f32::MAX); MAX_VECTORS],
            most: [s.splat(-f32::MAX); MAX_VECTORS],
            peak: [s.zero(); MAX_VECTORS],
            nonfinite: [s.zero(); MAX_VECTORS],
        }
    }

    #[inline(always)]
    fn fold(&mut self, s: S, x: &Vectors<S>) {
        for i in 0..N / S::LANES {
            let x = x[i];
            self.least[i] = s.select_lt(x, self.least[i], x, self.least[i]);
            self.most[i] = s.select_lt(self.most[i], x, x, self.most[i]);
            (self.peak[i], self.nonfinite[i]) = widest(s, x, (self.peak[i], self.nonfinite[i]));
        }
    }

    /// Those of all lanes in a range, of whole vectors or within [`N`] elements.
    #[inline(always)]
    fn of(&self, s: S, lanes: std::ops::Range<usize>) -> (f32, f32, Option<f32>) {
        if lanes.start.is_multiple_of(S::LANES) && lanes.end.is_multiple_of(S::LANES) {
            let (mut least, mut most) = (s.splat(f32::MAX), s.splat(-f32::MAX));
            let (mut peak, mut nonfinite) = (s.zero(), s.zero());
            // All vectors have constant numbers, so that they stay in registers.
            for i in 0..N / S::LANES {
                if lanes.contains(&(i * S::LANES)) {
                    least = s.select_lt(self.least[i], least, self.least[i], least);
                    most = s.max(most, self.most[i]);
                    peak = s.max(peak, self.peak[i]);
                    nonfinite = s.add(nonfinite, self.nonfinite[i]);
                }
            }
            let least = min_lane(s, least);
            return (least, s.max_lane(most), if s.all_finite(nonfinite) { Some(s.max_lane(peak)) } else { None });
        }
        let mut lists = [[0.0; N]; 4];
        for (list, vectors) in lists.iter_mut().zip([&self.least, &self.most, &self.peak, &self.nonfinite]) {
            for i in 0..N / S::LANES {
                // SAFETY: a list holds N.
                unsafe { s.store_f32(list.as_mut_ptr().add(i * S::LANES), vectors[i]) };
            }
        }
        let (mut least, mut most, mut peak, mut nonfinite) = (f32::MAX, -f32::MAX, 0.0, 0.0);
        for i in lanes {
            least = lists[0][i].min(least);
            most = lists[1][i].max(most);
            peak = lists[2][i].max(peak);
            nonfinite += lists[3][i];
        }
        (least, most, (nonfinite == 0.0).then_some(peak))
    }
}

/// Least and most of a group, and its scale and zero point.
///
/// # Safety
/// The row has the group, and it is writable.
#[inline(always)]
unsafe fn computed(
    groups: &AffineGroups,
    range: Range,
    row: &AffineRow,
    (group, tokens): (usize, usize),
    (least, most, peak): (f32, f32, Option<f32>),
) -> (f32, f32) {
    let (least, most) = match groups.zero_type {
        Some(ZeroType::U8 | ZeroType::I8) => (least.min(0.0), most.max(0.0)),
        _ => (least, most),
    };
    // No negative zero, whichever zeros are found to be least and most.
    let range_of = most - least + 0.0;
    let scale = match (groups.zero_type, peak) {
        (_, None) => f32::NAN,
        (None, Some(peak)) => peak / (range.low + range.levels),
        (Some(ZeroType::Float(_)), _) if groups.of.zeros == Zeros::Point && tokens > 1 => {
            range_of * (1.0 / range.levels)
        }
        (Some(_), _) => range_of / range.levels,
    };
    let floats = matches!(groups.zero_type, Some(ZeroType::Float(_)));
    let zero = |scale: f32| match groups.of.zeros {
        _ if scale.is_nan() => f32::NAN,
        Zeros::Point if floats => range.low - least / scale,
        Zeros::Point if scale == 0.0 => range.low,
        Zeros::Point => rounded((range.low - least / scale).clamp(range.low, range.low + range.levels)),
        Zeros::Minimum | Zeros::Shift => {
            // No negative zero, which a positive one among the elements would hide or not.
            let minimum = if range.low == 0.0 { least + 0.0 } else { least + 0.0 - range.low * scale };
            if groups.of.zeros == Zeros::Shift { -minimum } else { minimum }
        }
    };
    // SAFETY: the caller's.
    unsafe { put_parameters(groups, row, group, scale, zero) }
}

/// Groups of whole blocks of one token, in order of heads and of elements, which are quantised several at a time. The scales of the next
/// ones are computed before the numbers of the last ones are written, which hides how long they take.
struct Together<'a, const BITS: u32> {
    args: &'a ScaledArgs<'a>,
    affine: &'a AffineArgs,
    range: Range,
    group: usize,
    /// Groups of a head, and of all heads.
    of_head: usize,
    all: usize,
}

/// Numbers of several groups, rounded to the type in which they are stored.
struct Stored {
    floats: [f32; MAX_LANES],
    /// The patterns of a type of two bytes.
    halves: [u16; MAX_LANES],
}

impl Stored {
    #[inline(always)]
    fn new() -> Self {
        Self { floats: [0.0; MAX_LANES], halves: [0; MAX_LANES] }
    }

    /// Sets the numbers, and returns them rounded to their type.
    #[inline(always)]
    fn set<S: Simd>(&mut self, s: S, x: S::V, dtype: DType) -> S::V {
        let halves = self.halves.as_mut_ptr();
        // SAFETY: the arrays hold whole vectors.
        unsafe {
            let rounded = match dtype {
                DType::F32 => x,
                DType::F16 => {
                    s.store_f16(halves.cast(), x);
                    s.load_f16(halves.cast())
                }
                DType::Bf16 => {
                    s.store_bf16(halves.cast(), x);
                    s.load_bf16(halves.cast())
                }
            };
            s.store_f32(self.floats.as_mut_ptr(), rounded);
            rounded
        }
    }

    /// Stores number i.
    ///
    /// # Safety
    /// The address is valid.
    #[inline(always)]
    unsafe fn put(&self, i: usize, at: *mut u8, dtype: DType) {
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                DType::F32 => *at.cast::<f32>() = self.floats[i],
                DType::F16 | DType::Bf16 => *at.cast::<u16>() = self.halves[i],
            }
        }
    }
}

/// What the groups of a batch are quantised by: [`computed`] of several side by side.
struct Batch {
    scale: Stored,
    zero: Stored,
    reciprocals: Reciprocals,
    /// The bits of groups that are left to be quantised one by one.
    left: u64,
}

impl Batch {
    #[inline(always)]
    fn new() -> Self {
        Self { scale: Stored::new(), zero: Stored::new(), reciprocals: Reciprocals::new(), left: 0 }
    }

    /// Computes it for groups with these extremes, all of which are finite.
    #[inline(always)]
    fn compute<S: Simd>(&mut self, s: S, groups: &AffineGroups, range: Range, (least, most): (S::V, S::V)) {
        let (low, levels, zero) = (s.splat(range.low), s.splat(range.levels), s.zero());
        let widest = s.max(s.abs(least), s.abs(most));
        let scale = match groups.zero_type {
            None => s.div(widest, s.add(low, levels)),
            Some(ZeroType::Float(_)) => s.div(s.add(s.sub(most, least), zero), levels),
            Some(_) => s.div(s.add(s.sub(s.max(most, zero), s.min(least, zero)), zero), levels),
        };
        let scale = self.scale.set(s, scale, groups.scale_dtype);
        let point = match (groups.zero_type, groups.of.zeros) {
            (None, _) => zero,
            (Some(ZeroType::Float(_)), Zeros::Point) => s.sub(low, s.div(least, scale)),
            (Some(kind), Zeros::Point) => {
                let nearest = s.sub(low, s.div(s.min(least, zero), scale));
                let nearest = s.round(s.min(s.max(nearest, low), s.add(low, levels)));
                let (least, most) = if kind == ZeroType::U8 { (0.0, 255.0) } else { (-128.0, 127.0) };
                s.min(s.max(nearest, s.splat(least)), s.splat(most))
            }
            (Some(_), zeros) => {
                let minimum = s.add(least, zero);
                let minimum = if range.low == 0.0 { minimum } else { s.sub(minimum, s.mul(low, scale)) };
                if zeros == Zeros::Shift { s.mul(minimum, s.splat(-1.0)) } else { minimum }
            }
        };
        let dtype = if let Some(ZeroType::Float(dtype)) = groups.zero_type { dtype } else { DType::F32 };
        let point = self.zero.set(s, point, dtype);
        let inverse = self.reciprocals.set(s, scale);
        // Quotients are far from the largest that are converted to integers, and zero points from the largest of their type.
        let point = s.abs(point);
        let near = s.lt_bits(s.mul(s.add(widest, point), inverse), s.splat((1 << 21) as f32))
            & s.lt_bits(point, s.splat((1 << 15) as f32));
        self.left = !(near & Reciprocals::holds(s, scale, Reciprocals::LEAST));
    }
}

impl<'a, const BITS: u32> Together<'a, BITS> {
    /// `None` where groups are others, or their scales are those of several tokens, or are there.
    #[inline(always)]
    fn new(args: &'a ScaledArgs<'a>) -> Option<Self> {
        let (c, affine) = (&args.copy, described(args));
        let groups = &affine.groups;
        let group = groups.group.min(c.dim).max(1);
        let of_head = if group == c.dim { 1 } else { c.dim / group };
        let serves = !groups.fixed
            && affine.tokens == 1
            && c.src_dim == 1
            && group.is_multiple_of(N)
            && of_head * group == c.dim
            && c.heads > 0;
        let range = Range::new::<BITS>(groups.of.integers);
        serves.then_some(Self { args, affine, range, group, of_head, all: of_head * c.heads })
    }

    /// Quantises all groups.
    ///
    /// # Safety
    /// As [`quantize`].
    #[inline(always)]
    unsafe fn quantize<S: Simd, A: LoadStore>(&self, s: S) {
        let mut batches = [Batch::new(), Batch::new()];
        let (mut now, mut next) = (0, 0);
        let mut first = 0;
        // SAFETY: the caller's, here and below. The first turn writes nothing.
        unsafe {
            while first < self.all {
                if next < self.all {
                    self.compute::<_, A>(s, &mut batches[1 - now], next);
                }
                if next > 0 {
                    self.write::<_, A>(s, &batches[now], first);
                    first = next;
                }
                (now, next) = (1 - now, next + together::<S>());
            }
        }
    }

    /// The head of a group, and its number there.
    #[inline(always)]
    fn place(&self, index: usize) -> (usize, usize) {
        if self.of_head == 1 { (index, 0) } else { (index / self.of_head, index % self.of_head) }
    }

    /// Computes the scales of the groups from number `first` on.
    ///
    /// # Safety
    /// As [`quantize`].
    #[inline(always)]
    unsafe fn compute<S: Simd, A: LoadStore>(&self, s: S, batch: &mut Batch, first: usize) {
        let c = &self.args.copy;
        let mut from = [c.src.cast::<A>(); MAX_LANES];
        for (i, from) in from[..together::<S>()].iter_mut().enumerate() {
            // Where there are fewer, the last one again.
            let (head, number) = self.place((first + i).min(self.all - 1));
            *from = from.wrapping_offset(head as isize * c.src_head).wrapping_add(number * self.group);
        }
        // SAFETY: the caller's.
        let (least, most, sum) = unsafe { extremes(s, &from, self.group) };
        if s.all_finite(sum) {
            let extremes = (s.fold_lanes::<Min>(&least), s.fold_lanes::<Max>(&most));
            batch.compute(s, &self.affine.groups, self.range, extremes);
        } else {
            batch.left = u64::MAX;
        }
    }

    /// Writes the scales and the numbers of these groups.
    ///
    /// # Safety
    /// As [`quantize`].
    #[inline(always)]
    unsafe fn write<S: Simd, A: LoadStore>(&self, s: S, batch: &Batch, first: usize) {
        let (c, groups) = (&self.args.copy, &self.affine.groups);
        let half = 1 << (BITS - 1);
        let flip = if groups.of.integers == Integers::Signed { half } else { 0 };
        let swapped = groups.of.nibbles == Nibbles::HighFirst;
        for i in 0..together::<S>().min(self.all - first) {
            let (head, number) = self.place(first + i);
            if batch.left >> i & 1 == 1 {
                let (heads, first) = (head..head + 1, number * self.group);
                let elements = first..first + self.group;
                // SAFETY: the caller's.
                unsafe { s.outline(Each::<BITS> { args: self.args, dtype: A::DTYPE, heads, elements }) };
                continue;
            }
            let (at, row) = (number * self.group, self.affine.row(self.args.first + head));
            let src = c.src.cast::<A>().wrapping_offset(head as isize * c.src_head).wrapping_add(at);
            let dst = c.dst.wrapping_offset(head as isize * c.dst_head).wrapping_add(at * BITS as usize / 8);
            let (by, zero) = (batch.reciprocals.of(s, i), s.splat(batch.zero.floats[i]));
            let bytes = self.group * BITS as usize / 8;
            prefetch_next(s, c, (src.cast(), self.group * size_of::<A>()), (dst, bytes));
            let bias = -self.range.low as i16;
            let to = (dst, flip, swapped);
            let number = number as isize;
            let zero_at = row.zeros.wrapping_offset(number * groups.zero_step);
            // SAFETY: the caller's.
            unsafe {
                batch.scale.put(i, row.scales.wrapping_offset(number * groups.scale_step), groups.scale_dtype);
                match groups.zero_type {
                    None => {}
                    Some(ZeroType::Float(dtype)) => batch.zero.put(i, zero_at, dtype),
                    Some(ZeroType::U8) => *zero_at = batch.zero.floats[i] as u8,
                    Some(ZeroType::I8) => *zero_at.cast::<i8>() = batch.zero.floats[i] as i8,
                }
                match (groups.zero_type, groups.of.zeros) {
                    (None, _) => numbers::<_, A, BITS, SCALED>(s, src, self.group, (by, zero), bias, to),
                    (Some(ZeroType::Float(_)), Zeros::Point) => {
                        numbers::<_, A, BITS, MOVED>(s, src, self.group, (by, zero), bias, to);
                    }
                    (Some(_), Zeros::Point) => {
                        let bias = bias + batch.zero.floats[i] as i16;
                        numbers::<_, A, BITS, SCALED>(s, src, self.group, (by, zero), bias, to);
                    }
                    (Some(_), zeros) => {
                        let less = if zeros == Zeros::Shift { s.splat(-batch.zero.floats[i]) } else { zero };
                        numbers::<_, A, BITS, DIVIDED>(s, src, self.group, (by, less), bias, to);
                    }
                }
            }
        }
    }
}

/// Quotients: products with the reciprocal; these and a zero point; or those of elements less a zero point.
const SCALED: u8 = 0;
const MOVED: u8 = 1;
const DIVIDED: u8 = 2;

/// Writes `n` numbers, a multiple of [`N`], of elements that share a reciprocal and a zero point.
///
/// # Safety
/// The elements are readable, and the numbers writable.
#[inline(always)]
unsafe fn numbers<S: Simd, A: LoadStore, const BITS: u32, const KIND: u8>(
    s: S,
    src: *const A,
    n: usize,
    (by, zero): (Reciprocal<S>, S::V),
    bias: i16,
    (dst, flip, swapped): (*mut u8, u8, bool),
) {
    for at in (0..n).step_by(N) {
        let mut x = [s.zero(); MAX_VECTORS];
        // SAFETY: the caller's.
        unsafe {
            for (i, x) in x[..N / S::LANES].iter_mut().enumerate() {
                let element = A::load(s, src.add(at + i * S::LANES));
                *x = match KIND {
                    SCALED => by.product(s, element),
                    MOVED => s.add(by.product(s, element), zero),
                    _ => by.quotient(s, s.sub(element, zero)),
                };
            }
            s.store_integers::<BITS>(dst.add(at * BITS as usize / 8), &x, bias, flip, swapped);
        }
    }
}

/// The least and the most elements of [`together`] groups in the lanes of a vector each, and lanes that are not all finite if an element is
/// not.
///
/// # Safety
/// `n` elements are readable at each address, whole vectors.
#[inline(always)]
unsafe fn extremes<S: Simd, A: LoadStore>(
    s: S,
    from: &[*const A; MAX_LANES],
    n: usize,
) -> ([S::V; MAX_LANES], [S::V; MAX_LANES], S::V) {
    let mut least = [s.zero(); MAX_LANES];
    for i in 0..together::<S>() {
        // SAFETY: the caller's, here and below.
        least[i] = unsafe { A::load(s, from[i]) };
    }
    let (mut most, mut sum) = (least, [s.zero(); 4]);
    for at in (0..n).step_by(S::LANES) {
        for i in 0..together::<S>() {
            // SAFETY: as above.
            let x = unsafe { A::load(s, from[i].add(at)) };
            (least[i], most[i]) = (s.min(least[i], x), s.max(most[i], x));
            sum[i % 4] = s.add(sum[i % 4], x);
        }
    }
    (least, most, s.add(s.add(sum[0], sum[1]), s.add(sum[2], sum[3])))
}

/// Quantises `heads` vectors, of as many tokens as share scales.
///
/// # Safety
/// Every address that `args` describes is valid; source, units, scales and zero points do not overlap.
#[inline(always)]
pub(crate) unsafe fn quantize<S: Simd, A: LoadStore, const BITS: u32>(s: S, args: &ScaledArgs) {
    let together = if const { S::WRITES_SEVERAL } { Together::<BITS>::new(args) } else { None };
    // SAFETY: the caller's.
    unsafe {
        match together {
            Some(groups) => groups.quantize::<_, A>(s),
            None => {
                s.outline(Each::<BITS> { args, dtype: A::DTYPE, heads: 0..args.copy.heads, elements: 0..args.copy.dim })
            }
        }
    }
}

/// Groups that are quantised one after another, or several of a block: these elements of these heads, whole groups. One function for all
/// types of elements.
struct Each<'a, const BITS: u32> {
    args: &'a ScaledArgs<'a>,
    dtype: DType,
    heads: std::ops::Range<usize>,
    elements: std::ops::Range<usize>,
}

impl<const BITS: u32> Outlined for Each<'_, BITS> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { args, dtype, heads, elements } = self;
        let (c, affine) = (&args.copy, described(args));
        let groups = &affine.groups;
        let group = groups.group.min(c.dim).max(1);
        // Groups that are quantised together, and the elements of them.
        let width = (N / group).max(1) * group;
        let range = Range::new::<BITS>(groups.of.integers);
        let size = dtype.size() as isize;
        let divides = groups.zero_type.is_some() && groups.of.zeros != Zeros::Point;
        let mut quotients =
            Quotients { less: [0.0; N], zero: [0.0; N], moved: [0.0; N], factor: [0.0; N], void: [0.0; N] };
        for head in heads {
            let row = affine.row(args.first + head);
            let src = c.src.wrapping_offset(head as isize * c.src_head * size);
            let dst = c.dst.wrapping_offset(head as isize * c.dst_head);
            for first in elements.clone().step_by(width) {
                let n = (elements.end - first).min(width);
                let at = |token: usize, i: usize| {
                    let elements = token as isize * affine.src_token + (first + i) as isize * c.src_dim;
                    src.wrapping_offset(elements * size)
                };
                let mut extremes = Extremes::new(s);
                if !groups.fixed {
                    for token in 0..affine.tokens {
                        for i in (0..n).step_by(N) {
                            let len = (n - i).min(N);
                            // SAFETY: the caller's.
                            extremes.fold(s, &unsafe { quantize::load(s, dtype, at(token, i), c.src_dim, len) });
                        }
                    }
                }
                for lanes in (0..n.min(N)).step_by(group) {
                    let (index, lanes) = ((first + lanes) / group, lanes..(lanes + group).min(N));
                    // SAFETY: the caller's.
                    let both = unsafe {
                        if groups.fixed {
                            parameters(groups, &row, index)
                        } else {
                            let extremes = extremes.of(s, lanes.clone());
                            computed(groups, range, &row, (index, affine.tokens), extremes)
                        }
                    };
                    quotients.set(groups, both, if n > N || group >= N { 0..N } else { lanes });
                }
                for token in 0..affine.tokens {
                    for i in (0..n).step_by(N) {
                        let len = (n - i).min(N);
                        // SAFETY: the caller's; what is written are the units of these elements.
                        unsafe {
                            let x = quantize::load(s, dtype, at(token, i), c.src_dim, len);
                            let bytes = token as isize * affine.dst_token + ((first + i) * BITS as usize / 8) as isize;
                            let to = dst.wrapping_offset(bytes);
                            let mut units = [0u8; N];
                            let target = if len == N { to } else { units.as_mut_ptr() };
                            quotients.put::<S, BITS>(s, range, (divides, groups.of.nibbles), &x, target);
                            if len < N {
                                std::ptr::copy_nonoverlapping(target, to, len * BITS as usize / 8);
                            }
                        }
                    }
                }
            }
        }
    }
}
