//! Any text as adapter_config.json.
#![no_main]

#[allow(dead_code)] // half of it is the other target's
#[path = "../../tests/common/fuzz_peft.rs"]
mod fuzz_peft;

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    let _ = fuzz_peft::config(text);
});
