//! A frozen linear layer with adapters, as a candle module.

use std::collections::BTreeMap;

use candle_core::{DType, ModuleT, Result, Tensor};
use candle_nn::{Init, Linear, VarBuilder, init};

use super::base::Base;
use super::modes::{Modes, Passes};
use super::view::addressable;
use super::{check, projections, wrap};
use crate::error::Error;

/// Rank and strength of an adapter, as PEFT's `LoraConfig` has them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank, at least 1.
    pub r: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// `use_rslora`: the scale is α/√r instead of α/r.
    pub rslora: bool,
}

impl LoraConfig {
    /// α/r, or α/√r.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }
}

/// y = x Wᵀ + s · (x Aᵀ) Bᵀ (+ bias): takes the place of a `candle_nn::Linear`.
///
/// W is frozen, and so is the bias unless it is tracked. Adapters have names; at most one takes part, chosen by
/// [`activate`](Self::activate). A, B and biases are whatever tensors they were added as: variables of a `VarMap`, a
/// [`Var`](candle_core::Var)'s tensor, or constants.
///
/// It is a [`ModuleT`], whose `forward_t` drops in training what [`with_dropout`](Self::with_dropout) says. It is no
/// [`Module`](candle_core::Module): candle makes a `ModuleT` of each that ignores the flag. [`forward`](Self::forward) is that of inference.
///
/// Without an active adapter, and while one is merged, forward is that of `candle_nn::Linear`, for x of more than four dimensions
/// as well.
#[derive(Clone, Debug)]
pub struct LoraLinear {
    base: Base,
    adapters: BTreeMap<String, Adapter>,
    active: Option<String>,
    enabled: bool,
    /// W + s · B A and the bias of the active adapter.
    merged: Option<Base>,
    modes: Modes,
}

#[derive(Clone, Debug)]
pub(super) struct Adapter {
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    /// N, inside the scale.
    pub(super) b_bias: Option<Tensor>,
    /// N, of DoRA.
    pub(super) magnitude: Option<Tensor>,
    pub(super) scale: f64,
}

/// The adapter of a layer that was made with one, as PEFT calls it.
const DEFAULT: &str = "default";

impl LoraLinear {
    /// A layer with one active adapter, `default`, made by [`add`](Self::add). `weight` is N × K, `bias` N.
    ///
    /// # Errors
    /// As [`frozen`](Self::frozen) and [`add`](Self::add).
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let mut layer = Self::frozen(weight, bias)?;
        layer.add(DEFAULT, config, vb)?;
        layer.activate(DEFAULT)?;
        Ok(layer)
    }

    /// A layer with one active adapter, `default`, of tensors that are there.
    ///
    /// # Errors
    /// As [`frozen`](Self::frozen) and [`add_tensors`](Self::add_tensors).
    pub fn from_tensors(weight: Tensor, bias: Option<Tensor>, a: Tensor, b: Tensor, scale: f64) -> Result<Self> {
        let mut layer = Self::frozen(weight, bias)?;
        layer.add_tensors(DEFAULT, a, b, scale)?;
        layer.activate(DEFAULT)?;
        Ok(layer)
    }

    /// A layer without an adapter. A weight that lies transposed is copied. The bias is of the weight's dtype or f32; a tracked one
    /// is trained, as with PEFT's `bias`.
    ///
    /// # Errors
    /// [`Error::Tracked`] for a weight that gradients are asked of; [`Error::Rank`], [`Error::Dimension`],
    /// [`Error::ZeroDimension`], [`Error::ArgumentDtype`].
    pub fn frozen(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        check::base(check::ALONE, &weight, bias.as_ref()).map_err(wrap)?;
        // Once, instead of in every forward.
        let base = Base { linear: Linear::new(addressable(&weight)?, None), bias };
        let adapters = BTreeMap::new();
        Ok(Self { base, adapters, active: None, enabled: true, merged: None, modes: Modes::default() })
    }

    /// The same layer with dropout on the adapter branch in training, PEFT's `lora_dropout`: `forward_t(x, true)` drops elements of
    /// x with probability `p`, as [`Dropout`](super::Dropout) says for this seed and, as the offset, the number of training passes before
    /// ([`passes`](Self::passes)). So a seed makes a run repeatable; give each layer another one.
    ///
    /// # Errors
    /// [`Error::Probability`] unless `p` is from 0 to 1.
    pub fn with_dropout(mut self, p: f32, seed: u64) -> Result<Self> {
        self.modes.dropout = Some(Passes::new(p, seed).map_err(wrap)?);
        Ok(self)
    }

    /// The same layer, which keeps no h between forward and backward: [`Training::recompute`](super::Training::recompute).
    #[must_use]
    pub fn with_recompute(mut self) -> Self {
        self.modes.recompute = true;
        self
    }

    /// The same layer, which reads f32 adapters over a 16-bit weight as they are, at more than 16 bits, as PEFT does by default:
    /// [`Training::full_precision`](super::Training::full_precision).
    #[must_use]
    pub fn with_full_precision(mut self) -> Self {
        self.modes.full_precision = true;
        self
    }

    /// Whether f32 adapters are read as they are.
    pub fn is_at_full_precision(&self) -> bool {
        self.modes.full_precision
    }

    /// Training passes with dropout so far, of this layer and its clones.
    pub fn passes(&self) -> u64 {
        self.modes.passes()
    }

    /// Lets the next training pass with dropout be that after `passes` others: a run that is resumed goes on with its masks.
    pub fn set_passes(&self, passes: u64) {
        self.modes.set_passes(passes);
    }

    /// Adds an adapter from `vb`, in its dtype (that of the weight, or f32): `lora_A.weight` (R × K) and `lora_B.weight` (N × R),
    /// PEFT's names. What a `VarMap` does not hold yet starts as PEFT's: A Kaiming-uniform with a = √5, B zero.
    ///
    /// # Errors
    /// As [`add_tensors`](Self::add_tensors), [`Error::TooLarge`], and what `vb` refuses, after which a `VarMap` may hold new
    /// variables. The layer is as before.
    pub fn add(&mut self, name: &str, config: LoraConfig, vb: VarBuilder) -> Result<()> {
        let (n, k) = self.base.linear.weight().dims2()?;
        let r = config.r;
        check::ranks("a", r).and_then(|()| check::scale("scale", config.scale())).map_err(wrap)?;
        self.new_name(name)?;
        // With a = √5 the gain √(2 / (1 + a²)) is √⅓, and the bound 1/√K.
        let kaiming = Init::Kaiming {
            dist: init::NormalOrUniform::Uniform,
            fan: init::FanInOut::FanIn,
            non_linearity: init::NonLinearity::ExplicitGain((1.0f64 / 3.0).sqrt()),
        };
        let a = vb.get_with_hints((r, k), "lora_A.weight", kaiming)?;
        let b = vb.get_with_hints((n, r), "lora_B.weight", init::ZERO)?;
        self.add_tensors(name, a, b, config.scale())
    }

    /// Adds an adapter of tensors that are there: `a` R × K and `b` N × R, of the weight's dtype or f32; `scale` is α/r or
    /// α/√r ([`LoraConfig::scale`]).
    ///
    /// # Errors
    /// [`Error::AdapterName`] when there is one of that name; [`Error::Rank`], [`Error::Dimension`], [`Error::ZeroDimension`],
    /// [`Error::ArgumentDtype`], [`Error::Scale`]. The layer is as before.
    pub fn add_tensors(&mut self, name: &str, a: Tensor, b: Tensor, scale: f64) -> Result<()> {
        self.new_name(name)?;
        check::adapter(check::ALONE, self.base.linear.weight(), &a, &b)
            .and_then(|()| check::scale("scale", scale))
            .map_err(wrap)?;
        self.adapters.insert(name.to_owned(), Adapter { a, b, b_bias: None, magnitude: None, scale });
        Ok(())
    }

    /// Gives B of an adapter a bias of its own (PEFT's `lora_bias`, `lora_B.bias`), in place of the one it may have: N elements, of
    /// the weight's dtype or f32; y += scale · `b_bias`. It is summed with the layer's bias in f32 and rounded once.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::Rank`], [`Error::Dimension`], [`Error::ArgumentDtype`]; [`Error::State`] while the
    /// adapter is merged, and for one with a magnitude. The layer is as before.
    pub fn set_b_bias(&mut self, name: &str, b_bias: Tensor) -> Result<()> {
        check::vector("b_bias", self.base.linear.weight(), &b_bias).map_err(wrap)?;
        self.changeable(name, "set_b_bias")?;
        if self.magnitude(name).is_some() {
            return Err(wrap(of_both("set_b_bias", name, "a magnitude (DoRA)")));
        }
        if let Some(adapter) = self.adapters.get_mut(name) {
            adapter.b_bias = Some(b_bias);
        }
        Ok(())
    }

    /// As [`add`](Self::add), an adapter of DoRA (PEFT's `use_dora`): with a `lora_magnitude_vector` of N elements, which starts as the
    /// row norms of W + s · B A where a `VarMap` does not hold it yet.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_dora(&mut self, name: &str, config: LoraConfig, vb: VarBuilder) -> Result<()> {
        const MAGNITUDE: &str = "lora_magnitude_vector";
        self.add(name, config, vb.clone())?;
        let magnitude = || {
            let is_new = !vb.contains_tensor(MAGNITUDE);
            let n = self.base.linear.weight().dims()[0];
            // The norm first: a variable of ones that outlives an error would be taken for a magnitude.
            let norm = match self.adapters.get(name) {
                Some(Adapter { a, b, scale, .. }) if is_new => {
                    Some(self.base.folded(a, b, *scale)?.sqr()?.sum(1)?.sqrt()?.to_dtype(vb.dtype())?)
                }
                _ => None,
            };
            let magnitude = vb.get_with_hints(n, MAGNITUDE, init::ONE)?;
            if let Some(norm) = norm {
                magnitude.slice_set(&norm, 0, 0)?;
            }
            Ok(magnitude)
        };
        let outcome = magnitude().and_then(|magnitude| self.set_magnitude(name, magnitude));
        if outcome.is_err() {
            self.adapters.remove(name);
        }
        outcome
    }

    /// Gives an adapter a magnitude (DoRA, PEFT's `lora_magnitude_vector`), in place of the one it may have: N elements, of the weight's
    /// dtype or f32, tracked where it is trained. y = gain ∘ (x Wᵀ + s · (x Aᵀ) Bᵀ) (+ bias), as
    /// [`Training::magnitude`](super::Training::magnitude) says. A norm is computed in every forward pass; [`merge`](Self::merge) for
    /// inference.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::Rank`], [`Error::Dimension`], [`Error::ArgumentDtype`]; [`Error::State`] while the
    /// adapter is merged, and for one with a bias on B. The layer is as before.
    pub fn set_magnitude(&mut self, name: &str, magnitude: Tensor) -> Result<()> {
        check::vector("magnitude", self.base.linear.weight(), &magnitude).map_err(wrap)?;
        self.changeable(name, "set_magnitude")?;
        if self.b_bias(name).is_some() {
            return Err(wrap(of_both("set_magnitude", name, "a bias on B")));
        }
        if let Some(adapter) = self.adapters.get_mut(name) {
            adapter.magnitude = Some(magnitude);
        }
        Ok(())
    }

    fn changeable(&self, name: &str, operation: &'static str) -> Result<()> {
        self.known(name)?;
        if self.active() == Some(name) { self.check_unmerged(operation) } else { Ok(()) }
    }

    /// Takes an adapter out of the layer: A, B and the scale; [`b_bias`](Self::b_bias) and [`magnitude`](Self::magnitude) before, where
    /// it has them.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] while it is active.
    pub fn remove(&mut self, name: &str) -> Result<(Tensor, Tensor, f64)> {
        self.known(name)?;
        if self.active() == Some(name) {
            let got = format!("adapter `{name}` is active");
            return Err(wrap(Error::State { operation: "remove", got, expected: "another `activate` first" }));
        }
        let Some(Adapter { a, b, scale, .. }) = self.adapters.remove(name) else {
            return Err(wrap(self.unknown(name)));
        };
        // `enable` finds none then.
        self.active.take_if(|active| active == name);
        Ok((a, b, scale))
    }

    /// Lets one adapter take part, instead of the one that does. No data moves.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] while one is merged.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        self.check_unmerged("activate")?;
        self.known(name)?;
        self.active = Some(name.to_owned());
        self.enabled = true;
        Ok(())
    }

    /// Lets no adapter take part until [`enable`](Self::enable) or [`activate`](Self::activate): forward is the plain product.
    ///
    /// # Errors
    /// [`Error::State`] while one is merged.
    pub fn disable(&mut self) -> Result<()> {
        self.check_unmerged("disable")?;
        self.enabled = false;
        Ok(())
    }

    /// Lets the adapter that was active before [`disable`](Self::disable) take part again.
    pub fn enable(&mut self) {
        self.enabled = true;
    }

    /// Folds the active adapter into a second weight, W + s · B A, with DoRA times its gain, formed in f32 and rounded once to W's
    /// type, and a second bias where it has its own. W is kept, for [`unmerge`](Self::unmerge). Until then forward is the plain
    /// product by the second weight, and the adapter and the bias get no gradient.
    ///
    /// # Errors
    /// [`Error::State`] when no adapter is active or one is merged already; candle's. The layer is as before then.
    pub fn merge(&mut self) -> Result<()> {
        self.check_unmerged("merge")?;
        let Some(adapter) = self.takes_part() else {
            let got = "no adapter is active".to_owned();
            return Err(wrap(Error::State { operation: "merge", got, expected: "`activate` first" }));
        };
        let weight = self.base.linear.weight();
        let mut merged = self.base.folded(&adapter.a, &adapter.b, adapter.scale)?;
        if let Some(magnitude) = &adapter.magnitude {
            let norm = merged.sqr()?.sum_keepdim(1)?.sqrt()?;
            let gain = (magnitude.detach().to_dtype(DType::F32)?.unsqueeze(1)? / norm)?;
            merged = merged.broadcast_mul(&gain)?;
        }
        let merged = merged.to_dtype(weight.dtype())?;
        let bias = self.base.bias_with(adapter)?.map(|bias| bias.detach().to_dtype(weight.dtype())).transpose()?;
        self.merged = Some(Base { linear: Linear::new(merged, None), bias });
        Ok(())
    }

    /// Forward with the adapter beside W again, which has the bits that it had before [`merge`](Self::merge): it was kept.
    ///
    /// # Errors
    /// [`Error::State`] when nothing is merged.
    pub fn unmerge(&mut self) -> Result<()> {
        let got = "no adapter is merged".to_owned();
        let state = Error::State { operation: "unmerge", got, expected: "`merge` first" };
        self.merged.take().map(drop).ok_or_else(|| wrap(state))
    }

    /// W, or W + s · B A while that is merged: N × K.
    pub fn weight(&self) -> &Tensor {
        self.merged.as_ref().unwrap_or(&self.base).linear.weight()
    }

    /// The bias, or that with the adapter's while it is merged: N.
    pub fn bias(&self) -> Option<&Tensor> {
        self.merged.as_ref().unwrap_or(&self.base).bias.as_ref()
    }

    /// The name of the adapter that takes part.
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref().filter(|_| self.enabled)
    }

    /// Whether the active adapter is merged.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The names of the adapters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// A, B and the scale of an adapter.
    pub fn adapter(&self, name: &str) -> Option<(&Tensor, &Tensor, f64)> {
        self.adapters.get(name).map(|Adapter { a, b, scale, .. }| (a, b, *scale))
    }

    /// The bias that B of an adapter has.
    pub fn b_bias(&self, name: &str) -> Option<&Tensor> {
        self.adapters.get(name).and_then(|adapter| adapter.b_bias.as_ref())
    }

    /// The magnitude that an adapter of DoRA has.
    pub fn magnitude(&self, name: &str) -> Option<&Tensor> {
        self.adapters.get(name).and_then(|adapter| adapter.magnitude.as_ref())
    }

    fn takes_part(&self) -> Option<&Adapter> {
        self.active().and_then(|name| self.adapters.get(name))
    }

    pub(super) fn get(&self, name: &str) -> Option<&Adapter> {
        self.adapters.get(name)
    }

    pub(super) fn known(&self, name: &str) -> Result<&Adapter> {
        self.get(name).ok_or_else(|| wrap(self.unknown(name)))
    }

    fn unknown(&self, name: &str) -> Error {
        let names: Vec<String> = self.names().map(|name| format!("{name:?}")).collect();
        let expected = if names.is_empty() { "none: the layer has no adapter".into() } else { names.join(" or ") };
        Error::AdapterName { got: name.to_owned(), expected }
    }

    fn new_name(&self, name: &str) -> Result<()> {
        if !self.adapters.contains_key(name) {
            return Ok(());
        }
        let expected = "one that the layer does not have".to_owned();
        Err(wrap(Error::AdapterName { got: name.to_owned(), expected }))
    }

    pub(super) fn check_unmerged(&self, operation: &'static str) -> Result<()> {
        if self.merged.is_none() {
            return Ok(());
        }
        let got = format!("`{}` is merged", self.active().unwrap_or_default());
        Err(wrap(Error::State { operation, got, expected: "`unmerge` first" }))
    }
}

impl LoraLinear {
    /// Forward for inference, x of … × K, two dimensions or more, to … × N: nothing is dropped.
    ///
    /// # Errors
    /// As [`lora`](super::lora), and candle's.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_t(x, false)
    }

    pub(super) fn modes(&self) -> &Modes {
        &self.modes
    }

    /// The adapter that is computed beside W.
    pub(super) fn beside(&self) -> Option<&Adapter> {
        if self.is_merged() { None } else { self.takes_part() }
    }

    pub(super) fn bias_with(&self, adapter: &Adapter) -> Result<Option<Tensor>> {
        self.base.bias_with(adapter)
    }

    /// By the weight alone.
    pub(super) fn plain(&self, x: &Tensor) -> Result<Tensor> {
        self.merged.as_ref().unwrap_or(&self.base).forward(x)
    }
}

impl ModuleT for LoraLinear {
    /// As [`LoraLinear::forward`], with dropout where `train` is set.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let y = projections::forward(&[self], x, self.modes.pass(train))?.pop();
        y.map_or_else(|| self.plain(x), Ok)
    }
}

/// A bias on B and a magnitude rule each other out, as in PEFT.
fn of_both(operation: &'static str, name: &str, has: &str) -> Error {
    let got = format!("adapter `{name}` has {has}");
    Error::State {
        operation,
        got,
        expected: "an adapter without: a bias on B and a magnitude are not computed together",
    }
}
