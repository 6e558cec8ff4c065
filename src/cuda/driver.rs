//! Finding the driver and a GPU, and turning what the driver says into errors.

use std::error::Error as _;
use std::ffi::CStr;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUresult, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaStream};

use crate::error::{Error, Result};
use crate::plan::{Device, Peak};

/// The driver's library, by the names cudarc looks for as well.
const LIBRARIES: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

/// Turns the error of `call` into ours.
pub(super) fn failed(call: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |error| {
        let text = |text: Result<&CStr, DriverError>| {
            text.map_or_else(|_| format!("error {}", error.0 as u32), |text| text.to_string_lossy().into_owned())
        };
        Error::Driver { call, message: format!("{} ({})", text(error.error_name()), text(error.error_string())) }
    }
}

/// The primary context of GPU `ordinal`, shared with the CUDA runtime and with every other library in the process.
///
/// Unlike [`CudaContext::new`] it returns an error where no driver is installed, instead of panicking.
///
/// # Errors
/// [`Error::NoDriver`] without driver or without any GPU; [`Error::TooLarge`] for an ordinal past the last GPU;
/// [`Error::Driver`].
pub fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    find_library()?;
    let no_gpu = || Error::NoDriver { reason: "the driver is installed but finds no GPU".to_owned() };
    result::init().map_err(|error| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => no_gpu(),
        CUresult::CUDA_ERROR_STUB_LIBRARY => {
            Error::NoDriver { reason: "libcuda is the stub that comes with the toolkit".to_owned() }
        }
        _ => failed("cuInit")(error),
    })?;
    let count = CudaContext::device_count().map_err(failed("cuDeviceGetCount"))?;
    let last = usize::try_from(count).ok().and_then(|count| count.checked_sub(1)).ok_or_else(no_gpu)?;
    if ordinal > last {
        return Err(Error::TooLarge { what: "the device ordinal", got: ordinal as u64, limit: last as u64 });
    }
    CudaContext::new(ordinal).map_err(failed("cuDevicePrimaryCtxRetain"))
}

/// cudarc panics in any call when it cannot load the library, and offers no way to ask that exists in all its linking
/// modes.
fn find_library() -> Result<()> {
    let mut reason = None;
    for name in LIBRARIES {
        // SAFETY: loading runs the library's initialisers; the driver's are made to run in any process, and cudarc is
        // about to load the same library.
        match unsafe { libloading::Library::new(*name) } {
            Ok(_) => return Ok(()),
            // The loader's own words, about the name that an installed driver goes by.
            Err(error) => {
                reason = reason.or_else(|| Some(error.source().map_or(error.to_string(), ToString::to_string)))
            }
        }
    }
    Err(Error::NoDriver { reason: reason.unwrap_or_default() })
}

/// What planning looks at.
pub(super) fn properties(context: &CudaContext) -> Result<Device> {
    let attribute = |attribute| -> Result<u32> {
        let value = context.attribute(attribute).map_err(failed("cuDeviceGetAttribute"))?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let name = context.name().map_err(failed("cuDeviceGetName"))?;
    Ok(Device {
        peak: Peak::of(&name),
        name,
        arch: major * 10 + minor,
        sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_per_sm: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
    })
}

/// Whether work on `stream` is being recorded into a graph instead of being done.
pub(super) fn is_capturing(stream: &CudaStream) -> Result<bool> {
    let status = stream.capture_status().map_err(failed("cuStreamIsCapturing"))?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}
