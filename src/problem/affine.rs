//! Which affine units attention reads where they lie.

use super::limits::MAX_LANES;
use crate::format::CacheFormat;
use crate::view::{DIM, RawCacheView, SEQ, ZeroType};
use crate::{Integers, Zeros};

/// The loops that read units of a cache where they lie. Others are widened to rows of f32 first.
#[derive(Clone, Copy)]
pub(crate) struct AffineLoops {
    /// Numbers are bytes with a sign, and no sum or difference makes integers of them.
    pub signed: bool,
    /// Something is added to products.
    pub minima: bool,
    /// Every element of a head has a scale that tokens share. Otherwise every [`STEP`] elements share one.
    pub channels: bool,
    /// Numbers are greater than the integers by this.
    pub offset: f32,
}

/// Elements that loops read at a time: whole pairs of vectors.
pub(crate) const STEP: usize = 32;

const _: () = assert!(STEP.is_multiple_of(2 * MAX_LANES));

/// Tokens that share the scales of channels so that these are converted for all of them.
const CHANNEL_TOKENS: usize = 8;

impl AffineLoops {
    /// The loops for keys or values of `dim` elements, if there are any.
    #[inline(always)]
    pub fn of(cache: &RawCacheView, dim: usize) -> Option<Self> {
        let affine = cache.affine.as_ref()?;
        let halves = cache.dtype == CacheFormat::Affine4;
        let zero_type = affine.zeros.map(|zeros| zeros.dtype);
        let minima = zero_type.is_some() && affine.of.zeros != Zeros::Point;
        let signed = affine.of.integers == Integers::Signed;
        let offset = match affine.of.integers {
            Integers::Offset if halves => 8.0,
            Integers::Offset => 128.0,
            _ => 0.0,
        };
        // An offset and an integer add up exactly, an offset and a float do not.
        let is_exact = offset == 0.0 || minima || zero_type.is_none_or(ZeroType::is_integer);
        let (group, channels) = (affine.shared[DIM], affine.shared[DIM] == 1);
        let groups = group >= dim || group.is_multiple_of(STEP) || channels && affine.shared[SEQ] >= CHANNEL_TOKENS;
        let read = dim.is_multiple_of(STEP) && dim > 0 && groups && is_exact && !(signed && (halves || minima));
        read.then_some(Self { signed, minima, channels, offset })
    }
}
