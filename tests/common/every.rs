//! Every backend that this machine has, as one type: what holds of all of them is tested in one loop.

use fused_lora::{Element, Result};

#[cfg(all(feature = "emulator", feature = "cuda"))]
use super::emulated::Emulated;
#[cfg(feature = "cuda")]
use super::gpu::{self, Gpu};
#[cfg(feature = "cuda")]
use super::hopper;
use super::shared::{SharedBackward, SharedForward};
use super::{Backend, Cpu, HostBackward, HostForward};

/// One of the backends.
pub enum Any {
    Cpu,
    #[cfg(all(feature = "emulator", feature = "cuda"))]
    Emulated(Emulated),
    #[cfg(feature = "cuda")]
    Gpu(Gpu),
}

impl Backend for Any {
    fn name(&self) -> String {
        match self {
            Self::Cpu => Cpu.name(),
            #[cfg(all(feature = "emulator", feature = "cuda"))]
            Self::Emulated(emulated) => emulated.name(),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.name(),
        }
    }

    fn forward<T: Element, A: Element>(&self, op: &mut HostForward<T, A>) -> Result<()> {
        match self {
            Self::Cpu => Cpu.forward(op),
            #[cfg(all(feature = "emulator", feature = "cuda"))]
            Self::Emulated(emulated) => emulated.forward(op),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.forward(op),
        }
    }

    fn backward<T: Element, A: Element>(&self, op: &mut HostBackward<T, A>) -> Result<()> {
        match self {
            Self::Cpu => Cpu.backward(op),
            #[cfg(all(feature = "emulator", feature = "cuda"))]
            Self::Emulated(emulated) => emulated.backward(op),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.backward(op),
        }
    }

    fn forward_shared<T: Element, A: Element>(&self, op: &mut SharedForward<T, A>) -> Result<()> {
        match self {
            Self::Cpu => Cpu.forward_shared(op),
            #[cfg(all(feature = "emulator", feature = "cuda"))]
            Self::Emulated(emulated) => emulated.forward_shared(op),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.forward_shared(op),
        }
    }

    fn backward_shared<T: Element, A: Element>(&self, op: &mut SharedBackward<T, A>) -> Result<()> {
        match self {
            Self::Cpu => Cpu.backward_shared(op),
            #[cfg(all(feature = "emulator", feature = "cuda"))]
            Self::Emulated(emulated) => emulated.backward_shared(op),
            #[cfg(feature = "cuda")]
            Self::Gpu(gpu) => gpu.backward_shared(op),
        }
    }
}

/// Which kernels, and so which shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any shape and placement: the CPU, and the portable kernels.
    Ragged,
    /// Dimensions in steps of 8, matrices on 16 bytes: the Hopper kernels.
    Hopper,
}

/// Simulated GPUs for each choice that the kernels of a kind leave.
#[cfg(all(feature = "emulator", feature = "cuda"))]
pub fn emulated(kind: Kind) -> Vec<Emulated> {
    use fused_lora::plan::TileSize::{Large, Small};
    match kind {
        Kind::Ragged => {
            [(75, Small), (80, Large), (80, Small)].map(|(arch, tile)| Emulated::new(arch, 3).with_tile(tile)).into()
        }
        Kind::Hopper => {
            hopper::variants().into_iter().map(|options| Emulated::new(90, 3).with_options(options)).collect()
        }
    }
}

/// The backends of a kind; `test` is named where there is no GPU.
pub fn backends(kind: Kind, test: &str) -> Vec<Any> {
    let mut backends = Vec::new();
    if kind == Kind::Ragged {
        backends.push(Any::Cpu);
    }
    #[cfg(not(feature = "cuda"))]
    let _ = test;
    #[cfg(all(feature = "emulator", feature = "cuda"))]
    backends.extend(emulated(kind).into_iter().map(Any::Emulated));
    #[cfg(feature = "cuda")]
    if let Some(kernels) = gpu::kernels(test) {
        use fused_lora::plan::{Family, Options};
        match kind {
            Kind::Ragged => {
                let options = Options::default().with_family(Family::Portable);
                backends.push(Any::Gpu(Gpu::new(kernels.with_plan_options(options))));
            }
            Kind::Hopper if kernels.device().arch == 90 && !kernels.plan_options().without_sm90 => {
                let variants = hopper::variants().into_iter();
                backends.extend(variants.map(|options| Any::Gpu(Gpu::new(kernels.with_plan_options(options)))));
            }
            Kind::Hopper => {}
        }
    }
    backends
}
