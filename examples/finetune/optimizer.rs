//! AdamW and SGD with torch's semantics, and with state that can be saved. candle-nn's AdamW keeps its state to itself and
//! its SGD has no momentum.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::common::adapters::Parameter;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Decoupled weight decay, bias correction, eps outside the square root.
    AdamW { beta1: f64, beta2: f64, eps: f64 },
    /// Weight decay is part of the gradient; the first buffer is the first gradient.
    Sgd { momentum: f64 },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub rule: Rule,
    pub lr: f64,
    pub weight_decay: f64,
}

pub struct Optimizer {
    settings: Settings,
    /// Steps made, for the bias correction.
    pub steps: usize,
    /// By "first.", "second." or "momentum." and the parameter's name; absent is zero.
    pub state: BTreeMap<String, Tensor>,
}

impl Optimizer {
    pub fn new(settings: Settings) -> Self {
        Self { settings, steps: 0, state: BTreeMap::new() }
    }

    /// The kinds of state that each parameter has after a step.
    pub fn kinds(&self) -> &'static [&'static str] {
        match self.settings.rule {
            Rule::AdamW { .. } => &["first", "second"],
            Rule::Sgd { momentum } if momentum != 0.0 => &["momentum"],
            Rule::Sgd { .. } => &[],
        }
    }

    /// One step; `gradients` in the order of `parameters`.
    pub fn step(&mut self, parameters: &[Parameter], gradients: &[Tensor]) -> Result<()> {
        self.steps += 1;
        for (parameter, gradient) in parameters.iter().zip(gradients) {
            let value = parameter.var.as_detached_tensor();
            let next = match self.settings.rule {
                Rule::AdamW { beta1, beta2, eps } => {
                    self.adamw(&parameter.name, &value, gradient, (beta1, beta2), eps)?
                }
                Rule::Sgd { momentum } => self.sgd(&parameter.name, &value, gradient, momentum)?,
            };
            parameter.var.set(&next)?;
        }
        Ok(())
    }

    fn adamw(
        &mut self,
        name: &str,
        value: &Tensor,
        gradient: &Tensor,
        (beta1, beta2): (f64, f64),
        eps: f64,
    ) -> Result<Tensor> {
        let Settings { lr, weight_decay, .. } = self.settings;
        let first = self.blend(&format!("first.{name}"), beta1, gradient)?;
        let second = self.blend(&format!("second.{name}"), beta2, &gradient.sqr()?)?;
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let root = ((second.sqrt()? / correction(beta2).sqrt())? + eps)?;
        let change = ((first / root)? * (lr / correction(beta1)))?;
        (value * (1.0 - lr * weight_decay))? - change
    }

    /// β · state + (1 − β) · new, which is kept.
    fn blend(&mut self, key: &str, beta: f64, new: &Tensor) -> Result<Tensor> {
        let new = (new * (1.0 - beta))?;
        let blended = match self.state.get(key) {
            Some(old) => ((old * beta)? + new)?,
            None => new,
        };
        self.state.insert(key.into(), blended.clone());
        Ok(blended)
    }

    fn sgd(&mut self, name: &str, value: &Tensor, gradient: &Tensor, momentum: f64) -> Result<Tensor> {
        let Settings { lr, weight_decay, .. } = self.settings;
        let mut change = gradient.clone();
        if weight_decay != 0.0 {
            change = (change + (value * weight_decay)?)?;
        }
        if momentum != 0.0 {
            let key = format!("momentum.{name}");
            if let Some(old) = self.state.get(&key) {
                change = (change + (old * momentum)?)?;
            }
            self.state.insert(key, change.clone());
        }
        value - (change * lr)?
    }
}
