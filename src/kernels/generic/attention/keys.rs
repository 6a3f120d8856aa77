//! Where the keys and values of a block lie: a pointer each, so that no kernel needs to know of layouts.

use super::{BLOCK, Block, PIECE, Problem, Reach, Span, Tile, padded};
use crate::dtype::Element;
use crate::kernels::generic::copy;
use crate::layout::{Packing, Place};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Pieces of a block.
pub(crate) const PIECES: usize = BLOCK / PIECE;

/// The rows of K or V of a block, of the first KV head of a tile; the elements of a row lie together.
pub(crate) struct Located<'a, T> {
    /// A pointer for every key of the span, nothing for others. That of a key which no row of the tile sees is another key's.
    keys: &'a mut Pointers<T>,
    /// Where the pieces of the next block begin, null for those that are not read.
    next: [*const T; PIECES],
    /// Elements from one key to the next, where they are neighbours.
    seq: isize,
    /// Elements from one KV head to the next.
    head: isize,
}

/// Memory for the pointers of [`Located`].
pub(crate) type Pointers<T> = [MaybeUninit<*const T>; BLOCK];

impl<'a, T> Located<'a, T> {
    #[inline(always)]
    pub fn new(keys: &'a mut Pointers<T>) -> Self {
        Self { keys, next: [std::ptr::null(); PIECES], seq: 0, head: 0 }
    }

    /// To be used for keys of the span alone.
    #[inline(always)]
    pub fn rows(&self) -> Rows<'_, T> {
        Rows {
            keys: self.keys.as_ptr().cast(),
            next: &self.next,
            seq: self.seq,
            head: self.head,
            lifetime: PhantomData,
        }
    }

    /// Keys `keys` lie in steps from `first` on.
    #[inline(always)]
    fn run(&mut self, keys: Range<usize>, first: *const T) {
        for (i, to) in self.keys[keys].iter_mut().enumerate() {
            to.write(first.wrapping_offset(i as isize * self.seq));
        }
    }

    /// The keys of a span are in rows of a block now, `width` elements apart, and nothing comes after them.
    #[inline(always)]
    pub fn place(&mut self, span: Span, block: *const T, width: usize) {
        (self.seq, self.head, self.next) = (width as isize, 0, [std::ptr::null(); PIECES]);
        self.run(span.low..span.high, block.wrapping_add(span.low * width));
    }

    /// Keys `keys` get the pointer of another.
    fn fill(&mut self, keys: Range<usize>, other: usize) {
        let other = self.keys[other];
        self.keys[keys].fill(other);
    }
}

/// [`Located`], borrowed.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    keys: *const *const T,
    next: &'a [*const T; PIECES],
    seq: isize,
    head: isize,
    lifetime: PhantomData<&'a Pointers<T>>,
}

impl<T> Rows<'_, T> {
    /// The row of a key of the block and of a KV head of the tile.
    #[inline(always)]
    pub fn key(&self, head: usize, key: usize) -> *const T {
        debug_assert!(key < BLOCK);
        // SAFETY: callers stay inside the span, whose pointers have been written.
        unsafe { *self.keys.add(key) }.wrapping_offset(self.head_offset(head))
    }

    /// From a key of the tile's first KV head to that of another, in elements.
    #[inline(always)]
    pub fn head_offset(&self, head: usize) -> isize {
        head as isize * self.head
    }

    /// Bytes from a key of the span to the next, if all its keys lie in steps of the same size.
    #[cfg(target_arch = "x86_64")]
    pub fn stride(&self, span: Span) -> Option<isize> {
        let even = (span.low + 1..span.high).all(|j| self.key(0, j) == self.key(0, j - 1).wrapping_offset(self.seq));
        even.then_some(self.seq * size_of::<T>() as isize)
    }

    /// Where a piece of this block, or of the next, begins; null if it is not read.
    #[inline(always)]
    pub fn piece(&self, span: Span, piece: usize) -> *const T {
        if piece >= PIECES {
            return self.next[piece - PIECES];
        }
        let first = (piece * PIECE).max(span.low);
        if first < span.high { self.key(0, first) } else { std::ptr::null() }
    }

    /// The pair of slots in the next block that a key of this one is answered by, where values are packed; for prefetches only.
    #[inline(always)]
    pub fn next_pair(&self, key: usize) -> *const T {
        let piece = self.next[key / PIECE];
        if piece.is_null() { piece } else { piece.wrapping_offset(((key % PIECE / 2) as isize).wrapping_mul(self.seq)) }
    }

    /// A row of the next block, if the piece that it belongs to is one run of slots; for prefetches only.
    #[inline(always)]
    pub fn next(&self, key: usize) -> *const T {
        let piece = self.next[key / PIECE];
        if piece.is_null() { piece } else { piece.wrapping_offset(((key % PIECE) as isize).wrapping_mul(self.seq)) }
    }
}

/// Memory for keys and values whose elements do not lie together: `[BLOCK][padded(dim)]` of each.
pub(crate) struct Gathered {
    pub k: *mut u8,
    pub v: *mut u8,
}

/// The keys of a block that are wanted.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub p: &'a Problem<'a>,
    pub tile: &'a Tile,
    /// The block's first key.
    pub base: usize,
    pub span: Span,
    /// Keys of the span that some row of the tile sees, which are those inside the cache.
    pub live: u64,
    /// What is read later.
    pub reach: &'a Reach,
}

/// Finds the keys and values of a block, and gathers those whose elements do not lie together, but for values that are packed in
/// pairs: those are for [`part`](super::part), or for a kernel that takes them as they lie.
///
/// # Safety
/// The live keys, and those that `reach` says are read later, are inside K and V; `gathered` has its room, which is needed for a
/// tile of one KV head only.
#[inline(always)]
pub(crate) unsafe fn locate<'a, T: Element>(
    wanted: &Wanted,
    gathered: &Gathered,
    (k, v): (&mut Located<'a, T>, &mut Located<'a, T>),
) {
    let Wanted { p, tile, base, span, live, .. } = *wanted;
    let views = [&p.k, &p.v];
    for (view, to) in views.into_iter().zip([&mut *k, &mut *v]) {
        (to.seq, to.head) = (view.strides[1] as isize, view.strides[2] as isize);
    }
    if live == span.bits() {
        // The usual case: all in one run, and the next block too.
        let (place, run) = p.spans.place(tile.batch, base + span.low);
        if run >= 2 * BLOCK - span.low {
            let key = wanted.at::<T>(place).0;
            k.run(span.low..span.high, key);
            wanted.values(v, span.low..span.high, place);
            for piece in 0..PIECES {
                let ahead = BLOCK + piece * PIECE - span.low;
                k.next[piece] = key.wrapping_offset(ahead as isize * k.seq);
                v.next[piece] = wanted.at((place.0, place.1 + ahead)).1;
            }
        } else {
            // SAFETY: the caller's.
            unsafe { scattered(wanted, (&mut *k, &mut *v)) };
        }
    } else {
        // SAFETY: the caller's.
        unsafe { scattered(wanted, (&mut *k, &mut *v)) };
    }
    // SAFETY: the caller's.
    unsafe {
        gather(p.k.shape[3], p.k.strides[3] as isize, span, gathered.k, k);
        if p.v_packing == Packing::Rows {
            gather(p.v_dim, p.value_step(), span, gathered.v, v);
        }
    }
}

/// [`locate`] where slots are not in one run, or not all keys are live.
///
/// # Safety
/// As [`locate`].
#[inline(never)]
unsafe fn scattered<T: Element>(wanted: &Wanted, (k, v): (&mut Located<'_, T>, &mut Located<'_, T>)) {
    let Wanted { p, tile, base, span, live, reach } = *wanted;
    let mut j = span.low;
    let mut seen = None;
    while j < span.high {
        let rest = live >> j;
        if rest & 1 == 0 {
            // Nothing of it is used but that it can be read.
            let end = (j + rest.trailing_zeros() as usize).min(span.high);
            if let Some(seen) = seen {
                k.fill(j..end, seen);
                v.fill(j..end, seen);
            }
            j = end;
            continue;
        }
        let (place, run) = p.spans.place(tile.batch, base + j);
        let end = (j + run).min(span.high);
        k.run(j..end, wanted.at(place).0);
        wanted.values(v, j..end, place);
        if seen.is_none() {
            k.fill(span.low..j, j);
            v.fill(span.low..j, j);
            seen = Some(j);
        }
        j = end;
    }
    for piece in 0..PIECES {
        let position = base + BLOCK + piece * PIECE;
        if reach.covers(position) {
            (k.next[piece], v.next[piece]) = wanted.at(p.spans.place(tile.batch, position).0);
        }
    }
}

/// # Safety
/// As [`locate`].
#[inline(always)]
unsafe fn gather<T: Element>(dim: usize, step: isize, span: Span, block: *mut u8, rows: &mut Located<T>) {
    if step == 1 || dim == 1 {
        return;
    }
    let block = block.cast::<T>();
    for j in span.low..span.high {
        // SAFETY: the caller's: a row of the cache has dim elements in such steps, one of the block padded(dim).
        unsafe { copy::gather(rows.keys[j].assume_init(), step, block.add(j * padded(dim)), dim) };
    }
    rows.place(span, block, padded(dim));
}

impl Wanted<'_> {
    /// The values of keys that lie in slots one after the other, from `place` on.
    #[inline(always)]
    fn values<T>(&self, v: &mut Located<T>, keys: Range<usize>, place: Place) {
        match self.p.v_packing {
            Packing::Rows => v.run(keys, self.at(place).1),
            Packing::RowPairs => {
                let (row, slot) = place;
                let (pair, odd) = (self.at::<T>((row, slot / 2 * 2)).1, slot % 2);
                let half = self.p.v.strides[3] as isize;
                for (i, to) in v.keys[keys].iter_mut().enumerate() {
                    let (pairs, second) = ((odd + i) / 2, (odd + i) % 2);
                    to.write(pair.wrapping_offset(pairs as isize * v.seq + second as isize * half));
                }
            }
        }
    }

    /// The key and the value at a place.
    #[inline(always)]
    fn at<T>(&self, (row, slot): Place) -> (*const T, *const T) {
        // SAFETY: a position that is seen lies inside the cache.
        unsafe {
            let key = self.p.k.row(row, slot, self.tile.kv_head).cast_const();
            (key.cast(), self.p.value_at((row, slot), self.tile.kv_head).cast())
        }
    }
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
