//! A safetensors file as float64 tensors that remember the type they were stored in.

use std::collections::BTreeMap;
use std::path::Path;

use fused_lora::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::failure::Failure;

/// One tensor; every stored type but I64 widens to f64 exactly.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl Tensor {
    /// The transpose of a matrix stored `rows` × `cols`.
    pub fn transposed(&self, rows: usize, cols: usize) -> Vec<f64> {
        (0..cols).flat_map(|col| (0..rows).map(move |row| self.data[row * cols + col])).collect()
    }
}

/// A file's tensors by name.
#[derive(Clone, Debug)]
pub struct Tensors {
    pub file: String,
    tensors: BTreeMap<String, Tensor>,
}

impl Tensors {
    pub fn read(path: &Path, file: &str) -> Result<Self, Failure> {
        let malformed = |problem: String| Failure::malformed(file, problem);
        let bytes = std::fs::read(path).map_err(|error| malformed(error.to_string()))?;
        let parsed = SafeTensors::deserialize(&bytes).map_err(|error| malformed(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in parsed.iter() {
            // Types that no comparison uses (boolean, packed 4-bit, …) are skipped; asking for one says it is missing.
            if let Some(tensor) = decode(&view) {
                tensors.insert(name.to_owned(), tensor);
            }
        }
        Ok(Self { file: file.into(), tensors })
    }

    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor, which must be there and have this shape.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<&Tensor, Failure> {
        let tensor =
            self.get(name).ok_or_else(|| Failure::malformed(&self.file, format!("holds no tensor `{name}`")))?;
        if tensor.shape != shape {
            let problem = format!("`{name}` has shape {:?}, expected {shape:?}", tensor.shape);
            return Err(Failure::malformed(&self.file, problem));
        }
        Ok(tensor)
    }
}

fn decode(view: &TensorView<'_>) -> Option<Tensor> {
    fn each<const BYTES: usize>(data: &[u8], value: impl Fn([u8; BYTES]) -> f64) -> Vec<f64> {
        data.as_chunks::<BYTES>().0.iter().map(|&bytes| value(bytes)).collect()
    }
    let bytes = view.data();
    let data = match view.dtype() {
        Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f64()),
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f64()),
        Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F64 => each(bytes, f64::from_le_bytes),
        Dtype::U8 => each(bytes, |[b]| f64::from(b)),
        Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
        _ => return None,
    };
    Some(Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), data })
}
