//! Adapters that PEFT wrote: each is read, written and matched as PEFT does, or refused by name.
#![cfg(feature = "peft")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::peft::{fresh, golden, json_file, values};
use fused_lora::Dtype;
use fused_lora::peft::{Adapter, Config, ErrorKind, Linear, Module};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

/// Every folder below `dir` that holds an adapter.
fn adapters_below(dir: &Path, found: &mut Vec<PathBuf>) {
    if dir.join("adapter_config.json").is_file() {
        found.push(dir.to_owned());
    }
    for entry in fs::read_dir(dir).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            adapters_below(&path, found);
        }
    }
}

/// The recorded adapters that PEFT loads without a word.
fn recorded() -> Vec<PathBuf> {
    let mut found = Vec::new();
    adapters_below(&golden(""), &mut found);
    found.retain(|path| !path.starts_with(golden("peft/format")));
    found.sort();
    found
}

/// Name, N and K of each linear module of the recorded Llama.
fn llama() -> Vec<(String, usize, usize)> {
    let bytes = fs::read(golden("peft/llama/base/model.safetensors")).expect("the base model");
    let (_, metadata) = SafeTensors::read_metadata(&bytes).expect("safetensors");
    let matrices =
        metadata.tensors().into_iter().filter(|(name, info)| info.shape.len() == 2 && !name.contains("embed"));
    matrices.map(|(name, info)| (name.trim_end_matches(".weight").to_owned(), info.shape[0], info.shape[1])).collect()
}

fn on_llama(adapter: &Adapter) -> Result<(), ErrorKind> {
    let llama = llama();
    let linears: Vec<_> = llama.iter().map(|(name, n, k)| Linear { name, n: *n, k: *k }).collect();
    adapter.check_base(&linears, Some("lm_head")).map_err(|error| error.kind)
}

/// Every recorded adapter loads and, saved again, gives the very same files; or it is refused for the feature it needs.
#[test]
fn recorded_adapters_round_trip() {
    let refused = BTreeMap::from([
        ("peft/llama/adapters/embed", "LoRA on an embedding"),
        ("embedding/adapter", "LoRA on an embedding"),
        ("peft/llama/adapters/tokens", "trainable tokens"),
    ]);
    let (mut loaded, mut unsupported) = (0, 0);
    for dir in recorded() {
        let name = dir.strip_prefix(golden("")).expect("below").to_str().expect("UTF-8").to_owned();
        let adapter = match (Adapter::load(&dir), refused.get(name.as_str())) {
            (Err(error), Some(expected)) => {
                let ErrorKind::Unsupported { feature, .. } = error.kind else { panic!("{name}: {error}") };
                assert_eq!(feature, *expected, "{name}");
                assert!(error.file.is_some_and(|file| file.starts_with(&dir)), "{name}");
                unsupported += 1;
                continue;
            }
            (adapter, None) => adapter.unwrap_or_else(|error| panic!("{name}: {error}")),
            (Ok(_), Some(feature)) => panic!("{name} needs {feature}, expected it to be refused"),
        };
        let out = fresh(&name.replace('/', "-"));
        adapter.save(&out).unwrap_or_else(|error| panic!("{name}: {error}"));
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let [was, is] = [&dir, &out].map(|dir| fs::read(dir.join(file)).expect("a readable file"));
            assert_eq!(was, is, "{name}: {file} changed");
        }
        assert_eq!(Adapter::load(&out).expect("what was saved loads"), adapter, "{name}");
        assert_eq!(fs::read_dir(&out).expect("the folder").count(), 2, "{name}: nothing but the two files is left");
        loaded += 1;
    }
    // At least those that were there when this was written: recordings for other tests may be added.
    assert!(loaded >= 37, "{loaded}");
    assert_eq!(unsupported, refused.len());
}

/// The recorded ranks, α and scales of the Llama's adapters, and their dimensions.
#[test]
fn recorded_scales_and_shapes() {
    let cases = json_file(&golden("peft/llama/cases.json"));
    let mut seen = 0;
    for (name, case) in cases["adapters"].as_object().expect("an object") {
        let Ok(adapter) = Adapter::load(golden("peft/llama/adapters").join(name)) else { continue };
        let Some(expected) = case["modules"].as_object() else { continue };
        assert_eq!(adapter.modules().len(), expected.len(), "{name}");
        for (path, module, factors) in adapter.modules() {
            let expected = &expected[path];
            assert_eq!(json!(module.r), expected["r"], "{name} {path}");
            assert_eq!(Some(module.alpha), expected["lora_alpha"].as_f64(), "{name} {path}");
            assert_eq!(Some(module.scale), expected["scaling"].as_f64(), "{name} {path}");
            assert_eq!(json!(factors.a.shape()), json!([module.r, expected["in_features"]]), "{name} {path}");
            assert_eq!(json!(factors.b.shape()), json!([expected["out_features"], module.r]), "{name} {path}");
            seen += 1;
        }
        on_llama(&adapter).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    assert_eq!(seen, 34);
}

/// Recorded by hand and, for the second file, from random configurations.
#[test]
fn matching_is_pefts() {
    assert_eq!(matching_agrees("peft/matching.json"), 15 * 44);
    assert_eq!(matching_agrees("peft/matching_random.json"), 150 * 29);
}

fn matching_agrees(file: &str) -> usize {
    let recorded = json_file(&golden(file));
    let names: Vec<&str> = recorded["names"].as_array().expect("names").iter().filter_map(Value::as_str).collect();
    let mut checked = 0;
    for case in recorded["cases"].as_array().expect("cases") {
        let mut config: Map<String, Value> = case["config"].as_object().expect("a config").clone();
        config.insert("peft_type".into(), "LORA".into());
        // The file is sorted; what was matched was not.
        for (key, order) in case["pattern_order"].as_object().expect("orders") {
            let order = order.as_array().expect("an order").iter().filter_map(Value::as_str);
            let patterns = order.map(|pattern| (pattern.to_owned(), config[key][pattern].clone())).collect();
            config.insert(key.clone(), Value::Object(patterns));
        }
        let text = Value::Object(config).to_string();
        let config = Config::from_json(&text).expect(&text);
        let again = Config::from_json(&config.to_json()).expect("what was written is read");
        for name in &names {
            let expected = case["matched"].get(*name).filter(|matched| matched.is_object()).map(|matched| {
                let number = |key: &str| matched[key].as_f64().expect("a number");
                Module { r: number("r") as usize, alpha: number("lora_alpha"), scale: number("scaling") }
            });
            assert_eq!(config.targets(name).expect("matched"), expected, "{name} in {text}");
            assert_eq!(again.targets(name).expect("matched"), expected, "{name} in {text}, written and read");
            checked += 1;
        }
    }
    checked
}

/// Names and rules that the recorded cases leave out, each read in PEFT's source.
#[test]
fn matching_beyond_the_records() {
    let config = |text: &str| Config::from_json(&format!("{{\"peft_type\": \"LORA\", {text}}}")).expect(text);
    let targeted = |text: &str, name: &str| config(text).targets(name).expect(text).is_some();
    let rank = |text: &str, name: &str| {
        config(&format!("\"target_modules\": \".*\", {text}")).targets(name).unwrap().unwrap().r
    };
    // Look-around, as in adapters of multimodal models; lazy repetition; flags.
    let text_only = r#""target_modules": "^(?!.*vision).*\\.(q|v)_proj$""#;
    assert!(targeted(text_only, "model.layers.3.q_proj"));
    assert!(!targeted(text_only, "vision.layers.3.q_proj"));
    assert!(targeted(r#""target_modules": "(?i).*Q_PROJ""#, "model.q_proj"));
    assert!(targeted(r#""target_modules": "(?P<a>[a-z])\\..*(?P=a)""#, "x.layer_x"));
    // Everything of a list is a suffix after a dot, nothing else.
    assert!(!targeted(r#""target_modules": ["proj"]"#, "model.q_proj"));
    assert!(!targeted(r#""target_modules": ["q.proj"]"#, "model.q_proj"));
    // A whole name is targeted in any layer; an empty list of layers is none; the first index counts.
    assert!(targeted(r#""target_modules": ["m.layers.0.q"], "layers_to_transform": [7]"#, "m.layers.0.q"));
    assert!(targeted(r#""target_modules": ["q"], "layers_to_transform": []"#, "m.layers.0.q"));
    assert!(!targeted(r#""target_modules": ["q"], "layers_to_transform": [7]"#, "m.layers.1.experts.7.q"));
    assert!(!targeted(r#""target_modules": ["q"], "layers_to_transform": [7]"#, "m.layers.99999999999999999999999.q"));
    // An exclusion counts before everything else, and an empty one not at all.
    assert!(!targeted(r#""target_modules": ["q"], "exclude_modules": ["m.q"]"#, "m.q"));
    assert!(targeted(r#""target_modules": ["q"], "exclude_modules": []"#, "m.q"));
    assert!(targeted(r#""target_modules": ["q"], "exclude_modules": """#, "m.q"));
    // A module within one that is saved whole; names are expressions here.
    assert!(!targeted(r#""target_modules": ["q"], "modules_to_save": ["he.d"]"#, "m.head.x.q"));
    assert!(targeted(r#""target_modules": ["q"], "modules_to_save": ["ead"]"#, "m.head.x.q"));
    assert!(!targeted(r#""target_modules": ["q"], "modules_to_save": ["h(e|o)ad"]"#, "m.head.x.q"));
    // Patterns: the first in file order, dots for anything, a caret for the whole name.
    assert_eq!(rank(r#""rank_pattern": {"b": 2, "a.b": 3}"#, "x.a.b"), 2);
    assert_eq!(rank(r#""rank_pattern": {"a.b": 3, "b": 2}"#, "x.a.b"), 3);
    assert_eq!(rank(r#""rank_pattern": {"a.b": 3}"#, "x.a_b"), 3);
    assert_eq!(rank(r#""rank_pattern": {"a\\.b": 3}"#, "x.a_b"), 8);
    assert_eq!(rank(r#""rank_pattern": {"^a.b": 3}"#, "x.a.b"), 8);
    assert_eq!(rank(r#""rank_pattern": {"^a.b": 3}"#, "a.b"), 3);
    assert_eq!(rank(r#""rank_pattern": {"[ab]": 4, "b": 2}"#, "x.b"), 4);
    assert_eq!(rank(r#""rank_pattern": {"b": 2, "[ab]": 4}"#, "x.b"), 2);
    assert_eq!(rank(r#""rank_pattern": {"a|b": 4}"#, "x.b"), 4);
    // Several names for all linear modules; the head is none of them.
    let mut all = config(r#""target_modules": "All-Linear", "exclude_modules": ["up"]"#);
    assert!(matches!(all.targets("m.q").unwrap_err().kind, ErrorKind::AllLinear { name } if name == "m.q"));
    all.expand_all_linear(["m.q", "m.up", "lm_head"], Some("lm_head"));
    let [q, up, head, other] = ["m.q", "m.up", "lm_head", "m.k"].map(|name| all.targets(name).unwrap().is_some());
    assert!(q && !up && !head && !other);
}

/// Each case that PEFT was asked to load: the same outcome, but for three that PEFT loads without what the file lacks.
#[test]
fn broken_adapters_are_refused_as_peft_does_or_stricter() {
    let format = golden("peft/format");
    let cases = json_file(&format.join("cases.json"));
    let good = Adapter::load(golden("peft/llama/adapters/qv")).expect("the good adapter");
    let stricter = ["extra_tensor", "keys_without_prefix", "missing_lora_B"];
    let q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora";
    for (name, case) in cases["peft_outcome"].as_object().expect("cases") {
        let loaded = Adapter::load(format.join(name)).map_err(|error| {
            assert!(error.file.as_ref().is_some_and(|file| file.starts_with(&format)), "{name}: {error}");
            assert!(error.to_string().contains("adapter_"), "{name}: {error}");
            error.kind
        });
        let loaded = loaded.and_then(|adapter| on_llama(&adapter).map(|()| adapter));
        let peft_loads = case["outcome"] == "loads";
        assert_eq!(loaded.is_ok(), peft_loads && !stricter.contains(&name.as_str()), "{name}: {loaded:?}");
        if case["logits"] == "same as good adapter"
            && let Ok(adapter) = &loaded
        {
            let tolerance = if name.contains("f16") || name.contains("mixed") { 4e-3 } else { 0.0 };
            for (one, other) in values(adapter).iter().zip(values(&good)) {
                assert_eq!((&one.0, one.1), (&other.0, other.1), "{name}");
                for (one, other) in [(&one.2, &other.2), (&one.3, &other.3)] {
                    assert_eq!(one.len(), other.len(), "{name}");
                    let close = |(one, other): (&f32, &f32)| (one - other).abs() <= tolerance * other.abs();
                    assert!(one.iter().zip(other).all(close), "{name}");
                }
            }
            assert_eq!(adapter.modules().len(), good.modules().len(), "{name}");
        }
        let named = |tensor: &str, part: &str| tensor == format!("{q0}_{part}.weight");
        let expected = match (name.as_str(), loaded) {
            ("config_not_json", Err(ErrorKind::Json { message })) => message.contains("line"),
            ("extra_tensor", Err(ErrorKind::Unexpected { tensor, .. })) => tensor.contains("not_there.lora_A"),
            ("keys_without_prefix", Err(ErrorKind::Unexpected { tensor, .. })) => tensor.starts_with("model.layers.0"),
            ("missing_lora_B", Err(ErrorKind::Missing { tensor, .. })) => named(&tensor, "B"),
            ("no_peft_type", Err(ErrorKind::Field { key, got, .. })) => key == "peft_type" && got == "absent",
            ("other_peft_type", Err(ErrorKind::Field { key, got, .. })) => key == "peft_type" && got == "\"BOGUS\"",
            ("rank_zero", Err(ErrorKind::Field { key, got, .. })) => key == "r" && got == "0",
            ("target_not_in_model", Err(ErrorKind::Unexpected { tensor, .. })) => named(&tensor, "A"),
            ("transposed_A", Err(ErrorKind::Shape { tensor, got, .. })) => named(&tensor, "A") && got == [64, 8],
            ("wrong_in_features", Err(ErrorKind::Shape { tensor, got, .. })) => named(&tensor, "A") && got[1] != 64,
            ("wrong_rank_in_config", Err(ErrorKind::Shape { expected, .. })) => expected.contains("rank 9"),
            ("truncated_file", Err(ErrorKind::Safetensors { .. })) => true,
            ("scaling_alpha_float", Ok(adapter)) => adapter.modules().all(|(_, module, _)| module.scale == 2.5 / 8.0),
            ("unknown_config_keys", Ok(adapter)) => {
                adapter.config().unknown_keys().collect::<Vec<_>>() == ["some_future_option"]
                    && adapter.config().to_json().contains("some_future_option")
            }
            ("f16_on_disk", Ok(adapter)) => adapter.modules().all(|(_, _, factors)| factors.a.dtype() == Dtype::F16),
            (_, Ok(adapter)) => adapter.config().unknown_keys().count() == 0,
            (_, Err(error)) => panic!("{name}: {error}"),
        };
        assert!(expected, "{name}");
    }
}

/// PEFT itself, where it is installed, loads what is saved here and computes the recorded logits: `make peft-check`.
#[test]
fn peft_itself_loads_what_is_saved() {
    let python = |arguments: &[&std::ffi::OsStr]| Command::new("python3").args(arguments).output();
    // Other versions would say something about themselves.
    let versions = "import peft, torch, transformers\n\
        raise SystemExit(not (peft.__version__.startswith('0.21.') and transformers.__version__.startswith('5.')))";
    let found = python(&["-c".as_ref(), versions.as_ref()]);
    if !found.is_ok_and(|output| output.status.success()) {
        common::skipped("peft_itself_loads_what_is_saved", "no python3 with peft 0.21 and transformers 5");
        return;
    }
    let root = fresh("itself");
    let mut saved = 0;
    for entry in fs::read_dir(golden("peft/llama/adapters")).expect("the adapters") {
        let dir = entry.expect("an entry").path();
        if let (Ok(adapter), true) = (Adapter::load(&dir), dir.join("logits.safetensors").is_file()) {
            let out = root.join(dir.file_name().expect("a name"));
            adapter.save(&out).expect("saved");
            fs::copy(dir.join("logits.safetensors"), out.join("logits.safetensors")).expect("copied");
            saved += 1;
        }
    }
    assert_eq!(saved, 6);
    // In file order each module of `qv` has its α of 16, sorted it would not: what is saved must say so in any order.
    let qv = Adapter::load(golden("peft/llama/adapters/qv")).expect("loads");
    let mut overlapping =
        Adapter::new(qv.config().clone().with_alpha("q_proj", 16.0).with_alpha("layers.1.self_attn.q_proj", 1.0));
    for (name, _, factors) in qv.modules() {
        overlapping.insert(name, factors.clone()).expect("it fits");
    }
    overlapping.save(root.join("qv_overlapping")).expect("saved");
    let logits = golden("peft/llama/adapters/qv/logits.safetensors");
    fs::copy(logits, root.join("qv_overlapping/logits.safetensors")).expect("copied");
    let script = common::project().join("scripts/peft_check.py");
    let output = python(&[script.as_ref(), golden("peft/llama").as_ref(), root.as_ref()]).expect("python3 runs");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{said}");
}
