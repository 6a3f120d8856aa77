//! RoPE: the rotation, the angles, the scalings, and the fused write.

use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, close, half_ulp, oracle, scaled, thin};
use crate::harness::{Level, tests};
use half::bf16;
use kvlane::{
    Context, DType, Destination, Isa, KvWrite, Llama3Scaling, LongRopeScaling, Op, Pairing, Positions, Rope,
    RopeAngles, RopeFrequencies, RopeScaling, Serial, ViewMut, YarnScaling, kv_write, rope, rope_in_place,
};

tests! {
    levels: types_and_layouts, rotary_dims, positions, angles, angles_far_out, table_and_frequencies, in_place,
        fused_with_write, beyond_rotary_dim_is_copied,
        any_bits_of_bf16;
    once: goldens, llama3_by_wavelength, yarn_by_the_paper, ntk_and_linear, longrope_magnitude, levels_agree_on_angles,
        scaling_errors;
}

const PAIRINGS: [Pairing; 2] = [Pairing::Interleaved, Pairing::HalfSplit];

/// `f_i = base^(-2i / dim)`, from the definition.
fn plain(dim: usize, base: f64) -> Vec<f64> {
    (0..dim / 2).map(|i| (-2.0 * i as f64 / dim as f64 * base.ln()).exp()).collect()
}

fn frequencies(dim: usize, base: f64) -> RopeFrequencies {
    RopeFrequencies::new(dim, base, &RopeScaling::None).expect("plain frequencies")
}

/// Rotates `x` into another tensor and checks it against the kernel's bound.
#[track_caller]
fn check(
    level: &Level,
    x: &Tensor,
    mut y: Tensor,
    f: &RopeFrequencies,
    pairing: Pairing,
    positions: Positions,
    what: &str,
) {
    let options = Rope::new(pairing, f.rotary_dim(), f, positions);
    rope(&level.context, &Serial, x.view(), y.view_mut(), &options).expect("a valid call");
    let bound = level.checked(Op::Rope, x.dtype, y.dtype);
    let seq = x.shape[1];
    let position = |b: usize, t: usize| match positions {
        Positions::Offsets(o) => i64::from(o[b]) + t as i64,
        Positions::Explicit(p) => i64::from(p[b * seq + t]),
        _ => unreachable!("positions of another kind"),
    };
    let source = x.array();
    let want = oracle::rope(&source, pairing, f.inv_freq(), f.magnitude(), position);
    let largest = source.data.iter().fold(0f64, |m, x| m.max(x.abs())) * f.magnitude().abs().max(1.0);
    for (at, &want) in indices(x.shape).zip(&want.data) {
        let allowed = bound * largest;
        let allowed = allowed + half_ulp(y.dtype, want.abs() + allowed);
        close(y.get(at).into(), want, allowed, || format!("{what} {pairing:?} {at:?}"));
    }
    y.assert_gaps();
}

fn types_and_layouts(level: &Level) {
    let mut rng = Rng::new(50);
    let f = frequencies(26, 10_000.0);
    for src in DType::ALL {
        for dst in DType::ALL {
            for pairing in PAIRINGS {
                for place in [Place::GuardAfter, Place::GuardBefore] {
                    for (i, layout) in Layout::ALL.into_iter().enumerate() {
                        let x = Tensor::random(&mut rng, src, [2, 3, 2, 29], layout, place);
                        let y = Tensor::output(dst, x.shape, Layout::ALL[(i * 3 + 1) % 7], place);
                        let what = format!("{src} {dst} {layout:?}");
                        check(level, &x, y, &f, pairing, Positions::Offsets(&[7, 100]), &what);
                    }
                }
            }
        }
    }
}

fn rotary_dims(level: &Level) {
    let mut rng = Rng::new(51);
    let sizes = (2..=70).step_by(2).chain([96, 126, 128, 130, 192, 254, 256, 258, 510, 512, 514, 1026]);
    for rotary_dim in thin(sizes.collect()) {
        for rest in [0, 1, 17] {
            for pairing in PAIRINGS {
                let shape = [1, 3, 2, rotary_dim + rest];
                let f = frequencies(rotary_dim, 10_000.0);
                let x = Tensor::random(&mut rng, DType::F32, shape, Layout::BSHD, Place::GuardAfter);
                let y = Tensor::output(DType::F32, shape, Layout::BSHD, Place::GuardAfter);
                check(level, &x, y, &f, pairing, Positions::Offsets(&[1000]), &format!("{rotary_dim} of {shape:?}"));
            }
        }
    }
}

/// Heads whose elements lie together have a loop of their own, which must agree with that of others for every pattern.
fn any_bits_of_bf16(level: &Level) {
    let mut rng = Rng::new(58);
    for half in [15, 16, 32, 33, 48, 64, 130] {
        let (dim, heads) = (2 * half, 3);
        let shape = [1, 4, heads, dim];
        let elements = 4 * heads * dim;
        let x: Vec<bf16> = (0..elements)
            .map(|i| if i % 7 == 0 { bf16::from_bits(rng.u64() as u16) } else { bf16::from_f32(rng.f32()) })
            .collect();
        let [mut cos, mut sin] = [0, 1].map(|_| (0..4 * half).map(|_| rng.f32()).collect::<Vec<f32>>());
        // The rows of two tokens have what a rotation of numbers has not.
        cos[half + half / 2] = f32::from_bits(0x7fff_ffff);
        sin[2 * half] = f32::INFINITY;
        let options = Rope::new(Pairing::HalfSplit, dim, RopeAngles::table(&cos, &sin), Positions::Offsets(&[0]));
        let mut together = x.clone();
        let view = ViewMut::new(&mut together, shape).expect("a view");
        rope_in_place(&level.context, &Serial, view, &options).expect("a valid call");
        let mut apart = vec![bf16::ZERO; 2 * elements];
        apart.iter_mut().step_by(2).zip(&x).for_each(|(to, x)| *to = *x);
        let strides = [0, 2 * heads * dim, 2 * dim, 2].map(|n| n as i64);
        let view = ViewMut::strided(&mut apart, 0, shape, strides).expect("a view");
        rope_in_place(&level.context, &Serial, view, &options).expect("a valid call");
        level.checked(Op::Rope, DType::Bf16, DType::Bf16);
        for (i, (a, b)) in together.iter().zip(apart.iter().step_by(2)).enumerate() {
            // Which of two NaNs a product passes on is up to the compiler.
            assert!(
                a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
                "element {i} of {half} pairs: {a:?}, {b:?}"
            );
        }
    }
}

fn positions(level: &Level) {
    let mut rng = Rng::new(52);
    let f = frequencies(16, 500_000.0);
    let x = Tensor::random(&mut rng, DType::F32, [2, 3, 2, 16], Layout::BHSD, Place::Heap);
    for pairing in PAIRINGS {
        let all: [Positions; 5] = [
            Positions::Offsets(&[0, 4095]),
            Positions::Offsets(&[-5, 131_072]),
            // Beyond the integers that f32 represents.
            Positions::Offsets(&[16_777_217, i32::MAX - 2]),
            Positions::Explicit(&[5, 5, 5, 0, -1, 1_000_000]),
            Positions::Explicit(&[2, 1, 0, 9, 0, 9]),
        ];
        for positions in all {
            let y = Tensor::output(DType::F32, x.shape, Layout::BSHD, Place::Heap);
            check(level, &x, y, &f, pairing, positions, &format!("{positions:?}"));
        }
    }
}

fn angles(level: &Level) {
    for (dim, base) in [(2, 10_000.0), (64, 10_000.0), (128, 500_000.0), (80, 1e6), (10, 1.5)] {
        let f = frequencies(dim, base);
        let rows = 4096.min(scaled(4096).max(300));
        let (cos, sin) = f.table(&level.context, rows);
        let bound = level.checked(Op::RopeAngles, DType::F32, DType::F32);
        for position in 0..rows {
            for (i, frequency) in plain(dim, base).into_iter().enumerate() {
                let angle = position as f64 * frequency;
                let at = position * dim / 2 + i;
                close(cos[at].into(), angle.cos(), bound, || format!("cos at {position}, pair {i} of {dim}"));
                close(sin[at].into(), angle.sin(), bound, || format!("sin at {position}, pair {i} of {dim}"));
            }
        }
    }
}

/// The pairs (1, 0) become cosines and sines, at positions where an f32 angle would be noise.
fn angles_far_out(level: &Level) {
    let mut rng = Rng::new(53);
    for base in [10_000.0, 1e6] {
        let f = frequencies(64, base);
        let fixed = [1_000_000, 123_456_789, i32::MAX, i32::MIN, -1, 411_775];
        let positions: Vec<i32> = fixed.into_iter().chain((0..scaled(500)).map(|_| rng.u64() as i32)).collect();
        let mut x = Tensor::input(DType::F32, [1, positions.len(), 1, 64], Layout::BSHD, Place::Heap);
        x.fill(|at| f32::from(at[3] < 32));
        let options = Rope::new(Pairing::HalfSplit, 64, &f, Positions::Explicit(&positions));
        let y = run(level, &x, DType::F32, &options);
        let bound = level.checked(Op::RopeAngles, DType::F32, DType::F32);
        for (t, &position) in positions.iter().enumerate() {
            for (i, frequency) in f.inv_freq().iter().enumerate() {
                let angle = f64::from(position) * frequency;
                let what = |name: &str| format!("{name} at {position}, pair {i}, base {base}");
                close(y.get([0, t, 0, i]).into(), angle.cos(), bound, || what("cos"));
                close(y.get([0, t, 0, i + 32]).into(), angle.sin(), bound, || what("sin"));
            }
        }
    }
}

fn run(level: &Level, x: &Tensor, dtype: DType, options: &Rope) -> Tensor {
    let mut y = Tensor::output(dtype, x.shape, Layout::BSHD, Place::Heap);
    rope(&level.context, &Serial, x.view(), y.view_mut(), options).expect("a valid call");
    level.checked(Op::Rope, x.dtype, dtype);
    y
}

/// The library's table gives the bits of frequencies.
fn table_and_frequencies(level: &Level) {
    let mut rng = Rng::new(54);
    let f = RopeFrequencies::new(24, 10_000.0, &RopeScaling::Linear { factor: 3.0 }).unwrap();
    let (cos, sin) = f.table(&level.context, 50);
    for src in DType::ALL {
        for pairing in PAIRINGS {
            let x = Tensor::random(&mut rng, src, [2, 5, 2, 30], Layout::PADDED, Place::Heap);
            for positions in [Positions::Offsets(&[0, 45]), Positions::Explicit(&[9, 8, 49, 0, 0, 1, 2, 3, 4, 5])] {
                let by_angle = Rope::new(pairing, 24, &f, positions);
                let by_table = by_angle.angles(RopeAngles::table(&cos, &sin));
                assert_eq!(run(level, &x, src, &by_angle).all_bits(), run(level, &x, src, &by_table).all_bits());
            }
        }
    }
}

/// In place, in any order of axes: the bits of the copy.
fn in_place(level: &Level) {
    let mut rng = Rng::new(55);
    for dtype in DType::ALL {
        for (dim, rotary_dim) in [(64, 64), (29, 26), (33, 2), (600, 598)] {
            for pairing in PAIRINGS {
                for layout in Layout::ALL {
                    let f = frequencies(rotary_dim, 10_000.0);
                    let x = Tensor::random(&mut rng, dtype, [2, 3, 2, dim], Layout::BSHD, Place::Heap);
                    let positions = Positions::Offsets(&[3, 70]);
                    let options = Rope::new(pairing, rotary_dim, &f, positions);
                    let want = run(level, &x, dtype, &options);
                    let mut y = Tensor::output(dtype, x.shape, layout, Place::GuardAfter);
                    indices(x.shape).for_each(|at| y.set_element_bits(at, x.bits(at)));
                    rope_in_place(&level.context, &Serial, y.view_mut(), &options).expect("a valid call");
                    assert_eq!(y.all_bits(), want.all_bits(), "{dtype} {dim} {rotary_dim} {pairing:?} {layout:?}");
                    y.assert_gaps();
                }
            }
        }
    }
}

/// Rotating keys on their way into the cache gives the bits of rotating into the cache's type.
fn fused_with_write(level: &Level) {
    let mut rng = Rng::new(56);
    for src in DType::ALL {
        for dst in DType::ALL {
            for pairing in PAIRINGS {
                let f = frequencies(20, 10_000.0);
                let layout = Layout::random(&mut rng);
                let k = Tensor::random(&mut rng, src, [2, 4, 3, 23], layout, Place::GuardAfter);
                let v = Tensor::random(&mut rng, src, [2, 4, 3, 11], Layout::BSHD, Place::GuardAfter);
                let positions = Positions::Explicit(&[4, 5, 6, 7, 0, 1, 2, 3]);
                let options = Rope::new(pairing, 20, &f, positions);
                let rotated = run(level, &k, dst, &options);
                let layout = Layout::random(&mut rng);
                let mut k_cache = Tensor::output(dst, [2, 9, 3, 23], layout, Place::GuardBefore);
                let mut v_cache = Tensor::output(dst, [2, 9, 3, 11], Layout::BHSD, Place::GuardBefore);
                let to = Destination::positions(&[4, 0]).counts(&[4, 3]);
                kv_write(
                    &level.context,
                    &Serial,
                    KvWrite::new(k.view(), v.view(), k_cache.view_mut(), v_cache.view_mut(), to).rope(options),
                )
                .expect("a valid write");
                level.checked(Op::Rope, src, dst);
                level.checked(Op::KvWrite, src, dst);
                for at in indices(k.shape) {
                    let [b, t, h, d] = at;
                    let target = [b, t + [4, 0][b], h, d];
                    if b == 1 && t == 3 {
                        assert_ne!(k_cache.bits(target), rotated.bits(at), "beyond the row's count");
                        continue;
                    }
                    assert_eq!(k_cache.bits(target), rotated.bits(at), "{src} {dst} {pairing:?} {at:?}");
                    if d < 11 {
                        crate::write::assert_element(&v, at, &v_cache, target);
                    }
                }
                k_cache.assert_gaps();
                v_cache.assert_gaps();
            }
        }
    }
}

/// Elements beyond `rotary_dim` are copied as by a write, including NaN.
fn beyond_rotary_dim_is_copied(level: &Level) {
    let mut rng = Rng::new(57);
    for src in DType::ALL {
        for dst in DType::ALL {
            let f = frequencies(4, 10_000.0);
            let mut x = Tensor::random(&mut rng, src, [1, 2, 2, 40], Layout::BSHD, Place::Heap);
            x.set([0, 1, 1, 39], f32::NAN);
            x.set([0, 1, 0, 4], f32::NEG_INFINITY);
            let positions = Positions::Offsets(&[9]);
            let options = Rope::new(Pairing::HalfSplit, 4, &f, positions);
            let y = run(level, &x, dst, &options);
            for at in indices(x.shape).filter(|at| at[3] >= 4) {
                crate::write::assert_element(&x, at, &y, at);
            }
            // A NaN in a pair reaches both of its elements and no other.
            x.set([0, 0, 0, 1], f32::NAN);
            let z = run(level, &x, dst, &options);
            for d in 0..40 {
                let at = [0, 0, 0, d];
                assert_eq!(z.get(at).is_nan(), d == 1 || d == 3, "{at:?}");
                assert!(d == 1 || d == 3 || z.bits(at) == y.bits(at));
            }
        }
    }
}

fn levels_agree_on_angles() {
    let f = frequencies(128, 10_000.0);
    let tables: Vec<_> = Isa::ALL
        .into_iter()
        .filter(|isa| isa.is_available())
        .map(|isa| f.table(&Context::with_max_isa(isa).unwrap(), 3000))
        .collect();
    for (cos, sin) in &tables {
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!((bits(cos), bits(sin)), (bits(&tables[0].0), bits(&tables[0].1)));
    }
}

/// Values of Hugging Face transformers, recorded by `tests/data/make_rope_goldens.py`.
fn goldens() {
    let mut kinds = std::collections::BTreeMap::<&str, usize>::new();
    for line in include_str!("../data/rope_goldens.txt").lines().filter(|l| !l.starts_with('#')) {
        let (head, numbers) = line.split_once(" | ").expect("parameters | numbers");
        let mut head = head.split(' ');
        let kind = head.next().unwrap();
        let fields: Vec<(&str, &str)> = head.map(|field| field.split_once('=').unwrap()).collect();
        let text = |key: &str| fields.iter().find(|f| f.0 == key).map(|f| f.1);
        let number = |key: &str| text(key).map(|x| x.parse::<f64>().unwrap());
        let get = |key: &str| number(key).unwrap_or_else(|| panic!("{kind} has no {key}"));
        let scaling = match kind {
            "linear" => RopeScaling::Linear { factor: get("factor") },
            "ntk" => RopeScaling::Ntk { factor: get("factor") },
            "llama3" => Llama3Scaling::new(get("factor"), get("original"))
                .low_freq_factor(get("low"))
                .high_freq_factor(get("high"))
                .into(),
            "yarn" => {
                let mut yarn = YarnScaling::new(get("factor"), get("original"))
                    .beta_fast(get("fast"))
                    .beta_slow(get("slow"))
                    .truncate(get("truncate") != 0.0);
                yarn.attention_factor = number("attention");
                yarn.into()
            }
            "longrope" => {
                let factors = text("factors").unwrap().split(',').map(|x| x.parse().unwrap()).collect();
                let mut long = LongRopeScaling::new(factors, get("factor"), get("original"));
                long.attention_factor = number("attention");
                long.into()
            }
            other => panic!("an unknown kind {other}"),
        };
        let f = RopeFrequencies::new(get("dim") as usize, get("base"), &scaling).unwrap();
        let numbers: Vec<f64> = numbers.split(' ').map(|x| x.parse().unwrap()).collect();
        close(f.magnitude(), numbers[0], 1e-6, || format!("magnitude: {line}"));
        assert_eq!(f.inv_freq().len(), numbers.len() - 1);
        for (i, (&got, &want)) in f.inv_freq().iter().zip(&numbers[1..]).enumerate() {
            // transformers computes in f32; base^x alone has an error of some ulp.
            close(got, want, 3e-6 * want.abs(), || format!("frequency {i}: {}", &line[..line.len().min(90)]));
        }
        *kinds.entry(kind).or_default() += 1;
    }
    assert_eq!(
        kinds.into_iter().collect::<Vec<_>>(),
        [("linear", 4), ("llama3", 2), ("longrope", 4), ("ntk", 2), ("yarn", 5)]
    );
}

#[track_caller]
fn assert_frequencies(got: &RopeFrequencies, want: &[f64]) {
    assert_eq!(got.inv_freq().len(), want.len());
    for (i, (&got, &want)) in got.inv_freq().iter().zip(want).enumerate() {
        close(got, want, 1e-12 * want.abs(), || format!("frequency {i}"));
    }
}

/// Meta's code uses wavelengths, in three branches.
fn llama3_by_wavelength() {
    for (dim, base, factor, low, high, original) in [
        (128, 500_000.0, 8.0, 1.0, 4.0, 8192.0),
        (64, 500_000.0, 32.0, 1.0, 4.0, 8192.0),
        (32, 10_000.0, 3.0, 2.0, 3.0, 100.0),
    ] {
        let want: Vec<f64> = plain(dim, base)
            .into_iter()
            .map(|f| {
                let wavelength = std::f64::consts::TAU / f;
                if wavelength < original / high {
                    f
                } else if wavelength > original / low {
                    f / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            })
            .collect();
        let scaling = Llama3Scaling::new(factor, original).low_freq_factor(low).high_freq_factor(high);
        let got = RopeFrequencies::new(dim, base, &scaling.into()).unwrap();
        assert_frequencies(&got, &want);
        assert_eq!(got.magnitude(), 1.0);
    }
}

/// The paper's appendix: a ramp over pair indices between those that rotate `beta_fast` and `beta_slow` times.
fn yarn_by_the_paper() {
    for (dim, base, factor, original, fast, slow, truncate) in [
        (128, 10_000f64, 4.0, 4096.0, 32.0, 1.0, true),
        (64, 150_000.0, 32.0, 4096.0, 32.0, 1.0, false),
        (64, 10_000.0, 40.0, 4096.0, 32.0, 1.0, true),
    ] {
        // The (fractional) pair whose wavelength is original / turns: base^(2i/dim) * 2 pi = original / turns.
        let pair = |turns: f64| (original / turns / std::f64::consts::TAU).log(base) * dim as f64 / 2.0;
        let (low, high) = match truncate {
            true => (pair(fast).floor(), pair(slow).ceil()),
            false => (pair(fast), pair(slow)),
        };
        let want: Vec<f64> = plain(dim, base)
            .into_iter()
            .enumerate()
            .map(|(i, f)| {
                let kept = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                f / factor * (1.0 - kept) + f * kept
            })
            .collect();
        let yarn = YarnScaling::new(factor, original).beta_fast(fast).beta_slow(slow).truncate(truncate);
        let got = RopeFrequencies::new(dim, base, &yarn.into()).unwrap();
        assert_frequencies(&got, &want);
        close(got.magnitude(), 0.1 * factor.ln() + 1.0, 1e-12, || "the paper's attention factor".into());
        assert_eq!(RopeFrequencies::new(dim, base, &yarn.attention_factor(0.75).into()).unwrap().magnitude(), 0.75);
    }
}

fn ntk_and_linear() {
    let linear = RopeFrequencies::new(64, 10_000.0, &RopeScaling::Linear { factor: 4.0 }).unwrap();
    assert_frequencies(&linear, &plain(64, 10_000.0).iter().map(|f| f / 4.0).collect::<Vec<_>>());
    // The lowest frequency is that of linear interpolation, the highest is kept.
    let ntk = RopeFrequencies::new(64, 10_000.0, &RopeScaling::Ntk { factor: 4.0 }).unwrap();
    close(ntk.inv_freq()[31], plain(64, 10_000.0)[31] / 4.0, 1e-15, || "the lowest frequency".into());
    assert_eq!(ntk.inv_freq()[0], 1.0);
}

fn longrope_magnitude() {
    let factors: Vec<f64> = (0..32).map(|i| 1.0 + i as f64).collect();
    let long = |factor, attention_factor| {
        let mut scaling = LongRopeScaling::new(factors.clone(), factor, 4096.0);
        scaling.attention_factor = attention_factor;
        RopeFrequencies::new(64, 10_000.0, &scaling.into()).unwrap()
    };
    let want: Vec<f64> = plain(64, 10_000.0).iter().zip(&factors).map(|(f, d)| f / d).collect();
    assert_frequencies(&long(32.0, None), &want);
    // ln 32 / ln 4096 = 5 / 12.
    close(long(32.0, None).magnitude(), (17.0f64 / 12.0).sqrt(), 1e-12, || "attention factor".into());
    assert_eq!(long(1.0, None).magnitude(), 1.0);
    assert_eq!(long(32.0, Some(1.25)).magnitude(), 1.25);
}

fn scaling_errors() {
    use kvlane::Status::{InvalidValue, Shape};
    let yarn = |factor, beta_fast, beta_slow| {
        YarnScaling::new(factor, 4096.0).beta_fast(beta_fast).beta_slow(beta_slow).into()
    };
    let llama3 = |factor, low_freq_factor, high_freq_factor, original_max_position| {
        Llama3Scaling::new(factor, original_max_position)
            .low_freq_factor(low_freq_factor)
            .high_freq_factor(high_freq_factor)
            .into()
    };
    let long = |factors, original_max_position| LongRopeScaling::new(factors, 2.0, original_max_position).into();
    for (dim, base, scaling, status, pieces) in [
        (7, 1e4, RopeScaling::None, InvalidValue, ["rotary_dim is 7", "4096"]),
        (0, 1e4, RopeScaling::None, InvalidValue, ["rotary_dim is 0", "4096"]),
        (4098, 1e4, RopeScaling::None, InvalidValue, ["rotary_dim is 4098", "4096"]),
        (64, 0.0, RopeScaling::None, InvalidValue, ["base is 0", "positive"]),
        (64, -1.0, RopeScaling::None, InvalidValue, ["base is -1", "positive"]),
        (64, f64::NAN, RopeScaling::None, InvalidValue, ["base is NaN", "positive"]),
        (64, f64::INFINITY, RopeScaling::None, InvalidValue, ["base is inf", "positive"]),
        (64, 1e4, RopeScaling::Linear { factor: 0.0 }, InvalidValue, ["factor is 0", "positive"]),
        (64, 1e4, RopeScaling::Ntk { factor: f64::NAN }, InvalidValue, ["factor is NaN", "positive"]),
        (2, 1e4, RopeScaling::Ntk { factor: 2.0 }, InvalidValue, ["rotary_dim", "got 2"]),
        (64, 1e4, llama3(-8.0, 1.0, 4.0, 8192.0), InvalidValue, ["factor is -8", "positive"]),
        (64, 1e4, llama3(8.0, 0.0, 4.0, 8192.0), InvalidValue, ["low_freq_factor is 0", "positive"]),
        (64, 1e4, llama3(8.0, 4.0, 4.0, 8192.0), InvalidValue, ["high_freq_factor 4", "low_freq_factor 4"]),
        (64, 1e4, llama3(8.0, 1.0, 4.0, f64::INFINITY), InvalidValue, ["original_max_position is inf", "positive"]),
        (64, 1e4, yarn(0.0, 32.0, 1.0), InvalidValue, ["factor is 0", "positive"]),
        (64, 1e4, yarn(4.0, 1.0, 32.0), InvalidValue, ["beta_fast 1", "beta_slow 32"]),
        (64, 1e4, yarn(4.0, 32.0, 0.0), InvalidValue, ["beta_slow is 0", "positive"]),
        (64, 1e4, long(vec![1.0; 31], 4096.0), Shape, ["factors has 31", "has 32 pairs"]),
        (64, 1e4, long(vec![-1.0; 32], 4096.0), InvalidValue, ["factors is -1", "positive"]),
        (64, 1e4, long(vec![1.0; 32], 1.0), InvalidValue, ["original_max_position 1", "above 1"]),
    ] {
        let error = RopeFrequencies::new(dim, base, &scaling).expect_err("a mistake");
        assert_eq!(error.status(), status, "{error}");
        for piece in pieces {
            assert!(error.message().contains(piece), "{error} does not say {piece:?}");
        }
    }
    for (inv_freq, magnitude, piece) in [
        (vec![], 1.0, "rotary_dim is 0"),
        (vec![1.0; 2049], 1.0, "rotary_dim is 4098"),
        (vec![1.0, f64::NAN], 1.0, "inv_freq[1] is NaN"),
        (vec![1.0], f64::INFINITY, "inf"),
    ] {
        let error = RopeFrequencies::from_inv_freq(inv_freq, magnitude).expect_err("a mistake");
        assert!(error.status() == InvalidValue && error.message().contains(piece), "{error}");
    }
}
