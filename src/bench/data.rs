//! Tensors for the cases and buffers for the limits, in the same kind of memory, so that they compare.

use std::fmt;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::view::{bhsd, contiguous};
use crate::{
    Advice, Affine, AffineScales, CacheBuffer, CacheFormat, CacheUnit, CacheView, CacheViewMut, Element, Error,
    Integers, Result, Status, View, ViewMut, advise,
};

/// The pages of the memory that is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// Of the usual size, 4 KiB on most systems.
    #[default]
    Small,
    /// Huge, where a buffer is large enough for one.
    Huge,
}

impl Pages {
    /// Both kinds.
    pub const ALL: [Self; 2] = [Self::Small, Self::Huge];

    /// `small` or `huge`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Huge => "huge",
        }
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Elements on pages of a kind, aligned to a page if there are enough of them.
pub(crate) struct Aligned<T: CacheUnit> {
    memory: CacheBuffer<T>,
}

impl<T: Element + CacheUnit> Aligned<T> {
    /// Numbers between -1 and 1.
    pub fn new(len: usize, pages: Pages) -> Result<Self> {
        Self::of(len, pages, T::from_f32)
    }
}

impl<T: CacheUnit> Aligned<T> {
    /// What `from` makes of numbers between -1 and 1.
    fn of(len: usize, pages: Pages, from: impl Fn(f32) -> T) -> Result<Self> {
        // A repeated pattern, so that filling does not take longer than measuring.
        const PATTERN: usize = 4099;
        let mut state = 1u64;
        let pattern: Vec<T> = (0..PATTERN.min(len))
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                from((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
            })
            .collect();
        let mut memory = CacheBuffer::<T>::zeroed(len)?;
        if pages == Pages::Small && memory.is_advised() {
            // Before the first write, so that the system has given no page yet.
            advise(memory.as_ptr().addr(), size_of_val(&memory[..]), Advice::Small);
        }
        for chunk in memory.chunks_mut(PATTERN) {
            chunk.copy_from_slice(&pattern[..chunk.len()]);
        }
        Ok(Self { memory })
    }

    pub fn len(&self) -> usize {
        self.memory.len()
    }

    pub fn as_slice(&self) -> &[T] {
        &self.memory
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.memory
    }
}

/// The order of a tensor's axes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Bshd,
    Bhsd,
}

impl Layout {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bshd => "bshd",
            Self::Bhsd => "bhsd",
        }
    }

    fn strides(self, shape: [usize; 4]) -> [i64; 4] {
        match self {
            Self::Bshd => contiguous(shape),
            Self::Bhsd => bhsd(shape),
        }
    }

    /// Strides of the units of a cache whose shape counts elements.
    fn unit_strides(self, [batch, seq, heads, dim]: [usize; 4], format: CacheFormat) -> [i64; 4] {
        self.strides([batch, seq, heads, dim / format.unit_elements()])
    }
}

enum Buffer {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    Bf16(Aligned<bf16>),
    /// Units, and a scale per token and head in the order of the axes of the units.
    Int8(Aligned<i8>, Aligned<f32>),
    /// Units of an eight-bit float, with one scale.
    Fp8(Aligned<u8>, CacheFormat),
    /// Blocks of several elements.
    Blocks(Aligned<u8>, CacheFormat),
    /// Unsigned integers, and a scale and a zero point per token and head.
    Affine(Aligned<u8>, [Aligned<f32>; 2], CacheFormat),
}

/// The description of affine formats here.
const AFFINE: Affine = Affine::new(Integers::Unsigned);

/// Not 1, so that a bench pays for scales.
static FP8_SCALE: [f32; 1] = [0.75];

/// A tensor, or the keys or values of a cache, of a format known at run time.
pub(crate) struct Tensor {
    buffer: Buffer,
    shape: [usize; 4],
    layout: Layout,
}

impl Tensor {
    pub fn new(format: impl Into<CacheFormat>, shape: [usize; 4], layout: Layout, pages: Pages) -> Result<Self> {
        let n = shape.iter().product();
        let buffer = match format.into() {
            CacheFormat::F32 => Buffer::F32(Aligned::new(n, pages)?),
            CacheFormat::F16 => Buffer::F16(Aligned::new(n, pages)?),
            CacheFormat::Bf16 => Buffer::Bf16(Aligned::new(n, pages)?),
            CacheFormat::Int8 => {
                let scales = Aligned::of(n / shape[3].max(1), pages, |x| (1.0 + 0.5 * x) / 127.0)?;
                Buffer::Int8(Aligned::of(n, pages, |x| (127.0 * x) as i8)?, scales)
            }
            format @ (CacheFormat::Fp8E4m3 | CacheFormat::Fp8E5m2) => {
                Buffer::Fp8(Aligned::of(n, pages, fp8_unit)?, format)
            }
            format @ (CacheFormat::Q8_0
            | CacheFormat::Q4_0
            | CacheFormat::Q4_1
            | CacheFormat::Q5_0
            | CacheFormat::Q5_1
            | CacheFormat::Iq4Nl) => {
                // Every byte is a number, and every pair of bytes 0x30 to 0x3b a small f16.
                let byte = |x: f32| 0x35 + (5.0 * x) as u8;
                Buffer::Blocks(Aligned::of(format.head_bytes(n), pages, byte)?, format)
            }
            format @ (CacheFormat::Affine8 | CacheFormat::Affine4) => {
                let heads = n / shape[3].max(1);
                let scales = Aligned::of(heads, pages, |x| (1.0 + 0.5 * x) / 128.0)?;
                let zeros = Aligned::of(heads, pages, |x| 128.0 + x)?;
                let byte = |x: f32| (128.0 + 127.0 * x) as u8;
                Buffer::Affine(Aligned::of(format.head_bytes(n), pages, byte)?, [scales, zeros], format)
            }
        };
        Ok(Self { buffer, shape, layout })
    }

    /// Keys or values of a cache.
    pub fn cache(&self) -> Result<CacheView<'_>> {
        match &self.buffer {
            Buffer::Int8(units, scales) => {
                let (strides, shape, scale_strides) = self.int8();
                let scales = View::strided(scales.as_slice(), 0, shape, scale_strides)?;
                CacheView::int8_strided(units.as_slice(), 0, self.shape, strides, scales)
            }
            Buffer::Fp8(units, format) => {
                let strides = self.layout.strides(self.shape);
                CacheView::fp8_strided(units.as_slice(), *format, 0, self.shape, strides)?.static_scales(&FP8_SCALE)
            }
            Buffer::Blocks(units, format) => {
                let strides = self.layout.unit_strides(self.shape, *format);
                CacheView::blocks_strided(units.as_slice(), *format, 0, self.shape, strides)
            }
            Buffer::Affine(units, [scales, zeros], format) => {
                let (_, shape, strides) = self.int8();
                let scales = AffineScales::fixed(View::strided(scales.as_slice(), 0, shape, strides)?);
                let scales = scales.zeros(View::strided(zeros.as_slice(), 0, shape, strides)?);
                let strides = self.layout.unit_strides(self.shape, *format);
                CacheView::affine_strided(units.as_slice(), *format, 0, self.shape, strides, AFFINE, scales)
            }
            Buffer::F32(_) | Buffer::F16(_) | Buffer::Bf16(_) => Ok(self.view()?.into()),
        }
    }

    /// As [`Self::cache`], to be written to.
    pub fn cache_mut(&mut self) -> Result<CacheViewMut<'_>> {
        let ((strides, shape, scale_strides), units_shape) = (self.int8(), self.shape);
        let layout = self.layout;
        match self.buffer {
            Buffer::Int8(ref mut units, ref mut scales) => {
                let scales = ViewMut::strided(scales.as_mut_slice(), 0, shape, scale_strides)?;
                CacheViewMut::int8_strided(units.as_mut_slice(), 0, units_shape, strides, scales)
            }
            Buffer::Fp8(ref mut units, format) => {
                let cache = CacheViewMut::fp8_strided(units.as_mut_slice(), format, 0, units_shape, strides)?;
                cache.static_scales(&FP8_SCALE)
            }
            Buffer::Blocks(ref mut units, format) => {
                let strides = layout.unit_strides(units_shape, format);
                CacheViewMut::blocks_strided(units.as_mut_slice(), format, 0, units_shape, strides)
            }
            Buffer::Affine(ref mut units, [ref mut scales, ref mut zeros], format) => {
                let scales = AffineScales::written(ViewMut::strided(scales.as_mut_slice(), 0, shape, scale_strides)?);
                let scales = scales.zeros(ViewMut::strided(zeros.as_mut_slice(), 0, shape, scale_strides)?);
                let strides = layout.unit_strides(units_shape, format);
                CacheViewMut::affine_strided(units.as_mut_slice(), format, 0, units_shape, strides, AFFINE, scales)
            }
            Buffer::F32(_) | Buffer::F16(_) | Buffer::Bf16(_) => Ok(self.view_mut()?.into()),
        }
    }

    /// Strides of the units, and shape and strides of the scales beside them.
    fn int8(&self) -> ([i64; 4], [usize; 4], [i64; 4]) {
        let [batch, seq, heads, _] = self.shape;
        let scales = [batch, seq, heads, 1];
        (self.layout.strides(self.shape), scales, self.layout.strides(scales))
    }

    pub fn view(&self) -> Result<View<'_>> {
        let (shape, strides) = (self.shape, self.layout.strides(self.shape));
        match &self.buffer {
            Buffer::F32(x) => View::strided(x.as_slice(), 0, shape, strides),
            Buffer::F16(x) => View::strided(x.as_slice(), 0, shape, strides),
            Buffer::Bf16(x) => View::strided(x.as_slice(), 0, shape, strides),
            Buffer::Int8(..) | Buffer::Fp8(..) | Buffer::Blocks(..) | Buffer::Affine(..) => Err(quantised()),
        }
    }

    pub fn view_mut(&mut self) -> Result<ViewMut<'_>> {
        let (shape, strides) = (self.shape, self.layout.strides(self.shape));
        match &mut self.buffer {
            Buffer::F32(x) => ViewMut::strided(x.as_mut_slice(), 0, shape, strides),
            Buffer::F16(x) => ViewMut::strided(x.as_mut_slice(), 0, shape, strides),
            Buffer::Bf16(x) => ViewMut::strided(x.as_mut_slice(), 0, shape, strides),
            Buffer::Int8(..) | Buffer::Fp8(..) | Buffer::Blocks(..) | Buffer::Affine(..) => Err(quantised()),
        }
    }
}

/// A number of either format of eight bits, at most 2, for a number from -1 to 1.
fn fp8_unit(x: f32) -> u8 {
    (64.0 * x.abs()) as u8 | if x < 0.0 { 0x80 } else { 0 }
}

/// Only a cache holds quantised units.
fn quantised() -> Error {
    Error::new(Status::Unsupported, "a tensor of quantised units is a cache")
}
