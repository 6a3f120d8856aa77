//! Int8 caches, by their definition: one scale per head of a token.

use super::memory::Memory;
use super::tensor::{Layout, Place, Tensor, indices};
use half::f16;
use kvlane::{CacheView, CacheViewMut, DType};

/// f16 to nearest, ties to even, for numbers from 0 to 65504.
fn nearest_f16(x: f64) -> f64 {
    let exponent = ((x.to_bits() >> 52) as i32 - 1023).max(-14);
    let step = 2f64.powi(exponent - 10);
    (x / step).round_ties_even() * step
}

/// The units of a head and its scale.
pub fn quantise(head: &[f32], scales: DType) -> (Vec<i8>, f32) {
    if head.iter().any(|x| !x.is_finite()) {
        return (vec![0; head.len()], f32::NAN);
    }
    let largest = head.iter().fold(0f32, |a, x| a.max(x.abs()));
    if largest == 0.0 {
        return (vec![0; head.len()], 0.0);
    }
    let nearest = largest / 127.0;
    // Subnormal scales are rounded up, to a multiple of the smallest.
    let up = |x: f64, least: f64| ((x / least).ceil() * least) as f32;
    let scale = match scales {
        DType::F32 if nearest < f32::MIN_POSITIVE => up(f64::from(largest) / 127.0, f64::from(f32::from_bits(1))),
        DType::F32 => nearest,
        DType::F16 if nearest < 2f32.powi(-14) => up(f64::from(nearest), 2f64.powi(-24)).max(2f32.powi(-24)),
        DType::F16 => nearest_f16(f64::from(nearest.min(65504.0))) as f32,
        DType::Bf16 => panic!("scales are f32 or f16"),
    };
    let units = head.iter().map(|&x| (x / scale).clamp(-127.0, 127.0).round_ties_even() as i8).collect();
    (units, scale)
}

/// Units with strides, in memory of their own, of which every byte is a canary at first.
pub struct UnitMemory {
    memory: Memory,
    /// Bytes per unit.
    size: usize,
    pub offset: usize,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    canary: u8,
}

impl UnitMemory {
    /// Units of a byte.
    pub fn new(shape: [usize; 4], strides: [i64; 4], place: Place, canary: u8) -> Self {
        Self::sized(1, shape, strides, place, canary)
    }

    /// The shape, in units, and strides of units of `size` bytes.
    pub fn sized(size: usize, shape: [usize; 4], strides: [i64; 4], place: Place, canary: u8) -> Self {
        let (mut low, mut high) = (0i64, 0i64);
        for axis in 0..if shape.contains(&0) { 0 } else { 4 } {
            let reach = (shape[axis] as i64 - 1) * strides[axis];
            if reach < 0 { low += reach } else { high += reach }
        }
        let slack = if place == Place::Heap { 5 } else { 0 };
        let elements = if shape.contains(&0) { 0 } else { (high - low) as usize + 1 } + 2 * slack;
        let mut memory = Memory::new(elements * size, place);
        memory.bytes_mut().fill(canary);
        Self { memory, size, offset: (-low) as usize + slack, shape, strides, canary }
    }

    pub fn bytes(&self) -> &[u8] {
        self.memory.bytes()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.bytes_mut()
    }

    fn index(&self, at: [usize; 4]) -> usize {
        let steps: i64 = (0..4).map(|axis| at[axis] as i64 * self.strides[axis]).sum();
        (self.offset as i64 + steps) as usize
    }

    pub fn unit(&self, at: [usize; 4]) -> &[u8] {
        let first = self.index(at) * self.size;
        &self.bytes()[first..first + self.size]
    }

    pub fn unit_mut(&mut self, at: [usize; 4]) -> &mut [u8] {
        let (first, size) = (self.index(at) * self.size, self.size);
        &mut self.bytes_mut()[first..first + size]
    }

    /// The first byte of a unit.
    pub fn get(&self, at: [usize; 4]) -> u8 {
        self.unit(at)[0]
    }

    pub fn set(&mut self, at: [usize; 4], unit: u8) {
        self.unit_mut(at)[0] = unit;
    }

    /// Panics if memory between units has changed.
    #[track_caller]
    pub fn assert_gaps(&self) {
        let mut gap = vec![true; self.bytes().len()];
        indices(self.shape).for_each(|at| {
            let first = self.index(at) * self.size;
            gap[first..first + self.size].fill(false);
        });
        for (at, _) in gap.iter().enumerate().filter(|(_, gap)| **gap) {
            assert_eq!(self.bytes()[at], self.canary, "byte {at} of the memory lies in no view and was written");
        }
    }
}

/// Keys or values in int8, with memory of their own.
pub struct Int8 {
    units: UnitMemory,
    pub shape: [usize; 4],
    pub scales: Tensor,
}

/// The shape of the scales beside units.
pub fn scale_shape([batch, seq, heads, _]: [usize; 4]) -> [usize; 4] {
    [batch, seq, heads, 1]
}

/// A unit that no operation writes: -128.
pub const CANARY: u8 = 0x80;

impl Int8 {
    /// Every unit is a canary, every scale the element that `scales` has.
    pub fn new(shape: [usize; 4], strides: [i64; 4], place: Place, scales: Tensor) -> Self {
        Self { units: UnitMemory::new(shape, strides, place, CANARY), shape, scales }
    }

    /// An empty cache to write to.
    pub fn output(shape: [usize; 4], layout: Layout, scales: DType, scale_layout: Layout, place: Place) -> Self {
        let scales = Tensor::output(scales, scale_shape(shape), scale_layout, place);
        Self::new(shape, layout.strides(shape), place, scales)
    }

    /// What quantising a tensor gives, with the strides of the tensor.
    pub fn of(tensor: &Tensor, scales: DType, place: Place) -> Self {
        let shape = scale_shape(tensor.shape);
        let mut strides = Layout { pad: [0, 3, 1, 0], ..Layout::BSHD }.strides(shape);
        // Axes that the tensor broadcasts are broadcast.
        (0..3).filter(|&axis| tensor.strides[axis] == 0).for_each(|axis| strides[axis] = 0);
        let scales = Tensor::strided(scales, shape, strides, place, tensor.gaps);
        let mut cache = Self::new(tensor.shape, tensor.strides, place, scales);
        let heads = scale_shape(tensor.shape);
        for at in indices(heads) {
            let [b, s, h, _] = at;
            let head: Vec<f32> = (0..tensor.shape[3]).map(|d| tensor.get([b, s, h, d])).collect();
            let (mut units, mut scale) = quantise(&head, cache.scales.dtype);
            if scale.is_nan() && head.iter().any(|x| x.is_infinite()) {
                // A slot that is not read may hold anything; the quantiser itself writes no infinite scale.
                scale = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][(b + s + h) % 3];
                units.iter_mut().enumerate().for_each(|(d, unit)| *unit = if d % 3 == 0 { 0 } else { 77 });
            }
            cache.scales.set(at, scale);
            units.into_iter().enumerate().for_each(|(d, unit)| cache.set_unit([b, s, h, d], unit));
        }
        cache
    }

    pub fn unit(&self, at: [usize; 4]) -> i8 {
        self.units.get(at) as i8
    }

    pub fn set_unit(&mut self, at: [usize; 4], unit: i8) {
        self.units.set(at, unit as u8);
    }

    /// A unit times its scale.
    pub fn get(&self, at: [usize; 4]) -> f32 {
        f32::from(self.unit(at)) * self.scales.get([at[0], at[1], at[2], 0])
    }

    /// Units and the scale's bits of a head.
    pub fn head(&self, b: usize, s: usize, h: usize) -> (Vec<i8>, u32) {
        ((0..self.shape[3]).map(|d| self.unit([b, s, h, d])).collect(), self.scales.bits([b, s, h, 0]))
    }

    pub fn view(&self) -> CacheView<'_> {
        // SAFETY: plain bytes.
        let units = unsafe { std::slice::from_raw_parts(self.units.bytes().as_ptr().cast(), self.units.bytes().len()) };
        CacheView::int8_strided(units, self.units.offset, self.shape, self.units.strides, self.scales.view())
            .expect("a view of a cache's own memory")
    }

    pub fn view_mut(&mut self) -> CacheViewMut<'_> {
        let (offset, strides) = (self.units.offset, self.units.strides);
        let bytes = self.units.bytes_mut();
        // SAFETY: plain bytes, borrowed exclusively.
        let units = unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len()) };
        CacheViewMut::int8_strided(units, offset, self.shape, strides, self.scales.view_mut())
            .expect("a view of a cache's own memory")
    }

    /// Panics if memory between units or between scales has changed.
    #[track_caller]
    pub fn assert_gaps(&self) {
        self.units.assert_gaps();
        self.scales.assert_gaps();
    }

    /// The bits of a scale as they are stored.
    pub fn scale_bits(&self, scale: f32) -> u32 {
        match self.scales.dtype {
            DType::F32 => scale.to_bits(),
            DType::F16 => f16::from_f32(scale).to_bits().into(),
            DType::Bf16 => panic!("scales are f32 or f16"),
        }
    }
}
