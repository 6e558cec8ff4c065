//! Proxies and bulk copies: each instruction and mode of the PTX ISA 9.0 by what it does, each rule by a kernel that
//! breaks it and is reported for every seed, beside its correct twin.

mod support;

use ptx_emulator::Rule;
use support::{module, one_warp, warps, words};

/// Thread 0 brings 512 bytes six times through two stages; warp 1 copies them to `out` with `ld.shared`.
const RING: &str = "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%bar], 1;
    mbarrier.init.shared::cta.b64 [%bar+8], 1;
    mbarrier.init.shared::cta.b64 [%bar+16], 1;
    mbarrier.init.shared::cta.b64 [%bar+24], 1;
    fence.mbarrier_init.release.cluster;
READY:
    bar.sync 0;
    mov.u32 %r1, 0;
    setp.ge.u32 %p2, %t, 32;
    @%p2 bra CONSUMER;
    @%p1 bra DONE;
PRODUCER:
    and.b32 %r2, %r1, 1;
    shl.b32 %r3, %r2, 3;
    add.u32 %r3, %r3, %bar;
    shl.b32 %r4, %r2, 9;
    add.u32 %r4, %r4, %tile;
    shr.u32 %r5, %r1, 1;
    xor.b32 %r5, %r5, 1;
    and.b32 %r5, %r5, 1;
EMPTY:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3+16], %r5;
    @!%p3 bra EMPTY;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;
    mul.wide.u32 %rd1, %r1, 512;
    add.s64 %rd2, %in, %rd1;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%rd2], 512, [%r3];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 6;
    @%p4 bra PRODUCER;
    bra DONE;
CONSUMER:
    and.b32 %r2, %r1, 1;
    shl.b32 %r3, %r2, 3;
    add.u32 %r3, %r3, %bar;
    shl.b32 %r4, %r2, 9;
    add.u32 %r4, %r4, %tile;
    and.b32 %r6, %t, 31;
    shl.b32 %r6, %r6, 4;
    add.u32 %r4, %r4, %r6;
    shr.u32 %r5, %r1, 1;
    and.b32 %r5, %r5, 1;
FULL:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], %r5, 1000;
    @!%p3 bra FULL;
    ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4];
    mul.wide.u32 %rd1, %r1, 512;
    add.s64 %rd2, %out, %rd1;
    cvt.u64.u32 %rd3, %r6;
    add.s64 %rd2, %rd2, %rd3;
    st.global.v4.u32 [%rd2], {%r10, %r11, %r12, %r13};
    bar.warp.sync -1;
    setp.ne.u32 %p5, %t, 32;
    @!%p5 mbarrier.arrive.shared::cta.b64 _, [%r3+16];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 6;
    @%p4 bra CONSUMER;
DONE:
    ret;";

const HANGS: &[Rule] = &[Rule::Deadlock, Rule::MbarrierMisuse, Rule::Race, Rule::Uninitialised, Rule::AsyncLeft];
const RACES: &[Rule] = &[Rule::Race, Rule::Uninitialised];

#[test]
fn a_ring_of_bulk_copies() {
    let early = "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4];";
    let release = "@!%p5 mbarrier.arrive.shared::cta.b64 _, [%r3+16];";
    let out = warps(2).twins(
        RING,
        &[
            ("fence.mbarrier_init.release.cluster;", "", &[Rule::Race], "the mbarrier at"),
            ("bar.sync 0;", "", &[Rule::Race, Rule::MbarrierMisuse], "mbarrier"),
            // Too short: the second half of a copy counts for the next phase. Too long: the phase never ends.
            ("[%r3], 512;", "[%r3], 256;", HANGS, ""),
            ("[%r3], 512;", "[%r3], 528;", HANGS, ""),
            ("xor.b32 %r5, %r5, 1;", "", HANGS, ""),
            ("and.b32 %r5, %r5, 1;\nFULL", "not.b32 %r5, %r5;\n and.b32 %r5, %r5, 1;\nFULL", HANGS, ""),
            (release, "", &[Rule::Deadlock], "waits for the mbarrier at"),
            ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;", "", HANGS, ""),
            ("mbarrier.init.shared::cta.b64 [%bar+8], 1;", "", &[Rule::MbarrierMisuse], "no mbarrier"),
            ("[%r4], [%rd2], 512", "[%r4], [%rd2], 520", &[Rule::Trap], "520 bytes"),
            ("[%r4], [%rd2], 512", "[%r4+8], [%rd2], 512", &[Rule::Misaligned], "multiple of 16"),
            ("[%r4], [%rd2], 512", "[%r4], [%rd2+8192], 512", &[Rule::OutOfBounds], "`cp.async.bulk"),
            ("[%r4], [%rd2], 512", "[%r4+65536], [%rd2], 512", &[Rule::OutOfBounds], "`cp.async.bulk"),
        ],
    );
    assert_eq!(out[..3072], one_warp().input[..3072]);
    for wait in ["@!%p3 bra EMPTY;", "@!%p3 bra FULL;"] {
        warps(2).reports_some(&RING.replace(wait, ""), HANGS);
    }
    // The lane that hands a stage back does so for all: `bar.warp.sync`, too, is needed.
    warps(2).notices_removals(RING, &[]);
    // The stage is handed back before it has been read.
    let moved = RING.replace(release, "").replace(early, &format!("setp.ne.u32 %p5, %t, 32;\n{release}\n{early}"));
    warps(2).reports(&moved, &[Rule::Race], "ld.shared.v4");
    // The other ways to fence an initialisation and to name the same things.
    for (old, new) in [
        ("fence.mbarrier_init.release.cluster;", "fence.proxy.async.shared::cta;"),
        ("fence.mbarrier_init.release.cluster;", "fence.proxy.async;"),
        ("cp.async.bulk.shared::cluster.global", "cp.async.bulk.shared::cta.global"),
        ("[%r3], %r5, 1000;", "[%r3], %r5;"),
        ("try_wait.parity.shared::cta.b64 %p3, [%r3+16]", "test_wait.parity.acquire.cta.shared::cta.b64 %p3, [%r3+16]"),
        ("mbarrier.arrive.expect_tx.shared::cta", "mbarrier.arrive.expect_tx.release.cta.shared::cta"),
        (
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;",
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r3], 512;\n mbarrier.arrive.b64 _, [%rd9];",
        ),
    ] {
        let generic = "cvt.u64.u32 %rd9, %r3;\n cvta.shared.u64 %rd9, %rd9;\nEMPTY:";
        warps(2).passes(&RING.replace("EMPTY:", generic).replace(old, new));
    }
    warps(2).reports(
        &RING.replace("fence.mbarrier_init.release.cluster;", "fence.proxy.async.global;"),
        &[Rule::Race],
        "mbarrier",
    );
}

/// With the strict reading of the ISA, what is read must be fenced before it is overwritten through the other proxy.
#[test]
fn reads_are_fenced_when_asked() {
    let strict = support::Run { fence_reads: true, ..warps(2) };
    strict.reports(RING, &[Rule::Race], "is ordered in the generic proxy only after read");
    strict.passes(&RING.replace("bar.warp.sync -1;", "fence.proxy.async.shared::cta;\n bar.warp.sync -1;"));
}

#[test]
fn what_is_no_race_is_found_without_looking_for_races() {
    let blind = support::Run { races: false, ..warps(2) };
    let out = blind.passes(RING);
    assert_eq!(out[..3072], one_warp().input[..3072]);
    blind.reports(&RING.replace("[%r3], 512;", "[%r3], 528;"), &[Rule::Deadlock], "16 bytes expected");
    blind.reports(&RING.replace("mbarrier.init.shared::cta.b64 [%bar+8], 1;", ""), &[Rule::MbarrierMisuse], "");
    blind.reports(&STORE.replace("cp.async.bulk.commit_group;", ""), &[Rule::AsyncLeft], "never committed");
}

/// Both orders of modifiers that ptxas takes, and every form with a hint, decode.
#[test]
fn forms_that_ptxas_takes_decode() {
    for line in [
        "mbarrier.complete_tx.shared::cluster.relaxed.cluster.b64 [%bar], 16;",
        "mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%bar], 16;",
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%bar];",
        "cp.async.bulk.prefetch.L2.global.L2::cache_hint [%in], 64, %rd2;",
        "cp.async.bulk.prefetch.tensor.1d.L2.global [%map, {%r1}];",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%out], [%tile], 16, %rd2;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16.L2::cache_hint [%out], [%tile], 16, %rd2;",
        "cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.bulk_group [%map, {%r1}], [%tile];",
        "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group.L2::cache_hint [%map, {%r1}], [%tile], %rd2;",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%tile], {%r1, %r1, %r1, %r1}, [%bar];",
        "createpolicy.range.global.L2::evict_last.L2::evict_first.b64 %rd2, [%in], 128, 256;",
        "createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 %rd2, 1.0;",
        "createpolicy.cvt.L2.b64 %rd2, 0x3333;",
        "mapa.shared::cluster.u32 %r3, bars, 0;",
        "griddepcontrol.wait;",
        "griddepcontrol.launch_dependents;",
        "mov.u64 %rd1, %globaltimer;",
    ] {
        assert_eq!(module(&format!("{line}\n ret;")).kernel_error("k"), None);
    }
}

/// Two warps write a tile, which thread 0 stores and then overwrites.
const STORE: &str = "
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %tile, %r1;
    st.shared.u32 [%r2], %t;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    cp.async.bulk.global.shared::cta.bulk_group [%out], [%tile], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    st.shared.u32 [%r2], %r1;
DONE:
    ret;";

#[test]
fn stores_read_what_is_fenced_and_are_waited_for() {
    let wait = "cp.async.bulk.wait_group.read 0;";
    let out = warps(2).twins(
        STORE,
        &[
            ("fence.proxy.async.shared::cta;", "", &[Rule::Race], "is ordered in the generic proxy only after write"),
            ("fence.proxy.async.shared::cta;", "fence.proxy.async.global;", &[Rule::Race], "generic proxy only"),
            ("fence.proxy.async.shared::cta;", "fence.acq_rel.gpu;", &[Rule::Race], "generic proxy only"),
            ("bar.sync 0;", "", RACES, "cp.async.bulk.global"),
            ("cp.async.bulk.commit_group;", "", &[Rule::Race, Rule::AsyncLeft], "cp.async.bulk.global"),
            (wait, "", &[Rule::Race, Rule::AsyncLeft], "bulk"),
            (wait, "cp.async.bulk.wait_group.read 1;", &[Rule::Race, Rule::AsyncLeft], "bulk"),
            (
                "bulk_group [%out], [%tile], 256",
                "bulk_group [%out+8184], [%tile], 256",
                &[Rule::Misaligned],
                "multiple of 16",
            ),
            (
                "bulk_group [%out], [%tile], 256",
                "bulk_group [%out+8176], [%tile], 256",
                &[Rule::OutOfBounds],
                "`out` of 8192",
            ),
            (
                "bulk_group [%out], [%tile], 256",
                "bulk_group [%out], [%tile+256], 256",
                &[Rule::Uninitialised],
                "shared",
            ),
        ],
    );
    assert_eq!(words(&out)[..64], (0..64).collect::<Vec<_>>());
    warps(2).notices_removals(STORE, &[]);
    let only = STORE.replace("st.shared.u32 [%r2], %r1;\n", "");
    warps(2).passes(&only);
    warps(2).reports(&only.replace(wait, ""), &[Rule::AsyncLeft], "was never waited for");
    warps(2).reports(&only.replace("cp.async.bulk.commit_group;", ""), &[Rule::AsyncLeft], "was never committed");
    // The wait too late; and to read the destination the writes must be complete.
    let late =
        STORE.replace(wait, "").replace("st.shared.u32 [%r2], %r1;", &format!("st.shared.u32 [%r2], %r1;\n{wait}"));
    warps(2).reports(&late, &[Rule::Race], "st.shared.u32");
    let back = STORE.replace("st.shared.u32 [%r2], %r1;", "ld.global.u32 %r5, [%out];");
    warps(2).reports(&back, RACES, "ld.global.u32 %r5");
    warps(2).passes(&back.replace("wait_group.read", "wait_group"));
    // The fence after the barrier, by the thread that issues, does as well.
    warps(2).passes(
        &STORE.replace("fence.proxy.async.shared::cta;", "").replace("bar.sync 0;", "bar.sync 0;\n fence.proxy.async;"),
    );
    // Fenced by the wrong thread: before it knows of the writes.
    let wrong = STORE.replace("fence.proxy.async.shared::cta;", "setp.ne.u32 %p1, %t, 0;\n @!%p1 fence.proxy.async;");
    warps(2).reports(&wrong, &[Rule::Race], "generic proxy only");
}

/// The pattern of CUDA's own guide: every thread arrives and waits with its state, changes the data in place, and one stores
/// it back.
#[test]
fn data_go_in_and_out_again() {
    let body = "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%bar], 64;
    fence.proxy.async.shared::cta;
READY:
    bar.sync 0;
    @%p1 bra ARRIVE;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%tile], [%in], 256, [%bar];
    mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %rd1, [%bar], 256;
    bra WAIT;
ARRIVE:
    mbarrier.arrive.shared::cta.b64 %rd1, [%bar], 1;
WAIT:
    mbarrier.try_wait.shared.b64 %p2, [%bar], %rd1;
    @!%p2 bra WAIT;
    shl.b32 %r1, %t, 2;
    add.u32 %r1, %r1, %tile;
    ld.shared.u32 %r2, [%r1];
    add.u32 %r2, %r2, 1;
    st.shared.u32 [%r1], %r2;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 bra DONE;
    cp.async.bulk.global.shared::cta.bulk_group [%out], [%tile], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    mbarrier.inval.shared.b64 [%bar];
DONE:
    ret;";
    let out = words(&warps(2).passes(body));
    let expected: Vec<u32> = words(&one_warp().input[..256]).iter().map(|word| word + 1).collect();
    assert_eq!(out[..64], expected);
    // The object need not be invalidated.
    warps(2).notices_removals(body, &["mbarrier.inval"]);
}

/// Global memory written by generic stores and read by a copy of the same kernel.
#[test]
fn global_writes_are_fenced_too() {
    let body = "
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %rd2, %out, %rd1;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%bar], 1;
    fence.mbarrier_init.release.cluster;
READY:
    st.global.u32 [%rd2], %t;
    fence.proxy.async.global;
    bar.sync 0;
    @%p1 bra DONE;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%tile], [%out], 256, [%bar];
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
    ld.shared.u32 %r3, [%tile+252];
    st.global.u32 [%out+256], %r3;
DONE:
    ret;";
    let out = warps(2).twins(
        body,
        &[
            ("fence.proxy.async.global;", "", &[Rule::Race], "is ordered in the generic proxy only after write"),
            ("fence.proxy.async.global;", "fence.proxy.async.shared::cta;", &[Rule::Race], "generic proxy only"),
        ],
    );
    let unseen = body.replace(
        "mbarrier.try_wait.parity.shared.b64 %p2, [%bar], 0;\n    @!%p2 bra WAIT;\n    ld.shared.u32 %r3, [%tile+252];",
        "",
    );
    warps(2).reports(&unseen, &[Rule::AsyncLeft], "cp.async.bulk.shared");
    assert_eq!(words(&out)[64], 63);
}

#[test]
fn what_is_not_implemented_is_named() {
    for line in [
        "cp.async.bulk.tensor.2d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%tile], [%map, {%r1, %r2}], [%bar];",
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.cta_group::2 [%tile], [%map, {%r1, %r2}], [%bar];",
        "cp.async.bulk.tensor.6d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%tile], [%map, {%r1, %r2}], [%bar];",
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%tile], [%map, {%r1, %r2}], [%bar];",
        "cp.async.bulk.global.shared::cta.bulk_group.cp_mask [%out], [%tile], 16, %h1;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%out], [%tile], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.exch.b32 [%out], [%tile], 16;",
        "mbarrier.arrive.shared::cluster.b64 %rd1, [%bar];",
        "mbarrier.arrive.acquire.cta.shared.b64 %rd1, [%bar];",
        "mbarrier.arrive.release.shared.b64 %rd1, [%bar];",
        "mbarrier.arrive.release.relaxed.cta.shared.b64 %rd1, [%bar];",
        "mbarrier.try_wait.acquire.cta.parity.shared.b64 %p1, [%bar], 0;",
        "red.async.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%tile], %r1, [%bar];",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b64 [%tile], {%rd1, %rd1, %rd1, %rd1}, [%bar];",
        "mbarrier.test_wait.parity.shared.b64 %p1, [%bar], 0, 10;",
        "mbarrier.init.shared::cluster.b64 [%bar], 1;",
        "fence.proxy.alias;",
        "barrier.cluster.wait.relaxed;",
        "createpolicy.fractional.L2::never.b64 %rd1, 0f3F800000;",
    ] {
        let module = module(&format!("{line}\n ret;"));
        let error = module.kernel_error("k").expect(line);
        assert!(error.to_string().contains(&line[..12]), "{error}");
    }
}
