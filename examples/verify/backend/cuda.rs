//! The CUDA backend, on GPU 0.

use std::sync::Arc;
use std::time::Duration;

use fused_lora::cuda::cudarc::driver::sys::CUevent_flags;
use fused_lora::cuda::cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError};
use fused_lora::cuda::{self, Kernels, Workspace};
use fused_lora::{
    Accumulate, Dtype, Element, Error, Factors, Gradient, LoraShape, MagnitudeGradient, Matrix, MatrixMut, Result,
};

use super::{Backward, Form, Forms, Forward, Norms, OfMagnitude, Problem, Runner, Values};

pub struct Cuda {
    kernels: Kernels,
    stream: Arc<CudaStream>,
}

/// What cudarc reports of the copies around an operation.
fn copying(error: DriverError) -> Error {
    Error::Driver { call: "copying between host and device", message: error.to_string() }
}

impl Cuda {
    pub fn new() -> Result<Self> {
        let kernels = Kernels::on_device(0)?;
        let stream = kernels.context().new_stream().map_err(copying)?;
        Ok(Self { kernels, stream })
    }

    pub fn gpu(&self) -> &str {
        &self.kernels.device().name
    }

    fn upload<T: Element>(&self, data: &[T]) -> Result<CudaSlice<T>> {
        self.stream.clone_htod(data).map_err(copying)
    }

    fn zeros<T: Element>(&self, elements: usize) -> Result<CudaSlice<T>> {
        self.stream.alloc_zeros(elements).map_err(copying)
    }

    fn download<T: Element>(&self, data: &CudaSlice<T>) -> Result<Vec<T>> {
        self.stream.clone_dtoh(data).map_err(copying)
    }

    fn upload_variant<T, A>(&self, problem: &Problem<T, A>) -> Result<Uploaded> {
        let routes = problem.routes.as_ref().map(|words| self.stream.clone_htod(words).map_err(copying)).transpose()?;
        let gain = problem.gain.as_ref().map(|gain| self.upload(gain)).transpose()?;
        Ok(Uploaded { routes, gain })
    }

    fn workspace<T: Element, A>(&self, problem: &Problem<T, A>) -> Result<Workspace> {
        let shape = LoraShape { m: problem.m, n: problem.n, k: problem.k, r: problem.r };
        Workspace::new(&self.stream, self.kernels.workspace_bytes(T::DTYPE, shape)?)
    }

    fn now(&self) -> Result<CudaEvent> {
        self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(copying)
    }

    /// Time on the GPU from one event to the other.
    fn between(start: &CudaEvent, end: &CudaEvent) -> Result<Duration> {
        let milliseconds = start.elapsed_ms(end).map_err(copying)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}

/// [`Values`] in device memory.
enum Output<T> {
    Storage(CudaSlice<T>),
    F32(CudaSlice<f32>),
}

type View<'a, T> = Gradient<'a, dyn DevicePtrMut<T> + 'a, dyn DevicePtrMut<f32> + 'a>;

impl<T: Element> Output<T> {
    fn zeros(cuda: &Cuda, form: Form, elements: usize) -> Result<Self> {
        Ok(match form {
            Form::Storage => Self::Storage(cuda.zeros(elements)?),
            Form::F32 => Self::F32(cuda.zeros(elements)?),
        })
    }

    fn view(&mut self, rows: usize, cols: usize) -> View<'_, T> {
        match self {
            Self::Storage(data) => Gradient::Storage(MatrixMut::new(data, rows, cols)),
            Self::F32(data) => Gradient::F32(MatrixMut::new(data, rows, cols)),
        }
    }

    fn download(&self, cuda: &Cuda) -> Result<Values<T>> {
        Ok(match self {
            Self::Storage(data) => Values::Storage(cuda.download(data)?),
            Self::F32(data) => Values::F32(cuda.download(data)?),
        })
    }
}

/// How the layer departs from the plain formula, in device memory.
struct Uploaded {
    routes: Option<CudaSlice<u64>>,
    gain: Option<CudaSlice<f32>>,
}

impl Uploaded {
    fn view(&self) -> cuda::Variant<'_> {
        let routes = self.routes.as_ref().map(|words| cuda::matrix(words, 1, words.len()));
        let gain = self.gain.as_ref().map(|gain| cuda::matrix(gain, 1, gain.len()));
        cuda::Variant { routes, gain, ..cuda::Variant::default() }
    }
}

impl Runner for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn computes(&self, dtype: Dtype) -> bool {
        dtype != Dtype::F32
    }

    fn forward<T: Element, A: Element>(&self, problem: &Problem<T, A>) -> Result<Forward<T>> {
        let Problem { m, n, k, r, scale, .. } = *problem;
        let (x, w) = (self.upload(&problem.x)?, self.upload(&problem.w)?);
        let (a, b) = (self.upload(&problem.a)?, self.upload(&problem.b)?);
        let bias = problem.bias.as_ref().map(|bias| self.upload(bias)).transpose()?;
        let uploaded = self.upload_variant(problem)?;
        let columns = problem.columns_of_h();
        let (mut h, mut y) = (self.zeros::<T>(m * columns)?, self.zeros::<T>(m * n)?);
        let mut workspace = self.workspace(problem)?;
        let op = cuda::Forward {
            x: Matrix::new(&x, m, k),
            w: Matrix::new(&w, n, k),
            a: Matrix::new(&a, r, k),
            b: Matrix::new(&b, n, r),
            scale,
            bias: bias.as_ref().map(|bias| cuda::matrix(bias, 1, n)),
            h: Some(MatrixMut::new(&mut h, m, columns)),
            y: MatrixMut::new(&mut y, m, n),
            variant: uploaded.view(),
        };
        let start = self.now()?;
        self.kernels.forward(&self.stream, op, &mut workspace)?;
        let end = self.now()?;
        Ok(Forward { h: self.download(&h)?, y: self.download(&y)?, time: Self::between(&start, &end)? })
    }

    fn backward<T: Element, A: Element>(&self, problem: &Problem<T, A>, h: &[T], forms: Forms) -> Result<Backward<T>> {
        let Problem { m, n, k, r, scale, .. } = *problem;
        let (dy, w) = (self.upload(&problem.dy)?, self.upload(&problem.w)?);
        let (a, b) = (self.upload(&problem.a)?, self.upload(&problem.b)?);
        let (x, h, mut dx) = (self.upload(&problem.x)?, self.upload(h)?, self.zeros::<T>(m * k)?);
        let (mut da, mut db) = (Output::zeros(self, forms.da, r * k)?, Output::zeros(self, forms.db, n * r)?);
        let uploaded = self.upload_variant(problem)?;
        let mut dbias = forms.dbias.map(|form| Output::zeros(self, form, n)).transpose()?;
        let mut workspace = self.workspace(problem)?;
        let op = cuda::Backward {
            dy: Matrix::new(&dy, m, n),
            w: Matrix::new(&w, n, k),
            a: Matrix::new(&a, r, k),
            b: Matrix::new(&b, n, r),
            scale,
            x: Some(Matrix::new(&x, m, k)),
            h: Some(Matrix::new(&h, m, problem.columns_of_h())),
            dx: Some(MatrixMut::new(&mut dx, m, k)),
            da: Some(da.view(r, k)),
            db: Some(db.view(n, r)),
            dbias: dbias.as_mut().map(|dbias| dbias.view(1, n)),
            dm: None,
            accumulate: Accumulate::default(),
            variant: uploaded.view(),
        };
        let start = self.now()?;
        self.kernels.backward(&self.stream, op, &mut workspace)?;
        let end = self.now()?;
        Ok(Backward {
            dx: self.download(&dx)?,
            da: da.download(self)?,
            db: db.download(self)?,
            dbias: dbias.as_ref().map(|dbias| dbias.download(self)).transpose()?,
            time: Self::between(&start, &end)?,
        })
    }

    fn gain<T: Element>(&self, norms: &Norms<'_, T>) -> Result<Vec<f32>> {
        let Norms { n, k, r, scale, .. } = *norms;
        let (w, a, b) = (self.upload(norms.w)?, self.upload(norms.a)?, self.upload(norms.b)?);
        let magnitude = self.upload(norms.magnitude)?;
        let earlier = norms.earlier.map(|earlier| self.upload(earlier)).transpose()?;
        let mut gain = self.zeros::<f32>(n)?;
        let op = cuda::Gain {
            w: cuda::matrix(&w, n, k),
            factors: Factors::F32 { a: cuda::matrix(&a, r, k), b: cuda::matrix(&b, n, r) },
            scale,
            magnitude: Some(cuda::matrix(&magnitude, 1, n)),
            earlier: earlier.as_ref().map(|earlier| cuda::matrix(earlier, 1, n)),
            norm: None,
            gain: Some(cuda::matrix_mut(&mut gain, 1, n)),
        };
        self.kernels.gain::<T>(&self.stream, op)?;
        self.download(&gain)
    }

    fn magnitude<T: Element, A: Element>(
        &self,
        problem: &Problem<T, A>,
        of: &OfMagnitude<'_, T>,
    ) -> Result<(Vec<f32>, Duration)> {
        let Problem { m, n, k, r, scale, .. } = *problem;
        let (dy, w, y) = (self.upload(&problem.dy)?, self.upload(&problem.w)?, self.upload(of.y)?);
        let (a, b) = (self.upload(&problem.a)?, self.upload(&problem.b)?);
        let bias = problem.bias.as_ref().map(|bias| self.upload(bias)).transpose()?;
        let (magnitude, mut dm) = (self.upload(of.magnitude)?, self.zeros::<f32>(n)?);
        let uploaded = self.upload_variant(problem)?;
        let mut workspace = self.workspace(problem)?;
        let op = cuda::Backward {
            dy: Matrix::new(&dy, m, n),
            w: Matrix::new(&w, n, k),
            a: Matrix::new(&a, r, k),
            b: Matrix::new(&b, n, r),
            scale,
            x: None,
            h: None,
            dx: None,
            da: None,
            db: None,
            dbias: None,
            dm: Some(MagnitudeGradient {
                y: cuda::matrix(&y, m, n),
                bias: bias.as_ref().map(|bias| cuda::matrix(bias, 1, n)),
                magnitude: cuda::matrix(&magnitude, 1, n),
                dm: cuda::matrix_mut(&mut dm, 1, n),
            }),
            accumulate: Accumulate::default(),
            variant: uploaded.view(),
        };
        let start = self.now()?;
        self.kernels.backward(&self.stream, op, &mut workspace)?;
        let end = self.now()?;
        Ok((self.download(&dm)?, Self::between(&start, &end)?))
    }
}
