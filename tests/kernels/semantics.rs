//! The rules about masks, positions, heads and NaN, one test each.

use crate::attention::check;
use crate::common::attention::{
    BitMaskTensor, Case, MaskTensor, Options, Shape, kv_types, narrow, quantised, random_bias,
};
use crate::common::runners::Threads;
use crate::common::tensor::{Gaps, nans, poison};
use crate::common::{Layout, Place, Rng, Tensor, close, scaled, thin};
use crate::harness::{Level, tests};
use kvlane::{AttentionOptions, AttentionPlan, CacheFormat, DType, Op, Serial, Workspace, alibi_slopes};

tests! {
    levels: order_of_operations, row_without_keys, bias_decides_not_the_logit, hidden_poison, poison_reaches_who_sees_it,
        live_nan_propagates, causal_offset, negative_offset, windows, starts_and_lengths, heads_read_their_group,
        sinks, alibi, log_sum_exp, mask_broadcast, axes_of_one_element_broadcast, bias_types, live_minus_infinity, bits_by_row,
        large_logits;
    once: standard_alibi_slopes;
}

/// The row `[b, t]`: whether its outputs are all +0 and its LSEs -inf.
#[track_caller]
fn assert_empty(outcome: &crate::common::attention::Outcome, b: usize, t: usize) {
    let [_, tokens, heads, dim] = outcome.out.shape;
    for h in 0..heads {
        for d in 0..dim {
            assert_eq!(outcome.out.bits([b, t, h, d]), 0, "output [{b}, {t}, {h}, {d}]");
        }
        assert_eq!(outcome.lse[(b * tokens + t) * heads + h], f32::NEG_INFINITY, "LSE [{b}, {t}, {h}]");
    }
}

/// Scale, then softcap, then ALiBi, then bias: with one key, the LSE is the logit.
fn order_of_operations(level: &Level) {
    let shape = Shape { keys: 1, dim: 4, v_dim: 4, ..Shape::default() };
    let mut rng = Rng::new(10);
    let mut case = Case::new(&mut rng, shape, DType::F32);
    case.q.fill(|_| 2.0);
    case.k.fill(|_| 3.0);
    case.options = Options {
        scale: Some(0.5),
        softcap: Some(8.0),
        // The query stands five positions after the key.
        offsets: Some(vec![5]),
        alibi: Some(vec![0.25]),
        bias: Some({
            let mut bias = Tensor::input(DType::F32, [1, 1, 1, 1], Layout::BSHD, Place::Heap);
            bias.fill(|_| 0.75);
            bias
        }),
        ..Options::default()
    };
    let outcome = case.run(&level.context);
    let want = 8.0 * (24.0f64 * 0.5 / 8.0).tanh() + 0.25 * -5.0 + 0.75;
    level.checked(Op::Attention, DType::F32, DType::F32);
    close(outcome.lse[0].into(), want, 2e-6, || "the logit".into());
    assert_eq!(outcome.out.get([0, 0, 0, 2]), case.v.get([0, 0, 0, 2]), "one key has weight 1");
}

/// Scores whose rounding alone is more than an exponential bears: the largest takes all weight.
fn large_logits(level: &Level) {
    let mut rng = Rng::new(27);
    for dtype in kv_types() {
        for (tokens, size) in [1e3f32, 3e4, 1e5, 1e6, 1e9, 1e15].into_iter().flat_map(|x| [(1, x), (2, x), (40, x)]) {
            let shape = Shape { keys: 100, tokens, group: 2, dim: 32, v_dim: 16, ..Shape::default() };
            let mut case = Case::new(&mut rng, shape, dtype);
            let best = rng.below(shape.keys);
            // The best key is four times as long as others, and each query points along it.
            case.q.fill(|[_, t, h, d]| size * (1.0 + ((t + 3 * h + d) % 7) as f32));
            case.k.fill(|[_, j, _, _]| if j == best { 40.0 } else { 10.0 * ((j % 13) as f32 / 13.0) });
            let outcome = case.run(&level.context);
            level.checked(Op::Attention, dtype, dtype);
            for row in 0..tokens * 2 {
                let (t, h) = (row / 2, row % 2);
                for d in 0..shape.v_dim {
                    let (got, want) = (outcome.out.get([0, t, h, d]), case.v.get([0, best, 0, d]));
                    let tolerance = match quantised()[1] {
                        None => 1e-4,
                        Some(CacheFormat::Int8) => 0.02,
                        // Half a step of two bits: an eighth of the number.
                        Some(_) => 0.13 * f64::from(want).abs() + 1e-4,
                    };
                    close(got.into(), want.into(), tolerance, || format!("{dtype} {size:e}, token {t}, head {h}"));
                }
                assert!(outcome.lse[row].is_finite(), "{dtype} {size:e}, token {t}, head {h}: {}", outcome.lse[row]);
            }
        }
    }
}

/// A way to mask keys.
type Hide = Box<dyn Fn(&mut Options)>;

/// However all keys are masked: the output is 0 and the LSE -inf, and no value of K and V has an effect.
fn row_without_keys(level: &Level) {
    let mut rng = Rng::new(11);
    for dtype in kv_types() {
        for tokens in [1, 20] {
            let shape = Shape { tokens, group: 2, dim: 20, v_dim: 20, ..Shape::default() };
            let scores = shape.scores();
            let kinds: Vec<(&str, Hide)> = vec![
                ("length 0", Box::new(|o| o.lengths = Some(vec![0]))),
                ("start at length", Box::new(|o| (o.lengths, o.kv_starts) = (Some(vec![60]), Some(vec![60])))),
                ("start past length", Box::new(|o| (o.lengths, o.kv_starts) = (Some(vec![6]), Some(vec![60])))),
                ("causal before the first key", Box::new(|o| (o.causal, o.offsets) = (true, Some(vec![-20])))),
                ("window past the last key", Box::new(|o| (o.window_left, o.offsets) = (Some(3), Some(vec![1000])))),
                (
                    "window before the first key",
                    Box::new(|o| (o.window_right, o.offsets) = (Some(3), Some(vec![-1000]))),
                ),
                ("mask", {
                    let strides = Layout::BSHD.strides(scores);
                    Box::new(move |o| o.mask = Some(MaskTensor::new(scores, strides, Place::Heap, |_| false)))
                }),
                ("bias", {
                    Box::new(move |o| {
                        let mut bias = Tensor::input(DType::F32, scores, Layout::BSHD, Place::Heap);
                        bias.fill(|_| f32::NEG_INFINITY);
                        o.bias = Some(bias);
                    })
                }),
            ];
            for (name, hide) in &kinds {
                for poisoned in [false, true] {
                    let mut case = Case::new(&mut rng, shape, dtype).with(hide);
                    if poisoned {
                        for s in 0..shape.keys {
                            case.k.poison_token(0, s);
                            case.v.poison_token(0, s);
                        }
                    }
                    check(level, &case, || format!("{dtype} {name}"));
                    let outcome = case.run(&level.context);
                    (0..tokens).for_each(|t| assert_empty(&outcome, 0, t));
                }
            }
        }
    }
}

/// A bias of -inf masks a key whose logit is NaN or infinite.
fn bias_decides_not_the_logit(level: &Level) {
    let mut rng = Rng::new(12);
    for dtype in kv_types() {
        for tokens in [1, 14] {
            for bias_dtype in thin(DType::ALL.to_vec()) {
                let shape = Shape { tokens, group: 2, keys: 140, ..Shape::default() };
                let hidden = |j: usize| j % 3 == 1 || (64..128).contains(&j);
                let mut case = Case::new(&mut rng, shape, dtype);
                let mut bias = Tensor::input(bias_dtype, shape.scores(), Layout::BSHD, Place::Heap);
                bias.fill(|at| if hidden(at[3]) { f32::NEG_INFINITY } else { rng.f32() });
                case.options.bias = Some(bias);
                let clean = case.run(&level.context);
                for j in (0..140).filter(|&j| hidden(j)) {
                    case.k.poison_token(0, j);
                    case.v.poison_token(0, j);
                }
                check(level, &case, || format!("{dtype} bias {bias_dtype}"));
                assert_eq!(case.run(&level.context).all_bits(), clean.all_bits());
            }
        }
    }
}

/// Options that mask, one or several at a time; all queries of a sequence see the same keys, except for causality.
fn random_hiding(rng: &mut Rng, shape: Shape) -> Options {
    let mut options = Options::default();
    let keys = shape.keys;
    let per_row = |rng: &mut Rng, low: usize, high: usize| -> Vec<i32> {
        (0..shape.batch).map(|_| rng.between(low, high) as i32).collect()
    };
    if rng.chance(0.5) {
        options.lengths = Some(per_row(rng, 0, keys));
    }
    if rng.chance(0.3) {
        options.kv_starts = Some(per_row(rng, 0, keys));
    }
    if rng.chance(0.5) {
        options.causal = true;
    }
    if rng.chance(0.3) {
        let reach = keys.max(2);
        options.offsets = Some((0..shape.batch).map(|_| rng.below(2 * reach) as i32 - reach as i32 / 2).collect());
    }
    if rng.chance(0.3) {
        options.window_left = Some(rng.below(keys + 1) as u32);
    }
    if rng.chance(0.3) {
        options.window_right = Some(rng.below(keys + 1) as u32);
    }
    if rng.chance(0.4) {
        let share = rng.pick(&[0.1, 0.5, 0.95]);
        let scores = shape.scores();
        let mut strides = Layout::random(rng).strides(scores);
        (0..3).for_each(|axis| {
            if rng.chance(0.4) {
                strides[axis] = 0
            }
        });
        let mut inner = rng.clone();
        options.mask = Some(MaskTensor::new(scores, strides, Place::GuardAfter, |_| inner.chance(share)));
        rng.u64();
    }
    if rng.chance(0.3) {
        let scores = shape.scores();
        let mut strides = Layout::random(rng).strides(scores);
        (0..3).for_each(|axis| {
            if rng.chance(0.4) {
                strides[axis] = 0
            }
        });
        let (dtype, hidden) = (rng.pick(&DType::ALL), rng.pick(&[0.0, 0.3, 0.9]));
        options.bias = Some(random_bias(rng, dtype, scores, strides, Place::GuardBefore, hidden));
    }
    if rng.chance(0.25) {
        options.prefix_lengths = Some(per_row(rng, 0, keys));
    }
    if rng.chance(0.3) {
        let bits = random_bit_mask(rng, shape);
        let lengths = options.lengths.clone().unwrap_or_else(|| vec![keys as i32; shape.batch]);
        let by_row = rng.chance(0.4);
        options.bit_mask =
            Some(if by_row { bits.by_row(rng, &vec![shape.tokens; shape.batch], &lengths) } else { bits });
    }
    options
}

/// Over the last keys or over all, between other bits, against a guard page.
fn random_bit_mask(rng: &mut Rng, shape: Shape) -> BitMaskTensor {
    let [batch, tokens, heads, keys] = shape.scores();
    let first_keys: Vec<i32> =
        (0..batch).map(|_| if rng.chance(0.5) { 0 } else { rng.between(0, keys) as i32 }).collect();
    let width = keys - if rng.chance(0.5) { *first_keys.iter().min().unwrap() as usize } else { 0 };
    let head = (width + rng.below(9)) as i64;
    let token = head * heads as i64 + rng.below(3) as i64;
    let mut strides = [token * tokens as i64, token, head];
    for stride in &mut strides {
        if rng.chance(0.3) {
            *stride = 0;
        }
    }
    let (mut inner, share, offset) = (rng.clone(), rng.pick(&[0.1, 0.5, 0.95]), rng.below(11));
    BitMaskTensor::new([batch, tokens, heads, width], strides, offset, first_keys, Place::GuardAfter, |_| {
        inner.chance(share)
    })
}

/// A shape for random cases.
pub fn random_shape(rng: &mut Rng) -> Shape {
    let tokens = if rng.chance(0.5) { rng.between(1, 5) } else { rng.between(6, 40) };
    let dim = if rng.chance(0.5) { rng.pick(&[8, 16, 32, 64]) } else { rng.between(1, 80) };
    Shape {
        batch: rng.between(1, 3),
        tokens,
        kv_heads: rng.between(1, 3),
        group: rng.pick(&[1, 1, 2, 3, 4, 7]),
        keys: if rng.chance(0.9) { rng.between(1, 200) } else { rng.between(1000, 1100) },
        dim,
        v_dim: if rng.chance(0.7) { dim } else { rng.between(1, 80) },
    }
}

/// A random call with a combination of options.
pub fn random_case(rng: &mut Rng) -> (Case, String) {
    let shape = random_shape(rng);
    let kv = rng.pick(&kv_types());
    let plain = Case::new(rng, shape, kv);
    let mut options = random_hiding(rng, shape);
    let heads = shape.kv_heads * shape.group;
    if rng.chance(0.3) {
        options.scale = Some(rng.f32() * 0.3);
    }
    if rng.chance(0.3) {
        options.softcap = Some(rng.pick(&[0.5, 5.0, 30.0]));
    }
    if rng.chance(0.3) {
        options.alibi =
            Some(if rng.chance(0.5) { alibi_slopes(heads) } else { (0..heads).map(|_| rng.f32() * 0.05).collect() });
    }
    if rng.chance(0.3) {
        options.sink_logits = Some((0..heads).map(|_| rng.f32()).collect());
    }
    let layouts = [(); 4].map(|()| Layout::random(rng));
    let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
    let mut case = plain.moved(layouts, place, options);
    case.q = case.q.cast(rng.pick(&DType::ALL));
    case.out_dtype = rng.pick(&DType::ALL);
    let o = &case.options;
    let what = format!(
        "{shape:?} kv {kv} q {} out {} {place:?} {layouts:?} causal {} window {:?} {:?} lengths {:?} starts {:?} offsets {:?} \
         prefix_lengths {:?} mask {} bits {} bias {} softcap {:?} alibi {} sinks {}",
        case.q.dtype,
        case.out_dtype,
        o.causal,
        o.window_left,
        o.window_right,
        o.lengths,
        o.kv_starts,
        o.offsets,
        o.prefix_lengths,
        o.mask.is_some(),
        o.bit_mask.is_some(),
        o.bias.is_some(),
        o.softcap,
        o.alibi.is_some(),
        o.sink_logits.is_some(),
    );
    (case, what)
}

/// The keys that each query `[b, t, h]` sees, from the definition.
pub fn visible(case: &Case, at: [usize; 4]) -> bool {
    let [b, t, _, j] = at;
    let o = &case.options;
    let (tokens, keys) = (case.q.shape[1] as i64, case.k.shape[1] as i64);
    let length = o.lengths.as_ref().map_or(keys, |l| l[b].into());
    let offset = o.offsets.as_ref().map_or(length - tokens, |x| x[b].into());
    let own = |t: i64| o.query_positions.as_ref().map_or(offset + t, |p| p[b * tokens as usize + t as usize].into());
    let (position, j) = (own(t as i64), j as i64);
    let place = if (0..tokens).contains(&(j - offset)) { own(j - offset) } else { j };
    j < length
        && o.kv_starts.as_ref().is_none_or(|s| j >= s[b].into())
        && (o.prefix_lengths.as_ref().is_some_and(|p| j < p[b].into())
            || !(o.causal && place > position)
                && o.window_left.is_none_or(|w| position - place <= w.into())
                && o.window_right.is_none_or(|w| place - position <= w.into()))
        && o.bit_mask.as_ref().is_none_or(|m| m.get(at))
        && o.mask.as_ref().is_none_or(|m| m.get(at))
        && o.bias.as_ref().is_none_or(|bias| bias.get(at) != f32::NEG_INFINITY)
}

/// NaN and infinities in slots that no query of a sequence sees change no bit, however they are masked.
fn hidden_poison(level: &Level) {
    let mut rng = Rng::new(13);
    let mut poisoned = 0;
    for _ in 0..scaled(200) {
        let (mut case, what) = random_case(&mut rng);
        let clean = case.run(&level.context);
        let [batch, tokens, heads, _] = case.q.shape;
        for b in 0..batch {
            for j in 0..case.k.shape[1] {
                if (0..tokens).all(|t| (0..heads).all(|h| !visible(&case, [b, t, h, j]))) {
                    case.k.poison_token(b, j);
                    case.v.poison_token(b, j);
                    poisoned += 1;
                }
            }
        }
        check(level, &case, || what.clone());
        assert_eq!(case.run(&level.context).all_bits(), clean.all_bits(), "{what}");
    }
    assert!(poisoned > 0);
}

/// A NaN in one slot of V reaches that element of every query that sees the slot, and nothing else; a NaN in K reaches
/// the whole query row.
fn poison_reaches_who_sees_it(level: &Level) {
    let mut rng = Rng::new(14);
    let (mut reached, mut spared) = (0, 0);
    // Even if few cases run, some must see the poison.
    for _ in 0..scaled(120).max(12) {
        let (mut case, what) = random_case(&mut rng);
        let clean = case.run(&level.context);
        let [batch, tokens, heads, _] = case.q.shape;
        let group = heads / case.k.shape[2];
        let (b, j, kv_head) = (rng.below(batch), rng.below(case.k.shape[1]), rng.below(case.k.shape[2]));
        let in_values = rng.chance(0.5);
        let tensor = if in_values { &mut case.v } else { &mut case.k };
        let d = rng.below(tensor.shape[3]);
        tensor.set_element_bits([b, j, kv_head, d], poison(tensor.dtype, 0));
        let outcome = case.run(&level.context);
        level.checked(Op::Attention, case.k.dtype, case.k.dtype);
        for row in 0..batch {
            for t in 0..tokens {
                for h in 0..heads {
                    let sees = row == b && h / group == kv_head && visible(&case, [row, t, h, j]);
                    for i in 0..case.v.shape[3] {
                        let at = [row, t, h, i];
                        if sees && (!in_values || i == d) {
                            assert!(outcome.out.get(at).is_nan(), "{what}: {at:?} sees NaN at key {j}");
                            reached += 1;
                        } else {
                            assert_eq!(outcome.out.bits(at), clean.out.bits(at), "{what}: {at:?}, NaN at key {j}");
                            spared += 1;
                        }
                    }
                    let lse = (row * tokens + t) * heads + h;
                    if sees && !in_values {
                        assert!(outcome.lse[lse].is_nan(), "{what}: LSE");
                    } else {
                        assert_eq!(outcome.lse[lse].to_bits(), clean.lse[lse].to_bits(), "{what}: LSE");
                    }
                }
            }
        }
    }
    assert!(reached > 0 && spared > 0);
}

fn live_nan_propagates(level: &Level) {
    let mut rng = Rng::new(15);
    for dtype in kv_types() {
        for tokens in [1, 16] {
            // Alone in its chunk, first, last, among others, and as the only visible key.
            for (keys, j) in thin(vec![(1, 0), (70, 0), (70, 69), (1030, 500), (1030, 1029)]) {
                for (which, nan) in (0..3).flat_map(|which| (0..4).map(move |nan| (which, nan))) {
                    let shape = Shape { tokens, keys, dim: 19, v_dim: 19, ..Shape::default() };
                    let mut case = Case::new(&mut rng, shape, dtype);
                    let tensor = [&mut case.q, &mut case.k, &mut case.v].into_iter().nth(which).unwrap();
                    let at = [0, if which == 0 { 0 } else { j }, 0, 18];
                    let nan = nans(tensor.dtype)[nan];
                    tensor.set_element_bits(at, nan);
                    let outcome = case.run(&level.context);
                    level.checked(Op::Attention, dtype, dtype);
                    assert!(
                        outcome.out.get([0, 0, 0, 18]).is_nan(),
                        "{dtype} keys {keys} the NaN {nan:#x} in tensor {which} at {j}"
                    );
                    assert_eq!(outcome.lse[0].is_nan(), which < 2, "{dtype} keys {keys} the NaN {nan:#x} at {j}");
                }
            }
        }
    }
}

/// V is the unit vector of its key, and all logits are equal: an output element is 1 / n if its key is one of the n
/// visible keys.
fn seen_keys(level: &Level, keys: usize, tokens: usize, set: impl FnOnce(&mut Options)) -> Vec<Vec<usize>> {
    let shape = Shape { tokens, keys, dim: 8, v_dim: keys, ..Shape::default() };
    let mut case = Case::new(&mut Rng::new(16), shape, DType::F32).with(set);
    case.q.fill(|_| 0.0);
    case.v.fill(|at| f32::from(at[1] == at[3]));
    let outcome = case.run(&level.context);
    level.checked(Op::Attention, DType::F32, DType::F32);
    (0..tokens)
        .map(|t| {
            let seen: Vec<usize> = (0..keys).filter(|&j| outcome.out.get([0, t, 0, j]) != 0.0).collect();
            for &j in &seen {
                close(outcome.out.get([0, t, 0, j]).into(), 1.0 / seen.len() as f64, 1e-6, || format!("weight of {j}"));
            }
            seen
        })
        .collect()
}

/// Bottom-right alignment: the last query sees the last key, unless an offset is given.
fn causal_offset(level: &Level) {
    for tokens in [3, 20] {
        let rows = seen_keys(level, 30, tokens, |o| o.causal = true);
        for (t, seen) in rows.iter().enumerate() {
            assert_eq!(*seen, (0..30 - tokens + t + 1).collect::<Vec<_>>());
        }
        let rows = seen_keys(level, 30, tokens, |o| (o.causal, o.offsets) = (true, Some(vec![0])));
        for (t, seen) in rows.iter().enumerate() {
            assert_eq!(*seen, (0..t + 1).collect::<Vec<_>>());
        }
        // The length matters, not the capacity.
        let rows = seen_keys(level, 30, tokens, |o| (o.causal, o.lengths) = (true, Some(vec![25])));
        assert_eq!(rows[tokens - 1], (0..25).collect::<Vec<_>>());
        assert_eq!(rows[0], (0..25 - tokens + 1).collect::<Vec<_>>());
    }
}

fn negative_offset(level: &Level) {
    for tokens in [5, 20] {
        let rows = seen_keys(level, 30, tokens, |o| (o.causal, o.offsets) = (true, Some(vec![-3])));
        for (t, seen) in rows.iter().enumerate() {
            assert_eq!(*seen, (0..(t + 1).saturating_sub(3)).collect::<Vec<_>>(), "token {t}");
        }
        // More queries than keys: the first queries see no key.
        let rows = seen_keys(level, 4, tokens, |o| o.causal = true);
        for (t, seen) in rows.iter().enumerate() {
            assert_eq!(*seen, (0..(t + 5).saturating_sub(tokens)).collect::<Vec<_>>(), "token {t}");
        }
    }
}

/// Counts exclude the query's own position.
fn windows(level: &Level) {
    for (left, right) in
        [(Some(0), Some(0)), (Some(3), None), (None, Some(2)), (Some(5), Some(1)), (Some(u32::MAX), Some(u32::MAX))]
    {
        for (tokens, offset) in [(1, 9), (20, 10), (20, 0), (14, 80)] {
            let rows = seen_keys(level, 90, tokens, |o| {
                (o.window_left, o.window_right, o.offsets) = (left, right, Some(vec![offset]));
            });
            for (t, seen) in rows.iter().enumerate() {
                let p = t as i64 + i64::from(offset);
                let low = left.map_or(0, |w| (p - i64::from(w)).max(0));
                let high = right.map_or(90, |w| (p + i64::from(w) + 1).min(90));
                assert_eq!(*seen, (low as usize..high.max(low) as usize).collect::<Vec<_>>(), "{left:?} {right:?} {p}");
            }
        }
    }
    // With causal, the right window adds nothing.
    let rows = seen_keys(level, 40, 20, |o| (o.causal, o.window_left, o.window_right) = (true, Some(2), Some(4)));
    assert_eq!(rows[5], [23, 24, 25]);
}

fn starts_and_lengths(level: &Level) {
    for tokens in [1, 20] {
        let rows = seen_keys(level, 90, tokens, |o| (o.kv_starts, o.lengths) = (Some(vec![66]), Some(vec![71])));
        assert!(rows.iter().all(|seen| *seen == [66, 67, 68, 69, 70]));
        // The default offset is length - tokens: starts do not move positions.
        let rows = seen_keys(level, 90, tokens, |o| (o.causal, o.kv_starts) = (true, Some(vec![3])));
        assert_eq!(rows[0], (3..90 - tokens + 1).collect::<Vec<_>>());
    }
}

/// Query head h reads KV head h / group.
fn heads_read_their_group(level: &Level) {
    for dtype in kv_types() {
        for group in thin(vec![1, 2, 3, 7, 16]) {
            for tokens in [1, 3] {
                let shape = Shape { batch: 2, tokens, kv_heads: 3, group, dim: 8, v_dim: 5, ..Shape::default() };
                let mut case = Case::new(&mut Rng::new(17), shape, dtype);
                case.v.fill(|at| (10 * at[0] + at[2]) as f32);
                let outcome = case.run(&level.context);
                level.checked(Op::Attention, dtype, dtype);
                for b in 0..2 {
                    for h in 0..3 * group {
                        let want = (10 * b + h / group) as f64;
                        close(outcome.out.get([b, tokens - 1, h, 4]).into(), want, 1e-4, || {
                            format!("head {h} of {group}")
                        });
                    }
                }
            }
        }
    }
}

/// A sink logit is one more logit without a value, applied once for any number of chunks and threads.
fn sinks(level: &Level) {
    let mut rng = Rng::new(18);
    for dtype in kv_types() {
        for (tokens, keys) in thin(vec![(1, 70), (14, 70), (1, 3100)]) {
            let shape = Shape { tokens, keys, kv_heads: 1, group: 4, dim: 16, v_dim: 16, ..Shape::default() };
            for sinks in [[0.0, 1.0, -3.0, 10.0], [100.0, -100.0, f32::NEG_INFINITY, -1e30]] {
                let case = Case::new(&mut rng, shape, dtype).with(|o| o.sink_logits = Some(sinks.to_vec()));
                check(level, &case, || format!("{dtype} sinks {sinks:?} keys {keys}"));
                let serial = case.run(&level.context).all_bits();
                let split = case.run_with(&level.context, &Threads(3)).unwrap();
                assert_eq!(split.all_bits(), serial, "{dtype} sinks {sinks:?} keys {keys}");
            }
            // A sink logit alone is the log-sum-exp, to the bit, whatever hides the keys.
            let sinks = [3.0, -0.1, 88.0, f32::NEG_INFINITY, f32::INFINITY, 1e-30, 0.7, 12345.678];
            for sinks in sinks.chunks_exact(4) {
                let mut case = || Case::new(&mut rng, shape, dtype).with(|o| o.sink_logits = Some(sinks.to_vec()));
                let (empty, mut hidden) = (case().with(|o| o.lengths = Some(vec![0])), case());
                let strides = Layout::BSHD.strides(shape.scores());
                let bias = random_bias(&mut Rng::new(1), DType::F32, shape.scores(), strides, Place::Heap, 1.0);
                hidden.options.bias = Some(bias);
                for case in [empty, hidden] {
                    let outcome = case.run(&level.context);
                    assert!(outcome.out.all_bits().iter().all(|&bits| bits == 0));
                    for (i, lse) in outcome.lse.iter().enumerate() {
                        assert_eq!(lse.to_bits(), sinks[i % 4].to_bits(), "{lse} for {}", sinks[i % 4]);
                    }
                }
            }
        }
    }
}

fn alibi(level: &Level) {
    let mut rng = Rng::new(19);
    for dtype in kv_types() {
        for (tokens, heads) in [(1, 8), (1, 12), (20, 12), (20, 6)] {
            let shape = Shape { tokens, group: heads, keys: 150, dim: 16, v_dim: 16, ..Shape::default() };
            for offset in thin(vec![None, Some(3), Some(100_000)]) {
                let case = Case::new(&mut rng, shape, dtype).with(|o| {
                    o.causal = true;
                    o.alibi = Some(alibi_slopes(heads));
                    o.offsets = offset.map(|x| vec![x]);
                });
                check(level, &case, || format!("{dtype} ALiBi {heads} heads, offset {offset:?}"));
            }
        }
    }
}

/// The reference's numbers (the slopes of 12 heads are those of 8, then every other one of 16).
fn standard_alibi_slopes() {
    assert_eq!(alibi_slopes(1), [0.003_906_25]);
    assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015_625, 0.003_906_25]);
    let twelve = [
        0.5,
        0.25,
        0.125,
        0.0625,
        0.031_25,
        0.015_625,
        0.007_812_5,
        0.003_906_25,
        0.707_106_77,
        0.353_553_38,
        0.176_776_69,
        0.088_388_346,
    ];
    for (got, want) in alibi_slopes(12).into_iter().zip(twelve) {
        close(got.into(), want, 1e-8, || "slope".into());
    }
    let three = alibi_slopes(3);
    assert_eq!(three, [0.0625, 0.003_906_25, 0.25]);
}

/// The natural logarithm, over all visible logits.
fn log_sum_exp(level: &Level) {
    for dtype in kv_types() {
        for keys in [1, 64, 1000, 2000] {
            let shape = Shape { keys, dim: 2, v_dim: 2, ..Shape::default() };
            let mut case = Case::new(&mut Rng::new(20), shape, dtype).with(|o| o.scale = Some(1.0));
            case.q.fill(|_| 1.0);
            case.k.fill(|_| 0.25);
            let lse = case.run(&level.context).lse[0];
            level.checked(Op::Attention, dtype, dtype);
            close(lse.into(), 0.5 + (keys as f64).ln(), 2e-6, || format!("LSE of {keys} keys"));
        }
    }
}

/// Strides of 0 broadcast a mask and a bias along any axis, and axes may have any order.
fn mask_broadcast(level: &Level) {
    let mut rng = Rng::new(21);
    let shape = Shape { batch: 2, tokens: 14, kv_heads: 2, group: 2, keys: 131, dim: 16, v_dim: 16 };
    let scores = shape.scores();
    for broadcast in thin((0..16).collect()) {
        for layout in
            [Layout::BSHD, Layout::STEP2, Layout::DIM_OUTSIDE, Layout { backwards: [true; 4], ..Layout::BSHD }]
        {
            let mut strides = layout.strides(scores);
            (0..4).for_each(|axis| {
                if broadcast >> axis & 1 == 1 {
                    strides[axis] = 0
                }
            });
            for place in [Place::GuardAfter, Place::GuardBefore] {
                let case = Case::new(&mut rng, shape, DType::F32);
                let mut inner = rng.clone();
                let mask = MaskTensor::new(scores, strides, place, |_| inner.chance(0.6));
                let case = case.with(|o| o.mask = Some(mask));
                check(level, &case, || format!("mask {broadcast:04b} {layout:?}"));
                let mut case = Case::new(&mut rng, shape, DType::F32);
                case.options.bias = Some(random_bias(&mut rng, DType::F32, scores, strides, place, 0.3));
                check(level, &case, || format!("bias {broadcast:04b} {layout:?}"));
            }
        }
    }
}

/// A mask, bit mask or bias with axes of one element has the bits of the expanded one, in a call and in a plan.
fn axes_of_one_element_broadcast(level: &Level) {
    let mut rng = Rng::new(29);
    for kv in kv_types() {
        for tokens in [1, 14] {
            let shape = Shape { batch: 2, tokens, kv_heads: 2, group: 2, keys: 131, dim: 16, v_dim: 16 };
            let scores = shape.scores();
            for broadcast in thin((0..16).collect()) {
                let mut strides = Layout::BSHD.strides(scores);
                (0..4).filter(|axis| broadcast >> axis & 1 == 1).for_each(|axis| strides[axis] = 0);
                let mut case = Case::new(&mut rng, shape, kv);
                let what = format!("{broadcast:04b}, {tokens} tokens, {kv}");

                let mut inner = rng.clone();
                let mask = MaskTensor::new(scores, strides, Place::GuardAfter, |_| inner.chance(0.6));
                let expanded = MaskTensor::new(scores, Layout::BSHD.strides(scores), Place::Heap, |at| mask.get(at));
                case.options.mask = Some(expanded);
                let wanted = case.run(&level.context).all_bits();
                case.options.mask = Some(mask.narrowed());
                assert_eq!(case.run(&level.context).all_bits(), wanted, "mask {what}");
                let plan = AttentionPlan::new(shape.q(), shape.k(), &case.options.borrow()).expect("a valid plan");
                let options = AttentionOptions::new().precision(level.precision).plan(&plan);
                let planned = case.run_on(&level.context, &Serial, &mut Workspace::new(), (&case.k, &case.v), options);
                assert_eq!(planned.expect("a valid call").all_bits(), wanted, "mask in a plan {what}");
                case.options.mask = None;

                let [b, t, h, _] = strides;
                let bit_strides = [b, t, h].map(|stride| if stride == 0 { 0 } else { stride + 3 });
                let (mut inner, first) = (rng.clone(), vec![0; shape.batch]);
                let bits = |strides, visible: &mut dyn FnMut([usize; 4]) -> bool| {
                    BitMaskTensor::new(scores, strides, 5, first.clone(), Place::GuardAfter, visible)
                };
                let mask = bits(bit_strides, &mut |_| inner.chance(0.6));
                let wide = Layout::BSHD.strides(scores);
                case.options.bit_mask = Some(bits([wide[0], wide[1], wide[2]], &mut |at| mask.get(at)));
                let wanted = case.run(&level.context).all_bits();
                case.options.bit_mask = Some(mask.narrowed());
                assert_eq!(case.run(&level.context).all_bits(), wanted, "bit mask {what}");
                case.options.bit_mask = None;

                for dtype in DType::ALL {
                    let mut bias = random_bias(&mut rng, dtype, scores, strides, Place::GuardAfter, 0.3);
                    let mut expanded = Tensor::input(dtype, scores, Layout::BSHD, Place::Heap);
                    expanded.fill(|at| bias.get(at));
                    case.options.bias = Some(expanded);
                    let wanted = case.run(&level.context).all_bits();
                    narrow(&mut bias.shape, &mut bias.strides);
                    case.options.bias = Some(bias);
                    assert_eq!(case.run(&level.context).all_bits(), wanted, "bias of {dtype} {what}");
                }
            }
        }
    }
}

fn bias_types(level: &Level) {
    let mut rng = Rng::new(22);
    for kv in kv_types() {
        for dtype in DType::ALL {
            for tokens in [1, 15] {
                let shape = Shape { tokens, group: 2, keys: 77, ..Shape::default() };
                let strides = Layout::BSHD.strides(shape.scores());
                let mut case = Case::new(&mut rng, shape, kv);
                let bias = random_bias(&mut rng, dtype, shape.scores(), strides, Place::GuardAfter, 0.2);
                case.options.bias = Some(bias);
                check(level, &case, || format!("kv {kv} bias {dtype}"));
            }
        }
    }
    // A bias of NaN or +inf masks nothing, and the result is NaN.
    for x in nans(DType::F32).map(f32::from_bits).into_iter().chain([f32::INFINITY]) {
        let shape = Shape { tokens: 2, ..Shape::default() };
        let mut bias = Tensor::strided(DType::F32, shape.scores(), [0, 70, 70, 1], Place::Heap, Gaps::Poison);
        bias.fill(|at| if at[1] == 0 && at[3] == 40 { x } else { 0.0 });
        let case = Case::new(&mut rng, shape, DType::F32).with(|o| o.bias = Some(bias));
        let outcome = case.run(&level.context);
        assert!(outcome.out.get([0, 0, 0, 0]).is_nan() && outcome.out.get([0, 1, 0, 0]).is_finite());
    }
}

/// A visible logit of -inf (q.k overflows) has weight 0; a query row with no other logit is empty.
fn live_minus_infinity(level: &Level) {
    for dtype in kv_types() {
        for tokens in [1, 13] {
            let shape = Shape { tokens, keys: 70, dim: 2, v_dim: 3, ..Shape::default() };
            let mut case = Case::new(&mut Rng::new(23), shape, dtype);
            case.q.fill(|_| 1.0);
            case.k.fill(|at| if at[1] % 2 == 0 { f32::NEG_INFINITY } else { 1.0 });
            check(level, &case, || format!("{dtype} every other logit -inf"));
            case.k.fill(|_| f32::NEG_INFINITY);
            check(level, &case, || format!("{dtype} every logit -inf"));
            let outcome = case.run(&level.context);
            (0..tokens).for_each(|t| assert_empty(&outcome, 0, t));
        }
    }
}

/// Bit masks with the own width of each sequence have the bits of the same mask at fixed strides, whatever lies
/// between.
fn bits_by_row(level: &Level) {
    let mut rng = Rng::new(26);
    for dtype in kv_types() {
        for tokens in [1, 3, 20] {
            for heads_differ in [false, true] {
                let shape = Shape { batch: 4, tokens, kv_heads: 2, group: 2, keys: 150, ..Shape::default() };
                let [batch, _, heads, keys] = shape.scores();
                let lengths = vec![150, 0, 67, 131];
                let firsts = if rng.chance(0.5) { vec![0; 4] } else { vec![3, 10, 67, 40] };
                let head = if heads_differ { keys as i64 } else { 0 };
                let token = (keys * heads) as i64;
                let strides = [token * tokens as i64, token, head];
                let fixed =
                    BitMaskTensor::new([batch, tokens, heads, keys], strides, 5, firsts, Place::GuardAfter, |_| {
                        rng.chance(0.6)
                    });
                let rows = fixed.by_row(&mut rng, &vec![tokens; batch], &lengths);
                let mut case = Case::new(&mut rng, shape, dtype);
                (case.options.lengths, case.options.bit_mask) = (Some(lengths), Some(fixed));
                let want = case.run(&level.context);
                assert_empty(&want, 1, 0);
                case.options.bit_mask = Some(rows);
                check(level, &case, || format!("{dtype} {tokens} tokens"));
                let got = case.run_with(&level.context, &Threads(3)).expect("a valid call");
                assert!(got.all_bits() == want.all_bits(), "{dtype} {tokens} tokens");
                case.options.bit_mask.as_mut().unwrap().disturb();
                assert!(
                    case.run(&level.context).all_bits() == want.all_bits(),
                    "{dtype} {tokens} tokens: noise is seen"
                );
            }
        }
    }
}
