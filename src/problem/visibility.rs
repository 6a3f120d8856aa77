//! The sequences of a call, and the keys that their queries may see by position; see [`masks`](crate::masks).

use super::grid::{CHUNK, Chunks, between};
use crate::format::CacheFormat;
use crate::layout::{Layout, Place};
use crate::view::RawView;
use std::ops::Range;

/// The part of a call that is the same for all layers: its sequences, and everything except masks that determines
/// which keys their queries see. Lists have one entry per sequence.
///
/// A call borrows its lists and the tables of its layout ([`Visibility`]); a plan holds them as ranges of a list of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VisibilityOf<List, Layout> {
    /// The number of sequences, and the most queries of one.
    pub batch: usize,
    pub seq: usize,
    /// K, or another cache with the same first two axes.
    pub cache: RawView<CacheFormat>,
    /// The slots of the tokens of each sequence.
    pub layout: Layout,
    /// For ragged queries, the first query of every sequence on axis 1 of `q` and `out`, and the end of the last.
    /// Otherwise sequences are axis 0.
    pub cu_seqlens_q: Option<List>,
    pub causal: bool,
    pub window_left: Option<i64>,
    pub window_right: Option<i64>,
    /// The number of valid keys; the capacity if absent.
    pub lengths: Option<List>,
    /// The first visible key; 0 if absent.
    pub kv_starts: Option<List>,
    /// The key that query 0 itself is, or would be; `length - queries` if absent.
    pub offsets: Option<List>,
    /// The positions of the queries, and of the keys that they are, with an entry per query; the numbers of those keys if absent.
    pub query_positions: Option<List>,
    /// Keys before this one are visible to every query, in spite of causality and windows; 0 if absent.
    pub prefix_lengths: Option<List>,
}

/// With the lists of a call.
pub(crate) type Visibility<'a> = VisibilityOf<&'a [i32], Layout<'a>>;

impl<List, L> VisibilityOf<List, L> {
    /// The same with another layout and other lists: `list` is called for each list that is present.
    pub fn map<To, K>(&self, layout: K, mut list: impl FnMut(&List) -> To) -> VisibilityOf<To, K> {
        let mut mapped = |from: &Option<List>| from.as_ref().map(&mut list);
        VisibilityOf {
            batch: self.batch,
            seq: self.seq,
            cache: self.cache,
            layout,
            cu_seqlens_q: mapped(&self.cu_seqlens_q),
            causal: self.causal,
            window_left: self.window_left,
            window_right: self.window_right,
            lengths: mapped(&self.lengths),
            kv_starts: mapped(&self.kv_starts),
            offsets: mapped(&self.offsets),
            query_positions: mapped(&self.query_positions),
            prefix_lengths: mapped(&self.prefix_lengths),
        }
    }
}

/// Values derived from all sequences of a [`Visibility`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    /// The greatest length.
    pub longest: usize,
    pub chunks: Chunks,
    /// The number of chunks.
    pub count: usize,
}

impl Summary {
    /// Removes the chunks outside of `seen`, which masks mask completely; `seen` counts chunks of the sequence.
    pub fn within(self, seen: Range<usize>) -> Self {
        let Chunks { before, gap } = self.chunks;
        let end = (self.count + gap).min(seen.end);
        if gap > 0 && seen.start < before {
            // Both key ranges begin at chunk 0, so only their end can move.
            return Self { count: end.saturating_sub(gap).max(before.min(end)), ..self };
        }
        let first = if gap == 0 { 0 } else { before + gap }.max(seen.start);
        Self { chunks: Chunks { before: 0, gap: first }, count: end.saturating_sub(first), ..self }
    }
}

impl Visibility<'_> {
    /// The name of each part that a plan fixes, and whether the call gives it.
    pub fn given(&self) -> [(&'static str, bool); 10] {
        [
            ("causal", self.causal),
            ("window_left", self.window_left.is_some()),
            ("window_right", self.window_right.is_some()),
            ("layout", !matches!(self.layout, Layout::Contiguous)),
            ("cu_seqlens_q", self.cu_seqlens_q.is_some()),
            ("lengths", self.lengths.is_some()),
            ("kv_starts", self.kv_starts.is_some()),
            ("offsets", self.offsets.is_some()),
            ("query_positions", self.query_positions.is_some()),
            ("prefix_lengths", self.prefix_lengths.is_some()),
        ]
    }

    /// Every query sees every key of a contiguous cache.
    pub fn unmasked(batch: usize, seq: usize, cache: RawView<CacheFormat>) -> Self {
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
            query_positions: None,
            prefix_lengths: None,
        }
    }

    #[inline]
    pub fn length(&self, batch: usize) -> i64 {
        self.lengths.map_or_else(|| self.layout.capacity(&self.cache, batch) as i64, |l| l[batch] as i64)
    }

    /// The number of queries of a sequence.
    #[inline]
    pub fn queries(&self, batch: usize) -> usize {
        self.cu_seqlens_q.map_or(self.seq, |s| (s[batch + 1] - s[batch]) as usize)
    }

    /// The indices of a query on axes 0 and 1 of `q` and `out`.
    #[inline]
    pub fn query(&self, batch: usize, token: usize) -> (usize, usize) {
        self.cu_seqlens_q.map_or((batch, token), |s| (0, s[batch] as usize + token))
    }

    /// The first key that a sequence still holds, apart from its `always_visible` keys.
    #[inline]
    pub fn retained_from(&self, batch: usize) -> i64 {
        self.layout.retained_from(&self.cache, self.length(batch) as usize) as i64
    }

    /// The keys that every query of `batch` sees in spite of causality and windows: those of its prefix, and the sink
    /// tokens of a ring that has overwritten keys, in which case there is only one query.
    #[inline(always)]
    pub fn always_visible(&self, batch: usize) -> (i64, i64) {
        if self.prefix_lengths.is_none() && !matches!(self.layout, Layout::Ring { .. }) {
            return (0, 0);
        }
        self.any_always_visible(batch)
    }

    /// [`Self::always_visible`] of any sequence.
    fn any_always_visible(&self, batch: usize) -> (i64, i64) {
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

    /// The end of the keys that query `token` of `batch` may see by length, causality and window, if keys stand at their numbers.
    #[inline]
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

    /// The first of them, by first key, window and the keys that a ring retains.
    #[inline]
    fn left_end(&self, batch: usize, token: usize) -> i64 {
        let low = self.first_held(batch);
        self.window_left.map_or(low, |left| low.max(self.position(batch, token) - left))
    }

    /// The first key that is neither before the start nor lost to a ring.
    #[inline]
    fn first_held(&self, batch: usize) -> i64 {
        self.kv_starts.map_or(0, |s| s[batch] as i64).max(self.retained_from(batch))
    }

    /// The keys `low..high` that query `token` of `batch` may see by length, first key, causality, window and the keys
    /// that a ring retains, apart from those [always visible](Self::always_visible). Where queries have positions of their own, this is
    /// an upper bound; [`Self::visible_by_position`] narrows it.
    pub fn visible_keys(&self, batch: usize, token: usize) -> (i64, i64) {
        let (low, high) = (self.left_end(batch, token), self.right_end(batch, token));
        let keys = if low < high { (low, high) } else { (0, 0) };
        match self.own_keys(batch) {
            None => keys,
            Some(own) => {
                let (first, end) = (own.first.max(self.first_held(batch)), own.end().min(self.length(batch)));
                match (first < end, low < high) {
                    (true, true) => (low.min(first), high.max(end)),
                    (true, false) => (first, end),
                    (false, _) => keys,
                }
            }
        }
    }

    /// The keys that any query of `batch` may see, from the first to the last, apart from those [always visible](Self::always_visible).
    pub fn visible_to_any(&self, batch: usize) -> (i64, i64) {
        let queries = self.queries(batch);
        if self.query_positions.is_some() {
            let keys = (0..queries).map(|token| self.visible_keys(batch, token)).filter(|(low, high)| low < high);
            return keys.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).unwrap_or((0, 0));
        }
        // Both ends grow with the query, so that the queries which see a key are those from the first whose end is behind the first
        // key to the last whose beginning is before the length. They are found without looking at each: a plan is made of a number.
        let first = partition_point(queries, |token| self.right_end(batch, token) <= self.first_held(batch));
        let end = partition_point(queries, |token| self.left_end(batch, token) < self.length(batch));
        if first >= end {
            return (0, 0);
        }
        let (low, high) = (self.left_end(batch, first), self.right_end(batch, end - 1));
        // A window may be empty.
        if self.left_end(batch, first) < self.right_end(batch, first) { (low, high) } else { (0, 0) }
    }

    /// The first key that any query of `batch` may see, apart from those [always visible](Self::always_visible); the length or more
    /// if there is none.
    #[inline]
    pub fn first_visible(&self, batch: usize) -> i64 {
        if self.query_positions.is_none() {
            // Each query begins where the one before does, or later.
            return self.left_end(batch, 0);
        }
        let keys = (0..self.queries(batch)).map(|token| self.visible_keys(batch, token));
        keys.filter(|(low, high)| low < high).map(|(low, _)| low).min().unwrap_or_else(|| self.length(batch))
    }

    /// The key that query `token` of `batch` itself is, or would be.
    #[inline]
    fn own_key(&self, batch: usize, token: usize) -> i64 {
        let offset = match self.offsets {
            Some(o) => o[batch] as i64,
            None => self.length(batch) - self.queries(batch) as i64,
        };
        offset + token as i64
    }

    /// The keys that the queries of `batch` are, if they have positions of their own.
    #[inline]
    pub fn own_keys(&self, batch: usize) -> Option<OwnKeys<'_>> {
        let positions = self.query_positions?;
        let (first, n) = (self.position_index(batch), self.queries(batch));
        Some(OwnKeys { first: self.own_key(batch, 0), positions: &positions[first..first + n] })
    }

    /// Where the positions of `batch` begin in their list.
    #[inline]
    fn position_index(&self, batch: usize) -> usize {
        self.cu_seqlens_q.map_or(batch * self.seq, |s| s[batch] as usize)
    }

    /// The position of query `token` of `batch` among the keys.
    #[inline]
    pub fn position(&self, batch: usize, token: usize) -> i64 {
        match self.query_positions {
            Some(positions) => positions[self.position_index(batch) + token].into(),
            None => self.own_key(batch, token),
        }
    }

    /// The subset of `bits` that query `token` of `batch` sees by position: keys of the block at `base`, all of them among
    /// [`Self::visible_keys`] or [always visible](Self::always_visible).
    #[inline(never)]
    pub fn visible_by_position(&self, batch: usize, token: usize, base: usize, bits: u64) -> u64 {
        let Some(own) = self.own_keys(batch) else { return bits };
        let own_bits = between((own.first, own.end()), base);
        // Other keys stand at their numbers.
        let others = between((self.left_end(batch, token), self.right_end(batch, token)), base) & !own_bits;
        let mut visible = others | between(self.always_visible(batch), base);
        let (position, mut rest) = (self.position(batch, token), bits & own_bits & !visible);
        while rest != 0 {
            let j = rest.trailing_zeros();
            let key = own.position((base + j as usize) as i64);
            let seen = (!self.causal || key <= position)
                && self.window_left.is_none_or(|left| key >= position - left)
                && self.window_right.is_none_or(|right| key <= position + right);
            visible |= u64::from(seen) << j;
            rest &= rest - 1;
        }
        bits & visible
    }

    /// The slot of a token, and the number of tokens from it on in consecutive slots.
    #[inline(always)]
    pub fn place(&self, batch: usize, position: usize) -> (Place, usize) {
        self.layout.place(&self.cache, batch, position)
    }

    /// Whether nothing hides the first key of a sequence from its first query, and nothing but its position and the length hides others.
    #[inline(always)]
    fn sees_first_key(&self) -> bool {
        self.kv_starts.is_none()
            && self.prefix_lengths.is_none()
            && self.window_left.is_none()
            && self.query_positions.is_none()
            && !matches!(self.layout, Layout::Ring { .. })
    }

    /// Computes the summary of valid lists.
    pub fn summarize(&self) -> Summary {
        let (mut longest, mut before, mut first, mut end) = (0, 0, usize::MAX, 0);
        if self.sees_first_key() {
            for row in 0..self.batch {
                let length = self.length(row) as usize;
                longest = longest.max(length);
                if self.queries(row) > 0 {
                    end = end.max(length.div_ceil(CHUNK));
                }
            }
            return Summary { longest, chunks: Chunks::default(), count: end };
        }
        for row in 0..self.batch {
            longest = longest.max(self.length(row) as usize);
            if self.queries(row) == 0 {
                continue;
            }
            let (low, length) = (self.first_visible(row), self.length(row));
            before = before.max((self.always_visible(row).1 as usize).div_ceil(CHUNK));
            if low < length {
                first = first.min(low as usize / CHUNK);
                end = end.max((length as usize).div_ceil(CHUNK));
            }
        }
        let gap = first.min(end).saturating_sub(before);
        Summary { longest, chunks: Chunks { before, gap }, count: end.max(before) - gap }
    }
}

/// The first of the numbers `0..n` for which `before` is false; it is true for all smaller ones.
fn partition_point(n: usize, before: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

/// The keys that the queries of a sequence are, and their positions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnKeys<'a> {
    /// The first of them; it may be before the first key of the cache, or beyond the last.
    first: i64,
    positions: &'a [i32],
}

impl OwnKeys<'_> {
    pub fn first(&self) -> i64 {
        self.first
    }

    fn end(&self) -> i64 {
        self.first + self.positions.len() as i64
    }

    /// The position of a key, one of these or not.
    pub fn position(&self, key: i64) -> i64 {
        let own = usize::try_from(key - self.first).ok().and_then(|i| self.positions.get(i));
        own.map_or(key, |&position| position.into())
    }
}

/// The keys that any query row of a tile may see, and those that all of them see (by length, first key, causality and
/// window).
pub(crate) struct TileVisibility {
    pub low: i64,
    pub high: i64,
    pub inner_low: i64,
    pub inner_high: i64,
    /// The keys that all query rows see in addition.
    pub always_visible: (i64, i64),
}

impl TileVisibility {
    /// The range from the first to the last key of a chunk that any query row may see; empty if `from >= to`.
    pub fn within(&self, chunk: Range<usize>) -> (usize, usize) {
        let (mut from, mut to) = (chunk.end, chunk.start);
        for (low, high) in [(self.low, self.high), self.always_visible] {
            if low < high {
                let (low, high) = ((low as usize).max(chunk.start), (high as usize).min(chunk.end));
                if low < high {
                    (from, to) = (from.min(low), to.max(high));
                }
            }
        }
        (from, to)
    }

    /// Whether any query row may see a key.
    #[inline(always)]
    pub fn covers(&self, key: usize) -> bool {
        let key = key as i64;
        self.low <= key && key < self.high || self.always_visible.0 <= key && key < self.always_visible.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_all_queries_are_those_of_each() {
        let view = |keys| {
            let dtype = CacheFormat::F32;
            RawView { data: std::ptr::null_mut(), dtype, shape: [1, keys, 1, 1], strides: [0; 4], bytes: None }
        };
        let mut seen = 0;
        for (queries, keys, length, start) in
            (0..5).flat_map(|q| (1..7).flat_map(move |k| (0..=k).flat_map(move |n| (0..=n).map(move |s| (q, k, n, s)))))
        {
            let (lengths, starts) = ([length], [start]);
            for (causal, left, right, offset) in [false, true].into_iter().flat_map(|causal| {
                [None, Some(0), Some(1), Some(3)].into_iter().flat_map(move |left| {
                    [None, Some(0), Some(2)].into_iter().flat_map(move |right| {
                        [None, Some(-3), Some(0), Some(2), Some(9)].map(|o| (causal, left, right, o))
                    })
                })
            }) {
                let offsets = offset.map(|o| [o]);
                let visibility = Visibility {
                    causal,
                    window_left: left,
                    window_right: right,
                    lengths: Some(&lengths),
                    kv_starts: Some(&starts),
                    offsets: offsets.as_ref().map(|o| &o[..]),
                    ..Visibility::unmasked(1, queries, view(keys as usize))
                };
                let each = (0..queries).map(|token| visibility.visible_keys(0, token)).filter(|(low, high)| low < high);
                let expected = each.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).unwrap_or((0, 0));
                assert_eq!(visibility.visible_to_any(0), expected, "{visibility:?}");
                seen += usize::from(expected.0 < expected.1);
            }
        }
        assert!(seen > 1000, "{seen}");
    }

    #[test]
    fn a_summary_narrows_to_the_chunks_that_are_seen() {
        let numbers = |s: Summary| -> Vec<usize> { (0..s.count).map(|i| s.chunks.keys(i).start / CHUNK).collect() };
        for (before, gap, count) in (0..4).flat_map(|b| (0..4).flat_map(move |g| (b..7).map(move |n| (b, g, n)))) {
            let all = Summary { longest: 9, chunks: Chunks { before, gap }, count };
            for seen in (0..12).flat_map(|start| (start..12).map(move |end| start..end)) {
                let (was, is) = (numbers(all), numbers(all.within(seen.clone())));
                let always_visible = was.iter().filter(|chunk| seen.contains(chunk)).copied().collect::<Vec<_>>();
                // Removed chunks are not in `seen`, and chunks outside of `seen` are removed, except some before a
                // gap.
                assert!(
                    always_visible.iter().all(|chunk| is.contains(chunk)) && is.iter().all(|chunk| was.contains(chunk))
                );
                if before == 0 || gap == 0 || seen.start >= before {
                    assert_eq!(is, always_visible, "{all:?} {seen:?}");
                }
                assert!(is.iter().all(|&chunk| chunk < seen.end), "{all:?} {seen:?}");
            }
        }
    }
}
