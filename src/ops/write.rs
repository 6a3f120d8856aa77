//! The cache write.

use crate::cache_view::{CacheExtent, CacheViewMut};
use crate::context::Context;
use crate::cpu::cache;
use crate::error::{Result, ensure, fail};
use crate::kernels::api::{CopyArgs, Op};
use crate::layout::{Layout, Packing, Place};
use crate::ops::hadamard::check_block;
use crate::ops::heads::{HeadKernels, Scales, Turn, check_staged};
use crate::ops::norm::RmsNorm;
use crate::ops::pack::{check_values, into_pair, pack_token};
use crate::ops::rope::{RawRope, Rope, TokenAngles};
use crate::ops::setters::setters;
use crate::ops::{ahead, asks_for, for_each_token_with, token_copy};
use crate::parallel::Runner;
use crate::view::{BATCH, DIM, Extent, HEADS, RawCacheView, RawView, SEQ, Units, View};

/// New keys and values, the caches they go to, and their places there.
///
/// `k` is `[batch, seq, kv_heads, dim]`, `v` is `[batch, seq, kv_heads, v_dim]`. Views may have any strides and element types,
/// and each cache may have any format. Each element is converted to the format of its cache, to the nearest value, ties to
/// even. A number beyond 65504 becomes an infinity in f16, and NaN in the softmax of a row that meets it, unless the context
/// [saturates](Context::saturate_f16).
#[derive(Debug)]
#[non_exhaustive]
pub struct KvWrite<'a> {
    /// New keys.
    pub k: View<'a>,
    /// New values.
    pub v: View<'a>,
    /// The cache of the keys, `[batch, capacity, kv_heads, dim]`; [`Destination::layout`] defines its first two axes.
    pub k_cache: CacheViewMut<'a>,
    /// The cache of the values: as that of the keys, with a `dim` of `v_dim`, or in the shape that `v_packing` gives it.
    pub v_cache: CacheViewMut<'a>,
    /// The places in the caches.
    pub to: Destination<'a>,
    /// Normalises the heads of the keys before `rope`. The bits are those of [`rms_norm`](crate::rms_norm) into f32.
    pub k_norm: Option<RmsNorm<'a>>,
    /// Rotates the keys. The bits are those of [`rope()`](crate::rope()) into the type of the cache, or into f32 where the cache is
    /// quantised.
    pub rope: Option<Rope<'a>>,
    /// The block of the [Hadamard rotation](crate::hadamard) of the keys, after `rope`; none if absent. [`hadamard_block`](crate::hadamard_block)
    /// gives the largest, and [`AttentionOptions::k_hadamard`](crate::AttentionOptions::k_hadamard) has to agree. The bits are those of
    /// [`hadamard`](crate::hadamard) from f32 into the type of the cache, or into f32 where the cache is quantised.
    pub k_hadamard: Option<usize>,
    /// The same for the values.
    pub v_hadamard: Option<usize>,
    /// How values lie in their cache; [`Context::v_packing`] names the packing that attention reads fastest.
    pub v_packing: Packing,
}

impl<'a> KvWrite<'a> {
    /// Writes `k` to `k_cache` and `v` to `v_cache`, without norm, rotation or packing.
    pub fn new(
        k: View<'a>,
        v: View<'a>,
        k_cache: impl Into<CacheViewMut<'a>>,
        v_cache: impl Into<CacheViewMut<'a>>,
        to: Destination<'a>,
    ) -> Self {
        let (k_cache, v_cache) = (k_cache.into(), v_cache.into());
        Self {
            k,
            v,
            k_cache,
            v_cache,
            to,
            k_norm: None,
            rope: None,
            k_hadamard: None,
            v_hadamard: None,
            v_packing: Packing::Rows,
        }
    }

    setters! {
        optional { k_norm: RmsNorm<'a>, rope: Rope<'a>, k_hadamard: usize, v_hadamard: usize, }
        plain { v_packing: Packing, }
    }
}

/// The slots that new tokens are written to: by position in the sequences of a cache, or by slot.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Destination<'a> {
    /// `[batch]`: token t of sequence b is written to position `positions[b] + t`. Ignored, and may be empty, if `slots` is
    /// given.
    pub positions: &'a [i32],
    /// `[batch]`: only the first `counts[b]` tokens of sequence b are written (padded prompts); all tokens if absent.
    pub counts: Option<&'a [i32]>,
    /// `[batch]`: sequence b of `k` and `v` is written to sequence `sequences[b]` of the cache; to sequence b if absent.
    pub sequences: Option<&'a [i32]>,
    /// `[batch, seq]`: the slot of each token; -1 skips the token. Under [`Layout::Paged`] and [`Layout::Ragged`], slots are
    /// numbered through the whole pool, page by page; the table is not read, and `sequences` must be absent.
    pub slots: Option<&'a [i32]>,
    /// The slots in which positions lie. In one call, a [`Layout::Ring`] takes at most as many tokens of a sequence as it has
    /// slots besides its sink tokens. [`Layout::Indirect`] cannot be written through: write with [`Layout::Contiguous`] to the
    /// sequence that produced the token, then call [`set_table_tokens`](crate::set_table_tokens).
    pub layout: Layout<'a>,
}

/// Tokens of a sequence, from `token` on, whose slots follow each other from `place` on.
#[derive(Clone, Copy)]
struct Run {
    row: usize,
    token: usize,
    place: Place,
    len: usize,
}

impl<'a> Destination<'a> {
    /// Positions of a contiguous cache: token t of sequence b goes to `positions[b] + t`.
    pub fn positions(positions: &'a [i32]) -> Self {
        Self { positions, counts: None, sequences: None, slots: None, layout: Layout::Contiguous }
    }

    /// Slots of a contiguous cache, `[batch, seq]`; -1 skips a token.
    pub fn slots(slots: &'a [i32]) -> Self {
        Self { slots: Some(slots), ..Self::positions(&[]) }
    }

    setters! {
        optional { counts: &'a [i32], sequences: &'a [i32], }
        plain { layout: Layout<'a>, }
    }
}

impl Destination<'_> {
    fn count(&self, row: usize, seq: usize) -> usize {
        self.counts.map_or(seq, |c| c[row] as usize)
    }

    fn row(&self, row: usize) -> usize {
        self.sequences.map_or(row, |r| r[row] as usize)
    }

    /// Whether slots are numbered through all sequences (or pages) of the views.
    fn pooled(&self) -> bool {
        matches!(self.layout, Layout::Paged { .. } | Layout::Ragged { .. })
    }

    /// The place of a token, if it is written.
    fn place<U: Units>(&self, row: usize, token: usize, seq: usize, cache: &RawView<U>) -> Option<Place> {
        if token >= self.count(row, seq) {
            return None;
        }
        match self.slots {
            Some(slots) => {
                let (slot, size) = (usize::try_from(slots[row * seq + token]).ok()?, cache.shape[SEQ]);
                Some(if self.pooled() { (slot / size, slot % size) } else { (self.row(row), slot) })
            }
            None => Some(self.layout.place(cache, self.row(row), self.positions[row] as usize + token).0),
        }
    }

    /// Fails unless the tokens that share scales of a cache are all written, or none of them. All else has been checked.
    fn check_shared(&self, name: &str, cache: &RawCacheView, src: &RawView) -> Result<()> {
        let ([batch, seq, ..], shared) = (src.shape, tokens_sharing(cache));
        if shared == 1 || src.is_empty() {
            return Ok(());
        }
        for row in 0..batch {
            let mut token = 0;
            while token < seq {
                let Some((of, slot)) = self.place(row, token, seq, &cache.units) else {
                    token += 1;
                    continue;
                };
                let whole = |i| self.place(row, token + i, seq, &cache.units) == Some((of, slot + i));
                let written = (1..shared).take_while(|&i| token + i < seq && whole(i)).count() + 1;
                ensure!(
                    slot.is_multiple_of(shared) && written == shared,
                    Unsupported,
                    "tokens [{row}, {token}] to [{row}, {}] go to slots {slot} to {}, but in {name} scales are of {shared} tokens, from a \
                     slot that is a multiple of {shared} on: all of them are written together, in order",
                    token + written - 1,
                    slot + written - 1
                );
                token += shared;
            }
        }
        Ok(())
    }

    fn validate<U: Units>(&self, batch: usize, seq: usize, cache: &RawView<U>) -> Result<()> {
        for (name, list) in [("counts", self.counts), ("sequences", self.sequences)] {
            if let Some(list) = list {
                let n = list.len();
                ensure!(n == batch, Shape, "{name} has {n} entries, but k has batch = {batch}");
            }
        }
        ensure!(
            !matches!(self.layout, Layout::Indirect { .. }),
            InvalidValue,
            "an indirect layout is not written through: write as into a contiguous cache, and set the table's entries"
        );
        let by_pool = self.slots.is_some() && self.pooled();
        if by_pool {
            ensure!(
                self.sequences.is_none(),
                InvalidValue,
                "sequences is given, but slots of a whole pool belong to no sequence"
            );
        } else {
            self.layout.validate("k_cache", cache)?;
        }
        let rows = self.layout.rows(cache);
        for row in 0..batch {
            if let Some(counts) = self.counts {
                let count = counts[row];
                ensure!(
                    count >= 0 && count as usize <= seq,
                    OutOfRange,
                    "counts[{row}] is {count}, but k has seq = {seq}"
                );
            }
            let target = self.sequences.map_or(row as i64, |r| r[row] as i64);
            ensure!(
                by_pool || target >= 0 && rows.is_none_or(|rows| (target as usize) < rows),
                OutOfRange,
                "sequence {row} is to be written to sequence {target} of the cache, but the cache has {} sequences",
                rows.unwrap_or(0)
            );
        }
        match self.slots {
            None => self.validate_positions(batch, seq, cache),
            Some(slots) => self.validate_slots(slots, batch, seq, cache),
        }
    }

    fn validate_positions<U: Units>(&self, batch: usize, seq: usize, cache: &RawView<U>) -> Result<()> {
        let n = self.positions.len();
        ensure!(n == batch, Shape, "positions has {n} entries, but k has batch = {batch}");
        for row in 0..batch {
            let (position, count, target) = (self.positions[row] as i64, self.count(row, seq), self.row(row));
            ensure!(position >= 0, OutOfRange, "positions[{row}] is {position}, which is negative");
            let capacity = self.layout.capacity(cache, target);
            ensure!(
                position + count as i64 <= capacity as i64,
                Capacity,
                "sequence {row} writes {count} tokens at position {position}, but the cache holds {capacity}"
            );
            let (first, end) = (position as usize, position as usize + count);
            if let Layout::Ring { sink_tokens } = self.layout {
                let (turning, slots) = (end.saturating_sub(first.max(sink_tokens)), cache.shape[SEQ] - sink_tokens);
                ensure!(
                    turning <= slots,
                    DuplicateSlot,
                    "sequence {row} writes {turning} tokens into a ring of {slots} slots: write the newest {slots} alone"
                );
            }
            self.layout.validate_row("k_cache", cache, target, first, end)?;
        }
        // Distinct sequences share slots on pages only, and a single run shares none.
        let apart = self.sequences.is_none() && !matches!(self.layout, Layout::Paged { .. });
        if apart || self.runs(batch, seq, cache).nth(1).is_none() {
            return Ok(());
        }
        let mut seen = Seen::new();
        for (i, run) in self.runs(batch, seq, cache).enumerate() {
            // All ragged sequences lie at index 0 of the view.
            let key = if let Layout::Ragged { .. } = self.layout { self.row(run.row) } else { run.place.0 };
            if seen.first_time(key as u64) {
                continue;
            }
            for other in self.runs(batch, seq, cache).take(i) {
                let (from, with) = (run.place.1, other.place.1);
                let slot = from.max(with);
                if run.place.0 == other.place.0 && slot < (from + run.len).min(with + other.len) {
                    fail!(
                        DuplicateSlot,
                        "tokens [{}, {}] and [{}, {}] both go to slot {slot} of {} {} of the cache",
                        other.row,
                        other.token + slot - with,
                        run.row,
                        run.token + slot - from,
                        if let Layout::Paged { .. } = self.layout { "page" } else { "sequence" },
                        run.place.0
                    );
                }
            }
        }
        Ok(())
    }

    fn validate_slots<U: Units>(&self, slots: &[i32], batch: usize, seq: usize, cache: &RawView<U>) -> Result<()> {
        let n = slots.len();
        ensure!(n == batch * seq, Shape, "slots has {n} entries, but k has batch * seq = {}", batch * seq);
        let [rows, row_slots, ..] = cache.shape.map(|n| n as u64);
        let capacity = if self.pooled() { rows * row_slots } else { row_slots };
        for row in 0..batch {
            for token in 0..self.count(row, seq) {
                let slot = slots[row * seq + token];
                ensure!(slot >= -1, OutOfRange, "slots[{row}, {token}] is {slot}: only -1 stands for no slot");
                ensure!(
                    slot < 0 || (slot as u64) < capacity,
                    Capacity,
                    "slots[{row}, {token}] is {slot}, but the cache holds {capacity}"
                );
            }
        }
        // Each slot of the cache has a number.
        let written = || {
            (0..batch).flat_map(move |row| (0..self.count(row, seq)).map(move |token| (row, token))).filter_map(
                move |(row, token)| {
                    let slot = u64::try_from(slots[row * seq + token]).ok()?;
                    let first = if self.pooled() { 0 } else { self.row(row) as u64 * row_slots };
                    Some((row, token, first + slot))
                },
            )
        };
        // Ascending slots are the usual case and need one pass.
        let mut next = 0;
        let ascending = written().all(|(_, _, slot)| {
            let ok = slot >= next;
            next = slot + 1;
            ok
        });
        if ascending {
            return Ok(());
        }
        let mut seen = Seen::new();
        for (i, (row, token, slot)) in written().enumerate() {
            if seen.first_time(slot) {
                continue;
            }
            if let Some((b, t, _)) = written().take(i).find(|other| other.2 == slot) {
                let slot = slots[row * seq + token];
                let place =
                    if self.pooled() { "the pool".into() } else { format!("sequence {} of the cache", self.row(row)) };
                fail!(DuplicateSlot, "tokens [{b}, {t}] and [{row}, {token}] both go to slot {slot} of {place}");
            }
        }
        Ok(())
    }

    /// All written tokens, in order. The destination is valid, except that tokens may share a slot.
    fn runs<U: Units>(&self, batch: usize, seq: usize, cache: &RawView<U>) -> impl Iterator<Item = Run> {
        let (mut row, mut token) = (0, 0);
        std::iter::from_fn(move || {
            while row < batch && token >= self.count(row, seq) {
                (row, token) = (row + 1, 0);
            }
            if row == batch {
                return None;
            }
            let (place, len) = self.layout.place(cache, self.row(row), self.positions[row] as usize + token);
            let run = Run { row, token, place, len: len.min(self.count(row, seq) - token) };
            token += run.len;
            Some(run)
        })
    }
}

/// A set of numbers that may report a number as seen although it was not, but never the reverse. Numbers that are new need no
/// comparison with all the others, and in a correct call all are new.
struct Seen([u64; Self::WORDS]);

impl Seen {
    const WORDS: usize = 1024;

    fn new() -> Self {
        Self([0; Self::WORDS])
    }

    fn first_time(&mut self, number: u64) -> bool {
        let word = &mut self.0[(number / 64) as usize % Self::WORDS];
        let bit = 1 << (number % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }
}

/// Writes new keys and values of all sequences into their caches.
///
/// Everything is checked before the first byte is written; nothing is clamped. The caller advances the lengths.
///
/// A quantised cache is written through f32, after norm and rotations, by [the rule of its format](crate::docs::caches#formats).
///
/// Thread safety: may be called from any number of threads at once on disjoint caches or disjoint sequences of a cache.
///
/// # Errors
/// - [`Status::Capacity`](crate::Status::Capacity): a slot is beyond the capacity.
/// - [`Status::OutOfRange`](crate::Status::OutOfRange): a position is negative, or a sequence or page does not exist.
/// - [`Status::DuplicateSlot`](crate::Status::DuplicateSlot): two tokens go to one slot.
/// - [`Status::Overlap`](crate::Status::Overlap): a cache shares memory with another view.
/// - [`Status::Shape`](crate::Status::Shape): shapes do not fit each other.
///
/// On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// // Two sequences with room for eight tokens, one head of four elements; sequence 0 holds 5 tokens, sequence 1 none.
/// let (mut keys, mut values) = (vec![half::f16::ZERO; 64], vec![half::f16::ZERO; 64]);
/// let (k, v) = (vec![1.0f32; 16], vec![2.0f32; 16]);
/// kv_write(
///     &context,
///     &Serial,
///     KvWrite::new(
///         View::new(&k, [2, 2, 1, 4])?,
///         View::new(&v, [2, 2, 1, 4])?,
///         ViewMut::new(&mut keys, [2, 8, 1, 4])?,
///         ViewMut::new(&mut values, [2, 8, 1, 4])?,
///         Destination::positions(&[5, 0]).counts(&[2, 1]),
///     ),
/// )?;
/// assert_eq!(keys[5 * 4].to_f32(), 1.0);
/// assert_eq!(values[8 * 4].to_f32(), 2.0);
/// assert_eq!(values[9 * 4].to_f32(), 0.0);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn kv_write(context: &Context, runner: &dyn Runner, write: KvWrite) -> Result<()> {
    let raw = RawWrite {
        keys: (write.k.raw, write.k_cache.raw),
        values: Some((write.v.raw, write.v_cache.raw)),
        to: write.to,
        k_norm: write.k_norm,
        rope: write.rope.as_ref().map(Rope::raw),
        k_hadamard: write.k_hadamard,
        v_hadamard: write.v_hadamard,
        v_packing: write.v_packing,
    };
    // SAFETY: the views borrow what they reach.
    unsafe { kv_write_raw(context, runner, &raw) }
}

/// [`KvWrite`] as the C ABI has it; each source with its cache.
pub(crate) struct RawWrite<'a> {
    pub keys: (RawView, RawCacheView),
    pub values: Option<(RawView, RawCacheView)>,
    pub to: Destination<'a>,
    pub k_norm: Option<RmsNorm<'a>>,
    pub rope: Option<RawRope<'a>>,
    pub k_hadamard: Option<usize>,
    pub v_hadamard: Option<usize>,
    pub v_packing: Packing,
}

impl RawWrite<'_> {
    fn validate(&self) -> Result<()> {
        let (k, k_cache) = &self.keys;
        let (k_extent, k_cache_extent) = check_pair("k", k, "k_cache", k_cache)?;
        k.same_axis("k", k_cache, "k_cache", DIM)?;
        if let Some((v, v_cache)) = &self.values {
            let (v_extent, v_cache_extent) = check_pair("v", v, "v_cache", v_cache)?;
            check_values(self.to.layout, self.v_packing, (k, k_cache), (v, v_cache))?;
            let caches = k_cache.overlaps_cache(k_cache_extent, v_cache, v_cache_extent);
            ensure!(!caches, Overlap, "k_cache and v_cache share memory");
            let crossed = k_cache.overlaps_within(k_cache_extent, v, v_extent);
            ensure!(!crossed, Overlap, "k_cache and v share memory");
            let crossed = v_cache.overlaps_within(v_cache_extent, k, k_extent);
            ensure!(!crossed, Overlap, "v_cache and k share memory");
            check_block("v_hadamard", self.v_hadamard, ("v", v.shape[DIM]))?;
            if v_cache.dtype.dtype().is_none() && self.v_hadamard.is_some() {
                check_staged("v", v.shape[DIM])?;
            }
        }
        check_block("k_hadamard", self.k_hadamard, ("k", k.shape[DIM]))?;
        self.to.validate(k.shape[BATCH], k.shape[SEQ], &k_cache.units)?;
        if let Some(rope) = &self.rope {
            rope.validate(k)?;
        }
        match (&self.k_norm, &self.rope) {
            (Some(norm), Some(_)) => norm.validate_staged("k", k)?,
            (Some(norm), None) => norm.validate("k", k)?,
            (None, _) => {}
        }
        let (quantised, prepared) = (k_cache.dtype.dtype().is_none(), self.k_norm.is_some() || self.rope.is_some());
        let rotated = self.k_hadamard.is_some();
        if quantised && (prepared || rotated) || prepared && rotated {
            check_staged("k", k.shape[DIM])?;
        }
        self.to.check_shared("k_cache", k_cache, k)?;
        if let Some((v, v_cache)) = &self.values {
            self.to.check_shared("v_cache", v_cache, v)?;
            ensure!(
                tokens_sharing(v_cache) == 1 || self.v_hadamard.is_none(),
                Unsupported,
                "{} tokens of v_cache share scales, but v_hadamard rotates them one by one: rotate v before it is written",
                tokens_sharing(v_cache)
            );
        }
        ensure!(
            tokens_sharing(k_cache) == 1 || !prepared && !rotated,
            Unsupported,
            "{} tokens of k_cache share scales, but norms and rotations are of one token: apply them to k before it is written",
            tokens_sharing(k_cache)
        );
        Ok(())
    }
}

/// Tokens that share scales which a write computes.
pub(super) fn tokens_sharing(cache: &RawCacheView) -> usize {
    cache.affine.as_ref().filter(|affine| !affine.fixed).map_or(1, |affine| affine.shared[SEQ])
}

/// # Safety
/// The memory that valid views reach is readable and, for the caches, writable, by this call alone.
pub(crate) unsafe fn kv_write_raw(context: &Context, runner: &dyn Runner, write: &RawWrite) -> Result<()> {
    write.validate()?;
    let RawWrite { keys: (k, k_cache), values, to, k_norm, rope, k_hadamard, v_hadamard, v_packing } = write;
    let seq = k.shape[SEQ];
    let angles = context.angles();
    let heads = k.shape[..DIM].iter().fold(1usize, |n, &axis| n.saturating_mul(axis));
    let bytes = heads.saturating_mul(k.head_bytes().saturating_add(k_cache.head_bytes()));
    let asks = bytes > cache::second_level() / 2
        && (asks_for(k)
            || asks_for(&k_cache.units)
            || values.as_ref().is_some_and(|(v, v_cache)| asks_for(v) || asks_for(&v_cache.units)));
    let key_kernels = HeadKernels::write(context, *k_norm, rope.is_some(), *k_hadamard, k.dtype, k_cache.dtype);
    let value_kernels = values
        .as_ref()
        .map(|(v, v_cache)| HeadKernels::write(context, None, false, *v_hadamard, v.dtype, v_cache.dtype));
    // Tokens that share scales are written with the first of them.
    let shared = [tokens_sharing(k_cache), values.as_ref().map_or(1, |(_, v_cache)| tokens_sharing(v_cache))];
    for_each_token_with(
        runner,
        k.shape,
        || rope.map(|_| TokenAngles::new()),
        |token_angles, (b, t)| {
            let Some(place) = to.place(b, t, seq, &k_cache.units) else { return };
            // SAFETY: the views and the destination are valid; no two tokens share a slot.
            unsafe {
                let next = if asks && t + 1 < seq { to.place(b, t + 1, seq, &k_cache.units) } else { None };
                if !k.is_empty() {
                    let mut copy = token_copy(k, (b, t), &k_cache.units, place);
                    match values {
                        Some((v, v_cache)) if asks && *v_packing == Packing::Rows && !v.is_empty() => {
                            ask_for(&mut copy, v.row(b, t, 0), v_cache.row(place.0, place.1, 0));
                        }
                        _ if asks => (copy.src_prefetch, copy.dst_prefetch) = (ahead(k), ahead(&k_cache.units)),
                        _ => {}
                    }
                    let turn = match (rope, token_angles) {
                        (Some(rope), Some(token_angles)) => {
                            let (cos, sin) = token_angles.at(rope, angles, rope.position(b, t, seq));
                            Some(Turn { rotary_dim: rope.rotary_dim, pairing: rope.pairing, cos, sin })
                        }
                        _ => None,
                    };
                    if place.1.is_multiple_of(shared[0]) {
                        key_kernels.run(&copy, || [None, Scales::of_block(shared[0], k, k_cache, place)], turn);
                    }
                }
                if let Some((v, v_cache)) = values
                    && !v.is_empty()
                {
                    match v_packing {
                        Packing::Rows => {
                            let mut copy = token_copy(v, (b, t), &v_cache.units, place);
                            if let Some(next) = next {
                                ask_for(&mut copy, k.row(b, t + 1, 0), k_cache.row(next.0, next.1, 0));
                            }
                            if let Some(kernels) = &value_kernels
                                && place.1.is_multiple_of(shared[1])
                            {
                                kernels.run(&copy, || [None, Scales::of_block(shared[1], v, v_cache, place)], None);
                            }
                        }
                        Packing::RowPairs if v_hadamard.is_some() => {
                            let copy = into_pair(
                                token_copy(v, (b, t), &v_cache.units, (place.0, place.1 / 2)),
                                &v_cache.units,
                                place.1,
                            );
                            if let Some(kernels) = &value_kernels {
                                kernels.run(&copy, || [None, None], None);
                            }
                        }
                        Packing::RowPairs => {
                            let v_copy = context.copy(Op::KvWrite, v.dtype, v_cache.dtype);
                            let ahead = if asks { (ahead(v), ahead(&v_cache.units)) } else { (0, 0) };
                            pack_token(v_copy, v, (b, t), &v_cache.units, ahead, |t| {
                                to.place(b, t, seq, &k_cache.units)
                            });
                        }
                    }
                }
            }
        },
    )
}

/// Checks a source and its cache; returns the extents of both.
fn check_pair(name: &str, src: &RawView, cache_name: &str, cache: &RawCacheView) -> Result<(Extent, CacheExtent)> {
    let (from, to) = (src.validate(name)?, cache.validate_output(cache_name)?);
    src.same_axis(name, cache, cache_name, HEADS)?;
    ensure!(!cache.overlaps_within(to, src, from), Overlap, "{name} and {cache_name} share memory");
    Ok((from, to))
}

/// Sets the prefetch of a token's copy to what is copied next: to the values during the keys of a large write, and to the next
/// keys during the values.
fn ask_for(copy: &mut CopyArgs, src: *const u8, dst: *const u8) {
    if (copy.src_dim, copy.dst_dim) == (1, 1) {
        copy.src_prefetch = src.addr().wrapping_sub(copy.src.addr()) as isize;
        copy.dst_prefetch = dst.addr().wrapping_sub(copy.dst.addr()) as isize;
    }
}
