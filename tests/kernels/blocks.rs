//! Caches of ggml's blocks: what ggml's reference code makes of numbers and reads, to the bit at every level; attention over them has the
//! bits of attention over what they stand for; moved, inserted and turned.

use crate::common::attention::{Case, Options, Setting, Shape, precision, random_bias, with_setting};
use crate::common::blocks::{Blocks, CANARY, FORMATS, N, elements, quantise, quantise_head};
use crate::common::fp8::Quantised;
use crate::common::runners::Threads;
use crate::common::tensor::indices;
use crate::common::{Layout, Place, Rng, Tensor, few_cases, recording, scaled, thin};
use crate::harness::{Level, tests};
use crate::quantised::{self, Bytes, Written, head_of, heads_of, insert};
use crate::write::rounded;
use kvlane::{
    AttentionOptions, AttentionTensors, Axis, CacheFormat, CacheView, CacheViewMut, Context, DType, Destination, Isa,
    KernelInfo, KeyRotation, KvCache, KvLayer, KvRead, KvWrite, Layout as Slots, Op, Packing, Pairing, Positions,
    Precision, Rope, RopeFrequencies, RopeScaling, Runner, Serial, Source, Status, UnrotatedKeys, View, ViewMut,
    Workspace, attention, kv_read, kv_write, rope,
};
use std::collections::BTreeMap;

tests! {
    levels: goldens, many_blocks, every_layout, fused_with_norm_and_rope, bits_of_what_is_read, rows_of_a_head, every_mask, hidden_blocks,
        moves, inserted_rows, turned_keys, running_positions;
    once: products_of_integers, the_definition, refused;
}

impl Written for Blocks {
    fn format(&self) -> CacheFormat {
        self.format
    }
    fn view(&self) -> CacheView<'_> {
        self.view()
    }
    fn element(&self, at: [usize; 4]) -> f32 {
        self.get(at)
    }
    fn view_mut(&mut self) -> CacheViewMut<'_> {
        self.view_mut()
    }

    #[track_caller]
    fn assert_written(&self, src: &Tensor, to: &Destination, what: &str) {
        quantised::assert_written(self, src, to, what);
    }
}

impl Bytes for Blocks {
    fn shape(&self) -> [usize; 4] {
        self.shape
    }
    fn head(&self, b: usize, s: usize, h: usize) -> Vec<u8> {
        self.head(b, s, h)
    }
    fn quantised(&self, elements: &[f32], _head: usize) -> Vec<u8> {
        quantise_head(self.format, elements)
    }
    fn assert_gaps(&self) {
        self.assert_gaps();
    }
}

fn output(rng: &mut Rng, shape: [usize; 4], at: Place) -> Blocks {
    let format = rng.pick(&FORMATS);
    Blocks::output(format, shape, Layout::random(rng), at)
}

/// What quantising random numbers gives.
fn random(rng: &mut Rng, format: CacheFormat, shape: [usize; 4]) -> Blocks {
    let mut cache = Blocks::output(format, shape, Layout::random(rng), Place::GuardAfter);
    for [b, s, h, _] in heads_of(shape) {
        let head: Vec<f32> = (0..shape[3]).map(|_| rng.f32()).collect();
        cache.set_head(b, s, h, &quantise_head(format, &head));
    }
    cache
}

/// What ggml's library has recorded.
struct Goldens(BTreeMap<String, Vec<u8>>);

impl Goldens {
    fn read() -> Option<Self> {
        let text = recording("block_goldens.txt")?;
        let byte = |hex: &str, i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
        let line = |line: &str| {
            let (name, hex) = line.split_once(' ').unwrap();
            (name.to_owned(), (0..hex.len() / 2).map(|i| byte(hex, i)).collect())
        };
        Some(Self(text.lines().map(line).collect()))
    }

    fn words(&self, name: &str) -> Vec<u32> {
        self.0[name].chunks(4).map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap())).collect()
    }

    fn x(&self) -> Vec<f32> {
        self.words("x").into_iter().map(f32::from_bits).collect()
    }

    fn bytes(&self, format: CacheFormat, what: &str) -> &[u8] {
        &self.0[&format!("{format}.{what}")]
    }

    /// Panics unless these are the numbers that ggml reads, block after block.
    fn assert_values(&self, format: CacheFormat, values: &[f32]) {
        let bits = |x: &f32| if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() };
        let hash = |block: &[f32]| {
            let bytes = block.iter().flat_map(|x| bits(x).to_be_bytes());
            bytes.fold(0x811c_9dc5u32, |state, byte| (state ^ u32::from(byte)).wrapping_mul(0x0100_0193))
        };
        let hashes = self.words(&format!("{format}.hashes"));
        assert_eq!(hashes.len() * N, values.len());
        let full = self.words(&format!("{format}.values"));
        let last: Vec<u32> = values[values.len() - full.len()..].iter().map(bits).collect();
        assert_eq!(last, full, "{format}");
        for (i, block) in values.chunks(N).enumerate() {
            assert_eq!(hash(block), hashes[i], "{format}, block {i}: {block:?}");
        }
    }
}

/// The bytes that ggml's reference writes, and the numbers that it reads.
fn goldens(level: &Level) {
    let Some(goldens) = Goldens::read() else { return };
    let x = goldens.x();
    let blocks = x.len() / N;
    for format in FORMATS {
        // A token of one head; of heads of a block each; of tokens of a block each.
        for shape in [[1, 1, 1, x.len()], [1, 1, blocks, N], [1, blocks, 1, N]] {
            let mut k = Tensor::input(DType::F32, shape, Layout::BSHD, Place::GuardAfter);
            let mut at = x.iter();
            k.fill(|_| *at.next().unwrap());
            let v = Tensor::input(DType::F32, [1, shape[1], shape[2], 0], Layout::BSHD, Place::Heap);
            let mut cache = Blocks::output(format, shape, Layout::BSHD, Place::GuardAfter);
            let mut none = Tensor::output(DType::F32, v.shape, Layout::BSHD, Place::Heap);
            let to = Destination::positions(&[0]);
            let write = KvWrite::new(k.view(), v.view(), cache.view_mut(), none.view_mut(), to);
            kv_write(&level.context, &Serial, write).expect("a valid write");
            level.checked(Op::KvWrite, DType::F32, format);
            let written: Vec<u8> = heads_of(shape).flat_map(|[b, s, h, _]| cache.head(b, s, h)).collect();
            let (size, wanted) = (format.unit_bytes(), goldens.bytes(format, "bytes"));
            for (i, (written, wanted)) in written.chunks(size).zip(wanted.chunks(size)).enumerate() {
                assert_eq!(written, wanted, "{format}, block {i}: {:?}", &x[i * N..(i + 1) * N]);
            }
            cache.assert_gaps();
        }
        let all = [goldens.bytes(format, "bytes"), goldens.bytes(format, "random")].concat();
        let n = all.len() / format.unit_bytes();
        let mut cache = Blocks::output(format, [1, 1, n, N], Layout::BSHD, Place::GuardBefore);
        for (h, block) in all.chunks(format.unit_bytes()).enumerate() {
            cache.set_head(0, 0, h, block);
        }
        let mut read = [(); 2].map(|()| Tensor::output(DType::F32, cache.shape, Layout::STEP2, Place::GuardAfter));
        let [k, v] = &mut read;
        let call = KvRead::new(cache.view(), cache.view(), k.view_mut(), v.view_mut(), Source::positions(&[0]));
        kv_read(&level.context, &Serial, call).expect("a valid read");
        level.checked(Op::KvRead, format, DType::F32);
        for read in read {
            let values: Vec<f32> = indices(read.shape).map(|at| read.get(at)).collect();
            goldens.assert_values(format, &values);
            read.assert_gaps();
        }
    }
}

/// Blocks of every size of number, subnormal and huge ones, ties, NaN and infinities in every place, from every type.
fn many_blocks(level: &Level) {
    let mut rng = Rng::new(501);
    let mut blocks: Vec<Vec<f32>> = vec![
        vec![f32::MAX; N],
        (0..N).map(|i| if i % 2 == 0 { f32::MAX } else { -f32::MAX }).collect(),
        vec![1e-45; N],
        (0..N).map(|i| 1e-40 * i as f32).collect(),
        (0..N).map(|i| f32::MIN_POSITIVE * (i as f32 - 11.0)).collect(),
        (0..N).map(|i| 1e-15 * (i as f32 - 16.0) / 16.0).collect(),
        vec![9.9e-16; N],
        (0..N).map(|i| if i == 0 { 0.0 } else { -0.0 }).collect(),
    ];
    for lane in thin((0..N).collect()) {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 9.0] {
            let mut block = vec![0.25; N];
            block[lane] = x;
            blocks.push(block);
        }
    }
    for _ in 0..scaled(600) {
        let size = 2f32.powi(rng.between(0, 250) as i32 - 128);
        let whole = rng.chance(0.3);
        blocks.push(
            (0..N)
                .map(|_| if whole { rng.between(0, 254) as f32 / 2.0 - 63.5 } else { rng.f32() } * size)
                .map(|x| x.clamp(-f32::MAX, f32::MAX))
                .collect(),
        );
    }
    for format in FORMATS {
        for src in DType::ALL {
            let shape = [1, blocks.len(), 1, N];
            let mut k = Tensor::input(src, shape, rng.pick(&Layout::ALL), Place::GuardAfter);
            k.fill(|[_, s, _, d]| blocks[s][d]);
            let v = Tensor::input(src, [1, blocks.len(), 1, 0], Layout::BSHD, Place::Heap);
            let mut cache = Blocks::output(format, shape, Layout::random(&mut rng), Place::GuardBefore);
            let mut none = Tensor::output(src, v.shape, Layout::BSHD, Place::Heap);
            let to = Destination::positions(&[0]);
            let write = KvWrite::new(k.view(), v.view(), cache.view_mut(), none.view_mut(), to);
            kv_write(&level.context, &Serial, write).expect("a valid write");
            level.checked(Op::KvWrite, src, format);
            cache.assert_written(&k, &to, &src.to_string());
            for s in 0..blocks.len() {
                let (x, read) = (head_of(&k, 0, s, 0), cache.elements(0, s, 0));
                if x.iter().any(|x| !x.is_finite()) {
                    assert!(read.iter().all(|x| x.is_nan()), "{format}: {x:?}");
                }
            }
        }
    }
}

/// Every layout, written and read, beside another format on the other side; any number of threads.
fn every_layout(level: &Level) {
    let mut rng = Rng::new(502);
    quantised::every_layout(level, &mut rng, |rng| N * rng.between(1, 5), output);
    // Every kernel that reads is counted, whatever was picked.
    for (format, dst) in FORMATS.into_iter().flat_map(|format| DType::ALL.map(|dst| (format, dst))) {
        let cache = random(&mut rng, format, [1, 2, 1, N]);
        let mut read = [(); 2].map(|()| Tensor::output(dst, cache.shape, Layout::BSHD, Place::GuardAfter));
        let [k, v] = &mut read;
        let call = KvRead::new(cache.view(), cache.view(), k.view_mut(), v.view_mut(), Source::positions(&[0]));
        kv_read(&level.context, &Serial, call).expect("a valid read");
        level.checked(Op::KvRead, format, dst);
        for at in indices(cache.shape) {
            assert_eq!(read[0].bits(at), rounded(dst, cache.get(at)), "{format} {dst} {at:?}");
        }
    }
}

fn fused_with_norm_and_rope(level: &Level) {
    quantised::fused_with_norm_and_rope(level, &mut Rng::new(503), (2 * N, N), output);
}

/// Keys or values in a format, and in f32 what they stand for.
struct Both {
    cache: Quantised,
    plain: Tensor,
}

impl Both {
    fn of(tensor: &Tensor, format: CacheFormat) -> Self {
        let cache = Quantised::of(tensor, format, Place::GuardAfter);
        let mut plain = Tensor::input(DType::F32, tensor.shape, Layout::BSHD, Place::Heap);
        plain.fill(|at| cache.get(at) as f32);
        Self { cache, plain }
    }
}

/// Attention over blocks has the bits of attention over what they stand for in f32, beside every format on the other side.
fn bits_of_what_is_read(level: &Level) {
    let mut rng = Rng::new(504);
    for (tokens, group, keys) in thin(vec![(1, 1, 1), (1, 1, 200), (1, 4, 130), (3, 2, 65), (40, 3, 200)]) {
        for (dim, v_dim) in thin(vec![(32, 64), (64, 32), (128, 128), (256, 96), (96, 288)]) {
            // Every format once; more than the rows of f32 do not depend on it.
            let formats = if (dim, keys) == (32, 1) { &FORMATS[..] } else { &[rng.pick(&FORMATS)] };
            for &format in formats {
                let other = rng.pick(&CacheFormat::ALL);
                for [k_format, v_format] in [[format, other], [other, format], [format, format]] {
                    let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys, dim, v_dim };
                    let mut case = Case::new(&mut rng, shape, DType::F32);
                    for tensor in [&mut case.k, &mut case.v] {
                        *tensor = tensor.to(Layout::random(&mut rng), Place::Heap);
                    }
                    case.options.causal = true;
                    case.options.lengths = Some(vec![keys as i32, (keys as i32 - 30).max(1)]);
                    let side = |tensor: &Tensor, format: CacheFormat| match format.dtype() {
                        Some(_) => None,
                        None => Some(Both::of(tensor, format)),
                    };
                    let plain =
                        |tensor: &Tensor, format: CacheFormat| tensor.cast(format.dtype().unwrap_or(DType::F32));
                    let (k_plain, v_plain) = (plain(&case.k, k_format), plain(&case.v, v_format));
                    let (k, v) = (side(&case.k, k_format), side(&case.v, v_format));
                    let run = |k: CacheView, v: CacheView| {
                        let mut out =
                            Tensor::output(DType::F32, [2, tokens, 2 * group, v_dim], Layout::BSHD, Place::Heap);
                        let mut lse = vec![0f32; 2 * tokens * 2 * group];
                        let tensors = AttentionTensors::new(case.q.view(), k, v, out.view_mut()).lse(&mut lse);
                        attention(&level.context, &Threads(2), &mut Workspace::new(), tensors, &case.options.borrow())
                            .expect("a valid call");
                        (out.all_bits(), lse.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                    };
                    let k_cache = k.as_ref().map_or_else(|| k_plain.view().into(), |both| both.cache.view());
                    let v_cache = v.as_ref().map_or_else(|| v_plain.view().into(), |both| both.cache.view());
                    let found = run(k_cache, v_cache);
                    level.checked(Op::Attention, format, format);
                    // Blocks alone become f32: scales of other formats are applied elsewhere, in another order of roundings.
                    let blocks = |format: CacheFormat| format.is_blocks() || format.is_affine();
                    let k_read = match &k {
                        Some(both) if blocks(k_format) => both.plain.view().into(),
                        Some(both) => both.cache.view(),
                        None => k_plain.view().into(),
                    };
                    let v_read = match &v {
                        Some(both) if blocks(v_format) => both.plain.view().into(),
                        Some(both) => both.cache.view(),
                        None => v_plain.view().into(),
                    };
                    assert!(found == run(k_read, v_read), "{k_format} {v_format} {shape:?}");
                }
            }
        }
    }
}

/// One to 25 query rows of a KV head, some of which read blocks from the cache and some after they were widened, of several heads at a
/// time or of one; in sequences with as many rows, and beside one of eight.
fn rows_of_a_head(level: &Level) {
    let mut rng = Rng::new(508);
    for rows in (1..=12).chain([16, 24, 25]) {
        let formats = [rng.pick(&FORMATS), rng.pick(&FORMATS)];
        let sides = [(96, formats[0]), (160, formats[1])].map(|(dim, format)| {
            let layout = Layout::random(&mut rng);
            Both::of(&Tensor::random(&mut rng, DType::F32, [2, 150, 3, dim], layout, Place::Heap), format)
        });
        let ragged = [0, rows, rows + 8];
        for starts in [None, Some(&ragged[..])] {
            let (batch, tokens) = if starts.is_some() { (1, ragged[2] as usize) } else { (2, rows as usize) };
            let q = Tensor::random(&mut rng, DType::F32, [batch, tokens, 3, 96], Layout::BSHD, Place::Heap);
            let run = |k: CacheView, v: CacheView| {
                let mut out = Tensor::output(DType::F32, [batch, tokens, 3, 160], Layout::BSHD, Place::Heap);
                let mut options = AttentionOptions::new().causal(true).precision(precision()).lengths(&[150, 150]);
                options.cu_seqlens_q = starts;
                let tensors = AttentionTensors::new(q.view(), k, v, out.view_mut());
                attention(&level.context, &Serial, &mut Workspace::new(), tensors, &options).expect("a valid call");
                out.all_bits()
            };
            let [k, v] = &sides;
            let found = run(k.cache.view(), v.cache.view());
            assert!(found == run(k.plain.view().into(), v.plain.view().into()), "{rows} {starts:?} {formats:?}");
        }
    }
}

/// Random masks, biases, windows and starts: the bits of what is read, and what hidden slots hold does not matter.
fn every_mask(level: &Level) {
    let mut rng = Rng::new(505);
    for round in 0..scaled(60).max(6) {
        let (tokens, group, keys) = (rng.pick(&[1, 2, 9, 33]), rng.between(1, 4), rng.between(1, 300));
        let (dim, v_dim) = (N * rng.between(1, 4), N * rng.between(1, 4));
        let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys, dim, v_dim };
        let mut case = Case::new(&mut rng, shape, DType::F32);
        let lengths: Vec<i32> = (0..2).map(|_| rng.between(1, keys) as i32).collect();
        let starts: Vec<i32> = lengths.iter().map(|&n| rng.below(n as usize) as i32).collect();
        case.options.causal = rng.chance(0.5);
        case.options.window_left = rng.chance(0.3).then(|| rng.between(0, 90) as u32);
        case.options.kv_starts = rng.chance(0.4).then(|| starts.clone());
        if rng.chance(0.5) {
            case.options.bias = Some(random_bias(
                &mut rng,
                DType::F32,
                shape.scores(),
                Layout::BSHD.strides(shape.scores()),
                Place::Heap,
                0.6,
            ));
        }
        // What lies beyond a length is not read: blocks of NaN and of infinite factors.
        let formats = [rng.pick(&FORMATS), rng.pick(&FORMATS)];
        let mut sides = [(&case.k, formats[0]), (&case.v, formats[1])].map(|(x, format)| {
            let layout = Layout::random(&mut rng);
            Blocks::of(&x.to(layout, Place::Heap), format, Place::GuardAfter)
        });
        let plain = sides.each_ref().map(|cache| {
            let mut plain = Tensor::input(DType::F32, cache.shape, Layout::BSHD, Place::Heap);
            plain.fill(|at| cache.get(at));
            plain
        });
        for cache in &mut sides {
            let poison = [vec![0xff; cache.format.head_bytes(cache.shape[3])], {
                let mut infinite = cache.head(0, 0, 0);
                infinite[1] = 0x7c;
                infinite
            }];
            for [b, s, h, _] in heads_of(cache.shape).filter(|at| at[1] >= lengths[at[0]] as usize) {
                cache.set_head(b, s, h, &poison[(s + h) % 2]);
            }
        }
        case.options.lengths = Some(lengths);
        let run = |k: CacheView, v: CacheView, runner: &dyn Runner| {
            let mut out = Tensor::output(DType::Bf16, [2, tokens, 2 * group, v_dim], Layout::BHSD, Place::GuardAfter);
            let tensors = AttentionTensors::new(case.q.view(), k, v, out.view_mut());
            attention(&level.context, runner, &mut Workspace::new(), tensors, &case.options.borrow()).expect("valid");
            out.assert_gaps();
            out.all_bits()
        };
        let [k, v] = &sides;
        let found = run(k.view(), v.view(), &Threads(3));
        assert!(
            found == run(plain[0].view().into(), plain[1].view().into(), &Serial),
            "{round}: {formats:?} {shape:?}"
        );
    }
}

/// NaN in a visible block reaches the output; in a block that no query sees it does not.
fn hidden_blocks(level: &Level) {
    let mut rng = Rng::new(506);
    for (tokens, group) in [(1, 1), (1, 8), (30, 2)] {
        for (of_keys, format) in [true, false].into_iter().flat_map(|keys| FORMATS.map(|format| (keys, format))) {
            let shape = Shape { batch: 2, tokens, kv_heads: 2, group, keys: 90, dim: 64, v_dim: 64 };
            let mut case = Case::new(&mut rng, shape, DType::F32);
            case.options.lengths = Some(vec![60, 90]);
            let [mut k, mut v] = [&case.k, &case.v].map(|x| Blocks::of(x, format, Place::Heap));
            let poisoned = if of_keys { &mut k } else { &mut v };
            let nan = quantise(format, &[f32::NAN; N]);
            let size = format.unit_bytes();
            // Sequence 0 sees 60 keys, sequence 1 all, of which one has a block of NaN.
            (60..90).for_each(|s| poisoned.set_head(0, s, 1, &nan.repeat(2)));
            let mut head = poisoned.head(1, 40, 1);
            head[size..].copy_from_slice(&nan);
            poisoned.set_head(1, 40, 1, &head);
            let mut out = Tensor::output(DType::F32, case.q.shape, Layout::BSHD, Place::Heap);
            let tensors = AttentionTensors::new(case.q.view(), k.view(), v.view(), out.view_mut());
            attention(&level.context, &Serial, &mut Workspace::new(), tensors, &case.options.borrow()).expect("valid");
            for at in indices(out.shape) {
                let sees_it = at[0] == 1 && at[2] / group == 1 && (of_keys || at[3] >= N);
                assert_eq!(out.get(at).is_nan(), sees_it, "{format}, keys {of_keys}, {tokens} tokens, {at:?}");
            }
        }
    }
}

/// Products of integers at the levels that have them: every format and int8, one to thirteen rows of a head, heads with and without whole vectors of
/// blocks, of neighbouring KV heads and apart; compared with the result for rounded queries, and row by row with that of single tokens.
fn products_of_integers() {
    let mut rng = Rng::new(509);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let context = Context::with_max_isa(isa).expect("a level of this CPU");
        let has = |k: KernelInfo| k.isa == isa && k.precision == Some(Precision::Integer);
        if context.isa() != isa || !kvlane::kernels().any(has) {
            continue;
        }
        for (i, format) in FORMATS.into_iter().chain([CacheFormat::Int8]).enumerate() {
            // AVX2 has none for bytes.
            if !kvlane::kernels().any(|k| has(k) && k.src == format) && isa == Isa::Avx2 {
                continue;
            }
            let quantised = [Some(format); 2];
            let setting = Setting { precision: Precision::Integer, kv_types: vec![DType::F32], quantised };
            let level = Level { isa, precision: Precision::Integer, quantised, context: context.clone() };
            with_setting(setting, || {
                for (tokens, group, keys, dim) in [
                    (1, 1, 77, 32),
                    (1, 2, 70, 224),
                    (1, 4, 130, 128),
                    (1, 3, 66, 64),
                    (1, 5, 66, 96),
                    (3, 1, 64, 64),
                    (13, 1, 150, 288),
                ]
                .into_iter()
                // Where few cases run, a format takes every other shape, int8 the one with subnormal scales.
                .skip(if few_cases() { (i + 1) % 2 } else { 0 })
                .step_by(if few_cases() { 2 } else { 1 })
                {
                    let shape = Shape { batch: 2, tokens, kv_heads: 3, group, keys, dim, v_dim: 64 };
                    let mut case = Case::new(&mut rng, shape, DType::F32);
                    for tensor in [&mut case.k, &mut case.v] {
                        *tensor = tensor.to(Layout::random(&mut rng), Place::Heap);
                    }
                    if format == CacheFormat::Int8 && group == 5 {
                        // Scales are subnormal.
                        case.v.fill(|_| rng.f32() * 1e-37);
                    }
                    case.options.causal = true;
                    case.options.lengths = Some(vec![keys as i32, (keys as i32 - 30).max(1)]);
                    let found = case.run(&context);
                    level.checked(Op::Attention, format, format);
                    case.assert_close(&context, &found, &|| format!("{format} {shape:?} {isa}"));
                    let (lengths, options) = (case.options.lengths.clone(), Options::default());
                    let alone = case.moved([Layout::BSHD; 4], Place::Heap, options).with(|options| {
                        (options.causal, options.lengths) = (true, lengths);
                    });
                    let last = case.q.cut(0..2, tokens - 1..tokens, Layout::BSHD);
                    let alone = Case { q: last, ..alone }.run(&context);
                    for b in 0..2 {
                        assert!(found.row_bits(b, tokens - 1) == alone.row_bits(b, 0), "{format} {shape:?} {isa}");
                    }
                }
                if format.is_blocks() {
                    hidden_blocks(&level);
                }
            });
        }
    }
}

/// A cache of which a plain mirror holds the bytes as elements.
struct Mirrored {
    cache: Blocks,
    mirror: Tensor,
}

impl Mirrored {
    fn random(rng: &mut Rng, [batch, seq, heads, dim]: [usize; 4]) -> Self {
        let format = rng.pick(&FORMATS);
        let mut cache = Blocks::output(format, [batch, seq, heads, dim], Layout::random(rng), Place::GuardAfter);
        let shape = [batch, seq, heads, format.head_bytes(dim)];
        let mut mirror = Tensor::output(DType::F32, shape, Layout::random(rng), Place::Heap);
        mirror.fill(|_| f32::from(rng.u64() as u8));
        for [b, s, h, _] in heads_of(shape) {
            let bytes: Vec<u8> = (0..shape[3]).map(|d| mirror.get([b, s, h, d]) as u8).collect();
            cache.set_head(b, s, h, &bytes);
        }
        Self { cache, mirror }
    }

    #[track_caller]
    fn check(&self, what: &str) {
        for [b, s, h, _] in heads_of(self.mirror.shape) {
            let wanted: Vec<u8> = (0..self.mirror.shape[3]).map(|d| self.mirror.get([b, s, h, d]) as u8).collect();
            assert_eq!(self.cache.head(b, s, h), wanted, "{what}: [{b}, {s}, {h}]");
        }
        self.cache.assert_gaps();
    }
}

/// Operations that move tokens move bytes.
fn moves(level: &Level) {
    let mut rng = Rng::new(507);
    for _ in 0..scaled(60).max(6) {
        let (heads, dim, v_dim) = (rng.between(1, 4), N * rng.between(1, 3), N * rng.between(1, 3));
        let mut k = Mirrored::random(&mut rng, [4, 20, heads, dim]);
        let mut v = Mirrored::random(&mut rng, [4, 20, heads, v_dim]);
        quantised::each_move(level, &mut rng, &mut |what, call| {
            let mut layers = [KvLayer::new(k.cache.view_mut(), v.cache.view_mut())];
            call(&mut layers);
            let mut layers = [KvLayer::new(k.mirror.view_mut(), v.mirror.view_mut())];
            call(&mut layers);
            k.check(&format!("keys, {what}"));
            v.check(&format!("values, {what}"));
        });
    }
}

/// A sequence goes into a cache of another format through f32, and keeps its bytes in one of the same.
fn inserted_rows(level: &Level) {
    let mut rng = Rng::new(508);
    for (heads, dim) in [(1, 32), (3, 64), (2, 288)] {
        let shape = [2, 7, heads, dim];
        for format in FORMATS {
            let mut source = random(&mut rng, format, shape);
            let (mut same, mut other) = (Blocks::output(format, shape, Layout::random(&mut rng), Place::GuardAfter), {
                output(&mut rng, shape, Place::GuardBefore)
            });
            let read = |s: usize, h: usize| source.elements(1, s, h);
            let elements: Vec<Vec<f32>> = heads_of([1, 5, heads, 1]).map(|[_, s, h, _]| read(s, h)).collect();
            for target in [&mut same, &mut other] {
                insert(level, KvLayer::keys(target.view_mut()), KvLayer::keys(source.view_mut()));
                for [b, s, h, _] in heads_of(shape) {
                    let wanted = if b == 1 || s >= 5 {
                        vec![CANARY; target.format.head_bytes(dim)]
                    } else if target.format == format {
                        source.head(1, s, h)
                    } else {
                        quantise_head(target.format, &elements[s * heads + h])
                    };
                    assert_eq!(target.head(b, s, h), wanted, "{format} to {}", target.format);
                }
                target.assert_gaps();
            }
            // To and from elements, and to and from the other quantised formats.
            let dtype = rng.pick(&DType::ALL);
            let mut plain = Tensor::output(dtype, shape, Layout::random(&mut rng), Place::GuardAfter);
            insert(level, KvLayer::keys(plain.view_mut()), KvLayer::keys(source.view_mut()));
            for [_, s, h, d] in indices([1, 5, heads, dim]) {
                assert_eq!(plain.bits([0, s, h, d]), rounded(dtype, elements[s * heads + h][d]));
            }
            let mut from = Tensor::random(&mut rng, dtype, shape, Layout::BHSD, Place::GuardAfter);
            let wanted: Vec<Vec<f32>> =
                heads_of([1, 5, heads, 1]).map(|[_, s, h, _]| head_of(&from, 1, s, h)).collect();
            let mut target = Blocks::output(format, shape, Layout::BHSD, Place::GuardAfter);
            insert(level, KvLayer::keys(target.view_mut()), KvLayer::keys(from.view_mut()));
            for [_, s, h, _] in heads_of([1, 5, heads, 1]) {
                assert_eq!(target.head(0, s, h), quantise_head(format, &wanted[s * heads + h]));
            }
            for neighbour in [CacheFormat::Int8, CacheFormat::Fp8E4m3] {
                let random = Tensor::random(&mut rng, DType::F32, shape, Layout::BSHD, Place::Heap);
                let mut from = Quantised::of(&random, neighbour, Place::GuardAfter);
                let wanted: Vec<Vec<f32>> = heads_of([1, 5, heads, 1])
                    .map(|[_, s, h, _]| (0..dim).map(|d| from.get([1, s, h, d]) as f32).collect())
                    .collect();
                insert(level, KvLayer::keys(target.view_mut()), KvLayer::keys(from.view_mut()));
                for [_, s, h, _] in heads_of([1, 5, heads, 1]) {
                    assert_eq!(target.head(0, s, h), quantise_head(format, &wanted[s * heads + h]), "{neighbour}");
                }
                insert(level, KvLayer::keys(from.view_mut()), KvLayer::keys(source.view_mut()));
                let mut again = Tensor::output(DType::F32, shape, Layout::BSHD, Place::Heap);
                again.fill(|[b, s, h, d]| if b == 0 && s < 5 { elements[s * heads + h][d] } else { 0.0 });
                let again = Quantised::of(&again, neighbour, Place::Heap);
                for at in indices([1, 5, heads, dim]) {
                    assert_eq!(from.get(at), again.get(at), "{format} to {neighbour}");
                }
            }
        }
    }
}

/// Keys that are turned after an eviction are read, rotated in f32 and quantised again.
fn turned_keys(level: &Level) {
    let mut rng = Rng::new(509);
    for (pairing, heads) in [(Pairing::HalfSplit, 1), (Pairing::Interleaved, 3), (Pairing::HalfSplit, 90)] {
        for format in FORMATS {
            let mut k = random(&mut rng, format, [2, 12, heads, N]);
            quantised::turned_keys(level, pairing, &mut k);
        }
    }
}

/// Keys before the gap are written again from unrotated copies, with the bits of rope and quantisation.
fn running_positions(level: &Level) {
    let mut rng = Rng::new(510);
    let frequencies = RopeFrequencies::new(16, 10_000.0, &RopeScaling::None).unwrap();
    for format in FORMATS {
        let shape = [1, 9, 3, N];
        let mut k = random(&mut rng, format, shape);
        let before: Vec<Vec<u8>> = heads_of(shape).map(|[b, s, h, _]| k.head(b, s, h)).collect();
        let keys = Tensor::random(&mut rng, DType::F16, [1, 2, 3, N], Layout::BHSD, Place::GuardAfter);
        let rotation = KeyRotation::new(Pairing::HalfSplit, &frequencies);
        let mut layers = [KvLayer::keys(k.view_mut())];
        let mut lengths = [9];
        let mut cache = KvCache::new(&mut layers, Slots::Contiguous, &mut lengths);
        let unrotated = UnrotatedKeys::new(keys.view(), rotation);
        cache.evict_running(&level.context, &Serial, 0, 2..5, 7, &[Some(unrotated)]).expect("a valid call");
        let mut want = Tensor::output(DType::F32, [1, 2, 3, N], Layout::BSHD, Place::Heap);
        let options = Rope::new(Pairing::HalfSplit, 16, &frequencies, Positions::Explicit(&[10, 11]));
        rope(&level.context, &Serial, keys.view(), want.view_mut(), &options).unwrap();
        for [b, s, h, _] in heads_of([1, 6, 3, 1]) {
            if s < 2 {
                assert_eq!(k.head(b, s, h), quantise_head(format, &head_of(&want, b, s, h)), "sinks");
            } else {
                assert_eq!(k.head(b, s, h), before[(s + 3) * 3 + h]);
            }
        }
        k.assert_gaps();
    }
}

/// The reference itself, against ggml's.
fn the_definition() {
    let Some(goldens) = Goldens::read() else { return };
    let x = goldens.x();
    for format in FORMATS {
        let size = format.unit_bytes();
        for (i, (x, wanted)) in x.chunks(N).zip(goldens.bytes(format, "bytes").chunks(size)).enumerate() {
            assert_eq!(quantise(format, x), wanted, "{format}, block {i}: {x:?}");
        }
        let all = [goldens.bytes(format, "bytes"), goldens.bytes(format, "random")].concat();
        let values: Vec<f32> = all.chunks(size).flat_map(|block| elements(format, block)).collect();
        goldens.assert_values(format, &values);
    }
}

/// What is wrong is said before a byte is written.
fn refused() {
    let context = kvlane::Context::new().unwrap();
    let message = |error: kvlane::Error| (error.status(), error.message().to_owned());
    let format = CacheFormat::Q4_0;
    // Aligned to 16.
    let mut memory = [0x3434_3434_3434_3434_3434_3434_3434_3434u128; 128];
    // SAFETY: plain bytes.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast::<u8>(), 2048) };
    let of = |format, shape| CacheView::blocks(&bytes[..18 * 16], format, shape);
    for (found, status, parts) in [
        (of(format, [1, 4, 2, 40]), Status::Shape, &["q4_0", "32", "dim = 40"][..]),
        (of(CacheFormat::Int8, [1, 4, 2, 64]), Status::InvalidValue, &["int8"]),
        (of(format, [1, 4, 2, 96]), Status::Bounds, &["24", "16"]),
        (CacheView::blocks(&bytes[1..], format, [1, 4, 2, 64]), Status::Bounds, &["not aligned", "q4_0"]),
        (
            CacheView::blocks_strided(bytes, format, 0, [1, 4, 2, 64], [0, 8, 4, 2]),
            Status::Stride,
            &["one after the other", "is 2"],
        ),
    ] {
        let (found, sentence) = message(found.unwrap_err());
        assert_eq!(found, status, "{sentence}");
        assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    }
    // A head of one block has no stride of dim; slices are of whole blocks.
    let one = CacheView::blocks_strided(bytes, format, 3, [1, 4, 1, 32], [0, 2, 977, 5]).unwrap();
    assert_eq!(one.seq(1, 2).unwrap().shape(), [1, 2, 1, 32]);
    let view = of(format, [1, 4, 2, 64]).unwrap();
    assert_eq!(view.strides(), [16, 4, 2, 1]);
    assert_eq!(view.dim(32, 32).unwrap().shape(), [1, 4, 2, 32]);
    assert_eq!(view.split_at(Axis::Dim, 32).unwrap().1.shape(), [1, 4, 2, 32]);
    for (status, sentence) in
        [message(view.dim(16, 32).unwrap_err()), message(view.split_at(Axis::Dim, 48).unwrap_err())]
    {
        assert!(
            status == Status::Unsupported && sentence.contains("of the 64") && sentence.contains("32"),
            "{sentence}"
        );
    }
    assert_eq!(message(view.static_scales(&[1.0f32]).unwrap_err()).0, Status::InvalidValue);

    // Blocks that share memory, heads of keys and of values that are no multiple, values in pairs.
    let shared = CacheViewMut::blocks_strided(&mut bytes[..36 * 18], format, 0, [1, 4, 2, 64], [0, 3, 2, 1]);
    assert_eq!(message(shared.unwrap_err()).0, Status::Stride);
    let halves = CacheViewMut::blocks(&mut bytes[..36 * 18], format, [1, 4, 2, 64]).unwrap();
    let (low, high) = halves.split_at(Axis::Heads, 1).unwrap();
    let (k, v) = ([1.0f32; 64], [2.0f32; 64]);
    let (k, v) = (View::new(&k, [1, 1, 1, 64]).unwrap(), View::new(&v, [1, 1, 1, 64]).unwrap());
    // Slices of one buffer that interleave do not overlap.
    kv_write(&context, &Serial, KvWrite::new(k, v, low, high, Destination::positions(&[1]))).unwrap();
    assert!(bytes[..72] == [0x34; 72] && bytes[72..144] != [0x34; 72] && bytes[144..288] == [0x34; 144]);
    let mut pairs = [7u8; 18 * 16];
    let cache = CacheViewMut::blocks(&mut pairs, format, [1, 2, 2, 128]).unwrap();
    let mut keys = vec![0.0f32; 4 * 2 * 64];
    let (k, v) = ([1.0f32; 128], [2.0f32; 128]);
    let write = KvWrite::new(
        View::new(&k, [1, 1, 2, 64]).unwrap(),
        View::new(&v, [1, 1, 2, 64]).unwrap(),
        ViewMut::new(&mut keys, [1, 4, 2, 64]).unwrap(),
        cache,
        Destination::positions(&[0]),
    );
    let (status, sentence) = message(kv_write(&context, &Serial, write.v_packing(Packing::RowPairs)).unwrap_err());
    assert!(status == Status::Unsupported && sentence.contains("q4_0"), "{sentence}");
    assert!(pairs == [7; 18 * 16] && keys.iter().all(|&x| x == 0.0));
    assert_eq!(context.v_packing(format), Packing::Rows);
}
