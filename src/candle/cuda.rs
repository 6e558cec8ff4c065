//! The op over [`CudaStorage`]: the crate's launches on candle's stream, in memory of candle's device.
//!
//! Kernels are loaded once per context and stay. A stream gets a workspace that grows to what its calls need; those of the
//! streams used last are kept.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, CudaStorage, Result, Storage};

use super::backend::{
    Backend, Backward, BackwardProjection, Forward, Gain, Gradients, Operand, Outputs, Own, Precision, Scalar, dropout,
};
use super::recent::Recent;
use super::routes::Routes;
use super::wrap;
use crate::cuda::{self, Kernels, Workspace};
use crate::error::Error;
use crate::{Accumulate, Factors, Gradient, MagnitudeGradient, Matrix, MatrixMut};

/// Streams whose workspace is kept.
const STREAMS: usize = 16;

pub(super) struct Cuda;

impl Backend for Cuda {
    type Storage = CudaStorage;

    fn of(storage: &Storage) -> Result<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => candle_core::bail!("a tensor has left the GPU"),
        }
    }

    fn wrap(storage: CudaStorage) -> Storage {
        Storage::Cuda(storage)
    }

    fn forward<T: Scalar, A: Scalar>(op: &Forward<'_, CudaStorage>) -> Result<Outputs<CudaStorage>> {
        let device = &op.x.storage.device;
        let (m, columns) = (op.x.view.rows, op.columns_of_h());
        let mut ys =
            op.projections.iter().map(|of| alloc::<T>(device, m, of.w.view.rows)).collect::<Result<Vec<_>>>()?;
        let mut h = if op.keep_h { Some(alloc::<T>(device, m, columns)?) } else { None };
        let (x, a) = (matrix::<T>(op.x)?, matrix::<A>(op.a)?);
        let mut operands = Vec::with_capacity(ys.len());
        for of in &op.projections {
            let (w, b) = (matrix::<T>(of.w)?, matrix::<A>(of.b)?);
            operands.push((w, b, optional::<T>(of.bias)?, optional::<f32>(of.gain)?));
        }
        let (stream, routes) = (device.cuda_stream(), op.routes.map(table).transpose()?);
        launch(&stream, |kernels, workspace| {
            let mut projections = Vec::with_capacity(operands.len());
            for ((of, &(w, b, bias, gain)), y) in op.projections.iter().zip(&operands).zip(&mut ys) {
                let y = cuda::matrix_mut(y, m, of.w.view.rows);
                projections.push(cuda::ForwardProjection { w, b, scale: of.scale, bias, gain, y });
            }
            let forward = cuda::ForwardShared {
                x,
                a,
                h: h.as_mut().map(|h| cuda::matrix_mut(h, m, columns)),
                projections,
                dropout: dropout(op.dropout),
                routes,
            };
            kernels.forward_shared::<T, A>(&stream, forward, workspace)
        })?;
        let storage = |slice| CudaStorage::wrap_cuda_slice::<T>(slice, device.clone());
        Ok(Outputs { ys: ys.into_iter().map(storage).collect(), h: h.map(storage) })
    }

    fn backward<T: Scalar, A: Scalar>(op: &Backward<'_, CudaStorage>) -> Result<Gradients<CudaStorage>> {
        let device = &op.x.storage.device;
        let (m, k, r) = (op.x.view.rows, op.x.view.cols, op.a.view.rows);
        let mut dx = if op.dx { Some(alloc::<T>(device, m, k)?) } else { None };
        let mut da = op.da.map(|precision| Buffer::<T>::new(device, precision, r, k)).transpose()?;
        let mut own = op.projections.iter().map(|of| OwnBuffers::<T>::new(device, of)).collect::<Result<Vec<_>>>()?;
        let (x, a, h) = (matrix::<T>(op.x)?, matrix::<A>(op.a)?, optional::<T>(op.h)?);
        let mut operands = Vec::with_capacity(own.len());
        for of in &op.projections {
            let of_magnitude = match &of.dm {
                Some(of) => Some((matrix::<T>(of.y)?, optional::<T>(of.bias)?, matrix::<f32>(of.magnitude)?)),
                None => None,
            };
            let (dy, w, b) = (matrix::<T>(of.dy)?, matrix::<T>(of.w)?, matrix::<A>(of.b)?);
            operands.push((dy, w, b, optional::<f32>(of.gain)?, of_magnitude));
        }
        let (stream, routes) = (device.cuda_stream(), op.routes.map(table).transpose()?);
        launch(&stream, |kernels, workspace| {
            let mut projections = Vec::with_capacity(operands.len());
            for ((of, &(dy, w, b, gain, of_magnitude)), own) in op.projections.iter().zip(&operands).zip(&mut own) {
                let (n, r) = (of.w.view.rows, of.b.view.cols);
                let dm = of_magnitude.zip(own.dm.as_mut()).map(|((y, bias, magnitude), dm)| {
                    let dm = cuda::matrix_mut(dm, 1, n);
                    MagnitudeGradient { y, bias, magnitude, dm }
                });
                projections.push(cuda::BackwardProjection {
                    dy,
                    w,
                    b,
                    scale: of.scale,
                    db: own.db.as_mut().map(|db| db.gradient(n, r)),
                    dbias: own.dbias.as_mut().map(|dbias| dbias.gradient(1, n)),
                    dm,
                    gain,
                });
            }
            let backward = cuda::BackwardShared {
                a,
                x: Some(x),
                h,
                dx: dx.as_mut().map(|dx| cuda::matrix_mut(dx, m, k)),
                da: da.as_mut().map(|da| da.gradient(r, k)),
                projections,
                accumulate: Accumulate::default(),
                dropout: dropout(op.dropout),
                routes,
            };
            kernels.backward_shared::<T, A>(&stream, backward, workspace)
        })?;
        let own = own.into_iter().map(|OwnBuffers { db, dbias, dm }| Own {
            db: db.map(|db| db.into_storage(device)),
            dbias: dbias.map(|dbias| dbias.into_storage(device)),
            dm: dm.map(|dm| CudaStorage::wrap_cuda_slice::<f32>(dm, device.clone())),
        });
        let dx = dx.map(|dx| CudaStorage::wrap_cuda_slice::<T>(dx, device.clone()));
        Ok(Gradients { dx, da: da.map(|da| da.into_storage(device)), projections: own.collect() })
    }

    fn gain<T: Scalar>(op: &Gain<'_, CudaStorage>) -> Result<CudaStorage> {
        let device = &op.w.storage.device;
        let n = op.w.view.rows;
        let mut gain = alloc::<f32>(device, 1, n)?;
        let (w, magnitude) = (matrix::<T>(op.w)?, matrix::<f32>(op.magnitude)?);
        let stream = device.cuda_stream();
        let mut run = |factors: Factors<'_, _, _>| {
            launch(&stream, |kernels, _| {
                let op = cuda::Gain {
                    w,
                    factors: copied(&factors),
                    scale: op.scale,
                    magnitude: Some(magnitude),
                    earlier: None,
                    norm: None,
                    gain: Some(cuda::matrix_mut(&mut gain, 1, n)),
                };
                kernels.gain::<T>(&stream, op)
            })
        };
        if op.f32_factors {
            run(Factors::F32 { a: matrix::<f32>(op.a)?, b: matrix::<f32>(op.b)? })?;
        } else {
            run(Factors::Storage { a: matrix::<T>(op.a)?, b: matrix::<T>(op.b)? })?;
        }
        Ok(CudaStorage::wrap_cuda_slice::<f32>(gain, device.clone()))
    }
}

/// An operation takes its arguments away.
fn copied<'a, D: ?Sized, F: ?Sized>(factors: &Factors<'a, D, F>) -> Factors<'a, D, F> {
    match *factors {
        Factors::Storage { a, b } => Factors::Storage { a, b },
        Factors::F32 { a, b } => Factors::F32 { a, b },
    }
}

type CudaMatrix<'a, T> = Matrix<'a, dyn cuda::cudarc::driver::DevicePtr<T> + 'a>;

fn matrix<'a, T: Scalar>(operand: Operand<'a, CudaStorage>) -> Result<CudaMatrix<'a, T>> {
    let (slice, view): (&CudaSlice<T>, _) = (operand.storage.as_cuda_slice()?, operand.view);
    Ok(cuda::matrix(slice, view.rows, view.cols).with_row_stride(view.row_stride).with_offset(view.offset))
}

fn optional<'a, T: Scalar>(operand: Option<Operand<'a, CudaStorage>>) -> Result<Option<CudaMatrix<'a, T>>> {
    operand.map(matrix).transpose()
}

fn table(routes: &Routes) -> Result<CudaMatrix<'_, u64>> {
    let words = routes.on_gpu()?;
    Ok(cuda::matrix(words, 1, words.len()))
}

/// Memory for a matrix; at least one element, because sizes are judged later and CUDA refuses none.
fn alloc<T: Scalar>(device: &CudaDevice, rows: usize, cols: usize) -> Result<CudaSlice<T>> {
    let elements = rows.saturating_mul(cols).max(1);
    // SAFETY: any bits are a value of an element type, and forward or backward writes every element before anyone reads one;
    // where they fail the memory is dropped.
    unsafe { device.alloc(elements) }
}

/// An adapter's gradient in the making.
enum Buffer<T> {
    Storage(CudaSlice<T>),
    F32(CudaSlice<f32>),
}

impl<T: Scalar> Buffer<T> {
    fn new(device: &CudaDevice, precision: Precision, rows: usize, cols: usize) -> Result<Self> {
        Ok(match precision {
            Precision::Storage => Self::Storage(alloc(device, rows, cols)?),
            Precision::F32 => Self::F32(alloc(device, rows, cols)?),
        })
    }

    fn gradient(
        &mut self,
        rows: usize,
        cols: usize,
    ) -> Gradient<'_, dyn cuda::cudarc::driver::DevicePtrMut<T> + '_, dyn cuda::cudarc::driver::DevicePtrMut<f32> + '_>
    {
        match self {
            Self::Storage(slice) => Gradient::Storage(MatrixMut::new(slice, rows, cols)),
            Self::F32(slice) => Gradient::F32(MatrixMut::new(slice, rows, cols)),
        }
    }

    fn into_storage(self, device: &CudaDevice) -> CudaStorage {
        match self {
            Self::Storage(slice) => CudaStorage::wrap_cuda_slice(slice, device.clone()),
            Self::F32(slice) => CudaStorage::wrap_cuda_slice(slice, device.clone()),
        }
    }
}

/// The gradients of one projection in the making.
struct OwnBuffers<T> {
    db: Option<Buffer<T>>,
    dbias: Option<Buffer<T>>,
    dm: Option<CudaSlice<f32>>,
}

impl<T: Scalar> OwnBuffers<T> {
    fn new(device: &CudaDevice, of: &BackwardProjection<'_, CudaStorage>) -> Result<Self> {
        let (n, r) = (of.w.view.rows, of.b.view.cols);
        let buffer = |precision: Option<Precision>, rows, cols| {
            precision.map(|precision| Buffer::<T>::new(device, precision, rows, cols)).transpose()
        };
        let dm = if of.dm.is_some() { Some(alloc::<f32>(device, 1, n)?) } else { None };
        Ok(Self { db: buffer(of.db, n, r)?, dbias: buffer(of.dbias, 1, n)?, dm })
    }
}

struct Cache {
    /// One per context, of which there are as many as GPUs: candle uses primary ones.
    kernels: Vec<Kernels>,
    workspaces: Recent<Arc<CudaStream>, Arc<Mutex<Workspace>>>,
}

static CACHE: Mutex<Cache> = Mutex::new(Cache { kernels: Vec::new(), workspaces: Recent::new(STREAMS) });

/// What a panic of another thread leaves behind is whole: every entry is complete before it is stored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernels of the stream's context and the stream's workspace, made when they are asked for first.
fn resources(stream: &Arc<CudaStream>) -> crate::Result<(Kernels, Arc<Mutex<Workspace>>)> {
    let mut cache = lock(&CACHE);
    let loaded = cache.kernels.iter().find(|kernels| kernels.context() == stream.context()).cloned();
    let kernels = match loaded {
        Some(kernels) => kernels,
        None => {
            let kernels = Kernels::new(stream.context())?;
            cache.kernels.push(kernels.clone());
            kernels
        }
    };
    let make = || Workspace::new(stream, 0).map(|workspace| Arc::new(Mutex::new(workspace)));
    Ok((kernels, cache.workspaces.get_or_try(stream, make)?))
}

/// Runs one operation; once more where the workspace was too small, which is found before anything is launched.
fn launch(
    stream: &Arc<CudaStream>,
    mut operation: impl FnMut(&Kernels, &mut Workspace) -> crate::Result<()>,
) -> Result<()> {
    let mut attempt = || {
        let (kernels, workspace) = resources(stream)?;
        let mut workspace = lock(&workspace);
        match operation(&kernels, &mut workspace) {
            Err(Error::Workspace { needed, .. }) => {
                workspace.reserve(stream, needed)?;
                operation(&kernels, &mut workspace)
            }
            result => result,
        }
    };
    attempt().map_err(wrap)
}
