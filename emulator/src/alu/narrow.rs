//! The 16-bit formats: f16 (1-5-10 bits) and bf16 (1-8-7 bits), branch-free so that loops over lanes vectorise.

use super::Lanes;
use crate::isa::Ty;

/// The NaN that f16, bf16 instructions produce ("Half Precision Floating Point Instructions").
pub(super) const NAN16: u16 = 0x7fff;

/// A 16-bit floating-point format.
pub(super) trait Narrow {
    /// Exact; a NaN stays one.
    fn widen(bits: u16) -> f32;
    /// To nearest even; NaN to [`NAN16`].
    fn narrow(value: f32) -> u16;
}

pub(super) struct F16;
pub(super) struct Bf16;

impl Narrow for F16 {
    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        let bits = u32::from(bits);
        let magnitude = ((bits & 0x7fff) << 13).cast_signed();
        // Rebias the exponent by 127 - 15 = 112; infinity and NaN need as much again to reach exponent 255.
        let special = if magnitude >= 31 << 23 { 112 << 23 } else { 0 };
        let rebiased = (magnitude + (112 << 23) + special).cast_unsigned();
        // A subnormal m·2^-24 is 2^-14·(1 + m/1024) less 2^-14; the subtraction is exact.
        let subnormal = f32::from_bits(rebiased.wrapping_add(1 << 23)) - f32::from_bits(113 << 23);
        let magnitude = if magnitude < 1 << 23 { subnormal.to_bits() } else { rebiased };
        f32::from_bits(magnitude | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let sign = (bits >> 16) & 0x8000;
        // Rebias, then to nearest even at bit 13; a carry out of the mantissa goes into the exponent, as it should.
        let normal = (magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + ((magnitude >> 13) & 1))) >> 13;
        // Below 2^-14 results are multiples of 2^-24, which is the spacing of f32 in [0.5, 1): the addition rounds.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        // From 65520 on, half-way between the largest number and 2^16, `normal` is at or above infinity.
        let rounded = if magnitude < 113 << 23 { subnormal } else { normal.min(0x7c00) };
        let rounded = rounded | sign;
        let rounded = if magnitude > 0x7f80_0000 { u32::from(NAN16) } else { rounded };
        rounded as u16
    }
}

impl Narrow for Bf16 {
    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let rounded = if bits & 0x7fff_ffff > 0x7f80_0000 { u32::from(NAN16) } else { rounded };
        rounded as u16
    }
}

/// Both formats fit f32 and both fit f64: what remains is to round results once.
///
/// Rounding to odd ("sticky"): an inexact result becomes the neighbour whose last bit is set. Rounding that to nearest in a
/// format with at least two bits less of precision, everywhere in its range, equals rounding the exact value: an odd
/// last bit is neither a number nor a tie of the narrow format, so the value stays on its side of both. (Boldo and
/// Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.)
///
/// f64 to f32, to odd. f32 has 24 bits of precision for 11 and 8, and 2^-149 as last place for 2^-24 and 2^-133.
#[inline(always)]
pub(super) fn odd32(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    // Adding one to the bits goes away from zero, whatever the sign; it also makes the smallest subnormal of zero. From
    // infinity (an overflow) it goes back to the largest number, which is odd.
    let toward = if value.abs() > back.abs() { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    // A NaN differs from itself: keep it.
    let inexact = (value < back) | (value > back);
    f32::from_bits(if inexact & (bits & 1 == 0) { toward } else { bits })
}

/// x + y in f64, to odd, for |x|, |y| far from the ends of the range of f64 (all sums of f32 numbers and their products).
#[inline(always)]
pub(super) fn add_odd(x: f64, y: f64) -> f64 {
    let sum = x + y;
    // Knuth's TwoSum: `sum + error` is the exact sum.
    let rest = sum - x;
    let error = (x - (sum - rest)) + (y - rest);
    let bits = sum.to_bits();
    let away = (error > 0.0) == (sum > 0.0);
    let toward = if away { bits.wrapping_add(1) } else { bits.wrapping_sub(1) };
    // With an infinite sum the error is NaN: neither.
    let inexact = (error > 0.0) | (error < 0.0);
    f64::from_bits(if inexact & (bits & 1 == 0) { toward } else { bits })
}

/// The lanes as f32, in place of f16 or bf16.
pub(super) fn widen_lanes(ty: Ty, a: &Lanes) -> Lanes {
    if ty == Ty::F16 { super::map(a, F16::widen) } else { super::map(a, Bf16::widen) }
}
