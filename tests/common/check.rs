//! Runs a case on a backend and holds every output to the oracle.

use fused_lora::reference::{self, Expected, Inputs, Mat};
use fused_lora::{Dtype, Element};

use super::data::{Spec, Values};
use super::{Backend, Host, HostBackward, HostForward, HostGradient, HostMagnitude, is_same};

/// Forward of `spec` in `T`: within tolerance (or exact), nothing touched around the outputs.
pub fn forward<T: Element>(backend: &impl Backend, spec: &Spec) {
    let before = spec.forward::<T>();
    let mut after = before.clone();
    let context = format!("forward on {}, {:?}, {spec:?}", backend.name(), T::DTYPE);
    backend.forward(&mut after).unwrap_or_else(|error| fail(&context, &error.to_string()));
    if let Err(complaint) = judge_forward(&before, &after, spec.values) {
        fail(&context, &complaint);
    }
}

/// Backward of `spec` in `T`: within tolerance (or exact), nothing touched around the outputs.
pub fn backward<T: Element>(backend: &impl Backend, spec: &Spec) {
    let before = spec.backward::<T>();
    let mut after = before.clone();
    let context = format!("backward on {}, {:?}, {spec:?}", backend.name(), T::DTYPE);
    backend.backward(&mut after).unwrap_or_else(|error| fail(&context, &error.to_string()));
    if let Err(complaint) = judge_backward(&before, &after, spec.values) {
        fail(&context, &complaint);
    }
}

#[track_caller]
#[allow(clippy::panic)] // how a test fails
pub fn fail(context: &str, complaint: &str) -> ! {
    panic!("{context}\n{complaint}")
}

/// What forward made of `before`, held to the oracle.
pub fn judge_forward<T: Element>(
    before: &HostForward<T>,
    after: &HostForward<T>,
    values: Values,
) -> Result<(), String> {
    let HostForward { x, w, a, b, scale, bias, h, y, dropout, routes, gain } = after;
    let (m, n, k, r) = (x.rows, w.rows, w.cols, a.rows);
    let inputs = Inputs {
        x: x.to_mat(),
        w: w.to_mat(),
        a: a.to_mat(),
        b: b.to_mat(),
        bias: bias.as_ref().map(Host::to_mat),
        dy: Mat::from_fn(m, n, |_, _| 0.0),
        scale: f64::from(*scale),
        keep: dropout.map(|dropout| dropout.keep(m, k)),
        gate: routes.as_ref().map(|words| reference::gate(words, m, r)),
        gain: gain.as_ref().map(Host::to_mat),
    };
    let truth = reference::forward(&inputs);
    let naive = reference::naive_forward::<T>(&inputs);
    let magnitude = reference::forward(&inputs.magnitudes());
    if let (Some(h), Some(h_before)) = (h, &before.h) {
        let expected = expected::<T, T>(truth.0, naive.0, magnitude.0, k);
        Judge { name: "h", before: h_before, after: h, accumulated: false, values }.judge(expected)?;
    }
    let expected = expected::<T, T>(truth.1, naive.1, magnitude.1, 2 * k + r + 2);
    Judge { name: "y", before: &before.y, after: y, accumulated: false, values }.judge(expected)
}

/// What backward made of `before`, held to the oracle.
pub fn judge_backward<T: Element>(
    before: &HostBackward<T>,
    after: &HostBackward<T>,
    values: Values,
) -> Result<(), String> {
    let (inputs, h) = backward_inputs(before);
    let (dy, accumulate) = (&before.dy, before.accumulate);
    let (m, n, r) = (dy.rows, before.w.rows, before.a.rows);
    let truth = reference::backward(&inputs, &h);
    let naive = reference::naive_backward::<T>(&inputs, &h);
    let magnitude = reference::backward(&inputs.magnitudes(), &h.map(f64::abs));
    if let (Some(before), Some(after)) = (&before.dx, &after.dx) {
        let expected = expected::<T, T>(truth.dx, naive.dx, magnitude.dx, 2 * n + r + 2);
        Judge { name: "dx", before, after, accumulated: accumulate.dx, values }.judge(expected)?;
    }
    let gradients = [
        ("da", &before.da, &after.da, accumulate.da, (truth.da, naive.da, magnitude.da, n + m)),
        ("db", &before.db, &after.db, accumulate.db, (truth.db, naive.db, magnitude.db, m)),
        ("dbias", &before.dbias, &after.dbias, accumulate.dbias, (truth.dbias, naive.dbias, magnitude.dbias, m)),
    ];
    for (name, before, after, accumulated, (truth, naive, magnitude, depth)) in gradients {
        match (before, after) {
            (Some(HostGradient::Storage(before)), Some(HostGradient::Storage(after))) => {
                let naive = naive.map(|v| T::from_f64(v).to_f64());
                let expected = expected::<T, T>(truth, naive, magnitude, depth);
                Judge { name, before, after, accumulated, values }.judge(expected)?;
            }
            (Some(HostGradient::F32(before)), Some(HostGradient::F32(after))) => {
                let expected = expected::<T, f32>(truth, naive, magnitude, depth);
                Judge { name, before, after, accumulated, values }.judge(expected)?;
            }
            _ => {}
        }
    }
    if let (Some(before), Some(after)) = (&before.magnitude, &after.magnitude) {
        let (name, accumulated, expected) = ("dm", accumulate.dm, expected_dm::<T>(dy, before));
        Judge { name, before: &before.dm, after: &after.dm, accumulated, values }.judge(expected)?;
    }
    Ok(())
}

/// DoRA's gradient of the magnitude: of separate operations in `T` each is rounded, and the sum is in f32.
pub(super) fn expected_dm<T: Element>(dy: &Host<T>, of: &HostMagnitude<T>) -> Expected {
    let (dy, y, magnitude) = (dy.to_mat(), of.y.to_mat(), of.magnitude.to_mat());
    let bias = of.bias.as_ref().map(Host::to_mat);
    let truth = reference::magnitude_gradient(&dy, &y, bias.as_ref(), &magnitude);
    let rounded = |value: f64| T::from_f64(value).to_f64();
    let product = |i, j| rounded(dy.at(i, j) * rounded(y.at(i, j) - bias.as_ref().map_or(0.0, |bias| bias.at(0, j))));
    let sum = |j| (0..y.rows).fold(0f32, |sum, i| sum + product(i, j) as f32);
    let naive = Mat::from_fn(1, y.cols, |_, j| f64::from(sum(j)) / magnitude.at(0, j));
    let minus = bias.map(|bias| bias.map(|value| -value.abs()));
    let size =
        reference::magnitude_gradient(&dy.map(f64::abs), &y.map(f64::abs), minus.as_ref(), &magnitude.map(f64::abs));
    expected::<T, f32>(truth, naive, size, y.rows + 2)
}

/// DoRA's gradient of the magnitude alone.
pub(super) fn judge_dm<T: Element>(
    expected: Expected,
    before: &HostMagnitude<T>,
    after: &HostMagnitude<T>,
    accumulated: bool,
) -> Result<(), String> {
    let (before, after) = (&before.dm, &after.dm);
    Judge { name: "dm", before, after, accumulated, values: Values::Random }.judge(expected)
}

/// What backward reads, for the oracle, and h.
fn backward_inputs<T: Element>(op: &HostBackward<T>) -> (Inputs, Mat) {
    let HostBackward { dy, w, a, b, scale, x, h, dropout, routes, gain, .. } = op;
    let (m, k, r) = (dy.rows, w.cols, a.rows);
    let optional =
        |host: &Option<Host<T>>, cols| host.as_ref().map_or_else(|| Mat::from_fn(m, cols, |_, _| 0.0), Host::to_mat);
    let inputs = Inputs {
        x: optional(x, k),
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
    (inputs, optional(h, r))
}

/// dx of projections that share x, whose single layers are `all`: the sum of theirs. The naive composition adds them up in the
/// storage type, one after the other, as automatic differentiation does.
pub fn judge_sum<T: Element>(
    all: &[HostBackward<T>],
    before: &Host<T>,
    after: &Host<T>,
    values: Values,
) -> Result<(), String> {
    let mut sum: Option<[Mat; 3]> = None;
    let mut depth = 0;
    for op in all {
        let (inputs, h) = backward_inputs(op);
        let truth = reference::backward(&inputs, &h).dx;
        let naive = reference::naive_backward::<T>(&inputs, &h).dx;
        let magnitude = reference::backward(&inputs.magnitudes(), &h.map(f64::abs)).dx;
        depth += 2 * op.w.rows + op.a.rows + 2;
        sum = Some(match sum {
            None => [truth, naive, magnitude],
            Some([truths, naives, magnitudes]) => {
                [truths.plus(&truth), naives.plus(&naive).map(|v| T::from_f64(v).to_f64()), magnitudes.plus(&magnitude)]
            }
        });
    }
    let [truth, naive, magnitude] = sum.ok_or("no projection")?;
    let accumulated = all[0].accumulate.dx;
    let expected = expected::<T, T>(truth, naive, magnitude, depth);
    Judge { name: "dx", before, after, accumulated, values }.judge(expected)
}

fn expected<T: Element, O: Element>(truth: Mat, naive: Mat, magnitude: Mat, depth: usize) -> Expected {
    Expected { truth, naive, magnitude, depth, storage: T::DTYPE, output: O::DTYPE }
}

struct Judge<'a, O> {
    name: &'static str,
    before: &'a Host<O>,
    after: &'a Host<O>,
    accumulated: bool,
    values: Values,
}

impl<O: Element> Judge<'_, O> {
    fn judge(&self, mut expected: Expected) -> Result<(), String> {
        let Self { name, before, after, accumulated, values } = *self;
        let same = |at: usize| is_same(after.data[at], before.data[at]);
        if let Some(at) = (0..after.data.len()).find(|&at| !after.is_element(at) && !same(at)) {
            return Err(format!("{name}: position {at} outside the matrix was written ({:?})", after.data[at]));
        }
        if accumulated {
            let old = before.to_mat();
            expected.naive = expected.naive.plus(&old).map(|v| O::from_f64(v).to_f64());
            expected.magnitude = expected.magnitude.plus(&old.map(f64::abs));
            expected.truth = expected.truth.plus(&old);
            expected.depth += 1;
        }
        let mut out = after.to_mat();
        settle_what_is_not_finite::<O>(&mut out, &mut expected).map_err(|complaint| format!("{name}: {complaint}"))?;
        if values == Values::Integers {
            let exact = expected.truth.map(|v| O::from_f64(v).to_f64());
            if let Some(at) = (0..out.data.len()).find(|&at| out.data[at] != exact.data[at]) {
                return Err(format!("{name}: element {at} is {}, expected exactly {}", out.data[at], exact.data[at]));
            }
            return Ok(());
        }
        reference::check(&out, &expected).map_err(|complaint| format!("{name}: {complaint}"))
    }
}

/// Where the truth is NaN or infinite (or rounds to infinity), so must the result be; there is nothing else to hold it to, and all
/// sides become 0. A NaN anywhere else is left for the tolerance rule to refuse.
fn settle_what_is_not_finite<O: Element>(out: &mut Mat, expected: &mut Expected) -> Result<(), String> {
    for at in 0..expected.truth.data.len().min(out.data.len()) {
        let (truth, got) = (O::from_f64(expected.truth.data[at]).to_f64(), out.data[at]);
        if truth.is_finite() {
            continue;
        }
        if !(truth == got || (truth.is_nan() && got.is_nan())) {
            return Err(format!("element {at} is {got}, expected {truth}"));
        }
        for side in [&mut *out, &mut expected.truth, &mut expected.naive, &mut expected.magnitude] {
            side.data[at] = 0.0;
        }
    }
    Ok(())
}

/// In integer cases the middle must be exact in the storage type, or "exact" would not be what is asked of the rest.
pub fn middle_is_exact(spec: &Spec, dtype: Dtype) -> bool {
    let limit = match dtype {
        Dtype::Bf16 => 256.0,
        Dtype::F16 => 2048.0,
        Dtype::F32 => 16_777_216.0,
    };
    let op = spec.forward::<f32>();
    let h = op.x.to_mat().times(&op.a.to_mat().transposed());
    let op = spec.backward::<f32>();
    let dh = op.dy.to_mat().times(&op.b.to_mat());
    // Scaled by a power of two: exactness is that of the unscaled integer.
    h.data.iter().chain(&dh.data).all(|v| v.abs() <= limit)
}
