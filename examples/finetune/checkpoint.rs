//! A run's state in one safetensors file, replaced as a whole: adapter, optimiser, loss curve, and the settings that a resumed
//! run must share.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use super::common::adapters::Parameter;
use super::common::failure::{Failure, Result};
use super::history::{History, Record};
use super::optimizer::Optimizer;

pub const FILE: &str = "checkpoint.safetensors";
const METADATA: &str = "finetune";
const HISTORY: &str = "history";

/// Everything that changes from step to step.
pub struct State<'a> {
    pub parameters: &'a [Parameter],
    pub optimizer: &'a mut Optimizer,
    pub history: &'a mut History,
    /// Factor of the loss before backward, and the steps since it last changed.
    pub loss_scale: &'a mut (f64, usize),
}

impl State<'_> {
    pub fn save(&self, directory: &Path, settings: &Value) -> Result<()> {
        let path = directory.join(FILE);
        let metadata = json!({
            "settings": settings,
            "optimizer_steps": self.optimizer.steps,
            "loss_scale": self.loss_scale.0,
            "loss_scale_age": self.loss_scale.1,
        });
        let metadata = HashMap::from([(METADATA.to_owned(), metadata.to_string())]);
        let mut tensors: BTreeMap<String, Tensor> = self.optimizer.state.clone();
        for parameter in self.parameters {
            tensors.insert(format!("value.{}", parameter.name), parameter.var.as_detached_tensor());
        }
        let records: Vec<f64> = self.history.0.iter().flat_map(Record::numbers).collect();
        let shape = (self.history.0.len(), Record::COLUMNS.len());
        tensors.insert(HISTORY.into(), Tensor::from_vec(records, shape, &Device::Cpu)?);
        let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)?;
        super::files::replace(&path, &bytes)
    }

    /// Puts back what [`save`](Self::save) wrote, if it was written with the same settings.
    pub fn restore(&mut self, directory: &Path, settings: &Value, device: &Device) -> Result<()> {
        let path = &directory.join(FILE);
        let malformed = |problem: &dyn std::fmt::Display| Failure::malformed(path, problem);
        let bytes = std::fs::read(path).map_err(|error| malformed(&format!("{error}; `--resume` needs it")))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|error| malformed(&error))?;
        let text = metadata.metadata().as_ref().and_then(|metadata| metadata.get(METADATA));
        let text = text.ok_or_else(|| malformed(&format!("has no metadata `{METADATA}`")))?;
        let metadata: Value = serde_json::from_str(text).map_err(|error| malformed(&error))?;
        same_settings(&metadata["settings"], settings, path)?;
        let number = |key: &str| {
            metadata[key]
                .as_f64()
                .filter(|number| *number >= 0.0)
                .ok_or_else(|| malformed(&format!("`{key}` is missing")))
        };
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|error| malformed(&error))?;
        let tensor = |name: &str, shape: &[usize]| match tensors.get(name) {
            Some(tensor) if tensor.dims() == shape && tensor.dtype() == DType::F32 => Ok(tensor.to_device(device)?),
            Some(tensor) => {
                let (got, dtype) = (tensor.dims(), tensor.dtype());
                Err(malformed(&format!("`{name}` is {dtype:?} {got:?}, expected F32 {shape:?}")))
            }
            None => Err(malformed(&format!("holds no tensor `{name}`"))),
        };
        let history = tensors.get(HISTORY).ok_or_else(|| malformed(&format!("holds no tensor `{HISTORY}`")))?;
        let records = history.to_vec2::<f64>().map_err(|error| malformed(&error))?;
        let records = records.iter().map(|record| Record::from_numbers(record));
        let history = records.collect::<Option<Vec<_>>>().ok_or_else(|| malformed(&"`history` has other columns"))?;
        let optimizer_steps = number("optimizer_steps")? as usize;
        let kinds = if optimizer_steps > 0 { self.optimizer.kinds() } else { &[] };
        let mut state = BTreeMap::new();
        let mut values = Vec::new();
        for Parameter { name, var } in self.parameters {
            values.push(tensor(&format!("value.{name}"), var.dims())?);
            for kind in kinds {
                let key = format!("{kind}.{name}");
                state.insert(key.clone(), tensor(&key, var.dims())?);
            }
        }
        let loss_scale = (number("loss_scale")?, number("loss_scale_age")? as usize);
        for (parameter, value) in self.parameters.iter().zip(&values) {
            parameter.var.set(value)?;
        }
        (self.optimizer.steps, self.optimizer.state) = (optimizer_steps, state);
        (self.history.0, *self.loss_scale) = (history, loss_scale);
        Ok(())
    }
}

fn same_settings(saved: &Value, now: &Value, path: &Path) -> Result<()> {
    let Some(now) = now.as_object() else { return Ok(()) };
    for (flag, value) in now {
        if saved[flag] != *value {
            let path = path.display();
            return Err(Failure::Usage(format!(
                "`--resume` with {flag} {value}, but {path} was written with {}",
                saved[flag]
            )));
        }
    }
    Ok(())
}
