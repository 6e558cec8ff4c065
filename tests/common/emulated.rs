//! The kernels' PTX on the emulator.

use fused_lora::emulator::{Emulator, Run};
use fused_lora::plan::{Device, Options, TileSize};
use fused_lora::{Element, Result};

use super::data::Spec;
use super::shared::{self, SharedBackward, SharedForward, SharedSpec};
use super::{Backend, HostBackward, HostForward, check, full};

/// One layer, the adapter alone of one with f32 factors, where no base product hides what halves leave out, or projections that share x,
/// with factors of 16 bits or of f32.
#[derive(Clone, Debug)]
pub enum Layers {
    One(Spec),
    Split(Spec),
    Shared(SharedSpec),
    SharedSplit(SharedSpec),
}

impl From<Spec> for Layers {
    fn from(spec: Spec) -> Self {
        Self::One(spec)
    }
}

impl Layers {
    /// Of a spec, which is that of the first, with more projections of these N and R.
    pub fn shared(base: Spec, others: &[(usize, usize)]) -> Self {
        let parts = [(base.n, base.r)].into_iter().chain(others.iter().copied()).collect();
        Self::Shared(SharedSpec { base, parts })
    }

    /// The same with f32 factors.
    pub fn shared_split(base: Spec, others: &[(usize, usize)]) -> Self {
        match Self::shared(base, others) {
            Self::Shared(spec) => Self::SharedSplit(spec),
            other => other,
        }
    }

    /// Every bit that forward leaves in its outputs, and what it did; `Err` with the first complaint.
    pub fn forward<T: Element>(&self, emulator: &Emulator) -> Result<(String, Run), String> {
        let said = |error: fused_lora::Error| error.to_string();
        match self {
            Self::One(spec) => {
                let before = spec.forward::<T>();
                let mut after = before.clone();
                let run = emulator.forward(after.views()).map_err(said)?;
                check::judge_forward(&before, &after, spec.values)?;
                Ok((format!("{:?}{:?}", after.y.data, after.h.map(|h| h.data)), run))
            }
            Self::Split(spec) => {
                let mut before = spec.forward_of::<T, f32>();
                before.w.fill(|_, _| 0.0);
                before.bias = None;
                let mut after = before.clone();
                let run = emulator.forward(after.views()).map_err(said)?;
                full::judge_forward(&before, &after)?;
                Ok((format!("{:?}{:?}", after.y.data, after.h.map(|h| h.data)), run))
            }
            Self::Shared(spec) => {
                let before = spec.forward::<T>();
                let mut after = before.clone();
                let run = emulator.forward_shared(after.views()).map_err(said)?;
                shared::judge_forward(&before, &after, spec.base.values)?;
                let y: Vec<_> = after.own.iter().map(|op| &op.y.data).collect();
                Ok((format!("{y:?}{:?}", after.h.map(|h| h.data)), run))
            }
            Self::SharedSplit(spec) => {
                let before = spec.forward_of::<T, f32>();
                let mut after = before.clone();
                let run = emulator.forward_shared(after.views()).map_err(said)?;
                shared::judge_full_forward(&before, &after)?;
                let y: Vec<_> = after.own.iter().map(|op| &op.y.data).collect();
                Ok((format!("{y:?}{:?}", after.h.map(|h| h.data)), run))
            }
        }
    }

    /// The same of backward.
    pub fn backward<T: Element>(&self, emulator: &Emulator) -> Result<(String, Run), String> {
        let said = |error: fused_lora::Error| error.to_string();
        match self {
            Self::One(spec) => {
                let before = spec.backward::<T>();
                let mut after = before.clone();
                let run = emulator.backward(after.views()).map_err(said)?;
                check::judge_backward(&before, &after, spec.values)?;
                let HostBackward { dx, da, db, dbias, magnitude, .. } = after;
                let dm = magnitude.map(|magnitude| magnitude.dm.data);
                Ok((format!("{:?}{da:?}{db:?}{dbias:?}{dm:?}", dx.map(|dx| dx.data)), run))
            }
            Self::Split(spec) => {
                let mut before = spec.backward_of::<T, f32>();
                before.w.fill(|_, _| 0.0);
                let mut after = before.clone();
                let run = emulator.backward(after.views()).map_err(said)?;
                full::judge_backward(&before, &after)?;
                let HostBackward { dx, da, db, dbias, .. } = after;
                Ok((format!("{:?}{da:?}{db:?}{dbias:?}", dx.map(|dx| dx.data)), run))
            }
            Self::Shared(spec) => {
                let before = spec.backward::<T>();
                let mut after = before.clone();
                let run = emulator.backward_shared(after.views()).map_err(said)?;
                shared::judge_backward(&before, &after, spec.base.values)?;
                let own: Vec<_> = after.own.iter().map(|op| (&op.db, &op.dbias)).collect();
                Ok((format!("{:?}{:?}{own:?}", after.dx.map(|dx| dx.data), after.da), run))
            }
            Self::SharedSplit(spec) => {
                let before = spec.backward_of::<T, f32>();
                let mut after = before.clone();
                let run = emulator.backward_shared(after.views()).map_err(said)?;
                shared::judge_full_backward(&before, &after)?;
                let own: Vec<_> = after.own.iter().map(|op| (&op.db, &op.dbias)).collect();
                Ok((format!("{:?}{:?}{own:?}", after.dx.map(|dx| dx.data), after.da), run))
            }
        }
    }
}

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

    fn forward<T: Element, A: Element>(&self, op: &mut HostForward<T, A>) -> Result<()> {
        self.0.forward(op.views()).map(drop)
    }

    fn backward<T: Element, A: Element>(&self, op: &mut HostBackward<T, A>) -> Result<()> {
        self.0.backward(op.views()).map(drop)
    }

    fn forward_shared<T: Element, A: Element>(&self, op: &mut SharedForward<T, A>) -> Result<()> {
        self.0.forward_shared(op.views()).map(drop)
    }

    fn backward_shared<T: Element, A: Element>(&self, op: &mut SharedBackward<T, A>) -> Result<()> {
        self.0.backward_shared(op.views()).map(drop)
    }
}
