//! The CUDA backend, by CUDA events around the launches of a sample.
//!
//! Launches are queued back to back, as in training, over copies of the layer that together exceed L2 twice: no launch
//! finds its operands there because the one before left them.

use std::sync::Arc;
use std::time::Duration;

use cuda::cudarc::driver::sys::{CUdevice_attribute, CUevent_flags};
use cuda::cudarc::driver::{CudaSlice, CudaStream, DriverError};
use fused_lora::{Accumulate, Dtype, Element, Error, Gradient, LoraShape, Matrix, MatrixMut, Result, bf16, cuda, f16};

use crate::{Backend, Case, Op, Timed, Way, cases, values};

/// Decoding, a small batch, a training batch through Llama-3-8B's attention and MLP projections.
const SHAPES: &[(usize, usize, usize)] =
    &[(16, 4096, 4096), (512, 4096, 4096), (8192, 4096, 4096), (8192, 14336, 4096)];

/// A GPU and the kernels loaded on it.
pub struct Gpu {
    kernels: cuda::Kernels,
    stream: Arc<CudaStream>,
    l2_bytes: usize,
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Driver { call, message: error.to_string() }
}

impl Gpu {
    pub fn new() -> Result<Self> {
        let kernels = cuda::Kernels::on_device(0)?;
        let context = kernels.context();
        let stream = context.new_stream().map_err(failed("cuStreamCreate"))?;
        let l2_bytes = context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)
            .map_err(failed("cuDeviceGetAttribute"))?;
        Ok(Self { stream, l2_bytes: usize::try_from(l2_bytes).unwrap_or(0), kernels })
    }

    fn prepare<T: Element>(&self, case: &Case) -> Result<Timed> {
        let (kernels, stream) = (self.kernels.clone(), self.stream.clone());
        let mut workspace = cuda::Workspace::new(&stream, kernels.workspace_bytes(case.dtype, case.shape)?)?;
        let mut layers = Layer::<T>::copies(&stream, case.shape, 2 * self.l2_bytes).map_err(failed("cuMemAlloc"))?;
        let run = match case.op {
            Op::Forward => Layer::forward,
            Op::Backward => Layer::backward,
            Op::Step => Layer::step,
        };
        let mut turn = 0;
        Ok(Box::new(move |iterations| {
            let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(failed("cuEventRecord"));
            let start = event()?;
            for _ in 0..iterations {
                turn = (turn + 1) % layers.len();
                run(&mut layers[turn], &kernels, &stream, &mut workspace)?;
            }
            let milliseconds = start.elapsed_ms(&event()?).map_err(failed("cuEventElapsedTime"))?;
            Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
        }))
    }
}

impl Backend for Gpu {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn why(&self) -> String {
        self.kernels.device().name.clone()
    }

    fn cases(&self, op: Op) -> Vec<Case> {
        cases(op, &[Dtype::Bf16, Dtype::F16], SHAPES, &[0, 16, 64], &[Way::Fused])
    }

    fn prepare(&self, case: &Case) -> Result<Timed> {
        match case.dtype {
            Dtype::F16 => self.prepare::<f16>(case),
            Dtype::Bf16 => self.prepare::<bf16>(case),
            Dtype::F32 => Err(Error::Dtype { got: case.dtype, backend: "the CUDA kernels", expected: "F16, Bf16" }),
        }
    }
}

struct Layer<T> {
    shape: LoraShape,
    x: CudaSlice<T>,
    w: CudaSlice<T>,
    a: CudaSlice<T>,
    b: CudaSlice<T>,
    h: CudaSlice<T>,
    y: CudaSlice<T>,
    dy: CudaSlice<T>,
    dx: CudaSlice<T>,
    da: CudaSlice<f32>,
    db: CudaSlice<f32>,
}

impl<T: Element> Layer<T> {
    /// As many copies as exceed `bytes`, at least one.
    fn copies(stream: &Arc<CudaStream>, shape: LoraShape, bytes: usize) -> std::result::Result<Vec<Self>, DriverError> {
        let LoraShape { m, n, k, r } = shape;
        let elements = m * k + n * k + m * n + r * (k + n + m); // the smaller of the two operations
        let count = bytes / (elements * size_of::<T>()) + 1;
        // Buffers of no elements cannot be allocated: with R = 0 one stands in.
        let data = |count: usize, seed| values::<T>(count.max(1), seed);
        let (x, w, a, b) = (data(m * k, 1), data(n * k, 2), data(r * k, 3), data(n * r, 4));
        let (h, dy) = (data(m * r, 5), data(m * n, 6));
        (0..count)
            .map(|_| {
                Ok(Self {
                    shape,
                    x: stream.clone_htod(&x)?,
                    w: stream.clone_htod(&w)?,
                    a: stream.clone_htod(&a)?,
                    b: stream.clone_htod(&b)?,
                    h: stream.clone_htod(&h)?,
                    y: stream.alloc_zeros(m * n)?,
                    dy: stream.clone_htod(&dy)?,
                    dx: stream.alloc_zeros(m * k)?,
                    da: stream.alloc_zeros((r * k).max(1))?,
                    db: stream.alloc_zeros((n * r).max(1))?,
                })
            })
            .collect()
    }

    fn forward(
        &mut self,
        kernels: &cuda::Kernels,
        stream: &Arc<CudaStream>,
        workspace: &mut cuda::Workspace,
    ) -> Result<()> {
        let LoraShape { m, n, k, r } = self.shape;
        let op = cuda::Forward {
            x: Matrix::new(&self.x, m, k),
            w: Matrix::new(&self.w, n, k),
            a: Matrix::new(&self.a, r, k),
            b: Matrix::new(&self.b, n, r),
            scale: 2.0,
            bias: None,
            h: Some(MatrixMut::new(&mut self.h, m, r)),
            y: MatrixMut::new(&mut self.y, m, n),
        };
        kernels.forward(stream, op, workspace)
    }

    fn step(
        &mut self,
        kernels: &cuda::Kernels,
        stream: &Arc<CudaStream>,
        workspace: &mut cuda::Workspace,
    ) -> Result<()> {
        self.forward(kernels, stream, workspace)?;
        self.backward(kernels, stream, workspace)
    }

    fn backward(
        &mut self,
        kernels: &cuda::Kernels,
        stream: &Arc<CudaStream>,
        workspace: &mut cuda::Workspace,
    ) -> Result<()> {
        let LoraShape { m, n, k, r } = self.shape;
        let adapter = r != 0;
        let op = cuda::Backward {
            dy: Matrix::new(&self.dy, m, n),
            w: Matrix::new(&self.w, n, k),
            a: Matrix::new(&self.a, r, k),
            b: Matrix::new(&self.b, n, r),
            scale: 2.0,
            x: Some(Matrix::new(&self.x, m, k)),
            h: Some(Matrix::new(&self.h, m, r)),
            dx: Some(MatrixMut::new(&mut self.dx, m, k)),
            da: if adapter { Some(Gradient::F32(MatrixMut::new(&mut self.da, r, k))) } else { None },
            db: if adapter { Some(Gradient::F32(MatrixMut::new(&mut self.db, n, r))) } else { None },
            dbias: None,
            accumulate: Accumulate::default(),
        };
        kernels.backward(stream, op, workspace)
    }
}
