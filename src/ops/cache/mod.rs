//! Operations on a cache as a whole, in all layers of a model at once.
//!
//! Work is cut by layer, by K and V, and by heads if layers alone would not keep all threads busy. Inside a piece, tokens move
//! in a fixed order on one thread, so that moves whose slots depend on each other need no synchronisation.

mod beam;
mod evict;
mod lengths;
mod pages;
mod rows;
mod shared_scales;

pub use beam::{reorder_table, reorder_table_workspace_size, reorder_workspace_size, set_table_tokens};
pub use evict::{KeyRotation, UnrotatedKeys};
pub use pages::{copy_pages, defragment_pages};

#[cfg(feature = "capi")]
pub(crate) use beam::{reorder_raw, reorder_table_raw, reorder_workspace_size_raw};
#[cfg(feature = "capi")]
pub(crate) use evict::{RawRotation, RawUnrotated, evict_raw, evict_running_raw};
#[cfg(feature = "capi")]
pub(crate) use pages::{copy_pages_raw, defragment_pages_raw};
#[cfg(feature = "capi")]
pub(crate) use rows::{copy_prefix_raw, insert_sequence_raw, reset_raw};

use crate::cache_view::CacheViewMut;
use crate::context::Context;
use crate::dtype::DType;
use crate::error::{Error, Result, ensure};
use crate::format::CacheFormat;
use crate::kernels::api::{CopyArgs, CopyFn, Op};
use crate::layout::{Layout, Place};
use crate::ops::heads::{HeadKernels, Scales, Turn, check_staged};
use crate::ops::write::tokens_sharing;
use crate::ops::{COPY_GRAIN, vectors_copy};
use crate::parallel::{Runner, for_each_tile, workers_for};
use crate::problem::limits::MAX_HEAD_DIM;
use crate::problem::rotation::Pairing;
use crate::view::{BATCH, DIM, HEADS, RawAffine, RawCacheView, RawView, SEQ, Units};
use shared_scales::{Blocks, Fixed, Load, scales_have_places};
use std::ops::Range;

/// The cache of one layer: keys and values, `[batch, slots, kv_heads, dim]` each. The layout of the [`KvCache`] defines the
/// first two axes.
#[derive(Debug)]
#[non_exhaustive]
pub struct KvLayer<'a> {
    /// Keys.
    pub k: CacheViewMut<'a>,
    /// Values, with a `dim` and a format of their own; absent if keys and values share memory.
    pub v: Option<CacheViewMut<'a>>,
}

impl<'a> KvLayer<'a> {
    /// A layer with keys and values.
    pub fn new(k: impl Into<CacheViewMut<'a>>, v: impl Into<CacheViewMut<'a>>) -> Self {
        Self { k: k.into(), v: Some(v.into()) }
    }

    /// A layer whose values share the memory of its keys (latent attention).
    pub fn keys(k: impl Into<CacheViewMut<'a>>) -> Self {
        Self { k: k.into(), v: None }
    }
}

/// The caches of all layers that have one layout and one list of lengths.
///
/// Layers that differ in capacity or layout, as windows and full attention in one model, are two of these.
///
/// | operation | effect | bytes moved |
/// | --- | --- | --- |
/// | [`set_lengths`](Self::set_lengths), [`advance`](Self::advance) | sets lengths after tokens were written | none |
/// | [`truncate`](Self::truncate) | removes the last tokens (rejected speculation) | none |
/// | [`reset`](Self::reset) | empties sequences, and fills them with zeros on request | none, or the sequences |
/// | [`insert_sequence`](Self::insert_sequence) | copies a sequence of another cache, of any format and layout | the sequence |
/// | [`copy_prefix`](Self::copy_prefix) | copies the first tokens of a sequence to other sequences | the prefix |
/// | [`reorder`](Self::reorder) | replaces sequences by their parents (beam search) | the sequences that change |
/// | [`reorder_table`](crate::reorder_table), [`set_table_tokens`](crate::set_table_tokens) | the same by a table | none |
/// | [`evict`](Self::evict) | drops tokens, closes the gap, and rotates keys to their new positions | all tokens after the gap |
/// | [`evict_running`](Self::evict_running) | the same without drift: positions run on, and the first keys are rotated anew | all tokens after the gap |
/// | [`copy_pages`](crate::copy_pages), [`defragment_pages`](crate::defragment_pages) | moves pages of a pool | the pages that move |
///
/// All layers agree in the first two axes of their views; heads, dims and formats may differ. Everything is checked in every
/// layer before the first byte moves, and nothing is clamped. Lengths change last, and only if the operation succeeds.
///
/// Thread safety: an operation takes the cache exclusively, which `&mut` ensures. Operations on disjoint caches may run on any
/// number of threads at once.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// // Two layers, two sequences of eight slots, one head of four elements.
/// let mut memory = vec![0.0f32; 4 * 2 * 8 * 4];
/// let mut layers: Vec<KvLayer> = Vec::new();
/// for layer in memory.chunks_exact_mut(2 * 2 * 8 * 4) {
///     let (k, v) = layer.split_at_mut(2 * 8 * 4);
///     k[..12].fill(1.0); // three tokens of sequence 0
///     layers.push(KvLayer::new(ViewMut::new(k, [2, 8, 1, 4])?, ViewMut::new(v, [2, 8, 1, 4])?));
/// }
/// let mut lengths = [3, 0];
/// let mut cache = KvCache::new(&mut layers, Layout::Contiguous, &mut lengths);
/// cache.copy_prefix(&context, &Serial, 0, &[1], 2)?;
/// cache.advance(&[0, 1])?; // after a write of one token to sequence 1
/// cache.truncate(&[3, 2], None)?; // which was a bad guess
/// assert!(cache.advance(&[6, 0]).is_err()); // no room for nine
/// assert_eq!(lengths, [3, 2]);
/// drop(layers);
/// assert_eq!(memory[8 * 4 + 7], 1.0);
/// # Ok::<(), kvlane::Error>(())
/// ```
///
/// # Beam search without copies
/// With [`Layout::Indirect`], the tokens of a beam stay where they were written, and a table names, for every sequence and
/// position, the sequence of the cache that holds the token. A step is:
///
/// 1. [`kv_write`](crate::kv_write) with [`Layout::Contiguous`]: the new token of sequence b goes to sequence b of the cache,
///    slot `lengths[b]`;
/// 2. [`set_table_tokens`](crate::set_table_tokens) enters it in the table; then lengths advance by one;
/// 3. [`attention`](crate::attention()) with [`Layout::Indirect`];
/// 4. choose parents; [`reorder_table`](crate::reorder_table) permutes the sequences of the table and the lengths.
///
/// No slot is overwritten while a sequence still needs it, as long as the sequences that share tokens are equally long: all
/// slots of a position are then written in one step, each by its own sequence, and later steps write later positions only. A
/// sequence that goes back, to a shorter parent or by [`truncate`](Self::truncate), would write positions again. If a token of
/// another sequence lies there, the call is refused.
///
/// # Dropping tokens in two ways
/// RoPE has rotated the key of position p by the angles `p * f`. When `n` tokens before it are dropped, a score must depend on
/// the new distance between query and key. There are two ways:
///
/// - **Rotate the tokens after the gap** ([`evict`](Self::evict)). A rotation by `-n * f` gives a key the rotation of position
///   `p - n`. All keys after the gap take the same angles, which are computed once, in f64. A factor on cosines and sines
///   (YaRN, LongRoPE) is in the keys already and is not applied again. Positions stay dense: the next token takes RoPE position
///   `length`. Every call rounds the moved keys once more.
/// - **Let positions run on** ([`evict_running`](Self::evict_running)). Scores depend on differences of positions only, so keys
///   after the gap can keep the positions they were written with, if later queries and keys continue from there: the next token
///   takes RoPE position `length + dropped`, where `dropped` counts all tokens that the sequence has lost. Only the keys before
///   the gap are then too far away. They are few (attention sinks), and are written again from copies that were never rotated,
///   at positions `t + dropped`. No key is rounded twice.
///
/// A rotation by a small angle moves a 16-bit element by less than half a unit in its last place, and rounds back to where it
/// was. Many small evictions by the first way therefore leave keys at positions they no longer have. Attention over 300 of
/// 1,300 random tokens (heads of 64 elements, base 10000), largest error of the output against f64, values in [-1, 1]:
///
/// | cache | 1,000 times `evict` of one token | one `evict` of 1,000 tokens | 1,000 times `evict_running` of one token |
/// | --- | --- | --- | --- |
/// | f32 | 1.3e-5 | 1.2e-6 | 1.2e-6 |
/// | f16 | 0.079 | 0.00061 | 0.00058 |
/// | bf16 | 0.41 | 0.0055 | 0.0035 |
///
/// So `evict` suits a cache that drops a large part at once and rarely. A stream that drops a little at every step takes
/// `evict_running`.
#[derive(Debug)]
#[non_exhaustive]
pub struct KvCache<'a, 'v> {
    /// The layers; at least one.
    pub layers: &'a mut [KvLayer<'v>],
    /// The slots in which the tokens of a sequence lie, in every layer.
    pub layout: Layout<'a>,
    /// `[batch]`: how many tokens each sequence was given. Operations that change lengths write it.
    pub lengths: &'a mut [i32],
}

impl<'a, 'v> KvCache<'a, 'v> {
    /// A cache of these layers, in this layout, with these lengths.
    pub fn new(layers: &'a mut [KvLayer<'v>], layout: Layout<'a>, lengths: &'a mut [i32]) -> Self {
        Self { layers, layout, lengths }
    }
}

impl KvCache<'_, '_> {
    /// The same as the raw operations have it, lent to `call`.
    fn with_raw<T>(&mut self, call: impl FnOnce(&mut RawCache) -> Result<T>) -> Result<T> {
        let layers = SafeLayers(self.layers);
        call(&mut RawCache { layers: &layers, layout: self.layout, lengths: self.lengths })
    }
}

/// [`KvLayer`] without lifetimes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawLayer {
    pub k: RawCacheView,
    pub v: Option<RawCacheView>,
}

/// The layers of a stack, as a caller has them: there is no list of raw layers, since a call allocates nothing.
pub(crate) trait Layers: Sync {
    fn count(&self) -> usize;

    /// Layer i, not validated; an error only where the caller's form of it stands for nothing.
    fn layer(&self, i: usize) -> Result<RawLayer>;
}

/// The layers of the safe API.
struct SafeLayers<'a, 'v>(&'a [KvLayer<'v>]);

// SAFETY: what is shared is addresses; tiles of an operation touch different elements.
unsafe impl Sync for SafeLayers<'_, '_> {}

impl Layers for SafeLayers<'_, '_> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn layer(&self, i: usize) -> Result<RawLayer> {
        let layer = &self.0[i];
        Ok(RawLayer { k: layer.k.raw, v: layer.v.as_ref().map(|v| v.raw) })
    }
}

/// [`KvCache`] as the C ABI has it.
pub(crate) struct RawCache<'a> {
    pub layers: &'a dyn Layers,
    pub layout: Layout<'a>,
    pub lengths: &'a mut [i32],
}

impl RawCache<'_> {
    /// Checks everything but table entries; returns the keys of the first layer, whose first two axes are those of all.
    fn validate(&self) -> Result<RawView<CacheFormat>> {
        let first = validate_layers(self.layers)?;
        validate_rows(&self.layout, &first, self.lengths)?;
        Ok(first)
    }

    /// Checks a sequence that the caller names.
    fn check_row(&self, what: &str, row: impl TryInto<i64>) -> Result<usize> {
        let (row, rows) = (row.try_into().unwrap_or(i64::MAX), self.lengths.len());
        ensure!(row >= 0 && (row as usize) < rows, OutOfRange, "{what} is {row}, but the cache has {rows} sequences");
        Ok(row as usize)
    }

    fn length(&self, row: usize) -> usize {
        self.lengths[row] as usize
    }
}

/// Checks the views of all layers, against each other too; returns the keys of the first layer.
fn validate_layers(layers: &dyn Layers) -> Result<RawView<CacheFormat>> {
    let n = layers.count();
    ensure!(n > 0, Shape, "the cache has no layers");
    let first = layers.layer(0).map_err(|e| in_layer(0, e))?.k.units;
    for i in 0..n {
        let check = || {
            let layer = layers.layer(i)?;
            layer.k.validate_output("k")?;
            for axis in [BATCH, SEQ] {
                layer.k.same_axis("k", &first, "k of layer 0", axis)?;
            }
            if let Some(v) = &layer.v {
                v.validate_output("v")?;
                for axis in [BATCH, SEQ, HEADS] {
                    v.same_axis("v", &layer.k, "k", axis)?;
                }
            }
            Ok(())
        };
        check().map_err(|e| in_layer(i, e))?;
    }
    for i in 1..2 * n {
        if let Some(a) = cache_at(layers, i)? {
            check_apart(layers, i, &a, "the cache")?;
        }
    }
    Ok(first)
}

/// An error that names the layer.
fn in_layer(layer: usize, e: Error) -> Error {
    Error::new(e.status(), format!("layer {layer}: {}", e.message()))
}

/// The name of cache i in its layer.
fn plane(i: usize) -> &'static str {
    ["k", "v"][i % 2]
}

/// Checks that a view shares no memory with the caches of `layers` before number `end`.
fn check_apart(layers: &dyn Layers, end: usize, view: &RawCacheView, whose: &str) -> Result<()> {
    let a = view.validate("view")?;
    for j in 0..end {
        if let Some(b) = cache_at(layers, j)?
            && b.overlaps_cache(b.validate("view")?, view, a)
        {
            let name = plane(j);
            crate::error::fail!(Overlap, "{name} of layer {} shares memory with another view of {whose}", j / 2);
        }
    }
    Ok(())
}

/// Cache i: the keys or the values of layer i / 2, if it has them.
fn cache_at(layers: &dyn Layers, i: usize) -> Result<Option<RawCacheView>> {
    let layer = layers.layer(i / 2)?;
    Ok(if i.is_multiple_of(2) { Some(layer.k) } else { layer.v })
}

/// Checks layout and lengths; table entries are checked where they are used.
fn validate_rows(layout: &Layout, cache: &RawView<CacheFormat>, lengths: &[i32]) -> Result<()> {
    layout.validate("the cache", cache)?;
    let n = lengths.len();
    let rows = layout.rows(cache).unwrap_or(n);
    ensure!(n == rows, Shape, "lengths has {n} entries, but the cache has {rows} sequences");
    for (row, &length) in lengths.iter().enumerate() {
        let capacity = layout.capacity(cache, row);
        ensure!(
            length >= 0 && length as usize <= capacity,
            OutOfRange,
            "lengths[{row}] is {length}, but the sequence holds {capacity}"
        );
    }
    Ok(())
}

/// The positions that a sequence of `length` tokens holds: one range, and for a ring that has gone round a second one.
fn held(layout: &Layout, cache: &RawView<CacheFormat>, length: usize) -> [Range<usize>; 2] {
    match *layout {
        Layout::Ring { sink_tokens } => {
            let newest = layout.retained_from(cache, length).max(sink_tokens);
            [0..sink_tokens.min(length), newest.min(length)..length]
        }
        _ => [0..length, length..length],
    }
}

/// The positions that a sequence of `length` tokens held once and holds no more.
fn lost(layout: &Layout, cache: &RawView<CacheFormat>, length: usize) -> Range<usize> {
    match *layout {
        Layout::Ring { sink_tokens } => sink_tokens..layout.retained_from(cache, length).max(sink_tokens),
        _ => 0..0,
    }
}

/// Checks that positions which a sequence is to have are none of those that it has lost.
fn check_held(range: &Range<usize>, lost: &Range<usize>, row: usize, length: usize) -> Result<()> {
    let first = range.start.max(lost.start);
    ensure!(
        first >= range.end.min(lost.end),
        OutOfRange,
        "position {first} of sequence {row} would be visible, but the ring, which was given {length} tokens, has overwritten \
         positions {} to {}",
        lost.start,
        lost.end - 1
    );
    Ok(())
}

/// Checks that no sequence but `sequence` has a page that holds positions `from..to` of it, and that it has none of them twice;
/// `others` tells how many tokens of another sequence count. Layouts without pages share nothing.
fn check_pages_unshared(
    layout: &Layout,
    cache: &RawView<CacheFormat>,
    row: usize,
    (from, to): (usize, usize),
    others: &dyn Fn(usize) -> usize,
) -> Result<()> {
    let Layout::Paged { page_table, pages_per_sequence } = *layout else { return Ok(()) };
    if from >= to {
        return Ok(());
    }
    let size = cache.shape[SEQ];
    let own = &page_table[row * pages_per_sequence..(row + 1) * pages_per_sequence];
    for i in from / size..to.div_ceil(size) {
        let page = own[i];
        for (other, entries) in page_table.chunks_exact(pages_per_sequence).enumerate() {
            let used = if other == row { to } else { others(other) }.div_ceil(size);
            // Its own entries before this one were compared already, or are not written; those after it will be.
            let entries = if other == row { &entries[..i] } else { &entries[..used] };
            ensure!(
                !entries.contains(&page),
                Overlap,
                "page {page}, which holds tokens of sequence {row}, holds tokens of sequence {other} too"
            );
        }
    }
    Ok(())
}

/// Some heads of the keys or of the values of a layer.
struct Piece {
    layer: usize,
    values: bool,
    /// The first head, and the number of heads.
    heads: (usize, usize),
    cache: RawCacheView,
}

/// Runs `body(worker, piece)` for all pieces of all layers; `tokens` of every layer are moved.
fn for_each_piece(
    runner: &dyn Runner,
    layers: &dyn Layers,
    tokens: usize,
    body: &(dyn Fn(usize, &Piece) + Sync),
) -> Result<()> {
    let caches = 2 * layers.count();
    let (mut elements, mut most_heads) = (0usize, 1);
    for i in 0..caches {
        if let Some(cache) = cache_at(layers, i)? {
            elements = elements.saturating_add(tokens.saturating_mul(cache.shape[HEADS] * cache.shape[DIM]));
            most_heads = most_heads.max(cache.shape[HEADS]);
        }
    }
    let workers = workers_for(runner, elements, COPY_GRAIN);
    let pieces = if workers == 1 { 1 } else { (2 * workers).div_ceil(caches).min(most_heads) };
    for_each_tile(runner, workers, caches * pieces, &|worker, tile| {
        let (index, piece) = (tile / pieces, tile % pieces);
        let cache = cache_at(layers, index).expect("the layers were valid a moment ago");
        let Some(cache) = cache else { return };
        let n = cache.shape[HEADS];
        let (first, end) = (piece * n / pieces, (piece + 1) * n / pieces);
        let heads = (first, end - first);
        let cache = cache_heads_of(&cache, heads);
        if !cache.is_empty() {
            body(worker, &Piece { layer: index / 2, values: index % 2 == 1, heads, cache });
        }
    })
}

/// As [`heads_of`], with their scales.
fn cache_heads_of(cache: &RawCacheView, heads: (usize, usize)) -> RawCacheView {
    RawCacheView {
        units: heads_of(&cache.units, heads),
        scales: cache.scales.map(|scales| heads_of(&scales, heads)),
        affine: cache.affine.map(|affine| affine.heads(heads.0, heads.1)),
    }
}

/// Heads `first .. first + count` of a view.
fn heads_of<U: Units>(view: &RawView<U>, (first, count): (usize, usize)) -> RawView<U> {
    let mut part = *view;
    part.shape[HEADS] = count;
    if !part.is_empty() {
        let bytes = first as isize * view.strides[HEADS] as isize * view.dtype.size() as isize;
        part.data = part.data.wrapping_offset(bytes);
    }
    part
}

/// What tokens become on their way.
#[allow(clippy::large_enum_variant)] // One lies on the stack of a piece, and a call allocates nothing.
enum Step<'a> {
    /// The same: units, in another type perhaps, and scales.
    Copy { units: CopyFn, scales: Option<CopyFn> },
    /// In another format, or turned by one set of angles.
    Convert { kernels: HeadKernels<'a>, turn: Option<Turn> },
    /// The same where the scales of places are, which are not written; else quantised again.
    Fixed(Fixed<'a>),
    /// Into blocks of tokens that share scales.
    Blocks(Blocks<'a>),
}

impl<'a> Step<'a> {
    /// The copy of tokens of a cache to other places of it; of those that share scales, all that do, to slots that share scales.
    fn copy(context: &Context, cache: &RawCacheView) -> Self {
        match cache.dtype.dtype() {
            Some(dtype) => Self::Copy { units: context.copy(Op::KvWrite, dtype, dtype), scales: None },
            None if scales_have_places(cache) => Self::Fixed(Fixed::new(context, cache.dtype)),
            None => Self::units(context, cache, cache),
        }
    }

    /// The same of any tokens to any slots.
    fn copy_any(context: &Context, cache: &RawCacheView) -> Self {
        if tokens_sharing(cache) > 1 {
            return Self::Blocks(Blocks::between(context, cache, cache));
        }
        Self::copy(context, cache)
    }

    /// The copy of quantised units, and of the scales that are written with them.
    fn units(context: &Context, src: &RawCacheView, dst: &RawCacheView) -> Self {
        let scales = src.written_scales().zip(dst.written_scales());
        let scales = scales.map(|(from, to)| context.copy(Op::KvWrite, from.dtype, to.dtype));
        Self::Copy { units: copy_of_units(src.dtype.unit_bytes()), scales }
    }

    /// From one cache to another: units and scales as they are if the target can hold them.
    ///
    /// # Safety
    /// The caches are valid.
    unsafe fn between(context: &Context, src: &RawCacheView, dst: &RawCacheView) -> Self {
        if tokens_sharing(dst) > 1 {
            return Self::Blocks(Blocks::between(context, src, dst));
        }
        match (src.dtype.dtype(), dst.dtype.dtype()) {
            (Some(from), Some(to)) => Self::Copy { units: context.copy(Op::KvWrite, from, to), scales: None },
            (Some(from), None) => {
                let kernels = HeadKernels::write(context, None, false, None, from, dst.dtype);
                Self::Convert { kernels, turn: None }
            }
            (None, Some(to)) => Self::Convert { kernels: HeadKernels::read(context, None, src.dtype, to), turn: None },
            // SAFETY: the caller's.
            (None, None) if unsafe { requantizes(src, dst) } => {
                if let (Some(a), Some(b)) = (&src.affine, &dst.affine)
                    && src.dtype == dst.dtype
                    && a.is_alike(b)
                {
                    return Self::Fixed(Fixed::new(context, dst.dtype));
                }
                Self::Convert { kernels: HeadKernels::requantize(context, src.dtype, dst.dtype), turn: None }
            }
            (None, None) => Self::units(context, src, dst),
        }
    }

    /// Keys that are turned by RoPE and then rotated by blocks of `hadamard`: unturned elements into a cache, or without
    /// elements, keys of the cache that are turned on.
    fn turn(
        context: &Context,
        from: Option<DType>,
        cache: &RawCacheView,
        (pairing, hadamard): (Pairing, Option<usize>),
        (cos, sin): (&'a [f32], &'a [f32]),
    ) -> Self {
        let turn = Turn::new(pairing, cos, sin);
        if tokens_sharing(cache) > 1 {
            let load = Load::turned(context, from, cache.dtype, hadamard, Some(turn));
            return Self::Blocks(Blocks::new(context, cache, load));
        }
        let kernels = match from {
            Some(from) => HeadKernels::write(context, None, true, hadamard, from, cache.dtype),
            None => HeadKernels::turn(context, hadamard, cache.dtype),
        };
        Self::Convert { kernels, turn: Some(turn) }
    }
}

/// Whether heads that go from one quantised cache to another are, or may be, quantised again: the formats differ, or static scales do, or
/// scales per token and head lose digits.
///
/// # Safety
/// The caches are valid, and agree in heads.
unsafe fn requantizes(src: &RawCacheView, dst: &RawCacheView) -> bool {
    if src.dtype.dtype().is_some() || dst.dtype.dtype().is_some() {
        return false;
    }
    if src.dtype.has_static_scales() && src.dtype == dst.dtype {
        // SAFETY: the caller's.
        return (0..src.shape[HEADS]).any(|head| {
            let [from, to] = [src, dst].map(|cache| unsafe { static_scale(cache, head) });
            from.to_bits() != to.to_bits()
        });
    }
    if let (Some(a), Some(b)) = (&src.affine, &dst.affine)
        && src.dtype == dst.dtype
    {
        return !a.is_alike(b) || a.fixed && (scales_have_places(src) || !a.is_same(b));
    }
    let [from, to] = [src, dst].map(|cache| cache.scales.map(|scales| scales.dtype));
    src.dtype != dst.dtype || from == Some(DType::F32) && to == Some(DType::F16)
}

/// The static scale of a head.
///
/// # Safety
/// The cache is valid and has the head.
unsafe fn static_scale(cache: &RawCacheView, head: usize) -> f32 {
    let Some(scales) = cache.scales.filter(|scales| !scales.is_empty()) else { return 1.0 };
    // SAFETY: the caller's.
    unsafe {
        let at = scales.row(0, 0, head);
        match scales.dtype {
            DType::F32 => *at.cast::<f32>(),
            DType::F16 => (*at.cast::<half::f16>()).to_f32(),
            // The check of a cache's scales rejects bf16.
            DType::Bf16 => f32::NAN,
        }
    }
}

/// The copy of quantised units of this size.
fn copy_of_units(bytes: usize) -> CopyFn {
    match bytes {
        1 => copy_units::<1>,
        18 => copy_units::<18>,
        20 => copy_units::<20>,
        22 => copy_units::<22>,
        24 => copy_units::<24>,
        34 => copy_units::<34>,
        _ => unreachable!("no quantised format has units of {bytes} bytes"),
    }
}

/// Copies units of `N` bytes.
///
/// # Safety
/// That of [`CopyFn`]; vectors are neither repeated nor interleaved.
unsafe fn copy_units<const N: usize>(args: &CopyArgs) {
    for head in 0..args.heads as isize {
        let src = args.src.cast::<[u8; N]>().wrapping_offset(head * args.src_head);
        let dst = args.dst.cast::<[u8; N]>().wrapping_offset(head * args.dst_head);
        // SAFETY: the caller's.
        unsafe {
            if args.src_dim == 1 && args.dst_dim == 1 {
                std::ptr::copy_nonoverlapping(src, dst, args.dim);
            } else {
                for i in 0..args.dim as isize {
                    *dst.wrapping_offset(i * args.dst_dim) = *src.wrapping_offset(i * args.src_dim);
                }
            }
        }
    }
}

/// Moves `n` tokens, which lie in slots one after the other on both sides, from one place to another.
///
/// # Safety
/// The caches are valid and agree in heads and dim, the slots are inside them, no element that is read is written, and the
/// angles of a rotation live.
unsafe fn move_tokens(step: &Step, src: &RawCacheView, from: Place, dst: &RawCacheView, to: Place, n: usize) {
    let [.., heads, dim] = src.shape;
    if n == 0 || heads == 0 || dim == 0 {
        return;
    }
    // SAFETY: the caller's, here and below.
    match step {
        Step::Copy { units, scales } => unsafe {
            copy_tokens(*units, &src.units, from, &dst.units, to, n);
            if let (Some(kernel), Some(src), Some(dst)) = (scales, &src.scales, &dst.scales) {
                copy_tokens(*kernel, src, from, dst, to, n);
            }
            if let (Some(src), Some(dst)) = (&src.affine, &dst.affine)
                && !dst.fixed
            {
                copy_parameters(src, from, dst, to, (heads, n));
            }
        },
        Step::Convert { kernels, turn } => {
            let run = |t: usize, h, vectors, axis| {
                let (from, to) = ((from.0, from.1 + t), (to.0, to.1 + t));
                // SAFETY: as above.
                unsafe {
                    let scales = [(src, from), (dst, to)].map(|(cache, at)| Scales::of_vectors(cache, axis, at, h));
                    let vectors = vectors_copy(&src.units, from, &dst.units, to, h, vectors, axis);
                    kernels.run(&vectors, || scales, *turn);
                }
            };
            if [src, dst].into_iter().any(has_blocks) {
                (0..n).for_each(|t| run(t, 0, heads, HEADS));
            } else {
                for_each_run(heads, n, run);
            }
        }
        Step::Fixed(step) => unsafe { step.run((&src.units, from), (src, from), (dst, to), n) },
        Step::Blocks(_) => unreachable!("blocks are filled as such"),
    }
}

/// Whether some tokens share scales and others have others, so that scales of tokens are not at equal distances.
fn has_blocks(cache: &RawCacheView) -> bool {
    cache.affine.as_ref().is_some_and(|affine| affine.shared[SEQ] > 1 && affine.scales.shape[SEQ] > 1)
}

/// Copies the scales and zero points of `n` tokens; of tokens that share them, as many as do.
///
/// # Safety
/// As [`move_tokens`], for descriptions that are alike.
unsafe fn copy_parameters(src: &RawAffine, from: Place, dst: &RawAffine, to: Place, (heads, n): (usize, usize)) {
    for t in (0..n).step_by(dst.shared[SEQ]) {
        for head in 0..heads {
            // SAFETY: the caller's.
            unsafe {
                let (from, to) = (src.row(from.0, from.1 + t, head), dst.row(to.0, to.1 + t, head));
                let ([src_scales, src_zeros], [dst_scales, dst_zeros]) = (src.steps(DIM), dst.steps(DIM));
                for group in 0..dst.scales.shape[DIM] as isize {
                    let copy = |from: *mut u8, src: isize, to: *mut u8, dst: isize, bytes| {
                        std::ptr::copy(from.offset(group * src), to.offset(group * dst), bytes);
                    };
                    copy(from.scales, src_scales, to.scales, dst_scales, dst.scales.dtype.size());
                    if let Some(zeros) = &dst.zeros {
                        copy(from.zeros, src_zeros, to.zeros, dst_zeros, zeros.dtype.size());
                    }
                }
            }
        }
    }
}

/// Checks heads of caches that moves may quantise again, whatever the step: those whose scales have places, and with `blocks` those of
/// tokens that share scales.
fn check_requantized(layers: &dyn Layers, blocks: bool) -> Result<()> {
    for i in 0..2 * layers.count() {
        let Some(cache) = cache_at(layers, i)? else { continue };
        let check = if scales_have_places(&cache) { check_staged(plane(i), cache.shape[DIM]) } else { Ok(()) };
        check.and_then(|()| if blocks { check_blocks(i, &cache) } else { Ok(()) }).map_err(|e| in_layer(i / 2, e))?;
    }
    Ok(())
}

/// Checks the heads of cache `i` if several tokens share scales.
fn check_blocks(i: usize, cache: &RawCacheView) -> Result<()> {
    let (shared, dim) = (tokens_sharing(cache), cache.shape[DIM]);
    ensure!(
        shared == 1 || dim <= MAX_HEAD_DIM,
        Shape,
        "{} has dim = {dim} and scales that {shared} tokens share, but such heads above {MAX_HEAD_DIM} do not move",
        plane(i)
    );
    Ok(())
}

/// Copies `n` tokens.
///
/// # Safety
/// As [`move_tokens`].
unsafe fn copy_tokens<U: Units>(kernel: CopyFn, src: &RawView<U>, from: Place, dst: &RawView<U>, to: Place, n: usize) {
    let [.., heads, dim] = src.unit_shape();
    let together = |view: &RawView<U>| view.strides[DIM] == 1 && (heads == 1 || view.strides[HEADS] == dim as i64);
    // SAFETY: the caller's, here and below.
    unsafe {
        if together(src) && together(dst) {
            kernel(&CopyArgs { dim: heads * dim, ..vectors_copy(src, from, dst, to, 0, n, SEQ) });
            return;
        }
    }
    for_each_run(heads, n, |t, h, vectors, axis| {
        let (from, to) = ((from.0, from.1 + t), (to.0, to.1 + t));
        // SAFETY: as above.
        unsafe { kernel(&CopyArgs { dim, ..vectors_copy(src, from, dst, to, h, vectors, axis) }) };
    });
}

/// Runs `run(token, head, vectors, axis)` for the heads of `n` tokens. A kernel takes any number of vectors at equal distances: the
/// heads of a token, or the tokens of a head.
fn for_each_run(heads: usize, n: usize, run: impl Fn(usize, usize, usize, usize)) {
    if n >= heads {
        (0..heads).for_each(|h| run(0, h, n, SEQ));
    } else {
        (0..n).for_each(|t| run(t, 0, heads, HEADS));
    }
}

/// A sequence of a cache, to find positions in.
#[derive(Clone, Copy)]
struct RowOf<'a> {
    layout: &'a Layout<'a>,
    cache: &'a RawCacheView,
    row: usize,
}

/// Moves positions of one sequence to those that are lower by `down` of another, or by more than 0 of the same. `after` is the number of
/// tokens that each sequence of the target has then.
///
/// # Safety
/// As [`move_tokens`], in ascending order and for every `down` tokens in turn; all positions have been validated, and so have heads by
/// [`check_requantized`].
unsafe fn move_positions(
    step: &Step,
    src: RowOf,
    ranges: &[Range<usize>],
    dst: RowOf,
    down: usize,
    after: &dyn Fn(usize) -> usize,
) {
    if let Step::Blocks(blocks) = step {
        let filled = ranges.iter().filter(|range| !range.is_empty());
        let Some(first) = filled.clone().map(|range| range.start).min() else { return };
        let end = filled.map(|range| range.end).max().unwrap_or(first);
        let mut arrives = |position: usize| {
            let from = position + down;
            let place = || src.layout.place(&src.cache.units, src.row, from).0;
            ranges.iter().any(|range| range.contains(&from)).then(|| blocks.token(src.cache, place()))
        };
        // SAFETY: the caller's.
        unsafe { blocks.fill(dst, first - down..end - down, after, &mut arrives) };
        return;
    }
    let most = if down == 0 { usize::MAX } else { down };
    for range in ranges {
        // SAFETY: the caller's.
        unsafe { move_range(step, src, range.clone(), dst, range.start - down, most) };
    }
}

/// Moves positions `from` of one sequence to the positions from `to` on of another, in ascending order, at most `most` at a time.
///
/// # Safety
/// As [`move_tokens`], for every `most` tokens in turn; all positions have been validated.
unsafe fn move_range(step: &Step, src: RowOf, from: Range<usize>, dst: RowOf, to: usize, most: usize) {
    let mut done = 0;
    while done < from.len() {
        let (src_place, a) = src.layout.place(&src.cache.units, src.row, from.start + done);
        let (dst_place, b) = dst.layout.place(&dst.cache.units, dst.row, to + done);
        let n = a.min(b).min(most).min(from.len() - done);
        // SAFETY: the caller's.
        unsafe { move_tokens(step, src.cache, src_place, dst.cache, dst_place, n) };
        done += n;
    }
}
