//! The order of `fence.sc` among themselves: what follows from it passes for every seed, what does not is reported for every
//! seed.

mod twins;

use ptx_emulator::Rule;
use twins::*;

/// CTAs of two warps.
const THREE: Run = Run { ctas: 3, threads: 64, ..ONE_WARP };

/// Each thread's word of `in` is `[%rd2]`; the ticket is at `[%in+4092]`. Of the CTA that takes the last one, each thread reads
/// what a thread of another warp and lane has written in each CTA.
const REDUCE: &str = "
    mad.lo.u32 %r1, %c, 64, %t;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd2, %in, %rd1;
    xor.b32 %r2, %t, 33;
    mul.wide.u32 %rd1, %r2, 4;
    add.s64 %rd3, %in, %rd1;
    setp.ne.u32 %p1, %t, 0;
    @!%p1 st.shared.u32 [tile], 0;
    st.global.u32 [%rd2], %t;
    membar.gl;
    bar.sync 0;
    @%p1 bra TAKEN;
    atom.relaxed.gpu.global.add.u32 %r3, [%in+4092], 1;
    st.shared.u32 [tile], %r3;
TAKEN:
    bar.sync 1;
    ld.shared.u32 %r3, [tile];
    membar.gl;
    setp.ne.u32 %p2, %r3, 2;
    @%p2 bra DONE;
    ld.global.u32 %r4, [%rd3];
    ld.global.u32 %r5, [%rd3+256];
    ld.global.u32 %r6, [%rd3+512];
DONE:
    ret;";

const FIRST: &str = "membar.gl;\n    bar.sync 0;";
const SECOND: &str = "membar.gl;\n    setp";

/// As PyTorch's reductions have it: every thread's fences lie outside the barriers around the atomic of one.
#[test]
fn a_reduction_by_the_last_cta() {
    let at = "of `in` at offset";
    THREE.twins(
        REDUCE,
        &[
            // No fence stands beside the atomic in its thread, so that no release pattern and no acquire pattern speaks for
            // the others: without an order of `fence.sc`, which needs two of them of sufficient scope, nothing does.
            (FIRST, "bar.sync 0;", Rule::Race, at),
            (FIRST, "fence.acq_rel.gpu;\n    bar.sync 0;", Rule::Race, at),
            (FIRST, "membar.cta;\n    bar.sync 0;", Rule::Race, at),
            (SECOND, "setp", Rule::Race, at),
            (SECOND, "fence.acq_rel.gpu;\n    setp", Rule::Race, at),
            (SECOND, "fence.sc.cluster;\n    setp", Rule::Race, at),
            // A fence that comes after the barrier in other threads does not help, nor one that comes before the data.
            (FIRST, "bar.sync 0;\n    @%p1 membar.gl;", Rule::Race, at),
            (
                "    st.global.u32 [%rd2], %t;\n    membar.gl;",
                "    membar.gl;\n    st.global.u32 [%rd2], %t;",
                Rule::Race,
                at,
            ),
            (
                SECOND,
                "setp.ne.u32 %p2, %r3, 2;\n    @!%p2 ld.global.u32 %r4, [%rd3];\n    @!%p2 ld.global.u32 %r4, [%rd3+256];\n    membar.gl;\n    setp",
                Rule::Race,
                at,
            ),
            // Barriers put the fences before and after the atomic.
            ("    bar.sync 0;", "    bar.warp.sync -1;", Rule::Race, at),
            ("    bar.sync 0;", "", Rule::Race, at),
            ("    bar.sync 1;", "    bar.warp.sync -1;", Rule::Race, "shared memory at offset 0"),
            // Who does not take the last ticket knows nothing of who comes later, in whichever order they run.
            ("    @%p2 bra DONE;", "", Rule::Race, at),
            ("setp.ne.u32 %p2, %r3, 2", "setp.ne.u32 %p2, %r3, 1", Rule::Race, at),
            ("atom.relaxed.gpu", "atom.relaxed.cta", Rule::Race, "their scopes do not include one another"),
        ],
    );
    THREE.passes(&REDUCE.replace("membar.gl", "fence.sc.gpu"));
    THREE.passes(&REDUCE.replacen("membar.gl", "membar.sys", 1));
    // Once more, and fences that order nothing new: what the first round told is not lost.
    THREE.passes(&REDUCE.replacen(
        FIRST,
        "membar.gl;\n    fence.acq_rel.gpu;\n    bar.sync 2;\n    membar.cta;\n    bar.sync 0;",
        1,
    ));
    // What one thread executes for all, beside its atomic, needs no `.sc`.
    let beside = REDUCE
        .replacen(FIRST, "bar.sync 0;", 1)
        .replacen(SECOND, "setp", 1)
        .replacen("    atom", "    fence.acq_rel.gpu;\n    atom", 1)
        .replacen("[%in+4092], 1;", "[%in+4092], 1;\n    fence.acq_rel.gpu;", 1);
    THREE.passes(&beside);
}

/// The ticket's number is passed on by a flag, instead of the second barrier.
#[test]
fn a_fence_must_be_ordered_after_the_read() {
    let flag = REDUCE
        .replacen("    st.shared.u32 [tile], %r3;", "    add.u32 %r4, %r3, 1;\n    st.release.cta.shared.u32 [tile], %r4;", 1)
        .replacen("    bar.sync 1;\n    ld.shared.u32 %r3, [tile];", "    ld.acquire.cta.shared.u32 %r3, [tile];\n    setp.eq.u32 %p2, %r3, 0;\n    @%p2 bra TAKEN;\n    sub.u32 %r3, %r3, 1;", 1);
    // A relaxed write passes nothing on of what was read before it: no fence of another thread is then after the atomic.
    THREE.twins(
        &flag,
        &[
            ("st.release.cta", "st.relaxed.cta", Rule::Race, "of `in` at offset"),
            (SECOND, "setp", Rule::Race, "of `in` at offset"),
            (SECOND, "fence.acq_rel.gpu;\n    setp", Rule::Race, "of `in` at offset"),
        ],
    );
    // The second fence acquires what the flag released, and with it that the atomic comes before.
    let relaxed = flag.replace("ld.acquire.cta", "ld.relaxed.cta");
    THREE.twins(&relaxed, &[(SECOND, "fence.acq_rel.gpu;\n    setp", Rule::Race, "of `in` at offset")]);
}

/// CTA 0 fences and releases, CTA 1 acquires that and writes, relaxed, CTA 2 reads that and fences.
const PASSED_ON: &str = "
    mul.wide.u32 %rd1, %t, 4;
    add.s64 %rd2, %out, %rd1;
    setp.ne.u32 %p1, %t, 0;
    setp.eq.u32 %p2, %c, 1;
    @%p2 bra MIDDLE;
    setp.eq.u32 %p2, %c, 2;
    @%p2 bra READER;
    st.global.u32 [%rd2], %t;
    fence.sc.gpu;
    bar.sync 0;
    st.global.u32 [%rd2+2048], %t;
    bar.sync 0;
    @%p1 bra DONE;
    st.release.gpu.global.u32 [%in], 1;
    bra DONE;
MIDDLE:
    @%p1 bra DONE;
    ld.acquire.gpu.global.u32 %r4, [%in];
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra MIDDLE;
    st.relaxed.gpu.global.u32 [%in+64], 1;
    bra DONE;
READER:
    @%p1 bra WAITED;
    ld.relaxed.gpu.global.u32 %r4, [%in+64];
    setp.eq.u32 %p3, %r4, 0;
    @%p3 bra READER;
WAITED:
    bar.sync 0;
    fence.sc.gpu;
    xor.b32 %r2, %t, 33;
    mul.wide.u32 %rd1, %r2, 4;
    add.s64 %rd3, %out, %rd1;
    ld.global.u32 %r5, [%rd3];
DONE:
    ret;";

#[test]
fn other_synchronisation_passes_the_order_on() {
    let at = "`ld.global.u32 %r5";
    THREE.twins(
        PASSED_ON,
        &[
            ("    ld.acquire", "    ld.relaxed", Rule::Race, at),
            ("    st.release", "    st.relaxed", Rule::Race, at),
            ("    fence.sc.gpu;\n    bar", "    bar", Rule::Race, at),
            ("    fence.sc.gpu;\n    xor", "    xor", Rule::Race, at),
            ("    fence.sc.gpu;\n    xor", "    fence.acq_rel.gpu;\n    xor", Rule::Race, at),
            // What CTA 0 wrote after its fence.
            ("[%rd3];", "[%rd3+2048];", Rule::Race, at),
            // A store after the one of CTA 1, whose value is read instead.
            (
                "    st.relaxed.gpu.global.u32 [%in+64], 1;",
                "    st.relaxed.gpu.global.u32 [%in+64], 1;\n    st.global.u32 [%in+64], 1;",
                Rule::Race,
                "",
            ),
        ],
    );
    // A fence on the way makes a new beginning: what it knows is known of it.
    THREE.passes(
        &PASSED_ON.replace("    st.relaxed", "    fence.sc.gpu;\n    st.relaxed").replace("[%rd3];", "[%rd3+2048];"),
    );
    // The fence of the thread that reads speaks for itself; for the others once there is a barrier.
    let own =
        PASSED_ON.replace("    fence.sc.gpu;\n    xor", "    xor").replace("WAITED:", "    fence.sc.gpu;\nWAITED:");
    THREE.passes(&own);
}
