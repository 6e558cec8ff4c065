//! Each rule: a kernel that breaks it is reported, with the rule and the line, for every seed; its correct twin never is.

mod twins;

use ptx_emulator::{Device, Launch, Memory, Options, Rule};
use twins::*;

/// Every thread copies a word.
const COPY: &str = "
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %rd2, %in, %rd1;
    add.s64 %rd3, %out, %rd1;
    ld.global.u32 %r1, [%rd2];
    st.global.u32 [%rd3], %r1;
    ret;";

#[test]
fn accesses_stay_inside_allocations() {
    TWO_WARPS.twins(
        COPY,
        &[
            ("ld.global.u32 %r1, [%rd2]", "ld.global.u32 %r1, [%rd2+4092]", Rule::OutOfBounds, "`ld.global.u32"),
            ("st.global.u32 [%rd3]", "st.global.u32 [%rd3+-4]", Rule::OutOfBounds, "`st.global.u32"),
        ],
    );
    Run { bytes: (256, 255), ..TWO_WARPS }.reports(
        COPY,
        Rule::OutOfBounds,
        "`out` of 255 bytes begins 252 bytes before",
    );
}

#[test]
fn accesses_are_aligned() {
    ONE_WARP.reports(&COPY.replace("[%rd2]", "[%rd2+2]"), Rule::Misaligned, "`ld.global.u32 %r1, [%rd2+2]`");
    let vector = COPY.replace("st.global.u32 [%rd3], %r1", "st.global.v2.u32 [%rd3], {%r1, %r1}");
    ONE_WARP.reports(&vector, Rule::Misaligned, "lane 1");
}

#[test]
fn what_is_read_was_written() {
    ONE_WARP.reports(&COPY.replace("[%rd2]", "[%rd3]"), Rule::Uninitialised, "byte 0 of `out`");
    let shared = "
    shl.b32 %r1, %t, 2;
    mov.u32 %r2, tile;
    add.s32 %r1, %r1, %r2;
    st.shared.u32 [%r1], %t;
    ld.shared.u32 %r3, [%r1];
    ret;";
    ONE_WARP.twins(shared, &[("st.shared.u32 [%r1]", "st.shared.u16 [%r1]", Rule::Uninitialised, "`ld.shared.u32")]);
    ONE_WARP.reports(
        &shared.replace("ld.shared.u32 %r3, [%r1]", "ld.shared.u32 %r3, [%r1+1024]"),
        Rule::OutOfBounds,
        "ld.shared",
    );
    ONE_WARP.reports(&shared.replace("mov.u32 %r2, tile", "mov.u32 %r2, 0"), Rule::OutOfBounds, "st.shared");
}

/// Each warp reads what the other wrote to shared memory, twice.
const EXCHANGE: &str = "
    shl.b32 %r1, %t, 2;
    xor.b32 %r2, %r1, 128;
    mov.u32 %r3, tile;
    add.s32 %r1, %r1, %r3;
    add.s32 %r2, %r2, %r3;
    st.shared.u32 [%r1], %t;
    bar.sync 0;
    ld.shared.u32 %r4, [%r2];
    bar.sync 1;
    st.shared.u32 [%r1], %r4;
    ret;";

#[test]
fn shared_memory_is_ordered_by_barriers() {
    TWO_WARPS.passes(EXCHANGE);
    // Without the first, a read before the write (uninitialised) or a race; without the second, always a race.
    for seed in 1..=SEEDS {
        let report = TWO_WARPS.with_seed(&module(&EXCHANGE.replace("bar.sync 0;", "")), seed).expect_err("a race");
        assert!(matches!(report.rule, Rule::Race | Rule::Uninitialised), "{report}");
    }
    TWO_WARPS.reports(&EXCHANGE.replace("bar.sync 1;", ""), Rule::Race, "shared memory at offset");
    // Within a warp, the warp's own barrier is enough, and needed.
    let within = EXCHANGE.replace("xor.b32 %r2, %r1, 128", "xor.b32 %r2, %r1, 64");
    let within = within.replace("bar.sync 0;", "bar.warp.sync -1;").replace("bar.sync 1;", "bar.warp.sync 0xffffffff;");
    TWO_WARPS.twins(
        &within,
        &[
            ("bar.warp.sync -1;", "", Rule::Race, "by another lane of the warp"),
            ("bar.warp.sync 0xffffffff;", "", Rule::Race, "by another lane of the warp"),
        ],
    );
}

#[test]
fn barriers_are_used_as_they_must_be() {
    TWO_WARPS.reports(&EXCHANGE.replace("bar.sync 0", "bar.sync 16"), Rule::BarrierMisuse, "`bar.sync 16`");
    TWO_WARPS.reports(&EXCHANGE.replace("bar.sync 0", "bar.sync 0, 48"), Rule::BarrierMisuse, "48 threads");
    TWO_WARPS.twins(
        &EXCHANGE.replace("bar.sync 0", "bar.sync 0, 64"),
        &[("bar.sync 0, 64", "bar.sync 0, 96", Rule::Deadlock, "64 of 96 threads have reached")],
    );
    // Half a warp at a barrier, the other half at another.
    let split = "
    setp.lt.u32 %p1, %t, 16;
    @%p1 bra LOW;
    bar.sync 0;
    bra DONE;
LOW:
    bar.sync 0;
DONE:
    ret;";
    ONE_WARP.reports(split, Rule::Diverged, "bar.sync 0");
    ONE_WARP.reports("setp.lt.u32 %p1, %t, 16;\n @%p1 bar.sync 0;\n ret;", Rule::Diverged, "the predicate lets only");
    ONE_WARP.reports("setp.eq.u32 %p1, %t, 7;\n @%p1 brkpt;\n ret;", Rule::Trap, "@%p1 brkpt");
    ONE_WARP.reports("setp.lt.u32 %p1, %t, 16;\n @%p1 ret;\n mma_here:\n activemask.b32 %r1;\n shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;\n ret;", Rule::Diverged, "have exited");
}

/// One warp waits at a barrier that the other never reaches before it waits elsewhere.
#[test]
fn collectives_are_executed_by_the_lanes_of_their_mask() {
    // Each half of the warp names itself, at one instruction.
    let halves = "
    setp.lt.u32 %p1, %t, 16;
    selp.b32 %r3, 0xffff, 0xffff0000, %p1;
    shfl.sync.bfly.b32 %r2, %t, 1, 31, %r3;
    xor.b32 %r4, %t, 1;
    setp.ne.u32 %p2, %r2, %r4;
    @%p2 trap;
    ret;";
    ONE_WARP.passes(halves);
    // One half names all lanes, the other itself.
    let disagree = halves.replace("0xffff0000", "0xffffffff");
    ONE_WARP.reports(&disagree, Rule::Diverged, "of these name others");
    let smaller = halves.replace("selp.b32 %r3, 0xffff,", "selp.b32 %r3, 0xff,");
    ONE_WARP.reports(&smaller, Rule::Diverged, "its mask names 0x000000ff");

    // `bar.warp.sync` in both arms of a branch is one barrier, if both name the same lanes.
    let arms = "
    setp.lt.u32 %p1, %t, 16;
    shl.b32 %r1, %t, 2;
    mov.u32 %r3, tile;
    add.u32 %r4, %r3, %r1;
    st.shared.u32 [%r4], %t;
    @%p1 bra LOW;
    bar.warp.sync -1;
    bra DONE;
LOW:
    bar.warp.sync 0xffffffff;
DONE:
    xor.b32 %r2, %r1, 64;
    add.u32 %r2, %r3, %r2;
    ld.shared.u32 %r2, [%r2];
    ret;";
    ONE_WARP.passes(arms);
    // Lanes that no mask names go on.
    let three_quarters = "
    setp.lt.u32 %p1, %t, 16;
    setp.lt.u32 %p2, %t, 24;
    @%p1 bra LOW;
    @%p2 bar.warp.sync 0x00ffffff;
    bra DONE;
LOW:
    bar.warp.sync 0x00ffffff;
DONE:
    ret;";
    ONE_WARP.passes(three_quarters);
    for broken in ["", "bar.warp.sync 0xffff0000;"] {
        for seed in 1..=SEEDS {
            let report =
                ONE_WARP.with_seed(&module(&arms.replace("bar.warp.sync -1;", broken)), seed).expect_err("half");
            assert!(matches!(report.rule, Rule::Race | Rule::Uninitialised | Rule::Diverged), "{report}");
        }
    }
}

#[test]
fn a_deadlock_says_who_waits_for_what() {
    let crossed = "
    setp.lt.u32 %p1, %t, 32;
    @%p1 bra FIRST;
    bar.sync 1, 64;
    ret;
FIRST:
    bar.sync 2, 64;
    ret;";
    TWO_WARPS.reports(crossed, Rule::Deadlock, "warp 0 lanes 0xffffffff waits at barrier 2");
    TWO_WARPS.reports(crossed, Rule::Deadlock, "warp 1 lanes 0xffffffff waits at barrier 1");
    TWO_WARPS.passes(&crossed.replace("bar.sync 1, 64", "bar.sync 2, 64"));
    // Warps that have exited are not waited for.
    TWO_WARPS.passes("setp.lt.u32 %p1, %t, 32;\n @%p1 ret;\n bar.sync 0;\n ret;");
}

/// CTA 0 writes data and raises a flag in `in`; CTA 1 waits for it and reads the data.
const FLAG: &str = "
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %rd2, %out, %rd1;
    setp.ne.u32 %p1, %c, 0;
    @%p1 bra READER;
    st.global.u32 [%rd2], %t;
    bar.sync 0;
    setp.ne.u32 %p2, %t, 0;
    @%p2 bra DONE;
    red.release.gpu.global.add.u32 [%in], 1;
    bra DONE;
READER:
    setp.ne.u32 %p2, %t, 0;
    @%p2 bra WAITED;
SPIN:
    ld.acquire.gpu.global.u32 %r1, [%in];
    setp.eq.u32 %p3, %r1, 0;
    @%p3 bra SPIN;
WAITED:
    bar.sync 0;
    ld.global.u32 %r2, [%rd2];
DONE:
    ret;";

#[test]
fn global_memory_is_ordered_by_release_and_acquire() {
    TWO_CTAS.twins(
        FLAG,
        &[
            ("ld.acquire.gpu", "ld.relaxed.gpu", Rule::Race, "`ld.global.u32 %r2, [%rd2]`"),
            ("red.release.gpu", "red.relaxed.gpu", Rule::Race, "`out` at offset"),
            ("ld.acquire.gpu", "ld.acquire.cta", Rule::Race, "their scopes do not include one another"),
            ("red.release.gpu.global.add.u32 [%in], 1;", "", Rule::Livelock, "20000 instructions without an effect"),
            ("ld.acquire.gpu", "ld", Rule::Race, "atomic"),
        ],
    );
    // Fences beside relaxed accesses do the same.
    let fenced = FLAG
        .replace("red.release.gpu", "fence.acq_rel.gpu;\n    red.relaxed.gpu")
        .replace("ld.acquire.gpu", "ld.relaxed.gpu")
        .replace("WAITED:\n", "WAITED:\n    fence.acq_rel.gpu;\n");
    TWO_CTAS.twins(
        &fenced,
        &[
            ("fence.acq_rel.gpu;\n    red", "red", Rule::Race, "`out` at offset"),
            ("WAITED:\n    fence.acq_rel.gpu;", "WAITED:", Rule::Race, "`out` at offset"),
            ("fence.acq_rel.gpu;\n    red", "fence.acq_rel.cta;\n    red", Rule::Race, "`out` at offset"),
        ],
    );
}

/// Both CTAs count themselves; the later one reads what both wrote.
#[test]
fn atomics_pass_on_what_earlier_ones_published() {
    let last = "
    mul.wide.u32 %rd1, %c, 4;
    add.s64 %rd2, %out, %rd1;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    st.global.u32 [%rd2], %c;
    atom.acq_rel.gpu.global.add.u32 %r1, [%in], 1;
    setp.ne.u32 %p2, %r1, 2;
    @%p2 bra DONE;
    ld.global.u32 %r2, [%out];
    ld.global.u32 %r3, [%out+4];
    ld.global.u32 %r4, [%out+8];
DONE:
    ret;";
    let three = Run { ctas: 3, ..ONE_WARP };
    three.passes(last);
    // Release alone does not let the last one see; acquire alone publishes nothing.
    for order in ["relaxed", "release", "acquire"] {
        three.reports(&last.replace("acq_rel", order), Rule::Race, "`ld.global.u32");
    }
    three.reports(&last.replace("[%rd2], %c", "[%out], %c"), Rule::Race, "`st.global.u32 [%out], %c`");
}

/// Each thread brings 16 bytes to shared memory asynchronously and reads its neighbour's.
const ASYNC: &str = "
    shl.b32 %r1, %t, 4;
    mov.u32 %r3, tile;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd2, %in, %rd1;
    xor.b32 %r2, %r1, 512;
    add.s32 %r1, %r1, %r3;
    add.s32 %r2, %r2, %r3;
    cp.async.cg.shared.global [%r1], [%rd2], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.u32 %r4, [%r2];
    ret;";

#[test]
fn asynchronous_copies_are_waited_for() {
    TWO_WARPS.twins(
        ASYNC,
        &[
            ("16;\n    cp.async.commit_group;", "16, 32;", Rule::Trap, "copies 32 of 16 bytes"),
            ("[%rd2], 16;", "[%rd2+8], 16;", Rule::Misaligned, "cp.async of 16 bytes from"),
            ("[%rd2], 16;", "[%rd2+4096], 16;", Rule::OutOfBounds, "`cp.async.cg.shared.global"),
            ("[%r1], [%rd2]", "[%r1+1024], [%rd2]", Rule::OutOfBounds, "shared address"),
        ],
    );
    // A wait that lets a group be in flight: what is read has not landed, or landed without an order.
    for broken in [
        ASYNC.replace("wait_group 0", "wait_group 1"),
        ASYNC.replace("cp.async.commit_group;", ""),
        ASYNC.replace("bar.sync 0;", ""),
        ASYNC.replace("cp.async.wait_group 0;\n    bar.sync 0;", "bar.sync 0;\n    cp.async.wait_group 0;"),
    ] {
        for seed in 1..=SEEDS {
            let report = TWO_WARPS.with_seed(&module(&broken), seed).expect_err("a copy that is not waited for");
            assert!(matches!(report.rule, Rule::Race | Rule::Uninitialised), "{report}");
        }
    }
    // A wait serves all groups but the last ones.
    let two_groups = ASYNC.replace("cp.async.wait_group 0;", "cp.async.commit_group;\n cp.async.wait_group 1;");
    TWO_WARPS.passes(&two_groups);
    TWO_WARPS.passes(&ASYNC.replace("wait_group 0", "wait_all"));
    let left = ASYNC.replace("cp.async.wait_group 0;\n    bar.sync 0;\n    ld.shared.u32 %r4, [%r2];", "");
    TWO_WARPS.reports(&left, Rule::AsyncLeft, "32 asynchronous copies were never waited for");
    // Reading is a use too: the source must not change while a copy is under way.
    let overwritten = ASYNC.replace("cp.async.commit_group;", "st.global.u32 [%rd2], %t;\n cp.async.commit_group;");
    TWO_WARPS.reports(&overwritten, Rule::Race, "asynchronous copy");
}

#[test]
fn traps_are_reported() {
    TWO_WARPS.reports("setp.eq.u32 %p1, %t, 40;\n @%p1 trap;\n ret;", Rule::Trap, "warp 1");
}

#[test]
fn an_endless_loop_ends() {
    ONE_WARP.reports("AGAIN:\n bra AGAIN;", Rule::Livelock, "without an effect");
}

#[test]
fn launches_are_checked() {
    let module = module("ret;");
    let params = [0; 16];
    let good =
        Launch { kernel: "k", grid: [1; 3], cluster: [1; 3], block: [32, 1, 1], shared_bytes: 0, params: &params };
    let run = |launch: &Launch<'_>, device: Device| {
        module.launch(&mut Memory::new(), launch, &Options { device, ..Options::default() })
    };
    assert!(run(&good, Device::default()).is_ok());
    for (launch, message) in [
        (Launch { kernel: "other", ..good.clone() }, "no such kernel, expected one of k"),
        (Launch { params: &params[..8], ..good.clone() }, "8 bytes of parameters, expected 16"),
        (Launch { block: [1025, 1, 1], ..good.clone() }, "1025 threads per CTA, expected 1 to 1024"),
        (Launch { block: [0, 1, 1], ..good.clone() }, "0 threads per CTA"),
        (Launch { block: [1 << 16, 1 << 16, 1], ..good.clone() }, "threads per CTA"),
        (Launch { grid: [0, 1, 1], ..good.clone() }, "a grid of [0, 1, 1] CTAs"),
        (Launch { shared_bytes: 163 << 10, ..good.clone() }, "bytes of shared memory, expected at most 166912"),
        (Launch { shared_bytes: u32::MAX, ..good.clone() }, "bytes of shared memory, expected at most"),
        (Launch { cluster: [2, 1, 1], ..good.clone() }, "is not made of clusters of [2, 1, 1]"),
    ] {
        let report = run(&launch, Device::default()).expect_err(message);
        assert_eq!(report.rule, Rule::BadLaunch);
        assert!(report.message.contains(message), "{report}");
    }
    let none = run(&good, Device { sms: 0, ..Device::default() }).expect_err("a device without SMs");
    assert_eq!(none.rule, Rule::BadLaunch);
}

#[test]
fn what_is_not_implemented_is_named_with_its_line() {
    for (line, named) in [
        ("suld.b.1d.b32.trap %r1, [%rd1];", "suld.b.1d.b32.trap"),
        ("add.f32x2 %rd1, %rd2, %rd3;", "add.f32x2"),
        ("ld.global.unknown.u32 %r1, [%rd1];", "ld.global.unknown.u32"),
        ("ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1, %r2, %r3}, [%r4];", "ldmatrix"),
        ("min.rn.f32 %r1, %r2, %r3;", "min.rn.f32"),
        ("fma.f32 %r1, %r2, %r3, %r4;", "fma.f32"),
        ("setp.lt.f16x2 %p1, %r2, %r3;", "setp.lt.f16x2"),
        ("mov.u32 %r1, %nosuch;", "%nosuch"),
        ("bra NOWHERE;", "NOWHERE"),
    ] {
        let module = module(&format!("    mov.u32 %r1, 0;\n{line}\n    ret;"));
        let error = module.kernel_error("k").expect("not implemented");
        assert_eq!(error.line, 16, "{error}");
        assert!(error.to_string().contains(named), "{error}");
        let launch =
            Launch { kernel: "k", grid: [1; 3], cluster: [1; 3], block: [32, 1, 1], shared_bytes: 0, params: &[0; 16] };
        let report = module.launch(&mut Memory::new(), &launch, &Options::default()).expect_err("not implemented");
        assert_eq!(report.rule, Rule::BadLaunch);
    }
}
