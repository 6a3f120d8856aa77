//! Tensors as they are stored in a file: what their blocks hold, and their conversion to f32.
//!
//! A quantised row is a sequence of blocks. A block holds a fixed number of elements with one or two f16 scales:
//!
//! | type | elements | bytes | layout | value |
//! | --- | --- | --- | --- | --- |
//! | Q8_0 | 32 | 34 | `d`, 32 x i8 | `d * q` |
//! | Q4_0 | 32 | 18 | `d`, 16 bytes of nibbles | `d * (q - 8)` |
//! | Q4_1 | 32 | 20 | `d`, `m`, nibbles | `d * q + m` |
//! | Q5_0 | 32 | 22 | `d`, 32 fifth bits, nibbles | `d * (q - 16)` |
//! | Q5_1 | 32 | 24 | `d`, `m`, 32 fifth bits, nibbles | `d * q + m` |
//! | Q2_K | 256 | 84 | 16 x (4-bit scale, 4-bit min), 2-bit elements, `d`, `dmin` | `d*sc*q - dmin*mn` |
//! | Q3_K | 256 | 110 | 256 third bits, 2-bit elements, 16 x 6-bit scale, `d` | `d*(sc - 32)*(q - 4)` |
//! | Q4_K | 256 | 144 | `d`, `dmin`, 8 x (6-bit scale, 6-bit min), nibbles | `d*sc*q - dmin*mn` |
//! | Q5_K | 256 | 176 | as Q4_K, with 256 fifth bits before the nibbles | `d*sc*q - dmin*mn` |
//! | Q6_K | 256 | 210 | nibbles, 2-bit tops, 16 x i8 scale, `d` | `d*sc*(q - 32)` |
//!
//! A byte of nibbles holds two elements that are half a group apart, the earlier in the low nibble; a byte of 2-bit
//! elements holds four that are 32 apart. The order of the floating-point operations is that of ggml's reference, so
//! that weights have the same bits.

use half::{bf16, f16};

use super::error::{Error, Result};

/// The element type of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
#[non_exhaustive]
pub enum TensorType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
    /// Blocks of 32 bytes with one scale.
    Q8_0,
    /// Blocks of 32 nibbles with one scale.
    Q4_0,
    /// Blocks of 32 nibbles with a scale and a minimum.
    Q4_1,
    /// Blocks of 32 five-bit elements with one scale.
    Q5_0,
    /// Blocks of 32 five-bit elements with a scale and a minimum.
    Q5_1,
    /// Super-blocks of 256 two-bit elements, sixteen scales and sixteen minima.
    Q2_K,
    /// Super-blocks of 256 three-bit elements, sixteen scales.
    Q3_K,
    /// Super-blocks of 256 nibbles, eight scales and eight minima.
    Q4_K,
    /// Super-blocks of 256 five-bit elements, eight scales and eight minima.
    Q5_K,
    /// Super-blocks of 256 six-bit elements, sixteen scales.
    Q6_K,
}

/// Calls a macro with the names of all quantised types, after arguments of its own.
macro_rules! with_quantised {
    ($macro:ident $(, $argument:tt)*) => {
        $macro! { $($argument,)* Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K }
    };
}
pub(super) use with_quantised;

/// Plain floats, then these.
macro_rules! all_types {
    ($($name:ident)*) => { [TensorType::F32, TensorType::F16, TensorType::BF16, $(TensorType::$name),*] };
}

impl TensorType {
    /// All types.
    pub const ALL: [Self; 13] = with_quantised!(all_types);

    /// The type of a `ggml_type` number, if this driver can read it.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// The name in ggml and in the names of model files.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q2_K => "Q2_K",
            Self::Q3_K => "Q3_K",
            Self::Q4_K => "Q4_K",
            Self::Q5_K => "Q5_K",
            Self::Q6_K => "Q6_K",
        }
    }

    /// Elements in a block; 1 for the plain floats.
    pub fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes in a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of `elements` elements; `None` if they do not fill whole blocks or the size overflows.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }
}

/// A tensor inside a mapped file.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Its element type.
    pub ty: TensorType,
    /// Its extents, slowest first: a linear layer is `[out, in]`.
    pub shape: Vec<usize>,
    /// Its bytes: whole blocks, row after row.
    pub data: &'a [u8],
}

impl Tensor<'_> {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Converts whole blocks in `src` to the f32 values in `dst`.
///
/// It is an error if `dst` is not a whole number of blocks, or `src` does not have their size.
pub fn dequantize(ty: TensorType, src: &[u8], dst: &mut [f32]) -> Result<()> {
    if ty.bytes(dst.len()) != Some(src.len()) {
        return Err(Error::malformed(format!(
            "{} bytes of {} cannot hold {} elements: a block is {} elements in {} bytes",
            src.len(),
            ty.name(),
            dst.len(),
            ty.block_elements(),
            ty.block_bytes()
        )));
    }
    match ty {
        TensorType::F32 => floats(src, dst, f32::from_le_bytes),
        TensorType::F16 => floats(src, dst, |b| f16::from_le_bytes(b).to_f32()),
        TensorType::BF16 => floats(src, dst, |b| bf16::from_le_bytes(b).to_f32()),
        _ => {
            let format = ty.format();
            let mut block = Block::default();
            for (src, dst) in src.chunks_exact(ty.block_bytes()).zip(dst.chunks_exact_mut(ty.block_elements())) {
                block.read(ty, src);
                for (i, y) in dst.chunks_exact_mut(format.run()).enumerate() {
                    let (scale, min) = block.scale_and_min(&format, i);
                    for (y, &q) in y.iter_mut().zip(&block.q[i * format.run()..]) {
                        *y = format.value(q, scale, min);
                    }
                }
            }
        }
    }
    Ok(())
}

fn floats<const B: usize>(src: &[u8], dst: &mut [f32], f: impl Fn([u8; B]) -> f32) {
    for (b, y) in src.as_chunks::<B>().0.iter().zip(dst) {
        *y = f(*b);
    }
}

/// What the elements of a quantised type consist of. All types have one form: an unsigned integer `q` of a few bits, and
/// for a run of elements a scale and a minimum or a zero point,
/// ```text
/// scale * q + min        scale * (q - zero)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// The lower bits of an element: 2, 4 or 8.
    pub low_bits: usize,
    /// The upper bits of an element: 0, 1 or 2.
    pub high_bits: usize,
    /// Groups of 32 elements in a block: 1 or 8. Eight groups have scales of their own, which the block's scale
    /// multiplies.
    pub groups: usize,
    /// Runs of elements with one scale in a group: 1 or 2.
    pub runs: usize,
    /// The zero point; `None` if there are minima.
    pub zero: Option<i32>,
}

/// Elements in a group.
pub(super) const GROUP: usize = 32;

impl Format {
    const fn of_32(low_bits: usize, high_bits: usize, zero: Option<i32>) -> Self {
        Self { low_bits, high_bits, groups: 1, runs: 1, zero }
    }

    const fn of_256(low_bits: usize, high_bits: usize, runs: usize, zero: Option<i32>) -> Self {
        Self { low_bits, high_bits, groups: 8, runs, zero }
    }

    /// Elements with one scale.
    pub(super) const fn run(&self) -> usize {
        GROUP / self.runs
    }

    /// The value of an element.
    pub(super) fn value(&self, q: u8, scale: f32, min: f32) -> f32 {
        match self.zero {
            Some(zero) => (i32::from(q) - zero) as f32 * scale,
            None => f32::from(q) * scale + min,
        }
    }
}

impl TensorType {
    /// The form of a quantised type's elements.
    ///
    /// # Panics
    /// If the type is a plain float.
    pub(super) const fn format(self) -> Format {
        match self {
            Self::Q8_0 => Format::of_32(8, 0, Some(128)),
            Self::Q4_0 => Format::of_32(4, 0, Some(8)),
            Self::Q4_1 => Format::of_32(4, 0, None),
            Self::Q5_0 => Format::of_32(4, 1, Some(16)),
            Self::Q5_1 => Format::of_32(4, 1, None),
            Self::Q2_K => Format::of_256(2, 0, 2, None),
            Self::Q3_K => Format::of_256(2, 1, 2, Some(4)),
            Self::Q4_K => Format::of_256(4, 0, 1, None),
            Self::Q5_K => Format::of_256(4, 1, 1, None),
            Self::Q6_K => Format::of_256(4, 2, 2, Some(32)),
            Self::F32 | Self::F16 | Self::BF16 => panic!("a plain float has no blocks"),
        }
    }
}

/// A block taken apart.
#[derive(Debug, Clone)]
pub(super) struct Block {
    /// The elements, as [`Format`] says.
    pub q: [u8; 256],
    /// The block's scale, f16.
    pub d: [u8; 2],
    /// The block's minimum (32 elements), or the scale of its minima (256 elements), f16.
    pub m: [u8; 2],
    /// The scale of each run, where a block has several.
    pub scales: [i8; 16],
    /// The minimum of each run, where a block has several.
    pub mins: [i8; 16],
}

impl Default for Block {
    fn default() -> Self {
        Self { q: [0; 256], d: [0; 2], m: [0; 2], scales: [0; 16], mins: [0; 16] }
    }
}

impl Block {
    /// The scale and the minimum of run `i`.
    pub(super) fn scale_and_min(&self, format: &Format, i: usize) -> (f32, f32) {
        let (d, m) = (f16::from_le_bytes(self.d).to_f32(), f16::from_le_bytes(self.m).to_f32());
        match format.groups {
            1 => (d, m),
            _ => (d * f32::from(self.scales[i]), -(m * f32::from(self.mins[i]))),
        }
    }

    /// Takes the block `b` of a quantised type apart.
    pub(super) fn read(&mut self, ty: TensorType, b: &[u8]) {
        match ty {
            TensorType::Q8_0 => {
                self.d = [b[0], b[1]];
                for (q, &b) in self.q.iter_mut().zip(&b[2..34]) {
                    *q = b ^ 128;
                }
            }
            TensorType::Q4_0 => {
                self.d = [b[0], b[1]];
                self.nibbles(&b[2..18]);
            }
            TensorType::Q4_1 => {
                (self.d, self.m) = ([b[0], b[1]], [b[2], b[3]]);
                self.nibbles(&b[4..20]);
            }
            TensorType::Q5_0 => {
                self.d = [b[0], b[1]];
                self.nibbles(&b[6..22]);
                self.fifth_bits([b[2], b[3], b[4], b[5]]);
            }
            TensorType::Q5_1 => {
                (self.d, self.m) = ([b[0], b[1]], [b[2], b[3]]);
                self.nibbles(&b[8..24]);
                self.fifth_bits([b[4], b[5], b[6], b[7]]);
            }
            TensorType::Q2_K => {
                (self.d, self.m) = ([b[80], b[81]], [b[82], b[83]]);
                for (j, &b) in b[..16].iter().enumerate() {
                    (self.scales[j], self.mins[j]) = ((b & 15) as i8, (b >> 4) as i8);
                }
                self.twos(&b[16..80]);
            }
            TensorType::Q3_K => {
                self.d = [b[108], b[109]];
                let scales = &b[96..108];
                for (j, scale) in self.scales.iter_mut().enumerate() {
                    // The low four bits are nibbles of the first eight bytes, the high two bits are in the last four
                    // bytes.
                    let low = scales[j % 8] >> (4 * (j / 8)) & 15;
                    let high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
                    *scale = (low | high << 4) as i8 - 32;
                }
                self.twos(&b[32..96]);
                for (j, q) in self.q.chunks_exact_mut(32).enumerate() {
                    for (q, &third) in q.iter_mut().zip(&b[..32]) {
                        *q |= (third >> j & 1) << 2;
                    }
                }
            }
            TensorType::Q4_K => {
                self.scales_and_mins(b);
                self.pairs(&b[16..144]);
            }
            TensorType::Q5_K => {
                self.scales_and_mins(b);
                self.pairs(&b[48..176]);
                for (j, q) in self.q.chunks_exact_mut(32).enumerate() {
                    for (q, &top) in q.iter_mut().zip(&b[16..48]) {
                        *q |= (top >> j & 1) << 4;
                    }
                }
            }
            TensorType::Q6_K => {
                self.d = [b[208], b[209]];
                for (scale, &b) in self.scales.iter_mut().zip(&b[192..208]) {
                    *scale = b as i8;
                }
                for (j, q) in self.q.chunks_exact_mut(32).enumerate() {
                    let (half, quarter) = (j / 4, j % 4);
                    let nibbles = &b[64 * half + 32 * (quarter % 2)..][..32];
                    let tops = &b[128 + 32 * half..][..32];
                    for ((q, &nibble), &top) in q.iter_mut().zip(nibbles).zip(tops) {
                        *q = (nibble >> (4 * (quarter / 2)) & 15) | (top >> (2 * quarter) & 3) << 4;
                    }
                }
            }
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => unreachable!("a plain float has no blocks"),
        }
    }

    /// A byte holds two elements that are 16 apart.
    fn nibbles(&mut self, bytes: &[u8]) {
        let (low, high) = self.q[..32].split_at_mut(16);
        for ((low, high), &b) in low.iter_mut().zip(high).zip(bytes) {
            (*low, *high) = (b & 15, b >> 4);
        }
    }

    /// The fifth bits of 32 elements.
    fn fifth_bits(&mut self, bits: [u8; 4]) {
        let bits = u32::from_le_bytes(bits);
        for (i, q) in self.q[..32].iter_mut().enumerate() {
            *q |= ((bits >> i & 1) as u8) << 4;
        }
    }

    /// A byte holds two elements that are 32 apart.
    fn pairs(&mut self, bytes: &[u8]) {
        for (q, bytes) in self.q.chunks_exact_mut(64).zip(bytes.chunks_exact(32)) {
            let (low, high) = q.split_at_mut(32);
            for ((low, high), &b) in low.iter_mut().zip(high).zip(bytes) {
                (*low, *high) = (b & 15, b >> 4);
            }
        }
    }

    /// A byte holds four elements that are 32 apart.
    fn twos(&mut self, bytes: &[u8]) {
        for (j, q) in self.q.chunks_exact_mut(32).enumerate() {
            for (q, &b) in q.iter_mut().zip(&bytes[32 * (j / 4)..][..32]) {
                *q = b >> (2 * (j % 4)) & 3;
            }
        }
    }

    /// The head of Q4_K and Q5_K: two f16, then six-bit scales and minima. Twelve bytes pack eight of each: the first
    /// four are the low six bits of bytes 0..4 and 4..8; the last four are split between bytes 8..12 and the top two
    /// bits of bytes 0..8.
    fn scales_and_mins(&mut self, b: &[u8]) {
        (self.d, self.m) = ([b[0], b[1]], [b[2], b[3]]);
        let s = &b[4..16];
        for j in 0..4 {
            (self.scales[j], self.mins[j]) = ((s[j] & 63) as i8, (s[j + 4] & 63) as i8);
            self.scales[j + 4] = ((s[j + 8] & 15) | (s[j] >> 6) << 4) as i8;
            self.mins[j + 4] = ((s[j + 8] >> 4) | (s[j + 4] >> 6) << 4) as i8;
        }
    }
}
