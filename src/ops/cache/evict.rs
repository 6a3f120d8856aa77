//! Dropping tokens from the middle of a sequence: see [`KvCache`].

use super::shared_scales::Token;
use super::{
    KvCache, Load, RawCache, RowOf, Step, check_apart, check_pages_unshared, check_requantized, for_each_piece,
    heads_of, in_layer, move_positions, move_tokens,
};
use crate::context::Context;
use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::layout::Layout;
use crate::ops::hadamard::check_block;
use crate::ops::heads::{Turn, check_staged};
use crate::ops::rope::{RopeFrequencies, check_frequencies, check_rotary_dim};
use crate::ops::setters::setters;
use crate::parallel::Runner;
use crate::problem::limits::MAX_ROTARY_DIM;
use crate::problem::rotation::Pairing;
use crate::view::{BATCH, DIM, HEADS, RawCacheView, RawView, SEQ, View};
use std::ops::Range;
use std::slice::from_ref;

/// The rotation that the keys of a layer were written with.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KeyRotation<'a> {
    /// Which elements form a pair.
    pub pairing: Pairing,
    /// The frequencies, with their scaling. [`KvCache::evict`] ignores their magnitude.
    pub frequencies: &'a RopeFrequencies,
    /// The block of the [Hadamard rotation](crate::hadamard) that followed; none if absent. The keys are brought out of it, turned, and
    /// brought back.
    pub hadamard: Option<usize>,
}

impl<'a> KeyRotation<'a> {
    /// The rotation that keys were written with.
    pub fn new(pairing: Pairing, frequencies: &'a RopeFrequencies) -> Self {
        Self { pairing, frequencies, hadamard: None }
    }

    setters! {
        optional { hadamard: usize, }
    }

    fn raw(&self) -> RawRotation<'a> {
        RawRotation { pairing: self.pairing, inv_freq: self.frequencies.inv_freq(), hadamard: self.hadamard }
    }
}

/// [`KeyRotation`] as the C ABI has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawRotation<'a> {
    pub pairing: Pairing,
    pub inv_freq: &'a [f64],
    pub hadamard: Option<usize>,
}

impl KvCache<'_, '_> {
    /// Drops the tokens `drop` of a sequence and closes the gap: later tokens move down by `drop.len()` positions, and their
    /// keys are rotated to the new positions. To keep sink tokens, begin after them.
    ///
    /// `rotations` has an entry per layer, or one for all layers, or none if keys carry no rotation; `None` is a layer whose
    /// keys are not rotated. Angles are computed in f64; arithmetic is f32, rounded once to the format of the cache. Each call
    /// adds one rounding of every moved key: half a unit in the last place of an element, in f32 the `max_error` of
    /// [`Op::Rope`](crate::Op::Rope), and half a scale in int8, whose keys are read, rotated and
    /// quantised again with a new scale; in fp8 with the same one. A [Hadamard rotation](KeyRotation::hadamard) of the keys is undone and
    /// repeated in f32.
    ///
    /// These errors [add up](Self#dropping-tokens-in-two-ways). Values, and keys that are not rotated, move with all their bits,
    /// scales included, unless [several tokens share scales](crate::docs::caches#tokens-that-share-scales) and the gap is not one of whole
    /// blocks. Units behind the new end of the sequence do not change.
    ///
    /// In a paged cache, tokens move from page to page; the caller frees pages that the sequence no longer needs.
    ///
    /// # Errors
    /// - [`Status::OutOfRange`](crate::Status::OutOfRange): the sequence does not exist, or `drop` is no range of its tokens.
    /// - [`Status::Shape`](crate::Status::Shape): the number of rotations fits neither all layers nor each, or a `rotary_dim`
    ///   exceeds the dim of a layer, or heads above 1024 elements have scales that several tokens share.
    /// - [`Status::Overlap`](crate::Status::Overlap): a page would be written that another sequence uses too.
    /// - [`Status::InvalidValue`](crate::Status::InvalidValue): the layout is a ring, whose positions are bound to slots, or
    ///   [`Layout::Indirect`], whose tokens belong to several sequences.
    ///
    /// On an error, nothing has been written.
    pub fn evict(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        sequence: usize,
        drop: Range<usize>,
        rotations: &[Option<KeyRotation>],
    ) -> Result<()> {
        let raw = |i: usize| Ok(rotations[i].as_ref().map(KeyRotation::raw));
        let n = rotations.len();
        // SAFETY: the views borrow what they reach.
        self.with_raw(|cache| unsafe { evict_raw(context, runner, cache, sequence as i64, drop, n, &raw) })
    }

    /// Drops the tokens `drop` of a sequence and closes the gap, and lets RoPE positions run on: the keys of later tokens move
    /// with all their bits, as values do, and the keys before the gap are written again from unrotated copies. Whatever the
    /// number of calls, each key has been rounded once. Where [several tokens share scales](crate::docs::caches#tokens-that-share-scales),
    /// that holds for gaps of whole blocks.
    ///
    /// `dropped` is the number of tokens that the sequence has lost before this call. After it, every token t, by its new
    /// number, has RoPE position `t + dropped + drop.len()`, and the next query and key take `length + dropped`, with the new
    /// length and the new sum. `lengths`, causality, windows and ALiBi count from 0, whatever `dropped` is.
    ///
    /// `unrotated` has an entry per layer, or one for all layers, or none if keys carry no rotation or no token is kept before
    /// the gap. `None` is a layer whose keys before the gap stay as they are.
    ///
    /// In a paged cache, tokens move from page to page; the caller frees pages that the sequence no longer needs.
    ///
    /// # Errors
    /// Those of [`evict`](Self::evict). [`Status::Shape`](crate::Status::Shape): a copy has fewer tokens than lie before the
    /// gap, or other heads or another dim than the keys of the layer. [`Status::Overlap`](crate::Status::Overlap): a copy
    /// shares memory with the cache. [`Status::Capacity`](crate::Status::Capacity): positions exceed `i32::MAX`. On an error,
    /// nothing has been written.
    ///
    /// ```
    /// use kvlane::*;
    /// let context = Context::new()?;
    /// let frequencies = RopeFrequencies::new(4, 10_000.0, &RopeScaling::None)?;
    /// let rotation = KeyRotation::new(Pairing::HalfSplit, &frequencies);
    /// // A sequence that is full with eight tokens, the first of which is kept.
    /// let mut memory = vec![half::bf16::ONE; 8 * 4];
    /// let first_key = [1.0f32, 0.0, 0.0, 0.0]; // before its rotation
    /// let (mut lengths, mut dropped) = ([8], 0);
    /// for _step in 0..3 {
    ///     let mut layers = [KvLayer::keys(ViewMut::new(&mut memory, [1, 8, 1, 4])?)];
    ///     let mut cache = KvCache::new(&mut layers, Layout::Contiguous, &mut lengths);
    ///     let unrotated = UnrotatedKeys::new(View::new(&first_key, [1, 1, 1, 4])?, rotation);
    ///     cache.evict_running(&context, &Serial, 0, 1..2, dropped, &[Some(unrotated)])?;
    ///     dropped += 1;
    ///     // The next token goes to slot 7, with RoPE position 7 + dropped.
    ///     lengths[0] += 1;
    /// }
    /// assert!((memory[0].to_f32() - 3f32.cos()).abs() < 0.01);
    /// # Ok::<(), kvlane::Error>(())
    /// ```
    pub fn evict_running(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        sequence: usize,
        drop: Range<usize>,
        dropped: usize,
        unrotated: &[Option<UnrotatedKeys>],
    ) -> Result<()> {
        let raw = |i: usize| Ok(unrotated[i].as_ref().map(UnrotatedKeys::raw));
        let n = unrotated.len();
        // SAFETY: the views borrow what they reach.
        self.with_raw(|cache| unsafe {
            evict_running_raw(context, runner, cache, sequence as i64, drop, dropped, (n, &raw))
        })
    }
}

/// Keys before their rotation, and the rotation: the source of the first tokens of a sequence in [`KvCache::evict_running`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct UnrotatedKeys<'a> {
    /// `[1, tokens, kv_heads, dim]`, of any type: the keys of the first tokens, after the norm if the model has one.
    pub keys: View<'a>,
    /// The rotation, with the magnitude of its frequencies.
    pub rotation: KeyRotation<'a>,
}

impl<'a> UnrotatedKeys<'a> {
    /// The keys, and the rotation that they were written with.
    pub fn new(keys: View<'a>, rotation: KeyRotation<'a>) -> Self {
        Self { keys, rotation }
    }

    fn raw(&self) -> RawUnrotated<'a> {
        let Self { keys, rotation } = self;
        RawUnrotated { keys: keys.raw, rotation: rotation.raw(), magnitude: rotation.frequencies.magnitude() }
    }
}

/// [`UnrotatedKeys`] as the C ABI has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawUnrotated<'a> {
    pub keys: RawView,
    pub rotation: RawRotation<'a>,
    pub magnitude: f64,
}

/// A getter of one item per layer, and the number of items: none, one for all layers, or one for each layer.
pub(crate) type PerLayer<'f, T> = (usize, &'f (dyn Fn(usize) -> Result<Option<T>> + Sync));

fn of_layer<T>((n, get): PerLayer<T>, layer: usize) -> Result<Option<T>> {
    match n {
        0 => Ok(None),
        1 => get(0),
        _ => get(layer),
    }
}

/// # Safety
/// The memory that valid views reach is readable and writable by this call alone.
pub(crate) unsafe fn evict_raw<'a>(
    context: &Context,
    runner: &dyn Runner,
    cache: &mut RawCache,
    row: i64,
    drop: Range<usize>,
    rotations: usize,
    rotation: &(dyn Fn(usize) -> Result<Option<RawRotation<'a>>> + Sync),
) -> Result<()> {
    let (first, row, length) = check_drop(cache, row, &drop)?;
    let (layers, layout, lengths, gap) = (cache.layers, cache.layout, &*cache.lengths, drop.len());
    check_per_layer(cache, "rotations", (rotations, rotation), |rotation, k| check_rotation(&rotation, 1.0, k))?;
    let moved = length - drop.end;
    if gap > 0 && moved > 0 {
        check_pages_of_gap(cache, &first, row, &drop, drop.start)?;
        let angles = context.angles();
        for_each_piece(runner, layers, moved, &|_, piece| {
            let cache = &piece.cache;
            let row = RowOf { layout: &layout, cache, row };
            let (mut cos, mut sin) = ([0.0; MAX_ROTARY_DIM / 2], [0.0; MAX_ROTARY_DIM / 2]);
            let rotation = if piece.values { Ok(None) } else { of_layer((rotations, rotation), piece.layer) };
            let step = match rotation.expect("the rotations were valid a moment ago") {
                None => Step::copy_any(context, cache),
                Some(RawRotation { pairing, inv_freq, hadamard }) => {
                    let (cos, sin) = (&mut cos[..inv_freq.len()], &mut sin[..inv_freq.len()]);
                    // SAFETY: the context hands out kernels of available levels only.
                    unsafe { angles(-(gap as f64), inv_freq, 1.0, cos, sin) };
                    Step::turn(context, None, cache, (pairing, hadamard), (cos, sin))
                }
            };
            let after = |other| if other == row.row { length - gap } else { lengths[other] as usize };
            // SAFETY: all positions are the sequence's, on pages that it has once; tokens move down in ascending order, no more
            // at a time than the gap is long, so that none is written before it was read.
            unsafe { move_positions(&step, row, from_ref(&(drop.end..length)), row, gap, &after) };
        })?;
    }
    cache.lengths[row] = (length - gap) as i32;
    Ok(())
}

/// # Safety
/// The memory that valid views reach is readable, and that of the cache writable by this call alone.
pub(crate) unsafe fn evict_running_raw<'a>(
    context: &Context,
    runner: &dyn Runner,
    cache: &mut RawCache,
    row: i64,
    drop: Range<usize>,
    dropped: usize,
    unrotated: PerLayer<RawUnrotated<'a>>,
) -> Result<()> {
    let (first, row, length) = check_drop(cache, row, &drop)?;
    let (layers, layout, gap, kept) = (cache.layers, cache.layout, drop.len(), drop.start);
    ensure!(
        dropped.checked_add(length).is_some_and(|n| n <= i32::MAX as usize),
        Capacity,
        "sequence {row} holds {length} tokens and has lost {dropped}, but positions go up to {}",
        i32::MAX
    );
    check_per_layer(cache, "unrotated keys", unrotated, |unrotated, k| {
        let RawUnrotated { keys, rotation, magnitude } = unrotated;
        check_rotation(&rotation, magnitude, k)?;
        keys.validate("the unrotated keys")?;
        let (rows, tokens) = (keys.shape[BATCH], keys.shape[SEQ]);
        ensure!(rows == 1, Shape, "the unrotated keys have batch = {rows}, but are those of one sequence");
        ensure!(
            tokens >= kept,
            Shape,
            "there are unrotated keys of {tokens} tokens, but {kept} are kept before the gap"
        );
        for axis in [HEADS, DIM] {
            keys.same_axis("the unrotated keys", k, "k", axis)?;
        }
        check_apart(layers, 2 * layers.count(), &keys.into(), "the cache")
    })?;
    layout.validate_row("the cache", &first, row, 0, kept)?;
    let rewrites = gap > 0 && kept > 0 && (0..layers.count()).any(|i| matches!(of_layer(unrotated, i), Ok(Some(_))));
    let moved = length - drop.end;
    if gap > 0 && (moved > 0 || rewrites) {
        check_pages_of_gap(cache, &first, row, &drop, if rewrites { 0 } else { kept })?;
    }
    if gap > 0 && (moved > 0 || rewrites) {
        let (angles, lengths) = (context.angles(), &*cache.lengths);
        let work = moved.saturating_add(if rewrites { kept } else { 0 });
        for_each_piece(runner, layers, work, &|_, piece| {
            let cache = &piece.cache;
            let dst = RowOf { layout: &layout, cache, row };
            let after = |other| if other == row { length - gap } else { lengths[other] as usize };
            let place = |position| layout.place(&cache.units, row, position).0;
            let step = Step::copy_any(context, cache);
            let unrotated = if piece.values || kept == 0 { Ok(None) } else { of_layer(unrotated, piece.layer) };
            let Some(unrotated) = unrotated.expect("the keys were valid a moment ago") else {
                // SAFETY: as in `evict_raw`.
                unsafe { move_positions(&step, dst, from_ref(&(drop.end..length)), dst, gap, &after) };
                return;
            };
            let RawRotation { pairing, inv_freq, hadamard } = unrotated.rotation;
            let (dtype, src) = (unrotated.keys.dtype, heads_of(&unrotated.keys, piece.heads).into());
            let (mut cos, mut sin) = ([0.0; MAX_ROTARY_DIM / 2], [0.0; MAX_ROTARY_DIM / 2]);
            let (cos, sin) = (&mut cos[..inv_freq.len()], &mut sin[..inv_freq.len()]);
            let turn_to = |token: usize, cos: &mut [f32], sin: &mut [f32]| {
                let position = (token + dropped + gap) as f64;
                // SAFETY: the context hands out kernels of available levels only.
                unsafe { angles(position, inv_freq, unrotated.magnitude, cos, sin) };
            };
            if let Step::Blocks(blocks) = &step {
                // Tokens before and behind the gap can share scales.
                let load = Load::turned(context, Some(dtype), cache.dtype, hadamard, None);
                let mut last = None;
                let mut arrives = |position| {
                    if position >= kept {
                        return Some(blocks.token(cache, place(position + gap)));
                    }
                    if last.replace(position) != Some(position) {
                        turn_to(position, cos, sin);
                    }
                    let turn = Turn::new(pairing, cos, sin);
                    Some(Token { cache: &src, at: (0, position), load: &load, turn: Some(turn) })
                };
                // SAFETY: as in `evict_raw`, and below.
                unsafe { blocks.fill(dst, 0..length - gap, &after, &mut arrives) };
                return;
            }
            // SAFETY: as in `evict_raw`; the tokens before the gap are the sequence's, on pages that it has once, and the copies
            // have its heads and share no memory with it.
            unsafe {
                move_positions(&step, dst, from_ref(&(drop.end..length)), dst, gap, &after);
                for token in 0..kept {
                    turn_to(token, cos, sin);
                    let step = Step::turn(context, Some(dtype), cache, (pairing, hadamard), (&*cos, &*sin));
                    move_tokens(&step, &src, (0, token), cache, place(token), 1);
                }
            }
        })?;
    }
    cache.lengths[row] = (length - gap) as i32;
    Ok(())
}

/// Checks the cache and what is to be dropped; returns the keys of the first layer, the sequence and its length.
fn check_drop(cache: &RawCache, row: i64, drop: &Range<usize>) -> Result<(RawView<CacheFormat>, usize, usize)> {
    let first = cache.validate()?;
    check_requantized(cache.layers, true)?;
    let row = cache.check_row("sequence", row)?;
    let why = match cache.layout {
        Layout::Contiguous | Layout::Paged { .. } | Layout::Ragged { .. } => None,
        Layout::Ring { .. } => Some("a ring drops its oldest tokens by itself, and a token cannot leave its slot"),
        Layout::Indirect { .. } => Some("tokens of an indirect cache belong to several sequences and cannot move"),
    };
    ensure!(why.is_none(), InvalidValue, "{}", why.unwrap_or_default());
    let length = cache.length(row);
    ensure!(
        drop.start <= drop.end && drop.end <= length,
        OutOfRange,
        "tokens {} to {} are to be dropped, but sequence {row} has {length} tokens",
        drop.start,
        drop.end
    );
    cache.layout.validate_row("the cache", &first, row, drop.start, length)?;
    Ok((first, row, length))
}

/// Checks what is given for each layer against its keys; errors name the layer.
fn check_per_layer<T>(
    cache: &RawCache,
    what: &str,
    given: PerLayer<T>,
    check: impl Fn(T, &RawCacheView) -> Result<()>,
) -> Result<()> {
    let (layers, n) = (cache.layers, cache.layers.count());
    ensure!(
        given.0 <= 1 || given.0 == n,
        Shape,
        "there are {} {what}, but the cache has {n} layers: give none, one, or one per layer",
        given.0
    );
    for i in 0..n {
        let check = || {
            let Some(given) = of_layer(given, i)? else { return Ok(()) };
            check(given, &layers.layer(i)?.k)
        };
        check().map_err(|e| in_layer(i, e))?;
    }
    Ok(())
}

fn check_rotation(rotation: &RawRotation, magnitude: f64, k: &RawCacheView) -> Result<()> {
    let (rotary_dim, dim) = (rotation.inv_freq.len().saturating_mul(2), k.shape[DIM]);
    if k.dtype.dtype().is_none() || rotation.hadamard.is_some() {
        check_staged("k", dim)?;
    }
    check_block("hadamard", rotation.hadamard, ("k", dim))?;
    check_rotary_dim(rotary_dim)?;
    ensure!(rotary_dim <= dim, Shape, "rotary_dim {rotary_dim} is above the head size {dim}");
    check_frequencies(rotation.inv_freq, magnitude)
}

/// Checks that no other sequence has the pages that are written when the gap is closed, those of the tokens from `from` on.
fn check_pages_of_gap(
    cache: &RawCache,
    first: &RawView<CacheFormat>,
    row: usize,
    drop: &Range<usize>,
    from: usize,
) -> Result<()> {
    let (layout, length) = (&cache.layout, cache.length(row));
    check_pages_unshared(layout, first, row, (from, length - drop.len()), &|other| cache.length(other))?;
    // The pages that are only read are the sequence's as well: one that came twice would be read after it was written.
    check_pages_unshared(layout, first, row, (from, length), &|_| 0)
}
