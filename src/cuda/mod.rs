//! The CUDA backend: the planned launches, on the caller's stream, over the caller's buffers.
//!
//! Buffers are whatever implements cudarc's [`DevicePtr`] or [`DevicePtrMut`]: `CudaSlice`, its views, or a type of your
//! own; a stack without cudarc, or with another version of it, passes addresses to [`Kernels::forward_raw`].
//!
//! ```no_run
//! use fused_lora::{Matrix, MatrixMut, bf16, cuda};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (m, n, k, r, scale) = (128, 256, 256, 16, 2.0);
//! # let [x, w, a, b] = [m * k, n * k, r * k, n * r].map(|elements| vec![bf16::ONE; elements]);
//! let kernels = cuda::Kernels::on_device(0)?; // Error::NoDriver where there is no GPU
//! let stream = kernels.context().new_stream()?;
//! let (x, w, a, b) = (stream.clone_htod(&x)?, stream.clone_htod(&w)?, stream.clone_htod(&a)?, stream.clone_htod(&b)?);
//! let (mut h, mut y) = (stream.alloc_zeros::<bf16>(m * r)?, stream.alloc_zeros::<bf16>(m * n)?);
//! let shape = fused_lora::LoraShape { m, n, k, r };
//! let mut workspace = cuda::Workspace::new(&stream, kernels.workspace_bytes(fused_lora::Dtype::Bf16, shape)?)?;
//! let forward = cuda::Forward {
//!     x: Matrix::new(&x, m, k),
//!     w: Matrix::new(&w, n, k),
//!     a: Matrix::new(&a, r, k),
//!     b: Matrix::new(&b, n, r),
//!     scale,
//!     bias: None,
//!     h: Some(MatrixMut::new(&mut h, m, r)),
//!     y: MatrixMut::new(&mut y, m, n),
//!     variant: Default::default(),
//! };
//! kernels.forward(&stream, forward, &mut workspace)?;
//!
//! let dy = y; // stands for the gradient that arrives from the loss
//! let (mut dx, mut da) = (stream.alloc_zeros::<bf16>(m * k)?, stream.alloc_zeros::<f32>(r * k)?);
//! let backward = cuda::Backward {
//!     dy: Matrix::new(&dy, m, n),
//!     w: Matrix::new(&w, n, k),
//!     a: Matrix::new(&a, r, k),
//!     b: Matrix::new(&b, n, r),
//!     scale,
//!     x: Some(Matrix::new(&x, m, k)),
//!     h: Some(Matrix::new(&h, m, r)),
//!     dx: Some(MatrixMut::new(&mut dx, m, k)),
//!     da: Some(fused_lora::Gradient::F32(MatrixMut::new(&mut da, r, k))),
//!     db: None,
//!     dbias: None,
//!     dm: None,
//!     accumulate: fused_lora::Accumulate::default(),
//!     variant: Default::default(),
//! };
//! kernels.backward(&stream, backward, &mut workspace)?;
//! let dx: Vec<bf16> = stream.clone_dtoh(&dx)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What an operation does
//!
//! It checks everything, then launches one kernel on the given stream, and returns: it does not allocate device memory and
//! does not wait. Everything the kernel needs beside the arguments lies in the [`Workspace`]. What the buffers do when their
//! address is taken is theirs: cudarc's own make the stream wait for what other streams still do with them (while the
//! context tracks events), and its host-mapped ones wait for the stream afterwards.
//!
//! # CUDA graphs
//!
//! Both operations can be captured; loading kernels and making or growing a workspace must come before. A graph keeps
//! addresses, so kernels, workspace and buffers must outlive it, and nothing else may use them while it runs. cudarc's event
//! tracking is at odds with capture (a captured stream may not wait for an event of earlier work, which gives
//! [`Error::Capturing`](crate::Error::Capturing)): allocate the buffers of a graph after
//! `CudaContext::disable_event_tracking`.

mod access;
mod driver;
mod kernels;
mod launch;
mod lent;
mod module;
mod queue;
mod size;
mod tensor_map;
mod workspace;

pub use cudarc;
pub use driver::context;
pub use kernels::Kernels;
pub use queue::Queue;
pub use workspace::Workspace;

use crate::{Matrix, MatrixMut};
use cudarc::driver::{DevicePtr, DevicePtrMut};

/// [`crate::Forward`] over device memory; every argument may be of another type of buffer.
pub type Forward<'a, T, A = T> = crate::Forward<
    'a,
    dyn DevicePtr<T> + 'a,
    dyn DevicePtrMut<T> + 'a,
    dyn DevicePtr<u64> + 'a,
    dyn DevicePtr<f32> + 'a,
    dyn DevicePtr<A> + 'a,
>;
/// [`crate::Backward`] over device memory; gradients are of `T` or of f32.
pub type Backward<'a, T, A = T> = crate::Backward<
    'a,
    dyn DevicePtr<T> + 'a,
    dyn DevicePtrMut<T> + 'a,
    dyn DevicePtrMut<f32> + 'a,
    dyn DevicePtr<u64> + 'a,
    dyn DevicePtr<f32> + 'a,
    dyn DevicePtr<A> + 'a,
>;
/// [`crate::ForwardProjection`] over device memory.
pub type ForwardProjection<'a, T, A = T> = crate::ForwardProjection<
    'a,
    dyn DevicePtr<T> + 'a,
    dyn DevicePtrMut<T> + 'a,
    dyn DevicePtr<f32> + 'a,
    dyn DevicePtr<A> + 'a,
>;
/// [`crate::ForwardShared`] over device memory.
pub type ForwardShared<'a, T, A = T> = crate::ForwardShared<
    'a,
    dyn DevicePtr<T> + 'a,
    dyn DevicePtrMut<T> + 'a,
    dyn DevicePtr<u64> + 'a,
    dyn DevicePtr<f32> + 'a,
    dyn DevicePtr<A> + 'a,
>;
/// [`crate::BackwardProjection`] over device memory; gradients are of `T` or of f32.
pub type BackwardProjection<'a, T, A = T> = crate::BackwardProjection<
    'a,
    dyn DevicePtr<T> + 'a,
    dyn DevicePtrMut<T> + 'a,
    dyn DevicePtrMut<f32> + 'a,
    dyn DevicePtr<f32> + 'a,
    dyn DevicePtr<A> + 'a,
>;
/// [`crate::BackwardShared`] over device memory; gradients are of `T` or of f32.
pub type BackwardShared<'a, T, A = T> = crate::BackwardShared<
    'a,
    dyn DevicePtr<T> + 'a,
    dyn DevicePtrMut<T> + 'a,
    dyn DevicePtrMut<f32> + 'a,
    dyn DevicePtr<u64> + 'a,
    dyn DevicePtr<f32> + 'a,
    dyn DevicePtr<A> + 'a,
>;
/// [`crate::Variant`] over device memory.
pub type Variant<'a> = crate::Variant<'a, dyn DevicePtr<u64> + 'a, dyn DevicePtr<f32> + 'a>;
/// [`crate::Gain`] over device memory.
pub type Gain<'a, T> = crate::Gain<'a, dyn DevicePtr<T> + 'a, dyn DevicePtr<f32> + 'a, dyn DevicePtrMut<f32> + 'a>;
/// [`crate::Merge`] over device memory; factors are of `T` or of f32.
pub type Merge<'a, T> = crate::Merge<'a, dyn DevicePtr<T> + 'a, dyn DevicePtrMut<T> + 'a, dyn DevicePtr<f32> + 'a>;
/// [`crate::Round`] over device memory; factors are of `T` or of f32, and so are outputs.
pub type Round<'a, T, A = T> =
    crate::Round<'a, dyn DevicePtr<T> + 'a, dyn DevicePtrMut<A> + 'a, dyn DevicePtr<f32> + 'a>;

/// A [`Matrix`] over any buffer, ready for [`Matrix::with_row_stride`] and [`Matrix::with_offset`].
///
/// Directly inside a [`Forward`] or [`Backward`], `Matrix::new(&buffer, rows, cols)` does as well; in front of another
/// call the compiler does not see that a trait object is wanted.
///
/// ```no_run
/// # use fused_lora::{bf16, cuda};
/// # fn example(hidden: &cuda::cudarc::driver::CudaSlice<bf16>) {
/// // The second of two 64 × 128 matrices that lie side by side.
/// let x = cuda::matrix::<bf16>(hidden, 64, 128).with_row_stride(256).with_offset(128);
/// # }
/// ```
pub fn matrix<'a, T>(data: &'a (dyn DevicePtr<T> + 'a), rows: usize, cols: usize) -> Matrix<'a, dyn DevicePtr<T> + 'a> {
    Matrix::new(data, rows, cols)
}

/// As [`matrix`], for memory that is written.
pub fn matrix_mut<'a, T>(
    data: &'a mut (dyn DevicePtrMut<T> + 'a),
    rows: usize,
    cols: usize,
) -> MatrixMut<'a, dyn DevicePtrMut<T> + 'a> {
    MatrixMut::new(data, rows, cols)
}
