//! The targets: one function for each export, which makes arguments, most of them valid, and calls it.
//!
//! To add an export, declare it in `abi.rs`, write a function here and add it to [`TARGETS`]. To add a field, add it
//! in `abi.rs` and set it here.

use crate::abi::*;
use crate::attention::*;
use crate::caches::*;
use crate::call::{Call, List, product};
use crate::chunks::*;
use crate::memory::{FP8, INT8, Tensor};
use crate::places::*;
use crate::shards::*;
use std::ffi::CStr;
use std::mem::offset_of;

/// An export, its frequency, and the function that calls it and returns its status.
pub struct Target {
    pub name: &'static str,
    pub weight: usize,
    pub run: fn(Call) -> i32,
}

macro_rules! targets {
    ($($weight:literal $name:ident: $run:expr),* $(,)?) => {
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($name), weight: $weight, run: $run }),*];
    };
}

targets! {
    60 kvl_attention: attention,
    20 kvl_attention_with_prefix: attention_with_prefix,
    20 kvl_attention_chunks: attention_chunks,
    12 kvl_merge_chunks: merge_chunks,
    30 kvl_kv_write: kv_write,
    15 kvl_kv_read: kv_read,
    8 kvl_rope: rope,
    8 kvl_rms_norm: rms_norm,
    8 kvl_rms_norm_rope: rms_norm_rope,
    8 kvl_hadamard: hadamard,
    1 kvl_hadamard_block: hadamard_block,
    8 kvl_merge_states: merge_states,
    6 kvl_repeat_kv: repeat_kv,
    6 kvl_pack_row_pairs: pack_row_pairs,
    6 kvl_unpack_row_pairs: unpack_row_pairs,
    4 kvl_attention_workspace_size: attention_workspace_size,
    4 kvl_attention_with_prefix_workspace_size: attention_with_prefix_workspace_size,
    4 kvl_attention_chunks_states_len: attention_chunks_states_len,
    4 kvl_attention_chunks_workspace_size: attention_chunks_workspace_size,
    4 kvl_merge_chunks_workspace_size: merge_chunks_workspace_size,
    6 kvl_plan_create: plan_create,
    6 kvl_plan_update: plan_update,
    6 kvl_plan_advance: plan_advance,
    6 kvl_plan_set_table: plan_set_table,
    1 kvl_plan_destroy: plan_destroy,
    6 kvl_cache_set_lengths: cache_set_lengths,
    6 kvl_cache_advance: cache_advance,
    6 kvl_cache_truncate: cache_truncate,
    8 kvl_cache_reset: cache_reset,
    12 kvl_cache_insert_sequence: cache_insert_sequence,
    10 kvl_cache_copy_prefix: cache_copy_prefix,
    2 kvl_cache_reorder_workspace_size: cache_reorder_workspace_size,
    8 kvl_cache_reorder: cache_reorder,
    1 kvl_cache_reorder_table_workspace_size: cache_reorder_table_workspace_size,
    6 kvl_cache_reorder_table: cache_reorder_table,
    4 kvl_cache_set_table_tokens: cache_set_table_tokens,
    10 kvl_cache_evict: cache_evict,
    10 kvl_cache_evict_running: cache_evict_running,
    8 kvl_cache_copy_pages: cache_copy_pages,
    8 kvl_cache_defragment: cache_defragment,
    2 kvl_shard_from_rank: shard_from_rank,
    2 kvl_shard_sequences: shard_rows,
    2 kvl_shard_heads: shard_heads,
    2 kvl_shard_keys: shard_keys,
    4 kvl_shard_lengths: shard_lengths,
    4 kvl_shard_slots: shard_slots,
    3 kvl_shard_view: shard_view,
    5 kvl_rope_frequencies: rope_frequencies,
    5 kvl_rope_table: rope_table,
    1 kvl_alibi_slopes: alibi_slopes,
    1 kvl_context_create: context_create,
    1 kvl_context_destroy: context_destroy,
    1 kvl_context_isa: context_isa,
    1 kvl_context_v_packing: context_v_packing,
    2 kvl_context_tuning: context_tuning,
    4 kvl_context_set_tuning: context_set_tuning,
    1 kvl_context_kernel_name: context_kernel_name,
    1 kvl_context_attention_kernel_names: context_attention_kernel_names,
    1 kvl_kernel_info_at: kernel_info_at,
    1 kvl_thread_pool_create: thread_pool_create,
    1 kvl_thread_pool_destroy: thread_pool_destroy,
    1 kvl_thread_pool_runner: thread_pool_runner,
    1 kvl_advise_huge_pages: advise_huge_pages,
    1 kvl_last_error: last_error,
    1 kvl_abi_version: constants,
    1 kvl_version_string: constants,
    1 kvl_status_string: constants,
    1 kvl_isa_name: constants,
    1 kvl_isa_available: constants,
    1 kvl_kernel_count: constants,
}

// ---------------------------------------------------------------------------------------------------------------------
// States of attention

fn merge_states(mut c: Call) -> i32 {
    c.spoil_rate(0.1);
    let (shape, dtype) = (c.shape(), c.dtype());
    let n = if c.hit() { c.rng.pick(&[0, 257, 300]) } else { c.rng.between(1, 5) };
    let mut out = c.tensor(dtype, shape, false);
    let mut states = Vec::new();
    for i in 0..n.min(6) {
        let mut state = c.tensor(dtype, shape, true);
        if i == 0 {
            c.alias(&mut out, &state);
        }
        c.settle(&mut state);
        let rows = product(&state.shape[..3]);
        let lse = c.list(rows, &[f32::NAN, f32::INFINITY, 3e38], |c, _| {
            if c.maybe(0.2) { f32::NEG_INFINITY } else { c.value() * 5.0 }
        });
        let [_, seq, heads, _] = state.shape.map(|n| n.max(0) as usize);
        // The output of an empty state is not read, except if it shares memory with another output.
        let own = state.strides.iter().all(|&s| s != 0);
        c.fill(&state, |[b, s, h]| !own || lse.values.get((b * seq + s) * heads + h) != Some(&f32::NEG_INFINITY));
        states.push(kvl_attention_state { out: c.const_view(&state), lse: lse.at });
    }
    // Beyond the maximum, entries repeat.
    let states: Vec<_> = states.iter().cycle().take(if states.is_empty() { 0 } else { n }).copied().collect();
    c.settle(&mut out);
    let rows = product(&out.shape[..3]);
    let lse: *mut f32 = if c.maybe(0.5) { c.output(rows) } else { std::ptr::null_mut() };
    let states = c.arena.copy(&states, 0);
    let states = if c.hit() { std::ptr::null() } else { states.cast_const() };
    c.writes(&out, |_| true);
    c.may_write(lse, rows);
    let (view, context, runner) = (c.view(&out), c.context(), c.runner());
    let view = c.fixed(view);
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_merge_states(context, runner, states, n, view, lse) };
    c.check(status)
}

fn alibi_slopes(mut c: Call) -> i32 {
    let heads = c.rng.between(0, 70) as i64;
    let heads = c.number(heads);
    let slopes: *mut f32 = c.output(Some(heads));
    c.may_write(slopes, Some(heads));
    c.ready();
    // SAFETY: null, or as many entries as stated.
    let status = unsafe { kvl_alibi_slopes(slopes, heads) };
    c.check(status)
}

// ---------------------------------------------------------------------------------------------------------------------
// RoPE, the cache, repeated heads

/// The rotation of a tensor, valid or not.
pub fn rope_params(c: &mut Call, shape: [i64; 4]) -> *const kvl_rope_params {
    let [batch, seq, _, dim] = shape;
    let pairs = c.rng.between(1, (dim.clamp(2, 512) / 2) as usize) as i64;
    let rotary_dim = c.number(pairs * 2);
    let half = (2..=4096).contains(&rotary_dim).then_some(rotary_dim / 2).or(Some(1));
    let table = c.maybe(0.5);
    let rows = c.rng.between(seq.clamp(1, 100) as usize, seq.clamp(1, 100) as usize + 40) as i64;
    let table_rows = if table { c.number(rows) } else { 0 };
    let entries = half.and_then(|half| product(&[table_rows, half]));
    let explicit = c.maybe(0.4);
    let position = |c: &mut Call, room: i64| match table {
        true => c.rng.below(room.max(1) as usize) as i32,
        false => c.rng.u64() as i32 >> c.rng.below(32),
    };
    let wrong = [-1, rows as i32, i32::MIN, i32::MAX];
    // A hostile call may give offsets and positions, or a table and frequencies, or nothing.
    let (tables, frequencies) = (table != c.hit(), table == c.hit());
    let (offsets, positions) = (explicit == c.hit(), explicit != c.hit());
    let list = |c: &mut Call, given: bool| {
        let cos = |c: &mut Call, _| c.value();
        c.list(if given { entries } else { None }, &[f32::NAN, f32::INFINITY], cos).at
    };
    let params = kvl_rope_params {
        pairing: i32::from(c.maybe(0.5)),
        rotary_dim,
        cos: list(c, tables),
        sin: list(c, tables),
        table_rows,
        ..zeroed()
    };
    let wrong_frequencies = [f64::NAN, f64::INFINITY, -1e300, 1e300];
    let n = if frequencies { half } else { None };
    let inv_freq = c.list(n, &wrong_frequencies, |c, _| f64::from(c.value().abs())).at;
    let n = if offsets { Some(batch) } else { None };
    let offsets = c.list(n, &wrong, |c, _| position(c, rows - seq.max(1) + 1)).at;
    let n = if positions { product(&[batch, seq]) } else { None };
    let positions = c.list(n, &wrong, |c, _| position(c, rows)).at;
    let magnitude = if c.maybe(0.5) { 0.0 } else { 1.25 };
    let params = kvl_rope_params {
        pairing: c.code(params.pairing),
        reserved: c.code(0),
        magnitude: c.float(magnitude),
        inv_freq,
        offsets,
        positions,
        ..params
    };
    c.sized(&params, &[])
}

/// The norm of heads of a size.
fn norm_params(c: &mut Call, dim: i64) -> *const kvl_rms_norm_params {
    let n = if c.maybe(0.7) { product(&[dim]) } else { None };
    let weight = c.list(n, &[f32::NAN, f32::INFINITY, -1e38], |c, _| c.value()).at;
    let eps = if c.maybe(0.5) { 0.0 } else { 1e-5 };
    let params = kvl_rms_norm_params { weight, eps: c.float(eps) as f32, reserved: c.code(0), ..zeroed() };
    c.sized(&params, &[])
}

fn rope(c: Call) -> i32 {
    transform(c, false, true)
}

fn rms_norm(c: Call) -> i32 {
    transform(c, true, false)
}

fn rms_norm_rope(c: Call) -> i32 {
    transform(c, true, true)
}

/// A filled source and a target of one shape; sometimes the same tensor.
fn source_and_target(c: &mut Call, (from, to): (i32, i32), shape: [i64; 4]) -> (Tensor, Tensor) {
    let mut src = c.tensor(from, shape, true);
    c.settle(&mut src);
    c.fill(&src, |_| true);
    let in_place = c.maybe(0.2) && src.strides.iter().zip(src.shape).all(|(&s, n)| s != 0 || n == 1);
    let dst = match in_place {
        true => src,
        false => {
            let mut dst = c.tensor(to, shape, false);
            c.alias(&mut dst, &src);
            c.settle(&mut dst);
            dst
        }
    };
    (src, dst)
}

/// Norm, rotation, or both.
fn transform(mut c: Call, norm: bool, rope: bool) -> i32 {
    c.spoil_rate(0.08);
    let mut shape = c.shape();
    shape[3] = if rope { shape[3].max(2) } else { shape[3] };
    let (from, to) = (c.dtype(), c.dtype());
    let (src, dst) = source_and_target(&mut c, (from, to), shape);
    let norm_params = if norm { norm_params(&mut c, src.shape[3]) } else { std::ptr::null() };
    let params = if rope { rope_params(&mut c, src.shape) } else { std::ptr::null() };
    c.writes(&dst, |_| true);
    let (src, dst, context, runner) = (c.const_view(&src), c.view(&dst), c.context(), c.runner());
    let (src, dst) = (c.fixed(src), c.fixed(dst));
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe {
        match (norm, rope) {
            (true, true) => kvl_rms_norm_rope(context, runner, src, dst, norm_params, params),
            (true, false) => kvl_rms_norm(context, runner, src, dst, norm_params),
            _ => kvl_rope(context, runner, src, dst, params),
        }
    };
    c.check(status)
}

fn hadamard(mut c: Call) -> i32 {
    c.spoil_rate(0.08);
    let shape = c.shape();
    let shape = if c.maybe(0.8) { [shape[0], shape[1], shape[2], shape[3] * c.rng.pick(&[2, 4, 16])] } else { shape };
    let (from, to) = (c.dtype(), c.dtype());
    let (src, dst) = source_and_target(&mut c, (from, to), shape);
    // Here it is no option.
    let largest = (src.shape[3] & src.shape[3].wrapping_neg()).min(512);
    let block = match c.hadamard(src.shape[3]) {
        0 => c.number(largest),
        block => block,
    };
    if largest < 2 {
        c.allow_error();
    }
    c.writes(&dst, |_| true);
    let (src, dst, context, runner) = (c.const_view(&src), c.view(&dst), c.context(), c.runner());
    let (src, dst) = (c.fixed(src), c.fixed(dst));
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_hadamard(context, runner, src, dst, block) };
    c.check(status)
}

fn hadamard_block(mut c: Call) -> i32 {
    let right = c.dim();
    let (dim, block) = (c.number(right), c.output::<i64>(Some(1)));
    c.may_write(block, Some(1));
    c.ready();
    // SAFETY: space for the result, or null.
    let status = unsafe { kvl_hadamard_block(dim, block) };
    c.check(status)
}

fn kv_write(mut c: Call) -> i32 {
    c.spoil_rate(0.035);
    let [batch, seq, heads, dim] = c.shape();
    let (dim, v_dim) = (dim.max(2), c.dim());
    // Space for every sequence, and for every token anywhere.
    let rows = batch + c.rng.below(3) as i64;
    let kind = if c.maybe(0.4) { CONTIGUOUS } else { c.rng.pick(&[RING, PAGED, RAGGED]) };
    // Writes do not use an indirect table.
    let kind = if c.hit() { INDIRECT } else { kind };
    let formats = [c.format(dim), c.format(v_dim)];
    let pairs = (formats[1] < INT8 || c.hit()) && c.maybe(0.35);
    let room = seq + c.rng.below(20) as i64;
    let places = Places::new(&mut c, kind, rows, room, if pairs { 2 } else { 1 }, Use::Write);
    let [k0, k1] = places.axes;
    let types = [c.dtype(), c.dtype()];
    let mut k = c.tensor(types[0], [batch, seq, heads, dim], true);
    let mut k_cache = c.tensor(formats[0], [k0, k1, heads, dim], false);
    let mut k_scales = c.scales(formats[0], k_cache.shape, false);
    let v_heads = if c.maybe(0.9) { heads } else { c.number(heads) }.clamp(0, 20);
    let mut v = c.tensor(types[1], [batch, seq, v_heads, v_dim], true);
    let v_shape = if pairs { [k0, k1 / 2, v_heads, 2 * v_dim] } else { [k0, k1, v_heads, v_dim] };
    let mut v_cache = c.tensor(formats[1], v_shape, false);
    let values = c.maybe(0.8);
    let mut v_scales = if values { c.scales(formats[1], v_shape, false) } else { None };
    c.alias(&mut k_cache, &k);
    c.alias(&mut v_cache, &k_cache);
    k_scales.iter_mut().for_each(|scales| c.alias(scales, &k_cache));
    v_scales.iter_mut().for_each(|scales| c.alias(scales, &k));
    c.settle(&mut k);
    c.settle(&mut k_cache);
    c.settle_scales(&mut k_scales);
    if values {
        c.settle(&mut v);
        c.settle(&mut v_cache);
        c.settle_scales(&mut v_scales);
    }
    c.fill(&k, |_| true);
    c.fill(&v, |_| true);

    let (batch, seq) = (k.shape[0], k.shape[1]);
    let layout = places.give(&mut c, k_cache.shape[1]);
    let wrong = [-2, -1, k1 as i32, k1 as i32 - 1, rows as i32, k0 as i32, i32::MIN, i32::MAX];
    let by_slot = c.maybe(0.4);
    let pooled = matches!(kind, PAGED | RAGGED);
    let counts = if c.maybe(0.3) { Some(batch) } else { None };
    let counts: List<i32> = c.list(counts, &wrong, |c, _| c.rng.below(seq.clamp(0, 1000) as usize + 1) as i32);
    let first = c.rng.below(rows.max(1) as usize);
    let to_rows = if c.maybe(0.4) && !(by_slot && pooled) || c.hit() { Some(batch) } else { None };
    let row = |b: usize| (first + b) % rows.max(1) as usize;
    let to_rows: List<i32> = c.list(to_rows, &wrong, |_, b| row(b) as i32);
    let n = if by_slot == c.hit() { Some(batch) } else { None };
    let positions: List<i32> = c.list(n, &wrong, |c, b| {
        let target = if to_rows.at.is_null() { b.min(rows.max(1) as usize - 1) } else { row(b) };
        let room = if rows > 0 { places.room(target) - seq.clamp(0, places.room(target)) } else { 0 };
        c.rng.below(room as usize + 1) as i32
    });
    let n = if by_slot != c.hit() { product(&[batch, seq]) } else { None };
    let start = c.rng.below(k1.max(1) as usize);
    let pool = c.permutation(if pooled { (k0 * k1) as usize } else { 0 });
    let slots: List<i32> = c.list(n, &wrong, |c, i| {
        // In a ring no slot occurs twice, because a sequence has at most as many new tokens as there are slots.
        let ring = (start + i % seq.max(1) as usize) % k1.max(1) as usize;
        let slot = if pooled { pool.get(i).copied().unwrap_or(-1) } else { ring as i32 };
        if c.maybe(0.1) { -1 } else { slot }
    });
    let rope = if c.maybe(0.3) { rope_params(&mut c, k.shape) } else { std::ptr::null() };
    let k_norm = if c.maybe(0.25) { norm_params(&mut c, k.shape[3]) } else { std::ptr::null() };
    let v_packing = c.code(pairs.into());

    // The tokens that are written.
    let mut targets = Slots::default();
    if k.fits(&c.arena) && !k.is_empty() || v.fits(&c.arena) && !v.is_empty() {
        for b in 0..positions.values.len().max(slots.values.len().checked_div(seq as usize).unwrap_or(0)) {
            let row = to_rows.values.get(b).map_or(b as i64, |&r| r.into());
            let count = counts.values.get(b).map_or(seq, |&n| n.into());
            for t in 0..count.clamp(0, seq.clamp(0, 1 << 16)) {
                let slot = slots
                    .values
                    .get(b.wrapping_mul(seq as usize).wrapping_add(t as usize))
                    .map(|&slot| i64::from(slot));
                targets.extend(match (slots.at.is_null(), slot, k_cache.shape[1]) {
                    (true, ..) => positions.values.get(b).and_then(|&p| layout.place(row, i64::from(p) + t)),
                    (false, Some(0..), 1..) if matches!(layout.kind(), PAGED | RAGGED) => {
                        slot.map(|slot| (slot / k_cache.shape[1], slot % k_cache.shape[1]))
                    }
                    _ => slot.map(|slot| (row, slot)),
                });
            }
        }
    }
    let written = |at: [usize; 3]| targets.contains(&(at[0] as i64, at[1] as i64));
    c.writes(&k_cache, written);
    match (values, v_packing) {
        (true, 1) => c.writes_pairs(&v_cache, written),
        (true, _) => c.writes(&v_cache, written),
        _ => (),
    }
    for (format, scales) in formats.into_iter().zip([&k_scales, &v_scales]) {
        for scales in scales.iter().filter(|_| !FP8.contains(&format)) {
            // Fewer affine scales than slots are shared by neighbours.
            let per = sharing(k_cache.shape[1], scales.shape[1]);
            c.writes(scales, |[row, slot, head]| (0..per).any(|i| written([row, slot * per + i, head])));
        }
    }
    let absent: [kvl_const_view; 2] = [zeroed(), zeroed()];
    let params = kvl_kv_write_params {
        k: c.const_view(&k),
        v: if values { c.const_view(&v) } else { absent[0] },
        k_cache: c.view(&k_cache),
        v_cache: if values || c.hit() { c.view(&v_cache) } else { zeroed() },
        positions: positions.at,
        counts: counts.at,
        sequences: to_rows.at,
        slots: slots.at,
        rope,
        layout: layout.at,
        k_norm,
        v_packing,
        reserved: c.code(0),
        scales: c.scales_of([&k_scales, &v_scales]),
        k_hadamard: c.hadamard(k.shape[3]),
        v_hadamard: if values { c.hadamard(v.shape[3]) } else { 0 },
        ..zeroed()
    };
    let rotated = params.k_hadamard != 0 || params.v_hadamard != 0;
    let is_new = rotated || !layout.at.is_null() || !k_norm.is_null() || v_packing != 0 || !params.scales.is_null();
    let older: &[usize] = if is_new { &[] } else { &[offset_of!(kvl_kv_write_params, layout)] };
    let (params, context, runner) = (c.sized(&params, older), c.context(), c.runner());
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_kv_write(context, runner, params) };
    c.check(status)
}

/// The slots that share one of `scales` scales; not more than a cache of this memory has.
pub fn sharing(slots: i64, scales: i64) -> usize {
    if (1..slots).contains(&scales) { (slots / scales).min(1 << 10) as usize } else { 1 }
}

fn kv_read(mut c: Call) -> i32 {
    c.spoil_rate(0.035);
    let ([batch, seq, heads, dim], v_dim) = (c.shape(), c.dim());
    let rows = batch + c.rng.below(3) as i64;
    let kind = c.rng.pick(&[CONTIGUOUS, CONTIGUOUS, RING, PAGED, INDIRECT, RAGGED]);
    let formats = [c.format(dim), c.format(v_dim)];
    let pairs = (formats[1] < INT8 || c.hit()) && c.maybe(0.25);
    let room = seq + c.rng.below(20) as i64;
    let places = Places::new(&mut c, kind, rows, room, if pairs { 2 } else { 1 }, Use::Read);
    let [k0, k1] = places.axes;
    let mut k_cache = c.tensor(formats[0], [k0, k1, heads, dim], true);
    let mut k_scales = c.scales(formats[0], k_cache.shape, true);
    let v_shape = if pairs { [k0, k1 / 2, heads, 2 * v_dim] } else { [k0, k1, heads, v_dim] };
    let mut v_cache = c.tensor(formats[1], v_shape, true);
    let values = c.maybe(0.8);
    let mut v_scales = if values { c.scales(formats[1], v_shape, true) } else { None };
    let types = [c.dtype(), c.dtype()];
    let mut k = c.tensor(types[0], [batch, seq, heads, dim], false);
    let mut v = c.tensor(types[1], [batch, seq, heads, v_dim], false);
    c.alias(&mut k, &k_cache);
    c.alias(&mut v, &k);
    v_scales.iter_mut().for_each(|scales| c.alias(scales, &k));
    c.settle(&mut k_cache);
    c.settle(&mut k);
    c.settle_scales(&mut k_scales);
    if values {
        c.settle(&mut v_cache);
        c.settle(&mut v);
        c.settle_scales(&mut v_scales);
    }

    let (batch, seq) = (k.shape[0], k.shape[1]);
    let layout = places.give(&mut c, k_cache.shape[1]);
    let wrong = [-1, k1 as i32, k1 as i32 - 1, rows as i32, k0 as i32, i32::MIN, i32::MAX];
    let counts = if c.maybe(0.3) { Some(batch) } else { None };
    let counts: List<i32> = c.list(counts, &wrong, |c, _| c.rng.below(seq.clamp(0, 1000) as usize + 1) as i32);
    let from_rows = if c.maybe(0.4) { Some(batch) } else { None };
    let from_rows: List<i32> = c.list(from_rows, &wrong, |c, _| c.rng.below(rows.max(1) as usize) as i32);
    let positions: List<i32> = c.list(Some(batch), &wrong, |c, b| {
        let source = from_rows.values.get(b).map_or(b as i64, |&row| row.into()).clamp(0, rows.max(1) - 1);
        let room = if rows > 0 { places.room(source as usize) - seq.clamp(0, places.room(source as usize)) } else { 0 };
        c.rng.below(room as usize + 1) as i32
    });
    let v_packing = c.code(pairs.into());

    // Slots that are not read remain poison.
    let count = |b: usize| counts.values.get(b).map_or(seq, |&n| n.into()).clamp(0, seq.clamp(0, 1 << 12));
    let mut live = Slots::default();
    for (b, &position) in positions.values.iter().enumerate() {
        let row = from_rows.values.get(b).map_or(b as i64, |&row| row.into());
        live.extend((0..count(b)).filter_map(|t| layout.place(row, i64::from(position).checked_add(t)?)));
    }
    let is_live = |at: [usize; 3]| live.contains(&(at[0] as i64, at[1] as i64));
    for tensor in std::iter::once(&k_cache).chain(&k_scales) {
        c.fill(tensor, is_live);
    }
    for tensor in std::iter::once(&v_cache).chain(&v_scales).filter(|_| values) {
        c.fill(tensor, |[row, slot, head]| match pairs {
            true => is_live([row, 2 * slot, head]) || is_live([row, 2 * slot + 1, head]),
            false => is_live([row, slot, head]),
        });
    }
    let is_read = |at: [usize; 3]| (at[1] as i64) < count(at[0]);
    c.writes(&k, is_read);
    if values {
        c.writes(&v, is_read);
    }
    let params = kvl_kv_read_params {
        k_cache: c.const_view(&k_cache),
        v_cache: if values || c.hit() { c.const_view(&v_cache) } else { zeroed() },
        k: c.view(&k),
        v: if values { c.view(&v) } else { zeroed() },
        positions: positions.at,
        counts: counts.at,
        sequences: from_rows.at,
        layout: layout.at,
        v_packing,
        reserved: c.code(0),
        scales: c.scales_of([&k_scales, &v_scales]),
        k_hadamard: c.hadamard(k.shape[3]),
        v_hadamard: if values { c.hadamard(v.shape[3]) } else { 0 },
        ..zeroed()
    };
    let (params, context, runner) = (c.sized(&params, &[]), c.context(), c.runner());
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_kv_read(context, runner, params) };
    c.check(status)
}

fn pack_row_pairs(c: Call) -> i32 {
    pack(c, true)
}

fn unpack_row_pairs(c: Call) -> i32 {
    pack(c, false)
}

fn pack(mut c: Call, forwards: bool) -> i32 {
    c.spoil_rate(0.1);
    let ([batch, seq, heads, dim], from) = (c.shape(), c.dtype());
    let to = if c.hit() { c.dtype() } else { from };
    let (plain, pairs) = ([batch, seq, heads, dim], [batch, (seq + 1) / 2, heads, 2 * dim]);
    let mut src = c.tensor(from, if forwards { plain } else { pairs }, true);
    let mut dst = c.tensor(to, if forwards { pairs } else { plain }, false);
    c.alias(&mut dst, &src);
    c.settle(&mut src);
    c.settle(&mut dst);
    c.fill(&src, |_| true);
    let seq = src.shape[1];
    match forwards {
        true => c.writes_pairs(&dst, |at| (at[1] as i64) < seq),
        false => c.writes(&dst, |_| true),
    }
    let (src, dst, context, runner) = (c.const_view(&src), c.view(&dst), c.context(), c.runner());
    let (src, dst) = (c.fixed(src), c.fixed(dst));
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe {
        match forwards {
            true => kvl_pack_row_pairs(context, runner, src, dst),
            false => kvl_unpack_row_pairs(context, runner, src, dst),
        }
    };
    c.check(status)
}

fn repeat_kv(mut c: Call) -> i32 {
    c.spoil_rate(0.1);
    let [batch, seq, heads, dim] = c.shape();
    let (n, from) = (c.rng.between(1, 4) as i64, c.dtype());
    let to = if c.hit() { c.dtype() } else { from };
    let mut src = c.tensor(from, [batch, seq, heads, dim], true);
    let mut dst = c.tensor(to, [batch, seq, heads * n, dim], false);
    c.alias(&mut dst, &src);
    c.settle(&mut src);
    c.settle(&mut dst);
    c.fill(&src, |_| true);
    c.writes(&dst, |_| true);
    let (src, dst, context, runner) = (c.const_view(&src), c.view(&dst), c.context(), c.runner());
    let (src, dst) = (c.fixed(src), c.fixed(dst));
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_repeat_kv(context, runner, src, dst) };
    c.check(status)
}

fn rope_frequencies(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let right = c.rng.pick(&[1, 2, 3, 16, 32, 64, 2048]);
    let (scaling, base) = (c.rng.between(0, 5) as i32, c.rng.pick(&[0.0, 10_000.0, 500_000.0]));
    // The exponent of NTK is undefined for a single pair.
    let right = if scaling == 2 { right.max(2) } else { right };
    let rotary_dim = c.number(2 * right);
    let pairs = c.number(right);
    let factors = c.list(Some(pairs), &[0.0, -1.0, f64::NAN], |c, _| 1.0 + f64::from(c.value().abs()));
    let (attention_factor, keep_ramp) = (if c.maybe(0.5) { 0.0 } else { 1.1 }, i32::from(c.maybe(0.5)));
    let params = kvl_rope_frequencies_params {
        rotary_dim,
        base: c.float(base),
        scaling: c.code(scaling),
        keep_ramp: c.code(keep_ramp),
        factor: c.float(8.0),
        original_max_position: c.float(8192.0),
        low_freq_factor: c.float(0.0),
        high_freq_factor: c.float(4.0),
        beta_fast: c.float(0.0),
        beta_slow: c.float(1.0),
        attention_factor: c.float(attention_factor),
        factors: factors.at,
        ..zeroed()
    };
    let params = c.sized(&params, &[]);
    let (inv_freq, magnitude) = (c.output::<f64>(Some(pairs)), c.output::<f64>(Some(1)));
    c.may_write(inv_freq, Some(pairs));
    c.may_write(magnitude, Some(1));
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_rope_frequencies(params, inv_freq, pairs, magnitude) };
    c.check(status)
}

fn rope_table(mut c: Call) -> i32 {
    c.spoil_rate(0.08);
    let (rows, half) = (c.rng.between(0, 40) as i64, c.rng.between(1, 70) as i64);
    let (rows, rotary_dim) = (c.number(rows), c.number(2 * half));
    let half = (2..=4096).contains(&rotary_dim).then_some(rotary_dim / 2);
    let entries = half.and_then(|half| product(&[rows, half]));
    let wrong = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    let inv_freq = c.list(half.or(Some(1)), &wrong, |c, _| f64::from(c.value().abs()));
    let (cos, sin) = (c.output::<f32>(entries), c.output::<f32>(entries));
    // Tables of one entry would be adjacent.
    let sin = if c.hit() && entries != Some(1) { cos.wrapping_add(1) } else { sin };
    let first = c.rng.u64() as i32 as i64;
    let (first, magnitude) = (c.number(first), c.float(0.0));
    c.may_write(cos, entries);
    if !sin.is_null() && sin != cos.wrapping_add(1) {
        c.may_write(sin, entries);
    }
    let context = c.context();
    c.ready();
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    let status = unsafe { kvl_rope_table(context, inv_freq.at, rotary_dim, magnitude, first, rows, cos, sin) };
    c.check(status)
}

// ---------------------------------------------------------------------------------------------------------------------
// Contexts, pools, and information about the library

fn context_create(mut c: Call) -> i32 {
    let level = if c.maybe(0.5) { 0 } else { 1 };
    let flags = c.rng.below(2) as i32;
    let params = kvl_context_params { max_isa: c.code(level), flags: c.code(flags) as u32, ..zeroed() };
    let params = if c.maybe(0.3) { std::ptr::null_mut() } else { c.sized(&params, &[]) };
    let context: *mut *mut kvl_context = c.output(Some(1));
    c.may_write(context, Some(1));
    c.ready();
    // SAFETY: structs of the right size, or null.
    let status = unsafe { kvl_context_create(params, context) };
    if status == 0 {
        // SAFETY: created above, and destroyed once.
        unsafe { kvl_context_destroy(context.read()) };
    }
    c.check(status)
}

fn context_destroy(mut c: Call) -> i32 {
    let mut context = std::ptr::null_mut();
    if c.maybe(0.7) {
        // SAFETY: an output of the right size.
        assert_eq!(unsafe { kvl_context_create(std::ptr::null(), &raw mut context) }, 0);
    }
    c.ready();
    // SAFETY: null, or created above, and destroyed once.
    unsafe { kvl_context_destroy(context) };
    c.check(0)
}

fn context_isa(mut c: Call) -> i32 {
    let (context, isa) = (c.context(), c.output::<i32>(Some(1)));
    c.may_write(isa, Some(1));
    c.ready();
    // SAFETY: a context or null, and space for the result or null.
    let status = unsafe { kvl_context_isa(context, isa) };
    c.check(status)
}

fn context_kernel_name(mut c: Call) -> i32 {
    let (op, src) = (c.rng.between(0, 6) as i32, c.dtype());
    // Angles are f32; RoPE, the write and the norm have kernels for every pair of types.
    let src = if op == 0 { 0 } else { src };
    let dst = if matches!(op, 1 | 2 | 6) { c.dtype() } else { src };
    let (op, src, dst, context) = (c.code(op), c.code(src), c.code(dst), c.context());
    let name = c.output(Some(1));
    c.may_write(name, Some(1));
    c.ready();
    // SAFETY: as above.
    let status = unsafe { kvl_context_kernel_name(context, op, src, dst, name) };
    if status == 0 {
        // SAFETY: a constant of the library.
        assert!(unsafe { CStr::from_ptr(name.read()) }.to_str().is_ok_and(|name| name.contains('_')));
    }
    c.check(status)
}

fn context_v_packing(mut c: Call) -> i32 {
    let format = c.format(32);
    let (format, context, packing) = (c.code(format), c.context(), c.output::<i32>(Some(1)));
    c.may_write(packing, Some(1));
    c.ready();
    // SAFETY: a context or null, and space for the result or null.
    let status = unsafe { kvl_context_v_packing(context, format, packing) };
    if status == 0 {
        // SAFETY: just written.
        assert!((0..=1).contains(&unsafe { packing.read() }));
    }
    c.check(status)
}

fn context_tuning(mut c: Call) -> i32 {
    let context = c.context();
    let tuning = c.sized(&zeroed::<kvl_tuning>(), &[]);
    c.may_write(tuning, Some(1));
    c.ready();
    // SAFETY: a context or null, and a struct of the right size or null.
    let status = unsafe { kvl_context_tuning(context, tuning) };
    c.check(status)
}

/// The context is one of the world's, so that later calls run with any tuning.
fn context_set_tuning(mut c: Call) -> i32 {
    let mut kind = |most: usize| {
        let right = c.rng.below(most) as i32;
        c.code(right)
    };
    let (block, run, run_one_row, run_long_heads, block_order) = (kind(7), kind(7), kind(7), kind(7), kind(3));
    let score_tiles = kind(3);
    let run_distance = c.rng.pick(&[0, 1, 64, 4096, 100_000, usize::MAX]);
    let tuning =
        kvl_tuning { block, block_order, run, run_one_row, run_distance, run_long_heads, score_tiles, ..zeroed() };
    let (tuning, context) = (c.sized(&tuning, &[]), c.context());
    c.ready();
    // SAFETY: a context that no other call uses, or null, and a struct of the right size or null.
    let status = unsafe { kvl_context_set_tuning(context.cast_mut(), tuning) };
    c.check(status)
}

fn context_attention_kernel_names(mut c: Call) -> i32 {
    let (k, v, precision) = (c.rng.below(4) as i32, c.rng.below(4) as i32, i32::from(c.maybe(0.5)));
    let (k, v, precision, context) = (c.code(k), c.code(v), c.code(precision), c.context());
    let (k_name, v_name) = (c.output::<*const i8>(Some(1)), c.output::<*const i8>(Some(1)));
    c.may_write(k_name, Some(1));
    c.may_write(v_name, Some(1));
    c.ready();
    // SAFETY: as above.
    let status = unsafe { kvl_context_attention_kernel_names(context, k, v, precision, k_name.cast(), v_name.cast()) };
    if status == 0 {
        for name in [k_name, v_name] {
            // SAFETY: a constant of the library.
            assert!(unsafe { CStr::from_ptr(name.read().cast()) }.to_str().is_ok_and(|n| n.starts_with("attention_")));
        }
    }
    c.check(status)
}

fn kernel_info_at(mut c: Call) -> i32 {
    let index = c.rng.below(kvl_kernel_count()) as i64;
    let index = c.number(index) as usize;
    let info = c.sized(&zeroed::<kvl_kernel_info>(), &[]);
    c.may_write(info, Some(1));
    c.ready();
    // SAFETY: a struct of the right size, or null.
    let status = unsafe { kvl_kernel_info_at(index, info) };
    c.check(status)
}

fn advise_huge_pages(mut c: Call) -> i32 {
    let bytes = c.rng.pick(&[0usize, 1, 63, 4096, 5000, 40_000]);
    let data: *mut u8 = c.output(Some(bytes as i64));
    let bytes = if c.hit() { c.rng.pick(&[1, usize::MAX, usize::MAX / 2]) } else { bytes };
    let advised: *mut i32 = c.output(Some(1));
    c.may_write(advised, Some(1));
    c.ready();
    // SAFETY: the range is not accessed; space for the result, or null.
    let status = unsafe { kvl_advise_huge_pages(data.cast(), bytes, advised) };
    if status == 0 {
        // SAFETY: just written.
        assert!((0..=1).contains(&unsafe { advised.read() }));
    }
    c.check(status)
}

fn thread_pool_create(mut c: Call) -> i32 {
    let threads = c.rng.between(1, 2);
    let threads = if c.hit() { c.rng.pick(&[4097, usize::MAX, 1 << 40]) } else { threads };
    let pool: *mut *mut kvl_thread_pool = c.output(Some(1));
    c.may_write(pool, Some(1));
    c.ready();
    // SAFETY: space for the result, or null.
    let status = unsafe { kvl_thread_pool_create(threads, pool) };
    if status == 0 {
        // SAFETY: created above, and destroyed once.
        unsafe { kvl_thread_pool_destroy(pool.read()) };
    }
    c.check(status)
}

fn thread_pool_destroy(mut c: Call) -> i32 {
    let mut pool = std::ptr::null_mut();
    if c.maybe(0.5) {
        // SAFETY: space for the result.
        assert_eq!(unsafe { kvl_thread_pool_create(1, &raw mut pool) }, 0);
    }
    c.ready();
    // SAFETY: null, or created above, and destroyed once.
    unsafe { kvl_thread_pool_destroy(pool) };
    c.check(0)
}

fn thread_pool_runner(mut c: Call) -> i32 {
    let pool = if c.hit() { std::ptr::null_mut() } else { c.world.pool };
    let runner = c.sized(&zeroed::<kvl_parallel_runner>(), &[]);
    c.may_write(runner, Some(1));
    c.ready();
    // SAFETY: a live pool, or null; a struct of the right size, or null.
    let status = unsafe { kvl_thread_pool_runner(pool, runner) };
    c.check(status)
}

fn last_error(mut c: Call) -> i32 {
    // SAFETY: null is an error with a sentence.
    assert_ne!(unsafe { kvl_context_isa(std::ptr::null(), std::ptr::null_mut()) }, 0);
    let size = c.rng.below(80);
    let buffer = c.arena.block(size, 0);
    let null = c.maybe(0.2);
    c.may_write(buffer, Some(size as i64));
    c.ready();
    // SAFETY: as many bytes as stated, or null.
    let needed = unsafe { kvl_last_error(if null { std::ptr::null_mut() } else { buffer }, size) };
    assert!((2..=1024).contains(&needed));
    if !null && size > 0 {
        // SAFETY: a block of this call.
        let text = unsafe { std::slice::from_raw_parts(buffer, size) };
        assert_eq!(text.iter().position(|&b| b == 0), Some(size.min(needed) - 1));
    }
    assert!(!null || Call::poisoned(buffer, size));
    c.check(0)
}

fn constants(mut c: Call) -> i32 {
    c.ready();
    let any = if c.maybe(0.7) { c.rng.below(20) as i32 - 2 } else { c.rng.u64() as i32 };
    // SAFETY: constants of the library, which end with a zero.
    let texts = unsafe {
        [kvl_version_string(), kvl_status_string(any), kvl_isa_name(any)].map(|text| CStr::from_ptr(text).to_str())
    };
    assert!(texts.iter().all(|text| text.is_ok_and(|text| !text.is_empty())));
    assert!((0..=1).contains(&kvl_isa_available(any)));
    assert!(kvl_kernel_count() > 0 && kvl_abi_version() >> 16 == 0);
    c.check(0)
}
