//! The op as it is called.

use std::sync::{Arc, OnceLock};

use candle_core::op::BackpropOp;
use candle_core::{DType, Error as CandleError, Result, Tensor};

use super::backend::{Backend, Gain};
use super::cpu::Cpu;
use super::modes::Passes;
use super::node::{NAME, Node, Own, by_dtype, operand};
use super::routes::Routes;
use super::split::Split;
use super::third::{Third, below, readable, stand_in};
use super::view::addressable;
use super::{check, wrap};
use crate::error::Error;

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

/// How an application of the op departs from that of [`lora`], which drops nothing, keeps h, and has one adapter without a magnitude.
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
    /// Many adapters in one batch, in the same launches: `a` holds the A of all of them below each other and `b` their B side by side,
    /// and each row of x goes through its own, times its scale, or through none. So da and db of an adapter are sums over its own rows.
    /// R is at most [`MAX_ROUTED_RANK`](crate::MAX_ROUTED_RANK), and an infinity or NaN in one adapter may reach rows of others
    /// ([`Variant::routes`](crate::Variant::routes)). Not beside a magnitude.
    /// [`LoraLinear::bank`](super::LoraLinear::bank) lays adapters so.
    pub routes: Option<&'a Routes>,
    /// Read f32 `a` and `b` over a 16-bit x as they are, at more than 16 bits, as PEFT does by default: y and dx have one rounding,
    /// da and db nearly the precision of f32 ([`Forward`](crate::Forward) says how exact they are, and what of it remains beside a
    /// magnitude). h takes twice the columns. Where one of the two is of x's type it is widened; where both are nothing changes.
    pub full_precision: bool,
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
/// `scale` is α/r or α/√r. f32 adapters and biases over a 16-bit x are rounded to its type, or adapters read as they are
/// ([`Training::full_precision`]); their gradients are the f32 sums. Only the gradients of tracked inputs are computed, and h
/// (M × R, in x's type) is kept for that of `b`. What is tracked of `b`, `bias` and a magnitude is copied behind each other where it is more than one of them, at most N · (R + 2) elements:
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

/// As [`lora`], with dropout, without keeping h, with many adapters in one batch, or with a magnitude, which gets its gradient, too.
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
/// As [`lora`]; [`Probability`](crate::Error::Probability); [`Exclusive`](crate::Error::Exclusive) for a magnitude beside dropout or
/// routes; [`Dimension`](crate::Error::Dimension) for routes of another number of rows than x has, and
/// [`TooLarge`](crate::Error::TooLarge) for those of more ranks than `a` has.
pub fn lora_train(
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    bias: Option<&Tensor>,
    training: Training<'_>,
) -> Result<Tensor> {
    let Training { dropout, recompute, magnitude, routes, full_precision } = training;
    let projection = Projection { w, a, b, scale, bias, magnitude };
    let pass = Pass { masks: dropout.map(Masks::Of), recompute, full_precision };
    one(apply(x, &[projection], routes, pass)?)
}

/// One of the projections of [`lora_shared`]; all as in [`lora_train`].
#[derive(Clone, Copy, Debug)]
pub struct Projection<'a> {
    /// N × K, frozen: its own, or some rows of one that several projections share.
    pub w: &'a Tensor,
    /// R × K.
    pub a: &'a Tensor,
    /// N × R.
    pub b: &'a Tensor,
    /// α/r or α/√r.
    pub scale: f64,
    /// N.
    pub bias: Option<&'a Tensor>,
    /// N: [`Training::magnitude`].
    pub magnitude: Option<&'a Tensor>,
}

/// What all projections of [`lora_shared`] have in common; as in [`Training`].
#[derive(Clone, Copy, Debug, Default)]
pub struct SharedTraining {
    /// One mask for all projections; PEFT draws one for each.
    pub dropout: Option<Dropout>,
    /// [`Training::recompute`].
    pub recompute: bool,
    /// [`Training::full_precision`].
    pub full_precision: bool,
}

/// As [`lora_train`] for several projections that share x, as q, k and v of attention do: N, R and scale are each one's own. One
/// launch forward reads x as if for one, and one backward sums dx; y of each is a tensor of its own, and none is copied.
///
/// The A of all are copied below each other, ΣR · K elements, and so is what is tracked of `b`, bias and magnitude behind each other:
/// candle's graph has room for three inputs. Backward wants the y of every projection in the loss: one that is not has a gradient of
/// zeros made for it. What `backward` of another op computes by a backward of its own must not go through the y of these
/// projections: each would take the other's gradients.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use fused_lora::candle::{Projection, SharedTraining, lora_shared};
///
/// let random = |rows: usize, cols: usize| Tensor::randn(0f32, 1.0, (rows, cols), &Device::Cpu);
/// let (x, w) = (random(5, 8)?, random(12, 8)?); // W of gate and up, 6 rows of each
/// let (halves, a, b) = ([w.narrow(0, 0, 6)?, w.narrow(0, 6, 6)?], Var::from_tensor(&random(2, 8)?)?, random(6, 2)?);
/// let projection = |w| Projection { w, a: &a, b: &b, scale: 2.0, bias: None, magnitude: None };
/// let [gate, up] = lora_shared(&x, [projection(&halves[0]), projection(&halves[1])], SharedTraining::default())?;
/// let gradients = (gate.silu()? * up)?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&a).map(Tensor::dims), Some(&[2, 8][..]));
/// # candle_core::Result::Ok(())
/// ```
///
/// # Errors
/// As [`lora_train`], arguments named with the number of their projection where there are several (“w of projection 1”);
/// [`Projections`](crate::Error::Projections) for none and for more than
/// [`MAX_PROJECTIONS`](crate::raw::MAX_PROJECTIONS).
pub fn lora_shared<const P: usize>(
    x: &Tensor,
    projections: [Projection<'_>; P],
    training: SharedTraining,
) -> Result<[Tensor; P]> {
    let SharedTraining { dropout, recompute, full_precision } = training;
    let pass = Pass { masks: dropout.map(Masks::Of), recompute, full_precision };
    let ys = apply(x, &projections, None, pass)?;
    ys.try_into().map_err(|ys: Vec<_>| wrap(Error::Projections { got: ys.len(), limit: P }))
}

/// The y of one projection.
pub(super) fn one(ys: Vec<Tensor>) -> Result<Tensor> {
    let [y] = <[Tensor; 1]>::try_from(ys).map_err(|ys| wrap(Error::Projections { got: ys.len(), limit: 1 }))?;
    Ok(y)
}

/// What all projections have in common.
pub(super) struct Pass<'a> {
    pub(super) masks: Option<Masks<'a>>,
    pub(super) recompute: bool,
    pub(super) full_precision: bool,
}

/// Where dropout comes from.
#[derive(Clone, Copy)]
pub(super) enum Masks<'a> {
    Of(Dropout),
    /// Of another pass, which is counted when nothing more can be refused.
    Next(&'a Passes),
}

impl Masks<'_> {
    pub(super) fn p(self) -> f32 {
        match self {
            Self::Of(dropout) => dropout.p,
            Self::Next(passes) => passes.p,
        }
    }

    fn dropout(self) -> Dropout {
        match self {
            Self::Of(dropout) => dropout,
            Self::Next(passes) => passes.next(),
        }
    }
}

/// As [`lora_shared`]; with routes for one projection.
pub(super) fn apply(
    x: &Tensor,
    projections: &[Projection<'_>],
    routes: Option<&Routes>,
    pass: Pass<'_>,
) -> Result<Vec<Tensor>> {
    let Pass { masks, recompute, full_precision } = pass;
    check::projections(x, projections, masks.map(Masks::p)).map_err(wrap)?;
    if let Some(routes) = routes {
        check::routes(x, projections, routes).map_err(wrap)?;
    }
    let used = projections.iter().flat_map(|of| [of.w, of.a, of.b].into_iter().chain(of.bias).chain(of.magnitude));
    let locations = used.map(|tensor| tensor.device().location()).chain(routes.map(Routes::location));
    for rhs in locations {
        let lhs = x.device().location();
        if lhs != rhs {
            return Err(CandleError::DeviceMismatchBinaryOp { lhs, rhs, op: NAME }.bt());
        }
    }
    let own = |of: &Projection<'_>| {
        let (w, scale) = (addressable(of.w)?, of.scale as f32);
        let gain = of.magnitude.map(|magnitude| gain(&w, of.a, of.b, scale, magnitude)).transpose()?;
        Ok(Own { w, gain, scale })
    };
    let own = projections.iter().map(own).collect::<Result<Vec<_>>>()?;
    let are_f32 = projections.iter().any(|of| [of.a, of.b].iter().any(|factor| factor.dtype() == DType::F32));
    let f32_factors = full_precision && are_f32 && x.dtype() != DType::F32;
    let factors = if f32_factors { DType::F32 } else { x.dtype() };
    let (a, third) = (below(projections)?, Third::new(projections, x.dtype(), factors)?);
    let input = third.input.clone();
    let split = (own.len() > 1).then(Arc::<Split>::default);
    let stand_ins = [stand_in(x, x.dtype())?, stand_in(&a, factors)?, third.stand_in(x.dtype(), factors)?];
    let node = Node {
        stand_ins,
        own,
        third,
        // Beside a magnitude its probability is 0.
        dropout: masks.map(Masks::dropout).filter(|_| projections.iter().all(|of| of.magnitude.is_none())),
        routes: routes.cloned(),
        keep_h: projections.iter().any(|of| of.b.track_op()) && !recompute,
        f32_factors,
        h: OnceLock::new(),
        split: split.clone(),
    };
    let y = x.apply_op3(&a, &input, node)?;
    match split {
        Some(split) => projections.iter().enumerate().map(|(at, of)| Split::output(&split, at, &y, x, of.w)).collect(),
        None => Ok(vec![y]),
    }
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
