//! One attention call with owned tensors and options, so that it can be repeated in other ways.

use super::int8::quantise;
use super::memory::Memory;
use super::oracle;
use super::rng::Rng;
use super::tensor::{Array, Gaps, Layout, Place, Tensor, indices};
use kvlane::{
    AttentionOptions, AttentionTensors, BitMask, CacheFormat, CacheView, Context, DType, Error, Mask, Precision,
    Runner, Serial, Workspace, attention,
};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// The setting in which a test makes its calls.
#[derive(Clone)]
pub struct Setting {
    pub precision: Precision,
    /// Types of K and V.
    pub kv_types: Vec<DType>,
    /// The formats in which K and V are quantised before attention reads them, if they are.
    pub quantised: [Option<CacheFormat>; 2],
}

/// The largest error of each kernel that was compared with its bound, in the bound's unit.
pub static LARGEST_ERRORS: Mutex<BTreeMap<&'static str, f64>> = Mutex::new(BTreeMap::new());

thread_local! {
    static SETTING: RefCell<Setting> =
        RefCell::new(Setting { precision: Precision::Default, kv_types: DType::ALL.to_vec(), quantised: [None; 2] });
}

/// The precision of calls from this thread.
pub fn precision() -> Precision {
    SETTING.with_borrow(|setting| setting.precision)
}

/// The types of K and V to test.
pub fn kv_types() -> Vec<DType> {
    SETTING.with_borrow(|setting| setting.kv_types.clone())
}

/// The formats in which K and V are quantised before attention reads them, if they are.
pub fn quantised() -> [Option<CacheFormat>; 2] {
    SETTING.with_borrow(|setting| setting.quantised)
}

/// The formats in which attention reads keys and values of these types.
pub fn formats(k: DType, v: DType) -> [CacheFormat; 2] {
    let [keys, values] = quantised();
    [(k, keys), (v, values)].map(|(dtype, format)| format.unwrap_or(dtype.into()))
}

/// A tensor as the keys of a cache.
pub fn keys(tensor: &Tensor) -> CacheView<'_> {
    quantised()[0].map_or_else(|| tensor.view().into(), |format| tensor.quantised(format).view())
}

/// A tensor as the values of a cache.
pub fn values(tensor: &Tensor) -> CacheView<'_> {
    quantised()[1].map_or_else(|| tensor.view().into(), |format| tensor.quantised(format).view())
}

/// The numbers that attention reads.
fn read(tensor: &Tensor, format: Option<CacheFormat>) -> Array {
    let Some(format) = format else { return tensor.array() };
    let cache = tensor.quantised(format);
    Array { shape: tensor.shape, data: indices(tensor.shape).map(|at| cache.get(at)).collect() }
}

/// The numbers that queries are rounded to where their products with int8 keys, or keys in blocks, are added up as integers.
fn integer_queries(q: &Tensor) -> Array {
    let [batch, tokens, heads, dim] = q.shape;
    let rows = indices([batch, tokens, heads, 1]).flat_map(|[b, t, h, _]| {
        let row: Vec<f32> = (0..dim).map(|d| q.get([b, t, h, d])).collect();
        let (units, scale) = quantise(&row, DType::F32);
        units.into_iter().map(move |unit| f64::from(unit) * f64::from(scale))
    });
    Array { shape: q.shape, data: rows.collect() }
}

/// Runs a test in a setting.
pub fn with_setting<T>(setting: Setting, test: impl FnOnce() -> T) -> T {
    let before = SETTING.replace(setting);
    let result = test();
    SETTING.set(before);
    result
}

/// A boolean mask with its own memory.
pub struct MaskTensor {
    memory: Memory,
    shape: [usize; 4],
    strides: [i64; 4],
    offset: usize,
}

impl MaskTensor {
    /// A mask whose axes of stride 0 broadcast.
    pub fn new(
        shape: [usize; 4],
        strides: [i64; 4],
        place: Place,
        mut visible: impl FnMut([usize; 4]) -> bool,
    ) -> Self {
        let reach = |sign: i64| -> usize {
            (0..4)
                .map(|a| (shape[a] as i64 - 1).max(0) * strides[a])
                .filter(|r| r * sign > 0)
                .sum::<i64>()
                .unsigned_abs() as usize
        };
        let empty = shape.contains(&0);
        let elements = if empty { 0 } else { reach(1) + reach(-1) + 1 };
        let mut mask = Self { memory: Memory::new(elements, place), shape, strides, offset: reach(-1) };
        for at in indices(shape) {
            // Indices can share an entry; the first decides.
            if (0..4).all(|a| strides[a] != 0 || at[a] == 0) {
                let i = mask.index(at);
                mask.memory.bytes_mut()[i] = visible(at).into();
            }
        }
        mask
    }

    fn index(&self, at: [usize; 4]) -> usize {
        let steps: i64 = (0..4).map(|axis| at[axis] as i64 * self.strides[axis]).sum();
        (self.offset as i64 + steps) as usize
    }

    pub fn get(&self, at: [usize; 4]) -> bool {
        self.memory.bytes()[self.index(at)] != 0
    }

    /// The same mask with axes of one element, and any stride, where it has strides of 0.
    pub fn narrowed(mut self) -> Self {
        narrow(&mut self.shape, &mut self.strides);
        self
    }

    pub fn view(&self) -> Mask<'_> {
        Mask::strided(self.memory.bools(), self.offset, self.shape, self.strides).expect("a mask of its own memory")
    }
}

/// Gives axes of stride 0 one element and a stride that is never used.
pub fn narrow(shape: &mut [usize; 4], strides: &mut [i64]) {
    for (n, stride) in shape.iter_mut().zip(strides).filter(|(_, stride)| **stride == 0) {
        (*n, *stride) = (1, 977);
    }
}

/// A bit mask with its own memory, of exactly the bytes that it needs.
pub struct BitMaskTensor {
    memory: Memory,
    shape: [usize; 4],
    /// In bits.
    strides: [i64; 3],
    offset: usize,
    first_keys: Vec<i32>,
    rows: Option<BitRows>,
}

/// Rows of their own width.
struct BitRows {
    starts: Vec<i64>,
    query_strides: Vec<i64>,
    /// The numbers of queries and keys with bits.
    own: Vec<[usize; 2]>,
}

impl BitMaskTensor {
    /// A mask whose axes of stride 0 broadcast, and whose first bit is at `offset`.
    pub fn new(
        shape: [usize; 4],
        strides: [i64; 3],
        offset: usize,
        first_keys: Vec<i32>,
        place: Place,
        mut visible: impl FnMut([usize; 4]) -> bool,
    ) -> Self {
        let last: i64 = (0..3).map(|a| (shape[a] as i64 - 1).max(0) * strides[a]).sum();
        let bytes = (offset + last as usize + shape[3]).div_ceil(8);
        let mut mask = Self { memory: Memory::new(bytes, place), shape, strides, offset, first_keys, rows: None };
        mask.memory.bytes_mut().fill(0x5a);
        for at in indices(shape) {
            if (0..3).all(|a| strides[a] != 0 || at[a] == 0) {
                mask.set(mask.bit(at), visible(at));
            }
        }
        mask
    }

    /// As [`MaskTensor::narrowed`].
    pub fn narrowed(mut self) -> Self {
        narrow(&mut self.shape, &mut self.strides);
        self
    }

    /// The same mask for sequences with these numbers of queries and keys, each of its own width, one after another.
    /// Other bits of the buffer, up to the byte of the last bit, are noise.
    pub fn by_row(&self, rng: &mut Rng, queries: &[usize], lengths: &[i32]) -> Self {
        let heads = self.shape[2];
        let (mut rows, mut end) = (BitRows { starts: vec![], query_strides: vec![], own: vec![] }, 0);
        for (b, &n) in queries.iter().enumerate() {
            let keys = (lengths[b] - self.first_keys[b]).max(0) as usize;
            rows.own.push([n, keys]);
            if n == 0 || keys == 0 {
                // A sequence without bits may have any bit offset.
                rows.starts.push(rng.pick(&[0, i64::MAX]));
                rows.query_strides.push(rng.pick(&[0, i64::MAX]));
                continue;
            }
            let stride = if self.strides[1] == 0 { 0 } else { keys + if rng.chance(0.5) { 0 } else { rng.below(9) } };
            rows.starts.push((end + rng.below(11)) as i64);
            rows.query_strides.push(stride as i64);
            end = rows.starts[b] as usize + (n - 1) * stride + keys;
        }
        let head_stride = if self.strides[2] == 0 { 0 } else { end as i64 };
        let bytes = (end + (heads - 1) * head_stride as usize).div_ceil(8);
        let mut mask = Self {
            memory: Memory::new(bytes, Place::GuardAfter),
            shape: self.shape,
            strides: [0, 0, head_stride],
            offset: 0,
            first_keys: self.first_keys.clone(),
            rows: None,
        };
        mask.memory.bytes_mut().fill_with(|| rng.u64() as u8);
        let own = rows.own.clone();
        mask.rows = Some(rows);
        for (b, [queries, keys]) in own.into_iter().enumerate() {
            for [t, h, j] in indices([queries, heads, keys, 1]).map(|[t, h, j, _]| [t, h, j]) {
                let visible = self.get([b, t, h, self.first_keys[b] as usize + j]);
                mask.set(mask.bit([b, t, h, j]), visible);
            }
        }
        mask
    }

    /// Inverts the bits that belong to no query and key.
    pub fn disturb(&mut self) {
        let own = self.rows.as_ref().expect("rows of their own width").own.clone();
        let mut kept = vec![false; self.memory.bytes().len() * 8];
        for (b, [queries, keys]) in own.into_iter().enumerate() {
            indices([queries, self.shape[2], keys, 1]).for_each(|[t, h, j, _]| kept[self.bit([b, t, h, j])] = true);
        }
        for (bit, _) in kept.into_iter().enumerate().filter(|(_, kept)| !kept) {
            self.memory.bytes_mut()[bit / 8] ^= 1 << (bit % 8);
        }
    }

    fn set(&mut self, bit: usize, visible: bool) {
        let byte = &mut self.memory.bytes_mut()[bit / 8];
        *byte = *byte & !(1 << (bit % 8)) | u8::from(visible) << (bit % 8);
    }

    /// The same mask with other strides, and without a guard page.
    pub fn spread(&self) -> Self {
        let [_, tokens, heads, keys] = self.shape;
        let head = keys as i64 + 5;
        let token = head * heads as i64;
        let strides = [token * tokens as i64 + 3, token, head];
        Self::new(self.shape, strides, 7, self.first_keys.clone(), Place::Heap, |at| {
            let [b, t, _, j] = at;
            // Only the bits that a sequence has.
            let has = self.rows.as_ref().is_none_or(|rows| t < rows.own[b][0] && j < rows.own[b][1]);
            has && self.is_set(self.bit(at))
        })
    }

    fn bit(&self, at: [usize; 4]) -> usize {
        let steps = match &self.rows {
            None => (0..3).map(|axis| at[axis] as i64 * self.strides[axis]).sum::<i64>(),
            Some(rows) => {
                rows.starts[at[0]] + at[1] as i64 * rows.query_strides[at[0]] + at[2] as i64 * self.strides[2]
            }
        };
        self.offset + steps as usize + at[3]
    }

    fn is_set(&self, bit: usize) -> bool {
        self.memory.bytes()[bit / 8] >> (bit % 8) & 1 == 1
    }

    /// Whether a query may see a key.
    pub fn get(&self, [b, t, h, key]: [usize; 4]) -> bool {
        let Some(column) = key.checked_sub(self.first_keys[b] as usize) else { return true };
        self.is_set(self.bit([b, t, h, column]))
    }

    pub fn view(&self) -> BitMask<'_> {
        let bytes = self.memory.bytes();
        let mask = match &self.rows {
            None => BitMask::strided(bytes, self.offset, self.shape, self.strides),
            Some(rows) => BitMask::per_sequence(bytes, &rows.starts, &rows.query_strides, self.strides[2], self.shape),
        };
        mask.expect("a mask of its own memory").with_first_keys(&self.first_keys)
    }
}

/// The options, owned.
#[derive(Default)]
pub struct Options {
    pub scale: Option<f32>,
    pub softcap: Option<f32>,
    pub causal: bool,
    pub window_left: Option<u32>,
    pub window_right: Option<u32>,
    pub lengths: Option<Vec<i32>>,
    pub kv_starts: Option<Vec<i32>>,
    pub offsets: Option<Vec<i32>>,
    pub query_positions: Option<Vec<i32>>,
    pub prefix_lengths: Option<Vec<i32>>,
    pub mask: Option<MaskTensor>,
    pub bit_mask: Option<BitMaskTensor>,
    pub bias: Option<Tensor>,
    pub alibi: Option<Vec<f32>>,
    pub sink_logits: Option<Vec<f32>>,
}

impl Options {
    pub fn borrow(&self) -> AttentionOptions<'_> {
        let mut options = AttentionOptions::new().causal(self.causal).precision(precision());
        options.scale = self.scale;
        options.softcap = self.softcap;
        options.window_left = self.window_left;
        options.window_right = self.window_right;
        options.lengths = self.lengths.as_deref();
        options.kv_starts = self.kv_starts.as_deref();
        options.offsets = self.offsets.as_deref();
        options.query_positions = self.query_positions.as_deref();
        options.prefix_lengths = self.prefix_lengths.as_deref();
        options.mask = self.mask.as_ref().map(MaskTensor::view);
        options.bit_mask = self.bit_mask.as_ref().map(BitMaskTensor::view);
        options.bias = self.bias.as_ref().map(Tensor::view);
        options.alibi_slopes = self.alibi.as_deref();
        options.sink_logits = self.sink_logits.as_deref();
        options
    }
}

/// One attention call.
pub struct Case {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub out_dtype: DType,
    pub out_layout: Layout,
    pub out_place: Place,
    pub options: Options,
}

/// The shape of a call.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub batch: usize,
    pub tokens: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub keys: usize,
    pub dim: usize,
    pub v_dim: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Self { batch: 1, tokens: 1, kv_heads: 1, group: 1, keys: 70, dim: 64, v_dim: 64 }
    }
}

impl Shape {
    pub fn q(&self) -> [usize; 4] {
        [self.batch, self.tokens, self.kv_heads * self.group, self.dim]
    }
    pub fn k(&self) -> [usize; 4] {
        [self.batch, self.keys, self.kv_heads, self.dim]
    }
    pub fn v(&self) -> [usize; 4] {
        [self.batch, self.keys, self.kv_heads, self.v_dim]
    }
    /// `[batch, tokens, heads, keys]`: of masks and biases.
    pub fn scores(&self) -> [usize; 4] {
        [self.batch, self.tokens, self.kv_heads * self.group, self.keys]
    }
}

/// The result of a call.
pub struct Outcome {
    pub out: Tensor,
    pub lse: Vec<f32>,
}

impl Outcome {
    /// Bits of output and LSE of one token of one sequence.
    pub fn row_bits(&self, b: usize, t: usize) -> Vec<u32> {
        let [_, tokens, heads, dim] = self.out.shape;
        let mut bits: Vec<u32> = Vec::with_capacity(heads * (dim + 1));
        for h in 0..heads {
            bits.extend((0..dim).map(|d| self.out.bits([b, t, h, d])));
            bits.push(self.lse[(b * tokens + t) * heads + h].to_bits());
        }
        bits
    }

    pub fn all_bits(&self) -> Vec<u32> {
        let [batch, tokens, ..] = self.out.shape;
        (0..batch).flat_map(|b| (0..tokens).flat_map(move |t| self.row_bits(b, t))).collect()
    }
}

impl Case {
    /// Random f32 queries and output, K and V of a type, all contiguous on the heap. Heads have whole units of the formats in which
    /// they are quantised.
    pub fn new(rng: &mut Rng, shape: Shape, kv: DType) -> Self {
        let whole =
            |n: usize, format: Option<CacheFormat>| n.next_multiple_of(format.map_or(1, CacheFormat::unit_elements));
        let [k_format, v_format] = quantised();
        let shape = Shape { dim: whole(shape.dim, k_format), v_dim: whole(shape.v_dim, v_format), ..shape };
        let random = |rng: &mut Rng, dtype, shape| Tensor::random(rng, dtype, shape, Layout::BSHD, Place::Heap);
        Self {
            q: random(rng, DType::F32, shape.q()),
            k: random(rng, kv, shape.k()),
            v: random(rng, kv, shape.v()),
            out_dtype: DType::F32,
            out_layout: Layout::BSHD,
            out_place: Place::Heap,
            options: Options::default(),
        }
    }

    /// With options.
    pub fn with(mut self, set: impl FnOnce(&mut Options)) -> Self {
        set(&mut self.options);
        self
    }

    /// The same call with its tensors in other layouts and places.
    pub fn moved(&self, [q, k, v, out]: [Layout; 4], place: Place, options: Options) -> Self {
        Self {
            q: self.q.to(q, place),
            k: self.k.to(k, place),
            v: self.v.to(v, place),
            out_dtype: self.out_dtype,
            out_layout: out,
            out_place: place,
            options,
        }
    }

    pub fn run_with(&self, context: &Context, runner: &dyn Runner) -> Result<Outcome, Error> {
        self.run_in(context, runner, &mut Workspace::new())
    }

    pub fn run_in(&self, context: &Context, runner: &dyn Runner, workspace: &mut Workspace) -> Result<Outcome, Error> {
        self.run_on(context, runner, workspace, (&self.k, &self.v), self.options.borrow())
    }

    /// The call with another cache and other options.
    pub fn run_on(
        &self,
        context: &Context,
        runner: &dyn Runner,
        workspace: &mut Workspace,
        (k, v): (&Tensor, &Tensor),
        options: AttentionOptions,
    ) -> Result<Outcome, Error> {
        let [batch, tokens, heads, _] = self.q.shape;
        let shape = [batch, tokens, heads, self.v.shape[3]];
        let mut out = Tensor::output(self.out_dtype, shape, self.out_layout, self.out_place);
        let mut lse = vec![f32::NAN; batch * tokens * heads];
        let tensors = AttentionTensors::new(self.q.view(), keys(k), values(v), out.view_mut()).lse(&mut lse);
        let done = attention(context, runner, workspace, tensors, &options);
        if let Err(error) = done {
            out.assert_untouched();
            assert!(lse.iter().all(|x| x.is_nan()), "an LSE was written in spite of {error}");
            return Err(error);
        }
        out.assert_gaps();
        Ok(Outcome { out, lse })
    }

    #[track_caller]
    pub fn run(&self, context: &Context) -> Outcome {
        self.run_with(context, &Serial).expect("a valid call")
    }

    pub fn oracle(&self) -> oracle::State {
        let [keys, values] = quantised();
        self.oracle_over(&read(&self.k, keys), &read(&self.v, values))
    }

    /// The result over other keys and values.
    fn oracle_over(&self, k: &Array, v: &Array) -> oracle::State {
        let options = &self.options;
        let (bytes, bits) = (options.mask.as_ref(), options.bit_mask.as_ref());
        let shown = move |at| bytes.is_none_or(|m| m.get(at)) && bits.is_none_or(|m| m.get(at));
        let mask = (bytes.is_some() || bits.is_some()).then_some(shown);
        let bias = options.bias.as_ref().map(|b| move |at| f64::from(b.get(at)));
        let attention = oracle::Attention {
            scale: options.scale.map(f64::from),
            softcap: options.softcap.map(f64::from),
            causal: options.causal,
            window_left: options.window_left,
            window_right: options.window_right,
            lengths: options.lengths.as_deref(),
            kv_starts: options.kv_starts.as_deref(),
            offsets: options.offsets.as_deref(),
            query_positions: options.query_positions.as_deref(),
            prefix_lengths: options.prefix_lengths.as_deref(),
            mask: mask.as_ref().map(|f| f as &dyn Fn([usize; 4]) -> bool),
            bias: bias.as_ref().map(|f| f as &dyn Fn([usize; 4]) -> f64),
            alibi: options.alibi.as_deref(),
            sink_logits: options.sink_logits.as_deref(),
        };
        let integer = precision() == Precision::Integer
            && quantised()[0].is_some_and(|format| format == CacheFormat::Int8 || format.is_blocks());
        let queries = if integer { integer_queries(&self.q) } else { self.q.array() };
        attention.run(&queries, k, v)
    }

    /// Checks a result against the kernel's bound.
    #[track_caller]
    pub fn assert_close(&self, context: &Context, outcome: &Outcome, what: &dyn Fn() -> String) {
        self.assert_close_to_state(context, &self.oracle(), outcome, what);
    }

    /// The same over other keys and values, in f32, which the result is of.
    #[track_caller]
    pub fn assert_close_to(
        &self,
        context: &Context,
        (k, v): (&Tensor, &Tensor),
        outcome: &Outcome,
        what: &dyn Fn() -> String,
    ) {
        self.assert_close_to_state(context, &self.oracle_over(&k.array(), &v.array()), outcome, what);
    }

    #[track_caller]
    fn assert_close_to_state(
        &self,
        context: &Context,
        want: &oracle::State,
        outcome: &Outcome,
        what: &dyn Fn() -> String,
    ) {
        let [k, v] = formats(self.k.dtype, self.v.dtype);
        let kernels = context.attention_kernels(k, v, precision());
        let kernel = if kernels[0].max_error < kernels[1].max_error { kernels[1] } else { kernels[0] };
        let bound = f64::from(kernel.max_error);
        let mut largest = 0f64;
        let [batch, tokens, heads, v_dim] = outcome.out.shape;
        for b in 0..batch {
            for t in 0..tokens {
                for h in 0..heads {
                    let row = (b * tokens + t) * heads + h;
                    let sentence = || format!("{}: row [{b}, {t}, {h}]", what());
                    // A logit of magnitude m is rounded to m * 2^-24 per step, which exp turns into a relative error.
                    // The bound covers logits of up to 32, more than a softmax that is not one-hot has.
                    let condition = (want.magnitude[row] / 32.0).max(1.0);
                    let allowed = bound * condition * want.value[row];
                    for d in 0..v_dim {
                        let x = want.out.row(b, t, h)[d];
                        if outcome.out.dtype == DType::F32 && x.is_finite() && want.value[row] > 0.0 {
                            let error = (f64::from(outcome.out.get([b, t, h, d])) - x).abs();
                            largest = largest.max(error / (condition * want.value[row]));
                        }
                        let allowed = allowed + half_ulp(outcome.out.dtype, x.abs() + allowed);
                        close(outcome.out.get([b, t, h, d]).into(), x, allowed, || {
                            format!("{} element {d}", sentence())
                        });
                    }
                    let lse = want.lse[row];
                    let allowed = bound * condition * (1.0 + lse.abs());
                    close(outcome.lse[row].into(), lse, allowed, || format!("{} LSE", sentence()));
                }
            }
        }
        let mut errors = LARGEST_ERRORS.lock().unwrap();
        let entry = errors.entry(kernel.name).or_default();
        *entry = entry.max(largest);
    }
}

use super::{close, half_ulp};

/// A bias of a type, random, with a share of -inf.
pub fn random_bias(
    rng: &mut Rng,
    dtype: DType,
    shape: [usize; 4],
    strides: [i64; 4],
    place: Place,
    hidden: f64,
) -> Tensor {
    let mut bias = Tensor::strided(dtype, shape, strides, place, Gaps::Poison);
    bias.fill(|_| if rng.chance(hidden) { f32::NEG_INFINITY } else { rng.f32() });
    bias
}
