//! The op over [`CpuStorage`].

use candle_core::{CpuStorage, Result, Storage};

use super::backend::{Backend, Backward, Forward, Gain, Gradients, Operand, Outputs, Precision, Scalar, variant};
use super::wrap;
use crate::error::Error;
use crate::{Accumulate, Factors, Gradient, MagnitudeGradient, Matrix, MatrixMut, cpu};

pub(super) struct Cpu;

impl Backend for Cpu {
    type Storage = CpuStorage;

    fn of(storage: &Storage) -> Result<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => candle_core::bail!("a tensor has left the CPU"),
        }
    }

    fn wrap(storage: CpuStorage) -> Storage {
        Storage::Cpu(storage)
    }

    fn forward<T: Scalar>(op: &Forward<'_, CpuStorage>) -> Result<Outputs<CpuStorage>> {
        let (m, n, r) = (op.x.view.rows, op.w.view.rows, op.a.view.rows);
        let mut y = zeros::<T>(m, n)?;
        let mut h = if op.keep_h { Some(zeros::<T>(m, r)?) } else { None };
        cpu::forward(cpu::Forward {
            x: matrix(op.x)?,
            w: matrix(op.w)?,
            a: matrix::<T>(op.a)?,
            b: matrix(op.b)?,
            scale: op.scale,
            bias: op.bias.map(matrix).transpose()?,
            h: h.as_mut().map(|h| MatrixMut::new(h.as_mut_slice(), m, r)),
            y: MatrixMut::new(y.as_mut_slice(), m, n),
            variant: variant(op.dropout, op.gain.map(matrix).transpose()?),
        })
        .map_err(wrap)?;
        Ok(Outputs { y: T::to_cpu_storage_owned(y), h: h.map(T::to_cpu_storage_owned) })
    }

    fn backward<T: Scalar>(op: &Backward<'_, CpuStorage>) -> Result<Gradients<CpuStorage>> {
        let (m, k, n, r) = (op.dy.view.rows, op.w.view.cols, op.w.view.rows, op.a.view.rows);
        let mut dx = if op.dx { Some(zeros::<T>(m, k)?) } else { None };
        let mut da = op.da.map(|precision| Buffer::<T>::new(precision, r, k)).transpose()?;
        let mut db = op.db.map(|precision| Buffer::<T>::new(precision, n, r)).transpose()?;
        let mut dbias = op.dbias.map(|precision| Buffer::<T>::new(precision, 1, n)).transpose()?;
        let mut dm = if op.dm.is_some() { Some(zeros::<f32>(1, n)?) } else { None };
        cpu::backward(cpu::Backward {
            dy: matrix(op.dy)?,
            w: matrix(op.w)?,
            a: matrix::<T>(op.a)?,
            b: matrix(op.b)?,
            scale: op.scale,
            x: Some(matrix(op.x)?),
            h: op.h.map(matrix).transpose()?,
            dx: dx.as_mut().map(|dx| MatrixMut::new(dx.as_mut_slice(), m, k)),
            da: da.as_mut().map(|da| da.gradient(r, k)),
            db: db.as_mut().map(|db| db.gradient(n, r)),
            dbias: dbias.as_mut().map(|dbias| dbias.gradient(1, n)),
            dm: match (&op.dm, &mut dm) {
                (Some(of), Some(dm)) => Some(MagnitudeGradient {
                    y: matrix(of.y)?,
                    bias: of.bias.map(matrix).transpose()?,
                    magnitude: matrix(of.magnitude)?,
                    dm: MatrixMut::new(dm.as_mut_slice(), 1, n),
                }),
                _ => None,
            },
            accumulate: Accumulate::default(),
            variant: variant(op.dropout, op.gain.map(matrix).transpose()?),
        })
        .map_err(wrap)?;
        Ok(Gradients {
            dx: dx.map(T::to_cpu_storage_owned),
            da: da.map(Buffer::into_storage),
            db: db.map(Buffer::into_storage),
            dbias: dbias.map(Buffer::into_storage),
            dm: dm.map(CpuStorage::F32),
        })
    }

    fn gain<T: Scalar>(op: &Gain<'_, CpuStorage>) -> Result<CpuStorage> {
        let n = op.w.view.rows;
        let mut gain = zeros::<f32>(1, n)?;
        cpu::gain::<T>(cpu::Gain {
            w: matrix(op.w)?,
            factors: match op.f32_factors {
                true => Factors::F32 { a: matrix(op.a)?, b: matrix(op.b)? },
                false => Factors::Storage { a: matrix(op.a)?, b: matrix(op.b)? },
            },
            scale: op.scale,
            magnitude: Some(matrix(op.magnitude)?),
            earlier: None,
            norm: None,
            gain: Some(MatrixMut::new(gain.as_mut_slice(), 1, n)),
        })
        .map_err(wrap)?;
        Ok(CpuStorage::F32(gain))
    }
}

fn matrix<'a, T: Scalar>(operand: Operand<'a, CpuStorage>) -> Result<Matrix<'a, [T]>> {
    let view = operand.view;
    let data: &'a [T] = operand.storage.as_slice()?;
    Ok(Matrix::new(data, view.rows, view.cols).with_row_stride(view.row_stride).with_offset(view.offset))
}

fn zeros<T: Scalar>(rows: usize, cols: usize) -> Result<Vec<T>> {
    let elements = rows.saturating_mul(cols);
    let bytes = elements.saturating_mul(size_of::<T>());
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(elements).map_err(|_| wrap(Error::OutOfMemory { bytes }))?;
    zeros.resize(elements, T::default());
    Ok(zeros)
}

/// An adapter's gradient in the making.
enum Buffer<T> {
    Storage(Vec<T>),
    F32(Vec<f32>),
}

impl<T: Scalar> Buffer<T> {
    fn new(precision: Precision, rows: usize, cols: usize) -> Result<Self> {
        Ok(match precision {
            Precision::Storage => Self::Storage(zeros(rows, cols)?),
            Precision::F32 => Self::F32(zeros(rows, cols)?),
        })
    }

    fn gradient(&mut self, rows: usize, cols: usize) -> Gradient<'_, [T], [f32]> {
        match self {
            Self::Storage(data) => Gradient::Storage(MatrixMut::new(data.as_mut_slice(), rows, cols)),
            Self::F32(data) => Gradient::F32(MatrixMut::new(data.as_mut_slice(), rows, cols)),
        }
    }

    fn into_storage(self) -> CpuStorage {
        match self {
            Self::Storage(data) => T::to_cpu_storage_owned(data),
            Self::F32(data) => CpuStorage::F32(data),
        }
    }
}
