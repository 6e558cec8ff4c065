//! Patterns that kernels in use rely on, each with what breaks it.

mod support;

use ptx_emulator::{Launch, Memory, Module, Options, Rule};
use support::*;

/// A warp reads its rows with `ldmatrix` and stores others in their place, without `bar.warp.sync`: all lanes have read before
/// any of them goes on (epilogues that put the result where an operand was).
const IN_PLACE: &str = "
    mad.lo.u32 %r1, %t, 16, %tile;
    st.shared.v4.u32 [%r1], {%t, %t, %t, %t};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];
    stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%r1], {%r2, %r3, %r4, %r5};
    bar.warp.sync -1;
    ld.shared.u32 %r6, [%r1+4];
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %rd1, %out, %rd1;
    st.global.u32 [%rd1], %r6;
    ret;";

#[test]
fn stmatrix_where_ldmatrix_has_read() {
    let read = "ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];";
    let store = "stmatrix.sync.aligned.x4.trans.m8n8.shared.b16 [%r1], {%r2, %r3, %r4, %r5};";
    one_warp().passes(IN_PLACE);
    // By plain stores and by copies of another lane's row.
    one_warp()
        .passes(&IN_PLACE.replace(store, "xor.b32 %r7, %r1, 64;\n st.shared.v4.u32 [%r7], {%r2, %r3, %r4, %r5};"));
    let copies = "and.b32 %r7, %t, 31;\n xor.b32 %r7, %r7, 4;\n mad.lo.u32 %r7, %r7, 16, %tile;
        cp.async.cg.shared.global [%r7], [%in], 16;\n cp.async.wait_all;";
    one_warp().passes(&IN_PLACE.replace(store, copies));
    // What lanes read for themselves is not ordered before what others write, nor what they wrote before what others read.
    one_warp().reports(
        &IN_PLACE.replace(store, &format!("xor.b32 %r8, %r1, 64;\n ld.shared.u32 %r7, [%r8+4];\n {store}")),
        &[Rule::Race],
        "stmatrix",
    );
    one_warp().reports(&IN_PLACE.replace(read, &format!("{store}\n {read}")), &[Rule::Race], "ldmatrix");
    // Another warp's rows.
    let two = IN_PLACE.replace("bar.warp.sync -1;\n    ldmatrix", "bar.sync 0;\n    ldmatrix");
    warps(2).passes(&two);
    let shifted = two.replace("    stmatrix", "    xor.b32 %r1, %r1, 512;\n    stmatrix");
    warps(2).reports(&shifted, &[Rule::Race], "stmatrix");
    // A copy that is under way when the rows are read.
    let early =
        IN_PLACE.replace(read, &format!("cp.async.cg.shared.global [%r1], [%in], 16;\n {read}\n cp.async.wait_all;"));
    one_warp().reports(&early, &[Rule::Race, Rule::Uninitialised], "cp.async");
}

/// Every lane of a warp issues the same copy.
const SAME: &str = "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%bar], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 4096;
READY:
    bar.sync 0;
    mov.b64 %rd1, %in;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%tile], [%rd1], 128, [%bar];
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
    mad.lo.u32 %r1, %t, 4, %tile;
    ld.shared.u32 %r2, [%r1];
    mul.wide.u32 %rd2, %t, 4;
    add.s64 %rd2, %out, %rd2;
    st.global.u32 [%rd2], %r2;
    ret;";

#[test]
fn copies_of_one_instruction_that_write_the_same() {
    let copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%tile], [%rd1], 128, [%bar];";
    let out = one_warp().passes(SAME);
    assert_eq!(out[..128], one_warp().input[..128]);
    // As of stores: other bytes, or another instruction.
    let differ = SAME.replace("mov.b64 %rd1, %in;", "mul.wide.u32 %rd1, %t, 16;\n add.s64 %rd1, %in, %rd1;");
    one_warp().reports(&differ, &[Rule::Race], "write of an asynchronous bulk operation");
    let twice = SAME.replace("], 4096", "], 8192").replace(copy, &format!("{copy}\n {copy}"));
    one_warp().reports(&twice, &[Rule::Race], "write of an asynchronous bulk operation");
    // Of less bytes than are copied, the phase ends before the last copy has landed.
    one_warp().reports(
        &SAME.replace("], 4096", "], 3968"),
        &[Rule::Race, Rule::MbarrierMisuse, Rule::Uninitialised, Rule::AsyncLeft],
        "",
    );
    // Out of shared memory to one place.
    let store = "
    mad.lo.u32 %r1, %t, 4, %tile;
    st.shared.u32 [%r1], %t;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    mov.u32 %r2, %tile;
    cp.async.bulk.global.shared::cta.bulk_group [%out], [%r2], 64;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    ret;";
    one_warp().passes(store);
    one_warp().reports(
        &store.replace("mov.u32 %r2, %tile", "and.b32 %r2, %t, 1;\n mad.lo.u32 %r2, %r2, 64, %tile"),
        &[Rule::Race],
        "bulk",
    );
}

/// Warp 0 issues `cp.async`, has an mbarrier told of it, and exits; warp 1 waits.
const PRODUCER_EXITS: &str = "
    setp.ne.u32 %p1, %t, 0;
    @!%p1 mbarrier.init.shared.b64 [%bar], 32;
    bar.sync 0;
    setp.ge.u32 %p1, %t, 32;
    @%p1 bra CONSUMER;
    mul.wide.u32 %rd1, %t, 16;
    add.s64 %rd1, %in, %rd1;
    mad.lo.u32 %r1, %t, 16, %tile;
    cp.async.cg.shared.global [%r1], [%rd1], 16;
    cp.async.mbarrier.arrive.noinc.shared.b64 [%bar];
    exit;
CONSUMER:
    mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;
    @!%p2 bra CONSUMER;
    sub.u32 %r2, 63, %t;
    mad.lo.u32 %r1, %r2, 16, %tile;
    ld.shared.u32 %r3, [%r1];
    mul.wide.u32 %rd1, %r2, 4;
    add.s64 %rd1, %out, %rd1;
    st.global.u32 [%rd1], %r3;
    ret;";

#[test]
fn a_producer_may_exit_when_others_wait() {
    let run = warps(2);
    let out = run.words(PRODUCER_EXITS);
    assert!((0..32).all(|i| out[i] == words(&run.input)[4 * i]));
    let arrive = "    cp.async.mbarrier.arrive.noinc.shared.b64 [%bar];\n";
    let plain = PRODUCER_EXITS.replace(arrive, "    mbarrier.arrive.shared.b64 _, [%bar];\n");
    run.reports(&plain, &[Rule::AsyncLeft, Rule::Race, Rule::Uninitialised], "cp.async.cg");
    let copy = "    cp.async.cg.shared.global [%r1], [%rd1], 16;\n";
    let late = PRODUCER_EXITS.replace(copy, "").replace(arrive, &format!("{arrive}{copy}"));
    run.reports(&late, &[Rule::AsyncLeft, Rule::Race, Rule::Uninitialised], "");
    // Nobody waits, and the CTA ends with the copies under way or unseen.
    let alone = PRODUCER_EXITS.replace("CONSUMER:\n", "CONSUMER:\n    ret;\n");
    run.reports_some(&alone, &[Rule::AsyncLeft]);
}

/// One lane of those that have waited ends the mbarrier (`cuda::pipeline`).
#[test]
fn an_mbarrier_ends_after_the_tests_of_the_warp() {
    let body = "
    setp.ne.u32 %p1, %t, 0;
    @!%p1 mbarrier.init.shared.b64 [%bar], 1;
    bar.sync 0;
    @!%p1 mbarrier.arrive.shared.b64 _, [%bar];
    setp.ge.u32 %p3, %t, 32;
    @%p3 bra DONE;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
    vote.sync.all.pred %p2, %p2, -1;
    @!%p1 mbarrier.inval.shared.b64 [%bar];
DONE:
    ret;";
    warps(2).passes(body);
    // By the other warp, which one lane has told.
    let told = body
        .replace("[%bar], 1;\n    bar", "[%bar], 1;\n    @!%p1 st.shared.u32 [%tile], 0;\n    bar")
        .replace(
            "    @!%p1 mbarrier.inval.shared.b64 [%bar];\n",
            "    @!%p1 st.release.cta.shared.u32 [%tile], 1;\n    bra OVER;\n",
        )
        .replace(
            "DONE:\n",
            "DONE:\n    setp.ne.u32 %p1, %t, 32;\n    @%p1 bra OVER;\n    ld.acquire.cta.shared.u32 %r1, [%tile];\n    \
             setp.eq.u32 %p2, %r1, 0;\n    @%p2 bra DONE;\n    mbarrier.inval.shared.b64 [%bar];\nOVER:\n",
        );
    warps(2).passes(&told);
    warps(2).reports(&told.replace("st.release.cta", "st.relaxed.cta"), &[Rule::Race], "mbarrier.inval");
    let other = body
        .replace("    @!%p1 mbarrier.inval.shared.b64 [%bar];\n", "")
        .replace("DONE:\n", "DONE:\n    setp.eq.u32 %p1, %t, 32;\n    @%p1 mbarrier.inval.shared.b64 [%bar];\n");
    warps(2).reports(&other, &[Rule::Race, Rule::MbarrierMisuse], "mbarrier");
}

/// One warp of a warpgroup waits for what never comes; the others wait for it.
#[test]
fn a_warpgroup_that_is_held_up_is_a_deadlock() {
    let body = "
    .reg .f32 %f<8>;
    setp.ne.u32 %p1, %t, 0;
    @!%p1 mbarrier.init.shared.b64 [%bar], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    setp.lt.u32 %p1, %t, 96;
    @%p1 bra MEET;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
MEET:
    mov.b64 %rd1, 0x0000001000080000;
    shr.u32 %r1, %tile, 4;
    cvt.u64.u32 %rd2, %r1;
    add.s64 %rd1, %rd1, %rd2;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd1, %rd1, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    ret;";
    warps(4).reports(body, &[Rule::Deadlock], "warp 3 lanes 0xffffffff waits for the mbarrier");
    warps(4).reports(body, &[Rule::Deadlock], "waits for the others of its warpgroup");
    for wait in [
        "mbarrier.test_wait.parity.shared.b64 %p2, [%bar], 0;",
        "nanosleep.u32 20;\n    mbarrier.test_wait.parity.shared.b64 %p2, [%bar], 0;",
        "mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0, 1000;\n    add.u32 %r9, %r9, 1;",
        "barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;\n    setp.eq.u32 %p2, 0, 0;",
    ] {
        let other = body.replace("mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;", wait);
        warps(4).reports(&other, &[Rule::Deadlock], "waits for the others of its warpgroup");
    }
    // Registers that nobody gives back, and a warpgroup that has all it asks for but its operands.
    let registers = "
    setp.ne.u32 %p1, %t, 0;
    @!%p1 mbarrier.init.shared.b64 [%bar], 1;
    bar.sync 0;
    setp.lt.u32 %p1, %t, 128;
    @%p1 bra WAIT;
    setmaxnreg.inc.sync.aligned.u32 240;
    mbarrier.arrive.shared.b64 _, [%bar];
    ret;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
    setmaxnreg.dec.sync.aligned.u32 24;
    ret;";
    let text = format!("{:?}", support::module(registers).kernel_error("k"));
    assert_eq!(text, "None");
    held_up(registers);
}

/// Two warpgroups with 168 registers per thread.
fn held_up(body: &str) {
    let module = support::module(body);
    for seed in 1..=SEEDS {
        let mut memory = Memory::new();
        let params = [0; 144];
        let launch =
            Launch { kernel: "k", grid: [1; 3], cluster: [1; 3], block: [384, 1, 1], shared_bytes: 0, params: &params };
        let options = Options { seed, registers: Some(168), patience: 20_000, ..Options::default() };
        let report = module.launch(&mut memory, &launch, &options).expect_err("nobody gives registers back");
        assert_eq!(report.rule, Rule::Deadlock, "{report}");
        assert!(report.to_string().contains("waits for 240 registers per thread"), "{report}");
    }
}

/// Both sides of a race with the functions that they are inlined in, as nvcc writes them with `-lineinfo`.
#[test]
fn reports_name_the_chain_of_inlining() {
    let text = "
.version 8.6
.target sm_90a
.address_size 64
.visible .entry k()
{
    .shared .align 4 .b8 tile[256];
    .reg .b32 %r<4>;
    .loc 1 30 3
    mov.u32 %r1, tile;
    .loc 1 20 5, function_name $L__info_string0, inlined_at 1 30 3
    .loc 2 7 9, function_name $L__info_string1, inlined_at 1 20 5
    st.shared.u32 [%r1], 1;
    .loc 1 30 4
    .loc 2 9 1, function_name $L__info_string1, inlined_at 1 30 4
    ld.shared.u32 %r2, [%r1];
    ret;
}
.file 1 \"/home/x/kernel.cu\"
.file 2 \"/home/x/tile.cuh\"
.section .debug_str
{
$L__info_string0:
.b8 95,90,53,111,117,116,101,114,80,102,49,83,0
$L__info_string1:
.b8 95,90,78,50,110,115,53,105,110,110,101,114,73,76,105,51,69,69,69,102,80,102,105,0
}
";
    let module = Module::parse(text).expect("parses");
    let launch = Launch { kernel: "k", grid: [1; 3], cluster: [1; 3], block: [32, 1, 1], shared_bytes: 0, params: &[] };
    let report = module.launch(&mut Memory::new(), &launch, &Options::default()).expect_err("a race").to_string();
    assert!(
        report.contains("(tile.cuh:7 in ns::inner inlined at kernel.cu:20 in outer inlined at kernel.cu:30)"),
        "{report}"
    );
    assert!(report.contains("(tile.cuh:9 in ns::inner inlined at kernel.cu:30)"), "{report}");
}
