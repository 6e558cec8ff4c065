//! The op over [`CudaStorage`]: the crate's launches on candle's stream, in memory of candle's device.
//!
//! Kernels are loaded once per context and stay. A stream gets a workspace that grows to what its calls need; those of the
//! streams used last are kept.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, CudaStorage, Result, Storage};

use super::backend::{Backend, Backward, Forward, Gain, Gradients, Operand, Outputs, Precision, Scalar, variant};
use super::recent::Recent;
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

    fn forward<T: Scalar>(op: &Forward<'_, CudaStorage>) -> Result<Outputs<CudaStorage>> {
        let device = &op.x.storage.device;
        let (m, n, r) = (op.x.view.rows, op.w.view.rows, op.a.view.rows);
        let mut y = alloc::<T>(device, m, n)?;
        let mut h = if op.keep_h { Some(alloc::<T>(device, m, r)?) } else { None };
        let (x, w, a, b) = (slice::<T>(op.x)?, slice::<T>(op.w)?, slice::<T>(op.a)?, slice::<T>(op.b)?);
        let bias = op.bias.map(|bias| slice::<T>(bias).map(|slice| (slice, bias))).transpose()?;
        let gain = op.gain.map(|gain| slice::<f32>(gain).map(|slice| (slice, gain))).transpose()?;
        let stream = device.cuda_stream();
        launch(&stream, |kernels, workspace| {
            let forward = cuda::Forward {
                x: matrix(x, op.x),
                w: matrix(w, op.w),
                a: matrix(a, op.a),
                b: matrix(b, op.b),
                scale: op.scale,
                bias: bias.map(|(slice, bias)| matrix(slice, bias)),
                h: h.as_mut().map(|h| cuda::matrix_mut(h, m, r)),
                y: cuda::matrix_mut(&mut y, m, n),
                variant: variant(op.dropout, gain.map(|(slice, gain)| matrix(slice, gain))),
            };
            kernels.forward::<T, T>(&stream, forward, workspace)
        })?;
        let storage = |slice| CudaStorage::wrap_cuda_slice::<T>(slice, device.clone());
        Ok(Outputs { y: storage(y), h: h.map(storage) })
    }

    fn backward<T: Scalar>(op: &Backward<'_, CudaStorage>) -> Result<Gradients<CudaStorage>> {
        let device = &op.dy.storage.device;
        let (m, k, n, r) = (op.dy.view.rows, op.w.view.cols, op.w.view.rows, op.a.view.rows);
        let mut dx = if op.dx { Some(alloc::<T>(device, m, k)?) } else { None };
        let mut da = op.da.map(|precision| Buffer::<T>::new(device, precision, r, k)).transpose()?;
        let mut db = op.db.map(|precision| Buffer::<T>::new(device, precision, n, r)).transpose()?;
        let mut dbias = op.dbias.map(|precision| Buffer::<T>::new(device, precision, 1, n)).transpose()?;
        let mut dm = if op.dm.is_some() { Some(alloc::<f32>(device, 1, n)?) } else { None };
        let (dy, w, a, b) = (slice::<T>(op.dy)?, slice::<T>(op.w)?, slice::<T>(op.a)?, slice::<T>(op.b)?);
        let x = slice::<T>(op.x)?;
        let h = op.h.map(|h| slice::<T>(h).map(|slice| (slice, h))).transpose()?;
        let gain = op.gain.map(|gain| slice::<f32>(gain).map(|slice| (slice, gain))).transpose()?;
        let of_magnitude = match &op.dm {
            Some(of) => {
                let bias = of.bias.map(|bias| slice::<T>(bias).map(|slice| (slice, bias))).transpose()?;
                Some(((slice::<T>(of.y)?, of.y), bias, (slice::<f32>(of.magnitude)?, of.magnitude)))
            }
            None => None,
        };
        let stream = device.cuda_stream();
        launch(&stream, |kernels, workspace| {
            let backward = cuda::Backward {
                dy: matrix(dy, op.dy),
                w: matrix(w, op.w),
                a: matrix(a, op.a),
                b: matrix(b, op.b),
                scale: op.scale,
                x: Some(matrix(x, op.x)),
                h: h.map(|(slice, h)| matrix(slice, h)),
                dx: dx.as_mut().map(|dx| cuda::matrix_mut(dx, m, k)),
                da: da.as_mut().map(|da| da.gradient(r, k)),
                db: db.as_mut().map(|db| db.gradient(n, r)),
                dbias: dbias.as_mut().map(|dbias| dbias.gradient(1, n)),
                dm: of_magnitude.zip(dm.as_mut()).map(|((y, bias, magnitude), dm)| MagnitudeGradient {
                    y: matrix(y.0, y.1),
                    bias: bias.map(|(slice, bias)| matrix(slice, bias)),
                    magnitude: matrix(magnitude.0, magnitude.1),
                    dm: cuda::matrix_mut(dm, 1, n),
                }),
                accumulate: Accumulate::default(),
                variant: variant(op.dropout, gain.map(|(slice, gain)| matrix(slice, gain))),
            };
            kernels.backward::<T, T>(&stream, backward, workspace)
        })?;
        Ok(Gradients {
            dx: dx.map(|dx| CudaStorage::wrap_cuda_slice::<T>(dx, device.clone())),
            da: da.map(|da| da.into_storage(device)),
            db: db.map(|db| db.into_storage(device)),
            dbias: dbias.map(|dbias| dbias.into_storage(device)),
            dm: dm.map(|dm| CudaStorage::wrap_cuda_slice::<f32>(dm, device.clone())),
        })
    }

    fn gain<T: Scalar>(op: &Gain<'_, CudaStorage>) -> Result<CudaStorage> {
        let device = &op.w.storage.device;
        let n = op.w.view.rows;
        let mut gain = alloc::<f32>(device, 1, n)?;
        let (w, magnitude) = (slice::<T>(op.w)?, slice::<f32>(op.magnitude)?);
        let stream = device.cuda_stream();
        let mut run = |factors: Factors<'_, _, _>| {
            launch(&stream, |kernels, _| {
                let op = cuda::Gain {
                    w: matrix(w, op.w),
                    factors: copied(&factors),
                    scale: op.scale,
                    magnitude: Some(matrix(magnitude, op.magnitude)),
                    earlier: None,
                    norm: None,
                    gain: Some(cuda::matrix_mut(&mut gain, 1, n)),
                };
                kernels.gain::<T>(&stream, op)
            })
        };
        if op.f32_factors {
            let (a, b) = (slice::<f32>(op.a)?, slice::<f32>(op.b)?);
            run(Factors::F32 { a: matrix(a, op.a), b: matrix(b, op.b) })?;
        } else {
            let (a, b) = (slice::<T>(op.a)?, slice::<T>(op.b)?);
            run(Factors::Storage { a: matrix(a, op.a), b: matrix(b, op.b) })?;
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

fn slice<'a, T: Scalar>(operand: Operand<'a, CudaStorage>) -> Result<&'a CudaSlice<T>> {
    operand.storage.as_cuda_slice()
}

fn matrix<'a, T: Scalar>(
    slice: &'a CudaSlice<T>,
    operand: Operand<'_, CudaStorage>,
) -> Matrix<'a, dyn cuda::cudarc::driver::DevicePtr<T> + 'a> {
    let view = operand.view;
    cuda::matrix(slice, view.rows, view.cols).with_row_stride(view.row_stride).with_offset(view.offset)
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
