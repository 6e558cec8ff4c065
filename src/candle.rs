//! The op and the layer for candle 0.11.

mod backend;
mod check;
mod cpu;
#[cfg(feature = "candle-cuda")]
mod cuda;
mod linear;
mod op;
#[cfg(any(feature = "candle-cuda", test))]
mod recent;
mod view;

pub use linear::{LoraConfig, LoraLinear};
pub use op::lora;

use crate::error::Error;

/// The crate's error in candle's, where there is one: candle passes ours on as [`candle_core::Error::Cuda`], the only variant
/// that holds any error (on a CPU as well), and may wrap that in context and backtraces.
pub fn cause(error: &candle_core::Error) -> Option<&Error> {
    use candle_core::Error as Outer;
    match error {
        Outer::Cuda(error) => error.downcast_ref(),
        Outer::WrappedContext { wrapped, .. } => {
            wrapped.downcast_ref().or_else(|| wrapped.downcast_ref::<Outer>().and_then(cause))
        }
        Outer::Context { inner, .. } | Outer::WithPath { inner, .. } | Outer::WithBacktrace { inner, .. } => {
            cause(inner)
        }
        _ => None,
    }
}

fn wrap(error: Error) -> candle_core::Error {
    candle_core::Error::Cuda(Box::new(error))
}
