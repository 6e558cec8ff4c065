//! A configuration, the header of a safetensors file and its data, with a zero byte between each two.
#![no_main]

#[path = "../../tests/common/fuzz_peft.rs"]
mod fuzz_peft;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = fuzz_peft::adapter(input);
});
