//! What the small operations on an adapter are given: merge, round and gain.

use super::{LoraShape, check_operands, factor_bytes, nonzero, sized};
use crate::error::{Error, Result};
use crate::raw::{Gain, Merge, Round};

impl Merge {
    /// Dimensions, strides, addresses, overlap and scale; returns the shape, with M = 1, when all are right.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`], [`Error::Dimension`], [`Error::TooLarge`], [`Error::Scale`], [`Error::Stride`],
    /// [`Error::NullPointer`], [`Error::Misaligned`], [`Error::Overlap`].
    pub fn check(&self) -> Result<LoraShape> {
        nonzero("merged", &self.merged)?;
        let shape = LoraShape { m: 1, n: self.merged.rows, k: self.merged.cols, r: self.a.rows };
        let LoraShape { n, k, r, .. } = shape;
        let (storage, factor) = (self.dtype.size(), factor_bytes(self.dtype, self.f32_factors));
        let mut inputs = vec![sized("a", self.a, factor, r, k)?, sized("b", self.b, factor, n, r)?];
        if let Some(w) = self.w {
            inputs.push(sized("w", w, storage, n, k)?);
        }
        if let Some(gain) = self.gain {
            inputs.push(sized("gain", gain, 4, 1, n)?);
        }
        let outputs = [sized("merged", self.merged, storage, n, k)?];
        check_operands(shape, &[("scale", self.scale)], &inputs, &outputs).map(|(shape, _)| shape)
    }
}

impl Round {
    /// Dimensions, strides, addresses, overlap and scale; returns the shape, with M = 1, when all are right.
    ///
    /// # Errors
    /// Matrices may be empty: [`Error::Dimension`], [`Error::TooLarge`], [`Error::Scale`], [`Error::Stride`],
    /// [`Error::NullPointer`], [`Error::Misaligned`], [`Error::Overlap`].
    pub fn check(&self) -> Result<LoraShape> {
        let shape = LoraShape { m: 1, n: self.b.rows, k: self.a.cols, r: self.a.rows };
        let LoraShape { n, k, r, .. } = shape;
        let [factor, rounded] = [self.f32_factors, self.f32_rounded].map(|f32| factor_bytes(self.dtype, f32));
        let mut inputs = vec![sized("a", self.a, factor, r, k)?, sized("b", self.b, factor, n, r)?];
        if let Some(divisor) = self.divisor {
            inputs.push(sized("divisor", divisor, 4, 1, n)?);
        }
        let outputs =
            [sized("rounded_a", self.rounded_a, rounded, r, k)?, sized("rounded_b", self.rounded_b, rounded, n, r)?];
        check_operands(shape, &[("scale", self.scale)], &inputs, &outputs).map(|(shape, _)| shape)
    }
}

impl Gain {
    /// Dimensions, strides, addresses, overlap, scale and presence; returns the shape, with M = 1, when all are right.
    ///
    /// # Errors
    /// [`Error::NoOutput`], [`Error::Missing`], [`Error::ZeroDimension`], [`Error::Dimension`], [`Error::TooLarge`],
    /// [`Error::Scale`], [`Error::Stride`], [`Error::NullPointer`], [`Error::Misaligned`], [`Error::Overlap`].
    pub fn check(&self) -> Result<LoraShape> {
        nonzero("w", &self.w)?;
        let shape = LoraShape { m: 1, n: self.w.rows, k: self.w.cols, r: self.a.rows };
        let LoraShape { n, k, r, .. } = shape;
        if self.norm.is_none() && self.gain.is_none() {
            return Err(Error::NoOutput { expected: "norm, gain" });
        }
        if self.gain.is_some() && self.magnitude.is_none() {
            return Err(Error::Missing { arg: "magnitude", output: "gain" });
        }
        let factor = factor_bytes(self.dtype, self.f32_factors);
        let mut inputs = vec![
            sized("w", self.w, self.dtype.size(), n, k)?,
            sized("a", self.a, factor, r, k)?,
            sized("b", self.b, factor, n, r)?,
        ];
        for (arg, input) in [("magnitude", self.magnitude), ("earlier", self.earlier)] {
            if let Some(vector) = input {
                inputs.push(sized(arg, vector, 4, 1, n)?);
            }
        }
        let mut outputs = Vec::new();
        for (arg, output) in [("norm", self.norm), ("gain", self.gain)] {
            if let Some(matrix) = output {
                outputs.push(sized(arg, matrix, 4, 1, n)?);
            }
        }
        check_operands(shape, &[("scale", self.scale)], &inputs, &outputs).map(|(shape, _)| shape)
    }
}
