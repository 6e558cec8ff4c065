//! The rules of `wgmma`: a kernel that breaks one is reported, with the rule and the line, for every seed; its twin never is.

#![allow(clippy::panic)] // helpers of tests fail as tests do

use ptx_emulator::{Checks, Launch, Memory, Module, Options, Report, Rule, Timing};

const SEEDS: u64 = 20;

/// A kernel `k` whose threads have filled 8 KiB of shared memory from `in`, each thread its own part.
fn module(body: &str) -> Module {
    let text = format!(
        "
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 tile[];
.visible .entry k(.param .u64 in, .param .u64 out)
{{
    .reg .pred %p<4>;
    .reg .b32 %t, %tile, %d<16>, %e<8>, %a<4>, %r<16>;
    .reg .b64 %in, %out, %da, %db, %rd<8>;
    ld.param.u64 %in, [in];
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    mov.u32 %tile, tile;
    mul.wide.u32 %rd1, %t, 64;
    add.s64 %in, %in, %rd1;
    add.s64 %out, %out, %rd1;
    shl.b32 %r1, %t, 6;
    add.s32 %r1, %r1, %tile;
    ld.global.v4.u32 {{%a0, %a1, %a2, %a3}}, [%in];
    shr.u32 %r2, %tile, 4;
    cvt.u64.u32 %rd2, %r2;
{body}
}}
"
    );
    Module::parse(&text).expect("the kernel parses")
}

fn run(module: &Module, threads: u32, seed: u64, copies: Timing) -> Result<(), Box<Report>> {
    run_with(module, threads, &Options { seed, copies, patience: 20_000, ..Options::default() })
}

fn run_with(module: &Module, threads: u32, options: &Options) -> Result<(), Box<Report>> {
    let mut memory = Memory::new();
    let input = memory.alloc("in", 64 * 256);
    let output = memory.alloc("out", 64 * 256);
    let ones: Vec<u8> = std::iter::repeat_n([0u8, 0x3c], 32 * 256).flatten().collect();
    memory.write(input, &ones).expect("in range");
    let params: Vec<u8> = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
    let launch = Launch {
        kernel: "k",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 1 << 14,
        params: &params,
    };
    module.launch(&mut memory, &launch, options).map(|_| ())
}

fn timing(seed: u64) -> Timing {
    [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3]
}

#[track_caller]
fn reports(broken: &str, threads: u32, rule: Rule, at: &str) {
    let module = module(broken);
    for seed in 1..=SEEDS {
        let report = run(&module, threads, seed, timing(seed)).expect_err("the kernel is broken");
        assert_eq!(report.rule, rule, "seed {seed}: {report}");
        let text = report.to_string();
        assert!(text.contains(at), "seed {seed}: expected `{at}` in: {text}");
    }
}

#[track_caller]
fn passes(correct: &str, threads: u32) {
    let module = module(correct);
    for seed in 1..=SEEDS {
        let report = run(&module, threads, seed, timing(seed)).err().map(|report| report.to_string());
        assert_eq!(report, None, "seed {seed}");
    }
}

/// `correct` passes; each `(old, new)` breaks it.
#[track_caller]
fn twins(correct: &str, broken: &[(&str, &str, Rule, &str)]) {
    passes(correct, 128);
    for (old, new, rule, at) in broken {
        assert!(correct.contains(old), "`{old}` is not in the kernel");
        reports(&correct.replacen(old, new, 1), 128, *rule, at);
    }
}

/// A is 64 x 16 (K-major, without swizzling, at 0), B 16 x 16 (the same, at 2048), twice multiplied; then new contents.
const TWICE: &str = "
    st.shared.v4.u32 [%r1], {%a0, %a1, %a2, %a3};
    st.shared.v4.u32 [%r1+16], {%a0, %a1, %a2, %a3};
    st.shared.v4.u32 [%r1+32], {%a0, %a1, %a2, %a3};
    st.shared.v4.u32 [%r1+48], {%a0, %a1, %a2, %a3};
    fence.proxy.async;
    bar.sync 0;
    add.s64 %da, %rd2, 0x0000001000080000;
    add.s64 %db, %rd2, 0x0000001000080080;
    mov.b32 %d0, 0;
    mov.b32 %d1, 0;
    mov.b32 %d2, 0;
    mov.b32 %d3, 0;
    mov.b32 %d4, 0;
    mov.b32 %d5, 0;
    mov.b32 %d6, 0;
    mov.b32 %d7, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, %da, %db, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, %da, %db, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 1;
    st.shared.u32 [%r1], %t;
    st.global.u32 [%out], %d0;
    ret;";

#[test]
fn shared_memory_is_not_overwritten_before_the_wait() {
    twins(
        TWICE,
        &[
            // The last group, or both, may still be reading when the stage is overwritten.
            (
                "wait_group.sync.aligned 0;\n    bar.sync 1;\n    st.shared.u32 [%r1], %t;\n",
                "wait_group.sync.aligned 1;\n    bar.sync 1;\n    st.shared.u32 [%r1], %t;\n    wgmma.wait_group.sync.aligned 0;\n",
                Rule::Race,
                "by wgmma",
            ),
            (
                "    wgmma.wait_group.sync.aligned 0;\n    bar.sync 1;\n    st.shared.u32 [%r1], %t;\n",
                "    bar.sync 1;\n    st.shared.u32 [%r1], %t;\n    wgmma.wait_group.sync.aligned 0;\n",
                Rule::Race,
                "by wgmma",
            ),
        ],
    );
    // A wait tells that the whole warpgroup's reads are done: one warp may release the stage for all.
    passes(&TWICE.replacen("    bar.sync 1;\n", "", 1), 128);
}

#[test]
fn operands_must_be_visible_to_the_async_proxy() {
    reports(&TWICE.replacen("    fence.proxy.async;\n", "", 1), 128, Rule::Race, "fence.proxy.async is missing");
    // One that comes before the last write, or that one warp executes for what only others have written.
    let early = TWICE.replacen("    fence.proxy.async;\n", "", 1).replacen(
        "    st.shared",
        "    fence.proxy.async;\n    st.shared",
        1,
    );
    reports(&early, 128, Rule::Race, "fence.proxy.async is missing");
    let one_warp =
        TWICE.replacen("    fence.proxy.async;", "    setp.lt.u32 %p1, %t, 32;\n    @%p1 fence.proxy.async;", 1);
    reports(&one_warp, 128, Rule::Race, "fence.proxy.async is missing");
    // The fence may stand after the barrier as well, in every thread.
    passes(&TWICE.replacen("fence.proxy.async;\n    bar.sync 0;", "bar.sync 0;\n    fence.proxy.async;", 1), 128);
    let unordered = TWICE.replacen("    bar.sync 0;\n", "", 1);
    for seed in 1..=SEEDS {
        let report = run(&module(&unordered), 128, seed, timing(seed)).expect_err("no barrier");
        assert!(matches!(report.rule, Rule::Race | Rule::Uninitialised), "{report}");
    }
}

/// Each warp writes its rows of A, as attention kernels do with what the softmax gives, and the warpgroup B, which is ordered
/// among all of its warps.
const OWN_ROWS: &str = "
    shl.b32 %r3, %t, 4;
    and.b32 %r3, %r3, 496;
    shr.u32 %r4, %t, 5;
    mad.lo.u32 %r3, %r4, 512, %r3;
    add.s32 %r3, %r3, %tile;
    setp.lt.u32 %p1, %t, 32;
    @%p1 st.shared.v4.u32 [%r3+2048], {%a0, %a1, %a2, %a3};
    fence.proxy.async;
    bar.sync 0;
    st.shared.v4.u32 [%r3], {%a0, %a1, %a2, %a3};
    fence.proxy.async;
    bar.warp.sync -1;
    add.s64 %da, %rd2, 0x0000001000080000;
    add.s64 %db, %rd2, 0x0000001000080080;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, %da, %db, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.shared.v4.u32 [%r3], {%a0, %a1, %a2, %a3};
    ret;";

#[test]
fn a_warp_may_write_its_own_rows_of_a() {
    // The rows of the next warp, or of the one before.
    let moved = "    xor.b32 %r5, %r3, 512;\n    st.shared.v4.u32 [%r5], {";
    let (own, whole) = ("    st.shared.v4.u32 [%r3], {", "    bar.warp.sync -1;\n    add");
    twins(
        OWN_ROWS,
        &[
            // The other lanes' writes, and their fences.
            ("    bar.warp.sync -1;\n", "", Rule::Race, "operand A of wgmma"),
            (
                "    fence.proxy.async;\n    bar.warp.sync",
                "    bar.warp.sync",
                Rule::Race,
                "fence.proxy.async is missing",
            ),
            (
                "    fence.proxy.async;\n    bar.warp.sync",
                "    setp.lt.u32 %p2, %r4, 3;\n    @%p2 fence.proxy.async;\n    bar.warp.sync",
                Rule::Race,
                "operand A of wgmma: read by wgmma of 16 bytes of shared memory at offset 1536",
            ),
            // B is for all of them.
            ("    bar.sync 0;\n", "    bar.warp.sync -1;\n", Rule::Race, "operand B of wgmma"),
            // Another factor, of which some rows are another warp's.
            ("0x0000001000080000;", "0x0000001000080010;", Rule::Race, "operand A of wgmma"),
            // A and B from the same place: what was read as A is still to be ordered as B.
            ("0x0000001000080080;", "0x0000001000080000;", Rule::Race, "operand B of wgmma"),
            ("0x0000001000080080;", "0x0000001000080020;", Rule::Race, "operand B of wgmma"),
        ],
    );
    reports(&OWN_ROWS.replacen(own, moved, 1), 128, Rule::Race, "operand A of wgmma");
    // With a barrier of the warpgroup either may be another warp's.
    let ordered = OWN_ROWS.replacen(whole, "    bar.sync 1;\n    add", 1);
    passes(&ordered, 128);
    passes(&ordered.replacen(own, moved, 1), 128);
    passes(&ordered.replacen("    bar.sync 0;\n", "    bar.warp.sync -1;\n", 1), 128);
    passes(&ordered.replacen("0x0000001000080080;", "0x0000001000080000;", 1), 128);
    // The same where rows of A are contiguous: each warp has two pieces of eight of them.
    let transposed = OWN_ROWS.replacen("0, 1, 1, 0, 0;", "0, 1, 1, 1, 0;", 1);
    passes(&transposed, 128);
    reports(&transposed.replacen(own, moved, 1), 128, Rule::Race, "operand A of wgmma");
}

/// What one warp has waited for before the operation that reads its rows, the others have not.
#[test]
fn an_operation_orders_nothing_between_warps() {
    let copied = OWN_ROWS
        .replacen(
            "    st.shared.v4.u32 [%r3], {%a0, %a1, %a2, %a3};\n    ret;",
            "    setp.eq.u32 %p3, %t, 32;\n    @%p3 st.shared.v4.u32 [%tile], {%a0, %a1, %a2, %a3};\n    ret;",
            1,
        )
        .replacen(
            "    add.s64 %da",
            "    setp.ge.u32 %p2, %t, 64;
    @%p2 bra MULTIPLY;
    bar.sync 2, 64;
    setp.eq.u32 %p2, %t, 0;
    @%p2 cp.async.bulk.global.shared::cta.bulk_group [%out], [%tile], 16;
    @%p2 cp.async.bulk.commit_group;
    @%p2 cp.async.bulk.wait_group 0;
    bar.warp.sync -1;
MULTIPLY:
    add.s64 %da",
            1,
        );
    reports(&copied, 128, Rule::Race, "after read of an asynchronous bulk operation");
    passes(&copied.replacen("    setp.eq.u32 %p3", "    bar.sync 1;\n    setp.eq.u32 %p3", 1), 128);
    passes(&copied.replacen("MULTIPLY:", "    bar.sync 2, 64;\nMULTIPLY:", 1), 128);
}

#[test]
fn accumulators_in_flight_are_not_touched() {
    let in_flight = |instruction: &str| {
        TWICE.replacen("    wgmma.wait_group", &format!("    {instruction}\n    wgmma.wait_group"), 1)
    };
    reports(&in_flight("mov.b32 %r5, %d7;"), 128, Rule::InFlight, "is read before wgmma.wait_group");
    reports(&in_flight("mov.b32 %d7, 0;"), 128, Rule::InFlight, "is written before wgmma.wait_group");
    reports(&in_flight("st.global.u32 [%out], %d3;"), 128, Rule::InFlight, "and cta 0,0,0 warp");
    // One group too many is allowed to be pending.
    let kept = TWICE.replacen("    st.shared.u32 [%r1], %t;\n", "", 1);
    twins(
        &kept,
        &[
            ("wait_group.sync.aligned 0", "wait_group.sync.aligned 1", Rule::InFlight, "`st.global.u32 [%out], %d0`"),
            ("    wgmma.wait_group.sync.aligned 0;\n", "", Rule::InFlight, "`st.global.u32 [%out], %d0`"),
        ],
    );
    // An operation that is not in a group is not waited for.
    let uncommitted = kept.replacen("    wgmma.commit_group.sync.aligned;\n    wgmma.wait", "    wgmma.wait", 1);
    reports(&uncommitted, 128, Rule::InFlight, "`st.global.u32 [%out], %d0`");
    let left = uncommitted.replacen("st.global.u32 [%out], %d0;", "", 1);
    reports(&left, 128, Rule::AsyncLeft, "1 wgmma operations were never waited for");
    // Another shape upon the same registers must wait.
    let other = in_flight(
        "wgmma.fence.sync.aligned;\n    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%d0, %d1, %d2, %d3}, %da, %db, 1, 1, 1, 0, 0;",
    );
    reports(&other, 128, Rule::InFlight, "another shape");
}

#[test]
fn registers_are_fenced() {
    twins(
        TWICE,
        &[
            ("    wgmma.fence.sync.aligned;\n", "", Rule::RegisterFence, "accumulator was written"),
            // As nvcc places it when nothing holds the initialisation back: the text of the ISA wants a fence after it.
            (
                "    mov.b32 %d7, 0;\n    wgmma.fence.sync.aligned;\n",
                "    wgmma.fence.sync.aligned;\n    mov.b32 %d7, 0;\n",
                Rule::RegisterFence,
                "`mov.b32 %d7, 0`",
            ),
            (
                "    wgmma.fence.sync.aligned;\n",
                "    wgmma.fence.sync.aligned;\n    mov.b32 %r5, %d1;\n",
                Rule::RegisterFence,
                "was read",
            ),
        ],
    );
    let again = |between: &str| {
        TWICE.replacen(
            "    bar.sync 1;",
            &format!(
                "    {between}
    wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}}, %da, %db, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    bar.sync 1;"
            ),
            1,
        )
    };
    // Operations of one shape follow each other without; one does no harm.
    let fence = "wgmma.commit_group.sync.aligned;\n    wgmma.fence.sync.aligned;\n    wgmma.mma_async";
    passes(&TWICE.replacen("wgmma.commit_group.sync.aligned;\n    wgmma.mma_async", fence, 1), 128);
    passes(&again(""), 128);
    passes(&again("mov.b32 %d5, 0;\n    wgmma.fence.sync.aligned;"), 128);
    reports(&again("mov.b32 %d5, 0;"), 128, Rule::RegisterFence, "`mov.b32 %d5, 0`");
    let narrow = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%d0, %d1, %d2, %d3}, %da, %db, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    wgmma.fence.sync.aligned;";
    passes(&again(&format!("wgmma.fence.sync.aligned;\n    {narrow}")), 128);
    reports(&again(narrow), 128, Rule::RegisterFence, "the accumulator was one of m64n16k16");
}

#[test]
fn a_in_registers_is_held_too() {
    let registers = TWICE
        .replacen("%d7}, %da,", "%d7}, {%a0, %a1, %a2, %a3},", 2)
        .replace("%db, 1, 1, 1, 0, 0;", "%db, 1, 1, 1, 0;");
    twins(
        &registers,
        &[
            (
                "    wgmma.wait_group",
                "    mov.b32 %a2, 0;\n    wgmma.wait_group",
                Rule::InFlight,
                "register of A is written",
            ),
            (
                "    wgmma.fence.sync.aligned;\n",
                "    wgmma.fence.sync.aligned;\n    mov.b32 %a3, 0;\n",
                Rule::RegisterFence,
                "a register of A was written",
            ),
        ],
    );
    passes(&registers.replacen("    wgmma.wait_group", "    mov.b32 %r5, %a2;\n    wgmma.wait_group", 1), 128);
}

#[test]
fn the_whole_warpgroup_takes_part() {
    // Three of four warps, with the fourth at the barrier or gone.
    let skip = |to: &str| {
        TWICE
            .replacen(
                "    wgmma.fence.sync.aligned;\n",
                &format!("    wgmma.fence.sync.aligned;\n    setp.ge.u32 %p1, %t, 96;\n    @%p1 bra {to};\n"),
                1,
            )
            .replacen("    bar.sync 1;\n", "MEET:\n    bar.sync 1;\n", 1)
            .replacen("    ret;", "DONE:\n    ret;", 1)
    };
    reports(&skip("MEET"), 128, Rule::Diverged, "`wgmma.mma_async");
    reports(&skip("DONE"), 128, Rule::Diverged, "`wgmma.mma_async");
    // Three warps are not a warpgroup.
    reports(TWICE, 96, Rule::Diverged, "not part of four whole warps");
    // Half a warp.
    let half = TWICE.replacen("    wgmma.mma", "    setp.lt.u32 %p1, %t, 16;\n    @%p1 wgmma.mma", 1);
    reports(&half, 128, Rule::Diverged, "the predicate lets only");
    // Different instructions, one for each half of the warpgroup.
    let different = TWICE.replacen(
        "    wgmma.mma",
        "    setp.lt.u32 %p1, %t, 64;
    @%p1 bra OTHER;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, %da, %db, 1, 1, 1, 0, 0;
OTHER:
    wgmma.mma",
        1,
    );
    reports(&different, 128, Rule::Diverged, "of the warpgroup are at the wgmma of PTX line");
    // One warp commits one group more.
    let commits = TWICE.replacen(
        "    wgmma.commit_group.sync.aligned;\n",
        "    setp.lt.u32 %p1, %t, 32;\n    @%p1 wgmma.commit_group.sync.aligned;\n",
        1,
    );
    reports(&commits, 128, Rule::Diverged, "the number of groups committed differs");
}

#[test]
fn descriptors_are_checked() {
    let a = "%rd2, 0x0000001000080000";
    // (descriptor of A relative to the tile, what is said)
    for (descriptor, said) in [
        ("0x0000001000084000", "reserved bits 0x4000"),
        ("0x0010001000080000", "reserved bits"),
        ("0x0002001000080000", "base offset 1"),
        // Swapped: the second piece along K lies where the third row of pieces does.
        ("0x0000000800100000", "overlap"),
        ("0x0000000000080000", "stride dimension byte offset 0"),
        // Swizzled by 128 bytes: rows of pieces must be 1024 bytes apart, and the start at a multiple of them.
        ("0x4000001000010000", "stride dimension byte offset 256, expected a multiple of the pattern's 1024"),
        ("0x4000004000010008", "starts at 0x480, 128 bytes into a pattern"),
        ("0x4000004000010007", "leave the row of 128 bytes"),
        ("0xc000001000010002", "starts at 0x420, 32 bytes into a pattern of 256"),
    ] {
        reports(&TWICE.replacen(a, &format!("%rd2, {descriptor}"), 1), 128, Rule::BadDescriptor, said);
    }
    // Beyond the end: rows of pieces 128 KiB apart.
    reports(&TWICE.replacen(a, "%rd2, 0x0000200000080000", 1), 128, Rule::OutOfBounds, "operand A of wgmma");
    // Not the same in all lanes, or in all warps.
    let per_thread =
        TWICE.replacen("    wgmma.fence", "    cvt.u64.u32 %rd3, %t;\n    add.s64 %da, %da, %rd3;\n    wgmma.fence", 1);
    reports(&per_thread, 128, Rule::BadDescriptor, "the descriptor of A differs");
    let per_warp = per_thread.replacen("cvt.u64.u32 %rd3, %t;", "shr.u32 %r5, %t, 5;\n    cvt.u64.u32 %rd3, %r5;", 1);
    reports(&per_warp, 128, Rule::BadDescriptor, "in other warps of the warpgroup");
    // A matrix that nothing has written, eight rows of pieces beyond what was filled.
    let unwritten = TWICE.replacen(a, "%rd2, 0x0000001000080200", 1);
    reports(&unwritten, 128, Rule::Uninitialised, "operand A of wgmma");
    let checks = Checks { uninitialised: false, ..Checks::default() };
    run_with(&module(&unwritten), 128, &Options { checks, ..Options::default() }).expect("it is not asked for");
}

#[test]
fn what_does_not_exist_is_refused() {
    let line = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, %da, %db, 1, 1, 1, 0, 0;";
    for (old, new, said) in [
        ("m64n16k16", "m64n20k16", "not implemented"),
        ("m64n16k16", "m64n264k16", "not implemented"),
        ("m64n16k16", "m64n24k16", "8 accumulator registers of each thread, expected 12"),
        ("f32.f16.f16", "f32.f16.bf16", "not implemented"),
        ("f32.f16.f16", "f16.bf16.bf16", "not implemented"),
        ("1, 1, 1, 0, 0;", "1, 2, 1, 0, 0;", "imm-scale-a must be 1 or -1"),
        ("1, 1, 1, 0, 0;", "1, 1, 1, 0, 2;", "imm-trans-b must be 0 or 1"),
        ("1, 1, 1, 0, 0;", "1, 1, 1, 0;", "not implemented"),
        ("%d6, %d7}", "%d6, %d6}", "named twice"),
        ("%d6, %d7}", "%d6, %rd1}", "expected registers of 32 bits"),
    ] {
        let module = module(&line.replacen(old, new, 1));
        let error = module.kernel_error("k").expect("refused").to_string();
        assert!(error.contains(said), "expected `{said}` in: {error}");
    }
}

/// Each synchronising instruction deleted in turn is noticed, or listed with the reason that it may go.
#[test]
fn removed_synchronisation_is_noticed() {
    let redundant = [
        // The second group then holds both operations.
        "wgmma.commit_group.sync.aligned;#1",
        // What one warp has waited for, the whole warpgroup has read.
        "bar.sync 1;#1",
    ];
    let is_one = |line: &str| {
        ["bar.", "fence.", "wgmma.fence", "wgmma.commit", "wgmma.wait"].iter().any(|start| line.starts_with(start))
    };
    let lines: Vec<&str> = TWICE.lines().collect();
    let mut noticed = 0;
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| is_one(line.trim())) {
        let number = lines[..=at].iter().filter(|other| *other == line).count();
        let name = format!("{}#{number}", line.trim());
        let mut rest = lines.clone();
        rest.remove(at);
        let rest = rest.join("\n");
        if redundant.contains(&name.as_str()) {
            passes(&rest, 128);
            continue;
        }
        let module = module(&rest);
        for seed in 1..=SEEDS {
            assert!(run(&module, 128, seed, timing(seed)).is_err(), "seed {seed} without `{name}`");
        }
        noticed += 1;
    }
    assert_eq!(noticed, 5);
}
