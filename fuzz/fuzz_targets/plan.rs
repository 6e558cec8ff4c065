//! Any problem for the planner: shapes, strides, addresses, dtype, options and device.
#![no_main]

#[allow(dead_code)] // the tests' own way to say how much it reads
#[path = "../../tests/common/fuzz_plan.rs"]
mod fuzz_plan;
#[allow(dead_code)]
#[path = "../../tests/common/legal/mod.rs"]
mod legal;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz_plan::run(input);
});
