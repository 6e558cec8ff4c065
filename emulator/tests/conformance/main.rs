//! Each instruction through PTX text: parsed, decoded, executed by 32 lanes, and compared with what the PTX ISA says of it.
//!
//! One file per chapter of the ISA, "Instruction Set". The expectations are written here once more, from the ISA and without
//! the emulator's arithmetic; the last test asks for what the decoder takes and no table has.
// A table that cannot be run ends the test.
#![allow(clippy::panic)]

mod harness;

mod compare;
mod control;
mod convert;
mod coverage;
mod extended;
mod float;
mod half_precision;
mod integer;
mod logic;
mod matrix;
mod memory;
mod synchronise;

use harness::Case;

/// All tables.
fn all() -> Vec<Case> {
    [
        integer::cases(),
        extended::cases(),
        float::cases(),
        half_precision::cases(),
        compare::cases(),
        logic::cases(),
        convert::cases(),
    ]
    .concat()
}

#[test]
fn every_table() {
    let cases = all();
    let wrong: Vec<String> = cases.iter().filter_map(|case| case.check().err()).collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
