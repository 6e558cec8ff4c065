//! LoRA layers as single fused CUDA kernels: one launch forward, one launch backward.
//!
//! ```text
//! y  = x Wᵀ + h Bᵀ (+ bias)          h  = s · x Aᵀ          forward
//! dx = dy W + dh A                   dh = s · dy B          backward: input gradient
//! da = dhᵀ x        db = dyᵀ h       dbias = Σ dy           backward: adapter gradients
//! ```
//!
//! W is frozen, s = α/r (or α/√r) is the scale, storage is fp16 or bf16, sums are in f32.
//!
//! # Letters
//!
//! The same letters mean the same in CUDA, Rust, tests, benches and documentation. Every matrix is row-major, with any
//! distance between its rows.
//!
//! | letter | shape | meaning |
//! |---|---|---|
//! | x, dx | M × K | input activations and their gradient. M = tokens, K = input features |
//! | w | N × K | frozen weight, as `torch.nn.Linear.weight` and `candle_nn::Linear` hold it. N = output features |
//! | a, da | R × K | the adapter's down projection, PEFT's `lora_A.weight`, and its gradient. R = rank |
//! | b, db | N × R | the adapter's up projection, PEFT's `lora_B.weight`, and its gradient |
//! | y, dy | M × N | output and its gradient |
//! | h, dh | M × R | the narrow middle, already multiplied by s, so that s appears nowhere else |
//! | bias, dbias | 1 × N | added to every row of y; its gradient |
//!
//! [`Forward`] writes h where the caller wants to keep it, and [`Backward`] reads it: M · R elements, little beside x. R = 0 is
//! the plain product x Wᵀ through the same code, for comparison.
//!
//! [`Variant`] has what the same launches do beside that: [`Dropout`] on the adapter branch, whose mask follows from seed, offset and
//! element alone, routes of many adapters in one batch ([`Routing`]), each row of x through its own, and DoRA's gain of each column
//! of y ([`Gain`] computes it, [`MagnitudeGradient`] is the gradient of what it is made of).
//!
//! [`ForwardShared`] and [`BackwardShared`] compute several projections of one x in one launch, each with a weight and an adapter of
//! its own.
//!
//! # Example
//!
//! On the CPU, so that it runs anywhere; on a GPU the matrices are over device memory and the rest is the same.
//!
//! ```
//! use fused_lora::{Accumulate, Gradient, Matrix, MatrixMut, Variant, cpu};
//!
//! let (m, n, k, r, scale) = (4, 8, 6, 2, 2.0); // tokens, outputs, inputs, rank, α/r
//! let [x, w, a, b, dy] = [m * k, n * k, r * k, n * r, m * n].map(|len| vec![0.5f32; len]);
//! let [mut h, mut y, mut dx, mut da, mut db] = [m * r, m * n, m * k, r * k, n * r].map(|len| vec![0.0; len]);
//! let (x, w) = (Matrix::new(&x[..], m, k), Matrix::new(&w[..], n, k));
//! let (a, b) = (Matrix::new(&a[..], r, k), Matrix::new(&b[..], n, r));
//!
//! let (keep, out) = (Some(MatrixMut::new(&mut h[..], m, r)), MatrixMut::new(&mut y[..], m, n));
//! cpu::forward(cpu::Forward { x, w, a, b, scale, bias: None, h: keep, y: out, variant: Variant::default() })?;
//! assert_eq!((h[0], y[0]), (3.0, 4.5));
//!
//! cpu::backward(cpu::Backward {
//!     dy: Matrix::new(&dy, m, n),
//!     w,
//!     a,
//!     b,
//!     scale,
//!     x: Some(x),
//!     h: Some(Matrix::new(&h, m, r)),
//!     dx: Some(MatrixMut::new(&mut dx, m, k)),
//!     da: Some(Gradient::F32(MatrixMut::new(&mut da, r, k))),
//!     db: Some(Gradient::F32(MatrixMut::new(&mut db, n, r))),
//!     dbias: None,
//!     dm: None,
//!     accumulate: Accumulate::default(),
//!     variant: Variant::default(),
//! })?;
//! assert_eq!((dx[0], da[0], db[0]), (6.0, 8.0, 6.0));
//! # Ok::<(), fused_lora::Error>(())
//! ```
//!
//! # Map
//!
//! From the outside in; each layer depends only on those below it.
//!
//! | module | what it does |
//! |---|---|
//! | [`linear`] | layers: a frozen weight and named adapters over any backend; training, merging, f32 factors |
//! | [`Forward`], [`Backward`], [`ForwardShared`], [`BackwardShared`], [`Matrix`] | what a caller writes: typed views over borrowed memory |
#![cfg_attr(feature = "cuda", doc = "| [`cuda`] | runs launches on a GPU, on the caller's stream |")]
#![cfg_attr(
    not(feature = "cuda"),
    doc = "| `cuda` | runs launches on a GPU, on the caller's stream (feature `cuda`) |"
)]
#![cfg_attr(feature = "candle", doc = "| [`candle`] | an op with gradients and a layer for candle |")]
#![cfg_attr(
    not(feature = "candle"),
    doc = "| `candle` | an op with gradients and a layer for candle (feature `candle`) |"
)]
//! | [`cpu`] | the same operations over slices, on all cores |
//! | `emulator` | runs the same launches on a CPU model of the PTX ISA, for tests (features `emulator` and `cuda`) |
#![cfg_attr(feature = "peft", doc = "| [`peft`] | adapters in PEFT's format, read and written |")]
#![cfg_attr(not(feature = "peft"), doc = "| `peft` | adapters in PEFT's format, read and written (feature `peft`) |")]
//! | [`plan`] | from a shape and a device to a launch and a workspace size, as data; explains itself |
//! | [`raw`] | addresses instead of views, for stacks with another cudarc or none; judges dimensions and overlap |
//! | [`kernels`] | the compiled kernels this build carries |
//! | [`mod@reference`] | the oracle of the tests: the formulas in f64, and the tolerance rule |
//!
//! # Rounding contract
//!
//! Every product sums in f32, in an order of the implementation's own, and each stored value is rounded once, to nearest
//! with ties to even:
//!
//! - h and dh: the f32 sum times s, rounded to the storage type. The rounded values are the operands of every product
//!   that follows.
//! - y and dx: both products and the bias (or, accumulating, what was there) in one f32 sum, rounded once. Separate matrix
//!   products round three times.
//! - da, db and dbias: [`Gradient::F32`] holds the f32 sums as they are, [`Gradient::Storage`] the same rounded once.
//!   Accumulating adds in f32 before the rounding.
//!
//! Adapter products take 16-bit operands, as PEFT's do under autocast; f32 factors can be rounded for them ([`Round`]). Or they take
//! f32 factors over a 16-bit base, PEFT's default, at more than 16-bit precision: [`Forward`] says how exact that is.
//! [`Merge`] sums in f32 in an order of its own, which gives the same bits on every backend.
//!
//! # What may be counted on
//!
//! - **One launch** for forward and one for backward. No allocation and no synchronisation hide in them; the workspace is
//!   the caller's, of a size known before.
//! - **Any shape**: M, N, K ≥ 1, any R, ragged, strided, unaligned. Where 16-byte loads do not apply slower ones do, and
//!   [`Plan::explain`](plan::Plan::explain) says so.
//! - **Repeatable**: same inputs, same device, same version, same bits. No floating-point atomics.
//! - **As exact as separate products**: the error against f64 is at most twice that of the same formulas as separate
//!   products in the storage type, plus one rounding. [`reference::check`] is that rule, and every test uses it.
//! - **Errors are values**: a bad argument gives an [`Error`] that names it, what it is and what it must be. Nothing was
//!   launched and no buffer was touched then.
//!
//! # Features
//!
//! - `cuda` (default): the GPU backend. Building needs nvcc (CUDA 12 or later) and libclang; running needs the driver, and
//!   without one the constructor returns [`Error::NoDriver`].
//! - `emulator`, with `cuda`: runs the kernels' PTX on the CPU.
//! - `candle`: the op and the layer for candle 0.11, on CPUs. `candle-cuda`: on GPUs as well, with candle's own `cuda` feature,
//!   which needs nvcc and links the driver.
//! - `peft`: adapters in PEFT's format, read and written.
//!
//! Without features only [`cpu`], [`plan`], [`raw`] and [`mod@reference`] have something to do, and neither nvcc nor libclang is
//! needed.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "candle")]
pub mod candle;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dropout;
mod dtype;
#[cfg(all(feature = "emulator", feature = "cuda"))]
pub mod emulator;
mod error;
pub mod kernels;
pub mod linear;
mod ops;
mod params;
#[cfg(feature = "peft")]
pub mod peft;
pub mod plan;
pub mod raw;
pub mod reference;
mod routing;
mod shape;
mod split;

pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use ops::{
    Accumulate, Backward, BackwardProjection, BackwardShared, Dropout, Factors, Forward, ForwardProjection,
    ForwardShared, Gain, Gradient, MagnitudeGradient, Matrix, MatrixMut, Merge, Round, Seed, Variant,
};
pub use routing::{MAX_ROUTED_RANK, Routing, Slot};
pub use shape::{LoraShape, MAX_DIMENSION};
pub use split::split_columns;

/// The code of the README runs as a test; half of it is about `cuda`, some about `candle`.
#[cfg(all(doctest, feature = "cuda", feature = "candle"))]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
