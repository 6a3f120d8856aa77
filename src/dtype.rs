//! Element types.

use half::{bf16, f16};

/// The type of the elements behind a view: what arithmetic reads and writes.
///
/// The values are those of `kvl_dtype` in the C header. The list is closed, so that a match on it names every type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = 0,
    /// IEEE 754 binary16.
    F16 = 1,
    /// bfloat16: the upper half of a binary32.
    Bf16 = 2,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `"f32"`, `"f16"` or `"bf16"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The type called `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// The type with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&t| t as u32 == value)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for super::SaturatingF16 {}
}

/// A Rust type that can stand behind a view: `f32`, [`half::f16`], [`half::bf16`].
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// Its element type.
    const DTYPE: DType;
    /// The nearest value of this type, ties to even.
    fn from_f32(x: f32) -> Self;
    /// The exact value.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

/// An f16 that is written as the largest finite number of its sign where the number is larger.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct SaturatingF16(pub f16);

impl Element for SaturatingF16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let largest = f16::MAX.to_f32();
        // NaN stays NaN.
        Self(f16::from_f32(x.clamp(-largest, largest)))
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.0.to_f32()
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}
