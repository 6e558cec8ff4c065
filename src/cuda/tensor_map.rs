//! Tensor maps as the driver writes them.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as Fill,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle,
};

use super::driver::failed;
use crate::Dtype;
use crate::error::{Error, Result};
use crate::params::MAP_BYTES;
use crate::plan::{Swizzle, TensorMap};

/// The first driver with `cuTensorMapEncodeTiled` and `cuLaunchKernelEx`: CUDA 12.0.
const LEAST_DRIVER: i32 = 12000;

/// Whether the driver knows tensor maps. cudarc panics when it is asked for a function that the library lacks, so this must
/// come before the first [`encode`].
///
/// # Errors
/// [`Error::Driver`] when the driver is older.
pub(super) fn check_driver() -> Result<()> {
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    if version >= LEAST_DRIVER {
        return Ok(());
    }
    Err(Error::Driver {
        call: "cuTensorMapEncodeTiled",
        message: format!(
            "the driver supports CUDA {}.{}, expected {}.{} or later, which knows tensor maps",
            version / 1000,
            version % 1000 / 10,
            LEAST_DRIVER / 1000,
            LEAST_DRIVER % 1000 / 10
        ),
    })
}

/// The bytes that a kernel takes for `map`. After [`check_driver`].
///
/// # Errors
/// [`Error::Driver`] for a map that the driver refuses.
pub(super) fn encode(map: &TensorMap) -> Result<[u8; MAP_BYTES]> {
    let mut encoded = CUtensorMap { opaque: [0; MAP_BYTES / 8] };
    let dtype = match map.dtype {
        Dtype::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Dtype::Bf16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Dtype::F32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    };
    let swizzle = match map.swizzle {
        Swizzle::Bytes32 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::Bytes64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::Bytes128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let promotion = match map.is_read {
        true => Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        false => Promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
    };
    let element_strides = [1, 1];
    // SAFETY: the map is written to a place of its own, every array has the two entries (one, for the strides) that rank 2
    // asks for, and the driver checks their values. The address of the matrix is not followed.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut encoded,
            dtype,
            2,
            map.address as *mut c_void,
            map.dims.as_ptr(),
            &map.row_bytes,
            map.boxes.as_ptr(),
            element_strides.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            promotion,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(failed("cuTensorMapEncodeTiled"))?;
    let mut bytes = [0; MAP_BYTES];
    for (to, word) in bytes.chunks_exact_mut(8).zip(encoded.opaque) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(bytes)
}
