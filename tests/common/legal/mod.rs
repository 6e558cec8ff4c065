//! What every plan promises the kernels and the device, reckoned apart from the planner: a plan that breaks a promise panics.
//!
//! Counts are taken in 128 bits here, so that one which wraps in the planner shows.
#![allow(clippy::panic)] // helpers of tests fail as tests do

mod adapter;
mod portable;
mod sm90;
mod split;

use fused_lora::plan::{
    Device, Family, Launch, LoraDropout, LoraMatrix, Options, Plan, SYNC_BYTES, Swizzle, TensorMap, WORKSPACE_ALIGN,
};
use fused_lora::{Dtype, LoraShape, raw};

pub use adapter::{merge, round};

/// Where workspaces are said to be, where a test does not mind.
pub const WORKSPACE: u64 = 1 << 63;
/// Words before the flags: LORA_SYNC_FLAGS.
const FIRST_FLAG: u128 = 3;
/// The largest grid along x.
const MAX_GRID: u32 = i32::MAX as u32;

/// A plan, its launch, and what both were made for.
struct Planned<'a> {
    plan: &'a Plan,
    launch: Launch,
    device: &'a Device,
    options: &'a Options,
    workspace: u64,
}

/// The plan of a forward, launched with its workspace at `workspace`.
pub fn forward(plan: &Plan, op: &raw::Forward, device: &Device, options: &Options, workspace: u64) {
    forward_shared(plan, &op.into(), device, options, workspace);
}

/// The same for projections that share x.
pub fn forward_shared(plan: &Plan, op: &raw::ForwardShared, device: &Device, options: &Options, workspace: u64) {
    let n = op.projections.iter().map(|of| of.w.rows).sum();
    let shape = LoraShape { m: op.x.rows, n, k: op.a.cols, r: op.a.rows };
    let planned = Planned::new(plan, shape, device, options, workspace);
    match plan.family() {
        Family::Portable => portable::forward(&planned, op, shape),
        Family::Sm90 => sm90::forward(&planned, op, shape),
    }
}

/// The plan of a backward, launched with its workspace at `workspace`.
pub fn backward(plan: &Plan, op: &raw::Backward, device: &Device, options: &Options, workspace: u64) {
    backward_shared(plan, &op.into(), device, options, workspace);
}

/// The same for projections that share x.
pub fn backward_shared(plan: &Plan, op: &raw::BackwardShared, device: &Device, options: &Options, workspace: u64) {
    let n = op.projections.iter().map(|of| of.w.rows).sum();
    let shape = LoraShape { m: op.projections[0].dy.rows, n, k: op.a.cols, r: op.a.rows };
    let planned = Planned::new(plan, shape, device, options, workspace);
    match plan.family() {
        Family::Portable => portable::backward(&planned, op, shape),
        Family::Sm90 => sm90::backward(&planned, op, shape),
    }
}

impl<'a> Planned<'a> {
    /// What holds for every family: options are followed, and the launch is one that CUDA accepts on the device.
    fn new(plan: &'a Plan, shape: LoraShape, device: &'a Device, options: &'a Options, workspace: u64) -> Planned<'a> {
        let launch = plan.launch(workspace, plan.workspace_bytes()).expect("a launch");
        let family = plan.family();
        assert_eq!(plan.shape(), shape);
        assert!(options.family.is_none_or(|decided| decided == family), "{options:?}: {family:?}");
        assert!(options.tile.is_none_or(|tile| tile.family() == family), "{options:?}: {family:?}");
        let is_hopper = options.cluster.or(options.bundle).or(options.chunks).is_some();
        assert!(family == Family::Sm90 || !is_hopper, "{options:?}: {family:?}");
        assert!(family == Family::Portable || (device.arch == 90 && !options.without_sm90), "{options:?}: {family:?}");
        check_limits(&launch, device);
        Planned { plan, launch, device, options, workspace }
    }

    /// Byte ranges of the workspace must be aligned, disjoint, after the synchronisation words and inside.
    fn check_regions(&self, regions: impl IntoIterator<Item = Region>) {
        let [start, bytes] = [self.workspace, self.plan.workspace_bytes() as u64].map(u128::from);
        assert!(start + bytes <= 1 << 64, "{start:#x} + {bytes}");
        let mut regions: Vec<Region> = regions.into_iter().collect();
        let needed: u128 = regions.iter().map(|region| region.bytes).sum();
        let gaps = u128::from(WORKSPACE_ALIGN) * (regions.len() as u128 + 1);
        assert!(bytes <= SYNC_BYTES as u128 + needed + gaps, "{bytes} bytes for {regions:?}");
        regions.push(Region { start, bytes: SYNC_BYTES as u128 });
        regions.sort_unstable();
        for window in regions.windows(2) {
            assert!(window[0].end() <= window[1].start, "regions overlap: {regions:?}");
        }
        for region in &regions {
            assert!(region.start.is_multiple_of(u128::from(WORKSPACE_ALIGN)), "{region:?}");
            assert!(
                start <= region.start && region.end() <= start + bytes,
                "{region:?} of {bytes} bytes at {start:#x}"
            );
        }
    }

    /// h or dh in the workspace, as a matrix.
    fn scratch(&self, matrix: LoraMatrix, LoraShape { m, r, .. }: LoraShape) -> raw::Matrix {
        let row_stride = matrix.row_stride as usize;
        assert!(
            row_stride >= r && row_stride.is_multiple_of(8),
            "rows of {r} elements start on 16 bytes: {row_stride}"
        );
        raw::Matrix { ptr: matrix.ptr, rows: m, cols: r, row_stride }
    }

    /// The order of main tiles: as decided or the planner's, and within what the kernels' 32 bits can multiply.
    fn check_order(&self, group_m: u32, groups: u32, columns: u32) {
        assert_eq!(group_m, self.options.group_m.unwrap_or(8).min(groups));
        assert!(group_m >= 1 && group_m.checked_mul(columns).is_some(), "{group_m} groups of {columns} tiles");
    }
}

/// What CUDA asks of a launch, and the device of its shared memory.
fn check_limits(launch: &Launch, device: &Device) {
    let [grid, cluster, block] = [launch.grid, launch.cluster, launch.block];
    assert!((1..=MAX_GRID).contains(&grid[0]) && grid[1..] == [1, 1], "{launch:?}");
    assert!((1..=8).contains(&cluster[0]) && cluster[1..] == [1, 1], "{launch:?}");
    assert!(cluster[0] == 1 || device.arch >= 90, "{launch:?}");
    assert!(grid[0].is_multiple_of(cluster[0]), "{launch:?}");
    assert!((32..=1024).contains(&block[0]) && block[0].is_multiple_of(32) && block[1..] == [1, 1], "{launch:?}");
    assert!(launch.shared_bytes <= device.shared_per_block, "{launch:?} on {device:?}");
    let bytes = launch.parameter_bytes(encode).unwrap_or_else(|error| panic!("{error}: {launch:?}"));
    assert!(bytes.len() <= 4096, "{} bytes of parameters", bytes.len());
    for (map, bytes) in launch.maps.iter().zip(bytes.chunks(128)) {
        assert_eq!(map.is_none(), bytes == [0; 128], "an absent map is zero bytes");
    }
}

/// The map as bytes, under the rules of the driver's documentation.
pub fn encode(map: &TensorMap) -> Result<[u8; 128], ptx_emulator::TensorMapError> {
    use ptx_emulator::{Interleave, L2Promotion, OobFill, Swizzle as Emulated, TensorType};
    let swizzle = match map.swizzle {
        Swizzle::Bytes32 => Emulated::Bytes32,
        Swizzle::Bytes64 => Emulated::Bytes64,
        Swizzle::Bytes128 => Emulated::Bytes128,
    };
    let dtype = if map.dtype == Dtype::F16 { TensorType::F16 } else { TensorType::Bf16 };
    ptx_emulator::TensorMap::encode_tiled(
        dtype,
        2,
        map.address,
        &map.dims,
        &[map.row_bytes],
        &map.boxes,
        &[1, 1],
        Interleave::None,
        swizzle,
        L2Promotion::None,
        OobFill::Zeros,
    )
    .map(|map| *map.as_bytes())
}

/// Bytes of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Region {
    start: u128,
    bytes: u128,
}

impl Region {
    /// Whole rows of 16-bit elements.
    fn of(matrix: raw::Matrix) -> Region {
        Region { start: matrix.ptr.into(), bytes: 2 * matrix.rows as u128 * matrix.row_stride as u128 }
    }

    fn end(&self) -> u128 {
        self.start + self.bytes
    }
}

/// Tickets run past the last unit by one per CTA: they fit in 32 bits.
fn check_tickets(counted: u32, expected: u128, launch: &Launch) {
    assert_eq!(u128::from(counted), expected);
    assert!(launch.grid[0] / launch.cluster[0] <= counted, "{counted} units for {launch:?}");
    assert!(counted.checked_add(launch.grid[0]).is_some(), "{counted} units for {launch:?}");
}

fn assert_covers(what: &str, blocks: u32, block: u32, extent: usize) {
    let [blocks, block, extent] = [u128::from(blocks), u128::from(block), extent as u128];
    assert!(blocks * block >= extent && (blocks - 1) * block < extent, "{blocks} of {block} for {what} {extent}");
}

/// One flag for each 2^shift of so many blocks, up to word `end`, and an area that holds all words.
fn check_flags(blocks: u128, flag_shift: u32, end: u32, sync_words: u32) {
    assert!(flag_shift < 32, "{flag_shift}");
    assert_eq!(FIRST_FLAG + ((blocks - 1) >> flag_shift) + 1, end.into());
    assert!(sync_words >= end && sync_words as usize * 4 <= SYNC_BYTES, "{sync_words} words");
}

fn check_dimensions(got: [u32; 4], LoraShape { m, n, k, r }: LoraShape) {
    assert_eq!(got.map(|dimension| dimension as usize), [m, n, k, r]);
}

/// The dropout and the routes that a kernel has.
fn check_variant((dropout, routes): (LoraDropout, u64), expected: Option<raw::Dropout>, table: Option<raw::Matrix>) {
    let dropped = dropped(expected);
    let seed = match expected.filter(|_| dropped != 0.0).map(|dropout| dropout.seed) {
        None => (0, 0, 0),
        Some(raw::Seed::Value { seed, offset }) => (seed, offset, 0),
        Some(raw::Seed::Memory(state)) => (0, 0, state.ptr),
    };
    assert_eq!((dropout.seed, dropout.offset, dropout.state), seed);
    assert_eq!(f64::from(dropout.threshold), dropped);
    assert_eq!(routes, table.map_or(0, |routes| routes.ptr));
}

/// p, counted in 2^-16.
fn dropped(dropout: Option<raw::Dropout>) -> f64 {
    dropout.map_or(0.0, |dropout| (f64::from(dropout.p) * 65536.0).round())
}

/// The factor that a kernel has for a scale.
fn scaled(scale: f32, dropout: Option<raw::Dropout>) -> f32 {
    let dropped = dropped(dropout);
    scale * if dropped == 65536.0 { 0.0 } else { (65536.0 / (65536.0 - dropped)) as f32 }
}

/// Where the items of each begin when those of all are numbered, and how many there are.
fn numbered(counts: impl Iterator<Item = u128>) -> (Vec<u128>, u128) {
    let mut end = 0;
    let mut firsts = Vec::new();
    for count in counts {
        firsts.push(end);
        end += count;
    }
    (firsts, end)
}

/// Tiles of db along the ranks of a projection: those of the first block are there for dbias and dm alone.
fn db_blocks(of: &raw::BackwardProjection, columns: usize, narrow: usize) -> u128 {
    let sums = of.dbias.is_some() || of.dm.is_some();
    if of.db.is_some() && columns > 0 { columns.div_ceil(narrow) as u128 } else { sums.into() }
}

/// The ranks of a projection in h or dh.
fn ranks_of(middle: raw::Matrix, first: usize, r: usize) -> raw::Matrix {
    raw::Matrix { ptr: middle.ptr + 2 * first as u64, cols: r, ..middle }
}

fn address(vector: Option<raw::Matrix>) -> u64 {
    vector.map_or(0, |vector| vector.ptr)
}

/// The address that the kernel has for a gradient.
fn pointer(wanted: bool, gradient: Option<raw::Gradient>) -> u64 {
    gradient.filter(|_| wanted).map_or(0, |gradient| gradient.matrix.ptr)
}
