//! One pointer per key and value of a block. The loops over a block read these pointers and know no layout.

use super::weighted::widen_row;
use super::{Block, SUBBLOCK};
use crate::format::CacheFormat;
use crate::kernels::generic::affine::{self, Widener};
use crate::kernels::generic::blocks::{self, BlockUnit};
use crate::kernels::generic::copy;
use crate::kernels::simd::{Load, Simd, lines};
use crate::layout::{Packing, Place};
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, KeyRange, padded};
use crate::problem::tile::Tile;
use crate::problem::visibility::TileVisibility;
use crate::view::AffineRow;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Subblocks per block.
pub(crate) const SUBBLOCKS: usize = BLOCK / SUBBLOCK;

/// Pointers to the keys or values of a block, for the first KV head of a tile. The elements of each lie together.
pub(crate) struct KeyPointerTable<'a, T> {
    /// One pointer per key of the key range; the others are not initialised. A key that no row of the tile sees has the pointer of
    /// another key.
    keys: &'a mut Pointers<T>,
    /// The start of each subblock of the next block; null if the subblock is not read.
    next: [*const T; SUBBLOCKS],
    /// Bytes between neighbouring keys.
    seq: isize,
    /// Bytes between neighbouring KV heads.
    head: isize,
}

/// Memory for the pointers of [`KeyPointerTable`].
pub(crate) type Pointers<T> = [MaybeUninit<*const T>; BLOCK];

impl<'a, T> KeyPointerTable<'a, T> {
    #[inline(always)]
    pub fn new(keys: &'a mut Pointers<T>) -> Self {
        Self { keys, next: [std::ptr::null(); SUBBLOCKS], seq: 0, head: 0 }
    }

    /// Valid for keys of the key range only.
    #[inline(always)]
    pub fn rows(&self) -> KeyPointers<'_, T> {
        KeyPointers {
            keys: self.keys.as_ptr().cast(),
            next: &self.next,
            seq: self.seq,
            head: self.head,
            lifetime: PhantomData,
        }
    }

    /// Sets pointers of `keys`, which lie [`Self::seq`] apart, from `first` on.
    #[inline(always)]
    fn run(&mut self, keys: Range<usize>, first: *const T) {
        for (i, to) in self.keys[keys].iter_mut().enumerate() {
            to.write(first.wrapping_byte_offset(i as isize * self.seq));
        }
    }

    /// Moves the keys of a key range to a copy of the block whose rows are `width` bytes apart; nothing is prefetched after them.
    #[inline(always)]
    pub fn place(&mut self, key_range: KeyRange, block: *const T, width: usize) {
        (self.seq, self.head, self.next) = (width as isize, 0, [std::ptr::null(); SUBBLOCKS]);
        self.run(key_range.low..key_range.high, block.wrapping_byte_add(key_range.low * width));
    }

    /// Gives `keys` the pointer of another key.
    fn fill(&mut self, keys: Range<usize>, other: usize) {
        let other = self.keys[other];
        self.keys[keys].fill(other);
    }
}

/// Widens keys or values whose units hold several elements to rows of f32 that are `padded(dim)` apart, from the row of the first key
/// on. To widen is exact, but for the roundings that the format has.
pub(crate) struct WidenUnits<'a> {
    pub rows: KeyPointers<'a, u8>,
    /// What is widened: of `keys`, those that some row of the tile sees. Nothing else is read.
    pub keys: KeyRange,
    pub visible_bits: u64,
    pub to: *mut f32,
    pub dim: usize,
    /// The block, and whether its values are widened: where scales lie beside units.
    pub block: &'a Block<'a>,
    pub values: bool,
    /// The KV head of the tile.
    pub head: usize,
}

impl<'a> WidenUnits<'a> {
    /// Widens units of type `U`.
    ///
    /// # Safety
    /// [`locate`] has set the pointers; `to` has room for the rows.
    #[inline(always)]
    pub unsafe fn run<S: Simd, U: BlockUnit>(&self, s: S) {
        let Self { rows, keys, visible_bits, to, dim, head, .. } = *self;
        let (units, width) = (dim / blocks::N, padded(dim));
        for j in keys.low..keys.high {
            if visible_bits >> j & 1 == 0 {
                continue;
            }
            self.prefetch_next(s, j, units * size_of::<U>());
            let from = rows.key(head, j).cast::<U>();
            // SAFETY: the caller's: a visible key has these units, and a row these elements.
            unsafe {
                for unit in 0..units {
                    (*from.add(unit)).widen(s, to.add((j - keys.low) * width + unit * blocks::N));
                }
            }
        }
    }

    /// Prefetches what comes after the `bytes` of key `j`.
    #[inline(always)]
    fn prefetch_next<S: Simd>(&self, s: S, j: usize, bytes: usize) {
        let next = self.rows.next(j);
        if !next.is_null() {
            let next = next.wrapping_byte_offset(self.rows.head_offset(self.head));
            lines(next, bytes).for_each(|line| s.prefetch_far(line));
        }
    }

    /// Widens elements of type `T`, to the order that loops have them in.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    pub unsafe fn run_elements<S: Simd, T: Load>(&self, s: S) {
        let Self { rows, keys, visible_bits, to, dim, head, .. } = *self;
        let width = padded(dim);
        for j in keys.low..keys.high {
            if visible_bits >> j & 1 == 0 {
                continue;
            }
            self.prefetch_next(s, j, dim * size_of::<T>());
            let (from, to) = (rows.key(head, j).cast::<T>(), to.wrapping_add((j - keys.low) * width));
            // SAFETY: the caller's: a visible key has these elements, and a row whole vectors.
            unsafe { widen_row(s, from, to, dim) };
        }
    }

    /// Widens integers of `BITS` bits that an affine format describes.
    ///
    /// # Safety
    /// As [`Self::run`].
    #[inline(always)]
    pub unsafe fn run_affine<S: Simd, const BITS: u32>(&self, s: S) {
        let Self { rows, keys, visible_bits, to, dim, block, values, head } = *self;
        let Block { p, tile, base, .. } = *block;
        let cache = if values { p.v } else { p.k };
        let Some(affine) = &cache.affine else { unreachable!("the check of a cache finds what describes it") };
        let mut parameters = [AffineRow { scales: std::ptr::null_mut(), zeros: std::ptr::null_mut() }; BLOCK];
        let mut j = keys.low;
        while j < keys.high {
            let visible = (visible_bits >> j).trailing_ones() as usize;
            if visible == 0 {
                j += 1;
                continue;
            }
            let ((row, slot), run) = p.visibility.place(tile.batch, base + j);
            let end = (j + run.min(visible)).min(keys.high);
            for (i, to) in parameters[j..end].iter_mut().enumerate() {
                // SAFETY: the caller's: visible keys are inside the cache, and the tile has this head.
                *to = unsafe { affine.row(row, slot + i, tile.kv_head + head) };
            }
            j = end;
        }
        let (mut widener, width) = (Widener::<S, BITS>::new(s, affine.groups()), padded(dim));
        // Scales that neighbouring keys share are unpacked once for all of them.
        let panel = if widener.is_uniform(dim) { dim } else { affine::N };
        for first in (0..dim).step_by(panel) {
            let n = (dim - first).min(panel);
            for j in keys.low..keys.high {
                if visible_bits >> j & 1 == 0 {
                    continue;
                }
                if first == 0 {
                    self.prefetch_next(s, j, dim * BITS as usize / 8);
                }
                let to = to.wrapping_add((j - keys.low) * width + first);
                // SAFETY: the caller's: a visible key has these units, and a row these elements.
                unsafe { widener.widen(s, &parameters[j], rows.key(head, j), (first, n, dim), to) };
            }
        }
    }

    /// Widens by a function of the level, and returns pointers to the rows, by which kernels of f32 read them. The pointers of hidden keys
    /// lead to the row of another one, as those of [`locate`] do.
    ///
    /// # Safety
    /// As [`Self::run`]; one of the keys is visible.
    #[inline(always)]
    pub unsafe fn by<'b>(
        &self,
        widen: unsafe fn(&WidenUnits),
        memory: &'b mut Pointers<u8>,
    ) -> KeyPointerTable<'b, u8> {
        // SAFETY: the caller's.
        unsafe { widen(self) };
        self.table(memory)
    }

    /// The pointers of [`Self::by`], to rows that are or will be widened.
    #[inline(always)]
    pub fn table<'b>(&self, memory: &'b mut Pointers<u8>) -> KeyPointerTable<'b, u8> {
        let Self { keys, visible_bits, to, dim, .. } = *self;
        let (mut table, width) = (KeyPointerTable::new(memory), padded(dim) * size_of::<f32>());
        table.place(keys, to.cast::<u8>().wrapping_sub(keys.low * width), width);
        let (bits, seen) = (visible_bits & keys.bits(), (visible_bits & keys.bits()).trailing_zeros() as usize);
        if bits != keys.bits() {
            for j in (keys.low..keys.high).filter(|j| bits >> j & 1 == 0) {
                table.fill(j..j + 1, seen);
            }
        }
        table
    }
}

/// A borrowed [`KeyPointerTable`].
#[derive(Clone, Copy)]
pub(crate) struct KeyPointers<'a, T> {
    keys: *const *const T,
    next: &'a [*const T; SUBBLOCKS],
    seq: isize,
    head: isize,
    lifetime: PhantomData<&'a Pointers<T>>,
}

impl<'a, T> KeyPointers<'a, T> {
    /// The same pointers, to units of another type.
    #[inline(always)]
    pub fn cast<U>(self) -> KeyPointers<'a, U> {
        // SAFETY: pointers to sized types have one representation, and nothing is dereferenced here.
        let next = unsafe { &*std::ptr::from_ref(self.next).cast() };
        KeyPointers { keys: self.keys.cast(), next, seq: self.seq, head: self.head, lifetime: PhantomData }
    }

    /// The address of a key of the block, for a KV head of the tile.
    #[inline(always)]
    pub fn key(&self, head: usize, key: usize) -> *const T {
        debug_assert!(key < BLOCK);
        // SAFETY: callers stay inside the key range, whose pointers are written.
        unsafe { *self.keys.add(key) }.wrapping_byte_offset(self.head_offset(head))
    }

    /// Bytes from a key of the tile's first KV head to the same key of another.
    #[inline(always)]
    pub fn head_offset(&self, head: usize) -> isize {
        head as isize * self.head
    }

    /// Bytes from a key to one so many slots later, in a run of slots.
    #[inline(always)]
    pub fn seq_offset(&self, keys: usize) -> isize {
        self.seq.wrapping_mul(keys as isize)
    }

    /// Bytes between keys of the key range that are `step` apart, of which 1 or, in pairs of slots, 2 share a row, if that distance is
    /// constant.
    #[cfg(target_arch = "x86_64")]
    pub fn stride(&self, key_range: KeyRange, step: usize) -> Option<isize> {
        let even = (key_range.low + step..key_range.high)
            .step_by(step)
            .all(|j| self.key(0, j) == self.key(0, j - step).wrapping_byte_offset(self.seq));
        even.then_some(self.seq)
    }

    /// The start of a subblock of this block or of the next; null if it is not read.
    #[inline(always)]
    pub fn subblock(&self, key_range: KeyRange, index: usize) -> *const T {
        if index >= SUBBLOCKS {
            return self.next[index - SUBBLOCKS];
        }
        let first = (index * SUBBLOCK).max(key_range.low);
        if first < key_range.high { self.key(0, first) } else { std::ptr::null() }
    }

    /// The pair of slots of the next block at the place of this block's `key`, for values packed in pairs. For prefetches only.
    #[inline(always)]
    pub fn next_pair(&self, key: usize) -> *const T {
        let index = self.next[key / SUBBLOCK];
        if index.is_null() {
            index
        } else {
            index.wrapping_byte_offset(((key % SUBBLOCK / 2) as isize).wrapping_mul(self.seq))
        }
    }

    /// The key of the next block at the place of this block's `key`, if its subblock is one run of slots. For prefetches only.
    #[inline(always)]
    pub fn next(&self, key: usize) -> *const T {
        let index = self.next[key / SUBBLOCK];
        if index.is_null() {
            index
        } else {
            index.wrapping_byte_offset(((key % SUBBLOCK) as isize).wrapping_mul(self.seq))
        }
    }
}

/// Buffers for keys and values whose elements do not lie together: `[BLOCK][padded(dim)]` each.
pub(crate) struct GatherBuffers {
    pub k: *mut u8,
    pub v: *mut u8,
}

/// The keys of a block that a tile reads.
#[derive(Clone, Copy)]
pub(crate) struct BlockRequest<'a> {
    pub p: &'a Problem<'a>,
    pub tile: &'a Tile,
    /// The block's first key.
    pub base: usize,
    pub key_range: KeyRange,
    /// Keys of the key range that some row of the tile sees; these are inside the cache.
    pub visible_bits: u64,
    /// Which keys are read later.
    pub reach: &'a TileVisibility,
}

/// Finds the keys and values of a block, and gathers those whose elements do not lie together. Values packed in pairs stay where
/// they are: [`unpack_pairs`](super::unpack_pairs) copies them, or the kernel reads pairs.
///
/// # Safety
/// The visible keys, and those that `reach` covers, are inside K and V. The gather buffers hold a block; they are used for tiles of
/// one KV head only.
#[inline(always)]
pub(crate) unsafe fn locate<'a, T>(
    request: &BlockRequest,
    gather_buffers: &GatherBuffers,
    (k, v): (&mut KeyPointerTable<'a, T>, &mut KeyPointerTable<'a, T>),
) {
    let BlockRequest { p, tile, base, key_range, visible_bits, .. } = *request;
    // The stride of an axis of one element may be any number.
    for (view, to) in [&p.k.units, &p.v.units].into_iter().zip([&mut *k, &mut *v]) {
        let unit = view.dtype.unit_bytes() as isize;
        (to.seq, to.head) =
            ((view.strides[1] as isize).wrapping_mul(unit), (view.strides[2] as isize).wrapping_mul(unit));
    }
    if visible_bits == key_range.bits() {
        // The usual case: this block and what is read of the next are one run of slots.
        let (place, run) = p.visibility.place(tile.batch, base + key_range.low);
        let last = run >= key_range.len() && !(0..SUBBLOCKS).any(|i| request.reach.covers(base + BLOCK + i * SUBBLOCK));
        if last {
            k.run(key_range.low..key_range.high, request.at::<T>(place).0);
            request.values(v, key_range.low..key_range.high, place);
        } else if run >= 2 * BLOCK - key_range.low {
            let key = request.at::<T>(place).0;
            k.run(key_range.low..key_range.high, key);
            request.values(v, key_range.low..key_range.high, place);
            for index in 0..SUBBLOCKS {
                let ahead = BLOCK + index * SUBBLOCK - key_range.low;
                k.next[index] = key.wrapping_byte_offset(ahead as isize * k.seq);
                v.next[index] = request.at((place.0, place.1 + ahead)).1;
            }
        } else {
            // SAFETY: the caller's.
            unsafe { scattered(request, (&mut *k, &mut *v)) };
        }
    } else {
        // SAFETY: the caller's.
        unsafe { scattered(request, (&mut *k, &mut *v)) };
    }
    // SAFETY: the caller's.
    unsafe {
        gather(p.k.dtype, p.k.shape[3], p.k.strides[3] as isize, key_range, gather_buffers.k, k);
        if p.v_packing == Packing::Rows {
            gather(p.v.dtype, p.v_dim, p.value_step(), key_range, gather_buffers.v, v);
        }
    }
}

/// [`locate`] for slots in several runs, or for keys of which some are not visible.
///
/// # Safety
/// As [`locate`].
#[inline(never)]
unsafe fn scattered<T>(request: &BlockRequest, (k, v): (&mut KeyPointerTable<'_, T>, &mut KeyPointerTable<'_, T>)) {
    let BlockRequest { p, tile, base, key_range, visible_bits, reach } = *request;
    let mut j = key_range.low;
    let mut seen = None;
    while j < key_range.high {
        let rest = visible_bits >> j;
        if rest & 1 == 0 {
            // Must be readable; its value is ignored.
            let end = (j + rest.trailing_zeros() as usize).min(key_range.high);
            if let Some(seen) = seen {
                k.fill(j..end, seen);
                v.fill(j..end, seen);
            }
            j = end;
            continue;
        }
        let (place, run) = p.visibility.place(tile.batch, base + j);
        let end = (j + run).min(key_range.high);
        k.run(j..end, request.at(place).0);
        request.values(v, j..end, place);
        if seen.is_none() {
            k.fill(key_range.low..j, j);
            v.fill(key_range.low..j, j);
            seen = Some(j);
        }
        j = end;
    }
    for index in 0..SUBBLOCKS {
        let position = base + BLOCK + index * SUBBLOCK;
        if reach.covers(position) {
            (k.next[index], v.next[index]) = request.at(p.visibility.place(tile.batch, position).0);
        }
    }
}

/// # Safety
/// As [`locate`].
#[inline(always)]
unsafe fn gather<T>(
    format: CacheFormat,
    dim: usize,
    step: isize,
    key_range: KeyRange,
    block: *mut u8,
    rows: &mut KeyPointerTable<T>,
) {
    if step == 1 || dim == 1 {
        return;
    }
    // SAFETY: the caller's.
    unsafe {
        match format {
            CacheFormat::F32 => gather_units::<T, u32>(dim, step, key_range, block, rows),
            CacheFormat::F16 | CacheFormat::Bf16 => gather_units::<T, u16>(dim, step, key_range, block, rows),
            CacheFormat::Int8 | CacheFormat::Fp8E4m3 | CacheFormat::Fp8E5m2 => {
                gather_units::<T, u8>(dim, step, key_range, block, rows);
            }
            // Units that are widened always lie together.
            CacheFormat::Q8_0
            | CacheFormat::Q4_0
            | CacheFormat::Q4_1
            | CacheFormat::Q5_0
            | CacheFormat::Q5_1
            | CacheFormat::Iq4Nl
            | CacheFormat::Affine8
            | CacheFormat::Affine4 => {}
        }
    }
}

/// [`gather`] of units of the size of `U`.
///
/// # Safety
/// As [`locate`].
#[inline(never)]
unsafe fn gather_units<T, U: Copy>(
    dim: usize,
    step: isize,
    key_range: KeyRange,
    block: *mut u8,
    rows: &mut KeyPointerTable<T>,
) {
    for j in key_range.low..key_range.high {
        // SAFETY: the caller's: a row of the cache has dim units in such steps, one of the block padded(dim).
        unsafe {
            copy::gather(rows.keys[j].assume_init().cast::<U>(), step, block.cast::<U>().add(j * padded(dim)), dim)
        };
    }
    rows.place(key_range, block.cast(), padded(dim) * size_of::<U>());
}

impl BlockRequest<'_> {
    /// Sets the pointers of values in consecutive slots, from `place` on.
    #[inline(always)]
    fn values<T>(&self, v: &mut KeyPointerTable<T>, keys: Range<usize>, place: Place) {
        match self.p.v_packing {
            Packing::Rows => v.run(keys, self.at(place).1),
            Packing::RowPairs => {
                let (row, slot) = place;
                let (pair, odd) = (self.at::<T>((row, slot / 2 * 2)).1, slot % 2);
                let half = self.p.v.strides[3] as isize * self.p.v.dtype.unit_bytes() as isize;
                for (i, to) in v.keys[keys].iter_mut().enumerate() {
                    let (pairs, second) = ((odd + i) / 2, (odd + i) % 2);
                    to.write(pair.wrapping_byte_offset(pairs as isize * v.seq + second as isize * half));
                }
            }
        }
    }

    /// The key and the value in a slot.
    #[inline(always)]
    fn at<T>(&self, (row, slot): Place) -> (*const T, *const T) {
        // SAFETY: a visible position lies inside the cache.
        unsafe {
            let key = self.p.k.row(row, slot, self.tile.kv_head).cast_const();
            (key.cast(), self.p.value_at((row, slot), self.tile.kv_head).cast())
        }
    }
}

impl Block<'_> {
    /// The subblocks of the key range: index in the block, and keys.
    #[inline(always)]
    pub fn subblocks(&self) -> impl Iterator<Item = (usize, KeyRange)> + use<> {
        let key_range = self.key_range;
        (key_range.low / SUBBLOCK..key_range.high.div_ceil(SUBBLOCK)).map(move |index| {
            (
                index,
                KeyRange { low: key_range.low.max(index * SUBBLOCK), high: key_range.high.min((index + 1) * SUBBLOCK) },
            )
        })
    }
}
