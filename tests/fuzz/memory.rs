//! Memory of one call: blocks of exactly the bytes that the call may access, so that a sanitizer detects any other.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

/// The memory of one call, and its contents before the call.
#[derive(Default)]
pub struct Arena {
    blocks: Vec<Block>,
}

struct Block {
    base: *mut u8,
    layout: Layout,
    /// Unused bytes at the start, so that addresses are not all aligned.
    skip: usize,
    /// Whether its contents after the call are not checked.
    scratch: bool,
    before: Vec<u8>,
}

impl Block {
    fn start(&self) -> *mut u8 {
        self.base.wrapping_add(self.skip)
    }

    fn len(&self) -> usize {
        self.layout.size() - self.skip
    }

    fn now(&self) -> &[u8] {
        // SAFETY: allocated with this size and filled.
        unsafe { std::slice::from_raw_parts(self.base, self.layout.size()) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and released once.
        unsafe { dealloc(self.base, self.layout) }
    }
}

/// NaN in every element type and in every scale, and a negative number in every list.
pub const POISON: u8 = 0xff;

impl Arena {
    /// `bytes` bytes of poison, which begin `skip` bytes after an address that is aligned to 64.
    pub fn block(&mut self, bytes: usize, skip: usize) -> *mut u8 {
        // No block begins at the end of another.
        let skip = if bytes == 0 { skip.max(64) } else { skip };
        let layout = Layout::from_size_align(bytes + skip, 64).expect("a size that has been looked at");
        // SAFETY: the size is not 0, and the memory is filled at once.
        let base = unsafe {
            let base = alloc(layout);
            if base.is_null() {
                handle_alloc_error(layout);
            }
            base.write_bytes(POISON, layout.size());
            base
        };
        self.blocks.push(Block { base, layout, skip, scratch: false, before: Vec::new() });
        base.wrapping_add(skip)
    }

    /// As [`Self::block`], with contents that the call may change in any way.
    pub fn scratch(&mut self, bytes: usize, skip: usize) -> *mut u8 {
        let at = self.block(bytes, skip);
        self.blocks.last_mut().expect("just made").scratch = true;
        at
    }

    /// A copy of some values, `skip` bytes after an address that is aligned to 64.
    pub fn copy<T: Copy>(&mut self, values: &[T], skip: usize) -> *mut T {
        let at = self.block(size_of_val(values), skip);
        // SAFETY: the block has that many bytes, and no other user.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), at, size_of_val(values)) };
        at.cast()
    }

    /// The addresses of the block that `at` is in, or is the end of.
    pub fn bounds(&self, at: *const u8) -> Option<(usize, usize)> {
        let bounds = |block: &Block| (block.start().addr(), block.start().addr() + block.len());
        self.blocks.iter().map(bounds).find(|&(start, end)| (start..=end).contains(&at.addr()))
    }

    /// Copies the contents, to compare them after the call.
    pub fn remember(&mut self) {
        for block in self.blocks.iter_mut().filter(|block| !block.scratch) {
            block.before = block.now().to_vec();
        }
    }

    /// Fails if a byte outside the address ranges `written` has changed.
    pub fn check(&mut self, written: &[(usize, usize)]) {
        for &(start, end) in written {
            let inside =
                |block: &&mut Block| block.start().addr() <= start && end <= block.start().addr() + block.len();
            let block = self.blocks.iter_mut().find(inside).expect("what is written is in one block");
            let from = start - block.base.addr();
            // SAFETY: inside the block; not through `now`, which would borrow all of the block.
            let now = unsafe { std::slice::from_raw_parts(block.base.wrapping_add(from), end - start) };
            block.before[from..from + (end - start)].copy_from_slice(now);
        }
        for block in self.blocks.iter().filter(|block| !block.scratch) {
            if block.before != block.now() {
                let at = block.before.iter().zip(block.now()).position(|(a, b)| a != b);
                panic!("byte {at:?} of a block of {} + {} bytes has changed", block.skip, block.len());
            }
        }
    }
}

/// Entries of `kvl_mask`, which have no element type.
pub const MASK: i32 = -100;

/// Units of `KVL_FORMAT_INT8`, which have scales beside them.
pub const INT8: i32 = 3;

/// Units of `KVL_FORMAT_FP8_E4M3` and `KVL_FORMAT_FP8_E5M2`, which may have static scales.
pub const FP8: [i32; 2] = [4, 5];

/// Units of 32 elements: `KVL_FORMAT_Q8_0` to `KVL_FORMAT_IQ4_NL`.
pub const BLOCKS: [i32; 6] = [6, 7, 8, 9, 10, 11];

/// Integers that `kvl_cache_scales` describes: `KVL_FORMAT_AFFINE8` and `KVL_FORMAT_AFFINE4`.
pub const AFFINE: [i32; 2] = [12, 13];

/// Elements per unit.
pub fn unit_elements(dtype: i32) -> i64 {
    match dtype {
        13 => 2,
        _ if BLOCKS.contains(&dtype) => 32,
        _ => 1,
    }
}

/// Bytes per unit.
pub fn unit_size(dtype: i32) -> usize {
    match dtype {
        MASK | INT8 => 1,
        _ if FP8.contains(&dtype) || AFFINE.contains(&dtype) => 1,
        _ if BLOCKS.contains(&dtype) => [34, 18, 20, 22, 24, 18][dtype as usize - 6],
        0 => 4,
        1 | 2 => 2,
        // Not a type; the library must detect it.
        _ => 4,
    }
}

/// The contents of a view or a mask, valid or not.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    pub data: *mut u8,
    pub dtype: i32,
    pub reserved: i32,
    pub shape: [i64; 4],
    pub strides: [i64; 4],
    pub bytes: usize,
}

impl Tensor {
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// The shape in units, of which a wrong one may have a part at the end.
    pub fn units(&self) -> [i64; 4] {
        let [batch, seq, heads, dim] = self.shape;
        let n = unit_elements(self.dtype);
        [batch, seq, heads, if n == 1 { dim } else { dim.div_euclid(n) + i64::from(dim.rem_euclid(n) > 0) }]
    }

    /// The address range of the elements; `None` if it overflows.
    pub fn reach(&self) -> Option<(usize, usize)> {
        let (mut low, mut high) = (0i128, 1i128);
        for (&n, &stride) in self.units().iter().zip(&self.strides) {
            // Shapes and strides have 64 bits each, so that four products fit.
            let last = (i128::from(n) - 1).checked_mul(i128::from(stride))?;
            if last < 0 { low += last } else { high += last }
        }
        let (at, size) = (self.data.addr() as i128, unit_size(self.dtype) as i128);
        let ends = (at.checked_add(low.checked_mul(size)?)?, at.checked_add(high.checked_mul(size)?)?);
        Some((usize::try_from(ends.0).ok()?, usize::try_from(ends.1).ok()?))
    }

    /// Whether all elements lie in one block.
    pub fn fits(&self, arena: &Arena) -> bool {
        if self.shape.iter().any(|&n| n < 0) {
            return false;
        }
        if self.is_empty() {
            return true;
        }
        let (Some((low, high)), Some((start, end))) = (self.reach(), arena.bounds(self.data)) else { return false };
        start <= low && high <= end
    }

    /// Every [batch, seq, head] with its elements, for a tensor that lies in a block. `None` if there are more than
    /// any block has, which is possible with strides of 0 and would take too long.
    pub fn for_each_row(&self, mut visit: impl FnMut([usize; 3], Row)) {
        let elements = self.shape.iter().try_fold(1, |product: i64, &n| product.checked_mul(n));
        if self.is_empty() || elements.is_none_or(|n| n > 1 << 22) {
            return;
        }
        let ([batch, seq, heads, dim], size) = (self.units(), unit_size(self.dtype) as isize);
        let step = |i: i64, axis: usize| (i * self.strides[axis]) as isize * size;
        // The stride of a single element has no meaning.
        let along = if dim > 1 { step(1, 3) } else { 0 };
        for b in 0..batch {
            for s in 0..seq {
                for h in 0..heads {
                    let at = self.data.wrapping_offset(step(b, 0) + step(s, 1) + step(h, 2));
                    let row = Row { at, step: along, len: dim as usize, dtype: self.dtype };
                    visit([b as usize, s as usize, h as usize], row);
                }
            }
        }
    }
}

/// Elements at equal distances, which may be 0 or negative.
#[derive(Clone, Copy)]
pub struct Row {
    at: *mut u8,
    /// In bytes.
    step: isize,
    len: usize,
    dtype: i32,
}

impl Row {
    fn elements(self) -> impl Iterator<Item = *mut u8> {
        (0..self.len as isize).map(move |i| self.at.wrapping_offset(i * self.step))
    }

    /// The addresses that the elements take up.
    pub fn ranges(self, add: &mut Vec<(usize, usize)>) {
        let size = unit_size(self.dtype);
        if self.step == size as isize {
            add.push((self.at.addr(), self.at.addr() + self.len * size));
        } else {
            add.extend(self.elements().map(|at| (at.addr(), at.addr() + size)));
        }
    }

    /// Fills the row with the low bits of `bits` for each element.
    ///
    /// # Safety
    /// The row is in a block.
    pub unsafe fn fill(self, mut bits: impl FnMut() -> u32) {
        for at in self.elements() {
            // SAFETY: the caller's; unaligned, because a spoiled tensor may be unaligned.
            unsafe {
                match unit_size(self.dtype) {
                    1 => at.write(bits() as u8),
                    // Every pair of bytes is an f16, if `bits` gives such bytes.
                    size if BLOCKS.contains(&self.dtype) => (0..size).for_each(|i| at.add(i).write(bits() as u8)),
                    2 => at.cast::<u16>().write_unaligned(bits() as u16),
                    _ => at.cast::<u32>().write_unaligned(bits()),
                }
            }
        }
    }

    /// Whether no element is infinite or NaN.
    ///
    /// # Safety
    /// The row is in a block.
    pub unsafe fn is_finite(self) -> bool {
        self.elements().all(|at| {
            // SAFETY: the caller's; unaligned as above.
            unsafe {
                match self.dtype {
                    1 => at.cast::<u16>().read_unaligned() & 0x7c00 != 0x7c00,
                    2 => at.cast::<u16>().read_unaligned() & 0x7f80 != 0x7f80,
                    // Every byte is a number.
                    INT8 | 12 | 13 => true,
                    4 => at.read() & 0x7f != 0x7f,
                    5 => at.read() & 0x7c != 0x7c,
                    // The factor, and the minimum of those that have one.
                    8 | 10 => [0, 2].iter().all(|&i| at.add(i).cast::<u16>().read_unaligned() & 0x7c00 != 0x7c00),
                    format if BLOCKS.contains(&format) => at.cast::<u16>().read_unaligned() & 0x7c00 != 0x7c00,
                    _ => at.cast::<f32>().read_unaligned().is_finite(),
                }
            }
        })
    }
}
