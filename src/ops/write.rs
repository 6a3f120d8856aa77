//! The cache write.

use crate::context::Context;
use crate::error::{Result, ensure, fail};
use crate::kernels::{Op, RopeArgs};
use crate::ops::rope::{RawRope, Rope, TokenAngles, token_copy};
use crate::ops::{COPY_GRAIN, TOKENS_PER_TILE};
use crate::parallel::{Runner, for_each_tile, workers_for};
use crate::view::{BATCH, DIM, HEADS, RawView, SEQ, View, ViewMut};

/// New keys and values, the caches they go to, and where.
///
/// `k` is `[batch, seq, kv_heads, dim]`, `k_cache` is `[rows, capacity, kv_heads, dim]`, both of any strides and types
/// (converted to nearest, ties to even); `v` likewise, with a `dim` of its own.
#[derive(Debug)]
pub struct KvWrite<'a> {
    /// New keys.
    pub k: View<'a>,
    /// New values.
    pub v: View<'a>,
    /// Where keys go.
    pub k_cache: ViewMut<'a>,
    /// Where values go.
    pub v_cache: ViewMut<'a>,
    /// Where in the cache.
    pub to: Destination<'a>,
    /// Rotates the keys on their way: the same bits as [`rope()`](crate::rope()) into the cache's type.
    pub rope: Option<Rope<'a>>,
}

/// Which slots new tokens are written to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Destination<'a> {
    /// `[batch]`: token t of row b goes to slot `positions[b] + t`. Ignored, and may be empty, when `slots` is given.
    pub positions: &'a [i32],
    /// `[batch]`: only the first `counts[b]` tokens of row b are written; all if absent (padded prompts).
    pub counts: Option<&'a [i32]>,
    /// `[batch]`: source row b goes to row `rows[b]` of the cache; to row b if absent.
    pub rows: Option<&'a [i32]>,
    /// `[batch, seq]`: the slot of each token; -1 skips it.
    pub slots: Option<&'a [i32]>,
}

impl Destination<'_> {
    fn count(&self, row: usize, seq: usize) -> usize {
        self.counts.map_or(seq, |c| c[row] as usize)
    }

    fn row(&self, row: usize) -> usize {
        self.rows.map_or(row, |r| r[row] as usize)
    }

    /// The slot of a token that is written.
    fn slot(&self, row: usize, token: usize, seq: usize) -> Option<usize> {
        if token >= self.count(row, seq) {
            return None;
        }
        match self.slots {
            Some(slots) => usize::try_from(slots[row * seq + token]).ok(),
            None => Some(self.positions[row] as usize + token),
        }
    }

    fn validate(&self, batch: usize, seq: usize, cache: &RawView) -> Result<()> {
        let (rows, capacity) = (cache.shape[BATCH], cache.shape[SEQ]);
        for (name, list) in [("counts", self.counts), ("rows", self.rows)] {
            if let Some(list) = list {
                let n = list.len();
                ensure!(n == batch, Shape, "{name} has {n} entries, but k has batch = {batch}");
            }
        }
        for row in 0..batch {
            if let Some(counts) = self.counts {
                let count = counts[row];
                ensure!(
                    count >= 0 && count as usize <= seq,
                    OutOfRange,
                    "counts[{row}] is {count}, but k has seq = {seq}"
                );
            }
            let target = self.rows.map_or(row as i64, |r| r[row] as i64);
            ensure!(
                target >= 0 && (target as usize) < rows,
                OutOfRange,
                "row {row} is to be written to cache row {target}, but the cache has {rows} rows"
            );
        }
        match self.slots {
            None => {
                let n = self.positions.len();
                ensure!(n == batch, Shape, "positions has {n} entries, but k has batch = {batch}");
                for row in 0..batch {
                    let (position, count) = (self.positions[row] as i64, self.count(row, seq));
                    ensure!(position >= 0, OutOfRange, "positions[{row}] is {position}, which is negative");
                    ensure!(
                        position + count as i64 <= capacity as i64,
                        Capacity,
                        "row {row} writes {count} tokens at position {position}, but the cache holds {capacity}"
                    );
                }
            }
            Some(slots) => {
                let n = slots.len();
                ensure!(n == batch * seq, Shape, "slots has {n} entries, but k has batch * seq = {}", batch * seq);
                for row in 0..batch {
                    for token in 0..self.count(row, seq) {
                        let slot = slots[row * seq + token];
                        ensure!(slot >= -1, OutOfRange, "slots[{row}, {token}] is {slot}: only -1 stands for no slot");
                        ensure!(
                            (slot as i64) < capacity as i64,
                            Capacity,
                            "slots[{row}, {token}] is {slot}, but the cache holds {capacity}"
                        );
                    }
                    self.no_slot_twice(row, row, seq)?;
                }
            }
        }
        if self.rows.is_some() {
            for row in 1..batch {
                for other in 0..row {
                    if self.row(row) == self.row(other) {
                        self.no_slot_twice(row, other, seq)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Fails if a token of row `a` and another one of row `b` go to the same slot of the same cache row.
    fn no_slot_twice(&self, a: usize, b: usize, seq: usize) -> Result<()> {
        let duplicate = |slot: usize, i: usize, j: usize| {
            fail!(DuplicateSlot, "tokens [{b}, {j}] and [{a}, {i}] both go to slot {slot} of cache row {}", self.row(a))
        };
        if self.slots.is_none() {
            let (pa, pb) = (self.positions[a] as usize, self.positions[b] as usize);
            let (na, nb) = (self.count(a, seq), self.count(b, seq));
            let first = pa.max(pb);
            if first < (pa + na).min(pb + nb) {
                return duplicate(first, first - pa, first - pb);
            }
            return Ok(());
        }
        if a == b {
            // In order is the usual case and needs one look.
            let mut last = None;
            let ascending = (0..self.count(a, seq)).filter_map(|t| self.slot(a, t, seq)).all(|slot| {
                let ok = last.is_none_or(|l| l < slot);
                last = Some(slot);
                ok
            });
            if ascending {
                return Ok(());
            }
        }
        for i in 0..self.count(a, seq) {
            let Some(slot) = self.slot(a, i, seq) else { continue };
            for j in 0..if a == b { i } else { self.count(b, seq) } {
                if self.slot(b, j, seq) == Some(slot) {
                    return duplicate(slot, i, j);
                }
            }
        }
        Ok(())
    }
}

/// Writes new keys and values into their caches, all rows in one call, each at its own place.
///
/// Everything is checked before the first byte is written: nothing is clamped, nothing overwrites what it was not asked
/// to. Lengths are the caller's to advance.
///
/// Thread safety: may be called from any number of threads at once on disjoint caches or disjoint rows.
///
/// # Errors
/// [`Status::Capacity`](crate::Status::Capacity) when a slot is past the end, [`Status::OutOfRange`](crate::Status::OutOfRange)
/// for a negative position or a row that does not exist, [`Status::DuplicateSlot`](crate::Status::DuplicateSlot) when two
/// tokens meet.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// // Two rows with room for eight tokens, one head of four elements; row 0 holds 5 tokens, row 1 none.
/// let (mut keys, mut values) = (vec![half::f16::ZERO; 64], vec![half::f16::ZERO; 64]);
/// let (k, v) = (vec![1.0f32; 16], vec![2.0f32; 16]);
/// kv_write(&context, &Serial, KvWrite {
///     k: View::new(&k, [2, 2, 1, 4])?,
///     v: View::new(&v, [2, 2, 1, 4])?,
///     k_cache: ViewMut::new(&mut keys, [2, 8, 1, 4])?,
///     v_cache: ViewMut::new(&mut values, [2, 8, 1, 4])?,
///     to: Destination { positions: &[5, 0], counts: Some(&[2, 1]), ..Default::default() },
///     rope: None,
/// })?;
/// assert_eq!(keys[5 * 4].to_f32(), 1.0);
/// assert_eq!(values[8 * 4].to_f32(), 2.0);
/// assert_eq!(values[9 * 4].to_f32(), 0.0);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn kv_write(context: &Context, runner: &dyn Runner, write: KvWrite) -> Result<()> {
    let rope = write.rope.as_ref().map(Rope::raw);
    let keys = (write.k.raw, write.k_cache.raw);
    let values = (write.v.raw, write.v_cache.raw);
    // SAFETY: the views borrow what they reach.
    unsafe { kv_write_raw(context, runner, keys, Some(values), &write.to, rope.as_ref()) }
}

/// # Safety
/// The memory that valid views reach is readable and, for the caches, writable, by this call alone.
pub(crate) unsafe fn kv_write_raw(
    context: &Context,
    runner: &dyn Runner,
    keys: (RawView, RawView),
    values: Option<(RawView, RawView)>,
    to: &Destination,
    rope: Option<&RawRope>,
) -> Result<()> {
    let (k, k_cache) = keys;
    check_pair("k", &k, "k_cache", &k_cache)?;
    if let Some((v, v_cache)) = &values {
        check_pair("v", v, "v_cache", v_cache)?;
        for axis in [BATCH, SEQ, HEADS] {
            k.same_axis("k", v, "v", axis)?;
            if axis != HEADS {
                k_cache.same_axis("k_cache", v_cache, "v_cache", axis)?;
            }
        }
        ensure!(!k_cache.overlaps(v_cache), Overlap, "k_cache and v_cache share memory");
        ensure!(!k_cache.overlaps(v), Overlap, "k_cache and v share memory");
        ensure!(!v_cache.overlaps(&k), Overlap, "v_cache and k share memory");
    }
    let [batch, seq, heads, dim] = k.shape;
    to.validate(batch, seq, &k_cache)?;
    if let Some(rope) = rope {
        rope.validate(&k)?;
    }
    let angles = context.angles();
    let k_copy = context.copy(Op::KvWrite, k.dtype, k_cache.dtype);
    let k_rope = context.rope(k.dtype, k_cache.dtype);
    let tokens = batch * seq;
    let workers = workers_for(runner, tokens * heads * dim, COPY_GRAIN);
    for_each_tile(runner, workers, tokens.div_ceil(TOKENS_PER_TILE), &|_, tile| {
        let mut token_angles = rope.map(|_| TokenAngles::new());
        for token in tile * TOKENS_PER_TILE..((tile + 1) * TOKENS_PER_TILE).min(tokens) {
            let (b, t) = (token / seq, token % seq);
            let Some(slot) = to.slot(b, t, seq) else { continue };
            let target = (to.row(b), slot);
            // SAFETY: the views and the destination are valid; no two tokens share a slot.
            unsafe {
                if !k.is_empty() {
                    match (rope, &mut token_angles) {
                        (Some(rope), Some(token_angles)) => {
                            let (cos, sin) = token_angles.at(rope, angles, rope.position(b, t, seq));
                            let copy = token_copy(&k, (b, t), &k_cache, target);
                            let (rotary_dim, pairing) = (rope.rotary_dim, rope.pairing);
                            k_rope(&RopeArgs { copy, rotary_dim, pairing, cos, sin });
                        }
                        _ => k_copy(&merge_heads(token_copy(&k, (b, t), &k_cache, target))),
                    }
                }
                if let Some((v, v_cache)) = &values
                    && !v.is_empty()
                {
                    let v_copy = context.copy(Op::KvWrite, v.dtype, v_cache.dtype);
                    v_copy(&merge_heads(token_copy(v, (b, t), v_cache, target)));
                }
            }
        }
    })
}

fn check_pair(name: &str, src: &RawView, cache_name: &str, cache: &RawView) -> Result<()> {
    src.validate(name)?;
    cache.validate_output(cache_name)?;
    for axis in [HEADS, DIM] {
        src.same_axis(name, cache, cache_name, axis)?;
    }
    ensure!(!src.overlaps(cache), Overlap, "{name} and {cache_name} share memory");
    Ok(())
}

/// Heads that lie together on both sides are one long vector.
fn merge_heads(args: crate::kernels::CopyArgs) -> crate::kernels::CopyArgs {
    let together = args.dim as isize;
    if args.src_dim == 1 && args.dst_dim == 1 && args.src_head == together && args.dst_head == together {
        return crate::kernels::CopyArgs { heads: 1, dim: args.heads * args.dim, ..args };
    }
    args
}
