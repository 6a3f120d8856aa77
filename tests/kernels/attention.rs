//! Attention compared with the oracle: shapes, lengths, types, layouts, logits.

use crate::common::attention::{Case, Options, Shape, kv_types, random_bias};
use crate::common::{Layout, Place, Rng, scaled, thin};
use crate::harness::{Level, tests};
use kvlane::{DType, Op};

tests! {
    levels: head_sizes, value_sizes, groups, lengths, chunk_boundaries, query_counts, types, layouts, logits;
    once:;
}

/// Runs a case and checks it against the kernel's bound.
#[track_caller]
pub fn check(level: &Level, case: &Case, what: impl Fn() -> String) {
    let outcome = case.run(&level.context);
    level.checked(Op::Attention, case.k.dtype, case.v.dtype);
    case.assert_close(&level.context, &outcome, &what);
}

/// Sizes with every tail of every vector width: all small sizes, those around multiples of 16, some odd ones.
pub fn head_size_list() -> Vec<usize> {
    let mut sizes: Vec<usize> = (1..=34).collect();
    for n in (48..=256).step_by(16) {
        sizes.extend([n - 3, n - 1, n, n + 1]);
    }
    sizes.retain(|&n| n <= 256);
    sizes.extend([288, 320, 333, 511, 512, 576, 1009, 1024]);
    sizes
}

fn head_sizes(level: &Level) {
    let mut rng = Rng::new(1);
    for dtype in kv_types() {
        for dim in thin(head_size_list()) {
            for (tokens, group) in [(1, 1), (1, 3), (13, 1)] {
                let shape = Shape { tokens, group, kv_heads: 2, keys: 67, dim, v_dim: dim, ..Shape::default() };
                let case = Case::new(&mut rng, shape, dtype).with(|o| o.causal = true);
                check(level, &case, || format!("{dtype} {shape:?}"));
            }
        }
    }
}

fn value_sizes(level: &Level) {
    let mut rng = Rng::new(2);
    for dtype in kv_types() {
        for (dim, v_dim) in thin(vec![
            (192, 128),
            (1, 7),
            (7, 1),
            (64, 65),
            (80, 512),
            (512, 3),
            (576, 512),
            (1000, 1),
            (3, 1024),
            (33, 31),
        ]) {
            for tokens in [1, 5, 20] {
                let shape = Shape { tokens, group: 2, keys: 130, dim, v_dim, ..Shape::default() };
                let case = Case::new(&mut rng, shape, dtype).with(|o| o.causal = true);
                check(level, &case, || format!("{dtype} {shape:?}"));
            }
        }
    }
}

fn groups(level: &Level) {
    let mut rng = Rng::new(3);
    for dtype in kv_types() {
        for group in thin(vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 71, 130]) {
            for (tokens, kv_heads) in [(1, 3), (3, 1)] {
                let shape = Shape { batch: 2, tokens, kv_heads, group, keys: 66, dim: 20, v_dim: 20 };
                let case = Case::new(&mut rng, shape, dtype);
                check(level, &case, || format!("{dtype} {shape:?}"));
            }
        }
    }
}

fn lengths(level: &Level) {
    let mut rng = Rng::new(4);
    for dtype in kv_types() {
        for length in thin((0..=3 * 64 + 1).collect()) {
            let tokens = [1, 2, 13][length % 3];
            // The cache has more slots than the length; those beyond it are poison.
            let shape = Shape { tokens, group: 2, keys: 200, dim: 24, v_dim: 24, ..Shape::default() };
            let mut case = Case::new(&mut rng, shape, dtype).with(|o| {
                o.causal = length % 2 == 0;
                o.lengths = Some(vec![length as i32]);
            });
            for s in length..200 {
                case.k.poison_token(0, s);
                case.v.poison_token(0, s);
            }
            check(level, &case, || format!("{dtype} length {length} {shape:?}"));
        }
    }
}

fn chunk_boundaries(level: &Level) {
    let mut rng = Rng::new(5);
    for dtype in kv_types() {
        for keys in thin(vec![1023, 1024, 1025, 1087, 2047, 2048, 2049, 2112, 3073]) {
            for tokens in [1, 4] {
                let shape = Shape { tokens, group: 3, keys, dim: 16, v_dim: 24, ..Shape::default() };
                let case = Case::new(&mut rng, shape, dtype).with(|o| o.causal = true);
                check(level, &case, || format!("{dtype} {shape:?}"));
            }
        }
    }
}

/// Row counts around the switch from the direct to the packed path (12), the register tile (6) and the tile (128).
fn query_counts(level: &Level) {
    let mut rng = Rng::new(6);
    for dtype in kv_types() {
        for tokens in thin(vec![
            1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 17, 18, 19, 23, 64, 65, 127, 128, 129, 131, 200, 257,
        ]) {
            let shape = Shape { tokens, keys: tokens + 3, dim: 16, v_dim: 16, ..Shape::default() };
            let case = Case::new(&mut rng, shape, dtype).with(|o| o.causal = true);
            check(level, &case, || format!("{dtype} {shape:?}"));
        }
    }
}

/// Every type of queries and output with every type of K and V.
fn types(level: &Level) {
    let mut rng = Rng::new(7);
    for kv in kv_types() {
        for q in DType::ALL {
            for out in DType::ALL {
                for dim in thin(vec![5, 16, 40]) {
                    let shape = Shape { tokens: 14, group: 2, dim, v_dim: dim, ..Shape::default() };
                    let mut case = Case::new(&mut rng, shape, kv).with(|o| o.causal = true);
                    case.q = case.q.cast(q);
                    case.out_dtype = out;
                    check(level, &case, || format!("q {q} kv {kv} out {out} {shape:?}"));
                }
            }
        }
    }
}

/// Every order of axes, adjacent to pages without access, with poison in the gaps.
fn layouts(level: &Level) {
    let mut rng = Rng::new(8);
    for dtype in kv_types() {
        for place in [Place::GuardAfter, Place::GuardBefore] {
            for layout in thin(Layout::ALL.to_vec()) {
                for (tokens, dim, keys) in [(1, 20, 70), (15, 33, 65), (2, 16, 3), (2, 64, 128)] {
                    let shape = Shape { batch: 2, tokens, kv_heads: 2, group: 2, keys, dim, v_dim: dim + 1 };
                    let plain = Case::new(&mut rng, shape, dtype);
                    let options = Options {
                        causal: true,
                        bias: Some(random_bias(
                            &mut rng,
                            dtype,
                            shape.scores(),
                            layout.strides(shape.scores()),
                            place,
                            0.1,
                        )),
                        ..Options::default()
                    };
                    let mut case = plain.moved([layout; 4], place, options);
                    case.out_dtype = dtype;
                    check(level, &case, || format!("{dtype} {place:?} {layout:?} {shape:?}"));
                }
            }
        }
    }
}

/// Logits that are hard for an online softmax. Every logit is exact in f32.
fn logits(level: &Level) {
    let mut rng = Rng::new(9);
    const KEYS: usize = 1100;
    type Logit = fn(usize) -> f32;
    let kinds: [(&str, Logit); 10] = [
        ("growing", |j| (j / 8) as f32),
        ("shrinking", |j| -((j / 8) as f32)),
        ("growing fast", |j| (j / 64) as f32 * 128.0),
        ("shrinking fast", |j| (j / 64) as f32 * -128.0),
        ("+-10000", |j| if j.is_multiple_of(2) { 9984.0 } else { -9984.0 }),
        ("all equal", |_| 3.0),
        ("all equal and huge", |_| -9984.0),
        ("one outlier", |j| if j == 777 { 4096.0 } else { 0.0 }),
        ("an outlier at the start", |j| if j == 0 { 100.0 } else { 99.0 }),
        ("an outlier at the end", |j| if j == KEYS - 1 { 60.0 } else { -60.0 }),
    ];
    for dtype in kv_types() {
        for (name, logit) in thin(kinds.to_vec()) {
            for tokens in thin(vec![1, 13]) {
                for softcap in [None, Some(30.0)] {
                    let shape = Shape { tokens, keys: KEYS, dim: 3, v_dim: 9, ..Shape::default() };
                    let mut case = Case::new(&mut rng, shape, dtype);
                    case.q.fill(|at| if at[3] == 1 { 1.0 } else { 0.0 });
                    case.k.fill(|at| if at[3] == 1 { logit(at[1]) } else { 0.0 });
                    case.options.scale = Some(1.0);
                    case.options.softcap = softcap;
                    case.options.causal = tokens > 1;
                    check(level, &case, || format!("{dtype} {name} {tokens} tokens softcap {softcap:?}"));
                }
            }
        }
    }
    // Large logits with rounding errors: the bound grows with their magnitude.
    for dtype in kv_types() {
        for _ in 0..scaled(6) {
            let shape = Shape { tokens: 3, keys: 200, ..Shape::default() };
            let mut case = Case::new(&mut rng, shape, dtype);
            case.options.scale = Some([10.0, 100.0, -100.0][rng.below(3)]);
            check(level, &case, || format!("{dtype} scale {:?}", case.options.scale));
        }
    }
}
