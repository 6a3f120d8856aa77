//! Moves of tokens whose scales are not theirs alone: several tokens share those that writes compute, or scales that are not written
//! differ from place to place.
//!
//! # The road of a block
//! The tokens that share scales are a block: neighbouring slots, of one head, in which tokens of one sequence lie, or where ragged
//! sequences meet of two and more. A move names the positions that arrive in a sequence and where each comes from. Every block in
//! which a token arrives is visited once, in ascending order of slots, and its tokens afterwards are those that arrive and those that
//! stay:
//!
//! 1. Where all of them shared one block's scales before, and none is turned or comes from another description, units and scales are
//!    copied. This is the case of blocks that move as a whole or in part, of tokens that close up inside a block, and of a single one.
//! 2. Otherwise the block is quantised again, head by head. A first pass takes every token to f32 (`Load`: read, converted, turned) and
//!    keeps the least and the largest element of each channel. These are two tokens, and quantising them gives the scales and zero
//!    points of all, since those depend on nothing else. A second pass takes every token to f32 again and quantises it with these
//!    scales, as a cache with fixed scales is written: both ways make integers by the same rule. At last the scales are stored.
//!
//! # Who owns what
//! Nothing is kept of a whole block, however many tokens it has. A head in f32, the extremes, and the scales and zero points on their
//! way are on the stack of the worker: [`Stage`], 20 KiB. The old scales of a block stay in their place until
//! all that reads by them is done. In the second pass arriving tokens come first, from the lowest slot on: what they read lies above
//! them in their own sequence, or is a token that stays.
//!
//! Scales that writes compute belong to one head, and pieces are of heads, so that no two workers meet at a block.

use super::{RowOf, copy_of_units, copy_parameters, copy_tokens};
use crate::context::Context;
use crate::dtype::DType;
use crate::format::CacheFormat;
use crate::kernels::api::{AffineArgs, CopyArgs, CopyFn, ScaledArgs, ScaledFn};
use crate::layout::{Layout, Place};
use crate::ops::heads::{HeadKernels, Scales, Turn};
use crate::ops::vectors_copy;
use crate::ops::write::tokens_sharing;
use crate::problem::limits::MAX_HEAD_DIM;
use crate::view::{AffineGroups, AffineRow, DIM, HEADS, RawAffine, RawCacheView, RawView, SEQ, Units};
use std::ops::Range;

/// How a head of a token becomes f32.
#[derive(Clone, Copy)]
pub(super) struct Load<'a> {
    /// From where the token lies to f32, and from there in place.
    steps: [Option<HeadKernels<'a>>; 4],
    turn: Option<Turn>,
    /// Units are those of the target, if it has their scales.
    keeps: bool,
}

impl<'a> Load<'a> {
    /// From another cache.
    fn between(context: &Context, src: &RawCacheView, dst: &RawCacheView) -> Self {
        let kernels = match src.dtype.dtype() {
            Some(dtype) => HeadKernels::write(context, None, false, None, dtype, DType::F32.into()),
            None => HeadKernels::read(context, None, src.dtype, DType::F32),
        };
        let keeps = src.dtype == dst.dtype
            && matches!((&src.affine, &dst.affine), (Some(a), Some(b)) if !a.fixed && a.is_alike(b));
        Self { steps: [Some(kernels), None, None, None], turn: None, keeps }
    }

    /// Turned: unturned elements, or without a type of elements, keys of a cache of a format that are turned on.
    pub fn turned(
        context: &Context,
        from: Option<DType>,
        format: CacheFormat,
        hadamard: Option<usize>,
        turn: Option<Turn>,
    ) -> Self {
        let rope = |from| Some(HeadKernels::write(context, None, true, None, from, DType::F32.into()));
        let rotate =
            hadamard.map(|_| HeadKernels::write(context, None, false, hadamard, DType::F32, DType::F32.into()));
        let steps = match from {
            Some(from) => [rope(from), rotate, None, None],
            None => {
                let read = HeadKernels::read(context, None, format, DType::F32);
                [Some(read), rotate, rope(DType::F32), rotate]
            }
        };
        Self { steps, turn, keeps: false }
    }
}

/// A token that a block holds after a move, where it lies before.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    pub cache: &'a RawCacheView,
    pub at: Place,
    pub load: &'a Load<'a>,
    /// Instead of the turn of its load, if there is one.
    pub turn: Option<Turn>,
}

impl Token<'_> {
    /// The block whose scales the token has.
    fn block(&self) -> (*mut u8, usize, usize) {
        let shared = self.cache.affine.as_ref().map_or(1, |affine| affine.shared[SEQ]);
        (self.cache.units.data, self.at.0, self.at.1 / shared)
    }

    /// Writes a head as f32.
    ///
    /// # Safety
    /// The cache is valid and has the token and the head, which fits into `to`.
    unsafe fn load(&self, head: usize, to: &mut [f32; MAX_HEAD_DIM]) {
        let (Self { cache, at, .. }, Load { steps, turn, .. }) = (self, self.load);
        let (to, dim): (*mut u8, _) = (to.as_mut_ptr().cast(), cache.shape[DIM]);
        // SAFETY: the caller's.
        let copy = one(unsafe { cache.row(at.0, at.1, head) }, to, dim);
        let mut copy = CopyArgs { src_dim: cache.strides[DIM] as isize, ..copy };
        for kernels in steps.iter().flatten() {
            // SAFETY: the caller's; only the first of the kernels reads what has scales.
            unsafe { kernels.run(&copy, || [Scales::of_vectors(cache, HEADS, *at, head), None], self.turn.or(*turn)) };
            copy = one(to, to, dim);
        }
    }
}

/// A head whose elements or units lie together on both sides.
fn one(src: *const u8, dst: *mut u8, dim: usize) -> CopyArgs {
    CopyArgs {
        src,
        second: std::ptr::null(),
        dst,
        heads: 1,
        repeats: 1,
        src_head: 0,
        dst_head: 0,
        src_dim: 1,
        dst_dim: 1,
        dim,
        src_prefetch: 0,
        dst_prefetch: 0,
    }
}

/// What a head of a block passes through.
struct Stage {
    head: [f32; MAX_HEAD_DIM],
    /// The least and the largest element of each channel; NaN where one is not finite.
    extremes: [[f32; MAX_HEAD_DIM]; 2],
    /// Of their types, in memory for the largest.
    scales: [f32; MAX_HEAD_DIM],
    zeros: [f32; MAX_HEAD_DIM],
}

/// The move of tokens into blocks.
pub(super) struct Blocks<'a> {
    load: Load<'a>,
    stay: Load<'a>,
    quantize: ScaledFn,
}

impl<'a> Blocks<'a> {
    /// Into a cache, of tokens that are loaded in this way.
    pub fn new(context: &Context, dst: &RawCacheView, load: Load<'a>) -> Self {
        let stay = Load::between(context, dst, dst);
        Self { load, stay, quantize: context.quantize(DType::F32, dst.dtype) }
    }

    /// From one cache to another, or to other places of the same.
    pub fn between(context: &Context, src: &RawCacheView, dst: &RawCacheView) -> Self {
        Self::new(context, dst, Load::between(context, src, dst))
    }

    /// A token of the source.
    pub fn token<'b>(&'b self, cache: &'b RawCacheView, at: Place) -> Token<'b> {
        Token { cache, at, load: &self.load, turn: None }
    }

    /// Moves tokens to some of the positions `touched` of a sequence, to those for which `arrives` tells where the token lies. `after` is
    /// the number of tokens that each sequence of the target has then.
    ///
    /// # Safety
    /// The caches are valid and agree in heads and dim, which is not above [`MAX_HEAD_DIM`]; all places are inside them, and what is
    /// written is this call's alone; a token that arrives from the same cache and sequence comes from a higher position; the angles
    /// of turns live.
    pub unsafe fn fill<'b>(
        &'b self,
        dst: RowOf<'b>,
        touched: Range<usize>,
        after: &dyn Fn(usize) -> usize,
        arrives: &mut dyn FnMut(usize) -> Option<Token<'b>>,
    ) {
        let (slots, shared) = (dst.cache.shape[SEQ], tokens_sharing(dst.cache));
        let mut position = touched.start;
        while position < touched.end {
            let ((row, slot), _) = dst.layout.place(&dst.cache.units, dst.row, position);
            // A page of the sequence, or all of its slots.
            let (first, span) = match dst.layout {
                Layout::Ring { .. } => (0, 0..slots),
                Layout::Paged { .. } => (position - slot, slot..slots.min(slot + (touched.end - position))),
                _ => (0, slot..slot + (touched.end - position)),
            };
            for block in span.start / shared..span.end.div_ceil(shared) {
                let mut token = |slot: usize| {
                    let (sequence, position) = holder(&dst, first, slot, after)?;
                    let arriving = if sequence == dst.row { arrives(position) } else { None };
                    let staying = Token { cache: dst.cache, at: (row, slot), load: &self.stay, turn: None };
                    Some((arriving.unwrap_or(staying), arriving.is_some()))
                };
                // SAFETY: the caller's.
                unsafe { self.fill_block(dst.cache, row, block * shared..(block + 1) * shared, &mut token) };
            }
            position += match dst.layout {
                Layout::Paged { .. } => span.len(),
                _ => touched.len(),
            };
        }
    }

    /// # Safety
    /// As [`Self::fill`]; `token` tells which token a slot of the block holds afterwards, and whether it arrives.
    unsafe fn fill_block<'b>(
        &self,
        dst: &RawCacheView,
        row: usize,
        slots: Range<usize>,
        token: &mut dyn FnMut(usize) -> Option<(Token<'b>, bool)>,
    ) {
        let (mut moves, mut keeps, mut origin) = (false, true, None::<Token>);
        for slot in slots.clone() {
            let Some((token, arrives)) = token(slot) else { continue };
            moves |= arrives;
            let together = origin.get_or_insert(token).block() == token.block();
            keeps &= token.load.keeps && together;
        }
        let (Some(origin), true, Some(affine)) = (origin, moves, &dst.affine) else { return };
        let heads = dst.shape[HEADS];
        if !keeps {
            for head in 0..heads {
                // SAFETY: the caller's.
                unsafe { self.quantize_head(dst, affine, (row, slots.clone(), head), token) };
            }
            return;
        }
        let kernel = copy_of_units(dst.dtype.unit_bytes());
        for slot in slots.clone() {
            let Some((token, true)) = token(slot) else { continue };
            // SAFETY: the caller's; a slot is never that of the token which arrives there.
            unsafe { copy_tokens(kernel, &token.cache.units, token.at, &dst.units, (row, slot), 1) };
        }
        let own = (dst.units.data, row, slots.start / affine.shared[SEQ]);
        if let (Some(from), true) = (&origin.cache.affine, origin.block() != own) {
            // SAFETY: the caller's.
            unsafe { copy_parameters(from, origin.at, affine, (row, slots.start), (heads, 1)) };
        }
    }

    /// Quantises a head of the tokens of a block.
    ///
    /// # Safety
    /// As [`Self::fill_block`].
    #[inline(never)]
    unsafe fn quantize_head<'b>(
        &self,
        dst: &RawCacheView,
        affine: &RawAffine,
        (row, slots, head): (usize, Range<usize>, usize),
        token: &mut dyn FnMut(usize) -> Option<(Token<'b>, bool)>,
    ) {
        let dim = dst.shape[DIM];
        let mut stage = Stage {
            head: [0.0; MAX_HEAD_DIM],
            extremes: [[0.0; MAX_HEAD_DIM]; 2],
            scales: [0.0; MAX_HEAD_DIM],
            zeros: [0.0; MAX_HEAD_DIM],
        };
        let [least, most] = &mut stage.extremes;
        least.fill(f32::MAX);
        most.fill(-f32::MAX);
        for slot in slots.clone() {
            let Some((token, _)) = token(slot) else { continue };
            // SAFETY: the caller's.
            unsafe { token.load(head, &mut stage.head) };
            for ((&x, least), most) in stage.head[..dim].iter().zip(&mut *least).zip(&mut *most) {
                *least = if x.is_finite() { if x < *least { x } else { *least } } else { f32::NAN };
                *most = if x > *most { x } else { *most };
            }
        }
        let steps = [affine.scales.dtype.size(), affine.zeros.map_or(0, |zeros| zeros.dtype.size())];
        let [scale_step, zero_step] = steps.map(|size| size as isize);
        let computed = AffineGroups { scale_step, zero_step, ..affine.groups() };
        let first = AffineRow { scales: stage.scales.as_mut_ptr().cast(), zeros: stage.zeros.as_mut_ptr().cast() };
        let (src_token, dst_token) = (MAX_HEAD_DIM as isize, MAX_HEAD_DIM as isize);
        let args = AffineArgs { groups: computed, first, head_steps: [0; 2], tokens: 2, src_token, dst_token };
        let quantize = |copy, affine: &AffineArgs| {
            let (scales, scale_dtype) = (std::ptr::null_mut(), DType::F32);
            // SAFETY: the caller's; the stage holds what it names.
            unsafe {
                (self.quantize)(&ScaledArgs {
                    copy,
                    scales,
                    scale_head: 0,
                    scale_dtype,
                    affine: Some(affine),
                    first: 0,
                })
            };
        };
        // Their units, which nobody reads, have room in the head.
        quantize(one(stage.extremes.as_ptr().cast(), stage.head.as_mut_ptr().cast(), dim), &args);
        let args = AffineArgs { groups: AffineGroups { fixed: true, ..computed }, tokens: 1, ..args };
        for arriving in [true, false] {
            for slot in slots.clone() {
                let Some((token, arrives)) = token(slot) else { continue };
                if arrives == arriving {
                    // SAFETY: the caller's.
                    let to = unsafe {
                        token.load(head, &mut stage.head);
                        dst.row(row, slot, head)
                    };
                    quantize(one(stage.head.as_ptr().cast(), to, dim), &args);
                }
            }
        }
        // SAFETY: the caller's; as many as were computed.
        unsafe {
            let (to, steps_to) = (affine.row(row, slots.start, head), affine.steps(DIM));
            for group in 0..affine.scales.shape[DIM] as isize {
                let copy = |from: *mut u8, step: isize, to: *mut u8, step_to: isize| {
                    std::ptr::copy_nonoverlapping(
                        from.wrapping_offset(group * step),
                        to.wrapping_offset(group * step_to),
                        step as usize,
                    );
                };
                copy(first.scales, scale_step, to.scales, steps_to[0]);
                if affine.zeros.is_some() {
                    copy(first.zeros, zero_step, to.zeros, steps_to[1]);
                }
            }
        }
    }
}

/// The sequence and the position of the token that a slot holds, which is one of `dst`, or of a neighbour of ragged ones; `first` is the
/// position in the first slot of a page.
fn holder(dst: &RowOf, first: usize, slot: usize, after: &dyn Fn(usize) -> usize) -> Option<(usize, usize)> {
    let (sequence, position) = match *dst.layout {
        Layout::Contiguous | Layout::Indirect { .. } => (dst.row, slot),
        Layout::Paged { .. } => (dst.row, first + slot),
        Layout::Ring { sink_tokens } if slot < sink_tokens => (dst.row, slot),
        Layout::Ring { sink_tokens } => {
            // The newest of those that have been here.
            let newest = after(dst.row).checked_sub(1 + slot)?;
            let turn = dst.cache.shape[SEQ] - sink_tokens;
            (dst.row, slot + newest / turn * turn)
        }
        Layout::Ragged { cu_seqlens } => {
            let sequence = cu_seqlens.partition_point(|&start| start as usize <= slot).checked_sub(1)?;
            if sequence + 1 == cu_seqlens.len() {
                return None;
            }
            (sequence, slot - cu_seqlens[sequence] as usize)
        }
    };
    (position < after(sequence)).then_some((sequence, position))
}

/// Whether scales that are not written belong to sequences (or pages) or to slots.
pub(super) fn scales_have_places(cache: &RawCacheView) -> bool {
    let places = |affine: &RawAffine| affine.scales.shape[..HEADS].iter().any(|&n| n > 1);
    cache.affine.as_ref().is_some_and(|affine| affine.fixed && places(affine))
}

/// The move of tokens between places whose scales are not written: units are the same where the scales are.
pub(super) struct Fixed<'a> {
    units: CopyFn,
    kernels: HeadKernels<'a>,
}

impl Fixed<'_> {
    pub fn new(context: &Context, format: CacheFormat) -> Self {
        let kernels = HeadKernels::requantize(context, format, format);
        Self { units: copy_of_units(format.unit_bytes()), kernels }
    }

    /// Moves `n` tokens, whose scales are those of a place of `src` and units lie at a place of `units`.
    ///
    /// # Safety
    /// As [`move_tokens`](super::move_tokens), for descriptions that are alike but for the scales.
    pub unsafe fn run(
        &self,
        (units, at): (&RawView<CacheFormat>, Place),
        (src, from): (&RawCacheView, Place),
        (dst, to): (&RawCacheView, Place),
        n: usize,
    ) {
        for t in 0..n {
            let [at, from, to] = [at, from, to].map(|(row, slot)| (row, slot + t));
            for head in 0..dst.shape[HEADS] {
                // SAFETY: the caller's.
                unsafe {
                    let copy = vectors_copy(units, at, &dst.units, to, head, 1, HEADS);
                    if same_parameters((src, from), (dst, to), head) {
                        (self.units)(&CopyArgs { dim: dst.unit_shape()[DIM], ..copy });
                    } else {
                        let scales =
                            || [(src, from), (dst, to)].map(|(cache, at)| Scales::of_vectors(cache, HEADS, at, head));
                        self.kernels.run(&copy, scales, None);
                    }
                }
            }
        }
    }

    /// Copies units alone.
    ///
    /// # Safety
    /// As [`move_tokens`](super::move_tokens).
    pub unsafe fn copy(&self, src: &RawCacheView, from: Place, dst: &RawCacheView, to: Place, n: usize) {
        // SAFETY: the caller's.
        unsafe { copy_tokens(self.units, &src.units, from, &dst.units, to, n) };
    }
}

/// Whether a head of two tokens has the same scales and zero points, to the bit.
///
/// # Safety
/// The descriptions are valid and alike, and have the tokens and the head.
unsafe fn same_parameters((src, from): (&RawCacheView, Place), (dst, to): (&RawCacheView, Place), head: usize) -> bool {
    /// # Safety
    /// `bytes` bytes are readable at both addresses.
    unsafe fn same(a: *const u8, b: *const u8, bytes: usize) -> bool {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(a, bytes) == std::slice::from_raw_parts(b, bytes) }
    }
    let (Some(a), Some(b)) = (&src.affine, &dst.affine) else { return false };
    let (steps_a, steps_b) = (a.steps(DIM), b.steps(DIM));
    // SAFETY: the caller's.
    unsafe {
        let (row_a, row_b) = (a.row(from.0, from.1, head), b.row(to.0, to.1, head));
        (0..a.scales.shape[DIM] as isize).all(|group| {
            let at = |row: *mut u8, step: isize| row.wrapping_offset(group * step).cast_const();
            same(at(row_a.scales, steps_a[0]), at(row_b.scales, steps_b[0]), a.scales.dtype.size())
                && a.zeros.is_none_or(|zeros| {
                    same(at(row_a.zeros, steps_a[1]), at(row_b.zeros, steps_b[1]), zeros.dtype.size())
                })
        })
    }
}
