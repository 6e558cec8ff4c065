//! The loop: a batch, its loss, its gradients, a step; and the state saved between.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Result as Computed, Tensor};
use serde_json::Value;

use super::checkpoint::State;
use super::common::adapters::Adapter;
use super::common::adapters::Parameter;
use super::common::failure::{Failure, Result};
use super::common::llama::{Llama, counted};
use super::data::{Batch, Data};
use super::history::{History, Record};
use super::optimizer::Optimizer;
use super::progress::{Progress, Streams};

/// A model with an adapter in training.
pub struct Training {
    pub model: Llama,
    pub parameters: Vec<Parameter>,
    pub optimizer: Optimizer,
    pub data: Data,
    /// Batches per step.
    pub accumulate: usize,
    /// What made tokens of text.
    pub tokens: &'static str,
    /// The same values as the parameters, with the config.
    pub adapter: Adapter,
    pub history: History,
    pub device: Device,
    /// What a resumed run must have in common with this one.
    pub settings: Value,
    pub out: PathBuf,
    /// Steps between checkpoints, 0 for none.
    pub checkpoint: usize,
    /// Factor of the loss before backward, so that f16 gradients do not vanish, and the steps since it last changed.
    pub loss_scale: (f64, usize),
}

/// How a run ended, when it did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    Interrupted,
}

/// torch's GradScaler: start, and steps without overflow after which the factor doubles.
const F16_LOSS_SCALE: f64 = 65536.0;
const F16_GROWTH_STEPS: usize = 2000;

impl Training {
    /// The loss scale that a run of this type starts with.
    pub fn first_loss_scale(dtype: DType) -> (f64, usize) {
        (if dtype == DType::F16 { F16_LOSS_SCALE } else { 1.0 }, 0)
    }

    /// Steps from where the history ends up to `steps`; stops early, after saving, once `interrupt` is set.
    pub fn run(&mut self, steps: usize, json: bool, interrupt: &AtomicBool, streams: &mut Streams<'_>) -> Result<End> {
        let mut progress = Progress::new(steps, self.history.0.len(), json, streams);
        let mut end = End::Done;
        for step in self.history.0.len()..steps {
            if interrupt.load(Ordering::Relaxed) {
                end = End::Interrupted;
                break;
            }
            let record = self.step(step)?;
            self.history.0.push(record);
            if let Err(failure) = progress.step(step, &record, streams) {
                self.save()?; // whoever read along is gone, the work need not be
                return Err(failure);
            }
            if self.checkpoint != 0 && (step + 1).is_multiple_of(self.checkpoint) && step + 1 < steps {
                self.save()?;
            }
        }
        progress.finish(streams)?;
        self.save()?;
        Ok(end)
    }

    /// The checkpoint and the curve.
    fn save(&mut self) -> Result<()> {
        let settings = self.settings.clone();
        let out = self.out.clone();
        self.state().save(&out, &settings)?;
        self.history.save(&out)
    }

    pub fn resume(&mut self) -> Result<()> {
        let (settings, out, device) = (self.settings.clone(), self.out.clone(), self.device.clone());
        self.state().restore(&out, &settings, &device)
    }

    fn state(&mut self) -> State<'_> {
        State {
            parameters: &self.parameters,
            optimizer: &mut self.optimizer,
            history: &mut self.history,
            loss_scale: &mut self.loss_scale,
        }
    }

    fn step(&mut self, step: usize) -> Result<Record> {
        let began = Instant::now();
        let passes = step * self.accumulate..(step + 1) * self.accumulate;
        let batches: Vec<(usize, Batch)> = passes.map(|pass| (pass, self.data.batch(pass))).collect();
        let tokens: usize = batches.iter().map(|(_, batch)| batch.ids.len()).sum();
        let (gradients, loss) = self.accumulated(&batches)?;
        let grad_norm = norm(&gradients)?;
        let diverged = |what: &str, value: f64| Err(Failure::Diverged { step, problem: format!("{what} is {value}") });
        if !loss.is_finite() {
            return diverged("the loss", loss);
        }
        if grad_norm.is_finite() {
            self.optimizer.step(&self.parameters, &gradients)?;
        } else if self.model.dtype() != DType::F16 || self.loss_scale.0 < f64::MIN_POSITIVE * 2.0 {
            return diverged("the norm of the gradients", grad_norm);
        }
        self.adapt_loss_scale(grad_norm.is_finite());
        self.device.synchronize()?;
        let tokens_per_second = tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
        Ok(Record { loss, grad_norm, tokens_per_second })
    }

    /// The gradients and the mean loss over all labels of the batches, one graph at a time. A batch's number is that of its pass.
    fn accumulated(&self, batches: &[(usize, Batch)]) -> Result<(Vec<Tensor>, f64)> {
        let (batch_size, seq) = (self.data.batch, self.data.seq);
        let labels = |batch: &Batch| counted(&batch.labels, seq).count() as f64;
        let all: f64 = batches.iter().map(|(_, batch)| labels(batch)).sum();
        let (mut sums, mut mean) = (Vec::new(), 0.0);
        for (pass, batch) in batches {
            let share = labels(batch) / all;
            let loss = self.model.loss(&batch.ids, &batch.labels, (batch_size, seq), *pass as u64)?;
            let gradients = self.gradients(&loss, share)?;
            mean += share * f64::from(loss.to_scalar::<f32>()?);
            sums = if sums.is_empty() {
                gradients
            } else {
                sums.iter().zip(&gradients).map(|(sum, gradient)| sum + gradient).collect::<Computed<_>>()?
            };
        }
        Ok((sums, mean))
    }

    /// The gradient of each parameter, in f32, of `share` times the loss.
    fn gradients(&self, loss: &Tensor, share: f64) -> Result<Vec<Tensor>> {
        let times = |tensor: &Tensor, factor: f64| if factor == 1.0 { Ok(tensor.clone()) } else { tensor * factor };
        let scale = self.loss_scale.0;
        let store = times(loss, scale * share)?.backward()?;
        let gradient = |Parameter { name, var }: &Parameter| {
            let gradient = store.get(var).ok_or_else(|| Failure::NotBuilt(format!("a gradient of `{name}`")))?;
            Ok(times(gradient, 1.0 / scale)?)
        };
        self.parameters.iter().map(gradient).collect()
    }

    fn adapt_loss_scale(&mut self, finite: bool) {
        if self.model.dtype() != DType::F16 {
            return;
        }
        let (scale, age) = &mut self.loss_scale;
        *age += 1;
        if !finite {
            (*scale, *age) = (*scale / 2.0, 0);
        } else if *age == F16_GROWTH_STEPS {
            (*scale, *age) = (*scale * 2.0, 0);
        }
    }
}

/// The L2 norm of all.
fn norm(gradients: &[Tensor]) -> Result<f64> {
    let squares = gradients.iter().map(|gradient| gradient.sqr()?.sum_all()).collect::<Computed<Vec<_>>>()?;
    let squares: Vec<f32> = Tensor::stack(&squares, 0)?.to_vec1()?;
    Ok(squares.iter().map(|&square| f64::from(square)).sum::<f64>().sqrt())
}
