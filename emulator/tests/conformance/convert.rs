//! "Data Movement and Conversion Instructions: cvt".

use std::rc::Rc;

use crate::harness::{Case, mask, signed};
use half::{bf16, f16};

fn width(ty: &str) -> u32 {
    ty.trim_start_matches(|c: char| c.is_alphabetic()).parse().expect("a width")
}

/// Registers are 16 bits wide at least.
fn register(ty: &str) -> u32 {
    width(ty).max(16)
}

fn number(ty: &str, x: u64) -> f64 {
    match ty {
        "f16" => f16::from_bits(x as u16).to_f64(),
        "bf16" => bf16::from_bits(x as u16).to_f64(),
        "f32" => f32::from_bits(x as u32).into(),
        _ => f64::from_bits(x),
    }
}

/// Bits of exponent and of fraction of a float.
fn format(ty: &str) -> (i32, i32, u64) {
    match ty {
        "f16" => (5, 10, 0x7fff),
        "bf16" => (8, 7, 0x7fff),
        "f32" => (8, 23, 0x7fff_ffff),
        "tf32" => (8, 10, 0x3ffff),
        "e4m3" => (4, 3, 0x7f),
        "e5m2" => (5, 2, 0x7f),
        _ => (11, 52, 0xfff8 << 48),
    }
}

/// An exact number of at most 53 bits to a format: by counting steps of its last place.
fn round(ty: &str, direction: &str, exact: f64) -> u64 {
    let (exponent_bits, fraction_bits, nan) = format(ty);
    if exact.is_nan() {
        return nan;
    }
    if ty == "f64" {
        return exact.to_bits();
    }
    let sign = if exact.is_sign_negative() { 1u64 << (exponent_bits + fraction_bits) } else { 0 };
    let x = exact.abs();
    let bias = (1 << (exponent_bits - 1)) - 1;
    let largest_exponent = if ty == "e4m3" { bias + 1 } else { bias };
    let exponent = if x == 0.0 { 1 - bias } else { (x.log2().floor() as i32).clamp(1 - bias, 2000) };
    // log2 may be off at powers of two.
    let exponent = if x < 2f64.powi(exponent) && exponent > 1 - bias { exponent - 1 } else { exponent };
    let exponent = if x.is_finite() && x >= 2f64.powi(exponent + 1) { exponent + 1 } else { exponent };
    let infinity = ((1u64 << exponent_bits) - 1) << fraction_bits;
    let largest = if ty == "e4m3" { 0x7e } else { infinity - 1 };
    let up = match direction {
        "rm" => exact.is_sign_negative(),
        "rp" => exact.is_sign_positive(),
        _ => false,
    };
    if x.is_infinite() {
        return sign | (largest + 1);
    }
    if exponent > largest_exponent {
        return sign | if direction.starts_with("rn") || up { largest + 1 } else { largest };
    }
    // In two factors: one power of two would overflow for the least numbers.
    let steps = x * 2f64.powi(-exponent) * 2f64.powi(fraction_bits);
    let below = steps.floor();
    let rest = steps - below;
    let mut kept = below as u64;
    if match direction {
        "rna" => rest >= 0.5,
        "rn" | "" => rest > 0.5 || (rest == 0.5 && kept & 1 == 1),
        "rz" => false,
        _ => up && rest > 0.0,
    } {
        kept += 1;
    }
    let field = (exponent + bias) as u64;
    let bits = if kept >> fraction_bits == 0 { kept } else { ((field - 1) << fraction_bits) + kept };
    if bits > largest {
        sign | if direction.starts_with("rn") || up { largest + 1 } else { largest }
    } else {
        sign | bits
    }
}

fn flush32(ty: &str, x: u64) -> u64 {
    if ty == "f32" && x & 0x7f80_0000 == 0 { x & 0x8000_0000 } else { x }
}

fn integers() -> Vec<Case> {
    let mut cases = Vec::new();
    let types = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"];
    for to in types {
        for from in types {
            for sat in ["", ".sat"] {
                let text = format!("cvt{sat}.{to}.{from} %d, %a;");
                let (low, high) = (width(to), width(from));
                cases.push(Case::new(&text, "cvt", [register(to), register(from), 32, 32], move |[a, ..]| {
                    let value = if from.starts_with('s') { signed(a, high) } else { i128::from(a & mask(high)) };
                    let (least, most) = if to.starts_with('s') {
                        (-(1i128 << (low - 1)), (1i128 << (low - 1)) - 1)
                    } else {
                        (0, i128::from(mask(low)))
                    };
                    let value = if sat.is_empty() { value } else { value.clamp(least, most) } as u64;
                    // An s8 fills its register with its sign.
                    if to == "s8" { signed(value, 8) as u64 & 0xffff } else { value & mask(low) }
                }));
            }
        }
    }
    cases
}

fn between() -> Vec<Case> {
    let mut cases = Vec::new();
    let integers = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"];
    for float in ["f16", "bf16", "f32", "f64"] {
        for integer in integers {
            for direction in ["rni", "rzi", "rmi", "rpi"] {
                for ftz in ["", ".ftz"] {
                    for sat in ["", ".sat"] {
                        if !ftz.is_empty() && float != "f32" {
                            continue;
                        }
                        let text = format!("cvt.{direction}{ftz}{sat}.{integer}.{float} %d, %a;");
                        cases.push(Case::new(
                            &text,
                            "cvt",
                            [register(integer), width(float), 32, 32],
                            move |[a, ..]| {
                                to_integer(
                                    number(float, if ftz.is_empty() { a } else { flush32(float, a) }),
                                    direction,
                                    integer,
                                    float,
                                )
                            },
                        ));
                    }
                }
            }
            for direction in ["rn", "rz", "rm", "rp"] {
                for sat in ["", ".sat"] {
                    if float == "bf16" && (direction != "rn" || !sat.is_empty()) {
                        continue;
                    }
                    let text = format!("cvt.{direction}{sat}.{float}.{integer} %d, %a;");
                    let bits = width(integer);
                    let wide = float == "f64" && bits == 64;
                    let mut case =
                        Case::new(&text, "cvt", [width(float), register(integer), 32, 32], move |[a, ..]| {
                            let value =
                                if integer.starts_with('s') { signed(a, bits) } else { i128::from(a & mask(bits)) };
                            let rounded = round(float, direction, value as f64);
                            if sat.is_empty() {
                                rounded
                            } else {
                                round(float, "rn", number(float, rounded).clamp(0.0, 1.0) + 0.0)
                            }
                        });
                    // Up to 53 bits, so that the reference is exact; wider ones are for the alu's own tests.
                    let keep = |x: &u64| {
                        !wide && bits < 64
                            || (if integer == "u64" { u128::from(*x) } else { signed(*x, 64).unsigned_abs() }) < 1 << 53
                    };
                    case.inputs.retain(|[a, ..]| keep(a));
                    cases.push(case);
                }
            }
        }
    }
    cases
}

fn to_integral(x: f64, direction: &str) -> f64 {
    match &direction[..2] {
        "rn" => x.round_ties_even(),
        "rz" => x.trunc(),
        "rm" => x.floor(),
        _ => x.ceil(),
    }
}

fn to_integer(x: f64, direction: &str, to: &str, from: &str) -> u64 {
    let bits = width(to);
    let value = if x.is_nan() {
        // "cvt", on NaN: 0, but with f64 or 64 bits the most significant bit.
        if from == "f64" || bits == 64 { 1u64 << (bits - 1) } else { 0 }
    } else {
        let x = to_integral(x, direction);
        let (least, most) = if to.starts_with('s') {
            (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
        } else {
            (0, i128::from(mask(bits)))
        };
        (x as i128).clamp(least, most) as u64
    };
    if to == "s8" { signed(value, 8) as u64 & 0xffff } else { value & mask(bits) }
}

fn floats() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |text: String, to: &str, from: &str, f: Box<dyn Fn(u64) -> u64>| {
        cases.push(Case::new(&text, "cvt", [width(to), width(from), 32, 32], move |[a, ..]| f(a)));
    };
    let types = ["f16", "bf16", "f32", "f64"];
    for to in types {
        for from in types {
            let narrows = width(to) < width(from) || (to != from && width(to) == 16 && width(from) == 16);
            for ftz in ["", ".ftz"] {
                if !ftz.is_empty() && to != "f32" && from != "f32" {
                    continue;
                }
                for sat in ["", ".sat"] {
                    let prefix = |direction: &str| format!("cvt{direction}{ftz}{sat}.{to}.{from} %d, %a;");
                    let value = move |a: u64| number(from, if ftz.is_empty() { a } else { flush32(from, a) });
                    let finish = move |bits: u64| {
                        let bits = if ftz.is_empty() { bits } else { flush32(to, bits) };
                        let x = number(to, bits);
                        match sat {
                            "" => bits,
                            _ if x > 0.0 => round(to, "rn", x.min(1.0)),
                            _ => 0,
                        }
                    };
                    if to == "bf16" && (!sat.is_empty() || (!ftz.is_empty())) {
                        continue;
                    }
                    if narrows {
                        for direction in ["rn", "rz", "rm", "rp"] {
                            let exists = match to {
                                "f32" => true,
                                "f16" => from != "bf16" || direction == "rn",
                                _ => direction == "rn" || (direction == "rz" && from == "f32"),
                            };
                            if exists
                                && !(to == "f16" && from == "bf16" && !ftz.is_empty())
                                && !(from == "bf16" && direction != "rn")
                            {
                                let f = move |a| finish(round(to, direction, value(a)));
                                add(prefix(&format!(".{direction}")), to, from, Box::new(f));
                            }
                        }
                    } else {
                        let f = move |a| {
                            if to == from && value(a).is_nan() {
                                finish(format(to).2)
                            } else {
                                finish(round(to, "rn", value(a)))
                            }
                        };
                        add(prefix(""), to, from, Box::new(f));
                    }
                    if to == from {
                        for direction in ["rni", "rzi", "rmi", "rpi"] {
                            let f = move |a| finish(round(to, "rn", to_integral(value(a), direction)));
                            add(prefix(&format!(".{direction}")), to, from, Box::new(f));
                        }
                    }
                }
            }
        }
    }
    cases
}

/// To the formats that come in pairs, and tf32.
fn narrow() -> Vec<Case> {
    let mut cases = Vec::new();
    let flags = |relu: bool, finite: bool| {
        format!("{}{}", if relu { ".relu" } else { "" }, if finite { ".satfinite" } else { "" })
    };
    let convert = |ty: &'static str, direction: &'static str, relu: bool, finite: bool| {
        move |x: u64| {
            let bits = round(ty, direction, number("f32", x));
            let (exponent_bits, fraction_bits, _) = format(ty);
            let top = 1u64 << (exponent_bits + fraction_bits);
            let largest = if ty == "e4m3" { 0x7e } else { (((1u64 << exponent_bits) - 1) << fraction_bits) - 1 };
            let nan = number("f32", x).is_nan();
            let bits = if finite && !nan && bits & (top - 1) > largest { bits & top | largest } else { bits };
            if relu && !nan && bits & top != 0 { 0 } else { bits }
        }
    };
    for direction in ["rn", "rz"] {
        for (relu, finite) in [(false, false), (true, false), (false, true), (true, true)] {
            for (ty, pair) in [("f16", "f16x2"), ("bf16", "bf16x2")] {
                let f = convert(ty, direction, relu, finite);
                let text = format!("cvt.{direction}{}.{ty}.f32 %d, %a;", flags(relu, finite));
                cases.push(Case::new(&text, "cvt", [16, 32, 32, 32], move |[a, ..]| f(a)));
                let text = format!("cvt.{direction}{}.{pair}.f32 %d, %a, %b;", flags(relu, finite));
                cases.push(Case::new(&text, "cvt", [32; 4], move |[a, b, _]| f(a) << 16 | f(b)));
            }
            let f = convert("tf32", direction, relu, finite);
            let text = format!("cvt.{direction}{}.tf32.f32 %d, %a;", flags(relu, finite));
            cases.push(Case::new(&text, "cvt", [32; 4], move |[a, ..]| f(a) << 13));
        }
    }
    for finite in [false, true] {
        let f = convert("tf32", "rna", false, finite);
        let text = format!("cvt.rna{}.tf32.f32 %d, %a;", flags(false, finite));
        cases.push(Case::new(&text, "cvt", [32; 4], move |[a, ..]| f(a) << 13));
    }
    for (ty, name) in [("e4m3", "e4m3x2"), ("e5m2", "e5m2x2")] {
        for relu in [false, true] {
            {
                let order = format!(".satfinite{}", flags(relu, false));
                let f = convert(ty, "rn", relu, true);
                let text = format!("cvt.rn{order}.{name}.f32 %d, %a, %b;");
                cases.push(Case::new(&text, "cvt", [16, 32, 32, 32], move |[a, b, _]| f(a) << 8 | f(b)));
                let f = convert(ty, "rn", relu, true);
                let half = move |x: u64| f(f16::from_bits(x as u16).to_f32().to_bits().into());
                let text = format!("cvt.rn{order}.{name}.f16x2 %d, %a;");
                cases.push(Case::new(&text, "cvt", [16, 32, 32, 32], move |[a, ..]| {
                    half(a >> 16) << 8 | half(a & 0xffff)
                }));
            }
            let text = format!("cvt.rn{}.f16x2.{name} %d, %a;", flags(relu, false));
            let mut case = Case::new(&text, "cvt", [32, 16, 32, 32], |_| 0);
            case.expect = Rc::new(move |[a, ..]| {
                let widen = |code: u64| {
                    if ty == "e4m3" && code & 0x7f == 0x7f {
                        return 0x7fff;
                    }
                    let bits = (0..=0xffffu64).find(|bits| {
                        let x = f16::from_bits(*bits as u16);
                        !x.is_nan() && round(ty, "rn", x.to_f64()) == code && exactly(ty, code, x.to_f64())
                    });
                    let bits = bits.unwrap_or(if code & 0x7f == 0x7c && ty == "e5m2" {
                        0x7c00 | (code & 0x80) << 8
                    } else {
                        0x7fff
                    });
                    if relu && bits & 0x8000 != 0 { 0 } else { bits }
                };
                vec![widen(a & 0xff) | widen(a >> 8) << 16]
            });
            case.inputs.truncate(64);
            cases.push(case);
        }
    }
    cases
}

/// Whether an 8-bit code is exactly this number.
fn exactly(ty: &str, code: u64, x: f64) -> bool {
    let (exponent_bits, fraction_bits, _) = format(ty);
    let field = (code & 0x7f) >> fraction_bits;
    let fraction = (code & ((1 << fraction_bits) - 1)) as f64 / f64::from(1 << fraction_bits);
    let bias = (1 << (exponent_bits - 1)) - 1;
    let magnitude =
        if field == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(field as i32 - bias) };
    magnitude == x.abs() && (code & 0x80 != 0) == x.is_sign_negative()
}

pub fn cases() -> Vec<Case> {
    [integers(), between(), floats(), narrow()].concat()
}
