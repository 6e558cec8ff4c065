//! Fused LoRA layers.
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
#[cfg(all(feature = "emulator", feature = "cuda"))]
pub mod emulator;
mod error;
pub mod kernels;
mod ops;
mod params;
pub mod plan;
pub mod raw;
pub mod reference;
mod shape;

pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use ops::{Accumulate, Backward, Forward, Gradient, Matrix, MatrixMut};
pub use shape::{LoraShape, MAX_DIMENSION};
