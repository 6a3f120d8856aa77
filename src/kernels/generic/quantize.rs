//! Conversion to int8 units with one scale per token and head, and back.
//!
//! A scale is the largest magnitude of its head divided by 127, rounded to f32, and for f16 scales to f16, where it is
//! at most 65504. Both roundings are to nearest, except that a scale that is subnormal in its type is rounded up: to
//! nearest it could be too small by a third, and the largest elements would be clipped. A unit is its element divided
//! by the stored scale, rounded to f32, then to the nearest integer, ties to even, between -127 and 127. Unless the
//! scale is 65504, no element is farther from its unit times the scale than half a scale and a sixteenth. A head of
//! zeros has the scale 0. A head with a NaN or an infinity has the scale NaN and units 0, so that all of it reads as
//! NaN.
//!
//! The largest magnitude does not depend on the order, and divisions and roundings are those of IEEE 754, so that
//! every level computes the same bits. A head is read twice, the second time from the first-level cache.
//!
//! One head after another: units are products by the reciprocal of the scale, which are rounded to the same integers as quotients where
//! none is close to a half; one head in a hundred has such an element, and is divided. What bounds it: the steps of one head depend on each
//! other, and two heads at most are in flight.
//!
//! Several heads ([`Simd::WRITES_SEVERAL`]): those of half of the lanes are reduced to one vector of magnitudes by a tree and divided
//! side by side, before the units of the heads before them are written, so that nothing waits for the 60 cycles of maxima and divisions.
//! Quotients are exact enough without a division ([`Reciprocals`]). What bounds it, in AVX2: of 8 elements, two operations for
//! magnitudes, two multiply-adds, one conversion and 1.25 to pack them, at four per cycle 25 cycles of a head of 128. Loops with
//! multiply-adds and packs reach 2.5 per cycle: 8 cycles for magnitudes and 27 for units, and with what is computed once per head 60.
//! AVX-512 takes as many operations for 16 elements, on two ports, and is bound by memory.

use super::copy::{Converted, STAGE, convert, gather, prefetch_next};
use crate::dtype::DType;
use crate::kernels::api::ScaledArgs;
use crate::kernels::simd::{BLOCK, Load, LoadStore, MAX_LANES, MaxBits, Outlined, Simd};
pub(super) use crate::kernels::simd::{BlockVectors as Vectors, MAX_VECTORS};
use half::{bf16, f16};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The largest magnitude of a unit.
const MAX_UNIT: f32 = 127.0;

/// Quantises `heads` vectors with one scale each.
///
/// # Safety
/// Every address that `args` describes is valid; source, units and scales do not overlap.
#[inline(always)]
pub(crate) unsafe fn quantize<S: Simd, A: LoadStore>(s: S, args: &ScaledArgs) {
    let heads = args.copy.heads;
    if const { S::WRITES_SEVERAL } && (args.copy.src_dim, args.copy.dst_dim) == (1, 1) {
        // The scales of the next heads are computed before the units of the last ones, which hides how long they take.
        let step = together::<S>();
        let mut scales = [Scales::new(), Scales::new()];
        let (mut now, mut end) = (0, 0);
        // The first turn writes nothing.
        loop {
            let next = 1 - now;
            // SAFETY: the caller's.
            unsafe {
                scales[next].compute::<_, A>(s, args, end..(end + step).min(heads));
                if scales[now].holds {
                    scales[now].quantize::<_, A>(s, args);
                } else {
                    s.outline(Each::<A> { args, heads: scales[now].heads.clone(), elements: PhantomData });
                }
            }
            if scales[next].heads.is_empty() {
                break;
            }
            (now, end) = (next, scales[next].heads.end);
        }
        return;
    }
    let all = Each::<A> { args, heads: 0..heads, elements: PhantomData };
    // SAFETY: the caller's.
    unsafe { if const { S::WRITES_SEVERAL } { s.outline(all) } else { all.run(s) } };
}

/// Heads that are quantised one after another.
struct Each<'a, A> {
    args: &'a ScaledArgs<'a>,
    heads: Range<usize>,
    elements: PhantomData<A>,
}

impl<A: LoadStore> Outlined for Each<'_, A> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { args, heads, .. } = self;
        let c = &args.copy;
        for head in heads {
            let head = head as isize;
            let src = c.src.cast::<A>().wrapping_offset(head * c.src_head);
            let dst = c.dst.cast::<i8>().wrapping_offset(head * c.dst_head);
            // SAFETY: the caller's, here and below.
            let peak = unsafe { peak(s, (src, c.src_dim), c.dim) };
            // SAFETY: as above.
            let scale = unsafe { put_scale(args, head, peak) };
            // SAFETY: as above.
            unsafe { convert(s, (src, c.src_dim), (dst, c.dst_dim), c.dim, &ToUnits(scale)) };
        }
    }
}

/// The scales of a few heads whose elements and units lie together.
struct Scales {
    heads: Range<usize>,
    /// As they are stored.
    floats: [f32; MAX_LANES],
    halves: [f16; MAX_LANES],
    reciprocals: Reciprocals,
    /// Whether [`Reciprocals`] hold for all scales.
    holds: bool,
}

impl Scales {
    #[inline(always)]
    fn new() -> Self {
        let reciprocals = Reciprocals::new();
        Self { heads: 0..0, floats: [0.0; MAX_LANES], halves: [f16::ZERO; MAX_LANES], reciprocals, holds: false }
    }

    /// Computes those of at most [`together`] heads.
    ///
    /// # Safety
    /// As [`quantize`].
    #[inline(always)]
    unsafe fn compute<S: Simd, A: LoadStore>(&mut self, s: S, args: &ScaledArgs, heads: Range<usize>) {
        let c = &args.copy;
        self.heads = heads.clone();
        if heads.is_empty() {
            return;
        }
        let mut from = [c.src.cast::<A>(); MAX_LANES];
        for (i, from) in from[..together::<S>()].iter_mut().enumerate() {
            // Where there are fewer, the last one again.
            *from = from.wrapping_offset((heads.start + i).min(heads.end - 1) as isize * c.src_head);
        }
        // SAFETY: the caller's.
        let rows = unsafe { magnitudes(s, &from, c.dim) };
        let mut scales = s.div(s.fold_lanes::<MaxBits>(&rows), s.splat(MAX_UNIT));
        let mut least = Reciprocals::LEAST;
        // SAFETY: an array holds a whole vector.
        unsafe {
            if args.scale_dtype == DType::F16 {
                s.store_f16(self.halves.as_mut_ptr(), scales);
                (scales, least) = (s.load_f16(self.halves.as_ptr()), f16::MIN_POSITIVE.to_f32_const());
            }
            s.store_f32(self.floats.as_mut_ptr(), scales);
        }
        self.holds = !Reciprocals::holds(s, scales, least) & ((1 << heads.len()) - 1) == 0;
        self.reciprocals.set(s, scales);
    }

    /// Stores the scales, and quantises the heads.
    ///
    /// # Safety
    /// As [`quantize`]; reciprocals hold.
    #[inline(always)]
    unsafe fn quantize<S: Simd, A: LoadStore>(&self, s: S, args: &ScaledArgs) {
        let c = &args.copy;
        for (i, head) in self.heads.clone().enumerate() {
            let (head, at) = (head as isize, head as isize * args.scale_head);
            let src = c.src.cast::<A>().wrapping_offset(head * c.src_head);
            let dst = c.dst.cast::<i8>().wrapping_offset(head * c.dst_head);
            // SAFETY: the caller's; a part is what is left.
            unsafe {
                match args.scale_dtype {
                    DType::F32 => *args.scales.cast::<f32>().wrapping_offset(at) = self.floats[i],
                    DType::F16 => *args.scales.cast::<f16>().wrapping_offset(at) = self.halves[i],
                    // The check of a cache's scales rejects bf16.
                    DType::Bf16 => {}
                }
                prefetch_next(s, c, (src.cast(), c.dim * size_of::<A>()), (dst.cast(), c.dim));
                let by = self.reciprocals.of(s, i);
                let mut at = 0;
                while at + 4 * S::LANES <= c.dim {
                    let mut units = [s.zero(); 4];
                    for (i, unit) in units.iter_mut().enumerate() {
                        *unit = by.quotient(s, A::load(s, src.add(at + i * S::LANES)));
                    }
                    s.store_four_i8(dst.add(at), units);
                    at += 4 * S::LANES;
                }
                while at + S::LANES <= c.dim {
                    s.store_i8(dst.add(at), by.quotient(s, A::load(s, src.add(at))));
                    at += S::LANES;
                }
                if at < c.dim {
                    let left = c.dim - at;
                    s.store_part_i8(dst.add(at), by.quotient(s, A::load_part(s, src.add(at), left)), left);
                }
            }
        }
    }
}

/// Heads or groups whose scales are computed together: half of the lanes, so that the next ones are in flight with them.
pub(super) const fn together<S: Simd>() -> usize {
    S::LANES / 2
}

/// The largest magnitudes of [`together`] heads in the lanes of a vector each; not finite where an element is not.
///
/// # Safety
/// `n` elements are readable at each address.
#[inline(always)]
unsafe fn magnitudes<S: Simd, A: LoadStore>(s: S, from: &[*const A; MAX_LANES], n: usize) -> [S::V; MAX_LANES] {
    let mut most = [s.zero(); MAX_LANES];
    let mut at = 0;
    // SAFETY: the caller's; a part is what is left.
    unsafe {
        while at + 2 * S::LANES <= n {
            for i in 0..together::<S>() {
                let [x, y] = [A::load(s, from[i].add(at)), A::load(s, from[i].add(at + S::LANES))];
                most[i] = s.max_bits(most[i], s.max_bits(s.abs(x), s.abs(y)));
            }
            at += 2 * S::LANES;
        }
        while at < n {
            let left = n - at;
            for i in 0..together::<S>() {
                let from = from[i].add(at);
                let x = if left >= S::LANES { A::load(s, from) } else { A::load_part(s, from, left) };
                most[i] = s.max_bits(most[i], s.abs(x));
            }
            at += S::LANES;
        }
    }
    most
}

/// The reciprocals of several divisors in two parts, whose sum is closer to them than an f32. The products of a dividend with both,
/// rounded and added in one operation, are on the same side of every number of five bits, and of every integer and a half below 256, as
/// the rounded quotient, and rounded to the same integer. That was counted for all fractions of divisors, and does not hold for the
/// largest one.
pub(super) struct Reciprocals {
    high: [f32; MAX_LANES],
    low: [f32; MAX_LANES],
}

/// One of [`Reciprocals`], in every lane.
pub(super) struct Reciprocal<S: Simd> {
    high: S::V,
    low: S::V,
}

impl Reciprocals {
    /// The least divisor: far from those whose products are subnormal.
    pub const LEAST: f32 = f32::from_bits((127 - 90) << 23);

    pub const fn new() -> Self {
        Self { high: [0.0; MAX_LANES], low: [0.0; MAX_LANES] }
    }

    /// The bits of divisors for which they hold: from `least` on, which is at least [`Self::LEAST`], below the largest f16, without the
    /// largest fraction.
    #[inline(always)]
    pub fn holds<S: Simd>(s: S, divisors: S::V, least: f32) -> u64 {
        let fraction = s.splat(f32::from_bits((1 << 23) - 1));
        s.lt_bits(divisors, s.splat(f16::MAX.to_f32_const()))
            & !s.lt_bits(divisors, s.splat(least))
            & s.lt_bits(s.and_bits(divisors, fraction), fraction)
    }

    /// Sets those of these divisors, and returns their first parts: the nearest f32.
    #[inline(always)]
    pub fn set<S: Simd>(&mut self, s: S, divisors: S::V) -> S::V {
        let one = s.splat(1.0);
        let high = s.div(one, divisors);
        let low = s.mul(s.fma(s.mul(divisors, s.splat(-1.0)), high, one), high);
        // SAFETY: an array holds a whole vector.
        unsafe {
            s.store_f32(self.high.as_mut_ptr(), high);
            s.store_f32(self.low.as_mut_ptr(), low);
        }
        high
    }

    /// That of divisor i.
    #[inline(always)]
    pub fn of<S: Simd>(&self, s: S, i: usize) -> Reciprocal<S> {
        Reciprocal { high: s.splat(self.high[i]), low: s.splat(self.low[i]) }
    }
}

impl<S: Simd> Reciprocal<S> {
    /// The quotients by the divisor.
    #[inline(always)]
    pub fn quotient(&self, s: S, x: S::V) -> S::V {
        s.fma(x, self.high, s.mul(x, self.low))
    }

    /// The products with the nearest f32.
    #[inline(always)]
    pub fn product(&self, s: S, x: S::V) -> S::V {
        s.mul(x, self.high)
    }
}

/// The largest magnitudes with those of a vector, and whether all was finite: 0 times a finite number is 0, and 0 times NaN or infinity
/// is NaN, which persists.
#[inline(always)]
pub(super) fn widest<S: Simd>(s: S, x: S::V, (largest, nonfinite): (S::V, S::V)) -> (S::V, S::V) {
    (s.max(largest, s.abs(x)), s.fma(x, s.zero(), nonfinite))
}

/// The smallest lane; no lane is NaN.
#[inline(always)]
pub(super) fn min_lane<S: Simd>(s: S, a: S::V) -> f32 {
    -s.max_lane(s.mul(a, s.splat(-1.0)))
}

/// Integers from 0 to 255 as the low bytes of patterns that are 0 otherwise, for [`Simd::store_low_bytes`].
#[inline(always)]
pub(super) fn bytes<S: Simd>(s: S, integers: S::V) -> S::V {
    // From 2^23 on, a pattern ends with the integer.
    s.and_bits(s.add(integers, s.splat((1 << 23) as f32)), s.splat(f32::from_bits(0xff)))
}

/// The same of two integers from 0 to 15 to a byte.
#[inline(always)]
pub(super) fn nibbles<S: Simd>(s: S, low: S::V, high: S::V) -> S::V {
    bytes(s, s.fma(high, s.splat(16.0), low))
}

/// Whether elements times the reciprocal of their scale are at most 2^-15 from their quotients, and no quotient is beyond the largest unit.
fn has_near_products(scale: f32) -> bool {
    (f32::MIN_POSITIVE..f16::MAX.to_f32_const()).contains(&scale)
}

/// Where no product is farther than this from its unit, none of the quotients is nearer to another one.
const SURE: f32 = 0.5 - 1.0 / (1 << 15) as f32;

/// The unit nearest to such a product, and the largest distances with this one.
#[inline(always)]
fn near_unit<S: Simd>(s: S, product: S::V, farthest: S::V) -> (S::V, S::V) {
    let unit = s.round(product);
    (unit, s.max(farthest, s.abs(s.sub(product, unit))))
}

/// Quantises `n` numbers that lie together, as [`quantize`] does with f32 scales, and returns the scale. The units may be written over
/// the numbers, from where these begin.
///
/// # Safety
/// The numbers are readable, and `n` units writable.
#[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
#[inline(always)]
pub(super) unsafe fn row<S: Simd>(s: S, src: *const f32, dst: *mut i8, n: usize) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let scale = peak(s, (src, 1), n).map_or(f32::NAN, scale_f32);
        units::<_, _, true>(s, src, dst, scale, n);
        scale
    }
}

/// The largest magnitude of a vector; `None` if an element is NaN or infinite.
///
/// # Safety
/// `n` elements are readable at `src` with that stride.
#[inline(always)]
unsafe fn peak<S: Simd, A: LoadStore>(s: S, (src, step): (*const A, isize), n: usize) -> Option<f32> {
    let mut stage = MaybeUninit::<[A; STAGE]>::uninit();
    let stage: *mut A = stage.as_mut_ptr().cast();
    let (mut largest, mut nonfinite) = (s.zero(), s.zero());
    let len = if step == 1 { n.max(1) } else { STAGE };
    for first in (0..n).step_by(len) {
        let len = (n - first).min(len);
        let mut from = src.wrapping_offset(first as isize * step);
        // SAFETY: the caller's, here and below; len fits the stage.
        unsafe {
            if step != 1 {
                gather(from, step, stage, len);
                from = stage;
            }
            let mut i = 0;
            while i < len {
                let v =
                    if i + S::LANES <= len { A::load(s, from.add(i)) } else { A::load_part(s, from.add(i), len - i) };
                (largest, nonfinite) = widest(s, v, (largest, nonfinite));
                i += S::LANES;
            }
        }
    }
    if s.all_finite(nonfinite) { Some(s.max_lane(largest)) } else { None }
}

/// `n <= BLOCK` elements of a type with any stride as f32; the others are the last one.
///
/// # Safety
/// The elements are readable, and there is one.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(s: S, dtype: DType, from: *const u8, step: isize, n: usize) -> Vectors<S> {
    #[inline(always)]
    unsafe fn load<S: Simd, A: LoadStore>(s: S, from: *const A, step: isize, n: usize) -> Vectors<S> {
        let (mut x, mut stage, mut source) = ([s.zero(); MAX_VECTORS], [A::default(); BLOCK], from);
        // SAFETY: the caller's; arrays hold a block.
        unsafe {
            if step != 1 || n < BLOCK {
                gather(from, step, stage.as_mut_ptr(), n);
                let last = stage[n - 1];
                stage[n..].fill(last);
                source = stage.as_ptr();
            }
            for (i, x) in x[..BLOCK / S::LANES].iter_mut().enumerate() {
                *x = A::load(s, source.add(i * S::LANES));
            }
        }
        x
    }
    // SAFETY: the caller's.
    unsafe {
        match dtype {
            DType::F32 => load::<S, f32>(s, from.cast(), step, n),
            DType::F16 => load::<S, f16>(s, from.cast(), step, n),
            DType::Bf16 => load::<S, bf16>(s, from.cast(), step, n),
        }
    }
}

/// Stores the scale of a head with this largest magnitude, and returns it as stored.
///
/// # Safety
/// The scale's address is valid.
#[inline(always)]
unsafe fn put_scale(args: &ScaledArgs, head: isize, peak: Option<f32>) -> f32 {
    let at = head * args.scale_head;
    // SAFETY: the caller's, here and below.
    match args.scale_dtype {
        DType::F32 => unsafe {
            let scale = peak.map_or(f32::NAN, scale_f32);
            *args.scales.cast::<f32>().wrapping_offset(at) = scale;
            scale
        },
        DType::F16 => unsafe {
            let scale = peak.map_or(f16::NAN, scale_f16);
            *args.scales.cast::<f16>().wrapping_offset(at) = scale;
            scale.to_f32()
        },
        // The check of a cache's scales rejects bf16.
        DType::Bf16 => f32::NAN,
    }
}

/// The scale of a head with this largest magnitude, in f32.
fn scale_f32(peak: f32) -> f32 {
    let scale = peak / MAX_UNIT;
    // Subnormal: up where the division has rounded down. The product is exact in f64.
    let short = scale < f32::MIN_POSITIVE && f64::from(scale) * f64::from(MAX_UNIT) < f64::from(peak);
    if short { scale.next_up() } else { scale }
}

/// The same in f16.
fn scale_f16(peak: f32) -> f16 {
    let scale = scale_f32(peak);
    if scale < f16::MIN_POSITIVE.to_f32() {
        // Subnormal: a multiple of 2^-24, rounded up. The product is exact, and bits of 1024 are the smallest normal number.
        return f16::from_bits((scale * (1 << 24) as f32).ceil() as u16);
    }
    f16::from_f32(scale.min(f16::MAX.to_f32()))
}

/// Elements as units of a scale.
struct ToUnits(f32);

impl<A: LoadStore> Converted<A, i8> for ToUnits {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, s: S, _: usize, src: *const A, dst: *mut i8, n: usize) {
        // SAFETY: the caller's.
        unsafe { units::<_, _, false>(s, src, dst, self.0, n) };
    }
}

/// `n` elements as units of a scale. With `OVER`, units may lie where elements do, from where these begin, and all quotients are computed;
/// without, only where products by the reciprocal leave a doubt.
///
/// # Safety
/// `n` elements are readable at `src` and `n` units writable at `dst`.
#[inline(always)]
unsafe fn units<S: Simd, A: LoadStore, const OVER: bool>(s: S, src: *const A, dst: *mut i8, scale: f32, n: usize) {
    if scale.is_nan() || scale == 0.0 {
        // SAFETY: the caller's.
        unsafe { dst.write_bytes(0, n) };
        return;
    }
    if !OVER && has_near_products(scale) {
        let (inverse, mut farthest) = (s.splat(1.0 / scale), s.zero());
        let mut i = 0;
        while i < n {
            // SAFETY: the caller's; a part is what is left.
            unsafe {
                let whole = i + S::LANES <= n;
                let v = if whole { A::load(s, src.add(i)) } else { A::load_part(s, src.add(i), n - i) };
                let unit;
                (unit, farthest) = near_unit(s, s.mul(v, inverse), farthest);
                if whole {
                    s.store_i8(dst.add(i), unit);
                } else {
                    s.store_part_i8(dst.add(i), unit, n - i);
                }
            }
            i += S::LANES;
        }
        if s.max_lane(farthest) < SURE {
            return;
        }
    }
    let (scale, most) = (s.splat(scale), s.splat(MAX_UNIT));
    let least = s.splat(-MAX_UNIT);
    let mut i = 0;
    while i < n {
        // SAFETY: the caller's; a part is what is left.
        unsafe {
            let whole = i + S::LANES <= n;
            let v = if whole { A::load(s, src.add(i)) } else { A::load_part(s, src.add(i), n - i) };
            let v = s.div(v, scale);
            let v = s.select_lt(v, most, s.max(v, least), most);
            if whole {
                s.store_i8(dst.add(i), v);
            } else {
                s.store_part_i8(dst.add(i), v, n - i);
            }
        }
        i += S::LANES;
    }
}

/// The scale of a head.
///
/// # Safety
/// Its address is valid.
#[inline(always)]
pub(super) unsafe fn scale_of(args: &ScaledArgs, head: isize) -> f32 {
    let at = head * args.scale_head;
    // SAFETY: the caller's.
    unsafe {
        match args.scale_dtype {
            DType::F32 => *args.scales.cast::<f32>().wrapping_offset(at),
            DType::F16 => (*args.scales.cast::<f16>().wrapping_offset(at)).to_f32(),
            // The check of a cache's scales rejects bf16.
            DType::Bf16 => f32::NAN,
        }
    }
}

/// Reads `heads` vectors of units, multiplied by their scales.
///
/// # Safety
/// Every address that `args` describes is valid; the target does not overlap units and scales.
#[inline(always)]
pub(crate) unsafe fn dequantize<S: Simd, B: LoadStore>(s: S, args: &ScaledArgs) {
    let c = &args.copy;
    for head in 0..c.heads as isize {
        let src = c.src.cast::<i8>().wrapping_offset(head * c.src_head);
        let dst = c.dst.cast::<B>().wrapping_offset(head * c.dst_head);
        // SAFETY: the caller's.
        unsafe {
            let elements = ToElements(scale_of(args, head));
            convert(s, (src, c.src_dim), (dst, c.dst_dim), c.dim, &elements);
        }
    }
}

/// Units multiplied by their scale.
pub(super) struct ToElements(pub f32);

impl<U: Load, B: LoadStore> Converted<U, B> for ToElements {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, s: S, _: usize, src: *const U, dst: *mut B, n: usize) {
        // SAFETY: the caller's.
        unsafe { elements(s, src, dst, self.0, n) };
    }
}

/// `n` units multiplied by their scale.
///
/// # Safety
/// `n` units are readable at `src` and `n` elements writable at `dst`.
#[inline(always)]
unsafe fn elements<S: Simd, U: Load, B: LoadStore>(s: S, src: *const U, dst: *mut B, scale: f32, n: usize) {
    let scale = s.splat(scale);
    let mut i = 0;
    while i < n {
        // SAFETY: the caller's; a part is what is left.
        unsafe {
            if i + S::LANES <= n {
                B::store(s, dst.add(i), s.mul(U::load(s, src.add(i)), scale));
            } else {
                B::store_part(s, dst.add(i), s.mul(U::load_part(s, src.add(i), n - i), scale), n - i);
            }
        }
        i += S::LANES;
    }
}
