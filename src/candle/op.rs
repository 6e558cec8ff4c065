//! The op: three inputs in candle's graph, the frozen tensors beside them.

use std::ops::Deref;
use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Error as CandleError, Layout, Result, Shape, Storage, Tensor,
};

use super::backend::{Backend, Backward, Forward, Operand, Precision};
use super::cpu::Cpu;
use super::view::{View, addressable, check_room, view};
use super::{check, wrap};

/// Elements of x that the adapter branch does not see, as [`Dropout`](crate::Dropout) says, with seed and offset from the caller.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element is dropped, from 0 to 1.
    pub p: f32,
    /// Key of the generator.
    pub seed: u64,
    /// Another number for every application of the op with this seed.
    pub offset: u64,
}

/// How an application of the op departs from that of [`lora`], which drops nothing and keeps h.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Training {
    /// Backward drops what forward dropped.
    pub dropout: Option<Dropout>,
    /// Keep no h between forward and backward, which computes it again: another forward pass to at most eight columns of y.
    pub recompute: bool,
}

/// y = x Wᵀ + scale · (x Aᵀ) Bᵀ (+ bias) as one node of candle's graph, with gradients for x, `a`, `b` and `bias`.
///
/// | | shape | dtype |
/// |---|---|---|
/// | `x` | … × K, two dimensions or more | f32, f16 or bf16; on a GPU f16 or bf16 |
/// | `w` | N × K, frozen | as x |
/// | `a` | R × K | as x, or f32 |
/// | `b` | N × R | as x, or f32 |
/// | `bias` | N | as x, or f32 |
/// | result | … × N | as x |
///
/// `scale` is α/r or α/√r. f32 adapters and biases over a 16-bit x are rounded to its type; their gradients are
/// the f32 sums. Only the gradients of tracked inputs are computed, and h (M × R, in x's type) is kept for that of `b`. A tracked
/// bias is copied beside `b`, N · (R + 1) elements: candle's graph has room for three inputs.
///
/// Rows may lie any distance apart and start anywhere. A tensor that is no such matrix (transposed, broadcast, cut in two
/// dimensions) is copied first.
///
/// # Errors
/// [`Tracked`](crate::Error::Tracked) for a `w` that gradients are asked of; [`Rank`](crate::Error::Rank),
/// [`ArgumentDtype`](crate::Error::ArgumentDtype), [`OutOfMemory`](crate::Error::OutOfMemory), and what
/// [`raw::Forward::check`](crate::raw::Forward::check) finds: [`cause`](super::cause) has them back from candle's error. candle's own
/// [`DeviceMismatchBinaryOp`](CandleError::DeviceMismatchBinaryOp) for tensors on several devices.
pub fn lora(x: &Tensor, w: &Tensor, a: &Tensor, b: &Tensor, scale: f64, bias: Option<&Tensor>) -> Result<Tensor> {
    lora_train(x, w, a, b, scale, bias, Training::default())
}

/// As [`lora`], with dropout, or without keeping h.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use fused_lora::candle::{Dropout, Training, lora, lora_train};
///
/// let random = |rows: usize, cols: usize| Tensor::randn(0f32, 1.0, (rows, cols), &Device::Cpu);
/// let (x, w, a, b) = (random(4, 6)?, random(8, 6)?, Var::from_tensor(&random(2, 6)?)?, random(8, 2)?);
/// let dropout = |offset| Training { dropout: Some(Dropout { p: 0.5, seed: 42, offset }), ..Training::default() };
/// let y = |offset| lora_train(&x, &w, &a, &b, 2.0, None, dropout(offset));
/// let gradients = y(0)?.sum_all()?.backward()?; // of what this pass saw of x
/// assert!(gradients.get(&a).is_some());
/// let same = |one: &Tensor, other: &Tensor| candle_core::Result::Ok(one.to_vec2::<f32>()? == other.to_vec2::<f32>()?);
/// assert!(same(&y(0)?, &y(0)?)? && !same(&y(0)?, &y(1)?)?);
/// assert!(!same(&y(0)?, &lora(&x, &w, &a, &b, 2.0, None)?)?);
/// # candle_core::Result::Ok(())
/// ```
///
/// # Errors
/// As [`lora`]; [`Probability`](crate::Error::Probability).
pub fn lora_train(
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    bias: Option<&Tensor>,
    training: Training,
) -> Result<Tensor> {
    check::base(w, bias).and_then(|()| check::input(w, x)).and_then(|()| check::adapter(w, a, b)).map_err(wrap)?;
    for other in [w, a, b].into_iter().chain(bias) {
        let (lhs, rhs) = (x.device().location(), other.device().location());
        if lhs != rhs {
            return Err(CandleError::DeviceMismatchBinaryOp { lhs, rhs, op: NAME }.bt());
        }
    }
    let (third, role, beside) = third_input(b, bias)?;
    let narrow = |tensor: &Tensor| stand_in(tensor, x.dtype());
    let op = LoraOp {
        w: addressable(w)?,
        beside: beside
            .map(|tensor| Ok::<_, CandleError>(narrow(tensor)?.unwrap_or_else(|| tensor.detach())))
            .transpose()?,
        role,
        scale: scale as f32,
        training,
        stand_ins: [narrow(x)?, narrow(a)?, narrow(&third)?],
        keep_h: b.track_op() && !training.recompute,
        h: OnceLock::new(),
    };
    x.apply_op3(a, &third, op)
}

/// What the third input of the graph is: it must hold all that is tracked of B and the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Third {
    /// B; a bias lies beside the graph.
    B,
    /// The bias; B lies beside the graph.
    Bias,
    /// The elements of B, then those of the bias.
    Both,
}

/// The third input, what it is, and the one of B and the bias that lies beside the graph.
fn third_input<'a>(b: &'a Tensor, bias: Option<&'a Tensor>) -> Result<(Tensor, Third, Option<&'a Tensor>)> {
    match bias {
        Some(bias) if bias.track_op() && !b.track_op() => Ok((bias.clone(), Third::Bias, Some(b))),
        Some(bias) if bias.track_op() => {
            let dtype = if b.dtype() == bias.dtype() { b.dtype() } else { DType::F32 };
            check_room(b, dtype)?;
            let parts = [b.to_dtype(dtype)?.flatten_all()?, bias.to_dtype(dtype)?];
            Ok((Tensor::cat(&parts, 0)?, Third::Both, None))
        }
        _ => Ok((b.clone(), Third::B, bias)),
    }
}

const NAME: &str = "fused-lora";

/// What the kernels read in place of `tensor`, where it lies or is stored as they cannot read it.
fn stand_in(tensor: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    if tensor.dtype() != dtype {
        check_room(tensor, dtype)?;
        return Ok(Some(tensor.detach().to_dtype(dtype)?.contiguous()?));
    }
    if view(tensor.layout()).is_some() { Ok(None) } else { addressable(tensor).map(Some) }
}

/// One application of the op: candle's graph holds x, a and the third input.
struct LoraOp {
    w: Tensor,
    /// B or the bias, whichever is not in the third input, as the kernels read it.
    beside: Option<Tensor>,
    role: Third,
    scale: f32,
    training: Training,
    /// For the inputs of the graph.
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
    /// B and the bias from the third input and what lies beside it.
    fn parts<'a, S>(
        &self,
        third: Operand<'a, S>,
        beside: Option<Operand<'a, S>>,
        r: usize,
    ) -> (Operand<'a, S>, Option<Operand<'a, S>>) {
        let n = self.w.dims()[0];
        let part = |first, rows, cols| Operand {
            view: View { offset: third.view.offset + first, rows, cols, row_stride: cols },
            ..third
        };
        match self.role {
            Third::B => (third, beside),
            Third::Bias => (beside.unwrap_or(third), Some(third)),
            Third::Both => (part(0, n, r), Some(part(n * r, 1, n))),
        }
    }

    /// The inputs of the graph come as storages that candle has locked; locking them again could wait forever for a writer
    /// that waits for us.
    fn forward<B: Backend>(&self, inputs: [(&B::Storage, &Layout); 3]) -> Result<(B::Storage, Shape)> {
        let stand_ins = self.stand_ins.each_ref().map(|tensor| tensor.as_ref().map(Tensor::storage_and_layout));
        let input = |at: usize| match &stand_ins[at] {
            Some((storage, layout)) => operand::<B>(storage, layout),
            None => within(inputs[at].0, inputs[at].1),
        };
        let (w, w_layout) = self.w.storage_and_layout();
        let beside = self.beside.as_ref().map(Tensor::storage_and_layout);
        let beside = beside.as_ref().map(|(storage, layout)| operand::<B>(storage, layout)).transpose()?;
        let a = input(1)?;
        let (b, bias) = self.parts(input(2)?, beside, a.view.rows);
        let op = Forward {
            x: input(0)?,
            w: operand::<B>(&w, w_layout)?,
            a,
            b,
            bias,
            scale: self.scale,
            dropout: self.training.dropout,
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
        let [x, a, third] = inputs;
        let read = |at: usize| self.stand_ins[at].as_ref().unwrap_or(inputs[at]).storage_and_layout();
        let precision = |tensor: &Tensor| {
            let f32 = tensor.dtype() != self.w.dtype();
            tensor.track_op().then_some(if f32 { Precision::F32 } else { Precision::Storage })
        };
        let (xs, ws, a_s, thirds) = (read(0), self.w.storage_and_layout(), read(1), read(2));
        let dys = dy.storage_and_layout();
        let besides = self.beside.as_ref().map(Tensor::storage_and_layout);
        let beside = besides.as_ref().map(|(storage, layout)| operand::<B>(storage, layout)).transpose()?;
        let (w, ad) = (operand::<B>(&ws.0, ws.1)?, operand::<B>(&a_s.0, a_s.1)?);
        let (b, _) = self.parts(operand::<B>(&thirds.0, thirds.1)?, beside, ad.view.rows);
        let x_operand = operand::<B>(&xs.0, xs.1)?;
        let wanted = precision(third);
        let db = wanted.filter(|_| self.role != Third::Bias);
        let again = match db {
            Some(_) if self.h.get().is_none() => Some(self.middle::<B>(x_operand, w, ad, b)?),
            _ => None,
        };
        let hs = self.h.get().or(again.as_ref()).map(Tensor::storage_and_layout);
        let op = Backward {
            dy: operand::<B>(&dys.0, dys.1)?,
            w,
            a: ad,
            b,
            x: x_operand,
            h: hs.as_ref().map(|(storage, layout)| operand::<B>(storage, layout)).transpose()?,
            scale: self.scale,
            dropout: self.training.dropout,
            dx: x.track_op(),
            da: precision(a),
            db,
            dbias: wanted.filter(|_| self.role != Third::B),
        };
        let gradients = by_dtype!(self.w.dtype(), B::backward, &op)?;
        let tensor = |gradient: Option<B::Storage>, shape: Shape| {
            gradient.map(|gradient| Tensor::from_storage(B::wrap(gradient), shape, BackpropOp::none(), false))
        };
        let (n, r) = (w.view.rows, ad.view.rows);
        let (db, dbias) = (tensor(gradients.db, Shape::from((n, r))), tensor(gradients.dbias, Shape::from(n)));
        let third = match (db, dbias) {
            (Some(db), Some(dbias)) => Some(Tensor::cat(&[db.flatten_all()?, dbias], 0)?),
            (db, dbias) => db.or(dbias),
        };
        let (dx, da) = (tensor(gradients.dx, x.shape().clone()), tensor(gradients.da, a.shape().clone()));
        Ok([dx, da, third])
    }

    /// h where forward kept none: that of a forward pass to a few columns of y, as many as fill 16 bytes.
    fn middle<B: Backend>(
        &self,
        x: Operand<'_, B::Storage>,
        w: Operand<'_, B::Storage>,
        a: Operand<'_, B::Storage>,
        b: Operand<'_, B::Storage>,
    ) -> Result<Tensor> {
        let rows = w.view.rows.min(8);
        let (w, b) = (w.first_rows(rows), b.first_rows(rows));
        let Training { dropout, .. } = self.training;
        let op = Forward { x, w, a, b, bias: None, scale: self.scale, dropout, keep_h: true };
        match by_dtype!(self.w.dtype(), B::forward, &op)?.h {
            Some(h) => {
                let shape = (x.view.rows, a.view.rows);
                Ok(Tensor::from_storage(B::wrap(h), shape, BackpropOp::none(), false))
            }
            None => candle_core::bail!("{NAME}: forward kept no h"),
        }
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
