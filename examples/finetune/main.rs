//! Fine-tunes a Llama with LoRA: Hugging Face's model format in, PEFT's adapter format out.
//!
//! ```text
//! cargo run --release --features candle,peft --example finetune -- \
//!     --model tests/golden/peft/llama/base --data LICENSE-APACHE --out target/licence
//! ```

mod arguments;
mod checkpoint;
#[path = "../common/mod.rs"]
#[allow(dead_code)] // `generate` uses the rest
pub(crate) mod common;
pub(crate) mod data;
mod files;
mod history;
mod optimizer;
pub(crate) mod progress;
mod train;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arguments::Arguments;
use candle_core::DType;
use common::adapters::Adapter;
use common::config::Config;
use common::failure::{self, Failure, Result};
use common::linear::fused;
use common::llama::{HEAD, Llama, linear_layers};
use common::tokens::Tokens;
use common::weights::Weights;
use data::{Data, Shape};
use history::{History, Record};
use optimizer::{Optimizer, Rule, Settings};
use progress::{Streams, on_stdout};
use serde_json::{Value, json};
use train::{End, Training};

/// The whole program, with its streams as arguments; returns the exit status. `interrupt` is set by Ctrl-C.
pub(crate) fn run(arguments: Vec<OsString>, interrupt: &AtomicBool, streams: &mut Streams<'_>) -> u8 {
    match try_run(arguments, interrupt, streams) {
        Ok(End::Done) => failure::DONE,
        Ok(End::Interrupted) => failure::INTERRUPTED,
        Err(failure) => {
            // Nowhere is left to report a broken stderr to; the exit status still tells.
            let _ = writeln!(streams.err, "finetune: {failure}");
            failure.exit_status()
        }
    }
}

fn try_run(arguments: Vec<OsString>, interrupt: &AtomicBool, streams: &mut Streams<'_>) -> Result<End> {
    let Some(arguments) = arguments::parse(arguments)? else {
        streams.out.write_all(arguments::HELP.as_bytes()).map_err(on_stdout)?;
        return Ok(End::Done);
    };
    let mut training = prepare(&arguments)?;
    if arguments.resume {
        training.resume()?;
    }
    let steps = steps(&arguments, &training)?;
    introduce(&arguments, &training, streams)?;
    let end = training.run(steps, arguments.json, interrupt, streams)?;
    training.adapter.save(&training.parameters, &arguments.out)?;
    summary(&arguments, &training, end, streams)?;
    Ok(end)
}

/// Everything read and checked, nothing computed yet.
fn prepare(arguments: &Arguments) -> Result<Training> {
    let device = arguments.place.device()?;
    let dtype = arguments.dtype.unwrap_or(if device.is_cuda() { DType::BF16 } else { DType::F32 });
    let config = Config::read(&arguments.model.join("config.json"))?;
    let tokens = Tokens::open(&arguments.model)?;
    let Arguments { batch, seq, seed, .. } = *arguments;
    let data = Data::open(&arguments.data, &tokens, &Shape { batch, seq, seed, vocab: config.vocab })?;
    let weights = Weights::open(&arguments.model, dtype, &device)?;
    // Before factors of the sizes that the configuration claims are made.
    for (name, n, k) in linear_layers(&config).iter().filter(|(name, ..)| name != HEAD || !config.tied) {
        weights.check(&format!("{name}.weight"), &[*n, *k])?;
    }
    let adapter = Adapter::start(&arguments.adapter, &config, (&arguments.model, &weights), seed)?;
    if adapter.dropout() != 0.0 && adapter.is_dora() {
        return Err(Failure::NotBuilt(format!(
            "dropout (of {}) with DoRA; `--dropout 0` trains without",
            adapter.dropout()
        )));
    }
    if adapter.dropout() != 0.0 && !fused(dtype, &device) {
        return Err(Failure::NotBuilt("dropout in f32 on a GPU, where the fused op computes bf16 and f16".into()));
    }
    std::fs::create_dir_all(&arguments.out).map_err(|error| Failure::output(arguments.out.display(), error))?;

    let (mut changes, parameters) = adapter.variables(&device, seed)?;
    changes.lora.values_mut().for_each(|lora| lora.full_precision = arguments.full_precision);
    let model = Llama::load(&config, &weights, changes)?;
    Ok(Training {
        model,
        parameters,
        optimizer: Optimizer::new(arguments.optimizer),
        settings: settings(arguments, dtype, &data, &adapter),
        data,
        accumulate: arguments.accumulate,
        tokens: tokens.name(),
        adapter,
        history: History::default(),
        device,
        out: arguments.out.clone(),
        checkpoint: arguments.checkpoint,
        loss_scale: Training::first_loss_scale(dtype),
    })
}

fn introduce(arguments: &Arguments, training: &Training, streams: &mut Streams<'_>) -> Result<()> {
    let Training { model, parameters, data, device, tokens, .. } = training;
    let (from, dtype, place) =
        (arguments.model.display(), model.dtype().as_str(), if device.is_cuda() { "cuda" } else { "cpu" });
    let (layers, values) =
        (training.adapter.layers(), parameters.iter().map(|one| one.var.elem_count()).sum::<usize>());
    say(
        arguments,
        streams,
        format_args!(
            "{from} in {dtype} on {place}; tokens: {tokens}; data: {}; {values} values in {layers} layers are trained",
            data.describe()
        ),
    )
}

/// What decides the trajectory, by flag.
fn settings(arguments: &Arguments, dtype: DType, data: &Data, adapter: &Adapter) -> Value {
    let Settings { rule, lr, weight_decay } = arguments.optimizer;
    let (optimizer, betas, eps, momentum) = match rule {
        Rule::AdamW { beta1, beta2, eps } => ("adamw", Some([beta1, beta2]), Some(eps), None),
        Rule::Sgd { momentum } => ("sgd", None, None, Some(momentum)),
    };
    json!({
        "--optimizer": optimizer,
        "--lr": lr,
        "--betas": betas,
        "--eps": eps,
        "--momentum": momentum,
        "--weight-decay": weight_decay,
        "--batch": data.batch,
        "--seq": data.seq,
        // As those before these flags were written: without them.
        "--accumulate": Some(arguments.accumulate).filter(|&batches| batches != 1),
        "--dora": Some(adapter.is_dora()).filter(|&is_dora| is_dora),
        "--full-precision": Some(arguments.full_precision).filter(|&full| full),
        "--dropout": Some(adapter.dropout()).filter(|&p| p != 0.0),
        "--seed": arguments.seed,
        "--dtype": dtype.as_str(),
        "--data with digest": format!("{:016x}", data.digest()),
        "an adapter with scales": adapter.scales(),
    })
}

/// How many steps the run has in all.
fn steps(arguments: &Arguments, training: &Training) -> Result<usize> {
    let (batches, accumulate) = (training.data.batches(), arguments.accumulate);
    let recorded = batches.map(|batches| batches / accumulate);
    let steps = arguments.steps.or(recorded).unwrap_or(100);
    if let (Some(recorded), Some(batches)) = (recorded, batches)
        && (steps > recorded || recorded == 0)
    {
        let each = if accumulate == 1 { String::new() } else { format!(" with `--accumulate` {accumulate}") };
        let steps = arguments.steps.unwrap_or(1);
        return Err(Failure::Usage(format!("`--steps` is {steps}{each}, but the data holds {batches} batches")));
    }
    let made = training.history.0.len();
    if made > steps {
        return Err(Failure::Usage(format!("`--steps` is {steps}, but the checkpoint has {made} behind it")));
    }
    Ok(steps)
}

fn summary(arguments: &Arguments, training: &Training, end: End, streams: &mut Streams<'_>) -> Result<()> {
    let records = &training.history.0;
    let tenth = records.len().div_ceil(10);
    let mean = |records: &[Record]| records.iter().map(|record| record.loss).sum::<f64>() / records.len() as f64;
    if let (Some(first), Some(last)) = (records.get(..tenth), records.get(records.len() - tenth..))
        && tenth > 0
    {
        let (from, to, steps) = (mean(first), mean(last), records.len());
        say(
            arguments,
            streams,
            format_args!("loss {from:.4} -> {to:.4}: means of the first and last tenth of {steps} steps"),
        )?;
    }
    let out = arguments.out.display();
    say(arguments, streams, format_args!("adapter, checkpoint and loss curve: {out}"))?;
    if end == End::Interrupted {
        say(arguments, streams, format_args!("stopped by Ctrl-C; the same command with --resume goes on"))?;
    }
    Ok(())
}

/// A line for people: on stdout, or with `--json`, whose stdout is for programs, on stderr.
fn say(arguments: &Arguments, streams: &mut Streams<'_>, line: std::fmt::Arguments<'_>) -> Result<()> {
    let stream: &mut dyn Write = if arguments.json { streams.err } else { streams.out };
    writeln!(stream, "{line}").map_err(on_stdout)
}

/// The program in a process of its own: the real streams, and Ctrl-C.
pub(crate) fn start(arguments: Vec<OsString>) -> u8 {
    let interrupt = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupt);
    // The first Ctrl-C lets the step end and saves; a second one, while that is under way, changes nothing.
    if let Err(error) = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)) {
        eprintln!("finetune: Ctrl-C will not save: {error}");
    }
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let terminal = err.is_terminal();
    run(arguments, &interrupt, &mut Streams { out: &mut out, err: &mut err, terminal })
}

#[allow(dead_code)] // the tests include this file and call `run`
fn main() -> ExitCode {
    ExitCode::from(start(std::env::args_os().skip(1).collect()))
}
