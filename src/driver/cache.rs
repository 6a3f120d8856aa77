//! The key/value cache of a whole model: a pair of tensors per layer, and one length per sequence.

use std::collections::BTreeMap;
use std::ops::Range;

use half::{bf16, f16};

use super::error::{Error, Result};
use super::model::{LayerConfig, ModelConfig};
use crate::{
    Affine, AffineScales, CacheBuffer, CacheFormat, CacheView, CacheViewMut, Context, DType, Integers, KeyRotation,
    KvCache, KvLayer, Layout, Runner, UnrotatedKeys, View, ViewMut, Workspace, hadamard_block, reorder_table,
};

/// Prompt tokens per pass. More would enlarge the activations without making a pass more efficient.
pub const PREFILL_CHUNK: usize = 512;

/// The storage formats of the keys and of the values of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formats {
    /// The format of the keys.
    pub k: CacheFormat,
    /// The format of the values.
    pub v: CacheFormat,
    /// Which of both are rotated by Hadamard matrices before they are stored.
    pub rotate: Rotate,
}

/// Which of keys and values are rotated by [Hadamard matrices](crate::hadamard) before they are stored. Attention undoes it, and what a
/// model computes is the same but for rounding; outliers in single channels, which cost a quantised cache its digits, are spread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rotate {
    /// The keys, in the largest blocks that a head has ([`hadamard_block`]).
    pub k: bool,
    /// The values, in blocks of at most 64 elements.
    pub v: bool,
}

impl Rotate {
    /// All choices.
    pub const ALL: [Self; 4] = [
        Self { k: false, v: false },
        Self { k: true, v: false },
        Self { k: false, v: true },
        Self { k: true, v: true },
    ];

    /// `"none"`, `"k"`, `"v"` or `"both"`.
    pub const fn name(self) -> &'static str {
        match (self.k, self.v) {
            (false, false) => "none",
            (true, false) => "k",
            (false, true) => "v",
            (true, true) => "both",
        }
    }

    /// The choice of this name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rotate| rotate.name() == name)
    }

    /// The blocks of keys and of values for heads of `dim` elements.
    pub(super) fn blocks(self, dim: usize) -> [Option<usize>; 2] {
        let block = hadamard_block(dim);
        [block.filter(|_| self.k), block.map(|block| block.min(64)).filter(|_| self.v)]
    }
}

impl Formats {
    /// Keys and values of these formats, not rotated.
    pub const fn new(k: CacheFormat, v: CacheFormat) -> Self {
        Self { k, v, rotate: Rotate::ALL[0] }
    }

    /// The same formats, rotated.
    #[must_use]
    pub const fn rotate(self, rotate: Rotate) -> Self {
        Self { rotate, ..self }
    }

    /// The bytes of the keys and values of one token in one layer, with `heads` heads of `dim` elements. A format with scales
    /// has one per token and head, in f32, and an affine one a zero point too; static scales are 1 here, and take nothing.
    pub fn token_bytes(self, heads: usize, dim: usize) -> usize {
        let bytes = |format: CacheFormat| {
            let scales = usize::from(format.has_scales()) + 2 * usize::from(format.is_affine());
            heads * (format.head_bytes(dim) + scales * size_of::<f32>())
        };
        bytes(self.k) + bytes(self.v)
    }
}

impl From<CacheFormat> for Formats {
    /// Keys and values of one format.
    fn from(format: CacheFormat) -> Self {
        Self::new(format, format)
    }
}

impl From<DType> for Formats {
    /// Keys and values of one type.
    fn from(dtype: DType) -> Self {
        CacheFormat::from(dtype).into()
    }
}

impl std::fmt::Display for Formats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.k == self.v { self.k.fmt(f) } else { write!(f, "{} and {}", self.k, self.v) }?;
        match (self.rotate.k, self.rotate.v) {
            (false, false) => Ok(()),
            (true, false) => f.write_str(", keys rotated"),
            (false, true) => f.write_str(", values rotated"),
            (true, true) => f.write_str(", rotated"),
        }
    }
}

/// The keys or the values of a layer in a format of the library.
#[derive(Debug, Clone)]
enum Buffer {
    F32(CacheBuffer<f32>),
    F16(CacheBuffer<f16>),
    Bf16(CacheBuffer<bf16>),
    /// Units, and a scale per token and head.
    Int8(CacheBuffer<i8>, CacheBuffer<f32>),
    /// Units of an eight-bit float, with scales of 1.
    Fp8(CacheBuffer<u8>, CacheFormat),
    /// Blocks of several elements.
    Blocks(CacheBuffer<u8>, CacheFormat),
    /// Unsigned integers, and a scale and a zero point per token and head.
    Affine(CacheBuffer<u8>, [CacheBuffer<f32>; 2], CacheFormat),
}

/// The description of affine formats here.
const AFFINE: Affine = Affine::new(Integers::Unsigned);

impl Buffer {
    fn zeros(format: CacheFormat, shape: [usize; 4]) -> Result<Self> {
        let [rows, slots, heads, dim] = shape;
        let tokens = rows * slots * heads;
        let len = tokens * dim;
        Ok(match format {
            CacheFormat::F32 => Self::F32(CacheBuffer::zeroed(len)?),
            CacheFormat::F16 => Self::F16(CacheBuffer::zeroed(len)?),
            CacheFormat::Bf16 => Self::Bf16(CacheBuffer::zeroed(len)?),
            CacheFormat::Int8 => Self::Int8(CacheBuffer::zeroed(len)?, CacheBuffer::zeroed(tokens)?),
            CacheFormat::Fp8E4m3 | CacheFormat::Fp8E5m2 => Self::Fp8(CacheBuffer::zeroed(len)?, format),
            CacheFormat::Q8_0
            | CacheFormat::Q4_0
            | CacheFormat::Q4_1
            | CacheFormat::Q5_0
            | CacheFormat::Q5_1
            | CacheFormat::Iq4Nl => Self::Blocks(CacheBuffer::zeroed(tokens * format.head_bytes(dim))?, format),
            CacheFormat::Affine8 | CacheFormat::Affine4 => {
                let units = CacheBuffer::zeroed(tokens * format.head_bytes(dim))?;
                Self::Affine(units, [CacheBuffer::zeroed(tokens)?, CacheBuffer::zeroed(tokens)?], format)
            }
        })
    }

    fn view(&self, shape: [usize; 4]) -> Result<CacheView<'_>> {
        Ok(match self {
            Self::F32(v) => View::new(v, shape)?.into(),
            Self::F16(v) => View::new(v, shape)?.into(),
            Self::Bf16(v) => View::new(v, shape)?.into(),
            Self::Int8(units, scales) => CacheView::int8(units, shape, View::new(scales, of_scales(shape))?)?,
            Self::Fp8(units, format) => CacheView::fp8(units, *format, shape)?,
            Self::Blocks(units, format) => CacheView::blocks(units, *format, shape)?,
            Self::Affine(units, [scales, zeros], format) => {
                let scales = AffineScales::fixed(View::new(scales, of_scales(shape))?);
                let scales = scales.zeros(View::new(zeros, of_scales(shape))?);
                CacheView::affine(units, *format, shape, AFFINE, scales)?
            }
        })
    }

    fn view_mut(&mut self, shape: [usize; 4]) -> Result<CacheViewMut<'_>> {
        Ok(match self {
            Self::F32(v) => ViewMut::new(v, shape)?.into(),
            Self::F16(v) => ViewMut::new(v, shape)?.into(),
            Self::Bf16(v) => ViewMut::new(v, shape)?.into(),
            Self::Int8(units, scales) => CacheViewMut::int8(units, shape, ViewMut::new(scales, of_scales(shape))?)?,
            Self::Fp8(units, format) => CacheViewMut::fp8(units, *format, shape)?,
            Self::Blocks(units, format) => CacheViewMut::blocks(units, *format, shape)?,
            Self::Affine(units, [scales, zeros], format) => {
                let scales = AffineScales::written(ViewMut::new(scales, of_scales(shape))?);
                let scales = scales.zeros(ViewMut::new(zeros, of_scales(shape))?);
                CacheViewMut::affine(units, *format, shape, AFFINE, scales)?
            }
        })
    }
}

/// One scale per token and head.
fn of_scales([rows, slots, heads, _]: [usize; 4]) -> [usize; 4] {
    [rows, slots, heads, 1]
}

/// One layer's keys and values, `[rows, slots, kv_heads, head_dim]` each.
#[derive(Debug, Clone)]
struct LayerCache {
    k: Buffer,
    v: Buffer,
    shape: [usize; 4],
    /// The window of a layer that keeps rings, as [`LayerConfig::window`].
    ring: Option<usize>,
    /// The first keys of every row before their rotation, `[rows, sinks, kv_heads, head_dim]`; see [`Cache::keep_sinks`].
    unrotated: Vec<f32>,
}

/// Keys and values of every layer, initially zero, in [`CacheBuffer`]s.
///
/// Each row holds one sequence. Its length is the number of tokens that it holds and the position of the next token.
/// Slots beyond the length are never read.
///
/// Layers with a window keep rings. A ring has slots for the window and for the tokens of one pass, because the last
/// token of a pass must not overwrite the window of the first query. The other layers keep every token.
///
/// # Kinds
/// | made by | layers with a window | sequences | for |
/// | --- | --- | --- | --- |
/// | [`new`](Self::new), [`with_chunk`](Self::with_chunk) | rings | a row each | requests |
/// | [`without_rings`](Self::without_rings) | every token | a row each | going back, and trees of [guesses](super::Speculation) |
/// | [`with_beams`](Self::with_beams) | every token | share tokens by a table | [beam search](super::BeamSearch) |
/// | [`Decoder::cache`](super::Decoder::cache) | as the first, or every token of a segment | a row each | a process of a [mesh](super::mesh) |
#[derive(Debug, Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    lengths: Vec<i32>,
    /// The greatest length of each row since it was emptied. It decides which tokens of a ring are overwritten, even
    /// after a truncation.
    most: Vec<i32>,
    /// The number of tokens that each row has lost while positions ran on.
    dropped: Vec<i32>,
    /// The number of first tokens whose unrotated keys are kept; see [`Self::keep_sinks`].
    sinks: Option<usize>,
    /// The number of first tokens of each row whose unrotated keys are there.
    copies: Vec<usize>,
    capacity: usize,
    chunk: usize,
    formats: Formats,
    /// `[rows, capacity]`: the row in which each token of each sequence lies, if sequences share tokens.
    table: Option<Vec<i32>>,
    /// The positions whose tokens it holds, if not all. Lengths are those of whole sequences nevertheless.
    segment: Option<Range<usize>>,
}

/// Asks for memory where a refusal is no abort.
fn can_be_allocated(bytes: usize) -> bool {
    let mut memory = Vec::<u8>::new();
    let fits = memory.try_reserve_exact(bytes).is_ok();
    // A compiler may leave out an allocation that nothing uses, and believe that it fits.
    std::hint::black_box(&memory);
    fits
}

/// The slots that a layer needs for sequences of up to `capacity` tokens, with at most `chunk` new tokens per pass.
fn slots(ring: Option<usize>, capacity: usize, chunk: usize) -> usize {
    ring.map_or(capacity, |window| window.saturating_add(chunk).min(capacity))
}

/// The window of a layer that keeps rings where memory counts.
fn ring_of(layer: &LayerConfig) -> Option<usize> {
    layer.window
}

impl Cache {
    /// Room for `rows` sequences of up to `capacity` tokens, with at most [`PREFILL_CHUNK`] new tokens per pass.
    pub fn new(config: &ModelConfig, rows: usize, capacity: usize, formats: impl Into<Formats>) -> Result<Self> {
        Self::with_chunk(config, rows, capacity, PREFILL_CHUNK, formats)
    }

    /// Checks whether [`Self::new`] can make a cache, and returns its size in bytes.
    pub fn bytes_for(config: &ModelConfig, rows: usize, capacity: usize, formats: impl Into<Formats>) -> Result<usize> {
        Self::check(config, rows, capacity, PREFILL_CHUNK, formats.into(), &|layer| {
            slots(ring_of(layer), capacity, PREFILL_CHUNK)
        })
    }

    fn check(
        config: &ModelConfig,
        rows: usize,
        capacity: usize,
        chunk: usize,
        formats: Formats,
        slots: &dyn Fn(&LayerConfig) -> usize,
    ) -> Result<usize> {
        if chunk == 0 {
            return Err(Error::argument("0 tokens of a row in one pass; at least 1 is needed"));
        }
        for format in [formats.k, formats.v] {
            let (n, dim) = (format.unit_elements(), config.head_dim);
            if !dim.is_multiple_of(n) {
                return Err(Error::argument(format!(
                    "a cache in {format} has units of {n} elements, but the model's heads have {dim}, which is no multiple"
                )));
            }
        }
        if formats.rotate != Rotate::default() && hadamard_block(config.head_dim).is_none() {
            return Err(Error::argument(format!(
                "heads of {} elements are not rotated: no power of two from 2 on divides that",
                config.head_dim
            )));
        }
        let per_token = formats.token_bytes(config.kv_heads, config.head_dim);
        let bytes_of = |layer: &LayerConfig| rows.checked_mul(slots(layer))?.checked_mul(per_token);
        let bytes = config.layers.iter().try_fold(0usize, |sum, layer| sum.checked_add(bytes_of(layer)?));
        // Slots of all rows are numbered in `i32`.
        let numbered = rows.max(1).checked_mul(capacity).filter(|&n| i32::try_from(n).is_ok());
        match (bytes, numbered) {
            (Some(bytes), Some(_)) if can_be_allocated(bytes) => Ok(bytes),
            _ => Err(Error::argument(format!(
                "a cache of {rows} rows with {capacity} tokens in {} layers does not fit into memory",
                config.layers.len()
            ))),
        }
    }

    /// As [`Self::new`], with at most `chunk` new tokens per sequence and pass. A smaller chunk makes the rings of
    /// layers with a window smaller.
    pub fn with_chunk(
        config: &ModelConfig,
        rows: usize,
        capacity: usize,
        chunk: usize,
        formats: impl Into<Formats>,
    ) -> Result<Self> {
        Self::with_kind(config, rows, capacity, chunk, formats.into(), ring_of, None)
    }

    /// As [`Self::new`], but layers with a window keep every token too, so that a row can go back to any length and
    /// [`Decoder::keep`](super::Decoder::keep) can close gaps.
    pub fn without_rings(
        config: &ModelConfig,
        rows: usize,
        capacity: usize,
        formats: impl Into<Formats>,
    ) -> Result<Self> {
        Self::with_kind(config, rows, capacity, PREFILL_CHUNK, formats.into(), |_| None, None)
    }

    /// Room for the tokens at the positions `segment` of `rows` sequences of up to `capacity` tokens. Every layer keeps
    /// every token.
    pub(super) fn with_segment(
        config: &ModelConfig,
        rows: usize,
        capacity: usize,
        chunk: usize,
        segment: Range<usize>,
        formats: Formats,
    ) -> Result<Self> {
        Self::with_kind(config, rows, capacity, chunk, formats, |_| None, Some(segment))
    }

    /// Room for `beams` sequences that share tokens. A token lies in the row that has written it, and a table names this
    /// row for every position of every sequence. [`Decoder::reorder`](super::Decoder::reorder) replaces sequences by
    /// others and moves entries of the table, but no token. Every layer keeps every token.
    ///
    /// A row that would overwrite a token of another row gets an error instead of new tokens. This happens only if a
    /// row has been emptied or shortened whose tokens others share.
    pub fn with_beams(
        config: &ModelConfig,
        beams: usize,
        capacity: usize,
        formats: impl Into<Formats>,
    ) -> Result<Self> {
        let cache = Self::without_rings(config, beams, capacity, formats)?;
        Ok(Self { table: Some(vec![0; beams * capacity]), ..cache })
    }

    /// `ring` is the window of a layer that keeps rings.
    fn with_kind(
        config: &ModelConfig,
        rows: usize,
        capacity: usize,
        chunk: usize,
        formats: Formats,
        ring: fn(&LayerConfig) -> Option<usize>,
        segment: Option<Range<usize>>,
    ) -> Result<Self> {
        let held = segment.as_ref().map_or(capacity, Range::len);
        let slots = |layer: &LayerConfig| slots(ring(layer), held, chunk);
        Self::check(config, rows, capacity, chunk, formats, &slots)?;
        let shape = |layer: &LayerConfig| [rows, slots(layer), config.kv_heads, config.head_dim];
        let layer = |layer: &LayerConfig| {
            let (shape, ring) = (shape(layer), ring(layer));
            Ok(LayerCache {
                k: Buffer::zeros(formats.k, shape)?,
                v: Buffer::zeros(formats.v, shape)?,
                shape,
                ring,
                unrotated: Vec::new(),
            })
        };
        Ok(Self {
            layers: config.layers.iter().map(layer).collect::<Result<_>>()?,
            lengths: vec![0; rows],
            most: vec![0; rows],
            dropped: vec![0; rows],
            sinks: None,
            copies: vec![0; rows],
            capacity,
            chunk,
            formats,
            table: None,
            segment,
        })
    }

    /// The number of sequences that fit.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// The number of tokens that a row can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The most new tokens of a row in one pass.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// The formats of keys and values.
    pub fn formats(&self) -> Formats {
        self.formats
    }

    /// The blocks of the Hadamard rotations of keys and of values.
    pub(super) fn hadamard(&self) -> [Option<usize>; 2] {
        let dim = self.layers.first().map_or(0, |layer| layer.shape[3]);
        self.formats.rotate.blocks(dim)
    }

    /// The positions whose tokens it holds, if not all.
    pub(super) fn segment(&self) -> Option<&Range<usize>> {
        self.segment.as_ref()
    }

    /// The number of tokens that it holds of the first `tokens`.
    fn held(&self, tokens: usize) -> usize {
        match &self.segment {
            Some(segment) => tokens.clamp(segment.start, segment.end) - segment.start,
            None => tokens,
        }
    }

    /// The number of tokens that it holds in each row.
    fn held_lengths(&self) -> Vec<i32> {
        self.lengths.iter().map(|&n| self.held(n as usize) as i32).collect()
    }

    /// The number of tokens in each row.
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }

    /// The number of tokens in row `row`.
    pub fn len(&self, row: usize) -> usize {
        self.lengths[row] as usize
    }

    /// Whether all rows are empty.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&n| n == 0)
    }

    /// The size of all keys and values in bytes, with their scales.
    pub fn bytes(&self) -> usize {
        let layer = |&LayerCache { shape: [rows, slots, heads, dim], .. }: &LayerCache| {
            rows * slots * self.formats.token_bytes(heads, dim)
        };
        let unrotated = self.layers.iter().map(|layer| size_of_val(&layer.unrotated[..])).sum::<usize>();
        self.layers.iter().map(layer).sum::<usize>() + unrotated
    }

    /// Keeps the keys of the first `sinks` tokens of every row before their rotation, too, in f32. An eviction behind them
    /// then rotates no other key again, however often it happens; see [`KvCache::evict_running`]. The rows become empty.
    pub fn keep_sinks(&mut self, sinks: usize) -> Result<()> {
        let rows = self.rows();
        for LayerCache { shape: [_, _, heads, dim], unrotated, .. } in &mut self.layers {
            let len = rows.checked_mul(sinks).and_then(|n| n.checked_mul(*heads * *dim));
            let Some(len) = len.filter(|&n| sinks <= self.capacity && isize::try_from(n).is_ok()) else {
                return Err(Error::argument(format!("{sinks} sink tokens, but a row holds {} tokens", self.capacity)));
            };
            *unrotated = vec![0.0; len];
        }
        self.sinks = Some(sinks);
        (0..rows).for_each(|row| self.reset(row));
        Ok(())
    }

    /// Keeps the first `len` tokens of a row and forgets the others. No data moves.
    ///
    /// A ring that has wrapped around can forget at most [`chunk`](Self::chunk) + 1 of its newest tokens, because
    /// older ones have been overwritten. Otherwise this is an error, and nothing has changed. Forgetting all tokens is
    /// always possible.
    pub fn truncate(&mut self, row: usize, len: usize) -> Result<()> {
        let len = len.min(self.len(row));
        if len == 0 {
            self.reset(row);
            return Ok(());
        }
        for &LayerCache { shape: [_, slots, ..], ring, .. } in &self.layers {
            let Some(window) = ring else { continue };
            let (seen, kept) = ((len + 1).saturating_sub(window), (self.most[row] as usize).saturating_sub(slots));
            if seen < kept {
                return Err(Error::argument(format!(
                    "row {row} cannot go back from {} tokens to {len}: the next one would see those from {seen} on, but a \
                     ring of {slots} slots holds those from {kept} on",
                    self.len(row)
                )));
            }
        }
        self.lengths[row] = len as i32;
        self.copies[row] = self.copies[row].min(len);
        Ok(())
    }

    /// Empties a row.
    pub fn reset(&mut self, row: usize) {
        (self.lengths[row], self.most[row], self.dropped[row], self.copies[row]) = (0, 0, 0, 0);
    }

    /// The number of tokens that still fit into a row.
    pub fn room(&self, row: usize) -> usize {
        self.capacity() - self.len(row)
    }

    pub(super) fn advance(&mut self, row: usize, tokens: usize) {
        self.lengths[row] += tokens as i32;
        self.most[row] = self.most[row].max(self.lengths[row]);
        let (len, sinks) = (self.len(row), self.sinks.unwrap_or(0));
        // Copies count as long as none is missing before them.
        if len - tokens <= self.copies[row] {
            self.copies[row] = self.copies[row].max(len.min(sinks));
        }
    }

    /// What is added to a position of each row for RoPE.
    pub(super) fn rope_offsets(&self) -> &[i32] {
        &self.dropped
    }

    /// Keeps a key before its rotation if its token is one of the first.
    pub(super) fn keep_unrotated(&mut self, layer: usize, row: usize, position: usize, key: &[f32]) {
        if let Some(sinks) = self.sinks.filter(|&sinks| position < sinks) {
            self.layers[layer].unrotated[(row * sinks + position) * key.len()..][..key.len()].copy_from_slice(key);
        }
    }

    /// Whether the keys before position `start` of a row can be rotated anew.
    pub(super) fn can_run_on(&self, row: usize, start: usize) -> bool {
        self.sinks.is_some() && self.copies.get(row).is_some_and(|&copies| start <= copies)
    }

    /// [`KvCache::copy_prefix`] in all layers.
    pub(super) fn copy_prefix(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        from: usize,
        to: &[usize],
        tokens: usize,
    ) -> Result<()> {
        self.check_unshared("copying")?;
        let rows: Vec<i32> = to.iter().map(|&row| i32::try_from(row).unwrap_or(i32::MAX)).collect();
        let mut lengths = self.lengths.clone();
        let length = lengths.get(from).copied().unwrap_or(0);
        if self.segment.is_some() && tokens > length as usize {
            return Err(Error::argument(format!("{tokens} tokens to copy, but row {from} holds {length}")));
        }
        let (held, copied) = (self.held_lengths(), self.held(tokens));
        for (layout, mut layers) in self.kinds()? {
            // Every kind of layer starts from the lengths before the copy.
            let mut own = held.clone();
            KvCache::new(&mut layers, layout, &mut own).copy_prefix(context, runner, from, &rows, copied)?;
        }
        let sinks = self.sinks.unwrap_or(0);
        for &row in to {
            lengths[row] = tokens as i32;
            self.most[row] = tokens as i32;
            self.dropped[row] = self.dropped[from];
            self.copies[row] = self.copies[from].min(tokens);
            for LayerCache { shape: [_, _, heads, dim], unrotated, .. } in &mut self.layers {
                let n = sinks * *heads * *dim;
                unrotated.copy_within(from * n..(from + 1) * n, row * n);
            }
        }
        self.lengths = lengths;
        Ok(())
    }

    /// [`KvCache::insert_sequence`] in all layers, with all tokens of the row.
    pub(super) fn insert(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        row: usize,
        from: &mut Self,
        from_row: usize,
    ) -> Result<()> {
        self.check_unshared("writing")?;
        from.check_unshared("copying")?;
        let length = from.lengths.get(from_row).copied().unwrap_or(0);
        if self.layers.len() != from.layers.len() {
            return Err(Error::argument(format!(
                "a row of {} layers for a cache of {}",
                from.layers.len(),
                self.layers.len()
            )));
        }
        from.check_rotation(self)?;
        if self.segment != from.segment {
            return Err(Error::argument(format!(
                "a row that holds the positions {:?} for a cache of {:?}",
                from.segment, self.segment
            )));
        }
        let (own, theirs, held) = (self.held_lengths(), from.held_lengths(), from.held(length as usize));
        for ((layout, mut layers), (from_layout, mut from_layers)) in self.kinds()?.into_iter().zip(from.kinds()?) {
            let (mut own, mut theirs) = (own.clone(), theirs.clone());
            let mut source = KvCache::new(&mut from_layers, from_layout, &mut theirs);
            let mut target = KvCache::new(&mut layers, layout, &mut own);
            target.insert_sequence(context, runner, row, &mut source, from_row, held)?;
        }
        (self.lengths[row], self.most[row], self.dropped[row]) = (length, length, from.dropped[from_row]);
        let [sinks, from_sinks] = [self.sinks, from.sinks].map(|sinks| sinks.unwrap_or(0));
        self.copies[row] = from.copies[from_row].min(sinks);
        for (layer, other) in self.layers.iter_mut().zip(&from.layers) {
            let [.., heads, dim] = layer.shape;
            let (n, token) = (self.copies[row] * heads * dim, heads * dim);
            let source = &other.unrotated[from_row * from_sinks * token..][..n];
            layer.unrotated[row * sinks * token..][..n].copy_from_slice(source);
        }
        Ok(())
    }

    /// Checks that rows can be copied to another cache: what is stored would be read with the rotation of that.
    pub(super) fn check_rotation(&self, to: &Self) -> Result<()> {
        if self.formats.rotate == to.formats.rotate {
            return Ok(());
        }
        Err(Error::argument(format!(
            "a row of a cache in {} for one in {}: both must be rotated alike",
            self.formats, to.formats
        )))
    }

    /// The layers by the window of their rings, which decides layout and slots.
    fn kinds(&mut self) -> Result<Vec<(Layout<'static>, Vec<KvLayer<'_>>)>> {
        let mut kinds: BTreeMap<Option<usize>, Vec<KvLayer<'_>>> = BTreeMap::new();
        for LayerCache { k, v, shape, ring, .. } in &mut self.layers {
            kinds.entry(*ring).or_default().push(KvLayer::new(k.view_mut(*shape)?, v.view_mut(*shape)?));
        }
        let layout = |ring: Option<usize>| if ring.is_some() { Layout::ring(0) } else { Layout::Contiguous };
        Ok(kinds.into_iter().map(|(ring, layers)| (layout(ring), layers)).collect())
    }

    /// Checks that a row has its tokens to itself.
    fn check_unshared(&self, what: &str) -> Result<()> {
        match &self.table {
            Some(_) => Err(Error::unsupported(format!(
                "{what} a row of a cache of {} beams, whose rows share tokens",
                self.rows()
            ))),
            None => Ok(()),
        }
    }

    /// Checks that it holds whole sequences.
    fn check_whole(&self, what: &str) -> Result<()> {
        match &self.segment {
            Some(segment) => Err(Error::unsupported(format!(
                "{what} a row of a cache that holds the positions {} to {} alone",
                segment.start, segment.end
            ))),
            None => Ok(()),
        }
    }

    /// Checks that tokens can move from position to position.
    pub(super) fn check_gaps_close(&self) -> Result<()> {
        match self.layers.iter().find_map(|layer| layer.ring) {
            Some(window) => Err(Error::unsupported(format!(
                "closing a gap in a row of a cache with rings, in which layers keep a window of {window} tokens"
            ))),
            None => self.check_whole("closing a gap in").and_then(|()| self.check_unshared("closing a gap in")),
        }
    }

    /// [`KvCache::evict`] in all layers, none of which may be a ring.
    pub(super) fn evict(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        row: usize,
        span: Range<usize>,
        rotations: &[Option<KeyRotation>],
    ) -> Result<()> {
        self.check_gaps_close()?;
        let (start, mut lengths) = (span.start, self.lengths.clone());
        for (layout, mut layers) in self.kinds()? {
            KvCache::new(&mut layers, layout, &mut lengths).evict(context, runner, row, span.clone(), rotations)?;
        }
        self.lengths = lengths;
        self.copies[row] = self.copies[row].min(start);
        Ok(())
    }

    /// [`KvCache::evict_running`] in all layers, none of which may have a window.
    pub(super) fn evict_running(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        row: usize,
        span: Range<usize>,
        rotations: &[KeyRotation],
    ) -> Result<()> {
        self.check_gaps_close()?;
        let sinks = self.sinks.unwrap_or(0);
        let (mut layers, mut unrotated) = (Vec::new(), Vec::new());
        for (LayerCache { k, v, shape, unrotated: keys, .. }, &rotation) in self.layers.iter_mut().zip(rotations) {
            layers.push(KvLayer::new(k.view_mut(*shape)?, v.view_mut(*shape)?));
            let [.., heads, dim] = *shape;
            let keys = &keys[row * sinks * heads * dim..][..sinks * heads * dim];
            unrotated.push(Some(UnrotatedKeys::new(View::new(keys, [1, sinks, heads, dim])?, rotation)));
        }
        let dropped = self.dropped[row];
        KvCache::new(&mut layers, Layout::Contiguous, &mut self.lengths).evict_running(
            context,
            runner,
            row,
            span.clone(),
            dropped as usize,
            &unrotated,
        )?;
        self.dropped[row] += span.len() as i32;
        self.copies[row] = self.copies[row].min(span.start);
        Ok(())
    }

    /// Replaces every row b by what row `parents[b]` was: entries of the table, if there is one, otherwise tokens.
    pub(super) fn reorder(&mut self, context: &Context, runner: &dyn Runner, parents: &[i32]) -> Result<()> {
        self.check_whole("replacing")?;
        let (mut workspace, capacity) = (Workspace::new(), self.capacity);
        if let Some(table) = &mut self.table {
            reorder_table(&mut workspace, table, capacity, &mut self.lengths, parents)?;
        } else {
            let before = self.lengths.clone();
            let mut after = before.clone();
            for (layout, mut layers) in self.kinds()? {
                // Every kind of layer starts from the lengths before.
                after.clone_from(&before);
                KvCache::new(&mut layers, layout, &mut after).reorder(context, runner, &mut workspace, parents)?;
            }
            self.lengths = after;
        }
        let of = |list: &[i32]| parents.iter().map(|&parent| list[parent as usize]).collect();
        (self.most, self.dropped) = (of(&self.most), of(&self.dropped));
        self.copies = parents.iter().map(|&parent| self.copies[parent as usize]).collect();
        for layer in &mut self.layers {
            let row = layer.unrotated.len() / parents.len().max(1);
            let old = &layer.unrotated;
            let new = parents.iter().flat_map(|&parent| &old[parent as usize * row..][..row]).copied().collect();
            layer.unrotated = new;
        }
        Ok(())
    }

    /// Prepares the table for `tokens` new tokens of a row, which are an error if another row has tokens in their slots.
    pub(super) fn claim(&mut self, row: usize, tokens: usize) -> Result<()> {
        let Some(table) = &mut self.table else { return Ok(()) };
        let start = self.lengths[row] as usize;
        for (other, (sequence, &length)) in table.chunks(self.capacity.max(1)).zip(&self.lengths).enumerate() {
            let held = start..(start + tokens).min(length as usize);
            let shared = held.clone().find(|&p| other != row && sequence[p] == row as i32);
            if let Some(p) = shared {
                return Err(Error::argument(format!(
                    "row {row} would write its position {p} again, where row {other} has a token of its own"
                )));
            }
        }
        table[row * self.capacity + start..][..tokens].fill(row as i32);
        Ok(())
    }

    /// The layout in which attention reads a layer, and the layer's slots per row.
    pub(super) fn layout(&self, layer: usize) -> (Layout<'_>, usize) {
        let &LayerCache { shape: [_, slots, ..], ring, .. } = &self.layers[layer];
        let layout = match &self.table {
            Some(table) => Layout::indirect(table),
            None if ring.is_some() => Layout::ring(0),
            None => Layout::Contiguous,
        };
        (layout, slots)
    }

    /// The keys and the values of a layer, `[rows, slots, kv_heads, head_dim]`, as they are stored: keys after RoPE, and both after their
    /// [`Rotate`]. A layer without
    /// a window holds position p of a row in slot p, one with a window in slot p modulo the number of slots; a cache of a segment
    /// counts slots from its first position. Slots that
    /// no token has reached since the cache was made are zero.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn views(&self, layer: usize) -> Result<(CacheView<'_>, CacheView<'_>)> {
        let LayerCache { k, v, shape, .. } = &self.layers[layer];
        Ok((k.view(*shape)?, v.view(*shape)?))
    }

    pub(super) fn views_mut(&mut self, layer: usize) -> Result<(CacheViewMut<'_>, CacheViewMut<'_>)> {
        let LayerCache { k, v, shape, .. } = &mut self.layers[layer];
        Ok((k.view_mut(*shape)?, v.view_mut(*shape)?))
    }
}
