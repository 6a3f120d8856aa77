//! Replaces the random numbers of `tests/fuzz`. Choices come from the bytes of the input. The contents of tensors come
//! from a generator, because no path depends on their exact values.

use std::cell::RefCell;
use std::rc::Rc;

struct Source {
    bytes: Vec<u8>,
    at: usize,
    /// The state of SplitMix64.
    state: u64,
}

/// A stream of numbers. A clone continues from the position of the original.
#[derive(Clone)]
pub struct Rng(Rc<RefCell<Source>>);

impl Rng {
    /// A stream without input, which takes all numbers from the generator.
    pub fn new(seed: u64) -> Self {
        Self(Rc::new(RefCell::new(Source { bytes: Vec::new(), at: 0, state: seed })))
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(Rc::new(RefCell::new(Source { bytes: bytes.to_vec(), at: 0, state: bytes.len() as u64 })))
    }

    /// Whether the input is used up. Then the generator makes the choices too.
    pub fn is_empty(&self) -> bool {
        let source = self.0.borrow();
        source.at >= source.bytes.len()
    }

    /// A number of the generator.
    pub fn u64(&mut self) -> u64 {
        let mut source = self.0.borrow_mut();
        source.state = source.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = source.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A byte of the input.
    fn byte(&mut self) -> u8 {
        let next = {
            let mut source = self.0.borrow_mut();
            let next = source.bytes.get(source.at).copied();
            source.at += 1;
            next
        };
        next.unwrap_or_else(|| self.u64() as u8)
    }

    /// In `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        match n {
            0 | 1 => 0,
            2..=256 => usize::from(self.byte()) % n,
            _ => (usize::from(self.byte()) << 8 | usize::from(self.byte())) % n,
        }
    }

    /// In `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Small bytes mean no, so that an input of zeros makes valid calls.
    pub fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && f64::from(255 - self.byte()) < 256.0 * probability
    }

    /// In -2..2.
    pub fn f32(&mut self) -> f32 {
        ((self.u64() >> 40) as f32 / (1 << 22) as f32) - 2.0
    }
}
