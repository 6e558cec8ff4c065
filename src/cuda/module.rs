//! Images loaded into a context, with their kernels made ready.

use std::ffi::CString;
use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::result::{DriverError, function, module};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute as Attribute, CUmodule, CUresult};

use super::driver::failed;
use super::tensor_map;
use crate::error::{Error, Result};
use crate::kernels::{IMAGES, Image};
use crate::plan::{Device, SM90_IMAGES};

/// The kernels of every image, as plans name them. A test holds this list to the images themselves.
const KERNELS: &[(&str, &[&str])] = &[
    (
        "portable_forward",
        &["lora_forward_f16_large", "lora_forward_f16_small", "lora_forward_bf16_large", "lora_forward_bf16_small"],
    ),
    (
        "portable_backward",
        &["lora_backward_f16_large", "lora_backward_f16_small", "lora_backward_bf16_large", "lora_backward_bf16_small"],
    ),
    (
        "portable_adapter",
        &["lora_merge_f16", "lora_merge_bf16", "lora_round_f16", "lora_round_bf16", "lora_gain_f16", "lora_gain_bf16"],
    ),
    (
        "sm90_forward",
        &[
            "lora_sm90_forward_f16_256",
            "lora_sm90_forward_f16_192",
            "lora_sm90_forward_f16_128",
            "lora_sm90_forward_bf16_256",
            "lora_sm90_forward_bf16_192",
            "lora_sm90_forward_bf16_128",
        ],
    ),
    (
        "sm90_backward",
        &[
            "lora_sm90_backward_f16_256",
            "lora_sm90_backward_f16_192",
            "lora_sm90_backward_f16_128",
            "lora_sm90_backward_bf16_256",
            "lora_sm90_backward_bf16_192",
            "lora_sm90_backward_bf16_128",
        ],
    ),
];

/// One image in one context.
#[derive(Debug)]
pub(super) struct Module {
    context: Arc<CudaContext>,
    image: &'static Image,
    handle: CUmodule,
    functions: Vec<(&'static str, CUfunction)>,
}

// SAFETY: module and function handles are plain names that the driver accepts from any thread; nothing here changes after
// loading.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// Loads every image that `device` can run, with all its kernels: nothing is left to be loaded at the first launch, which
/// could be inside a capture.
pub(super) fn load_all(context: &Arc<CudaContext>, device: &Device) -> Result<Vec<Module>> {
    context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
    let images = IMAGES.iter().filter(|image| image.supports(device.arch));
    let modules: Vec<Module> = images.map(|image| Module::load(context, image, device)).collect::<Result<_>>()?;
    if has_sm90(&modules) {
        tensor_map::check_driver()?;
    }
    if modules.is_empty() { Err(unsupported(device.arch, IMAGES.first())) } else { Ok(modules) }
}

/// Whether the Hopper kernels are among the loaded ones.
pub(super) fn has_sm90(modules: &[Module]) -> bool {
    SM90_IMAGES.iter().all(|name| modules.iter().any(|module| module.image.name == *name))
}

fn unsupported(arch: u32, image: Option<&Image>) -> Error {
    Error::UnsupportedArch { got: arch, built: image.map_or_else(|| "no kernels".to_owned(), Image::architectures) }
}

/// The image is for this GPU, or it would not be loaded: a driver that finds nothing in it is older than the toolkit.
fn too_old(error: DriverError) -> Error {
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    let known = unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok();
    let driver =
        if known { format!("CUDA {}.{}", version / 1000, version % 1000 / 10) } else { "an unknown version".into() };
    let Error::Driver { call, message } = failed("cuModuleLoadData")(error) else {
        return failed("cuModuleLoadData")(error);
    };
    Error::Driver {
        call,
        message: format!("{message}; the driver supports {driver}, expected that of the nvcc of this build"),
    }
}

/// The function a launch names.
pub(super) fn find(modules: &[Module], image: &'static str, kernel: &str, arch: u32) -> Result<CUfunction> {
    modules
        .iter()
        .filter(|module| module.image.name == image)
        .flat_map(|module| &module.functions)
        .find(|(name, _)| *name == kernel)
        .map(|(_, function)| *function)
        .ok_or_else(|| unsupported(arch, Image::find(image)))
}

/// `bytes` at an address that is a multiple of 16. What is embedded starts anywhere; the driver reads the headers of a
/// fatbin as words.
fn aligned(bytes: &[u8]) -> Vec<u128> {
    let word = |chunk: &[u8]| {
        let mut word = [0; 16];
        word[..chunk.len()].copy_from_slice(chunk);
        u128::from_ne_bytes(word)
    };
    bytes.chunks(16).map(word).collect()
}

impl Module {
    /// The context must be current.
    fn load(context: &Arc<CudaContext>, image: &'static Image, device: &Device) -> Result<Module> {
        let fatbin = aligned(image.fatbin);
        // SAFETY: a context is current, and the data is a whole fatbin that nvcc wrote, which says its own length. The
        // driver is done with it when the call returns.
        let handle = unsafe { module::load_data(fatbin.as_ptr().cast()) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_INVALID_IMAGE => too_old(error),
            _ => failed("cuModuleLoadData")(error),
        })?;
        // From here on dropping it unloads.
        let mut loaded = Module { context: context.clone(), image, handle, functions: Vec::new() };
        let kernels = KERNELS.iter().find(|(name, _)| *name == image.name).map_or(&[][..], |(_, kernels)| kernels);
        for kernel in kernels {
            loaded.functions.push((kernel, prepare(handle, kernel, device)?));
        }
        Ok(loaded)
    }
}

/// Finds a kernel and lets it use all the dynamic shared memory of a CTA; each launch asks for what its plan says.
fn prepare(module: CUmodule, kernel: &str, device: &Device) -> Result<CUfunction> {
    let name = CString::new(kernel).unwrap_or_default();
    // SAFETY: the caller has just loaded `module` and holds it.
    let kernel = unsafe { module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))?;
    // SAFETY: `kernel` belongs to that module.
    let fixed = unsafe { function::get_function_attribute(kernel, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) }
        .map_err(failed("cuFuncGetAttribute"))?;
    let limit = i32::try_from(device.shared_per_block).unwrap_or(i32::MAX) - fixed;
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // All of an SM's unified memory as shared memory: the plan counts on several CTAs per SM.
    let carveout = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    for (attribute, value) in [(attribute, limit), (carveout, 100)] {
        // SAFETY: as above; the driver checks the value.
        unsafe { function::set_function_attribute(kernel, attribute, value) }.map_err(failed("cuFuncSetAttribute"))?;
    }
    Ok(kernel)
}

impl Drop for Module {
    /// Waits for the device, so that no kernel of this module still runs.
    fn drop(&mut self) {
        self.context.record_err(self.context.synchronize());
        // SAFETY: the handle came from `load_data` in this context, which `synchronize` made current, and is not used
        // again.
        self.context.record_err(unsafe { module::unload(self.handle) });
    }
}

#[cfg(test)]
mod tests {
    use super::{IMAGES, KERNELS, SM90_IMAGES, aligned};

    /// `.entry` names of a PTX text.
    fn entries(ptx: &str) -> Vec<&str> {
        let lines = ptx.lines().filter_map(|line| line.trim_start().split_once(".entry "));
        let mut names: Vec<&str> = lines.map(|(_, rest)| rest.trim_end_matches(['(', ' '])).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_list_of_kernels_is_that_of_the_images() {
        for image in IMAGES {
            let (_, listed) = KERNELS.iter().find(|(name, _)| *name == image.name).expect("every image is listed");
            let mut listed = listed.to_vec();
            listed.sort_unstable();
            for (arch, ptx) in image.ptx {
                assert_eq!(entries(ptx), listed, "{} for compute_{arch}", image.name);
            }
        }
        // A build for other architectures may leave the Hopper kernels out.
        for (name, _) in KERNELS.iter().filter(|(name, _)| !SM90_IMAGES.contains(name)) {
            assert!(IMAGES.iter().any(|image| image.name == *name), "{name} is listed but not built");
        }
    }

    #[test]
    fn an_aligned_copy_holds_the_same_bytes() {
        let bytes: Vec<u8> = (0..=100).collect();
        let copy: Vec<u8> = aligned(&bytes).iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(copy[..bytes.len()], bytes);
    }
}
