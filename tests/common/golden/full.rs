//! PEFT's default of f32 factors over a 16-bit layer: recorded layers through the operations themselves.

use fused_lora::reference::{self, Mat};
use fused_lora::{Accumulate, Dtype, Element, split_columns};

use super::{Golden, Mode, Tensor};
use crate::common::{Backend, Host, HostBackward, HostForward, HostGradient, full};

/// PEFT casts x and dy to f32 for the adapter, and rounds the base product and the sum.
pub const BF16_A32: Mode = Mode { name: "bf16_a32", truth: "f64_a32", f32_factors: true };
pub const F16_A32: Mode = Mode { name: "f16_a32", truth: "f64_a32", f32_factors: true };

fn host<T: Element>(tensor: &Tensor) -> Host<T> {
    let Mat { rows, cols, .. } = tensor.mat();
    Host { rows, cols, offset: 0, row_stride: cols, data: tensor.round() }
}

fn output<T: Element>(rows: usize, cols: usize) -> Host<T> {
    Host { rows, cols, offset: 0, row_stride: cols, data: vec![T::default(); rows * cols] }
}

impl Golden {
    /// Whether the mode was recorded.
    pub fn has(&self, mode: Mode) -> bool {
        self.find(&format!("{}/y", mode.name)).is_some()
    }

    /// y and dx no further from the recorded truth than PEFT, which rounds twice; da and db in f32 off by `relative` at most.
    pub fn check_full<T: Element>(&self, backend: &impl Backend, mode: Mode, relative: f64) {
        let [name] = self.active()[..] else { unreachable!("several adapters") };
        let (n, k) = (self.size("out_features"), self.size("in_features"));
        let ((r, scaling), [a, b]) = (self.scaling(name), self.factors(name, mode));
        let x = host::<T>(&self.tensor("x"));
        let m = x.rows;
        let bias = self.bias().map(|bias| Host { rows: 1, cols: n, ..host::<T>(&bias) });
        let mut forward = HostForward::<T, f32> {
            x: x.clone(),
            w: host(&self.tensor("W")),
            a: host(&a),
            b: host(&b),
            scale: scaling.scale(r),
            bias: bias.map(|bias| Host { row_stride: n, ..bias }),
            h: Some(output(m, split_columns(r))),
            y: output(m, n),
            dropout: None,
            routes: None,
            gain: None,
        };
        let before = forward.clone();
        backend.forward(&mut forward).expect("forward");
        full::judge_forward(&before, &forward).unwrap_or_else(|complaint| self.fail(mode, &complaint));
        let f32_output = |rows, cols| Some(HostGradient::F32(output::<f32>(rows, cols)));
        let mut backward = HostBackward::<T, f32> {
            dy: host(&self.tensor("dY")),
            w: before.w,
            a: before.a,
            b: before.b,
            scale: before.scale,
            x: Some(x),
            h: forward.h.clone(),
            dx: Some(output(m, k)),
            da: f32_output(r, k),
            db: f32_output(n, r),
            dbias: None,
            magnitude: None,
            accumulate: Accumulate::default(),
            dropout: None,
            routes: None,
            gain: None,
        };
        let before = backward.clone();
        backend.backward(&mut backward).expect("backward");
        full::judge_backward(&before, &backward).unwrap_or_else(|complaint| self.fail(mode, &complaint));

        let inputs = self.inputs(&[name], mode).magnitudes();
        let (h, size_y) = reference::forward(&inputs);
        let size = reference::backward(&inputs, &h);
        let dx = backward.dx.as_ref().expect("dx").to_mat();
        for (what, got, size, depth) in [("y", forward.y.to_mat(), size_y, 2 * k + r), ("dX", dx, size.dx, 2 * n + r)] {
            let [error, peft] = self.errors(mode, what, &got);
            let sums = depth as f64 * reference::unit_roundoff(Dtype::F32) * size.norm();
            assert!(
                error <= peft + sums,
                "{} {}/{what}: off by {error:e}, PEFT by {peft:e}",
                self.case["name"],
                mode.name
            );
        }
        for (what, got) in [("dA", &backward.da), ("dB", &backward.db)] {
            let Some(HostGradient::F32(got)) = got else { unreachable!("it was asked for") };
            let [error, _] = self.errors(mode, &format!("{name}.{what}"), &got.to_mat());
            let truth = self.tensor(&format!("{}/{name}.{what}", mode.truth)).mat().norm();
            assert!(error <= relative * truth, "{} {}/{what}: {error:e} of {truth:e}", self.case["name"], mode.name);
        }
    }

    /// How far a result and PEFT's are from the truth.
    fn errors(&self, mode: Mode, what: &str, got: &Mat) -> [f64; 2] {
        let recorded = |mode: &str| self.tensor(&format!("{mode}/{what}")).mat();
        let minus_truth = recorded(mode.truth).map(|v| -v);
        [got.plus(&minus_truth).norm(), recorded(mode.name).plus(&minus_truth).norm()]
    }

    fn fail(&self, mode: Mode, complaint: &str) {
        unreachable!("{} {}: {complaint}", self.case["name"], mode.name)
    }
}
