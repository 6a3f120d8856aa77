//! Converting copies: the cache write and the explicit repeat of heads.
//!
//! Bound by memory: every source element is read once and every target element written once; widening and narrowing are
//! one to six instructions a vector, which hide behind the loads. Where the level has it ([`Simd::WRITES_SEVERAL`]), four vectors are
//! narrowed at a time: whole vectors are stored, and NaN is looked for once.

use crate::dtype::DType;
use crate::kernels::api::CopyArgs;
use crate::kernels::simd::{LoadStore, MAX_LANES, Outlined, Simd, lines};
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// Whether elements of one type are those of the other.
const fn same<A: LoadStore, B: LoadStore>() -> bool {
    A::DTYPE as u32 == B::DTYPE as u32
}

/// Copies `n` elements that lie together, converting them.
///
/// # Safety
/// `n` elements are readable at `src` and writable at `dst`; the two do not overlap.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, A: LoadStore, B: LoadStore>(s: S, src: *const A, dst: *mut B, n: usize) {
    // Vectors of f32 keep every bit, and for a head of one or two hundred of them a call takes as long as the copy.
    let short = A::DTYPE == DType::F32 && n <= STAGE;
    if const { same::<A, B>() } && !short {
        // SAFETY: the caller's; equal types need no conversion, and memcpy keeps every bit, NaN payloads too.
        unsafe { std::ptr::copy_nonoverlapping(src.cast::<B>(), dst, n) };
        return;
    }
    let mut i = 0;
    while const { S::WRITES_SEVERAL && !same::<A, B>() } && i + 4 * S::LANES <= n {
        let mut v = [s.zero(); 4];
        // SAFETY: four vectors are left.
        unsafe {
            for (j, v) in v.iter_mut().enumerate() {
                *v = A::load(s, src.add(i + j * S::LANES));
            }
            B::store_four(s, dst.add(i), v);
        }
        i += 4 * S::LANES;
    }
    while i + S::LANES <= n {
        // SAFETY: i + LANES <= n.
        unsafe { B::store(s, dst.add(i), A::load(s, src.add(i))) };
        i += S::LANES;
    }
    if i < n {
        // SAFETY: n - i elements are left.
        unsafe { B::store_part(s, dst.add(i), A::load_part(s, src.add(i), n - i), n - i) };
    }
}

/// Copies `heads` vectors, each `repeats` times in a row.
///
/// # Safety
/// Every address that `args` describes is valid; source and target do not overlap.
#[inline(always)]
pub(crate) unsafe fn copy<S: Simd, A: LoadStore, B: LoadStore>(s: S, args: &CopyArgs) {
    // SAFETY: the caller's.
    unsafe { s.outline(Heads { args, types: PhantomData::<(A, B)> }) }
}

/// [`copy`]: one function for all that copies.
struct Heads<'a, A, B> {
    args: &'a CopyArgs,
    types: PhantomData<(A, B)>,
}

impl<A: LoadStore, B: LoadStore> Outlined for Heads<'_, A, B> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let Self { args, .. } = self;
        if !args.second.is_null() {
            for head in 0..args.heads {
                let src = args.src.cast::<A>().wrapping_offset(head as isize * args.src_head);
                let second = args.second.cast::<A>().wrapping_offset(head as isize * args.src_head);
                let dst = args.dst.cast::<B>().wrapping_offset(head as isize * args.dst_head);
                ask_for_next::<S, A, B>(s, args, src, dst, args.dim);
                ask_for_next::<S, A, B>(s, args, second, dst.wrapping_add(args.dim), args.dim);
                // SAFETY: the caller's.
                unsafe { interleave::<S, A, B>(s, [src, second], dst, args.dim) };
            }
            return;
        }
        // Heads that lie one after the other on both sides are one run.
        let dim = args.dim as isize;
        let contiguous = (args.src_dim, args.dst_dim) == (1, 1);
        let together = args.repeats == 1 && contiguous && (args.src_head, args.dst_head) == (dim, dim);
        let (heads, dim) = if together { (1, args.heads * args.dim) } else { (args.heads, args.dim) };
        // A conversion of one vector at a time is slow enough for the hardware's prefetcher; of several, a part at a time is converted, so
        // that prefetches are spread.
        let asks = const { same::<A, B>() } && (args.src_prefetch, args.dst_prefetch) != (0, 0);
        let by_parts = const { S::WRITES_SEVERAL } && args.src_prefetch != 0 && contiguous;
        for head in 0..heads {
            let src = args.src.cast::<A>().wrapping_offset(head as isize * args.src_head);
            for repeat in 0..args.repeats {
                let target = (head * args.repeats + repeat) as isize;
                let dst = args.dst.cast::<B>().wrapping_offset(target * args.dst_head);
                if asks {
                    let src_prefetch = if repeat == 0 { args.src_prefetch } else { 0 };
                    ask_for_next::<S, A, B>(s, &CopyArgs { src_prefetch, ..*args }, src, dst, dim);
                }
                if const { same::<A, B>() } {
                    // SAFETY: the caller's; equal types need no conversion.
                    unsafe {
                        if contiguous {
                            run::<S, A, B>(s, src, dst, dim);
                        } else {
                            for i in 0..dim as isize {
                                *dst.wrapping_offset(i * args.dst_dim) =
                                    *src.cast::<B>().wrapping_offset(i * args.src_dim);
                            }
                        }
                    }
                    continue;
                }
                let mut first = 0;
                while first < dim {
                    let n = if by_parts { (dim - first).min(STAGE) } else { dim };
                    // Vectors with strides are not parted.
                    let (src, dst) = (src.wrapping_add(first), dst.wrapping_add(first));
                    if by_parts {
                        ask_for_next::<S, A, B>(s, args, src, dst, n);
                    }
                    // SAFETY: the caller's.
                    unsafe { convert(s, (src, args.src_dim), (dst, args.dst_dim), n, &Same) };
                    first += n;
                }
            }
        }
    }
}

/// Asks for what is copied after a vector of `dim` elements, which goes from `src` to `dst`: where tokens are a page or more
/// apart, the hardware's prefetcher starts anew with each.
#[inline(always)]
pub(crate) fn ask_for_next<S: Simd, A: LoadStore, B: LoadStore>(
    s: S,
    args: &CopyArgs,
    src: *const A,
    dst: *const B,
    dim: usize,
) {
    prefetch_next(s, args, (src.cast(), dim * size_of::<A>()), (dst.cast(), dim * size_of::<B>()));
}

/// The same of what is copied after some bytes, which go to others.
#[inline(always)]
pub(crate) fn prefetch_next<S: Simd>(s: S, args: &CopyArgs, from: (*const u8, usize), to: (*const u8, usize)) {
    if args.src_prefetch != 0 {
        lines(from.0, from.1).for_each(|line| s.prefetch(line.wrapping_offset(args.src_prefetch)));
    }
    if args.dst_prefetch != 0 {
        lines(to.0, to.1).for_each(|line| s.prefetch_write(line.wrapping_offset(args.dst_prefetch)));
    }
}

/// Copies `n` elements of each source, in turns.
///
/// # Safety
/// As [`run`], with `2 * n` elements at `dst`.
#[inline(always)]
unsafe fn interleave<S: Simd, A: LoadStore, B: LoadStore>(s: S, src: [*const A; 2], dst: *mut B, n: usize) {
    if const { same::<A, B>() } {
        let [first, second] = src;
        for i in 0..n {
            // SAFETY: the caller's; equal types need no conversion.
            unsafe { *dst.cast::<[B; 2]>().add(i) = [*first.add(i).cast(), *second.add(i).cast()] };
        }
        return;
    }
    let mut i = 0;
    // SAFETY: the caller's; what is left at the end goes through a buffer.
    unsafe {
        while i + S::LANES <= n {
            let [low, high] = s.interleave(A::load(s, src[0].add(i)), A::load(s, src[1].add(i)));
            B::store(s, dst.add(2 * i), low);
            B::store(s, dst.add(2 * i + S::LANES), high);
            i += S::LANES;
        }
        if i < n {
            let part = n - i;
            let mut last = [B::default(); 2 * MAX_LANES];
            let [low, high] = s.interleave(A::load_part(s, src[0].add(i), part), A::load_part(s, src[1].add(i), part));
            B::store(s, last.as_mut_ptr(), low);
            B::store(s, last.as_mut_ptr().add(S::LANES), high);
            std::ptr::copy_nonoverlapping(last.as_ptr(), dst.add(2 * i), 2 * part);
        }
    }
}

/// Elements a staging buffer holds.
pub(crate) const STAGE: usize = 256;

/// What is made of numbers that lie together. No closure: that would be a function of its own, without the level's features.
pub(crate) trait Converted<A, B> {
    /// Those of a vector from number `first` on.
    ///
    /// # Safety
    /// `n` numbers are readable at `src` and writable at `dst`.
    unsafe fn run<S: Simd>(&self, s: S, first: usize, src: *const A, dst: *mut B, n: usize);
}

/// The same numbers.
struct Same;

impl<A: LoadStore, B: LoadStore> Converted<A, B> for Same {
    #[inline(always)]
    unsafe fn run<S: Simd>(&self, s: S, _: usize, src: *const A, dst: *mut B, n: usize) {
        // SAFETY: the caller's.
        unsafe { run::<S, A, B>(s, src, dst, n) };
    }
}

/// Converts a vector of `n` numbers with any strides; through buffers, a part at a time, if they do not lie together, so that all are
/// converted by the same instructions.
///
/// # Safety
/// The numbers are readable and writable.
#[inline(always)]
pub(crate) unsafe fn convert<S: Simd, A: Copy, B: Copy>(
    s: S,
    (src, src_dim): (*const A, isize),
    (dst, dst_dim): (*mut B, isize),
    n: usize,
    converted: &impl Converted<A, B>,
) {
    let mut from = MaybeUninit::<[A; STAGE]>::uninit();
    let mut to = MaybeUninit::<[B; STAGE]>::uninit();
    let (from, to): (*mut A, *mut B) = (from.as_mut_ptr().cast(), to.as_mut_ptr().cast());
    let mut first = 0;
    while first < n {
        let len = if (src_dim, dst_dim) == (1, 1) { n } else { (n - first).min(STAGE) };
        let mut source = src.wrapping_offset(first as isize * src_dim);
        let target = dst.wrapping_offset(first as isize * dst_dim);
        // SAFETY: the caller's; len fits both buffers where they are used.
        unsafe {
            if src_dim != 1 {
                gather(source, src_dim, from, len);
                source = from;
            }
            converted.run(s, first, source, if dst_dim == 1 { target } else { to }, len);
            if dst_dim != 1 {
                scatter(to, target, dst_dim, len);
            }
        }
        first += len;
    }
}

// Strides between elements are rare, and many kernels end here: one function for all.

/// # Safety
/// `n` elements are readable at `src` with that stride, and writable at `dst` without.
#[inline(never)]
pub(crate) unsafe fn gather<T: Copy>(src: *const T, stride: isize, dst: *mut T, n: usize) {
    for i in 0..n {
        // SAFETY: the caller's.
        unsafe { *dst.add(i) = *src.wrapping_offset(i as isize * stride) };
    }
}

/// # Safety
/// `n` elements are readable at `src`, and writable at `dst` with that stride.
#[inline(never)]
pub(crate) unsafe fn scatter<T: Copy>(src: *const T, dst: *mut T, stride: isize, n: usize) {
    for i in 0..n {
        // SAFETY: the caller's.
        unsafe { *dst.wrapping_offset(i as isize * stride) = *src.add(i) };
    }
}
