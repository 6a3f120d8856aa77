//! Cache formats: what a cache holds, as opposed to what arithmetic reads and writes ([`DType`]).

use crate::dtype::DType;

/// The storage format of the keys or of the values of a cache.
///
/// A format says how many elements share a *unit*, how many bytes a unit has, and whether units have scales. Shapes
/// count elements, strides count units; a unit of every format here is one element. Keys and values have formats of
/// their own, chosen independently.
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
}

impl CacheFormat {
    /// Every format.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Bf16, Self::Int8, Self::Fp8E4m3, Self::Fp8E5m2];

    /// `"f32"`, `"f16"`, `"bf16"`, `"int8"`, `"fp8_e4m3"` or `"fp8_e5m2"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8E4m3 => "fp8_e4m3",
            Self::Fp8E5m2 => "fp8_e5m2",
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
            Self::Int8 | Self::Fp8E4m3 | Self::Fp8E5m2 => None,
        }
    }

    /// Bytes per unit.
    pub const fn unit_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Int8 | Self::Fp8E4m3 | Self::Fp8E5m2 => 1,
        }
    }

    /// Whether there is a scale per token and head, which a write computes.
    pub const fn has_scales(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Fp8E4m3 | Self::Fp8E5m2 => false,
            Self::Int8 => true,
        }
    }

    /// Whether there may be static scales, one per head or per tensor, which every operation reads and none writes. Without any,
    /// they are 1.
    pub const fn has_static_scales(self) -> bool {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::Int8 => false,
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
