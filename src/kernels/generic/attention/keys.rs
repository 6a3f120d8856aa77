//! Where the keys and values of a block lie: a pointer each, so that no kernel needs to know of layouts.

use super::{BLOCK, Block, PIECE, Problem, Reach, Span, Tile, padded};
use crate::dtype::Element;
use crate::view::RawView;

/// Pieces of a block.
pub(crate) const PIECES: usize = BLOCK / PIECE;

/// The rows of K or V of a block, of the first KV head of a tile; the elements of a row lie together.
pub(crate) struct Located<T> {
    /// A pointer for every key of the span. That of a key which no row of the tile sees is another key's.
    keys: [*const T; BLOCK],
    /// Where the pieces of the next block begin, null for those that are not read.
    next: [*const T; PIECES],
    /// Elements from one key to the next, where they are neighbours.
    seq: isize,
    /// Elements from one KV head to the next.
    head: isize,
}

impl<T> Located<T> {
    pub const fn new() -> Self {
        Self { keys: [std::ptr::null(); BLOCK], next: [std::ptr::null(); PIECES], seq: 0, head: 0 }
    }

    pub fn rows(&self) -> Rows<'_, T> {
        Rows { keys: &self.keys, next: &self.next, seq: self.seq, head: self.head }
    }
}

/// [`Located`], borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    keys: &'a [*const T; BLOCK],
    next: &'a [*const T; PIECES],
    seq: isize,
    head: isize,
}

impl<T> Rows<'_, T> {
    /// The row of a key of the block and of a KV head of the tile.
    #[inline(always)]
    pub fn key(&self, head: usize, key: usize) -> *const T {
        self.keys[key].wrapping_offset(head as isize * self.head)
    }

    /// Bytes from a key of the span to the next, if all its keys lie in steps of the same size.
    #[cfg(target_arch = "x86_64")]
    pub fn stride(&self, span: Span) -> Option<isize> {
        let keys = &self.keys[span.low..span.high];
        let even = keys.windows(2).all(|pair| pair[1] == pair[0].wrapping_offset(self.seq));
        even.then_some(self.seq * size_of::<T>() as isize)
    }

    /// Where a piece of this block, or of the next, begins; null if it is not read.
    #[inline(always)]
    pub fn piece(&self, span: Span, piece: usize) -> *const T {
        if piece >= PIECES {
            return self.next[piece - PIECES];
        }
        let first = (piece * PIECE).max(span.low);
        if first < span.high { self.keys[first] } else { std::ptr::null() }
    }

    /// A row of the next block, if the piece that it belongs to is one run of slots; for prefetches only.
    #[inline(always)]
    pub fn next(&self, key: usize) -> *const T {
        let piece = self.next[key / PIECE];
        if piece.is_null() { piece } else { piece.wrapping_offset((key % PIECE) as isize * self.seq) }
    }
}

/// Memory for keys and values whose elements do not lie together: `[BLOCK][padded(dim)]` of each.
pub(crate) struct Gathered {
    pub k: *mut u8,
    pub v: *mut u8,
}

/// Finds the keys and values of a block, and gathers those whose elements do not lie together.
///
/// `live`: keys of the span that some row of the tile sees, which are those inside the cache.
///
/// # Safety
/// The live keys, and those that `reach` says are read later, are inside K and V; `gathered` has its room, which is needed for a
/// tile of one KV head only.
#[inline(always)]
pub(crate) unsafe fn locate<T: Element>(
    p: &Problem,
    tile: &Tile,
    base: usize,
    span: Span,
    live: u64,
    reach: &Reach,
    gathered: &Gathered,
    (k, v): (&mut Located<T>, &mut Located<T>),
) {
    let views = [&p.k, &p.v];
    for (view, to) in views.into_iter().zip([&mut *k, &mut *v]) {
        (to.seq, to.head) = (view.strides[1] as isize, view.strides[2] as isize);
    }
    let at = |view: &RawView, (row, slot): (usize, usize)| -> *const T {
        // SAFETY: a position that is seen lies inside the view.
        unsafe { view.row(row, slot, tile.kv_head) }.cast_const().cast()
    };
    let mut j = span.low;
    let mut seen = None;
    while j < span.high {
        let rest = live >> j;
        if rest & 1 == 0 {
            // Nothing of it is used but that it can be read.
            let skip = (rest.trailing_zeros() as usize).min(span.high - j);
            if let Some(seen) = seen {
                let (key, value) = (k.keys[seen], v.keys[seen]);
                k.keys[j..j + skip].fill(key);
                v.keys[j..j + skip].fill(value);
            }
            j += skip;
            continue;
        }
        let (place, run) = p.layout.place(&p.k, tile.batch, base + j);
        let n = run.min(span.high - j);
        for (view, to) in views.into_iter().zip([&mut *k, &mut *v]) {
            let mut key = at(view, place);
            for to in &mut to.keys[j..j + n] {
                *to = key;
                key = key.wrapping_offset(view.strides[1] as isize);
            }
        }
        if seen.is_none() {
            let (key, value) = (k.keys[j], v.keys[j]);
            k.keys[span.low..j].fill(key);
            v.keys[span.low..j].fill(value);
            seen = Some(j);
        }
        j += n;
    }
    for piece in 0..PIECES {
        let position = base + BLOCK + piece * PIECE;
        (k.next[piece], v.next[piece]) = match reach.covers(position) {
            true => {
                let place = p.layout.place(&p.k, tile.batch, position).0;
                (at(&p.k, place), at(&p.v, place))
            }
            false => (std::ptr::null(), std::ptr::null()),
        };
    }
    // SAFETY: the caller's.
    unsafe {
        gather(&p.k, span, gathered.k, k);
        gather(&p.v, span, gathered.v, v);
    }
}

/// # Safety
/// As [`locate`].
#[inline(always)]
unsafe fn gather<T: Element>(view: &RawView, span: Span, block: *mut u8, rows: &mut Located<T>) {
    let (dim, step) = (view.shape[3], view.strides[3] as isize);
    if step == 1 || dim == 1 {
        return;
    }
    for j in span.low..span.high {
        let to = block.cast::<T>().wrapping_add(j * padded(dim));
        for i in 0..dim {
            // SAFETY: the caller's.
            unsafe { *to.add(i) = *rows.keys[j].wrapping_offset(i as isize * step) };
        }
        rows.keys[j] = to;
    }
    (rows.seq, rows.head, rows.next) = (padded(dim) as isize, 0, [std::ptr::null(); PIECES]);
}

impl Block<'_> {
    /// The keys of the span, piece by piece: number of the piece in the block, and keys.
    #[inline(always)]
    pub fn pieces(&self) -> impl Iterator<Item = (usize, Span)> + use<> {
        let span = self.span;
        (span.low / PIECE..span.high.div_ceil(PIECE)).map(move |index| {
            (index, Span { low: span.low.max(index * PIECE), high: span.high.min((index + 1) * PIECE) })
        })
    }
}
