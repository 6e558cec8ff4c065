//! Errors and their bounds.

/// Distance between two tensors: the Frobenius norm of the difference over that of the truth (not divided where the truth
/// is zero), and the largest difference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Error {
    pub relative: f64,
    pub largest: f64,
}

/// The error of `values`; NaN wherever a NaN is involved, so that no bound holds.
pub fn error(values: &[f64], truth: &[f64]) -> Error {
    let (mut squares, mut norm, mut largest) = (0.0, 0.0, 0.0f64);
    for (value, truth) in values.iter().zip(truth) {
        let difference = (value - truth).abs();
        squares += difference * difference;
        norm += truth * truth;
        // Unlike f64::max, keeps a NaN once there is one.
        largest = if difference > largest || difference.is_nan() { difference } else { largest };
    }
    let relative = if norm > 0.0 { (squares / norm).sqrt() } else { squares.sqrt() };
    Error { relative, largest: if squares.is_nan() { f64::NAN } else { largest } }
}

/// At most 1.5 times PEFT's own error, or one rounding to the type that products come in, whichever is larger: `roundoff`. (Under
/// autocast that is bf16, although dA and dB are then widened to f32; at full precision dA and dB are as exact as two halves.)
///
/// As a norm, one rounding is the unit roundoff: no value moves by more, relatively. For a single value it is the distance
/// between neighbours at the largest one: half of it for rounding the value, half for the rounded middle (h or dh) that
/// it is made of, which in the norm averages out.
pub fn bound(peft: Error, truth: &[f64], roundoff: f64) -> Error {
    let largest = truth.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    let (relative, spacing) =
        if largest > 0.0 { (roundoff, 2.0 * roundoff * largest.log2().floor().exp2()) } else { (0.0, 0.0) };
    Error { relative: (1.5 * peft.relative).max(relative), largest: (1.5 * peft.largest).max(spacing) }
}

impl Error {
    /// Both measures within their bounds; false for NaN.
    pub fn within(self, bound: Self) -> bool {
        self.relative <= bound.relative && self.largest <= bound.largest
    }
}
