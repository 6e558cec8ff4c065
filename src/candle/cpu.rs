//! The op over [`CpuStorage`].

use candle_core::{CpuStorage, Result, Storage};

use super::backend::{
    Backend, Backward, BackwardProjection, Forward, Gain, Gradients, Operand, Outputs, Own, Precision, Scalar, dropout,
};
use super::routes::Routes;
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

    fn forward<T: Scalar, A: Scalar>(op: &Forward<'_, CpuStorage>) -> Result<Outputs<CpuStorage>> {
        let (m, columns) = (op.x.view.rows, op.columns_of_h());
        let mut ys = op.projections.iter().map(|of| zeros::<T>(m, of.w.view.rows)).collect::<Result<Vec<_>>>()?;
        let mut h = if op.keep_h { Some(zeros::<T>(m, columns)?) } else { None };
        let mut projections = Vec::with_capacity(ys.len());
        for (of, y) in op.projections.iter().zip(&mut ys) {
            projections.push(cpu::ForwardProjection {
                w: matrix(of.w)?,
                b: matrix::<A>(of.b)?,
                scale: of.scale,
                bias: of.bias.map(matrix).transpose()?,
                gain: of.gain.map(matrix).transpose()?,
                y: MatrixMut::new(y.as_mut_slice(), m, of.w.view.rows),
            });
        }
        cpu::forward_shared(cpu::ForwardShared {
            x: matrix(op.x)?,
            a: matrix(op.a)?,
            h: h.as_mut().map(|h| MatrixMut::new(h.as_mut_slice(), m, columns)),
            projections,
            dropout: dropout(op.dropout),
            routes: op.routes.map(table),
        })
        .map_err(wrap)?;
        let ys = ys.into_iter().map(T::to_cpu_storage_owned).collect();
        Ok(Outputs { ys, h: h.map(T::to_cpu_storage_owned) })
    }

    fn backward<T: Scalar, A: Scalar>(op: &Backward<'_, CpuStorage>) -> Result<Gradients<CpuStorage>> {
        let (m, k, r) = (op.x.view.rows, op.x.view.cols, op.a.view.rows);
        let mut dx = if op.dx { Some(zeros::<T>(m, k)?) } else { None };
        let mut da = op.da.map(|precision| Buffer::<T>::new(precision, r, k)).transpose()?;
        let mut own = op.projections.iter().map(OwnBuffers::<T>::new).collect::<Result<Vec<_>>>()?;
        let mut projections = Vec::with_capacity(own.len());
        for (of, OwnBuffers { db, dbias, dm }) in op.projections.iter().zip(&mut own) {
            let (n, r) = (of.w.view.rows, of.b.view.cols);
            projections.push(cpu::BackwardProjection {
                dy: matrix(of.dy)?,
                w: matrix(of.w)?,
                b: matrix::<A>(of.b)?,
                scale: of.scale,
                db: db.as_mut().map(|db| db.gradient(n, r)),
                dbias: dbias.as_mut().map(|dbias| dbias.gradient(1, n)),
                dm: match (&of.dm, dm) {
                    (Some(of), Some(dm)) => Some(MagnitudeGradient {
                        y: matrix(of.y)?,
                        bias: of.bias.map(matrix).transpose()?,
                        magnitude: matrix(of.magnitude)?,
                        dm: MatrixMut::new(dm.as_mut_slice(), 1, n),
                    }),
                    _ => None,
                },
                gain: of.gain.map(matrix).transpose()?,
            });
        }
        cpu::backward_shared(cpu::BackwardShared {
            a: matrix(op.a)?,
            x: Some(matrix(op.x)?),
            h: op.h.map(matrix).transpose()?,
            dx: dx.as_mut().map(|dx| MatrixMut::new(dx.as_mut_slice(), m, k)),
            da: da.as_mut().map(|da| da.gradient(r, k)),
            projections,
            accumulate: Accumulate::default(),
            dropout: dropout(op.dropout),
            routes: op.routes.map(table),
        })
        .map_err(wrap)?;
        let own = own.into_iter().map(|OwnBuffers { db, dbias, dm }| Own {
            db: db.map(Buffer::into_storage),
            dbias: dbias.map(Buffer::into_storage),
            dm: dm.map(CpuStorage::F32),
        });
        let (dx, da) = (dx.map(T::to_cpu_storage_owned), da.map(Buffer::into_storage));
        Ok(Gradients { dx, da, projections: own.collect() })
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

fn table(routes: &Routes) -> Matrix<'_, [u64]> {
    Matrix::new(routes.on_cpu(), 1, routes.on_cpu().len())
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

/// The gradients of one projection in the making.
struct OwnBuffers<T> {
    db: Option<Buffer<T>>,
    dbias: Option<Buffer<T>>,
    dm: Option<Vec<f32>>,
}

impl<T: Scalar> OwnBuffers<T> {
    fn new(of: &BackwardProjection<'_, CpuStorage>) -> Result<Self> {
        let (n, r) = (of.w.view.rows, of.b.view.cols);
        let buffer = |precision: Option<Precision>, rows, cols| {
            precision.map(|precision| Buffer::<T>::new(precision, rows, cols)).transpose()
        };
        let dm = if of.dm.is_some() { Some(zeros::<f32>(1, n)?) } else { None };
        Ok(Self { db: buffer(of.db, n, r)?, dbias: buffer(of.dbias, 1, n)?, dm })
    }
}
