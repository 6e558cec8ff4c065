//! From a problem and a device to launches: plain data in, plain data out, no GPU needed.
//!
//! [`Plan::forward`] and [`Plan::backward`] choose the family and the tile shape, number the units of work, lay out the
//! workspace and can [`explain`](Plan::explain) all of it. [`Plan::launch`] then only fills in the workspace address.

mod adapter;
mod calibration;
mod device;
mod explain;
mod floor;
mod launch;
mod operands;
mod options;
mod portable;
mod scratch;
mod sm90;
mod split;

pub use crate::params::{
    LoraBackwardParams, LoraBackwardProjection, LoraDropout, LoraForwardParams, LoraForwardProjection, LoraGainParams,
    LoraMagnitude, LoraMatrix, LoraMergeParams, LoraRoundParams, LoraSm90BackwardParams, LoraSm90BackwardProjection,
    LoraSm90ForwardParams, LoraSm90ForwardProjection, LoraSplit, Params,
};
pub use device::{Device, Peak};
pub use floor::Floor;
pub use launch::{Launch, Swizzle, TensorMap};
pub use options::{Family, Options, TileSize};
#[cfg(feature = "cuda")]
pub(crate) use sm90::IMAGES as SM90_IMAGES;

use scratch::Scratch;

use crate::error::{Error, Result};
use crate::params::*;
use crate::shape::Ranges;
use crate::{Dtype, LoraShape, raw};

/// Bytes at the start of a workspace that must be zero before its first use. Every launch leaves them zero.
pub const SYNC_BYTES: usize = LORA_SYNC_BYTES as usize;

/// Alignment of a workspace in bytes.
pub const WORKSPACE_ALIGN: u64 = 256;

/// Words for flags; the rest of the synchronisation area counts the chunks of da and db tiles.
const MAX_FLAGS: u64 = 8192;
const MAX_COUNTERS: u64 = LORA_SYNC_BYTES as u64 / 4 - LORA_SYNC_FLAGS as u64 - MAX_FLAGS;

/// What will run for one call, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    shape: LoraShape,
    parts: Vec<Part>,
    dtype: Dtype,
    device: Device,
    options: Options,
    choice: Choice,
    launch: Launch,
    scratch: Scratch,
    notes: Vec<String>,
    /// Where the arguments lie.
    ranges: Ranges,
    floor: Floor,
    microseconds: Option<f64>,
}

/// The dimensions of one projection.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Part {
    n: usize,
    r: usize,
    /// Ranks of the projections before.
    first_rank: usize,
}

impl Part {
    /// Of projections with these w and b.
    fn all(factors: impl Iterator<Item = (raw::Matrix, raw::Matrix)>) -> Vec<Part> {
        let mut first_rank = 0;
        let part = |(w, b): (raw::Matrix, raw::Matrix)| {
            let part = Part { n: w.rows, r: b.cols, first_rank };
            first_rank += part.r;
            part
        };
        factors.map(part).collect()
    }

    fn of_forward(op: &raw::ForwardShared) -> Vec<Part> {
        Part::all(op.projections.iter().map(|projection| (projection.w, projection.b)))
    }

    fn of_backward(op: &raw::BackwardShared) -> Vec<Part> {
        Part::all(op.projections.iter().map(|projection| (projection.w, projection.b)))
    }
}

/// What the kernels have for each projection, from the first on.
fn each<P: Default, Q>(all: &[Q], of: impl Fn(usize, &Q) -> P) -> [P; raw::MAX_PROJECTIONS] {
    std::array::from_fn(|at| all.get(at).map_or_else(P::default, |projection| of(at, projection)))
}

/// Ranks that a column of y goes through, on average.
fn mean_rank(parts: &[Part]) -> usize {
    let columns: usize = parts.iter().map(|part| part.n).sum();
    parts.iter().map(|part| part.n * part.r).sum::<usize>() / columns.max(1)
}

/// The sum of counts up to each: where the items of each begin when those of all are numbered in turn, and how many there are.
fn numbered(counts: impl IntoIterator<Item = u64>) -> (Vec<u64>, u64) {
    let mut end = 0;
    let firsts = counts.into_iter().map(|count| {
        let first = end;
        end += count;
        first
    });
    (firsts.collect(), end)
}

/// Part of the data sheet's memory bandwidth that a kernel reaches. Not measured.
const OF_BANDWIDTH: f64 = 0.9;

/// What was chosen to run.
#[derive(Clone, Debug, PartialEq)]
enum Choice {
    Portable(portable::Tile),
    Sm90(sm90::Choice),
}

/// What a family makes of a call.
struct Draft {
    choice: Choice,
    launch: Launch,
    scratch: Scratch,
    notes: Vec<String>,
    /// Predicted by the family's model, where it has a figure.
    microseconds: Option<f64>,
}

/// Bytes of workspace that suffice for every call of up to `m` tokens and up to `r` ranks of all its projections, whatever else it
/// asks for. What one shape needs is no bound for smaller ones: how many chunks the tokens are cut into does not grow evenly with
/// them.
#[cfg(feature = "cuda")]
pub(crate) fn workspace_up_to(m: usize, r: usize, dtype: Dtype, device: &Device, options: &Options) -> u64 {
    let mut scratch = Scratch::new();
    scratch.reserve_middle(m, r, dtype);
    reserve_most_partials(&mut scratch, m, r, device, options);
    scratch.end
}

/// The same for one projection, with f32 factors of these extents too.
#[cfg(feature = "cuda")]
pub(crate) fn split_workspace_up_to(shape: LoraShape, dtype: Dtype, device: &Device, options: &Options) -> u64 {
    let mut scratch = Scratch::new();
    scratch.reserve_middle(shape.m, crate::split::split_ranks(shape.r), dtype);
    split::reserve_most(&mut scratch, shape);
    reserve_most_partials(&mut scratch, shape.m, crate::split_columns(shape.r), device, options);
    scratch.end
}

#[cfg(feature = "cuda")]
fn reserve_most_partials(scratch: &mut Scratch, m: usize, r: usize, device: &Device, options: &Options) {
    let sm90 = if device.arch == sm90::ARCH { sm90::most_partial_bytes(device, options, m, r) } else { 0 };
    scratch.reserve(portable::most_partial_bytes(m).max(sm90));
}

fn blocks(extent: usize, block: u32) -> u64 {
    (extent as u64).div_ceil(u64::from(block))
}

/// CTAs of a launch: more than any GPU holds at once.
const MAX_CTAS: u32 = 1 << 20;

fn check_units(count: u64) -> Result<u32> {
    // Tickets run past the last unit by one per CTA.
    let limit = u64::from(u32::MAX - MAX_CTAS);
    u32::try_from(count).ok().filter(|_| count <= limit).ok_or(Error::TooLarge {
        what: "the number of tiles",
        got: count,
        limit,
    })
}

pub(crate) fn check_dtype(dtype: Dtype) -> Result<()> {
    match dtype {
        Dtype::F16 | Dtype::Bf16 => Ok(()),
        Dtype::F32 => Err(Error::Dtype { got: dtype, backend: "the CUDA kernels", expected: "F16, Bf16" }),
    }
}

/// Flags for `m_blocks`: how many blocks share one (a power of two), and how many flags that makes.
fn flags(m_blocks: u64) -> (u32, u64) {
    let shift = (0..32).find(|shift| m_blocks.div_ceil(1 << shift) <= MAX_FLAGS).unwrap_or(31);
    (shift, m_blocks.div_ceil(1 << shift))
}

fn or(flags: &[(bool, u32)]) -> u32 {
    flags.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum()
}

fn is_f32(argument: Option<raw::Gradient>) -> bool {
    argument.is_some_and(|gradient| gradient.f32)
}

/// `LORA_ACCUMULATE_*`, `LORA_DA_F32` and `LORA_GAINED` of a call.
fn gradient_flags(op: &raw::BackwardShared) -> u32 {
    or(&[
        (op.accumulate.dx, LORA_ACCUMULATE_DX),
        (op.accumulate.da, LORA_ACCUMULATE_DA),
        (op.accumulate.db, LORA_ACCUMULATE_DB),
        (op.accumulate.dbias, LORA_ACCUMULATE_DBIAS),
        (op.accumulate.dm, LORA_ACCUMULATE_DM),
        (is_f32(op.da), LORA_DA_F32),
        (op.projections.iter().any(|of| of.gain.is_some()), LORA_GAINED),
    ])
}

/// `LORA_DB_F32` and `LORA_DBIAS_F32` of a projection.
fn projection_flags(of: &raw::BackwardProjection) -> u32 {
    or(&[(is_f32(of.db), LORA_DB_F32), (is_f32(of.dbias), LORA_DBIAS_F32)])
}

/// What planning needs before it looks at the shape.
fn check(dtype: Dtype, device: &Device, options: &Options) -> Result<()> {
    check_dtype(dtype)?;
    portable::Tile::check(device)?;
    options.check()
}

/// The Hopper family where nothing stands against it and it is predicted to be faster, unless the caller decided otherwise.
fn draft(
    device: &Device,
    options: &Options,
    obstacles: Vec<String>,
    sm90: impl FnOnce() -> Result<Draft>,
    portable: impl FnOnce() -> Result<Draft>,
) -> Result<Draft> {
    let absent = options.without_sm90.then(|| "this build holds no kernels of the Hopper family".to_owned());
    let mut obstacles: Vec<String> = absent.into_iter().chain(obstacles).collect();
    match (options.decided(), obstacles.is_empty()) {
        (Some((_, Family::Portable, _)), _) => portable(),
        (Some(_), true) => sm90(),
        (Some((option, Family::Sm90, got)), false) => {
            let expected = format!("a choice of the portable family: {}", obstacles.swap_remove(0));
            Err(Error::PlanOption { option, got, expected })
        }
        (None, true) => {
            let (sm90, mut portable) = (sm90()?, portable());
            match &mut portable {
                Ok(Draft { microseconds: Some(other), notes, .. })
                    if sm90.microseconds.is_some_and(|us| *other < us) =>
                {
                    notes.push(format!(
                        "not the Hopper family: {:.1} us are predicted for it, {other:.1} us for the portable one",
                        sm90.microseconds.unwrap_or_default()
                    ));
                    portable
                }
                _ => Ok(sm90),
            }
        }
        (None, false) => {
            let mut draft = portable()?;
            // On other architectures there is nothing that the caller could change.
            if device.arch == sm90::ARCH {
                let notes = obstacles.iter().map(|obstacle| format!("not the Hopper family: {obstacle}"));
                draft.notes.extend(notes);
            }
            Ok(draft)
        }
    }
}

impl Plan {
    /// Plans y = x Wᵀ + h Bᵀ (+ bias) after checking the arguments.
    ///
    /// # Errors
    /// Those of [`raw::Forward::check`]; [`Error::Dtype`] for f32; [`Error::UnsupportedArch`] below sm_75;
    /// [`Error::TooLarge`] when there are more tiles than a launch can number, or when `device` has less
    /// shared memory or more SMs than the kernels are written for; [`Error::ZeroDimension`] when it has no SM.
    pub fn forward(op: &raw::Forward, device: &Device) -> Result<Plan> {
        Plan::forward_with(op, device, Options::default())
    }

    /// [`forward`](Self::forward) with some choices made by the caller.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::PlanOption`] for a choice that cannot be had.
    pub fn forward_with(op: &raw::Forward, device: &Device, options: Options) -> Result<Plan> {
        Plan::forward_shared_with(&op.into(), device, options)
    }

    /// Plans y = x Wᵀ + h Bᵀ (+ bias) for projections that share x, after checking the arguments.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), with those of [`raw::ForwardShared::check`].
    pub fn forward_shared(op: &raw::ForwardShared, device: &Device) -> Result<Plan> {
        Plan::forward_shared_with(op, device, Options::default())
    }

    /// [`forward_shared`](Self::forward_shared) with some choices made by the caller.
    ///
    /// # Errors
    /// As [`forward_shared`](Self::forward_shared), and [`Error::PlanOption`] for a choice that cannot be had.
    pub fn forward_shared_with(op: &raw::ForwardShared, device: &Device, options: Options) -> Result<Plan> {
        let (shape, ranges) = op.judge()?;
        let parts = Part::of_forward(op);
        check(op.dtype, device, &options)?;
        let departs = (op.routes.is_some(), op.is_split(), &*operands::gains(&op.projections, |of| of.gain));
        let obstacles = sm90::obstacles(device, shape.k, &parts, departs, &sm90::forward_operands(op));
        let draft = draft(
            device,
            &options,
            obstacles,
            || sm90::forward(op, shape, &parts, device, &options),
            || portable::forward(op, shape, &parts, device, &options),
        )?;
        let floor = Floor::forward(op, shape, device.known_peak());
        Ok(Plan::new(shape, parts, op.dtype, device, options, ranges, floor, draft))
    }

    /// Plans the requested outputs of backward after checking the arguments.
    ///
    /// # Errors
    /// Those of [`raw::Backward::check`]; [`Error::Dtype`] for f32; [`Error::UnsupportedArch`] below sm_75;
    /// [`Error::TooLarge`] when there are more tiles than a launch can number, or when `device` has less
    /// shared memory or more SMs than the kernels are written for; [`Error::ZeroDimension`] when it has no SM.
    pub fn backward(op: &raw::Backward, device: &Device) -> Result<Plan> {
        Plan::backward_with(op, device, Options::default())
    }

    /// [`backward`](Self::backward) with some choices made by the caller.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), and [`Error::PlanOption`] for a choice that cannot be had.
    pub fn backward_with(op: &raw::Backward, device: &Device, options: Options) -> Result<Plan> {
        Plan::backward_shared_with(&op.into(), device, options)
    }

    /// Plans the requested outputs of backward for projections that share x, after checking the arguments.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), with those of [`raw::BackwardShared::check`].
    pub fn backward_shared(op: &raw::BackwardShared, device: &Device) -> Result<Plan> {
        Plan::backward_shared_with(op, device, Options::default())
    }

    /// [`backward_shared`](Self::backward_shared) with some choices made by the caller.
    ///
    /// # Errors
    /// As [`backward_shared`](Self::backward_shared), and [`Error::PlanOption`] for a choice that cannot be had.
    pub fn backward_shared_with(op: &raw::BackwardShared, device: &Device, options: Options) -> Result<Plan> {
        let (shape, ranges) = op.judge()?;
        let parts = Part::of_backward(op);
        check(op.dtype, device, &options)?;
        let departs = (op.routes.is_some(), op.is_split(), &*operands::gains(&op.projections, |of| of.gain));
        let obstacles = sm90::obstacles(device, shape.k, &parts, departs, &sm90::backward_operands(op));
        let draft = draft(
            device,
            &options,
            obstacles,
            || sm90::backward(op, shape, &parts, device, &options),
            || portable::backward(op, shape, &parts, device, &options),
        )?;
        let floor = Floor::backward(op, shape, device.known_peak());
        Ok(Plan::new(shape, parts, op.dtype, device, options, ranges, floor, draft))
    }

    #[allow(clippy::too_many_arguments)] // the fields, but for the draft's
    fn new(
        shape: LoraShape,
        parts: Vec<Part>,
        dtype: Dtype,
        device: &Device,
        options: Options,
        ranges: Ranges,
        floor: Floor,
        draft: Draft,
    ) -> Plan {
        let Draft { choice, launch, scratch, notes, microseconds } = draft;
        // The families' models reckon with tensor cores and L2; memory is the same to both.
        let memory = floor.memory_microseconds().map_or(0.0, |us| us / OF_BANDWIDTH);
        let microseconds = microseconds.map(|us| us.max(memory));
        let device = device.clone();
        Plan { shape, parts, dtype, device, options, choice, launch, scratch, notes, ranges, floor, microseconds }
    }

    /// The family that was chosen.
    pub fn family(&self) -> Family {
        match self.choice {
            Choice::Portable(_) => Family::Portable,
            Choice::Sm90(_) => Family::Sm90,
        }
    }

    /// How long the launch takes by the planner's model, in microseconds; `None` where it has nothing to reckon from: the
    /// portable family on a GPU that is not in the table of data sheets or has other tensor instructions than `mma.sync`. The
    /// model's constants are not measured: this is for choosing between plans.
    pub fn predicted_microseconds(&self) -> Option<f64> {
        self.microseconds
    }

    /// What no kernel can be faster than.
    pub fn floor(&self) -> Floor {
        self.floor
    }

    /// Workspace the launch needs, in bytes: the synchronisation area, h or dh, and partial sums.
    pub fn workspace_bytes(&self) -> usize {
        self.scratch.end as usize
    }

    /// Dimensions of the call; N and R of all its projections together.
    pub fn shape(&self) -> LoraShape {
        self.shape
    }

    /// The launch, with the workspace at device address `workspace` (a multiple of [`WORKSPACE_ALIGN`], holding
    /// `bytes` bytes, of which the first [`SYNC_BYTES`] are zero).
    ///
    /// # Errors
    /// [`Error::Workspace`] when `bytes` is less than [`workspace_bytes`](Self::workspace_bytes);
    /// [`Error::NullPointer`], [`Error::Misaligned`] and [`Error::TooLarge`] for the address; [`Error::Overlap`] when an
    /// argument lies in it.
    pub fn launch(&self, workspace: u64, bytes: usize) -> Result<Launch> {
        if bytes < self.workspace_bytes() {
            return Err(Error::Workspace { got: bytes, needed: self.workspace_bytes() });
        }
        if workspace == 0 {
            return Err(Error::NullPointer { arg: "workspace" });
        }
        if !workspace.is_multiple_of(WORKSPACE_ALIGN) {
            return Err(Error::Misaligned { arg: "workspace", address: workspace, align: WORKSPACE_ALIGN });
        }
        if workspace.checked_add(self.scratch.end).is_none() {
            let limit = u64::MAX - self.scratch.end;
            return Err(Error::TooLarge { what: "the address of the workspace", got: workspace, limit });
        }
        let end = workspace + self.scratch.end;
        if let Some(&(other, ..)) = self.ranges.iter().find(|(_, from, to)| from < to && *from < end && workspace < *to)
        {
            return Err(Error::Overlap { output: "workspace", other });
        }
        let mut launch = self.launch.clone();
        self.scratch.place(&mut launch, workspace);
        Ok(launch)
    }
}
