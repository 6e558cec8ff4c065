//! Folding an adapter into a weight, and rounding its factors.

use rayon::prelude::*;

use super::convert::{narrow, widen};
use super::{Gain, Merge, Round, fits, judge, raw, shared, vector};
use crate::error::{Error, Result};
use crate::shape::LoraShape;
use crate::{Dtype, Element, Factors, Matrix, MatrixMut};

/// merged = w + scale · B A, or that times a gain; with the bits that every backend gives.
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
///     gain: None,
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
    let Merge { w, factors, scale, gain, merged } = op;
    let gain = gain.map(vector);
    match factors {
        Factors::Storage { a, b } => merge_with(w, a, b, (scale, gain), merged),
        Factors::F32 { a, b } => merge_with(w, a, b, (scale, gain), merged),
    }
}

/// A matrix without columns need not lie in its buffer.
fn row<T>(matrix: Matrix<'_, [T]>, row: usize) -> &[T] {
    if matrix.cols == 0 { &[] } else { &matrix.data[matrix.offset + row * matrix.row_stride..][..matrix.cols] }
}

/// A in f32.
fn widened_rows<F: Element>(a: Matrix<'_, [F]>, cols: usize) -> Result<Vec<f32>> {
    let elements = a.rows.saturating_mul(cols);
    let mut wide = Vec::new();
    wide.try_reserve_exact(elements).map_err(|_| Error::OutOfMemory { bytes: elements.saturating_mul(4) })?;
    wide.resize(elements, 0.0f32);
    wide.chunks_exact_mut(cols).enumerate().for_each(|(rank, line)| widen(row(a, rank), line));
    Ok(wide)
}

/// sums = a row of B times A, rank by rank.
fn fold<F: Element>(factors: &[F], a: &[f32], sums: &mut [f32]) {
    let cols = sums.len();
    sums.fill(0.0);
    for (factor, a) in factors.iter().zip(a.chunks_exact(cols)) {
        let factor = factor.to_f32();
        sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * a);
    }
}

fn merge_with<T: Element, F: Element>(
    w: Option<Matrix<'_, [T]>>,
    a: Matrix<'_, [F]>,
    b: Matrix<'_, [F]>,
    (scale, gain): (f32, Option<&[f32]>),
    merged: MatrixMut<'_, [T]>,
) -> Result<()> {
    let MatrixMut { data, offset, rows, cols, row_stride } = merged;
    let wide = widened_rows(a, cols)?;
    let lines = data[offset..].par_chunks_mut(row_stride).take(rows).enumerate();
    let scratch = || (vec![0.0f32; cols], vec![0.0f32; cols]);
    lines.for_each_init(scratch, |(sums, old), (n, line)| {
        let line = &mut line[..cols];
        fold(row(b, n), &wide, sums);
        widen(w.map_or(&*line, |w| row(w, n)), old);
        sums.iter_mut().zip(old.iter()).for_each(|(sum, old)| *sum = old + scale * *sum);
        if let Some(gain) = gain {
            sums.iter_mut().for_each(|sum| *sum *= gain[n]);
        }
        narrow(sums, line);
    });
    Ok(())
}

/// rounded_a = A and rounded_b = scale · B, or that over a divisor, in the storage type or in f32.
///
/// # Errors
/// What [`raw::Round::check`](crate::raw::Round::check) finds, [`Error::ArgumentDtype`] for outputs of a third type, and
/// [`Error::BufferTooShort`]. Nothing is written then.
pub fn round<T: Element, A: Element>(op: Round<'_, T, A>) -> Result<()> {
    check_round(&op)?;
    let Round { factors, scale, divisor, rounded_a, rounded_b } = op;
    let divisor = divisor.map(vector);
    match factors {
        Factors::Storage { a, b } => {
            round_with(a, (1.0, None), rounded_a);
            round_with(b, (scale, divisor), rounded_b);
        }
        Factors::F32 { a, b } => {
            round_with(a, (1.0, None), rounded_a);
            round_with(b, (scale, divisor), rounded_b);
        }
    }
    Ok(())
}

fn round_with<A: Element, F: Element>(
    from: Matrix<'_, [F]>,
    (scale, divisor): (f32, Option<&[f32]>),
    to: MatrixMut<'_, [A]>,
) {
    if from.cols == 0 {
        return;
    }
    let mut wide = vec![0.0f32; from.cols];
    for at in 0..from.rows {
        widen(row(from, at), &mut wide);
        wide.iter_mut().for_each(|value| *value *= scale);
        if let Some(divisor) = divisor {
            wide.iter_mut().for_each(|value| *value /= divisor[at]);
        }
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
    let Merge { w, ref factors, scale, gain, ref merged } = *op;
    let ([a, b], f32_factors, lengths) = check_factors(factors);
    let merged = shared(merged);
    let (w_at, gain_at) = (w.map(raw), gain.map(raw));
    let shape =
        crate::raw::Merge { dtype: T::DTYPE, w: w_at, f32_factors, a, b, scale, gain: gain_at, merged: raw(merged) }
            .check();
    let gain = gain.map_or(Ok(()), |gain| fits("gain", gain));
    judge(shape, w.map_or(Ok(()), |w| fits("w", w)).and(lengths).and(gain).and(fits("merged", merged)))
}

pub(crate) fn check_round<T: Element, A: Element>(op: &Round<'_, T, A>) -> Result<LoraShape> {
    crate::shape::check_factors::<T, A>("rounded_a")?;
    let Round { ref factors, scale, divisor, ref rounded_a, ref rounded_b } = *op;
    let ([a, b], f32_factors, lengths) = check_factors(factors);
    let (rounded_a, rounded_b) = (shared(rounded_a), shared(rounded_b));
    let shape = crate::raw::Round {
        dtype: T::DTYPE,
        f32_factors,
        f32_rounded: A::DTYPE == Dtype::F32,
        a,
        b,
        scale,
        divisor: divisor.map(raw),
        rounded_a: raw(rounded_a),
        rounded_b: raw(rounded_b),
    }
    .check();
    let divisor = divisor.map_or(Ok(()), |divisor| fits("divisor", divisor));
    judge(shape, lengths.and(divisor).and(fits("rounded_a", rounded_a)).and(fits("rounded_b", rounded_b)))
}

/// norm = ‖W + scale · B A‖ and gain = magnitude / norm.
///
/// # Errors
/// What [`raw::Gain::check`](crate::raw::Gain::check) finds, [`Error::BufferTooShort`], and [`Error::OutOfMemory`] for A in f32.
/// Nothing is written then.
pub fn gain<T: Element>(op: Gain<'_, T>) -> Result<()> {
    check_gain(&op)?;
    let Gain { w, factors, scale, magnitude, earlier, norm, gain } = op;
    let norms = match factors {
        Factors::Storage { a, b } => norms(w, a, b, scale),
        Factors::F32 { a, b } => norms(w, a, b, scale),
    }?;
    if let (Some(gain), Some(magnitude)) = (gain, magnitude) {
        let gain = &mut gain.data[gain.offset..][..norms.len()];
        let ratios = vector(magnitude).iter().zip(&norms).map(|(magnitude, norm)| magnitude / norm);
        gain.iter_mut().zip(ratios).for_each(|(to, ratio)| *to = ratio);
        if let Some(earlier) = earlier {
            gain.iter_mut().zip(vector(earlier)).for_each(|(gain, earlier)| *gain *= earlier);
        }
    }
    if let Some(norm) = norm {
        norm.data[norm.offset..][..norms.len()].copy_from_slice(&norms);
    }
    Ok(())
}

/// Sums over ranks in f32 as in [`merge`], squares in f64.
fn norms<T: Element, F: Element>(
    w: Matrix<'_, [T]>,
    a: Matrix<'_, [F]>,
    b: Matrix<'_, [F]>,
    scale: f32,
) -> Result<Vec<f32>> {
    let cols = w.cols;
    let wide = widened_rows(a, cols)?;
    let scratch = || (vec![0.0f32; cols], vec![0.0f32; cols]);
    let norm = |(sums, old): &mut (Vec<f32>, Vec<f32>), n: usize| {
        fold(row(b, n), &wide, sums);
        widen(row(w, n), old);
        let squares = sums.iter().zip(old.iter()).map(|(sum, old)| f64::from(old + scale * sum).powi(2));
        squares.sum::<f64>().sqrt() as f32
    };
    Ok((0..w.rows).into_par_iter().map_init(scratch, norm).collect())
}

pub(crate) fn check_gain<T: Element>(op: &Gain<'_, T>) -> Result<LoraShape> {
    let Gain { w, ref factors, scale, magnitude, earlier, ref norm, ref gain } = *op;
    let ([a, b], f32_factors, lengths) = check_factors(factors);
    let (norm, gain) = (norm.as_ref().map(shared), gain.as_ref().map(shared));
    let shape = crate::raw::Gain {
        dtype: T::DTYPE,
        w: raw(w),
        f32_factors,
        a,
        b,
        scale,
        magnitude: magnitude.map(raw),
        earlier: earlier.map(raw),
        norm: norm.map(raw),
        gain: gain.map(raw),
    }
    .check();
    let vectors = [("magnitude", magnitude), ("earlier", earlier), ("norm", norm), ("gain", gain)];
    let vectors = vectors.into_iter().try_for_each(|(arg, vector)| vector.map_or(Ok(()), |vector| fits(arg, vector)));
    judge(shape, fits("w", w).and(lengths).and(vectors))
}
