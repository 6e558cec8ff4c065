//! `examples/finetune`: recorded trajectories, text, resumption to the bit, Ctrl-C, and what it refuses.

mod common;
#[path = "../examples/finetune/main.rs"]
mod finetune;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use finetune::progress::Streams;
use fused_lora::peft::Adapter;
use serde_json::Value;

struct Output {
    status: u8,
    out: String,
    err: String,
}

fn run(arguments: &[&str]) -> Output {
    interrupted(arguments, false)
}

/// A run before which Ctrl-C was pressed, or not.
fn interrupted(arguments: &[&str], interrupt: bool) -> Output {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut streams = Streams { out: &mut out, err: &mut err, terminal: false };
    let arguments = arguments.iter().map(OsString::from).collect();
    let status = finetune::run(arguments, &AtomicBool::new(interrupt), &mut streams);
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Output { status, out: text(out), err: text(err) }
}

/// A run that must succeed.
fn done(arguments: &[&str]) -> Output {
    let output = run(arguments);
    assert_eq!(output.status, 0, "{arguments:?}\n{}{}", output.out, output.err);
    output
}

fn golden(path: &str) -> String {
    common::project().join("tests/golden/peft").join(path).to_str().expect("a UTF-8 path").to_owned()
}

/// An empty folder.
fn scratch(test: &str) -> String {
    let folder = common::scratch().join("finetune").join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    folder.to_str().expect("a UTF-8 path").to_owned()
}

fn read(folder: &str, file: &str) -> Vec<u8> {
    fs::read(Path::new(folder).join(file)).expect(file)
}

/// The text that the tests train on.
fn text() -> String {
    common::project().join("LICENSE-APACHE").to_str().expect("a UTF-8 path").to_owned()
}

fn json_lines(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

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

/// Twelve steps at once, and in three parts.
fn resumed(test: &str, flags: &[&str]) {
    let model = golden("llama/base");
    let text = text();
    let common = ["--model", &model, "--data", &text, "--device", "cpu", "--batch", "3", "--seq", "24", "--rank", "4"];
    let outs = [scratch(&format!("{test}-whole")), scratch(&format!("{test}-parts"))];
    let arguments =
        |out: usize, more: &[&'static str]| [&common, flags, &["--out", &outs[out]], more].concat().join("\u{1f}");
    let run = |out, more: &[&'static str]| done(&arguments(out, more).split('\u{1f}').collect::<Vec<_>>());
    let whole = run(0, &["--steps", "12", "--json"]);
    let first = run(1, &["--steps", "5", "--checkpoint", "2", "--json"]);
    let second = run(1, &["--steps", "6", "--resume", "--json"]);
    let third = run(1, &["--steps", "12", "--resume", "--json"]);
    let losses = |outputs: &[&Output]| -> Vec<(Value, Value, Value)> {
        let lines = outputs.iter().flat_map(|output| json_lines(&output.out));
        lines.map(|line| (line["step"].clone(), line["loss"].clone(), line["grad_norm"].clone())).collect()
    };
    assert_eq!(losses(&[&whole]), losses(&[&first, &second, &third]));
    let adapter = |out: usize| read(&outs[out], "adapter_model.safetensors");
    assert_eq!(adapter(0), adapter(1));
    let state = |out: usize| {
        let bytes = read(&outs[out], "checkpoint.safetensors");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let tensors = file.iter().filter(|(name, _)| *name != "history");
        tensors
            .map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec()))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    assert_eq!(state(0), state(1));
    assert_eq!(String::from_utf8(read(&outs[1], "loss.csv")).expect("UTF-8").lines().count(), 13);
}

#[test]
fn a_resumed_run_makes_the_same_bits() {
    resumed("adamw", &["--targets", "all-linear", "--lr", "1e-2"]);
    resumed("sgd", &["--optimizer", "sgd", "--momentum", "0.9", "--weight-decay", "0.1", "--lr", "0.1", "--seed", "3"]);
    resumed("f16", &["--dtype", "f16", "--lr", "1e-2"]);
    resumed("dropout", &["--dropout", "0.2", "--rslora", "--lr", "1e-2", "--accumulate", "2"]);
}

#[test]
fn a_text_is_learnt_and_its_curve_written() {
    let (model, text, out) = (golden("llama/base"), text(), scratch("text"));
    let arguments = ["--model", &model, "--data", &text, "--out", &out, "--device", "cpu", "--targets", "all-linear"];
    let output = done(&[&arguments[..], &["--steps", "60", "--seq", "32", "--lr", "1e-2"]].concat());
    assert!(output.out.contains("9723 tokens of text in 303 pieces"), "{}", output.out);
    assert_eq!(output.err.lines().count(), 20, "three steps a line: {}", output.err);
    let csv = String::from_utf8(read(&out, "loss.csv")).expect("UTF-8");
    let mut lines = csv.lines();
    assert_eq!(lines.next(), Some("step,loss,grad_norm,tokens_per_second"));
    let losses: Vec<f64> = lines
        .enumerate()
        .map(|(step, line)| {
            let mut cells = line.split(',');
            assert_eq!(cells.next(), Some(step.to_string().as_str()));
            cells.next().expect("a loss").parse().expect("a number")
        })
        .collect();
    assert_eq!(losses.len(), 60);
    assert!((losses[0] - 128f64.ln()).abs() < 1.5, "an untrained model is near ln 128: {}", losses[0]);
    assert!(losses[50..].iter().all(|loss| *loss < losses[0] - 1.0), "{losses:?}");
    let svg = String::from_utf8(read(&out, "loss.svg")).expect("UTF-8");
    for part in ["<svg", "loss (nats per token)", "\nstep\n", "</svg>"] {
        assert!(svg.contains(part), "`{part}` is missing from the curve");
    }
    let long = svg
        .split("<polyline")
        .filter(|line| line.split_once('>').is_some_and(|(tag, _)| tag.matches(',').count() >= 60));
    assert_eq!(long.count(), 2, "the losses and their smoothed curve");
}

#[test]
fn every_epoch_has_every_piece_once_in_an_order_of_its_own() {
    use finetune::common::tokens::Tokens;
    use finetune::data::{Data, Shape};
    let file = Path::new(&scratch("epochs")).join("text");
    let bytes: Vec<u8> = (0..12u8).flat_map(|piece| [piece, piece]).chain([99]).collect(); // the last fills no piece
    fs::write(&file, bytes).expect("a file");
    let data = |seed| {
        let shape = Shape { batch: Some(4), seq: Some(2), seed, vocab: 128 };
        Data::open(&file, &Tokens::Bytes, &shape).expect("it can be read")
    };
    let epochs = |mut data: Data| -> Vec<Vec<u32>> {
        let batches: Vec<_> = (0..9).map(|step| data.batch(step).ids).collect();
        batches.chunks(3).map(|epoch| epoch.concat().chunks(2).map(|piece| piece[0]).collect()).collect()
    };
    let orders = epochs(data(0));
    for order in &orders {
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..12).collect::<Vec<_>>());
    }
    assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    assert_ne!(orders, epochs(data(1)));
    let mut data = data(0);
    let late = data.batch(7).ids;
    assert_eq!(
        (late, data.batch(1).ids),
        (epochs_batch(&orders, 7), epochs_batch(&orders, 1)),
        "in any order of asking"
    );
}

fn epochs_batch(orders: &[Vec<u32>], step: usize) -> Vec<u32> {
    orders[step / 3][step % 3 * 4..][..4].iter().flat_map(|&piece| [piece, piece]).collect()
}

#[test]
fn ignored_labels_count_for_nothing() {
    use candle_core::{Device, Tensor};
    let folder = scratch("labels");
    let save = |name: &str, ids: Vec<i64>, labels: Vec<i64>| {
        let tensor = |values: Vec<i64>| Tensor::from_vec(values, (1, 1, 6), &Device::Cpu).expect("a tensor");
        let tensors = std::collections::HashMap::from([("input_ids", tensor(ids)), ("labels", tensor(labels))]);
        let path = format!("{folder}/{name}.safetensors");
        candle_core::safetensors::save(&tensors, &path).expect("a file");
        path
    };
    let model = golden("llama/base");
    let loss = |data: &str| {
        let arguments = ["--model", &model, "--data", data, "--out", &folder, "--device", "cpu", "--json"];
        json_lines(&done(&arguments).out)[0]["loss"].as_f64().expect("a number")
    };
    // Causal: what follows the last label that counts cannot matter, nor can a label of the first token.
    let one = loss(&save("one", vec![5, 6, 7, 8, 9, 10], vec![5, 6, 7, -100, -100, -100]));
    let other = loss(&save("other", vec![5, 6, 7, 1, 2, 3], vec![-100, 6, 7, -100, -100, -100]));
    let all = loss(&save("all", vec![5, 6, 7, 8, 9, 10], vec![5, 6, 7, 8, 9, 10]));
    assert_eq!(one, other);
    assert!((one - all).abs() > 1e-3, "{one} {all}");
    let none = save("none", vec![5, 6, 7, 8, 9, 10], vec![5, -100, -100, -100, -100, -100]);
    let output = run(&["--model", &model, "--data", &none, "--out", &folder]);
    assert_eq!(output.status, 3);
    assert!(output.err.contains("every label of step 0 is ignored"), "{}", output.err);
}

/// Not a test of its own: the process that `ctrl_c_saves` interrupts.
#[test]
fn child_process() {
    if let Ok(arguments) = std::env::var("FINETUNE_TEST_ARGUMENTS") {
        let arguments = arguments.split('\u{1f}').map(OsString::from).collect();
        std::process::exit(finetune::start(arguments).into());
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_the_run_can_go_on() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let (model, text) = (golden("llama/base"), text());
    let outs = [scratch("ctrl-c"), scratch("ctrl-c-whole")];
    let common = ["--model", &model, "--data", &text, "--device", "cpu", "--batch", "1", "--seq", "8", "--json"];
    let arguments = [&common[..], &["--out", &outs[0], "--steps", "1000000", "--checkpoint", "0"]].concat();
    // A shell that ignores the signal, as one of a background job does; the program must listen nevertheless.
    let mut child = Command::new("sh")
        .args(["-c", "trap '' INT; exec \"$0\" --exact child_process --nocapture --test-threads 1"])
        .arg(std::env::current_exe().expect("this executable"))
        .env("FINETUNE_TEST_ARGUMENTS", arguments.join("\u{1f}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    let first = lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with('{')));
    assert!(first.is_some(), "the child ended without a step");
    let kill = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().expect("a shell");
    assert!(kill.success());
    let steps = 1 + lines.filter(|line| line.as_ref().is_ok_and(|line| line.starts_with('{'))).count(); // to its end
    let output = child.wait_with_output().expect("its end");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("stopped by Ctrl-C"), "{err}");
    assert!(Adapter::load(&outs[0]).is_ok());

    let more = (steps + 2).to_string();
    done(&[&common[..], &["--out", &outs[0], "--steps", &more, "--resume"]].concat());
    done(&[&common[..], &["--out", &outs[1], "--steps", &more]].concat());
    let adapter = |out: &str| read(out, "adapter_model.safetensors");
    assert!(adapter(&outs[0]) == adapter(&outs[1]), "{steps} steps, then two more, differ from {more} at once");
}

#[test]
fn ctrl_c_before_the_first_step_saves_the_start() {
    let (model, text) = (golden("llama/base"), text());
    let outs = [scratch("stopped"), scratch("stopped-whole")];
    let common = ["--model", &model, "--data", &text, "--device", "cpu", "--batch", "1", "--seq", "8", "--steps", "3"];
    let output = interrupted(&[&common[..], &["--out", &outs[0]]].concat(), true);
    assert_eq!(output.status, 130, "{}{}", output.out, output.err);
    assert!(output.out.contains("stopped by Ctrl-C"), "{}", output.out);
    assert!(Adapter::load(&outs[0]).is_ok());
    done(&[&common[..], &["--out", &outs[0], "--resume"]].concat());
    done(&[&common[..], &["--out", &outs[1]]].concat());
    assert_eq!(read(&outs[0], "adapter_model.safetensors"), read(&outs[1], "adapter_model.safetensors"));
}

#[test]
fn a_reader_that_goes_away_costs_no_step() {
    struct Gone(usize);
    impl std::io::Write for Gone {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(std::io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (model, text, out) = (golden("llama/base"), text(), scratch("gone"));
    let arguments = ["--model", &model, "--data", &text, "--device", "cpu", "--seq", "8", "--json", "--out", &out];
    let (mut stdout, mut err) = (Gone(250), Vec::new()); // two lines, not three
    let mut streams = Streams { out: &mut stdout, err: &mut err, terminal: false };
    let status = finetune::run(arguments.iter().map(OsString::from).collect(), &AtomicBool::new(false), &mut streams);
    assert_eq!(status, 1);
    assert!(String::from_utf8_lossy(&err).contains("cannot write stdout"));
    let made = String::from_utf8(read(&out, "loss.csv")).expect("UTF-8").lines().count() - 1;
    assert!((2..5).contains(&made), "{made}");
    let rest = json_lines(&done(&[&arguments[..], &["--steps", "6", "--resume"]].concat()).out);
    assert_eq!(rest.len(), 6 - made);
}

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
    let cases: [(String, u8, &[&str]); 34] = [
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
