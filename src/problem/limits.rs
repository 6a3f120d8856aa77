//! The largest sizes.

/// The largest head size of keys and of values in attention.
pub const MAX_HEAD_DIM: usize = 1024;

/// The largest `rotary_dim`, because cosines and sines of one token are on the stack.
pub const MAX_ROTARY_DIM: usize = 4096;

/// The largest block of a [Hadamard rotation](crate::hadamard).
pub const MAX_HADAMARD_BLOCK: usize = 512;

/// Lanes of the widest vector of any level. Rows of scratch memory are padded to a multiple of it.
pub(crate) const MAX_LANES: usize = 16;

const _: () = assert!(MAX_HEAD_DIM.is_multiple_of(MAX_LANES));
