//! Caches of described integers: what a write makes of numbers, to the bit at every level; attention over them has the bits of attention
//! over what they stand for; moved, inserted and turned.

use crate::common::affine::{Described, Granularity, Kind, ZeroType};
use crate::common::attention::{Case, MaskTensor, Shape};
use crate::common::blocks::CANARY;
use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, recording, scaled, thin};
use crate::harness::{Level, tests};
use crate::quantised::{self, Bytes, Written, head_of, heads_of, insert};
use crate::write::{rounded, written};
use kvlane::{
    Affine, AffineScales, AttentionOptions, AttentionState, AttentionTensors, CacheFormat, CacheView, CacheViewMut,
    DType, Destination, Integers, KvLayer, KvRead, KvWrite, Layout as Slots, Nibbles, Op, Pairing, RmsNorm, Serial,
    Source, Status, View, ViewMut, Workspace, ZeroPoints, Zeros, attention, kv_read, kv_write, merge_states,
};
use std::collections::BTreeMap;

tests! {
    levels: every_layout, fused_with_norm_and_rope, extremes, blocks_of_tokens, bits_of_what_is_read, read_in_loops, moves,
        inserted_rows, turned_keys, onnx_runtime, openvino, quanto, recent_window;
    once: inline_scales, refused;
}

const FORMATS: [CacheFormat; 2] = [CacheFormat::Affine8, CacheFormat::Affine4];

impl Written for Described {
    fn format(&self) -> CacheFormat {
        self.kind.format
    }
    fn view(&self) -> CacheView<'_> {
        self.view()
    }
    fn view_mut(&mut self) -> CacheViewMut<'_> {
        self.view_mut()
    }
    fn element(&self, at: [usize; 4]) -> f32 {
        self.get(at)
    }

    #[track_caller]
    fn assert_written(&self, src: &Tensor, to: &Destination, what: &str) {
        let ([batch, seq, ..], shape) = (src.shape, self.shape);
        let written = written(to, batch, seq, shape[1]);
        let mut wanted = Self::output(self.kind, shape, Layout::BSHD, Place::Heap);
        let x = |[b, s, h, d]: [usize; 4]| {
            let (b, t) = written[&(b, s)];
            src.get([b, t, h, d])
        };
        wanted.quantise(&x, &|[b, s]| written.contains_key(&(b, s)), false);
        for [b, s, h, _] in heads_of(shape) {
            assert_eq!(self.head(b, s, h), wanted.head(b, s, h), "{what}, {:?}: [{b}, {s}, {h}]", self.kind);
        }
        self.assert_gaps();
    }
}

impl Bytes for Described {
    fn shape(&self) -> [usize; 4] {
        self.shape
    }
    fn head(&self, b: usize, s: usize, h: usize) -> Vec<u8> {
        self.head(b, s, h).into_iter().flat_map(u32::to_le_bytes).collect()
    }
    fn quantised(&self, elements: &[f32], head: usize) -> Vec<u8> {
        self.quantised_head(elements, head).into_iter().flat_map(u32::to_le_bytes).collect()
    }
    fn assert_gaps(&self) {
        self.assert_gaps();
    }
}

/// A cache of any description whose tokens can be written one by one.
fn output(rng: &mut Rng, shape: [usize; 4], place: Place) -> Described {
    let formats = if shape[3].is_multiple_of(2) { &FORMATS[..] } else { &FORMATS[..1] };
    let format = rng.pick(formats);
    let kind = Kind::random(rng, format, shape[3], 0);
    Described::output(kind, shape, Layout::random(rng), place)
}

/// The same with random elements in it.
fn random(rng: &mut Rng, shape: [usize; 4], place: Place) -> Described {
    let like = output(rng, shape, place);
    let layout = Layout::random(rng);
    let x = Tensor::random(rng, DType::F32, shape, layout, Place::Heap);
    Described::of(&x, like.kind, place)
}

fn every_layout(level: &Level) {
    quantised::every_layout(level, &mut Rng::new(601), |rng| rng.between(1, 70), output);
    // Every kernel.
    let mut rng = Rng::new(602);
    for format in FORMATS {
        for dtype in DType::ALL {
            let kind = Kind::random(&mut rng, format, 64, 0);
            let x = Tensor::random(&mut rng, dtype, [1, 3, 2, 64], Layout::BHSD, Place::GuardAfter);
            let mut caches = [(); 2].map(|()| Described::output(kind, [1, 3, 2, 64], Layout::BSHD, Place::GuardAfter));
            let [k, v] = &mut caches;
            let to = Destination::positions(&[0]);
            let write = KvWrite::new(x.view(), x.view(), k.view_mut(), v.view_mut(), to);
            kv_write(&level.context, &Serial, write).expect("a valid write");
            level.checked(Op::KvWrite, dtype, format);
            caches.iter().for_each(|cache| cache.assert_written(&x, &to, "every kernel"));
            let mut read = [(); 2].map(|()| Tensor::output(dtype, x.shape, Layout::BSHD, Place::GuardAfter));
            let [k_read, v_read] = &mut read;
            let (k, v) = (caches[0].view(), caches[1].view());
            let read_all = KvRead::new(k, v, k_read.view_mut(), v_read.view_mut(), Source::positions(&[0]));
            kv_read(&level.context, &Serial, read_all).expect("a valid read");
            level.checked(Op::KvRead, format, dtype);
            for at in indices(x.shape) {
                assert_eq!(read[1].bits(at), rounded(dtype, caches[1].get(at)), "{kind:?} {at:?}");
            }
        }
    }
}

fn fused_with_norm_and_rope(level: &Level) {
    quantised::fused_with_norm_and_rope(level, &mut Rng::new(603), (24, 11), output);
}

/// Elements that are equal, zero, tiny, huge or not numbers.
fn extremes(level: &Level) {
    let mut rng = Rng::new(604);
    let (heads, dim) = (14, 48);
    for _ in 0..scaled(60).max(12) {
        let x = Tensor::random(&mut rng, DType::F32, [1, 1, heads, dim], Layout::BSHD, Place::GuardAfter);
        let mut x = x;
        for at in indices(x.shape) {
            let [.., h, d] = at;
            let one = x.get([0, 0, h, 0]);
            let y = match h {
                0 => 0.0,
                1 => -0.0,
                2 => one,
                3 => 7.25,
                4 => x.get(at) * 1e-40,
                5 => x.get(at) * 1e-30,
                6 => x.get(at) * 3e38,
                7 => x.get(at) * 1e6,
                8 if d == 17 => f32::NAN,
                9 if d == 40 => f32::INFINITY,
                10 => x.get(at) + 1000.0,
                11 => 1e-3 * x.get(at) - 5.0,
                // Ties.
                12 => (d as f32 - 8.0) * 0.5,
                _ => x.get(at),
            };
            x.set(at, y);
        }
        let mut cache = loop {
            let cache = output(&mut rng, [1, 2, heads, dim], Place::GuardBefore);
            if !cache.kind.is_fixed() {
                break cache;
            }
        };
        let mut values = Tensor::output(DType::F32, [1, 2, heads, dim], Layout::BSHD, Place::Heap);
        let to = Destination::positions(&[1]);
        let write = KvWrite::new(x.view(), x.view(), cache.view_mut(), values.view_mut(), to);
        kv_write(&level.context, &Serial, write).expect("a valid write");
        cache.assert_written(&x, &to, "extremes");
    }
}

/// Tokens that share scales are written together, in every layout that keeps them together.
fn blocks_of_tokens(level: &Level) {
    let mut rng = Rng::new(605);
    let starts = [4, 16, 32];
    for _ in 0..scaled(12).max(3) {
        for (layout, [rows, slots]) in [
            (Slots::Contiguous, [2, 24]),
            (Slots::ring(4), [2, 16]),
            (Slots::paged(&quantised::PAGES, 3), [6, 8]),
            (Slots::ragged(&starts), [1, 32]),
        ] {
            let shared = rng.pick(&[2, 4]);
            let (format, dim) = (rng.pick(&FORMATS), 2 * rng.between(1, 40));
            let kind = Kind::random(&mut rng, format, dim, shared);
            let shape = [rows, slots, 3, dim];
            let src = rng.pick(&DType::ALL);
            let x_layout = Layout::random(&mut rng);
            let x = Tensor::random(&mut rng, src, [2, 8, 3, dim], x_layout, Place::GuardAfter);
            let mut k = Described::output(kind, shape, Layout::random(&mut rng), Place::GuardAfter);
            let mut v = Described::output(kind, shape, Layout::random(&mut rng), Place::GuardBefore);
            let to = Destination::positions(&[4, 0]).counts(&[8, 4]).layout(layout);
            let write = KvWrite::new(x.view(), x.view(), k.view_mut(), v.view_mut(), to);
            kv_write(&level.context, &Threads(2), write).expect("a valid write");
            k.assert_written(&x, &to, "keys");
            v.assert_written(&x, &to, "values");
            // A part of a block, or a block elsewhere, is refused before a byte is written.
            let before: Vec<_> = heads_of(shape).map(|[b, s, h, _]| k.head(b, s, h)).collect();
            for (positions, counts) in [([4, 0], [7, 4]), ([3, 0], [8, 4]), ([4, 1], [8, 4])] {
                let to = Destination::positions(&positions).counts(&counts).layout(layout);
                let write = KvWrite::new(x.view(), x.view(), k.view_mut(), v.view_mut(), to);
                let error = kv_write(&level.context, &Serial, write).unwrap_err();
                assert!(error.status() == Status::Unsupported && error.message().contains("k_cache"), "{error}");
                assert!(error.message().contains(&format!("of {shared} tokens")), "{error}");
            }
            let after: Vec<_> = heads_of(shape).map(|[b, s, h, _]| k.head(b, s, h)).collect();
            assert_eq!(before, after);
            let norm = RmsNorm::new(1e-6);
            let write = KvWrite::new(x.view(), x.view(), k.view_mut(), v.view_mut(), to).k_norm(norm);
            let error = kv_write(&level.context, &Serial, write).unwrap_err();
            assert_eq!(error.status(), Status::Unsupported, "{error}");
        }
    }
}

/// Attention over integers has the bits of attention over what they stand for in f32.
fn bits_of_what_is_read(level: &Level) {
    let mut rng = Rng::new(606);
    for (tokens, group, keys) in thin(vec![(1, 1, 1), (1, 1, 200), (1, 4, 136), (3, 2, 64), (40, 3, 200)]) {
        for (dim, v_dim) in thin(vec![(2, 7), (32, 64), (64, 32), (128, 128), (250, 96), (80, 66)]) {
            let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys, dim, v_dim };
            let mut case = Case::new(&mut rng, shape, DType::F32);
            for tensor in [&mut case.k, &mut case.v] {
                *tensor = tensor.to(Layout::random(&mut rng), Place::Heap);
            }
            case.options.causal = true;
            case.options.lengths = Some(vec![keys as i32, (keys as i32 - 30).max(1)]);
            let [k, v] = [&case.k, &case.v].map(|tensor| {
                let format = if tensor.shape[3] % 2 == 0 { rng.pick(&FORMATS) } else { CacheFormat::Affine8 };
                let shared = if keys % 8 == 0 && rng.chance(0.4) { rng.pick(&[2, 8]) } else { 0 };
                let cache =
                    Described::of(tensor, Kind::random(&mut rng, format, tensor.shape[3], shared), Place::GuardAfter);
                let mut plain = Tensor::input(DType::F32, tensor.shape, Layout::BSHD, Place::Heap);
                plain.fill(|at| cache.get(at));
                (cache, plain)
            });
            let run = |k: CacheView, v: CacheView| {
                let mut out = Tensor::output(DType::F32, [2, tokens, 2 * group, v_dim], Layout::BSHD, Place::Heap);
                let mut lse = vec![0f32; 2 * tokens * 2 * group];
                let tensors = AttentionTensors::new(case.q.view(), k, v, out.view_mut()).lse(&mut lse);
                attention(&level.context, &Threads(2), &mut Workspace::new(), tensors, &case.options.borrow())
                    .expect("a valid call");
                (out.all_bits(), lse.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            };
            let (full_k, full_v) = (CacheView::from(k.1.view()), CacheView::from(v.1.view()));
            let wanted = run(full_k, full_v);
            assert_eq!(run(k.0.view(), full_v), wanted, "{shape:?} {:?}", k.0.kind);
            assert_eq!(run(full_k, v.0.view()), wanted, "{shape:?} {:?}", v.0.kind);
            assert_eq!(run(k.0.view(), v.0.view()), wanted, "{shape:?} {:?} {:?}", k.0.kind, v.0.kind);
            level.checked(Op::Attention, k.0.kind.format, k.0.kind.format);
            level.checked(Op::Attention, v.0.kind.format, v.0.kind.format);
        }
    }
}

/// Every kind of numbers, zero points and granularity that loops over a cache read, and some that they do not, with the bits of what they
/// stand for: over pages, with keys that one row or none sees, on any number of rows.
fn read_in_loops(level: &Level) {
    const PAGES: [i32; 6] = [4, 0, 2, 5, 1, 3];
    let mut rng = Rng::new(613);
    let float = |rng: &mut Rng| Some(ZeroType::Float(rng.pick(&DType::ALL)));
    let kinds = |rng: &mut Rng| {
        [
            (Integers::Signed, Zeros::Point, None),
            (Integers::Offset, Zeros::Point, None),
            (Integers::Unsigned, Zeros::Point, Some(ZeroType::U8)),
            (Integers::Signed, Zeros::Point, Some(ZeroType::I8)),
            (Integers::Offset, Zeros::Point, Some(ZeroType::I8)),
            (Integers::Unsigned, Zeros::Point, float(rng)),
            (Integers::Signed, Zeros::Point, float(rng)),
            (Integers::Offset, Zeros::Point, float(rng)),
            (Integers::Unsigned, Zeros::Minimum, float(rng)),
            (Integers::Offset, Zeros::Shift, float(rng)),
            (Integers::Signed, Zeros::Minimum, float(rng)),
        ]
    };
    let granularities = [
        Granularity::Group(0),
        Granularity::Group(32),
        Granularity::Channel,
        Granularity::ChannelAndSlots(8),
        Granularity::ChannelAndSlots(2),
        Granularity::Tensor,
    ];
    let (heads, slots, keys) = (2, 24, 72);
    for format in FORMATS {
        for granularity in thin(granularities.to_vec()) {
            for (integers, zeros, zero_type) in thin(kinds(&mut rng).to_vec()) {
                let (tokens, group) = rng.pick(&[(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 3), (1, 7), (2, 4)]);
                let (dim, v_dim) = rng.pick(&[(64, 96), (96, 64), (128, 160)]);
                let shape = Shape { batch: 2, tokens, kv_heads: heads, group, keys, dim, v_dim };
                let mut case = Case::new(&mut rng, shape, DType::F32);
                case.options.causal = true;
                case.options.lengths = Some(vec![rng.between(1, keys) as i32, rng.between(1, keys) as i32]);
                case.options.window_left = if rng.chance(0.3) { Some(rng.between(1, 40) as u32) } else { None };
                if rng.chance(0.3) {
                    let scores = shape.scores();
                    let strides = Layout::BSHD.strides(scores);
                    let visible = |at: [usize; 4]| at[3] % 3 != 1;
                    case.options.mask = Some(MaskTensor::new(scores, strides, Place::Heap, visible));
                }
                let nibbles = rng.pick(&[Nibbles::LowFirst, Nibbles::HighFirst]);
                let of = Affine::new(integers).nibbles(nibbles).zeros(zeros);
                let [k, v] = [dim, v_dim].map(|dim| {
                    let kind = Kind { format, of, granularity, scales: rng.pick(&DType::ALL), zeros: zero_type };
                    let layout = Layout::random(&mut rng);
                    let x = Tensor::random(&mut rng, DType::F32, [6, slots, heads, dim], layout, Place::Heap);
                    let cache = Described::of(&x, kind, Place::GuardAfter);
                    let mut plain = Tensor::input(DType::F32, x.shape, Layout::BSHD, Place::Heap);
                    plain.fill(|at| cache.get(at));
                    (cache, plain)
                });
                let run = |k: CacheView, v: CacheView| {
                    let mut out =
                        Tensor::output(DType::F32, [2, tokens, heads * group, v_dim], Layout::BSHD, Place::Heap);
                    let tensors = AttentionTensors::new(case.q.view(), k, v, out.view_mut());
                    let options = case.options.borrow().layout(Slots::paged(&PAGES, 3));
                    attention(&level.context, &Threads(2), &mut Workspace::new(), tensors, &options)
                        .expect("a valid call");
                    out.all_bits()
                };
                let wanted = run(k.1.view().into(), v.1.view().into());
                assert_eq!(run(k.0.view(), v.0.view()), wanted, "{shape:?} {:?} {:?}", k.0.kind, v.0.kind);
                level.checked(Op::Attention, format, format);
            }
        }
    }
}

/// Tokens move with their scales and zero points.
fn moves(level: &Level) {
    let mut rng = Rng::new(607);
    for _ in 0..scaled(30).max(4) {
        let (heads, dim) = (rng.between(1, 4), 2 * rng.between(1, 40));
        let shape = [4, 20, heads, dim];
        let mut caches = [(); 2].map(|()| random(&mut rng, shape, Place::GuardAfter));
        // The number of the token of which a head is, and 0 for one that is reset.
        let mut numbers = [(); 2].map(|()| {
            let mut numbers = Tensor::input(DType::F32, [4, 20, heads, 1], Layout::BSHD, Place::Heap);
            numbers.fill(|at| (at[0] * 20 + at[1] + 1) as f32);
            numbers
        });
        let heads_in =
            |cache: &Described| -> Vec<_> { heads_of(shape).map(|[b, s, h, _]| cache.head(b, s, h)).collect() };
        let before = [heads_in(&caches[0]), heads_in(&caches[1])];
        quantised::each_move(level, &mut rng, &mut |what, call| {
            let [k, v] = &mut caches;
            call(&mut [KvLayer::new(k.view_mut(), v.view_mut())]);
            let [k, v] = &mut numbers;
            call(&mut [KvLayer::new(k.view_mut(), v.view_mut())]);
            for ((cache, numbers), before) in caches.iter().zip(&numbers).zip(&before) {
                for [b, s, h, _] in heads_of(shape) {
                    let number = numbers.get([b, s, h, 0]) as usize;
                    let found = cache.head(b, s, h);
                    if number > 0 {
                        let wanted = &before[(number - 1) * heads + h];
                        assert_eq!(&found, wanted, "{what}, {:?}: [{b}, {s}, {h}]", cache.kind);
                    } else {
                        let units = dim / cache.kind.format.unit_elements();
                        let cleared = if cache.kind.is_fixed() { &found[..units] } else { &found[..] };
                        assert!(cleared.iter().all(|&bits| bits == 0), "{what}, {:?}: {found:?}", cache.kind);
                    }
                }
                cache.assert_gaps();
            }
        });
    }
}

/// A sequence goes into a cache of another description through f32, and keeps its bits in one of the same.
fn inserted_rows(level: &Level) {
    let mut rng = Rng::new(608);
    for (heads, dim) in [(1, 32), (3, 64), (2, 26)] {
        let shape = [2, 7, heads, dim];
        for _ in 0..scaled(16).max(4) {
            let mut source = random(&mut rng, shape, Place::GuardAfter);
            let elements = |s: usize, h: usize| -> Vec<f32> { (0..dim).map(|d| source.get([1, s, h, d])).collect() };
            let elements: Vec<_> = heads_of([1, 5, heads, 1]).map(|[_, s, h, _]| elements(s, h)).collect();
            let mut same = Described::output(source.kind, shape, Layout::random(&mut rng), Place::GuardAfter);
            let mut other = output(&mut rng, shape, Place::GuardBefore);
            for target in [&mut same, &mut other] {
                let alike =
                    target.kind.of == source.kind.of && !source.kind.is_fixed() && target.kind.same_as(&source.kind);
                insert(level, KvLayer::keys(target.view_mut()), KvLayer::keys(source.view_mut()));
                for [_, s, h, _] in heads_of([1, 5, heads, 1]) {
                    let wanted =
                        if alike { source.head(1, s, h) } else { target.quantised_head(&elements[s * heads + h], h) };
                    assert_eq!(target.head(0, s, h), wanted, "{:?} to {:?}", source.kind, target.kind);
                }
                for [b, s, h, _] in heads_of(shape).filter(|at| at[0] == 1 || at[1] >= 5) {
                    let units = dim / target.kind.format.unit_elements();
                    assert!(target.head(b, s, h)[..units].iter().all(|&byte| byte == u32::from(CANARY)));
                }
                target.assert_gaps();
            }
            let dtype = rng.pick(&DType::ALL);
            let mut plain = Tensor::output(dtype, shape, Layout::random(&mut rng), Place::GuardAfter);
            insert(level, KvLayer::keys(plain.view_mut()), KvLayer::keys(source.view_mut()));
            for [_, s, h, d] in indices([1, 5, heads, dim]) {
                assert_eq!(plain.bits([0, s, h, d]), rounded(dtype, elements[s * heads + h][d]));
            }
            let mut from = Tensor::random(&mut rng, dtype, shape, Layout::BHSD, Place::GuardAfter);
            let wanted: Vec<_> = heads_of([1, 5, heads, 1]).map(|[_, s, h, _]| head_of(&from, 1, s, h)).collect();
            insert(level, KvLayer::keys(other.view_mut()), KvLayer::keys(from.view_mut()));
            for [_, s, h, _] in heads_of([1, 5, heads, 1]) {
                assert_eq!(other.head(0, s, h), other.quantised_head(&wanted[s * heads + h], h));
            }
        }
    }
}

/// Keys that are turned after an eviction are read, rotated in f32 and quantised again.
fn turned_keys(level: &Level) {
    let mut rng = Rng::new(609);
    for (pairing, heads) in [(Pairing::HalfSplit, 1), (Pairing::Interleaved, 3), (Pairing::HalfSplit, 40)] {
        for _ in 0..scaled(6).max(2) {
            let mut k = random(&mut rng, [2, 12, heads, 32], Place::GuardAfter);
            quantised::turned_keys(level, pairing, &mut k);
        }
    }
}

/// A scale and a zero point before the integers of each head, in one buffer.
fn inline_scales() {
    let context = kvlane::Context::new().unwrap();
    let mut rng = Rng::new(610);
    // Heads of 8 + 16 bytes, of tokens in the order batch, heads, seq.
    let (shape, record) = ([2, 5, 3, 16], 24i64);
    let mut memory = vec![0x7f7f_7f7fu32; 2 * 2 * 5 * 3 * 6];
    let base: *mut u8 = memory.as_mut_ptr().cast();
    let x = Tensor::random(&mut rng, DType::F32, [2, 3, 3, 16], Layout::BSHD, Place::Heap);
    let of = Affine::new(Integers::Unsigned);
    let strides = |size: i64, dim| [2 * 15 * record / size, record / size, 5 * record / size, dim];
    let of_scales = [2, 5, 3, 1];
    // Values are behind the keys of their sequence.
    let [k, v] = [0, 15 * record as usize].map(|first| {
        let at = |offset: usize| base.wrapping_add(first + offset);
        // SAFETY: the views are of the memory, and nothing is written but through them.
        unsafe {
            let scales = ViewMut::from_raw(at(0), DType::F32, of_scales, strides(4, 0)).unwrap();
            let zeros = ViewMut::from_raw(at(4), DType::F32, of_scales, strides(4, 0)).unwrap();
            let scales = AffineScales::written(scales).zeros(zeros);
            CacheViewMut::affine_from_raw(at(8), CacheFormat::Affine8, shape, strides(1, 1), of, scales).unwrap()
        }
    });
    let to = Destination::positions(&[2, 0]);
    kv_write(&context, &Serial, KvWrite::new(x.view(), x.view(), k, v, to)).expect("they are apart");
    let kind = Kind {
        format: CacheFormat::Affine8,
        of,
        granularity: Granularity::Group(0),
        scales: DType::F32,
        zeros: Some(ZeroType::Float(DType::F32)),
    };
    let mut beside = Described::output(kind, shape, Layout::BSHD, Place::Heap);
    let mut values = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
    let write = KvWrite::new(x.view(), x.view(), beside.view_mut(), values.view_mut(), to);
    kv_write(&context, &Serial, write).unwrap();
    for [b, s, h, _] in heads_of(shape) {
        for values in [0, 1] {
            let at = (((b * 2 + values) * 3 + h) * 5 + s) * 6;
            let found: Vec<u8> = memory[at..at + 6].iter().flat_map(|x| x.to_le_bytes()).collect();
            if (if b == 0 { 2..5 } else { 0..3 }).contains(&s) {
                let wanted = beside.head(b, s, h);
                assert!(found[8..].iter().zip(&wanted).all(|(&byte, &wanted)| u32::from(byte) == wanted));
                assert_eq!(memory[at..at + 2], wanted[16..]);
            } else {
                assert!(found.iter().all(|&byte| byte == 0x7f));
            }
        }
    }
}

/// What is wrong is said before a byte is written.
fn refused() {
    let mut units = [0u8; 4 * 4 * 2 * 8];
    let shape = [4, 4, 2, 8];
    let scales = [1f32; 4 * 4 * 2 * 8];
    let fixed = |of: [usize; 4]| AffineScales::fixed(View::new(&scales, of).unwrap());
    let of = Affine::new(Integers::Signed);
    let message = |error: kvlane::Error| (error.status(), error.message().to_owned());
    let eight = CacheFormat::Affine8;
    let zeros = [0u8; 64];
    for (found, status, parts) in [
        (CacheView::affine(&units, eight, shape, of, fixed([4, 3, 2, 8])), Status::Shape, &["seq = 3", "4"][..]),
        (CacheView::affine(&units, eight, shape, of, fixed([2, 4, 2, 8])), Status::Shape, &["batch = 2", "4"]),
        (CacheView::affine(&units, eight, shape, of, fixed([4, 4, 2, 3])), Status::Shape, &["dim = 3", "8"]),
        (CacheView::affine(&units, CacheFormat::Int8, shape, of, fixed([1; 4])), Status::InvalidValue, &["int8"]),
        (CacheView::affine(&units, eight, [4, 4, 2, 9], of, fixed([1; 4])), Status::Bounds, &["288", "256"]),
        (
            CacheView::affine(&units, CacheFormat::Affine4, [4, 4, 2, 9], of, fixed([1; 4])),
            Status::Shape,
            &["affine4", "dim = 9"],
        ),
        (
            CacheView::affine(&units, CacheFormat::Affine4, [4, 4, 2, 6], of, fixed([1, 1, 2, 2])),
            Status::Shape,
            &["3 elements"],
        ),
        (
            CacheView::affine_strided(&units, eight, 0, [4, 4, 1, 8], [64, 16, 0, 2], of, fixed([1; 4])),
            Status::Stride,
            &["one after the other", "is 2"],
        ),
        (
            CacheView::affine(
                &units,
                eight,
                shape,
                of.zeros(Zeros::Minimum),
                fixed([1, 1, 2, 8]).zeros(ZeroPoints::u8(&zeros, [1, 1, 2, 8]).unwrap()),
            ),
            Status::DType,
            &["u8", "floats"],
        ),
        (
            CacheView::affine(
                &units,
                eight,
                shape,
                of,
                fixed([1, 1, 2, 8]).zeros(ZeroPoints::u8(&zeros, [1, 1, 2, 1]).unwrap()),
            ),
            Status::Shape,
            &["[1, 1, 2, 1]", "[1, 1, 2, 8]"],
        ),
    ] {
        let (found, sentence) = message(found.unwrap_err());
        assert_eq!(found, status, "{sentence}");
        assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    }
    let view = CacheView::affine(&units, eight, shape, of, fixed([4, 2, 2, 4])).unwrap();
    assert_eq!(view.seq(2, 2).unwrap().dim(2, 4).unwrap().shape(), [4, 2, 2, 4]);
    assert_eq!(message(view.seq(1, 2).unwrap_err()).0, Status::Unsupported);
    assert_eq!(message(view.dim(1, 2).unwrap_err()).0, Status::Unsupported);
    let mut own = [1f32; 64];
    let written = AffineScales::written(ViewMut::new(&mut own, [1, 4, 2, 8]).unwrap());
    let error = CacheViewMut::affine(&mut units, eight, shape, of, written).unwrap_err();
    assert!(error.status() == Status::Shape && error.message().contains("batch = 1"), "{error}");
}

/// Arrays that runtimes have recorded, by name.
struct Goldens(BTreeMap<String, Vec<u8>>);

impl Goldens {
    /// None in the published crate, which leaves large recordings out.
    fn read() -> Option<Self> {
        let text = recording("affine_goldens.txt")?;
        let digit = |c: u8| (c as char).to_digit(16).expect("hexadecimal digits") as u8;
        let bytes = |text: &str| text.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        Some(Self(lines.map(|(name, text)| (name.to_owned(), bytes(text))).collect()))
    }

    fn bytes(&self, name: &str) -> &[u8] {
        self.0.get(name).unwrap_or_else(|| panic!("nothing is called {name}"))
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
    }

    fn f16(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks(2).map(|x| half::f16::from_le_bytes(x.try_into().unwrap()).to_f32()).collect()
    }
}

fn assert_near(found: &[f32], wanted: &[f32], most: f32, what: &str) {
    assert_eq!(found.len(), wanted.len());
    let error = found.iter().zip(wanted).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
    assert!(error <= most, "{what}: off by {error:e}");
}

/// GroupQueryAttention of ONNX Runtime: the bytes of its caches, after a write behind a past, and its outputs.
fn onnx_runtime(level: &Level) {
    let Some(goldens) = Goldens::read() else { return };
    for (bits, format, integers) in
        [(8, CacheFormat::Affine8, Integers::Signed), (4, CacheFormat::Affine4, Integers::Offset)]
    {
        for (kind, of_scales) in [("tensor", [1, 1, 1, 1]), ("channel", [1, 1, 2, 32])] {
            let name = |part: &str| format!("ort_{bits}_{kind}.{part}");
            let head = 4 * bits;
            // Batch, heads, tokens, elements, in memory.
            let (shape, strides) = ([1, 5, 2, 32], [10 * head as i64, head as i64, 5 * head as i64, 1]);
            let (of, context) = (Affine::new(integers), &level.context);
            let scales = [goldens.f32(&name("k_scale")), goldens.f32(&name("v_scale"))];
            let fixed = |i: usize| AffineScales::fixed(View::new(&scales[i], of_scales).unwrap());
            let mut caches = [("past_k"), ("past_v")].map(|past| {
                let mut cache = vec![0u8; 10 * head];
                for (to, from) in cache.chunks_mut(5 * head).zip(goldens.bytes(&name(past)).chunks(3 * head)) {
                    to[..3 * head].copy_from_slice(from);
                }
                cache
            });
            let [k, v, q] = ["k", "v", "q"].map(|part| goldens.f16(&name(part)));
            let [k_cache, v_cache] = &mut caches;
            let mut i = 0;
            let [k_cache, v_cache] = [k_cache, v_cache].map(|cache| {
                i += 1;
                CacheViewMut::affine_strided(cache, format, 0, shape, strides, of, fixed(i - 1)).unwrap()
            });
            let [k, v] = [&k, &v].map(|x| View::new(x, [1, 2, 2, 32]).unwrap());
            let write = KvWrite::new(k, v, k_cache, v_cache, Destination::positions(&[3]));
            kv_write(context, &Serial, write).expect("a valid write");
            for (cache, part) in caches.iter().zip(["present_k", "present_v"]) {
                assert_eq!(cache, goldens.bytes(&name(part)), "{}", name(part));
            }
            let view =
                |i: usize| CacheView::affine_strided(&caches[i], format, 0, shape, strides, of, fixed(i)).unwrap();
            let mut out = [0f32; 2 * 4 * 32];
            let (q, target) = (View::new(&q, [1, 2, 4, 32]).unwrap(), ViewMut::new(&mut out, [1, 2, 4, 32]).unwrap());
            let tensors = AttentionTensors::new(q, view(0), view(1), target);
            let options = AttentionOptions::new().causal(true);
            attention(context, &Serial, &mut Workspace::new(), tensors, &options).expect("a valid call");
            assert_near(&out, &goldens.f32(&name("out")), 4e-6, &name("out"));
        }
    }
}

/// PagedAttention of OpenVINO: the bytes of a page of keys by channel and of one of values by token, and what it reads there.
fn openvino(level: &Level) {
    let Some(goldens) = Goldens::read() else { return };
    for (bits, format, name) in [(8, CacheFormat::Affine8, "ov_u8"), (4, CacheFormat::Affine4, "ov_u4")] {
        let name = |part: &str| format!("{name}.{part}");
        let of = Affine::new(Integers::Unsigned).nibbles(Nibbles::HighFirst);
        let (shape, head) = ([1, 32, 1, 32], 4 * bits);
        let record = 8 + head as i64;
        let mut keys = vec![0u32; goldens.bytes(&name("key_cache")).len() / 4];
        let mut values = vec![0u32; goldens.bytes(&name("value_cache")).len() / 4];
        let view = |data: *mut u8, of_scales: [usize; 4], strides: [i64; 4], zeros: usize, units: usize, seq: i64| {
            // SAFETY: scales, zero points and integers lie in the page, which is used through its view alone.
            unsafe {
                let float = |at: usize| ViewMut::from_raw(data.add(at), DType::F32, of_scales, strides).unwrap();
                let scales = AffineScales::written(float(0)).zeros(float(zeros));
                CacheViewMut::affine_from_raw(data.add(units), format, shape, [0, seq, 0, 1], of, scales).unwrap()
            }
        };
        let (k_data, v_data): (*mut u8, *mut u8) = (keys.as_mut_ptr().cast(), values.as_mut_ptr().cast());
        let k_cache = || view(k_data, [1, 1, 1, 32], [0, 0, 0, 1], 128, 256, head as i64);
        let v_cache = || view(v_data, [1, 32, 1, 1], [0, record / 4, 0, 0], 4, 8, record);
        let [k, v, q] = ["k", "v", "q"].map(|part| goldens.f16(&name(part)));
        let [k, v] = [&k, &v].map(|x| View::new(x, shape).unwrap());
        let layout = Slots::paged(&[0], 1);
        let write = KvWrite::new(k, v, k_cache(), v_cache(), Destination::positions(&[0]).layout(layout));
        kv_write(&level.context, &Serial, write).expect("a valid write");
        let bytes = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_ne_bytes()).collect() };
        let (found, wanted) = (bytes(&values), goldens.bytes(&name("value_cache")));
        assert_eq!(found, wanted, "{}", name("value_cache"));
        let (found, wanted) = (bytes(&keys), goldens.bytes(&name("key_cache")));
        assert_eq!(found, wanted, "{}", name("key_cache"));
        let mut out = [0f32; 32 * 2 * 32];
        let q_shape = [1, 32, 2, 32];
        let (q, target) = (View::new(&q, q_shape).unwrap(), ViewMut::new(&mut out, q_shape).unwrap());
        let tensors = AttentionTensors::new(q, k_cache(), v_cache(), target);
        let options = AttentionOptions::new().causal(true).lengths(&[32]).layout(layout);
        attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).expect("a valid call");
        assert_near(&out, &goldens.f32(&name("out")), 1e-5, &name("out"));
    }
}

/// Hugging Face's QuantoQuantizedLayer: scales, shifts and integers, and what it makes of them, by token and by channel and 64 tokens.
fn quanto(level: &Level) {
    let Some(goldens) = Goldens::read() else { return };
    for (name, of_scales) in [("quanto_token", [1, 64, 1, 1]), ("quanto_channel", [1, 1, 1, 64])] {
        let part = |part: &str| format!("{name}.{part}");
        let (x, shape) = (goldens.f16(&part("x")), [1, 64, 1, 64]);
        let (mut units, mut scales, mut zeros) = (vec![0u8; 64 * 32], [0f32; 64], [0f32; 64]);
        let mut values = vec![0f32; 64 * 64];
        let of = Affine::new(Integers::Unsigned).zeros(Zeros::Shift);
        let written = AffineScales::written(ViewMut::new(&mut scales, of_scales).unwrap());
        let written = written.zeros(ViewMut::new(&mut zeros, of_scales).unwrap());
        let k_cache = CacheViewMut::affine(&mut units, CacheFormat::Affine4, shape, of, written).unwrap();
        let k = View::new(&x, shape).unwrap();
        let v_cache = ViewMut::new(&mut values, shape).unwrap();
        let write = KvWrite::new(k, k, k_cache, v_cache, Destination::positions(&[0]));
        kv_write(&level.context, &Serial, write).expect("a valid write");
        assert_eq!(scales[..], goldens.f32(&part("scale")), "{name}");
        assert_eq!(zeros[..], goldens.f32(&part("shift")), "{name}");
        let numbers: Vec<u8> = units.iter().flat_map(|byte| [byte & 15, byte >> 4]).collect();
        assert_eq!(numbers, goldens.bytes(&part("q")), "{name}");
        let fixed = AffineScales::fixed(View::new(&scales, of_scales).unwrap());
        let fixed = fixed.zeros(View::new(&zeros, of_scales).unwrap());
        let k_cache = CacheView::affine(&units, CacheFormat::Affine4, shape, of, fixed).unwrap();
        let (mut read, mut rest) = (vec![0f32; 64 * 64], vec![0f32; 64 * 64]);
        let (k, v) = (ViewMut::new(&mut read, shape).unwrap(), ViewMut::new(&mut rest, shape).unwrap());
        let from = Source::positions(&[0]);
        kv_read(&level.context, &Serial, KvRead::new(k_cache, View::new(&values, shape).unwrap(), k, v, from)).unwrap();
        assert_eq!(read, goldens.f32(&part("read")), "{name}");
    }
}

/// KIVI's way: keys in four bits by channel and 32 tokens, values by token, and a recent window in full precision, in two calls that are
/// merged: near attention over what the caches hold.
fn recent_window(level: &Level) {
    let mut rng = Rng::new(611);
    let (past, recent, group, dim) = (96, 20, 4, 64);
    let shape = Shape { batch: 1, tokens: 1, kv_heads: 2, group, keys: past + recent, dim, v_dim: dim };
    let mut case = Case::new(&mut rng, shape, DType::F32);
    let cut = |tensor: &Tensor, tokens| tensor.cut(0..1, tokens, Layout::BSHD);
    let (k, v) = (cut(&case.k, 0..past), cut(&case.v, 0..past));
    let of = Affine::new(Integers::Unsigned).zeros(Zeros::Minimum);
    let zeros = Some(ZeroType::Float(DType::F16));
    let kind = |granularity| Kind { format: CacheFormat::Affine4, of, granularity, scales: DType::F16, zeros };
    let by_channel = kind(Granularity::ChannelAndSlots(32));
    let mut k_cache = Described::output(by_channel, k.shape, Layout::BSHD, Place::GuardAfter);
    let mut v_cache = Described::output(kind(Granularity::Group(32)), v.shape, Layout::BSHD, Place::GuardAfter);
    // Tokens leave the window 32 at a time.
    for first in (0..past).step_by(32) {
        let (k, v) = (cut(&k, first..first + 32), cut(&v, first..first + 32));
        let positions = [first as i32];
        let to = Destination::positions(&positions);
        let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
        kv_write(&level.context, &Serial, write).expect("a valid write");
    }
    let (recent_k, recent_v) = (cut(&case.k, past..past + recent), cut(&case.v, past..past + recent));
    let rows = 2 * group;
    let run = |k: CacheView, v: CacheView| {
        let mut out = Tensor::output(DType::F32, [1, 1, rows, dim], Layout::BSHD, Place::Heap);
        let mut lse = vec![0f32; rows];
        let tensors = AttentionTensors::new(case.q.view(), k, v, out.view_mut()).lse(&mut lse);
        attention(&level.context, &Serial, &mut Workspace::new(), tensors, &AttentionOptions::new()).unwrap();
        (out, lse)
    };
    let (old, old_lse) = run(k_cache.view(), v_cache.view());
    let (new, new_lse) = run(recent_k.view().into(), recent_v.view().into());
    let mut out = Tensor::output(DType::F32, [1, 1, rows, dim], Layout::BSHD, Place::Heap);
    let states = [AttentionState::new(old.view(), &old_lse), AttentionState::new(new.view(), &new_lse)];
    merge_states(&level.context, &Serial, &states, out.view_mut(), None).expect("a valid merge");
    let hold = |tensor: &mut Tensor, cache: &Described| {
        for at in indices(cache.shape) {
            tensor.set(at, cache.get(at));
        }
    };
    hold(&mut case.k, &k_cache);
    hold(&mut case.v, &v_cache);
    let want = case.oracle();
    for at in indices(out.shape) {
        let error = (f64::from(out.get(at)) - want.out.row(0, 0, at[2])[at[3]]).abs();
        assert!(error <= 2e-5, "{at:?}: off by {error:e}");
    }
}
