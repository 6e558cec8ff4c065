//! Any bytes as adapter_config.json, and as an adapter: refused, or read as a second reading of the same bytes says.
//!
//! Shared with the fuzzer's targets `config` and `adapter`, which have none of the tests' other modules.
#![allow(clippy::panic)] // fails as tests do

use std::collections::BTreeMap;

use fused_lora::Dtype;
use fused_lora::peft::{Adapter, Config, Error, ErrorKind, Module, Tensor};
use serde_json::{Map, Value, json};

/// What a module's name may look like.
const NAMES: [&str; 6] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.experts.3.up_proj",
    "transformer.h.1.attn.c_attn",
    "lm_head",
    "q_proj",
    "",
];

/// The text of a configuration, whether it is one or not.
pub fn config(text: &[u8]) -> Result<Config, ErrorKind> {
    let text = String::from_utf8_lossy(text);
    let config = Config::from_json(&text).map_err(short)?;
    let raw: Map<String, Value> = serde_json::from_str(&text).expect("what is accepted is JSON");
    check_fields(&config, &raw);
    let matcher = config.matcher().expect("it compiled before");
    for name in NAMES {
        match matcher.targets(name).map_err(short) {
            Ok(Some(module)) => check_module(&raw, name, module),
            Ok(None) | Err(ErrorKind::AllLinear { .. } | ErrorKind::PatternCost { .. }) => {}
            Err(other) => panic!("{name}: {other:?}"),
        }
    }
    drop(matcher);
    let written = config.to_json();
    let again = Config::from_json(&written).expect("what is written is read");
    assert_eq!(again.to_json(), written);
    check_fields(&again, &serde_json::from_str(&written).expect("JSON"));
    assert_eq!(fields(&again), fields(&config));
    Ok(config)
}

/// A configuration, the header of a safetensors file and its data, with a zero byte between each two.
pub fn adapter(input: &[u8]) -> Result<Adapter, ErrorKind> {
    let mut parts = input.splitn(3, |&byte| byte == 0);
    let [config, header, data] = [(); 3].map(|()| parts.next().unwrap_or_default());
    files(config, &[&(header.len() as u64).to_le_bytes()[..], header, data].concat())
}

/// The two files of an adapter.
pub fn files(config: &[u8], tensors: &[u8]) -> Result<Adapter, ErrorKind> {
    let adapter = Adapter::load_bytes(config, tensors.to_vec()).map_err(short)?;
    assert_eq!(self::config(config).as_ref(), Ok(adapter.config()));
    let raw: Map<String, Value> = serde_json::from_slice(config).expect("what is accepted is JSON");
    for (name, module, factors) in adapter.modules() {
        check_module(&raw, name, module);
        let (&[r, k], &[n, of_b]) = (factors.a.shape(), factors.b.shape()) else { panic!("{name}: {factors:?}") };
        assert!(r == module.r && r == of_b && k > 0 && n > 0, "{name}: {factors:?}");
        assert_eq!([factors.a.to_f32().len(), factors.b.to_f32().len()], [r * k, n * r], "{name}");
        let vectors = [&factors.b_bias, &factors.magnitude, &factors.bias].into_iter().flatten();
        assert!(vectors.into_iter().all(|vector| vector.shape() == [n]), "{name}: {factors:?}");
    }
    assert!(adapter.modules().len() > 0);
    assert_eq!(held(&adapter), second_reading(tensors), "every tensor of the file, and nothing else");
    Ok(adapter)
}

/// Messages stay short, whatever they quote.
fn short(error: Error) -> ErrorKind {
    assert!(error.to_string().len() < 2_000, "{error}");
    error.kind
}

type Read = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The file read once more, by the format's description alone.
fn second_reading(file: &[u8]) -> Read {
    let (length, rest) = file.split_first_chunk().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Map<String, Value> = serde_json::from_slice(header).expect("a header");
    let tensors = header.iter().filter(|(key, _)| *key != "__metadata__");
    let number = |value: &Value| value.as_u64().expect("a number") as usize;
    tensors
        .map(|(key, tensor)| {
            let dtype = match tensor["dtype"].as_str() {
                Some("F32") => Dtype::F32,
                Some("F16") => Dtype::F16,
                Some("BF16") => Dtype::Bf16,
                other => panic!("{key} is {other:?}"),
            };
            let shape: Vec<usize> = tensor["shape"].as_array().expect("a shape").iter().map(number).collect();
            let bytes = data[number(&tensor["data_offsets"][0])..number(&tensor["data_offsets"][1])].to_vec();
            assert_eq!(bytes.len(), shape.iter().product::<usize>() * dtype.size(), "{key}");
            // With the adapter's name left in, it is the same tensor.
            let key = key.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.");
            (key.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector"), (dtype, shape, bytes))
        })
        .collect()
}

/// What an adapter holds, under the keys of a file.
fn held(adapter: &Adapter) -> Read {
    let mut all = Read::new();
    let mut put = |name: &str, suffix: &str, tensor: &Tensor| {
        let value = (tensor.dtype(), tensor.shape().to_vec(), tensor.bytes().to_vec());
        assert_eq!(
            all.insert(format!("base_model.model.{name}{suffix}"), value),
            None,
            "{name}{suffix} is there twice"
        );
    };
    for (name, _, factors) in adapter.modules() {
        put(name, ".lora_A.weight", &factors.a);
        put(name, ".lora_B.weight", &factors.b);
        let others = [
            (".lora_B.bias", &factors.b_bias),
            (".lora_magnitude_vector", &factors.magnitude),
            (".base_layer.bias", &factors.bias),
            (".base_layer.weight", &factors.weight),
        ];
        for (suffix, tensor) in others {
            tensor.iter().for_each(|tensor| put(name, suffix, tensor));
        }
    }
    adapter.saved().chain(adapter.biases()).for_each(|(name, tensor)| put(name, "", tensor));
    all
}

/// The value at `key`, or `default` where there is none; a null is none, but where PEFT has no null there.
fn value<'a>(raw: &'a Map<String, Value>, key: &str, default: &'a Value) -> &'a Value {
    raw.get(key).filter(|value| !value.is_null()).unwrap_or(default)
}

/// Fields with one way to be read hold what the JSON says.
fn check_fields(config: &Config, raw: &Map<String, Value>) {
    assert_eq!(raw["peft_type"], json!("LORA"));
    let eight = json!(8);
    assert_eq!(json!(config.r), *raw.get("r").unwrap_or(&eight));
    assert_eq!(Some(config.lora_alpha), raw.get("lora_alpha").unwrap_or(&eight).as_f64());
    assert_eq!(Some(config.lora_dropout), raw.get("lora_dropout").unwrap_or(&json!(0)).as_f64());
    let switches = [
        ("use_rslora", config.use_rslora),
        ("use_dora", config.use_dora),
        ("fan_in_fan_out", config.fan_in_fan_out),
        ("lora_bias", config.lora_bias),
    ];
    for (key, switch) in switches {
        assert_eq!(json!(switch), *value(raw, key, &json!(false)), "{key}");
    }
    let patterns = |key| value(raw, key, &json!({})).as_object().cloned().expect("an object");
    let ranks = config.rank_pattern.iter().map(|(pattern, r)| (pattern.clone(), json!(r))).collect();
    assert_eq!(patterns("rank_pattern"), ranks);
    let alphas =
        patterns("alpha_pattern").into_iter().map(|(pattern, alpha)| (pattern, alpha.as_f64().expect("a number")));
    assert_eq!(alphas.collect::<Vec<_>>(), config.alpha_pattern);
    assert!(!(config.use_dora && config.lora_bias));
}

/// Rank, α and scale are among those that the configuration names, and belong together.
fn check_module(raw: &Map<String, Value>, name: &str, Module { r, alpha, scale }: Module) {
    let (nothing, eight) = (json!({}), json!(8));
    let named = |pattern, key| {
        let patterns = value(raw, pattern, &nothing).as_object().into_iter().flat_map(Map::values);
        patterns.chain([raw.get(key).unwrap_or(&eight)]).filter_map(Value::as_f64)
    };
    assert!(r > 0 && named("rank_pattern", "r").any(|rank| rank == r as f64), "{name} has rank {r}");
    assert!(named("alpha_pattern", "lora_alpha").any(|named| named == alpha), "{name} has α {alpha}");
    let divisor = if raw.get("use_rslora") == Some(&json!(true)) { (r as f64).sqrt() } else { r as f64 };
    assert_eq!(scale, alpha / divisor, "{name}");
    let targets = &raw["target_modules"];
    // By names alone it is plain who is meant.
    if let Some(list) = targets.as_array() {
        let is_named = |target: &Value| {
            target.as_str().is_some_and(|target| name == target || name.ends_with(&format!(".{target}")))
        };
        assert!(list.iter().any(is_named), "{name} is none of {targets}");
    }
}

/// What must survive being written and read.
fn fields(config: &Config) -> String {
    let Config {
        r,
        lora_alpha,
        rank_pattern,
        alpha_pattern,
        use_rslora,
        use_dora,
        lora_dropout,
        fan_in_fan_out,
        bias,
        lora_bias,
        ..
    } = config;
    let Config { target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, .. } = config;
    let Config { task_type, base_model_name_or_path, .. } = config;
    let numbers = (
        r,
        lora_alpha,
        rank_pattern,
        alpha_pattern,
        (use_rslora, use_dora),
        lora_dropout,
        fan_in_fan_out,
        bias,
        lora_bias,
    );
    let names = (target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save);
    format!("{numbers:?} {names:?} {task_type:?} {base_model_name_or_path:?}")
}
