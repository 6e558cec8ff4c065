//! The LoRA tax over cuBLASLt, measured on a GPU: `--help` says what it takes.
//!
//! ```text
//! cargo run --release --example tax -- --json h200.json
//! ```
//!
//! Everything of a shape is timed in turn, round after round, over buffers that together exceed L2 twice, after the clocks have
//! settled; a figure is the median of its rounds, a tax the median of the ratios within a round.

mod arguments;
mod cublaslt;
#[path = "../feature.rs"]
mod feature;
mod gpu;
mod measure;
#[path = "../origin.rs"]
mod origin;
mod report;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use arguments::Arguments;
use fused_lora::Error;
use gpu::Failure;
use report::{Machine, Row};

/// The rows so far as JSON, where that is asked for.
fn save(arguments: &Arguments, machine: &Machine, rows: &[Row]) -> Result<(), Failure> {
    let Some(path) = &arguments.json else { return Ok(()) };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, format!("{:#}\n", report::json(machine, rows)))?;
    Ok(())
}

fn run(arguments: Vec<OsString>) -> Result<u8, Failure> {
    let arguments = match arguments::parse(arguments) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            print!("{}", arguments::HELP);
            return Ok(0);
        }
        Err(error) => {
            eprintln!("tax: {error}");
            return Ok(3);
        }
    };
    let gpu = match gpu::Gpu::new() {
        Ok(gpu) => gpu,
        Err(error @ Error::NoDriver { .. }) => {
            println!("SKIPPED: no GPU, not measured ({error})");
            return Ok(0);
        }
        Err(error) => return Err(error.into()),
    };
    let rival = cublaslt::CublasLt::find();
    match &rival {
        Ok(rival) => println!("cuBLASLt {} from {}", rival.version, rival.path.display()),
        Err(error) => println!("{error}: taxes are over this crate's own plain product"),
    }
    let rival = rival.ok();
    let unknown = || "unknown".to_owned();
    let mut machine = Machine {
        gpu: gpu.name(),
        driver: origin::driver().unwrap_or_else(unknown),
        toolkit: option_env!("FUSED_LORA_NVCC_RELEASE").unwrap_or("unknown").to_owned(),
        cublaslt: rival.as_ref().map(|rival| rival.version.to_string()),
        commit: origin::commit().unwrap_or_else(unknown),
        command: origin::command(),
        date: origin::date().unwrap_or_else(unknown),
        label: arguments.label.clone(),
        settled: true,
    };
    println!("{}, driver {}, nvcc {}, commit {}", machine.gpu, machine.driver, machine.toolkit, machine.commit);
    let mut rows = Vec::new();
    // Before anything is measured: a file that cannot be written is known at once.
    save(&arguments, &machine, &rows)?;
    for &m in &arguments.tokens {
        for &(n, k) in &arguments.layers {
            if arguments.once {
                rows.extend(gpu.once(&arguments, (m, n, k))?);
                save(&arguments, &machine, &rows)?;
                continue;
            }
            let (measured, settled) = gpu.measure(&arguments, rival.as_ref(), (m, n, k))?;
            machine.settled &= settled;
            // As it goes: a run that is cut off has said what it knows.
            println!("\n{}", report::table(&measured).trim_end());
            std::io::stdout().flush()?;
            rows.extend(measured);
            save(&arguments, &machine, &rows)?;
        }
    }
    if arguments.once {
        println!("{} launches, nothing was timed", rows.len());
        return Ok(0);
    }
    println!(
        "\nus: median of {} rounds; spread: 10th to 90th percentile; floor: part of the data sheet's speed; tax: over cuBLASLt's \
         plain product, ours where it is absent.",
        arguments.rounds
    );
    if !machine.settled {
        println!("The clocks had not settled when a measurement began: a small tax says nothing.");
    }
    Ok(0)
}

fn main() -> ExitCode {
    match run(std::env::args_os().skip(1).collect()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tax: {error}");
            ExitCode::FAILURE
        }
    }
}
