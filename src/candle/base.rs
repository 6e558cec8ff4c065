//! What a layer is without adapters.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::Linear;

use super::linear::Adapter;

/// W, or what took its place, and the bias.
#[derive(Clone, Debug)]
pub(super) struct Base {
    /// N × K, without the bias.
    pub(super) linear: Linear,
    pub(super) bias: Option<Tensor>,
}

impl Base {
    /// The bias and the adapter's own inside its scale, in f32 where there are both; tracked where one of them is.
    pub(super) fn bias_with(&self, adapter: &Adapter) -> Result<Option<Tensor>> {
        let Some(b_bias) = &adapter.b_bias else { return Ok(self.bias.clone()) };
        let own = b_bias.to_dtype(DType::F32)?.affine(adapter.scale, 0.0)?;
        match &self.bias {
            Some(bias) => (bias.to_dtype(DType::F32)? + own).map(Some),
            None => Ok(Some(own)),
        }
    }

    /// W + s · B A in f32, outside of the graph.
    pub(super) fn folded(&self, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
        let f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        f32(self.linear.weight())? + f32(b)?.matmul(&f32(a)?)?.affine(scale, 0.0)?
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match x.dims() {
            // candle's linear layer knows at most four dimensions.
            [tokens @ .., _] if tokens.len() > 3 => {
                let y = self.linear.forward(&x.flatten(0, tokens.len() - 1)?)?;
                y.reshape([tokens, &[self.linear.weight().dim(0)?]].concat())?
            }
            _ => self.linear.forward(x)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }
}
