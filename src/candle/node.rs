//! A node of candle's graph: three inputs, the frozen tensors beside them.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Error as CandleError, Layout, Result, Shape, Storage, Tensor,
};

use super::backend::{
    self as gradient, Backend, Backward, BackwardProjection, Forward, ForwardProjection, OfMagnitude, Operand,
    Precision,
};
use super::cpu::Cpu;
use super::op::Dropout;
use super::routes::Routes;
use super::split::{Arrived, Split};
use super::third::{Part, Third};
use super::view::view;

pub(super) const NAME: &str = "fused-lora";

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
pub(super) use by_dtype;

/// Runs `$call::<T, A>`, with `A` f32 where factors are and the type of the others where not.
macro_rules! by_dtypes {
    ($dtype:expr, $f32_factors:expr, $backend:ident::$call:ident, $op:expr) => {
        match ($dtype, $f32_factors) {
            (DType::F32, _) => $backend::$call::<f32, f32>($op),
            (DType::F16, false) => $backend::$call::<half::f16, half::f16>($op),
            (DType::F16, true) => $backend::$call::<half::f16, f32>($op),
            (DType::BF16, false) => $backend::$call::<half::bf16, half::bf16>($op),
            (DType::BF16, true) => $backend::$call::<half::bf16, f32>($op),
            (dtype, _) => Err(CandleError::UnsupportedDTypeForOp(dtype, NAME).bt()),
        }
    };
}

/// One application of the op: candle's graph holds x, A of all projections and the third input.
pub(super) struct Node {
    pub(super) own: Vec<Own>,
    pub(super) third: Third,
    pub(super) dropout: Option<Dropout>,
    pub(super) routes: Option<Routes>,
    /// For the inputs of the graph.
    pub(super) stand_ins: [Option<Tensor>; 3],
    pub(super) keep_h: bool,
    /// A and B are read in f32 beside a W of 16 bits.
    pub(super) f32_factors: bool,
    /// What forward keeps for backward, which may come more than once.
    pub(super) h: OnceLock<Tensor>,
    /// Where there are several projections.
    pub(super) split: Option<Arc<Split>>,
}

/// What a projection has that no gradient is asked of.
pub(super) struct Own {
    pub(super) w: Tensor,
    /// N elements of f32.
    pub(super) gain: Option<Tensor>,
    pub(super) scale: f32,
}

/// The shape of an activation with other features.
pub(super) fn features(dims: &[usize], features: usize) -> Shape {
    let tokens = dims.split_last().map_or(&[][..], |(_, tokens)| tokens);
    Shape::from([tokens, &[features]].concat())
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

pub(super) fn operand<'a, B: Backend>(
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

impl Node {
    /// The inputs of the graph come as storages that candle has locked; locking them again could wait forever for a writer
    /// that waits for us.
    fn forward<B: Backend>(&self, inputs: [(&B::Storage, &Layout); 3]) -> Result<(B::Storage, Shape)> {
        let stand_ins = self.stand_ins.each_ref().map(|tensor| tensor.as_ref().map(Tensor::storage_and_layout));
        let input = |at: usize| match &stand_ins[at] {
            Some((storage, layout)) => operand::<B>(storage, layout),
            None => within(inputs[at].0, inputs[at].1),
        };
        let guards = self.own.iter().zip(&self.third.beside).map(|(own, beside)| {
            let beside = [&beside.b, &beside.bias, &own.gain].map(|it| it.as_ref().map(Tensor::storage_and_layout));
            (own.w.storage_and_layout(), beside)
        });
        let guards: Vec<_> = guards.collect();
        let mut projections = Vec::with_capacity(guards.len());
        for (at, (((w, layout), [b, bias, gain]), own)) in guards.iter().zip(&self.own).enumerate() {
            let part =
                |part: Part, beside| if self.third.is(at, part) { input(2).map(Some) } else { locked::<B>(beside) };
            projections.push(ForwardProjection {
                w: operand::<B>(w, layout)?,
                b: part(Part::B, b)?.ok_or_else(no_b)?,
                bias: part(Part::Bias, bias)?,
                gain: locked::<B>(gain)?,
                scale: own.scale,
            });
        }
        let Self { dropout, keep_h, f32_factors, ref routes, .. } = *self;
        let op =
            Forward { x: input(0)?, a: input(1)?, f32_factors, projections, dropout, routes: routes.as_ref(), keep_h };
        let mut outputs = by_dtypes!(self.dtype(), f32_factors, B::forward, &op)?;
        if let Some(h) = outputs.h {
            let shape = (op.x.view.rows, op.columns_of_h());
            let _ = self.h.set(Tensor::from_storage(B::wrap(h), shape, BackpropOp::none(), false));
        }
        if let Some(split) = &self.split {
            split.computed(outputs.ys.into_iter().map(B::wrap));
            let shape = Split::token();
            return Ok((inputs[0].0.device().zeros_impl(&shape, DType::F32)?, shape));
        }
        match outputs.ys.pop() {
            Some(y) => Ok((y, features(inputs[0].1.dims(), op.projections[0].w.view.rows))),
            None => candle_core::bail!("{NAME}: no projection"),
        }
    }

    fn backward<B: Backend>(&self, inputs: [&Tensor; 3], arrived: &[Arrived]) -> Result<[Option<Tensor>; 3]> {
        let [x, a, third] = inputs;
        let read = |at: usize| self.stand_ins[at].as_ref().unwrap_or(inputs[at]).storage_and_layout();
        let (xs, a_s, thirds) = (read(0), read(1), read(2));
        let guards =
            self.own.iter().zip(&self.third.beside).zip(arrived).map(|((own, beside), Arrived { dy, y, .. })| {
                let beside = [&beside.b, &beside.bias, &beside.magnitude, &own.gain];
                let beside = beside.map(|it| it.as_ref().map(Tensor::storage_and_layout));
                ([dy, y, &own.w].map(Tensor::storage_and_layout), beside)
            });
        let guards: Vec<_> = guards.collect();
        let wanted = self.precision(third);
        let mut projections = Vec::with_capacity(guards.len());
        for (at, (([dy, y, w], [b, bias, magnitude, gain]), own)) in guards.iter().zip(&self.own).enumerate() {
            let part = |part: Part, beside| match self.third.is(at, part) {
                true => operand::<B>(&thirds.0, thirds.1).map(Some),
                false => locked::<B>(beside),
            };
            let wanted = |part| wanted.filter(|_| self.third.has(at, part));
            // That of a y that takes no part is zero; computed, it could be a NaN.
            let has_dm = arrived[at].is_used && wanted(Part::Magnitude).is_some();
            let magnitude = part(Part::Magnitude, magnitude)?.filter(|_| has_dm);
            let (y, bias) = (operand::<B>(&y.0, y.1)?, part(Part::Bias, bias)?);
            projections.push(BackwardProjection {
                dy: operand::<B>(&dy.0, dy.1)?,
                w: operand::<B>(&w.0, w.1)?,
                b: part(Part::B, b)?.ok_or_else(no_b)?,
                gain: locked::<B>(gain)?,
                scale: own.scale,
                db: wanted(Part::B),
                dbias: wanted(Part::Bias),
                dm: magnitude.map(|magnitude| OfMagnitude { y, bias, magnitude }),
            });
        }
        let (x_operand, a_operand) = (operand::<B>(&xs.0, xs.1)?, operand::<B>(&a_s.0, a_s.1)?);
        let again = match self.h.get() {
            None if projections.iter().any(|of| of.db.is_some()) => {
                Some(self.middle::<B>(x_operand, a_operand, &projections)?)
            }
            _ => None,
        };
        let hs = self.h.get().or(again.as_ref()).map(Tensor::storage_and_layout);
        let h = hs.as_ref().map(|(storage, layout)| operand::<B>(storage, layout)).transpose()?;
        let Self { dropout, f32_factors, ref routes, .. } = *self;
        let (dx, da) = (x.track_op(), self.precision(a));
        let op = Backward { a: a_operand, x: x_operand, h, projections, dropout, routes: routes.as_ref(), dx, da };
        let gradients = by_dtypes!(self.dtype(), f32_factors, B::backward, &op)?;
        let tensor = |gradient: Option<B::Storage>, shape: &Shape| {
            gradient.map(|gradient| Tensor::from_storage(B::wrap(gradient), shape, BackpropOp::none(), false))
        };
        let mut parts = Vec::new();
        for (at, (of, gradient::Own { db, dbias, dm })) in op.projections.iter().zip(gradients.projections).enumerate()
        {
            let (n, r) = (of.w.view.rows, of.b.view.cols);
            let dm = match tensor(dm, &Shape::from(n)) {
                Some(dm) => Some(dm.to_dtype(third.dtype())?),
                None if wanted.is_some() && self.third.has(at, Part::Magnitude) => {
                    Some(Tensor::zeros(n, third.dtype(), third.device())?)
                }
                None => None,
            };
            parts.extend([tensor(db, &Shape::from((n, r))), tensor(dbias, &Shape::from(n)), dm].into_iter().flatten());
        }
        let third = match &parts[..] {
            [] => None,
            [one] => Some(one.clone()),
            several => {
                let flat = several.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?;
                Some(Tensor::cat(&flat, 0)?)
            }
        };
        Ok([tensor(gradients.dx, x.shape()), tensor(gradients.da, a.shape()), third])
    }

    /// h where forward kept none: that of a forward pass to a few columns of y.
    fn middle<B: Backend>(
        &self,
        x: Operand<'_, B::Storage>,
        a: Operand<'_, B::Storage>,
        projections: &[BackwardProjection<'_, B::Storage>],
    ) -> Result<Tensor> {
        let projections = projections.iter().map(BackwardProjection::first_columns).collect();
        let Self { dropout, f32_factors, ref routes, .. } = *self;
        let op = Forward { x, a, f32_factors, projections, dropout, routes: routes.as_ref(), keep_h: true };
        match by_dtypes!(self.dtype(), f32_factors, B::forward, &op)?.h {
            Some(h) => {
                let shape = (x.view.rows, op.columns_of_h());
                Ok(Tensor::from_storage(B::wrap(h), shape, BackpropOp::none(), false))
            }
            None => candle_core::bail!("{NAME}: forward kept no h"),
        }
    }

    fn dtype(&self) -> DType {
        self.own[0].w.dtype()
    }

    /// Of the gradient of a tensor that is tracked.
    fn precision(&self, tensor: &Tensor) -> Option<Precision> {
        let f32 = tensor.dtype() != self.dtype();
        tensor.track_op().then_some(if f32 { Precision::F32 } else { Precision::Storage })
    }
}

impl CustomOp3 for Node {
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
        let arrived = match &self.split {
            None => vec![Arrived::new(y, dy)?],
            Some(split) => split.arrived(self.own.iter().map(|own| features(x.dims(), own.w.dims()[0])), x)?,
        };
        #[cfg(feature = "candle-cuda")]
        let gradients = if x.device().is_cuda() {
            self.backward::<super::cuda::Cuda>([x, a, b], &arrived)
        } else {
            self.backward::<Cpu>([x, a, b], &arrived)
        };
        #[cfg(not(feature = "candle-cuda"))]
        let gradients = self.backward::<Cpu>([x, a, b], &arrived);
        let [dx, da, db] = gradients?;
        Ok((dx, da, db))
    }
}
