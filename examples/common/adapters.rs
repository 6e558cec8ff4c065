//! Adapters in PEFT's format, on their way into the model and out of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use fused_lora::Dtype;
use fused_lora::peft;

use super::config::Config;
use super::failure::{Failure, Result};
use super::linear::{Dropping, Lora};
use super::llama::{Changes, EMBEDDING, HEAD, linear_layers};
use super::rng::Rng;
use super::weights::Weights;

/// Where an adapter for training comes from; what is not given is the default, or what the adapter in `init` says.
#[derive(Default)]
pub struct Start {
    pub init: Option<PathBuf>,
    pub targets: Option<Targets>,
    pub rank: Option<usize>,
    pub alpha: Option<f64>,
    /// s = α / √r.
    pub rslora: bool,
    /// With magnitudes.
    pub dora: bool,
    pub dropout: Option<f64>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    AllLinear,
    Names(Vec<String>),
}

/// Names of an adapter's parts behind that of their module.
const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
const B_BIAS: &str = "lora_B.bias";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// What dropout may be in training, in words.
pub const PROBABILITY: &str =
    "a probability of at least 0 and below 1 - 2^-17, from where on it is rounded to 1 and everything is dropped";

/// Whether dropout with this probability leaves something: the op takes it in f32, in steps of 2⁻¹⁶.
pub fn is_probability(p: f64) -> bool {
    p >= 0.0 && (p as f32) < 1.0 - 1.0 / (1 << 17) as f32
}

/// A trained tensor and its name in checkpoints.
#[derive(Clone, Debug)]
pub struct Parameter {
    pub name: String,
    pub var: Var,
}

/// An adapter that fits the model.
pub struct Adapter(peft::Adapter);

impl Adapter {
    pub fn read(directory: &Path, config: &Config) -> Result<Self> {
        let adapter = peft::Adapter::load(directory)?;
        let layers = linear_layers(config);
        let linears: Vec<_> = layers.iter().map(|&(ref name, n, k)| peft::Linear { name, n, k }).collect();
        adapter.check_base(&linears, Some(HEAD))?;
        Ok(Self(adapter))
    }

    /// For training: from disk or new.
    pub fn start(start: &Start, config: &Config, (model, weights): (&Path, &Weights), seed: u64) -> Result<Self> {
        let Some(directory) = &start.init else { return Self::new(start, config, (model, weights), seed) };
        let mut adapter = Self::read(directory, config)?;
        start.agrees_with(adapter.0.config(), config)?;
        if !adapter.0.config().modules_to_save.is_empty() {
            return Err(Failure::NotBuilt("training of whole modules (`modules_to_save`)".into()));
        }
        if let Some(p) = start.dropout {
            adapter.0.set_dropout(p)?;
        }
        let p = adapter.dropout();
        if !is_probability(p) {
            let got = format!("the adapter of `--init` has a `lora_dropout` of {p}");
            return Err(Failure::Usage(format!("{got}, expected {PROBABILITY}; `--dropout` can change it")));
        }
        Ok(adapter)
    }

    /// As PEFT begins: A uniform within ±1/√K (Kaiming with a = √5), B zero, and the magnitude the norms of W's rows.
    fn new(start: &Start, config: &Config, (model, weights): (&Path, &Weights), seed: u64) -> Result<Self> {
        let (rank, alpha) = (start.rank.unwrap_or(8), start.alpha.unwrap_or(16.0));
        let described = start.targets().config(rank, alpha, config)?;
        let described = described.with_rslora(start.rslora).with_dora(start.dora);
        let mut described = described.with_dropout(start.dropout.unwrap_or(0.0));
        described.task_type = Some("CAUSAL_LM".into());
        described.base_model_name_or_path = Some(model.display().to_string());
        let mut adapter = peft::Adapter::new(described.clone());
        let mut rng = Rng::new(seed);
        let matcher = described.matcher()?;
        for (name, n, k) in linear_layers(config) {
            let Some(module) = matcher.targets(&name)? else { continue };
            let bound = 1.0 / (k as f64).sqrt();
            let a: Vec<f32> = (0..module.r * k).map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32).collect();
            let a = peft::Tensor::from_f32(Dtype::F32, &[module.r, k], &a)?;
            let b = peft::Tensor::from_f32(Dtype::F32, &[n, module.r], &vec![0.0; n * module.r])?;
            let mut factors = peft::Factors::new(a, b);
            if start.dora {
                let norms = norms(&weight_of(weights, config, &name, n, k)?)?;
                factors.magnitude = Some(peft::Tensor::from_f32(Dtype::F32, &[n], &norms)?);
            }
            adapter.insert(name, factors)?;
        }
        Ok(Self(adapter))
    }

    /// The scale of each layer.
    pub fn scales(&self) -> BTreeMap<&str, f64> {
        self.0.modules().map(|(name, module, _)| (name, module.scale)).collect()
    }

    /// Probability of dropout in training.
    pub fn dropout(&self) -> f64 {
        self.0.config().lora_dropout
    }

    /// Whether its layers have magnitudes.
    pub fn is_dora(&self) -> bool {
        self.0.config().use_dora
    }

    /// How many layers have factors.
    pub fn layers(&self) -> usize {
        self.0.modules().len()
    }

    /// What the adapter changes in the model.
    pub fn changes(&self, device: &Device) -> Result<Changes> {
        let mut changes = Changes::default();
        for (name, module, factors) in self.0.modules() {
            let (a, b) = (tensor(&factors.a, device)?, tensor(&factors.b, device)?);
            let b_bias = factors.b_bias.as_ref().map(|b_bias| tensor(b_bias, device)).transpose()?;
            let magnitude = factors.magnitude.as_ref().map(|magnitude| tensor(magnitude, device)).transpose()?;
            let lora = Lora { a, b, b_bias, magnitude, scale: module.scale, dropout: None, full_precision: false };
            changes.lora.insert(name.into(), lora);
            for (part, value) in [("weight", &factors.weight), ("bias", &factors.bias)] {
                if let Some(value) = value {
                    changes.parameters.insert(format!("{name}.{part}"), tensor(value, device)?);
                }
            }
        }
        for (name, value) in self.0.saved().chain(self.0.biases()) {
            changes.parameters.insert(name.into(), tensor(value, device)?);
        }
        Ok(changes)
    }

    /// The same with variables for what is trained, and with dropout. They are listed in the order of their modules, A, B, its
    /// bias and the magnitude of each, and then the biases of the model.
    pub fn variables(&self, device: &Device, seed: u64) -> Result<(Changes, Vec<Parameter>)> {
        let mut changes = self.changes(device)?;
        let mut parameters = Vec::new();
        let mut variable = |name: String, value: &mut Tensor| -> Result<()> {
            let var = Var::from_tensor(value)?;
            *value = var.as_tensor().clone();
            parameters.push(Parameter { name, var });
            Ok(())
        };
        let p = self.dropout() as f32;
        let mut seeds = Rng::new(!seed); // not the stream of the start values
        for (module, lora) in &mut changes.lora {
            let layer_seed = seeds.next_u64();
            lora.dropout = (p != 0.0).then_some(Dropping { p, seed: layer_seed });
            variable(format!("{module}.{A}"), &mut lora.a)?;
            variable(format!("{module}.{B}"), &mut lora.b)?;
            if let Some(b_bias) = &mut lora.b_bias {
                variable(format!("{module}.{B_BIAS}"), b_bias)?;
            }
            if let Some(magnitude) = &mut lora.magnitude {
                variable(format!("{module}.{MAGNITUDE}"), magnitude)?;
            }
        }
        for name in self.biases() {
            if let Some(bias) = changes.parameters.get_mut(&name) {
                variable(name, bias)?;
            }
        }
        Ok((changes, parameters))
    }

    /// The biases of the model that the adapter trains: it brings them all.
    fn biases(&self) -> Vec<String> {
        let of_modules = self.0.modules().filter(|(_, _, factors)| factors.bias.is_some());
        let of_modules = of_modules.map(|(name, ..)| format!("{name}.bias"));
        of_modules.chain(self.0.biases().map(|(name, _)| name.to_owned())).collect()
    }

    /// Saves the adapter with the values of [`variables`](Self::variables).
    pub fn save(&self, parameters: &[Parameter], directory: &Path) -> Result<()> {
        let mut adapter = self.0.clone();
        let mut values = BTreeMap::new();
        for Parameter { name, var } in parameters {
            values.insert(name.as_str(), stored(var)?);
        }
        let value = |name: String, old: &peft::Tensor| values.get(name.as_str()).unwrap_or(old).clone();
        for (name, _, factors) in self.0.modules() {
            let mut new = factors.clone();
            new.a = value(format!("{name}.{A}"), &factors.a);
            new.b = value(format!("{name}.{B}"), &factors.b);
            new.b_bias = factors.b_bias.as_ref().map(|old| value(format!("{name}.{B_BIAS}"), old));
            new.magnitude = factors.magnitude.as_ref().map(|old| value(format!("{name}.{MAGNITUDE}"), old));
            new.bias = factors.bias.as_ref().map(|old| value(format!("{name}.bias"), old));
            adapter.insert(name, new)?;
        }
        for (name, old) in self.0.biases() {
            adapter.insert_parameter(name, value(name.to_owned(), old))?;
        }
        adapter.save(directory).map_err(|error| match &error.kind {
            // Not as an adapter that cannot be read.
            peft::ErrorKind::Io { kind, message, .. } => {
                let file = error.file.as_deref().unwrap_or(directory);
                Failure::output(file.display(), std::io::Error::new(*kind, message.clone()))
            }
            _ => error.into(),
        })
    }
}

/// The weight that a module computes with.
fn weight_of(weights: &Weights, config: &Config, module: &str, n: usize, k: usize) -> Result<Tensor> {
    let name = if module == HEAD && config.tied { EMBEDDING.to_owned() } else { format!("{module}.weight") };
    weights.get(&name, &[n, k])
}

/// Of its rows.
fn norms(w: &Tensor) -> Result<Vec<f32>> {
    Ok(w.to_dtype(DType::F32)?.sqr()?.sum(1)?.sqrt()?.to_vec1()?)
}

/// In f32, as PEFT holds adapters by default whatever the type on disk.
fn tensor(stored: &peft::Tensor, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_vec(stored.to_f32(), stored.shape(), device)?)
}

fn stored(var: &Var) -> Result<peft::Tensor> {
    let values: Vec<f32> = var.as_detached_tensor().to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    Ok(peft::Tensor::from_f32(Dtype::F32, var.dims(), &values)?)
}

impl Start {
    fn targets(&self) -> Targets {
        self.targets.clone().unwrap_or_else(|| Targets::Names(vec!["q_proj".into(), "v_proj".into()]))
    }

    /// Flags that are given beside `--init` must say what its config says.
    fn agrees_with(&self, described: &peft::Config, config: &Config) -> Result<()> {
        let differs = |flag: &str, given: String, known: String| {
            Err(Failure::Usage(format!("`--{flag}` is {given}, but the adapter of `--init` has {known}")))
        };
        if let Some(rank) = self.rank.filter(|&rank| rank != described.r) {
            return differs("rank", rank.to_string(), described.r.to_string());
        }
        if let Some(alpha) = self.alpha.filter(|&alpha| alpha != described.lora_alpha) {
            return differs("alpha", alpha.to_string(), described.lora_alpha.to_string());
        }
        if self.rslora && !described.use_rslora {
            return differs("rslora", "given".into(), "a scale of ALPHA / R".into());
        }
        if self.dora && !described.use_dora {
            return differs("dora", "given".into(), "no magnitudes".into());
        }
        if let Some(targets) = &self.targets {
            let asked = targets.config(described.r, described.lora_alpha, config)?;
            let (asked, known) = (modules(&asked, config)?, modules(described, config)?);
            if asked != known {
                let only = |ones: &[String], others: &[String]| {
                    ones.iter().find(|name| !others.contains(name)).cloned().unwrap_or_else(|| "no other layer".into())
                };
                return differs("targets", only(&asked, &known), only(&known, &asked));
            }
        }
        Ok(())
    }
}

impl Targets {
    fn config(&self, rank: usize, alpha: f64, config: &Config) -> Result<peft::Config> {
        let layers = linear_layers(config);
        let Self::Names(names) = self else {
            let mut described = peft::Config::new(rank, alpha, [""; 0]);
            described.target_modules = peft::Targets::AllLinear;
            described.expand_all_linear(layers.iter().map(|(name, ..)| name.as_str()), Some(HEAD));
            return Ok(described);
        };
        for name in names {
            if modules(&peft::Config::new(rank, alpha, [name]), config)?.is_empty() {
                return Err(Failure::Usage(format!(
                    "`--targets` is `{name}`, expected all-linear or linear layers of the model: q_proj, k_proj, v_proj, \
                     o_proj, gate_proj, up_proj, down_proj, lm_head"
                )));
            }
        }
        Ok(peft::Config::new(rank, alpha, names))
    }
}

/// The linear layers that a config targets.
fn modules(described: &peft::Config, config: &Config) -> Result<Vec<String>> {
    let matcher = described.matcher()?;
    let mut targeted = Vec::new();
    for (name, ..) in linear_layers(config) {
        if matcher.targets(&name)?.is_some() {
            targeted.push(name);
        }
    }
    Ok(targeted)
}
