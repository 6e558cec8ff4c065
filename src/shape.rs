//! The one place that judges dimensions, strides, alignment and overlap.

use crate::error::{Error, Result};
use crate::raw::{Backward, Forward, Gain, Gradient, MagnitudeGradient, Matrix, Merge, Round, Seed, Variant};
use crate::{Dtype, MAX_ROUTED_RANK, Routing};

/// The four dimensions of a layer call: x is M × K, w is N × K, a is R × K, b is N × R.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LoraShape {
    /// Tokens.
    pub m: usize,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Rank; 0 for the plain product.
    pub r: usize,
}

/// Largest M, N, K or R: the kernels count rows and columns in 31 bits (offsets are 64-bit).
pub const MAX_DIMENSION: usize = (1 << 31) - 1;

/// Elements from the first to one past the last of a strided matrix; an error when that overflows.
pub(crate) fn extent(rows: usize, cols: usize, row_stride: usize) -> Result<usize> {
    let overflow = Error::TooLarge { what: "a matrix extent in elements", got: u64::MAX, limit: i64::MAX as u64 / 4 };
    if rows == 0 || cols == 0 {
        return Ok(0);
    }
    let last = (rows - 1).checked_mul(row_stride).and_then(|start| start.checked_add(cols)).ok_or(overflow)?;
    if last as u64 > i64::MAX as u64 / 4 {
        return Err(Error::TooLarge {
            what: "a matrix extent in elements",
            got: last as u64,
            limit: i64::MAX as u64 / 4,
        });
    }
    Ok(last)
}

/// A buffer of `len` elements must hold the matrix that starts at element `offset`.
pub(crate) fn check_length(
    arg: &'static str,
    len: usize,
    offset: usize,
    (rows, cols, row_stride): (usize, usize, usize),
) -> Result<()> {
    let needed = offset.saturating_add(extent(rows, cols, row_stride)?);
    if needed > len { Err(Error::BufferTooShort { arg, got: len, needed }) } else { Ok(()) }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Arguments with the addresses of their first and one past their last byte.
pub(crate) type Ranges = Vec<(&'static str, u64, u64)>;

/// A matrix argument with what the checks need to know about it.
struct Operand {
    arg: &'static str,
    matrix: Matrix,
    element_bytes: usize,
}

impl Operand {
    fn is_empty(&self) -> bool {
        self.matrix.rows == 0 || self.matrix.cols == 0
    }

    fn check_dims(&self, rows: usize, cols: usize) -> Result<()> {
        let Matrix { rows: got_rows, cols: got_cols, .. } = self.matrix;
        if got_rows != rows {
            return Err(Error::Dimension { arg: self.arg, axis: "rows", got: got_rows, expected: rows });
        }
        if got_cols != cols {
            return Err(Error::Dimension { arg: self.arg, axis: "columns", got: got_cols, expected: cols });
        }
        Ok(())
    }

    fn check_memory(&self) -> Result<()> {
        let Self { arg, matrix, element_bytes } = *self;
        if matrix.row_stride < matrix.cols {
            return Err(Error::Stride { arg, got: matrix.row_stride, min: matrix.cols });
        }
        if self.is_empty() {
            return Ok(());
        }
        let bytes = (extent(matrix.rows, matrix.cols, matrix.row_stride)? * element_bytes) as u64;
        if matrix.ptr == 0 {
            return Err(Error::NullPointer { arg });
        }
        let align = element_bytes as u64;
        if !matrix.ptr.is_multiple_of(align) {
            return Err(Error::Misaligned { arg, address: matrix.ptr, align });
        }
        if matrix.ptr.checked_add(bytes).is_none() {
            return Err(Error::TooLarge { what: "the end address of a matrix", got: u64::MAX, limit: u64::MAX - 1 });
        }
        Ok(())
    }

    /// Bytes from the first to one past the last; `check_memory` has shown that this does not overflow.
    fn range(&self) -> (u64, u64) {
        let Matrix { ptr, rows, cols, row_stride } = self.matrix;
        let elements = if self.is_empty() { 0 } else { (rows - 1) * row_stride + cols };
        (ptr, ptr + (elements * self.element_bytes) as u64)
    }

    /// Bytes between the starts of two rows. A single row has none: its stride is never used, and may be anything.
    fn pitch(&self) -> Option<u64> {
        (self.matrix.rows > 1).then(|| (self.matrix.row_stride * self.element_bytes) as u64)
    }

    /// Exact for equal pitches and for a single row: column ranges of one buffer may interleave. With different pitches
    /// rows meet at multiples of their greatest common divisor, which is never too lenient.
    fn overlaps(&self, other: &Operand) -> bool {
        let ((start, end), (other_start, other_end)) = (self.range(), other.range());
        if self.is_empty() || other.is_empty() || end <= other_start || other_end <= start {
            return false;
        }
        let pitch = match (self.pitch(), other.pitch()) {
            (Some(pitch), Some(other)) => gcd(pitch, other),
            (Some(pitch), None) | (None, Some(pitch)) => pitch,
            (None, None) => return true,
        };
        let width = |o: &Operand| (o.matrix.cols * o.element_bytes) as u64;
        // Where a row of `other` starts, relative to the start of a row of `self`.
        let phase = if other_start >= start {
            (other_start - start) % pitch
        } else {
            (pitch - (start - other_start) % pitch) % pitch
        };
        phase < width(self) || pitch - phase < width(other)
    }
}

/// Checks shared by all operations, after the dimensions agreed.
fn check_operands(
    shape: LoraShape,
    scale: f32,
    inputs: &[Operand],
    outputs: &[Operand],
) -> Result<(LoraShape, Ranges)> {
    for (what, got) in [
        ("M (rows of x)", shape.m),
        ("N (rows of w)", shape.n),
        ("K (columns of w)", shape.k),
        ("R (rows of a)", shape.r),
    ] {
        if got > MAX_DIMENSION {
            return Err(Error::TooLarge { what, got: got as u64, limit: MAX_DIMENSION as u64 });
        }
    }
    if !scale.is_finite() {
        return Err(Error::Scale { got: scale });
    }
    for operand in inputs.iter().chain(outputs) {
        operand.check_memory()?;
    }
    for (index, output) in outputs.iter().enumerate() {
        if let Some(other) = inputs.iter().chain(&outputs[..index]).find(|other| output.overlaps(other)) {
            return Err(Error::Overlap { output: output.arg, other: other.arg });
        }
    }
    let range = |operand: &Operand| (operand.arg, operand.range().0, operand.range().1);
    Ok((shape, inputs.iter().chain(outputs).map(range).collect()))
}

fn nonzero(arg: &'static str, matrix: &Matrix) -> Result<()> {
    match (matrix.rows, matrix.cols) {
        (0, _) => Err(Error::ZeroDimension { arg, axis: "rows" }),
        (_, 0) => Err(Error::ZeroDimension { arg, axis: "columns" }),
        _ => Ok(()),
    }
}

impl Forward {
    /// Dimensions, strides, addresses, overlap and scale; returns the shape when all are right.
    ///
    /// # Errors
    /// [`Error::ZeroDimension`], [`Error::Dimension`], [`Error::TooLarge`], [`Error::Scale`], [`Error::Probability`],
    /// [`Error::Exclusive`], [`Error::Stride`], [`Error::NullPointer`], [`Error::Misaligned`], [`Error::Overlap`].
    pub fn check(&self) -> Result<LoraShape> {
        self.judge().map(|(shape, _)| shape)
    }

    pub(crate) fn judge(&self) -> Result<(LoraShape, Ranges)> {
        nonzero("x", &self.x)?;
        nonzero("w", &self.w)?;
        let shape = LoraShape { m: self.x.rows, n: self.w.rows, k: self.w.cols, r: self.a.rows };
        let LoraShape { m, n, k, r } = shape;
        let bytes = self.dtype.size();
        let operand = |arg, matrix: Matrix, rows, cols| {
            let operand = Operand { arg, matrix, element_bytes: bytes };
            operand.check_dims(rows, cols).map(|()| operand)
        };
        let mut inputs = vec![
            operand("x", self.x, m, k)?,
            operand("w", self.w, n, k)?,
            operand("a", self.a, r, k)?,
            operand("b", self.b, n, r)?,
        ];
        if let Some(bias) = self.bias {
            inputs.push(operand("bias", bias, 1, n)?);
        }
        self.variant.operands(shape, self.scale, &mut inputs)?;
        let mut outputs = vec![operand("y", self.y, m, n)?];
        if let Some(h) = self.h {
            outputs.push(operand("h", h, m, r)?);
        }
        check_operands(shape, self.scale, &inputs, &outputs)
    }
}

impl Variant {
    /// Adds what is read beside the matrices.
    fn operands(&self, shape: LoraShape, scale: f32, inputs: &mut Vec<Operand>) -> Result<()> {
        if let Some(routes) = self.routes {
            if shape.r > MAX_ROUTED_RANK {
                let (what, got) = ("R (rows of a) of a batch with routes", shape.r as u64);
                return Err(Error::TooLarge { what, got, limit: MAX_ROUTED_RANK as u64 });
            }
            inputs.push(sized("routes", routes, 8, 1, Routing::words_for(shape.m))?);
        }
        if let Some(gain) = self.gain {
            inputs.push(sized("gain", gain, 4, 1, shape.n)?);
            let rival = [("dropout", self.dropout.is_some()), ("routes", self.routes.is_some())];
            if let Some((other, _)) = rival.into_iter().find(|(_, is_there)| *is_there) {
                return Err(Error::Exclusive { arg: "gain", other });
            }
        }
        let Some(dropout) = self.dropout else { return Ok(()) };
        if !(0.0..=1.0).contains(&dropout.p) {
            return Err(Error::Probability { got: dropout.p });
        }
        // What kernels multiply by; a scale that is not finite itself is named further on.
        if scale.is_finite() && !(scale * self.factor()).is_finite() {
            return Err(Error::Scale { got: scale * self.factor() });
        }
        if let Seed::Memory(state) = dropout.seed {
            inputs.push(sized("seed", state, 8, 1, 2)?);
        }
        Ok(())
    }
}

impl Backward {
    /// Dimensions, strides, addresses, overlap, scale and presence; returns the shape when all are right.
    ///
    /// # Errors
    /// [`Error::NoOutput`], [`Error::Missing`], and as forward [`Error::ZeroDimension`], [`Error::Dimension`],
    /// [`Error::TooLarge`], [`Error::Scale`], [`Error::Probability`], [`Error::Exclusive`], [`Error::Stride`],
    /// [`Error::NullPointer`], [`Error::Misaligned`], [`Error::Overlap`].
    pub fn check(&self) -> Result<LoraShape> {
        self.judge().map(|(shape, _)| shape)
    }

    pub(crate) fn judge(&self) -> Result<(LoraShape, Ranges)> {
        nonzero("dy", &self.dy)?;
        nonzero("w", &self.w)?;
        let shape = LoraShape { m: self.dy.rows, n: self.w.rows, k: self.w.cols, r: self.a.rows };
        let LoraShape { m, n, k, r } = shape;
        let wanted = [self.dx.is_some(), self.da.is_some(), self.db.is_some(), self.dbias.is_some(), self.dm.is_some()];
        if !wanted.contains(&true) {
            return Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" });
        }
        if self.dm.is_some() && self.variant.gain.is_none() {
            return Err(Error::Missing { arg: "gain", output: "dm" });
        }
        if self.da.is_some() && self.x.is_none() {
            return Err(Error::Missing { arg: "x", output: "da" });
        }
        if self.db.is_some() && self.h.is_none() {
            return Err(Error::Missing { arg: "h", output: "db" });
        }
        let bytes = self.dtype.size();
        let mut inputs = vec![
            sized("dy", self.dy, bytes, m, n)?,
            sized("w", self.w, bytes, n, k)?,
            sized("a", self.a, bytes, r, k)?,
            sized("b", self.b, bytes, n, r)?,
        ];
        if let Some(x) = self.x {
            inputs.push(sized("x", x, bytes, m, k)?);
        }
        if let Some(h) = self.h {
            inputs.push(sized("h", h, bytes, m, r)?);
        }
        self.variant.operands(shape, self.scale, &mut inputs)?;
        let mut outputs = Vec::new();
        if let Some(MagnitudeGradient { y, bias, magnitude, dm }) = self.dm {
            inputs.push(sized("y", y, bytes, m, n)?);
            if let Some(bias) = bias {
                inputs.push(sized("bias", bias, bytes, 1, n)?);
            }
            inputs.push(sized("magnitude", magnitude, 4, 1, n)?);
            outputs.push(sized("dm", dm, 4, 1, n)?);
        }
        if let Some(dx) = self.dx {
            outputs.push(sized("dx", dx, bytes, m, k)?);
        }
        for (arg, gradient, rows, cols) in [("da", self.da, r, k), ("db", self.db, n, r), ("dbias", self.dbias, 1, n)] {
            if let Some(Gradient { matrix, f32 }) = gradient {
                outputs.push(sized(arg, matrix, if f32 { 4 } else { bytes }, rows, cols)?);
            }
        }
        check_operands(shape, self.scale, &inputs, &outputs)
    }
}

/// Bytes of an element of A and B.
fn factor_bytes(dtype: Dtype, f32_factors: bool) -> usize {
    if f32_factors { Dtype::F32.size() } else { dtype.size() }
}

/// A matrix argument of these dimensions.
fn sized(arg: &'static str, matrix: Matrix, element_bytes: usize, rows: usize, cols: usize) -> Result<Operand> {
    let operand = Operand { arg, matrix, element_bytes };
    operand.check_dims(rows, cols).map(|()| operand)
}

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
        check_operands(shape, self.scale, &inputs, &outputs).map(|(shape, _)| shape)
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
        let (storage, factor) = (self.dtype.size(), factor_bytes(self.dtype, self.f32_factors));
        let mut inputs = vec![sized("a", self.a, factor, r, k)?, sized("b", self.b, factor, n, r)?];
        if let Some(divisor) = self.divisor {
            inputs.push(sized("divisor", divisor, 4, 1, n)?);
        }
        let outputs =
            [sized("rounded_a", self.rounded_a, storage, r, k)?, sized("rounded_b", self.rounded_b, storage, n, r)?];
        check_operands(shape, self.scale, &inputs, &outputs).map(|(shape, _)| shape)
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
        check_operands(shape, self.scale, &inputs, &outputs).map(|(shape, _)| shape)
    }
}
