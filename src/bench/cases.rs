//! The cases of the bench: every kernel of the registry on shapes of real models, through the public API only.
//!
//! 32 query heads over 8 KV heads of 128 are a layer of Llama-3-8B, 32 over 32 one of Llama-2-7B, 9 over 3 of 64 one of
//! SmolLM2-135M; head sizes 80, 96 and 256 are those of Phi-2, Phi-3-mini and Gemma. 128 heads over keys of 576, whose first
//! 512 elements are the values, are a layer of DeepSeek-V3, 16 of them one of DeepSeek-V2-Lite.

use super::data::{Layout, Pages, Tensor};
use super::limits::Kind;
use crate::{
    AttentionOptions, AttentionState, AttentionTensors, CacheFormat, Context, DType, Destination, KernelInfo, KvRead,
    KvWrite, Op, Packing, Pairing, Positions, Precision, Result, RmsNorm, Rope, RopeAngles, RopeFrequencies,
    RopeScaling, Runner, Source, Tuning, Workspace, attention, hadamard, kv_read, kv_write, merge_states, repeat_kv,
    rms_norm, rms_norm_rope, rope, rope_in_place,
};

/// A kernel with a shape.
#[derive(Clone, Debug)]
pub struct Case {
    /// The kernel that is measured.
    pub kernel: KernelInfo,
    /// A description of the shape.
    pub name: String,
    /// Whether it is part of a quick run.
    pub quick: bool,
    /// Whether the work is so little that the overhead of a call matters.
    pub small: bool,
    work: Work,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    Angles { positions: usize, dim: usize },
    Rope { shape: [usize; 4], pairing: Pairing, table: bool, in_place: bool, norm: bool },
    Write { shape: [usize; 4], rope: bool, norm: bool, hadamard: bool, packing: Packing },
    Norm { shape: [usize; 4] },
    Hadamard { shape: [usize; 4] },
    Read { shape: [usize; 4] },
    Repeat { shape: [usize; 4], heads: usize },
    Attention { shape: AttentionShape, layout: Layout, queries: DType, values: CacheFormat },
    Merge { states: usize, shape: [usize; 4] },
}

#[derive(Clone, Copy, Debug)]
struct AttentionShape {
    batch: usize,
    seq: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    /// Elements of a value; fewer than those of a key if values are the first elements of their keys (latent attention).
    v_dim: usize,
}

impl AttentionShape {
    const fn new(batch: usize, seq: usize, keys: usize, heads: usize, kv_heads: usize, dim: usize) -> Self {
        Self { batch, seq, keys, heads, kv_heads, dim, v_dim: dim }
    }

    const fn latent(seq: usize, keys: usize, heads: usize) -> Self {
        Self { v_dim: 512, ..Self::new(1, seq, keys, heads, 1, 576) }
    }

    fn is_latent(&self) -> bool {
        self.v_dim < self.dim
    }

    fn name(&self) -> String {
        let Self { batch, seq, keys, heads, kv_heads, dim, .. } = *self;
        let rows = if batch == 1 { String::new() } else { format!("{batch}x") };
        let keys = match seq {
            1 => format!("decode {rows}{keys}"),
            _ if seq == keys => format!("prefill {rows}{keys}"),
            _ => format!("chunk {rows}{seq} on {keys}"),
        };
        let latent = if self.is_latent() { ", latent" } else { "" };
        format!("{keys}, {heads}/{kv_heads}x{dim}{latent}")
    }

    /// Pairs of a query and a key that it sees, of one head: key j is visible to query i when j <= i + keys - seq.
    fn pairs(&self) -> usize {
        self.batch * (0..self.seq).map(|i| self.keys - self.seq + i + 1).sum::<usize>()
    }

    fn q(&self) -> [usize; 4] {
        [self.batch, self.seq, self.heads, self.dim]
    }

    fn out(&self) -> [usize; 4] {
        [self.batch, self.seq, self.heads, self.v_dim]
    }

    fn kv(&self) -> [usize; 4] {
        [self.batch, self.keys, self.kv_heads, self.dim]
    }

    /// With many keys per query, K and V dominate; with few, queries and output count too.
    fn small(&self) -> bool {
        self.batch * self.keys <= 256
    }
}

fn elements(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const TOKENS: usize = 2048;

/// The cases of a kernel, at least one for every kernel of the registry.
pub fn cases_of(kernel: &KernelInfo) -> Vec<Case> {
    let (src, dst) = (kernel.src, kernel.dst);
    // A decoder whose cache is quantised computes in f32.
    let queries = src.dtype().unwrap_or(DType::F32);
    let mut cases = Vec::new();
    // Blocks are measured in two formats; the others differ in how a block is widened.
    let rare = |format: CacheFormat| format.is_blocks() && !matches!(format, CacheFormat::Q8_0 | CacheFormat::Q4_0);
    let quick_too = !rare(src) && !rare(dst);
    let mut add = |quick: bool, small: bool, name: String, work: Work| {
        if let Work::Attention { shape, .. } = &work
            && !shape.dim.is_multiple_of(src.unit_elements())
        {
            // Such heads have no whole units.
            return;
        }
        cases.push(Case { kernel: *kernel, name, quick: quick && quick_too, small, work });
    };
    // The match is exhaustive, so that an operation without cases does not compile.
    match kernel.op {
        Op::RopeAngles => {
            add(true, false, format!("{TOKENS} positions of {DIM}"), Work::Angles { positions: TOKENS, dim: DIM });
        }
        Op::Rope => {
            // A quick run takes the usual pairs of types only.
            let usual = src == dst || src == DType::F32;
            let heads = HEADS + KV_HEADS;
            for (pairing, p) in [(Pairing::HalfSplit, "half-split"), (Pairing::Interleaved, "interleaved")] {
                for (table, t) in [(true, "table"), (false, "computed")] {
                    let shape = [1, TOKENS, heads, DIM];
                    let work = Work::Rope { shape, pairing, table, in_place: false, norm: false };
                    add(usual && table, false, format!("{TOKENS}x{heads}x{DIM}, {p}, {t}"), work);
                }
            }
            let (pairing, table) = (Pairing::HalfSplit, true);
            if src == dst {
                let work = Work::Rope { shape: [1, TOKENS, heads, DIM], pairing, table, in_place: true, norm: false };
                add(true, false, format!("{TOKENS}x{heads}x{DIM}, half-split, in place"), work);
            }
            let work = Work::Rope { shape: [1, 1, heads, DIM], pairing, table, in_place: false, norm: false };
            add(usual, true, format!("1x{heads}x{DIM}, half-split, table"), work);
            let written = [1, TOKENS, KV_HEADS, DIM];
            let work = Work::Write { shape: written, rope: true, norm: false, hadamard: false, packing: Packing::Rows };
            add(usual, false, format!("with write, {TOKENS}x{KV_HEADS}x{DIM}"), work);
            if src == DType::F32 {
                // A norm in the same pass, which passes f32 to the rotation.
                let work = Work::Rope { shape: [1, TOKENS, heads, DIM], pairing, table, in_place: false, norm: true };
                add(false, false, format!("with norm, {TOKENS}x{heads}x{DIM}"), work);
                let work =
                    Work::Write { shape: written, rope: true, norm: true, hadamard: false, packing: Packing::Rows };
                add(false, false, format!("with norm and write, {TOKENS}x{KV_HEADS}x{DIM}"), work);
            }
        }
        Op::KvWrite => {
            let usual = src == dst || src == DType::F32;
            for tokens in [TOKENS, 1] {
                let shape = [1, tokens, KV_HEADS, DIM];
                let work = Work::Write { shape, rope: false, norm: false, hadamard: false, packing: Packing::Rows };
                add(usual, tokens == 1, format!("{tokens}x{KV_HEADS}x{DIM}"), work);
                if dst == DType::Bf16 {
                    let work =
                        Work::Write { shape, rope: false, norm: false, hadamard: false, packing: Packing::RowPairs };
                    add(false, tokens == 1, format!("{tokens}x{KV_HEADS}x{DIM}, values in pairs"), work);
                }
            }
        }
        Op::KvRead => {
            let usual = dst == DType::F32;
            for tokens in [TOKENS, 1] {
                let work = Work::Read { shape: [1, tokens, KV_HEADS, DIM] };
                add(usual, tokens == 1, format!("{tokens}x{KV_HEADS}x{DIM}"), work);
            }
        }
        Op::RepeatKv => {
            let work = Work::Repeat { shape: [1, TOKENS, KV_HEADS, DIM], heads: HEADS };
            add(true, false, format!("{TOKENS}x{KV_HEADS}x{DIM} to {HEADS} heads"), work);
        }
        Op::Attention => {
            let decode = |batch, keys, heads, kv_heads, dim| AttentionShape::new(batch, 1, keys, heads, kv_heads, dim);
            for (quick, shape) in [
                (true, decode(1, 4096, HEADS, KV_HEADS, DIM)),
                (true, decode(1, 16384, HEADS, KV_HEADS, DIM)),
                (true, decode(8, 2048, HEADS, KV_HEADS, DIM)),
                (true, decode(1, 4096, HEADS, HEADS, DIM)),
                (true, decode(1, 4096, 9, 3, 64)),
                (true, decode(1, 4096, 16 * KV_HEADS, KV_HEADS, DIM)),
                (false, decode(1, 4096, 8 * KV_HEADS, KV_HEADS, DIM)),
                (false, decode(1, 4096, HEADS, KV_HEADS, 80)),
                (false, decode(1, 4096, HEADS, KV_HEADS, 96)),
                (false, decode(1, 4096, HEADS, KV_HEADS, 256)),
            ] {
                for layout in [Layout::Bshd, Layout::Bhsd] {
                    let name = format!("{}, {}", shape.name(), layout.name());
                    add(quick, false, name, Work::Attention { shape, layout, queries, values: src });
                }
            }
            for keys in [1, 16, 64, 256] {
                let shape = decode(1, keys, HEADS, KV_HEADS, DIM);
                add(true, true, shape.name(), Work::Attention { shape, layout: Layout::Bshd, queries, values: src });
            }
            for (quick, shape) in [
                (true, AttentionShape::new(1, 512, 512, HEADS, KV_HEADS, DIM)),
                (true, AttentionShape::new(1, 2048, 2048, HEADS, KV_HEADS, DIM)),
                (true, AttentionShape::new(1, 256, 4096, HEADS, KV_HEADS, DIM)),
            ] {
                add(quick, false, shape.name(), Work::Attention { shape, layout: Layout::Bshd, queries, values: src });
            }
            for (quick, shape) in [
                (true, AttentionShape::latent(1, 4096, 16)),
                (true, AttentionShape::latent(1, 4096, 128)),
                (false, AttentionShape::latent(512, 512, 16)),
            ] {
                add(quick, false, shape.name(), Work::Attention { shape, layout: Layout::Bshd, queries, values: src });
            }
            if queries != DType::F32 {
                // A decoder that computes in f32 and stores in a narrow type.
                for seq in [1, 2048] {
                    let shape = AttentionShape::new(1, seq, if seq == 1 { 4096 } else { seq }, HEADS, KV_HEADS, DIM);
                    let work = Work::Attention { shape, layout: Layout::Bshd, queries: DType::F32, values: src };
                    add(false, false, format!("{}, f32 queries", shape.name()), work);
                }
            }
            if src.dtype().is_none() {
                // Keys and values of different formats: values often need more bits than keys.
                let values = CacheFormat::Bf16;
                for keys in [4096, 16384] {
                    let shape = decode(1, keys, HEADS, KV_HEADS, DIM);
                    let work = Work::Attention { shape, layout: Layout::Bshd, queries, values };
                    add(keys == 4096, false, format!("{}, {values} values", shape.name()), work);
                }
            }
        }
        Op::MergeStates => {
            let (states, shape) = (2, [1, TOKENS, HEADS, DIM]);
            add(true, false, format!("{states} of {TOKENS}x{HEADS}x{DIM}"), Work::Merge { states, shape });
        }
        Op::RmsNorm => {
            let usual = src == dst || src == DType::F32;
            let heads = HEADS + KV_HEADS;
            for tokens in [TOKENS, 1] {
                let work = Work::Norm { shape: [1, tokens, heads, DIM] };
                add(usual, tokens == 1, format!("{tokens}x{heads}x{DIM}"), work);
            }
        }
        Op::Hadamard => {
            let usual = src == dst || src == DType::F32;
            let heads = HEADS + KV_HEADS;
            for (tokens, dim) in [(TOKENS, DIM), (TOKENS, 64), (TOKENS, 256), (1, DIM)] {
                let work = Work::Hadamard { shape: [1, tokens, heads, dim] };
                add(usual && dim == DIM, tokens == 1, format!("{tokens}x{heads}x{dim}"), work);
            }
            let (shape, packing) = ([1, TOKENS, KV_HEADS, DIM], Packing::Rows);
            let work = Work::Write { shape, rope: false, norm: false, hadamard: true, packing };
            add(usual, false, format!("with write, {TOKENS}x{KV_HEADS}x{DIM}"), work);
        }
    }
    cases
}

/// Bytes of keys or of values of a format, with their scales.
fn cache_bytes(format: CacheFormat, shape: [usize; 4]) -> usize {
    let [batch, seq, heads, _] = shape;
    let scales = usize::from(format.has_scales()) + 2 * usize::from(format.is_affine());
    batch * seq * heads * (format.head_bytes(shape[3]) + scales * size_of::<f32>())
}

impl Case {
    /// Its unique name: `<kernel>/<shape>`.
    pub fn id(&self) -> String {
        format!("{}/{}", self.kernel.name, self.name)
    }

    /// Bytes that a call must move: reads plus writes.
    pub fn bytes(&self) -> usize {
        let (from, to) = (self.kernel.src.unit_bytes(), self.kernel.dst.unit_bytes());
        match self.work {
            Work::Angles { positions, dim } => positions * dim * to,
            // The table of angles is not counted, because calls for all layers read it from the CPU's cache.
            Work::Rope { shape, .. } | Work::Norm { shape } | Work::Hadamard { shape } => elements(shape) * (from + to),
            Work::Write { shape, .. } | Work::Read { shape } => {
                2 * (cache_bytes(self.kernel.src, shape) + cache_bytes(self.kernel.dst, shape))
            }
            Work::Repeat { shape, heads } => elements(shape) * from + elements(shape) / shape[2] * heads * to,
            Work::Attention { shape, queries, values, .. } => {
                let v = if shape.is_latent() { 0 } else { cache_bytes(values, shape.kv()) };
                let kv = cache_bytes(self.kernel.src, shape.kv()) + v;
                let rest = (elements(shape.q()) + elements(shape.out())) * queries.size();
                if shape.seq > 1 || shape.small() { kv + rest } else { kv }
            }
            Work::Merge { states, shape } => (states + 1) * elements(shape) * to,
        }
    }

    /// Floating-point operations that a call must do, a multiply-add counted as two; 0 for copies, and for angles,
    /// where the count depends on the method.
    pub fn flops(&self) -> f64 {
        let count = match self.work {
            // A sum per element and bit of an index, and a product.
            Work::Hadamard { shape } | Work::Write { shape, hadamard: true, .. } => {
                (1 + shape[3].ilog2() as usize) * elements(shape)
            }
            Work::Angles { .. } | Work::Write { rope: false, .. } | Work::Repeat { .. } => 0,
            // Per pair: four products and two sums. Per element of a norm: a square, its sum and two products.
            Work::Rope { shape, norm, .. } | Work::Write { shape, rope: true, norm, .. } => {
                (3 + 4 * usize::from(norm)) * elements(shape)
            }
            Work::Norm { shape } => 4 * elements(shape),
            Work::Read { shape } => 2 * elements(shape),
            Work::Attention { shape, .. } => 2 * shape.pairs() * shape.heads * (shape.dim + shape.v_dim),
            Work::Merge { states, shape } => 2 * states * elements(shape),
        };
        count as f64
    }

    /// The memory limit that applies; `None` if there is none.
    pub fn memory_limit(&self, pages: Pages) -> Option<Kind> {
        match self.work {
            Work::Angles { .. } => None,
            Work::Attention { .. } => Some(Kind::Read(self.bytes(), pages)),
            Work::Rope { in_place: true, .. } => Some(Kind::Update(self.bytes(), pages)),
            _ => Some(Kind::Copy(self.bytes(), pages)),
        }
    }

    /// The limit of arithmetic that applies; `None` if a call does none that is counted. It is that of the fastest products that the
    /// features of the kernel's level have for its types.
    pub fn arithmetic_limit(&self) -> Option<Kind> {
        let has = |feature: &str| self.kernel.isa.features().contains(&feature);
        match self.work {
            _ if self.flops() == 0.0 => None,
            Work::Attention { .. } if self.kernel.precision == Some(Precision::Integer) => Some(Kind::Fma),
            Work::Attention { .. } if has("amx-bf16") => Some(Kind::Bf16Tiles),
            Work::Attention { .. } if self.kernel.isa.is_partial() && (has("avx512bf16") || has("bf16")) => {
                Some(Kind::Bf16Dot)
            }
            _ => Some(Kind::Fma),
        }
    }

    /// Allocates the data of a call on pages of a kind, and fills it. `None` if `KVLANE_MAX_ISA` or the CPU selects another
    /// kernel.
    ///
    /// # Errors
    /// The context cannot be created, or there is not enough memory.
    pub fn prepare(&self, pages: Pages) -> Result<Option<Prepared>> {
        let kernel = &self.kernel;
        if !kernel.isa.is_available() {
            return Ok(None);
        }
        let context = Context::with_max_isa(kernel.isa)?;
        let precision = kernel.precision.unwrap_or_default();
        let chosen = context.kernel_for(kernel.op, kernel.src, kernel.dst, precision);
        if chosen.is_none_or(|chosen| chosen.name != kernel.name) {
            return Ok(None);
        }
        let (src, dst) = (kernel.src, kernel.dst);
        let source = |shape| Tensor::new(src, shape, Layout::Bshd, pages);
        let target = |shape| Tensor::new(dst, shape, Layout::Bshd, pages);
        let mut tensors = Vec::new();
        let mut angles = None;
        let mut need_angles = |dim: usize, positions: usize| -> Result<()> {
            let frequencies = RopeFrequencies::new(dim, 500_000.0, &RopeScaling::None)?;
            let (cos, sin) = frequencies.table(&context, positions);
            angles = Some(Angles { frequencies, cos, sin });
            Ok(())
        };
        let (mut lse, mut weight) = (Vec::new(), Vec::new());
        match self.work {
            Work::Angles { positions, dim } => need_angles(dim, positions)?,
            Work::Hadamard { shape } => tensors.extend([source(shape)?, target(shape)?]),
            Work::Norm { shape } => {
                weight = vec![1.0; shape[3]];
                tensors.extend([source(shape)?, target(shape)?]);
            }
            Work::Rope { shape, in_place, .. } => {
                need_angles(shape[3], shape[1])?;
                weight = vec![1.0; shape[3]];
                tensors.push(source(shape)?);
                if !in_place {
                    tensors.push(target(shape)?);
                }
            }
            Work::Write { shape, rope, packing, .. } => {
                if rope {
                    need_angles(shape[3], shape[1])?;
                }
                weight = vec![1.0; shape[3]];
                // Space for whole pairs.
                let [rows, slots, heads, dim] = [shape[0], shape[1].next_multiple_of(2), shape[2], shape[3]];
                let values = match packing {
                    Packing::Rows => [rows, slots, heads, dim],
                    Packing::RowPairs => [rows, slots / 2, heads, 2 * dim],
                };
                tensors.extend([source(shape)?, source(shape)?, target([rows, slots, heads, dim])?, target(values)?]);
            }
            Work::Read { shape } => {
                tensors.extend([source(shape)?, source(shape)?, target(shape)?, target(shape)?]);
            }
            Work::Repeat { shape, heads } => {
                tensors.extend([source(shape)?, target([shape[0], shape[1], heads, shape[3]])?]);
            }
            Work::Attention { shape, layout, queries, values } => {
                let kv = shape.kv();
                tensors.push(Tensor::new(queries, shape.q(), Layout::Bshd, pages)?);
                tensors.push(Tensor::new(src, kv, layout, pages)?);
                if !shape.is_latent() {
                    tensors.push(Tensor::new(values, kv, layout, pages)?);
                }
                tensors.push(Tensor::new(queries, shape.out(), Layout::Bshd, pages)?);
            }
            Work::Merge { states, shape } => {
                lse = vec![0.0; elements(shape) / shape[3]];
                for _ in 0..states {
                    tensors.push(source(shape)?);
                }
                tensors.push(target(shape)?);
            }
        }
        Ok(Some(Prepared {
            context,
            precision,
            work: self.work,
            tensors,
            angles,
            lse,
            weight,
            workspace: Workspace::new(),
        }))
    }
}

struct Angles {
    frequencies: RopeFrequencies,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    fn rope(&self, pairing: Pairing, table: bool) -> Rope<'_> {
        let angles = match table {
            true => RopeAngles::table(&self.cos, &self.sin),
            false => RopeAngles::Frequencies(&self.frequencies),
        };
        Rope::new(pairing, self.frequencies.rotary_dim(), angles, Positions::Offsets(&[0]))
    }
}

/// A case with its data.
pub struct Prepared {
    context: Context,
    precision: Precision,
    work: Work,
    tensors: Vec<Tensor>,
    angles: Option<Angles>,
    lse: Vec<f32>,
    weight: Vec<f32>,
    workspace: Workspace,
}

impl Prepared {
    /// Sets the tuning of the next calls.
    pub fn tune(&mut self, tuning: Tuning) {
        self.context = self.context.clone().tuned(tuning);
    }

    /// One call.
    ///
    /// # Errors
    /// The library rejects the call, or the runner fails.
    pub fn run(&mut self, runner: &dyn Runner) -> Result<()> {
        let Self { context, precision, work, tensors, angles, lse, weight, workspace } = self;
        let norm = RmsNorm::new(1e-6).weight(weight);
        match (*work, &mut tensors[..], angles) {
            (Work::Angles { positions, .. }, [], Some(angles)) => {
                std::hint::black_box(angles.frequencies.table(context, positions));
                Ok(())
            }
            (Work::Rope { pairing, table, in_place: true, .. }, [x], Some(angles)) => {
                rope_in_place(context, runner, x.view_mut()?, &angles.rope(pairing, table))
            }
            (Work::Rope { pairing, table, norm: true, .. }, [src, dst], Some(angles)) => {
                rms_norm_rope(context, runner, src.view()?, dst.view_mut()?, &norm, &angles.rope(pairing, table))
            }
            (Work::Hadamard { shape }, [src, dst], _) => {
                hadamard(context, runner, src.view()?, dst.view_mut()?, shape[3])
            }
            (Work::Norm { .. }, [src, dst], _) => rms_norm(context, runner, src.view()?, dst.view_mut()?, &norm),
            (Work::Rope { pairing, table, .. }, [src, dst], Some(angles)) => {
                rope(context, runner, src.view()?, dst.view_mut()?, &angles.rope(pairing, table))
            }
            (Work::Write { shape, norm: normed, hadamard, packing, .. }, [k, v, k_cache, v_cache], angles) => {
                let mut write = KvWrite::new(
                    k.view()?,
                    v.view()?,
                    k_cache.cache_mut()?,
                    v_cache.cache_mut()?,
                    Destination::positions(&[0]),
                )
                .v_packing(packing);
                write.k_norm = normed.then_some(norm);
                let block = hadamard.then_some(shape[3]);
                (write.k_hadamard, write.v_hadamard) = (block, block);
                write.rope = angles.as_ref().map(|a| a.rope(Pairing::HalfSplit, true));
                kv_write(context, runner, write)
            }
            (Work::Read { .. }, [k_cache, v_cache, k, v], _) => {
                let (k_cache, v_cache) = (k_cache.cache()?, v_cache.cache()?);
                let from = Source::positions(&[0]);
                kv_read(context, runner, KvRead::new(k_cache, v_cache, k.view_mut()?, v.view_mut()?, from))
            }
            (Work::Repeat { .. }, [src, dst], _) => repeat_kv(context, runner, src.view()?, dst.view_mut()?),
            (Work::Attention { shape, .. }, [q, k, v @ .., out], _) => {
                let (k, v) = (k.cache()?, v.first().map(Tensor::cache).transpose()?);
                let tensors = AttentionTensors::new(q.view()?, k, v.unwrap_or(k.dim(0, shape.v_dim)?), out.view_mut()?);
                let options = AttentionOptions::new().causal(true).precision(*precision);
                attention(context, runner, workspace, tensors, &options)
            }
            (Work::Merge { .. }, [a, b, out], _) => {
                let states = [AttentionState::new(a.view()?, &*lse), AttentionState::new(b.view()?, &*lse)];
                merge_states(context, runner, &states, out.view_mut()?, None)
            }
            (work, ..) => unreachable!("prepare() does not make {work:?} so"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Serial, kernels};
    use std::collections::BTreeSet;

    #[test]
    fn every_kernel_has_cases_and_every_case_a_name() {
        let mut ids = BTreeSet::new();
        for kernel in kernels() {
            let cases = cases_of(&kernel);
            // A quick run leaves out conversions of unusual types, and most formats of blocks.
            let rare = kernel.src != kernel.dst || kernel.src.is_blocks();
            assert!(cases.iter().any(|case| case.quick) || rare, "{}", kernel.name);
            assert!(!cases.is_empty(), "{} is in the registry, but has no bench", kernel.name);
            for case in cases {
                assert!(case.name.len() <= 44, "{} does not fit the table", case.name);
                assert!(case.bytes() > 0, "{}", case.id());
                assert!(ids.insert(case.id()), "two cases are called {}", case.id());
            }
        }
    }

    #[test]
    fn small_cases_run() {
        for kernel in kernels() {
            for case in cases_of(&kernel).into_iter().filter(|case| case.bytes() < 1 << 22) {
                if let Some(mut prepared) = case.prepare(Pages::Huge).unwrap() {
                    prepared.run(&Serial).unwrap();
                }
            }
        }
    }

    #[test]
    fn work_is_counted() {
        let shape = AttentionShape::new(2, 3, 5, 4, 2, 8);
        // Queries see 3, 4 and 5 keys.
        assert_eq!(shape.pairs(), 24);
        let case_of = |keys: CacheFormat, values, shape, queries| Case {
            kernel: kernels().find(|k| k.op == Op::Attention && k.src == keys).unwrap(),
            name: String::new(),
            quick: false,
            small: false,
            work: Work::Attention { shape, layout: Layout::Bshd, queries, values },
        };
        let case = |shape, queries| case_of(CacheFormat::F16, CacheFormat::F16, shape, queries);
        let prefill = case(shape, DType::F32);
        assert_eq!(prefill.flops(), (4 * 24 * 4 * 8) as f64);
        assert_eq!(prefill.bytes(), 2 * (2 * 5 * 2 * 8) * 2 + 2 * (2 * 3 * 4 * 8) * 4);
        let decode = case(AttentionShape::new(1, 1, 4096, 32, 8, 128), DType::F16);
        assert_eq!(decode.bytes(), 16 << 20);
        let latent = case(AttentionShape::latent(1, 4096, 16), DType::F16);
        assert_eq!((latent.bytes(), latent.flops()), (4096 * 576 * 2, (2 * 4096 * 16 * (576 + 512)) as f64));
        let mixed =
            case_of(CacheFormat::Int8, CacheFormat::Bf16, AttentionShape::new(1, 1, 4096, 32, 8, 128), DType::F32);
        assert_eq!(mixed.bytes(), (12 << 20) + 4096 * 8 * 4);
    }
}
