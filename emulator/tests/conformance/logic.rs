//! "Logic and Shift Instructions", `mov`, `prmt`, predicate logic.

use crate::harness::{Case, mask, signed};

const SECTION: &str = "Logic and Shift Instructions";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for bits in [16, 32, 64] {
        let mut two = |name: &str, f: fn(u64, u64) -> u64| {
            let text = format!("{name}.b{bits} %d, %a, %b;");
            cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, b, _]| f(a, b) & mask(bits)));
        };
        two("and", |a, b| a & b);
        two("or", |a, b| a | b);
        two("xor", |a, b| a ^ b);
        let one = |text: &str, f: fn(u64, u32) -> u64| {
            Case::new(text, SECTION, [bits; 4], move |[a, ..]| f(a, bits) & mask(bits))
        };
        cases.push(one(&format!("not.b{bits} %d, %a;"), |a, _| !a));
        cases.push(one(&format!("cnot.b{bits} %d, %a;"), |a, _| u64::from(a == 0)));
        for ty in ["b", "u", "s"] {
            cases.push(one(&format!("mov.{ty}{bits} %d, %a;"), |a, _| a));
            let text = format!("shr.{ty}{bits} %d, %a, %b;");
            cases.push(Case::new(&text, SECTION, [bits, bits, 32, 32], move |[a, by, _]| {
                let by = by.min(u64::from(bits)) as u32;
                let value = if ty == "s" { signed(a, bits) } else { i128::from(a) };
                (value >> by) as u64 & mask(bits)
            }));
        }
        let text = format!("shl.b{bits} %d, %a, %b;");
        cases.push(Case::new(&text, SECTION, [bits, bits, 32, 32], move |[a, by, _]| {
            (u128::from(a) << by.min(64)) as u64 & mask(bits)
        }));
    }
    for (ty, bits) in [("f16", 16), ("bf16", 16), ("f16x2", 32), ("bf16x2", 32), ("f32", 32), ("f64", 64)] {
        cases.push(Case::new(&format!("mov.{ty} %d, %a;"), "mov", [bits; 4], |[a, ..]| a));
    }
    cases.push(Case::new("mov.b64 {%r1, %r2}, %a; mov.b64 %d, {%r2, %r1};", "mov", [64; 4], |[a, ..]| {
        a.rotate_left(32)
    }));
    cases.push(Case::new("mov.b32 {%h1, %h2}, %a; mov.b32 %d, {%h2, %h1};", "mov", [32; 4], |[a, ..]| {
        u64::from((a as u32).rotate_left(16))
    }));
    cases.push(Case::new(
        "mov.b64 {%h1, %h2, %h3, %h4}, %a; mov.b64 %d, {%h4, %h3, %h2, %h1};",
        "mov",
        [64; 4],
        |[a, ..]| (0..4).fold(0, |d, i| d << 16 | (a >> (16 * i) & 0xffff)),
    ));
    for table in [0u8, 0x1a, 0x96, 0xe8, 0xff] {
        let text = format!("lop3.b32 %d, %a, %b, %c, {table};");
        cases.push(Case::new(&text, "lop3", [32; 4], move |[a, b, c]| {
            (0..32).fold(0, |d, i| {
                let at = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
                d | u64::from(table >> at & 1) << i
            })
        }));
    }
    for (direction, left) in [("l", true), ("r", false)] {
        for (mode, wrap) in [("wrap", true), ("clamp", false)] {
            let text = format!("shf.{direction}.{mode}.b32 %d, %a, %b, %c;");
            cases.push(Case::new(&text, "shf", [32; 4], move |[a, b, c]| {
                let by = if wrap { c & 31 } else { c.min(32) };
                let both = u128::from(b) << 32 | u128::from(a);
                (if left { both << by >> 32 } else { both >> by }) as u64 & mask(32)
            }));
        }
    }
    cases.extend(permutations());
    for (op, f) in [("and", (|a, b| a & b) as fn(u64, u64) -> u64), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)] {
        cases.push(Case::new(&format!("{op}.pred %d, %a, !%b;"), SECTION, [1; 4], move |[a, b, _]| f(a & 1, !b & 1)));
    }
    cases.push(Case::new("not.pred %d, %a;", SECTION, [1; 4], |[a, ..]| !a & 1));
    cases.push(Case::new("mov.pred %d, %a;", SECTION, [1; 4], |[a, ..]| a & 1));
    cases.push(Case::new("mov.pred %d, 1;", SECTION, [1; 4], |_| 1));
    cases
}

fn permutations() -> Vec<Case> {
    // PTX ISA, "prmt", the table: bytes from the most significant one down, by the control.
    let tables: [(&str, [[u32; 4]; 4]); 6] = [
        ("f4e", [[3, 2, 1, 0], [4, 3, 2, 1], [5, 4, 3, 2], [6, 5, 4, 3]]),
        ("b4e", [[5, 6, 7, 0], [6, 7, 0, 1], [7, 0, 1, 2], [0, 1, 2, 3]]),
        ("rc8", [[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]]),
        ("ecl", [[3, 2, 1, 0], [3, 2, 1, 1], [3, 2, 2, 2], [3, 3, 3, 3]]),
        ("ecr", [[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 1, 0], [3, 2, 1, 0]]),
        ("rc16", [[1, 0, 1, 0], [3, 2, 3, 2], [1, 0, 1, 0], [3, 2, 3, 2]]),
    ];
    let byte = |a: u64, b: u64, i: u32| (b << 32 | a) >> (8 * i) & 0xff;
    let mut cases: Vec<Case> = tables
        .into_iter()
        .map(|(mode, table)| {
            Case::new(&format!("prmt.b32.{mode} %d, %a, %b, %c;"), "prmt", [32; 4], move |[a, b, c]| {
                table[c as usize & 3].iter().fold(0, |d, i| d << 8 | byte(a, b, *i))
            })
        })
        .collect();
    cases.push(Case::new("prmt.b32 %d, %a, %b, %c;", "prmt", [32; 4], move |[a, b, c]| {
        (0..4).fold(0, |d, i| {
            let nibble = (c >> (4 * i)) as u32 & 15;
            let found = byte(a, b, nibble & 7);
            d | (if nibble < 8 {
                found
            } else if found >> 7 == 1 {
                0xff
            } else {
                0
            }) << (8 * i)
        })
    }));
    cases
}
