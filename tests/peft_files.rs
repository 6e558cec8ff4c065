//! Adapters of our own making: what their files may hold, what is refused by name, and what saving leaves on disk.
#![cfg(feature = "peft")]

mod common;

use std::fs;
use std::process::Command;

use common::peft::{fresh, golden, json_file, values};
use fused_lora::Dtype;
use fused_lora::peft::{Adapter, Bias, Config, ErrorKind, Factors, Linear, Names, Targets, Tensor};
use serde_json::{Value, json};

fn config_with(changes: Value) -> String {
    let mut config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]});
    config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
    config.to_string()
}

/// What is not computed is refused by name, whatever the tensors are.
#[test]
fn unsupported_features_are_named() {
    let cases = [
        (json!({"use_qalora": true}), "QALoRA"),
        (json!({"use_bdlora": {"nblocks": 2}}), "BD-LoRA"),
        (json!({"alora_invocation_tokens": [1, 2]}), "aLoRA"),
        (json!({"arrow_config": {}}), "Arrow"),
        (json!({"kasa_config": {"beta": 1e-4}}), "KaSA"),
        (json!({"monteclora_config": {}}), "MonteCLoRA"),
        (json!({"velora_config": {"num_groups": 2}}), "VeLoRA"),
        (json!({"target_parameters": ["experts.w"]}), "LoRA on parameters"),
        (json!({"trainable_token_indices": {"embed_tokens": [3]}}), "trainable tokens"),
        (json!({"layer_replication": [[0, 2], [1, 3]]}), "layer replication"),
        (json!({"megatron_config": {"a": 1}}), "Megatron"),
        (json!({"init_lora_weights": "pissa_niter_16"}), "PiSSA"),
        (json!({"init_lora_weights": "pissa"}), "PiSSA"),
        (json!({"init_lora_weights": "olora"}), "OLoRA"),
        (json!({"init_lora_weights": "corda"}), "CorDA"),
        (json!({"init_lora_weights": "loftq"}), "LoftQ"),
        (json!({"init_lora_weights": "lora_ga"}), "LoRA-GA"),
        (json!({"use_something_new": true}), "an unknown variant"),
        (json!({"target_modules": null}), "PEFT's table of target modules per architecture"),
    ];
    for (changes, name) in cases {
        match Config::from_json(&config_with(changes.clone())).map_err(|error| error.kind) {
            Err(ErrorKind::Unsupported { key, feature, .. }) => {
                assert_eq!(feature, name);
                assert!(changes.get(&key).is_some(), "{changes}: {key}");
            }
            other => panic!("{changes}: {other:?}"),
        }
    }
    let off = json!({"use_dora": null, "layer_replication": null, "target_parameters": [], "use_bdlora": null, "loftq_config": {}});
    for (init, alone) in
        [json!(true), json!(false), json!("gaussian"), json!("eva"), json!("orthogonal"), json!("mica")]
            .into_iter()
            .map(|init| (json!({"init_lora_weights": init}), off.clone()))
    {
        Config::from_json(&config_with(init)).expect("an initialisation that leaves the base alone");
        Config::from_json(&config_with(alone)).expect("nothing is switched on");
    }
}

/// A value of the wrong type or out of range is refused with its key.
#[test]
fn fields_are_checked() {
    let cases = [
        ("r", json!(-1)),
        ("r", json!(8.0)),
        ("r", json!(null)),
        ("r", json!(1e300)),
        ("lora_alpha", json!("16")),
        ("lora_alpha", json!(null)),
        ("lora_dropout", json!(1.5)),
        ("lora_dropout", json!(-0.1)),
        ("bias", json!("some")),
        ("bias", json!(true)),
        ("lora_bias", json!("yes")),
        ("use_rslora", json!(1)),
        ("use_dora", json!(1)),
        ("use_dora", json!("")),
        ("fan_in_fan_out", json!([])),
        ("target_modules", json!(["q", 3])),
        ("target_modules", json!({"q": 1})),
        ("exclude_modules", json!(3)),
        ("modules_to_save", json!("lm_head")),
        ("layers_to_transform", json!("1")),
        ("layers_to_transform", json!([1, -1])),
        ("layers_pattern", json!("layers")),
        ("rank_pattern", json!([])),
        ("task_type", json!(3)),
        ("init_lora_weights", json!("bogus")),
        ("peft_type", json!("lora")),
        ("peft_type", json!(null)),
    ];
    for (key, value) in cases {
        match Config::from_json(&config_with(json!({ key: value }))).map_err(|error| error.kind) {
            Err(ErrorKind::Field { key: named, .. }) => assert_eq!(named, key),
            other => panic!("{key}: {value}: {other:?}"),
        }
    }
    let pattern = Config::from_json(&config_with(json!({"rank_pattern": {"q": 0}}))).unwrap_err().to_string();
    assert_eq!(pattern, "`rank_pattern.q` is 0, expected a positive integer");
    let both = Config::from_json(&config_with(json!({"use_dora": true, "lora_bias": true}))).unwrap_err().to_string();
    assert_eq!(both, "`lora_bias` is true, expected false, because `use_dora` is true");
    let layers =
        Config::from_json(&config_with(json!({"target_modules": ".*q", "layers_to_transform": 1}))).unwrap_err();
    assert!(matches!(layers.kind, ErrorKind::Field { key, .. } if key == "layers_to_transform"));
    // Set, not read.
    assert!(
        matches!(Config::new(0, 1.0, ["q"]).targets("q").unwrap_err().kind, ErrorKind::Field { key, .. } if key == "r")
    );
    let alpha = Config::new(1, f64::NAN, ["q"]).targets("q").unwrap_err().kind;
    assert!(matches!(alpha, ErrorKind::Field { key, .. } if key == "lora_alpha"));
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = common::data::Rng(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.unit() as f32).collect();
    Tensor::from_f32(Dtype::F32, shape, &values).expect("as many as the shape holds")
}

fn pair(r: usize, n: usize, k: usize) -> Factors {
    Factors::new(tensor(&[r, k], 1), tensor(&[n, r], 2))
}

/// An adapter's two files as bytes, from tensors of these keys and shapes.
fn files(config: Value, tensors: &[(&str, &[usize])]) -> (Vec<u8>, Vec<u8>) {
    let data = vec![0u8; 1 << 12];
    let views = tensors.iter().map(|(name, shape)| {
        let bytes = shape.iter().product::<usize>() * 4;
        (
            *name,
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &data[..bytes])
                .expect("a view"),
        )
    });
    (config_with(config).into_bytes(), safetensors::serialize(views, None).expect("serialised"))
}

fn load(config: Value, tensors: &[(&str, &[usize])]) -> Result<Adapter, ErrorKind> {
    let (config, tensors) = files(config, tensors);
    Adapter::load_bytes(&config, tensors).map_err(|error| error.kind)
}

const A: (&str, &[usize]) = ("base_model.model.m.q.lora_A.weight", &[2, 3]);
const B: (&str, &[usize]) = ("base_model.model.m.q.lora_B.weight", &[4, 2]);

/// Tensors beside A and B: accepted where the configuration asks for them, and refused otherwise.
#[test]
fn other_tensors() {
    let bias = ("base_model.model.m.q.lora_B.bias", &[4][..]);
    let magnitude = ("base_model.model.m.q.lora_magnitude_vector", &[4][..]);
    let base_bias = ("base_model.model.m.q.base_layer.bias", &[4][..]);
    let base_weight = ("base_model.model.m.q.base_layer.weight", &[4, 3][..]);
    let head = ("base_model.model.score.weight", &[5, 4][..]);
    let norm = ("base_model.model.m.norm.bias", &[3][..]);
    let get = |adapter: Result<Adapter, ErrorKind>| adapter.expect("loads").get("m.q").expect("the module").1.clone();

    assert_eq!(get(load(json!({"lora_bias": true}), &[A, B, bias])).b_bias.expect("a bias").shape(), [4]);
    let of_dora = get(load(json!({"use_dora": true}), &[A, B, magnitude]));
    assert_eq!(of_dora.magnitude.expect("a magnitude").shape(), [4]);
    let named = ("base_model.model.m.q.lora_magnitude_vector.default.weight", &[4][..]);
    let of_dora = get(load(json!({"use_dora": true, "bias": "all"}), &[A, B, named, base_bias]));
    assert!(of_dora.magnitude.is_some() && of_dora.bias.is_some());
    assert_eq!(get(load(json!({"bias": "lora_only"}), &[A, B, base_bias])).bias.expect("a bias").shape(), [4]);
    assert_eq!(get(load(json!({}), &[A, B, base_weight])).weight.expect("a weight").shape(), [4, 3]);
    let all = load(json!({"bias": "all"}), &[A, B, base_bias, norm]).expect("loads");
    assert_eq!(all.biases().map(|(name, _)| name).collect::<Vec<_>>(), ["m.norm.bias"]);
    // Both names are written for a sequence classifier, one is there.
    let saved = load(json!({"modules_to_save": ["classifier", "score"]}), &[A, B, head]).expect("loads");
    assert_eq!(saved.saved().map(|(name, _)| name).collect::<Vec<_>>(), ["score.weight"]);

    let unexpected = |got: Result<Adapter, ErrorKind>, key: &str| match got {
        Err(ErrorKind::Unexpected { tensor, .. }) => assert_eq!(tensor, key),
        other => panic!("{key}: {other:?}"),
    };
    unexpected(load(json!({}), &[A, B, bias]), bias.0);
    unexpected(load(json!({}), &[A, B, magnitude]), magnitude.0);
    unexpected(load(json!({"use_dora": false}), &[A, B, magnitude]), magnitude.0);
    unexpected(load(json!({"use_dora": true}), &[A, B, magnitude, bias]), bias.0);
    unexpected(load(json!({"use_dora": true}), &[A, B, magnitude, named]), named.0);
    unexpected(load(json!({}), &[A, B, base_bias]), base_bias.0);
    unexpected(load(json!({}), &[A, B, head]), head.0);
    unexpected(load(json!({"bias": "lora_only"}), &[A, B, norm]), norm.0);
    for key in
        ["m.q.lora_A.other.weight", "m.q.lora_C.weight", "score.modules_to_save.default.weight", "m.q.base_layer.scale"]
    {
        let key = format!("base_model.model.{key}");
        unexpected(load(json!({"modules_to_save": ["score"]}), &[A, B, head, (&key, &[4, 4])]), &key);
    }
    let twice = ("base_model.model.m.q.lora_A.default.weight", &[2, 3][..]);
    unexpected(load(json!({}), &[A, B, twice]), A.0);

    let missing = |got: Result<Adapter, ErrorKind>, key: &str| match got {
        Err(ErrorKind::Missing { tensor, .. }) => assert_eq!(tensor, key),
        other => panic!("{key}: {other:?}"),
    };
    missing(load(json!({}), &[A]), B.0);
    missing(load(json!({}), &[B]), A.0);
    missing(
        load(json!({"bias": "all"}), &[A, B, ("base_model.model.n.q.base_layer.bias", &[4])]),
        "base_model.model.n.q.lora_A.weight",
    );
    missing(load(json!({"lora_bias": true}), &[A, B]), bias.0);
    missing(load(json!({"use_dora": true}), &[A, B]), magnitude.0);
    missing(load(json!({"use_dora": true}), &[A, magnitude]), B.0);
    missing(load(json!({"use_dora": true}), &[magnitude]), A.0);
    missing(load(json!({"modules_to_save": ["score"]}), &[A, B]), head.0);
    missing(load(json!({}), &[]), "base_model.model.….lora_A.weight");

    let shapes: [(&str, &[usize], Value); 10] = [
        (A.0, &[3, 3], json!({})),
        (A.0, &[2], json!({})),
        (A.0, &[2, 0], json!({})),
        (B.0, &[4, 3], json!({})),
        (bias.0, &[3], json!({"lora_bias": true})),
        (magnitude.0, &[3], json!({"use_dora": true})),
        (magnitude.0, &[4, 1], json!({"use_dora": true})),
        (magnitude.0, &[0], json!({"use_dora": true})),
        (base_bias.0, &[4, 1], json!({"bias": "all"})),
        (base_weight.0, &[4, 3], json!({"fan_in_fan_out": true})),
    ];
    for (key, shape, config) in shapes {
        let mut tensors = vec![A, B];
        tensors.retain(|(name, _)| *name != key);
        tensors.push((key, shape));
        match load(config, &tensors) {
            Err(ErrorKind::Shape { tensor, got, .. }) => assert_eq!((tensor.as_str(), &got[..]), (key, shape)),
            other => panic!("{key}: {other:?}"),
        }
    }

    let features: [(&str, &[usize], &str); 7] = [
        ("m.q.lora_magnitude_vector", &[1, 4, 1, 1], "LoRA on a convolution"),
        ("m.emb.lora_embedding_A", &[2, 9], "LoRA on an embedding"),
        ("m.q.lora_diag", &[2], "KaSA"),
        ("m.emb.token_adapter.trainable_tokens_delta", &[1, 3], "trainable tokens"),
        ("m.conv.lora_A.weight", &[2, 3, 1, 1], "LoRA on a convolution"),
        ("m.attn.base_layer.out_proj.lora_A.weight", &[2, 3], "a LoRA layer within another"),
        ("m.experts.base_layer.lora_A.weight", &[2, 3], "a LoRA layer within another"),
    ];
    for (key, shape, name) in features {
        let key = format!("base_model.model.{key}");
        match load(json!({}), &[A, B, (&key, shape)]) {
            Err(ErrorKind::Unsupported { key: named, feature, .. }) => assert_eq!((named, feature), (key, name)),
            other => panic!("{key}: {other:?}"),
        }
    }
}

#[test]
fn element_types() {
    let data = [0u8; 64];
    let view =
        |dtype, bytes: usize| safetensors::tensor::TensorView::new(dtype, vec![2, 2], &data[..bytes]).expect("a view");
    for (dtype, bytes) in [(safetensors::Dtype::F64, 32), (safetensors::Dtype::I32, 16), (safetensors::Dtype::U8, 4)] {
        let tensors = safetensors::serialize([(A.0, view(dtype, bytes))], None).expect("serialised");
        match Adapter::load_bytes(config_with(json!({})).as_bytes(), tensors).map_err(|error| error.kind) {
            Err(ErrorKind::Dtype { tensor, got }) => assert_eq!((tensor.as_str(), got), (A.0, format!("{dtype:?}"))),
            other => panic!("{dtype:?}: {other:?}"),
        }
    }
    // 1 + 2⁻⁸ lies between two bf16 and rounds to the even one, 1; f16 holds it.
    let between = 1.0 + 1.0 / 256.0;
    let values = [between, -2.0, 0.5, 65536.0];
    let stored = |dtype| Tensor::from_f32(dtype, &[4], &values).expect("four values").to_f32();
    assert_eq!(stored(Dtype::F32), values);
    assert_eq!(stored(Dtype::Bf16), [1.0, -2.0, 0.5, 65536.0]);
    assert_eq!(stored(Dtype::F16), [between, -2.0, 0.5, f32::INFINITY]);
    let length = Tensor::from_f32(Dtype::F32, &[usize::MAX, 2], &values).unwrap_err().kind;
    assert!(matches!(length, ErrorKind::Length { got: 4, expected: usize::MAX, .. }), "{length:?}");
}

#[test]
fn built_adapters_of_dora_round_trip() {
    let config = Config::new(2, 3.0, ["q"]).with_dora(true).with_rslora(true).with_rank("1.q", 3);
    let mut adapter = Adapter::new(config);
    for (name, r) in [("m.0.q", 2), ("m.1.q", 3)] {
        let without = adapter.insert(name, pair(r, 5, 4)).unwrap_err().kind;
        assert!(matches!(without, ErrorKind::Missing { tensor, .. } if tensor.ends_with(".lora_magnitude_vector")));
        let mut factors = pair(r, 5, 4);
        factors.magnitude = Some(tensor(&[5], 3));
        adapter.insert(name, factors).expect("it fits");
    }
    let out = fresh("built-dora");
    adapter.save(&out).expect("saved");
    assert_eq!(json_file(&out.join("adapter_config.json"))["use_dora"], json!(true));
    let again = Adapter::load(&out).expect("loads");
    assert!(again.config().use_dora && again.config().use_rslora);
    assert_eq!(again.get("m.1.q"), adapter.get("m.1.q"));
    assert_eq!(again.get("m.0.q").and_then(|(_, factors)| factors.magnitude.clone()), Some(tensor(&[5], 3)));
}

/// An adapter made here, of everything there is, is the same after saving and loading.
#[test]
fn built_adapters_round_trip() {
    let mut config =
        Config::new(2, 3.0, ["q", "v"]).with_rslora(true).with_dropout(0.1).with_rank("v", 3).with_alpha("v", 1.5);
    config.lora_bias = true;
    config.bias = Bias::All;
    config.modules_to_save = vec!["head".into()];
    config.task_type = Some("CAUSAL_LM".into());
    config.base_model_name_or_path = Some("modèle/😀".into());
    config.exclude_modules = Some(Names::List(vec!["no.q".into()]));
    config.layers_to_transform = Some(vec![0, 1]);
    config.layers_pattern = vec!["layers".into()];
    let mut adapter = Adapter::new(config);
    for (name, r) in [("m.layers.0.q", 2), ("m.layers.1.v", 3)] {
        let mut factors = pair(r, 5, 4);
        factors.b_bias = Some(tensor(&[5], 3));
        factors.bias = (r == 2).then(|| tensor(&[5], 4));
        adapter.insert(name, factors).expect("it fits");
    }
    adapter.insert_parameter("m.head.weight", tensor(&[2, 2, 2], 5)).expect("it is saved whole");
    adapter.insert_parameter("m.norm.bias", tensor(&[4], 6)).expect("a trained bias");

    let before = adapter.clone();
    assert!(adapter.insert("m.layers.2.q", pair(2, 5, 4)).is_err(), "not targeted");
    assert!(adapter.insert("m.layers.0.q", pair(3, 5, 4)).is_err(), "another rank");
    assert!(adapter.insert_parameter("m.norm.weight", tensor(&[4], 6)).is_err(), "nobody asks for it");
    assert!(adapter.set_dropout(1.5).is_err() && adapter.set_dropout(f64::NAN).is_err(), "no probabilities");
    assert_eq!(adapter, before);
    adapter.set_dropout(0.25).expect("a probability");

    let out = fresh("built");
    adapter.save(&out).expect("saved");
    let config = fs::read(out.join("adapter_config.json")).expect("the configuration");
    assert!(config.is_ascii());
    let again = Adapter::load(&out).expect("loads");
    assert_eq!(values(&again), values(&adapter));
    assert_eq!(again.saved().collect::<Vec<_>>(), adapter.saved().collect::<Vec<_>>());
    assert_eq!(again.biases().collect::<Vec<_>>(), adapter.biases().collect::<Vec<_>>());
    assert_eq!(again.get("m.layers.0.q"), adapter.get("m.layers.0.q"));
    let written = json_file(&out.join("adapter_config.json"));
    let qv = json_file(&golden("peft/llama/adapters/qv/adapter_config.json"));
    let keys = |value: &Value| value.as_object().expect("an object").keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&written), keys(&qv), "the keys of PEFT 0.21, in its order");
    assert_eq!((&written["base_model_name_or_path"], &written["lora_dropout"]), (&json!("modèle/😀"), &json!(0.25)));
    assert_eq!((&written["lora_alpha"], &written["alpha_pattern"]["v"]), (&json!(3), &json!(1.5)));
}

/// Sorted, as PEFT writes and reads them, overlapping patterns would give other ranks and scales: names take their place.
#[test]
fn overlapping_patterns_survive_sorting() {
    let config = Config::new(8, 16.0, ["q", "v"])
        .with_rank("q", 4)
        .with_rank("layers.1.q", 2) // never reached, but first when sorted
        .with_alpha("m.layers.1.v", 5.0)
        .with_alpha("layers.1.v", 7.0)
        .with_alpha("layers.1.v", 9.0); // the same key again
    let mut adapter = Adapter::new(config);
    for name in ["m.layers.0.q", "m.layers.1.q", "m.layers.0.v", "m.layers.1.v"] {
        let r = if name.ends_with('q') { 4 } else { 8 };
        adapter.insert(name, pair(r, 3, 5)).expect("it fits");
    }
    let out = fresh("patterns");
    adapter.save(&out).expect("saved");
    let path = out.join("adapter_config.json");
    let mut config = json_file(&path);
    for order in 0..2 {
        for key in ["rank_pattern", "alpha_pattern"] {
            let patterns = config[key].as_object_mut().expect("patterns");
            patterns.sort_keys();
            if order == 1 {
                *patterns = patterns.clone().into_iter().rev().collect();
            }
        }
        fs::write(&path, config.to_string()).expect("written");
        assert_eq!(values(&Adapter::load(&out).expect("loads")), values(&adapter), "order {order}");
    }
    // Without names nothing can be said: the order stays, and the first match with it.
    let again = Config::from_json(&adapter.config().to_json()).expect("read");
    assert_eq!(again.targets("m.layers.1.q").unwrap().map(|module| module.r), Some(4));
    assert_eq!(again.targets("m.layers.1.v").unwrap().map(|module| module.alpha), Some(5.0));
    assert_eq!(again.targets("n.layers.1.v").unwrap().map(|module| module.alpha), Some(7.0));
    // Where the order is immaterial the patterns are kept, sorted.
    let mut kept = Adapter::new(Config::new(8, 16.0, ["q"]).with_rank("1.q", 2).with_rank("0.q", 4));
    kept.insert("m.0.q", pair(4, 3, 5)).expect("it fits");
    kept.save(&out).expect("saved");
    assert_eq!(Config::read(&path).expect("read").rank_pattern, [("0.q".to_owned(), 4), ("1.q".to_owned(), 2)]);
}

/// `all-linear`, written by hand, is saved as the names of the modules, as PEFT does.
#[test]
fn all_linear_is_saved_by_name() {
    let adapter = load(json!({"target_modules": "all-linear"}), &[A, B]).expect("loads");
    let out = fresh("all-linear");
    adapter.save(&out).expect("saved");
    let saved = Adapter::load(&out).expect("loads");
    assert_eq!(saved.config().target_modules, Targets::Names(Names::List(vec!["m.q".into()])));
    let base = |modules: &[(&'static str, usize, usize)]| {
        let linears: Vec<_> = modules.iter().map(|&(name, n, k)| Linear { name, n, k }).collect();
        adapter.check_base(&linears, Some("head")).map_err(|error| error.kind)
    };
    assert_eq!(base(&[("m.q", 4, 3), ("head", 9, 4)]), Ok(()));
    assert!(
        matches!(base(&[("m.q", 4, 3), ("m.k", 4, 3)]), Err(ErrorKind::Missing { tensor, .. }) if tensor.contains("m.k"))
    );
    assert!(matches!(base(&[("m.q", 3, 4)]), Err(ErrorKind::Shape { tensor, .. }) if tensor == A.0));
    assert!(matches!(base(&[("head", 3, 4)]), Err(ErrorKind::Unexpected { tensor, .. }) if tensor == A.0));
}

/// A save that fails leaves the old files as they were, and nothing beside them.
#[test]
fn a_failed_save_changes_nothing() {
    let adapter = Adapter::load(golden("peft/llama/adapters/qv")).expect("loads");
    let other = Adapter::load(golden("peft/llama/adapters/layers")).expect("loads");
    // A folder stands where the second file should go.
    let out = fresh("blocked");
    adapter.save(&out).expect("saved");
    let tensors = fs::read(out.join("adapter_model.safetensors")).expect("readable");
    fs::remove_file(out.join("adapter_config.json")).expect("removed");
    fs::create_dir(out.join("adapter_config.json")).expect("a folder");
    let error = other.save(&out).expect_err("it cannot be replaced");
    assert!(matches!(error.kind, ErrorKind::Io { .. }), "{error}");
    assert_eq!(error.file, Some(out.join("adapter_config.json")));
    assert_eq!(fs::read(out.join("adapter_model.safetensors")).expect("readable"), tensors);
    assert_eq!(fs::read_dir(&out).expect("the folder").count(), 2);
    // A file stands where the folder should go.
    let file = fresh("file");
    fs::write(&file, "whole").expect("written");
    let error = other.save(&file).expect_err("it is no folder");
    assert!(matches!(error.kind, ErrorKind::Io { .. }) && error.file.as_ref() == Some(&file), "{error}");
    assert_eq!(fs::read(&file).expect("readable"), b"whole");
    let _ = fs::remove_file(&file);
    // A folder that may not be written: root may all the same, so that only the outcome's wholeness is asked for.
    let out = fresh("read-only");
    adapter.save(&out).expect("saved");
    let mut permissions = fs::metadata(&out).expect("there").permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&out, permissions.clone()).expect("set");
    let expected = if other.save(&out).is_ok() { &other } else { &adapter };
    #[allow(clippy::permissions_set_readonly_false)] // as it was
    permissions.set_readonly(false);
    fs::set_permissions(&out, permissions).expect("set");
    assert_eq!(&Adapter::load(&out).expect("whole"), expected);
}

/// Files that are absent, or no files.
#[test]
fn missing_files_are_named() {
    let out = fresh("absent");
    let error = Adapter::load(&out).expect_err("there is nothing");
    assert!(matches!(error.kind, ErrorKind::Io { kind: std::io::ErrorKind::NotFound, .. }), "{error}");
    assert_eq!(error.file, Some(out.join("adapter_config.json")));
    fs::create_dir_all(out.join("adapter_model.safetensors")).expect("a folder");
    fs::write(out.join("adapter_config.json"), config_with(json!({}))).expect("written");
    let error = Adapter::load(&out).expect_err("a folder is no file");
    assert_eq!(error.file, Some(out.join("adapter_model.safetensors")));
    // A pipe that nobody writes to: opening it would wait for ever.
    let pipe = fresh("pipe");
    fs::create_dir_all(&pipe).expect("a folder");
    if Command::new("mkfifo").arg(pipe.join("adapter_config.json")).status().is_ok_and(|status| status.success()) {
        let (send, receive) = std::sync::mpsc::channel();
        let folder = pipe.clone();
        std::thread::spawn(move || send.send(Adapter::load(folder).expect_err("a pipe is no file")));
        let error = receive.recv_timeout(std::time::Duration::from_secs(60)).expect("an answer");
        assert!(error.to_string().contains("not a regular file"), "{error}");
        assert_eq!(error.file, Some(pipe.join("adapter_config.json")));
    }
}

/// What nobody could load does not take the place of what is there.
#[test]
fn an_adapter_without_factors_is_not_saved() {
    let dir = fresh("without_factors");
    let tensor =
        |shape: &[usize]| Tensor::from_f32(Dtype::F32, shape, &vec![1.0; shape.iter().product()]).expect("a tensor");
    let mut adapter = Adapter::new(Config::new(2, 4.0, ["q"]));
    let empty = adapter.clone();
    let refused = |adapter: &Adapter| adapter.save(&dir).expect_err("a refusal");
    assert!(matches!(refused(&empty).kind, ErrorKind::Missing { .. }));
    assert!(fs::read_dir(&dir).map_or(0, Iterator::count) == 0, "a file was written");
    adapter.insert("m.q", Factors::new(tensor(&[2, 3]), tensor(&[4, 2]))).expect("factors");
    adapter.save(&dir).expect("saved");
    assert!(matches!(refused(&empty).kind, ErrorKind::Missing { .. }));
    assert_eq!(Adapter::load(&dir).expect("what was there").modules().len(), 1);
}
