//! A tensor of an adapter: bytes as they lie in the file, with their element type and dimensions.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::{ErrorKind, Result};
use crate::Dtype;

/// A row-major tensor in f32, f16 or bf16. Tensors that were read share one buffer, the file's.
#[derive(Clone)]
pub struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    file: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Tensor {
    /// `values` in row-major order, each rounded once to `dtype`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Length`] unless there are as many values as `shape` holds.
    pub fn from_f32(dtype: Dtype, shape: &[usize], values: &[f32]) -> Result<Self> {
        let expected = shape.iter().try_fold(1usize, |product, &axis| product.checked_mul(axis)).unwrap_or(usize::MAX);
        if values.len() != expected {
            return Err(ErrorKind::Length { got: values.len(), shape: shape.to_vec(), expected }.into());
        }
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
            Dtype::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        };
        let range = 0..bytes.len();
        Ok(Self { dtype, shape: shape.to_vec(), file: Arc::new(bytes), range })
    }

    /// A part of a file that was read. `range` lies within `file` and holds as many bytes as `shape` asks for.
    pub(super) fn in_file(dtype: Dtype, shape: Vec<usize>, file: Arc<Vec<u8>>, range: Range<usize>) -> Self {
        Self { dtype, shape, file, range }
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as stored: row-major, little-endian.
    pub fn bytes(&self) -> &[u8] {
        self.file.get(self.range.clone()).unwrap_or_default()
    }

    /// The elements, widened exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.bytes();
        match self.dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|&four| f32::from_le_bytes(four)).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|&two| f16::from_le_bytes(two).to_f32()).collect(),
            Dtype::Bf16 => bytes.as_chunks().0.iter().map(|&two| bf16::from_le_bytes(two).to_f32()).collect(),
        }
    }
}

/// Without the elements.
impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tensor").field("dtype", &self.dtype).field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// Same type, dimensions and bits.
impl PartialEq for Tensor {
    fn eq(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.bytes() == other.bytes()
    }
}
