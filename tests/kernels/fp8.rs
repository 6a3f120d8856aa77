//! Caches of eight-bit floats: rounded by the definition, to the bit at every level; read, moved, inserted and evicted.

use crate::common::attention::{Case, Shape};
use crate::common::fp8::{CANARY, Fp8, Quantised, Scales, magnitudes, nearest, number, quantise};
use crate::common::int8::{Int8, quantise as quantise_int8, scale_shape};
use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, scaled, thin};
use crate::harness::{Level, tests};
use crate::quantised::{self, Bytes, Written, head_of, insert};
use crate::write::rounded;
use kvlane::{
    AttentionOptions, AttentionState, AttentionTensors, CacheFormat, CacheView, CacheViewMut, DType, Destination,
    KvCache, KvLayer, KvRead, KvWrite, Layout as Slots, Op, Packing, Pairing, Runner, Serial, SharedPrefix, Source,
    Status, View, ViewMut, Workspace, attention, attention_with_prefix, copy_pages, defragment_pages, kv_read,
    kv_write, merge_states,
};

tests! {
    levels: every_rounding, every_unit, head_sizes_and_layouts, every_layout, fused_with_norm_and_rope, scales_of_every_kind,
        large_numbers, nan_in_a_unit, moves, inserted_rows, turned_keys, recent_window;
    once: the_definition, refused;
}

const FORMATS: [CacheFormat; 2] = [CacheFormat::Fp8E4m3, CacheFormat::Fp8E5m2];

impl Written for Fp8 {
    fn format(&self) -> CacheFormat {
        self.format
    }
    fn view(&self) -> CacheView<'_> {
        self.view()
    }
    fn element(&self, at: [usize; 4]) -> f32 {
        self.get(at) as f32
    }
    fn view_mut(&mut self) -> CacheViewMut<'_> {
        self.view_mut()
    }

    #[track_caller]
    fn assert_written(&self, src: &Tensor, to: &Destination, what: &str) {
        quantised::assert_written(self, src, to, what);
    }
}

impl Bytes for Fp8 {
    fn shape(&self) -> [usize; 4] {
        self.shape
    }
    fn head(&self, b: usize, s: usize, h: usize) -> Vec<u8> {
        self.head(b, s, h)
    }
    fn quantised(&self, elements: &[f32], head: usize) -> Vec<u8> {
        quantise(self.format, elements, self.scales.of(head))
    }
    fn assert_gaps(&self) {
        self.assert_gaps();
    }
}

fn output(rng: &mut Rng, shape: [usize; 4], at: Place) -> Fp8 {
    let scales = rng.pick(&[0, 1, 2, 3]);
    Fp8::output(rng.pick(&FORMATS), shape, Layout::random(rng), at, Scales::kinds(shape[2])[scales].clone())
}

/// Random units that are numbers.
fn random(rng: &mut Rng, format: CacheFormat, shape: [usize; 4], scales: Scales) -> Fp8 {
    let mut cache = Fp8::output(format, shape, Layout::random(rng), Place::GuardAfter, scales);
    let last = magnitudes(format).len();
    for at in indices(shape) {
        cache.set_unit(at, rng.below(last) as u8 | if rng.chance(0.5) { 0x80 } else { 0 });
    }
    cache
}

/// Writes a token of one head.
fn write_head(level: &Level, k: &Tensor, cache: &mut Fp8) {
    let v = Tensor::input(k.dtype, [1, 1, 1, 0], Layout::BSHD, Place::Heap);
    let mut v_cache = Tensor::output(k.dtype, [1, 1, 1, 0], Layout::BSHD, Place::Heap);
    let to = Destination::positions(&[0]);
    let write = KvWrite::new(k.view(), v.view(), cache.view_mut(), v_cache.view_mut(), to);
    kv_write(&level.context, &Serial, write).expect("a valid write");
}

/// All numbers of f16 and bf16; in f32 all numbers of the format, all ties, and their neighbours; and random numbers.
fn every_rounding(level: &Level) {
    let mut rng = Rng::new(401);
    for format in FORMATS {
        let all = magnitudes(format);
        let mut edges: Vec<f32> = vec![0.0, f32::MIN_POSITIVE, f32::from_bits(1), f32::MAX, f32::INFINITY, f32::NAN];
        for (i, &x) in all.iter().enumerate() {
            // Beyond the last number as if there were one more.
            let next = all.get(i + 1).copied().unwrap_or(2.0 * x - all[i - (i > 0) as usize]);
            for y in [x, (x + next) / 2.0] {
                let y = y as f32;
                edges.extend([y, y.next_up(), y.next_down()]);
            }
        }
        edges.extend((0..scaled(20000)).map(|_| {
            let size = 2f32.powi(rng.between(0, 40) as i32 - 22);
            size * rng.f32()
        }));
        edges.extend(edges.clone().iter().map(|x| -x));
        edges.extend((0..scaled(5000)).map(|_| f32::from_bits(rng.u64() as u32)));
        for src in DType::ALL {
            let patterns: Vec<u32> = match src {
                DType::F32 => edges.iter().map(|x| x.to_bits()).collect(),
                _ => thin((0..=0xffff).collect()),
            };
            for scales in Scales::kinds(1) {
                let shape = [1, 1, 1, patterns.len()];
                let mut k = Tensor::input(src, shape, Layout::BSHD, Place::GuardAfter);
                indices(shape).for_each(|at| k.set_element_bits(at, patterns[at[3]]));
                let mut cache = Fp8::output(format, shape, Layout::BSHD, Place::GuardAfter, scales.clone());
                write_head(level, &k, &mut cache);
                level.checked(Op::KvWrite, src, format);
                let head = head_of(&k, 0, 0, 0);
                let wanted = quantise(format, &head, scales.of(0));
                for (d, x) in head.iter().enumerate() {
                    let unit = cache.unit([0, 0, 0, d]);
                    assert_eq!(unit, wanted[d], "{format} of {x:e} ({src}, {scales:?})");
                    assert_eq!(number(format, unit).is_nan(), x.is_nan());
                }
                cache.assert_gaps();
            }
        }
    }
}

/// All 256 units, read to every type, at every place of a vector.
fn every_unit(level: &Level) {
    for format in FORMATS {
        for dst in DType::ALL {
            for scales in Scales::kinds(1) {
                for dim in thin((240..=256).chain([1, 3, 7]).collect()) {
                    let mut cache =
                        Fp8::output(format, [1, 1, 1, dim], Layout::BSHD, Place::GuardAfter, scales.clone());
                    (0..dim).for_each(|d| cache.set_unit([0, 0, 0, d], (256 - dim + d) as u8));
                    let mut k = Tensor::output(dst, [1, 1, 1, dim], Layout::BSHD, Place::GuardAfter);
                    let mut v = Tensor::output(dst, [1, 1, 1, dim], Layout::STEP2, Place::GuardAfter);
                    let from = Source::positions(&[0]);
                    let read = KvRead::new(cache.view(), cache.view(), k.view_mut(), v.view_mut(), from);
                    kv_read(&level.context, &Serial, read).expect("a valid read");
                    level.checked(Op::KvRead, format, dst);
                    for d in 0..dim {
                        let at = [0, 0, 0, d];
                        let x = cache.get(at) as f32;
                        for read in [&k, &v] {
                            if x.is_nan() {
                                assert!(read.get(at).is_nan(), "unit {:#x} of {format}", cache.unit(at));
                            } else {
                                assert_eq!(read.bits(at), rounded(dst, x), "unit {:#x} of {format}", cache.unit(at));
                            }
                        }
                    }
                    k.assert_gaps();
                    v.assert_gaps();
                }
            }
        }
    }
}

fn head_sizes_and_layouts(level: &Level) {
    let mut rng = Rng::new(402);
    for dim in thin((1..=70).chain([127, 128, 255, 256, 257, 300, 511, 512, 600]).collect()) {
        for src in DType::ALL {
            let at = rng.pick(&[Place::GuardAfter, Place::GuardBefore, Place::Heap]);
            let layouts = [(); 2].map(|()| rng.pick(&Layout::ALL));
            let k = Tensor::random(&mut rng, src, [2, 3, 2, dim], layouts[0], at);
            let v = Tensor::random(&mut rng, src, [2, 3, 2, 5], layouts[1], at);
            let (mut k_cache, mut v_cache) = (output(&mut rng, [2, 8, 2, dim], at), output(&mut rng, [2, 8, 2, 5], at));
            let to = Destination::positions(&[5, 0]);
            let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
            kv_write(&level.context, &Serial, write).expect("a valid write");
            k_cache.assert_written(&k, &to, &format!("{src} {dim} {layouts:?} {at:?}"));
            v_cache.assert_written(&v, &to, &format!("values, {src} {layouts:?} {at:?}"));
        }
    }
}

fn every_layout(level: &Level) {
    quantised::every_layout(level, &mut Rng::new(403), |rng| rng.between(1, 40), output);
}

fn fused_with_norm_and_rope(level: &Level) {
    quantised::fused_with_norm_and_rope(level, &mut Rng::new(404), (23, 11), output);
}

/// Attention with no scales, one, and one per head, of both types, is that over what the cache stands for.
fn scales_of_every_kind(level: &Level) {
    let mut rng = Rng::new(405);
    for (tokens, group, keys) in thin(vec![(1, 1, 70), (1, 4, 200), (1, 6, 66), (1, 7, 70), (40, 3, 130)]) {
        let shape = Shape { batch: 2, tokens, kv_heads: 3, group, keys, dim: 48, v_dim: 33 };
        for (i, k_scales) in Scales::kinds(3).into_iter().enumerate() {
            for (j, v_scales) in Scales::kinds(3).into_iter().enumerate() {
                let mut case = Case::new(&mut rng, shape, DType::F32);
                case.options.causal = true;
                let k = Fp8::of(&case.k, FORMATS[(i + j) % 2], k_scales.clone(), Place::GuardAfter);
                let v = Fp8::of(&case.v, FORMATS[j % 2], v_scales.clone(), Place::GuardAfter);
                let mut out = Tensor::output(DType::F32, [2, tokens, 3 * group, 33], Layout::BSHD, Place::Heap);
                let tensors = AttentionTensors::new(case.q.view(), k.view(), v.view(), out.view_mut());
                attention(&level.context, &Serial, &mut Workspace::new(), tensors, &case.options.borrow())
                    .expect("valid");
                level.checked(Op::Attention, k.format, v.format);
                case.k.fill(|at| k.get(at) as f32);
                case.v.fill(|at| v.get(at) as f32);
                let want = case.oracle();
                for at in indices(out.shape) {
                    let x = want.out.row(at[0], at[1], at[2])[at[3]];
                    let error = (f64::from(out.get(at)) - x).abs();
                    assert!(error <= 2e-5, "{k_scales:?} {v_scales:?} {shape:?} {at:?}: off by {error:e}");
                }
            }
        }
    }
}

/// Queries and scales so large that no power of two more fits into them: a query has the bits of one over the numbers in f32, and
/// outputs are the outputs of a small scale, times what scales differ by.
fn large_numbers(level: &Level) {
    let mut rng = Rng::new(411);
    for (kv_heads, group, dim) in [(1, 4, 128), (3, 1, 40), (2, 3, 16)] {
        let shape = Shape { batch: 1, tokens: 1, kv_heads, group, keys: 150, dim, v_dim: dim };
        let case = Case::new(&mut rng, shape, DType::F32);
        let of = |x: &Tensor, scale: f32| Fp8::of(x, FORMATS[0], Scales::F32(vec![scale]), Place::Heap);
        let run = |q: &Tensor, k: CacheView, v: CacheView| {
            let mut out = Tensor::output(DType::F32, q.shape, Layout::BSHD, Place::Heap);
            let tensors = AttentionTensors::new(q.view(), k, v, out.view_mut());
            attention(&level.context, &Serial, &mut Workspace::new(), tensors, &case.options.borrow()).unwrap();
            out
        };
        for large in [1.0, 3e36] {
            let mut q = case.q.to(Layout::BSHD, Place::Heap);
            let (mut k, v) = (of(&case.k, 1.0), of(&case.v, 1.0));
            for at in indices(q.shape) {
                if at[3] == 5 {
                    q.set(at, q.get(at) * large);
                }
            }
            // Small, so that products are finite.
            for [b, s, h, _] in indices([1, 150, kv_heads, 1]) {
                k.set_unit([b, s, h, 5], [0, 1, 0x80, 2][s % 4]);
            }
            let [mut k_numbers, mut v_numbers] = [&case.k, &case.v].map(|x| x.to(Layout::BSHD, Place::Heap));
            k_numbers.fill(|at| k.get(at) as f32);
            v_numbers.fill(|at| v.get(at) as f32);
            let found = run(&q, k.view(), v.view());
            let wanted = run(&q, k_numbers.view().into(), v_numbers.view().into());
            assert_eq!(found.all_bits(), wanted.all_bits(), "queries times {large}, {shape:?}");
        }
        let power = 2f32.powi(122);
        let k = of(&case.k, 1.0);
        let mut v = of(&case.v, 1.0);
        let small = run(&case.q, k.view(), v.view());
        v.scales = Scales::F32(vec![power]);
        let large = run(&case.q, k.view(), v.view());
        for at in indices(small.shape) {
            assert_eq!(large.get(at), small.get(at) * power, "{shape:?} {at:?}");
        }
    }
}

/// NaN in a visible unit reaches the output; in a unit that no query sees it does not.
fn nan_in_a_unit(level: &Level) {
    let mut rng = Rng::new(406);
    for (tokens, group) in [(1, 1), (1, 8), (30, 2)] {
        for of_keys in [true, false] {
            for format in FORMATS {
                let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys: 90, dim: 16, v_dim: 16 };
                let mut case = Case::new(&mut rng, shape, DType::F32);
                case.options.lengths = Some(vec![60, 90]);
                let [mut k, mut v] = [&case.k, &case.v].map(|x| Fp8::of(x, format, Scales::None, Place::Heap));
                let poisoned = if of_keys { &mut k } else { &mut v };
                // Sequence 0 sees 60 keys, sequence 1 all.
                (60..90).for_each(|s| poisoned.set_unit([0, s, 1, s % 16], [0x7f, 0xff, 0x7e, 0xfc][s % 4]));
                poisoned.set_unit([1, 40, 1, 3], 0xff);
                let mut out = Tensor::output(DType::F32, case.q.shape, Layout::BSHD, Place::Heap);
                let tensors = AttentionTensors::new(case.q.view(), k.view(), v.view(), out.view_mut());
                attention(&level.context, &Serial, &mut Workspace::new(), tensors, &case.options.borrow())
                    .expect("valid");
                for at in indices(out.shape) {
                    let sees_it = at[0] == 1 && at[2] / group == 1 && (of_keys || at[3] == 3);
                    assert_eq!(out.get(at).is_nan(), sees_it, "{format}, keys {of_keys}, {tokens} tokens, {at:?}");
                }
            }
        }
    }
}

/// A cache of which a plain mirror holds the units as elements.
struct Mirrored {
    cache: Fp8,
    mirror: Tensor,
}

impl Mirrored {
    fn random(rng: &mut Rng, shape: [usize; 4]) -> Self {
        let scales = rng.pick(&[0, 1, 2, 3]);
        let format = rng.pick(&FORMATS);
        let cache = random(rng, format, shape, Scales::kinds(shape[2])[scales].clone());
        let mut mirror = Tensor::output(DType::F32, shape, Layout::random(rng), Place::Heap);
        mirror.fill(|at| cache.unit(at).into());
        Self { cache, mirror }
    }

    #[track_caller]
    fn check(&self, what: &str) {
        for at in indices(self.mirror.shape) {
            assert_eq!(f32::from(self.cache.unit(at)), self.mirror.get(at), "{what}: {at:?}");
        }
        self.cache.assert_gaps();
    }
}

/// Operations that move tokens move units to the bit, and write no scale.
fn moves(level: &Level) {
    let mut rng = Rng::new(407);
    for _ in 0..scaled(60).max(6) {
        let (heads, dim, v_dim) = (rng.between(1, 4), rng.between(1, 40), rng.between(1, 40));
        let mut k = Mirrored::random(&mut rng, [4, 20, heads, dim]);
        let mut v = Mirrored::random(&mut rng, [4, 20, heads, v_dim]);
        let scales = [format!("{:?}", k.cache.scales), format!("{:?}", v.cache.scales)];
        let lengths = [rng.between(1, 20) as i32, rng.between(3, 20) as i32, rng.between(0, 20) as i32, 20];
        let runner: &dyn Runner = rng.pick::<&dyn Runner>(&[&Serial, &Threads(3)]);
        let paged = [[0, 2], [1, 3]].map(|pages| pages.to_vec()).concat();
        let mut both = |what: &str, call: &dyn Fn(&mut [KvLayer])| {
            let mut layers = [KvLayer::new(k.cache.view_mut(), v.cache.view_mut())];
            call(&mut layers);
            let mut layers = [KvLayer::new(k.mirror.view_mut(), v.mirror.view_mut())];
            call(&mut layers);
            k.check(&format!("keys, {what}"));
            v.check(&format!("values, {what}"));
        };
        let parents: Vec<i32> = (0..4).map(|_| rng.below(4) as i32).collect();
        let context = &level.context;
        both("reorder", &|layers| {
            let mut lengths = lengths;
            let mut cache = KvCache::new(layers, Slots::Contiguous, &mut lengths);
            cache.reorder(context, runner, &mut Workspace::new(), &parents).unwrap();
        });
        both("copied prefix", &|layers| {
            let mut lengths = lengths;
            KvCache::new(layers, Slots::Contiguous, &mut lengths).copy_prefix(context, runner, 1, &[3, 0], 3).unwrap();
        });
        both("evicted", &|layers| {
            let mut lengths = lengths;
            KvCache::new(layers, Slots::Contiguous, &mut lengths).evict(context, runner, 3, 2..7, &[]).unwrap();
        });
        both("evicted from pages", &|layers| {
            let mut lengths = [33, 21];
            KvCache::new(layers, Slots::paged(&paged, 2), &mut lengths).evict(context, runner, 0, 1..9, &[]).unwrap();
        });
        both("copied pages", &|layers| copy_pages(context, runner, layers, &[[3, 1], [0, 2]]).unwrap());
        both("defragmented", &|layers| {
            let (mut pages, mut map) = ([3, 1, -1, -1], [0; 4]);
            defragment_pages(context, runner, layers, &mut pages, 2, &[30, 0], &mut map).unwrap();
        });
        both("reset", &|layers| {
            let mut lengths = lengths;
            KvCache::new(layers, Slots::Contiguous, &mut lengths).reset(runner, &[2, 0], true).unwrap();
        });
        assert_eq!(scales, [format!("{:?}", k.cache.scales), format!("{:?}", v.cache.scales)]);
    }
}

/// A sequence goes into a cache of another format or other scales, and keeps its units where both are the same.
fn inserted_rows(level: &Level) {
    let mut rng = Rng::new(408);
    for (heads, dim) in [(1, 5), (3, 16), (2, 300)] {
        let shape = [2, 7, heads, dim];
        let kinds = Scales::kinds(heads);
        for (from, to) in (0..4).flat_map(|from| (0..4).map(move |to| (from, to))) {
            for (f, t) in FORMATS.into_iter().flat_map(|f| FORMATS.map(|t| (f, t))) {
                let mut source = random(&mut rng, f, shape, kinds[from].clone());
                let mut target = Fp8::output(t, shape, Layout::random(&mut rng), Place::GuardAfter, kinds[to].clone());
                insert(level, KvLayer::keys(target.view_mut()), KvLayer::keys(source.view_mut()));
                for [b, s, h, _] in indices(scale_shape(shape)) {
                    let wanted = if b == 1 || s >= 5 {
                        vec![CANARY; dim]
                    } else if f == t && (0..heads).all(|h| kinds[from].of(h) == kinds[to].of(h)) {
                        source.head(1, s, h)
                    } else {
                        let read: Vec<f32> = (0..dim).map(|d| source.get([1, s, h, d]) as f32).collect();
                        quantise(t, &read, kinds[to].of(h))
                    };
                    assert_eq!(target.head(b, s, h), wanted, "{f} to {t}, {:?} to {:?}", kinds[from], kinds[to]);
                }
                target.assert_gaps();
            }
        }
        // To and from elements, and to and from int8.
        for (format, scales) in FORMATS.into_iter().zip([&kinds[1], &kinds[3]]) {
            let mut source = random(&mut rng, format, shape, scales.clone());
            let read = |s: usize, h: usize| -> Vec<f32> { (0..dim).map(|d| source.get([1, s, h, d]) as f32).collect() };
            let heads_read: Vec<Vec<f32>> = indices([1, 5, heads, 1]).map(|[_, s, h, _]| read(s, h)).collect();
            for dtype in DType::ALL {
                let mut plain = Tensor::output(dtype, shape, Layout::random(&mut rng), Place::GuardAfter);
                insert(level, KvLayer::keys(plain.view_mut()), KvLayer::keys(source.view_mut()));
                for [_, s, h, d] in indices([1, 5, heads, dim]) {
                    assert_eq!(plain.bits([0, s, h, d]), rounded(dtype, heads_read[s * heads + h][d]));
                }
                let mut elements = Tensor::random(&mut rng, dtype, shape, Layout::BHSD, Place::GuardAfter);
                let wanted: Vec<Vec<f32>> =
                    indices([1, 5, heads, 1]).map(|[_, s, h, _]| head_of(&elements, 1, s, h)).collect();
                let mut target = Fp8::output(format, shape, Layout::STEP2, Place::GuardAfter, scales.clone());
                insert(level, KvLayer::keys(target.view_mut()), KvLayer::keys(elements.view_mut()));
                for [_, s, h, _] in indices([1, 5, heads, 1]) {
                    assert_eq!(target.head(0, s, h), quantise(format, &wanted[s * heads + h], scales.of(h)));
                }
            }
            let mut int8 = Int8::output(shape, Layout::BSHD, DType::F32, Layout::BHSD, Place::GuardAfter);
            insert(level, KvLayer::keys(int8.view_mut()), KvLayer::keys(source.view_mut()));
            for [_, s, h, _] in indices([1, 5, heads, 1]) {
                let (units, scale) = quantise_int8(&heads_read[s * heads + h], DType::F32);
                assert_eq!(int8.head(0, s, h), (units, scale.to_bits()));
            }
            let mut full = Int8::of(
                &Tensor::random(&mut rng, DType::F32, shape, Layout::BSHD, Place::Heap),
                DType::F32,
                Place::Heap,
            );
            let wanted: Vec<Vec<f32>> = indices([1, 5, heads, 1])
                .map(|[_, s, h, _]| (0..dim).map(|d| full.get([1, s, h, d])).collect())
                .collect();
            let mut target = Fp8::output(format, shape, Layout::BHSD, Place::GuardAfter, scales.clone());
            insert(level, KvLayer::keys(target.view_mut()), KvLayer::keys(full.view_mut()));
            for [_, s, h, _] in indices([1, 5, heads, 1]) {
                assert_eq!(target.head(0, s, h), quantise(format, &wanted[s * heads + h], scales.of(h)));
            }
        }
    }
}

/// Keys that are turned after an eviction are read, rotated in f32 and rounded again with the same scales.
fn turned_keys(level: &Level) {
    let mut rng = Rng::new(409);
    for (pairing, heads) in [(Pairing::HalfSplit, 1), (Pairing::Interleaved, 3), (Pairing::HalfSplit, 90)] {
        for (format, scales) in FORMATS.into_iter().flat_map(|f| Scales::kinds(heads).map(|scales| (f, scales))) {
            let mut k = random(&mut rng, format, [2, 12, heads, 19], scales);
            quantised::turned_keys(level, pairing, &mut k);
        }
    }
}

/// A quantised past, and recent tokens in full precision: two calls merged have the bits of one with a prefix, and those of a past that
/// was written at once, however its tokens came there.
fn recent_window(level: &Level) {
    let mut rng = Rng::new(410);
    let (context, heads, group, dim, capacity) = (&level.context, 2, 3, 40, 12);
    for (past_format, window_type) in [
        (CacheFormat::Int8, DType::F32),
        (CacheFormat::Fp8E4m3, DType::Bf16),
        (CacheFormat::Fp8E5m2, DType::F16),
        (CacheFormat::Int8, DType::Bf16),
    ] {
        let tokens = 33;
        let all =
            [(); 2].map(|()| Tensor::random(&mut rng, window_type, [1, tokens, heads, dim], Layout::BSHD, Place::Heap));
        let empty = |n: usize| {
            let zeros = Tensor::output(DType::F32, [1, n, heads, dim], Layout::BSHD, Place::Heap);
            let mut zeros = zeros.cast(DType::F32);
            zeros.fill(|_| 0.0);
            Quantised::of(&zeros, past_format, Place::Heap)
        };
        let [mut past_k, mut past_v] = [empty(tokens), empty(tokens)];
        let mut window =
            [(); 2].map(|()| Tensor::output(window_type, [1, capacity, heads, dim], Layout::BSHD, Place::Heap));
        let (mut past, mut held) = (0i32, [0i32]);
        for token in 0..tokens {
            if held[0] as usize == capacity {
                // The oldest five tokens of the window are quantised.
                let n = 5;
                let mut oldest =
                    [(); 2].map(|()| Tensor::output(window_type, [1, n, heads, dim], Layout::BSHD, Place::Heap));
                let [k, v] = &mut oldest;
                let [window_k, window_v] = &mut window;
                let from = Source::positions(&[0]);
                let read = KvRead::new(window_k.view(), window_v.view(), k.view_mut(), v.view_mut(), from);
                kv_read(context, &Serial, read).unwrap();
                let (at, counts) = ([past], [n as i32]);
                let to = Destination::positions(&at).counts(&counts);
                let write = KvWrite::new(k.view(), v.view(), past_k.view_mut(), past_v.view_mut(), to);
                kv_write(context, &Serial, write).unwrap();
                past += n as i32;
                let mut layers = [KvLayer::new(window_k.view_mut(), window_v.view_mut())];
                KvCache::new(&mut layers, Slots::Contiguous, &mut held).evict(context, &Serial, 0, 0..n, &[]).unwrap();
            }
            let [k, v] = all.each_ref().map(|all| all.cut(0..1, token..token + 1, Layout::BSHD));
            let [window_k, window_v] = &mut window;
            let to = Destination::positions(&held);
            kv_write(context, &Serial, KvWrite::new(k.view(), v.view(), window_k.view_mut(), window_v.view_mut(), to))
                .unwrap();
            held[0] += 1;
        }
        let q = Tensor::random(&mut rng, DType::F32, [1, 2, heads * group, dim], Layout::BSHD, Place::Heap);
        let output = || Tensor::output(DType::F32, q.shape, Layout::BSHD, Place::Heap);
        let (past_lengths, options) = ([past], AttentionOptions::new().causal(true).lengths(&held));
        let part = |k: CacheView, v: CacheView, options: &AttentionOptions| {
            let (mut out, mut lse) = (output(), vec![0f32; 2 * heads * group]);
            let tensors = AttentionTensors::new(q.view(), k, v, out.view_mut()).lse(&mut lse);
            attention(context, &Serial, &mut Workspace::new(), tensors, options).unwrap();
            (out, lse)
        };
        let merged = |past_k: CacheView, past_v: CacheView, k: CacheView, v: CacheView| {
            let (before, before_lse) = part(past_k, past_v, &AttentionOptions::new().lengths(&past_lengths));
            let (recent, recent_lse) = part(k, v, &options);
            let mut out = output();
            let states =
                [AttentionState::new(before.view(), &before_lse), AttentionState::new(recent.view(), &recent_lse)];
            merge_states(context, &Serial, &states, out.view_mut(), None).unwrap();
            out
        };
        let [window_k, window_v] = &window;
        let found = merged(past_k.view(), past_v.view(), window_k.view().into(), window_v.view().into());

        // The past, written at once.
        let [mut once_k, mut once_v] = [empty(tokens), empty(tokens)];
        let [k, v] = all.each_ref().map(|all| all.cut(0..1, 0..past as usize, Layout::BSHD));
        let to = Destination::positions(&[0]);
        kv_write(context, &Serial, KvWrite::new(k.view(), v.view(), once_k.view_mut(), once_v.view_mut(), to)).unwrap();
        let [recent_k, recent_v] = all.each_ref().map(|all| all.cut(0..1, past as usize..tokens, Layout::BHSD));
        let at_once = merged(once_k.view(), once_v.view(), recent_k.view().into(), recent_v.view().into());
        assert_eq!(found.all_bits(), at_once.all_bits(), "{past_format} {window_type}");

        // One call with the past as a prefix.
        let mut one = output();
        let n = past as usize;
        let prefix = SharedPrefix::new(past_k.view().seq(0, n).unwrap(), past_v.view().seq(0, n).unwrap());
        let tensors = AttentionTensors::new(q.view(), window_k.view(), window_v.view(), one.view_mut());
        attention_with_prefix(context, &Serial, &mut Workspace::new(), prefix, tensors, &options).unwrap();
        assert_eq!(found.all_bits(), one.all_bits(), "{past_format} {window_type}");

        // Both are attention over what the two caches hold.
        let mut case = Case::new(
            &mut rng,
            Shape { tokens: 2, kv_heads: heads, group, keys: tokens, dim, v_dim: dim, batch: 1 },
            DType::F32,
        );
        case.options.causal = true;
        case.q = q.to(Layout::BSHD, Place::Heap);
        for (tensor, past_cache, recent) in [(&mut case.k, &past_k, &recent_k), (&mut case.v, &past_v, &recent_v)] {
            tensor.fill(|[_, s, h, d]| match s.checked_sub(n) {
                None => past_cache.get([0, s, h, d]) as f32,
                Some(s) => recent.get([0, s, h, d]),
            });
        }
        let want = case.oracle();
        for at in indices(found.shape) {
            let error = (f64::from(found.get(at)) - want.out.row(0, at[1], at[2])[at[3]]).abs();
            // Kernels of bf16 products round weights.
            let bound = if level.isa.is_partial() || context.isa().is_partial() { 0.02 } else { 2e-5 };
            assert!(error <= bound, "{past_format} {window_type} {at:?}: off by {error:e}");
        }
    }
}

/// The reference itself, on numbers that can be checked by hand.
fn the_definition() {
    let (e4m3, e5m2) = (CacheFormat::Fp8E4m3, CacheFormat::Fp8E5m2);
    for (format, unit, x) in [
        (e4m3, 0x00, 0.0),
        (e4m3, 0x01, 2f64.powi(-9)),
        (e4m3, 0x08, 2f64.powi(-6)),
        (e4m3, 0x38, 1.0),
        (e4m3, 0xb9, -1.125),
        (e4m3, 0x7e, 448.0),
        (e5m2, 0x01, 2f64.powi(-16)),
        (e5m2, 0x04, 2f64.powi(-14)),
        (e5m2, 0x3c, 1.0),
        (e5m2, 0xbd, -1.25),
        (e5m2, 0x7b, 57344.0),
    ] {
        assert_eq!(number(format, unit), x, "{format} {unit:#x}");
        assert_eq!(nearest(format, x), unit, "{format} {x}");
    }
    assert_eq!((number(e5m2, 0x7c), magnitudes(e4m3).len(), magnitudes(e5m2).len()), (f64::INFINITY, 127, 124));
    assert!([0x7f, 0xff].iter().all(|&unit| number(e4m3, unit).is_nan() && number(e5m2, unit).is_nan()));
    // Ties go to the even unit, large numbers and infinities to the largest one.
    assert_eq!([1.0625, 1.1875, -1.0625, 464.0, 1e9].map(|x| nearest(e4m3, x)), [0x38, 0x3a, 0xb8, 0x7e, 0x7e]);
    assert_eq!([f64::NEG_INFINITY, f64::NAN, -0.0, 2f64.powi(-10)].map(|x| nearest(e4m3, x)), [0xfe, 0x7f, 0x80, 0]);
    assert_eq!([1.125, 1.375, 61440.0, f64::INFINITY].map(|x| nearest(e5m2, x)), [0x3c, 0x3e, 0x7b, 0x7b]);
    assert_eq!(quantise(e4m3, &[3.0, -0.3], 3.0), [0x38, nearest(e4m3, f64::from(-0.1f32))]);
}

/// What is wrong is said before a byte is written.
fn refused() {
    let context = kvlane::Context::new().unwrap();
    let (e4m3, shape) = (CacheFormat::Fp8E4m3, [1, 4, 2, 4]);
    let mut units = [7u8; 32];
    let message = |error: kvlane::Error| (error.status(), error.message().to_owned());
    let (status, sentence) = message(CacheView::fp8(&units, CacheFormat::Int8, shape).unwrap_err());
    assert!(status == Status::InvalidValue && sentence.contains("int8"), "{sentence}");
    let view = CacheView::fp8(&units, e4m3, shape).unwrap();
    let (status, sentence) = message(view.static_scales(&[1.0f32; 3]).unwrap_err());
    assert!(
        status == Status::Shape && sentence.contains("3 static scales") && sentence.contains("2 heads"),
        "{sentence}"
    );
    let (status, sentence) = message(view.static_scales(&[half::bf16::ONE]).unwrap_err());
    assert!(status == Status::DType && sentence.contains("bf16"), "{sentence}");
    let plain = CacheView::from(View::new(&[0.0f32; 32], shape).unwrap());
    assert_eq!(plain.static_scales(&[1.0f32]).unwrap_err().status(), Status::InvalidValue);
    // A scale per token is none per head.
    let scales = [1.0f32; 8];
    let strides = [32, 8, 4, 1];
    // SAFETY: a view of the array, or an error.
    let wrong = unsafe {
        CacheView::from_raw(units.as_ptr(), e4m3, shape, strides, Some(View::new(&scales, [1, 4, 2, 1]).unwrap()))
    };
    let (status, sentence) = message(wrong.unwrap_err());
    assert!(
        status == Status::Stride && sentence.contains("[8, 2, 1, 1]") && sentence.contains("per head"),
        "{sentence}"
    );
    // Slices keep their scales; elements of a head may be split, since they share a static one.
    let view = view.static_scales(&scales[..2]).unwrap();
    assert_eq!(view.heads(1, 1).unwrap().seq(1, 2).unwrap().shape(), [1, 2, 1, 4]);
    assert_eq!(view.split_at(kvlane::Axis::Dim, 3).unwrap().1.shape(), [1, 4, 2, 1]);

    // Values in pairs; both sides share their scales.
    let (k, one) = ([1.0f32; 8], [0.5f32]);
    let mut v_units = [7u8; 32];
    let mut write = |packing: Packing, v_shape: [usize; 4]| {
        let keys = CacheViewMut::fp8(&mut units, e4m3, shape).unwrap().static_scales(&one).unwrap();
        let values = CacheViewMut::fp8(&mut v_units, e4m3, v_shape).unwrap().static_scales(&one).unwrap();
        let (k, v) = (View::new(&k, [1, 1, 2, 4]).unwrap(), View::new(&k, [1, 1, 2, 4]).unwrap());
        let call = KvWrite::new(k, v, keys, values, Destination::positions(&[0])).v_packing(packing);
        kv_write(&context, &Serial, call)
    };
    let (status, sentence) = message(write(Packing::RowPairs, [1, 2, 2, 8]).unwrap_err());
    assert!(status == Status::Unsupported && sentence.contains("fp8_e4m3"), "{sentence}");
    write(Packing::Rows, shape).unwrap();
    assert!(units[..8] == [0x40; 8] && v_units[..8] == [0x40; 8] && units[8..] == [7; 24]);
    assert_eq!(context.v_packing(e4m3), Packing::Rows);

    // Units may not share memory with scales that are read.
    let mut floats = [0.5f32; 8];
    let bytes: *mut u8 = floats.as_mut_ptr().cast();
    // SAFETY: a view of the array and a copy of its first number's address, or an error.
    let shared = unsafe {
        let scale = ViewMut::from_raw(bytes, DType::F32, [1, 1, 1, 1], [1; 4]).unwrap();
        CacheViewMut::from_raw(bytes, e4m3, [1, 1, 1, 32], [32, 32, 32, 1], Some(scale))
    };
    assert_eq!(shared.unwrap_err().status(), Status::Overlap);
}
