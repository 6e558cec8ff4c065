//! `cargo test --release -p ptx-emulator -- --ignored --nocapture speed`

use std::hint::black_box;
use std::time::Instant;

use crate::alu::*;

fn time(name: &str, mut f: impl FnMut() -> u64) {
    let best = (0..300)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..500 {
                black_box(f());
            }
            start.elapsed().as_secs_f64() / 500.0 * 1e9
        })
        .fold(f64::MAX, f64::min);
    println!("{name:28} {best:7.1} ns");
}

#[test]
#[ignore = "measures, asserts nothing"]
fn speed() {
    let lanes = |seed: u64| -> Lanes {
        std::array::from_fn(|i| u64::from((1.0f32 + (i as u64 * 37 + seed * 11) as f32 / 64.0).to_bits()))
    };
    let halves = |seed: u64| -> Lanes { lanes(seed).map(|x| x >> 16 | (x & 0xffff_0000)) };
    let (a, b, c) = (&black_box(lanes(1)), &black_box(lanes(2)), &black_box(lanes(3)));
    let [p, q, r, s, t, u] = &black_box([1, 2, 3, 4, 5, 6].map(halves));
    for (name, op, ty) in [
        ("add.u32", Binary::Add, Ty::U(32)),
        ("mul.lo.s32", Binary::MulLo, Ty::S(32)),
        ("mul.wide.s32", Binary::MulWide, Ty::S(32)),
        ("add.s64", Binary::Add, Ty::S(64)),
        ("shl.b32", Binary::Shl, Ty::B(32)),
        ("div.u32", Binary::Div, Ty::U(32)),
        ("add.f32", Binary::Add, Ty::F32),
        ("max.f32", Binary::Max, Ty::F32),
        ("add.f16x2", Binary::Add, Ty::F16x2),
        ("mul.bf16x2", Binary::MulLo, Ty::Bf16x2),
    ] {
        time(name, || binary(black_box(op), black_box(ty), black_box(a), black_box(b))[3]);
    }
    for (name, op, ty) in [
        ("fma.rn.f32", Ternary::Fma, Ty::F32),
        ("fma.rn.bf16x2", Ternary::Fma, Ty::Bf16x2),
        ("mad.lo.s32", Ternary::MadLo, Ty::S(32)),
        ("lop3.b32", Ternary::Lop3(0x1a), Ty::B(32)),
        ("prmt.b32", Ternary::Prmt, Ty::B(32)),
        ("bfe.u32", Ternary::Bfe, Ty::U(32)),
    ] {
        time(name, || ternary(black_box(op), black_box(ty), black_box(a), black_box(b), black_box(c))[3]);
    }
    for (name, cmp, ty) in [
        ("setp.lt.s32", Compare::Lt, Ty::S(32)),
        ("setp.geu.f32", Compare::Geu, Ty::F32),
        ("setp.ge.u64", Compare::Ge, Ty::U(64)),
    ] {
        time(name, || u64::from(setp(black_box(cmp), black_box(ty), black_box(a), black_box(b))));
    }
    for (name, to, from, round, integer) in [
        ("cvt.rn.f16.f32", Ty::F16, Ty::F32, Round::Rn, false),
        ("cvt.rn.bf16.f32", Ty::Bf16, Ty::F32, Round::Rn, false),
        ("cvt.f32.f16", Ty::F32, Ty::F16, Round::Rz, false),
        ("cvt.u64.u32", Ty::U(64), Ty::U(32), Round::Rz, false),
        ("cvt.rn.f32.s32", Ty::F32, Ty::S(32), Round::Rn, false),
        ("cvt.rni.s32.f32", Ty::S(32), Ty::F32, Round::Rn, true),
    ] {
        time(name, || cvt(black_box(to), black_box(from), black_box(round), integer, false, false, black_box(a))[3]);
    }
    time("cvt.rn.f16x2.f32", || cvt_pack(black_box(Ty::F16x2), false, black_box(a), black_box(b))[3]);
    for ab in [Ty::F16, Ty::Bf16] {
        let (a, b, c) = (black_box([p, q, r, s]), black_box([t, u]), black_box([a, b, c, a]));
        time(&format!("mma.m16n8k16 {ab:?}"), || mma(black_box(16), black_box(ab), &a, &b, c)[2][3]);
    }
}
