//! The pairs of elements in RoPE.

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Pairing {
    /// Elements `2i` and `2i + 1`: the original paper, Meta's Llama code, llama.cpp's Llama files.
    Interleaved = 0,
    /// Elements `i` and `i + rotary_dim / 2`: GPT-NeoX, Grok-1, Hugging Face.
    HalfSplit = 1,
}

impl Pairing {
    /// The pairing with this value in the C header, if there is one.
    pub fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::Interleaved),
            1 => Some(Self::HalfSplit),
            _ => None,
        }
    }
}
