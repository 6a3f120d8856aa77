//! The data of a validated call: tensors, visible keys, masks, the grid of blocks and chunks, tiles, rotations,
//! limits.
//!
//! This layer is between the operations, which check the caller's arguments and build these types, and the kernels,
//! which read them. It has no descriptors, no error sentences and no instructions.
//!
//! | module | what |
//! | --- | --- |
//! | [`attention`] | one attention call: tensors, scale, softcap, bias, slopes, sink logits |
//! | [`visibility`] | which sequences a call has, and which keys their queries may see by position |
//! | [`masks`] | boolean and bit masks: which of a block's keys they let through |
//! | [`grid`] | blocks and chunks of keys: the absolute grid on which every sum is taken |
//! | [`tile`] | the query rows that one kernel call works on |
//! | [`affine`] | which affine units are read where they lie |
//! | [`rotation`] | how RoPE pairs elements |
//! | [`limits`] | the largest sizes |

pub(crate) mod affine;
pub(crate) mod attention;
pub(crate) mod grid;
pub(crate) mod limits;
pub(crate) mod masks;
pub(crate) mod rotation;
pub(crate) mod tile;
pub(crate) mod visibility;
