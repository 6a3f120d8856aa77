//! The rows that are multiplied with a matrix, rounded to sums of two eight-bit numbers.

use crate::driver::quant::GROUP;

/// Terms of a rounded row: the row in eight bits, and what that leaves in eight bits.
pub(super) const TERMS: usize = 2;

/// 32 elements of a term, `x[i] = scale * q[i]` with an error of at most `scale / 2`, and what the kernels need of them:
/// one cache line.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Group {
    /// From -127 to 127.
    pub q: [i8; GROUP],
    /// The largest magnitude over 127. NaN or infinite if an element is.
    pub scale: f32,
    /// The sum of `q`, and of its first and second half.
    pub sums: [i32; 3],
    /// The same sums times the scale.
    pub scaled_sums: [f32; 3],
}

impl Group {
    /// Rounds 32 elements. A scale below the smallest normal number is taken for zero.
    #[inline(always)]
    pub fn round(x: &[f32; GROUP]) -> Self {
        // In lanes, because a sum or a maximum in order is not vectorised.
        let (mut most, mut poison) = ([0.0f32; 8], [0.0f32; 8]);
        for x in x.as_chunks::<8>().0 {
            for ((most, poison), &x) in most.iter_mut().zip(&mut poison).zip(x) {
                *most = if x.abs() > *most { x.abs() } else { *most };
                // NaN if the element is no number, else 0.
                *poison += x * 0.0;
            }
        }
        let largest = most.into_iter().fold(0.0f32, |m, x| if x > m { x } else { m });
        let scale = largest / 127.0 + poison.into_iter().sum::<f32>();
        let inverse = if scale < f32::MIN_POSITIVE { 0.0 } else { 1.0 / scale };
        let scale = if scale < f32::MIN_POSITIVE { 0.0 } else { scale };
        let mut group = Self { scale, ..Self::default() };
        for (q, &x) in group.q.iter_mut().zip(x) {
            // The sum with 1.5 * 2^23 is rounded to an integer, ties to even, and has it in its lowest bits.
            *q = (x * inverse + 12_582_912.0).to_bits() as i8;
        }
        let sum = |q: &[i8]| q.iter().map(|&q| i32::from(q)).sum::<i32>();
        let (first, second) = (sum(&group.q[..GROUP / 2]), sum(&group.q[GROUP / 2..]));
        group.sums = [first + second, first, second];
        group.scaled_sums = group.sums.map(|s| scale * s as f32);
        group
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_half_a_step() {
        for power in [-100, -3, 0, 20, 120] {
            let x: [f32; GROUP] = std::array::from_fn(|i| (i as f32 * 1.7).sin() * 2f32.powi(power));
            let group = Group::round(&x);
            let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert_eq!(group.scale, largest / 127.0);
            for (x, q) in x.iter().zip(group.q) {
                assert!((x - f32::from(q) * group.scale).abs() <= group.scale * 0.501, "2^{power}: {x} and {q}");
            }
            assert_eq!(group.sums[0], group.q.iter().map(|&q| i32::from(q)).sum::<i32>());
            assert_eq!(group.sums[0], group.sums[1] + group.sums[2]);
            assert_eq!(group.scaled_sums, group.sums.map(|s| s as f32 * group.scale));
        }
    }

    #[test]
    fn nothing_and_no_numbers() {
        assert_eq!((Group::round(&[0.0; GROUP]).q, Group::round(&[0.0; GROUP]).scale), ([0; GROUP], 0.0));
        let tiny = Group::round(&[1e-42; GROUP]);
        assert_eq!((tiny.q, tiny.scale), ([0; GROUP], 0.0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 9, 31] {
                let mut x = [1.0; GROUP];
                x[at] = bad;
                assert!(Group::round(&x).scale.is_nan(), "{bad} at {at}");
            }
        }
    }
}
