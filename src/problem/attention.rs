//! One attention call.

use super::grid::between;
use super::masks::{BitView, ByteView, visible_by_masks};
use super::visibility::Visibility;
use crate::layout::{Packing, Place};
use crate::view::{RawCacheView, RawView};
use std::f32::consts::LOG2_E;

/// One attention call: validated, shared by all tiles. What is large is borrowed: a call on one key would notice its copies.
pub(crate) struct Problem<'a> {
    pub q: &'a RawView,
    pub k: &'a RawCacheView,
    pub v: &'a RawCacheView,
    /// The head size of values, and the packing of `v`.
    pub v_dim: usize,
    pub v_packing: Packing,
    /// The blocks of the Hadamard rotations of K and of V; 0 means none.
    pub k_hadamard: usize,
    pub v_hadamard: usize,
    pub out: &'a RawView,
    /// `[batch, seq, heads]`, contiguous; null if not requested.
    pub lse: *mut f32,
    /// The sequences, and the keys that their queries may see.
    pub visibility: &'a Visibility<'a>,
    /// Query heads per KV head.
    pub group: usize,
    pub scale: f32,
    /// 0 means none.
    pub softcap: f32,
    /// `[batch, seq, heads, keys]` bytes; 0 masks a key.
    pub mask: Option<ByteView>,
    pub bit_mask: Option<BitView<'a>>,
    /// `[batch, seq, heads, keys]`.
    pub bias: Option<RawView>,
    /// One slope per query head.
    pub alibi: Option<&'a [f32]>,
    /// One logit per query head.
    pub sinks: Option<&'a [f32]>,
}

// SAFETY: the pointers come from validated views; tiles write disjoint rows of the outputs and only read the inputs.
unsafe impl Sync for Problem<'_> {}

impl Problem<'_> {
    /// The address of a key.
    ///
    /// # Safety
    /// The key or value is inside the cache.
    #[cfg(target_arch = "x86_64")]
    pub unsafe fn key(&self, batch: usize, position: usize, kv_head: usize) -> *const u8 {
        let (row, slot) = self.visibility.place(batch, position).0;
        // SAFETY: the caller's.
        unsafe { self.k.row(row, slot, kv_head) }
    }

    /// The address of the value in a slot.
    ///
    /// # Safety
    /// The key or value is inside the cache.
    #[inline(always)]
    pub unsafe fn value_at(&self, (row, slot): Place, kv_head: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe {
            match self.v_packing {
                Packing::Rows => self.v.row(row, slot, kv_head),
                Packing::RowPairs => {
                    let half = (slot % 2) as isize * self.v.strides[3] as isize * self.v.dtype.unit_bytes() as isize;
                    self.v.row(row, slot / 2, kv_head).offset(half)
                }
            }
        }
    }

    /// The type whose digits queries have: f32 once they are rotated, as they are where K is.
    #[cfg(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little")))]
    pub fn query_dtype(&self) -> crate::dtype::DType {
        if self.k_hadamard == 0 { self.q.dtype } else { crate::dtype::DType::F32 }
    }

    /// The stride between elements of a value.
    #[inline(always)]
    pub fn value_step(&self) -> isize {
        self.v.strides[3] as isize * if self.v_packing == Packing::RowPairs { 2 } else { 1 }
    }

    /// The address of a value.
    ///
    /// # Safety
    /// The key or value is inside the cache.
    #[cfg(target_arch = "x86_64")]
    pub unsafe fn value(&self, batch: usize, position: usize, kv_head: usize) -> *const u8 {
        let place = self.visibility.place(batch, position).0;
        // SAFETY: the caller's.
        unsafe { self.value_at(place, kv_head) }
    }

    /// The address of the LSE of a query and head.
    pub fn lse(&self, batch: usize, token: usize, head: usize) -> *mut f32 {
        let (row, token) = self.visibility.query(batch, token);
        self.lse.wrapping_add((row * self.q.shape[1] + token) * self.q.shape[2] + head)
    }

    /// The factor from a score to its logit times log2(e), if the call is plain: only a positive scale lies between the two. `scale` is
    /// the call's, or its magnitude if the queries carry its sign.
    #[inline(always)]
    pub fn plain_factor(&self, scale: f32) -> Option<f32> {
        let factor = scale * LOG2_E;
        let plain = self.softcap == 0.0 && self.alibi.is_none() && self.bias.is_none();
        (plain && factor > 0.0 && factor.is_finite()).then_some(factor)
    }

    /// The keys of the block at `base` that are visible to a query and head: those of `keys` and `always_visible` that masks, and positions
    /// of the queries' own, leave visible.
    ///
    /// # Safety
    /// `keys` and `always_visible` are inside the masks.
    #[inline(always)]
    pub unsafe fn visible_bits(
        &self,
        batch: usize,
        row: (u32, u32),
        base: usize,
        keys: (i64, i64),
        always_visible: u64,
    ) -> u64 {
        let bits = between(keys, base) | always_visible;
        if bits == 0 {
            return 0;
        }
        let bits = match self.visibility.query_positions {
            None => bits,
            Some(_) => self.visibility.visible_by_position(batch, row.0 as usize, base, bits),
        };
        // SAFETY: the caller's.
        unsafe { visible_by_masks((self.mask.as_ref(), self.bit_mask.as_ref()), batch, row, base, bits) }
    }
}
