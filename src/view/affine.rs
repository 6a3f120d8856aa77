//! Affine quantisation: integers, and a scale and perhaps a zero point for each of their groups.

use super::raw::{BATCH, DIM, Extent, HEADS, RawView, SEQ, Units};
use crate::dtype::DType;
use crate::error::{Error, Result, ensure};

/// How the integers of a cache in [`CacheFormat::Affine8`](crate::CacheFormat::Affine8) or
/// [`CacheFormat::Affine4`](crate::CacheFormat::Affine4) lie in its bytes, and what makes elements of them.
///
/// An integer q, a scale s and a zero point z stand for an element, each operation rounded to f32:
///
/// | zero points | element |
/// | --- | --- |
/// | none | q s |
/// | [`Zeros::Point`] | (q - z) s |
/// | [`Zeros::Minimum`] | q s + z |
/// | [`Zeros::Shift`] | q s - z |
///
/// The shape of the scales says which elements share one: see [`AffineScales`](crate::AffineScales).
///
/// | cache | description |
/// | --- | --- |
/// | ONNX Runtime, GroupQueryAttention, int8 | `Affine::new(Integers::Signed)`, static scales |
/// | the same, int4 | `Affine::new(Integers::Offset)`, static scales |
/// | OpenVINO, u8 | `Affine::new(Integers::Unsigned).zeros(Zeros::Point)` |
/// | the same, u4 | also `.nibbles(Nibbles::HighFirst)` |
/// | KIVI | `Affine::new(Integers::Unsigned).zeros(Zeros::Minimum)` |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Affine {
    /// How an integer lies in its bits.
    pub integers: Integers,
    /// Which half of a byte has the even element, in `Affine4`.
    pub nibbles: Nibbles,
    /// What zero points are, if there are any.
    pub zeros: Zeros,
}

impl Affine {
    /// Integers of a kind, the even element in the low half of a byte, zero points that are [`Zeros::Point`] if there are any.
    pub const fn new(integers: Integers) -> Self {
        Self { integers, nibbles: Nibbles::LowFirst, zeros: Zeros::Point }
    }

    /// The same with another order of the halves of a byte.
    #[must_use]
    pub const fn nibbles(self, nibbles: Nibbles) -> Self {
        Self { nibbles, ..self }
    }

    /// The same with another kind of zero points.
    #[must_use]
    pub const fn zeros(self, zeros: Zeros) -> Self {
        Self { zeros, ..self }
    }
}

/// How an integer lies in its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Integers {
    /// From 0 to 255, or to 15.
    #[default]
    Unsigned = 0,
    /// From -128 to 127, or from -8 to 7, in two's complement.
    Signed = 1,
    /// The same numbers, of which each lies as the unsigned one that is 128, or 8, greater.
    Offset = 2,
}

/// Which half of a byte has the even one of two elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Nibbles {
    /// The low half.
    #[default]
    LowFirst = 0,
    /// The high half.
    HighFirst = 1,
}

/// What zero points are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Zeros {
    /// An integer or a float that is subtracted from integers before they are multiplied.
    #[default]
    Point = 0,
    /// A float that is added to products: the element of the integer 0.
    Minimum = 1,
    /// A float that is subtracted from products.
    Shift = 2,
}

/// The type of a zero point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroType {
    Float(DType),
    U8,
    I8,
}

impl ZeroType {
    pub fn is_integer(self) -> bool {
        !matches!(self, Self::Float(_))
    }
}

impl std::fmt::Display for ZeroType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Float(dtype) => dtype.fmt(f),
            Self::U8 => f.write_str("u8"),
            Self::I8 => f.write_str("i8"),
        }
    }
}

impl Units for ZeroType {
    fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.size(),
            Self::U8 | Self::I8 => 1,
        }
    }

    fn elements(self) -> usize {
        1
    }

    fn align(self) -> usize {
        self.size()
    }
}

/// An [`Affine`] with its scales and zero points.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawAffine {
    pub of: Affine,
    /// Each axis has 1 entry, or a number that divides the units' axis: so many neighbours share an entry.
    pub scales: RawView,
    /// In the shape of the scales.
    pub zeros: Option<RawView<ZeroType>>,
    /// Writes read scales and zero points, instead of computing them.
    pub fixed: bool,
    /// Neighbours along each axis of the units that share an entry.
    pub shared: [usize; 4],
}

/// The scales and zero points of one head of a token: the addresses of the first, and the bytes from one to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AffineRow {
    pub scales: *mut u8,
    pub zeros: *mut u8,
}

/// What [`AffineRow`]s of a cache have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AffineGroups {
    pub of: Affine,
    pub scale_dtype: DType,
    /// None without zero points.
    pub zero_type: Option<ZeroType>,
    /// Bytes from the scale of a group of elements to that of the next.
    pub scale_step: isize,
    pub zero_step: isize,
    /// Elements of a group.
    pub group: usize,
    pub fixed: bool,
}

impl RawAffine {
    pub fn new(of: Affine, scales: RawView, zeros: Option<RawView<ZeroType>>, fixed: bool) -> Self {
        Self { of, scales, zeros, fixed, shared: [1; 4] }
    }

    /// Checks scales and zero points against the units of a cache, and finds which neighbours share them. `bits` are those of an
    /// integer.
    pub fn fit(&mut self, name: &str, shape: [usize; 4], bits: usize) -> Result<()> {
        let of_scales = self.scales.shape;
        for axis in 0..4 {
            let (n, own, axis_name) = (shape[axis], of_scales[axis], RawView::axis_name(axis));
            // Any number of entries for no elements.
            self.shared[axis] = match own {
                1 => n.max(1),
                _ if n == own || n == 0 => 1,
                _ if own == 0 || !n.is_multiple_of(own) => {
                    crate::error::fail!(
                        Shape,
                        "the scales of {name} have {axis_name} = {own}, which does not divide the {n} of {name}"
                    )
                }
                _ => n / own,
            };
            ensure!(
                own == 1 || self.shared[axis] == 1 || axis == SEQ || axis == DIM,
                Shape,
                "the scales of {name} have {axis_name} = {own}, but {name} has {n}: 1 or {n} are wanted"
            );
        }
        let group = self.shared[DIM];
        ensure!(
            bits == 8 || group == 1 || group.is_multiple_of(2),
            Shape,
            "{group} elements of {name} share a scale, but two lie in a byte: the number must be even, or 1"
        );
        if !self.fixed {
            for axis in [BATCH, HEADS] {
                ensure!(
                    self.shared[axis] == 1,
                    Shape,
                    "the scales of {name} have {} = 1, but {name} has {}: scales that writes compute are those of one sequence and head",
                    RawView::axis_name(axis),
                    shape[axis]
                );
            }
        }
        if let Some(zeros) = &self.zeros {
            ensure!(
                zeros.shape == of_scales,
                Shape,
                "the zero points of {name} have the shape {:?}, but its scales have {of_scales:?}",
                zeros.shape
            );
            ensure!(
                self.of.zeros == Zeros::Point || !zeros.dtype.is_integer(),
                DType,
                "the zero points of {name} are {}, but those that are added to products are floats",
                zeros.dtype
            );
        }
        Ok(())
    }

    /// Checks the memory of scales and zero points, and as [`Self::fit`].
    pub fn validate(&mut self, name: &str, shape: [usize; 4], bits: usize, written: bool) -> Result<[Extent; 2]> {
        self.fit(name, shape, bits)?;
        fn check<U: Units>(what: &str, name: &str, view: &RawView<U>, written: bool) -> Result<Extent> {
            let extent = if written { view.validate_output("") } else { view.validate("") };
            extent.map_err(|e| Error::new(e.status(), format!("the {what} of {name}{}", e.message())))
        }
        let written = written && !self.fixed;
        let scales = check("scales", name, &self.scales, written)?;
        let Some(zeros) = &self.zeros else { return Ok([scales, Extent { low: 0, high: 0 }]) };
        let extent = check("zero points", name, zeros, written)?;
        ensure!(
            !written || !apart_is_unknown(&self.scales, scales, zeros, extent),
            Overlap,
            "the scales and the zero points of {name} share memory"
        );
        Ok([scales, extent])
    }

    /// Whether a scale or a zero point may share a byte with an element of `other`.
    pub fn overlaps<V: Units>(&self, own: [Extent; 2], other: &RawView<V>, extent: Extent) -> bool {
        apart_is_unknown(&self.scales, own[0], other, extent)
            || self.zeros.is_some_and(|zeros| apart_is_unknown(&zeros, own[1], other, extent))
    }

    /// The indices `start .. start + len` of an axis of the units, with their scales and zero points.
    pub fn narrow(mut self, axis: usize, start: usize, len: usize) -> Result<Self> {
        let (n, shared) = (self.scales.shape[axis], self.shared[axis]);
        if n == 1 {
            ensure!(
                self.fixed || (start, len) == (0, shared),
                Unsupported,
                "indices {start} to {} of the {shared} of the {} axis are wanted, but they share a scale that writes compute",
                start.saturating_add(len),
                RawView::axis_name(axis)
            );
            return Ok(self);
        }
        ensure!(
            start.is_multiple_of(shared) && len.is_multiple_of(shared),
            Unsupported,
            "indices {start} to {} of the {} axis are wanted, but each {shared} share a scale",
            start.saturating_add(len),
            RawView::axis_name(axis)
        );
        let (start, len) = (start / shared, len / shared);
        self.scales = self.scales.narrow(axis, start, len)?;
        self.zeros = match self.zeros {
            Some(zeros) => Some(zeros.narrow(axis, start, len)?),
            None => None,
        };
        Ok(self)
    }

    /// Heads `first .. first + count` of a valid description.
    pub fn heads(mut self, first: usize, count: usize) -> Self {
        fn part<U: Units>(view: &mut RawView<U>, first: usize, count: usize) {
            view.shape[HEADS] = count;
            let bytes = (first as isize).wrapping_mul(view.strides[HEADS] as isize * view.dtype.size() as isize);
            view.data = view.data.wrapping_offset(bytes);
        }
        if self.scales.shape[HEADS] > 1 {
            part(&mut self.scales, first, count);
            if let Some(zeros) = &mut self.zeros {
                part(zeros, first, count);
            }
        }
        self
    }

    pub fn groups(&self) -> AffineGroups {
        let [scale_step, zero_step] = self.steps(DIM);
        AffineGroups {
            of: self.of,
            scale_dtype: self.scales.dtype,
            zero_type: self.zeros.map(|zeros| zeros.dtype),
            scale_step,
            zero_step,
            group: self.shared[DIM],
            fixed: self.fixed,
        }
    }

    /// The scales and zero points of a head of the token in a slot.
    ///
    /// # Safety
    /// The cache is valid, and the slot and the head are inside it.
    #[inline(always)]
    pub unsafe fn row(&self, b: usize, slot: usize, head: usize) -> AffineRow {
        #[inline(always)]
        fn at<U: Units>(view: &RawView<U>, index: [usize; 3]) -> *mut u8 {
            let mut units = 0;
            for axis in 0..3 {
                if view.shape[axis] > 1 {
                    units += index[axis] as isize * view.strides[axis] as isize;
                }
            }
            view.data.wrapping_offset(units * view.dtype.size() as isize)
        }
        let shared = self.shared[SEQ];
        let index = [b, if shared == 1 { slot } else { slot / shared }, head];
        AffineRow {
            scales: at(&self.scales, index),
            zeros: self.zeros.as_ref().map_or(std::ptr::null_mut(), |zeros| at(zeros, index)),
        }
    }

    /// Whether units of one cache are those of the other with the same scales and zero points, which both can hold.
    pub fn is_alike(&self, other: &Self) -> bool {
        let kinds = |of: &Self| {
            let zeros = of.zeros.map(|zeros| zeros.dtype);
            (of.of, of.fixed, of.scales.dtype, zeros, of.scales.shape[DIM])
        };
        kinds(self) == kinds(other)
    }

    /// Whether scales and zero points are the same ones.
    pub fn is_same(&self, other: &Self) -> bool {
        let place = |of: &Self| (of.scales.data, of.scales.strides, of.zeros.map(|zeros| (zeros.data, zeros.strides)));
        place(self) == place(other)
    }

    /// Bytes from the scale of an index of an axis to that of the next, and the same of zero points; neighbours along it share none,
    /// or all.
    pub fn steps(&self, axis: usize) -> [isize; 2] {
        fn step<U: Units>(view: &RawView<U>, axis: usize) -> isize {
            if view.shape[axis] == 1 { 0 } else { view.strides[axis] as isize * view.dtype.size() as isize }
        }
        [step(&self.scales, axis), self.zeros.as_ref().map_or(0, |zeros| step(zeros, axis))]
    }
}

/// Whether elements of two valid views may share bytes. Scales between the units that they belong to are recognised as apart.
pub(crate) fn apart_is_unknown<U: Units, V: Units>(a: &RawView<U>, of_a: Extent, b: &RawView<V>, of_b: Extent) -> bool {
    a.overlaps_within(of_a, b, of_b) && a.interleaves(b).is_none_or(|shared| shared)
}
