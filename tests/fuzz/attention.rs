//! Calls of attention: sequences in any layout, masks, shared prefixes, segments of a sequence, and plans.

use crate::abi::*;
use crate::call::{Call, List, last_error, product};
use crate::memory::{INT8, MASK, Tensor};
use crate::places::*;
use std::mem::offset_of;

/// The function that takes the parameters.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain,
    /// With a shared prefix, and so without a left window.
    Shared,
    /// Of a span that leaves states: no ring, no ragged queries, no output.
    Span,
}

/// The valid part of an attention call that describes its sequences.
struct Rows {
    places: Places,
    /// The first two axes of the queries.
    q: [i64; 2],
    batch: i64,
    /// The most queries of a sequence.
    seq: i64,
    query_starts: Option<Vec<i32>>,
    lengths: Option<Vec<i32>>,
    starts: Option<Vec<i32>>,
    offsets: Option<Vec<i32>>,
    /// Of a sequence's queries, by row and query.
    positions: Option<Vec<Vec<i32>>>,
    prefixes: Option<Vec<i32>>,
    flags: i32,
    left: i64,
    right: i64,
}

/// The arguments of the call for them.
struct Said {
    layout: Given,
    params: kvl_attention_params,
    /// Entries of every list of rows.
    batch: Option<i64>,
    query_starts: List<i32>,
    lengths: List<i32>,
    starts: List<i32>,
}

impl Rows {
    fn new(c: &mut Call, batch: i64, seq: i64, keys: i64, form: Form) -> Self {
        let mut kind = if c.maybe(0.4) { CONTIGUOUS } else { c.rng.between(1, 4) as i32 };
        let mut ragged = c.maybe(0.3);
        if form == Form::Span && (kind == RING || ragged) {
            if !c.is_right() && c.maybe(0.1) {
                c.allow_error();
            } else {
                kind = if kind == RING { PAGED } else { kind };
                ragged = false;
            }
        }
        let places = Places::new(c, kind, batch, keys, 1, Use::Read);
        let n = batch as usize;
        let (mut q, mut most, mut query_starts) = ([batch, seq], seq, None);
        if ragged {
            let mut at = c.rng.below(3) as i32;
            let mut starts = vec![at];
            for _ in 0..n {
                at += c.rng.between(0, seq as usize) as i32;
                starts.push(at);
            }
            most = starts.windows(2).map(|s| i64::from(s[1] - s[0])).max().unwrap_or(0);
            q = [1, i64::from(at) + c.rng.below(3) as i64];
            query_starts = Some(starts);
        }

        let window = |c: &mut Call, probability: f64| -> Option<i64> {
            c.maybe(probability).then(|| c.rng.between(0, 39) as i64)
        };
        let left = window(c, if form == Form::Shared { 0.0 } else { 0.25 });
        let (mut left, right) = (left, window(c, 0.15));
        let mut lengths: Vec<i32> = (0..n).map(|b| c.rng.between(0, places.room(b) as usize) as i32).collect();
        let mut offsets = c.maybe(0.3).then(|| -> Vec<i32> {
            (0..n).map(|_| c.rng.between(0, 2 * keys as usize) as i32 - keys as i32 / 2).collect()
        });
        // A ring must still hold the keys that queries see.
        let (slots, turning) = (places.axes[1], places.axes[1] - places.sinks);
        let mut most_prefix = i64::MAX;
        if kind == RING {
            let newest = left.is_none();
            if most > 1 && !newest && turning >= most || most == 1 && !newest {
                left = Some(c.rng.between(0, (turning - most) as usize) as i64);
                offsets = None;
                most_prefix = places.sinks;
            } else if most <= 1 && newest {
                most_prefix = places.sinks;
            } else {
                lengths.iter_mut().for_each(|n| *n = (*n).min(slots as i32));
            }
        }
        let entry = |c: &mut Call, b: usize| c.rng.between(0, places.room(b).min(keys + 2) as usize) as i32 / 2;
        let starts = c.maybe(0.2).then(|| (0..n).map(|b| entry(c, b)).collect());
        let prefixes = c.maybe(0.2).then(|| (0..n).map(|b| i64::from(entry(c, b)).min(most_prefix) as i32).collect());
        // A ring must hold what queries see, wherever they stand.
        let positions = (kind != RING && c.maybe(0.2)).then(|| -> Vec<Vec<i32>> {
            (0..n).map(|_| (0..most).map(|_| c.rng.below(2 * keys as usize + 4) as i32 - 2).collect()).collect()
        });
        let optional = kind != RING && kind != PAGED && c.maybe(0.4);
        // Without a list of lengths, all entries of a table count, and they are valid.
        let lengths = (!optional).then_some(lengths);
        let flags = i32::from(c.maybe(0.5)) | i32::from(left.is_some()) << 1 | i32::from(right.is_some()) << 2;
        let (left, right) = (left.unwrap_or(0), right.unwrap_or(0));
        Self {
            places,
            q,
            batch,
            seq: most,
            query_starts,
            lengths,
            starts,
            offsets,
            positions,
            prefixes,
            flags,
            left,
            right,
        }
    }

    fn length(&self, row: usize) -> i64 {
        self.lengths.as_ref().map_or_else(|| self.places.room(row), |l| l.get(row).map_or(0, |&n| n.into()))
    }

    /// Of the longest sequence.
    fn longest(&self) -> i64 {
        (0..self.batch as usize).map(|row| self.length(row)).max().unwrap_or(0)
    }

    /// Says so, or something else, where the call's views say `q` and `k`.
    fn give(&self, c: &mut Call, q: [i64; 4], k: [i64; 4]) -> Said {
        let layout = self.places.give(c, k[1]);
        let rows = if self.query_starts.is_some() || c.hit() { c.number(self.batch) } else { 0 };
        let query_starts = match &self.query_starts {
            Some(starts) => {
                let n = product(&[rows]).and_then(|n| n.checked_add(1));
                let wrong = [-1, i32::MIN, i32::MAX, 0, self.q[1] as i32, self.q[1] as i32 + 1];
                c.list(n, &wrong, |_, i| starts.get(i).or(starts.last()).copied().unwrap_or(0))
            }
            None => List { at: std::ptr::null(), values: Vec::new() },
        };
        let batch = if query_starts.at.is_null() { q[0] } else { rows };
        let batch = (batch >= 0).then_some(batch);
        let most = self.longest() as i32;
        let list = |c: &mut Call, right: &Option<Vec<i32>>, wrong: &[i32]| match right {
            Some(right) => c.list(batch, wrong, |_, i| right.get(i).copied().unwrap_or(0)),
            None => List { at: std::ptr::null(), values: Vec::new() },
        };
        let wrong = [i32::MIN, -1, most, most.saturating_add(1), i32::MAX];
        let lengths = list(c, &self.lengths, &wrong);
        let starts = list(c, &self.starts, &wrong);
        let offsets = list(c, &self.offsets, &[i32::MIN, i32::MAX]);
        let prefixes = list(c, &self.prefixes, &wrong);
        let positions: List<i32> = match &self.positions {
            None => List { at: std::ptr::null(), values: Vec::new() },
            Some(right) => c.list(product(&[q[0], q[1]]), &[i32::MIN, i32::MAX], |_, i| {
                let (row, query) = match &self.query_starts {
                    None => (i / q[1].max(1) as usize, i % q[1].max(1) as usize),
                    Some(starts) => {
                        let row = starts.iter().filter(|&&start| start <= i as i32).count().wrapping_sub(1);
                        (row, i.wrapping_sub(starts.get(row).map_or(0, |&start| start as usize)))
                    }
                };
                right.get(row).and_then(|row| row.get(query)).copied().unwrap_or(7)
            }),
        };
        let params = kvl_attention_params {
            flags: c.code(self.flags) as u32,
            window_left: c.number(self.left),
            window_right: c.number(self.right),
            lengths: lengths.at,
            kv_starts: starts.at,
            offsets: offsets.at,
            query_positions: positions.at,
            layout: layout.at,
            cu_seqlens_q: query_starts.at,
            num_sequences: rows,
            prefix_lengths: prefixes.at,
            ..zeroed()
        };
        Said { layout, params, batch, query_starts, lengths, starts }
    }
}

impl Said {
    /// The slots of keys that a query may see.
    fn live(&self) -> Slots {
        let mut live = Slots::default();
        for row in 0..self.batch.unwrap_or(0).min(1 << 10) {
            let b = row as usize;
            let length = self.lengths.values.get(b).map_or_else(|| self.layout.capacity(b), |&n| n.into());
            let start = self.starts.values.get(b).map_or(0, |&n| n.into());
            live.extend(self.layout.places(row, start..length, length));
        }
        live
    }

    /// Whether a query belongs to a sequence.
    fn is_asked(&self, [_, token, _]: [usize; 3]) -> bool {
        match (self.query_starts.at.is_null(), self.query_starts.values.first(), self.query_starts.values.last()) {
            (false, Some(&first), Some(&last)) => (first..last).contains(&(token as i32)),
            _ => true,
        }
    }

    /// Whether fields are set that older structs lack.
    fn is_new(&self) -> bool {
        !self.layout.at.is_null()
            || !self.query_starts.at.is_null()
            || !self.params.prefix_lengths.is_null()
            || !self.params.query_positions.is_null()
    }
}

/// A plan that is released on drop.
struct Plan(*mut kvl_plan);

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the plan is null or from the library, and released once.
        unsafe { kvl_plan_destroy(self.0) };
    }
}

/// The masks of a call.
#[derive(Clone, Copy)]
struct Masks {
    mask: kvl_mask,
    bit_mask: *const kvl_bit_mask,
}

impl Masks {
    const NONE: Self = Self {
        mask: kvl_mask { data: std::ptr::null(), shape: [0; 4], strides: [0; 4], bytes: 0 },
        bit_mask: std::ptr::null(),
    };

    fn are_none(&self) -> bool {
        self.mask.shape == [0; 4] && self.mask.data.is_null() && self.bit_mask.is_null()
    }
}

/// Sometimes makes a plan of the arguments, with or without masks, and uses it instead of them.
fn planned(c: &mut Call, rows: &Rows, said: &mut Said, masks: &mut Masks, q: [i64; 4], k: [i64; 4]) -> Plan {
    let mut plan = Plan(std::ptr::null_mut());
    if !c.maybe(0.25) {
        return plan;
    }
    // A hostile call takes other views than those of the plan.
    let axes = |c: &mut Call, shape: [i64; 4]| kvl_const_view { shape: shape.map(|n| c.number(n)), ..zeroed() };
    let planned = if c.maybe(0.7) { *masks } else { Masks::NONE };
    let params = kvl_attention_params {
        q: axes(c, q),
        k: axes(c, k),
        struct_size: size_of_val(&said.params),
        mask: planned.mask,
        bit_mask: planned.bit_mask,
        ..said.params
    };
    // Lists have as many entries as the views of the call require, so that other views must not require more.
    let more_positions = !params.query_positions.is_null() && params.q.shape[1] != q[1];
    if params.q.shape[0] != q[0] || params.k.shape[1] != k[1] || more_positions {
        return plan;
    }
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    if unsafe { kvl_plan_create(&raw const params, &raw mut plan.0) } != 0 {
        return plan;
    }
    if !planned.are_none() {
        let counts = vec![0; rows.batch as usize];
        // SAFETY: a list of as many entries as stated.
        assert_ne!(unsafe { kvl_plan_advance(plan.0, counts.as_ptr(), rows.batch) }, 0, "masks of new tokens");
        if !c.hit() {
            *masks = Masks::NONE;
        }
    } else if c.is_right()
        && rows.positions.is_none()
        && c.maybe(0.4)
        && said.lengths.values.iter().all(|&n| n > 0)
        && !said.lengths.at.is_null()
    {
        advanced(c, rows, said, &params, &mut plan);
    }
    let kept = if c.hit() { c.rng.between(1, 10) } else { 0 };
    let mut now = kvl_attention_params { plan: plan.0, ..zeroed() };
    match kept {
        1 => now.flags = said.params.flags,
        2 => now.window_left = said.params.window_left,
        3 => now.window_right = said.params.window_right,
        4 => now.layout = said.params.layout,
        5 => (now.cu_seqlens_q, now.num_sequences) = (said.params.cu_seqlens_q, said.params.num_sequences),
        6 => now.lengths = said.params.lengths,
        7 => now.kv_starts = said.params.kv_starts,
        8 => now.offsets = said.params.offsets,
        9 => now.prefix_lengths = said.params.prefix_lengths,
        10 => now.query_positions = said.params.query_positions,
        _ => (),
    }
    said.params = now;
    plan
}

/// Arrives at the same plan by a step.
fn advanced(c: &mut Call, rows: &Rows, said: &Said, params: &kvl_attention_params, plan: &mut Plan) {
    let counts: Vec<i32> = said.lengths.values.iter().map(|&n| c.rng.below(n as usize + 1) as i32).collect();
    let before = |list: &[i32]| -> Vec<i32> { list.iter().zip(&counts).map(|(x, n)| x - n).collect() };
    let (lengths, offsets) = (before(&said.lengths.values), rows.offsets.as_deref().map(before));
    let offsets = offsets.as_ref().map_or(std::ptr::null(), |o| o.as_ptr());
    let params = kvl_attention_params { lengths: lengths.as_ptr(), offsets, ..*params };
    // SAFETY: as in `planned`, with lists of as many entries.
    unsafe {
        assert_eq!(kvl_plan_update(plan.0, &raw const params), 0, "{}", last_error());
        assert_eq!(kvl_plan_advance(plan.0, counts.as_ptr(), counts.len() as i64), 0, "{}", last_error());
    }
}

/// A bit mask over all keys, or over a sequence's last keys, in a buffer of exactly the needed bytes.
fn bit_mask(c: &mut Call, rows: &Rows, batch: Option<i64>, heads: i64) -> *const kvl_bit_mask {
    let longest = rows.longest();
    let tree = c.maybe(0.5);
    let keys = if tree { c.rng.between(0, longest.min(20) as usize) as i64 } else { longest + c.rng.below(9) as i64 };
    let wrong = [-1, i32::MIN, i32::MAX, longest as i32];
    let n = if tree { batch } else { None };
    let first_keys =
        c.list(n, &wrong, |_, b| (rows.length(b.min(rows.batch.max(1) as usize - 1)) - keys).max(0) as i32);
    let first_keys = if tree { first_keys.at } else { std::ptr::null() };

    let right = [rows.batch, rows.seq, heads, keys];
    let (mut strides, mut lists) = ([0i64; 3], None);
    let (offset, bits);
    if c.maybe(0.4) {
        let (starts, widths, end) = bits_by_row(c, rows, tree.then_some(keys));
        strides[2] = if c.maybe(0.7) { 0 } else { end };
        (offset, bits) = (0, end + (heads - 1).max(0) * strides[2]);
        lists = Some((starts, widths));
    } else {
        let mut step = keys + c.rng.below(10) as i64;
        for axis in [1, 2, 0] {
            if !c.maybe(if axis == 2 { 0.7 } else { 0.15 }) {
                strides[axis] = step;
                step = step * right[axis].max(1) + c.rng.below(9) as i64;
            }
        }
        offset = c.rng.below(20) as i64;
        bits = offset + (0..3).map(|axis| (right[axis] - 1).max(0) * strides[axis]).sum::<i64>() + keys;
    }
    let bytes = if right.contains(&0) { 0 } else { (bits as usize).div_ceil(8) };
    let data = c.arena.block(bytes, 0);
    // Most bits are 1; whole words of 0 mask all keys of a query.
    let mut random = c.rng.u64() | c.rng.u64();
    for i in 0..bytes {
        random = random.rotate_left(11);
        // SAFETY: a byte of the block.
        unsafe { data.add(i).write(random as u8) };
    }
    let shape = right.map(|n| c.number(n));
    let (said_offset, said_strides) = (c.number(offset), strides.map(|n| c.number(n)));
    let (mut row_starts, mut query_strides) = (std::ptr::null(), std::ptr::null());
    // The lists with the own bits of sequences may be wrong.
    let same = (shape, said_offset, said_strides) == (right, offset, strides) && (lists.is_none() || c.is_right());
    if let Some((starts, widths)) = lists {
        let wrong = [-1, i64::MIN, i64::MAX, 1, bits, bits + 1];
        let list = |c: &mut Call, right: Vec<i64>| c.list(batch, &wrong, |_, b| right.get(b).copied().unwrap_or(0)).at;
        (row_starts, query_strides) = (list(c, starts), list(c, widths));
    }
    let mut said_bytes = if same && c.maybe(0.3) { 0 } else { bytes };
    if c.hit() && bytes > 0 {
        said_bytes = c.rng.between(1, bytes);
    }
    let data = if bytes == 0 || c.hit() && c.maybe(0.3) { std::ptr::null_mut() } else { data };
    let mask = kvl_bit_mask {
        data,
        bytes: said_bytes,
        offset: said_offset,
        shape,
        strides: said_strides,
        first_keys,
        bit_offsets: row_starts,
        query_strides,
        ..zeroed()
    };
    c.sized(&mask, &[])
}

/// Bit masks of sequences one after another: their bit offsets, the strides of their queries, and the end of the last.
/// They cover all keys of a sequence, or its last keys.
fn bits_by_row(c: &mut Call, rows: &Rows, last: Option<i64>) -> (Vec<i64>, Vec<i64>, i64) {
    let (mut starts, mut widths, mut end) = (Vec::new(), Vec::new(), 0);
    for b in 0..rows.batch as usize {
        let queries = rows.query_starts.as_ref().map_or(rows.seq, |s| (s[b + 1] - s[b]).into());
        let keys = rows.length(b).min(last.unwrap_or(i64::MAX));
        let width = if c.maybe(0.1) { 0 } else { keys + if c.maybe(0.6) { 0 } else { c.rng.below(9) as i64 } };
        starts.push(end + c.rng.below(9) as i64);
        widths.push(width);
        if queries > 0 && keys > 0 {
            end = starts[b] + (queries - 1) * width + keys;
        }
    }
    (starts, widths, end)
}

/// Sizes of the struct in older versions.
const OLDER: [usize; 2] = [offset_of!(kvl_attention_params, precision), offset_of!(kvl_attention_params, layout)];

pub fn attention(c: Call) -> i32 {
    attend(c, Form::Plain)
}

pub fn attention_with_prefix(c: Call) -> i32 {
    attend(c, Form::Shared)
}

pub fn attention_chunks(c: Call) -> i32 {
    attend(c, Form::Span)
}

fn attend(mut c: Call, form: Form) -> i32 {
    let (shared, span) = (form == Form::Shared, form == Form::Span);
    c.spoil_rate(if form == Form::Plain { 0.03 } else { 0.025 });
    if span {
        c.often_wild();
    }
    let [mut batch, mut seq, mut kv_heads, dim] = c.shape();
    let v_dim = if c.maybe(0.7) { dim } else { c.dim() };
    let keys = match c.rng.below(40) {
        0 => 0,
        // More keys than a chunk, but few sequences, to limit the time.
        1 => c.rng.between(1000, 1100) as i64,
        2..=5 => c.rng.between(60, 200) as i64,
        _ => c.rng.between(1, 50) as i64,
    };
    if keys > 200 {
        (batch, seq, kv_heads) = (1, seq.min(2), 1);
    }
    let (dim, v_dim) = if keys > 50 { (dim.min(70), v_dim.min(70)) } else { (dim, v_dim) };
    if c.maybe(0.3) {
        // Decode.
        seq = seq.min(1);
    }
    let rows = Rows::new(&mut c, batch, seq, keys, form);
    let heads = kv_heads * c.rng.between(1, 4) as i64;
    let (k_format, v_format) = (c.format(dim), c.format(v_dim));
    let (q_type, out_type, bias_type) = (c.dtype(), c.dtype(), c.dtype());
    let ([q0, q1], [k0, k1]) = (rows.q, rows.places.axes);
    let mut q = c.tensor(q_type, [q0, q1, heads, dim], true);
    let mut k = c.tensor(k_format, [k0, k1, kv_heads, dim], true);
    let mut k_scales = c.scales(k_format, k.shape, true);
    let packed = k1 % 2 == 0 && (v_format < INT8 || c.hit()) && c.maybe(0.2);
    if packed {
        // Sink tokens or first slots may be odd.
        c.allow_error();
    }
    let v_shape = if packed { [k0, k1 / 2, kv_heads, 2 * v_dim] } else { [k0, k1, kv_heads, v_dim] };
    let mut v = c.tensor(v_format, v_shape, true);
    let mut v_scales = c.scales(v_format, v_shape, true);
    let mut out = c.tensor(out_type, [q0, q1, heads, v_dim], false);
    let scores = [rows.batch, rows.seq, heads, rows.longest() + c.rng.below(3) as i64];
    let small = product(&scores).is_some_and(|n| n <= 1 << 19);
    let mut mask = (small && c.maybe(0.2)).then(|| c.tensor(MASK, scores, true));
    let mut bias = (small && c.maybe(0.2)).then(|| c.tensor(bias_type, scores, true));
    c.alias(&mut out, &q);
    c.alias(&mut out, &v);
    c.alias(&mut k, &v);
    for tensor in [&mut q, &mut k, &mut v].into_iter().chain(&mut mask).chain(&mut bias) {
        c.settle(tensor);
    }
    // A span has none, unless that is what is wrong.
    let has_output = !span || c.hit();
    if has_output {
        c.settle(&mut out);
    }
    if k.shape[1] == v.shape[1] && k.shape[1] > 1 << 16 {
        // A valid call of this size would take too long.
        v.shape[1] -= 1;
    }
    if let Some(scales) = &mut v_scales {
        c.alias(scales, &out);
    }
    c.settle_scales(&mut k_scales);
    c.settle_scales(&mut v_scales);
    let prefix = shared.then(|| {
        let (tokens, formats) = (c.rng.between(0, 30) as i64, [c.format(dim), c.format(v_dim)]);
        let mut caches = [(formats[0], dim), (formats[1], v_dim)].map(|(format, dim)| {
            let cache = c.tensor(format, [1, tokens, kv_heads, dim], true);
            (cache, c.scales(format, cache.shape, true))
        });
        c.alias(&mut caches[0].0, &out);
        for (cache, scales) in &mut caches {
            c.settle(cache);
            c.settle_scales(scales);
            for tensor in std::iter::once(&*cache).chain(&*scales) {
                c.fill(tensor, |_| true);
            }
        }
        caches
    });

    let mut said = rows.give(&mut c, q.shape, k.shape);
    let is_new = said.is_new();
    let bits = if c.maybe(0.25) { bit_mask(&mut c, &rows, said.batch, heads) } else { std::ptr::null() };
    mask.iter().for_each(|t| c.fill(t, |_| true));
    let mut masks = Masks { mask: mask.map_or(zeroed(), |t| c.mask(&t)), bit_mask: bits };
    let plan = planned(&mut c, &rows, &mut said, &mut masks, q.shape, k.shape);
    let optional = |c: &mut Call, probability: f64, n: Option<i64>| if c.maybe(probability) { n } else { None };
    let n = optional(&mut c, if shared { 0.02 } else { 0.2 }, Some(q.shape[2]));
    let n = if shared && c.is_right() { None } else { n };
    let slopes = c.list(n, &[f32::NAN, f32::INFINITY, -1e38], |c, _| c.value());
    if shared && !slopes.at.is_null() {
        c.allow_error();
    }
    let n = optional(&mut c, 0.2, Some(q.shape[2])).filter(|_| !span || c.hit());
    let sinks = c.list(n, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY], |c, _| c.value());
    let lse_entries = product(&q.shape[..3]);
    let n = optional(&mut c, 0.5, lse_entries).filter(|_| !span || c.hit());
    let lse: *mut f32 = c.output(n);

    // Keys that no query sees remain poison.
    let live = said.live();
    let is_live = |at: [usize; 3]| live.contains(&(at[0] as i64, at[1] as i64));
    c.fill(&q, |_| true);
    let is_live_value = |[row, slot, head]: [usize; 3]| match packed {
        true => is_live([row, 2 * slot, head]) || is_live([row, 2 * slot + 1, head]),
        false => is_live([row, slot, head]),
    };
    for tensor in std::iter::once(&k).chain(&k_scales) {
        c.fill(tensor, is_live);
    }
    for tensor in std::iter::once(&v).chain(&v_scales) {
        c.fill(tensor, is_live_value);
    }
    bias.iter().for_each(|t| c.fill(t, |_| true));

    let (scale, softcap) = (c.value() * 0.3, c.value().abs() * 20.0);
    let (scale, softcap) = (if c.maybe(0.5) { 0.0 } else { scale }, if c.maybe(0.7) { 0.0 } else { softcap });
    let precision = c.precision();
    let v_packing = c.code(packed.into());
    let params = kvl_attention_params {
        q: c.const_view(&q),
        k: c.const_view(&k),
        v: c.const_view(&v),
        out: if has_output { c.view(&out) } else { zeroed() },
        lse,
        scale: c.float(scale.into()) as f32,
        softcap: c.float(softcap.into()) as f32,
        reserved: c.code(0),
        mask: masks.mask,
        bias: bias.map_or(zeroed(), |t| c.const_view(&t)),
        alibi_slopes: slopes.at,
        sink_logits: sinks.at,
        precision: c.code(precision),
        reserved2: c.code(0),
        bit_mask: masks.bit_mask,
        v_packing,
        reserved3: c.code(0),
        scales: c.scales_of([&k_scales, &v_scales]),
        k_hadamard: c.hadamard(k.shape[3]),
        v_hadamard: c.hadamard(if packed { v.shape[3] / 2 } else { v.shape[3] }),
        ..said.params
    };

    let quantised = k_scales.is_some() || v_scales.is_some();
    let rotated = params.k_hadamard != 0 || params.v_hadamard != 0;
    let older: &[usize] =
        if is_new || packed || quantised || rotated || !plan.0.is_null() || !bits.is_null() { &[] } else { &OLDER };
    let params = c.sized(&params, older);
    let (context, runner) = (c.context(), c.runner());
    let prefix = prefix.map(|[(k, k_scales), (v, v_scales)]| {
        let (k, v) = (c.const_view(&k), c.const_view(&v));
        (c.fixed(k), c.fixed(v), c.scales_of([&k_scales, &v_scales]))
    });

    let inputs: Vec<*mut u8> = [q, k, v].iter().filter(|t| !t.is_empty()).map(|t| t.data).collect();
    let states = span.then(|| states(&mut c, params, &inputs));

    let mut needed = 0;
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe {
        match prefix {
            None if span => kvl_attention_chunks_workspace_size(params, runner, &raw mut needed),
            None => kvl_attention_workspace_size(params, runner, &raw mut needed),
            Some((k, ..)) => kvl_attention_with_prefix_workspace_size(k, params, runner, &raw mut needed),
        }
    };
    if status != 0 || needed > 64 << 20 {
        // Errors of the shapes are reported here too, and such a workspace does not exist.
        needed = 64;
        c.hit();
    }
    if c.hit() {
        needed = c.rng.below(needed + 1);
    }
    let skip = if c.hit() { c.rng.between(1, 63) } else { 0 };
    let workspace = c.arena.scratch(needed, skip);
    if has_output {
        c.writes(&out, |at| said.is_asked(at));
    }
    if !lse.is_null() {
        c.may_write(lse, lse_entries);
    }
    c.ready();
    // SAFETY: as above.
    let status = unsafe {
        match prefix {
            None => match states {
                Some((at, len)) => kvl_attention_chunks(context, runner, workspace, needed, params, at, len),
                None => kvl_attention(context, runner, workspace, needed, params),
            },
            Some((k, v, scales)) => kvl_attention_with_prefix(context, runner, workspace, needed, k, v, scales, params),
        }
    };
    if let (0, Some((at, len))) = (status, states) {
        // SAFETY: the struct has the stated size, and all bytes 0 are a valid value.
        let given = unsafe {
            let mut given: kvl_attention_params = zeroed();
            // A newer caller's is longer, an older one's is shorter.
            let bytes = (*params).struct_size.min(size_of_val(&given));
            std::ptr::copy_nonoverlapping(params.cast::<u8>(), (&raw mut given).cast(), bytes);
            given.struct_size = size_of_val(&given);
            given
        };
        compare(context, &given, at, len);
    }
    c.check(status)
}

/// Room for the states of a span, or something wrong, and how many floats are said to be there. `inputs` are tensors in which they
/// must not lie.
fn states(c: &mut Call, params: *const kvl_attention_params, inputs: &[*mut u8]) -> (*mut f32, i64) {
    let mut len = 0;
    // SAFETY: a struct of the stated size, or null, and space for the result.
    if unsafe { kvl_attention_chunks_states_len(params, &raw mut len) } != 0 {
        // The call must report errors of the shapes too.
        len = c.rng.below(100) as i64;
        c.allow_error();
    }
    let at: *mut f32 = c.output(Some(len));
    if at.is_null() {
        // More entries than any list here.
        c.allow_error();
    }
    c.may_write(at, Some(len));
    if len > 0 && !inputs.is_empty() && c.hit() {
        let input = c.rng.pick(inputs);
        return (input.wrapping_add(c.rng.below(2)).cast(), len);
    }
    (at, c.number(len))
}

/// The states of a single span are those of the whole: merged, they have its bits.
fn compare(context: *const kvl_context, params: &kvl_attention_params, states: *mut f32, len: i64) {
    let ([batch, seq, heads, _], v) = (params.q.shape, params.v.shape[3]);
    let shape = [batch, seq, heads, if params.v_packing == 1 { v / 2 } else { v }];
    let (rows, strides) =
        (product(&shape[..3]).expect("few rows"), [seq * heads * shape[3], heads * shape[3], shape[3], 1]);
    if rows == 0 {
        return;
    }
    let elements = (rows * shape[3]) as usize;
    let (mut whole, mut merged) = (vec![f32::NAN; elements], vec![f32::NAN; elements]);
    let (mut whole_lse, mut merged_lse) = (vec![f32::NAN; rows as usize], vec![f32::NAN; rows as usize]);
    let view = |data: &mut [f32]| {
        let bytes = size_of_val(data);
        kvl_view { data: data.as_mut_ptr().cast(), dtype: 0, reserved: 0, shape, strides, bytes }
    };
    let params = kvl_attention_params { out: view(&mut whole), lse: whole_lse.as_mut_ptr(), ..*params };
    let span = kvl_chunk_states { states, len };
    let merge = kvl_merge_chunks_params {
        struct_size: size_of::<kvl_merge_chunks_params>(),
        segments: &raw const span,
        num_segments: 1,
        kv_heads: params.k.shape[2],
        k_format: params.k.dtype,
        v_format: params.v.dtype,
        precision: params.precision,
        out: view(&mut merged),
        lse: merged_lse.as_mut_ptr(),
        v_hadamard: params.v_hadamard,
        ..zeroed()
    };
    let (mut arena, mut bytes, runner) = (crate::memory::Arena::default(), 0, std::ptr::null());
    // SAFETY: the arguments of the last call, outputs of the stated sizes, and workspaces of the required sizes.
    unsafe {
        assert_eq!(kvl_attention_workspace_size(&raw const params, runner, &raw mut bytes), 0, "{}", last_error());
        let status = kvl_attention(context, runner, arena.block(bytes, 0), bytes, &raw const params);
        assert_eq!(status, 0, "a span's call is none of attention: {}", last_error());
        assert_eq!(kvl_merge_chunks_workspace_size(&raw const merge, runner, &raw mut bytes), 0, "{}", last_error());
        let status = kvl_merge_chunks(context, runner, arena.block(bytes, 0), bytes, &raw const merge);
        assert_eq!(status, 0, "states that were written cannot be merged: {}", last_error());
    }
    let same =
        |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan());
    assert!(same(&whole, &merged) && same(&whole_lse, &merged_lse), "a span's merged bits are others than the whole's");
}

/// Shapes only, for calls that do not access data.
struct Shapes {
    rows: Rows,
    q: [i64; 4],
    k: [i64; 4],
}

impl Shapes {
    fn new(c: &mut Call, form: Form) -> Self {
        let [batch, seq, heads, dim] = c.shape();
        let keys = c.rng.between(0, 60) as i64;
        let rows = Rows::new(c, batch, seq, keys, form);
        let ([q0, q1], [k0, k1]) = (rows.q, rows.places.axes);
        Self { q: [q0, q1, heads, dim], k: [k0, k1, heads, dim], rows }
    }

    /// Parameters of these or of other shapes, and with `masks` sometimes masks.
    fn params(&self, c: &mut Call, masks: bool) -> (kvl_attention_params, bool) {
        let view = |c: &mut Call, shape: [i64; 4]| {
            let shape = shape.map(|n| c.number(n));
            kvl_const_view { shape, dtype: c.code(0), reserved: c.code(0), ..zeroed() }
        };
        let (q, k) = (view(c, self.q), view(c, self.k));
        let said = self.rows.give(c, q.shape, k.shape);
        let Masks { mask, bit_mask } = if masks { self.masks(c, said.batch) } else { Masks::NONE };
        let is_new = said.is_new() || !bit_mask.is_null();
        (kvl_attention_params { q, k, v: k, mask, bit_mask, ..said.params }, is_new)
    }

    /// Masks for the stated number of sequences.
    fn masks(&self, c: &mut Call, batch: Option<i64>) -> Masks {
        let (rows, heads) = (&self.rows, self.q[2]);
        let mut masks = Masks::NONE;
        let scores = [rows.batch, rows.seq, heads, rows.longest() + c.rng.below(3) as i64];
        if c.maybe(0.3) && product(&scores).is_some_and(|n| n <= 1 << 16) {
            let mut mask = c.tensor(MASK, scores, true);
            c.settle(&mut mask);
            c.fill(&mask, |_| true);
            masks.mask = c.mask(&mask);
        }
        if c.maybe(0.3) {
            masks.bit_mask = bit_mask(c, rows, batch, heads);
        }
        masks
    }

    /// A plan of exactly these parameters, and with `masks` sometimes masks.
    fn plan(&self, c: &mut Call, masks: bool) -> Plan {
        let mut plan = Plan(std::ptr::null_mut());
        let said = c.rightly(|c| self.rows.give(c, self.q, self.k));
        let Masks { mask, bit_mask } = if masks { c.rightly(|c| self.masks(c, said.batch)) } else { Masks::NONE };
        let params = kvl_attention_params {
            mask,
            bit_mask,
            struct_size: size_of::<kvl_attention_params>(),
            q: kvl_const_view { shape: self.q, ..zeroed() },
            k: kvl_const_view { shape: self.k, ..zeroed() },
            ..said.params
        };
        // SAFETY: lists of as many entries as the shapes require.
        unsafe { assert_eq!(kvl_plan_create(&raw const params, &raw mut plan.0), 0, "{}", last_error()) };
        plan
    }
}

pub fn attention_workspace_size(c: Call) -> i32 {
    workspace_size(c, Form::Plain)
}

pub fn attention_with_prefix_workspace_size(c: Call) -> i32 {
    workspace_size(c, Form::Shared)
}

pub fn attention_chunks_workspace_size(c: Call) -> i32 {
    workspace_size(c, Form::Span)
}

pub fn attention_chunks_states_len(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let shapes = Shapes::new(&mut c, Form::Span);
    let (params, is_new) = shapes.params(&mut c, false);
    let params = c.sized(&params, if is_new { &[] } else { &OLDER });
    let len = c.output::<i64>(Some(1));
    c.may_write(len, Some(1));
    c.ready();
    // SAFETY: lists of as many entries as the shapes require; data is null and not accessed.
    let status = unsafe { kvl_attention_chunks_states_len(params, len) };
    if status == 0 {
        // SAFETY: just written.
        assert!(unsafe { len.read() } >= 0);
    }
    c.check(status)
}

fn workspace_size(mut c: Call, form: Form) -> i32 {
    c.spoil_rate(0.03);
    let shapes = Shapes::new(&mut c, form);
    let (params, is_new) = shapes.params(&mut c, false);
    let params = c.sized(&params, if is_new { &[] } else { &OLDER });
    let shape = shapes.k.map(|n| c.number(n));
    let prefix = c.fixed(kvl_const_view { shape, ..zeroed() });
    let (runner, bytes) = (c.runner(), c.output::<usize>(Some(1)));
    c.may_write(bytes, Some(1));
    c.ready();
    // SAFETY: lists of as many entries as the shapes require; data is null and not accessed.
    let status = unsafe {
        match form {
            Form::Plain => kvl_attention_workspace_size(params, runner, bytes),
            Form::Shared => kvl_attention_with_prefix_workspace_size(prefix, params, runner, bytes),
            Form::Span => kvl_attention_chunks_workspace_size(params, runner, bytes),
        }
    };
    c.check(status)
}

// ---------------------------------------------------------------------------------------------------------------------
// Plans

/// Runs attention with a plan over caches of exactly its shapes. This must succeed after any calls on the plan, which
/// must stay inside the caches.
fn exercise(c: &Call, plan: &Plan, q: [i64; 4], k: [i64; 4]) {
    // Masks may belong to the previous number of heads.
    if q.iter().chain(&k).any(|&n| n > 1 << 11) || q[..3].iter().chain(&k[..2]).product::<i64>() > 1 << 15 {
        return;
    }
    let (q, k) = ([q[0], q[1], q[2], 3], [k[0], k[1], 1, 3]);
    let values = |shape: [i64; 4]| vec![0.5f32; shape.iter().product::<i64>() as usize];
    let (queries, keys, mut out) = (values(q), values(k), values(q));
    let view = |data: *mut f32, shape: [i64; 4]| {
        let strides = [shape[1] * shape[2] * 3, shape[2] * 3, 3, 1];
        let bytes = shape.iter().product::<i64>() as usize * 4;
        Tensor { data: data.cast(), dtype: 0, reserved: 0, shape, strides, bytes }
    };
    let cache = c.const_view(&view(keys.as_ptr().cast_mut(), k));
    let params = kvl_attention_params {
        struct_size: size_of::<kvl_attention_params>(),
        q: c.const_view(&view(queries.as_ptr().cast_mut(), q)),
        k: cache,
        v: cache,
        out: c.view(&view(out.as_mut_ptr(), q)),
        plan: plan.0,
        ..zeroed()
    };
    let mut bytes = 0;
    // SAFETY: tensors of the stated sizes, a live plan, and a workspace of the required size.
    unsafe {
        let runner = std::ptr::null();
        assert_eq!(kvl_attention_workspace_size(&raw const params, runner, &raw mut bytes), 0, "{}", last_error());
        let mut arena = crate::memory::Arena::default();
        let workspace = arena.block(bytes, 0);
        let context = c.world.contexts[0].cast_const();
        let status = kvl_attention(context, runner, workspace, bytes, &raw const params);
        assert_eq!(status, 0, "a plan that was made does not serve: {}", last_error());
    }
    assert!(out.iter().all(|x| x.is_finite()));
}

pub fn plan_create(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let shapes = Shapes::new(&mut c, Form::Plain);
    let (params, is_new) = shapes.params(&mut c, true);
    let (q, k) = (params.q.shape, params.k.shape);
    let params = c.sized(&params, if is_new { &[] } else { &OLDER });
    let plan: *mut *mut kvl_plan = c.output(Some(1));
    c.may_write(plan, Some(1));
    c.ready();
    // SAFETY: lists of as many entries as the shapes require, and space for the result or null.
    let status = unsafe { kvl_plan_create(params, plan) };
    if status == 0 {
        // SAFETY: created above, and released once.
        exercise(&c, &Plan(unsafe { plan.read() }), q, k);
    }
    c.check(status)
}

pub fn plan_update(mut c: Call) -> i32 {
    c.spoil_rate(0.03);
    let (before, after) = (Shapes::new(&mut c, Form::Plain), Shapes::new(&mut c, Form::Plain));
    let plan = before.plan(&mut c, true);
    let (params, is_new) = after.params(&mut c, true);
    let (q, k) = (params.q.shape, params.k.shape);
    let params = c.sized(&params, if is_new { &[] } else { &OLDER });
    let target = if c.hit() && c.maybe(0.2) { std::ptr::null_mut() } else { plan.0 };
    c.ready();
    // SAFETY: lists of as many entries as the shapes require, and a plan without other users.
    let status = unsafe { kvl_plan_update(target, params) };
    match status {
        0 => exercise(&c, &plan, q, k),
        _ => exercise(&c, &plan, before.q, before.k),
    }
    c.check(status)
}

pub fn plan_advance(mut c: Call) -> i32 {
    c.spoil_rate(0.1);
    let mut shapes = Shapes::new(&mut c, Form::Plain);
    let rows = &mut shapes.rows;
    // Steps from the sequence's position to another.
    let counts: Vec<i32> = match &mut rows.lengths {
        Some(lengths) => lengths
            .iter_mut()
            .map(|n| {
                let count = c.rng.below(*n as usize + 1) as i32;
                *n -= count;
                count
            })
            .collect(),
        None => vec![0; rows.batch as usize],
    };
    if rows.lengths.is_some()
        && let Some(offsets) = &mut rows.offsets
    {
        offsets.iter_mut().zip(&counts).for_each(|(offset, count)| *offset -= count);
    }
    let plan = shapes.plan(&mut c, false);
    let n = c.number(shapes.rows.batch);
    let wrong = [-1, i32::MIN, i32::MAX, 1, 50];
    let counts = c.list((n >= 0).then_some(n), &wrong, |_, i| counts.get(i).copied().unwrap_or(0));
    let target = if c.hit() && c.maybe(0.2) { std::ptr::null_mut() } else { plan.0 };
    c.ready();
    // SAFETY: a list of as many entries as stated, and a plan without other users.
    let status = unsafe { kvl_plan_advance(target, counts.at, n) };
    exercise(&c, &plan, shapes.q, shapes.k);
    c.check(status)
}

pub fn plan_set_table(mut c: Call) -> i32 {
    c.spoil_rate(0.08);
    let mut shapes = Shapes::new(&mut c, Form::Plain);
    let has_table = |shapes: &Shapes| {
        matches!(shapes.rows.places.kind, PAGED | INDIRECT) && shapes.rows.batch > 0 && shapes.k[1] > 0
    };
    while !has_table(&shapes) {
        if !c.is_right() && c.maybe(0.05) {
            c.allow_error();
            break;
        }
        shapes = Shapes::new(&mut c, Form::Plain);
    }
    let plan = shapes.plan(&mut c, true);
    let places = &shapes.rows.places;
    let per_row = if places.kind == PAGED { places.pages_per_row } else { places.axes[1] };
    let first = c.rng.between(0, per_row.max(0) as usize) as i64;
    let count = c.rng.between(0, (per_row - first).max(0) as usize) as i64;
    let row = c.rng.below(shapes.rows.batch.max(1) as usize) as i64;
    let (row, first, count) = (c.number(row), c.number(first), c.number(count));
    let pages = places.axes[0];
    let wrong = [-1, i32::MIN, i32::MAX, pages as i32];
    let entries = c.list((count >= 0).then_some(count), &wrong, |c, _| c.rng.below(pages.max(1) as usize) as i32);
    let target = if c.hit() && c.maybe(0.2) { std::ptr::null_mut() } else { plan.0 };
    c.ready();
    // SAFETY: a list of as many entries as stated, and a plan without other users.
    let status = unsafe { kvl_plan_set_table(target, row, first, entries.at, count) };
    exercise(&c, &plan, shapes.q, shapes.k);
    c.check(status)
}

pub fn plan_destroy(mut c: Call) -> i32 {
    let shapes = Shapes::new(&mut c, Form::Plain);
    let plan = if c.maybe(0.7) { shapes.plan(&mut c, true) } else { Plan(std::ptr::null_mut()) };
    c.ready();
    drop(plan);
    c.check(0)
}
