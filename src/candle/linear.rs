//! A frozen linear layer with adapters, as a candle module.

use std::collections::BTreeMap;

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, Linear, VarBuilder, init};

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

/// y = x Wᵀ + s · (x Aᵀ) Bᵀ (+ bias): what replaces a `candle_nn::Linear`.
#[derive(Clone, Debug)]
pub struct LoraLinear {
    base: Linear,
    adapters: BTreeMap<String, Adapter>,
    active: Option<String>,
    enabled: bool,
    merged: Option<Linear>,
}

#[derive(Clone, Debug)]
struct Adapter {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

impl LoraLinear {
    /// A layer with one adapter, named `default`, from `vb`: `lora_A.weight` (R × K) and `lora_B.weight` (N × R), as PEFT
    /// names them. Variables that a `VarMap` does not hold yet start as PEFT's: A Kaiming-uniform with a = √5, B zero.
    ///
    /// `weight` is N × K, `bias` N, both frozen; the adapter is of `vb`'s dtype, which is that of `weight` or f32.
    ///
    /// # Errors
    /// As [`frozen`](Self::frozen) and [`add`](Self::add).
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: LoraConfig, vb: VarBuilder) -> Result<Self> {
        let mut layer = Self::frozen(weight, bias)?;
        layer.add("default", config, vb)?;
        Ok(layer)
    }

    /// A layer with one adapter, named `default`, of tensors that are there: `a` R × K and `b` N × R, variables or not.
    ///
    /// # Errors
    /// As [`frozen`](Self::frozen) and [`add_tensors`](Self::add_tensors).
    pub fn from_tensors(weight: Tensor, bias: Option<Tensor>, a: Tensor, b: Tensor, scale: f64) -> Result<Self> {
        let mut layer = Self::frozen(weight, bias)?;
        layer.add_tensors("default", a, b, scale)?;
        Ok(layer)
    }

    /// A layer without an adapter.
    ///
    /// # Errors
    /// [`Error::Tracked`] for a weight or bias that gradients are asked of, [`Error::Rank`], [`Error::Dimension`],
    /// [`Error::ArgumentDtype`].
    pub fn frozen(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        check::base(&weight, bias.as_ref()).map_err(wrap)?;
        let base = Linear::new(weight, bias);
        Ok(Self { base, adapters: BTreeMap::new(), active: None, enabled: true, merged: None })
    }

    /// One more adapter, from `vb` as in [`new`](Self::new). The first one is active; another becomes so by
    /// [`activate`](Self::activate).
    ///
    /// # Errors
    /// As [`add_tensors`](Self::add_tensors), and what `vb` refuses.
    pub fn add(&mut self, name: &str, config: LoraConfig, vb: VarBuilder) -> Result<()> {
        let (n, k) = self.base.weight().dims2()?;
        let r = config.r;
        if r == 0 {
            return Err(wrap(Error::ZeroDimension { arg: "a", axis: "rows" }));
        }
        // Kaiming-uniform with a = √5: a gain of √(2 / (1 + a²)), which makes the bound 1/√K.
        let kaiming = Init::Kaiming {
            dist: init::NormalOrUniform::Uniform,
            fan: init::FanInOut::FanIn,
            non_linearity: init::NonLinearity::ExplicitGain((1.0f64 / 3.0).sqrt()),
        };
        let a = vb.get_with_hints((r, k), "lora_A.weight", kaiming)?;
        let b = vb.get_with_hints((n, r), "lora_B.weight", init::ZERO)?;
        self.add_tensors(name, a, b, config.scale())
    }

    /// One more adapter: `a` R × K and `b` N × R, of the weight's dtype or f32; `scale` is α/r or α/√r
    /// ([`LoraConfig::scale`]).
    ///
    /// # Errors
    /// [`Error::AdapterExists`]; [`Error::Rank`], [`Error::Dimension`], [`Error::ZeroDimension`], [`Error::ArgumentDtype`],
    /// [`Error::Scale`].
    pub fn add_tensors(&mut self, name: &str, a: Tensor, b: Tensor, scale: f64) -> Result<()> {
        check::adapter(self.base.weight(), &a, &b).map_err(wrap)?;
        if !(scale as f32).is_finite() {
            return Err(wrap(Error::Scale { got: scale as f32 }));
        }
        if self.adapters.contains_key(name) {
            return Err(wrap(Error::AdapterExists { name: name.to_owned() }));
        }
        self.adapters.insert(name.to_owned(), Adapter { a, b, scale });
        self.active.get_or_insert_with(|| name.to_owned());
        Ok(())
    }

    /// Drops an adapter. After the active one none is active.
    ///
    /// # Errors
    /// [`Error::NoAdapter`]; [`Error::Merged`] for the active one while it is merged.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.known(name)?;
        if self.active() == Some(name) {
            self.not_merged()?;
            self.active = None;
        }
        self.adapters.remove(name);
        Ok(())
    }

    /// Computes with adapter `name` from now on.
    ///
    /// # Errors
    /// [`Error::NoAdapter`]; [`Error::Merged`] while an adapter is merged.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        self.known(name)?;
        self.not_merged()?;
        self.active = Some(name.to_owned());
        Ok(())
    }

    /// Computes with the active adapter again.
    pub fn enable(&mut self) {
        self.enabled = true;
    }

    /// Computes x Wᵀ + bias alone until [`enable`](Self::enable).
    pub fn disable(&mut self) {
        self.enabled = false;
    }

    /// Computes with W + s · B A, one product, until [`unmerge`](Self::unmerge): for inference, as A and B get no gradient.
    /// The sum is formed in f32 and rounded once to the weight's type. W is kept: while merged both take memory.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where none is active; [`Error::Merged`] where it is merged already.
    pub fn merge(&mut self) -> Result<()> {
        self.not_merged()?;
        let Some(Adapter { a, b, scale }) = self.active.as_ref().and_then(|name| self.adapters.get(name)) else {
            return Err(wrap(self.no_adapter("")));
        };
        let f32 = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        let weight = self.base.weight();
        let delta = f32(b)?.matmul(&f32(a)?)?.affine(*scale, 0.0)?;
        let merged = (f32(weight)? + delta)?.to_dtype(weight.dtype())?;
        self.merged = Some(Linear::new(merged, self.base.bias().cloned()));
        Ok(())
    }

    /// Computes with W and the adapter apart again. W was kept, so its bits are those from before [`merge`](Self::merge).
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// N × K; W + s · B A while merged.
    pub fn weight(&self) -> &Tensor {
        self.merged.as_ref().unwrap_or(&self.base).weight()
    }

    /// N.
    pub fn bias(&self) -> Option<&Tensor> {
        self.base.bias()
    }

    /// The name of the active adapter.
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// Whether [`disable`](Self::disable) was not called since [`enable`](Self::enable).
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Whether the active adapter is merged.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// The adapters' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// Adapter `name`: A, B and the scale.
    pub fn adapter(&self, name: &str) -> Option<(&Tensor, &Tensor, f64)> {
        self.adapters.get(name).map(|Adapter { a, b, scale }| (a, b, *scale))
    }

    fn known(&self, name: &str) -> Result<()> {
        if self.adapters.contains_key(name) { Ok(()) } else { Err(wrap(self.no_adapter(name))) }
    }

    fn no_adapter(&self, got: &str) -> Error {
        let known = self.names().collect::<Vec<_>>().join(", ");
        Error::NoAdapter { got: got.to_owned(), known }
    }

    fn not_merged(&self) -> Result<()> {
        match (&self.merged, &self.active) {
            (Some(_), Some(name)) => Err(wrap(Error::Merged { name: name.clone() })),
            _ => Ok(()),
        }
    }
}

impl Module for LoraLinear {
    /// x of … × K, two dimensions or more, to … × N.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let active = self.active.as_ref().and_then(|name| self.adapters.get(name));
        match (&self.merged, active) {
            _ if !self.enabled => self.base.forward(x),
            (Some(merged), _) => merged.forward(x),
            (None, Some(Adapter { a, b, scale })) => lora(x, self.base.weight(), a, b, *scale, self.base.bias()),
            (None, None) => self.base.forward(x),
        }
    }
}
