//! Forward that keeps what backward needs, and backward.

use super::pass::Made;
use super::set::{Active, Named};
use super::sharing::{Part, Sharing};
use super::{Backend, LoraLinear, Operands, Pass, Training};
use crate::error::{Error, Result};
use crate::{Accumulate, Element, Matrix, MatrixMut};

/// Which gradients backward computes, and where they go. The default is none.
pub struct Gradients<'a, B: Backend, T: Element> {
    /// M × K, in the storage type.
    pub dx: Option<MatrixMut<'a, B::Write<T>>>,
    /// R × K, in f32.
    pub da: Option<MatrixMut<'a, B::Write<f32>>>,
    /// N × R, in f32.
    pub db: Option<MatrixMut<'a, B::Write<f32>>>,
    /// 1 × N, in f32: Σ dy, the gradient of the bias. That of a bias on B is the adapter's scale times this.
    pub dbias: Option<MatrixMut<'a, B::Write<f32>>>,
    /// Of DoRA's magnitude.
    pub dm: Option<Magnitude<'a, B, T>>,
    /// Which of them add to what is there.
    pub accumulate: Accumulate,
}

/// dm = Σ dy ∘ (y − bias) / magnitude, the gradient of DoRA's magnitude: what forward wrote is the only trace of the products that it
/// multiplied.
pub struct Magnitude<'a, B: Backend, T: Element> {
    /// M × N, what the forward pass wrote, which only the caller can know.
    pub y: Matrix<'a, B::Read<T>>,
    /// 1 × N, in f32.
    pub dm: MatrixMut<'a, B::Write<f32>>,
}

impl<B: Backend, T: Element> Default for Gradients<'_, B, T> {
    fn default() -> Self {
        Self { dx: None, da: None, db: None, dbias: None, dm: None, accumulate: Accumulate::default() }
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// As [`forward`](Self::forward) with at most one active adapter, keeping what [`backward`](Self::backward) needs.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::State`] while adapters are merged or several are active.
    #[allow(clippy::type_complexity, reason = "y and the pass")]
    pub fn forward_train<'a>(&self, x: Matrix<'a, B::Read<T>>) -> Result<(B::Buffer<T>, Pass<'a, B, T>)> {
        self.forward_train_with(x, Training::default())
    }

    /// As [`forward_train`](Self::forward_train), with dropout, or without keeping h.
    ///
    /// # Errors
    /// As [`forward_train`](Self::forward_train); [`Error::Probability`]; [`Error::State`] for dropout with an adapter that has a
    /// magnitude (DoRA).
    #[allow(clippy::type_complexity, reason = "y and the pass")]
    pub fn forward_train_with<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        training: Training<'a, B>,
    ) -> Result<(B::Buffer<T>, Pass<'a, B, T>)> {
        let mut y = self.output(x)?;
        let pass = self.forward_train_with_into(x, MatrixMut::new(B::write(&mut y), x.rows, self.n), training)?;
        Ok((y, pass))
    }

    /// As [`forward_train`](Self::forward_train), into `y`. Allocates [h](Pass::h).
    ///
    /// # Errors
    /// As [`forward_train`](Self::forward_train).
    pub fn forward_train_into<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        y: MatrixMut<'_, B::Write<T>>,
    ) -> Result<Pass<'a, B, T>> {
        self.forward_train_with_into(x, y, Training::default())
    }

    /// As [`forward_train_with`](Self::forward_train_with), into `y`. Allocates [h](Pass::h) where it is kept.
    ///
    /// # Errors
    /// As [`forward_train_with`](Self::forward_train_with).
    pub fn forward_train_with_into<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        y: MatrixMut<'_, B::Write<T>>,
        training: Training<'a, B>,
    ) -> Result<Pass<'a, B, T>> {
        self.alone(&[self]).forward_train(x, [y], training)
    }

    /// The gradients at `dy` (M × N) of the pass, with the adapter that it was made with, whether or not that is still the
    /// active one. Of a pass through a bank da and db are those of all its adapters, as the bank has them: each one's lie at its
    /// [slot](super::Bank::slots).
    ///
    /// # Errors
    /// Those of the backend's backward (`cpu::backward`, `cuda::Kernels::backward`); [`Error::State`] when the layer is not
    /// the pass's, when the adapter or W has changed since, or with dm the bias, when dm is asked of an adapter without a
    /// magnitude, and while adapters are merged. Nothing is written then, and the pass can be used again. Where h is
    /// computed again, [`Backend::forward`] and [`Backend::alloc`] can fail as well.
    pub fn backward(
        &self,
        pass: &Pass<'_, B, T>,
        dy: Matrix<'_, B::Read<T>>,
        gradients: Gradients<'_, B, T>,
    ) -> Result<()> {
        let Gradients { dx, da, db, dbias, dm, accumulate } = gradients;
        let layers = [self];
        let sharing = Sharing { routed: pass.routed, ..self.alone(&layers) };
        sharing.backward(pass, dx, da, [Part { dy, db, dbias, dm }], accumulate)
    }

    pub(super) fn alone<'s, 'a>(&'a self, layers: &'s [&'a Self]) -> Sharing<'s, 'a, B, T> {
        Sharing { backend: &self.backend, layers, stack: None, routed: None }
    }

    /// The magnitude of the pass's adapter, to which y must belong with the bias as it was.
    pub(super) fn magnitude_of(&self, made: Made) -> Result<Matrix<'_, B::Read<f32>>> {
        let refused = |got: &str, expected| {
            let got = got.to_owned();
            Err(Error::State { operation: "backward", got, expected })
        };
        if made.bias != self.bias_version {
            return refused("the bias was changed since the pass", "dm before the bias is changed");
        }
        let named = self.adapters.iter().find(|named| Some(named.version) == made.adapter);
        match named.and_then(|named| named.adapter.magnitude()) {
            Some(magnitude) => Ok(Matrix::new(B::read(magnitude), 1, self.n)),
            None => refused("dm is asked for", "a pass of an adapter with a magnitude (DoRA)"),
        }
    }

    /// The active adapter, when it is the only one.
    pub(super) fn trained(&self, operation: &'static str) -> Result<Option<&Named<B, T>>> {
        match &self.active {
            Active::None => Ok(None),
            Active::One(id) => Ok(self.by_id(*id)),
            Active::Several(_) => Err(Error::State {
                operation,
                got: format!("`{}` are active", self.active().join("`, `")),
                expected: "`activate` of one adapter first",
            }),
        }
    }

    /// The pass must be of this layer, with W as it is.
    pub(super) fn check_base(&self, made: Made) -> Result<()> {
        if made.base == self.version { Ok(()) } else { Err(refused("the pass is of another layer, or of another W")) }
    }

    /// What forward read when it made a pass of the layer as it was.
    pub(super) fn operands_of(&self, made: Made) -> Result<Operands<'_, B, T>> {
        self.check_base(made)?;
        match made.adapter {
            None => Ok(self.plain(None)),
            Some(version) => match self.adapters.iter().find(|named| named.version == version) {
                Some(named) => self.with_adapter("backward", named),
                None => Err(refused("the pass is of an adapter that was changed or removed since")),
            },
        }
    }
}

fn refused(got: &str) -> Error {
    Error::State { operation: "backward", got: got.to_owned(), expected: "a pass of this layer as it is" }
}
