//! The emulator backend: the launches that a GPU would get, executed on a CPU model of the PTX ISA. For tests.
//!
//! Operands are slices, as for [`cpu`]. Each is copied into simulated memory of exactly its size in which only
//! the matrix's elements are initialised, so that a read of anything else, a write outside an output, an output element
//! that is never written and a workspace that is not left clean are errors, beside all that the emulator itself finds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub use ptx_emulator::{Checks, Class, Counters, Options, Timing};
use ptx_emulator::{Interleave, L2Promotion, Memory, MemoryError, Module, OobFill, Swizzle, TensorMap, TensorType};

use crate::error::{Error, Result};
use crate::kernels::Image;
use crate::params::MAP_BYTES;
use crate::plan::{self, Device, Launch, Plan, SYNC_BYTES};
use crate::{Dropout, Dtype, Element, Factors, Gradient, MagnitudeGradient, Matrix, MatrixMut, Seed, cpu, raw};

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
    pub fn forward<T: Element>(&self, op: cpu::Forward<'_, T>) -> Result<Run> {
        cpu::check_forward(&op)?;
        let cpu::Forward { x, w, a, b, scale, bias, mut h, mut y, variant } = op;
        let mut memory = Memory::new();
        let uploaded = raw::Forward {
            dtype: T::DTYPE,
            x: upload(&mut memory, "x", x, true)?,
            w: upload(&mut memory, "w", w, true)?,
            a: upload(&mut memory, "a", a, true)?,
            b: upload(&mut memory, "b", b, true)?,
            scale,
            bias: bias.map(|bias| upload(&mut memory, "bias", bias, true)).transpose()?,
            h: h.as_ref().map(|h| upload(&mut memory, "h", cpu::shared(h), false)).transpose()?,
            y: upload(&mut memory, "y", cpu::shared(&y), false)?,
            variant: upload_variant(&mut memory, &variant)?,
        };
        let plan = Plan::forward_with(&uploaded, &self.device, self.plan_options())?;
        let counters = self.execute(&mut memory, &plan)?;
        if let (Some(h), Some(from)) = (&mut h, uploaded.h) {
            download(&memory, "h", from, h)?;
        }
        download(&memory, "y", uploaded.y, &mut y)?;
        Ok(Run { plan, counters })
    }

    /// dx = dy W + dh A, da = dhᵀ x, db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B; only the outputs that are present.
    ///
    /// # Errors
    /// As [`cpu::backward`], what [`Plan::backward`] finds, and [`Error::Emulator`].
    pub fn backward<T: Element>(&self, op: cpu::Backward<'_, T>) -> Result<Run> {
        cpu::check_backward(&op)?;
        let cpu::Backward { dy, w, a, b, scale, x, h, mut dx, mut da, mut db, mut dbias, mut dm, accumulate, variant } =
            op;
        let mut memory = Memory::new();
        let gradient = |memory: &mut Memory, name, gradient: &Option<Gradient<'_, [T], [f32]>>, keeps| {
            Ok::<_, Error>(match gradient {
                Some(Gradient::Storage(m)) => {
                    let matrix = upload(memory, name, cpu::shared(m), keeps)?;
                    Some(raw::Gradient { matrix, f32: T::DTYPE == Dtype::F32 })
                }
                Some(Gradient::F32(m)) => {
                    Some(raw::Gradient { matrix: upload(memory, name, cpu::shared(m), keeps)?, f32: true })
                }
                None => None,
            })
        };
        let uploaded = raw::Backward {
            dtype: T::DTYPE,
            dy: upload(&mut memory, "dy", dy, true)?,
            w: upload(&mut memory, "w", w, true)?,
            a: upload(&mut memory, "a", a, true)?,
            b: upload(&mut memory, "b", b, true)?,
            scale,
            x: x.map(|x| upload(&mut memory, "x", x, true)).transpose()?,
            h: h.map(|h| upload(&mut memory, "h", h, true)).transpose()?,
            dx: dx.as_ref().map(|dx| upload(&mut memory, "dx", cpu::shared(dx), accumulate.dx)).transpose()?,
            da: gradient(&mut memory, "da", &da, accumulate.da)?,
            db: gradient(&mut memory, "db", &db, accumulate.db)?,
            dbias: gradient(&mut memory, "dbias", &dbias, accumulate.dbias)?,
            dm: dm.as_ref().map(|dm| upload_magnitude(&mut memory, dm, accumulate.dm)).transpose()?,
            accumulate,
            variant: upload_variant(&mut memory, &variant)?,
        };
        let plan = Plan::backward_with(&uploaded, &self.device, self.plan_options())?;
        let counters = self.execute(&mut memory, &plan)?;
        if let (Some(dx), Some(from)) = (&mut dx, uploaded.dx) {
            download(&memory, "dx", from, dx)?;
        }
        if let (Some(dm), Some(from)) = (&mut dm, uploaded.dm) {
            download(&memory, "dm", from.dm, &mut dm.dm)?;
        }
        for (name, target, from) in
            [("da", &mut da, uploaded.da), ("db", &mut db, uploaded.db), ("dbias", &mut dbias, uploaded.dbias)]
        {
            match (target, from) {
                (Some(Gradient::Storage(target)), Some(from)) => download(&memory, name, from.matrix, target)?,
                (Some(Gradient::F32(target)), Some(from)) => download(&memory, name, from.matrix, target)?,
                _ => {}
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

    /// rounded_a = A and rounded_b = scale · B, or that over a divisor, in the storage type.
    ///
    /// # Errors
    /// As [`cpu::round`], what [`Launch::round`] finds, and [`Error::Emulator`].
    pub fn round<T: Element>(&self, op: cpu::Round<'_, T>) -> Result<Counters> {
        cpu::check_round(&op)?;
        let cpu::Round { factors, scale, divisor, mut rounded_a, mut rounded_b } = op;
        let mut memory = Memory::new();
        let (a, b, f32_factors) = upload_factors(&mut memory, &factors)?;
        let uploaded = raw::Round {
            dtype: T::DTYPE,
            f32_factors,
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

fn row_bytes<T: Element>(matrix: Matrix<'_, [T]>, row: usize) -> Vec<u8> {
    let start = matrix.offset + row * matrix.row_stride;
    let mut bytes = Vec::with_capacity(matrix.cols * T::DTYPE.size());
    matrix.data[start..start + matrix.cols].iter().for_each(|element| element.append_bytes(&mut bytes));
    bytes
}

/// An allocation of the slice's size, with the matrix's elements written where `initialised`.
fn upload<T: Element>(
    memory: &mut Memory,
    name: &str,
    matrix: Matrix<'_, [T]>,
    initialised: bool,
) -> Result<raw::Matrix> {
    let Matrix { data, offset, rows, cols, row_stride } = matrix;
    let size = T::DTYPE.size();
    let base = memory.try_alloc(name, data.len() * size).map_err(memory_error)?;
    let ptr = base + (offset * size) as u64;
    if initialised && cols != 0 {
        for row in 0..rows {
            memory.write(ptr + (row * row_stride * size) as u64, &row_bytes(matrix, row)).map_err(memory_error)?;
        }
    }
    Ok(raw::Matrix { ptr, rows, cols, row_stride })
}

/// Words of 64 bits, on the same terms as [`upload`].
fn upload_words(memory: &mut Memory, name: &str, matrix: Matrix<'_, [u64]>) -> Result<raw::Matrix> {
    let Matrix { data, offset, rows, cols, row_stride } = matrix;
    let base = memory.try_alloc(name, data.len() * 8).map_err(memory_error)?;
    for row in 0..rows {
        let start = offset + row * row_stride;
        let bytes: Vec<u8> = data[start..start + cols].iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write(base + 8 * start as u64, &bytes).map_err(memory_error)?;
    }
    Ok(raw::Matrix { ptr: base + 8 * offset as u64, rows, cols, row_stride })
}

fn upload_variant(memory: &mut Memory, variant: &cpu::Variant<'_>) -> Result<raw::Variant> {
    let routes = variant.routes.map(|routes| upload_words(memory, "routes", routes)).transpose()?;
    let gain = variant.gain.map(|gain| upload(memory, "gain", gain, true)).transpose()?;
    let Some(Dropout { p, seed }) = variant.dropout else { return Ok(raw::Variant { dropout: None, routes, gain }) };
    let seed = match seed {
        Seed::Value { seed, offset } => raw::Seed::Value { seed, offset },
        Seed::Memory(state) => raw::Seed::Memory(upload_words(memory, "seed", state)?),
    };
    Ok(raw::Variant { dropout: Some(raw::Dropout { p, seed }), routes, gain })
}

/// What DoRA's gradient of the magnitude takes; dm itself where it `keeps` what it holds.
fn upload_magnitude<T: Element>(
    memory: &mut Memory,
    from: &MagnitudeGradient<'_, [T], [f32], [f32]>,
    keeps: bool,
) -> Result<raw::MagnitudeGradient> {
    Ok(raw::MagnitudeGradient {
        y: upload(memory, "y", from.y, true)?,
        bias: from.bias.map(|bias| upload(memory, "bias", bias, true)).transpose()?,
        magnitude: upload(memory, "magnitude", from.magnitude, true)?,
        dm: upload(memory, "dm", cpu::shared(&from.dm), keeps)?,
    })
}

/// A and B, and whether they are f32.
fn upload_factors<T: Element>(
    memory: &mut Memory,
    factors: &Factors<'_, [T], [f32]>,
) -> Result<(raw::Matrix, raw::Matrix, bool)> {
    Ok(match *factors {
        Factors::Storage { a, b } => {
            (upload(memory, "a", a, true)?, upload(memory, "b", b, true)?, T::DTYPE == Dtype::F32)
        }
        Factors::F32 { a, b } => (upload(memory, "a", a, true)?, upload(memory, "b", b, true)?, true),
    })
}

/// Copies every element back; each must have been written, and nothing around them.
fn download<T: Element>(memory: &Memory, name: &str, from: raw::Matrix, target: &mut MatrixMut<'_, [T]>) -> Result<()> {
    let MatrixMut { ref mut data, offset, rows, cols, row_stride } = *target;
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let size = T::DTYPE.size();
    let base = from.ptr - (offset * size) as u64;
    let written = memory.written(base, data.len() * size).map_err(memory_error)?;
    let inside = |at: usize| at.checked_sub(offset).is_some_and(|at| at / row_stride < rows && at % row_stride < cols);
    if let Some(at) = (0..data.len()).find(|&at| !inside(at) && written[at * size..(at + 1) * size].contains(&true)) {
        return Err(report(format!("element {at} of the buffer of {name}, which is not the matrix's, was written")));
    }
    for row in 0..rows {
        let start = row * row_stride;
        let bytes = memory.read(from.ptr + (start * size) as u64, cols * size).map_err(memory_error)?;
        for (element, bytes) in data[offset + start..][..cols].iter_mut().zip(bytes.chunks_exact(size)) {
            *element = T::from_bytes(bytes);
        }
    }
    Ok(())
}
