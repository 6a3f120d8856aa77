//! Shards: a part of a batch, of the heads or of the sequence, for each of several machines, processes or memory nodes.
//!
//! A shard is a view. [`View::batch`](crate::View::batch), [`heads`](crate::View::heads) and [`seq`](crate::View::seq) cut it
//! out; what is here says where to cut, and which lengths and offsets attention then takes.
//!
//! | split by | what a shard computes | how the parts become one |
//! | --- | --- | --- |
//! | data | some sequences of the batch | side by side: the bits of the whole |
//! | model | some KV heads, and the query heads that read them | side by side: the bits of the whole |
//! | sequence | all heads over a segment of the keys, with an LSE | [`merge_states`](crate::merge_states), within its error |
//!
//! A logit is computed the same way in every shard, because positions are counted from the start of its segment: a window, a
//! causal limit and ALiBi depend on differences of positions only. Masks and biases are cut along their keys by the caller. An
//! attention sink takes part once: give it to one shard of the sequence, and none to the others.

use crate::error::{Result, ensure};
use crate::ops::setters::setters;
use crate::problem::grid::CHUNK;
use std::ops::Range;

/// Keys that attention computes as one: segments of a sequence begin and end at multiples of this many.
pub const SPLIT_GRID: usize = CHUNK;

/// How many parts each axis is split into.
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
    /// So many parts of the batch, of the heads and of the sequence.
    pub fn new(data: usize, model: usize, sequence: usize) -> Self {
        Self { data, model, sequence }
    }

    setters! {
        plain { data: usize, model: usize, sequence: usize, }
    }

    /// How many shards there are.
    ///
    /// # Errors
    /// An axis has no parts, or the product is more than a `usize` holds.
    pub fn shards(&self) -> Result<usize> {
        let parts = [self.data, self.model, self.sequence];
        let product = parts.into_iter().try_fold(1usize, |product, n| product.checked_mul(n));
        match product {
            Some(n) if n > 0 => Ok(n),
            _ => crate::error::fail!(InvalidValue, "{parts:?} (data, model, sequence) is no number of shards"),
        }
    }

    /// Shard `rank`, where neighbours are parts of one sequence, then of one sequence's heads: shards that exchange the
    /// most are close.
    ///
    /// # Errors
    /// There is no shard of this rank.
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
    /// A coordinate is outside the mesh.
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
    /// Which part of the batch.
    pub fn data(&self) -> usize {
        self.data
    }

    /// Which part of the heads.
    pub fn model(&self) -> usize {
        self.model
    }

    /// Which part of the sequence.
    pub fn sequence(&self) -> usize {
        self.sequence
    }

    /// Its place in the order of [`Mesh::shard`].
    pub fn rank(&self) -> usize {
        (self.data * self.mesh.model + self.model) * self.mesh.sequence + self.sequence
    }

    /// Its sequences of a batch: parts differ by at most one sequence, and may be empty.
    pub fn sequences(&self, batch: usize) -> Range<usize> {
        part(batch, self.data, self.mesh.data)
    }

    /// Its heads. With fewer parts than KV heads these are spread evenly; with more, several shards have the same KV head and
    /// share the query heads that read it.
    ///
    /// # Errors
    /// `heads` is no multiple of `kv_heads`, or there are more parts than KV heads and no multiple of them.
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

    /// Its segment of a cache with so many slots a sequence: begins and ends at multiples of [`SPLIT_GRID`] or at the capacity,
    /// and may be empty.
    pub fn keys(&self, capacity: usize) -> Range<usize> {
        let chunks = part(capacity.div_ceil(SPLIT_GRID), self.sequence, self.mesh.sequence);
        let at = |chunk: usize| (chunk * SPLIT_GRID).min(capacity);
        at(chunks.start)..at(chunks.end)
    }
}

/// Part `i` of `n` things in `parts` parts, the first of which have one more where they cannot be equal.
fn part(n: usize, i: usize, parts: usize) -> Range<usize> {
    let (each, more) = (n / parts, n % parts);
    let start = i * each + i.min(more);
    start..start + each + usize::from(i < more)
}

/// What attention over a whole sequence would take: `[batch]` lists as in [`AttentionOptions`](crate::AttentionOptions).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SegmentLists<'a> {
    /// Valid keys of every sequence.
    pub lengths: &'a [i32],
    /// The first visible key of every sequence; 0 if absent.
    pub kv_starts: Option<&'a [i32]>,
    /// The position of query 0 of every sequence; `length - seq` if absent.
    pub offsets: Option<&'a [i32]>,
    /// Queries a sequence.
    pub seq: usize,
}

impl<'a> SegmentLists<'a> {
    /// Lists of sequences that begin at key 0 and whose queries are the last `seq` tokens.
    pub fn new(lengths: &'a [i32], seq: usize) -> Self {
        Self { lengths, kv_starts: None, offsets: None, seq }
    }

    setters! {
        optional { kv_starts: &'a [i32], offsets: &'a [i32], }
        plain { lengths: &'a [i32], seq: usize, }
    }
}

impl SegmentLists<'_> {
    /// What attention over the keys `segment` alone takes: how many of them are valid, the first visible one, and where query 0
    /// stands, all counted from the start of the segment. An offset may be negative, or beyond the segment.
    ///
    /// # Errors
    /// Lists of different sizes, a negative length or start, a segment that is none, an offset that leaves 32 bits. Nothing
    /// has been written then.
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

/// The slots, in a cache that holds the keys `segment`, of tokens that a whole cache would have from `positions[b]` on:
/// `[batch, seq]` for [`Destination::slots`](crate::Destination::slots), -1 for those that belong to other segments.
///
/// # Errors
/// A segment that is none, a `slots` that is no multiple of the positions, a negative position. Nothing has been written then.
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
