//! Queries with positions of their own: causality, windows and ALiBi count those, of the queries' own keys too.

use crate::attention::check;
use crate::common::attention::{BitMaskTensor, Case, Shape, formats, keys, kv_types, precision, values};
use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout as Strides, Place, Rng, Tensor, close, scaled};
use crate::harness::{Level, tests};
use crate::semantics::{random_case, visible};
use kvlane::{
    AttentionOptions, AttentionPlan, AttentionTensors, ChunkMerge, DType, Layout, Op, Serial, Status, Workspace,
    alibi_slopes, attention, attention_chunks, chunk_states_len, merge_chunks,
};

tests! {
    levels: random_positions, numbers_of_keys, trees, layouts, chunks;
    once: mistakes, plans_advance;
}

/// A random case in which queries stand anywhere, most of them near their keys.
fn random_positions_case(rng: &mut Rng) -> (Case, String) {
    let (mut case, what) = random_case(rng);
    let [batch, tokens, ..] = case.q.shape;
    let keys = case.k.shape[1];
    let positions = (0..batch * tokens)
        .map(|i| match rng.below(10) {
            0 => rng.between(0, 3 * keys) as i32 - keys as i32,
            _ => (keys + i % tokens) as i32 - tokens as i32 - rng.below(tokens + 1) as i32,
        })
        .collect();
    let what = format!("{what} positions {positions:?}");
    case.options.query_positions = Some(positions);
    (case, what)
}

/// Against the oracle, whatever else is masked; what no query sees changes no bit; a plan and several threads give the same bits.
fn random_positions(level: &Level) {
    let mut rng = Rng::new(700);
    for _ in 0..scaled(200) {
        let (mut case, what) = random_positions_case(&mut rng);
        check(level, &case, || what.clone());
        let clean = case.run(&level.context).all_bits();
        let split = case.run_with(&level.context, &Threads(3)).unwrap();
        assert!(split.all_bits() == clean, "on three threads: {what}");

        let all = case.options.borrow();
        let plan = AttentionPlan::new(case.q.shape, case.k.shape, &all).unwrap();
        let mut rest = AttentionOptions::new().plan(&plan).precision(all.precision);
        (rest.bias, rest.scale, rest.softcap) = (all.bias, all.scale, all.softcap);
        (rest.alibi_slopes, rest.sink_logits) = (all.alibi_slopes, all.sink_logits);
        let planned = case
            .run_on(&level.context, &Serial, &mut Workspace::new(), (&case.k, &case.v), rest)
            .expect("a valid plan");
        assert!(planned.all_bits() == clean, "with a plan: {what}");

        let [batch, tokens, heads, _] = case.q.shape;
        for b in 0..batch {
            for j in 0..case.k.shape[1] {
                if (0..tokens).all(|t| (0..heads).all(|h| !visible(&case, [b, t, h, j]))) {
                    case.k.poison_token(b, j);
                    case.v.poison_token(b, j);
                }
            }
        }
        assert!(case.run(&level.context).all_bits() == clean, "{what}");
    }
}

/// Positions that say what is so without them change no bit.
fn numbers_of_keys(level: &Level) {
    let mut rng = Rng::new(701);
    for _ in 0..scaled(100) {
        let (mut case, what) = random_case(&mut rng);
        let want = case.run(&level.context).all_bits();
        let [batch, tokens, ..] = case.q.shape;
        let o = &case.options;
        let length = |b: usize| o.lengths.as_ref().map_or(case.k.shape[1] as i32, |l| l[b]);
        let offset = |b: usize| o.offsets.as_ref().map_or(length(b) - tokens as i32, |o| o[b]);
        let positions = (0..batch).flat_map(|b| (0..tokens as i32).map(move |t| (b, t))).map(|(b, t)| offset(b) + t);
        case.options.query_positions = Some(positions.collect());
        assert!(case.run(&level.context).all_bits() == want, "{what}");
        level.checked(Op::Attention, case.k.dtype, case.v.dtype);
    }
}

/// A tree of guesses behind a cache gives each guess what it gets where its ancestors alone stand behind the cache.
fn trees(level: &Level) {
    let mut rng = Rng::new(702);
    for round in 0..scaled(24) {
        let kv = rng.pick(&kv_types());
        let (cached, n) = (rng.between(1, 90), rng.between(2, 12));
        let shape =
            Shape { tokens: n, keys: cached + n, kv_heads: 2, group: 2, dim: 32, v_dim: 32, ..Shape::default() };
        // Each guess is the child of one before it, or of the cache.
        let parents: Vec<Option<usize>> =
            (0..n).map(|i| if i == 0 { None } else { rng.below(i + 1).checked_sub(1) }).collect();
        let path = |i: usize| {
            let mut path: Vec<usize> = std::iter::successors(Some(i), |&i| parents[i]).collect();
            path.reverse();
            path
        };
        let bits = |[_, i, _, j]: [usize; 4]| path(i).contains(&j);
        let tree =
            BitMaskTensor::new([1, n, 4, n], [(16 * n) as i64, 16, 0], 0, vec![cached as i32], Place::GuardAfter, bits);
        let window = rng.chance(0.7).then(|| rng.below(cached + 3) as u32);
        let case = Case::new(&mut rng, shape, kv).with(|o| {
            o.bit_mask = Some(tree);
            o.query_positions = Some((0..n).map(|i| (cached + path(i).len()) as i32 - 1).collect());
            o.window_left = window;
            o.causal = round % 2 == 0;
            o.alibi = (round % 3 != 0).then(|| alibi_slopes(4));
            o.sink_logits = (round % 5 == 0).then(|| vec![0.5; 4]);
        });
        check(level, &case, || format!("{kv} tree {parents:?} behind {cached}, window {window:?}"));
        let got = case.run(&level.context);
        let bound = level.checked(Op::Attention, kv, kv);
        for i in 0..n {
            let tokens: Vec<usize> = (0..cached).chain(path(i).into_iter().map(|j| cached + j)).collect();
            let row = Shape { tokens: 1, keys: tokens.len(), ..shape };
            let mut alone = Case::new(&mut rng, row, kv).with(|o| {
                o.causal = true;
                o.window_left = window;
                o.alibi = case.options.alibi.clone();
                o.sink_logits = case.options.sink_logits.clone();
            });
            alone.q = case.q.cut(0..1, i..i + 1, Strides::BSHD);
            for (to, from) in [(&mut alone.k, &case.k), (&mut alone.v, &case.v)] {
                for at in indices(to.shape) {
                    to.set_element_bits(at, from.bits([0, tokens[at[1]], at[2], at[3]]));
                }
            }
            let want = alone.run(&level.context);
            for at in indices(want.out.shape) {
                let got = got.out.get([0, i, at[2], at[3]]);
                close(got.into(), want.out.get(at).into(), 4.0 * bound, || {
                    format!("{kv} guess {i} of {parents:?} behind {cached}, window {window:?}: {at:?}")
                });
            }
            for h in 0..4 {
                close(got.lse[i * 4 + h].into(), want.lse[h].into(), 20.0 * bound, || format!("LSE of {i}"));
            }
        }
    }
}

/// In pages and for ragged queries, the bits of contiguous sequences.
fn layouts(level: &Level) {
    let mut rng = Rng::new(703);
    for _ in 0..scaled(60) {
        let (mut case, what) = random_positions_case(&mut rng);
        let [batch, tokens, heads, dim] = case.q.shape;
        let slots = case.k.shape[1];
        let lengths = case.options.lengths.get_or_insert_with(|| vec![slots as i32; batch]).clone();
        let want = case.run(&level.context);
        let (size, kv) = (rng.between(1, 40), case.k.dtype);
        let per_row = slots.div_ceil(size);
        let mut table: Vec<i32> = (0..(batch * per_row) as i32).collect();
        (1..table.len()).rev().for_each(|i| table.swap(i, rng.below(i + 1)));
        let paged = |from: &Tensor| {
            let shape = [table.len(), size, from.shape[2], from.shape[3]];
            let mut pool = Tensor::input(kv, shape, Strides::BSHD, Place::Heap);
            for [b, j, h, d] in indices(from.shape) {
                if (j as i32) < lengths[b] {
                    let page = table[b * per_row + j / size] as usize;
                    pool.set_element_bits([page, j % size, h, d], from.bits([b, j, h, d]));
                }
            }
            pool
        };
        let (k, v) = (paged(&case.k), paged(&case.v));
        let options = case.options.borrow().layout(Layout::paged(&table, per_row));
        let got = case.run_on(&level.context, &Threads(2), &mut Workspace::new(), (&k, &v), options).unwrap();
        assert!(got.all_bits() == want.all_bits(), "pages of {size}: {what}");

        // The queries of all sequences one after another, with a gap before the first.
        let total = 1 + batch * tokens;
        let starts: Vec<i32> = (0..=batch).map(|b| (1 + b * tokens) as i32).collect();
        let mut q = Tensor::input(case.q.dtype, [1, total, heads, dim], Strides::BSHD, Place::Heap);
        for [b, t, h, d] in indices(case.q.shape) {
            q.set_element_bits([0, 1 + b * tokens + t, h, d], case.q.bits([b, t, h, d]));
        }
        let mut positions = vec![i32::MIN];
        positions.extend(case.options.query_positions.as_ref().unwrap());
        let mut out = Tensor::output(case.out_dtype, [1, total, heads, case.v.shape[3]], Strides::BSHD, Place::Heap);
        let tensors = AttentionTensors::new(q.view(), keys(&case.k), values(&case.v), out.view_mut());
        let options = case.options.borrow().cu_seqlens_q(&starts).query_positions(&positions);
        attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).unwrap();
        level.checked(Op::Attention, kv, kv);
        for [b, t, h, d] in indices(want.out.shape) {
            let got = out.bits([0, 1 + b * tokens + t, h, d]);
            assert_eq!(got, want.out.bits([b, t, h, d]), "ragged [{b}, {t}, {h}, {d}]: {what}");
        }
    }
}

/// A sequence in segments: positions and offsets are counted from the start of each.
fn chunks(level: &Level) {
    let mut rng = Rng::new(704);
    for kv in kv_types() {
        for tokens in [1, 6, 20] {
            let shape = Shape { tokens, keys: 2600, kv_heads: 1, group: 3, dim: 16, v_dim: 16, ..Shape::default() };
            let length = 2048 + rng.between(tokens / 2, 40) as i32;
            let positions: Vec<i32> = (0..tokens).map(|_| length - 1 - rng.below(tokens) as i32).collect();
            let case = Case::new(&mut rng, shape, kv).with(|o| {
                o.causal = true;
                o.window_left = Some(1500);
                o.alibi = Some(vec![0.01, 0.5, -0.1]);
                o.lengths = Some(vec![length]);
                o.query_positions = Some(positions.clone());
            });
            let want = case.run(&level.context);
            check(level, &case, || format!("{kv} {positions:?} of {length}"));
            let states: Vec<Vec<f32>> = [0..1024, 1024..2048, 2048..2600]
                .map(|span: std::ops::Range<usize>| {
                    let mut states = vec![f32::NAN; chunk_states_len(case.q.shape, span.len(), shape.v_dim)];
                    let first = span.start as i32;
                    let (lengths, offsets) =
                        ([(length - first).clamp(0, span.len() as i32)], [length - tokens as i32 - first]);
                    let local: Vec<i32> = positions.iter().map(|p| p - first).collect();
                    let mut options = case.options.borrow().lengths(&lengths).offsets(&offsets);
                    options.query_positions = Some(&local);
                    let [k, v] = [keys(&case.k), values(&case.v)].map(|cache| cache.seq(span.start, span.len()));
                    let tensors = (case.q.view(), k.unwrap(), v.unwrap());
                    attention_chunks(&level.context, &Serial, &mut Workspace::new(), tensors, &options, &mut states)
                        .unwrap();
                    states
                })
                .into();
            let states: Vec<&[f32]> = states.iter().map(Vec::as_slice).collect();
            let mut out = Tensor::output(DType::F32, [1, tokens, 3, 16], Strides::BSHD, Place::Heap);
            let mut lse = vec![f32::NAN; tokens * 3];
            let [k_format, v_format] = formats(kv, kv);
            let merge = ChunkMerge::new(1, k_format, v_format).precision(precision());
            let to = out.view_mut();
            merge_chunks(&level.context, &Serial, &mut Workspace::new(), &states, &merge, to, Some(&mut lse)).unwrap();
            assert_eq!(out.all_bits(), want.out.all_bits(), "{kv} {positions:?} of {length}");
            assert_eq!(lse, want.lse);
        }
    }
}

fn mistakes() {
    let shape = ([2, 3, 1, 8], [2, 16, 1, 8]);
    let plan = |options: &AttentionOptions| AttentionPlan::new(shape.0, shape.1, options);
    let few = [0; 5];
    let error = plan(&AttentionOptions::new().query_positions(&few)).unwrap_err();
    assert_eq!(error.status(), Status::Shape);
    assert_eq!(error.message(), "query_positions has 5 entries, but q has batch = 2 and seq = 3");
    // Of a ring that has lost keys, each query must see only what it holds.
    let ring = AttentionOptions::new().lengths(&[30, 30]).layout(Layout::ring(2)).window_left(4);
    plan(&ring.query_positions(&[27, 28, 28, 27, 29, 28])).unwrap();
    let error = plan(&ring.query_positions(&[27, 28, 28, 27, 19, 28])).unwrap_err();
    assert!(
        error.message().contains("sequence 1 sees keys from 15 on") && error.message().contains("from 16 on"),
        "{error}"
    );
    let given = plan(&ring.query_positions(&[27, 28, 28, 27, 29, 28])).unwrap();
    let context = kvlane::Context::new().unwrap();
    let (q, k, mut out) = (vec![0f32; 48], vec![0f32; 256], vec![0f32; 48]);
    let view = |x| kvlane::View::new(x, shape.1).unwrap();
    let tensors = AttentionTensors::new(
        kvlane::View::new(&q, shape.0).unwrap(),
        view(&k),
        view(&k),
        kvlane::ViewMut::new(&mut out, shape.0).unwrap(),
    );
    let options = AttentionOptions::new().plan(&given).query_positions(&few);
    let error = attention(&context, &Serial, &mut Workspace::new(), tensors, &options).unwrap_err();
    assert!(error.message().contains("both plan and query_positions are given"), "{error}");
}

/// The positions of a plan go on with its sequences, and back if that fails.
fn plans_advance() {
    let mut rng = Rng::new(705);
    let context = &kvlane::Context::new().unwrap();
    let shape = Shape { batch: 2, tokens: 3, keys: 40, ..Shape::default() };
    let mut case = Case::new(&mut rng, shape, DType::F32).with(|o| {
        (o.causal, o.window_left) = (true, Some(5));
        o.lengths = Some(vec![20, 30]);
        o.query_positions = Some(vec![17, 18, 18, 29, 28, 28]);
    });
    let mut plan = AttentionPlan::new(case.q.shape, case.k.shape, &case.options.borrow()).unwrap();
    assert!(plan.advance(&[1, 11]).is_err());
    plan.advance(&[2, 1]).unwrap();
    let planned = AttentionOptions::new().plan(&plan).precision(precision());
    let got = case.run_on(context, &Serial, &mut Workspace::new(), (&case.k, &case.v), planned).unwrap();
    case.options.lengths = Some(vec![22, 31]);
    case.options.query_positions = Some(vec![19, 20, 20, 30, 29, 29]);
    assert_eq!(got.all_bits(), case.run(context).all_bits());
}
