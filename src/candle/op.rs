//! The op: three inputs in candle's graph, the frozen tensors beside them.

use std::ops::Deref;
use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Error as CandleError, Layout, Result, Shape, Storage, Tensor,
};

use super::backend::{Backend, Backward, Forward, Operand, Precision};
use super::cpu::Cpu;
use super::view::{addressable, view};
use super::{check, wrap};

/// y = x Wᵀ + scale · (x Aᵀ) Bᵀ (+ bias) as one node of candle's graph, with gradients for x, `a` and `b`.
///
/// | | shape | dtype |
/// |---|---|---|
/// | `x` | … × K, two dimensions or more | f32, f16 or bf16; on a GPU f16 or bf16 |
/// | `w` | N × K, frozen | as x |
/// | `a` | R × K | as x, or f32 |
/// | `b` | N × R | as x, or f32 |
/// | `bias` | N, frozen | as x |
/// | result | … × N | as x |
///
/// `scale` is α/r or α/√r. f32 adapters over a 16-bit x are rounded to its type for the products; their gradients are
/// the f32 sums. Only the gradients of tracked inputs are computed, and h (M × R, in x's type) is kept for that of `b`.
///
/// Rows may lie any distance apart and start anywhere. A tensor that is no such matrix (transposed, broadcast, cut in two
/// dimensions) is copied first.
///
/// # Errors
/// [`Tracked`](crate::Error::Tracked) for a `w` or `bias` that gradients are asked of; [`Rank`](crate::Error::Rank),
/// [`ArgumentDtype`](crate::Error::ArgumentDtype), and what [`raw::Forward::check`](crate::raw::Forward::check) finds:
/// [`cause`](super::cause) has them back from candle's error. candle's own
/// [`DeviceMismatchBinaryOp`](CandleError::DeviceMismatchBinaryOp) for tensors on several devices.
pub fn lora(x: &Tensor, w: &Tensor, a: &Tensor, b: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    check::base(w, bias).and_then(|()| check::input(w, x)).and_then(|()| check::adapter(w, a, b)).map_err(wrap)?;
    for other in [w, a, b].into_iter().chain(bias) {
        let (lhs, rhs) = (x.device().location(), other.device().location());
        if lhs != rhs {
            return Err(CandleError::DeviceMismatchBinaryOp { lhs, rhs, op: NAME }.bt());
        }
    }
    let op = LoraOp {
        w: addressable(w)?,
        bias: bias.map(addressable).transpose()?,
        scale: scale as f32,
        stand_ins: [stand_in(x, x.dtype())?, stand_in(a, x.dtype())?, stand_in(b, x.dtype())?],
        keep_h: b.track_op(),
        h: OnceLock::new(),
    };
    x.apply_op3(a, b, op)
}

const NAME: &str = "fused-lora";

/// What the kernels read in place of `tensor`, where it lies or is stored as they cannot read it.
fn stand_in(tensor: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    if tensor.dtype() != dtype {
        return Ok(Some(tensor.detach().to_dtype(dtype)?.contiguous()?));
    }
    if view(tensor.layout()).is_some() { Ok(None) } else { addressable(tensor).map(Some) }
}

/// One application of the op: candle's graph holds x, a and b.
struct LoraOp {
    w: Tensor,
    bias: Option<Tensor>,
    scale: f32,
    /// For x, a and b.
    stand_ins: [Option<Tensor>; 3],
    keep_h: bool,
    /// What forward keeps for backward, which may come more than once.
    h: OnceLock<Tensor>,
}

fn operand<'a, B: Backend>(
    storage: &'a impl Deref<Target = Storage>,
    layout: &Layout,
) -> Result<Operand<'a, B::Storage>> {
    within(B::of(storage)?, layout)
}

fn within<'a, S>(storage: &'a S, layout: &Layout) -> Result<Operand<'a, S>> {
    match view(layout) {
        Some(view) => Ok(Operand { storage, view }),
        None => candle_core::bail!("{NAME}: not a matrix: {layout:?}"),
    }
}

/// Runs `$call::<T>` for the element type that is `$dtype`.
macro_rules! by_dtype {
    ($dtype:expr, $backend:ident::$call:ident, $op:expr) => {
        match $dtype {
            DType::F32 => $backend::$call::<f32>($op),
            DType::F16 => $backend::$call::<half::f16>($op),
            DType::BF16 => $backend::$call::<half::bf16>($op),
            dtype => Err(CandleError::UnsupportedDTypeForOp(dtype, NAME).bt()),
        }
    };
}

impl LoraOp {
    /// The inputs of the graph come as storages that candle has locked; locking them again could wait forever for a writer
    /// that waits for us.
    fn forward<B: Backend>(&self, inputs: [(&B::Storage, &Layout); 3]) -> Result<(B::Storage, Shape)> {
        let stand_ins = self.stand_ins.each_ref().map(|tensor| tensor.as_ref().map(Tensor::storage_and_layout));
        let input = |at: usize| match &stand_ins[at] {
            Some((storage, layout)) => operand::<B>(storage, layout),
            None => within(inputs[at].0, inputs[at].1),
        };
        let (w, w_layout) = self.w.storage_and_layout();
        let bias = self.bias.as_ref().map(Tensor::storage_and_layout);
        let op = Forward {
            x: input(0)?,
            w: operand::<B>(&w, w_layout)?,
            a: input(1)?,
            b: input(2)?,
            bias: bias.as_ref().map(|(storage, layout)| operand::<B>(storage, layout)).transpose()?,
            scale: self.scale,
            keep_h: self.keep_h,
        };
        let outputs = by_dtype!(self.w.dtype(), B::forward, &op)?;
        if let Some(h) = outputs.h {
            let shape = (op.x.view.rows, op.a.view.rows);
            let _ = self.h.set(Tensor::from_storage(B::wrap(h), shape, BackpropOp::none(), false));
        }
        let mut dims = inputs[0].1.dims().to_vec();
        if let Some(features) = dims.last_mut() {
            *features = op.w.view.rows;
        }
        Ok((outputs.y, Shape::from(dims)))
    }

    fn backward<B: Backend>(&self, inputs: [&Tensor; 3], dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let [x, a, b] = inputs;
        let read = |at: usize| self.stand_ins[at].as_ref().unwrap_or(inputs[at]).storage_and_layout();
        let precision = |tensor: &Tensor| {
            let f32 = tensor.dtype() != self.w.dtype();
            tensor.track_op().then_some(if f32 { Precision::F32 } else { Precision::Storage })
        };
        let (xs, ws, a_s, bs, dys) = (read(0), self.w.storage_and_layout(), read(1), read(2), dy.storage_and_layout());
        let hs = self.h.get().map(Tensor::storage_and_layout);
        let op = Backward {
            dy: operand::<B>(&dys.0, dys.1)?,
            w: operand::<B>(&ws.0, ws.1)?,
            a: operand::<B>(&a_s.0, a_s.1)?,
            b: operand::<B>(&bs.0, bs.1)?,
            x: operand::<B>(&xs.0, xs.1)?,
            h: hs.as_ref().map(|(storage, layout)| operand::<B>(storage, layout)).transpose()?,
            scale: self.scale,
            dx: x.track_op(),
            da: precision(a),
            db: precision(b),
        };
        let gradients = by_dtype!(self.w.dtype(), B::backward, &op)?;
        let tensor = |gradient: Option<B::Storage>, of: &Tensor| {
            gradient.map(|gradient| Tensor::from_storage(B::wrap(gradient), of.shape(), BackpropOp::none(), false))
        };
        Ok([tensor(gradients.dx, x), tensor(gradients.da, a), tensor(gradients.db, b)])
    }
}

impl CustomOp3 for LoraOp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward::<Cpu>([(x, x_layout), (a, a_layout), (b, b_layout)])
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.forward::<super::cuda::Cuda>([(x, x_layout), (a, a_layout), (b, b_layout)])
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        candle_core::bail!("{NAME}: tensors on a GPU need the feature `candle-cuda`")
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = addressable(dy)?;
        #[cfg(feature = "candle-cuda")]
        let gradients = if dy.device().is_cuda() {
            self.backward::<super::cuda::Cuda>([x, a, b], &dy)
        } else {
            self.backward::<Cpu>([x, a, b], &dy)
        };
        #[cfg(not(feature = "candle-cuda"))]
        let gradients = self.backward::<Cpu>([x, a, b], &dy);
        let [dx, da, db] = gradients?;
        Ok((dx, da, db))
    }
}
