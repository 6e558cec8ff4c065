//! Floating point on integers: every format, every rounding. Slow; for what the host's own arithmetic does not round so.
//!
//! A finite value is `±mantissa · 2^exponent`, plus something less than one unit of the mantissa if `sticky`.

use crate::isa::{FloatOp, Mode, Round, Ty};

#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    exponent_bits: u32,
    fraction_bits: u32,
    nan: u64,
    /// Without infinities: the largest number is the last but one pattern (e4m3).
    pub finite_only: bool,
}

pub(super) const F16: Format = Format { exponent_bits: 5, fraction_bits: 10, nan: 0x7fff, finite_only: false };
pub(super) const BF16: Format = Format { exponent_bits: 8, fraction_bits: 7, nan: 0x7fff, finite_only: false };
/// In the upper 19 bits of an f32.
pub(super) const TF32: Format = Format { exponent_bits: 8, fraction_bits: 10, nan: 0x3ffff, finite_only: false };
pub(super) const F32: Format = Format { exponent_bits: 8, fraction_bits: 23, nan: 0x7fff_ffff, finite_only: false };
pub(super) const F64: Format =
    Format { exponent_bits: 11, fraction_bits: 52, nan: 0xfff8_0000_0000_0000, finite_only: false };
pub(super) const E4M3: Format = Format { exponent_bits: 4, fraction_bits: 3, nan: 0x7f, finite_only: true };
pub(super) const E5M2: Format = Format { exponent_bits: 5, fraction_bits: 2, nan: 0x7f, finite_only: false };

pub(super) fn format(ty: Ty) -> Format {
    match ty {
        Ty::F16 | Ty::F16x2 => F16,
        Ty::Bf16 | Ty::Bf16x2 => BF16,
        Ty::F64 => F64,
        _ => F32,
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Real {
    Nan,
    Infinite(bool),
    Finite { negative: bool, mantissa: u128, exponent: i32, sticky: bool },
}

/// `shift_right` that keeps whether anything was lost.
fn sticky_shift(mantissa: u128, by: u32) -> (u128, bool) {
    match by {
        0 => (mantissa, false),
        1..=127 => (mantissa >> by, mantissa & ((1 << by) - 1) != 0),
        _ => (0, mantissa != 0),
    }
}

impl Real {
    pub fn integer(negative: bool, magnitude: u64) -> Real {
        Real::Finite { negative, mantissa: magnitude.into(), exponent: 0, sticky: false }
    }

    pub fn decode(format: Format, bits: u64) -> Real {
        let Format { exponent_bits, fraction_bits, .. } = format;
        let negative = bits >> (exponent_bits + fraction_bits) & 1 == 1;
        let top = (1u64 << exponent_bits) - 1;
        let field = bits >> fraction_bits & top;
        let fraction = bits & ((1 << fraction_bits) - 1);
        if format.finite_only && bits & format.nan == format.nan {
            return Real::Nan;
        }
        if field == top && !format.finite_only {
            return if fraction == 0 { Real::Infinite(negative) } else { Real::Nan };
        }
        let bias = (top >> 1) as i32;
        let mantissa = if field == 0 { fraction } else { fraction | 1 << fraction_bits };
        let exponent = (field.max(1) as i32) - bias - fraction_bits as i32;
        Real::Finite { negative, mantissa: mantissa.into(), exponent, sticky: false }
    }

    fn negate(self) -> Real {
        match self {
            Real::Nan => Real::Nan,
            Real::Infinite(negative) => Real::Infinite(!negative),
            Real::Finite { negative, mantissa, exponent, sticky } => {
                Real::Finite { negative: !negative, mantissa, exponent, sticky }
            }
        }
    }

    /// Exact sum, but for `sticky`. The operands are exact and have at most 106 bits.
    fn add(self, other: Real, round: Round) -> Real {
        let (x, y) = match (self, other) {
            (Real::Nan, _) | (_, Real::Nan) => return Real::Nan,
            (Real::Infinite(a), Real::Infinite(b)) => return if a == b { self } else { Real::Nan },
            (Real::Infinite(_), _) => return self,
            (_, Real::Infinite(_)) => return other,
            (Real::Finite { negative: a, mantissa: 0, .. }, Real::Finite { negative: b, mantissa: 0, .. }) => {
                // Zeros of different sign add to +0, or to -0 when rounding down.
                let negative = if a == b { a } else { round == Round::Rm };
                return Real::integer(negative, 0);
            }
            (Real::Finite { mantissa: 0, .. }, _) => return other,
            (_, Real::Finite { mantissa: 0, .. }) => return self,
            (
                Real::Finite { negative, mantissa, exponent, .. },
                Real::Finite { negative: n, mantissa: m, exponent: e, .. },
            ) => ((negative, mantissa, exponent), (n, m, e)),
        };
        let top = |v: (bool, u128, i32)| v.2 + 128 - v.1.leading_zeros() as i32;
        let (x, y) = if top(x) >= top(y) { (x, y) } else { (y, x) };
        // The larger one's top bit goes to bit 125; the smaller one follows, or is shifted out.
        let exponent = (top(x) - 126).max(x.2.min(y.2)).min(x.2);
        let big = x.1 << (x.2 - exponent);
        let (small, sticky) =
            if y.2 >= exponent { (y.1 << (y.2 - exponent), false) } else { sticky_shift(y.1, (exponent - y.2) as u32) };
        let (negative, mantissa) = if x.0 == y.0 {
            (x.0, big + small)
        } else if big >= small + u128::from(sticky) {
            (x.0, big - small - u128::from(sticky))
        } else {
            (y.0, small - big)
        };
        if mantissa == 0 && !sticky {
            return Real::integer(round == Round::Rm, 0);
        }
        Real::Finite { negative, mantissa, exponent, sticky }
    }

    fn mul(self, other: Real) -> Real {
        let sign = |real: Real| match real {
            Real::Nan => false,
            Real::Infinite(negative) | Real::Finite { negative, .. } => negative,
        };
        let negative = sign(self) != sign(other);
        match (self, other) {
            (Real::Nan, _) | (_, Real::Nan) => Real::Nan,
            (Real::Infinite(_), Real::Finite { mantissa: 0, .. })
            | (Real::Finite { mantissa: 0, .. }, Real::Infinite(_)) => Real::Nan,
            (Real::Infinite(_), _) | (_, Real::Infinite(_)) => Real::Infinite(negative),
            (Real::Finite { mantissa: a, exponent: e, .. }, Real::Finite { mantissa: b, exponent: f, .. }) => {
                Real::Finite { negative, mantissa: a * b, exponent: e + f, sticky: false }
            }
        }
    }

    fn div(self, other: Real) -> Real {
        match (self, other) {
            (Real::Nan, _) | (_, Real::Nan) | (Real::Infinite(_), Real::Infinite(_)) => Real::Nan,
            (Real::Infinite(a), Real::Finite { negative: b, .. }) => Real::Infinite(a != b),
            (Real::Finite { negative: a, .. }, Real::Infinite(b)) => Real::integer(a != b, 0),
            (Real::Finite { mantissa: 0, .. }, Real::Finite { mantissa: 0, .. }) => Real::Nan,
            (Real::Finite { negative: a, .. }, Real::Finite { negative: b, mantissa: 0, .. }) => Real::Infinite(a != b),
            (
                Real::Finite { negative: a, mantissa: m, exponent: e, .. },
                Real::Finite { negative: b, mantissa: d, exponent: f, .. },
            ) => {
                let up = if m == 0 { 0 } else { m.leading_zeros() };
                let (m, e) = (m << up, e - up as i32);
                Real::Finite { negative: a != b, mantissa: m / d, exponent: e - f, sticky: m % d != 0 }
            }
        }
    }

    fn sqrt(self) -> Real {
        match self {
            Real::Finite { mantissa: 0, .. } | Real::Infinite(false) => self,
            Real::Finite { negative: false, mantissa, exponent, .. } => {
                let up = mantissa.leading_zeros() - 2;
                // The exponent must be even.
                let up = up + ((exponent - up as i32) & 1).unsigned_abs();
                let (mantissa, exponent) = (mantissa << up, exponent - up as i32);
                let root = mantissa.isqrt();
                Real::Finite {
                    negative: false,
                    mantissa: root,
                    exponent: exponent / 2,
                    sticky: root * root != mantissa,
                }
            }
            _ => Real::Nan,
        }
    }

    /// The bits in `format`; `away` rounds ties away from zero instead of to even.
    pub fn encode(self, format: Format, round: Round, away: bool) -> u64 {
        let Format { exponent_bits, fraction_bits, nan, finite_only } = format;
        let top = (1u64 << exponent_bits) - 1;
        let (negative, mantissa, exponent, sticky) = match self {
            Real::Nan => return nan,
            Real::Infinite(negative) => {
                let sign = u64::from(negative) << (exponent_bits + fraction_bits);
                return sign | if finite_only { nan } else { top << fraction_bits };
            }
            Real::Finite { negative, mantissa, exponent, sticky } => (negative, mantissa, exponent, sticky),
        };
        let sign = u64::from(negative) << (exponent_bits + fraction_bits);
        if mantissa == 0 && !sticky {
            return sign;
        }
        let bias = (top >> 1) as i32;
        let least = 1 - bias - fraction_bits as i32;
        let length = 128 - mantissa.leading_zeros() as i32;
        let place = (exponent + length - 1 - fraction_bits as i32).max(least);
        let drop = place - exponent;
        let (kept, half, rest) = if drop <= 0 {
            (mantissa << -drop, false, false)
        } else {
            let drop = drop as u32;
            let half = drop <= 128 && mantissa >> (drop - 1) & 1 == 1;
            (sticky_shift(mantissa, drop).0, half, sticky_shift(mantissa, drop - 1).1)
        };
        let rest = rest || sticky;
        let up = match round {
            Round::Rn => half && (rest || away || kept & 1 == 1),
            Round::Rz => false,
            Round::Rm => negative && (half || rest),
            Round::Rp => !negative && (half || rest),
        };
        let kept = kept as u64 + u64::from(up);
        // The hidden bit adds one to the field; so does a carry.
        let field = (place - least) as u64;
        let bits = if kept >> fraction_bits == 0 { kept } else { kept + (field << fraction_bits) };
        let largest = if finite_only { nan - 1 } else { (top << fraction_bits) - 1 };
        if bits > largest {
            let to_infinity = match round {
                Round::Rn => true,
                Round::Rz => false,
                Round::Rm => negative,
                Round::Rp => !negative,
            };
            return sign | if to_infinity { largest + 1 } else { largest };
        }
        sign | bits
    }
}

/// Zero of the same sign for a subnormal number.
pub(super) fn flush(format: Format, bits: u64) -> u64 {
    let field = bits >> format.fraction_bits & ((1 << format.exponent_bits) - 1);
    if field == 0 {
        bits >> (format.exponent_bits + format.fraction_bits) << (format.exponent_bits + format.fraction_bits)
    } else {
        bits
    }
}

/// `.sat`, then `.relu`, on a result.
pub(super) fn clamp(format: Format, bits: u64, sat: bool, relu: bool) -> u64 {
    if !sat && !relu {
        return bits;
    }
    let real = Real::decode(format, bits);
    let sign = bits >> (format.exponent_bits + format.fraction_bits) & 1 == 1;
    let one = Real::integer(false, 1).encode(format, Round::Rn, false);
    match real {
        Real::Nan if sat => 0,
        Real::Nan => bits,
        _ if sign => 0,
        _ if sat => bits.min(one),
        _ => bits,
    }
}

/// `.satfinite`: what is out of range becomes the largest number of its sign; NaN stays.
pub(super) fn saturate(format: Format, value: Real, bits: u64) -> u64 {
    let sign = 1 << (format.exponent_bits + format.fraction_bits);
    let largest = match format.finite_only {
        true => format.nan - 1,
        false => (((1 << format.exponent_bits) - 1) << format.fraction_bits) - 1,
    };
    match value {
        Real::Nan => bits,
        Real::Infinite(negative) | Real::Finite { negative, .. } if bits & (sign - 1) > largest => {
            largest | if negative { sign } else { 0 }
        }
        _ => bits,
    }
}

/// One instruction on one element.
pub(super) fn float(op: FloatOp, format: Format, mode: Mode, [x, y, z]: [u64; 3]) -> u64 {
    let load = |bits| Real::decode(format, if mode.ftz { flush(format, bits) } else { bits });
    let one = Real::integer(false, 1);
    let result = match op {
        FloatOp::Add => load(x).add(load(y), mode.round),
        FloatOp::Sub => load(x).add(load(y).negate(), mode.round),
        FloatOp::Mul => load(x).mul(load(y)),
        FloatOp::Fma => load(x).mul(load(y)).add(load(z), mode.round),
        FloatOp::Div => load(x).div(load(y)),
        FloatOp::Rcp => one.div(load(x)),
        FloatOp::Sqrt => load(x).sqrt(),
    };
    let bits = result.encode(format, mode.round, false);
    clamp(format, if mode.ftz { flush(format, bits) } else { bits }, mode.sat, mode.relu)
}
