//! Continues a text with a Llama, with or without an adapter.
//!
//! ```text
//! cargo run --release --features candle,peft --example generate -- \
//!     --model tests/golden/peft/llama/base --adapter target/licence --prompt "the License"
//! ```

#[path = "../common/mod.rs"]
#[allow(dead_code)] // `finetune` uses the rest
pub(crate) mod common;
mod sampling;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use common::adapters::Adapter;
use common::config::Config;
use common::failure::{self, Failure, Result};
use common::flags::{self, Place};
use common::llama::{Cache, Changes, Llama};
use common::rng::Rng;
use common::tokens::Tokens;
use common::weights::Weights;
use sampling::Sampling;
use serde_json::json;

const HELP: &str = "\
Usage: generate --model DIR --prompt TEXT [OPTION...]

Continues TEXT with a model of the Llama architecture in Hugging Face's format, and an adapter in PEFT's.

  --model DIR        config.json, model.safetensors (or its index and parts), tokenizer.json; without a tokenizer.json
                     each byte is a token
  --prompt TEXT      what to continue
  --adapter DIR      adapter_config.json and adapter_model.safetensors
  --merged           compute with W + s B A in place of W and the adapter

  --tokens N         how many to add at most, default 64 or what the model has room for; an end-of-text token stops before
  --temperature T    default 0: always the likeliest token
  --top-k K          sample among the K likeliest tokens
  --top-p P          sample among the likeliest tokens that make up the probability P
  --seed N           of the samples, default 0
  --dtype DTYPE      f32 (the default on a CPU), bf16 (the default on a GPU) or f16
  --device DEVICE    cpu or cuda; default: cuda where the build has it and there is a GPU
  --json             one JSON object: prompt, text, tokens (the added ones), tokens_per_second
  -h, --help         this text

Exit status: 0 done; 1 the computation failed or stdout could not be written; 2 the model or the adapter needs something
that is not built yet; 3 wrong usage, or a file that cannot be read.
";

/// The command line, understood.
struct Arguments {
    model: PathBuf,
    prompt: String,
    adapter: Option<PathBuf>,
    merged: bool,
    /// None: 64, or what the model has room for.
    tokens: Option<usize>,
    sampling: Sampling,
    seed: u64,
    dtype: Option<DType>,
    place: Place,
    json: bool,
}

fn parse(arguments: Vec<OsString>) -> Result<Option<Arguments>> {
    use lexopt::prelude::{Long, Short, ValueExt};
    let (mut model, mut prompt, mut adapter, mut merged) = (None, None, None, false);
    let (mut tokens, mut seed, mut dtype, mut place, mut json) = (None, 0, None, Place::Any, false);
    let mut sampling = Sampling { temperature: 0.0, top_k: None, top_p: None };
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("model") => model = Some(flags::path(&mut parser)?),
            Long("prompt") => prompt = Some(parser.value()?.string()?),
            Long("adapter") => adapter = Some(flags::path(&mut parser)?),
            Long("merged") => merged = true,
            Long("tokens") => tokens = Some(flags::count(&mut parser, "tokens", 1)?),
            Long("temperature") => {
                sampling.temperature =
                    flags::number(&mut parser, "temperature", "a number of at least 0", |t| t >= 0.0)?;
            }
            Long("top-k") => sampling.top_k = Some(flags::count(&mut parser, "top-k", 1)?),
            Long("top-p") => {
                let p = flags::number(&mut parser, "top-p", "a number above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
                sampling.top_p = Some(p);
            }
            Long("seed") => seed = flags::seed(&mut parser)?,
            Long("dtype") => dtype = Some(flags::dtype(&mut parser)?),
            Long("device") => place = Place::read(&mut parser)?,
            Long("json") => json = true,
            Long("help") | Short('h') => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    for (flag, given) in [("top-k", sampling.top_k.is_some()), ("top-p", sampling.top_p.is_some())] {
        if given && sampling.temperature == 0.0 {
            let problem = format!("`--{flag}` is given, but `--temperature` is 0, expected above 0 to sample");
            return Err(Failure::Usage(problem));
        }
    }
    if merged && adapter.is_none() {
        return Err(Failure::Usage("`--merged` is given without `--adapter`, expected both".into()));
    }
    let (model, prompt) =
        (model.ok_or_else(|| flags::missing("model"))?, prompt.ok_or_else(|| flags::missing("prompt"))?);
    Ok(Some(Arguments { model, prompt, adapter, merged, tokens, sampling, seed, dtype, place, json }))
}

/// The whole program, with its streams as arguments; returns the exit status.
pub fn run(arguments: Vec<OsString>, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    match try_run(arguments, out, err) {
        Ok(()) => failure::DONE,
        Err(failure) => {
            // Nowhere is left to report a broken stderr to; the exit status still tells.
            let _ = writeln!(err, "generate: {failure}");
            failure.exit_status()
        }
    }
}

fn try_run(arguments: Vec<OsString>, out: &mut dyn Write, err: &mut dyn Write) -> Result<()> {
    let on_stdout = |error| Failure::output("stdout", error);
    let Some(arguments) = parse(arguments)? else {
        return out.write_all(HELP.as_bytes()).map_err(on_stdout);
    };
    let config = Config::read(&arguments.model.join("config.json"))?;
    let tokens = Tokens::open(&arguments.model)?;
    let prompt = prompt(&arguments, &config, &tokens)?;
    let count = count(&arguments, &config, prompt.len())?;
    let device = arguments.place.device()?;
    let model = load(&arguments, &config, &device)?;
    let began = Instant::now();
    let added = continued(&model, &config, (&prompt, count), &arguments, &device)?;
    let tokens_per_second = added.len() as f64 / began.elapsed().as_secs_f64().max(1e-9);
    // Decoded together: a character may begin in the prompt and end behind it.
    let before = tokens.decode(&prompt)?;
    let all = tokens.decode(&[&prompt[..], &added].concat())?;
    let text = all.strip_prefix(&before).unwrap_or(&all);
    if arguments.json {
        let object = json!({
            "prompt": arguments.prompt,
            "text": text,
            "tokens": added,
            "tokens_per_second": tokens_per_second,
        });
        return writeln!(out, "{object}").map_err(on_stdout);
    }
    writeln!(out, "{}{text}", arguments.prompt).map_err(on_stdout)?;
    let line = writeln!(err, "{} tokens, {tokens_per_second:.1} tokens/s", added.len());
    line.map_err(|error| Failure::output("stderr", error))
}

/// How many tokens to add to a prompt of `length`.
fn count(arguments: &Arguments, config: &Config, length: usize) -> Result<usize> {
    let room = config.positions.saturating_sub(length);
    match arguments.tokens {
        None if room > 0 => Ok(room.min(64)),
        Some(tokens) if tokens <= room => Ok(tokens),
        asked => Err(Failure::Usage(format!(
            "`--tokens` is {} after a prompt of {length}, expected at most {} together, the model's max_position_embeddings",
            asked.unwrap_or(1),
            config.positions
        ))),
    }
}

fn prompt(arguments: &Arguments, config: &Config, tokens: &Tokens) -> Result<Vec<u32>> {
    let mut prompt = tokens.encode(arguments.prompt.as_bytes(), "--prompt", config.vocab, true)?;
    if prompt.is_empty() {
        let start = config.start.filter(|&start| (start as usize) < config.vocab);
        prompt.push(start.ok_or_else(|| Failure::Usage("`--prompt` is empty, expected at least one token".into()))?);
    }
    Ok(prompt)
}

fn load(arguments: &Arguments, config: &Config, device: &Device) -> Result<Llama> {
    let dtype = arguments.dtype.unwrap_or(if device.is_cuda() { DType::BF16 } else { DType::F32 });
    let changes = match &arguments.adapter {
        Some(directory) => Adapter::read(directory, config)?.changes(device)?,
        None => Changes::default(),
    };
    let mut model = Llama::load(config, &Weights::open(&arguments.model, dtype, device)?, changes)?;
    if arguments.merged {
        model.merge()?;
    }
    Ok(model)
}

/// At most `count` tokens that follow `prompt`, without the one that ends a text.
fn continued(
    model: &Llama,
    config: &Config,
    (prompt, count): (&[u32], usize),
    arguments: &Arguments,
    device: &Device,
) -> Result<Vec<u32>> {
    let mut cache = Cache::new(config);
    let mut rng = Rng::new(arguments.seed);
    let mut added = Vec::new();
    let mut next = prompt.to_vec();
    while added.len() < count {
        let length = next.len();
        let ids = Tensor::from_vec(next, (1, length), device)?;
        let hidden = model.hidden(&ids, Some(&mut cache), None)?.narrow(1, length - 1, 1)?;
        let logits: Vec<f32> = model.logits(&hidden, None)?.flatten_all()?.to_vec1()?;
        let Some(token) = arguments.sampling.choose(&logits, &mut rng) else {
            return Err(Failure::Diverged { step: added.len(), problem: "no logit is a number".into() });
        };
        if config.ends.contains(&token) {
            break;
        }
        added.push(token);
        next = vec![token];
    }
    Ok(added)
}

#[allow(dead_code)] // the tests include this file and call `run`
fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1).collect();
    ExitCode::from(run(arguments, &mut std::io::stdout().lock(), &mut std::io::stderr().lock()))
}
