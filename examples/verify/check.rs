//! Runs a case in every mode and measures every result.

use std::time::Duration;

use fused_lora::{Element, bf16, f16};
use safetensors::Dtype;

use super::backend::{Backend, Form, Forms, Kind, Problem, Runner, Values};
use super::case::Case;
use super::failure::{Failure, Outcome};
use super::measure::{self, Error};
use super::tensors::Tensor;

/// A recorded way of computing the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    name: &'static str,
    /// The mode that holds the truth for this one.
    truth: &'static str,
    storage: fused_lora::Dtype,
    /// The adapter is kept in f32 (`A_f32`, `B_f32`) and rounded to the storage type for the products.
    f32_adapter: bool,
}

const MODES: [Mode; 4] = [
    Mode { name: "f32", truth: "f64", storage: fused_lora::Dtype::F32, f32_adapter: false },
    Mode { name: "bf16", truth: "f64", storage: fused_lora::Dtype::Bf16, f32_adapter: false },
    Mode { name: "f16", truth: "f64", storage: fused_lora::Dtype::F16, f32_adapter: false },
    Mode { name: "bf16_amp", truth: "f64_a32", storage: fused_lora::Dtype::Bf16, f32_adapter: true },
];

/// Recorded modes that need more than 16 bits of an adapter beside a 16-bit base.
const FULL_PRECISION: [&str; 2] = ["bf16_a32", "f16_a32"];

/// One result held to its bound.
pub struct Row {
    pub name: String,
    pub mode: &'static str,
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    /// Against the float64 truth.
    pub error: Error,
    pub bound: Error,
    /// Against the very tensor that PEFT computed in this mode; no farther than both errors together allow.
    pub from_peft: Error,
    pub from_peft_bound: Error,
    pub time: Duration,
}

impl Row {
    pub fn ok(&self) -> bool {
        self.error.within(self.bound) && self.from_peft.within(self.from_peft_bound)
    }
}

/// Everything a case gave.
pub struct Report {
    pub case: String,
    pub dimensions: [usize; 4],
    pub rows: Vec<Row>,
    /// Recorded modes that were left out, and why.
    pub left_out: Vec<(String, &'static str)>,
}

impl Report {
    pub fn outcome(&self) -> Outcome {
        if self.rows.iter().all(Row::ok) { Outcome::Within } else { Outcome::Exceeded }
    }
}

/// Runs every recorded mode that the backend computes.
pub fn run(case: &Case, backend: &Backend) -> Result<Report, Failure> {
    match &backend.kind {
        Kind::Cpu(runner) => run_on(case, runner),
        #[cfg(feature = "cuda")]
        Kind::Cuda(runner) => run_on(case, runner),
        #[cfg(feature = "cuda")]
        Kind::Emulator(runner) => run_on(case, runner),
    }
}

fn run_on(case: &Case, runner: &impl Runner) -> Result<Report, Failure> {
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    for name in case.modes.iter().filter(|name| !name.starts_with("f64")) {
        match MODES.iter().find(|mode| mode.name == name) {
            Some(mode) if runner.computes(mode.storage) => match mode.storage {
                fused_lora::Dtype::F32 => rows.extend(run_mode::<f32>(case, runner, *mode)?),
                fused_lora::Dtype::Bf16 => rows.extend(run_mode::<bf16>(case, runner, *mode)?),
                fused_lora::Dtype::F16 => rows.extend(run_mode::<f16>(case, runner, *mode)?),
            },
            Some(_) => left_out.push((name.clone(), "the backend computes in 16 bits only")),
            None if FULL_PRECISION.contains(&name.as_str()) => {
                left_out.push((name.clone(), "needs f32 adapters at full precision, which is not built yet"));
            }
            None => left_out.push((name.clone(), "unknown mode")),
        }
    }
    if rows.is_empty() {
        let recorded = if case.modes.is_empty() { "none".into() } else { case.modes.join(", ") };
        let problem = format!("a recorded mode that the {} backend computes (recorded: {recorded})", runner.name());
        return Err(Failure::NotBuilt(problem));
    }
    Ok(Report { case: case.name.clone(), dimensions: [case.m, case.n, case.k, case.info.r], rows, left_out })
}

fn run_mode<T: Element>(case: &Case, runner: &impl Runner, mode: Mode) -> Result<Vec<Row>, Failure> {
    let failed = |error| Failure::Backend { backend: runner.name(), error };
    let (n, k, r) = (case.n, case.k, case.info.r);
    let problem = problem::<T>(case, mode)?;
    let adapter = |what| format!("{}.{what}", case.info.name);
    let outputs = [
        ("y".into(), case.token_shape(n)),
        ("dX".into(), case.token_shape(k)),
        (adapter("dA"), vec![r, k]),
        (adapter("dB"), vec![n, r]),
        ("db".into(), vec![n]),
    ];
    let recorded: Vec<Option<Recorded<'_>>> =
        outputs.iter().map(|(what, shape)| Recorded::find(case, mode, what, shape)).collect::<Result<_, _>>()?;
    if recorded.iter().all(Option::is_none) {
        let problem = format!("holds no result of mode `{}`, which case.json lists", mode.name);
        return Err(Failure::malformed("tensors.safetensors", problem));
    }
    // A gradient is computed in the type PEFT recorded it in.
    let form = |at: usize| match &recorded[at] {
        Some(recorded) if recorded.peft.dtype == Dtype::F32 && T::DTYPE != fused_lora::Dtype::F32 => Form::F32,
        _ => Form::Storage,
    };
    let forms = Forms { da: form(2), db: form(3), dbias: recorded[4].as_ref().map(|_| form(4)) };
    let forward = runner.forward(&problem).map_err(failed)?;
    let backward = runner.backward(&problem, &forward.h, forms).map_err(failed)?;
    let results = [
        Some(widened(&forward.y)),
        Some(widened(&backward.dx)),
        Some(values(&backward.da)),
        Some(values(&backward.db)),
        backward.dbias.as_ref().map(values),
    ];
    let mut rows = Vec::new();
    for (at, ((name, shape), result)) in outputs.into_iter().zip(results).enumerate() {
        if let (Some(recorded), Some((dtype, result))) = (&recorded[at], result) {
            let time = if at == 0 { forward.time } else { backward.time };
            rows.push(recorded.row(case, mode, name, shape, dtype, &result, time));
        }
    }
    Ok(rows)
}

/// The inputs of the case, rounded to `T` as PEFT rounds them in this mode.
fn problem<T: Element>(case: &Case, mode: Mode) -> Result<Problem<T>, Failure> {
    let (n, k, r) = (case.n, case.k, case.info.r);
    let narrow = |values: &[f64]| values.iter().map(|&value| T::from_f64(value)).collect::<Vec<T>>();
    let (a, b) = if mode.f32_adapter {
        let matrix = |what, shape: [usize; 2]| case.adapter_tensor(what, &shape).map(|tensor| narrow(&tensor.data));
        (matrix("A_f32", [r, k])?, matrix("B_f32", [n, r])?)
    } else {
        (narrow(&case.adapter.a), narrow(&case.adapter.b))
    };
    Ok(Problem {
        m: case.m,
        n,
        k,
        r,
        scale: case.info.scaling as f32,
        x: narrow(&case.tensors.expect("x", &case.token_shape(k))?.data),
        w: narrow(&case.w),
        a,
        b,
        bias: case.bias.as_deref().map(narrow),
        dy: narrow(&case.tensors.expect("dY", &case.token_shape(n))?.data),
    })
}

fn widened<T: Element>(values: &[T]) -> (Dtype, Vec<f64>) {
    let dtype = match T::DTYPE {
        fused_lora::Dtype::F16 => Dtype::F16,
        fused_lora::Dtype::Bf16 => Dtype::BF16,
        fused_lora::Dtype::F32 => Dtype::F32,
    };
    (dtype, values.iter().map(|value| value.to_f64()).collect())
}

fn values<T: Element>(values: &Values<T>) -> (Dtype, Vec<f64>) {
    match values {
        Values::Storage(values) => widened(values),
        Values::F32(values) => widened(values),
    }
}

/// What PEFT recorded of one result: in the mode itself, and the truth.
struct Recorded<'a> {
    peft: &'a Tensor,
    truth: &'a Tensor,
}

impl<'a> Recorded<'a> {
    fn find(case: &'a Case, mode: Mode, what: &str, shape: &[usize]) -> Result<Option<Self>, Failure> {
        let name = format!("{}/{what}", mode.name);
        if case.tensors.get(&name).is_none() {
            return Ok(None);
        }
        let peft = case.tensors.expect(&name, shape)?;
        let truth = case.tensors.expect(&format!("{}/{what}", mode.truth), shape)?;
        Ok(Some(Self { peft, truth }))
    }

    #[allow(clippy::too_many_arguments)]
    fn row(
        &self,
        case: &Case,
        mode: Mode,
        name: String,
        shape: Vec<usize>,
        dtype: Dtype,
        result: &[f64],
        time: Duration,
    ) -> Row {
        let truth = &self.truth.data;
        let measured = measure::error(&self.peft.data, truth);
        let peft =
            case.recorded_error(mode.name, &name).map_or(measured, |(relative, largest)| Error { relative, largest });
        let bound = measure::bound(peft, truth, mode.storage);
        // The triangle inequality, with a little room because the norm divided by is that of PEFT's tensor.
        let from_peft_bound = Error {
            relative: 1.05 * (bound.relative + peft.relative),
            largest: 1.0001 * (bound.largest + peft.largest),
        };
        Row {
            error: measure::error(result, truth),
            bound,
            from_peft: measure::error(result, &self.peft.data),
            from_peft_bound,
            name,
            mode: mode.name,
            shape,
            dtype,
            time,
        }
    }
}
