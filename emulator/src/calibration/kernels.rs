//! The kernels themselves.

use super::{Case, Input, MapSpec};
use crate::Swizzle;

/// Builds the text of a case: `%t` is the thread, `tile` 16 KiB of shared memory at a multiple of 1024, `%i0`… the thread's
/// words of input, `%o0`… its words of output.
struct Body {
    reads: usize,
    writes: usize,
    text: String,
}

impl Body {
    fn case(self, name: &str, arch: u32, threads: u32, input: Input) -> Case {
        self.case_with_map(name, arch, (threads, input), None)
    }

    fn case_with_map(self, name: &str, arch: u32, (threads, input): (u32, Input), map: Option<MapSpec>) -> Case {
        let third = if map.is_some() { ", .param .align 64 .b8 map[128]" } else { "" };
        let Body { reads, writes, text } = self;
        let loads: String = (0..reads).map(|i| format!("    ld.global.b32 %i{i}, [%in+{}];\n", 4 * i)).collect();
        let stores: String = (0..writes).map(|i| format!("    st.global.b32 [%out+{}], %o{i};\n", 4 * i)).collect();
        let (exact, target) = if arch == 90 { (true, "sm_90a".to_owned()) } else { (false, format!("sm_{arch}")) };
        let version = match arch {
            90 => "8.0",
            80 => "7.8",
            _ => "7.0",
        };
        let ptx = format!(
            ".version {version}\n.target {target}\n.address_size 64\n.shared .align 1024 .b8 tile[16384];\n\
             .visible .entry k(.param .u64 in, .param .u64 out{third})\n{{\n    .reg .pred %p<8>;\n    .reg .b16 %h<16>;\n    \
             .reg .b32 %t, %s, %i<{reads}>, %o<{writes}>, %r<64>;\n    .reg .f32 %f<160>;\n    .reg .b64 %in, %out, %rd<8>;\n    \
             ld.param.u64 %in, [in];\n    ld.param.u64 %out, [out];\n    mov.u32 %t, %tid.x;\n    mov.u32 %s, tile;\n    \
             mul.wide.u32 %rd0, %t, {};\n    add.s64 %in, %in, %rd0;\n    mul.wide.u32 %rd0, %t, {};\n    \
             add.s64 %out, %out, %rd0;\n{loads}{text}{stores}    ret;\n}}\n",
            4 * reads,
            4 * writes
        );
        Case {
            name: name.to_owned(),
            arch,
            exact_arch: exact,
            ptx,
            threads,
            input_words: reads * threads as usize,
            output_words: writes * threads as usize,
            input,
            map,
        }
    }
}

fn body(reads: usize, writes: usize, text: impl Into<String>) -> Body {
    Body { reads, writes, text: text.into() }
}

fn list(prefix: &str, range: std::ops::Range<usize>) -> String {
    let items: Vec<String> = range.map(|i| format!("%{prefix}{i}")).collect();
    items.join(", ")
}

/// mma.sync, with sums that are exact in any order.
fn products(cases: &mut Vec<Case>) {
    for (ty, input) in [("f16", Input::SmallF16), ("bf16", Input::SmallBf16)] {
        for (k, a, b) in [(8, 2, 1), (16, 4, 2)] {
            // f16 m16n8k8 came with sm_75, everything else with sm_80.
            let arch = if (ty, k) == ("f16", 8) { 75 } else { 80 };
            let zero: String = (0..4).map(|i| format!("    mov.f32 %f{i}, 0f3F800000;\n")).collect();
            let text = format!(
                "{zero}    mma.sync.aligned.m16n8k{k}.row.col.f32.{ty}.{ty}.f32 {{{d}}}, {{{a}}}, {{{b}}}, {{{d}}};\n{moves}",
                d = list("f", 0..4),
                a = list("i", 0..a),
                b = list("i", a..a + b),
                moves = (0..4).map(|i| format!("    mov.b32 %o{i}, %f{i};\n")).collect::<String>(),
            );
            cases.push(body(a + b, 4, text).case(&format!("mma.m16n8k{k}.{ty}"), arch, 32, input));
            if ty == "f16" {
                let text = format!(
                    "    mov.b32 %r0, 0x3c003c00;\n    mma.sync.aligned.m16n8k{k}.row.col.f16.f16.f16.f16 {{%o0, %o1}}, {{{a}}}, \
                     {{{b}}}, {{%r0, %r0}};\n",
                    a = list("i", 0..a),
                    b = list("i", a..a + b),
                );
                cases.push(body(a + b, 2, text).case(&format!("mma.m16n8k{k}.f16.f16"), arch, 32, input));
            }
        }
    }
}

/// ldmatrix: every thread fills 16 bytes of shared memory, then reads rows in another order.
fn matrices(cases: &mut Vec<Case>) {
    for count in [1usize, 2, 4] {
        for trans in ["", ".trans"] {
            let text = format!(
                "    shl.b32 %r0, %t, 4;\n    add.s32 %r0, %r0, %s;\n    st.shared.v4.b32 [%r0], {{%i0, %i1, %i2, %i3}};\n    \
                 bar.sync 0;\n    xor.b32 %r1, %t, 5;\n    shl.b32 %r1, %r1, 4;\n    add.s32 %r1, %r1, %s;\n    \
                 ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{}}}, [%r1];\n",
                list("o", 0..count)
            );
            cases.push(body(4, count, text).case(&format!("ldmatrix.x{count}{trans}"), 75, 32, Input::Bits));
        }
    }
}

/// cp.async of every size, with every number of valid bytes that can differ.
fn copies(cases: &mut Vec<Case>) {
    for (bytes, cache, valid) in [
        (4, "ca", 0),
        (4, "ca", 3),
        (8, "ca", 5),
        (8, "ca", 8),
        (16, "ca", 16),
        (16, "cg", 1),
        (16, "cg", 10),
        (16, "cg", 16),
    ] {
        let text = format!(
            "    shl.b32 %r0, %t, 4;\n    add.s32 %r0, %r0, %s;\n    st.shared.v4.b32 [%r0], {{%t, %t, %t, %t}};\n    \
             bar.sync 0;\n    cp.async.{cache}.shared.global [%r0], [%in], {bytes}, {valid};\n    cp.async.commit_group;\n    \
             cp.async.wait_group 0;\n    ld.shared.v4.b32 {{%o0, %o1, %o2, %o3}}, [%r0];\n"
        );
        cases.push(body(4, 4, text).case(&format!("cp.async.{cache}.{bytes}.{valid}"), 80, 32, Input::Bits));
    }
}

/// Conversions and arithmetic whose rounding the emulator computes itself.
fn arithmetic(cases: &mut Vec<Case>) {
    let unary = |name: &str, arch, text: &str| body(1, 1, text).case(name, arch, 256, Input::F32);
    for (ty, arch) in [("f16", 75), ("bf16", 80)] {
        cases.push(unary(
            &format!("cvt.rn.{ty}.f32"),
            arch,
            &format!("    mov.b32 %f0, %i0;\n    cvt.rn.{ty}.f32 %h0, %f0;\n    cvt.u32.u16 %o0, %h0;\n"),
        ));
    }
    for ty in ["f16x2", "bf16x2"] {
        let text = format!("    mov.b32 %f0, %i0;\n    mov.b32 %f1, %i1;\n    cvt.rn.{ty}.f32 %o0, %f0, %f1;\n");
        cases.push(body(2, 1, text).case(&format!("cvt.rn.{ty}.f32"), 80, 256, Input::F32));
    }
    for (name, arch) in [
        ("fma.rn.f16x2", 75),
        ("fma.rn.bf16x2", 80),
        ("add.f16x2", 75),
        ("mul.f16x2", 75),
        ("min.f16x2", 80),
        ("max.NaN.bf16x2", 80),
    ] {
        let operands = if name.starts_with("fma") { "%i0, %i1, %i2" } else { "%i0, %i1" };
        cases.push(body(3, 1, format!("    {name} %o0, {operands};\n")).case(name, arch, 256, Input::Bits));
    }
    for name in ["add.f32", "mul.f32", "div.rn.f32", "min.f32", "max.f32", "max.NaN.f32"] {
        let text =
            format!("    mov.b32 %f0, %i0;\n    mov.b32 %f1, %i1;\n    {name} %f2, %f0, %f1;\n    mov.b32 %o0, %f2;\n");
        let arch = if name.contains("NaN") { 80 } else { 75 };
        cases.push(body(2, 1, text).case(name, arch, 256, Input::F32));
    }
    let text = "    mov.b32 %f0, %i0;\n    mov.b32 %f1, %i1;\n    mov.b32 %f2, %i2;\n    fma.rn.f32 %f3, %f0, %f1, %f2;\n    \
                mov.b32 %o0, %f3;\n";
    cases.push(body(3, 1, text).case("fma.rn.f32", 75, 256, Input::F32));
    for name in ["cvt.rni.s32.f32", "cvt.rzi.u32.f32", "cvt.rmi.s32.f32", "cvt.rpi.s32.f32"] {
        let text = format!("    mov.b32 %f0, %i0;\n    {name} %o0, %f0;\n");
        cases.push(body(1, 1, text).case(name, 75, 256, Input::F32));
    }
    for (name, operands) in [
        ("prmt.b32", "%i0, %i1, %i2"),
        ("lop3.b32", "%i0, %i1, %i2, 0x1e"),
        ("bfe.u32", "%i0, %i1, %i2"),
        ("bfe.s32", "%i0, %i1, %i2"),
        ("bfi.b32", "%i0, %i1, %i2, %i3"),
        ("shf.l.wrap.b32", "%i0, %i1, %i2"),
        ("shf.r.clamp.b32", "%i0, %i1, %i2"),
        ("shl.b32", "%i0, %i1"),
        ("shr.s32", "%i0, %i1"),
        ("bfind.u32", "%i0"),
        ("mul.hi.s32", "%i0, %i1"),
    ] {
        cases.push(body(4, 1, format!("    {name} %o0, {operands};\n")).case(name, 75, 256, Input::Bits));
    }
}

/// Shuffles and votes.
fn warps(cases: &mut Vec<Case>) {
    for (mode, lanes, clamp) in [
        ("up", 3, 0),
        ("down", 5, 31),
        ("bfly", 9, 31),
        ("idx", 7, 31),
        ("idx", 3, 0x181f),
        ("down", 2, 0x181f),
        ("up", 1, 0x1800),
    ] {
        let text =
            format!("    shfl.sync.{mode}.b32 %o0|%p0, %i0, {lanes}, {clamp}, -1;\n    selp.u32 %o1, 1, 0, %p0;\n");
        cases.push(body(1, 2, text).case(&format!("shfl.{mode}.{lanes}.{clamp:#x}"), 75, 64, Input::Bits));
    }
    for name in ["redux.sync.add.s32", "redux.sync.min.s32", "redux.sync.max.u32", "redux.sync.xor.b32"] {
        cases.push(body(1, 1, format!("    {name} %o0, %i0, -1;\n")).case(name, 80, 64, Input::Bits));
    }
    let text =
        "    and.b32 %r0, %i0, 7;\n    match.any.sync.b32 %o0, %r0, -1;\n    match.all.sync.b32 %o1|%p0, %r0, -1;\n";
    cases.push(body(1, 2, text).case("match", 75, 64, Input::Bits));
    let text = "    and.b32 %r0, %i0, 1;\n    setp.ne.u32 %p0, %r0, 0;\n    vote.sync.ballot.b32 %o0, %p0, -1;\n    \
                vote.sync.any.pred %p1, %p0, -1;\n    selp.u32 %o1, 1, 0, %p1;\n";
    cases.push(body(1, 2, text).case("vote", 75, 64, Input::Bits));
}

/// wgmma of every layout of its operands in shared memory, and with A in registers. Small integers: exact in any order.
fn warpgroups(cases: &mut Vec<Case>) {
    // Descriptor bits above the start address: LBO, SBO and swizzle mode; see `layout`.
    let fields = |lbo: u64, sbo: u64, mode: u64| (lbo >> 4) << 16 | (sbo >> 4) << 32 | mode << 62;
    let layouts = [
        ("k.none", fields(128, 256, 0), 0),
        ("k.32b", fields(16, 256, 3), 0),
        ("k.64b", fields(16, 512, 2), 0),
        ("k.128b", fields(16, 1024, 1), 0),
        ("mn.none", fields(128, 256, 0), 1),
        ("mn.128b", fields(16, 1024, 1), 1),
    ];
    let fill: String = (0..32).map(|i| format!("    st.shared.b32 [%r0+{}], %i{i};\n", 512 * i)).collect();
    let moves: String = (0..32).map(|i| format!("    mov.b32 %o{i}, %f{i};\n")).collect();
    let zero: String = (0..32).map(|i| format!("    mov.f32 %f{i}, 0f3F800000;\n")).collect();
    for (ty, input) in [("f16", Input::SmallF16), ("bf16", Input::SmallBf16)] {
        for (name, bits, trans) in layouts {
            for registers in [false, true] {
                if registers && trans == 1 {
                    continue;
                }
                let a = if registers { format!("{{{}}}", list("i", 0..4)) } else { "%rd2".to_owned() };
                let trans_a = if registers { String::new() } else { format!(", {trans}") };
                let text = format!(
                    "    shl.b32 %r0, %t, 2;\n    add.s32 %r0, %r0, %s;\n{fill}    fence.proxy.async;\n    bar.sync 0;\n    \
                     cvt.u64.u32 %rd1, %s;\n    shr.u64 %rd1, %rd1, 4;\n    or.b64 %rd2, %rd1, {bits};\n    \
                     add.s64 %rd3, %rd2, 512;\n{zero}    wgmma.fence.sync.aligned;\n    \
                     wgmma.mma_async.sync.aligned.m64n64k16.f32.{ty}.{ty} {{{d}}}, {a}, %rd3, 1, 1, 1{trans_a}, {trans};\n    \
                     wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 0;\n{moves}",
                    d = list("f", 0..32),
                );
                let from = if registers { ".registers" } else { "" };
                cases.push(body(32, 32, text).case(&format!("wgmma.n64.{ty}.{name}{from}"), 90, 128, input));
            }
        }
    }
    for trans in ["", ".trans"] {
        let text = format!(
            "    xor.b32 %r1, %t, 3;\n    shl.b32 %r1, %r1, 4;\n    add.s32 %r1, %r1, %s;\n    \
             stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1], {{%i0, %i1, %i2, %i3}};\n    bar.sync 0;\n    \
             shl.b32 %r0, %t, 4;\n    add.s32 %r0, %r0, %s;\n    ld.shared.v4.b32 {{%o0, %o1, %o2, %o3}}, [%r0];\n"
        );
        cases.push(body(4, 4, text).case(&format!("stmatrix.x4{trans}"), 90, 32, Input::Bits));
    }
}

/// Tiles through tensor maps: 1024 bytes of 16-bit elements, inside the tensor and across its edges; and what an mbarrier
/// says phase by phase.
fn tiles(cases: &mut Vec<Case>) {
    const WIDTH: u64 = 80;
    let shapes = [
        ("none", Swizzle::None, [64, 8]),
        ("32b", Swizzle::Bytes32, [16, 32]),
        ("64b", Swizzle::Bytes64, [32, 16]),
        ("128b", Swizzle::Bytes128, [64, 8]),
    ];
    let begin = "    mov.u64 %rd1, map;\n    cvta.param.u64 %rd1, %rd1;\n    setp.eq.u32 %p0, %t, 0;\n    add.s32 %r1, %s, 8192;\n";
    for (name, swizzle, boxes) in shapes {
        for (place, x, y) in [("inside", 8, 3), ("edges", -8, 36)] {
            let map = Some(MapSpec { on_output: false, dims: [WIDTH, 40], boxes, swizzle });
            let text = format!(
                "{begin}    @%p0 mbarrier.init.shared::cta.b64 [%r1], 1;\n    @%p0 fence.proxy.async;\n    bar.sync 0;\n    \
                 @!%p0 bra WAIT;\n    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 1024;\n    \
                 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%s], [%rd1, {{{x}, {y}}}], \
                 [%r1];\nWAIT:\n    mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;\n    @!%p1 bra WAIT;\n    \
                 bar.sync 0;\n    shl.b32 %r0, %t, 5;\n    add.s32 %r0, %r0, %s;\n    \
                 ld.shared.v4.b32 {{%o0, %o1, %o2, %o3}}, [%r0];\n    ld.shared.v4.b32 {{%o4, %o5, %o6, %o7}}, [%r0+16];\n"
            );
            let body = body(50, 8, text);
            cases.push(body.case_with_map(&format!("tensor.load.{name}.{place}"), 90, (32, Input::Bits), map));
            let map = Some(MapSpec { on_output: true, dims: [WIDTH, 40], boxes, swizzle });
            let fill: String = (0..8).map(|i| format!("    st.shared.b32 [%r0+{}], %i{i};\n", 128 * i)).collect();
            // The kernel's own stores rewrite what they read: the tile is stored last, after all of them.
            let text = format!(
                "{begin}    shl.b32 %r0, %t, 2;\n    add.s32 %r0, %r0, %s;\n{fill}    fence.proxy.async;\n    bar.sync 0;\n    \
                 @!%p0 bra DONE;\n    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd1, {{{x}, {y}}}], [%s];\n    \
                 cp.async.bulk.commit_group;\n    cp.async.bulk.wait_group 0;\nDONE:\n"
            );
            let mut case = self::body(8, 0, text).case_with_map(
                &format!("tensor.store.{name}.{place}"),
                90,
                (32, Input::Bits),
                map,
            );
            case.output_words = WIDTH as usize * 40 / 2;
            cases.push(case);
        }
    }
    let test = |i: usize, parity: u32| {
        format!("    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%s], {parity};\n    selp.u32 %o{i}, 1, 0, %p1;\n")
    };
    let arrive = "    mbarrier.arrive.shared::cta.b64 %rd1, [%s];\n";
    let text = format!(
        "    mbarrier.init.shared::cta.b64 [%s], 2;\n{}{}{arrive}{}{arrive}{}{}{arrive}    \
         mbarrier.pending_count.b64 %o5, %rd1;\n    mbarrier.arrive_drop.shared::cta.b64 %rd1, [%s];\n{}{arrive}{}    \
         mbarrier.inval.shared::cta.b64 [%s];\n",
        test(0, 0),
        test(1, 1),
        test(2, 0),
        test(3, 0),
        test(4, 1),
        test(6, 1),
        test(7, 0)
    );
    cases.push(body(1, 8, text).case("mbarrier.phases", 80, 1, Input::Bits));
}

/// Every case the emulator can run.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    products(&mut cases);
    matrices(&mut cases);
    copies(&mut cases);
    arithmetic(&mut cases);
    warps(&mut cases);
    warpgroups(&mut cases);
    tiles(&mut cases);
    cases
}
