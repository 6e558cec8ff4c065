//! `cargo test -p ptx-emulator --test wgmma_speed -- --ignored --nocapture`

use std::time::Instant;

use ptx_emulator::{Launch, Memory, Module, Options, Timing};

/// A loop of sixteen steps along K, four to a group, as a main loop has them.
fn kernel(swizzled_mn: bool, ab: &str) -> Module {
    let d: Vec<String> = (0..128).map(|i| format!("%d{i}")).collect();
    let (d, zeros) = (d.join(", "), (0..128).map(|i| format!("mov.b32 %d{i}, 0;\n")).collect::<String>());
    let (strides, trans) = if swizzled_mn { (0x4000_0040_0200_0000u64, 1) } else { (0x4000_0040_0001_0000, 0) };
    let mma = |k: u32| {
        let step = if swizzled_mn { 128 * k } else { 2 * k };
        format!(
            "add.s64 %rd3, %rd1, {step};\nadd.s64 %rd4, %rd2, {step};\n\
             wgmma.mma_async.sync.aligned.m64n256k16.f32.{ab}.{ab} {{{d}}}, %rd3, %rd4, 1, 1, 1, {trans}, {trans};\n"
        )
    };
    let steps: String = (0..4).map(mma).collect();
    Module::parse(&format!(
        "
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 tile[];
.visible .entry k(.param .u32 count)
{{
    .reg .pred %p<2>;
    .reg .b32 %d<128>, %r<8>;
    .reg .b64 %rd<8>;
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 4;
    mov.u32 %r3, tile;
    mov.u32 %r4, 0;
FILL:
    add.s32 %r5, %r3, %r2;
    st.shared.v4.u32 [%r5], {{%r4, %r4, %r4, %r4}};
    add.s32 %r2, %r2, 2048;
    setp.lt.u32 %p1, %r2, 81920;
    @%p1 bra FILL;
    fence.proxy.async;
    bar.sync 0;
{zeros}
    shr.u32 %r5, %r3, 4;
    cvt.u64.u32 %rd1, %r5;
    add.s64 %rd1, %rd1, {strides};
    add.s64 %rd2, %rd1, 512;
    ld.param.u32 %r6, [count];
LOOP:
    wgmma.fence.sync.aligned;
{steps}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 1;
    sub.s32 %r6, %r6, 1;
    setp.ne.u32 %p1, %r6, 0;
    @%p1 bra LOOP;
    wgmma.wait_group.sync.aligned 0;
    ret;
}}"
    ))
    .expect("the kernel parses")
}

#[test]
#[ignore = "measures, asserts nothing"]
fn speed() {
    for (name, module) in [
        ("bf16, K-major", kernel(false, "bf16")),
        ("f16, K-major", kernel(false, "f16")),
        ("bf16, MN-major", kernel(true, "bf16")),
    ] {
        for races in [true, false] {
            let time = |count: u32| {
                let params = count.to_le_bytes();
                let launch = Launch {
                    kernel: "k",
                    grid: [1; 3],
                    cluster: [1; 3],
                    block: [128, 1, 1],
                    shared_bytes: 81920,
                    params: &params,
                };
                let checks = ptx_emulator::Checks { races, ..ptx_emulator::Checks::default() };
                let options = Options { checks, copies: Timing::Mixed, ..Options::default() };
                let run = || {
                    let start = Instant::now();
                    module.launch(&mut Memory::new(), &launch, &options).expect("correct");
                    start.elapsed().as_secs_f64()
                };
                // Runs so short that some are not interrupted.
                (0..200).map(|_| run()).fold(f64::MAX, f64::min)
            };
            let each = (time(30) - time(10)) / 80.0 * 1e6;
            println!("wgmma m64n256k16, {name}, races {races}: {each:.1} us");
        }
    }
}
