//! Forward that keeps what backward needs, and backward.

use std::fmt;

use super::set::{Active, Named};
use super::{Backend, LoraLinear, Operands, elements};
use crate::error::{Error, Result};
use crate::{
    Accumulate, Backward, Dropout, Element, Forward, Gradient, MagnitudeGradient, Matrix, MatrixMut, Seed, Variant,
};

/// Columns of y that a forward pass computes where h is all that is wanted of it: a row of 16 bytes at least.
pub(super) const COLUMNS: usize = 8;

/// How a pass departs from the default, which drops nothing and keeps h.
pub struct Training<'a, B: Backend> {
    /// Elements of x that the adapter does not see, in forward and in backward of this pass. Each pass wants another offset,
    /// each layer another seed. Beside a magnitude (DoRA) only a probability of 0.
    pub dropout: Option<Dropout<'a, B::Words>>,
    /// Forward keeps no h, and backward computes it again where db is asked for: M × R elements less between the two, for one
    /// launch more, which reads x and A, and writes h to memory that is held until backward returns. Its bits are those that
    /// forward would have kept where the backend sums alike for fewer columns of y, as the CPU does; elsewhere h may be
    /// rounded from another order of summation.
    pub recompute: bool,
}

impl<B: Backend> Clone for Training<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Training<'_, B> {}
impl<B: Backend> Default for Training<'_, B> {
    fn default() -> Self {
        Self { dropout: None, recompute: false }
    }
}

/// What forward leaves for backward, beside x: h, and which state of the layer it is of.
pub struct Kept<B: Backend, T: Element> {
    /// M × R; `None` without an adapter, at rank 0, and where backward computes it.
    h: Option<B::Buffer<T>>,
    /// The probability of dropout, with seed and offset unless they lie in memory.
    dropout: Option<(f32, Option<[u64; 2]>)>,
    rank: usize,
    tokens: usize,
    /// Of W.
    base: u64,
    /// Of the layer's bias.
    bias: u64,
    /// Of the adapter's factors.
    adapter: Option<u64>,
}

/// One forward pass, for [`LoraLinear::backward`]: x and what forward kept. It may be used any number of times.
///
/// It borrows x, and the seed of dropout where that lies in memory. A caller that cannot keep the borrow takes it apart with
/// [`into_kept`](Self::into_kept) and puts it together again with [`Kept::with`].
pub struct Pass<'a, B: Backend, T: Element> {
    x: Matrix<'a, B::Read<T>>,
    dropout: Option<Dropout<'a, B::Words>>,
    kept: Kept<B, T>,
}

impl<'a, B: Backend, T: Element> Pass<'a, B, T> {
    /// The input of forward.
    pub fn x(&self) -> Matrix<'a, B::Read<T>> {
        self.x
    }

    /// M × R, as forward wrote it: s · x Aᵀ in the storage type, of what dropout left of x. `None` without an adapter, at rank 0,
    /// and where backward is to compute it.
    pub fn h(&self) -> Option<&B::Buffer<T>> {
        self.kept.h.as_ref()
    }

    /// Lets x go, and a seed in memory.
    pub fn into_kept(self) -> Kept<B, T> {
        self.kept
    }
}

#[allow(clippy::result_large_err, reason = "what was kept comes back")]
impl<B: Backend, T: Element> Kept<B, T> {
    /// The pass again. `x` must be what forward read, which only the caller can know; its number of rows is checked.
    ///
    /// # Errors
    /// [`Error::Dimension`]; [`Error::Missing`] for a pass that took its seed from memory, which
    /// [`with_seed`](Self::with_seed) wants. What was kept comes back with it.
    pub fn with(self, x: Matrix<'_, B::Read<T>>) -> Result<Pass<'_, B, T>, super::Rejected<Self>> {
        self.rejoined(x, None)
    }

    /// As [`with`](Self::with) for a pass that took its seed from memory: `seed` must hold what forward read there.
    ///
    /// # Errors
    /// As [`with`](Self::with); [`Error::State`] for a pass that took no seed from memory.
    pub fn with_seed<'a>(
        self,
        x: Matrix<'a, B::Read<T>>,
        seed: Matrix<'a, B::Words>,
    ) -> Result<Pass<'a, B, T>, super::Rejected<Self>> {
        self.rejoined(x, Some(seed))
    }

    fn rejoined<'a>(
        self,
        x: Matrix<'a, B::Read<T>>,
        memory: Option<Matrix<'a, B::Words>>,
    ) -> Result<Pass<'a, B, T>, super::Rejected<Self>> {
        let seed = match (self.dropout, memory) {
            _ if x.rows != self.tokens => {
                Err(Error::Dimension { arg: "x", axis: "rows", got: x.rows, expected: self.tokens })
            }
            (None, None) => Ok(None),
            (Some((p, Some([seed, offset]))), None) => Ok(Some(Dropout { p, seed: Seed::Value { seed, offset } })),
            (Some((p, None)), Some(memory)) => Ok(Some(Dropout { p, seed: Seed::Memory(memory) })),
            (Some((_, None)), None) => Err(Error::Missing { arg: "seed", output: "dropout" }),
            (_, Some(_)) => Err(Error::State {
                operation: "with_seed",
                got: "the pass took no seed from memory".to_owned(),
                expected: "`with`",
            }),
        };
        match seed {
            Ok(dropout) => Ok(Pass { x, dropout, kept: self }),
            Err(error) => Err(super::Rejected { error, value: self }),
        }
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

    /// As [`forward_train`](Self::forward_train), into `y`. Allocates h, M × R elements.
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

    /// As [`forward_train_with`](Self::forward_train_with), into `y`. Allocates h where it is kept, M × R elements.
    ///
    /// # Errors
    /// As [`forward_train_with`](Self::forward_train_with).
    pub fn forward_train_with_into<'a>(
        &self,
        x: Matrix<'a, B::Read<T>>,
        y: MatrixMut<'_, B::Write<T>>,
        training: Training<'a, B>,
    ) -> Result<Pass<'a, B, T>> {
        self.check_unmerged("forward_train")?;
        let named = self.trained("forward_train")?;
        let Operands { w, a, b, scale, bias, gain } = self.operands("forward_train")?;
        let Training { dropout, recompute } = training;
        let dropout = match (named, gain) {
            (Some(named), Some(_)) => undropped(&named.name, dropout)?,
            _ => dropout,
        };
        let mut h = match a.rows {
            0 => None,
            _ if recompute => None,
            rank => Some(self.middle(x, rank)?),
        };
        let keep = h.as_mut().map(|h| MatrixMut::new(B::write(h), x.rows, a.rows));
        self.backend.forward::<T, T>(Forward {
            x,
            w,
            a,
            b,
            scale,
            bias,
            h: keep,
            y,
            variant: Variant { dropout, gain, ..Variant::default() },
        })?;
        let (adapter, rank) = (named.map(|named| named.version), a.rows);
        let kept_dropout = dropout.map(|Dropout { p, seed }| match seed {
            Seed::Value { seed, offset } => (p, Some([seed, offset])),
            Seed::Memory(_) => (p, None),
        });
        let (base, bias) = (self.version, self.bias_version);
        let kept = Kept { h, dropout: kept_dropout, rank, tokens: x.rows, base, bias, adapter };
        Ok(Pass { x, dropout, kept })
    }

    /// A buffer for h. The rows of y are those of x, or the operation is refused; both buffers bound them.
    fn middle(&self, x: Matrix<'_, B::Read<T>>, rank: usize) -> Result<B::Buffer<T>> {
        self.check_input(x)?;
        self.backend.alloc::<T>(elements("the number of elements of h", x.rows, rank)?)
    }

    /// The gradients at `dy` (M × N) of the pass, with the adapter that it was made with, whether or not that is still the
    /// active one.
    ///
    /// # Errors
    /// Those of the backend's backward (`cpu::backward`, `cuda::Kernels::backward`); [`Error::State`] when the layer is not
    /// the pass's, when the adapter or W has changed since, or with dm the bias, when dm is asked of an adapter without a
    /// magnitude, and while adapters are merged. Nothing is written then, and the pass can be used again. Where h is computed again, [`Backend::forward`] and [`Backend::alloc`] can fail as well.
    pub fn backward(
        &self,
        pass: &Pass<'_, B, T>,
        dy: Matrix<'_, B::Read<T>>,
        gradients: Gradients<'_, B, T>,
    ) -> Result<()> {
        self.check_unmerged("backward")?;
        let Pass { x, dropout, kept: Kept { ref h, rank, tokens, .. } } = *pass;
        let Operands { w, a, b, scale, bias, gain } = self.operands_of(&pass.kept)?;
        let Gradients { dx, da, db, dbias, dm, accumulate } = gradients;
        if dy.rows != tokens {
            return Err(Error::Dimension { arg: "dy", axis: "rows", got: dy.rows, expected: tokens });
        }
        let dm = match dm {
            Some(Magnitude { y, dm }) => {
                let magnitude = self.magnitude_of(&pass.kept)?;
                Some(MagnitudeGradient { y, bias, magnitude, dm })
            }
            None => None,
        };
        let again = if h.is_none() && rank != 0 && db.is_some() { Some(self.middle_of(pass)?) } else { None };
        let nothing = Matrix { rows: tokens, cols: 0, row_stride: 0, offset: 0, ..dy };
        let h = match h.as_ref().or(again.as_ref()) {
            Some(h) => Some(Matrix::new(B::read(h), tokens, rank)),
            None => (rank == 0).then_some(nothing),
        };
        self.backend.backward::<T, T>(Backward {
            dy,
            w,
            a,
            b,
            scale,
            x: Some(x),
            h,
            dx,
            da: da.map(Gradient::F32),
            db: db.map(Gradient::F32),
            dbias: dbias.map(Gradient::F32),
            dm,
            accumulate,
            variant: Variant { dropout, gain, ..Variant::default() },
        })
    }

    /// h of a pass that kept none: that of a forward pass to a few columns of y.
    fn middle_of(&self, pass: &Pass<'_, B, T>) -> Result<B::Buffer<T>> {
        let Pass { x, dropout, kept: Kept { rank, tokens, .. } } = *pass;
        let Operands { w, a, b, scale, .. } = self.operands_of(&pass.kept)?;
        let columns = self.n.min(COLUMNS);
        let mut h = self.middle(x, rank)?;
        let mut y = self.backend.alloc::<T>(elements("the number of elements of y", tokens, columns)?)?;
        self.backend.forward::<T, T>(Forward {
            x,
            w: Matrix { rows: columns, ..w },
            a,
            b: Matrix { rows: columns, ..b },
            scale,
            bias: None,
            h: Some(MatrixMut::new(B::write(&mut h), tokens, rank)),
            y: MatrixMut::new(B::write(&mut y), tokens, columns),
            variant: Variant { dropout, ..Variant::default() },
        })?;
        Ok(h)
    }

    /// The magnitude of the pass's adapter, to which y must belong with the bias as it was.
    fn magnitude_of(&self, kept: &Kept<B, T>) -> Result<Matrix<'_, B::Read<f32>>> {
        let refused = |got: &str, expected| {
            let got = got.to_owned();
            Err(Error::State { operation: "backward", got, expected })
        };
        if kept.bias != self.bias_version {
            return refused("the bias was changed since the pass", "dm before the bias is changed");
        }
        let named = self.adapters.iter().find(|named| Some(named.version) == kept.adapter);
        match named.and_then(|named| named.adapter.magnitude()) {
            Some(magnitude) => Ok(Matrix::new(B::read(magnitude), 1, self.n)),
            None => refused("dm is asked for", "a pass of an adapter with a magnitude (DoRA)"),
        }
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
            None => Ok(self.plain(None)),
            Some(version) => match self.adapters.iter().find(|named| named.version == version) {
                Some(named) => self.with_adapter("backward", named),
                None => refused("the pass is of an adapter that was changed or removed since"),
            },
        }
    }
}

/// Of dropout with DoRA nothing remains, or it is refused: it would drop from x for W, too.
fn undropped<'a, U: ?Sized>(name: &str, dropout: Option<Dropout<'a, U>>) -> Result<Option<Dropout<'a, U>>> {
    let Some(Dropout { p, .. }) = dropout else { return Ok(None) };
    if !(0.0..=1.0).contains(&p) {
        return Err(Error::Probability { got: p });
    }
    if p == 0.0 {
        return Ok(None);
    }
    let got = format!("adapter `{name}` has a magnitude (DoRA) and dropout is {p}");
    Err(Error::State { operation: "forward_train", got, expected: "dropout of 0: together they are not computed" })
}
