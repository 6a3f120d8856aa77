//! Plans: what depends on lengths, positions and tables only, checked and computed once per step for every layer.

use crate::error::{Result, ensure};
use crate::format::CacheFormat;
use crate::layout::Layout;
use crate::ops::attention::{AttentionOptions, Planned, call_rows};
use crate::ops::mask::RawMasks;
use crate::ops::visibility;
use crate::problem::grid::{BLOCK, CHUNK, between};
use crate::problem::masks::{BitRows, BitView, ByteView, visible_by_masks};
use crate::problem::visibility::{Summary, Visibility, VisibilityOf};
use crate::view::{BATCH, HEADS, MAX_AXIS, RawView, SEQ};
use std::ops::Range;

/// The part of an attention call that all layers of a step share, copied and checked: queries per sequence, lengths, positions,
/// windows, masks, and the layout of the caches.
///
/// A decoder makes a plan, or updates one, and passes it to the attention of every layer as [`AttentionOptions::plan`]. After
/// the step, [`advance`](Self::advance) moves it to the next token; its cost depends on the number of sequences, not on the
/// length of the cache. Layers whose caches differ in the first two axes, or in windows, need plans of their own. A plan holds
/// no data of a cache and depends on neither threads nor CPU.
///
/// Masks are read when the plan is made, once for all layers. [`mask`](AttentionOptions::mask) and
/// [`bit_mask`](AttentionOptions::bit_mask) become one bit per query and key, for the queries of every sequence and the keys up
/// to its length (without the leading keys that all queries see), per head only if a mask differs by head. Masks that mask
/// nothing visible leave no bits. A call with a plan that was made with masks takes no masks of its own; with any other plan,
/// it may.
///
/// Thread safety: any number of calls may use a plan at the same time. A change takes it exclusively, which `&mut` ensures.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// let cache = [1, 16, 2, 8];
/// let (keys, values) = (vec![0.5f32; 256], vec![0.25f32; 256]);
/// let (q, mut out) = (vec![1.0f32; 32], vec![0.0f32; 32]);
/// let options = AttentionOptions::new().causal(true).lengths(&[3]);
/// let mut plan = AttentionPlan::new([1, 1, 4, 8], cache, &options)?;
/// for _step in 0..2 {
///     for _layer in 0..2 {
///         let tensors = AttentionTensors::new(
///             View::new(&q, [1, 1, 4, 8])?,
///             View::new(&keys, cache)?,
///             View::new(&values, cache)?,
///             ViewMut::new(&mut out, [1, 1, 4, 8])?,
///         );
///         attention(&context, &Serial, &mut Workspace::new(), tensors, &AttentionOptions::new().plan(&plan))?;
///     }
///     plan.advance(&[1])?;
/// }
/// assert_eq!(plan.lengths(), [5]);
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    /// Of the cache, only the first two axes count; there is no data.
    visibility: VisibilityOf<Range<usize>, Kind>,
    /// All lists of the visibility, and the table of its layout.
    entries: Vec<i32>,
    /// Tokens on axis 1 of `q`.
    tokens: usize,
    summary: Summary,
    masks: Masks,
}

/// The keys that masks let the queries of a plan see.
#[derive(Clone, Debug, Default)]
struct Masks {
    /// Whether there were any masks, even if they mask nothing.
    given: bool,
    /// The number of heads with bits of their own; none if all heads share them.
    heads: Option<usize>,
    /// Whether anything is masked; if not, there are no bits.
    hide: bool,
    /// In the order of bytes: on any machine, the lowest bit of the first byte is the first.
    words: Vec<u64>,
    first_keys: Vec<i32>,
    starts: Vec<i64>,
    query_strides: Vec<i64>,
    head_stride: i64,
}

/// A layout whose table is a range of a plan's entries.
#[derive(Clone, Debug)]
enum Kind {
    Contiguous,
    Ring { sink_tokens: usize },
    Paged { page_table: Range<usize>, pages_per_sequence: usize },
    Indirect { beam_table: Range<usize> },
    Ragged { cu_seqlens: Range<usize> },
}

impl AttentionPlan {
    /// A plan for queries `[batch, seq, heads, dim]` (if ragged, `[1, tokens, heads, dim]`) and caches `[batch, slots,
    /// kv_heads, dim]`. Only the first two axes count, and with masks the heads of the queries. Of the options, it takes those
    /// that [`AttentionOptions::plan`] replaces.
    ///
    /// # Errors
    /// Those that [`attention`](crate::attention()) returns for these options.
    pub fn new(q_shape: [usize; 4], k_shape: [usize; 4], options: &AttentionOptions) -> Result<Self> {
        Self::from_visibility(q_shape, &options.visibility(q_shape, axes(k_shape))?, &options.masks())
    }

    /// Makes the plan anew for other sequences, in the memory that it has.
    ///
    /// # Errors
    /// As [`new`](Self::new). On an error, the plan is unchanged.
    pub fn update(&mut self, q_shape: [usize; 4], k_shape: [usize; 4], options: &AttentionOptions) -> Result<()> {
        self.take(q_shape, &options.visibility(q_shape, axes(k_shape))?, &options.masks())
    }

    pub(crate) fn from_visibility(q_shape: [usize; 4], visibility: &Visibility, masks: &RawMasks) -> Result<Self> {
        let mut plan = Self {
            visibility: Visibility::unmasked(0, 0, visibility.cache).map(Kind::Contiguous, |_| 0..0),
            entries: Vec::new(),
            tokens: 0,
            summary: Summary::default(),
            masks: Masks::default(),
        };
        plan.take(q_shape, visibility, masks)?;
        Ok(plan)
    }

    pub(crate) fn take(&mut self, q_shape: [usize; 4], visibility: &Visibility, masks: &RawMasks) -> Result<()> {
        for (name, n) in [("seq of q", q_shape[SEQ]), ("batch of k", visibility.cache.shape[BATCH])] {
            ensure!(n <= MAX_AXIS, Shape, "{name} is {n}, more than {MAX_AXIS}");
        }
        call_rows(q_shape, visibility)?;
        let summary = visibility::validate(visibility)?;
        masks.validate(visibility, q_shape[HEADS], summary.longest)?;
        let lines = Lines::new(visibility, masks, q_shape[HEADS])?;
        if visibility.lengths.is_none() {
            ensure_memory(visibility.batch as u128 * size_of::<i32>() as u128)?;
        }
        self.summary = match self.masks.take(&lines) {
            Some(seen) => summary.within(seen),
            None => summary,
        };
        self.tokens = q_shape[SEQ];
        self.entries.clear();
        let entries = &mut self.entries;
        let mut keep = |list: &[i32]| {
            entries.extend_from_slice(list);
            entries.len() - list.len()..entries.len()
        };
        let kind = match visibility.layout {
            Layout::Contiguous => Kind::Contiguous,
            Layout::Ring { sink_tokens } => Kind::Ring { sink_tokens },
            Layout::Paged { page_table, pages_per_sequence } => {
                Kind::Paged { page_table: keep(page_table), pages_per_sequence }
            }
            Layout::Indirect { beam_table } => Kind::Indirect { beam_table: keep(beam_table) },
            Layout::Ragged { cu_seqlens } => Kind::Ragged { cu_seqlens: keep(cu_seqlens) },
        };
        self.visibility = visibility.map(kind, |list| keep(list));
        self.visibility.cache.data = std::ptr::null_mut();
        if visibility.lengths.is_none() {
            let first = self.entries.len();
            self.entries.extend((0..visibility.batch).map(|row| visibility.length(row) as i32));
            self.visibility.lengths = Some(first..self.entries.len());
        }
        Ok(())
    }

    /// Moves the plan to the next step: sequence b has `counts[b]` more tokens, and as many queries follow as before. Lengths grow,
    /// and so do offsets and query positions that were given. Allocates nothing.
    ///
    /// # Errors
    /// - [`Status::Shape`](crate::Status::Shape): the list has not an entry per sequence.
    /// - [`Status::OutOfRange`](crate::Status::OutOfRange): a count is negative, or a table entry of a new token is not in the cache.
    /// - [`Status::Capacity`](crate::Status::Capacity): a sequence has no room, or queries see keys that a ring has overwritten.
    /// - [`Status::InvalidValue`](crate::Status::InvalidValue): the plan was made with masks.
    ///
    /// On an error, the plan is unchanged.
    pub fn advance(&mut self, counts: &[i32]) -> Result<()> {
        let n = counts.len();
        ensure!(
            !self.masks.given,
            InvalidValue,
            "the plan holds masks, which say nothing of new tokens: update it with masks that do"
        );
        let visibility = self.visibility();
        let batch = visibility.batch;
        ensure!(n == batch, Shape, "counts has {n} entries, but the plan has {batch} sequences");
        for (row, &count) in counts.iter().enumerate() {
            let (length, room) = (visibility.length(row) as usize, visibility.layout.capacity(&visibility.cache, row));
            ensure!(count >= 0, OutOfRange, "counts[{row}] is {count}, which is negative");
            ensure!(
                length + count as usize <= room,
                Capacity,
                "sequence {row} of the plan has {length} tokens and is given {count} more, but has room for {room}"
            );
            visibility.layout.validate_row("k", &visibility.cache, row, length, length + count as usize)?;
        }
        self.move_by(counts, 1);
        match visibility::summarize(&self.visibility()) {
            Ok(summary) => self.summary = summary,
            Err(error) => {
                self.move_by(counts, -1);
                return Err(error);
            }
        }
        Ok(())
    }

    fn move_by(&mut self, counts: &[i32], sign: i32) {
        let VisibilityOf { lengths, offsets, .. } = &self.visibility;
        for list in [lengths, offsets].into_iter().flatten() {
            for (entry, &count) in self.entries[list.clone()].iter_mut().zip(counts) {
                *entry = entry.wrapping_add(sign * count);
            }
        }
        let VisibilityOf { seq, cu_seqlens_q, query_positions: Some(list), .. } = &self.visibility else { return };
        for (row, &count) in counts.iter().enumerate() {
            let queries = match cu_seqlens_q {
                None => row * seq..(row + 1) * seq,
                Some(starts) => {
                    let starts = &self.entries[starts.clone()];
                    starts[row] as usize..starts[row + 1] as usize
                }
            };
            for entry in &mut self.entries[list.start + queries.start..list.start + queries.end] {
                *entry = entry.wrapping_add(sign * count);
            }
        }
    }

    /// Sets entries `first..` of the table of a sequence, in a paged or indirect layout: before [`advance`](Self::advance)
    /// needs them, or when a page has moved.
    ///
    /// # Errors
    /// [`Status::InvalidValue`](crate::Status::InvalidValue): the layout has no table.
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): an entry lies outside of the table, or belongs to an existing token
    /// but is not in the cache. On an error, the plan is unchanged.
    pub fn set_table(&mut self, sequence: usize, first: usize, entries: &[i32]) -> Result<()> {
        let VisibilityOf { batch, cache, layout, .. } = &self.visibility;
        let (table, per_row, tokens) = match layout {
            Kind::Paged { page_table, pages_per_sequence } => (page_table.start, *pages_per_sequence, cache.shape[SEQ]),
            Kind::Indirect { beam_table } => (beam_table.start, cache.shape[SEQ], 1),
            Kind::Contiguous | Kind::Ring { .. } | Kind::Ragged { .. } => {
                crate::error::fail!(InvalidValue, "the plan's layout has no table of pages or beams")
            }
        };
        ensure!(sequence < *batch, OutOfRange, "sequence {sequence} of a plan that has {batch}");
        let end = first.saturating_add(entries.len());
        ensure!(end <= per_row, OutOfRange, "entries {first}..{end} of a sequence that has {per_row}");
        let (used, n) = ((self.lengths()[sequence] as usize).div_ceil(tokens), cache.shape[BATCH]);
        for (i, &entry) in entries.iter().enumerate() {
            ensure!(
                first + i >= used || entry >= 0 && (entry as usize) < n,
                OutOfRange,
                "entry {} of sequence {sequence} is {entry}, but k has batch = {n}",
                first + i
            );
        }
        let at = table + sequence * per_row;
        self.entries[at + first..at + end].copy_from_slice(entries);
        Ok(())
    }

    /// `[batch]`: the tokens of every sequence.
    pub fn lengths(&self) -> &[i32] {
        self.visibility.lengths.as_ref().map_or(&[], |list| &self.entries[list.clone()])
    }

    /// The visibility as a call takes it.
    pub(crate) fn visibility(&self) -> Visibility<'_> {
        let entries = |range: &Range<usize>| &self.entries[range.clone()];
        let layout = match &self.visibility.layout {
            Kind::Contiguous => Layout::Contiguous,
            &Kind::Ring { sink_tokens } => Layout::Ring { sink_tokens },
            Kind::Paged { page_table, pages_per_sequence } => {
                Layout::Paged { page_table: entries(page_table), pages_per_sequence: *pages_per_sequence }
            }
            Kind::Indirect { beam_table } => Layout::Indirect { beam_table: entries(beam_table) },
            Kind::Ragged { cu_seqlens } => Layout::Ragged { cu_seqlens: entries(cu_seqlens) },
        };
        self.visibility.map(layout, entries)
    }

    pub(crate) fn planned(&self) -> Planned<'_> {
        Planned { summary: self.summary, has_masks: self.masks.given, bits: self.masks.view() }
    }

    /// Checks that the tensors of a call are those that the plan was made for.
    pub(crate) fn check(&self, q: &RawView, k_shape: [usize; 4]) -> Result<()> {
        let VisibilityOf { batch, cache, cu_seqlens_q, .. } = &self.visibility;
        let rows = if cu_seqlens_q.is_some() { 1 } else { *batch };
        let (want, have) = ([rows, self.tokens], [q.shape[BATCH], q.shape[SEQ]]);
        ensure!(want == have, Shape, "the plan is for q of batch and seq {want:?}, but q has {have:?}");
        let axes = |shape: [usize; 4]| [shape[BATCH], shape[SEQ]];
        let (want, have) = (axes(cache.shape), axes(k_shape));
        ensure!(want == have, Shape, "the plan is for k of batch and seq {want:?}, but k has {have:?}");
        if let Some(heads) = self.masks.heads {
            let have = q.shape[HEADS];
            ensure!(heads == have, Shape, "the plan's masks are for q of {heads} heads, but q has {have}");
        }
        Ok(())
    }
}

/// The lines of validated masks. A line is what the masks let through of a sequence's keys, for one query and head, or for
/// several that the masks do not distinguish.
struct Lines<'a> {
    visibility: &'a Visibility<'a>,
    mask: Option<ByteView>,
    bit_mask: Option<BitView<'a>>,
    by_query: bool,
    by_head: bool,
    heads: usize,
}

impl<'a> Lines<'a> {
    fn new(visibility: &'a Visibility<'a>, masks: &RawMasks<'a>, heads: usize) -> Result<Self> {
        let (mask, bit_mask) = masks.views();
        let by_head = mask.is_some_and(|m| m.strides[2] != 0) || bit_mask.is_some_and(|m| m.strides[2] != 0);
        let by_query = mask.is_some_and(|m| m.strides[1] != 0)
            || bit_mask.is_some_and(|m| m.rows.map_or(m.strides[1] != 0, |r| r.query_strides.iter().any(|&n| n != 0)));
        let lines = Self { visibility, mask, bit_mask, by_query, by_head, heads };
        if lines.any() {
            let words = |row: usize| (lines.queries(row) as u128).saturating_mul(lines.blocks(row) as u128);
            let bits = (0..visibility.batch)
                .map(words)
                .fold(0, u128::saturating_add)
                .saturating_mul(lines.heads().max(1) as u128)
                .saturating_mul(BLOCK as u128);
            let most = isize::MAX as u128;
            ensure!(bits <= most, Shape, "the masks of the plan would have {bits} bits, more than {most}");
            ensure_memory(bits / 8 + visibility.batch as u128 * 20)?;
        }
        Ok(lines)
    }

    fn any(&self) -> bool {
        self.mask.is_some() || self.bit_mask.is_some()
    }

    /// The number of heads with lines of their own.
    fn heads(&self) -> usize {
        if self.by_head { self.heads } else { self.heads.min(1) }
    }

    /// The number of queries of a sequence with lines of their own.
    fn queries(&self, row: usize) -> usize {
        let n = self.visibility.queries(row);
        if self.by_query { n } else { n.min(1) }
    }

    fn blocks(&self, row: usize) -> usize {
        (self.visibility.length(row) as usize).div_ceil(BLOCK)
    }

    /// The keys that the queries of a line see by position, from the first to the last.
    fn span(&self, row: usize, query: usize) -> (i64, i64) {
        if self.by_query {
            return self.visibility.visible_keys(row, query);
        }
        // Where a query sees anything, the next one sees from there or the next key on: nothing lies between.
        self.visibility.visible_to_any(row)
    }

    /// Calls `f(head, query, block, live, shown)` for all lines of a sequence and the blocks in a range: which of a block's
    /// keys are seen by position, and which of those the masks show.
    fn for_each(&self, row: usize, blocks: Range<usize>, mut f: impl FnMut(usize, usize, usize, u64, u64)) {
        let masks = (self.mask.as_ref(), self.bit_mask.as_ref());
        let kept = self.visibility.always_visible(row);
        for query in 0..self.queries(row) {
            let span = self.span(row, query);
            for head in 0..self.heads() {
                for block in blocks.clone() {
                    let base = block * BLOCK;
                    let live = between(span, base) | between(kept, base);
                    let shown = match live {
                        0 => 0,
                        // SAFETY: the masks are valid for the sequence's queries and the keys below its length.
                        _ => unsafe { visible_by_masks(masks, row, (query as u32, head as u32), base, live) },
                    };
                    f(head, query, block, live, shown);
                }
            }
        }
    }
}

impl Masks {
    /// Takes what the masks show; if they hide anything, the chunks of the cache in which a query sees a key in spite of them, from
    /// the first to the last.
    fn take(&mut self, lines: &Lines) -> Option<Range<usize>> {
        self.given = lines.any();
        self.heads = (lines.by_head && self.given).then_some(lines.heads);
        self.hide = false;
        self.head_stride = 0;
        self.words.clear();
        self.first_keys.clear();
        self.starts.clear();
        self.query_strides.clear();
        if !self.given {
            return None;
        }
        let (mut first_seen, mut end_seen, mut words) = (usize::MAX, 0, 0);
        for row in 0..lines.visibility.batch {
            let blocks = lines.blocks(row);
            let mut first = blocks;
            lines.for_each(row, 0..blocks, |_, _, block, live, shown| {
                if live != shown {
                    first = first.min(block);
                }
                if shown != 0 {
                    let chunk = block * BLOCK / CHUNK;
                    (first_seen, end_seen) = (first_seen.min(chunk), end_seen.max(chunk + 1));
                }
            });
            self.hide |= first < blocks;
            let width = blocks - first;
            self.first_keys.push((first * BLOCK).min(lines.visibility.length(row) as usize) as i32);
            self.starts.push((words * BLOCK) as i64);
            self.query_strides.push(if lines.by_query { (width * BLOCK) as i64 } else { 0 });
            words += width * lines.queries(row);
        }
        if !self.hide {
            return None;
        }
        self.head_stride = if lines.by_head { (words * BLOCK) as i64 } else { 0 };
        self.words.resize(words * lines.heads(), 0);
        for row in 0..lines.visibility.batch {
            let (blocks, start) = (lines.blocks(row), self.starts[row] as usize / BLOCK);
            let first = (self.first_keys[row] as usize).div_ceil(BLOCK);
            let width = blocks - first;
            lines.for_each(row, first..blocks, |head, query, block, _, shown| {
                self.words[head * words + start + query * width + block - first] = shown.to_le();
            });
        }
        Some(first_seen.min(end_seen)..end_seen)
    }

    fn view(&self) -> Option<BitView<'_>> {
        self.hide.then(|| BitView {
            data: self.words.as_ptr().cast(),
            offset: 0,
            strides: [0, 0, self.head_stride],
            first_keys: Some(&self.first_keys),
            rows: Some(BitRows { starts: &self.starts, query_strides: &self.query_strides }),
        })
    }
}

/// Fails if so many bytes cannot be allocated. A plan is made of shapes, which need no memory behind them, and a failure inside a
/// list would end the process.
fn ensure_memory(bytes: u128) -> Result<()> {
    const SMALL: u128 = 1 << 24;
    let fits =
        bytes <= SMALL || usize::try_from(bytes).is_ok_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
    ensure!(fits, Shape, "the plan would take {bytes} bytes, which cannot be allocated");
    Ok(())
}

/// A cache of which only sequences and slots count.
fn axes(k_shape: [usize; 4]) -> RawView<CacheFormat> {
    let shape = [k_shape[BATCH], k_shape[SEQ], 1, 1];
    let dtype = CacheFormat::F32;
    RawView { data: std::ptr::null_mut(), dtype, shape, strides: [0; 4], bytes: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BitMask, Mask};

    const Q: [usize; 4] = [2, 3, 4, 8];
    const K: [usize; 4] = [2, 4096, 1, 8];

    fn plan(bits: &[bool], strides: [i64; 4], options: AttentionOptions) -> AttentionPlan {
        let mask = Mask::strided(bits, 0, [2, 3, 4, 4096], strides).unwrap();
        let options = AttentionOptions { mask: Some(mask), lengths: Some(&[2100, 70]), ..options };
        AttentionPlan::new(Q, K, &options).unwrap()
    }

    /// Masks that mask no visible key leave no bits, but the plan remembers that it was made with masks.
    #[test]
    fn masks_that_hide_nothing_are_dropped() {
        let shown: Vec<bool> = (0..4096).map(|key| key < 2100).collect();
        let mut made = plan(&shown, [0, 0, 0, 1], AttentionOptions::default());
        assert!(made.planned().bits.is_none() && made.planned().has_masks && made.masks.words.is_empty());
        assert!(made.advance(&[1, 1]).unwrap_err().message().starts_with("the plan holds masks"));
        // As a causal mask does, if there is causality.
        let causal: Vec<bool> = (0..3 * 4096).map(|i| i % 4096 <= 2097 + i / 4096).collect();
        let options = AttentionOptions { causal: true, ..Default::default() };
        assert!(plan(&causal, [0, 4096, 0, 1], options).planned().bits.is_none());
        assert!(plan(&causal, [0, 4096, 0, 1], AttentionOptions::default()).planned().bits.is_some());
    }

    /// Bits are those of keys from the first hidden block to the length, of queries and heads that differ.
    #[test]
    fn queries_that_a_mask_does_not_distinguish_are_not_counted_one_by_one() {
        let hidden = [true, false, true, true];
        let q = [1, i32::MAX as usize, 1, 8];
        let mask = Mask::strided(&hidden, 0, [1, q[1], 1, 4], [0, 0, 0, 1]).unwrap();
        let options = AttentionOptions { mask: Some(mask), causal: true, window_left: Some(3), ..Default::default() };
        for _ in 0..1000 {
            let made = AttentionPlan::new(q, [1, 4, 1, 8], &options).unwrap();
            assert_eq!(made.masks.words, [0b1101u64.to_le()]);
        }
    }

    #[test]
    fn bits_are_no_more_than_what_differs() {
        let hidden: Vec<bool> = (0..12 * 4096).map(|i| i % 4096 != 2050).collect();
        for (strides, lines) in
            [([0, 0, 0, 1], 1), ([0, 4096, 0, 1], 3), ([0, 0, 4096, 1], 4), ([0, 16384, 4096, 1], 12)]
        {
            let made = plan(&hidden, strides, AttentionOptions::default());
            // Keys 2048 to 2099 of the first sequence, and none of the second, from which nothing is hidden.
            assert_eq!(made.masks.first_keys, [2048, 70]);
            assert_eq!(made.masks.words.len(), lines);
            assert_eq!(made.masks.heads, (strides[2] != 0).then_some(4));
        }
    }

    /// Chunks at either end that nobody sees are not visited.
    #[test]
    fn hidden_chunks_are_not_visited() {
        let shown: Vec<bool> = (0..4096).map(|key| (1024..2048).contains(&key)).collect();
        let summary = plan(&shown, [0, 0, 0, 1], AttentionOptions::default()).planned().summary;
        assert_eq!((summary.chunks.keys(0), summary.count, summary.longest), (1024..2048, 1, 2100));
        let none = plan(&[false], [0; 4], AttentionOptions::default()).planned().summary;
        assert_eq!(none.count, 0);
    }

    /// An update that fails leaves what there was, and one that does not takes no memory that is there already.
    #[test]
    fn an_update_is_whole_or_nothing() {
        let hidden: Vec<bool> = (0..4096).map(|key| key % 7 != 0).collect();
        let mut made = plan(&hidden, [0, 0, 0, 1], AttentionOptions::default());
        let (before, at) = (format!("{made:?}"), made.masks.words.as_ptr());
        let bits = [0u8; 512];
        let short = BitMask::per_sequence(&bits, &[0, 8], &[2100, 70], 0, [2, 3, 4, 4096]).unwrap();
        let options = AttentionOptions { bit_mask: Some(short), lengths: Some(&[2100, 70]), ..Default::default() };
        let error = made.update(Q, K, &options).unwrap_err();
        assert!(error.message().contains("the 3 queries of 2100 keys of sequence 0"), "{error}");
        assert_eq!(format!("{made:?}"), before);
        made.update(Q, K, &AttentionOptions { lengths: Some(&[5, 6]), ..Default::default() }).unwrap();
        assert!(!made.planned().has_masks && made.masks.words.is_empty());
        let mask = Mask::strided(&hidden, 0, [2, 3, 4, 4096], [0, 0, 0, 1]).unwrap();
        let options = AttentionOptions { mask: Some(mask), lengths: Some(&[2100, 70]), ..Default::default() };
        made.update(Q, K, &options).unwrap();
        assert_eq!((format!("{made:?}"), made.masks.words.as_ptr()), (before, at));
    }
}
