//! Shards: a part of a batch, of the heads or of the sequence, for each of several machines, processes or memory nodes.

use crate::error::{Result, ensure};
use crate::ops::setters::setters;
use crate::problem::grid::CHUNK;
use std::ops::Range;

/// The number of keys that attention computes as one chunk: segments of a sequence begin and end at multiples of it.
pub const SPLIT_GRID: usize = CHUNK;

/// The number of parts that each axis is split into.
///
/// A shard is a view: [`View::batch`](crate::View::batch), [`heads`](crate::View::heads) and [`seq`](crate::View::seq) cut it
/// out. A mesh says where to cut, and [`SegmentLists`] computes the lengths and offsets that attention then takes.
///
/// | split by | a shard computes | the parts become one |
/// | --- | --- | --- |
/// | data | some sequences of the batch | side by side: the bits of the whole |
/// | model | some KV heads, and the query heads that read them | side by side: the bits of the whole (at [`Precision::Integer`](crate::Precision::Integer), as long as both have four query heads per KV head and more, or neither) |
/// | sequence | all heads over a segment of the keys, with an LSE | by [`merge_states`](crate::merge_states) within its error, by [`merge_chunks`](crate::merge_chunks) to the bit |
///
/// Positions count from the start of a segment. A logit is the same in every shard, because windows, causality and ALiBi depend
/// on differences of positions only. The caller cuts masks and biases along their keys. Sink logits take part once: give them
/// to one shard of the sequence only, or to [`merge_chunks`](crate::merge_chunks).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Mesh {
    /// Parts of the batch.
    pub data: usize,
    /// Parts of the heads.
    pub model: usize,
    /// Parts of the sequence.
    pub sequence: usize,
}

/// One part of a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    mesh: Mesh,
    data: usize,
    model: usize,
    sequence: usize,
}

/// The heads of a shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct HeadShard {
    /// Heads of K and V.
    pub kv_heads: Range<usize>,
    /// Query heads, which read those.
    pub heads: Range<usize>,
}

impl Mesh {
    /// A mesh of `data` parts of the batch, `model` parts of the heads and `sequence` parts of the sequence.
    pub fn new(data: usize, model: usize, sequence: usize) -> Self {
        Self { data, model, sequence }
    }

    setters! {
        plain { data: usize, model: usize, sequence: usize, }
    }

    /// The number of shards.
    ///
    /// # Errors
    /// [`Status::InvalidValue`](crate::Status::InvalidValue): an axis has no parts, or a `usize` does not hold the product.
    pub fn shards(&self) -> Result<usize> {
        let parts = [self.data, self.model, self.sequence];
        let product = parts.into_iter().try_fold(1usize, |product, n| product.checked_mul(n));
        match product {
            Some(n) if n > 0 => Ok(n),
            _ => crate::error::fail!(InvalidValue, "{parts:?} (data, model, sequence) is no number of shards"),
        }
    }

    /// Shard `rank`. Neighbouring ranks are parts of one sequence, then of the heads of one sequence: shards that exchange the
    /// most data are close.
    ///
    /// # Errors
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): there is no shard of this rank.
    ///
    /// ```
    /// let mesh = kvlane::Mesh::new(2, 4, 1);
    /// let shard = mesh.shard(5)?;
    /// assert_eq!((shard.data(), shard.model(), shard.sequence()), (1, 1, 0));
    /// assert_eq!(shard.sequences(3), 2..3);
    /// let heads = shard.heads(32, 8)?;
    /// assert_eq!((heads.kv_heads, heads.heads), (2..4, 8..16));
    /// # Ok::<(), kvlane::Error>(())
    /// ```
    pub fn shard(&self, rank: usize) -> Result<Shard> {
        let n = self.shards()?;
        ensure!(rank < n, OutOfRange, "rank is {rank}, but the mesh has {n} shards");
        let (rest, sequence) = (rank / self.sequence, rank % self.sequence);
        Ok(Shard { mesh: *self, data: rest / self.model, model: rest % self.model, sequence })
    }

    /// The shard with these coordinates.
    ///
    /// # Errors
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): a coordinate is outside of the mesh.
    pub fn at(&self, data: usize, model: usize, sequence: usize) -> Result<Shard> {
        self.shards()?;
        let axes = [("data", data, self.data), ("model", model, self.model), ("sequence", sequence, self.sequence)];
        for (name, x, n) in axes {
            ensure!(x < n, OutOfRange, "{name} is {x}, but the mesh has {n} parts along it");
        }
        Ok(Shard { mesh: *self, data, model, sequence })
    }
}

impl Shard {
    /// The index of its part of the batch.
    pub fn data(&self) -> usize {
        self.data
    }

    /// The index of its part of the heads.
    pub fn model(&self) -> usize {
        self.model
    }

    /// The index of its part of the sequence.
    pub fn sequence(&self) -> usize {
        self.sequence
    }

    /// Its rank, as in [`Mesh::shard`].
    pub fn rank(&self) -> usize {
        (self.data * self.mesh.model + self.model) * self.mesh.sequence + self.sequence
    }

    /// Its sequences of a batch. The parts of a batch differ by at most one sequence, and may be empty.
    pub fn sequences(&self, batch: usize) -> Range<usize> {
        part(batch, self.data, self.mesh.data)
    }

    /// Its heads. If there are at most as many parts as KV heads, the KV heads are spread evenly; otherwise several shards have
    /// the same KV head and share its query heads.
    ///
    /// # Errors
    /// [`Status::Shape`](crate::Status::Shape): `heads` is no multiple of `kv_heads`, or there are more parts than KV heads and
    /// no multiple of them.
    pub fn heads(&self, heads: usize, kv_heads: usize) -> Result<HeadShard> {
        ensure!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            Shape,
            "{heads} query heads are no multiple of {kv_heads} KV heads"
        );
        let (group, parts) = (heads / kv_heads, self.mesh.model);
        if parts <= kv_heads {
            let kv = part(kv_heads, self.model, parts);
            return Ok(HeadShard { heads: kv.start * group..kv.end * group, kv_heads: kv });
        }
        ensure!(
            parts.is_multiple_of(kv_heads),
            Shape,
            "{parts} parts are more than {kv_heads} KV heads, and no multiple of them"
        );
        let copies = parts / kv_heads;
        let kv = self.model / copies;
        let own = part(group, self.model % copies, copies);
        Ok(HeadShard { kv_heads: kv..kv + 1, heads: kv * group + own.start..kv * group + own.end })
    }

    /// Its segment of a cache with `capacity` slots per sequence. It begins and ends at multiples of [`SPLIT_GRID`] or at the
    /// capacity, and may be empty.
    pub fn keys(&self, capacity: usize) -> Range<usize> {
        let chunks = part(capacity.div_ceil(SPLIT_GRID), self.sequence, self.mesh.sequence);
        let at = |chunk: usize| (chunk * SPLIT_GRID).min(capacity);
        at(chunks.start)..at(chunks.end)
    }
}

/// Part `i` of `n` things in `parts` parts; where the parts cannot be equal, the first ones have one more.
fn part(n: usize, i: usize, parts: usize) -> Range<usize> {
    let (each, more) = (n / parts, n % parts);
    let start = i * each + i.min(more);
    start..start + each + usize::from(i < more)
}

/// The lists of attention over whole sequences, from which those of a segment follow: as in
/// [`AttentionOptions`](crate::AttentionOptions), with an entry per sequence.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SegmentLists<'a> {
    /// `[batch]`: valid keys.
    pub lengths: &'a [i32],
    /// `[batch]`: the first visible key; 0 if absent.
    pub kv_starts: Option<&'a [i32]>,
    /// `[batch]`: the position of query 0; `length - seq` if absent.
    pub offsets: Option<&'a [i32]>,
    /// Queries per sequence.
    pub seq: usize,
}

impl<'a> SegmentLists<'a> {
    /// Sequences that begin at key 0 and whose last `seq` tokens are the queries.
    pub fn new(lengths: &'a [i32], seq: usize) -> Self {
        Self { lengths, kv_starts: None, offsets: None, seq }
    }

    setters! {
        optional { kv_starts: &'a [i32], offsets: &'a [i32], }
        plain { lengths: &'a [i32], seq: usize, }
    }
}

impl SegmentLists<'_> {
    /// Writes the lists of attention over the keys `segment` only: valid keys, the first visible key and the position of query
    /// 0, all counted from the start of the segment. An offset may be negative, or beyond the segment.
    ///
    /// # Errors
    /// [`Status::Shape`](crate::Status::Shape): lists have different lengths.
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): a length or start is negative, `segment` is no range of keys, or an
    /// offset does not fit 32 bits. On an error, nothing has been written.
    ///
    /// ```
    /// // 1500 and 700 tokens, one query each; the segment that begins at key 1024.
    /// let whole = kvlane::SegmentLists::new(&[1500, 700], 1);
    /// let (mut lengths, mut kv_starts, mut offsets) = ([0; 2], [0; 2], [0; 2]);
    /// whole.local(1024..2048, &mut lengths, &mut kv_starts, &mut offsets)?;
    /// assert_eq!((lengths, kv_starts, offsets), ([476, 0], [0, 0], [475, -325]));
    /// # Ok::<(), kvlane::Error>(())
    /// ```
    pub fn local(
        &self,
        segment: Range<usize>,
        lengths: &mut [i32],
        kv_starts: &mut [i32],
        offsets: &mut [i32],
    ) -> Result<()> {
        check_segment(&segment)?;
        let batch = self.lengths.len();
        let given = [("kv_starts", self.kv_starts.map(<[i32]>::len)), ("offsets", self.offsets.map(<[i32]>::len))];
        let outputs = [("lengths", lengths.len()), ("kv_starts", kv_starts.len()), ("offsets", offsets.len())];
        for (name, n) in given.into_iter().filter_map(|(name, n)| n.map(|n| (name, n))).chain(outputs) {
            ensure!(n == batch, Shape, "{name} has {n} entries, but the lengths of the whole have {batch}");
        }
        for row in 0..batch {
            let (length, start) = (self.lengths[row], self.kv_starts.map_or(0, |s| s[row]));
            ensure!(length >= 0, OutOfRange, "lengths[{row}] is {length}, which is negative");
            ensure!(start >= 0, OutOfRange, "kv_starts[{row}] is {start}, which is negative");
            let offset = self.offset(row, &segment);
            ensure!(
                i32::try_from(offset).is_ok(),
                OutOfRange,
                "sequence {row} would have offset {offset} in a segment that begins at {}",
                segment.start
            );
        }
        // Inside the segment, which is no longer than `i32::MAX`.
        let local = |x: i32| (x as usize).clamp(segment.start, segment.end) - segment.start;
        for row in 0..batch {
            lengths[row] = local(self.lengths[row]) as i32;
            kv_starts[row] = self.kv_starts.map_or(0, |s| local(s[row])) as i32;
            offsets[row] = self.offset(row, &segment) as i32;
        }
        Ok(())
    }

    fn offset(&self, row: usize, segment: &Range<usize>) -> i64 {
        let whole = match self.offsets {
            Some(offsets) => offsets[row] as i64,
            None => (self.lengths[row] as i64).saturating_sub_unsigned(self.seq as u64),
        };
        whole.saturating_sub(segment.start as i64)
    }
}

fn check_segment(segment: &Range<usize>) -> Result<()> {
    ensure!(
        segment.start <= segment.end && segment.end <= crate::view::MAX_AXIS,
        OutOfRange,
        "{} to {} is no segment of keys",
        segment.start,
        segment.end
    );
    Ok(())
}

/// The slots of new tokens in a cache that holds the keys `segment`: `slots`, `[batch, seq]`, for
/// [`Destination::slots`](crate::Destination::slots).
///
/// Token t of sequence b stands at position `positions[b] + t` of the whole sequence. Tokens of other segments get -1, and are
/// skipped by the write.
///
/// # Errors
/// [`Status::OutOfRange`](crate::Status::OutOfRange): `segment` is no range of keys, or a position is negative.
/// [`Status::Shape`](crate::Status::Shape): the length of `slots` is no multiple of the number of positions. On an error,
/// nothing has been written.
///
/// ```
/// let mut slots = [0; 4];
/// kvlane::shard_slots(1024..2048, &[1022], &mut slots)?;
/// assert_eq!(slots, [-1, -1, 0, 1]);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn shard_slots(segment: Range<usize>, positions: &[i32], slots: &mut [i32]) -> Result<()> {
    check_segment(&segment)?;
    let (batch, n) = (positions.len(), slots.len());
    ensure!(
        batch == 0 && n == 0 || batch > 0 && n.is_multiple_of(batch),
        Shape,
        "slots has {n} entries, which are not as many for each of {batch} positions"
    );
    if let Some((row, position)) = positions.iter().enumerate().find(|(_, p)| **p < 0) {
        crate::error::fail!(OutOfRange, "positions[{row}] is {position}, which is negative");
    }
    let seq = n.checked_div(batch).unwrap_or(0);
    for (row, slots) in slots.chunks_exact_mut(seq.max(1)).enumerate() {
        for (t, slot) in slots.iter_mut().enumerate() {
            let position = positions[row] as usize + t;
            *slot = if segment.contains(&position) { (position - segment.start) as i32 } else { -1 };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for n in 0..40 {
            for parts in 1..12 {
                let ranges: Vec<_> = (0..parts).map(|i| part(n, i, parts)).collect();
                assert!(ranges.windows(2).all(|w| w[0].end == w[1].start && w[0].len() >= w[1].len()));
                assert_eq!((ranges[0].start, ranges[parts - 1].end), (0, n));
                assert!(ranges[0].len() - ranges[parts - 1].len() <= 1);
            }
        }
    }

    #[test]
    fn ranks_and_coordinates() {
        let mesh = Mesh { data: 3, model: 2, sequence: 4 };
        for rank in 0..24 {
            let shard = mesh.shard(rank).unwrap();
            assert_eq!(shard.rank(), rank);
            assert_eq!(mesh.at(shard.data(), shard.model(), shard.sequence()).unwrap(), shard);
        }
        assert!(mesh.shard(24).is_err() && mesh.at(0, 2, 0).is_err());
        assert!(Mesh { data: 0, ..mesh }.shards().is_err() && Mesh { data: usize::MAX, ..mesh }.shards().is_err());
    }
}
