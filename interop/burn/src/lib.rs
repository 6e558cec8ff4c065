//! fused-lora on tensors of burn-cuda 0.22, through raw handles.
//!
//! [`Lora::forward`] and [`Lora::backward`] take [`CubeTensor`]s, the primitive of burn's CUDA backend without fusion, and return
//! new ones. They are the two halves of an operation that `burn-autodiff` can be taught: forward keeps h, backward reads it.
//!
//! cubecl does not show the stream it works on, and its streams do not wait for others. So each call waits for the client
//! before it launches, and for its own stream afterwards: right, but a barrier on either side of every operation.

use std::sync::Arc;

use burn_backend::{DType, Shape};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;
use fused_lora::cuda::Kernels;
use fused_lora::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut};
use fused_lora::plan::{Plan, WORKSPACE_ALIGN};
use fused_lora::{Accumulate, Dtype, raw};

/// What can go wrong here: fused-lora's errors, the driver's and cubecl's.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

type Server = <CudaRuntime as Runtime>::Server;

/// The kernels on a stream of their own, with a workspace.
pub struct Lora {
    kernels: Kernels,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
}

/// The gradients of x, A and B.
pub struct Gradients {
    /// M × K, of the tensors' type.
    pub dx: CubeTensor,
    /// R × K, f32.
    pub da: CubeTensor,
    /// N × R, f32.
    pub db: CubeTensor,
}

/// A tensor whose address is in use: the allocation neither moves nor is given away for as long as this lives.
struct Pinned {
    matrix: raw::Matrix,
    _resource: Box<dyn std::any::Any>,
}

/// A contiguous tensor of any number of dimensions as a matrix of all its rows. It must lie on that GPU and be of that type: of
/// both the kernels see nothing.
fn pin(tensor: &CubeTensor, ordinal: usize, dtype: DType) -> Result<Pinned, Error> {
    let on_gpu = matches!(&tensor.device, CubeDevice::Cuda(device) if device.index == ordinal);
    if !on_gpu || tensor.dtype != dtype {
        let (got, on) = (tensor.dtype, &tensor.device);
        return Err(format!("a tensor of {got:?} on {on:?}, expected {dtype:?} on CUDA device {ordinal}").into());
    }
    let shape = tensor.meta.shape();
    let cols = shape.iter().next_back().copied().ok_or("a tensor without dimensions, expected a matrix")?;
    let rows = shape.iter().product::<usize>() / cols.max(1);
    let resource = tensor.client.get_resource::<Server>(tensor.handle.clone()).map_err(|error| error.to_string())?;
    let matrix = raw::Matrix::new(resource.resource().ptr, rows, cols);
    Ok(Pinned { matrix, _resource: Box::new(resource) })
}

fn dtype(tensor: &CubeTensor) -> Result<Dtype, Error> {
    match tensor.dtype {
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::Bf16),
        other => Err(format!("a tensor of {other:?}, expected F16 or BF16").into()),
    }
}

/// An uninitialised tensor beside `like`.
fn empty(like: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape, dtype)
}

/// `like`'s shape with another last dimension.
fn with_columns(like: &CubeTensor, cols: usize) -> Shape {
    let mut dims: Vec<usize> = like.meta.shape().iter().copied().collect();
    if let Some(last) = dims.last_mut() {
        *last = cols;
    }
    Shape::from(dims)
}

impl Lora {
    /// On GPU `ordinal`, whose primary context cubecl uses as well.
    pub fn new(ordinal: usize) -> Result<Self, Error> {
        let kernels = Kernels::on_device(ordinal)?;
        let stream = kernels.context().new_stream()?;
        let workspace = stream.alloc_zeros(1)?;
        Ok(Self { kernels, stream, workspace })
    }

    /// (y, h): y = x Wᵀ + h Bᵀ, h = scale · x Aᵀ. `w` is N × K (PyTorch's layout; burn's `Linear` keeps K × N), `a` is R × K and
    /// `b` is N × R.
    pub fn forward(
        &mut self,
        x: CubeTensor,
        w: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        scale: f32,
    ) -> Result<(CubeTensor, CubeTensor), Error> {
        let [x, w, a, b] = [x, w, a, b].map(into_contiguous);
        let pin = |tensor: &CubeTensor| pin(tensor, self.kernels.context().ordinal(), x.dtype);
        let [px, pw, pa, pb] = [pin(&x)?, pin(&w)?, pin(&a)?, pin(&b)?];
        let y = empty(&x, with_columns(&x, pw.matrix.rows), x.dtype);
        let h = empty(&x, with_columns(&x, pa.matrix.rows), x.dtype);
        let [ph, py] = [pin(&h)?, pin(&y)?];
        let op = raw::Forward {
            dtype: dtype(&x)?,
            x: px.matrix,
            w: pw.matrix,
            f32_factors: false,
            a: pa.matrix,
            b: pb.matrix,
            scale,
            bias: None,
            h: Some(ph.matrix),
            y: py.matrix,
            variant: raw::Variant::default(),
        };
        let plan = Plan::forward_with(&op, self.kernels.device(), self.kernels.plan_options())?;
        let workspace = self.reserve(plan.workspace_bytes())?;
        wait_for(&x)?;
        // SAFETY: the tensors are pinned, contiguous, of the operation's type and on the kernels' GPU, in its primary context, and the
        // client has finished what it was given. Nothing else runs on them before `synchronize`; the workspace is `reserve`'s.
        unsafe { self.kernels.forward_raw(&op, workspace, plan.workspace_bytes(), self.stream.cu_stream().cast()) }?;
        self.stream.synchronize()?;
        Ok((y, h))
    }

    /// The gradients at `dy`; the other arguments as [`forward`](Self::forward) took and returned them.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        dy: CubeTensor,
        x: CubeTensor,
        w: CubeTensor,
        a: CubeTensor,
        b: CubeTensor,
        h: CubeTensor,
        scale: f32,
    ) -> Result<Gradients, Error> {
        let [dy, x, w, a, b, h] = [dy, x, w, a, b, h].map(into_contiguous);
        let dx = empty(&x, x.meta.shape().clone(), x.dtype);
        let da = empty(&x, a.meta.shape().clone(), DType::F32);
        let db = empty(&x, b.meta.shape().clone(), DType::F32);
        let pin = |tensor: &CubeTensor, dtype| pin(tensor, self.kernels.context().ordinal(), dtype);
        let stored = |tensor: &CubeTensor| pin(tensor, x.dtype);
        let [pdy, px, pw, pa, pb, ph] = [stored(&dy)?, stored(&x)?, stored(&w)?, stored(&a)?, stored(&b)?, stored(&h)?];
        let [pdx, pda, pdb] = [stored(&dx)?, pin(&da, DType::F32)?, pin(&db, DType::F32)?];
        let f32 = |pinned: &Pinned| Some(raw::Gradient { matrix: pinned.matrix, f32: true });
        let op = raw::Backward {
            dtype: dtype(&x)?,
            dy: pdy.matrix,
            w: pw.matrix,
            f32_factors: false,
            a: pa.matrix,
            b: pb.matrix,
            scale,
            x: Some(px.matrix),
            h: Some(ph.matrix),
            dx: Some(pdx.matrix),
            da: f32(&pda),
            db: f32(&pdb),
            dbias: None,
            dm: None,
            accumulate: Accumulate::default(),
            variant: raw::Variant::default(),
        };
        let plan = Plan::backward_with(&op, self.kernels.device(), self.kernels.plan_options())?;
        let workspace = self.reserve(plan.workspace_bytes())?;
        wait_for(&x)?;
        // SAFETY: as in `forward`; the gradients of A and B are f32.
        unsafe { self.kernels.backward_raw(&op, workspace, plan.workspace_bytes(), self.stream.cu_stream().cast()) }?;
        self.stream.synchronize()?;
        Ok(Gradients { dx, da, db })
    }

    /// The address of a workspace of at least `bytes` bytes, zeroed when it was allocated and only used by launches since.
    fn reserve(&mut self, bytes: usize) -> Result<u64, Error> {
        let room = bytes + WORKSPACE_ALIGN as usize;
        if self.workspace.len() < room {
            self.workspace = self.stream.alloc_zeros(room)?;
        }
        let (address, _guard) = self.workspace.device_ptr_mut(&self.stream);
        Ok(address.next_multiple_of(WORKSPACE_ALIGN))
    }
}

/// Until all that the tensor's client was given has run.
fn wait_for(tensor: &CubeTensor) -> Result<(), Error> {
    cubecl::future::block_on(tensor.client.sync()).map_err(|error| error.to_string().into())
}
