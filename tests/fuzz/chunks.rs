//! Calls that merge the states of segments.

use crate::abi::*;
use crate::call::{Call, product};
use crate::memory::Tensor;

/// The number of floats before the values of a state.
const HEADER: usize = 16;

/// States of segments, as a call could have written them.
struct Spans {
    /// Heads of the output are a multiple of this.
    kv_heads: i64,
    shape: [i64; 4],
    /// The chunks of each segment.
    chunks: Vec<i64>,
}

impl Spans {
    fn new(c: &mut Call) -> Self {
        let [batch, seq, kv_heads, v_dim] = c.shape();
        let shape = [batch, seq, kv_heads * c.rng.between(1, 3) as i64, v_dim];
        let kv_heads = kv_heads.max(1);
        let spans = Self { kv_heads, shape, chunks: Vec::new() };
        let few = spans.floats(1) < 1 << 15;
        let n = if few { c.rng.between(1, 4) } else { 1 };
        Self { chunks: (0..n).map(|_| if few { c.rng.between(1, 3) as i64 } else { 1 }).collect(), ..spans }
    }

    fn stride(&self) -> usize {
        HEADER + (self.shape[3] as usize).next_multiple_of(16)
    }

    fn floats(&self, chunks: i64) -> i64 {
        product(&self.shape[..3]).expect("few rows") * chunks * self.stride() as i64
    }

    /// The states in memory, or null, and the stated number of floats.
    fn give(&self, c: &mut Call, there: bool) -> Vec<kvl_chunk_states> {
        let (stride, mut empty, mut spans) = (self.stride(), false, Vec::new());
        for &chunks in &self.chunks {
            let len = c.number(self.floats(chunks));
            let wrong = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38];
            let states = c.list(there.then_some(len), &wrong, |c, i| match i % stride {
                0 => {
                    empty = c.maybe(0.2);
                    if empty { f32::NEG_INFINITY } else { c.value() * 5.0 }
                }
                1 if empty => 0.0,
                1 => 0.5 + c.value().abs(),
                // Neither the rest of the header nor the values of an empty state are read.
                at if at < HEADER || empty => f32::NAN,
                _ => c.value(),
            });
            if there && states.at.is_null() {
                // More entries than any list here.
                c.allow_error();
            }
            spans.push(kvl_chunk_states { states: states.at, len });
        }
        spans
    }
}

/// The list and its length; beyond the maximum, entries repeat.
fn list(c: &mut Call, spans: &[kvl_chunk_states]) -> (*const kvl_chunk_states, usize) {
    let n = if c.hit() { c.rng.pick(&[0, 257, 300, usize::MAX]) } else { spans.len() };
    let all: Vec<_> = spans.iter().cycle().take(n.min(300)).copied().collect();
    let at = c.arena.copy(&all, 0).cast_const();
    (if c.hit() { std::ptr::null() } else { at }, n)
}

pub fn merge_chunks(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let (right, dtype, formats) = (Spans::new(&mut c), c.dtype(), [c.format(32), c.format(32)]);
    let spans = right.give(&mut c, true);
    let mut out = c.tensor(dtype, right.shape, false);
    let first = Tensor {
        data: spans[0].states.cast_mut().cast(),
        dtype: 0,
        reserved: 0,
        shape: [1, 1, 1, right.floats(right.chunks[0])],
        strides: [0, 0, 0, 1],
        bytes: 0,
    };
    if first.fits(&c.arena) {
        c.alias(&mut out, &first);
    }
    c.settle(&mut out);
    let rows = product(&out.shape[..3]);
    let n = if c.maybe(0.5) { Some(out.shape[2]) } else { None };
    let sinks = c.list(n, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY], |c, _| c.value());
    let mut lse: *mut f32 = if c.maybe(0.5) { c.output(rows) } else { std::ptr::null_mut() };
    c.may_write(lse, rows);
    if !lse.is_null() && c.hit() {
        lse = c.rng.pick(&[spans[0].states.cast_mut(), out.data.cast(), sinks.at.cast_mut()]);
        c.allow_error();
    }
    c.writes(&out, |_| true);
    let precision = c.precision();
    let (list, num_segments) = list(&mut c, &spans);
    let params = kvl_merge_chunks_params {
        segments: list,
        num_segments,
        kv_heads: c.number(right.kv_heads),
        k_format: c.code(formats[0]),
        v_format: c.code(formats[1]),
        precision: c.code(precision),
        sink_logits: sinks.at,
        out: c.view(&out),
        lse,
        v_hadamard: c.hadamard(out.shape[3]),
        ..zeroed()
    };
    let params = c.sized(&params, &[]);
    let (context, runner) = (c.context(), c.runner());
    let mut needed = 0;
    // SAFETY: all data is in blocks of the sizes that the arguments state.
    if unsafe { kvl_merge_chunks_workspace_size(params, runner, &raw mut needed) } != 0 || needed > 64 << 20 {
        // Errors of the shapes are reported here too, and such a workspace does not exist.
        needed = 64;
        c.allow_error();
    }
    if c.hit() {
        needed = c.rng.below(needed + 1);
    }
    let skip = if c.hit() { c.rng.between(1, 63) } else { 0 };
    let workspace = c.arena.scratch(needed, skip);
    c.ready();
    // SAFETY: as above.
    let status = unsafe { kvl_merge_chunks(context, runner, workspace, needed, params) };
    c.check(status)
}

pub fn merge_chunks_workspace_size(mut c: Call) -> i32 {
    c.spoil_rate(0.05);
    let right = Spans::new(&mut c);
    let spans = right.give(&mut c, false);
    let (list, num_segments) = list(&mut c, &spans);
    let out = kvl_view { shape: right.shape.map(|n| c.number(n)), dtype: c.code(0), reserved: c.code(0), ..zeroed() };
    let params = kvl_merge_chunks_params {
        segments: list,
        num_segments,
        kv_heads: c.number(right.kv_heads),
        k_format: c.code(0),
        v_format: c.code(0),
        precision: c.code(0),
        out,
        ..zeroed()
    };
    let (params, runner, bytes) = (c.sized(&params, &[]), c.runner(), c.output::<usize>(Some(1)));
    c.may_write(bytes, Some(1));
    c.ready();
    // SAFETY: structs of the right size, or null; data is null and not accessed.
    let status = unsafe { kvl_merge_chunks_workspace_size(params, runner, bytes) };
    c.check(status)
}
