//! "Data Movement and Conversion Instructions: cvt".
//!
//! Integers widen by their own sign and are chopped to the destination; with `.sat` they clamp. Between floats and integers
//! everything goes through f64, which holds each number of the narrower formats.

use super::float::{canonical32, canonical64};
use super::narrow::{Bf16, F16, Narrow, odd32};
use super::{Lane, Lanes, REFUSED, is_float, is_packed, map, zip};
use crate::isa::{Round, Ty};

pub(super) fn implemented(to: Ty, from: Ty, round: Round, integer: bool, sat: bool, relu: bool) -> bool {
    if matches!((to, from), (Ty::B(_), _) | (_, Ty::B(_))) || is_packed(to) || is_packed(from) {
        return false;
    }
    // `.sat` to a float is for f16, f32 and f64.
    if sat && to == Ty::Bf16 {
        return false;
    }
    let same_or_wider = to == from || to.bits() > from.bits();
    match (is_float(to), is_float(from)) {
        (false, false) => !integer && !relu,
        (false, true) => (integer || round == Round::Rz) && !relu,
        (true, false) => round == Round::Rn && !integer && !relu,
        // `.rni` and its like: within one type, to an integral value.
        (true, true) if integer => to == from && !relu,
        (true, true) if relu => round == Round::Rn && from == Ty::F32 && matches!(to, Ty::F16 | Ty::Bf16),
        (true, true) => same_or_wider || round == Round::Rn,
    }
}

pub(crate) fn cvt(to: Ty, from: Ty, round: Round, integer: bool, sat: bool, relu: bool, a: &Lanes) -> Lanes {
    let plain = !integer && !sat && !relu;
    match (to, from) {
        // The pairs that kernels are full of.
        (Ty::F32, Ty::F16) if plain => map(a, |x: u16| canonical32(F16::widen(x))),
        (Ty::F32, Ty::Bf16) if plain => map(a, |x: u16| canonical32(Bf16::widen(x))),
        (Ty::F16, Ty::F32) if plain => map(a, F16::narrow),
        (Ty::Bf16, Ty::F32) if plain => map(a, Bf16::narrow),
        // The one pair with a number of the source between two of f64 that must be rounded to nearest at once.
        (Ty::F64, Ty::U(64)) if !sat => map(a, |x: u64| x as f64),
        (Ty::F64, Ty::S(64)) if !sat => map(a, |x: i64| x as f64),
        (Ty::U(_) | Ty::S(_), Ty::U(_) | Ty::S(_)) => integers(to, from, sat, a),
        _ => {
            let mut values = load(from, a);
            if integer || (is_float(from) && !is_float(to)) {
                integral(round, &mut values);
            }
            if sat && is_float(to) {
                // NaN to +0: it is not greater than 0.
                values.iter_mut().for_each(|x| *x = if *x > 0.0 { x.min(1.0) } else { 0.0 });
            }
            if relu {
                values.iter_mut().for_each(|x| *x = clamp(*x));
            }
            store(to, from, &values)
        }
    }
}

/// `.relu`: 0 for what is negative, -0 included; NaN stays.
#[inline(always)]
fn clamp(x: f64) -> f64 {
    if x <= 0.0 { 0.0 } else { x }
}

pub(crate) fn cvt_pack(to: Ty, relu: bool, a: &Lanes, b: &Lanes) -> Lanes {
    match to {
        Ty::F16x2 => pack::<F16>(relu, a, b),
        Ty::Bf16x2 => pack::<Bf16>(relu, a, b),
        _ => REFUSED,
    }
}

fn pack<N: Narrow>(relu: bool, a: &Lanes, b: &Lanes) -> Lanes {
    let convert = |x: f32| {
        let rounded = N::narrow(x);
        // The sign bit alone decides: a NaN is `NAN16`, which has none.
        u32::from(if relu & (rounded & 0x8000 != 0) { 0 } else { rounded })
    };
    zip(a, b, |high: f32, low: f32| convert(high) << 16 | convert(low))
}

/// Chopping keeps the low bits; s8 has no register of its own and extends its sign over 16 bits.
fn integers(to: Ty, from: Ty, sat: bool, a: &Lanes) -> Lanes {
    let signed = matches!(to, Ty::S(_));
    let top = u64::MAX >> (64 - to.bits()) >> u32::from(signed);
    let bottom = if signed { !top.cast_signed() } else { 0 };
    match from {
        Ty::S(_) => {
            let unused = 64 - from.bits();
            let top = i64::try_from(top).unwrap_or(i64::MAX);
            finish(to, a, |x: i64| {
                let x = x << unused >> unused;
                if sat { x.clamp(bottom, top).cast_unsigned() } else { x.cast_unsigned() }
            })
        }
        _ => {
            let mask = u64::MAX >> (64 - from.bits());
            finish(to, a, |x: u64| if sat { (x & mask).min(top) } else { x & mask })
        }
    }
}

#[inline(always)]
fn finish<T: Lane>(to: Ty, a: &Lanes, f: impl Fn(T) -> u64) -> Lanes {
    if to == Ty::S(8) {
        return map(a, |x| i16::from(f(x) as i8));
    }
    let mask = u64::MAX >> (64 - to.bits());
    map(a, |x| f(x) & mask)
}

/// The lanes' values: exact, but that 64-bit integers beyond 2^53 keep 42 bits or more and a last one that says whether
/// anything was dropped (rounding to odd), enough for every format below f64.
fn load(from: Ty, a: &Lanes) -> [f64; 32] {
    fn each<T: Lane>(a: &Lanes, f: impl Fn(T) -> f64) -> [f64; 32] {
        let mut values = [0.0; 32];
        for (value, a) in values.iter_mut().zip(a) {
            *value = f(T::get(*a));
        }
        values
    }
    let sticky = |magnitude: u64| {
        let kept = magnitude & !0x7ff | u64::from(magnitude & 0x7ff != 0) << 11;
        (if magnitude < 1 << 53 { magnitude } else { kept }) as f64
    };
    match from {
        Ty::F16 => each(a, |x: u16| f64::from(F16::widen(x))),
        Ty::Bf16 => each(a, |x: u16| f64::from(Bf16::widen(x))),
        Ty::F32 => each(a, |x: f32| f64::from(x)),
        Ty::F64 => each(a, |x: f64| x),
        Ty::U(8) => each(a, |x: u16| f64::from(x as u8)),
        Ty::S(8) => each(a, |x: u16| f64::from(x as i8)),
        Ty::U(16) => each(a, |x: u16| f64::from(x)),
        Ty::S(16) => each(a, |x: i16| f64::from(x)),
        Ty::U(32) => each(a, |x: u32| f64::from(x)),
        Ty::S(32) => each(a, |x: i32| f64::from(x)),
        Ty::S(64) => each(a, |x: i64| if x < 0 { -sticky(x.unsigned_abs()) } else { sticky(x.unsigned_abs()) }),
        _ => each(a, sticky),
    }
}

/// To an integral value, with the sign of the argument when that is zero.
fn integral(round: Round, values: &mut [f64; 32]) {
    /// From here on there are no fractions, and adding it to less rounds the fraction away.
    const WHOLE: f64 = 4_503_599_627_370_496.0;
    for value in values {
        let x = value.abs();
        let nearest = (x + WHOLE) - WHOLE;
        let down = if nearest > x { nearest - 1.0 } else { nearest };
        let up = if nearest < x { nearest + 1.0 } else { nearest };
        let rounded = match (round, value.is_sign_negative()) {
            (Round::Rn, _) => nearest,
            (Round::Rz, _) | (Round::Rm, false) | (Round::Rp, true) => down,
            (Round::Rm, true) | (Round::Rp, false) => up,
        };
        // NaN and infinity fail the comparison.
        *value = if x < WHOLE { rounded.copysign(*value) } else { *value };
    }
}

/// Integers clamp. NaN gives 0 where neither an f64 nor a 64-bit integer takes part, else the most significant bit alone
/// (the ISA's "Floating Point Notes" for cvt, as of 9.0).
fn store(to: Ty, from: Ty, values: &[f64; 32]) -> Lanes {
    let a: Lanes = values.map(f64::to_bits);
    match to {
        Ty::F16 => map(&a, |x: f64| F16::narrow(odd32(x))),
        Ty::Bf16 => map(&a, |x: f64| Bf16::narrow(odd32(x))),
        Ty::F32 => map(&a, |x: f64| canonical32(x as f32)),
        Ty::F64 => map(&a, canonical64),
        Ty::U(_) | Ty::S(_) => {
            let top_bit = if from == Ty::F64 || to.bits() == 64 { 1u64 << (to.bits() - 1) } else { 0 };
            let mut d = match to {
                Ty::U(8) => map(&a, |x: f64| u16::from(x as u8)),
                Ty::S(8) => map(&a, |x: f64| i16::from(x as i8)),
                Ty::U(16) => map(&a, |x: f64| x as u16),
                Ty::S(16) => map(&a, |x: f64| x as i16),
                Ty::U(32) => map(&a, |x: f64| x as u32),
                Ty::S(32) => map(&a, |x: f64| x as i32),
                Ty::S(64) => map(&a, |x: f64| x as i64),
                _ => map(&a, |x: f64| x as u64),
            };
            let top_bit = if to == Ty::S(8) && top_bit != 0 { 0xff80 } else { top_bit };
            for (d, x) in d.iter_mut().zip(values) {
                *d = if x.is_nan() { top_bit } else { *d };
            }
            d
        }
        _ => REFUSED,
    }
}
