//! `examples/generate`, and the Llama, the tokens and the adapters it shares with `finetune`, against what transformers and
//! PEFT recorded.

mod common;
#[path = "../examples/generate/main.rs"]
mod generate;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use generate::common::adapters::Adapter;
use generate::common::config::Config;
use generate::common::llama::{Cache, Changes, Llama};
use generate::common::weights::Weights;
use serde_json::{Value, json};

struct Output {
    status: u8,
    out: String,
    err: String,
}

fn run(arguments: &[&str]) -> Output {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = generate::run(arguments.iter().map(OsString::from).collect(), &mut out, &mut err);
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Output { status, out: text(out), err: text(err) }
}

/// The one object that `--json` prints.
fn object(arguments: &[&str]) -> Value {
    let Output { status, out, err } = run(&[arguments, &["--json", "--device", "cpu"]].concat());
    assert_eq!(status, 0, "{arguments:?}\n{err}");
    serde_json::from_str(&out).expect("one JSON object")
}

fn golden(path: &str) -> PathBuf {
    common::project().join("tests/golden").join(path)
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

fn scratch(test: &str) -> PathBuf {
    let folder = common::scratch().join("generate").join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn load(model: &Path, dtype: DType, adapter: Option<&Path>) -> (Config, Llama) {
    let config = Config::read(&model.join("config.json")).expect("it can be read");
    let changes = adapter.map_or_else(Changes::default, |adapter| {
        let adapter = Adapter::read(adapter, &config).expect("it can be read");
        adapter.changes(&Device::Cpu).expect("tensors")
    });
    let weights = Weights::open(model, dtype, &Device::Cpu).expect("it can be read");
    let model = Llama::load(&config, &weights, changes).expect("it can be read");
    (config, model)
}

fn tensors(file: &Path) -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(file, &Device::Cpu).expect("a safetensors file")
}

fn logits(model: &Llama, ids: &Tensor) -> Tensor {
    let ids = ids.to_dtype(DType::U32).expect("ids");
    model.hidden(&ids, None, None).and_then(|hidden| model.logits(&hidden, None)).expect("logits")
}

/// ‖got - expected‖ / ‖expected‖.
fn distance(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.dims(), expected.dims());
    let flat = |tensor: &Tensor| -> Vec<f64> {
        tensor.to_dtype(DType::F64).and_then(|tensor| tensor.flatten_all()?.to_vec1()).expect("numbers")
    };
    let (got, expected) = (flat(got), flat(expected));
    let error: f64 = got.iter().zip(&expected).map(|(got, expected)| (got - expected).powi(2)).sum();
    (error / expected.iter().map(|value| value * value).sum::<f64>()).sqrt()
}

#[test]
fn logits_are_those_of_transformers_with_every_adapter_that_is_read() {
    let base = golden("peft/llama/base");
    let inputs = tensors(&golden("peft/llama/inputs.safetensors"));
    let ids = &inputs["input_ids"];
    let plain = logits(&load(&base, DType::F32, None).1, ids);
    assert!(distance(&plain, &inputs["base/f64/logits"]) < 1e-6);
    for name in ["qv", "all_linear_rs", "patterns", "layers", "head_saved", "dora"] {
        let folder = golden("peft/llama/adapters").join(name);
        let expected = &tensors(&folder.join("logits.safetensors"))["f32/logits"];
        let (_, mut model) = load(&base, DType::F32, Some(&folder));
        let error = distance(&logits(&model, ids), expected);
        assert!(error < 1e-6, "{name}: {error:e}");
        assert!(distance(&plain, expected) > 1e-2, "{name} changes something");
        model.merge().expect("merged");
        let error = distance(&logits(&model, ids), expected);
        assert!(error < 1e-6, "{name} merged: {error:e}");
    }
    // The values of qv are exact in bf16.
    let folder = golden("peft/llama/adapters/qv_bf16_disk");
    let expected = &tensors(&golden("peft/llama/adapters/qv/logits.safetensors"))["f32/logits"];
    let error = distance(&logits(&load(&base, DType::F32, Some(&folder)).1, ids), expected);
    assert!(error < 1e-6, "in bf16 on disk: {error:e}");
}

#[test]
fn logits_in_sixteen_bits_are_near() {
    let base = golden("peft/llama/base");
    let inputs = tensors(&golden("peft/llama/inputs.safetensors"));
    for (dtype, allowed) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        let error = distance(&logits(&load(&base, dtype, None).1, &inputs["input_ids"]), &inputs["base/f64/logits"]);
        assert!(error < allowed, "{dtype:?}: {error:e}");
    }
}

/// Tied embedding, biases everywhere, a head_dim of its own, one key head, llama3 frequencies, bf16 on disk; positions beyond
/// the original ones.
#[test]
fn every_option_of_the_configuration_is_as_in_transformers() {
    let folder = golden("llama_variant");
    let expected = tensors(&folder.join("expected.safetensors"));
    let (_, model) = load(&folder, DType::F32, None);
    let error = distance(&logits(&model, &expected["input_ids"]), &expected["logits"]);
    assert!(error < 2e-6, "{error:e}");
    let flat = |name: &str| expected[name].flatten_all().and_then(|flat| flat.to_vec1::<i64>()).expect("numbers");
    let ids: Vec<u32> = flat("input_ids").into_iter().map(|id| id as u32).collect();
    let loss = model.loss(&ids, &flat("labels"), (2, 48), 0).and_then(|loss| loss.to_scalar::<f32>()).expect("a loss");
    let recorded = expected["loss"].to_vec1::<f64>().expect("a number")[0];
    assert!((f64::from(loss) - recorded).abs() < 1e-6 * recorded, "{loss}, recorded {recorded}");
}

/// As PEFT: `modules_to_save` copies the embedding, and what was tied to the original stays so.
#[test]
fn an_embedding_that_an_adapter_brings_leaves_a_tied_head_as_it_was() {
    let folder = golden("llama_variant");
    let config = Config::read(&folder.join("config.json")).expect("it can be read");
    assert!(config.tied);
    let weights = Weights::open(&folder, DType::F32, &Device::Cpu).expect("it can be read");
    let own = weights.get("model.embed_tokens.weight", &[config.vocab, config.hidden]).expect("the embedding");
    let other = (&own + 1.0).expect("another one");
    let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu).expect("ids");
    let error = |names: &[&str], head: &Tensor| {
        let parameters = names.iter().map(|name| (format!("{name}.weight"), other.clone())).collect();
        let changes = Changes { parameters, ..Changes::default() };
        let model = Llama::load(&config, &weights, changes).expect("it can be read");
        let hidden = model.hidden(&ids, None, None).and_then(|hidden| hidden.flatten_to(1)).expect("states");
        let expected = hidden.matmul(&head.t().expect("turned")).expect("logits");
        distance(&model.logits(&hidden, None).expect("logits"), &expected)
    };
    assert!(error(&["model.embed_tokens"], &own) < 1e-6);
    assert!(error(&["model.embed_tokens"], &other) > 1e-2);
    assert!(error(&["model.embed_tokens", "lm_head"], &other) < 1e-6);
}

/// Its older name, its newer one, or both, as transformers wrote for a while.
#[test]
fn the_kind_of_rotary_embedding_is_read_by_either_name() {
    use generate::common::config::Scaling;
    let text = fs::read_to_string(golden("peft/llama/base/config.json")).expect("a config");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    config.as_object_mut().expect("an object").remove("rope_parameters");
    let path = scratch("rope").join("config.json");
    for names in [&["rope_type"][..], &["type"], &["rope_type", "type"]] {
        config["rope_scaling"] = json!({"factor": 2.0});
        for name in names {
            config["rope_scaling"][name] = json!("linear");
        }
        fs::write(&path, config.to_string()).expect("a file");
        let scaling = Config::read(&path).map(|config| config.rope.scaling);
        assert_eq!(scaling.expect("it can be read"), Scaling::Linear { factor: 2.0 }, "{names:?}");
    }
}

#[test]
fn parts_named_by_an_index_are_the_whole() {
    let base = golden("peft/llama/base");
    let folder = scratch("parts");
    fs::copy(base.join("config.json"), folder.join("config.json")).expect("a copy");
    let (mut parts, mut map) =
        ([std::collections::HashMap::new(), std::collections::HashMap::new()], serde_json::Map::new());
    for (at, (name, tensor)) in tensors(&base.join("model.safetensors")).into_iter().enumerate() {
        map.insert(name.clone(), format!("model-{}.safetensors", at % 2).into());
        parts[at % 2].insert(name, tensor);
    }
    for (at, part) in parts.iter().enumerate() {
        candle_core::safetensors::save(part, folder.join(format!("model-{at}.safetensors"))).expect("a file");
    }
    let index =
        |map: Value| fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string());
    index(map.clone().into()).expect("a file");
    let ids = &tensors(&golden("peft/llama/inputs.safetensors"))["input_ids"];
    let whole = logits(&load(&base, DType::F32, None).1, ids);
    assert_eq!(distance(&logits(&load(&folder, DType::F32, None).1, ids), &whole), 0.0);

    map.insert("lm_head.weight".into(), "../base/model.safetensors".into());
    index(map.into()).expect("a file");
    let output = run(&["--model", path(&folder), "--prompt", "a"]);
    assert_eq!(output.status, 3);
    assert!(output.err.contains("`../base/model.safetensors`, expected a name without folders"), "{}", output.err);
}

#[test]
fn the_cache_changes_nothing() {
    let (config, model) = load(&golden("llama_variant"), DType::F32, None);
    let ids = &tensors(&golden("llama_variant/expected.safetensors"))["input_ids"].to_dtype(DType::U32).expect("ids");
    let whole = model.hidden(ids, None, None).expect("states");
    let mut cache = Cache::new(&config);
    let mut parts = Vec::new();
    for (start, length) in [(0, 5), (5, 1), (6, 1), (7, 30), (37, 11)] {
        parts.push(
            model.hidden(&ids.narrow(1, start, length).expect("a part"), Some(&mut cache), None).expect("states"),
        );
    }
    let error = distance(&Tensor::cat(&parts, 1).expect("all"), &whole);
    assert!(error < 1e-6, "{error:e}");
}

#[test]
fn merged_and_unmerged_say_the_same() {
    let base = golden("peft/llama/base");
    let mut texts = Vec::new();
    for name in ["qv", "all_linear_rs", "patterns", "layers", "head_saved", "dora"] {
        let folder = golden("peft/llama/adapters").join(name);
        let arguments = ["--model", path(&base), "--adapter", path(&folder), "--prompt", "LoRA", "--tokens", "24"];
        let unmerged = object(&arguments);
        let merged = object(&[&arguments[..], &["--merged"]].concat());
        assert_eq!((&unmerged["tokens"], &unmerged["text"]), (&merged["tokens"], &merged["text"]), "{name}");
        assert!(!unmerged["tokens"].as_array().expect("tokens").is_empty(), "{name}");
        texts.push(unmerged["text"].clone());
    }
    texts.dedup();
    assert_eq!(texts.len(), 6, "each adapter has a text of its own: {texts:?}");
}

#[test]
fn samples_repeat_by_seed_and_narrow_to_the_likeliest() {
    let base = golden("peft/llama/base");
    let sample =
        |more: &[&str]| object(&[&["--model", path(&base), "--prompt", "LoRA", "--tokens", "16"], more].concat());
    let text = |more: &[&str]| sample(more)["tokens"].clone();
    let greedy = text(&[]);
    assert_eq!(text(&["--temperature", "1", "--top-k", "1"]), greedy);
    assert_eq!(text(&["--temperature", "1", "--top-p", "1e-9"]), greedy);
    assert_eq!(text(&["--temperature", "1e-4"]), greedy);
    let warm = |seed| text(&["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--seed", seed]);
    assert_eq!(warm("1"), warm("1"));
    assert_ne!(warm("1"), warm("2"));
}

#[test]
fn tokenizer_json_is_used_where_there_is_one() {
    use tokenizers::models::wordlevel::WordLevel;
    use tokenizers::pre_tokenizers::whitespace::Whitespace;
    let folder = scratch("tokenizer");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden("peft/llama/base").join(file), folder.join(file)).expect("a copy");
    }
    let words: Vec<String> = (0..128).map(|word| format!("w{word}")).collect();
    let vocabulary = words.iter().zip(0..).map(|(word, id)| (word.clone(), id)).collect();
    let model = WordLevel::builder().vocab(vocabulary).unk_token("w0".into()).build().expect("a model");
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Whitespace {}));
    tokenizer.save(folder.join("tokenizer.json"), false).expect("a file");

    let by_words = object(&["--model", path(&folder), "--prompt", "w76 w111 w82 w65", "--tokens", "8"]);
    let by_bytes = object(&["--model", path(&golden("peft/llama/base")), "--prompt", "LoRA", "--tokens", "8"]);
    assert_eq!(by_words["tokens"], by_bytes["tokens"]);
    let spoken: Vec<String> =
        by_words["tokens"].as_array().expect("tokens").iter().map(|id| format!("w{id}")).collect();
    assert_eq!(by_words["text"].as_str().expect("text").split_whitespace().collect::<Vec<_>>(), spoken);

    fs::write(folder.join("tokenizer.json"), "{").expect("a file");
    let output = run(&["--model", path(&folder), "--prompt", "w1"]);
    assert_eq!(output.status, 3);
    assert!(output.err.contains("tokenizer.json"), "{}", output.err);
    fs::remove_file(folder.join("tokenizer.json")).expect("removed");
    fs::write(folder.join("tokenizer.model"), "sentencepiece").expect("a file");
    let output = run(&["--model", path(&folder), "--prompt", "w1"]);
    assert_eq!((output.status, output.err.contains("tokenizer.model")), (2, true), "{}", output.err);
}

#[test]
fn what_cannot_be_is_refused() {
    let base = golden("peft/llama/base");
    let adapters = golden("peft/llama/adapters");
    let started = |more: &str| format!("--model {} --prompt ab {more}", path(&base));
    let adapter = |name: &str| started(&format!("--adapter {}", path(&adapters.join(name))));
    let cases: [(String, u8, &[&str]); 12] = [
        ("--prompt ab".into(), 3, &["`--model` is missing"]),
        (format!("--model {}", path(&base)), 3, &["`--prompt` is missing"]),
        (started("--tokens 0"), 3, &["`--tokens` is `0`, expected a whole number of at least 1"]),
        (started("--tokens 63"), 3, &["`--tokens` is 63 after a prompt of 2, expected at most 64"]),
        (started("--temperature -1"), 3, &["`--temperature` is `-1`"]),
        (started("--top-k 5"), 3, &["`--top-k`", "`--temperature` is 0"]),
        (started("--temperature 1 --top-p 0"), 3, &["`--top-p` is `0`"]),
        (started("--merged"), 3, &["`--merged` is given without `--adapter`"]),
        (started("--prompt é"), 3, &["--prompt: byte 0 is 195", "tokens below 128"]),
        (started("--what"), 3, &["--what"]),
        (adapter("tokens"), 2, &["trainable_token_indices"]),
        (adapter("embed"), 2, &["embed_tokens"]),
    ];
    for (line, status, parts) in cases {
        let output = run(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!((output.status, output.out.as_str()), (status, ""), "{line}\n{}", output.err);
        assert!(output.err.starts_with("generate: ") && output.err.lines().count() == 1, "{line}\n{}", output.err);
        for part in parts {
            assert!(output.err.contains(part), "{line}\n`{part}` is missing from\n{}", output.err);
        }
    }
}

#[test]
fn another_model_is_refused_by_name() {
    let base = golden("peft/llama/base");
    let text = fs::read_to_string(base.join("config.json")).expect("a config");
    let good: Value = serde_json::from_str(&text).expect("JSON");
    let folder = scratch("configs");
    fs::copy(base.join("model.safetensors"), folder.join("model.safetensors")).expect("a copy");
    let cases = [
        ("model_type", json!("mistral"), 2, "`mistral`"),
        ("hidden_act", json!("gelu"), 2, "`gelu`"),
        ("rope_parameters", json!({"rope_type": "yarn", "factor": 2.0}), 2, "`yarn`"),
        ("rope_parameters", json!({"rope_type": "llama3", "factor": 2.0}), 3, "low_freq_factor"),
        ("quantization_config", json!({"quant_method": "bitsandbytes"}), 2, "quantization_config"),
        ("num_key_value_heads", json!(3), 3, "num_attention_heads is 4, expected a multiple of num_key_value_heads, 3"),
        ("num_attention_heads", json!(0), 3, "num_attention_heads is 0"),
        ("head_dim", json!(15), 3, "head_dim is 15, expected an even number"),
        ("rms_norm_eps", json!(-1.0), 3, "rms_norm_eps is -1"),
        ("vocab_size", json!(129), 3, "`model.embed_tokens.weight` has shape [128, 64], expected [129, 64]"),
        ("attention_bias", json!(true), 3, "holds no tensor `model.layers.0.self_attn.q_proj.bias`"),
        ("num_hidden_layers", json!(3), 3, "holds no tensor `model.layers.2"),
        ("hidden_size", json!("64"), 3, "config.json"),
    ];
    for (key, value, status, part) in cases {
        let mut config = good.clone();
        config[key] = value;
        fs::write(folder.join("config.json"), config.to_string()).expect("a file");
        let output = run(&["--model", path(&folder), "--prompt", "ab", "--device", "cpu"]);
        assert_eq!(output.status, status, "{key}\n{}", output.err);
        assert!(output.err.contains(part), "{key}: `{part}` is missing from\n{}", output.err);
    }
}
