//! f32 factors over a 16-bit layer: how h holds halves, and how exact the results have to be.
//!
//! A number is a high and a low half. Bounds follow from how exact such a pair is; u is the roundoff of the storage type, e that of
//! f32. y and dx: one rounding, u |y|, beside what f32 sums and halves cost.

use fused_lora::reference::{self, Inputs, Mat, unit_roundoff};
use fused_lora::{Dtype, Element};

use super::check::expected_dm;
use super::data::Spec;
use super::{Backend, Host, HostBackward, HostForward, HostGradient};

const E: f64 = 1.0 / (1u64 << 24) as f64;

pub fn is_split<T: Element, A: Element>() -> bool {
    A::DTYPE == Dtype::F32 && T::DTYPE != Dtype::F32
}

/// What low halves are multiplied by.
fn low_scale(dtype: Dtype) -> f64 {
    if dtype == Dtype::F16 { 2048.0 } else { 1.0 }
}

/// The column of the high half of a rank; that of the low one is 8 further.
fn column(rank: usize) -> usize {
    rank / 8 * 16 + rank % 8
}

/// Puts the halves of a number into a row of h.
pub fn set<T: Element>(h: &mut Host<T>, row: usize, rank: usize, value: f32) {
    let high = T::from_f32(value);
    let rest = f64::from(value) - high.to_f64();
    h.set(row, column(rank), high.to_f64());
    h.set(row, column(rank) + 8, if high.to_f64().is_infinite() { 0.0 } else { rest * low_scale(T::DTYPE) });
}

/// h as a number for each rank; the columns that fill up must be zeros.
pub fn whole<T: Element>(h: &Host<T>, r: usize) -> Result<Mat, String> {
    let halves = h.to_mat();
    for (at, &value) in halves.data.iter().enumerate() {
        let col = at % h.cols;
        if col / 16 * 8 + col % 8 >= r && value != 0.0 {
            return Err(format!("h: column {col}, of no rank, holds {value} in row {}", at / h.cols));
        }
    }
    let number = |row: usize, rank: usize| {
        let (high, low) = (halves.at(row, column(rank)), halves.at(row, column(rank) + 8));
        high + low / low_scale(T::DTYPE)
    };
    Ok(Mat::from_fn(h.rows, r, number))
}

/// How exact halves are.
#[derive(Clone, Copy)]
struct Halves {
    /// Relative to the number: the low half has as many bits as the high one.
    relative: f64,
    /// What the smallest low half leaves of a number, as in h and with factors.
    absolute: f64,
    /// The same where low halves are not scaled: h and dh in y and dx.
    unscaled: f64,
    /// Low by low, which is left out.
    left_out: f64,
    roundoff: f64,
}

impl Halves {
    fn of(dtype: Dtype) -> Self {
        let power = |exponent: i32| 2f64.powi(exponent);
        let roundoff = unit_roundoff(dtype);
        if dtype == Dtype::F16 {
            // Half the smallest subnormal is 2^-25.
            let (absolute, unscaled) = (power(-36), power(-25));
            return Self { relative: power(-23), absolute, unscaled, left_out: power(-22), roundoff };
        }
        Self { relative: power(-17), absolute: power(-134), unscaled: power(-134), left_out: power(-16), roundoff }
    }
}

/// A result, and how far from it an implementation may be before its one rounding.
struct Bound {
    truth: Mat,
    before: Mat,
}

fn sums_of_rows(m: &Mat) -> Vec<f64> {
    (0..m.rows).map(|i| (0..m.cols).map(|j| m.at(i, j)).sum()).collect()
}

/// Of h (dh), which is a product of `from` with a factor: what is relative to its magnitude, and what is absolute, row by row.
fn of_middle(halves: Halves, from: &Mat, scale: f64, depth: usize) -> (f64, Vec<f64>) {
    let relative = 2.0 * halves.relative + (depth + 4) as f64 * E;
    (relative, sums_of_rows(from).into_iter().map(|sum| halves.absolute * (1.0 + scale * sum)).collect())
}

/// The adapter's part of y (dx) before its rounding, beside f32 sums: `middle` and `factor` are magnitudes, of h and of B transposed.
fn of_adapter(halves: Halves, middle: &Mat, factor: &Mat, relative: f64, absolute: &[f64], most: f64) -> Mat {
    let product = middle.times(factor);
    let (rows, columns) = (sums_of_rows(middle), sums_of_rows(&factor.transposed()));
    Mat::from_fn(product.rows, product.cols, |i, j| {
        let related = (relative + 2.0 * halves.relative + halves.left_out) * product.at(i, j);
        related + most * ((absolute[i] + 3.0 * halves.unscaled) * columns[j] + 2.0 * halves.absolute * rows[i])
    })
}

/// What routes multiply an element of h and dh by, and the most of all.
fn gate(inputs: &Inputs, i: usize, j: usize) -> f64 {
    inputs.gate.as_ref().map_or(1.0, |gate| gate.at(i, j))
}

fn most_of_gate(magnitudes: &Inputs) -> f64 {
    magnitudes.gate.as_ref().map_or(1.0, |gate| gate.data.iter().fold(0.0f64, |most, &factor| most.max(factor)))
}

fn zeros(rows: usize, cols: usize) -> Mat {
    Mat::from_fn(rows, cols, |_, _| 0.0)
}

/// Holds one output to its bound.
struct Judge<'a, O> {
    name: &'static str,
    before: &'a Host<O>,
    after: &'a Host<O>,
    accumulated: bool,
}

impl<O: Element> Judge<'_, O> {
    fn judge(&self, Bound { truth, before: bound }: Bound) -> Result<(), String> {
        let Self { name, before, after, accumulated } = *self;
        let same = |at: usize| after.data[at].to_f32().to_bits() == before.data[at].to_f32().to_bits();
        if let Some(at) = (0..after.data.len()).find(|&at| !after.is_element(at) && !same(at)) {
            return Err(format!("{name}: position {at} outside the matrix was written ({:?})", after.data[at]));
        }
        let old = if accumulated { before.to_mat() } else { zeros(truth.rows, truth.cols) };
        let truth = truth.plus(&old);
        let (u, tiny) = (unit_roundoff(O::DTYPE), if O::DTYPE == Dtype::F16 { 2f64.powi(-25) } else { 0.0 });
        let (mut square, mut exact, mut rest, mut count) = (0.0, 0.0, 0.0, 0.0);
        for (at, got) in after.to_mat().data.into_iter().enumerate() {
            let (expected, limit) = (truth.data[at], bound.data[at] + E * old.data[at].abs());
            let rounded = O::from_f64(expected).to_f64();
            if !rounded.is_finite() {
                if rounded != got && !(rounded.is_nan() && got.is_nan()) {
                    return Err(format!("{name}: element {at} is {got}, expected {rounded}"));
                }
                continue;
            }
            let error = (got - expected).abs();
            let limit = limit + u * (expected.abs() + limit) + tiny;
            if error.is_nan() || error > limit {
                return Err(format!("{name}: element {at} is {got}, expected {expected} ± {limit:e}"));
            }
            square += error * error;
            exact += expected * expected;
            rest += (limit - u * expected.abs()).powi(2);
            count += 1.0;
        }
        // A rounding is off by up to half a unit, evenly: u / √3 of a number at most, on average; few may be above.
        let norm = u / 3f64.sqrt() * exact.sqrt() * (1.0 + 3.0 / f64::sqrt(count)) + rest.sqrt();
        let error = square.sqrt();
        if error > norm { Err(format!("{name}: error norm {error:e}, expected at most {norm:e}")) } else { Ok(()) }
    }
}

/// What forward made of `before`, held to the oracle.
pub fn judge_forward<T: Element>(before: &HostForward<T, f32>, after: &HostForward<T, f32>) -> Result<(), String> {
    let HostForward { x, w, a, b, scale, bias, h, y, dropout, routes, gain } = before;
    let (m, n, k, r) = (x.rows, w.rows, w.cols, a.rows);
    let inputs = Inputs {
        x: x.to_mat(),
        w: w.to_mat(),
        a: a.to_mat(),
        b: b.to_mat(),
        bias: bias.as_ref().map(Host::to_mat),
        dy: zeros(m, n),
        scale: f64::from(*scale),
        keep: dropout.map(|dropout| dropout.keep(m, k)),
        gate: routes.as_ref().map(|words| reference::gate(words, m, r)),
        gain: gain.as_ref().map(Host::to_mat),
    };
    let halves = Halves::of(T::DTYPE);
    let (truth_h, truth_y) = reference::forward(&inputs);
    let magnitudes = inputs.magnitudes();
    let (size_h, size_y) = reference::forward(&magnitudes);
    let most =
        magnitudes.keep.as_ref().map_or(1.0, |keep| keep.data.iter().fold(0.0f64, |most, &factor| most.max(factor)));
    let (relative, absolute) = of_middle(halves, &magnitudes.x, magnitudes.scale * most * most_of_gate(&magnitudes), k);
    if let (Some(before), Some(after)) = (h, &after.h) {
        // What a row does not keep is zero, and nothing near it.
        let bound = |i, j| if gate(&inputs, i, j) == 0.0 { 0.0 } else { relative * size_h.at(i, j) + absolute[i] };
        let bound = Mat::from_fn(m, r, bound);
        let got = whole(after, r)?;
        for (at, (got, truth)) in got.data.iter().zip(&truth_h.data).enumerate() {
            let is_same = got == truth || (got.is_nan() && truth.is_nan()) || (got - truth).abs() <= bound.data[at];
            // Beyond the largest number of the type.
            let is_beyond = got.is_infinite() && T::from_f64(*truth).to_f64() == *got;
            if !is_same && !is_beyond {
                return Err(format!("h: element {at} is {got}, expected {truth} ± {:e}", bound.data[at]));
            }
        }
        let same = |at: usize| after.data[at].to_f32().to_bits() == before.data[at].to_f32().to_bits();
        if let Some(at) = (0..after.data.len()).find(|&at| !after.is_element(at) && !same(at)) {
            return Err(format!("h: position {at} outside the matrix was written"));
        }
    }
    let adapter = of_adapter(halves, &size_h, &magnitudes.b.transposed(), relative, &absolute, 1.0);
    let gain = |j| magnitudes.gain.as_ref().map_or(1.0, |gain| gain.at(0, j));
    let sums = (2 * k + 3 * r.next_multiple_of(8) + 4) as f64 * E;
    let before = Mat::from_fn(m, n, |i, j| sums * size_y.at(i, j) + gain(j) * adapter.at(i, j));
    Judge { name: "y", before: y, after: &after.y, accumulated: false }.judge(Bound { truth: truth_y, before })
}

/// The truth of backward, and the bounds of dx, da and db.
fn backward_bounds<T: Element>(op: &HostBackward<T, f32>) -> Result<([Bound; 4], [Mat; 2]), String> {
    let HostBackward { dy, w, a, b, scale, x, h, dropout, routes, gain, .. } = op;
    let (m, n, k, r) = (dy.rows, w.rows, w.cols, a.rows);
    let inputs = Inputs {
        x: x.as_ref().map_or_else(|| zeros(m, k), Host::to_mat),
        w: w.to_mat(),
        a: a.to_mat(),
        b: b.to_mat(),
        bias: None,
        dy: dy.to_mat(),
        scale: f64::from(*scale),
        keep: dropout.map(|dropout| dropout.keep(m, k)),
        gate: routes.as_ref().map(|words| reference::gate(words, m, r)),
        gain: gain.as_ref().map(Host::to_mat),
    };
    let h = h.as_ref().map_or_else(|| Ok(zeros(m, r)), |h| whole(h, r))?;
    let halves = Halves::of(T::DTYPE);
    let (truth, magnitudes) = (reference::backward(&inputs, &h), inputs.magnitudes());
    let size = reference::backward(&magnitudes, &h.map(f64::abs));
    let most =
        magnitudes.keep.as_ref().map_or(1.0, |keep| keep.data.iter().fold(0.0f64, |most, &factor| most.max(factor)));
    let gained =
        |i: usize, j: usize| magnitudes.gain.as_ref().map_or(1.0, |gain| gain.at(0, j)) * magnitudes.dy.at(i, j);
    let dz = Mat::from_fn(m, n, gained);
    // With a gain dz is rounded to the storage type.
    let of_dz = if gain.is_some() { halves.roundoff } else { 0.0 };
    let (relative, absolute) = of_middle(halves, &dz, magnitudes.scale * most * most_of_gate(&magnitudes), n);
    let relative = relative + of_dz;
    let product = dz.times(&magnitudes.b);
    let size_dh = Mat::from_fn(m, r, |i, j| magnitudes.scale * gate(&magnitudes, i, j) * product.at(i, j));
    let adapter = of_adapter(halves, &size_dh, &magnitudes.a, relative, &absolute, most);
    let kept = Mat::from_fn(m, k, |i, j| adapter.at(i, j) * most);
    let sums = (2 * n + 3 * r.next_multiple_of(8) + 4) as f64 * E + of_dz;
    let dx = Mat::from_fn(m, k, |i, j| sums * size.dx.at(i, j) + kept.at(i, j));
    let of_x = Mat::from_fn(1, k, |_, j| (0..m).map(|i| absolute[i] * magnitudes.x.at(i, j)).sum());
    let da = Mat::from_fn(r, k, |i, j| (relative + (m + 8) as f64 * E) * size.da.at(i, j) + most * of_x.at(0, j));
    let sums = |size: &Mat| size.map(|v| (m + 8) as f64 * E * v);
    let bounds = [
        Bound { before: sums(&size.db), truth: truth.db },
        Bound { before: sums(&size.dbias), truth: truth.dbias },
        Bound { truth: truth.dx, before: dx },
        Bound { truth: truth.da, before: da },
    ];
    Ok((bounds, [size.da, size.db]))
}

/// What backward made of `before`, held to the oracle.
pub fn judge_backward<T: Element>(before: &HostBackward<T, f32>, after: &HostBackward<T, f32>) -> Result<(), String> {
    let ([db, dbias, dx, da], _) = backward_bounds(before)?;
    let accumulate = before.accumulate;
    if let (Some(before), Some(after)) = (&before.dx, &after.dx) {
        Judge { name: "dx", before, after, accumulated: accumulate.dx }.judge(dx)?;
    }
    for (name, before, after, accumulated, bound) in [
        ("da", &before.da, &after.da, accumulate.da, da),
        ("db", &before.db, &after.db, accumulate.db, db),
        ("dbias", &before.dbias, &after.dbias, accumulate.dbias, dbias),
    ] {
        match (before, after) {
            (Some(HostGradient::Storage(before)), Some(HostGradient::Storage(after))) => {
                Judge { name, before, after, accumulated }.judge(bound)?;
            }
            (Some(HostGradient::F32(before)), Some(HostGradient::F32(after))) => {
                Judge { name, before, after, accumulated }.judge(bound)?;
            }
            _ => {}
        }
    }
    if let (Some(of), Some(to)) = (&before.magnitude, &after.magnitude) {
        super::check::judge_dm(expected_dm::<T>(&before.dy, of), of, to, accumulate.dm)?;
    }
    Ok(())
}

/// dx of projections that share x: the sum of theirs, rounded once.
pub fn judge_sum<T: Element>(all: &[HostBackward<T, f32>], before: &Host<T>, after: &Host<T>) -> Result<(), String> {
    let mut sum: Option<Bound> = None;
    for op in all {
        let ([_, _, own, _], _) = backward_bounds(op)?;
        sum = Some(match sum {
            // A sum of sums: as many more terms in f32.
            Some(of) => {
                Bound { truth: of.truth.plus(&own.truth), before: of.before.plus(&own.before).map(|v| 2.0 * v) }
            }
            None => own,
        });
    }
    let accumulated = all.iter().any(|op| op.accumulate.dx);
    sum.map_or(Ok(()), |bound| Judge { name: "dx", before, after, accumulated }.judge(bound))
}

/// How far da and db, in f32, are from the truth as norms relative to it; nothing accumulated.
pub fn errors_of_gradients<T: Element>(before: &HostBackward<T, f32>, after: &HostBackward<T, f32>) -> [f64; 2] {
    let ([db, _, _, da], _) = backward_bounds(before).expect("h");
    [(&after.da, da.truth), (&after.db, db.truth)].map(|(got, truth)| match got {
        Some(HostGradient::F32(got)) => got.to_mat().plus(&truth.map(|v| -v)).norm() / truth.norm(),
        _ => f64::NAN,
    })
}

#[track_caller]
#[allow(clippy::panic)] // how a test fails
fn fail(context: &str, complaint: &str) -> ! {
    panic!("{context}\n{complaint}")
}

/// Forward and backward of `spec` with f32 factors: within tolerance, nothing touched around the outputs.
pub fn check<T: Element>(backend: &impl Backend, spec: &Spec) {
    let context = |what| format!("{what} on {}, f32 over {:?}, {spec:?}", backend.name(), T::DTYPE);
    let before = spec.forward_of::<T, f32>();
    let mut after = before.clone();
    backend.forward(&mut after).unwrap_or_else(|error| fail(&context("forward"), &error.to_string()));
    judge_forward(&before, &after).unwrap_or_else(|complaint| fail(&context("forward"), &complaint));
    let before = spec.backward_of::<T, f32>();
    let mut after = before.clone();
    backend.backward(&mut after).unwrap_or_else(|error| fail(&context("backward"), &error.to_string()));
    judge_backward(&before, &after).unwrap_or_else(|complaint| fail(&context("backward"), &complaint));
}
