//! Boolean masks and bit masks as the kernels read them.

use super::grid::{BLOCK, KeyRange, ones};

/// A boolean mask: strides in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByteView {
    pub data: *const u8,
    pub strides: [i64; 4],
}

/// One bit per query and key. Strides of batch, queries and heads are in bits; keys are adjacent, lowest bit of a byte
/// first. Keys before the first key of the mask are not masked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitView<'a> {
    pub data: *const u8,
    /// The bit offset of entry `[0, 0, 0, 0]`.
    pub offset: i64,
    pub strides: [i64; 3],
    /// The key of the first bit, one per sequence; 0 if absent.
    pub first_keys: Option<&'a [i32]>,
    /// Replaces the offset and the first two strides.
    pub rows: Option<BitRows<'a>>,
}

/// The bits of each sequence, if they are not at fixed strides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BitRows<'a> {
    /// The bit offset of query 0, head 0 and the first key of each sequence.
    pub starts: &'a [i64],
    /// The stride of queries in bits, per sequence.
    pub query_strides: &'a [i64],
}

/// The subset of the `visible_bits` keys of a block that masks leave visible to a query and head.
///
/// # Safety
/// The visible keys are inside the masks.
#[inline(always)]
pub(crate) unsafe fn visible_by_masks(
    (mask, bit_mask): (Option<&ByteView>, Option<&BitView>),
    batch: usize,
    row: (u32, u32),
    base: usize,
    visible_bits: u64,
) -> u64 {
    let KeyRange { low, high } = KeyRange::around(visible_bits);
    let mut bits = visible_bits;
    // SAFETY: the caller's.
    unsafe {
        if let Some(mask) = mask {
            bits &= mask_bits(mask, batch, row, base, low, high);
        }
        if let Some(mask) = bit_mask {
            bits &= packed_bits(mask, batch, row, base, low, high);
        }
    }
    bits
}

/// Bit j of the result is 1 if the mask leaves key `base + j` visible, for j in `from..to`.
///
/// # Safety
/// The existing entries of the mask are readable.
#[inline(always)]
unsafe fn packed_bits(
    mask: &BitView,
    batch: usize,
    (token, head): (u32, u32),
    base: usize,
    from: usize,
    to: usize,
) -> u64 {
    let first = mask.first_keys.map_or(0, |k| k[batch] as i64) - base as i64;
    let unmasked = ones(first.clamp(0, BLOCK as i64) as usize);
    let from = first.max(from as i64);
    if from >= to as i64 {
        return u64::MAX;
    }
    let [sb, st, sh] = mask.strides;
    let (start, st) = match mask.rows {
        None => (mask.offset + batch as i64 * sb, st),
        Some(rows) => (rows.starts[batch], rows.query_strides[batch]),
    };
    let bit = start + i64::from(token) * st + i64::from(head) * sh + from - first;
    let (mut byte, shift, n) = (bit.div_euclid(8) as isize, bit.rem_euclid(8) as usize, to - from as usize);
    let mut bits = 0u128;
    for i in 0..(shift + n).div_ceil(8) {
        // SAFETY: the caller's.
        bits |= u128::from(unsafe { *mask.data.offset(byte) }) << (8 * i);
        byte += 1;
    }
    unmasked | ((bits >> shift) as u64) << from
}

/// Bit j of the result is 1 if the mask leaves key `base + j` visible, for j in `from..to`.
///
/// # Safety
/// Those entries of the mask are readable.
#[inline(always)]
unsafe fn mask_bits(
    mask: &ByteView,
    batch: usize,
    (token, head): (u32, u32),
    base: usize,
    from: usize,
    to: usize,
) -> u64 {
    let [sb, st, sh, sk] = mask.strides.map(|x| x as isize);
    let at = batch as isize * sb + token as isize * st + head as isize * sh + (base + from) as isize * sk;
    // SAFETY: the caller's.
    unsafe {
        let mut p = mask.data.offset(at);
        let mut bits = 0;
        let mut j = from;
        if sk == 1 {
            // Eight bytes at a time: the top bit of each byte that is not 0, gathered by one multiplication.
            while j + 8 <= to {
                let x = p.cast::<u64>().read_unaligned().to_le();
                let set = (((x & 0x7f7f_7f7f_7f7f_7f7f) + 0x7f7f_7f7f_7f7f_7f7f) | x) & 0x8080_8080_8080_8080;
                bits |= ((set >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << j;
                p = p.add(8);
                j += 8;
            }
        }
        while j < to {
            bits |= u64::from(*p != 0) << j;
            p = p.wrapping_offset(sk);
            j += 1;
        }
        bits
    }
}
