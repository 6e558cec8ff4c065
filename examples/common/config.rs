//! config.json of a Llama, as transformers 4 and 5 write it.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::failure::{Failure, Result};

/// Sizes and constants of the model.
#[derive(Clone, Debug)]
pub struct Config {
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_eps: f64,
    pub rope: Rope,
    /// The embedding is the output matrix as well.
    pub tied: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    /// Longest sequence the model was made for.
    pub positions: usize,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// Token that begins a text.
    pub start: Option<u32>,
}

/// Rotary embedding: the base, and how its frequencies are stretched for long texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Scaling,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low: f64, high: f64, original_positions: f64 },
}

/// The file's own names and defaults.
#[derive(Deserialize)]
struct File {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeFile>,
    rope_parameters: Option<RopeFile>,
    max_position_embeddings: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    eos_token_id: Value,
    bos_token_id: Option<u32>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RopeFile {
    rope_type: Option<String>,
    /// Its older name; some files have both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

impl Config {
    /// Reads `path`; what would change the computation and is not done here is refused by name.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|error| Failure::malformed(path, error))?;
        let file: File = serde_json::from_slice(&text).map_err(|error| Failure::malformed(path, error))?;
        file.refuse_other_models()?;
        let config = file.config().map_err(|problem| Failure::malformed(path, problem))?;
        config.check().map_err(|problem| Failure::malformed(path, problem))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let sizes = [
            ("vocab_size", self.vocab),
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.positions),
        ];
        for (name, size) in sizes {
            // No tensor of such a model would fit anyway, and products of two sizes cannot overflow.
            if !(1..=1 << 31).contains(&size) {
                return Err(format!("{name} is {size}, expected 1 to 2^31"));
            }
        }
        // A list of the layers is made before a tensor is looked for.
        if self.layers > 1 << 16 {
            return Err(format!("num_hidden_layers is {}, expected at most 2^16", self.layers));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return Err(format!(
                "num_attention_heads is {heads}, expected a multiple of num_key_value_heads, {kv_heads}"
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {}, expected an even number", self.head_dim));
        }
        for (name, number) in [("rms_norm_eps", self.norm_eps), ("rope_theta", self.rope.theta)] {
            if !number.is_finite() || number <= 0.0 {
                return Err(format!("{name} is {number}, expected a positive number"));
            }
        }
        Ok(())
    }
}

impl File {
    fn refuse_other_models(&self) -> Result<()> {
        if self.model_type != "llama" {
            return Err(Failure::NotBuilt(format!("the architecture `{}`", self.model_type)));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|&act| act != "silu") {
            return Err(Failure::NotBuilt(format!("the activation `{act}`")));
        }
        if self.quantization_config.as_ref().is_some_and(|config| !config.is_null()) {
            return Err(Failure::NotBuilt("a quantised model (`quantization_config`)".into()));
        }
        match self.rope().and_then(RopeFile::kind) {
            None | Some("default" | "linear" | "llama3") => Ok(()),
            Some(other) => Err(Failure::NotBuilt(format!("the rotary embedding `{other}`"))),
        }
    }

    /// transformers 5 calls `rope_parameters` what `rope_theta` and `rope_scaling` were.
    fn rope(&self) -> Option<&RopeFile> {
        self.rope_parameters.as_ref().or(self.rope_scaling.as_ref())
    }

    fn config(&self) -> Result<Config, String> {
        let theta = self.rope().and_then(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let scaling = self.rope().map_or(Ok(Scaling::None), RopeFile::scaling)?;
        let heads = self.num_attention_heads;
        let ends = match &self.eos_token_id {
            Value::Null => Ok(Vec::new()),
            Value::Array(_) => serde_json::from_value(self.eos_token_id.clone()),
            one => serde_json::from_value(one.clone()).map(|id| vec![id]),
        };
        Ok(Config {
            vocab: self.vocab_size,
            hidden: self.hidden_size,
            intermediate: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size / heads.max(1)),
            norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            rope: Rope { theta, scaling },
            tied: self.tie_word_embeddings,
            attention_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            positions: self.max_position_embeddings.unwrap_or(2048),
            ends: ends.map_err(|error| format!("eos_token_id: {error}"))?,
            start: self.bos_token_id,
        })
    }
}

impl RopeFile {
    fn kind(&self) -> Option<&str> {
        self.rope_type.as_deref().or(self.older_type.as_deref())
    }

    fn scaling(&self) -> Result<Scaling, String> {
        let positive = |name: &str, number: Option<f64>| match number {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            Some(number) => Err(format!("{name} of the rotary embedding is {number}, expected a positive number")),
            None => Err(format!("{name} of the rotary embedding is missing")),
        };
        match self.kind() {
            Some("linear") => Ok(Scaling::Linear { factor: positive("factor", self.factor)? }),
            Some("llama3") => {
                let low = positive("low_freq_factor", self.low_freq_factor)?;
                let high = positive("high_freq_factor", self.high_freq_factor)?;
                if low >= high {
                    return Err(format!("low_freq_factor is {low}, expected less than high_freq_factor, {high}"));
                }
                let original = self.original_max_position_embeddings;
                Ok(Scaling::Llama3 {
                    factor: positive("factor", self.factor)?,
                    low,
                    high,
                    original_positions: positive("original_max_position_embeddings", original)?,
                })
            }
            _ => Ok(Scaling::None),
        }
    }
}

impl Rope {
    /// The angle per position of each pair of dimensions, in f32 as transformers computes it.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let pairs = (0..head_dim).step_by(2);
        pairs.map(|i| self.scaled(1.0 / (self.theta as f32).powf(i as f32 / head_dim as f32))).collect()
    }

    fn scaled(&self, frequency: f32) -> f32 {
        match self.scaling {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor as f32,
            Scaling::Llama3 { factor, low, high, original_positions } => {
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                let (low_wavelength, high_wavelength) =
                    ((original_positions / low) as f32, (original_positions / high) as f32);
                if wavelength > low_wavelength {
                    frequency / factor as f32
                } else if wavelength < high_wavelength {
                    frequency
                } else {
                    let smooth = (original_positions as f32 / wavelength - low as f32) / (high - low) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        }
    }
}
