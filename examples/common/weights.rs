//! The model's tensors: one model.safetensors, or the files that model.safetensors.index.json names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::failure::{Failure, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model's tensors, mapped into memory and brought to one type and device as they are asked for.
pub struct Weights {
    directory: PathBuf,
    files: MmapedSafetensors,
    pub dtype: DType,
    pub device: Device,
}

impl Weights {
    pub fn open(directory: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let paths = files(directory)?;
        // SAFETY: the mapped files are a model that nobody rewrites while this program runs; candle checks their headers
        // against their length.
        let files = unsafe { MmapedSafetensors::multi(&paths) };
        let files = files.map_err(|error| Failure::malformed(directory, error))?;
        Ok(Self { directory: directory.into(), files, dtype, device: device.clone() })
    }

    /// The tensor, which must be there, have this shape and hold floating-point numbers.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let malformed = |problem: String| Failure::malformed(&self.directory, problem);
        let view = self.files.get(name).map_err(|_| malformed(format!("holds no tensor `{name}`")))?;
        if view.shape() != shape {
            return Err(malformed(format!("`{name}` has shape {:?}, expected {shape:?}", view.shape())));
        }
        let stored = DType::try_from(view.dtype()).ok().filter(|dtype| dtype.is_float());
        if stored.is_none_or(|dtype| dtype.size_in_bytes() == 1) {
            return Err(malformed(format!("`{name}` is {:?}, expected F64, F32, F16 or BF16", view.dtype())));
        }
        Ok(self.files.load(name, &self.device)?.to_dtype(self.dtype)?)
    }
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let index = directory.join(INDEX);
    if !index.is_file() {
        return Ok(vec![directory.join(SINGLE)]);
    }
    let malformed = |problem: String| Failure::malformed(&index, problem);
    let text = std::fs::read(&index).map_err(|error| malformed(error.to_string()))?;
    let parsed: Value = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    let map = parsed.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| malformed("holds no object `weight_map`".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let name =
            file.as_str().ok_or_else(|| malformed(format!("the file of `{tensor}` is {file}, expected a name")))?;
        // A file beside the index, nothing elsewhere.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(malformed(format!("the file of `{tensor}` is `{name}`, expected a name without folders")));
        }
        names.insert(name);
    }
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}
