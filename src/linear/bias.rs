//! The bias that forward adds: the layer's, and in it those that adapters have of their own.

use super::set::{Active, Named};
use super::{Adapter, Backend, Buffers, LoraLinear};
use crate::error::{Error, Result};
use crate::{Element, Factors, Matrix, MatrixMut, Merge};

/// bias + s · b_bias for some adapters, in the storage type.
pub(super) struct Folded<B: Backend, T: Element> {
    /// N elements.
    sum: B::Buffer<T>,
    /// N zeros for the bias of a layer without one.
    zeros: Option<B::Buffer<T>>,
    /// The number 1, for biases in the storage type and in f32.
    one: (B::Buffer<T>, B::Buffer<f32>),
}

impl<B: Backend, T: Element> Folded<B, T> {
    /// Holds nothing before [`refresh`](Self::refresh). `None` where no adapter has a bias of its own.
    pub(super) fn new<'a>(
        layer: &LoraLinear<B, T>,
        mut adapters: impl Iterator<Item = &'a Adapter<B, T>>,
    ) -> Result<Option<Self>>
    where
        B: 'a,
    {
        if !adapters.any(Adapter::has_b_bias) {
            return Ok(None);
        }
        let (backend, n) = (&layer.backend, layer.n);
        let zeros = if layer.bias.is_none() { Some(backend.upload(&vec![T::default(); n])?) } else { None };
        let one = (backend.upload(&[T::from_f32(1.0)])?, backend.upload(&[1.0])?);
        Ok(Some(Self { sum: backend.alloc(n)?, zeros, one }))
    }

    pub(super) fn sum(&self) -> &B::Buffer<T> {
        &self.sum
    }

    pub(super) fn into_sum(self) -> B::Buffer<T> {
        self.sum
    }

    /// Sums anew; the product by s and each sum are in f32, and rounded once per adapter.
    pub(super) fn refresh<'a>(
        &mut self,
        backend: &B,
        n: usize,
        bias: Option<&B::Buffer<T>>,
        adapters: impl Iterator<Item = &'a Adapter<B, T>>,
    ) -> Result<()>
    where
        B: 'a,
    {
        let mut before = bias.or(self.zeros.as_ref());
        for adapter in adapters {
            // The bias as a weight of one row, B its only rank: the same kernel, and the same bits everywhere.
            let row = |buffer| Matrix::new(B::read(buffer), 1, n);
            let factors = match adapter.buffers() {
                Buffers::Storage { b_bias: Some(b_bias), .. } => {
                    Factors::Storage { a: row(b_bias), b: Matrix::new(B::read(&self.one.0), 1, 1) }
                }
                Buffers::F32 { b_bias: Some(b_bias), .. } => {
                    Factors::F32 { a: Matrix::new(B::read(b_bias), 1, n), b: Matrix::new(B::read(&self.one.1), 1, 1) }
                }
                _ => continue,
            };
            let merged = MatrixMut::new(B::write(&mut self.sum), 1, n);
            let w = before.take().map(row);
            backend.merge(Merge { w, factors, scale: adapter.scale(), gain: None, merged })?;
        }
        Ok(())
    }
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// N elements: the layer's bias, or while adapters are merged that with theirs.
    pub fn bias(&self) -> Option<&B::Buffer<T>> {
        let folded = if self.is_merged() { self.active_bias() } else { None };
        folded.or(self.bias.as_ref())
    }

    /// Changes the bias of the layer, to train it: the only way to do so. Afterwards, whatever `change` returned, its sums with
    /// the biases of adapters are made anew. A [`Pass`](super::Pass) from before stays good, as backward does not read the bias, but where
    /// a sum could not be made and [`refresh`](Self::refresh) has to.
    ///
    /// # Errors
    /// What `change` returns; [`Error::State`] for a layer without a bias, and while adapters are merged; those of
    /// [`Backend::merge`]. When a sum could not be made, and when `change` panicked, forward with the adapter is refused until
    /// [`refresh`](Self::refresh) has made it.
    pub fn update_bias<E: From<Error>>(
        &mut self,
        change: impl FnOnce(&mut B::Write<T>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.check_unmerged("update_bias")?;
        if self.bias.is_none() {
            let got = "the layer has no bias".to_owned();
            return Err(Error::State { operation: "update_bias", got, expected: "a layer made with one" }.into());
        }
        self.mark_bias_changed();
        let outcome = self.bias.as_mut().map_or(Ok(()), |bias| change(B::write(bias)));
        let renewed = self.renew_biases();
        outcome?;
        Ok(renewed?)
    }

    /// What the active adapters make of the bias, where one of them has its own.
    pub(super) fn active_bias(&self) -> Option<&B::Buffer<T>> {
        let folded = match &self.active {
            Active::None => None,
            Active::One(id) => self.by_id(*id).and_then(Named::folded),
            Active::Several(joined) => joined.folded(),
        };
        folded.map(Folded::sum)
    }
}
