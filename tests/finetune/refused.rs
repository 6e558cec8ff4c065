//! What cannot be, and what it leaves behind.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{done, golden, read, run, scratch, text};

#[test]
fn a_file_that_cannot_be_replaced_leaves_no_part_of_itself() {
    let (model, text) = (golden("llama/base"), text());
    let left = [
        ("loss.csv", &["checkpoint.safetensors", "loss.csv"][..]),
        ("adapter_config.json", &["adapter_config.json", "checkpoint.safetensors", "loss.csv", "loss.svg"]),
    ];
    for (file, expected) in left {
        let out = scratch(&format!("blocked-{file}"));
        fs::create_dir(Path::new(&out).join(file)).expect("a folder");
        let output =
            run(&["--model", &model, "--data", &text, "--device", "cpu", "--seq", "8", "--steps", "1", "--out", &out]);
        assert_eq!(output.status, 1, "{}", output.err);
        assert!(output.err.contains(&format!("cannot write {out}/{file}: ")), "{}", output.err);
        let entries = fs::read_dir(&out).expect("a folder").map(|entry| entry.expect("an entry").file_name());
        let mut entries: Vec<_> = entries.filter_map(|name| name.into_string().ok()).collect();
        entries.sort();
        assert_eq!(entries, expected);
    }
}

/// A configuration that claims more than the files hold is refused before anything of its size is made.
#[test]
fn a_model_that_claims_too_much_costs_nothing() {
    let (folder, text, base) = (scratch("claims"), text(), golden("llama/base"));
    fs::copy(format!("{base}/model.safetensors"), format!("{folder}/model.safetensors")).expect("a copy");
    let good: Value = serde_json::from_slice(&read(&base, "config.json")).expect("JSON");
    for (key, expected) in [("hidden_size", "expected ["), ("num_hidden_layers", "expected at most 2^16")] {
        let mut config = good.clone();
        config[key] = (1u64 << 31).into();
        fs::write(format!("{folder}/config.json"), config.to_string()).expect("a file");
        let out = format!("{folder}/out");
        let output = run(&["--model", &folder, "--data", &text, "--out", &out, "--device", "cpu"]);
        assert_eq!(output.status, 3, "{key}: {}", output.err);
        assert!(output.err.contains(expected), "{key}: {}", output.err);
        assert!(!Path::new(&out).exists());
    }
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let (model, text, data) = (golden("llama/base"), text(), golden("training/llama/data.safetensors"));
    let out = scratch("refused");
    let init = golden("training/llama/qv_sgd/adapter_initial");
    let started = |more: &str| format!("--model {model} --data {data} --out {out} {more}");
    let cases: [(String, u8, &[&str]); 36] = [
        (String::new(), 3, &["`--model` is missing"]),
        (format!("--model {model} --out {out}"), 3, &["`--data` is missing"]),
        (format!("--model {model} --data {data}"), 3, &["`--out` is missing"]),
        (started("--lr fast"), 3, &["`--lr` is `fast`, expected a number of at least 0"]),
        (started("--lr -1"), 3, &["`--lr` is `-1`"]),
        (started("--lr nan"), 3, &["`--lr` is `nan`"]),
        (started("--betas 0.9"), 3, &["`--betas` is `0.9`, expected two numbers of [0, 1)"]),
        (started("--betas 0.9,1"), 3, &["`--betas` is `0.9,1`"]),
        (started("--optimizer adam"), 3, &["`--optimizer` is `adam`, expected adamw or sgd"]),
        (started("--optimizer sgd --betas 0.9,0.99"), 3, &["`--betas`", "`--optimizer sgd`", "expected adamw"]),
        (started("--momentum 0.9"), 3, &["`--momentum`", "expected sgd"]),
        (started("--rank 0"), 3, &["`--rank` is `0`, expected a whole number of at least 1"]),
        (started(&format!("--rank {}", usize::MAX)), 3, &["`--rank` is `1", "at most 65536"]),
        (started("--alpha 0"), 3, &["`--alpha` is `0`, expected a positive number"]),
        (started("--dropout 1"), 3, &["`--dropout` is `1`, expected a probability of at least 0 and below 1"]),
        (started("--dropout 0.999999"), 3, &["`--dropout` is `0.999999`", "below 1 - 2^-17", "everything is dropped"]),
        // Below 1 − 2⁻¹⁷ in f64, not in the f32 that the op takes.
        (started("--dropout 0.9999923706054"), 3, &["`--dropout` is `0.9999923706054`"]),
        (started("--dropout -0.1"), 3, &["`--dropout` is `-0.1`"]),
        (started("--accumulate 0"), 3, &["`--accumulate` is `0`, expected a whole number of at least 1"]),
        (started("--steps 7 --accumulate 3"), 3, &["`--steps` is 7 with `--accumulate` 3", "holds 20 batches"]),
        (started("--accumulate 21"), 3, &["`--steps` is 1 with `--accumulate` 21", "holds 20 batches"]),
        (started(&format!("--init {init} --rslora")), 3, &["`--rslora` is given", "a scale of ALPHA / R"]),
        (started("--dtype f64"), 3, &["`--dtype` is `f64`, expected f32, f16 or bf16"]),
        (started("--device tpu"), 3, &["`--device` is `tpu`, expected cpu or cuda"]),
        (started("--targets q_proj,qq"), 3, &["`--targets` is `qq`", "q_proj, k_proj"]),
        (started("--targets q_proj,,"), 3, &["`--targets` is `q_proj,,`"]),
        (started("--steps 21"), 3, &["`--steps` is 21, but the data holds 20 batches"]),
        (started(&format!("--data {text} --batch {}", usize::MAX)), 3, &["`--batch` is ", "tokens a step"]),
        (started("--batch 5"), 3, &["`--batch` is 5, but 4 is recorded"]),
        (started(&format!("--init {init} --rank 4")), 3, &["`--rank` is 4, but the adapter of `--init` has 8"]),
        (started(&format!("--init {init} --targets k_proj")), 3, &["`--targets` is model.layers.0.self_attn.k_proj"]),
        (started(&format!("--init {model}")), 3, &["adapter_config.json"]),
        (started("--resume"), 3, &["checkpoint.safetensors", "`--resume` needs it"]),
        (started("--what"), 3, &["--what"]),
        (format!("--model {out} --data {data} --out {out}"), 3, &["config.json"]),
        (started(&format!("--data {text} --seq 10000")), 3, &["9723 tokens", "`--seq` 10000"]),
    ];
    for (line, status, parts) in cases {
        let output = run(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!((output.status, output.out.as_str()), (status, ""), "{line}\n{}", output.err);
        assert!(output.err.starts_with("finetune: ") && output.err.lines().count() == 1, "{line}\n{}", output.err);
        for part in parts {
            assert!(output.err.contains(part), "{line}\n`{part}` is missing from\n{}", output.err);
        }
    }
    assert_eq!(fs::read_dir(&out).expect("a folder").count(), 0, "nothing was written");
    let whole = scratch("refused-dropout");
    let dropping = serde_json::from_slice::<Value>(&read(&init, "adapter_config.json"));
    let mut dropping = dropping.expect("JSON");
    dropping["lora_dropout"] = 1.0.into();
    fs::write(format!("{whole}/adapter_config.json"), dropping.to_string()).expect("a file");
    fs::copy(format!("{init}/adapter_model.safetensors"), format!("{whole}/adapter_model.safetensors"))
        .expect("a copy");
    let start = started(&format!("--init {whole}"));
    let output = run(&start.split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status, 3, "{}", output.err);
    assert!(output.err.contains("`--init` has a `lora_dropout` of 1, expected a probability"), "{}", output.err);
    assert_eq!(fs::read_dir(&out).expect("a folder").count(), 0, "nothing was written");
    done(&format!("{start} --dropout 0.5 --steps 1").split_whitespace().collect::<Vec<_>>());
    let dora = golden("llama/adapters/dora");
    let output = run(&started(&format!("--init {dora}")).split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status, 2, "{}", output.err);
    assert!(output.err.contains("DoRA"), "{}", output.err);
    let saved = golden("llama/adapters/head_saved");
    let output = run(&started(&format!("--init {saved}")).split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status, 2, "{}", output.err);
    assert!(output.err.contains("training of whole modules (`modules_to_save`)"), "{}", output.err);
    let help = done(&["--help"]);
    assert!(help.out.starts_with("Usage: finetune --model DIR"), "{}", help.out);
}

#[test]
fn a_checkpoint_of_another_run_or_of_half_a_file_is_refused() {
    let (model, text, out) = (golden("llama/base"), text(), scratch("checkpoint"));
    let arguments = ["--model", &model, "--data", &text, "--out", &out, "--device", "cpu", "--seq", "16"];
    let resumed = |more: &[&str]| run(&[&arguments[..], &["--steps", "4", "--resume"], more].concat());
    done(&[&arguments[..], &["--steps", "3"]].concat());
    let adapter = read(&out, "adapter_model.safetensors");
    let cases: [(&[&str], &[&str]); 6] = [
        (&["--lr", "0.5"], &["--lr 0.5", "0.0002"]),
        (&["--dropout", "0.5"], &["--dropout 0.5", "null"]),
        (&["--accumulate", "2"], &["--accumulate 2", "null"]),
        (&["--seed", "1"], &["--seed 1"]),
        (&["--rank", "4"], &["an adapter with scales"]),
        (&["--steps", "2"], &["`--steps` is 2, but the checkpoint has 3 behind it"]),
    ];
    for (more, parts) in cases {
        let output = resumed(more);
        assert_eq!(output.status, 3, "{more:?}");
        assert!(parts.iter().all(|part| output.err.contains(part)), "{more:?}\n{}", output.err);
    }
    let path = PathBuf::from(&out).join("checkpoint.safetensors");
    let whole = fs::read(&path).expect("a checkpoint");
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).expect("a file");
        let output = resumed(&[]);
        assert_eq!(output.status, 3, "{length} bytes\n{}", output.err);
        assert!(output.err.contains("checkpoint.safetensors"), "{}", output.err);
    }
    assert_eq!(read(&out, "adapter_model.safetensors"), adapter, "a refused resume writes nothing");
    fs::write(&path, &whole).expect("a file");
    assert_eq!(resumed(&[]).status, 0);
}

#[test]
fn a_run_that_diverges_stops_and_keeps_the_last_checkpoint() {
    let (model, text, out) = (golden("llama/base"), text(), scratch("diverged"));
    let arguments = ["--model", &model, "--data", &text, "--out", &out, "--device", "cpu", "--optimizer", "sgd"];
    let output = run(&[&arguments[..], &["--lr", "1e300", "--seq", "16", "--checkpoint", "1"]].concat());
    assert_eq!(output.status, 1, "{}{}", output.out, output.err);
    assert!(output.err.contains("step ") && output.err.contains(" is "), "{}", output.err);
    assert!(!Path::new(&out).join("adapter_model.safetensors").exists());
    assert!(!read(&out, "checkpoint.safetensors").is_empty());
}
