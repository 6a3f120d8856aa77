//! Tensors as they are stored in a file, and their conversion to f32.
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

impl TensorType {
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
        TensorType::F32 => blocks::<4, 1>(src, dst, |b, y| y[0] = f32::from_le_bytes(*b)),
        TensorType::F16 => blocks::<2, 1>(src, dst, |b, y| y[0] = f16::from_le_bytes(*b).to_f32()),
        TensorType::BF16 => blocks::<2, 1>(src, dst, |b, y| y[0] = bf16::from_le_bytes(*b).to_f32()),
        TensorType::Q8_0 => blocks(src, dst, q8_0),
        TensorType::Q4_0 => blocks(src, dst, q4_0),
        TensorType::Q4_1 => blocks(src, dst, q4_1),
        TensorType::Q5_0 => blocks(src, dst, q5_0),
        TensorType::Q5_1 => blocks(src, dst, q5_1),
        TensorType::Q2_K => blocks(src, dst, q2_k),
        TensorType::Q3_K => blocks(src, dst, q3_k),
        TensorType::Q4_K => blocks(src, dst, q4_k),
        TensorType::Q5_K => blocks(src, dst, q5_k),
        TensorType::Q6_K => blocks(src, dst, q6_k),
    }
    Ok(())
}

fn blocks<const B: usize, const N: usize>(src: &[u8], dst: &mut [f32], f: impl Fn(&[u8; B], &mut [f32; N])) {
    let (src, _) = src.as_chunks::<B>();
    let (dst, _) = dst.as_chunks_mut::<N>();
    for (b, y) in src.iter().zip(dst) {
        f(b, y);
    }
}

fn scale(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn q8_0(b: &[u8; 34], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    for (y, &q) in y.iter_mut().zip(&b[2..]) {
        *y = f32::from(q as i8) * d;
    }
}

fn q4_0(b: &[u8; 18], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    for (i, &q) in b[2..].iter().enumerate() {
        y[i] = d * f32::from((q & 15) as i8 - 8);
        y[i + 16] = d * f32::from((q >> 4) as i8 - 8);
    }
}

fn q4_1(b: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    for (i, &q) in b[4..].iter().enumerate() {
        y[i] = d * f32::from(q & 15) + m;
        y[i + 16] = d * f32::from(q >> 4) + m;
    }
}

fn q5_0(b: &[u8; 22], y: &mut [f32; 32]) {
    let d = scale(b, 0);
    let top = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
    for (i, &q) in b[6..].iter().enumerate() {
        let (lo, hi) = (fifth(top, i), fifth(top, i + 16));
        y[i] = d * f32::from(((q & 15) | lo) as i8 - 16);
        y[i + 16] = d * f32::from(((q >> 4) | hi) as i8 - 16);
    }
}

fn q5_1(b: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    let top = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
    for (i, &q) in b[8..].iter().enumerate() {
        y[i] = d * f32::from((q & 15) | fifth(top, i)) + m;
        y[i + 16] = d * f32::from((q >> 4) | fifth(top, i + 16)) + m;
    }
}

fn fifth(top: u32, i: usize) -> u8 {
    ((top >> i & 1) as u8) << 4
}

fn q2_k(b: &[u8; 84], y: &mut [f32; 256]) {
    let (d, dmin) = (scale(b, 80), scale(b, 82));
    for (j, y) in y.chunks_exact_mut(16).enumerate() {
        let (d, m) = (d * f32::from(b[j] & 15), dmin * f32::from(b[j] >> 4));
        let twos = &b[16 + 32 * (j / 8) + 16 * (j % 2)..][..16];
        for (y, &q) in y.iter_mut().zip(twos) {
            *y = d * f32::from(q >> (2 * (j / 2 % 4)) & 3) - m;
        }
    }
}

fn q3_k(b: &[u8; 110], y: &mut [f32; 256]) {
    let (d, scales) = (scale(b, 108), &b[96..108]);
    for (j, y) in y.chunks_exact_mut(16).enumerate() {
        // The low four bits are nibbles of the first eight bytes, the high two bits are in the last four bytes.
        let low = scales[j % 8] >> (4 * (j / 8)) & 15;
        let high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
        let d = d * f32::from((low | high << 4) as i8 - 32);
        let twos = &b[32 + 32 * (j / 8) + 16 * (j % 2)..][..16];
        let thirds = &b[16 * (j % 2)..][..16];
        for ((y, &q), &t) in y.iter_mut().zip(twos).zip(thirds) {
            let q = (q >> (2 * (j / 2 % 4)) & 3) | (t >> (j / 2) & 1) << 2;
            *y = d * f32::from(q as i8 - 4);
        }
    }
}

/// The six-bit scale and minimum of sub-block `j`. Twelve bytes pack eight of each: the first four are the low six
/// bits of bytes 0..4 and 4..8; the last four are split between bytes 8..12 and the top two bits of bytes 0..8.
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (sc, mn) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    };
    (f32::from(sc), f32::from(mn))
}

fn q4_k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (scale(b, 0), scale(b, 2));
    for j in 0..8 {
        let (sc, mn) = scale_min(&b[4..16], j);
        let (d, m) = (d * sc, dmin * mn);
        let nibbles = &b[16 + 32 * (j / 2)..][..32];
        for (y, &q) in y[32 * j..][..32].iter_mut().zip(nibbles) {
            *y = d * f32::from(q >> (4 * (j % 2)) & 15) - m;
        }
    }
}

fn q5_k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (scale(b, 0), scale(b, 2));
    let tops = &b[16..48];
    for j in 0..8 {
        let (sc, mn) = scale_min(&b[4..16], j);
        let (d, m) = (d * sc, dmin * mn);
        let nibbles = &b[48 + 32 * (j / 2)..][..32];
        for ((y, &q), &t) in y[32 * j..][..32].iter_mut().zip(nibbles).zip(tops) {
            *y = d * f32::from((q >> (4 * (j % 2)) & 15) | (t >> j & 1) << 4) - m;
        }
    }
}

fn q6_k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = scale(b, 208);
    for j in 0..8 {
        let (half, quarter) = (j / 4, j % 4);
        let nibbles = &b[64 * half + 32 * (quarter % 2)..][..32];
        let tops = &b[128 + 32 * half..][..32];
        for i in 0..32 {
            let q = (nibbles[i] >> (4 * (quarter / 2)) & 15) | (tops[i] >> (2 * quarter) & 3) << 4;
            let d = d * f32::from(b[192 + 2 * j + i / 16] as i8);
            y[32 * j + i] = d * f32::from(q as i8 - 32);
        }
    }
}
