//! The CPU backend: the same operations over slices in host memory, on all cores, for f16, bf16 and f32.
//!
//! Products run on the f32 kernels of the [`gemm`](https://docs.rs/gemm) crate; 16-bit operands are widened block by
//! block, so no matrix is ever copied. Scratch is at most 2 MiB per thread (4 MiB for sums in f64), plus the bias in f32,
//! 16 bytes for each row of an output and tile of its columns, and the M × R middle where the caller does not pass one.
//!
//! **Rounding.** As the GPU kernels: sums in f32; h and dh are rounded to the storage type and used as rounded; y and dx
//! get one rounding at the end, of both products, the bias and what is accumulated into. Products of
//! f32 matrices of up to 2²² multiply-adds are summed in f64, and so is dbias.
//!
//! **Repeatable.** The same inputs on the same machine give the same bits, whatever the number of threads: the order of
//! every sum follows from the shape.

mod adapter;
mod convert;
mod product;

#[cfg(all(feature = "emulator", feature = "cuda"))]
pub(crate) use adapter::{check_gain, check_merge, check_round};
pub use adapter::{gain, merge, round};

use crate::dropout::Keep;
use crate::error::{Error, Result};
use crate::shape::{LoraShape, check_length};
use crate::{Dropout, Dtype, Element, Gradient, MagnitudeGradient, Matrix, MatrixMut, Seed, raw};
use product::{Epilogue, Side, Term, column_sums, magnitude_sums, product};

/// [`crate::Forward`] over slices.
pub type Forward<'a, T> = crate::Forward<'a, [T], [T], [u64], [f32]>;
/// [`crate::Backward`] over slices; gradients are `[T]` or `[f32]`.
pub type Backward<'a, T> = crate::Backward<'a, [T], [T], [f32], [u64], [f32]>;
/// [`crate::Variant`] over slices.
pub type Variant<'a> = crate::Variant<'a, [u64], [f32]>;
/// [`crate::Merge`] over slices; factors are `[T]` or `[f32]`.
pub type Merge<'a, T> = crate::Merge<'a, [T], [T], [f32]>;
/// [`crate::Round`] over slices; factors are `[T]` or `[f32]`.
pub type Round<'a, T> = crate::Round<'a, [T], [T], [f32]>;

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
///     a: Matrix::new(&[1.0, 1.0], 1, 2),
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
pub fn forward<T: Element>(op: Forward<'_, T>) -> Result<()> {
    let shape = check_forward(&op)?;
    let Forward { x, w, a, b, scale, bias, h, y, variant } = op;
    let (keep, scale) = (kept(&variant), scale * raw_variant(&variant).factor());
    let routes = routed(&variant, shape.m);
    let bias = bias.map(|bias| widened(bias, shape.n));
    let gain = variant.gain.map(vector);
    let mut scratch = Vec::new();
    let mut h = match h {
        Some(h) => h,
        None => middle(&mut scratch, shape)?,
    };
    let scaled = Epilogue { scale: Some(scale), routes, ..Epilogue::default() };
    product(&[Term::new(Side::rows(x).keeping(keep), Side::rows(a))], &scaled, reborrow(&mut h));
    let terms = [Term::new(Side::rows(x), Side::rows(w)), Term::new(Side::rows(shared(&h)), Side::rows(b))];
    product(&terms, &Epilogue { gain, bias: bias.as_deref(), ..Epilogue::default() }, y);
    Ok(())
}

/// dx = dy W + dh A, da = dhᵀ x, db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B; only the outputs that are present.
///
/// # Errors
/// What [`raw::Backward::check`] finds, [`Error::BufferTooShort`], and [`Error::OutOfMemory`] for the scratch of dh.
/// Nothing is written then.
pub fn backward<T: Element>(op: Backward<'_, T>) -> Result<()> {
    let shape = check_backward(&op)?;
    let Backward { dy, w, a, b, scale, x, h, dx, da, db, dbias, dm, accumulate, variant } = op;
    let gain = variant.gain.map(vector);
    let (keep, scale) = (kept(&variant), scale * raw_variant(&variant).factor());
    let routes = routed(&variant, shape.m);
    let adds = |accumulate| Epilogue { accumulate, ..Epilogue::default() };
    let mut scratch = Vec::new();
    if dx.is_some() || da.is_some() {
        let mut dh = middle(&mut scratch, shape)?;
        let scaled = Epilogue { scale: Some(scale), routes, ..Epilogue::default() };
        product(&[Term::new(Side::rows(dy).gaining(gain), Side::columns(b))], &scaled, reborrow(&mut dh));
        let dh = shared(&dh);
        if let Some(dx) = dx {
            // The adapter's part first: of it alone the dropped elements are zeros.
            let terms = [
                Term::new(Side::rows(dh), Side::columns(a)).keeping(keep),
                Term::new(Side::rows(dy).gaining(gain), Side::columns(w)),
            ];
            product(&terms, &adds(accumulate.dx), dx);
        }
        if let (Some(da), Some(x)) = (da, x) {
            let term = Term::new(Side::columns(dh), Side::columns(x).keeping(keep));
            adapter_gradient(term, &adds(accumulate.da), da);
        }
    }
    if let (Some(db), Some(h)) = (db, h) {
        let gained = Epilogue { row_gain: gain, ..adds(accumulate.db) };
        adapter_gradient(Term::new(Side::columns(dy), Side::columns(h)), &gained, db);
    }
    match dbias {
        Some(Gradient::Storage(dbias)) => column_sums(dy, accumulate.dbias, dbias),
        Some(Gradient::F32(dbias)) => column_sums(dy, accumulate.dbias, dbias),
        None => {}
    }
    if let Some(MagnitudeGradient { y, bias, magnitude, dm }) = dm {
        let bias = bias.map(|bias| widened(bias, shape.n));
        magnitude_sums(dy, y, bias.as_deref(), vector(magnitude), accumulate.dm, dm);
    }
    Ok(())
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

/// The first `n` elements of a vector in f32.
fn widened<T: Element>(vector: Matrix<'_, [T]>, n: usize) -> Vec<f32> {
    vector.data[vector.offset..vector.offset + n].iter().map(|value| value.to_f32()).collect()
}

/// A contiguous M × R matrix in `scratch`.
fn middle<T: Element>(scratch: &mut Vec<T>, shape: LoraShape) -> Result<MatrixMut<'_, [T]>> {
    let elements = shape.m.saturating_mul(shape.r);
    let bytes = elements.saturating_mul(size_of::<T>());
    scratch.try_reserve_exact(elements).map_err(|_| Error::OutOfMemory { bytes })?;
    scratch.resize(elements, T::default());
    Ok(MatrixMut::new(scratch.as_mut_slice(), shape.m, shape.r))
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

/// The variant as the shape checks see it.
fn raw_variant(variant: &Variant<'_>) -> raw::Variant {
    let dropout = variant.dropout.map(|Dropout { p, seed }| raw::Dropout {
        p,
        seed: match seed {
            Seed::Value { seed, offset } => raw::Seed::Value { seed, offset },
            Seed::Memory(state) => raw::Seed::Memory(raw(state)),
        },
    });
    raw::Variant { dropout, routes: variant.routes.map(raw), gain: variant.gain.map(raw) }
}

fn fits_variant(variant: &Variant<'_>) -> Result<()> {
    if let Some(routes) = variant.routes {
        fits("routes", routes)?;
    }
    if let Some(gain) = variant.gain {
        fits("gain", gain)?;
    }
    match variant.dropout {
        Some(Dropout { seed: Seed::Memory(state), .. }) => fits("seed", state),
        _ => Ok(()),
    }
}

/// The route of each row; `None` without a table. The variant has been checked.
fn routed<'a>(variant: &Variant<'a>, m: usize) -> Option<&'a [u64]> {
    let Matrix { data, offset, .. } = variant.routes?;
    Some(&data[offset..offset + m])
}

/// The elements of x that the adapter branch sees; `None` for all. The variant has been checked.
fn kept(variant: &Variant<'_>) -> Option<Keep> {
    let Dropout { p, seed } = variant.dropout?;
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

pub(crate) fn check_forward<T: Element>(op: &Forward<'_, T>) -> Result<LoraShape> {
    let Forward { x, w, a, b, scale, bias, ref h, ref y, ref variant } = *op;
    let (h, y) = (h.as_ref().map(shared), shared(y));
    let shape = raw::Forward {
        dtype: T::DTYPE,
        x: raw(x),
        w: raw(w),
        a: raw(a),
        b: raw(b),
        scale,
        bias: bias.map(raw),
        h: h.map(raw),
        y: raw(y),
        variant: raw_variant(variant),
    }
    .check();
    let named =
        [("x", Some(x)), ("w", Some(w)), ("a", Some(a)), ("b", Some(b)), ("bias", bias), ("h", h), ("y", Some(y))];
    let lengths = named.into_iter().try_for_each(|(arg, matrix)| matrix.map_or(Ok(()), |matrix| fits(arg, matrix)));
    judge(shape, lengths.and(fits_variant(variant)))
}

pub(crate) fn check_backward<T: Element>(op: &Backward<'_, T>) -> Result<LoraShape> {
    let Backward { dy, w, a, b, scale, x, h, ref dx, ref da, ref db, ref dbias, ref dm, accumulate, ref variant } = *op;
    let dx = dx.as_ref().map(shared);
    let gradient = |gradient: &Option<Gradient<'_, [T], [f32]>>| match gradient {
        Some(Gradient::Storage(m)) => Some(raw::Gradient { matrix: raw(shared(m)), f32: T::DTYPE == Dtype::F32 }),
        Some(Gradient::F32(m)) => Some(raw::Gradient { matrix: raw(shared(m)), f32: true }),
        None => None,
    };
    let shape = raw::Backward {
        dtype: T::DTYPE,
        dy: raw(dy),
        w: raw(w),
        a: raw(a),
        b: raw(b),
        scale,
        x: x.map(raw),
        h: h.map(raw),
        dx: dx.map(raw),
        da: gradient(da),
        db: gradient(db),
        dbias: gradient(dbias),
        dm: dm.as_ref().map(|dm| raw::MagnitudeGradient {
            y: raw(dm.y),
            bias: dm.bias.map(raw),
            magnitude: raw(dm.magnitude),
            dm: raw(shared(&dm.dm)),
        }),
        accumulate,
        variant: raw_variant(variant),
    }
    .check();
    let named = [("dy", Some(dy)), ("w", Some(w)), ("a", Some(a)), ("b", Some(b)), ("x", x), ("h", h), ("dx", dx)];
    let inputs = named.into_iter().try_for_each(|(arg, matrix)| matrix.map_or(Ok(()), |matrix| fits(arg, matrix)));
    let gradients =
        [("da", da), ("db", db), ("dbias", dbias)].into_iter().try_for_each(|(arg, gradient)| match gradient {
            Some(Gradient::Storage(m)) => fits(arg, shared(m)),
            Some(Gradient::F32(m)) => fits(arg, shared(m)),
            None => Ok(()),
        });
    let magnitude = dm.as_ref().map_or(Ok(()), |dm| {
        fits("y", dm.y)?;
        dm.bias.map_or(Ok(()), |bias| fits("bias", bias))?;
        fits("magnitude", dm.magnitude)?;
        fits("dm", shared(&dm.dm))
    });
    judge(shape, inputs.and(gradients).and(magnitude).and(fits_variant(variant)))
}

/// Which verdict to report. Slices cannot overlap; an address that seems to says that a matrix leaves its buffer.
fn judge(shape: Result<LoraShape>, lengths: Result<()>) -> Result<LoraShape> {
    match shape {
        Ok(_) | Err(Error::Overlap { .. } | Error::NullPointer { .. } | Error::TooLarge { .. }) => lengths.and(shape),
        Err(_) => shape,
    }
}
