use super::exact::{self, Exact};
use super::*;

const TYPES: [Ty; 12] = [
    Ty::U(8),
    Ty::U(16),
    Ty::U(32),
    Ty::U(64),
    Ty::S(8),
    Ty::S(16),
    Ty::S(32),
    Ty::S(64),
    Ty::F16,
    Ty::Bf16,
    Ty::F32,
    Ty::F64,
];

fn exact_value(ty: Ty, bits: u64) -> Exact {
    if is_float(ty) {
        return exact::decode(ty, bits);
    }
    let x = bits & mask(ty);
    let negative = matches!(ty, Ty::S(_)) && x >> (ty.bits() - 1) == 1;
    let mantissa = if negative { (1u128 << ty.bits()) - u128::from(x) } else { u128::from(x) };
    Exact::Finite { negative, mantissa, exponent: 0 }
}

/// To an integer `mantissa`, with exponent 0 unless it is one already.
fn integral(round: Round, value: Exact) -> Exact {
    let Exact::Finite { negative, mantissa, exponent } = value else { return value };
    if exponent >= 0 {
        return value;
    }
    let drop = (-exponent).min(127);
    let (whole, rest, half) = (mantissa >> drop, mantissa & ((1 << drop) - 1), 1u128 << (drop - 1));
    let up = match round {
        Round::Rn => rest > half || (rest == half && whole & 1 == 1),
        Round::Rz => false,
        Round::Rm => negative && rest != 0,
        Round::Rp => !negative && rest != 0,
    };
    Exact::Finite { negative, mantissa: whole + u128::from(up), exponent: 0 }
}

fn to_integer(to: Ty, from: Ty, value: Exact, clamps: bool) -> u64 {
    let (negative, mantissa) = match value {
        Exact::Nan if from == Ty::F64 || to.bits() == 64 => return register(to, 1 << (to.bits() - 1)),
        Exact::Nan => return 0,
        Exact::Infinite { negative } => (negative, 1 << 100),
        Exact::Finite { negative, mantissa: 0, .. } => (negative, 0),
        Exact::Finite { negative, mantissa, exponent } => {
            (negative, if exponent > 60 { 1 << 100 } else { mantissa << exponent })
        }
    };
    let number = if negative { -(mantissa as i128) } else { mantissa as i128 };
    let (least, most) = match to {
        Ty::S(bits) => (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1),
        _ => (0, i128::from(mask(to))),
    };
    register(to, if clamps { number.clamp(least, most) } else { number } as u64 & mask(to))
}

/// An s8 sits in a 16-bit register with its sign extended.
fn register(to: Ty, bits: u64) -> u64 {
    if to == Ty::S(8) { bits as u8 as i8 as i16 as u16 as u64 } else { bits }
}

fn reference((to, from, round, integer, sat, relu): (Ty, Ty, Round, bool, bool, bool), bits: u64) -> u64 {
    let mut value = exact_value(from, bits);
    if integer || (is_float(from) && !is_float(to)) {
        value = integral(round, value);
    }
    if !is_float(to) {
        return to_integer(to, from, value, sat || is_float(from));
    }
    let zero = Exact::Finite { negative: false, mantissa: 0, exponent: 0 };
    let one = exact::encode(Ty::F64, Exact::Finite { negative: false, mantissa: 1, exponent: 0 });
    value = match value {
        Exact::Nan if sat => zero,
        Exact::Infinite { negative: true } | Exact::Finite { negative: true, .. } if sat || relu => zero,
        Exact::Infinite { .. } if sat => exact::decode(Ty::F64, one),
        Exact::Finite { .. } if sat && exact::encode(Ty::F64, value) > one => exact::decode(Ty::F64, one),
        other => other,
    };
    exact::encode(to, value)
}

fn inputs(from: Ty, random: &mut Random) -> Vec<u64> {
    if from.bits() <= 16 {
        return (0..1 << from.bits()).collect();
    }
    let mut all = specials(from);
    all.extend((0..4000).map(|_| random.any_size() & mask(from)));
    if is_float(from) {
        // Of moderate size, with and without fractions, and half-way between integers.
        for _ in 0..4000 {
            let x = (random.next() as i64 >> (random.next() % 63)) as f64 / (1u64 << (random.next() % 20)) as f64;
            all.push(if from == Ty::F64 { x.to_bits() } else { u64::from((x as f32).to_bits()) });
        }
    } else {
        // Integers about the ties of the float formats.
        for shift in 0..from.bits() {
            for significand in [0x101u64, 0x801, 0x100_0001, 0x100_0003, 0x20_0000_0000_0001] {
                let x = significand.wrapping_shl(shift);
                all.extend([x.wrapping_sub(1), x, x.wrapping_add(1), x.wrapping_neg()].map(|x| x & mask(from)));
            }
        }
    }
    all.resize(all.len().next_multiple_of(32), 0);
    all
}

/// Every combination that is let through, on all 16-bit and 8-bit sources and on chosen and random wider ones.
#[test]
fn every_conversion() {
    let mut random = Random(31);
    let mut tried = 0;
    for from in TYPES {
        let inputs = inputs(from, &mut random);
        for to in TYPES {
            for round in [Round::Rn, Round::Rz, Round::Rm, Round::Rp] {
                for flags in 0..8 {
                    let [integer, sat, relu] = [0, 1, 2].map(|bit| flags >> bit & 1 == 1);
                    let case = (to, from, round, integer, sat, relu);
                    if !implemented(&Op::Cvt { to, from, round, integer, sat, relu, d: None, a: Src::Imm(0) }) {
                        continue;
                    }
                    tried += 1;
                    for chunk in inputs.chunks_exact(32) {
                        // What lies above a narrow source in its register does not matter.
                        let above = if from.bits() < 64 { !0 << from.bits() } else { 0 };
                        let a: Lanes = std::array::from_fn(|lane| {
                            chunk[lane] | if lane & 1 == 0 { 0 } else { above & 0xffff_ffff }
                        });
                        let d = cvt(to, from, round, integer, sat, relu, &a);
                        for lane in 0..32 {
                            assert_eq!(d[lane], reference(case, chunk[lane]), "{case:?} {:#x}", chunk[lane]);
                        }
                    }
                }
            }
        }
    }
    assert!(tried > 300, "{tried} combinations");
}

#[test]
fn packs_the_first_operand_above() {
    let mut random = Random(32);
    for [a, b] in pairs(Ty::F32, &mut random) {
        for (packed, scalar) in [(Ty::F16x2, Ty::F16), (Ty::Bf16x2, Ty::Bf16)] {
            for relu in [false, true] {
                let d = cvt_pack(packed, relu, &a, &b);
                for lane in 0..32 {
                    let [high, low] =
                        [a[lane], b[lane]].map(|x| reference((scalar, Ty::F32, Round::Rn, false, false, relu), x));
                    assert_eq!(d[lane], high << 16 | low, "{packed:?} relu {relu}");
                }
            }
        }
    }
}

/// By hand.
#[test]
fn worked_examples() {
    let f32s = |x: f32| [u64::from(x.to_bits()); 32];
    let to = |ty, round, x: f32| cvt(ty, Ty::F32, round, true, false, false, &f32s(x))[9];
    assert_eq!([0.5, 1.5, 2.5, -0.5].map(|x| to(Ty::S(32), Round::Rn, x)), [0, 2, 2, 0]);
    assert_eq!([3e9, -3e9, f32::NAN].map(|x| to(Ty::S(32), Round::Rz, x)), [0x7fff_ffff, 0x8000_0000, 0]);
    assert_eq!([-1.0, 5e9].map(|x| to(Ty::U(32), Round::Rz, x)), [0, 0xffff_ffff]);
    assert_eq!(to(Ty::S(64), Round::Rz, f32::NAN), 1 << 63);
    assert_eq!(to(Ty::F32, Round::Rp, -0.5), 0x8000_0000, "-0.5 rounds up to -0");
    assert_eq!(cvt(Ty::S(32), Ty::S(8), Round::Rz, false, false, false, &[0x80; 32])[0], 0xffff_ff80);
    assert_eq!(cvt(Ty::U(8), Ty::S(32), Round::Rz, false, true, false, &[0xffff_ffff; 32])[0], 0);
}
