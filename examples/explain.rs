//! Says which kernel, tiles, grid and workspace a call would get on a GPU, and why. No GPU is needed.
//!
//! ```text
//! cargo run --example explain -- --m 8192 --n 4096 --k 4096 --r 16 --gpu h200
//! ```

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use fused_lora::plan::{Device, Family, Options, Params, Plan};
use fused_lora::{Accumulate, Dtype, raw, split_columns};
use serde_json::json;

const HELP: &str = "\
Usage: explain --m M --n N --k K --r R --gpu GPU [--dtype bf16|f16] [--full] [--op forward|backward]
               [--family F] [--tile T] [--cluster C] [--bundle U] [--chunks C] [--group-m G] [--json]

Prints the plan of one call for contiguous, aligned matrices: x is M x K, w is N x K, a is R x K, b is N x R.

  --m, --n, --k  tokens, output features, input features
  --r            rank; 0 for the plain product
  --gpu GPU      one of the GPUs below
  --dtype DTYPE  storage type, default bf16
  --full         a and b in f32, used at more than 16-bit precision
  --op OP        default forward; backward computes dx, da and db, the last two in f32
  --family F     portable or sm90, instead of the faster one by the planner's model
  --tile T       large or small (portable); 256, 192 or 128 columns (sm90)
  --cluster C    CTAs per cluster: 1 or 2 (sm90)
  --bundle U     units of h or dh that a ticket hands out at most (sm90)
  --chunks C     most chunks in which da and db reduce over tokens (sm90)
  --group-m G    blocks of rows (sm90: groups of them) that pass over w together
  --json         the plan as one JSON object
  -h, --help     this text

Exit status: 0 the plan is printed; 1 the planner refuses the call, and says why; 3 wrong usage.
";

/// The command line, understood.
struct Arguments {
    m: usize,
    n: usize,
    k: usize,
    r: usize,
    device: Device,
    dtype: Dtype,
    full: bool,
    backward: bool,
    json: bool,
    options: Options,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Usage(#[from] lexopt::Error),
    #[error("`--{0}` is missing; see --help")]
    Missing(&'static str),
    #[error("`--gpu` is {got}, expected one of {}", gpus())]
    Gpu { got: String },
    #[error("{0}")]
    Refused(#[from] fused_lora::Error),
    #[error("cannot write the plan: {0}")]
    Output(#[from] std::io::Error),
}

impl Failure {
    fn exit_status(&self) -> u8 {
        match self {
            Self::Refused(_) => 1,
            Self::Usage(_) | Self::Missing(_) | Self::Gpu { .. } | Self::Output(_) => 3,
        }
    }
}

fn gpus() -> String {
    Device::names().collect::<Vec<_>>().join(", ")
}

fn parse(arguments: Vec<OsString>) -> Result<Option<Arguments>, Failure> {
    use lexopt::prelude::{Long, Short, ValueExt};
    let (mut m, mut n, mut k, mut r, mut gpu) = (None, None, None, None, None);
    let (mut dtype, mut full, mut backward, mut json) = (Dtype::Bf16, false, false, false);
    let mut options = Options::default();
    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("m") => m = Some(parser.value()?.parse()?),
            Long("n") => n = Some(parser.value()?.parse()?),
            Long("k") => k = Some(parser.value()?.parse()?),
            Long("r") => r = Some(parser.value()?.parse()?),
            Long("gpu") => gpu = Some(parser.value()?.string()?),
            Long("dtype") => {
                dtype = parser.value()?.parse_with(|name| match name {
                    "bf16" => Ok(Dtype::Bf16),
                    "f16" => Ok(Dtype::F16),
                    "f32" => Ok(Dtype::F32), // the planner says why not
                    _ => Err("expected bf16 or f16"),
                })?;
            }
            Long("full") => full = true,
            Long("op") => {
                backward = parser.value()?.parse_with(|name| match name {
                    "forward" => Ok(false),
                    "backward" => Ok(true),
                    _ => Err("expected forward or backward"),
                })?;
            }
            Long("family") => options.family = Some(parser.value()?.parse()?),
            Long("tile") => options.tile = Some(parser.value()?.parse()?),
            Long("cluster") => options.cluster = Some(parser.value()?.parse()?),
            Long("bundle") => options.bundle = Some(parser.value()?.parse()?),
            Long("chunks") => options.chunks = Some(parser.value()?.parse()?),
            Long("group-m") => options.group_m = Some(parser.value()?.parse()?),
            Long("json") => json = true,
            Long("help") | Short('h') => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    let gpu = gpu.ok_or(Failure::Missing("gpu"))?;
    Ok(Some(Arguments {
        m: m.ok_or(Failure::Missing("m"))?,
        n: n.ok_or(Failure::Missing("n"))?,
        k: k.ok_or(Failure::Missing("k"))?,
        r: r.ok_or(Failure::Missing("r"))?,
        device: Device::named(&gpu).ok_or(Failure::Gpu { got: gpu })?,
        dtype,
        full,
        backward,
        json,
        options,
    }))
}

/// Hands out made-up addresses: aligned as an allocator would, one matrix after the other. The planner never follows them.
struct Addresses {
    next: u64,
}

impl Addresses {
    fn matrix(&mut self, rows: usize, cols: usize, element_bytes: usize) -> raw::Matrix {
        let matrix = raw::Matrix::new(self.next, rows, cols);
        // A matrix beyond the address space stays the last one; the planner refuses it.
        let bytes = (rows as u64).saturating_mul(cols as u64).saturating_mul(element_bytes as u64);
        let end = self.next.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(256));
        self.next = end.unwrap_or(self.next);
        matrix
    }
}

fn plan(arguments: &Arguments) -> Result<Plan, fused_lora::Error> {
    let &Arguments { m, n, k, r, ref device, dtype, full, backward, options, .. } = arguments;
    let mut addresses = Addresses { next: 256 };
    let of_factors = if full { 4 } else { dtype.size() };
    let (a, b) = (addresses.matrix(r, k, of_factors), addresses.matrix(n, r, of_factors));
    let mut matrix = |rows, cols| addresses.matrix(rows, cols, dtype.size());
    let (x, w) = (matrix(m, k), matrix(n, k));
    if !backward {
        let (y, variant) = (matrix(m, n), raw::Variant::default());
        let op = raw::Forward { dtype, x, w, f32_factors: full, a, b, scale: 1.0, bias: None, h: None, y, variant };
        return Plan::forward_with(&op, device, options);
    }
    let columns = if full && dtype != Dtype::F32 { split_columns(r) } else { r };
    let (dy, h, dx) = (matrix(m, n), matrix(m, columns), matrix(m, k));
    let mut gradient = |rows, cols| raw::Gradient { matrix: addresses.matrix(rows, cols, 4), f32: true };
    let op = raw::Backward {
        dtype,
        dy,
        w,
        f32_factors: full,
        a,
        b,
        scale: 1.0,
        x: Some(x),
        h: Some(h),
        dx: Some(dx),
        da: Some(gradient(r, k)),
        db: Some(gradient(n, r)),
        dbias: None,
        dm: None,
        accumulate: Accumulate::default(),
        variant: raw::Variant::default(),
    };
    Plan::backward_with(&op, device, options)
}

fn print(arguments: &Arguments, out: &mut dyn Write) -> Result<(), Failure> {
    let plan = plan(arguments)?;
    if !arguments.json {
        out.write_all(plan.explain().as_bytes())?;
        return Ok(());
    }
    let Arguments { m, n, k, r, device, dtype, full, backward, .. } = arguments;
    // Past every matrix: a workspace lies on no argument.
    let launch = plan.launch(1 << 63, plan.workspace_bytes())?;
    let floor = plan.floor();
    // (units of h or dh per ticket, chunks), which the portable kernels have or not.
    let (bundle, chunks) = match &launch.params {
        Params::Forward(_) | Params::Merge(_) | Params::Round(_) | Params::Gain(_) => (None, None),
        Params::Backward(p) => (None, Some(p.chunks)),
        Params::Sm90Forward(p) => (Some(p.h_units.div_ceil(p.h_tickets.max(1))), None),
        Params::Sm90Backward(p) => (Some(p.dh_units.div_ceil(p.dh_tickets.max(1))), Some(p.chunks)),
    };
    let object = json!({
        "op": if *backward { "backward" } else { "forward" },
        "dtype": dtype.name(),
        "f32_factors": full,
        "m": m,
        "n": n,
        "k": k,
        "r": r,
        "gpu": device.name,
        "arch": device.arch,
        "sms": device.sms,
        "family": match plan.family() {
            Family::Portable => "portable",
            Family::Sm90 => "sm90",
        },
        "bundle": bundle,
        "chunks": chunks,
        "predicted_us": plan.predicted_microseconds(),
        "flops": floor.flops,
        "bytes": floor.bytes,
        "floor_arithmetic_us": floor.arithmetic_microseconds(),
        "floor_memory_us": floor.memory_microseconds(),
        "image": launch.image,
        "kernel": launch.kernel,
        "grid": launch.grid,
        "cluster": launch.cluster,
        "block": launch.block,
        "shared_bytes": launch.shared_bytes,
        "workspace_bytes": plan.workspace_bytes(),
        "explain": plan.explain(),
    });
    writeln!(out, "{object}")?;
    Ok(())
}

/// The whole program, with its streams as arguments; returns the exit status.
pub fn run(arguments: Vec<OsString>, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let result = match parse(arguments) {
        Ok(Some(arguments)) => print(&arguments, out),
        Ok(None) => write!(out, "{HELP}\nGPUs: {}\n", gpus()).map_err(Failure::Output),
        Err(failure) => Err(failure),
    };
    match result {
        Ok(()) => 0,
        Err(failure) => {
            // Nowhere is left to report a broken stderr to; the exit status still tells.
            let _ = writeln!(err, "explain: {failure}");
            failure.exit_status()
        }
    }
}

#[allow(dead_code)] // the tests include this file and call `run`
fn main() -> ExitCode {
    let arguments = std::env::args_os().skip(1).collect();
    ExitCode::from(run(arguments, &mut std::io::stdout().lock(), &mut std::io::stderr().lock()))
}
