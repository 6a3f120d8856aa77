//! Deterministic random numbers (SplitMix64), so that a failing case can be repeated.

/// A stream of random numbers.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.u64() % n.max(1) as u64) as usize
    }

    /// In `low..=high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        (self.u64() >> 11) as f64 / ((1u64 << 53) as f64) < probability
    }

    /// In -2..2, so that logits at the usual scale have a standard deviation of about 1.3.
    pub fn f32(&mut self) -> f32 {
        ((self.u64() >> 40) as f32 / (1 << 22) as f32) - 2.0
    }
}
