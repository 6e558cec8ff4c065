//! Runs a kernel of a PTX file on the emulator. `ptx-emulator --help` says how.
#![forbid(unsafe_code)]

// By path, so that the tests, which include the same file, find its modules in the same place.
#[path = "cli.rs"]
mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    ExitCode::from(cli::main(std::env::args_os().skip(1), &mut out, &mut err))
}
