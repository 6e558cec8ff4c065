//! Checks the fused operations against layers that HuggingFace PEFT recorded.
//!
//! ```text
//! cargo run --release --example verify -- tests/golden/plain tests/golden/rslora
//! ```
//!
//! Each argument is a case directory: `case.json`, `tensors.safetensors` (inputs, and PEFT's results in several modes) and
//! `adapter/` as PEFT's `save_pretrained` wrote it. Forward and backward run on a backend for every recorded mode that it
//! computes, and each result is held to PEFT's own distance from the float64 truth.

mod adapter;
mod backend;
mod case;
mod check;
mod failure;
mod measure;
mod mode;
mod table;
mod tensors;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use backend::{Backend, Choice};
use case::Case;
use failure::{Failure, Outcome};

const HELP: &str = "\
Usage: verify [--backend cuda|cpu|emulator] [--json] CASE...

Runs fused forward and backward on layers recorded with PEFT and compares every result with the recorded float64 truth.
An error may be 1.5 times PEFT's own, or one rounding of the result's type, whichever is larger.

  CASE               a directory with case.json, tensors.safetensors and adapter/
  --backend BACKEND  default: cuda where there is a GPU, else cpu
  --json             one JSON object per tensor and mode, one per line, instead of a table
  -h, --help         this text

Exit status, the gravest of all cases: 0 every error is within its bound; 1 an error exceeds its bound;
2 a case needs something that is not built yet; 3 wrong usage, or a case that cannot be read.
";

/// The command line, understood.
struct Arguments {
    cases: Vec<PathBuf>,
    backend: Option<Choice>,
    json: bool,
}

fn parse(arguments: Vec<OsString>) -> Result<Option<Arguments>, Failure> {
    use lexopt::prelude::{Long, Short, Value, ValueExt};
    let usage = |error: lexopt::Error| Failure::Usage(error.to_string());
    let mut parsed = Arguments { cases: Vec::new(), backend: None, json: false };
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next().map_err(usage)? {
        match argument {
            Long("backend") => parsed.backend = Some(parser.value().and_then(|v| v.parse()).map_err(usage)?),
            Long("json") => parsed.json = true,
            Long("help") | Short('h') => return Ok(None),
            Value(case) => parsed.cases.push(case.into()),
            other => return Err(usage(other.unexpected())),
        }
    }
    if parsed.cases.is_empty() {
        return Err(Failure::Usage("no case directory is named; see --help".into()));
    }
    Ok(Some(parsed))
}

/// The whole program, with its streams as arguments; returns the exit status.
pub fn run(arguments: Vec<OsString>, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    match try_run(arguments, out, err) {
        Ok(outcome) => outcome.exit_status(),
        Err(failure) => {
            // Nowhere is left to report a broken stderr to; the exit status still tells.
            let _ = writeln!(err, "verify: {failure}");
            failure.outcome().exit_status()
        }
    }
}

fn try_run(arguments: Vec<OsString>, out: &mut dyn Write, err: &mut dyn Write) -> Result<Outcome, Failure> {
    let Some(arguments) = parse(arguments)? else {
        out.write_all(HELP.as_bytes())?;
        return Ok(Outcome::Within);
    };
    let backend = Backend::select(arguments.backend)?;
    if !arguments.json {
        writeln!(out, "backend: {} ({})", backend.name(), backend.why())?;
    }
    let mut outcome = Outcome::Within;
    for path in &arguments.cases {
        let result = Case::load(path).and_then(|case| check::run(&case, &backend));
        match result {
            Ok(report) => {
                if arguments.json {
                    table::json(&report, backend.name(), out)?;
                } else {
                    table::human(&report, out)?;
                }
                outcome = outcome.max(report.outcome());
            }
            Err(Failure::Output(error)) => return Err(Failure::Output(error)),
            Err(failure) => {
                writeln!(err, "verify: {}: {failure}", path.display())?;
                outcome = outcome.max(failure.outcome());
            }
        }
    }
    Ok(outcome)
}

#[allow(dead_code)] // the tests include this file and call `run`
fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1).collect();
    ExitCode::from(run(arguments, &mut std::io::stdout().lock(), &mut std::io::stderr().lock()))
}
