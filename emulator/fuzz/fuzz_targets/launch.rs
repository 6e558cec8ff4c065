//! Any text that parses: its kernels run a few thousand instructions.
#![no_main]

#[path = "../../tests/support/exercise.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|text: &str| {
    // As many timings of copies as there are.
    exercise::exercise(text, text.len() as u64);
});
