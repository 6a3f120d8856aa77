//! Int8 caches: quantised by the definition, to the bit at every level; read, moved, inserted and evicted.

use crate::common::attention::{Case, Shape};
use crate::common::fp8::Quantised;
use crate::common::int8::{CANARY, Int8, quantise, scale_shape};
use crate::common::runners::Threads;
use crate::common::tensor::{indices, nans};
use crate::common::{Layout, Place, Rng, Tensor, scale, scaled, thin};
use crate::harness::{Level, tests};
use crate::quantised::{self, Written, head_of, layout_list};
use crate::write::{rounded, written};
use kvlane::{
    AttentionOptions, AttentionTensors, CacheFormat, CacheView, CacheViewMut, DType, Destination, KeyRotation, KvCache,
    KvLayer, KvRead, KvWrite, Layout as Slots, Op, Packing, Pairing, Positions, RmsNorm, Rope, RopeAngles,
    RopeFrequencies, RopeScaling, Runner, Serial, Source, Status, UnrotatedKeys, View, ViewMut, Workspace, attention,
    kv_read, kv_write, rope,
};

tests! {
    levels: head_sizes_and_layouts, special_heads, small_heads, near_halves, every_layout, fused_with_norm_and_rope, reads, every_pair_of_formats,
        nan_in_a_scale, moves, inserted_rows, turned_keys, running_positions;
    once: the_definition, refused;
}

const SCALES: [DType; 2] = [DType::F32, DType::F16];

/// Panics unless a head of a cache is what quantising these elements gives.
#[track_caller]
fn assert_head(cache: &Int8, (b, s, h): (usize, usize, usize), elements: &[f32], what: &str) {
    let (units, scale) = quantise(elements, cache.scales.dtype);
    let (found, bits) = cache.head(b, s, h);
    assert_eq!(found, units, "{what}: units of [{b}, {s}, {h}], {elements:?}");
    assert_eq!(bits, cache.scale_bits(scale), "{what}: the scale of [{b}, {s}, {h}], not {scale:e}");
}

#[track_caller]
fn assert_untouched(cache: &Int8, (b, s, h): (usize, usize, usize)) {
    let untouched = Tensor::output(cache.scales.dtype, [1; 4], Layout::BSHD, Place::Heap).bits([0; 4]);
    let (units, bits) = cache.head(b, s, h);
    assert!(units.iter().all(|&unit| unit as u8 == CANARY), "[{b}, {s}, {h}] was not to be written");
    assert_eq!(bits, untouched, "the scale of [{b}, {s}, {h}] was not to be written");
}

impl Written for Int8 {
    fn format(&self) -> CacheFormat {
        CacheFormat::Int8
    }
    fn view(&self) -> CacheView<'_> {
        self.view()
    }
    fn element(&self, at: [usize; 4]) -> f32 {
        self.get(at)
    }
    fn view_mut(&mut self) -> CacheViewMut<'_> {
        self.view_mut()
    }

    #[track_caller]
    fn assert_written(&self, src: &Tensor, to: &Destination, what: &str) {
        let [batch, seq, ..] = src.shape;
        let written = written(to, batch, seq, self.shape[1]);
        for at in indices(scale_shape(self.shape)) {
            let head = (at[0], at[1], at[2]);
            match written.get(&(at[0], at[1])) {
                Some(&(b, t)) => assert_head(self, head, &head_of(src, b, t, at[2]), what),
                None => assert_untouched(self, head),
            }
        }
        self.assert_gaps();
    }
}

fn output(rng: &mut Rng, shape: [usize; 4], place: Place) -> Int8 {
    let (layout, scales, other) = (Layout::random(rng), rng.pick(&SCALES), Layout::random(rng));
    Int8::output(shape, layout, scales, other, place)
}

/// Random units and scales.
fn random(rng: &mut Rng, shape: [usize; 4], scales: DType, place: Place) -> Int8 {
    let mut cache = Int8::output(shape, Layout::random(rng), scales, Layout::random(rng), place);
    indices(shape).for_each(|at| cache.set_unit(at, rng.between(0, 254) as i32 as i8));
    for at in indices(shape) {
        let unit = rng.between(0, 254) as i32 - 127;
        cache.set_unit(at, unit as i8);
    }
    let mut scale = |_| rng.f32().abs() + 0.01;
    indices(scale_shape(shape)).for_each(|at| cache.scales.set(at, scale(at)));
    cache
}

fn head_sizes_and_layouts(level: &Level) {
    let mut rng = Rng::new(301);
    for dim in thin((1..=70).chain([127, 128, 255, 256, 257, 300, 511, 512, 600]).collect()) {
        for src in DType::ALL {
            for scales in SCALES {
                let place = rng.pick(&[Place::GuardAfter, Place::GuardBefore, Place::Heap]);
                let layouts = [(); 4].map(|()| rng.pick(&Layout::ALL));
                let k = Tensor::random(&mut rng, src, [2, 3, 2, dim], layouts[0], place);
                let v = Tensor::random(&mut rng, src, [2, 3, 2, 5], layouts[1], place);
                let mut k_cache = Int8::output([2, 8, 2, dim], layouts[2], scales, layouts[3], place);
                let mut v_cache = Int8::output([2, 8, 2, 5], layouts[3], scales, layouts[2], place);
                let to = Destination::positions(&[5, 0]);
                let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
                kv_write(&level.context, &Serial, write).expect("a valid write");
                level.checked(Op::KvWrite, src, CacheFormat::Int8);
                let what = format!("{src} {scales} {dim} {layouts:?} {place:?}");
                k_cache.assert_written(&k, &to, &what);
                v_cache.assert_written(&v, &to, &what);
            }
        }
    }
}

/// Zeros, ties, subnormal and huge numbers, NaN and infinities.
fn special_heads(level: &Level) {
    let mut heads: Vec<Vec<f32>> = vec![
        vec![0.0, -0.0, 0.0],
        (0..=127)
            .map(|i| i as f32)
            .chain((0..127).map(|i| i as f32 + 0.5))
            .chain((0..127).map(|i| -(i as f32) - 0.5))
            .collect(),
        vec![1e-45, -1e-45, 3e-45],
        vec![1e-40, 1e-44, -7e-41, 0.0],
        vec![f32::MAX, -f32::MAX, 1.0, f32::MAX / 3.0],
        vec![1e30, -8.4e6, 8.3e6, 65504.0 * 127.0],
        vec![1e-8, -3e-8, 2e-9],
        vec![3.7e-6, -3.8e-6, 1e-7, 6e-8],
        vec![1.0, f32::NAN, 2.0],
        vec![1.0, f32::INFINITY, 2.0],
        vec![f32::NEG_INFINITY; 3],
    ];
    // An element in every lane of a long head.
    for lane in thin((0..70).collect()) {
        for x in [f32::NAN, f32::INFINITY, 9.0] {
            let mut head = vec![0.25; 70];
            head[lane] = x;
            heads.push(head);
        }
    }
    for elements in heads {
        for src in DType::ALL {
            for scales in SCALES {
                let mut k = Tensor::input(src, [1, 1, 1, elements.len()], Layout::BSHD, Place::GuardAfter);
                k.fill(|at| elements[at[3]]);
                let v = Tensor::input(src, [1, 1, 1, 0], Layout::BSHD, Place::Heap);
                let mut k_cache = Int8::output(k.shape, Layout::BSHD, scales, Layout::BSHD, Place::GuardAfter);
                let mut v_cache = Int8::output(v.shape, Layout::BSHD, scales, Layout::BSHD, Place::GuardAfter);
                let to = Destination::positions(&[0]);
                let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
                kv_write(&level.context, &Serial, write).expect("a valid write");
                let elements = head_of(&k, 0, 0, 0);
                assert_head(&k_cache, (0, 0, 0), &elements, &format!("{src} {scales}"));
                // What is read again is close, unless it had to saturate.
                let largest = elements.iter().fold(0f32, |a, x| a.max(x.abs()));
                let most = if scales == DType::F16 { 65504.0 * 127.0 } else { f32::MAX };
                let scale = k_cache.scales.get([0; 4]);
                for (d, &x) in elements.iter().enumerate().filter(|_| largest <= most) {
                    let error = (f64::from(k_cache.unit([0, 0, 0, d])) * f64::from(scale) - f64::from(x)).abs();
                    assert!(
                        error <= f64::from(scale) * 0.5625 || scale.is_nan(),
                        "{x:e} off by {error:e}, scale {scale:e}"
                    );
                }
                assert_eq!(!elements.iter().all(|x| x.is_finite()), scale.is_nan());
            }
        }
    }
}

/// Elements that are a few roundings from the middle between two units, in heads that fill eight vectors of a level, and in another one.
fn near_halves(level: &Level) {
    let mut rng = Rng::new(313);
    for dim in [32, 64, 70, 128] {
        let seq = scaled(60);
        for scales in SCALES {
            let mut k = Tensor::input(DType::F32, [1, seq, 1, dim], Layout::BSHD, Place::GuardAfter);
            let mut heads = Vec::new();
            for _ in 0..seq {
                let peak = (1.0 + rng.f32().abs()) * 2f32.powi(rng.between(0, 8) as i32 - 4);
                let (_, scale) = quantise(&[peak], scales);
                let element = |i: usize| {
                    let middle = (rng.between(0, 252) as f32 - 126.0 + 0.5) * scale;
                    let off = rng.between(0, 6) as i32 - 3;
                    if i == 0 { peak } else { f32::from_bits(middle.to_bits().wrapping_add_signed(off)) }
                };
                heads.push((0..dim).map(element).collect::<Vec<f32>>());
            }
            k.fill(|[_, s, _, d]| heads[s][d]);
            let v = Tensor::input(DType::F32, [1, seq, 1, 0], Layout::BSHD, Place::Heap);
            let mut cache = Int8::output(k.shape, Layout::BSHD, scales, Layout::BSHD, Place::GuardAfter);
            let mut none = Int8::output(v.shape, Layout::BSHD, scales, Layout::BSHD, Place::GuardAfter);
            let to = Destination::positions(&[0]);
            let write = KvWrite::new(k.view(), v.view(), cache.view_mut(), none.view_mut(), to);
            kv_write(&level.context, &Serial, write).expect("a valid write");
            cache.assert_written(&k, &to, &format!("{scales} {dim}"));
        }
    }
}

/// Heads whose scale is subnormal, or nearly so, are read again within half a scale, by f64. The scale is at most one step of its type
/// larger than it has to be, and no element is clipped.
fn small_heads(level: &Level) {
    let mut rng = Rng::new(312);
    for scales in SCALES {
        // The smallest scale, and the smallest normal one.
        let (step, normal) = match scales {
            DType::F32 => (f64::from(f32::from_bits(1)), f64::from(f32::MIN_POSITIVE)),
            _ => (2f64.powi(-24), 2f64.powi(-14)),
        };
        let mut peaks: Vec<f64> =
            [0.02, 0.3, 0.5, 0.51, 1.0, 1.01, 1.4, 1.49, 1.5, 1.51, 2.0, 2.49, 2.51, 9.6, 1000.3, 1023.6]
                .into_iter()
                .map(|scale| 127.0 * step * scale)
                .collect();
        peaks.extend([0.9995, 0.99999, 1.0, 1.0003].map(|share| 127.0 * normal * share));
        peaks.extend(
            (0..scaled(200)).map(|_| 127.0 * step * 2f64.powi(rng.between(0, 11) as i32) * rng.f32().abs() as f64),
        );
        // What a caller may write: keys of a magnitude of 1e-5.
        peaks.push(1e-5);
        let dim = 37;
        let mut k = Tensor::input(DType::F32, [1, peaks.len(), 1, dim], Layout::BSHD, Place::GuardAfter);
        k.fill(|at| match at[3] {
            5 => peaks[at[1]] as f32,
            6 => -peaks[at[1]] as f32,
            _ => (peaks[at[1]] * f64::from(rng.f32()) / 2.0) as f32,
        });
        let v = Tensor::input(DType::F32, [1, peaks.len(), 1, 0], Layout::BSHD, Place::Heap);
        let mut k_cache = Int8::output(k.shape, Layout::BSHD, scales, Layout::BSHD, Place::GuardAfter);
        let mut v_cache = Int8::output(v.shape, Layout::BSHD, scales, Layout::BSHD, Place::GuardAfter);
        let to = Destination::positions(&[0]);
        let write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
        kv_write(&level.context, &Serial, write).expect("a valid write");
        for s in 0..peaks.len() {
            let elements = head_of(&k, 0, s, 0);
            let largest = elements.iter().fold(0f64, |a, &x| a.max(f64::from(x).abs()));
            let scale = f64::from(k_cache.scales.get([0, s, 0, 0]));
            // In its normal range f16 has 11 bits, and a scale that is half a unit too small clips a sixteenth of a unit.
            let (least, clipped) = if scale >= normal { (1.0 - 2f64.powi(-11), 0.0625) } else { (1.0, 1e-5) };
            let exact = largest / 127.0;
            let most = (exact * (1.0 + 2f64.powi(-11))).max(exact + step);
            assert!(scale >= exact * least * (1.0 - 1e-7) && scale <= most, "{scales} {scale:e} for {largest:e}");
            for (d, &x) in elements.iter().enumerate() {
                let error = (f64::from(k_cache.unit([0, s, 0, d])) * scale - f64::from(x)).abs();
                assert!(
                    error <= scale * (0.5 + clipped),
                    "{scales}: {x:e} of {largest:e} off by {error:e}, scale {scale:e}"
                );
            }
            assert_head(&k_cache, (0, s, 0), &elements, "a small head");
        }
    }
}

/// Every layout, by position and by slot; keys, values or both in int8; any number of threads.
fn every_layout(level: &Level) {
    let mut rng = Rng::new(302);
    for _ in 0..scaled(20) {
        for (layout, [rows, slots]) in layout_list() {
            for by_slot in [false, true] {
                if by_slot && matches!(layout, Slots::Ring { .. }) {
                    continue;
                }
                let (src, other) = (rng.pick(&DType::ALL), rng.pick(&DType::ALL));
                let (dim, v_dim) = (rng.between(1, 40), rng.between(1, 40));
                let place = rng.pick(&[Place::GuardAfter, Place::GuardBefore]);
                let k_layout = Layout::random(&mut rng);
                let k = Tensor::random(&mut rng, src, [2, 4, 3, dim], k_layout, place);
                let v = Tensor::random(&mut rng, other, [2, 4, 3, v_dim], Layout::BHSD, place);
                let mut list: Vec<i32> = (0..(rows * slots).min(if rows == 2 { slots } else { 24 }) as i32).collect();
                (1..list.len()).rev().for_each(|i| list.swap(i, rng.below(i + 1)));
                list.truncate(8);
                list[3] = -1;
                let to =
                    if by_slot { Destination::slots(&list) } else { Destination::positions(&[4, 0]).counts(&[4, 3]) };
                let to = to.layout(layout);
                let runner: &dyn Runner = rng.pick::<&dyn Runner>(&[&Serial, &Threads(3)]);
                for which in 0..3 {
                    let mut k_int8 = output(&mut rng, [rows, slots, 3, dim], place);
                    let mut v_int8 = output(&mut rng, [rows, slots, 3, v_dim], place);
                    let mut k_plain = Tensor::output(other, [rows, slots, 3, dim], Layout::BSHD, place);
                    let mut v_plain = Tensor::output(src, [rows, slots, 3, v_dim], Layout::BHSD, place);
                    let k_cache: CacheViewMut = if which == 1 { k_plain.view_mut().into() } else { k_int8.view_mut() };
                    let v_cache: CacheViewMut = if which == 2 { v_plain.view_mut().into() } else { v_int8.view_mut() };
                    let write = KvWrite::new(k.view(), v.view(), k_cache, v_cache, to);
                    kv_write(&level.context, runner, write).expect("a valid write");
                    let what = format!("{layout:?} by slot: {by_slot}, {which}");
                    if which == 1 {
                        let written = written(&to, 2, 4, slots);
                        for (&(row, slot), &(b, t)) in &written {
                            for (h, d) in (0..3).flat_map(|h| (0..dim).map(move |d| (h, d))) {
                                let at = [row, slot, h, d];
                                crate::write::assert_element(&k, [b, t, h, d], &k_plain, at);
                            }
                        }
                        k_plain.assert_gaps();
                    } else {
                        k_int8.assert_written(&k, &to, &what);
                    }
                    if which == 2 {
                        v_plain.assert_gaps();
                    } else {
                        v_int8.assert_written(&v, &to, &what);
                    }
                }
            }
        }
    }
}

fn fused_with_norm_and_rope(level: &Level) {
    quantised::fused_with_norm_and_rope(level, &mut Rng::new(303), (23, 11), output);
}

/// Tokens of caches of every format and layout as tensors of every type.
fn reads(level: &Level) {
    let mut rng = Rng::new(304);
    for (layout, [rows, slots]) in layout_list() {
        for dst in DType::ALL {
            for scales in SCALES {
                for dim in thin(vec![1, 3, 16, 37, 64, 300]) {
                    let place = rng.pick(&[Place::GuardAfter, Place::GuardBefore]);
                    let k_cache = random(&mut rng, [rows, slots, 2, dim], scales, place);
                    let plain = rng.pick(&DType::ALL);
                    let v_cache = Tensor::random(&mut rng, plain, [rows, slots, 2, 5], Layout::BHSD, place);
                    let layouts = [Layout::random(&mut rng), Layout::random(&mut rng)];
                    let mut k = Tensor::output(dst, [2, 4, 2, dim], layouts[0], place);
                    let mut v = Tensor::output(dst, [2, 4, 2, 5], layouts[1], place);
                    let (positions, counts, sequences) = ([1, 2], [4, 3], [1, 0]);
                    let from = Source::positions(&positions).counts(&counts).sequences(&sequences).layout(layout);
                    let read = KvRead::new(k_cache.view(), v_cache.view(), k.view_mut(), v.view_mut(), from);
                    kv_read(&level.context, &Threads(2), read).expect("a valid read");
                    level.checked(Op::KvRead, CacheFormat::Int8, dst);
                    let untouched = Tensor::output(dst, [1; 4], Layout::BSHD, Place::Heap).bits([0; 4]);
                    for at in indices(k.shape) {
                        let [b, t, h, d] = at;
                        let wanted = if t < counts[b] as usize {
                            let (row, slot) = crate::write::place(layout, slots, 1 - b, positions[b] as usize + t);
                            rounded(dst, k_cache.get([row, slot, h, d]))
                        } else {
                            untouched
                        };
                        assert_eq!(k.bits(at), wanted, "{layout:?} {dst} {scales} {at:?}");
                    }
                    for [b, t, h, d] in indices(v.shape).filter(|at| at[1] < counts[at[0]] as usize) {
                        let (row, slot) = crate::write::place(layout, slots, 1 - b, positions[b] as usize + t);
                        crate::write::assert_element(&v_cache, [row, slot, h, d], &v, [b, t, h, d]);
                    }
                    k.assert_gaps();
                    v.assert_gaps();
                }
            }
        }
    }
    // Values in pairs, and tokens that a beam table finds.
    let k_cache = random(&mut rng, [2, 6, 1, 4], DType::F32, Place::Heap);
    let v_cache = Tensor::random(&mut rng, DType::F16, [2, 3, 1, 10], Layout::BSHD, Place::Heap);
    let (mut k, mut v) = (
        Tensor::output(DType::F32, [2, 5, 1, 4], Layout::BSHD, Place::Heap),
        Tensor::output(DType::F32, [2, 5, 1, 5], Layout::BSHD, Place::Heap),
    );
    let table = [0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0];
    for layout in [Slots::Contiguous, Slots::indirect(&table)] {
        let from = Source::positions(&[1, 0]).layout(layout);
        let packing = if matches!(layout, Slots::Contiguous) { Packing::RowPairs } else { Packing::Rows };
        let rows = Tensor::random(&mut rng, DType::F16, [2, 6, 1, 5], Layout::BSHD, Place::Heap);
        let values = if packing == Packing::Rows { &rows } else { &v_cache };
        let read = KvRead::new(k_cache.view(), values.view(), k.view_mut(), v.view_mut(), from).v_packing(packing);
        kv_read(&level.context, &Serial, read).expect("a valid read");
        for [b, t, h, d] in indices(v.shape) {
            let p = [1, 0][b] + t;
            let row = if packing == Packing::Rows { table[b * 6 + p] as usize } else { b };
            let want = if packing == Packing::Rows {
                rows.get([row, p, h, d])
            } else {
                v_cache.get([b, p / 2, h, 2 * d + p % 2])
            };
            assert_eq!(v.get([b, t, h, d]), want, "{layout:?} {b} {t} {d}");
            if d < 4 {
                assert_eq!(k.get([b, t, h, d]), k_cache.get([row, p, h, d]), "{layout:?} {b} {t} {d}");
            }
        }
    }
}

/// Attention over keys of one format and values of another has, in both halves, the bits of what is read from the cache in f32.
fn every_pair_of_formats(level: &Level) {
    let mut rng = Rng::new(305);
    // A fifth of the pairs for each shape, others for the next one; where few cases run, a format of keys meets one of values.
    let step = if scale() < 0.05 { CacheFormat::ALL.len() + 1 } else { 5 };
    let mut pairs = 0;
    for (tokens, group, keys) in thin(vec![(1, 1, 70), (1, 4, 200), (1, 7, 70), (5, 2, 130), (12, 3, 130)]) {
        for (dim, v_dim) in thin(vec![(1, 7), (16, 16), (33, 40), (64, 64), (128, 128), (80, 65)]) {
            let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys, dim, v_dim };
            for k_format in CacheFormat::ALL {
                for v_format in CacheFormat::ALL {
                    pairs += 1;
                    let fits = |format: CacheFormat, dim: usize| dim.is_multiple_of(format.unit_elements());
                    if pairs % step != 0 || !fits(k_format, dim) || !fits(v_format, v_dim) {
                        continue;
                    }
                    let mut case = Case::new(&mut rng, shape, DType::F32);
                    case.options.causal = true;
                    case.options.lengths = Some(vec![keys as i32, keys as i32 - 30]);
                    let as_type = |tensor: &Tensor, format: CacheFormat| match format.dtype() {
                        Some(dtype) => (tensor.cast(dtype), None),
                        None => (tensor.cast(DType::F32), Some(Quantised::of(tensor, format, Place::Heap))),
                    };
                    let (k, k_units) = as_type(&case.k, k_format);
                    let (v, v_units) = as_type(&case.v, v_format);
                    let mut out = Tensor::output(DType::F32, case.q.shape, Layout::BSHD, Place::Heap);
                    if dim != v_dim {
                        out = Tensor::output(DType::F32, [2, tokens, 2 * group, v_dim], Layout::BSHD, Place::Heap);
                    }
                    let k_cache = k_units.as_ref().map_or_else(|| k.view().into(), Quantised::view);
                    let v_cache = v_units.as_ref().map_or_else(|| v.view().into(), Quantised::view);
                    let tensors = AttentionTensors::new(case.q.view(), k_cache, v_cache, out.view_mut());
                    let options = case.options.borrow().precision(kvlane::Precision::High);
                    attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).expect("a valid call");
                    level.checked(Op::Attention, k_format, v_format);
                    // The oracle reads what the caches hold.
                    case.k.fill(|at| k_units.as_ref().map_or_else(|| k.get(at), |cache| cache.get(at) as f32));
                    case.v.fill(|at| v_units.as_ref().map_or_else(|| v.get(at), |cache| cache.get(at) as f32));
                    let want = case.oracle();
                    for at in indices(out.shape) {
                        let x = want.out.row(at[0], at[1], at[2])[at[3]];
                        let error = (f64::from(out.get(at)) - x).abs();
                        assert!(error <= 1e-5, "{k_format} {v_format} {shape:?} {at:?}: off by {error:e}");
                    }
                }
            }
        }
    }
}

/// NaN in a visible scale reaches the output; in a scale that no query sees it does not.
fn nan_in_a_scale(level: &Level) {
    let mut rng = Rng::new(306);
    for (tokens, group) in [(1, 1), (1, 8), (30, 2)] {
        for of_keys in [true, false] {
            for scales in SCALES {
                let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys: 90, dim: 16, v_dim: 16 };
                let case = Case::new(&mut rng, shape, DType::F32);
                let (mut k, mut v) = (Int8::of(&case.k, scales, Place::Heap), Int8::of(&case.v, scales, Place::Heap));
                let poisoned = if of_keys { &mut k } else { &mut v };
                // Sequence 0 sees 60 keys, sequence 1 all.
                for x in [f32::NAN, f32::INFINITY] {
                    poisoned.scales.set([0, 70, 1, 0], x);
                    poisoned.scales.set([0, 89, 0, 0], x);
                }
                let all_ones = nans(poisoned.scales.dtype)[1];
                poisoned.scales.set_element_bits([1, 40, 1, 0], all_ones);
                let mut out = Tensor::output(DType::F32, case.q.shape, Layout::BSHD, Place::Heap);
                let tensors = AttentionTensors::new(case.q.view(), k.view(), v.view(), out.view_mut());
                let options = AttentionOptions::new().lengths(&[60, 90]);
                attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).expect("a valid call");
                for at in indices(out.shape) {
                    let sees_it = at[0] == 1 && at[2] / group == 1;
                    assert_eq!(out.get(at).is_nan(), sees_it, "keys {of_keys}, {scales}, {tokens} tokens, {at:?}");
                }
            }
        }
    }
}

/// A cache of which a plain mirror holds the units and the bits of the scale of every head as elements.
struct Mirrored {
    cache: Int8,
    mirror: Tensor,
}

impl Mirrored {
    fn random(rng: &mut Rng, shape: [usize; 4], scales: DType) -> Self {
        let cache = random(rng, shape, scales, Place::GuardAfter);
        let [batch, slots, heads, dim] = shape;
        let mut mirror = Tensor::output(DType::F32, [batch, slots, heads, dim + 1], Layout::random(rng), Place::Heap);
        mirror.fill(
            |[b, s, h, d]| if d < dim { cache.unit([b, s, h, d]).into() } else { cache.scales.get([b, s, h, 0]) },
        );
        Self { cache, mirror }
    }

    #[track_caller]
    fn check(&self, what: &str) {
        let dim = self.cache.shape[3];
        for at in indices(self.mirror.shape) {
            let [b, s, h, d] = at;
            let found = if d < dim { self.cache.unit(at).into() } else { self.cache.scales.get([b, s, h, 0]) };
            assert_eq!(found, self.mirror.get(at), "{what}: {at:?}");
        }
        self.cache.assert_gaps();
    }
}

/// Operations that move tokens move units and scales to the bit.
fn moves(level: &Level) {
    let mut rng = Rng::new(307);
    for _ in 0..scaled(60).max(6) {
        let (heads, dim, v_dim) = (rng.between(1, 4), rng.between(1, 40), rng.between(1, 40));
        let scales = [rng.pick(&SCALES), rng.pick(&SCALES)];
        let (mut k, mut v) = (
            Mirrored::random(&mut rng, [4, 20, heads, dim], scales[0]),
            Mirrored::random(&mut rng, [4, 20, heads, v_dim], scales[1]),
        );
        quantised::each_move(level, &mut rng, &mut |what, call| {
            let mut layers = [KvLayer::new(k.cache.view_mut(), v.cache.view_mut())];
            call(&mut layers);
            let mut layers = [KvLayer::new(k.mirror.view_mut(), v.mirror.view_mut())];
            call(&mut layers);
            k.check(&format!("keys, {what}"));
            v.check(&format!("values, {what}"));
        });
    }
}

/// A sequence goes into a cache of another format: quantised, read, copied to the bit, or quantised anew for narrower scales.
fn inserted_rows(level: &Level) {
    let mut rng = Rng::new(308);
    for (heads, dim) in [(1, 5), (3, 16), (2, 33), (4, 300)] {
        let shape = [2, 7, heads, dim];
        for (from, to) in SCALES.into_iter().flat_map(|from| SCALES.map(|to| (from, to))) {
            let mut source = random(&mut rng, shape, from, Place::GuardAfter);
            let elements: Vec<Vec<f32>> = indices(scale_shape(shape))
                .map(|[b, s, h, _]| (0..dim).map(|d| source.get([b, s, h, d])).collect())
                .collect();
            let element = |b: usize, s: usize, h: usize| &elements[(b * 7 + s) * heads + h];
            let plain_type = rng.pick(&DType::ALL);
            let mut plain = Tensor::output(plain_type, shape, Layout::random(&mut rng), Place::GuardAfter);
            let mut target = output(&mut rng, shape, Place::GuardAfter);
            target.scales = Tensor::output(to, scale_shape(shape), Layout::BHSD, Place::GuardAfter);
            let insert = |dst: KvLayer, src: KvLayer| {
                let (mut dst, mut src, mut lengths, mut from_lengths) = ([dst], [src], [0, 0], [3, 6]);
                let mut from = KvCache::new(&mut src, Slots::Contiguous, &mut from_lengths);
                let mut cache = KvCache::new(&mut dst, Slots::Contiguous, &mut lengths);
                cache.insert_sequence(&level.context, &Threads(2), 0, &mut from, 1, 5).expect("a valid call");
                assert_eq!(lengths, [5, 0]);
            };
            insert(KvLayer::keys(target.view_mut()), KvLayer::keys(source.view_mut()));
            insert(KvLayer::keys(plain.view_mut()), KvLayer::keys(source.view_mut()));
            for [b, s, h, _] in indices(scale_shape(shape)) {
                if b == 1 || s >= 5 {
                    assert_untouched(&target, (b, s, h));
                } else if (from, to) == (DType::F32, DType::F16) {
                    assert_head(&target, (b, s, h), element(1, s, h), "anew");
                } else {
                    let (units, _) = source.head(1, s, h);
                    assert_eq!(target.head(b, s, h).0, units);
                    assert_eq!(target.scales.get([b, s, h, 0]), source.scales.get([1, s, h, 0]));
                }
                if b == 0 && s < 5 {
                    for d in 0..dim {
                        assert_eq!(plain.bits([b, s, h, d]), rounded(plain_type, element(1, s, h)[d]));
                    }
                }
            }
            target.assert_gaps();
            plain.assert_gaps();
            let from_plain = Tensor::random(&mut rng, plain_type, shape, Layout::BHSD, Place::GuardAfter);
            let mut from_view = from_plain.to(Layout::BSHD, Place::Heap);
            let mut target = Int8::output(shape, Layout::STEP2, to, Layout::PADDED, Place::GuardAfter);
            insert(KvLayer::keys(target.view_mut()), KvLayer::keys(from_view.view_mut()));
            for [_, s, h, _] in indices([1, 5, heads, 1]) {
                assert_head(&target, (0, s, h), &head_of(&from_plain, 1, s, h), "from elements");
            }
        }
    }
}

/// Keys that are turned after an eviction are read, rotated in f32 and quantised again.
fn turned_keys(level: &Level) {
    let mut rng = Rng::new(309);
    let frequencies = RopeFrequencies::new(16, 10_000.0, &RopeScaling::None).unwrap();
    for (pairing, heads) in [(Pairing::HalfSplit, 1), (Pairing::Interleaved, 3), (Pairing::HalfSplit, 90)] {
        for scales in SCALES {
            let (shape, drop) = ([2, 12, heads, 19], 2..5);
            let mut k = random(&mut rng, shape, scales, Place::GuardAfter);
            let mut v = random(&mut rng, shape, scales, Place::GuardAfter);
            let before: Vec<(Vec<i8>, u32)> = indices(scale_shape(shape)).map(|[b, s, h, _]| v.head(b, s, h)).collect();
            let mut read = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
            read.fill(|at| k.get(at));
            let mut want = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
            // A turn back is one by the opposite sines.
            let (cos, mut sin) = frequencies.table(&level.context, 4);
            sin.iter_mut().for_each(|x| *x = -*x);
            let table = RopeAngles::table(&cos, &sin);
            let turn = Rope::new(pairing, 16, table, Positions::Explicit(&[3; 24]));
            rope(&level.context, &Serial, read.view(), want.view_mut(), &turn).unwrap();
            let mut layers = [KvLayer::new(k.view_mut(), v.view_mut())];
            let mut lengths = [4, 11];
            let rotation = KeyRotation::new(pairing, &frequencies);
            let mut cache = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
            cache.evict(&level.context, &Threads(2), 1, drop.clone(), &[Some(rotation)]).expect("a valid call");
            assert_eq!(lengths, [4, 8]);
            for [b, s, h, _] in indices(scale_shape(shape)) {
                let moved = b == 1 && (2..8).contains(&s);
                let from = if moved { s + 3 } else { s };
                assert_eq!(v.head(b, s, h), before[(b * 12 + from) * heads + h], "values move to the bit");
                let wanted = head_of(if moved { &want } else { &read }, b, from, h);
                if moved {
                    assert_head(&k, (b, s, h), &wanted, "turned");
                } else {
                    (0..19).for_each(|d| assert_eq!(k.get([b, s, h, d]), wanted[d]));
                }
            }
        }
    }
}

/// Keys before the gap are written again from unrotated copies, with the bits of rope and quantisation.
fn running_positions(level: &Level) {
    let mut rng = Rng::new(310);
    let frequencies = RopeFrequencies::new(16, 10_000.0, &RopeScaling::None).unwrap();
    for scales in SCALES {
        let shape = [1, 9, 3, 16];
        let mut k = random(&mut rng, shape, scales, Place::GuardAfter);
        let before: Vec<(Vec<i8>, u32)> = indices(scale_shape(shape)).map(|[b, s, h, _]| k.head(b, s, h)).collect();
        let keys = Tensor::random(&mut rng, DType::F16, [1, 2, 3, 16], Layout::BHSD, Place::GuardAfter);
        let rotation = KeyRotation::new(Pairing::HalfSplit, &frequencies);
        let mut layers = [KvLayer::keys(k.view_mut())];
        let mut lengths = [9];
        let mut cache = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
        let unrotated = UnrotatedKeys::new(keys.view(), rotation);
        cache.evict_running(&level.context, &Serial, 0, 2..5, 7, &[Some(unrotated)]).expect("a valid call");
        let mut want = Tensor::output(DType::F32, [1, 2, 3, 16], Layout::BSHD, Place::Heap);
        let options = Rope::new(Pairing::HalfSplit, 16, &frequencies, Positions::Explicit(&[10, 11]));
        rope(&level.context, &Serial, keys.view(), want.view_mut(), &options).unwrap();
        for [b, s, h, _] in indices([1, 6, 3, 1]) {
            if s < 2 {
                assert_head(&k, (b, s, h), &head_of(&want, b, s, h), "sinks");
            } else {
                assert_eq!(k.head(b, s, h), before[(s + 3) * 3 + h]);
            }
        }
        k.assert_gaps();
    }
}

/// The reference itself, on numbers that can be checked by hand.
fn the_definition() {
    let (units, scale) = quantise(&[127.0, -63.5, 0.5, 1.5, -2.5, 0.49], DType::F32);
    assert_eq!((units, scale), (vec![127, -64, 0, 2, -2, 0], 1.0));
    assert_eq!(quantise(&[0.0, -0.0], DType::F32), (vec![0, 0], 0.0));
    let (units, scale) = quantise(&[1.0, f32::NAN], DType::F32);
    assert!(units == [0, 0] && scale.is_nan());
    assert_eq!(quantise(&[1e-8], DType::F16), (vec![0], 2f32.powi(-24)));
    // 1.49 times the smallest f16, which to nearest would be once: 1.49 * 127 = 189 units, of which 62 were clipped.
    assert_eq!(quantise(&[1.49 * 127.0 * 2f32.powi(-24)], DType::F16), (vec![95], 2f32.powi(-23)));
    assert_eq!(quantise(&[1e30, 8e6], DType::F16), (vec![127, 122], 65504.0));
    // 1 / 127 in f16 is 0.00787353515625.
    assert_eq!(quantise(&[1.0], DType::F16), (vec![127], 0.007873535));
}

/// What is wrong is said before a byte is written.
fn refused() {
    let context = kvlane::Context::new().unwrap();
    let mut units = [7i8; 16];
    let mut scales = [0.5f32; 4];
    let message = |error: kvlane::Error| (error.status(), error.message().to_owned());
    let wrong = CacheViewMut::int8(&mut units, [1, 4, 1, 4], ViewMut::new(&mut scales, [1, 2, 2, 1]).unwrap());
    let (status, sentence) = message(wrong.unwrap_err());
    assert_eq!(status, Status::Shape);
    assert!(sentence.contains("[1, 2, 2, 1]") && sentence.contains("[1, 4, 1, 1]"), "{sentence}");
    let mut brain = [half::bf16::ONE; 4];
    let wrong = CacheViewMut::int8(&mut units, [1, 4, 1, 4], ViewMut::new(&mut brain, [1, 4, 1, 1]).unwrap());
    let (status, sentence) = message(wrong.unwrap_err());
    assert!(status == Status::DType && sentence.contains("bf16"), "{sentence}");

    // Values in pairs, a slot past the end, heads that are too long to be staged.
    let (k, v) = ([1.0f32; 4], [1.0f32; 2]);
    let (mut v_units, mut v_scales) = ([7i8; 8], [0.5f32; 2]);
    let write = |position: &[i32],
                 packing: Packing,
                 units: &mut [i8],
                 scales: &mut [f32],
                 v_units: &mut [i8],
                 v_scales: &mut [f32]| {
        let pairs = packing == Packing::RowPairs;
        let (seq, dim) = if pairs { (2, 4) } else { (4, 2) };
        let v_cache = CacheViewMut::int8(v_units, [1, seq, 1, dim], ViewMut::new(v_scales, [1, seq, 1, 1]).unwrap());
        let write = KvWrite::new(
            View::new(&k, [1, 1, 1, 4]).unwrap(),
            View::new(&v, [1, 1, 1, 2]).unwrap(),
            CacheViewMut::int8(units, [1, 4, 1, 4], ViewMut::new(scales, [1, 4, 1, 1]).unwrap()).unwrap(),
            v_cache.unwrap(),
            Destination::positions(position),
        );
        message(kv_write(&context, &Serial, write.v_packing(packing)).unwrap_err())
    };
    let (status, sentence) = write(&[0], Packing::RowPairs, &mut units, &mut scales, &mut v_units, &mut v_scales);
    assert!(status == Status::Unsupported && sentence.contains("int8"), "{sentence}");
    let mut four = [0.5f32; 4];
    let (status, _) = write(&[4], Packing::Rows, &mut units, &mut scales, &mut v_units, &mut four);
    assert_eq!(status, Status::Capacity);
    assert!(units == [7; 16] && scales == [0.5; 4] && v_units == [7; 8] && four == [0.5; 4]);

    let long = vec![1.0f32; 5000];
    let (mut long_units, mut one) = (vec![7i8; 5000], [0.5f32]);
    let mut v_long = vec![0.0f32; 5000];
    let write = KvWrite::new(
        View::new(&long, [1, 1, 1, 5000]).unwrap(),
        View::new(&long, [1, 1, 1, 5000]).unwrap(),
        CacheViewMut::int8(&mut long_units, [1, 1, 1, 5000], ViewMut::new(&mut one, [1; 4]).unwrap()).unwrap(),
        ViewMut::new(&mut v_long, [1, 1, 1, 5000]).unwrap(),
        Destination::positions(&[0]),
    );
    let (status, sentence) = message(kv_write(&context, &Serial, write.k_norm(RmsNorm::new(1e-6))).unwrap_err());
    assert!(status == Status::Shape && sentence.contains("5000") && sentence.contains("4096"), "{sentence}");
    assert!(long_units.iter().all(|&unit| unit == 7));
    assert_eq!(one, [0.5]);

    // Reads past the end, and of sequences that there are not.
    for (positions, sequences, wanted) in
        [([3], None, Status::Capacity), ([-1], None, Status::OutOfRange), ([0], Some([5]), Status::OutOfRange)]
    {
        let cache = kvlane::CacheView::int8(&units, [1, 4, 1, 4], View::new(&scales, [1, 4, 1, 1]).unwrap()).unwrap();
        let (mut k, mut v) = ([9.0f32; 8], [9.0f32; 8]);
        let mut from = Source::positions(&positions);
        from.sequences = sequences.as_ref().map(|list| &list[..]);
        let (k_view, v_view) =
            (ViewMut::new(&mut k, [1, 2, 1, 4]).unwrap(), ViewMut::new(&mut v, [1, 2, 1, 4]).unwrap());
        let read = KvRead::new(cache, cache, k_view, v_view, from);
        assert_eq!(kv_read(&context, &Serial, read).unwrap_err().status(), wanted);
        assert!(k == [9.0; 8] && v == [9.0; 8]);
    }
    assert_eq!(context.v_packing(CacheFormat::Int8), Packing::Rows);
}
