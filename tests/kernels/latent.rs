//! Latent attention (MLA): values are the first elements of their keys, in the same memory, and many query heads share one KV head.

use crate::common::attention::{Case, Options, Outcome, Shape, kv_types, precision};
use crate::common::fp8::Quantised;
use crate::common::int8::Int8;
use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout as Strides, Place, Rng, Tensor, thin};
use crate::harness::{Level, tests};
use kvlane::{
    AttentionOptions, AttentionPlan, AttentionTensors, Axis, CacheFormat, CacheView, DType, Destination, KvWrite,
    Layout, Op, Pairing, Positions, Rope, RopeFrequencies, RopeScaling, Runner, Serial, View, ViewMut, Workspace,
    attention, kv_write, rope,
};

tests! {
    levels: values_inside_keys, quantised_values_inside_keys, prompts_in_chunks, heads_alone, written_in_parts;
    once:;
}

/// Elements of a key, of which the first are the value and the last are rotated.
const DIM: usize = 576;
const LATENT: usize = 512;

/// A copy of some elements of every head.
fn elements(tensor: &Tensor, dims: std::ops::Range<usize>) -> Tensor {
    let [batch, seq, heads, _] = tensor.shape;
    let mut part = Tensor::input(tensor.dtype, [batch, seq, heads, dims.len()], Strides::BSHD, Place::Heap);
    for [b, s, h, d] in indices(part.shape) {
        part.set_element_bits([b, s, h, d], tensor.bits([b, s, h, dims.start + d]));
    }
    part
}

/// A case whose values are copies of the first elements of its keys.
fn latent_case(rng: &mut Rng, dtype: DType, shape: Shape) -> Case {
    let mut case = Case::new(rng, Shape { dim: DIM, v_dim: LATENT, ..shape }, dtype).with(|o| o.causal = true);
    case.v = elements(&case.k, 0..LATENT);
    case
}

/// The call with values that are a view of the keys.
fn run(level: &Level, runner: &dyn Runner, case: &Case, k: CacheView, options: &AttentionOptions) -> Outcome {
    run_apart(level, runner, case, k, k, options)
}

/// The call with values that are the first elements of `v`.
fn run_apart(
    level: &Level,
    runner: &dyn Runner,
    case: &Case,
    k: CacheView,
    v: CacheView,
    options: &AttentionOptions,
) -> Outcome {
    let [batch, tokens, heads, _] = case.q.shape;
    let mut out = Tensor::output(case.out_dtype, [batch, tokens, heads, LATENT], Strides::BSHD, Place::GuardAfter);
    let mut lse = vec![f32::NAN; batch * tokens * heads];
    let v = v.dim(0, LATENT).expect("the first elements");
    let tensors = AttentionTensors::new(case.q.view(), k, v, out.view_mut()).lse(&mut lse);
    attention(&level.context, runner, &mut Workspace::new(), tensors, options).expect("a valid call");
    Outcome { out, lse }
}

/// Contiguous, in pages, with a plan, on several threads.
fn values_inside_keys(level: &Level) {
    const PAGE: usize = 16;
    let mut rng = Rng::new(400);
    for dtype in kv_types() {
        for (tokens, group, keys) in thin(vec![(1, 33, 64), (1, 16, 1100), (1, 128, 130), (7, 16, 150), (40, 3, 41)]) {
            let shape = Shape { batch: 2, tokens, group, keys, ..Shape::default() };
            let lengths = [keys as i32, keys as i32 - 1];
            let case = latent_case(&mut rng, dtype, shape).with(|o| o.lengths = Some(lengths.to_vec()));
            let want = case.run(&level.context);
            case.assert_close(&level.context, &want, &|| format!("{dtype} {shape:?}"));
            // The same tokens in pages.
            let per_row = keys.div_ceil(PAGE);
            let table: Vec<i32> = (0..2 * per_row as i32).rev().collect();
            let mut pool = Tensor::input(dtype, [2 * per_row, PAGE, 1, DIM], Strides::BSHD, Place::GuardAfter);
            for [b, j, _, d] in indices(case.k.shape) {
                if j < lengths[b] as usize {
                    let page = table[b * per_row + j / PAGE] as usize;
                    pool.set_element_bits([page, j % PAGE, 0, d], case.k.bits([b, j, 0, d]));
                }
            }
            let options = case.options.borrow();
            let paged = options.layout(Layout::paged(&table, per_row));
            let plan = AttentionPlan::new(case.q.shape, pool.shape, &paged).expect("a valid plan");
            let planned = AttentionOptions::new().plan(&plan).precision(precision());
            for (name, k, options) in
                [("contiguous", &case.k, options), ("paged", &pool, paged), ("planned", &pool, planned)]
            {
                for threads in [1, 3] {
                    let got = run(level, &Threads(threads), &case, k.view().into(), &options);
                    level.checked(Op::Attention, dtype, dtype);
                    got.out.assert_gaps();
                    assert!(got.all_bits() == want.all_bits(), "{dtype} {shape:?}, {name}, {threads} threads");
                }
            }
        }
    }
}

/// Values share the scales of their keys. Heads of a token have the bits that few of them have alone, which read the cache where many
/// read a widened copy, and so they have with values in other memory.
fn quantised_values_inside_keys(level: &Level) {
    let mut rng = Rng::new(401);
    let formats = CacheFormat::ALL.into_iter().filter(|format| format.dtype().is_none() && !format.is_affine());
    for (format, (tokens, group, keys)) in formats.zip([(1, 16, 140), (2, 128, 75), (5, 16, 140)].into_iter().cycle()) {
        let shape = Shape { tokens, group, keys, ..Shape::default() };
        let mut case = latent_case(&mut rng, DType::F32, shape);
        let cache = Quantised::of(&case.k, format, Place::GuardAfter);
        let copy = Quantised::of(&case.k, format, Place::GuardAfter);
        case.k.fill(|at| cache.get(at) as f32);
        case.v = elements(&case.k, 0..LATENT);
        let options = case.options.borrow();
        let got = run(level, &Serial, &case, cache.view(), &options);
        case.assert_close(&level.context, &got, &|| format!("{format} {shape:?}"));
        let apart = run_apart(level, &Serial, &case, cache.view(), copy.view(), &options);
        assert!(got.all_bits() == apart.all_bits(), "{format} {shape:?}, values in other memory");
        for heads in thin(vec![1, 5, 12]) {
            let mut q = Tensor::input(DType::F32, [1, tokens, heads, DIM], Strides::PADDED, Place::Heap);
            q.fill(|at| case.q.get(at));
            let some = Case { q, ..latent_case(&mut rng, DType::F32, Shape::default()) };
            let some = run(level, &Serial, &some, cache.view(), &options);
            for [_, t, h, _] in indices([1, tokens, heads, 1]) {
                let same = (0..LATENT).all(|d| some.out.bits([0, t, h, d]) == got.out.bits([0, t, h, d]));
                assert!(same, "{format} {shape:?}, head {h} of {heads}");
            }
        }
    }
}

/// Token by token, in chunks and as a whole, with few and with many rows of a token.
fn prompts_in_chunks(level: &Level) {
    let mut rng = Rng::new(402);
    for dtype in kv_types() {
        for (total, group) in thin(vec![(70, 1), (40, 16), (9, 71)]) {
            let case = latent_case(&mut rng, dtype, Shape { tokens: total, keys: total, group, ..Shape::default() });
            let whole = run(level, &Threads(2), &case, case.k.view().into(), &case.options.borrow());
            case.assert_close(&level.context, &whole, &|| format!("{dtype} {total} tokens of {group} heads"));
            for piece in [1, 6, total - 1] {
                for from in (0..total).step_by(piece) {
                    let end = (from + piece).min(total);
                    let part = Case {
                        q: case.q.cut(0..1, from..end, Strides::BSHD),
                        k: case.k.cut(0..1, 0..end, Strides::BSHD),
                        v: Tensor::input(dtype, [1, 0, 1, LATENT], Strides::BSHD, Place::Heap),
                        out_dtype: case.out_dtype,
                        out_layout: case.out_layout,
                        out_place: case.out_place,
                        options: Options { causal: true, ..Options::default() },
                    };
                    let got = run(level, &Serial, &part, part.k.view().into(), &part.options.borrow());
                    level.checked(Op::Attention, dtype, dtype);
                    for t in from..end {
                        assert_eq!(
                            got.row_bits(0, t - from),
                            whole.row_bits(0, t),
                            "{dtype} token {t} of {from}..{end}"
                        );
                    }
                }
            }
        }
    }
}

/// Some heads of a token have the bits that they have among all, on whichever path.
fn heads_alone(level: &Level) {
    let mut rng = Rng::new(403);
    for dtype in kv_types() {
        let case = latent_case(&mut rng, dtype, Shape { group: 128, keys: 200, ..Shape::default() });
        let all = run(level, &Threads(2), &case, case.k.view().into(), &case.options.borrow());
        for heads in thin(vec![1, 2, 3, 7, 11, 12, 16, 31, 127]) {
            let mut q = Tensor::input(DType::F32, [1, 1, heads, DIM], Strides::PADDED, Place::Heap);
            q.fill(|at| case.q.get(at));
            let some = Case { q, ..latent_case(&mut rng, dtype, Shape::default()) };
            let got = run(level, &Serial, &some, case.k.view().into(), &some.options.borrow());
            level.checked(Op::Attention, dtype, dtype);
            let same = |h: usize| (0..LATENT).all(|d| got.out.bits([0, 0, h, d]) == all.out.bits([0, 0, h, d]));
            assert!(
                (0..heads).all(|h| same(h) && got.lse[h].to_bits() == all.lse[h].to_bits()),
                "{dtype} {heads} heads"
            );
        }
    }
}

/// One write puts the latent elements and the rotated ones beside each other: the two parts of one view of the cache. A quantised
/// cache, whose elements of a head share a scale, takes whole keys and no values.
fn written_in_parts(level: &Level) {
    let mut rng = Rng::new(404);
    let frequencies = RopeFrequencies::new(DIM - LATENT, 10_000.0, &RopeScaling::None).unwrap();
    let (positions, tokens) = ([5], 3);
    let turn = Rope::new(Pairing::Interleaved, DIM - LATENT, &frequencies, Positions::Offsets(&positions));
    for dtype in kv_types() {
        let random =
            |rng: &mut Rng, dim| Tensor::random(rng, DType::F32, [1, tokens, 1, dim], Strides::BSHD, Place::Heap);
        let (latent, rotary) = (random(&mut rng, LATENT), random(&mut rng, DIM - LATENT));
        let mut cache = Tensor::output(dtype, [1, 20, 1, DIM], Strides::BSHD, Place::GuardAfter);
        let (to_latent, to_rotary) = cache.view_mut().split_at(Axis::Dim, LATENT).unwrap();
        let to = Destination::positions(&positions);
        let write = KvWrite::new(rotary.view(), latent.view(), to_rotary, to_latent, to).rope(turn);
        kv_write(&level.context, &Threads(2), write).unwrap();
        let mut rotated = Tensor::output(dtype, [1, tokens, 1, DIM - LATENT], Strides::BSHD, Place::Heap);
        rope(&level.context, &Serial, rotary.view(), rotated.view_mut(), &turn).unwrap();
        let stored = latent.cast(dtype);
        for [_, t, _, d] in indices([1, tokens, 1, DIM]) {
            let want = if d < LATENT { stored.bits([0, t, 0, d]) } else { rotated.bits([0, t, 0, d - LATENT]) };
            assert_eq!(cache.bits([0, 5 + t, 0, d]), want, "{dtype} token {t} element {d}");
        }
    }
    let keys = Tensor::random(&mut rng, DType::F32, [1, tokens, 1, DIM], Strides::BSHD, Place::Heap);
    let mut cache = Int8::output([1, 20, 1, DIM], Strides::BSHD, DType::F32, Strides::BSHD, Place::Heap);
    let none: (&[f32], &mut [f32]) = (&[], &mut []);
    let (no_values, no_cache) =
        (View::new(none.0, [1, tokens, 1, 0]).unwrap(), ViewMut::new(none.1, [1, 20, 1, 0]).unwrap());
    let write = KvWrite::new(keys.view(), no_values, cache.view_mut(), no_cache, Destination::positions(&positions));
    kv_write(&level.context, &Serial, write).unwrap();
    let want = Int8::of(&keys, DType::F32, Place::Heap);
    for t in 0..tokens {
        assert_eq!(cache.head(0, 5 + t, 0), want.head(0, t, 0), "token {t}");
    }
}
