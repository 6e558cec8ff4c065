//! Directed rounding and flushing against the host's f64, with the sign of what it rounded away.

use super::*;
use crate::alu::{float_mode_exists, math};

const ROUNDS: [Round; 4] = [Round::Rn, Round::Rz, Round::Rm, Round::Rp];

/// `value + error` (the error below its last place) to f32, towards where `round` says.
fn directed(value: f64, error: f64, round: Round) -> u32 {
    let nearest = value as f32;
    if value.is_nan() {
        return 0x7fff_ffff;
    }
    if !value.is_finite() {
        return nearest.to_bits();
    }
    // Which side of the exact value is `nearest` on?
    let over = if f64::from(nearest) == value { 0.0 - error } else { f64::from(nearest) - value };
    let towards_zero = |x: f32| f32::from_bits(x.to_bits() - 1);
    let from_zero = |x: f32| f32::from_bits(x.to_bits() + 1);
    let down = |x: f32| {
        if x > 0.0 {
            towards_zero(x)
        } else if x == 0.0 {
            f32::from_bits(0x8000_0001)
        } else {
            from_zero(x)
        }
    };
    let up = |x: f32| -down(-x);
    let negative = value < 0.0 || (value == 0.0 && error < 0.0);
    let result = match round {
        Round::Rm if over > 0.0 => down(nearest),
        Round::Rp if over < 0.0 => up(nearest),
        Round::Rz if !negative && over > 0.0 => down(nearest),
        Round::Rz if negative && over < 0.0 => up(nearest),
        _ => nearest,
    };
    // A result that is zero keeps the sign of what was rounded.
    if result == 0.0 && (value != 0.0 || error != 0.0) {
        f32::copysign(0.0, if negative { -1.0 } else { 1.0 }).to_bits()
    } else {
        result.to_bits()
    }
}

fn flush(bits: u32) -> u32 {
    if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits }
}

/// The exact result as an f64 and what it lacks.
fn exactly(op: FloatOp, [x, y, z]: [f64; 3], round: Round) -> (f64, f64) {
    let two_sum = |x: f64, y: f64| {
        let sum = x + y;
        if sum == 0.0 && x != 0.0 {
            return (if round == Round::Rm { -0.0 } else { 0.0 }, 0.0);
        }
        if x == 0.0 && y == 0.0 && x.is_sign_negative() != y.is_sign_negative() {
            return (if round == Round::Rm { -0.0 } else { 0.0 }, 0.0);
        }
        let rest = sum - x;
        let error = (x - (sum - rest)) + (y - rest);
        (sum, if error.is_nan() { 0.0 } else { error })
    };
    match op {
        FloatOp::Add => two_sum(x, y),
        FloatOp::Sub => two_sum(x, -y),
        FloatOp::Mul => (x * y, 0.0),
        FloatOp::Fma => two_sum(x * y, z),
        FloatOp::Div | FloatOp::Rcp => {
            let (x, y) = if op == FloatOp::Rcp { (1.0, x) } else { (x, y) };
            let quotient = x / y;
            let rest = if quotient.is_finite() && y.is_finite() { (-quotient).mul_add(y, x) / y.signum() } else { 0.0 };
            (quotient, rest)
        }
        FloatOp::Sqrt => {
            let root = x.sqrt();
            (root, if root.is_finite() { (-root).mul_add(root, x) } else { 0.0 })
        }
    }
}

#[test]
fn every_rounding_of_f32() {
    let mut random = Random(40);
    let operations =
        [FloatOp::Add, FloatOp::Sub, FloatOp::Mul, FloatOp::Fma, FloatOp::Div, FloatOp::Rcp, FloatOp::Sqrt];
    for [a, b] in pairs(Ty::F32, &mut random) {
        let c: Lanes = std::array::from_fn(|_| value(Ty::F32, &mut random));
        for op in operations {
            // To nearest, f64 on the way to f32 would round twice: see the next test.
            for round in [Round::Rz, Round::Rm, Round::Rp] {
                for (ftz, sat) in [(false, false), (true, false), (false, true), (true, true)] {
                    let mode = Mode { round, ftz, sat, relu: false };
                    if !float_mode_exists(op, Ty::F32, mode) {
                        continue;
                    }
                    let d = math(Math::Float(op, Ty::F32, mode), &[a, b, c]);
                    for lane in 0..32 {
                        let load = |x: u64| f64::from(f32::from_bits(if ftz { flush(x as u32) } else { x as u32 }));
                        let (exact, error) = exactly(op, [load(a[lane]), load(b[lane]), load(c[lane])], round);
                        let mut expected = directed(exact, error, round);
                        expected = if ftz { flush(expected) } else { expected };
                        if sat {
                            let x = f32::from_bits(expected);
                            expected = if x > 0.0 { x.min(1.0).to_bits() } else { 0 };
                        }
                        let found = d[lane] as u32;
                        assert!(
                            found == expected,
                            "{op:?} {mode:?} of {:#x} {:#x} {:#x}: {found:#x} for {expected:#x}",
                            a[lane],
                            b[lane],
                            c[lane]
                        );
                    }
                }
            }
        }
    }
}

/// To nearest, the integer code and the float code know nothing of each other.
#[test]
fn to_nearest_as_the_plain_instructions() {
    let mut random = Random(41);
    let mode = Mode { round: Round::Rn, ftz: false, sat: false, relu: false };
    for ty in FLOATS {
        for [a, b] in pairs(ty, &mut random) {
            let c: Lanes = std::array::from_fn(|_| value(ty, &mut random));
            let soft = |op| math(Math::Float(op, ty, mode), &[a, b, c]);
            assert_eq!(soft(FloatOp::Add), binary(Binary::Add, ty, &a, &b), "{ty:?}");
            assert_eq!(soft(FloatOp::Sub), binary(Binary::Sub, ty, &a, &b), "{ty:?}");
            assert_eq!(soft(FloatOp::Mul), binary(Binary::MulLo, ty, &a, &b), "{ty:?}");
            assert_eq!(soft(FloatOp::Fma), ternary(Ternary::Fma, ty, &a, &b, &c), "{ty:?}");
            if matches!(ty, Ty::F32 | Ty::F64) {
                assert_eq!(soft(FloatOp::Div), binary(Binary::Div, ty, &a, &b), "{ty:?}");
                assert_eq!(soft(FloatOp::Rcp), unary(Unary::Rcp, ty, &a), "{ty:?}");
                assert_eq!(soft(FloatOp::Sqrt), unary(Unary::Sqrt, ty, &a), "{ty:?}");
            }
        }
    }
}

/// In f64 the directions enclose the nearest, by one step where it is inexact.
#[test]
fn every_rounding_of_f64() {
    let mut random = Random(42);
    for _ in 0..400 {
        let wide = |random: &mut Random| -> Lanes {
            std::array::from_fn(|_| (random.next() & 0x800f_ffff_ffff_ffff) | (1023 - 40 + random.next() % 80) << 52)
        };
        let sources = [wide(&mut random), wide(&mut random), wide(&mut random)];
        for op in [FloatOp::Add, FloatOp::Sub, FloatOp::Mul, FloatOp::Fma, FloatOp::Div] {
            let run = |round| {
                let mode = Mode { round, ftz: false, sat: false, relu: false };
                math(Math::Float(op, Ty::F64, mode), &sources).map(f64::from_bits)
            };
            let [nearest, zero, down, up] = ROUNDS.map(run);
            for lane in 0..32 {
                let (down, up, near) = (down[lane], up[lane], nearest[lane]);
                assert!(near == down || near == up, "{op:?}");
                assert!(up == down || up == down.next_up(), "{op:?} {down} {up}");
                assert_eq!(zero[lane].to_bits(), if near > 0.0 { down } else { up }.to_bits(), "{op:?}");
                let [x, y, _] = [0, 1, 2].map(|i| f64::from_bits(sources[i][lane]));
                let inexact = match op {
                    FloatOp::Mul => x.mul_add(y, -near) != 0.0,
                    FloatOp::Div => (-near).mul_add(y, x) != 0.0,
                    _ => up != down,
                };
                assert_eq!(inexact, up != down, "{op:?} {x} {y}");
            }
        }
    }
}

/// All of the 8-bit formats, there and back; what lies between two numbers goes to the nearer, ties to even.
#[test]
fn eight_bit_formats() {
    for (small, bits) in [(Small::E4m3, 3u32), (Small::E5m2, 2)] {
        let bias = if small == Small::E4m3 { 7 } else { 15 };
        let number = |code: u64| {
            let (field, fraction) = ((code & 0x7f) >> bits, code & ((1 << bits) - 1));
            let magnitude = if field == 0 {
                fraction as f64 * 2f64.powi(1 - bias - bits as i32)
            } else {
                (1.0 + fraction as f64 / f64::from(1u32 << bits)) * 2f64.powi(field as i32 - bias)
            };
            if code & 0x80 == 0 { magnitude } else { -magnitude }
        };
        let largest = if small == Small::E4m3 { 0x7e } else { 0x7b };
        let narrow = |x: f32| {
            let op = Math::Narrow {
                to: small,
                from: Ty::F32,
                pair: true,
                round: Round::Rn,
                away: false,
                relu: false,
                finite: true,
                ftz: false,
                sat: false,
            };
            math(op, &[[0; 32], [x.to_bits().into(); 32]])[0] & 0xff
        };
        for code in 0..=largest {
            let value = number(code);
            let widened = math(Math::Widen { from: small, relu: false }, &[[code; 32]])[0] as u16;
            assert_eq!(half::f16::from_bits(widened).to_f64(), value, "{small:?} {code:#x}");
            assert_eq!(narrow(value as f32), code);
            if code < largest {
                let middle = ((value + number(code + 1)) / 2.0) as f32;
                assert_eq!(narrow(middle), code + (code & 1), "{small:?} tie above {code:#x}");
                assert_eq!(narrow(f32::from_bits(middle.to_bits() - 1)), code);
                assert_eq!(narrow(f32::from_bits(middle.to_bits() + 1)), code + 1);
            }
        }
        assert_eq!(narrow(f32::INFINITY), largest);
        assert_eq!(narrow(-1e30), largest | 0x80);
        assert_eq!(narrow(f32::NAN), 0x7f);
    }
}
