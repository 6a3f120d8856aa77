//! Masks, one byte or one bit an entry.

use super::arguments::{list, shape};
use super::attention::kvl_attention_params;
use super::sized::{assert_layout, read_sized, sized};
use crate::error::{Result, fail};
use crate::ops::mask::{RawBitMask, RawMask, RawMasks};
use crate::problem::masks::BitRows;

/// A boolean mask [batch, seq, heads, keys] of bytes: 0 masks a key for a query, any other value leaves it visible.
/// Axes of one entry broadcast, and so do strides of 0. A mask whose bytes are all 0 is absent.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_mask {
    /// Entry [0, 0, 0, 0].
    pub data: *const u8,
    /// Entries along each axis.
    pub shape: [i64; 4],
    /// Distance between neighbours along each axis, in bytes. Not used along axes of one entry.
    pub strides: [i64; 4],
    /// Bytes from `data` to the end of the buffer; 0 if unknown.
    pub bytes: usize,
}

assert_layout!(kvl_mask, 80, data: 0, shape: 8, strides: 40, bytes: 72);

/// A mask [batch, seq, heads, keys] with one bit per query and key: 0 masks a key for a query, 1 leaves it visible. The
/// lowest bit of a byte is the first, and the bits of neighbouring keys are neighbours. Axes of batch, seq and heads of
/// one entry broadcast, and so do strides of 0. Start from `KVL_BIT_MASK_INIT`.
///
/// It may cover the last keys of a sequence alone: bit j is of key `first_keys[b] + j`, keys before that are visible,
/// and the last bit is of the last key of the sequence or of a later one. So the mask of a speculation tree is [batch,
/// n, 1, n] bits over the n tokens that were written last.
///
/// Sequences may have bits of their own width at any place: with `bit_offsets` and `query_strides`, a sequence has bits
/// for its own queries and for its own keys, from its first key to its length, and no others are read. So the flattened
/// masks of several requests, each [queries, keys], are one mask. The first two axes do not broadcast then.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_bit_mask {
    /// `sizeof(kvl_bit_mask)`.
    pub struct_size: usize,
    /// The byte whose lowest bit is bit 0.
    pub data: *const u8,
    /// Bytes from `data` to the end of the buffer; 0 if unknown.
    pub bytes: usize,
    /// The index of the bit of entry [0, 0, 0, 0].
    pub offset: i64,
    /// batch, seq (the most queries of a sequence), heads, keys (at least the most keys of a sequence after its first
    /// key).
    pub shape: [i64; 4],
    /// Of batch, seq and heads, in bits. Not used along axes of one entry.
    pub strides: [i64; 3],
    /// [batch]: the key of the first bit of a sequence; null for 0.
    pub first_keys: *const i32,
    /// [batch]: the bit of query 0, head 0 and the first key of a sequence, not negative. It replaces `offset` and the
    /// stride of batch, which must then be 0; null to use those. Given together with `query_strides`.
    pub bit_offsets: *const i64,
    /// [batch]: the distance in bits between the queries of a sequence, not negative; 0 broadcasts. It replaces the
    /// stride of seq, which must then be 0; null to use that.
    pub query_strides: *const i64,
}

sized!(kvl_bit_mask);
assert_layout!(
    kvl_bit_mask, 112,
    struct_size: 0, data: 8, bytes: 16, offset: 24, shape: 32, strides: 64, first_keys: 88, bit_offsets: 96,
    query_strides: 104,
);

impl kvl_mask {
    pub(super) fn raw(&self, name: &str) -> Result<Option<RawMask>> {
        let Self { data, shape: axes, strides, bytes } = *self;
        if data.is_null() && axes == [0; 4] && strides == [0; 4] && bytes == 0 {
            return Ok(None);
        }
        let shape = shape(name, axes, ["batch", "seq", "heads", "keys"])?;
        Ok(Some(RawMask { data, shape, strides, bytes: (bytes > 0).then_some(bytes) }))
    }
}

/// The masks of a call of so many sequences.
///
/// # Safety
/// `params` is what the header describes.
pub(super) unsafe fn read_masks<'a>(params: &kvl_attention_params, batch: usize) -> Result<RawMasks<'a>> {
    // SAFETY: the caller's.
    Ok(RawMasks { mask: params.mask.raw("mask")?, bit_mask: unsafe { bit_mask(params.bit_mask, batch) }? })
}

/// # Safety
/// `from` is null or points to what the header describes.
pub(super) unsafe fn bit_mask<'a>(from: *const kvl_bit_mask, batch: usize) -> Result<Option<RawBitMask<'a>>> {
    if from.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's, here and below.
    let mask = unsafe { read_sized(from) }?;
    // SAFETY: as above.
    let lists = unsafe {
        (
            list("bit_offsets of bit_mask", mask.bit_offsets, batch)?,
            list("query_strides of bit_mask", mask.query_strides, batch)?,
        )
    };
    let rows = match lists {
        (Some(starts), Some(query_strides)) => Some(BitRows { starts, query_strides }),
        (None, None) => None,
        (starts, _) => {
            let [given, absent] = match starts {
                Some(_) => ["bit_offsets", "query_strides"],
                None => ["query_strides", "bit_offsets"],
            };
            fail!(InvalidValue, "bit_mask has {given}, but {absent} is null")
        }
    };
    Ok(Some(RawBitMask {
        data: mask.data,
        offset: mask.offset,
        shape: shape("bit_mask", mask.shape, ["batch", "seq", "heads", "keys"])?,
        strides: mask.strides,
        bytes: (mask.bytes > 0).then_some(mask.bytes),
        // SAFETY: as above.
        first_keys: unsafe { list("first_keys of bit_mask", mask.first_keys, batch) }?,
        rows,
    }))
}
