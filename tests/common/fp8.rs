//! Caches of eight-bit floats, by their definition, and quantised caches of any format.

use super::affine::{Described, Kind};
use super::blocks::Blocks;
pub use super::blocks::CANARY;
use super::int8::{Int8, UnitMemory};
use super::rng::Rng;
use super::tensor::{Layout, Place, Tensor, indices};
use half::f16;
use kvlane::{CacheFormat, CacheView, CacheViewMut, DType};
use std::sync::LazyLock;

/// Bits of the fraction and bias of the exponent.
fn fields(format: CacheFormat) -> (u32, i32) {
    match format {
        CacheFormat::Fp8E4m3 => (3, 7),
        CacheFormat::Fp8E5m2 => (2, 15),
        other => panic!("{other} has more than eight bits"),
    }
}

/// The number that a unit stands for.
pub fn number(format: CacheFormat, unit: u8) -> f64 {
    let (bits, bias) = fields(format);
    let (exponent, fraction) = (i32::from(unit & 0x7f) >> bits, f64::from(unit & ((1 << bits) - 1)));
    let share = fraction / f64::from(1 << bits);
    let magnitude = match (format, unit & 0x7f) {
        (CacheFormat::Fp8E4m3, 0x7f) | (CacheFormat::Fp8E5m2, 0x7d..=0x7f) => f64::NAN,
        (CacheFormat::Fp8E5m2, 0x7c) => f64::INFINITY,
        _ if exponent == 0 => share * 2f64.powi(1 - bias),
        _ => (1.0 + share) * 2f64.powi(exponent - bias),
    };
    if unit & 0x80 == 0 { magnitude } else { -magnitude }
}

/// The numbers of the units from 0 up to the largest finite one, which ascend.
static MAGNITUDES: LazyLock<[Vec<f64>; 2]> = LazyLock::new(|| {
    [CacheFormat::Fp8E4m3, CacheFormat::Fp8E5m2]
        .map(|format| (0..=0x7e).map(|unit| number(format, unit)).take_while(|x| x.is_finite()).collect())
});

/// The finite magnitudes of a format, by their units.
pub fn magnitudes(format: CacheFormat) -> &'static [f64] {
    &MAGNITUDES[usize::from(format == CacheFormat::Fp8E5m2)]
}

/// The unit next to a number, of two at the same distance the even one; beyond the largest, that.
pub fn nearest(format: CacheFormat, x: f64) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    let (all, sign) = (magnitudes(format), if x.is_sign_negative() { 0x80 } else { 0 });
    let above = all.partition_point(|&magnitude| magnitude < x.abs());
    let unit = if above == 0 {
        0
    } else if above == all.len() {
        above - 1
    } else {
        let (down, up) = (x.abs() - all[above - 1], all[above] - x.abs());
        if down < up || down == up && above % 2 == 1 { above - 1 } else { above }
    };
    unit as u8 | sign
}

/// The units of a head.
pub fn quantise(format: CacheFormat, head: &[f32], scale: f32) -> Vec<u8> {
    head.iter().map(|&x| nearest(format, f64::from(x / scale))).collect()
}

/// Static scales.
#[derive(Clone, Debug)]
pub enum Scales {
    None,
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Scales {
    /// Every kind, for some heads: none, one, one per head.
    pub fn kinds(heads: usize) -> [Self; 4] {
        let of = |h: usize| [0.5f32, 1.25, 0.37, 3.0][h % 4];
        [
            Self::None,
            Self::F32(vec![0.37]),
            Self::F32((0..heads).map(of).collect()),
            Self::F16((0..heads).map(|h| f16::from_f32(of(h + 1))).collect()),
        ]
    }

    pub fn of(&self, head: usize) -> f32 {
        match self {
            Self::None => 1.0,
            Self::F32(scales) => scales[head % scales.len()],
            Self::F16(scales) => scales[head % scales.len()].to_f32(),
        }
    }
}

/// Keys or values in an eight-bit float, with memory of their own.
pub struct Fp8 {
    units: UnitMemory,
    pub shape: [usize; 4],
    pub format: CacheFormat,
    pub scales: Scales,
}

impl Fp8 {
    /// Every unit is a canary.
    pub fn new(format: CacheFormat, shape: [usize; 4], strides: [i64; 4], place: Place, scales: Scales) -> Self {
        Self { units: UnitMemory::new(shape, strides, place, CANARY), shape, format, scales }
    }

    pub fn output(format: CacheFormat, shape: [usize; 4], layout: Layout, place: Place, scales: Scales) -> Self {
        Self::new(format, shape, layout.strides(shape), place, scales)
    }

    /// What quantising a tensor gives, with the strides of the tensor. What is not finite becomes a unit that is not.
    pub fn of(tensor: &Tensor, format: CacheFormat, scales: Scales, place: Place) -> Self {
        let mut cache = Self::new(format, tensor.shape, tensor.strides, place, scales);
        for at in indices(tensor.shape) {
            let x = tensor.get(at);
            let unit = match format {
                CacheFormat::Fp8E5m2 if x.is_infinite() => 0x7c | nearest(format, x.into()) & 0x80,
                _ if !x.is_finite() => [0x7f, 0xff][at[1] % 2],
                _ => nearest(format, f64::from(x / cache.scales.of(at[2]))),
            };
            cache.set_unit(at, unit);
        }
        cache
    }

    pub fn unit(&self, at: [usize; 4]) -> u8 {
        self.units.get(at)
    }

    pub fn set_unit(&mut self, at: [usize; 4], unit: u8) {
        self.units.set(at, unit);
    }

    /// The units of a head.
    pub fn head(&self, b: usize, s: usize, h: usize) -> Vec<u8> {
        (0..self.shape[3]).map(|d| self.unit([b, s, h, d])).collect()
    }

    /// A unit times its scale.
    pub fn get(&self, at: [usize; 4]) -> f64 {
        number(self.format, self.unit(at)) * f64::from(self.scales.of(at[2]))
    }

    pub fn view(&self) -> CacheView<'_> {
        let view =
            CacheView::fp8_strided(self.units.bytes(), self.format, self.units.offset, self.shape, self.units.strides);
        let view = view.expect("a view of a cache's own memory");
        match &self.scales {
            Scales::None => view,
            Scales::F32(scales) => view.static_scales(scales).expect("a scale, or one per head"),
            Scales::F16(scales) => view.static_scales(scales).expect("a scale, or one per head"),
        }
    }

    pub fn view_mut(&mut self) -> CacheViewMut<'_> {
        let Self { units, shape, format, scales } = self;
        let (offset, strides) = (units.offset, units.strides);
        let view = CacheViewMut::fp8_strided(units.bytes_mut(), *format, offset, *shape, strides);
        let view = view.expect("a view of a cache's own memory");
        match scales {
            Scales::None => view,
            Scales::F32(scales) => view.static_scales(scales).expect("a scale, or one per head"),
            Scales::F16(scales) => view.static_scales(scales).expect("a scale, or one per head"),
        }
    }

    /// Panics if memory between units has changed.
    #[track_caller]
    pub fn assert_gaps(&self) {
        self.units.assert_gaps();
    }
}

/// Keys or values in a quantised format.
pub enum Quantised {
    Int8(Int8),
    Fp8(Fp8),
    Blocks(Blocks),
    Described(Box<Described>),
}

impl Quantised {
    /// What quantising a tensor gives. Scales are f32 for even head sizes, else f16; static ones are 1 for even head sizes.
    pub fn of(tensor: &Tensor, format: CacheFormat, place: Place) -> Self {
        let even = tensor.shape[3].is_multiple_of(2);
        match format {
            CacheFormat::Int8 => Self::Int8(Int8::of(tensor, if even { DType::F32 } else { DType::F16 }, place)),
            _ if format.is_affine() => {
                // Another description for every shape.
                let seed = tensor.shape.iter().fold(0, |seed, &n| 31 * seed + n as u64);
                let kind = Kind::random(&mut Rng::new(seed), format, tensor.shape[3], 0);
                Self::Described(Box::new(Described::of(tensor, kind, place)))
            }
            _ if format.is_blocks() => Self::Blocks(Blocks::of(tensor, format, place)),
            _ => {
                let scales = Scales::kinds(tensor.shape[2])[if even { 0 } else { 3 }].clone();
                Self::Fp8(Fp8::of(tensor, format, scales, place))
            }
        }
    }

    pub fn format(&self) -> CacheFormat {
        match self {
            Self::Int8(_) => CacheFormat::Int8,
            Self::Fp8(cache) => cache.format,
            Self::Blocks(cache) => cache.format,
            Self::Described(cache) => cache.kind.format,
        }
    }

    /// A unit times its scale.
    pub fn get(&self, at: [usize; 4]) -> f64 {
        match self {
            Self::Int8(cache) => f64::from(cache.unit(at)) * f64::from(cache.scales.get([at[0], at[1], at[2], 0])),
            Self::Fp8(cache) => cache.get(at),
            Self::Blocks(cache) => cache.get(at).into(),
            Self::Described(cache) => cache.get(at).into(),
        }
    }

    pub fn view(&self) -> CacheView<'_> {
        match self {
            Self::Int8(cache) => cache.view(),
            Self::Fp8(cache) => cache.view(),
            Self::Blocks(cache) => cache.view(),
            Self::Described(cache) => cache.view(),
        }
    }

    pub fn view_mut(&mut self) -> CacheViewMut<'_> {
        match self {
            Self::Int8(cache) => cache.view_mut(),
            Self::Fp8(cache) => cache.view_mut(),
            Self::Blocks(cache) => cache.view_mut(),
            Self::Described(cache) => cache.view_mut(),
        }
    }
}
