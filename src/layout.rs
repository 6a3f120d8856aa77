//! Layouts: in which slot of a cache each token of a row lies.
//!
//! A cache is two views, `[rows, slots, kv_heads, dim]`; what their first two axes mean is the layout's to say. Every
//! operation counts *positions*: token p of a row is the p-th that the row was given, wherever it lies.
//!
//! | layout | the views' first two axes | position p of row b lies in |
//! | --- | --- | --- |
//! | [`Contiguous`](Layout::Contiguous) | rows, capacity | row b, slot p |
//! | [`Ring`](Layout::Ring) | rows, capacity | row b, slot p while `p < sinks`, then `sinks + (p - sinks) % (capacity - sinks)` |
//! | [`Paged`](Layout::Paged) | pages, page size | page `pages[b][p / size]`, slot `p % size` |
//! | [`Indirect`](Layout::Indirect) | rows, capacity | row `rows[b][p]`, slot p |
//! | [`Ragged`](Layout::Ragged) | 1, tokens | row 0, slot `starts[b] + p` |
//!
//! Strides stay the views' own business: pages of `[page, size, heads, dim]` (NHD) and of `[page, heads, size, dim]` (HND)
//! are two sets of strides.
//!
//! Values may be [packed](Packing) in pairs of slots, for kernels that multiply tiles.

use crate::error::{Result, ensure};
use crate::view::{BATCH, MAX_AXIS, RawView, SEQ};

/// Where in a cache the tokens of its rows lie; see the [table](self).
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum Layout<'a> {
    /// Every row is one run of slots.
    #[default]
    Contiguous,
    /// Every row keeps the newest tokens only: `capacity - sinks` of them, and for ever its first `sinks`.
    Ring {
        /// How many of the first tokens are never overwritten; less than the capacity.
        sinks: usize,
    },
    /// Rows are made of pages of a common pool; several rows may share a page that none of them writes.
    Paged {
        /// `[batch, pages_per_row]`: the page of every `page size` tokens. Entries beyond a row's length are not looked at.
        pages: &'a [i32],
        /// Entries a row has.
        pages_per_row: usize,
    },
    /// Beam search without copies: every token says in which row it was written.
    Indirect {
        /// `[batch, positions]`: the cache row of every token; as many a row as the cache has slots.
        rows: &'a [i32],
    },
    /// Rows lie one after the other, each as long as it is.
    Ragged {
        /// `[batch + 1]`: where every row starts, and where the last one ends, ascending (`cu_seqlens`).
        starts: &'a [i32],
    },
}

/// How the values of neighbouring slots lie in a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Packing {
    /// Every slot by itself: `[rows, slots, kv_heads, dim]`.
    #[default]
    Rows = 0,
    /// Two slots interleaved, which is how tiles of 16-bit numbers take their second factor: `[rows, slots / 2, kv_heads,
    /// 2 * dim]`, in which element `2d + i` of pair s is element d of slot `2s + i`. Slots a row (or a page) has, sinks of a
    /// ring and starts of ragged rows are even.
    RowPairs = 1,
}

impl Packing {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Rows, Self::RowPairs];

    /// The packing with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&p| p as u32 == value)
    }
}

/// A token's place: index on the first axis of the views, index on the second.
pub(crate) type Place = (usize, usize);

impl Layout<'_> {
    /// Where a position lies, and how many positions from there on lie in slots one after the other. For a valid layout and
    /// a position in it.
    #[inline(always)]
    pub(crate) fn place(&self, cache: &RawView, row: usize, position: usize) -> (Place, usize) {
        let slots = cache.shape[SEQ];
        match *self {
            Self::Contiguous => ((row, position), slots - position),
            Self::Ring { sinks } => {
                if position < sinks {
                    return ((row, position), sinks - position);
                }
                let slot = sinks + divide(position - sinks, slots - sinks).1;
                ((row, slot), slots - slot)
            }
            Self::Paged { pages, pages_per_row } => {
                let (page, slot) = divide(position, slots);
                ((pages[row * pages_per_row + page] as usize, slot), slots - slot)
            }
            Self::Indirect { rows } => {
                let rows = &rows[row * slots + position..(row + 1) * slots];
                let run = rows.iter().take(RUN).take_while(|&&r| r == rows[0]).count();
                ((rows[0] as usize, position), run)
            }
            Self::Ragged { starts } => {
                let first = starts[row] as usize;
                ((0, first + position), starts[row + 1] as usize - first - position)
            }
        }
    }

    /// How many tokens a row can be given, for ever: of a ring as many as positions can count.
    pub(crate) fn capacity(&self, cache: &RawView, row: usize) -> usize {
        let slots = cache.shape[SEQ];
        match *self {
            Self::Contiguous | Self::Indirect { .. } => slots,
            Self::Ring { .. } => MAX_AXIS,
            Self::Paged { pages_per_row, .. } => pages_per_row.saturating_mul(slots).min(MAX_AXIS),
            Self::Ragged { starts } => (starts[row + 1] - starts[row]) as usize,
        }
    }

    /// The positions that a row of `length` tokens still holds, beside the sinks of a ring: from here on. 0 if it holds all.
    pub(crate) fn retained_from(&self, cache: &RawView, length: usize) -> usize {
        match *self {
            Self::Ring { sinks } if length > cache.shape[SEQ] => length - (cache.shape[SEQ] - sinks),
            _ => 0,
        }
    }

    /// The most keys that attention over a row may see.
    pub(crate) fn most_keys(&self, cache: &RawView) -> usize {
        match self {
            Self::Paged { .. } => self.capacity(cache, 0),
            _ => cache.shape[SEQ],
        }
    }

    /// How many rows a cache of this layout has.
    pub(crate) fn rows(&self, cache: &RawView) -> usize {
        match *self {
            Self::Contiguous | Self::Ring { .. } => cache.shape[BATCH],
            Self::Paged { pages, pages_per_row } => pages.len().checked_div(pages_per_row).unwrap_or(0),
            Self::Indirect { rows } => rows.len().checked_div(cache.shape[SEQ]).unwrap_or(cache.shape[BATCH]),
            Self::Ragged { starts } => starts.len().saturating_sub(1),
        }
    }

    /// Checks everything but table entries: `name` is the cache's.
    pub(crate) fn validate(&self, name: &str, cache: &RawView) -> Result<()> {
        let [rows, slots, ..] = cache.shape;
        match *self {
            Self::Contiguous => {}
            Self::Ring { sinks } => {
                ensure!(sinks < slots, Capacity, "a ring keeps {sinks} sinks, but {name} has {slots} slots a row");
            }
            Self::Paged { pages, pages_per_row } => {
                let n = pages.len();
                ensure!(
                    pages_per_row > 0 && n.is_multiple_of(pages_per_row),
                    Shape,
                    "pages has {n} entries, which are no rows of {pages_per_row}"
                );
                ensure!(slots > 0, Shape, "{name} has pages of no slots");
            }
            Self::Indirect { rows } => {
                let n = rows.len();
                ensure!(
                    slots == 0 && n == 0 || slots > 0 && n.is_multiple_of(slots),
                    Shape,
                    "rows has {n} entries, which are no rows of {slots}"
                );
            }
            Self::Ragged { starts } => {
                ensure!(rows == 1, Shape, "{name} has batch = {rows}, but ragged rows lie in a batch of one");
                ensure!(!starts.is_empty(), Shape, "starts is empty, but has an entry more than there are rows");
                ensure!(starts[0] >= 0, OutOfRange, "starts[0] is {}, which is negative", starts[0]);
                for (row, pair) in starts.windows(2).enumerate() {
                    ensure!(
                        pair[0] <= pair[1],
                        OutOfRange,
                        "starts[{}] is {}, but starts[{row}] is {}",
                        row + 1,
                        pair[1],
                        pair[0]
                    );
                }
                let end = starts[starts.len() - 1];
                ensure!(end as usize <= slots, OutOfRange, "starts ends at {end}, but {name} has seq = {slots}");
            }
        }
        Ok(())
    }

    /// Checks that no pair of slots belongs to two rows, or half of it to none: `name` is the cache of the keys, whose slots
    /// are not packed.
    pub(crate) fn validate_packing(&self, name: &str, cache: &RawView, packing: Packing) -> Result<()> {
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
            Self::Ring { sinks } => {
                ensure!(
                    sinks.is_multiple_of(2),
                    InvalidValue,
                    "a ring keeps {sinks} sinks, which is odd, but values are packed in pairs of 2"
                );
            }
            Self::Ragged { starts } => {
                // The last entry is where nothing starts any more.
                for (row, start) in starts.iter().enumerate().take(starts.len().saturating_sub(1)) {
                    ensure!(
                        start % 2 == 0,
                        InvalidValue,
                        "starts[{row}] is {start}, which is odd, but values are packed in pairs of 2"
                    );
                }
            }
            Self::Contiguous | Self::Paged { .. } | Self::Indirect { .. } => {}
        }
        Ok(())
    }

    /// Checks that positions `from..to` of a row, which are within its capacity, lie inside the cache.
    pub(crate) fn validate_row(&self, name: &str, cache: &RawView, row: usize, from: usize, to: usize) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let (table, entries, first) = match *self {
            Self::Paged { pages, pages_per_row } => {
                let slots = cache.shape[SEQ];
                let (first, end) = (from / slots, to.div_ceil(slots));
                ("pages", &pages[row * pages_per_row + first..row * pages_per_row + end], first)
            }
            Self::Indirect { rows } => {
                let slots = cache.shape[SEQ];
                ("rows", &rows[row * slots + from..row * slots + to], from)
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

/// Quotient and remainder of positions, which have 31 bits: that takes a third of the time of 64.
#[inline(always)]
fn divide(a: usize, b: usize) -> (usize, usize) {
    let (a, b) = (a as u32, b as u32);
    ((a / b) as usize, (a % b) as usize)
}

/// How far [`Layout::place`] looks ahead in a table that has an entry a token: what attention takes at once.
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
        let ring = Layout::Ring { sinks: 2 };
        assert_eq!(ring.place(&view, 1, 1), ((1, 1), 1));
        assert_eq!(ring.place(&view, 1, 7), ((1, 7), 1));
        assert_eq!(ring.place(&view, 1, 8), ((1, 2), 6));
        assert_eq!(ring.place(&view, 1, 15), ((1, 3), 5));
        assert_eq!((ring.retained_from(&view, 5), ring.retained_from(&view, 20)), (0, 14));
        let paged = Layout::Paged { pages: &[2, 0, 1, -1], pages_per_row: 2 };
        assert_eq!(paged.place(&view, 0, 9), ((0, 1), 7));
        assert_eq!((paged.rows(&view), paged.capacity(&view, 0)), (2, 16));
        let indirect = Layout::Indirect { rows: &[0, 0, 1, 1, 1, 2, 2, 2] };
        assert_eq!(indirect.place(&view, 0, 2), ((1, 2), 3));
        let ragged = Layout::Ragged { starts: &[1, 4, 4, 8] };
        assert_eq!(ragged.place(&cache(1, 8), 2, 1), ((0, 5), 3));
        assert_eq!(ragged.capacity(&cache(1, 8), 1), 0);
    }

    #[test]
    fn what_lies_outside_is_refused() {
        let view = cache(3, 8);
        assert!(Layout::Ring { sinks: 8 }.validate("k", &view).is_err());
        assert!(Layout::Paged { pages: &[0, 1, 2], pages_per_row: 2 }.validate("k", &view).is_err());
        let paged = Layout::Paged { pages: &[2, 3], pages_per_row: 2 };
        paged.validate("k", &view).unwrap();
        paged.validate_row("k", &view, 0, 0, 8).unwrap();
        let error = paged.validate_row("k", &view, 0, 0, 9).unwrap_err();
        assert_eq!(error.to_string(), "out of range: pages[0, 1] is 3, but k has batch = 3");
        assert!(Layout::Indirect { rows: &[0; 9] }.validate("k", &view).is_err());
        assert!(Layout::Ragged { starts: &[0, 9] }.validate("k", &cache(1, 8)).is_err());
        assert!(Layout::Ragged { starts: &[3, 2] }.validate("k", &cache(1, 8)).is_err());
        assert!(Layout::Ragged { starts: &[0, 2] }.validate("k", &view).is_err());
    }

    #[test]
    fn pairs_belong_to_one_row() {
        let pairs = |layout: Layout, slots| layout.validate_packing("k", &cache(1, slots), Packing::RowPairs).is_ok();
        assert!(pairs(Layout::Contiguous, 8) && !pairs(Layout::Contiguous, 7));
        assert!(pairs(Layout::Ring { sinks: 2 }, 8) && !pairs(Layout::Ring { sinks: 3 }, 8));
        assert!(pairs(Layout::Ragged { starts: &[0, 4, 7] }, 8) && !pairs(Layout::Ragged { starts: &[0, 3, 6] }, 8));
        let rows = Layout::Ring { sinks: 3 }.validate_packing("k", &cache(1, 7), Packing::Rows);
        assert!(rows.is_ok());
    }
}
