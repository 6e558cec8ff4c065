use super::*;

fn signed(ty: Ty, x: u64) -> i128 {
    match ty {
        Ty::S(_) => i128::from(((x << (64 - ty.bits())) as i64) >> (64 - ty.bits())),
        _ => i128::from(x & mask(ty)),
    }
}

/// In 128-bit integers: `None` where the ISA leaves the result open.
fn reference(op: Binary, ty: Ty, a: u64, b: u64) -> Option<u64> {
    let (x, y, bits) = (signed(ty, a), signed(ty, b), ty.bits());
    let amount = (b as u32).min(127);
    Some(
        match op {
            Binary::Add => x + y,
            Binary::Sub => x - y,
            Binary::MulLo => x.wrapping_mul(y),
            // Two u64 fill an unsigned 128-bit integer.
            Binary::MulHi if ty == Ty::U(64) => ((x as u128 * y as u128) >> 64) as i128,
            Binary::MulHi => (x * y) >> bits,
            Binary::MulWide => return Some((x * y) as u64 & (u64::MAX >> (64 - 2 * bits))),
            Binary::Div => x.checked_div(y)?,
            Binary::Rem => x.checked_rem(y)?,
            Binary::Min => x.min(y),
            Binary::Max => x.max(y),
            Binary::And => x & y,
            Binary::Or => x | y,
            Binary::Xor => x ^ y,
            Binary::Shl if amount >= bits => 0,
            Binary::Shl => x << amount,
            Binary::Shr => x >> amount,
            _ => return None,
        } as u64
            & mask(ty),
    )
}

#[test]
fn binary_operations() {
    let mut random = Random(11);
    for ty in INTEGERS {
        for op in BINARY {
            if !implemented(&Op::Binary { op, ty, d: None, a: Src::Imm(0), b: Src::Imm(0) }) {
                continue;
            }
            let shifts = matches!(op, Binary::Shl | Binary::Shr);
            for [a, mut b] in pairs(ty, &mut random) {
                if shifts && random.next() & 1 == 0 {
                    b = std::array::from_fn(|_| {
                        if random.next().is_multiple_of(8) { 0xffff_ffff } else { random.next() % 70 }
                    });
                }
                let d = binary(op, ty, &a, &b);
                for lane in 0..32 {
                    // Chosen here for division by zero: all ones.
                    let expected = reference(op, ty, a[lane], b[lane]).unwrap_or(mask(ty));
                    assert_eq!(d[lane], expected, "{op:?} {ty:?} {:#x} {:#x}", a[lane], b[lane]);
                }
            }
        }
    }
}

#[test]
fn the_least_number_divided_by_minus_one() {
    for (ty, least) in [(Ty::S(16), 0x8000), (Ty::S(32), 0x8000_0000), (Ty::S(64), 1 << 63)] {
        let (a, b) = ([least; 32], [mask(ty); 32]);
        assert_eq!(binary(Binary::Div, ty, &a, &b)[0], least);
        assert_eq!(binary(Binary::Rem, ty, &a, &b)[0], 0);
    }
}

#[test]
fn unary_operations() {
    let mut random = Random(12);
    for ty in INTEGERS {
        for [a, _] in pairs(ty, &mut random) {
            for op in UNARY {
                if !implemented(&Op::Unary { op, ty, d: None, a: Src::Imm(0) }) {
                    continue;
                }
                let d = unary(op, ty, &a);
                for (x, d) in a.into_iter().zip(d) {
                    let ones: Vec<u32> = (0..ty.bits()).filter(|i| x >> i & 1 == 1).collect();
                    let expected = match op {
                        Unary::Mov => x,
                        Unary::Not => mask(ty) - x,
                        Unary::Cnot => u64::from(x == 0),
                        Unary::Neg => (-signed(ty, x)) as u64 & mask(ty),
                        Unary::Abs => signed(ty, x).unsigned_abs() as u64 & mask(ty),
                        Unary::Popc => ones.len() as u64,
                        Unary::Clz => u64::from(ones.last().map_or(ty.bits(), |top| ty.bits() - 1 - top)),
                        Unary::Brev => ones.iter().map(|i| 1u64 << (ty.bits() - 1 - i)).sum(),
                        Unary::Bfind => ones.last().map_or(0xffff_ffff, |top| u64::from(*top)),
                        Unary::Rcp | Unary::Sqrt => unreachable!("of floats only"),
                    };
                    assert_eq!(d, expected, "{op:?} {ty:?} {x:#x}");
                }
            }
        }
    }
}

#[test]
fn multiply_and_add() {
    let mut random = Random(13);
    for ty in INTEGERS.into_iter().filter(|ty| !matches!(ty, Ty::B(_))) {
        for [a, b] in pairs(ty, &mut random) {
            let c: Lanes = std::array::from_fn(|_| random.any_size());
            for (mad, mul, bits) in [
                (Ternary::MadLo, Binary::MulLo, ty.bits()),
                (Ternary::MadHi, Binary::MulHi, ty.bits()),
                (Ternary::MadWide, Binary::MulWide, 2 * ty.bits()),
            ] {
                if bits > 64 {
                    continue;
                }
                let mask = u64::MAX >> (64 - bits);
                let c = c.map(|x| x & mask);
                let d = ternary(mad, ty, &a, &b, &c);
                for lane in 0..32 {
                    let product = reference(mul, ty, a[lane], b[lane]).unwrap();
                    assert_eq!(d[lane], product.wrapping_add(c[lane]) & mask, "{mad:?} {ty:?}");
                }
            }
        }
    }
}

/// The loop over bits that the ISA gives, positions and lengths of 0 to 255 and beyond (only 8 bits count).
#[test]
fn bit_fields() {
    let mut random = Random(14);
    for ty in [Ty::U(32), Ty::U(64), Ty::S(32), Ty::S(64)] {
        for _ in 0..3000 {
            let [a, b]: [Lanes; 2] = [(); 2].map(|()| std::array::from_fn(|_| value(ty, &mut random)));
            let small = |random: &mut Random| match random.next() % 4 {
                0 => random.next() % 512,
                1 => [0, 31, 32, 33, 63, 64, 65, 255][random.next() as usize % 8],
                _ => random.next() % 40,
            };
            let [pos, len]: [Lanes; 2] = [(); 2].map(|()| std::array::from_fn(|_| small(&mut random)));
            let extracted = ternary(Ternary::Bfe, ty, &a, &pos, &len);
            let inserted = bfi(Ty::B(ty.bits() as u8), &a, &b, &pos, &len);
            for i in 0..32 {
                let (top, p, n) = (u64::from(ty.bits()) - 1, pos[i] & 0xff, len[i] & 0xff);
                let bit = |x: u64, at: u64| x >> at & 1;
                let sign = if matches!(ty, Ty::U(_)) || n == 0 { 0 } else { bit(a[i], (p + n - 1).min(top)) };
                let field: u64 =
                    (0..=top).map(|j| if j < n && p + j <= top { bit(a[i], p + j) } else { sign } << j).sum();
                assert_eq!(extracted[i], field, "bfe {ty:?} {:#x} {p} {n}", a[i]);
                let mut merged = b[i];
                for j in (0..n).take_while(|j| p + j <= top) {
                    merged = merged & !(1 << (p + j)) | bit(a[i], j) << (p + j);
                }
                assert_eq!(inserted[i], merged, "bfi {ty:?} {:#x} {:#x} {p} {n}", a[i], b[i]);
            }
        }
    }
}

fn one(op: Ternary, a: u64, b: u64, c: u64) -> u64 {
    ternary(op, Ty::B(32), &[a; 32], &[b; 32], &[c; 32])[5]
}

#[test]
fn worked_examples() {
    // prmt: bytes 0-3 are those of a, 4-7 those of b; 8 and above replicate the sign of byte (n - 8).
    let (a, b) = (0x8322_1180, 0x7766_55c4);
    assert_eq!(one(Ternary::Prmt, a, b, 0x3210), a);
    assert_eq!(one(Ternary::Prmt, a, b, 0x7654), b);
    assert_eq!(one(Ternary::Prmt, a, b, 0x0123), 0x8011_2283);
    assert_eq!(one(Ternary::Prmt, a, b, 0x5410), 0x55c4_1180);
    assert_eq!(one(Ternary::Prmt, a, b, 0xb9c8), 0xff00_ffff);
    assert_eq!(one(Ternary::Prmt, a, b, 0xffff_7632), 0x7766_8322, "only four nibbles of the selector count");
    // lop3: the table is the function of 0xf0, 0xcc, 0xaa. Those of the ISA's text first.
    let (a, b, c) = (0x0f0f_1234, 0x00ff_abcd, 0x5555_ef01);
    let all = 0xffff_ffff;
    assert_eq!(one(Ternary::Lop3(0x80), a, b, c), a & b & c);
    assert_eq!(one(Ternary::Lop3(0xfe), a, b, c), a | b | c);
    assert_eq!(one(Ternary::Lop3(0x40), a, b, c), a & b & (all ^ c));
    assert_eq!(one(Ternary::Lop3(0x1a), a, b, c), (a & b | c) ^ a);
    assert_eq!(one(Ternary::Lop3(0x96), a, b, c), a ^ b ^ c);
    // shf: b is the upper word.
    let [left, left_wrap] = [false, true].map(|wrap| Ternary::ShfL { wrap });
    let [right, right_wrap] = [false, true].map(|wrap| Ternary::ShfR { wrap });
    let (low, high) = (0x89ab_cdef, 0x0123_4567);
    assert_eq!(one(left, low, high, 0), high);
    assert_eq!(one(left, low, high, 8), 0x2345_6789);
    assert_eq!([32, 33, 99].map(|by| one(left, low, high, by)), [low; 3]);
    assert_eq!(one(left_wrap, low, high, 32), high);
    assert_eq!(one(left_wrap, low, high, 40), 0x2345_6789);
    assert_eq!(one(right, low, high, 0), low);
    assert_eq!(one(right, low, high, 8), 0x6789_abcd);
    assert_eq!([32, 33, 99].map(|by| one(right, low, high, by)), [high; 3]);
    assert_eq!(one(right_wrap, low, high, 32), low);
    assert_eq!(one(right_wrap, low, high, 40), 0x6789_abcd);
}

/// Every table on every combination of bits.
#[test]
fn lop3_is_its_table() {
    for table in 0..=255u8 {
        // Bit i of the operands spells i in binary, as 0xf0, 0xcc, 0xaa do.
        assert_eq!(one(Ternary::Lop3(table), 0xf0, 0xcc, 0xaa) & 0xff, u64::from(table));
    }
}

#[test]
fn permutations() {
    let mut random = Random(15);
    for _ in 0..1000 {
        let [a, b, c]: [Lanes; 3] = [(); 3].map(|()| std::array::from_fn(|_| random.next() & 0xffff_ffff));
        let d = ternary(Ternary::Prmt, Ty::B(32), &a, &b, &c);
        for lane in 0..32 {
            let bytes: Vec<u8> = [a[lane], b[lane]].iter().flat_map(|x| (*x as u32).to_le_bytes()).collect();
            let picked: [u8; 4] = std::array::from_fn(|i| {
                let byte = bytes[(c[lane] >> (4 * i) & 7) as usize];
                if c[lane] >> (4 * i + 3) & 1 == 1 { ((byte as i8) >> 7) as u8 } else { byte }
            });
            assert_eq!(d[lane], u64::from(u32::from_le_bytes(picked)));
        }
    }
}

#[test]
fn atomics() {
    let minus = |x: u64| x.wrapping_neg() & 0xffff_ffff;
    let u32s = |op, old, b| atomic(op, Ty::U(32), old, b, 0);
    assert_eq!(u32s(Atomic::Add, 0xffff_ffff, 2), 1);
    assert_eq!(atomic(Atomic::Add, Ty::S(32), minus(3), 1, 0), minus(2));
    assert_eq!(atomic(Atomic::Add, Ty::U(64), u64::MAX, 2, 0), 1);
    assert_eq!([u32s(Atomic::Min, 3, minus(1)), u32s(Atomic::Max, 3, minus(1))], [3, minus(1)]);
    let s32s = |op, old, b| atomic(op, Ty::S(32), old, b, 0);
    assert_eq!([s32s(Atomic::Min, 3, minus(1)), s32s(Atomic::Max, 3, minus(1))], [minus(1), 3]);
    assert_eq!(atomic(Atomic::Max, Ty::S(64), u64::MAX, 0, 0), 0);
    assert_eq!(atomic(Atomic::Min, Ty::U(64), u64::MAX, 7, 0), 7);
    // inc: 0 once the bound is reached; dec: the bound from 0 and from above it.
    assert_eq!([0, 4, 5, 6, 0xffff_ffff].map(|old| u32s(Atomic::Inc, old, 5)), [1, 5, 0, 0, 0]);
    assert_eq!(u32s(Atomic::Inc, 0xffff_ffff, 0xffff_ffff), 0);
    assert_eq!([0, 1, 5, 6].map(|old| u32s(Atomic::Dec, old, 5)), [5, 0, 4, 5]);
    let bits = |op| atomic(op, Ty::B(32), 0b1100, 0b1010, 0);
    assert_eq!([Atomic::And, Atomic::Or, Atomic::Xor, Atomic::Exch].map(bits), [0b1000, 0b1110, 0b0110, 0b1010]);
    assert_eq!([6, 7].map(|old| atomic(Atomic::Cas, Ty::B(64), old, 7, 9)), [6, 9]);
    let f32s = |x: f32, y: f32| atomic(Atomic::Add, Ty::F32, x.to_bits().into(), y.to_bits().into(), 0);
    assert_eq!(f32s(1.5, 2.25), u64::from(3.75f32.to_bits()));
    assert_eq!(f32s(f32::INFINITY, f32::NEG_INFINITY), 0x7fff_ffff);
    assert_eq!(atomic(Atomic::Add, Ty::F64, 1.5f64.to_bits(), 2.25f64.to_bits(), 0), 3.75f64.to_bits());
}
