//! "Data Movement and Conversion Instructions": ld, st, cvta, with every width, space and cache operator.

use ptx_emulator::Module;

use crate::harness::{Case, Random, run};

fn kernel(text: &str) -> Module {
    let text = format!(
        ".shared .align 16 .b8 tile[4096]; .local .align 16 .b8 depot[64]; mov.u32 %r7, tile; mov.u64 %l7, depot; shl.b32 %r6, %t, 5; add.u32 %r7, %r7, %r6; {text}"
    );
    let module =
        Module::parse(&Case::new(&text, "", [64; 4], |_| 0).kernel()).unwrap_or_else(|error| panic!("{text}: {error}"));
    if let Some(error) = module.kernel_error("k") {
        panic!("{text}: {error}");
    }
    module
}

fn check(text: &str, expect: impl Fn([u64; 3]) -> u64) {
    let mut random = Random(text.len() as u64 | 1);
    let inputs: Vec<[u64; 3]> = (0..32).map(|_| std::array::from_fn(|_| random.next())).collect();
    let found = run(&kernel(text), &inputs).unwrap_or_else(|report| panic!("{text}: {report}"));
    for (inputs, found) in inputs.iter().zip(found) {
        assert_eq!(found, expect(*inputs), "{text} of {inputs:x?}");
    }
}

const CACHES: [&str; 14] = [
    "",
    ".ca",
    ".cg",
    ".cs",
    ".lu",
    ".cv",
    ".L1::evict_normal",
    ".L1::evict_unchanged",
    ".L1::evict_first",
    ".L1::evict_last",
    ".L1::no_allocate",
    ".L2::64B",
    ".L2::128B",
    ".L2::256B",
];

#[test]
fn loads_of_every_type_extend() {
    for (ty, bits, signed) in [
        ("b8", 8, false),
        ("u8", 8, false),
        ("s8", 8, true),
        ("b16", 16, false),
        ("u16", 16, false),
        ("s16", 16, true),
        ("b32", 32, false),
        ("u32", 32, false),
        ("s32", 32, true),
        ("f32", 32, false),
        ("b64", 64, false),
        ("u64", 64, false),
        ("s64", 64, true),
        ("f64", 64, false),
        ("f16", 16, false),
        ("bf16", 16, false),
        ("f16x2", 32, false),
        ("bf16x2", 32, false),
    ] {
        let expect = move |[a, ..]: [u64; 3]| {
            if signed { crate::harness::signed(a, bits) as u64 } else { a & crate::harness::mask(bits) }
        };
        for space in ["", ".global"] {
            for cache in CACHES {
                check(&format!("ld{space}{cache}.{ty} %d, [%in];"), expect);
                if matches!(cache, "" | ".L1::no_allocate" | ".L2::128B") && space == ".global" {
                    check(&format!("ld{space}.nc{cache}.{ty} %d, [%in];"), expect);
                }
            }
            for order in [
                "weak",
                "volatile",
                "relaxed.cta",
                "relaxed.gpu",
                "relaxed.cluster",
                "relaxed.sys",
                "acquire.cta",
                "acquire.gpu",
                "acquire.cluster",
                "acquire.sys",
            ] {
                check(&format!("ld.{order}{space}.{ty} %d, [%in];"), expect);
            }
        }
        check(&format!("ldu.global.{ty} %d, [%in];"), expect);
        check(&format!("st.shared.b64 [%r7], %a; ld.shared.{ty} %d, [%r7];"), expect);
        check(&format!("st.shared::cta.b64 [%r7], %a; ld.shared::cta.{ty} %d, [%r7];"), expect);
        check(&format!("st.local.b64 [%l7], %a; ld.local.{ty} %d, [%l7];"), expect);
        check(&format!("st.local.b64 [depot+8], %a; ld.local.{ty} %d, [depot+8];"), expect);
        check(&format!("{{ .param .b64 x; st.param.b64 [x], %a; ld.param.{ty} %d, [x]; }}"), expect);
        // Stores write as many bytes as their type has.
        let kept = move |[a, b, _]: [u64; 3]| {
            let mask = crate::harness::mask(bits);
            (b & !mask) | (a & mask)
        };
        check(&format!("st.shared.b64 [%r7], %b; st.shared.{ty} [%r7], %a; ld.shared.b64 %d, [%r7];"), kept);
        for cache in ["", ".wb", ".cg", ".cs", ".wt", ".L1::no_allocate"] {
            check(
                &format!("st.global.b64 [%out], %b; st.global{cache}.{ty} [%out], %a; ld.global.b64 %d, [%out];"),
                kept,
            );
        }
        for order in [
            "weak",
            "volatile",
            "relaxed.cta",
            "relaxed.gpu",
            "relaxed.cluster",
            "relaxed.sys",
            "release.cta",
            "release.gpu",
            "release.cluster",
            "release.sys",
        ] {
            check(
                &format!("st.global.b64 [%out], %b; st.{order}.global.{ty} [%out], %a; ld.global.b64 %d, [%out];"),
                kept,
            );
        }
    }
}

#[test]
fn vectors() {
    for (ty, width) in [
        ("b8", 8u32),
        ("u8", 8),
        ("b16", 16),
        ("u16", 16),
        ("b32", 32),
        ("f32", 32),
        ("u32", 32),
        ("b64", 64),
        ("f64", 64),
    ] {
        let mask = crate::harness::mask(width);
        check(
            &format!(
                "st.shared.v2.b64 [%r7], {{%a, %b}}; ld.shared.v2.{ty} {{%l1, %l2}}, [%r7]; sub.u64 %d, %l1, %l2;"
            ),
            move |[a, b, _]| {
                let second = if width == 64 { b } else { a >> width & mask };
                (a & mask).wrapping_sub(second)
            },
        );
        if width <= 32 {
            check(
                &format!(
                    "st.shared.v2.b64 [%r7], {{%a, %b}}; ld.shared.v4.{ty} {{_, %l1, %l2, %l3}}, [%r7]; sub.u64 %d, %l1, %l3;"
                ),
                move |[a, b, _]| {
                    let both = u128::from(b) << 64 | u128::from(a);
                    ((both >> width) as u64 & mask).wrapping_sub((both >> (3 * width)) as u64 & mask)
                },
            );
        }
    }
    check("st.local.v2.b32 [%l7], {%a, %b}; ld.local.b64 %d, [%l7];", |[a, b, _]| a & 0xffff_ffff | b << 32);
}

/// "cvta" and generic addresses; "L2::cache_hint" takes an operand that changes nothing.
#[test]
fn addresses() {
    for space in ["shared", "local", "global", "const"] {
        let base = match space {
            "shared" => "cvt.u64.u32 %l1, %r7;",
            "local" => "mov.u64 %l1, %l7;",
            _ => "mov.u64 %l1, %out;",
        };
        check(&format!("{base} cvta.{space}.u64 %l2, %l1; cvta.to.{space}.u64 %l3, %l2; sub.u64 %d, %l3, %l1;"), |_| 0);
        if space != "const" {
            check(&format!("{base} cvta.{space}.u64 %l2, %l1; st.b64 [%l2], %a; ld.b64 %d, [%l2];"), |[a, ..]| a);
        }
    }
    check("ld.global.L2::cache_hint.b64 %d, [%in], %b;", |[a, ..]| a);
    check("ld.global.L1::evict_last.L2::evict_last.L2::cache_hint.b64 %d, [%in], %b;", |[a, ..]| a);
    check("st.global.L2::cache_hint.b64 [%out], %a, %b; ld.global.b64 %d, [%out];", |[a, ..]| a);
    check("mov.b64 %l1, %in; ld.global.b64 %d, [%l1+8];", |[_, b, _]| b);
    check("add.u64 %l1, %in, 16; ld.global.b64 %d, [%l1+-8];", |[_, b, _]| b);
}
