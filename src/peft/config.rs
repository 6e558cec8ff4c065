//! adapter_config.json: what changes the maths as typed fields, everything else kept as it was read.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::error::shorten;
use super::field::Fields;
use super::{ErrorKind, Matcher, Result};

/// Bytes of adapter_config.json beyond which it is not read: room for twenty thousand module names with a rank and an α
/// each.
const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// Entries of `modules_to_save`, each of which is held against every part of every name.
const MAX_SAVED_MODULES: usize = 256;

/// Which biases the adapter trained (`bias`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Those of the adapted layers.
    LoraOnly,
    /// All of the model.
    All,
}

/// Modules named by a list of names (whole, or a suffix after a dot) or by a regular expression for the whole name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// Whole names, or suffixes after a dot.
    List(Vec<String>),
    /// In Python's syntax; must match the whole name.
    Regex(String),
}

/// Which modules carry factors (`target_modules`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// By name.
    Names(Names),
    /// Every linear module of the base model but the output head: [`Config::expand_all_linear`] puts the names.
    AllLinear,
}

/// Rank, α and scale of one module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Module {
    /// Rank, at least 1.
    pub r: usize,
    /// α.
    pub alpha: f64,
    /// s = α/r, or α/√r with `use_rslora`.
    pub scale: f64,
}

/// A LoRA configuration as in PEFT's adapter_config.json.
///
/// Fields are named as PEFT's keys are. All other keys of a file that was read are kept and written back.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// Rank where no pattern says otherwise.
    pub r: usize,
    /// α where no pattern says otherwise.
    pub lora_alpha: f64,
    /// Ranks of modules by regular expression (after a dot or from the start, to the end of the name); the first match
    /// wins.
    pub rank_pattern: Vec<(String, usize)>,
    /// α of modules, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// s = α/√r instead of α/r.
    pub use_rslora: bool,
    /// DoRA: each module has a magnitude, which takes the place of the norms of W + s · B A.
    pub use_dora: bool,
    /// Probability with which training drops an element of x before A.
    pub lora_dropout: f64,
    /// The base weight is stored K × N (`Conv1D` of transformers). A and B are not transposed.
    pub fan_in_fan_out: bool,
    /// Which biases of the base model the adapter brings.
    pub bias: Bias,
    /// B has a bias of its own, inside the scale: s · (B A x + `lora_B.bias`).
    pub lora_bias: bool,
    /// Which modules carry factors.
    pub target_modules: Targets,
    /// Which modules do not, though targeted.
    pub exclude_modules: Option<Names>,
    /// Layers whose modules are targeted; `None` or empty for all.
    pub layers_to_transform: Option<Vec<u64>>,
    /// Names of the list of layers, as regular expressions; empty for any.
    pub layers_pattern: Vec<String>,
    /// Modules saved whole.
    pub modules_to_save: Vec<String>,
    /// `"CAUSAL_LM"`, …
    pub task_type: Option<String>,
    /// The base model's name on the hub, or its folder.
    pub base_model_name_or_path: Option<String>,
    /// Every key as read, or PEFT's default.
    raw: Map<String, Value>,
}

impl Config {
    /// Rank `r` and α = `alpha` for modules of these names (whole, or suffixes after a dot); all else as PEFT's default.
    ///
    /// ```
    /// # use fused_lora::peft::Config;
    /// let config = Config::new(16, 32.0, ["q_proj",
    /// "v_proj"]).with_rslora(true).with_rank("layers.0.self_attn.q_proj", 4); let module =
    /// config.targets("model.layers.0.self_attn.q_proj")?.expect("targeted"); assert_eq!((module.r, module.scale), (4,
    /// 16.0)); assert_eq!(config.targets("model.layers.0.mlp.up_proj")?, None);
    /// # Ok::<(), fused_lora::peft::Error>(())
    /// ```
    pub fn new(r: usize, alpha: f64, targets: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            r,
            lora_alpha: alpha,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            use_rslora: false,
            use_dora: false,
            lora_dropout: 0.0,
            fan_in_fan_out: false,
            bias: Bias::None,
            lora_bias: false,
            target_modules: Targets::Names(Names::List(targets.into_iter().map(Into::into).collect())),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            task_type: None,
            base_model_name_or_path: None,
            raw: Map::new(),
        }
    }

    /// s = α/√r instead of α/r.
    #[must_use]
    pub fn with_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// DoRA: modules with a magnitude.
    #[must_use]
    pub fn with_dora(mut self, use_dora: bool) -> Self {
        self.use_dora = use_dora;
        self
    }

    /// Drops elements of x before A with probability `p` in training.
    #[must_use]
    pub fn with_dropout(mut self, p: f64) -> Self {
        self.lora_dropout = p;
        self
    }

    /// Rank `r` where `pattern` matches and none before it does.
    #[must_use]
    pub fn with_rank(mut self, pattern: impl Into<String>, r: usize) -> Self {
        self.rank_pattern.push((pattern.into(), r));
        self
    }

    /// α = `alpha` where `pattern` matches and none before it does.
    #[must_use]
    pub fn with_alpha(mut self, pattern: impl Into<String>, alpha: f64) -> Self {
        self.alpha_pattern.push((pattern.into(), alpha));
        self
    }

    /// Reads adapter_config.json.
    ///
    /// # Errors
    ///
    /// As [`Config::from_json`], with the file's name, and [`ErrorKind::Io`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        super::file::read(path, MAX_CONFIG_BYTES)
            .and_then(|bytes| Self::from_slice(&bytes))
            .map_err(|error| error.at(path))
    }

    /// From the text of adapter_config.json.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Json`], [`ErrorKind::Field`] for a value that PEFT does not accept, [`ErrorKind::Unsupported`] for
    /// a feature that this crate does not compute, and [`ErrorKind::Pattern`] for a regular expression that cannot be
    /// used.
    pub fn from_json(text: &str) -> Result<Self> {
        Self::from_slice(text.as_bytes())
    }

    pub(super) fn from_slice(text: &[u8]) -> Result<Self> {
        let raw: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| ErrorKind::Json { message: error.to_string() })?;
        let config = Self::from_map(raw)?;
        config.matcher()?;
        Ok(config)
    }

    fn from_map(raw: Map<String, Value>) -> Result<Self> {
        let fields = Fields(&raw);
        fields.supported()?;
        let config = Self {
            r: fields.rank("r", raw.get("r"), 8)?,
            lora_alpha: fields.number("lora_alpha", raw.get("lora_alpha"), 8.0)?,
            rank_pattern: fields.pattern("rank_pattern", |key, value| fields.rank(key, value, 8))?,
            alpha_pattern: fields.pattern("alpha_pattern", |key, value| fields.number(key, value, 8.0))?,
            use_rslora: fields.boolean("use_rslora")?,
            use_dora: fields.boolean("use_dora")?,
            lora_dropout: fields.number("lora_dropout", raw.get("lora_dropout"), 0.0)?,
            fan_in_fan_out: fields.boolean("fan_in_fan_out")?,
            bias: fields.bias()?,
            lora_bias: fields.boolean("lora_bias")?,
            target_modules: fields.targets()?,
            exclude_modules: fields.names("exclude_modules")?,
            layers_to_transform: fields.layers()?,
            layers_pattern: fields.string_or_list("layers_pattern")?,
            modules_to_save: fields.list("modules_to_save")?,
            task_type: fields.string("task_type")?,
            base_model_name_or_path: fields.string("base_model_name_or_path")?,
            raw,
        };
        config.check()?;
        Ok(config)
    }

    /// What must hold between fields, whether they were read or set.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |key: &str, got: String, expected: &str| {
            Err(ErrorKind::Field { key: key.into(), got: shorten(&got), expected: expected.into() }.into())
        };
        if self.r == 0 {
            return refuse("r", "0".into(), "a positive integer");
        }
        if let Some((pattern, _)) = self.rank_pattern.iter().find(|(_, r)| *r == 0) {
            return refuse(&format!("rank_pattern.{}", shorten(pattern)), "0".into(), "a positive integer");
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha).chain([self.lora_alpha]);
        if let Some(alpha) = alphas.into_iter().find(|alpha| !alpha.is_finite()) {
            return refuse("lora_alpha", alpha.to_string(), "a finite number");
        }
        if !(0.0..=1.0).contains(&self.lora_dropout) {
            return refuse("lora_dropout", self.lora_dropout.to_string(), "a number from 0 to 1");
        }
        if self.use_dora && self.lora_bias {
            return refuse("lora_bias", "true".into(), "false, because `use_dora` is true");
        }
        if self.modules_to_save.len() > MAX_SAVED_MODULES {
            let got = format!("a list of {}", self.modules_to_save.len());
            return refuse("modules_to_save", got, &format!("at most {MAX_SAVED_MODULES} names"));
        }
        let by_list = matches!(self.target_modules, Targets::Names(Names::List(_)));
        if !by_list && self.layers_to_transform.is_some() {
            return refuse("layers_to_transform", "set".into(), "null, because `target_modules` is a string");
        }
        if !by_list && !self.layers_pattern.is_empty() {
            return refuse("layers_pattern", "set".into(), "null, because `target_modules` is a string");
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return refuse("layers_pattern", "set".into(), "null, because `layers_to_transform` is");
        }
        Ok(())
    }

    /// Keys that PEFT 0.21 does not know either. Like PEFT, this crate keeps them and computes without them; what they
    /// stand for is worth a warning.
    pub fn unknown_keys(&self) -> impl Iterator<Item = &str> {
        let known = defaults();
        self.raw.keys().map(String::as_str).filter(move |key| !known.contains_key(*key) && *key != "runtime_config")
    }

    /// Rank, α and scale of the module of this name (relative to the base model, as `model.layers.0.self_attn.q_proj`),
    /// or `None` where it carries no factors, by PEFT's own rule. For many names make a [`Config::matcher`] once.
    ///
    /// # Errors
    ///
    /// As [`Config::matcher`] and [`Matcher::targets`].
    pub fn targets(&self, name: &str) -> Result<Option<Module>> {
        self.matcher()?.targets(name)
    }

    /// The rule that says which modules carry factors, compiled.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Pattern`] for a regular expression that cannot be used, [`ErrorKind::Field`] for fields set to what
    /// PEFT does not accept.
    pub fn matcher(&self) -> Result<Matcher<'_>> {
        Matcher::new(self)
    }

    /// Puts the names behind `"all-linear"`, as PEFT does: every linear module of the base model but the output head.
    /// Other targets stay as they are.
    pub fn expand_all_linear<'a>(&mut self, linear: impl IntoIterator<Item = &'a str>, head: Option<&str>) {
        if self.target_modules == Targets::AllLinear {
            let names = linear.into_iter().filter(|&name| Some(name) != head).map(str::to_owned);
            self.target_modules = Targets::Names(Names::List(names.collect()));
        }
    }

    /// As PEFT 0.21 writes it: every key, sorted, two spaces deep. Only within `rank_pattern` and `alpha_pattern` the
    /// order stays, because the first match wins; [`Adapter::save`](super::Adapter::save) makes theirs immaterial.
    pub fn to_json(&self) -> String {
        let mut map = defaults();
        let read = Self::from_map(self.raw.clone()).map(|read| read.typed()).unwrap_or_default();
        map.extend(self.raw.clone());
        for (key, value) in self.typed() {
            // What was not changed is written as it was read: 16.0 stays 16.0, and 1 does not become [1]. As text,
            // because the order of patterns matters.
            let changed = read.get(&key).map(Value::to_string) != Some(value.to_string());
            if changed || !self.raw.contains_key(&key) {
                map.insert(key, value);
            }
        }
        map.insert("inference_mode".into(), true.into());
        map.sort_keys();
        for (key, value) in &mut map {
            if key != "rank_pattern" && key != "alpha_pattern" {
                value.sort_all_objects();
            }
        }
        ascii(&serde_json::to_string_pretty(&map).unwrap_or_default())
    }

    /// The typed fields as JSON.
    fn typed(&self) -> Map<String, Value> {
        let names = |names: &Names| match names {
            Names::List(list) => json!(list),
            Names::Regex(pattern) => json!(pattern),
        };
        let list = |list: &Vec<String>| if list.is_empty() { Value::Null } else { json!(list) };
        let ranks = first_of_each(self.rank_pattern.iter().map(|(pattern, r)| (pattern, json!(r))));
        let alphas = first_of_each(self.alpha_pattern.iter().map(|(pattern, alpha)| (pattern, number(*alpha))));
        let fields = [
            ("r", json!(self.r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("rank_pattern", Value::Object(ranks)),
            ("alpha_pattern", Value::Object(alphas)),
            ("use_rslora", self.use_rslora.into()),
            ("use_dora", self.use_dora.into()),
            ("lora_dropout", self.lora_dropout.into()),
            ("fan_in_fan_out", self.fan_in_fan_out.into()),
            ("bias", self.bias.name().into()),
            ("lora_bias", self.lora_bias.into()),
            (
                "target_modules",
                match &self.target_modules {
                    Targets::Names(list) => names(list),
                    Targets::AllLinear => "all-linear".into(),
                },
            ),
            ("exclude_modules", self.exclude_modules.as_ref().map_or(Value::Null, names)),
            ("layers_to_transform", self.layers_to_transform.as_ref().map_or(Value::Null, |list| json!(list))),
            ("layers_pattern", list(&self.layers_pattern)),
            ("modules_to_save", list(&self.modules_to_save)),
            ("task_type", json!(self.task_type)),
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
        ];
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

impl Bias {
    /// As in adapter_config.json.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::LoraOnly => "lora_only",
            Self::All => "all",
        }
    }
}

/// Patterns as an object: of equal keys the first counts.
fn first_of_each<'a>(patterns: impl Iterator<Item = (&'a String, Value)>) -> Map<String, Value> {
    patterns.fold(Map::new(), |mut map, (pattern, value)| {
        map.entry(pattern).or_insert(value);
        map
    })
}

/// An integer where it is one: Python writes `16`, not `16.0`, for the α that it was given.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { Value::from(value as i64) } else { Value::from(value) }
}

/// Escapes what is not ASCII, as Python does, so that no reader's encoding matters. In JSON it stands only within
/// strings.
fn ascii(json: &str) -> String {
    let mut units = [0; 2];
    json.chars().fold(String::with_capacity(json.len()), |mut out, character| {
        if character.is_ascii() {
            out.push(character);
        } else {
            out.extend(character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
        }
        out
    })
}

/// All keys that PEFT 0.21.2 writes, with its defaults.
fn defaults() -> Map<String, Value> {
    let all = json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
        "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0,
        "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
        "monteclora_config": null, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8,
        "rank_pattern": {}, "revision": null, "target_modules": null, "target_parameters": null, "task_type": null,
        "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
        "use_rslora": false, "velora_config": null,
    });
    match all {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
