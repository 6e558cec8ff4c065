//! The one place that starts a kernel.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{
    self, CUfunction, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUstream,
};

use crate::plan::{Launch, Params};

/// Starts `function` on `stream` as `launch` says.
///
/// # Safety
/// `function` is the kernel that `launch` names, in the current context, and its module stays loaded until it has run.
/// `stream` is a stream of that context. What `launch.params` points to is device memory of the extents it gives, which stays
/// allocated until the kernel has run and which nothing else accesses in a conflicting way until then.
pub(super) unsafe fn launch(function: CUfunction, stream: CUstream, launch: &Launch) -> Result<(), DriverError> {
    let [grid, block] = [launch.grid, launch.block];
    let params: *const c_void = match &launch.params {
        Params::Forward(params) => ptr::from_ref(params).cast(),
        Params::Backward(params) => ptr::from_ref(params).cast(),
    };
    // The driver copies the parameter before it returns and never writes it.
    let mut params = [params.cast_mut()];
    if launch.cluster == [1, 1, 1] {
        // SAFETY: the caller vouches for function, stream and what the parameter points to; the kernel takes one
        // parameter, and it is the struct that the layout checks of `params.rs` hold to the kernel's own.
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
        .result();
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
    unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), ptr::null_mut()) }.result()
}
