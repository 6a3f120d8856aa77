//! The vector trait: the operations that kernels need of an instruction set, so that each algorithm is written once,
//! in [`generic`](super::generic).
//!
//! A value of a type that implements [`Simd`] proves that the CPU has the level's features; it holds pulp's token.
//! Every method is `inline(always)`, and is inlined into functions with the level's `target_feature`s only (the shells
//! that [`kernel_shells!`](super::kernel_shells) writes). Without inlining it would pass vectors through memory.

use super::generic::fp8::{E4m3, E4m3Fraction, E5m2, Fp8};
use crate::dtype::{Element, SaturatingF16};
pub(crate) use crate::problem::limits::MAX_LANES;
use crate::problem::tile::PACK_ROWS;
use half::{bf16, f16};

/// One instruction-set level: f32 vectors, and loads and stores that convert.
pub(crate) trait Simd: Copy {
    /// A vector of [`Self::LANES`] f32.
    type V: Copy;
    /// Lanes per vector; a power of two, at most [`MAX_LANES`].
    const LANES: usize;
    /// Width of a register tile in vectors, 2 or 4: with [`TILE_ROWS`](super::generic::attention::TILE_ROWS) rows, the
    /// largest that leaves registers for operands.
    const TILE_VECTORS: usize;
    /// Whether Q K^T has narrow register tiles too, as [`ScoreTiles`](crate::tuning::ScoreTiles) has them.
    const NARROW_SCORES: bool = false;
    /// Whether scores of the packed path are sums of vectors along the head, from copies of keys as rows, instead of single elements from
    /// transposed ones. With few registers, sums of lanes are stored until their neighbours are ready, which costs as much as to add lanes
    /// by shuffles, and rows are cheaper to copy.
    const ROW_SCORES: bool = false;
    /// Dot products that are computed together: enough to keep the FMA ports busy, few enough for the registers.
    const PARALLEL_DOTS: usize;
    /// Whether vector registers are 16, not 32, and vectors short. Tiles of registers in loops over a cache are then narrow or use at once
    /// what they load, and calls on one key or one token, which the front end binds, have loops and in-place rows of their own.
    const FEW_REGISTERS: bool = Self::PARALLEL_DOTS < 16;
    /// Keys of so many elements are read from the cache on any number of query rows of a few tokens: the longer a key, the less the
    /// sum over lanes counts, and what a packed copy costs is then more than what it saves.
    const DIRECT_DIM: usize = usize::MAX;
    /// So many query rows of a KV head take the direct path over f32, f16 or bf16 where keys are neighbours or several heads of a key are,
    /// whatever their size, and over units that are widened before.
    const DIRECT_ROWS: usize = PACK_ROWS - 1;
    /// Whether the direct path widens elements of one byte once for all query rows, if these are many and keys are long
    /// ([`Self::DIRECT_DIM`]): a loop takes four or eight rows at a time, and would widen an element at every pass.
    const WIDENS_ONCE: bool = false;
    /// Whether [`Self::load_pair_bf16`] separates even and odd elements.
    const DEINTERLEAVED_BF16: bool;
    /// What [`Self::load_e4m3_fraction`] leaves to be multiplied by: a power of two, or 1.
    const E4M3_FRACTION: f32 = 1.0;
    /// Whether cache writes convert several vectors at a time, and quantise several heads or blocks, whose scales are computed side by
    /// side. For levels whose [`Self::fma`] rounds once. They have the stores of four vectors, and all methods of [`BlockVectors`] and of
    /// bytes of a block.
    const WRITES_SEVERAL: bool = false;
    /// Whether decode reads a cache in loops for few registers and a narrow front end: what is loaded of a query is used at once for all
    /// keys, the sum over lanes of a score is taken in two steps ([`Self::half_sums`], [`Self::sum_halves`]), and prefetches stand
    /// between turns of keys or take no branch.
    const NARROW_LOOPS: bool = false;
    /// Whether the loops over a cache are compiled for one and for four query rows only, in narrow tiles of registers. Two and three
    /// rows then convert a key or value as many times.
    const FEW_LOOPS: bool = false;

    /// The `i`-th lane in the order that turns [`Self::sum_lanes`]'s tree into a depth-first walk: for all i, lanes
    /// `lane_order(2i)` and `lane_order(2i + 1)` are added first, then neighbouring pairs of those, and so on.
    fn lane_order(i: usize) -> usize;

    /// Runs `body` as a separate function with the level's features, for inner loops that are large or that several
    /// kernels share.
    ///
    /// # Safety
    /// That of `body`: its pointers are valid.
    unsafe fn outline<B: Outlined>(self, body: B);

    fn splat(self, x: f32) -> Self::V;
    /// The float at `p` in every lane.
    ///
    /// # Safety
    /// It is readable.
    #[inline(always)]
    unsafe fn splat_from(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's.
        self.splat(unsafe { *p })
    }
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once if the level can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where `a` is a quiet NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        self.select_lt(a, b, a, b)
    }
    /// `x` where `a < b`, otherwise `y` (also if either is NaN).
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// 0 where `a < b`, otherwise `x` (also if either is NaN).
    #[inline(always)]
    fn clear_lt(self, a: Self::V, b: Self::V, x: Self::V) -> Self::V {
        self.select_lt(a, b, self.zero(), x)
    }
    /// Bit i is set if lane i of `a` is less than that of `b`.
    fn lt_bits(self, a: Self::V, b: Self::V) -> u64;
    /// `x` in lane i if bit i of `bits` is set, otherwise `y`.
    fn select_bits(self, bits: u64, x: Self::V, y: Self::V) -> Self::V;
    fn abs(self, a: Self::V) -> Self::V;
    /// The magnitude of `a` with the sign of `b`.
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V;
    /// Rounds to the nearest integer, ties to even; |a| < 2^22.
    fn round(self, a: Self::V) -> Self::V;
    /// 2^n for n in -126..=127, which the lowest nine bits of a pattern hold in two's complement; any number for any other pattern.
    fn exp2i(self, n: Self::V) -> Self::V;
    /// The sum of the patterns as integers of 32 bits, without the carry.
    fn add_bits(self, a: Self::V, b: Self::V) -> Self::V;
    fn and_bits(self, a: Self::V, b: Self::V) -> Self::V;
    /// The pattern as an integer of 32 bits, shifted to the right by `n < 32`; zeros come in.
    fn shift_bits(self, a: Self::V, n: u32) -> Self::V;
    /// Swaps lanes 2i and 2i + 1.
    fn swap_pairs(self, a: Self::V) -> Self::V;

    /// The even and the odd elements of `a` followed by `b`.
    fn deinterleave(self, a: Self::V, b: Self::V) -> [Self::V; 2];
    /// The inverse of [`Self::deinterleave`].
    fn interleave(self, even: Self::V, odd: Self::V) -> [Self::V; 2];
    /// For each bit of the numbers of the elements of `a` followed by `b`, from the lowest bit on: the sum and the difference of elements
    /// that differ in that bit, in their place. A level may have a quicker way from one bit to the next; the sums are the same.
    #[inline(always)]
    fn sums_and_differences(self, a: Self::V, b: Self::V) -> [Self::V; 2] {
        let mut x = [a, b];
        for _ in 0..(2 * Self::LANES).trailing_zeros() {
            // The lowest bit becomes the highest.
            let [even, odd] = self.deinterleave(x[0], x[1]);
            x = [self.add(even, odd), self.sub(even, odd)];
        }
        x
    }

    /// Adds the squares of the lanes, which are exact, to as many sums from `first` on, a multiple of [`Self::LANES`].
    #[inline(always)]
    fn add_squares(self, v: Self::V, sums: &mut [f64; MAX_LANES], first: usize) {
        let mut lanes = [0.0f32; MAX_LANES];
        // SAFETY: the array holds a whole vector.
        unsafe { self.store_f32(lanes.as_mut_ptr(), v) };
        for (sum, x) in sums[first..first + Self::LANES].iter_mut().zip(lanes) {
            *sum += f64::from(x) * f64::from(x);
        }
    }

    /// Lane i of the result is the sum of the lanes of `v[i]`, by the same tree of pairwise additions for every i.
    /// Only the first [`Self::LANES`] entries are used.
    fn sum_lanes(self, v: &[Self::V; MAX_LANES]) -> Self::V;
    /// The first step of the tree, for vectors `i` (`a`) and `i + LANES / 2` (`b`) of [`Self::sum_lanes`], at levels with
    /// [`Self::NARROW_LOOPS`].
    #[inline(always)]
    fn half_sums(self, _a: Self::V, _b: Self::V) -> Self::V {
        unreachable!("the level has no narrow loops")
    }
    /// The other steps: of `half_sums` of all `i` makes what `sum_lanes` returns.
    #[inline(always)]
    fn sum_halves(self, _v: &[Self::V; MAX_LANES / 2]) -> Self::V {
        unreachable!("the level has no narrow loops")
    }
    /// The sums of the lanes of four vectors, by the tree of [`Self::sum_lanes`], in the first four lanes, at levels with
    /// [`Self::ROW_SCORES`].
    #[inline(always)]
    fn sum_lanes_of_four(self, _v: [Self::V; 4]) -> Self::V {
        unreachable!("the level has no scores from rows")
    }
    /// The largest lane; NaN lanes may be ignored.
    fn max_lane(self, a: Self::V) -> f32;
    /// The larger of numbers without a sign; not finite if one of them is not.
    #[inline(always)]
    fn max_bits(self, a: Self::V, b: Self::V) -> Self::V {
        let larger = self.max(a, b);
        // A NaN minus itself is NaN, and so is its sum with a number.
        self.add(larger, self.add(self.sub(a, a), self.sub(b, b)))
    }
    /// Lane i of the result is what the operation makes of all lanes of `v[i]`. Only the first [`Self::LANES`] entries are used.
    #[inline(always)]
    fn fold_lanes<F: Fold>(self, v: &[Self::V; MAX_LANES]) -> Self::V {
        let mut rows = *v;
        self.transpose(&mut rows);
        let mut all = rows[0];
        for &row in &rows[1..Self::LANES] {
            all = F::of(self, all, row);
        }
        all
    }
    /// Whether every lane is finite.
    fn all_finite(self, a: Self::V) -> bool;
    /// The transpose of the `LANES x LANES` block in the first [`Self::LANES`] entries.
    fn transpose(self, v: &mut [Self::V; MAX_LANES]);

    /// # Safety
    /// [`Self::LANES`] elements are readable at `p`, with the alignment of an element.
    unsafe fn load_f32(self, p: *const f32) -> Self::V;
    /// The first and the second half of `2 * LANES`.
    ///
    /// # Safety
    /// `2 * LANES` elements are readable at `p`.
    #[inline(always)]
    unsafe fn load_pair_f32(self, p: *const f32) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_f32(p), self.load_f32(p.add(Self::LANES))] }
    }
    /// # Safety
    /// As [`Self::load_f32`].
    unsafe fn load_f16(self, p: *const f16) -> Self::V;
    /// # Safety
    /// As [`Self::load_pair_f32`].
    #[inline(always)]
    unsafe fn load_pair_f16(self, p: *const f16) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_f16(p), self.load_f16(p.add(Self::LANES))] }
    }
    /// # Safety
    /// As [`Self::load_f32`].
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// `2 * LANES` elements as two vectors: even and odd elements if [`Self::DEINTERLEAVED_BF16`], which saves a
    /// shuffle, otherwise the first and the second half.
    ///
    /// # Safety
    /// `2 * LANES` elements are readable at `p`.
    unsafe fn load_pair_bf16(self, p: *const bf16) -> [Self::V; 2];
    /// The first or the second vector of these, loaded anew each time: the pairs of both would take registers in between.
    ///
    /// # Safety
    /// As [`Self::load_pair_bf16`].
    #[inline(always)]
    unsafe fn load_half_bf16(self, p: *const bf16, half: usize) -> Self::V {
        // SAFETY: the caller's.
        unsafe { self.load_pair_bf16(p)[half] }
    }
    /// Prefetches the cache line at `p`, which may be any address.
    fn prefetch(self, p: *const u8);
    /// As [`Self::prefetch`], into the second-level cache.
    fn prefetch_far(self, p: *const u8);
    /// As [`Self::prefetch`], for writing.
    fn prefetch_write(self, p: *const u8);
    /// The first `n < LANES` lanes from memory, the others 0. Nothing beyond `n` elements is read.
    ///
    /// # Safety
    /// `n` elements are readable at `p`.
    unsafe fn load_part_f32(self, p: *const f32, n: usize) -> Self::V;
    /// # Safety
    /// As [`Self::load_part_f32`].
    #[inline(always)]
    unsafe fn load_part_f16(self, p: *const f16, n: usize) -> Self::V {
        // SAFETY: the caller's.
        unsafe { self.load_f16(copy_part(p, n).as_ptr()) }
    }
    /// # Safety
    /// As [`Self::load_part_f32`].
    #[inline(always)]
    unsafe fn load_part_bf16(self, p: *const bf16, n: usize) -> Self::V {
        // SAFETY: the caller's.
        unsafe { self.load_bf16(copy_part(p, n).as_ptr()) }
    }
    /// Signed bytes, converted to f32.
    ///
    /// # Safety
    /// As [`Self::load_f32`].
    unsafe fn load_i8(self, p: *const i8) -> Self::V;
    /// # Safety
    /// As [`Self::load_part_f32`].
    #[inline(always)]
    unsafe fn load_part_i8(self, p: *const i8, n: usize) -> Self::V {
        // SAFETY: the caller's.
        unsafe { self.load_i8(copy_part(p, n).as_ptr()) }
    }
    /// # Safety
    /// As [`Self::load_pair_f32`].
    #[inline(always)]
    unsafe fn load_pair_i8(self, p: *const i8) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_i8(p), self.load_i8(p.add(Self::LANES))] }
    }
    /// Unsigned bytes, converted to f32.
    ///
    /// # Safety
    /// As [`Self::load_f32`].
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::V {
        // SAFETY: the caller's.
        let signed = unsafe { self.load_i8(p.cast()) };
        self.select_lt(signed, self.zero(), self.add(signed, self.splat(256.0)), signed)
    }
    /// # Safety
    /// As [`Self::load_pair_f32`].
    #[inline(always)]
    unsafe fn load_pair_u8(self, p: *const u8) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_u8(p), self.load_u8(p.add(Self::LANES))] }
    }
    /// Eight-bit floats E4M3: see [`E4m3`].
    ///
    /// # Safety
    /// As [`Self::load_f32`].
    unsafe fn load_e4m3(self, p: *const E4m3) -> Self::V;
    /// # Safety
    /// As [`Self::load_part_f32`].
    #[inline(always)]
    unsafe fn load_part_e4m3(self, p: *const E4m3, n: usize) -> Self::V {
        // SAFETY: the caller's.
        unsafe { self.load_e4m3(copy_part(p, n).as_ptr()) }
    }
    /// # Safety
    /// As [`Self::load_pair_f32`].
    #[inline(always)]
    unsafe fn load_pair_e4m3(self, p: *const E4m3) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_e4m3(p), self.load_e4m3(p.add(Self::LANES))] }
    }
    /// Eight-bit floats E4M3 divided by [`Self::E4M3_FRACTION`], exactly.
    ///
    /// # Safety
    /// As [`Self::load_f32`].
    #[inline(always)]
    unsafe fn load_e4m3_fraction(self, p: *const E4m3Fraction) -> Self::V {
        const { assert!(Self::E4M3_FRACTION == 1.0) };
        // SAFETY: the caller's.
        unsafe { self.load_e4m3(p.cast()) }
    }
    /// # Safety
    /// As [`Self::load_part_f32`].
    #[inline(always)]
    unsafe fn load_part_e4m3_fraction(self, p: *const E4m3Fraction, n: usize) -> Self::V {
        // SAFETY: the caller's.
        unsafe { self.load_e4m3_fraction(copy_part(p, n).as_ptr()) }
    }
    /// # Safety
    /// As [`Self::load_pair_f32`].
    #[inline(always)]
    unsafe fn load_pair_e4m3_fraction(self, p: *const E4m3Fraction) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_e4m3_fraction(p), self.load_e4m3_fraction(p.add(Self::LANES))] }
    }
    /// Eight-bit floats E5M2: see [`E5m2`].
    ///
    /// # Safety
    /// As [`Self::load_f32`].
    unsafe fn load_e5m2(self, p: *const E5m2) -> Self::V;
    /// # Safety
    /// As [`Self::load_part_f32`].
    #[inline(always)]
    unsafe fn load_part_e5m2(self, p: *const E5m2, n: usize) -> Self::V {
        // SAFETY: the caller's.
        unsafe { self.load_e5m2(copy_part(p, n).as_ptr()) }
    }
    /// # Safety
    /// As [`Self::load_pair_f32`].
    #[inline(always)]
    unsafe fn load_pair_e5m2(self, p: *const E5m2) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_e5m2(p), self.load_e5m2(p.add(Self::LANES))] }
    }
    /// An f16, exactly, in every lane.
    #[inline(always)]
    fn splat_f16(self, x: f16) -> Self::V {
        self.splat(x.to_f32_const())
    }
    /// Numbers of four bits, converted to f32: [`Self::LANES`] of 32, from number `at` on, which is a multiple of that. The first 16 are the
    /// low halves of 16 bytes, the others the high halves.
    ///
    /// # Safety
    /// [`Self::LANES`] bytes are readable at `p + at % 16`, and `at` is below 32.
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8, at: usize) -> Self::V {
        let mut numbers = [0i8; MAX_LANES];
        for (i, number) in numbers.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: the caller's.
            let byte = unsafe { *p.add(at % 16 + i) };
            *number = if at < 16 { byte & 15 } else { byte >> 4 } as i8;
        }
        // SAFETY: the array holds a whole vector.
        unsafe { self.load_i8(numbers.as_ptr()) }
    }
    /// `2 * LANES` of these numbers, from number `at` on, a multiple of that.
    ///
    /// # Safety
    /// Sixteen bytes are readable at `p`, and `at` is below 32.
    #[inline(always)]
    unsafe fn load_pair_nibbles(self, p: *const u8, at: usize) -> [Self::V; 2] {
        // SAFETY: the caller's.
        unsafe { [self.load_nibbles(p, at), self.load_nibbles(p, at + Self::LANES)] }
    }
    /// Numbers of four bits that lie in the order of elements, converted to f32: two of each of [`Self::LANES`] bytes, the low half first,
    /// or with `swapped` the high half.
    ///
    /// # Safety
    /// [`Self::LANES`] bytes are readable at `p`.
    #[inline(always)]
    unsafe fn load_nibble_pairs(self, p: *const u8, swapped: bool) -> [Self::V; 2] {
        // SAFETY: the caller's.
        let (low, high) = unsafe { (self.load_nibbles(p, 0), self.load_nibbles(p, 16)) };
        if swapped { self.interleave(high, low) } else { self.interleave(low, high) }
    }
    /// `2 * LANES` numbers of five bits, from number `at` on, a multiple of that: those of [`Self::load_nibbles`], with bit i of `fifth` as the
    /// highest one of number i.
    ///
    /// # Safety
    /// Sixteen bytes are readable at `p`, and `at` is below 32.
    #[inline(always)]
    unsafe fn load_pair_fives(self, p: *const u8, fifth: u32, at: usize) -> [Self::V; 2] {
        // SAFETY: the caller's.
        let mut numbers = unsafe { self.load_pair_nibbles(p, at) };
        for (i, x) in numbers.iter_mut().enumerate() {
            let bits = u64::from(fifth) >> (at + i * Self::LANES);
            *x = self.add(*x, self.select_bits(bits, self.splat(16.0), self.zero()));
        }
        numbers
    }
    /// The entries of a table with `2 * LANES` numbers of four bits, from number `at` on, a multiple of that, converted to f32.
    ///
    /// # Safety
    /// As [`Self::load_pair_fives`].
    #[inline(always)]
    unsafe fn look_up_pair(self, p: *const u8, at: usize, table: &[i8; 16]) -> [Self::V; 2] {
        let mut entries = [0i8; 2 * MAX_LANES];
        for (i, entry) in entries.iter_mut().enumerate().take(2 * Self::LANES) {
            // SAFETY: the caller's.
            let byte = unsafe { *p.add(at % 16 + i) };
            *entry = table[usize::from(if at < 16 { byte & 15 } else { byte >> 4 })];
        }
        // SAFETY: the array holds two vectors.
        unsafe { self.load_pair_i8(entries.as_ptr()) }
    }
    /// The entries of a table, a vector of 16 lanes, with numbers as of [`Self::load_nibbles`], at levels with as many lanes.
    ///
    /// # Safety
    /// As [`Self::load_nibbles`].
    #[inline(always)]
    unsafe fn look_up_nibbles(self, _p: *const u8, _at: usize, _table: Self::V) -> Self::V {
        unreachable!("a table is longer than a vector")
    }
    /// The same of two vectors, with numbers as of [`Self::load_pair_fives`], from number 0 on.
    ///
    /// # Safety
    /// As [`Self::look_up_nibbles`].
    #[inline(always)]
    unsafe fn look_up_fives(self, _p: *const u8, _fifth: u32, _table: [Self::V; 2]) -> [Self::V; 2] {
        unreachable!("a table is longer than two vectors")
    }
    /// Stores the low bytes of the patterns, whose other bits are 0.
    ///
    /// # Safety
    /// As [`Self::store_f32`].
    unsafe fn store_low_bytes(self, p: *mut u8, v: Self::V);
    /// # Safety
    /// As [`Self::store_part_f32`].
    #[inline(always)]
    unsafe fn store_part_low_bytes(self, p: *mut u8, v: Self::V, n: usize) {
        let mut buffer = [0u8; MAX_LANES];
        // SAFETY: the buffer holds a whole vector; the caller vouches for n elements at p.
        unsafe {
            self.store_low_bytes(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }
    /// Rounds to the nearest integer, ties to even, and stores the low bytes. Every lane is a number from -127 to 127.
    ///
    /// # Safety
    /// As [`Self::store_f32`].
    unsafe fn store_i8(self, p: *mut i8, v: Self::V);
    /// As [`Self::store_i8`], of four vectors that lie together.
    ///
    /// # Safety
    /// `4 * LANES` bytes are writable at `p`.
    #[inline(always)]
    unsafe fn store_four_i8(self, _p: *mut i8, _v: [Self::V; 4]) {
        unreachable!("the level writes one vector or block at a time")
    }
    /// # Safety
    /// As [`Self::store_part_f32`].
    #[inline(always)]
    unsafe fn store_part_i8(self, p: *mut i8, v: Self::V, n: usize) {
        let mut buffer = [0i8; MAX_LANES];
        // SAFETY: the buffer holds a whole vector; the caller vouches for n elements at p.
        unsafe {
            self.store_i8(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }
    /// Halves of the numbers of a block, rounded to the nearest integer, ties away from zero, as bytes. Numbers are from -255 to 255.
    ///
    /// # Safety
    /// [`BLOCK`] bytes are writable at `p`.
    #[inline(always)]
    unsafe fn store_halves_away(self, _p: *mut i8, _v: &BlockVectors<Self>) {
        unreachable!("the level writes one vector or block at a time")
    }
    /// The integers of a block's numbers, which are below 2^15 and above -1, without their fractions; those above `most` become `most`.
    #[inline(always)]
    fn cut_block(self, _v: &BlockVectors<Self>, _most: u8) -> [u8; BLOCK] {
        unreachable!("the level writes one vector or block at a time")
    }
    /// How many of 15 integers each of a block's numbers, which are above -256 and below 255, is not less than.
    #[inline(always)]
    fn count_reached(self, _v: &BlockVectors<Self>, _integers: &[i16; 15]) -> [u8; BLOCK] {
        unreachable!("the level writes one vector or block at a time")
    }
    /// The entries of a table with these numbers from 0 to 15.
    #[inline(always)]
    fn look_up_bytes(self, _numbers: [u8; BLOCK], _table: &[i8; 16]) -> [i8; BLOCK] {
        unreachable!("the level writes one vector or block at a time")
    }
    /// The low halves of bytes: those of the first 16 as low halves, those of the others as high halves.
    #[inline(always)]
    fn low_halves(self, _bytes: [u8; BLOCK]) -> [u8; BLOCK / 2] {
        unreachable!("the level writes one vector or block at a time")
    }
    /// Bit 4 of every byte; that of byte i as bit i.
    #[inline(always)]
    fn fifth_bits(self, _bytes: [u8; BLOCK]) -> u32 {
        unreachable!("the level writes one vector or block at a time")
    }
    /// The units of an eight-bit float next to a block's magnitudes, which are at most the largest number or NaN, with the signs of as
    /// many other numbers.
    ///
    /// # Safety
    /// [`BLOCK`] bytes are writable at `p`.
    #[inline(always)]
    unsafe fn store_fp8<U: Fp8>(self, _p: *mut u8, _magnitudes: &BlockVectors<Self>, _signs: &BlockVectors<Self>) {
        unreachable!("the level writes one vector or block at a time")
    }
    /// The nearest integers to a block's numbers, ties to even, plus `bias`, between 0 and the largest number of `BITS` bits, which are 8 or
    /// 4, with the bits of `flip` inverted: a byte each, or two in a byte, the first in its low half or with `swapped` in its high half.
    /// Numbers are below 2^23.
    ///
    /// # Safety
    /// `BLOCK * BITS / 8` bytes are writable at `p`.
    #[inline(always)]
    unsafe fn store_integers<const BITS: u32>(
        self,
        _p: *mut u8,
        _v: &BlockVectors<Self>,
        _bias: i16,
        _flip: u8,
        _swapped: bool,
    ) {
        unreachable!("the level writes one vector or block at a time")
    }
    /// # Safety
    /// [`Self::LANES`] elements are writable at `p`.
    unsafe fn store_f32(self, p: *mut f32, v: Self::V);
    /// # Safety
    /// As [`Self::store_f32`].
    unsafe fn store_f16(self, p: *mut f16, v: Self::V);
    /// # Safety
    /// As [`Self::store_f32`].
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V);
    /// As [`Self::store_f32`], of four vectors that lie together.
    ///
    /// # Safety
    /// `4 * LANES` elements are writable at `p`.
    #[inline(always)]
    unsafe fn store_four_f32(self, p: *mut f32, v: [Self::V; 4]) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { self.store_f32(p.add(i * Self::LANES), v) };
        }
    }
    /// As [`Self::store_f16`], of four vectors that lie together.
    ///
    /// # Safety
    /// `4 * LANES` elements are writable at `p`.
    #[inline(always)]
    unsafe fn store_four_f16(self, p: *mut f16, v: [Self::V; 4]) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { self.store_f16(p.add(i * Self::LANES), v) };
        }
    }
    /// As [`Self::store_bf16`], of four vectors that lie together.
    ///
    /// # Safety
    /// As [`Self::store_four_f16`].
    #[inline(always)]
    unsafe fn store_four_bf16(self, _p: *mut bf16, _v: [Self::V; 4]) {
        unreachable!("the level writes one vector or block at a time")
    }
    /// The inverse of [`Self::load_pair_bf16`], each element rounded as by [`Self::store_bf16`].
    ///
    /// # Safety
    /// `2 * LANES` elements are writable at `p`.
    #[inline(always)]
    unsafe fn store_pair_bf16(self, p: *mut bf16, v: [Self::V; 2]) {
        const { assert!(!Self::DEINTERLEAVED_BF16) };
        // SAFETY: the caller's.
        unsafe {
            self.store_bf16(p, v[0]);
            self.store_bf16(p.add(Self::LANES), v[1]);
        }
    }
    /// As [`Self::store_pair_bf16`], of lanes that are quiet if they are NaN, and then have no bits in their lower halves: those computed
    /// from bf16, and from numbers that are not NaN.
    ///
    /// # Safety
    /// As [`Self::store_pair_bf16`].
    #[inline(always)]
    unsafe fn store_pair_bf16_short(self, p: *mut bf16, v: [Self::V; 2]) {
        // SAFETY: the caller's.
        unsafe { self.store_pair_bf16(p, v) }
    }
    /// Stores the first `n < LANES` lanes. Nothing beyond `n` elements is written.
    ///
    /// # Safety
    /// `n` elements are writable at `p`.
    unsafe fn store_part_f32(self, p: *mut f32, v: Self::V, n: usize);
    /// Stores the `n` lanes from `first` on.
    ///
    /// # Safety
    /// `n` floats are writable at `p`.
    #[inline(always)]
    unsafe fn store_lanes_f32(self, p: *mut f32, v: Self::V, first: usize, n: usize) {
        let mut buffer = [0.0f32; MAX_LANES];
        // SAFETY: the buffer holds a whole vector; the caller vouches for n floats at p.
        unsafe {
            self.store_f32(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer[first..].as_ptr(), p, n);
        }
    }
    /// # Safety
    /// As [`Self::store_part_f32`].
    #[inline(always)]
    unsafe fn store_part_f16(self, p: *mut f16, v: Self::V, n: usize) {
        let mut buffer = [f16::ZERO; MAX_LANES];
        // SAFETY: the buffer holds a whole vector; the caller vouches for n elements at p.
        unsafe {
            self.store_f16(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }
    /// # Safety
    /// As [`Self::store_part_f32`].
    #[inline(always)]
    unsafe fn store_part_bf16(self, p: *mut bf16, v: Self::V, n: usize) {
        let mut buffer = [bf16::ZERO; MAX_LANES];
        // SAFETY: the buffer holds a whole vector; the caller vouches for n elements at p.
        unsafe {
            self.store_bf16(buffer.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }
}

/// Elements of a block, or that are converted at a time.
pub(crate) const BLOCK: usize = 32;

/// [`BLOCK`] elements: the first `BLOCK / LANES` vectors.
pub(crate) type BlockVectors<S> = [<S as Simd>::V; MAX_VECTORS];

/// Vectors of a block at the level with the fewest lanes.
pub(crate) const MAX_VECTORS: usize = BLOCK / 4;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// The cache lines of `bytes` bytes from `p` on, for prefetches.
#[inline(always)]
pub(crate) fn lines(p: *const u8, bytes: usize) -> impl Iterator<Item = *const u8> {
    (0..bytes).step_by(LINE).map(move |i| p.wrapping_add(i))
}

/// An operation on two vectors. No closure, which would be a function of its own without the level's features.
pub(crate) trait Fold {
    fn of<S: Simd>(s: S, a: S::V, b: S::V) -> S::V;
}

/// [`Simd::add`], of levels whose [`Simd::fold_lanes`] goes by the tree of [`Simd::sum_lanes`].
#[cfg(target_arch = "x86_64")]
pub(crate) struct Sum;

/// [`Simd::max_bits`].
pub(crate) struct MaxBits;

/// [`Simd::max`].
pub(crate) struct Max;

/// [`Simd::min`].
pub(crate) struct Min;

#[cfg(target_arch = "x86_64")]
impl Fold for Sum {
    #[inline(always)]
    fn of<S: Simd>(s: S, a: S::V, b: S::V) -> S::V {
        s.add(a, b)
    }
}

impl Fold for MaxBits {
    #[inline(always)]
    fn of<S: Simd>(s: S, a: S::V, b: S::V) -> S::V {
        s.max_bits(a, b)
    }
}

impl Fold for Max {
    #[inline(always)]
    fn of<S: Simd>(s: S, a: S::V, b: S::V) -> S::V {
        s.max(a, b)
    }
}

impl Fold for Min {
    #[inline(always)]
    fn of<S: Simd>(s: S, a: S::V, b: S::V) -> S::V {
        s.min(a, b)
    }
}

/// A part of a kernel that becomes a separate function.
pub(crate) trait Outlined {
    /// The body; `inline(always)`, into the function that [`Simd::outline`] makes of it.
    ///
    /// # Safety
    /// The pointers in `self` are valid.
    unsafe fn run<S: Simd>(self, s: S);
}

/// [`Simd::outline`] of a level with these features.
macro_rules! outline {
    {[$($feature:literal)*]} => {
        #[inline(always)]
        unsafe fn outline<B: $crate::kernels::simd::Outlined>(self, body: B) {
            $(#[target_feature(enable = $feature)])*
            #[inline(never)]
            unsafe fn run<S: Simd, B: $crate::kernels::simd::Outlined>(s: S, body: B) {
                // SAFETY: the caller's.
                unsafe { body.run(s) }
            }
            // SAFETY: `self` proves the features; the caller vouches for `body`.
            unsafe { run(self, body) }
        }
    };
}
pub(crate) use outline;

/// The first `n` elements at `p`, the rest of the buffer zero.
///
/// # Safety
/// `n <= MAX_LANES` elements are readable at `p`.
#[inline(always)]
pub(crate) unsafe fn copy_part<T: Copy + Default>(p: *const T, n: usize) -> [T; MAX_LANES] {
    let mut buffer = [T::default(); MAX_LANES];
    debug_assert!(n <= MAX_LANES);
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n) };
    buffer
}

/// Loads by unit type, so that one generic body serves every cache format. A unit of a quantised format is loaded
/// without its scale.
pub(crate) trait Load: Copy + Default + 'static {
    /// Whether no unit can be NaN or infinity.
    const ALWAYS_FINITE: bool;
    /// [`Self::load_pair`] separates even and odd elements on levels with [`Simd::DEINTERLEAVED_BF16`].
    const DEINTERLEAVES: bool;
    /// Whether values may be packed in pairs of slots.
    const PACKS_PAIRS: bool;
    /// As what units are read by the loops over a cache: themselves, or [`E4m3Fraction`].
    type InLoops: Load;
    /// Whether that are fractions of elements.
    const IN_FRACTIONS: bool;
    /// # Safety
    /// As [`Simd::load_f32`].
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V;
    /// `2 * LANES` elements as two vectors, in the order that attention uses.
    ///
    /// # Safety
    /// `2 * LANES` elements are readable at `p`.
    unsafe fn load_pair<S: Simd>(simd: S, p: *const Self) -> [S::V; 2];
    /// # Safety
    /// As [`Simd::load_part_f32`].
    unsafe fn load_part<S: Simd>(simd: S, p: *const Self, n: usize) -> S::V;
}

/// Whether [`Load::load_pair`] separates even and odd elements.
pub(crate) const fn deinterleaved<S: Simd, T: Load>() -> bool {
    T::DEINTERLEAVES && S::DEINTERLEAVED_BF16
}

/// Loads and stores by element type.
pub(crate) trait LoadStore: Element + Load {
    /// # Safety
    /// As [`Simd::store_f32`].
    unsafe fn store<S: Simd>(simd: S, p: *mut Self, v: S::V);
    /// The inverse of [`Load::load_pair`].
    ///
    /// # Safety
    /// `2 * LANES` elements are writable at `p`.
    unsafe fn store_pair<S: Simd>(simd: S, p: *mut Self, v: [S::V; 2]);
    /// Four vectors that lie together.
    ///
    /// # Safety
    /// `4 * LANES` elements are writable at `p`.
    unsafe fn store_four<S: Simd>(simd: S, p: *mut Self, v: [S::V; 4]);
    /// # Safety
    /// As [`Simd::store_part_f32`].
    unsafe fn store_part<S: Simd>(simd: S, p: *mut Self, v: S::V, n: usize);
}

macro_rules! load {
    ($($type:ty: $finite:expr, $load:ident $load_part:ident $load_pair:ident, $deinterleaves:expr, $packs_pairs:expr, $in_loops:ty, $fractions:expr;)*) => {$(
        impl Load for $type {
            const ALWAYS_FINITE: bool = $finite;
            const DEINTERLEAVES: bool = $deinterleaves;
            const PACKS_PAIRS: bool = $packs_pairs;
            type InLoops = $in_loops;
            const IN_FRACTIONS: bool = $fractions;
            #[inline(always)]
            unsafe fn load_pair<S: Simd>(simd: S, p: *const Self) -> [S::V; 2] {
                // SAFETY: the caller's.
                unsafe { simd.$load_pair(p) }
            }
            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V {
                // SAFETY: the caller's.
                unsafe { simd.$load(p) }
            }
            #[inline(always)]
            unsafe fn load_part<S: Simd>(simd: S, p: *const Self, n: usize) -> S::V {
                // SAFETY: the caller's.
                unsafe { simd.$load_part(p, n) }
            }
        }
    )*};
}

load! {
    f32: false, load_f32 load_part_f32 load_pair_f32, false, true, Self, false;
    f16: false, load_f16 load_part_f16 load_pair_f16, false, true, Self, false;
    bf16: false, load_bf16 load_part_bf16 load_pair_bf16, true, true, Self, false;
    i8: true, load_i8 load_part_i8 load_pair_i8, false, false, Self, false;
    E4m3: false, load_e4m3 load_part_e4m3 load_pair_e4m3, false, false, E4m3Fraction, true;
    E4m3Fraction: false, load_e4m3_fraction load_part_e4m3_fraction load_pair_e4m3_fraction, false, false, Self, false;
    E5m2: false, load_e5m2 load_part_e5m2 load_pair_e5m2, false, false, Self, false;
}

macro_rules! store {
    ($($type:ty: $store:ident $store_part:ident $put_pair:expr, $store_four:ident;)*) => {$(
        impl LoadStore for $type {
            #[inline(always)]
            unsafe fn store<S: Simd>(simd: S, p: *mut Self, v: S::V) {
                // SAFETY: the caller's.
                unsafe { simd.$store(p, v) }
            }
            #[inline(always)]
            unsafe fn store_pair<S: Simd>(simd: S, p: *mut Self, v: [S::V; 2]) {
                // SAFETY: the caller's.
                unsafe { $put_pair(simd, p, v) }
            }
            #[inline(always)]
            unsafe fn store_four<S: Simd>(simd: S, p: *mut Self, v: [S::V; 4]) {
                // SAFETY: the caller's.
                unsafe { simd.$store_four(p, v) }
            }
            #[inline(always)]
            unsafe fn store_part<S: Simd>(simd: S, p: *mut Self, v: S::V, n: usize) {
                // SAFETY: the caller's.
                unsafe { simd.$store_part(p, v, n) }
            }
        }
    )*};
}

store! {
    f32: store_f32 store_part_f32 put_halves, store_four_f32;
    f16: store_f16 store_part_f16 put_halves, store_four_f16;
    bf16: store_bf16 store_part_bf16 put_bf16_pair, store_four_bf16;
}

impl Load for SaturatingF16 {
    const ALWAYS_FINITE: bool = f16::ALWAYS_FINITE;
    const DEINTERLEAVES: bool = f16::DEINTERLEAVES;
    const PACKS_PAIRS: bool = f16::PACKS_PAIRS;
    type InLoops = Self;
    const IN_FRACTIONS: bool = false;
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V {
        // SAFETY: the caller's; the type is an f16.
        unsafe { f16::load(simd, p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(simd: S, p: *const Self) -> [S::V; 2] {
        // SAFETY: as above.
        unsafe { f16::load_pair(simd, p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_part<S: Simd>(simd: S, p: *const Self, n: usize) -> S::V {
        // SAFETY: as above.
        unsafe { f16::load_part(simd, p.cast(), n) }
    }
}

impl LoadStore for SaturatingF16 {
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, p: *mut Self, v: S::V) {
        // SAFETY: the caller's; the type is an f16.
        unsafe { f16::store(simd, p.cast(), saturated(simd, v)) }
    }
    #[inline(always)]
    unsafe fn store_pair<S: Simd>(simd: S, p: *mut Self, v: [S::V; 2]) {
        // SAFETY: as above.
        unsafe { f16::store_pair(simd, p.cast(), v.map(|v| saturated(simd, v))) }
    }
    #[inline(always)]
    unsafe fn store_four<S: Simd>(simd: S, p: *mut Self, mut v: [S::V; 4]) {
        for v in &mut v {
            *v = saturated(simd, *v);
        }
        // SAFETY: as above.
        unsafe { f16::store_four(simd, p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_part<S: Simd>(simd: S, p: *mut Self, v: S::V, n: usize) {
        // SAFETY: as above.
        unsafe { f16::store_part(simd, p.cast(), saturated(simd, v), n) }
    }
}

/// The largest finite f16 of the same sign in lanes that are larger, infinities included; NaN stays NaN.
#[inline(always)]
fn saturated<S: Simd>(s: S, v: S::V) -> S::V {
    let largest = s.splat(f16::MAX.to_f32_const());
    s.select_lt(largest, s.abs(v), s.copysign(largest, v), v)
}

/// Stores the first and the second half of `2 * LANES` elements.
///
/// # Safety
/// As [`LoadStore::store_pair`].
#[inline(always)]
unsafe fn put_halves<S: Simd, T: LoadStore>(simd: S, p: *mut T, v: [S::V; 2]) {
    // SAFETY: the caller's.
    unsafe {
        T::store(simd, p, v[0]);
        T::store(simd, p.add(S::LANES), v[1]);
    }
}

/// [`Simd::store_pair_bf16`]. No closure, which would be a function of its own without the level's features.
///
/// # Safety
/// As [`LoadStore::store_pair`].
#[inline(always)]
unsafe fn put_bf16_pair<S: Simd>(simd: S, p: *mut bf16, v: [S::V; 2]) {
    // SAFETY: the caller's.
    unsafe { simd.store_pair_bf16(p, v) }
}
