//! Kernels with a stream and a workspace: the backend of layers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{CUdeviceptr, CUresult};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, DriverError, SyncOnDrop};

use super::access::check_context;
use super::driver::{failed, is_capturing};
use super::kernels::Room;
use super::{Kernels, Workspace};
use crate::error::{Error, Result};
use crate::linear::Backend;
use crate::plan::check_dtype;
use crate::{
    BackwardProjection, BackwardShared, Dropout, Dtype, Element, Factors, ForwardProjection, ForwardShared, Gain,
    Gradient, LoraShape, MagnitudeGradient, Matrix, MatrixMut, Merge, Round, Seed,
};

/// The kernels with a stream and a workspace: what [`LoraLinear`](crate::linear::LoraLinear) computes on.
///
/// A handle: clones share the workspace, which grows when an operation needs more than any before it. Operations are launched on
/// the stream in the order in which they are called, from any thread. Growing allocates and frees in the order of the stream.
///
/// While the stream is captured into a graph nothing is allocated and nothing is copied from or to the host: what would do so
/// gives [`Error::Capturing`]. Before the capture, let
/// [`LoraLinear::reserve`](crate::linear::LoraLinear::reserve) make the workspace large enough; in it, the methods that end in
/// `_into` write where they are told.
#[derive(Clone, Debug)]
pub struct Queue {
    kernels: Kernels,
    stream: Arc<CudaStream>,
    workspace: Arc<Mutex<Workspace>>,
}

impl Queue {
    /// Operations on `stream`, with a workspace of their own.
    ///
    /// # Errors
    /// [`Error::WrongContext`] for a stream of another context than the kernels'; those of [`Workspace::new`].
    pub fn new(kernels: &Kernels, stream: &Arc<CudaStream>) -> Result<Self> {
        check_context("stream", stream.context(), kernels.context())?;
        let workspace = Arc::new(Mutex::new(Workspace::new(stream, 0)?));
        Ok(Self { kernels: kernels.clone(), stream: stream.clone(), workspace })
    }

    /// The kernels.
    pub fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// A graph would allocate and copy each time it runs, from and to host memory that is not there any more.
    fn check_not_captured(&self, what: &'static str) -> Result<()> {
        if is_capturing(&self.stream)? { Err(Error::Capturing { what }) } else { Ok(()) }
    }

    /// A panic elsewhere leaves the workspace as good as it was.
    fn workspace(&self) -> MutexGuard<'_, Workspace> {
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same with the lifetime of the borrow in place of 'static.
fn matrix<'a, T>(matrix: Matrix<'a, dyn DevicePtr<T>>) -> Matrix<'a, dyn DevicePtr<T> + 'a> {
    let Matrix { data, offset, rows, cols, row_stride } = matrix;
    Matrix { data, offset, rows, cols, row_stride }
}

fn matrix_mut<'a, T>(matrix: MatrixMut<'a, dyn DevicePtrMut<T>>) -> MatrixMut<'a, dyn DevicePtrMut<T> + 'a> {
    let MatrixMut { data, offset, rows, cols, row_stride } = matrix;
    MatrixMut { data, offset, rows, cols, row_stride }
}

fn dropout<'a>(given: Dropout<'a, dyn DevicePtr<u64>>) -> Dropout<'a, dyn DevicePtr<u64> + 'a> {
    let seed = match given.seed {
        Seed::Value { seed, offset } => Seed::Value { seed, offset },
        Seed::Memory(state) => Seed::Memory(matrix(state)),
    };
    Dropout { p: given.p, seed }
}

type StaticGradient<'a, T> = Gradient<'a, dyn DevicePtrMut<T>, dyn DevicePtrMut<f32>>;

fn gradient<'a, T>(
    gradient: StaticGradient<'a, T>,
) -> Gradient<'a, dyn DevicePtrMut<T> + 'a, dyn DevicePtrMut<f32> + 'a> {
    match gradient {
        Gradient::Storage(storage) => Gradient::Storage(matrix_mut(storage)),
        Gradient::F32(f32) => Gradient::F32(matrix_mut(f32)),
    }
}

type StaticFactors<'a, T> = Factors<'a, dyn DevicePtr<T>, dyn DevicePtr<f32>>;

fn factors<'a, T>(factors: StaticFactors<'a, T>) -> Factors<'a, dyn DevicePtr<T> + 'a, dyn DevicePtr<f32> + 'a> {
    match factors {
        Factors::Storage { a, b } => Factors::Storage { a: matrix(a), b: matrix(b) },
        Factors::F32 { a, b } => Factors::F32 { a: matrix(a), b: matrix(b) },
    }
}

/// What cudarc copies from: it takes no trait objects.
struct Operand<'a, T>(&'a dyn DevicePtr<T>);

impl<T> DeviceSlice<T> for Operand<'_, T> {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn stream(&self) -> &Arc<CudaStream> {
        self.0.stream()
    }
}

impl<T> DevicePtr<T> for Operand<'_, T> {
    fn device_ptr<'a>(&'a self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        self.0.device_ptr(stream)
    }
}

/// What cudarc copies to.
struct Output<'a, T>(&'a mut dyn DevicePtrMut<T>);

impl<T> DeviceSlice<T> for Output<'_, T> {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn stream(&self) -> &Arc<CudaStream> {
        self.0.stream()
    }
}

impl<T> DevicePtrMut<T> for Output<'_, T> {
    fn device_ptr_mut<'a>(&'a mut self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        self.0.device_ptr_mut(stream)
    }
}

/// Bytes of so many elements; cudarc multiplies without looking, and a product that wraps would give a buffer shorter than it
/// says.
fn bytes_of<T>(len: usize) -> Result<usize> {
    len.checked_mul(size_of::<T>()).ok_or(Error::OutOfMemory { bytes: usize::MAX })
}

/// Turns the error of an allocation into ours.
fn refused(call: &'static str, bytes: usize) -> impl FnOnce(DriverError) -> Error {
    move |error| match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { bytes },
        _ => failed(call)(error),
    }
}

impl Backend for Queue {
    type Buffer<T: Element> = CudaSlice<T>;
    type Read<T: Element> = dyn DevicePtr<T>;
    type Write<T: Element> = dyn DevicePtrMut<T>;
    type Words = dyn DevicePtr<u64>;
    type WordBuffer = CudaSlice<u64>;

    fn is_same(&self, other: &Self) -> bool {
        self.stream == other.stream
    }

    fn read<T: Element>(buffer: &CudaSlice<T>) -> &Self::Read<T> {
        buffer
    }
    fn write<T: Element>(buffer: &mut CudaSlice<T>) -> &mut Self::Write<T> {
        buffer
    }
    fn read_len<T: Element>(operand: &Self::Read<T>) -> usize {
        operand.len()
    }

    /// CUDA has no empty allocations: there is one element at least.
    fn alloc<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        let bytes = bytes_of::<T>(len)?;
        self.check_not_captured("a buffer is allocated")?;
        // SAFETY: any bits are a value of the element types, and the operations write all of an output or refuse it.
        unsafe { self.stream.alloc::<T>(len.max(1)) }.map_err(refused("cuMemAllocAsync", bytes))
    }
    fn upload<T: Element>(&self, from: &[T]) -> Result<CudaSlice<T>> {
        let mut buffer = self.alloc::<T>(from.len())?;
        self.overwrite(from, &mut buffer)?;
        Ok(buffer)
    }
    fn upload_words(&self, from: &[u64]) -> Result<CudaSlice<u64>> {
        let bytes = size_of_val(from);
        self.check_not_captured("a buffer is allocated")?;
        // SAFETY: any bits are a value of u64.
        let mut words =
            unsafe { self.stream.alloc::<u64>(from.len().max(1)) }.map_err(refused("cuMemAllocAsync", bytes))?;
        if !from.is_empty() {
            self.stream.memcpy_htod(from, &mut words).map_err(failed("cuMemcpyHtoDAsync"))?;
        }
        Ok(words)
    }
    fn words(buffer: &CudaSlice<u64>) -> &Self::Words {
        buffer
    }
    fn overwrite<T: Element>(&self, from: &[T], to: &mut Self::Write<T>) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        if to.len() < from.len() {
            return Err(Error::BufferTooShort { arg: "to", got: to.len(), needed: from.len() });
        }
        self.check_not_captured("host memory is copied to a buffer")?;
        self.stream.memcpy_htod(from, &mut Output(to)).map_err(failed("cuMemcpyHtoDAsync"))
    }
    fn download<T: Element>(&self, from: &Self::Read<T>) -> Result<Vec<T>> {
        self.check_not_captured("a buffer is copied to host memory")?;
        let to = self.stream.clone_dtoh(&Operand(from)).map_err(failed("cuMemcpyDtoHAsync"))?;
        self.stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
        Ok(to)
    }

    fn check_dtype(&self, dtype: Dtype) -> Result<()> {
        check_dtype(dtype)
    }
    fn reserve(&self, dtype: Dtype, shape: LoraShape) -> Result<()> {
        let bytes = self.kernels.workspace_bytes_up_to(dtype, shape)?;
        self.workspace().reserve(&self.stream, bytes)
    }

    fn forward_shared<T: Element, A: Element>(
        &self,
        op: ForwardShared<'_, Self::Read<T>, Self::Write<T>, Self::Words, Self::Read<f32>, Self::Read<A>>,
    ) -> Result<()> {
        let ForwardShared { x, a, h, projections, dropout: given, routes } = op;
        let projection = |ForwardProjection { w, b, scale, bias, gain, y }| super::ForwardProjection {
            w: matrix(w),
            b: matrix(b),
            scale,
            bias: bias.map(matrix),
            gain: gain.map(matrix),
            y: matrix_mut(y),
        };
        let op = super::ForwardShared {
            x: matrix(x),
            a: matrix(a),
            h: h.map(matrix_mut),
            projections: projections.into_iter().map(projection).collect(),
            dropout: given.map(dropout),
            routes: routes.map(matrix),
        };
        self.kernels.forward_in(&self.stream, op, &mut self.workspace(), Room::Grows)
    }

    fn backward_shared<T: Element, A: Element>(
        &self,
        op: BackwardShared<
            '_,
            Self::Read<T>,
            Self::Write<T>,
            Self::Write<f32>,
            Self::Words,
            Self::Read<f32>,
            Self::Read<A>,
        >,
    ) -> Result<()> {
        let BackwardShared { a, x, h, dx, da, projections, accumulate, dropout: given, routes } = op;
        let projection = |BackwardProjection { dy, w, b, scale, db, dbias, dm, gain }| super::BackwardProjection {
            dy: matrix(dy),
            w: matrix(w),
            b: matrix(b),
            scale,
            db: db.map(gradient),
            dbias: dbias.map(gradient),
            dm: dm.map(|MagnitudeGradient { y, bias, magnitude, dm }| MagnitudeGradient {
                y: matrix(y),
                bias: bias.map(matrix),
                magnitude: matrix(magnitude),
                dm: matrix_mut(dm),
            }),
            gain: gain.map(matrix),
        };
        let op = super::BackwardShared {
            a: matrix(a),
            x: x.map(matrix),
            h: h.map(matrix),
            dx: dx.map(matrix_mut),
            da: da.map(gradient),
            projections: projections.into_iter().map(projection).collect(),
            accumulate,
            dropout: given.map(dropout),
            routes: routes.map(matrix),
        };
        self.kernels.backward_in(&self.stream, op, &mut self.workspace(), Room::Grows)
    }

    fn merge<T: Element>(&self, op: Merge<'_, Self::Read<T>, Self::Write<T>, Self::Read<f32>>) -> Result<()> {
        let Merge { w, factors: pair, scale, gain, merged } = op;
        let (w, gain, merged) = (w.map(matrix), gain.map(matrix), matrix_mut(merged));
        let op = super::Merge { w, factors: factors(pair), scale, gain, merged };
        self.kernels.merge(&self.stream, op)
    }

    fn round<T: Element, A: Element>(
        &self,
        op: Round<'_, Self::Read<T>, Self::Write<A>, Self::Read<f32>>,
    ) -> Result<()> {
        let Round { factors: pair, scale, divisor, rounded_a, rounded_b } = op;
        let (divisor, rounded_a, rounded_b) = (divisor.map(matrix), matrix_mut(rounded_a), matrix_mut(rounded_b));
        self.kernels.round(&self.stream, super::Round { factors: factors(pair), scale, divisor, rounded_a, rounded_b })
    }

    fn gain<T: Element>(&self, op: Gain<'_, Self::Read<T>, Self::Read<f32>, Self::Write<f32>>) -> Result<()> {
        let Gain { w, factors: pair, scale, magnitude, earlier, norm, gain } = op;
        let op = super::Gain {
            w: matrix(w),
            factors: factors(pair),
            scale,
            magnitude: magnitude.map(matrix),
            earlier: earlier.map(matrix),
            norm: norm.map(matrix_mut),
            gain: gain.map(matrix_mut),
        };
        self.kernels.gain(&self.stream, op)
    }
}

#[cfg(test)]
mod tests {
    use super::bytes_of;
    use crate::error::Error;
    use crate::f16;

    #[test]
    fn no_length_wraps() {
        assert_eq!((bytes_of::<f16>(0), bytes_of::<f32>(3)), (Ok(0), Ok(12)));
        for refused in [bytes_of::<f32>((1 << 62) + 1), bytes_of::<f16>(usize::MAX)] {
            assert_eq!(refused, Err(Error::OutOfMemory { bytes: usize::MAX }));
        }
    }
}
