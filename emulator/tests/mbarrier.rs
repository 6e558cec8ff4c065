//! mbarrier objects: what they count and tell (PTX ISA 9.0, "mbarrier"), and how they must be used.

mod support;

use ptx_emulator::Rule;
use support::{one_warp, warps, words};

/// For thread 0 alone.
fn alone(body: &str) -> String {
    format!("setp.ne.u32 %p7, %t, 0;\n @%p7 bra DONE;\n{body}\nDONE:\n ret;")
}

#[test]
fn mbarriers_count_and_tell_their_state() {
    // "mbarrier.arrive": the state before; "pending_count"; noComplete; drop; complete_tx without a copy.
    let body = alone(
        "
    mbarrier.init.shared.b64 [%bar], 3;
    mbarrier.arrive.shared::cta.b64 %rd1, [%bar];
    mbarrier.pending_count.b64 %r1, %rd1;
    st.global.u32 [%out], %r1;
    mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %rd2, [%bar], 1;
    mbarrier.pending_count.b64 %r1, %rd2;
    st.global.u32 [%out+4], %r1;
    mbarrier.test_wait.shared::cta.b64 %p1, [%bar], %rd1;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out+8], %r1;
    mbarrier.arrive_drop.shared::cta.b64 _, [%bar];
    mbarrier.test_wait.acquire.cta.shared::cta.b64 %p1, [%bar], %rd1;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out+12], %r1;
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%bar], 0;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out+16], %r1;
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%bar], 1;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out+20], %r1;
    mbarrier.arrive.shared::cta.b64 %rd3, [%bar], 2;
    mbarrier.pending_count.b64 %r1, %rd3;
    st.global.u32 [%out+24], %r1;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 64;
    mbarrier.arrive.release.cta.shared::cta.b64 %rd4, [%bar], 2;
    mbarrier.test_wait.shared::cta.b64 %p1, [%bar], %rd4;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out+28], %r1;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%bar], 64;
    mbarrier.try_wait.relaxed.cta.shared::cta.b64 %p1, [%bar], %rd4, 10;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%out+32], %r1;
    mbarrier.inval.shared.b64 [%bar];
    mbarrier.init.shared.b64 [%bar], 1;
    mbarrier.inval.shared.b64 [%bar];
    st.shared.u64 [%bar], %rd4;",
    );
    assert_eq!(one_warp().words(&body)[..9], [3, 2, 0, 1, 1, 0, 2, 0, 1]);
    // A fresh mbarrier: the phase before the first has odd parity and is complete.
    let fresh = alone(
        "mbarrier.init.shared.b64 [%bar], 1;\n mbarrier.try_wait.parity.shared.b64 %p1, [%bar], 1;\n selp.u32 %r1, 1, 0, %p1;\n st.global.u32 [%out], %r1;",
    );
    assert_eq!(one_warp().words(&fresh)[0], 1);
}

#[test]
fn mbarriers_are_used_as_they_must_be() {
    let good = "mbarrier.init.shared.b64 [%bar], 2;\n mbarrier.arrive.shared.b64 %rd1, [%bar];";
    one_warp().passes(&alone(good));
    let misuse: &[Rule] = &[Rule::MbarrierMisuse];
    for (more, rules, says) in [
        ("mbarrier.init.shared.b64 [%bar], 2;", misuse, "initialised again without mbarrier.inval"),
        ("ld.shared.u32 %r1, [%bar+4];", misuse, "a plain access to the mbarrier"),
        ("st.shared.u32 [%bar+4], %t;", misuse, "a plain access to the mbarrier"),
        ("atom.shared.add.u32 %r1, [%bar], 1;", misuse, "a plain access to the mbarrier"),
        ("mbarrier.arrive.shared::cta.b64 _, [%bar], 2;", misuse, "2 arrivals at an mbarrier that expects 1 more"),
        ("mbarrier.arrive.shared::cta.b64 _, [%bar], 0;", misuse, "count 0"),
        ("mbarrier.init.shared.b64 [%bar+8], 0;", misuse, "0 arrivals, expected 1 to 1048575"),
        ("mbarrier.init.shared.b64 [%bar+8], 1048576;", misuse, "1048576 arrivals"),
        ("mbarrier.arrive.shared.b64 %rd1, [%bar+8];", misuse, "no mbarrier has been initialised"),
        ("mbarrier.inval.shared.b64 [%bar+8];", misuse, "no mbarrier"),
        ("mbarrier.test_wait.parity.shared.b64 %p1, [%bar+16], 0;", misuse, "no mbarrier"),
        ("mbarrier.test_wait.parity.shared.b64 %p1, [%bar], 2;", misuse, "phase parity 2"),
        ("mbarrier.expect_tx.shared::cta.b64 [%bar], 1048576;", misuse, "transaction count 1048576 is out of range"),
        ("mbarrier.expect_tx.shared::cta.b64 [%bar], 16;", misuse, "16 bytes expected"),
        ("mbarrier.expect_tx.shared::cta.b64 [%bar], 16;\n mbarrier.inval.shared.b64 [%bar];", misuse, "in use"),
        ("mbarrier.arrive.noComplete.shared.b64 %rd2, [%bar], 1;", misuse, ".noComplete completes the phase"),
        ("mbarrier.arrive.shared.b64 %rd2, [%bar+4];", &[Rule::Misaligned], "an mbarrier of 8 bytes"),
        ("mbarrier.arrive.shared.b64 %rd2, [%bar+65536];", &[Rule::OutOfBounds], "shared address"),
        (
            "mbarrier.arrive.shared.b64 %rd2, [%bar];\n mbarrier.arrive.shared::cta.b64 %rd2, [%bar], 2;\n mbarrier.test_wait.shared.b64 %p1, [%bar], %rd1;",
            misuse,
            "the state is one of phase 0",
        ),
        (
            "WAIT:\n mbarrier.try_wait.shared.b64 %p1, [%bar], %rd1;\n @!%p1 bra WAIT;",
            &[Rule::Deadlock],
            "phase 0, 1 of 2 arrivals pending, 0 bytes expected",
        ),
        (
            "WAIT:\n mbarrier.test_wait.parity.shared.b64 %p1, [%bar], 0;\n @!%p1 bra WAIT;",
            &[Rule::Deadlock],
            "phase 0, 1 of 2 arrivals pending",
        ),
    ] {
        one_warp().reports(&alone(&format!("{good}\n{more}")), rules, says);
    }
    // A wait that polls does not stop what its own thread does later.
    let polls = "mbarrier.test_wait.parity.shared.b64 %p1, [%bar], 0;\n";
    one_warp().passes(&alone(&format!("{good}\n{}mbarrier.arrive.shared.b64 %rd1, [%bar];", polls.repeat(4))));
}

/// Warp 1 waits for a phase; warp 0 ends it and the next two before it lets warp 1 try again.
#[test]
fn a_wait_that_is_lapped_is_reported() {
    let body = "
    setp.ne.u32 %p1, %t, 0;
    @!%p1 mbarrier.init.shared.b64 [%bar], 1;
    bar.sync 0;
    setp.ge.u32 %p2, %t, 32;
    @%p2 bra WAITER;
    bar.sync 1;
    @%p1 bra DONE;
    mbarrier.arrive.shared.b64 %rd1, [%bar];
    mbarrier.arrive.shared.b64 %rd1, [%bar];
    bar.sync 2, 64;
DONE:
    ret;
WAITER:
    mbarrier.test_wait.parity.shared.b64 %p3, [%bar], 0;
    bar.sync 1;
    bar.sync 2, 64;
    mbarrier.test_wait.parity.shared.b64 %p3, [%bar], 0;
    ret;";
    let body = body
        .replace("@%p1 bra DONE;\n    mbarrier.arrive", "@%p1 bra MEET;\n    mbarrier.arrive")
        .replace("bar.sync 2, 64;\nDONE", "MEET:\n bar.sync 2, 64;\nDONE");
    warps(2).reports(&body, &[Rule::MbarrierMisuse], "waits for phase 0, but phase 2 has begun: the wait was lapped");
    warps(2).passes(&body.replacen("    mbarrier.arrive.shared.b64 %rd1, [%bar];\n", "", 1));
}

/// `cp.async.mbarrier.arrive`: 32 lanes bring 16 bytes each, which the other warp reads.
#[test]
fn copies_arrive_at_mbarriers() {
    let body = "
    setp.ne.u32 %p1, %t, 0;
    @!%p1 mbarrier.init.shared.b64 [%bar], 32;
    bar.sync 0;
    setp.ge.u32 %p2, %t, 32;
    and.b32 %r6, %t, 31;
    shl.b32 %r1, %r6, 4;
    add.u32 %r2, %r1, %tile;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd2, %in, %rd1;
    add.s64 %rd3, %out, %rd1;
    @%p2 bra WAIT;
    cp.async.cg.shared.global [%r2], [%rd2], 16;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%bar];
    bra DONE;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p3, [%bar], 0;
    @!%p3 bra WAIT;
    xor.b32 %r2, %r2, 16;
    ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r2];
    st.global.v4.u32 [%rd3], {%r10, %r11, %r12, %r13};
DONE:
    bar.sync 1;
    ret;";
    let out = warps(2).twins(
        body,
        &[
            ("arrive.noinc", "arrive", &[Rule::Deadlock], "32 of 32 arrivals pending"),
            ("[%bar], 32;", "[%bar], 33;", &[Rule::Deadlock], "1 of 33 arrivals pending"),
            ("[%bar], 32;", "[%bar], 31;", &[Rule::MbarrierMisuse, Rule::Race, Rule::Uninitialised], ""),
        ],
    );
    assert_eq!(words(&out)[0], words(&one_warp().input)[4]);
    // Without .noinc each lane adds the arrival that it takes away; the phase needs one of its own.
    let own = body
        .replace("arrive.noinc", "arrive")
        .replace("    bra DONE;\nWAIT", "    mbarrier.arrive.shared.b64 %rd4, [%bar];\n    bra DONE;\nWAIT");
    warps(2).passes(&own);
}
