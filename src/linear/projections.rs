//! Layers that share x, as q, k and v of attention do.

use std::array;

use super::sharing::{Part, Sharing, Stack};
use super::{Backend, LoraLinear, Magnitude, Pass, Rejected, Training, elements};
use crate::error::{Error, Result};
use crate::raw::{MAX_PROJECTIONS, named};
use crate::{Accumulate, Element, LoraShape, Matrix, MatrixMut, split_columns};

/// Layers that share x, as q, k and v of attention or gate and up of a feed-forward block do: forward of all in one launch, which
/// reads x as if for one, and backward in one, which sums dx.
///
/// Each layer has its own W, N, bias and adapters, and whatever a [`LoraLinear`] can, through [`layers`](Self::layers) and
/// [`layers_mut`](Self::layers_mut). One launch reads the A of all as one matrix, so that the group holds a copy of those that take
/// part. [`refresh`](Self::refresh) makes it anew: after `layers_mut` has changed which adapters take part, or their factors.
/// Until then the group computes nothing.
///
/// y of each layer has the bits of the layer alone wherever the backend chooses the same tile shape, as the CPU does. dx is one sum
/// over all layers, rounded once.
///
/// ```
/// # use fused_lora::{Matrix, MatrixMut, cpu::Cpu};
/// use fused_lora::linear::{Adapter, LoraLinear, LoraProjections, ProjectionGradients, Scaling};
///
/// let layer = |n: usize, rank: usize| -> fused_lora::Result<_> {
///     let mut layer = LoraLinear::upload(Cpu, &vec![1.0f32; n * 2], None, n, 2)?; // N × K
///     let (a, b) = (vec![0.5; rank * 2], vec![2.0; n * rank]);
///     layer.add("default", Adapter::upload(&Cpu, rank, Scaling::Fixed(1.0), &a, &b)?)?;
///     layer.activate("default")?;
///     Ok(layer)
/// };
/// let qkv = LoraProjections::new([layer(4, 2)?, layer(2, 1)?, layer(2, 0)?])?;
///
/// let x = [1.0f32; 3 * 2]; // three tokens
/// let ([q, k, v], pass) = qkv.forward_train(Matrix::new(&x[..], 3, 2))?;
/// assert_eq!((q[0], k[0], v[0]), (6.0, 4.0, 2.0));
///
/// let (mut dx, mut da) = ([0.0; 3 * 2], [0.0; 3 * 2]); // da of all: two rows of q's, one of k's
/// let gradients = ProjectionGradients {
///     dx: Some(MatrixMut::new(&mut dx[..], 3, 2)),
///     da: Some(MatrixMut::new(&mut da[..], qkv.rank(), 2)),
///     ..ProjectionGradients::default()
/// };
/// qkv.backward(&pass, [Matrix::new(&q[..], 3, 4), Matrix::new(&k[..], 3, 2), Matrix::new(&v[..], 3, 2)], gradients)?;
/// assert_eq!((dx[0], da[0], da[4]), (92.0, 144.0, 48.0));
/// # Ok::<(), fused_lora::Error>(())
/// ```
pub struct LoraProjections<B: Backend, T: Element, const P: usize> {
    backend: B,
    layers: [LoraLinear<B, T>; P],
    stack: Stack<B, T>,
}

/// Which gradients [`LoraProjections::backward`] computes, and where they go. The default is none.
pub struct ProjectionGradients<'a, B: Backend, T: Element, const P: usize> {
    /// M × K, in the storage type: the sum over all layers.
    pub dx: Option<MatrixMut<'a, B::Write<T>>>,
    /// ΣR × K, in f32: those of the layers below each other, as many rows of each as its adapter has ranks.
    pub da: Option<MatrixMut<'a, B::Write<f32>>>,
    /// Of each layer.
    pub layers: [LayerGradients<'a, B, T>; P],
    /// Which of them add to what is there; of db, dbias and dm those of all layers.
    pub accumulate: Accumulate,
}

/// The gradients that each of several layers has by itself. The default is none.
pub struct LayerGradients<'a, B: Backend, T: Element> {
    /// N × R, in f32.
    pub db: Option<MatrixMut<'a, B::Write<f32>>>,
    /// 1 × N, in f32: Σ dy, the gradient of the bias. That of a bias on B is the adapter's scale times this.
    pub dbias: Option<MatrixMut<'a, B::Write<f32>>>,
    /// Of DoRA's magnitude.
    pub dm: Option<Magnitude<'a, B, T>>,
}

impl<B: Backend, T: Element> Default for LayerGradients<'_, B, T> {
    fn default() -> Self {
        Self { db: None, dbias: None, dm: None }
    }
}

impl<B: Backend, T: Element, const P: usize> Default for ProjectionGradients<'_, B, T, P> {
    fn default() -> Self {
        let layers = array::from_fn(|_| LayerGradients::default());
        Self { dx: None, da: None, layers, accumulate: Accumulate::default() }
    }
}

impl<B: Backend, T: Element, const P: usize> LoraProjections<B, T, P> {
    /// Layers of the same K on the same backend: on a GPU, on clones of one `cuda::Queue`. Copies the A of the adapters that take
    /// part.
    ///
    /// # Errors
    /// [`Error::Projections`] for no layer, and for more than [`MAX_PROJECTIONS`]; those of
    /// [`refresh`](Self::refresh). The layers come back with the error.
    #[allow(clippy::result_large_err, reason = "what was passed comes back")]
    pub fn new(layers: [LoraLinear<B, T>; P]) -> Result<Self, Rejected<[LoraLinear<B, T>; P]>> {
        let make = || {
            let refused = Error::Projections { got: P, limit: MAX_PROJECTIONS };
            let first = layers.first().filter(|_| P <= MAX_PROJECTIONS).ok_or(refused)?;
            let (backend, layers) = (first.backend.clone(), layers.each_ref());
            check_columns(&layers)?;
            let stack = Stack::new(&backend, &layers)?;
            Ok((backend, stack))
        };
        match make() {
            Ok((backend, stack)) => Ok(Self { backend, layers, stack }),
            Err(error) => Err(Rejected { error, value: layers }),
        }
    }

    /// The layers.
    pub fn layers(&self) -> &[LoraLinear<B, T>; P] {
        &self.layers
    }

    /// The layers, to be changed; [`refresh`](Self::refresh) afterwards.
    pub fn layers_mut(&mut self) -> &mut [LoraLinear<B, T>; P] {
        &mut self.layers
    }

    /// The layers, given away.
    pub fn into_layers(self) -> [LoraLinear<B, T>; P] {
        self.layers
    }

    /// ΣR of the adapters that take part, as of the last [`refresh`](Self::refresh).
    pub fn rank(&self) -> usize {
        self.stack.ranks().sum()
    }

    /// Copies the A of the adapters that take part, where they are others or have changed since: a launch for each, and an
    /// allocation where ranks have changed. Another number of ranks takes no part while adapters are merged.
    ///
    /// # Errors
    /// [`Error::Dimension`] for a layer of another K than the first's; [`Error::State`] for a layer on another backend than the group's,
    /// where some adapters that take part are at full precision and others are not, and for an adapter whose own copies could not be renewed; those of [`Backend::alloc`] and [`Backend::round`]. The group computes
    /// nothing then until this has succeeded.
    pub fn refresh(&mut self) -> Result<()> {
        let layers = self.layers.each_ref();
        check_columns(&layers)?;
        self.stack.refresh(&self.backend, &layers)
    }

    /// Makes the backend's workspace large enough for forward and backward of up to `tokens` rows of x with the adapters that take
    /// part.
    ///
    /// # Errors
    /// Those of [`Backend::reserve`].
    pub fn reserve(&self, tokens: usize) -> Result<()> {
        let r = self.rank();
        let reserve = |n, k, r| self.backend.reserve(T::DTYPE, LoraShape { m: tokens, n, k, r });
        self.layers.iter().try_for_each(|layer| reserve(layer.n, layer.k, r))?;
        match self.layers.first().filter(|_| self.stack.is_full()) {
            // Halves are those of all layers, whose ranks begin with a group of their own.
            Some(first) => {
                let columns = self.layers.iter().map(|layer| layer.n).sum();
                reserve(columns, first.k, self.stack.ranks().map(|r| split_columns(r) / 2).sum())
            }
            None => Ok(()),
        }
    }

    /// For each layer y = x Wᵀ + s · (x Aᵀ) Bᵀ (+ bias), as [`LoraLinear::forward`], in new buffers of M × N. Layers may have
    /// adapters, several of them, merged ones or none.
    ///
    /// # Errors
    /// Those of [`forward_into`](Self::forward_into) and of [`Backend::alloc`].
    pub fn forward(&self, x: Matrix<'_, B::Read<T>>) -> Result<[B::Buffer<T>; P]> {
        self.written(x, |ys| self.forward_into(x, ys)).map(|(ys, ())| ys)
    }

    /// As [`forward`](Self::forward), into `ys`.
    ///
    /// # Errors
    /// Those of the backend's `forward_shared`, which name an argument of a layer with its number (“y of projection 1”);
    /// [`Error::State`] when an adapter that takes part is not the one that was copied ([`refresh`](Self::refresh)), or its own
    /// copies could not be renewed. Nothing is written then.
    pub fn forward_into(&self, x: Matrix<'_, B::Read<T>>, ys: [MatrixMut<'_, B::Write<T>>; P]) -> Result<()> {
        self.sharing(&self.layers.each_ref()).forward(x, ys)
    }

    /// As [`forward`](Self::forward) with at most one active adapter in each layer, keeping what [`backward`](Self::backward) needs.
    ///
    /// # Errors
    /// As [`forward_train_with_into`](Self::forward_train_with_into), and those of [`Backend::alloc`].
    #[allow(clippy::type_complexity, reason = "y of each and the pass")]
    pub fn forward_train<'a>(&self, x: Matrix<'a, B::Read<T>>) -> Result<([B::Buffer<T>; P], Pass<'a, B, T>)> {
        self.forward_train_with(x, Training::default())
    }

    /// As [`forward_train`](Self::forward_train), with dropout, or without keeping h. One mask is for all layers; PEFT draws one for
    /// each.
    ///
    /// # Errors
    /// As [`forward_train_with_into`](Self::forward_train_with_into), and those of [`Backend::alloc`].
    #[allow(clippy::type_complexity, reason = "y of each and the pass")]
    pub fn forward_train_with<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        training: Training<'a, B>,
    ) -> Result<([B::Buffer<T>; P], Pass<'a, B, T>)> {
        self.written(x, |ys| self.forward_train_with_into(x, ys, training))
    }

    /// As [`forward_train_with`](Self::forward_train_with), into `ys`. Allocates [h](Pass::h) where it is kept.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into); [`Error::Probability`]; [`Error::State`], which says in which layer, while adapters
    /// are merged, when several are active, and for dropout beside an adapter that has a magnitude (DoRA).
    pub fn forward_train_with_into<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        ys: [MatrixMut<'_, B::Write<T>>; P],
        training: Training<'a, B>,
    ) -> Result<Pass<'a, B, T>> {
        self.sharing(&self.layers.each_ref()).forward_train(x, ys, training)
    }

    /// The gradients at `dys` (M × N of each layer) of the pass, with the adapters that it was made with, which must be those that
    /// were copied last.
    ///
    /// # Errors
    /// Those of the backend's `backward_shared`, which name an argument of a layer with its number; [`Error::State`], which says in which
    /// layer, when it is not the pass's, when an adapter or W has changed since, or another adapter was copied, or with dm the
    /// bias has changed, when dm is asked of an adapter without a magnitude, and while adapters are merged. Nothing is written then,
    /// and the pass can be used again. Where h is computed again, [`Backend::forward_shared`] and [`Backend::alloc`] can fail as
    /// well.
    pub fn backward(
        &self,
        pass: &Pass<'_, B, T>,
        dys: [Matrix<'_, B::Read<T>>; P],
        gradients: ProjectionGradients<'_, B, T, P>,
    ) -> Result<()> {
        let ProjectionGradients { dx, da, layers, accumulate } = gradients;
        let part = |(dy, LayerGradients { db, dbias, dm })| Part { dy, db, dbias, dm };
        self.sharing(&self.layers.each_ref()).backward(pass, dx, da, dys.into_iter().zip(layers).map(part), accumulate)
    }

    fn sharing<'s, 'a>(&'a self, layers: &'s [&'a LoraLinear<B, T>; P]) -> Sharing<'s, 'a, B, T> {
        Sharing { backend: &self.backend, layers, stack: Some(&self.stack), routed: None }
    }

    /// Buffers for what `write` writes, with what it returns.
    fn written<V>(
        &self,
        x: Matrix<'_, B::Read<T>>,
        write: impl FnOnce([MatrixMut<'_, B::Write<T>>; P]) -> Result<V>,
    ) -> Result<([B::Buffer<T>; P], V)> {
        let output = |layer: &LoraLinear<B, T>| {
            layer.check_input(x)?;
            self.backend.alloc(elements("the number of elements of y", x.rows, layer.n)?)
        };
        let ys = self.layers.iter().map(output).collect::<Result<Vec<_>>>()?;
        let mut ys: [B::Buffer<T>; P] =
            ys.try_into().map_err(|ys: Vec<_>| Error::Projections { got: ys.len(), limit: P })?;
        let mut layers = self.layers.iter();
        let value = write(
            ys.each_mut().map(|y| MatrixMut::new(B::write(y), x.rows, layers.next().map_or(0, |layer| layer.n))),
        )?;
        Ok((ys, value))
    }
}

/// One K.
fn check_columns<B: Backend, T: Element>(layers: &[&LoraLinear<B, T>]) -> Result<()> {
    let expected = layers.first().map_or(0, |layer| layer.k);
    match layers.iter().position(|layer| layer.k != expected) {
        Some(at) => {
            let (arg, got) = (named("w", at, layers.len()), layers[at].k);
            Err(Error::Dimension { arg, axis: "columns", got, expected })
        }
        None => Ok(()),
    }
}
