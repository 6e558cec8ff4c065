//! Reading single keys of adapter_config.json, each with an error that names it.

use serde_json::{Map, Value};

use super::error::shorten;
use super::{Bias, Error, ErrorKind, Names, Result, Targets};

/// Keys with which PEFT computes something else than s · B A x, where they are switched on.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("use_qalora", "QALoRA"),
    ("use_bdlora", "BD-LoRA"),
    ("alora_invocation_tokens", "aLoRA"),
    ("arrow_config", "Arrow"),
    ("kasa_config", "KaSA"),
    ("monteclora_config", "MonteCLoRA"),
    ("velora_config", "VeLoRA"),
    ("target_parameters", "LoRA on parameters"),
    ("trainable_token_indices", "trainable tokens"),
    ("layer_replication", "layer replication"),
    ("megatron_config", "Megatron"),
];

/// Initialisations that take the adapter's part out of the base weights: the file fits only the changed base.
const BASE_CHANGING: &[(&str, &str)] =
    &[("pissa", "PiSSA"), ("olora", "OLoRA"), ("corda", "CorDA"), ("loftq", "LoftQ"), ("lora_ga", "LoRA-GA")];

pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// That it is a LoRA, of a kind that this crate computes.
    pub(super) fn supported(&self) -> Result<()> {
        if self.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(refuse("peft_type", self.0.get("peft_type"), "\"LORA\""));
        }
        let unsupported = |key: &str, feature, expected| {
            let got = self.0.get(key).map_or_else(String::new, shown);
            Err(ErrorKind::Unsupported { key: shorten(key), got, feature, expected }.into())
        };
        for (key, feature) in UNSUPPORTED {
            if self.0.get(*key).is_some_and(on) {
                return unsupported(key, feature, "null or false");
            }
        }
        // PEFT's variants are switched on by such a key: one that is not known yet would change the result unseen.
        let known = ["use_rslora", "use_dora"];
        if let Some((key, _)) =
            self.0.iter().find(|(key, value)| key.starts_with("use_") && on(value) && !known.contains(&key.as_str()))
        {
            return unsupported(key, "an unknown variant", "null or false");
        }
        match self.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => Ok(()),
            Some(Value::String(init)) => {
                let lower = init.to_lowercase();
                if let Some((_, feature)) = BASE_CHANGING.iter().find(|(prefix, _)| lower.starts_with(prefix)) {
                    return unsupported(
                        "init_lora_weights",
                        feature,
                        "an initialisation that leaves the base as it is",
                    );
                }
                if ["gaussian", "eva", "orthogonal", "mica"].contains(&lower.as_str()) {
                    return Ok(());
                }
                Err(refuse("init_lora_weights", self.get("init_lora_weights"), "a boolean or a name that PEFT knows"))
            }
            other => Err(refuse("init_lora_weights", other, "a boolean or a name that PEFT knows")),
        }
    }

    pub(super) fn boolean(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            other => Err(refuse(key, other, "true or false")),
        }
    }

    /// `value` stands at `key`.
    pub(super) fn rank(&self, key: &str, value: Option<&Value>, default: usize) -> Result<usize> {
        let Some(value) = value else { return Ok(default) };
        match value.as_u64().and_then(|r| usize::try_from(r).ok()) {
            Some(r) if r > 0 => Ok(r),
            _ => Err(refuse(key, Some(value), "a positive integer")),
        }
    }

    /// `value` stands at `key`.
    pub(super) fn number(&self, key: &str, value: Option<&Value>, default: f64) -> Result<f64> {
        let Some(value) = value else { return Ok(default) };
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| refuse(key, Some(value), "a finite number"))
    }

    /// An object of patterns, in file order.
    pub(super) fn pattern<T>(
        &self,
        key: &str,
        read: impl Fn(&str, Option<&Value>) -> Result<T>,
    ) -> Result<Vec<(String, T)>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(pattern, value)| {
                    Ok((pattern.clone(), read(&format!("{key}.{}", shorten(pattern)), Some(value))?))
                })
                .collect(),
            other => Err(refuse(key, other, "an object of numbers")),
        }
    }

    pub(super) fn bias(&self) -> Result<Bias> {
        let all = [Bias::None, Bias::LoraOnly, Bias::All];
        match self.get("bias") {
            None => Ok(Bias::None),
            Some(value) => all
                .into_iter()
                .find(|bias| value.as_str() == Some(bias.name()))
                .ok_or_else(|| refuse("bias", Some(value), "\"none\", \"all\" or \"lora_only\"")),
        }
    }

    pub(super) fn targets(&self) -> Result<Targets> {
        match self.names("target_modules")? {
            Some(Names::Regex(pattern)) if pattern.eq_ignore_ascii_case("all-linear") => Ok(Targets::AllLinear),
            Some(names) => Ok(Targets::Names(names)),
            None => Err(ErrorKind::Unsupported {
                key: "target_modules".into(),
                got: self.0.get("target_modules").map_or_else(|| "absent".into(), shown),
                feature: "PEFT's table of target modules per architecture",
                expected: "a list, a regular expression or \"all-linear\"",
            }
            .into()),
        }
    }

    pub(super) fn names(&self, key: &str) -> Result<Option<Names>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(pattern)) => Ok(Some(Names::Regex(pattern.clone()))),
            Some(_) => Ok(Some(Names::List(self.list(key)?))),
        }
    }

    pub(super) fn layers(&self) -> Result<Option<Vec<u64>>> {
        const KEY: &str = "layers_to_transform";
        let one =
            |value: &Value| value.as_u64().ok_or_else(|| refuse(KEY, Some(value), "an index, or a list of indices"));
        match self.get(KEY) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(one).collect::<Result<_>>().map(Some),
            Some(value) => Ok(Some(vec![one(value)?])),
        }
    }

    pub(super) fn string_or_list(&self, key: &str) -> Result<Vec<String>> {
        match self.get(key) {
            Some(Value::String(one)) if one.is_empty() => Ok(Vec::new()),
            Some(Value::String(one)) => Ok(vec![one.clone()]),
            _ => self.list(key),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<Vec<String>> {
        let string = |value: &Value| {
            value.as_str().map(str::to_owned).ok_or_else(|| refuse(key, Some(value), "a list of strings"))
        };
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(string).collect(),
            other => Err(refuse(key, other, "a list of strings")),
        }
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            other => Err(refuse(key, other, "a string")),
        }
    }
}

fn refuse(key: &str, got: Option<&Value>, expected: &str) -> Error {
    let got = got.map_or_else(|| "absent".into(), shown);
    ErrorKind::Field { key: key.to_owned(), got, expected: expected.to_owned() }.into()
}

/// A value for a message. Containers by their size: they may be as large as the file.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
        Value::String(text) => format!("{:?}", shorten(text)),
        scalar => scalar.to_string(),
    }
}

/// Whether PEFT takes a variant for switched on. A configuration without keys is one of all defaults.
fn on(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(_) => true,
    }
}
