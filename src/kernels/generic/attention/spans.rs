//! Which rows a call has, and which keys their queries may see by position; see [`masks`](crate::masks).

use super::CHUNK;
use crate::error::{Result, ensure};
use crate::layout::{Layout, Place};
use crate::view::RawView;
use std::ops::Range;

/// What a plan keeps from one layer to the next: all lists with an entry a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spans<'a> {
    /// Rows of the batch, and the most queries that one has.
    pub batch: usize,
    pub seq: usize,
    /// K, or another cache of the same first two axes.
    pub cache: RawView,
    /// In which slots of it a row's tokens lie.
    pub layout: Layout<'a>,
    /// Where the queries of every row begin in axis 1 of `q` and `out`, and where the last ones end, if rows are ragged; else
    /// rows are axis 0.
    pub cu_seqlens_q: Option<&'a [i32]>,
    pub causal: bool,
    pub window_left: Option<i64>,
    pub window_right: Option<i64>,
    /// Valid keys a row; as many as the cache has room for if absent.
    pub lengths: Option<&'a [i32]>,
    /// First visible key a row; 0 if absent.
    pub kv_starts: Option<&'a [i32]>,
    /// Position of query 0 among the keys, a row; `length - queries` if absent.
    pub offsets: Option<&'a [i32]>,
    /// Keys before this one, a row, are seen whatever causality and windows say; 0 if absent.
    pub prefix_lengths: Option<&'a [i32]>,
}

/// What follows from all rows of [`Spans`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    /// The greatest length.
    pub longest: usize,
    pub chunks: Chunks,
    /// How many chunks those are.
    pub count: usize,
}

/// The chunks in which any query of a call may see a key: some from the start of the cache (a prefix, sinks), then, after a gap,
/// all that follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunks {
    /// How many lie before the gap, and how many in it.
    pub before: usize,
    pub gap: usize,
}

impl Chunks {
    /// The keys of the call's chunk number `index`.
    pub fn keys(self, index: usize) -> Range<usize> {
        let chunk = if index < self.before { index } else { index + self.gap };
        chunk * CHUNK..(chunk + 1) * CHUNK
    }
}

impl Summary {
    /// The same rows, of whose chunks masks hide all but some of those `seen`: by number in the cache.
    pub fn within(self, seen: Range<usize>) -> Self {
        let Chunks { before, gap } = self.chunks;
        let end = (self.count + gap).min(seen.end);
        if gap > 0 && seen.start < before {
            // Two spans begin at chunk 0, so only their end can move.
            return Self { count: end.saturating_sub(gap).max(before.min(end)), ..self };
        }
        let first = if gap == 0 { 0 } else { before + gap }.max(seen.start);
        Self { chunks: Chunks { before: 0, gap: first }, count: end.saturating_sub(first), ..self }
    }
}

impl Spans<'_> {
    /// Every query sees every key of a contiguous cache.
    pub fn unmasked(batch: usize, seq: usize, cache: RawView) -> Self {
        Self {
            batch,
            seq,
            cache,
            layout: Layout::Contiguous,
            cu_seqlens_q: None,
            causal: false,
            window_left: None,
            window_right: None,
            lengths: None,
            kv_starts: None,
            offsets: None,
            prefix_lengths: None,
        }
    }

    pub fn length(&self, batch: usize) -> i64 {
        self.lengths.map_or_else(|| self.layout.capacity(&self.cache, batch) as i64, |l| l[batch] as i64)
    }

    /// Queries of a batch row.
    pub fn queries(&self, batch: usize) -> usize {
        self.cu_seqlens_q.map_or(self.seq, |s| (s[batch + 1] - s[batch]) as usize)
    }

    /// The place of a query in axes 0 and 1 of `q` and `out`.
    pub fn query(&self, batch: usize, token: usize) -> (usize, usize) {
        self.cu_seqlens_q.map_or((batch, token), |s| (0, s[batch] as usize + token))
    }

    /// The first key that a row still holds, beside those of its `kept` span.
    pub fn retained_from(&self, batch: usize) -> i64 {
        self.layout.retained_from(&self.cache, self.length(batch) as usize) as i64
    }

    /// The keys that every query of `batch` sees, whatever causality and windows say: those of its prefix and, beyond a gap of
    /// keys that a ring has lost, its sinks; then there is only one query.
    pub fn kept(&self, batch: usize) -> (i64, i64) {
        let low = self.kv_starts.map_or(0, |s| s[batch] as i64);
        let mut high = self.prefix_lengths.map_or(0, |p| p[batch] as i64);
        if let Layout::Ring { sink_tokens } = self.layout
            && self.window_left.is_none()
            && self.retained_from(batch) > 0
        {
            high = high.max(self.right_end(batch, 0).min(sink_tokens as i64));
        }
        let high = high.min(self.length(batch));
        if low < high { (low, high) } else { (0, 0) }
    }

    /// Where the keys end that query `token` of `batch` may see by length, causality and window.
    fn right_end(&self, batch: usize, token: usize) -> i64 {
        let (mut high, position) = (self.length(batch), self.position(batch, token));
        if self.causal {
            high = high.min(position + 1);
        }
        if let Some(right) = self.window_right {
            high = high.min(position + right + 1);
        }
        high
    }

    /// Where they begin, by start, window and what a ring retains.
    pub fn left_end(&self, batch: usize, token: usize) -> i64 {
        let low = self.kv_starts.map_or(0, |s| s[batch] as i64).max(self.retained_from(batch));
        self.window_left.map_or(low, |left| low.max(self.position(batch, token) - left))
    }

    /// The keys, beside those [kept](Self::kept), that query `token` of `batch` may see by length, start, causality, window and
    /// what a ring retains: `low..high`.
    pub fn span(&self, batch: usize, token: usize) -> (i64, i64) {
        let (low, high) = (self.left_end(batch, token), self.right_end(batch, token));
        if low < high { (low, high) } else { (0, 0) }
    }

    /// Where query `token` of `batch` stands among the keys.
    pub fn position(&self, batch: usize, token: usize) -> i64 {
        let offset = match self.offsets {
            Some(o) => o[batch] as i64,
            None => self.length(batch) - self.queries(batch) as i64,
        };
        offset + token as i64
    }

    /// Where a token lies, and how many from there on lie in slots one after the other.
    #[inline(always)]
    pub fn place(&self, batch: usize, position: usize) -> (Place, usize) {
        self.layout.place(&self.cache, batch, position)
    }

    /// Checks every list against the cache, and sums up. The layout has been validated, but for the entries of its table, and the
    /// cache is named `k`.
    pub fn validate(&self) -> Result<Summary> {
        let batch = self.batch;
        ensure!(
            self.lengths.is_some() || !matches!(self.layout, Layout::Ring { .. } | Layout::Paged { .. }),
            InvalidValue,
            "lengths is absent, but a ring and pages do not say how many keys a row has"
        );
        let lists = [("lengths", self.lengths), ("kv_starts", self.kv_starts), ("prefix_lengths", self.prefix_lengths)];
        for (name, list) in lists.into_iter().chain([("offsets", self.offsets)]) {
            let n = list.map_or(batch, <[i32]>::len);
            ensure!(n == batch, Shape, "{name} has {n} entries, but q has batch = {batch}");
        }
        for (name, list) in lists {
            for (row, &x) in list.unwrap_or(&[]).iter().enumerate() {
                let room = self.layout.capacity(&self.cache, row);
                ensure!(
                    x >= 0 && x as usize <= room,
                    OutOfRange,
                    "{name}[{row}] is {x}, but k has {} = {room}",
                    if room == self.cache.shape[1] { "seq" } else { "room for a row" }
                );
            }
        }
        for (name, window) in [("window_left", self.window_left), ("window_right", self.window_right)] {
            let window = window.unwrap_or(0);
            ensure!((0..=u32::MAX as i64).contains(&window), InvalidValue, "{name} is {window}");
        }
        let summary = self.summarize()?;
        for row in (0..batch).filter(|&row| self.queries(row) > 0) {
            let (low, length, kept) = (self.left_end(row, 0), self.length(row), self.kept(row));
            self.layout.validate_row("k", &self.cache, row, kept.0 as usize, kept.1 as usize)?;
            if low < length {
                self.layout.validate_row("k", &self.cache, row, low as usize, length as usize)?;
            }
        }
        Ok(summary)
    }

    /// Sums up lists that are valid in themselves.
    pub fn summarize(&self) -> Result<Summary> {
        let (mut longest, mut before, mut first, mut end) = (0, 0, usize::MAX, 0);
        for row in 0..self.batch {
            longest = longest.max(self.length(row) as usize);
            if self.queries(row) == 0 {
                continue;
            }
            self.check_retained(row)?;
            let (low, length) = (self.left_end(row, 0), self.length(row));
            before = before.max((self.kept(row).1 as usize).div_ceil(CHUNK));
            if low < length {
                first = first.min(low as usize / CHUNK);
                end = end.max((length as usize).div_ceil(CHUNK));
            }
        }
        let gap = first.min(end).saturating_sub(before);
        Ok(Summary { longest, chunks: Chunks { before, gap }, count: end.max(before) - gap })
    }

    /// Checks that a ring has not overwritten what the queries of a row see.
    fn check_retained(&self, row: usize) -> Result<()> {
        let retained = self.retained_from(row);
        let Layout::Ring { sink_tokens } = self.layout else { return Ok(()) };
        if retained == 0 {
            return Ok(());
        }
        let start = self.kv_starts.map_or(0, |s| s[row] as i64);
        let wanted = match self.window_left {
            None if self.queries(row) == 1 => retained,
            None => start,
            Some(left) => start.max(self.position(row, 0) - left),
        };
        ensure!(
            wanted >= retained,
            Capacity,
            "the first query of row {row} sees keys from {wanted} on, but of its {} tokens the ring retains those from {retained} \
             on: give a window, or a ring of more slots",
            self.length(row)
        );
        let prefix = self.prefix_lengths.map_or(0, |p| p[row] as i64);
        ensure!(
            prefix <= sink_tokens as i64,
            Capacity,
            "prefix_lengths[{row}] is {prefix}, but the ring keeps {sink_tokens} sink tokens of row {row}"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_narrows_to_the_chunks_that_are_seen() {
        let numbers = |s: Summary| -> Vec<usize> { (0..s.count).map(|i| s.chunks.keys(i).start / CHUNK).collect() };
        for (before, gap, count) in (0..4).flat_map(|b| (0..4).flat_map(move |g| (b..7).map(move |n| (b, g, n)))) {
            let all = Summary { longest: 9, chunks: Chunks { before, gap }, count };
            for seen in (0..12).flat_map(|start| (start..12).map(move |end| start..end)) {
                let (was, is) = (numbers(all), numbers(all.within(seen.clone())));
                let kept = was.iter().filter(|chunk| seen.contains(chunk)).copied().collect::<Vec<_>>();
                // What is left out is not seen, and what is not seen is left out, but for what comes before a gap.
                assert!(kept.iter().all(|chunk| is.contains(chunk)) && is.iter().all(|chunk| was.contains(chunk)));
                if before == 0 || gap == 0 || seen.start >= before {
                    assert_eq!(is, kept, "{all:?} {seen:?}");
                }
                assert!(is.iter().all(|&chunk| chunk < seen.end), "{all:?} {seen:?}");
            }
        }
    }
}
