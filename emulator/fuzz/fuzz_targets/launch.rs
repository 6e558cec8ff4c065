//! Any text that parses: its kernels run a few thousand instructions. Start from `emulator/tests/ptx`.
#![no_main]

use ptx_emulator::{Device, Launch, Memory, Module, Options};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(module) = Module::parse(text) else { return };
    let device = Device { sms: 1, ..Device::default() };
    let options = Options { device, patience: 500, limit: 4000, ..Options::default() };
    for kernel in module.kernels() {
        let Some(info) = module.kernel_info(kernel) else { continue };
        let bytes = info.parameters.last().map_or(0, |last| (last.offset + last.bytes) as usize);
        if bytes > 4096 {
            continue;
        }
        let mut memory = Memory::new();
        let buffer = memory.alloc("buffer", 4096).to_le_bytes();
        let params: Vec<u8> = buffer.into_iter().cycle().take(bytes).collect();
        let launch =
            Launch { kernel, grid: [1; 3], cluster: [1; 3], block: [64, 1, 1], shared_bytes: 256, params: &params };
        let _ = module.launch(&mut memory, &launch, &options);
    }
});
