//! How far from the truth a result may be: a rule, not a tuned number.

use super::Mat;
use crate::Dtype;

/// Largest relative error of one rounding to nearest.
pub const fn unit_roundoff(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => 1.0 / (1u64 << 11) as f64,
        Dtype::Bf16 => 1.0 / (1u64 << 8) as f64,
        Dtype::F32 => 1.0 / (1u64 << 24) as f64,
    }
}

/// Half the smallest subnormal of f16, per term.
fn tiny(storage: Dtype, depth: usize) -> f64 {
    if storage == Dtype::F16 { depth as f64 / (1u64 << 25) as f64 } else { 0.0 }
}

/// How far from the truth an element may be by the rule of [`check`].
pub fn element_bound(storage: Dtype, depth: usize, magnitude: f64) -> f64 {
    (2.0 * unit_roundoff(storage) + depth as f64 * unit_roundoff(Dtype::F32)) * magnitude + tiny(storage, depth)
}

/// What [`check`] compares an output with.
#[derive(Clone, Debug)]
pub struct Expected {
    /// The f64 result.
    pub truth: Mat,
    /// The same from separate products in the storage type.
    pub naive: Mat,
    /// The same formula on absolute values.
    pub magnitude: Mat,
    /// Terms summed per element, over all products that lead to it.
    pub depth: usize,
    /// Type of x, w, h, …: its roundings of h and dh are in every output.
    pub storage: Dtype,
    /// Type the output is rounded to.
    pub output: Dtype,
}

/// Fewest elements whose roundings are a sample: the norm of fewer says how lucky the separate products were.
const SAMPLE: usize = 16;

/// Holds `out` to the tolerance rule; the error says by how much it fails.
///
/// As a norm ‖out − truth‖ ≤ 2 ‖naive − truth‖ + u ‖truth‖, with u the roundoff of the output's type; f32 results of
/// 16-bit operands get depth · 2⁻²⁴ ‖magnitude‖ on top, because matrix units truncate where f32 addition rounds. An output
/// of fewer than 16 elements has no such norm: the one rounding of separate products may have been none. And for each
/// element, always, |out − truth| ≤ (2 u + depth · 2⁻²⁴) · magnitude with u that of the storage type: one rounding of the
/// middle, one of the result, and f32 sums of `depth` terms. f16 gets half its smallest subnormal on top, per term.
///
/// # Errors
/// A sentence with the element or norm that is out of bounds (or NaN).
pub fn check(out: &Mat, expected: &Expected) -> Result<(), String> {
    let Expected { truth, naive, magnitude, depth, storage, output } = expected;
    if (out.rows, out.cols) != (truth.rows, truth.cols) {
        return Err(format!("shape {}×{}, expected {}×{}", out.rows, out.cols, truth.rows, truth.cols));
    }
    let tiny = tiny(*storage, *depth);
    let error = Mat::from_fn(out.rows, out.cols, |i, j| out.at(i, j) - truth.at(i, j));
    for (at, (&e, &size)) in error.data.iter().zip(&magnitude.data).enumerate() {
        let bound = element_bound(*storage, *depth, size);
        if e.is_nan() || e.abs() > bound {
            let (row, col) = (at / out.cols, at % out.cols);
            return Err(format!("element ({row}, {col}) is {}, expected {} ± {bound:e}", out.data[at], truth.data[at]));
        }
    }
    if error.data.len() < SAMPLE {
        return Ok(());
    }
    let naive_error = Mat::from_fn(out.rows, out.cols, |i, j| naive.at(i, j) - truth.at(i, j)).norm();
    let mut bound = 2.0 * naive_error + unit_roundoff(*output) * truth.norm() + tiny;
    if *output == Dtype::F32 && *storage != Dtype::F32 {
        bound += *depth as f64 * unit_roundoff(Dtype::F32) * magnitude.norm();
    }
    let norm = error.norm();
    if norm > bound { Err(format!("error norm {norm:e}, expected at most {bound:e}")) } else { Ok(()) }
}
