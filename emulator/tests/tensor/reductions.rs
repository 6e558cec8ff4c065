//! Copies that combine with what is there.

use half::{bf16, f16};
use ptx_emulator::{OobFill, Rule, Swizzle, TensorMap, TensorType};

use crate::plain;
use crate::support::{Run, one_warp, words};

/// Adds, and so on, `tile` (words 1, 2, 3, …) to `out`, which holds 1000 everywhere.
#[test]
fn reductions_combine_element_by_element() {
    let body = |reduce: &str| {
        format!(
            "
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %tile, %r1;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd2, %out, %rd1;
    add.u32 %r3, %t, 1;
    st.shared.u32 [%r2], %r3;
    st.global.u32 [%rd2], 10;
    fence.proxy.async;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    {reduce}
    {reduce}
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
DONE:
    ret;"
        )
    };
    let plain_form =
        |op: &str| body(&format!("cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%out], [%tile], 128;"));
    let map: fn(u64, u64) -> Option<TensorMap> =
        |_, at| plain(TensorType::U32, at, &[32], &[], &[32], Swizzle::None, OobFill::Zeros).ok();
    type Twice = fn(u32) -> u32;
    let cases: [(&str, &str, Twice); 8] = [
        ("add.u32", "add", |x| 10 + 2 * x),
        ("min.s32", "min", |x| x.min(10)),
        ("max.u32", "max", |x| x.max(10)),
        ("and.b32", "and", |x| x & 10),
        ("or.b32", "or", |x| x | 10),
        ("xor.b32", "xor", |_| 10),
        ("inc.u32", "inc", |x| (0..2).fold(10, |old, _| if old >= x { 0 } else { old + 1 })),
        ("dec.u32", "dec", |x| (0..2).fold(10, |old, _| if old == 0 || old > x { x } else { old - 1 })),
    ];
    for (op, word, twice) in cases {
        let expected: Vec<u32> = (1..=32).map(twice).collect();
        let run = Run { map, out_bytes: 128, ..one_warp() };
        assert_eq!(run.words(&plain_form(op)), expected, "{op}");
        let form =
            format!("cp.reduce.async.bulk.tensor.1d.global.shared::cta.{word}.tile.bulk_group [%map, {{0}}], [%tile];");
        assert_eq!(run.words(&body(&form)), expected, "tensor {word}");
    }
    // The same twice is no race, a plain store beside it is one.
    let run = Run { map, out_bytes: 128, ..one_warp() };
    let mixed = plain_form("add.u32").replacen(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32",
        "cp.async.bulk.global.shared::cta.bulk_group",
        1,
    );
    run.reports(&mixed, &[Rule::Race], "bulk operation");
    let float: fn(u64, u64) -> Option<TensorMap> =
        |_, at| plain(TensorType::F32, at, &[32], &[], &[32], Swizzle::None, OobFill::Zeros).ok();
    let form = "cp.reduce.async.bulk.tensor.1d.global.shared::cta.xor.tile.bulk_group [%map, {0}], [%tile];";
    Run { map: float, ..run }.reports(&body(form), &[Rule::Trap], "no reduction Xor of F32");
}

/// PTX ISA, "cp.reduce.async.bulk": f16 and bf16 add with `.noftz`, f32 add, and half minima.
#[test]
fn reductions_of_floats_round() {
    let body = |op: &str, old: u32, new: u32| {
        format!(
            "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    mov.u32 %r1, {new};
    mov.u32 %r2, {old};
    st.shared.v4.u32 [%tile], {{%r1, %r1, %r1, %r1}};
    st.global.v4.u32 [%out], {{%r2, %r2, %r2, %r2}};
    fence.proxy.async;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%out], [%tile], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
DONE:
    ret;"
        )
    };
    let run = Run { out_bytes: 16, ..one_warp() };
    let pair = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
    let (a, b) = (f16::from_f32(1.0), f16::from_f32(0.0004));
    let (sum, tiny) = (f16::from_f64(1.0 + b.to_f64()), f16::from_bits(3));
    let twice = f16::from_bits(6);
    assert_eq!(
        run.words(&body("add.noftz.f16", pair(a.to_bits(), tiny.to_bits()), pair(b.to_bits(), tiny.to_bits()))),
        [pair(sum.to_bits(), twice.to_bits()); 4]
    );
    let (a, b) = (bf16::from_f32(3.0), bf16::from_f32(0.01));
    let sum = bf16::from_f64(3.0 + b.to_f64()).to_bits();
    assert_eq!(
        run.words(&body("add.noftz.bf16", pair(a.to_bits(), b.to_bits()), pair(b.to_bits(), a.to_bits()))),
        [pair(sum, sum); 4]
    );
    assert_eq!(
        run.words(&body("min.bf16", pair(a.to_bits(), b.to_bits()), pair(b.to_bits(), a.to_bits()))),
        [pair(b.to_bits(), b.to_bits()); 4]
    );
    assert_eq!(run.words(&body("max.f16", pair(1, 0x8001), pair(0x3c00, 0)))[0], pair(0x3c00, 0));
    assert_eq!(run.words(&body("add.f32", 1.5f32.to_bits(), 2.25f32.to_bits())), [3.75f32.to_bits(); 4]);
    let seven = words(&7u32.to_le_bytes());
    assert_eq!(run.words(&body("or.b32", 3, 4))[..1], seven[..]);
}
