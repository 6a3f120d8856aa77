//! Parts of one buffer as views: keys and values in one pool, and halves of a batch on two threads.

use crate::common::Rng;
use crate::harness::{Level, tests};
use kvlane::{
    AttentionOptions, AttentionTensors, Axis, DType, Destination, KvWrite, Layout, Op, Serial, View, ViewMut,
    Workspace, attention, kv_write,
};

tests! {
    levels: keys_and_values_in_one_pool, halves_on_threads;
    once:;
}

const PAGES: usize = 5;
const SIZE: usize = 4;
const HEADS: usize = 2;
const DIM: usize = 8;

fn floats(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.f32()).collect()
}

/// Writes 7 and 3 tokens to pages and attends to them.
fn write_and_attend(level: &Level, k_cache: ViewMut, v_cache: ViewMut, inputs: &[Vec<f32>; 3]) -> Vec<f32> {
    let layout = Layout::paged(&[4, 1, 0, -1], 2);
    let [q, k, v] = inputs;
    let shape = [2, 7, HEADS, DIM];
    let (k, v) = (View::new(k, shape).unwrap(), View::new(v, shape).unwrap());
    let (mut k_cache, mut v_cache) = (k_cache, v_cache);
    let to = Destination::positions(&[0, 0]).counts(&[7, 3]).layout(layout);
    kv_write(&level.context, &Serial, KvWrite::new(k, v, k_cache.reborrow(), v_cache.reborrow(), to)).unwrap();
    let mut out = vec![0.0; 2 * HEADS * DIM];
    let tensors = AttentionTensors::new(
        View::new(q, [2, 1, HEADS, DIM]).unwrap(),
        k_cache.as_view(),
        v_cache.as_view(),
        ViewMut::new(&mut out, [2, 1, HEADS, DIM]).unwrap(),
    );
    let options = AttentionOptions::new().causal(true).lengths(&[7, 3]).layout(layout);
    attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).unwrap();
    level.checked(Op::KvWrite, DType::F32, DType::F32);
    level.checked(Op::Attention, DType::F32, DType::F32);
    out
}

/// Page by page, head by head and element by element: the bits of two buffers.
fn keys_and_values_in_one_pool(level: &Level) {
    let mut rng = Rng::new(97);
    let inputs = [2 * HEADS * DIM, 14 * HEADS * DIM, 14 * HEADS * DIM].map(|n| floats(&mut rng, n));
    let shape = [PAGES, SIZE, HEADS, DIM];
    let (mut keys, mut values) = (vec![0.0f32; PAGES * SIZE * HEADS * DIM], vec![0.0f32; PAGES * SIZE * HEADS * DIM]);
    let caches = (ViewMut::new(&mut keys, shape).unwrap(), ViewMut::new(&mut values, shape).unwrap());
    let want = write_and_attend(level, caches.0, caches.1, &inputs);
    for (axis, whole) in [
        (Axis::Seq, [PAGES, 2 * SIZE, HEADS, DIM]),
        (Axis::Heads, [PAGES, SIZE, 2 * HEADS, DIM]),
        (Axis::Dim, [PAGES, SIZE, HEADS, 2 * DIM]),
    ] {
        let mut pool = vec![0.0f32; 2 * keys.len()];
        let (k_cache, v_cache) =
            ViewMut::new(&mut pool, whole).unwrap().split_at(axis, whole[axis as usize] / 2).unwrap();
        assert_eq!((k_cache.shape(), v_cache.shape()), (shape, shape));
        assert_eq!(write_and_attend(level, k_cache, v_cache, &inputs), want, "{axis:?}");
    }
}

/// Each thread writes the sequences of its half; the caches are those of one write.
fn halves_on_threads(level: &Level) {
    let mut rng = Rng::new(98);
    let (new, cache) = ([4, 3, HEADS, DIM], [4, 16, HEADS, DIM]);
    let (k, v) = (floats(&mut rng, new.iter().product()), floats(&mut rng, new.iter().product()));
    let (k, v) = (View::new(&k, new).unwrap(), View::new(&v, new).unwrap());
    let positions = [5, 0, 13, 2];
    let mut whole = [vec![0.0f32; cache.iter().product()], vec![0.0f32; cache.iter().product()]];
    let mut halves = whole.clone();
    let [keys, values] = whole.each_mut().map(|data| ViewMut::new(data, cache).unwrap());
    kv_write(&level.context, &Serial, KvWrite::new(k, v, keys, values, Destination::positions(&positions))).unwrap();
    let [keys, values] =
        halves.each_mut().map(|data| ViewMut::new(data, cache).unwrap().split_at(Axis::Batch, 2).unwrap());
    let (k, v) = (k.split_at(Axis::Batch, 2).unwrap(), v.split_at(Axis::Batch, 2).unwrap());
    std::thread::scope(|scope| {
        for (k, v, keys, values, positions) in
            [(k.0, v.0, keys.0, values.0, &positions[..2]), (k.1, v.1, keys.1, values.1, &positions[2..])]
        {
            let write = KvWrite::new(k, v, keys, values, Destination::positions(positions));
            scope.spawn(|| kv_write(&level.context, &Serial, write).unwrap());
        }
    });
    level.checked(Op::KvWrite, DType::F32, DType::F32);
    assert!(halves == whole);
}
