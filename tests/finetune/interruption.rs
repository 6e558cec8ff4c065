//! Runs in several parts: the same bits as in one.

use std::ffi::OsString;
use std::sync::atomic::AtomicBool;

use fused_lora::peft::Adapter;
use serde_json::Value;

use crate::finetune::{self, progress::Streams};
use crate::{Output, done, golden, interrupted, json_lines, read, scratch, text};

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
        .args(["-c", "trap '' INT; exec \"$0\" --exact interruption::child_process --nocapture --test-threads 1"])
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
