//! The cache write and the explicit repeat: every bit, and no other byte.

use crate::common::tensor::{Array, indices, poison};
use crate::common::{Layout, Place, Rng, Tensor, oracle, scaled, thin};
use crate::harness::{Level, tests};
use half::{bf16, f16};
use kvlane::{
    Context, DType, Destination, Error, KvCache, KvLayer, KvWrite, Layout as Slots, Op, Packing, Pairing, Positions,
    RmsNorm, Rope, RopeAngles, RopeFrequencies, RopeScaling, Runner, Serial, View, ViewMut, kv_write, repeat_kv,
    rms_norm, rms_norm_rope, rope,
};
use std::collections::BTreeMap;

tests! {
    levels: types_and_layouts, head_shapes, counts_rows_and_slots, skipped_slot, every_pattern, halfway_cases, random_writes,
        repeat, repeat_keeps_nan_bits, saturation;
    once: rounding_reference;
}

/// The bits of `x` in a type, to nearest, ties to even: written without `half`.
pub fn rounded(dtype: DType, x: f32) -> u32 {
    let sign = x.to_bits() >> 31;
    match dtype {
        DType::F32 => x.to_bits(),
        DType::F16 => {
            let a = f64::from(x.abs());
            let magnitude = if a >= 65520.0 {
                0x7c00
            } else {
                // The distance between neighbours: 2^-24 below the smallest normal number, above it 2^-10 of the
                // leading power of two.
                let exponent = ((a.to_bits() >> 52) as i32 - 1023).max(-14);
                let steps = (a / 2f64.powi(exponent - 10)).round_ties_even() as u32;
                // Steps carry into the exponent: 1024 of them are the leading bit.
                (((exponent + 14) as u32) << 10) + steps
            };
            sign << 15 | magnitude
        }
        _ => {
            let bits = x.to_bits();
            (bits + 0x7fff + (bits >> 16 & 1)) >> 16
        }
    }
}

fn rounding_reference() {
    for (x, half_bits, brain_bits) in [
        (0.0f32, 0x0000, 0x0000),
        (-0.0, 0x8000, 0x8000),
        (1.0, 0x3c00, 0x3f80),
        (65504.0, 0x7bff, 0x4780),
        (65519.996, 0x7bff, 0x4780),
        (65520.0, 0x7c00, 0x4780),
        (2f32.powi(-14), 0x0400, 0x3880),
        (2f32.powi(-24), 0x0001, 0x3380),
        (2f32.powi(-25), 0x0000, 0x3300),
        (2f32.powi(-25) * 1.001, 0x0001, 0x3300),
        (1.0 + 2f32.powi(-11), 0x3c00, 0x3f80),
        (1.0 + 3.0 * 2f32.powi(-11), 0x3c02, 0x3f80),
        (1.0 + 2f32.powi(-8), 0x3c04, 0x3f80),
        (1.0 + 3.0 * 2f32.powi(-8), 0x3c0c, 0x3f82),
        (f32::MAX, 0x7c00, 0x7f80),
        (f32::INFINITY, 0x7c00, 0x7f80),
    ] {
        assert_eq!(rounded(DType::F16, x), half_bits, "f16 of {x:e}");
        assert_eq!(rounded(DType::Bf16, x), brain_bits, "bf16 of {x:e}");
    }
}

/// Whether `got` is `src` rounded to another type.
#[track_caller]
pub fn assert_element(src: &Tensor, from: [usize; 4], dst: &Tensor, to: [usize; 4]) {
    let (x, got) = (src.get(from), dst.bits(to));
    if src.dtype == dst.dtype {
        assert_eq!(got, src.bits(from), "{from:?} -> {to:?}: the same type keeps every bit");
    } else if x.is_nan() {
        assert!(dst.get(to).is_nan(), "{from:?} -> {to:?}: NaN became {}", dst.get(to));
    } else {
        let want = rounded(dst.dtype, x);
        assert_eq!(
            got, want,
            "{from:?} -> {to:?}: {x:e} ({}) became {got:#x} ({}), not {want:#x}",
            src.dtype, dst.dtype
        );
    }
}

/// New tokens and caches.
pub struct Write {
    pub k: Tensor,
    pub v: Tensor,
    pub k_cache: Tensor,
    pub v_cache: Tensor,
    pub v_packing: Packing,
}

/// The slot of a position, from the table of layouts.
pub fn place(layout: Slots, slots: usize, row: usize, position: usize) -> (usize, usize) {
    match layout {
        Slots::Contiguous => (row, position),
        Slots::Ring { sink_tokens: sinks, .. } => {
            // Step by step; after the last slot, the first slot after the sink tokens.
            let step = |slot: usize| if slot + 1 == slots { sinks } else { slot + 1 };
            (row, (0..position).fold(0, |slot, _| step(slot)))
        }
        Slots::Paged { page_table: pages, pages_per_sequence: pages_per_row, .. } => {
            (pages[row * pages_per_row + position / slots] as usize, position % slots)
        }
        Slots::Ragged { cu_seqlens: starts, .. } => (0, starts[row] as usize + position),
        other => panic!("{other:?} is not written through"),
    }
}

/// The token of every slot that is written: `(first axis, slot)` to `(sequence, token)`.
pub fn written(to: &Destination, batch: usize, seq: usize, slots: usize) -> BTreeMap<(usize, usize), (usize, usize)> {
    let mut written = BTreeMap::new();
    for b in 0..batch {
        for t in 0..to.counts.map_or(seq, |c| c[b] as usize) {
            let row = to.sequences.map_or(b, |r| r[b] as usize);
            let place = match to.slots {
                None => place(to.layout, slots, row, to.positions[b] as usize + t),
                Some(list) if list[b * seq + t] < 0 => continue,
                Some(list) => {
                    let slot = list[b * seq + t] as usize;
                    let pool = matches!(to.layout, Slots::Paged { .. } | Slots::Ragged { .. });
                    if pool { (slot / slots, slot % slots) } else { (row, slot) }
                }
            };
            assert!(written.insert(place, (b, t)).is_none(), "{place:?} is written twice");
        }
    }
    written
}

impl Write {
    pub fn run(&mut self, level: &Level, runner: &dyn Runner, to: Destination) -> Result<(), Error> {
        let write = KvWrite::new(self.k.view(), self.v.view(), self.k_cache.view_mut(), self.v_cache.view_mut(), to)
            .v_packing(self.v_packing);
        kv_write(&level.context, runner, write)
    }

    /// Writes, and checks every element of both caches.
    #[track_caller]
    pub fn check(&mut self, level: &Level, to: Destination) {
        self.run(level, &Serial, to).expect("a valid write");
        let [batch, seq, ..] = self.k.shape;
        let written = written(&to, batch, seq, self.k_cache.shape[1]);
        let caches = [(&self.k, &self.k_cache, Packing::Rows), (&self.v, &self.v_cache, self.v_packing)];
        for (src, cache, packing) in caches {
            level.checked(Op::KvWrite, src.dtype, cache.dtype);
            let untouched = Tensor::output(cache.dtype, [1, 1, 1, 1], Layout::BSHD, Place::Heap).bits([0; 4]);
            for at in indices(cache.shape) {
                let (slot, d) = match packing {
                    Packing::RowPairs => (2 * at[1] + at[3] % 2, at[3] / 2),
                    _ => (at[1], at[3]),
                };
                match written.get(&(at[0], slot)) {
                    Some(&(b, t)) => assert_element(src, [b, t, at[2], d], cache, at),
                    None => assert_eq!(cache.bits(at), untouched, "{at:?} was not to be written"),
                }
            }
            cache.assert_gaps();
        }
    }
}

pub fn random_tensor(rng: &mut Rng, dtype: DType, shape: [usize; 4], layout: Layout, place: Place) -> Tensor {
    let mut tensor = Tensor::random(rng, dtype, shape, layout, place);
    // Some elements beyond the range of f16, some subnormal numbers of it, some NaN.
    for at in indices(shape) {
        if rng.chance(0.1) {
            let x = rng.pick(&[1e5, -7e4, 3e-6, -1e-7, 1e-40, f32::NAN, f32::INFINITY, -0.0]);
            tensor.set(at, x);
        }
    }
    tensor
}

fn types_and_layouts(level: &Level) {
    let mut rng = Rng::new(30);
    for src in DType::ALL {
        for dst in DType::ALL {
            for place in [Place::GuardAfter, Place::GuardBefore] {
                for (i, layout) in Layout::ALL.into_iter().enumerate() {
                    let other = Layout::ALL[(i * 3 + 1) % 7];
                    let mut write = Write {
                        k: random_tensor(&mut rng, src, [2, 3, 2, 37], layout, place),
                        v: random_tensor(&mut rng, src, [2, 3, 2, 5], other, place),
                        k_cache: Tensor::output(dst, [2, 8, 2, 37], other, place),
                        v_cache: Tensor::output(dst, [2, 8, 2, 5], layout, place),
                        v_packing: Packing::Rows,
                    };
                    write.check(level, Destination::positions(&[5, 0]));
                }
            }
        }
    }
}

fn head_shapes(level: &Level) {
    let mut rng = Rng::new(31);
    for dim in thin((1..=70).chain([127, 128, 255, 256, 257, 511, 512, 600]).collect()) {
        for heads in [1, 3] {
            let (src, dst) = (rng.pick(&DType::ALL), rng.pick(&DType::ALL));
            let mut write = Write {
                k: random_tensor(&mut rng, src, [1, 2, heads, dim], Layout::BSHD, Place::GuardAfter),
                v: random_tensor(&mut rng, src, [1, 2, heads, dim], Layout::STEP2, Place::GuardAfter),
                k_cache: Tensor::output(dst, [1, 3, heads, dim], Layout::BSHD, Place::GuardAfter),
                v_cache: Tensor::output(dst, [1, 3, heads, dim], Layout::BHSD, Place::GuardAfter),
                v_packing: Packing::Rows,
            };
            write.check(level, Destination::positions(&[1]));
        }
    }
}

fn small(rng: &mut Rng, batch: usize, seq: usize, rows: usize, capacity: usize) -> Write {
    Write {
        k: random_tensor(rng, DType::F32, [batch, seq, 2, 9], Layout::BSHD, Place::Heap),
        v: random_tensor(rng, DType::F32, [batch, seq, 2, 4], Layout::BSHD, Place::Heap),
        k_cache: Tensor::output(DType::F16, [rows, capacity, 2, 9], Layout::BSHD, Place::Heap),
        v_cache: Tensor::output(DType::Bf16, [rows, capacity, 2, 4], Layout::BHSD, Place::Heap),
        v_packing: Packing::Rows,
    }
}

fn counts_rows_and_slots(level: &Level) {
    let rng = &mut Rng::new(32);
    small(rng, 3, 4, 3, 6).check(level, Destination::positions(&[0, 6, 2]).counts(&[4, 0, 3]));
    small(rng, 2, 2, 5, 4).check(level, Destination::positions(&[2, 0]).sequences(&[4, 1]));
    // Two source rows to one cache row, one after another.
    small(rng, 2, 2, 3, 4).check(level, Destination::positions(&[2, 0]).sequences(&[1, 1]));
    small(rng, 2, 3, 2, 9).check(level, Destination::slots(&[8, 0, 3, 1, 2, 0]));
    // Positions are ignored if slots are given.
    let mut to = Destination::slots(&[3, 1]);
    to.positions = &[-7];
    small(rng, 1, 2, 1, 4).check(level, to);
    small(rng, 2, 2, 3, 4).check(level, Destination::slots(&[0, 3, 1, 2]).sequences(&[2, 2]).counts(&[2, 1]));
    // No tokens at all are valid, even at the end of the cache.
    small(rng, 1, 0, 1, 4).check(level, Destination::positions(&[4]));
}

/// A slot of -1 is padding, and may occur many times.
fn skipped_slot(level: &Level) {
    let rng = &mut Rng::new(33);
    small(rng, 2, 3, 2, 5).check(level, Destination::slots(&[-1, 4, -1, -1, -1, -1]));
    // Slots beyond a sequence's count are ignored.
    small(rng, 1, 3, 1, 5).check(level, Destination::slots(&[2, 99, -99]).counts(&[1]));
}

/// Writes numbers as one head of an odd size, in one type from another, and checks each.
fn convert(level: &Level, src: DType, dst: DType, numbers: &[u32]) {
    const DIM: usize = 1021;
    let tokens = numbers.len().div_ceil(DIM);
    let mut k = Tensor::input(src, [1, tokens, 1, DIM], Layout::BSHD, Place::Heap);
    k.fill(|_| 0.0);
    for (i, &bits) in numbers.iter().enumerate() {
        k.set_element_bits([0, i / DIM, 0, i % DIM], bits);
    }
    let mut write = Write {
        k,
        v: Tensor::input(src, [1, tokens, 1, 0], Layout::BSHD, Place::Heap),
        k_cache: Tensor::output(dst, [1, tokens, 1, DIM], Layout::BSHD, Place::Heap),
        v_cache: Tensor::output(dst, [1, tokens, 1, 0], Layout::BSHD, Place::Heap),
        v_packing: Packing::Rows,
    };
    write.check(level, Destination::positions(&[0]));
}

/// All 2^16 numbers of either narrow type, into every type.
fn every_pattern(level: &Level) {
    let patterns: Vec<u32> = (0..1 << 16).collect();
    for src in [DType::F16, DType::Bf16] {
        for dst in DType::ALL {
            convert(level, src, dst, &patterns);
        }
    }
}

/// f32 numbers exactly between two numbers of a narrow type, next to these, the narrow numbers themselves, and random
/// ones.
fn halfway_cases(level: &Level) {
    let mut rng = Rng::new(34);
    for dst in [DType::F16, DType::Bf16] {
        let wide = |bits: u32| match dst {
            DType::F16 => f16::from_bits(bits as u16).to_f32(),
            _ => bf16::from_bits(bits as u16).to_f32(),
        };
        let mut numbers = Vec::new();
        for bits in 0..1u32 << 16 {
            let (x, next) = (wide(bits), wide(bits.wrapping_add(1)));
            numbers.push(x.to_bits());
            let middle = ((f64::from(x) + f64::from(next)) / 2.0) as f32;
            if middle.is_finite() {
                numbers.extend([middle.to_bits(), middle.next_up().to_bits(), middle.next_down().to_bits()]);
            }
        }
        // The first number that rounds to infinity.
        numbers.extend([65519.99f32, 65520.0, -65520.0, f32::MAX, f32::MIN].map(f32::to_bits));
        numbers.extend([0x7f7f_7fff, 0x7f7f_8000, 0x7f7f_ffff, 0x0000_8000, 0x0000_8001, 0x0001_8000, 0x8000_0001]);
        numbers.extend((0..scaled(1 << 17)).map(|_| rng.u64() as u32));
        convert(level, DType::F32, dst, &numbers);
    }
}

fn random_writes(level: &Level) {
    let mut rng = Rng::new(35);
    for _ in 0..scaled(150) {
        let (batch, seq, heads) = (rng.between(1, 4), rng.between(0, 40), rng.between(1, 4));
        let (rows, capacity) = (batch + rng.below(3), seq + rng.between(0, 10));
        let (dim, v_dim) = (rng.between(1, 70), rng.between(1, 70));
        let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
        let layouts = [(); 4].map(|()| Layout::random(&mut rng));
        let types = [(); 4].map(|()| rng.pick(&DType::ALL));
        let mut write = Write {
            k: random_tensor(&mut rng, types[0], [batch, seq, heads, dim], layouts[0], place),
            v: random_tensor(&mut rng, types[1], [batch, seq, heads, v_dim], layouts[1], place),
            k_cache: Tensor::output(types[2], [rows, capacity, heads, dim], layouts[2], place),
            v_cache: Tensor::output(types[3], [rows, capacity, heads, v_dim], layouts[3], place),
            v_packing: Packing::Rows,
        };
        let counts: Vec<i32> = (0..batch).map(|_| rng.between(0, seq) as i32).collect();
        let positions: Vec<i32> = counts.iter().map(|&c| rng.between(0, capacity - c as usize) as i32).collect();
        let mut targets: Vec<i32> = (0..rows as i32).collect();
        (1..rows).rev().for_each(|i| targets.swap(i, rng.below(i + 1)));
        let slots: Vec<i32> = (0..batch)
            .flat_map(|_| {
                let mut slots: Vec<i32> = (0..capacity as i32).collect();
                (1..capacity).rev().for_each(|i| slots.swap(i, rng.below(i + 1)));
                slots.truncate(seq);
                slots.iter_mut().for_each(|slot| {
                    if rng.chance(0.2) {
                        *slot = -1
                    }
                });
                slots
            })
            .collect();
        let mut to = Destination::positions(&positions).counts(&counts);
        to.sequences = rng.chance(0.5).then_some(&targets[..batch]);
        to.slots = rng.chance(0.5).then_some(&slots);
        write.check(level, to);
    }
}

fn repeat(level: &Level) {
    let mut rng = Rng::new(36);
    for dtype in DType::ALL {
        for n in [1, 2, 3, 7, 16] {
            for place in [Place::GuardAfter, Place::GuardBefore] {
                for (i, layout) in thin(Layout::ALL.to_vec()).into_iter().enumerate() {
                    let x = Tensor::random(&mut rng, dtype, [2, 3, 2, 29], layout, place);
                    let mut y = Tensor::output(dtype, [2, 3, 2 * n, 29], Layout::ALL[(i * 3 + 1) % 7], place);
                    repeat_kv(&level.context, &Serial, x.view(), y.view_mut()).unwrap();
                    level.checked(Op::RepeatKv, dtype, dtype);
                    let want: Array = oracle::repeat(&x.array(), n);
                    assert_eq!(y.array().data, want.data, "{dtype} {n} times {layout:?}");
                    y.assert_gaps();
                }
            }
        }
    }
}

fn repeat_keeps_nan_bits(level: &Level) {
    for dtype in DType::ALL {
        let mut x = Tensor::input(dtype, [1, 1, 2, 70], Layout::BSHD, Place::Heap);
        for at in indices(x.shape) {
            x.set_element_bits(at, poison(dtype, at[3]));
        }
        let mut y = Tensor::output(dtype, [1, 1, 6, 70], Layout::STEP2, Place::Heap);
        repeat_kv(&level.context, &Serial, x.view(), y.view_mut()).unwrap();
        level.checked(Op::RepeatKv, dtype, dtype);
        for at in indices(y.shape) {
            assert_eq!(y.bits(at), x.bits([0, 0, at[2] / 3, at[3]]));
        }
    }
    // Without heads or tokens there is nothing to do, and no division by 0.
    let (x, mut y) = ([0f32; 4], [0f32; 4]);
    for shape in [[1, 1, 0, 4], [1, 0, 2, 4], [0, 1, 2, 4]] {
        repeat_kv(&level.context, &Serial, View::new(&x, shape).unwrap(), ViewMut::new(&mut y, shape).unwrap())
            .unwrap();
    }
}

/// The f16 bits that a saturating operation gives a number.
fn saturated(x: f32) -> u32 {
    f16::from_f32(if x.is_nan() { x } else { x.clamp(-65504.0, 65504.0) }).to_bits().into()
}

/// Whatever converts to f16 saturates if the context says so, and rounds to infinity if not: values beyond 65504, infinities
/// and NaN, in every lane of every vector.
fn saturation(level: &Level) {
    let rng = &mut Rng::new(717);
    let saturating = &level.context.clone().saturate_f16(true);
    assert!(saturating.saturates_f16() && !level.context.saturates_f16());
    let special = [65504.0, 65519.9, 65520.0, -65520.0, 1e6, -3e38, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 6e-8];
    for (source, dim) in DType::ALL.into_iter().flat_map(|t| (1..=70).map(move |dim| (t, dim))) {
        let shape = [1, 2, 2, dim];
        let strides = [(); 3].map(|()| Layout::random(rng));
        let mut tensor = |strides| {
            let mut tensor = Tensor::input(source, shape, strides, Place::GuardAfter);
            for at in indices(shape) {
                tensor.set(at, if rng.chance(0.4) { rng.pick(&special) } else { rng.f32() * 40_000.0 });
            }
            tensor
        };
        let (k, v) = (tensor(strides[0]), tensor(strides[1]));
        let even = dim / 2 * 2;
        let frequencies = &RopeFrequencies::new(even.max(2), 10_000.0, &RopeScaling::None).unwrap();
        let angles = RopeAngles::Frequencies(frequencies);
        let rotation = Rope::new(Pairing::HalfSplit, even.max(2), angles, Positions::Offsets(&[5]));
        let norm = RmsNorm::new(1e-5).weight(&[3e5; 70][..dim]);
        // The results of an operation in another type, from a context, as bits.
        type Operation<'a> = &'a dyn Fn(&Context, DType) -> Tensor;
        let output = |dtype| Tensor::output(dtype, shape, strides[2], Place::GuardAfter);
        let write = |context: &Context, dtype, norm: Option<RmsNorm>, rope: Option<Rope>| {
            let (mut k_cache, mut v_cache) = (output(dtype), output(dtype));
            let to = Destination::positions(&[0]);
            let mut write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
            (write.k_norm, write.rope) = (norm, rope);
            kv_write(context, &Serial, write).unwrap();
            (k_cache, v_cache)
        };
        let insert = |context: &Context, dtype| {
            let (mut to, mut from) = (output(dtype), k.to(Layout::BSHD, Place::Heap));
            let (mut lengths, mut from_lengths) = ([0], [2]);
            let (mut layers, mut from_layers) = ([KvLayer::keys(to.view_mut())], [KvLayer::keys(from.view_mut())]);
            let mut from = KvCache::new(&mut from_layers, Slots::Contiguous, &mut from_lengths);
            let mut cache = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
            cache.insert_sequence(context, &Serial, 0, &mut from, 0, 2).unwrap();
            to
        };
        let pairs = |context: &Context, dtype| {
            let mut k_cache = output(dtype);
            let mut packed = Tensor::output(dtype, [1, 1, 2, 2 * dim], Layout::BSHD, Place::GuardAfter);
            let to = Destination::positions(&[0]);
            let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), packed.view_mut(), to);
            kv_write(context, &Serial, write.v_packing(Packing::RowPairs)).unwrap();
            packed
        };
        let rotated = |context: &Context, dtype, normed: bool| {
            let mut to = output(dtype);
            match normed {
                false => rope(context, &Serial, k.view(), to.view_mut(), &rotation),
                true => rms_norm_rope(context, &Serial, k.view(), to.view_mut(), &norm, &rotation),
            }
            .unwrap();
            to
        };
        let normed = |context: &Context, dtype| {
            let mut to = output(dtype);
            rms_norm(context, &Serial, k.view(), to.view_mut(), &norm).unwrap();
            to
        };
        let operations: [(&str, Operation, bool, bool); 10] = [
            ("keys", &|c, t| write(c, t, None, None).0, true, false),
            ("values", &|c, t| write(c, t, None, None).1, true, false),
            ("values in pairs", &pairs, true, false),
            ("insert", &insert, true, false),
            ("norm", &normed, false, false),
            ("keys with norm", &|c, t| write(c, t, Some(norm), None).0, false, false),
            ("rope", &|c, t| rotated(c, t, false), false, true),
            ("norm and rope", &|c, t| rotated(c, t, true), false, true),
            ("keys with rope", &|c, t| write(c, t, None, Some(rotation)).0, false, true),
            ("keys with norm and rope", &|c, t| write(c, t, Some(norm), Some(rotation)).0, false, true),
        ];
        for (name, run, copies, _) in operations.into_iter().filter(|(.., rotates)| dim > 1 || !rotates) {
            // In f32 the result is exactly what is then converted.
            let (exact, got, plain) =
                (run(saturating, DType::F32), run(saturating, DType::F16), run(&level.context, DType::F16));
            for at in indices(exact.shape) {
                let x = exact.get(at);
                let what = || format!("{name} {source} dim {dim} {at:?}: {x}");
                if x.is_nan() {
                    assert!(got.get(at).is_nan() && plain.get(at).is_nan(), "{}", what());
                } else {
                    // Bits of f16 that are copied stay, behind the rotated elements too.
                    let rest = ["rope", "keys with rope"].contains(&name) && at[3] >= even;
                    let kept = (copies || rest) && source == DType::F16;
                    assert_eq!(got.bits(at), if kept { rounded(DType::F16, x) } else { saturated(x) }, "{}", what());
                    assert_eq!(plain.bits(at), rounded(DType::F16, x), "{}", what());
                }
            }
            got.assert_gaps();
        }
        for op in [Op::KvWrite, Op::RmsNorm, Op::Rope] {
            level.checked(op, source, DType::F16);
        }
    }
}
