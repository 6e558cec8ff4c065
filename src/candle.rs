//! An op with gradients and a layer for candle 0.11.
//!
//! [`lora`] is one node of candle's graph: x, A, B and the bias are its inputs and get their gradients, W is frozen beside them.
//! [`LoraLinear`] is a layer around it, and [`lora_shared`] and [`LoraProjections`] are the same for several projections of one x.
//! On a CPU they compute on [`crate::cpu`] in f32, f16 or bf16; on GPUs, with the feature `candle-cuda`, by the kernels of
//! `crate::cuda` in f16 or bf16, on candle's stream.
//!
//! ```
//! use candle_core::{DType, Device, ModuleT, Tensor};
//! use candle_nn::{AdamW, Optimizer, VarBuilder, VarMap};
//! use fused_lora::candle::{LoraConfig, LoraLinear};
//!
//! let (vars, device) = (VarMap::new(), Device::Cpu);
//! let (w, x) = (Tensor::randn(0f32, 0.1, (8, 6), &device)?, Tensor::randn(0f32, 1.0, (4, 6), &device)?);
//! let config = LoraConfig { r: 2, alpha: 4.0, rslora: false };
//! let layer = LoraLinear::new(w, None, config, VarBuilder::from_varmap(&vars, DType::F32, &device))?;
//! let layer = layer.with_dropout(0.1, 42)?; // in training, from the seed 42
//! let mut optimizer = AdamW::new_lr(vars.all_vars(), 0.01)?; // A and B; W is frozen
//! let loss = || layer.forward_t(&x, true)?.sqr()?.mean_all();
//! let before = loss()?.to_scalar::<f32>()?;
//! for _ in 0..10 {
//!     optimizer.backward_step(&loss()?)?;
//! }
//! assert!(loss()?.to_scalar::<f32>()? < before);
//! let y = layer.forward(&x)?; // for inference: nothing is dropped
//! # assert_eq!(y.dims(), [4, 8]);
//! # candle_core::Result::Ok(())
//! ```
//!
//! # What differs from `x.matmul(W.t()) + s · …`
//!
//! Products, bias and scale are summed in f32 and rounded once, as the crate's [rounding contract](crate#rounding-contract)
//! says. Gradients that nobody tracks are not computed, none is ever computed for W, and of the intermediate results only h
//! (M × R) is kept.
//!
//! # On a GPU
//!
//! Forward and backward are one launch each, beside the copies that [`lora`] names; memory comes from candle's device. Kernels
//! are loaded on the first call in a context. A workspace per stream is kept for the 16 streams used last, and grows when a call
//! needs more: before a CUDA graph is captured, run what it will hold once; and a graph must not run after calls on 16 other
//! streams, or larger ones on its own, which let its workspace go. W, x, A, B and routes must come from one
//! [`Device`](candle_core::Device), not from two that were made for the same GPU.

mod backend;
mod bank;
mod base;
mod check;
mod cpu;
#[cfg(feature = "candle-cuda")]
mod cuda;
mod linear;
mod modes;
mod node;
mod op;
mod projections;

#[cfg(any(feature = "candle-cuda", test))]
mod recent;
mod routes;
mod split;
mod third;
mod view;

pub use bank::Bank;
pub use linear::{LoraConfig, LoraLinear};
pub use op::{Dropout, Projection, SharedTraining, Training, lora, lora_shared, lora_train};
pub use projections::LoraProjections;
pub use routes::Routes;

use crate::error::Error;

/// The crate's error in candle's, where there is one.
///
/// candle gets ours as its variant [`Cuda`](candle_core::Error::Cuda), the one that shows an error as it is and gives it back
/// (on a CPU as well); candle may add context, paths and backtraces.
pub fn cause(error: &candle_core::Error) -> Option<&Error> {
    use candle_core::Error as Outer;
    match error {
        Outer::Cuda(error) => error.downcast_ref(),
        Outer::WrappedContext { wrapped, .. } => wrapped.downcast_ref().and_then(cause),
        Outer::Context { inner, .. } | Outer::WithPath { inner, .. } | Outer::WithBacktrace { inner, .. } => {
            cause(inner)
        }
        _ => None,
    }
}

fn wrap(error: Error) -> candle_core::Error {
    candle_core::Error::Cuda(Box::new(error))
}
