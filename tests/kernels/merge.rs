//! Merging attention states.

use crate::common::attention::{Case, Shape};
use crate::common::tensor::Array;
use crate::common::{Layout, Place, Rng, Tensor, close, half_ulp, oracle, scaled};
use crate::harness::{Level, tests};
use kvlane::{AttentionState, DType, MAX_STATES, Op, Serial, merge_states};

tests! {
    levels: random_states, two_empty_states, an_empty_state_is_not_read, one_state_is_itself, many_states,
        parts_of_the_keys_make_the_whole, live_nan_propagates, extreme_weights;
    once:;
}

struct States {
    outs: Vec<Tensor>,
    lses: Vec<Vec<f32>>,
}

impl States {
    fn random(rng: &mut Rng, n: usize, dtype: DType, shape: [usize; 4], place: Place) -> Self {
        let rows = shape[..3].iter().product();
        let mut states = Self { outs: Vec::new(), lses: Vec::new() };
        for _ in 0..n {
            let layout = Layout::random(rng);
            states.outs.push(Tensor::random(rng, dtype, shape, layout, place));
            states.lses.push((0..rows).map(|_| 5.0 * rng.f32()).collect());
        }
        states
    }

    fn run(&self, level: &Level, out: &mut Tensor) -> Vec<f32> {
        let states: Vec<AttentionState> =
            self.outs.iter().zip(&self.lses).map(|(out, lse)| AttentionState::new(out.view(), lse)).collect();
        let mut lse = vec![f32::NAN; self.lses[0].len()];
        merge_states(&level.context, &Serial, &states, out.view_mut(), Some(&mut lse)).expect("valid states");
        out.assert_gaps();
        lse
    }

    #[track_caller]
    fn check(&self, level: &Level, layout: Layout, place: Place) -> (Tensor, Vec<f32>) {
        let first = &self.outs[0];
        let mut out = Tensor::output(first.dtype, first.shape, layout, place);
        let lse = self.run(level, &mut out);
        let bound = level.checked(Op::MergeStates, out.dtype, out.dtype);
        let arrays: Vec<(Array, Vec<f64>)> = self
            .outs
            .iter()
            .zip(&self.lses)
            .map(|(out, lse)| (out.array(), lse.iter().map(|&x| x.into()).collect()))
            .collect();
        let (want, want_lse) = oracle::merge(&arrays);
        let largest = arrays.iter().flat_map(|a| &a.0.data).filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
        let got = out.array();
        for (i, (&got, &want)) in got.data.iter().zip(&want.data).enumerate() {
            let allowed = bound * largest;
            let allowed = allowed + half_ulp(out.dtype, want.abs() + allowed);
            close(got, want, allowed, || format!("{} states of {}, element {i}", self.outs.len(), out.dtype));
        }
        for (&got, &want) in lse.iter().zip(&want_lse) {
            close(got.into(), want, 1e-7 * (1.0 + want.abs()), || "the joint LSE".into());
        }
        (out, lse)
    }
}

fn random_states(level: &Level) {
    let mut rng = Rng::new(40);
    for dtype in DType::ALL {
        for _ in 0..scaled(60) {
            let shape = [rng.between(1, 2), rng.between(1, 20), rng.between(1, 3), rng.between(1, 70)];
            let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
            let n = rng.between(1, 6);
            let states = States::random(&mut rng, n, dtype, shape, place);
            states.check(level, Layout::random(&mut rng), place);
        }
    }
}

fn two_empty_states(level: &Level) {
    for dtype in DType::ALL {
        let mut states = States::random(&mut Rng::new(41), 2, dtype, [1, 3, 2, 19], Place::Heap);
        for (out, lse) in states.outs.iter_mut().zip(&mut states.lses) {
            lse.fill(f32::NEG_INFINITY);
            // The output of an empty state can be anything.
            (0..3).for_each(|t| out.poison_token(0, t));
        }
        let mut out = Tensor::output(dtype, [1, 3, 2, 19], Layout::PADDED, Place::Heap);
        let lse = states.run(level, &mut out);
        level.checked(Op::MergeStates, dtype, dtype);
        assert!(out.all_bits().iter().all(|&bits| bits == 0), "the empty state's output is +0");
        assert!(lse.iter().all(|&x| x == f32::NEG_INFINITY), "the empty state's LSE is -inf");
    }
}

fn an_empty_state_is_not_read(level: &Level) {
    for dtype in DType::ALL {
        let shape = [1, 20, 2, 33];
        let mut states = States::random(&mut Rng::new(42), 3, dtype, shape, Place::Heap);
        // State 1 is empty for every other token; state 2 for all.
        for t in (0..20).step_by(2) {
            states.outs[1].poison_token(0, t);
            states.lses[1][2 * t..2 * t + 2].fill(f32::NEG_INFINITY);
        }
        (0..20).for_each(|t| states.outs[2].poison_token(0, t));
        states.lses[2].fill(f32::NEG_INFINITY);
        let (out, _) = states.check(level, Layout::BSHD, Place::Heap);
        assert!(out.array().data.iter().all(|x| x.is_finite()));
    }
}

fn one_state_is_itself(level: &Level) {
    for dtype in DType::ALL {
        let states = States::random(&mut Rng::new(43), 1, dtype, [2, 2, 2, 21], Place::Heap);
        let (out, lse) = states.check(level, Layout::BHSD, Place::Heap);
        assert_eq!(out.all_bits(), states.outs[0].all_bits());
        assert_eq!(lse, states.lses[0]);
    }
}

fn many_states(level: &Level) {
    let states = States::random(&mut Rng::new(44), MAX_STATES, DType::F32, [1, 2, 1, 8], Place::Heap);
    states.check(level, Layout::BSHD, Place::Heap);
}

/// Merged attention over parts of the keys equals attention over all keys.
fn parts_of_the_keys_make_the_whole(level: &Level) {
    let mut rng = Rng::new(45);
    for dtype in DType::ALL {
        let shape = Shape { batch: 2, tokens: 3, kv_heads: 2, group: 2, keys: 150, dim: 32, v_dim: 24 };
        let whole = Case::new(&mut rng, shape, dtype);
        let mut states = States { outs: Vec::new(), lses: Vec::new() };
        // The third part is empty.
        for piece in [0..40, 40..150, 150..150, 7..7] {
            let mut part = Case::new(&mut rng, shape, dtype);
            part.q = whole.q.to(Layout::BSHD, Place::Heap);
            part.k = whole.k.cut(0..2, piece.clone(), Layout::BSHD);
            part.v = whole.v.cut(0..2, piece, Layout::BSHD);
            let outcome = part.run(&level.context);
            states.outs.push(outcome.out);
            states.lses.push(outcome.lse);
        }
        let mut out = Tensor::output(DType::F32, [2, 3, 4, 24], Layout::BSHD, Place::Heap);
        let lse = states.run(level, &mut out);
        level.checked(Op::MergeStates, DType::F32, DType::F32);
        let outcome = crate::common::attention::Outcome { out, lse };
        whole.assert_close(&level.context, &outcome, &|| format!("{dtype} pieces"));
    }
}

fn live_nan_propagates(level: &Level) {
    for in_lse in [false, true] {
        for which in 0..3 {
            let mut states = States::random(&mut Rng::new(46), 3, DType::F32, [1, 2, 1, 9], Place::Heap);
            if in_lse {
                states.lses[which][1] = f32::NAN;
            } else {
                states.outs[which].set([0, 1, 0, 8], f32::NAN);
            }
            let mut out = Tensor::output(DType::F32, [1, 2, 1, 9], Layout::BSHD, Place::Heap);
            let lse = states.run(level, &mut out);
            level.checked(Op::MergeStates, DType::F32, DType::F32);
            assert!(out.get([0, 1, 0, 8]).is_nan());
            assert_eq!(lse[1].is_nan(), in_lse);
            assert!(out.get([0, 0, 0, 8]).is_finite() && lse[0].is_finite());
        }
    }
}

fn extreme_weights(level: &Level) {
    let mut states = States::random(&mut Rng::new(47), 3, DType::F32, [1, 4, 1, 5], Place::Heap);
    states.lses = vec![vec![1e4, -1e4, 88.0, 3e38], vec![1e4, -1e4 + 1.0, -88.0, -3e38], vec![0.0, -2e4, 0.0, 0.0]];
    states.check(level, Layout::BSHD, Place::Heap);
}
