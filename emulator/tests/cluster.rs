//! Clusters: special registers, shared memory of other CTAs, barriers, multicast.

mod support;

use ptx_emulator::{
    Interleave, L2Promotion, Launch, Memory, Module, OobFill, Options, Rule, Swizzle, TensorMap, TensorType,
};
use support::{Run, module, one_warp, pair, words};

/// PTX ISA, "Special Registers": %clusterid and its kin, of a grid of 4 x 6 x 2 in clusters of 2 x 1 x 2.
#[test]
fn special_registers_tell_the_cluster() {
    let text = "
.version 8.6
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out) .explicitcluster .reqnctapercluster 2, 1, 2
{
    .reg .pred %p<2>;
    .reg .b32 %r<24>;
    .reg .b64 %rd<4>;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %ctaid.z;
    mad.lo.u32 %r4, %r3, 6, %r2;
    mad.lo.u32 %r4, %r4, 4, %r1;
    mul.wide.u32 %rd1, %r4, 64;
    ld.param.u64 %rd2, [out];
    add.s64 %rd2, %rd2, %rd1;
    mov.u32 %r5, %clusterid.x;
    mov.u32 %r6, %clusterid.y;
    mov.u32 %r7, %clusterid.z;
    mov.u32 %r8, %nclusterid.x;
    st.global.v4.u32 [%rd2], {%r5, %r6, %r7, %r8};
    mov.u32 %r5, %nclusterid.y;
    mov.u32 %r6, %nclusterid.z;
    mov.u32 %r7, %cluster_ctaid.x;
    mov.u32 %r8, %cluster_ctaid.y;
    st.global.v4.u32 [%rd2+16], {%r5, %r6, %r7, %r8};
    mov.u32 %r5, %cluster_ctaid.z;
    mov.u32 %r6, %cluster_nctaid.x;
    mov.u32 %r7, %cluster_nctaid.y;
    mov.u32 %r8, %cluster_nctaid.z;
    st.global.v4.u32 [%rd2+32], {%r5, %r6, %r7, %r8};
    mov.u32 %r5, %cluster_ctarank;
    mov.u32 %r6, %cluster_nctarank;
    mov.pred %p1, %is_explicit_cluster;
    selp.u32 %r7, 1, 0, %p1;
    st.global.v4.u32 [%rd2+48], {%r5, %r6, %r7, %r7};
    ret;
}";
    let module = Module::parse(text).expect("it parses");
    let mut memory = Memory::new();
    let out = memory.alloc("out", 48 * 64);
    let launch = Launch {
        kernel: "k",
        grid: [4, 6, 2],
        cluster: [1, 1, 1],
        block: [1, 1, 1],
        shared_bytes: 0,
        params: &out.to_le_bytes(),
    };
    module.launch(&mut memory, &launch, &Options::default()).expect("it runs");
    let found = words(&memory.read(out, 48 * 64).expect("written"));
    for (at, [x, y, z]) in (0..48).map(|i| (i as usize * 16, [i % 4, i / 4 % 6, i / 24])) {
        let (within_x, within_z) = (x % 2, z % 2);
        let expected = [x / 2, y, z / 2, 2, 6, 1, within_x, 0, within_z, 2, 1, 2, within_x + 2 * within_z, 4, 1, 1];
        assert_eq!(found[at..at + 16], expected, "cta {x},{y},{z}");
    }
    // The launch must not contradict the kernel.
    let other = Launch { cluster: [4, 1, 1], ..launch };
    let report = module.launch(&mut memory, &other, &Options::default()).expect_err("another cluster");
    assert!(report.message.contains("the kernel requires [2, 1, 2]"), "{report}");
}

#[test]
fn clusters_have_limits() {
    let module = module("ret;");
    let launch = |ctas, cluster| Run { ctas, cluster, ..one_warp() }.run(&module, 1);
    for (ctas, cluster, message) in
        [(32, 17, "expected 1 to 16"), (32, 0, "expected 1 to 16"), (9, 2, "is not made of clusters of [2, 1, 1]")]
    {
        let report = launch(ctas, cluster).expect_err(message);
        assert_eq!(report.rule, Rule::BadLaunch);
        assert!(report.message.contains(message), "{report}");
    }
    assert!(launch(32, 16).is_ok());
    // Eight are portable; more only where the device is said to allow them.
    let params = [0; 144];
    let nine = Launch {
        kernel: "k",
        grid: [9, 1, 1],
        cluster: [9, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 0,
        params: &params,
    };
    let report = module.launch(&mut Memory::new(), &nine, &Options::default()).expect_err("nine");
    assert!(report.message.contains("expected 1 to 8"), "{report}");
}

/// Each thread writes a word of the other CTA's shared memory, adds to another, and reads its own back.
const REMOTE: &str = "
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %tile, %r1;
    st.shared.u32 [%r2+1024], 5;
    xor.b32 %r3, %k, 1;
    mapa.shared::cluster.u32 %r4, %r2, %r3;
    cvt.u64.u32 %rd1, %r2;
    cvta.shared.u64 %rd1, %rd1;
    mapa.u64 %rd2, %rd1, %r3;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    mad.lo.u32 %r5, %k, 1000, %t;
    st.shared::cluster.u32 [%r4], %r5;
    atom.shared::cluster.add.u32 %r6, [%r4+1024], %r5;
    ld.u32 %r8, [%rd2+1024];
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    ld.shared.u32 %r7, [%r2];
    mad.lo.u32 %r9, %k, 64, %t;
    mul.wide.u32 %rd3, %r9, 16;
    add.s64 %rd3, %out, %rd3;
    getctarank.shared::cluster.u32 %r10, %r4;
    st.global.v4.u32 [%rd3], {%r6, %r7, %r8, %r10};
    ret;";

#[test]
fn shared_memory_of_another_cta() {
    let run = Run { out_bytes: 2048, ..pair() };
    let first = "barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;";
    let second = "barrier.cluster.arrive.release.aligned;\n    barrier.cluster.wait.acquire.aligned;";
    let races: &[Rule] = &[Rule::Race, Rule::Uninitialised, Rule::OutOfBounds];
    let out = words(&run.twins(
        REMOTE,
        &[
            (first, "", races, ""),
            (second, "", races, ""),
            ("arrive.aligned", "arrive.relaxed.aligned", races, ""),
            ("arrive.release.aligned", "arrive.relaxed.aligned", &[Rule::Race], "ld.shared.u32 %r7"),
            (
                "st.shared::cluster.u32 [%r4]",
                "st.shared.u32 [%r4]",
                &[Rule::OutOfBounds],
                "expected an address of .shared::cta",
            ),
            (
                "st.shared::cluster.u32 [%r4]",
                "st.shared::cluster.u32 [%r4+65536]",
                &[Rule::OutOfBounds],
                "are not inside",
            ),
            ("ld.u32 %r8, [%rd2+1024]", "ld.u32 %r8, [%rd2+4096]", &[Rule::Uninitialised], "was never written"),
            (
                "mapa.shared::cluster.u32 %r4, %r2, %r3",
                "mapa.shared::cluster.u32 %r4, %r2, 2",
                &[Rule::OutOfBounds],
                "rank 2",
            ),
            ("mapa.u64 %rd2, %rd1, %r3", "mapa.u64 %rd2, %in, %r3", &[Rule::Trap], "not in shared memory"),
            ("barrier.cluster.wait.aligned;", "", &[Rule::BarrierMisuse, Rule::Race, Rule::Uninitialised], ""),
            ("barrier.cluster.arrive.aligned;", "", &[Rule::BarrierMisuse], "without a barrier.cluster.arrive"),
            ("barrier.cluster.wait.acquire.aligned;", "", races, ""),
        ],
    ));
    for (at, expected) in (0..128u32).map(|i| (i as usize * 4, (i / 64, i % 64))) {
        let (rank, thread) = expected;
        let (mine, theirs) = (rank * 1000 + thread, (1 - rank) * 1000 + thread);
        assert_eq!(out[at..at + 4], [5, theirs, 5 + mine, 1 - rank]);
    }
    run.notices_removals(REMOTE, &[]);
    // Without the last barrier a CTA may be gone when the other reads from it.
    let leaves = "
    st.shared.u32 [%tile], %k;
    xor.b32 %r3, %k, 1;
    mapa.shared::cluster.u32 %r4, %tile, %r3;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ld.shared::cluster.u32 %r5, [%r4];
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ret;";
    let one = Run { threads: 32, ..pair() };
    one.passes(leaves);
    one.passes(&leaves.replace("wait;\n    ret", "wait.acquire;\n    ret"));
    let end = leaves.rfind("    barrier.cluster.arrive;").expect("there");
    one.reports(&format!("{}ret;", &leaves[..end]), &[Rule::Race, Rule::OutOfBounds], "ld.shared::cluster.u32");
    one.reports(&leaves.replacen("barrier.cluster.wait;", "", 2), &[Rule::BarrierMisuse, Rule::Uninitialised], "");
    // One CTA never arrives; one arrives and waits for nothing that is missing.
    let stuck = "setp.eq.u32 %p1, %k, 0;\n @%p1 bra SPIN;\n barrier.cluster.arrive;\n barrier.cluster.wait;\nSPIN:\n bar.sync 1, 64;\n ret;";
    one.reports(stuck, &[Rule::Deadlock], "barrier.cluster, which 32 threads have not reached");
    one.passes(&stuck.replace("bar.sync 1, 64;", ""));
}

#[test]
fn addresses_tell_their_space() {
    let body = "
    setp.ne.u32 %p7, %t, 0;
    @%p7 bra DONE;
    cvt.u64.u32 %rd1, %tile;
    cvta.shared.u64 %rd1, %rd1;
    xor.b32 %r3, %k, 1;
    mapa.u64 %rd2, %rd1, %r3;
    mapa.u64 %rd3, %rd1, %k;
    mov.u32 %r9, 0;
    isspacep.shared::cta %p1, %rd1;
    @%p1 or.b32 %r9, %r9, 1;
    isspacep.shared::cluster %p1, %rd2;
    @%p1 or.b32 %r9, %r9, 2;
    isspacep.shared::cta %p1, %rd2;
    @%p1 or.b32 %r9, %r9, 4;
    isspacep.shared %p1, %rd3;
    @%p1 or.b32 %r9, %r9, 8;
    isspacep.global %p1, %in;
    @%p1 or.b32 %r9, %r9, 16;
    isspacep.global %p1, %rd1;
    @%p1 or.b32 %r9, %r9, 32;
    isspacep.param %p1, %map;
    @%p1 or.b32 %r9, %r9, 64;
    isspacep.local %p1, %in;
    @%p1 or.b32 %r9, %r9, 128;
    getctarank.u64 %r10, %rd2;
    getctarank.u64 %r11, %rd1;
    mul.wide.u32 %rd4, %k, 16;
    add.s64 %rd4, %out, %rd4;
    st.global.v4.u32 [%rd4], {%r9, %r10, %r11, %r3};
DONE:
    ret;";
    assert_eq!(pair().words(body)[..8], [91, 1, 0, 1, 91, 0, 1, 0]);
}

/// A matrix of 12 x 64 bf16 whose rows of 128 bytes are brought four (two by each CTA) at a time to both CTAs, through two stages;
/// warp 1 of each copies them to `out` with `ld.shared`, and both CTAs hand a stage back to both.
const MULTICAST: &str = "
    setp.ne.u32 %p1, %t, 0;
    xor.b32 %r20, %k, 1;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%bar], 1;
    mbarrier.init.shared::cta.b64 [%bar+8], 1;
    mbarrier.init.shared::cta.b64 [%bar+16], 2;
    mbarrier.init.shared::cta.b64 [%bar+24], 2;
    fence.mbarrier_init.release.cluster;
    prefetch.tensormap [%map];
READY:
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    mov.u32 %r1, 0;
    setp.ge.u32 %p2, %t, 32;
    @%p2 bra CONSUMER;
    @%p1 bra DONE;
PRODUCER:
    and.b32 %r2, %r1, 1;
    shl.b32 %r3, %r2, 3;
    add.u32 %r3, %r3, %bar;
    shl.b32 %r4, %r2, 11;
    add.u32 %r4, %r4, %tile;
    shl.b32 %r6, %k, 10;
    add.u32 %r4, %r4, %r6;
    shr.u32 %r5, %r1, 1;
    xor.b32 %r5, %r5, 1;
    and.b32 %r5, %r5, 1;
EMPTY:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3+16], %r5;
    @!%p3 bra EMPTY;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;
    shl.b32 %r7, %r1, 2;
    shl.b32 %r8, %k, 1;
    add.u32 %r7, %r7, %r8;
    mov.b16 %h1, 3;
    createpolicy.fractional.L2::evict_last.b64 %rd5, 0f3F800000;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%r4], [%map, {0, %r7}], [%r3], %h1, %rd5;
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 3;
    @%p4 bra PRODUCER;
    bra DONE;
CONSUMER:
    and.b32 %r2, %r1, 1;
    shl.b32 %r3, %r2, 3;
    add.u32 %r3, %r3, %bar;
    shl.b32 %r4, %r2, 11;
    add.u32 %r4, %r4, %tile;
    and.b32 %r6, %t, 31;
    shr.u32 %r7, %r6, 3;
    and.b32 %r8, %r6, 7;
    shl.b32 %r8, %r8, 4;
    shr.u32 %r9, %r7, 1;
    shl.b32 %r9, %r9, 10;
    and.b32 %r10, %r7, 1;
    shl.b32 %r11, %r10, 7;
    shl.b32 %r10, %r10, 4;
    xor.b32 %r10, %r10, %r8;
    add.u32 %r4, %r4, %r9;
    add.u32 %r4, %r4, %r10;
    add.u32 %r4, %r4, %r11;
    shr.u32 %r5, %r1, 1;
    and.b32 %r5, %r5, 1;
FULL:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], %r5;
    @!%p3 bra FULL;
    ld.shared.v4.u32 {%r12, %r13, %r14, %r15}, [%r4];
    shl.b32 %r16, %r1, 9;
    shl.b32 %r17, %r6, 4;
    add.u32 %r16, %r16, %r17;
    mad.lo.u32 %r16, %k, 1536, %r16;
    cvt.u64.u32 %rd1, %r16;
    add.s64 %rd2, %out, %rd1;
    st.global.v4.u32 [%rd2], {%r12, %r13, %r14, %r15};
    bar.warp.sync -1;
    setp.lt.u32 %p5, %r6, 2;
    add.u32 %r18, %r3, 16;
    @%p5 mapa.shared::cluster.u32 %r19, %r18, %r6;
    @%p5 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r19];
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p4, %r1, 3;
    @%p4 bra CONSUMER;
DONE:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ret;";

#[test]
fn a_ring_with_multicast() {
    let run = Run {
        out_bytes: 3072,
        map: |input, _| {
            TensorMap::encode_tiled(
                TensorType::Bf16,
                2,
                input,
                &[64, 12],
                &[128],
                &[64, 2],
                &[1, 1],
                Interleave::None,
                Swizzle::Bytes128,
                L2Promotion::Bytes256,
                OobFill::Zeros,
            )
            .ok()
        },
        ..pair()
    };
    let any: &[Rule] =
        &[Rule::Race, Rule::Uninitialised, Rule::Deadlock, Rule::MbarrierMisuse, Rule::AsyncLeft, Rule::OutOfBounds];
    let arrive = "@%p5 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r19];";
    let out = run.twins(
        MULTICAST,
        &[
            ("fence.mbarrier_init.release.cluster;", "", &[Rule::Race], "the mbarrier at"),
            (
                "barrier.cluster.arrive.relaxed;\n    barrier.cluster.wait;",
                "bar.sync 0;",
                &[Rule::Race, Rule::MbarrierMisuse],
                "mbarrier",
            ),
            ("setp.lt.u32 %p5, %r6, 2;", "setp.lt.u32 %p5, %r6, 1;", &[Rule::Deadlock], "waits for the mbarrier at"),
            ("b64 _, [%r3], 512;", "b64 _, [%r3], 256;", any, ""),
            ("b64 _, [%r3], 512;", "b64 _, [%r3], 768;", any, ""),
            ("mov.b16 %h1, 3;", "mov.b16 %h1, 1;", any, ""),
            ("mov.b16 %h1, 3;", "mov.b16 %h1, 7;", &[Rule::Trap], "a multicast to CTAs 0b111 of a cluster of 2"),
            ("[%bar+16], 2;", "[%bar+16], 1;", any, ""),
            ("release.cluster.shared::cluster", "release.cta.shared::cluster", &[Rule::Race], "cp.async.bulk.tensor"),
            (
                "[%r4], [%map, {0, %r7}]",
                "[%r4+128], [%map, {0, %r7}]",
                &[Rule::Misaligned],
                "expected a multiple of 1024",
            ),
            ("[%r4], [%map, {0, %r7}]", "[%r4], [%map+64, {0, %r7}]", &[Rule::Trap, Rule::OutOfBounds], "tensor map"),
            ("[%r4], [%map, {0, %r7}]", "[%r4], [%map+32, {0, %r7}]", &[Rule::Misaligned], "a tensor map at"),
        ],
    );
    let rows = &run.input[..1536];
    assert_eq!((&out[..1536], &out[1536..]), (rows, rows));
    run.notices_removals(MULTICAST, &[]);
    // CUTLASS arrives at other CTAs without naming a scope.
    run.passes(&MULTICAST.replace("arrive.release.cluster.shared::cluster", "arrive.shared::cluster"));
    // Handed back before it was read.
    let early = MULTICAST.replace(arrive, "").replace("    ld.shared.v4", &format!("    setp.lt.u32 %p5, %r6, 2;\n add.u32 %r18, %r3, 16;\n mapa.shared::cluster.u32 %r19, %r18, %r6;\n {arrive}\n    ld.shared.v4"));
    let early = early
        .replace("mapa.shared::cluster.u32 %r19, %r18, %r6;\n @", "@%p5 mapa.shared::cluster.u32 %r19, %r18, %r6;\n @");
    run.reports(&early, &[Rule::Race], "ld.shared.v4");
    // Leaving while the other CTA still copies here or arrives here.
    run.reports(&MULTICAST.replace("DONE:\n    barrier.cluster.arrive;\n    barrier.cluster.wait;", "DONE:"), any, "");
}

/// `cp.async.bulk` and `cp.reduce.async.bulk` from one CTA's shared memory to another's.
#[test]
fn copies_between_ctas() {
    let body = "
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %tile, %r1;
    mad.lo.u32 %r9, %k, 100, %t;
    st.shared.u32 [%r2], %r9;
    st.shared.u32 [%r2+1024], 7;
    fence.proxy.async.shared::cta;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%bar], 1;
    fence.mbarrier_init.release.cluster;
READY:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    @%p1 bra WAIT;
    xor.b32 %r3, %k, 1;
    mapa.shared::cluster.u32 %r4, %tile, %r3;
    mapa.shared::cluster.u32 %r5, %bar, %r3;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r4+2048], [%tile], 256, [%r5];
    cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32 [%r4+1024], [%tile], 256, [%r5];
WAIT:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
    ld.shared.u32 %r6, [%r2+2048];
    ld.shared.u32 %r7, [%r2+1024];
    mad.lo.u32 %r8, %k, 64, %t;
    mul.wide.u32 %rd1, %r8, 8;
    add.s64 %rd1, %out, %rd1;
    st.global.v2.u32 [%rd1], {%r6, %r7};
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ret;";
    let run = Run { out_bytes: 1024, ..pair() };
    let out = words(&run.twins(
        body,
        &[
            ("fence.proxy.async.shared::cta;", "", &[Rule::Race], "generic proxy only"),
            ("256, [%r5];", "256, [%bar];", &[Rule::Trap], "are in different CTAs"),
            (
                "    barrier.cluster.arrive;\n    barrier.cluster.wait;\n    @%p1",
                "    bar.sync 0;\n    @%p1",
                &[Rule::Race, Rule::MbarrierMisuse],
                "",
            ),
        ],
    ));
    for i in 0..128 {
        let theirs = 100 * (1 - i as u32 / 64) + i as u32 % 64;
        assert_eq!(out[2 * i..2 * i + 2], [theirs, 7 + theirs]);
    }
}

/// `st.async` and `red.async`: values for the other CTA, waited for at its mbarrier.
#[test]
fn values_are_stored_asynchronously() {
    let body = "
    shl.b32 %r1, %t, 3;
    add.u32 %r2, %tile, %r1;
    st.shared.u32 [%r2+4096], 5;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared.b64 [%bar], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 768;
READY:
    barrier.cluster.arrive;
    barrier.cluster.wait;
    xor.b32 %r3, %k, 1;
    mapa.shared::cluster.u32 %r4, %r2, %r3;
    mapa.shared::cluster.u32 %r5, %bar, %r3;
    mad.lo.u32 %r6, %k, 100, %t;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%r4], {%r6, %t}, [%r5];
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r4+4096], %r6, [%r5];
WAIT:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%bar], 0;
    @!%p2 bra WAIT;
    ld.shared.v2.u32 {%r7, %r8}, [%r2];
    ld.shared.u32 %r9, [%r2+4096];
    mad.lo.u32 %r10, %k, 64, %t;
    mul.wide.u32 %rd1, %r10, 16;
    add.s64 %rd1, %out, %rd1;
    st.global.v4.u32 [%rd1], {%r7, %r8, %r9, %r10};
    ret;";
    // A CTA may exit once everything that is sent to it has been waited for.
    let any: &[Rule] =
        &[Rule::Race, Rule::Uninitialised, Rule::Deadlock, Rule::MbarrierMisuse, Rule::AsyncLeft, Rule::OutOfBounds];
    let run = Run { out_bytes: 2048, ..pair() };
    let out = words(&run.twins(
        body,
        &[
            ("[%bar], 768;", "[%bar], 512;", any, ""),
            ("[%bar], 768;", "[%bar], 1024;", &[Rule::Deadlock], "256 bytes expected"),
            ("{%r6, %t}, [%r5];", "{%r6, %t}, [%bar];", &[Rule::Trap], "are in different CTAs"),
            ("[%r4], {", "[%r4+4], {", &[Rule::Misaligned], "8 bytes at"),
        ],
    ));
    for i in 0..128u32 {
        let theirs = 100 * (1 - i / 64) + i % 64;
        assert_eq!(out[4 * i as usize..][..4], [theirs, i % 64, 5 + theirs, i]);
    }
    run.notices_removals(body, &[]);
}
