//! "Floating Point Instructions". Directed rounding is checked by what it means: the neighbour on the right side.

use std::rc::Rc;

use crate::harness::Case;

const SECTION: &str = "Floating Point Instructions";

fn f(x: u64) -> f64 {
    f32::from_bits(x as u32).into()
}

fn flushed(x: u64) -> u64 {
    if x & 0x7f80_0000 == 0 { x & 0x8000_0000 } else { x }
}

/// Operands of moderate size, so that f64 holds sums and products of them exactly, and the awkward ones.
fn inputs(seed: u64) -> Vec<[u64; 3]> {
    let mut random = crate::harness::Random(seed | 1);
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1.5,
        -2.5,
        0.1,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MIN_POSITIVE,
        1e-40,
        -1e-42,
    ];
    (0..192)
        .map(|_| {
            std::array::from_fn(|_| match random.next() % 4 {
                0 => special[random.next() as usize % special.len()].to_bits().into(),
                _ => (random.next() & 0x80ff_ffff) | (118 + random.next() % 12) << 23 & 0x7f80_0000,
            })
        })
        .collect()
}

/// The f32 that `round` makes of an exact value.
fn round_to(round: &str, exact: f64, zero_negative: bool) -> u64 {
    if exact.is_nan() {
        return 0x7fff_ffff;
    }
    if exact == 0.0 {
        return if zero_negative { 0x8000_0000 } else { 0 };
    }
    let nearest = exact as f32;
    let back = f64::from(nearest);
    let down = if back > exact { nearest.next_down() } else { nearest };
    let up = if back < exact { nearest.next_up() } else { nearest };
    u64::from(
        match round {
            "rm" => down,
            "rp" => up,
            "rz" if exact > 0.0 => down,
            "rz" => up,
            _ => nearest,
        }
        .to_bits(),
    )
}

fn modes() -> Vec<(&'static str, bool, bool)> {
    let mut modes = Vec::new();
    for round in ["", "rn", "rz", "rm", "rp"] {
        for ftz in [false, true] {
            for sat in [false, true] {
                modes.push((round, ftz, sat));
            }
        }
    }
    modes
}

fn name(op: &str, (round, ftz, sat): (&str, bool, bool), ty: &str) -> String {
    let mut name = op.to_owned();
    for word in [round, if ftz { "ftz" } else { "" }, if sat { "sat" } else { "" }, ty] {
        if !word.is_empty() {
            name = name + "." + word;
        }
    }
    name
}

fn finish(bits: u64, ftz: bool, sat: bool) -> u64 {
    let bits = if ftz { flushed(bits) } else { bits };
    let x = f32::from_bits(bits as u32);
    match sat {
        true if x > 0.0 => x.min(1.0).to_bits().into(),
        true => 0,
        false => bits,
    }
}

/// Sum with the sign of an exact zero.
fn sum(x: f64, y: f64, round: &str) -> (f64, bool) {
    let both_negative = x.is_sign_negative() && y.is_sign_negative();
    let zeros = x == 0.0 && y == 0.0 && x.is_sign_negative() == y.is_sign_negative();
    (x + y, if zeros { both_negative } else { round == "rm" })
}

fn arithmetic() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in modes() {
        let (round, ftz, sat) = mode;
        let load = move |x: u64| f(if ftz { flushed(x) } else { x });
        for op in ["add", "sub", "mul", "fma", "mad"] {
            let three = op == "fma" || op == "mad";
            if three && round.is_empty() {
                continue;
            }
            let text = format!("{} %d, %a, %b{};", name(op, mode, "f32"), if three { ", %c" } else { "" });
            let case = Case::new(&text, SECTION, [32; 4], move |[a, b, c]| {
                let (a, b, c) = (load(a), load(b), load(c));
                let (exact, negative) = match op {
                    "add" => sum(a, b, round),
                    "sub" => sum(a, -b, round),
                    "mul" => (a * b, a.is_sign_negative() != b.is_sign_negative()),
                    _ => sum(a * b, c, round),
                };
                finish(round_to(round, exact, negative), ftz, sat)
            });
            // The sum of a subnormal number and 1 is not exact in f64.
            let inputs = inputs(text.len() as u64 * 31)
                .into_iter()
                .filter(|x| op == "mul" || x.iter().all(|x| f(*x) == 0.0 || !f(*x).is_finite() || f(*x).abs() > 1e-30));
            cases.push(case.with_inputs(inputs.collect()));
        }
        if sat || round.is_empty() {
            continue;
        }
        for op in ["div", "rcp", "sqrt"] {
            let text = format!("{} %d, %a{};", name(op, mode, "f32"), if op == "div" { ", %b" } else { "" });
            let case = Case::new(&text, SECTION, [32; 4], move |[a, b, _]| {
                let (a, b) = (load(a), load(b));
                let exact = match op {
                    "div" => a / b,
                    "rcp" => 1.0 / a,
                    _ => a.sqrt(),
                };
                let negative = exact.is_sign_negative();
                finish(round_to(round, exact, negative), ftz, false)
            });
            cases.push(case.with_inputs(inputs(text.len() as u64 * 17)));
        }
    }
    cases
}

fn doubles() -> Vec<Case> {
    let mut cases = Vec::new();
    let inputs = || {
        let mut random = crate::harness::Random(99);
        (0..96)
            .map(|_| std::array::from_fn(|_| (random.next() & !(0x7ff << 52)) | (1003 + random.next() % 40) << 52))
            .collect()
    };
    for round in ["", "rn", "rz", "rm", "rp"] {
        for (op, count) in
            [("add", 2), ("sub", 2), ("mul", 2), ("fma", 3), ("mad", 3), ("div", 2), ("rcp", 1), ("sqrt", 1)]
        {
            if round.is_empty() && !matches!(op, "add" | "sub" | "mul") {
                continue;
            }
            let sources = [" %a", " %a, %b", " %a, %b, %c"][count - 1];
            let text = format!("{} %d,{sources};", name(op, (round, false, false), "f64"));
            let nearest = move |[a, b, c]: [u64; 3]| {
                let [a, b, c] = [a, b, c].map(f64::from_bits);
                match op {
                    "add" => a + b,
                    "sub" => a - b,
                    "mul" => a * b,
                    "div" => a / b,
                    "rcp" => 1.0 / a,
                    "sqrt" => a.sqrt(),
                    _ => a.mul_add(b, c),
                }
            };
            let mut case = Case::new(&text, SECTION, [64; 4], |_| 0).with_inputs(inputs());
            // The nearest or the number beside it: which is decided by the alu's own tests.
            case.expect = Rc::new(move |x| {
                let near = nearest(x);
                let (down, up) = (near.next_down(), near.next_up());
                let any = match round {
                    "rm" => vec![near, down],
                    "rp" => vec![near, up],
                    "rz" if near > 0.0 => vec![near, down],
                    "rz" => vec![near, up],
                    _ => vec![near],
                };
                any.into_iter().map(|x| if x.is_nan() { 0xfff8 << 48 } else { x.to_bits() }).collect()
            });
            cases.push(case);
        }
    }
    for (op, g) in [("min", f64::min as fn(f64, f64) -> f64), ("max", f64::max)] {
        let text = format!("{op}.f64 %d, %a, %b;");
        cases.push(
            Case::new(&text, SECTION, [64; 4], move |[a, b, _]| g(f64::from_bits(a), f64::from_bits(b)).to_bits())
                .with_inputs(inputs()),
        );
    }
    for ty in ["f32", "f64"] {
        let bits: u32 = ty[1..].parse().expect("a width");
        let sign = 1u64 << (bits - 1);
        cases.push(Case::new(&format!("neg.{ty} %d, %a;"), SECTION, [bits; 4], move |[a, ..]| a ^ sign));
        cases.push(Case::new(&format!("abs.{ty} %d, %a;"), SECTION, [bits; 4], move |[a, ..]| a & !sign));
        cases.push(Case::new(&format!("copysign.{ty} %d, %a, %b;"), "copysign", [bits; 4], move |[a, b, _]| {
            (a & sign) | (b & !sign)
        }));
    }
    cases.push(Case::new("neg.ftz.f32 %d, %a;", SECTION, [32; 4], |[a, ..]| flushed(a) ^ 0x8000_0000));
    cases.push(Case::new("abs.ftz.f32 %d, %a;", SECTION, [32; 4], |[a, ..]| flushed(a) & 0x7fff_ffff));
    cases
}

/// An f32 result within a bound: relative, plus absolute. What the ISA promises, not what the emulator gives.
fn within(
    text: &str,
    (relative, absolute): (f64, f64),
    inputs: Vec<[u64; 3]>,
    ftz: bool,
    exact: fn(f64, f64) -> f64,
) -> Case {
    let text = text.to_owned();
    let module = ptx_emulator::Module::parse(&Case::new(&text, SECTION, [32; 4], |_| 0).kernel());
    let module = module.unwrap_or_else(|error| panic!("{text}: {error}"));
    // Found first and judged then: a bound is no list of values.
    for lanes in inputs.chunks(32) {
        for ([a, b, _], found) in lanes.iter().zip(crate::harness::run(&module, lanes).expect("runs")) {
            let [a, b] = [*a, *b].map(|x| f(if ftz { flushed(x) } else { x }));
            let (expected, found) = (exact(a, b), f(found));
            let same = (expected.is_nan() && found.is_nan())
                || f64::from(expected as f32) == found
                || (ftz && expected.abs() < 1.2e-38 && found == 0.0);
            assert!(
                same || (found - expected).abs() <= relative * expected.abs() + absolute,
                "{text} of {a:e}, {b:e}: {found:e}, expected {expected:e}"
            );
        }
    }
    Case::new(&text, SECTION, [32; 4], |_| 0).with_inputs(Vec::new())
}

fn approximations() -> Vec<Case> {
    let range = |low: f32, high: f32| -> Vec<[u64; 3]> {
        (0..96)
            .map(|i| {
                [low + (high - low) * (i as f32 / 95.0), 1.0 + i as f32 / 7.0, 0.0].map(|x| u64::from(x.to_bits()))
            })
            .collect()
    };
    let ends: Vec<[u64; 3]> = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, 1.0, -1.0]
        .map(|x: f32| [x, 2.0, 0.0].map(|x| u64::from(x.to_bits())))
        .to_vec();
    let all = |low, high| [range(low, high), ends.clone()].concat();
    let mut cases = Vec::new();
    for (suffix, ftz) in [("approx.f32", false), ("approx.ftz.f32", true)] {
        let mut add = |op: &str, bound: (f64, f64), inputs, exact: fn(f64, f64) -> f64| {
            let sources = if op == "div" { "%a, %b" } else { "%a" };
            cases.push(within(&format!("{op}.{suffix} %d, {sources};"), bound, inputs, ftz, exact));
        };
        let ulp = |n: i32| f64::from(n) * 2f64.powi(-23);
        add("div", (ulp(2), 0.0), all(-50.0, 50.0), |a, b| a / b);
        add("rcp", (ulp(1), 0.0), all(0.01, 1000.0), |a, _| 1.0 / a);
        add("sqrt", (2f64.powi(-23), 0.0), all(0.0, 1000.0), |a, _| a.sqrt());
        add("rsqrt", (2f64.powf(-22.9), 0.0), all(0.001, 1000.0), |a, _| 1.0 / a.sqrt());
        add("sin", (0.0, 2f64.powf(-20.5)), range(-3.1, 3.1), |a, _| a.sin());
        add("cos", (0.0, 2f64.powf(-20.5)), range(-3.1, 3.1), |a, _| a.cos());
        add("lg2", (2f64.powi(-22), 2f64.powi(-22)), all(0.001, 100.0), |a, _| a.log2());
        add("ex2", (2f64.powf(-22.5), 0.0), all(-100.0, 100.0), |a, _| a.exp2());
        if !ftz {
            add("tanh", (2f64.powi(-11), 0.0), all(-8.0, 8.0), |a, _| a.tanh());
        }
    }
    for (suffix, ftz) in [("full.f32", false), ("full.ftz.f32", true)] {
        cases.push(within(
            &format!("div.{suffix} %d, %a, %b;"),
            (2f64.powi(-22), 0.0),
            all(-50.0, 50.0),
            ftz,
            |a, b| a / b,
        ));
    }
    // "2^126 < |b| < 2^128: if a is infinity NaN, otherwise 0."
    let beyond = vec![
        [1.0, 2e38, 0.0].map(|x: f32| u64::from(x.to_bits())),
        [f32::INFINITY, 2e38, 0.0].map(|x| u64::from(x.to_bits())),
    ];
    let case = Case::new("div.approx.f32 %d, %a, %b;", "div.approx", [32; 4], |[a, ..]| {
        if f(a).is_infinite() { 0x7fff_ffff } else { 0 }
    });
    cases.push(case.with_inputs(beyond));
    for (op, exact) in [("rcp", (|a| 1.0 / a) as fn(f64) -> f64), ("rsqrt", |a: f64| 1.0 / a.sqrt())] {
        let text = format!("{op}.approx.ftz.f64 %d, %a;");
        let mut case = Case::new(&text, SECTION, [64; 4], |_| 0);
        case.inputs = (1..97).map(|i| [(f64::from(i) * 0.37).to_bits(), 0, 0]).collect();
        // The upper half of the operand in, the upper half of the result out, 20 bits of which are right.
        case.expect = Rc::new(move |[a, ..]| {
            let bits = exact(f64::from_bits(a & !0xffff_ffff)).to_bits() & !0xffff_ffff;
            vec![bits, bits + (1 << 32), bits - (1 << 32)]
        });
        cases.push(case);
    }
    cases
}

fn extremes() -> Vec<Case> {
    let mut cases = Vec::new();
    for max in [false, true] {
        for ftz in [false, true] {
            for nan in [false, true] {
                for xorsign in [false, true] {
                    let mut text = if max { "max" } else { "min" }.to_owned();
                    for (there, word) in [(ftz, ".ftz"), (nan, ".NaN"), (xorsign, ".xorsign.abs")] {
                        text += if there { word } else { "" };
                    }
                    let case = Case::new(&format!("{text}.f32 %d, %a, %b;"), "min, max", [32; 4], move |[a, b, _]| {
                        let [a, b] = [a, b].map(|x| if ftz { flushed(x) } else { x });
                        let sign = (a ^ b) & 0x8000_0000;
                        let [a, b] = [a, b].map(|x| if xorsign { x & 0x7fff_ffff } else { x });
                        let picked = match (f(a).is_nan(), f(b).is_nan()) {
                            (true, true) => return 0x7fff_ffff,
                            (true, false) | (false, true) if nan => return 0x7fff_ffff,
                            (true, false) => b,
                            (false, true) => a,
                            _ => {
                                let less = f(a) < f(b) || (f(a) == f(b) && a >> 31 == 1);
                                if less == max { b } else { a }
                            }
                        };
                        if xorsign { picked | sign } else { picked }
                    });
                    cases.push(case.with_inputs(inputs(text.len() as u64)));
                }
            }
        }
    }
    cases
}

pub fn cases() -> Vec<Case> {
    [arithmetic(), doubles(), approximations(), extremes()].concat()
}
