//! The Hadamard rotation: alone, fused with the write, the read and attention, and in caches that are turned on.

use crate::common::attention::{Case, Outcome, Shape, formats, kv_types, precision};
use crate::common::runners::Threads;
use crate::common::tensor::{Array, indices};
use crate::common::{Layout, Place, Rng, Tensor, close, few_cases, half_ulp, scaled, thin};
use crate::harness::{Level, tests};
use crate::quantised::Store;
use crate::semantics::random_case;
use kvlane::{
    AttentionOptions, AttentionPlan, AttentionTensors, CacheFormat, ChunkMerge, Context, DType, Destination, Isa,
    KeyRotation, KvCache, KvLayer, KvRead, KvWrite, Layout as Slots, MAX_HADAMARD_BLOCK, Op, Packing, Pairing,
    Positions, Precision, RmsNorm, Rope, RopeFrequencies, RopeScaling, SPLIT_GRID, SegmentLists, Serial, SharedPrefix,
    Source, Status, UnrotatedKeys, Workspace, attention, attention_chunks, attention_with_prefix, chunk_states_len,
    hadamard, hadamard_block, hadamard_in_place, kv_read, kv_write, merge_chunks, rms_norm_rope, rope,
};

tests! {
    levels: blocks_and_head_sizes, types_and_layouts, in_place, written, packed_pairs, read_back, turned_keys,
        random_calls, head_sizes, every_format, non_finite, cut_prompts, segments, prefixes;
    once: definition, levels_agree, own_inverse, refused;
}

/// The rotation in f64. By sums and differences, because the definition takes most of the time of an emulator.
fn rotated(x: &[f64], block: usize) -> Vec<f64> {
    let mut y = x.to_vec();
    for y in y.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block {
            for pair in y.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        y.iter_mut().for_each(|y| *y /= (block as f64).sqrt());
    }
    y
}

/// What the other tests compare with is the definition.
fn definition() {
    let mut rng = Rng::new(400);
    for block in blocks_of(MAX_HADAMARD_BLOCK) {
        let x: Vec<f64> = (0..2 * block).map(|_| rng.f32().into()).collect();
        for (got, want) in rotated(&x, block).into_iter().zip(defined(&x, block)) {
            close(got, want, 1e-12, || format!("block {block}"));
        }
    }
}

fn defined(x: &[f64], block: usize) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for (block_of_y, x) in y.chunks_exact_mut(block).zip(x.chunks_exact(block)) {
        for (i, y) in block_of_y.iter_mut().enumerate() {
            let term = |(j, &x): (usize, &f64)| if (i & j).count_ones() % 2 == 0 { x } else { -x };
            *y = x.iter().enumerate().map(term).sum::<f64>() / (block as f64).sqrt();
        }
    }
    y
}

fn rotated_array(array: &Array, block: Option<usize>) -> Array {
    let Some(block) = block else { return array.clone() };
    let dim = array.shape[3];
    Array { shape: array.shape, data: array.data.chunks(dim).flat_map(|head| rotated(head, block)).collect() }
}

/// A tensor with rotated heads, rounded to its type.
fn rotated_tensor(tensor: &Tensor, block: Option<usize>) -> Tensor {
    let (numbers, [_, s, h, d]) = (rotated_array(&tensor.array(), block).data, tensor.shape);
    let mut other = Tensor::strided(tensor.dtype, tensor.shape, tensor.strides, Place::GuardAfter, tensor.gaps);
    other.fill(|at| numbers[((at[0] * s + at[1]) * h + at[2]) * d + at[3]] as f32);
    other
}

/// Every block that a head has.
fn blocks_of(dim: usize) -> impl Iterator<Item = usize> {
    (1..)
        .map(|bits| 1 << bits)
        .take_while(move |&block: &usize| block <= MAX_HADAMARD_BLOCK && dim.is_multiple_of(block))
}

/// Rotates `x` into another tensor, and checks every element against the kernel's bound and that of the number of its additions.
#[track_caller]
fn check(level: &Level, x: &Tensor, mut y: Tensor, block: usize, what: &str) {
    hadamard(&level.context, &Serial, x.view(), y.view_mut(), block).expect("a valid call");
    let bound = level.checked(Op::Hadamard, x.dtype, y.dtype);
    let steps = f64::from(block.ilog2()) + 1.0;
    let bound = bound.min((block as f64).sqrt() * steps * 2f64.powi(-24));
    let (from, want) = (x.array(), rotated_array(&x.array(), Some(block)));
    let largest = from.data.iter().fold(0.0f64, |a, x| a.max(x.abs()));
    for (at, &want) in indices(x.shape).zip(&want.data) {
        let allowed = bound * largest;
        let allowed = allowed + half_ulp(y.dtype, want.abs() + allowed);
        close(y.get(at).into(), want, allowed, || format!("{what}, block {block}, {at:?}"));
    }
    y.assert_gaps();
}

fn blocks_and_head_sizes(level: &Level) {
    let mut rng = Rng::new(401);
    let sizes =
        [2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 576, 1024, 4608];
    for dim in thin(sizes.to_vec()) {
        for block in blocks_of(dim) {
            for layout in [Layout::BSHD, Layout::STEP2, Layout::BHSD] {
                let x = Tensor::random(&mut rng, DType::F32, [1, 3, 2, dim], layout, Place::GuardAfter);
                let y = Tensor::output(DType::F32, x.shape, layout, Place::GuardAfter);
                check(level, &x, y, block, &format!("{dim} {layout:?}"));
            }
        }
    }
}

fn types_and_layouts(level: &Level) {
    let mut rng = Rng::new(402);
    for src in DType::ALL {
        for dst in DType::ALL {
            for place in [Place::GuardAfter, Place::GuardBefore] {
                for (i, layout) in Layout::ALL.into_iter().enumerate() {
                    let dim = [16, 64, 80, 96, 640][i % 5];
                    let x = Tensor::random(&mut rng, src, [2, 3, 2, dim], layout, place);
                    let y = Tensor::output(dst, x.shape, Layout::ALL[(i * 3 + 1) % 7], place);
                    let block = hadamard_block(dim).unwrap();
                    check(level, &x, y, block, &format!("{src} {dst} {layout:?}"));
                }
            }
        }
    }
}

fn moved(context: &Context, x: &Tensor, dtype: DType, block: usize) -> Tensor {
    let mut y = Tensor::output(dtype, x.shape, Layout::BSHD, Place::Heap);
    hadamard(context, &Serial, x.view(), y.view_mut(), block).expect("a valid call");
    y
}

fn in_place(level: &Level) {
    let mut rng = Rng::new(403);
    for dtype in DType::ALL {
        for layout in Layout::ALL {
            let x = Tensor::random(&mut rng, dtype, [2, 3, 2, 96], Layout::BSHD, Place::Heap);
            let want = moved(&level.context, &x, dtype, 32);
            let mut y = Tensor::output(dtype, x.shape, layout, Place::GuardAfter);
            indices(x.shape).for_each(|at| y.set_element_bits(at, x.bits(at)));
            hadamard_in_place(&level.context, &Threads(3), y.view_mut(), 32).expect("a valid call");
            assert_eq!(y.all_bits(), want.all_bits(), "{dtype} {layout:?}");
            y.assert_gaps();
        }
    }
}

/// Every level computes the same bits.
fn levels_agree() {
    let mut rng = Rng::new(404);
    let contexts: Vec<Context> =
        Isa::ALL.into_iter().filter(|l| l.is_available()).map(|l| Context::with_max_isa(l).unwrap()).collect();
    for dim in [8, 80, 96, 128, 512, 640] {
        let x = Tensor::random(&mut rng, DType::F32, [1, 5, 3, dim], Layout::BSHD, Place::Heap);
        for block in blocks_of(dim) {
            let want = moved(&contexts[0], &x, DType::F32, block).all_bits();
            for context in &contexts {
                assert_eq!(moved(context, &x, DType::F32, block).all_bits(), want, "{} {dim} {block}", context.isa());
            }
        }
    }
}

/// Twice is not at all; exactly so for numbers that need few digits.
fn own_inverse() {
    let mut rng = Rng::new(405);
    let context = Context::new().unwrap();
    let mut x = Tensor::random(&mut rng, DType::F32, [1, 4, 2, 256], Layout::BSHD, Place::Heap);
    x.fill(|_| rng.between(0, 512) as f32 - 256.0);
    for block in [4, 16, 64, 256] {
        let once = moved(&context, &x, DType::F32, block);
        assert_ne!(once.all_bits(), x.all_bits());
        assert_eq!(moved(&context, &once, DType::F32, block).all_bits(), x.all_bits(), "{block}");
    }
}

/// All cases, or the first one where few run, as under emulators.
fn few<T>(mut cases: Vec<T>) -> Vec<T> {
    if few_cases() {
        cases.truncate(1);
    }
    cases
}

/// The formats that heads of a size can have.
fn formats_of(dim: usize) -> impl Iterator<Item = CacheFormat> {
    CacheFormat::ALL.into_iter().filter(move |format| dim.is_multiple_of(format.unit_elements()))
}

#[track_caller]
fn assert_same(got: &Store, want: &Store, shape: [usize; 4], what: &str) {
    for at in indices(shape) {
        assert_eq!(got.get(at).to_bits(), want.get(at).to_bits(), "{what} {at:?}: {} {}", got.get(at), want.get(at));
    }
}

/// Writes with a rotation have the bits of the operations one after another, into every format, with and without norm and RoPE.
fn written(level: &Level) {
    let mut rng = Rng::new(406);
    let frequencies = RopeFrequencies::new(16, 10_000.0, &RopeScaling::None).unwrap();
    for dim in thin(vec![16, 64, 80, 96, 128, 192, 256, 512]) {
        for format in formats_of(dim) {
            for (with_norm, with_rope) in [(false, false), (true, false), (false, true), (true, true)] {
                let src = rng.pick(&DType::ALL);
                let blocks: Vec<usize> = blocks_of(dim).collect();
                let (block, v_block) = (rng.pick(&blocks), rng.pick(&blocks));
                let layouts = [(); 3].map(|()| rng.pick(&Layout::ALL));
                let k = Tensor::random(&mut rng, src, [2, 3, 2, dim], layouts[0], Place::GuardAfter);
                let v = Tensor::random(&mut rng, src, [2, 3, 2, dim], layouts[1], Place::GuardAfter);
                let weight: Vec<f32> = (0..dim).map(|_| 1.0 + 0.5 * rng.f32()).collect();
                let norm = with_norm.then(|| RmsNorm::new(1e-6).weight(&weight));
                let options = Rope::new(Pairing::HalfSplit, 16, &frequencies, Positions::Offsets(&[5, 0]));
                let shape = [2, 8, 2, dim];
                let table = [1, 0];
                let layout = if rng.chance(0.5) { Slots::Contiguous } else { Slots::paged(&table, 1) };
                let to = Destination::positions(&[5, 0]).layout(layout);

                let mut caches = [(); 2].map(|()| Store::output(format, shape, layouts[2]));
                let [k_cache, v_cache] = &mut caches;
                let mut write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to)
                    .k_hadamard(block)
                    .v_hadamard(v_block);
                (write.k_norm, write.rope) = (norm, with_rope.then_some(options));
                kv_write(&level.context, &Threads(2), write).expect("a valid write");

                let mut prepared = Tensor::output(DType::F32, k.shape, Layout::BSHD, Place::Heap);
                match (norm, with_rope) {
                    (None, false) => prepared = k.cast(DType::F32),
                    (None, true) => rope(&level.context, &Serial, k.view(), prepared.view_mut(), &options).unwrap(),
                    (Some(norm), false) => {
                        kvlane::rms_norm(&level.context, &Serial, k.view(), prepared.view_mut(), &norm).unwrap();
                    }
                    (Some(norm), true) => {
                        let (context, dst) = (&level.context, prepared.view_mut());
                        rms_norm_rope(context, &Serial, k.view(), dst, &norm, &options).unwrap();
                    }
                }
                let k = moved(&level.context, &prepared, DType::F32, block);
                let v = moved(&level.context, &v, DType::F32, v_block);
                let mut want = [(); 2].map(|()| Store::output(format, shape, layouts[2]));
                let [k_cache, v_cache] = &mut want;
                let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
                kv_write(&level.context, &Serial, write).expect("a valid write");
                for (i, (got, want)) in caches.iter().zip(&want).enumerate() {
                    let what = format!("{format} {dim} {with_norm} {with_rope} {}", ["k", "v"][i]);
                    assert_same(got, want, shape, &what);
                }
                let dtype = format.dtype().unwrap_or(DType::F32);
                level.checked(Op::Hadamard, if with_norm || with_rope { DType::F32 } else { src }, dtype);
            }
        }
    }
}

/// Values in pairs of slots, which tokens enter alone and two at a time.
fn packed_pairs(level: &Level) {
    let mut rng = Rng::new(407);
    for dtype in DType::ALL {
        for dim in [16, 80, 128] {
            let block = hadamard_block(dim).unwrap();
            let k = Tensor::random(&mut rng, DType::F32, [2, 3, 2, 8], Layout::BSHD, Place::Heap);
            let v = Tensor::random(&mut rng, DType::F32, [2, 3, 2, dim], Layout::BSHD, Place::Heap);
            let mut k_cache = Tensor::output(dtype, [2, 8, 2, 8], Layout::BSHD, Place::Heap);
            let mut v_cache = Tensor::output(dtype, [2, 4, 2, 2 * dim], Layout::BSHD, Place::GuardAfter);
            let to = Destination::positions(&[4, 1]);
            let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
            let write = write.v_packing(Packing::RowPairs).v_hadamard(block);
            kv_write(&level.context, &Serial, write).expect("a valid write");
            let want = moved(&level.context, &v, dtype, block);
            for [b, t, h, d] in indices(v.shape) {
                let slot = [4, 1][b] + t;
                let got = v_cache.bits([b, slot / 2, h, 2 * d + slot % 2]);
                assert_eq!(got, want.bits([b, t, h, d]), "{dtype} {dim} [{b}, {t}, {h}, {d}]");
            }
            let canary = Tensor::output(dtype, [1; 4], Layout::BSHD, Place::Heap).bits([0; 4]);
            assert_eq!(v_cache.bits([1, 0, 0, 0]), canary, "slot 0 has no token");
            let mut back = Tensor::output(DType::F32, v.shape, Layout::BSHD, Place::Heap);
            let mut keys = Tensor::output(DType::F32, k.shape, Layout::BSHD, Place::Heap);
            let from = Source::positions(&[4, 1]);
            let read = KvRead::new(k_cache.view(), v_cache.view(), keys.view_mut(), back.view_mut(), from);
            kv_read(&level.context, &Serial, read.v_packing(Packing::RowPairs).v_hadamard(block))
                .expect("a valid read");
            assert_eq!(back.all_bits(), moved(&level.context, &want, DType::F32, block).all_bits(), "{dtype} {dim}");
        }
    }
}

/// Reads that undo the rotation have the bits of a read and another rotation.
fn read_back(level: &Level) {
    let mut rng = Rng::new(408);
    for dst in DType::ALL {
        for dim in thin(vec![64, 80, 128, 256]) {
            for format in formats_of(dim) {
                let block = hadamard_block(dim).unwrap();
                let x = Tensor::random(&mut rng, DType::F32, [2, 6, 3, dim], Layout::BSHD, Place::Heap);
                let (k, v) = (Store::of(&x, format), Store::of(&x, format));
                let read = |undo: bool, dtype: DType| {
                    let [mut keys, mut values] =
                        [(); 2].map(|()| Tensor::output(dtype, [2, 4, 3, dim], Layout::BHSD, Place::GuardAfter));
                    let from = Source::positions(&[2, 1]);
                    let mut read = KvRead::new(k.view(), v.view(), keys.view_mut(), values.view_mut(), from);
                    (read.k_hadamard, read.v_hadamard) = (undo.then_some(block), None);
                    kv_read(&level.context, &Threads(2), read).expect("a valid read");
                    (keys, values)
                };
                let (keys, values) = read(true, dst);
                let (plain, plain_values) = read(false, DType::F32);
                let want = moved(&level.context, &plain, dst, block);
                assert_eq!(keys.all_bits(), want.all_bits(), "{format} {dst} {dim}");
                assert_eq!(values.all_bits(), plain_values.cast(dst).all_bits(), "{format} {dst} {dim}");
                level.checked(Op::Hadamard, format.dtype().filter(|&f| f != DType::F32).unwrap_or(DType::F32), dst);
            }
        }
    }
}

/// Keys that are turned on, in place or from unrotated copies: out of the rotation, turned, and back.
fn turned_keys(level: &Level) {
    let mut rng = Rng::new(409);
    let frequencies = RopeFrequencies::new(16, 10_000.0, &RopeScaling::None).unwrap();
    for dim in thin(vec![16, 64, 80, 128]) {
        for format in formats_of(dim) {
            let (block, shape) = (hadamard_block(dim).unwrap(), [1, 12, 2, dim]);
            let keys = Tensor::random(&mut rng, DType::F32, [1, 12, 2, dim], Layout::BSHD, Place::Heap);
            let write = |cache: &mut Store, tokens: std::ops::Range<usize>, at: i32, position: i32| {
                let k = keys.cut(0..1, tokens.clone(), Layout::BSHD);
                let v =
                    Tensor::random(&mut Rng::new(1), DType::F32, [1, tokens.len(), 2, 2], Layout::BSHD, Place::Heap);
                let mut v_cache = Tensor::output(DType::F32, [1, 12, 2, 2], Layout::BSHD, Place::Heap);
                let (to, offsets) = ([at], [position]);
                let rope = Rope::new(Pairing::HalfSplit, 16, &frequencies, Positions::Offsets(&offsets));
                let to = Destination::positions(&to);
                let write = KvWrite::new(k.view(), v.view(), cache.view_mut(), v_cache.view_mut(), to);
                kv_write(&level.context, &Serial, write.rope(rope).k_hadamard(block)).expect("a valid write");
            };
            let rotation = KeyRotation::new(Pairing::HalfSplit, &frequencies).hadamard(block);
            let evicted = |running: bool| {
                let mut cache = Store::output(format, shape, Layout::BSHD);
                write(&mut cache, 0..12, 0, 0);
                let (mut layers, mut lengths) = ([KvLayer::keys(cache.view_mut())], [12]);
                let mut all = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
                if running {
                    let first = keys.cut(0..1, 0..2, Layout::BSHD);
                    let unrotated = UnrotatedKeys::new(first.view(), rotation);
                    all.evict_running(&level.context, &Serial, 0, 2..5, 0, &[Some(unrotated)]).expect("a valid call");
                } else {
                    all.evict(&level.context, &Serial, 0, 2..5, &[Some(rotation)]).expect("a valid call");
                }
                assert_eq!(lengths, [9]);
                cache
            };
            let mut want = Store::output(format, shape, Layout::BSHD);
            write(&mut want, 0..2, 0, 3);
            write(&mut want, 5..12, 2, 5);
            assert_same(&evicted(true), &want, [1, 9, 2, dim], &format!("{format} {dim}, running"));
            let mut want = Store::output(format, shape, Layout::BSHD);
            write(&mut want, 0..2, 0, 0);
            write(&mut want, 5..12, 2, 2);
            let got = evicted(false);
            // Two roundings of the format instead of one: the root of the mean square, relative to the keys.
            let most = match format {
                CacheFormat::F32 => 1e-6,
                CacheFormat::F16 => 6e-4,
                CacheFormat::Bf16 => 5e-3,
                CacheFormat::Int8 | CacheFormat::Q8_0 => 2e-2,
                CacheFormat::Fp8E4m3 => 8e-2,
                _ => 0.16,
            };
            let (mut off, mut all) = (0f64, 0f64);
            for at in indices([1, 9, 2, dim]) {
                off += (got.get(at) - want.get(at)).powi(2);
                all += want.get(at).powi(2);
            }
            let error = (off / all).sqrt();
            assert!(error > 0.0 && error <= most, "{format} {dim}: off by {error:e}");
        }
    }
}

/// The call of a case over rotated copies of its keys and values, whose heads have these blocks.
struct Rotated<'a> {
    case: &'a Case,
    blocks: [Option<usize>; 2],
    k: Tensor,
    v: Tensor,
}

impl<'a> Rotated<'a> {
    fn new(case: &'a Case) -> Self {
        let blocks = [&case.k, &case.v].map(|tensor| hadamard_block(tensor.shape[3]));
        Self::with_blocks(case, blocks)
    }

    fn with_blocks(case: &'a Case, blocks: [Option<usize>; 2]) -> Self {
        Self { case, blocks, k: rotated_tensor(&case.k, blocks[0]), v: rotated_tensor(&case.v, blocks[1]) }
    }

    fn options(&self) -> AttentionOptions<'_> {
        let mut options = self.case.options.borrow();
        [options.k_hadamard, options.v_hadamard] = self.blocks;
        options
    }

    #[track_caller]
    fn run(&self, level: &Level, runner: &dyn kvlane::Runner) -> Outcome {
        let workspace = &mut Workspace::new();
        let outcome = self.case.run_on(&level.context, runner, workspace, (&self.k, &self.v), self.options());
        level.checked(Op::Attention, self.k.dtype, self.v.dtype);
        outcome.expect("a valid call")
    }

    /// Checks a result against what the caches hold, by the bound of the kernel and the rounding of the two rotations in f32.
    #[track_caller]
    fn assert_close(&self, level: &Level, outcome: &Outcome, what: &str) {
        let undone = |tensor: &Tensor, block| {
            let mut plain = Tensor::output(DType::F32, tensor.shape, Layout::BSHD, Place::Heap);
            let numbers = rotated_array(&tensor.array(), block).data;
            let mut numbers = numbers.into_iter();
            plain.fill(|_| numbers.next().unwrap() as f32);
            plain
        };
        let (k, v) = (undone(&self.k, self.blocks[0]), undone(&self.v, self.blocks[1]));
        self.case.assert_close_to(&level.context, (&k, &v), outcome, &|| what.to_owned());
    }
}

/// Masks, biases, windows, softcaps, sinks, types and layouts of any kind.
fn random_calls(level: &Level) {
    let mut rng = Rng::new(410);
    for _ in 0..scaled(100) {
        let (case, what) = random_case(&mut rng);
        let call = Rotated::new(&case);
        let outcome = call.run(level, &Serial);
        call.assert_close(level, &outcome, &what);
        assert_eq!(call.run(level, &Threads(3)).all_bits(), outcome.all_bits(), "{what}: threads");
    }
}

fn head_sizes(level: &Level) {
    let mut rng = Rng::new(411);
    for kv in few(kv_types()) {
        for dim in thin(vec![64, 80, 96, 128, 192, 256, 512]) {
            for (tokens, group) in thin(vec![(1, 4), (5, 2), (40, 1)]) {
                let v_dim = if rng.chance(0.7) { dim } else { 64 };
                let shape = Shape { batch: 1, tokens, kv_heads: 2, group, keys: 70, dim, v_dim };
                let mut case = Case::new(&mut rng, shape, kv).with(|o| o.causal = true);
                case.q = case.q.cast(rng.pick(&DType::ALL));
                let largest = [dim, v_dim].map(hadamard_block);
                // As llama.cpp has them: values in blocks of 64.
                let of_values = [largest[0], largest[1].map(|block| block.min(64))];
                for blocks in [largest, rng.pick(&[of_values, [largest[0], None], [None, largest[1]]])] {
                    let call = Rotated::with_blocks(&case, blocks);
                    let outcome = call.run(level, &Serial);
                    call.assert_close(level, &outcome, &format!("{kv} {shape:?} {blocks:?}"));
                }
            }
        }
    }
}

/// Keys of every format with values of every other.
fn every_format(level: &Level) {
    let mut rng = Rng::new(412);
    if level.precision != Precision::Default {
        return;
    }
    // A format of keys meets one of values, another one for the next shape.
    let step = CacheFormat::ALL.len() + 1;
    let mut pairs = 0;
    for (tokens, group, keys) in few(vec![(5, 2, 130), (1, 1, 70), (1, 4, 200), (12, 3, 130)]) {
        for dim in few(vec![64, 80, 96, 128, 256]) {
            for k_format in formats_of(dim) {
                for v_format in formats_of(dim) {
                    pairs += 1;
                    if pairs % step != 0 {
                        continue;
                    }
                    let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys, dim, v_dim: dim };
                    let mut case = Case::new(&mut rng, shape, DType::F32);
                    case.options.causal = true;
                    case.options.lengths = Some(vec![keys as i32, keys as i32 - 30]);
                    let block = hadamard_block(dim).unwrap();
                    let k = Store::of(&rotated_tensor(&case.k, Some(block)), k_format);
                    let v = Store::of(&rotated_tensor(&case.v, Some(block)), v_format);
                    let mut out = Tensor::output(DType::F32, case.q.shape, Layout::BSHD, Place::Heap);
                    let tensors = AttentionTensors::new(case.q.view(), k.view(), v.view(), out.view_mut());
                    let options = case.options.borrow().precision(Precision::High).k_hadamard(block).v_hadamard(block);
                    // A plan fixes nothing of the rotation.
                    let plan = AttentionPlan::new(case.q.shape, case.k.shape, &options).expect("a valid plan");
                    let planned = AttentionOptions::new().precision(Precision::High);
                    let planned = planned.k_hadamard(block).v_hadamard(block).plan(&plan);
                    let options = if rng.chance(0.5) { options } else { planned };
                    attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).expect("a valid call");
                    let [k_shape, v_shape] = [case.k.shape, case.v.shape];
                    let (k, v) =
                        (rotated_array(&k.array(k_shape), Some(block)), rotated_array(&v.array(v_shape), Some(block)));
                    let number = |array: &Array, [b, s, h, d]: [usize; 4]| array.row(b, s, h)[d] as f32;
                    case.k.fill(|at| number(&k, at));
                    case.v.fill(|at| number(&v, at));
                    let want = case.oracle();
                    for at in indices(out.shape) {
                        let x = want.out.row(at[0], at[1], at[2])[at[3]];
                        let error = (f64::from(out.get(at)) - x).abs();
                        assert!(error <= 2e-5, "{k_format} {v_format} {shape:?} {at:?}: off by {error:e}");
                    }
                }
            }
        }
    }
}

/// Masked keys cannot reach an output, whatever they hold; a visible NaN reaches the elements of its block.
fn non_finite(level: &Level) {
    let mut rng = Rng::new(413);
    for kv in kv_types() {
        for (tokens, group) in [(1, 1), (1, 8), (30, 2)] {
            let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys: 140, dim: 96, v_dim: 96 };
            let case = Case::new(&mut rng, shape, kv).with(|o| o.lengths = Some(vec![60, 140]));
            let mut call = Rotated::new(&case);
            let clean = call.run(level, &Serial);
            for slot in 60..140 {
                call.k.poison_token(0, slot);
                call.v.poison_token(0, slot);
            }
            assert_eq!(call.run(level, &Serial).all_bits(), clean.all_bits(), "{kv} {tokens}: hidden poison");
            // Blocks of 32.
            call.v.set([1, 70, 1, 40], f32::NAN);
            let outcome = call.run(level, &Serial);
            for at in indices(outcome.out.shape) {
                let sees_it = at[0] == 1 && at[2] / group == 1 && at[3] / 32 == 1;
                assert_eq!(outcome.out.get(at).is_nan(), sees_it, "{kv} {tokens}: {at:?}");
            }
            let mut call = Rotated::new(&case);
            call.k.set([1, 70, 0, 3], f32::INFINITY);
            let outcome = call.run(level, &Serial);
            for [b, t, h, d] in indices(outcome.out.shape) {
                // A logit of +inf or NaN makes the softmax NaN; one of -inf has no weight.
                if b == 0 || h / group == 1 {
                    assert_eq!(outcome.out.bits([b, t, h, d]), clean.out.bits([b, t, h, d]), "{kv} {tokens}");
                }
            }
        }
    }
}

/// The bits of a row are the same in a prompt, in its pieces and token by token.
fn cut_prompts(level: &Level) {
    let mut rng = Rng::new(414);
    for kv in kv_types() {
        for dim in few(vec![80, 64, 256]) {
            for group in [1, 5] {
                let shape = Shape { batch: 1, tokens: 70, kv_heads: 2, group, keys: 70, dim, v_dim: dim };
                let mut case = Case::new(&mut rng, shape, kv).with(|o| o.causal = true);
                case.q = case.q.cast(rng.pick(&DType::ALL));
                let call = Rotated::new(&case);
                let whole = call.run(level, &Serial);
                for piece in [1, 3, 32] {
                    for first in (0..70).step_by(piece) {
                        let last = 70.min(first + piece);
                        let q = case.q.cut(0..1, first..last, Layout::BSHD);
                        let mut out =
                            Tensor::output(DType::F32, [1, last - first, 2 * group, dim], Layout::BSHD, Place::Heap);
                        let mut lse = vec![0.0; (last - first) * 2 * group];
                        let lengths = [last as i32];
                        let options = call.options().lengths(&lengths);
                        let tensors = AttentionTensors::new(q.view(), call.k.view(), call.v.view(), out.view_mut());
                        let workspace = &mut Workspace::new();
                        attention(&level.context, &Serial, workspace, tensors.lse(&mut lse), &options)
                            .expect("a valid call");
                        let part = Outcome { out, lse };
                        for t in first..last {
                            let bits = part.row_bits(0, t - first);
                            assert_eq!(
                                bits,
                                whole.row_bits(0, t),
                                "{kv} {dim} {group}: token {t} in pieces of {piece}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// States of segments are of rotated values; their merge has the bits of one call.
fn segments(level: &Level) {
    let mut rng = Rng::new(415);
    for kv in kv_types() {
        for (tokens, dim) in few(vec![(1, 64), (7, 96)]) {
            // The shorter sequence ends in the second segment, too.
            let keys = if few_cases() { SPLIT_GRID + 570 } else { 2 * SPLIT_GRID + 70 };
            let shape = Shape { batch: 2, tokens, kv_heads: 2, group: 3, keys, dim, v_dim: dim };
            let case = Case::new(&mut rng, shape, kv).with(|o| {
                o.causal = true;
                o.lengths = Some(vec![keys as i32, keys as i32 - 500]);
            });
            let call = Rotated::new(&case);
            let whole = call.run(level, &Serial);
            call.assert_close(level, &whole, "whole");
            assert_eq!(call.run(level, &Threads(4)).all_bits(), whole.all_bits(), "{kv} {dim}: chunks on threads");
            let mut states = Vec::new();
            for segment in [0..SPLIT_GRID, SPLIT_GRID..keys] {
                let (mut lengths, mut starts, mut offsets) = ([0; 2], [0; 2], [0; 2]);
                let lists = SegmentLists::new(case.options.lengths.as_deref().unwrap(), tokens);
                lists.local(segment.clone(), &mut lengths, &mut starts, &mut offsets).unwrap();
                let cut = |tensor: &Tensor| tensor.cut(0..2, segment.clone(), Layout::BSHD);
                let (k, v) = (cut(&call.k), cut(&call.v));
                let mut own = vec![f32::NAN; chunk_states_len(case.q.shape, segment.len(), dim)];
                let options = call.options().lengths(&lengths).offsets(&offsets);
                let (tensors, workspace) = ((case.q.view(), k.view(), v.view()), &mut Workspace::new());
                attention_chunks(&level.context, &Serial, workspace, tensors, &options, &mut own)
                    .expect("a valid call");
                states.push(own);
            }
            let parts: Vec<&[f32]> = states.iter().map(Vec::as_slice).collect();
            let mut merge = ChunkMerge::new(2, kv, kv).precision(precision());
            merge.v_hadamard = call.blocks[1];
            let mut out = Tensor::output(DType::F32, whole.out.shape, Layout::BSHD, Place::GuardAfter);
            let mut lse = vec![0.0; whole.lse.len()];
            let (view, workspace) = (out.view_mut(), &mut Workspace::new());
            merge_chunks(&level.context, &Serial, workspace, &parts, &merge, view, Some(&mut lse))
                .expect("a valid call");
            assert_eq!(Outcome { out, lse }.all_bits(), whole.all_bits(), "{kv} {dim}: segments");
        }
    }
}

/// A shared prefix is rotated as the sequences' own keys and values are.
fn prefixes(level: &Level) {
    let mut rng = Rng::new(416);
    for kv in kv_types() {
        let shape = Shape { batch: 3, tokens: 2, kv_heads: 2, group: 2, keys: 90, dim: 80, v_dim: 64 };
        let mut case = Case::new(&mut rng, shape, kv).with(|o| o.lengths = Some(vec![90; 3]));
        // The first 40 tokens are those of sequence 0.
        for tensor in [&mut case.k, &mut case.v] {
            for at in indices([3, 40, 2, tensor.shape[3]]) {
                let bits = tensor.bits([0, at[1], at[2], at[3]]);
                tensor.set_element_bits(at, bits);
            }
        }
        let call = Rotated::new(&case);
        let prefix = [&call.k, &call.v].map(|tensor| tensor.cut(0..1, 0..40, Layout::BSHD));
        let own = [&call.k, &call.v].map(|tensor| tensor.cut(0..3, 40..90, Layout::BSHD));
        let mut out = Tensor::output(DType::F32, [3, 2, 4, 64], Layout::BSHD, Place::Heap);
        let mut lse = vec![0.0; 24];
        let mut options = AttentionOptions::new().precision(precision());
        [options.k_hadamard, options.v_hadamard] = call.blocks;
        let tensors = AttentionTensors::new(case.q.view(), own[0].view(), own[1].view(), out.view_mut()).lse(&mut lse);
        let shared = SharedPrefix::new(prefix[0].view(), prefix[1].view());
        let workspace = &mut Workspace::new();
        attention_with_prefix(&level.context, &Serial, workspace, shared, tensors, &options).expect("a valid call");
        let [k, v] = formats(kv, kv);
        assert_eq!(level.context.attention_kernels(k, v, precision())[0].isa, level.isa);
        call.assert_close(level, &Outcome { out, lse }, &format!("{kv}"));
    }
}

fn refused() {
    let context = Context::new().unwrap();
    let x = Tensor::random(&mut Rng::new(417), DType::F32, [1, 2, 1, 96], Layout::BSHD, Place::Heap);
    let mut y = Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap);
    let cases = [
        (0, Status::InvalidValue, "block is 0, which is no power of two from 2 to 512"),
        (1, Status::InvalidValue, "block is 1, which"),
        (48, Status::InvalidValue, "block is 48, which"),
        (1024, Status::InvalidValue, "block is 1024, which"),
        (64, Status::Shape, "block is 64, which does not divide the dim = 96 of src"),
    ];
    for (block, status, words) in cases {
        let error = hadamard(&context, &Serial, x.view(), y.view_mut(), block).unwrap_err();
        assert!(error.status() == status && error.message().contains(words), "{error}");
        y.assert_untouched();
        let [mut k, mut v] = [(); 2].map(|()| Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap));
        for of_keys in [true, false] {
            let named = words.replacen("block", if of_keys { "k_hadamard" } else { "v_hadamard" }, 1);
            let (name, of) = if of_keys { ("of k", "of src") } else { ("of v", "of src") };
            let named = named.replace(of, name);
            let set = |k: &mut Option<usize>, v: &mut Option<usize>| *if of_keys { k } else { v } = Some(block);
            let to = Destination::positions(&[0]);
            let mut write = KvWrite::new(x.view(), x.view(), k.view_mut(), v.view_mut(), to);
            set(&mut write.k_hadamard, &mut write.v_hadamard);
            let error = kv_write(&context, &Serial, write).unwrap_err();
            assert!(error.status() == status && error.message().contains(&named), "{error}");
            let from = Source::positions(&[0]);
            let mut read = KvRead::new(x.view(), x.view(), k.view_mut(), v.view_mut(), from);
            set(&mut read.k_hadamard, &mut read.v_hadamard);
            let error = kv_read(&context, &Serial, read).unwrap_err();
            assert!(error.status() == status && error.message().contains(&named), "{error}");
            let mut options = AttentionOptions::new();
            set(&mut options.k_hadamard, &mut options.v_hadamard);
            let tensors = AttentionTensors::new(x.view(), x.view(), x.view(), y.view_mut());
            let error = attention(&context, &Serial, &mut Workspace::new(), tensors, &options).unwrap_err();
            assert!(error.status() == status && error.message().contains(&named), "{error}");
        }
        [&k, &v, &y].iter().for_each(|tensor| tensor.assert_untouched());
        let states = vec![0.0; 2 * (96 + 16)];
        let merge = ChunkMerge::new(1, DType::F32, DType::F32).v_hadamard(block);
        let error = merge_chunks(&context, &Serial, &mut Workspace::new(), &[&states], &merge, y.view_mut(), None);
        let error = error.unwrap_err();
        assert!(error.status() == status && error.message().contains("v_hadamard"), "{error}");
        let frequencies = RopeFrequencies::new(16, 10_000.0, &RopeScaling::None).unwrap();
        let mut layers = [KvLayer::keys(k.view_mut())];
        let mut lengths = [2];
        let rotation = KeyRotation::new(Pairing::HalfSplit, &frequencies).hadamard(block);
        let mut cache = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
        let error = cache.evict(&context, &Serial, 0, 0..1, &[Some(rotation)]).unwrap_err();
        assert!(error.status() == status && error.message().contains("hadamard"), "{error}");
    }
    // Heads that pass through the stack have a largest size.
    let x = Tensor::random(&mut Rng::new(418), DType::F32, [1, 1, 1, 8192], Layout::BSHD, Place::Heap);
    let [mut k, mut v] = [(); 2].map(|()| Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap));
    let write = KvWrite::new(x.view(), x.view(), k.view_mut(), v.view_mut(), Destination::positions(&[0]));
    let error = kv_write(&context, &Serial, write.k_norm(RmsNorm::new(1e-6)).k_hadamard(512)).unwrap_err();
    assert!(error.status() == Status::Shape && error.message().contains("8192"), "{error}");
    k.assert_untouched();
    let write = KvWrite::new(x.view(), x.view(), k.view_mut(), v.view_mut(), Destination::positions(&[0]));
    kv_write(&context, &Serial, write.k_hadamard(512).v_hadamard(2)).expect("a valid write");
}
