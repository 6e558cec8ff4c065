//! What is ordered by observation: words that are written again after others have seen them (PTX ISA, "Release and Acquire
//! Patterns", "Causality Order").

mod twins;

use ptx_emulator::Rule;
use twins::*;

const SIX: Run = Run { ctas: 6, ..ONE_WARP };

/// Every CTA counts; the last one sets the counter back, without a fence: what others did to the counter, and that alone, comes
/// before what follows the atomic that has observed it.
const RESET: &str = "
    mul.wide.u32 %rd1, %c, 64;
    add.s64 %rd2, %in, %rd1;
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    st.global.u32 [%rd2+64], %c;
    atom.relaxed.gpu.global.add.u32 %r1, [%in], 1;
    setp.ne.u32 %p2, %r1, 5;
    @%p2 bra DONE;
    st.global.u32 [%in], 0;
    ld.global.u32 %r2, [%in];
DONE:
    ret;";

#[test]
fn the_last_cta_sets_the_counter_back() {
    SIX.twins(
        RESET,
        &[
            // Not the last one, or not the thread that has seen the others.
            ("%r1, 5;", "%r1, 4;", Rule::Race, "of `in` at offset 0"),
            ("    @%p1 bra DONE;\n    st", "    setp.gt.u32 %p1, %t, 1;\n    @%p1 bra DONE;\n    st", Rule::Race, ""),
            ("    @%p2 bra DONE;\n", "", Rule::Race, "of `in` at offset 0"),
            // An atomic on other bytes has seen nothing.
            (
                "atom.relaxed.gpu.global.add.u32 %r1, [%in], 1",
                "atom.relaxed.cta.global.add.u32 %r1, [%in], 1",
                Rule::Race,
                "",
            ),
            // What came before the others' atomics is not ordered by that.
            (
                "ld.global.u32 %r2, [%in]",
                "ld.global.u32 %r2, [%in+64];\n    ld.global.u32 %r2, [%in+384]",
                Rule::Race,
                "`ld.global.u32 %r2, [%in+",
            ),
        ],
    );
    // By another thread, after a barrier.
    SIX.passes(&RESET.replace("st.global.u32 [%in], 0;", "bar.warp.sync 1;\n    st.global.u32 [%in], 0;"));
    // In many words at once, and with neighbours that are not concerned.
    let words = RESET
        .replace(
            "    setp.ne.u32 %p1, %t, 0;\n    @%p1 bra DONE;\n",
            "    mul.wide.u32 %rd3, %t, 4;\n    add.s64 %rd3, %in, %rd3;\n",
        )
        .replace("    st.global.u32 [%rd2+64], %c;\n", "")
        .replace("[%in]", "[%rd3]");
    SIX.twins(
        &words,
        &[
            ("st.global.u32 [%rd3], 0", "st.global.u32 [%rd3+4], 0", Rule::Race, ""),
            ("%r1, 5;", "%r1, 4;", Rule::Race, "of `in` at offset"),
        ],
    );
}

/// CTA 0 raises a flag; CTA 1 takes it down with a weak store once it has seen it, and raises another one.
const TAKEN_DOWN: &str = "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    setp.eq.u32 %p2, %c, 1;
    @%p2 bra SECOND;
    st.global.u32 [%in+256], 7;
    fence.acq_rel.gpu;
    st.relaxed.gpu.global.u32 [%in], 1;
    bra DONE;
SECOND:
    ld.relaxed.gpu.global.u32 %r1, [%in];
    setp.eq.u32 %p3, %r1, 0;
    @%p3 bra SECOND;
    st.global.u32 [%in], 0;
    fence.acq_rel.gpu;
    ld.global.u32 %r2, [%in+256];
DONE:
    ret;";

#[test]
fn a_flag_is_taken_down_by_who_has_seen_it() {
    TWO_CTAS.twins(
        TAKEN_DOWN,
        &[
            ("    ld.relaxed.gpu", "    ld.relaxed.cta", Rule::Race, "of `in` at offset 0"),
            ("    fence.acq_rel.gpu;\n    ld", "    ld", Rule::Race, "`ld.global.u32 %r2, [%in+256]`"),
            ("    fence.acq_rel.gpu;\n    st", "    st", Rule::Race, "`ld.global.u32 %r2, [%in+256]`"),
            // The weak store is not observed by anyone.
            ("    bra DONE;", "    ld.global.u32 %r3, [%in];\n    bra DONE;", Rule::Race, "of `in` at offset 0"),
        ],
    );
}

/// Release by an operation on the location, then a relaxed write to it: CTA 1 sees the second one.
const SECOND_WRITE: &str = "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    setp.eq.u32 %p2, %c, 1;
    @%p2 bra SECOND;
    st.global.u32 [%out], 7;
    st.release.gpu.global.u32 [%in], 1;
    st.global.u32 [%out+4], 7;
    st.relaxed.gpu.global.u32 [%in], 2;
    bra DONE;
SECOND:
    ld.acquire.gpu.global.u32 %r1, [%in];
    setp.ne.u32 %p3, %r1, 2;
    @%p3 bra SECOND;
    ld.global.u32 %r2, [%out];
DONE:
    ret;";

#[test]
fn a_strong_write_follows_a_release_on_its_location() {
    let at = "`ld.global.u32 %r2, [%out";
    TWO_CTAS.twins(
        SECOND_WRITE,
        &[
            ("%r2, [%out]", "%r2, [%out+4]", Rule::Race, at),
            ("st.release.gpu.global.u32 [%in]", "st.release.gpu.global.u32 [%in+4]", Rule::Race, at),
            ("st.release.gpu", "st.release.cta", Rule::Race, ""),
            ("st.relaxed.gpu", "st.relaxed.cta", Rule::Race, ""),
            ("    st.relaxed.gpu.global.u32 [%in], 2", "    st.global.u32 [%in], 2", Rule::Race, ""),
        ],
    );
    // An atomic that has acquired passes on what it knows when its thread sets the word back.
    let counted = RESET
        .replace("atom.relaxed", "atom.acq_rel")
        .replace("    st.global.u32 [%in], 0;", "    st.relaxed.gpu.global.u32 [%in], 9;")
        .replace("    @%p2 bra DONE;", "    @%p2 bra WAIT;")
        .replace(
            "    ld.global.u32 %r2, [%in];\n",
            "    bra DONE;\nWAIT:\n    ld.acquire.gpu.global.u32 %r1, [%in];\n    setp.ne.u32 %p3, %r1, 9;\n    @%p3 bra WAIT;\n\
             \x20   ld.global.u32 %r2, [%in+64];\n    ld.global.u32 %r2, [%in+384];\n",
        );
    SIX.twins(
        &counted,
        &[
            ("ld.acquire", "ld.relaxed", Rule::Race, "`ld.global.u32 %r2, [%in"),
            ("atom.acq_rel", "atom.acquire", Rule::Race, "`ld.global.u32 %r2, [%in"),
            ("atom.acq_rel.gpu", "atom.acq_rel.cta", Rule::Race, ""),
        ],
    );
}

/// A strong read of the flag, and once it has been seen an acquire operation on it, whatever that finds there by then.
const SECOND_READ: &str = "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    setp.eq.u32 %p2, %c, 1;
    @%p2 bra SECOND;
    st.global.u32 [%out], 7;
    st.release.gpu.global.u32 [%in], 1;
    bra DONE;
SECOND:
    ld.relaxed.gpu.global.u32 %r1, [%in];
    setp.eq.u32 %p3, %r1, 0;
    @%p3 bra SECOND;
    st.relaxed.gpu.global.u32 [%in], 0;
    ld.acquire.gpu.global.u32 %r1, [%in];
    ld.global.u32 %r2, [%out];
DONE:
    ret;";

#[test]
fn an_acquire_follows_a_strong_read_of_its_location() {
    let at = "`ld.global.u32 %r2, [%out]`";
    TWO_CTAS.twins(
        SECOND_READ,
        &[
            ("    ld.acquire.gpu.global.u32 %r1, [%in]", "    ld.acquire.gpu.global.u32 %r1, [%in+4]", Rule::Race, at),
            ("    ld.acquire.gpu", "    ld.relaxed.gpu", Rule::Race, at),
            ("    ld.acquire.gpu", "    ld.acquire.cta", Rule::Race, ""),
        ],
    );
    // `red` reads, but does not begin an acquire pattern; `atom` does.
    let read = SECOND_READ.replace(
        "    st.relaxed.gpu.global.u32 [%in], 0;\n    ld.acquire.gpu.global.u32 %r1, [%in];",
        "    fence.acq_rel.gpu;",
    );
    TWO_CTAS.twins(&read, &[("    fence.acq_rel.gpu;\n", "", Rule::Race, at)]);
    let counts = read.replace("    @%p3 bra SECOND;\n", "").replace(
        "    ld.relaxed.gpu.global.u32 %r1, [%in];\n    setp.eq.u32 %p3, %r1, 0;\n",
        "    ld.volatile.global.u32 %r1, [%in];\n    setp.eq.u32 %p3, %r1, 0;\n    @%p3 bra SECOND;\n",
    );
    TWO_CTAS.passes(&counts);
}

/// An atomic whose result nobody looks at has not seen the others: that it came last is chance.
#[test]
fn what_nobody_looks_at_is_not_observed() {
    let unused = RESET.replace("    setp.ne.u32 %p2, %r1, 5;\n    @%p2 bra DONE;\n    st.global.u32 [%in], 0;\n", "");
    SIX.reports(&unused, Rule::Race, "`ld.global.u32 %r2, [%in]`");
    SIX.reports(
        &unused.replace("atom.relaxed.gpu.global.add.u32 %r1,", "red.relaxed.gpu.global.add.u32"),
        Rule::Race,
        "[%in]`",
    );
    // It passes on what came before it, though.
    let counted = RESET.replace(
        "    atom",
        "    setp.eq.u32 %p2, %c, 3;\n    @%p2 bra LAST;\n    red.relaxed.gpu.global.add.u32 [%in], 1;\n    bra DONE;\n\
         LAST:\n    ld.relaxed.gpu.global.u32 %r3, [%in];\n    setp.ne.u32 %p3, %r3, 5;\n    @%p3 bra LAST;\n    atom",
    );
    SIX.twins(&counted, &[("    red.relaxed.gpu", "    red.relaxed.cta", Rule::Race, "of `in` at offset 0")]);
}

/// A fence that acquires or releases only.
#[test]
fn fences_of_one_side() {
    let at = "`ld.global.u32 %r2, [%in+256]`";
    let sides = TAKEN_DOWN
        .replace("    fence.acq_rel.gpu;\n    st", "    fence.release.gpu;\n    st")
        .replace("    fence.acq_rel.gpu;\n    ld", "    fence.acquire.gpu;\n    ld");
    TWO_CTAS.twins(
        &sides,
        &[
            ("fence.release.gpu", "fence.acquire.gpu", Rule::Race, at),
            ("fence.acquire.gpu", "fence.release.gpu", Rule::Race, at),
        ],
    );
}

/// Each CTA counts without looking; the first one looks until all have, and sets the counter back.
#[test]
fn who_polls_has_observed_all() {
    let body = "
    setp.ne.u32 %p1, %t, 0;
    @%p1 bra DONE;
    red.relaxed.gpu.global.add.u32 [%in], 1;
    setp.ne.u32 %p2, %c, 0;
    @%p2 bra DONE;
WAIT:
    ld.relaxed.gpu.global.u32 %r1, [%in];
    setp.ne.u32 %p3, %r1, 6;
    @%p3 bra WAIT;
    st.global.u32 [%in], 0;
DONE:
    ret;";
    SIX.twins(
        body,
        &[
            ("ld.relaxed.gpu", "ld.relaxed.cta", Rule::Race, "of `in` at offset 0"),
            ("    red.relaxed.gpu", "    red.relaxed.cta", Rule::Race, "of `in` at offset 0"),
        ],
    );
}
