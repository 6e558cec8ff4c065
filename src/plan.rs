//! From a problem and a device to launches: plain data in, plain data out, no GPU needed.
//!
//! [`Plan::forward`] and [`Plan::backward`] choose the tile shape, number the units of work, lay out the workspace and can
//! [`explain`](Plan::explain) all of it. [`Plan::launch`] then only fills in the workspace address.

mod device;
mod explain;
mod model;

pub use crate::params::{LoraBackwardParams, LoraForwardParams, LoraMatrix, Params};
pub use device::Device;
pub use model::TileSize;

use crate::error::{Error, Result};
use crate::params::*;
use crate::shape::Ranges;
use crate::{Dtype, LoraShape, raw};
use model::Tile;

/// Bytes at the start of a workspace that must be zero before its first use. Every launch leaves them zero.
pub const SYNC_BYTES: usize = LORA_SYNC_BYTES as usize;

/// Alignment of a workspace in bytes.
pub const WORKSPACE_ALIGN: u64 = 256;

/// f32 partial sums of da and db may take this much of the workspace.
const MAX_PARTIAL_BYTES: u64 = 16 << 20;
/// Tokens per chunk are not worth less than this: each chunk costs a round trip of partial sums.
const MIN_CHUNK_ROWS: u64 = 512;
/// M-blocks that pass over w together.
const GROUP_M: u32 = 8;
/// Words for flags; the rest of the synchronisation area counts the chunks of da and db tiles.
const MAX_FLAGS: u64 = 8192;
const MAX_COUNTERS: u64 = LORA_SYNC_BYTES as u64 / 4 - LORA_SYNC_FLAGS as u64 - MAX_FLAGS;

/// One kernel launch as data; a backend only executes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The [`Image`](crate::kernels::Image) that holds the kernel.
    pub image: &'static str,
    /// Entry point.
    pub kernel: &'static str,
    /// CTAs.
    pub grid: [u32; 3],
    /// CTAs per cluster; 1 × 1 × 1 when the kernel has none.
    pub cluster: [u32; 3],
    /// Threads per CTA.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
    /// The kernel's one parameter.
    pub params: Params,
}

/// What a caller may decide instead of the planner: for tests, and for measuring what the planner chooses between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// The tile shape; the fastest by the planner's model when absent.
    pub tile: Option<TileSize>,
}

impl Options {
    /// These options with one tile shape for every call.
    #[must_use]
    pub fn with_tile(mut self, tile: TileSize) -> Options {
        self.tile = Some(tile);
        self
    }
}

/// What will run for one call, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    shape: LoraShape,
    dtype: Dtype,
    device: Device,
    tile: Tile,
    launch: Launch,
    scratch: Scratch,
    notes: Vec<String>,
    /// Where the arguments lie.
    ranges: Ranges,
    /// The caller chose the tile.
    forced_tile: bool,
}

/// Byte offsets into the workspace of what the call did not bring along.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Scratch {
    h: Option<u64>,
    partials: Option<u64>,
    end: u64,
}

impl Scratch {
    fn reserve(&mut self, bytes: u64) -> u64 {
        let offset = self.end;
        self.end = (offset + bytes).next_multiple_of(WORKSPACE_ALIGN);
        offset
    }
}

/// Row stride of h or dh in the workspace: 16-byte rows, so that the fast loads apply.
fn scratch_stride(r: usize) -> usize {
    r.next_multiple_of(8)
}

fn blocks(extent: usize, block: u32) -> u64 {
    (extent as u64).div_ceil(u64::from(block))
}

/// CTAs of a launch: more than any GPU holds at once.
const MAX_CTAS: u32 = 1 << 20;

fn units(count: u64) -> Result<u32> {
    // Tickets run past the last unit by one per CTA.
    let limit = u64::from(u32::MAX - MAX_CTAS);
    u32::try_from(count).ok().filter(|_| count <= limit).ok_or(Error::TooLarge {
        what: "the number of tiles",
        got: count,
        limit,
    })
}

fn matrix(matrix: raw::Matrix) -> LoraMatrix {
    LoraMatrix { ptr: matrix.ptr, row_stride: matrix.row_stride as i64 }
}

fn check_dtype(dtype: Dtype) -> Result<()> {
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
    /// As [`forward`](Self::forward).
    pub fn forward_with(op: &raw::Forward, device: &Device, options: Options) -> Result<Plan> {
        let (shape, ranges) = op.judge()?;
        check_dtype(op.dtype)?;
        Tile::check(device)?;
        let LoraShape { m, n, k, r } = shape;
        let tile = Tile::choose(device, options.tile, &[(m, n, k + r)]);
        let (m_blocks, n_blocks) = (blocks(m, tile.block), blocks(n, tile.block));
        let h_units = m_blocks * blocks(r, LORA_NARROW_N);
        let units = units(h_units + m_blocks * n_blocks)?;
        let (flag_shift, flag_count) = flags(m_blocks);

        let mut scratch = Scratch { end: SYNC_BYTES as u64, ..Scratch::default() };
        let h = match op.h {
            Some(h) => matrix(h),
            None if r == 0 => LoraMatrix::default(),
            None => {
                scratch.h = Some(scratch.reserve((m * scratch_stride(r) * op.dtype.size()) as u64));
                LoraMatrix { ptr: 0, row_stride: scratch_stride(r) as i64 }
            }
        };
        let params = LoraForwardParams {
            x: matrix(op.x),
            w: matrix(op.w),
            a: matrix(op.a),
            b: matrix(op.b),
            h,
            y: matrix(op.y),
            bias: op.bias.map_or(0, |bias| bias.ptr),
            sync: 0,
            m: m as u32,
            n: n as u32,
            k: k as u32,
            r: r as u32,
            scale: op.scale,
            m_blocks: m_blocks as u32,
            n_blocks: n_blocks as u32,
            h_units: h_units as u32,
            units,
            group_m: GROUP_M,
            flag_shift,
            sync_words: LORA_SYNC_FLAGS + flag_count as u32,
        };
        let mut notes = Vec::new();
        explain::slow_operands(
            &mut notes,
            &[("x", Some(op.x)), ("w", Some(op.w)), ("a", Some(op.a)), ("b", Some(op.b)), ("h", op.h)],
        );
        let kernel = match (op.dtype, tile.is_large()) {
            (Dtype::Bf16, true) => "lora_forward_bf16_large",
            (Dtype::Bf16, false) => "lora_forward_bf16_small",
            (_, true) => "lora_forward_f16_large",
            (_, false) => "lora_forward_f16_small",
        };
        let launch = tile.launch("portable_forward", kernel, units, device, Params::Forward(params));
        let forced_tile = options.tile.is_some();
        Ok(Plan { shape, dtype: op.dtype, device: device.clone(), tile, launch, scratch, notes, ranges, forced_tile })
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
    /// As [`backward`](Self::backward).
    pub fn backward_with(op: &raw::Backward, device: &Device, options: Options) -> Result<Plan> {
        let (shape, ranges) = op.judge()?;
        check_dtype(op.dtype)?;
        Tile::check(device)?;
        let LoraShape { m, n, k, r } = shape;
        let has_adapter = r != 0;
        let wants_da = op.da.is_some() && has_adapter;
        let wants_db = op.db.is_some() && has_adapter;
        let wants_dh = has_adapter && (op.dx.is_some() || wants_da);
        let main = if op.dx.is_some() { vec![(m, k, n + r)] } else { vec![(m, r.max(1), n), (n, r.max(1), m)] };
        let tile = Tile::choose(device, options.tile, &main);

        let r_blocks = blocks(r, LORA_NARROW_N);
        let (m_blocks, n_blocks, k_blocks) = (blocks(m, tile.block), blocks(n, tile.block), blocks(k, tile.block));
        let dh_units = if wants_dh { m_blocks * r_blocks } else { 0 };
        let dx_units = if op.dx.is_some() { m_blocks * k_blocks } else { 0 };
        // dbias rides on the db tiles of the first block of ranks, which therefore exist even without db.
        let db_tiles = n_blocks * if wants_db { r_blocks } else { u64::from(op.dbias.is_some()) };
        let da_tiles = if wants_da { k_blocks * r_blocks } else { 0 };
        let (flag_shift, flag_count) = flags(m_blocks);
        let chunks = Chunks::choose(device, &tile, m, r, db_tiles + da_tiles);
        let dx_end = dh_units + dx_units;
        let db_end = dx_end + db_tiles * chunks.count;
        let units = units(db_end + da_tiles * chunks.count)?;

        let mut scratch = Scratch { end: SYNC_BYTES as u64, ..Scratch::default() };
        let dh_stride = scratch_stride(r);
        if wants_dh {
            scratch.h = Some(scratch.reserve((m * dh_stride * op.dtype.size()) as u64));
        }
        if chunks.count > 1 {
            scratch.partials = Some(scratch.reserve(chunks.bytes(db_tiles + da_tiles)));
        }
        let optional = |argument: Option<raw::Matrix>| argument.map(matrix).unwrap_or_default();
        let gradient = |wanted: bool, argument: Option<raw::Gradient>| {
            optional(argument.filter(|_| wanted).map(|gradient| gradient.matrix))
        };
        let is_f32 = |argument: Option<raw::Gradient>| argument.is_some_and(|gradient| gradient.f32);
        let flags = [
            (op.accumulate.dx, LORA_ACCUMULATE_DX),
            (op.accumulate.da, LORA_ACCUMULATE_DA),
            (op.accumulate.db, LORA_ACCUMULATE_DB),
            (op.accumulate.dbias, LORA_ACCUMULATE_DBIAS),
            (is_f32(op.da), LORA_DA_F32),
            (is_f32(op.db), LORA_DB_F32),
            (is_f32(op.dbias), LORA_DBIAS_F32),
        ];
        let counters = LORA_SYNC_FLAGS + flag_count as u32;
        let counter_words = if chunks.count > 1 { (db_tiles + da_tiles) as u32 } else { 0 };
        let params = LoraBackwardParams {
            dy: matrix(op.dy),
            w: matrix(op.w),
            a: matrix(op.a),
            b: matrix(op.b),
            x: optional(op.x),
            // Of db's narrow operand nothing is read when dbias alone is wanted; it is still an address.
            h: if wants_db { optional(op.h) } else { matrix(op.dy) },
            dh: LoraMatrix { ptr: 0, row_stride: dh_stride as i64 },
            dx: optional(op.dx),
            da: gradient(wants_da, op.da),
            db: gradient(wants_db, op.db),
            dbias: op.dbias.map_or(0, |dbias| dbias.matrix.ptr),
            partials: 0,
            sync: 0,
            m: m as u32,
            n: n as u32,
            k: k as u32,
            r: r as u32,
            scale: op.scale,
            m_blocks: m_blocks as u32,
            n_blocks: n_blocks as u32,
            k_blocks: k_blocks as u32,
            dh_units: dh_units as u32,
            dx_end: dx_end as u32,
            db_end: db_end as u32,
            units,
            chunks: chunks.count as u32,
            chunk_rows: chunks.rows as u32,
            partial_stride: chunks.partial_stride as u32,
            counters,
            group_m: GROUP_M,
            flag_shift,
            sync_words: counters + counter_words,
            flags: flags.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum(),
        };
        let mut notes = Vec::new();
        explain::slow_operands(
            &mut notes,
            // Only what the requested outputs read.
            &[
                ("dy", Some(op.dy)),
                ("w", op.dx.map(|_| op.w)),
                ("a", op.dx.map(|_| op.a)),
                ("b", Some(op.b).filter(|_| wants_dh)),
                ("x", op.x.filter(|_| wants_da)),
                ("h", op.h.filter(|_| wants_db)),
            ],
        );
        let kernel = match (op.dtype, tile.is_large()) {
            (Dtype::Bf16, true) => "lora_backward_bf16_large",
            (Dtype::Bf16, false) => "lora_backward_bf16_small",
            (_, true) => "lora_backward_f16_large",
            (_, false) => "lora_backward_f16_small",
        };
        let launch = tile.launch("portable_backward", kernel, units, device, Params::Backward(params));
        let forced_tile = options.tile.is_some();
        Ok(Plan { shape, dtype: op.dtype, device: device.clone(), tile, launch, scratch, notes, ranges, forced_tile })
    }

    /// Workspace the launch needs, in bytes: the synchronisation area, h or dh, and partial sums.
    pub fn workspace_bytes(&self) -> usize {
        self.scratch.end as usize
    }

    /// Dimensions of the call.
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
        let place = |ptr: &mut u64, offset: Option<u64>| {
            if let Some(offset) = offset {
                *ptr = workspace + offset;
            }
        };
        match &mut launch.params {
            Params::Forward(params) => {
                params.sync = workspace;
                place(&mut params.h.ptr, self.scratch.h);
            }
            Params::Backward(params) => {
                params.sync = workspace;
                place(&mut params.dh.ptr, self.scratch.h);
                place(&mut params.partials, self.scratch.partials);
            }
        }
        Ok(launch)
    }
}

/// How the tokens are cut for the reductions of da and db.
struct Chunks {
    count: u64,
    rows: u64,
    partial_stride: u64,
}

impl Chunks {
    /// Enough chunks for two db and da tiles per SM, within the memory for partial sums.
    fn choose(device: &Device, tile: &Tile, m: usize, r: usize, tiles: u64) -> Chunks {
        let block = u64::from(tile.block);
        let columns = (r as u64).min(u64::from(LORA_NARROW_N)).next_multiple_of(16);
        // One f32 per thread and accumulator register: the active columns and two of the column sums.
        let partial_stride = block * columns + 2 * u64::from(tile.threads);
        let whole = (m as u64).next_multiple_of(block);
        let wanted = (2 * u64::from(device.sms)).div_ceil(tiles.max(1));
        let affordable = MAX_PARTIAL_BYTES / (4 * partial_stride).saturating_mul(tiles.max(1));
        let most = wanted.min(affordable).min(m as u64 / MIN_CHUNK_ROWS);
        if most <= 1 || tiles > MAX_COUNTERS {
            return Chunks { count: 1, rows: whole, partial_stride };
        }
        let rows = (m as u64).div_ceil(most).next_multiple_of(block);
        Chunks { count: (m as u64).div_ceil(rows), rows, partial_stride }
    }

    fn bytes(&self, tiles: u64) -> u64 {
        4 * self.partial_stride * self.count * tiles
    }
}
