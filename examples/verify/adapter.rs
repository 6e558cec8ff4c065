//! One layer's adapter from the two files that PEFT's `save_pretrained` writes.

use std::path::Path;

use serde_json::Value;

use super::case::{AdapterInfo, json, number, text};
use super::failure::Failure;
use super::tensors::Tensors;

/// A (R × K) and B (N × R) as stored, and what was trained with them, if anything.
pub struct Adapter {
    pub info: AdapterInfo,
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    /// N, inside the scale.
    pub b_bias: Option<Vec<f64>>,
    /// N, of DoRA.
    pub magnitude: Option<Vec<f64>>,
    /// N, in place of the base layer's.
    pub bias: Option<Vec<f64>>,
}

/// Config entries that change what a layer computes, and what each stands for.
const VARIANTS: [(&str, &str); 8] = [
    ("use_qalora", "QA-LoRA"),
    ("use_bdlora", "block-diagonal LoRA (`use_bdlora`)"),
    ("alora_invocation_tokens", "activated LoRA (`alora_invocation_tokens`)"),
    ("arrow_config", "Arrow routing"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("velora_config", "VeLoRA"),
    ("target_parameters", "LoRA on bare parameters (`target_parameters`)"),
];

/// What a LoraConfig asks for beyond plain LoRA, in words.
pub fn variant(config: &Value) -> Option<&'static str> {
    let on = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        _ => true,
    };
    VARIANTS.iter().find(|(key, _)| config.get(key).is_some_and(on)).map(|&(_, name)| name)
}

impl Adapter {
    /// Reads `directory` and holds its config to what the case says of the adapter.
    pub fn read(
        directory: &Path,
        info: AdapterInfo,
        fan_in_fan_out: bool,
        n: usize,
        k: usize,
    ) -> Result<Self, Failure> {
        let file = "adapter_config.json";
        let config = json(&directory.join(file), file)?;
        check_config(&config, file, &info, fan_in_fan_out)?;
        let tensors = Tensors::read(&directory.join("adapter_model.safetensors"), "adapter_model.safetensors")?;
        let matrix = |suffix: &str, shape: [usize; 2]| {
            let name = single(&tensors, suffix)?;
            Ok::<_, Failure>((name, tensors.expect(name, &shape)?.data.clone()))
        };
        let (name, a) = matrix(".lora_A.weight", [info.r, k])?;
        let (_, b) = matrix(".lora_B.weight", [n, info.r])?;
        let layer = name.trim_end_matches(".lora_A.weight");
        let bias = [format!("{layer}.base_layer.bias"), format!("{layer}.bias")]
            .iter()
            .find(|name| tensors.get(name).is_some())
            .map(|name| tensors.expect(name, &[n]).map(|tensor| tensor.data.clone()))
            .transpose()?;
        let vector = |flag: &str, suffix: &str| {
            if !config.get(flag).and_then(Value::as_bool).unwrap_or(false) {
                return Ok(None);
            }
            tensors.expect(&format!("{layer}.{suffix}"), &[n]).map(|tensor| Some(tensor.data.clone()))
        };
        let (b_bias, magnitude) = (vector("lora_bias", "lora_B.bias")?, vector("use_dora", "lora_magnitude_vector")?);
        Ok(Self { info, a, b, b_bias, magnitude, bias })
    }
}

/// The one tensor whose name ends so.
fn single<'a>(tensors: &'a Tensors, suffix: &str) -> Result<&'a str, Failure> {
    let mut found = tensors.names().filter(|name| name.ends_with(suffix));
    match (found.next(), found.count()) {
        (Some(name), 0) => Ok(name),
        (None, _) => Err(Failure::malformed(&tensors.file, format!("holds no tensor `…{suffix}`"))),
        (Some(_), more) => {
            Err(Failure::malformed(&tensors.file, format!("holds {} tensors `…{suffix}`, expected one", more + 1)))
        }
    }
}

fn check_config(config: &Value, file: &str, info: &AdapterInfo, fan_in_fan_out: bool) -> Result<(), Failure> {
    let kind = text(config, file, "peft_type")?;
    if kind != "LORA" {
        return Err(Failure::NotBuilt(format!("the PEFT method {kind}")));
    }
    if let Some(variant) = variant(config) {
        return Err(Failure::NotBuilt(variant.into()));
    }
    let flag = |key| config.get(key).and_then(Value::as_bool).unwrap_or(false);
    if flag("fan_in_fan_out") != fan_in_fan_out {
        let problem = format!("fan_in_fan_out is {}, but the case's weight_layout says otherwise", !fan_in_fan_out);
        return Err(Failure::malformed(file, problem));
    }
    let patterned = |key| config.get(key).and_then(Value::as_object).is_some_and(|pattern| !pattern.is_empty());
    if patterned("rank_pattern") || patterned("alpha_pattern") {
        return Ok(()); // r and alpha of this layer come from a pattern; the tensors' shapes still must agree
    }
    let (r, alpha) = (number(config, file, "r")?, number(config, file, "lora_alpha")?);
    let scaling = if flag("use_rslora") { alpha / r.sqrt() } else { alpha / r };
    for (key, got, expected) in [("r", r, info.r as f64), ("alpha / r", scaling, info.scaling)] {
        if (got - expected).abs() > 1e-9 * expected.abs() {
            return Err(Failure::malformed(file, format!("{key} is {got}, but case.json says {expected}")));
        }
    }
    Ok(())
}
