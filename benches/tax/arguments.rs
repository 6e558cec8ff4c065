//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use fused_lora::Dtype;
use fused_lora::plan::Options;
use fused_lora::raw::MAX_PROJECTIONS;

use super::feature::Feature;
use super::report::Op;

pub const HELP: &str = "\
Usage: tax [--m M,..] [--nk NxK,..] [--ranks R,..] [--dtype bf16|f16] [--op forward|backward] [--dropout P | --adapters N | --dora]
           [--full] [--projections P] [--rounds N] [--quick] [--once] [--no-unfused] [--hot]
           [--family F] [--tile T] [--cluster C] [--bundle U] [--chunks C] [--group-m G]
           [--json FILE] [--label TEXT]

The LoRA tax on GPU 0: what forward and backward (dx, da and db) take beside cuBLASLt's x W^T and dy W alone, and beside the same
operations as separate products of cuBLASLt.

  --m M,..       tokens, default 8192
  --nk NxK,..    layers, default 4096x4096,14336x4096,4096x14336,1024x4096,8192x8192
  --ranks R,..   default 16,64,128; the plain product, R = 0, is always there
  --dtype DTYPE  default bf16
  --op OP        only forward or only backward
  --dropout P    on the adapter branch, default 0; separate products, which have none, are left out then
  --adapters N   a batch that goes through N adapters, each of a rank of the row, in runs of equal length; default 1. Separate
                 products are left out for more
  --dora         with a gain, and in backward the gradient of the magnitude; separate products are left out
  --full         a and b in f32, used at more than 16-bit precision, beside any of the others; separate products are left out
  --projections P
                 the layer's N as P projections that share x, each with its own adapter; default 1. The plain product is that
                 of all, separate products are left out for more
  --rounds N     samples of each way, default 40
  --quick        the first layer, 10 rounds, a short warm-up: to see that all runs
  --once         launches each operation of this crate once, in the order of the rows, and times nothing: for a profiler,
                 whose counts benches/peers/dram.py puts beside these rows
  --no-unfused   without the separate products
  --hot          the same buffers every time: what fits in L2 stays there
  --family .. --group-m
                 choices of the planner made by hand, as in the example `explain`
  --json FILE    the same as JSON
  --label TEXT   kept in the JSON: what is other than usual
  -h, --help     this text

Exit status: 0 measured, or no GPU (a line says SKIPPED); 1 something failed; 3 wrong usage.
";

fn check(feature: Feature, layers: &[(usize, usize)]) -> Result<(), lexopt::Error> {
    let asked = [feature.dropout > 0.0, feature.adapters > 1, feature.dora];
    if asked.iter().filter(|asked| **asked).count() > 1 || (feature.adapters > 1 && feature.projections > 1) {
        return Err(
            "--dropout, --adapters and --dora exclude one another, and --adapters excludes --projections".into()
        );
    }
    if feature.projections > MAX_PROJECTIONS {
        return Err(format!("--projections is {}, expected {MAX_PROJECTIONS} at most", feature.projections).into());
    }
    match layers.iter().find(|(n, _)| n % feature.projections != 0) {
        Some((n, _)) => Err(format!("N = {n} cannot be cut into {} projections", feature.projections).into()),
        None => Ok(()),
    }
}

/// The command line, understood.
#[derive(Clone, Debug, PartialEq)]
pub struct Arguments {
    pub tokens: Vec<usize>,
    pub layers: Vec<(usize, usize)>,
    pub ranks: Vec<usize>,
    pub dtype: Dtype,
    pub ops: Vec<Op>,
    pub feature: Feature,
    pub rounds: usize,
    pub quick: bool,
    pub once: bool,
    pub unfused: bool,
    pub hot: bool,
    pub options: Options,
    pub json: Option<PathBuf>,
    pub label: String,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            tokens: vec![8192],
            layers: vec![(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (8192, 8192)],
            ranks: vec![16, 64, 128],
            dtype: Dtype::Bf16,
            ops: vec![Op::Forward, Op::Backward],
            feature: Feature::default(),
            rounds: 40,
            quick: false,
            once: false,
            unfused: true,
            hot: false,
            options: Options::default(),
            json: None,
            label: String::new(),
        }
    }
}

/// `None`: the help is asked for.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Option<Arguments>, lexopt::Error> {
    use lexopt::prelude::{Long, Short, ValueExt};
    let mut parsed = Arguments::default();
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("m") => parsed.tokens = parser.value()?.parse_with(|text| list(text, positive))?,
            Long("nk") => parsed.layers = parser.value()?.parse_with(|text| list(text, layer))?,
            Long("ranks") => parsed.ranks = parser.value()?.parse_with(|text| list(text, positive))?,
            Long("dtype") => {
                parsed.dtype = parser.value()?.parse_with(|name| match name {
                    "bf16" => Ok(Dtype::Bf16),
                    "f16" => Ok(Dtype::F16),
                    _ => Err("expected bf16 or f16"),
                })?;
            }
            Long("op") => {
                parsed.ops = parser.value()?.parse_with(|name| match name {
                    "forward" => Ok(vec![Op::Forward]),
                    "backward" => Ok(vec![Op::Backward]),
                    _ => Err("expected forward or backward"),
                })?;
            }
            Long("dropout") => parsed.feature.dropout = parser.value()?.parse_with(probability)?,
            Long("adapters") => parsed.feature.adapters = parser.value()?.parse_with(positive)?,
            Long("dora") => parsed.feature.dora = true,
            Long("full") => parsed.feature.full = true,
            Long("projections") => parsed.feature.projections = parser.value()?.parse_with(positive)?,
            Long("rounds") => parsed.rounds = parser.value()?.parse_with(positive)?,
            Long("quick") => parsed.quick = true,
            Long("once") => parsed.once = true,
            Long("no-unfused") => parsed.unfused = false,
            Long("hot") => parsed.hot = true,
            Long("family") => parsed.options.family = Some(parser.value()?.parse()?),
            Long("tile") => parsed.options.tile = Some(parser.value()?.parse()?),
            Long("cluster") => parsed.options.cluster = Some(parser.value()?.parse()?),
            Long("bundle") => parsed.options.bundle = Some(parser.value()?.parse()?),
            Long("chunks") => parsed.options.chunks = Some(parser.value()?.parse()?),
            Long("group-m") => parsed.options.group_m = Some(parser.value()?.parse()?),
            Long("json") => parsed.json = Some(parser.value()?.into()),
            Long("label") => parsed.label = parser.value()?.string()?,
            Long("help") | Short('h') => return Ok(None),
            other => return Err(other.unexpected()),
        }
    }
    check(parsed.feature, &parsed.layers)?;
    if parsed.quick {
        parsed.layers.truncate(1);
        parsed.rounds = parsed.rounds.min(10);
    }
    Ok(Some(parsed))
}

fn list<T>(text: &str, item: impl Fn(&str) -> Result<T, &'static str>) -> Result<Vec<T>, &'static str> {
    text.split(',').map(item).collect()
}

fn positive(text: &str) -> Result<usize, &'static str> {
    text.trim().parse().ok().filter(|&number| number != 0).ok_or("expected whole numbers from 1 on")
}

fn probability(text: &str) -> Result<f32, &'static str> {
    text.trim().parse().ok().filter(|p| (0.0..1.0).contains(p)).ok_or("expected 0 or more and less than 1")
}

fn layer(text: &str) -> Result<(usize, usize), &'static str> {
    let (n, k) = text.split_once('x').ok_or("expected N and K as 4096x4096")?;
    Ok((positive(n)?, positive(k)?))
}
