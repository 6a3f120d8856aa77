//! Bits depend on the query row's inputs and on the level only.

use crate::common::attention::{BitMaskTensor, Case, MaskTensor, Options, Outcome, Shape, keys, kv_types, values};
use crate::common::runners::{Backwards, Threads};
use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, few_cases, scaled, thin};
use crate::harness::{Level, tests};
use crate::semantics::random_case;
use kvlane::{
    AttentionOptions, AttentionState, AttentionTensors, DType, Destination, KeyOrder, KvWrite, Op, Pairing, Positions,
    Prefetch, Rope, RopeFrequencies, RopeScaling, Runner, SPLIT_GRID, ScoreTiles, View, ViewMut, Workspace,
    alibi_slopes, attention, kv_write, merge_states, repeat_kv, rope,
};

tests! {
    levels: attention_and_threads, long_decode_and_threads, memory_bound_operations_and_threads, row_alone_and_in_a_batch,
        strides, prompt_in_chunks, capacity_and_dead_keys, more_tokens_around, same_call_twice, dirty_workspace,
        tunings, places_of_one_token;
    once:;
}

/// Runs a closure with every kind of runner.
fn each_runner(mut run: impl FnMut(&str, &dyn Runner)) {
    #[cfg(feature = "rayon")]
    for threads in [1, 2, 3, 7] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        run(&format!("rayon {threads}"), &kvlane::Rayon::pool(&pool));
    }
    run("threads 3", &Threads(3));
    run("threads 7", &Threads(7));
    run("backwards 2", &Backwards(2));
    run("backwards 64", &Backwards(64));
}

fn attention_and_threads(level: &Level) {
    let mut rng = Rng::new(60);
    for dtype in kv_types() {
        for (batch, tokens, kv_heads, group, keys) in
            thin(vec![(3, 40, 2, 4, 150), (1, 150, 1, 3, 300), (1, 300, 1, 1, 1200), (2, 1, 4, 8, 700)])
        {
            let shape = Shape { batch, tokens, kv_heads, group, keys, dim: 32, v_dim: 24 };
            let case = Case::new(&mut rng, shape, dtype).with(|o| {
                o.causal = true;
                o.sink_logits = Some(vec![0.5; kv_heads * group]);
                o.lengths = Some((0..batch).map(|b| (keys - 7 * b) as i32).collect());
            });
            let serial = case.run(&level.context).all_bits();
            each_runner(|name, runner| {
                let outcome = case.run_with(&level.context, runner).expect("a valid call");
                level.checked(Op::Attention, dtype, dtype);
                assert!(outcome.all_bits() == serial, "{dtype} {shape:?} {name}");
            });
        }
    }
}

/// One query, more keys than a chunk: the sequence itself is split over threads, on a grid that does not depend on
/// them.
fn long_decode_and_threads(level: &Level) {
    let mut rng = Rng::new(61);
    for dtype in kv_types() {
        for keys in thin(vec![1025, 5121, 3000, 2048]) {
            let shape = Shape { keys, tokens: 1, kv_heads: 1, group: 4, dim: 64, v_dim: 40, ..Shape::default() };
            let mut cases = vec![Case::new(&mut rng, shape, dtype)];
            // A window, a first key, and masked chunks in the middle.
            cases.push(Case::new(&mut rng, shape, dtype).with(|o| (o.causal, o.window_left) = (true, Some(1100))));
            cases.push(
                Case::new(&mut rng, shape, dtype)
                    .with(|o| (o.kv_starts, o.alibi) = (Some(vec![900]), Some(alibi_slopes(4)))),
            );
            cases.push(Case::new(&mut rng, shape, dtype).with(|o| {
                let strides = [0, 0, 0, 1];
                let visible = |at: [usize; 4]| at[3] < 64 || at[3] > 1024;
                o.mask = Some(MaskTensor::new(shape.scores(), strides, Place::Heap, visible));
            }));
            for case in &cases {
                let serial = case.run(&level.context);
                case.assert_close(&level.context, &serial, &|| format!("{dtype} {keys} keys"));
                each_runner(|name, runner| {
                    let outcome = case.run_with(&level.context, runner).expect("a valid call");
                    level.checked(Op::Attention, dtype, dtype);
                    assert!(outcome.all_bits() == serial.all_bits(), "{dtype} {keys} keys {name}");
                });
            }
        }
    }
}

fn memory_bound_operations_and_threads(level: &Level) {
    let mut rng = Rng::new(62);
    // Enough elements that the operations use several threads.
    let shape = [2, 300, 4, 64];
    let f = RopeFrequencies::new(64, 10_000.0, &RopeScaling::None).unwrap();
    for dtype in thin(DType::ALL.to_vec()) {
        let k = Tensor::random(&mut rng, DType::F32, shape, Layout::BSHD, Place::Heap);
        let v = Tensor::random(&mut rng, DType::F32, shape, Layout::BHSD, Place::Heap);
        let same = Tensor::random(&mut rng, dtype, shape, Layout::PADDED, Place::Heap);
        let lse: Vec<f32> = (0..2 * 300 * 4).map(|_| rng.f32()).collect();
        let positions = Positions::Offsets(&[0, 17]);
        let options = Rope::new(Pairing::HalfSplit, 64, &f, positions);
        let all = |runner: &dyn Runner| -> Vec<Vec<u32>> {
            let context = &level.context;
            let mut rotated = Tensor::output(dtype, shape, Layout::BSHD, Place::Heap);
            rope(context, runner, k.view(), rotated.view_mut(), &options).unwrap();
            level.checked(Op::Rope, DType::F32, dtype);
            let mut k_cache = Tensor::output(dtype, [2, 310, 4, 64], Layout::BHSD, Place::Heap);
            let mut v_cache = Tensor::output(dtype, [2, 310, 4, 64], Layout::BSHD, Place::Heap);
            kv_write(
                context,
                runner,
                KvWrite::new(
                    k.view(),
                    v.view(),
                    k_cache.view_mut(),
                    v_cache.view_mut(),
                    Destination::positions(&[3, 10]),
                )
                .rope(options),
            )
            .unwrap();
            level.checked(Op::KvWrite, DType::F32, dtype);
            let mut repeated = Tensor::output(dtype, [2, 300, 12, 64], Layout::BSHD, Place::Heap);
            repeat_kv(context, runner, same.view(), repeated.view_mut()).unwrap();
            level.checked(Op::RepeatKv, dtype, dtype);
            let mut merged = Tensor::output(dtype, shape, Layout::BSHD, Place::Heap);
            let state = AttentionState::new(same.view(), &lse);
            let mut joint = vec![0.0; lse.len()];
            merge_states(context, runner, &[state; 3], merged.view_mut(), Some(&mut joint)).unwrap();
            level.checked(Op::MergeStates, dtype, dtype);
            let joint = joint.into_iter().map(f32::to_bits).collect();
            vec![
                rotated.all_bits(),
                k_cache.all_bits(),
                v_cache.all_bits(),
                repeated.all_bits(),
                merged.all_bits(),
                joint,
            ]
        };
        let serial = all(&kvlane::Serial);
        each_runner(|name, runner| assert!(all(runner) == serial, "{dtype} {name}"));
    }
}

/// A sequence of a batch has the bits that it has alone; so has each KV head.
fn row_alone_and_in_a_batch(level: &Level) {
    let mut rng = Rng::new(63);
    for dtype in kv_types() {
        for tokens in [1, 3, 30] {
            let shape = Shape { batch: 3, tokens, kv_heads: 2, group: 3, keys: 140, dim: 24, v_dim: 24 };
            let lengths = [140, 77, 64];
            let starts = [0, 3, 64];
            let case = Case::new(&mut rng, shape, dtype).with(|o| {
                (o.causal, o.lengths, o.kv_starts) = (true, Some(lengths.to_vec()), Some(starts.to_vec()));
            });
            let together = case.run(&level.context);
            for b in 0..3 {
                let alone = Case {
                    q: case.q.cut(b..b + 1, 0..tokens, Layout::PADDED),
                    // Alone, the cache can also be exactly as long as the sequence.
                    k: case.k.cut(b..b + 1, 0..lengths[b] as usize, Layout::BHSD),
                    v: case.v.cut(b..b + 1, 0..lengths[b] as usize, Layout::BSHD),
                    options: Options { causal: true, kv_starts: Some(vec![starts[b]]), ..Options::default() },
                    out_dtype: DType::F32,
                    out_layout: Layout::BHSD,
                    out_place: Place::Heap,
                };
                let alone = alone.run(&level.context);
                level.checked(Op::Attention, dtype, dtype);
                for t in 0..tokens {
                    assert_eq!(alone.row_bits(0, t), together.row_bits(b, t), "{dtype} row {b} token {t} of {tokens}");
                }
            }
        }
    }
}

fn strides(level: &Level) {
    let mut rng = Rng::new(64);
    for _ in 0..scaled(80) {
        let (case, what) = random_case(&mut rng);
        let want = case.run(&level.context).all_bits();
        let options = Options {
            scale: case.options.scale,
            softcap: case.options.softcap,
            causal: case.options.causal,
            window_left: case.options.window_left,
            window_right: case.options.window_right,
            lengths: case.options.lengths.clone(),
            kv_starts: case.options.kv_starts.clone(),
            offsets: case.options.offsets.clone(),
            query_positions: None,
            prefix_lengths: case.options.prefix_lengths.clone(),
            bit_mask: case.options.bit_mask.as_ref().map(BitMaskTensor::spread),
            alibi: case.options.alibi.clone(),
            sink_logits: case.options.sink_logits.clone(),
            bias: case.options.bias.as_ref().map(|bias| bias.to(Layout::BSHD, Place::Heap)),
            mask: case.options.mask.as_ref().map(|mask| {
                let shape = [case.q.shape[0], case.q.shape[1], case.q.shape[2], case.k.shape[1]];
                let strides = Layout::STEP2.strides(shape);
                MaskTensor::new(shape, strides, Place::Heap, |at| mask.get(at))
            }),
        };
        let layouts = [(); 4].map(|()| Layout::random(&mut rng));
        let moved = case.moved(layouts, Place::Heap, options);
        let outcome = moved.run_with(&level.context, &Backwards(5)).expect("a valid call");
        level.checked(Op::Attention, case.k.dtype, case.v.dtype);
        assert!(outcome.all_bits() == want, "{what} and {layouts:?}");
    }
}

/// A cache that is written and read in steps: RoPE, write, attention.
struct Model {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: DType,
    frequencies: RopeFrequencies,
    options: fn(usize) -> Options,
}

impl Model {
    /// The output bits of every token when the prompt is cut into these pieces.
    fn run(&self, level: &Level, pieces: &[usize], runner: &dyn Runner) -> Vec<Vec<u32>> {
        let [_, total, heads, dim] = self.q.shape;
        let cache = [1, total + 3, self.k.shape[2], dim];
        let mut k_cache = Tensor::output(self.kv, cache, Layout::BHSD, Place::Heap);
        let mut v_cache = Tensor::output(self.kv, cache, Layout::BSHD, Place::Heap);
        let mut rows = Vec::new();
        let mut done = 0;
        for &tokens in pieces {
            let piece = |x: &Tensor| x.cut(0..1, done..done + tokens, Layout::BSHD);
            let (q, k, v) = (piece(&self.q), piece(&self.k), piece(&self.v));
            let start = [done as i32];
            let options = Rope::new(Pairing::HalfSplit, dim, &self.frequencies, Positions::Offsets(&start));
            let mut rotated = Tensor::output(DType::F32, q.shape, Layout::BSHD, Place::Heap);
            rope(&level.context, runner, q.view(), rotated.view_mut(), &options).unwrap();
            kv_write(
                &level.context,
                runner,
                KvWrite::new(
                    k.view(),
                    v.view(),
                    k_cache.view_mut(),
                    v_cache.view_mut(),
                    Destination::positions(&start),
                )
                .rope(options),
            )
            .unwrap();
            done += tokens;
            let case = Case {
                q: rotated,
                k: k_cache,
                v: v_cache,
                out_dtype: DType::F32,
                out_layout: Layout::BSHD,
                out_place: Place::Heap,
                options: Options { causal: true, lengths: Some(vec![done as i32]), ..(self.options)(heads) },
            };
            let outcome: Outcome = case.run_with(&level.context, runner).unwrap();
            level.checked(Op::Attention, self.kv, self.kv);
            rows.extend((0..tokens).map(|t| outcome.row_bits(0, t)));
            (k_cache, v_cache) = (case.k, case.v);
        }
        assert_eq!(done, total);
        rows
    }
}

/// The whole prompt at once, in pieces, and token by token: the same bits for every token, with every type of cache.
fn prompt_in_chunks(level: &Level) {
    let mut rng = Rng::new(65);
    type Make = fn(usize) -> Options;
    let options: [(&str, Make); 3] = [
        ("plain", |_| Options::default()),
        ("window, softcap, sinks", |heads| Options {
            window_left: Some(70),
            softcap: Some(20.0),
            sink_logits: Some(vec![0.25; heads]),
            ..Options::default()
        }),
        ("ALiBi, start", |heads| Options {
            alibi: Some(alibi_slopes(heads)),
            kv_starts: Some(vec![2]),
            ..Options::default()
        }),
    ];
    for kv in kv_types() {
        for (total, dim, kv_heads, group) in thin(vec![(150, 16, 2, 3), (260, 20, 1, 1), (1100, 8, 1, 2)]) {
            for &(name, options) in if total > 1000 { &options[..1] } else { &options[..] } {
                let random = |rng: &mut Rng, heads| {
                    Tensor::random(rng, DType::F32, [1, total, heads, dim], Layout::BSHD, Place::Heap)
                };
                let model = Model {
                    q: random(&mut rng, kv_heads * group),
                    k: random(&mut rng, kv_heads),
                    v: random(&mut rng, kv_heads),
                    kv,
                    frequencies: RopeFrequencies::new(dim, 10_000.0, &RopeScaling::None).unwrap(),
                    options,
                };
                let whole = model.run(level, &[total], &kvlane::Serial);
                // Token by token; where few cases run, only the last, or those around the grid of chunks.
                let first = if few_cases() { total.min(SPLIT_GRID) - 20 } else { 1 };
                let mut cuts = vec![[vec![first], vec![1; total - first]].concat()];
                for _ in 0..scaled(3) {
                    let mut pieces = Vec::new();
                    while pieces.iter().sum::<usize>() < total {
                        let left = total - pieces.iter().sum::<usize>();
                        pieces.push(rng.between(1, 90).min(left));
                    }
                    cuts.push(pieces);
                }
                for pieces in cuts {
                    let rows = model.run(level, &pieces, &Backwards(3));
                    for (t, (got, want)) in rows.iter().zip(&whole).enumerate() {
                        assert!(got == want, "{kv} {name}: token {t} of {total} in {} pieces", pieces.len());
                    }
                }
            }
        }
    }
}

/// Masked keys change nothing: neither their number, nor the end of the cache, nor whether a mask or a length masks
/// them.
fn capacity_and_dead_keys(level: &Level) {
    let mut rng = Rng::new(66);
    for dtype in kv_types() {
        for tokens in [1, 20] {
            let shape = Shape { tokens, group: 2, keys: 1300, dim: 20, v_dim: 20, ..Shape::default() };
            let case = Case::new(&mut rng, shape, dtype).with(|o| o.lengths = Some(vec![75]));
            let want = case.run(&level.context).all_bits();
            let mut short = Case::new(&mut rng, shape, dtype);
            short.q = case.q.to(Layout::BSHD, Place::Heap);
            short.k = case.k.cut(0..1, 0..75, Layout::BSHD);
            short.v = case.v.cut(0..1, 0..75, Layout::BSHD);
            assert!(short.run(&level.context).all_bits() == want, "{dtype} the cache ends at the length");
            let masked = Case::new(&mut rng, shape, dtype).with(|o| {
                let visible = |at: [usize; 4]| at[3] < 75;
                o.mask = Some(MaskTensor::new(shape.scores(), [0, 0, 0, 1], Place::Heap, visible));
            });
            let masked = Case { q: case.q.to(Layout::BSHD, Place::Heap), ..masked };
            let masked =
                Case { k: case.k.to(Layout::BSHD, Place::Heap), v: case.v.to(Layout::BSHD, Place::Heap), ..masked };
            level.checked(Op::Attention, dtype, dtype);
            assert!(masked.run(&level.context).all_bits() == want, "{dtype} a mask instead of a length");
        }
    }
}

/// The output of a token does not depend on the number of tokens in the call, across every switch between kernels.
fn more_tokens_around(level: &Level) {
    let mut rng = Rng::new(67);
    for dtype in kv_types() {
        for dim in thin(vec![3, 16, 17, 33, 64, 100, 128]) {
            let shape = Shape { tokens: 140, keys: 200, dim, v_dim: dim, ..Shape::default() };
            let case = Case::new(&mut rng, shape, dtype);
            let all = case.run(&level.context);
            for tokens in [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 127, 128, 129] {
                let first = 140 - tokens;
                let mut fewer = Case::new(&mut rng, Shape { keys: 1, ..shape }, dtype);
                fewer.q = case.q.cut(0..1, first..140, Layout::BSHD);
                fewer.k = case.k.to(Layout::BSHD, Place::Heap);
                fewer.v = case.v.to(Layout::BSHD, Place::Heap);
                let outcome = fewer.run(&level.context);
                level.checked(Op::Attention, dtype, dtype);
                for t in 0..tokens {
                    assert!(
                        outcome.row_bits(0, t) == all.row_bits(0, first + t),
                        "{dtype} dim {dim}, {tokens} tokens, {t}"
                    );
                }
            }
        }
    }
}

/// A call leaves no state, neither in the workspace nor in the context.
fn same_call_twice(level: &Level) {
    let mut rng = Rng::new(68);
    let mut workspace = kvlane::Workspace::new();
    for _ in 0..scaled(30) {
        let (case, what) = random_case(&mut rng);
        let want = case.run(&level.context);
        let mut out = Tensor::output(case.out_dtype, want.out.shape, Layout::BSHD, Place::Heap);
        let tensors = kvlane::AttentionTensors::new(case.q.view(), keys(&case.k), values(&case.v), out.view_mut());
        kvlane::attention(&level.context, &Threads(2), &mut workspace, tensors, &case.options.borrow()).unwrap();
        level.checked(Op::Attention, case.k.dtype, case.v.dtype);
        for at in indices(out.shape) {
            assert_eq!(out.bits(at), want.out.bits(at), "{what} {at:?}");
        }
    }
}

/// Prefetches move no value, wherever they point, and orders of loops and tiles of registers change no sum.
fn tunings(level: &Level) {
    let mut rng = Rng::new(69);
    for dtype in kv_types() {
        for (tokens, kv_heads, group, keys) in
            thin(vec![(1, 4, 4, 700), (1, 3, 1, 200), (1, 1, 1, 300), (2, 3, 2, 129), (40, 1, 2, 200)])
        {
            let shape = Shape { tokens, kv_heads, group, keys, dim: 40, v_dim: 72, ..Shape::default() };
            let case = Case::new(&mut rng, shape, dtype).with(|o| o.causal = true);
            let usual = case.run(&level.context).all_bits();
            for block in Prefetch::ALL {
                let distance = rng.pick(&[0, 1, 64, 5000, 1 << 20, usize::MAX]);
                let (run, order) = (rng.pick(&Prefetch::ALL), rng.pick(&KeyOrder::ALL));
                let one_row = rng.pick(&Prefetch::ALL);
                let tuning = level.context.tuning().block(block).block_order(order).run(run).run_one_row(one_row);
                let tuning = tuning.run_long_heads(rng.pick(&Prefetch::ALL)).run_distance(distance);
                let tuning = tuning.score_tiles(rng.pick(&ScoreTiles::ALL));
                let outcome = case.run(&level.context.clone().tuned(tuning));
                level.checked(Op::Attention, dtype, dtype);
                assert!(outcome.all_bits() == usual, "{dtype} {shape:?} {tuning:?}");
            }
        }
        // Prompts, from slabs of keys that are processed as a whole and in halves.
        for (tokens, group, keys, dim) in
            thin(vec![(31, 2, 150, 128), (70, 1, 90, 24), (9, 6, 66, 264), (40, 1, 70, 600)])
        {
            let shape = Shape { tokens, kv_heads: 2, group, keys, dim, v_dim: dim, ..Shape::default() };
            let case = Case::new(&mut rng, shape, dtype).with(|o| o.causal = true);
            both_score_tiles(level, &case, &format!("{dtype} {shape:?}"));
        }
    }
    for _ in 0..scaled(100) {
        let (case, what) = random_case(&mut rng);
        both_score_tiles(level, &case, &what);
    }
}

/// Scores have the same bits by each kind of register tiles.
fn both_score_tiles(level: &Level, case: &Case, what: &str) {
    let [narrow, wide] = ScoreTiles::ALL.map(|tiles| {
        let context = level.context.clone().tuned(level.context.tuning().score_tiles(tiles));
        case.run(&context).all_bits()
    });
    level.checked(Op::Attention, case.k.dtype, case.v.dtype);
    assert!(narrow == wide, "{what}");
}

/// Queries and outputs of one token may be taken where they lie: at whole vectors, and for outputs without an LSE.
fn places_of_one_token(level: &Level) {
    let mut rng = Rng::new(71);
    for dtype in kv_types() {
        for (kv_heads, group, keys_, dim, v_dim) in thin(vec![
            (3, 4, 1, 64, 32),
            (2, 3, 40, 32, 64),
            (1, 1, 65, 128, 128),
            (2, 4, 1090, 32, 32),
            (1, 16, 70, 64, 32),
            (1, 14, 70, 512, 64),
        ]) {
            let heads = kv_heads * group;
            let q = Tensor::random(&mut rng, DType::F32, [1, 1, heads, dim], Layout::BSHD, Place::Heap);
            let layout = rng.pick(&[Layout::BSHD, Layout::BHSD]);
            let k = Tensor::random(&mut rng, dtype, [1, keys_, kv_heads, dim], layout, Place::Heap);
            let v = Tensor::random(&mut rng, dtype, [1, keys_, kv_heads, v_dim], layout, Place::Heap);
            // One head sees no key, others not all.
            let hidden = Tensor::random(&mut rng, DType::F32, [1, 1, heads, keys_], Layout::BSHD, Place::Heap);
            let bias: Vec<f32> = (0..heads * keys_)
                .map(|i| {
                    if i / keys_ == 1 || hidden.get([0, 0, i / keys_, i % keys_]) > 1.0 {
                        f32::NEG_INFINITY
                    } else {
                        0.5
                    }
                })
                .collect();
            for masked in [false, true] {
                let mut options = AttentionOptions::new();
                if masked {
                    options = options.bias(View::new(&bias, [1, 1, heads, keys_]).unwrap());
                }
                // Floats past an address that is a multiple of 64, and between heads.
                let run = |past: usize, gap: usize, with_lse: bool| {
                    let aligned = |n: usize| {
                        let memory = vec![f32::NAN; n + 32];
                        let first = memory.as_ptr().align_offset(64) + past;
                        (memory, first)
                    };
                    let [q_row, out_row] = [dim + gap, v_dim + gap];
                    let (mut own_q, q_first) = aligned(heads * q_row);
                    for (head, to) in own_q[q_first..].chunks_mut(q_row).take(heads).enumerate() {
                        to[..dim].iter_mut().enumerate().for_each(|(i, to)| *to = q.get([0, 0, head, i]));
                    }
                    let (mut out, first) = aligned(heads * out_row);
                    let mut lse = vec![0.0; heads];
                    let mut tensors = AttentionTensors::new(
                        View::strided(&own_q, q_first, [1, 1, heads, dim], [0, 0, q_row as i64, 1]).unwrap(),
                        keys(&k),
                        values(&v),
                        ViewMut::strided(&mut out, first, [1, 1, heads, v_dim], [0, 0, out_row as i64, 1]).unwrap(),
                    );
                    if with_lse {
                        tensors = tensors.lse(&mut lse);
                    }
                    attention(&level.context, &kvlane::Serial, &mut Workspace::new(), tensors, &options).unwrap();
                    level.checked(Op::Attention, dtype, dtype);
                    let mut bits = Vec::new();
                    for (i, x) in out.iter().enumerate() {
                        let inside = i >= first && i < first + heads * out_row && (i - first) % out_row < v_dim;
                        if inside {
                            bits.push(x.to_bits());
                        } else {
                            assert!(x.is_nan());
                        }
                    }
                    bits
                };
                let usual = run(1, 0, true);
                for (past, gap, with_lse) in
                    [(0, 0, false), (0, 0, true), (1, 0, false), (0, 16, false), (0, 16, true), (0, 80, false)]
                {
                    assert!(
                        run(past, gap, with_lse) == usual,
                        "{dtype} {heads} heads, {keys_} keys: {past} {gap} {with_lse}"
                    );
                }
            }
        }
    }
}

/// A workspace full of NaN: no byte of it is read before it is written.
fn dirty_workspace(level: &Level) {
    let mut rng = Rng::new(69);
    let runner = Threads(3);
    for dtype in kv_types() {
        let mut workspace = kvlane::Workspace::new();
        for (tokens, keys, layout) in [(1, 3100, Layout::BSHD), (2, 3100, Layout::STEP2), (20, 200, Layout::STEP2)] {
            let shape = Shape { tokens, keys, group: 4, ..Shape::default() };
            let mut poisoned = Case::new(&mut rng, shape, dtype);
            for tensor in [&mut poisoned.q, &mut poisoned.k, &mut poisoned.v] {
                tensor.fill(|_| f32::NAN);
                *tensor = tensor.to(layout, Place::Heap);
            }
            // The middle chunk is masked completely.
            let case = Case::new(&mut rng, shape, dtype).with(|o| {
                let visible = |at: [usize; 4]| !(1024..2048).contains(&at[3]);
                o.mask = Some(MaskTensor::new(shape.scores(), [0, 0, 0, 1], Place::Heap, visible));
                o.sink_logits = Some(vec![0.5; 4]);
            });
            let want = case.run(&level.context).all_bits();
            // The same shape divides the workspace in the same way, so that every part of it is full of NaN.
            let outcome = poisoned.run_in(&level.context, &runner, &mut workspace).expect("a valid call");
            assert!(outcome.lse.iter().all(|lse| lse.is_nan()));
            let outcome = case.run_in(&level.context, &runner, &mut workspace).expect("a valid call");
            level.checked(Op::Attention, dtype, dtype);
            assert!(outcome.all_bits() == want, "{dtype} {tokens} tokens");
        }
        let (case, what) = random_case(&mut rng);
        let outcome = case.run_in(&level.context, &runner, &mut workspace).expect("a valid call");
        assert!(outcome.all_bits() == case.run(&level.context).all_bits(), "{what}");
    }
}
