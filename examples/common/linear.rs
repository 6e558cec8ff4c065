//! A linear layer of the model, with or without an adapter.

use candle_core::{DType, Result, Tensor};

/// An adapter's part of a layer: a (R × K), b (N × R), variables where it is trained, and s.
#[derive(Clone, Debug)]
pub struct Lora {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
}

/// `y = x Wᵀ (+ s · (x Aᵀ) Bᵀ) (+ bias)`, W (N × K) and the bias frozen.
#[derive(Debug)]
pub struct Linear {
    pub w: Tensor,
    pub bias: Option<Tensor>,
    pub lora: Option<Lora>,
}

impl Linear {
    /// x is … × K.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.lora {
            Some(lora) if fused(x) => {
                fused_lora::candle::lora(x, &self.w, &lora.a, &lora.b, lora.scale, self.bias.as_ref())
            }
            Some(Lora { a, b, scale }) => self.base(x)? + (product(&product(x, a)?, b)? * *scale)?,
            None => self.base(x),
        }
    }

    fn base(&self, x: &Tensor) -> Result<Tensor> {
        let y = product(x, &self.w)?;
        self.bias.as_ref().map_or_else(|| Ok(y.clone()), |bias| y.broadcast_add(bias))
    }

    /// W + s · B A, formed in f32 and rounded once, in place of W and the adapter.
    pub fn merge(&mut self) -> Result<()> {
        if let Some(Lora { a, b, scale }) = self.lora.take() {
            let f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
            let delta = (f32(&b)?.matmul(&f32(&a)?)? * scale)?;
            self.w = (f32(&self.w)? + delta)?.to_dtype(self.w.dtype())?;
        }
        Ok(())
    }
}

/// The fused op computes f32 on the CPU alone.
fn fused(x: &Tensor) -> bool {
    x.dtype() != DType::F32 || x.device().is_cpu()
}

/// x Wᵀ for x of … × K.
fn product(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (n, k) = w.dims2()?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(n);
    x.reshape(((), k))?.matmul(&w.t()?)?.reshape(shape)
}
