//! Exports that say which part of a cache is whose.

use super::arguments::{apart, list, output_list, read, required_list, size};
use super::guard::guard;
use super::sized::{assert_layout, read_sized, sized, write_sized};
use super::status::kvl_status;
use super::views::kvl_view;
use crate::error::{Result, ensure, fail};
use crate::ops::shard::{Mesh, SegmentLists, Shard, shard_slots};
use crate::view::{BATCH, DIM, RawView};

/// The unit in which attention computes keys: segments of a sequence begin and end at multiples of it.
pub const KVL_SPLIT_GRID: i32 = 1024;

/// One of several shards of the caches of a model, by batch (data), heads (model) and keys (sequence). Start from
/// `KVL_SHARD_INIT`, which is the whole.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_shard {
    /// `sizeof(kvl_shard)`.
    pub struct_size: usize,
    /// Which part of the batch, less than `num_data`.
    pub data: i64,
    /// The number of parts of the batch; 0 stands for 1.
    pub num_data: i64,
    /// Which part of the heads, less than `num_model`.
    pub model: i64,
    /// The number of parts of the heads; 0 stands for 1.
    pub num_model: i64,
    /// Which part of the sequence, less than `num_sequence`.
    pub sequence: i64,
    /// The number of parts of the sequence; 0 stands for 1.
    pub num_sequence: i64,
}

sized!(kvl_shard);
assert_layout!(
    kvl_shard, 56,
    struct_size: 0, data: 8, num_data: 16, model: 24, num_model: 32, sequence: 40, num_sequence: 48,
);

const _: () = {
    assert!(KVL_SPLIT_GRID as usize == crate::ops::shard::SPLIT_GRID);
};

/// Sets `shard->data`, `model` and `sequence` to those of shard `rank`, of as many shards as `shard->num_...` give.
/// Neighbouring ranks are parts of one sequence first, then of the heads.
///
/// Thread safety: may be called from any number of threads at once, on disjoint shards.
/// Bad input: null, an unknown `struct_size`, a negative number, and a rank that does not exist are errors, and `shard`
/// is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_shard_from_rank(rank: i64, shard: *mut kvl_shard) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let params = unsafe { read_sized(shard.cast_const()) }?;
        let found = mesh(&params)?.shard(size("rank", rank)?)?;
        // Less than the numbers that came as `i64`.
        let (data, model, sequence) = (found.data() as i64, found.model() as i64, found.sequence() as i64);
        let filled = kvl_shard { data, model, sequence, ..params };
        // SAFETY: the caller's promise.
        unsafe { write_sized(shard, filled) };
        Ok(())
    })
}

/// The shard's sequences of a batch: `*count` of them, from `*first` on. The counts of two parts differ by at most one,
/// and may be 0.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, an unknown `struct_size`, a negative number, and a part that does not exist are errors, and nothing
/// is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_shard_sequences(
    shard: *const kvl_shard,
    batch: i64,
    first: *mut i64,
    count: *mut i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let sequences = unsafe { at(shard) }?.sequences(size("batch", batch)?);
        // SAFETY: as above.
        unsafe { write_ranges([("first", first, sequences.start), ("count", count, sequences.len())]) }
    })
}

/// The shard's heads: `*num_kv_heads` KV heads from `*first_kv_head` on, and the `*num_heads` query heads from
/// `*first_head` on that read them. With more parts than KV heads, several shards have the same KV head and share the
/// query heads that read it.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, an unknown `struct_size`, a negative number, a part that does not exist, `heads` that are no
/// multiple of `kv_heads`, and more parts than KV heads that are no multiple of them are errors, and nothing is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_shard_heads(
    shard: *const kvl_shard,
    heads: i64,
    kv_heads: i64,
    first_head: *mut i64,
    num_heads: *mut i64,
    first_kv_head: *mut i64,
    num_kv_heads: *mut i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let part = unsafe { at(shard) }?.heads(size("heads", heads)?, size("kv_heads", kv_heads)?)?;
        // SAFETY: as above.
        unsafe {
            write_ranges([
                ("first_head", first_head, part.heads.start),
                ("num_heads", num_heads, part.heads.len()),
                ("first_kv_head", first_kv_head, part.kv_heads.start),
                ("num_kv_heads", num_kv_heads, part.kv_heads.len()),
            ])
        }
    })
}

/// The shard's segment of the slots of a sequence: `*count` of `capacity`, from `*first` on. Segments begin and end at
/// multiples of `KVL_SPLIT_GRID` or at the capacity, and may be empty.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, an unknown `struct_size`, a negative number, and a part that does not exist are errors, and nothing
/// is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_shard_keys(
    shard: *const kvl_shard,
    capacity: i64,
    first: *mut i64,
    count: *mut i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        let keys = unsafe { at(shard) }?.keys(size("capacity", capacity)?);
        // SAFETY: as above.
        unsafe { write_ranges([("first", first, keys.start), ("count", count, keys.len())]) }
    })
}

/// The lists that attention over `count` keys from key `first` on takes, where attention over all keys takes `lengths`,
/// `kv_starts` (null for 0) and `offsets` (null for `length - seq`), [batch] each, for `seq` queries per sequence. The
/// results, [batch] each, count from the start of the segment: `local_lengths` and `local_kv_starts` lie in it, and
/// `local_offsets` may be negative or beyond it. `kvl_merge_states` joins the outputs of all segments, of which one
/// takes the sink logits; `kvl_attention_chunks` and `kvl_merge_chunks` join them to the bit.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, a negative number, more keys than an axis holds, an offset that leaves 32 bits, and lists that
/// share memory are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_shard_lengths(
    first: i64,
    count: i64,
    batch: i64,
    seq: i64,
    lengths: *const i32,
    kv_starts: *const i32,
    offsets: *const i32,
    local_lengths: *mut i32,
    local_kv_starts: *mut i32,
    local_offsets: *mut i32,
) -> kvl_status {
    guard(|| {
        let (first, count, batch) = (size("first", first)?, size("count", count)?, size("batch", batch)?);
        apart([
            ("lengths", lengths.cast_mut(), batch),
            ("kv_starts", kv_starts.cast_mut(), batch),
            ("offsets", offsets.cast_mut(), batch),
            ("local_lengths", local_lengths, batch),
            ("local_kv_starts", local_kv_starts, batch),
            ("local_offsets", local_offsets, batch),
        ])?;
        // SAFETY: the caller's promise, and no list shares memory with another.
        unsafe {
            let whole = SegmentLists {
                lengths: required_list("lengths", lengths, batch)?,
                kv_starts: list("kv_starts", kv_starts, batch)?,
                offsets: list("offsets", offsets, batch)?,
                seq: size("seq", seq)?,
            };
            whole.local(
                first..first.saturating_add(count),
                output_list("local_lengths", local_lengths, batch)?,
                output_list("local_kv_starts", local_kv_starts, batch)?,
                output_list("local_offsets", local_offsets, batch)?,
            )
        }
    })
}

/// The slots, in a cache that holds `count` keys from key `first` on, of tokens that a whole cache would have from
/// `positions[b]`, [batch], on: `slots`, [batch, seq], for `kvl_kv_write_params`, with -1 for tokens of other segments.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, a negative number or position, more keys than an axis holds, and lists that share memory are
/// errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_shard_slots(
    first: i64,
    count: i64,
    batch: i64,
    seq: i64,
    positions: *const i32,
    slots: *mut i32,
) -> kvl_status {
    guard(|| {
        let (first, count) = (size("first", first)?, size("count", count)?);
        let (batch, seq) = (size("batch", batch)?, size("seq", seq)?);
        apart([("positions", positions.cast_mut(), batch), ("slots", slots, batch.saturating_mul(seq))])?;
        // SAFETY: the caller's promise, and the lists share no memory.
        unsafe {
            let positions = required_list("positions", positions, batch)?;
            let slots = output_list("slots", slots, batch.saturating_mul(seq))?;
            shard_slots(first..first.saturating_add(count), positions, slots)
        }
    })
}

/// The part of a tensor with the indices `first` to `first + count - 1` of an axis (0 batch, 1 seq, 2 heads, 3 dim), in
/// the same memory.
///
/// Thread safety: may be called from any number of threads at once, with disjoint outputs.
/// Bad input: null, an invalid view, an axis that does not exist, and indices outside it are errors, and nothing is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_shard_view(
    view: *const kvl_view,
    axis: i32,
    first: i64,
    count: i64,
    part: *mut kvl_view,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let view = unsafe { read("view", view) }?;
        ensure!(!part.is_null(), NullPointer, "the pointer part is null");
        let raw = view.raw("view")?;
        raw.validate("view")?;
        let Some(axis) = usize::try_from(axis).ok().filter(|a| (BATCH..=DIM).contains(a)) else {
            fail!(InvalidEnum, "axis is {axis}, which is none of 0 to {DIM}");
        };
        let (start, n) = (size("first", first)?, raw.shape[axis]);
        let end = start.checked_add(size("count", count)?);
        ensure!(
            end.is_some_and(|end| end <= n),
            Shape,
            "{first} + {count} is past the end of the {} axis, which has {n}",
            RawView::axis_name(axis)
        );
        let mut narrowed = view;
        narrowed.shape[axis] = count;
        if !narrowed.shape.contains(&0) {
            // Inside the extent of a valid view, so nothing overflows.
            let bytes = first as isize * view.strides[axis] as isize * raw.dtype.size() as isize;
            narrowed.data = view.data.wrapping_byte_offset(bytes);
            if view.bytes > 0 {
                narrowed.bytes = view.bytes.wrapping_sub_signed(bytes);
            }
        }
        // SAFETY: not null, and the caller's to write.
        unsafe { part.write(narrowed) };
        Ok(())
    })
}

fn mesh(shard: &kvl_shard) -> Result<Mesh> {
    let parts = |name: &str, n: i64| size(name, n).map(|n| n.max(1));
    Ok(Mesh {
        data: parts("num_data", shard.num_data)?,
        model: parts("num_model", shard.num_model)?,
        sequence: parts("num_sequence", shard.num_sequence)?,
    })
}

/// # Safety
/// `from` is null or points to what the header describes.
unsafe fn at(from: *const kvl_shard) -> Result<Shard> {
    // SAFETY: the caller's.
    let shard = unsafe { read_sized(from) }?;
    let coordinates = (size("data", shard.data)?, size("model", shard.model)?, size("sequence", shard.sequence)?);
    mesh(&shard)?.at(coordinates.0, coordinates.1, coordinates.2)
}

/// Writes results, once all pointers are known to be there.
///
/// # Safety
/// Each pointer is null or the caller's to write.
unsafe fn write_ranges<const N: usize>(outputs: [(&str, *mut i64, usize); N]) -> Result<()> {
    for (name, output, _) in outputs {
        ensure!(!output.is_null(), NullPointer, "the pointer {name} is null");
    }
    for (_, output, value) in outputs {
        // SAFETY: not null, and the caller's. Parts of numbers that came as `i64`.
        unsafe { output.write(value as i64) };
    }
    Ok(())
}
