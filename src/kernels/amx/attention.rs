//! Attention over bf16 keys and values by tile products.
//!
//! # The road
//! As in [`generic`](crate::kernels::generic::attention), a tile is query rows of one KV head, its keys are walked in blocks of
//! 64 and chunks of 1024 on an absolute grid, and what a mask means is decided there; between the two stand visibility of
//! [`SUPERBLOCK`] blocks, the unit of the online softmax. Everything is transposed, so that the sixteen lanes of a vector are
//! sixteen rows ([`LANES`], a *group*) and softmax needs no sum across lanes:
//!
//! ```text
//! once:      Q -> bf16 terms, transposed, in pairs      B  [group][term][32 dims]   16 pairs x 16 rows
//! a superblock:    K as it lies in memory, or a padded copy   A  [16 keys][32 dims]
//!            V transposed                               A  [64 keys][half][16 dims] 16 dims x 32 keys
//! two groups at a time, the blocks that they see:
//!            S^T = K Q^T                                C  [256 keys][16 rows]
//!            P^T = 2^(c S^T - max), as bf16 in pairs    B  [128 pairs][16 rows]
//!            O^T = O^T 2^(old max - max) + V^T P^T      C  [dims][16 rows]
//! a chunk:   O^T transposed and folded into the row's total, in ascending order
//! ```
//! Two neighbouring keys of P^T are the two halves of a 32-bit lane, so packing weights is a shift and an OR; transposing V
//! is paid once for all rows. Few rows take the same road: it is what makes decode and prefill agree.
//!
//! # Exactness
//! Products of bf16 are exact in f32. A query of another type is the exact sum of two (f16) or three (f32) bf16 terms, and
//! a score the sum of their products. A softmax weight is rounded to one bf16, an error of 2^-8 of itself, and a row is
//! divided, chunk by chunk, by the sum of what it was multiplied by: the error of an output is then a mean of |v - output| times 2^-8,
//! so at most 2^-8 of the largest |v|, and no more than f32 rounds where all values agree. (Dividing by the sum of the exact weights has the same
//! bound, but errs where values agree.) The log-sum-exp is that of the weights before rounding. With `HIGH`, a weight is two
//! terms, an error of 2^-17.
//!
//! Tile products take subnormal numbers for 0 and make none.
//!
//! # Why the bits do not depend on anything but the row
//! A column of a tile product depends on that column of B alone. All additions to a row's score or output are by tile
//! products over the same 32 dims or keys in the same order; a key that is hidden, or beyond an end, has weight +0, and
//! adding its product changes nothing: the sums have just been through a tile product, which leaves no subnormal that another
//! could flush, so it does not matter whether a block that is hidden is skipped.
//!
//! # Why nothing hidden gets out
//! Keys that no row of the tile may see are not loaded. Hidden scores are replaced. V is looked at while it is packed: an
//! element that is not finite becomes 0 in the packed copy, and is added afterwards to the rows that see it. A score that is NaN is
//! computed again, one product after the other, where Q has more than one term: infinity times a term of 0 is not what
//! infinity times the query is.
//!
//! # What bounds it
//! Not timed: an estimate from instruction counts, for bf16 queries, two groups, 64 keys, head size 128. Both products take
//! 64 `tdpbf16ps` of 16 cycles: 1024 cycles. They load 64 tiles of operands, 1024 lines at two a cycle: 512 cycles; O comes and
//! goes once a superblock of four blocks. Softmax has 128 vectors of 15 instructions on two ports (one of the maximum; for the
//! weight an FMA, a range reduction, four FMAs, a scaling of two, two sums, and 3.5 of rounding and packing): 960 cycles. One
//! after the other they would leave the tiles idle for half of the time. So two groups are a [`Job`], and the products of its
//! neighbours, the outputs of the one before and the scores of the one after, are issued a [step](Work::step) at a time between the
//! vectors of its softmax: 64 cycles of products every four pairs of vectors, near enough for the reorder buffer to hold
//! both. Queries in f32 take three times the products for scores.
//!
//! Packing V takes 1300 shuffles a block (from pairs 1000), once for all rows of the tile: some 15 % of a block's time at 256 rows. In decode
//! the 32 KiB of K and V of a block take some 3300 cycles to arrive from memory, and all of the above less than that; the
//! lines of the next block are asked for while V is packed.

use super::{Operand, ROW_BYTES, TILE_BYTES, Tiles};
use crate::dtype::DType;
use crate::kernels::api::AttentionFns;
use crate::kernels::avx512::{Avx512, shells};
use crate::kernels::generic::attention::state::{EMPTY, Output, is_empty, load_row};
use crate::kernels::generic::attention::{
    self as generic, BlockRequest, GatherBuffers, KeyPointerTable, KeyPointers, Pieces, are_pairs, locate, unpack_pairs,
};
use crate::kernels::generic::math;
use crate::kernels::simd;
use crate::kernels::simd::{MAX_LANES, Simd};
use crate::layout::Packing;
use crate::problem::attention::Problem;
use crate::problem::grid::{BLOCK, CHUNK, KeyRange, between, ones};
use crate::problem::tile::Tile;
use crate::problem::visibility::TileVisibility;
use half::bf16;
use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::mem::MaybeUninit;

/// Rows of a group: lanes of a vector, columns of a tile.
const LANES: usize = 16;
/// Blocks of a superblock.
const SUPERBLOCK: usize = 4;
/// Keys of a superblock.
const SUPERBLOCK_KEYS: usize = SUPERBLOCK * BLOCK;
/// Dims, or keys, of one product of tiles.
const DEPTH: usize = 32;
/// The most rows of a tile: as many as keep Q, O and a superblock of K and V in half of an L2 cache.
const MAX_ROWS: usize = 256;
/// Up to so many rows K is read where it lies: a copy that is read once or twice does not pay.
const DIRECT_ROWS: usize = 2 * LANES;
/// The most terms of a query.
const MAX_TERMS: usize = 3;

/// The entry points; `HIGH` gives weights two terms.
pub(super) const fn functions<const HIGH: bool>() -> AttentionFns {
    AttentionFns {
        tile: tile::<HIGH>,
        reduce,
        pieces: shells::pieces::<bf16>(),
        max_rows: MAX_ROWS,
        row_step: 2 * LANES,
        several_heads: false,
        scratch_bytes,
    }
}

/// Sixteen rows while their tile runs; a lane without a row sees all keys and is not looked at.
#[repr(C, align(64))]
struct Group {
    /// The largest logit so far in this chunk, times log2(e).
    max: [f32; LANES],
    /// Sums of the weights, before and after they are rounded.
    sum: [f32; LANES],
    rounded: [f32; LANES],
    /// Which keys of the superblock's blocks a row sees.
    visible_bits: [[u64; LANES]; SUPERBLOCK],
    low: [i64; LANES],
    high: [i64; LANES],
    position: [i64; LANES],
    token: [u32; LANES],
    head: [u32; LANES],
    slope: [f32; LANES],
    /// Largest logit and sum of the chunks before, a row.
    total: [(f32, f32); LANES],
    rows: usize,
}

/// Sizes that follow from those of the heads.
#[derive(Clone, Copy)]
struct Sizes {
    /// Head size, and rounded up to whole products.
    d: usize,
    dk: usize,
    /// Value size, and rounded up to whole tiles.
    dv: usize,
    dvp: usize,
}

impl Sizes {
    fn new(d: usize, dv: usize) -> Self {
        Self { d, dk: d.next_multiple_of(DEPTH), dv, dvp: dv.next_multiple_of(LANES) }
    }
}

/// Scratch memory of one worker.
struct Scratch {
    /// `[groups][terms][dk / 32]` tiles.
    q: *mut u8,
    /// `[2 jobs][2 groups][256][16]`.
    s: *mut f32,
    /// `[2 jobs][2 groups][2 terms][8]` tiles.
    p: *mut u32,
    /// `[groups][dvp][16]`.
    acc: *mut f32,
    /// `[rows][dvp]`.
    total: *mut f32,
    /// `[16][dvp]`, or `[16][dk]`.
    stage: *mut f32,
    /// `[256][dk]`.
    k: *mut u16,
    /// `[4][2][dvp / 16]` tiles.
    v: *mut u8,
    /// Keys and values of a block whose elements do not lie together: `[64][dk]`, `[64][dvp]`.
    gather_buffers: GatherBuffers,
    groups: *mut Group,
}

impl Scratch {
    fn layout(base: *mut u8, rows: usize, sizes: Sizes) -> (Self, usize) {
        let Sizes { dk, dvp, .. } = sizes;
        let groups = rows.div_ceil(LANES);
        // One job, or two in turns.
        let slots = if groups <= 2 { groups } else { 4 };
        let mut used = 0;
        let mut bytes = |n: usize| {
            let at = base.wrapping_add(used);
            used += n.next_multiple_of(64);
            at
        };
        let scratch = Self {
            q: bytes(groups * MAX_TERMS * (dk / DEPTH) * TILE_BYTES),
            s: bytes(slots * SUPERBLOCK_KEYS * LANES * size_of::<f32>()).cast(),
            p: bytes(slots * WEIGHTS * size_of::<u32>()).cast(),
            acc: bytes(groups * dvp * LANES * size_of::<f32>()).cast(),
            total: bytes(groups * LANES * dvp * size_of::<f32>()).cast(),
            stage: bytes(LANES * dk.max(dvp) * size_of::<f32>()).cast(),
            k: bytes(SUPERBLOCK_KEYS * dk * size_of::<bf16>()).cast(),
            v: bytes(SUPERBLOCK_KEYS * dvp * size_of::<bf16>()),
            gather_buffers: GatherBuffers {
                k: bytes(BLOCK * dk * size_of::<bf16>()),
                v: bytes(BLOCK * dvp * size_of::<bf16>()),
            },
            groups: bytes(groups * size_of::<Group>()).cast(),
        };
        (scratch, used)
    }
}

fn scratch_bytes(rows: usize, d: usize, dv: usize) -> usize {
    Scratch::layout(std::ptr::null_mut(), rows, Sizes::new(d, dv)).1
}

/// One call's constants.
struct Call<'a> {
    p: &'a Problem<'a>,
    tile: &'a Tile,
    scratch: Scratch,
    sizes: Sizes,
    /// Terms of a query.
    terms: usize,
    /// The scale without its sign, which Q takes.
    scale: f32,
    negative: bool,
    /// Nothing happens to a logit but its scale: `scale * log2(e)`, and 0 otherwise.
    factor: f32,
}

/// A block of K: its first key, and bytes from one to the next.
#[derive(Clone, Copy)]
struct Keys {
    first: Operand,
    stride: isize,
}

/// # Safety
/// The level is available, `p` is validated, `tile` is inside it, and `memory` has [`scratch_bytes`] for its rows.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn tile<const HIGH: bool>(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
    // SAFETY: the level includes AVX-512.
    let s = unsafe { Avx512::new_unchecked() };
    let sizes = Sizes::new(p.q.shape[3], p.v_dim);
    let scale = p.scale.abs();
    let plain = p.softcap == 0.0 && p.alibi.is_none() && p.bias.is_none() && (scale * LOG2_E).is_normal();
    let call = Call {
        p,
        tile,
        scratch: Scratch::layout(memory, tile.rows(), sizes).0,
        sizes,
        terms: match p.q.dtype {
            DType::Bf16 => 1,
            DType::F16 => 2,
            DType::F32 => MAX_TERMS,
        },
        scale,
        negative: p.scale < 0.0,
        factor: if plain { scale * LOG2_E } else { 0.0 },
    };
    let n = tile.rows().div_ceil(LANES);
    // SAFETY: the caller's; the scratch has `n` groups, all of whose fields `prepare` writes before they are read.
    unsafe {
        let always_visible = p.visibility.always_visible(tile.batch);
        let mut reach = TileVisibility { low: i64::MAX, high: 0, inner_low: 0, inner_high: i64::MAX, always_visible };
        let mut rows = tile.tokens_and_heads(p);
        for g in 0..n {
            prepare(s, &call, g, &mut rows);
            let group = &*call.scratch.groups.add(g);
            for r in (0..group.rows).filter(|&r| group.low[r] < group.high[r]) {
                reach.low = reach.low.min(group.low[r]);
                reach.high = reach.high.max(group.high[r]);
            }
        }
        let groups = std::slice::from_raw_parts_mut(call.scratch.groups, n);
        let tiles = Tiles::configure();
        for chunk in tile.first_chunk..tile.end_chunk {
            let (from, to) = reach.within(tile.chunks.keys(chunk));
            for group in groups.iter_mut() {
                (group.max, group.sum, group.rounded) = ([f32::NEG_INFINITY; LANES], [0.0; LANES], [0.0; LANES]);
            }
            if from < to {
                std::ptr::write_bytes(call.scratch.acc, 0, n * sizes.dvp * LANES);
                for index in from / SUPERBLOCK_KEYS..to.div_ceil(SUPERBLOCK_KEYS) {
                    superblock::<HIGH>(s, &tiles, &call, groups, index, (from, to), &reach);
                }
            }
            for (g, group) in groups.iter_mut().enumerate() {
                end_chunk(s, &call, g, group, chunk);
            }
        }
        drop(tiles);
        if tile.partials.is_null() && tile.first_chunk == tile.end_chunk {
            for group in groups.iter() {
                (0..group.rows).for_each(|r| output(&call, group, r).finish(s, EMPTY, call.scratch.stage));
            }
        }
    }
}

/// Folds the chunks of a tile that left them in `tile.partials`, and writes the output.
///
/// # Safety
/// As [`tile`]; the partial states of all chunks have been written.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn reduce(_: &Pieces, p: &Problem, tile: &Tile, memory: *mut u8) {
    // SAFETY: the level includes AVX-512.
    let s = unsafe { Avx512::new_unchecked() };
    let total = Scratch::layout(memory, tile.rows(), Sizes::new(p.q.shape[3], p.v_dim)).0.total;
    // SAFETY: the caller's; the scratch holds at least one row.
    unsafe { generic::reduce(s, p, tile, total, false) }
}

/// Where row `r` of a group goes.
fn output<'a>(call: &Call<'a>, group: &Group, r: usize) -> Output<'a> {
    let (token, head) = (group.token[r] as usize, group.head[r] as usize);
    Output { p: call.p, batch: call.tile.batch, token, head, deinterleaved: false }
}

/// Says which rows a group has, the next of `rows`, and what they see, and packs their queries.
///
/// # Safety
/// As [`tile`]; group `g` is one of the tile's.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn prepare(s: Avx512, call: &Call, g: usize, rows: &mut impl Iterator<Item = (usize, usize)>) {
    let Call { p, tile, sizes: Sizes { d, dk, .. }, .. } = *call;
    let stage = call.scratch.stage;
    let mut group = Group {
        max: [f32::NEG_INFINITY; LANES],
        sum: [0.0; LANES],
        rounded: [0.0; LANES],
        visible_bits: [[0; LANES]; SUPERBLOCK],
        low: [0; LANES],
        high: [0; LANES],
        position: [0; LANES],
        token: [0; LANES],
        head: [0; LANES],
        slope: [0.0; LANES],
        total: [EMPTY; LANES],
        rows: (tile.rows() - g * LANES).min(LANES),
    };
    // SAFETY: the stage has 16 rows of dk floats; tokens and heads are inside q.
    unsafe {
        std::ptr::write_bytes(stage, 0, LANES * dk);
        for (r, (token, head)) in rows.take(group.rows).enumerate() {
            (group.low[r], group.high[r]) = p.visibility.visible_keys(tile.batch, token);
            group.position[r] = p.visibility.position(tile.batch, token);
            (group.token[r], group.head[r]) = (token as u32, head as u32);
            group.slope[r] = p.alibi.map_or(0.0, |slopes| slopes[head]);
            let (row, token) = p.visibility.query(tile.batch, token);
            load_row(s, p.q.dtype, p.q.row(row, token, head), p.q.strides[3], stage.add(r * dk), d);
        }
        call.scratch.groups.add(g).write(group);

        let sign = if call.negative { i32::MIN } else { 0 };
        for step in 0..dk / DEPTH {
            for half in 0..2 {
                let mut x = [s.zero(); MAX_LANES];
                for (r, x) in x.iter_mut().enumerate() {
                    *x = s.load_f32(stage.add(r * dk + step * DEPTH + half * LANES));
                }
                s.transpose(&mut x);
                for pair in 0..LANES / 2 {
                    let mut x = [x[2 * pair], x[2 * pair + 1]].map(|x| {
                        _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(sign)))
                    });
                    for term in 0..call.terms {
                        let mut bits = [_mm512_setzero_si512(); 2];
                        for i in 0..2 {
                            (bits[i], x[i]) = split(x[i]);
                        }
                        let index = ((g * call.terms + term) * (dk / DEPTH) + step) * TILE_BYTES;
                        let to = call.scratch.q.add(index + (half * LANES / 2 + pair) * ROW_BYTES as usize);
                        _mm512_storeu_si512(to.cast(), join(bits[0], bits[1]));
                    }
                }
            }
        }
    }
}

/// The upper half of every number, and what that leaves: nothing of an infinity or NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn split(x: __m512) -> (__m512i, __m512) {
    let bits = _mm512_castps_si512(x);
    // A NaN whose payload is all in the lower half must not become an infinity.
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let bits = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x40_0000));
    let upper = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    // Classes: quiet NaN, +inf, -inf, signalling NaN.
    let non_finite = _mm512_fpclass_ps_mask::<0b1001_1001>(x);
    (upper, _mm512_maskz_sub_ps(!non_finite, x, _mm512_castsi512_ps(upper)))
}

/// Two bf16, each in the upper half of its lane, as one pair: `even` below `odd`.
#[inline]
#[target_feature(enable = "avx512f")]
fn join(even: __m512i, odd: __m512i) -> __m512i {
    _mm512_or_si512(_mm512_srli_epi32::<16>(even), odd)
}

/// Nearest bf16, in the upper half; ties go away from zero, which no bound minds. For finite numbers; a NaN has made its row
/// NaN already.
#[inline]
#[target_feature(enable = "avx512f")]
fn round(x: __m512) -> __m512i {
    let up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    _mm512_and_si512(up, _mm512_set1_epi32(0xffff_0000_u32 as i32))
}

/// 2^x to 3e-6, or 9e-8 with `HIGH`; exact for 0, 0 for -inf, NaN for NaN. The polynomials (minimax on [0, 1), relative,
/// through 1) are of the fraction that is left when `vreduceps` has taken the floor, which `vscalefps` puts back.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn exp2<const HIGH: bool>(x: __m512) -> __m512 {
    const TO_FLOOR: i32 = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    let r = _mm512_reduce_ps::<TO_FLOOR>(x);
    let c = |c: f32| _mm512_set1_ps(c);
    let p = if HIGH {
        let p = _mm512_fmadd_ps(c(1.867_138_4e-3), r, c(9.017_009e-3));
        let p = _mm512_fmadd_ps(p, r, c(5.579_993e-2));
        let p = _mm512_fmadd_ps(p, r, c(0.240_164_44));
        _mm512_fmadd_ps(p, r, c(0.693_151_3))
    } else {
        let p = _mm512_fmadd_ps(c(1.342_666_9e-2), r, c(5.224_250_4e-2));
        let p = _mm512_fmadd_ps(p, r, c(0.241_280_19));
        _mm512_fmadd_ps(p, r, c(0.693_044_85))
    };
    _mm512_scalef_ps(_mm512_fmadd_ps(p, r, c(1.0)), x)
}

/// The keys of one superblock, for all rows of the tile.
///
/// # Safety
/// As [`tile`]; keys `from..to` are visible to some row.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn superblock<const HIGH: bool>(
    s: Avx512,
    tiles: &Tiles,
    call: &Call,
    groups: &mut [Group],
    index: usize,
    (from, to): (usize, usize),
    reach: &TileVisibility,
) {
    let mut keys = [Keys { first: std::ptr::null(), stride: 0 }; SUPERBLOCK];
    // Keys whose values have elements that are not finite.
    let mut non_finite = [0u64; SUPERBLOCK];
    for b in 0..SUPERBLOCK {
        let base = index * SUPERBLOCK_KEYS + b * BLOCK;
        let (low, high) = (from.saturating_sub(base).min(BLOCK), to.saturating_sub(base).min(BLOCK));
        let mut any = 0;
        for group in groups.iter_mut() {
            // SAFETY: the keys that a row sees are inside the mask.
            any |= unsafe { visible_bits(call, group, b, base, between(reach.always_visible, base)) };
        }
        if any != 0 {
            let key_range = KeyRange { low, high };
            let mut pointers = [[const { MaybeUninit::uninit() }; BLOCK]; 2];
            let [first, second] = &mut pointers;
            let (mut k, mut v) = (KeyPointerTable::<bf16>::new(first), KeyPointerTable::<bf16>::new(second));
            // SAFETY: the keys that some row sees are inside the views.
            unsafe {
                let request = BlockRequest { p: call.p, tile: call.tile, base, key_range, visible_bits: any, reach };
                locate(&request, &call.scratch.gather_buffers, (&mut k, &mut v));
                keys[b] = pack_keys(call, b, key_range, k.rows());
                non_finite[b] = pack_values(s, call, b, key_range, k.rows(), &mut v);
            }
        }
    }
    // SAFETY: the blocks that some row sees have been packed; scores, weights and outputs of a job are computed in that order.
    unsafe {
        let mut jobs = (0..groups.len()).step_by(2);
        let mut parity = 1;
        let mut next = |groups: &[Group]| {
            parity ^= 1;
            jobs.by_ref().find_map(|first| Job::new(groups, first, parity))
        };
        let mut before = None;
        let mut job = next(groups);
        Work::new(tiles, call, &keys, None, job).finish::<HIGH>();
        while let Some(now) = job {
            job = next(groups);
            let mut work = Work::new(tiles, call, &keys, before, job);
            // As often as it takes to be through at the end.
            let every = (now.groups * now.blocks().len() * BLOCK / 2 / work.steps::<HIGH>().max(1)).max(1);
            for i in 0..now.groups {
                let group = &mut groups[now.first + i];
                let x = call.scratch.s.add((now.parity * 2 + i) * SUPERBLOCK_KEYS * LANES);
                for &b in now.blocks() {
                    let (x, base) = (x.add(b * BLOCK * LANES), index * SUPERBLOCK_KEYS + b * BLOCK);
                    if call.terms > 1 {
                        repair(s, call, group, x, b, base);
                    }
                    mask_scores(s, call, group, x, b, base);
                }
                softmax::<HIGH>(s, call, group, now, i, &mut work, every);
            }
            work.finish::<HIGH>();
            if let Some(before) = before {
                add_non_finite(call, groups, before, &non_finite, index);
            }
            before = Some(now);
        }
        Work::new(tiles, call, &keys, before, None).finish::<HIGH>();
        if let Some(before) = before {
            add_non_finite(call, groups, before, &non_finite, index);
        }
    }
}

/// Which keys of block `b`, which begins at key `base`, the rows of a group see, `always_visible` among them; returns those that some row
/// sees.
///
/// # Safety
/// The keys that a row sees are inside the masks.
#[inline]
unsafe fn visible_bits(call: &Call, group: &mut Group, b: usize, base: usize, always_visible: u64) -> u64 {
    let mut any = 0;
    for r in 0..LANES {
        if r >= group.rows {
            group.visible_bits[b][r] = u64::MAX;
            continue;
        }
        let mut bits = between((group.low[r], group.high[r]), base) | always_visible;
        if bits != 0 {
            // SAFETY: the caller's.
            bits = unsafe { call.p.visible_by_masks(call.tile.batch, (group.token[r], group.head[r]), base, bits) };
        }
        group.visible_bits[b][r] = bits;
        any |= bits;
    }
    any
}

/// The keys of a block's key range as rows of whole tiles: where they are, or in a copy with zeros around them.
///
/// # Safety
/// Those keys are inside K.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_keys(call: &Call, b: usize, key_range: KeyRange, k: KeyPointers<bf16>) -> Keys {
    let Call { tile, sizes: Sizes { d, dk, .. }, .. } = *call;
    // A copy of rows whose elements lie apart is gone with the next block.
    if d == dk
        && call.p.k.strides[3] == 1
        && key_range.low == 0
        && key_range.high == BLOCK
        && tile.rows() <= DIRECT_ROWS
        && let Some(stride) = k.stride(key_range)
    {
        return Keys { first: k.key(0, 0).cast(), stride };
    }
    // SAFETY: the caller's; the copy has room for 64 keys a block.
    unsafe {
        let copy = call.scratch.k.add(b * BLOCK * dk);
        for j in 0..BLOCK {
            let row = copy.add(j * dk);
            if j < key_range.low || j >= key_range.high {
                std::ptr::write_bytes(row, 0, dk);
                continue;
            }
            let key = k.key(0, j);
            for i in (0..dk).step_by(DEPTH) {
                let x = _mm512_maskz_loadu_epi16(ones(d - i.min(d)) as u32, key.wrapping_add(i).cast());
                _mm512_storeu_si512(row.add(i).cast(), x);
            }
        }
        Keys { first: copy.cast(), stride: (dk * size_of::<bf16>()) as isize }
    }
}

/// Transposes the values of a block's key range into tiles, with zeros around them and for elements that are not finite; returns the
/// keys that have such. PackedValues pairs of slots are what it begins by making of rows, so where two neighbouring keys are one, they
/// are taken as they lie.
///
/// # Safety
/// Those keys are inside V.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn pack_values(
    s: Avx512,
    call: &Call,
    b: usize,
    key_range: KeyRange,
    k: KeyPointers<bf16>,
    v: &mut KeyPointerTable<bf16>,
) -> u64 {
    let Call { p, sizes: Sizes { dv, dvp, .. }, .. } = *call;
    let packed = p.v_packing == Packing::RowPairs;
    let pairs = packed && are_pairs(p, &v.rows(), key_range);
    // SAFETY: the caller's; the copies have room for 64 keys.
    unsafe {
        if packed && !pairs {
            unpack_pairs::<bf16, _>(p, key_range, call.scratch.gather_buffers.v, v);
        }
        let v = v.rows();
        let to = call.scratch.v.add(b * BLOCK * dvp * size_of::<bf16>());
        let values = Values { v, pairs, key_range, dv, dvp, to, k };
        if values.transpose::<false>(s) {
            return 0;
        }
        values.transpose::<true>(s);
        let step = if pairs { 2 } else { 1 };
        let is_non_finite = |j: &usize| (0..dv).any(|i| !is_finite((*v.key(0, *j).add(step * i)).to_bits()));
        (key_range.low..key_range.high).filter(is_non_finite).fold(0, |bits, j| bits | 1 << j)
    }
}

fn is_finite(bits: u16) -> bool {
    bits & EXPONENT as u16 != EXPONENT as u16
}

/// The values of a block, and the tiles that they go to.
struct Values<'a> {
    v: KeyPointers<'a, bf16>,
    /// Every even key of the key range and the next are a pair.
    pairs: bool,
    key_range: KeyRange,
    dv: usize,
    dvp: usize,
    to: *mut u8,
    /// Keys, whose next block is asked for as that of the values is.
    k: KeyPointers<'a, bf16>,
}

impl Values<'_> {
    /// Returns whether all elements are finite; with `CLEAN`, puts zeros for those that are not.
    ///
    /// # Safety
    /// The keys are readable, the tiles writable.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
    unsafe fn transpose<const CLEAN: bool>(&self, s: Avx512) -> bool {
        let mut largest = _mm512_setzero_si512();
        for half in 0..2 {
            let tiles = self.to.wrapping_add(half * (self.dvp / LANES) * TILE_BYTES);
            for column in (0..self.dvp).step_by(DEPTH) {
                let mut x = [[s.zero(); MAX_LANES]; 2];
                for pair in 0..LANES {
                    let j = half * DEPTH + 2 * pair;
                    self.ask_for_next(j, column);
                    // SAFETY: the caller's.
                    let [first, second] = unsafe { self.pair::<CLEAN>(j, column, &mut largest) };
                    (x[0][pair], x[1][pair]) = (_mm512_castsi512_ps(first), _mm512_castsi512_ps(second));
                }
                for (part, x) in x.iter_mut().enumerate() {
                    s.transpose(x);
                    for (i, x) in x.iter().enumerate() {
                        // Rows are unpacked within each quarter: elements 0 to 3 of both keys, and 4 to 7.
                        let element = column + if self.pairs { part * LANES + i } else { i / 4 * 8 + part * 4 + i % 4 };
                        if element < self.dvp {
                            let at = element / LANES * TILE_BYTES + element % LANES * ROW_BYTES as usize;
                            // SAFETY: a row of one of the half's tiles.
                            unsafe { s.store_f32(tiles.add(at).cast(), *x) };
                        }
                    }
                }
            }
        }
        _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(EXPONENT)) == 0
    }

    /// Elements `column..column + 32` of keys `j` and `j + 1` as pairs; zeros for keys outside of the key range.
    ///
    /// # Safety
    /// As [`Self::transpose`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn pair<const CLEAN: bool>(&self, j: usize, column: usize, largest: &mut __m512i) -> [__m512i; 2] {
        let exponent = _mm512_set1_epi16(EXPONENT);
        let mut load = |key: usize, first: usize, n: usize| {
            if key < self.key_range.low || key >= self.key_range.high {
                return _mm512_setzero_si512();
            }
            let from = self.v.key(0, key).wrapping_add(first);
            // SAFETY: the caller's; masked-off lanes are not accessed.
            let x = unsafe { _mm512_maskz_loadu_epi16(ones(n.min(DEPTH)) as u32, from.cast()) };
            if CLEAN {
                let finite = _mm512_cmpneq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
                return _mm512_maskz_mov_epi16(finite, x);
            }
            *largest = _mm512_max_epu16(*largest, _mm512_and_si512(x, exponent));
            x
        };
        let left = self.dv - column;
        if self.pairs {
            let both = 2 * left;
            return [load(j, 2 * column, both), load(j, 2 * column + DEPTH, both.saturating_sub(DEPTH))];
        }
        let (even, odd) = (load(j, column, left), load(j + 1, column, left));
        [_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)]
    }

    /// Asks for what [`Self::pair`] loads of the next block, and for the keys.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn ask_for_next(&self, j: usize, column: usize) {
        let ask = |row: *const bf16, element: usize| {
            if !row.is_null() {
                _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(element).cast());
            }
        };
        for j in [j, j + 1] {
            ask(self.k.next(j), column);
        }
        if self.pairs {
            ask(self.v.next_pair(j), 2 * column);
            ask(self.v.next_pair(j), 2 * column + DEPTH);
        } else {
            for j in [j, j + 1] {
                ask(self.v.next(j), column);
            }
        }
    }
}

/// The exponent of a bf16.
const EXPONENT: i16 = 0x7f80;

/// One or two groups, and the blocks of a superblock that they see.
#[derive(Clone, Copy)]
struct Job {
    first: usize,
    groups: usize,
    list: [usize; SUPERBLOCK],
    count: usize,
    /// Which half of the memory for scores and weights it has: two jobs are under way at a time.
    parity: usize,
}

impl Job {
    /// The groups from `first` on, unless they see nothing.
    fn new(groups: &[Group], first: usize, parity: usize) -> Option<Self> {
        let mut job = Self { first, groups: (groups.len() - first).min(2), list: [0; SUPERBLOCK], count: 0, parity };
        for b in 0..SUPERBLOCK {
            let sees = |group: &Group| group.visible_bits[b][..group.rows].iter().any(|&bits| bits != 0);
            if groups[first..first + job.groups].iter().any(sees) {
                job.list[job.count] = b;
                job.count += 1;
            }
        }
        (job.count > 0).then_some(job)
    }

    fn blocks(&self) -> &[usize] {
        &self.list[..self.count]
    }
}

/// Pairs of weights of a group and superblock in `scratch.p`: two terms.
const WEIGHTS: usize = 2 * SUPERBLOCK_KEYS / 2 * LANES;
/// From a weight's first term to its second.
const SECOND: usize = SUPERBLOCK_KEYS / 2 * LANES;

/// Tile products that wait to be done between the vectors of another job's softmax: the outputs of one job, then the
/// scores of another. One step is the products of two or four pairs of tiles.
struct Work<'a> {
    tiles: &'a Tiles,
    call: &'a Call<'a>,
    keys: &'a [Keys; SUPERBLOCK],
    outputs: Option<Job>,
    scores: Option<Job>,
    /// The tiles of values or keys that the accumulators are of.
    tile: usize,
    /// Place in the list of blocks; half of the block, or dims; term.
    block: usize,
    part: usize,
    term: usize,
}

impl<'a> Work<'a> {
    fn new(
        tiles: &'a Tiles,
        call: &'a Call<'a>,
        keys: &'a [Keys; SUPERBLOCK],
        outputs: Option<Job>,
        scores: Option<Job>,
    ) -> Self {
        Self { tiles, call, keys, outputs, scores, tile: 0, block: 0, part: 0, term: 0 }
    }

    /// How many steps all of it takes, or a little less.
    fn steps<const HIGH: bool>(&self) -> usize {
        let depth = self.call.sizes.dk / DEPTH * self.call.terms;
        let scores = self.scores.map_or(0, |job| job.count * job.groups * depth);
        let tiles = self.call.sizes.dvp / LANES;
        let outputs =
            self.outputs.map_or(0, |job| tiles.div_ceil(4 / job.groups) * 2 * job.count * if HIGH { 2 } else { 1 });
        scores + outputs
    }

    /// Does all that is left.
    ///
    /// # Safety
    /// As [`Self::step`].
    #[inline(never)]
    unsafe fn finish<const HIGH: bool>(&mut self) {
        // SAFETY: the caller's.
        while unsafe { self.step::<HIGH>() } {}
    }

    /// One step; returns whether there was one.
    ///
    /// # Safety
    /// Values and weights of the blocks of the outputs, queries and keys of those of the scores are in place.
    #[inline(always)]
    unsafe fn step<const HIGH: bool>(&mut self) -> bool {
        // SAFETY: the caller's.
        unsafe {
            if let Some(job) = self.outputs {
                match (job.groups, self.call.sizes.dvp / LANES - self.tile) {
                    (1, 4..) => self.outputs::<HIGH, 4, 1>(&job),
                    (1, 3) => self.outputs::<HIGH, 3, 1>(&job),
                    (1, 2) => self.outputs::<HIGH, 2, 1>(&job),
                    (1, _) => self.outputs::<HIGH, 1, 1>(&job),
                    (_, 2..) => self.outputs::<HIGH, 2, 2>(&job),
                    (_, _) => self.outputs::<HIGH, 1, 2>(&job),
                }
            } else if let Some(job) = self.scores {
                match job.groups {
                    1 => self.scores::<4, 1>(&job),
                    _ => self.scores::<2, 2>(&job),
                }
            } else {
                return false;
            }
            true
        }
    }

    /// # Safety
    /// As [`Self::step`].
    #[inline(always)]
    unsafe fn outputs<const HIGH: bool, const M: usize, const N: usize>(&mut self, job: &Job) {
        let scratch = &self.call.scratch;
        let count = self.call.sizes.dvp / LANES;
        let (b, part) = (job.list[self.block], self.part);
        // SAFETY: the caller's; M more tiles of values there are.
        unsafe {
            let acc = |m: usize, n: usize| scratch.acc.add(((job.first + n) * count + self.tile + m) * LANES * LANES);
            if (self.block, self.part, self.term) == (0, 0, 0) {
                for m in 0..M {
                    for n in 0..N {
                        self.tiles.load(m * N + n, acc(m, n));
                    }
                }
            }
            let values = scratch.v.add(((2 * b + part) * count + self.tile) * TILE_BYTES);
            let v: [Operand; M] = std::array::from_fn(|m| values.add(m * TILE_BYTES).cast_const());
            let weights = scratch.p.add(job.parity * 2 * WEIGHTS + self.term * SECOND + (2 * b + part) * LANES * LANES);
            let w: [Operand; N] = std::array::from_fn(|n| weights.add(n * WEIGHTS).cast_const().cast());
            self.tiles.multiply(v, ROW_BYTES, w);
            self.term += 1;
            if self.term == if HIGH { 2 } else { 1 } {
                (self.term, self.part) = (0, part + 1);
            }
            if self.part == 2 {
                (self.part, self.block) = (0, self.block + 1);
            }
            if self.block == job.count {
                for m in 0..M {
                    for n in 0..N {
                        self.tiles.store(m * N + n, acc(m, n));
                    }
                }
                (self.block, self.tile) = (0, self.tile + M);
                if self.tile == count {
                    (self.tile, self.outputs) = (0, None);
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::step`].
    #[inline(always)]
    unsafe fn scores<const M: usize, const N: usize>(&mut self, job: &Job) {
        let Call { scratch, terms, .. } = self.call;
        let steps = self.call.sizes.dk / DEPTH;
        let b = job.list[self.block];
        // SAFETY: the caller's; Q has steps * terms tiles a group, a block four tiles of keys and of scores.
        unsafe {
            if (self.part, self.term) == (0, 0) {
                self.tiles.zero();
            }
            let Keys { first, stride } = self.keys[b];
            let k: [Operand; M] = std::array::from_fn(|m| {
                let key = (self.tile + m) * LANES;
                first.wrapping_offset(key as isize * stride).wrapping_add(self.part * ROW_BYTES as usize)
            });
            let q: [Operand; N] = std::array::from_fn(|n| {
                scratch.q.add((((job.first + n) * terms + self.term) * steps + self.part) * TILE_BYTES).cast_const()
            });
            self.tiles.multiply(k, stride, q);
            self.term += 1;
            if self.term == *terms {
                (self.term, self.part) = (0, self.part + 1);
            }
            if self.part == steps {
                for m in 0..M {
                    for n in 0..N {
                        let at = (job.parity * 2 + n) * SUPERBLOCK_KEYS + b * BLOCK + (self.tile + m) * LANES;
                        self.tiles.store(m * N + n, scratch.s.add(at * LANES));
                    }
                }
                (self.part, self.tile) = (0, self.tile + M);
                if self.tile == BLOCK / LANES {
                    (self.tile, self.block) = (0, self.block + 1);
                }
                if self.block == job.count {
                    (self.block, self.scores) = (0, None);
                }
            }
        }
    }
}

/// Scores that are NaN, of keys that are seen, again: by one product after the other. See the module's text.
///
/// # Safety
/// `x` has the block's scores.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn repair(s: Avx512, call: &Call, group: &Group, x: *mut f32, b: usize, base: usize) {
    let Call { p, tile, sizes: Sizes { d, .. }, .. } = *call;
    let mut nan = 0;
    for j in 0..BLOCK {
        // SAFETY: the caller's.
        let v = unsafe { s.load_f32(x.add(j * LANES)) };
        nan |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    }
    if nan == 0 {
        return;
    }
    for r in (0..group.rows).filter(|r| nan >> r & 1 == 1) {
        // SAFETY: the stage has room for d floats; keys that are seen are inside K.
        unsafe {
            let q = call.scratch.stage;
            let (row, token) = p.visibility.query(tile.batch, group.token[r] as usize);
            let row = p.q.row(row, token, group.head[r] as usize);
            load_row(s, p.q.dtype, row, p.q.strides[3], q, d);
            for j in (0..BLOCK).filter(|j| group.visible_bits[b][r] >> j & 1 == 1) {
                let score = &mut *x.add(j * LANES + r);
                if score.is_nan() {
                    let key = p.key(tile.batch, base + j, tile.kv_head).cast::<bf16>();
                    let products = (0..d)
                        .map(|i| *q.add(i) * (*key.wrapping_offset(i as isize * p.k.strides[3] as isize)).to_f32());
                    let sum: f32 = products.sum();
                    *score = if call.negative { -sum } else { sum };
                }
            }
        }
    }
}

/// What stands between a product and a logit (other than a plain scale), and -inf for what is hidden. A bias also hides.
///
/// # Safety
/// `x` has the block's scores.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn mask_scores(s: Avx512, call: &Call, group: &mut Group, x: *mut f32, b: usize, base: usize) {
    let Call { p, tile, .. } = *call;
    let hidden = s.splat(f32::NEG_INFINITY);
    if call.factor == 0.0 {
        let mut bias = [s.zero(); BLOCK];
        if let Some(view) = &p.bias {
            // SAFETY: the bias is as wide as K, and a row's keys are inside K.
            unsafe { load_bias(s, view, tile.batch, group, b, base, &mut bias) };
            for (j, bias) in bias.iter().enumerate() {
                let masked = s.lt_bits(*bias, s.splat(f32::MIN));
                if masked != 0 {
                    (0..group.rows).for_each(|r| group.visible_bits[b][r] &= !((masked >> r & 1) << j));
                }
            }
        }
        let mut distance = [0.0; LANES];
        (0..LANES).for_each(|r| distance[r] = (base as i64 - group.position[r]) as f32);
        // SAFETY: arrays of sixteen floats.
        let (distance, slope) = unsafe { (s.load_f32(distance.as_ptr()), s.load_f32(group.slope.as_ptr())) };
        let own_keys = p.alibi.and_then(|_| p.visibility.own_keys(tile.batch));
        for j in 0..BLOCK {
            // SAFETY: the caller's.
            let mut v = s.mul(unsafe { s.load_f32(x.add(j * LANES)) }, s.splat(call.scale));
            if p.softcap != 0.0 {
                v = s.mul(math::tanh(s, s.mul(v, s.splat(1.0 / p.softcap))), s.splat(p.softcap));
            }
            if p.alibi.is_some() {
                let distance = match own_keys {
                    None => s.add(s.splat(j as f32), distance),
                    Some(own_keys) => {
                        let key = own_keys.position((base + j) as i64);
                        let distances: [f32; LANES] = std::array::from_fn(|r| (key - group.position[r]) as f32);
                        // SAFETY: sixteen floats.
                        unsafe { s.load_f32(distances.as_ptr()) }
                    }
                };
                v = s.fma(slope, distance, v);
            }
            if p.bias.is_some() {
                v = s.add(v, bias[j]);
            }
            // SAFETY: the caller's.
            unsafe { s.store_f32(x.add(j * LANES), s.mul(v, s.splat(LOG2_E))) };
        }
    }
    let visible_bits = &group.visible_bits[b];
    if visible_bits.iter().all(|&bits| bits == u64::MAX) {
        return;
    }
    // SAFETY: sixteen numbers, the block's scores.
    unsafe {
        let (first, last) =
            (_mm512_loadu_si512(visible_bits.as_ptr().cast()), _mm512_loadu_si512(visible_bits[8..].as_ptr().cast()));
        for j in 0..BLOCK {
            let bit = _mm512_set1_epi64(1 << j);
            let seen = _mm512_test_epi64_mask(first, bit) as u64 | (_mm512_test_epi64_mask(last, bit) as u64) << 8;
            let x = x.add(j * LANES);
            s.store_f32(x, s.select_bits(seen, s.load_f32(x), hidden));
        }
    }
}

/// The bias of a block, a vector of rows a key; 0 where a row's keys end.
///
/// # Safety
/// The keys of the group's rows are inside the bias.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn load_bias(
    s: Avx512,
    view: &crate::view::RawView,
    batch: usize,
    group: &Group,
    b: usize,
    base: usize,
    to: &mut [__m512; BLOCK],
) {
    let mut rows = [[0.0f32; BLOCK]; LANES];
    for r in (0..group.rows).filter(|&r| group.visible_bits[b][r] != 0) {
        let (from, end) = (
            group.visible_bits[b][r].trailing_zeros() as usize,
            BLOCK - group.visible_bits[b][r].leading_zeros() as usize,
        );
        // SAFETY: the caller's.
        unsafe {
            let at = view.row(batch, group.token[r] as usize, group.head[r] as usize);
            let first = (base + from) as isize * view.strides[3] as isize * view.dtype.size() as isize;
            load_row(
                s,
                view.dtype,
                at.wrapping_offset(first),
                view.strides[3],
                rows[r].as_mut_ptr().add(from),
                end - from,
            );
        }
    }
    for (i, to) in to.as_chunks_mut::<MAX_LANES>().0.iter_mut().enumerate() {
        for r in 0..LANES {
            // SAFETY: sixteen floats of a row.
            to[r] = unsafe { s.load_f32(rows[r].as_ptr().add(i * LANES)) };
        }
        s.transpose(to);
    }
}

/// Scores of group `i` of a job to weights, with a step of `work` between `every` few vectors; updates the rows' states and
/// rescales their accumulator.
///
/// # Safety
/// The job's scores have been masked; `group` is the one meant; `work` is of other jobs and as [`Work::step`] wants it.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn softmax<const HIGH: bool>(
    s: Avx512,
    call: &Call,
    group: &mut Group,
    job: Job,
    i: usize,
    work: &mut Work,
    every: usize,
) {
    let slot = job.parity * 2 + i;
    let blocks = job.blocks();
    let x = call.scratch.s.wrapping_add(slot * SUPERBLOCK_KEYS * LANES);
    let w = call.scratch.p.wrapping_add(slot * WEIGHTS);
    let acc = call.scratch.acc.wrapping_add((job.first + i) * call.sizes.dvp * LANES);
    let mut countdown = every;
    let hidden = s.splat(f32::NEG_INFINITY);
    let factor = s.splat(if call.factor == 0.0 { 1.0 } else { call.factor });
    // SAFETY: the caller's; states are sixteen floats.
    unsafe {
        // Four maxima, so that none waits for the one before.
        let mut max = [hidden; 4];
        for &b in blocks {
            for j in (0..BLOCK).step_by(4) {
                for (i, max) in max.iter_mut().enumerate() {
                    *max = s.max(s.load_f32(x.add((b * BLOCK + j + i) * LANES)), *max);
                }
            }
        }
        let max = s.max(s.max(max[0], max[1]), s.max(max[2], max[3]));
        let old = s.load_f32(group.max.as_ptr());
        let new = s.max(s.mul(max, factor), old);
        let grown = s.lt_bits(old, new);
        let (mut sum, mut rounded) = (s.load_f32(group.sum.as_ptr()), s.load_f32(group.rounded.as_ptr()));
        if grown != 0 {
            let scale = s.select_bits(grown, exp2::<true>(s.sub(old, new)), s.splat(1.0));
            (sum, rounded) = (s.mul(sum, scale), s.mul(rounded, scale));
            // A state that has seen nothing has a zero accumulator: nothing to scale.
            if grown & s.lt_bits(hidden, old) != 0 {
                for i in 0..call.sizes.dvp {
                    let acc = acc.add(i * LANES);
                    s.store_f32(acc, s.mul(s.load_f32(acc), scale));
                }
            }
            s.store_f32(group.max.as_mut_ptr(), new);
        }
        // With nothing but -inf so far, -inf - -inf must not become NaN; a live NaN stays one.
        let shift = s.select_lt(new, s.splat(f32::MIN), s.zero(), new);
        let (mut sums, mut rounds) = ([s.zero(); 2], [s.zero(); 2]);
        for &b in blocks {
            for pair in 0..BLOCK / 2 {
                let (mut first, mut second) = ([_mm512_setzero_si512(); 2], [_mm512_setzero_si512(); 2]);
                for i in 0..2 {
                    let v = s.load_f32(x.add((b * BLOCK + 2 * pair + i) * LANES));
                    let weight = exp2::<HIGH>(_mm512_fmsub_ps(v, factor, shift));
                    sums[i] = s.add(sums[i], weight);
                    first[i] = round(weight);
                    let upper = _mm512_castsi512_ps(first[i]);
                    if HIGH {
                        second[i] = round(s.sub(weight, upper));
                    } else {
                        rounds[i] = s.add(rounds[i], upper);
                    }
                }
                let to = w.add((b * BLOCK / 2 + pair) * LANES);
                _mm512_storeu_si512(to.cast(), join(first[0], first[1]));
                if HIGH {
                    _mm512_storeu_si512(to.add(SECOND).cast(), join(second[0], second[1]));
                }
                countdown -= 1;
                if countdown == 0 {
                    work.step::<HIGH>();
                    countdown = every;
                }
            }
        }
        sum = s.add(sum, s.add(sums[0], sums[1]));
        rounded = if HIGH { sum } else { s.add(rounded, s.add(rounds[0], rounds[1])) };
        s.store_f32(group.sum.as_mut_ptr(), sum);
        s.store_f32(group.rounded.as_mut_ptr(), rounded);
    }
}

/// Adds the elements of values that are not finite, of the keys `non_finite` of each block, to the rows of a job that see them.
///
/// # Safety
/// The job's outputs have just been computed, and its weights are still there.
#[inline]
unsafe fn add_non_finite(call: &Call, groups: &[Group], job: Job, non_finite: &[u64; SUPERBLOCK], index: usize) {
    for &b in job.blocks().iter().filter(|&&b| non_finite[b] != 0) {
        for i in 0..job.groups {
            let group = &groups[job.first + i];
            let w = call.scratch.p.wrapping_add((job.parity * 2 + i) * WEIGHTS + b * BLOCK / 2 * LANES);
            let acc = call.scratch.acc.wrapping_add((job.first + i) * call.sizes.dvp * LANES);
            // SAFETY: the caller's.
            unsafe { add_non_finite_of(call, group, non_finite[b], w, b, index * SUPERBLOCK_KEYS + b * BLOCK, acc) };
        }
    }
}

/// [`add_non_finite`] of one group and block.
///
/// # Safety
/// `w` has the block's weights (their first term is enough), `acc` is the group's.
#[cold]
unsafe fn add_non_finite_of(
    call: &Call,
    group: &Group,
    non_finite: u64,
    w: *const u32,
    b: usize,
    base: usize,
    acc: *mut f32,
) {
    let Call { p, tile, sizes: Sizes { dv, .. }, .. } = *call;
    for j in (0..BLOCK).filter(|j| non_finite >> j & 1 == 1) {
        for r in (0..group.rows).filter(|&r| group.visible_bits[b][r] >> j & 1 == 1) {
            // SAFETY: the caller's; keys that are seen are inside V.
            unsafe {
                let pair = *w.add(j / 2 * LANES + r);
                let weight = f32::from_bits(if j % 2 == 0 { pair << 16 } else { pair & 0xffff_0000 });
                let value = p.value(tile.batch, base + j, tile.kv_head).cast::<bf16>();
                for i in 0..dv {
                    let element = *value.wrapping_offset(i as isize * p.value_step());
                    if !is_finite(element.to_bits()) {
                        *acc.add(i * LANES + r) += weight * element.to_f32();
                    }
                }
            }
        }
    }
}

/// What becomes of a group's rows at the end of a chunk. Their values are multiplied by what makes the sum of the weights before
/// rounding the one to divide by.
///
/// # Safety
/// As [`tile`]; `group` is group `g`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")]
unsafe fn end_chunk(s: Avx512, call: &Call, g: usize, group: &mut Group, chunk: usize) {
    let Call { tile, sizes: Sizes { dvp, .. }, .. } = *call;
    let states: [_; LANES] = std::array::from_fn(|r| (group.max[r], group.sum[r]));
    // SAFETY: the caller's; acc, stage and total have the sizes their layout gives.
    unsafe {
        if !states[..group.rows].iter().all(|&state| is_empty(state)) {
            let ratio = s.div(s.load_f32(group.sum.as_ptr()), s.load_f32(group.rounded.as_ptr()));
            for i in (0..dvp).step_by(LANES) {
                let mut x = [s.zero(); MAX_LANES];
                for (k, x) in x.iter_mut().enumerate() {
                    *x = s.mul(s.load_f32(call.scratch.acc.add((g * dvp + i + k) * LANES)), ratio);
                }
                s.transpose(&mut x);
                for (r, x) in x.iter().enumerate() {
                    s.store_f32(call.scratch.stage.add(r * dvp + i), *x);
                }
            }
        }
        for r in 0..group.rows {
            let row = g * LANES + r;
            let (acc, total) = (call.scratch.stage.add(r * dvp), call.scratch.total.add(row * dvp));
            let output = output(call, group, r);
            output.end_chunk(s, tile, (chunk, row), (states[r], acc), (&mut group.total[r], total));
        }
    }
}

const _: () = assert!(simd::MAX_LANES == LANES && CHUNK.is_multiple_of(SUPERBLOCK_KEYS));
