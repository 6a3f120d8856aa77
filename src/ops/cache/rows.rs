//! Whole sequences: emptied, inserted from another cache, copied in part.

use super::{
    KvCache, RawCache, RowOf, SafeLayers, Step, cache_at, cache_heads_of, check_apart, check_blocks, check_held,
    check_pages_unshared, check_requantized, for_each_piece, held, in_layer, lost, move_positions, plane, requantizes,
};
use crate::context::Context;
use crate::error::{Result, ensure, fail};
use crate::layout::{Layout, Place};
use crate::ops::heads::check_staged;
use crate::parallel::Runner;
use crate::view::{DIM, HEADS, RawAffine, RawView, SEQ, Units};

impl KvCache<'_, '_> {
    /// Empties sequences: their lengths become 0. With `zero`, their slots are filled with zeros too; in a paged cache, all
    /// slots of the pages in use. Scales that tokens of a ragged neighbour share stay.
    ///
    /// # Errors
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): a sequence does not exist.
    /// [`Status::DuplicateSlot`](crate::Status::DuplicateSlot): a sequence comes twice. With `zero`,
    /// [`Status::Overlap`](crate::Status::Overlap): another sequence uses one of the pages;
    /// [`Status::InvalidValue`](crate::Status::InvalidValue): the layout is [`Indirect`](Layout::Indirect), whose sequences
    /// hold each other's tokens (reset it as a contiguous cache). On an error, nothing has been written.
    pub fn reset(&mut self, runner: &dyn Runner, sequences: &[i32], zero: bool) -> Result<()> {
        // SAFETY: the views borrow what they reach.
        self.with_raw(|cache| unsafe { reset_raw(runner, cache, sequences, zero) })
    }

    /// Copies the first `length` tokens of sequence `from_sequence` of another cache into sequence `sequence` of this one,
    /// whose length becomes `length`: a prompt that was prefilled alone joins a batch.
    ///
    /// Both caches have the same number of layers, and these have the same heads and dims. Formats may differ (elements are
    /// converted to the nearest value, ties to even). Int8 keeps its units and scales in another int8 cache, unless that has f16
    /// scales for f32 ones, fp8 keeps its units in a cache of the same format and static scales, and described integers where the
    /// description is the same and [tokens that share scales](crate::docs::caches#tokens-that-share-scales) have shared them: otherwise heads
    /// are quantised again. Layouts may differ too: a paged sequence becomes a contiguous one, or the
    /// reverse. A ring takes the tokens that it would hold after `length` tokens; the other cache must hold those.
    ///
    /// # Errors
    /// - [`Status::Shape`](crate::Status::Shape): the caches differ in layers, heads or dims, or heads above 1024 elements go to a cache
    ///   in which several tokens share scales.
    /// - [`Status::OutOfRange`](crate::Status::OutOfRange): a sequence does not exist, or `length` exceeds that of the source,
    ///   or tokens were overwritten.
    /// - [`Status::Capacity`](crate::Status::Capacity): `length` exceeds the capacity of the sequence.
    /// - [`Status::Overlap`](crate::Status::Overlap): the caches share memory, or another sequence uses a page of this one.
    /// - [`Status::InvalidValue`](crate::Status::InvalidValue): this cache is [`Indirect`](Layout::Indirect). Insert into it as
    ///   into a contiguous cache, then call [`set_table_tokens`](crate::set_table_tokens).
    ///
    /// On an error, nothing has been written.
    pub fn insert_sequence(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        sequence: usize,
        from: &mut KvCache,
        from_sequence: usize,
        length: usize,
    ) -> Result<()> {
        let layers = SafeLayers(from.layers);
        let from = RawCache { layers: &layers, layout: from.layout, lengths: from.lengths };
        // SAFETY: the views borrow what they reach.
        self.with_raw(|cache| unsafe {
            insert_sequence_raw(context, runner, cache, sequence as i64, &from, from_sequence as i64, length)
        })
    }

    /// Copies the first `tokens` tokens of sequence `from` into the sequences `to`, whose lengths become `tokens`: one prompt,
    /// many continuations. Sequences of a paged cache can share full pages by their table instead, without a copy. Tokens that [share
    /// scales](crate::docs::caches#tokens-that-share-scales) are copied with them; where ragged sequences begin at other places of their
    /// blocks, they are quantised again.
    ///
    /// # Errors
    /// - [`Status::OutOfRange`](crate::Status::OutOfRange): a sequence does not exist, `tokens` exceeds the length of the
    ///   source, or tokens were overwritten.
    /// - [`Status::DuplicateSlot`](crate::Status::DuplicateSlot): a sequence comes twice, or is the source.
    /// - [`Status::Capacity`](crate::Status::Capacity): `tokens` exceeds the capacity of a sequence.
    /// - [`Status::Shape`](crate::Status::Shape): heads above 1024 elements have scales that several tokens share.
    /// - [`Status::Overlap`](crate::Status::Overlap): a page would be written that another sequence uses too.
    /// - [`Status::InvalidValue`](crate::Status::InvalidValue): the layout is [`Indirect`](Layout::Indirect); copy entries of
    ///   its table instead.
    ///
    /// On an error, nothing has been written.
    pub fn copy_prefix(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        from: usize,
        to: &[i32],
        tokens: usize,
    ) -> Result<()> {
        // SAFETY: the views borrow what they reach.
        self.with_raw(|cache| unsafe { copy_prefix_raw(context, runner, cache, from as i64, to, tokens) })
    }
}

/// # Safety
/// The memory that valid views reach is writable by this call alone.
pub(crate) unsafe fn reset_raw(runner: &dyn Runner, cache: &mut RawCache, rows: &[i32], zero: bool) -> Result<()> {
    let first = cache.validate()?;
    cache.check_rows("sequences", rows)?;
    if zero {
        let (layout, slots) = (cache.layout, first.shape[SEQ]);
        ensure!(
            !matches!(layout, Layout::Indirect { .. }),
            InvalidValue,
            "sequences of an indirect cache hold each other's tokens: to fill them with zeros, reset it as a contiguous one"
        );
        // The tokens of a sequence that has no pages are all its slots; those of a paged one are on pages in use.
        let tokens = |row: usize| match layout {
            Layout::Paged { .. } => cache.length(row).next_multiple_of(slots),
            Layout::Contiguous | Layout::Ring { .. } => slots,
            _ => layout.capacity(&first, row),
        };
        let others = |row: usize| if rows.contains(&(row as i32)) { 0 } else { cache.length(row) };
        for &row in rows {
            let row = row as usize;
            layout.validate_row("the cache", &first, row, 0, cache.length(row))?;
            check_pages_unshared(&layout, &first, row, (0, cache.length(row)), &others)?;
        }
        let most = rows.iter().map(|&row| tokens(row as usize)).fold(0, usize::saturating_add);
        for_each_piece(runner, cache.layers, most, &|_, piece| {
            for &row in rows {
                let (row, mut done) = (row as usize, 0);
                while done < tokens(row) {
                    // Sink tokens and the other slots of a ring can share scales.
                    let (place, run) = match layout {
                        Layout::Ring { .. } => ((row, done), slots - done),
                        _ => layout.place(&piece.cache.units, row, done),
                    };
                    let n = run.min(tokens(row) - done);
                    // SAFETY: the slots are the sequence's, inside the view, and this piece's heads are no other's.
                    unsafe {
                        clear(&piece.cache.units, place, n);
                        if let Some(scales) = piece.cache.written_scales() {
                            clear(scales, place, n);
                        }
                        if let Some(affine) = piece.cache.affine.filter(|affine| !affine.fixed) {
                            clear_parameters(&affine, place, (piece.cache.shape[HEADS], n));
                        }
                    }
                    done += n;
                }
            }
        })?;
    }
    rows.iter().for_each(|&row| cache.lengths[row as usize] = 0);
    Ok(())
}

/// Fills the scales and zero points of `n` tokens with zeros; of tokens that share them, if all are among these.
///
/// # Safety
/// The tokens are inside the cache, and what is filled is writable.
unsafe fn clear_parameters(affine: &RawAffine, (row, slot): Place, (heads, n): (usize, usize)) {
    let (shared, end) = (affine.shared[SEQ], slot + n);
    for t in (slot.next_multiple_of(shared)..end).step_by(shared).take_while(|t| end - t >= shared) {
        for head in 0..heads {
            // SAFETY: the caller's.
            unsafe {
                let ([scales, zeros], of) = (affine.steps(DIM), affine.row(row, t, head));
                for group in 0..affine.scales.shape[DIM] as isize {
                    of.scales.offset(group * scales).write_bytes(0, affine.scales.dtype.size());
                    if let Some(view) = &affine.zeros {
                        of.zeros.offset(group * zeros).write_bytes(0, view.dtype.size());
                    }
                }
            }
        }
    }
}

/// Fills `n` tokens with zeros, which are all bits 0 in every type.
///
/// # Safety
/// The tokens are inside the view and writable.
unsafe fn clear<U: Units>(view: &RawView<U>, (row, slot): Place, n: usize) {
    let (size, dim) = (view.dtype.size(), view.unit_shape()[DIM]);
    for t in slot..slot + n {
        for h in 0..view.shape[HEADS] {
            // SAFETY: the caller's.
            unsafe {
                let first = view.row(row, t, h);
                if view.strides[DIM] == 1 {
                    first.write_bytes(0, dim * size);
                } else {
                    // The stride of a single element may be anything.
                    let step = (view.strides[DIM] as isize).wrapping_mul(size as isize);
                    (0..dim as isize).for_each(|d| first.wrapping_offset(d.wrapping_mul(step)).write_bytes(0, size));
                }
            }
        }
    }
}

/// # Safety
/// The memory that valid views of `from` reach is readable, and that of `to` writable by this call alone.
pub(crate) unsafe fn insert_sequence_raw(
    context: &Context,
    runner: &dyn Runner,
    to: &mut RawCache,
    row: i64,
    from: &RawCache,
    from_row: i64,
    length: usize,
) -> Result<()> {
    let (first, from_first) = (to.validate()?, from.validate()?);
    let (row, from_row) = (to.check_row("sequence", row)?, from.check_row("from_sequence", from_row)?);
    ensure!(
        !matches!(to.layout, Layout::Indirect { .. }),
        InvalidValue,
        "a sequence of an indirect cache is inserted as into a contiguous one, and its table set afterwards"
    );
    let (n, m) = (to.layers.count(), from.layers.count());
    ensure!(n == m, Shape, "the cache has {n} layers, but the one to copy from has {m}");
    for i in 0..2 * n {
        let (dst, src) = (cache_at(to.layers, i)?, cache_at(from.layers, i)?);
        match (&dst, &src) {
            (Some(dst), Some(src)) => {
                for axis in [HEADS, DIM] {
                    let same = dst.shape[axis] == src.shape[axis];
                    ensure!(
                        same,
                        Shape,
                        "{} of layer {} has {} = {}, but in the cache to copy from it has {}",
                        plane(i),
                        i / 2,
                        RawView::axis_name(axis),
                        dst.shape[axis],
                        src.shape[axis]
                    );
                }
                // SAFETY: the caches have been validated.
                let staged =
                    if unsafe { requantizes(src, dst) } { check_staged(plane(i), src.shape[DIM]) } else { Ok(()) };
                staged.and_then(|()| check_blocks(i, dst)).map_err(|e| in_layer(i / 2, e))?;
                check_apart(from.layers, 2 * n, dst, "the two caches")?;
            }
            (None, None) => {}
            _ => fail!(Shape, "only one of the caches has v in layer {}", i / 2),
        }
    }
    let (held_length, capacity) = (from.length(from_row), to.layout.capacity(&first, row));
    ensure!(
        length <= held_length,
        OutOfRange,
        "length is {length}, but sequence {from_row} of the cache to copy from has {held_length} tokens"
    );
    ensure!(length <= capacity, Capacity, "length is {length}, but sequence {row} holds {capacity} tokens");
    let ranges = held(&to.layout, &first, length);
    for range in &ranges {
        check_held(range, &lost(&from.layout, &from_first, held_length), from_row, held_length)?;
        to.layout.validate_row("the cache", &first, row, range.start, range.end)?;
        from.layout.validate_row("the cache to copy from", &from_first, from_row, range.start, range.end)?;
    }
    check_pages_unshared(&to.layout, &first, row, (0, length), &|other| to.length(other))?;
    let tokens = ranges.iter().map(|range| range.len()).sum();
    let lengths = &*to.lengths;
    for_each_piece(runner, to.layers, tokens, &|_, piece| {
        let index = 2 * piece.layer + usize::from(piece.values);
        let Ok(Some(src)) = cache_at(from.layers, index) else { unreachable!("both caches have the same planes") };
        let src = cache_heads_of(&src, piece.heads);
        // SAFETY: the caches have been validated.
        let step = unsafe { Step::between(context, &src, &piece.cache) };
        let dst = RowOf { layout: &to.layout, cache: &piece.cache, row };
        let src = RowOf { layout: &from.layout, cache: &src, row: from_row };
        let after = |other| if other == row { length } else { lengths[other] as usize };
        // SAFETY: both sequences hold these positions, the caches share no memory, and this piece's heads are no other's.
        unsafe { move_positions(&step, src, &ranges, dst, 0, &after) };
    })?;
    // At most a capacity, which fits.
    to.lengths[row] = length as i32;
    Ok(())
}

/// # Safety
/// The memory that valid views reach is readable and writable by this call alone.
pub(crate) unsafe fn copy_prefix_raw(
    context: &Context,
    runner: &dyn Runner,
    cache: &mut RawCache,
    from: i64,
    to: &[i32],
    tokens: usize,
) -> Result<()> {
    let first = cache.validate()?;
    check_requantized(cache.layers, true)?;
    let from = cache.check_row("from", from)?;
    cache.check_rows("to", to)?;
    let layout = cache.layout;
    ensure!(
        !matches!(layout, Layout::Indirect { .. }),
        InvalidValue,
        "a prefix in an indirect cache is copied by copying entries of its table"
    );
    let length = cache.length(from);
    ensure!(tokens <= length, OutOfRange, "tokens is {tokens}, but sequence {from} has {length}");
    let ranges = held(&layout, &first, tokens);
    for range in &ranges {
        check_held(range, &lost(&layout, &first, length), from, length)?;
        layout.validate_row("the cache", &first, from, range.start, range.end)?;
    }
    let becomes = |row: usize| if to.contains(&(row as i32)) { tokens } else { cache.length(row) };
    for (i, &row) in to.iter().enumerate() {
        let row = row as usize;
        ensure!(row != from, DuplicateSlot, "to[{i}] is {row}, the sequence to copy from");
        let capacity = layout.capacity(&first, row);
        ensure!(tokens <= capacity, Capacity, "tokens is {tokens}, but sequence {row} holds {capacity}");
        layout.validate_row("the cache", &first, row, 0, tokens)?;
        check_pages_unshared(&layout, &first, row, (0, tokens), &becomes)?;
    }
    let work = ranges.iter().map(|range| range.len()).sum::<usize>().saturating_mul(to.len());
    let lengths = &*cache.lengths;
    for_each_piece(runner, cache.layers, work, &|_, piece| {
        let step = Step::copy_any(context, &piece.cache);
        let src = RowOf { layout: &layout, cache: &piece.cache, row: from };
        for (i, &row) in to.iter().enumerate() {
            // Ragged neighbours that are still to come hold nothing yet.
            let after = |other| match to.iter().position(|&row| row as usize == other) {
                Some(n) if n > i => 0,
                Some(_) => tokens,
                None => lengths[other] as usize,
            };
            // SAFETY: both sequences hold these positions, in slots that are not the same ones, and this piece's heads are no
            // other's.
            unsafe { move_positions(&step, src, &ranges, RowOf { row: row as usize, ..src }, 0, &after) };
        }
    })?;
    to.iter().for_each(|&row| cache.lengths[row as usize] = tokens as i32);
    Ok(())
}
