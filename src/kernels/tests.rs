//! Every method of [`Simd`] at every level against plain Rust, lane by lane, so that the levels agree with each other; and what the
//! kernels' own mathematics is worth, against f64.
//!
//! A level that this CPU has and that did not run is a failure. Which levels it has is asked of the standard library here, not of the
//! crate; `KVLANE_REQUIRE_ISA` names levels that must have run as well, as for `tests/kernels`.

use super::generic::fp8::{self, E4m3, E4m3Fraction, E5m2, Fp8};
use super::generic::math;
use super::simd::{
    BLOCK, BlockVectors, Fold, Load, LoadStore, MAX_LANES, MAX_VECTORS, Max, MaxBits, Min, Outlined, Simd,
    deinterleaved,
};
use crate::dtype::DType;
use crate::isa::Isa;
use half::{bf16, f16};

/// Runs a check at every level that has vectors of its own. The check is a function of its own, compiled with the level's features.
fn at_every_level<C: Outlined + Copy>(check: C) {
    let mut ran = vec![Isa::Scalar];
    // SAFETY: a check's pointers are its own; a level runs where its features are.
    unsafe { super::scalar::Scalar::new_unchecked().outline(check) };
    #[cfg(target_arch = "x86_64")]
    {
        if Isa::Avx2.is_available() {
            // SAFETY: as above.
            unsafe { super::avx2::Avx2::new_unchecked().outline(check) };
            ran.push(Isa::Avx2);
        }
        if Isa::Avx512.is_available() {
            // SAFETY: as above.
            unsafe { super::avx512::Avx512::new_unchecked().outline(check) };
            ran.push(Isa::Avx512);
        }
    }
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    if Isa::Neon.is_available() {
        // SAFETY: as above.
        unsafe { super::neon::Neon::new_unchecked().outline(check) };
        ran.push(Isa::Neon);
    }
    for level in required() {
        assert!(ran.contains(&level), "level {level} has not run, but this CPU has it");
    }
}

/// The levels that must run: those that this CPU has, and those that the environment names. Partial levels add no vectors.
fn required() -> Vec<Isa> {
    let mut levels = vec![Isa::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma") && has!("f16c");
        levels.extend(avx2.then_some(Isa::Avx2));
        let avx512 = has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
        levels.extend((avx2 && avx512).then_some(Isa::Avx512));
    }
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    levels.extend(std::arch::is_aarch64_feature_detected!("neon").then_some(Isa::Neon));
    let named = std::env::var("KVLANE_REQUIRE_ISA").unwrap_or_default();
    for name in named.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        levels.push(
            Isa::from_name(name).unwrap_or_else(|| panic!("KVLANE_REQUIRE_ISA names {name:?}, which is no level")),
        );
    }
    levels.retain(|level| !level.is_partial());
    levels
}

/// Whether the level is the portable one, which rounds products and sums apart.
fn is_portable<S: Simd>() -> bool {
    std::any::type_name::<S>() == std::any::type_name::<super::scalar::Scalar>()
}

type Lanes = [f32; MAX_LANES];

/// The lanes of a vector; those that the level does not have are 0.
fn lanes<S: Simd>(s: S, v: S::V) -> Lanes {
    let mut lanes = [0.0; MAX_LANES];
    // SAFETY: room for the widest vector.
    unsafe { s.store_f32(lanes.as_mut_ptr(), v) };
    lanes
}

fn vector<S: Simd>(s: S, lanes: &Lanes) -> S::V {
    // SAFETY: as many as the widest vector has.
    unsafe { s.load_f32(lanes.as_ptr()) }
}

/// The same value: the same bits, or NaN both.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

/// The first lanes of a level are what a function says, bit for bit.
#[track_caller]
fn assert_lanes<S: Simd>(s: S, got: S::V, want: impl Fn(usize) -> f32, what: &str) {
    let got = lanes(s, got);
    for i in 0..S::LANES {
        let want = want(i);
        assert!(
            same(got[i], want),
            "{what}, lane {i} of {}: {} ({:08x}), not {want} ({:08x})",
            S::LANES,
            got[i],
            got[i].to_bits(),
            want.to_bits()
        );
    }
}

/// SplitMix64.
#[derive(Clone, Copy)]
struct Rng(u64);

impl Rng {
    fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -2..2.
    fn f32(&mut self) -> f32 {
        ((self.u64() >> 40) as f32 / (1 << 22) as f32) - 2.0
    }

    fn finite(&mut self) -> Lanes {
        std::array::from_fn(|_| self.f32())
    }

    /// Numbers of any size, and what is none, more often than chance would give.
    fn any(&mut self) -> Lanes {
        const SPECIAL: [f32; 12] = [
            0.0,
            -0.0,
            1.0,
            -1.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-40,
            -1e-45,
            0.5,
        ];
        std::array::from_fn(|_| match self.u64() % 3 {
            0 => SPECIAL[self.u64() as usize % SPECIAL.len()],
            1 => f32::from_bits(self.u64() as u32),
            _ => self.f32(),
        })
    }
}

/// Defines a test that runs at every level.
macro_rules! level_test {
    ($(#[$meta:meta])* fn $name:ident<$s:ident>($simd:ident) $body:block) => {
        $(#[$meta])*
        #[test]
        fn $name() {
            #[derive(Clone, Copy)]
            struct Check;
            impl Outlined for Check {
                #[inline(always)]
                unsafe fn run<$s: Simd>(self, $simd: $s) $body
            }
            at_every_level(Check);
        }
    };
}

level_test! {
    fn arithmetic_is_that_of_f32<S>(s) {
        let mut rng = Rng(1);
        for _ in 0..2000 {
            let (a, b, c) = (rng.any(), rng.any(), rng.any());
            let (x, y, z) = (vector(s, &a), vector(s, &b), vector(s, &c));
            assert_lanes(s, s.splat(a[0]), |_| a[0], "splat");
            assert_lanes(s, s.zero(), |_| 0.0, "zero");
            assert_lanes(s, s.add(x, y), |i| a[i] + b[i], "add");
            assert_lanes(s, s.sub(x, y), |i| a[i] - b[i], "sub");
            assert_lanes(s, s.mul(x, y), |i| a[i] * b[i], "mul");
            assert_lanes(s, s.div(x, y), |i| a[i] / b[i], "div");
            assert_lanes(s, s.abs(x), |i| a[i].abs(), "abs");
            assert_lanes(s, s.copysign(x, y), |i| a[i].copysign(b[i]), "copysign");
            assert_lanes(s, s.select_lt(x, y, z, x), |i| if a[i] < b[i] { c[i] } else { a[i] }, "select_lt");
            let bits = s.lt_bits(x, y);
            assert_eq!(bits, (0..S::LANES).map(|i| u64::from(a[i] < b[i]) << i).sum::<u64>(), "lt_bits of {a:?} and {b:?}");
            let bits = rng.u64();
            assert_lanes(s, s.select_bits(bits, x, y), |i| if bits >> i & 1 == 1 { a[i] } else { b[i] }, "select_bits");
            let finite = a[..S::LANES].iter().all(|x| x.is_finite());
            assert_eq!(s.all_finite(x), finite, "all_finite of {a:?}");
        }
    }
}

level_test! {
    /// Rounded once at every level but the portable one, which rounds twice.
    fn fma_is_rounded_once<S>(s) {
        let mut rng = Rng(2);
        let mut rounded_twice = 0;
        for _ in 0..2000 {
            let (a, b, c) = (rng.any(), rng.any(), rng.any());
            let got = lanes(s, s.fma(vector(s, &a), vector(s, &b), vector(s, &c)));
            for i in 0..S::LANES {
                let (once, twice) = (a[i].mul_add(b[i], c[i]), a[i] * b[i] + c[i]);
                assert!(same(got[i], once) || same(got[i], twice), "{} * {} + {}: {}", a[i], b[i], c[i], got[i]);
                rounded_twice += usize::from(!same(got[i], once));
            }
        }
        assert_eq!(rounded_twice > 0, is_portable::<S>(), "{rounded_twice} sums were rounded twice");
    }
}

level_test! {
    fn the_larger_is_found<S>(s) {
        let mut rng = Rng(3);
        for _ in 0..2000 {
            let (a, b) = (rng.any(), rng.any());
            let got = lanes(s, s.max(vector(s, &a), vector(s, &b)));
            for i in 0..S::LANES {
                // Zeros of either sign are equal. Levels differ in what they make of a NaN in `b` and of a signalling one.
                let signalling = a[i].is_nan() && a[i].to_bits() & 1 << 22 == 0;
                let right = match (a[i].is_nan(), b[i].is_nan()) {
                    (_, true) => true,
                    (true, false) => signalling || same(got[i], b[i]),
                    (false, false) => got[i] == a[i].max(b[i]),
                };
                assert!(right, "the larger of {} and {} is {}", a[i], b[i], got[i]);
            }
            let f = rng.finite();
            let largest = f[..S::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(s.max_lane(vector(s, &f)), largest);
        }
        for i in 0..S::LANES {
            let mut one = [f32::NEG_INFINITY; MAX_LANES];
            assert_eq!(s.max_lane(vector(s, &one)), f32::NEG_INFINITY);
            one[i] = -3.0;
            assert_eq!(s.max_lane(vector(s, &one)), -3.0, "lane {i}");
            one[i] = f32::INFINITY;
            assert_eq!(s.max_lane(vector(s, &one)), f32::INFINITY, "lane {i}");
        }
    }
}

level_test! {
    fn rounding_is_to_even<S>(s) {
        let mut rng = Rng(4);
        for i in -4000..4000 {
            // Halves and quarters, ties among them.
            let lanes: Lanes = std::array::from_fn(|k| (i * MAX_LANES as i32 + k as i32) as f32 / 4.0);
            // A zero may have either sign.
            assert_lanes(s, s.add(s.round(vector(s, &lanes)), s.zero()), |k| 0.0 + lanes[k].round_ties_even(), "round");
        }
        for _ in 0..1000 {
            let lanes = rng.finite().map(|x| x * 1e6);
            assert_lanes(s, s.add(s.round(vector(s, &lanes)), s.zero()), |k| 0.0 + lanes[k].round_ties_even(), "round");
        }
    }
}

level_test! {
    fn powers_of_two_are_exact<S>(s) {
        for n in -126..=127 {
            // 1.5 * 2^23 + n has n in its lowest bits.
            assert_lanes(s, s.exp2i(s.splat(12_582_912.0 + n as f32)), |_| 2f32.powi(n), "exp2i");
        }
    }
}

level_test! {
    fn lanes_go_where_they_belong<S>(s) {
        let a: Lanes = std::array::from_fn(|i| i as f32);
        let b: Lanes = std::array::from_fn(|i| (100 + i) as f32);
        let (x, y, n) = (vector(s, &a), vector(s, &b), S::LANES);
        assert_lanes(s, s.swap_pairs(x), |i| (i ^ 1) as f32, "swap_pairs");
        // Elements of `a` followed by `b`.
        let all = |i: usize| if i < n { a[i] } else { b[i - n] };
        let [even, odd] = s.deinterleave(x, y);
        assert_lanes(s, even, |i| all(2 * i), "deinterleave");
        assert_lanes(s, odd, |i| all(2 * i + 1), "deinterleave");
        let [first, second] = s.interleave(even, odd);
        assert_lanes(s, first, |i| a[i], "interleave");
        assert_lanes(s, second, |i| b[i], "interleave");
        let mut rows = [s.zero(); MAX_LANES];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = vector(s, &std::array::from_fn(|k| (100 * i + k) as f32));
        }
        s.transpose(&mut rows);
        for i in 0..n {
            assert_lanes(s, rows[i], |k| (100 * k + i) as f32, "transpose");
        }
        let mut order: Vec<usize> = (0..n).map(S::lane_order).collect();
        order.sort_unstable();
        assert!(order.into_iter().eq(0..n), "the order of lanes names each once");
    }
}

/// The sum of a vector's lanes by the tree that [`Simd::lane_order`] describes.
fn tree_sum<S: Simd>(lanes: &Lanes) -> f32 {
    let mut level: Vec<f32> = (0..S::LANES).map(|i| lanes[S::lane_order(i)]).collect();
    while level.len() > 1 {
        level = level.chunks_exact(2).map(|pair| pair[0] + pair[1]).collect();
    }
    level[0]
}

level_test! {
    /// Bit for bit: what a row's sum is must not depend on which vector of the sixteen it is.
    fn lanes_are_added_by_the_stated_tree<S>(s) {
        let mut rng = Rng(5);
        for round in 0..500 {
            let rows: [Lanes; MAX_LANES] =
                std::array::from_fn(|_| rng.finite().map(|x| if round % 2 == 0 { x } else { x * x * x * 1e4 }));
            let mut vectors = [s.zero(); MAX_LANES];
            (0..MAX_LANES).for_each(|i| vectors[i] = vector(s, &rows[i]));
            assert_lanes(s, s.sum_lanes(&vectors), |i| tree_sum::<S>(&rows[i]), "sum_lanes");
        }
    }
}

/// What an operation makes of the lanes of each vector.
#[inline(always)]
fn folded<S: Simd, F: Fold>(s: S, rows: &[Lanes; MAX_LANES], of: impl Fn(f32, f32) -> f32, what: &str) {
    let mut vectors = [s.zero(); MAX_LANES];
    (0..MAX_LANES).for_each(|i| vectors[i] = vector(s, &rows[i]));
    let want = |i: usize| rows[i][1..S::LANES].iter().fold(rows[i][0], |a, &b| of(a, b));
    assert_lanes(s, s.fold_lanes::<F>(&vectors), want, what);
}

level_test! {
    fn lanes_are_folded_and_squares_added<S>(s) {
        let mut rng = Rng(6);
        for _ in 0..500 {
            let rows: [Lanes; MAX_LANES] = std::array::from_fn(|_| rng.finite());
            folded::<S, Max>(s, &rows, f32::max, "the largest lanes");
            folded::<S, Min>(s, &rows, f32::min, "the smallest lanes");
            let mut magnitudes = rows.map(|row| row.map(f32::abs));
            folded::<S, MaxBits>(s, &magnitudes, f32::max, "the largest magnitudes");
            let at = (rng.u64() as usize % S::LANES, rng.u64() as usize % S::LANES);
            for x in [f32::INFINITY, f32::NAN] {
                magnitudes[at.0][at.1] = x;
                let mut vectors = [s.zero(); MAX_LANES];
                (0..MAX_LANES).for_each(|i| vectors[i] = vector(s, &magnitudes[i]));
                let largest = lanes(s, s.fold_lanes::<MaxBits>(&vectors));
                assert!((0..S::LANES).all(|i| largest[i].is_finite() == (i != at.0)), "{largest:?}");
            }

            let before: [f64; MAX_LANES] = std::array::from_fn(|_| f64::from(rng.f32()));
            for first in (0..MAX_LANES).step_by(S::LANES) {
                let mut sums = before;
                s.add_squares(vector(s, &rows[0]), &mut sums, first);
                for (i, (sum, before)) in sums.into_iter().zip(before).enumerate() {
                    let inside = i >= first && i < first + S::LANES;
                    let x = if inside { f64::from(rows[0][i - first]) } else { 0.0 };
                    assert_eq!(sum.to_bits(), (before + x * x).to_bits(), "sum {i}, from {first} on");
                }
            }
        }
    }
}

/// Four vectors of one type, stored together and one by one.
#[inline(always)]
fn stored_together<S: Simd, T: LoadStore>(s: S, v: [S::V; 4]) {
    let (mut all, mut each) = (vec![T::default(); 4 * S::LANES], vec![T::default(); 4 * S::LANES]);
    // SAFETY: room for four vectors.
    unsafe {
        T::store_four(s, all.as_mut_ptr(), v);
        (0..4).for_each(|i| T::store(s, each.as_mut_ptr().add(i * S::LANES), v[i]));
    }
    let bits = |x: &[T]| x.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&all), bits(&each), "{:?}", T::DTYPE);
}

/// A block of numbers as vectors.
#[inline(always)]
fn block<S: Simd>(s: S, x: &[f32; BLOCK]) -> BlockVectors<S> {
    let mut v = [s.zero(); MAX_VECTORS];
    for (i, v) in v[..BLOCK / S::LANES].iter_mut().enumerate() {
        // SAFETY: a block has whole vectors.
        *v = unsafe { s.load_f32(x.as_ptr().add(i * S::LANES)) };
    }
    v
}

/// A block of eight-bit floats, from magnitudes and signs, and the same by [`fp8::rounded`].
#[inline(always)]
fn block_of_fp8<S: Simd, U: Fp8>(s: S, magnitudes: &[f32; BLOCK], signs: &[f32; BLOCK]) {
    let (mut units, mut want) = ([0u8; BLOCK], [0u8; BLOCK]);
    let (x, y) = (block(s, magnitudes), block(s, signs));
    // SAFETY: the arrays hold a block.
    unsafe {
        s.store_fp8::<U>(units.as_mut_ptr(), &x, &y);
        for i in 0..BLOCK / S::LANES {
            let unit = fp8::rounded::<S, U>(s, s.copysign(x[i], y[i]));
            s.store_low_bytes(want.as_mut_ptr().add(i * S::LANES), unit);
        }
    }
    assert_eq!(units, want, "{magnitudes:?} with the signs of {signs:?}");
}

level_test! {
    /// Of the levels that write several vectors at a time.
    fn several_vectors_and_blocks_are_written<S>(s) {
        if !S::WRITES_SEVERAL {
            return;
        }
        const INTEGERS: [i16; 15] = [-231, -187, -148, -114, -84, -57, -32, -9, 14, 38, 63, 91, 122, 158, 202];
        let mut rng = Rng(7);
        for round in 0..500 {
            let v = [0; 4].map(|_| vector(s, &if round % 2 == 0 { rng.finite() } else { rng.any() }));
            stored_together::<S, f32>(s, v);
            stored_together::<S, f16>(s, v);
            stored_together::<S, bf16>(s, v);
            let numbers = [0; 4].map(|_| vector(s, &rng.finite().map(|x| x * 63.5)));
            let (mut all, mut each) = ([0i8; 4 * MAX_LANES], [0i8; 4 * MAX_LANES]);
            // SAFETY: room for four vectors of bytes.
            unsafe {
                s.store_four_i8(all.as_mut_ptr(), numbers);
                (0..4).for_each(|i| s.store_i8(each.as_mut_ptr().add(i * S::LANES), numbers[i]));
            }
            assert_eq!(all, each);

            // Quarters, with integers and ties among them, but for every fourth number.
            let x: [f32; BLOCK] = std::array::from_fn(|i| {
                let x = rng.f32() * 127.0;
                if i % 4 == 0 { x } else { (4.0 * x).round() / 4.0 }
            });
            let mut halves = [0i8; BLOCK];
            // SAFETY: the array holds a block, here and below.
            unsafe { s.store_halves_away(halves.as_mut_ptr(), &block(s, &x)) };
            let away = |x: f32| (x.trunc() / 2.0).round() as i8;
            assert_eq!(halves, x.map(away), "{x:?}");
            let reached = |x: f32| INTEGERS.iter().filter(|&&integer| x >= f32::from(integer)).count() as u8;
            assert_eq!(s.count_reached(&block(s, &x), &INTEGERS), x.map(reached), "{x:?}");
            let large = x.map(|x| x.abs() * if round % 2 == 0 { 0.25 } else { 100.0 });
            for most in [15, 31, 255] {
                assert_eq!(s.cut_block(&block(s, &large), most), large.map(|x| x.min(most.into()) as u8), "{large:?}");
            }

            let bytes: [u8; BLOCK] = std::array::from_fn(|_| rng.u64() as u8);
            let numbers = bytes.map(|byte| byte & 15);
            let table: [i8; 16] = std::array::from_fn(|_| rng.u64() as i8);
            assert_eq!(s.look_up_bytes(numbers, &table), numbers.map(|i| table[usize::from(i)]));
            let pairs: [u8; BLOCK / 2] = std::array::from_fn(|i| numbers[i] | numbers[i + BLOCK / 2] << 4);
            assert_eq!(s.low_halves(bytes), pairs);
            let fifths = (0..BLOCK).fold(0, |bits, i| bits | u32::from(bytes[i] >> 4 & 1) << i);
            assert_eq!(s.fifth_bits(bytes), fifths);

            let wide = if round % 3 == 0 { x.map(|x| x * 30_000.0) } else { x };
            for (bias, flip) in [(0, 0), (128, 0x80), (8, 8), (-3, 0)] {
                let integer = |x: f32, most: f32| (x.round_ties_even() + f32::from(bias)).clamp(0.0, most) as u8 ^ flip;
                let (mut eights, mut fours) = ([0u8; BLOCK], [0u8; BLOCK / 2]);
                // SAFETY: as above.
                unsafe { s.store_integers::<8>(eights.as_mut_ptr(), &block(s, &wide), bias, flip, false) };
                assert_eq!(eights, wide.map(|x| integer(x, 255.0)), "{wide:?} and {bias}");
                for swapped in [false, true].into_iter().filter(|_| flip < 16) {
                    // SAFETY: as above.
                    unsafe { s.store_integers::<4>(fours.as_mut_ptr(), &block(s, &wide), bias, flip, swapped) };
                    let pair = |i: usize| {
                        let [first, second] = [wide[2 * i], wide[2 * i + 1]].map(|x| integer(x, 15.0));
                        if swapped { second | first << 4 } else { first | second << 4 }
                    };
                    assert_eq!(fours, std::array::from_fn(pair), "{wide:?} and {bias}");
                }
            }

            let scale = 2f32.powi(rng.u64() as i32 % 24 - 16);
            let mut magnitudes = x.map(|x| x.abs() * scale);
            magnitudes[round % BLOCK] = f32::NAN;
            block_of_fp8::<S, E4m3>(s, &magnitudes.map(|x| if x > 448.0 { 448.0 } else { x }), &x);
            block_of_fp8::<S, E5m2>(s, &magnitudes.map(|x| if x > 57344.0 { 57344.0 } else { x }), &x);
        }
    }
}

/// Loads and stores of one type, of every length, in memory of exactly that length.
#[inline(always)]
fn partial<S: Simd, T: LoadStore>(s: S) {
    for n in 0..S::LANES {
        let source: Box<[T]> = (0..n).map(|i| T::from_f32(i as f32 + 1.5)).collect();
        // SAFETY: n elements are there.
        let v = unsafe { T::load_part(s, source.as_ptr(), n) };
        assert_lanes(s, v, |i| if i < n { i as f32 + 1.5 } else { 0.0 }, "a partial load");

        let all: Lanes = std::array::from_fn(|i| i as f32 + 1.5);
        let mut target: Box<[T]> = vec![T::default(); n].into();
        // SAFETY: room for n elements.
        unsafe { T::store_part(s, target.as_mut_ptr(), vector(s, &all), n) };
        assert!(target.iter().enumerate().all(|(i, x)| x.to_f32() == all[i]), "a partial store of {n}");
        // Nothing beside them changes either.
        let mut around = vec![T::from_f32(-7.0); MAX_LANES + 2];
        // SAFETY: room for n elements and one on either side.
        unsafe { T::store_part(s, around.as_mut_ptr().add(1), vector(s, &all), n) };
        let kept = |i: usize| around[i].to_f32() == -7.0;
        assert!(kept(0) && (n + 1..MAX_LANES + 2).all(kept), "a partial store of {n} wrote beside it");
        assert!((0..n).all(|i| around[i + 1].to_f32() == all[i]));
    }
    // Whole vectors and pairs of them, at every alignment of elements.
    for skip in 0..4 {
        let n = S::LANES;
        let source: Vec<T> = (0..skip + 2 * n).map(|i| T::from_f32(i as f32)).collect();
        let mut target = vec![T::from_f32(-7.0); skip + 2 * n];
        // SAFETY: 2 * LANES elements are there, from `skip` on.
        let (one, pair) =
            unsafe { (T::load(s, source.as_ptr().add(skip)), T::load_pair(s, source.as_ptr().add(skip))) };
        assert_lanes(s, one, |i| (skip + i) as f32, "a load");
        for half in 0..2 {
            let element = |i: usize| if deinterleaved::<S, T>() { 2 * i + half } else { half * n + i };
            assert_lanes(s, pair[half], |i| (skip + element(i)) as f32, "a load of a pair");
        }
        // SAFETY: as above.
        unsafe { T::store_pair(s, target.as_mut_ptr().add(skip), pair) };
        assert!(target[skip..].iter().zip(&source[skip..]).all(|(a, b)| a.to_f32() == b.to_f32()));
        // SAFETY: as above.
        unsafe { T::store(s, target.as_mut_ptr().add(skip), pair[1]) };
        let stored = lanes(s, pair[1]);
        assert!((0..n).all(|i| target[skip + i].to_f32() == stored[i]));
        assert!(target[..skip].iter().all(|x| x.to_f32() == -7.0));
    }
}

level_test! {
    fn partial_loads_and_stores_touch_what_they_say<S>(s) {
        partial::<S, f32>(s);
        partial::<S, f16>(s);
        partial::<S, bf16>(s);
    }
}

level_test! {
    /// All 256 bytes are read, and numbers from -127 to 127 are rounded to nearest, ties to even.
    fn signed_bytes_are_read_and_rounded<S>(s) {
        let all: Vec<i8> = (i8::MIN..=i8::MAX).collect();
        for source in all.chunks_exact(S::LANES) {
            // SAFETY: a whole vector of bytes is there.
            let v = unsafe { i8::load(s, source.as_ptr()) };
            assert_lanes(s, v, |i| source[i].into(), "a load of bytes");
        }
        for source in all.chunks_exact(2 * S::LANES) {
            // SAFETY: two vectors of bytes are there.
            let pair = unsafe { i8::load_pair(s, source.as_ptr()) };
            for half in 0..2 {
                let element = |i: usize| if deinterleaved::<S, i8>() { 2 * i + half } else { half * S::LANES + i };
                assert_lanes(s, pair[half], |i| source[element(i)].into(), "a load of a pair of bytes");
            }
        }
        for n in 0..S::LANES {
            let source: Box<[i8]> = all[..n].into();
            // SAFETY: n bytes are there.
            let v = unsafe { s.load_part_i8(source.as_ptr(), n) };
            assert_lanes(s, v, |i| if i < n { source[i].into() } else { 0.0 }, "a partial load of bytes");
        }

        // Eighths, so every second tie goes up and every second one down; and numbers beside the ties.
        let mut numbers: Vec<f32> = (-127 * 8..=127 * 8).map(|i| i as f32 / 8.0).collect();
        numbers.extend((-127..127).flat_map(|i| [(i as f32 + 0.5).next_up(), (i as f32 + 0.5).next_down()]));
        numbers.extend([-0.0, 1e-45, -1e-45]);
        numbers.resize(numbers.len().next_multiple_of(MAX_LANES), 0.0);
        for chunk in numbers.chunks_exact(S::LANES) {
            let want: Vec<i8> = chunk.iter().map(|&x| f64::from(x).round_ties_even() as i8).collect();
            // SAFETY: a whole vector of numbers is there.
            let v = unsafe { s.load_f32(chunk.as_ptr()) };
            let mut whole = vec![-7i8; S::LANES + 1];
            // SAFETY: room for a vector of bytes.
            unsafe { s.store_i8(whole.as_mut_ptr(), v) };
            assert_eq!((&whole[..S::LANES], whole[S::LANES]), (&want[..], -7), "{chunk:?}");
            assert!(chunk.iter().zip(&whole).all(|(&x, &y)| (f64::from(x) - f64::from(y)).abs() <= 0.5), "{chunk:?}");
            for n in 0..S::LANES {
                let mut part = vec![-7i8; S::LANES + 1];
                // SAFETY: room for n bytes.
                unsafe { s.store_part_i8(part.as_mut_ptr(), v, n) };
                assert_eq!(part[..n], want[..n], "{chunk:?}");
                assert!(part[n..].iter().all(|&x| x == -7), "a partial store of {n} bytes wrote beside them");
            }
        }
    }
}

/// All 256 units of a format of eight bits, whole and in part.
fn all_units<S: Simd, U: Fp8>(s: S, unit: impl Fn(u8) -> U, want: impl Fn(u8) -> f32) {
    let all: Vec<U> = (0..=255).map(unit).collect();
    for first in (0..256).step_by(S::LANES) {
        // SAFETY: a whole vector of bytes is there.
        let v = unsafe { U::load(s, all.as_ptr().add(first)) };
        assert_lanes(s, v, |i| want((first + i) as u8), "a load of eight-bit floats");
        if first.is_multiple_of(2 * S::LANES) {
            // SAFETY: two whole vectors of bytes are there.
            let pair = unsafe { U::load_pair(s, all.as_ptr().add(first)) };
            for (half, v) in pair.into_iter().enumerate() {
                assert_lanes(s, v, |i| want((first + half * S::LANES + i) as u8), "a pair of loads");
            }
        }
        for n in 0..S::LANES {
            let source: Box<[U]> = all[first..first + n].into();
            // SAFETY: n bytes are there.
            let v = unsafe { U::load_part(s, source.as_ptr(), n) };
            assert_lanes(s, v, |i| if i < n { want((first + i) as u8) } else { 0.0 }, "a partial load");
        }
    }
    // What a unit stands for is rounded to the unit; every NaN to one.
    for first in (0..=255u8).step_by(S::LANES) {
        let lane = |i: usize| first + i as u8;
        // SAFETY: a whole vector of bytes is there.
        let rounded = fp8::rounded::<S, U>(s, unsafe { U::load(s, all.as_ptr().add(first.into())) });
        for n in 0..=S::LANES {
            let mut units = [7u8; MAX_LANES + 1];
            // SAFETY: room for a vector of bytes.
            unsafe {
                if n == S::LANES {
                    s.store_low_bytes(units.as_mut_ptr(), rounded);
                } else {
                    s.store_part_low_bytes(units.as_mut_ptr(), rounded, n);
                }
            }
            for (i, &found) in units.iter().enumerate() {
                let wanted = match i {
                    _ if i >= n => 7,
                    _ if want(lane(i)).is_nan() => 0x7f,
                    _ if want(lane(i)).is_infinite() => lane(i) - 1,
                    _ => lane(i),
                };
                assert_eq!(found, wanted, "unit {} of {n}", lane(i.min(S::LANES - 1)));
            }
        }
    }
}

level_test! {
    fn eight_bit_floats_are_read_and_rounded<S>(s) {
        // By their definition, in f64.
        let number = |unit: u8, bits: u32, bias: i32| {
            let (exponent, fraction) = (i32::from(unit & 0x7f) >> bits, f64::from(unit & ((1 << bits) - 1)));
            let share = fraction / f64::from(1 << bits);
            let magnitude =
                if exponent == 0 { share * 2f64.powi(1 - bias) } else { (1.0 + share) * 2f64.powi(exponent - bias) };
            (if unit & 0x80 == 0 { magnitude } else { -magnitude }) as f32
        };
        all_units(s, E4m3, |unit| if unit & 0x7f == 0x7f { f32::NAN } else { number(unit, 3, 7) });
        all_units(s, E5m2, |unit| match unit & 0x7f {
            0x7c => f32::INFINITY.copysign(number(unit, 2, 15)),
            0x7d..=0x7f => f32::NAN,
            _ => number(unit, 2, 15),
        });
    }
}

level_test! {
    fn fractions_are_of_eight_bit_floats<S>(s) {
        let all: [u8; 256 + MAX_LANES] = std::array::from_fn(|i| i as u8);
        let number = |i: usize| E4m3(all[i]).to_f32() / S::E4M3_FRACTION;
        for first in (0..256).step_by(S::LANES) {
            let p = all[first..].as_ptr().cast::<E4m3Fraction>();
            // SAFETY: two whole vectors of bytes are there, of the last ones with those that follow.
            let (one, pair) = unsafe { (E4m3Fraction::load(s, p), E4m3Fraction::load_pair(s, p)) };
            assert_lanes(s, one, |i| number(first + i), "a load");
            assert_lanes(s, pair[0], |i| number(first + i), "the first half");
            assert_lanes(s, pair[1], |i| number(first + S::LANES + i), "the second half");
            for n in 0..S::LANES {
                // SAFETY: n bytes are there.
                let part = unsafe { E4m3Fraction::load_part(s, p, n) };
                assert_lanes(s, part, |i| if i < n { number(first + i) } else { 0.0 }, "a partial load");
            }
        }
    }
}

level_test! {
    fn numbers_of_a_block_are_read_in_pairs<S>(s) {
        let mut rng = Rng(23);
        for _ in 0..100 {
            let bytes: [u8; BLOCK] = std::array::from_fn(|_| rng.u64() as u8);
            let table: [i8; 16] = std::array::from_fn(|_| rng.u64() as i8);
            let fifth = rng.u64() as u32;
            let nibble = |i: usize| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 };
            let number = |i: usize| nibble(i) + 16 * (fifth >> i & 1) as u8;
            let p = bytes.as_ptr();
            let assert_pair = |pair: [S::V; 2], want: &dyn Fn(usize) -> f32, what: &str| {
                for (half, v) in pair.into_iter().enumerate() {
                    assert_lanes(s, v, |lane| want(half * S::LANES + lane), what);
                }
            };
            for at in (0..BLOCK).step_by(2 * S::LANES) {
                // SAFETY: a block has 16 bytes of nibbles, and 32 bytes hold a pair of vectors from each place.
                unsafe {
                    let from = p.add(at);
                    assert_pair(s.load_pair_i8(from.cast()), &|i| f32::from(bytes[at + i] as i8), "load_pair_i8");
                    assert_pair(s.load_pair_u8(from), &|i| f32::from(bytes[at + i]), "load_pair_u8");
                    if S::LANES < 16 {
                        assert_pair(s.load_pair_nibbles(p, at), &|i| f32::from(nibble(at + i)), "load_pair_nibbles");
                        assert_pair(s.load_pair_fives(p, fifth, at), &|i| f32::from(number(at + i)), "load_pair_fives");
                        let entry = |i: usize| f32::from(table[usize::from(nibble(at + i))]);
                        assert_pair(s.look_up_pair(p, at, &table), &entry, "look_up_pair");
                    }
                    for swapped in [false, true] {
                        let in_order = |i: usize| {
                            let byte = bytes[at / 2 + i / 2];
                            f32::from(if i.is_multiple_of(2) == swapped { byte >> 4 } else { byte & 15 })
                        };
                        assert_pair(s.load_nibble_pairs(p.add(at / 2), swapped), &in_order, "load_nibble_pairs");
                    }
                }
            }
            if S::LANES == 16 {
                let entries: [f32; BLOCK] = std::array::from_fn(|_| rng.f32());
                // SAFETY: as above; the entries are two vectors.
                unsafe {
                    let tables = [s.load_f32(entries.as_ptr()), s.load_f32(entries.as_ptr().add(16))];
                    let looked_up = s.look_up_fives(p, fifth, tables);
                    assert_pair(looked_up, &|i| entries[usize::from(number(i))], "look_up_fives");
                    for at in [0, 16] {
                        let looked_up = s.look_up_nibbles(p, at, tables[1]);
                        let entry = |lane: usize| entries[16 + usize::from(nibble(at + lane))];
                        assert_lanes(s, looked_up, entry, "look_up_nibbles");
                    }
                }
            }
        }
    }
}

level_test! {
    fn patterns_are_integers<S>(s) {
        let mut rng = Rng(5);
        for _ in 0..200 {
            let (a, b) = (rng.any(), rng.any());
            let (x, y) = (vector(s, &a), vector(s, &b));
            let bits = |x: f32| x.to_bits();
            let same = |got: S::V, want: &dyn Fn(usize) -> u32, what: &str| {
                let got = lanes(s, got);
                (0..S::LANES).for_each(|i| assert_eq!(bits(got[i]), want(i), "{what} of {a:?} and {b:?}"));
            };
            same(s.add_bits(x, y), &|i| bits(a[i]).wrapping_add(bits(b[i])), "add_bits");
            same(s.and_bits(x, y), &|i| bits(a[i]) & bits(b[i]), "and_bits");
            for n in [0, 1, 20, 24, 31] {
                same(s.shift_bits(x, n), &|i| bits(a[i]) >> n, "shift_bits");
            }
        }
    }
}

level_test! {
    /// Prefetches take any address.
    fn prefetches_do_not_fault<S>(s) {
        let x = [0u8; 64];
        for p in [std::ptr::null(), x.as_ptr(), std::ptr::without_provenance(usize::MAX), std::ptr::without_provenance(64)] {
            s.prefetch(p);
            s.prefetch_far(p);
            s.prefetch_write(p);
        }
    }
}

/// A type of 16 bits, and what its patterns are worth by its definition: sign, exponent, fraction.
trait Bits16: LoadStore {
    const EXPONENT_BITS: u32;
    const FRACTION_BITS: u32 = 15 - Self::EXPONENT_BITS;
    fn pattern(bits: u16) -> Self;
    fn bits(self) -> u16;

    /// The value of a pattern; NaN for a NaN.
    fn value(bits: u16) -> f64 {
        let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
        let exponent = i32::from(bits >> Self::FRACTION_BITS & ((1 << Self::EXPONENT_BITS) - 1));
        let fraction = f64::from(bits & ((1 << Self::FRACTION_BITS) - 1)) / f64::from(1 << Self::FRACTION_BITS);
        let bias = (1 << (Self::EXPONENT_BITS - 1)) - 1;
        sign * match (exponent, fraction == 0.0) {
            (e, true) if e == 2 * bias + 1 => f64::INFINITY,
            (e, false) if e == 2 * bias + 1 => f64::NAN,
            (0, _) => fraction * 2f64.powi(1 - bias),
            (e, _) => (1.0 + fraction) * 2f64.powi(e - bias),
        }
    }

    /// The nearest pattern of a number that is none of those of the type; ties go to the even one, and what is beyond the largest by
    /// half a unit or more to infinity.
    fn nearest(x: f32) -> u16 {
        let bias = (1 << (Self::EXPONENT_BITS - 1)) - 1;
        let wide = f64::from(x).abs();
        let exponent = if wide == 0.0 { 1 - bias } else { (wide.to_bits() >> 52) as i32 - 1023 }.max(1 - bias);
        // An integer number of units in the last place; exact, since f64 has twice the bits.
        let units = (wide / 2f64.powi(exponent - Self::FRACTION_BITS as i32)).round_ties_even();
        let largest = 2f64.powi(Self::FRACTION_BITS as i32 + 1) - 1.0;
        let infinity = ((1u32 << Self::EXPONENT_BITS) - 1) << Self::FRACTION_BITS;
        // A carry out of the fraction is one into the exponent; without the leading one, a number is subnormal.
        let magnitude = match exponent > bias || exponent == bias && units > largest {
            true => infinity,
            false => ((exponent + bias - 1) as u32 * (1 << Self::FRACTION_BITS) + units as u32).min(infinity),
        };
        magnitude as u16 | if x.is_sign_negative() { 0x8000 } else { 0 }
    }
}

impl Bits16 for f16 {
    const EXPONENT_BITS: u32 = 5;
    fn pattern(bits: u16) -> Self {
        Self::from_bits(bits)
    }
    fn bits(self) -> u16 {
        self.to_bits()
    }
}

impl Bits16 for bf16 {
    const EXPONENT_BITS: u32 = 8;
    fn pattern(bits: u16) -> Self {
        Self::from_bits(bits)
    }
    fn bits(self) -> u16 {
        self.to_bits()
    }
}

/// All patterns of a type, there and back, by whole vectors, partial ones and pairs.
#[inline(always)]
fn every_pattern<S: Simd, T: Bits16>(s: S) {
    let all: Vec<T> = (0..=u16::MAX).map(T::pattern).collect();
    let mut back = vec![T::default(); 2 * S::LANES];
    let right = |x: f32, bits: u16| {
        if T::value(bits).is_nan() { x.is_nan() } else { f64::from(x).to_bits() == T::value(bits).to_bits() }
    };
    // A NaN comes back as a NaN of the same sign.
    let returned = |x: T, bits: u16| match T::value(bits).is_nan() {
        true => T::value(x.bits()).is_nan() && x.bits() >> 15 == bits >> 15,
        false => x.bits() == bits,
    };
    for first in (0..1 << 16).step_by(2 * S::LANES) {
        let source = &all[first..first + 2 * S::LANES];
        // SAFETY: both buffers have 2 * LANES elements.
        unsafe {
            let low = T::load(s, source.as_ptr());
            let values = lanes(s, low);
            (0..S::LANES)
                .for_each(|i| assert!(right(values[i], source[i].bits()), "{:04x} is {}", source[i].bits(), values[i]));
            T::store(s, back.as_mut_ptr(), low);
            (0..S::LANES).for_each(|i| assert!(returned(back[i], source[i].bits()), "{:04x}", source[i].bits()));
            let pair = T::load_pair(s, source.as_ptr());
            T::store_pair(s, back.as_mut_ptr(), pair);
            (0..2 * S::LANES).for_each(|i| assert!(returned(back[i], source[i].bits()), "{:04x}", source[i].bits()));
        }
    }
}

level_test! {
    fn every_pattern_of_16_bits_is_read_and_written<S>(s) {
        every_pattern::<S, f16>(s);
        every_pattern::<S, bf16>(s);
    }
}

/// Numbers between any two neighbours of a type, ties and their neighbours above all, are rounded to nearest, ties to even: an error of
/// half a unit in the last place at most.
#[inline(always)]
fn rounding<S: Simd, T: Bits16>(s: S) {
    let mut rng = Rng(6);
    let mut numbers: Vec<f32> = Vec::new();
    let infinity = ((1u16 << T::EXPONENT_BITS) - 1) << T::FRACTION_BITS;
    for bits in 0..infinity {
        // The largest number's neighbour is where the next one would be.
        let (low, high) = (
            T::value(bits),
            if bits + 1 == infinity { 2f64.powi(1 << (T::EXPONENT_BITS - 1)) } else { T::value(bits + 1) },
        );
        // Exact: one bit more than the type has, where f32 has many, and numbers of f32 are rounded as they are where it has not.
        let tie = (low + (high - low) / 2.0) as f32;
        let random = (low + (high - low) * (rng.u64() as f64 / 2f64.powi(64))) as f32;
        for x in [low as f32, tie, tie.next_up(), tie.next_down(), random] {
            numbers.extend([x, -x]);
        }
    }
    numbers.extend([f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE, 1e-45, -1e-45, 0.0, -0.0]);
    (0..100_000).for_each(|_| numbers.push(f32::from_bits(rng.u64() as u32)));
    numbers.retain(|x| !x.is_nan());
    numbers.resize(numbers.len().next_multiple_of(2 * S::LANES), 1.0);

    let mut out = vec![T::default(); 2 * S::LANES];
    for chunk in numbers.chunks_exact(2 * S::LANES) {
        // SAFETY: both buffers have 2 * LANES elements.
        unsafe {
            let halves = [s.load_f32(chunk.as_ptr()), s.load_f32(chunk.as_ptr().add(S::LANES))];
            T::store(s, out.as_mut_ptr(), halves[0]);
            T::store(s, out.as_mut_ptr().add(S::LANES), halves[1]);
        }
        let check = |out: &[T]| {
            for (x, y) in chunk.iter().zip(out) {
                assert_eq!(
                    y.bits(),
                    if x.is_infinite() { infinity | (x.to_bits() >> 16) as u16 & 0x8000 } else { T::nearest(*x) },
                    "{x:e}"
                );
                let (value, x) = (T::value(y.bits()), f64::from(*x));
                if value.is_finite() {
                    let unit = T::value((y.bits() & 0x7fff) + 1).min(f64::MAX) - T::value(y.bits() & 0x7fff);
                    assert!((value - x).abs() <= unit / 2.0, "{x:e} becomes {value:e}");
                }
            }
        };
        check(&out);
        // SAFETY: the same.
        unsafe {
            let pair = if deinterleaved::<S, T>() {
                s.deinterleave(s.load_f32(chunk.as_ptr()), s.load_f32(chunk.as_ptr().add(S::LANES)))
            } else {
                [s.load_f32(chunk.as_ptr()), s.load_f32(chunk.as_ptr().add(S::LANES))]
            };
            T::store_pair(s, out.as_mut_ptr(), pair);
            check(&out);
            if T::DTYPE == DType::Bf16 {
                s.store_pair_bf16_short(out.as_mut_ptr().cast(), pair);
            }
        }
        check(&out);
        // SAFETY: the same.
        unsafe { T::store_part(s, out.as_mut_ptr(), s.load_f32(chunk.as_ptr()), S::LANES - 1) };
        check(&out);
    }
}

level_test! {
    fn sixteen_bits_are_rounded_to_nearest_even<S>(s) {
        rounding::<S, f16>(s);
        rounding::<S, bf16>(s);
    }
}

/// Patterns of NaN, of both signs, quiet and signalling.
const NANS: [u32; 9] = [
    0x7fc0_0000,
    0xffc0_0000,
    0x7f80_0001,
    0xff80_0001,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fbf_ffff,
    0x7f80_8000,
    0xffc0_0102,
];

level_test! {
    fn a_nan_stays_one<S>(s) {
        for bits in NANS {
            let v = s.splat(f32::from_bits(bits));
            let (mut a, mut b) = ([f16::ZERO; 2 * MAX_LANES], [bf16::ZERO; 2 * MAX_LANES]);
            // SAFETY: room for a vector, and for two.
            unsafe {
                s.store_f16(a.as_mut_ptr(), v);
                s.store_bf16(b.as_mut_ptr(), v);
                assert!(a[..S::LANES].iter().all(|x| x.is_nan()) && b[..S::LANES].iter().all(|x| x.is_nan()), "{bits:08x}");
                s.store_pair_bf16(b.as_mut_ptr(), [v, v]);
                assert!(b[..2 * S::LANES].iter().all(|x| x.is_nan()), "{bits:08x}");
                if bits & 0x40_ffff == 0x40_0000 {
                    let mut short = [bf16::ZERO; 2 * MAX_LANES];
                    s.store_pair_bf16_short(short.as_mut_ptr(), [v, v]);
                    assert!(short.map(bf16::to_bits) == b.map(bf16::to_bits), "{bits:08x}");
                }
            }
        }
    }
}

/// The largest relative error of a function over numbers.
#[inline(always)]
fn largest_error<S: Simd>(s: S, numbers: &[f32], f: impl Fn(S::V) -> S::V, exact: impl Fn(f64) -> f64) -> f64 {
    let mut largest = 0.0f64;
    for chunk in numbers.chunks(S::LANES) {
        let mut input = [0.0; MAX_LANES];
        input[..chunk.len()].copy_from_slice(chunk);
        let got = lanes(s, f(vector(s, &input)));
        for (&x, &y) in chunk.iter().zip(&got) {
            let want = exact(x.into());
            let error = if want == 0.0 { f64::from(y).abs() } else { ((f64::from(y) - want) / want).abs() };
            assert!(error.is_finite(), "f({x:e}) is {y:e}, not {want:e}");
            largest = largest.max(error);
        }
    }
    largest
}

/// `n` numbers from `low` to `high`, with steps that are no round numbers.
fn grid(low: f64, high: f64, n: usize) -> Vec<f32> {
    (0..=n).map(|i| (low + (high - low) * i as f64 / n as f64) as f32).collect()
}

level_test! {
    /// The bounds of its documentation.
    fn exp2_is_accurate<S>(s) {
        let numbers: Vec<f32> =
            [grid(-126.0, 127.0, 200_000), grid(-1.0, 1.0, 200_000), (-126..=127).map(|n| n as f32).collect()].concat();
        let error = largest_error(s, &numbers, |x| math::exp2(s, x), f64::exp2);
        let bound = if is_portable::<S>() { 2e-7 } else { 1.8e-7 };
        assert!(error <= bound, "a relative error of {error:e}");
        for n in -126..=127 {
            assert_lanes(s, math::exp2(s, s.splat(n as f32)), |_| 2f32.powi(n), "exp2 of an integer");
        }
        for x in [-126.000_01, -127.0, -1e30, f32::MIN, f32::NEG_INFINITY] {
            assert_lanes(s, math::exp2(s, s.splat(x)), |_| 0.0, "exp2 of a number below its range");
        }
        for bits in NANS {
            let powers = lanes(s, math::exp2(s, s.splat(f32::from_bits(bits))));
            assert!(powers[..S::LANES].iter().all(|x| x.is_nan()), "exp2 of the NaN {bits:08x}");
        }
        for x in grid(-130.0, 127.0, 1000) {
            assert_lanes(s, math::exp2(s, s.splat(x)), |_| math::exp2_1(s, x), "exp2 of one number");
        }
    }
}

#[cfg(target_arch = "x86_64")]
level_test! {
    /// The polynomials for fractions in [0, 1), which the AMX level uses.
    fn exp2_of_fractions_is_accurate<S>(s) {
        let mut fractions = grid(0.0, 1.0, 200_000);
        fractions.retain(|&x| x < 1.0);
        let error = largest_error(s, &fractions, |x| math::polynomial(s, x, math::EXP2_OF_FRACTION), f64::exp2);
        assert!(error <= 3.2e-6, "a relative error of {error:e}");
        let error = largest_error(s, &fractions, |x| math::polynomial(s, x, math::EXP2_OF_FRACTION_HIGH), f64::exp2);
        assert!(error <= 2.5e-7, "a relative error of {error:e}");
        for power in [
            math::polynomial(s, s.zero(), math::EXP2_OF_FRACTION),
            math::polynomial(s, s.zero(), math::EXP2_OF_FRACTION_HIGH),
        ] {
            assert_lanes(s, power, |_| 1.0, "2^0");
        }
    }
}

level_test! {
    fn exp_is_accurate<S>(s) {
        let numbers = [grid(-87.3, 88.0, 200_000), grid(-1.0, 1.0, 200_000)].concat();
        let error = largest_error(s, &numbers, |x| math::exp(s, x), f64::exp);
        assert!(error <= 1.2e-7, "a relative error of {error:e}");
        for x in [-87.34, -1e30, f32::MIN, f32::NEG_INFINITY] {
            assert_lanes(s, math::exp(s, s.splat(x)), |_| 0.0, "exp of a number below its range");
        }
        assert_lanes(s, math::exp(s, s.zero()), |_| 1.0, "exp of 0");
        for bits in NANS {
            let y = lanes(s, math::exp(s, s.splat(f32::from_bits(bits))));
            assert!(y[..S::LANES].iter().all(|x| x.is_nan()), "exp of the NaN {bits:08x}");
        }
    }
}

level_test! {
    fn tanh_is_accurate<S>(s) {
        let positive = [grid(1e-6, 1.0, 200_000), grid(0.5, 12.0, 200_000), vec![1e-30, 1e-10, 1e-3, 0.624_999_94, 0.625]].concat();
        let numbers: Vec<f32> = positive.iter().flat_map(|&x| [x, -x]).collect();
        let error = largest_error(s, &numbers, |x| math::tanh(s, x), f64::tanh);
        assert!(error <= 1.5e-7, "a relative error of {error:e}");
        assert!(lanes(s, math::tanh(s, s.zero()))[..S::LANES].iter().all(|&x| x == 0.0));
        for (x, y) in [(20.0, 1.0), (f32::MAX, 1.0), (f32::INFINITY, 1.0)] {
            assert_lanes(s, math::tanh(s, s.splat(x)), |_| y, "tanh");
            assert_lanes(s, math::tanh(s, s.splat(-x)), |_| -y, "tanh");
        }
        for bits in NANS {
            let y = lanes(s, math::tanh(s, s.splat(f32::from_bits(bits))));
            assert!(y[..S::LANES].iter().all(|x| x.is_nan()), "tanh of the NaN {bits:08x}");
        }
    }
}

#[test]
fn every_level_of_this_cpu_runs() {
    #[derive(Clone, Copy)]
    struct Nothing;
    impl Outlined for Nothing {
        #[inline(always)]
        unsafe fn run<S: Simd>(self, _: S) {}
    }
    at_every_level(Nothing);
}
