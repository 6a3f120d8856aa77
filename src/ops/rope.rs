//! Rotary position embedding: frequencies, scaling, and the rotation itself.

use crate::context::Context;
use crate::error::{Error, Result, Status, ensure};
use crate::kernels::api::{AnglesFn, RopeArgs};
use crate::ops::norm::{RmsNorm, Rotation};
use crate::ops::setters::setters;
use crate::ops::{TokenCopies, check_in_place_or_apart, for_each_token_with};
use crate::parallel::Runner;
use crate::problem::limits::MAX_ROTARY_DIM;
use crate::problem::rotation::Pairing;
use crate::view::{RawView, SEQ, View, ViewMut};

/// How frequencies are scaled for texts beyond the training length. With `f_i = base^(-2i / rotary_dim)`:
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// `f_i`.
    #[default]
    None,
    /// `f_i / factor` (position interpolation, <https://arxiv.org/abs/2306.15595>).
    Linear {
        /// How much longer than in training.
        factor: f64,
    },
    /// The base becomes `base * factor^(rotary_dim / (rotary_dim - 2))` ("NTK-aware").
    Ntk {
        /// How much longer than in training.
        factor: f64,
    },
    /// Llama 3.1: frequencies of long wavelengths are divided by `factor`, those of short wavelengths kept, those between blended.
    Llama3(Llama3Scaling),
    /// YaRN (<https://arxiv.org/abs/2309.00071>): over the pairs, a ramp between interpolation and extrapolation.
    Yarn(YarnScaling),
    /// LongRoPE (<https://arxiv.org/abs/2402.13753>): `f_i / factors[i]`. A model has a list for short and one for long texts:
    /// make a set of frequencies for each.
    LongRope(LongRopeScaling),
}

/// The parameters of [`RopeScaling::Llama3`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Llama3Scaling {
    /// Divisor of the low frequencies.
    pub factor: f64,
    /// Wavelengths above `original_max_position / low_freq_factor`, in tokens, are divided; 1 in the published models.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position / high_freq_factor`, in tokens, are kept; 4 in the published models.
    pub high_freq_factor: f64,
    /// The length that the model was trained for, in tokens.
    pub original_max_position: f64,
}

impl Llama3Scaling {
    /// The frequency factors of the published models: 1 and 4.
    pub fn new(factor: f64, original_max_position: f64) -> Self {
        Self { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position }
    }

    setters! {
        plain { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position: f64, }
    }
}

/// The parameters of [`RopeScaling::Yarn`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct YarnScaling {
    /// How much longer than in training.
    pub factor: f64,
    /// The length that the model was trained for, in tokens.
    pub original_max_position: f64,
    /// Pairs that turn more often than this over the original length are kept; 32 in the paper.
    pub beta_fast: f64,
    /// Pairs that turn less often than this are divided by `factor`; 1 in the paper.
    pub beta_slow: f64,
    /// Factor on cosines and sines; `None` is the paper's `0.1 ln(factor) + 1`. Sources disagree about it: some derive it from
    /// `mscale` and `mscale_all_dim`, some leave it out. Set it where the model says so.
    pub attention_factor: Option<f64>,
    /// Whether the ends of the ramp are rounded outwards to whole pairs, as in most sources.
    pub truncate: bool,
}

impl YarnScaling {
    /// The parameters of the paper, and a ramp whose ends are rounded to whole pairs.
    pub fn new(factor: f64, original_max_position: f64) -> Self {
        Self { factor, original_max_position, beta_fast: 32.0, beta_slow: 1.0, attention_factor: None, truncate: true }
    }

    setters! {
        optional { attention_factor: f64, }
        plain { factor: f64, original_max_position: f64, beta_fast: f64, beta_slow: f64, truncate: bool, }
    }
}

/// The parameters of [`RopeScaling::LongRope`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LongRopeScaling {
    /// `rotary_dim / 2` divisors.
    pub factors: Vec<f64>,
    /// How much longer than in training; `attention_factor` alone depends on it.
    pub factor: f64,
    /// The length that the model was trained for, in tokens; `attention_factor` alone depends on it.
    pub original_max_position: f64,
    /// Factor on cosines and sines; `None` is `sqrt(1 + ln(factor) / ln(original_max_position))`, or 1 for a `factor` of at most 1.
    pub attention_factor: Option<f64>,
}

impl LongRopeScaling {
    /// Divisors, and the lengths from which the factor on cosines and sines follows.
    pub fn new(factors: Vec<f64>, factor: f64, original_max_position: f64) -> Self {
        Self { factors, factor, original_max_position, attention_factor: None }
    }

    setters! {
        optional { attention_factor: f64, }
        plain { factors: Vec<f64>, factor: f64, original_max_position: f64, }
    }
}

impl From<Llama3Scaling> for RopeScaling {
    fn from(scaling: Llama3Scaling) -> Self {
        Self::Llama3(scaling)
    }
}

impl From<YarnScaling> for RopeScaling {
    fn from(scaling: YarnScaling) -> Self {
        Self::Yarn(scaling)
    }
}

impl From<LongRopeScaling> for RopeScaling {
    fn from(scaling: LongRopeScaling) -> Self {
        Self::LongRope(scaling)
    }
}

/// Angular frequencies in f64, in radians per position, and a factor on cosines and sines.
///
/// ```
/// use kvlane::{Llama3Scaling, RopeFrequencies, RopeScaling};
/// let plain = RopeFrequencies::new(128, 10_000.0, &RopeScaling::None)?;
/// let stretched = RopeFrequencies::new(128, 500_000.0, &Llama3Scaling::new(8.0, 8192.0).into())?;
/// assert_eq!(plain.inv_freq().len(), 64);
/// assert_eq!(stretched.inv_freq()[0], 1.0);
/// # Ok::<(), kvlane::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct RopeFrequencies {
    inv_freq: Vec<f64>,
    magnitude: f64,
}

impl RopeFrequencies {
    /// Frequencies for the leading `rotary_dim` elements of a head.
    ///
    /// # Errors
    /// [`Status::InvalidValue`]: `rotary_dim` is odd, 0 or above [`MAX_ROTARY_DIM`], or a parameter is not finite or not
    /// positive. [`Status::Shape`]: the list of divisors has not `rotary_dim / 2` entries.
    pub fn new(rotary_dim: usize, base: f64, scaling: &RopeScaling) -> Result<Self> {
        check_rotary_dim(rotary_dim)?;
        positive("base", base)?;
        let half = rotary_dim / 2;
        let dim = rotary_dim as f64;
        let frequencies = |base: f64| -> Vec<f64> { (0..half).map(|i| base.powf(-2.0 * i as f64 / dim)).collect() };
        let mut inv_freq = frequencies(base);
        let mut magnitude = 1.0;
        match *scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                positive("factor", factor)?;
                inv_freq.iter_mut().for_each(|f| *f /= factor);
            }
            RopeScaling::Ntk { factor } => {
                positive("factor", factor)?;
                ensure!(rotary_dim > 2, InvalidValue, "NTK scaling needs a rotary_dim above 2, got {rotary_dim}");
                inv_freq = frequencies(base * factor.powf(dim / (dim - 2.0)));
            }
            RopeScaling::Llama3(Llama3Scaling { factor, low_freq_factor, high_freq_factor, original_max_position }) => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("original_max_position", original_max_position)?;
                ensure!(
                    high_freq_factor.is_finite() && high_freq_factor > low_freq_factor,
                    InvalidValue,
                    "high_freq_factor {high_freq_factor} is not above low_freq_factor {low_freq_factor}"
                );
                for f in &mut inv_freq {
                    let turns = original_max_position * *f / std::f64::consts::TAU;
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    *f = (1.0 - kept) * *f / factor + kept * *f;
                }
            }
            RopeScaling::Yarn(YarnScaling {
                factor,
                original_max_position,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            }) => {
                positive("factor", factor)?;
                positive("original_max_position", original_max_position)?;
                positive("beta_slow", beta_slow)?;
                ensure!(
                    beta_fast.is_finite() && beta_fast >= beta_slow,
                    InvalidValue,
                    "beta_fast {beta_fast} is below beta_slow {beta_slow}"
                );
                // The pair that makes `turns` turns over the original length.
                let pair = |turns: f64| {
                    dim * (original_max_position / (turns * std::f64::consts::TAU)).ln() / (2.0 * base.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if high <= low {
                    high = low + 0.001;
                }
                for (i, f) in inv_freq.iter_mut().enumerate() {
                    let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    *f = *f / factor * interpolated + *f * (1.0 - interpolated);
                }
                magnitude = attention_factor.unwrap_or(if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 });
            }
            RopeScaling::LongRope(LongRopeScaling { ref factors, factor, original_max_position, attention_factor }) => {
                ensure!(
                    factors.len() == half,
                    Shape,
                    "factors has {} entries, but rotary_dim {rotary_dim} has {half} pairs",
                    factors.len()
                );
                for (f, &divisor) in inv_freq.iter_mut().zip(factors) {
                    positive("factors", divisor)?;
                    *f /= divisor;
                }
                magnitude = match attention_factor {
                    Some(factor) => factor,
                    None if factor > 1.0 => {
                        ensure!(
                            original_max_position > 1.0,
                            InvalidValue,
                            "original_max_position {original_max_position} is not above 1"
                        );
                        (1.0 + factor.ln() / original_max_position.ln()).sqrt()
                    }
                    None => 1.0,
                };
            }
        }
        Self::from_inv_freq(inv_freq, magnitude)
    }

    /// Frequencies from any other source; `magnitude` multiplies cosines and sines.
    ///
    /// # Errors
    /// [`Status::InvalidValue`]: there are none or more than [`MAX_ROTARY_DIM`]` / 2`, or a number is not finite.
    pub fn from_inv_freq(inv_freq: Vec<f64>, magnitude: f64) -> Result<Self> {
        check_rotary_dim(inv_freq.len().saturating_mul(2))?;
        check_frequencies(&inv_freq, magnitude)?;
        Ok(Self { inv_freq, magnitude })
    }

    /// The frequency of each pair, in radians per position.
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// The factor on cosines and sines.
    pub fn magnitude(&self) -> f64 {
        self.magnitude
    }

    /// The number of leading elements of a head that they rotate.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// Cosines and sines for positions `0..positions`, `[positions, rotary_dim / 2]` each: a table for [`RopeAngles::Table`].
    ///
    /// ```
    /// # use kvlane::{Context, RopeFrequencies, RopeScaling};
    /// let frequencies = RopeFrequencies::new(4, 10_000.0, &RopeScaling::None)?;
    /// let (cos, sin) = frequencies.table(&Context::new()?, 3);
    /// assert_eq!((cos[2], sin[0]), (1f32.cos(), 0.0));
    /// # Ok::<(), kvlane::Error>(())
    /// ```
    pub fn table(&self, context: &Context, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let entries = positions * self.inv_freq.len();
        let (mut cos, mut sin) = (vec![0.0; entries], vec![0.0; entries]);
        fill_table(context, &self.inv_freq, self.magnitude, 0, &mut cos, &mut sin);
        (cos, sin)
    }
}

/// Cosines and sines for the positions from `first` on: rows of `inv_freq.len()`, as many as `cos` holds.
pub(crate) fn fill_table(
    context: &Context,
    inv_freq: &[f64],
    magnitude: f64,
    first: i64,
    cos: &mut [f32],
    sin: &mut [f32],
) {
    let (half, angles) = (inv_freq.len(), context.angles());
    for (row, (c, s)) in cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half)).enumerate() {
        // SAFETY: the context hands out kernels of available levels only.
        unsafe { angles((first + row as i64) as f64, inv_freq, magnitude, c, s) };
    }
}

fn positive(name: &str, x: f64) -> Result<()> {
    ensure!(x.is_finite() && x > 0.0, InvalidValue, "{name} is {x}, which is not a positive number");
    Ok(())
}

pub(crate) fn check_rotary_dim(rotary_dim: usize) -> Result<()> {
    ensure!(
        rotary_dim > 0 && rotary_dim.is_multiple_of(2) && rotary_dim <= MAX_ROTARY_DIM,
        InvalidValue,
        "rotary_dim is {rotary_dim}, which is not an even number from 2 to {MAX_ROTARY_DIM}"
    );
    Ok(())
}

pub(crate) fn check_frequencies(inv_freq: &[f64], magnitude: f64) -> Result<()> {
    if let Some((i, f)) = inv_freq.iter().enumerate().find(|(_, f)| !f.is_finite()) {
        return Err(Error::new(Status::InvalidValue, format!("inv_freq[{i}] is {f}")));
    }
    ensure!(magnitude.is_finite(), InvalidValue, "the magnitude of the frequencies is {magnitude}");
    Ok(())
}

/// The source of the angles of a rotation.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum RopeAngles<'a> {
    /// Position times frequency, computed and reduced in f64.
    Frequencies(&'a RopeFrequencies),
    /// Tables of cosines and sines, `[rows, rotary_dim / 2]` each; row p is position p.
    #[non_exhaustive]
    Table {
        /// Cosines.
        cos: &'a [f32],
        /// Sines.
        sin: &'a [f32],
    },
}

impl<'a> RopeAngles<'a> {
    /// [`RopeAngles::Table`].
    pub fn table(cos: &'a [f32], sin: &'a [f32]) -> Self {
        Self::Table { cos, sin }
    }
}

impl<'a> From<&'a RopeFrequencies> for RopeAngles<'a> {
    fn from(frequencies: &'a RopeFrequencies) -> Self {
        Self::Frequencies(frequencies)
    }
}

/// The position of each token.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Positions<'a> {
    /// `[batch]`: token t of sequence b stands at position `offsets[b] + t`.
    Offsets(&'a [i32]),
    /// `[batch, seq]`: a position per token.
    Explicit(&'a [i32]),
}

/// A rotation of queries or keys.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Rope<'a> {
    /// Which elements form a pair.
    pub pairing: Pairing,
    /// The number of leading elements of a head that are rotated; the others are copied. Even, at most `dim`.
    pub rotary_dim: usize,
    /// The source of the angles.
    pub angles: RopeAngles<'a>,
    /// The position of each token. With [`RopeAngles::Frequencies`], positions may be negative.
    pub positions: Positions<'a>,
}

impl<'a> Rope<'a> {
    /// A rotation of the leading `rotary_dim` elements of every head, by frequencies or by a table.
    pub fn new(
        pairing: Pairing,
        rotary_dim: usize,
        angles: impl Into<RopeAngles<'a>>,
        positions: Positions<'a>,
    ) -> Self {
        Self { pairing, rotary_dim, angles: angles.into(), positions }
    }

    setters! {
        plain { pairing: Pairing, rotary_dim: usize, angles: RopeAngles<'a>, positions: Positions<'a>, }
    }

    pub(crate) fn raw(&self) -> RawRope<'a> {
        RawRope {
            pairing: self.pairing,
            rotary_dim: self.rotary_dim,
            angles: match self.angles {
                RopeAngles::Frequencies(f) => RawAngles::Frequencies { inv_freq: &f.inv_freq, magnitude: f.magnitude },
                RopeAngles::Table { cos, sin } => RawAngles::Table { cos, sin },
            },
            positions: self.positions,
        }
    }
}

/// [`Rope`] with the frequencies taken apart, as the C ABI has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawRope<'a> {
    pub pairing: Pairing,
    pub rotary_dim: usize,
    pub angles: RawAngles<'a>,
    pub positions: Positions<'a>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum RawAngles<'a> {
    Frequencies { inv_freq: &'a [f64], magnitude: f64 },
    Table { cos: &'a [f32], sin: &'a [f32] },
}

impl RawRope<'_> {
    /// Checks against the tensor that is to be rotated.
    pub fn validate(&self, src: &RawView) -> Result<()> {
        let [batch, seq, _, dim] = src.shape;
        check_rotary_dim(self.rotary_dim)?;
        ensure!(self.rotary_dim <= dim, Shape, "rotary_dim {} is above the head size {dim}", self.rotary_dim);
        let half = self.rotary_dim / 2;
        let (name, given, wanted) = match self.positions {
            Positions::Offsets(o) => ("offsets", o.len(), batch),
            Positions::Explicit(p) => ("positions", p.len(), batch * seq),
        };
        ensure!(given == wanted, Shape, "{name} has {given} entries, but batch {batch} and seq {seq} need {wanted}");
        match self.angles {
            RawAngles::Frequencies { inv_freq, magnitude } => {
                ensure!(
                    inv_freq.len() == half,
                    Shape,
                    "there are {} frequencies, but rotary_dim {} has {half} pairs",
                    inv_freq.len(),
                    self.rotary_dim
                );
                check_frequencies(inv_freq, magnitude)?;
            }
            RawAngles::Table { cos, sin } => {
                ensure!(
                    cos.len() == sin.len() && cos.len().is_multiple_of(half),
                    Shape,
                    "cos has {} and sin {} entries, which are not rows of {half}",
                    cos.len(),
                    sin.len()
                );
                let rows = (cos.len() / half) as i64;
                for row in 0..if src.is_empty() { 0 } else { batch } {
                    let (low, high) = match self.positions {
                        Positions::Offsets(o) => (o[row] as i64, o[row] as i64 + seq as i64 - 1),
                        Positions::Explicit(p) => {
                            let p = &p[row * seq..(row + 1) * seq];
                            let low = p.iter().min().map_or(0, |&x| x as i64);
                            (low, p.iter().max().map_or(0, |&x| x as i64))
                        }
                    };
                    ensure!(
                        low >= 0 && high < rows,
                        OutOfRange,
                        "sequence {row} has positions {low}..={high}, but the cos/sin table has {rows} rows"
                    );
                }
            }
        }
        Ok(())
    }

    pub fn position(&self, row: usize, token: usize, seq: usize) -> i64 {
        match self.positions {
            Positions::Offsets(o) => o[row] as i64 + token as i64,
            Positions::Explicit(p) => p[row * seq + token] as i64,
        }
    }
}

/// Cosines and sines of one token, computed on the stack or looked up.
pub(crate) struct TokenAngles {
    cos: [f32; MAX_ROTARY_DIM / 2],
    sin: [f32; MAX_ROTARY_DIM / 2],
}

impl TokenAngles {
    pub fn new() -> Self {
        Self { cos: [0.0; MAX_ROTARY_DIM / 2], sin: [0.0; MAX_ROTARY_DIM / 2] }
    }

    /// Pointers to the cosines and sines of `position`, valid until the next call.
    pub fn at(&mut self, rope: &RawRope, angles: AnglesFn, position: i64) -> (*const f32, *const f32) {
        let half = rope.rotary_dim / 2;
        match rope.angles {
            RawAngles::Frequencies { inv_freq, magnitude } => {
                let (cos, sin) = (&mut self.cos[..half], &mut self.sin[..half]);
                // SAFETY: the context hands out kernels of available levels only.
                unsafe { angles(position as f64, inv_freq, magnitude, cos, sin) };
                (self.cos.as_ptr(), self.sin.as_ptr())
            }
            RawAngles::Table { cos, sin } => {
                let row = position as usize * half;
                (cos[row..row + half].as_ptr(), sin[row..row + half].as_ptr())
            }
        }
    }
}

/// Rotates queries or keys: `dst = RoPE(src)`.
///
/// `src` and `dst` are `[batch, seq, heads, dim]`, of any strides and types. Arithmetic is f32, rounded once to the type of
/// `dst`. Angles are computed and reduced in f64, so that they are right at any position.
///
/// Thread safety: may be called from any number of threads at once on disjoint outputs.
///
/// # Errors
/// - [`Status::Shape`]: shapes differ, `rotary_dim` exceeds `dim`, or a list has the wrong length.
/// - [`Status::InvalidValue`]: `rotary_dim` is odd or 0.
/// - [`Status::OutOfRange`]: a position lies outside of a table.
/// - [`Status::Overlap`]: the views share memory.
///
/// On an error, nothing has been written.
///
/// ```
/// use kvlane::*;
/// let context = Context::new()?;
/// let frequencies = RopeFrequencies::new(4, 10_000.0, &RopeScaling::None)?;
/// let x = [1.0f32, 2.0, 3.0, 4.0];
/// let mut y = [0.0f32; 4];
/// let options = Rope::new(Pairing::HalfSplit, 4, &frequencies, Positions::Offsets(&[3]));
/// rope(&context, &Serial, View::new(&x, [1, 1, 1, 4])?, ViewMut::new(&mut y, [1, 1, 1, 4])?, &options)?;
/// assert!((y[0] - (3f32.cos() - 3.0 * 3f32.sin())).abs() < 1e-6);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn rope(context: &Context, runner: &dyn Runner, src: View, dst: ViewMut, options: &Rope) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { rope_raw(context, runner, src.raw, dst.raw, &options.raw(), None) }
}

/// Rotates queries or keys in place; see [`rope()`].
///
/// # Errors
/// As [`rope()`].
pub fn rope_in_place(context: &Context, runner: &dyn Runner, x: ViewMut, options: &Rope) -> Result<()> {
    // SAFETY: the view borrows what it reaches, exclusively.
    unsafe { rope_raw(context, runner, x.raw, x.raw, &options.raw(), None) }
}

/// RoPE, of normalised heads where there is a norm.
///
/// # Safety
/// The memory that valid views reach is readable and, for `dst`, writable, by this call alone.
pub(crate) unsafe fn rope_raw(
    context: &Context,
    runner: &dyn Runner,
    src: RawView,
    dst: RawView,
    options: &RawRope,
    norm: Option<RmsNorm>,
) -> Result<()> {
    check_in_place_or_apart(&src, &dst)?;
    options.validate(&src)?;
    if let Some(norm) = norm {
        norm.validate_staged("src", &src)?;
    }
    if src.is_empty() {
        return Ok(());
    }
    let seq = src.shape[SEQ];
    let (rotation, angles) = (Rotation::new(context, norm, src.dtype, dst.dtype), context.angles());
    let copies = TokenCopies::new(&src, &dst);
    for_each_token_with(runner, src.shape, TokenAngles::new, |token_angles, (b, t)| {
        let (cos, sin) = token_angles.at(options, angles, options.position(b, t, seq));
        // SAFETY: the views are valid and equal in shape, the angles are rotary_dim / 2 each.
        unsafe {
            rotation.run(&RopeArgs {
                copy: copies.at((b, t)),
                rotary_dim: options.rotary_dim,
                pairing: options.pairing,
                cos,
                sin,
            });
        }
    })
}
