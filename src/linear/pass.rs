//! A forward pass, and what it leaves for backward.

use std::fmt;

use super::{Backend, Bank, Rejected, Routes};
use crate::error::{Error, Result};
use crate::{Dropout, Element, Matrix, Seed};

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

/// What a layer was when it made a pass: numbers that change with what they stand for.
#[derive(Clone, Copy)]
pub(super) struct Made {
    /// Of W.
    pub(super) base: u64,
    /// Of the layer's bias.
    pub(super) bias: u64,
    /// Of the adapter's factors.
    pub(super) adapter: Option<u64>,
}

/// What rows of a pass go through where it is not the active adapter.
pub(super) struct Routed<'a, B: Backend, T: Element> {
    pub(super) bank: &'a Bank<B, T>,
    pub(super) routes: &'a Routes<B>,
}

impl<B: Backend, T: Element> Clone for Routed<'_, B, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend, T: Element> Copy for Routed<'_, B, T> {}

/// What forward leaves for backward, beside x: h, and which states of the layers it is of.
pub struct Kept<B: Backend, T: Element> {
    /// M × R; `None` without an adapter, at rank 0, and where backward computes it.
    pub(super) h: Option<B::Buffer<T>>,
    /// The probability of dropout, with seed and offset unless they lie in memory.
    dropout: Option<(f32, Option<[u64; 2]>)>,
    /// Columns of h: the ranks of all layers, or their halves.
    pub(super) columns: usize,
    pub(super) tokens: usize,
    /// Of each layer that shares x.
    pub(super) layers: Vec<Made>,
    /// Of the bank, where rows went through one.
    bank: Option<u64>,
}

/// One forward pass, for [`LoraLinear::backward`](super::LoraLinear::backward) or
/// [`LoraProjections::backward`](super::LoraProjections::backward): x and what forward kept. It may be used any number of times.
///
/// It borrows x, bank and routes where rows went through one, and the seed of dropout where that lies in memory. A caller that
/// cannot keep the borrow takes it apart with [`into_kept`](Self::into_kept) and puts it together again with [`Kept::with`].
pub struct Pass<'a, B: Backend, T: Element> {
    pub(super) x: Matrix<'a, B::Read<T>>,
    pub(super) dropout: Option<Dropout<'a, B::Words>>,
    pub(super) routed: Option<Routed<'a, B, T>>,
    pub(super) kept: Kept<B, T>,
}

impl<'a, B: Backend, T: Element> Pass<'a, B, T> {
    /// What was read, written and kept.
    pub(super) fn new(
        x: Matrix<'a, B::Read<T>>,
        dropout: Option<Dropout<'a, B::Words>>,
        h: Option<B::Buffer<T>>,
        columns: usize,
        layers: Vec<Made>,
    ) -> Self {
        let kept_dropout = dropout.map(|Dropout { p, seed }| match seed {
            Seed::Value { seed, offset } => (p, Some([seed, offset])),
            Seed::Memory(_) => (p, None),
        });
        let kept = Kept { h, dropout: kept_dropout, columns, tokens: x.rows, layers, bank: None };
        Self { x, dropout, routed: None, kept }
    }

    /// The same of rows that went through a bank.
    pub(super) fn through(mut self, routed: Routed<'a, B, T>) -> Self {
        self.kept.bank = Some(routed.bank.version());
        self.routed = Some(routed);
        self
    }

    /// The input of forward.
    pub fn x(&self) -> Matrix<'a, B::Read<T>> {
        self.x
    }

    /// M × R, as forward wrote it: s · x Aᵀ in the storage type, of what dropout left of x; of several layers their ranks side by
    /// side, and at full precision M × the sum of each one's [`split_columns`](crate::split_columns)(R). `None` without an
    /// adapter, at rank 0, and where backward is to compute it.
    pub fn h(&self) -> Option<&B::Buffer<T>> {
        self.kept.h.as_ref()
    }

    /// Lets x go, bank and routes, and a seed in memory.
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
    /// [`with_seed`](Self::with_seed) wants, and for one whose rows went through a bank, which [`with_routes`](Self::with_routes)
    /// wants. What was kept comes back with it.
    pub fn with(self, x: Matrix<'_, B::Read<T>>) -> Result<Pass<'_, B, T>, Rejected<Self>> {
        self.rejoined(x, None, None)
    }

    /// As [`with`](Self::with) for a pass that took its seed from memory: `seed` must hold what forward read there.
    ///
    /// # Errors
    /// As [`with`](Self::with); [`Error::State`] for a pass that took no seed from memory.
    pub fn with_seed<'a>(
        self,
        x: Matrix<'a, B::Read<T>>,
        seed: Matrix<'a, B::Words>,
    ) -> Result<Pass<'a, B, T>, Rejected<Self>> {
        self.rejoined(x, Some(seed), None)
    }

    /// As [`with`](Self::with) for a pass of [`LoraLinear::forward_routed_train`](super::LoraLinear::forward_routed_train): `routes`
    /// must be those of forward, `seed` what it read where it took it from memory.
    ///
    /// # Errors
    /// As [`with_seed`](Self::with_seed); [`Error::State`] for a pass of no bank, and where `bank` is another or was refreshed since.
    pub fn with_routes<'a>(
        self,
        x: Matrix<'a, B::Read<T>>,
        bank: &'a Bank<B, T>,
        routes: &'a Routes<B>,
        seed: Option<Matrix<'a, B::Words>>,
    ) -> Result<Pass<'a, B, T>, Rejected<Self>> {
        self.rejoined(x, seed, Some(Routed { bank, routes }))
    }

    fn rejoined<'a>(
        self,
        x: Matrix<'a, B::Read<T>>,
        memory: Option<Matrix<'a, B::Words>>,
        routed: Option<Routed<'a, B, T>>,
    ) -> Result<Pass<'a, B, T>, Rejected<Self>> {
        match self.check(x.rows, routed).and_then(|()| self.seeded(memory)) {
            Ok(dropout) => Ok(Pass { x, dropout, routed, kept: self }),
            Err(error) => Err(Rejected { error, value: self }),
        }
    }

    fn check(&self, rows: usize, routed: Option<Routed<'_, B, T>>) -> Result<()> {
        let refused =
            |got: &str, expected| Err(Error::State { operation: "with_routes", got: got.to_owned(), expected });
        match (self.bank, routed.map(|routed| routed.bank.version())) {
            _ if rows != self.tokens => {
                Err(Error::Dimension { arg: "x", axis: "rows", got: rows, expected: self.tokens })
            }
            (Some(_), None) => Err(Error::Missing { arg: "routes", output: "a pass of a bank" }),
            (None, Some(_)) => refused("the pass is of no bank", "`with`"),
            (Some(kept), Some(given)) if kept != given => {
                refused("the bank is another than forward read", "the bank of the pass, as it was")
            }
            _ => Ok(()),
        }
    }

    fn seeded<'a>(&self, memory: Option<Matrix<'a, B::Words>>) -> Result<Option<Dropout<'a, B::Words>>> {
        match (self.dropout, memory) {
            (None, None) => Ok(None),
            (Some((p, Some([seed, offset]))), None) => Ok(Some(Dropout { p, seed: Seed::Value { seed, offset } })),
            (Some((p, None)), Some(memory)) => Ok(Some(Dropout { p, seed: Seed::Memory(memory) })),
            (Some((_, None)), None) => Err(Error::Missing { arg: "seed", output: "dropout" }),
            (_, Some(_)) => Err(Error::State {
                operation: "with_seed",
                got: "the pass took no seed from memory".to_owned(),
                expected: "`with`",
            }),
        }
    }
}

impl<B: Backend, T: Element> fmt::Debug for Kept<B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("tokens", &self.tokens).field("columns", &self.columns).finish_non_exhaustive()
    }
}

impl<B: Backend, T: Element> fmt::Debug for Pass<'_, B, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pass").field("kept", &self.kept).finish_non_exhaustive()
    }
}
