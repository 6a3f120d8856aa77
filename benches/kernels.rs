//! One bench for every kernel of the registry that this CPU can run: `cargo bench`, or `cargo bench -- attention_f16` for some.
//!
//! Sizes are those of a Llama-3-8B layer (32 query heads, 8 KV heads, head size 128). Throughput is bytes read and written
//! for the kernels that memory bounds, and for attention the bytes of K and V (decode) or the multiplications and additions
//! that count (prefill; an "element" is one of them).

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use kvlane::{
    AttentionOptions, AttentionState, AttentionTensors, Context, DType, Destination, Element, KernelInfo, KvWrite, Op,
    Pairing, Positions, Rope, RopeAngles, RopeFrequencies, RopeScaling, Serial, View, ViewMut, Workspace, attention,
    kernels, kv_write, merge_states, repeat_kv, rope,
};
use std::hint::black_box;

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const TOKENS: usize = 512;
const KEYS: usize = 4096;

/// Numbers between -1 and 1, of a type known at run time.
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    fn new(dtype: DType, n: usize) -> Self {
        fn fill<T: Element>(n: usize) -> Vec<T> {
            let mut state = 1u64;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                T::from_f32((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
            };
            (0..n).map(|_| next()).collect()
        }
        match dtype {
            DType::F16 => Self::F16(fill(n)),
            DType::Bf16 => Self::Bf16(fill(n)),
            _ => Self::F32(fill(n)),
        }
    }

    fn view(&self, shape: [usize; 4]) -> View<'_> {
        match self {
            Self::F32(x) => View::new(x, shape),
            Self::F16(x) => View::new(x, shape),
            Self::Bf16(x) => View::new(x, shape),
        }
        .expect("the buffer has the size of the shape")
    }

    fn view_mut(&mut self, shape: [usize; 4]) -> ViewMut<'_> {
        match self {
            Self::F32(x) => ViewMut::new(x, shape),
            Self::F16(x) => ViewMut::new(x, shape),
            Self::Bf16(x) => ViewMut::new(x, shape),
        }
        .expect("the buffer has the size of the shape")
    }
}

fn bench_kernel(c: &mut Criterion, kernel: KernelInfo) {
    let context = Context::with_max_isa(kernel.isa).expect("the level belongs to this architecture");
    let precision = kernel.precision.unwrap_or_default();
    let chosen = context.kernel_for(kernel.op, kernel.src, kernel.dst, precision).expect("the registry has it");
    if chosen.name != kernel.name {
        println!("{}: not run, KVLANE_MAX_ISA leads to {}", kernel.name, chosen.name);
        return;
    }
    let (from, to) = (kernel.src.size(), kernel.dst.size());
    let mut group = c.benchmark_group(kernel.name);
    group.sample_size(10).measurement_time(std::time::Duration::from_secs(1));
    match kernel.op {
        Op::RopeAngles => {
            let frequencies = frequencies();
            group.throughput(Throughput::Elements((TOKENS * DIM / 2) as u64));
            group.bench_function("table", |b| b.iter(|| black_box(frequencies.table(&context, TOKENS))));
        }
        Op::Rope => {
            let shape = [1, TOKENS, HEADS, DIM];
            let n = shape.iter().product();
            let (src, mut dst) = (Data::new(kernel.src, n), Data::new(kernel.dst, n));
            let frequencies = frequencies();
            let (cos, sin) = frequencies.table(&context, TOKENS);
            group.throughput(Throughput::Bytes((n * (from + to)) as u64));
            for (name, pairing) in [("half_split", Pairing::HalfSplit), ("interleaved", Pairing::Interleaved)] {
                for (source, angles) in [
                    ("computed", RopeAngles::Frequencies(&frequencies)),
                    ("table", RopeAngles::Table { cos: &cos, sin: &sin }),
                ] {
                    let options = Rope { pairing, rotary_dim: DIM, angles, positions: Positions::Offsets(&[0]) };
                    group.bench_function(format!("{name}/{source}"), |b| {
                        b.iter(|| rope(&context, &Serial, src.view(shape), dst.view_mut(shape), &options).unwrap());
                    });
                }
            }
        }
        Op::KvWrite => {
            let shape = [1, TOKENS, KV_HEADS, DIM];
            let n: usize = shape.iter().product();
            let (k, v) = (Data::new(kernel.src, n), Data::new(kernel.src, n));
            let (mut k_cache, mut v_cache) = (Data::new(kernel.dst, n), Data::new(kernel.dst, n));
            group.throughput(Throughput::Bytes((2 * n * (from + to)) as u64));
            group.bench_function("bshd", |b| {
                b.iter(|| {
                    let write = KvWrite {
                        k: k.view(shape),
                        v: v.view(shape),
                        k_cache: k_cache.view_mut(shape),
                        v_cache: v_cache.view_mut(shape),
                        to: Destination { positions: &[0], ..Default::default() },
                        rope: None,
                    };
                    kv_write(&context, &Serial, write).unwrap();
                });
            });
        }
        Op::RepeatKv => {
            let (narrow, wide) = ([1, TOKENS, KV_HEADS, DIM], [1, TOKENS, HEADS, DIM]);
            let (n, m) = (narrow.iter().product(), wide.iter().product());
            let (src, mut dst) = (Data::new(kernel.src, n), Data::new(kernel.dst, m));
            group.throughput(Throughput::Bytes((n * from + m * to) as u64));
            group.bench_function("bshd", |b| {
                b.iter(|| repeat_kv(&context, &Serial, src.view(narrow), dst.view_mut(wide)).unwrap());
            });
        }
        Op::Attention => {
            for (name, queries, keys) in [("decode", 1, KEYS), ("prefill", TOKENS, TOKENS)] {
                let (q_shape, kv_shape) = ([1, queries, HEADS, DIM], [1, keys, KV_HEADS, DIM]);
                let (q_len, kv_len) = (q_shape.iter().product(), kv_shape.iter().product::<usize>());
                let (q, k, v) =
                    (Data::new(DType::F32, q_len), Data::new(kernel.src, kv_len), Data::new(kernel.src, kv_len));
                let mut out = Data::new(DType::F32, q_len);
                let mut workspace = Workspace::new();
                let options = AttentionOptions { causal: true, precision, ..Default::default() };
                let pairs: usize = (0..queries).map(|i| keys - queries + i + 1).sum();
                group.throughput(if queries == 1 {
                    Throughput::Bytes((2 * kv_len * from) as u64)
                } else {
                    Throughput::Elements((4 * pairs * HEADS * DIM) as u64)
                });
                group.bench_function(name, |b| {
                    b.iter(|| {
                        let tensors = AttentionTensors {
                            q: q.view(q_shape),
                            k: k.view(kv_shape),
                            v: v.view(kv_shape),
                            out: out.view_mut(q_shape),
                            lse: None,
                        };
                        attention(&context, &Serial, &mut workspace, tensors, &options).unwrap();
                    });
                });
            }
        }
        Op::MergeStates => {
            let shape = [1, TOKENS, HEADS, DIM];
            let n: usize = shape.iter().product();
            let (a, b) = (Data::new(kernel.src, n), Data::new(kernel.src, n));
            let lse = vec![0.0; n / DIM];
            let mut out = Data::new(kernel.dst, n);
            group.throughput(Throughput::Bytes((3 * n * from) as u64));
            group.bench_function("two", |bencher| {
                bencher.iter(|| {
                    let states = [
                        AttentionState { out: a.view(shape), lse: &lse },
                        AttentionState { out: b.view(shape), lse: &lse },
                    ];
                    merge_states(&context, &Serial, &states, out.view_mut(shape), None).unwrap();
                });
            });
        }
        other => panic!("{other:?} is in the registry, but has no bench"),
    }
    group.finish();
}

fn frequencies() -> RopeFrequencies {
    RopeFrequencies::new(DIM, 500_000.0, &RopeScaling::None).expect("valid parameters")
}

fn registry(c: &mut Criterion) {
    for kernel in kernels() {
        if kernel.isa.is_available() {
            bench_kernel(c, kernel);
        } else {
            println!("{}: not run, this CPU lacks {}", kernel.name, kernel.isa.features().join(", "));
        }
    }
}

criterion_group!(benches, registry);
criterion_main!(benches);
