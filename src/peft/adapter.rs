//! An adapter: its configuration, the factors of each module, and what else it brings.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use safetensors::SafeTensors;

use super::error::shorten;
use super::key::{Key, Part};
use super::{Bias, Config, Error, ErrorKind, Matcher, Module, Result, Tensor, file};
use crate::Dtype;

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";
/// Bytes of the header of adapter_model.safetensors beyond which it is not read: a hundred thousand tensors.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Bytes of one tensor's key: the work on a module's name grows faster than the name.
const MAX_KEY_BYTES: usize = 1 << 10;

/// What an adapter holds for one linear module.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Factors {
    /// R × K, `lora_A.weight`.
    pub a: Tensor,
    /// N × R, `lora_B.weight`.
    pub b: Tensor,
    /// N, `lora_B.bias`, inside the scale: y += s · (B A x + this). Present if and only if the configuration's
    /// `lora_bias` is set.
    pub b_bias: Option<Tensor>,
    /// N, `lora_magnitude_vector` of DoRA: y = this / ‖W + s · B A‖ ∘ (W x + s · B A x), norms of rows. Present if and only if the
    /// configuration's `use_dora` is set.
    pub magnitude: Option<Tensor>,
    /// N, a trained bias that takes the place of the base layer's (`bias` other than `"none"`).
    pub bias: Option<Tensor>,
    /// The base layer's weight, where the adapter brings it (an output head, say): N × K, or K × N with `fan_in_fan_out`.
    pub weight: Option<Tensor>,
}

impl Factors {
    /// A, R × K, and B, N × R.
    pub fn new(a: Tensor, b: Tensor) -> Self {
        Self { a, b, b_bias: None, magnitude: None, bias: None, weight: None }
    }
}

/// A linear module of a base model, to hold an adapter against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear<'a> {
    /// Its name, as `model.layers.0.self_attn.q_proj`.
    pub name: &'a str,
    /// Output features, N.
    pub n: usize,
    /// Input features, K.
    pub k: usize,
}

/// An adapter as PEFT keeps it: a folder of adapter_config.json and adapter_model.safetensors.
///
/// Everything in it is consistent: each module is targeted by the configuration, and its tensors have the rank the
/// configuration gives it.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    config: Config,
    modules: BTreeMap<String, (Module, Factors)>,
    saved: BTreeMap<String, Tensor>,
    biases: BTreeMap<String, Tensor>,
}

impl Adapter {
    /// An adapter without modules, to put factors into.
    pub fn new(config: Config) -> Self {
        Self { config, modules: BTreeMap::new(), saved: BTreeMap::new(), biases: BTreeMap::new() }
    }

    /// Reads the folder that PEFT's `save_pretrained` wrote. The file of tensors is
    /// held once, and shared by them; reading its header and the configuration takes at most a hundred times their size
    /// for a while.
    ///
    /// # Errors
    ///
    /// Everything but a complete and consistent adapter of supported features is refused, with the file and the tensor
    /// or key.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let config = Config::read(dir.join(CONFIG_FILE))?;
        let path = dir.join(TENSOR_FILE);
        file::read(&path, u64::MAX).and_then(|tensors| Self::assemble(config, tensors)).map_err(|error| error.at(&path))
    }

    /// From the contents of the two files.
    ///
    /// # Errors
    ///
    /// As [`Adapter::load`].
    pub fn load_bytes(config: &[u8], tensors: Vec<u8>) -> Result<Self> {
        Self::assemble(Config::from_slice(config)?, tensors)
    }

    fn assemble(config: Config, bytes: Vec<u8>) -> Result<Self> {
        let mut parts: BTreeMap<String, BTreeMap<Part, Tensor>> = BTreeMap::new();
        let mut adapter = Self::new(config);
        for (name, tensor) in tensors(bytes)? {
            let tensor = tensor?;
            let (module, part) = match Key::parse(&name, tensor.shape())? {
                Key::Module { module, part } => (module, part),
                Key::Base { parameter } => {
                    adapter.insert_parameter(parameter, tensor)?;
                    continue;
                }
            };
            if parts.entry(module.to_owned()).or_default().insert(part, tensor).is_some() {
                return Err(twice(name));
            }
        }
        // Not each of them: PEFT writes both names that the head of a sequence classifier may have.
        if adapter.saved.is_empty()
            && let Some(module) = adapter.config.modules_to_save.first()
        {
            let because = format!("`modules_to_save` names `{module}`");
            return Err(ErrorKind::Missing { tensor: format!("base_model.model.{module}.weight"), because }.into());
        }
        let config = adapter.config.clone();
        let matcher = config.matcher()?;
        for (module, mut parts) in parts {
            let targeted = targeted(&matcher, &module, parts.keys().next().copied().unwrap_or(Part::A))?;
            let factors = factors(&module, &mut parts)?;
            check_factors(&adapter.config, &module, targeted, &factors)?;
            adapter.modules.insert(module, (targeted, factors));
        }
        adapter.check_modules()?;
        Ok(adapter)
    }

    fn check_modules(&self) -> Result<()> {
        if !self.modules.is_empty() {
            return Ok(());
        }
        let because = "an adapter has factors for at least one module".into();
        Err(ErrorKind::Missing { tensor: Key::name("…", Part::A), because }.into())
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Name (as `model.layers.0.self_attn.q_proj`), rank and scale, and factors of each module, sorted by name.
    pub fn modules(&self) -> impl ExactSizeIterator<Item = (&str, Module, &Factors)> {
        self.modules.iter().map(|(name, (module, factors))| (name.as_str(), *module, factors))
    }

    /// Rank and scale, and factors of the module of this name.
    pub fn get(&self, name: &str) -> Option<(Module, &Factors)> {
        self.modules.get(name).map(|(module, factors)| (*module, factors))
    }

    /// Parameters of the modules that were saved whole (`modules_to_save`), by their name in the base model, as
    /// `lm_head.weight`.
    pub fn saved(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.saved.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Trained biases of modules without factors (`bias` = `"all"`), by their name in the base model.
    pub fn biases(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.biases.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Sets the probability of dropout that the configuration names: the one field of it that no tensor must agree with.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Field`] unless `p` is from 0 to 1. The adapter is as before then.
    pub fn set_dropout(&mut self, p: f64) -> Result<()> {
        let config = self.config.clone().with_dropout(p);
        config.check()?;
        self.config = config;
        Ok(())
    }

    /// Puts the factors of a module, in place of those it may have.
    ///
    /// # Errors
    ///
    /// Where the configuration does not target `name`, or gives it another rank or other tensors than `factors` has. The
    /// adapter is as before then.
    pub fn insert(&mut self, name: impl Into<String>, factors: Factors) -> Result<()> {
        let name = name.into();
        let module = targeted(&self.config.matcher()?, &name, Part::A)?;
        check_factors(&self.config, &name, module, &factors)?;
        self.modules.insert(name, (module, factors));
        Ok(())
    }

    /// Puts a parameter of a module that is saved whole, or a trained bias, by its name in the base model.
    ///
    /// # Errors
    ///
    /// Where neither `modules_to_save` nor `bias` asks for it.
    pub fn insert_parameter(&mut self, name: impl Into<String>, tensor: Tensor) -> Result<()> {
        let name = name.into();
        match self.base_parameter(&format!("{}{name}", Key::PREFIX), &name)? {
            Base::Saved => self.saved.insert(name, tensor),
            Base::Bias => self.biases.insert(name, tensor),
        };
        Ok(())
    }

    /// Where a parameter of the base model belongs.
    fn base_parameter(&self, key: &str, parameter: &str) -> Result<Base> {
        let owners = parameter.match_indices('.').map(|(dot, _)| &parameter[..dot]);
        // PEFT wraps a module where its name ends so, be it within a word.
        if owners
            .into_iter()
            .any(|owner| self.config.modules_to_save.iter().any(|saved| owner.ends_with(saved.as_str())))
        {
            return Ok(Base::Saved);
        }
        if self.config.bias == Bias::All && parameter.ends_with(".bias") {
            return Ok(Base::Bias);
        }
        let because = "neither `target_modules`, `modules_to_save` nor `bias` asks for it".into();
        Err(ErrorKind::Unexpected { tensor: key.to_owned(), because }.into())
    }

    /// Holds the adapter against the base model: every linear module it targets has factors of its dimensions, and every
    /// module with factors is there. `head` is the output head's name, for `"all-linear"`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Missing`], [`ErrorKind::Shape`], [`ErrorKind::Unexpected`] with the tensor's key.
    pub fn check_base(&self, linears: &[Linear<'_>], head: Option<&str>) -> Result<()> {
        let mut config = self.config.clone();
        config.expand_all_linear(linears.iter().map(|linear| linear.name), head);
        let matcher = config.matcher()?;
        let by_name: HashMap<&str, &Linear<'_>> = linears.iter().map(|linear| (linear.name, linear)).collect();
        for linear in linears {
            if matcher.targets(linear.name)?.is_some() && !self.modules.contains_key(linear.name) {
                let because = format!("the configuration targets the base model's module `{}`", linear.name);
                return Err(ErrorKind::Missing { tensor: Key::name(linear.name, Part::A), because }.into());
            }
        }
        for (name, module, factors) in self.modules() {
            let Some(linear) = by_name.get(name) else {
                let because = format!("the base model has no linear module `{name}`");
                return Err(ErrorKind::Unexpected { tensor: Key::name(name, Part::A), because }.into());
            };
            let base = || format!("the base layer is {} × {}", linear.n, linear.k);
            shape(name, Part::A, &factors.a, &[module.r, linear.k], base)?;
            shape(name, Part::B, &factors.b, &[linear.n, module.r], base)?;
        }
        Ok(())
    }

    /// Writes the folder as PEFT does, in F32, F16 or BF16 as the tensors are. Both files are complete beside the old
    /// ones before either takes its place, so that a failure leaves those as they were.
    ///
    /// Where the order of `rank_pattern` or `alpha_pattern` matters, names of modules take their place: PEFT sorts them
    /// on saving, which could change a rank or a scale.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] with the file; [`ErrorKind::Missing`] for an adapter without factors, which nobody could load.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.check_modules()?;
        let dir = dir.as_ref();
        let config = self.portable_config()?.to_json();
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = safetensors::serialize(self.tensors(), Some(metadata)).map_err(malformed)?;
        file::replace(dir, [(TENSOR_FILE, &tensors[..]), (CONFIG_FILE, config.as_bytes())])
    }

    /// The configuration as it is saved: `all-linear` by names, and patterns that mean the same in any order.
    fn portable_config(&self) -> Result<Config> {
        let mut config = self.config.clone();
        config.expand_all_linear(self.modules.keys().map(String::as_str), None);
        config.order_free(self.modules.iter().map(|(name, (module, _))| (name.as_str(), *module)))
    }

    /// Every tensor with its key.
    fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let modules = self.modules.iter().flat_map(|(name, (_, factors))| {
            parts(factors).into_iter().filter_map(move |(part, tensor)| Some((Key::name(name, part), tensor?)))
        });
        let base = self.saved.iter().chain(&self.biases);
        modules.chain(base.map(|(name, tensor)| (format!("{}{name}", Key::PREFIX), tensor)))
    }
}

/// Where a parameter of the base model belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    Saved,
    Bias,
}

impl Config {
    /// The same ranks and scales for `modules`, in patterns whose order does not matter.
    fn order_free<'a>(&self, modules: impl Iterator<Item = (&'a str, Module)> + Clone) -> Result<Self> {
        let mut sorted = self.clone();
        // Of equal keys the first wins: a stable sort keeps it first.
        sorted.rank_pattern.sort_by(|one, other| one.0.cmp(&other.0));
        sorted.rank_pattern.dedup_by(|later, first| later.0 == first.0);
        sorted.alpha_pattern.sort_by(|one, other| one.0.cmp(&other.0));
        sorted.alpha_pattern.dedup_by(|later, first| later.0 == first.0);
        let matcher = sorted.matcher()?;
        for (name, module) in modules.clone() {
            if matcher.linear(name)? != Some(module) {
                // No two of these match the same name.
                let exact = |name: &str| format!("^{}", fancy_regex::escape(name));
                let ranks = modules.clone().filter(|(_, module)| module.r != self.r);
                let alphas = modules.clone().filter(|(_, module)| module.alpha != self.lora_alpha);
                let mut exactly = self.clone();
                exactly.rank_pattern = ranks.map(|(name, module)| (exact(name), module.r)).collect();
                exactly.alpha_pattern = alphas.map(|(name, module)| (exact(name), module.alpha)).collect();
                return Ok(exactly);
            }
        }
        drop(matcher);
        Ok(sorted)
    }
}

/// The tensors of a safetensors file by name, in order of names. They share `bytes`.
fn tensors(bytes: Vec<u8>) -> Result<impl Iterator<Item = (String, Result<Tensor>)>> {
    if let Some(length) = bytes.first_chunk().map(|length| u64::from_le_bytes(*length))
        && length > MAX_HEADER_BYTES
    {
        let message = format!("its header claims {length} bytes, at most {MAX_HEADER_BYTES} are accepted");
        return Err(ErrorKind::Safetensors { message }.into());
    }
    let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(malformed)?;
    let file = Arc::new(bytes);
    let data = size_of::<u64>() + header;
    let infos = metadata.tensors();
    let mut tensors: Vec<(String, Result<Tensor>)> = infos
        .into_iter()
        .map(|(name, info)| {
            let dtype = match info.dtype {
                _ if name.len() > MAX_KEY_BYTES => {
                    let because = format!("its name has {} bytes, at most {MAX_KEY_BYTES} are accepted", name.len());
                    Err(ErrorKind::Unexpected { tensor: shorten(&name), because }.into())
                }
                safetensors::Dtype::F32 => Ok(Dtype::F32),
                safetensors::Dtype::F16 => Ok(Dtype::F16),
                safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
                other => Err(Error::from(ErrorKind::Dtype { tensor: name.clone(), got: format!("{other:?}") })),
            };
            // `read_metadata` holds the offsets against the shape, and their end against that of the file.
            let range = data + info.data_offsets.0..data + info.data_offsets.1;
            let tensor = dtype.map(|dtype| Tensor::in_file(dtype, info.shape.clone(), file.clone(), range));
            (name, tensor)
        })
        .collect();
    tensors.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(tensors.into_iter())
}

/// Rank and scale of a module of which `part` is there.
fn targeted(matcher: &Matcher<'_>, name: &str, part: Part) -> Result<Module> {
    matcher.linear(name)?.ok_or_else(|| {
        let because = format!("the configuration does not target the module `{name}`");
        ErrorKind::Unexpected { tensor: Key::name(name, part), because }.into()
    })
}

fn malformed(error: safetensors::SafeTensorError) -> Error {
    ErrorKind::Safetensors { message: error.to_string() }.into()
}

fn twice(tensor: String) -> Error {
    ErrorKind::Unexpected { tensor, because: "another key means the same tensor".into() }.into()
}

/// A and B together, or the key that lacks.
fn factors(module: &str, parts: &mut BTreeMap<Part, Tensor>) -> Result<Factors> {
    let (a, b) = match (parts.remove(&Part::A), parts.remove(&Part::B)) {
        (Some(a), Some(b)) => (a, b),
        (a, b) => {
            let (missing, there) = match (a.is_some(), b.is_some()) {
                (true, _) => (Part::B, Some(Part::A)),
                (_, true) => (Part::A, Some(Part::B)),
                _ => (Part::A, parts.keys().next().copied()),
            };
            let because = format!("`{}` is there", Key::name(module, there.unwrap_or(Part::A)));
            return Err(ErrorKind::Missing { tensor: Key::name(module, missing), because }.into());
        }
    };
    let [b_bias, magnitude, bias, weight] =
        [Part::BBias, Part::Magnitude, Part::Bias, Part::Weight].map(|part| parts.remove(&part));
    Ok(Factors { a, b, b_bias, magnitude, bias, weight })
}

fn parts(factors: &Factors) -> [(Part, Option<&Tensor>); 6] {
    [
        (Part::A, Some(&factors.a)),
        (Part::B, Some(&factors.b)),
        (Part::BBias, factors.b_bias.as_ref()),
        (Part::Magnitude, factors.magnitude.as_ref()),
        (Part::Bias, factors.bias.as_ref()),
        (Part::Weight, factors.weight.as_ref()),
    ]
}

/// That the tensors agree with each other and with the configuration.
fn check_factors(config: &Config, name: &str, module: Module, factors: &Factors) -> Result<()> {
    let Module { r, .. } = module;
    let &[_, k] = factors.a.shape() else {
        return Err(misshaped(name, Part::A, &factors.a, format!("[{r}, K]")));
    };
    let &[n, _] = factors.b.shape() else {
        return Err(misshaped(name, Part::B, &factors.b, format!("[N, {r}]")));
    };
    let rank = || format!("the configuration gives `{name}` rank {r}");
    shape(name, Part::A, &factors.a, &[r, k.max(1)], rank)?;
    shape(name, Part::B, &factors.b, &[n.max(1), r], rank)?;
    let expected = [
        (Part::BBias, &factors.b_bias, vec![n], config.lora_bias, "`lora_bias` is not set"),
        (Part::Magnitude, &factors.magnitude, vec![n], config.use_dora, "`use_dora` is not set"),
        (Part::Bias, &factors.bias, vec![n], config.bias != Bias::None, "`bias` is \"none\""),
        (Part::Weight, &factors.weight, if config.fan_in_fan_out { vec![k, n] } else { vec![n, k] }, true, ""),
    ];
    for (part, tensor, dimensions, allowed, because) in expected {
        match tensor {
            Some(_) if !allowed => {
                return Err(ErrorKind::Unexpected { tensor: Key::name(name, part), because: because.into() }.into());
            }
            Some(tensor) => shape(name, part, tensor, &dimensions, || format!("B has {n} rows, A {k} columns"))?,
            None => {
                let asking = match part {
                    Part::BBias => "`lora_bias` is set",
                    Part::Magnitude => "`use_dora` is set",
                    _ => continue,
                };
                if allowed {
                    return Err(ErrorKind::Missing { tensor: Key::name(name, part), because: asking.into() }.into());
                }
            }
        }
    }
    Ok(())
}

fn shape(name: &str, part: Part, tensor: &Tensor, expected: &[usize], because: impl Fn() -> String) -> Result<()> {
    match tensor.shape() == expected {
        true => Ok(()),
        false => Err(misshaped(name, part, tensor, format!("{expected:?}, because {}", because()))),
    }
}

fn misshaped(name: &str, part: Part, tensor: &Tensor, expected: String) -> Error {
    ErrorKind::Shape { tensor: Key::name(name, part), got: tensor.shape().to_vec(), expected }.into()
}

/// For writing.
impl safetensors::View for &Tensor {
    fn dtype(&self) -> safetensors::Dtype {
        match Tensor::dtype(self) {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        }
    }
    fn shape(&self) -> &[usize] {
        Tensor::shape(self)
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes().into()
    }
    fn data_len(&self) -> usize {
        self.bytes().len()
    }
}
