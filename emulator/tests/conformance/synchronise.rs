//! "Parallel Synchronization and Communication Instructions": atom, red, fences; "Asynchronous Copy".

use ptx_emulator::Module;

use crate::harness::{Case, Random, mask, run, signed};
use half::{bf16, f16};

/// Result of `atom` and what is left in memory, of one lane.
fn check(text: &str, bits: u32, expect: impl Fn(u64, u64, u64) -> u64, floats: bool) {
    for space in ["global", "shared"] {
        let (address, setup) = match space {
            "global" => ("%out", String::new()),
            _ => ("%r7", ".shared .align 8 .b8 tile[256]; mov.u32 %r7, tile; mad.lo.u32 %r7, %t, 8, %r7;".to_owned()),
        };
        let text = text.replace("SPACE", space).replace("ADDRESS", address);
        // The old value is compared with %a where it is, so that one result tells both.
        let text = format!(
            "{setup} st.{space}.b{bits} [{address}], %a; {text} ld.{space}.b{bits} %d, [{address}]; \
             setp.eq.b{bits} %p1, %x1, %a; @!%p1 trap;"
        );
        let kernel = Case::new(&text, "", [bits; 4], |_| 0)
            .kernel()
            .replace(".reg .pred %p<8>;", &format!(".reg .pred %p<8>;\n.reg .b{bits} %x1;"));
        let module = Module::parse(&kernel).unwrap_or_else(|error| panic!("{text}: {error}"));
        let mut random = Random(text.len() as u64 | 1);
        let inputs: Vec<[u64; 3]> = (0..32)
            .map(|i| {
                let mut x: [u64; 3] = std::array::from_fn(|_| random.next() & mask(bits));
                // Equal ones, for cas, inc and dec.
                x[1] = if i % 3 == 0 { x[0] } else { x[1] };
                if floats { x.map(|x| x & 0x3f00_3f00_3f00_3f00 & mask(bits)) } else { x }
            })
            .collect();
        let found = run(&module, &inputs).unwrap_or_else(|report| panic!("{text}: {report}"));
        for ([a, b, c], found) in inputs.iter().zip(found) {
            assert_eq!(found, expect(*a, *b, *c) & mask(bits), "{text} of {a:#x} {b:#x} {c:#x}");
        }
    }
}

fn halves(a: u64, b: u64, bits: u32, add: impl Fn(u16, u16) -> u16) -> u64 {
    (0..bits / 16).fold(0, |d, i| d | u64::from(add((a >> (16 * i)) as u16, (b >> (16 * i)) as u16)) << (16 * i))
}

#[test]
fn atomics() {
    type F = fn(u64, u64, u64) -> u64;
    let f16s = |bits: u32| move |a, b, _| halves(a, b, bits, |a, b| (f16::from_bits(a) + f16::from_bits(b)).to_bits());
    let bf16s =
        |bits: u32| move |a, b, _| halves(a, b, bits, |a, b| (bf16::from_bits(a) + bf16::from_bits(b)).to_bits());
    for order in ["", ".relaxed.gpu", ".acquire.cta", ".release.sys", ".acq_rel.cluster", ".gpu", ".cta"] {
        let both = |op: &str, bits: u32, f: &dyn Fn(u64, u64, u64) -> u64, floats: bool| {
            check(&format!("atom{order}.SPACE.{op} %x1, [ADDRESS], %b;"), bits, f, floats);
            if !op.starts_with("exch") && !matches!(order, ".acquire.cta" | ".acq_rel.cluster") {
                check(&format!("mov.b{bits} %x1, %a; red{order}.SPACE.{op} [ADDRESS], %b;"), bits, f, floats);
            }
        };
        for (ty, bits) in [("u32", 32), ("s32", 32), ("u64", 64)] {
            both(&format!("add.{ty}"), bits, &|a, b, _| a.wrapping_add(b), false);
        }
        both(
            "add.f32",
            32,
            &|a, b, _| u64::from((f32::from_bits(a as u32) + f32::from_bits(b as u32)).to_bits()),
            true,
        );
        both("add.f64", 64, &|a, b, _| (f64::from_bits(a) + f64::from_bits(b)).to_bits(), true);
        both("add.noftz.f16", 16, &f16s(16), true);
        both("add.noftz.f16x2", 32, &f16s(32), true);
        both("add.noftz.bf16", 16, &bf16s(16), true);
        both("add.noftz.bf16x2", 32, &bf16s(32), true);
        for bits in [32u32, 64] {
            both(&format!("min.u{bits}"), bits, &|a, b, _| a.min(b), false);
            both(&format!("max.u{bits}"), bits, &|a, b, _| a.max(b), false);
            both(&format!("min.s{bits}"), bits, &move |a, b, _| signed(a, bits).min(signed(b, bits)) as u64, false);
            both(&format!("max.s{bits}"), bits, &move |a, b, _| signed(a, bits).max(signed(b, bits)) as u64, false);
            for (op, f) in [
                ("and", (|a, b, _| a & b) as F),
                ("or", |a, b, _| a | b),
                ("xor", |a, b, _| a ^ b),
                ("exch", |_, b, _| b),
            ] {
                both(&format!("{op}.b{bits}"), bits, &f, false);
            }
        }
        both("inc.u32", 32, &|a, b, _| if a >= b { 0 } else { a + 1 }, false);
        both("dec.u32", 32, &|a, b, _| if a == 0 || a > b { b } else { a - 1 }, false);
        for bits in [16, 32, 64] {
            let text = format!("atom{order}.SPACE.cas.b{bits} %x1, [ADDRESS], %b, %c;");
            check(&text, bits, |a, b, c| if a == b { c } else { a }, false);
        }
    }
    check("atom.SPACE.add.L2::cache_hint.u64 %x1, [ADDRESS], %b, %c;", 64, |a, b, _| a.wrapping_add(b), false);
}

#[test]
fn fences_and_barriers() {
    let mut text = String::new();
    for fence in ["membar.cta", "membar.gl", "membar.sys"] {
        text += &format!("{fence}; ");
    }
    for kind in ["acq_rel", "sc"] {
        for scope in ["cta", "cluster", "gpu", "sys"] {
            text += &format!("fence.{kind}.{scope}; ");
        }
    }
    for barrier in [
        "bar.sync 0",
        "bar.sync 1, 32",
        "barrier.sync 0",
        "barrier.sync.aligned 2",
        "bar.cta.sync 0",
        "barrier.cta.sync 0",
        "barrier.cta.sync.aligned 0",
        "bar.warp.sync -1",
    ] {
        text += &format!("{barrier}; ");
    }
    let case = Case::new(&format!("{text} mov.b64 %d, %a;"), "bar, membar", [64; 4], |[a, ..]| a);
    case.check().expect("passes");
}

/// "bar.arrive": the first warp goes on, the second waits for it.
#[test]
fn arriving_without_waiting() {
    for arrive in ["bar.arrive", "barrier.arrive", "barrier.arrive.aligned", "bar.cta.arrive", "barrier.cta.arrive"] {
        let text = format!(
            ".shared .align 8 .b8 tile[8]; setp.lt.u32 %p1, %t, 32; @!%p1 bra WAIT; setp.eq.u32 %p2, %t, 0; @%p2 st.shared.u32 [tile], 9; \
             {arrive} 1, 64; mov.u32 %d, 5; bra END; WAIT: bar.sync 1, 64; ld.shared.u32 %d, [tile]; END:"
        );
        let module = Module::parse(&Case::new(&text, "", [32; 4], |_| 0).kernel()).expect("parses");
        let found = run(&module, &[[0; 3]; 64]).unwrap_or_else(|report| panic!("{text}: {report}"));
        assert_eq!(found, [[5; 32], [9; 32]].concat(), "{arrive}");
    }
}

/// "shfl.sync", "vote.sync", "activemask" of a whole warp.
#[test]
fn across_the_warp() {
    let inputs: Vec<[u64; 3]> = (0..32).map(|i| [i * 3 % 7, i, 0]).collect();
    for (text, expect) in [
        ("shfl.sync.idx.b32 %d, %a, 5, 31, -1;", (|_| 15 % 7) as fn(u64) -> u64),
        ("shfl.sync.up.b32 %d, %b, 2, 0, -1;", |i| if i < 2 { i } else { i - 2 }),
        ("shfl.sync.down.b32 %d, %b, 3, 31, -1;", |i| if i > 28 { i } else { i + 3 }),
        ("shfl.sync.bfly.b32 %d|%p1, %b, 1, 31, -1;", |i| i ^ 1),
        ("setp.lt.u32 %p1, %b, 4; vote.sync.ballot.b32 %d, %p1, -1;", |_| 15),
        ("setp.lt.u32 %p1, %b, 4; vote.sync.any.pred %p2, %p1, -1; selp.u32 %d, 1, 0, %p2;", |_| 1),
        ("setp.lt.u32 %p1, %b, 4; vote.sync.all.pred %p2, !%p1, -1; selp.u32 %d, 1, 0, %p2;", |_| 0),
        ("setp.lt.u32 %p1, %b, 40; vote.sync.uni.pred %p2, %p1, -1; selp.u32 %d, 1, 0, %p2;", |_| 1),
        ("activemask.b32 %d;", |_| 0xffff_ffff),
    ] {
        let module = Module::parse(&Case::new(text, "", [32; 4], |_| 0).kernel()).expect("parses");
        let found = run(&module, &inputs).unwrap_or_else(|report| panic!("{text}: {report}"));
        for (i, found) in (0..).zip(found) {
            assert_eq!(found, expect(i), "{text}, lane {i}");
        }
    }
}

/// "cp.async": what the ignore-source form leaves out is 0.
#[test]
fn asynchronous_copies() {
    for (form, bytes, valid) in [
        ("ca.shared.global", 4, None),
        ("ca.shared.global", 8, None),
        ("ca.shared.global", 16, None),
        ("cg.shared.global", 16, None),
        ("cg.shared::cta.global.L2::128B", 16, Some(8)),
        ("ca.shared.global.L2::64B", 8, Some(0)),
        ("ca.shared.global.L2::256B", 16, Some(12)),
    ] {
        for wait in ["cp.async.wait_all;", "cp.async.commit_group; cp.async.wait_group 0;"] {
            let last = valid.map_or(String::new(), |valid| format!(", {valid}"));
            let text = format!(
                ".shared .align 16 .b8 tile[512]; mov.u32 %r7, tile; mad.lo.u32 %r7, %t, 16, %r7; st.shared.v2.b64 [%r7], {{-1, -1}}; \
                 mul.lo.u32 %r6, %t, 8; cvt.u64.u32 %l1, %r6; sub.u64 %l2, %in, %l1; \
                 cp.async.{form} [%r7], [%l2], {bytes}{last}; {wait} ld.shared.b64 %d, [%r7];"
            );
            let module = Module::parse(&Case::new(&text, "", [64; 4], |_| 0).kernel()).expect("parses");
            let inputs: Vec<[u64; 3]> = (1..33).map(|i| [i * 0x0101_0101_0101_0101, i + 7, i << 40]).collect();
            let found = run(&module, &inputs).unwrap_or_else(|report| panic!("{text}: {report}"));
            let flat: Vec<u64> = inputs.concat();
            for (i, found) in found.into_iter().enumerate() {
                let copied = flat[2 * i];
                let given = valid.unwrap_or(bytes).min(8);
                let kept = if given == 0 { 0 } else { copied & mask(8 * given) };
                // Beyond what is copied, what was there; beyond what is valid, 0.
                let expected = if bytes == 4 { kept | !mask(32) } else { kept };
                assert_eq!(found, expected, "{text}, lane {i}");
            }
        }
    }
}
