//! The CPU backend: the same operations over slices in host memory, on all cores, for f16, bf16 and f32.
//!
//! Products run on the f32 kernels of the [`gemm`](https://docs.rs/gemm) crate; 16-bit operands are widened block by
//! block, so no matrix is ever copied. Scratch is at most 2 MiB per thread (4 MiB for sums in f64), plus the bias in f32,
//! 16 bytes for each row of an output and tile of its columns, and the M × R middle where the caller does not pass one.
//!
//! **Rounding.** As the GPU kernels: sums in f32; h and dh are rounded to the storage type and used as rounded; y and dx
//! get one rounding at the end, of both products, the bias and what is accumulated into. f32 factors over a 16-bit layer are multiplied
//! as they are, and h and dh then stay in f32, but for the halves in which h is kept for backward. Products of
//! f32 matrices of up to 2²² multiply-adds are summed in f64, and so is dbias.
//!
//! **Repeatable.** The same inputs on the same machine give the same bits, whatever the number of threads: the order of
//! every sum follows from the shape.

mod adapter;
mod convert;
mod middle;
mod product;

#[cfg(all(feature = "emulator", feature = "cuda"))]
pub(crate) use adapter::{check_gain, check_merge, check_round};
pub use adapter::{gain, merge, round};

use std::ops::Range;

use crate::dropout::{Keep, factor};
use crate::error::{Error, Result};
use crate::shape::{LoraShape, check_factors, check_length};
use crate::{Dropout, Dtype, Element, Gradient, MagnitudeGradient, Matrix, MatrixMut, Seed, raw, split_columns};
use middle::Middle;
use product::{Epilogue, Operand, Side, Term, column_sums, magnitude_sums, product};

/// [`crate::Forward`] over slices; factors are `[T]` or `[f32]`.
pub type Forward<'a, T, A = T> = crate::Forward<'a, [T], [T], [u64], [f32], [A]>;
/// [`crate::Backward`] over slices; factors and gradients are `[T]` or `[f32]`.
pub type Backward<'a, T, A = T> = crate::Backward<'a, [T], [T], [f32], [u64], [f32], [A]>;
/// [`crate::ForwardProjection`] over slices.
pub type ForwardProjection<'a, T, A = T> = crate::ForwardProjection<'a, [T], [T], [f32], [A]>;
/// [`crate::ForwardShared`] over slices.
pub type ForwardShared<'a, T, A = T> = crate::ForwardShared<'a, [T], [T], [u64], [f32], [A]>;
/// [`crate::BackwardProjection`] over slices; gradients are `[T]` or `[f32]`.
pub type BackwardProjection<'a, T, A = T> = crate::BackwardProjection<'a, [T], [T], [f32], [f32], [A]>;
/// [`crate::BackwardShared`] over slices; gradients are `[T]` or `[f32]`.
pub type BackwardShared<'a, T, A = T> = crate::BackwardShared<'a, [T], [T], [f32], [u64], [f32], [A]>;
/// [`crate::Variant`] over slices.
pub type Variant<'a> = crate::Variant<'a, [u64], [f32]>;
/// [`crate::Merge`] over slices; factors are `[T]` or `[f32]`.
pub type Merge<'a, T> = crate::Merge<'a, [T], [T], [f32]>;
/// [`crate::Round`] over slices; factors are `[T]` or `[f32]`, and so are outputs.
pub type Round<'a, T, A = T> = crate::Round<'a, [T], [A], [f32]>;

/// [`crate::Gain`] over slices; factors are `[T]` or `[f32]`.
pub type Gain<'a, T> = crate::Gain<'a, [T], [f32], [f32]>;

/// This backend as [`LoraLinear`](crate::linear::LoraLinear) takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpu;

/// y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ.
///
/// ```
/// use fused_lora::{Matrix, MatrixMut, Variant, cpu};
///
/// // M = 1 token, K = 2 inputs, N = 2 outputs, rank R = 1.
/// let mut y = [0.0f32; 2];
/// cpu::forward(cpu::Forward {
///     x: Matrix::new(&[1.0, 2.0], 1, 2),
///     w: Matrix::new(&[1.0, 0.0, 0.0, 1.0], 2, 2),
///     a: Matrix::new(&[1.0f32, 1.0], 1, 2),
///     b: Matrix::new(&[1.0, -1.0], 2, 1),
///     scale: 0.5,
///     bias: None,
///     h: None,
///     y: MatrixMut::new(&mut y, 1, 2),
///     variant: Variant::default(),
/// })?;
/// assert_eq!(y, [2.5, 0.5]);
/// # Ok::<(), fused_lora::Error>(())
/// ```
///
/// # Errors
/// What [`raw::Forward::check`] finds, [`Error::BufferTooShort`], and [`Error::OutOfMemory`] for the scratch of h.
/// Nothing is written then.
pub fn forward<T: Element, A: Element>(op: Forward<'_, T, A>) -> Result<()> {
    forward_shared(op.into())
}

/// For each projection y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ, all of one x.
///
/// ```
/// use fused_lora::{Matrix, MatrixMut, cpu};
///
/// // M = 1, K = 2; rows 0 and 1 of one weight for the first output, row 2 for the second. Each adapter has R = 1.
/// let w = [1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0];
/// let b = [1.0, -1.0, 2.0];
/// let (mut first, mut second) = ([0.0; 2], [0.0; 1]);
/// let of = |from: usize, n: usize, y| cpu::ForwardProjection {
///     w: Matrix::new(&w[..], n, 2).with_offset(2 * from),
///     b: Matrix::new(&b[..], n, 1).with_offset(from),
///     scale: 0.5,
///     bias: None,
///     gain: None,
///     y,
/// };
/// let (y, z) = (MatrixMut::new(&mut first[..], 1, 2), MatrixMut::new(&mut second[..], 1, 1));
/// cpu::forward_shared(cpu::ForwardShared {
///     x: Matrix::new(&[1.0, 2.0], 1, 2),
///     a: Matrix::new(&[1.0, 1.0, 0.0, 1.0], 2, 2),
///     h: None,
///     projections: vec![of(0, 2, y), of(2, 1, z)],
///     dropout: None,
///     routes: None,
/// })?;
/// assert_eq!((first, second), ([2.5, 0.5], [5.0]));
/// # Ok::<(), fused_lora::Error>(())
/// ```
///
/// # Errors
/// What [`raw::ForwardShared::check`] finds, [`Error::Projections`], [`Error::BufferTooShort`], and [`Error::OutOfMemory`] for the
/// scratch of h. Nothing is written then.
pub fn forward_shared<T: Element, A: Element>(op: ForwardShared<'_, T, A>) -> Result<()> {
    let shape = check_forward(&op)?;
    let ForwardShared { x, a, h, projections, dropout, routes } = op;
    let (keep, factor) = (kept(&dropout), factor(dropout.map(|dropout| dropout.p)));
    let routes = routed(routes, shape.m);
    let mut h = Middle::of_forward::<A>(h, shape)?;
    let (mut first_rank, mut first_column) = (0, 0);
    for ForwardProjection { w, b, scale, bias, gain, y } in projections {
        let (a, ranks) = (Operand::of(rows_of(a, first_rank, b.cols)), first_rank..first_rank + b.cols);
        let scaled = Epilogue { scale: Some(scale * factor), routes, ..Epilogue::default() };
        h.compute(Term::new(Side::rows(x).keeping(keep), Side::rows(a)), &scaled, ranks.clone(), first_column);
        let (bias, gain) = (bias.map(widened), gain.map(vector));
        let terms = [
            Term::new(Side::rows(x), Side::rows(w)),
            Term::new(Side::rows(h.ranks(ranks)), Side::rows(Operand::of(b))),
        ];
        product(&terms, &Epilogue { gain, bias: bias.as_deref(), ..Epilogue::default() }, y);
        first_rank += b.cols;
        first_column += split_columns(b.cols);
    }
    Ok(())
}

/// dx = dy W + dh A, da = dhᵀ x, db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B; only the outputs that are present.
///
/// # Errors
/// What [`raw::Backward::check`] finds, [`Error::BufferTooShort`], and [`Error::OutOfMemory`] for the scratch of dh.
/// Nothing is written then.
pub fn backward<T: Element, A: Element>(op: Backward<'_, T, A>) -> Result<()> {
    backward_shared(op.into())
}

/// dx = Σ dy W + dh A over all projections, da = dhᵀ x, and for each db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B; only the
/// outputs that are present.
///
/// # Errors
/// What [`raw::BackwardShared::check`] finds, [`Error::Projections`], [`Error::BufferTooShort`], and [`Error::OutOfMemory`] for the
/// scratch of dh. Nothing is written then.
pub fn backward_shared<T: Element, A: Element>(op: BackwardShared<'_, T, A>) -> Result<()> {
    let shape = check_backward(&op)?;
    let BackwardShared { a, x, h, dx, da, projections, accumulate, dropout, routes } = op;
    let (keep, factor) = (kept(&dropout), factor(dropout.map(|dropout| dropout.p)));
    let routes = routed(routes, shape.m);
    let adds = |accumulate| Epilogue { accumulate, ..Epilogue::default() };
    let ranks: Vec<usize> = projections.iter().map(|of| of.b.cols).collect();
    let kept = h.map(|h| Middle::kept::<A>(h, shape, &ranks)).transpose()?;
    if dx.is_some() || da.is_some() {
        let mut dh = Middle::scratch::<A>(shape)?;
        let mut first_rank = 0;
        for &BackwardProjection { dy, b, scale, gain, .. } in &projections {
            let scaled = Epilogue { scale: Some(scale * factor), routes, ..Epilogue::default() };
            let term = Term::new(Side::rows(dy).gaining(gain.map(vector)), Side::columns(Operand::of(b)));
            dh.compute(term, &scaled, first_rank..first_rank + b.cols, 0);
            first_rank += b.cols;
        }
        let dh = dh.ranks(0..shape.r);
        if let Some(dx) = dx {
            // The adapters' part first: of it alone the dropped elements are zeros.
            let mut terms = vec![Term::new(Side::rows(dh), Side::columns(Operand::of(a))).keeping(keep)];
            let base = projections.iter().map(|of| (of.dy, of.w, of.gain.map(vector)));
            terms.extend(base.map(|(dy, w, gain)| Term::new(Side::rows(dy).gaining(gain), Side::columns(w))));
            product(&terms, &adds(accumulate.dx), dx);
        }
        if let (Some(da), Some(x)) = (da, x) {
            let term = Term::new(Side::columns(dh), Side::columns(x).keeping(keep));
            adapter_gradient(term, &adds(accumulate.da), da);
        }
    }
    let mut first_rank = 0;
    for BackwardProjection { dy, b, db, dbias, dm, gain, .. } in projections {
        if let (Some(db), Some(h)) = (db, &kept) {
            let own = h.ranks(first_rank..first_rank + b.cols);
            let gained = Epilogue { row_gain: gain.map(vector), ..adds(accumulate.db) };
            adapter_gradient(Term::new(Side::columns(dy), Side::columns(own)), &gained, db);
        }
        match dbias {
            Some(Gradient::Storage(dbias)) => column_sums(dy, accumulate.dbias, dbias),
            Some(Gradient::F32(dbias)) => column_sums(dy, accumulate.dbias, dbias),
            None => {}
        }
        if let Some(MagnitudeGradient { y, bias, magnitude, dm }) = dm {
            let bias = bias.map(widened);
            magnitude_sums(dy, y, bias.as_deref(), vector(magnitude), accumulate.dm, dm);
        }
        first_rank += b.cols;
    }
    Ok(())
}

/// `rows` rows from `first` on.
fn rows_of<T>(matrix: Matrix<'_, [T]>, first: usize, rows: usize) -> Matrix<'_, [T]> {
    Matrix { offset: matrix.offset + first * matrix.row_stride, rows, ..matrix }
}

fn columns_of<T>(matrix: Matrix<'_, [T]>, columns: Range<usize>) -> Matrix<'_, [T]> {
    Matrix { offset: matrix.offset + columns.start, cols: columns.len(), ..matrix }
}

fn reborrow_columns<'a, T>(matrix: &'a mut MatrixMut<'_, [T]>, columns: Range<usize>) -> MatrixMut<'a, [T]> {
    let whole = reborrow(matrix);
    MatrixMut { offset: whole.offset + columns.start, cols: columns.len(), ..whole }
}

fn adapter_gradient<T: Element>(term: Term<'_, T>, epilogue: &Epilogue<'_>, output: Gradient<'_, [T], [f32]>) {
    match output {
        Gradient::Storage(output) => product(&[term], epilogue, output),
        Gradient::F32(output) => product(&[term], epilogue, output),
    }
}

/// The elements of a matrix of one row.
fn vector<'a>(matrix: Matrix<'a, [f32]>) -> &'a [f32] {
    &matrix.data[matrix.offset..matrix.offset + matrix.cols]
}

/// The same in f32.
fn widened<T: Element>(matrix: Matrix<'_, [T]>) -> Vec<f32> {
    matrix.data[matrix.offset..matrix.offset + matrix.cols].iter().map(|value| value.to_f32()).collect()
}

pub(crate) fn reborrow<'a, T>(matrix: &'a mut MatrixMut<'_, [T]>) -> MatrixMut<'a, [T]> {
    let MatrixMut { ref mut data, offset, rows, cols, row_stride } = *matrix;
    MatrixMut { data, offset, rows, cols, row_stride }
}

pub(crate) fn shared<'a, T>(matrix: &'a MatrixMut<'_, [T]>) -> Matrix<'a, [T]> {
    let MatrixMut { ref data, offset, rows, cols, row_stride } = *matrix;
    Matrix { data, offset, rows, cols, row_stride }
}

/// The matrix as the shape checks see it; the address is only compared, never followed.
fn raw<T>(matrix: Matrix<'_, [T]>) -> raw::Matrix {
    let Matrix { data, offset, rows, cols, row_stride } = matrix;
    raw::Matrix { ptr: data.as_ptr().wrapping_add(offset) as u64, rows, cols, row_stride }
}

/// Dropout as the shape checks see it.
fn raw_dropout(dropout: &Option<Dropout<'_, [u64]>>) -> Option<raw::Dropout> {
    dropout.map(|Dropout { p, seed }| raw::Dropout {
        p,
        seed: match seed {
            Seed::Value { seed, offset } => raw::Seed::Value { seed, offset },
            Seed::Memory(state) => raw::Seed::Memory(raw(state)),
        },
    })
}

fn words_fit(dropout: &Option<Dropout<'_, [u64]>>, routes: Option<Matrix<'_, [u64]>>) -> Result<()> {
    fits_if_there(("routes", routes))?;
    match dropout {
        Some(Dropout { seed: Seed::Memory(state), .. }) => fits("seed", *state),
        _ => Ok(()),
    }
}

/// The route of each row; `None` without a table, which has been checked.
fn routed<'a>(routes: Option<Matrix<'a, [u64]>>, m: usize) -> Option<&'a [u64]> {
    let Matrix { data, offset, .. } = routes?;
    Some(&data[offset..offset + m])
}

/// The elements of x that the adapter branch sees; `None` for all. Dropout has been checked.
fn kept(dropout: &Option<Dropout<'_, [u64]>>) -> Option<Keep> {
    let Dropout { p, seed } = (*dropout)?;
    let (seed, offset) = match seed {
        Seed::Value { seed, offset } => (seed, offset),
        Seed::Memory(state) => (state.data[state.offset], state.data[state.offset + 1]),
    };
    Keep::new(p, seed, offset)
}

/// The buffer must hold the matrix.
fn fits<T>(arg: &'static str, matrix: Matrix<'_, [T]>) -> Result<()> {
    let Matrix { data, offset, rows, cols, row_stride } = matrix;
    check_length(arg, data.len(), offset, (rows, cols, row_stride))
}

fn fits_if_there<T>((arg, matrix): (&'static str, Option<Matrix<'_, [T]>>)) -> Result<()> {
    matrix.map_or(Ok(()), |matrix| fits(arg, matrix))
}

pub(crate) fn check_forward<T: Element, A: Element>(op: &ForwardShared<'_, T, A>) -> Result<LoraShape> {
    check_factors::<T, A>("a")?;
    let ForwardShared { x, a, ref h, ref projections, ref dropout, routes } = *op;
    let h = h.as_ref().map(shared);
    let count = projections.len();
    let mut lengths = fits("x", x).and_then(|()| fits("a", a)).and_then(|()| fits_if_there(("h", h)));
    let mut judged = Vec::with_capacity(count);
    for (at, ForwardProjection { w, b, scale, bias, gain, y }) in projections.iter().enumerate() {
        let y = shared(y);
        let own = [("w", Some(*w)), ("bias", *bias), ("y", Some(y))];
        lengths = lengths
            .and_then(|()| fits(raw::named("b", at, count), *b))
            .and_then(|()| own.into_iter().try_for_each(|(arg, m)| fits_if_there((raw::named(arg, at, count), m))))
            .and_then(|()| fits_if_there((raw::named("gain", at, count), *gain)));
        judged.push(raw::ForwardProjection {
            w: raw(*w),
            b: raw(*b),
            scale: *scale,
            bias: bias.map(raw),
            gain: gain.map(raw),
            y: raw(y),
        });
    }
    let shape = raw::ForwardShared {
        dtype: T::DTYPE,
        x: raw(x),
        f32_factors: A::DTYPE == Dtype::F32,
        a: raw(a),
        h: h.map(raw),
        projections: raw::Projections::new(&judged)?,
        dropout: raw_dropout(dropout),
        routes: routes.map(raw),
    }
    .check();
    judge(shape, lengths.and(words_fit(dropout, routes)))
}

fn raw_gradient<T: Element>(gradient: &Gradient<'_, [T], [f32]>) -> raw::Gradient {
    match gradient {
        Gradient::Storage(m) => raw::Gradient { matrix: raw(shared(m)), f32: T::DTYPE == Dtype::F32 },
        Gradient::F32(m) => raw::Gradient { matrix: raw(shared(m)), f32: true },
    }
}

fn gradient_fits<T: Element>(arg: &'static str, gradient: &Option<Gradient<'_, [T], [f32]>>) -> Result<()> {
    match gradient {
        Some(Gradient::Storage(m)) => fits(arg, shared(m)),
        Some(Gradient::F32(m)) => fits(arg, shared(m)),
        None => Ok(()),
    }
}

fn magnitude_fits<T: Element>(
    name: impl Fn(&'static str) -> &'static str,
    dm: &MagnitudeGradient<'_, [T], [f32], [f32]>,
) -> Result<()> {
    fits(name("y"), dm.y)?;
    fits_if_there((name("bias"), dm.bias))?;
    fits(name("magnitude"), dm.magnitude)?;
    fits(name("dm"), shared(&dm.dm))
}

pub(crate) fn check_backward<T: Element, A: Element>(op: &BackwardShared<'_, T, A>) -> Result<LoraShape> {
    check_factors::<T, A>("a")?;
    let BackwardShared { a, x, h, ref dx, ref da, ref projections, accumulate, ref dropout, routes } = *op;
    let dx = dx.as_ref().map(shared);
    let count = projections.len();
    let named = [("x", x), ("h", h), ("dx", dx)];
    let mut lengths =
        fits("a", a).and_then(|()| named.into_iter().try_for_each(fits_if_there)).and(gradient_fits("da", da));
    let mut judged = Vec::with_capacity(count);
    for (at, BackwardProjection { dy, w, b, scale, db, dbias, dm, gain }) in projections.iter().enumerate() {
        let name = |arg| raw::named(arg, at, count);
        let own = [("dy", *dy), ("w", *w)];
        lengths = lengths
            .and_then(|()| fits(name("b"), *b))
            .and_then(|()| own.into_iter().try_for_each(|(arg, matrix)| fits(name(arg), matrix)))
            .and_then(|()| gradient_fits(name("db"), db))
            .and_then(|()| gradient_fits(name("dbias"), dbias))
            .and_then(|()| fits_if_there((name("gain"), *gain)))
            .and_then(|()| dm.as_ref().map_or(Ok(()), |dm| magnitude_fits(name, dm)));
        judged.push(raw::BackwardProjection {
            dy: raw(*dy),
            w: raw(*w),
            b: raw(*b),
            scale: *scale,
            db: db.as_ref().map(raw_gradient),
            dbias: dbias.as_ref().map(raw_gradient),
            dm: dm.as_ref().map(|dm| raw::MagnitudeGradient {
                y: raw(dm.y),
                bias: dm.bias.map(raw),
                magnitude: raw(dm.magnitude),
                dm: raw(shared(&dm.dm)),
            }),
            gain: gain.map(raw),
        });
    }
    let shape = raw::BackwardShared {
        dtype: T::DTYPE,
        f32_factors: A::DTYPE == Dtype::F32,
        a: raw(a),
        x: x.map(raw),
        h: h.map(raw),
        dx: dx.map(raw),
        da: da.as_ref().map(raw_gradient),
        projections: raw::Projections::new(&judged)?,
        accumulate,
        dropout: raw_dropout(dropout),
        routes: routes.map(raw),
    }
    .check();
    judge(shape, lengths.and(words_fit(dropout, routes)))
}

/// Which verdict to report. Slices cannot overlap; an address that seems to says that a matrix leaves its buffer.
fn judge(shape: Result<LoraShape>, lengths: Result<()>) -> Result<LoraShape> {
    match shape {
        Ok(_) | Err(Error::Overlap { .. } | Error::NullPointer { .. } | Error::TooLarge { .. }) => lengths.and(shape),
        Err(_) => shape,
    }
}
