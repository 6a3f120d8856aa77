//! Dropping tokens from the middle of a row.
//!
//! A key at position p has been turned by the angles `p * f`. Once `n` tokens before it are gone it stands at position
//! `p - n`, and turning it by `-n * f` more gives what RoPE would have made of it there: all keys after the gap are turned by
//! the same angles, which are computed once, in f64. A factor on cosines and sines (YaRN, LongRoPE) is in the keys already and is
//! not applied again.

use super::{KvCache, RawCache, RowOf, Step, check_pages_unshared, for_each_piece, move_range};
use crate::context::Context;
use crate::error::{Error, Result, ensure};
use crate::kernels::api::Op;
use crate::layout::Layout;
use crate::ops::rope::{RopeFrequencies, check_frequencies, check_rotary_dim};
use crate::parallel::Runner;
use crate::problem::limits::MAX_ROTARY_DIM;
use crate::problem::rotation::Pairing;
use crate::view::DIM;
use std::ops::Range;

/// How the keys of a layer were turned when they were written.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct KeyRotation<'a> {
    /// Which elements form a pair.
    pub pairing: Pairing,
    /// The frequencies, scaling and all; their magnitude does not matter here.
    pub frequencies: &'a RopeFrequencies,
}

impl<'a> KeyRotation<'a> {
    /// The rotation that keys were written with.
    pub fn new(pairing: Pairing, frequencies: &'a RopeFrequencies) -> Self {
        Self { pairing, frequencies }
    }
}

/// [`KeyRotation`] as the C ABI has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawRotation<'a> {
    pub pairing: Pairing,
    pub inv_freq: &'a [f64],
}

impl KvCache<'_, '_> {
    /// Drops the tokens `drop` of a row and closes the gap: later tokens move down by `drop.len()` positions, and their keys
    /// are turned to where they then stand. To keep sinks, begin after them.
    ///
    /// `rotations` has an entry a layer, or one for all of them, or none where keys carry no rotation; `None` is a layer whose
    /// keys are not turned. Angles are computed in f64, arithmetic is f32, rounded once to the type of the cache. The error
    /// that a pair of elements has is turned with it, and each call adds that of one more RoPE into the cache's type: half a
    /// unit in the last place of each element, and in f32 `max_error` of [`Op::Rope`]. Values move to the bit. What is
    /// behind the new end of the row keeps its bytes.
    ///
    /// In a paged cache tokens move from page to page; pages that the row needs no more are the caller's to give away.
    ///
    /// Thread safety: may be called from any number of threads at once on disjoint caches.
    ///
    /// # Errors
    /// A row that does not exist, a range that is none or goes beyond the row's length, a number of rotations that fits
    /// nothing, a `rotary_dim` above a layer's dim, a page that is to be written and that another row uses too; a ring, which
    /// drops its oldest tokens by itself and in which positions are bound to slots; an [`Indirect`](Layout::Indirect) cache, whose
    /// tokens belong to several rows. Nothing has been written then.
    pub fn evict(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        row: usize,
        drop: Range<usize>,
        rotations: &[Option<KeyRotation>],
    ) -> Result<()> {
        let raw =
            |i: usize| Ok(rotations[i].map(|r| RawRotation { pairing: r.pairing, inv_freq: r.frequencies.inv_freq() }));
        let n = rotations.len();
        // SAFETY: the views borrow what they reach.
        self.with_raw(|cache| unsafe { evict_raw(context, runner, cache, row as i64, drop, n, &raw) })
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
    let first = cache.validate()?;
    let row = cache.check_row("row", row)?;
    let layout = cache.layout;
    let why = match layout {
        Layout::Contiguous | Layout::Paged { .. } | Layout::Ragged { .. } => None,
        Layout::Ring { .. } => Some("a ring drops its oldest tokens by itself, and a token cannot leave its slot"),
        Layout::Indirect { .. } => Some("tokens of an indirect cache belong to several rows and cannot move"),
    };
    ensure!(why.is_none(), InvalidValue, "{}", why.unwrap_or_default());
    let length = cache.length(row);
    ensure!(
        drop.start <= drop.end && drop.end <= length,
        OutOfRange,
        "tokens {} to {} are to be dropped, but row {row} has {length} tokens",
        drop.start,
        drop.end
    );
    let (layers, gap) = (cache.layers, drop.len());
    let n = layers.count();
    ensure!(
        rotations <= 1 || rotations == n,
        Shape,
        "there are {rotations} rotations, but the cache has {n} layers: give none, one, or one a layer"
    );
    let of_layer = |i: usize| match rotations {
        0 => Ok(None),
        1 => rotation(0),
        _ => rotation(i),
    };
    for i in 0..n {
        let check = || {
            let Some(rotation) = of_layer(i)? else { return Ok(()) };
            let (rotary_dim, dim) = (rotation.inv_freq.len().saturating_mul(2), layers.layer(i)?.k.shape[DIM]);
            check_rotary_dim(rotary_dim)?;
            ensure!(rotary_dim <= dim, Shape, "rotary_dim {rotary_dim} is above the head size {dim}");
            check_frequencies(rotation.inv_freq, 1.0)
        };
        check().map_err(|e: Error| Error::new(e.status(), format!("layer {i}: {}", e.message())))?;
    }
    layout.validate_row("the cache", &first, row, drop.start, length)?;
    let moved = length - drop.end;
    if gap > 0 && moved > 0 {
        check_pages_unshared(&layout, &first, row, (drop.start, length - gap), &|other| cache.length(other))?;
        // The pages that are only read are the row's as well: one that came twice would be read after it was written.
        check_pages_unshared(&layout, &first, row, (drop.start, length), &|_| 0)?;
        let angles = context.angles();
        for_each_piece(runner, layers, moved, &|_, piece| {
            let view = &piece.view;
            let row = RowOf { layout: &layout, view, row };
            let (mut cos, mut sin) = ([0.0; MAX_ROTARY_DIM / 2], [0.0; MAX_ROTARY_DIM / 2]);
            let rotation = if piece.values { Ok(None) } else { of_layer(piece.layer) };
            let step = match rotation.expect("the rotations were valid a moment ago") {
                None => Step::Copy(context.copy(Op::KvWrite, view.dtype, view.dtype)),
                Some(RawRotation { pairing, inv_freq }) => {
                    let (cos, sin) = (&mut cos[..inv_freq.len()], &mut sin[..inv_freq.len()]);
                    // SAFETY: the context hands out kernels of available levels only.
                    unsafe { angles(-(gap as f64), inv_freq, 1.0, cos, sin) };
                    Step::Rotate { kernel: context.rope(view.dtype, view.dtype), pairing, cos, sin }
                }
            };
            // SAFETY: all positions are the row's, on pages that it has once; tokens move down in ascending order, no more
            // at a time than the gap is long, so that none is written before it was read.
            unsafe { move_range(&step, row, drop.end..length, row, drop.start, gap) };
        })?;
    }
    cache.lengths[row] = (length - gap) as i32;
    Ok(())
}
