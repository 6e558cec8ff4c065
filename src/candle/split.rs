//! Several outputs of one node, which candle's graph has not: the node's own output is a token without meaning, and each y is that of
//! a node behind it, which takes what the first one has computed.
//!
//! Backward comes to the nodes behind first. Each leaves its dy, and gives the token a gradient that owns it: candle adds these
//! up, and keeps the sum for as long as it computes with it. So what is left of a backward that failed is gone when the next one comes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, ThreadId};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

use super::node::{NAME, features};
use super::view::addressable;

/// What the nodes of one application hand each other.
#[derive(Default)]
pub(super) struct Split {
    /// y of each projection, until its node takes it.
    ys: Mutex<Vec<Option<Storage>>>,
    /// What has arrived in backward, of which there may be several at once.
    arriving: Mutex<Vec<(ThreadId, Weak<Left>)>>,
}

/// dy of a projection, with y.
#[derive(Clone)]
pub(super) struct Arrived {
    pub(super) dy: Tensor,
    pub(super) y: Tensor,
    /// The loss depends on y; if not, `dy` is zeros and `y` anything.
    pub(super) is_used: bool,
}

impl Arrived {
    pub(super) fn new(y: &Tensor, dy: &Tensor) -> Result<Self> {
        Ok(Self { dy: addressable(dy)?, y: addressable(y)?, is_used: true })
    }
}

struct Left {
    /// The projection.
    at: usize,
    arrived: Arrived,
}

/// Every entry is complete before it is stored.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Split {
    /// The shape of what the first node gives.
    pub(super) fn token() -> Shape {
        Shape::from(1)
    }

    pub(super) fn computed(&self, ys: impl Iterator<Item = Storage>) {
        *lock(&self.ys) = ys.map(Some).collect();
    }

    /// y of projection `at`, for the x and w that it is of.
    pub(super) fn output(split: &Arc<Self>, at: usize, token: &Tensor, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        let shape = features(x.dims(), w.dims()[0]);
        token.apply_op1(Output { at, shape, split: split.clone() })
    }

    fn take(&self, at: usize) -> Result<Storage> {
        match lock(&self.ys).get_mut(at).and_then(Option::take) {
            Some(y) => Ok(y),
            None => candle_core::bail!("{NAME}: y of projection {at} was taken before"),
        }
    }

    /// dy of every projection in this thread's backward; zeros of these shapes where the loss does not depend on y.
    pub(super) fn arrived(&self, shapes: impl Iterator<Item = Shape>, x: &Tensor) -> Result<Vec<Arrived>> {
        let thread = thread::current().id();
        let mut arriving = lock(&self.arriving);
        let left: Vec<_> =
            arriving.extract_if(.., |(of, _)| *of == thread).filter_map(|(_, left)| left.upgrade()).collect();
        drop(arriving);
        if left.is_empty() {
            candle_core::bail!("{NAME}: no gradient has arrived");
        }
        let of = |(at, shape): (usize, Shape)| match left.iter().find(|left| left.at == at) {
            Some(left) => Ok(left.arrived.clone()),
            None => {
                let zeros = Tensor::zeros(shape, x.dtype(), x.device())?;
                Ok(Arrived { y: zeros.clone(), dy: zeros, is_used: false })
            }
        };
        shapes.enumerate().map(of).collect()
    }
}

/// The node of one y.
struct Output {
    at: usize,
    shape: Shape,
    split: Arc<Split>,
}

impl CustomOp1 for Output {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.split.take(self.at)? {
            Storage::Cpu(y) => Ok((y, self.shape.clone())),
            _ => candle_core::bail!("{NAME}: y has left the CPU"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.split.take(self.at)? {
            Storage::Cuda(y) => Ok((y, self.shape.clone())),
            _ => candle_core::bail!("{NAME}: y has left the GPU"),
        }
    }

    fn bwd(&self, token: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let left = Arc::new(Left { at: self.at, arrived: Arrived::new(y, dy)? });
        let mut arriving = lock(&self.split.arriving);
        arriving.retain(|(_, left)| left.strong_count() != 0);
        arriving.push((thread::current().id(), Arc::downgrade(&left)));
        drop(arriving);
        token.apply_op1(Owner(left)).map(Some)
    }
}

/// A gradient of the token, which is nothing but the owner of what was left.
struct Owner(#[allow(dead_code, reason = "it owns")] Arc<Left>);

impl CustomOp1 for Owner {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, token: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((token.try_clone(layout)?, layout.shape().clone()))
    }

    fn cuda_fwd(&self, token: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((token.try_clone(layout)?, layout.shape().clone()))
    }
}
