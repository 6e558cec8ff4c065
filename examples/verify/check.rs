//! Runs a case in every mode and measures every result.

use std::ops::Range;
use std::time::Duration;

use fused_lora::reference::unit_roundoff;
use fused_lora::{Element, Routing, Slot, bf16, f16};
use safetensors::Dtype;

use super::adapter::Adapter;
use super::backend::{Backend, Backward, Form, Forms, Kind, Norms, OfMagnitude, Problem, Runner, Values};
use super::case::{AdapterInfo, Case};
use super::failure::{Failure, Outcome};
use super::measure::{self, Error};
use super::mode::{Factors, MODES, Mode};
use super::tensors::Tensor;

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
            Some(mode) if runner.computes(mode.storage) => {
                let run = match (mode.storage, mode.factors) {
                    (fused_lora::Dtype::F32, _) => run_mode::<f32, f32>,
                    (fused_lora::Dtype::Bf16, Factors::Full) => run_mode::<bf16, f32>,
                    (fused_lora::Dtype::F16, Factors::Full) => run_mode::<f16, f32>,
                    (fused_lora::Dtype::Bf16, _) => run_mode::<bf16, bf16>,
                    (fused_lora::Dtype::F16, _) => run_mode::<f16, f16>,
                };
                rows.extend(run(case, runner, *mode)?);
            }
            Some(_) => left_out.push((name.clone(), "the backend computes in 16 bits only")),
            None => left_out.push((name.clone(), "unknown mode")),
        }
    }
    if rows.is_empty() {
        let recorded = if case.modes.is_empty() { "none".into() } else { case.modes.join(", ") };
        let problem = format!("a recorded mode that the {} backend computes (recorded: {recorded})", runner.name());
        return Err(Failure::NotBuilt(problem));
    }
    Ok(Report { case: case.name.clone(), dimensions: [case.m, case.n, case.k, case.rank()], rows, left_out })
}

fn run_mode<T: Element, A: Element>(case: &Case, runner: &impl Runner, mode: Mode) -> Result<Vec<Row>, Failure> {
    let failed = |error| Failure::Backend { backend: runner.name(), error };
    let (n, k) = (case.n, case.k);
    let find = |what: String, shape: Vec<usize>| Recorded::find(case, mode, what, shape);
    let (y, dx) = (find("y".into(), case.token_shape(n))?, find("dX".into(), case.token_shape(k))?);
    let dbias = find("db".into(), vec![n])?;
    let mut gradients = Vec::with_capacity(case.adapters.len());
    for Adapter { info: AdapterInfo { name, r, .. }, .. } in &case.adapters {
        let (da, db) = (find(format!("{name}.dA"), vec![*r, k])?, find(format!("{name}.dB"), vec![n, *r])?);
        let (b_bias, magnitude) = (find(format!("{name}.dBbias"), vec![n])?, find(format!("{name}.dm"), vec![n])?);
        gradients.push(Gradients { da, db, b_bias, magnitude });
    }
    let absent = gradients.iter().all(Gradients::is_empty);
    if absent && y.is_none() && dx.is_none() && dbias.is_none() {
        let problem = format!("holds no result of mode `{}`, which case.json lists", mode.name);
        return Err(Failure::malformed("tensors.safetensors", problem));
    }

    // All adapters as one, for what they make together.
    let (problem, parts) = problem::<T, A>(case, mode, runner, &case.adapters)?;
    let forward = runner.forward(&problem).map_err(failed)?;
    let own_bias = gradients.iter().any(|gradients| gradients.b_bias.is_some());
    // DoRA multiplies what stands before it: the gradients of one adapter depend on the others.
    let in_order = case.adapters.len() > 1 && problem.gain.is_some();
    let forms = |Gradients { da, db, .. }: &Gradients<'_>| Forms {
        da: form::<T>(da.as_ref()),
        // Multiplied by a ratio before it is rounded.
        db: if in_order { Form::F32 } else { form::<T>(db.as_ref()) },
        // Multiplied by a scale before it is rounded.
        dbias: if own_bias { Some(Form::F32) } else { dbias.as_ref().map(|dbias| form::<T>(Some(dbias))) },
    };
    let backward = runner.backward(&problem, &forward.h, forms(&gradients[0])).map_err(failed)?;
    let mut rows = Rows { case, mode, rows: Vec::new(), roundoff: unit_roundoff(T::DTYPE) };
    rows.push(y, widened(&forward.y), forward.time);
    rows.push(dx, widened(&backward.dx), backward.time);
    let sums = backward.dbias.as_ref().map(values);
    // DoRA's dz is rounded to the storage type in any case.
    let gradients_roundoff =
        if Problem::<T, A>::is_full() && problem.gain.is_none() { halves(T::DTYPE) } else { rows.roundoff };
    for (at, (gradients, place)) in gradients.into_iter().zip(&parts).enumerate() {
        let adapter = &case.adapters[at];
        // Side by side their scales are one, but for routes and DoRA; else the gradients of each do not depend on the others.
        let shared = case.adapters.len() == 1 || case.routes.is_some() || in_order;
        let own = if shared { None } else { Some(alone::<T, A>(case, runner, mode, adapter, forms(&gradients))?) };
        let (of, r, first) = match &own {
            Some(own) => (own, adapter.info.r, 0),
            None => (&backward, problem.r, place.first),
        };
        let Gradients { da, db, b_bias, magnitude } = gradients;
        let ranks = first..first + adapter.info.r;
        rows.roundoff = gradients_roundoff;
        rows.push(da, part(values(&of.da), k, ranks.start * k..ranks.end * k, 0..k), of.time);
        let (dtype, mut sums_of_b) = part(values(&of.db), r, 0..n * r, ranks);
        if in_order {
            sums_of_b.iter_mut().enumerate().for_each(|(at, sum)| *sum *= place.of_b(at / adapter.info.r));
            rows.push_rounded::<T>(db, sums_of_b, of.time);
        } else {
            rows.push(db, (dtype, sums_of_b), of.time);
        }
        if let Some((_, sums)) = &sums {
            rows.push_rounded::<T>(b_bias, sums.iter().map(|sum| adapter.info.scaling * sum).collect(), backward.time);
        }
        rows.roundoff = unit_roundoff(T::DTYPE);
        if magnitude.is_some() {
            let (dm, time) = of_magnitude::<T, A>(case, runner, mode, (&problem, &forward.y), at)?;
            rows.push_rounded::<T>(magnitude, dm, time);
        }
    }
    if let Some(sums) = sums {
        rows.push(dbias, sums, backward.time);
    }
    Ok(rows.rows)
}

/// The columns of those rows of a matrix of `cols` columns, `rows` given by elements.
fn part(
    (dtype, values): (Dtype, Vec<f64>),
    cols: usize,
    rows: Range<usize>,
    columns: Range<usize>,
) -> (Dtype, Vec<f64>) {
    (dtype, values[rows].chunks(cols).flat_map(|row| &row[columns.clone()]).copied().collect())
}

/// What is recorded of an adapter's gradients: dA, dB, that of B's bias and that of the magnitude.
struct Gradients<'a> {
    da: Option<Recorded<'a>>,
    db: Option<Recorded<'a>>,
    b_bias: Option<Recorded<'a>>,
    magnitude: Option<Recorded<'a>>,
}

impl Gradients<'_> {
    fn is_empty(&self) -> bool {
        [&self.da, &self.db, &self.b_bias, &self.magnitude].into_iter().all(Option::is_none)
    }
}

/// Where an adapter lies among those that are one, and what its B was multiplied by.
struct Place {
    first: usize,
    ratio: f32,
    /// The product of the gains before it.
    earlier: Option<Vec<f32>>,
    /// With its own.
    gain: Option<Vec<f32>>,
}

impl Place {
    /// The factor of a row of B.
    fn of_b(&self, row: usize) -> f64 {
        f64::from(self.ratio) / self.earlier.as_ref().map_or(1.0, |earlier| f64::from(earlier[row]))
    }
}

/// dm of the adapter at `at`: of what it and those before it make, times the gains behind it.
fn of_magnitude<T: Element, A: Element>(
    case: &Case,
    runner: &impl Runner,
    mode: Mode,
    (all, y): (&Problem<T, A>, &[T]),
    at: usize,
) -> Result<(Vec<f64>, Duration), Failure> {
    let failed = |error| Failure::Backend { backend: runner.name(), error };
    let magnitude = magnitude::<T>(case, mode, &case.adapters[at])?.unwrap_or_default();
    if at + 1 == case.adapters.len() {
        let (dm, time) = runner.magnitude(all, &OfMagnitude { y, magnitude: &magnitude }).map_err(failed)?;
        return Ok((dm.into_iter().map(f64::from).collect(), time));
    }
    let (part, places) = problem::<T, A>(case, mode, runner, &case.adapters[..=at])?;
    let y = runner.forward(&part).map_err(failed)?.y;
    let (dm, time) = runner.magnitude(&part, &OfMagnitude { y: &y, magnitude: &magnitude }).map_err(failed)?;
    let gain = |of: Option<&Vec<f32>>, row: usize| of.map_or(1.0, |gain| f64::from(gain[row]));
    let so_far = places.last().and_then(|place| place.gain.as_ref());
    let later = |row| gain(all.gain.as_ref(), row) / gain(so_far, row);
    Ok((dm.iter().enumerate().map(|(row, dm)| f64::from(*dm) * later(row)).collect(), time))
}

/// A gradient is computed in the type PEFT recorded it in.
fn form<T: Element>(recorded: Option<&Recorded<'_>>) -> Form {
    match recorded {
        Some(recorded) if recorded.peft.dtype == Dtype::F32 && T::DTYPE != fused_lora::Dtype::F32 => Form::F32,
        _ => Form::Storage,
    }
}

/// The gradients of one adapter of several, which do not depend on the others.
fn alone<T: Element, A: Element>(
    case: &Case,
    runner: &impl Runner,
    mode: Mode,
    adapter: &Adapter,
    forms: Forms,
) -> Result<Backward<T>, Failure> {
    let failed = |error| Failure::Backend { backend: runner.name(), error };
    let (problem, _) = problem::<T, A>(case, mode, runner, std::slice::from_ref(adapter))?;
    let forward = runner.forward(&problem).map_err(failed)?;
    runner.backward(&problem, &forward.h, forms).map_err(failed)
}

/// Adapters that rows choose among start at multiples of so many ranks, as those of a `Bank`.
const ALIGN: usize = 16;

/// How exact a product of two numbers in halves is, relative to it: B and dh in dA.
fn halves(storage: fused_lora::Dtype) -> f64 {
    if storage == fused_lora::Dtype::F16 { 2f64.powi(-22) } else { 2f64.powi(-16) }
}

/// The inputs of the case with some of its adapters, rounded to `T` as PEFT rounds them in this mode, and the place of each.
/// Several that are summed are side by side under the largest of their scales, the others' B multiplied by what theirs are of it;
/// behind one of DoRA B is divided by the gain, which multiplies everything.
fn problem<T: Element, A: Element>(
    case: &Case,
    mode: Mode,
    runner: &impl Runner,
    adapters: &[Adapter],
) -> Result<(Problem<T, A>, Vec<Place>), Failure> {
    let (n, k) = (case.n, case.k);
    let scales = adapters.iter().map(|adapter| adapter.info.scaling);
    let scale = match case.routes {
        Some(_) => 1.0,
        None => scales.max_by(|one, other| one.abs().total_cmp(&other.abs())).unwrap_or(1.0),
    };
    let (mut a, mut b, mut places, mut slots) = (Vec::new(), vec![Vec::new(); n], Vec::new(), Vec::new());
    let (w, mut gain) = (narrow::<T>(&case.w), None::<Vec<f32>>);
    let mut bias: Option<Vec<f32>> =
        case.bias.as_deref().map(|bias| narrow::<T>(bias).iter().map(|value| value.to_f32()).collect());
    for adapter in adapters {
        let AdapterInfo { r, scaling, .. } = adapter.info;
        let [wide_a, wide_b] = factors(case, mode, adapter)?;
        let first = a.len() / k;
        slots.push(Slot { first_rank: a.len() / k, ranks: r, scale: scaling as f32 });
        a.extend(narrow::<A>(&wide_a));
        let ratio = if scale == 0.0 || case.routes.is_some() { 1.0 } else { (scaling / scale) as f32 };
        let earlier = gain.clone();
        let divisor = |row: usize| earlier.as_ref().map_or(1.0, |earlier| earlier[row]);
        let gap = if case.routes.is_some() { r.next_multiple_of(ALIGN) - r } else { 0 };
        for (row, line) in b.iter_mut().enumerate() {
            let scaled = |value: &f64| A::from_f32(*value as f32 * ratio / divisor(row));
            line.extend(wide_b[row * r..][..r].iter().map(scaled));
            line.extend(vec![A::default(); gap]);
        }
        a.extend(vec![A::default(); gap * k]);
        if let Some(magnitude) = magnitude::<T>(case, mode, adapter)? {
            let f32 = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<f32>>();
            let norms = Norms {
                n,
                k,
                r,
                scale: scaling as f32,
                w: &w,
                a: &f32(&wide_a),
                b: &f32(&wide_b),
                magnitude: &magnitude,
                earlier: earlier.as_deref(),
            };
            let made = runner.gain(&norms);
            gain = Some(made.map_err(|error| Failure::Backend { backend: runner.name(), error })?);
        }
        places.push(Place { first, ratio, earlier, gain: gain.clone() });
        if adapter.b_bias.is_some() {
            let own = b_bias::<T>(case, mode, adapter)?;
            let bias = bias.get_or_insert_with(|| vec![0.0; n]);
            bias.iter_mut().zip(&own).for_each(|(bias, own)| *bias += scaling as f32 * own);
        }
    }
    let routes = match &case.routes {
        Some(ids) => {
            let routing = Routing::new(&slots, ids);
            let routing =
                routing.map_err(|error| Failure::NotBuilt(format!("more than a table of routes: {error}")))?;
            Some(routing.words().to_vec())
        }
        None => None,
    };
    let problem = Problem {
        m: case.m,
        n,
        k,
        r: a.len() / k,
        scale: scale as f32,
        x: narrow(&case.tensors.expect("x", &case.token_shape(k))?.data),
        w,
        a,
        b: b.concat(),
        bias: bias.map(|bias| bias.into_iter().map(T::from_f32).collect()),
        dy: narrow(&case.tensors.expect("dY", &case.token_shape(n))?.data),
        routes,
        gain,
    };
    Ok((problem, places))
}

fn narrow<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&value| T::from_f64(value)).collect()
}

/// A and B as the mode keeps them.
fn factors(case: &Case, mode: Mode, adapter: &Adapter) -> Result<[Vec<f64>; 2], Failure> {
    if mode.factors == Factors::Storage {
        return Ok([adapter.a.clone(), adapter.b.clone()]);
    }
    let recorded =
        |what, shape: [usize; 2]| case.adapter_tensor(adapter, what, &shape).map(|tensor| tensor.data.clone());
    Ok([recorded("A_f32", [adapter.info.r, case.k])?, recorded("B_f32", [case.n, adapter.info.r])?])
}

/// The magnitude, likewise.
fn magnitude<T: Element>(case: &Case, mode: Mode, adapter: &Adapter) -> Result<Option<Vec<f32>>, Failure> {
    if adapter.magnitude.is_none() {
        return Ok(None);
    }
    let recorded = |what| case.adapter_tensor(adapter, what, &[case.n]).map(|tensor| &tensor.data);
    if mode.factors != Factors::Storage {
        return Ok(Some(recorded("m_f32")?.iter().map(|&value| value as f32).collect()));
    }
    Ok(Some(narrow::<T>(recorded("m")?).iter().map(|value| value.to_f32()).collect()))
}

/// The bias on B, likewise.
fn b_bias<T: Element>(case: &Case, mode: Mode, adapter: &Adapter) -> Result<Vec<f32>, Failure> {
    let recorded = |what| case.adapter_tensor(adapter, what, &[case.n]).map(|tensor| &tensor.data);
    if mode.factors != Factors::Storage {
        return Ok(recorded("Bbias_f32")?.iter().map(|&value| value as f32).collect());
    }
    Ok(narrow::<T>(recorded("Bbias")?).iter().map(|value| value.to_f32()).collect())
}

/// Results held to what is recorded of them.
struct Rows<'a> {
    case: &'a Case,
    mode: Mode,
    rows: Vec<Row>,
    /// How exact products are, relative to a number.
    roundoff: f64,
}

impl Rows<'_> {
    /// Rounded to the type that PEFT recorded it in.
    fn push_rounded<T: Element>(&mut self, recorded: Option<Recorded<'_>>, result: Vec<f64>, time: Duration) {
        let Some(recorded) = recorded else { return };
        let result = match form::<T>(Some(&recorded)) {
            Form::F32 => (Dtype::F32, result),
            Form::Storage => widened(&result.into_iter().map(T::from_f64).collect::<Vec<_>>()),
        };
        self.push(Some(recorded), result, time);
    }

    fn push(&mut self, recorded: Option<Recorded<'_>>, (dtype, result): (Dtype, Vec<f64>), time: Duration) {
        let Some(recorded) = recorded else { return };
        let row = recorded.row(self, dtype, &result, time);
        self.rows.push(row);
    }
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
    what: String,
    shape: Vec<usize>,
    peft: &'a Tensor,
    truth: &'a Tensor,
}

impl<'a> Recorded<'a> {
    fn find(case: &'a Case, mode: Mode, what: String, shape: Vec<usize>) -> Result<Option<Self>, Failure> {
        let name = format!("{}/{what}", mode.name);
        if case.tensors.get(&name).is_none() {
            return Ok(None);
        }
        let peft = case.tensors.expect(&name, &shape)?;
        let truth = case.tensors.expect(&format!("{}/{what}", mode.truth), &shape)?;
        Ok(Some(Self { what, shape, peft, truth }))
    }

    fn row(self, &Rows { case, mode, roundoff, .. }: &Rows<'_>, dtype: Dtype, result: &[f64], time: Duration) -> Row {
        let truth = &self.truth.data;
        let measured = measure::error(&self.peft.data, truth);
        let peft = case
            .recorded_error(mode.name, &self.what)
            .map_or(measured, |(relative, largest)| Error { relative, largest });
        let bound = measure::bound(peft, truth, roundoff);
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
            name: self.what,
            mode: mode.name,
            shape: self.shape,
            dtype,
            time,
        }
    }
}
