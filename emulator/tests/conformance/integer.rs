//! "Integer Arithmetic Instructions", "Video Instructions".

use crate::harness::{Case, mask, signed};

const SECTION: &str = "Integer Arithmetic Instructions";

/// A value as its type has it: with its sign, or without.
fn value(x: u64, ty: &str, bits: u32) -> i128 {
    if ty.starts_with('s') { signed(x, bits) } else { i128::from(x & mask(bits)) }
}

fn width(ty: &str) -> u32 {
    ty[1..].parse().expect("a width")
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for ty in ["u16", "s16", "u32", "s32", "u64", "s64"] {
        let bits = width(ty);
        let mut three = |name: &str, f: fn(i128, i128, i128, u32) -> i128| {
            let text = format!("{name}.{ty} %d, %a, %b, %c;");
            let f = move |[a, b, c]: [u64; 3]| f(value(a, ty, bits), value(b, ty, bits), value(c, ty, bits), bits);
            cases.push(Case::new(&text, SECTION, [bits; 4], move |x| f(x) as u64 & mask(bits)));
        };
        three("mad.lo", |a, b, c, bits| (a.wrapping_mul(b) & i128::from(mask(bits))) + c);
        three("sad", |a, b, c, _| (a - b).abs() + c);
        three("mad.hi", |a, b, c, bits| (a.wrapping_mul(b) >> bits) + c);
        let mut two = |name: &str, f: fn(i128, i128, u32) -> i128| {
            let text = format!("{name}.{ty} %d, %a, %b;");
            let f = move |[a, b, _]: [u64; 3]| f(value(a, ty, bits), value(b, ty, bits), bits);
            cases.push(Case::new(&text, SECTION, [bits; 4], move |x| f(x) as u64 & mask(bits)));
        };
        two("add", |a, b, _| a + b);
        two("sub", |a, b, _| a - b);
        two("mul.lo", |a, b, _| a.wrapping_mul(b));
        two("mul.hi", |a, b, bits| a.wrapping_mul(b) >> bits);
        two("min", |a, b, _| a.min(b));
        two("max", |a, b, _| a.max(b));
        // Division by zero is unspecified: the divisor is made odd. The least number by -1 wraps.
        for (name, rem) in [("div", false), ("rem", true)] {
            let text = format!("or.b{bits} %b, %b, 1; {name}.{ty} %d, %a, %b;");
            cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, b, _]| {
                let (a, b) = (value(a, ty, bits), value(b | 1, ty, bits));
                (if rem { a % b } else { a / b }) as u64 & mask(bits)
            }));
        }
        if ty.starts_with('s') {
            let text = format!("abs.{ty} %d, %a;");
            cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, ..]| {
                signed(a, bits).unsigned_abs() as u64 & mask(bits)
            }));
            let text = format!("neg.{ty} %d, %a;");
            cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, ..]| (-signed(a, bits)) as u64 & mask(bits)));
        }
        if bits < 64 {
            let text = format!("mul.wide.{ty} %d, %a, %b;");
            let product = move |a, b| value(a, ty, bits) * value(b, ty, bits);
            let wide = 2 * bits;
            cases.push(Case::new(&text, SECTION, [wide, bits, bits, 32], move |[a, b, _]| {
                product(a, b) as u64 & mask(wide)
            }));
            let text = format!("mad.wide.{ty} %d, %a, %b, %c;");
            cases.push(Case::new(&text, SECTION, [wide, bits, bits, wide], move |[a, b, c]| {
                (product(a, b) as u64).wrapping_add(c) & mask(wide)
            }));
        }
        if bits > 16 {
            for shift in [false, true] {
                let text = format!("bfind{}.{ty} %d, %a;", if shift { ".shiftamt" } else { "" });
                cases.push(Case::new(&text, "bfind", [32, bits, 32, 32], move |[a, ..]| {
                    let negative = ty.starts_with('s') && signed(a, bits) < 0;
                    let found = (0..bits).rev().find(|i| (a >> i & 1 == 1) != negative);
                    found.map_or(0xffff_ffff, |i| u64::from(if shift { bits - 1 - i } else { i }))
                }));
            }
            let text = format!("bfe.{ty} %d, %a, %b, %c;");
            cases.push(Case::new(&text, "bfe", [bits, bits, 32, 32], move |[a, pos, len]| {
                let (pos, len) = (pos as u32 & 0xff, len as u32 & 0xff);
                let sign = if ty.starts_with('u') || len == 0 { 0 } else { a >> (pos + len - 1).min(bits - 1) & 1 };
                let bit = |i: u32| if i < len && pos + i < bits { a >> (pos + i) & 1 } else { sign };
                (0..bits).fold(0, |d, i| d | bit(i) << i)
            }));
        }
    }
    for bits in [32, 64] {
        let one = |name: &str, f: fn(u64, u32) -> u64| {
            Case::new(&format!("{name}.b{bits} %d, %a;"), SECTION, [32, bits, 32, 32], move |[a, ..]| f(a, bits))
        };
        cases.push(one("popc", |a, bits| (0..bits).map(|i| a >> i & 1).sum()));
        cases.push(one("clz", |a, bits| (0..bits).rev().take_while(|i| a >> i & 1 == 0).count() as u64));
        let text = format!("brev.b{bits} %d, %a;");
        cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, ..]| {
            (0..bits).fold(0, |d, i| d | (a >> i & 1) << (bits - 1 - i))
        }));
        let text = format!("bfi.b{bits} %d, %a, %d, %b, %c;");
        let text = format!("mov.b{bits} %d, {}; {text}", 0x5555_aaaa_u32);
        cases.push(Case::new(&text, "bfi", [bits, bits, 32, 32], move |[a, pos, len]| {
            let (pos, len) = (pos as u32 & 0xff, len as u32 & 0xff);
            let inside = |i: u32| i >= pos && i - pos < len;
            (0..bits).fold(0, |d, i| d | (if inside(i) { a >> (i - pos) & 1 } else { 0x5555_aaaa >> i & 1 }) << i)
        }));
    }
    cases.extend(word_cases());
    cases
}

/// Instructions of 32-bit words.
fn word_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let case = |text: &str, f: fn(u32, u32, u32) -> u32| {
        Case::new(text, SECTION, [32; 4], move |[a, b, c]| u64::from(f(a as u32, b as u32, c as u32)))
    };
    cases.push(case("add.sat.s32 %d, %a, %b;", |a, b, _| (a as i32).saturating_add(b as i32) as u32));
    cases.push(case("sub.sat.s32 %d, %a, %b;", |a, b, _| (a as i32).saturating_sub(b as i32) as u32));
    cases.push(case("mad.hi.sat.s32 %d, %a, %b, %c;", |a, b, c| {
        let high = (i64::from(a as i32) * i64::from(b as i32)) >> 32;
        (high + i64::from(c as i32)).clamp(i32::MIN.into(), i32::MAX.into()) as u32
    }));
    cases
        .push(case("mul24.lo.u32 %d, %a, %b;", |a, b, _| (u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) as u32));
    cases.push(case("mul24.hi.u32 %d, %a, %b;", |a, b, _| {
        ((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) >> 16) as u32
    }));
    fn s24(x: u32) -> i64 {
        let x = i64::from(x & 0xff_ffff);
        if x >= 1 << 23 { x - (1 << 24) } else { x }
    }
    cases.push(case("mul24.lo.s32 %d, %a, %b;", |a, b, _| (s24(a) * s24(b)) as u32));
    cases.push(case("mul24.hi.s32 %d, %a, %b;", |a, b, _| ((s24(a) * s24(b)) >> 16) as u32));
    cases.push(case("mad24.lo.u32 %d, %a, %b, %c;", |a, b, c| {
        ((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) as u32).wrapping_add(c)
    }));
    cases.push(case("mad24.hi.u32 %d, %a, %b, %c;", |a, b, c| {
        (((u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)) >> 16) as u32).wrapping_add(c)
    }));
    cases.push(case("mad24.lo.s32 %d, %a, %b, %c;", |a, b, c| ((s24(a) * s24(b)) as u32).wrapping_add(c)));
    cases.push(case("mad24.hi.s32 %d, %a, %b, %c;", |a, b, c| (((s24(a) * s24(b)) >> 16) as u32).wrapping_add(c)));
    cases.push(case("mad24.hi.sat.s32 %d, %a, %b, %c;", |a, b, c| {
        (i64::from(((s24(a) * s24(b)) >> 16) as i32) + i64::from(c as i32)).clamp(i32::MIN.into(), i32::MAX.into())
            as u32
    }));
    for (a_type, b_type) in [("u32", "u32"), ("u32", "s32"), ("s32", "u32"), ("s32", "s32")] {
        let byte = |ty: &'static str| {
            move |x: u64, i: u32| {
                let byte = (x >> (8 * i)) as u8;
                if ty == "s32" { i64::from(byte as i8) } else { i64::from(byte) }
            }
        };
        let half = |ty: &'static str| {
            move |x: u64, i: u32| {
                let half = (x >> (16 * i)) as u16;
                if ty == "s32" { i64::from(half as i16) } else { i64::from(half) }
            }
        };
        let (x, y, h) = (byte(a_type), byte(b_type), half(a_type));
        let text = format!("dp4a.{a_type}.{b_type} %d, %a, %b, %c;");
        cases.push(Case::new(&text, "dp4a", [32; 4], move |[a, b, c]| {
            (c as i64 + (0..4).map(|i| x(a, i) * y(b, i)).sum::<i64>()) as u64 & mask(32)
        }));
        for (part, first) in [("lo", 0), ("hi", 2)] {
            let text = format!("dp2a.{part}.{a_type}.{b_type} %d, %a, %b, %c;");
            cases.push(Case::new(&text, "dp2a", [32; 4], move |[a, b, c]| {
                (c as i64 + (0..2).map(|i| h(a, i) * y(b, first + i)).sum::<i64>()) as u64 & mask(32)
            }));
        }
    }
    cases.push(case("min.relu.s32 %d, %a, %b;", |a, b, _| (a as i32).min(b as i32).max(0) as u32));
    cases.push(case("max.relu.s32 %d, %a, %b;", |a, b, _| (a as i32).max(b as i32).max(0) as u32));
    fn each(a: u32, b: u32, f: fn(u16, u16) -> u16) -> u32 {
        u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
    }
    cases.push(case("add.u16x2 %d, %a, %b;", |a, b, _| each(a, b, u16::wrapping_add)));
    cases.push(case("add.s16x2 %d, %a, %b;", |a, b, _| each(a, b, u16::wrapping_add)));
    cases.push(case("min.u16x2 %d, %a, %b;", |a, b, _| each(a, b, u16::min)));
    cases.push(case("max.u16x2 %d, %a, %b;", |a, b, _| each(a, b, u16::max)));
    cases.push(case("min.s16x2 %d, %a, %b;", |a, b, _| each(a, b, |a, b| (a as i16).min(b as i16) as u16)));
    cases.push(case("max.s16x2 %d, %a, %b;", |a, b, _| each(a, b, |a, b| (a as i16).max(b as i16) as u16)));
    cases.push(case("min.relu.s16x2 %d, %a, %b;", |a, b, _| each(a, b, |a, b| (a as i16).min(b as i16).max(0) as u16)));
    cases.push(case("max.relu.s16x2 %d, %a, %b;", |a, b, _| each(a, b, |a, b| (a as i16).max(b as i16).max(0) as u16)));
    cases.push(case("and.b32 %b, %b, 31; fns.b32 %d, %a, %b, %c;", |a, b, c| {
        let (base, n) = (b & 31, c as i32);
        let bits: Vec<u32> = match n {
            0 => (base..=base).filter(|i| a >> i & 1 == 1).collect(),
            1.. => (base..32).filter(|i| a >> i & 1 == 1).collect(),
            _ => (0..=base).rev().filter(|i| a >> i & 1 == 1).collect(),
        };
        bits.get((n.unsigned_abs().max(1) - 1) as usize).copied().unwrap_or(u32::MAX)
    }));
    // Small counts, so that something is found.
    cases.push(case("and.b32 %b, %b, 31; and.b32 %c, %c, 7; sub.s32 %c, %c, 3; fns.b32 %d, %a, %b, %c;", |a, b, c| {
        let (mut at, mut left) = ((b & 31) as i32, (c & 7) as i32 - 3);
        let step = left.signum();
        loop {
            let inside = (0..32).contains(&at);
            if inside && a >> at & 1 == 1 {
                left -= step;
            }
            if left == 0 && inside {
                return if a >> at & 1 == 1 { at as u32 } else { u32::MAX };
            }
            if !inside {
                return u32::MAX;
            }
            at += step;
        }
    }));
    cases.push(case("vabsdiff4.u32.u32.u32 %d, %a, %b, %c;", |a, b, _| {
        (0..4).fold(0, |d, i| d | (((a >> (8 * i)) as u8).abs_diff((b >> (8 * i)) as u8) as u32) << (8 * i))
    }));
    cases.push(case("vabsdiff4.u32.u32.u32.add %d, %a, %b, %c;", |a, b, c| {
        (0..4).fold(c, |d, i| d.wrapping_add(((a >> (8 * i)) as u8).abs_diff((b >> (8 * i)) as u8).into()))
    }));
    for wrap in [false, true] {
        let mode = if wrap { "wrap" } else { "clamp" };
        let limit = move |x: u64| if wrap { x as u32 & 31 } else { (x as u32).min(32) };
        cases.push(Case::new(&format!("bmsk.{mode}.b32 %d, %a, %b;"), "bmsk", [32; 4], move |[a, b, _]| {
            let (start, width) = (limit(a), limit(b));
            (0..32).filter(|i| *i >= start && *i - start < width).fold(0, |d, i| d | 1u64 << i)
        }));
        for ty in ["u32", "s32"] {
            cases.push(Case::new(&format!("szext.{mode}.{ty} %d, %a, %b;"), "szext", [32; 4], move |[a, b, _]| {
                let width = limit(b);
                let sign = if ty == "s32" && width > 0 { a >> (width - 1) & 1 } else { 0 };
                (0..32).fold(0, |d, i| d | (if i < width { a >> i & 1 } else { sign }) << i)
            }));
        }
    }
    cases
}
