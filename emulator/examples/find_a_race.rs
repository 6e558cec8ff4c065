//! A reversal in shared memory with its barrier left out: the report names both sides, whatever the order of events.
//!
//! `cargo run -p ptx-emulator --example find_a_race`

use ptx_emulator::{Launch, Memory, Module, Options, Rule};

const REVERSE: &str = "
.version 8.0
.target sm_80
.address_size 64
.visible .entry reverse(.param .u64 data)
{
    .reg .b32 %r<7>;
    .reg .b64 %rd<4>;
    .shared .align 4 .b8 tile[512];
    ld.param.u64 %rd1, [data];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.u32 %r2, [%rd3];
    mov.u32 %r3, tile;
    mad.lo.u32 %r4, %r1, 4, %r3;
    st.shared.u32 [%r4], 0;
    bar.sync 1;
    st.shared.u32 [%r4], %r2;
    bar.sync 0;
    sub.u32 %r5, 127, %r1;
    mad.lo.u32 %r5, %r5, 4, %r3;
    ld.shared.u32 %r6, [%r5];
    st.global.u32 [%rd3], %r6;
    ret;
}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let without = REVERSE.replace("    bar.sync 0;\n", "");
    for (text, seed) in [(REVERSE, 1), (REVERSE, 2), (&without, 1), (&without, 2)] {
        let module = Module::parse(text)?;
        let mut memory = Memory::new();
        let data = memory.alloc("data", 512);
        memory.write(data, &(0..128u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>())?;
        let launch = Launch {
            kernel: "reverse",
            grid: [1; 3],
            cluster: [1; 3],
            block: [128, 1, 1],
            shared_bytes: 0,
            params: &data.to_le_bytes(),
        };
        match module.launch(&mut memory, &launch, &Options { seed, ..Options::default() }) {
            Ok(_) => {
                assert_eq!(memory.read(data, 4)?, 127u32.to_le_bytes());
                println!("with the barrier, seed {seed}: no rule broken");
            }
            Err(report) => {
                assert_eq!(report.rule, Rule::Race);
                println!("without it, seed {seed}: {report}");
            }
        }
    }
    Ok(())
}
