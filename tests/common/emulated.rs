//! The kernels' PTX on the emulator.

use fused_lora::emulator::Emulator;
use fused_lora::plan::{Device, Options, TileSize};
use fused_lora::{Element, Result};

use super::shared::{SharedBackward, SharedForward};
use super::{Backend, HostBackward, HostForward};

/// A simulated GPU as a backend.
pub struct Emulated(pub Emulator);

impl Emulated {
    /// A small GPU: few SMs, so that CTAs have several units of work to do.
    pub fn new(arch: u32, sms: u32) -> Self {
        Self(Emulator::new(Device::of_arch(&format!("emulated sm_{arch}, {sms} SMs"), arch, sms)))
    }

    /// The same with one tile shape for everything.
    pub fn with_tile(self, tile: TileSize) -> Self {
        self.with_options(Options::default().with_tile(tile))
    }

    /// The same with choices made instead of the planner's.
    pub fn with_options(self, options: Options) -> Self {
        Self(self.0.with_plan_options(options))
    }
}

impl Backend for Emulated {
    fn name(&self) -> String {
        self.0.device().name.clone()
    }

    fn forward<T: Element>(&self, op: &mut HostForward<T>) -> Result<()> {
        self.0.forward(op.views()).map(drop)
    }

    fn backward<T: Element>(&self, op: &mut HostBackward<T>) -> Result<()> {
        self.0.backward(op.views()).map(drop)
    }

    fn forward_shared<T: Element>(&self, op: &mut SharedForward<T>) -> Result<()> {
        self.0.forward_shared(op.views()).map(drop)
    }

    fn backward_shared<T: Element>(&self, op: &mut SharedBackward<T>) -> Result<()> {
        self.0.backward_shared(op.views()).map(drop)
    }
}
