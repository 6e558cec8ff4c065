//! What the tests of `peft` share: recorded files, folders to write to, what an adapter holds.

use std::fs;
use std::path::{Path, PathBuf};

use fused_lora::peft::{Adapter, Module};
use serde_json::Value;

pub fn golden(path: &str) -> PathBuf {
    super::project().join("tests/golden").join(path)
}

pub fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a readable file")).expect("JSON")
}

/// An empty folder of this name.
pub fn fresh(name: &str) -> PathBuf {
    let dir = super::scratch().join(format!("peft-{name}"));
    let _ = fs::remove_dir_all(&dir);
    dir
}

pub fn values(adapter: &Adapter) -> Vec<(String, Module, Vec<f32>, Vec<f32>)> {
    let modules = adapter.modules();
    modules.map(|(name, module, factors)| (name.to_owned(), module, factors.a.to_f32(), factors.b.to_f32())).collect()
}
