//! Views without a lifetime: checks of shape, strides and memory.

use super::affine::RawAffine;
use crate::dtype::DType;
use crate::error::{Error, Result, Status, ensure};
use crate::format::CacheFormat;

/// Axis numbers of a view.
pub(crate) const BATCH: usize = 0;
pub(crate) const SEQ: usize = 1;
pub(crate) const HEADS: usize = 2;
pub(crate) const DIM: usize = 3;

/// The longest axis: lengths and positions have 32 bits.
pub(crate) const MAX_AXIS: usize = i32::MAX as usize;

/// What a view's units are: elements of a [`DType`], or units of a [`CacheFormat`].
pub(crate) trait Units: Copy + std::fmt::Debug + std::fmt::Display + PartialEq {
    /// Bytes per unit.
    fn size(self) -> usize;

    /// Elements per unit, along the last axis.
    fn elements(self) -> usize;

    /// The alignment of a unit in bytes: a power of two.
    fn align(self) -> usize;

    /// Whether an address is aligned to a unit. To divide an address takes a hundred cycles on some CPUs, which a small call would
    /// notice.
    #[inline(always)]
    fn is_aligned(self, address: usize) -> bool {
        address & (self.align() - 1) == 0
    }
}

impl Units for DType {
    #[inline(always)]
    fn size(self) -> usize {
        self.size()
    }

    #[inline(always)]
    fn elements(self) -> usize {
        1
    }

    #[inline(always)]
    fn align(self) -> usize {
        self.size()
    }
}

impl Units for CacheFormat {
    #[inline(always)]
    fn size(self) -> usize {
        self.unit_bytes()
    }

    #[inline(always)]
    fn elements(self) -> usize {
        self.unit_elements()
    }

    #[inline(always)]
    fn align(self) -> usize {
        self.unit_align()
    }
}

/// A view without a lifetime: what the C ABI passes and what the operations work on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawView<U = DType> {
    /// Element `[0, 0, 0, 0]`.
    pub data: *mut u8,
    pub dtype: U,
    /// In elements.
    pub shape: [usize; 4],
    /// In units.
    pub strides: [i64; 4],
    /// Bytes from `data` to the end of the buffer, if known.
    pub bytes: Option<usize>,
}

// SAFETY: a raw view is an address and numbers; the code that dereferences it is responsible for the access.
unsafe impl<U> Send for RawView<U> {}
// SAFETY: as above.
unsafe impl<U> Sync for RawView<U> {}

/// The range of bytes that a view covers, relative to its data pointer: `low..high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub low: isize,
    pub high: isize,
}

impl RawView {
    /// `n` consecutive floats.
    pub fn floats(data: *mut f32, n: usize) -> Self {
        let (dtype, shape, strides) = (DType::F32, [1, 1, 1, n], [0, 0, 0, 1]);
        Self { data: data.cast(), dtype, shape, strides, bytes: None }
    }

    /// The same elements as units of a cache.
    pub fn units(self) -> RawView<CacheFormat> {
        let Self { data, dtype, shape, strides, bytes } = self;
        RawView { data, dtype: dtype.into(), shape, strides, bytes }
    }

    pub fn axis_name(axis: usize) -> &'static str {
        ["batch", "seq", "heads", "dim"][axis]
    }
}

impl<U: Units> RawView<U> {
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// The indices `start .. start + len` of an axis.
    pub fn narrow(mut self, axis: usize, start: usize, len: usize) -> Result<Self> {
        let n = self.shape[axis];
        ensure!(
            start.checked_add(len).is_some_and(|end| end <= n),
            Shape,
            "{start} + {len} is past the end of the {} axis, which has {n}",
            RawView::axis_name(axis)
        );
        let per_unit = self.unit_elements(axis);
        ensure!(
            per_unit == 1 || start.is_multiple_of(per_unit) && len.is_multiple_of(per_unit),
            Unsupported,
            "elements {start} to {} of the {n} of a head are wanted, but in {} each {per_unit} form a unit",
            start + len,
            self.dtype
        );
        self.shape[axis] = len;
        if !self.is_empty() {
            let units = (start / per_unit) as isize * self.strides[axis] as isize;
            self.data = self.data.wrapping_offset(units * self.dtype.size() as isize);
        }
        Ok(self)
    }

    /// Elements of an axis per unit.
    #[inline(always)]
    fn unit_elements(&self, axis: usize) -> usize {
        if axis == DIM { self.dtype.elements() } else { 1 }
    }

    /// The shape in units. That of a validated view has no remainder.
    #[inline(always)]
    pub fn unit_shape(&self) -> [usize; 4] {
        let [batch, seq, heads, dim] = self.shape;
        [batch, seq, heads, if self.dtype.elements() == 1 { dim } else { dim / self.dtype.elements() }]
    }

    /// Bytes of a head whose units lie together.
    pub fn head_bytes(&self) -> usize {
        self.unit_shape()[DIM].saturating_mul(self.dtype.size())
    }

    /// The number of elements; `usize::MAX` if it overflows.
    pub fn elements(&self) -> usize {
        rows(self.shape).saturating_mul(self.shape[DIM])
    }

    /// Checks shape, strides and buffer; `name` is the argument's name in messages.
    #[inline(always)]
    pub fn validate(&self, name: &str) -> Result<Extent> {
        match self.usual() {
            Some(extent) => Ok(extent),
            None => self.validate_any(name),
        }
    }

    /// The extent of a valid view of plain units, if its axes are so short and its strides so small, none of them negative, that nothing
    /// overflows.
    #[inline(always)]
    fn usual(&self) -> Option<Extent> {
        let ([a, b, c, d], [sa, sb, sc, sd]) = (self.shape.map(|n| n as u64), self.strides.map(|stride| stride as u64));
        let (small, address) = ((a | b | c | d | sa | sb | sc | sd) < SMALL as u64, self.data.addr());
        if !small || self.is_empty() || address == 0 || self.dtype.elements() > 1 || !self.dtype.is_aligned(address) {
            return None;
        }
        let high = (1 + (a - 1) * sa + (b - 1) * sb + (c - 1) * sc + (d - 1) * sd) * self.dtype.size() as u64;
        let high = usize::try_from(high).ok()?;
        if self.bytes.is_some_and(|bytes| high > bytes) || address.checked_add(high).is_none() {
            return None;
        }
        Some(Extent { low: 0, high: high as isize })
    }

    /// [`Self::validate`] of any view.
    #[inline(never)]
    fn validate_any(&self, name: &str) -> Result<Extent> {
        for (axis, &n) in self.shape.iter().enumerate() {
            ensure!(n <= MAX_AXIS, Shape, "{name}: axis {axis} has {n} elements, more than {MAX_AXIS}");
        }
        if self.is_empty() {
            return Ok(Extent { low: 0, high: 0 });
        }
        ensure!(!self.data.is_null(), NullPointer, "{name}: data is null, but the shape is {:?}", self.shape);
        let size = self.dtype.size();
        if self.dtype.elements() > 1 {
            self.validate_blocks(name)?;
        }
        ensure!(
            self.dtype.is_aligned(self.data.addr()),
            Bounds,
            "{name}: data at {:#x} is not aligned to its {size}-byte elements",
            self.data.addr()
        );
        let (low, high) = reach(name, self.data.addr(), size, self.unit_shape(), self.strides)?;
        if let Some(bytes) = self.bytes {
            ensure!(
                low >= 0,
                Bounds,
                "{name}: strides {:?} reach {} bytes before the start of its buffer",
                self.strides,
                -low
            );
            ensure!(
                high as usize <= bytes,
                Bounds,
                "{name}: shape {:?} with strides {:?} reaches byte {high} of a buffer of {bytes}",
                self.shape,
                self.strides
            );
        }
        Ok(Extent { low, high })
    }

    /// What [`Self::validate`] checks of units of several elements.
    #[cold]
    fn validate_blocks(&self, name: &str) -> Result<()> {
        let (units, dim, n, align) = (self.dtype, self.shape[DIM], self.dtype.elements(), self.dtype.align());
        ensure!(
            dim.is_multiple_of(n),
            Shape,
            "{name} is {units}, whose units have {n} elements, but has dim = {dim}, which is no multiple"
        );
        ensure!(
            dim == n || self.strides[DIM] == 1,
            Stride,
            "{name} is {units}, whose units lie one after the other in a head, but the stride of dim is {} and not 1",
            self.strides[DIM]
        );
        ensure!(
            units.is_aligned(self.data.addr()),
            Bounds,
            "{name}: data at {:#x} is not aligned to {align} bytes, as units of {units} are",
            self.data.addr()
        );
        Ok(())
    }

    /// Whether every stride of a view that is not empty is positive and exceeds what the axes behind it reach, as in most tensors: no two
    /// units share memory.
    #[inline(always)]
    fn is_nested(&self) -> bool {
        let (n, strides) = (self.unit_shape(), self.strides);
        let (mut reach, mut nested) = (0u64, true);
        for axis in [DIM, HEADS, SEQ, BATCH] {
            let (last, stride) = (n[axis] as u64 - 1, strides[axis] as u64);
            // No product of small numbers overflows.
            nested &= last == 0 || (last | stride) < SMALL as u64 && stride > reach;
            reach = reach.wrapping_add(last.wrapping_mul(stride));
        }
        nested
    }

    /// As [`Self::validate`]; also checks that no two units share memory.
    pub fn validate_output(&self, name: &str) -> Result<Extent> {
        let extent = self.validate(name)?;
        if self.is_empty() || self.is_nested() {
            return Ok(extent);
        }
        let shape = self.unit_shape();
        let mut axes: [_; 4] = std::array::from_fn(|axis| (self.strides[axis].unsigned_abs(), shape[axis]));
        // Most tensors have their axes in order, from the greatest stride on.
        axes.reverse();
        if !axes.is_sorted() {
            axes.sort_unstable();
        }
        // Sorted by stride: each stride must exceed the extent of all smaller ones. That of an axis of one element may be any number.
        let mut reach = 0u128;
        for (stride, n) in axes.into_iter().filter(|&(_, n)| n > 1) {
            ensure!(
                stride as u128 > reach,
                Stride,
                "{name}: elements of an output share memory (shape {:?}, strides {:?})",
                self.shape,
                self.strides
            );
            reach += stride as u128 * (n as u128 - 1);
        }
        Ok(extent)
    }

    /// Whether an element of `self` may share a byte with one of `other`; false positives are possible.
    pub fn overlaps<V: Units>(&self, other: &RawView<V>) -> bool {
        let (Ok(a), Ok(b)) = (self.validate("view"), other.validate("view")) else {
            return true;
        };
        self.overlaps_within(a, other, b)
    }

    /// As [`Self::overlaps`], with known extents.
    pub fn overlaps_within<V: Units>(&self, a: Extent, other: &RawView<V>, b: Extent) -> bool {
        if self.is_empty() || other.is_empty() {
            return false;
        }
        // Valid views are inside the address space.
        let touched = |data: *mut u8, extent: Extent| {
            let at = data.addr();
            (at.wrapping_add_signed(extent.low), at.wrapping_add_signed(extent.high))
        };
        let ((a0, a1), (b0, b1)) = (touched(self.data, a), touched(other.data, b));
        if a1 <= b0 || b1 <= a0 {
            return false;
        }
        // Slices of one buffer (K and V side by side, shards of the heads) can interleave without overlap. With equal
        // strides they overlap if and only if their distance is a sum of multiples of strides.
        if self.strides != other.strides || self.dtype.size() != other.dtype.size() {
            return true;
        }
        let shapes = (self.unit_shape(), other.unit_shape());
        let size = self.dtype.size() as i128;
        let distance = other.data.addr() as i128 - self.data.addr() as i128;
        if distance % size != 0 {
            return true;
        }
        let mut axes: [(i128, i128, i128); 4] = [(0, 0, 0); 4];
        for (axis, slot) in axes.iter_mut().enumerate() {
            // The range of steps along this axis between an element of `self` and one of `other`.
            *slot = ((self.strides[axis] as i128).abs(), -(shapes.1[axis] as i128 - 1), shapes.0[axis] as i128 - 1);
            if self.strides[axis] < 0 {
                *slot = (slot.0, -slot.2, -slot.1);
            }
        }
        axes.sort_by_key(|a| std::cmp::Reverse(a.0));
        reachable(distance / size, &axes)
    }

    /// Whether an element of `self` shares a byte with one of `other`, if their strides in bytes agree along all axes on which both
    /// have several; otherwise this is not known.
    pub fn interleaves<V: Units>(&self, other: &RawView<V>) -> Option<bool> {
        // Elements that lie together are one.
        fn runs<U: Units>(view: &RawView<U>) -> ([i128; 4], [usize; 4], i128) {
            let (size, mut shape) = (view.dtype.size() as i128, view.unit_shape());
            let together = view.strides[DIM] == 1 || shape[DIM] == 1;
            let bytes = if together { shape[DIM] as i128 * size } else { size };
            if together {
                shape[DIM] = 1;
            }
            (view.strides.map(|stride| stride as i128 * size), shape, bytes)
        }
        let ((own, shape, bytes), (others, of_other, other_bytes)) = (runs(self), runs(other));
        let mut axes: [(i128, i128, i128); 5] = [(1, 1 - other_bytes, bytes - 1); 5];
        for axis in 0..4 {
            let stride = if shape[axis] > 1 { own[axis] } else { others[axis] };
            if of_other[axis] > 1 && others[axis] != stride {
                return None;
            }
            let (back, on) = (of_other[axis] as i128 - 1, shape[axis] as i128 - 1);
            axes[axis] = if stride < 0 { (-stride, -on, back) } else { (stride, -back, on) };
        }
        axes.sort_by_key(|a| std::cmp::Reverse(a.0));
        Some(reachable(other.data.addr() as i128 - self.data.addr() as i128, &axes))
    }

    /// The address of element `[b, s, h, 0]`.
    ///
    /// # Safety
    /// The view is validated and the indices are inside its shape.
    #[inline(always)]
    pub unsafe fn row(&self, b: usize, s: usize, h: usize) -> *mut u8 {
        let units = b as i64 * self.strides[BATCH] + s as i64 * self.strides[SEQ] + h as i64 * self.strides[HEADS];
        // SAFETY: the indices are inside the shape, so that the sum stays in the validated extent.
        unsafe { self.data.offset(units as isize * self.dtype.size() as isize) }
    }

    /// Fails unless `self` and `other` agree in `axis`.
    #[inline(always)]
    pub fn same_axis<V: Units>(&self, name: &str, other: &RawView<V>, other_name: &str, axis: usize) -> Result<()> {
        let (n, wanted) = (self.shape[axis], other.shape[axis]);
        if n == wanted { Ok(()) } else { Err(differs((name, n), (other_name, wanted), axis)) }
    }
}

/// The error of two tensors that disagree about an axis.
#[cold]
fn differs((name, n): (&str, usize), (other, wanted): (&str, usize), axis: usize) -> Error {
    let axis = RawView::axis_name(axis);
    Error::new(Status::Shape, format!("{name} has {axis} = {n}, but {other} has {wanted}"))
}

/// Axes and strides up to this are so small that no extent overflows.
const SMALL: i64 = 1 << 27;

/// The range of bytes of units of `size` bytes around the address `at`; the shape, in units, has no 0 and no axis above
/// [`MAX_AXIS`].
pub(crate) fn reach(
    name: &str,
    at: usize,
    size: usize,
    shape: [usize; 4],
    strides: [i64; 4],
) -> Result<(isize, isize)> {
    // The usual case.
    if shape.iter().all(|&n| n as i64 <= SMALL) && strides.iter().all(|&n| n.unsigned_abs() <= SMALL as u64) {
        let (mut low, mut high) = (0, 1);
        for axis in 0..4 {
            let reach = (shape[axis] as i64 - 1) * strides[axis];
            if reach < 0 { low += reach } else { high += reach }
        }
        let bytes = |units: i64| isize::try_from(units * size as i64);
        if let (Ok(low), Ok(high)) = (bytes(low), bytes(high))
            && at.checked_add_signed(low).is_some()
            && at.checked_add_signed(high).is_some()
        {
            return Ok((low, high));
        }
    }
    let (mut low, mut high) = (0i128, 1i128);
    for axis in 0..4 {
        // At most 2^31 * 2^63 per axis, so that the sum of four fits into an i128.
        let reach = (shape[axis] as i128 - 1) * strides[axis] as i128;
        if reach < 0 { low += reach } else { high += reach }
    }
    let (low, high) = (low * size as i128, high * size as i128);
    let limit = isize::MAX as i128;
    ensure!(
        low >= -limit && high <= limit && high - low <= limit,
        Stride,
        "{name}: shape {shape:?} with strides {strides:?} spans {} bytes, more than an address space holds",
        high - low
    );
    ensure!(
        at as i128 + low >= 0 && at as i128 + high <= usize::MAX as i128,
        Stride,
        "{name}: shape {shape:?} with strides {strides:?} leaves the address space"
    );
    Ok((low as isize, high as isize))
}

/// Whether `target` is a sum of `step * stride`, `step` in its range, over axes sorted from the largest stride.
fn reachable(target: i128, axes: &[(i128, i128, i128)]) -> bool {
    let Some((&(stride, low, high), rest)) = axes.split_first() else {
        return target == 0;
    };
    if stride == 0 {
        return reachable(target, rest);
    }
    // The extent of the smaller strides limits the candidates to a few steps.
    let slack_high: i128 = rest.iter().map(|a| a.0 * a.2).sum();
    let slack_low: i128 = rest.iter().map(|a| a.0 * a.1).sum();
    let first = (target - slack_high).div_euclid(stride).max(low);
    let last = ((target - slack_low).div_euclid(stride) + 1).min(high);
    if last - first > 64 {
        return true;
    }
    (first..=last).any(|step| reachable(target - step * stride, rest))
}

/// The number of `[batch, seq, heads]` of a shape; `usize::MAX` if it overflows.
pub(crate) fn rows(shape: [usize; 4]) -> usize {
    shape[..DIM].iter().fold(1, |product, &n| product.saturating_mul(n))
}

/// Strides of a tensor in the order of its axes (BSHD).
pub(crate) fn contiguous(shape: [usize; 4]) -> [i64; 4] {
    let [_, s, h, d] = shape.map(|n| n as i64);
    [s.saturating_mul(h).saturating_mul(d), h.saturating_mul(d), d, 1]
}

/// Strides of a tensor `[batch, seq, heads, dim]` with the order batch, heads, seq, dim in memory (BHSD).
pub(crate) fn bhsd(shape: [usize; 4]) -> [i64; 4] {
    let [_, s, h, d] = shape.map(|n| n as i64);
    [s.saturating_mul(h).saturating_mul(d), d, s.saturating_mul(d), 1]
}

/// The keys or the values of a cache without a lifetime: units, and the scales beside them if the format has any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawCacheView {
    pub units: RawView<CacheFormat>,
    /// `[batch, seq, heads, 1]` of f32 or f16, of the same first three axes as the units. Static scales may be absent, and have the
    /// stride 0 along the first two axes.
    pub scales: Option<RawView>,
    /// What describes units of an affine format, with its scales.
    pub affine: Option<RawAffine>,
}

impl std::ops::Deref for RawCacheView {
    type Target = RawView<CacheFormat>;
    #[inline(always)]
    fn deref(&self) -> &RawView<CacheFormat> {
        &self.units
    }
}

impl From<RawView> for RawCacheView {
    fn from(view: RawView) -> Self {
        Self { units: view.units(), scales: None, affine: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_slices_do_not_overlap() {
        let mut data = [0f32; 64];
        let base: *mut u8 = data.as_mut_ptr().cast();
        let at = |offset: usize, shape| RawView {
            data: base.wrapping_add(offset * 4),
            dtype: DType::F32,
            shape,
            strides: [0, 16, 4, 1],
            bytes: None,
        };
        // Heads 0..2 and 2..4 of four tokens.
        assert!(!at(0, [1, 4, 2, 4]).overlaps(&at(8, [1, 4, 2, 4])));
        assert!(at(0, [1, 4, 3, 4]).overlaps(&at(8, [1, 4, 2, 4])));
        assert!(at(8, [1, 4, 2, 4]).overlaps(&at(0, [1, 4, 3, 4])));
        assert!(at(0, [1, 4, 2, 4]).overlaps(&at(1, [1, 4, 2, 4])));
        assert!(!at(0, [1, 2, 4, 4]).overlaps(&at(32, [1, 2, 4, 4])));
        assert!(at(0, [1, 4, 2, 4]).overlaps(&at(16, [1, 2, 2, 4])));
    }
}
