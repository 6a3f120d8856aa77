//! Attention over a cache of any layout has the bits of the contiguous cache with the same tokens.

use crate::common::attention::{
    BitMaskTensor, Case, MaskTensor, Outcome, Shape, keys, kv_types, precision, quantised, values,
};
use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout as Strides, Place, Rng, Tensor, scaled};
use crate::harness::{Level, tests};
use crate::semantics::{random_case, visible};
use kvlane::{
    AttentionOptions, AttentionPlan, AttentionTensors, DType, Destination, KvCache, KvLayer, KvWrite, Layout, Op,
    Packing, Serial, SharedPrefix, Status, Workspace, attention, attention_with_prefix, defragment_pages, kv_write,
};

tests! {
    levels: contiguous, paged, shared_pages, ring, ring_without_a_window, indirect, ragged, what_is_not_retained_is_refused,
        tables_are_checked, rows_without_pages, plans, plans_of_far_masks, shared_prefix;
    once: plans_advance;
}

/// A random case with given lengths.
fn with_lengths(rng: &mut Rng) -> (Case, String, Vec<usize>) {
    let (mut case, what) = random_case(rng);
    let keys = case.k.shape[1] as i32;
    let lengths = case.options.lengths.get_or_insert_with(|| vec![keys; case.q.shape[0]]).clone();
    (case, what, lengths.into_iter().map(|n| n as usize).collect())
}

/// Whether any query of a sequence sees a key.
fn seen(case: &Case, b: usize, j: usize) -> bool {
    let [_, tokens, heads, _] = case.q.shape;
    (0..tokens).any(|t| (0..heads).any(|h| visible(case, [b, t, h, j])))
}

/// The key range that a sequence may see, by everything but masks; the first query sees the first key of it.
fn reach(case: &Case, b: usize, length: usize) -> std::ops::Range<usize> {
    let o = &case.options;
    let position = o.offsets.as_ref().map_or(length as i64 - case.q.shape[1] as i64, |x| x[b].into());
    let start = o.kv_starts.as_ref().map_or(0, |s| s[b].into());
    let low = o.window_left.map_or(0, |w| position - i64::from(w)).max(start).max(0);
    (low as usize).min(length)..length
}

/// A cache of shape `[rows, slots, kv_heads, dim]`, full of poison, for tokens to be put into.
struct Cache {
    k: Tensor,
    v: Tensor,
}

impl Cache {
    fn new(rng: &mut Rng, case: &Case, rows: usize, slots: usize) -> Self {
        let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
        let mut tensor = |like: &Tensor| {
            let shape = [rows, slots, like.shape[2], like.shape[3]];
            Tensor::input(like.dtype, shape, Strides::random(rng), place)
        };
        Self { k: tensor(&case.k), v: tensor(&case.v) }
    }

    fn put(&mut self, case: &Case, (b, j): (usize, usize), (row, slot): (usize, usize)) {
        for (from, to) in [(&case.k, &mut self.k), (&case.v, &mut self.v)] {
            for h in 0..from.shape[2] {
                for d in 0..from.shape[3] {
                    to.set_element_bits([row, slot, h, d], from.bits([b, j, h, d]));
                }
            }
        }
    }

    /// Runs the case on this cache, on one thread and on three, and compares with the bits of the contiguous cache.
    #[track_caller]
    fn check(&self, level: &Level, case: &Case, layout: Layout, what: &str) {
        let want = case.run(&level.context);
        let packed = self.packed(layout);
        for (threads, packed) in [(1, None), (3, None), (2, packed.as_ref())] {
            let (v, v_packing) = match packed {
                None => (&self.v, Packing::Rows),
                Some(v) => (v, Packing::RowPairs),
            };
            let options = case.options.borrow().layout(layout).v_packing(v_packing);
            let mut workspace = Workspace::new();
            let got = case.run_on(&level.context, &Threads(threads), &mut workspace, (&self.k, v), options);
            let got = got.unwrap_or_else(|error| panic!("{error}: {layout:?}: {what}"));
            level.checked(Op::Attention, case.k.dtype, case.v.dtype);
            let how = if packed.is_some() { "packed" } else { "not packed" };
            assert!(got.all_bits() == want.all_bits(), "{layout:?}, {how}, on {threads} threads: {what}");
        }
    }

    /// The values in pairs of slots, if the layout allows it.
    fn packed(&self, layout: Layout) -> Option<Tensor> {
        let [rows, slots, heads, dim] = self.v.shape;
        let even = match layout {
            Layout::Ring { sink_tokens: sinks, .. } => sinks % 2 == 0,
            Layout::Ragged { cu_seqlens: starts, .. } => starts.iter().all(|start| start % 2 == 0),
            _ => true,
        };
        // Quantised values are never packed.
        if slots % 2 == 1 || !even || quantised()[1].is_some() {
            return None;
        }
        let strides = if dim % 3 == 0 { Strides::STEP2 } else { Strides::BHSD };
        let mut packed = Tensor::input(self.v.dtype, [rows, slots / 2, heads, 2 * dim], strides, Place::GuardAfter);
        for [row, slot, h, d] in indices(self.v.shape) {
            packed.set_element_bits([row, slot / 2, h, 2 * d + slot % 2], self.v.bits([row, slot, h, d]));
        }
        Some(packed)
    }

    fn error(&self, level: &Level, case: &Case, layout: Layout) -> kvlane::Error {
        let options = case.options.borrow().layout(layout);
        let done = case.run_on(&level.context, &Serial, &mut Workspace::new(), (&self.k, &self.v), options);
        done.err().unwrap_or_else(|| panic!("{layout:?} was taken"))
    }
}

fn paged(level: &Level) {
    let mut rng = Rng::new(300);
    for _ in 0..scaled(120) {
        let (case, what, lengths) = with_lengths(&mut rng);
        let size = if rng.chance(0.5) { rng.pick(&[16, 32, 64, 128]) } else { rng.between(1, 70) };
        let lists = [&case.options.lengths, &case.options.kv_starts, &case.options.prefix_lengths];
        let most = lists.into_iter().flatten().flatten().max().map_or(0, |&n| n as usize);
        let pages_per_row = (most.div_ceil(size) + rng.below(3)).max(1);
        let pool = lengths.len() * pages_per_row + rng.below(4);
        let mut free: Vec<i32> = (0..pool as i32).collect();
        let mut cache = Cache::new(&mut rng, &case, pool, size);
        let mut table = vec![-1; lengths.len() * pages_per_row];
        for (b, &length) in lengths.iter().enumerate() {
            let kept = case.options.prefix_lengths.as_ref().map_or(0, |p| p[b] as usize).min(length);
            let start = case.options.kv_starts.as_ref().map_or(0, |s| s[b] as usize);
            let window = reach(&case, b, length);
            for page in 0..length.div_ceil(size) {
                let slots = page * size..((page + 1) * size).min(length);
                // Pages that no query sees need not exist.
                if !slots.clone().any(|j| window.contains(&j) || (start..kept).contains(&j)) {
                    table[b * pages_per_row + page] = rng.pick(&[-1, i32::MAX, pool as i32]);
                    continue;
                }
                let id = free.swap_remove(rng.below(free.len()));
                table[b * pages_per_row + page] = id;
                for j in slots.filter(|&j| seen(&case, b, j)) {
                    cache.put(&case, (b, j), (id as usize, j % size));
                }
            }
        }
        cache.check(level, &case, Layout::paged(&table, pages_per_row), &what);
    }
}

/// The contiguous cache, with an even number of slots, so that its values can be packed.
fn contiguous(level: &Level) {
    let mut rng = Rng::new(310);
    for _ in 0..scaled(60) {
        let (case, what, lengths) = with_lengths(&mut rng);
        let slots = case.k.shape[1].next_multiple_of(2);
        let mut cache = Cache::new(&mut rng, &case, lengths.len(), slots);
        for (b, &length) in lengths.iter().enumerate() {
            (0..length).filter(|&j| seen(&case, b, j)).for_each(|j| cache.put(&case, (b, j), (b, j)));
        }
        cache.check(level, &case, Layout::Contiguous, &what);
    }
}

/// Two sequences over one prefix.
fn shared_pages(level: &Level) {
    let mut rng = Rng::new(301);
    for dtype in kv_types() {
        let shape = Shape { batch: 2, group: 2, kv_heads: 2, keys: 100, dim: 32, v_dim: 32, ..Shape::default() };
        let mut case = Case::new(&mut rng, shape, dtype).with(|o| o.lengths = Some(vec![100, 90]));
        for j in 0..48 {
            for h in 0..2 {
                for d in 0..32 {
                    let (k, v) = (case.k.bits([0, j, h, d]), case.v.bits([0, j, h, d]));
                    case.k.set_element_bits([1, j, h, d], k);
                    case.v.set_element_bits([1, j, h, d], v);
                }
            }
        }
        let mut cache = Cache::new(&mut rng, &case, 11, 16);
        let table = [7, 3, 5, 0, 2, 10, 1, 7, 3, 5, 4, 8, 9, -1];
        for b in 0..2 {
            for j in 0..[100, 90][b] {
                cache.put(&case, (b, j), (table[b * 7 + j / 16] as usize, j % 16));
            }
        }
        cache.check(level, &case, Layout::paged(&table, 7), "shared");
    }
}

fn ring(level: &Level) {
    let mut rng = Rng::new(302);
    let mut wrapped = 0;
    for _ in 0..scaled(160).max(12) {
        let (mut case, what, lengths) = with_lengths(&mut rng);
        let keys = case.k.shape[1];
        if rng.chance(0.8) && case.options.window_left.is_none() {
            case.options.window_left = Some(rng.below(keys / 2 + 1) as u32);
        }
        let recent = lengths.iter().enumerate().map(|(b, &n)| reach(&case, b, n).len()).max().unwrap();
        let sinks =
            case.options.prefix_lengths.as_ref().map_or(0, |p| *p.iter().max().unwrap() as usize) + rng.below(3);
        let slots = sinks + recent.max(1) + rng.below(5);
        let mut cache = Cache::new(&mut rng, &case, lengths.len(), slots);
        for (b, &length) in lengths.iter().enumerate() {
            wrapped += usize::from(length > slots);
            for j in 0..length {
                let slot = if j < sinks { j } else { sinks + (j - sinks) % (slots - sinks) };
                if seen(&case, b, j) {
                    cache.put(&case, (b, j), (b, slot));
                }
            }
        }
        cache.check(level, &case, Layout::ring(sinks), &what);
    }
    assert!(wrapped > 0);
}

/// One query without a window sees the sink tokens and the retained tokens, as through a mask.
fn ring_without_a_window(level: &Level) {
    let mut rng = Rng::new(303);
    for dtype in kv_types() {
        for (length, sinks, slots) in
            [(50, 4, 20), (50, 0, 20), (200, 70, 140), (2500, 4, 70), (2500, 0, 1100), (1030, 1025, 1027), (20, 4, 20)]
        {
            let shape = Shape { group: 3, keys: length, dim: 16, v_dim: 24, ..Shape::default() };
            let held = |j: usize| j < sinks || j + (slots - sinks) >= length;
            let mut case = Case::new(&mut rng, shape, dtype);
            case.options.lengths = Some(vec![length as i32]);
            case.options.causal = sinks > 0;
            let mut cache = Cache::new(&mut rng, &case, 1, slots);
            for j in (0..length).filter(|&j| held(j)) {
                let slot = if j < sinks { j } else { sinks + (j - sinks) % (slots - sinks) };
                cache.put(&case, (0, j), (0, slot));
            }
            let options = case.options.borrow().layout(Layout::ring(sinks));
            let got = |threads| {
                let mut workspace = Workspace::new();
                let done =
                    case.run_on(&level.context, &Threads(threads), &mut workspace, (&cache.k, &cache.v), options);
                done.expect("a valid call").all_bits()
            };
            let (one, three) = (got(1), got(3));
            let shape = shape.scores();
            let strides = Strides::BSHD.strides(shape);
            case.options.mask = Some(MaskTensor::new(shape, strides, Place::Heap, |at| held(at[3])));
            level.checked(Op::Attention, dtype, dtype);
            let want = case.run(&level.context).all_bits();
            assert!(one == want && three == want, "{dtype} {length} tokens, {sinks} sinks, {slots} slots");
        }
    }
}

fn indirect(level: &Level) {
    let mut rng = Rng::new(304);
    for _ in 0..scaled(100) {
        let (case, what, lengths) = with_lengths(&mut rng);
        let (batch, slots) = (lengths.len(), case.k.shape[1]);
        let rows = batch + rng.below(2);
        let mut cache = Cache::new(&mut rng, &case, rows, slots);
        let mut table = vec![-1; batch * slots];
        // Beams share long runs of history, and sometimes change rows.
        let (mut order, turn) = ((0..rows).collect::<Vec<_>>(), rng.pick(&[0.02, 0.2, 1.0]));
        for j in 0..slots {
            if rng.chance(turn) {
                let (a, b) = (rng.below(rows), rng.below(rows));
                order.swap(a, b);
            }
            for b in 0..batch {
                if j < lengths[b] {
                    table[b * slots + j] = order[b] as i32;
                    if seen(&case, b, j) {
                        cache.put(&case, (b, j), (order[b], j));
                    }
                }
            }
        }
        cache.check(level, &case, Layout::indirect(&table), &what);
    }
}

/// Sequences with different numbers of queries and keys, one after another, have the bits that each has alone.
fn ragged(level: &Level) {
    let mut rng = Rng::new(305);
    for _ in 0..scaled(80) {
        let (mut case, what) = random_case(&mut rng);
        // Masks and biases have the width of the longest sequence; here each sequence is compared alone, with bits of
        // its own width.
        (case.options.mask, case.options.bit_mask, case.options.bias) = (None, None, None);
        let [batch, tokens, heads, dim] = case.q.shape;
        let v_dim = case.v.shape[3];
        let counts: Vec<usize> = (0..batch).map(|_| rng.below(tokens + 1)).collect();
        let rooms: Vec<usize> = (0..batch)
            .map(|b| {
                let listed = [&case.options.lengths, &case.options.kv_starts, &case.options.prefix_lengths];
                let least = listed.iter().filter_map(|l| l.as_ref().map(|l| l[b] as usize)).max().unwrap_or(0);
                rng.between(least, case.k.shape[1])
            })
            .collect();
        let starts = |counts: &[usize]| -> Vec<i32> {
            let mut at = 0;
            std::iter::once(0).chain(counts.iter().map(|n| (at += *n as i32, at).1)).collect()
        };
        let (q_starts, k_starts) = (starts(&counts), starts(&rooms));
        let mut q = Tensor::input(
            case.q.dtype,
            [1, *q_starts.last().unwrap() as usize, heads, dim],
            Strides::random(&mut rng),
            Place::GuardAfter,
        );
        let mut cache = Cache::new(&mut rng, &case, 1, *k_starts.last().unwrap() as usize);
        for b in 0..batch {
            for t in 0..counts[b] {
                for h in 0..heads {
                    for d in 0..dim {
                        q.set_element_bits([0, q_starts[b] as usize + t, h, d], case.q.bits([b, t, h, d]));
                    }
                }
            }
            for j in 0..rooms[b] {
                cache.put(&case, (b, j), (0, k_starts[b] as usize + j));
            }
        }
        let together = Case {
            q,
            k: cache.k,
            v: cache.v,
            out_dtype: case.out_dtype,
            out_layout: case.out_layout,
            out_place: case.out_place,
            options: Default::default(),
        };
        let length = |b: usize| case.options.lengths.as_ref().map_or(rooms[b] as i32, |l| l[b]);
        let lengths: Vec<i32> = (0..batch).map(length).collect();
        let bits = rng.chance(0.5).then(|| {
            let most = counts.iter().copied().max().unwrap();
            let keys = lengths.iter().copied().max().unwrap() as usize;
            let firsts = lengths.iter().map(|&n| rng.below(n as usize + 1) as i32 / 2).collect();
            let head = if rng.chance(0.5) { keys as i64 } else { 0 };
            let token = (keys * heads) as i64;
            let (shape, strides) = ([batch, most, heads, keys], [token * most as i64, token, head]);
            BitMaskTensor::new(shape, strides, 0, firsts, Place::GuardAfter, |_| rng.chance(0.7))
        });
        let by_row = bits.as_ref().map(|bits| bits.by_row(&mut rng, &counts, &lengths));
        for (threads, bits, planned) in [(1, &by_row, false), (3, &by_row, true), (1, &bits, false)] {
            let mut options = case.options.borrow().layout(Layout::ragged(&k_starts)).cu_seqlens_q(&q_starts);
            options.bit_mask = bits.as_ref().map(BitMaskTensor::view);
            let plan = AttentionPlan::new(together.q.shape, together.k.shape, &options).expect("a valid plan");
            let options = if planned { rest(&options, &plan) } else { options };
            let mut workspace = Workspace::new();
            let kv = (&together.k, &together.v);
            let got = together.run_on(&level.context, &Threads(threads), &mut workspace, kv, options);
            let got = got.unwrap_or_else(|error| panic!("{error}: {what}"));
            level.checked(Op::Attention, case.k.dtype, case.v.dtype);
            assert_eq!(got.out.shape[3], v_dim);
            for b in 0..batch {
                let one = |list: &Option<Vec<i32>>| list.as_ref().map(|l| vec![l[b]]);
                let o = &case.options;
                let alone = Case {
                    q: case.q.cut(b..b + 1, 0..counts[b], Strides::BSHD),
                    k: case.k.cut(b..b + 1, 0..rooms[b], Strides::BSHD),
                    v: case.v.cut(b..b + 1, 0..rooms[b], Strides::BSHD),
                    out_dtype: case.out_dtype,
                    out_layout: Strides::BSHD,
                    out_place: Place::Heap,
                    options: crate::common::attention::Options {
                        scale: o.scale,
                        softcap: o.softcap,
                        causal: o.causal,
                        window_left: o.window_left,
                        window_right: o.window_right,
                        lengths: one(&o.lengths),
                        kv_starts: one(&o.kv_starts),
                        offsets: one(&o.offsets),
                        prefix_lengths: one(&o.prefix_lengths),
                        alibi: o.alibi.clone(),
                        sink_logits: o.sink_logits.clone(),
                        mask: bits.as_ref().map(|bits| {
                            let shape = [1, counts[b], heads, rooms[b]];
                            let shown = |[_, t, h, j]: [usize; 4]| j >= lengths[b] as usize || bits.get([b, t, h, j]);
                            MaskTensor::new(shape, Strides::BSHD.strides(shape), Place::GuardAfter, shown)
                        }),
                        ..Default::default()
                    },
                };
                let alone = alone.run(&level.context);
                for t in 0..counts[b] {
                    let at = q_starts[b] as usize + t;
                    assert_eq!(got.row_bits(0, at), alone.row_bits(0, t), "row {b} of {counts:?}: {what}");
                }
            }
        }
    }
}

fn what_is_not_retained_is_refused(level: &Level) {
    let mut rng = Rng::new(306);
    let dtype = kv_types()[0];
    let shape = Shape { tokens: 2, keys: 40, ..Shape::default() };
    let mut case = Case::new(&mut rng, shape, dtype).with(|o| (o.causal, o.lengths) = (true, Some(vec![40])));
    let cache = Cache::new(&mut rng, &case, 1, 20);
    let ring = Layout::ring(4);
    let error = cache.error(level, &case, ring);
    assert_eq!(
        error.message(),
        "window_left is absent and sequence 0 has 2 queries, so the first query of sequence 0 sees keys from 0 on, but of its 40 tokens the \
         ring retains those from 24 on: give a window_left of at most 14, or a ring of more slots"
    );
    assert_eq!(error.status(), Status::Capacity);
    case.options.window_left = Some(15);
    assert_eq!(
        cache.error(level, &case, ring).message(),
        "window_left is 15 and the first query stands at position 38, so the first query of sequence 0 sees keys from 23 on, but of its \
         40 tokens the ring retains those from 24 on: give a window_left of at most 14, or a ring of more slots"
    );
    case.options.offsets = Some(vec![20]);
    case.options.window_left = Some(0);
    assert!(
        cache
            .error(level, &case, ring)
            .message()
            .ends_with("no window_left is small enough, give a ring of more slots")
    );
    case.options.offsets = None;
    case.options.window_left = Some(14);
    case.options.prefix_lengths = Some(vec![5]);
    assert!(
        cache.error(level, &case, ring).message().contains("prefix_lengths[0] is 5, but the ring keeps 4 sink tokens")
    );
    case.options.lengths = None;
    assert!(cache.error(level, &case, ring).message().starts_with("lengths is absent"));
    assert!(cache.error(level, &case, Layout::ring(20)).message().contains("20 sink tokens"));
}

fn tables_are_checked(level: &Level) {
    let mut rng = Rng::new(307);
    let dtype = kv_types()[0];
    let shape = Shape { batch: 2, keys: 40, ..Shape::default() };
    let case = Case::new(&mut rng, shape, dtype).with(|o| o.lengths = Some(vec![40, 16]));
    let cache = Cache::new(&mut rng, &case, 5, 16);
    let paged = |pages: &[i32]| cache.error(level, &case, Layout::paged(pages, 3)).to_string();
    assert!(paged(&[0, 1, 5, 2, 0, 0]).contains("page_table[0, 2] is 5, but k has batch = 5"));
    assert!(paged(&[0, 1, 2, -1, 0, 0]).contains("page_table[1, 0] is -1"));
    assert!(paged(&[0, 1, 2]).contains("k has sequences = 1, but q has 2"));
    assert!(paged(&[0, 1, 2, 3]).contains("page_table has 4 entries, which is no multiple of pages_per_sequence = 3"));
    let long = Case::new(&mut rng, shape, dtype).with(|o| o.lengths = Some(vec![40, 49]));
    let error = cache.error(level, &long, Layout::paged(&[0, 1, 2, 3, 4, 0], 3));
    assert!(error.message().contains("lengths[1] is 49, but k has room for a sequence = 48"), "{error}");
    level.checked(Op::Attention, dtype, dtype);
}

/// A page table may have no columns as long as no sequence has a token.
fn rows_without_pages(level: &Level) {
    let mut rng = Rng::new(313);
    for dtype in kv_types() {
        let shape = Shape { batch: 2, keys: 4, tokens: 2, ..Shape::default() };
        let case = Case::new(&mut rng, shape, dtype).with(|o| o.lengths = Some(vec![0, 0]));
        let none = Layout::paged(&[], 0);
        let mut out = Tensor::output(DType::F32, [2, 2, case.q.shape[2], case.v.shape[3]], Strides::BSHD, Place::Heap);
        let mut lse = vec![1.0; 2 * 2 * case.q.shape[2]];
        let options = AttentionOptions::new().lengths(&[0, 0]).layout(none).precision(precision());
        let mut plan = AttentionPlan::new(case.q.shape, case.k.shape, &options).unwrap();
        for options in [options, AttentionOptions::new().plan(&plan).precision(precision())] {
            let tensors =
                AttentionTensors::new(case.q.view(), keys(&case.k), values(&case.v), out.view_mut()).lse(&mut lse);
            attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).unwrap();
            assert!(indices(out.shape).all(|at| out.get(at) == 0.0));
            assert!(lse.iter().all(|&lse| lse == f32::NEG_INFINITY));
        }
        level.checked(Op::Attention, dtype, dtype);
        let error = AttentionPlan::new(case.q.shape, case.k.shape, &options.lengths(&[0, 1])).unwrap_err();
        assert!(error.message().contains("lengths[1] is 1, but k has room for a sequence = 0"), "{error}");
        assert!(plan.advance(&[0, 1]).unwrap_err().message().contains("has room for 0"));
        assert!(plan.set_table(1, 0, &[2]).unwrap_err().message().contains("entries 0..1 of a sequence that has 0"));
        plan.advance(&[0, 0]).unwrap();

        // Nothing is written, or everything is refused.
        let (mut k, mut v) = (case.k.to(Strides::BSHD, Place::Heap), case.v.to(Strides::BSHD, Place::Heap));
        for counts in [[0, 0], [0, 1]] {
            let to = Destination::positions(&[0, 0]).counts(&counts).layout(none);
            let (new_k, new_v) = (case.k.cut(0..2, 0..1, Strides::BSHD), case.v.cut(0..2, 0..1, Strides::BSHD));
            let write = KvWrite::new(new_k.view(), new_v.view(), k.view_mut(), v.view_mut(), to);
            let written = kv_write(&level.context, &Serial, write);
            assert_eq!(written.map_err(|e| e.status()), if counts == [0, 0] { Ok(()) } else { Err(Status::Capacity) });
        }
        let (mut lengths, mut map) = ([0, 0], [7; 2]);
        let mut layers = [KvLayer::new(k.view_mut(), v.view_mut())];
        let mut cache = KvCache::new(&mut layers, none, &mut lengths);
        cache.advance(&[0, 0]).unwrap();
        cache.truncate(&[0, 0], None).unwrap();
        cache.evict(&level.context, &Serial, 1, 0..0, &[]).unwrap();
        cache.copy_prefix(&level.context, &Serial, 0, &[1], 0).unwrap();
        cache.reset(&Serial, &[0, 1], true).unwrap();
        assert_eq!(cache.advance(&[1, 0]).unwrap_err().status(), Status::Capacity);
        let used = defragment_pages(&level.context, &Serial, &mut layers, &mut [], 0, &[0, 0], &mut map).unwrap();
        assert_eq!((used, map), (0, [-1; 2]));
    }
}

/// The options of a call that a plan, masks included, does not fix.
fn rest<'a>(options: &AttentionOptions<'a>, plan: &'a AttentionPlan) -> AttentionOptions<'a> {
    let mut rest = AttentionOptions::new().plan(plan).precision(options.precision);
    (rest.bias, rest.scale, rest.softcap) = (options.bias, options.scale, options.softcap);
    (rest.alibi_slopes, rest.sink_logits) = (options.alibi_slopes, options.sink_logits);
    rest
}

/// With a plan instead of lists and masks, or instead of lists only, the bits are the same.
fn plans(level: &Level) {
    let mut rng = Rng::new(308);
    let mut plan = None;
    for _ in 0..scaled(120) {
        let (case, what) = random_case(&mut rng);
        let all = case.options.borrow();
        let with_masks = rng.chance(0.7);
        let mut options = all;
        if !with_masks {
            (options.mask, options.bit_mask) = (None, None);
        }
        // Reuses the memory of the previous plan.
        let plan = match &mut plan {
            None => plan.insert(AttentionPlan::new(case.q.shape, case.k.shape, &options).expect("a valid plan")),
            Some(plan) => {
                plan.update(case.q.shape, case.k.shape, &options).expect("a valid plan");
                plan
            }
        };
        let mut planned = rest(&options, plan);
        if !with_masks {
            (planned.mask, planned.bit_mask) = (all.mask, all.bit_mask);
        }
        let want = case.run(&level.context);
        let kv = (&case.k, &case.v);
        let got = case.run_on(&level.context, &Threads(2), &mut Workspace::new(), kv, planned).expect("a valid call");
        level.checked(Op::Attention, case.k.dtype, case.v.dtype);
        assert!(got.all_bits() == want.all_bits(), "{what}");
        let refused = |name: &str, options| {
            let error = case.run_on(&level.context, &Serial, &mut Workspace::new(), kv, options).err().expect("both");
            let sentence = format!("both plan and {name} are given, but {name} is the plan's to say");
            assert_eq!(error.message(), sentence, "{what}");
        };
        refused("causal", planned.causal(true));
        let mut both = planned;
        if with_masks && all.mask.is_some() {
            both.mask = all.mask;
            refused("mask", both);
        } else if with_masks && all.bit_mask.is_some() {
            both.bit_mask = all.bit_mask;
            refused("bit_mask", both);
        }
    }
}

/// Masks that mask whole chunks, at either end or between prefix and window, have the same bits with a plan.
fn plans_of_far_masks(level: &Level) {
    let mut rng = Rng::new(311);
    for _ in 0..scaled(24) {
        let (dtype, keys) = (rng.pick(&kv_types()), rng.between(1025, 5000));
        let tokens = rng.pick(&[1, 1, 2, 14]);
        let shape = Shape { batch: rng.between(1, 2), tokens, group: 2, keys, dim: 8, v_dim: 8, ..Shape::default() };
        let entry = |rng: &mut Rng, most: usize| (0..shape.batch).map(|_| rng.between(0, most) as i32).collect();
        let mut case = Case::new(&mut rng, shape, dtype);
        if rng.chance(0.5) {
            case.options.lengths = Some(entry(&mut rng, keys));
        }
        if rng.chance(0.5) {
            case.options.prefix_lengths = Some(entry(&mut rng, keys.min(1500)));
        }
        case.options.window_left = rng.chance(0.5).then(|| rng.below(1500) as u32);
        let (scores, by_head) = (shape.scores(), rng.chance(0.3));
        let shown = [(); 2].map(|()| {
            let first = rng.below(keys);
            first..first + rng.below(keys)
        });
        let strides = [0, if rng.chance(0.5) { 2 * keys as i64 } else { 0 }, if by_head { keys as i64 } else { 0 }, 1];
        let shown = |[_, _, h, j]: [usize; 4]| shown[if by_head { h } else { 0 }].contains(&j) && j % 5 != 1;
        case.options.mask = Some(MaskTensor::new(scores, strides, Place::GuardAfter, shown));
        let want = case.run(&level.context);
        let options = case.options.borrow();
        let plan = AttentionPlan::new(case.q.shape, case.k.shape, &options).expect("a valid plan");
        for threads in [1, 3] {
            let (mut workspace, kv) = (Workspace::new(), (&case.k, &case.v));
            let got = case.run_on(&level.context, &Threads(threads), &mut workspace, kv, rest(&options, &plan));
            level.checked(Op::Attention, dtype, dtype);
            assert!(got.expect("a valid call").all_bits() == want.all_bits(), "{dtype} {shape:?} on {threads} threads");
        }
    }
}

/// A plan that advances equals a new plan, and one that cannot advance is unchanged.
fn plans_advance() {
    let (q, k) = ([2, 1, 1, 8], [5, 4, 1, 8]);
    let pages = [3, 1, -1, 0, 4, 2];
    let layout = Layout::paged(&pages, 3);
    let at = |lengths: &[i32], layout| {
        let options = AttentionOptions::new().causal(true).window_left(5).lengths(lengths).layout(layout);
        AttentionPlan::new(q, k, &options)
    };
    let mut plan = at(&[6, 9], layout).unwrap();
    plan.advance(&[2, 1]).unwrap();
    assert_eq!(format!("{plan:?}"), format!("{:?}", at(&[8, 10], layout).unwrap()));
    let before = format!("{plan:?}");
    for (counts, sentence) in [
        (&[1, 0][..], "page_table[0, 2] is -1, but k has batch = 5"),
        (&[0, 3], "sequence 1 of the plan has 10 tokens and is given 3 more, but has room for 12"),
        (&[0, -1], "counts[1] is -1, which is negative"),
        (&[1], "counts has 1 entries, but the plan has 2 sequences"),
    ] {
        assert_eq!(plan.advance(counts).unwrap_err().message(), sentence);
        assert_eq!(format!("{plan:?}"), before);
    }
    assert!(
        plan.set_table(0, 1, &[5]).unwrap_err().message().contains("entry 1 of sequence 0 is 5, but k has batch = 5")
    );
    assert!(plan.set_table(0, 2, &[1, 1]).unwrap_err().message().contains("entries 2..4 of a sequence that has 3"));
    plan.set_table(0, 2, &[1]).unwrap();
    plan.advance(&[1, 0]).unwrap();
    assert_eq!(plan.lengths(), [9, 10]);
    let ring = at(&[4, 9], Layout::ring(0));
    assert!(ring.is_err(), "five rows in the cache, two in q");
}

/// A shared prefix and the own keys of each sequence: within the bound of attention over both.
fn shared_prefix(level: &Level) {
    let mut rng = Rng::new(309);
    for _ in 0..scaled(60) {
        let (dim, v_dim) = (rng.between(1, 80), rng.between(1, 80));
        let (tokens, prefix) = (rng.pick(&[1, 1, 2, 5, 14]), rng.pick(&[0, 1, 30, 64, 100, 1100]));
        let own = rng.between(1, 90);
        let shape = Shape {
            batch: rng.between(1, 9),
            tokens,
            kv_heads: rng.between(1, 3),
            group: rng.between(1, 4),
            keys: prefix + own,
            dim,
            v_dim,
        };
        let kv = rng.pick(&kv_types());
        let lengths: Vec<i32> = (0..shape.batch).map(|_| (prefix + rng.below(own + 1)) as i32).collect();
        let heads = shape.kv_heads * shape.group;
        let mut case = Case::new(&mut rng, shape, kv);
        case.options.causal = rng.chance(0.5);
        case.options.softcap = rng.chance(0.3).then_some(20.0);
        case.options.sink_logits = rng.chance(0.3).then(|| (0..heads).map(|_| rng.f32()).collect());
        case.options.lengths = Some(lengths.clone());
        // In the own part, queries have the same distance from its keys; no query is excluded from the prefix by
        // causality.
        case.options.offsets = Some(lengths.iter().map(|n| (n - tokens as i32).max(prefix as i32 - 1)).collect());
        case.q = case.q.cast(rng.pick(&DType::ALL)).to(Strides::random(&mut rng), Place::Heap);
        case.out_dtype = rng.pick(&DType::ALL);
        for b in 1..shape.batch {
            for j in 0..prefix {
                for h in 0..shape.kv_heads {
                    (0..dim).for_each(|d| case.k.set_element_bits([b, j, h, d], case.k.bits([0, j, h, d])));
                    (0..v_dim).for_each(|d| case.v.set_element_bits([b, j, h, d], case.v.bits([0, j, h, d])));
                }
            }
        }
        let layouts = [(); 4].map(|()| Strides::random(&mut rng));
        let cut = |tensor: &Tensor, rows, seq, strides| tensor.cut(rows, seq, strides);
        let (k, v) = (cut(&case.k, 0..1, 0..prefix, layouts[0]), cut(&case.v, 0..1, 0..prefix, layouts[1]));
        let all = 0..shape.batch;
        let own_k = cut(&case.k, all.clone(), prefix..shape.keys, layouts[2]);
        let own_v = cut(&case.v, all, prefix..shape.keys, layouts[3]);
        let own_lengths: Vec<i32> = lengths.iter().map(|n| n - prefix as i32).collect();
        let offsets: Vec<i32> = case.options.offsets.iter().flatten().map(|n| n - prefix as i32).collect();
        let options = case.options.borrow().lengths(&own_lengths).offsets(&offsets);
        let run = |threads: usize| {
            let mut out =
                Tensor::output(case.out_dtype, [shape.batch, tokens, heads, v_dim], Strides::BHSD, Place::GuardAfter);
            let mut lse = vec![f32::NAN; shape.batch * tokens * heads];
            let tensors =
                AttentionTensors::new(case.q.view(), keys(&own_k), values(&own_v), out.view_mut()).lse(&mut lse);
            let prefix = SharedPrefix::new(keys(&k), values(&v));
            let mut workspace = Workspace::new();
            attention_with_prefix(&level.context, &Threads(threads), &mut workspace, prefix, tensors, &options)
                .expect("a valid call");
            out.assert_gaps();
            Outcome { out, lse }
        };
        let outcome = run(1);
        level.checked(Op::Attention, kv, kv);
        level.checked(Op::MergeStates, DType::F32, DType::F32);
        case.assert_close(&level.context, &outcome, &|| format!("prefix {prefix} {kv} {shape:?} lengths {lengths:?}"));
        assert!(run(3).all_bits() == outcome.all_bits());
    }
}
