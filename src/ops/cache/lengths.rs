//! Lengths: the number of tokens in each sequence of a cache.

use super::{KvCache, RawCache, check_held, held, lost};
use crate::error::{Result, ensure};
use crate::layout::Layout;
use crate::view::SEQ;

impl KvCache<'_, '_> {
    /// Sets the length of sequence `sequences[i]` to `values[i]`. What lies in the cache is not examined.
    ///
    /// # Errors
    /// [`Status::Shape`](crate::Status::Shape): the lists have different lengths.
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): a sequence does not exist, a value is negative, or a table entry
    /// leads outside of the cache. [`Status::DuplicateSlot`](crate::Status::DuplicateSlot): a sequence comes twice.
    /// [`Status::Capacity`](crate::Status::Capacity): a value exceeds the capacity of its sequence. On an error, no length has
    /// changed.
    pub fn set_lengths(&mut self, sequences: &[i32], values: &[i32]) -> Result<()> {
        self.with_raw(|cache| cache.set_lengths(sequences, values))
    }

    /// Adds `counts[b]` to the length of every sequence b, after that many tokens have been written to it.
    ///
    /// # Errors
    /// [`Status::Shape`](crate::Status::Shape): the list has not an entry per sequence.
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): a count is negative, or a table entry leads outside of the cache.
    /// [`Status::Capacity`](crate::Status::Capacity): a length would exceed the capacity of its sequence. On an error, no
    /// length has changed.
    pub fn advance(&mut self, counts: &[i32]) -> Result<()> {
        self.with_raw(|cache| cache.advance(counts))
    }

    /// Removes the last tokens of sequences: sequence b keeps its first `lengths[b]` tokens. No byte of the cache changes.
    ///
    /// The tokens that a ring has overwritten would be visible again at a shorter length. A ring that has gone round can
    /// therefore be truncated only if no attention reads them: `window` is the left window of all attention over this cache, as
    /// in [`AttentionOptions`](crate::AttentionOptions), and a ring whose capacity exceeds `sink_tokens + window` by n tokens
    /// can give back n. `None` is no window. Only the present length is known: truncations without writes between them count
    /// together, and the caller adds them up.
    ///
    /// In an [`Indirect`](Layout::Indirect) cache, the slots of removed tokens are written again. The call is refused if
    /// another sequence keeps a token there.
    ///
    /// # Errors
    /// [`Status::Shape`](crate::Status::Shape): the list has not an entry per sequence.
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): a length is negative or above the present one, or tokens were
    /// overwritten. [`Status::Overlap`](crate::Status::Overlap): tokens of another sequence would be overwritten. On an error,
    /// no length has changed.
    pub fn truncate(&mut self, lengths: &[i32], window: Option<u32>) -> Result<()> {
        self.with_raw(|cache| cache.truncate(lengths, window.map(|w| w as usize)))
    }
}

impl RawCache<'_> {
    pub(crate) fn set_lengths(&mut self, rows: &[i32], values: &[i32]) -> Result<()> {
        let first = self.validate()?;
        let (n, m) = (rows.len(), values.len());
        ensure!(n == m, Shape, "sequences has {n} entries, but values has {m}");
        self.check_rows("sequences", rows)?;
        for (i, (&row, &value)) in rows.iter().zip(values).enumerate() {
            ensure!(value >= 0, OutOfRange, "values[{i}] is {value}, which is negative");
            let (row, value) = (row as usize, value as usize);
            let capacity = self.layout.capacity(&first, row);
            ensure!(value <= capacity, Capacity, "values[{i}] is {value}, but sequence {row} holds {capacity}");
            self.layout.validate_row("the cache", &first, row, 0, value)?;
        }
        for (&row, &value) in rows.iter().zip(values) {
            self.lengths[row as usize] = value;
        }
        Ok(())
    }

    pub(crate) fn advance(&mut self, counts: &[i32]) -> Result<()> {
        let first = self.validate()?;
        let (n, rows) = (counts.len(), self.lengths.len());
        ensure!(n == rows, Shape, "counts has {n} entries, but the cache has {rows} sequences");
        for (row, &count) in counts.iter().enumerate() {
            ensure!(count >= 0, OutOfRange, "counts[{row}] is {count}, which is negative");
            let (length, capacity) = (self.length(row), self.layout.capacity(&first, row));
            let end = length + count as usize;
            ensure!(
                end <= capacity,
                Capacity,
                "sequence {row} has {length} tokens and is to have {count} more, but it holds {capacity}"
            );
            self.layout.validate_row("the cache", &first, row, length, end)?;
        }
        // No sum exceeds a capacity, which is at most `i32::MAX`.
        self.lengths.iter_mut().zip(counts).for_each(|(length, count)| *length += count);
        Ok(())
    }

    pub(crate) fn truncate(&mut self, lengths: &[i32], window: Option<usize>) -> Result<()> {
        let first = self.validate()?;
        let (n, rows) = (lengths.len(), self.lengths.len());
        ensure!(n == rows, Shape, "the new lengths have {n} entries, but the cache has {rows} sequences");
        for (row, &new) in lengths.iter().enumerate() {
            let old = self.lengths[row];
            ensure!(
                new >= 0 && new <= old,
                OutOfRange,
                "sequence {row} is to be truncated to {new} tokens, but has {old}"
            );
            if new == old {
                continue;
            }
            let (new, old) = (new as usize, old as usize);
            let lost = lost(&self.layout, &first, old);
            // The sinks, in the first range, are never lost.
            let [_, mut seen] = held(&self.layout, &first, new);
            seen.start = seen.start.max(new.saturating_sub(window.unwrap_or(new)));
            check_held(&seen, &lost, row, old)?;
        }
        if let Layout::Indirect { beam_table } = self.layout {
            let shorter = |row: usize| (lengths[row] as usize, self.length(row));
            check_slots_free(beam_table, first.shape[SEQ], self.lengths.len(), &shorter, &|c| {
                (c, lengths[c] as usize)
            })?;
        }
        self.lengths.copy_from_slice(lengths);
        Ok(())
    }

    /// Checks a list of sequences in which none may come twice.
    pub(super) fn check_rows(&self, name: &str, rows: &[i32]) -> Result<()> {
        let n = self.lengths.len();
        for (i, &row) in rows.iter().enumerate() {
            ensure!(
                row >= 0 && (row as usize) < n,
                OutOfRange,
                "{name}[{i}] is {row}, but the cache has {n} sequences"
            );
            if let Some(j) = rows[..i].iter().position(|&other| other == row) {
                crate::error::fail!(DuplicateSlot, "{name}[{j}] and {name}[{i}] are both {row}");
            }
        }
        Ok(())
    }
}

/// Checks, in the table of an indirect cache, that the slots which sequences give up hold no token that a sequence keeps.
/// Sequence b goes from `shorter(b).1` tokens back to `shorter(b).0`, and writes its own slots from there on; sequence c keeps
/// the first `kept(c).1` tokens of sequence `kept(c).0` of the table.
pub(super) fn check_slots_free(
    table: &[i32],
    capacity: usize,
    rows: usize,
    shorter: &dyn Fn(usize) -> (usize, usize),
    kept: &dyn Fn(usize) -> (usize, usize),
) -> Result<()> {
    for b in 0..rows {
        let (new, old) = shorter(b);
        for c in 0..if new < old { rows } else { 0 } {
            let (source, length) = kept(c);
            for p in new..old.min(length) {
                ensure!(
                    table[source * capacity + p] != b as i32,
                    Overlap,
                    "sequence {b} would go back from {old} tokens to {new} and write position {p} again, where sequence {c} has a token \
                     of its own"
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::RawView;

    #[test]
    fn what_a_ring_holds_and_has_lost() {
        let shape = [1, 8, 1, 1];
        let strides = crate::view::contiguous(shape);
        let dtype = crate::CacheFormat::F32;
        let view = RawView { data: std::ptr::null_mut(), dtype, shape, strides, bytes: None };
        let ring = Layout::Ring { sink_tokens: 2 };
        assert_eq!(held(&ring, &view, 1), [0..1, 1..1]);
        assert_eq!(held(&ring, &view, 8), [0..2, 2..8]);
        assert_eq!(held(&ring, &view, 9), [0..2, 3..9]);
        assert_eq!((lost(&ring, &view, 8), lost(&ring, &view, 9), lost(&ring, &view, 3)), (2..2, 2..3, 2..2));
    }
}
