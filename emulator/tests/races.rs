//! Races, to the thread: what orders memory passes for every seed, what does not is reported for every seed.

mod twins;

use ptx_emulator::{Checks, Device, Options, Rule};
use twins::*;

/// `%rd2`: the thread's word of `out`, `%r1` of `tile`; `%r2`, `%rd3`: those of the thread 16 further or back.
const WORDS: &str = "
    shl.b32 %r1, %t, 2;
    xor.b32 %r2, %r1, 64;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd2, %out, %rd1;
    cvt.u64.u32 %rd1, %r2;
    add.s64 %rd3, %out, %rd1;
    mov.u32 %r3, tile;
    add.s32 %r1, %r1, %r3;
    add.s32 %r2, %r2, %r3;
";

fn words(body: &str) -> String {
    format!("{WORDS}{body}")
}

#[test]
fn lanes_are_ordered_by_the_warps_barrier() {
    let exchange = words(
        "
    st.shared.u32 [%r1], %t;
    bar.warp.sync -1;
    ld.shared.u32 %r4, [%r2];
    ret;",
    );
    ONE_WARP.twins(&exchange, &[("bar.warp.sync -1;", "", Rule::Race, "by another lane of the warp")]);
    // Both lanes are named.
    ONE_WARP.reports(&exchange.replace("bar.warp.sync -1;", ""), Rule::Race, "warp 0 lane 16, PTX line");
    // `.sync` is about execution, not memory.
    for collective in
        ["shfl.sync.idx.b32 %r5, %t, 0, 31, -1;", "vote.sync.ballot.b32 %r5, %p1, -1;", "activemask.b32 %r5;"]
    {
        ONE_WARP.reports(&exchange.replace("bar.warp.sync -1;", collective), Rule::Race, "`ld.shared.u32 %r4, [%r2]`");
    }
    // The barrier of the CTA and flags do as well.
    ONE_WARP.passes(&exchange.replace("bar.warp.sync -1;", "bar.sync 0;"));
}

/// Quarters of a warp that synchronise among themselves, as tiles of cooperative groups do.
#[test]
fn parts_of_a_warp_synchronise_apart() {
    let tiles = words(
        "
    and.b32 %r5, %t, 24;
    shl.b32 %r6, 255, %r5;
    xor.b32 %r2, %r1, 16;
    st.shared.u32 [%r1], %t;
    bar.warp.sync %r6;
    ld.shared.u32 %r4, [%r2];
    bar.warp.sync %r6;
    st.shared.u32 [%r2], %r4;
    bar.warp.sync -1;
    xor.b32 %r2, %r1, 64;
    ld.shared.u32 %r4, [%r2];
    ret;",
    );
    // Lanes of different quarters execute the barrier with masks of their own, one quarter at a time.
    let apart = tiles.replacen(
        "    bar.warp.sync %r6;",
        "
    setp.eq.u32 %p1, %r5, 0;
    @%p1 bra Q0;
    setp.eq.u32 %p1, %r5, 8;
    @%p1 bra Q1;
    setp.eq.u32 %p1, %r5, 16;
    @%p1 bra Q2;
    bar.warp.sync 0xff000000;
    bra JOIN;
Q0: bar.warp.sync 0xff;
    bra JOIN;
Q1: bar.warp.sync 0xff00;
    bra JOIN;
Q2: bar.warp.sync 0xff0000;
JOIN:",
        1,
    );
    let apart = apart.replacen("bar.warp.sync %r6;", "bar.warp.sync -1;", 1);
    ONE_WARP.twins(
        &apart,
        &[
            ("bar.warp.sync 0xff00;", "", Rule::Race, "`ld.shared.u32 %r4, [%r2]`"),
            ("xor.b32 %r2, %r1, 16", "xor.b32 %r2, %r1, 64", Rule::Race, "`ld.shared.u32 %r4, [%r2]`"),
        ],
    );
}

/// Two lanes that write one word with one instruction: one of the values lands, which matters when they differ.
#[test]
fn lanes_that_write_the_same_place() {
    let same = words("    st.shared.u32 [%r3], 7;\n    ret;");
    ONE_WARP.twins(&same, &[("[%r3], 7", "[%r3], %t", Rule::Race, "by another lane of the warp")]);
    ONE_WARP.reports(&same.replace("[%r3], 7", "[%r3], %t"), Rule::Race, "lane 1, PTX line");
    TWO_WARPS.reports(&same, Rule::Race, "write of 4 bytes of shared memory at offset 0");
    // By different instructions it is a race whatever the value.
    ONE_WARP.reports(&same.replace("    ret;", "    st.shared.u32 [%r3], 7;\n    ret;"), Rule::Race, "another lane");
    // Neighbouring bytes are different places.
    let bytes = words(
        "
    add.s32 %r3, %r3, %t;
    st.shared.u8 [%r3], %t;
    ld.shared.u8 %r4, [%r3];
    ret;",
    );
    TWO_WARPS
        .twins(&bytes, &[("    ld", "    xor.b32 %r3, %r3, 1;\n    ld", Rule::Race, "by another lane of the warp")]);
}

/// One lane raises the flag for its warp, one waits for its warp.
const ELECTED: &str = "
    setp.ne.u32 %p2, %t, 0;
    setp.ne.u32 %p1, %c, 0;
    @%p1 bra READER;
    st.global.u32 [%rd2], %t;
    bar.warp.sync -1;
    @%p2 bra DONE;
    st.release.gpu.global.u32 [%in], 1;
    bra DONE;
READER:
    @%p2 bra WAITED;
SPIN:
    ld.acquire.gpu.global.u32 %r4, [%in];
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra SPIN;
WAITED:
    bar.warp.sync 0xffffffff;
    ld.global.u32 %r5, [%rd2];
DONE:
    ret;";

#[test]
fn an_elected_lane_publishes_what_is_ordered_before_it() {
    let elected = words(ELECTED);
    TWO_CTAS.twins(
        &elected,
        &[
            ("    bar.warp.sync -1;\n", "", Rule::Race, "`st.global.u32 [%rd2], %t`"),
            ("    bar.warp.sync -1;\n", "vote.sync.any.pred %p3, %p2, -1;\n", Rule::Race, "`st.global.u32 [%rd2], %t`"),
            ("st.release.gpu", "st.relaxed.gpu", Rule::Race, "`st.global.u32 [%rd2], %t`"),
            ("st.release.gpu", "st.volatile", Rule::Race, "`st.global.u32 [%rd2], %t`"),
            ("st.release.gpu.global.u32 [%in]", "st.global.u32 [%in]", Rule::Race, "is not ordered after"),
        ],
    );
    // The waiting side: without the barrier the other lanes have waited for nothing. They may read too early for bytes to be
    // there at all.
    let broken = module(&elected.replace("    bar.warp.sync 0xffffffff;\n", ""));
    for seed in 1..=SEEDS {
        let report = TWO_CTAS.with_seed(&broken, seed).expect_err("nothing orders the other lanes");
        assert!(matches!(report.rule, Rule::Race | Rule::Uninitialised), "{report}");
    }
    // A fence by every lane orders each lane's own; the flag then speaks for the elected one alone.
    let fenced = elected.replace("    bar.warp.sync -1;", "    fence.acq_rel.gpu;");
    TWO_CTAS.reports(&fenced.replace("st.release", "st.relaxed"), Rule::Race, "`st.global.u32 [%rd2], %t`");
    // As `__syncthreads(); if (t == 0) { __threadfence(); flag = 1; }` and `while (!flag); __threadfence(); __syncthreads()`.
    let classic = elected
        .replace("    st.release.gpu", "    membar.gl;\n    st.volatile")
        .replace("ld.acquire.gpu", "ld.volatile")
        .replace("WAITED:\n", "    membar.gl;\nWAITED:\n");
    TWO_CTAS.twins(
        &classic,
        &[
            ("    membar.gl;\n    st", "    st", Rule::Race, "`st.global.u32 [%rd2], %t`"),
            ("    membar.gl;\nWAITED", "WAITED", Rule::Race, "`st.global.u32 [%rd2], %t`"),
            ("    membar.gl;\n    st", "    membar.cta;\n    st", Rule::Race, "`st.global.u32 [%rd2], %t`"),
        ],
    );
}

#[test]
fn scopes_include_one_another() {
    let elected = words(ELECTED);
    for (old, new) in [
        ("st.release.gpu", "st.release.cta"),
        ("ld.acquire.gpu", "ld.acquire.cta"),
        ("st.release.gpu", "st.release.cluster"),
        ("ld.acquire.gpu", "ld.acquire.cluster"),
    ] {
        TWO_CTAS.reports(&elected.replace(old, new), Rule::Race, "their scopes do not include one another");
    }
    TWO_CTAS.passes(&elected.replace("acquire.gpu", "acquire.sys").replace("release.gpu", "release.sys"));
    // Strong accesses race only where they are not morally strong.
    let count = words("    red.relaxed.gpu.global.add.u32 [%in], 1;\n    ret;");
    TWO_CTAS.twins(&count, &[("relaxed.gpu", "relaxed.cta", Rule::Race, "their scopes do not include one another")]);
    TWO_WARPS.passes(&count.replace("relaxed.gpu", "relaxed.cta"));
    let pair =
        words("    red.relaxed.gpu.global.add.u32 [%in], 1;\n    ld.relaxed.gpu.global.u32 %r4, [%in];\n    ret;");
    TWO_CTAS.twins(
        &pair,
        &[
            ("ld.relaxed.gpu.global.u32 %r4", "ld.relaxed.gpu.global.u64 %rd4", Rule::Race, "or their sizes differ"),
            ("ld.relaxed.gpu.global.u32", "ld.global.u32", Rule::Race, "is not ordered after"),
        ],
    );
    // Elements of vectors are accesses of their own.
    TWO_CTAS.passes(&pair.replace("ld.relaxed.gpu.global.u32 %r4", "ld.relaxed.gpu.global.v2.u32 {%r4, %r5}"));
}

/// CTA 0 writes and releases, CTA 1 passes on, CTA 2 acquires and reads.
const CHAIN: &str = "
    setp.ne.u32 %p2, %t, 0;
    @%p2 bra DONE;
    setp.eq.u32 %p1, %c, 1;
    @%p1 bra MIDDLE;
    setp.eq.u32 %p1, %c, 2;
    @%p1 bra READER;
    st.global.u32 [%out], %t;
    red.release.gpu.global.add.u32 [%in], 1;
    bra DONE;
MIDDLE:
    ld.relaxed.gpu.global.u32 %r4, [%in];
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra MIDDLE;
    red.relaxed.gpu.global.add.u32 [%in], 1;
    bra DONE;
READER:
    ld.relaxed.gpu.global.u32 %r4, [%in];
    setp.lt.u32 %p3, %r4, 2;
    @%p3 bra READER;
    ld.acquire.gpu.global.u32 %r4, [%in];
    ld.global.u32 %r5, [%out];
DONE:
    ret;";

#[test]
fn release_sequences_go_through_atomics_only() {
    let three = Run { ctas: 3, ..ONE_WARP };
    three.twins(
        CHAIN,
        &[
            // A store begins anew, even a strong one.
            (
                "red.relaxed.gpu.global.add.u32 [%in], 1",
                "st.relaxed.gpu.global.u32 [%in], 2",
                Rule::Race,
                "`ld.global.u32 %r5, [%out]`",
            ),
            ("red.release", "red.relaxed", Rule::Race, "`ld.global.u32 %r5, [%out]`"),
            ("ld.acquire", "ld.relaxed", Rule::Race, "`ld.global.u32 %r5, [%out]`"),
            ("red.relaxed.gpu", "red.relaxed.cta", Rule::Race, "their scopes do not include one another"),
        ],
    );
    // A weak store that is ordered after the release, and then a relaxed atomic: what is read goes back to that store only.
    let weak = CHAIN
        .replace("MIDDLE:\n    ld.relaxed", "MIDDLE:\n    ld.acquire")
        .replace("    red.relaxed.gpu", "    st.global.u32 [%in+4], 1;\n    red.relaxed.gpu");
    three.passes(&weak);
    // The reader comes after a barrier of its own, in one CTA: warps instead of CTAs.
    let warps = "
    and.b32 %r6, %t, 31;
    shr.u32 %r7, %t, 5;
    setp.eq.u32 %p1, %r7, 1;
    setp.ne.u32 %p2, %r6, 0;
    setp.ne.u32 %p0, %t, 0;
    @!%p0 st.global.u32 [%out], 5;
    @!%p0 st.release.gpu.global.u32 [%in], 1;
    @!%p0 atom.relaxed.gpu.global.add.u32 %r4, [%in], 1;
    @%p2 bra DONE;
    @!%p1 bra DONE;
SPIN:
    ld.acquire.gpu.global.u32 %r4, [%in];
    setp.lt.u32 %p3, %r4, 2;
    @%p3 bra SPIN;
    ld.global.u32 %r5, [%out];
DONE:
    ret;";
    TWO_WARPS.twins(
        warps,
        &[
            ("@!%p0 atom", "@!%p0 st.global.u32 [%in], 1;\n @!%p0 atom", Rule::Race, "is not ordered after"),
            // Half of the flag overwritten: the same.
            (
                "@!%p0 atom",
                "@!%p0 st.relaxed.gpu.global.u16 [%in+2], 0;\n @!%p0 atom",
                Rule::Race,
                "is not ordered after",
            ),
        ],
    );
}

/// Flags in shared memory belong to their CTA, though both have the same address.
#[test]
fn flags_in_shared_memory_are_of_one_cta() {
    let body = "
    setp.ne.u32 %p2, %t, 0;
    mov.u32 %r3, tile;
    @%p2 bra DONE;
    setp.ne.u32 %p1, %c, 0;
    st.relaxed.cta.shared.u32 [%r3], 0;
    @%p1 bra READER;
    st.global.u32 [%out], 5;
    st.release.gpu.shared.u32 [%r3], 1;
    bra DONE;
READER:
    ld.acquire.gpu.shared.u32 %r4, [%r3];
    st.global.u32 [%out], 6;
DONE:
    ret;";
    TWO_CTAS.reports(body, Rule::Race, "`out` at offset 0");
}

/// Each lane brings 16 bytes and reads them.
const COPIED: &str = "
    shl.b32 %r1, %t, 4;
    mov.u32 %r3, tile;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd2, %in, %rd1;
    xor.b32 %r2, %r1, 256;
    add.s32 %r1, %r1, %r3;
    add.s32 %r2, %r2, %r3;
    cp.async.cg.shared.global [%r1], [%rd2], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.u32 %r4, [%r1];
    ret;";

#[test]
fn a_wait_serves_the_thread_that_waits() {
    ONE_WARP.passes(COPIED);
    let neighbour = COPIED.replace("ld.shared.u32 %r4, [%r1]", "bar.warp.sync -1;\n    ld.shared.u32 %r4, [%r2]");
    ONE_WARP.twins(&neighbour, &[("    bar.warp.sync -1;\n", "", Rule::Race, "write of an asynchronous copy")]);
    // The barrier before the wait orders nothing.
    let early =
        neighbour.replace("bar.warp.sync -1;", "").replace("cp.async.wait", "bar.warp.sync -1;\n cp.async.wait");
    ONE_WARP.reports(&early, Rule::Race, "write of an asynchronous copy");
    // Only half of the lanes wait before the barrier.
    let half = neighbour
        .replace("    cp.async.wait_group 0;", "    setp.lt.u32 %p1, %t, 16;\n    @%p1 cp.async.wait_group 0;");
    let half = half.replace("    ret;", "    cp.async.wait_all;\n    ret;");
    let broken = module(&half);
    for seed in 1..=SEEDS {
        let report = ONE_WARP.with_seed(&broken, seed).expect_err("half of the copies are in flight");
        assert!(matches!(report.rule, Rule::Race | Rule::Uninitialised), "{report}");
    }
}

#[test]
fn copies_are_not_ordered_among_each_other() {
    let twice = COPIED.replace(
        "    cp.async.commit_group;",
        "    cp.async.commit_group;\n    cp.async.wait_group 0;\n    cp.async.cg.shared.global [%r1], [%rd2], 16;\n    cp.async.commit_group;",
    );
    ONE_WARP.twins(&twice, &[("cp.async.wait_group 0;", "", Rule::Race, "write of an asynchronous copy")]);
    // Not even within a group.
    let group = COPIED.replace(
        "    cp.async.commit_group;",
        "    cp.async.cg.shared.global [%r1], [%rd2], 16;\n    cp.async.commit_group;",
    );
    ONE_WARP.reports(&group, Rule::Race, "write of an asynchronous copy");
    // A store by the thread itself: before the copy it is ordered, after it only once waited for.
    let store = COPIED.replace("    cp.async.cg", "    st.shared.u32 [%r1], %t;\n    cp.async.cg");
    ONE_WARP.passes(&store);
    let late = COPIED.replace("    cp.async.commit_group;", "    st.shared.u32 [%r1], %t;\n    cp.async.commit_group;");
    ONE_WARP.reports(&late, Rule::Race, "asynchronous copy");
}

/// More readers of a word than memory remembers by itself: the one that is not ordered is found, over a few seeds.
#[test]
fn many_readers_of_a_word() {
    let body = "
    mov.u32 %r3, tile;
    setp.ne.u32 %p1, %t, 0;
    @!%p1 st.shared.u32 [%r3], 1;
    bar.sync 0;
    ld.shared.u32 %r4, [%r3];
    bar.sync 1;
    @!%p1 st.shared.u32 [%r3], 2;
    ret;";
    let all = Run { threads: 1024, ..ONE_WARP };
    all.twins(body, &[("bar.sync 1;", "bar.warp.sync -1;", Rule::Race, "is not ordered after")]);
    Run { threads: 256, ..ONE_WARP }.twins(body, &[("bar.sync 1;", "", Rule::Race, "is not ordered after")]);
}

#[test]
fn checks_can_be_chosen() {
    let run = |body: &str, checks| TWO_WARPS.with_options(&module(body), &Options { checks, ..Options::default() });
    let race = words("    st.shared.u32 [%r3], %t;\n    ret;");
    assert_eq!(run(&race, Checks::default()).expect_err("a race").rule, Rule::Race);
    assert!(run(&race, Checks { races: false, ..Checks::default() }).is_ok());
    let unwritten = words("    ld.shared.u32 %r4, [%r1];\n    ret;");
    assert_eq!(run(&unwritten, Checks::default()).expect_err("never written").rule, Rule::Uninitialised);
    assert!(run(&unwritten, Checks { uninitialised: false, ..Checks::default() }).is_ok());
    assert!(run(&words("    ret;"), Checks::default()).expect("correct").lines().is_empty());
}

#[test]
fn registers_limit_the_resident_ctas() {
    let many = Run { ctas: 64, threads: 256, ..ONE_WARP };
    let resident = |registers, device: Device| {
        let options = Options { registers, device, ..Options::default() };
        many.with_options(&module("ret;"), &options).map(|counters| counters.resident_ctas)
    };
    let device = Device { sms: 2, ..Device::default() };
    assert_eq!(resident(None, device.clone()), Ok(16));
    // 8 warps of 128 · 32 registers, twice in 65536.
    assert_eq!(resident(Some(128), device.clone()), Ok(4));
    // 8 warps of 33 · 32 rounded up to 1280: 6 CTAs.
    assert_eq!(resident(Some(33), device.clone()), Ok(12));
    assert_eq!(resident(Some(32), Device { ctas_per_sm: 3, ..device.clone() }), Ok(6));
    // What the PTX allows counts where nothing is said.
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a, .param .u64 b)\n.maxnreg 128\n{\n ret;\n}";
    let allowed = ptx_emulator::Module::parse(text).expect("the kernel parses");
    let options = Options { device: device.clone(), ..Options::default() };
    assert_eq!(many.with_options(&allowed, &options).map(|counters| counters.resident_ctas), Ok(4));
    let refused = resident(Some(200), Device { registers_per_sm: 32768, ..device.clone() }).expect_err("too many");
    assert_eq!(refused.rule, Rule::BadLaunch);
    assert_eq!(resident(Some(256), device).expect_err("no thread has so many").rule, Rule::BadLaunch);
}
