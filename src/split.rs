//! f32 factors over a 16-bit layer: numbers as two halves of the storage type.
//!
//! The high half is the nearest number of the storage type, the low half the nearest to what is left of it, times a power of two
//! that keeps it out of the subnormals of f16. What is not finite has a low half of zero, or is no number in both.

use crate::params::LORA_SPLIT_RANKS;
use crate::{Dtype, Element};

/// Ranks whose halves lie together: so many high ones, then as many low ones.
pub(crate) const RANKS: usize = LORA_SPLIT_RANKS as usize;

/// Columns of h for `r` ranks of f32 factors over a layer of 16 bits: high and low halves of 8 ranks at a time, and zeros for ranks that
/// fill up the last 8.
pub const fn split_columns(r: usize) -> usize {
    r.div_ceil(RANKS).saturating_mul(2 * RANKS)
}

/// Ranks of a product of halves: high by high, high by low and low by high for each, and none for low by low.
pub(crate) const fn split_ranks(r: usize) -> usize {
    r.div_ceil(RANKS).saturating_mul(3 * RANKS)
}

/// What low halves are multiplied by.
pub(crate) fn low_scale(dtype: Dtype) -> f32 {
    if dtype == Dtype::F16 { 2048.0 } else { 1.0 }
}

/// The columns of `rank`'s halves.
pub(crate) fn columns_of(rank: usize) -> (usize, usize) {
    let high = rank / RANKS * 2 * RANKS + rank % RANKS;
    (high, high + RANKS)
}

/// High and low half.
pub(crate) fn halves<T: Element>(value: f32) -> (T, T) {
    let high = T::from_f32(value);
    let rest = if high.to_f32().is_infinite() { 0.0 } else { value - high.to_f32() };
    (high, T::from_f32(rest * low_scale(T::DTYPE)))
}

/// The number whose halves these are.
pub(crate) fn whole<T: Element>(high: T, low: T) -> f32 {
    high.to_f32() + low.to_f32() / low_scale(T::DTYPE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bf16, f16};

    /// Relative to the number, or absolute where that is less.
    fn is_kept<T: Element>(value: f32, relative: f64, absolute: f64) {
        let (high, low) = halves::<T>(value);
        let error = (f64::from(whole(high, low)) - f64::from(value)).abs();
        assert!(error <= (f64::from(value).abs() * relative).max(absolute), "{value:e} is {high:?} and {low:?}");
    }

    #[test]
    fn two_halves_hold_a_number() {
        let (mut value, mut at) = (1.0f32, 0u32);
        while value < 6e4 {
            for sign in [1.0, -1.0] {
                is_kept::<bf16>(sign * value, 2f64.powi(-17), 0.0);
                is_kept::<bf16>(sign / value * 1e-20, 2f64.powi(-17), 0.0);
                is_kept::<f16>(sign * value, 2f64.powi(-23), 0.0);
                is_kept::<f16>(sign / value * 1e-3, 2f64.powi(-23), 2f64.powi(-36));
            }
            at += 1;
            value *= 1.0 + (at % 97) as f32 / 5003.0;
        }
        assert!(at > 500);
    }

    #[test]
    fn what_is_not_finite_has_no_low_half() {
        for value in [f32::INFINITY, f32::NEG_INFINITY] {
            let (high, low) = halves::<f16>(value);
            assert_eq!((high.to_f32(), low), (value, f16::ZERO));
        }
        assert_eq!(halves::<f16>(1e6), (f16::INFINITY, f16::ZERO), "beyond the largest of the type");
        let (high, low) = halves::<bf16>(f32::NAN);
        assert!(high.is_nan() && low.is_nan() && whole(high, low).is_nan());
        assert_eq!(halves::<bf16>(0.0), (bf16::ZERO, bf16::ZERO));
    }

    #[test]
    fn columns() {
        let counts = [0, 1, 8, 9, 16, 40, 100].map(|r| (split_columns(r), split_ranks(r)));
        assert_eq!(counts, [(0, 0), (16, 24), (16, 24), (32, 48), (32, 48), (80, 120), (208, 312)]);
        assert_eq!([0, 7, 8, 17].map(columns_of), [(0, 8), (7, 15), (16, 24), (33, 41)]);
    }
}
