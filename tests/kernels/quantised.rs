//! What the tests of quantised caches share.

use crate::common::affine::{Described, Kind};
use crate::common::blocks::{Blocks, CANARY};
use crate::common::fp8::{Fp8, Quantised, Scales};
use crate::common::int8::Int8;
use crate::common::runners::Threads;
use crate::common::tensor::{Array, indices};
use crate::common::{Layout, Place, Rng, Tensor, scaled, thin};
use crate::harness::Level;
use crate::write::{place, rounded, written};
use kvlane::{
    CacheFormat, CacheView, CacheViewMut, DType, Destination, KeyRotation, KvCache, KvLayer, KvRead, KvWrite,
    Layout as Slots, Op, Pairing, Positions, RmsNorm, Rope, RopeAngles, RopeFrequencies, RopeScaling, Runner, Serial,
    Source, Workspace, copy_pages, defragment_pages, kv_read, kv_write, rms_norm, rope,
};

pub const PAGES: [i32; 6] = [2, 5, 0, 3, 1, 4];
pub const STARTS: [i32; 3] = [2, 12, 24];

/// Layouts of two sequences, with sequences (or pages) and slots of the views.
pub fn layout_list() -> [(Slots<'static>, [usize; 2]); 4] {
    [
        (Slots::Contiguous, [2, 10]),
        (Slots::ring(2), [2, 6]),
        (Slots::paged(&PAGES, 3), [6, 4]),
        (Slots::ragged(&STARTS), [1, 24]),
    ]
}

pub fn head_of(tensor: &Tensor, b: usize, s: usize, h: usize) -> Vec<f32> {
    (0..tensor.shape[3]).map(|d| tensor.get([b, s, h, d])).collect()
}

/// The first two axes and the heads of a shape.
pub fn heads_of([batch, seq, heads, _]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    indices([batch, seq, heads, 1])
}

/// A cache of any format.
pub enum Store {
    Plain(Tensor),
    Quantised(Quantised),
}

impl Store {
    /// Units that nothing has been written to.
    pub fn output(format: CacheFormat, shape: [usize; 4], layout: Layout) -> Self {
        let place = Place::GuardAfter;
        match (format.dtype(), format) {
            (Some(dtype), _) => Self::Plain(Tensor::output(dtype, shape, layout, place)),
            (None, CacheFormat::Int8) => {
                let cache = Int8::output(shape, layout, DType::F32, Layout::BSHD, place);
                Self::Quantised(Quantised::Int8(cache))
            }
            (None, format) if format.is_affine() => {
                let seed = shape.iter().fold(0, |seed, &n| 31 * seed + n as u64);
                let kind = Kind::random(&mut Rng::new(seed), format, shape[3], 0);
                Self::Quantised(Quantised::Described(Box::new(Described::output(kind, shape, layout, place))))
            }
            (None, format) if format.is_blocks() => {
                Self::Quantised(Quantised::Blocks(Blocks::output(format, shape, layout, place)))
            }
            (None, format) => {
                let scales = Scales::kinds(shape[2])[2].clone();
                Self::Quantised(Quantised::Fp8(Fp8::output(format, shape, layout, place, scales)))
            }
        }
    }

    /// What quantising or rounding a tensor of f32 gives.
    pub fn of(tensor: &Tensor, format: CacheFormat) -> Self {
        match format.dtype() {
            Some(dtype) => Self::Plain(tensor.cast(dtype)),
            None => Self::Quantised(Quantised::of(tensor, format, Place::Heap)),
        }
    }

    pub fn get(&self, at: [usize; 4]) -> f64 {
        match self {
            Self::Plain(tensor) => tensor.get(at).into(),
            Self::Quantised(cache) => cache.get(at),
        }
    }

    pub fn array(&self, shape: [usize; 4]) -> Array {
        Array { shape, data: indices(shape).map(|at| self.get(at)).collect() }
    }

    pub fn view(&self) -> CacheView<'_> {
        match self {
            Self::Plain(tensor) => tensor.view().into(),
            Self::Quantised(cache) => cache.view(),
        }
    }

    pub fn view_mut(&mut self) -> CacheViewMut<'_> {
        match self {
            Self::Plain(tensor) => tensor.view_mut().into(),
            Self::Quantised(cache) => cache.view_mut(),
        }
    }
}

/// A cache that a test writes to.
pub trait Written {
    fn format(&self) -> CacheFormat;
    fn view(&self) -> CacheView<'_>;
    fn view_mut(&mut self) -> CacheViewMut<'_>;
    /// The number that an element stands for.
    fn element(&self, at: [usize; 4]) -> f32;

    /// Checks every head: those that are written are what quantising `src` gives, and nothing else has changed.
    fn assert_written(&self, src: &Tensor, to: &Destination, what: &str);
}

/// A cache whose heads are bytes, with nothing beside them that a write changes.
pub trait Bytes: Written {
    fn shape(&self) -> [usize; 4];
    fn head(&self, b: usize, s: usize, h: usize) -> Vec<u8>;
    /// The bytes of elements in a head of this number.
    fn quantised(&self, elements: &[f32], head: usize) -> Vec<u8>;
    fn assert_gaps(&self);
}

/// [`Written::assert_written`] for caches of bytes.
#[track_caller]
pub fn assert_written(cache: &impl Bytes, src: &Tensor, to: &Destination, what: &str) {
    let ([batch, seq, ..], shape) = (src.shape, cache.shape());
    let written = written(to, batch, seq, shape[1]);
    for [b, s, h, _] in heads_of(shape) {
        let wanted = match written.get(&(b, s)) {
            Some(&(b, t)) => cache.quantised(&head_of(src, b, t, h), h),
            None => vec![CANARY; cache.format().head_bytes(shape[3])],
        };
        assert_eq!(cache.head(b, s, h), wanted, "{what}, {}: [{b}, {s}, {h}]", cache.format());
    }
    cache.assert_gaps();
}

/// Tokens 2 to 4 of the second of two sequences of 12 are evicted, and the keys behind them turned: the bytes are those of a turn of what
/// is read, quantised. All others stay.
pub fn turned_keys(level: &Level, pairing: Pairing, k: &mut impl Bytes) {
    let (shape, format) = (k.shape(), k.format());
    let frequencies = RopeFrequencies::new(16, 10_000.0, &RopeScaling::None).unwrap();
    let before: Vec<Vec<u8>> = heads_of(shape).map(|[b, s, h, _]| k.head(b, s, h)).collect();
    let mut read = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
    read.fill(|at| k.element(at));
    let mut want = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
    // A turn back is one by the opposite sines.
    let (cos, mut sin) = frequencies.table(&level.context, 4);
    sin.iter_mut().for_each(|x| *x = -*x);
    let turn = Rope::new(pairing, 16, RopeAngles::table(&cos, &sin), Positions::Explicit(&[3; 24]));
    rope(&level.context, &Serial, read.view(), want.view_mut(), &turn).unwrap();
    let mut layers = [KvLayer::keys(k.view_mut())];
    let mut lengths = [4, 11];
    let mut cache = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
    let rotation = KeyRotation::new(pairing, &frequencies);
    cache.evict(&level.context, &Threads(2), 1, 2..5, &[Some(rotation)]).expect("a valid call");
    assert_eq!(lengths, [4, 8]);
    for [b, s, h, _] in heads_of(shape) {
        let wanted = if b == 1 && (2..8).contains(&s) {
            k.quantised(&head_of(&want, b, s + 3, h), h)
        } else {
            before[(b * 12 + s) * shape[2] + h].clone()
        };
        assert_eq!(k.head(b, s, h), wanted, "{format} [{b}, {s}, {h}]");
    }
    k.assert_gaps();
}

/// The bits of norm, rotation and quantisation one after the other through f32. `output` makes a cache of a shape.
pub fn fused_with_norm_and_rope<C: Written>(
    level: &Level,
    rng: &mut Rng,
    (dim, v_dim): (usize, usize),
    mut output: impl FnMut(&mut Rng, [usize; 4], Place) -> C,
) {
    let f = RopeFrequencies::new(20, 10_000.0, &RopeScaling::None).unwrap();
    for (src, heads) in DType::ALL.into_iter().flat_map(|src| [(src, 3), (src, 60)]) {
        for (layout, [rows, slots]) in thin(layout_list().to_vec()) {
            for pairing in [Pairing::Interleaved, Pairing::HalfSplit] {
                for (normed, turned) in [(true, false), (false, true), (true, true)] {
                    let weight: Vec<f32> = (0..dim).map(|_| 1.0 + rng.f32()).collect();
                    let norm = RmsNorm::new(1e-6).weight(&weight);
                    let options = Rope::new(pairing, 20, &f, Positions::Explicit(&[4, 5, 6, 7, 0, 1, 2, 3]));
                    let k_layout = Layout::random(rng);
                    let k = Tensor::random(rng, src, [2, 4, heads, dim], k_layout, Place::GuardAfter);
                    let v = Tensor::random(rng, src, [2, 4, heads, v_dim], Layout::BSHD, Place::GuardAfter);
                    let mut k_cache = output(rng, [rows, slots, heads, dim], Place::GuardBefore);
                    let mut v_cache = output(rng, [rows, slots, heads, v_dim], Place::GuardBefore);
                    let to = Destination::positions(&[4, 0]).counts(&[4, 3]).layout(layout);
                    let mut write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to);
                    write.k_norm = normed.then_some(norm);
                    write.rope = turned.then_some(options);
                    kv_write(&level.context, &Serial, write).expect("a valid write");
                    let fresh = || Tensor::output(DType::F32, k.shape, Layout::BSHD, Place::Heap);
                    let mut step = k.cast(DType::F32);
                    if normed {
                        let mut next = fresh();
                        rms_norm(&level.context, &Serial, k.view(), next.view_mut(), &norm).unwrap();
                        step = next;
                    }
                    if turned {
                        let mut next = fresh();
                        let from = if normed { step.view() } else { k.view() };
                        rope(&level.context, &Serial, from, next.view_mut(), &options).unwrap();
                        step = next;
                    }
                    let what = format!("{src} {layout:?} {pairing:?} {normed} {turned}");
                    k_cache.assert_written(&step, &to, &what);
                    v_cache.assert_written(&v, &to, &what);
                }
            }
        }
    }
}

/// Every layout, written and read, beside another format on the other side; any number of threads.
pub fn every_layout<C: Written>(
    level: &Level,
    rng: &mut Rng,
    dim: impl Fn(&mut Rng) -> usize,
    output: impl Fn(&mut Rng, [usize; 4], Place) -> C,
) {
    for _ in 0..scaled(20) {
        for (layout, [rows, slots]) in layout_list() {
            let (src, other) = (rng.pick(&DType::ALL), rng.pick(&DType::ALL));
            let (dim, v_dim) = (dim(rng), dim(rng));
            let at = rng.pick(&[Place::GuardAfter, Place::GuardBefore]);
            let k_layout = Layout::random(rng);
            let k = Tensor::random(rng, src, [2, 4, 3, dim], k_layout, at);
            let v = Tensor::random(rng, other, [2, 4, 3, v_dim], Layout::BHSD, at);
            let to = Destination::positions(&[4, 0]).counts(&[4, 3]).layout(layout);
            let runner: &dyn Runner = rng.pick::<&dyn Runner>(&[&Serial, &Threads(3)]);
            for keys in [true, false] {
                let (name, shapes) =
                    (format!("{layout:?}, keys: {keys}"), [[rows, slots, 3, dim], [rows, slots, 3, v_dim]]);
                let mut cache = output(rng, shapes[usize::from(!keys)], at);
                let mut plain = Tensor::output(DType::F32, shapes[usize::from(keys)], Layout::BSHD, at);
                let (k_cache, v_cache): (CacheViewMut, CacheViewMut) = if keys {
                    (cache.view_mut(), plain.view_mut().into())
                } else {
                    (plain.view_mut().into(), cache.view_mut())
                };
                kv_write(&level.context, runner, KvWrite::new(k.view(), v.view(), k_cache, v_cache, to))
                    .expect("valid");
                cache.assert_written(if keys { &k } else { &v }, &to, &name);
                plain.assert_gaps();
                let mut read = [dim, v_dim].map(|dim| Tensor::output(other, [2, 4, 3, dim], Layout::random(rng), at));
                let [k_read, v_read] = &mut read;
                let (k_cache, v_cache): (CacheView, CacheView) =
                    if keys { (cache.view(), plain.view().into()) } else { (plain.view().into(), cache.view()) };
                let (positions, counts) = ([4, 0], [4, 3]);
                let from = Source::positions(&positions).counts(&counts).layout(layout);
                let call = KvRead::new(k_cache, v_cache, k_read.view_mut(), v_read.view_mut(), from);
                kv_read(&level.context, runner, call).expect("a valid read");
                let (read, format) = (&read[usize::from(!keys)], cache.format());
                level.checked(Op::KvRead, format, other);
                for [b, t, h, d] in indices(read.shape).filter(|at| at[1] < counts[at[0]] as usize) {
                    let (row, slot) = place(layout, slots, b, positions[b] as usize + t);
                    let wanted = rounded(other, cache.element([row, slot, h, d]));
                    assert_eq!(read.bits([b, t, h, d]), wanted, "{name}, {format}");
                }
                read.assert_gaps();
            }
        }
    }
}

/// Inserts the first five tokens of sequence 1 of one cache as sequence 0 of another.
pub fn insert(level: &Level, dst: KvLayer, src: KvLayer) {
    let (mut dst, mut src, mut lengths, mut from_lengths) = ([dst], [src], [0, 0], [3, 6]);
    let mut from = KvCache::new(&mut src, Slots::Contiguous, &mut from_lengths);
    let mut cache = KvCache::new(&mut dst, Slots::Contiguous, &mut lengths);
    cache.insert_sequence(&level.context, &Threads(2), 0, &mut from, 1, 5).expect("a valid call");
    assert_eq!(lengths, [5, 0]);
}

/// A call that moves tokens.
pub type Move<'a> = dyn Fn(&mut [KvLayer]) + 'a;

/// Calls `on` with each operation that moves tokens: its name, and the call, for layers of four sequences or pages of 20 slots.
pub fn each_move(level: &Level, rng: &mut Rng, on: &mut dyn FnMut(&str, &Move)) {
    let lengths = [rng.between(1, 20) as i32, rng.between(3, 20) as i32, rng.between(0, 20) as i32, 20];
    let runner: &dyn Runner = rng.pick::<&dyn Runner>(&[&Serial, &Threads(3)]);
    let paged = [[0, 2], [1, 3]].map(|pages| pages.to_vec()).concat();
    let parents: Vec<i32> = (0..4).map(|_| rng.below(4) as i32).collect();
    let context = &level.context;
    on("reorder", &|layers| {
        let mut lengths = lengths;
        let mut cache = KvCache::new(layers, Slots::Contiguous, &mut lengths);
        cache.reorder(context, runner, &mut Workspace::new(), &parents).unwrap();
    });
    on("copied prefix", &|layers| {
        let mut lengths = lengths;
        KvCache::new(layers, Slots::Contiguous, &mut lengths).copy_prefix(context, runner, 1, &[3, 0], 3).unwrap();
    });
    on("copied prefix of a ring", &|layers| {
        let mut lengths = [50, 7, 3, 20];
        KvCache::new(layers, Slots::ring(2), &mut lengths).copy_prefix(context, runner, 1, &[2], 7).unwrap();
    });
    on("evicted", &|layers| {
        let mut lengths = lengths;
        KvCache::new(layers, Slots::Contiguous, &mut lengths).evict(context, runner, 3, 2..7, &[]).unwrap();
    });
    on("evicted from pages", &|layers| {
        let mut lengths = [33, 21];
        KvCache::new(layers, Slots::paged(&paged, 2), &mut lengths).evict(context, runner, 0, 1..9, &[]).unwrap();
    });
    on("copied pages", &|layers| copy_pages(context, runner, layers, &[[3, 1], [0, 2]]).unwrap());
    on("defragmented", &|layers| {
        let (mut pages, mut map) = ([3, 1, -1, -1], [0; 4]);
        defragment_pages(context, runner, layers, &mut pages, 2, &[30, 0], &mut map).unwrap();
    });
    on("reset", &|layers| {
        let mut lengths = lengths;
        KvCache::new(layers, Slots::Contiguous, &mut lengths).reset(runner, &[2, 0], true).unwrap();
    });
}
