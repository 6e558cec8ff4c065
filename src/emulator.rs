//! The emulator backend: the launches that a GPU would get, executed on a CPU model of the PTX ISA. For tests.
//!
//! Operands are slices, as for [`cpu`]. Each is copied into simulated memory of exactly its size in which only
//! the matrix's elements are initialised, so that a read of anything else, a write outside an output, an output element
//! that is never written and a workspace that is not left clean are errors, beside all that the emulator itself finds.

mod transfer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub use ptx_emulator::{Checks, Class, Counters, Options, Timing};
use ptx_emulator::{Interleave, L2Promotion, Memory, MemoryError, Module, OobFill, Swizzle, TensorMap, TensorType};

use crate::error::{Error, Result};
use crate::kernels::Image;
use crate::params::MAP_BYTES;
use crate::plan::{self, Device, Launch, Plan, SYNC_BYTES};
use crate::{Dtype, Element, MatrixMut, cpu, raw};
use transfer::{
    download, download_gradient, upload, upload_dropout, upload_factors, upload_gradient, upload_magnitude,
    upload_words,
};

/// A simulated GPU.
#[derive(Clone, Debug)]
pub struct Emulator {
    device: Device,
    options: Options,
    modules: Vec<(&'static str, Arc<Module>)>,
    replays: u32,
    plan: plan::Options,
}

/// What a run did and how it was planned.
#[derive(Clone, Debug)]
pub struct Run {
    /// The plan that was executed.
    pub plan: Plan,
    /// What the kernel did.
    pub counters: Counters,
}

/// Parsed PTX by image and virtual architecture.
type Modules = HashMap<(&'static str, u32), Arc<Module>>;

fn report(text: impl std::fmt::Display) -> Error {
    Error::Emulator { report: text.to_string() }
}

fn memory_error(error: MemoryError) -> Error {
    match error {
        MemoryError::OutOfMemory { bytes, .. } => Error::OutOfMemory { bytes },
        error => report(error),
    }
}

impl Emulator {
    /// A GPU with the limits of `device`. Below sm_80 the portable kernels' compute_75 PTX runs, else their compute_80 PTX;
    /// the Hopper kernels' compute_90a PTX runs on sm_90.
    pub fn new(device: Device) -> Emulator {
        let threads_per_sm = match device.arch {
            75 => 1024,
            80 | 90 | 100 | 103 => 2048,
            _ => 1536,
        };
        let simulated = ptx_emulator::Device {
            sms: device.sms,
            shared_per_sm: device.shared_per_sm,
            shared_per_cta: device.shared_per_block,
            threads_per_sm,
            ctas_per_sm: 16,
            registers_per_sm: 65536,
            ctas_per_cluster: 8,
        };
        Emulator {
            device,
            options: Options { device: simulated, ..Options::default() },
            modules: Vec::new(),
            replays: 0,
            plan: plan::Options::default(),
        }
    }

    /// Another order of events: every random choice of the emulator follows from the seed.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Emulator {
        self.options.seed = seed;
        self
    }

    /// When asynchronous copies land.
    #[must_use]
    pub fn with_copies(mut self, copies: Timing) -> Emulator {
        self.options.copies = copies;
        self
    }

    /// What the emulator looks for and counts.
    #[must_use]
    pub fn with_checks(mut self, checks: Checks) -> Emulator {
        self.options.checks = checks;
        self
    }

    /// A launch that executes more warp instructions than this is given up: for kernels that may never end.
    #[must_use]
    pub fn with_limit(mut self, instructions: u64) -> Emulator {
        self.options.limit = instructions;
        self
    }

    /// Other PTX for the image of this name: how tests run altered kernels.
    #[must_use]
    pub fn with_module(mut self, image: &'static str, module: Arc<Module>) -> Emulator {
        self.modules.push((image, module));
        self
    }

    /// Choices to make instead of the planner's.
    #[must_use]
    pub fn with_plan_options(mut self, options: plan::Options) -> Emulator {
        self.plan = options;
        self
    }

    /// Every operation is launched this many times more on the same memory and workspace, as by replays of a CUDA graph.
    /// Outputs that accumulate do so each time.
    #[must_use]
    pub fn with_replays(mut self, replays: u32) -> Emulator {
        self.replays = replays;
        self
    }

    /// The caller's choices, and what this build leaves to choose from.
    fn plan_options(&self) -> plan::Options {
        let is_there = |name: &str| {
            let replaced = self.modules.iter().any(|(image, _)| *image == name);
            replaced || Image::find(name).is_some_and(|image| image.ptx_for(self.device.arch).is_some())
        };
        let without_sm90 = self.plan.without_sm90 || !plan::SM90_IMAGES.into_iter().all(is_there);
        plan::Options { without_sm90, ..self.plan }
    }

    /// The device that is planned for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Executes a launch on simulated memory.
    ///
    /// # Errors
    /// [`Error::UnsupportedArch`] when this build has no PTX for the device; [`Error::Emulator`] with the report of the
    /// first rule that was broken.
    pub fn run(&self, memory: &mut Memory, launch: &Launch) -> Result<Counters> {
        let module = self.module(launch.image)?;
        let params = launch.parameter_bytes(encode)?;
        let launch = ptx_emulator::Launch {
            kernel: launch.kernel,
            grid: launch.grid,
            cluster: launch.cluster,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            params: &params,
        };
        module.launch(memory, &launch, &self.options).map_err(report)
    }

    /// The parsed PTX of an image; parsing takes longer than a small kernel runs, so each is kept.
    fn module(&self, image: &'static str) -> Result<Arc<Module>> {
        if let Some((_, module)) = self.modules.iter().rev().find(|(name, _)| *name == image) {
            return Ok(Arc::clone(module));
        }
        static MODULES: Mutex<Option<Modules>> = Mutex::new(None);
        let arch = self.device.arch;
        let Some((virtual_arch, text)) = Image::find(image).and_then(|image| image.ptx_for(arch)) else {
            return Err(Error::UnsupportedArch { got: arch, built: format!("no PTX of `{image}` for it") });
        };
        let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
        let modules = modules.get_or_insert_default();
        if let Some(module) = modules.get(&(image, virtual_arch)) {
            return Ok(Arc::clone(module));
        }
        let module = Arc::new(Module::parse(text).map_err(report)?);
        modules.insert((image, virtual_arch), Arc::clone(&module));
        Ok(module)
    }

    /// y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ.
    ///
    /// # Errors
    /// As [`cpu::forward`], what [`Plan::forward`] finds, and [`Error::Emulator`].
    pub fn forward<T: Element, A: Element>(&self, op: cpu::Forward<'_, T, A>) -> Result<Run> {
        self.forward_shared(op.into())
    }

    /// For each projection y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ, all of one x.
    ///
    /// # Errors
    /// As [`cpu::forward_shared`], what [`Plan::forward_shared`] finds, and [`Error::Emulator`].
    pub fn forward_shared<T: Element, A: Element>(&self, op: cpu::ForwardShared<'_, T, A>) -> Result<Run> {
        cpu::check_forward(&op)?;
        let cpu::ForwardShared { x, a, mut h, mut projections, dropout, routes } = op;
        let mut memory = Memory::new();
        let (x, a) = (upload(&mut memory, "x", x, true)?, upload(&mut memory, "a", a, true)?);
        let mut own = Vec::with_capacity(projections.len());
        for (at, cpu::ForwardProjection { w, b, scale, bias, gain, y }) in projections.iter().enumerate() {
            let name = |arg| raw::named(arg, at, projections.len());
            own.push(raw::ForwardProjection {
                w: upload(&mut memory, name("w"), *w, true)?,
                b: upload(&mut memory, name("b"), *b, true)?,
                scale: *scale,
                bias: bias.map(|bias| upload(&mut memory, name("bias"), bias, true)).transpose()?,
                gain: gain.map(|gain| upload(&mut memory, name("gain"), gain, true)).transpose()?,
                y: upload(&mut memory, name("y"), cpu::shared(y), false)?,
            });
        }
        let uploaded = raw::ForwardShared {
            dtype: T::DTYPE,
            x,
            f32_factors: A::DTYPE == Dtype::F32,
            a,
            h: h.as_ref().map(|h| upload(&mut memory, "h", cpu::shared(h), false)).transpose()?,
            projections: raw::Projections::new(&own)?,
            dropout: upload_dropout(&mut memory, &dropout)?,
            routes: routes.map(|routes| upload_words(&mut memory, "routes", routes)).transpose()?,
        };
        let plan = Plan::forward_shared_with(&uploaded, &self.device, self.plan_options())?;
        let counters = self.execute(&mut memory, &plan)?;
        if let (Some(h), Some(from)) = (&mut h, uploaded.h) {
            download(&memory, "h", from, h)?;
        }
        for (at, (projection, from)) in projections.iter_mut().zip(&own).enumerate() {
            download(&memory, raw::named("y", at, own.len()), from.y, &mut projection.y)?;
        }
        Ok(Run { plan, counters })
    }

    /// dx = dy W + dh A, da = dhᵀ x, db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B; only the outputs that are present.
    ///
    /// # Errors
    /// As [`cpu::backward`], what [`Plan::backward`] finds, and [`Error::Emulator`].
    pub fn backward<T: Element, A: Element>(&self, op: cpu::Backward<'_, T, A>) -> Result<Run> {
        self.backward_shared(op.into())
    }

    /// dx = Σ dy W + dh A over all projections, da = dhᵀ x, and for each db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B; only
    /// the outputs that are present.
    ///
    /// # Errors
    /// As [`cpu::backward_shared`], what [`Plan::backward_shared`] finds, and [`Error::Emulator`].
    pub fn backward_shared<T: Element, A: Element>(&self, op: cpu::BackwardShared<'_, T, A>) -> Result<Run> {
        cpu::check_backward(&op)?;
        let cpu::BackwardShared { a, x, h, mut dx, mut da, mut projections, accumulate, dropout, routes } = op;
        let mut memory = Memory::new();
        let mut own = Vec::with_capacity(projections.len());
        for (at, cpu::BackwardProjection { dy, w, b, scale, db, dbias, dm, gain }) in projections.iter().enumerate() {
            let name = |arg| raw::named(arg, at, projections.len());
            own.push(raw::BackwardProjection {
                dy: upload(&mut memory, name("dy"), *dy, true)?,
                w: upload(&mut memory, name("w"), *w, true)?,
                b: upload(&mut memory, name("b"), *b, true)?,
                scale: *scale,
                db: upload_gradient(&mut memory, name("db"), db, accumulate.db)?,
                dbias: upload_gradient(&mut memory, name("dbias"), dbias, accumulate.dbias)?,
                dm: dm.as_ref().map(|dm| upload_magnitude(&mut memory, name, dm, accumulate.dm)).transpose()?,
                gain: gain.map(|gain| upload(&mut memory, name("gain"), gain, true)).transpose()?,
            });
        }
        let uploaded = raw::BackwardShared {
            dtype: T::DTYPE,
            f32_factors: A::DTYPE == Dtype::F32,
            a: upload(&mut memory, "a", a, true)?,
            x: x.map(|x| upload(&mut memory, "x", x, true)).transpose()?,
            h: h.map(|h| upload(&mut memory, "h", h, true)).transpose()?,
            dx: dx.as_ref().map(|dx| upload(&mut memory, "dx", cpu::shared(dx), accumulate.dx)).transpose()?,
            da: upload_gradient(&mut memory, "da", &da, accumulate.da)?,
            projections: raw::Projections::new(&own)?,
            accumulate,
            dropout: upload_dropout(&mut memory, &dropout)?,
            routes: routes.map(|routes| upload_words(&mut memory, "routes", routes)).transpose()?,
        };
        let plan = Plan::backward_shared_with(&uploaded, &self.device, self.plan_options())?;
        let counters = self.execute(&mut memory, &plan)?;
        if let (Some(dx), Some(from)) = (&mut dx, uploaded.dx) {
            download(&memory, "dx", from, dx)?;
        }
        download_gradient(&memory, "da", uploaded.da, &mut da)?;
        for (at, (projection, from)) in projections.iter_mut().zip(&own).enumerate() {
            let name = |arg| raw::named(arg, at, own.len());
            download_gradient(&memory, name("db"), from.db, &mut projection.db)?;
            download_gradient(&memory, name("dbias"), from.dbias, &mut projection.dbias)?;
            if let (Some(target), Some(from)) = (&mut projection.dm, from.dm) {
                download(&memory, name("dm"), from.dm, &mut target.dm)?;
            }
        }
        Ok(Run { plan, counters })
    }

    /// merged = w + scale · B A, or that times a gain.
    ///
    /// # Errors
    /// As [`cpu::merge`], what [`Launch::merge`] finds, and [`Error::Emulator`].
    pub fn merge<T: Element>(&self, op: cpu::Merge<'_, T>) -> Result<Counters> {
        cpu::check_merge(&op)?;
        let cpu::Merge { w, factors, scale, gain, mut merged } = op;
        let mut memory = Memory::new();
        let (a, b, f32_factors) = upload_factors(&mut memory, &factors)?;
        let uploaded = raw::Merge {
            dtype: T::DTYPE,
            w: w.map(|w| upload(&mut memory, "w", w, true)).transpose()?,
            f32_factors,
            a,
            b,
            scale,
            gain: gain.map(|gain| upload(&mut memory, "gain", gain, true)).transpose()?,
            merged: upload(&mut memory, "merged", cpu::shared(&merged), w.is_none())?,
        };
        let counters = self.run(&mut memory, &Launch::merge(&uploaded)?)?;
        download(&memory, "merged", uploaded.merged, &mut merged)?;
        Ok(counters)
    }

    /// rounded_a = A and rounded_b = scale · B, or that over a divisor, in the storage type or in f32.
    ///
    /// # Errors
    /// As [`cpu::round`], what [`Launch::round`] finds, and [`Error::Emulator`].
    pub fn round<T: Element, A: Element>(&self, op: cpu::Round<'_, T, A>) -> Result<Counters> {
        cpu::check_round(&op)?;
        let cpu::Round { factors, scale, divisor, mut rounded_a, mut rounded_b } = op;
        let mut memory = Memory::new();
        let (a, b, f32_factors) = upload_factors(&mut memory, &factors)?;
        let uploaded = raw::Round {
            dtype: T::DTYPE,
            f32_factors,
            f32_rounded: A::DTYPE == Dtype::F32,
            a,
            b,
            scale,
            divisor: divisor.map(|divisor| upload(&mut memory, "divisor", divisor, true)).transpose()?,
            rounded_a: upload(&mut memory, "rounded_a", cpu::shared(&rounded_a), false)?,
            rounded_b: upload(&mut memory, "rounded_b", cpu::shared(&rounded_b), false)?,
        };
        let Some(launch) = Launch::round(&uploaded)? else { return Ok(Counters::default()) };
        let counters = self.run(&mut memory, &launch)?;
        download(&memory, "rounded_a", uploaded.rounded_a, &mut rounded_a)?;
        download(&memory, "rounded_b", uploaded.rounded_b, &mut rounded_b)?;
        Ok(counters)
    }

    /// norm = ‖W + scale · B A‖ and gain = magnitude / norm.
    ///
    /// # Errors
    /// As [`cpu::gain`], what [`Launch::gain`] finds, and [`Error::Emulator`].
    pub fn gain<T: Element>(&self, op: cpu::Gain<'_, T>) -> Result<Counters> {
        cpu::check_gain(&op)?;
        let cpu::Gain { w, factors, scale, magnitude, earlier, mut norm, mut gain } = op;
        let mut memory = Memory::new();
        let (a, b, f32_factors) = upload_factors(&mut memory, &factors)?;
        let output = |memory: &mut Memory, name, vector: &Option<MatrixMut<'_, [f32]>>| {
            vector.as_ref().map(|vector| upload(memory, name, cpu::shared(vector), false)).transpose()
        };
        let uploaded = raw::Gain {
            dtype: T::DTYPE,
            w: upload(&mut memory, "w", w, true)?,
            f32_factors,
            a,
            b,
            scale,
            magnitude: magnitude.map(|magnitude| upload(&mut memory, "magnitude", magnitude, true)).transpose()?,
            earlier: earlier.map(|earlier| upload(&mut memory, "earlier", earlier, true)).transpose()?,
            norm: output(&mut memory, "norm", &norm)?,
            gain: output(&mut memory, "gain", &gain)?,
        };
        let counters = self.run(&mut memory, &Launch::gain(&uploaded)?)?;
        for (name, target, from) in [("norm", &mut norm, uploaded.norm), ("gain", &mut gain, uploaded.gain)] {
            if let (Some(target), Some(from)) = (target, from) {
                download(&memory, name, from, target)?;
            }
        }
        Ok(counters)
    }

    /// Runs a plan on a workspace of exactly its size, of which only the synchronisation words are initialised; each launch
    /// must leave them zero.
    fn execute(&self, memory: &mut Memory, plan: &Plan) -> Result<Counters> {
        let bytes = plan.workspace_bytes();
        let workspace = memory.try_alloc("workspace", bytes).map_err(memory_error)?;
        memory.write(workspace, &[0; SYNC_BYTES]).map_err(memory_error)?;
        let launch = plan.launch(workspace, bytes)?;
        let mut counters = Counters::default();
        for _ in 0..=self.replays {
            counters = self.run(memory, &launch)?;
            let words = memory.read(workspace, SYNC_BYTES).map_err(memory_error)?;
            if let Some(at) = words.iter().position(|&byte| byte != 0) {
                return Err(report(format!("synchronisation word {} is not zero after the launch", at / 4)));
            }
            memory.poison(workspace + SYNC_BYTES as u64, bytes - SYNC_BYTES).map_err(memory_error)?;
        }
        Ok(counters)
    }
}

/// A map as the emulated kernel takes it, under the rules of the driver's documentation.
fn encode(map: &plan::TensorMap) -> Result<[u8; MAP_BYTES]> {
    let dtype = match map.dtype {
        Dtype::F16 => TensorType::F16,
        Dtype::Bf16 => TensorType::Bf16,
        Dtype::F32 => TensorType::F32,
    };
    let swizzle = match map.swizzle {
        plan::Swizzle::Bytes32 => Swizzle::Bytes32,
        plan::Swizzle::Bytes64 => Swizzle::Bytes64,
        plan::Swizzle::Bytes128 => Swizzle::Bytes128,
    };
    let encoded = TensorMap::encode_tiled(
        dtype,
        2,
        map.address,
        &map.dims,
        &[map.row_bytes],
        &map.boxes,
        &[1, 1],
        Interleave::None,
        swizzle,
        if map.is_read { L2Promotion::Bytes256 } else { L2Promotion::None },
        OobFill::Zeros,
    );
    Ok(*encoded.map_err(report)?.as_bytes())
}
