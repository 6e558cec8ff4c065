//! Runs that repeat what was recorded.

use std::fs;

use fused_lora::peft::Adapter;
use serde_json::Value;

use crate::{done, golden, json_lines, numbers, scratch};

/// |got - expected| / |expected|, both norms over all factors of all modules.
fn distance(got: &Adapter, expected: &Adapter) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    assert_eq!(got.modules().len(), expected.modules().len());
    for ((name, module, got), (other_name, other, expected)) in got.modules().zip(expected.modules()) {
        assert_eq!((name, module), (other_name, other));
        for (got, expected) in [(&got.a, &expected.a), (&got.b, &expected.b)] {
            for (got, expected) in got.to_f32().into_iter().zip(expected.to_f32()) {
                error += f64::from(got - expected).powi(2);
                norm += f64::from(expected).powi(2);
            }
        }
    }
    (error / norm).sqrt()
}

/// The recorded runs of the tiny Llama, and the flags that repeat each.
fn recorded_runs() -> Vec<(String, Value, Vec<String>)> {
    let case: Value =
        serde_json::from_slice(&fs::read(golden("training/llama/case.json")).expect("a case")).expect("JSON");
    let runs = case["runs"].as_object().expect("runs");
    let flags = |name: &str, run: &Value| {
        let mut flags = vec!["--optimizer".to_owned(), run["optimizer"].as_str().expect("a name").to_owned()];
        for (key, value) in run["hyperparameters"].as_object().expect("hyperparameters") {
            let value = match value {
                Value::Array(betas) => betas.iter().map(Value::to_string).collect::<Vec<_>>().join(","),
                number => number.to_string(),
            };
            flags.extend([format!("--{}", key.replace('_', "-")), value]);
        }
        for (flag, path) in [("--init", format!("{name}/adapter_initial")), ("--data", "data.safetensors".into())] {
            flags.extend([flag.to_owned(), golden(&format!("training/llama/{path}"))]);
        }
        flags.extend(["--model".to_owned(), golden("llama/base")]);
        flags
    };
    runs.iter().map(|(name, run)| (name.clone(), run.clone(), flags(name, run))).collect()
}

#[test]
fn recorded_trajectories_are_repeated() {
    let runs = recorded_runs();
    assert_eq!(runs.len(), 4);
    for (name, run, flags) in runs {
        let out = scratch(&format!("recorded-{name}"));
        let mut arguments: Vec<&str> = flags.iter().map(String::as_str).collect();
        arguments.extend(["--out", &out, "--device", "cpu", "--dtype", "f32", "--json"]);
        let steps = json_lines(&done(&arguments).out);
        let (losses, norms) = (numbers(&run["losses_f32"]), numbers(&run["grad_norms_f32"]));
        assert_eq!((steps.len(), losses.len()), (20, 20), "{name}");
        for (step, (object, (loss, norm))) in steps.iter().zip(losses.iter().zip(&norms)).enumerate() {
            assert_eq!(object["step"], step);
            for (key, expected) in [("loss", loss), ("grad_norm", norm)] {
                let got = object[key].as_f64().expect("a number");
                // Sums of f32 in another order: some 2⁻²³ a step.
                assert!(
                    (got - expected).abs() <= 2e-6 * expected,
                    "{name} step {step}: {key} {got}, recorded {expected}"
                );
            }
        }
        let recorded = Adapter::load(golden(&format!("training/llama/{name}/adapter_final"))).expect("an adapter");
        let error = distance(&Adapter::load(&out).expect("an adapter"), &recorded);
        let of_torch = run["final_adapter_rel_fro_f32_vs_f64"].as_f64().expect("a number");
        // Two f32 runs, each that far from the f64 run, may lie twice as far apart; as much again for luck with one run.
        assert!(error <= 4.0 * of_torch, "{name}: the final adapter is off by {error:e}, torch's f32 by {of_torch:e}");
    }
}

#[test]
fn sixteen_bits_follow_the_same_trajectory() {
    let (name, run, flags) = recorded_runs().swap_remove(0);
    // Roundings of 2⁻⁹ and 2⁻¹² through two layers, relative to losses about 5.
    for (dtype, allowed) in [("bf16", 4e-3), ("f16", 5e-4)] {
        let out = scratch(&format!("sixteen-{dtype}"));
        let mut arguments: Vec<&str> = flags.iter().map(String::as_str).collect();
        arguments.extend(["--out", &out, "--device", "cpu", "--dtype", dtype, "--json"]);
        let steps = json_lines(&done(&arguments).out);
        for (object, expected) in steps.iter().zip(numbers(&run["losses_f64"])) {
            let got = object["loss"].as_f64().expect("a number");
            assert!((got - expected).abs() <= allowed * expected, "{name} {dtype}: {object}, recorded {expected}");
        }
    }
}
