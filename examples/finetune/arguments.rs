//! The command line of `finetune`.

use std::ffi::OsString;
use std::path::PathBuf;

use candle_core::DType;

use super::common::adapters::{PROBABILITY, Start, Targets, is_probability};
use super::common::failure::{Failure, Result};
use super::common::flags::{self, Place};
use super::optimizer::{Rule, Settings};

pub const HELP: &str = "\
Usage: finetune --model DIR --data FILE --out DIR [OPTION...]

Trains a LoRA adapter for a model of the Llama architecture in Hugging Face's format, and saves it in PEFT's.

  --model DIR         config.json, model.safetensors (or its index and parts), tokenizer.json; without a tokenizer.json
                      each byte is a token
  --data FILE         text, cut into pieces of SEQ tokens that are shuffled anew each epoch; or a .safetensors with
                      `input_ids` [steps, batch, seq] (and `labels`, -100 ignored), which are used as they are, in order
  --out DIR           receives adapter_config.json, adapter_model.safetensors, checkpoint.safetensors, loss.csv, loss.svg

  --targets T         modules to adapt: names such as q_proj,v_proj (the default), or all-linear
  --rank R            default 8
  --alpha ALPHA       scale = ALPHA / R; default 16
  --rslora            scale = ALPHA / √R
  --dora              with a magnitude for each output of a layer, trained as well; without dropout
  --dropout P         in training, elements of the adapters' inputs are dropped with this probability; default 0
  --full-precision    beside a model of bf16 or f16 the products read the adapter's f32 values as they are, as PEFT's do by
                      default, to the precision of two 16-bit numbers; without it they are rounded to the model's type
  --init DIR          start from this adapter, with its config: targets, rank, scale and dropout are its own, of which
                      --dropout can change the last; it may bring biases to train, on B (`lora_bias`) or of the model (`bias`)

  --optimizer O       adamw (the default) or sgd, as torch.optim has them
  --lr LR             default 0.0002
  --betas B1,B2       of adamw, default 0.9,0.999
  --eps EPS           of adamw, default 1e-8
  --momentum MU       of sgd, default 0
  --weight-decay WD   default 0.01 with adamw, where it is decoupled; 0 with sgd

  --steps N           default 100, or as many as are recorded
  --batch N           sequences per step, default 4
  --seq N             tokens per sequence, default 128
  --accumulate N      batches per step, default 1: their gradients are added up in f32, each batch weighed by its labels
  --seed N            of the adapter's first values, of the order of the data and of dropout, default 0
  --dtype DTYPE       of the model: f32 (the default on a CPU), bf16 (the default on a GPU) or f16; the adapter is
                      trained in f32
  --device DEVICE     cpu or cuda; default: cuda where the build has it and there is a GPU

  --checkpoint N      save every N steps, default 100; 0: at the end and on Ctrl-C only
  --resume            continue from DIR/checkpoint.safetensors with the same flags, to the same bits as without the pause
  --json              one JSON object per step on stdout: step (from 0), loss (before the step), grad_norm,
                      tokens_per_second
  -h, --help          this text

Exit status: 0 done; 1 training failed or an output could not be written; 2 the model or the adapter needs something that
is not built yet; 3 wrong usage, or a file that cannot be read; 130 stopped by Ctrl-C, everything saved: --resume goes on.
";

/// The command line, understood.
pub struct Arguments {
    pub model: PathBuf,
    pub data: PathBuf,
    pub out: PathBuf,
    pub adapter: Start,
    pub full_precision: bool,
    pub optimizer: Settings,
    pub steps: Option<usize>,
    pub batch: Option<usize>,
    pub seq: Option<usize>,
    pub accumulate: usize,
    pub seed: u64,
    /// None: what suits the device.
    pub dtype: Option<DType>,
    pub place: Place,
    pub checkpoint: usize,
    pub resume: bool,
    pub json: bool,
}

/// The flags of one optimiser or the other.
#[derive(Default)]
struct OptimizerFlags {
    sgd: bool,
    lr: Option<f64>,
    betas: Option<(f64, f64)>,
    eps: Option<f64>,
    momentum: Option<f64>,
    weight_decay: Option<f64>,
}

/// None when only the help is asked for.
pub fn parse(arguments: Vec<OsString>) -> Result<Option<Arguments>> {
    use lexopt::prelude::{Long, Short};
    let (mut model, mut data, mut out) = (None, None, None);
    let (mut adapter, mut optimizer) = (Start::default(), OptimizerFlags::default());
    let (mut steps, mut batch, mut seq, mut seed, mut accumulate) = (None, None, None, 0, 1);
    let (mut dtype, mut place, mut checkpoint) = (None, Place::Any, 100);
    let (mut full_precision, mut resume, mut json) = (false, false, false);
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("model") => model = Some(flags::path(&mut parser)?),
            Long("data") => data = Some(flags::path(&mut parser)?),
            Long("out") => out = Some(flags::path(&mut parser)?),
            Long("targets") => adapter.targets = Some(targets(&mut parser)?),
            Long("rank") => adapter.rank = Some(bounded(&mut parser, "rank")?),
            Long("alpha") => {
                adapter.alpha = Some(flags::number(&mut parser, "alpha", "a positive number", |a| a > 0.0)?)
            }
            Long("rslora") => adapter.rslora = true,
            Long("dora") => adapter.dora = true,
            Long("dropout") => {
                adapter.dropout = Some(flags::number(&mut parser, "dropout", PROBABILITY, is_probability)?);
            }
            Long("full-precision") => full_precision = true,
            Long("init") => adapter.init = Some(flags::path(&mut parser)?),
            Long(flag @ ("optimizer" | "lr" | "betas" | "eps" | "momentum" | "weight-decay")) => {
                let flag = flag.to_owned();
                optimizer.read(&flag, &mut parser)?;
            }
            Long("steps") => steps = Some(flags::count(&mut parser, "steps", 1)?),
            Long("batch") => batch = Some(flags::count(&mut parser, "batch", 1)?),
            Long("seq") => seq = Some(flags::count(&mut parser, "seq", 2)?),
            Long("accumulate") => accumulate = bounded(&mut parser, "accumulate")?,
            Long("seed") => seed = flags::seed(&mut parser)?,
            Long("dtype") => dtype = Some(flags::dtype(&mut parser)?),
            Long("device") => place = Place::read(&mut parser)?,
            Long("checkpoint") => checkpoint = flags::count(&mut parser, "checkpoint", 0)?,
            Long("resume") => resume = true,
            Long("json") => json = true,
            Long("help") | Short('h') => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(Arguments {
        model: model.ok_or_else(|| flags::missing("model"))?,
        data: data.ok_or_else(|| flags::missing("data"))?,
        out: out.ok_or_else(|| flags::missing("out"))?,
        adapter,
        full_precision,
        optimizer: optimizer.settings()?,
        steps,
        batch,
        seq,
        accumulate,
        seed,
        dtype,
        place,
        checkpoint,
        resume,
        json,
    }))
}

/// A number that multiplies what is made before anything of the model is.
fn bounded(parser: &mut lexopt::Parser, flag: &str) -> Result<usize> {
    const MOST: usize = 1 << 16;
    flags::value(parser, flag, &format!("a whole number of at least 1 and at most {MOST}"), |text| {
        text.parse().ok().filter(|rank| (1..=MOST).contains(rank))
    })
}

fn targets(parser: &mut lexopt::Parser) -> Result<Targets> {
    flags::value(parser, "targets", "all-linear, or names of modules with commas between them", |text| {
        if text == "all-linear" {
            return Some(Targets::AllLinear);
        }
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        (!names.iter().any(String::is_empty)).then_some(Targets::Names(names))
    })
}

impl OptimizerFlags {
    fn read(&mut self, flag: &str, parser: &mut lexopt::Parser) -> Result<()> {
        const NOT_NEGATIVE: &str = "a number of at least 0";
        let not_negative = |number: f64| number >= 0.0;
        match flag {
            "optimizer" => {
                self.sgd = flags::value(parser, flag, "adamw or sgd", |text| match text {
                    "adamw" => Some(false),
                    "sgd" => Some(true),
                    _ => None,
                })?;
            }
            "betas" => {
                let pair = |text: &str| {
                    let (first, second) = text.split_once(',')?;
                    let pair = (flags::finite(first)?, flags::finite(second)?);
                    [pair.0, pair.1].iter().all(|beta| (0.0..1.0).contains(beta)).then_some(pair)
                };
                self.betas = Some(flags::value(parser, flag, "two numbers of [0, 1) such as 0.9,0.999", pair)?);
            }
            "lr" => self.lr = Some(flags::number(parser, flag, NOT_NEGATIVE, not_negative)?),
            "eps" => self.eps = Some(flags::number(parser, flag, NOT_NEGATIVE, not_negative)?),
            "momentum" => self.momentum = Some(flags::number(parser, flag, NOT_NEGATIVE, not_negative)?),
            _ => self.weight_decay = Some(flags::number(parser, flag, NOT_NEGATIVE, not_negative)?),
        }
        Ok(())
    }

    fn settings(self) -> Result<Settings> {
        let of_other = |flag: &str, other: &str| {
            let this = if self.sgd { "sgd" } else { "adamw" };
            Err(Failure::Usage(format!("`--{flag}` is given with `--optimizer {this}`, expected {other}")))
        };
        let rule = if self.sgd {
            if self.betas.is_some() {
                return of_other("betas", "adamw");
            }
            if self.eps.is_some() {
                return of_other("eps", "adamw");
            }
            Rule::Sgd { momentum: self.momentum.unwrap_or(0.0) }
        } else {
            if self.momentum.is_some_and(|momentum| momentum != 0.0) {
                return of_other("momentum", "sgd");
            }
            let (beta1, beta2) = self.betas.unwrap_or((0.9, 0.999));
            Rule::AdamW { beta1, beta2, eps: self.eps.unwrap_or(1e-8) }
        };
        let weight_decay = self.weight_decay.unwrap_or(if self.sgd { 0.0 } else { 0.01 });
        Ok(Settings { rule, lr: self.lr.unwrap_or(2e-4), weight_decay })
    }
}
