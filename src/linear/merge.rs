//! Folding adapters into W, and taking them out again.

use std::mem;

use super::set::{Active, Named};
use super::{Adapter, Backend, LoraLinear};
use crate::error::{Error, Result};
use crate::{Element, Matrix, MatrixMut, Merge};

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// Whether the active adapters are merged.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Folds the active adapters into a second weight, W' = W + s · B A for each in turn, summed in f32 and rounded once per
    /// adapter; with DoRA that is W' = gain ∘ (W + s · B A). W is kept, for [`unmerge`](Self::unmerge). Until then forward is the plain product by W', and training, and changes
    /// of the active adapters and of the bias, are refused. To the bias forward adds those of the adapters, as it does beside W.
    ///
    /// # Errors
    /// [`Error::State`] when none is active, they are merged already, or the sum of biases or a gain could not be renewed; those of [`Backend::alloc`] and [`Backend::merge`]. The
    /// layer is as before then.
    pub fn merge(&mut self) -> Result<()> {
        self.check_mergeable("merge")?;
        let mut merged = self.backend.alloc(self.n * self.k)?;
        for (at, id) in self.active_ids().iter().enumerate() {
            let w = (at == 0).then(|| self.w.view());
            fold(&self.backend, self.by_id(*id), (self.n, self.k), w, &mut merged)?;
        }
        self.merged = Some(merged);
        Ok(())
    }

    /// Forward with the adapters beside W again, which has the bits that it had before [`merge`](Self::merge): it was kept.
    ///
    /// # Errors
    /// [`Error::State`] when nothing is merged.
    pub fn unmerge(&mut self) -> Result<()> {
        let got = "no adapter is merged".to_owned();
        self.merged.take().map(drop).ok_or(Error::State { operation: "unmerge", got, expected: "`merge` first" })
    }

    /// As [`merge`](Self::merge), or after it, without a way back: W' takes the place of W, the bias with those of the adapters
    /// that of the bias, and the merged adapters leave the layer and are returned with their names. One adapter is folded in
    /// place, without a second buffer, where W is the layer's alone; several take one until they are done.
    ///
    /// Adapters that stay and have a bias of their own get their sum with the new bias, and those with a magnitude their gain over the
    /// new W; where that cannot be made, forward with them is refused until [`refresh`](Self::refresh) has made it.
    ///
    /// # Errors
    /// [`Error::State`] when no adapter is active; those of [`merge`](Self::merge). The layer is as before then.
    #[allow(clippy::type_complexity, reason = "adapters with their names")]
    pub fn merge_for_good(&mut self) -> Result<Vec<(String, Adapter<B, T>)>> {
        let in_place = self.w.own().is_some();
        match (&self.active, self.merged.take()) {
            (_, Some(merged)) => self.w.replace(merged),
            (&Active::One(id), None) if in_place => {
                self.check_current("merge_for_good")?;
                let named = self.adapters.iter().find(|named| named.id == id);
                if let Some(w) = self.w.own() {
                    fold(&self.backend, named, (self.n, self.k), None, w)?;
                }
            }
            (_, None) => {
                self.check_mergeable("merge_for_good")?;
                self.merge()?;
                if let Some(merged) = self.merged.take() {
                    self.w.replace(merged);
                }
            }
        }
        self.mark_weight_changed();
        let ids = self.active_ids().to_vec();
        let (folded, left) = self.adapters.drain(..).partition(|named| ids.contains(&named.id));
        self.adapters = left;
        let mut folded: Vec<Named<B, T>> = folded;
        folded.sort_by_key(|named| ids.iter().position(|id| *id == named.id));
        let bias = match mem::replace(&mut self.active, Active::None) {
            Active::Several(joined) => joined.into_bias(),
            _ => folded.first_mut().and_then(Named::take_bias),
        };
        if bias.is_some() {
            self.bias = bias;
            self.mark_bias_changed();
        }
        let _ = self.renew_all(); // a failure leaves its mark
        Ok(folded.into_iter().map(|named| (named.name, named.adapter)).collect())
    }

    /// The sum of biases that merged adapters add, and the gains, are those of forward, which must be as new as they are.
    fn check_current(&self, operation: &'static str) -> Result<()> {
        let mut copied = self.active_bias().is_some();
        let active = self.active_ids();
        for named in active.iter().filter_map(|id| self.by_id(*id)).filter(|named| named.gain().is_some()) {
            // Folding multiplies by the adapter's own gain, which can be older than the one of several together.
            named.check_fresh(operation)?;
            copied = true;
        }
        if copied { self.operands(operation).map(drop) } else { Ok(()) }
    }

    fn check_mergeable(&self, operation: &'static str) -> Result<()> {
        self.check_unmerged(operation)?;
        if self.active_ids().is_empty() {
            let got = "no adapter is active".to_owned();
            return Err(Error::State { operation, got, expected: "`activate` first" });
        }
        self.check_current(operation)
    }
}

/// target = (`w`, or what `target` holds) + s · B A of one adapter, times its gain where it has one.
fn fold<B: Backend, T: Element>(
    backend: &B,
    named: Option<&Named<B, T>>,
    (n, k): (usize, usize),
    w: Option<Matrix<'_, B::Read<T>>>,
    target: &mut B::Buffer<T>,
) -> Result<()> {
    let Some(named) = named else { return Ok(()) };
    let (factors, scale) = (named.adapter.factors(n, k), named.adapter.scale());
    let gain = named.gain().map(|gain| Matrix::new(B::read(gain), 1, n));
    backend.merge(Merge { w, factors, scale, gain, merged: MatrixMut::new(B::write(target), n, k) })
}
