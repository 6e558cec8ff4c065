//! "Extended-Precision Integer Arithmetic Instructions".

use crate::harness::{Case, mask, signed};

const SECTION: &str = "Extended-Precision Integer Arithmetic Instructions";

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for ty in ["u32", "s32", "u64", "s64"] {
        let bits: u32 = ty[1..].parse().expect("a width");
        // The carry of %a + %b goes into %c + 0, and that one's into the next; all three are looked at.
        let text = format!(
            "add.cc.{ty} %a, %a, %b; addc.cc.{ty} %c, %c, %b; addc.{ty} %d, 0, 0; \
             mad.lo.{ty} %d, %c, 3, %d; xor.b{bits} %d, %d, %a;"
        );
        cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, b, c]| {
            let low = u128::from(a) + u128::from(b);
            let high = u128::from(c) + u128::from(b) + (low >> bits);
            let three = ((high as u64 & mask(bits)).wrapping_mul(3)).wrapping_add((high >> bits) as u64);
            (three ^ low as u64) & mask(bits)
        }));
        let text = format!(
            "sub.cc.{ty} %a, %a, %b; subc.cc.{ty} %c, %c, %b; subc.{ty} %d, 0, 0; \
             mad.lo.{ty} %d, %c, 3, %d; xor.b{bits} %d, %d, %a;"
        );
        cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, b, c]| {
            let low = i128::from(a) - i128::from(b);
            let high = i128::from(c) - i128::from(b) - i128::from(low < 0);
            let borrow = u64::from(high < 0);
            let three = ((high as u64 & mask(bits)).wrapping_mul(3)).wrapping_sub(borrow);
            (three ^ low as u64) & mask(bits)
        }));
        let multiply = move |a: u64, b: u64| match ty.starts_with('s') {
            true => signed(a, bits).wrapping_mul(signed(b, bits)) as u128,
            false => u128::from(a) * u128::from(b),
        };
        // a·b + c·(1 + 2^bits): low, high and the carry out of both.
        let text = format!(
            "mad.lo.cc.{ty} %d, %a, %b, %c; madc.hi.cc.{ty} %b, %a, %b, %c; addc.{ty} %c, 0, 0; \
             xor.b{bits} %d, %d, %b; add.{ty} %d, %d, %c;"
        );
        cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, b, c]| {
            let all = u128::from(mask(bits));
            let low = (multiply(a, b) & all) + u128::from(c);
            let high = (multiply(a, b) >> bits & all) + u128::from(c) + (low >> bits);
            ((low ^ high) as u64 & mask(bits)).wrapping_add((high >> bits) as u64) & mask(bits)
        }));
        let text = format!(
            "mad.hi.cc.{ty} %d, %a, %b, %c; madc.lo.cc.{ty} %d, %a, %d, %c; madc.hi.{ty} %d, %a, %d, %c; \
             add.cc.{ty} %a, %a, %c; madc.lo.{ty} %d, %d, %d, %b;"
        );
        cases.push(Case::new(&text, SECTION, [bits; 4], move |[a, b, c]| {
            let all = u128::from(mask(bits));
            let one = (multiply(a, b) >> bits & all) + u128::from(c);
            let two = (multiply(a, one as u64 & mask(bits)) & all) + u128::from(c) + (one >> bits);
            let three = (multiply(a, two as u64 & mask(bits)) >> bits & all) + u128::from(c) + (two >> bits);
            let carry = (u128::from(a) + u128::from(c)) >> bits;
            let d = three as u64 & mask(bits);
            d.wrapping_mul(d).wrapping_add(b).wrapping_add(carry as u64) & mask(bits)
        }));
    }
    cases
}
