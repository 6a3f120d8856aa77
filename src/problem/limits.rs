//! The largest sizes.

/// The largest head size of attention, of keys and of values.
pub const MAX_HEAD_DIM: usize = 512;

/// The largest `rotary_dim`: cosines and sines of one token live on the stack.
pub const MAX_ROTARY_DIM: usize = 4096;

/// Lanes of the widest vector of any level: rows of scratch memory are padded to a multiple of it.
pub(crate) const MAX_LANES: usize = 16;

const _: () = assert!(MAX_HEAD_DIM.is_multiple_of(MAX_LANES));
