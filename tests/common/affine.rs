//! Caches of described integers, by their definition, which is compared with what the runtimes that have such caches have recorded.

use super::blocks::{CANARY, inner};
use super::int8::UnitMemory;
use super::rng::Rng;
use super::tensor::{Layout, Place, Tensor, indices};
use half::{bf16, f16};
use kvlane::{Affine, AffineScales, CacheFormat, CacheView, CacheViewMut, DType, Integers, Nibbles, ZeroPoints, Zeros};

/// The type of zero points.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ZeroType {
    Float(DType),
    U8,
    I8,
}

/// The elements that share a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Granularity {
    /// So many elements of a head of a token; all for 0.
    Group(usize),
    /// An element of a head, in so many slots.
    ChannelAndSlots(usize),
    /// So many elements of a head, or all for 0, in so many slots.
    GroupAndSlots(usize, usize),
    /// A head in so many slots, by a scale that is not written; for 0 an element in all slots of a sequence or page.
    Places(usize),
    /// An element of a head, whose scale is not written.
    Channel,
    /// All, by a scale that is not written.
    Tensor,
}

/// A description.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub format: CacheFormat,
    pub of: Affine,
    pub granularity: Granularity,
    pub scales: DType,
    pub zeros: Option<ZeroType>,
}

impl Kind {
    pub fn is_fixed(&self) -> bool {
        matches!(self.granularity, Granularity::Channel | Granularity::Tensor | Granularity::Places(_))
    }

    /// Any description of a cache of this shape whose tokens can be written one by one; or with so many slots that share scales.
    pub fn random(rng: &mut Rng, format: CacheFormat, dim: usize, slots: usize) -> Self {
        let halves = [dim, dim / 2, dim / 4, 1].into_iter();
        let even = |n: &usize| {
            *n > 0 && dim.is_multiple_of(*n) && (format == CacheFormat::Affine8 || n.is_multiple_of(2) || *n == 1)
        };
        let groups: Vec<usize> = halves.filter(even).collect();
        let granularity = match slots {
            0 => match rng.below(6) {
                0 => Granularity::Channel,
                1 => Granularity::Tensor,
                2 | 3 => Granularity::Group(rng.pick(&groups)),
                _ => Granularity::Group(0),
            },
            n => Granularity::ChannelAndSlots(n),
        };
        let zeros = rng.pick(&[Zeros::Point, Zeros::Minimum, Zeros::Shift]);
        let float = ZeroType::Float(rng.pick(&DType::ALL));
        let zero_type = match zeros {
            Zeros::Point => rng.pick(&[None, Some(float), Some(ZeroType::U8), Some(ZeroType::I8)]),
            _ => Some(float),
        };
        let integers = match zero_type {
            Some(ZeroType::U8) => Integers::Unsigned,
            Some(ZeroType::I8) | None => rng.pick(&[Integers::Signed, Integers::Offset]),
            _ => rng.pick(&[Integers::Unsigned, Integers::Signed, Integers::Offset]),
        };
        let nibbles = rng.pick(&[Nibbles::LowFirst, Nibbles::HighFirst]);
        let of = Affine::new(integers).nibbles(nibbles).zeros(zeros);
        Self { format, of, granularity, scales: rng.pick(&DType::ALL), zeros: zero_type }
    }

    /// Whether scales are of the same elements and types, for descriptions that are the same.
    pub fn same_as(&self, other: &Self) -> bool {
        let kinds = |kind: &Self| (kind.format, kind.granularity, kind.scales, kind.zeros);
        kinds(self) == kinds(other)
    }

    fn shares_tokens(&self) -> bool {
        matches!(self.granularity, Granularity::ChannelAndSlots(n) | Granularity::GroupAndSlots(_, n) if n > 1)
    }

    fn bits(&self) -> u32 {
        if self.format == CacheFormat::Affine8 { 8 } else { 4 }
    }

    /// The least integer, and how many are above it.
    fn range(&self) -> (f32, f32) {
        let levels = if self.bits() == 8 { 255.0 } else { 15.0 };
        (if self.of.integers == Integers::Unsigned { 0.0 } else { -f32::ceil(levels / 2.0) }, levels)
    }

    /// The shape of the scales of a cache.
    fn shape(&self, [batch, seq, heads, dim]: [usize; 4]) -> [usize; 4] {
        match self.granularity {
            Granularity::Group(0) => [batch, seq, heads, 1],
            Granularity::Group(n) => [batch, seq, heads, dim / n],
            Granularity::ChannelAndSlots(n) => [batch, seq / n, heads, dim],
            Granularity::GroupAndSlots(0, n) => [batch, seq / n, heads, 1],
            Granularity::GroupAndSlots(group, n) => [batch, seq / n, heads, dim / group],
            Granularity::Places(0) => [batch, 1, heads, dim],
            Granularity::Places(n) => [batch, seq / n, heads, 1],
            Granularity::Channel => [1, 1, heads, dim],
            Granularity::Tensor => [1; 4],
        }
    }

    /// The element of an integer.
    fn element(&self, q: f32, scale: f32, zero: f32) -> f32 {
        match (self.zeros, self.of.zeros) {
            (None, _) => q * scale,
            (_, Zeros::Point) => (q - zero) * scale,
            (_, Zeros::Minimum) => q * scale + zero,
            (_, _) => q * scale - zero,
        }
    }

    /// The scale and the zero point of elements, neither rounded to its type; the zero point is that of the rounded scale.
    fn parameters(&self, x: &[f32], stored: impl Fn(f32) -> f32) -> (f32, f32) {
        let (low, levels) = self.range();
        if x.iter().any(|x| !x.is_finite()) {
            return (f32::NAN, f32::NAN);
        }
        let (mut least, mut most) =
            x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
        if matches!(self.zeros, Some(ZeroType::U8 | ZeroType::I8)) {
            (least, most) = (least.min(0.0), most.max(0.0));
        }
        // No negative zeros.
        (least, most) = (least + 0.0, most + 0.0);
        let mut scale = match self.zeros {
            None => most.abs().max(least.abs()) / (low + levels),
            Some(ZeroType::Float(_)) if self.of.zeros == Zeros::Point && self.shares_tokens() => {
                (most - least) * (1.0 / levels)
            }
            Some(_) => (most - least) / levels,
        };
        if !stored(scale).is_finite() {
            return (f32::NAN, f32::NAN);
        }
        let floats = matches!(self.zeros, Some(ZeroType::Float(_)));
        if stored(scale) == 0.0 && floats && self.of.zeros == Zeros::Point {
            scale = 1e-4;
        }
        let s = stored(scale);
        let zero = match self.of.zeros {
            Zeros::Point if floats => low - least / s,
            Zeros::Point if s == 0.0 => low,
            Zeros::Point => (low - least / s).clamp(low, low + levels).round_ties_even(),
            Zeros::Minimum if low == 0.0 => least,
            Zeros::Shift if low == 0.0 => -least,
            Zeros::Minimum => least - low * s,
            _ => -(least - low * s),
        };
        (scale, zero)
    }

    /// The integer next to an element.
    fn integer(&self, x: f32, scale: f32, zero: f32) -> f32 {
        let (low, levels) = self.range();
        let inverse = 1.0 / scale;
        let usable = inverse.is_finite();
        let product = if usable { x * inverse } else { 0.0 };
        let q = match (self.zeros, self.of.zeros) {
            (None, _) => product.round_ties_even(),
            (Some(ZeroType::Float(_)), Zeros::Point) => (product + zero).round_ties_even(),
            (_, Zeros::Point) => {
                // Cut off before it is rounded, so that nothing grows.
                product.clamp(-1e6, 1e6).round_ties_even() + zero
            }
            _ if !usable => 0.0,
            (_, Zeros::Minimum) => ((x - zero) / scale).round_ties_even(),
            _ => ((x + zero) / scale).round_ties_even(),
        };
        q.clamp(low, low + levels)
    }

    /// What lies in memory for an integer, and back.
    fn number(&self, q: f32) -> u8 {
        let half = 1 << (self.bits() - 1);
        match self.of.integers {
            Integers::Offset => (q as i32 + half) as u8,
            _ => (q as i32 & (2 * half - 1)) as u8,
        }
    }

    fn integer_of(&self, number: u8) -> f32 {
        let (half, number) = (1 << (self.bits() - 1), i32::from(number));
        let q = match self.of.integers {
            Integers::Offset => number - half,
            Integers::Signed if number >= half => number - 2 * half,
            _ => number,
        };
        q as f32
    }
}

/// A token as it is stored: by heads, its elements, the numbers in memory, and its scales with zero points.
pub struct Stored {
    pub elements: Vec<Vec<f32>>,
    pub numbers: Vec<Vec<u8>>,
    pub parameters: Vec<Vec<(f32, f32)>>,
}

/// Keys or values in described integers, with memory of their own.
pub struct Described {
    units: UnitMemory,
    pub shape: [usize; 4],
    pub kind: Kind,
    scales: Tensor,
    zeros: Option<Tensor>,
    integers: Vec<u8>,
}

impl Described {
    /// Every byte is a canary, and scales are 1. Strides are in units.
    pub fn new(kind: Kind, shape: [usize; 4], strides: [i64; 4], place: Place) -> Self {
        let ([batch, seq, heads, dim], of_scales) = (shape, kind.shape(shape));
        let units = [batch, seq, heads, dim / kind.format.unit_elements()];
        let units = UnitMemory::new(units, strides, place, CANARY);
        let parameters = |dtype| {
            let mut tensor = Tensor::output(dtype, of_scales, Layout::BSHD, place);
            tensor.fill(|_| 1.0);
            tensor
        };
        let zeros = match kind.zeros {
            Some(ZeroType::Float(dtype)) => Some(parameters(dtype)),
            _ => None,
        };
        let integers = vec![1; of_scales.iter().product()];
        Self { units, shape, kind, scales: parameters(kind.scales), zeros, integers }
    }

    pub fn output(kind: Kind, shape: [usize; 4], layout: Layout, place: Place) -> Self {
        Self::new(kind, shape, inner(shape, layout.strides(shape), kind.format.unit_elements()), place)
    }

    /// What quantising a tensor gives, with the order of the tensor's axes.
    pub fn of(tensor: &Tensor, kind: Kind, place: Place) -> Self {
        let strides = inner(tensor.shape, tensor.strides, kind.format.unit_elements());
        let mut cache = Self::new(kind, tensor.shape, strides, place);
        cache.quantise(&|at| tensor.get(at), &|_| true, true);
        cache
    }

    /// The scale of an element: its index.
    fn index(&self, at: [usize; 4]) -> [usize; 4] {
        let of = self.scales.shape;
        std::array::from_fn(|axis| at[axis] * of[axis] / self.shape[axis].max(1))
    }

    fn flat(&self, [b, s, h, d]: [usize; 4]) -> usize {
        let [_, seq, heads, dim] = self.scales.shape;
        ((b * seq + s) * heads + h) * dim + d
    }

    fn zero(&self, index: [usize; 4]) -> f32 {
        match (self.kind.zeros, &self.zeros) {
            (None, _) => 0.0,
            (Some(ZeroType::U8), _) => f32::from(self.integers[self.flat(index)]),
            (Some(ZeroType::I8), _) => f32::from(self.integers[self.flat(index)] as i8),
            (_, zeros) => zeros.as_ref().unwrap().get(index),
        }
    }

    fn set_zero(&mut self, index: [usize; 4], zero: f32) {
        let flat = self.flat(index);
        match (self.kind.zeros, &mut self.zeros) {
            (None, _) => {}
            (Some(ZeroType::U8), _) => self.integers[flat] = zero as u8,
            (Some(ZeroType::I8), _) => self.integers[flat] = zero as i8 as u8,
            (_, zeros) => {
                let zeros = zeros.as_mut().unwrap();
                let most = match zeros.dtype {
                    DType::F32 => f32::MAX,
                    DType::F16 => f16::MAX.to_f32(),
                    DType::Bf16 => bf16::MAX.to_f32(),
                };
                zeros.set(index, zero.clamp(-most, most));
            }
        }
    }

    /// Quantises the elements of tokens that `written` names; the scales that writes compute, and the others if `fixed`.
    pub fn quantise(&mut self, x: &dyn Fn([usize; 4]) -> f32, written: &dyn Fn([usize; 2]) -> bool, fixed: bool) {
        let kind = self.kind;
        let rounded = move |x: f32| match kind.scales {
            DType::F32 => x,
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::Bf16 => bf16::from_f32(x).to_f32(),
        };
        let all: Vec<[usize; 4]> = indices(self.shape).filter(|at| written([at[0], at[1]])).collect();
        if fixed || !kind.is_fixed() {
            let mut groups = std::collections::BTreeMap::<[usize; 4], Vec<f32>>::new();
            all.iter().for_each(|&at| groups.entry(self.index(at)).or_default().push(x(at)));
            for (index, elements) in groups {
                let (scale, zero) = kind.parameters(&elements, rounded);
                self.scales.set(index, scale);
                self.set_zero(index, zero);
            }
        }
        for at in all {
            let index = self.index(at);
            let (scale, zero) = (self.scales.get(index), self.zero(index));
            let number = if scale.is_nan() { 0 } else { kind.number(kind.integer(x(at), scale, zero)) };
            self.set_number(at, number);
        }
    }

    /// The scales that are not written are those of another cache of as many heads.
    pub fn set_fixed(&mut self, other: &Self) {
        if self.kind.is_fixed() {
            for index in indices(self.scales.shape) {
                self.scales.set(index, other.scales.get(index));
                self.set_zero(index, other.zero(index));
            }
        }
    }

    /// The bits of a head that holds these elements, with scales of their own or those that are not written.
    pub fn quantised_head(&self, elements: &[f32], head: usize) -> Vec<u32> {
        let [_, _, heads, dim] = self.shape;
        let mut one = Self::output(self.kind, [1, 1, heads, dim], Layout::BSHD, Place::Heap);
        one.set_fixed(self);
        one.quantise(&|at| if at[2] == head { elements[at[3]] } else { 0.0 }, &|_| true, false);
        one.head(0, 0, head)
    }

    fn place(&self, [b, s, h, d]: [usize; 4]) -> ([usize; 4], u32) {
        let per_unit = self.kind.format.unit_elements();
        let high = (d % 2 == 1) == (self.kind.of.nibbles == Nibbles::LowFirst);
        ([b, s, h, d / per_unit], if per_unit == 2 && high { 4 } else { 0 })
    }

    fn set_number(&mut self, at: [usize; 4], number: u8) {
        let (unit, shift) = self.place(at);
        let mask = (((1u32 << self.kind.bits()) - 1) as u8) << shift;
        let byte = self.units.get(unit) & !mask | number << shift;
        self.units.set(unit, byte);
    }

    pub fn get(&self, at: [usize; 4]) -> f32 {
        let index = self.index(at);
        self.kind.element(self.kind.integer_of(self.number_at(at)), self.scales.get(index), self.zero(index))
    }

    /// All bits of a head: units, scales and zero points.
    pub fn head(&self, b: usize, s: usize, h: usize) -> Vec<u32> {
        let dim = self.shape[3];
        let units = (0..dim / self.kind.format.unit_elements()).map(|d| u32::from(self.units.get([b, s, h, d])));
        let first = self.index([b, s, h, 0]);
        let parameters = (0..self.scales.shape[3]).flat_map(|g| {
            let index = [first[0], first[1], first[2], g];
            let bits = |x: f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            [bits(self.scales.get(index)), bits(self.zero(index))]
        });
        units.chain(parameters).collect()
    }

    /// Slots that share a scale.
    pub fn sharing(&self) -> usize {
        self.shape[1] / self.scales.shape[1]
    }

    /// Whether units and scales of the one can be those of the other.
    pub fn is_alike(&self, other: &Self) -> bool {
        let kinds = |cache: &Self| {
            let Kind { format, of, scales, zeros, .. } = cache.kind;
            (format, of, scales, zeros, cache.kind.is_fixed(), cache.scales.shape[3])
        };
        kinds(self) == kinds(other)
    }

    /// A token as it is stored.
    pub fn token(&self, [b, s]: [usize; 2]) -> Stored {
        let [.., heads, dim] = self.shape;
        let elements = (0..heads).map(|h| (0..dim).map(|d| self.get([b, s, h, d])).collect()).collect();
        let numbers = (0..heads).map(|h| (0..dim).map(|d| self.number_at([b, s, h, d])).collect()).collect();
        let parameters =
            |h: usize| self.indices([b, s], h).map(|index| (self.scales.get(index), self.zero(index))).collect();
        Stored { elements, numbers, parameters: (0..heads).map(parameters).collect() }
    }

    fn indices(&self, [b, s]: [usize; 2], h: usize) -> impl Iterator<Item = [usize; 4]> {
        let [i, j, k, _] = self.index([b, s, h, 0]);
        (0..self.scales.shape[3]).map(move |group| [i, j, k, group])
    }

    /// Stores the numbers of a head.
    pub fn put_numbers(&mut self, [b, s]: [usize; 2], h: usize, numbers: &[u8]) {
        numbers.iter().enumerate().for_each(|(d, &number)| self.set_number([b, s, h, d], number));
    }

    /// Stores the scales and zero points of all heads of a token.
    pub fn put_parameters(&mut self, at: [usize; 2], stored: &Stored) {
        for (h, parameters) in stored.parameters.iter().enumerate() {
            let indices: Vec<_> = self.indices(at, h).collect();
            for (index, &(scale, zero)) in indices.into_iter().zip(parameters) {
                self.scales.set(index, scale);
                self.set_zero(index, zero);
            }
        }
    }

    /// The same cache with strides of its own.
    pub fn copied(&self) -> Self {
        let mut copy = Self::output(self.kind, self.shape, Layout::BSHD, Place::Heap);
        for at in indices(self.shape) {
            copy.set_number(at, self.number_at(at));
        }
        for index in indices(self.scales.shape) {
            copy.scales.set(index, self.scales.get(index));
            copy.set_zero(index, self.zero(index));
        }
        copy
    }

    /// Scales of slots without tokens become NaN, if they are written.
    pub fn poison(&mut self, live: &dyn Fn([usize; 2]) -> bool) {
        let shared = self.sharing();
        for index in indices(self.scales.shape) {
            let [b, block, ..] = index;
            if !self.kind.is_fixed() && !(0..shared).any(|i| live([b, block * shared + i])) {
                self.scales.set(index, f32::NAN);
            }
        }
    }

    /// Some scales that are not written become those of the first place.
    pub fn repeat_places(&mut self, rng: &mut Rng) {
        for index in indices(self.scales.shape) {
            if self.kind.is_fixed() && rng.chance(0.5) {
                let first = [0, 0, index[2], index[3]];
                self.scales.set(index, self.scales.get(first));
                self.set_zero(index, self.zero(first));
            }
        }
    }

    fn number_at(&self, at: [usize; 4]) -> u8 {
        let (unit, shift) = self.place(at);
        self.units.get(unit) >> shift & ((1u32 << self.kind.bits()) - 1) as u8
    }

    pub fn view(&self) -> CacheView<'_> {
        let Self { units, shape, kind, scales, zeros, integers } = self;
        let of_scales = AffineScales::fixed(scales.view());
        let of_scales = match kind.zeros {
            None => of_scales,
            Some(ZeroType::U8) => of_scales.zeros(ZeroPoints::u8(integers, scales.shape).unwrap()),
            Some(ZeroType::I8) => {
                // SAFETY: bytes of either sign are bytes.
                let integers = unsafe { std::slice::from_raw_parts(integers.as_ptr().cast(), integers.len()) };
                of_scales.zeros(ZeroPoints::i8(integers, scales.shape).unwrap())
            }
            Some(ZeroType::Float(_)) => of_scales.zeros(zeros.as_ref().unwrap().view()),
        };
        CacheView::affine_strided(units.bytes(), kind.format, units.offset, *shape, units.strides, kind.of, of_scales)
            .expect("a view of a cache's own memory")
    }

    pub fn view_mut(&mut self) -> CacheViewMut<'_> {
        let Self { units, shape, kind, scales, zeros, integers } = self;
        let shape_of_scales = scales.shape;
        let of_scales =
            if kind.is_fixed() { AffineScales::fixed(scales.view()) } else { AffineScales::written(scales.view_mut()) };
        let of_scales = match kind.zeros {
            None => of_scales,
            Some(ZeroType::U8) => of_scales.zeros(ZeroPoints::u8_mut(integers, shape_of_scales).unwrap()),
            Some(ZeroType::I8) => {
                // SAFETY: bytes of either sign are bytes.
                let integers = unsafe { std::slice::from_raw_parts_mut(integers.as_mut_ptr().cast(), integers.len()) };
                of_scales.zeros(ZeroPoints::i8_mut(integers, shape_of_scales).unwrap())
            }
            Some(ZeroType::Float(_)) if kind.is_fixed() => of_scales.zeros(zeros.as_ref().unwrap().view()),
            Some(ZeroType::Float(_)) => of_scales.zeros(zeros.as_mut().unwrap().view_mut()),
        };
        let (offset, strides) = (units.offset, units.strides);
        CacheViewMut::affine_strided(units.bytes_mut(), kind.format, offset, *shape, strides, kind.of, of_scales)
            .expect("a view of a cache's own memory")
    }

    /// Panics if memory between units has changed.
    #[track_caller]
    pub fn assert_gaps(&self) {
        self.units.assert_gaps();
    }
}
