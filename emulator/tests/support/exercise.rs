//! Any text: shared with the fuzzer's target `launch`.

use ptx_emulator::{Device, Launch, Memory, Module, Options, Timing};

/// Parses, and launches each kernel there is with few instructions: that it comes back is what counts. Whether one ran to
/// its end.
pub fn exercise(text: &str, seed: u64) -> bool {
    let Ok(module) = Module::parse(text) else { return false };
    let mut ran = false;
    let options = Options {
        seed,
        device: Device { sms: 1, ..Device::default() },
        copies: [Timing::Eager, Timing::Lazy, Timing::Mixed][seed as usize % 3],
        patience: 400,
        limit: 3000,
        ..Options::default()
    };
    for kernel in module.kernels() {
        let Some(info) = module.kernel_info(kernel) else { continue };
        let Some(end) = info.parameters.last().map(|last| (last.offset + last.bytes) as usize) else { continue };
        if end > 4096 {
            continue;
        }
        let mut memory = Memory::new();
        let buffer = memory.alloc("buffer", 4096);
        memory.write(buffer, &[1; 2048]).expect("in range");
        let params: Vec<u8> = buffer.to_le_bytes().into_iter().cycle().take(end).collect();
        let launch =
            Launch { kernel, grid: [1; 3], cluster: [1; 3], block: [64, 1, 1], shared_bytes: 256, params: &params };
        // Most are reports; none is a panic.
        ran |= module.launch(&mut memory, &launch, &options).map_err(|report| report.to_string()).is_ok();
    }
    ran
}
