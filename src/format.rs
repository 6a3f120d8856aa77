//! Cache formats: what a cache holds, as opposed to what arithmetic reads and writes ([`DType`]).

use crate::dtype::DType;

/// The storage format of the keys or of the values of a cache.
///
/// A format says how many elements share a *unit*, how many bytes a unit has, and whether units have scales. Shapes
/// count elements, strides count units. A unit is one element, or two, or a block of 32 elements that lie together in a head: the
/// heads of a cache of blocks have a multiple of 32 elements, and their blocks lie one after the other. Keys and values have
/// formats of their own, chosen independently.
///
/// The values are those of `kvl_format` in the C header; the first three are those of [`DType`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum CacheFormat {
    /// [`DType::F32`].
    F32 = 0,
    /// [`DType::F16`].
    F16 = 1,
    /// [`DType::Bf16`].
    Bf16 = 2,
    /// Signed bytes from -127 to 127, and one scale per token and head, f32 or f16, in a tensor of its own: an element is its
    /// byte times the scale of its token and head.
    Int8 = 3,
    /// A byte per element in the eight-bit float E4M3 of the Open Compute Project (`e4m3fn`: no infinities), up to 448, times a
    /// static scale: one per head or per tensor, which writes read.
    Fp8E4m3 = 4,
    /// A byte per element in the eight-bit float E5M2, the upper half of an f16, up to 57344, times a static scale as in
    /// [`Self::Fp8E4m3`].
    Fp8E5m2 = 5,
    /// Blocks of ggml's type of the same name: 32 signed bytes and an f16 factor in 34 bytes. So are the next five; see [their
    /// bytes](crate::docs::caches#blocks).
    Q8_0 = 6,
    /// 32 elements of four bits and an f16 factor in 18 bytes.
    Q4_0 = 7,
    /// 32 elements of four bits, an f16 factor and an f16 minimum in 20 bytes.
    Q4_1 = 8,
    /// 32 elements of five bits and an f16 factor in 22 bytes.
    Q5_0 = 9,
    /// 32 elements of five bits, an f16 factor and an f16 minimum in 24 bytes.
    Q5_1 = 10,
    /// 32 elements of four bits, which number the values of a table, and an f16 factor in 18 bytes.
    Iq4Nl = 11,
    /// Integers of eight bits, and a scale and perhaps a zero point for each of their groups, all as an
    /// [`Affine`](crate::Affine) describes them: the caches of ONNX Runtime and OpenVINO, for example.
    Affine8 = 12,
    /// The same with integers of four bits, two of which are a unit.
    Affine4 = 13,
}

impl CacheFormat {
    /// Every format.
    pub const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Int8,
        Self::Fp8E4m3,
        Self::Fp8E5m2,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Iq4Nl,
        Self::Affine8,
        Self::Affine4,
    ];

    /// `"f32"`, `"f16"`, `"bf16"`, `"int8"`, `"fp8_e4m3"`, `"fp8_e5m2"`, `"q8_0"`, `"q4_0"`, `"q4_1"`, `"q5_0"`, `"q5_1"`,
    /// `"iq4_nl"`, `"affine8"` or `"affine4"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8E4m3 => "fp8_e4m3",
            Self::Fp8E5m2 => "fp8_e5m2",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Iq4Nl => "iq4_nl",
            Self::Affine8 => "affine8",
            Self::Affine4 => "affine4",
        }
    }

    /// The format called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// The format with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&f| f as u32 == value)
    }

    /// The element type of plain elements; `None` for quantised units.
    pub const fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::Bf16),
            Self::Int8
            | Self::Fp8E4m3
            | Self::Fp8E5m2
            | Self::Q8_0
            | Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Iq4Nl
            | Self::Affine8
            | Self::Affine4 => None,
        }
    }

    /// Bytes per unit.
    pub const fn unit_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 | Self::Fp8E4m3 | Self::Fp8E5m2 | Self::Affine8 | Self::Affine4 => 1,
            Self::Q8_0 => 34,
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
        }
    }

    /// Elements per unit: 1, or 32 in a format of blocks, or 2 in [`Self::Affine4`].
    pub const fn unit_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Int8 | Self::Fp8E4m3 | Self::Fp8E5m2 | Self::Affine8 => 1,
            Self::Affine4 => 2,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Iq4Nl => 32,
        }
    }

    /// The alignment of a unit in bytes: that of its widest number.
    pub const fn unit_align(self) -> usize {
        if self.is_blocks() { 2 } else { self.unit_bytes() }
    }

    /// Whether this is a format of blocks, whose units have factors of their own.
    pub const fn is_blocks(self) -> bool {
        self.unit_elements() == 32
    }

    /// Whether an [`Affine`](crate::Affine) describes the units, and says where their scales lie.
    pub const fn is_affine(self) -> bool {
        matches!(self, Self::Affine8 | Self::Affine4)
    }

    /// Bytes of a head of `dim` elements whose units lie together, without scales beside them; of as many whole units as there are.
    pub const fn head_bytes(self, dim: usize) -> usize {
        dim / self.unit_elements() * self.unit_bytes()
    }

    /// Whether there is a scale per token and head beside the units, which a write computes.
    pub const fn has_scales(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Fp8E4m3 | Self::Fp8E5m2 => false,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Iq4Nl => false,
            Self::Affine8 | Self::Affine4 => false,
            Self::Int8 => true,
        }
    }

    /// Whether there may be static scales, one per head or per tensor, which every operation reads and none writes. Without any,
    /// they are 1.
    pub const fn has_static_scales(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Int8 => false,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Iq4Nl => false,
            Self::Affine8 | Self::Affine4 => false,
            Self::Fp8E4m3 | Self::Fp8E5m2 => true,
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

impl From<DType> for CacheFormat {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::Bf16 => Self::Bf16,
        }
    }
}

/// A format equals an element type if its units are elements of that type.
impl PartialEq<DType> for CacheFormat {
    fn eq(&self, dtype: &DType) -> bool {
        *self == Self::from(*dtype)
    }
}

impl std::fmt::Display for CacheFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
