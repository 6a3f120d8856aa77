//! Calls that operate on the caches of all layers.

use crate::abi::*;
use crate::call::{Call, List, product};
use crate::memory::{FP8, Tensor};
use crate::places::*;
use crate::targets::sharing;

/// The caches of several layers, and the arguments of the call for them.
struct Cache {
    at: *const kvl_cache,
    layers: *const kvl_kv_layer,
    num_layers: usize,
    places: Places,
    layout: Given,
    tensors: Vec<Plane>,
    /// Head sizes of K, by layer.
    dims: Vec<i64>,
    /// Heads, and their size in K, by layer.
    heads: Vec<(i64, i64)>,
    /// The lengths of a valid call.
    right: Vec<i64>,
    lengths: List<i32>,
    /// The number of entries of lists with one entry per sequence; `None` if it overflows.
    rows: Option<i64>,
}

/// Units, or scales.
struct Plane {
    tensor: Tensor,
    /// The slots of an entry.
    slots: i64,
    /// The slots that may be written together: those that share scales.
    together: i64,
}

/// By layer: heads, head sizes of K and of V; V may be absent.
type Heads = Vec<(i64, i64, Option<i64>)>;

fn heads(c: &mut Call) -> Heads {
    let dim = |c: &mut Call| c.rng.pick(&[1, 2, 3, 8, 16, 17, 32, 33, 64]);
    (0..c.rng.between(1, 3))
        .map(|_| {
            let v = c.maybe(0.8).then(|| dim(c));
            (c.rng.between(1, 3) as i64, dim(c), v)
        })
        .collect()
}

/// Sequences with tokens; one has overwritten older tokens if `wraps`.
fn right_lengths(c: &mut Call, places: &Places, wraps: bool) -> Vec<i64> {
    let most = |row| {
        if wraps {
            places.room(row)
        } else {
            places.room(row).min(if places.kind == RING { places.axes[1] } else { i64::MAX })
        }
    };
    (0..places.rows as usize).map(|row| c.rng.between(0, most(row) as usize) as i64).collect()
}

impl Cache {
    fn any(c: &mut Call, kinds: &[i32], what: Use, wraps: bool) -> Self {
        let (rows, room) = (c.rng.between(1, 5) as i64, c.rng.between(0, 24) as i64);
        // A hostile call can have layouts that it refuses.
        let kind = if c.hit() { c.rng.between(0, 4) as i32 } else { c.rng.pick(kinds) };
        let places = Places::new(c, kind, rows, room, 1, what);
        let right = right_lengths(c, &places, wraps);
        let heads = heads(c);
        Self::new(c, places, &heads, right)
    }

    fn new(c: &mut Call, places: Places, heads: &Heads, right: Vec<i64>) -> Self {
        let [k0, k1] = places.axes;
        c.moves = true;
        let mut tensors: Vec<Plane> = Vec::new();
        let mut layers = Vec::new();
        for &(heads, dim, v_dim) in heads {
            let mut view = |c: &mut Call, dim: i64| {
                let format = c.format(dim);
                let mut tensor = c.tensor(format, [k0, k1, heads, dim], false);
                let mut scales = c.scales(format, tensor.shape, false);
                if let Some(Plane { tensor: other, .. }) = tensors.first() {
                    c.alias(&mut tensor, other);
                    scales.iter_mut().for_each(|scales| c.alias(scales, other));
                }
                c.settle(&mut tensor);
                c.settle_scales(&mut scales);
                let own = scales.filter(|_| !FP8.contains(&format));
                let together = own.map_or(1, |scales| sharing(k1, scales.shape[1]) as i64);
                tensors.push(Plane { tensor, slots: 1, together });
                tensors.extend(own.map(|tensor| Plane { tensor, slots: together, together }));
                (c.view(&tensor), scales)
            };
            let (k, k_scales) = view(c, dim);
            let (v, v_scales) = v_dim.map_or((zeroed(), None), |dim| view(c, dim));
            layers.push(kvl_kv_layer { k, v, scales: c.scales_of([&k_scales, &v_scales]) });
        }
        let num_layers = if c.hit() { 0 } else { layers.len() };
        let first = layers[0].k.shape;
        let layers = c.arena.copy(&layers, 0).cast_const();
        let layers = if c.hit() && c.maybe(0.2) { std::ptr::null() } else { layers };
        let layout = places.give(c, first[1]);
        let rows = Some(layout.row_count(first[0])).filter(|&n| n >= 0);
        let wrong = [-1, i32::MIN, i32::MAX, k1 as i32, k1 as i32 + 1];
        let lengths = c.list(rows, &wrong, |_, b| right.get(b).copied().unwrap_or(0) as i32);
        let cache = kvl_cache { layers, num_layers, layout: layout.at, lengths: lengths.at.cast_mut(), ..zeroed() };
        let at = c.sized(&cache, &[]);
        let dims = heads.iter().map(|h| h.1).collect();
        let heads = heads.iter().map(|h| (h.0, h.1)).collect();
        Self { at, layers, num_layers, places, layout, tensors, dims, heads, right, lengths, rows }
    }

    fn length(&self, row: i64) -> i64 {
        usize::try_from(row).ok().and_then(|row| self.lengths.values.get(row)).map_or(0, |&n| n.into())
    }

    /// Fills the tokens of sequences, or all slots.
    fn fill(&self, c: &mut Call, all: bool) {
        let mut live = Slots::default();
        for row in 0..self.lengths.values.len() as i64 {
            live.extend(self.layout.places(row, 0..self.length(row), self.length(row)));
        }
        for &Plane { ref tensor, slots, .. } in &self.tensors {
            let holds = |row: usize, slot| live.contains(&(row as i64, slot));
            c.fill(tensor, |at| all || (0..slots).any(|i| holds(at[0], at[1] as i64 * slots + i)));
        }
    }

    /// Slots that the call writes; with them, those that share scales.
    fn writes(&self, c: &mut Call, places: &Slots) {
        for &Plane { ref tensor, slots, together } in &self.tensors {
            c.writes(tensor, |at| {
                let first = at[1] as i64 * slots / together * together;
                (0..together).any(|i| places.contains(&(at[0] as i64, first + i)))
            });
        }
    }

    /// Slots of sequences that the call fills with zeros, and their scales, if no other sequence shares them.
    fn clears(&self, c: &mut Call, sequences: &[Slots]) {
        for &Plane { ref tensor, slots, .. } in &self.tensors {
            c.writes(tensor, |[row, entry, _]| {
                let all = |places: &Slots| (0..slots).all(|i| places.contains(&(row as i64, entry as i64 * slots + i)));
                sequences.iter().any(all)
            });
        }
    }

    fn changes_lengths(&self, c: &mut Call) {
        let n = self.lengths.values.len() as i64;
        let n = if self.lengths.at.is_null() { None } else { Some(n) };
        c.may_write(self.lengths.at.cast_mut(), n);
    }

    /// A list with one entry per sequence.
    fn list(&self, c: &mut Call, right: &[i64]) -> List<i32> {
        let wrong = [-1, i32::MIN, i32::MAX, 1000, self.places.rows as i32];
        c.list(self.rows, &wrong, |_, b| right.get(b).copied().unwrap_or(0) as i32)
    }

    /// Some of the rows, without one.
    fn some_rows(&self, c: &mut Call, but: i64) -> (usize, List<i32>) {
        let mut rows = c.permutation(self.places.rows as usize);
        rows.retain(|&row| i64::from(row) != but);
        let n = c.rng.between(0, rows.len()) as i64;
        let n = c.number(n);
        let wrong = [-1, i32::MIN, i32::MAX, self.places.rows as i32, 0, but as i32];
        let list = c.list(product(&[n]), &wrong, |_, i| rows.get(i).copied().unwrap_or(0));
        (n as usize, list)
    }
}

const ALL: [i32; 5] = [CONTIGUOUS, RING, PAGED, INDIRECT, RAGGED];

pub fn cache_set_lengths(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let cache = Cache::any(&mut c, &ALL, Use::Read, true);
    let (n, rows) = cache.some_rows(&mut c, -1);
    let wrong = [-1, i32::MIN, i32::MAX, 100];
    let values = c.list(product(&[n as i64]), &wrong, |c, i| {
        let row = rows.values.get(i).map_or(0, |&row| row.clamp(0, cache.places.rows as i32 - 1));
        c.rng.between(0, cache.places.room(row as usize) as usize) as i32
    });
    cache.changes_lengths(&mut c);
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_set_lengths(cache.at, rows.at, values.at, n) };
    c.check(status)
}

pub fn cache_advance(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let cache = Cache::any(&mut c, &ALL, Use::Read, true);
    let counts: Vec<i64> = (0..cache.right.len())
        .map(|b| c.rng.between(0, (cache.places.room(b) - cache.right[b]) as usize) as i64)
        .collect();
    let counts = cache.list(&mut c, &counts);
    cache.changes_lengths(&mut c);
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_advance(cache.at, counts.at) };
    c.check(status)
}

pub fn cache_truncate(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    // Rows that use only their own tokens do not conflict.
    let cache = Cache::any(&mut c, &ALL, Use::Write, true);
    let turning = cache.places.axes[1] - cache.places.sinks;
    let window = c.maybe(0.5).then(|| c.rng.between(0, turning.max(0) as usize) as i64);
    let lengths: Vec<i64> = (cache.right.iter())
        .map(|&old| {
            let lost = cache.places.kind == RING && old > cache.places.axes[1];
            let back = if lost { window.map_or(0, |window| turning - window) } else { old };
            old - c.rng.between(0, back.min(old) as usize) as i64
        })
        .collect();
    let lengths = cache.list(&mut c, &lengths);
    // 2 is the flag of a left window.
    let causal = i32::from(c.maybe(0.3));
    let flags = c.code(i32::from(window.is_some()) << 1 | causal) as u32;
    let window = c.number(window.unwrap_or(0));
    cache.changes_lengths(&mut c);
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_truncate(cache.at, lengths.at, flags, window) };
    c.check(status)
}

pub fn cache_reset(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let zero = c.maybe(0.6);
    let kinds: &[i32] = if zero { &[CONTIGUOUS, RING, PAGED, RAGGED] } else { &ALL };
    let cache = Cache::any(&mut c, kinds, if zero { Use::Write } else { Use::Read }, true);
    cache.fill(&mut c, false);
    let (n, rows) = cache.some_rows(&mut c, -1);
    let zero = c.code(zero.into());
    let mut sequences = Vec::new();
    let [_, slots] = cache.places.axes;
    for &row in if zero == 1 { &rows.values[..] } else { &[] } {
        let (row, mut cleared) = (i64::from(row), Slots::default());
        let size = cache.tensors[0].tensor.shape[1].max(1);
        match cache.layout.kind() {
            PAGED => {
                let end = cache.length(row).max(0).saturating_add(size - 1) / size * size;
                cleared.extend(cache.layout.places(row, 0..end, end));
            }
            RAGGED if row >= 0 => {
                let end = cache.layout.capacity(row as usize);
                cleared.extend(cache.layout.places(row, 0..end, end));
            }
            _ => cleared.extend((0..slots.max(size).min(1 << 14)).map(|slot| (row, slot))),
        }
        sequences.push(cleared);
    }
    cache.clears(&mut c, &sequences);
    cache.changes_lengths(&mut c);
    let runner = c.runner();
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_reset(runner, cache.at, rows.at, n, zero) };
    c.check(status)
}

pub fn cache_insert_sequence(mut c: Call) -> i32 {
    c.spoil_rate(0.02);
    let heads = heads(&mut c);
    let side = |c: &mut Call, kinds: &[i32], what: Use, wraps: bool| {
        let (rows, room) = (c.rng.between(1, 4) as i64, c.rng.between(0, 24) as i64);
        let kind = if c.hit() { c.rng.between(0, 4) as i32 } else { c.rng.pick(kinds) };
        let places = Places::new(c, kind, rows, room, 1, what);
        let right = right_lengths(c, &places, wraps);
        let mut heads = heads.clone();
        if c.hit() {
            heads.pop();
            heads.push((2, 3, None));
        }
        Cache::new(c, places, &heads, right)
    };
    let to = side(&mut c, &[CONTIGUOUS, RING, PAGED, RAGGED], Use::Write, true);
    // A ring that still holds all tokens.
    let from = side(&mut c, &ALL, Use::Read, false);
    from.fill(&mut c, false);
    // Tokens that stay in a block are read.
    to.fill(&mut c, false);
    let row = c.rng.below(to.places.rows as usize) as i64;
    let from_row = c.rng.below(from.places.rows as usize) as i64;
    let most = from.right[from_row as usize].min(to.places.room(row as usize));
    let length = c.rng.between(0, most as usize) as i64;
    let (row, from_row, length) = (c.number(row), c.number(from_row), c.number(length));
    to.writes(&mut c, &to.layout.places(row, 0..length, length).collect());
    to.changes_lengths(&mut c);
    let (context, runner) = (c.context(), c.runner());
    let from_at = if c.hit() && c.maybe(0.3) { to.at } else { from.at };
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_insert_sequence(context, runner, to.at, row, from_at, from_row, length) };
    c.check(status)
}

pub fn cache_copy_prefix(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let cache = Cache::any(&mut c, &[CONTIGUOUS, RING, PAGED, RAGGED], Use::Write, true);
    cache.fill(&mut c, false);
    let from = c.rng.below(cache.places.rows as usize) as i64;
    let length = cache.right[from as usize];
    let (n, to) = cache.some_rows(&mut c, from);
    let room = (0..cache.places.rows as usize).map(|row| cache.places.room(row)).min().unwrap_or(0);
    let lost = cache.places.kind == RING && length > cache.places.axes[1];
    let tokens = if lost { length } else { c.rng.between(0, length.min(room) as usize) as i64 };
    let (from, tokens) = (c.number(from), c.number(tokens));
    let mut written = Slots::default();
    for &row in &to.values {
        written.extend(cache.layout.places(row.into(), 0..tokens, tokens));
    }
    cache.writes(&mut c, &written);
    cache.changes_lengths(&mut c);
    let (context, runner) = (c.context(), c.runner());
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_copy_prefix(context, runner, cache.at, from, to.at, n, tokens) };
    c.check(status)
}

pub fn cache_reorder_workspace_size(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let cache = Cache::any(&mut c, &ALL, Use::Read, true);
    let (runner, bytes) = (c.runner(), c.output::<usize>(Some(1)));
    c.may_write(bytes, Some(1));
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_reorder_workspace_size(cache.at, runner, bytes) };
    // Strides and lengths are not read, so that their values do not matter.
    c.check_answer(status)
}

pub fn cache_reorder(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let cache = Cache::any(&mut c, &[CONTIGUOUS, RING], Use::Write, true);
    cache.fill(&mut c, false);
    let parents: Vec<i64> = (0..cache.places.rows).map(|_| c.rng.below(cache.places.rows as usize) as i64).collect();
    let parents = cache.list(&mut c, &parents);
    let mut written = Slots::default();
    for (row, &parent) in parents.values.iter().enumerate() {
        if row as i32 != parent {
            let slots = cache.length(parent.into()).min(cache.tensors[0].tensor.shape[1]).min(1 << 14);
            written.extend((0..slots).map(|slot| (row as i64, slot)));
        }
    }
    cache.writes(&mut c, &written);
    cache.changes_lengths(&mut c);
    let (context, runner) = (c.context(), c.runner());
    let mut needed = 0;
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_reorder_workspace_size(cache.at, runner, &raw mut needed) };
    if status != 0 || needed > 64 << 20 {
        needed = 64;
        c.hit();
    }
    if c.hit() {
        needed = c.rng.below(needed + 1);
    }
    let skip = if c.hit() { c.rng.between(1, 63) } else { 0 };
    let workspace = c.arena.scratch(needed, skip);
    c.ready();
    // SAFETY: as above.
    let status = unsafe { kvl_cache_reorder(context, runner, workspace, needed, cache.at, parents.at) };
    c.check(status)
}

pub fn cache_reorder_table_workspace_size(mut c: Call) -> i32 {
    let (rows, capacity) = (c.rng.below(9) as i64, c.rng.below(50) as i64);
    let (rows, capacity, bytes) = (c.number(rows), c.number(capacity), c.output::<usize>(Some(1)));
    c.may_write(bytes, Some(1));
    c.ready();
    // SAFETY: space for the result, or null.
    let status = unsafe { kvl_cache_reorder_table_workspace_size(rows, capacity, bytes) };
    c.check(status)
}

pub fn cache_reorder_table(mut c: Call) -> i32 {
    c.spoil_rate(0.06);
    let (rows, capacity) = (c.rng.between(0, 6) as i64, c.rng.between(0, 30) as i64);
    let length = c.rng.between(0, capacity as usize) as i32;
    // Rows that use tokens of each other have equal lengths.
    let apart = c.maybe(0.2);
    let (rows, capacity) = (c.number(rows), c.number(capacity));
    let wrong = [-1, i32::MIN, i32::MAX, rows as i32, capacity as i32];
    let entries = product(&[rows, capacity]);
    let any = |c: &mut Call| c.rng.below(rows.clamp(1, 100) as usize) as i32;
    let table = c.list(entries, &wrong, |c, i| if apart { (i as i64 / capacity) as i32 } else { any(c) });
    let lengths =
        c.list(product(&[rows]), &wrong, |c, _| if apart { c.rng.between(0, length as usize) as i32 } else { length });
    let parents = c.list(product(&[rows]), &wrong, |c, b| if apart { b as i32 } else { any(c) });
    let mut needed = 0;
    // SAFETY: space for the result.
    let status = unsafe { kvl_cache_reorder_table_workspace_size(rows, capacity, &raw mut needed) };
    if status != 0 || needed > 64 << 20 {
        needed = 64;
        c.hit();
    }
    if c.hit() {
        needed = c.rng.below(needed + 1);
    }
    let skip = if c.hit() { c.rng.between(1, 63) } else { 0 };
    let workspace = c.arena.scratch(needed, skip);
    let n = |list: &List<i32>| Some(list.values.len() as i64);
    c.may_write(table.at.cast_mut(), n(&table));
    c.may_write(lengths.at.cast_mut(), n(&lengths));
    let table = if c.hit() && c.maybe(0.3) { lengths.at } else { table.at };
    if table == lengths.at && entries != product(&[rows]) {
        // The list would be too short.
        return 4;
    }
    c.ready();
    // SAFETY: lists of as many entries as the numbers state.
    let status = unsafe {
        let (table, lengths) = (table.cast_mut(), lengths.at.cast_mut());
        kvl_cache_reorder_table(workspace, needed, table, rows, capacity, lengths, parents.at)
    };
    c.check(status)
}

pub fn cache_set_table_tokens(mut c: Call) -> i32 {
    c.spoil_rate(0.08);
    let (rows, capacity) = (c.rng.between(0, 6) as i64, c.rng.between(0, 30) as i64);
    let tokens = c.rng.between(0, capacity as usize) as i64;
    let room = (capacity - tokens) as usize;
    let (rows, capacity, tokens) = (c.number(rows), c.number(capacity), c.number(tokens));
    let table: *mut i32 = c.output(product(&[rows, capacity]));
    c.may_write(table, product(&[rows, capacity]));
    let wrong = [-1, i32::MIN, i32::MAX, capacity as i32, (capacity as i32).wrapping_add(1)];
    let positions = c.list(product(&[rows]), &wrong, |c, _| c.rng.between(0, room) as i32);
    c.ready();
    // SAFETY: lists of as many entries as the numbers state.
    let status = unsafe { kvl_cache_set_table_tokens(table, rows, capacity, positions.at, tokens) };
    c.check(status)
}

/// A list of so many rotations for the layers, and which of them are none.
fn rotations(c: &mut Call, cache: &Cache, num_ropes: usize) -> (*const *const kvl_rope_params, Vec<bool>) {
    let mut ropes: Vec<*const kvl_rope_params> = Vec::new();
    let least = cache.dims.iter().copied().min().unwrap_or(0);
    for i in 0..num_ropes {
        // One rotation can serve all layers.
        let dim = if num_ropes == 1 { least } else { cache.dims.get(i).copied().unwrap_or(least) };
        if dim < 2 || c.maybe(0.2) {
            ropes.push(std::ptr::null());
            continue;
        }
        let rotary_dim = 2 * c.rng.between(1, dim as usize / 2) as i64;
        let rotary_dim = c.number(rotary_dim);
        let pairs = (0..=4096).contains(&rotary_dim).then_some(rotary_dim / 2).or(Some(1));
        let wrong = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        let inv_freq = c.list(pairs, &wrong, |c, _| f64::from(c.value().abs())).at;
        let cos = if c.hit() { c.arena.copy(&[1.0f32], 0) } else { std::ptr::null_mut() };
        let pairing = i32::from(c.maybe(0.5));
        // The lowest bit of all dims together divides each.
        let every = if num_ropes == 1 { cache.dims.iter().fold(0, |all, dim| all | dim) } else { dim };
        let k_hadamard = c.hadamard(every);
        let (pairing, reserved) = (c.code(pairing), c.code(0));
        let params = kvl_rope_params { pairing, reserved, rotary_dim, inv_freq, cos, k_hadamard, ..zeroed() };
        ropes.push(c.sized(&params, &[]));
    }
    let none = ropes.iter().map(|rope| rope.is_null()).collect();
    let ropes = c.arena.copy(&ropes, 0).cast_const();
    let ropes = if c.hit() && c.maybe(0.2) { std::ptr::null() } else { ropes };
    (ropes, none)
}

pub fn cache_evict(mut c: Call) -> i32 {
    c.spoil_rate(0.025);
    let cache = Cache::any(&mut c, &[CONTIGUOUS, PAGED, RAGGED], Use::Write, true);
    cache.fill(&mut c, false);
    let row = c.rng.below(cache.places.rows as usize) as i64;
    let length = cache.right[row as usize] as usize;
    let first = c.rng.between(0, length);
    let end = c.rng.between(first, length) as i64;
    let (row, first, end) = (c.number(row), c.number(first as i64), c.number(end));
    let layers = cache.dims.len();
    let num_ropes = c.rng.pick(&[0, 1, layers, layers]);
    let num_ropes = if c.hit() { c.rng.between(0, 5) } else { num_ropes };
    let (ropes, _) = rotations(&mut c, &cache, num_ropes);
    let left = cache.length(row).saturating_sub(end.saturating_sub(first));
    let left = if first == end { first } else { left };
    cache.writes(&mut c, &cache.layout.places(row, first..left, left).collect());
    cache.changes_lengths(&mut c);
    let (context, runner) = (c.context(), c.runner());
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_evict(context, runner, cache.at, row, first, end, ropes, num_ropes) };
    c.check(status)
}

pub fn cache_evict_running(mut c: Call) -> i32 {
    c.spoil_rate(0.02);
    let cache = Cache::any(&mut c, &[CONTIGUOUS, PAGED, RAGGED], Use::Write, true);
    cache.fill(&mut c, false);
    let row = c.rng.below(cache.places.rows as usize) as i64;
    let length = cache.right[row as usize] as usize;
    let first = c.rng.between(0, length.min(6));
    let end = c.rng.between(first, length) as i64;
    let kept = first as i64 + c.rng.below(3) as i64;
    let (row, first, end) = (c.number(row), c.number(first as i64), c.number(end));
    let dropped = c.rng.below(10_000) as i64;
    let dropped = c.number(dropped);
    let layers = cache.dims.len();
    let num_ropes = c.rng.pick(&[0, layers, layers]);
    let num_ropes = if c.hit() { c.rng.between(0, 5) } else { num_ropes };
    let (ropes, none) = rotations(&mut c, &cache, num_ropes);
    let mut keys: Vec<kvl_const_view> = Vec::new();
    for (i, &none) in none.iter().enumerate() {
        if none {
            // Nobody looks at it.
            keys.push(zeroed());
            continue;
        }
        let (heads, dim) = cache.heads.get(i).copied().unwrap_or((1, 2));
        let dtype = c.dtype();
        let mut tensor = c.tensor(dtype, [1, kept, heads, dim], true);
        c.alias(&mut tensor, &cache.tensors[0].tensor);
        c.settle(&mut tensor);
        c.fill(&tensor, |_| true);
        keys.push(c.const_view(&tensor));
    }
    let keys = c.arena.copy(&keys, 0).cast_const();
    let keys = if c.hit() && c.maybe(0.2) { std::ptr::null() } else { keys };
    let left = cache.length(row).saturating_sub(end.saturating_sub(first));
    let left = if first == end { 0 } else { left };
    cache.writes(&mut c, &cache.layout.places(row, 0..left, left).collect());
    cache.changes_lengths(&mut c);
    let (context, runner) = (c.context(), c.runner());
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status =
        unsafe { kvl_cache_evict_running(context, runner, cache.at, row, first, end, dropped, keys, ropes, num_ropes) };
    c.check(status)
}

pub fn cache_copy_pages(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let cache = Cache::any(&mut c, &[PAGED], Use::Read, true);
    cache.fill(&mut c, true);
    let pages = c.permutation(cache.places.axes[0] as usize);
    // The first pages are read, others are written, each once.
    let sources = c.rng.between(1, pages.len().max(1)).min(pages.len());
    let n = c.rng.between(0, pages.len() - sources) as i64;
    let n = c.number(n);
    let wrong = [-1, i32::MIN, i32::MAX, pages.len() as i32, 0];
    let moves = c.list(n.checked_mul(2), &wrong, |c, i| match i % 2 {
        0 if sources > 0 => pages[c.rng.below(sources)],
        _ => pages.get(sources + i / 2).copied().unwrap_or(0),
    });
    let mut written = Slots::default();
    let size = cache.tensors[0].tensor.shape[1].clamp(0, 1 << 14);
    for pair in moves.values.chunks_exact(2) {
        written.extend((0..size).map(|slot| (i64::from(pair[1]), slot)));
    }
    cache.writes(&mut c, &written);
    let (context, runner) = (c.context(), c.runner());
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_cache_copy_pages(context, runner, cache.layers, cache.num_layers, moves.at, n as usize) };
    c.check_answer(status)
}

pub fn cache_defragment(mut c: Call) -> i32 {
    c.spoil_rate(0.025);
    let cache = Cache::any(&mut c, &[PAGED], Use::Read, true);
    cache.fill(&mut c, true);
    let (rows, per_row) = (c.number(cache.places.rows), c.number(cache.places.pages_per_row));
    let shape = cache.tensors[0].tensor.shape;
    let pages = shape[0];
    let wrong = [-1, i32::MIN, i32::MAX, pages as i32];
    let table = c.list(product(&[rows, per_row]), &wrong, |_, i| cache.places.table.get(i).copied().unwrap_or(0));
    let lengths =
        c.list(product(&[rows]), &wrong, |_, b| cache.right.get(b).copied().unwrap_or(0).clamp(0, 1 << 20) as i32);
    let map = match product(&[pages]).filter(|&n| n <= 1 << 20) {
        // It may change even if the call has no effect.
        Some(n) => c.arena.scratch(4 * n as usize, 0).cast::<i32>(),
        None => std::ptr::null_mut(),
    };
    let map = if c.hit() && c.maybe(0.3) { std::ptr::null_mut() } else { map };
    let used: *mut i64 = c.output(Some(1));

    let mut in_use = std::collections::BTreeSet::<i32>::new();
    for (row, &length) in lengths.values.iter().enumerate() {
        let n = i64::from(length.max(0)).saturating_add(shape[1].max(1) - 1) / shape[1].max(1);
        let first = (row as i64).saturating_mul(per_row).clamp(0, table.values.len() as i64) as usize;
        in_use.extend(table.values[first..].iter().take(n as usize));
    }
    let mut written = Slots::default();
    for page in (0..in_use.len() as i32).filter(|page| !in_use.contains(page)) {
        written.extend((0..shape[1].clamp(0, 1 << 14)).map(|slot| (i64::from(page), slot)));
    }
    cache.writes(&mut c, &written);
    c.may_write(table.at.cast_mut(), Some(table.values.len() as i64));
    c.may_write(used, Some(1));
    let (context, runner) = (c.context(), c.runner());
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe {
        let table = table.at.cast_mut();
        let (layers, n) = (cache.layers, cache.num_layers);
        kvl_cache_defragment(context, runner, layers, n, table, rows, per_row, lengths.at, map, used)
    };
    if status == 0 {
        // SAFETY: just written.
        assert_eq!(unsafe { used.read_unaligned() }, in_use.len() as i64);
    }
    c.check_answer(status)
}
