//! The op: three inputs in candle's graph, the frozen tensors beside them.

use std::ops::Deref;
use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Error as CandleError, Layout, Result, Shape, Storage, Tensor,
};

use super::backend::{Backend, Backward, Forward, Gain, OfMagnitude, Operand, Precision};
use super::cpu::Cpu;
use super::third::{Part, Third, readable, stand_in};
use super::view::{addressable, view};
use super::{check, wrap};

const NAME: &str = "fused-lora";

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

/// How an application of the op departs from that of [`lora`], which drops nothing, keeps h and has no magnitude.
#[derive(Clone, Copy, Debug, Default)]
pub struct Training<'a> {
    /// Backward drops what forward dropped.
    pub dropout: Option<Dropout>,
    /// Keep no h between forward and backward, which computes it again: another forward pass to at most eight columns of y.
    pub recompute: bool,
    /// DoRA's magnitude, N elements of x's type or f32: y = gain ∘ (x Wᵀ + scale · (x Aᵀ) Bᵀ) (+ bias), where
    /// gain = magnitude / ‖W + scale · B A‖, by rows of W, is computed in every application from the factors as they are, in one
    /// launch more that reads W. Gradients take the norm for a constant. Beside it no probability of dropout but 0.
    pub magnitude: Option<&'a Tensor>,
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
/// the f32 sums. Only the gradients of tracked inputs are computed, and h (M × R, in x's type) is kept for that of `b`. What is
/// tracked of `b`, `bias` and a magnitude is copied behind each other where it is more than one of them, at most N · (R + 2) elements:
/// candle's graph has room for three inputs.
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

/// As [`lora`], with dropout, without keeping h, or with a magnitude, which gets its gradient, too.
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
/// As [`lora`]; [`Probability`](crate::Error::Probability); [`Exclusive`](crate::Error::Exclusive) for a magnitude beside dropout.
pub fn lora_train(
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    bias: Option<&Tensor>,
    training: Training<'_>,
) -> Result<Tensor> {
    let Training { dropout, recompute, magnitude } = training;
    check::base(w, bias).and_then(|()| check::input(w, x)).and_then(|()| check::adapter(w, a, b)).map_err(wrap)?;
    let dropout = match magnitude {
        Some(magnitude) => check::magnitude(w, magnitude, dropout).map(|()| None).map_err(wrap)?,
        None => dropout,
    };
    for other in [w, a, b].into_iter().chain(bias).chain(magnitude) {
        let (lhs, rhs) = (x.device().location(), other.device().location());
        if lhs != rhs {
            return Err(CandleError::DeviceMismatchBinaryOp { lhs, rhs, op: NAME }.bt());
        }
    }
    let w = addressable(w)?;
    let gain = magnitude.map(|magnitude| gain(&w, a, b, scale as f32, magnitude)).transpose()?;
    let third = Third::new(b, bias, magnitude, x.dtype())?;
    let input = third.input.clone();
    let op = LoraOp {
        w,
        stand_ins: [stand_in(x, x.dtype())?, stand_in(a, x.dtype())?, third.stand_in(x.dtype())?],
        third,
        gain,
        scale: scale as f32,
        dropout,
        keep_h: b.track_op() && !recompute,
        h: OnceLock::new(),
    };
    x.apply_op3(a, &input, op)
}

/// magnitude / ‖W + scale · B A‖ by rows, in f32: from f32 factors as they are.
fn gain(w: &Tensor, a: &Tensor, b: &Tensor, scale: f32, magnitude: &Tensor) -> Result<Tensor> {
    let f32_factors = a.dtype() != w.dtype() || b.dtype() != w.dtype();
    let dtype = if f32_factors { DType::F32 } else { w.dtype() };
    let tensors = [w.clone(), readable(a, dtype)?, readable(b, dtype)?, readable(magnitude, DType::F32)?];
    #[cfg(feature = "candle-cuda")]
    if w.device().is_cuda() {
        return gain_on::<super::cuda::Cuda>(&tensors, f32_factors, scale);
    }
    gain_on::<Cpu>(&tensors, f32_factors, scale)
}

fn gain_on<B: Backend>(tensors: &[Tensor; 4], f32_factors: bool, scale: f32) -> Result<Tensor> {
    let locked = tensors.each_ref().map(Tensor::storage_and_layout);
    let [w, a, b, magnitude] = locked.each_ref().map(|(storage, layout)| operand::<B>(storage, layout));
    let op = Gain { w: w?, a: a?, b: b?, f32_factors, scale, magnitude: magnitude? };
    let gain = by_dtype!(tensors[0].dtype(), B::gain, &op)?;
    Ok(Tensor::from_storage(B::wrap(gain), op.w.view.rows, BackpropOp::none(), false))
}

/// One application of the op: candle's graph holds x, a and the third input.
struct LoraOp {
    w: Tensor,
    third: Third,
    /// N elements of f32.
    gain: Option<Tensor>,
    scale: f32,
    dropout: Option<Dropout>,
    /// For the inputs of the graph.
    stand_ins: [Option<Tensor>; 3],
    keep_h: bool,
    /// What forward keeps for backward, which may come more than once.
    h: OnceLock<Tensor>,
}

/// A tensor that lies beside the graph, its storage locked.
fn locked<'a, B: Backend>(
    beside: &'a Option<(impl Deref<Target = Storage>, &Layout)>,
) -> Result<Option<Operand<'a, B::Storage>>> {
    beside.as_ref().map(|(storage, layout)| operand::<B>(storage, layout)).transpose()
}

fn no_b() -> CandleError {
    CandleError::Msg(format!("{NAME}: no B"))
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
        let [b, bias, gain] =
            [&self.third.b, &self.third.bias, &self.gain].map(|beside| beside.as_ref().map(Tensor::storage_and_layout));
        let part = |part: Part, beside| if self.third.is(part) { input(2).map(Some) } else { locked::<B>(beside) };
        let op = Forward {
            x: input(0)?,
            w: operand::<B>(&w, w_layout)?,
            a: input(1)?,
            b: part(Part::B, &b)?.ok_or_else(no_b)?,
            bias: part(Part::Bias, &bias)?,
            gain: locked::<B>(&gain)?,
            scale: self.scale,
            dropout: self.dropout,
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

    fn backward<B: Backend>(&self, inputs: [&Tensor; 3], y: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let [x, a, third] = inputs;
        let read = |at: usize| self.stand_ins[at].as_ref().unwrap_or(inputs[at]).storage_and_layout();
        let precision = |tensor: &Tensor| {
            let f32 = tensor.dtype() != self.w.dtype();
            tensor.track_op().then_some(if f32 { Precision::F32 } else { Precision::Storage })
        };
        let (xs, ws, a_s, thirds) = (read(0), self.w.storage_and_layout(), read(1), read(2));
        let (dys, ys) = (dy.storage_and_layout(), y.storage_and_layout());
        let Third { b, bias, magnitude, .. } = &self.third;
        let [bs, biases, magnitudes, gains] =
            [b, bias, magnitude, &self.gain].map(|beside| beside.as_ref().map(Tensor::storage_and_layout));
        let part = |part: Part, beside| {
            if self.third.is(part) { operand::<B>(&thirds.0, thirds.1).map(Some) } else { locked::<B>(beside) }
        };
        let (w, ad) = (operand::<B>(&ws.0, ws.1)?, operand::<B>(&a_s.0, a_s.1)?);
        let b = part(Part::B, &bs)?.ok_or_else(no_b)?;
        let x_operand = operand::<B>(&xs.0, xs.1)?;
        let wanted = precision(third);
        let db = wanted.filter(|_| self.third.has(Part::B));
        let magnitude =
            part(Part::Magnitude, &magnitudes)?.filter(|_| wanted.is_some() && self.third.has(Part::Magnitude));
        let bias = part(Part::Bias, &biases)?;
        let y = operand::<B>(&ys.0, ys.1)?;
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
            gain: locked::<B>(&gains)?,
            scale: self.scale,
            dropout: self.dropout,
            dx: x.track_op(),
            da: precision(a),
            db,
            dbias: wanted.filter(|_| self.third.has(Part::Bias)),
            dm: magnitude.map(|magnitude| OfMagnitude { y, bias, magnitude }),
        };
        let gradients = by_dtype!(self.w.dtype(), B::backward, &op)?;
        let tensor = |gradient: Option<B::Storage>, shape: Shape| {
            gradient.map(|gradient| Tensor::from_storage(B::wrap(gradient), shape, BackpropOp::none(), false))
        };
        let (n, r) = (w.view.rows, ad.view.rows);
        let (db, dbias) = (tensor(gradients.db, Shape::from((n, r))), tensor(gradients.dbias, Shape::from(n)));
        let dm = tensor(gradients.dm, Shape::from(n)).map(|dm| dm.to_dtype(third.dtype())).transpose()?;
        let parts: Vec<Tensor> = [db, dbias, dm].into_iter().flatten().collect();
        let third = match &parts[..] {
            [] => None,
            [one] => Some(one.clone()),
            several => {
                let flat = several.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
                Some(Tensor::cat(&flat, 0)?)
            }
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
        let Self { scale, dropout, .. } = *self;
        let op = Forward { x, w, a, b, bias: None, gain: None, scale, dropout, keep_h: true };
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
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dy, y) = (addressable(dy)?, addressable(y)?);
        #[cfg(feature = "candle-cuda")]
        let gradients = if dy.device().is_cuda() {
            self.backward::<super::cuda::Cuda>([x, a, b], &y, &dy)
        } else {
            self.backward::<Cpu>([x, a, b], &y, &dy)
        };
        #[cfg(not(feature = "candle-cuda"))]
        let gradients = self.backward::<Cpu>([x, a, b], &y, &dy);
        let [dx, da, db] = gradients?;
        Ok((dx, da, db))
    }
}
