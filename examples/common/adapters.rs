//! Adapters in PEFT's format, on their way into the model and out of it.
//! Provisional until `peft` is there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};

use super::failure::{Failure, Result};
use super::config::Config;
use super::linear::Lora;
use super::llama::Changes;

/// Where the adapter comes from; what is not given is the default, or what the adapter in `init` says.
#[derive(Default)]
pub struct Start {
    pub init: Option<PathBuf>,
    pub targets: Option<Targets>,
    pub rank: Option<usize>,
    pub alpha: Option<f64>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    AllLinear,
    Names(Vec<String>),
}

/// A trained tensor and its name in files.
#[derive(Clone, Debug)]
pub struct Parameter {
    pub name: String,
    pub var: Var,
}

pub struct Adapter {
    pub config: serde_json::Value,
    pub layers: BTreeMap<String, Lora>,
}

impl Adapter {
    pub fn read(directory: &Path) -> Result<Self> {
        let malformed = |problem: &dyn std::fmt::Display| Failure::malformed(directory, problem);
        let text = std::fs::read(directory.join("adapter_config.json")).map_err(|e| malformed(&e))?;
        let config: serde_json::Value = serde_json::from_slice(&text).map_err(|e| malformed(&e))?;
        let file = candle_core::safetensors::load(directory.join("adapter_model.safetensors"), &Device::Cpu)?;
        let scale = config["lora_alpha"].as_f64().unwrap_or(1.0) / config["r"].as_f64().unwrap_or(1.0);
        let mut layers = BTreeMap::new();
        for (name, a) in &file {
            let Some(module) = name.strip_suffix(".lora_A.weight") else { continue };
            let b = &file[&format!("{module}.lora_B.weight")];
            let module = module.trim_start_matches("base_model.model.");
            let f32 = |t: &Tensor| t.to_dtype(DType::F32);
            layers.insert(module.to_owned(), Lora { a: f32(a)?, b: f32(b)?, scale });
        }
        Ok(Self { config, layers })
    }

    pub fn scales(&self) -> BTreeMap<&str, f64> {
        self.layers.iter().map(|(module, lora)| (module.as_str(), lora.scale)).collect()
    }

    pub fn for_training(&self, device: &Device) -> Result<(Changes, Vec<Parameter>)> {
        let (mut changes, mut parameters) = (Changes::default(), Vec::new());
        for (module, lora) in &self.layers {
            let a = Var::from_tensor(&lora.a.to_device(device)?)?;
            let b = Var::from_tensor(&lora.b.to_device(device)?)?;
            changes.lora.insert(module.clone(), Lora { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scale: lora.scale });
            for (part, var) in [("lora_A", a), ("lora_B", b)] {
                parameters.push(Parameter { name: format!("{module}.{part}.weight"), var });
            }
        }
        Ok((changes, parameters))
    }

    pub fn save(&self, directory: &Path) -> Result<()> {
        let mut tensors = std::collections::HashMap::new();
        for (module, lora) in &self.layers {
            tensors.insert(format!("base_model.model.{module}.lora_A.weight"), lora.a.clone());
            tensors.insert(format!("base_model.model.{module}.lora_B.weight"), lora.b.clone());
        }
        candle_core::safetensors::save(&tensors, directory.join("adapter_model.safetensors"))?;
        std::fs::write(directory.join("adapter_config.json"), self.config.to_string())
            .map_err(|error| Failure::output(directory.display(), error))
    }
}

pub fn start(start: &Start, _config: &Config, _seed: u64) -> Result<Adapter> {
    match &start.init {
        Some(directory) => Adapter::read(directory),
        None => Err(Failure::NotBuilt("a fresh adapter".into())),
    }
}
