//! The one place that starts a kernel.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{
    self, CUfunction, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUstream,
};

use super::driver::failed;
use super::tensor_map::encode;
use crate::error::Result;
use crate::params::MAP_ALIGN;
use crate::plan::Launch;

/// A stretch of a parameter block, aligned as the strictest parameter is.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Stretch([u8; MAP_ALIGN]);

/// `bytes` at the alignment of a parameter block, with zeros after them.
fn aligned(bytes: &[u8]) -> Vec<Stretch> {
    let stretch = |chunk: &[u8]| {
        let mut stretch = Stretch([0; MAP_ALIGN]);
        stretch.0[..chunk.len()].copy_from_slice(chunk);
        stretch
    };
    bytes.chunks(MAP_ALIGN).map(stretch).collect()
}

/// Starts `function` on `stream` as `launch` says.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver). Nothing is started then.
///
/// # Safety
/// `function` is the kernel that `launch` names, in the current context, and its module stays loaded until it has run.
/// `stream` is a stream of that context. What `launch.params` points to is device memory of the extents it gives, which stays
/// allocated until the kernel has run and which nothing else accesses in a conflicting way until then.
pub(super) unsafe fn launch(function: CUfunction, stream: CUstream, launch: &Launch) -> Result<()> {
    let [grid, block] = [launch.grid, launch.block];
    let block_of_parameters = aligned(&launch.parameter_bytes(encode)?);
    // The driver copies the parameter before it returns and never writes it.
    let mut params = [block_of_parameters.as_ptr().cast::<c_void>().cast_mut()];
    if launch.cluster == [1, 1, 1] {
        // SAFETY: the caller vouches for function, stream and what the parameter points to; the kernel takes one
        // parameter, and the bytes are those of the struct that the layout checks of `params.rs` hold to the kernel's own.
        return unsafe {
            sys::cuLaunchKernel(
                function,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                launch.shared_bytes,
                stream,
                params.as_mut_ptr(),
                ptr::null_mut(),
            )
        }
        .result()
        .map_err(failed("cuLaunchKernel"));
    }
    let mut cluster = CUlaunchAttributeValue { pad: [0; 64] };
    cluster.clusterDim.x = launch.cluster[0];
    cluster.clusterDim.y = launch.cluster[1];
    cluster.clusterDim.z = launch.cluster[2];
    let id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    let mut attributes = [CUlaunchAttribute { id, pad: [0; 4], value: cluster }];
    let config = CUlaunchConfig {
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: block[0],
        blockDimY: block[1],
        blockDimZ: block[2],
        sharedMemBytes: launch.shared_bytes,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: 1,
    };
    // SAFETY: as above; `config` and its one attribute outlive the call.
    unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), ptr::null_mut()) }
        .result()
        .map_err(failed("cuLaunchKernelEx"))
}
