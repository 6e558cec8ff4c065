//! What [`Math`](crate::isa::Math) names: one function of up to three lanes' values each.

use super::soft::{self, Real};
use super::{Lanes, float, is_float};
use crate::isa::{Approx, Class, FloatOp, Math, Mode, Packed, PrmtMode, Round, Small, Test, Ty};

/// Computes one instruction for all lanes; missing sources read as 0.
pub(crate) fn math(op: Math, sources: &[Lanes]) -> Lanes {
    std::array::from_fn(|lane| {
        let value = |i: usize| sources.get(i).map_or(0, |lanes| lanes[lane]);
        element(op, [value(0), value(1), value(2)])
    })
}

fn packed(ty: Ty) -> bool {
    matches!(ty, Ty::F16x2 | Ty::Bf16x2)
}

/// Applies a function of one 16-bit format to both halves, or to the one value there is.
fn halves(ty: Ty, x: [u64; 3], f: impl Fn([u64; 3]) -> u64) -> u64 {
    if packed(ty) {
        f(x.map(|x| x & 0xffff)) | f(x.map(|x| x >> 16 & 0xffff)) << 16
    } else {
        f(x.map(|x| x & (u64::MAX >> (64 - ty.bits()))))
    }
}

fn element(op: Math, x: [u64; 3]) -> u64 {
    let [a, b, c] = x;
    let word = |f: u32| u64::from(f);
    match op {
        Math::Float(op, ty, mode) => halves(ty, x, |x| soft::float(op, soft::format(ty), mode, x)),
        Math::Approx(op, ty, ftz) => halves(ty, x, |x| approximate(op, ty, ftz, x)),
        Math::MinMax { max, ty, ftz, nan, xorsign } => halves(ty, x, |x| min_max((max, ftz, nan, xorsign), ty, x)),
        Math::Neg(ty) => halves(ty, x, |[a, ..]| soft::flush(soft::format(ty), a) ^ sign_bit(ty)),
        Math::Abs(ty) => halves(ty, x, |[a, ..]| soft::flush(soft::format(ty), a) & !sign_bit(ty)),
        // PTX ISA, "copysign": the sign of a, the magnitude of b.
        Math::Copysign(ty) => b & !sign_bit(ty) | a & sign_bit(ty),
        Math::Select { float: false, .. } => {
            if (c as u32).cast_signed() >= 0 {
                a
            } else {
                b
            }
        }
        Math::Select { ftz, .. } => {
            let c = if ftz { soft::flush(soft::F32, c) } else { c };
            if f32::from_bits(c as u32) >= 0.0 { a } else { b }
        }
        Math::Narrow { .. } => narrow(op, x),
        Math::Widen { from, relu } => widen(from, relu, a),
        Math::ConvertFlush { .. } | Math::Demote { .. } | Math::FromInt { .. } => convert(op, a),
        Math::AddSat => word(signed(a).saturating_add(signed(b)).cast_unsigned()),
        Math::SubSat => word(signed(a).saturating_sub(signed(b)).cast_unsigned()),
        Math::MadHiSat => {
            let high = (i64::from(signed(a)) * i64::from(signed(b))) >> 32;
            word((high as i32).saturating_add(signed(c)).cast_unsigned())
        }
        Math::MinMaxRelu { max } => {
            let picked = if max { signed(a).max(signed(b)) } else { signed(a).min(signed(b)) };
            word(picked.max(0).cast_unsigned())
        }
        _ => integer(op, x),
    }
}

fn signed(x: u64) -> i32 {
    (x as u32).cast_signed()
}

fn sign_bit(ty: Ty) -> u64 {
    if packed(ty) { 0x8000 } else { 1 << (ty.bits() - 1) }
}

/// PTX ISA, "Integer Arithmetic Instructions" and "Video Instructions".
fn integer(op: Math, [a, b, c]: [u64; 3]) -> u64 {
    let (x, y, z) = (a as u32, b as u32, c as u32);
    match op {
        Math::Mul24 { high, signed } => u64::from(mul24(high, signed, x, y)),
        Math::Mad24 { high, signed, sat } => {
            let product = mul24(high, signed, x, y);
            u64::from(if sat {
                product.cast_signed().saturating_add(z.cast_signed()).cast_unsigned()
            } else {
                product.wrapping_add(z)
            })
        }
        Math::Sad(ty) => {
            let mask = u64::MAX >> (64 - ty.bits());
            let extend = |v: u64| match ty {
                Ty::S(_) => i128::from((v << (64 - ty.bits())).cast_signed() >> (64 - ty.bits())),
                _ => i128::from(v & mask),
            };
            c.wrapping_add((extend(a) - extend(b)).unsigned_abs() as u64) & mask
        }
        Math::Dp4a { signed } => {
            let byte = |v: u32, i: u32, signed: bool| {
                let byte = (v >> (8 * i)) as u8;
                if signed { i64::from(byte.cast_signed()) } else { i64::from(byte) }
            };
            let sum: i64 = (0..4).map(|i| byte(x, i, signed[0]) * byte(y, i, signed[1])).sum();
            u64::from(z.wrapping_add(sum as u32))
        }
        Math::Dp2a { high, signed } => {
            let half = |i: u32| {
                let half = (x >> (16 * i)) as u16;
                if signed[0] { i64::from(half.cast_signed()) } else { i64::from(half) }
            };
            let byte = |i: u32| {
                let byte = (y >> (8 * (i + if high { 2 } else { 0 }))) as u8;
                if signed[1] { i64::from(byte.cast_signed()) } else { i64::from(byte) }
            };
            u64::from(z.wrapping_add((half(0) * byte(0) + half(1) * byte(1)) as u32))
        }
        Math::Bfind { ty, shift } => u64::from(bfind(ty, shift, a)),
        Math::Fns => u64::from(nth_set(x, y, z.cast_signed())),
        Math::Packed16 { op, signed, relu } => {
            let half = |shift: u32| {
                let (x, y) = ((a >> shift) as u16, (b >> shift) as u16);
                let picked = match (op, signed) {
                    (Packed::Add, _) => x.wrapping_add(y),
                    (Packed::Min, false) => x.min(y),
                    (Packed::Max, false) => x.max(y),
                    (Packed::Min, true) => x.cast_signed().min(y.cast_signed()).cast_unsigned(),
                    (Packed::Max, true) => x.cast_signed().max(y.cast_signed()).cast_unsigned(),
                };
                u64::from(if relu && picked.cast_signed() < 0 { 0 } else { picked }) << shift
            };
            half(0) | half(16)
        }
        Math::Bmsk { wrap } => {
            let (start, width) = if wrap { (x & 31, y & 31) } else { (x.min(32), y.min(32)) };
            let ones = (1u64 << width) - 1;
            (ones << start) & 0xffff_ffff
        }
        Math::Szext { wrap, signed } => {
            let width = if wrap { y & 31 } else { y.min(32) };
            let unused = 32 - width;
            if width == 0 {
                0
            } else if signed {
                u64::from(((x << unused).cast_signed() >> unused).cast_unsigned())
            } else {
                u64::from(x << unused >> unused)
            }
        }
        Math::AbsDiff4 { sum } => {
            let differences = x.to_le_bytes().into_iter().zip(y.to_le_bytes()).map(|(x, y)| x.abs_diff(y));
            if sum {
                u64::from(differences.fold(z, |sum, byte| sum.wrapping_add(u32::from(byte))))
            } else {
                differences.rev().fold(0, |word, byte| word << 8 | u64::from(byte))
            }
        }
        Math::Prmt(mode) => u64::from(permute(mode, x, y, z & 3)),
        _ => u64::MAX,
    }
}

/// The 48-bit product of the low 24 bits: its low 32 bits, or its high 32 (bits 16 to 47).
fn mul24(high: bool, signed: bool, x: u32, y: u32) -> u32 {
    let extend = |v: u32| if signed { i64::from((v << 8).cast_signed() >> 8) } else { i64::from(v & 0xff_ffff) };
    let product = extend(x) * extend(y);
    (if high { product >> 16 } else { product }) as u32
}

/// PTX ISA, "bfind": of a negative signed number, the highest bit that differs from the sign.
fn bfind(ty: Ty, shift: bool, a: u64) -> u32 {
    let bits = ty.bits();
    let mask = u64::MAX >> (64 - bits);
    let negative = matches!(ty, Ty::S(_)) && a >> (bits - 1) & 1 == 1;
    let value = if negative { !a } else { a } & mask;
    if value == 0 {
        return u32::MAX;
    }
    let position = 63 - value.leading_zeros();
    if shift { bits - 1 - position } else { position }
}

/// PTX ISA, "fns": the n-th set bit at or above `base`, or at or below it for negative n; `base` itself for n = 0.
fn nth_set(mask: u32, base: u32, n: i32) -> u32 {
    let set = |i: u32| mask >> i & 1 == 1;
    let count = n.unsigned_abs() as usize;
    match n {
        _ if base > 31 => u32::MAX,
        0 => {
            if set(base) {
                base
            } else {
                u32::MAX
            }
        }
        1.. => (base..32).filter(|&i| set(i)).nth(count - 1).unwrap_or(u32::MAX),
        _ => (0..=base).rev().filter(|&i| set(i)).nth(count - 1).unwrap_or(u32::MAX),
    }
}

/// PTX ISA, "prmt", the table of modes; `select` is the low 2 bits of the third source.
fn permute(mode: PrmtMode, x: u32, y: u32, select: u32) -> u32 {
    let both = u64::from(y) << 32 | u64::from(x);
    let source = |i: u32| match mode {
        PrmtMode::F4e => i + select,
        PrmtMode::B4e => select.wrapping_sub(i) & 7,
        PrmtMode::Rc8 => select,
        PrmtMode::Ecl => i.max(select),
        PrmtMode::Ecr => i.min(select),
        PrmtMode::Rc16 => (select & 1) * 2 + (i & 1),
    };
    (0..4).fold(0, |word, i| word | ((both >> (8 * source(i))) as u32 & 0xff) << (8 * i))
}

fn to_f64(ty: Ty, bits: u64) -> f64 {
    match ty {
        Ty::F64 => f64::from_bits(bits),
        Ty::F32 => f32::from_bits(bits as u32).into(),
        _ => f64::from_bits(Real::decode(soft::format(ty), bits).encode(soft::F64, Round::Rn, false)),
    }
}

/// PTX ISA, "Floating Point Instructions": what is approximate there is rounded to nearest here, well inside the bounds given.
fn approximate(op: Approx, ty: Ty, ftz: bool, x: [u64; 3]) -> u64 {
    let format = soft::format(ty);
    let flushed = x.map(|x| if ftz && ty != Ty::F64 { soft::flush(format, x) } else { x });
    let [a, b, _] = flushed.map(|x| to_f64(ty, x));
    let value = match op {
        // "For 2^126 < |b| < 2^128, if a is infinity, div.approx.f32 returns NaN, otherwise it returns 0."
        Approx::Div if b.is_finite() && b.abs() > 2f64.powi(126) => {
            if a.is_infinite() {
                f64::NAN
            } else {
                0.0_f64.copysign(a * b.signum())
            }
        }
        Approx::Div | Approx::DivFull => a / b,
        Approx::Rcp => 1.0 / a,
        Approx::Sqrt => a.sqrt(),
        // -0 gives -infinity: 1 / sqrt(-0).
        Approx::Rsqrt => 1.0 / a.sqrt(),
        Approx::Sin => a.sin(),
        Approx::Cos => a.cos(),
        Approx::Lg2 => a.log2(),
        Approx::Ex2 => a.exp2(),
        Approx::Tanh => a.tanh(),
    };
    if ty == Ty::F64 {
        // `.approx.ftz.f64`: the upper 32 bits of the operand decide, the lower 32 of the result are zero.
        let [a, ..] = x.map(|x| f64::from_bits(soft::flush(soft::F64, x & !0xffff_ffff)));
        let value = if op == Approx::Rcp { 1.0 / a } else { 1.0 / a.sqrt() };
        let bits = soft::flush(soft::F64, float::canonical64(value));
        return if value.is_nan() { 0x7fff_ffff << 32 } else { bits & !0xffff_ffff };
    }
    let bits = Real::decode(soft::F64, float::canonical64(value)).encode(format, Round::Rn, false);
    if ftz { soft::flush(format, bits) } else { bits }
}

fn min_max((max, ftz, nan, xorsign): (bool, bool, bool, bool), ty: Ty, x: [u64; 3]) -> u64 {
    let format = soft::format(ty);
    let sign = sign_bit(ty);
    let flushed = x.map(|x| if ftz { soft::flush(format, x) } else { x });
    let negative = (flushed[0] ^ flushed[1]) & sign;
    let [a, b] = [flushed[0], flushed[1]].map(|x| if xorsign { x & !sign } else { x });
    let (x, y) = (to_f64(ty, a), to_f64(ty, b));
    let canonical = Real::Nan.encode(format, Round::Rn, false);
    let picked = match (x.is_nan(), y.is_nan()) {
        (true, true) => return canonical,
        (true, false) | (false, true) if nan => return canonical,
        (true, false) => b,
        (false, true) => a,
        // -0 before +0.
        _ => {
            let a_first = x < y || (x == y && a & sign != 0);
            if a_first == max { b } else { a }
        }
    };
    if xorsign { picked | negative } else { picked }
}

fn small(format: Small) -> soft::Format {
    match format {
        Small::E4m3 => soft::E4M3,
        Small::E5m2 => soft::E5M2,
        Small::Tf32 => soft::TF32,
        Small::F16 => soft::F16,
        Small::Bf16 => soft::BF16,
    }
}

/// PTX ISA, "cvt", to the formats of 8, 16 and 19 bits.
fn narrow(op: Math, x: [u64; 3]) -> u64 {
    let Math::Narrow { to, from, pair, round, away, relu, finite, ftz, sat } = op else { return u64::MAX };
    let format = small(to);
    let convert = |bits: u64| {
        let bits = if ftz { soft::flush(soft::format(from), bits) } else { bits };
        let value = Real::decode(soft::format(from), bits);
        let mut narrowed = value.encode(format, round, away);
        if finite {
            narrowed = soft::saturate(format, value, narrowed);
        }
        soft::clamp(format, narrowed, sat, relu)
    };
    match (to, pair) {
        (Small::Tf32, _) => convert(x[0]) << 13,
        (Small::E4m3 | Small::E5m2, _) if packed(from) => convert(x[0] >> 16 & 0xffff) << 8 | convert(x[0] & 0xffff),
        (Small::E4m3 | Small::E5m2, _) => convert(x[0]) << 8 | convert(x[1]),
        (_, true) => convert(x[0]) << 16 | convert(x[1]),
        (_, false) => convert(x[0]),
    }
}

fn widen(from: Small, relu: bool, a: u64) -> u64 {
    let convert = |bits: u64| {
        let half = Real::decode(small(from), bits & 0xff).encode(soft::F16, Round::Rn, false);
        soft::clamp(soft::F16, half, false, relu)
    };
    convert(a) | convert(a >> 8) << 16
}

fn convert(op: Math, a: u64) -> u64 {
    match op {
        Math::ConvertFlush { to, from, round, integer, sat } => {
            let a = if from == Ty::F32 { soft::flush(soft::F32, a) } else { a };
            let d = super::cvt(to, from, round, integer, sat, false, &[a; 32])[0];
            if to == Ty::F32 && is_float(from) { soft::flush(soft::F32, d) } else { d }
        }
        Math::Demote { round, ftz, sat } => {
            let bits = Real::decode(soft::F64, a).encode(soft::F32, round, false);
            soft::clamp(soft::F32, if ftz { soft::flush(soft::F32, bits) } else { bits }, sat, false)
        }
        Math::FromInt { to, from, round, sat } => {
            let unused = 64 - from.bits();
            let real = match from {
                Ty::S(_) => {
                    let x = (a << unused).cast_signed() >> unused;
                    Real::integer(x < 0, x.unsigned_abs())
                }
                _ => Real::integer(false, a << unused >> unused),
            };
            let format = soft::format(to);
            soft::clamp(format, real.encode(format, round, false), sat, false)
        }
        _ => u64::MAX,
    }
}

/// A bit per lane for the first predicate, and for the second.
pub(crate) fn test(test: Test, a: &Lanes, b: &Lanes) -> (u32, u32) {
    match test {
        Test::Compare { cmp, ty, ftz } => {
            let scalar = match ty {
                Ty::F16x2 => Ty::F16,
                Ty::Bf16x2 => Ty::Bf16,
                other => other,
            };
            let part = |lanes: &Lanes, shift: u32| {
                lanes.map(|x| {
                    let x = if packed(ty) { x >> shift & 0xffff } else { x };
                    if ftz { soft::flush(soft::format(scalar), x) } else { x }
                })
            };
            let low = super::setp(cmp, scalar, &part(a, 0), &part(b, 0));
            if packed(ty) { (low, super::setp(cmp, scalar, &part(a, 16), &part(b, 16))) } else { (low, !low) }
        }
        Test::Class { class, ty } => {
            let holds = |x: u64| {
                let value = to_f64(ty, x);
                let subnormal = value != 0.0 && soft::flush(soft::format(ty), x) != x;
                match class {
                    Class::Finite => value.is_finite(),
                    Class::Infinite => value.is_infinite(),
                    Class::Number => !value.is_nan(),
                    Class::NotANumber => value.is_nan(),
                    Class::Normal => value.is_finite() && value != 0.0 && !subnormal,
                    Class::Subnormal => subnormal,
                }
            };
            let mask = a.iter().enumerate().fold(0, |mask, (lane, x)| mask | u32::from(holds(*x)) << lane);
            (mask, !mask)
        }
    }
}

/// The result of `set` for a lane whose comparison holds: all ones, or 1.0.
pub(crate) fn truth(to: Ty) -> u64 {
    match to {
        Ty::F32 | Ty::F16 | Ty::Bf16 => Real::integer(false, 1).encode(soft::format(to), Round::Rn, false),
        _ => u64::MAX >> (64 - to.bits()),
    }
}

/// Whether the ISA has these modifiers for this type.
pub(crate) fn float_mode_exists(op: FloatOp, ty: Ty, mode: Mode) -> bool {
    let Mode { round, ftz, sat, relu } = mode;
    let nearest = round == Round::Rn;
    match ty {
        Ty::F32 => !relu && (!sat || !matches!(op, FloatOp::Div | FloatOp::Rcp | FloatOp::Sqrt)),
        Ty::F64 => !ftz && !sat && !relu,
        Ty::F16 | Ty::F16x2 => {
            nearest
                && matches!(op, FloatOp::Add | FloatOp::Sub | FloatOp::Mul | FloatOp::Fma)
                && (!relu || op == FloatOp::Fma)
                && !(sat && relu)
        }
        Ty::Bf16 | Ty::Bf16x2 => nearest && !ftz && !sat && (!relu || op == FloatOp::Fma),
        _ => false,
    }
}
