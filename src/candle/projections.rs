//! Layers that share x, as one module; a layer alone is the case of one.

use candle_core::{Result, Tensor};

use super::linear::{Adapter, LoraLinear};
use super::modes::{Modes, Passes};
use super::op::{Masks, Pass, Projection, apply};
use super::{check, wrap};
use crate::error::Error;

/// Layers that share x, as q, k and v of attention or gate and up of a feed-forward block do: what [`lora_shared`](super::lora_shared)
/// computes of them, forward of all in one launch and backward in one.
///
/// Each layer has its own W, N, bias and adapters, and whatever a [`LoraLinear`] can. Those without an active adapter, and those that
/// are merged, are computed by themselves, by candle's product. Rows of one fused weight are a layer each:
/// [`Tensor::narrow`] of it copies nothing.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use fused_lora::candle::{LoraConfig, LoraLinear, LoraProjections};
///
/// let (vars, device) = (VarMap::new(), Device::Cpu);
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
/// let w = Tensor::randn(0f32, 0.1, (16, 8), &device)?; // q, k and v in one
/// let config = LoraConfig { r: 2, alpha: 4.0, rslora: false };
/// let layer = |name, first, n| LoraLinear::new(w.narrow(0, first, n)?, None, config, vb.pp(name));
/// let qkv = LoraProjections::new([layer("q", 0, 8)?, layer("k", 8, 4)?, layer("v", 12, 4)?])?.with_dropout(0.1, 42)?;
///
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 8), &device)?;
/// let [q, k, v] = qkv.forward_t(&x, true)?;
/// assert_eq!((q.dims(), k.dims(), v.dims()), (&[2, 5, 8][..], &[2, 5, 4][..], &[2, 5, 4][..]));
/// # candle_core::Result::Ok(())
/// ```
#[derive(Clone, Debug)]
pub struct LoraProjections<const P: usize> {
    layers: [LoraLinear; P],
    modes: Modes,
}

impl<const P: usize> LoraProjections<P> {
    /// Layers of one K and dtype. Dropout, recomputing and full precision are the group's to have, not theirs.
    ///
    /// # Errors
    /// [`Error::Projections`] for none and for more than [`MAX_PROJECTIONS`](crate::raw::MAX_PROJECTIONS); [`Error::Dimension`] and
    /// [`Error::ArgumentDtype`] for a W of another K or dtype than the first's; [`Error::State`] for a layer with dropout, one that
    /// recomputes, or one at full precision, which it names by its number.
    pub fn new(layers: [LoraLinear; P]) -> Result<Self> {
        check_layers("new", &layers)?;
        Ok(Self { layers, modes: Modes::default() })
    }

    /// As [`LoraLinear::with_dropout`], with one mask for all layers; PEFT draws one for each.
    ///
    /// # Errors
    /// [`Error::Probability`] unless `p` is from 0 to 1.
    pub fn with_dropout(mut self, p: f32, seed: u64) -> Result<Self> {
        self.modes.dropout = Some(Passes::new(p, seed).map_err(wrap)?);
        Ok(self)
    }

    /// As [`LoraLinear::with_recompute`].
    #[must_use]
    pub fn with_recompute(mut self) -> Self {
        self.modes.recompute = true;
        self
    }

    /// As [`LoraLinear::with_full_precision`].
    #[must_use]
    pub fn with_full_precision(mut self) -> Self {
        self.modes.full_precision = true;
        self
    }

    /// Training passes with dropout so far, of this group and its clones.
    pub fn passes(&self) -> u64 {
        self.modes.passes()
    }

    /// As [`LoraLinear::set_passes`].
    pub fn set_passes(&self, passes: u64) {
        self.modes.set_passes(passes);
    }

    /// The layers.
    pub fn layers(&self) -> &[LoraLinear; P] {
        &self.layers
    }

    /// The layers, to be changed; forward asks of them what [`new`](Self::new) does.
    pub fn layers_mut(&mut self) -> &mut [LoraLinear; P] {
        &mut self.layers
    }

    /// Forward for inference, x of … × K, two dimensions or more, to … × N of each layer: nothing is dropped.
    ///
    /// # Errors
    /// As [`lora_shared`](super::lora_shared), and candle's; those of [`new`](Self::new).
    pub fn forward(&self, x: &Tensor) -> Result<[Tensor; P]> {
        self.forward_t(x, false)
    }

    /// As [`forward`](Self::forward), with dropout where `train` is set.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::State`] for dropout where a layer's adapter has a magnitude (DoRA).
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<[Tensor; P]> {
        check_layers("forward_t", &self.layers)?;
        let ys = forward(&self.layers.each_ref(), x, self.modes.pass(train))?;
        ys.try_into().map_err(|ys: Vec<_>| wrap(Error::Projections { got: ys.len(), limit: P }))
    }
}

/// One K and dtype, and nothing by itself that is the group's to have, or that a group has not.
fn check_layers<const P: usize>(operation: &'static str, layers: &[LoraLinear; P]) -> Result<()> {
    check::weights(&layers.each_ref().map(LoraLinear::weight)).map_err(wrap)?;
    for (at, layer) in layers.iter().enumerate() {
        let expected = "layers that do not, and the same of the group";
        let what = match layer.modes() {
            Modes { recompute: true, .. } => "recomputes",
            Modes { dropout: Some(_), .. } => "has dropout",
            Modes { full_precision: true, .. } => "is at full precision",
            _ => continue,
        };
        let got = format!("layer {at} {what} by itself");
        return Err(wrap(Error::State { operation, got, expected }));
    }
    Ok(())
}

/// Those that have an adapter beside W in one, the others by themselves.
pub(super) fn forward(layers: &[&LoraLinear], x: &Tensor, pass: Pass<'_>) -> Result<Vec<Tensor>> {
    let mut beside = Vec::with_capacity(layers.len());
    for (at, layer) in layers.iter().enumerate() {
        let Some(adapter) = layer.beside() else { continue };
        let p = pass.masks.map_or(0.0, Masks::p);
        if adapter.magnitude.is_some() && p != 0.0 {
            let place = if layers.len() > 1 { format!("in layer {at} ") } else { String::new() };
            let name = layer.active().unwrap_or_default();
            let got = format!("{place}adapter `{name}` has a magnitude (DoRA) and dropout is {p}");
            let expected = "dropout of 0: together they are not computed";
            return Err(wrap(Error::State { operation: "forward_t", got, expected }));
        }
        beside.push((layer.weight(), adapter, layer.bias_with(adapter)?));
    }
    let projections = beside.iter().map(|(w, adapter, bias)| {
        let Adapter { a, b, magnitude, scale, .. } = adapter;
        Projection { w, a, b, scale: *scale, bias: bias.as_ref(), magnitude: magnitude.as_ref() }
    });
    let projections: Vec<_> = projections.collect();
    let together = match projections[..] {
        [] => Vec::new(),
        _ => apply(x, &projections, None, pass)?,
    };
    let mut together = together.into_iter();
    let y = |layer: &&LoraLinear| match layer.beside().and_then(|_| together.next()) {
        Some(y) => Ok(y),
        None => layer.plain(x),
    };
    layers.iter().map(y).collect()
}
