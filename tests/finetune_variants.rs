//! `examples/finetune` with dropout, rsLoRA, biases and batches that add up.

mod common;
#[path = "../examples/finetune/main.rs"]
#[allow(dead_code)] // tests/finetune/ uses the rest
mod finetune;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use finetune::progress::Streams;
use fused_lora::peft::{Adapter, Bias, Config, Factors, Tensor};
use fused_lora::{Dtype, bf16};
use serde_json::Value;

/// The lines of a run that must succeed.
fn steps(arguments: &[&str]) -> Vec<Value> {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut streams = Streams { out: &mut out, err: &mut err, terminal: false };
    let arguments = arguments.iter().chain(&["--json", "--device", "cpu"]).map(OsString::from).collect();
    let status = finetune::run(arguments, &AtomicBool::new(false), &mut streams);
    let (out, err) = (String::from_utf8_lossy(&out), String::from_utf8_lossy(&err));
    assert_eq!(status, 0, "{out}{err}");
    out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn numbers(steps: &[Value], key: &str) -> Vec<f64> {
    steps.iter().map(|step| step[key].as_f64().expect("a number")).collect()
}

fn path(of: &str) -> String {
    common::project().join(of).to_str().expect("a UTF-8 path").to_owned()
}

/// An empty folder.
fn scratch(test: &str) -> String {
    let folder = common::scratch().join("finetune_variants").join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    folder.to_str().expect("a UTF-8 path").to_owned()
}

fn weights(out: &str) -> Vec<u8> {
    fs::read(Path::new(out).join("adapter_model.safetensors")).expect("an adapter")
}

/// The largest distance of two adapters' factors, relative to the largest of them.
fn distance(one: &str, other: &str) -> f32 {
    let [one, other] = [one, other].map(|out| Adapter::load(out).expect("an adapter"));
    let values = |adapter: &Adapter| -> Vec<f32> {
        adapter.modules().flat_map(|(_, _, factors)| [factors.a.to_f32(), factors.b.to_f32()].concat()).collect()
    };
    let (one, other) = (values(&one), values(&other));
    let largest =
        |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |largest, value| largest.max(value.abs()));
    largest(&mut one.iter().zip(&other).map(|(one, other)| one - other)) / largest(&mut other.iter().copied())
}

#[test]
fn dropout_is_of_the_seed_and_of_training() {
    let (model, data) =
        (path("tests/golden/peft/llama/base"), path("tests/golden/peft/training/llama/data.safetensors"));
    let run = |name: &str, more: &[&str]| {
        let out = scratch(name);
        let flags = ["--model", &model, "--data", &data, "--steps", "4", "--lr", "1e-2", "--out", &out];
        (steps(&[&flags[..], more].concat()), out)
    };
    let (plain, plain_out) = run("plain", &[]);
    let (dropped, out) = run("dropped", &["--dropout", "0.3"]);
    let (again, again_out) = run("again", &["--dropout", "0.3"]);
    // B starts as zeros: the first loss knows nothing of what is dropped, the first gradient does.
    let first = |steps: &[Value], key: &str| numbers(steps, key)[0];
    assert_eq!(first(&plain, "loss"), first(&dropped, "loss"));
    assert_ne!(first(&plain, "grad_norm"), first(&dropped, "grad_norm"));
    assert_eq!((numbers(&dropped, "loss"), weights(&out)), (numbers(&again, "loss"), weights(&again_out)));
    assert_ne!(weights(&out), weights(&plain_out));
    let config = Adapter::load(&out).expect("an adapter").config().clone();
    assert_eq!(config.lora_dropout, 0.3);

    // An adapter's own dropout goes on, unless another one is asked for. The data is recorded: the seed is that of dropout alone.
    let from = |name: &str, more: &[&str]| run(name, &[&["--init", &out], more].concat());
    let (own, asked) = (from("own", &[]), from("asked", &["--dropout", "0.3"]));
    assert_eq!(weights(&own.1), weights(&asked.1));
    let (none, other) = (from("none", &["--dropout", "0"]), from("other", &["--seed", "5"]));
    assert_eq!(Adapter::load(&none.1).expect("an adapter").config().lora_dropout, 0.0);
    let losses = [&own, &none, &other].map(|run| first(&run.0, "loss"));
    assert!(losses[0] != losses[1] && losses[0] != losses[2] && losses[1] != losses[2], "{losses:?}");
}

/// Beside a 16-bit model the products read what an optimiser changes by less than a spacing of its type; beside f32 nothing is rounded.
#[test]
fn full_precision_reads_adapters_as_they_are() {
    let (model, data) = (path("tests/golden/peft/llama/base"), path("LICENSE-APACHE"));
    let run = |name: &str, dtype: &str, more: &[&str]| {
        let out = scratch(name);
        let flags =
            ["--model", &model, "--data", &data, "--seq", "16", "--batch", "2", "--dtype", dtype, "--out", &out];
        (numbers(&steps(&[&flags[..], more].concat()), "loss"), out)
    };
    let (full, steps_of_3) = ("--full-precision", ["--steps", "3", "--lr", "1e-2"]);
    let same = |dtype: &str| {
        let [rounded, read] = [&[][..], &[full]]
            .map(|flag| run(&format!("full-{dtype}-{}", flag.len()), dtype, &[&steps_of_3[..], flag].concat()));
        weights(&rounded.1) == weights(&read.1)
    };
    assert!(same("f32") && !same("bf16") && !same("f16"));

    // Two adapters that are one in bf16.
    let from = run("full-from", "bf16", &steps_of_3).1;
    let rounded = altered(&from, &scratch("full-on-grid"), |value| bf16::from_f32(value).to_f32());
    let beside = altered(&rounded, &scratch("full-beside"), |value| value * (1.0 + 2f32.powi(-10)));
    let loss = |init: &str, flag: &[&str]| {
        let flags = ["--init", init, "--steps", "1", "--lr", "0", "--weight-decay", "0"];
        run("full-of", "bf16", &[&flags[..], flag].concat()).0
    };
    assert_eq!(loss(&rounded, &[]), loss(&beside, &[]));
    assert_ne!(loss(&rounded, &[full]), loss(&beside, &[full]));
}

/// The adapter of a folder with other values of A.
fn altered(from: &str, to: &str, value: fn(f32) -> f32) -> String {
    let mut adapter = Adapter::load(from).expect("an adapter");
    let modules: Vec<_> = adapter.modules().map(|(name, _, factors)| (name.to_owned(), factors.clone())).collect();
    for (name, mut factors) in modules {
        let values: Vec<f32> = factors.a.to_f32().into_iter().map(value).collect();
        factors.a = Tensor::from_f32(Dtype::F32, factors.a.shape(), &values).expect("a tensor");
        adapter.insert(&name, factors).expect("a module");
    }
    adapter.save(to).expect("a saved adapter");
    to.to_owned()
}

#[test]
fn rslora_scales_by_the_root_of_the_rank() {
    let (model, data, out) = (path("tests/golden/peft/llama/base"), path("LICENSE-APACHE"), scratch("rslora"));
    let flags = ["--model", &model, "--data", &data, "--seq", "16", "--steps", "2", "--out", &out];
    steps(&[&flags[..], &["--rank", "16", "--alpha", "8", "--rslora"]].concat());
    let adapter = Adapter::load(&out).expect("an adapter");
    assert!(adapter.config().use_rslora);
    assert!(adapter.modules().all(|(_, module, _)| module.scale == 2.0));
    let again = scratch("rslora-again");
    let flags = ["--model", &model, "--data", &data, "--seq", "16", "--steps", "1", "--out", &again];
    steps(&[&flags[..], &["--init", &out, "--rslora"]].concat());
}

#[test]
fn small_batches_add_up_to_a_large_one() {
    let (model, text) = (path("tests/golden/peft/llama/base"), path("LICENSE-APACHE"));
    let run = |name: &str, more: &[&str]| {
        let out = scratch(name);
        let flags = ["--model", &model, "--data", &text, "--seq", "16", "--steps", "5", "--optimizer", "sgd", "--lr"];
        (steps(&[&flags[..], &["0.1", "--out", &out], more].concat()), out)
    };
    let whole = run("whole", &["--batch", "6"]);
    for (batch, accumulate) in [("3", "2"), ("2", "3"), ("1", "6")] {
        let parts = run("parts", &["--batch", batch, "--accumulate", accumulate]);
        for key in ["loss", "grad_norm"] {
            for (one, other) in numbers(&whole.0, key).into_iter().zip(numbers(&parts.0, key)) {
                assert!((one - other).abs() <= 1e-5 * one, "{key} {one} at once, {other} in {accumulate} parts");
            }
        }
        let off = distance(&whole.1, &parts.1);
        assert!(off <= 1e-5, "in {accumulate} parts the adapter is off by {off:e}");
    }
}

/// Rows with one label and with five: the mean is over labels, not over batches.
#[test]
fn batches_are_weighed_by_their_labels() {
    use candle_core::{Device, Tensor};
    let (model, folder) = (path("tests/golden/peft/llama/base"), scratch("weighed"));
    let ids: Vec<i64> = (0..24).map(|at| at * 5 % 128).collect();
    let labels: Vec<i64> = (0..24).map(|at| if at / 6 % 2 == 0 && at % 6 > 1 { -100 } else { ids[at] }).collect();
    let loss = |name: &str, shape: (usize, usize, usize), accumulate: &str| {
        let tensor = |values: &[i64]| Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).expect("a tensor");
        let tensors = std::collections::HashMap::from([("input_ids", tensor(&ids)), ("labels", tensor(&labels))]);
        let data = format!("{folder}/{name}.safetensors");
        candle_core::safetensors::save(&tensors, &data).expect("a file");
        let flags = ["--model", &model, "--data", &data, "--out", &folder, "--lr", "0.1", "--accumulate", accumulate];
        let steps = steps(&flags);
        [numbers(&steps, "loss"), numbers(&steps, "grad_norm")].concat()
    };
    let (pairs, singles) = (loss("pairs", (2, 2, 6), "1"), loss("singles", (4, 1, 6), "2"));
    assert_eq!((pairs.len(), singles.len()), (4, 4));
    for (pair, single) in pairs.iter().zip(&singles) {
        assert!((pair - single).abs() <= 1e-5 * pair, "{pairs:?} {singles:?}");
    }
}

/// The tiny Llama with biases, and an adapter that trains them, and one on B.
#[test]
fn biases_are_trained_and_saved() {
    let (model, init) = (path("tests/golden/llama_variant"), scratch("biases-init"));
    let text = format!("{init}/text");
    let bytes: Vec<u8> = (0..2000u32).map(|at| (at * at % 37) as u8).collect(); // it knows 40 tokens
    fs::write(&text, bytes).expect("a file");
    let bytes = fs::read(format!("{model}/model.safetensors")).expect("a model");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let shape = |name: &str| file.tensor(name).expect("a tensor").shape().to_vec();
    let mut config = Config::new(2, 4.0, ["q_proj"]);
    (config.bias, config.lora_bias) = (Bias::All, true);
    let mut adapter = Adapter::new(config);
    for name in file.names().into_iter().filter(|name| name.ends_with(".bias")) {
        let zeros = |shape: &[usize]| {
            let values = vec![0.0; shape.iter().product()];
            Tensor::from_f32(Dtype::F32, shape, &values).expect("a tensor")
        };
        let module = name.trim_end_matches(".bias");
        if !module.ends_with("q_proj") {
            adapter.insert_parameter(name, zeros(&shape(name))).expect("a bias");
            continue;
        }
        let [n, k] = shape(&format!("{module}.weight"))[..] else { unreachable!("a matrix") };
        let a: Vec<f32> = (0..2 * k).map(|at| (at as f32).sin() * 0.2).collect();
        let mut factors = Factors::new(Tensor::from_f32(Dtype::F32, &[2, k], &a).expect("a tensor"), zeros(&[n, 2]));
        (factors.bias, factors.b_bias) = (Some(zeros(&[n])), Some(zeros(&[n])));
        adapter.insert(module, factors).expect("a module");
    }
    assert!(adapter.biases().len() > 2, "the model has biases elsewhere");
    let outs = [scratch("biases"), scratch("biases-parts")];
    adapter.save(&init).expect("an adapter");
    let flags = ["--model", &model, "--data", &text, "--init", &init, "--seq", "16", "--batch", "2", "--lr", "1e-2"];
    let lines = steps(&[&flags[..], &["--steps", "30", "--out", &outs[0]]].concat());
    let losses = numbers(&lines, "loss");
    assert!(losses[29] < losses[0], "{losses:?}");
    let trained = Adapter::load(&outs[0]).expect("an adapter");
    let moved = |tensor: &Tensor| tensor.to_f32().iter().filter(|&&value| value != 0.0).count() * 2 > tensor.shape()[0];
    for (name, _, factors) in trained.modules() {
        let biases = [&factors.bias, &factors.b_bias].map(|bias| bias.as_ref().expect("a bias"));
        assert!(biases.into_iter().all(moved), "{name}");
    }
    // The bias of k moves every score of a query alike, so that its gradient is zero but for the rotary embedding.
    assert!(trained.biases().filter(|(name, _)| !name.contains("k_proj")).all(|(_, bias)| moved(bias)));
    assert_eq!(trained.biases().len(), adapter.biases().len());

    // Resumed with all of them to the same bits, and read for inference.
    let part = |more: &[&str]| steps(&[&flags[..], &["--out", &outs[1]], more].concat());
    part(&["--steps", "3"]);
    part(&["--steps", "30", "--resume"]);
    assert_eq!(weights(&outs[0]), weights(&outs[1]));
}

/// A run of DoRA starts where one of LoRA does, goes its own way, is saved as PEFT reads it and goes on from there.
#[test]
fn magnitudes_are_trained_and_saved() {
    let (model, data) =
        (path("tests/golden/peft/llama/base"), path("tests/golden/peft/training/llama/data.safetensors"));
    let run = |name: &str, more: &[&str]| {
        let out = scratch(name);
        let flags = ["--model", &model, "--data", &data, "--steps", "4", "--lr", "1e-2", "--out", &out];
        (steps(&[&flags[..], more].concat()), out)
    };
    let plain = run("dora-plain", &[]);
    let dora = run("dora", &["--dora"]);
    let (first, last) = (|steps: &[Value]| numbers(steps, "loss")[0], |steps: &[Value]| numbers(steps, "loss")[3]);
    assert!((first(&plain.0) - first(&dora.0)).abs() <= 1e-6 * first(&plain.0), "the gains are 1 at first");
    assert_ne!(last(&plain.0), last(&dora.0));
    assert!(last(&dora.0) < first(&dora.0));
    let adapter = Adapter::load(&dora.1).expect("an adapter");
    assert!(adapter.config().use_dora && !adapter.config().use_rslora);
    let moved = |factors: &Factors| factors.magnitude.as_ref().expect("a magnitude").to_f32();
    let norms = {
        let none = scratch("dora-start");
        let flags = ["--model", &model, "--data", &data, "--steps", "1", "--lr", "0", "--out", &none, "--dora"];
        steps(&flags);
        Adapter::load(&none).expect("an adapter")
    };
    for ((name, _, factors), (_, _, start)) in adapter.modules().zip(norms.modules()) {
        assert_eq!(factors.magnitude.as_ref().expect("a magnitude").dtype(), Dtype::F32);
        let (now, before) = (moved(factors), moved(start));
        assert!(now.iter().zip(&before).all(|(now, before)| now != before && *before > 0.0), "{name}");
    }

    // On from the adapter: its config is what counts, and a pause changes no bit.
    let more = ["--init", &dora.1, "--rank", "8"];
    let (whole, asked) = (run("dora-whole", &more), run("dora-asked", &[&more[..], &["--dora"]].concat()));
    assert_eq!(weights(&whole.1), weights(&asked.1));
    let parts = scratch("dora-parts");
    for (count, resume) in [("2", None), ("4", Some("--resume"))] {
        let flags = ["--model", &model, "--data", &data, "--lr", "1e-2", "--out", &parts, "--steps", count];
        let more: Vec<&str> = more.into_iter().chain(resume).collect();
        steps(&[&flags[..], &more].concat());
    }
    assert_eq!(weights(&whole.1), weights(&parts));

    // With all else that there is.
    let all = run("dora-all", &["--dora", "--rslora", "--rank", "4", "--targets", "all-linear", "--accumulate", "2"]);
    let adapter = Adapter::load(&all.1).expect("an adapter");
    assert!(adapter.config().use_dora && adapter.config().use_rslora);
    assert_eq!(adapter.modules().len(), 14);
    let head = run("dora-head", &["--dora", "--targets", "lm_head,q_proj"]);
    assert!(Adapter::load(&head.1).expect("an adapter").get("lm_head").is_some_and(|(_, of)| of.magnitude.is_some()));
    for dtype in ["bf16", "f16"] {
        let half = run(&format!("dora-{dtype}"), &["--dora", "--dtype", dtype]);
        assert!(
            numbers(&half.0, "loss")
                .iter()
                .zip(numbers(&dora.0, "loss"))
                .all(|(one, other)| (one - other).abs() < 0.05)
        );
    }
}

#[test]
fn small_batches_of_dora_add_up_to_a_large_one() {
    let (model, text) = (path("tests/golden/peft/llama/base"), path("LICENSE-APACHE"));
    let run = |name: &str, more: &[&str]| {
        let out = scratch(name);
        let flags = ["--model", &model, "--data", &text, "--seq", "16", "--steps", "5", "--optimizer", "sgd", "--lr"];
        steps(&[&flags[..], &["0.1", "--dora", "--out", &out], more].concat())
    };
    let whole = run("dora-large", &["--batch", "6"]);
    let parts = run("dora-small", &["--batch", "2", "--accumulate", "3"]);
    for key in ["loss", "grad_norm"] {
        for (one, other) in numbers(&whole, key).into_iter().zip(numbers(&parts, key)) {
            assert!((one - other).abs() <= 1e-5 * one, "{key} {one} at once, {other} in parts");
        }
    }
}

#[test]
fn magnitudes_without_dropout() {
    let (model, data, out) = (path("tests/golden/peft/llama/base"), path("LICENSE-APACHE"), scratch("dora-refused"));
    let refused = |more: &[&str]| {
        let flags =
            ["--model", &model, "--data", &data, "--seq", "16", "--steps", "1", "--device", "cpu", "--out", &out];
        let (mut to, mut err) = (Vec::new(), Vec::new());
        let mut streams = Streams { out: &mut to, err: &mut err, terminal: false };
        let arguments = flags.iter().chain(more).map(OsString::from).collect();
        let status = finetune::run(arguments, &AtomicBool::new(false), &mut streams);
        (status, String::from_utf8(err).expect("UTF-8"))
    };
    let (status, message) = refused(&["--dora", "--dropout", "0.1"]);
    assert_eq!((status, message.lines().count()), (2, 1), "{message}");
    assert!(message.contains("dropout (of 0.1) with DoRA"), "{message}");
    let plain = path("tests/golden/peft/llama/adapters/qv");
    let (status, message) = refused(&["--dora", "--init", &plain]);
    assert_eq!(status, 3, "{message}");
    assert!(message.contains("`--dora` is given, but the adapter of `--init` has no magnitudes"), "{message}");
    assert_eq!(fs::read_dir(&out).expect("a folder").count(), 0, "nothing was written");
}
