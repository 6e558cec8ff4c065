//! A case directory: what it holds, whether it hangs together, and whether it can be computed.

use std::path::Path;

use serde_json::Value;

use super::adapter::{Adapter, variant};
use super::failure::Failure;
use super::tensors::{Tensor, Tensors};

/// What case.json says of the adapter.
pub struct AdapterInfo {
    pub name: String,
    pub r: usize,
    pub scaling: f64,
}

/// A linear layer with one or several LoRA adapters, as PEFT recorded it.
pub struct Case {
    pub name: String,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Leading dimensions of x and y; their product is M.
    pub lead: Vec<usize>,
    /// N × K, whatever the layout on disk.
    pub w: Vec<f64>,
    /// Those whose contributions are summed, or among which `routes` chooses.
    pub adapters: Vec<Adapter>,
    /// For each row of x its adapter, or none.
    pub routes: Option<Vec<Option<usize>>>,
    /// The bias of the layer: the trained one if an adapter has one, else that of the base layer.
    pub bias: Option<Vec<f64>>,
    /// The modes case.json lists.
    pub modes: Vec<String>,
    pub tensors: Tensors,
    errors: Value,
}

const CASE: &str = "case.json";

impl Case {
    pub fn load(directory: &Path) -> Result<Self, Failure> {
        let case = json(&directory.join(CASE), CASE)?;
        let name = text(&case, CASE, "name")?.to_owned();
        check_kind(&case)?;
        let entries = entries(&case)?;
        let active = match &entries {
            Some(entries) => chosen_adapters(&case, entries)?,
            None => active_adapters(&case)?,
        };
        let (n, k) = (size(&case, CASE, "out_features")?, size(&case, CASE, "in_features")?);
        let fan_in_fan_out = match text(&case, CASE, "weight_layout")? {
            layout if layout.starts_with("[out,in]") => false,
            layout if layout.starts_with("[in,out]") => true,
            layout => return Err(Failure::malformed(CASE, format!("weight_layout is `{layout}`"))),
        };
        let (m, lead) = tokens(&case, k)?;
        let tensors = Tensors::read(&directory.join("tensors.safetensors"), "tensors.safetensors")?;
        if training(&case) && active.iter().any(|(name, _)| tensors.get(&format!("{name}.mask")).is_some()) {
            return Err(recorded_mask());
        }
        let w = if fan_in_fan_out {
            tensors.expect("W", &[k, n])?.transposed(k, n)
        } else {
            tensors.expect("W", &[n, k])?.data.clone()
        };
        let base_bias = tensors.get("b").map(|_| tensors.expect("b", &[n])).transpose()?;
        let routes = match entries {
            Some(entries) => {
                let shape: Vec<usize> = lead.iter().copied().chain([k]).collect();
                tensors.expect("x", &shape)?; // M is not to be trusted before
                Some(routes(&entries, &active, m, &lead)?)
            }
            None => None,
        };
        let mut adapters = Vec::with_capacity(active.len());
        for (name, described) in active {
            let info = AdapterInfo {
                name: name.to_owned(),
                r: size(described, CASE, "r")?,
                scaling: number(described, CASE, "scaling")?,
            };
            let files = directory.join("adapter");
            let files = if name == "default" { files } else { files.join(name) };
            adapters.push(Adapter::read(&files, info, fan_in_fan_out, n, k)?);
        }
        if routes.is_some() && adapters.iter().any(|adapter| adapter.b_bias.is_some() || adapter.bias.is_some()) {
            return Err(Failure::NotBuilt("biases of different adapters within one batch".into()));
        }
        if routes.is_some() && adapters.iter().any(|adapter| adapter.magnitude.is_some()) {
            return Err(Failure::NotBuilt("DoRA within a batch of different adapters".into()));
        }
        let of_dora = adapters.iter().rposition(|adapter| adapter.magnitude.is_some());
        if adapters[..of_dora.unwrap_or(0)].iter().any(|adapter| adapter.b_bias.is_some()) {
            return Err(Failure::NotBuilt("an adapter with a bias on B before one of DoRA".into()));
        }
        let trained = adapters.iter().find_map(|adapter| adapter.bias.clone());
        let bias = trained.or_else(|| base_bias.map(|bias| bias.data.clone()));
        let modes = list(&case, "modes")?;
        let errors = case.get("peft_error_vs_f64").cloned().unwrap_or_default();
        let case = Self { name, m, n, k, lead, w, adapters, routes, bias, modes, tensors, errors };
        case.adapters.iter().try_for_each(|adapter| case.check_adapter(adapter))?;
        Ok(case)
    }

    /// A tensor of the case whose name starts with the adapter's.
    pub fn adapter_tensor(&self, adapter: &Adapter, what: &str, shape: &[usize]) -> Result<&Tensor, Failure> {
        self.tensors.expect(&format!("{}.{what}", adapter.info.name), shape)
    }

    /// Ranks of all adapters.
    pub fn rank(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.info.r).sum()
    }

    /// The shape of a matrix with one row per token.
    pub fn token_shape(&self, cols: usize) -> Vec<usize> {
        self.lead.iter().copied().chain([cols]).collect()
    }

    /// PEFT's own error as case.json has it: (relative, largest).
    pub fn recorded_error(&self, mode: &str, what: &str) -> Option<(f64, f64)> {
        let error = self.errors.get(mode)?.get(what)?;
        Some((error.get("rel_fro")?.as_f64()?, error.get("max_abs")?.as_f64()?))
    }

    /// The adapter's files must hold the values that the results were recorded with.
    fn check_adapter(&self, adapter: &Adapter) -> Result<(), Failure> {
        let (n, k, r) = (self.n, self.k, adapter.info.r);
        let vectors = [
            ("bias", "b_trained", &adapter.bias),
            ("bias", "Bbias", &adapter.b_bias),
            ("magnitude", "m", &adapter.magnitude),
        ];
        for (what, recorded, values) in vectors {
            let name = format!("{}.{recorded}", adapter.info.name);
            if self.tensors.get(&name).map(|tensor| &tensor.data) != values.as_ref() {
                let problem = format!("its {what} is not the case's `{name}`");
                return Err(Failure::malformed("adapter_model.safetensors", problem));
            }
        }
        for (what, shape, values) in [("A", [r, k], &adapter.a), ("B", [n, r], &adapter.b)] {
            let recorded = &self.adapter_tensor(adapter, what, &shape)?.data;
            if let Some(at) = (0..values.len()).find(|&at| values[at] != recorded[at]) {
                let (got, expected) = (values[at], recorded[at]);
                let problem = format!("lora_{what}: element {at} is {got}, but the case recorded {expected}");
                return Err(Failure::malformed("adapter_model.safetensors", problem));
            }
        }
        Ok(())
    }
}

/// What drops is drawn anew from a seed here; torch's draws are recorded as what they dropped.
fn recorded_mask() -> Failure {
    Failure::NotBuilt("dropout on the adapter branch by a recorded mask, not by a seed".into())
}

fn training(case: &Value) -> bool {
    case.get("training_mode").and_then(Value::as_bool).unwrap_or(false)
}

fn check_kind(case: &Value) -> Result<(), Failure> {
    let needed = match text(case, CASE, "kind")? {
        "linear" => return Ok(()),
        "embedding" => "LoRA on embeddings".into(),
        "nf4" => "a base weight quantised to NF4".into(),
        "combine" => "`add_weighted_adapter`".into(),
        "init" => "the initialisations PiSSA, OLoRA and MiCA".into(),
        kind => format!("support for cases of kind `{kind}`"),
    };
    Err(Failure::NotBuilt(needed))
}

/// PEFT's name for no adapter.
const BASE: &str = "__base__";

/// The adapter of each entry of x's first dimension, in a batch that mixes them.
fn entries(case: &Value) -> Result<Option<Vec<String>>, Failure> {
    match case.get("adapter_names") {
        None | Some(Value::Null) => Ok(None),
        Some(_) => list(case, "adapter_names").map(Some),
    }
}

/// Each adapter that an entry names, once.
fn chosen_adapters<'a>(case: &'a Value, entries: &[String]) -> Result<Vec<(&'a str, &'a Value)>, Failure> {
    let mut names: Vec<&String> = entries.iter().filter(|name| *name != BASE).collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(Failure::NotBuilt("a batch without an adapter".into()));
    }
    names.into_iter().map(|name| described_adapter(case, name)).collect()
}

/// The adapter of each of the M rows of x.
fn routes(
    entries: &[String],
    adapters: &[(&str, &Value)],
    m: usize,
    lead: &[usize],
) -> Result<Vec<Option<usize>>, Failure> {
    let (got, expected) = (entries.len(), lead.first().copied().unwrap_or(1));
    if got != expected || got == 0 {
        let problem = format!("adapter_names has {got} entries, expected {expected}, the first dimension of x");
        return Err(Failure::malformed(CASE, problem));
    }
    let position = |name: &String| adapters.iter().position(|(known, _)| known == name);
    Ok((0..m).map(|row| position(&entries[row / (m / got)])).collect())
}

/// The adapters that the layer sums.
fn active_adapters(case: &Value) -> Result<Vec<(&str, &Value)>, Failure> {
    let active = case.get("active").and_then(Value::as_array);
    let active = active.ok_or_else(|| Failure::malformed(CASE, "`active` is not a list"))?;
    if active.is_empty() {
        return Err(Failure::NotBuilt("a layer without an active adapter".into()));
    }
    let names: Option<Vec<&str>> = active.iter().map(Value::as_str).collect();
    let names = names.ok_or_else(|| Failure::malformed(CASE, "`active` does not hold names"))?;
    names.iter().map(|name| described_adapter(case, name)).collect()
}

/// The adapter's name and description; variants that are not built yet are refused.
fn described_adapter<'a>(case: &'a Value, active: &str) -> Result<(&'a str, &'a Value), Failure> {
    if Path::new(active).components().count() != 1 || active.contains(['/', '\\']) || active.starts_with('.') {
        return Err(Failure::malformed(CASE, format!("adapter name `{active}` is not a plain name")));
    }
    let described = case.get("adapters").and_then(Value::as_object).and_then(|adapters| adapters.get_key_value(active));
    let (active, described) =
        described.ok_or_else(|| Failure::malformed(CASE, format!("`adapters` lacks `{active}`")))?;
    let config = described.get("config").unwrap_or(&Value::Null);
    if let Some(variant) = variant(config) {
        return Err(Failure::NotBuilt(variant.into()));
    }
    let dropout = config.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0);
    if training(case) && dropout != 0.0 {
        return Err(recorded_mask());
    }
    Ok((active, described))
}

/// M and the leading dimensions of x.
fn tokens(case: &Value, k: usize) -> Result<(usize, Vec<usize>), Failure> {
    let malformed = |problem: &str| Failure::malformed(CASE, format!("x_shape {problem}"));
    let shape = case.get("x_shape").and_then(Value::as_array).ok_or_else(|| malformed("is not a list"))?;
    let shape: Option<Vec<usize>> = shape.iter().map(|v| v.as_u64().and_then(|v| v.try_into().ok())).collect();
    let mut lead = shape.ok_or_else(|| malformed("does not hold sizes"))?;
    if lead.pop() != Some(k) {
        return Err(malformed("does not end with in_features"));
    }
    let m = lead.iter().try_fold(1usize, |m, &size| m.checked_mul(size)).ok_or_else(|| malformed("is too large"))?;
    Ok((m, lead))
}

/// A JSON file; `file` is its name in messages.
pub fn json(path: &Path, file: &str) -> Result<Value, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::malformed(file, error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| Failure::malformed(file, error.to_string()))
}

fn wrong(file: &str, key: &str, expected: &str) -> Failure {
    Failure::malformed(file, format!("`{key}` is missing or not {expected}"))
}

pub fn text<'a>(value: &'a Value, file: &str, key: &str) -> Result<&'a str, Failure> {
    value.get(key).and_then(Value::as_str).ok_or_else(|| wrong(file, key, "a string"))
}

pub fn number(value: &Value, file: &str, key: &str) -> Result<f64, Failure> {
    value.get(key).and_then(Value::as_f64).ok_or_else(|| wrong(file, key, "a number"))
}

fn size(value: &Value, file: &str, key: &str) -> Result<usize, Failure> {
    let size = value.get(key).and_then(Value::as_u64).and_then(|v| v.try_into().ok());
    size.ok_or_else(|| wrong(file, key, "a size"))
}

fn list(value: &Value, key: &str) -> Result<Vec<String>, Failure> {
    let list = value.get(key).and_then(Value::as_array).ok_or_else(|| wrong(CASE, key, "a list"))?;
    let names: Option<Vec<String>> = list.iter().map(|v| v.as_str().map(str::to_owned)).collect();
    names.ok_or_else(|| wrong(CASE, key, "a list of names"))
}
