//! Tensors of any type and strides, with poison or a canary in their gaps.

use super::fp8::Quantised;
use super::memory::Memory;
pub use super::memory::Place;
use super::rng::Rng;
use half::{bf16, f16};
use kvlane::{CacheFormat, DType, View, ViewMut};
use std::sync::OnceLock;

/// `[batch, seq, heads, dim]` numbers in the order of the axes, for the oracle.
#[derive(Clone, Debug)]
pub struct Array {
    pub shape: [usize; 4],
    pub data: Vec<f64>,
}

impl Array {
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self { shape, data: vec![0.0; shape.iter().product()] }
    }

    /// The elements `[b, s, h, ..]`.
    pub fn row(&self, b: usize, s: usize, h: usize) -> &[f64] {
        let [_, ns, nh, nd] = self.shape;
        let at = ((b * ns + s) * nh + h) * nd;
        &self.data[at..at + nd]
    }

    pub fn row_mut(&mut self, b: usize, s: usize, h: usize) -> &mut [f64] {
        let [_, ns, nh, nd] = self.shape;
        let at = ((b * ns + s) * nh + h) * nd;
        &mut self.data[at..at + nd]
    }
}

/// The order of the axes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Axes from the outermost to the innermost.
    pub order: [usize; 4],
    /// Elements left free per step of each axis.
    pub pad: [usize; 4],
    /// Whether an axis runs backwards.
    pub backwards: [bool; 4],
}

impl Layout {
    pub const BSHD: Self = Self { order: [0, 1, 2, 3], pad: [0; 4], backwards: [false; 4] };
    pub const BHSD: Self = Self { order: [0, 2, 1, 3], ..Self::BSHD };
    /// Q, K or V in a fused buffer, or a shard of the heads: a token takes more space than its own heads.
    pub const FUSED: Self = Self { pad: [0, 40, 0, 0], ..Self::BSHD };
    /// Every row padded by an odd number, so that alignment is that of an element only.
    pub const PADDED: Self = Self { pad: [1, 7, 3, 0], ..Self::BSHD };
    /// Every other element.
    pub const STEP2: Self = Self { pad: [0, 0, 0, 1], ..Self::BSHD };
    /// The last token first, the last head first.
    pub const BACKWARDS: Self = Self { backwards: [true, true, true, false], ..Self::BSHD };
    /// Transposed: `dim` is not the innermost axis.
    pub const DIM_OUTSIDE: Self = Self { order: [3, 0, 2, 1], ..Self::BSHD };
    pub const ALL: [Self; 7] = [
        Self::BSHD,
        Self::BHSD,
        Self::FUSED,
        Self::PADDED,
        Self::STEP2,
        Self { backwards: [true; 4], ..Self::BSHD },
        Self::DIM_OUTSIDE,
    ];

    pub fn random(rng: &mut Rng) -> Self {
        let mut layout = Self { order: if rng.chance(0.5) { [0, 1, 2, 3] } else { [0, 2, 1, 3] }, ..Self::BSHD };
        if rng.chance(0.15) {
            for i in (1..4).rev() {
                layout.order.swap(i, rng.below(i + 1));
            }
        }
        for axis in 0..4 {
            if rng.chance(if axis == 3 { 0.15 } else { 0.4 }) {
                layout.pad[axis] = rng.between(1, 20);
            }
            layout.backwards[axis] = rng.chance(0.1);
        }
        layout
    }

    pub fn strides(&self, shape: [usize; 4]) -> [i64; 4] {
        let mut strides = [0i64; 4];
        let mut step = 1;
        for &axis in self.order.iter().rev() {
            strides[axis] = (step + self.pad[axis]) as i64;
            step = (step + self.pad[axis]) * shape[axis].max(1);
            if self.backwards[axis] {
                strides[axis] = -strides[axis];
            }
        }
        strides
    }
}

/// The contents of memory between elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// NaN and infinities, which reach the result of a kernel that reads too much.
    Poison,
    /// A pattern, which a kernel that writes too much destroys.
    Canary,
}

/// A tensor with its own memory.
pub struct Tensor {
    pub dtype: DType,
    pub shape: [usize; 4],
    pub strides: [i64; 4],
    pub gaps: Gaps,
    place: Place,
    /// The same numbers in a quantised format, once they were asked for.
    quantised: OnceLock<Box<Quantised>>,
    /// Where element `[0, 0, 0, 0]` is.
    offset: usize,
    memory: Memory,
}

const CANARY: u32 = 0xa5a5_a5a5;

impl Tensor {
    /// All elements and gaps are poison.
    pub fn input(dtype: DType, shape: [usize; 4], layout: Layout, place: Place) -> Self {
        Self::strided(dtype, shape, layout.strides(shape), place, Gaps::Poison)
    }

    /// Random elements.
    pub fn random(rng: &mut Rng, dtype: DType, shape: [usize; 4], layout: Layout, place: Place) -> Self {
        let mut tensor = Self::input(dtype, shape, layout, place);
        tensor.fill(|_| rng.f32());
        tensor
    }

    /// All elements and gaps are a canary.
    pub fn output(dtype: DType, shape: [usize; 4], layout: Layout, place: Place) -> Self {
        Self::strided(dtype, shape, layout.strides(shape), place, Gaps::Canary)
    }

    /// Strides of an input may be 0.
    pub fn strided(dtype: DType, shape: [usize; 4], strides: [i64; 4], place: Place, gaps: Gaps) -> Self {
        let (mut low, mut high) = (0i64, 0i64);
        // A tensor without elements needs no memory.
        for axis in 0..if shape.contains(&0) { 0 } else { 4 } {
            let reach = (shape[axis] as i64 - 1) * strides[axis];
            if reach < 0 { low += reach } else { high += reach }
        }
        // With a guard page, the memory ends where the tensor ends; on the heap, an odd number of elements surrounds
        // it.
        let slack = if place == Place::Heap { 5 } else { 0 };
        let elements = if shape.contains(&0) { 0 } else { (high - low) as usize + 1 } + 2 * slack;
        let memory = Memory::new(elements * dtype.size(), place);
        let (offset, quantised) = ((-low) as usize + slack, OnceLock::new());
        let mut tensor = Self { dtype, shape, strides, gaps, place, quantised, offset, memory };
        let pattern: Vec<u8> =
            (0..4).flat_map(|at| tensor.gap_bits(at).to_le_bytes()[..dtype.size()].to_vec()).collect();
        for bytes in tensor.memory.bytes_mut().chunks_mut(pattern.len()) {
            bytes.copy_from_slice(&pattern[..bytes.len()]);
        }
        tensor
    }

    fn gap_bits(&self, at: usize) -> u32 {
        match (self.gaps, self.dtype) {
            (Gaps::Canary, _) => CANARY,
            (Gaps::Poison, DType::F32) => [0x7fc0_0000, 0x7f80_0000, 0xff80_0000, 0x7f80_0001][at % 4],
            (Gaps::Poison, DType::F16) => [0x7e00, 0x7c00, 0xfc00, 0x7c01][at % 4],
            (Gaps::Poison, _) => [0x7fc0, 0x7f80, 0xff80, 0x7f81][at % 4],
        }
    }

    fn set_bits(&mut self, at: usize, bits: u32) {
        if self.quantised.get().is_some() {
            self.quantised.take();
        }
        match self.dtype {
            DType::F32 => self.memory.bytes_mut().as_chunks_mut().0[at] = bits.to_le_bytes(),
            _ => self.memory.bytes_mut().as_chunks_mut().0[at] = (bits as u16).to_le_bytes(),
        }
    }

    fn index(&self, at: [usize; 4]) -> usize {
        let steps: i64 = (0..4).map(|axis| at[axis] as i64 * self.strides[axis]).sum();
        (self.offset as i64 + steps) as usize
    }

    /// The bit pattern of an element, in the low bits.
    pub fn bits(&self, at: [usize; 4]) -> u32 {
        let i = self.index(at);
        match self.dtype {
            DType::F32 => u32::from_le_bytes(self.memory.bytes().as_chunks().0[i]),
            _ => u16::from_le_bytes(self.memory.bytes().as_chunks().0[i]).into(),
        }
    }

    pub fn get(&self, at: [usize; 4]) -> f32 {
        let bits = self.bits(at);
        match self.dtype {
            DType::F32 => f32::from_bits(bits),
            DType::F16 => f16::from_bits(bits as u16).to_f32(),
            DType::Bf16 => bf16::from_bits(bits as u16).to_f32(),
        }
    }

    /// Sets an element to the nearest value of the type.
    pub fn set(&mut self, at: [usize; 4], x: f32) {
        let bits = match self.dtype {
            DType::F32 => x.to_bits(),
            DType::F16 => u32::from(f16::from_f32(x).to_bits()),
            DType::Bf16 => u32::from(bf16::from_f32(x).to_bits()),
        };
        self.set_element_bits(at, bits);
    }

    pub fn set_element_bits(&mut self, at: [usize; 4], bits: u32) {
        self.set_bits(self.index(at), bits);
    }

    pub fn fill(&mut self, mut value: impl FnMut([usize; 4]) -> f32) {
        for at in indices(self.shape) {
            self.set(at, value(at));
        }
    }

    /// Poisons all elements of token `s` of row `b`.
    pub fn poison_token(&mut self, b: usize, s: usize) {
        for h in 0..self.shape[2] {
            for d in 0..self.shape[3] {
                let at = self.index([b, s, h, d]);
                self.set_bits(at, poison(self.dtype, at));
            }
        }
    }

    /// The elements, exactly.
    pub fn array(&self) -> Array {
        Array { shape: self.shape, data: indices(self.shape).map(|at| f64::from(self.get(at))).collect() }
    }

    /// The bit patterns of the elements, in the order of the axes.
    pub fn all_bits(&self) -> Vec<u32> {
        indices(self.shape).map(|at| self.bits(at)).collect()
    }

    /// The same elements in another layout.
    pub fn to(&self, layout: Layout, place: Place) -> Self {
        let mut other = Self::strided(self.dtype, self.shape, layout.strides(self.shape), place, self.gaps);
        for at in indices(self.shape) {
            other.set_element_bits(at, self.bits(at));
        }
        other
    }

    /// A copy of the tokens `start .. start + len` of the rows `rows`.
    pub fn cut(&self, rows: std::ops::Range<usize>, tokens: std::ops::Range<usize>, layout: Layout) -> Self {
        let shape = [rows.len(), tokens.len(), self.shape[2], self.shape[3]];
        let mut other = Self::strided(self.dtype, shape, layout.strides(shape), Place::Heap, self.gaps);
        for at in indices(shape) {
            other.set_element_bits(at, self.bits([at[0] + rows.start, at[1] + tokens.start, at[2], at[3]]));
        }
        other
    }

    /// The same elements, rounded to another type.
    pub fn cast(&self, dtype: DType) -> Self {
        let mut other = Self::input(dtype, self.shape, Layout::BSHD, Place::Heap);
        other.fill(|at| self.get(at));
        other
    }

    pub fn view(&self) -> View<'_> {
        let (offset, shape, strides) = (self.offset, self.shape, self.strides);
        match self.dtype {
            DType::F32 => View::strided(self.memory.slice::<f32>(), offset, shape, strides),
            DType::F16 => View::strided(self.memory.slice::<f16>(), offset, shape, strides),
            DType::Bf16 => View::strided(self.memory.slice::<bf16>(), offset, shape, strides),
        }
        .expect("a view of a tensor's own memory")
    }

    /// The same numbers in a quantised format, the same one in all calls between changes.
    pub fn quantised(&self, format: CacheFormat) -> &Quantised {
        let cache = self.quantised.get_or_init(|| Box::new(Quantised::of(self, format, self.place)));
        assert_eq!(cache.format(), format, "a tensor is read in one quantised format");
        cache
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        self.quantised.take();
        let (offset, shape, strides) = (self.offset, self.shape, self.strides);
        match self.dtype {
            DType::F32 => ViewMut::strided(self.memory.slice_mut::<f32>(), offset, shape, strides),
            DType::F16 => ViewMut::strided(self.memory.slice_mut::<f16>(), offset, shape, strides),
            DType::Bf16 => ViewMut::strided(self.memory.slice_mut::<bf16>(), offset, shape, strides),
        }
        .expect("a view of a tensor's own memory")
    }

    /// Every byte, elements and gaps.
    pub fn bytes(&self) -> &[u8] {
        self.memory.bytes()
    }

    /// Panics if memory between elements has changed.
    #[track_caller]
    pub fn assert_gaps(&self) {
        let size = self.dtype.size();
        let elements = self.memory.bytes().len() / size;
        let mut gap = vec![true; elements];
        for at in indices(self.shape) {
            gap[self.index(at)] = false;
        }
        for (at, _) in gap.iter().enumerate().filter(|(_, gap)| **gap) {
            let wanted = &self.gap_bits(at).to_le_bytes()[..size];
            let found = &self.memory.bytes()[at * size..(at + 1) * size];
            assert_eq!(found, wanted, "element {at} of the memory lies in no view and was written");
        }
    }

    /// Panics if any byte has changed.
    #[track_caller]
    pub fn assert_untouched(&self) {
        assert!(self.gaps == Gaps::Canary && self.memory.bytes().iter().all(|&b| b == 0xa5), "an output was written");
    }
}

/// NaNs, quiet and signalling, whose payloads differ in their last bits; memory full of ones holds such.
pub fn nans(dtype: DType) -> [u32; 4] {
    match dtype {
        DType::F32 => [0x7fc0_0000, 0xffff_ffff, 0x7f80_0001, 0xffc0_0102],
        DType::F16 => [0x7e00, 0xffff, 0x7c01, 0xfe02],
        DType::Bf16 => [0x7fc0, 0xffff, 0x7f81, 0xffc2],
    }
}

/// NaN or an infinity.
pub fn poison(dtype: DType, i: usize) -> u32 {
    match dtype {
        DType::F32 => [0x7fc0_0000, 0x7f80_0000, 0xff80_0000, 0xffc0_0001][i % 4],
        DType::F16 => [0x7e00, 0x7c00, 0xfc00, 0xfe01][i % 4],
        DType::Bf16 => [0x7fc0, 0x7f80, 0xff80, 0xffc1][i % 4],
    }
}

/// All indices of a shape, in the order of the axes. They are counted up, because most of the tests' time would go into divisions.
pub fn indices(shape: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let mut next = [0; 4];
    (0..shape.iter().product()).map(move |_| {
        let at = next;
        for axis in (0..4).rev() {
            next[axis] += 1;
            if next[axis] < shape[axis] {
                break;
            }
            next[axis] = 0;
        }
        at
    })
}
