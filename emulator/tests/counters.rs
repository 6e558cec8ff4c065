//! Counters: each against a kernel small enough to count by hand.

mod twins;

use ptx_emulator::{Class, Counters, Line};
use twins::*;

fn line<'a>(counters: &'a Counters, opcode: &str) -> &'a Line {
    counters.lines().iter().find(|line| line.instruction.contains(opcode)).expect("the instruction was executed")
}

/// Thread t stores and loads a word at `t << shift`.
fn strided(shift: u32) -> Counters {
    ONE_WARP.counted(&format!(
        "
    shl.b32 %r1, %t, {shift};
    and.b32 %r1, %r1, 1023;
    mov.u32 %r2, tile;
    add.s32 %r1, %r1, %r2;
    st.shared.u32 [%r1], 7;
    bar.warp.sync -1;
    ld.shared.u32 %r3, [%r1];
    ret;"
    ))
}

#[test]
fn bank_conflicts() {
    let free = strided(2);
    assert_eq!((free.wavefronts, free.conflicts), (2, 0));
    // Every other bank, so two words in each.
    let two = strided(3);
    assert_eq!((two.wavefronts, two.conflicts), (4, 2));
    // Eight words, all in bank 0, each for four lanes.
    let eight = strided(7);
    assert_eq!(eight.conflicts, 14);
    let load = line(&eight, "ld.shared");
    assert_eq!((load.executed, load.wavefronts, load.conflicts, load.class), (1, 8, 7, Class::Load));
    assert_eq!(load.ptx_line, 22);
}

/// Rows of 64 bytes: `ldmatrix` and `stmatrix` meet half of the banks, unless the 16-byte columns are swizzled.
#[test]
fn bank_conflicts_of_matrices() {
    let rows = |swizzle: &str| {
        ONE_WARP.counted(&format!(
            "
    shl.b32 %r1, %t, 4;
    mov.u32 %r2, tile;
    add.s32 %r3, %r1, %r2;
    cvt.u64.u32 %rd1, %r1;
    add.s64 %rd1, %in, %rd1;
    cp.async.cg.shared.global [%r3], [%rd1], 16;
    cp.async.wait_all;
    bar.warp.sync -1;
    and.b32 %r4, %t, 7;
    shl.b32 %r5, %r4, 6;
    {swizzle}
    add.s32 %r5, %r5, %r2;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r6}}, [%r5];
    bar.warp.sync -1;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r5], {{%r6}};
    ret;"
        ))
    };
    let plain = rows("");
    let ldmatrix = line(&plain, "ldmatrix");
    assert_eq!((ldmatrix.wavefronts, ldmatrix.conflicts, ldmatrix.class), (4, 3, Class::Matrix));
    let stmatrix = line(&plain, "stmatrix");
    assert_eq!((stmatrix.wavefronts, stmatrix.conflicts, stmatrix.class), (4, 3, Class::Matrix));
    let copy = line(&plain, "cp.async.cg");
    assert_eq!((copy.wavefronts, copy.conflicts, copy.sectors, copy.least_sectors), (4, 0, 16, 16));
    assert_eq!(plain.copied, 512);
    let swizzled = rows("shr.u32 %r6, %r4, 1;\n and.b32 %r6, %r6, 3;\n shl.b32 %r6, %r6, 4;\n xor.b32 %r5, %r5, %r6;");
    assert_eq!(line(&swizzled, "ldmatrix").conflicts, 0);
    assert_eq!(line(&swizzled, "stmatrix").conflicts, 0);
}

#[test]
fn sectors_and_bytes_by_level() {
    let copy = |bytes: u32| {
        ONE_WARP.counted(&format!(
            "
    mul.wide.u32 %rd1, %t, {bytes};
    add.s64 %rd2, %in, %rd1;
    add.s64 %rd3, %out, %rd1;
    ld.global.u32 %r1, [%rd2];
    st.global.u32 [%rd3], %r1;
    ret;"
        ))
    };
    let dense = copy(4);
    assert_eq!((dense.sectors, dense.global_loaded, dense.global_stored), (8, 128, 128));
    assert_eq!(dense.param_loaded, 32 * 16);
    assert_eq!(line(&dense, "ld.global").least_sectors, 4);
    let sparse = copy(64);
    assert_eq!((line(&sparse, "ld.global").sectors, line(&sparse, "ld.global").least_sectors), (32, 4));
}

#[test]
fn instructions_by_kind() {
    let body = "
    setp.ge.u32 %p1, %t, 32;
    bar.sync 0;
    @%p1 bra DONE;
    red.relaxed.gpu.global.add.u32 [%in], 1;
DONE:
    ret;";
    let counters = TWO_WARPS.counted(body);
    assert_eq!((counters.barriers, counters.atomics), (2, 32));
    assert_eq!(counters.mix[&Class::Atomic], 1);
    assert_eq!(counters.mix[&Class::Barrier], 2);
    // Two parameters in each warp.
    assert_eq!(counters.mix[&Class::Load], 4);
    assert_eq!(counters.mix.values().sum::<u64>(), counters.instructions);
    assert_eq!(line(&counters, "red").executed, 1);
}
