//! Where in a cache the tokens of a sequence lie.

use crate::error::{Result, ensure};
use crate::view::{BATCH, MAX_AXIS, RawView, SEQ, Units};

/// In which slot of a cache each token of a sequence lies.
///
/// A cache is two views, one of keys and one of values, `[batch, slots, kv_heads, dim]`. The layout says what their first two axes
/// mean. Every operation counts *positions*: position p of a sequence is its token number p, wherever that token lies. The bits of
/// an output do not depend on the layout.
///
/// | layout | first two axes of the views | slot of position p of sequence b |
/// | --- | --- | --- |
/// | [`Contiguous`](Self::Contiguous) | sequences, capacity | `[b, p]` |
/// | [`Ring`](Self::Ring) | sequences, capacity | `[b, p]` while `p < sink_tokens`, then `[b, sink_tokens + (p - sink_tokens) % (capacity - sink_tokens)]` |
/// | [`Paged`](Self::Paged) | pages, page size | `[page_table[b][p / size], p % size]` |
/// | [`Indirect`](Self::Indirect) | sequences, capacity | `[beam_table[b][p], p]` |
/// | [`Ragged`](Self::Ragged) | 1, tokens | `[0, cu_seqlens[b] + p]` |
///
/// Strides belong to the views: pages `[page, size, heads, dim]` (NHD) and `[page, heads, size, dim]` (HND) differ in their strides
/// only. Values may be [packed](Packing) in pairs of slots, for kernels that multiply tiles.
///
/// Tables are `i32` lists that the caller keeps; a call reads them and never writes them.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum Layout<'a> {
    /// Every sequence is one run of slots.
    #[default]
    Contiguous,
    /// Every sequence keeps its first `sink_tokens` tokens and, in the remaining `capacity - sink_tokens` slots, its newest ones.
    #[non_exhaustive]
    Ring {
        /// How many of the first tokens are never overwritten; less than the capacity.
        sink_tokens: usize,
    },
    /// Sequences are made of pages of a common pool. Sequences may share a page that none of them writes.
    #[non_exhaustive]
    Paged {
        /// `[batch, pages_per_sequence]`: the page that holds each `page size` tokens. Entries beyond the length of a sequence are
        /// not read.
        page_table: &'a [i32],
        /// Entries of the table per sequence.
        pages_per_sequence: usize,
    },
    /// Beam search without copies: for every token, a table names the sequence it was written to.
    #[non_exhaustive]
    Indirect {
        /// `[batch, capacity]`: the index on the first axis of the cache of every token. Entries beyond the length of a sequence are
        /// not read.
        beam_table: &'a [i32],
    },
    /// Sequences of different lengths lie one after the other.
    #[non_exhaustive]
    Ragged {
        /// `[batch + 1]`, ascending: the first slot of every sequence, and the end of the last one.
        cu_seqlens: &'a [i32],
    },
}

impl<'a> Layout<'a> {
    /// [`Layout::Ring`].
    pub fn ring(sink_tokens: usize) -> Self {
        Self::Ring { sink_tokens }
    }

    /// [`Layout::Paged`].
    pub fn paged(page_table: &'a [i32], pages_per_sequence: usize) -> Self {
        Self::Paged { page_table, pages_per_sequence }
    }

    /// [`Layout::Indirect`].
    pub fn indirect(beam_table: &'a [i32]) -> Self {
        Self::Indirect { beam_table }
    }

    /// [`Layout::Ragged`].
    pub fn ragged(cu_seqlens: &'a [i32]) -> Self {
        Self::Ragged { cu_seqlens }
    }
}

/// The arrangement of the values of neighbouring slots in a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Packing {
    /// Every slot by itself: `[batch, slots, kv_heads, dim]`.
    #[default]
    Rows = 0,
    /// Two slots interleaved, as instructions that multiply tiles of 16-bit numbers read them: `[batch, slots / 2, kv_heads,
    /// 2 * dim]`, in which element `2d + i` of pair s is element d of slot `2s + i`. The slots of a sequence (or of a page), the sink
    /// tokens of a ring and the first slots of ragged sequences are even. Only for plain elements: quantised values are never packed.
    RowPairs = 1,
}

impl Packing {
    /// All packings.
    pub const ALL: [Self; 2] = [Self::Rows, Self::RowPairs];

    /// The packing with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&p| p as u32 == value)
    }
}

/// A token's place: index on the first axis of the views, index on the second.
pub(crate) type Place = (usize, usize);

impl Layout<'_> {
    /// The slot of a position, and the number of positions from it on that lie in consecutive slots. The layout is
    /// valid and contains the position.
    #[inline(always)]
    pub(crate) fn place<U: Units>(&self, cache: &RawView<U>, row: usize, position: usize) -> (Place, usize) {
        let slots = cache.shape[SEQ];
        match *self {
            Self::Contiguous => ((row, position), slots - position),
            Self::Ring { sink_tokens } => {
                if position < sink_tokens {
                    return ((row, position), sink_tokens - position);
                }
                let slot = sink_tokens + divide(position - sink_tokens, slots - sink_tokens).1;
                ((row, slot), slots - slot)
            }
            Self::Paged { page_table, pages_per_sequence } => {
                let (page, slot) = divide(position, slots);
                ((page_table[row * pages_per_sequence + page] as usize, slot), slots - slot)
            }
            Self::Indirect { beam_table } => {
                let entries = &beam_table[row * slots + position..(row + 1) * slots];
                let run = entries.iter().take(RUN).take_while(|&&entry| entry == entries[0]).count();
                ((entries[0] as usize, position), run)
            }
            Self::Ragged { cu_seqlens } => {
                let first = cu_seqlens[row] as usize;
                ((0, first + position), cu_seqlens[row + 1] as usize - first - position)
            }
        }
    }

    /// The number of tokens that a sequence can have; for a ring, the largest position.
    pub(crate) fn capacity<U: Units>(&self, cache: &RawView<U>, row: usize) -> usize {
        let slots = cache.shape[SEQ];
        match *self {
            Self::Contiguous | Self::Indirect { .. } => slots,
            Self::Ring { .. } => MAX_AXIS,
            Self::Paged { pages_per_sequence, .. } => pages_per_sequence.saturating_mul(slots).min(MAX_AXIS),
            Self::Ragged { cu_seqlens } => (cu_seqlens[row + 1] - cu_seqlens[row]) as usize,
        }
    }

    /// The first position that a sequence of `length` tokens still holds, apart from the sink tokens of a ring; 0 if
    /// it holds all.
    pub(crate) fn retained_from<U: Units>(&self, cache: &RawView<U>, length: usize) -> usize {
        match *self {
            Self::Ring { sink_tokens } if length > cache.shape[SEQ] => length - (cache.shape[SEQ] - sink_tokens),
            _ => 0,
        }
    }

    /// The largest number of keys that attention over a sequence can see.
    pub(crate) fn most_keys<U: Units>(&self, cache: &RawView<U>) -> usize {
        match self {
            Self::Paged { .. } => self.capacity(cache, 0),
            _ => cache.shape[SEQ],
        }
    }

    /// The number of sequences in a cache of this layout. A page table without columns (no sequence has a page yet) fits any
    /// number: `None`.
    pub(crate) fn rows<U: Units>(&self, cache: &RawView<U>) -> Option<usize> {
        Some(match *self {
            Self::Contiguous | Self::Ring { .. } => cache.shape[BATCH],
            Self::Paged { page_table, pages_per_sequence } => return page_table.len().checked_div(pages_per_sequence),
            Self::Indirect { beam_table } => {
                beam_table.len().checked_div(cache.shape[SEQ]).unwrap_or(cache.shape[BATCH])
            }
            Self::Ragged { cu_seqlens } => cu_seqlens.len().saturating_sub(1),
        })
    }

    /// Checks everything except table entries; `name` is the name of the cache.
    pub(crate) fn validate<U: Units>(&self, name: &str, cache: &RawView<U>) -> Result<()> {
        let [rows, slots, ..] = cache.shape;
        match *self {
            Self::Contiguous => {}
            Self::Ring { sink_tokens } => {
                ensure!(
                    sink_tokens < slots,
                    Capacity,
                    "a ring keeps {sink_tokens} sink tokens, but {name} has {slots} slots per sequence"
                );
            }
            Self::Paged { page_table, pages_per_sequence } => {
                let n = page_table.len();
                ensure!(
                    // Of 0, 0 alone is a multiple.
                    n.is_multiple_of(pages_per_sequence),
                    Shape,
                    "page_table has {n} entries, which is no multiple of pages_per_sequence = {pages_per_sequence}"
                );
                ensure!(slots > 0, Shape, "{name} has seq = 0, but pages need slots");
            }
            Self::Indirect { beam_table } => {
                let n = beam_table.len();
                ensure!(
                    slots == 0 && n == 0 || slots > 0 && n.is_multiple_of(slots),
                    Shape,
                    "beam_table has {n} entries, which is no multiple of the {slots} slots of {name}"
                );
            }
            Self::Ragged { cu_seqlens } => {
                ensure!(rows == 1, Shape, "{name} has batch = {rows}, but ragged sequences lie in a batch of one");
                ensure!(
                    !cu_seqlens.is_empty(),
                    Shape,
                    "cu_seqlens is empty, but needs one entry more than there are sequences"
                );
                ensure!(cu_seqlens[0] >= 0, OutOfRange, "cu_seqlens[0] is {}, which is negative", cu_seqlens[0]);
                for (row, pair) in cu_seqlens.windows(2).enumerate() {
                    ensure!(
                        pair[0] <= pair[1],
                        OutOfRange,
                        "cu_seqlens[{}] is {}, but cu_seqlens[{row}] is {}",
                        row + 1,
                        pair[1],
                        pair[0]
                    );
                }
                let end = cu_seqlens[cu_seqlens.len() - 1];
                ensure!(end as usize <= slots, OutOfRange, "cu_seqlens ends at {end}, but {name} has seq = {slots}");
            }
        }
        Ok(())
    }

    /// Checks that every pair of slots belongs to one sequence; `name` is the name of the cache of keys, whose slots
    /// are not packed.
    pub(crate) fn validate_packing<U: Units>(&self, name: &str, cache: &RawView<U>, packing: Packing) -> Result<()> {
        if packing == Packing::Rows {
            return Ok(());
        }
        let slots = cache.shape[SEQ];
        ensure!(
            slots.is_multiple_of(2),
            Shape,
            "{name} has seq = {slots}, which is odd, but values are packed in pairs of 2"
        );
        match *self {
            Self::Ring { sink_tokens } => {
                ensure!(
                    sink_tokens.is_multiple_of(2),
                    InvalidValue,
                    "a ring keeps {sink_tokens} sink tokens, which is odd, but values are packed in pairs of 2"
                );
            }
            Self::Ragged { cu_seqlens } => {
                // The last entry is the end of the last sequence.
                for (row, start) in cu_seqlens.iter().enumerate().take(cu_seqlens.len().saturating_sub(1)) {
                    ensure!(
                        start % 2 == 0,
                        InvalidValue,
                        "cu_seqlens[{row}] is {start}, which is odd, but values are packed in pairs of 2"
                    );
                }
            }
            Self::Contiguous | Self::Paged { .. } | Self::Indirect { .. } => {}
        }
        Ok(())
    }

    /// Whether a table says where tokens lie.
    pub(crate) fn has_table(&self) -> bool {
        matches!(self, Self::Paged { .. } | Self::Indirect { .. })
    }

    /// Checks that positions `from..to` of a sequence, which are within its capacity, lie inside the cache.
    pub(crate) fn validate_row<U: Units>(
        &self,
        name: &str,
        cache: &RawView<U>,
        row: usize,
        from: usize,
        to: usize,
    ) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let (table, entries, first) = match *self {
            Self::Paged { page_table, pages_per_sequence } => {
                let slots = cache.shape[SEQ];
                let (first, end) = (from / slots, to.div_ceil(slots));
                ("page_table", &page_table[row * pages_per_sequence + first..row * pages_per_sequence + end], first)
            }
            Self::Indirect { beam_table } => {
                let slots = cache.shape[SEQ];
                ("beam_table", &beam_table[row * slots + from..row * slots + to], from)
            }
            _ => return Ok(()),
        };
        let n = cache.shape[BATCH];
        for (i, &entry) in entries.iter().enumerate() {
            ensure!(
                entry >= 0 && (entry as usize) < n,
                OutOfRange,
                "{table}[{row}, {}] is {entry}, but {name} has batch = {n}",
                first + i
            );
        }
        Ok(())
    }
}

/// Quotient and remainder of positions, which have 31 bits; a 32-bit division takes a third of the time of a 64-bit
/// one.
#[inline(always)]
fn divide(a: usize, b: usize) -> (usize, usize) {
    let (a, b) = (a as u32, b as u32);
    ((a / b) as usize, (a % b) as usize)
}

/// How many entries of a table [`Layout::place`] compares for a run: the number of keys that attention takes at a
/// time.
const RUN: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    fn cache(rows: usize, slots: usize) -> RawView {
        let shape = [rows, slots, 1, 1];
        let strides = crate::view::contiguous(shape);
        RawView { data: std::ptr::null_mut(), dtype: DType::F32, shape, strides, bytes: None }
    }

    #[test]
    fn places() {
        let view = cache(3, 8);
        assert_eq!(Layout::Contiguous.place(&view, 2, 5), ((2, 5), 3));
        let ring = Layout::Ring { sink_tokens: 2 };
        assert_eq!(ring.place(&view, 1, 1), ((1, 1), 1));
        assert_eq!(ring.place(&view, 1, 7), ((1, 7), 1));
        assert_eq!(ring.place(&view, 1, 8), ((1, 2), 6));
        assert_eq!(ring.place(&view, 1, 15), ((1, 3), 5));
        assert_eq!((ring.retained_from(&view, 5), ring.retained_from(&view, 20)), (0, 14));
        let paged = Layout::Paged { page_table: &[2, 0, 1, -1], pages_per_sequence: 2 };
        assert_eq!(paged.place(&view, 0, 9), ((0, 1), 7));
        assert_eq!((paged.rows(&view), paged.capacity(&view, 0)), (Some(2), 16));
        let none = Layout::Paged { page_table: &[], pages_per_sequence: 0 };
        assert_eq!((none.rows(&view), none.capacity(&view, 7)), (None, 0));
        let indirect = Layout::Indirect { beam_table: &[0, 0, 1, 1, 1, 2, 2, 2] };
        assert_eq!(indirect.place(&view, 0, 2), ((1, 2), 3));
        let ragged = Layout::Ragged { cu_seqlens: &[1, 4, 4, 8] };
        assert_eq!(ragged.place(&cache(1, 8), 2, 1), ((0, 5), 3));
        assert_eq!(ragged.capacity(&cache(1, 8), 1), 0);
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let view = cache(3, 8);
        assert!(Layout::Ring { sink_tokens: 8 }.validate("k", &view).is_err());
        assert!(Layout::Paged { page_table: &[0, 1, 2], pages_per_sequence: 2 }.validate("k", &view).is_err());
        let paged = Layout::Paged { page_table: &[2, 3], pages_per_sequence: 2 };
        paged.validate("k", &view).unwrap();
        paged.validate_row("k", &view, 0, 0, 8).unwrap();
        let error = paged.validate_row("k", &view, 0, 0, 9).unwrap_err();
        assert_eq!(error.to_string(), "out of range: page_table[0, 1] is 3, but k has batch = 3");
        assert!(Layout::Indirect { beam_table: &[0; 9] }.validate("k", &view).is_err());
        assert!(Layout::Ragged { cu_seqlens: &[0, 9] }.validate("k", &cache(1, 8)).is_err());
        assert!(Layout::Ragged { cu_seqlens: &[3, 2] }.validate("k", &cache(1, 8)).is_err());
        assert!(Layout::Ragged { cu_seqlens: &[0, 2] }.validate("k", &view).is_err());
    }

    #[test]
    fn pairs_belong_to_one_row() {
        let pairs = |layout: Layout, slots| layout.validate_packing("k", &cache(1, slots), Packing::RowPairs).is_ok();
        assert!(pairs(Layout::Contiguous, 8) && !pairs(Layout::Contiguous, 7));
        assert!(pairs(Layout::Ring { sink_tokens: 2 }, 8) && !pairs(Layout::Ring { sink_tokens: 3 }, 8));
        assert!(
            pairs(Layout::Ragged { cu_seqlens: &[0, 4, 7] }, 8) && !pairs(Layout::Ragged { cu_seqlens: &[0, 3, 6] }, 8)
        );
        let rows = Layout::Ring { sink_tokens: 3 }.validate_packing("k", &cache(1, 7), Packing::Rows);
        assert!(rows.is_ok());
    }
}
