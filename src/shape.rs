//! The one place that judges dimensions, strides, alignment and overlap.

mod adapter;

use crate::error::{Error, Result};
use crate::raw::{
    Backward, BackwardShared, Dropout, Forward, ForwardShared, Gradient, MagnitudeGradient, Matrix, Seed, named,
    share_ranks,
};
use crate::split::{RANKS as SPLIT_RANKS, split_columns, split_ranks};
use crate::{Dtype, Element, MAX_ROUTED_RANK, Routing};

/// The four dimensions of a layer call: x is M × K, w is N × K, a is R × K, b is N × R. Of projections that share x, N and R are
/// the sums over all.
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
    scales: &[(&'static str, f32)],
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
    if let Some(&(arg, got)) = scales.iter().find(|scale| !scale.1.is_finite()) {
        return Err(Error::Scale { arg, got });
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
        ForwardShared::from(self).check()
    }
}

impl ForwardShared {
    /// Dimensions, strides, addresses, overlap and scales; returns the shape, with the N and the ranks of all projections added up,
    /// when all are right. Arguments of one of several projections are named with its number.
    ///
    /// # Errors
    /// As [`Forward::check`], and [`Error::RoutedProjections`].
    pub fn check(&self) -> Result<LoraShape> {
        self.judge().map(|(shape, _)| shape)
    }

    pub(crate) fn judge(&self) -> Result<(LoraShape, Ranges)> {
        let all = &self.projections;
        let name = |name, at| named(name, at, all.len());
        nonzero("x", &self.x)?;
        for (at, projection) in all.iter().enumerate() {
            nonzero(name("w", at), &projection.w)?;
        }
        let (m, k, r) = (self.x.rows, all[0].w.cols, self.a.rows);
        let columns: Vec<_> = all.iter().map(|projection| projection.w.rows).collect();
        let n = columns.iter().fold(0_usize, |n, columns| n.saturating_add(*columns));
        let shape = LoraShape { m, n, k, r };
        let bytes = self.dtype.size();
        let ranks = share_ranks(r, &all.iter().map(|projection| projection.b.cols).collect::<Vec<_>>());
        let factor = factor_bytes(self.dtype, self.f32_factors);
        let mut inputs = vec![sized("x", self.x, bytes, m, k)?];
        for (at, projection) in all.iter().enumerate() {
            inputs.push(sized(name("w", at), projection.w, bytes, projection.w.rows, k)?);
        }
        inputs.push(sized("a", self.a, factor, r, k)?);
        for (at, (projection, &ranks)) in all.iter().zip(&ranks).enumerate() {
            inputs.push(sized(name("b", at), projection.b, factor, projection.w.rows, ranks)?);
        }
        for (at, projection) in all.iter().enumerate() {
            if let Some(bias) = projection.bias {
                inputs.push(sized(name("bias", at), bias, bytes, 1, projection.w.rows)?);
            }
        }
        let scales: Vec<_> = all.iter().enumerate().map(|(at, of)| (name("scale", at), of.scale)).collect();
        let gains: Vec<_> = all.iter().map(|projection| projection.gain).collect();
        let departures = Departures { dropout: self.dropout, routes: self.routes, gains: &gains, scales: &scales };
        departures.operands(shape, &columns, &mut inputs)?;
        let middle = middle_columns(&ranks, self.is_split())?;
        let mut outputs = Vec::new();
        for (at, projection) in all.iter().enumerate() {
            outputs.push(sized(name("y", at), projection.y, bytes, m, projection.w.rows)?);
        }
        if let Some(h) = self.h {
            outputs.push(sized("h", h, bytes, m, middle)?);
        }
        check_operands(shape, &scales, &inputs, &outputs)
    }
}

/// What departs from the plain formula, and what of each projection it acts on.
struct Departures<'a> {
    dropout: Option<Dropout>,
    routes: Option<Matrix>,
    gains: &'a [Option<Matrix>],
    scales: &'a [(&'static str, f32)],
}

impl Departures<'_> {
    /// Adds what is read beside the matrices; `columns` are N of each projection.
    fn operands(&self, shape: LoraShape, columns: &[usize], inputs: &mut Vec<Operand>) -> Result<()> {
        let count = columns.len();
        if let Some(routes) = self.routes {
            if count > 1 {
                return Err(Error::RoutedProjections { got: count });
            }
            if shape.r > MAX_ROUTED_RANK {
                let (what, got) = ("R (rows of a) of a batch with routes", shape.r as u64);
                return Err(Error::TooLarge { what, got, limit: MAX_ROUTED_RANK as u64 });
            }
            inputs.push(sized("routes", routes, 8, 1, Routing::words_for(shape.m))?);
        }
        for (at, (gain, &n)) in self.gains.iter().zip(columns).enumerate() {
            let Some(gain) = *gain else { continue };
            let arg = named("gain", at, count);
            inputs.push(sized(arg, gain, 4, 1, n)?);
            let rival = [("dropout", self.dropout.is_some()), ("routes", self.routes.is_some())];
            if let Some((other, _)) = rival.into_iter().find(|(_, is_there)| *is_there) {
                return Err(Error::Exclusive { arg, other });
            }
        }
        let Some(dropout) = self.dropout else { return Ok(()) };
        if !(0.0..=1.0).contains(&dropout.p) {
            return Err(Error::Probability { got: dropout.p });
        }
        // What kernels multiply by; a scale that is not finite itself is named further on.
        let factor = Dropout::factor(self.dropout);
        let mut divided = self.scales.iter().filter(|of| of.1.is_finite()).map(|&(arg, scale)| (arg, scale * factor));
        if let Some((arg, got)) = divided.find(|scale| !scale.1.is_finite()) {
            return Err(Error::Scale { arg, got });
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
        BackwardShared::from(self).check()
    }
}

impl BackwardShared {
    /// Dimensions, strides, addresses, overlap, scales and presence; returns the shape, with the N and the ranks of all projections
    /// added up, when all are right. Arguments of one of several projections are named with its number.
    ///
    /// # Errors
    /// As [`Backward::check`], and [`Error::RoutedProjections`].
    pub fn check(&self) -> Result<LoraShape> {
        self.judge().map(|(shape, _)| shape)
    }

    /// What is asked for, and what it needs.
    fn check_presence(&self) -> Result<()> {
        let all = &self.projections;
        let has_own = all.iter().any(|of| of.db.is_some() || of.dbias.is_some() || of.dm.is_some());
        if self.dx.is_none() && self.da.is_none() && !has_own {
            return Err(Error::NoOutput { expected: "dx, da, db, dbias, dm" });
        }
        if let Some(at) = all.iter().position(|of| of.dm.is_some() && of.gain.is_none()) {
            let name = |arg| named(arg, at, all.len());
            return Err(Error::Missing { arg: name("gain"), output: name("dm") });
        }
        if self.da.is_some() && self.x.is_none() {
            return Err(Error::Missing { arg: "x", output: "da" });
        }
        match all.iter().position(|projection| projection.db.is_some()) {
            Some(at) if self.h.is_none() => Err(Error::Missing { arg: "h", output: named("db", at, all.len()) }),
            _ => Ok(()),
        }
    }

    pub(crate) fn judge(&self) -> Result<(LoraShape, Ranges)> {
        let all = &self.projections;
        let name = |name, at| named(name, at, all.len());
        for (at, projection) in all.iter().enumerate() {
            nonzero(name("dy", at), &projection.dy)?;
            nonzero(name("w", at), &projection.w)?;
        }
        let (m, k, r) = (all[0].dy.rows, all[0].w.cols, self.a.rows);
        let columns: Vec<_> = all.iter().map(|projection| projection.w.rows).collect();
        let n = columns.iter().fold(0_usize, |n, columns| n.saturating_add(*columns));
        let shape = LoraShape { m, n, k, r };
        self.check_presence()?;
        let bytes = self.dtype.size();
        let ranks = share_ranks(r, &all.iter().map(|projection| projection.b.cols).collect::<Vec<_>>());
        let mut inputs = Vec::new();
        for (at, projection) in all.iter().enumerate() {
            inputs.push(sized(name("dy", at), projection.dy, bytes, m, projection.w.rows)?);
            inputs.push(sized(name("w", at), projection.w, bytes, projection.w.rows, k)?);
        }
        let factor = factor_bytes(self.dtype, self.f32_factors);
        inputs.push(sized("a", self.a, factor, r, k)?);
        for (at, (projection, &ranks)) in all.iter().zip(&ranks).enumerate() {
            inputs.push(sized(name("b", at), projection.b, factor, projection.w.rows, ranks)?);
        }
        if let Some(x) = self.x {
            inputs.push(sized("x", x, bytes, m, k)?);
        }
        let middle = middle_columns(&ranks, self.is_split())?;
        if let Some(h) = self.h {
            inputs.push(sized("h", h, bytes, m, middle)?);
        }
        let scales: Vec<_> = all.iter().enumerate().map(|(at, of)| (name("scale", at), of.scale)).collect();
        let gains: Vec<_> = all.iter().map(|projection| projection.gain).collect();
        let departures = Departures { dropout: self.dropout, routes: self.routes, gains: &gains, scales: &scales };
        departures.operands(shape, &columns, &mut inputs)?;
        let mut outputs = Vec::new();
        for (at, projection) in all.iter().enumerate() {
            let Some(MagnitudeGradient { y, bias, magnitude, dm }) = projection.dm else { continue };
            inputs.push(sized(name("y", at), y, bytes, m, columns[at])?);
            if let Some(bias) = bias {
                inputs.push(sized(name("bias", at), bias, bytes, 1, columns[at])?);
            }
            inputs.push(sized(name("magnitude", at), magnitude, 4, 1, columns[at])?);
            outputs.push(sized(name("dm", at), dm, 4, 1, columns[at])?);
        }
        if let Some(dx) = self.dx {
            outputs.push(sized("dx", dx, bytes, m, k)?);
        }
        let mut gradient = |arg, gradient: Option<Gradient>, rows, cols| -> Result<()> {
            if let Some(Gradient { matrix, f32 }) = gradient {
                outputs.push(sized(arg, matrix, if f32 { 4 } else { bytes }, rows, cols)?);
            }
            Ok(())
        };
        gradient("da", self.da, r, k)?;
        for (at, (projection, &ranks)) in all.iter().zip(&ranks).enumerate() {
            gradient(name("db", at), projection.db, projection.w.rows, ranks)?;
        }
        for (at, projection) in all.iter().enumerate() {
            gradient(name("dbias", at), projection.dbias, 1, projection.w.rows)?;
        }
        check_operands(shape, &scales, &inputs, &outputs)
    }
}

/// Columns of h for so many ranks of each projection.
fn middle_columns(ranks: &[usize], is_split: bool) -> Result<usize> {
    if !is_split {
        return Ok(ranks.iter().sum());
    }
    let groups: usize = ranks.iter().map(|r| r.div_ceil(SPLIT_RANKS)).sum();
    let padded = groups.saturating_mul(SPLIT_RANKS);
    if split_ranks(padded) > MAX_DIMENSION {
        let limit = (MAX_DIMENSION / 3 / SPLIT_RANKS * SPLIT_RANKS) as u64;
        return Err(Error::TooLarge { what: "R (rows of a) of f32 factors", got: padded as u64, limit });
    }
    Ok(ranks.iter().copied().map(split_columns).sum())
}

/// A and B are of the storage type, or of f32; `arg` is A.
pub(crate) fn check_factors<T: Element, A: Element>(arg: &'static str) -> Result<()> {
    if A::DTYPE == T::DTYPE || A::DTYPE == Dtype::F32 {
        return Ok(());
    }
    let expected = format!("{}, the storage type of the layer, or f32", T::DTYPE.name());
    Err(Error::ArgumentDtype { arg, got: A::DTYPE.name().to_owned(), expected })
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
