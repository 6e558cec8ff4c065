//! `examples/finetune`: recorded trajectories, text, resumption to the bit, Ctrl-C, and what it refuses.

#[path = "../common/mod.rs"]
mod common;
mod data;
#[path = "../../examples/finetune/main.rs"]
mod finetune;
mod interruption;
mod refused;
mod trajectories;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use finetune::progress::Streams;
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
