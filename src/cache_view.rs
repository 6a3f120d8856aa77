//! Views of caches: the keys, or the values, of a cache in any [`CacheFormat`].

use crate::dtype::{DType, Element};
use crate::error::{Error, Result, ensure};
use crate::format::CacheFormat;
use crate::view::{
    Affine, Axis, BATCH, Buffer, DIM, Extent, HEADS, RawAffine, RawCacheView, RawView, SEQ, Units, View, ViewMut,
    ZeroType, apart_is_unknown, check_split, contiguous,
};
use std::marker::PhantomData;

/// A read-only view of the keys, or of the values, of a cache: `[batch, seq, kv_heads, dim]`, whose first two axes are what a
/// [`Layout`](crate::Layout) says.
///
/// A [`View`] is one whose units are plain elements, and converts by itself where a cache is wanted.
#[derive(Clone, Copy, Debug)]
pub struct CacheView<'a> {
    pub(crate) raw: RawCacheView,
    lifetime: PhantomData<&'a [u8]>,
}

/// A view of the keys, or of the values, of a cache, through which an operation writes.
///
/// A [`ViewMut`] is one whose units are plain elements, and converts by itself where a cache is wanted.
#[derive(Debug)]
pub struct CacheViewMut<'a> {
    pub(crate) raw: RawCacheView,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view is a shared (or an exclusive) borrow of slices of plain numbers, and slices of those cross threads.
unsafe impl Send for CacheView<'_> {}
// SAFETY: as above; nothing is written through a `CacheView`.
unsafe impl Sync for CacheView<'_> {}
// SAFETY: as above, and the borrow is exclusive.
unsafe impl Send for CacheViewMut<'_> {}

impl<'a> From<View<'a>> for CacheView<'a> {
    fn from(view: View<'a>) -> Self {
        Self { raw: view.raw.into(), lifetime: PhantomData }
    }
}

impl<'a> From<ViewMut<'a>> for CacheViewMut<'a> {
    fn from(view: ViewMut<'a>) -> Self {
        Self { raw: view.raw.into(), lifetime: PhantomData }
    }
}

impl<'a> From<CacheViewMut<'a>> for CacheView<'a> {
    fn from(view: CacheViewMut<'a>) -> Self {
        Self { raw: view.raw, lifetime: PhantomData }
    }
}

/// The bytes that a cache covers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheExtent {
    units: Extent,
    scales: Extent,
    /// Of the scales and of the zero points of an affine format.
    affine: [Extent; 2],
}

/// Each of these is about units and scales alike, and hides the method of the same name that is about the units alone.
impl RawCacheView {
    /// Checks units and scales, and that there are the scales that the format has; `name` is the argument's name.
    pub fn validate(&self, name: &str) -> Result<CacheExtent> {
        self.check(name, RawView::validate, RawView::validate, false)
    }

    /// As [`Self::validate`]; also checks that no unit and no scale that is written shares memory with another one.
    pub fn validate_output(&self, name: &str) -> Result<CacheExtent> {
        let scales = if self.dtype.has_static_scales() { RawView::validate } else { RawView::validate_output };
        let extent = self.check(name, RawView::validate_output, scales, true)?;
        if let Some(scales) = &self.scales {
            let shared = self.units.overlaps_within(extent.units, scales, extent.scales);
            ensure!(!shared, Overlap, "{name} and its scales share memory");
        }
        if let Some(affine) = &self.affine {
            let shared = affine.overlaps(extent.affine, &self.units, extent.units);
            ensure!(!shared, Overlap, "{name} and its scales or zero points share memory");
        }
        Ok(extent)
    }

    #[inline(always)]
    fn check(
        &self,
        name: &str,
        units: impl Fn(&RawView<CacheFormat>, &str) -> Result<Extent>,
        scales: impl Fn(&RawView, &str) -> Result<Extent>,
        written: bool,
    ) -> Result<CacheExtent> {
        let units = units(&self.units, name)?;
        self.check_scales(name)?;
        let affine = self.check_affine(name, written)?;
        let scales = match &self.scales {
            None => Extent { low: 0, high: 0 },
            Some(view) => {
                scales(view, "").map_err(|e| Error::new(e.status(), format!("the scales of {name}{}", e.message())))?
            }
        };
        Ok(CacheExtent { units, scales, affine })
    }

    /// Checks that units of an affine format, and no others, are described, and how.
    fn check_affine(&self, name: &str, written: bool) -> Result<[Extent; 2]> {
        let (format, shape) = (self.units.dtype, self.units.shape);
        let Some(mut affine) = self.affine else {
            ensure!(!format.is_affine(), InvalidValue, "{name} is {format}, but has no scales");
            return Ok([Extent { low: 0, high: 0 }; 2]);
        };
        ensure!(format.is_affine(), InvalidValue, "{name} is {format}, but scales of an affine format are given");
        let (stride, dim) = (self.units.strides[DIM], shape[DIM]);
        ensure!(
            stride == 1 || dim <= format.unit_elements(),
            Stride,
            "{name} is {format}, whose units lie one after the other in a head, but the stride of dim is {stride} and not 1"
        );
        affine.validate(name, shape, 8 / format.unit_elements(), written)
    }

    /// Whether a unit or a scale may share a byte with an element of `other`; false positives are possible.
    pub fn overlaps<V: Units>(&self, other: &RawView<V>) -> bool {
        let (Ok(own), Ok(extent)) = (self.validate("view"), other.validate("view")) else {
            return true;
        };
        self.overlaps_within(own, other, extent)
    }

    /// As [`Self::overlaps`], with known extents.
    pub fn overlaps_within<V: Units>(&self, own: CacheExtent, other: &RawView<V>, extent: Extent) -> bool {
        apart_is_unknown(&self.units, own.units, other, extent)
            || self.scales.is_some_and(|scales| scales.overlaps_within(own.scales, other, extent))
            || self.affine.is_some_and(|affine| affine.overlaps(own.affine, other, extent))
    }

    /// As [`Self::overlaps_within`], for another cache. Both may have the same static scales, which nobody writes.
    pub fn overlaps_cache(&self, own: CacheExtent, other: &Self, extent: CacheExtent) -> bool {
        fn meet<V: Units>(
            cache: &RawCacheView,
            own: CacheExtent,
            view: &RawView<V>,
            extent: Extent,
            fixed: bool,
        ) -> bool {
            if fixed && cache.has_fixed_scales() {
                apart_is_unknown(&cache.units, own.units, view, extent)
            } else {
                cache.overlaps_within(own, view, extent)
            }
        }
        let fixed = other.has_fixed_scales();
        self.overlaps_within(own, &other.units, extent.units)
            || other.scales.is_some_and(|scales| meet(self, own, &scales, extent.scales, fixed))
            || other.affine.is_some_and(|affine| {
                meet(self, own, &affine.scales, extent.affine[0], fixed)
                    || affine.zeros.is_some_and(|zeros| meet(self, own, &zeros, extent.affine[1], fixed))
            })
    }

    /// Whether there are scales that nobody writes.
    fn has_fixed_scales(&self) -> bool {
        self.dtype.has_static_scales() || self.affine.is_some_and(|affine| affine.fixed)
    }

    /// The scales that are written with the units: one per token and head.
    pub fn written_scales(&self) -> Option<&RawView> {
        self.scales.as_ref().filter(|_| self.dtype.has_scales())
    }

    /// The indices `start .. start + len` of an axis, with their scales. The elements of a head share a scale and stay together.
    fn narrow(self, axis: usize, start: usize, len: usize) -> Result<Self> {
        let scales = match self.scales {
            None => None,
            Some(scales) if axis == DIM && self.dtype.has_static_scales() => Some(scales),
            Some(scales) if axis != DIM => Some(scales.narrow(axis, start, len)?),
            Some(scales) => {
                let (format, dim) = (self.units.dtype, self.units.shape[DIM]);
                ensure!(
                    (start, len) == (0, dim),
                    Unsupported,
                    "elements {start} to {} of the {dim} of a head are wanted, but in {format} they share a scale",
                    start.saturating_add(len)
                );
                Some(scales)
            }
        };
        let units = self.units.narrow(axis, start, len)?;
        let affine = match self.affine {
            Some(affine) => Some(affine.narrow(axis, start, len)?),
            None => None,
        };
        Ok(Self { units, scales, affine })
    }

    /// Units of an affine format with what describes them.
    fn described(units: RawView<CacheFormat>, of: Affine, scales: &AffineScales) -> Result<Self> {
        let AffineScales { scales, zeros, fixed, .. } = *scales;
        Self { units, scales: None, affine: None }.with_affine("the cache", RawAffine::new(of, scales, zeros, fixed))
    }

    /// The same units with a description; `name` is the argument's name.
    pub fn with_affine(self, name: &str, mut affine: RawAffine) -> Result<Self> {
        affine.fit(name, self.units.shape, 8 / self.units.dtype.unit_elements().min(2))?;
        Ok(Self { affine: Some(affine), ..self })
    }

    /// Checks that there are the scales that the format has, and their shape. `name` is the argument's name.
    pub fn check_scales(&self, name: &str) -> Result<()> {
        let format = self.units.dtype;
        let Some(scales) = &self.scales else {
            ensure!(!format.has_scales(), InvalidValue, "{name} is {format}, but has no scales");
            return Ok(());
        };
        let has_any = format.has_scales() || format.has_static_scales();
        ensure!(has_any, InvalidValue, "{name} is {format}, which has no scales, but scales are given");
        let [batch, seq, heads, _] = self.units.shape;
        let want = [batch, seq, heads, 1];
        ensure!(
            scales.shape == want,
            Shape,
            "the scales of {name} have the shape {:?}, but one per token and head is {want:?}",
            scales.shape
        );
        ensure!(
            matches!(scales.dtype, DType::F32 | DType::F16),
            DType,
            "the scales of {name} are {}, which is neither f32 nor f16",
            scales.dtype
        );
        let moves = |axis: usize| scales.shape[axis] > 1 && scales.strides[axis] != 0;
        ensure!(
            format.has_scales() || !moves(BATCH) && !moves(SEQ),
            Stride,
            "the scales of {name} have the strides {:?}, but {format} has one scale per head or per tensor: those of batch and seq \
             must be 0",
            scales.strides
        );
        Ok(())
    }

    /// The same units with static scales, one or one per head, that lie together.
    fn with_static_scales(mut self, data: *const u8, dtype: DType, n: usize) -> Result<Self> {
        let ([batch, seq, heads, _], format) = (self.units.shape, self.units.dtype);
        ensure!(format.has_static_scales(), InvalidValue, "the cache is {format}, which has no static scales");
        ensure!(
            n == 1 || n == heads,
            Shape,
            "there are {n} static scales, but the cache has {heads} heads: give one scale, or one per head"
        );
        let (shape, strides) = ([batch, seq, heads, 1], [0, 0, i64::from(n > 1), 0]);
        self.scales = Some(RawView { data: data.cast_mut(), dtype, shape, strides, bytes: None });
        self.check("the cache", RawView::validate, RawView::validate, false)?;
        Ok(self)
    }
}

/// Fails unless a format is one of the eight-bit floats.
fn fp8(format: CacheFormat) -> Result<CacheFormat> {
    ensure!(format.has_static_scales(), InvalidValue, "the format is {format}, which is no fp8 format");
    Ok(format)
}

/// Fails unless a format is one of blocks.
fn blocks(format: CacheFormat) -> Result<CacheFormat> {
    ensure!(format.is_blocks(), InvalidValue, "the format is {format}, which is no format of blocks");
    Ok(format)
}

/// Fails unless a format is an affine one.
fn affine(format: CacheFormat) -> Result<CacheFormat> {
    ensure!(format.is_affine(), InvalidValue, "the format is {format}, which is no affine format");
    Ok(format)
}

/// The zero points of an affine cache, in the shape of its scales.
#[derive(Debug)]
pub struct ZeroPoints<'a> {
    raw: RawView<ZeroType>,
    /// They may be written.
    exclusive: bool,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: a borrow of a slice of plain numbers, and slices of those cross threads.
unsafe impl Send for ZeroPoints<'_> {}

impl<'a> From<View<'a>> for ZeroPoints<'a> {
    /// Floats that writes read.
    fn from(view: View<'a>) -> Self {
        Self::of(view.raw, false)
    }
}

impl<'a> From<ViewMut<'a>> for ZeroPoints<'a> {
    /// Floats that writes compute.
    fn from(view: ViewMut<'a>) -> Self {
        Self::of(view.raw, true)
    }
}

impl<'a> ZeroPoints<'a> {
    fn of(view: RawView, exclusive: bool) -> Self {
        let RawView { data, dtype, shape, strides, bytes } = view;
        let raw = RawView { data, dtype: ZeroType::Float(dtype), shape, strides, bytes };
        Self { raw, exclusive, lifetime: PhantomData }
    }

    fn integers<T>(data: *mut T, len: usize, dtype: ZeroType, shape: [usize; 4], exclusive: bool) -> Result<Self> {
        let raw = Buffer::of_elements(data, len).view(dtype, 0, shape, contiguous(shape))?;
        Ok(Self { raw, exclusive, lifetime: PhantomData })
    }

    /// Integers that writes read, at the start of `data` in the order of their axes.
    ///
    /// # Errors
    /// `data` is too short for `shape`.
    pub fn u8(data: &'a [u8], shape: [usize; 4]) -> Result<Self> {
        Self::integers(data.as_ptr().cast_mut(), data.len(), ZeroType::U8, shape, false)
    }

    /// As [`Self::u8`], of signed integers.
    ///
    /// # Errors
    /// As [`Self::u8`].
    pub fn i8(data: &'a [i8], shape: [usize; 4]) -> Result<Self> {
        Self::integers(data.as_ptr().cast_mut(), data.len(), ZeroType::I8, shape, false)
    }

    /// As [`Self::u8`], of integers that writes compute.
    ///
    /// # Errors
    /// As [`Self::u8`].
    pub fn u8_mut(data: &'a mut [u8], shape: [usize; 4]) -> Result<Self> {
        Self::integers(data.as_mut_ptr(), data.len(), ZeroType::U8, shape, true)
    }

    /// As [`Self::u8_mut`], of signed integers.
    ///
    /// # Errors
    /// As [`Self::u8`].
    pub fn i8_mut(data: &'a mut [i8], shape: [usize; 4]) -> Result<Self> {
        Self::integers(data.as_mut_ptr(), data.len(), ZeroType::I8, shape, true)
    }
}

/// The scales of an affine cache, of f32, f16 or bf16, and its zero points.
///
/// Their shape says which elements of the cache, `[batch, seq, kv_heads, dim]`, share a scale. Each axis has one entry, or as
/// many as the cache, or along seq and dim a number that divides the cache's, so that so many neighbours share each:
///
/// | a scale for each | shape |
/// | --- | --- |
/// | cache | `[1, 1, 1, 1]` |
/// | channel (an element of a head) | `[1, 1, kv_heads, dim]` |
/// | token and head | `[batch, seq, kv_heads, 1]` |
/// | 64 elements of a head of a token | `[batch, seq, kv_heads, dim / 64]` |
/// | channel and 32 tokens | `[batch, seq / 32, kv_heads, dim]` |
/// | channel and page | `[pages, 1, kv_heads, dim]` |
///
/// Scales that writes compute belong to one sequence (or page) and head. Scales may lie between the units, where a layout has both
/// in one buffer, as [`CacheViewMut::affine_from_raw`] takes them.
#[derive(Debug)]
pub struct AffineScales<'a> {
    scales: RawView,
    zeros: Option<RawView<ZeroType>>,
    fixed: bool,
    lifetime: PhantomData<&'a mut [u8]>,
}

// SAFETY: as of `ZeroPoints`.
unsafe impl Send for AffineScales<'_> {}

impl<'a> AffineScales<'a> {
    /// Scales that every operation reads and none writes, without zero points.
    pub fn fixed(scales: View<'a>) -> Self {
        Self { scales: scales.raw, zeros: None, fixed: true, lifetime: PhantomData }
    }

    /// Scales that writes compute, without zero points.
    pub fn written(scales: ViewMut<'a>) -> Self {
        Self { scales: scales.raw, zeros: None, fixed: false, lifetime: PhantomData }
    }

    /// The same with zero points. Writes compute scales and zero points if both are theirs to write, and else read both.
    #[must_use]
    pub fn zeros(self, zeros: impl Into<ZeroPoints<'a>>) -> Self {
        let zeros = zeros.into();
        Self { zeros: Some(zeros.raw), fixed: self.fixed || !zeros.exclusive, ..self }
    }
}

/// Strides of a cache whose units lie in the order of its axes.
fn contiguous_units(format: CacheFormat, [batch, seq, heads, dim]: [usize; 4]) -> [i64; 4] {
    contiguous([batch, seq, heads, dim / format.unit_elements()])
}

macro_rules! described {
    () => {
        /// `[batch, seq, kv_heads, dim]`, in elements.
        pub fn shape(&self) -> [usize; 4] {
            self.raw.units.shape
        }

        /// Strides in units, axis by axis.
        pub fn strides(&self) -> [i64; 4] {
            self.raw.units.strides
        }

        /// The format of the units.
        pub fn format(&self) -> CacheFormat {
            self.raw.units.dtype
        }

        /// The same cache with static scales of f32 or f16: one, or one per head. Without them, the static scales of a format that
        /// [has them](CacheFormat::has_static_scales) are 1.
        ///
        /// Scales should be positive, finite, and such that elements divided by them use the range of the units. Every operation
        /// on the units must be given the same scales.
        ///
        /// # Errors
        /// [`Status::InvalidValue`](crate::Status::InvalidValue): the format has no static scales.
        /// [`Status::Shape`](crate::Status::Shape): there are neither one scale nor one per head.
        /// [`Status::DType`](crate::Status::DType): they are bf16.
        pub fn static_scales<T: Element>(self, scales: &'a [T]) -> Result<Self> {
            let raw = self.raw.with_static_scales(scales.as_ptr().cast(), T::DTYPE, scales.len())?;
            Ok(Self { raw, lifetime: PhantomData })
        }

        /// The sequences (or pages) `start .. start + len`, with their scales.
        ///
        /// # Errors
        /// [`Status::Shape`](crate::Status::Shape): they are not all inside the axis.
        pub fn batch(self, start: usize, len: usize) -> Result<Self> {
            Ok(Self { raw: self.raw.narrow(BATCH, start, len)?, lifetime: PhantomData })
        }

        /// The slots `start .. start + len` of every sequence, with their scales.
        ///
        /// # Errors
        /// As [`batch`](Self::batch).
        pub fn seq(self, start: usize, len: usize) -> Result<Self> {
            Ok(Self { raw: self.raw.narrow(SEQ, start, len)?, lifetime: PhantomData })
        }

        /// The KV heads `start .. start + len`, with their scales.
        ///
        /// # Errors
        /// As [`batch`](Self::batch).
        pub fn heads(self, start: usize, len: usize) -> Result<Self> {
            Ok(Self { raw: self.raw.narrow(HEADS, start, len)?, lifetime: PhantomData })
        }

        /// The indices of an axis before `at`, and those from `at` on, with their scales: as [`View::split_at`].
        ///
        /// # Errors
        /// [`Status::Shape`](crate::Status::Shape): `at` is past the end of the axis.
        /// [`Status::Unsupported`](crate::Status::Unsupported): [`Axis::Dim`] of a format whose heads share a scale, or inside a unit.
        pub fn split_at(self, axis: Axis, at: usize) -> Result<(Self, Self)> {
            let n = check_split(self.raw.units.shape, axis, at)?;
            let [low, high] = [(0, at), (at, n - at)].map(|(start, len)| self.raw.narrow(axis as usize, start, len));
            Ok((Self { raw: low?, lifetime: PhantomData }, Self { raw: high?, lifetime: PhantomData }))
        }
    };
}

impl<'a> CacheView<'a> {
    /// The elements `start .. start + len` of every head. In a format with scales they keep the scale of the whole head.
    ///
    /// So values that are a part of their keys, as in latent attention, become a view of the keys.
    ///
    /// # Errors
    /// As [`batch`](Self::batch). [`Status::Unsupported`](crate::Status::Unsupported): they are not whole units.
    pub fn dim(self, start: usize, len: usize) -> Result<Self> {
        let RawCacheView { units, scales, affine } = self.raw;
        let affine = match affine {
            Some(affine) if affine.scales.shape[DIM] > 1 => Some(affine.narrow(DIM, start, len)?),
            affine => affine,
        };
        let raw = RawCacheView { units: units.narrow(DIM, start, len)?, scales, affine };
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A cache in [`CacheFormat::Int8`] whose units lie at the start of `units` in the order of their axes, with `scales`
    /// `[batch, seq, kv_heads, 1]` of f32 or f16.
    ///
    /// # Errors
    /// `units` is too short for `shape`; the scales have another shape or type.
    pub fn int8(units: &'a [i8], shape: [usize; 4], scales: View<'a>) -> Result<Self> {
        Self::int8_strided(units, 0, shape, contiguous(shape), scales)
    }

    /// As [`Self::int8`], of which unit `[0, 0, 0, 0]` is `units[offset]`; strides are in units and may be negative or 0.
    ///
    /// # Errors
    /// As [`Self::int8`]; shape and strides reach outside of `units`.
    pub fn int8_strided(
        units: &'a [i8],
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
        scales: View<'a>,
    ) -> Result<Self> {
        let buffer = Buffer::of_elements(units.as_ptr().cast_mut(), units.len());
        let units = buffer.view(CacheFormat::Int8, offset, shape, strides)?;
        let raw = RawCacheView { units, scales: Some(scales.raw), affine: None };
        raw.check_scales("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A cache in [`CacheFormat::Fp8E4m3`] or [`CacheFormat::Fp8E5m2`] whose units lie at the start of `units` in the order of
    /// their axes, with scales of 1; see [`static_scales`](Self::static_scales).
    ///
    /// # Errors
    /// `units` is too short for `shape`; the format is another one.
    pub fn fp8(units: &'a [u8], format: CacheFormat, shape: [usize; 4]) -> Result<Self> {
        Self::fp8_strided(units, format, 0, shape, contiguous(shape))
    }

    /// As [`Self::fp8`], of which unit `[0, 0, 0, 0]` is `units[offset]`; strides are in units and may be negative or 0.
    ///
    /// # Errors
    /// As [`Self::fp8`]; shape and strides reach outside of `units`.
    pub fn fp8_strided(
        units: &'a [u8],
        format: CacheFormat,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        let buffer = Buffer::of_elements(units.as_ptr().cast_mut(), units.len());
        let units = buffer.view(fp8(format)?, offset, shape, strides)?;
        Ok(Self { raw: RawCacheView { units, scales: None, affine: None }, lifetime: PhantomData })
    }

    /// A cache in one of the formats of blocks, [`CacheFormat::Q8_0`] for example, whose blocks lie at the start of `units` in the
    /// order of its axes. The bytes are aligned to 2. `shape` counts elements, of which a head has a multiple of 32.
    ///
    /// ```
    /// use kvlane::*;
    /// // Room for 16 tokens, two heads of 64 elements, each in two blocks of 34 bytes.
    /// let shape = [1, 16, 2, 64];
    /// let mut keys = CacheBuffer::<u8>::zeroed(16 * 2 * CacheFormat::Q8_0.head_bytes(64))?;
    /// let mut values = CacheBuffer::<u8>::zeroed(16 * 2 * CacheFormat::Q4_0.head_bytes(64))?;
    /// let k = [1.0f32; 2 * 64];
    /// let k = View::new(&k, [1, 1, 2, 64])?;
    /// let k_cache = CacheViewMut::blocks(&mut keys, CacheFormat::Q8_0, shape)?;
    /// let v_cache = CacheViewMut::blocks(&mut values, CacheFormat::Q4_0, shape)?;
    /// kv_write(&Context::new()?, &Serial, KvWrite::new(k, k, k_cache, v_cache, Destination::positions(&[0])))?;
    /// assert_eq!(keys[2..34], [127; 32]);
    /// assert_eq!(CacheView::blocks(&keys, CacheFormat::Q8_0, shape)?.strides(), [64, 4, 2, 1]);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// `units` is too short for `shape` or not aligned; dim is no multiple of 32; the format is another one.
    pub fn blocks(units: &'a [u8], format: CacheFormat, shape: [usize; 4]) -> Result<Self> {
        Self::blocks_strided(units, format, 0, shape, contiguous_units(format, shape))
    }

    /// As [`Self::blocks`], of which block `[0, 0, 0, 0]` is number `offset` of `units`; strides are in blocks and may be
    /// negative or 0, but that of dim is 1.
    ///
    /// # Errors
    /// As [`Self::blocks`]; shape and strides reach outside of `units`, or the stride of dim is not 1.
    pub fn blocks_strided(
        units: &'a [u8],
        format: CacheFormat,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        let buffer = Buffer::of_blocks(units.as_ptr().cast_mut(), units.len(), blocks(format)?.unit_bytes());
        let units = buffer.view(format, offset, shape, strides)?;
        Ok(Self { raw: RawCacheView { units, scales: None, affine: None }, lifetime: PhantomData })
    }

    /// A cache in [`CacheFormat::Affine8`] or [`CacheFormat::Affine4`] whose units lie at the start of `units` in the order of its axes.
    /// `shape` counts elements, of which a head has an even number in `Affine4`.
    ///
    /// ```
    /// use kvlane::*;
    /// // Four tokens of two heads of eight elements in four bits, with a scale and a zero point for each token and head.
    /// let (shape, of_scales) = ([1, 4, 2, 8], [1, 4, 2, 1]);
    /// let (mut units, mut scales, mut zeros) = ([0u8; 4 * 2 * 4], [0f32; 8], [0f32; 8]);
    /// let of = Affine::new(Integers::Unsigned).nibbles(Nibbles::HighFirst);
    /// let written = AffineScales::written(ViewMut::new(&mut scales, of_scales)?).zeros(ViewMut::new(&mut zeros, of_scales)?);
    /// let k_cache = CacheViewMut::affine(&mut units, CacheFormat::Affine4, shape, of, written)?;
    /// let (k, mut values) = ([0.0f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 15.0], [0f32; 64]);
    /// let k = View::strided(&k, 0, [1, 1, 2, 8], [0, 0, 0, 1])?; // both heads are equal
    /// let write = KvWrite::new(k, k, k_cache, ViewMut::new(&mut values, shape)?, Destination::positions(&[0]));
    /// kv_write(&Context::new()?, &Serial, write)?;
    /// assert_eq!(units[..4], [0x01, 0x23, 0x45, 0x6f]);
    /// assert_eq!((scales[0], zeros[0]), (1.0, 0.0));
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// `units` is too short for `shape`; the format is another one; the scales do not fit the shape.
    pub fn affine(
        units: &'a [u8],
        format: CacheFormat,
        shape: [usize; 4],
        of: Affine,
        scales: AffineScales<'a>,
    ) -> Result<Self> {
        Self::affine_strided(units, format, 0, shape, contiguous_units(format, shape), of, scales)
    }

    /// As [`Self::affine`], of which unit `[0, 0, 0, 0]` is `units[offset]`; strides are in units and may be negative or 0, but that
    /// of dim is 1.
    ///
    /// # Errors
    /// As [`Self::affine`]; shape and strides reach outside of `units`, or the stride of dim is not 1.
    pub fn affine_strided(
        units: &'a [u8],
        format: CacheFormat,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
        of: Affine,
        scales: AffineScales<'a>,
    ) -> Result<Self> {
        let buffer = Buffer::of_elements(units.as_ptr().cast_mut(), units.len());
        let raw = RawCacheView::described(buffer.view(affine(format)?, offset, shape, strides)?, of, &scales)?;
        raw.validate("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A cache in any format whose unit `[0, 0, 0, 0]` lies at `data`; strides are in units and may be negative or 0.
    ///
    /// # Errors
    /// Those of [`View::from_raw`]; the format needs scales and there are none, or the reverse; the scales have another shape or
    /// type.
    ///
    /// # Safety
    /// For the lifetime `'a`, the memory of all units is readable, initialised, and written by nobody.
    pub unsafe fn from_raw(
        data: *const u8,
        format: CacheFormat,
        shape: [usize; 4],
        strides: [i64; 4],
        scales: Option<View<'a>>,
    ) -> Result<Self> {
        let units = RawView { data: data.cast_mut(), dtype: format, shape, strides, bytes: None };
        let raw = RawCacheView { units, scales: scales.map(|view| view.raw), affine: None };
        raw.validate("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    described!();
}

impl<'a> CacheViewMut<'a> {
    /// A cache in [`CacheFormat::Int8`] whose units lie at the start of `units` in the order of their axes, with `scales`
    /// `[batch, seq, kv_heads, 1]` of f32 or f16.
    ///
    /// # Errors
    /// `units` is too short for `shape`; the scales have another shape or type.
    pub fn int8(units: &'a mut [i8], shape: [usize; 4], scales: ViewMut<'a>) -> Result<Self> {
        Self::int8_strided(units, 0, shape, contiguous(shape), scales)
    }

    /// As [`Self::int8`], of which unit `[0, 0, 0, 0]` is `units[offset]`; no two units may share memory.
    ///
    /// # Errors
    /// As [`Self::int8`]; shape and strides reach outside of `units`, or units share memory.
    pub fn int8_strided(
        units: &'a mut [i8],
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
        scales: ViewMut<'a>,
    ) -> Result<Self> {
        let buffer = Buffer::of_elements(units.as_mut_ptr(), units.len());
        let units = buffer.view(CacheFormat::Int8, offset, shape, strides)?;
        let raw = RawCacheView { units, scales: Some(scales.raw), affine: None };
        raw.validate_output("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A cache in [`CacheFormat::Fp8E4m3`] or [`CacheFormat::Fp8E5m2`] whose units lie at the start of `units` in the order of
    /// their axes, with scales of 1; see [`static_scales`](Self::static_scales).
    ///
    /// # Errors
    /// `units` is too short for `shape`; the format is another one.
    pub fn fp8(units: &'a mut [u8], format: CacheFormat, shape: [usize; 4]) -> Result<Self> {
        Self::fp8_strided(units, format, 0, shape, contiguous(shape))
    }

    /// As [`Self::fp8`], of which unit `[0, 0, 0, 0]` is `units[offset]`; no two units may share memory.
    ///
    /// # Errors
    /// As [`Self::fp8`]; shape and strides reach outside of `units`, or units share memory.
    pub fn fp8_strided(
        units: &'a mut [u8],
        format: CacheFormat,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        let buffer = Buffer::of_elements(units.as_mut_ptr(), units.len());
        let raw =
            RawCacheView { units: buffer.view(fp8(format)?, offset, shape, strides)?, scales: None, affine: None };
        raw.validate_output("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A cache in one of the formats of blocks, [`CacheFormat::Q8_0`] for example, whose blocks lie at the start of `units` in the
    /// order of its axes. The bytes are aligned to 2. `shape` counts elements, of which a head has a multiple of 32.
    ///
    /// # Errors
    /// `units` is too short for `shape` or not aligned; dim is no multiple of 32; the format is another one.
    pub fn blocks(units: &'a mut [u8], format: CacheFormat, shape: [usize; 4]) -> Result<Self> {
        Self::blocks_strided(units, format, 0, shape, contiguous_units(format, shape))
    }

    /// As [`Self::blocks`], of which block `[0, 0, 0, 0]` is number `offset` of `units`; no two blocks may share memory.
    ///
    /// # Errors
    /// As [`Self::blocks`]; shape and strides reach outside of `units`, the stride of dim is not 1, or blocks share memory.
    pub fn blocks_strided(
        units: &'a mut [u8],
        format: CacheFormat,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
    ) -> Result<Self> {
        let buffer = Buffer::of_blocks(units.as_mut_ptr(), units.len(), blocks(format)?.unit_bytes());
        let raw = RawCacheView { units: buffer.view(format, offset, shape, strides)?, scales: None, affine: None };
        raw.validate_output("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A cache in [`CacheFormat::Affine8`] or [`CacheFormat::Affine4`] whose units lie at the start of `units` in the order of its axes.
    /// `shape` counts elements, of which a head has an even number in `Affine4`.
    ///
    /// # Errors
    /// As [`CacheView::affine`]; scales that writes compute are shared by sequences or heads, or share memory.
    pub fn affine(
        units: &'a mut [u8],
        format: CacheFormat,
        shape: [usize; 4],
        of: Affine,
        scales: AffineScales<'a>,
    ) -> Result<Self> {
        Self::affine_strided(units, format, 0, shape, contiguous_units(format, shape), of, scales)
    }

    /// As [`Self::affine`], of which unit `[0, 0, 0, 0]` is `units[offset]`; no two units may share memory.
    ///
    /// # Errors
    /// As [`Self::affine`]; shape and strides reach outside of `units`, the stride of dim is not 1, or units share memory.
    pub fn affine_strided(
        units: &'a mut [u8],
        format: CacheFormat,
        offset: usize,
        shape: [usize; 4],
        strides: [i64; 4],
        of: Affine,
        scales: AffineScales<'a>,
    ) -> Result<Self> {
        let buffer = Buffer::of_elements(units.as_mut_ptr(), units.len());
        let raw = RawCacheView::described(buffer.view(affine(format)?, offset, shape, strides)?, of, &scales)?;
        raw.validate_output("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// An affine cache whose unit `[0, 0, 0, 0]` lies at `data`, for scales between the units of one buffer: their views come from
    /// [`ViewMut::from_raw`]. A [`CacheView`] of such a cache comes from this one, or from [`CacheView::affine_strided`].
    ///
    /// # Errors
    /// As [`Self::affine_strided`].
    ///
    /// # Safety
    /// For the lifetime `'a`, the memory of all units is readable, writable, initialised, and used through this view alone.
    pub unsafe fn affine_from_raw(
        data: *mut u8,
        format: CacheFormat,
        shape: [usize; 4],
        strides: [i64; 4],
        of: Affine,
        scales: AffineScales<'a>,
    ) -> Result<Self> {
        let units = RawView { data, dtype: affine(format)?, shape, strides, bytes: None };
        let raw = RawCacheView::described(units, of, &scales)?;
        raw.validate_output("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A cache in any format whose unit `[0, 0, 0, 0]` lies at `data`; strides are in units and may be negative.
    ///
    /// # Errors
    /// Those of [`CacheView::from_raw`]; units or scales share memory.
    ///
    /// # Safety
    /// For the lifetime `'a`, the memory of all units is readable, writable, initialised, and used through this view alone.
    pub unsafe fn from_raw(
        data: *mut u8,
        format: CacheFormat,
        shape: [usize; 4],
        strides: [i64; 4],
        scales: Option<ViewMut<'a>>,
    ) -> Result<Self> {
        let units = RawView { data, dtype: format, shape, strides, bytes: None };
        let raw = RawCacheView { units, scales: scales.map(|view| view.raw), affine: None };
        raw.validate_output("the cache")?;
        Ok(Self { raw, lifetime: PhantomData })
    }

    /// A read-only view of the same units.
    pub fn as_view(&self) -> CacheView<'_> {
        CacheView { raw: self.raw, lifetime: PhantomData }
    }

    /// The same view, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> CacheViewMut<'_> {
        CacheViewMut { raw: self.raw, lifetime: PhantomData }
    }

    described!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn parts_keep_their_scales() {
        let (mut units, mut scales) = (vec![0i8; 4 * 6 * 2 * 8], vec![0f32; 4 * 6 * 2]);
        let (shape, of_scales) = ([4, 6, 2, 8], [4, 6, 2, 1]);
        for axis in [Axis::Batch, Axis::Seq, Axis::Heads] {
            for at in 0..=shape[axis as usize] {
                let view = ViewMut::new(&mut scales, of_scales).unwrap();
                let whole = CacheViewMut::int8(&mut units, shape, view).unwrap();
                let (low, high) = whole.split_at(axis, at).unwrap();
                assert_eq!((low.shape()[axis as usize], high.shape()[axis as usize]), (at, shape[axis as usize] - at));
                let extents = [&low, &high].map(|part| part.raw.validate_output("a part").unwrap());
                assert!(!low.raw.overlaps_cache(extents[0], &high.raw, extents[1]), "{axis:?} at {at}");
            }
        }
        let whole = CacheView::int8(&units, shape, View::new(&scales, of_scales).unwrap()).unwrap();
        assert_eq!(whole.batch(1, 2).unwrap().seq(2, 3).unwrap().heads(1, 1).unwrap().shape(), [2, 3, 1, 8]);
        assert_eq!(whole.split_at(Axis::Dim, 4).unwrap_err().status(), Status::Unsupported);
        assert_eq!(whole.split_at(Axis::Heads, 3).unwrap_err().status(), Status::Shape);
        let plain = CacheView::from(View::new(&scales, [4, 3, 2, 2]).unwrap());
        assert_eq!(plain.split_at(Axis::Dim, 1).unwrap().1.shape(), [4, 3, 2, 1]);
    }

    #[test]
    fn a_raw_cache_has_scales_if_its_format_has() {
        let (mut units, mut scales) = ([0i8; 64], [0f32; 8]);
        let (shape, strides) = ([2, 2, 2, 8], contiguous([2, 2, 2, 8]));
        let data: *mut u8 = units.as_mut_ptr().cast();
        // SAFETY: views of the arrays, or errors.
        unsafe {
            let view = View::new(&scales, [2, 2, 2, 1]).unwrap();
            assert!(CacheView::from_raw(data, CacheFormat::Int8, shape, strides, Some(view)).is_ok());
            let none = CacheView::from_raw(data, CacheFormat::Int8, shape, strides, None).unwrap_err();
            assert_eq!(none.message(), "the cache is int8, but has no scales");
            let view = ViewMut::new(&mut scales, [2, 2, 2, 1]).unwrap();
            assert!(CacheViewMut::from_raw(data, CacheFormat::Int8, shape, [0; 4], Some(view)).is_err());
            let null = CacheView::from_raw(std::ptr::null(), CacheFormat::Bf16, shape, strides, None).unwrap_err();
            assert_eq!(null.status(), Status::NullPointer);
        }
    }
}
