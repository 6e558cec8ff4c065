//! DoRA: the gain of an adapter, and adapters that start with the norms for a magnitude.

use super::{Adapter, Backend, Base, LoraLinear, Rejected};
use crate::error::Result;
use crate::{Element, Gain, Matrix, MatrixMut};

/// gain = magnitude / ‖W + s · B A‖ (· earlier), by rows.
pub(super) fn gain_into<B: Backend, T: Element>(
    base: Base<'_, B, T>,
    adapter: &Adapter<B, T>,
    earlier: Option<&B::Buffer<f32>>,
    gain: &mut B::Buffer<f32>,
) -> Result<()> {
    let Base { backend, n, k, w, .. } = base;
    let row = |vector| Matrix::new(B::read(vector), 1, n);
    backend.gain::<T>(Gain {
        w,
        factors: adapter.factors(n, k),
        scale: adapter.scale(),
        magnitude: adapter.magnitude().map(row),
        earlier: earlier.map(row),
        norm: None,
        gain: Some(MatrixMut::new(B::write(gain), 1, n)),
    })
}

impl<B: Backend, T: Element> LoraLinear<B, T> {
    /// As [`add`](Self::add), with the row norms of W + s · B A for a magnitude, in place of the one that the adapter may have: a new
    /// adapter of DoRA, whose gain is 1.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_dora(&mut self, name: &str, mut adapter: Adapter<B, T>) -> Result<(), Rejected<Adapter<B, T>>> {
        let norms = match self.norms(&adapter) {
            Ok(norms) => norms,
            Err(error) => return Err(Rejected { error, value: adapter }),
        };
        let before = adapter.replace_magnitude(Some(norms));
        self.add(name, adapter).map_err(|mut rejected| {
            rejected.value.replace_magnitude(before);
            rejected
        })
    }

    /// ‖W + s · B A‖ by rows.
    fn norms(&self, adapter: &Adapter<B, T>) -> Result<B::Buffer<f32>> {
        let (n, k) = (self.n, self.k);
        adapter.check(n, k)?;
        let mut norm = self.backend.alloc::<f32>(n)?;
        self.backend.gain::<T>(Gain {
            w: self.w.view(),
            factors: adapter.factors(n, k),
            scale: adapter.scale(),
            magnitude: None,
            earlier: None,
            norm: Some(MatrixMut::new(B::write(&mut norm), 1, n)),
            gain: None,
        })?;
        Ok(norm)
    }
}
