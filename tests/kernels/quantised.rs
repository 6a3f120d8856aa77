//! What the tests of quantised caches share.

use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor};
use crate::harness::Level;
use kvlane::{
    CacheViewMut, DType, Destination, KvCache, KvLayer, KvWrite, Layout as Slots, Pairing, Positions, RmsNorm, Rope,
    RopeFrequencies, RopeScaling, Serial, kv_write, rms_norm, rope,
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

/// A cache that a test writes to.
pub trait Written {
    fn view_mut(&mut self) -> CacheViewMut<'_>;

    /// Checks every head: those that are written are what quantising `src` gives, and nothing else has changed.
    fn assert_written(&self, src: &Tensor, to: &Destination, what: &str);
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
        for (layout, [rows, slots]) in layout_list() {
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

/// Inserts the first five tokens of sequence 1 of one cache as sequence 0 of another.
pub fn insert(level: &Level, dst: KvLayer, src: KvLayer) {
    let (mut dst, mut src, mut lengths, mut from_lengths) = ([dst], [src], [0, 0], [3, 6]);
    let mut from = KvCache::new(&mut src, Slots::Contiguous, &mut from_lengths);
    let mut cache = KvCache::new(&mut dst, Slots::Contiguous, &mut lengths);
    cache.insert_sequence(&level.context, &Threads(2), 0, &mut from, 1, 5).expect("a valid call");
    assert_eq!(lengths, [5, 0]);
}
