//! Each operation against a reference that shares nothing with it: loops over bits, 128-bit integers, exact rationals.

mod convert;
mod exact;
mod float;
mod int;
mod mma;
mod soft;
mod speed;

use super::*;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Of any magnitude: as many random bits as a random number says.
    fn any_size(&mut self) -> u64 {
        let bits = self.next();
        let size = self.next() % 64;
        if self.next() & 1 == 0 { bits >> size } else { !(bits >> size) }
    }
}

fn mask(ty: Ty) -> u64 {
    u64::MAX >> (64 - ty.bits())
}

const INTEGERS: [Ty; 9] =
    [Ty::B(16), Ty::B(32), Ty::B(64), Ty::U(16), Ty::U(32), Ty::U(64), Ty::S(16), Ty::S(32), Ty::S(64)];
const FLOATS: [Ty; 6] = [Ty::F16, Ty::Bf16, Ty::F16x2, Ty::Bf16x2, Ty::F32, Ty::F64];

/// Zeros, ones, ends and their neighbours, of each type.
fn specials(ty: Ty) -> Vec<u64> {
    let values: &[u64] = match ty {
        Ty::F16 => &[
            0, 0x8000, 1, 0x8001, 2, 0x3ff, 0x400, 0x401, 0x8400, 0x3c00, 0xbc00, 0x3c01, 0x3bff, 0x3555, 0x7bff,
            0xfbff, 0x7c00, 0xfc00, 0x7c01, 0x7e00, 0xffff, 0x5bff, 0x1400, 0x6400,
        ],
        Ty::Bf16 => &[
            0, 0x8000, 1, 0x8001, 2, 0x7f, 0x80, 0x81, 0x8080, 0x3f80, 0xbf80, 0x3f81, 0x3f7f, 0x3eaa, 0x7f7f, 0xff7f,
            0x7f80, 0xff80, 0x7f81, 0x7fc0, 0xffff, 0x5f7f, 0x2000, 0x1fff,
        ],
        Ty::F32 => &[
            0,
            0x8000_0000,
            1,
            0x8000_0001,
            0x7f_ffff,
            0x80_0000,
            0x80_0001,
            0x3f80_0000,
            0xbf80_0000,
            0x3f80_0001,
            0x3f7f_ffff,
            0x7f7f_ffff,
            0xff7f_ffff,
            0x7f80_0000,
            0xff80_0000,
            0x7f80_0001,
            0xffc0_0000,
            0x3f00_0000,
            0x3fc0_0000,
            0x4020_0000,
            0x4b00_0000,
            0x4eff_ffff,
            0x4f00_0000,
            0xcf00_0000,
            0xcf00_0001,
            0x4f80_0000,
            0x5f00_0000,
            0x2000_0000,
            0x477f_efff,
            0x477f_f000,
            0x3380_0000,
            0x3300_0000,
            0x3300_0001,
        ],
        Ty::F64 => &[
            0,
            1 << 63,
            1,
            0xf_ffff_ffff_ffff,
            0x10_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            0x3fe0_0000_0000_0000,
            0xbfe0_0000_0000_0000,
            0x3ff8_0000_0000_0000,
            0x4330_0000_0000_0000,
            0x4330_0000_0000_0001,
            0x432f_ffff_ffff_ffff,
            0x43e0_0000_0000_0000,
            0xc3e0_0000_0000_0000,
            0x43f0_0000_0000_0000,
            0x41df_ffff_ffff_ffff,
            0x41e0_0000_0000_0000,
            0x41ef_ffff_ffff_ffff,
            0x7fef_ffff_ffff_ffff,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0xfff8_0000_0000_0001,
            0x36a0_0000_0000_0000,
            0x3690_0000_0000_0000,
            0x3690_0000_0000_0001,
            0x3ff0_0000_1000_0000,
            0x3ff0_0000_1000_0001,
            0x3ff0_0000_3000_0000,
            0x47ef_ffff_f000_0000,
            0x47ef_ffff_efff_ffff,
        ],
        _ => {
            let top = 1u64 << (ty.bits() - 1);
            return [
                0,
                1,
                2,
                3,
                5,
                7,
                31,
                32,
                33,
                63,
                64,
                255,
                top - 1,
                top,
                top + 1,
                !0,
                !1,
                !2,
                top | top >> 1,
                0x8080,
                0x7f7f,
            ]
            .map(|x| x & mask(ty))
            .to_vec();
        }
    };
    values.to_vec()
}

/// All pairs of special values, then random ones, 32 at a time.
fn pairs(ty: Ty, random: &mut Random) -> Vec<[Lanes; 2]> {
    let special = specials(ty);
    let mut all: Vec<[u64; 2]> = special.iter().flat_map(|a| special.iter().map(|b| [*a, *b])).collect();
    all.resize_with(all.len().next_multiple_of(32) + 2048, || [(); 2].map(|()| value(ty, random)));
    all.chunks_exact(32).map(|chunk| [0, 1].map(|i| std::array::from_fn(|lane| chunk[lane][i]))).collect()
}

fn value(ty: Ty, random: &mut Random) -> u64 {
    let special = specials(ty);
    match random.next() % 4 {
        0 => special[random.next() as usize % special.len()],
        1 if !is_float(ty) => random.any_size() & mask(ty),
        _ => random.next() & mask(ty),
    }
}

/// What is let through fits its register, whatever the operands hold, and does not panic.
#[test]
fn results_are_zero_extended() {
    let mut random = Random(1);
    let types: Vec<Ty> = INTEGERS.into_iter().chain(FLOATS).collect();
    for _ in 0..20 {
        let [a, b, c]: [Lanes; 3] = [(); 3].map(|()| std::array::from_fn(|_| random.any_size()));
        for &ty in &types {
            let fits = |lanes: Lanes, ty: Ty| assert!(lanes.iter().all(|x| x & !mask(ty) == 0), "{ty:?}");
            let [a, b, c] = [a, b, c].map(|lanes| lanes.map(|x| x & mask(ty)));
            let (src, d) = (Src::Imm(0), None);
            for op in UNARY {
                if implemented(&Op::Unary { op, ty, d, a: src }) {
                    let counts = matches!(op, Unary::Popc | Unary::Clz | Unary::Bfind);
                    fits(unary(op, ty, &a), if counts { Ty::U(32) } else { ty });
                }
            }
            for op in BINARY {
                if implemented(&Op::Binary { op, ty, d, a: src, b: src }) {
                    let bits = if op == Binary::MulWide { 2 * ty.bits() as u8 } else { ty.bits() as u8 };
                    fits(binary(op, ty, &a, &b), Ty::U(bits));
                }
            }
            for op in TERNARY {
                if implemented(&Op::Ternary { op, ty, d, a: src, b: src, c: src }) {
                    let bits = if op == Ternary::MadWide { 2 * ty.bits() as u8 } else { ty.bits() as u8 };
                    fits(ternary(op, ty, &a, &b, &c), Ty::U(bits));
                }
            }
        }
    }
}

const UNARY: [Unary; 11] = [
    Unary::Mov,
    Unary::Not,
    Unary::Cnot,
    Unary::Neg,
    Unary::Abs,
    Unary::Popc,
    Unary::Clz,
    Unary::Brev,
    Unary::Bfind,
    Unary::Rcp,
    Unary::Sqrt,
];
const BINARY: [Binary; 16] = [
    Binary::Add,
    Binary::Sub,
    Binary::MulLo,
    Binary::MulHi,
    Binary::MulWide,
    Binary::Div,
    Binary::Rem,
    Binary::Min,
    Binary::Max,
    Binary::MinNan,
    Binary::MaxNan,
    Binary::And,
    Binary::Or,
    Binary::Xor,
    Binary::Shl,
    Binary::Shr,
];
const TERNARY: [Ternary; 11] = [
    Ternary::MadLo,
    Ternary::MadHi,
    Ternary::MadWide,
    Ternary::Fma,
    Ternary::Bfe,
    Ternary::Prmt,
    Ternary::ShfL { wrap: false },
    Ternary::ShfL { wrap: true },
    Ternary::ShfR { wrap: false },
    Ternary::ShfR { wrap: true },
    Ternary::Lop3(0x1a),
];
