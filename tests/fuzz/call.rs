//! One random call: its numbers, its memory, and the checks after it.

use crate::abi::*;
use crate::common::Rng;
use crate::memory::{AFFINE, Arena, BLOCKS, FP8, INT8, MASK, POISON, Row, Tensor, unit_elements, unit_size};
use std::ffi::c_void;
use std::mem::offset_of;

/// Objects that live for the whole run.
pub struct World {
    /// A context for every level of this CPU.
    pub contexts: Vec<*mut kvl_context>,
    pub pool: *mut kvl_thread_pool,
    /// A runner of that pool.
    pub pool_runner: kvl_parallel_runner,
    /// Bits of random numbers in the range of unit normals, by element type, so that sums of products are finite.
    pub numbers: [Vec<u32>; 3],
}

impl World {
    /// Contexts for every level of this CPU, and a pool of two threads.
    pub fn new() -> Self {
        let mut contexts = Vec::new();
        for max_isa in 1..32 {
            // Every second one saturates f16.
            let (struct_size, flags) = (size_of::<kvl_context_params>(), contexts.len() as u32 % 2);
            let params = kvl_context_params { struct_size, max_isa, flags };
            if kvl_isa_available(max_isa) == 1 {
                let mut context = std::ptr::null_mut();
                // SAFETY: a struct of the right size and space for the result.
                assert_eq!(unsafe { kvl_context_create(&raw const params, &raw mut context) }, 0);
                contexts.push(context);
            }
        }
        let mut pool = std::ptr::null_mut();
        let mut pool_runner = kvl_parallel_runner { struct_size: size_of::<kvl_parallel_runner>(), ..zeroed() };
        // SAFETY: space for the results, and a pool that lives as long as the process.
        unsafe {
            assert_eq!(kvl_thread_pool_create(2, &raw mut pool), 0);
            assert_eq!(kvl_thread_pool_runner(pool, &raw mut pool_runner), 0);
        }
        let mut rng = Rng::new(1);
        let values: Vec<f32> = (0..1021).map(|_| rng.f32()).collect();
        let numbers = [
            values.iter().map(|x| x.to_bits()).collect(),
            values.iter().map(|&x| half::f16::from_f32(x).to_bits().into()).collect(),
            values.iter().map(|&x| half::bf16::from_f32(x).to_bits().into()).collect(),
        ];
        Self { contexts, pool, pool_runner, numbers }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // SAFETY: created by the library, and released once.
        unsafe {
            self.contexts.iter().for_each(|&context| kvl_context_destroy(context));
            kvl_thread_pool_destroy(self.pool);
        }
    }
}

/// Lists with more entries than this are omitted.
const LONGEST: i64 = 1 << 20;

const SIZES: [i64; 22] = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    15,
    16,
    17,
    63,
    64,
    65,
    511,
    513,
    -1,
    i64::MIN,
    i64::MAX,
    i32::MAX as i64,
    1 << 31,
    1 << 32,
];
const INTS: [i32; 15] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 64, -1, i32::MIN, i32::MAX];

/// A list in memory, and its entries.
#[derive(Default)]
pub struct List<T> {
    pub at: *const T,
    pub values: Vec<T>,
}

pub struct Call<'a> {
    pub rng: Rng,
    pub world: &'a World,
    pub arena: Arena,
    /// The probability that a number is spoiled; 0 in two of five calls, which must succeed.
    rate: f64,
    /// An argument is invalid, or may be.
    spoiled: bool,
    /// The runner runs no task.
    broken: bool,
    /// All bits are random, so that NaN is among the numbers.
    wild: bool,
    /// The memory that views describe; it must lie in blocks if the call succeeds.
    tensors: Vec<Tensor>,
    /// Bytes that a call that succeeds may write.
    written: Vec<(usize, usize)>,
    /// Elements that must be finite after the call.
    results: Vec<Row>,
    /// Scales of affine units, each followed by a zero point: their address, their number in a head, and what `k_affine` or `v_affine` is.
    affine: Vec<(*mut u8, i64, i32)>,
    /// Tokens that share scales may be moved one by one, and are filled by the caller.
    pub moves: bool,
}

impl<'a> Call<'a> {
    pub fn new(mut rng: Rng, world: &'a World) -> Self {
        let rate = if rng.chance(0.4) { 0.0 } else { 0.1 };
        let wild = rng.chance(0.1);
        Self {
            rng,
            world,
            arena: Arena::default(),
            rate,
            spoiled: false,
            affine: Vec::new(),
            moves: false,
            broken: false,
            wild,
            tensors: Vec::new(),
            written: Vec::new(),
            results: Vec::new(),
        }
    }

    /// Sets the probability of spoiling a number, for functions with more or fewer numbers.
    pub fn spoil_rate(&mut self, rate: f64) {
        if self.rate > 0.0 {
            self.rate = rate;
        }
    }

    /// Fills every second call's inputs with any bits, for functions whose results are compared.
    pub fn often_wild(&mut self) {
        self.wild |= self.rng.chance(0.5);
    }

    /// Whether to spoil the next number.
    pub fn hit(&mut self) -> bool {
        let hit = self.rng.chance(self.rate);
        self.spoiled |= hit;
        hit
    }

    /// Whether the whole call is valid.
    pub fn is_right(&self) -> bool {
        self.rate == 0.0
    }

    /// The following arguments may be invalid.
    pub fn allow_error(&mut self) {
        self.spoiled = true;
    }

    /// Runs `f` without spoiling numbers.
    pub fn rightly<T>(&mut self, what: impl FnOnce(&mut Self) -> T) -> T {
        let rate = std::mem::replace(&mut self.rate, 0.0);
        let result = what(self);
        self.rate = rate;
        result
    }

    pub fn maybe(&mut self, probability: f64) -> bool {
        self.rng.chance(probability)
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Numbers

    pub fn number(&mut self, right: i64) -> i64 {
        match self.hit() {
            false => right,
            true if self.maybe(0.4) => {
                self.rng.pick(&[right.wrapping_sub(1), right.wrapping_add(1), right.wrapping_neg()])
            }
            true => self.rng.pick(&SIZES),
        }
    }

    pub fn code(&mut self, right: i32) -> i32 {
        if self.hit() { self.rng.pick(&INTS) } else { right }
    }

    pub fn float(&mut self, right: f64) -> f64 {
        let wrong = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300, -0.0, 1e-300, right * 1e20];
        if self.hit() { self.rng.pick(&wrong) } else { right }
    }

    pub fn value(&mut self) -> f32 {
        self.rng.f32()
    }

    pub fn precision(&mut self) -> i32 {
        self.rng.pick(&[0, 0, 0, 1, 2])
    }

    pub fn dtype(&mut self) -> i32 {
        self.rng.pick(&[0, 1, 2])
    }

    /// A format of a cache whose heads have `dim` elements.
    pub fn format(&mut self, dim: i64) -> i32 {
        // Blocks where they fit, and sometimes where they do not.
        if (dim % 32 == 0 && self.maybe(0.5)) || self.maybe(0.05) && self.hit() {
            return self.rng.pick(&BLOCKS);
        }
        let affine = if dim % 2 == 0 { self.rng.pick(&AFFINE) } else { AFFINE[0] };
        self.rng.pick(&[0, 1, 2, INT8, INT8, FP8[0], FP8[1], affine, affine])
    }

    /// The numbers below `n` in any order.
    pub fn permutation(&mut self, n: usize) -> Vec<i32> {
        let mut all: Vec<i32> = (0..n as i32).collect();
        (1..n).for_each(|i| all.swap(i, self.rng.below(i + 1)));
        all
    }

    /// Sequences, tokens, heads, head size: small; head sizes include vector sizes and their neighbours.
    pub fn shape(&mut self) -> [i64; 4] {
        let mut axis = |few: usize, many: usize| match self.rng.below(20) {
            0 => 0,
            1..=3 => self.rng.between(1, many) as i64,
            _ => self.rng.between(1, few) as i64,
        };
        let mut shape = [axis(3, 5), axis(4, 40), axis(3, 9), self.dim()];
        // Most calls are small, so that there are more of them.
        let most = if self.maybe(0.02) { 1 << 17 } else { 1 << 12 };
        while shape.iter().product::<i64>() > most {
            let axis = self.rng.below(4);
            shape[axis] = (shape[axis] + 1) / 2;
        }
        shape
    }

    pub fn dim(&mut self) -> i64 {
        match self.rng.below(12) {
            0..=5 => self.rng.between(1, 24) as i64,
            6..=10 => self.rng.pick(&[31, 32, 33, 48, 63, 64, 65, 80, 96, 128]),
            _ => self.rng.pick(&[129, 160, 192, 255, 256, 257, 512, 576, 1024]),
        }
    }

    /// The block of a Hadamard rotation of heads of this size, or 0.
    pub fn hadamard(&mut self, dim: i64) -> i64 {
        let largest = if dim > 0 { (dim & dim.wrapping_neg()).min(512) } else { 0 };
        let smaller = self.rng.below(3) as u32;
        let right = if largest > 1 && self.maybe(0.25) { (largest >> smaller).max(2) } else { 0 };
        if self.hit() { self.rng.pick(&[1, 3, 48, 64, 512, 1024, -2, i64::MIN, i64::MAX]) } else { right }
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Tensors

    /// A tensor of any strides in its own block; an input may repeat elements.
    pub fn tensor(&mut self, dtype: i32, shape: [i64; 4], repeats: bool) -> Tensor {
        let mut order = [0, 1, 2, 3];
        match self.rng.below(4) {
            // Mostly BSHD and BHSD.
            0 | 1 => (),
            2 => order = [0, 2, 1, 3],
            _ => (0..3).for_each(|i| order.swap(i, self.rng.between(i, 3))),
        }
        let (mut strides, mut step) = ([0i64; 4], 1i64);
        let blocks = unit_elements(dtype) > 1 || AFFINE.contains(&dtype);
        let shape_of_elements = shape;
        let shape = Tensor { data: std::ptr::null_mut(), dtype, reserved: 0, shape, strides, bytes: 0 }.units();
        if blocks {
            // Blocks of a head lie one after the other.
            order.sort_by_key(|&axis| axis == 3);
        } else if self.rng.chance(0.1) {
            step = 2;
        }
        let padded = self.rng.chance(0.3);
        for axis in order.into_iter().rev() {
            strides[axis] = step;
            step *= shape[axis].max(1);
            if padded && !(blocks && axis == 3) && self.rng.chance(0.5) {
                step += self.rng.between(1, 5) as i64;
            }
        }
        let (mut first, mut last) = (0, 0);
        for axis in 0..4 {
            let free = !(blocks && axis == 3 && shape[3] > 1);
            if free && repeats && self.rng.chance(0.06) {
                strides[axis] = 0;
            }
            if free && self.rng.chance(0.04) {
                strides[axis] = -strides[axis];
            }
            if shape[axis] == 1 && self.rng.chance(0.05) {
                // The stride of an axis with one element has no meaning.
                strides[axis] = self.rng.pick(&SIZES);
                continue;
            }
            let reach = (shape[axis] - 1).max(0) * strides[axis];
            if reach < 0 { first += reach } else { last += reach }
        }
        let size = unit_size(dtype);
        let empty = shape.contains(&0);
        let elements = if empty { self.rng.below(2) } else { usize::try_from(last - first + 1).expect("small") };
        let skip = self.skip(size);
        let block = self.arena.block(elements * size, skip);
        let at = if empty { 0 } else { usize::try_from(-first).expect("small") };
        let shape = shape_of_elements;
        Tensor { data: block.wrapping_add(at * size), dtype, reserved: 0, shape, strides, bytes: 0 }
    }

    /// Bytes before a block, which keep it aligned to elements of a size, and sometimes to no more.
    fn skip(&mut self, size: usize) -> usize {
        if self.rng.chance(0.3) { size * self.rng.below(64 / size) } else { 0 }
    }

    /// Fills all [batch, seq, head] that are `live` with numbers; the others remain poison.
    pub fn fill(&mut self, tensor: &Tensor, live: impl Fn([usize; 3]) -> bool) {
        if !tensor.fits(&self.arena) {
            return;
        }
        let numbers = &self.world.numbers[tensor.dtype.clamp(0, 2) as usize];
        let (rng, wild) = (&mut self.rng, self.wild);
        tensor.for_each_row(|index, row| {
            let mut random = rng.u64();
            // SAFETY: a row of a tensor that lies in its block.
            unsafe {
                if tensor.dtype == MASK {
                    row.fill(|| {
                        random = random.rotate_left(7);
                        u32::from(!random.is_multiple_of(4))
                    });
                } else if live(index) && wild && random.is_multiple_of(4) {
                    row.fill(|| rng.u64() as u32);
                } else if live(index) {
                    let mut at = random as usize;
                    // Eight-bit floats are below 2, and so are factors of blocks, whose high byte may be any.
                    let bits = match tensor.dtype {
                        dtype if FP8.contains(&dtype) => 0xbf,
                        dtype if BLOCKS.contains(&dtype) => 0x3b,
                        _ => u32::MAX,
                    };
                    row.fill(|| {
                        at = at.wrapping_add(1);
                        numbers[at % numbers.len()] & bits
                    });
                }
            }
        });
    }

    /// Spoils numbers of a tensor at random, and decides whether its size in bytes is given. Called once for each
    /// tensor, before [`Self::fill`].
    pub fn settle(&mut self, tensor: &mut Tensor) {
        for _ in 0..2 {
            if self.hit() {
                self.spoil(tensor);
            }
        }
        // A caller who gives no size guarantees that the view is valid. So the size is given whenever the view is not.
        let end = self.arena.bounds(tensor.data).map_or(0, |b| b.1);
        let rest = end.saturating_sub(tensor.data.addr());
        let fits = tensor.fits(&self.arena);
        let before = tensor.reach().is_some_and(|r| r.0 < tensor.data.addr()) && !tensor.is_empty();
        tensor.bytes = match fits {
            true if before => 0,
            true if self.maybe(0.3) => 0,
            _ => rest,
        };
        if !fits && rest == 0 {
            tensor.data = std::ptr::null_mut();
        }
        if self.hit() && rest > 1 {
            tensor.bytes = self.rng.between(1, rest);
        }
        self.tensors.push(*tensor);
    }

    /// Scales for a cache of a format and shape, if the format has any; static ones have been filled. A hostile call may give some to
    /// another format.
    pub fn scales(&mut self, format: i32, [batch, seq, heads, dim]: [i64; 4], repeats: bool) -> Option<Tensor> {
        if FP8.contains(&format) && !self.hit() {
            if self.maybe(0.4) {
                return None;
            }
            let (dtype, one) = (self.rng.pick(&[0, 1]), self.maybe(0.5));
            let mut scales = self.tensor(dtype, [1, 1, if one { 1 } else { heads }, 1], repeats);
            self.fill(&scales, |_| true);
            // One for all tokens, and perhaps for all heads.
            scales.shape = [batch, seq, heads, 1];
            (0..if one { 3 } else { 2 }).for_each(|axis| scales.strides[axis] = 0);
            return Some(scales);
        }
        if AFFINE.contains(&format) && !self.hit() {
            // A scale and a zero point for each token and head, or for some elements of them.
            let dtype = self.rng.pick(&[0, 1, 2]);
            let group = self.rng.pick(&[1, 2, 4, 6, 16, 32]);
            let groups = if group < dim && dim % group == 0 && self.maybe(0.4) { dim / group } else { 1 };
            let flags = self.rng.pick(&[0, 1, 2]) + self.rng.pick(&[0, 4]) + self.rng.pick(&[0, 8, 16]);
            let fixed = if self.maybe(if repeats { 0.5 } else { 0.3 }) { 32 } else { 0 };
            let mut shape = [batch, seq, heads, 2 * groups];
            // A write takes all tokens that share scales, which random places are not.
            let wide = (fixed != 0 || repeats || self.moves) && self.maybe(0.5);
            for axis in (0..3).filter(|&axis| wide && (fixed != 0 || axis == 1)) {
                // Shared by neighbours, or by all.
                let share = if axis == 1 { self.rng.pick(&[1, 2, 4, i64::MAX]) } else { self.rng.pick(&[1, i64::MAX]) };
                shape[axis] = match shape[axis] {
                    n if n > 0 && n % share == 0 => n / share,
                    n if share == i64::MAX => n.min(1),
                    n => n,
                };
            }
            let scales = self.tensor(dtype, shape, repeats || fixed != 0);
            if fixed != 0 || wide && !self.moves {
                // Those of no live token may be those of live ones, too.
                self.fill(&scales, |_| true);
            }
            self.affine.push((scales.data, groups, flags + fixed));
            return Some(scales);
        }
        (format == INT8 || self.hit()).then(|| {
            let dtype = self.rng.pick(&[0, 1]);
            self.tensor(dtype, [batch, seq, heads, 1], repeats)
        })
    }

    /// As [`Self::settle`], for scales, which a hostile call may omit.
    pub fn settle_scales(&mut self, scales: &mut Option<Tensor>) {
        if scales.is_some() && self.hit() {
            *scales = None;
        }
        if let Some(scales) = scales {
            self.settle(scales);
        }
    }

    /// The struct of the scales of K and V.
    pub fn scales_of(&mut self, scales: [&Option<Tensor>; 2]) -> *const kvl_cache_scales {
        if scales.iter().all(|s| s.is_none()) && !self.maybe(0.1) {
            return std::ptr::null();
        }
        let [(k, k_zeros, k_affine), (v, v_zeros, v_affine)] =
            scales.map(|s| s.as_ref().map_or((zeroed(), zeroed(), 0), |tensor| self.scales_and_zeros(tensor)));
        let described = |s: &Option<Tensor>| s.is_some_and(|s| self.affine.iter().any(|(data, ..)| *data == s.data));
        let older = [offset_of!(kvl_cache_scales, k_zeros)];
        let older = if scales.iter().any(|s| described(s)) { &[][..] } else { &older };
        let all = kvl_cache_scales {
            k,
            v,
            k_zeros,
            v_zeros,
            k_affine: k_affine as u32,
            v_affine: v_affine as u32,
            ..zeroed()
        };
        let at = self.sized(&all, older);
        if at.is_null() {
            // They are no arguments of the call.
            let given = [k, v, k_zeros, v_zeros].map(|view| view.data.cast::<u8>());
            self.tensors.retain(|t| !given.contains(&t.data));
        }
        at
    }

    /// The views of scales, and for affine units of the zero points between them, and what describes these.
    fn scales_and_zeros(&mut self, tensor: &Tensor) -> (kvl_view, kvl_view, i32) {
        let Some(&(_, groups, flags)) = self.affine.iter().find(|(data, ..)| *data == tensor.data) else {
            return (self.view(tensor), zeroed(), 0);
        };
        if tensor.shape[3] != 2 * groups {
            return (self.view(tensor), zeroed(), self.code(flags));
        }
        let (step, size) = (tensor.strides[3], unit_size(tensor.dtype) as i64);
        let mut scales = *tensor;
        scales.shape[3] /= 2;
        scales.strides[3] = step.wrapping_mul(2);
        let mut zeros = scales;
        let offset = step.wrapping_mul(size);
        let left = tensor.bytes as i64 - offset.clamp(-(1 << 40), 1 << 40);
        if tensor.bytes == 0 || offset >= 0 && left > 0 {
            zeros.data = tensor.data.wrapping_offset(offset as isize);
            zeros.bytes = if tensor.bytes == 0 { 0 } else { left as usize };
        }
        // These are what the call is given.
        self.tensors.retain(|t| t.data != tensor.data);
        self.tensors.extend([scales, zeros]);
        (self.view(&scales), self.view(&zeros), self.code(flags))
    }

    fn spoil(&mut self, tensor: &mut Tensor) {
        let axis = self.rng.below(4);
        match self.rng.below(9) {
            0 | 1 => tensor.shape[axis] = self.rng.pick(&SIZES),
            2 => tensor.shape[axis] = tensor.shape[axis].wrapping_add(self.rng.pick(&[-1, 1])),
            3 => tensor.strides[axis] = self.rng.pick(&SIZES),
            4 => {
                let n = tensor.strides[axis];
                let others =
                    [n.wrapping_neg(), n.wrapping_sub(1), n.wrapping_add(1), n.wrapping_mul(2), i64::MAX / 4, 1 << 62];
                tensor.strides[axis] = self.rng.pick(&others);
            }
            5 if tensor.dtype != MASK => tensor.dtype = self.rng.pick(&INTS),
            6 => tensor.reserved = self.rng.pick(&INTS),
            7 => tensor.data = std::ptr::null_mut(),
            _ => {
                let end = self.arena.bounds(tensor.data).map_or(0, |b| b.1);
                if end > tensor.data.addr() {
                    tensor.data = tensor.data.wrapping_add(self.rng.between(1, end - tensor.data.addr()).min(9));
                }
            }
        }
    }

    /// Sometimes lets one tensor share memory with another.
    pub fn alias(&mut self, tensor: &mut Tensor, other: &Tensor) {
        if self.rate > 0.0 && self.rng.chance(0.05) && !other.data.is_null() {
            self.spoiled = true;
            tensor.data = other.data;
            if self.rng.chance(0.5) {
                (tensor.shape, tensor.strides) = (other.shape, other.strides);
            }
            if let Some((start, end)) = self.arena.bounds(other.data) {
                let size = unit_size(tensor.dtype);
                tensor.data = tensor.data.wrapping_add(size * self.rng.below((end - start) / size + 1).min(40));
            }
        }
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Lists, structs and other data behind pointers

    /// A list of as many entries as the call's other numbers require; null if they require too many. `wrong` are
    /// entries that a hostile call may contain.
    pub fn list<T: Copy>(
        &mut self,
        n: Option<i64>,
        wrong: &[T],
        mut right: impl FnMut(&mut Self, usize) -> T,
    ) -> List<T> {
        let null = List { at: std::ptr::null(), values: Vec::new() };
        let Some(n) = n.filter(|n| (0..=LONGEST).contains(n)) else { return null };
        let mut values: Vec<T> = (0..n as usize).map(|i| right(self, i)).collect();
        if self.hit() {
            match self.rng.below(5) {
                0 => return null,
                1 => {
                    let skip = self.rng.between(1, align_of::<T>().max(2) - 1);
                    return List { at: self.arena.copy(&values, skip), values };
                }
                2 if values.len() > 1 => values[0] = values[self.rng.between(1, values.len() - 1)],
                _ if !values.is_empty() && !wrong.is_empty() => {
                    let at = self.rng.below(values.len());
                    values[at] = self.rng.pick(wrong);
                }
                _ => (),
            }
        }
        let skip = self.skip(align_of::<T>());
        List { at: self.arena.copy(&values, skip), values }
    }

    /// A list that the call writes, `n` entries of poison.
    pub fn output<T>(&mut self, n: Option<i64>) -> *mut T {
        let Some(n) = n.filter(|n| (0..=LONGEST).contains(n)) else { return std::ptr::null_mut() };
        if self.hit() && self.maybe(0.5) {
            return std::ptr::null_mut();
        }
        let skip = self.skip(align_of::<T>());
        self.arena.block(n as usize * size_of::<T>(), skip).cast()
    }

    /// A struct that does not grow, or null.
    pub fn fixed<T: Copy>(&mut self, value: T) -> *const T {
        if self.hit() && self.maybe(0.3) {
            return std::ptr::null();
        }
        self.arena.copy(&[value], 0)
    }

    /// A struct that begins with its size and has that size; `older` are sizes of older versions.
    pub fn sized<T: Plain>(&mut self, value: &T, older: &[usize]) -> *mut T {
        let full = size_of::<T>();
        let mut size = full;
        if !older.is_empty() && self.maybe(0.1) {
            size = self.rng.pick(older);
        }
        let mut said = size;
        if self.hit() {
            if self.maybe(0.2) {
                return std::ptr::null_mut();
            }
            if self.maybe(0.5) {
                said = self.rng.pick(&[0, 1, 4, 8, full - 8, full - 1, full + 1, full + 8, usize::MAX, 1 << 32, 7777]);
                size = full;
            }
        }
        // A struct of a newer header: the library reads all of it, and takes it if the fields that it does not know are 0.
        let newer = (full + 1..=1 << 16).contains(&said);
        let bytes = if newer { said } else { size };
        let at = self.arena.block(bytes, 0);
        let zero_tail = newer && self.maybe(0.5);
        // SAFETY: the block has `bytes` bytes, at least `size`, which is at most that of a `T`, and begins with the size.
        unsafe {
            std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), at, size);
            at.cast::<usize>().write(said);
            if zero_tail {
                at.add(size).write_bytes(0, bytes - size);
            }
        }
        at.cast()
    }

    pub fn context(&mut self) -> *const kvl_context {
        if self.hit() && self.maybe(0.3) { std::ptr::null() } else { self.rng.pick(&self.world.contexts).cast_const() }
    }

    /// No runner, the pool's runner, or one that runs the last task first.
    pub fn runner(&mut self) -> *const kvl_parallel_runner {
        if self.maybe(0.5) {
            return std::ptr::null();
        }
        if self.maybe(0.1) {
            return self.sized(&self.world.pool_runner.clone(), &[]);
        }
        let mut runner = kvl_parallel_runner { run: Some(backwards), num_threads: self.rng.between(1, 4), ..zeroed() };
        if self.hit() {
            match self.rng.below(4) {
                0 => runner.run = None,
                1 => runner.num_threads = 0,
                2 => runner.num_threads = usize::MAX,
                _ => {
                    runner.run = Some(does_nothing);
                    self.broken = true;
                }
            }
        }
        self.sized(&runner, &[])
    }

    pub fn const_view(&self, t: &Tensor) -> kvl_const_view {
        let Tensor { data, dtype, reserved, shape, strides, bytes } = *t;
        kvl_const_view { data, dtype, reserved, shape, strides, bytes }
    }

    pub fn view(&self, t: &Tensor) -> kvl_view {
        let Tensor { data, dtype, reserved, shape, strides, bytes } = *t;
        kvl_view { data, dtype, reserved, shape, strides, bytes }
    }

    pub fn mask(&self, t: &Tensor) -> kvl_mask {
        kvl_mask { data: t.data, shape: t.shape, strides: t.strides, bytes: t.bytes }
    }

    // -----------------------------------------------------------------------------------------------------------------
    // The effects of the call

    /// The [batch, seq, head] of a tensor that the call writes; all must be finite after the call.
    pub fn writes(&mut self, tensor: &Tensor, which: impl Fn([usize; 3]) -> bool) {
        if !tensor.fits(&self.arena) {
            return;
        }
        tensor.for_each_row(|index, row| {
            if which(index) {
                row.ranges(&mut self.written);
                self.results.push(row);
            }
        });
    }

    /// As [`Self::writes`], for values in pairs of slots; the arguments of `which` are [batch, slot, head].
    pub fn writes_pairs(&mut self, packed: &Tensor, which: impl Fn([usize; 3]) -> bool) {
        if !packed.fits(&self.arena) || packed.is_empty() {
            return;
        }
        let step = if packed.shape[3] > 1 { packed.strides[3] } else { 0 };
        for odd in 0..2 {
            let mut half = *packed;
            half.shape[3] /= 2;
            half.strides[3] = 2 * step;
            half.data = half.data.wrapping_offset(odd as isize * step as isize * unit_size(packed.dtype) as isize);
            self.writes(&half, |[b, s, h]| which([b, 2 * s + odd, h]));
        }
    }

    /// `n` bytes that the call may write, with any result.
    pub fn may_write<T>(&mut self, at: *mut T, n: Option<i64>) {
        if let Some(n) = n.filter(|&n| n > 0 && !at.is_null()) {
            self.written.push((at.addr(), at.addr() + n as usize * size_of::<T>()));
        }
    }

    /// Called just before the library: records all memory.
    pub fn ready(&mut self) {
        self.arena.remember();
    }

    /// As [`Self::check`], for a call that does not read all arguments.
    pub fn check_answer(mut self, status: i32) -> i32 {
        self.tensors.clear();
        self.check(status)
    }

    /// Called with the library's result.
    pub fn check(mut self, status: i32) -> i32 {
        let sentence = last_error();
        assert_ne!(status, 16, "a panic inside: {sentence}");
        assert!((0..16).contains(&status), "{status} is no status");
        if status != 0 {
            assert!(self.spoiled, "status {status} though nothing is wrong: {sentence}");
            assert!(!sentence.is_empty());
        }
        assert!(status != 15 || self.broken, "status 15, but the runner ran: {sentence}");
        if status == 15 {
            return status;
        }
        if status != 0 {
            self.written.clear();
        }
        self.arena.check(&self.written);
        if status == 0 {
            for tensor in &self.tensors {
                assert!(tensor.fits(&self.arena), "it worked with {tensor:?}, which leaves its block");
            }
            if !self.wild && !self.spoiled {
                // SAFETY: rows of tensors that lie in their blocks.
                let finite = self.results.iter().all(|row| unsafe { row.is_finite() });
                assert!(finite, "an output is infinite or NaN, though every input that counts is a number");
            }
        }
        status
    }

    pub fn poisoned(at: *const u8, bytes: usize) -> bool {
        // SAFETY: a block of the current call.
        unsafe { std::slice::from_raw_parts(at, bytes) }.iter().all(|&b| b == POISON)
    }
}

/// The last error's sentence on this thread.
pub fn last_error() -> String {
    let mut buffer = [1u8; 1024];
    // SAFETY: the buffer has that many bytes.
    let needed = unsafe { kvl_last_error(buffer.as_mut_ptr(), buffer.len()) };
    assert!((1..=buffer.len()).contains(&needed), "{needed} bytes");
    std::str::from_utf8(&buffer[..needed - 1]).expect("a sentence is UTF-8").to_owned()
}

unsafe extern "C" fn backwards(_: *mut c_void, n: usize, task: kvl_task, task_ctx: *mut c_void) -> i32 {
    // SAFETY: a task of the library, for all indices below `n`.
    (0..n).rev().for_each(|i| unsafe { task(task_ctx, i) });
    0
}

unsafe extern "C" fn does_nothing(_: *mut c_void, _: usize, _: kvl_task, _: *mut c_void) -> i32 {
    7
}

/// The product of a shape; `None` if an entry is negative or the product is too large.
pub fn product(axes: &[i64]) -> Option<i64> {
    axes.iter().try_fold(1i64, |product, &n| if n < 0 { None } else { product.checked_mul(n) })
}
