//! Properties over combinations of all options; a failing case is shrunk to a small seed and shape.

use crate::attention::check;
use crate::common::attention::{Case, Shape, kv_types};
use crate::common::runners::Threads;
use crate::common::{Rng, scaled};
use crate::harness::{Level, tests};
use crate::semantics::{random_case, visible};
use kvlane::alibi_slopes;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

tests! {
    levels: any_call_is_close, a_mask_is_what_it_replaces, any_shape_is_close;
    once:;
}

#[track_caller]
fn property<S: Strategy>(cases: usize, strategy: S, test: impl Fn(S::Value)) {
    let config = Config { cases: scaled(cases) as u32, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new_with_rng(
        config.clone(),
        proptest::test_runner::TestRng::deterministic_rng(config.rng_algorithm),
    )
    .run(&strategy, |value| {
        test(value);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Any shapes, strides, types, masks and options: within the bound, on any number of threads, without writing outside
/// the output or touching a guard page.
fn any_call_is_close(level: &Level) {
    property(250, any::<u64>(), |seed| {
        let (case, what) = random_case(&mut Rng::new(seed));
        check(level, &case, || format!("seed {seed}: {what}"));
        let split = case.run_with(&level.context, &Threads(2)).expect("a valid call");
        assert!(split.all_bits() == case.run(&level.context).all_bits(), "seed {seed}: {what}");
    });
}

/// Length, first key, causality and windows have the bits of a boolean mask with the same definition.
fn a_mask_is_what_it_replaces(level: &Level) {
    property(150, any::<u64>(), |seed| {
        let (case, what) = random_case(&mut Rng::new(seed));
        let want = case.run(&level.context).all_bits();
        let shape = [case.q.shape[0], case.q.shape[1], case.q.shape[2], case.k.shape[1]];
        let strides = crate::common::Layout::BSHD.strides(shape);
        let mask = crate::common::attention::MaskTensor::new(shape, strides, crate::common::Place::Heap, |at| {
            visible(&case, at)
        });
        let mut masked = case;
        // ALiBi uses positions, which come from lengths and offsets.
        let length = |b: usize| masked.options.lengths.as_ref().map_or(shape[3] as i32, |l| l[b]);
        let offsets = (0..shape[0])
            .map(|b| masked.options.offsets.as_ref().map_or(length(b) - shape[1] as i32, |o| o[b]))
            .collect();
        let options = &mut masked.options;
        (options.offsets, options.mask) = (Some(offsets), Some(mask));
        (options.lengths, options.kv_starts, options.causal) = (None, None, false);
        (options.window_left, options.window_right, options.prefix_lengths, options.bit_mask) =
            (None, None, None, None);
        let got = masked.run(&level.context).all_bits();
        assert!(got == want, "seed {seed}: {what}");
    });
}

fn any_shape_is_close(level: &Level) {
    let shapes = (1..3usize, 1..30usize, 1..3usize, 1..9usize, 0..140usize, 1..140usize, 1..140usize, 0..3usize);
    property(250, shapes, |(batch, tokens, kv_heads, group, keys, dim, v_dim, dtype)| {
        let shape = Shape { batch, tokens, kv_heads, group, keys, dim, v_dim };
        let dtype = kv_types()[dtype % kv_types().len()];
        let case = Case::new(&mut Rng::new(keys as u64), shape, dtype).with(|o| {
            o.causal = tokens % 2 == 0;
            o.alibi = (dim % 3 == 0).then(|| alibi_slopes(kv_heads * group));
        });
        check(level, &case, || format!("{dtype} {shape:?}"));
    });
}
