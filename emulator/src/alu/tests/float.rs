use super::exact::{self, Exact};
use super::*;
use crate::alu::narrow::{Bf16, F16, Narrow};

const SCALARS: [Ty; 3] = [Ty::F16, Ty::Bf16, Ty::F32];

#[track_caller]
fn same(lanes: &Lanes, expected: impl Fn(usize) -> u64, what: &str) {
    for (lane, d) in lanes.iter().enumerate() {
        let expected = expected(lane);
        assert!(*d == expected, "{what}, lane {lane}: {d:#x} for {expected:#x}");
    }
}

#[test]
fn widening_is_exact() {
    for bits in 0..=u16::MAX {
        let (f, b) = (half::f16::from_bits(bits), half::bf16::from_bits(bits));
        let agree = |x: f32, y: f32| x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan());
        assert!(agree(F16::widen(bits), f.to_f32()), "f16 {bits:#x}");
        assert!(agree(Bf16::widen(bits), b.to_f32()), "bf16 {bits:#x}");
    }
}

/// At every number of the format, at every tie between two, and one bit beside each.
#[test]
fn narrowing_rounds_to_nearest_even() {
    for bits in 0..=u16::MAX {
        for (ty, value, tie) in [(Ty::F16, F16::widen(bits), 1u32 << 12), (Ty::Bf16, Bf16::widen(bits), 1 << 15)] {
            let next = if ty == Ty::F16 { F16::widen(bits.wrapping_add(1)) } else { Bf16::widen(bits.wrapping_add(1)) };
            // Of f16's subnormals the tie is not at a fixed bit of f32.
            let middle =
                if (value + next).is_finite() { (value * 0.5 + next * 0.5).to_bits() } else { value.to_bits() + tie };
            for around in [value.to_bits(), middle] {
                for bits in [around.wrapping_sub(1), around, around.wrapping_add(1)] {
                    let expected = exact::encode(ty, exact::decode(Ty::F32, u64::from(bits)));
                    let value = f32::from_bits(bits);
                    let narrowed = if ty == Ty::F16 { F16::narrow(value) } else { Bf16::narrow(value) };
                    assert_eq!(u64::from(narrowed), expected, "{ty:?} {bits:#x}");
                }
            }
        }
    }
}

#[test]
fn sums_and_products_round_once() {
    let mut random = Random(3);
    for ty in SCALARS {
        for [a, b] in pairs(ty, &mut random) {
            let x = |lane: usize| exact::decode(ty, a[lane]);
            let y = |lane: usize| exact::decode(ty, b[lane]);
            let what = format!("{ty:?} {a:x?} {b:x?}");
            same(&binary(Binary::Add, ty, &a, &b), |i| exact::encode(ty, exact::add(x(i), y(i))), &what);
            same(&binary(Binary::Sub, ty, &a, &b), |i| exact::encode(ty, exact::add(x(i), exact::negate(y(i)))), &what);
            same(&binary(Binary::MulLo, ty, &a, &b), |i| exact::encode(ty, exact::mul(x(i), y(i))), &what);
        }
    }
}

/// Random operands; all triples of special values; and products at a tie of the format beside an addend of any size, which
/// is where rounding twice goes wrong.
#[test]
fn fma_rounds_once() {
    let mut random = Random(4);
    for ty in SCALARS {
        let special = specials(ty);
        let mut all: Vec<[u64; 3]> = Vec::new();
        for x in &special {
            for y in &special {
                all.extend(special.iter().map(|z| [*x, *y, *z]));
            }
        }
        all.extend((0..200_000).map(|_| [(); 3].map(|()| random.next() & mask(ty))));
        let (_, fraction, _) = exact::format(ty);
        // (1 + 2^-j) (1 + 2^-k) with j + k one more than the fraction is half-way between two numbers.
        let one = exact::encode(ty, Exact::Finite { negative: false, mantissa: 1, exponent: 0 });
        for j in 1..=fraction {
            for z in 0..1u64 << 10 {
                let [x, y] = [j, fraction + 1 - j].map(|j| one + (1 << (fraction - j)));
                all.push([x, y, z << (ty.bits() - 10) | random.next() & (mask(ty) >> 10)]);
            }
        }
        all.resize(all.len().next_multiple_of(32), [0; 3]);
        for chunk in all.chunks_exact(32) {
            let [a, b, c]: [Lanes; 3] = [0, 1, 2].map(|i| std::array::from_fn(|lane| chunk[lane][i]));
            let d = ternary(Ternary::Fma, ty, &a, &b, &c);
            let value = |lanes: &Lanes, i: usize| exact::decode(ty, lanes[i]);
            let expected = |i| exact::encode(ty, exact::add(exact::mul(value(&a, i), value(&b, i)), value(&c, i)));
            same(&d, expected, &format!("{ty:?} {chunk:x?}"));
        }
    }
}

/// All significands, with results from well above to below half of the least number.
#[test]
fn products_underflow_once() {
    for (ty, x_field, y_fields) in [(Ty::F16, 5u64, 0..=12u64), (Ty::Bf16, 60, 35..=72)] {
        let fraction = exact::format(ty).1;
        for y_field in y_fields {
            for m in (0..1u64 << fraction).step_by(if ty == Ty::F16 { 17 } else { 1 }) {
                let a = [x_field << fraction | m; 32];
                for first in (0..1u64 << fraction).step_by(32) {
                    let b: Lanes = std::array::from_fn(|lane| y_field << fraction | (first + lane as u64));
                    let product = |i| exact::mul(exact::decode(ty, a[0]), exact::decode(ty, b[i]));
                    same(&binary(Binary::MulLo, ty, &a, &b), |i| exact::encode(ty, product(i)), "mul");
                }
            }
        }
    }
}

#[test]
fn fma_in_f64_rounds_once() {
    let fma = |x: f64, y: f64, z: f64| {
        f64::from_bits(ternary(Ternary::Fma, Ty::F64, &[x.to_bits(); 32], &[y.to_bits(); 32], &[z.to_bits(); 32])[7])
    };
    let e = f64::EPSILON;
    // (1 + e)(1 - e) = 1 - e², which a rounded product loses.
    assert_eq!(fma(1.0 + e, 1.0 - e, -1.0), -e * e);
    assert_eq!(fma(3.0, 5.0, 7.0), 22.0);
    assert_eq!(fma(f64::INFINITY, 0.0, 1.0).to_bits(), 0xfff8_0000_0000_0000);
}

#[test]
fn f32_and_f64_follow_the_host() {
    let mut random = Random(5);
    let nan32 = |x: f32| if x.is_nan() { 0x7fff_ffff } else { u64::from(x.to_bits()) };
    let nan64 = |x: f64| if x.is_nan() { 0xfff8 << 48 } else { x.to_bits() };
    for [a, b] in pairs(Ty::F32, &mut random) {
        let [x, y] = [a, b].map(|lanes| lanes.map(|x| f32::from_bits(x as u32)));
        same(&binary(Binary::Div, Ty::F32, &a, &b), |i| nan32(x[i] / y[i]), "div");
        same(&unary(Unary::Rcp, Ty::F32, &a), |i| nan32(1.0 / x[i]), "rcp");
        same(&unary(Unary::Sqrt, Ty::F32, &a), |i| nan32(x[i].sqrt()), "sqrt");
    }
    for [a, b] in pairs(Ty::F64, &mut random) {
        let [x, y] = [a, b].map(|lanes| lanes.map(f64::from_bits));
        same(&binary(Binary::Add, Ty::F64, &a, &b), |i| nan64(x[i] + y[i]), "add");
        same(&binary(Binary::Sub, Ty::F64, &a, &b), |i| nan64(x[i] - y[i]), "sub");
        same(&binary(Binary::MulLo, Ty::F64, &a, &b), |i| nan64(x[i] * y[i]), "mul");
        same(&binary(Binary::Div, Ty::F64, &a, &b), |i| nan64(x[i] / y[i]), "div");
        same(&unary(Unary::Rcp, Ty::F64, &a), |i| nan64(1.0 / x[i]), "rcp");
        same(&unary(Unary::Sqrt, Ty::F64, &a), |i| nan64(x[i].sqrt()), "sqrt");
    }
}

#[test]
fn subnormal_numbers_stay() {
    let d = binary(Binary::MulLo, Ty::F32, &[0x80_0000; 32], &[0x3f00_0000; 32]);
    assert_eq!(d[0], 0x40_0000, "2^-126 / 2");
    assert_eq!(binary(Binary::Add, Ty::F32, &[1; 32], &[1; 32])[31], 2);
}

/// Numbers compare as the reals do, -0 before +0.
#[test]
fn extremes() {
    let mut random = Random(6);
    for ty in [Ty::F16, Ty::Bf16, Ty::F32, Ty::F64] {
        let nan = exact::format(ty).2;
        for [a, b] in pairs(ty, &mut random) {
            let real = |bits: u64| match ty {
                Ty::F16 => F16::widen(bits as u16).into(),
                Ty::Bf16 => Bf16::widen(bits as u16).into(),
                Ty::F32 => f64::from(f32::from_bits(bits as u32)),
                _ => f64::from_bits(bits),
            };
            let expected = |i: usize, max: bool, keeps_nan: bool| {
                let (x, y) = (real(a[i]), real(b[i]));
                let x_first = x < y || (x == y && x.is_sign_negative());
                match (x.is_nan(), y.is_nan()) {
                    (false, false) => {
                        if x_first == max {
                            b[i]
                        } else {
                            a[i]
                        }
                    }
                    (true, false) if !keeps_nan => b[i],
                    (false, true) if !keeps_nan => a[i],
                    _ => nan,
                }
            };
            same(&binary(Binary::Min, ty, &a, &b), |i| expected(i, false, false), "min");
            same(&binary(Binary::Max, ty, &a, &b), |i| expected(i, true, false), "max");
            if ty != Ty::F64 {
                same(&binary(Binary::MinNan, ty, &a, &b), |i| expected(i, false, true), "min.NaN");
                same(&binary(Binary::MaxNan, ty, &a, &b), |i| expected(i, true, true), "max.NaN");
            }
        }
    }
}

/// A packed instruction is two of the scalar one, which do not touch each other.
#[test]
fn packed_halves_are_independent() {
    let mut random = Random(7);
    for (packed, scalar) in [(Ty::F16x2, Ty::F16), (Ty::Bf16x2, Ty::Bf16)] {
        for _ in 0..200 {
            let [a, b, c]: [Lanes; 3] = [(); 3]
                .map(|()| std::array::from_fn(|_| value(scalar, &mut random) << 16 | value(scalar, &mut random)));
            let half = |lanes: &Lanes, high: bool| lanes.map(|x| if high { x >> 16 } else { x & 0xffff });
            let check = |d: Lanes, f: &dyn Fn(bool) -> Lanes| {
                for high in [false, true] {
                    assert_eq!(half(&d, high), f(high));
                }
            };
            for op in BINARY
                .into_iter()
                .filter(|&op| implemented(&Op::Binary { op, ty: packed, d: None, a: Src::Imm(0), b: Src::Imm(0) }))
            {
                check(binary(op, packed, &a, &b), &|high| binary(op, scalar, &half(&a, high), &half(&b, high)));
            }
            for op in [Unary::Neg, Unary::Abs] {
                check(unary(op, packed, &a), &|high| unary(op, scalar, &half(&a, high)));
            }
            check(ternary(Ternary::Fma, packed, &a, &b, &c), &|high| {
                ternary(Ternary::Fma, scalar, &half(&a, high), &half(&b, high), &half(&c, high))
            });
        }
    }
}

#[test]
fn signs() {
    for first in (0..=u16::MAX).step_by(32) {
        let a: Lanes = std::array::from_fn(|lane| u64::from(first) + lane as u64);
        for ty in [Ty::F16, Ty::Bf16] {
            same(&unary(Unary::Neg, ty, &a), |i| a[i] ^ 0x8000, "neg");
            same(&unary(Unary::Abs, ty, &a), |i| a[i] & 0x7fff, "abs");
        }
    }
    assert_eq!(unary(Unary::Neg, Ty::F32, &[0; 32])[0], 0x8000_0000);
    assert_eq!(unary(Unary::Abs, Ty::F64, &[0xc000 << 48; 32])[0], 0x4000 << 48);
}

#[test]
fn comparisons() {
    let mut random = Random(8);
    let all = [
        Compare::Eq,
        Compare::Ne,
        Compare::Lt,
        Compare::Le,
        Compare::Gt,
        Compare::Ge,
        Compare::Equ,
        Compare::Neu,
        Compare::Ltu,
        Compare::Leu,
        Compare::Gtu,
        Compare::Geu,
        Compare::Num,
        Compare::Nan,
    ];
    for ty in INTEGERS.into_iter().chain([Ty::F16, Ty::Bf16, Ty::F32, Ty::F64]) {
        for [a, b] in pairs(ty, &mut random) {
            for cmp in all {
                if !implemented(&Op::Setp { cmp, ty, p: 0, q: None, a: Src::Imm(0), b: Src::Imm(0), combine: None }) {
                    continue;
                }
                let mask = setp(cmp, ty, &a, &b);
                for lane in 0..32 {
                    let expected = holds(cmp, order(ty, a[lane], b[lane]));
                    assert_eq!(mask >> lane & 1 == 1, expected, "{cmp:?} {ty:?} {:#x} {:#x}", a[lane], b[lane]);
                }
            }
        }
    }
}

fn order(ty: Ty, x: u64, y: u64) -> Option<std::cmp::Ordering> {
    let signed = |x: u64| (x << (64 - ty.bits())) as i64;
    match ty {
        Ty::S(_) => Some(signed(x).cmp(&signed(y))),
        Ty::F16 => half::f16::from_bits(x as u16).partial_cmp(&half::f16::from_bits(y as u16)),
        Ty::Bf16 => half::bf16::from_bits(x as u16).partial_cmp(&half::bf16::from_bits(y as u16)),
        Ty::F32 => f32::from_bits(x as u32).partial_cmp(&f32::from_bits(y as u32)),
        Ty::F64 => f64::from_bits(x).partial_cmp(&f64::from_bits(y)),
        _ => Some(x.cmp(&y)),
    }
}

fn holds(cmp: Compare, order: Option<std::cmp::Ordering>) -> bool {
    match cmp {
        Compare::Eq => order.is_some_and(|order| order.is_eq()),
        Compare::Ne => order.is_some_and(|order| order.is_ne()),
        Compare::Lt => order.is_some_and(|order| order.is_lt()),
        Compare::Le => order.is_some_and(|order| order.is_le()),
        Compare::Gt => order.is_some_and(|order| order.is_gt()),
        Compare::Ge => order.is_some_and(|order| order.is_ge()),
        Compare::Equ => order.is_none_or(|order| order.is_eq()),
        Compare::Neu => order.is_none_or(|order| order.is_ne()),
        Compare::Ltu => order.is_none_or(|order| order.is_lt()),
        Compare::Leu => order.is_none_or(|order| order.is_le()),
        Compare::Gtu => order.is_none_or(|order| order.is_gt()),
        Compare::Geu => order.is_none_or(|order| order.is_ge()),
        Compare::Num => order.is_some(),
        Compare::Nan => order.is_none(),
    }
}
