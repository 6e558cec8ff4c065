//! Bulk copies that feed `wgmma`: each is waited for by its own means, and none needs a proxy fence.

mod support;

use ptx_emulator::Rule;
use support::{Run, warps, words};

/// A stage of 2560 bytes, A (64 x 16) and B (16 x 16) in f16, is filled, multiplied and filled again.
const STAGE: &str = "
    .reg .b32 %d<8>;
    .reg .b64 %da, %db;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%bar], 1;
    fence.mbarrier_init.release.cluster;
READY:
    bar.sync 0;
    shr.u32 %r1, %tile, 4;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %da, %rd1, 0x0000001000080000;
    add.s64 %db, %rd1, 0x0000001000080080;
    mov.b32 %d0, 0;
    mov.b32 %d1, 0;
    mov.b32 %d2, 0;
    mov.b32 %d3, 0;
    mov.b32 %d4, 0;
    mov.b32 %d5, 0;
    mov.b32 %d6, 0;
    mov.b32 %d7, 0;
    mov.u32 %r2, 0;
NEXT:
    @%p1 bra FULL;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 2560;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%tile], [%in], 2560, [%bar];
FULL:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%bar], %r2;
    @!%p2 bra FULL;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%d0, %d1, %d2, %d3, %d4, %d5, %d6, %d7}, %da, %db, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p3, %r2, 2;
    @%p3 bra NEXT;
    mul.wide.u32 %rd2, %t, 4;
    add.s64 %rd3, %out, %rd2;
    st.global.u32 [%rd3], %d0;
    ret;";

fn warpgroup() -> Run {
    Run { input: [0u8, 0x3c].repeat(4096), ..warps(4) }
}

#[test]
fn a_stage_goes_from_bulk_copies_to_wgmma_and_back() {
    let wait = "    @!%p2 bra FULL;\n";
    let out = warpgroup().twins(
        STAGE,
        &[
            // The next contents come while the operation may still read.
            (
                "    wgmma.wait_group.sync.aligned 0;\n    add.u32 %r2, %r2, 1;\n    setp.lt.u32 %p3, %r2, 2;\n    @%p3 bra NEXT;\n",
                "    add.u32 %r2, %r2, 1;\n    setp.lt.u32 %p3, %r2, 2;\n    @%p3 bra NEXT;\n    wgmma.wait_group.sync.aligned 0;\n",
                &[Rule::Race],
                "by wgmma",
            ),
        ],
    );
    // Twice the sum of sixteen products of ones, in every thread.
    assert_eq!(words(&out)[..128], [32f32.to_bits(); 128]);
    warpgroup().reports_some(&STAGE.replace(wait, ""), &[Rule::Race, Rule::Uninitialised, Rule::AsyncLeft]);
    // What the threads themselves write needs the fence, and each other's a barrier.
    let own = "    st.shared.u32 [%r4], 0;\n    fence.proxy.async.shared::cta;\n    bar.sync 0;\n    wgmma.fence";
    let place = "    mov.u32 %r2, 0;\n    shl.b32 %r3, %t, 2;\n    add.u32 %r4, %tile, %r3;\n";
    let written = STAGE.replace("    mov.u32 %r2, 0;\n", place).replace("    wgmma.fence", own);
    // The stage, that threads have written, goes back to a copy: behind a barrier and a fence.
    let written = written.replace("    @%p3 bra NEXT;\n", "    bar.sync 0;\n    @%p3 bra NEXT;\n");
    warpgroup().twins(
        &written,
        &[
            ("    fence.proxy.async.shared::cta;\n", "", &[Rule::Race], "fence.proxy.async is missing"),
            ("    fence.proxy.async.shared::cta;\n", "    fence.proxy.async.global;\n", &[Rule::Race], "is missing"),
            ("    bar.sync 0;\n    wgmma.fence", "    wgmma.fence", &[Rule::Race], "wgmma"),
        ],
    );
}

/// What lanes have fenced each for itself is ordered for one of them by `bar.warp.sync` only.
#[test]
fn a_proxy_fence_orders_no_lanes() {
    let out = support::one_warp().twins(
        "
    shl.b32 %r1, %t, 2;
    add.u32 %r2, %tile, %r1;
    st.shared.u32 [%r2], %t;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    cp.async.bulk.global.shared::cta.bulk_group [%out], [%tile], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
DONE:
    ret;",
        &[
            ("bar.warp.sync -1;", "", &[Rule::Race], "is not ordered after write"),
            ("fence.proxy.async.shared::cta;", "", &[Rule::Race], "is ordered in the generic proxy only"),
        ],
    );
    assert_eq!(words(&out)[..32], (0..32).collect::<Vec<_>>());
}
