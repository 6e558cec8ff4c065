//! A linear layer of the model, with or without an adapter.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Storage, Tensor};
use fused_lora::candle::{Dropout, Training, lora_train};

/// An adapter's part of a layer: a (R × K), b (N × R) and perhaps a bias on b or DoRA's magnitude (N), variables where it is trained,
/// and s.
#[derive(Clone, Debug)]
pub struct Lora {
    pub a: Tensor,
    pub b: Tensor,
    pub b_bias: Option<Tensor>,
    pub magnitude: Option<Tensor>,
    pub scale: f64,
    /// Of training passes.
    pub dropout: Option<Dropping>,
    /// Beside a 16-bit W, a and b are read as they are, not rounded.
    pub full_precision: bool,
}

/// Dropout of one layer: the probability, and a seed that no other layer has.
#[derive(Clone, Copy, Debug)]
pub struct Dropping {
    pub p: f32,
    pub seed: u64,
}

/// `y = x Wᵀ (+ s · ((x Aᵀ) Bᵀ + b_bias)) (+ bias)`, W (N × K) frozen; with a magnitude both products are multiplied by
/// magnitude / ‖W + s · B A‖.
#[derive(Debug)]
pub struct Linear {
    pub w: Tensor,
    /// In W's type or f32; a variable where it is trained.
    pub bias: Option<Tensor>,
    pub lora: Option<Lora>,
}

impl Linear {
    /// x is … × K. `pass` is the number of the training pass, which no other has, and `None` for inference.
    pub fn forward(&self, x: &Tensor, pass: Option<u64>) -> Result<Tensor> {
        let bias = self.bias()?;
        let Some(lora @ Lora { a, b, scale, dropout, magnitude, full_precision, .. }) = &self.lora else {
            return with_bias(product(x, &self.w)?, bias);
        };
        let dropout = dropout.zip(pass).map(|(Dropping { p, seed }, offset)| Dropout { p, seed, offset });
        if fused(x.dtype(), x.device()) {
            let (magnitude, full_precision) = (magnitude.as_ref(), *full_precision);
            let training = Training { dropout, magnitude, full_precision, ..Training::default() };
            return lora_train(x, &self.w, a, b, *scale, bias.as_ref(), training);
        }
        if dropout.is_some() {
            candle_core::bail!("dropout is part of the fused op, which does not compute f32 on a GPU");
        }
        let mut y = (product(x, &self.w)? + (product(&product(x, a)?, b)? * *scale)?)?;
        if let Some(magnitude) = magnitude {
            let norm = lora.folded(&self.w)?.sqr()?.sum(1)?.sqrt()?;
            y = y.broadcast_mul(&(magnitude / norm)?)?;
        }
        with_bias(y, bias)
    }

    /// The layer's, with the adapter's inside its scale; in f32 where there are both.
    fn bias(&self) -> Result<Option<Tensor>> {
        let own = self.lora.as_ref().and_then(|lora| Some((lora.b_bias.as_ref()?, lora.scale)));
        let Some((own, scale)) = own else { return Ok(self.bias.clone()) };
        let own = (own.to_dtype(DType::F32)? * scale)?;
        match &self.bias {
            Some(bias) => (bias.to_dtype(DType::F32)? + own).map(Some),
            None => Ok(Some(own)),
        }
    }

    /// W + s · B A, times the gain where there is a magnitude, and the sum of the biases, formed in f32 and rounded once, in place of
    /// W, bias and adapter.
    pub fn merge(&mut self) -> Result<()> {
        self.bias = self.bias()?;
        if let Some(lora) = self.lora.take() {
            let mut folded = lora.folded(&self.w)?;
            if let Some(magnitude) = &lora.magnitude {
                let norm = folded.sqr()?.sum_keepdim(1)?.sqrt()?;
                folded = folded.broadcast_mul(&(magnitude.detach().unsqueeze(1)? / norm)?)?;
            }
            self.w = folded.to_dtype(self.w.dtype())?;
        }
        Ok(())
    }
}

impl Lora {
    /// W + s · B A in f32, outside of the graph.
    fn folded(&self, w: &Tensor) -> Result<Tensor> {
        let f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        f32(w)? + (f32(&self.b)?.matmul(&f32(&self.a)?)? * self.scale)?
    }
}

/// The fused op computes f32 on the CPU alone.
pub fn fused(dtype: DType, device: &Device) -> bool {
    dtype != DType::F32 || device.is_cpu()
}

fn with_bias(y: Tensor, bias: Option<Tensor>) -> Result<Tensor> {
    bias.map_or_else(|| Ok(y.clone()), |bias| y.broadcast_add(&bias.to_dtype(y.dtype())?))
}

/// x Wᵀ for x of … × K.
fn product(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (n, k) = w.dims2()?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(n);
    let x = x.reshape(((), k))?;
    let y = if x.track_op() && !w.track_op() { x.apply_op1(Frozen(w.clone()))? } else { x.matmul(&w.t()?)? };
    y.reshape(shape)
}

/// x Wᵀ with W (N × K) outside of candle's graph: backward of candle's own product would compute the gradient of W, too,
/// half of all its work.
struct Frozen(Tensor);

impl Frozen {
    fn product<S: BackendStorage>(&self, x: &S, x_layout: &Layout, w: &S) -> Result<(S, Shape)> {
        let (m, k) = x_layout.shape().dims2()?;
        let n = self.0.dim(0)?;
        Ok((x.matmul(w, (1, m, n, k), x_layout, &self.0.layout().transpose(0, 1)?)?, (m, n).into()))
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match &*self.0.storage_and_layout().0 {
            Storage::Cpu(w) => self.product(x, layout, w),
            _ => candle_core::bail!("x is on the CPU, but w is not"),
        }
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, x: &candle_core::CudaStorage, layout: &Layout) -> Result<(candle_core::CudaStorage, Shape)> {
        match &*self.0.storage_and_layout().0 {
            Storage::Cuda(w) => self.product(x, layout, w),
            _ => candle_core::bail!("x is on a GPU, but w is not"),
        }
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.matmul(&self.0).map(Some)
    }
}
