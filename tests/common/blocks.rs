//! Caches of ggml's blocks, by their definition, which is compared with what ggml's own library has recorded.

use super::int8::UnitMemory;
use super::tensor::{Place, Tensor, indices};
use half::f16;
use kvlane::{CacheFormat, CacheView, CacheViewMut};

pub const FORMATS: [CacheFormat; 6] =
    [CacheFormat::Q8_0, CacheFormat::Q4_0, CacheFormat::Q4_1, CacheFormat::Q5_0, CacheFormat::Q5_1, CacheFormat::Iq4Nl];

/// Elements of a block.
pub const N: usize = 32;

const TABLE: [i32; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Where the fifth bits and the nibbles of a format begin.
fn parts(format: CacheFormat) -> (Option<usize>, usize) {
    match format {
        CacheFormat::Q4_0 | CacheFormat::Iq4Nl => (None, 2),
        CacheFormat::Q4_1 => (None, 4),
        CacheFormat::Q5_0 => (Some(2), 6),
        CacheFormat::Q5_1 => (Some(4), 8),
        other => panic!("{other} has no nibbles"),
    }
}

/// A number of a block.
pub fn element(format: CacheFormat, block: &[u8], i: usize) -> f32 {
    let d = half(block, 0);
    if format == CacheFormat::Q8_0 {
        return f32::from(block[2 + i] as i8) * d;
    }
    let (fifth, nibbles) = parts(format);
    let byte = block[nibbles + i % 16];
    let low = if i < 16 { byte & 15 } else { byte >> 4 };
    let high = fifth.map_or(0, |at| block[at + i / 8] >> (i % 8) & 1);
    let q = i32::from(low) + 16 * i32::from(high);
    match format {
        CacheFormat::Q4_0 => (q - 8) as f32 * d,
        CacheFormat::Q5_0 => (q - 16) as f32 * d,
        CacheFormat::Iq4Nl => TABLE[q as usize] as f32 * d,
        _ => q as f32 * d + half(block, 2),
    }
}

/// The numbers that a block stands for.
pub fn elements(format: CacheFormat, block: &[u8]) -> [f32; N] {
    std::array::from_fn(|i| element(format, block, i))
}

/// The block next to these numbers.
pub fn quantise(format: CacheFormat, x: &[f32]) -> Vec<u8> {
    let mut block = vec![0; format.unit_bytes()];
    let put = |block: &mut [u8], at: usize, x: f32| {
        let x = if x.is_nan() { f16::NAN } else { f16::from_f32(x) };
        block[at..at + 2].copy_from_slice(&x.to_le_bytes());
    };
    if x.iter().any(|x| !x.is_finite()) {
        put(&mut block, 0, f32::NAN);
        return block;
    }
    let peak = *x.iter().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
    // The first of several, and no negative zero.
    let peak = *x.iter().find(|x| x.abs() == peak.abs()).unwrap() + 0.0;
    let least = x.iter().fold(f32::INFINITY, |a, &x| if x < a { x } else { a });
    let most = x.iter().fold(f32::NEG_INFINITY, |a, &x| if x > a { x } else { a });
    let inverse = |d: f32| if d == 0.0 { 0.0 } else { 1.0 / d };
    let d = match format {
        CacheFormat::Q8_0 => peak.abs() / 127.0,
        CacheFormat::Q4_0 => peak / -8.0,
        CacheFormat::Q5_0 => peak / -16.0,
        CacheFormat::Q4_1 => (most - least) / 15.0,
        CacheFormat::Q5_1 => (most - least) / 31.0,
        _ => peak / -127.0,
    };
    put(&mut block, 0, d);
    // Numbers that are not finite are undefined, and count as 0.
    let whole = |x: f32, most: i32| if x.is_finite() { (x as i32).min(most) } else { 0 };
    let by = inverse(d);
    if format == CacheFormat::Q8_0 {
        for (to, &x) in block[2..].iter_mut().zip(x) {
            *to = whole((x * by).round(), 127) as i8 as u8;
        }
        return block;
    }
    let q: Vec<i32> = match format {
        CacheFormat::Q4_0 => x.iter().map(|x| whole(x * by + 8.5, 15)).collect(),
        CacheFormat::Q5_0 => x.iter().map(|x| whole(x * by + 16.5, 31)).collect(),
        CacheFormat::Q4_1 => x.iter().map(|x| whole((x - least) * by + 0.5, 15)).collect(),
        CacheFormat::Q5_1 => x.iter().map(|x| whole((x - least) * by + 0.5, 31)).collect(),
        _ if peak.abs() < 1e-15 => {
            put(&mut block, 0, 0.0);
            vec![8; N]
        }
        _ => {
            let nearest = |x: f32| {
                let x = x * (1.0 / d);
                // The last of the nearest.
                (0..16).rev().min_by(|&i, &j| (x - TABLE[i] as f32).abs().total_cmp(&(x - TABLE[j] as f32).abs()))
            };
            let q: Vec<i32> = x.iter().map(|&x| nearest(x).unwrap() as i32).collect();
            let (mut products, mut squares) = (0f32, 0f32);
            for (&q, &x) in q.iter().zip(x) {
                let (weight, value) = (x * x, TABLE[q as usize] as f32);
                products += weight * value * x;
                squares += weight * value * value;
            }
            put(&mut block, 0, if squares > 0.0 { products / squares } else { 0.0 });
            q
        }
    };
    if matches!(format, CacheFormat::Q4_1 | CacheFormat::Q5_1) {
        put(&mut block, 2, least);
    }
    let (fifth, nibbles) = parts(format);
    for (i, q) in q.into_iter().enumerate() {
        block[nibbles + i % 16] |= (q as u8 & 15) << if i < 16 { 0 } else { 4 };
        if let Some(at) = fifth {
            block[at + i / 8] |= (q as u8 >> 4) << (i % 8);
        }
    }
    block
}

/// The blocks of a head.
pub fn quantise_head(format: CacheFormat, head: &[f32]) -> Vec<u8> {
    head.chunks(N).flat_map(|x| quantise(format, x)).collect()
}

/// Keys or values in blocks, with memory of their own.
pub struct Blocks {
    units: UnitMemory,
    pub shape: [usize; 4],
    pub format: CacheFormat,
}

/// What all bytes are before a write: factors of NaN.
pub const CANARY: u8 = 0xff;

impl Blocks {
    /// Every byte is a canary. Strides are in blocks.
    pub fn new(format: CacheFormat, shape: [usize; 4], strides: [i64; 4], place: Place) -> Self {
        let [batch, seq, heads, dim] = shape;
        let units = UnitMemory::sized(format.unit_bytes(), [batch, seq, heads, dim / N], strides, place, CANARY);
        Self { units, shape, format }
    }

    /// With the order of the axes that a layout has; dim stays the innermost one.
    pub fn output(format: CacheFormat, shape: [usize; 4], layout: super::Layout, place: Place) -> Self {
        Self::new(format, shape, inner(shape, layout.strides(shape), N), place)
    }

    /// What quantising a tensor gives, with the order of the tensor's axes.
    pub fn of(tensor: &Tensor, format: CacheFormat, place: Place) -> Self {
        let mut cache = Self::new(format, tensor.shape, inner(tensor.shape, tensor.strides, N), place);
        let [batch, seq, heads, dim] = tensor.shape;
        for [b, s, h, _] in indices([batch, seq, heads, 1]) {
            let head: Vec<f32> = (0..dim).map(|d| tensor.get([b, s, h, d])).collect();
            cache.set_head(b, s, h, &quantise_head(format, &head));
        }
        cache
    }

    pub fn set_head(&mut self, b: usize, s: usize, h: usize, bytes: &[u8]) {
        let size = self.format.unit_bytes();
        bytes.chunks(size).enumerate().for_each(|(d, unit)| self.units.unit_mut([b, s, h, d]).copy_from_slice(unit));
    }

    /// The bytes of a head.
    pub fn head(&self, b: usize, s: usize, h: usize) -> Vec<u8> {
        (0..self.shape[3] / N).flat_map(|d| self.units.unit([b, s, h, d]).to_vec()).collect()
    }

    /// The elements of a head.
    pub fn elements(&self, b: usize, s: usize, h: usize) -> Vec<f32> {
        (0..self.shape[3] / N).flat_map(|d| elements(self.format, self.units.unit([b, s, h, d]))).collect()
    }

    pub fn get(&self, [b, s, h, d]: [usize; 4]) -> f32 {
        element(self.format, self.units.unit([b, s, h, d / N]), d % N)
    }

    pub fn view(&self) -> CacheView<'_> {
        let Self { units, shape, format } = self;
        CacheView::blocks_strided(units.bytes(), *format, units.offset, *shape, units.strides)
            .expect("a view of a cache's own memory")
    }

    pub fn view_mut(&mut self) -> CacheViewMut<'_> {
        let Self { units, shape, format } = self;
        let (offset, strides) = (units.offset, units.strides);
        CacheViewMut::blocks_strided(units.bytes_mut(), *format, offset, *shape, strides)
            .expect("a view of a cache's own memory")
    }

    /// Panics if memory between blocks has changed.
    #[track_caller]
    pub fn assert_gaps(&self) {
        self.units.assert_gaps();
    }
}

/// Strides in units of so many elements with the signs of others, and the order of all axes but the last, which is the innermost; axes of stride 0 stay.
pub fn inner(shape: [usize; 4], strides: [i64; 4], per_unit: usize) -> [i64; 4] {
    let mut axes: Vec<usize> = (0..3).filter(|&axis| strides[axis] != 0).collect();
    axes.sort_by_key(|&axis| strides[axis].unsigned_abs());
    let (mut inner, mut step) = ([0, 0, 0, 1], (shape[3] / per_unit).max(1) as i64);
    for axis in axes {
        step += (strides[axis] % 3).abs();
        inner[axis] = step * strides[axis].signum();
        step *= shape[axis].max(1) as i64;
    }
    inner
}
