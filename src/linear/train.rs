//! Forward that keeps what backward needs, and backward.

use std::fmt;

use super::set::{Active, Named};
use super::{Backend, LoraLinear, Operands, elements};
use crate::error::{Error, Result};
use crate::{Accumulate, Backward, Element, Forward, Gradient, Matrix, MatrixMut, Variant};

/// What forward leaves for backward, beside x: h, and which state of the layer it is of.
pub struct Kept<B: Backend, T: Element> {
    /// M × R; `None` without an adapter or at rank 0.
    h: Option<B::Buffer<T>>,
    rank: usize,
    tokens: usize,
    /// Of W.
    base: u64,
    /// Of the adapter's factors.
    adapter: Option<u64>,
}

/// One forward pass, for [`LoraLinear::backward`]: x and what forward kept. It may be used any number of times.
///
/// It borrows x. A caller that cannot keep the borrow takes it apart with [`into_kept`](Self::into_kept) and puts it together
/// again with [`Kept::with`].
pub struct Pass<'a, B: Backend, T: Element> {
    x: Matrix<'a, B::Read<T>>,
    kept: Kept<B, T>,
}

impl<'a, B: Backend, T: Element> Pass<'a, B, T> {
    /// The input of forward.
    pub fn x(&self) -> Matrix<'a, B::Read<T>> {
        self.x
    }

    /// M × R, as forward wrote it: s · x Aᵀ in the storage type.
    pub fn h(&self) -> Option<&B::Buffer<T>> {
        self.kept.h.as_ref()
    }

    /// Lets x go.
    pub fn into_kept(self) -> Kept<B, T> {
        self.kept
    }
}

impl<B: Backend, T: Element> Kept<B, T> {
    /// The pass again. `x` must be what forward read, which only the caller can know; its number of rows is checked.
    ///
    /// # Errors
    /// [`Error::Dimension`]. What was kept comes back with it.
    pub fn with(self, x: Matrix<'_, B::Read<T>>) -> Result<Pass<'_, B, T>, super::Rejected<Self>> {
        if x.rows != self.tokens {
            let error = Error::Dimension { arg: "x", axis: "rows", got: x.rows, expected: self.tokens };
            return Err(super::Rejected { error, value: self });
        }
        Ok(Pass { x, kept: self })
    }
}

impl<B: Backend, T: Element> fmt::Debug for Kept<B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("tokens", &self.tokens).field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl<B: Backend, T: Element> fmt::Debug for Pass<'_, B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pass").field("kept", &self.kept).finish_non_exhaustive()
    }
}

/// Which gradients backward computes, and where they go. The default is none.
pub struct Gradients<'a, B: Backend, T: Element> {
    /// M × K, in the storage type.
    pub dx: Option<MatrixMut<'a, B::Write<T>>>,
    /// R × K, in f32.
    pub da: Option<MatrixMut<'a, B::Write<f32>>>,
    /// N × R, in f32.
    pub db: Option<MatrixMut<'a, B::Write<f32>>>,
    /// 1 × N, in f32.
    pub dbias: Option<MatrixMut<'a, B::Write<f32>>>,
    /// Which of them add to what is there.
    pub accumulate: Accumulate,
}

impl<B: Backend, T: Element> Default for Gradients<'_, B, T> {
    fn default() -> Self {
        Self { dx: None, da: None, db: None, dbias: None, accumulate: Accumulate::default() }
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// As [`forward`](Self::forward) with at most one active adapter, keeping what [`backward`](Self::backward) needs.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::State`] while adapters are merged or several are active.
    #[allow(clippy::type_complexity, reason = "y and the pass")]
    pub fn forward_train<'a>(&self, x: Matrix<'a, B::Read<T>>) -> Result<(B::Buffer<T>, Pass<'a, B, T>)> {
        let mut y = self.output(x)?;
        let pass = self.forward_train_into(x, MatrixMut::new(B::write(&mut y), x.rows, self.n))?;
        Ok((y, pass))
    }

    /// As [`forward_train`](Self::forward_train), into `y`. Allocates h, M × R elements.
    ///
    /// # Errors
    /// As [`forward_train`](Self::forward_train).
    pub fn forward_train_into<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        y: MatrixMut<'_, B::Write<T>>,
    ) -> Result<Pass<'a, B, T>> {
        self.check_unmerged("forward_train")?;
        let named = self.trained("forward_train")?;
        let Operands { w, a, b, scale } = self.operands("forward_train")?;
        let rank = a.rows;
        // The rows of y are those of x, or the operation is refused; both buffers bound them.
        let mut h = match rank {
            0 => None,
            _ => {
                self.check_input(x)?;
                Some(self.backend.alloc::<T>(elements("the number of elements of h", x.rows, rank)?)?)
            }
        };
        let keep = h.as_mut().map(|h| MatrixMut::new(B::write(h), x.rows, rank));
        self.backend.forward(Forward {
            x,
            w,
            a,
            b,
            scale,
            bias: self.bias_view(),
            h: keep,
            y,
            variant: Variant::default(),
        })?;
        let adapter = named.map(|named| named.version);
        Ok(Pass { x, kept: Kept { h, rank, tokens: x.rows, base: self.version, adapter } })
    }

    /// The gradients at `dy` (M × N) of the pass, with the adapter that it was made with, whether or not that is still the
    /// active one.
    ///
    /// # Errors
    /// Those of the backend's backward (`cpu::backward`, `cuda::Kernels::backward`); [`Error::State`] when the layer is not
    /// the pass's, when the adapter or W has changed since, and while adapters are merged. Nothing is written then, and the
    /// pass can be used again.
    pub fn backward(
        &self,
        pass: &Pass<'_, B, T>,
        dy: Matrix<'_, B::Read<T>>,
        gradients: Gradients<'_, B, T>,
    ) -> Result<()> {
        self.check_unmerged("backward")?;
        let Operands { w, a, b, scale } = self.operands_of(&pass.kept)?;
        let Gradients { dx, da, db, dbias, accumulate } = gradients;
        if dy.rows != pass.kept.tokens {
            return Err(Error::Dimension { arg: "dy", axis: "rows", got: dy.rows, expected: pass.kept.tokens });
        }
        let nothing = Matrix { rows: pass.kept.tokens, cols: 0, row_stride: 0, offset: 0, ..dy };
        let h = pass.kept.h.as_ref().map_or(nothing, |h| Matrix::new(B::read(h), pass.kept.tokens, pass.kept.rank));
        self.backend.backward(Backward {
            dy,
            w,
            a,
            b,
            scale,
            x: Some(pass.x),
            h: Some(h),
            dx,
            da: da.map(Gradient::F32),
            db: db.map(Gradient::F32),
            dbias: dbias.map(Gradient::F32),
            accumulate,
            variant: Variant::default(),
        })
    }

    /// The active adapter, when it is the only one.
    fn trained(&self, operation: &'static str) -> Result<Option<&Named<B, T>>> {
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

    /// What forward read when it made the pass.
    fn operands_of(&self, kept: &Kept<B, T>) -> Result<Operands<'_, B, T>> {
        let refused = |got: &str| {
            let got = got.to_owned();
            Err(Error::State { operation: "backward", got, expected: "a pass of this layer as it is" })
        };
        if kept.base != self.version {
            return refused("the pass is of another layer, or of another W");
        }
        match kept.adapter {
            None => Ok(self.plain()),
            Some(version) => match self.adapters.iter().find(|named| named.version == version) {
                Some(named) => self.with_adapter("backward", named),
                None => refused("the pass is of an adapter that was changed or removed since"),
            },
        }
    }
}
