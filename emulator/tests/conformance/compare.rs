//! "Comparison and Selection Instructions", "Half Precision Comparison Instructions", `testp`.

use crate::harness::{Case, mask, signed};
use half::{bf16, f16};

const SECTION: &str = "Comparison and Selection Instructions";

type Order = Option<std::cmp::Ordering>;

fn number(ty: &str, x: u64) -> f64 {
    match ty {
        "f16" | "f16x2" => f16::from_bits(x as u16).to_f64(),
        "bf16" | "bf16x2" => bf16::from_bits(x as u16).to_f64(),
        "f32" => f32::from_bits(x as u32).into(),
        _ => f64::from_bits(x),
    }
}

fn order(ty: &str, bits: u32, ftz: bool, a: u64, b: u64) -> Order {
    if ty.contains('f') {
        let least = if ty == "f32" { f64::from(f32::MIN_POSITIVE) } else { 2f64.powi(-14) };
        let [a, b] = [a, b].map(|x| number(ty, x)).map(|x| if ftz && x.abs() < least { 0.0 } else { x });
        return a.partial_cmp(&b);
    }
    if ty.starts_with('s') {
        Some(signed(a, bits).cmp(&signed(b, bits)))
    } else {
        Some((a & mask(bits)).cmp(&(b & mask(bits))))
    }
}

fn holds(cmp: &str, order: Order) -> bool {
    use std::cmp::Ordering::{Equal, Greater, Less};
    match (cmp, order) {
        ("num", order) => order.is_some(),
        ("nan", order) => order.is_none(),
        ("equ" | "neu" | "ltu" | "leu" | "gtu" | "geu", None) => true,
        (_, None) => false,
        ("eq" | "equ", Some(order)) => order == Equal,
        ("ne" | "neu", Some(order)) => order != Equal,
        ("lt" | "ltu" | "lo", Some(order)) => order == Less,
        ("le" | "leu" | "ls", Some(order)) => order != Greater,
        ("gt" | "gtu" | "hi", Some(order)) => order == Greater,
        (_, Some(order)) => order != Less,
    }
}

const ORDERED: [&str; 6] = ["eq", "ne", "lt", "le", "gt", "ge"];
const UNSIGNED: [&str; 4] = ["lo", "ls", "hi", "hs"];
const UNORDERED: [&str; 8] = ["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"];

fn comparisons(ty: &str) -> Vec<&'static str> {
    let mut all = ORDERED.to_vec();
    match ty.as_bytes()[0] {
        b'b' if !ty.contains('f') => all.truncate(2),
        b'u' => all.extend(UNSIGNED),
        b's' => {}
        _ => all.extend(UNORDERED),
    }
    all
}

fn combined(logic: &str, value: bool, c: u64) -> bool {
    let c = c & 1 == 1;
    match logic {
        ".and" => value & c,
        ".or" => value | c,
        ".xor" => value ^ c,
        _ => value,
    }
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let types =
        ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f16", "bf16", "f32", "f64", "f16x2", "bf16x2"];
    for ty in types {
        let packed = ty.ends_with("x2");
        let bits: u32 =
            if packed { 32 } else { ty.trim_start_matches(|c: char| c.is_alphabetic()).parse().expect("a width") };
        for cmp in comparisons(ty) {
            for logic in ["", ".and", ".or", ".xor"] {
                for ftz in [false, true] {
                    if ftz && !matches!(ty, "f32" | "f16" | "f16x2") {
                        continue;
                    }
                    let middle = format!("{cmp}{logic}{}", if ftz { ".ftz" } else { "" });
                    cases.extend(one_comparison(ty, packed, bits, cmp, logic, ftz, &middle));
                }
            }
        }
        if !packed {
            let wide = if bits == 16 || bits == 32 || bits == 64 { bits } else { 64 };
            let text = format!("selp.{ty} %d, %a, %b, %c;");
            cases.push(Case::new(&text, "selp", [wide, wide, wide, 1], |[a, b, c]| if c & 1 == 1 { a } else { b }));
        }
        if !ty.contains("16") || !ty.contains('f') {
            let text = format!("slct.{ty}.s32 %d, %a, %b, %c;");
            cases.push(Case::new(
                &text,
                "slct",
                [bits, bits, bits, 32],
                |[a, b, c]| if signed(c, 32) >= 0 { a } else { b },
            ));
            for ftz in ["", ".ftz"] {
                let text = format!("slct{ftz}.{ty}.f32 %d, %a, %b, %c;");
                cases.push(Case::new(&text, "slct", [bits, bits, bits, 32], move |[a, b, c]| {
                    let c = f32::from_bits(c as u32);
                    // A flushed number is 0, which is not negative.
                    if c >= 0.0 || (!ftz.is_empty() && c.is_subnormal()) { a } else { b }
                }));
            }
        }
    }
    for ty in ["f16x2", "bf16x2"] {
        cases.push(Case::new(&format!("selp.{ty} %d, %a, %b, %c;"), "selp", [32, 32, 32, 1], |[a, b, c]| {
            if c & 1 == 1 { a } else { b }
        }));
    }
    for ty in ["f32", "f64"] {
        let bits: u32 = ty[1..].parse().expect("a width");
        let least = if bits == 32 { f64::from(f32::MIN_POSITIVE) } else { f64::MIN_POSITIVE };
        type Holds = fn(f64, f64) -> bool;
        let classes: [(&str, Holds); 6] = [
            ("finite", |x, _| x.is_finite()),
            ("infinite", |x, _| x.is_infinite()),
            ("number", |x, _| !x.is_nan()),
            ("notanumber", |x, _| x.is_nan()),
            ("normal", |x, least| x.is_finite() && x.abs() >= least),
            ("subnormal", |x, least| x != 0.0 && x.abs() < least),
        ];
        for (class, is) in classes {
            let text = format!("testp.{class}.{ty} %d, %a;");
            cases.push(Case::new(&text, "testp", [1, bits, 32, 32], move |[a, ..]| is(number(ty, a), least).into()));
        }
    }
    cases
}

/// `setp` with one predicate and with two, `set` to each type.
fn one_comparison(
    ty: &'static str,
    packed: bool,
    bits: u32,
    cmp: &'static str,
    logic: &'static str,
    ftz: bool,
    middle: &str,
) -> Vec<Case> {
    let truth = move |a: u64, b: u64| holds(cmp, order(ty, bits, ftz, a, b));
    let results = move |[a, b, c]: [u64; 3]| {
        let (first, second) =
            if packed { (truth(a & 0xffff, b & 0xffff), truth(a >> 16, b >> 16)) } else { (truth(a, b), !truth(a, b)) };
        (combined(logic, first, c), combined(logic, second, c))
    };
    let last = if logic.is_empty() { "" } else { ", %c" };
    let third = if logic.is_empty() { 32 } else { 1 };
    let text = format!(
        "setp.{middle}.{ty} %p1|%p2, %a, %b{last}; selp.b32 %d, 1, 0, %p1; selp.b32 %w, 2, 0, %p2; or.b32 %d, %d, %w;"
    );
    let mut cases = vec![Case::new(&text, SECTION, [32, bits, bits, third], move |x| {
        let (first, second) = results(x);
        u64::from(first) | u64::from(second) << 1
    })];
    let mut destinations: Vec<(&str, u32, u64, u64)> = vec![("u32", 32, 0xffff_ffff, 0), ("s32", 32, 0xffff_ffff, 0)];
    match ty {
        "f16x2" => destinations = vec![("u32", 32, 0xffff, 1), ("s32", 32, 0xffff, 1), ("f16x2", 32, 0x3c00, 1)],
        "bf16x2" => destinations = vec![("u32", 32, 0xffff, 1), ("s32", 32, 0xffff, 1), ("bf16x2", 32, 0x3f80, 1)],
        "f16" => destinations.extend([("f16", 16, 0x3c00, 0), ("u16", 16, 0xffff, 0), ("s16", 16, 0xffff, 0)]),
        "bf16" => destinations.extend([("bf16", 16, 0x3f80, 0), ("u16", 16, 0xffff, 0), ("s16", 16, 0xffff, 0)]),
        _ => destinations.push(("f32", 32, 0x3f80_0000, 0)),
    }
    for (to, to_bits, one, twice) in destinations {
        let text = format!("set.{middle}.{to}.{ty} %d, %a, %b{last};");
        cases.push(Case::new(&text, "set", [to_bits, bits, bits, third], move |x| {
            let (first, second) = results(x);
            (if first { one } else { 0 }) | if second && twice == 1 { one << 16 } else { 0 }
        }));
    }
    cases
}
