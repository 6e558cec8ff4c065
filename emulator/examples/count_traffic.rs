//! What two ways of summing rows read: once per thread from global memory, or once per CTA through shared memory.
//!
//! `cargo run -p ptx-emulator --example count_traffic`

use ptx_emulator::{Counters, Launch, Memory, Module, Options};

/// Each of 64 threads sums the same 64 numbers.
fn kernel(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry sum(.param .u64 in, .param .u64 out)\n{{
    .reg .pred %p<2>;
    .reg .b32 %r<8>;
    .reg .f32 %f<3>;
    .reg .b64 %rd<5>;
    .shared .align 4 .b8 tile[256];
    ld.param.u64 %rd1, [in];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    mov.u32 %r2, tile;
    mad.lo.u32 %r3, %r1, 4, %r2;
    mov.f32 %f1, 0f00000000;
    mov.u32 %r4, 0;
{body}
    add.s64 %rd2, %rd2, %rd3;
    st.global.f32 [%rd2], %f1;
    ret;\n}}"
    )
}

const GLOBAL: &str = "
AGAIN:
    ld.global.f32 %f2, [%rd1];
    add.f32 %f1, %f1, %f2;
    add.s64 %rd1, %rd1, 4;
    add.u32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, 64;
    @%p1 bra AGAIN;";

const SHARED: &str = "
    ld.global.f32 %f2, [%rd4];
    st.shared.f32 [%r3], %f2;
    bar.sync 0;
AGAIN:
    ld.shared.f32 %f2, [%r2];
    add.f32 %f1, %f1, %f2;
    add.u32 %r2, %r2, 4;
    add.u32 %r4, %r4, 1;
    setp.lt.u32 %p1, %r4, 64;
    @%p1 bra AGAIN;";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for (name, body) in [("from global memory", GLOBAL), ("through shared memory", SHARED)] {
        let module = Module::parse(&kernel(body))?;
        let mut memory = Memory::new();
        let (input, output) = (memory.alloc("in", 256), memory.alloc("out", 256));
        memory.write(input, &(0..64u8).flat_map(|i| f32::from(i).to_le_bytes()).collect::<Vec<_>>())?;
        let params: Vec<u8> = [input, output].into_iter().flat_map(u64::to_le_bytes).collect();
        let launch = Launch {
            kernel: "sum",
            grid: [1; 3],
            cluster: [1; 3],
            block: [64, 1, 1],
            shared_bytes: 0,
            params: &params,
        };
        let counters = module.launch(&mut memory, &launch, &Options::default())?;
        assert_eq!(memory.read(output, 4)?, 2016f32.to_le_bytes());
        let Counters { instructions, global_loaded, shared_loaded, .. } = counters;
        println!(
            "{name}: {instructions} instructions, {global_loaded} bytes global, {shared_loaded} bytes shared loaded"
        );
    }
    Ok(())
}
