//! Masks as data: a byte, or a bit, per query and key.

use crate::error::{Result, ensure};
use crate::problem::masks::{BitRows, BitView, ByteView};
use crate::problem::visibility::Visibility;
use crate::view::{MAX_AXIS, RawView, reach};
use std::marker::PhantomData;
use std::ops::Range;

/// A boolean mask `[batch, seq, heads, keys]`, a byte per entry; true lets a query see a key. Axes of one element broadcast,
/// and so do strides of 0.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    pub(crate) raw: RawMask,
    lifetime: PhantomData<&'a [bool]>,
}

impl<'a> Mask<'a> {
    /// A mask whose entry `[0, 0, 0, 0]` is `data[offset]`; strides are in entries.
    ///
    /// # Errors
    /// [`Status::Bounds`](crate::Status::Bounds): an entry lies outside of `data`.
    pub fn strided(data: &'a [bool], offset: usize, shape: [usize; 4], strides: [i64; 4]) -> Result<Self> {
        let raw = RawMask { data: data.as_ptr().cast::<u8>().wrapping_add(offset), shape, strides, bytes: None };
        let (low, high) = raw.extent("mask")?;
        ensure!(
            offset as i128 + low >= 0 && offset as i128 + high <= data.len() as i128,
            Bounds,
            "mask: shape {shape:?} with strides {strides:?} from offset {offset} leaves a slice of {} entries",
            data.len()
        );
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A mask `[batch, seq, heads, keys]` that lies at the start of `data` in the order of its axes.
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    pub fn new(data: &'a [bool], shape: [usize; 4]) -> Result<Self> {
        Self::strided(data, 0, shape, crate::view::contiguous(shape))
    }

    /// A mask `[seq, keys]` for all sequences and heads.
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    pub fn for_all(data: &'a [bool], batch: usize, seq: usize, heads: usize, keys: usize) -> Result<Self> {
        Self::strided(data, 0, [batch, seq, heads, keys], [0, keys as i64, 0, 1])
    }
}

/// A mask as the C ABI passes it: a byte per entry, and 0 masks the key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawMask {
    pub data: *const u8,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    pub bytes: Option<usize>,
}

impl RawMask {
    /// The bytes it can touch, relative to its data.
    pub fn extent(&self, name: &str) -> Result<(i128, i128)> {
        if self.shape.contains(&0) {
            return Ok((0, 0));
        }
        ensure!(!self.data.is_null(), NullPointer, "{name}: data is null, but the shape is {:?}", self.shape);
        for axis in 0..4 {
            ensure!(
                self.shape[axis] <= MAX_AXIS,
                Shape,
                "{name}: axis {axis} has {} elements, more than {MAX_AXIS}",
                self.shape[axis]
            );
        }
        let (low, high) = reach(name, self.data.addr(), 1, self.shape, self.strides)?;
        let (low, high) = (low as i128, high as i128);
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0 && high <= bytes as i128,
                Bounds,
                "{name}: shape {:?} with strides {:?} reaches bytes {low}..{high} of a buffer of {bytes}",
                self.shape,
                self.strides
            );
        }
        Ok((low, high))
    }
}

/// A mask `[batch, seq, heads, keys]` of one bit per query and key; 1 lets a query see a key.
///
/// The bits of neighbouring keys are neighbours, and the lowest bit of a byte is the first. The other strides are in bits. Axes
/// of one element broadcast, and so do strides of 0: on all axes but the keys, and with [lists](Self::per_sequence) on the
/// heads only.
///
/// A mask may cover the last keys only: with [first keys](Self::with_first_keys), bit j of sequence b belongs to key
/// `first_keys[b] + j`, and all keys before are visible. So the tree of a speculation is `[batch, n, 1, n]` bits over the n
/// tokens that were written last.
#[derive(Clone, Copy, Debug)]
pub struct BitMask<'a> {
    pub(crate) raw: RawBitMask<'a>,
}

impl<'a> BitMask<'a> {
    /// A mask whose entry `[0, 0, 0, 0]` is bit `offset` of `data`; the strides of batch, queries and heads are in bits.
    ///
    /// # Errors
    /// [`Status::Bounds`](crate::Status::Bounds): a bit lies outside of `data`.
    pub fn strided(data: &'a [u8], offset: usize, shape: [usize; 4], strides: [i64; 3]) -> Result<Self> {
        let raw = RawBitMask {
            data: data.as_ptr(),
            offset: offset as i64,
            shape,
            strides,
            bytes: Some(data.len()),
            first_keys: None,
            rows: None,
        };
        raw.fixed_extent()?;
        Ok(Self { raw })
    }

    /// A mask `[batch, seq, keys]` for all heads, whose bits follow each other without gaps.
    ///
    /// # Errors
    /// [`Status::Bounds`](crate::Status::Bounds): `data` is too short.
    pub fn new(data: &'a [u8], batch: usize, seq: usize, heads: usize, keys: usize) -> Result<Self> {
        let row = keys as i64;
        Self::strided(data, 0, [batch, seq, heads, keys], [row.saturating_mul(seq as i64), row, 0])
    }

    /// A mask whose sequences have places and widths of their own, as the masks of requests [one after the
    /// other](crate::masks#flattened-masks), each `[queries, keys]`.
    ///
    /// - `bit_offsets`, `[batch]`: the bit of query 0, head 0 and the first key of each sequence.
    /// - `query_strides`, `[batch]`: the bits from one query of a sequence to the next; 0 broadcasts.
    /// - `head_stride`: the bits from one head to the next; 0 broadcasts.
    /// - `shape`: `seq` is the greatest number of queries of a sequence, `keys` at least the greatest number of keys.
    ///
    /// A sequence has bits for its own queries and for its keys from its first key to its length. No bit beyond them is read.
    ///
    /// # Errors
    /// A list has not `batch` entries, or a negative one. Whether the bits of a sequence lie in `data` depends on its queries
    /// and its length, and is checked by the call that knows them.
    pub fn per_sequence(
        data: &'a [u8],
        bit_offsets: &'a [i64],
        query_strides: &'a [i64],
        head_stride: i64,
        shape: [usize; 4],
    ) -> Result<Self> {
        let raw = RawBitMask {
            data: data.as_ptr(),
            offset: 0,
            shape,
            strides: [0, 0, head_stride],
            bytes: Some(data.len()),
            first_keys: None,
            rows: Some(BitRows { starts: bit_offsets, query_strides }),
        };
        raw.check_lists(shape[0])?;
        Ok(Self { raw })
    }

    /// `[batch]`: the key of the first bit of each sequence. All keys before it are visible.
    pub fn with_first_keys(self, first_keys: &'a [i32]) -> Self {
        Self { raw: RawBitMask { first_keys: Some(first_keys), ..self.raw } }
    }
}

/// A bit mask as the C ABI passes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawBitMask<'a> {
    pub data: *const u8,
    /// The bit of entry `[0, 0, 0, 0]`.
    pub offset: i64,
    pub shape: [usize; 4],
    /// In bits; keys are neighbours.
    pub strides: [i64; 3],
    pub bytes: Option<usize>,
    pub first_keys: Option<&'a [i32]>,
    /// Instead of the offset and the first two strides, which are 0.
    pub rows: Option<BitRows<'a>>,
}

impl<'a> RawBitMask<'a> {
    pub fn view(&self) -> BitView<'a> {
        let Self { data, offset, first_keys, rows, .. } = *self;
        BitView { data, offset, strides: broadcast(self.shape, self.strides), first_keys, rows }
    }

    /// Checks the mask for the sequences of a call; returns the bytes that it can touch, relative to its data.
    fn extent(&self, visibility: &Visibility) -> Result<(i128, i128)> {
        self.check_lists(visibility.batch)?;
        self.check_axes()?;
        for row in 0..visibility.batch {
            let (first, length) = (self.first_key(row), visibility.length(row));
            ensure!(first >= 0, OutOfRange, "first_keys[{row}] of bit_mask is {first}, which is negative");
            let end = first + self.shape[3] as i64;
            ensure!(end >= length, Shape, "bit_mask ends at key {end} of sequence {row}, which has {length} keys");
        }
        let Some(rows) = self.rows else { return self.fixed_extent() };
        let (mut low, mut high) = (i128::MAX, i128::MIN);
        for row in 0..visibility.batch {
            let (queries, keys) = (visibility.queries(row), visibility.length(row) - self.first_key(row));
            if queries > 0 && keys > 0 && self.shape[2] > 0 {
                let bytes = self.row_extent(rows, row, queries, keys)?;
                (low, high) = (low.min(bytes.0), high.max(bytes.1));
            }
        }
        Ok(if low < high { (low, high) } else { (0, 0) })
    }

    fn first_key(&self, row: usize) -> i64 {
        self.first_keys.map_or(0, |f| f[row].into())
    }

    fn check_lists(&self, batch: usize) -> Result<()> {
        let n = self.first_keys.map_or(batch, <[i32]>::len);
        ensure!(n == batch, Shape, "first_keys of bit_mask has {n} entries, but q has batch = {batch}");
        let Some(rows) = self.rows else { return Ok(()) };
        for (name, list) in [("bit_offsets", rows.starts), ("query_strides", rows.query_strides)] {
            let n = list.len();
            ensure!(n == batch, Shape, "{name} of bit_mask has {n} entries, but batch = {batch}");
            for (row, &bits) in list.iter().enumerate() {
                ensure!(bits >= 0, OutOfRange, "{name}[{row}] of bit_mask is {bits}, which is negative");
            }
        }
        for (name, bits) in [("offset", self.offset), ("strides[0]", self.strides[0]), ("strides[1]", self.strides[1])]
        {
            ensure!(bits == 0, InvalidValue, "bit_mask has bit_offsets, but its {name}, which they replace, is {bits}");
        }
        Ok(())
    }

    fn check_axes(&self) -> Result<()> {
        for (axis, n) in self.shape.into_iter().enumerate() {
            ensure!(n <= MAX_AXIS, Shape, "bit_mask: axis {axis} has {n} elements, more than {MAX_AXIS}");
        }
        Ok(())
    }

    /// The bytes that fixed strides can touch, relative to the data.
    fn fixed_extent(&self) -> Result<(i128, i128)> {
        self.check_axes()?;
        let Self { shape, strides, offset, .. } = *self;
        if shape.contains(&0) {
            return Ok((0, 0));
        }
        ensure!(!self.data.is_null(), NullPointer, "bit_mask: data is null, but the shape is {shape:?}");
        let (mut low, mut high) = (i128::from(offset), i128::from(offset) + shape[3] as i128);
        for axis in 0..3 {
            let reach = (shape[axis] as i128 - 1) * i128::from(strides[axis]);
            (low, high) = (low + reach.min(0), high + reach.max(0));
        }
        let (low, high) = (low.div_euclid(8), (high + 7).div_euclid(8));
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0 && high <= bytes as i128,
                Bounds,
                "bit_mask: shape {shape:?} with strides {strides:?} from bit {offset} reaches bytes {low}..{high} of a buffer \
                 of {bytes}"
            );
        }
        ensure!(
            self.is_addressable(low, high),
            Stride,
            "bit_mask: shape {shape:?} with strides {strides:?} from bit {offset} leaves the address space"
        );
        Ok((low, high))
    }

    /// The bytes that the queries and keys of a sequence can touch, relative to the data.
    fn row_extent(&self, rows: BitRows, row: usize, queries: usize, keys: i64) -> Result<(i128, i128)> {
        ensure!(
            !self.data.is_null(),
            NullPointer,
            "bit_mask: data is null, but sequence {row} has {queries} queries of {keys} keys"
        );
        let (start, stride) = (rows.starts[row], rows.query_strides[row]);
        let heads = (self.shape[2] as i128 - 1) * i128::from(self.strides[2]);
        let end = i128::from(start) + (queries as i128 - 1) * i128::from(stride) + i128::from(keys);
        let low = (i128::from(start) + heads.min(0)).div_euclid(8);
        let high = (end + heads.max(0) + 7).div_euclid(8);
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0 && high <= bytes as i128,
                Bounds,
                "bit_mask: the {queries} queries of {keys} keys of sequence {row}, {stride} bits apart from bit {start}, reach \
                 bytes {low}..{high} of a buffer of {bytes}"
            );
        }
        ensure!(
            self.is_addressable(low, high),
            Stride,
            "bit_mask: the {queries} queries of {keys} keys of sequence {row}, {stride} bits apart from bit {start}, leave the \
             address space"
        );
        Ok((low, high))
    }

    /// Whether the bytes lie in the address space and their bits are countable in the 64 bits that kernels use.
    fn is_addressable(&self, low: i128, high: i128) -> bool {
        let (most, at) = ((isize::MAX as i128).min(i64::MAX as i128 / 8), self.data.addr() as i128);
        low >= -most && high <= most && at + low >= 0 && at + high <= usize::MAX as i128
    }
}

/// The masks of a call: a key is visible if every mask lets it through.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RawMasks<'a> {
    pub mask: Option<RawMask>,
    pub bit_mask: Option<RawBitMask<'a>>,
}

impl<'a> RawMasks<'a> {
    /// Checks the masks for the sequences of a call with `heads` query heads, the longest of which has `keys` keys.
    pub fn validate(&self, visibility: &Visibility, heads: usize, keys: usize) -> Result<Touched> {
        let rows = [visibility.batch, visibility.seq, heads];
        let mut touched = Touched([("mask", 0..0), ("bit_mask", 0..0)]);
        if let Some(mask) = &self.mask {
            check_scores("mask", mask.shape, rows, keys)?;
            touched.set(0, mask.data, mask.extent("mask")?);
        }
        if let Some(mask) = &self.bit_mask {
            // Keys are counted from the first key of a sequence; the extent checks how many it needs.
            let [batch, seq, heads, _] = mask.shape;
            check_scores("bit_mask", [batch, seq, heads, keys], rows, keys)?;
            // Lists replace the strides of these two axes, and they have an entry for each sequence.
            ensure!(
                mask.rows.is_none() || [batch, seq] == rows[..2],
                Shape,
                "bit_mask has bit_offsets and shape {:?}, but must have [{}, {}] along its first two axes",
                mask.shape,
                rows[0],
                rows[1]
            );
            touched.set(1, mask.data, mask.extent(visibility)?);
        }
        Ok(touched)
    }

    pub fn views(&self) -> (Option<ByteView>, Option<BitView<'a>>) {
        let mask = self.mask.map(|m| ByteView { data: m.data, strides: broadcast(m.shape, m.strides) });
        (mask, self.bit_mask.as_ref().map(RawBitMask::view))
    }
}

/// Fails unless a tensor `[batch, seq, heads, keys]` of that shape has an entry for every query and key of a call, where axes of
/// one element broadcast.
pub(crate) fn check_scores(name: &str, shape: [usize; 4], rows: [usize; 3], keys: usize) -> Result<()> {
    let [batch, seq, heads] = rows;
    ensure!(
        (0..3).all(|axis| shape[axis] == rows[axis] || shape[axis] == 1) && (shape[3] >= keys || shape[3] == 1),
        Shape,
        "{name} has shape {shape:?}, but must have [{batch}, {seq}, {heads}, {keys}] or more keys, or 1 along an axis to broadcast"
    );
    Ok(())
}

/// The strides of a tensor, or of its first axes, that is read as [`check_scores`] allows: 0 along axes of one element.
pub(crate) fn broadcast<const N: usize>(shape: [usize; 4], strides: [i64; N]) -> [i64; N] {
    std::array::from_fn(|axis| if shape[axis] == 1 { 0 } else { strides[axis] })
}

/// The addresses that each mask can touch.
pub(crate) struct Touched([(&'static str, Range<i128>); 2]);

impl Touched {
    fn set(&mut self, mask: usize, data: *const u8, (low, high): (i128, i128)) {
        let at = data.addr() as i128;
        self.0[mask].1 = at + low..at + high;
    }

    /// Fails if an output shares memory with one of them.
    #[inline(always)]
    pub fn check_apart(&self, name: &str, out: &RawView) -> Result<()> {
        if self.is_empty() { Ok(()) } else { self.check_any_apart(name, out) }
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|(_, touched)| touched.is_empty())
    }

    /// [`Self::check_apart`] of any masks.
    fn check_any_apart(&self, name: &str, out: &RawView) -> Result<()> {
        for (mask, touched) in self.0.iter().filter(|(_, touched)| !touched.is_empty()) {
            let (reach, at) = (out.validate(name)?, out.data.addr() as i128);
            let meet = touched.start < at + reach.high as i128 && at + (reach.low as i128) < touched.end;
            ensure!(!meet, Overlap, "{mask} and {name} share memory");
        }
        Ok(())
    }
}
