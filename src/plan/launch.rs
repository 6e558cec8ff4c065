//! A launch as data, and its parameter block.

use crate::params::{MAP_ALIGN, MAP_BYTES};
use crate::{Dtype, params::Params};

/// One kernel launch as data; a backend only executes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The [`Image`](crate::kernels::Image) that holds the kernel.
    pub image: &'static str,
    /// Entry point.
    pub kernel: &'static str,
    /// CTAs.
    pub grid: [u32; 3],
    /// CTAs per cluster; 1 × 1 × 1 when the kernel has none.
    pub cluster: [u32; 3],
    /// Threads per CTA.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
    /// Tensor maps in front of the fields, absent where the call does not need one. Empty in the portable family.
    pub maps: Vec<Option<TensorMap>>,
    /// The fields of the kernel's one parameter.
    pub params: Params,
}

/// A matrix and the boxes it is copied in, as `cuTensorMapEncodeTiled` takes them: the innermost dimension first. Swizzled,
/// not interleaved; what a box reaches beyond the matrix reads as zero and is not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Type of the elements: of 16 bits.
    pub dtype: Dtype,
    /// Device address of element (0, 0).
    pub address: u64,
    /// Columns and rows.
    pub dims: [u64; 2],
    /// Bytes between the starts of two rows.
    pub row_bytes: u64,
    /// Columns and rows of a box.
    pub boxes: [u32; 2],
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
    /// Boxes are read, so that L2 may fetch more than a row of one; otherwise written.
    pub is_read: bool,
}

/// How 16-byte units of a box are permuted in shared memory: within spans of as many bytes as the variant says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each names its span")]
pub enum Swizzle {
    Bytes32,
    Bytes64,
    Bytes128,
}

impl Launch {
    /// The kernel's parameter: the maps as `encode` writes them (zero bytes for one that is absent), the fields, and zeros up
    /// to a whole number of 128 bytes when there are maps, because a map's alignment is that of the whole.
    ///
    /// # Errors
    /// Those of `encode`.
    pub fn parameter_bytes<E>(
        &self,
        mut encode: impl FnMut(&TensorMap) -> Result<[u8; MAP_BYTES], E>,
    ) -> Result<Vec<u8>, E> {
        let mut bytes = Vec::with_capacity(2048);
        for map in &self.maps {
            bytes.extend(map.as_ref().map(&mut encode).transpose()?.unwrap_or([0; MAP_BYTES]));
        }
        bytes.extend(self.params.to_bytes());
        if !self.maps.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(MAP_ALIGN), 0);
        }
        Ok(bytes)
    }
}
