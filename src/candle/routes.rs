//! Which adapter each row of a batch goes through, where the op reads it.

use std::sync::Arc;

#[cfg(feature = "candle-cuda")]
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{Device, DeviceLocation, Result};

use crate::{Routing, Slot};

/// Rows of a batch with the adapters they go through, in a device's memory: [`Training::routes`](super::Training::routes). Clones
/// share the table, and so can all layers whose adapters have the same slots.
///
/// Row i is that of x's tokens in the order in which they lie: for an x of B × L × K, rows L · b up to L · (b + 1) are of sequence b.
#[derive(Clone, Debug)]
pub struct Routes {
    routing: Arc<Routing>,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    /// The routing's own words.
    Cpu,
    #[cfg(feature = "candle-cuda")]
    Cuda { words: Arc<CudaSlice<u64>>, location: DeviceLocation },
}

impl Routes {
    /// Copies the table of a batch to the device that x is on.
    ///
    /// # Errors
    /// candle's, where a GPU has no room or a copy fails, and for a device that is neither a CPU nor one of NVIDIA's GPUs.
    pub fn new(routing: Routing, device: &Device) -> Result<Self> {
        let place = match device {
            Device::Cpu => Place::Cpu,
            #[cfg(feature = "candle-cuda")]
            Device::Cuda(cuda) => {
                let words = Arc::new(cuda.clone_htod(routing.words())?);
                Place::Cuda { words, location: device.location() }
            }
            other => candle_core::bail!("routes: no table for a device at {:?}", other.location()),
        };
        Ok(Self { routing: Arc::new(routing), place })
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.routing.rows()
    }

    /// The adapters that the rows were routed among.
    pub fn slots(&self) -> &[Slot] {
        self.routing.slots()
    }

    pub(super) fn location(&self) -> DeviceLocation {
        match &self.place {
            Place::Cpu => DeviceLocation::Cpu,
            #[cfg(feature = "candle-cuda")]
            Place::Cuda { location, .. } => *location,
        }
    }

    /// One past the last rank that any row goes through.
    pub(super) fn ranks(&self) -> usize {
        self.routing.ranks()
    }

    pub(super) fn on_cpu(&self) -> &[u64] {
        self.routing.words()
    }

    #[cfg(feature = "candle-cuda")]
    pub(super) fn on_gpu(&self) -> Result<&CudaSlice<u64>> {
        match &self.place {
            Place::Cuda { words, .. } => Ok(words),
            Place::Cpu => candle_core::bail!("routes: the table is not on the GPU"),
        }
    }
}
