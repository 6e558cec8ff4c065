//! "Half Precision Floating Point Instructions": f16 and bf16, alone and in pairs.

use std::rc::Rc;

use crate::harness::Case;
use half::{bf16, f16};

const SECTION: &str = "Half Precision Floating Point Instructions";

/// The number of a 16-bit pattern.
fn widen(ty: &str, x: u64) -> f64 {
    if ty.starts_with('f') { f16::from_bits(x as u16).to_f64() } else { bf16::from_bits(x as u16).to_f64() }
}

/// The nearest pattern, by looking at the neighbours: conversions of `half` from f64 are not all rounded once.
fn narrow(ty: &str, x: f64) -> u64 {
    if x.is_nan() {
        return 0x7fff;
    }
    let infinity = if ty.starts_with('f') { 0x7c00u64 } else { 0x7f80 };
    let sign = if x.is_sign_negative() { 0x8000 } else { 0 };
    // Patterns of one sign are ordered as their numbers are; infinity stands one step beyond the largest.
    let number = |bits: u64| {
        if bits == infinity { 2.0 * widen(ty, infinity - 1) - widen(ty, infinity - 2) } else { widen(ty, bits) }
    };
    let (mut low, mut high) = (0, infinity);
    while high - low > 1 {
        let middle = (low + high) / 2;
        if number(middle) <= x.abs() { low = middle } else { high = middle }
    }
    let (below, above) = (x.abs() - number(low), number(high) - x.abs());
    let up = above < below || (above == below && high & 1 == 0);
    sign | if up { high } else { low }
}

fn flush(ty: &str, x: u64) -> u64 {
    let exponent = if ty.starts_with('f') { 0x7c00 } else { 0x7f80 };
    if x & exponent == 0 { x & 0x8000 } else { x }
}

fn halves(packed: bool, x: [u64; 3], f: impl Fn([u64; 3]) -> u64) -> u64 {
    if packed { f(x.map(|x| x & 0xffff)) | f(x.map(|x| x >> 16)) << 16 } else { f(x) }
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for ty in ["f16", "f16x2", "bf16", "bf16x2"] {
        let packed = ty.ends_with("x2");
        let bits = if packed { 32 } else { 16 };
        let is_f16 = ty.starts_with('f');
        for (op, count) in [("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)] {
            for (round, ftz, sat, relu) in modes(op, is_f16) {
                let mut text = op.to_owned();
                for (there, word) in [(round, ".rn"), (ftz, ".ftz"), (sat, ".sat"), (relu, ".relu")] {
                    text += if there { word } else { "" };
                }
                let sources = if count == 3 { "%a, %b, %c" } else { "%a, %b" };
                cases.push(Case::new(&format!("{text}.{ty} %d, {sources};"), SECTION, [bits; 4], move |x| {
                    halves(packed, x, |x| {
                        let [a, b, c] = x.map(|x| widen(ty, if ftz { flush(ty, x) } else { x }));
                        let exact = match op {
                            "add" => a + b,
                            "sub" => a - b,
                            "mul" => a * b,
                            _ => sticky_sum(a * b, c),
                        };
                        let bits = narrow(ty, exact);
                        let bits = if ftz { flush(ty, bits) } else { bits };
                        let value = widen(ty, bits);
                        if sat {
                            return if value > 0.0 { narrow(ty, value.min(1.0)) } else { 0 };
                        }
                        if relu && !value.is_nan() && bits >> 15 == 1 { 0 } else { bits }
                    })
                }));
            }
        }
        for (op, negate) in [("neg", true), ("abs", false)] {
            for ftz in [false, true] {
                if ftz && !is_f16 {
                    continue;
                }
                let text = format!("{op}{}.{ty} %d, %a;", if ftz { ".ftz" } else { "" });
                cases.push(Case::new(&text, SECTION, [bits; 4], move |x| {
                    halves(packed, x, |[a, ..]| {
                        let a = if ftz { flush(ty, a) } else { a };
                        if negate { a ^ 0x8000 } else { a & 0x7fff }
                    })
                }));
            }
        }
        cases.extend(extremes(ty, packed, bits));
        cases.extend(approximations(ty, packed, bits));
    }
    cases
}

/// x + y with the last bit set when it is inexact, which keeps ties apart.
fn sticky_sum(x: f64, y: f64) -> f64 {
    let sum = x + y;
    let rest = sum - x;
    let error = (x - (sum - rest)) + (y - rest);
    if error == 0.0 || !error.is_finite() || sum.to_bits() & 1 == 1 {
        return sum;
    }
    if (error > 0.0) == (sum > 0.0) { f64::from_bits(sum.to_bits() + 1) } else { f64::from_bits(sum.to_bits() - 1) }
}

fn modes(op: &str, is_f16: bool) -> Vec<(bool, bool, bool, bool)> {
    let mut modes = Vec::new();
    for round in [false, true] {
        for ftz in [false, true] {
            for (sat, relu) in [(false, false), (true, false), (false, true)] {
                let exists = (round || op != "fma") && (is_f16 || (!ftz && !sat)) && (!relu || op == "fma");
                if exists {
                    modes.push((round, ftz, sat, relu));
                }
            }
        }
    }
    modes
}

fn extremes(ty: &'static str, packed: bool, bits: u32) -> Vec<Case> {
    let mut cases = Vec::new();
    for max in [false, true] {
        for (ftz, nan, xorsign) in (0..8).map(|i| (i & 1 == 1, i & 2 == 2, i & 4 == 4)) {
            if ftz && ty.starts_with('b') {
                continue;
            }
            let mut text = if max { "max" } else { "min" }.to_owned();
            for (there, word) in [(ftz, ".ftz"), (nan, ".NaN"), (xorsign, ".xorsign.abs")] {
                text += if there { word } else { "" };
            }
            cases.push(Case::new(&format!("{text}.{ty} %d, %a, %b;"), "min, max", [bits; 4], move |x| {
                halves(packed, x, |[a, b, _]| {
                    let [a, b] = [a, b].map(|x| if ftz { flush(ty, x) } else { x });
                    let sign = (a ^ b) & 0x8000;
                    let [a, b] = [a, b].map(|x| if xorsign { x & 0x7fff } else { x });
                    let (x, y) = (widen(ty, a), widen(ty, b));
                    let picked = match (x.is_nan(), y.is_nan()) {
                        (true, true) => return 0x7fff,
                        (true, false) | (false, true) if nan => return 0x7fff,
                        (true, false) => b,
                        (false, true) => a,
                        _ => {
                            if (x < y || (x == y && a >> 15 == 1)) == max {
                                b
                            } else {
                                a
                            }
                        }
                    };
                    if xorsign { picked | sign } else { picked }
                })
            }));
        }
    }
    cases
}

fn approximations(ty: &'static str, packed: bool, bits: u32) -> Vec<Case> {
    let mut cases = Vec::new();
    for (op, exact) in [("ex2", f64::exp2 as fn(f64) -> f64), ("tanh", f64::tanh)] {
        let ftz = op == "ex2" && ty.starts_with('b');
        let text = format!("{op}.approx{}.{ty} %d, %a;", if ftz { ".ftz" } else { "" });
        let mut case = Case::new(&text, SECTION, [bits; 4], |_| 0);
        // Error bounds are about one unit of the last place: the nearest and its neighbours.
        case.expect = Rc::new(move |x| {
            let near = |shift: u32| {
                let a = x[0] >> shift & 0xffff;
                let bits = narrow(ty, exact(widen(ty, if ftz { flush(ty, a) } else { a })));
                if ftz { flush(ty, bits) } else { bits }
            };
            let beside = |bits: u64| {
                if widen(ty, bits).is_finite() && bits & 0x7fff != 0 {
                    vec![bits, bits - 1, bits + 1]
                } else {
                    vec![bits]
                }
            };
            let low = beside(near(0));
            if !packed {
                return low;
            }
            low.iter().flat_map(|low| beside(near(16)).into_iter().map(move |high| low | high << 16)).collect()
        });
        cases.push(case);
    }
    cases
}
