//! What a level does with keys of one format, and with values of one: attention over any pair is made of two of these.

use super::{
    DirectScores, DirectValues, IntegerValues, KeyPointers, OneValue, PackKeys, PackValues, Scratch, Widen, WidenUnits,
};
use crate::problem::grid::KeyRange;
use crate::tuning::Tuning;

/// What a level does with keys of one format. Each function is compiled with the level's features, so that attention over keys of
/// M formats and values of N is made of M + N pieces.
#[derive(Clone, Copy)]
pub(crate) struct KeyPieces {
    /// Bytes per element of the rows that [`Self::pack`] reads.
    pub unit_bytes: usize,
    /// For units of several elements, or that are described: makes rows of f32 of them, for [`Self::pack`] and
    /// [`Self::widened_scores`].
    pub widen: Option<unsafe fn(&WidenUnits)>,
    /// For elements of one byte: the same in the order of [`Self::deinterleaved`], for [`Self::widened_scores`] only, where
    /// [`Simd::WIDENS_ONCE`](crate::kernels::simd::Simd::WIDENS_ONCE).
    pub widen_elements: Option<unsafe fn(&WidenUnits)>,
    /// The most query rows of a KV head for which [`Self::scores`] reads such units. For more, they are widened.
    pub unit_rows: usize,
    /// Queries are kept in the order that this format's keys have in registers.
    pub deinterleaved: bool,
    /// From the cache.
    pub scores: unsafe fn(&DirectScores),
    /// If [`Self::scores`] reads fractions of elements.
    pub fractions: Option<KeyFractions>,
    /// From rows of f32.
    pub widened_scores: unsafe fn(&DirectScores),
    pub pack: unsafe fn(&PackKeys),
    /// Makes units of so many rows of a tile, of so many elements, which [`Self::scores`] then reads. All rows take the direct path.
    pub quantize_rows: Option<unsafe fn(&Scratch, usize, usize)>,
}

/// Elements are read as themselves divided by a power of two, where that takes fewer instructions, and queries are multiplied by it
/// instead. Both are exact, so that bits are the same.
#[derive(Clone, Copy)]
pub(crate) struct KeyFractions {
    pub factor: f32,
    /// Scores of queries that are too large to be multiplied.
    pub scores: unsafe fn(&DirectScores),
}

/// What a level does with values of one format.
#[derive(Clone, Copy)]
pub(crate) struct ValuePieces {
    /// As in [`KeyPieces`].
    pub unit_bytes: usize,
    /// As in [`KeyPieces`], for all other pieces but [`Self::accumulate`].
    pub widen: Option<unsafe fn(&WidenUnits)>,
    /// As in [`KeyPieces`], for the direct path.
    pub widen_elements: Option<unsafe fn(&WidenUnits)>,
    /// As in [`KeyPieces`], of [`Self::accumulate`].
    pub unit_rows: usize,
    /// Accumulators are kept in the order that this format's values have in registers.
    pub deinterleaved: bool,
    /// From the cache.
    pub accumulate: unsafe fn(&DirectValues),
    /// As [`KeyFractions::factor`], of [`Self::accumulate`], for weights. 1: it reads elements.
    pub fractions: f32,
    pub accumulate_one: unsafe fn(&OneValue),
    pub all_finite: unsafe fn(KeyPointers<u8>, usize, KeyRange, usize) -> bool,
    pub pack: unsafe fn(&PackValues) -> bool,
    /// In place of the others, but for rows in f32: products of integers.
    pub integer: Option<unsafe fn(&mut IntegerValues)>,
    /// For values packed in pairs of slots, which are plain elements.
    pub pairs: Option<PairPieces>,
}

/// What a level does with values packed in pairs of slots.
#[derive(Clone, Copy)]
pub(crate) struct PairPieces {
    pub accumulate: unsafe fn(&DirectValues),
    pub widen: unsafe fn(&Widen),
}

/// What a level does with a call's keys and values.
#[derive(Clone, Copy)]
pub(crate) struct Pieces {
    pub keys: &'static KeyPieces,
    pub values: &'static ValuePieces,
    /// Those of f32, for values that were unpacked from pairs.
    pub widened: &'static ValuePieces,
    pub tuning: Tuning,
}
