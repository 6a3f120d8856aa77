//! Calls about the parts of a sharded cache.

use crate::abi::*;
use crate::call::{Call, product};

/// One of up to 4 x 4 x 4 shards.
fn shard(c: &mut Call, model: usize) -> *mut kvl_shard {
    let part = |c: &mut Call, n: usize| {
        let at = c.rng.below(n.max(1)) as i64;
        (c.number(at), c.number(n as i64))
    };
    let n = [c.rng.between(0, 4), c.rng.between(0, 4)];
    let ((data, num_data), (model, num_model), (sequence, num_sequence)) =
        (part(c, n[0]), part(c, model), part(c, n[1]));
    c.sized(&kvl_shard { data, num_data, model, num_model, sequence, num_sequence, ..zeroed() }, &[])
}

fn outputs<const N: usize>(c: &mut Call) -> [*mut i64; N] {
    std::array::from_fn(|_| {
        let at = c.output(Some(1));
        c.may_write(at, Some(1));
        at
    })
}

pub fn shard_from_rank(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let n = [c.rng.between(0, 4), c.rng.between(0, 4), c.rng.between(0, 4)];
    let rank = c.rng.below(n.iter().map(|&n| n.max(1)).product()) as i64;
    let [num_data, num_model, num_sequence] = n.map(|n| c.number(n as i64));
    let shard = c.sized(&kvl_shard { data: -7, num_data, num_model, num_sequence, ..zeroed() }, &[]);
    let rank = c.number(rank);
    c.may_write(shard, Some(1));
    c.ready();
    // SAFETY: a struct of the right size, or null.
    let status = unsafe { kvl_shard_from_rank(rank, shard) };
    c.check(status)
}

pub fn shard_rows(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let model = c.rng.between(0, 4);
    let (shard, batch) = (shard(&mut c, model), c.rng.below(20) as i64);
    let (batch, [first, count]) = (c.number(batch), outputs(&mut c));
    c.ready();
    // SAFETY: a struct of the right size or null, and space for the results.
    let status = unsafe { kvl_shard_sequences(shard, batch, first, count) };
    c.check(status)
}

pub fn shard_heads(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let kv_heads = c.rng.between(1, 8);
    let model = if c.maybe(0.5) { c.rng.between(0, kv_heads) } else { kv_heads * c.rng.between(1, 3) };
    let (shard, heads) = (shard(&mut c, model), (kv_heads * c.rng.below(5)) as i64);
    let (heads, kv_heads) = (c.number(heads), c.number(kv_heads as i64));
    let [first, count, first_kv, count_kv] = outputs(&mut c);
    c.ready();
    // SAFETY: a struct of the right size or null, and space for the results.
    let status = unsafe { kvl_shard_heads(shard, heads, kv_heads, first, count, first_kv, count_kv) };
    c.check(status)
}

pub fn shard_keys(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let model = c.rng.between(0, 4);
    let (shard, capacity) = (shard(&mut c, model), c.rng.below(9000) as i64);
    let (capacity, [first, count]) = (c.number(capacity), outputs(&mut c));
    c.ready();
    // SAFETY: a struct of the right size or null, and space for the results.
    let status = unsafe { kvl_shard_keys(shard, capacity, first, count) };
    c.check(status)
}

pub fn shard_lengths(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let (first, count) = (c.rng.below(5000) as i64, c.rng.below(5000) as i64);
    let (batch, seq) = (c.rng.below(6) as i64, c.rng.below(9) as i64);
    let (first, count, batch, seq) = (c.number(first), c.number(count), c.number(batch), c.number(seq));
    let wrong = [-1, i32::MIN, i32::MAX];
    let lengths = c.list(product(&[batch]), &wrong, |c, _| c.rng.below(9000) as i32).at;
    let optional = |c: &mut Call| if c.maybe(0.5) { product(&[batch]) } else { None };
    let n = optional(&mut c);
    let starts = c.list(n, &wrong, |c, _| c.rng.below(9000) as i32).at;
    let n = optional(&mut c);
    let offsets = c.list(n, &wrong, |c, _| c.rng.below(9000) as i32 - 300).at;
    let [a, b, d]: [*mut i32; 3] = std::array::from_fn(|_| {
        let at = c.output(product(&[batch]));
        c.may_write(at, product(&[batch]));
        at
    });
    let d = if c.hit() { a } else { d };
    c.ready();
    // SAFETY: lists of as many entries as the numbers state.
    let status = unsafe { kvl_shard_lengths(first, count, batch, seq, lengths, starts, offsets, a, b, d) };
    c.check(status)
}

pub fn shard_slots(mut c: Call) -> i32 {
    c.spoil_rate(0.06);
    let (first, count) = (c.rng.below(50) as i64, c.rng.below(50) as i64);
    let (batch, seq) = (c.rng.below(6) as i64, c.rng.below(20) as i64);
    let (first, count, batch, seq) = (c.number(first), c.number(count), c.number(batch), c.number(seq));
    let positions = c.list(product(&[batch]), &[-1, i32::MIN, i32::MAX], |c, _| c.rng.below(90) as i32).at;
    let slots: *mut i32 = c.output(product(&[batch, seq]));
    c.may_write(slots, product(&[batch, seq]));
    c.ready();
    // SAFETY: lists of as many entries as the numbers state.
    let status = unsafe { kvl_shard_slots(first, count, batch, seq, positions, slots) };
    c.check(status)
}

pub fn shard_view(mut c: Call) -> i32 {
    c.spoil_rate(0.06);
    let (shape, dtype) = (c.shape(), c.dtype());
    let mut whole = c.tensor(dtype, shape, true);
    c.settle(&mut whole);
    let axis = c.rng.below(4);
    let first = c.rng.between(0, shape[axis] as usize);
    let count = c.rng.between(0, shape[axis] as usize - first) as i64;
    let (axis, first, count) = (c.code(axis as i32), c.number(first as i64), c.number(count));
    let view = c.view(&whole);
    let (view, part) = (c.fixed(view), c.output::<kvl_view>(Some(1)));
    c.may_write(part, Some(1));
    c.ready();
    // SAFETY: structs, or null.
    let status = unsafe { kvl_shard_view(view, axis, first, count, part) };
    if status == 0 {
        // SAFETY: just written.
        let kvl_view { data, dtype, reserved, shape, strides, bytes } = unsafe { part.read_unaligned() };
        let part = crate::memory::Tensor { data, dtype, reserved, shape, strides, bytes };
        assert!(part.is_empty() || part.fits(&c.arena), "{part:?} leaves {whole:?}");
    }
    c.check(status)
}
