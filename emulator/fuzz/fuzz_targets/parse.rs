//! Any text: parsed and decoded, or refused.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = ptx_emulator::Module::parse(text);
});
