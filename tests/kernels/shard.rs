//! Shards of batches, heads and sequences: together they equal the whole.

use crate::common::attention::{Case, Outcome, Shape, formats, keys, kv_types, precision, values};
use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, scaled};
use crate::harness::{Level, tests};
use kvlane::*;
use std::ops::Range;

tests! {
    levels: rows_and_heads_are_the_bits_of_the_whole, spans_merge_into_the_whole, spans_without_keys_leave_the_bits,
        chunks_of_spans_are_the_bits_of_the_whole;
    once: chunks_are_checked, writes_land_in_their_span, mistakes;
}

fn random_whole(rng: &mut Rng, shape: Shape, kv: DType) -> Case {
    Case::new(rng, shape, kv).with(|o| {
        o.causal = rng.chance(0.7);
        o.lengths = Some((0..shape.batch).map(|_| rng.between(0, shape.keys) as i32).collect());
        if rng.chance(0.5) {
            o.kv_starts = Some((0..shape.batch).map(|_| rng.between(0, shape.keys / 4) as i32).collect());
        }
        if rng.chance(0.4) {
            o.window_left = Some(rng.below(2 * shape.keys) as u32);
        }
        if rng.chance(0.4) {
            o.window_right = Some(rng.below(shape.keys) as u32);
        }
        if rng.chance(0.4) {
            o.offsets = Some((0..shape.batch).map(|_| rng.below(shape.keys) as i32 - 3).collect());
        }
        if rng.chance(0.4) {
            o.alibi = Some((0..shape.kv_heads * shape.group).map(|_| rng.f32() * 0.02).collect());
        }
    })
}

fn cut<'a, T>(list: Option<&'a [T]>, range: &Range<usize>) -> Option<&'a [T]> {
    list.map(|list| &list[range.clone()])
}

/// Parts of the batch and of the heads, as views of the whole.
fn rows_and_heads_are_the_bits_of_the_whole(level: &Level) {
    let rng = &mut Rng::new(130);
    for kv in kv_types() {
        for _ in 0..scaled(25) {
            let (kv_heads, group) = (rng.between(1, 4), rng.between(1, 6));
            let shape = Shape {
                batch: rng.between(1, 4),
                tokens: rng.between(1, 9),
                kv_heads,
                group,
                keys: rng.between(1, 200),
                dim: rng.between(1, 70),
                v_dim: rng.between(1, 70),
            };
            let whole = random_whole(rng, shape, kv);
            let want = whole.run(&level.context);
            level.checked(Op::Attention, kv, kv);
            // The number of parts divides the KV heads, or is a multiple of their number.
            let model = if rng.chance(0.3) { kv_heads * rng.between(1, 4) } else { rng.between(1, kv_heads) };
            let mesh = Mesh::new(rng.between(1, 5), model, 1);
            let [batch, tokens, q_heads, _] = whole.q.shape;
            let mut seen = vec![0; batch * q_heads];
            for rank in 0..mesh.shards().unwrap() {
                let shard = mesh.shard(rank).unwrap();
                let (rows, part) = (shard.sequences(batch), shard.heads(q_heads, kv_heads).unwrap());
                let out_shape = [rows.len(), tokens, part.heads.len(), shape.v_dim];
                let mut out = Tensor::output(DType::F32, out_shape, Layout::BHSD, Place::GuardAfter);
                let mut lse = vec![0f32; rows.len() * tokens * part.heads.len()];
                let q = whole.q.view().batch(rows.start, rows.len()).unwrap();
                let mut options = whole.options.borrow();
                options.lengths = cut(options.lengths, &rows);
                options.kv_starts = cut(options.kv_starts, &rows);
                options.offsets = cut(options.offsets, &rows);
                options.alibi_slopes = cut(options.alibi_slopes, &part.heads);
                let tensors = AttentionTensors::new(
                    q.heads(part.heads.start, part.heads.len()).unwrap(),
                    part_of(keys(&whole.k), &rows, &part.kv_heads),
                    part_of(values(&whole.v), &rows, &part.kv_heads),
                    out.view_mut(),
                )
                .lse(&mut lse);
                attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).unwrap();
                for (b, t) in (0..rows.len()).flat_map(|b| (0..tokens).map(move |t| (b, t))) {
                    for (i, h) in part.heads.clone().enumerate() {
                        let (b_whole, row) = (b + rows.start, (b * tokens + t) * part.heads.len() + i);
                        let whole_row = (b_whole * tokens + t) * q_heads + h;
                        assert_eq!(lse[row].to_bits(), want.lse[whole_row].to_bits(), "{shard:?}");
                        for d in 0..shape.v_dim {
                            let (x, y) = (out.bits([b, t, i, d]), want.out.bits([b_whole, t, h, d]));
                            assert_eq!(x, y, "{shard:?}: [{b}, {t}, {i}, {d}]");
                        }
                        seen[b_whole * q_heads + h] += usize::from(t == 0);
                    }
                }
            }
            assert!(seen.iter().all(|&n| n == 1), "{mesh:?}: rows and heads were computed {seen:?} times");
        }
    }
}

fn part_of<'a>(cache: CacheView<'a>, rows: &Range<usize>, heads: &Range<usize>) -> CacheView<'a> {
    cache.batch(rows.start, rows.len()).unwrap().heads(heads.start, heads.len()).unwrap()
}

/// Attention over the keys of each segment alone, with the lists of `SegmentLists`.
fn over_spans(level: &Level, whole: &Case, spans: &[Range<usize>]) -> Vec<Outcome> {
    let options = whole.options.borrow();
    let [batch, tokens, heads, _] = whole.q.shape;
    let all = vec![whole.k.shape[1] as i32; batch];
    let mut lists = SegmentLists::new(options.lengths.unwrap_or(&all), tokens);
    lists.kv_starts = options.kv_starts;
    lists.offsets = options.offsets;
    let run = |span: &Range<usize>| {
        let (mut lengths, mut starts, mut offsets) = (vec![0; batch], vec![0; batch], vec![0; batch]);
        lists.local(span.clone(), &mut lengths, &mut starts, &mut offsets).unwrap();
        let mut out = Tensor::output(DType::F32, [batch, tokens, heads, whole.v.shape[3]], Layout::BSHD, Place::Heap);
        let mut lse = vec![0f32; batch * tokens * heads];
        let tensors = AttentionTensors::new(
            whole.q.view(),
            keys(&whole.k).seq(span.start, span.len()).unwrap(),
            values(&whole.v).seq(span.start, span.len()).unwrap(),
            out.view_mut(),
        )
        .lse(&mut lse);
        let options = options.lengths(&lengths).kv_starts(&starts).offsets(&offsets);
        attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).unwrap();
        Outcome { out, lse }
    };
    spans.iter().map(run).collect()
}

/// Segments that end on the grid, merged by the states of their chunks: the bits of the whole.
fn chunks_of_spans_are_the_bits_of_the_whole(level: &Level) {
    let rng = &mut Rng::new(134);
    for kv in kv_types() {
        for round in 0..scaled(10) {
            let shape = Shape {
                batch: rng.between(1, 2),
                tokens: rng.pick(&[1, 3, 20, 100]),
                kv_heads: rng.between(1, 2),
                group: rng.between(1, 3),
                keys: if round % 2 == 0 { rng.between(1, 3 * SPLIT_GRID) } else { 2 * SPLIT_GRID + rng.between(0, 1) },
                dim: rng.between(1, 40),
                v_dim: rng.between(1, 40),
            };
            let mut whole = random_whole(rng, shape, kv);
            let [batch, tokens, heads, _] = whole.q.shape;
            let sinks: Vec<f32> = (0..heads).map(|_| rng.f32()).collect();
            let spans = spans_of(rng.between(1, 4), shape.keys);
            let options = whole.options.borrow();
            let all = vec![shape.keys as i32; batch];
            let mut lists = SegmentLists::new(options.lengths.unwrap_or(&all), tokens);
            lists.kv_starts = options.kv_starts;
            lists.offsets = options.offsets;
            let states: Vec<Vec<f32>> = spans
                .iter()
                .map(|span| {
                    let (mut lengths, mut starts, mut offsets) = (vec![0; batch], vec![0; batch], vec![0; batch]);
                    lists.local(span.clone(), &mut lengths, &mut starts, &mut offsets).unwrap();
                    let options = options.lengths(&lengths).kv_starts(&starts).offsets(&offsets);
                    let mut states = vec![f32::NAN; chunk_states_len(whole.q.shape, span.len(), shape.v_dim)];
                    let k = keys(&whole.k).seq(span.start, span.len()).unwrap();
                    let v = values(&whole.v).seq(span.start, span.len()).unwrap();
                    let runner = Threads(1 + span.start % 3);
                    let size =
                        attention_chunks_workspace_size(whole.q.shape, k.shape(), shape.v_dim, runner.num_threads());
                    let mut workspace = Workspace::with_capacity(size);
                    let (tensors, before) = ((whole.q.view(), k, v), workspace.len());
                    attention_chunks(&level.context, &runner, &mut workspace, tensors, &options, &mut states).unwrap();
                    assert_eq!(workspace.len(), before, "{size} bytes were not enough");
                    states
                })
                .collect();
            let states: Vec<&[f32]> = states.iter().map(Vec::as_slice).collect();
            let mut out =
                Tensor::output(DType::F32, [batch, tokens, heads, shape.v_dim], Layout::BHSD, Place::GuardAfter);
            let mut lse = vec![f32::NAN; batch * tokens * heads];
            let [k_format, v_format] = formats(kv, kv);
            let merge = ChunkMerge::new(shape.kv_heads, k_format, v_format).precision(precision()).sink_logits(&sinks);
            let floats = states.iter().map(|s| s.len()).sum();
            let size = merge_chunks_workspace_size(out.shape, shape.kv_heads, floats, 2);
            let mut workspace = Workspace::with_capacity(size);
            let (to, before) = (out.view_mut(), workspace.len());
            merge_chunks(&level.context, &Threads(2), &mut workspace, &states, &merge, to, Some(&mut lse)).unwrap();
            assert_eq!(workspace.len(), before, "{size} bytes were not enough");
            out.assert_gaps();
            whole.options.sink_logits = Some(sinks);
            let want = whole.run(&level.context);
            level.checked(Op::Attention, kv, kv);
            assert!(Outcome { out, lse }.all_bits() == want.all_bits(), "{kv} {shape:?} in {spans:?}");
        }
    }
}

fn chunks_are_checked() {
    let context = &Context::new().unwrap();
    let (q, k) = (vec![1f32; 2 * 8], vec![1f32; 2000 * 8]);
    let shape = [1, 2000, 1, 8];
    let mut states = vec![0f32; chunk_states_len([1, 1, 2, 8], 2000, 8)];
    let tensors =
        || (View::new(&q, [1, 1, 2, 8]).unwrap(), View::new(&k, shape).unwrap(), View::new(&k, shape).unwrap());
    let run = |options: &AttentionOptions, states: &mut [f32]| {
        let done = attention_chunks(context, &Serial, &mut Workspace::new(), tensors(), options, states);
        done.map_err(|error| error.to_string())
    };
    let n = states.len();
    states.fill(9.0);
    let wrong = "states has 127 floats, but must have 128 for 2000 keys";
    assert!(run(&AttentionOptions::default(), &mut states[..n - 1]).unwrap_err().contains(wrong));
    assert!(run(&AttentionOptions::default(), &mut states[..3]).unwrap_err().contains("states has 3 floats"));
    let (sinks, list) = ([0.0, 0.0], [1500]);
    let ring = AttentionOptions::new().layout(kvlane::Layout::ring(0)).lengths(&list);
    let ragged = AttentionOptions::new().cu_seqlens_q(&[0, 1]);
    let plan = |options| AttentionPlan::new([1, 1, 2, 8], shape, options).unwrap();
    let plans = [plan(&ring), plan(&ragged)];
    for (options, sentence) in [
        (AttentionOptions::new().sink_logits(&sinks), "sink_logits are given where segments are merged"),
        (ring, "a ring is no segment of a sequence"),
        (ragged, "cu_seqlens_q: the states of ragged queries have no format"),
        (AttentionOptions::new().plan(&plans[0]), "a ring is no segment of a sequence"),
        (AttentionOptions::new().plan(&plans[1]), "cu_seqlens_q: the states"),
        (AttentionOptions::new().lengths(&[2001]), "lengths[0] is 2001, but k has seq = 2000"),
        (AttentionOptions::new().scale(f32::NAN), "scale is NaN"),
    ] {
        let error = run(&options, &mut states).unwrap_err();
        assert!(error.contains(sentence), "{error}: does not say {sentence:?}");
    }
    assert!(states.iter().all(|&x| x == 9.0), "written for a call that is refused");
    run(&AttentionOptions::default(), &mut states).unwrap();
    let merge = ChunkMerge::new(1, DType::F32, DType::F32);
    let (mut out, mut lse) = ([7f32; 16], [7f32; 3]);
    let many = vec![&states[..]; MAX_SEGMENTS + 1];
    for (spans, merge, lse_len, sentence) in [
        (&[&states[..]; 0][..], merge, 0, "0 segments"),
        (&many, merge, 0, "257 segments, but a call merges 1 to 256"),
        (&[&states[..65]], merge, 0, "segment 0 has 65 floats, which are no chunks of 64"),
        (&[&states[..], &[]], merge, 0, "segment 1 has 0 floats"),
        (&[&states[..]], merge.kv_heads(3), 0, "no multiple of kv_heads = 3"),
        (&[&states[..]], merge.kv_heads(0), 0, "no multiple of kv_heads = 0"),
        (&[&states[..]], merge.sink_logits(&[0.0]), 0, "sink_logits has 1 entries, but out needs 2"),
        (&[&states[..]], merge, 3, "lse has 3 entries, but out needs 2"),
    ] {
        let to = ViewMut::new(&mut out, [1, 1, 2, 8]).unwrap();
        let lse = (lse_len > 0).then_some(&mut lse[..lse_len]);
        let error = merge_chunks(context, &Serial, &mut Workspace::new(), spans, &merge, to, lse).unwrap_err();
        assert!(error.message().contains(sentence), "{error}: does not say {sentence:?}");
    }
    let mut wide = [7f32; 2 * 1025];
    let to = ViewMut::new(&mut wide, [1, 1, 2, 1025]).unwrap();
    let error = merge_chunks(context, &Serial, &mut Workspace::new(), &[&states], &merge, to, None).unwrap_err();
    assert!(error.message().contains("out has dim = 1025"), "{error}");
    assert!(wide.iter().chain(&lse).all(|&x| x == 7.0));
    assert_eq!(out, [7f32; 16]);
}

fn merged(level: &Level, parts: &[Outcome]) -> Outcome {
    let states: Vec<_> = parts.iter().map(|p| AttentionState::new(p.out.view(), &p.lse)).collect();
    let mut out = Tensor::output(DType::F32, parts[0].out.shape, Layout::BSHD, Place::Heap);
    let mut lse = vec![0f32; parts[0].lse.len()];
    merge_states(&level.context, &Serial, &states, out.view_mut(), Some(&mut lse)).unwrap();
    level.checked(Op::MergeStates, DType::F32, DType::F32);
    Outcome { out, lse }
}

fn spans_of(sequence: usize, capacity: usize) -> Vec<Range<usize>> {
    let mesh = Mesh::new(1, 1, sequence);
    (0..sequence).map(|rank| mesh.shard(rank).unwrap().keys(capacity)).collect()
}

/// Segments on the grid and off it: within the bound of the whole.
fn spans_merge_into_the_whole(level: &Level) {
    let rng = &mut Rng::new(131);
    for kv in kv_types() {
        for round in 0..scaled(12) {
            let shape = Shape {
                batch: rng.between(1, 2),
                tokens: rng.pick(&[1, 3, 20]),
                kv_heads: rng.between(1, 2),
                group: rng.between(1, 3),
                keys: if round % 3 == 0 { rng.between(2 * SPLIT_GRID, 3 * SPLIT_GRID) } else { rng.between(1, 300) },
                dim: rng.between(1, 40),
                v_dim: rng.between(1, 40),
            };
            let whole = random_whole(rng, shape, kv);
            let spans = if round % 3 == 0 {
                spans_of(rng.between(1, 4), shape.keys)
            } else {
                let mut ends: Vec<usize> = (0..rng.below(4)).map(|_| rng.between(0, shape.keys)).collect();
                ends.extend([0, shape.keys]);
                ends.sort_unstable();
                ends.windows(2).map(|w| w[0]..w[1]).collect()
            };
            assert_eq!(spans.iter().map(Range::len).sum::<usize>(), shape.keys);
            let outcome = merged(level, &over_spans(level, &whole, &spans));
            level.checked(Op::Attention, kv, kv);
            whole.assert_close(&level.context, &outcome, &|| format!("{kv} {shape:?} in {spans:?}"));
        }
    }
}

/// While a text is shorter than the first segment, the others are empty states, and merging them changes no bit. Every
/// segment on the grid begins with a chunk of the whole, so that its bits are those of the whole with the other keys
/// masked.
fn spans_without_keys_leave_the_bits(level: &Level) {
    let rng = &mut Rng::new(132);
    for kv in kv_types() {
        let keys = 2 * SPLIT_GRID + 100;
        let shape = Shape { batch: 2, tokens: 4, kv_heads: 2, group: 2, keys, dim: 24, v_dim: 16 };
        for span in spans_of(3, keys) {
            let mut whole = Case::new(rng, shape, kv).with(|o| {
                o.causal = true;
                o.kv_starts = Some(vec![span.start as i32, span.start as i32 + 17]);
                o.lengths = Some(vec![span.end as i32, span.end as i32 - 60]);
            });
            if span.start == 0 {
                whole.options.kv_starts = None;
            }
            let want = whole.run(&level.context);
            level.checked(Op::Attention, kv, kv);
            let outcome = merged(level, &over_spans(level, &whole, &spans_of(3, keys)));
            assert!(outcome.all_bits() == want.all_bits(), "{kv} in {span:?}");
        }
    }
}

fn writes_land_in_their_span() {
    let rng = &mut Rng::new(133);
    let context = &Context::new().unwrap();
    for _ in 0..scaled(20) {
        let (batch, seq, capacity) = (rng.between(1, 3), rng.between(1, 40), 3 * SPLIT_GRID - 50);
        let positions: Vec<i32> = (0..batch).map(|_| rng.between(0, capacity - seq) as i32).collect();
        let k = Tensor::random(rng, DType::F32, [batch, seq, 1, 3], Layout::BSHD, Place::Heap);
        let write = |cache: &mut Tensor, to: Destination| {
            let mut v_cache = Tensor::output(DType::F16, cache.shape, Layout::BSHD, Place::Heap);
            let (v, v_cache) = (k.view(), v_cache.view_mut());
            let k_cache = cache.view_mut();
            kv_write(
                context,
                &Serial,
                KvWrite::new(k.view(), v, k_cache, v_cache, to).v_packing(kvlane::Packing::Rows),
            )
            .unwrap();
        };
        let cache = |slots| Tensor::output(DType::F16, [batch, slots, 1, 3], Layout::BSHD, Place::Heap);
        let mut whole = cache(capacity);
        write(&mut whole, Destination::positions(&positions));
        let mut ends = 0;
        for span in spans_of(2, capacity) {
            assert!(span.start == ends && (span.end % SPLIT_GRID == 0 || span.end == capacity));
            ends = span.end;
            let (mut part, mut slots) = (cache(span.len()), vec![0; batch * seq]);
            shard_slots(span.clone(), &positions, &mut slots).unwrap();
            write(&mut part, Destination::slots(&slots));
            for at in indices(part.shape) {
                assert_eq!(part.bits(at), whole.bits([at[0], at[1] + span.start, at[2], at[3]]), "{span:?} {at:?}");
            }
        }
        assert_eq!(ends, capacity);
    }
}

fn mistakes() {
    #[track_caller]
    fn refused<T: std::fmt::Debug>(done: Result<T>, status: Status, pieces: &[&str]) {
        let error = done.expect_err("should be refused");
        assert_eq!(error.status(), status, "{error}");
        for piece in pieces {
            assert!(error.message().contains(piece), "{error}: does not say {piece:?}");
        }
    }
    let mesh = Mesh::new(2, 3, 1);
    refused(mesh.shard(6), Status::OutOfRange, &["rank is 6", "6 shards"]);
    refused(mesh.at(0, 3, 0), Status::OutOfRange, &["model is 3", "3 parts"]);
    refused(mesh.model(0).shard(0), Status::InvalidValue, &["[2, 0, 1]"]);
    let shard = mesh.shard(5).unwrap();
    refused(shard.heads(7, 2), Status::Shape, &["7 query heads", "2 KV heads"]);
    refused(shard.heads(7, 0), Status::Shape, &["0 KV heads"]);
    refused(shard.heads(8, 2), Status::Shape, &["3 parts", "2 KV heads"]);

    let lists = SegmentLists::new(&[5, 7], 1);
    let mut out = [[9; 2]; 3];
    #[allow(clippy::reversed_empty_ranges)]
    for (lists, span, status, piece) in [
        (lists, 4..3, Status::OutOfRange, "4 to 3"),
        (lists, 0..1 << 31, Status::OutOfRange, "0 to 2147483648"),
        (lists.lengths(&[5]), 0..3, Status::Shape, "lengths has 2 entries"),
        (lists.kv_starts(&[1]), 0..3, Status::Shape, "kv_starts has 1 entries"),
        (lists.offsets(&[1]), 0..3, Status::Shape, "offsets has 1 entries"),
        (lists.lengths(&[5, -1]), 0..3, Status::OutOfRange, "lengths[1] is -1"),
        (lists.kv_starts(&[0, -2]), 0..3, Status::OutOfRange, "kv_starts[1] is -2"),
        (lists.offsets(&[0, i32::MIN]), 1..3, Status::OutOfRange, "sequence 1 would have offset"),
        (lists.seq(usize::MAX), 1..3, Status::OutOfRange, "sequence 0 would have offset"),
    ] {
        let [lengths, starts, offsets] = &mut out;
        refused(lists.local(span, lengths, starts, offsets), status, &[piece]);
        assert_eq!(out, [[9; 2]; 3]);
    }
    let mut slots = [9; 4];
    refused(shard_slots(0..4, &[1, -1], &mut slots), Status::OutOfRange, &["positions[1] is -1"]);
    refused(shard_slots(0..4, &[1, 1, 1], &mut slots), Status::Shape, &["4 entries", "3 positions"]);
    refused(shard_slots(0..4, &[], &mut slots), Status::Shape, &["4 entries", "0 positions"]);
    assert_eq!(slots, [9; 4]);
}
