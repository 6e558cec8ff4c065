//! Numbers as `mantissa · 2^exponent`, and rounding them to a format bit by bit.

use crate::isa::Ty;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Exact {
    Nan,
    Infinite {
        negative: bool,
    },
    /// The sign of a zero is beside the mantissa.
    Finite {
        negative: bool,
        mantissa: u128,
        exponent: i32,
    },
}

/// Bits of exponent and of fraction, and the NaN to produce.
pub fn format(ty: Ty) -> (u32, u32, u64) {
    match ty {
        Ty::F16 => (5, 10, 0x7fff),
        Ty::Bf16 => (8, 7, 0x7fff),
        Ty::F32 => (8, 23, 0x7fff_ffff),
        Ty::F64 => (11, 52, 0xfff8_0000_0000_0000),
        _ => panic!("{ty:?} is not a scalar float"),
    }
}

pub fn decode(ty: Ty, bits: u64) -> Exact {
    let (exponent_bits, fraction_bits, _) = format(ty);
    let negative = bits >> (exponent_bits + fraction_bits) & 1 == 1;
    let field = (bits >> fraction_bits & ((1 << exponent_bits) - 1)) as i32;
    let fraction = u128::from(bits & ((1 << fraction_bits) - 1));
    let bias = (1 << (exponent_bits - 1)) - 1;
    if field == (1 << exponent_bits) - 1 {
        return if fraction == 0 { Exact::Infinite { negative } } else { Exact::Nan };
    }
    let mantissa = if field == 0 { fraction } else { fraction | 1 << fraction_bits };
    Exact::Finite { negative, mantissa, exponent: field.max(1) - bias - fraction_bits as i32 }
}

/// To nearest even.
pub fn encode(ty: Ty, value: Exact) -> u64 {
    let (exponent_bits, fraction_bits, nan) = format(ty);
    let sign = |negative: bool| u64::from(negative) << (exponent_bits + fraction_bits);
    let infinity = ((1u64 << exponent_bits) - 1) << fraction_bits;
    let (negative, mantissa, exponent) = match value {
        Exact::Nan => return nan,
        Exact::Infinite { negative } => return sign(negative) | infinity,
        Exact::Finite { negative, mantissa: 0, .. } => return sign(negative),
        Exact::Finite { negative, mantissa, exponent } => (negative, mantissa, exponent),
    };
    let bias = (1 << (exponent_bits - 1)) - 1;
    let least = 1 - bias - fraction_bits as i32;
    let length = 128 - mantissa.leading_zeros() as i32;
    // The exponent of the last place, were there no carry.
    let mut place = (exponent + length - 1 - fraction_bits as i32).max(least);
    let drop = place - exponent;
    let mut kept = match drop {
        ..=0 => mantissa << -drop,
        1..=127 => {
            let (kept, rest, half) = (mantissa >> drop, mantissa & ((1 << drop) - 1), 1 << (drop - 1));
            kept + u128::from(rest > half || (rest == half && kept & 1 == 1))
        }
        _ => 0,
    };
    if kept == 2 << fraction_bits {
        (kept, place) = (kept >> 1, place + 1);
    }
    if place > bias - fraction_bits as i32 {
        return sign(negative) | infinity;
    }
    let field = if kept >> fraction_bits == 0 { 0 } else { (place - least + 1) as u64 };
    sign(negative) | field << fraction_bits | kept as u64 & ((1 << fraction_bits) - 1)
}

pub fn mul(x: Exact, y: Exact) -> Exact {
    let zero = |x| matches!(x, Exact::Finite { mantissa: 0, .. });
    let minus = |x| matches!(x, Exact::Finite { negative: true, .. } | Exact::Infinite { negative: true });
    let negative = minus(x) != minus(y);
    match (x, y) {
        (Exact::Nan, _) | (_, Exact::Nan) => Exact::Nan,
        (Exact::Finite { mantissa: m, exponent: e, .. }, Exact::Finite { mantissa: n, exponent: f, .. }) => {
            Exact::Finite { negative, mantissa: m * n, exponent: e + f }
        }
        _ if zero(x) || zero(y) => Exact::Nan,
        _ => Exact::Infinite { negative },
    }
}

/// Mantissas of at most 48 bits. Where the terms lie more than 76 places apart the smaller becomes the least one of its
/// sign: rounding to 24 bits or fewer cannot tell.
pub fn add(x: Exact, y: Exact) -> Exact {
    match (x, y) {
        (Exact::Nan, _) | (_, Exact::Nan) => Exact::Nan,
        (Exact::Infinite { negative: a }, Exact::Infinite { negative: b }) if a != b => Exact::Nan,
        (Exact::Infinite { .. }, _) => x,
        (_, Exact::Infinite { .. }) => y,
        (
            Exact::Finite { negative: a, mantissa: m, exponent: e },
            Exact::Finite { negative: b, mantissa: n, exponent: f },
        ) => {
            if m == 0 && n == 0 {
                return Exact::Finite { negative: a && b, mantissa: 0, exponent: 0 };
            }
            if m == 0 || n == 0 {
                return if m == 0 { y } else { x };
            }
            if e < f {
                return add(y, x);
            }
            assert!(m < 1 << 48 && n < 1 << 48);
            let apart = (e - f).min(76);
            let n = if e - f > 76 { 1 } else { n as i128 };
            let signed = |negative: bool, x: i128| if negative { -x } else { x };
            let sum = signed(a, (m as i128) << apart) + signed(b, n);
            Exact::Finite { negative: sum < 0, mantissa: sum.unsigned_abs(), exponent: e - apart }
        }
    }
}

pub fn negate(x: Exact) -> Exact {
    match x {
        Exact::Nan => x,
        Exact::Infinite { negative } => Exact::Infinite { negative: !negative },
        Exact::Finite { negative, mantissa, exponent } => Exact::Finite { negative: !negative, mantissa, exponent },
    }
}

/// The reference itself, where the host can say.
#[test]
fn agrees_with_the_host() {
    let mut random = super::Random(2);
    for _ in 0..100_000 {
        let [x, y] = [(); 2].map(|()| super::value(Ty::F32, &mut random));
        let [f, g] = [x, y].map(|x| f32::from_bits(x as u32));
        let [x, y] = [x, y].map(|x| decode(Ty::F32, x));
        let host = |x: f32| if x.is_nan() { 0x7fff_ffff } else { u64::from(x.to_bits()) };
        assert_eq!(encode(Ty::F32, add(x, y)), host(f + g), "{f:e} + {g:e}");
        assert_eq!(encode(Ty::F32, mul(x, y)), host(f * g), "{f:e} * {g:e}");
        assert_eq!(encode(Ty::F64, x), if f.is_nan() { 0xfff8 << 48 } else { f64::from(f).to_bits() });
    }
}
