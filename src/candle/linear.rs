//! A frozen linear layer with adapters, as a candle module.

use std::collections::BTreeMap;

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, Linear, VarBuilder, init};

use super::view::addressable;
use super::{check, lora, wrap};
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
/// W and bias are frozen. Adapters have names; at most one takes part, chosen by [`activate`](Self::activate). A and B are
/// whatever tensors they were added as: variables of a `VarMap`, a [`Var`](candle_core::Var)'s tensor, or constants. A layer
/// without dropout: PEFT's `lora_dropout` is not offered.
///
/// Without an active adapter, and while one is merged, forward is that of `candle_nn::Linear`, for x of more than four dimensions
/// as well.
#[derive(Clone, Debug)]
pub struct LoraLinear {
    base: Linear,
    adapters: BTreeMap<String, Adapter>,
    active: Option<String>,
    enabled: bool,
    /// W + s · B A of the active adapter.
    merged: Option<Linear>,
}

#[derive(Clone, Debug)]
struct Adapter {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

/// The adapter of a layer that was made with one, as PEFT calls it.
const DEFAULT: &str = "default";

impl LoraLinear {
    /// A layer with one active adapter, `default`, made by [`add`](Self::add). `weight` is N × K, `bias` N; both are frozen.
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

    /// A layer without an adapter. A weight that lies transposed is copied.
    ///
    /// # Errors
    /// [`Error::Tracked`] for a weight or bias that gradients are asked of; [`Error::Rank`], [`Error::Dimension`],
    /// [`Error::ArgumentDtype`].
    pub fn frozen(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        check::base(&weight, bias.as_ref()).map_err(wrap)?;
        // Once, instead of in every forward.
        let base = Linear::new(addressable(&weight)?, bias);
        Ok(Self { base, adapters: BTreeMap::new(), active: None, enabled: true, merged: None })
    }

    /// Adds an adapter from `vb`, in its dtype (that of the weight, or f32): `lora_A.weight` (R × K) and `lora_B.weight` (N × R),
    /// PEFT's names. What a `VarMap` does not hold yet starts as PEFT's: A Kaiming-uniform with a = √5, B zero.
    ///
    /// # Errors
    /// As [`add_tensors`](Self::add_tensors), and what `vb` refuses. A `VarMap` may hold new variables then; the layer is as
    /// before.
    pub fn add(&mut self, name: &str, config: LoraConfig, vb: VarBuilder) -> Result<()> {
        let (n, k) = self.base.weight().dims2()?;
        let r = config.r;
        if r == 0 {
            return Err(wrap(Error::ZeroDimension { arg: "a", axis: "rows" }));
        }
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
        check::adapter(self.base.weight(), &a, &b).and_then(|()| check::scale(scale)).map_err(wrap)?;
        self.adapters.insert(name.to_owned(), Adapter { a, b, scale });
        Ok(())
    }

    /// Takes an adapter out of the layer.
    ///
    /// # Errors
    /// [`Error::AdapterName`]; [`Error::State`] while it is active.
    pub fn remove(&mut self, name: &str) -> Result<(Tensor, Tensor, f64)> {
        self.known_name(name)?;
        if self.active() == Some(name) {
            let got = format!("adapter `{name}` is active");
            return Err(wrap(Error::State { operation: "remove", got, expected: "another `activate` first" }));
        }
        let Some(Adapter { a, b, scale }) = self.adapters.remove(name) else { return Err(wrap(self.unknown(name))) };
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
        self.known_name(name)?;
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

    /// Folds the active adapter into a second weight, W + s · B A, formed in f32 and rounded once to W's type. W is kept, for
    /// [`unmerge`](Self::unmerge). Until then forward is the plain product by the second weight, and A and B get no gradient.
    ///
    /// # Errors
    /// [`Error::State`] when no adapter is active or one is merged already; candle's. The layer is as before then.
    pub fn merge(&mut self) -> Result<()> {
        self.check_unmerged("merge")?;
        let Some(Adapter { a, b, scale }) = self.takes_part() else {
            let got = "no adapter is active".to_owned();
            return Err(wrap(Error::State { operation: "merge", got, expected: "`activate` first" }));
        };
        let f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        let weight = self.base.weight();
        let delta = f32(b)?.matmul(&f32(a)?)?.affine(*scale, 0.0)?;
        let merged = (f32(weight)? + delta)?.to_dtype(weight.dtype())?;
        self.merged = Some(Linear::new(merged, self.base.bias().cloned()));
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
        self.merged.as_ref().unwrap_or(&self.base).weight()
    }

    /// The bias: N.
    pub fn bias(&self) -> Option<&Tensor> {
        self.base.bias()
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
        self.adapters.get(name).map(|Adapter { a, b, scale }| (a, b, *scale))
    }

    fn takes_part(&self) -> Option<&Adapter> {
        self.active().and_then(|name| self.adapters.get(name))
    }

    fn known_name(&self, name: &str) -> Result<()> {
        if self.adapters.contains_key(name) { Ok(()) } else { Err(wrap(self.unknown(name))) }
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

    fn check_unmerged(&self, operation: &'static str) -> Result<()> {
        if self.merged.is_none() {
            return Ok(());
        }
        let got = format!("`{}` is merged", self.active().unwrap_or_default());
        Err(wrap(Error::State { operation, got, expected: "`unmerge` first" }))
    }
}

impl Module for LoraLinear {
    /// x of … × K, two dimensions or more, to … × N.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (&self.merged, self.takes_part()) {
            (Some(merged), _) => plain(merged, x),
            (None, Some(Adapter { a, b, scale })) => lora(x, self.base.weight(), a, b, *scale, self.base.bias()),
            (None, None) => plain(&self.base, x),
        }
    }
}

/// candle's linear layer knows at most four dimensions.
fn plain(linear: &Linear, x: &Tensor) -> Result<Tensor> {
    match x.dims() {
        [tokens @ .., _] if tokens.len() > 3 => {
            let y = linear.forward(&x.flatten(0, tokens.len() - 1)?)?;
            y.reshape([tokens, &[linear.weight().dim(0)?]].concat())
        }
        _ => linear.forward(x),
    }
}
