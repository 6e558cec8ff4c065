//! A linear layer of the model, with or without an adapter.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor};

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
