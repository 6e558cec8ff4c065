//! Many adapters of a layer in one batch: each row of x goes through its own.

use candle_core::{Result, Tensor, TensorId};

use super::linear::{Adapter, LoraLinear};
use super::op::{Projection, apply, one};
use super::third::alike;
use super::{Routes, check, wrap};
use crate::error::Error;
use crate::routing::{check_routable, same_slots, side_by_side};
use crate::{Routing, Slot};

/// Adapters of a layer side by side, for batches whose rows choose among them: [`LoraLinear::bank`].
#[derive(Clone, Debug)]
pub struct Bank {
    chosen: Vec<Chosen>,
    slots: Vec<Slot>,
    /// Of all adapters below each other, and side by side; of no ranks there is none.
    factors: Option<(Tensor, Tensor)>,
    rank: usize,
}

/// An adapter of a bank: its name, and A and B that were copied.
#[derive(Clone, Debug)]
struct Chosen {
    name: String,
    a: TensorId,
    b: TensorId,
}

impl Bank {
    /// Where each adapter lies, in the order in which they were named: what [`Routing::new`] takes.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Ranks of all adapters and of the gaps between them.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// [`Routing::new`] among the bank's slots, in the memory of `x`'s device: row i of its tokens through adapter `ids[i]` of those
    /// that were named, or through none.
    ///
    /// # Errors
    /// As [`Routing::new`] and [`Routes::new`].
    pub fn routes(&self, ids: &[Option<usize>], x: &Tensor) -> Result<Routes> {
        Routes::new(Routing::new(&self.slots, ids).map_err(wrap)?, x.device())
    }
}

impl LoraLinear {
    /// Lays adapters side by side, for [`forward_routed`](Self::forward_routed): copies of at most 15 more ranks than each has, in f32
    /// where their types differ.
    ///
    /// The copies are nodes of candle's graph: through them tracked factors get their gradients. What changes the factors later, as an
    /// optimizer does, does not reach them: where adapters are trained, make a bank for each step.
    ///
    /// # Errors
    /// [`AdapterName`](crate::Error::AdapterName); [`State`](crate::Error::State) for an adapter with a bias on B, and for one with a
    /// magnitude (DoRA), which it names; [`TooLarge`](crate::Error::TooLarge) for more ranks than
    /// [`MAX_ROUTED_RANK`](crate::MAX_ROUTED_RANK), each adapter's counted as the next multiple of 16; candle's.
    pub fn bank(&self, names: &[&str]) -> Result<Bank> {
        let routable = |name: &&str| {
            let adapter = self.known(name)?;
            check_routable("bank", name, adapter.b_bias.is_some(), adapter.magnitude.is_some()).map_err(wrap)?;
            Ok(adapter)
        };
        let chosen = names.iter().map(routable).collect::<Result<Vec<_>>>()?;
        let ranks = |adapter: &Adapter| Ok((adapter.a.dim(0)?, adapter.scale as f32));
        let ranks = chosen.iter().map(|adapter| ranks(adapter)).collect::<Result<Vec<_>>>()?;
        let (slots, rank) = side_by_side(ranks).map_err(wrap)?;
        let ends = slots.iter().skip(1).map(|next| next.first_rank).chain([rank]);
        let gaps: Vec<_> = slots.iter().zip(ends).map(|(slot, end)| end - slot.first_rank - slot.ranks).collect();
        // What lies between the slots is multiplied by zeros, so it must be finite.
        let laid = |factor: fn(&Adapter) -> &Tensor, dim: usize| {
            let of_one_type = alike(chosen.iter().map(|adapter| factor(adapter)), |factor| Ok(factor.clone()))?;
            let padded = of_one_type.iter().zip(&gaps).map(|(factor, &gap)| factor.pad_with_zeros(dim, 0, gap));
            match &padded.collect::<Result<Vec<_>>>()?[..] {
                [one] if gaps == [0] => one.copy(), // it is the factor itself
                all => Tensor::cat(all, dim),
            }
        };
        let factors = match chosen[..] {
            [] => None,
            _ => Some((laid(|adapter| &adapter.a, 0)?, laid(|adapter| &adapter.b, 1)?)),
        };
        let named =
            |(&name, Adapter { a, b, .. }): (&&str, &&Adapter)| Chosen { name: name.to_owned(), a: a.id(), b: b.id() };
        Ok(Bank { chosen: names.iter().zip(&chosen).map(named).collect(), slots, factors, rank })
    }

    /// Forward for inference, x of … × K, two dimensions or more, to … × N: each row of x with the adapter that `routes` has for it,
    /// or with none. Which adapter is active does not matter.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use fused_lora::candle::{LoraConfig, LoraLinear};
    ///
    /// let (vars, device) = (VarMap::new(), Device::Cpu);
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    /// let mut layer = LoraLinear::frozen(Tensor::randn(0f32, 0.1, (8, 6), &device)?, None)?;
    /// for (name, r) in [("english", 2), ("french", 4)] {
    ///     layer.add(name, LoraConfig { r, alpha: 4.0, rslora: false }, vb.pp(name))?;
    /// }
    /// let bank = layer.bank(&["english", "french"])?;
    /// let x = Tensor::randn(0f32, 1.0, (3, 6), &device)?;
    /// let routes = bank.routes(&[Some(1), None, Some(0)], &x)?;
    /// let y = layer.forward_routed(&x, &bank, &routes)?;
    /// # assert_eq!(y.dims(), [3, 8]);
    /// # candle_core::Result::Ok(())
    /// ```
    ///
    /// # Errors
    /// As [`lora_train`](super::lora_train); [`State`](crate::Error::State) for routes that were made for other slots than the bank's,
    /// naming the adapter, for a bank of another layer's adapters or of one that was removed or has got a bias on B or a magnitude since,
    /// and while an adapter is merged.
    pub fn forward_routed(&self, x: &Tensor, bank: &Bank, routes: &Routes) -> Result<Tensor> {
        self.forward_routed_t(x, bank, routes, false)
    }

    /// As [`forward_routed`](Self::forward_routed), with dropout where `train` is set.
    ///
    /// # Errors
    /// As [`forward_routed`](Self::forward_routed).
    pub fn forward_routed_t(&self, x: &Tensor, bank: &Bank, routes: &Routes, train: bool) -> Result<Tensor> {
        const OPERATION: &str = "forward_routed";
        self.check_unmerged(OPERATION)?;
        self.check_bank(OPERATION, bank).map_err(wrap)?;
        let name = |at: usize| bank.chosen.get(at).map_or("", |chosen| &chosen.name);
        same_slots(OPERATION, name, routes.slots(), &bank.slots).map_err(wrap)?;
        check::input(self.weight(), x).map_err(wrap)?;
        check::rows(x, routes).map_err(wrap)?;
        let Some((a, b)) = &bank.factors else { return self.plain(x) };
        let projection = Projection { w: self.weight(), a, b, scale: 1.0, bias: self.bias(), magnitude: None };
        one(apply(x, &[projection], Some(routes), self.modes().pass(train))?)
    }

    /// The adapters of a bank must be the layer's.
    fn check_bank(&self, operation: &'static str, bank: &Bank) -> crate::Result<()> {
        for Chosen { name, a, b } in &bank.chosen {
            let Some(adapter) = self.get(name).filter(|adapter| (adapter.a.id(), adapter.b.id()) == (*a, *b)) else {
                let got = format!("adapter `{name}` of the bank is not in the layer");
                return Err(Error::State { operation, got, expected: "`bank` anew first" });
            };
            check_routable(operation, name, adapter.b_bias.is_some(), adapter.magnitude.is_some())?;
        }
        Ok(())
    }
}
