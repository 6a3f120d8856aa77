//! RMS norm, alone and fused with RoPE and the cache write.

use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, close, half_ulp, oracle, scaled, thin};
use crate::harness::{Level, tests};
use kvlane::{
    Context, DType, Destination, Isa, KvWrite, Layout as Slots, MAX_ROTARY_DIM, Op, Packing, Pairing, Positions,
    RmsNorm, Rope, RopeFrequencies, RopeScaling, Serial, kv_write, rms_norm, rms_norm_in_place, rms_norm_rope,
    rms_norm_rope_in_place, rope,
};

tests! {
    levels: types_and_layouts, head_sizes, magnitudes, in_place, poison_stays_in_its_head, fused_with_rope,
        fused_with_rope_in_place, fused_with_write;
    once: levels_agree, every_token_alone;
}

const PAIRINGS: [Pairing; 2] = [Pairing::Interleaved, Pairing::HalfSplit];

fn weights(rng: &mut Rng, dim: usize) -> Vec<f32> {
    (0..dim).map(|_| 1.0 + 0.5 * rng.f32()).collect()
}

/// Normalises `x` into another tensor and checks every element against the kernel's bound.
#[track_caller]
fn check(level: &Level, x: &Tensor, mut y: Tensor, norm: &RmsNorm, what: &str) {
    rms_norm(&level.context, &Serial, x.view(), y.view_mut(), norm).expect("a valid call");
    let bound = level.checked(Op::RmsNorm, x.dtype, y.dtype);
    let want = oracle::rms_norm(&x.array(), norm.weight, norm.eps.into());
    for (at, &want) in indices(x.shape).zip(&want.data) {
        let allowed = bound * want.abs();
        let allowed = allowed + half_ulp(y.dtype, want.abs() + allowed);
        close(y.get(at).into(), want, allowed, || format!("{what} {at:?}"));
    }
    y.assert_gaps();
}

fn types_and_layouts(level: &Level) {
    let mut rng = Rng::new(80);
    let weight = weights(&mut rng, 29);
    for src in DType::ALL {
        for dst in DType::ALL {
            for place in [Place::GuardAfter, Place::GuardBefore] {
                for (i, layout) in Layout::ALL.into_iter().enumerate() {
                    let x = Tensor::random(&mut rng, src, [2, 3, 2, 29], layout, place);
                    let y = Tensor::output(dst, x.shape, Layout::ALL[(i * 3 + 1) % 7], place);
                    let mut norm = RmsNorm::new([1e-6, 1e-5, 0.0][i % 3]);
                    norm.weight = (i % 2 == 0).then_some(&weight);
                    check(level, &x, y, &norm, &format!("{src} {dst} {layout:?}"));
                }
            }
        }
    }
}

fn head_sizes(level: &Level) {
    let mut rng = Rng::new(81);
    for dim in thin((1..=70).chain([127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 5000]).collect()) {
        let weight = weights(&mut rng, dim);
        for layout in [Layout::BSHD, Layout::STEP2] {
            let src = rng.pick(&DType::ALL);
            let x = Tensor::random(&mut rng, src, [1, 3, 2, dim], layout, Place::GuardAfter);
            let y = Tensor::output(DType::F32, x.shape, layout, Place::GuardAfter);
            check(level, &x, y, &RmsNorm::new(1e-5).weight(&weight), &format!("{src} {dim}"));
        }
    }
}

/// The squares exceed the range of f32, the result does not.
fn magnitudes(level: &Level) {
    let mut rng = Rng::new(82);
    for factor in [1e-30f32, 1e-20, 1e20, 1e30] {
        let mut x = Tensor::random(&mut rng, DType::F32, [1, 2, 2, 40], Layout::BSHD, Place::Heap);
        let plain = x.to(Layout::BSHD, Place::Heap);
        x.fill(|at| plain.get(at) * factor);
        let y = Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap);
        check(level, &x, y, &RmsNorm::new(0.0), &format!("{factor:e}"));
    }
    // Zeros stay zeros with an eps, and are 0 / 0 without.
    let mut x = Tensor::input(DType::F32, [1, 1, 1, 20], Layout::BSHD, Place::Heap);
    x.fill(|_| 0.0);
    let mut y = Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap);
    for (eps, wanted) in [(1e-6, Some(0.0)), (0.0, None)] {
        rms_norm(&level.context, &Serial, x.view(), y.view_mut(), &RmsNorm::new(eps)).unwrap();
        assert!(indices(x.shape).all(|at| wanted.map_or(y.get(at).is_nan(), |wanted: f32| y.get(at) == wanted)));
    }
}

fn normed(level: &Level, x: &Tensor, dtype: DType, norm: &RmsNorm) -> Tensor {
    let mut y = Tensor::output(dtype, x.shape, Layout::BSHD, Place::Heap);
    rms_norm(&level.context, &Serial, x.view(), y.view_mut(), norm).expect("a valid call");
    level.checked(Op::RmsNorm, x.dtype, dtype);
    y
}

/// The result that fused calls must equal: norm to f32, then RoPE.
fn apart(level: &Level, x: &Tensor, dtype: DType, norm: &RmsNorm, options: &Rope) -> Tensor {
    let between = normed(level, x, DType::F32, norm);
    let mut y = Tensor::output(dtype, x.shape, Layout::BSHD, Place::Heap);
    rope(&level.context, &Serial, between.view(), y.view_mut(), options).expect("a valid call");
    level.checked(Op::Rope, DType::F32, dtype);
    y
}

fn in_place(level: &Level) {
    let mut rng = Rng::new(83);
    for dtype in DType::ALL {
        for dim in [64, 29, 600] {
            let weight = weights(&mut rng, dim);
            let norm = RmsNorm::new(1e-6).weight(&weight);
            for layout in Layout::ALL {
                let x = Tensor::random(&mut rng, dtype, [2, 3, 2, dim], Layout::BSHD, Place::Heap);
                let want = normed(level, &x, dtype, &norm);
                let mut y = Tensor::output(dtype, x.shape, layout, Place::GuardAfter);
                indices(x.shape).for_each(|at| y.set_element_bits(at, x.bits(at)));
                rms_norm_in_place(&level.context, &Serial, y.view_mut(), &norm).expect("a valid call");
                assert_eq!(y.all_bits(), want.all_bits(), "{dtype} {dim} {layout:?}");
                y.assert_gaps();
            }
        }
    }
}

fn poison_stays_in_its_head(level: &Level) {
    let mut rng = Rng::new(84);
    for dtype in DType::ALL {
        let mut x = Tensor::random(&mut rng, dtype, [1, 2, 3, 37], Layout::BSHD, Place::Heap);
        let norm = RmsNorm::new(1e-6);
        let want = normed(level, &x, dtype, &norm);
        x.set([0, 1, 1, 36], f32::NAN);
        x.set([0, 0, 2, 3], f32::INFINITY);
        let y = normed(level, &x, dtype, &norm);
        for at in indices(x.shape) {
            match (at[1], at[2], at[3]) {
                (1, 1, _) | (0, 2, 3) => assert!(y.get(at).is_nan(), "{at:?}"),
                (0, 2, _) => assert_eq!(y.get(at), 0.0, "{at:?}"),
                _ => assert_eq!(y.bits(at), want.bits(at), "{at:?}"),
            }
        }
    }
}

/// Head sizes, rotary sizes and head counts, below and above the number of elements that the stack buffer holds.
const FUSED: [(usize, usize, usize); 8] =
    [(64, 64, 3), (29, 26, 5), (33, 2, 2), (128, 64, 20), (600, 598, 2), (1, 0, 3), (1030, 1030, 2), (4096, 4096, 2)];

fn fused_with_rope(level: &Level) {
    let mut rng = Rng::new(85);
    assert_eq!(FUSED[7].0, MAX_ROTARY_DIM);
    for src in DType::ALL {
        for dst in DType::ALL {
            for (dim, rotary_dim, heads) in thin(FUSED.to_vec()) {
                if rotary_dim == 0 {
                    continue;
                }
                let f = RopeFrequencies::new(rotary_dim, 10_000.0, &RopeScaling::None).unwrap();
                let weight = weights(&mut rng, dim);
                for pairing in PAIRINGS {
                    let mut norm = RmsNorm::new(1e-6);
                    norm.weight = rng.chance(0.7).then_some(&weight);
                    let positions = Positions::Offsets(&[7, 100]);
                    let options = Rope::new(pairing, rotary_dim, &f, positions);
                    let (from, to) = (Layout::random(&mut rng), Layout::random(&mut rng));
                    let x = Tensor::random(&mut rng, src, [2, 2, heads, dim], from, Place::GuardAfter);
                    let want = apart(level, &x, dst, &norm, &options);
                    let mut y = Tensor::output(dst, x.shape, to, Place::GuardBefore);
                    rms_norm_rope(&level.context, &Serial, x.view(), y.view_mut(), &norm, &options)
                        .expect("a valid call");
                    level.checked(Op::RmsNorm, src, DType::F32);
                    level.checked(Op::Rope, DType::F32, dst);
                    assert!(y.all_bits() == want.all_bits(), "{src} {dst} {rotary_dim} of {dim} {pairing:?} {from:?}");
                    y.assert_gaps();
                }
            }
        }
    }
}

fn fused_with_rope_in_place(level: &Level) {
    let mut rng = Rng::new(86);
    for dtype in DType::ALL {
        for (dim, rotary_dim) in [(64, 64), (29, 26), (600, 598)] {
            let f = RopeFrequencies::new(rotary_dim, 10_000.0, &RopeScaling::None).unwrap();
            let weight = weights(&mut rng, dim);
            let norm = RmsNorm::new(1e-5).weight(&weight);
            for pairing in PAIRINGS {
                for layout in thin(Layout::ALL.to_vec()) {
                    let positions = Positions::Offsets(&[3, 70]);
                    let options = Rope::new(pairing, rotary_dim, &f, positions);
                    let x = Tensor::random(&mut rng, dtype, [2, 3, 2, dim], Layout::BSHD, Place::Heap);
                    let want = apart(level, &x, dtype, &norm, &options);
                    let mut y = x.to(layout, Place::GuardAfter);
                    rms_norm_rope_in_place(&level.context, &Serial, y.view_mut(), &norm, &options)
                        .expect("a valid call");
                    assert!(y.all_bits() == want.all_bits(), "{dtype} {dim} {pairing:?} {layout:?}");
                    y.assert_gaps();
                }
            }
        }
    }
}

/// Keys that are normalised, and optionally rotated, on their way into a cache of any layout have the bits of the
/// separate steps.
fn fused_with_write(level: &Level) {
    let mut rng = Rng::new(87);
    let f = RopeFrequencies::new(20, 10_000.0, &RopeScaling::None).unwrap();
    let pages = [2, 5, 0, 3, 1, 4];
    let layouts: [(Slots, [usize; 2]); 4] = [
        (Slots::Contiguous, [2, 10]),
        (Slots::ring(2), [2, 6]),
        (Slots::paged(&pages, 3), [6, 4]),
        (Slots::ragged(&[2, 12, 24]), [1, 24]),
    ];
    for src in DType::ALL {
        for dst in DType::ALL {
            for pairing in PAIRINGS {
                for (layout, [rows, slots]) in layouts {
                    let weight = weights(&mut rng, 23);
                    let norm = RmsNorm::new(1e-6).weight(&weight);
                    let places = [(); 3].map(|()| Layout::random(&mut rng));
                    let k = Tensor::random(&mut rng, src, [2, 4, 3, 23], places[0], Place::GuardAfter);
                    let v = Tensor::random(&mut rng, src, [2, 4, 3, 11], Layout::BSHD, Place::GuardAfter);
                    let positions = Positions::Explicit(&[4, 5, 6, 7, 0, 1, 2, 3]);
                    let options = Rope::new(pairing, 20, &f, positions);
                    let packing = rng.pick(&Packing::ALL);
                    let values = match packing {
                        Packing::RowPairs => [rows, slots / 2, 3, 22],
                        _ => [rows, slots, 3, 11],
                    };
                    for turn in [None, Some(options)] {
                        let mut k_cache = Tensor::output(dst, [rows, slots, 3, 23], places[1], Place::GuardBefore);
                        let mut v_cache = Tensor::output(dst, values, places[2], Place::GuardBefore);
                        let to = Destination::positions(&[4, 0]).counts(&[4, 3]).layout(layout);
                        let mut write = KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to)
                            .k_norm(norm)
                            .v_packing(packing);
                        write.rope = turn;
                        kv_write(&level.context, &Serial, write).expect("a valid write");
                        let want = match &turn {
                            None => normed(level, &k, dst, &norm),
                            Some(options) => apart(level, &k, dst, &norm, options),
                        };
                        let written = crate::write::written(&to, 2, 4, slots);
                        assert_eq!(written.len(), 7);
                        let untouched = Tensor::output(dst, [1; 4], Layout::BSHD, Place::Heap).bits([0; 4]);
                        for at in indices(k_cache.shape) {
                            let wanted = match written.get(&(at[0], at[1])) {
                                Some(&(b, t)) => want.bits([b, t, at[2], at[3]]),
                                None => untouched,
                            };
                            assert_eq!(k_cache.bits(at), wanted, "{src} {dst} {pairing:?} {layout:?} {at:?}");
                        }
                        for at in indices(v_cache.shape) {
                            let (slot, d) = match packing {
                                Packing::RowPairs => (2 * at[1] + at[3] % 2, at[3] / 2),
                                _ => (at[1], at[3]),
                            };
                            match written.get(&(at[0], slot)) {
                                Some(&(b, t)) => crate::write::assert_element(&v, [b, t, at[2], d], &v_cache, at),
                                None => assert_eq!(v_cache.bits(at), untouched, "{at:?}"),
                            }
                        }
                        k_cache.assert_gaps();
                        v_cache.assert_gaps();
                    }
                }
            }
        }
    }
}

/// The sum has a fixed order, without multiply-adds, so that every level computes the same bits.
fn levels_agree() {
    let mut rng = Rng::new(88);
    let contexts: Vec<Context> =
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(|isa| Context::with_max_isa(isa).unwrap()).collect();
    for _ in 0..scaled(60) {
        let (src, dst) = (rng.pick(&DType::ALL), rng.pick(&DType::ALL));
        let dim = rng.between(1, 300);
        let weight = weights(&mut rng, dim);
        let layout = Layout::random(&mut rng);
        let x = Tensor::random(&mut rng, src, [1, 3, 2, dim], layout, Place::GuardAfter);
        let bits: Vec<Vec<u32>> = contexts
            .iter()
            .map(|context| {
                let mut y = Tensor::output(dst, x.shape, Layout::BSHD, Place::GuardAfter);
                let norm = RmsNorm::new(1e-6).weight(&weight);
                rms_norm(context, &Serial, x.view(), y.view_mut(), &norm).unwrap();
                y.all_bits()
            })
            .collect();
        assert!(bits.iter().all(|b| *b == bits[0]), "{src} {dst} {dim} {layout:?}");
    }
}

/// A token has the bits that it has alone, on any number of threads.
fn every_token_alone() {
    let mut rng = Rng::new(89);
    let context = Context::new().unwrap();
    let weight = weights(&mut rng, 64);
    let norm = RmsNorm::new(1e-6).weight(&weight);
    let x = Tensor::random(&mut rng, DType::F32, [2, 300, 4, 64], Layout::BHSD, Place::Heap);
    let mut all = Tensor::output(DType::Bf16, x.shape, Layout::BSHD, Place::Heap);
    rms_norm(&context, &crate::common::runners::Threads(3), x.view(), all.view_mut(), &norm).unwrap();
    for (b, t) in [(0, 0), (0, 299), (1, 17)] {
        let one = x.cut(b..b + 1, t..t + 1, Layout::PADDED);
        let mut y = Tensor::output(DType::Bf16, one.shape, Layout::STEP2, Place::Heap);
        rms_norm(&context, &Serial, one.view(), y.view_mut(), &norm).unwrap();
        for at in indices(one.shape) {
            assert_eq!(y.bits(at), all.bits([b, t, at[2], at[3]]));
        }
    }
}
