//! Folding an adapter into a weight, and rounding its factors.

use rayon::prelude::*;

use super::convert::{narrow, widen};
use super::{Merge, Round, fits, judge, raw, shared};
use crate::error::{Error, Result};
use crate::shape::LoraShape;
use crate::{Dtype, Element, Factors, Matrix, MatrixMut};

/// merged = w + scale · B A; with the bits that every backend gives.
///
/// ```
/// use fused_lora::{Factors, Matrix, MatrixMut, bf16, cpu};
///
/// // N = 1, K = 2, R = 1; w is what `merged` holds.
/// let mut merged = [bf16::from_f32(256.0), bf16::ONE];
/// let (a, b) = ([bf16::ONE, bf16::ONE], [bf16::ONE]);
/// cpu::merge(cpu::Merge {
///     w: None,
///     factors: Factors::Storage { a: Matrix::new(&a[..], 1, 2), b: Matrix::new(&b[..], 1, 1) },
///     scale: 0.5,
///     merged: MatrixMut::new(&mut merged[..], 1, 2),
/// })?;
/// assert_eq!(merged.map(bf16::to_f32), [256.0, 1.5]); // 256.5 is rounded
/// # Ok::<(), fused_lora::Error>(())
/// ```
///
/// # Errors
/// What [`raw::Merge::check`](crate::raw::Merge::check) finds, [`Error::BufferTooShort`], and [`Error::OutOfMemory`] for A in
/// f32. Nothing is written then.
pub fn merge<T: Element>(op: Merge<'_, T>) -> Result<()> {
    check_merge(&op)?;
    let Merge { w, factors, scale, merged } = op;
    match factors {
        Factors::Storage { a, b } => merge_with(w, a, b, scale, merged),
        Factors::F32 { a, b } => merge_with(w, a, b, scale, merged),
    }
}

/// A matrix without columns need not lie in its buffer.
fn row<T>(matrix: Matrix<'_, [T]>, row: usize) -> &[T] {
    if matrix.cols == 0 { &[] } else { &matrix.data[matrix.offset + row * matrix.row_stride..][..matrix.cols] }
}

fn merge_with<T: Element, F: Element>(
    w: Option<Matrix<'_, [T]>>,
    a: Matrix<'_, [F]>,
    b: Matrix<'_, [F]>,
    scale: f32,
    merged: MatrixMut<'_, [T]>,
) -> Result<()> {
    let MatrixMut { data, offset, rows, cols, row_stride } = merged;
    let elements = a.rows.saturating_mul(cols);
    let mut wide = Vec::new();
    wide.try_reserve_exact(elements).map_err(|_| Error::OutOfMemory { bytes: elements.saturating_mul(4) })?;
    wide.resize(elements, 0.0f32);
    wide.chunks_exact_mut(cols).enumerate().for_each(|(rank, line)| widen(row(a, rank), line));
    let lines = data[offset..].par_chunks_mut(row_stride).take(rows).enumerate();
    let scratch = || (vec![0.0f32; cols], vec![0.0f32; cols]);
    lines.for_each_init(scratch, |(sums, old), (n, line)| {
        let line = &mut line[..cols];
        sums.fill(0.0);
        for (factor, a) in row(b, n).iter().zip(wide.chunks_exact(cols)) {
            let factor = factor.to_f32();
            sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * a);
        }
        widen(w.map_or(&*line, |w| row(w, n)), old);
        sums.iter_mut().zip(old.iter()).for_each(|(sum, old)| *sum = old + scale * *sum);
        narrow(sums, line);
    });
    Ok(())
}

/// rounded_a = A and rounded_b = scale · B in the storage type.
///
/// # Errors
/// What [`raw::Round::check`](crate::raw::Round::check) finds, and [`Error::BufferTooShort`]. Nothing is written then.
pub fn round<T: Element>(op: Round<'_, T>) -> Result<()> {
    check_round(&op)?;
    let Round { factors, scale, rounded_a, rounded_b } = op;
    match factors {
        Factors::Storage { a, b } => {
            round_with(a, 1.0, rounded_a);
            round_with(b, scale, rounded_b);
        }
        Factors::F32 { a, b } => {
            round_with(a, 1.0, rounded_a);
            round_with(b, scale, rounded_b);
        }
    }
    Ok(())
}

fn round_with<T: Element, F: Element>(from: Matrix<'_, [F]>, scale: f32, to: MatrixMut<'_, [T]>) {
    if from.cols == 0 {
        return;
    }
    let mut wide = vec![0.0f32; from.cols];
    for at in 0..from.rows {
        widen(row(from, at), &mut wide);
        wide.iter_mut().for_each(|value| *value *= scale);
        narrow(&wide, &mut to.data[to.offset + at * to.row_stride..][..to.cols]);
    }
}

/// A and B as the shape checks see them, whether they are f32, and whether their buffers hold them.
fn check_factors<T: Element>(factors: &Factors<'_, [T], [f32]>) -> ([crate::raw::Matrix; 2], bool, Result<()>) {
    match *factors {
        Factors::Storage { a, b } => {
            ([raw(a), raw(b)], T::DTYPE == Dtype::F32, fits("a", a).and_then(|()| fits("b", b)))
        }
        Factors::F32 { a, b } => ([raw(a), raw(b)], true, fits("a", a).and_then(|()| fits("b", b))),
    }
}

pub(crate) fn check_merge<T: Element>(op: &Merge<'_, T>) -> Result<LoraShape> {
    let Merge { w, ref factors, scale, ref merged } = *op;
    let ([a, b], f32_factors, lengths) = check_factors(factors);
    let merged = shared(merged);
    let shape =
        crate::raw::Merge { dtype: T::DTYPE, w: w.map(raw), f32_factors, a, b, scale, merged: raw(merged) }.check();
    judge(shape, w.map_or(Ok(()), |w| fits("w", w)).and(lengths).and(fits("merged", merged)))
}

pub(crate) fn check_round<T: Element>(op: &Round<'_, T>) -> Result<LoraShape> {
    let Round { ref factors, scale, ref rounded_a, ref rounded_b } = *op;
    let ([a, b], f32_factors, lengths) = check_factors(factors);
    let (rounded_a, rounded_b) = (shared(rounded_a), shared(rounded_b));
    let (to_a, to_b) = (raw(rounded_a), raw(rounded_b));
    let shape =
        crate::raw::Round { dtype: T::DTYPE, f32_factors, a, b, scale, rounded_a: to_a, rounded_b: to_b }.check();
    judge(shape, lengths.and(fits("rounded_a", rounded_a)).and(fits("rounded_b", rounded_b)))
}
