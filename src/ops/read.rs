//! The cache read: tokens of a cache as plain tensors.

use crate::cache_view::{CacheExtent, CacheView};
use crate::context::Context;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::layout::{Layout, Packing, Place};
use crate::ops::hadamard::check_block;
use crate::ops::heads::{HeadKernels, Scales, check_staged};
use crate::ops::pack::check_values;
use crate::ops::setters::setters;
use crate::ops::{for_each_token, token_copy};
use crate::parallel::Runner;
use crate::view::{BATCH, DIM, Extent, HEADS, RawCacheView, RawView, SEQ, ViewMut};

/// Caches, the tokens to read, and the target tensors.
///
/// `k_cache` is `[batch, capacity, kv_heads, dim]` (or with the first two axes of the source's
/// [layout](crate::Layout)), of any format; `k` is `[batch, seq, kv_heads, dim]`, of any type; both have any strides.
/// `v_cache` and `v` likewise, with a `dim` of their own.
#[derive(Debug)]
#[non_exhaustive]
pub struct KvRead<'a> {
    /// The cache of the keys.
    pub k_cache: CacheView<'a>,
    /// The cache of the values, with the shape that `v_packing` requires.
    pub v_cache: CacheView<'a>,
    /// The target of the keys.
    pub k: ViewMut<'a>,
    /// The target of the values.
    pub v: ViewMut<'a>,
    /// The tokens to read.
    pub from: Source<'a>,
    /// The packing of the values in their cache.
    pub v_packing: Packing,
    /// The block of the [Hadamard rotation](crate::hadamard) that the keys were written with, which is undone; none if absent.
    pub k_hadamard: Option<usize>,
    /// The same for the values.
    pub v_hadamard: Option<usize>,
}

impl<'a> KvRead<'a> {
    /// A read of keys from `k_cache` to `k` and of values from `v_cache` to `v`, which are not packed.
    pub fn new(
        k_cache: impl Into<CacheView<'a>>,
        v_cache: impl Into<CacheView<'a>>,
        k: ViewMut<'a>,
        v: ViewMut<'a>,
        from: Source<'a>,
    ) -> Self {
        Self {
            k_cache: k_cache.into(),
            v_cache: v_cache.into(),
            k,
            v,
            from,
            v_packing: Packing::Rows,
            k_hadamard: None,
            v_hadamard: None,
        }
    }

    setters! {
        optional { k_hadamard: usize, v_hadamard: usize, }
        plain { v_packing: Packing, }
    }
}

/// The tokens of a cache to read.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Source<'a> {
    /// `[batch]`: token t of target sequence b is at position `positions[b] + t` of its sequence in the cache.
    pub positions: &'a [i32],
    /// `[batch]`: only `counts[b]` tokens of sequence b are read, and later tokens of the target are unchanged; all if
    /// absent.
    pub counts: Option<&'a [i32]>,
    /// `[batch]`: target sequence b comes from sequence `sequences[b]` of the cache; from sequence b if absent. A sequence may be
    /// read several times.
    pub sequences: Option<&'a [i32]>,
    /// The slots of positions. A [`Layout::Ring`] gives at most as many tokens of a sequence per call as it has slots;
    /// the caller must know that it still holds them.
    pub layout: Layout<'a>,
}

impl<'a> Source<'a> {
    /// Tokens from these positions on, in a contiguous cache.
    pub fn positions(positions: &'a [i32]) -> Self {
        Self { positions, counts: None, sequences: None, layout: Layout::Contiguous }
    }

    setters! {
        optional { counts: &'a [i32], sequences: &'a [i32], }
        plain { layout: Layout<'a>, }
    }
}

impl Source<'_> {
    fn count(&self, sequence: usize, seq: usize) -> usize {
        self.counts.map_or(seq, |c| c[sequence] as usize)
    }

    fn sequence(&self, sequence: usize) -> usize {
        self.sequences.map_or(sequence, |s| s[sequence] as usize)
    }

    /// The slot of a token to read.
    fn place(&self, (sequence, token): Place, seq: usize, cache: &RawView<CacheFormat>) -> Option<Place> {
        let position = self.positions[sequence] as usize + token;
        (token < self.count(sequence, seq)).then(|| self.layout.place(cache, self.sequence(sequence), position).0)
    }

    fn validate(&self, batch: usize, seq: usize, cache: &RawView<CacheFormat>) -> Result<()> {
        let lists = [("positions", Some(self.positions)), ("counts", self.counts), ("sequences", self.sequences)];
        for (name, list) in lists {
            let n = list.map_or(batch, <[i32]>::len);
            ensure!(n == batch, Shape, "{name} has {n} entries, but k has batch = {batch}");
        }
        self.layout.validate("k_cache", cache)?;
        let rows = self.layout.rows(cache);
        for b in 0..batch {
            let (position, count) = (self.positions[b] as i64, self.counts.map_or(seq as i64, |c| c[b] as i64));
            ensure!((0..=seq as i64).contains(&count), OutOfRange, "counts[{b}] is {count}, but k has seq = {seq}");
            ensure!(position >= 0, OutOfRange, "positions[{b}] is {position}, which is negative");
            let source = self.sequences.map_or(b as i64, |s| s[b] as i64);
            ensure!(
                source >= 0 && rows.is_none_or(|rows| (source as usize) < rows),
                OutOfRange,
                "sequence {b} is to be read from sequence {source} of the cache, but the cache has {} sequences",
                rows.unwrap_or(0)
            );
            let (source, first, end) = (source as usize, position as usize, (position + count) as usize);
            let capacity = self.layout.capacity(cache, source);
            ensure!(
                end <= capacity,
                Capacity,
                "sequence {b} reads {count} tokens at position {position}, but the cache holds {capacity}"
            );
            if let Layout::Ring { sink_tokens } = self.layout {
                let (turning, slots) = (end.saturating_sub(first.max(sink_tokens)), cache.shape[SEQ] - sink_tokens);
                ensure!(
                    turning <= slots,
                    OutOfRange,
                    "sequence {b} reads {turning} tokens of a ring, whose {slots} slots hold no more"
                );
            }
            self.layout.validate_row("k_cache", cache, source, first, end)?;
        }
        Ok(())
    }
}

/// Reads tokens of a cache into plain tensors. Elements of a quantised cache are multiplied by their scales. Hadamard
/// rotations are undone where the call gives their blocks. Results
/// are rounded once to the target's type (to nearest, ties to even).
///
/// Everything is checked before the first byte is written. Slots without a token are read as they are.
///
/// Thread safety: may be called from any number of threads at once on disjoint targets, while no call writes the
/// tokens that are read.
///
/// # Errors
/// [`Status::Capacity`](crate::Status::Capacity) when a position is past the end,
/// [`Status::OutOfRange`](crate::Status::OutOfRange) for a negative position or a sequence or page that does not
/// exist, shapes that do not match, targets that share memory with another tensor. Then nothing has been written.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// // One sequence with room for four tokens, one head of two elements, keys in int8.
/// let (mut units, mut scales, mut values) = ([0i8; 8], [0.0f32; 4], [0.0f32; 8]);
/// let (k, v) = ([1.0f32, -0.5, 0.25, 2.0], [1.0f32, 2.0, 3.0, 4.0]);
/// let shape = [1, 4, 1, 2];
/// let write = KvWrite::new(
///     View::new(&k, [1, 2, 1, 2])?,
///     View::new(&v, [1, 2, 1, 2])?,
///     CacheViewMut::int8(&mut units, shape, ViewMut::new(&mut scales, [1, 4, 1, 1])?)?,
///     ViewMut::new(&mut values, shape)?,
///     Destination::positions(&[0]),
/// );
/// kv_write(&context, &Serial, write)?;
/// let (mut keys, mut read) = ([0.0f32; 4], [0.0f32; 4]);
/// let read = KvRead::new(
///     CacheView::int8(&units, shape, View::new(&scales, [1, 4, 1, 1])?)?,
///     View::new(&values, shape)?,
///     ViewMut::new(&mut keys, [1, 2, 1, 2])?,
///     ViewMut::new(&mut read, [1, 2, 1, 2])?,
///     Source::positions(&[0]),
/// );
/// kv_read(&context, &Serial, read)?;
/// assert!(keys.iter().zip(k).all(|(read, k)| (read - k).abs() <= 2.0 / 254.0));
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn kv_read(context: &Context, runner: &dyn Runner, read: KvRead) -> Result<()> {
    let raw = RawRead {
        keys: (read.k_cache.raw, read.k.raw),
        values: Some((read.v_cache.raw, read.v.raw)),
        from: read.from,
        v_packing: read.v_packing,
        k_hadamard: read.k_hadamard,
        v_hadamard: read.v_hadamard,
    };
    // SAFETY: the views borrow what they reach.
    unsafe { kv_read_raw(context, runner, &raw) }
}

/// [`KvRead`] as the C ABI has it; each cache with its target.
pub(crate) struct RawRead<'a> {
    pub keys: (RawCacheView, RawView),
    pub values: Option<(RawCacheView, RawView)>,
    pub from: Source<'a>,
    pub v_packing: Packing,
    pub k_hadamard: Option<usize>,
    pub v_hadamard: Option<usize>,
}

impl RawRead<'_> {
    fn validate(&self) -> Result<()> {
        let (k_cache, k) = &self.keys;
        let (k_cache_extent, k_extent) = check_pair("k_cache", k_cache, "k", k)?;
        k.same_axis("k", k_cache, "k_cache", DIM)?;
        check_rotation("k_hadamard", self.k_hadamard, ("k", k), k_cache)?;
        if let Some((v_cache, v)) = &self.values {
            let (v_cache_extent, v_extent) = check_pair("v_cache", v_cache, "v", v)?;
            check_values(self.from.layout, self.v_packing, (k, k_cache), (v, v_cache))?;
            check_rotation("v_hadamard", self.v_hadamard, ("v", v), v_cache)?;
            ensure!(!k.overlaps_within(k_extent, v, v_extent), Overlap, "k and v share memory");
            ensure!(!k_cache.overlaps_within(k_cache_extent, v, v_extent), Overlap, "k_cache and v share memory");
            ensure!(!v_cache.overlaps_within(v_cache_extent, k, k_extent), Overlap, "v_cache and k share memory");
        }
        self.from.validate(k.shape[BATCH], k.shape[SEQ], &k_cache.units)
    }
}

/// # Safety
/// The memory that valid views of the caches reach is readable, and that of the targets writable by this call alone.
pub(crate) unsafe fn kv_read_raw(context: &Context, runner: &dyn Runner, read: &RawRead) -> Result<()> {
    read.validate()?;
    let (k_cache, k) = &read.keys;
    let place = |at: Place| read.from.place(at, k.shape[SEQ], &k_cache.units);
    let kernels = HeadKernels::read(context, read.k_hadamard, k_cache.dtype, k.dtype);
    for_each_token(runner, k, |at| {
        let Some(place) = place(at) else { return };
        // SAFETY: the views and the places are valid; every token of the target is this task's alone.
        unsafe {
            let copy = token_copy(&k_cache.units, place, k, at);
            kernels.run(&copy, || [Scales::of_token(k_cache, place), None], None);
        }
    })?;
    let Some((v_cache, v)) = &read.values else { return Ok(()) };
    let kernels = HeadKernels::read(context, read.v_hadamard, v_cache.dtype, v.dtype);
    for_each_token(runner, v, |at| {
        let Some((row, slot)) = place(at) else { return };
        // SAFETY: as above; a slot of a pair is in the view as the pair's first one is.
        unsafe {
            let copy = match read.v_packing {
                Packing::Rows => token_copy(&v_cache.units, (row, slot), v, at),
                Packing::RowPairs => {
                    let mut copy = token_copy(&v_cache.units, (row, slot / 2), v, at);
                    let bytes = (slot % 2) as isize * copy.src_dim * v_cache.dtype.unit_bytes() as isize;
                    (copy.src, copy.src_dim, copy.dim) = (copy.src.offset(bytes), 2 * copy.src_dim, v.shape[DIM]);
                    copy
                }
            };
            kernels.run(&copy, || [Scales::of_token(v_cache, (row, slot)), None], None);
        }
    })
}

/// Checks the block of a rotation that is undone.
fn check_rotation(
    option: &str,
    block: Option<usize>,
    (name, dst): (&str, &RawView),
    cache: &RawCacheView,
) -> Result<()> {
    check_block(option, block, (name, dst.shape[DIM]))?;
    if block.is_some() && cache.dtype.dtype().is_none() {
        check_staged(name, dst.shape[DIM])?;
    }
    Ok(())
}

/// Checks a cache and its target; returns the memory ranges of both.
fn check_pair(cache_name: &str, cache: &RawCacheView, name: &str, dst: &RawView) -> Result<(CacheExtent, Extent)> {
    let (from, to) = (cache.validate(cache_name)?, dst.validate_output(name)?);
    dst.same_axis(name, cache, cache_name, HEADS)?;
    ensure!(!cache.overlaps_within(from, dst, to), Overlap, "{cache_name} and {name} share memory");
    Ok((from, to))
}
