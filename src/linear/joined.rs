//! Several adapters as one: side by side, under one scale and one gain.

use super::bias::Folded;
use super::dora::gain_into;
use super::factor::{Copies, Put};
use super::set::{Named, stale};
use super::{Adapter, Backend, Base, LoraLinear, Operands, next_version};
use crate::error::{Error, Result};
use crate::{Element, Matrix};

/// Several adapters side by side.
pub(super) struct Joined<B: Backend, T: Element> {
    pub(super) ids: Vec<u64>,
    pub(super) rank: usize,
    scale: f32,
    copies: Copies<B, T>,
    /// The bias of the layer with those of the adapters, where they have some.
    folded: Option<Folded<B, T>>,
    /// For each adapter of DoRA the product of its gain and those before it; the last multiplies everything.
    gains: Vec<B::Buffer<f32>>,
    /// An adapter, W or the bias changed, and a copy of it failed.
    pub(super) is_stale: bool,
    /// Another number whenever it is made anew.
    version: u64,
}

impl<B: Backend, T: Element> Joined<B, T> {
    pub(super) fn new(layer: &LoraLinear<B, T>, chosen: &[&Named<B, T>]) -> Result<Self> {
        check_order(chosen)?;
        let rank: usize = chosen.iter().map(|named| named.adapter.rank()).sum();
        let scales = chosen.iter().filter(|named| named.adapter.rank() != 0).map(|named| named.adapter.scale());
        let scale = scales.max_by(|s, t| s.abs().total_cmp(&t.abs())).unwrap_or(1.0);
        let of_dora = chosen.iter().filter(|named| named.adapter.has_magnitude());
        let mut joined = Self {
            ids: chosen.iter().map(|named| named.id).collect(),
            rank,
            scale,
            copies: Copies::new(&layer.backend, (layer.n, layer.k, rank), Copies::are_full(chosen), false)?,
            folded: Folded::new(layer, chosen.iter().map(|named| &named.adapter))?,
            gains: of_dora.map(|_| layer.backend.alloc(layer.n)).collect::<Result<_>>()?,
            is_stale: true,
            version: next_version(),
        };
        joined.refresh(layer.base(), &layer.adapters)?;
        Ok(joined)
    }

    /// What the adapters' biases make of the layer's.
    pub(super) fn folded(&self) -> Option<&Folded<B, T>> {
        self.folded.as_ref()
    }

    pub(super) fn into_bias(self) -> Option<B::Buffer<T>> {
        self.folded.map(Folded::into_sum)
    }

    /// Whether it is made of W as well.
    pub(super) fn has_gain(&self) -> bool {
        !self.gains.is_empty()
    }

    /// Copies the factors of every adapter to their place, multiplies the gains, and sums the biases.
    pub(super) fn refresh(&mut self, base: Base<'_, B, T>, adapters: &[Named<B, T>]) -> Result<()> {
        let Base { backend, n, k, bias, .. } = base;
        self.is_stale = true;
        self.version = next_version();
        let (mut first, mut gains, mut earlier) = (0, self.gains.iter_mut(), None::<&B::Buffer<f32>>);
        let chosen = || self.ids.iter().filter_map(|id| adapters.iter().find(|named| named.id == *id));
        for named in chosen() {
            let r = named.adapter.rank();
            let row = |gain| Matrix::new(B::read(gain), 1, n);
            if r != 0 {
                let own = f64::from(named.adapter.scale());
                let ratio = if self.scale == 0.0 { 1.0 } else { own / f64::from(self.scale) };
                let factors = named.adapter.factors(n, k);
                let from = Put { factors, scale: ratio as f32, divisor: earlier.map(row) };
                self.copies.put(backend, first, r, from)?;
            }
            first += r;
            if named.adapter.has_magnitude()
                && let Some(gain) = gains.next()
            {
                gain_into(base, &named.adapter, earlier, gain)?;
                earlier = Some(gain);
            }
        }
        if let Some(folded) = &mut self.folded {
            folded.refresh(backend, n, bias, chosen().map(|named| &named.adapter))?;
        }
        self.is_stale = false;
        Ok(())
    }

    pub(super) fn operands<'a>(
        &'a self,
        operation: &'static str,
        layer: &'a LoraLinear<B, T>,
    ) -> Result<Operands<'a, B, T>> {
        if self.is_stale {
            return Err(stale(operation, &layer.active().join("`, `")));
        }
        let gain = self.gains.last().map(|gain| Matrix::new(B::read(gain), 1, layer.n));
        let plain = Operands { gain, ..layer.plain(self.folded.as_ref().map(Folded::sum)) };
        if self.rank == 0 {
            return Ok(plain);
        }
        let (a, b) = self.copies.read();
        Ok(Operands { a, b, scale: self.scale, version: Some(self.version), ..plain })
    }
}

/// DoRA multiplies a bias that was added before it by its gain, which the sum of biases leaves out.
fn check_order<B: Backend, T: Element>(chosen: &[&Named<B, T>]) -> Result<()> {
    let with_bias = chosen.iter().position(|named| named.adapter.has_b_bias());
    let of_dora = chosen.iter().rposition(|named| Adapter::has_magnitude(&named.adapter));
    match (with_bias, of_dora) {
        (Some(bias), Some(dora)) if bias < dora => {
            let (bias, dora) = (&chosen[bias].name, &chosen[dora].name);
            let got = format!(
                "adapter `{bias}`, which has a bias on B, stands before `{dora}`, which has a magnitude (DoRA)"
            );
            let expected = "adapters with a bias on B behind those of DoRA";
            Err(Error::State { operation: "activate_all", got, expected })
        }
        _ => Ok(()),
    }
}
